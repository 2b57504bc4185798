"""Rotary position embeddings (RoPE, arXiv 2104.09864).

Legend: B rows of a batch, T positions, H heads, D the size of a head, R the rotated elements of a head, M = B T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.hardware.capabilities import capabilities_of
from octavo.ops import tiles
from octavo.ops.pointwise import norm_backward_into, norm_into
from octavo.ops.tiles import Phase
from octavo.runtime.dispatch import kernel

ROTATE_INTERLEAVED, ROTATE_HALF = "interleaved", "half"  # pairs (2i, 2i+1) of GPT-J, pairs (i, i + D/2) of Llama

Table = tuple[Tensor, Tensor]


def rotary_table(positions: Tensor, frequencies: Tensor) -> Table:
    """(cos, sin), each (B, T, 1, R/2) float32, of positions (B, T) times R/2 frequencies."""
    angles = positions.float()[..., None] * frequencies.float()  # (B, T, R/2)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def cached_rotary_table(positions: Tensor, frequencies: Tensor, *, phase: Phase) -> Table:
    """`rotary_table` of new positions over a cache; on a CPU in tiles, for batch invariance (ops/tiles.py)."""
    if capabilities_of(positions.device).is_gpu:
        return rotary_table(positions, frequencies)
    dim = 1 if phase is Phase.PREFILL else 0
    parts = positions.split(tiles.PREFILL_TILE if dim else 1, dim=dim)
    # Frequencies (B, 1, R/2) of each row are split with the rows.
    of_parts = frequencies.split(1) if dim == 0 and frequencies.ndim == 3 else [frequencies] * len(parts)
    tables = [rotary_table(part, each) for part, each in zip(parts, of_parts, strict=True)]
    cos, sin = (torch.cat(each, dim=dim) for each in zip(*tables, strict=True))
    return cos, sin


def rotate_interleaved(x: Tensor, table: Table) -> Tensor:
    """Rotates the first R elements of each head in pairs (2i, 2i+1), GPT-J's form. x is (B, T, H, D)."""
    cos, sin = table
    rotary, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)  # (B, T, H, R), (.., D - R)
    even, odd = rotary.unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, R/2) each
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def rotate_half(x: Tensor, table: Table) -> Tensor:
    """Rotates the first R elements of each head in pairs (i, i + R/2), Llama's form. x is (B, T, H, D)."""
    cos, sin = table
    r = cos.shape[-1]
    low, high, rest = x.split([r, r, x.shape[-1] - 2 * r], dim=-1)  # (B, T, H, R/2) twice, (.., D - R)
    rotated = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def rotate(x: Tensor, table: Table, form: str) -> Tensor:
    """x (B, T, H, D) rotated in the form ROTATE_INTERLEAVED or ROTATE_HALF."""
    return rotate_interleaved(x, table) if form == ROTATE_INTERLEAVED else rotate_half(x, table)


@kernel
def rotate_into(
    x: Tensor, cos: Tensor, sin: Tensor, head_size: int, form: str, out: Tensor, *, back: bool = False
) -> None:
    """out = all heads of x (M, heads * D) rotated; out may be x. The table is of (B, T) positions, or of (1, T) for all
    rows. `back` rotates by the negative angle: the transpose of the rotation, for gradients."""
    heads, target = (
        matrix.unflatten(1, (-1, head_size)).unflatten(0, (-1, cos.shape[0] * cos.shape[1])) for matrix in (x, out)
    )  # (n, rows, heads, D)
    table = cos.flatten(0, 1)[None], (-sin if back else sin).flatten(0, 1)[None]
    target.copy_(rotate(heads, table, form))


@kernel
def norm_rotate_into(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, head_size: int, form: str, out: Tensor, *,
    zero_centred_weight: bool = False,
) -> None:  # fmt: skip
    """out = rotate(norm(x)), both (M, heads * D), for an RMSNorm of each head, or of all heads together.

    The weight is (D,) or (heads * D,). Heads are rotated as a whole: R = D. The norm is rounded to the dtype before it
    is rotated. out is another matrix than x.
    """
    assert 2 * cos.shape[-1] == head_size
    norm_into(x, weight, None, eps, out, zero_centred_weight=zero_centred_weight)
    rotate_into(out, cos, sin, head_size, form, out)


@kernel
def norm_rotate_backward_into(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, head_size: int, form: str, dy: Tensor, out: Tensor,
    *, zero_centred_weight: bool = False,
) -> None:  # fmt: skip
    """out = the gradient to x of `norm_rotate_into`, whose output has the gradient dy; all (M, heads * D).

    out may be x. The gradient between the rotation and the norm is rounded to the dtype.
    """
    assert 2 * cos.shape[-1] == head_size
    dn = torch.empty_like(dy)
    rotate_into(dy, cos, sin, head_size, form, dn, back=True)
    norm_backward_into(x, weight, eps, dn, None, out, centred=False, zero_centred_weight=zero_centred_weight)
