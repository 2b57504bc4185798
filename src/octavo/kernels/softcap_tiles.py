"""The tiles of the kernels of soft-capped attention, chosen by head size, dtype and shared memory.

They were chosen by the registers and the shared memory of the compiled kernels (tests/kernels/test_softcap_tiles.py);
benchmarks/softcap.py --sweep measures them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton

# Shared memory of a program: of H100 and B200; of RTX 30 and 40, less than an A100 has. Tiles for less: T4.
LARGE_BYTES, MEDIUM_BYTES = 227 * 1024, 99 * 1024
WIDE_FLOAT_BYTES = 66 * 1024  # that the smallest tiles need in float32 with heads of 256, more than a T4 has


class Tile(NamedTuple):
    """Queries and keys of a block, and how a program runs."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of the passes. Without one for dv, that for dk computes both.

    With heads of 256 both sums for 128 keys do not fit into registers, and for 64 keys each of two groups of 4 warps
    would compute all scores, as Hopper's instructions have 64 rows. Passes of their own need 8 matmuls instead of 7.
    """

    forward: Tile
    dq: Tile
    dk: Tile
    dv: Tile | None = None


def tiles_for(shared_bytes: int, head_size: int, itemsize: int) -> Tiles | None:
    """The tiles for a head size and dtype on a GPU with so many bytes of shared memory a program; None: none fit."""
    wide = head_size > 128
    if itemsize > 2:  # float32 has no tensor cores here: small tiles, whose sums fit into registers
        if wide and shared_bytes < WIDE_FLOAT_BYTES:
            return None
        side = 32 if head_size <= 64 and shared_bytes >= MEDIUM_BYTES else 16
        return Tiles(*[Tile(side, side, 8, 1)] * 3)
    if shared_bytes >= LARGE_BYTES:
        if wide:
            return Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2), Tile(64, 128, 8, 2))
        return Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64 if head_size <= 64 else 32, 128, 8, 2))
    if shared_bytes >= MEDIUM_BYTES:
        if wide:
            return Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))
        return Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2))
    side = 16 if wide else 32
    return Tiles(*[Tile(side, side, 8, 1)] * 3)


def kv_passes(tiles: Tiles) -> list[tuple[Tile, dict[str, bool]]]:
    """The passes for dk and dv, each with the outputs that it computes."""
    if tiles.dv is None:
        return [(tiles.dk, {"DK": True, "DV": True})]
    return [(tiles.dk, {"DK": True, "DV": False}), (tiles.dv, {"DK": False, "DV": True})]


def width_of(head_size: int) -> int:
    """The columns of a tile: a power of 2, at least the smallest of a dot."""
    return max(16, int(triton.next_power_of_2(head_size)))
