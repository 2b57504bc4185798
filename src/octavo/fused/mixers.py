"""The functions between the two matmuls of a branch: attention and activations. models/fused_blocks.py combines them.

A mixer reads its columns of u (M, inputs) and adds its output (M, outputs) to the input of the outer matmul. In
backward, du is written over u. The output is needed once more, for the LoRA gradients of the outer linear: it is
written over the gradient to it, or is saved (attention), so that no second matrix of either size exists. If the same
pass computes those LoRA gradients (ops/lora_backward.py), the output is not written at all.

Legend: M = B T rows (tokens), H query heads, G key/value heads, D the size of a head, F the width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from octavo.layers.block import attention
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
    copy_into,
    geglu_backward_,
    geglu_into,
    gelu_backward_,
    gelu_into,
    swiglu_backward_,
    swiglu_into,
)
from octavo.ops.rotary import rotate_into


@dataclass
class SavedAttention:
    """Attention's output with the part of the autograd graph that its backward needs."""

    out: Tensor  # (M, H D)
    edges: tuple[GradientEdge, ...]  # of q, k and v
    u: list[Tensor]  # the columns of u with q, k and v, filled in by backward


class Mixer(Protocol):
    """A function of columns of u."""

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
        """Writes du over u. Returns the output, which may be written over dout; with `operands`, the LoRA gradients."""
        ...


@dataclass(frozen=True)
class Attention:
    """Causal attention of rotated queries and keys; u is [q | k | v]. `form`: see ops/rotary.py."""

    heads: int
    key_value_heads: int
    head_size: int
    form: str
    lora_chunks = 0  # its gradient is not elementwise

    @property
    def inputs(self) -> int:
        return (self.heads + 2 * self.key_value_heads) * self.head_size

    @property
    def outputs(self) -> int:
        return self.heads * self.head_size

    def prepare_(self, u: Tensor, context: ForwardContext) -> None:
        if context.rotary is None:
            return
        rotated = u[:, : (self.heads + self.key_value_heads) * self.head_size]  # q and k
        rotate_into(rotated, *context.rotary, self.head_size, self.form, rotated)

    def forward(
        self, u: Tensor, gemm_input: GemmInput, context: ForwardContext, *, save: bool
    ) -> SavedAttention | None:
        self.prepare_(u, context)
        if not save:
            q, k, v = self._heads(u.unflatten(0, (context.batch, context.length)))  # (B, T, H or G, D)
            gemm_input.put(attention(q, k, v, context).flatten(0, 1))
            return None
        saved = self.save(u, context)
        gemm_input.put(saved.out.detach())
        return saved

    def save(self, u: Tensor, context: ForwardContext) -> SavedAttention:
        """Attention under autograd. Its graph saves no views of u; backward gives it u again (`SavedAttention.u`)."""
        columns: list[Tensor] = []
        storage = u.untyped_storage()._cdata  # data_ptr() is 0 for all tensors on the meta device

        def pack(tensor: Tensor) -> Any:
            if tensor.untyped_storage()._cdata != storage:
                return tensor
            return tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else columns[0].as_strided(*packed)

        with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
            anchor = torch.empty(0, device=u.device, requires_grad=True)  # so that autograd runs without a leaf in u
            q, k, v = (
                _Entry.apply(part, anchor)  # type: ignore[no-untyped-call]
                for part in self._heads(u.unflatten(0, (context.batch, context.length)))
            )
            out = attention(q, k, v, context).flatten(0, 1)  # (M, H D)
        return SavedAttention(out, tuple(get_gradient_edge(leaf) for leaf in (q, k, v)), columns)

    def backward_(
        self,
        u: Tensor,
        dout: Tensor,
        saved: SavedAttention | None,
        context: ForwardContext,
        operands: LoraOperands | None = None,
    ) -> Tensor | LoraGrads:
        assert saved is not None
        saved.u.append(u)
        gradients = torch.autograd.grad(saved.out, saved.edges, dout.contiguous())
        dq, dk, dv = (gradient.reshape(len(u), -1) for gradient in gradients)  # (M, H D), (M, G D), (M, G D)
        q, k, v = u.split(self._sizes, dim=1)  # views of u: the gradients replace the values
        if context.rotary is None:
            copy_into(dq, q)
            copy_into(dk, k)
        else:
            rotate_into(dq, *context.rotary, self.head_size, self.form, q, back=True)
            rotate_into(dk, *context.rotary, self.head_size, self.form, k, back=True)
        copy_into(dv, v)
        return saved.out.detach()

    def _heads(self, u: Tensor) -> list[Tensor]:
        """q (B, T, H, D), k and v (B, T, G, D): views of u (B, T, inputs)."""
        return [part.unflatten(-1, (-1, self.head_size)) for part in u.split(self._sizes, dim=-1)]

    @property
    def _sizes(self) -> list[int]:
        return [heads * self.head_size for heads in (self.heads, self.key_value_heads, self.key_value_heads)]


@dataclass(frozen=True)
class _Activation:
    """A function of each token's values, which saves nothing. Subclasses give its three formulas."""

    width: int

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


class Gelu(_Activation):
    """GELU in the tanh form; u is its input."""

    lora_chunks = 1

    @property
    def inputs(self) -> int:
        return self.width

    def write(self, u: Tensor, out: Tensor) -> None:
        gelu_into(u, out)

    def gradient_(self, u: Tensor, dout: Tensor) -> None:
        gelu_backward_(u, dout)

    def lora_gradient_(self, u: Tensor, dout: Tensor, operands: LoraOperands) -> LoraGrads:
        return gelu_lora_backward_(u, dout, operands)


class Swiglu(_Activation):
    """silu(gate) * up; u is [gate | up]."""

    lora_chunks = 2

    @property
    def inputs(self) -> int:
        return 2 * self.width

    def write(self, u: Tensor, out: Tensor) -> None:
        swiglu_into(u, out)

    def gradient_(self, u: Tensor, dout: Tensor) -> None:
        swiglu_backward_(u, dout)

    def lora_gradient_(self, u: Tensor, dout: Tensor, operands: LoraOperands) -> LoraGrads:
        return swiglu_lora_backward_(u, dout, operands)


class Geglu(_Activation):
    """gelu(gate) * up; u is [gate | up]."""

    lora_chunks = 2

    @property
    def inputs(self) -> int:
        return 2 * self.width

    def write(self, u: Tensor, out: Tensor) -> None:
        geglu_into(u, out)

    def gradient_(self, u: Tensor, dout: Tensor) -> None:
        geglu_backward_(u, dout)

    def lora_gradient_(self, u: Tensor, dout: Tensor, operands: LoraOperands) -> LoraGrads:
        return geglu_lora_backward_(u, dout, operands)


class _Entry(torch.autograd.Function):
    """A tensor that enters a graph without being saved by it: gradients are read at its edge."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise AssertionError("torch.autograd.grad stops at the edges")
