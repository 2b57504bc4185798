"""The members of a weight scheme, and arithmetic in blocks of a flattened matrix. The schemes: ops/quantize.py."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

Parts = dict[str, Tensor]
Shape = tuple[int, int]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]

INT8_LEVELS = 127  # symmetric: -127 .. 127, so that a negated row has negated quantized values


class Scheme(Protocol):
    """The members of a scheme."""

    @property
    def name(self) -> str: ...

    @property
    def embedding_scheme(self) -> str:
        """The name of the scheme of embedding and head in a model with this scheme."""
        ...

    @property
    def row_scaled(self) -> bool:
        """Whether matmuls with few rows read the stored values (ops/inference.py), without a dequantized copy."""
        ...

    def layout(self, shape: Shape, dtype: torch.dtype) -> Layout:
        """Shape and dtype of each part of an (N, K) matrix; `dtype` is that of unquantized values."""
        ...

    @property
    def first_pass(self) -> Scheme:
        """The scheme under which blocks of rows are quantized one after another: this one, or for nf4-double nf4."""
        ...

    def finish(self, parts: Parts) -> Parts:
        """The parts of a matrix under this scheme, from all of its parts under `first_pass`."""
        ...

    def quantize(self, weight: Tensor) -> Parts:
        """Parts of a floating-point (N, K) matrix."""
        ...

    def unpack(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(matrix (N, K) in `dtype`, row scale (N,) float32 or None)."""
        ...

    def fill(self, parts: Parts, out: Tensor) -> None:
        """Writes the matrix into `out` (N, K), rounded to its dtype; out may be columns of a wider matrix."""
        ...

    def int8_weight(self, parts: Parts, shape: Shape) -> tuple[Tensor, Tensor] | None:
        """(int8 (N, K), absmax (N,)) close to the matrix, for 8-bit matmuls; None: quantize the result of `fill`."""
        ...

    def rows(self, parts: Parts, shape: Shape, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` (any shape) of the matrix, (*ids.shape, K); reads no other row."""
        ...

    def stacks(self, shape: Shape) -> bool:
        """Whether concatenated parts of matrices of this shape dequantize to the stacked matrix: blocks are whole."""
        ...


class SinglePass:
    """The part of a scheme whose scales depend on the values of their own block only."""

    @property
    def first_pass(self) -> Scheme:
        return self  # type: ignore[return-value]

    def finish(self, parts: Parts) -> Parts:
        return parts


def scaled_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(values over the absmax of their block, flat; absmax of each block). The last block may be short."""
    flat = weight.float().reshape(-1)
    full = flat.numel() // block * block
    blocks = flat[:full].view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    if full < flat.numel():
        absmax = torch.cat([absmax, flat[full:].abs().amax().view(1)])
    tiny = torch.finfo(torch.float32).tiny  # a block of zeros is divided by this and stays zero
    return times_blocks_(flat.clone(), 1.0 / absmax.clamp_min(tiny), block), absmax


def times_blocks_(flat: Tensor, factor: Tensor, block: int) -> Tensor:
    """flat (n,), multiplied in place by the factor of its block. The last block may be short."""
    full = flat.numel() // block * block
    flat[:full].view(-1, block).mul_(factor[: full // block, None])
    if full < flat.numel():
        flat[full:].mul_(factor[-1])
    return flat


def flat_index(shape: Shape, ids: Tensor) -> Tensor:
    """(*ids.shape, K): the indices of rows `ids` in the flattened matrix."""
    columns = torch.arange(shape[1], device=ids.device)
    return ids.long()[..., None] * shape[1] + columns


def parts_of_rows(parts: Parts, shape: Shape, rows: slice, scheme: Scheme) -> Parts:
    """The parts of some rows of an (N, K) matrix, as views; these and the rows before them are whole blocks."""
    before = scheme.layout((rows.start, shape[1]), torch.float32)
    block = scheme.layout((rows.stop - rows.start, shape[1]), torch.float32)
    return {
        part: whole if part == "code" else whole.narrow(0, before[part][0][0], block[part][0][0])
        for part, whole in parts.items()
    }
