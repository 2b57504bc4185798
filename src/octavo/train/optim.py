"""Adam over flat buffers, with 8-bit or 32-bit state; learning-rate schedules; the loss scaler of float16.

In 8 bits the two moments are held as codes in blocks of 256, in bitsandbytes' format (ops/adam.py): one kernel launch a
buffer. Everything here can be stopped and continued bit for bit: `state` and `load_state`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from octavo.errors import CheckpointError, UsageError
from octavo.layers.lora import FlatGroup
from octavo.ops.adam import Moments, Rates, adam8_, adam_, no_moments

OPTIMIZERS = ("adamw8bit", "adamw")
SCHEDULES = ("cosine", "linear", "constant")
STATE = ("state1", "state2", "absmax1", "absmax2")  # of 8-bit Adam: bitsandbytes' names
TORCH_STATE = {"step", "exp_avg", "exp_avg_sq"}  # of torch.optim.AdamW
FEW = 4096  # numbers: the moments of fewer stay in 32 bits, as bitsandbytes has it


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv 1711.05101). Weight decay applies to matrices, not to norms and biases."""

    kind: str = "adamw8bit"
    weight_decay: float = 0.0
    beta_1: float = 0.9
    beta_2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0  # largest norm of the gradient of all trained numbers; 0 for none


@dataclass(frozen=True)
class Schedule:
    """Learning rates of optimizer steps 1 .. total: a straight warm-up, then a fall to `floor` times the peak."""

    peak: float
    total: int
    warmup: int = 0
    kind: str = "cosine"
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UsageError(f"There is no schedule {self.kind!r}.", hint=f"Choose {', '.join(SCHEDULES)}.")

    def at(self, step: int) -> float:
        """The learning rate of `step`, counted from 1. The last step's is floor * peak, but for constant."""
        if step <= self.warmup:
            return self.peak * step / self.warmup
        if self.kind == "constant":
            return self.peak
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        shape = 1 - done if self.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.peak * (self.floor + (1 - self.floor) * shape)


