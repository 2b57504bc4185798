"""Attention as a mixer of a branch: causal attention of rotated queries and keys; u is [q | k | v].

With norms of q and k (Qwen3 and Gemma 3: of each head; OLMo 2: of all heads together) attention reads

    q' = rotate(norm(q))      and in backward      dq = norm'(q)^T rotate^T dq'

and k' alike. Backward needs q: a rotation can be undone, a norm cannot, since q' does not have the length of q. Without
norms q' is written over q in u, with the rotation undone on the gradient alone. With norms u keeps q and k, which are
saved or recomputed with u as before; q' and k' are temporary matrices, and backward computes them again: one pass over
(H + G) D values of a token, where saving them too would cost 2 (H + G) D bytes of each token and block.

Legend: B sequences, T positions, M = B T rows, H query heads, G key/value heads, D the size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from octavo.fused.mixers import SavedAttention
from octavo.layers.block import attention
from octavo.layers.context import ForwardContext
from octavo.layers.gemm_input import GemmInput
from octavo.layers.norm import NormSpec
from octavo.ops.lora_backward import LoraGrads, LoraOperands
from octavo.ops.pointwise import copy_into
from octavo.ops.rotary import Table, norm_rotate_backward_into, norm_rotate_into, rotate_into


@dataclass(frozen=True)
class Attention:
    """`form`: see ops/rotary.py. `norms`: of q and of k, each of groups of columns as wide as its weight."""

    heads: int
    key_value_heads: int
    head_size: int
    form: str
    norms: tuple[NormSpec, NormSpec] | None = None
    lora_chunks = 0  # its gradient is not elementwise

    @property
    def trained(self) -> list[Tensor]:
        return [tensor for norm in self.norms or () for tensor in norm.trained]

    @property
    def inputs(self) -> int:
        return sum(self._sizes)

    @property
    def outputs(self) -> int:
        return self.heads * self.head_size

    def prepare_(self, u: Tensor, context: ForwardContext) -> None:
        if self.norms is None:
            rotated = u[:, : sum(self._sizes[:2])]  # q and k
            self._rotate(rotated, rotated, context)

    def forward(
        self, u: Tensor, gemm_input: GemmInput, context: ForwardContext, *, save: bool
    ) -> SavedAttention | None:
        self.prepare_(u, context)
        if not save:
            q, k, v = self._heads(self._sources(u, context), context)  # (B, T, H or G, D)
            gemm_input.put(attention(q, k, v, context).flatten(0, 1))
            return None
        saved = self.save(u, context)
        saved.sources.clear()
        gemm_input.put(saved.out.detach())
        return saved

    def save(self, u: Tensor, context: ForwardContext) -> SavedAttention:
        """Attention under autograd. Its graph saves no views of `sources`; backward takes them from that list."""
        sources = self._sources(u, context)
        storages = [x.untyped_storage()._cdata for x in sources]  # data_ptr() is 0 for all tensors on the meta device

        def pack(tensor: Tensor) -> Any:
            storage = tensor.untyped_storage()._cdata
            if storage not in storages:
                return tensor
            return storages.index(storage), tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            index, size, stride, offset = packed
            view: Tensor = sources[index].as_strided(size, stride, offset)
            return view

        with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
            anchor = torch.empty(0, device=u.device, requires_grad=True)  # so that autograd runs without a leaf in u
            q, k, v = (
                _Entry.apply(part, anchor)  # type: ignore[no-untyped-call]
                for part in self._heads(sources, context)
            )
            out = attention(q, k, v, context).flatten(0, 1)  # (M, H D)
        return SavedAttention(out, tuple(get_gradient_edge(leaf) for leaf in (q, k, v)), sources)

    def backward_(
        self,
        u: Tensor,
        dout: Tensor,
        saved: SavedAttention | None,
        context: ForwardContext,
        operands: LoraOperands | None = None,
    ) -> Tensor | LoraGrads:
        assert saved is not None
        if not saved.sources:
            saved.sources.extend(self._sources(u, context))
        gradients = torch.autograd.grad(saved.out, saved.edges, dout.contiguous())
        *dqk, dv = (gradient.reshape(len(u), -1) for gradient in gradients)  # (M, H D), (M, G D), (M, G D)
        *qk, v = u.split(self._sizes, dim=1)  # views of u: the gradients replace the values
        if self.norms is None:
            for gradient, x in zip(dqk, qk, strict=True):
                self._rotate(gradient, x, context, back=True)
        else:
            buffers = saved.sources[0].split(self._sizes[:2], dim=1)  # q' and k' are not needed any more
            for gradient, x, norm, dn in zip(dqk, qk, self.norms, buffers, strict=True):
                saved.grad_trained += self._norm_rotate_backward_(norm, x, gradient, dn, context)
        copy_into(dv, v)
        return saved.out.detach()

    def _sources(self, u: Tensor, context: ForwardContext) -> list[Tensor]:
        """The matrices of q, k and v as attention reads them: [a prepared u]; with norms [(M, (H + G) D), u]."""
        if self.norms is None:
            return [u]
        sizes = self._sizes[:2]
        qk = u.new_empty(len(u), sum(sizes))  # (M, (H + G) D)
        for norm, x, out in zip(self.norms, u.split(self._sizes, dim=1), qk.split(sizes, dim=1), strict=False):
            self._norm_rotate(norm, x, out, context)
        return [qk, u]

    def _norm_rotate(self, norm: NormSpec, x: Tensor, out: Tensor, context: ForwardContext) -> None:
        """out = rotate(norm(x)), both (M, n D)."""
        if (table := self._table_of_one_pass(norm, context)) is None:
            norm.write(x, out)
            self._rotate(out, out, context)
            return
        norm_rotate_into(
            x, norm.weight, norm.eps, *table, self.head_size, self.form, out,
            zero_centred_weight=norm.zero_centred_weight,
        )  # fmt: skip

    def _norm_rotate_backward_(
        self, norm: NormSpec, x: Tensor, gradient: Tensor, dn: Tensor, context: ForwardContext
    ) -> list[Tensor | None]:
        """Writes the gradient to x over x, from that to rotate(norm(x)), all (M, n D). Returns those of the norm's
        parameters, which read the gradient to norm(x): then it is written to dn, in a pass of its own."""
        table = self._table_of_one_pass(norm, context)
        if table is None or any(tensor.requires_grad for tensor in norm.trained):
            self._rotate(gradient, dn, context, back=True)
            gradients = norm.grad_trained(x, dn)
            norm.backward(x, dn, None, x)
            return gradients
        norm_rotate_backward_into(
            x, norm.weight, norm.eps, *table, self.head_size, self.form, gradient, x,
            zero_centred_weight=norm.zero_centred_weight,
        )  # fmt: skip
        return norm.grad_trained(x, None)

    def _table_of_one_pass(self, norm: NormSpec, context: ForwardContext) -> Table | None:
        """The rotary table if one kernel does the norm and the rotation: an RMSNorm, and heads rotated as a whole."""
        table = context.rotary
        return table if table is not None and not norm.centred and 2 * table[0].shape[-1] == self.head_size else None

    def _heads(self, sources: list[Tensor], context: ForwardContext) -> list[Tensor]:
        """q (B, T, H, D), k and v (B, T, G, D): views of `sources`."""
        q, k = sources[0].split(self._sizes, dim=1)[:2] if len(sources) == 1 else sources[0].split(self._sizes[:2], 1)
        v = sources[-1][:, -self._sizes[2] :]
        shape = context.batch, context.length, -1, self.head_size
        return [x.unflatten(0, shape[:2]).unflatten(-1, shape[2:]) for x in (q, k, v)]

    def _rotate(self, x: Tensor, out: Tensor, context: ForwardContext, *, back: bool = False) -> None:
        """out = the heads of x (M, n D) with the layer's rotary positions, if it has them; out may be x.

        `back`: the transpose, for gradients.
        """
        if context.rotary is not None:
            rotate_into(x, *context.rotary, self.head_size, self.form, out, back=back)
        elif out is not x:
            copy_into(x, out)

    @property
    def _sizes(self) -> list[int]:
        return [heads * self.head_size for heads in (self.heads, self.key_value_heads, self.key_value_heads)]


class _Entry(torch.autograd.Function):
    """A tensor that enters a graph without being saved by it: gradients are read at its edge."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise AssertionError("torch.autograd.grad stops at the edges")
