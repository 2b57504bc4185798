"""The training loop: a generator that yields a `Step` for each optimizer step; the caller does the rest.

One loop serves every model, scheme, data format and device. What varies comes in as arguments.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

import torch
from torch import Tensor, nn

from octavo.data.loader import Batch, Position
from octavo.errors import TrainingError
from octavo.failures import out_of_memory as out_of_memory
from octavo.layers.lora import gradients_in_place
from octavo.models import Decoder
from octavo.train.optim import Adam, LossScaler, Schedule
from octavo.train.step import MicroStep


@dataclass(frozen=True)
class Step:
    """One optimizer step. `loss` is the mean over the step's trained tokens, in nats; None of a step that has none."""

    number: int  # counted from 1
    loss: float | None
    learning_rate: float
    gradient_norm: float  # before clipping
    trained_tokens: int
    tokens: int  # real tokens that went through the model, padding apart
    seconds: float
    following: Position  # where the data go on
    skipped: bool  # float16 only: the gradients overflowed and the update was left out

    @property
    def tokens_per_second(self) -> float | None:
        """None where the clock did not move, as some virtual machines' do not."""
        return self.tokens / self.seconds if self.seconds > 0 else None


@dataclass
class Trainer:
    """What one run trains with. `parameters` are the trained ones by name, laid out in the optimizer's buffers."""

    model: Decoder
    parameters: Mapping[str, nn.Parameter]
    optimizer: Adam
    schedule: Schedule
    scaler: LossScaler
    micro_step: MicroStep
    seed: int
    accumulate: int = 1


def train(trainer: Trainer, batches: Iterator[Batch], *, done: int = 0) -> Iterator[Step]:
    """Steps done+1 .. schedule.total, each on the next `accumulate` batches (fewer if the data end within it).

    The loss of a step is normalised by the trained tokens of all its batches together, so that batch times
    accumulation alone counts. Randomness (dropout) is a function of (seed, step, micro-batch). TrainingError
    for a loss that is not finite, and, at the first step that has trained tokens, for trained parameters that
    receive no gradient. A step without any changes nothing.
    """
    trainer.model.train()
    checked = False
    try:
        for number in range(done + 1, trainer.schedule.total + 1):
            chosen = list(islice(batches, trainer.accumulate))
            if not chosen:
                return
            step = _step(trainer, chosen, number, check=not checked)
            checked = checked or step.trained_tokens > 0
            yield step
            trainer.model.train()  # the caller may have evaluated in between
    finally:
        trainer.model.eval()


def _step(trainer: Trainer, chosen: Sequence[Batch], number: int, *, check: bool) -> Step:
    started = perf_counter()
    optimizer, scaler = trainer.optimizer, trainer.scaler
    trained_tokens = sum(batch.trained_tokens for batch in chosen)
    losses = gradients(trainer, chosen, number, seed=scaler.scale / max(1, trained_tokens))
    scaler.unscale_(optimizer.groups)
    gradient_norm = optimizer.gradient_norm()
    # The one place of a step where the host waits for the card: nothing is updated before it is known to be sound.
    *values, norm = torch.stack([*losses, gradient_norm]).tolist()
    values = [value / max(1, trained_tokens) for value in values]
    for value, batch in zip(values, chosen, strict=True):
        if not math.isfinite(value):
            raise _not_finite(value, number, batch, scaler)
    finite = math.isfinite(norm)
    if check and trained_tokens:
        check_gradients(trainer.parameters, finite_needed=not scaler.active)
        assert gradients_in_place(optimizer.groups)
    if not finite and (not scaler.active or scaler.scale < 2.0**-10):
        raise _gradient_not_finite(number, chosen)
    learning_rate = trainer.schedule.at(number)
    if finite and trained_tokens:
        optimizer.step(learning_rate, gradient_norm=gradient_norm)
    scaler.update(finite=finite)
    return Step(
        number=number,
        loss=math.fsum(values) if trained_tokens else None,
        learning_rate=learning_rate,
        gradient_norm=norm,
        trained_tokens=trained_tokens,
        tokens=sum(int((batch.document >= 0).sum()) for batch in chosen),
        seconds=perf_counter() - started,
        following=chosen[-1].following,
        skipped=not finite,
    )


def gradients(trainer: Trainer, chosen: Sequence[Batch], number: int, *, seed: float) -> list[Tensor]:
    """Sets the gradients of one step, seed times those of its batches together; the batches' summed losses in nats.

    Where memory runs out all of it is done once more with a cheaper plan; TrainingError if there is none.
    """
    while True:
        trainer.optimizer.zero_gradients()
        losses: list[Tensor] = []
        try:
            for index, batch in enumerate(chosen):
                torch.manual_seed(_seed(trainer.seed, number, index))
                losses.append(trainer.micro_step(batch, seed))
            return losses
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        # Only here, where the failed call's tensors are no longer held by its traceback.
        if not trainer.micro_step.reduce_memory():
            raise TrainingError(
                f"Step {number} does not fit into the card's memory, however little is kept.",
                hint="Try a smaller --seq-len or --scheme nf4, or end other programs on the card.",
            )


def check_gradients(parameters: Mapping[str, nn.Parameter], *, finite_needed: bool = True) -> None:
    """TrainingError unless every trained parameter has a finite gradient and every pair learns something.

    A new pair's A gets a gradient of exactly zero, since its B still is zero (an embedding's, the other way
    round); so of each pair one factor must receive more than zero. A pair that receives nothing would end the
    run with an adapter that does nothing, which nobody notices until it is used.
    """
    missing = [name for name, p in parameters.items() if p.grad is None]
    infinite = [name for name, p in parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
    received: dict[str, bool] = {}
    for name, p in parameters.items():
        group = name.removesuffix(".lora_A").removesuffix(".lora_B")
        received[group] = received.get(group, False) or (p.grad is not None and bool(p.grad.any()))
    silent = [name for name, any_ in received.items() if not any_]
    if missing or silent:
        names = missing or silent
        reached = f"No gradient reaches {names[0]}" + (f" and {len(names) - 1} more." if len(names) > 1 else ".")
        if len(silent) == len(received):
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
    if infinite and finite_needed:
        raise TrainingError(
            f"The gradient of {infinite[0]} is not finite at the first step.",
            hint="Try --dtype float32, or bfloat16 instead of float16.",
        )


def _seed(seed: int, step: int, index: int) -> int:
    """63 bits from (seed, step, micro-batch): randomness without any state to save."""
    digest = hashlib.blake2b(f"{seed} {step} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _not_finite(value: float, number: int, batch: Batch, scaler: LossScaler) -> TrainingError:
    advice = "a smaller --lr or a longer --warmup"
    if scaler.active:
        advice += ", or --dtype float32 or bfloat16 instead of float16"
    return TrainingError(
        f"The loss is {value} at step {number}, in the batch with {_named(batch.sources)}.",
        hint=f"Try {advice}.",
    )


def _gradient_not_finite(number: int, chosen: Sequence[Batch]) -> TrainingError:
    sources = tuple(dict.fromkeys(source for batch in chosen for source in batch.sources))
    return TrainingError(
        f"The gradient is not finite at step {number}, in the batch with {_named(sources)}.",
        hint="Try a smaller --lr or --dtype float32.",
    )


def _named(sources: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(sources[:most])
    return shown if len(sources) <= most else f"{shown} and {len(sources) - most} more"
