"""The tiles of soft-capped attention: they compile for GPUs that are not here, and fit into their shared memory."""

from __future__ import annotations

from typing import Any

import pytest
from tests import devices
from tests.forks import Forks

from octavo.kernels.softcap_tiles import tiles_for


@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("device", [devices.H200, devices.A100, devices.RTX_4090, devices.T4], ids=lambda x: x.name)
def test_a_smaller_gpu_has_no_larger_tiles(device: Any, itemsize: int, size: int) -> None:
    found, largest = (tiles_for(shared, size, itemsize) for shared in (device.shared_memory_bytes, 227 * 1024))
    assert largest is not None
    assert (found is None) == (device is devices.T4 and size == 256 and itemsize == 4)
    if found is None:
        return
    for tile, most in zip(found[:3], largest[:3], strict=True):
        assert tile.queries * tile.keys <= most.queries * most.keys


# Prints of each pass: bytes of shared memory, Hopper's matmul instructions, and 1 if ptxas does not overlap them.
COMPILED = """
import os, subprocess, tempfile
os.environ.pop("TRITON_INTERPRET", None)
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from octavo.kernels import softcap
from octavo.kernels.softcap_tiles import kv_passes, tiles_for, width_of

kinds = dict.fromkeys(["q", "k", "v", "out", "grad", "dq", "dk", "dv"], "*{kind}")
kinds |= dict.fromkeys(["lse", "delta"], "*fp32") | dict.fromkeys(["starts", "stops"], "*i32")
kinds |= dict.fromkeys(["scale", "factor", "ceiling"], "fp32")
tiles = tiles_for({shared}, {size}, 4 if "{kind}" == "fp32" else 2)
passes = [(softcap._forward, tiles.forward, {{}}), (softcap._backward_q, tiles.dq, {{}})]
passes += [(softcap._backward_kv, *each) for each in kv_passes(tiles)]
for function, tile, flags in passes:
    names = [p.name for p in function.params]
    constants = {{
        "DOCUMENTS": True, "WINDOW": True, "PRECISE": "{kind}" == "fp32", "D": {size}, "WIDTH": width_of({size}),
        "BM": tile.queries, "BN": tile.keys, **flags,
    }}
    signature = {{name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}}
    aligned = {{
        (n,): [["tt.divisibility", 16]] for n, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith(("_row", "_position", "_head"))
    }}
    source = ASTSource(function, signature, {{(names.index(n),): v for n, v in constants.items()}}, aligned)
    options = {{"num_warps": tile.warps, "num_stages": tile.stages}}
    made = compile(source, target=GPUTarget("cuda", {capability}, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        suffix = "a" if {capability} >= 90 else ""
        architecture = f"--gpu-name=sm_{capability}{{suffix}}"
        command = [triton.knobs.nvidia.ptxas.path, "-v", architecture, file.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    print(made.metadata.shared, made.asm["ptx"].count("wgmma.mma_async"), int("are serialized" in log))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("device", [devices.H200, devices.A100, devices.RTX_4090, devices.T4], ids=lambda x: x.name)
def test_they_compile_and_fit_into_shared_memory(device: Any, size: int, kind: str, forks: Forks) -> None:
    """For a GPU that is not here. If a tile needs more, its kernel cannot be launched."""
    if kind == "bf16" and "bfloat16" not in device.dtypes:
        pytest.skip("the GPU has no bfloat16")
    if tiles_for(device.shared_memory_bytes, size, 4 if kind == "fp32" else 2) is None:
        pytest.skip("the reference runs")
    major, minor = device.compute_capability
    ran = forks.run(
        COMPILED.format(size=size, kind=kind, shared=device.shared_memory_bytes, capability=10 * major + minor)
    )
    out, err = ran.communicate()
    assert ran.returncode == 0, err[-2000:]
    lines = out.splitlines()
    assert len(lines) in (3, 4)
    for line in lines:
        shared, instructions, serialized = map(int, line.split())
        assert shared <= device.shared_memory_bytes
        assert (instructions > 0) == (major == 9 and kind != "fp32")  # dots run on Hopper's tensor cores
        assert not serialized
