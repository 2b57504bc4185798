"""Steps that do not fit: parts of a batch add up to it, and running out of memory changes nothing but the plan."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from octavo import adapters
from octavo.adapters import AdapterPlan
from octavo.data.loader import Batch
from octavo.data.packing import IGNORE_INDEX
from octavo.errors import TrainingError
from octavo.layers.context import Save
from octavo.layers.lora import LoraSpec, flatten_
from octavo.models import Decoder
from octavo.objective import Inputs, loss_of
from octavo.train import step
from octavo.train.loop import Trainer, gradients, out_of_memory, train
from octavo.train.memory import MemoryPlan
from octavo.train.optim import Adam, LossScaler, OptimizerSettings, Schedule
from octavo.train.precision import layers, set_precision_
from octavo.train.step import EagerStep, PlannedStep

VOCABULARY, ROWS, LENGTH = 61, 4, 10
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
# Each for less memory than the one before.
PLANS = [
    MemoryPlan((Save.ALL,) * 2, 4, 3 * 2**30, None),
    MemoryPlan((Save.INPUT, Save.ALL), 2, 2 * 2**30, None),
    MemoryPlan((Save.INPUT,) * 2, 1, 2**30, None),
]


@pytest.fixture(scope="module")
def base(twins_of: Callable[[Any], tuple[Any, Decoder]]) -> Decoder:
    return twins_of(CONFIG)[1]


def batch_of(seed: int) -> Batch:
    """Rows of one or two documents, one of padding in part, and one of which nothing is learned."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(VOCABULARY, (2, ROWS, LENGTH), generator=generator)
    document, positions = torch.zeros_like(ids), torch.arange(LENGTH).repeat(ROWS, 1)
    document[1, 4:], positions[1, 4:] = 1, torch.arange(LENGTH - 4)
    document[2, 7:] = -1
    labels[torch.rand(ROWS, LENGTH, generator=generator) < 0.4] = IGNORE_INDEX
    labels[document < 0] = IGNORE_INDEX
    labels[3] = IGNORE_INDEX
    return Batch(ids, labels, positions, document, ("f:1",), int((labels != IGNORE_INDEX).sum()), epoch=0, index=seed)


BATCHES = [batch_of(seed) for seed in range(3)]


def next_plan(plan: MemoryPlan) -> MemoryPlan | None:
    return dict(zip(PLANS, [*PLANS[1:], None], strict=True))[plan]


def trainer_of(base: Decoder, plan: MemoryPlan = PLANS[0], told: list[str] | None = None) -> Trainer:
    """A run from its start, on its own copy of `base`."""
    model = copy.deepcopy(base)
    adapters.create_(model, AdapterPlan(LoraSpec(rank=2, alpha=4)), seed=0)
    parameters = adapters.trained(model)
    optimizer = Adam(flatten_(parameters), OptimizerSettings("adamw"))
    warn = (told if told is not None else []).append
    micro_step = PlannedStep(model, plan, record=False, cheaper=next_plan, warn=warn)
    schedule = Schedule(1e-2, 4, kind="constant")
    return Trainer(model, parameters, optimizer, schedule, LossScaler(torch.float32), micro_step, 0, accumulate=3)


def found(trainer: Trainer, seed: float = 0.5) -> tuple[Tensor, Tensor]:
    """(losses, gradients) of a step on all batches."""
    losses = torch.stack(gradients(trainer, BATCHES, 1, seed=seed))
    flat = [group.values.grad for group in trainer.optimizer.groups]
    return losses, torch.cat([gradient.clone() for gradient in flat if gradient is not None])


def test_weights_are_kept_transposed_while_the_plan_says_so(base: Decoder) -> None:
    model = copy.deepcopy(base).train()
    set_precision_(model)
    micro_step = PlannedStep(
        model, replace(PLANS[0], transposed=True), record=False, cheaper=next_plan, warn=pytest.fail
    )
    for _ in range(2):
        micro_step(BATCHES[0], 1.0)
        assert all(layer.transposed is not None for _, layer in layers(model))
        micro_step.release()
        assert all(layer.transposed is None for _, layer in layers(model))
    micro_step.take(PLANS[1])
    micro_step(BATCHES[0], 1.0)
    assert all(layer.transposed is None for _, layer in layers(model))


