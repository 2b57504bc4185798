"""The 8-bit matmul for Hopper, compiled for a GPU that is not here: Gluon's names change with Triton's versions.

Its results are compared with the reference on a GPU (tests/kernels/test_parity.py).
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from tests import devices
from tests.forks import Forks

from octavo.runtime import dispatch

# Prints the instructions of the tensor cores, and whether one is in flight while the next is issued.
COMPILED = """
import re
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from octavo.kernels.hopper import matmul8

columns, stages, cuts = matmul8.SHAPES[torch.{type}][{which}]
names = [p.name for p in matmul8._matmul_8bit.params]
constants = {{
    "INT8": {int8}, "SCALED": {int8}, "BIAS": True, "LOW_RANK": 80, "RESIDUAL": True, "LEVELS": 127, "BM": matmul8.ROWS,
    "BN": columns, "BK": matmul8.INPUTS, "GROUP_M": matmul8.GROUP_M, "STAGES": stages, "CUTS": cuts,
}}
tiles = {{
    "inputs": ("{kind}", matmul8.ROWS, matmul8.INPUTS, matmul8.BYTES),
    "weights": ("{kind}", columns, matmul8.INPUTS, matmul8.BYTES),
    "t": ("bf16", matmul8.ROWS, matmul8.INPUTS // 2, matmul8.SHORTS),
    "b": ("bf16", columns, matmul8.INPUTS // 2, matmul8.SHORTS),
    "out": ("bf16", matmul8.ROWS // 2, columns // cuts, matmul8.SHORTS),
}}
signature = dict.fromkeys(names, "i32")
signature |= {{name: f"tensordesc<{{t}}[{{h}}, {{w}}],{{l!r}}>" for name, (t, h, w, l) in tiles.items()}}
signature |= {{"scale": "*fp32", "absmax": "*fp32", "bias": "*fp32", "residual": "*bf16"}}
signature |= dict.fromkeys(constants, "constexpr")
source = GluonASTSource(matmul8._matmul_8bit, signature, {{(names.index(n),): v for n, v in constants.items()}})
made = compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": 4}})
print(made.metadata.shared)
told = re.findall(r"wgmma\\.(?:mma_async|wait_group)\\.sync\\.aligned(\\S*(?: \\d)?)", made.asm["ptx"])
print(" ".join(each.strip(". ") for each in told))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "name", "which", "told"),
    [
        ("i8", "int8", 0, "m64n128k32.s32.s8.s8"),
        ("i8", "int8", 2, "m64n64k32.s32.s8.s8"),
        ("fp8e4nv", "float8_e4m3fn", 0, "m64n256k32.f32.e4m3.e4m3"),
        ("fp8e4nv", "float8_e4m3fn", 1, "m64n128k32.f32.e4m3.e4m3"),
    ],
)
def test_it_compiles_for_a_hopper_and_fits_into_its_shared_memory(
    kind: str, name: str, which: int, told: str, forks: Forks
) -> None:
    ran = forks.run(COMPILED.format(kind=kind, type=name, which=which, int8=kind == "i8"))
    out, err = ran.communicate()
    assert ran.returncode == 0, err[-2000:]
    shared, instructions = out.strip().splitlines()
    assert int(shared) <= 227 * 1024
    assert told in instructions
    assert "bf16.bf16" in instructions  # the low-rank term
    # Within the loop over inputs an instruction is waited for after the next one is issued.
    assert f"{told} 1" in instructions


@pytest.mark.parametrize(
    ("m", "n", "columns"), [(16384, 4096, 256), (2048, 4096, 256), (128, 28672, 256), (512, 4096, 128), (128, 4096, 64)]
)
def test_tiles_are_as_wide_as_occupies_the_gpu(m: int, n: int, columns: int) -> None:
    kernels = import_module("octavo.kernels.hopper.matmul8")
    assert kernels.shape_of(m, n, torch.int8, 132).columns == columns


def test_this_triton_is_one_of_those_that_are_tested() -> None:
    assert dispatch.hopper_kernels_disabled_reason.__wrapped__(devices.H200) == ""


def test_another_triton_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("triton"), "__version__", "3.61.0")
    reason = dispatch.hopper_kernels_disabled_reason.__wrapped__(devices.H200)
    assert reason == "Triton 3.61.0; they are tested with 3.6 and 3.7"
