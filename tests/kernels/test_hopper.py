"""The product for Hopper, compiled for a card that is not here: Gluon's names change between versions of Triton.

Its results are compared with the definition on a card (tests/ops/test_twins.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest

from octavo.ops import twins

# Prints what the tensor cores are told, and whether one multiplication is under way while the next is asked for.
COMPILED = """
import re
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from octavo.kernels import hopper

stages, cuts = hopper.RINGS[torch.{type}]
names = [p.name for p in hopper._product.params]
constants = {{
    "INT8": {int8}, "SCALED": {int8}, "BIAS": True, "BESIDE": 80, "ONTO": True, "LEVELS": 127, "BM": hopper.ROWS,
    "BN": hopper.COLUMNS, "BK": hopper.INPUTS, "GROUP": hopper.GROUP, "STAGES": stages, "CUTS": cuts,
}}
tiles = {{
    "inputs": ("{kind}", hopper.ROWS, hopper.INPUTS, hopper.BYTES),
    "weights": ("{kind}", hopper.COLUMNS, hopper.INPUTS, hopper.BYTES),
    "t": ("bf16", hopper.ROWS, hopper.INPUTS // 2, hopper.SHORTS),
    "b": ("bf16", hopper.COLUMNS, hopper.INPUTS // 2, hopper.SHORTS),
    "out": ("bf16", hopper.ROWS // 2, hopper.COLUMNS // cuts, hopper.SHORTS),
}}
signature = dict.fromkeys(names, "i32")
signature |= {{name: f"tensordesc<{{t}}[{{h}}, {{w}}],{{l!r}}>" for name, (t, h, w, l) in tiles.items()}}
signature |= {{"scale": "*fp32", "absmax": "*fp32", "bias": "*fp32", "onto": "*bf16"}}
signature |= dict.fromkeys(constants, "constexpr")
source = GluonASTSource(hopper._product, signature, {{(names.index(n),): v for n, v in constants.items()}})
made = compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": 4}})
print(made.metadata.shared)
told = re.findall(r"wgmma\\.(?:mma_async|wait_group)\\.sync\\.aligned(\\S*(?: \\d)?)", made.asm["ptx"])
print(" ".join(each.strip(". ") for each in told))
"""


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [("i8", "int8", "m64n128k32.s32.s8.s8"), ("fp8e4nv", "float8_e4m3fn", "m64n256k32.f32.e4m3.e4m3")],
)
def test_it_compiles_for_a_hopper_and_fits_into_its_shared_memory(kind: str, name: str, told: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED.format(kind=kind, type=name, int8=kind == "i8")], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    shared, instructions = ran.stdout.strip().splitlines()
    assert int(shared) <= 227 * 1024
    assert told in instructions
    assert "bf16.bf16" in instructions  # the thin product
    # Within the loop over inputs a multiplication is waited for once the next one is on its way.
    assert f"{told} 1" in instructions


def test_this_triton_is_one_of_those_that_are_tested() -> None:
    assert twins.gluon_untested.__wrapped__() == ""


def test_another_triton_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("triton"), "__version__", "3.61.0")
    assert twins.gluon_untested.__wrapped__() == "Triton 3.61.0; it is tested with 3.6 and 3.7"
