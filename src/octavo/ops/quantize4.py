"""Weight schemes of 4 bits: nf4, and nf4-double, whose scales are quantized too. All schemes: ops/quantize.py."""

from __future__ import annotations

from functools import cache
from math import prod

import torch
from torch import Tensor

from octavo.ops.dynamic import dynamic_code, nearest_of_bins
from octavo.ops.scheme import (
    INT8_LEVELS,
    Layout,
    Parts,
    Scheme,
    Shape,
    SinglePass,
    flat_index,
    scaled_blocks,
    times_blocks_,
)
from octavo.runtime.dispatch import kernel

NF4_BLOCK = 64  # bitsandbytes' default for 4 bits
NESTED_BLOCK = 256  # scales that share a scale in double quantization

# The 16 values of NF4: quantiles of a standard normal, scaled to [-1, 1], with an exact zero
# (QLoRA, arXiv 2305.14314, appendix E).
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Nf4(SinglePass):
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
        scaled, absmax = scaled_blocks(weight, NF4_BLOCK)
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
        # The largest magnitude of a block is that of its absmax, which double quantization can make negative.
        absmax = torch.linalg.vector_norm(parts["absmax"].view(shape[0], -1), ord=torch.inf, dim=1)  # (N,)
        out = parts["weight"].new_empty(shape, dtype=torch.int8)
        nf4_as_int8_into(parts["weight"], parts["absmax"], absmax, out)
        return out, absmax

    def rows(self, parts: Parts, shape: Shape, ids: Tensor, dtype: torch.dtype) -> Tensor:
        index = flat_index(shape, ids)
        byte = parts["weight"][index // 2]
        codes = torch.where(index % 2 == 0, byte >> 4, byte & 0xF)
        return (_nf4_code(byte.device)[codes.int()] * parts["absmax"][index // NF4_BLOCK]).to(dtype)

    def stacks(self, shape: Shape) -> bool:
        return prod(shape) % NF4_BLOCK == 0


class Nf4Double(Nf4):
    """nf4 with quantized scales, bitsandbytes' `compress_statistics` (QLoRA, arXiv 2305.14314, section 3).

    With the absmax of the blocks of 64 as nf4 has it, in blocks of 256:

        offset = mean of absmax over the matrix
        nested_absmax = max |absmax - offset| of a block of 256
        stored absmax (uint8) = the 8-bit dynamic data type of (absmax - offset) / nested_absmax
        absmax, dequantized = code[stored absmax] * nested_absmax + offset

    bitsandbytes has one offset for each matrix. Here "nested_offset" repeats it for each block of 256, so that stacked
    matrices with different offsets are dequantized at once. It costs 32/16384 bits a weight.
    """

    name = "nf4-double"

    def layout(self, shape: Shape, dtype: torch.dtype) -> Layout:
        blocks = -(-prod(shape) // NF4_BLOCK)
        nested = -(-blocks // NESTED_BLOCK)
        return {
            "weight": super().layout(shape, dtype)["weight"],
            "absmax": ((blocks,), torch.uint8),
            "nested_absmax": ((nested,), torch.float32),
            "nested_offset": ((nested,), torch.float32),
            "code": ((256,), torch.float32),
        }

    @property
    def first_pass(self) -> Scheme:
        return Nf4()  # the offset is that of the whole matrix

    def finish(self, parts: Parts) -> Parts:
        device, absmax = parts["absmax"].device, parts["absmax"].cpu()  # so that every device writes the same bytes
        offset = absmax.mean()
        scaled, nested_absmax = scaled_blocks(absmax - offset, NESTED_BLOCK)
        zero = (nested_absmax == 0).repeat_interleave(NESTED_BLOCK)[: len(scaled)]  # bitsandbytes' byte there is 0
        double = {
            "absmax": nearest_of_bins(scaled.masked_fill_(zero, -1.0)),
            "nested_absmax": nested_absmax,
            "nested_offset": offset.expand(len(nested_absmax)).clone(),
            "code": dynamic_code(),
        }
        return {"weight": parts["weight"]} | {part: tensor.to(device) for part, tensor in double.items()}

    def quantize(self, weight: Tensor) -> Parts:
        return self.finish(super().quantize(weight))

    def unpack(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        matrix = parts["code"].new_empty(shape, dtype=dtype)
        self.fill(parts, matrix)
        return matrix, None

    def fill(self, parts: Parts, out: Tensor) -> None:
        nested = parts["nested_absmax"], parts["nested_offset"], parts["code"]
        nf4_double_into(parts["weight"], parts["absmax"], *nested, out)

    def int8_weight(self, parts: Parts, shape: Shape) -> tuple[Tensor, Tensor] | None:
        return super().int8_weight({"weight": parts["weight"], "absmax": _double_absmax(parts)}, shape)

    def rows(self, parts: Parts, shape: Shape, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return super().rows({"weight": parts["weight"], "absmax": _double_absmax(parts)}, shape, ids, dtype)

    def stacks(self, shape: Shape) -> bool:
        return prod(shape) % (NF4_BLOCK * NESTED_BLOCK) == 0


@kernel
def nf4_into(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    """out (N, K) = the 4-bit values * absmax by blocks of 64 of the flattened matrix, rounded to the dtype of out."""
    out.copy_(_nf4_matrix(codes, absmax, out.shape))


@kernel
def nf4_double_into(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor, nested_offset: Tensor, code: Tensor, out: Tensor
) -> None:
    """As `nf4_into` with absmax = code[absmax] * nested_absmax + nested_offset by 256 blocks, rounded twice."""
    out.copy_(_nf4_matrix(codes, _dequantized_absmax(absmax, nested_absmax, nested_offset, code), out.shape))


@kernel
def nf4_as_int8_into(codes: Tensor, absmax: Tensor, row_absmax: Tensor, out: Tensor) -> None:
    """out (N, K) int8 = the 4-bit values quantized with the scale row_absmax / 127 (N,); K is a multiple of 64.

    The error is at most half a step of int8. In the largest block of a row the steps of NF4 are 10 to 35 times larger.
    """
    values = _nf4_matrix(codes, absmax, out.shape)
    tiny = torch.finfo(torch.float32).tiny
    levels = row_absmax.new_full((), INT8_LEVELS)  # a tensor: with a Python number PyTorch multiplies by the reciprocal
    out.copy_((values * (levels / row_absmax.clamp_min(tiny))[:, None]).round_())


def _double_absmax(parts: Parts) -> Tensor:
    """The float32 scales of nf4 (blocks of 64,) from parts under nf4-double."""
    return _dequantized_absmax(parts["absmax"], parts["nested_absmax"], parts["nested_offset"], parts["code"])


def _dequantized_absmax(absmax: Tensor, nested_absmax: Tensor, nested_offset: Tensor, code: Tensor) -> Tensor:
    scales = times_blocks_(code.index_select(0, absmax.int()), nested_absmax, NESTED_BLOCK)  # (blocks of 64,)
    return scales.add_(nested_offset.repeat_interleave(NESTED_BLOCK)[: len(scales)])


@cache
def _nf4_code(device: torch.device) -> Tensor:
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


@cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """(256,) for each byte its two float32 values, viewed as one 8-byte element."""
    code = _nf4_code(device)
    return torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1).view(torch.float64)[:, 0]


def _nf4_matrix(codes: Tensor, absmax: Tensor, shape: torch.Size) -> Tensor:
    """(N, K) float32: the 4-bit values * absmax by blocks of 64."""
    return times_blocks_(_nf4_values(codes, shape.numel()), absmax, NF4_BLOCK).view(shape)


def _nf4_values(codes: Tensor, count: int) -> Tensor:
    """The first `count` values of 4-bit codes, float32."""
    # On a CPU this takes a twelfth of the time of indexing a table of (256, 2).
    return _nf4_pairs(codes.device).index_select(0, codes.reshape(-1).int()).view(torch.float32)[:count]
