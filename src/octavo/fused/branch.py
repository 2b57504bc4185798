"""A residual branch as one autograd function: y = x + W_out mix(W_in norm(x)). It chooses what it saves for backward.

Every block of GPT-J is one of these (the mix is attention and GELU in parallel), every block of Llama two (attention,
then SwiGLU). In general a branch is

    y = r + c post_norm(z)        z = W_out mix(W_in norm(x))

where r is x, or another tensor (GPT-NeoX adds two branches of one x); c is a number (Granite); and each norm may be
absent: OLMo 2 has only the second, Gemma 2 and 3 have both.

Autograd would save the output of every operation. Here forward saves what `Save` says, and backward recomputes the
rest, except the outer matmul, whose output backward does not need: it has 42 % of the weights of GPT-J's block.

    saved       bytes per token and block of GPT-J (2-byte dtype)    recomputed in backward
    ALL         x, u = W_in norm(x), attention's output: 73,728      norm, activations
    ATTENTION   x, attention's output: 16,384                        norm, activations, u
    INPUT       x: 8,192                                             norm, activations, u, attention

and, at every level, the extra columns of both matmuls (LoRA activations and a one for the bias, padded): 224 bytes at
rank 16. x may be offloaded to CPU memory
(`ForwardContext.offload`).

The backward of a post_norm needs z. ALL and ATTENTION save it: d values a branch. INPUT does not, since that would
double its memory; backward then runs the outer matmul again too:

    saved       bytes per token and block of Gemma 3 4B              recomputed in backward
    ALL         x, u, attention's output, z: 73,728                  norms, activations
    ATTENTION   x, attention's output, z: 24,576                     norms, activations, u
    INPUT       x: 10,240                                            norms, activations, u, attention, z

A mix has one or two mixers (fused/mixers.py): attention or an activation, each a function of some columns of u.

Derivation, with n = norm(x), u = W_in n, m = mix(u), z = W_out m, where W_in and W_out include LoRA and bias:

    dz = c post_norm'(z)^T dy      dm = W_out^T dz      du = mix'(u)^T dm      dn = W_in^T du      dx = norm'(x)^T dn

plus dr = dy, which is added to dx if r is x; and the gradients of LoRA and bias of W_out from (dz, m), of W_in from
(du, n), as in layers/fused_linear.py. The mix writes du over u, and m, which the gradients of W_out need once more,
over dm: no second matrix of either size exists.

Legend: B sequences, T positions, M = B T rows, d the width of the model, C extra columns (layers/fused_linear.py); U
the outputs of W_in, the inputs of all mixers side by side; K the outputs of all mixers, the parts of the input of W_out
(layers/gemm_input.py).
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
from octavo.layers.fused_linear import EarlyGrads, FusedLinear, Seeds
from octavo.layers.gemm_input import GemmInput
from octavo.layers.norm import LayerNorm, NormSpec, RmsNorm
from octavo.ops.lora_backward import LoraGrads, LoraOperands


@dataclass(frozen=True)
class Branch:
    """The parts of a branch. The mixers read u from left to right; each adds a part to the input of `outer`."""

    norm: NormSpec | None
    inner: FusedLinear
    mixers: Sequence[Mixer]
    outer: FusedLinear
    post_norm: NormSpec | None = None
    scale: float = 1.0

    @property
    def trained(self) -> list[Tensor]:
        """The tensors with a gradient, in the order of backward."""
        norms = [[] if norm is None else norm.trained for norm in (self.norm, self.post_norm)]
        mixers = [tensor for mixer in self.mixers for tensor in mixer.trained]
        return [*norms[0], *self.inner.trained, *self.outer.trained, *mixers, *norms[1]]

    @property
    def is_plain_sum(self) -> bool:
        """Whether y = r + z, so that the outer matmul adds r."""
        return self.post_norm is None and self.scale == 1

    def columns_of_u(self, u: Tensor) -> list[Tensor]:
        """The columns of u (M, U) that each mixer reads, views."""
        return list(u.split([mixer.inputs for mixer in self.mixers], dim=1))


def residual_branch(
    x: Tensor,
    norm: LayerNorm | RmsNorm | None,
    inner: FrozenLinear,
    mixers: Sequence[Mixer],
    outer: Sequence[FrozenLinear],
    context: ForwardContext,
    *,
    residual: Tensor | None = None,
    post_norm: LayerNorm | RmsNorm | None = None,
    scale: float = 1.0,
) -> Tensor:
    """residual + scale * post_norm(sum of outer_i(mixer_i(inner(norm(x))))), (B, T, d).

    Each mixer reads its columns of inner's output. `residual` is by default x (B, T, d). A norm may be None.
    """
    first = FusedLinear((inner.spec(context.matmul8.get(inner.path)),))
    second = FusedLinear(tuple(layer.spec(context.matmul8.get(layer.path)) for layer in outer))
    norms = [None if each is None else each.spec() for each in (norm, post_norm)]
    return branch(x, Branch(norms[0], first, mixers, second, norms[1], scale), context, residual)


def branch(x: Tensor, this: Branch, context: ForwardContext, residual: Tensor | None = None) -> Tensor:
    """(B, T, d) -> (B, T, d)."""
    save = context.save if torch.is_grad_enabled() else None
    y: Tensor = _Branch.apply(x, residual, this, context, save, *this.trained)  # type: ignore[no-untyped-call]
    return y


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        this: Branch,
        context: ForwardContext,
        save: Save | None,
        *trained: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (M, d)
        seeds = this.inner.dropout_seeds(context.dropout), this.outer.dropout_seeds(context.dropout)
        gemm_input = _norm_input(rows, this, seeds[0])  # (M, d + C)
        u, inner_extra = this.inner.matmul(gemm_input), gemm_input.detach_extra()  # (M, U), (M, C)
        del gemm_input  # before the next one is allocated
        gemm_input = this.outer.gemm_input(len(rows), rows)  # (M, K + C), K the outputs of all mixers
        saves_attention = save is not None and save > Save.INPUT
        saved = [
            mixer.forward(part, gemm_input, context, save=saves_attention)
            for mixer, part in zip(this.mixers, this.columns_of_u(u), strict=True)
        ]
        kept = u if save is Save.ALL else None
        del u  # freed before the outer matmul, if it is not kept
        this.outer.complete_(gemm_input, seeds[1])
        added = rows if residual is None else residual.reshape(rows.shape)  # (M, d)
        z = None
        if this.is_plain_sum:
            y = this.outer.matmul(gemm_input, residual=added)  # (M, d)
        else:
            z = this.outer.matmul(gemm_input)  # (M, d)
            y = _add(added, z, this, keeps_z=saves_attention)  # (M, d)
        if save is not None:
            # A stored x is freed when backward takes it, so without a backward it is not stored.
            offloads = context.offload is not None and any(ctx.needs_input_grad)
            if offloads and context.offload is not None:
                context.offload.put(rows)
            ctx.save_for_backward(*(() if offloads else (rows,)), inner_extra, gemm_input.detach_extra())
            ctx.this, ctx.context, ctx.seeds, ctx.shape = this, context, seeds, x.shape
            ctx.has_residual = residual is not None
            ctx.saved_attention = saved if saves_attention else None
            ctx.u = kept
            ctx.z = z if saves_attention and this.post_norm is not None else None
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        this, context, (inner_seeds, outer_seeds) = ctx.this, ctx.context, ctx.seeds
        *saved_rows, inner_extra, outer_extra = ctx.saved_tensors
        rows = saved_rows[0] if saved_rows else context.offload.take()  # (M, d)
        dy = grad.reshape(rows.shape)  # (M, d)
        u, saved_attention, z = ctx.u, ctx.saved_attention, ctx.z
        ctx.u = ctx.saved_attention = ctx.z = None  # freed as soon as they are used, not with the whole graph
        if u is None:
            u = this.inner.matmul(_norm_input(rows, this, inner_extra))  # (M, U)
            if this.post_norm is not None and z is None:
                saved_attention, z = _recompute_z(u, this, context, outer_extra)
            else:
                for mixer, part in zip(this.mixers, this.columns_of_u(u), strict=True):
                    mixer.prepare_(part, context)
        dz, post_gradients = _grad_z(dy, z, this)
        del z
        wants_dx, wants_dresidual = ctx.needs_input_grad[:2]
        wants_dn = wants_dx or (this.norm is not None and any(tensor.requires_grad for tensor in this.norm.trained))
        # An exact matmul for dn gives dt as well (layers/fused_linear.py); else the activation's backward computes it.
        lora_input = LoraInput(inner_extra, wants_dt=(this.inner.use_8bit and this.inner.backward_8bit) or not wants_dn)
        du, early, outer_gradients = _outer_backward(
            dz, u, saved_attention, this, context, outer_seeds, outer_extra, lora_input
        )
        dn = None
        if wants_dn:
            (dn,), dt = this.inner.grad_input(du, inner_seeds, early=early)  # (M, d), (M, C)
        else:
            dt = this.inner.grad_extra(du, early)  # (M, C)
        normed = rows
        if this.norm is not None:
            normed = torch.empty_like(rows)  # (M, d), recomputed: cheaper than saving it
            this.norm.write(rows, normed)
        inner_gradients = this.inner.grad_trained(du, [normed], inner_extra, dt, inner_seeds, early)
        norm_gradients = [] if this.norm is None else this.norm.grad_trained(rows, dn)
        dx = None
        if wants_dx:
            assert dn is not None
            dx = _grad_x(rows, dn, None if ctx.has_residual else dy, this.norm).view(ctx.shape)  # (B, T, d)
        trained = *norm_gradients, *inner_gradients, *outer_gradients, *post_gradients
        return dx, grad if wants_dresidual else None, None, None, None, *trained


def _norm_input(rows: Tensor, this: Branch, extra_or_seeds: Seeds | Tensor) -> GemmInput:
    """The input of the inner matmul (M, d + C), from saved extra columns or, in forward, from dropout seeds."""
    gemm_input = this.inner.gemm_input(len(rows), rows)
    if this.norm is None:
        gemm_input.put(rows)
    else:
        this.norm.write(rows, gemm_input.add())
    if isinstance(extra_or_seeds, Tensor):
        gemm_input.extra.copy_(extra_or_seeds)
    else:
        this.inner.complete_(gemm_input, extra_or_seeds)
    return gemm_input


def _add(residual: Tensor, z: Tensor, this: Branch, *, keeps_z: bool) -> Tensor:
    """residual + scale * post_norm(z), (M, d), in one pass. z is overwritten, unless backward of post_norm reads it."""
    if this.post_norm is None:
        return torch.add(residual, z, alpha=this.scale, out=z)
    out = torch.empty_like(z) if keeps_z else z  # (M, d)
    this.post_norm.write_sum(z, residual, out, scale=this.scale)
    return out


def _recompute_z(
    u: Tensor, this: Branch, context: ForwardContext, extra: Tensor
) -> tuple[list[SavedAttention | None], Tensor]:
    """(what backward needs of attention, z (M, d)) from a recomputed u, which is prepared as in forward."""
    gemm_input = this.outer.gemm_input(len(u), u)  # (M, K + C)
    saved = [
        mixer.forward(part, gemm_input, context, save=True)
        for mixer, part in zip(this.mixers, this.columns_of_u(u), strict=True)
    ]
    gemm_input.extra.copy_(extra)
    return saved, this.outer.matmul(gemm_input)


def _grad_z(dy: Tensor, z: Tensor | None, this: Branch) -> tuple[Tensor, list[Tensor | None]]:
    """(the gradient to z (M, d), written over z; the gradients of post_norm)."""
    if this.post_norm is None:
        return dy if this.scale == 1 else dy * this.scale, []
    assert z is not None
    gradients = this.post_norm.grad_trained(z, dy, scale=this.scale)
    this.post_norm.backward(z, dy, None, z, scale=this.scale)
    return z, gradients


def _grad_x(rows: Tensor, dn: Tensor, dy: Tensor | None, norm: NormSpec | None) -> Tensor:
    """The gradient to x (M, d); with dy, which x as the residual receives."""
    if norm is None:
        return dn if dy is None else dy + dn
    dx = torch.empty_like(rows)
    norm.backward(rows, dn, dy, dx)
    return dx


def _outer_backward(
    dy: Tensor,
    u: Tensor,
    saved_attention: list[SavedAttention | None] | None,
    this: Branch,
    context: ForwardContext,
    seeds: Seeds,
    extra: Tensor,
    lora_input: LoraInput,
) -> tuple[Tensor, EarlyGrads | None, list[Tensor | None]]:
    """(du, written over u; LoRA gradients of the inner linear computed on the way; gradients of the outer linear and of
    the mixers)."""
    columns = this.columns_of_u(u)  # views: what a mixer writes there is written to u
    if saved_attention is None:
        saved_attention = [mixer.save(part, context) for mixer, part in zip(this.mixers, columns, strict=True)]
    dmixed, dt = this.outer.grad_input(dy, seeds)  # a list of (M, outputs of a mixer); (M, C)
    operands: list[LoraOperands | None] = [None] * len(columns)
    start, operands[-1] = lora_operands(this.mixers[-1], this.inner, this.outer, lora_input, dt)
    # The outputs of the mixers; of the last one its LoRA gradients instead, if it has computed them in its pass.
    mixed: list[Tensor | LoraGrads] = [
        mixer.backward_(part, dout, saved, context, its_operands)
        for mixer, part, dout, saved, its_operands in zip(
            this.mixers, columns, dmixed, saved_attention, operands, strict=True
        )
    ]
    early = EarlyGrads(start, mixed[-1]) if isinstance(mixed[-1], LoraGrads) else None
    del dmixed  # the mixers have written their outputs over it
    gradients = this.outer.grad_trained(dy, mixed, extra, dt, seeds)
    return u, early, gradients + [each for saved in saved_attention if saved is not None for each in saved.grad_trained]
