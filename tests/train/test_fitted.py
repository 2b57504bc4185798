"""PlannedStep: micro-batches sum to the batch, and an out-of-memory error changes only the plan."""

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
from octavo.failures import out_of_memory
from octavo.layers.context import ForwardOptions, Save
from octavo.layers.lora import LoraSpec, flatten_
from octavo.models import Decoder
from octavo.objective import Inputs, Objective, next_token_loss
from octavo.train.loop import Trainer, accumulate_gradients, train
from octavo.train.memory import MemoryPlan
from octavo.train.optim import Adam, LossScaler, OptimizerSettings, Schedule
from octavo.train.precision import Precision, all_8bit
from octavo.train.step import EagerStep, PlannedStep, micro_batches

VOCAB_SIZE, BATCH_SIZE, SEQ_LEN = 61, 4, 10
CONFIG = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
# In order of decreasing memory.
PLANS = [
    MemoryPlan((Save.ALL,) * 2, 4, 3 * 2**30, None),
    MemoryPlan((Save.INPUT, Save.ALL), 2, 2 * 2**30, None),
    MemoryPlan((Save.INPUT,) * 2, 1, 2**30, None),
]


@pytest.fixture(scope="module")
def base(models_of: Callable[[Any], tuple[Any, Decoder]]) -> Decoder:
    return models_of(CONFIG)[1]


