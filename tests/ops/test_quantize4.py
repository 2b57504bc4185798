"""The schemes of 4 bits: equal to bitsandbytes bit for bit, also where scales are quantized."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from tests.ops.test_quantize import every_shape, every_type, weight_of
from torch import Tensor

from octavo.ops.dynamic import dynamic_code, nearest_of_bins
from octavo.ops.quantize import SCHEMES, dequantize, stored_bytes
from octavo.ops.quantize4 import NESTED_BLOCK, NF4_BLOCK, NF4_CODE
from octavo.ops.scheme import Shape

NF4, DOUBLE = SCHEMES["nf4"], SCHEMES["nf4-double"]


@every_shape
@every_type
def test_nf4_is_bitsandbytes_bit_for_bit(shape: Shape, dtype: torch.dtype) -> None:
    weight = weight_of(shape, dtype=dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    parts = NF4.quantize(weight)
    assert torch.equal(parts["weight"], codes.view(-1))
    assert torch.equal(parts["absmax"], state.absmax.view(-1))
    ours = dequantize(NF4, parts, shape, dtype=dtype)
    assert torch.equal(ours, bnb.dequantize_4bit(codes, state))


def test_nf4_breaks_ties_between_levels_as_bitsandbytes() -> None:
    code = torch.tensor(NF4_CODE)
    middles = (code[:-1] + code[1:]) / 2
    near = [torch.nextafter(middles, torch.tensor(to)) for to in (-2.0, 2.0)]
    weight = torch.zeros(1, NF4_BLOCK)
    weight[0, :46] = torch.cat([torch.ones(1), middles, *near])
    codes, _ = bnb.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    assert torch.equal(NF4.quantize(weight)["weight"], codes.view(-1))


def assert_double_is_bitsandbytes(weight: Tensor) -> None:
    codes, state = bnb.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True)
    parts = DOUBLE.quantize(weight)
    assert torch.equal(parts["weight"], codes.view(-1))
    assert torch.equal(parts["absmax"], state.absmax.view(-1))
    assert torch.equal(parts["nested_absmax"], state.state2.absmax)
    assert torch.equal(parts["nested_offset"], state.offset.expand(len(state.state2.absmax)))
    assert torch.equal(parts["code"], state.state2.code)
    shape = (weight.shape[0], weight.shape[1])
    ours = dequantize(DOUBLE, parts, shape, dtype=weight.dtype)
    assert torch.equal(ours, bnb.dequantize_4bit(codes, state))


@every_shape
@every_type
def test_nf4_double_is_bitsandbytes_bit_for_bit(shape: Shape, dtype: torch.dtype) -> None:
    assert_double_is_bitsandbytes(weight_of(shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(9, 4096), (300, 100), (130, 2050)], ids=str)
def test_nf4_double_is_bitsandbytes_over_many_blocks_of_scales(shape: Shape) -> None:
    assert_double_is_bitsandbytes(weight_of(shape) * torch.logspace(-3, 3, shape[0])[:, None])


def test_equal_scales_are_zeros_of_bitsandbytes() -> None:
    """All differences to the mean are zero: bitsandbytes then writes the byte 0."""
    assert_double_is_bitsandbytes(torch.ones(4, 4096))
    assert_double_is_bitsandbytes(torch.zeros(3, 64))


def test_values_at_the_edges_of_bins_are_in_the_bins_of_bitsandbytes() -> None:
    edge = (((torch.arange(2**16 - 1) + 0.5).double() / ((2**16 - 1) / 2)) - 1).float()
    above, below = torch.nextafter(edge, torch.tensor(2.0)), torch.nextafter(edge, torch.tensor(-2.0))
    values = torch.cat([edge, above, below, torch.tensor([-1.0, 0.0, 1.0])])
    values = torch.cat([values, values.new_zeros(-len(values) % 255)]).view(-1, 255)
    blocks = torch.cat([values.new_ones(len(values), 1), values], dim=1)  # an absmax of 1 changes no value
    codes, _ = bnb.quantize_blockwise(blocks, code=dynamic_code(), blocksize=256)
    assert torch.equal(nearest_of_bins(blocks), codes)


def test_nf4_double_takes_4_13_bits_a_weight() -> None:
    assert stored_bytes(DOUBLE, (4096, 4096), dtype=torch.bfloat16) * 8 / 4096**2 == pytest.approx(4.1294, abs=1e-4)
    assert stored_bytes(NF4, (4096, 4096), dtype=torch.bfloat16) * 8 / 4096**2 == 4.5


@pytest.mark.parametrize("upper", [4, 12])
def test_matrices_with_different_offsets_are_dequantized_as_one(upper: int) -> None:
    first, second = weight_of((upper, 4096)), weight_of((4, 4096), seed=1) * 50
    apart = [DOUBLE.quantize(weight) for weight in (first, second)]
    joined = {part: torch.cat([parts[part] for parts in apart]) for part in apart[0]} | {"code": apart[0]["code"]}
    assert len(joined["nested_offset"].unique()) == 2
    expected = [dequantize(DOUBLE, parts, (len(parts["absmax"]) // 64, 4096)) for parts in apart]
    assert torch.equal(dequantize(DOUBLE, joined, (upper + 4, 4096)), torch.cat(expected))


@pytest.mark.parametrize("name", ["nf4", "nf4-double"])
def test_int8_weights_are_the_dequantized_ones_within_half_a_step(name: str) -> None:
    weight = weight_of((6, 4096)) * torch.logspace(-2, 2, 6)[:, None]
    weight[3, :2048] = 0
    weight[5] = 0
    parts = SCHEMES[name].quantize(weight)
    if name == "nf4-double":  # its rounding may give a block of zeros a negative scale
        parts["nested_offset"] *= 0.9
    found = SCHEMES[name].int8_weight(parts, (6, 4096))
    assert found is not None
    values, absmax = found
    restored = dequantize(SCHEMES[name], parts, (6, 4096))
    assert bool((absmax >= restored.abs().amax(dim=1)).all())
    error = (values.float() * (absmax / 127)[:, None] - restored).abs()
    assert bool((error <= absmax[:, None] / 254 * (1 + 1e-5)).all())


def test_a_scale_of_scales_belongs_to_256_blocks() -> None:
    parts = DOUBLE.quantize(weight_of((8, 4096)))
    before = dequantize(DOUBLE, parts, (8, 4096))
    assert len(parts["absmax"]) == 2 * NESTED_BLOCK
    parts["nested_absmax"][1] *= 2
    changed = dequantize(DOUBLE, parts, (8, 4096)) != before
    assert not changed[:4].any()
    assert changed[4:].float().mean() > 0.8
