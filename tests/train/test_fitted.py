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
from octavo.layers.context import ForwardOptions, Save
from octavo.layers.lora import LoraSpec, flatten_
from octavo.models import Decoder
from octavo.objective import Inputs, Objective, next_token_loss
from octavo.train.loop import Trainer, gradients, out_of_memory, train
from octavo.train.memory import MemoryPlan
from octavo.train.optim import Adam, LossScaler, OptimizerSettings, Schedule
from octavo.train.precision import Precision, all_8bit
from octavo.train.step import EagerStep, PlannedStep, micro_batches

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
    return Batch(ids, labels, positions, document, (("f:1",),) * len(ids), epoch=0, index=seed)


def joined(batches: list[Batch]) -> Batch:
    """One batch of the rows of all."""
    names = ("ids", "labels", "positions", "document")
    tensors: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    return replace(batches[0], **tensors, row_sources=sum((batch.row_sources for batch in batches), ()))


BATCH = joined([batch_of(seed) for seed in range(3)])  # of three micro-batches under the first plan


def next_plan(plan: MemoryPlan) -> MemoryPlan | None:
    return dict(zip(PLANS, [*PLANS[1:], None], strict=True))[plan]


def trainer_of(
    base: Decoder,
    plan: MemoryPlan = PLANS[0],
    told: list[str] | None = None,
    *,
    objective: Objective = next_token_loss,
    cheaper: Callable[[MemoryPlan], MemoryPlan | None] = next_plan,
    precision: Precision | None = None,
) -> Trainer:
    """A run from its start, on its own copy of `base`."""
    model = copy.deepcopy(base)
    adapters.create_(model, AdapterPlan(LoraSpec(rank=2, alpha=4)), seed=0)
    parameters = adapters.trained(model)
    optimizer = Adam(flatten_(parameters), OptimizerSettings("adamw"))
    warn = (told if told is not None else []).append
    micro_step = PlannedStep(
        model, plan, graphs=False, cheaper=cheaper, warn=warn, objective=objective, precision=precision
    )
    schedule = Schedule(1e-2, 4, kind="constant")
    return Trainer(model.train(), parameters, optimizer, schedule, LossScaler(torch.float32), micro_step, 0)


def found(trainer: Trainer, loss_scale: float = 0.5) -> tuple[Tensor, Tensor]:
    """(loss, gradients) of a step."""
    losses = torch.stack(gradients(trainer, BATCH, 1, loss_scale=loss_scale)[0]).sum()
    flat = [group.values.grad for group in trainer.optimizer.groups]
    return losses, torch.cat([gradient.clone() for gradient in flat if gradient is not None])


def test_weights_are_stored_transposed_while_the_plan_says_so(base: Decoder) -> None:
    model, seen = copy.deepcopy(base).train(), list[bool]()

    def noted(model: Decoder, inputs: Inputs, options: ForwardOptions) -> Tensor:
        seen.append(all(spec.transposed is not None for spec in options.matmul8.values()))
        assert len(options.matmul8) == 8
        return next_token_loss(model, inputs, options)

    micro_step = PlannedStep(
        model, replace(PLANS[0], transposed=True), graphs=False, cheaper=lambda _: PLANS[1], warn=lambda _: None,
        objective=noted, precision=all_8bit(model),
    )  # fmt: skip
    part = next(micro_batches(BATCH, 4))
    for _ in range(2):
        micro_step(part, 1.0)
        micro_step.release()
    assert micro_step.reduce_memory()
    micro_step(part, 1.0)
    assert seen == [True, True, False]


