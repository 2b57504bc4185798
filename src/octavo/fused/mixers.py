"""The pieces between the two products of a branch: attention, GELU, SwiGLU. Families list theirs.

A piece reads its columns of u (M, inputs) and adds its output (M, outputs) to the input of the outer product. In
backward the gradient is written over u, and the output, of which the outer product's pairs learn, over the gradient
that came or where it stands already: so no second matrix of either size is needed. Or it is not written at all, where
pairs learn in the same pass (ops/lora_backward.py).

Legend: M = B T rows (tokens), H query heads, G key/value heads, D the size of a head, F the width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from octavo.layers.context import ForwardContext
from octavo.layers.gemm_input import GemmInput
from octavo.ops.attention import causal_attention, rotate_into
from octavo.ops.lora_backward import LoraGrads, LoraOperands, gelu_lora_backward_, swiglu_lora_backward_
from octavo.ops.pointwise import copy_into, gelu_backward_, gelu_into, swiglu_backward_, swiglu_into


@dataclass
class SavedAttention:
    """Attention's output with the part of the graph that its backward needs."""

    out: Tensor
    edges: tuple[GradientEdge, ...]
    u: list[Tensor]  # the columns that hold q, k and v when backward comes


class Mixer(Protocol):
    """The members of a piece."""

    @property
    def inputs(self) -> int: ...

    @property
    def outputs(self) -> int: ...

    def forward(
        self, u: Tensor, gemm_input: GemmInput, context: ForwardContext, *, hold: bool
    ) -> SavedAttention | None:
        """Prepares u and adds the output to `gemm_input`. What backward needs besides u, if it is to `hold` that."""
        ...

    def prepare_(self, u: Tensor, context: ForwardContext) -> None:
        """Does in place what `forward` did to u, to a u that was computed again."""
        ...

    def hold(self, u: Tensor, context: ForwardContext) -> SavedAttention | None:
        """What backward needs besides a prepared u."""
        ...

    @property
    def lora_chunks(self) -> int:
        """Of how many parts of u pairs can learn while the gradient is taken, each as wide as the output."""
        ...

    def backward_(
        self,
        u: Tensor,
        dout: Tensor,
        held: SavedAttention | None,
        context: ForwardContext,
        operands: LoraOperands | None = None,
    ) -> Tensor | LoraGrads:
        """Writes the gradient to u over u. The output once more, for which dout may be used up; or, with pairs on its
        sides, what these learn."""
        ...


@dataclass(frozen=True)
class Attention:
    """Causal attention of rotated queries and keys; u is [q | k | v]. `form` is that of the rotation."""

    heads: int
    groups: int
    head_size: int
    form: str
    lora_chunks = 0  # its gradient is no function of single numbers

    @property
    def inputs(self) -> int:
        return (self.heads + 2 * self.groups) * self.head_size

    @property
    def outputs(self) -> int:
        return self.heads * self.head_size

    def prepare_(self, u: Tensor, context: ForwardContext) -> None:
        rotated = u[:, : (self.heads + self.groups) * self.head_size]  # q and k
        rotate_into(rotated, *context.rotary, self.head_size, self.form, rotated)

    def forward(
        self, u: Tensor, gemm_input: GemmInput, context: ForwardContext, *, hold: bool
    ) -> SavedAttention | None:
        self.prepare_(u, context)
        if not hold:
            q, k, v = self._heads(u.unflatten(0, (context.batch, context.length)))
            gemm_input.put(causal_attention(q, k, v, documents=context.documents).reshape(len(u), -1))
            return None
        held = self.hold(u, context)
        gemm_input.put(held.out.detach())
        return held

    def hold(self, u: Tensor, context: ForwardContext) -> SavedAttention:
        """Attention under autograd; what its graph would keep of u is looked up in u again when backward comes."""
        place: list[Tensor] = []
        storage = u.untyped_storage()._cdata  # an address of data would be 0 for all on the meta device

        def pack(tensor: Tensor) -> Any:
            if tensor.untyped_storage()._cdata != storage:
                return tensor
            return tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else place[0].as_strided(*packed)

        with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
            anchor = torch.empty(0, device=u.device, requires_grad=True)
            leaves = [
                _Entry.apply(part, anchor)  # type: ignore[no-untyped-call]
                for part in self._heads(u.unflatten(0, (context.batch, context.length)))
            ]
            out = causal_attention(*leaves, documents=context.documents).reshape(len(u), -1)
        return SavedAttention(out, tuple(get_gradient_edge(leaf) for leaf in leaves), place)

    def backward_(
        self,
        u: Tensor,
        dout: Tensor,
        held: SavedAttention | None,
        context: ForwardContext,
        operands: LoraOperands | None = None,
    ) -> Tensor | LoraGrads:
        assert held is not None
        held.u.append(u)
        gradients = torch.autograd.grad(held.out, held.edges, dout.contiguous())
        dq, dk, dv = (gradient.reshape(len(u), -1) for gradient in gradients)
        own_q, own_k, own_v = u.split(self._sizes, dim=1)
        rotate_into(dq, *context.rotary, self.head_size, self.form, own_q, back=True)
        rotate_into(dk, *context.rotary, self.head_size, self.form, own_k, back=True)
        copy_into(dv, own_v)
        return held.out.detach()

    def _heads(self, u: Tensor) -> list[Tensor]:
        """q (B, T, H, D), k and v (B, T, G, D): views of u (B, T, inputs)."""
        return [part.unflatten(-1, (-1, self.head_size)) for part in u.split(self._sizes, dim=-1)]

    @property
    def _sizes(self) -> list[int]:
        return [heads * self.head_size for heads in (self.heads, self.groups, self.groups)]


@dataclass(frozen=True)
class _Activation:
    """A function of each token's numbers, which keeps nothing."""

    width: int

    @property
    def outputs(self) -> int:
        return self.width

    def prepare_(self, u: Tensor, context: ForwardContext) -> None:
        return

    def hold(self, u: Tensor, context: ForwardContext) -> None:
        return

    def forward(self, u: Tensor, gemm_input: GemmInput, context: ForwardContext, *, hold: bool) -> None:
        self.write(u, gemm_input.add())

    def write(self, u: Tensor, out: Tensor) -> None:
        raise NotImplementedError


class Gelu(_Activation):
    """GPT-J's activation, in the tanh form."""

    lora_chunks = 1

    @property
    def inputs(self) -> int:
        return self.width

    def write(self, u: Tensor, out: Tensor) -> None:
        gelu_into(u, out)

    def backward_(
        self,
        u: Tensor,
        dout: Tensor,
        held: SavedAttention | None,
        context: ForwardContext,
        operands: LoraOperands | None = None,
    ) -> Tensor | LoraGrads:
        if operands is not None:
            return gelu_lora_backward_(u, dout, operands)
        gelu_backward_(u, dout)
        return dout


class Swiglu(_Activation):
    """silu(gate) * up; u is [gate | up]."""

    lora_chunks = 2

    @property
    def inputs(self) -> int:
        return 2 * self.width

    def write(self, u: Tensor, out: Tensor) -> None:
        swiglu_into(u, out)

    def backward_(
        self,
        u: Tensor,
        dout: Tensor,
        held: SavedAttention | None,
        context: ForwardContext,
        operands: LoraOperands | None = None,
    ) -> Tensor | LoraGrads:
        if operands is not None:
            return swiglu_lora_backward_(u, dout, operands)
        swiglu_backward_(u, dout)
        return dout


class _Entry(torch.autograd.Function):
    """A tensor that enters a graph without being kept by it: gradients are read at its edge."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise AssertionError("gradients are read before they get here")
