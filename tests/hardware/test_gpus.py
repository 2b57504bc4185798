"""The recognition of GPUs by name, and their peak throughput."""

from __future__ import annotations

import pytest

from octavo import hardware


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 2080 Ti", "RTX 2080 Ti"),
    ],
)
def test_a_gpu_is_found_by_the_name_from_its_driver(name: str, key: str) -> None:
    assert hardware.peak(name) is hardware.GPUS[key]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 3080 Ti",
        "NVIDIA GeForce RTX 4060 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA L40S",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "AMD EPYC",
        "",
    ],
)
def test_a_gpu_with_a_similar_name_is_unknown(name: str) -> None:
    assert hardware.peak(name) is None


def test_int8_has_twice_the_rate_of_half_precision_on_server_gpus_and_four_times_on_geforce() -> None:
    for key, row in hardware.GPUS.items():
        times = 4 if key.startswith("RTX ") and key != "RTX A6000" else 2
        assert row.int8_ops_per_second / row.half_flops_per_second == pytest.approx(times, rel=0.02), key


@pytest.mark.parametrize(("name", "expected"), [("T4", False), ("A100 80GB", True), ("H200", True)])
def test_8bit_matmuls_are_planned_from_compute_capability_8_on(name: str, expected: bool) -> None:
    assert hardware.GPUS[name].matmul_8bit is expected