def test_transposed_weights_that_do_not_fit_lead_to_a_cheaper_plan(
    base: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    precision = all_8bit(base)
    expected = found(trainer_of(base, PLANS[1], precision=precision))
    told: list[str] = []
    trainer = trainer_of(
        base, replace(PLANS[0], transposed=True), told, cheaper=lambda _: PLANS[1], precision=precision
    )

    def lacking(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("octavo.train.precision.transposed_weight", lacking)
    assert all(torch.equal(own, other) for own, other in zip(found(trainer), expected, strict=True))
    assert len(told) == 1


def failing(calls: set[int], error: Callable[[], Exception]) -> tuple[Objective, list[Any]]:
    """(an objective whose passes of these numbers fail, counted from 0 over plans; the save levels of each pass)."""
    seen: list[Any] = []

    def loss(model: Decoder, inputs: Inputs, options: ForwardOptions) -> Tensor:
        seen.append(options.save)
        if len(seen) - 1 in calls:
            raise error()
        return next_token_loss(model, inputs, options)

    return loss, seen


def exhausted() -> Exception:
    return torch.OutOfMemoryError("Tried to allocate 394.00 MiB.")


@pytest.mark.parametrize(
    "plan", [*PLANS, MemoryPlan((Save.ATTENTION,) * 2, 3, 0, None), MemoryPlan((Save.ALL,) * 2, 9, 0, None)]
)
def test_a_plan_changes_neither_the_loss_nor_the_gradients(base: Decoder, plan: MemoryPlan) -> None:
    whole = trainer_of(base)
    whole.micro_step = EagerStep(whole.model)
    (losses, grads), (others, theirs) = (found(trainer) for trainer in (trainer_of(base, plan), whole))
    assert float(theirs.abs().max()) > 0.01
    torch.testing.assert_close(losses, others)
    torch.testing.assert_close(grads, theirs, rtol=1e-4, atol=1e-6)


def test_a_part_of_which_nothing_is_learned_adds_nothing(base: Decoder) -> None:
    trainer = trainer_of(base, PLANS[2])
    *_, last = micro_batches(BATCH, 1)
    assert last.trained_tokens == 0
    assert float(trainer.micro_step(last, 1.0)) == 0
    assert not any(p.grad is not None and p.grad.any() for p in trainer.parameters.values())


# Micro-batches of a step: three under the first plan, six under the second, twelve under the last.
@pytest.mark.parametrize(
    ("calls", "plan"),
    [
        pytest.param({0}, 1, id="at once"),
        pytest.param({1}, 1, id="in the second micro-batch"),
        pytest.param({2}, 1, id="in the last micro-batch"),
        pytest.param({0, 1}, 2, id="with the next plan too"),
        pytest.param({2, 6}, 2, id="with the next plan too, in the middle of the step"),
    ],
)
def test_running_out_of_memory_changes_nothing_but_the_plan(base: Decoder, calls: set[int], plan: int) -> None:
    """Gradients that were added before, and those of the step before, are not in those that count."""
    expected = found(trainer_of(base, PLANS[plan]))
    told: list[str] = []
    objective, seen = failing(calls, exhausted)
    trainer = trainer_of(base, told=told, objective=objective)
    for group in trainer.optimizer.groups:
        assert group.values.grad is not None
        group.values.grad.fill_(7)
    losses, grads = found(trainer)
    assert torch.equal(losses, expected[0])
    assert torch.equal(grads, expected[1])
    passes = 3 * ROWS // PLANS[plan].rows
    assert seen[max(calls) + 1 :] == [PLANS[plan].save] * passes
    assert isinstance(trainer.micro_step, PlannedStep)
    assert trainer.micro_step.plan == PLANS[plan]
    assert len(told) == plan
    assert all(
        "ran out of memory" in line and f"of {PLANS[n + 1].rows} sequence" in line for n, line in enumerate(told)
    )
    assert found(trainer)[0].tolist() == losses.tolist()  # and the new plan stays


def test_a_run_that_ran_out_of_memory_equals_one_that_began_with_less(base: Decoder) -> None:
    def steps(trainer: Trainer) -> list[tuple[float | None, float]]:
        stream: Iterator[Batch] = (BATCH for _ in range(4))
        return [(step.loss, step.gradient_norm) for step in train(trainer, stream)]

    expected = steps(trainer_of(base, PLANS[1]))
    assert len(set(expected)) == 4
    trainer = trainer_of(base, objective=failing({1}, exhausted)[0])
    assert steps(trainer) == expected


def test_a_step_that_no_plan_fits_ends_the_run_and_says_what_to_do(base: Decoder) -> None:
    objective, seen = failing({0, 1, 2}, exhausted)
    trainer = trainer_of(base, objective=objective)
    before = [group.values.detach().clone() for group in trainer.optimizer.groups]
    with pytest.raises(TrainingError, match=r"^Step 1 does not fit into the memory of the GPU") as caught:
        list(train(trainer, iter([BATCH])))
    assert {"--seq-len", "nf4."} & set(caught.value.hint.split())
    assert "checkpoint" not in caught.value.hint  # before the first step there is none
    assert caught.value.__context__ is None  # nothing holds the failed call's tensors
    assert len(seen) == 3
    assert all(
        torch.equal(group.values, values) for group, values in zip(trainer.optimizer.groups, before, strict=True)
    )


def test_an_eager_step_that_does_not_fit_ends_the_run_too(base: Decoder) -> None:
    trainer = trainer_of(base)
    trainer.micro_step = EagerStep(trainer.model, objective=failing({0}, exhausted)[0])
    with pytest.raises(TrainingError, match="does not fit"):
        found(trainer)


@pytest.mark.parametrize("error", [RuntimeError("device-side assert triggered"), ValueError("out of memory")])
def test_another_error_is_not_taken_for_it(base: Decoder, error: Exception) -> None:
    objective, seen = failing({1}, lambda: error)
    trainer = trainer_of(base, objective=objective)
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

    def loss(model: Decoder, inputs: Inputs, options: ForwardOptions) -> Tensor:
        if held:
            return next_token_loss(model, inputs, options)
        large = torch.ones(1000, requires_grad=True)
        own = next_token_loss(model, inputs, options) + large.exp().sum()
        held.append(weakref.ref(large))
        if where == "forward":
            raise exhausted()
        result: Tensor = FailsInBackward.apply(own)  # type: ignore[no-untyped-call]
        return result

    def cheaper(plan: MemoryPlan) -> MemoryPlan | None:
        order.append("held" if held[0]() is not None else "free")
        return next_plan(plan)

    monkeypatch.setattr(EagerStep, "release", lambda self: order.append("released"))
    trainer = trainer_of(base, told=order, objective=loss, cheaper=cheaper)
    gc.disable()
    try:
        found(trainer)
    finally:
        gc.enable()
    assert order[:2] == ["released", "free"]
    assert len(order) == 3
