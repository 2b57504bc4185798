"""The functions between the two matmuls of a branch: what they have in common, and the activations.

Attention is in fused/attention.py. models/fused_blocks.py combines them.

A mixer reads its columns of u (M, inputs) and adds its output (M, outputs) to the input of the outer matmul. In
backward, du is written over u. The output is needed once more, for the LoRA gradients of the outer linear: it is
written over the gradient to it, or is saved (attention), so that no second matrix of either size exists. If the same
pass computes those LoRA gradients (ops/lora_backward.py), the output is not written at all.

Legend: M = B T rows (tokens), H query heads, D the size of a head, F the width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor
from torch.autograd.graph import GradientEdge

from octavo.layers.context import ForwardContext
from octavo.layers.gemm_input import GemmInput
from octavo.ops.lora_backward import (
    LoraGrads,
    LoraOperands,
    geglu_lora_backward_,
    gelu_lora_backward_,
    swiglu_lora_backward_,
)
from octavo.ops.pointwise import (
    geglu_backward_,
    geglu_into,
    gelu_backward_,
    gelu_into,
    swiglu_backward_,
    swiglu_into,
)


@dataclass
class SavedAttention:
    """Attention's output with the part of the autograd graph that its backward needs."""

    out: Tensor  # (M, H D)
    edges: tuple[GradientEdge, ...]  # of q, k and v
    sources: list[Tensor]  # the matrices of which q, k and v are views; empty until backward
    grad_trained: list[Tensor | None] = field(default_factory=list)  # of the norms of q and k, filled in by backward


class Mixer(Protocol):
    """A function of columns of u."""

    @property
    def trained(self) -> list[Tensor]:
        """The parameters, which may require a gradient."""
        ...

    @property
    def inputs(self) -> int: ...

    @property
    def outputs(self) -> int: ...

    def forward(
        self, u: Tensor, gemm_input: GemmInput, context: ForwardContext, *, save: bool
    ) -> SavedAttention | None:
        """Prepares u and adds the output to `gemm_input`. With `save`, returns what backward needs besides u."""
        ...

    def prepare_(self, u: Tensor, context: ForwardContext) -> None:
        """Changes a recomputed u in place as `forward` changes u."""
        ...

    def save(self, u: Tensor, context: ForwardContext) -> SavedAttention | None:
        """What backward needs besides a prepared u."""
        ...

    @property
    def lora_chunks(self) -> int:
        """Number of input chunks (GELU 1, SwiGLU and GEGLU 2) whose LoRA gradients the fused backward supports."""
        ...

    def backward_(
        self,
        u: Tensor,
        dout: Tensor,
        saved: SavedAttention | None,
        context: ForwardContext,
        operands: LoraOperands | None = None,
    ) -> Tensor | LoraGrads:
        """Writes du over u. Returns the output, which may be written over dout; with `operands`, the LoRA gradients.

        The gradients of `trained` are in `saved.grad_trained` afterwards.
        """
        ...


@dataclass(frozen=True)
class _Activation:
    """A function of each token's values, which saves nothing. Subclasses give its three formulas."""

    width: int
    lora_chunks: ClassVar[int]  # chunks of u, each as wide as the output

    @property
    def trained(self) -> list[Tensor]:
        return []

    @property
    def inputs(self) -> int:
        return self.lora_chunks * self.width

    @property
    def outputs(self) -> int:
        return self.width

    def prepare_(self, u: Tensor, context: ForwardContext) -> None:
        return

    def save(self, u: Tensor, context: ForwardContext) -> None:
        return

    def forward(self, u: Tensor, gemm_input: GemmInput, context: ForwardContext, *, save: bool) -> None:
        self.write(u, gemm_input.add())

    def backward_(
        self,
        u: Tensor,
        dout: Tensor,
        saved: SavedAttention | None,
        context: ForwardContext,
        operands: LoraOperands | None = None,
    ) -> Tensor | LoraGrads:
        if operands is not None:
            return self.lora_gradient_(u, dout, operands)
        self.gradient_(u, dout)
        return dout

    def write(self, u: Tensor, out: Tensor) -> None:
        """out (M, outputs) = f(u)."""
        raise NotImplementedError

    def gradient_(self, u: Tensor, dout: Tensor) -> None:
        """u = f'(u)^T dout, dout = f(u)."""
        raise NotImplementedError

    def lora_gradient_(self, u: Tensor, dout: Tensor, operands: LoraOperands) -> LoraGrads:
        """u = f'(u)^T dout, and the LoRA gradients on both sides."""
        raise NotImplementedError


@dataclass(frozen=True)
class Gelu(_Activation):
    """GELU in the tanh form or, if `approximate` is "none", with erf; u is its input."""

    approximate: str = "tanh"
    lora_chunks = 1

    def write(self, u: Tensor, out: Tensor) -> None:
        gelu_into(u, out, approximate=self.approximate)

    def gradient_(self, u: Tensor, dout: Tensor) -> None:
        gelu_backward_(u, dout, approximate=self.approximate)

    def lora_gradient_(self, u: Tensor, dout: Tensor, operands: LoraOperands) -> LoraGrads:
        return gelu_lora_backward_(u, dout, operands, approximate=self.approximate)


class Swiglu(_Activation):
    """silu(gate) * up; u is [gate | up]."""

    lora_chunks = 2

    def write(self, u: Tensor, out: Tensor) -> None:
        swiglu_into(u, out)

    def gradient_(self, u: Tensor, dout: Tensor) -> None:
        swiglu_backward_(u, dout)

    def lora_gradient_(self, u: Tensor, dout: Tensor, operands: LoraOperands) -> LoraGrads:
        return swiglu_lora_backward_(u, dout, operands)


class Geglu(_Activation):
    """gelu(gate) * up; u is [gate | up]."""

    lora_chunks = 2

    def write(self, u: Tensor, out: Tensor) -> None:
        geglu_into(u, out)

    def gradient_(self, u: Tensor, dout: Tensor) -> None:
        geglu_backward_(u, dout)

    def lora_gradient_(self, u: Tensor, dout: Tensor, operands: LoraOperands) -> LoraGrads:
        return geglu_lora_backward_(u, dout, operands)
