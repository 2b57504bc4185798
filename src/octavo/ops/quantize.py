"""Weight schemes: how a frozen matrix is stored, and how it is dequantized.

| scheme   | stored per weight | scales                                   | bits per weight       |
|----------|-------------------|------------------------------------------|-----------------------|
| none     | the value itself  | none                                     | 32 or 16              |
| int8     | int8              | one float32 absmax an output row         | 8 + 32/K              |
| dynamic8 | uint8 code        | one float32 absmax a block of 4096       | 8 + 32/4096           |
| nf4      | 4-bit code        | one float32 absmax a block of 64         | 4 + 32/64             |
| nf4-     | 4-bit code        | one uint8 code a block of 64, and two    | 4 + 8/64 + 64/16384   |
| double   |                   | float32 for 256 of these codes           |                       |

Legend: a weight is (N, K), N output rows of K inputs. `parts` are its tensors: "weight" (the quantized values),
"absmax" (the scales), for dynamic8 and nf4-double "code" (the 256 values of the 8-bit data type), and for nf4-double
"nested_absmax" and "nested_offset" (the scales of the scales). A scheme has no state. To add one: a class with the
members of `Scheme` (ops/scheme.py), and a row in `SCHEMES`. Those of 4 bits are in ops/quantize4.py.

With nf4 and nf4-double, embedding and head are int8 (`embedding_scheme`).

`unpack` dequantizes: it returns a matrix in the compute dtype and, if the scheme has one scale a row, that scale
separately, so that W = scale[:, None] * matrix. int8 values are exact in bfloat16 and their multiples of a scale are
not, so a matmul that applies the scale to its result is both faster and more precise.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from octavo.errors import UsageError
from octavo.ops.dynamic import dynamic_code
from octavo.ops.quantize4 import Nf4, Nf4Double
from octavo.ops.scheme import INT8_LEVELS, Layout, Parts, Scheme, Shape, SinglePass, flat_index, times_blocks_
from octavo.runtime.dispatch import kernel
from octavo.runtime.optional import bitsandbytes

DYNAMIC8_BLOCK = 4096  # hivemind/gpt-j-6B-8bit; one row of GPT-J's embedding is exactly one block


class Plain(SinglePass):
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


class Int8(SinglePass):
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


class Dynamic8(SinglePass):
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
        absmax = parts["absmax"][flat_index(shape, ids) // DYNAMIC8_BLOCK]
        return (parts["code"][parts["weight"][ids].int()] * absmax).to(dtype)

    def stacks(self, shape: Shape) -> bool:
        return prod(shape) % DYNAMIC8_BLOCK == 0


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
    out.copy_(times_blocks_(values, absmax, DYNAMIC8_BLOCK).view(out.shape))


_ALL: tuple[Scheme, ...] = (Plain(), Int8(), Dynamic8(), Nf4(), Nf4Double())
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ALL}


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
