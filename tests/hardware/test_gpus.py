"""The recognition of GPUs by name, and their peak throughput."""

from __future__ import annotations

import re

import pytest

from octavo import hardware
from octavo.hardware.pretend import MODELS


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
        ("NVIDIA GeForce RTX 3080 Ti", "RTX 3080 Ti"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("NVIDIA GeForce RTX 2060 SUPER", "RTX 2060 Super"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("NVIDIA GeForce GTX 1080 Ti", "GTX 1080 Ti"),
        ("Tesla P100-PCIE-16GB", "P100"),
        ("Tesla P100-SXM2-16GB", "P100 SXM2"),
        ("Quadro RTX 5000", "Quadro RTX 5000"),
        ("RTX 3060 8GB", "RTX 3060 8GB"),
        ("rtx4060ti", "RTX 4060 Ti"),
        ("RTX4070TiSuper", "RTX 4070 Ti Super"),
        ("GTX1080Ti", "GTX 1080 Ti"),
        ("RTX 4070 TiSuper", "RTX 4070 Ti Super"),
        ("RTX 3080 12 GB", "RTX 3080 12GB"),
        ("RTX 3080 12GiB", "RTX 3080 12GB"),
        ("RTX 3060 12GB", "RTX 3060"),
        ("80 GB A100 PCIe", "A100 80GB PCIe"),
        ("H200 141GB", "H200"),
        ("NVIDIA B200", "B200"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("Tesla V100-SXM3-32GB", "V100 32GB"),
        ("Tesla V100-PCIE-32GB", "V100 32GB PCIe"),
        ("Tesla V100S-PCIE-32GB", "V100S"),
        ("NVIDIA TITAN V", "Titan V"),
        ("NVIDIA TITAN RTX", "Titan RTX"),
        ("NVIDIA TITAN Xp", "Titan Xp"),
        ("Tesla P40", "P40"),
        ("Quadro P5000", "Quadro P5000"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA A30", "A30"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA RTX A4000", "RTX A4000"),
        ("NVIDIA RTX A2000 12GB", "RTX A2000 12GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX 5000 Ada Generation", "RTX 5000 Ada"),
        ("Quadro RTX 8000", "Quadro RTX 8000"),
        ("NVIDIA GeForce RTX 3050", "RTX 3050"),
        ("NVIDIA GeForce GTX 1660 Ti", "GTX 1660 Ti"),
        ("NVIDIA GeForce GTX 1660 SUPER", "GTX 1660 Super"),
        ("NVIDIA GeForce GTX 1080", "GTX 1080"),
        ("NVIDIA GeForce GTX 1070 Ti", "GTX 1070 Ti"),
    ],
)
def test_a_gpu_is_found_by_the_name_from_its_driver(name: str, key: str) -> None:
    assert hardware.peak(name) is hardware.GPUS[key]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 3080 Ti Laptop GPU",
        "Quadro RTX 5000 with Max-Q Design",
        "NVIDIA RTX 4000 Ada Generation",
        "NVIDIA RTX 4000 SFF Ada Generation",
        "NVIDIA RTX 5000 Ada Generation Laptop GPU",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        "Tesla V100-FHHL-16GB",
        "NVIDIA A10-24Q",
        "NVIDIA TITAN X (Pascal)",
        "NVIDIA GeForce GTX 1060 6GB",
        "NVIDIA GeForce RTX 4060 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA L40G",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "RTX 2080 MaxQ",
        "NVIDIA H100 64GB HBM2",
        "NVIDIA H100 96GB HBM3",
        "Tesla P100-PCIE-12GB",
        "NVIDIA GeForce RTX 4090 48GB",
        "NVIDIA GeForce RTX 3080 20GB",
        "NVIDIA GeForce RTX 2080 Ti 22 GB",
        "RTX 4060 Ti 12GB",
        "GRID T4-4Q",
        "NVIDIA L4-2B",
        "NVIDIA RTX A6000-8Q",
        "NVIDIA L4-1C",
        "NVIDIA L4-4A",
        "GRID T4-2B4",
        "NVIDIA H100-1-10CME",
        "NVIDIA H100 CNX",
        "NVIDIA RTX A6000 Ada Generation",
        "NVIDIA RTX 5090 Blackwell",
        "2x RTX 4090",
        "2 x RTX 4090",
        "2 RTX 4090",
        "2\u00d7 RTX 4090",
        "RTX 4090 x2",
        "AMD EPYC",
        "",
    ],
)
def test_a_gpu_with_a_similar_name_is_unknown(name: str) -> None:
    assert hardware.peak(name) is None


