"""A step on a card: recorded is launched, kernels are definitions, the card is the CPU, and the host never waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.gpu.cases import matrix
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig

from octavo import adapters
from octavo.adapters import AdapterPlan
from octavo.data.loader import Batch
from octavo.data.packing import IGNORE_INDEX
from octavo.hardware import capabilities_of
from octavo.kernels import matmul8 as kernels
from octavo.layers.context import ForwardOptions, Save
from octavo.layers.frozen import FrozenLinear, FrozenMatrix
from octavo.layers.lora import FlatGroup, LoraSpec, flatten_
from octavo.models import Decoder
from octavo.objective import Inputs, Objective, next_token_loss
from octavo.ops import matmul8
from octavo.ops.quantize import scheme_named
from octavo.runtime import offload
from octavo.runtime.dispatch import Backends, set_backends
from octavo.store.sources import FolderSource
from octavo.store.weights import allocated, load
from octavo.train.precision import all_8bit, matmul8_of
from octavo.train.step import EagerStep, GraphStep, MicroStep

pytestmark = pytest.mark.filterwarnings("default")  # what libraries say of each other is no fault of ours
CARD, CPU = torch.device("cuda"), torch.device("cpu")
VOCABULARY, ROWS, LENGTH = 300, 4, 64
NEAR = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # of a gradient, the difference's norm over its own
# Heads of 64, so that every implementation of attention takes them.
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        initializer_range=0.1,
    ),
    "gptj": GPTJConfig(
        vocab_size=VOCABULARY, n_embd=256, n_inner=320, n_layer=2, n_head=4, rotary_dim=32, initializer_range=0.1
    ),
}
Load = Callable[..., "Step"]


@dataclass
class Step:
    """A model with pairs on all its layers, and its gradients in flat buffers as the loop has them."""

    model: Decoder
    groups: list[FlatGroup]

    def gradients(self) -> Tensor:
        found = [group.values.grad for group in self.groups]
        return torch.cat([gradient.detach().cpu() for gradient in found if gradient is not None])

    def taken(self, micro_step: MicroStep, batch: Batch, seed: float = 0.1) -> tuple[float, Tensor]:
        """(loss, gradients) of a batch alone."""
        for group in self.groups:
            assert group.values.grad is not None
            group.values.grad.zero_()
        return micro_step(batch, seed).item(), self.gradients()


@pytest.fixture(scope="module", params=CONFIGS)
def load_step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """(compute type, device, scheme, rank) -> the same random weights and pairs each time."""
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("gpu")
    AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32).save_pretrained(folder)

    def make(dtype: torch.dtype, device: torch.device, scheme: str, rank: int = 4) -> Step:
        model = load(FolderSource(folder), scheme_named(scheme), dtype=dtype, device=device)
        adapters.create_(model, AdapterPlan(LoraSpec(rank, alpha=2 * rank)), seed=0)
        generator = torch.Generator().manual_seed(1)
        trained = adapters.trained(model)
        for parameter in trained.values():
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return Step(model.train(), flatten_(trained))

    return make


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    set_backends(Backends())


def batch_of(seed: int, *, packed: bool, rows: int = ROWS, learned: float = 0.7) -> Batch:
    """Rows of one document with padding behind it, or of several."""
    draw = torch.Generator().manual_seed(seed)
    document, positions = torch.full((rows, LENGTH), -1), torch.zeros(rows, LENGTH, dtype=torch.int64)
    for row in range(rows):
        cuts = sorted(torch.randperm(LENGTH - 2, generator=draw)[:3].add(1).tolist())
        starts, end = ([0, *cuts], LENGTH) if packed else ([0], cuts[-1])
        for number, start in enumerate(starts):
            stop = [*starts, end][number + 1]
            document[row, start:stop] = 10 * row + number
            positions[row, start:stop] = torch.arange(stop - start)
    ids, labels = (torch.randint(VOCABULARY, (rows, LENGTH), generator=draw) for _ in range(2))
    labels[(torch.rand(rows, LENGTH, generator=draw) >= learned) | (document < 0)] = IGNORE_INDEX
    return Batch(ids, labels, positions, document, (("f:1",),) * len(ids), epoch=0, index=0)


def assert_same(ours: tuple[float, Tensor], theirs: tuple[float, Tensor], tolerance: float) -> None:
    assert theirs[1].any()
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert (ours[1] - theirs[1]).norm() < tolerance * theirs[1].norm()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the card is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def eager(
    model: Decoder, save: Save = Save.ALL, *, rows: int = ROWS, offload: bool = False, eight: bool = False,
    transposed: bool = False, objective: Objective = next_token_loss,
) -> EagerStep:  # fmt: skip
    """An eager step; with `eight` all supported matmuls are in 8 bits."""
    matmul8 = matmul8_of(model, all_8bit(model), transposed=transposed) if eight else {}
    return EagerStep(model, ForwardOptions(save, offload, matmul8), objective, rows)


def graph(model: Decoder, save: Save = Save.ALL, **options: Any) -> GraphStep:
    """The same as CUDA graphs."""
    return GraphStep(eager(model, save, **options), set())


both_kinds = pytest.mark.parametrize("packed", [False, True], ids=["a document a row", "packed"])


@matrix(dtype=NEAR, save=list(Save))(lambda dtype, save: dtype == torch.bfloat16 or save == Save.ATTENTION)
def test_a_recorded_step_is_the_launched_one(load_step: Load, dtype: torch.dtype, save: Save) -> None:
    step = load_step(dtype, CARD, "int8")
    launched, recorded = eager(step.model, save), graph(step.model, save, rows=ROWS)
    batches = [batch_of(seed, packed=packed) for packed in (True, False) for seed in range(3)]
    # Short ones, of both kinds and in both orders, each after a full one whose numbers still lie in the graph.
    batches += [batch_of(7, packed=True, rows=3), batch_of(8, packed=False, rows=1), batch_of(9, packed=True)]
    batches += [batch_of(10, packed=True, rows=1), batch_of(11, packed=False), batch_of(12, packed=False, rows=3)]
    for batch in batches:
        assert_same(step.taken(recorded, batch), step.taken(launched, batch), NEAR[dtype])


def test_a_graph_of_many_rows_takes_a_batch_of_few(load_step: Load) -> None:
    step = load_step(torch.bfloat16, CARD, "int8")
    launched, recorded = eager(step.model, Save.INPUT), graph(step.model, Save.INPUT, rows=80)
    for seed in range(3):  # the 79 rows that are missing are documents too
        batch = batch_of(seed, packed=True, rows=1)
        assert_same(step.taken(recorded, batch), step.taken(launched, batch), NEAR[torch.bfloat16])


def test_a_replay_adds_to_the_gradients_and_its_loss_is_its_own(load_step: Load) -> None:
    step = load_step(torch.bfloat16, CARD, "int8")
    recorded = graph(step.model, Save.ALL, rows=ROWS)
    one, other = batch_of(0, packed=True), batch_of(1, packed=True)
    for _ in range(2):
        recorded(one, 1.0)
    first, second = step.taken(recorded, one), step.taken(recorded, other)
    losses = [recorded(batch, 0.1) for batch in (one, other)]  # on top of what `other` left
    assert_same((losses[0].item(), step.gradients()), (first[0], first[1] + 2 * second[1]), 1e-3)
    assert losses[1].item() == pytest.approx(second[0], rel=1e-3)  # the first is no view of the graph's
    doubled = step.taken(recorded, one, seed=0.2)
    assert_same(doubled, (first[0], 2 * first[1]), 1e-3)


def test_a_batch_with_nothing_to_learn_adds_nothing(load_step: Load) -> None:
    step = load_step(torch.bfloat16, CARD, "int8")
    recorded = graph(step.model, Save.INPUT, rows=ROWS)
    for seed in range(3):
        step.taken(recorded, batch_of(seed, packed=True))
    loss, gradients = step.taken(recorded, batch_of(3, packed=True, learned=0.0))
    assert loss == 0
    assert not gradients.any()


def test_what_is_released_is_recorded_again(load_step: Load) -> None:
    step = load_step(torch.bfloat16, CARD, "int8")
    launched, recorded = eager(step.model), graph(step.model, Save.ALL, rows=ROWS)
    batch = batch_of(0, packed=True)
    for _ in range(3):
        step.taken(recorded, batch)
    held = torch.cuda.memory_allocated()
    recorded.release()
    assert torch.cuda.memory_allocated() < held
    assert_same(step.taken(recorded, batch), step.taken(launched, batch), NEAR[torch.bfloat16])


@both_kinds
@pytest.mark.parametrize("save", list(Save))
def test_a_launched_step_never_waits_for_the_card(load_step: Load, packed: bool, save: Save) -> None:
    step = load_step(torch.bfloat16, CARD, "int8")
    launched = eager(step.model, save)
    launched(batch_of(0, packed=packed), 0.1)  # libraries start, kernels are compiled
    batch = batch_of(1, packed=packed)
    with no_waiting():
        launched(batch, 0.1)


@both_kinds
def test_a_replay_never_waits_for_the_card(load_step: Load, packed: bool) -> None:
    step = load_step(torch.bfloat16, CARD, "int8")
    recorded = graph(step.model, Save.ALL, rows=ROWS)
    for seed in range(2):
        recorded(batch_of(seed, packed=packed), 0.1)
    whole, short = batch_of(2, packed=packed), batch_of(3, packed=packed, rows=2)
    with no_waiting():
        recorded(whole, 0.1)
        recorded(short, 0.1)


@matrix(packed=[False, True], scheme=["none", "int8", "dynamic8", "nf4"])(
    lambda packed, scheme: packed or scheme == "int8"
)
def test_a_step_with_kernels_is_the_step_of_the_definitions(load_step: Load, packed: bool, scheme: str) -> None:
    step = load_step(torch.bfloat16, CARD, scheme)
    launched, batch = eager(step.model, Save.ATTENTION), batch_of(0, packed=packed)
    fast = step.taken(launched, batch)
    set_backends(Backends(kernels=False))
    assert_same(fast, step.taken(launched, batch), NEAR[torch.bfloat16])


@matrix(rank=[1, 2, 3, 8, 16])(lambda rank: rank in (1, 3, 16))
def test_a_step_of_many_rows_is_that_of_the_definitions_whatever_the_rank(load_step: Load, rank: int) -> None:
    """The rank decides how far apart rows are, and with that which thread of a kernel takes which numbers."""
    step = load_step(torch.bfloat16, CARD, "int8", rank)
    launched, batch = eager(step.model), batch_of(0, packed=True, rows=64)
    fast = step.taken(launched, batch)
    set_backends(Backends(kernels=False))
    assert_same(fast, step.taken(launched, batch), NEAR[torch.bfloat16])


@matrix(packed=[False, True], scheme=["none", "int8", "nf4"])(lambda packed, scheme: packed or scheme == "int8")
def test_a_step_in_8_bits_is_that_of_the_definitions(load_step: Load, packed: bool, scheme: str) -> None:
    """A code that another rounding of its number tips over is a whole step off, so roundings show in gradients.

    Noise of 2^-13 on the products, which is how far tensor cores carry sums of fp8, moves them by 7 % here. In bfloat16
    two ways to compute the same differ about as much as either differs from exact mode. Each operation's kernel is held
    to its definition much closer in tests/kernels/test_parity.py; this is about how they are put together.
    """
    batch, found = batch_of(0, packed=packed), {}
    for dtype in (torch.float32, torch.bfloat16):
        step = load_step(dtype, CARD, scheme)
        exact = step.taken(eager(step.model, Save.ATTENTION), batch)
        launched = eager(step.model, Save.ATTENTION, eight=True)
        assert len(launched.options.matmul8) > 4
        set_backends(Backends())
        fast = step.taken(launched, batch)
        set_backends(Backends(kernels=False))
        found[dtype] = fast, step.taken(launched, batch), exact
    assert_same(*found[torch.float32][:2], 0.08)
    fast, defined, exact = found[torch.bfloat16]
    cost = ((defined[1] - exact[1]).norm() / exact[1].norm()).item()
    assert cost < 0.2
    assert_same(fast, defined, 1.5 * cost)


@pytest.mark.parametrize("engine", [True, False])
def test_gradients_in_int8_are_nearer_to_exact_than_in_fp8(
    load_step: Load, engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cards before fp8 take; and without a copy engine, as on all before the H100."""
    step, batch = load_step(torch.bfloat16, CARD, "int8"), batch_of(0, packed=True)
    exact = step.taken(eager(step.model, Save.ATTENTION), batch)
    launched, found = eager(step.model, Save.ATTENTION, eight=True), {}
    for kind in (matmul8.FP8, torch.int8):
        monkeypatch.setattr(matmul8, "gradient_type", lambda _, kind=kind: kind)
        found[kind] = step.taken(launched, batch)
    errors = {kind: ((own[1] - exact[1]).norm() / exact[1].norm()).item() for kind, own in found.items()}
    assert errors[torch.int8] < errors[matmul8.FP8] < 0.2
    device = replace(capabilities_of(CARD), compute_capability=(10, 0) if engine else (8, 0), shared_memory_bytes=0)
    monkeypatch.setattr(kernels, "capabilities_of", lambda _: device)
    assert_same(step.taken(launched, batch), found[torch.int8], 0.02)


