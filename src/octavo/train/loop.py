"""The training loop: a generator that yields a `Step` for each optimizer step.

The caller evaluates, logs and writes checkpoints between two steps. The loop is the same for every model, scheme, data
format and device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from octavo.data.loader import Batch, Position
from octavo.errors import TrainingError
from octavo.failures import out_of_memory
from octavo.layers.lora import FlatGroup, gradients_in_place
from octavo.models import Decoder
from octavo.train.optim import Adam, LossScaler, Schedule
from octavo.train.step import MicroStep, micro_batches

# LossScaler starts at 2**13 and halves the scale at each overflow: 24 skipped steps in a row go below this scale. A
# gradient that overflows float16 even then exceeds 65,504 * 2**10 unscaled, or is NaN: no smaller scale helps.
MIN_LOSS_SCALE = 2.0**-10


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    number: int  # counted from 1
    loss: float | None  # weighted mean over the step's trained tokens, in nats; None if there are none
    learning_rate: float
    gradient_norm: float  # before clipping
    trained_tokens: int
    tokens: int  # without padding
    seconds: float
    following: Position  # of the next batch in the data: where a resumed run continues
    skipped: bool  # float16 only: the gradients overflowed and the update was left out

    @property
    def tokens_per_second(self) -> float | None:
        """None if the clock did not advance, as on some virtual machines."""
        return self.tokens / self.seconds if self.seconds > 0 else None


@dataclass
class Trainer:
    """What a training step needs. `parameters` are the trained ones by name.

    They are views into the optimizer's flat buffers: a `FlatGroup` holds the parameters of one weight decay as one
    vector `values`, and their gradients as `values.grad`.

    `sum_over_ranks` adds the gradients of several processes, once per optimizer step, before they are unscaled and
    clipped. The default is for one process and does nothing; no command sets another one yet.
    """

    model: Decoder
    parameters: Mapping[str, nn.Parameter]
    optimizer: Adam
    schedule: Schedule
    scaler: LossScaler
    micro_step: MicroStep
    seed: int
    sum_over_ranks: Callable[[Sequence[FlatGroup]], None] = lambda groups: None


def train(trainer: Trainer, batches: Iterator[Batch], *, done: int = 0) -> Iterator[Step]:
    """Steps done+1 .. schedule.total, each on the next batch.

    The loss of a step is the sum over its micro-batches, divided by the total weight of all their labels: without
    dropout the split into micro-batches changes it by rounding only. Randomness (dropout) is a function of (seed, step,
    micro-batch): with micro-batches of another size the masks differ. TrainingError for a loss that is not finite, and,
    at the first step with trained tokens, for trained parameters without a gradient. A step without trained tokens
    changes nothing.
    """
    trainer.model.train()
    checked = False
    try:
        for number in range(done + 1, trainer.schedule.total + 1):
            batch = next(batches, None)
            if batch is None:
                return
            step = _step(trainer, batch, number, check=not checked)
            checked = checked or step.trained_tokens > 0
            yield step
            trainer.model.train()  # the caller may have evaluated in between
    finally:
        trainer.model.eval()


def _step(trainer: Trainer, batch: Batch, number: int, *, check: bool) -> Step:
    started = perf_counter()
    optimizer, scaler = trainer.optimizer, trainer.scaler
    check_weights(batch)
    trains = batch.label_weight > 0  # not if all labels have weight 0
    weight = batch.label_weight if trains else 1
    losses, rows = accumulate_gradients(trainer, batch, number, loss_scale=scaler.scale / weight)
    trainer.sum_over_ranks(optimizer.groups)
    scaler.unscale_(optimizer.groups)
    gradient_norm = optimizer.gradient_norm()
    # One transfer for all scalars, the only wait of the CPU for the GPU in a step: loss and gradients must be checked
    # before the update.
    *values, norm = torch.stack([*losses, gradient_norm]).tolist()
    values = [value / weight for value in values]
    wrong = [index for index, value in enumerate(values) if not math.isfinite(value)]
    if wrong:
        part = list(micro_batches(batch, rows))[wrong[0]]
        raise _not_finite(values[wrong[0]], part, number, scaler)
    finite = math.isfinite(norm)
    if check and trains:
        check_gradients(trainer.parameters, finite_needed=not scaler.active)
        assert gradients_in_place(optimizer.groups)  # else the optimizer would not see them
    if not finite and (not scaler.active or scaler.scale < MIN_LOSS_SCALE):
        raise _gradient_not_finite(number, batch)
    learning_rate = trainer.schedule.at(number)
    if finite and trains:
        optimizer.step(learning_rate, gradient_norm=gradient_norm)
    scaler.update(finite=finite)
    return Step(
        number=number,
        loss=math.fsum(values) if trains else None,
        learning_rate=learning_rate,
        gradient_norm=norm,
        trained_tokens=batch.trained_tokens if trains else 0,
        tokens=int((batch.piece >= 0).sum()),
        seconds=perf_counter() - started,
        following=batch.following,
        skipped=not finite,
    )


def accumulate_gradients(trainer: Trainer, batch: Batch, number: int, *, loss_scale: float) -> tuple[list[Tensor], int]:
    """Sets the gradients to loss_scale times those of the batch, accumulated over its micro-batches.

    Returns (the losses of the micro-batches, in nats, summed over labels; rows of a micro-batch). If memory runs out,
    the step is repeated with a cheaper plan; TrainingError if there is none.
    """
    while True:
        trainer.optimizer.zero_gradients()
        losses: list[Tensor] = []
        rows = trainer.micro_step.rows
        try:
            for index, part in enumerate(micro_batches(batch, rows)):
                generator = torch.Generator().manual_seed(_seed(trainer.seed, number, index))
                losses.append(trainer.micro_step(part, loss_scale, generator))
            return losses, rows
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        # After the except clause, whose traceback refers to the tensors of the failed call.
        if not trainer.micro_step.reduce_memory():
            place = "the memory of the GPU" if trainer.model.embed.matrix.device.type == "cuda" else "memory"
            raise TrainingError(
                f"Step {number} does not fit into {place}, even with everything recomputed.",
                hint=f"Use a smaller --seq-len or --scheme nf4, or end other programs that use {place}.",
            )


def check_weights(batch: Batch) -> None:
    """TrainingError unless the weights of a batch have the shape of its labels, are finite and at least 0."""
    weights, where = batch.weights, f"The label weights of the batch with {_named(batch.sources)}"
    if weights is None:
        return
    if weights.shape != batch.labels.shape:
        raise TrainingError(
            f"{where} have the shape {tuple(weights.shape)}; its labels have {tuple(batch.labels.shape)}.",
            hint="Give one weight for each label.",
        )
    if not (weights.isfinite() & (weights >= 0)).all():
        raise TrainingError(f"{where} are not all finite and at least 0.", hint="Use 0 for labels without a loss.")


def check_gradients(parameters: Mapping[str, nn.Parameter], *, finite_needed: bool = True) -> None:
    """TrainingError unless every trained parameter has a finite gradient, and A or B of each LoRA one that is not zero.

    Only one of the two can be nonzero at the first step: dL/dA has the factor B, which starts as zero in a linear, and
    dL/dB has the factor A, which starts as zero in an embedding. If both are zero, the run would end with an adapter
    that changes nothing, unnoticed until it is used.
    """
    without_gradient = [name for name, p in parameters.items() if p.grad is None]
    not_finite = [name for name, p in parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
    received: dict[str, bool] = {}
    for name, p in parameters.items():
        group = name.removesuffix(".lora_A").removesuffix(".lora_B")
        received[group] = received.get(group, False) or (p.grad is not None and bool(p.grad.any()))
    all_zero = [name for name, nonzero in received.items() if not nonzero]
    if without_gradient or all_zero:
        names = without_gradient or all_zero
        reached = f"No gradient reaches {names[0]}" + (f" and {len(names) - 1} more." if len(names) > 1 else ".")
        if len(all_zero) == len(received):
            raise TrainingError(
                f"{reached} None of the trained parameters receives one.",
                hint="The activations of the base model are zero or overflow: its weights may be damaged, all zero or "
                "far too large. Measure it with `octavo evaluate`, or try --dtype float32.",
            )
        raise TrainingError(
            reached,
            hint="The first batch must train something through each of them: leave them out with --lora-targets, or "
            "check with `octavo data` that the data have trained tokens.",
        )
    if not_finite and finite_needed:
        raise TrainingError(
            f"The gradient of {not_finite[0]} is not finite at the first step.",
            hint="Try --dtype float32, or bfloat16 instead of float16.",
        )


def _seed(seed: int, step: int, index: int) -> int:
    """63 bits from (seed, step, micro-batch): randomness without any state to save."""
    digest = hashlib.blake2b(f"{seed} {step} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _not_finite(value: float, batch: Batch, number: int, scaler: LossScaler) -> TrainingError:
    other = "--dtype float32, or bfloat16 where the GPU has it, instead of float16"
    advice = "a smaller --lr or a longer --warmup"
    if scaler.active:  # before the first update the learning rate has no part in it
        advice = other if number == 1 else f"{advice}, or {other}"
    return TrainingError(
        f"The loss is {value} at step {number}, in the batch with {_named(batch.sources)}.",
        hint=f"Try {advice}.",
    )


def _gradient_not_finite(number: int, batch: Batch) -> TrainingError:
    return TrainingError(
        f"The gradient is not finite at step {number}, in the batch with {_named(batch.sources)}.",
        hint="Try a smaller --lr or --dtype float32.",
    )


def _named(sources: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(sources[:most])
    return shown if len(sources) <= most else f"{shown} and {len(sources) - most} more"
