"""8-bit matmuls against exact ones, within the largest error of rounding to 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from tests import devices
from torch import Tensor

from octavo.hardware import Capabilities
from octavo.layers.dropout import Seed
from octavo.layers.fused_linear import FusedLinear
from octavo.layers.gemm_input import GemmInput
from octavo.ops import matmul8
from octavo.ops.linear import LoraSlice
from octavo.ops.linear_spec import LinearSpec, Matmul8, QuantErrorProbe, split_outliers
from octavo.ops.matmul8 import FP8, quantize_rows
from octavo.ops.quantize import SCHEMES

M, N = 9, 32
HALF_DIGIT = 2.0**-4  # fp8 (e4m3) has four significant binary digits: half of the last one
LEAST = 2.0**-10  # half of its smallest number


def rows(*shape: int) -> Tensor:
    """Random rows of very different sizes."""
    return torch.randn(*shape) * torch.logspace(-3, 3, shape[0])[:, None]


@pytest.fixture(autouse=True)
def seeded_and_without_a_graph() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def test_int8_values_are_within_half_a_step_and_use_all_levels() -> None:
    x = rows(M, 50)
    before = x.clone()
    quantized, scale = quantize_rows(x, torch.int8)
    assert torch.equal(x, before)
    assert bool(((quantized * scale[:, None] - x).abs() <= scale[:, None] * (0.5 + 1e-4)).all())
    assert bool((quantized.abs().amax(1) == 127).all())


def test_fp8_values_are_within_half_a_digit_and_reach_the_largest_number() -> None:
    x = rows(M, 50)
    quantized, scale = quantize_rows(x, FP8)
    error, limit = (quantized.float() * scale[:, None] - x).abs(), x.abs() * HALF_DIGIT + LEAST * scale[:, None]
    assert bool((error <= limit * 1.0001).all())
    assert bool((quantized.float().abs().amax(1) == matmul8.FP8_LARGEST).all())


@pytest.mark.parametrize("columns", [50, 128, 300])
def test_each_group_of_a_row_has_a_scale(columns: int) -> None:
    """A value keeps its precision if outliers are in other groups of its row."""
    x = rows(M, columns)
    x[:, 0] *= 1000
    quantized, scale = quantize_rows(x, torch.int8, groups=True)
    for number in range(scale.shape[1]):
        group = slice(number * matmul8.GROUP_SIZE, (number + 1) * matmul8.GROUP_SIZE)
        step = scale[:, number, None]
        assert bool(((quantized[:, group] * step - x[:, group]).abs() <= step * (0.5 + 1e-4)).all())
        assert bool((quantized[:, group].abs().amax(1) == 127).all())


def test_a_matmul_sums_groups_with_their_scales() -> None:
    x, weight = rows(M, 300), torch.randint(-127, 128, (16, 300), dtype=torch.int8)
    quantized, scale = quantize_rows(x, torch.int8, groups=True)
    out = torch.empty(M, 16)
    matmul8.matmul_8bit_into(quantized, scale, weight, out)
    exact = quantized * scale.repeat_interleave(matmul8.GROUP_SIZE, dim=1)[:, :300] @ weight.float().T
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-4)


def test_int8_values_are_transposed_as_they_are() -> None:
    quantized = torch.randint(-127, 128, (7, 5), dtype=torch.int8)
    out = torch.empty(5, 7, dtype=torch.int8)
    matmul8.transpose_into(quantized, out)
    assert torch.equal(out, quantized.T)


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        (devices.T4, torch.int8),
        (devices.A100, torch.int8),
        (devices.RTX_3060, torch.int8),
        (devices.RTX_4090, FP8),
        (devices.H200, FP8),
        (devices.UNKNOWN_GPU, FP8),
        (devices.CPU, FP8),
        (devices.MI300X, FP8),  # only for tests of the references: there 8-bit matmuls are off
    ],
)
def test_gradients_are_int8_on_nvidia_gpus_without_fp8(device: Capabilities, kind: torch.dtype) -> None:
    assert matmul8.gradient_type_for(device) is kind


def test_the_type_of_gradients_on_this_cpu_and_in_plans() -> None:
    assert matmul8.gradient_type(torch.device("cpu")) is matmul8.gradient_type(torch.device("meta")) is FP8


@pytest.mark.parametrize("kind", [torch.int8, FP8])
def test_a_prescale_is_applied_before_rounding(kind: torch.dtype) -> None:
    x, prescale = rows(M, 50), torch.rand(50) + 0.1
    actual, expected = quantize_rows(x, kind, prescale=prescale), quantize_rows(x * (prescale / 127), kind)
    assert torch.equal(actual.values.float(), expected.values.float())
    assert torch.equal(actual.scale, expected.scale)


@pytest.mark.parametrize("kind", [torch.int8, FP8])
def test_a_row_of_zeros_stays_zero_and_one_that_is_not_finite_stays_so(kind: torch.dtype) -> None:
    x = rows(4, 50)
    x[0], x[1, 3], x[2, 4] = 0, math.nan, math.inf
    quantized, scale = quantize_rows(x, kind)
    assert bool((quantized[0].float() == 0).all())
    assert math.isfinite(scale[0])
    out = torch.empty(4, 16)
    matmul8.matmul_8bit_into(quantized, scale, torch.ones(16, 50).to(kind), out)
    assert bool((out[0] == 0).all())
    assert not bool(out[1:3].isfinite().any())
    assert bool(out[3].isfinite().all())


def test_transposed_values_keep_four_binary_digits() -> None:
    quantized = torch.arange(-127, 128, dtype=torch.int8).repeat(2, 1)
    out = torch.empty(255, 2, dtype=FP8)
    matmul8.transpose_into(quantized, out)
    actual = out.float()[:, 0]
    assert torch.equal(out.float()[:, 1], actual)
    small = quantized[0].abs() <= 16
    assert torch.equal(actual[small], quantized[0][small].float())
    assert bool(((actual - quantized[0]).abs() <= quantized[0].float().abs() * HALF_DIGIT).all())


@pytest.mark.parametrize(("rows", "columns", "expected"), [(16, 32, True), (24, 32, False), (32, 40, False)])
def test_only_aligned_shapes_are_multiplied_in_8_bits(rows: int, columns: int, expected: bool) -> None:
    assert matmul8.fits(rows, columns) is expected


def filled_with(matrix: Tensor) -> Callable[[Tensor], None]:
    def fill(out: Tensor) -> None:
        out.copy_(matrix)

    return fill


def stored_weight(quantized: Tensor, absmax: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda like: (quantized, absmax)


def fused_linear_of(
    columns: list[int], *, use_8bit: bool, rank: int = 3, dropout: float = 0.0, probe: QuantErrorProbe | None = None
) -> tuple[FusedLinear, list[Tensor]]:
    """(the fused linear of matrices with so many columns, each with a bias and LoRA; the float32 matrices)."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    parts, matrices = [], []
    for k in columns:
        stored = SCHEMES["int8"].quantize(drawn(N, k) * torch.logspace(-1, 1, N)[:, None])
        quantized, absmax = stored["weight"], stored["absmax"]
        matrix = quantized * (absmax / 127)[:, None]
        lora = LoraSlice(4, 20, drawn(rank, k).requires_grad_(), drawn(16, rank).requires_grad_(), 0.5)
        bias = drawn(8).requires_grad_()
        spec = Matmul8(probe=probe) if use_8bit or probe else None
        weight = stored_weight(quantized, absmax)
        parts.append(LinearSpec(N, k, filled_with(matrix), bias, 2, (lora,), dropout, weight, spec))
        matrices.append(matrix)
    return FusedLinear(tuple(parts)), matrices