def batch_of(seed: int) -> Batch:
    """Rows of one or two documents, one of them with padding and one without labels."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(VOCAB_SIZE, (2, BATCH_SIZE, SEQ_LEN), generator=generator)
    document, positions = torch.zeros_like(ids), torch.arange(SEQ_LEN).repeat(BATCH_SIZE, 1)
    document[1, 4:], positions[1, 4:] = 1, torch.arange(SEQ_LEN - 4)
    document[2, 7:] = -1
    labels[torch.rand(BATCH_SIZE, SEQ_LEN, generator=generator) < 0.4] = IGNORE_INDEX
    labels[document < 0] = IGNORE_INDEX
    labels[3] = IGNORE_INDEX
    return Batch(ids, labels, positions, document, (("f:1",),) * len(ids), epoch=0, index=seed)


def concatenated(batches: list[Batch]) -> Batch:
    """One batch with the rows of all batches."""
    names = ("ids", "labels", "positions", "piece")
    tensors: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    return replace(batches[0], **tensors, row_sources=sum((batch.row_sources for batch in batches), ()))


BATCH = concatenated([batch_of(seed) for seed in range(3)])  # three micro-batches under the first plan


def next_plan(plan: MemoryPlan) -> MemoryPlan | None:
    return dict(zip(PLANS, [*PLANS[1:], None], strict=True))[plan]


def trainer_of(
    base: Decoder,
    plan: MemoryPlan = PLANS[0],
    warnings: list[str] | None = None,
    *,
    objective: Objective = next_token_loss,
    cheaper: Callable[[MemoryPlan], MemoryPlan | None] = next_plan,
    precision: Precision | None = None,
) -> Trainer:
    """A trainer before its first step, on a copy of `base`."""
    model = copy.deepcopy(base)
    adapters.create_(model, AdapterPlan(LoraSpec(rank=2, alpha=4)), seed=0)
    parameters = adapters.trained(model)
    optimizer = Adam(flatten_(parameters), OptimizerSettings("adamw"))
    warn = (warnings if warnings is not None else []).append
    micro_step = PlannedStep(
        model, plan, graphs=False, cheaper=cheaper, warn=warn, objective=objective, precision=precision
    )
    schedule = Schedule(1e-2, 4, kind="constant")
    return Trainer(model.train(), parameters, optimizer, schedule, LossScaler(torch.float32), micro_step, 0)


def loss_and_gradients(trainer: Trainer, loss_scale: float = 0.5) -> tuple[Tensor, Tensor]:
    """(loss, all gradients as one vector) of a step with BATCH."""
    losses = torch.stack(accumulate_gradients(trainer, BATCH, 1, loss_scale=loss_scale)[0]).sum()
    flat = [group.values.grad for group in trainer.optimizer.groups]
    return losses, torch.cat([gradient.clone() for gradient in flat if gradient is not None])


def test_weights_are_stored_transposed_only_under_a_plan_with_transposed_weights(base: Decoder) -> None:
    model, seen = copy.deepcopy(base).train(), list[set[str]]()

    def recording_loss(model: Decoder, inputs: Inputs, options: ForwardOptions) -> Tensor:
        seen.append({name[0] for name, spec in options.matmul8.items() if spec.transposed is not None})
        assert len(options.matmul8) == 8
        return next_token_loss(model, inputs, options)

    micro_step = PlannedStep(
        model, replace(PLANS[0], transposed=1), graphs=False, cheaper=lambda _: PLANS[1], warn=lambda _: None,
        objective=recording_loss, precision=all_8bit(model),
    )  # fmt: skip
    micro_batch = next(micro_batches(BATCH, 4))
    for _ in range(2):
        micro_step(micro_batch, 1.0)
        micro_step.release()
    assert micro_step.reduce_memory()
    micro_step(micro_batch, 1.0)
    assert seen == [{"1"}, {"1"}, set()]  # of the last of two layers


def test_an_out_of_memory_error_of_transposed_weights_selects_a_smaller_plan(
    base: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    precision = all_8bit(base)
    expected = loss_and_gradients(trainer_of(base, PLANS[1], precision=precision))
    warnings: list[str] = []
    trainer = trainer_of(
        base, replace(PLANS[0], transposed=2), warnings, cheaper=lambda _: PLANS[1], precision=precision
    )

    def fail(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("octavo.train.precision.transposed_weight", fail)
    assert all(
        torch.equal(actual, wanted) for actual, wanted in zip(loss_and_gradients(trainer), expected, strict=True)
    )
    assert len(warnings) == 1


def failing(calls: set[int], error: Callable[[], Exception]) -> tuple[Objective, list[Any]]:
    """(an objective that fails in the calls with these indices; the save levels of all calls, in order)."""
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
def test_loss_and_gradients_do_not_depend_on_the_plan(base: Decoder, plan: MemoryPlan) -> None:
    one_pass = trainer_of(base)
    one_pass.micro_step = EagerStep(one_pass.model)
    expected_loss, expected = loss_and_gradients(one_pass)
    loss, gradients = loss_and_gradients(trainer_of(base, plan))
    assert float(expected.abs().max()) > 0.01
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_a_micro_batch_without_labels_adds_no_gradient(base: Decoder) -> None:
    trainer = trainer_of(base, PLANS[2])
    *_, last = micro_batches(BATCH, 1)
    assert last.trained_tokens == 0
    assert float(trainer.micro_step(last, 1.0)) == 0
    assert not any(p.grad is not None and p.grad.any() for p in trainer.parameters.values())


# Micro-batches of a step: three under the first plan, six under the second, twelve under the last.
@pytest.mark.parametrize(
    ("calls", "plan"),
    [
        pytest.param({0}, 1, id="in the first micro-batch"),
        pytest.param({1}, 1, id="in the second micro-batch"),
        pytest.param({2}, 1, id="in the last micro-batch"),
        pytest.param({0, 1}, 2, id="also with the next plan"),
        pytest.param({2, 6}, 2, id="also with the next plan, in the middle of the step"),
    ],
)
def test_an_out_of_memory_error_changes_only_the_plan(base: Decoder, calls: set[int], plan: int) -> None:
    """The gradients exclude those of the failed pass and those of the previous step."""
    expected = loss_and_gradients(trainer_of(base, PLANS[plan]))
    warnings: list[str] = []
    objective, seen = failing(calls, exhausted)
    trainer = trainer_of(base, warnings=warnings, objective=objective)
    for group in trainer.optimizer.groups:
        assert group.values.grad is not None
        group.values.grad.fill_(7)
    loss, gradients = loss_and_gradients(trainer)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradients, expected[1])
    passes = 3 * BATCH_SIZE // PLANS[plan].rows
    assert seen[max(calls) + 1 :] == [PLANS[plan].save] * passes
    assert isinstance(trainer.micro_step, PlannedStep)
    assert trainer.micro_step.plan == PLANS[plan]
    assert len(warnings) == plan
    assert all(
        "ran out of memory" in line and f"of {PLANS[n + 1].rows} sequence" in line for n, line in enumerate(warnings)
    )
    assert loss_and_gradients(trainer)[0].tolist() == loss.tolist()  # the next step uses the new plan


def test_a_run_after_an_out_of_memory_error_equals_a_run_with_the_smaller_plan(base: Decoder) -> None:
    def steps(trainer: Trainer) -> list[tuple[float | None, float]]:
        stream: Iterator[Batch] = (BATCH for _ in range(4))
        return [(step.loss, step.gradient_norm) for step in train(trainer, stream)]

    expected = steps(trainer_of(base, PLANS[1]))
    assert len(set(expected)) == 4
    trainer = trainer_of(base, objective=failing({1}, exhausted)[0])
    assert steps(trainer) == expected


def test_a_step_that_fits_no_plan_raises_an_error_with_a_hint(base: Decoder) -> None:
    objective, seen = failing({0, 1, 2}, exhausted)
    trainer = trainer_of(base, objective=objective)
    before = [group.values.detach().clone() for group in trainer.optimizer.groups]
    with pytest.raises(TrainingError, match=r"^Step 1 does not fit into memory,") as caught:
        list(train(trainer, iter([BATCH])))
    assert {"--seq-len", "nf4."} & set(caught.value.hint.split())
    assert "checkpoint" not in caught.value.hint  # there is none before the first step
    assert caught.value.__context__ is None  # no reference to the tensors of the failed call
    assert len(seen) == 3
    assert all(
        torch.equal(group.values, values) for group, values in zip(trainer.optimizer.groups, before, strict=True)
    )


def test_an_out_of_memory_error_of_an_eager_step_ends_the_run(base: Decoder) -> None:
    trainer = trainer_of(base)
    trainer.micro_step = EagerStep(trainer.model, objective=failing({0}, exhausted)[0])
    with pytest.raises(TrainingError, match="does not fit"):
        loss_and_gradients(trainer)


@pytest.mark.parametrize("error", [RuntimeError("device-side assert triggered"), ValueError("out of memory")])
def test_other_errors_are_raised_unchanged(base: Decoder, error: Exception) -> None:
    objective, seen = failing({1}, lambda: error)
    trainer = trainer_of(base, objective=objective)
    with pytest.raises(type(error)) as caught:
        loss_and_gradients(trainer)
    assert caught.value is error
    assert len(seen) == 2
    assert isinstance(trainer.micro_step, PlannedStep)
    assert trainer.micro_step.plan == PLANS[0]


def test_out_of_memory_errors_of_torch_cuda_and_cublas_are_recognized() -> None:
    assert out_of_memory(torch.OutOfMemoryError("any message"))
    assert out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


class FailsInBackward(torch.autograd.Function):
    """The identity; its backward raises an out-of-memory error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise exhausted()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_memory_of_a_failed_call_is_free_before_the_next_plan_is_chosen(
    base: Decoder, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Otherwise the next plan would have no more memory. The garbage collector is off."""
    large_tensors: list[weakref.ref[Tensor]] = []
    order: list[str] = []

    def loss(model: Decoder, inputs: Inputs, options: ForwardOptions) -> Tensor:
        if large_tensors:
            return next_token_loss(model, inputs, options)
        large = torch.ones(1000, requires_grad=True)
        total = next_token_loss(model, inputs, options) + large.exp().sum()
        large_tensors.append(weakref.ref(large))
        if where == "forward":
            raise exhausted()
        result: Tensor = FailsInBackward.apply(total)  # type: ignore[no-untyped-call]
        return result

    def cheaper(plan: MemoryPlan) -> MemoryPlan | None:
        order.append("allocated" if large_tensors[0]() is not None else "free")
        return next_plan(plan)

    monkeypatch.setattr(EagerStep, "release", lambda self: order.append("released"))
    trainer = trainer_of(base, warnings=order, objective=loss, cheaper=cheaper)
    gc.disable()
    try:
        loss_and_gradients(trainer)
    finally:
        gc.enable()
    assert order[:2] == ["released", "free"]
    assert len(order) == 3