def test_int8_has_twice_the_rate_of_half_precision_on_server_gpus_and_four_times_on_geforce() -> None:
    for key, row in hardware.GPUS.items():
        workstation = key.startswith(("RTX A", "Titan RTX")) or key.endswith(" Ada")
        pascal = key.startswith(("Titan Xp", "P4", "Quadro P"))  # DP4A, as on the GTX 10
        geforce = pascal or (key.startswith(("RTX ", "GTX ")) and not workstation)
        volta = row.compute_capability == (7, 0)  # 16-bit tensor cores, and int8 without
        times = 1 if key.startswith("P100") else 0.5 if volta else 4 if geforce else 2
        ratio, error = row.int8_ops_per_second / row.half_flops_per_second, 0.09 if volta else 0.02
        assert ratio == pytest.approx(times, rel=error), key


def test_a_gpu_without_one_usual_memory_has_keys_with_sizes() -> None:
    for key, row in hardware.GPUS.items():
        sizes = [hardware.GPUS[other].memory_gib for other in hardware.other_sizes(key)]
        assert row.memory_gib is not None or len(sizes) > 1, key
        assert row.memory_gib not in sizes, key
        if size := re.search(r"(\d+)GB", key):
            assert row.memory_gib == int(size[1])
    assert hardware.other_sizes("NVIDIA GeForce RTX 3060") == ["RTX 3060 8GB"]
    assert hardware.other_sizes("RTX 4060 Ti") == ["RTX 4060 Ti 16GB", "RTX 4060 Ti 8GB"]
    assert hardware.other_sizes("RTX 3060 8GB") == hardware.other_sizes("no GPU") == []


def test_a_run_can_count_on_less_than_the_memory_of_the_data_sheet() -> None:
    t4, unknown = hardware.GPUS["T4"], hardware.GPUS["RTX 4060 Ti"]
    assert t4.usable_bytes is not None
    assert t4.usable_bytes < 15 * 2**30  # of 16 GB: the other 1/16 is for ECC
    assert unknown.usable_bytes is None


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("RTX 4090 48GB", ["RTX 4090"]),
        ("GTX 4090", ["RTX 4090"]),
        ("RTX 1080 Ti", ["GTX 1080 Ti"]),
        ("RXT 4090", ["RTX 4090"]),
        ("NVIDIA GeForce RXT 3090", ["RTX 3090"]),
        ("RTX A 6000", ["RTX A6000"]),
        ("A-100 80GB", ["A100 80GB"]),
        ("RTX 4060 Ti 12GB", ["RTX 4060 Ti", "RTX 4060 Ti 16GB", "RTX 4060 Ti 8GB"]),
        ("2x RTX 4090", ["RTX 4090"]),
        ("2 RTX 4090", ["RTX 4090"]),
    ],
)
def test_a_similar_name_is_a_spelling_of_the_same_gpu(name: str, keys: list[str]) -> None:
    assert hardware.gpu_named(name) is None
    assert hardware.nearest(name) == keys


