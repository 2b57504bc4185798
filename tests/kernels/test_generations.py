"""Every kernel compiled for every generation of NVIDIA GPUs since 2016, with what it takes of them. No GPU is needed.

The kernels and tiles are those that a call chooses there (tests/kernels/compiled.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests import devices
from tests.kernels.cases import CASES

from octavo.hardware import Capabilities

GPUS = {60: 48, 61: 48, 70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory
# References run in place of these kernels: their dots would not run on tensor cores, or no command asks for them.
BELOW_AMPERE = {
    "cached_attention.prefill_attention", "softcap.softcapped_forward", "softcap.softcapped_backward",
    "matmul8.matmul_8bit_into", "matmul8.quantize_rows_into", "matmul8.transpose_into",
}  # fmt: skip

# Bytes of stack a thread. On Hopper the general 8-bit matmul runs only under a Triton without the kernel for Hopper.
# `_forward`: ptxas keeps a variant for heads of 16 at 80 registers; with heads of 64, 128 and 256 nothing is spilled.
SPILLS = {("_matmul", 80): 16, ("_forward", 80): 8, ("_matmul_8bit", 90): 40, ("_matmul_8bit", 100): 136}


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", GPUS)
def test_every_operation_has_a_kernel_that_the_gpu_runs_well(capability: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled", str(capability)], capture_output=True, text=True,
        cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    ampere = capability >= 80
    assert {row["operation"] for row in rows} == set(CASES) - (set() if ampere else BELOW_AMPERE)
    for row in rows:
        assert row["dot"] in (("", "mma") if ampere else ("",)), row
        assert row["shared"] <= GPUS[capability] * 1024, row
        assert row["stack"] <= SPILLS.get((row["kernel"], capability), 0), row
    assert any(row["dot"] for row in rows) == ampere


def test_the_gpus_are_those_of_the_devices_of_tests() -> None:
    known = [each for each in vars(devices).values() if isinstance(each, Capabilities)]
    shared = {each.compute_capability: each.shared_memory_bytes // 1024 for each in known}
    assert {capability: shared.get(divmod(capability, 10)) for capability in GPUS} == GPUS