class Adam:
    """The optimizer of one run. Steps in place on `groups`; their gradients stay where they are."""

    def __init__(self, groups: Sequence[FlatGroup], settings: OptimizerSettings) -> None:
        if settings.kind not in OPTIMIZERS:
            raise UsageError(f"There is no optimizer {settings.kind!r}.", hint=f"Choose {' or '.join(OPTIMIZERS)}.")
        self.groups = list(groups)
        self.settings = settings
        made = _Eight if settings.kind == "adamw8bit" else _Torch
        self._updates: list[_Update] = [made(group, settings) for group in self.groups]

    def zero_gradients(self) -> None:
        """In place: the parameters' gradients are views that must stay."""
        for group in self.groups:
            assert group.values.grad is not None
            group.values.grad.zero_()

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients together, a float32 scalar; not finite if any of them is not."""
        norms = [torch.linalg.vector_norm(group.values.grad) for group in self.groups if group.values.grad is not None]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total

    @torch.no_grad()
    def step(self, learning_rate: float, *, gradient_norm: Tensor) -> None:
        """Clips by the given norm, then one update."""
        if self.settings.max_grad_norm > 0:
            factor = (self.settings.max_grad_norm / (gradient_norm + 1e-6)).clamp_max(1.0)
        else:
            factor = torch.ones_like(gradient_norm)
        for update in self._updates:
            update.step(learning_rate, factor)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as plain tensors, on the CPU."""
        return {
            f"{index}.{key}": tensor.detach().cpu().clone()
            for index, update in enumerate(self._updates)
            for key, tensor in update.state().items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up a copy of a state from `state`. CheckpointError if it is not of the same buffers."""
        for index, (group, update) in enumerate(zip(self.groups, self._updates, strict=True)):
            own = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{index}.")}
            moments = [tensor for key, tensor in own.items() if tensor.numel() == group.values.numel()]
            if own and len(moments) < 2:
                raise CheckpointError(
                    "The optimizer's state in the checkpoint belongs to another set of trained numbers."
                )
            update.load_state(own)


class _Update(Protocol):
    """Steps of one group."""

    def step(self, learning_rate: float, factor: Tensor) -> None:
        """One step, with the gradient times `factor`."""
        ...

    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, own: Mapping[str, Tensor]) -> None: ...


class _Torch:
    """AdamW with moments of 32 bits."""

    def __init__(self, group: FlatGroup, settings: OptimizerSettings) -> None:
        betas, decay = (settings.beta_1, settings.beta_2), settings.weight_decay if group.decays else 0.0
        self.values, self.clips = group.values, settings.max_grad_norm > 0
        self._adamw = torch.optim.AdamW([self.values], lr=0.0, betas=betas, eps=settings.eps, weight_decay=decay)

    def step(self, learning_rate: float, factor: Tensor) -> None:
        assert self.values.grad is not None
        if self.clips:
            self.values.grad.mul_(factor)
        self._adamw.param_groups[0]["lr"] = learning_rate
        self._adamw.step()

    def state(self) -> dict[str, Tensor]:
        return dict(self._adamw.state[self.values])

    def load_state(self, own: Mapping[str, Tensor]) -> None:
        if own and own.keys() != TORCH_STATE:
            raise CheckpointError(
                "The optimizer's state in the checkpoint is not that of --optimizer adamw.",
                hint="Go on with the optimizer of the checkpoint.",
            )
        device = self.values.device
        self._adamw.state[self.values] = {
            key: tensor.clone() if key == "step" else tensor.to(device, copy=True) for key, tensor in own.items()
        }


class _Eight:
    """AdamW with moments of 8 bits; those of few numbers have 32."""

    def __init__(self, group: FlatGroup, settings: OptimizerSettings) -> None:
        self.values, self.settings = group.values, settings
        self.decay = settings.weight_decay if group.decays else 0.0
        self.steps = 0
        few = self.values.numel() < FEW
        self.held = (torch.zeros_like(self.values), torch.zeros_like(self.values)) if few else no_moments(self.values)

    def step(self, learning_rate: float, factor: Tensor) -> None:
        own = self.settings
        self.steps += 1
        rates = Rates(
            own.beta_1, own.beta_2, own.eps, keep=1 - learning_rate * self.decay,
            size=learning_rate / (1 - own.beta_1**self.steps), root=math.sqrt(1 - own.beta_2**self.steps),
        )  # fmt: skip
        values, gradient = self.values.detach(), self.values.grad
        assert gradient is not None
        if isinstance(self.held, Moments):
            adam8_(values, gradient, self.held, factor, rates)
        else:
            adam_(values, gradient * factor, *self.held, rates)

    def state(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.steps), **dict(zip(STATE, self.held, strict=False))}

    def load_state(self, own: Mapping[str, Tensor]) -> None:
        self.steps = int(own.get("step", 0))
        for name, tensor in zip(STATE, self.held, strict=False):
            if own and (name not in own or own[name].numel() != tensor.numel()):
                raise CheckpointError(
                    f"The optimizer's state in the checkpoint lacks {name} of the trained numbers.",
                    hint="Go on with the optimizer of the checkpoint.",
                )
            tensor.copy_(own[name].view_as(tensor)) if own else tensor.zero_()


class LossScaler:
    """Keeps float16 gradients within range: the loss is multiplied by `scale`, the gradients divided again.

    A step whose gradients are not finite is left out and the scale halved; after `patience` good steps in a row
    it doubles (arXiv 1710.03740, section 4.2). With other types it does nothing: scale 1.
    """

    def __init__(self, dtype: torch.dtype, *, patience: int = 200) -> None:
        self.active = dtype == torch.float16
        self.scale = 2.0**13 if self.active else 1.0
        self.patience = patience
        self.good_steps = 0

    def unscale_(self, groups: Sequence[FlatGroup]) -> None:
        """Divides the gradients by the scale."""
        if self.active:
            for group in groups:
                assert group.values.grad is not None
                group.values.grad.div_(self.scale)

    def update(self, *, finite: bool) -> None:
        """Adapts the scale after a step whose gradients were finite or not."""
        if not self.active:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps == self.patience:
            self.scale, self.good_steps = min(self.scale * 2, 2.0**24), 0

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state(self, state: Mapping[str, float]) -> None:
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