def test_what_cannot_be_kept_transposed_leads_to_a_cheaper_plan(base: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trainer_of(base, PLANS[1])
    set_precision_(plain.model)
    wanted = found(plain)
    told: list[str] = []
    trainer = trainer_of(base, PLANS[0], told)
    set_precision_(trainer.model)
    trainer.micro_step.take(replace(PLANS[0], transposed=True))  # type: ignore[attr-defined]
    monkeypatch.setattr(trainer.micro_step, "_cheaper", lambda _: PLANS[1])

    def lacking(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("octavo.layers.frozen.transposed_weight", lacking)
    assert all(torch.equal(own, other) for own, other in zip(found(trainer), wanted, strict=True))
    assert len(told) == 1


def failing(monkeypatch: pytest.MonkeyPatch, calls: set[int], error: Callable[[], Exception]) -> list[Any]:
    """Has the passes of these numbers fail in forward, counted from 0 over plans; what each keeps, as they come."""
    seen: list[Any] = []

    def loss(model: Decoder, inputs: Inputs, *, save: Any, offload: bool) -> Tensor:
        seen.append(save)
        if len(seen) - 1 in calls:
            raise error()
        return loss_of(model, inputs, save=save, offload=offload)

    monkeypatch.setattr(step, "loss_of", loss)
    return seen


def exhausted() -> Exception:
    return torch.OutOfMemoryError("Tried to allocate 394.00 MiB.")


@pytest.mark.parametrize(
    "plan", [*PLANS, MemoryPlan((Save.ATTENTION,) * 2, 3, 0, None), MemoryPlan((Save.ALL,) * 2, 9, 0, None)]
)
def test_a_plan_changes_neither_the_loss_nor_the_gradients(base: Decoder, plan: MemoryPlan) -> None:
    whole = trainer_of(base)
    whole.micro_step = EagerStep(whole.model, Save.ALL)
    (losses, grads), (others, theirs) = (found(trainer) for trainer in (trainer_of(base, plan), whole))
    assert float(theirs.abs().max()) > 0.01
    torch.testing.assert_close(losses, others)
    torch.testing.assert_close(grads, theirs, rtol=1e-4, atol=1e-6)


def test_a_part_of_which_nothing_is_learned_adds_nothing(base: Decoder) -> None:
    trainer = trainer_of(base, PLANS[2])
    *_, last = step.parts_of(BATCHES[0], 1)
    assert last.trained_tokens == 0
    assert float(trainer.micro_step(last, 1.0)) == 0
    assert not any(p.grad is not None and p.grad.any() for p in trainer.parameters.values())


# Passes of a step: one a batch under the first plan, two under the second, four under the last.
@pytest.mark.parametrize(
    ("calls", "plan"),
    [
        pytest.param({0}, 1, id="at once"),
        pytest.param({1}, 1, id="in the second micro-batch"),
        pytest.param({2}, 1, id="in the last micro-batch"),
        pytest.param({0, 1}, 2, id="with the next plan too"),
        pytest.param({2, 6}, 2, id="with the next plan too, in the middle of a micro-batch"),
    ],
)
def test_running_out_of_memory_changes_nothing_but_the_plan(
    base: Decoder, monkeypatch: pytest.MonkeyPatch, calls: set[int], plan: int
) -> None:
    """Gradients that were added before, and those of the step before, are not in those that count."""
    expected = found(trainer_of(base, PLANS[plan]))
    told: list[str] = []
    trainer = trainer_of(base, told=told)
    for group in trainer.optimizer.groups:
        assert group.values.grad is not None
        group.values.grad.fill_(7)
    seen = failing(monkeypatch, calls, exhausted)
    losses, grads = found(trainer)
    assert torch.equal(losses, expected[0])
    assert torch.equal(grads, expected[1])
    passes = 3 * ROWS // PLANS[plan].rows
    assert seen[max(calls) + 1 :] == [PLANS[plan].save] * passes
    assert isinstance(trainer.micro_step, PlannedStep)
    assert trainer.micro_step.plan == PLANS[plan]
    assert len(told) == plan
    assert all("ran out of memory" in line and f"{PLANS[n + 1].rows} rows" in line for n, line in enumerate(told))
    assert found(trainer)[0].tolist() == losses.tolist()  # and the new plan stays


def test_a_run_that_ran_out_of_memory_goes_on_as_if_it_had_begun_with_less(
    base: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(trainer: Trainer) -> list[tuple[float | None, float]]:
        stream: Iterator[Batch] = (BATCHES[index % 3] for index in range(12))
        return [(step.loss, step.gradient_norm) for step in train(trainer, stream)]

    expected = steps(trainer_of(base, PLANS[1]))
    assert len(set(expected)) == 4
    trainer = trainer_of(base)
    failing(monkeypatch, {1}, exhausted)
    assert steps(trainer) == expected


def test_a_step_that_no_plan_fits_ends_the_run_and_says_what_to_do(
    base: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(base)
    before = [group.values.detach().clone() for group in trainer.optimizer.groups]
    seen = failing(monkeypatch, {0, 1, 2}, exhausted)
    with pytest.raises(TrainingError, match=r"^Step 1 does not fit into the card's memory") as caught:
        list(train(trainer, iter(BATCHES)))
    assert {"--seq-len", "nf4."} & set(caught.value.hint.split())
    assert "checkpoint" not in caught.value.hint  # before the first step there is none
    assert caught.value.__context__ is None  # nothing holds the failed call's tensors
    assert len(seen) == 3
    assert all(
        torch.equal(group.values, values) for group, values in zip(trainer.optimizer.groups, before, strict=True)
    )


def test_a_step_that_knows_no_plans_ends_the_run_too(base: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(base)
    trainer.micro_step = EagerStep(trainer.model, Save.INPUT)
    failing(monkeypatch, {0}, exhausted)
    with pytest.raises(TrainingError, match="does not fit"):
        found(trainer)


@pytest.mark.parametrize("error", [RuntimeError("device-side assert triggered"), ValueError("out of memory")])
def test_another_error_is_not_taken_for_it(base: Decoder, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    trainer = trainer_of(base)
    seen = failing(monkeypatch, {1}, lambda: error)
    with pytest.raises(type(error)) as caught:
        found(trainer)
    assert caught.value is error
    assert len(seen) == 2
    assert isinstance(trainer.micro_step, PlannedStep)
    assert trainer.micro_step.plan == PLANS[0]


def test_memory_that_ran_out_is_known_whoever_says_it() -> None:
    assert out_of_memory(torch.OutOfMemoryError("any words"))
    assert out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


class FailsInBackward(torch.autograd.Function):
    """A scalar, unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise exhausted()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_the_failed_call_held_is_free_before_anything_else_is_done(
    base: Decoder, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Else the next plan would find the card as full as it was. The collector does not help."""
    held: list[weakref.ref[Tensor]] = []
    order: list[str] = []

    def loss(model: Decoder, inputs: Inputs, *, save: Any, offload: bool) -> Tensor:
        if held:
            return loss_of(model, inputs, save=save, offload=offload)
        large = torch.ones(1000, requires_grad=True)
        own = loss_of(model, inputs, save=save, offload=offload) + large.exp().sum()
        held.append(weakref.ref(large))
        if where == "forward":
            raise exhausted()
        result: Tensor = FailsInBackward.apply(own)  # type: ignore[no-untyped-call]
        return result

    def cheaper(plan: MemoryPlan) -> MemoryPlan | None:
        order.append("held" if held[0]() is not None else "free")
        return next_plan(plan)

    monkeypatch.setattr(step, "loss_of", loss)
    monkeypatch.setattr(EagerStep, "release", lambda self: order.append("released"))
    trainer = trainer_of(base)
    trainer.micro_step = PlannedStep(trainer.model, PLANS[0], record=False, cheaper=cheaper, warn=order.append)
    gc.disable()
    try:
        found(trainer)
    finally:
        gc.enable()
    assert order[:2] == ["released", "free"]
    assert len(order) == 3
