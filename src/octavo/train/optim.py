"""Adam over flat buffers, with 8-bit or 32-bit state; learning-rate schedules; the loss scaler of float16.

8-bit Adam is bitsandbytes' (arXiv 2110.02861): the two moments are held as codes in blocks of 256, one kernel
launch a buffer. Everything here can be stopped and continued bit for bit: `state` and `load_state`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import CheckpointError, UsageError
from octavo.layers.lora import FlatGroup
from octavo.ops.foreign import bitsandbytes

OPTIMIZERS = ("adamw8bit", "adamw")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv 1711.05101). Weight decay applies to matrices, not to norms and biases."""

    kind: str = "adamw8bit"
    weight_decay: float = 0.0
    beta_1: float = 0.9
    beta_2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0  # largest norm of the gradient of all trained numbers; 0 for none


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
        self.groups = list(groups)
        self.settings = settings
        arguments = [
            {"params": [group.values], "weight_decay": settings.weight_decay if group.decays else 0.0}
            for group in self.groups
        ]
        self._optimizer = _make(settings, arguments)

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

    def step(self, learning_rate: float, *, gradient_norm: Tensor) -> None:
        """Clips by the given norm, then one update."""
        if self.settings.clip > 0:
            factor = (self.settings.clip / (gradient_norm + 1e-6)).clamp_max(1.0)
            for group in self.groups:
                assert group.values.grad is not None
                group.values.grad.mul_(factor)
        for arguments in self._optimizer.param_groups:
            arguments["lr"] = learning_rate
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as plain tensors, on the CPU."""
        tensors = {}
        for index, group in enumerate(self.groups):
            for key, value in self._optimizer.state[group.values].items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                tensors[f"{index}.{key}"] = tensor.detach().cpu().clone()
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up a copy of a state from `state`. CheckpointError if it is not of the same buffers."""
        for index, group in enumerate(self.groups):
            own = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{index}.")}
            moments = [tensor for key, tensor in own.items() if tensor.numel() == group.values.numel()]
            if own and len(moments) < 2:
                raise CheckpointError(
                    "The optimizer's state in the checkpoint belongs to another set of trained numbers."
                )
            self._optimizer.state[group.values] = {
                key: int(tensor) if key == "step" and self.settings.kind == "adamw8bit"
                else tensor.clone() if key == "step" else tensor.to(group.values.device, copy=True)
                for key, tensor in own.items()
            }  # fmt: skip


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


def _make(settings: OptimizerSettings, arguments: list[dict[str, object]]) -> torch.optim.Optimizer:
    betas = (settings.beta_1, settings.beta_2)
    if settings.kind == "adamw":
        return torch.optim.AdamW(arguments, lr=0.0, betas=betas, eps=settings.eps)
    if settings.kind != "adamw8bit":
        raise UsageError(f"There is no optimizer {settings.kind!r}.", hint=f"Choose {' or '.join(OPTIMIZERS)}.")
    optimizer: torch.optim.Optimizer = bitsandbytes().optim.AdamW8bit(arguments, lr=0.0, betas=betas, eps=settings.eps)
    return optimizer
