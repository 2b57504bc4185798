"""The domains of kernels: declared for each, covered by the cases, and wide enough for real steps and requests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.cases import CASES, TOLERANCES
from tests.kernels.domains import DOMAINS, Operand, faults, layout_of, operands
from tests.models.families import CASES as FAMILY_CASES

from octavo import adapters
from octavo.adapters import AdapterPlan
from octavo.adapters.served import serve_
from octavo.infer.decoding import DecodeRunner
from octavo.layers.context import ForwardOptions, Save
from octavo.layers.lora import LoraSpec, flatten_
from octavo.layers.multi_lora import ServedAdapters
from octavo.models import Decoder
from octavo.objective import Inputs, next_token_loss
from octavo.ops.quantize import SCHEMES, scheme_named
from octavo.runtime import dispatch
from octavo.runtime.dispatch import KERNELS
from octavo.store.peft import read
from octavo.store.sources import FolderSource
from octavo.store.weights import load
from octavo.train.optim import Adam, OptimizerSettings
from octavo.train.precision import Precision, all_8bit, matmul8_of


def test_every_kernel_has_cases_and_a_domain() -> None:
    assert CASES.keys() == KERNELS.keys() == DOMAINS.keys()


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_is_what_the_cases_cover(name: str) -> None:
    """Every dtype, the widest layout, None if it is optional; and no case is outside."""
    seen: dict[str, set[object]] = defaultdict(set)
    for make in CASES[name]:
        for dtype in TOLERANCES:
            torch.manual_seed(0)
            arguments, named, _ = make(dtype)
            assert faults(name, arguments, named) == []
            for key, tensor in operands(name, arguments, named):
                seen[key] |= {None} if tensor is None else {tensor.dtype, layout_of(tensor)}
    assert seen.keys() == DOMAINS[name].keys()
    for key, operand in DOMAINS[name].items():
        dtypes = set(operand.dtypes) - ({torch.bfloat16, torch.float32, torch.float16} - TOLERANCES.keys())
        wanted = dtypes | ({operand.layout} if dtypes else set()) | ({None} if operand.optional else set())
        assert wanted - seen[key] == set(), key


def test_a_tensor_outside_of_a_domain_is_named() -> None:
    operand = Operand((torch.float32,), "rows", align=16)
    wide = torch.zeros(4, 32)
    assert operand.fault(wide[:, 4:20]) == ""
    assert operand.fault(wide[:, 1:5]) == "not aligned to 16"
    assert operand.fault(wide.T).startswith("any layout")
    assert operand.fault(wide.half()) == "torch.float16"
    assert operand.fault(None) == "None"


FaultsByKernel = dict[str, list[str]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> FaultsByKernel:
    """Kernel -> faults of its calls. Kernels are the references here, so that a CPU runs what a GPU would call."""
    calls: FaultsByKernel = defaultdict(list)

    class Kernels:
        def __init__(self, module: str) -> None:
            self.file = module.rpartition(".")[2]

        def __getattr__(self, name: str) -> Callable[..., Any]:
            key = f"{self.file}.{name}"

            def run(*arguments: Any, **named: Any) -> Any:
                calls[key] += faults(key, arguments, named)
                return KERNELS[key](*arguments, **named)

            return run

    monkeypatch.setattr(dispatch, "kernels_run_on", lambda tensor: not tensor.is_meta)
    monkeypatch.setattr(dispatch, "import_module", Kernels)
    return calls


@pytest.mark.parametrize(
    "case",
    [
        "neox, in parallel",
        "qwen3, grouped heads",
        "olmo2, grouped heads",
        "granite, all multipliers",
        "gemma2, no soft-cap of logits",
        "gemma3, a full layer after five",
    ],
)
@pytest.mark.parametrize("use_8bit", [False, True])
@pytest.mark.parametrize("norms", [False, True], ids=["frozen norms", "trained norms"])
def test_a_step_of_every_form_of_a_branch_stays_within_the_domains(
    case: str, use_8bit: bool, norms: bool, models_of: Callable[[Any], tuple[Any, Decoder]], recorded: FaultsByKernel
) -> None:
    _, model = models_of(FAMILY_CASES[case])
    adapters.create_(model.train(), AdapterPlan(LoraSpec(3, 6.0), norms=norms, biases=True), seed=0)
    ids, matmul8 = torch.arange(60).view(2, 30), matmul8_of(model, all_8bit(model) if use_8bit else Precision())
    for save in Save:
        inputs = Inputs(ids, ids, ids.flatten(), None, None)
        next_token_loss(model, inputs, ForwardOptions(save, matmul8=matmul8)).backward()
    assert {name: found for name, found in recorded.items() if found} == {}
    assert "pointwise.norm_backward_into" in recorded
    assert ("rotary.norm_rotate_into" in recorded) == case.startswith(("qwen3", "olmo2", "gemma3"))
    # The gradients of trained norms need that between the norm and the rotation, in a pass of its own.
    assert ("rotary.norm_rotate_backward_into" in recorded) == ("rotary.norm_rotate_into" in recorded and not norms)
    assert ("pointwise.add_norm_into" in recorded) == case.startswith(("olmo2", "gemma"))


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FAMILIES = pytest.mark.parametrize("family", ["tiny_llama", "tiny_gptj"])
CPU = torch.device("cpu")


@DTYPES
@FAMILIES
def test_a_training_step_stays_within_the_domains(
    family: str, dtype: torch.dtype, request: pytest.FixtureRequest, recorded: FaultsByKernel
) -> None:
    source = FolderSource(request.getfixturevalue(family))
    ids = torch.arange(60).view(2, 30)
    for scheme in SCHEMES:
        model = load(source, scheme_named(scheme), dtype=dtype, device=CPU).train()
        adapters.create_(model, AdapterPlan(LoraSpec(3, 6.0), norms=scheme != "none", biases=scheme == "nf4"), seed=0)
        optimizer = Adam(flatten_(adapters.trained(model)), OptimizerSettings())
        for use_8bit in (False, True):
            matmul8 = matmul8_of(model, all_8bit(model) if use_8bit else Precision())
            for save in Save:
                inputs = Inputs(ids, ids, ids.flatten(), None, None)
                next_token_loss(model, inputs, ForwardOptions(save, matmul8=matmul8)).backward()
        optimizer.step(1e-3, gradient_norm=optimizer.gradient_norm())
    assert {name: found for name, found in recorded.items() if found} == {}
    called = {
        "pointwise.norm_into",
        "loss.cross_entropy_",
        "matmul8.quantize_rows_into",
        "quantize4.nf4_into",
        "quantize4.nf4_double_into",
    }
    assert called <= recorded.keys()


@DTYPES
@FAMILIES
@torch.no_grad()
def test_requests_stay_within_the_domains(
    family: str, dtype: torch.dtype, request: pytest.FixtureRequest, recorded: FaultsByKernel, tmp_path: Path
) -> None:
    """Prompts and decoded tokens, with adapters and without, in a cache of slots."""
    source = FolderSource(request.getfixturevalue(family))
    for scheme in SCHEMES:
        served, folder = ServedAdapters(), tmp_path / scheme
        model, plan = load(source, scheme_named("none"), dtype=torch.float32, device=CPU), AdapterPlan(LoraSpec(4, 8.0))
        adapters.create_(model, plan, seed=0)
        folder.mkdir()
        adapters.save(folder, model, plan, base="base", origin={}, readme="")
        model = load(source, scheme_named(scheme), dtype=dtype, device=CPU).eval()
        serve_(model, served, read(folder), "a")
        cache = model.new_slots(slots=3, max_len=100)
        for slot, adapter in enumerate((0, 1)):
            ids = torch.arange(70 + slot)[None]
            model.hidden(ids, cache=cache.slot(slot), adapter_ids=torch.tensor([adapter]))
        decoder = DecodeRunner(model, cache, served, 300)
        decoder._logits(torch.tensor([[5, 6], cache.lengths[:2], [0, 1]]), 71, adapters=True)
    assert {name: found for name, found in recorded.items() if found} == {}
    assert {"inference.matmul", "cached_attention.decode_attention", "inference.shrink"} <= recorded.keys()