@pytest.mark.parametrize(
    "name",
    [
        "GTX 1060", "GTX 1060 6GB", "GTX 980 Ti", "RTX 4090 Laptop", "RTX 4090 D", "RTX 4090D", "RTX 4000 Ada", "T400",
        "T1000", "B300", "RTX 9999", "RTX 3061", "Quadro RTX 5000 with Max-Q Design", "RTX PRO 6000 Blackwell", "L20",
        "H20", "H100 NVL", "GRID T4-4Q", "H100 MIG 1g.10gb", "MI300X", "Arc B580", "RTX", "GTX", "laptop", "",
    ],
)  # fmt: skip
def test_another_number_generation_or_variant_is_no_similar_name(name: str) -> None:
    assert hardware.gpu_named(name) is None
    assert hardware.nearest(name) == []


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("P100", False, False),
        ("GTX 1080 Ti", False, False),
        ("V100 32GB", False, False),
        ("T4", True, False),
        ("GTX 1660 Ti", False, False),
        ("A100 80GB", True, True),
    ],
)
def test_8bit_matmuls_are_planned_for_the_passes_that_have_them(name: str, forward: bool, backward: bool) -> None:
    gpu = hardware.GPUS[name]
    assert (gpu.matmul_8bit, gpu.backward_8bit) == (forward, backward)


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (("T4", "t4", "Tesla T4"), "T4"),
        (("P100", "p100", "Tesla P100"), "P100"),
        (("1080Ti", "1080 ti", "GTX1080Ti", "NVIDIA GeForce GTX 1080 Ti"), "GTX 1080 Ti"),
        (("RTX5000", "rtx 5000", "5000", "Quadro RTX 5000", "QuadroRTX5000"), "Quadro RTX 5000"),
        (("A6000", "RTXA6000", "rtx a6000"), "RTX A6000"),
        (("3060", "RTX3060", "GeForce 3060", "3060 12GB"), "RTX 3060"),
        (("3060 8GB",), "RTX 3060 8GB"),
        (("4090", "RTX4090"), "RTX 4090"),
        (("5090", "rtx 5090"), "RTX 5090"),
        (("4070TiSuper",), "RTX 4070 Ti Super"),
        (("4060ti 16gb",), "RTX 4060 Ti 16GB"),
        (("1080", "GTX1080"), "GTX 1080"),
        (("1660ti", "GTX1660 Ti"), "GTX 1660 Ti"),
        (("V100 32GB", "v100 32 GB"), "V100 32GB"),
        (("l40s", "Tesla L40S"), "L40S"),
        (("titan rtx", "TitanRTX"), "Titan RTX"),
        (("6000", "RTX 6000"), "Quadro RTX 6000"),
        (("6000 Ada", "RTX6000 Ada", "Quadro RTX 6000 Ada", "RTX 6000 Ada Generation"), "RTX 6000 Ada"),
    ],
)
def test_a_person_may_leave_out_the_brand_blanks_and_case(names: tuple[str, ...], key: str) -> None:
    assert [hardware.gpu_named(name) for name in names] == [key] * len(names)


def test_the_names_of_pretend_are_names_of_the_same_gpus() -> None:
    for name, model in MODELS.items():
        key = hardware.gpu_named(name)
        assert key is not None, name
        assert hardware.GPUS[key] is hardware.peak(model.name)
        assert hardware.GPUS[key].compute_capability == model.compute_capability


def test_every_key_is_a_name() -> None:
    assert [hardware.gpu_named(key) for key in hardware.GPUS] == list(hardware.GPUS)
    assert [hardware.peak(key) for key in hardware.GPUS] == list(hardware.GPUS.values())


@pytest.mark.parametrize(
    "name",
    [
        "RTX 4000 Ada", "4000 Ada", "4090 Laptop", "4090 D", "4090 48GB", "GTX 4090", "Quadro 4090", "1060", "titan",
        "RTX", "", "A100", "V100", "Titan X", "RTX 1080", "T4-4Q", "RTX A6000 Ada", "RTX 5000 Blackwell",
        "GRID T4-2B4", "2x 4090", "2x4090", "4090 x2", "2 4090",
    ],
)  # fmt: skip
def test_a_name_of_another_gpu_or_of_several_is_none(name: str) -> None:
    assert hardware.gpu_named(name) is None


def test_the_gpus_of_an_ambiguous_name() -> None:
    assert hardware.gpus_with("a100") == ["A100 40GB", "A100 80GB", "A100 80GB PCIe"]
    assert hardware.gpus_with("V100") == ["V100 16GB", "V100 16GB PCIe", "V100 32GB", "V100 32GB PCIe"]
    assert hardware.gpus_with("titan") == ["Titan RTX", "Titan V", "Titan Xp"]
    assert hardware.gpus_with("RTX") == hardware.gpus_with("RTX 4000 Ada") == []


@pytest.mark.parametrize("size", ["8GB", "8 GB", "8G", "8 GiB", "8192MiB", "8192 MB"])
def test_a_memory_size_has_any_unit(size: str) -> None:
    assert hardware.gpu_named(f"RTX 3060 {size}") == "RTX 3060 8GB"
    assert hardware.gpu_named(f"RTX 3060 {size.replace('8', '6', 1)}") is None, "not the RTX 3060 with 12 GB"
