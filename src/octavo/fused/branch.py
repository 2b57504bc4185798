"""A residual branch: y = x + W_out mix(W_in norm(x)), with a backward that says what it keeps.

Every block of the families here is one or two of these. GPT-J's is one, whose mix is attention beside an MLP's
activation; Llama's are attention, then the gated MLP. Autograd would keep the output of every step. Here forward
keeps what a `Save` names and backward computes the rest again, but never a product whose output it does not need:
the outer one, 42 % of GPT-J's numbers, is computed once whatever is kept.

    kept        bytes a token and layer of GPT-J (2-byte type)      computed again in backward
    ALL         x, u = W_in norm(x), attention's output: 73,728     norm, activations
    ATTENTION   x, attention's output: 16,384                       and u
    INPUT       x: 8,192                                            and attention

and, always, what low-rank pairs made of the inputs of both products: 224 bytes at rank 16. x may wait in the host's
memory instead (`Context.away`).

Legend: M rows (tokens), d the width of the model; u is (M, U), what the pieces of the mix read, side by side; the
mix gives (M, sum of their outputs), which a piece adds to the input of W_out (layers/gemm_input.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from octavo.fused.lora_operands import LoraInput, lora_operands
from octavo.fused.mixers import Mixer, SavedAttention
from octavo.layers.context import ForwardContext, Save
from octavo.layers.frozen import FrozenLinear
from octavo.layers.fused_linear import EarlyGrads, FusedLinear
from octavo.layers.gemm_input import GemmInput
from octavo.layers.norm import LayerNorm, NormSpec, RmsNorm
from octavo.ops.lora_backward import LoraGrads, LoraOperands
from octavo.ops.pointwise import norm_backward_into, norm_into, norm_parameters_backward


@dataclass(frozen=True)
class Branch:
    """What a branch computes. `pieces` read u from left to right, and each adds a part to the input of `outer`."""

    norm: NormSpec
    inner: FusedLinear
    mixers: Sequence[Mixer]
    outer: FusedLinear

    def columns_of_u(self, u: Tensor) -> list[Tensor]:
        """What each piece reads of u (M, U)."""
        return list(u.split([mixer.inputs for mixer in self.mixers], dim=1))


def residual_branch(
    x: Tensor,
    norm: LayerNorm | RmsNorm,
    inner: FrozenLinear,
    mixers: Sequence[Mixer],
    outer: Sequence[FrozenLinear],
    ctx: ForwardContext,
) -> Tensor:
    """x (B, T, d) + sum of outer_i(mixer_i(inner(norm(x)))): each mixer reads its columns of inner's output."""
    parts = FusedLinear((inner.frozen(),)), FusedLinear(tuple(layer.frozen() for layer in outer))
    return branch(x, Branch(norm.spec(), parts[0], mixers, parts[1]), ctx)


