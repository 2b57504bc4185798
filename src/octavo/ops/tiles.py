"""Batch invariance on a CPU: a row of inference has the same bits whatever else is computed with it.

A BLAS library chooses its blocking by the number of rows, and vectorised loops end in a scalar remainder, so the same
row in matrices of other heights differs in its last bits. Inference therefore calls them with few, fixed shapes:

- prefill: tiles of PREFILL_TILE positions, counted from the start of the prompt. A tile is a function of the prompt's
  tokens up to its end alone, so prompts that begin alike share whole tiles bit for bit, however they are chunked.
- decode: tiles of `decode_tile` rows, the last one filled up with zeros. Within one shape the result of a row depends
  neither on its index nor on the other rows.

The Triton kernels have that property by themselves (kernels/inference.py). docs/design/batch-invariance.md
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.hardware.capabilities import capabilities_of

PREFILL_TILE = 64  # positions; a smaller one makes bfloat16 matmuls of a CPU pack weights more often than they multiply


class Phase(Enum):
    """What inference computes: the positions of a prompt, or one new token of each request.

    DECODE_ANY_ORDER is decode whose rows need not be batch-invariant: a kernel may choose the order of sums by the
    number of rows. Its reference is that of DECODE.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    DECODE_ANY_ORDER = "decode in any order"


def decode_tile(dtype: torch.dtype) -> int:
    """Rows of a decode tile: in 2-byte types AMX multiplies 16 in the time of one, in float32 every row costs."""
    return 4 if dtype == torch.float32 else 16


def matmul_in_tiles(x: Tensor, phase: Phase, matmul: Callable[[Tensor], Tensor]) -> Tensor:
    """`matmul` of x (M, K) in tiles of rows, (M, N)."""
    if phase is Phase.PREFILL:
        return _joined([matmul(rows) for rows in x.split(PREFILL_TILE)])
    tile = decode_tile(x.dtype)
    results = []
    for rows in x.split(tile):
        count = len(rows)
        full = rows if count == tile else F.pad(rows, (0, 0, 0, tile - count))
        results.append(matmul(full)[:count])
    return _joined(results)


def elementwise_tiles(x: Tensor, phase: Phase) -> tuple[Tensor, ...]:
    """x (M, ..) cut into the rows that an elementwise function is called with: its vectorised loop and the scalar
    remainder may round differently, so a row must not move between the two. CUDA kernels have no remainder."""
    if capabilities_of(x.device).is_gpu:
        return (x,)
    return tuple(x.split(PREFILL_TILE if phase is Phase.PREFILL else 1))


def _joined(tiles: list[Tensor]) -> Tensor:
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles)
