"""hardware/rates.py: the rates of a training step on a GPU, and what they are made of."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from octavo.hardware import GPUS, Measured, Peak, basis, rates, rates_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_nine_of_ten_measured_steps_are_within_the_error_of_the_forecast() -> None:
    """The text of `basis` has the counts."""
    ratios = []
    for name in ("plan.csv", "plan_families.csv"):
        with (BENCHMARKS / name).open(encoding="utf-8", newline="") as file:
            ratios += [float(row["seconds"]) / float(row["forecast_seconds"]) for row in csv.DictReader(file)]
    low, high = rates.STEPS_ERROR
    within = sum(low <= ratio <= high for ratio in ratios)
    assert f"Of {len(ratios)} settings" in basis(GPUS["H100"], "H100")
    assert f"{within} took {low:g} to {high:g} times" in basis(GPUS["H100"], "H100")
    assert within / len(ratios) > 0.87


def test_an_h100_has_the_rates_that_its_steps_reached() -> None:
    h100 = rates_of(GPUS["H100"])
    assert h100.matmul == rates.Rate(0.70 * 989e12)
    assert h100.memory == rates.Rate(0.44 * 3350e9)


@pytest.mark.parametrize("key", [key for key, row in GPUS.items() if not row.measured.steps])
def test_the_range_is_wider_the_less_was_published(key: str) -> None:
    gpu, found = GPUS[key], rates_of(GPUS[key])
    for rate, published in (
        (found.matmul, gpu.measured.half_flops_per_second),
        (found.memory, gpu.measured.memory_share),
    ):
        assert rate.spread >= (1.25 if published else math.sqrt(2))
        assert rate.at(-1) * rate.spread == pytest.approx(rate.per_second)
        assert rate.at(1) == min(rate.per_second * rate.spread, rate.most)
    assert found.matmul8.at(1) <= gpu.int8_ops_per_second
    assert found.matmul.most >= gpu.half_flops_per_second
    if gpu.measured.half_flops_per_second is not None:
        highest = max(gpu.half_flops_per_second, *gpu.measured.half_flops_per_second)
        assert found.matmul.at(1) <= highest * 1.0001
    assert min(found.matmul8.spread, found.attention.spread) >= math.sqrt(2)
    share = found.matmul.per_second / gpu.half_flops_per_second  # what holds 16 bits back holds 8 bits back
    assert found.matmul8.per_second == pytest.approx(min(0.70, share) * gpu.int8_ops_per_second)


@pytest.mark.parametrize("key", [key for key, row in GPUS.items() if row.measured.half_flops_per_second])
def test_the_range_of_matmuls_has_the_published_figures_times_an_h100s_part_of_its_own(key: str) -> None:
    gpu = GPUS[key]
    if not gpu.measured.steps:
        low, high = (rates.STEP_MATMUL * flops for flops in gpu.measured.half_flops_per_second or ())
        rate = rates_of(gpu).matmul
        assert rate.at(-1) <= low * 1.0001
        assert high <= rate.at(1) * 1.0001
        assert rate.at(1) / rate.at(-1) <= max(1.25**2, high / low) * 1.0001


def test_a_gpu_without_figures_has_those_of_its_compute_capability() -> None:
    """An RTX 3060 has the share of the peak of the RTX 3090, the 3090 Ti and the A6000, and its own memory figure."""
    others = [GPUS[key] for key in ("RTX 3090", "RTX 3090 Ti", "RTX A6000")]
    shares = [flops / row.half_flops_per_second for row in others for flops in row.measured.half_flops_per_second or ()]
    expected = rates.STEP_MATMUL * math.sqrt(min(shares) * max(shares)) * 25.5e12
    assert rates_of(GPUS["RTX 3060"]).matmul.per_second == pytest.approx(expected)
    assert rates_of(GPUS["RTX 3060"]).memory.per_second == pytest.approx(0.44 / 0.80 * 0.90 * 360e9)


def test_a_gpu_of_an_unknown_generation_has_the_shares_of_an_h100() -> None:
    found = rates_of(Peak(1e14, 2e14, 1e12, 1e10, (11, 0)))
    assert found.matmul == rates.Rate(0.70 * 1e14, rates.SIMILAR, 1e14)
    assert found.memory == rates.Rate(0.44 * 1e12, rates.SIMILAR, 1e12)


def test_attention_below_8_0_is_slower_than_flash_attention_as_measured_on_an_h100() -> None:
    """Memory-efficient kernels take 8.3 times as long as cuDNN, FlashAttention 2 1.6 times; heads of 256."""
    turing, ampere = rates_of(GPUS["T4"]).attention, rates_of(GPUS["A100 40GB"]).attention
    assert turing.at(-1) / 65e12 == pytest.approx(0.59 / 8.3, rel=0.01)
    assert ampere.per_second / 312e12 == pytest.approx(0.59 / 1.6, rel=0.01)
    assert ampere.at(1) / 312e12 == pytest.approx(0.59, rel=0.01)


def test_a_t4_does_not_reach_half_of_its_data_sheet() -> None:
    assert rates_of(GPUS["T4"]).matmul.per_second < 0.5 * 65e12


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("H200", "rates that octavo reached on an H100"),
        ("RTX 4090", "its 16-bit matmuls and memory; for 8-bit matmuls and attention an estimate from other GPUs"),
        ("P100", "its 16-bit matmuls and memory; for attention an estimate from other GPUs"),
        ("RTX 3060", "its memory; for all other work an estimate from other GPUs"),
        ("RTX 5060", "No published rates of it were found; for all work an estimate from other GPUs"),
    ],
)
def test_the_text_says_what_a_time_rests_on(name: str, text: str) -> None:
    assert text in basis(GPUS[name], name)
    assert basis(GPUS[name], name).startswith("The times are computed, not measured: ")


def test_the_sources_page_has_every_figure_of_the_table() -> None:
    page = (BENCHMARKS.parent / "docs/design/gpu-times.md").read_text(encoding="utf-8")
    for key, row in GPUS.items():
        figures = [flops / 1e12 for flops in row.measured.half_flops_per_second or ()]
        memory = [f"{row.measured.memory_share:.2f}"] if row.measured.memory_share else []
        for figure in [*memory, *(f"{flops:.4g}" for flops in figures)]:
            assert figure in page, (key, figure)
    assert Measured() == Measured(None, None, steps=False)