def branch(x: Tensor, this: Branch, context: ForwardContext) -> Tensor:
    """(B, T, d) -> (B, T, d)."""
    kept = context.save if torch.is_grad_enabled() else None
    trained = [*this.norm.trained, *this.inner.trained, *this.outer.trained]
    y: Tensor = _Branch.apply(x, this, context, kept, *trained)  # type: ignore[no-untyped-call]
    return y


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, this: Branch, context: ForwardContext, save: Save | None, *trained: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        dropout_seeds = this.inner.dropout_seeds(), this.outer.dropout_seeds()
        gemm_input = _normed(rows, this, dropout_seeds[0])
        u, inner = this.inner.product(gemm_input), gemm_input.detach_extra()
        del gemm_input  # before there is another one
        gemm_input = this.outer.gemm_input(len(rows), rows)
        hold = save is not None and save > Save.INPUT
        held = [
            mixer.forward(own, gemm_input, context, hold=hold)
            for mixer, own in zip(this.mixers, this.columns_of_u(u), strict=True)
        ]
        this.outer.complete_(gemm_input, dropout_seeds[1])
        y = this.outer.product(gemm_input, residual=rows)
        if save is not None:
            put_away = context.offload is not None and any(ctx.needs_input_grad)  # else no backward would take it back
            if put_away and context.offload is not None:
                context.offload.put(rows)
            ctx.save_for_backward(*(() if put_away else (rows,)), inner, gemm_input.detach_extra())
            ctx.this, ctx.context, ctx.dropout_seeds, ctx.shape = this, context, dropout_seeds, x.shape
            ctx.held = held if hold else None
            ctx.u = u if save is Save.ALL else None
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        this, context, (inner_seeds, outer_seeds) = ctx.this, ctx.context, ctx.dropout_seeds
        *kept, inner, outer_inner = ctx.saved_tensors
        rows = kept[0] if kept else context.offload.take()
        dy = grad.reshape(rows.shape)
        u, held = ctx.u, ctx.held
        ctx.u = ctx.held = None  # what is used up is freed at once, not when the whole graph is
        if u is None:
            u = this.inner.product(_normed(rows, this, inner))
            for mixer, own in zip(this.mixers, this.columns_of_u(u), strict=True):
                mixer.prepare_(own, context)
        wanted = ctx.needs_input_grad
        norm_trained = [tensor.requires_grad for tensor in this.norm.trained]
        to_norm = wanted[0] or any(norm_trained)
        # An exact product with the gradient gives that of its pairs besides (layers/fused_linear.py).
        lora_input = LoraInput(inner, to_pairs=this.inner.use_8bit or not to_norm)
        du, known, outer_gradients = _outer_backward(dy, u, held, this, context, outer_seeds, outer_inner, lora_input)
        dn = None
        if to_norm:
            (dn,), dt = this.inner.grad_input(du, inner_seeds, known=known)
        else:
            dt = this.inner.grad_t(du, known)
        normed = torch.empty_like(rows)
        norm_into(rows, this.norm.weight, this.norm.bias, this.norm.eps, normed)
        inner_gradients = this.inner.grad_trained(du, [normed], inner, dt, inner_seeds, known)
        centred = this.norm.bias is not None
        norm_gradients: list[Tensor | None] = [None] * len(norm_trained)
        if any(norm_trained):
            assert dn is not None
            both = norm_parameters_backward(rows, this.norm.eps, dn, centred=centred)
            norm_gradients = [g if want else None for g, want in zip(both, norm_trained, strict=False)]
        dx = None
        if wanted[0]:
            assert dn is not None
            dx = torch.empty_like(dy)
            norm_backward_into(rows, this.norm.weight, this.norm.eps, dn, dy, dx, centred=centred)
            dx = dx.view(ctx.shape)
        return dx, None, None, None, *norm_gradients, *inner_gradients, *outer_gradients


def _normed(rows: Tensor, this: Branch, completion: Sequence[int] | Tensor) -> GemmInput:
    """The completed input of the inner product, by seeds or with what they made before."""
    gemm_input = this.inner.gemm_input(len(rows), rows)
    norm_into(rows, this.norm.weight, this.norm.bias, this.norm.eps, gemm_input.add())
    if isinstance(completion, Tensor):
        gemm_input.extra.copy_(completion)
    else:
        this.inner.complete_(gemm_input, completion)
    return gemm_input


def _outer_backward(
    dy: Tensor,
    u: Tensor,
    held: list[SavedAttention | None] | None,
    this: Branch,
    context: ForwardContext,
    dropout_seeds: Sequence[int],
    inner: Tensor,
    lora_input: LoraInput,
) -> tuple[Tensor, EarlyGrads | None, list[Tensor | None]]:
    """(gradient to u, written over u; what pairs of the inner product have learnt; gradients of what is trained in the
    outer product)."""
    columns = this.columns_of_u(u)
    if held is None:
        held = [mixer.hold(own, context) for mixer, own in zip(this.mixers, columns, strict=True)]
    dmixed, dt = this.outer.grad_input(dy, dropout_seeds)
    operands: list[LoraOperands | None] = [None] * len(columns)
    start, operands[-1] = lora_operands(this.mixers[-1], this.inner, this.outer, lora_input, dt)
    mixed = [
        mixer.backward_(own, dout, one, context, its)
        for mixer, own, dout, one, its in zip(this.mixers, columns, dmixed, held, operands, strict=True)
    ]
    known = EarlyGrads(start, mixed[-1]) if isinstance(mixed[-1], LoraGrads) else None
    del dmixed  # used up
    return u, known, this.outer.grad_trained(dy, mixed, inner, dt, dropout_seeds)