@both_kinds
def test_a_step_in_8_bits_is_its_record_and_never_waits(load_step: Load, packed: bool) -> None:
    step = load_step(torch.bfloat16, CARD, "int8")
    launched, recorded = (make(step.model, Save.ATTENTION, eight=True) for make in (eager, graph))
    batch = batch_of(0, packed=packed)
    fast = step.taken(launched, batch)
    for _ in range(2):
        assert_same(step.taken(recorded, batch), fast, 1e-3)
    with no_waiting():
        launched(batch, 0.1)
        recorded(batch, 0.1)


def test_weights_that_are_kept_transposed_change_nothing(load_step: Load) -> None:
    step, batch = load_step(torch.bfloat16, CARD, "int8"), batch_of(0, packed=True)
    expected = step.taken(eager(step.model, eight=True), batch)
    recorded = graph(step.model, eight=True, transposed=True)
    for _ in range(3):
        assert_same(step.taken(recorded, batch), expected, 1e-3)


@matrix(packed=[False, True], save=list(Save))(lambda packed, save: packed or save == Save.INPUT)
def test_inputs_and_a_table_on_the_host_change_nothing(
    load_step: Load, packed: bool, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launched and recorded, with layers few enough that all but one are away."""
    monkeypatch.setattr(offload, "IN_FLIGHT", 1)
    step = load_step(torch.bfloat16, CARD, "int8")
    batch = batch_of(0, packed=packed)
    expected = step.taken(eager(step.model, save), batch)
    table = step.model.table
    assert table is not None
    held = torch.cuda.memory_allocated()
    table.set_host_resident_(True)
    assert torch.cuda.memory_allocated() <= held - table.weight_bytes
    launched, recorded = eager(step.model, save, offload=True), graph(step.model, save, rows=ROWS, offload=True)
    for _ in range(3):
        for micro_step in (launched, recorded):
            assert_same(step.taken(micro_step, batch), expected, 1e-3)
    with no_waiting():
        launched(batch, 0.1)
        recorded(batch, 0.1)
    table.set_host_resident_(False)
    assert_same(step.taken(eager(step.model, save), batch), expected, 1e-3)


def test_a_recording_that_runs_out_of_memory_while_inputs_are_away_can_be_made_again(
    load_step: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with copies under way, which a recording must not: the card's lack of memory would be hidden by that."""
    monkeypatch.setattr(offload, "IN_FLIGHT", 1)
    step, batch = load_step(torch.bfloat16, CARD, "int8"), batch_of(0, packed=True)
    expected = step.taken(eager(step.model, Save.INPUT), batch)
    recorded = graph(step.model, Save.INPUT, rows=ROWS, offload=True)
    step.taken(recorded, batch)

    def lacking(away: offload.ActivationOffload) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(offload.ActivationOffload, "take", lacking)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            recorded(batch, 0.1)
    recorded.release()
    for _ in range(2):
        assert_same(step.taken(recorded, batch), expected, 1e-3)


@pytest.mark.parametrize("away", [False, True])
def test_a_recording_that_runs_out_of_memory_before_any_copy_says_so(load_step: Load, away: bool) -> None:
    step, batch = load_step(torch.bfloat16, CARD, "int8"), batch_of(0, packed=True)
    expected = step.taken(eager(step.model, Save.INPUT), batch)
    lacking = [False]

    def objective(*given: Any) -> Tensor:
        if lacking[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return next_token_loss(*given)

    recorded = graph(step.model, Save.INPUT, offload=away, objective=objective)
    step.taken(recorded, batch)
    lacking[0] = True
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        recorded(batch, 0.1)
    lacking[0] = False
    recorded.release()
    assert_same(step.taken(recorded, batch), expected, 1e-3)


def test_inputs_that_are_away_take_no_memory_of_the_card(load_step: Load) -> None:
    """16 layers' inputs, of which three at most are there at a time."""
    config = GPTJConfig(vocab_size=VOCABULARY, n_embd=256, n_inner=320, n_layer=16, n_head=4, rotary_dim=32)
    shape = config.to_dict() | {"architectures": ["GPTJForCausalLM"]}
    model = allocated(shape, scheme_named("int8"), dtype=torch.bfloat16, device=CARD)
    for module in model.modules():
        if isinstance(module, FrozenMatrix):
            for part in module.parts.values():
                part.zero_()
    for parameter in model.parameters():
        parameter.data.fill_(0.1)
    adapters.create_(model, AdapterPlan(LoraSpec(rank=4, alpha=8)), seed=0)
    flatten_(adapters.trained(model))
    model.train()
    ids = torch.zeros(64, 1024, dtype=torch.int64, device=CARD)
    inputs = Inputs(ids, torch.arange(1024, device=CARD).expand(64, 1024), ids.flatten(), None, None)
    peaks = []
    for away in (False, True):
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            next_token_loss(model, inputs, ForwardOptions(Save.INPUT, away)).backward()
            torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
    one = 64 * 1024 * 256 * 2
    assert peaks[0] - peaks[1] == pytest.approx((16 - 3) * one, rel=0.1)


@matrix(packed=[False, True], save=list(Save))(lambda packed, save: packed or save == Save.ALL)
def test_a_card_gives_the_cpus_numbers(load_step: Load, packed: bool, save: Save) -> None:
    batch = batch_of(0, packed=packed)
    here, there = (load_step(torch.float32, device, "int8") for device in (CPU, CARD))
    expected = here.taken(eager(here.model, save), batch)
    assert_same(there.taken(eager(there.model, save), batch), expected, 1e-3)


def test_dropout_on_a_card_is_a_function_of_the_seed(load_step: Load) -> None:
    step = load_step(torch.bfloat16, CARD, "int8")
    for module in step.model.modules():
        if isinstance(module, FrozenLinear):
            module.dropout = 0.3
    batch, losses = batch_of(0, packed=True), {}
    for seed in (1, 2):
        for save in Save:
            torch.manual_seed(seed)
            losses[seed, save] = step.taken(eager(step.model, save), batch)
    for save in Save:
        assert_same(losses[1, save], losses[1, Save.ALL], 0.01)
        assert losses[1, save][0] != losses[2, save][0]


@both_kinds
@pytest.mark.parametrize("save", [Save.ALL, Save.INPUT])
def test_a_replay_draws_the_dropout_masks_of_an_eager_pass(load_step: Load, packed: bool, save: Save) -> None:
    """New ones for each seed, the same for the same seed."""
    step = load_step(torch.bfloat16, CARD, "int8")
    for module in step.model.modules():
        if isinstance(module, FrozenLinear):
            module.dropout = 0.3
    launched, recorded = eager(step.model, save), graph(step.model, save)
    batch = batch_of(0, packed=packed)
    recorded(batch, 0.1)  # eager, then captured
    found = {}
    for seed in (1, 2, 1, 3):
        torch.manual_seed(seed)
        found[seed] = step.taken(recorded, batch)
        torch.manual_seed(seed)
        assert_same(found[seed], step.taken(launched, batch), 1e-3)
    assert len({loss for loss, _ in found.values()}) == 3


def test_a_replay_with_label_weights_is_the_eager_pass(load_step: Load) -> None:
    step = load_step(torch.bfloat16, CARD, "int8")
    launched, recorded = eager(step.model), graph(step.model)
    for seed in range(3):
        weights = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(seed))
        batch = replace(batch_of(seed, packed=True), weights=weights)
        assert_same(step.taken(recorded, batch), step.taken(launched, batch), NEAR[torch.bfloat16])


def test_plain_blocks_are_captured_too(load_step: Load) -> None:
    step, batch = load_step(torch.bfloat16, CARD, "int8"), batch_of(0, packed=True)
    expected = step.taken(eager(step.model), batch)
    for save in Save:
        plain = EagerStep(step.model, ForwardOptions(save, fused=False), rows=ROWS)
        recorded = GraphStep(plain, set())
        for _ in range(3):
            assert_same(step.taken(recorded, batch), expected, NEAR[torch.bfloat16])


def test_no_layer_is_left_out(load_step: Load) -> None:
    step = load_step(torch.float32, CARD, "none")
    step.taken(eager(step.model), batch_of(0, packed=True))
    parameters: list[nn.Parameter] = [p for group in step.groups for p in group.parameters]
    assert all(p.is_cuda and p.grad is not None and bool(p.grad.any()) for p in parameters)
