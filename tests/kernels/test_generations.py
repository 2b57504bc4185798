"""Every kernel compiled for every generation of NVIDIA GPUs since 2016, in the shapes of real models. No GPU is needed.

The kernels and tiles are those that a call chooses there (tests/kernels/compiled.py). The bytes of SPILLS are those of
Triton 3.7.1, the version in constraints.txt, with its own ptxas; other versions spill others.
"""

from __future__ import annotations

import pytest
from tests import devices
from tests.kernels.cases import CASES
from tests.kernels.gpu_table import chosen_now, on_page, rows_of
from tests.kernels.real_calls import CALLS, REFERENCES, not_called

from octavo.hardware import Capabilities
from octavo.runtime.dispatch import KERNELS

GPUS = {60: 48, 61: 48, 70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory
DEVICES = {
    10 * each.compute_capability[0] + each.compute_capability[1]: each
    for each in vars(devices).values()
    if isinstance(each, Capabilities) and each.compute_capability is not None
}
TENSOR_CORES = {"mma.sync", "wgmma", "tcgen05"}
AMPERE = 80
DOTS = {
    "inference.matmul", "cached_attention.prefill_attention", "softcap.softcapped_forward",
    "softcap.softcapped_backward", "matmul8.matmul_8bit_into",
}  # fmt: skip
HOPPER_DOTS = {f"lora_backward.{name}_lora_backward_" for name in ("gelu", "swiglu", "geglu")}

# Bytes of stack a thread, by kernel and GPU: the largest of its variants. Where they have a cause that is known:
# - inference._matmul: low-rank GEMMs of rank 64 in a tile of 128 rows in any order, or of 32 rows of a float weight.
# - matmul8._matmul_8bit: low-rank terms of rank 128 on an A100; on Hopper with a Triton without the kernel for Hopper.
# - hopper.matmul8._matmul_8bit: with bias or residual. This tile and those of softcap on Hopper were the fastest on an
#   H200; B200 takes the latter.
SPILLS = {
    ("inference._matmul", 80): 16, ("inference._matmul", 86): 16, ("inference._matmul", 89): 16,
    ("inference._matmul", 90): 296, ("inference._matmul", 100): 232, ("inference._matmul", 120): 40,
    ("cached_attention._prefill", 90): 16, ("loss._cross_entropy", 70): 8,
    ("matmul8._matmul_8bit", 80): 64, ("matmul8._matmul_8bit", 90): 32, ("hopper.matmul8._matmul_8bit", 90): 144,
    ("softcap._forward", 90): 24, ("softcap._backward_kv", 90): 56, ("softcap._forward", 100): 72,
    ("softcap._backward_kv", 100): 16, ("softcap._forward", 120): 32, ("softcap._backward_q", 120): 8,
}  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", GPUS)
def test_every_operation_has_a_kernel_that_the_gpu_runs_well(capability: int) -> None:
    rows = list(rows_of(str(capability)))
    assert {(row["operation"], row["call"]) for row in rows} == {call[:2] for call in CALLS}
    for row in rows:
        if not row["kernel"]:
            assert capability < AMPERE, row
            assert row["reference"] == (
                not_called(row["operation"], row["call"], DEVICES[capability]) or REFERENCES[row["operation"]]
            )
            continue
        assert row["dot"] in ({"", *TENSOR_CORES} if capability >= AMPERE else {""}), row
        assert row["shared"] <= GPUS[capability] * 1024, row
        assert row["stack"] <= SPILLS.get((row["kernel"], capability), 0), row
        assert capability >= AMPERE or not row["half"], row
    expected_dots = DOTS if capability >= AMPERE else set[str]()
    assert {row["operation"] for row in rows if row.get("dot")} == expected_dots | (
        HOPPER_DOTS if capability == 90 else set[str]()
    )


def test_every_operation_has_a_call_in_a_real_shape_that_the_page_shows() -> None:
    assert set(CASES) == set(KERNELS) == {call.operation for call in CALLS if call.shown}
    assert len({call[:2] for call in CALLS}) == len(CALLS)


def test_the_page_has_the_kernels_that_calls_choose() -> None:
    """docs/design/kernels-by-gpu.md. If it fails: `python -m tests.kernels.gpu_table`."""
    assert on_page() == chosen_now()


def test_the_page_has_the_gpus_with_flash_attention() -> None:
    """The page says 8.0 and higher."""
    assert [gpu for gpu in GPUS if DEVICES[gpu].flash_attention] == [gpu for gpu in GPUS if gpu >= AMPERE]


def test_the_gpus_are_those_of_the_devices_of_tests() -> None:
    assert {gpu: DEVICES[gpu].shared_memory_bytes // 1024 for gpu in GPUS} == GPUS
