"""Soft-capped attention and its gradients in float64, with bounds of the rounding errors of a kernel.

A kernel sums in float32, whose relative rounding error is u = 2^-24: a sum of n terms has an error of at most n u times
the sum of their absolute values. It rounds p, da and the results to the dtype of the tensors (relative error r), and
computes sum(dp p) as sum(g o) from a rounded o. Errors of errors are left out: the last factor covers them.

Legend as in ops/softcap.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.ops.attention import AttentionSpec, Documents, seen_mask

U = 2.0**-24
ROUNDING = {torch.float32: U, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FUNCTIONS = 16 * U  # relative error of exp2, tanh, division and log2 together: a few units in the last place each
HIGHER_ORDER = 1.05


def bounded_attention(
    operands: list[Tensor], spec: AttentionSpec, documents: Documents | None
) -> list[tuple[Tensor, Tensor]]:
    """(value, bound of its error) of o, dq, dk and dv: (B, T, H or G, D) float64 each, of q, k, v and grad."""
    q, k, v, grad = operands
    (_, t, h, d), groups, kind, r = q.shape, k.shape[2], q.dtype, ROUNDING[q.dtype]
    assert spec.softcap is not None
    scale, cap, seen = spec.scale_of(d), spec.softcap, seen_mask(t, spec.window, documents, q.device)
    shared = h // groups
    q, g = (x.double().transpose(1, 2) for x in (q, grad))  # (B, H, T, D)
    k, v = (x.double().repeat_interleave(shared, dim=2).transpose(1, 2) for x in (k, v))
    kt, vt = k.transpose(-1, -2), v.transpose(-1, -2)
    capped = torch.tanh(scale / cap * q @ kt)  # (B, H, T, T)
    p = (cap * capped).masked_fill(~seen, -torch.inf).softmax(dim=-1)
    o = p @ v
    # Errors of the scores, relative ones of p, and those of o.
    s_error = (d + 4) * U * scale * (q.abs() @ kt.abs()) * (1 - capped.square())
    s_error += FUNCTIONS * cap * (capped.abs() if r == U else 1)  # only float32 has a tanh with a relative error
    least = (p > 0) * (2.0**-25 if kind == torch.float16 else 0.0)  # the absolute error of small float16 numbers
    p_error = s_error + ((s_error * p).sum(dim=-1, keepdim=True)) + FUNCTIONS + 2 * U * cap + t * U
    o_error = (p * (p_error + r + t * U) + least) @ v.abs() + r * o.abs()
    dp, delta = g @ vt, (g * o).sum(dim=-1, keepdim=True)
    delta_error = (g.abs() * (o_error + d * U * o.abs())).sum(dim=-1, keepdim=True)
    dp_error = d * U * (g.abs() @ vt.abs())
    slope = 1 - capped.square()
    da = p * (dp - delta) * slope
    da_error = da.abs() * (p_error + FUNCTIONS + r) + p * slope * (
        dp_error + delta_error + U * (dp.abs() + delta.abs())
    )
    da_error += p * (dp - delta).abs() * (2 * capped.abs() * s_error / cap + 4 * U)
    da_error += t * U * da.abs() + least
    dat, pt, n = da.transpose(-1, -2), p.transpose(-1, -2), shared * t * U
    dv, dv_error = pt @ g, (p * (p_error + r + n) + least).transpose(-1, -2) @ g.abs()
    dq, dq_error = scale * da @ k, scale * da_error @ k.abs()
    dk, dk_error = scale * dat @ q, scale * (da_error + n * da.abs()).transpose(-1, -2) @ q.abs()
    dk, dk_error, dv, dv_error = (x.unflatten(1, (groups, shared)).sum(dim=2) for x in (dk, dk_error, dv, dv_error))
    gradients = [(x, error + r * x.abs()) for x, error in ((dq, dq_error), (dk, dk_error), (dv, dv_error))]
    results = [(o, o_error), *gradients]
    return [(x.transpose(1, 2), (HIGHER_ORDER * error + 2.0**-24).transpose(1, 2)) for x, error in results]
