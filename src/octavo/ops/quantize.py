"""Weight schemes: how a frozen matrix is stored, and how it is dequantized.

| scheme   | stored per weight | scales                                   | bits per weight       |
|----------|-------------------|------------------------------------------|-----------------------|
| none     | the value itself  | none                                     | 32 or 16              |
| int8     | int8              | one float32 absmax an output row         | 8 + 32/K              |
| dynamic8 | uint8 code        | one float32 absmax a block of 4096       | 8 + 32/4096           |
| nf4      | 4-bit code        | one float32 absmax a block of 64         | 4 + 32/64             |

Legend: a weight is (N, K), N output rows of K inputs. `parts` are its tensors: "weight" (the quantized values),
"absmax" (the scales) and, for dynamic8, "code" (the 256 values of its data type). A scheme has no state. To add one: a
class with the members of `Scheme`, and a row in `SCHEMES`.

With nf4, embedding and head are int8 (`embedding_scheme`).

`unpack` dequantizes: it returns a matrix in the compute dtype and, if the scheme has one scale a row, that scale
separately, so that W = scale[:, None] * matrix. int8 values are exact in bfloat16 and their multiples of a scale are
not, so a matmul that applies the scale to its result is both faster and more precise.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from octavo.errors import UsageError
from octavo.ops.dynamic import dynamic_code
from octavo.runtime.dispatch import kernel
from octavo.runtime.optional import bitsandbytes

Parts = dict[str, Tensor]
Shape = tuple[int, int]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]

INT8_LEVELS = 127  # symmetric: -127 .. 127, so that a negated row has negated quantized values
DYNAMIC8_BLOCK = 4096  # hivemind/gpt-j-6B-8bit; one row of GPT-J's embedding is exactly one block
NF4_BLOCK = 64  # bitsandbytes' default for 4 bits

# The 16 values of NF4: quantiles of a standard normal, scaled to [-1, 1], with an exact zero
# (QLoRA, arXiv 2305.14314, appendix E).
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


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
        """Whether the concatenated parts of matrices of this shape are the parts of the stacked matrix."""
        ...


class Plain:
    """No quantization: the values in the dtype that they were loaded in."""

    name = embedding_scheme = "none"
    row_scaled = False

    def layout(self, shape: Shape, dtype: torch.dtype) -> Layout:
        return {"weight": (shape, dtype)}

    def quantize(self, weight: Tensor) -> Parts:
        return {"weight": weight}

    def unpack(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return parts["weight"].to(dtype), None

    def fill(self, parts: Parts, out: Tensor) -> None:
        out.copy_(parts["weight"])

    def int8_weight(self, parts: Parts, shape: Shape) -> tuple[Tensor, Tensor] | None:
        return None

    def rows(self, parts: Parts, shape: Shape, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return parts["weight"][ids].to(dtype)

    def stacks(self, shape: Shape) -> bool:
        return True


class Int8:
    """Symmetric 8 bits, one scale an output row: W[n, k] = weight[n, k] * absmax[n] / 127.

    |W - dequantized| <= absmax / 254 everywhere: the quantized value is the nearest of evenly spaced levels.
    """

    name = embedding_scheme = "int8"
    row_scaled = True

    def layout(self, shape: Shape, dtype: torch.dtype) -> Layout:
        return {"weight": (shape, torch.int8), "absmax": (shape[:1], torch.float32)}

    def quantize(self, weight: Tensor) -> Parts:
        values = weight.float()
        absmax = values.abs().amax(dim=1)
        step = (absmax / INT8_LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
        quantized = (values / step[:, None]).round_().clamp_(-INT8_LEVELS, INT8_LEVELS)  # (N, K)
        return {"weight": quantized.to(torch.int8), "absmax": absmax}

    def unpack(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        matrix = parts["weight"].new_empty(shape, dtype=dtype)
        step = 2.0**-7 if dtype == torch.float16 else 1.0  # sums of int8 values would overflow at 65504
        int8_values_into(parts["weight"], step, matrix)
        return matrix, parts["absmax"] / (INT8_LEVELS * step)

    def fill(self, parts: Parts, out: Tensor) -> None:
        int8_into(parts["weight"], parts["absmax"], out)

    def int8_weight(self, parts: Parts, shape: Shape) -> tuple[Tensor, Tensor] | None:
        return parts["weight"], parts["absmax"]

    def rows(self, parts: Parts, shape: Shape, ids: Tensor, dtype: torch.dtype) -> Tensor:
        scale = parts["absmax"][ids] / INT8_LEVELS
        return (parts["weight"][ids] * scale[..., None]).to(dtype)

    def stacks(self, shape: Shape) -> bool:
        return True


class Dynamic8:
    """The format of hivemind/gpt-j-6B-8bit: W flattened in rows, blocks of 4096, value = code[byte] * absmax.

    The data type is that of "8-Bit Approximations for Parallelism in Deep Learning" (arXiv 1511.04561); a file has its
    own table `code`, which is used to read it. The last block may be short. The format is defined by bitsandbytes, so
    its `quantize_blockwise` writes the bytes: on a CPU it uses a table of 65,536 even bins, with which about one value
    in 500 is the one next to the nearest, and no other code gives the same bytes.
    """

    name = embedding_scheme = "dynamic8"
    row_scaled = False

    def layout(self, shape: Shape, dtype: torch.dtype) -> Layout:
        blocks = -(-prod(shape) // DYNAMIC8_BLOCK)
        return {
            "weight": (shape, torch.uint8),
            "absmax": ((blocks,), torch.float32),
            "code": ((256,), torch.float32),
        }

    def quantize(self, weight: Tensor) -> Parts:
        code = dynamic_code().to(weight.device)
        codes, state = bitsandbytes().functional.quantize_blockwise(
            weight.contiguous(), code=code, blocksize=DYNAMIC8_BLOCK
        )
        return {"weight": codes.view(weight.shape), "absmax": state.absmax, "code": code}

    def unpack(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        matrix = parts["absmax"].new_empty(shape, dtype=dtype)
        self.fill(parts, matrix)
        return matrix, None

    def fill(self, parts: Parts, out: Tensor) -> None:
        dynamic8_into(parts["weight"], parts["absmax"], parts["code"], out)

    def int8_weight(self, parts: Parts, shape: Shape) -> tuple[Tensor, Tensor] | None:
        return None

    def rows(self, parts: Parts, shape: Shape, ids: Tensor, dtype: torch.dtype) -> Tensor:
        absmax = parts["absmax"][_flat_index(shape, ids) // DYNAMIC8_BLOCK]
        return (parts["code"][parts["weight"][ids].int()] * absmax).to(dtype)

    def stacks(self, shape: Shape) -> bool:
        return prod(shape) % DYNAMIC8_BLOCK == 0


class Nf4:
    """4-bit NormalFloat in the layout of bitsandbytes: W flattened in rows, blocks of 64, two values a byte.

    The first value of a byte is in its high half. The scales are not quantized. Embedding and head stay in 8 bits:
    every token uses both, and in GPT-J they are 7 % of the parameters.
    """

    name, embedding_scheme = "nf4", "int8"
    row_scaled = False

    def layout(self, shape: Shape, dtype: torch.dtype) -> Layout:
        n = prod(shape)
        return {"weight": ((-(-n // 2),), torch.uint8), "absmax": ((-(-n // NF4_BLOCK),), torch.float32)}

    def quantize(self, weight: Tensor) -> Parts:
        code = _nf4_code(weight.device)
        scaled, absmax = _scaled_blocks(weight, NF4_BLOCK)
        codes = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
        if codes.numel() % 2:
            codes = torch.cat([codes, codes.new_full((1,), NF4_CODE.index(0.0))])
        return {"weight": (codes[::2] << 4) | codes[1::2], "absmax": absmax}

    def unpack(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        matrix = parts["absmax"].new_empty(shape, dtype=dtype)
        self.fill(parts, matrix)
        return matrix, None

    def fill(self, parts: Parts, out: Tensor) -> None:
        nf4_into(parts["weight"], parts["absmax"], out)

    def int8_weight(self, parts: Parts, shape: Shape) -> tuple[Tensor, Tensor] | None:
        if shape[1] % NF4_BLOCK:
            return None
        absmax = parts["absmax"].view(shape[0], -1).amax(dim=1)  # the largest magnitude of a block is its absmax
        out = parts["weight"].new_empty(shape, dtype=torch.int8)
        nf4_as_int8_into(parts["weight"], parts["absmax"], absmax, out)
        return out, absmax

    def rows(self, parts: Parts, shape: Shape, ids: Tensor, dtype: torch.dtype) -> Tensor:
        index = _flat_index(shape, ids)
        byte = parts["weight"][index // 2]
        codes = torch.where(index % 2 == 0, byte >> 4, byte & 0xF)
        return (_nf4_code(byte.device)[codes.int()] * parts["absmax"][index // NF4_BLOCK]).to(dtype)

    def stacks(self, shape: Shape) -> bool:
        return prod(shape) % NF4_BLOCK == 0


@kernel
def int8_into(weight: Tensor, absmax: Tensor, out: Tensor) -> None:
    """out (N, K) = weight * absmax / 127 by rows, in float32, rounded to the dtype of out."""
    # In place in float32: on a CPU conversion and multiplication are several times as fast as one mixed operation.
    values = out.copy_(weight) if out.dtype == torch.float32 else weight.float()
    values.mul_((absmax / INT8_LEVELS)[:, None])
    if values is not out:
        out.copy_(values)


@kernel
def int8_values_into(weight: Tensor, step: float, out: Tensor) -> None:
    """out (N, K) = int8 weight * step; step is a power of two, so nothing is rounded."""
    out.copy_(weight)
    if step != 1:
        out.mul_(step)


@kernel
def dynamic8_into(codes: Tensor, absmax: Tensor, code: Tensor, out: Tensor) -> None:
    """out (N, K) = code[codes] * absmax by blocks of 4096 of the flattened matrix, rounded to the dtype of out."""
    values = code.index_select(0, codes.reshape(-1).int())
    out.copy_(_times_blocks_(values, absmax, DYNAMIC8_BLOCK).view(out.shape))


@kernel
def nf4_into(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    """out (N, K) = the 4-bit values * absmax by blocks of 64 of the flattened matrix, rounded to the dtype of out."""
    out.copy_(_times_blocks_(_nf4_values(codes, out.numel()), absmax, NF4_BLOCK).view(out.shape))


@kernel
def nf4_as_int8_into(codes: Tensor, absmax: Tensor, row_absmax: Tensor, out: Tensor) -> None:
    """out (N, K) int8 = the 4-bit values quantized with the scale row_absmax / 127 (N,); K is a multiple of 64.

    The error is at most half a step of int8. In the largest block of a row the steps of NF4 are 10 to 35 times larger.
    """
    values = _times_blocks_(_nf4_values(codes, out.numel()), absmax, NF4_BLOCK).view(out.shape)
    tiny = torch.finfo(torch.float32).tiny
    levels = row_absmax.new_full((), INT8_LEVELS)  # a tensor: with a Python number PyTorch multiplies by the reciprocal
    out.copy_((values * (levels / row_absmax.clamp_min(tiny))[:, None]).round_())


SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (Plain(), Int8(), Dynamic8(), Nf4())}


def scheme_named(name: str) -> Scheme:
    """The scheme of that name; a UsageError lists all of them."""
    if name not in SCHEMES:
        raise UsageError(f"There is no weight scheme {name!r}.", hint=f"Choose one of: {', '.join(SCHEMES)}.")
    return SCHEMES[name]


def dequantize(scheme: Scheme, parts: Parts, shape: Shape, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The (N, K) matrix of `parts`."""
    matrix, scale = scheme.unpack(parts, shape, dtype)
    return matrix if scale is None else (matrix * scale[:, None]).to(dtype)