def seeds(*numbers: int) -> list[Seed | None]:
    return [partial(_seeded, number) for number in numbers]


def _seeded(number: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(number)


def completed(linear: FusedLinear, x: Tensor, dropout_seeds: list[Seed | None]) -> GemmInput:
    gemm_input = linear.gemm_input(len(x), x)
    for part in x.split([part.columns for part in linear.parts], dim=1):
        gemm_input.put(part)
    linear.complete_(gemm_input, dropout_seeds)
    return gemm_input


def both(
    linear: FusedLinear, x: Tensor, dy: Tensor, dropout_seeds: list[Seed | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """Backward: (the gradient of the input, those of the trained tensors)."""
    dx, actual = linear.backward(dy, completed(linear, x, dropout_seeds), dropout_seeds, wants_dx=True)
    assert dx is not None
    return torch.cat(dx, dim=1), actual


@pytest.mark.parametrize("columns", [[48], [32, 64]])
@pytest.mark.parametrize("residual", [False, True])
def test_forward_differs_from_the_exact_matmul_by_half_a_step_of_each_input(columns: list[int], residual: bool) -> None:
    fast, matrices = fused_linear_of(columns, use_8bit=True)
    exact, _ = fused_linear_of(columns, use_8bit=False)
    assert fast.use_8bit
    assert not exact.use_8bit
    x, base = rows(M, sum(columns)), torch.randn(M, N) if residual else None
    expected = exact.matmul(completed(exact, x, seeds(0, 0)[: len(columns)]), residual=base)
    actual = fast.matmul(completed(fast, x, seeds(0, 0)[: len(columns)]), residual=base)
    limit = torch.zeros(M, N)
    for part, matrix in zip(x.split(columns, dim=1), matrices, strict=True):
        limit += part.abs().amax(1)[:, None] / 127 * 0.5 * matrix.abs().sum(1)
    error = (actual - expected).abs()
    assert bool((error <= limit * 1.001 + 1e-5 * expected.abs()).all())
    assert float(error.max()) > 0
    if base is not None:
        assert not torch.equal(base, actual)


@pytest.mark.parametrize("columns", [[48], [32, 64]])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_backward_differs_by_the_digits_of_fp8_and_only_in_the_gradient_to_the_input(
    columns: list[int], dropout: float
) -> None:
    fast, matrices = fused_linear_of(columns, use_8bit=True, dropout=dropout)
    exact, _ = fused_linear_of(columns, use_8bit=False, dropout=dropout)
    dropout_seeds = seeds(5, 6)[: len(columns)]
    x, dy = rows(M, sum(columns)), rows(M, N)
    expected, gradients = both(exact, x, dy, dropout_seeds)
    actual, actual_gradients = both(fast, x, dy, dropout_seeds)
    limit = []
    for matrix in matrices:
        absmax = matrix.abs().amax(1)
        scaled = (dy * absmax).abs()
        tiny = scaled.amax(1, keepdim=True) / 448 * LEAST  # the error of a value below the smallest fp8 number
        limit.append(
            (scaled * ((1 + HALF_DIGIT) ** 2 - 1) + tiny * (1 + HALF_DIGIT)) @ (matrix.abs() / absmax[:, None])
        )
    assert bool(((actual - expected).abs() <= torch.cat(limit, 1) * 1.001 + 1e-5 * expected.abs()).all())
    assert not torch.equal(actual, expected)
    for mine, other in zip(actual_gradients, gradients, strict=True):
        assert mine is not None
        assert other is not None
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize("columns", [[48], [32, 64]])
def test_a_gradient_in_int8_differs_by_half_a_step_of_its_groups(
    columns: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs without fp8. The weight is multiplied without a copy."""
    monkeypatch.setattr(matmul8, "gradient_type", lambda _: torch.int8)
    fast, matrices = fused_linear_of(columns, use_8bit=True)
    exact, _ = fused_linear_of(columns, use_8bit=False)
    dropout_seeds, x, dy = seeds(0) * len(columns), rows(M, sum(columns)), rows(M, N)
    expected, _ = both(exact, x, dy, dropout_seeds)
    actual, _ = both(fast, x, dy, dropout_seeds)
    limit = []
    for matrix in matrices:
        absmax = matrix.abs().amax(1)
        step = (dy * absmax).abs().amax(1, keepdim=True) / 127
        limit.append(step / 2 * (matrix.abs() / absmax[:, None]).sum(0))
    assert bool(((actual - expected).abs() <= torch.cat(limit, 1) * 1.001 + 1e-5 * expected.abs()).all())
    assert not torch.equal(actual, expected)


def test_without_a_gradient_to_the_input_nothing_is_multiplied_with_the_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for use_8bit in (True, False):
        linear, _ = fused_linear_of([48], use_8bit=use_8bit)
        x, dy = rows(M, 48), rows(M, N)
        gemm_input = completed(linear, x, seeds(0))
        _, expected = linear.backward(dy, gemm_input, seeds(0), wants_dx=True)
        monkeypatch.setattr(FusedLinear, "matrix", lambda *_: pytest.fail("the matrix was written"))
        monkeypatch.setattr(matmul8, "matmul_8bit_into", lambda *_: pytest.fail("a matmul was computed"))
        dx, actual = linear.backward(dy, gemm_input, seeds(0), wants_dx=False)
        monkeypatch.undo()
        assert dx is None
        for mine, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-5, atol=1e-3)


@pytest.mark.parametrize("columns", [[48], [32, 64]])
def test_outlier_channels_are_multiplied_exactly_and_do_not_enlarge_the_steps_of_the_others(columns: list[int]) -> None:
    fast, matrices = fused_linear_of(columns, use_8bit=True)
    exact, _ = fused_linear_of(columns, use_8bit=False)
    outliers = torch.tensor([3, 17, 30])
    split = FusedLinear(
        tuple(part._replace(matmul8=Matmul8(split_outliers(outliers, part.columns))) for part in fast.parts)
    )
    x = torch.randn(M, sum(columns))
    near = x.clone()
    start = 0
    for k in columns:
        x[:, start + outliers] *= 1000
        near[:, start + outliers] = 0
        start += k
    dropout_seeds = seeds(0) * len(columns)
    expected = exact.matmul(completed(exact, x, dropout_seeds))
    limit = torch.zeros(M, N)  # as if there were no outlier channels
    for part, matrix in zip(near.split(columns, dim=1), matrices, strict=True):
        limit += part.abs().amax(1)[:, None] / 127 * 0.5 * matrix.abs().sum(1)
    whole, actual = (linear.matmul(completed(linear, x, dropout_seeds)) for linear in (fast, split))
    assert bool(((actual - expected).abs() <= limit * 1.001 + 1e-5 * expected.abs()).all())
    assert float((actual - expected).norm()) < 0.02 * float((whole - expected).norm())


def test_a_matmul_with_outlier_channels_only_is_exact() -> None:
    fast, _ = fused_linear_of([32], use_8bit=True)
    exact, _ = fused_linear_of([32], use_8bit=False)
    split, x = (
        FusedLinear((fast.parts[0]._replace(matmul8=Matmul8(split_outliers(torch.arange(32), 32))),)),
        rows(M, 32),
    )
    actual, expected = split.matmul(completed(split, x, seeds(0))), exact.matmul(completed(exact, x, seeds(0)))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-3)


def test_a_probe_finds_the_channels_with_the_largest_values() -> None:
    probe = QuantErrorProbe()
    probed, _ = fused_linear_of([64], use_8bit=False, probe=probe)
    x = torch.randn(M, 64).clamp(-1, 1)
    x[2, 40], x[5, 7], x[:, 9] = -900.0, 700.0, 500.0
    probed.matmul(completed(probed, x, seeds(0)))
    assert probe.channels is not None
    assert {7, 9, 40} < set(probe.channels.tolist())
    assert probe.channels.tolist() == sorted(set(probe.channels.tolist()))
    assert len(probe.channels) == 16
    split = FusedLinear((probed.parts[0]._replace(matmul8=Matmul8(split_outliers(probe.channels, 64))),))
    exact, _ = fused_linear_of([64], use_8bit=False)
    plain, actual = exact.matmul(completed(exact, x, seeds(0))), split.matmul(completed(split, x, seeds(0)))
    assert probe.outliers is not None
    torch.testing.assert_close(probe.outliers, (actual - plain).norm() / (plain - plain.mean(0)).norm())
    assert probe.forward is not None
    assert probe.outliers < 0.1 * probe.forward


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_probe_measures_forward_and_backward_and_changes_no_result(dropout: float) -> None:
    probe = QuantErrorProbe()
    probed, _ = fused_linear_of([32, 64], use_8bit=False, probe=probe, dropout=dropout)
    exact, _ = fused_linear_of([32, 64], use_8bit=False, dropout=dropout)
    fast, _ = fused_linear_of([32, 64], use_8bit=True, dropout=dropout)
    x, dy = rows(M, 96), rows(M, N)
    gemm_inputs = [completed(linear, x, seeds(0, 0)) for linear in (probed, exact, fast)]
    base = torch.randn(M, N)
    assert torch.equal(probed.matmul(gemm_inputs[0], residual=base), exact.matmul(gemm_inputs[1], residual=base))
    plain, eighth = exact.matmul(gemm_inputs[1]), fast.matmul(gemm_inputs[2])
    assert probe.forward is not None
    torch.testing.assert_close(probe.forward, (eighth - plain).norm() / (plain - plain.mean(0)).norm())
    actual, expected, rough = (both(linear, x, dy, seeds(0, 0))[0] for linear in (probed, exact, fast))
    assert probe.backward is not None
    assert torch.equal(actual, expected)
    torch.testing.assert_close(probe.backward, (rough - expected).norm() / expected.norm())


def test_a_matmul_with_a_part_that_cannot_be_in_8_bits_is_not_measured() -> None:
    probe = QuantErrorProbe()
    probed, _ = fused_linear_of([32, 64], use_8bit=False, probe=probe)
    parts = (probed.parts[0], probed.parts[1]._replace(matmul8=None))
    mixed, x = FusedLinear(parts), rows(M, 96)
    gemm_input = completed(mixed, x, seeds(0, 0))
    mixed.matmul(gemm_input)
    mixed.backward(rows(M, N), gemm_input, seeds(0, 0), wants_dx=True)
    assert (mixed.probe, probe.forward, probe.backward) == (None, None, None)


def test_the_scale_of_a_row_equals_that_of_the_reference() -> None:
    """tests/kernels/test_parity.py compares the quantized values; this test compares the scales."""
    from octavo.kernels import matmul8 as kernels

    place = "cuda" if torch.cuda.is_available() else "cpu"
    for kind in (torch.int8, FP8):
        x, prescale = rows(M, 70).to(place), torch.rand(70, device=place)
        x[2, 5] = math.nan
        expected, quantized, scale = (
            quantize_rows(x, kind, prescale=prescale),
            torch.empty(M, 70, dtype=kind, device=place),
            x.new_empty(M),
        )
        with np.errstate(invalid="ignore"):  # NaN has no int8 value; its scale is compared
            kernels.quantize_rows_into(x, quantized, scale, prescale)
        torch.testing.assert_close(scale, expected.scale, rtol=1e-6, atol=0, equal_nan=True)
        assert bool(scale[2].isnan())
        assert not bool(scale[3].isnan())
