"""Adam over flat buffers, with 8-bit or 32-bit state; learning-rate schedules; the loss scaler of float16.

The two moments of 8-bit Adam are quantized in blocks of 256 values, in bitsandbytes' format (ops/adam.py). One kernel
launch updates a whole buffer. `state` and `load_state` restore everything here bit for bit.

Legend: n values in the flat buffer of a group (layers/lora.py).
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
MIN_8BIT_VALUES = 4096  # a buffer of fewer values has 32-bit moments, as in bitsandbytes (min_8bit_size)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv 1711.05101). Weight decay applies to matrices, not to norms and biases."""

    kind: str = "adamw8bit"
    weight_decay: float = 0.0
    beta_1: float = 0.9
    beta_2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0  # of the gradients of all trained parameters; 0: no clipping


@dataclass(frozen=True)
class Schedule:
    """Learning rates of optimizer steps 1 .. total: linear warm-up, then decay to `floor` times the peak."""

    peak: float
    total: int
    warmup: int = 0
    kind: str = "cosine"
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UsageError(f"There is no schedule {self.kind!r}.", hint=f"Choose {', '.join(SCHEDULES)}.")

    def at(self, step: int) -> float:
        """The learning rate of `step`, counted from 1; floor * peak at the last step, except for constant."""
        if step <= self.warmup:
            return self.peak * step / self.warmup
        if self.kind == "constant":
            return self.peak
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        shape = 1 - done if self.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.peak * (self.floor + (1 - self.floor) * shape)


class Adam:
    """AdamW over flat buffers. Updates the buffers of `groups` in place: so the parameters, which are views, change."""

    def __init__(self, groups: Sequence[FlatGroup], settings: OptimizerSettings) -> None:
        if settings.kind not in OPTIMIZERS:
            raise UsageError(f"There is no optimizer {settings.kind!r}.", hint=f"Choose {' or '.join(OPTIMIZERS)}.")
        self.groups = list(groups)
        self.settings = settings
        update = _Adam8bit if settings.kind == "adamw8bit" else _TorchAdamW
        self._updates: list[_Update] = [update(group, settings) for group in self.groups]  # one for each group

    def zero_gradients(self) -> None:
        """Sets all gradients to zero, in place: the gradients of the parameters are views of the buffers."""
        for group in self.groups:
            assert group.values.grad is not None
            group.values.grad.zero_()

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients as one vector, a float32 scalar; not finite if any gradient is not finite."""
        norms = [torch.linalg.vector_norm(group.values.grad) for group in self.groups if group.values.grad is not None]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))  # () float32
        return total

    @torch.no_grad()
    def step(self, learning_rate: float, *, gradient_norm: Tensor) -> None:
        """Clips the gradients, whose norm is given, and updates all groups."""
        if self.settings.max_grad_norm > 0:
            # 1e-6 as in torch.nn.utils.clip_grad_norm_. The factor stays a tensor on the device: `item` would wait.
            factor = (self.settings.max_grad_norm / (gradient_norm + 1e-6)).clamp_max(1.0)  # ()
        else:
            factor = torch.ones_like(gradient_norm)
        for update in self._updates:
            update.step(learning_rate, factor)

    def state(self) -> dict[str, Tensor]:
        """The complete state, as tensors on the CPU, by group and name."""
        return {
            f"{index}.{key}": tensor.detach().cpu().clone()
            for index, update in enumerate(self._updates)
            for key, tensor in update.state().items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores a state of `state`. CheckpointError if it lacks a tensor or belongs to buffers of other sizes."""
        for index, (group, update) in enumerate(zip(self.groups, self._updates, strict=True)):
            # {} is a valid state: a checkpoint before the first step of PyTorch's AdamW has no moments.
            saved = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{index}.")}
            moments = [tensor for tensor in saved.values() if tensor.numel() == group.values.numel()]
            if saved and len(moments) < 2:
                raise CheckpointError(
                    "The optimizer's state in the checkpoint belongs to another set of trained parameters."
                )
            # Without it the bias corrections would be those of the first step.
            if tensors and not _is_count(saved.get("step")):
                raise CheckpointError(f"The optimizer's state lacks {index}.step, the number of steps.")
            update.load_state(saved)


def _is_count(step: Tensor | None) -> bool:
    """Whether a tensor is one number that is at least 0."""
    return step is not None and step.numel() == 1 and bool(torch.isfinite(step).all()) and float(step) >= 0


class _Update(Protocol):
    """The update of one group's buffer."""

    def step(self, learning_rate: float, factor: Tensor) -> None:
        """One step, with the gradient times `factor`."""
        ...

    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, saved: Mapping[str, Tensor]) -> None: ...


class _TorchAdamW:
    """AdamW with 32-bit moments: `torch.optim.AdamW` on the flat buffer."""

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

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        if saved and saved.keys() != TORCH_STATE:
            raise CheckpointError(
                "The optimizer's state in the checkpoint is not that of --optimizer adamw.",
                hint="Resume with the optimizer of the checkpoint.",
            )
        device = self.values.device
        self._adamw.state[self.values] = {  # "step" stays on the CPU, where PyTorch reads it
            key: tensor.clone() if key == "step" else tensor.to(device, copy=True) for key, tensor in saved.items()
        }


class _Adam8bit:
    """AdamW with 8-bit moments, or 32-bit moments for a buffer of fewer than MIN_8BIT_VALUES values."""

    def __init__(self, group: FlatGroup, settings: OptimizerSettings) -> None:
        self.values, self.settings = group.values, settings
        self.decay = settings.weight_decay if group.decays else 0.0
        self.steps = 0
        zeros = torch.zeros_like(self.values), torch.zeros_like(self.values)  # (n,) float32 each
        self.moments = zeros if self.values.numel() < MIN_8BIT_VALUES else no_moments(self.values)

    def step(self, learning_rate: float, factor: Tensor) -> None:
        settings = self.settings
        self.steps += 1
        # Bias correction (arXiv 1412.6980, algorithm 1): with m and v uncorrected, the step is
        # lr / (1 - beta_1^t) m / (sqrt(v) / sqrt(1 - beta_2^t) + eps). Weight decay is decoupled: values *= keep.
        rates = Rates(
            settings.beta_1, settings.beta_2, settings.eps, keep=1 - learning_rate * self.decay,
            size=learning_rate / (1 - settings.beta_1**self.steps), root=math.sqrt(1 - settings.beta_2**self.steps),
        )  # fmt: skip
        values, gradient = self.values.detach(), self.values.grad  # (n,)
        assert gradient is not None
        if isinstance(self.moments, Moments):
            adam8_(values, gradient, self.moments, factor, rates)
        else:
            adam_(values, gradient * factor, *self.moments, rates)

    def state(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.steps), **dict(zip(STATE, self.moments, strict=False))}

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        self.steps = int(saved["step"]) if saved else 0
        for name, tensor in zip(STATE, self.moments, strict=False):
            if saved and (name not in saved or saved[name].numel() != tensor.numel()):
                raise CheckpointError(
                    f"The optimizer's state in the checkpoint lacks {name} of the trained parameters.",
                    hint="Resume with the optimizer of the checkpoint.",
                )
            tensor.copy_(saved[name].view_as(tensor)) if saved else tensor.zero_()


class LossScaler:
    """Dynamic loss scaling for float16 (arXiv 1710.03740): small gradients would round to zero in float16.

    The loss is multiplied by `scale` before backward, and the gradients are divided by it. A step whose gradients are
    not finite is skipped and halves the scale; `patience` finite steps in a row double it. For other dtypes the scale
    is 1.
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
        """Updates the scale after a step, by whether its gradients were finite."""
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
