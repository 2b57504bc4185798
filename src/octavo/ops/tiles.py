"""Batch invariance on a CPU: the bits of a row of inference do not depend on the rows that are computed with it.

These tiles are part of the mathematics of the references, not of a kernel's launch: which rows are one call decides the
bits of the result. A BLAS library chooses its blocking by the number of rows, and vectorized loops end in a scalar
remainder, so one row has different last bits in matrices of different heights. Inference therefore uses few, fixed
shapes:

- prefill: tiles of PREFILL_TILE positions, counted from the start of the prompt. A tile is a function of the prompt's
  tokens up to its end alone, so prompts with a common prefix have the same bits in whole tiles, for any size of chunks.
- decode: tiles of `decode_tile` rows, the last one padded with zeros. Within one shape the result of a row depends
  neither on its index nor on other rows.

The Triton kernels have their own tiles with that property (kernels/inference.py). docs/design/batch-invariance.md
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.hardware.capabilities import capabilities_of

PREFILL_TILE = 64  # positions; with fewer a bfloat16 matmul of a CPU takes longer to pack weights than to multiply


class Phase(Enum):
    """What inference computes: the positions of a prompt, or one new token of each request.

    DECODE_ANY_ORDER is decode whose rows need not be batch-invariant: a kernel may choose the order of sums by the
    number of rows. Its reference is that of DECODE.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    DECODE_ANY_ORDER = "decode in any order"


def decode_tile(dtype: torch.dtype) -> int:
    """Rows of a decode tile: AMX multiplies 16 rows of a 2-byte dtype in the time of one; float32 has no such unit."""
    return 4 if dtype == torch.float32 else 16


def matmul_in_tiles(x: Tensor, phase: Phase, matmul: Callable[[Tensor], Tensor]) -> Tensor:
    """`matmul` of x (M, K) in tiles of rows, joined: (M, N)."""
    if phase is Phase.PREFILL:
        return _joined([matmul(rows) for rows in x.split(PREFILL_TILE)])
    tile = decode_tile(x.dtype)
    results = []
    for rows in x.split(tile):
        count = len(rows)
        full = rows if count == tile else F.pad(rows, (0, 0, 0, tile - count))  # (tile, K)
        results.append(matmul(full)[:count])
    return _joined(results)


def elementwise_tiles(x: Tensor, phase: Phase) -> tuple[Tensor, ...]:
    """x (M, ..) split into the rows that one call of an elementwise function gets.

    A vectorized loop and its scalar remainder may round differently, so a row must always be in the same one of both.
    A GPU has no remainder: x as it is.
    """
    if capabilities_of(x.device).is_gpu:
        return (x,)
    return tuple(x.split(PREFILL_TILE if phase is Phase.PREFILL else 1))


def _joined(tiles: list[Tensor]) -> Tensor:
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles)