def stored_bytes(scheme: Scheme, shape: Shape, *, dtype: torch.dtype) -> int:
    """Bytes of a matrix of this shape, with its scales."""
    return sum(prod(size) * kind.itemsize for size, kind in scheme.layout(shape, dtype).values())


@cache
def _nf4_code(device: torch.device) -> Tensor:
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


@cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """(256,) for each byte its two float32 values, viewed as one 8-byte element."""
    code = _nf4_code(device)
    return torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1).view(torch.float64)[:, 0]


def _nf4_values(codes: Tensor, count: int) -> Tensor:
    """The first `count` values of 4-bit codes, float32."""
    # On a CPU this takes a twelfth of the time of indexing a table of (256, 2).
    return _nf4_pairs(codes.device).index_select(0, codes.reshape(-1).int()).view(torch.float32)[:count]


def _scaled_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(values over the absmax of their block, flat; absmax of each block). The last block may be short."""
    flat = weight.float().reshape(-1)
    full = flat.numel() // block * block
    blocks = flat[:full].view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    if full < flat.numel():
        absmax = torch.cat([absmax, flat[full:].abs().amax().view(1)])
    tiny = torch.finfo(torch.float32).tiny  # a block of zeros is divided by this and stays zero
    return _times_blocks_(flat.clone(), 1.0 / absmax.clamp_min(tiny), block), absmax


def _times_blocks_(flat: Tensor, factor: Tensor, block: int) -> Tensor:
    """flat (n,), multiplied in place by the factor of its block. The last block may be short."""
    full = flat.numel() // block * block
    flat[:full].view(-1, block).mul_(factor[: full // block, None])
    if full < flat.numel():
        flat[full:].mul_(factor[-1])
    return flat


def _flat_index(shape: Shape, ids: Tensor) -> Tensor:
    """(*ids.shape, K): the indices of rows `ids` in the flattened matrix."""
    columns = torch.arange(shape[1], device=ids.device)
    return ids.long()[..., None] * shape[1] + columns
