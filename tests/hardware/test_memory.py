"""Free and peak memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo import hardware

GIB = 2**30


def fake_proc(folder: Path, *, cgroup: str) -> Path:
    proc = folder / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:   {8 * 2**20} kB\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    return proc


def test_free_ram_is_mem_available(tmp_path: Path) -> None:
    assert hardware.free_ram_bytes(fake_proc(tmp_path, cgroup="0::/\n"), tmp_path / "cg") == 8 * GIB


@pytest.mark.parametrize("limited", ["a/b", "a", "."])
def test_a_cgroup_limit_on_any_level_lowers_free_ram(tmp_path: Path, limited: str) -> None:
    proc, cgroups = fake_proc(tmp_path, cgroup="0::/a/b\n"), tmp_path / "cg"
    (cgroups / "a" / "b").mkdir(parents=True)
    for folder in (cgroups / "a" / "b", cgroups / "a", cgroups):
        (folder / "memory.max").write_text("max\n")
        (folder / "memory.current").write_text(f"{3 * GIB}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\nactive_file 7\n")
    (cgroups / limited / "memory.max").write_text(f"{4 * GIB}\n")
    assert hardware.free_ram_bytes(proc, cgroups) == 2 * GIB


def test_a_cgroup_limit_of_version_1_lowers_free_ram(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, cgroup="9:name=systemd:/\n4:cpu,memory:/box\n0::/\n")
    folder = tmp_path / "cg" / "memory" / "box"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{4 * GIB}")
    (folder / "memory.usage_in_bytes").write_text(f"{9 * GIB}")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {7 * GIB}\n")
    assert hardware.free_ram_bytes(proc, tmp_path / "cg") == 2 * GIB
    (folder / "memory.stat").unlink()
    assert hardware.free_ram_bytes(proc, tmp_path / "cg") == 0


def test_free_memory_of_this_machine_is_a_plausible_number_of_bytes() -> None:
    assert 64 * 2**20 < hardware.free_memory_bytes("cpu") < 2**46


def test_peak_memory_grows_with_allocations_and_does_not_fall_again() -> None:
    block = torch.ones(64 * 2**20 // 4)
    peak = hardware.peak_memory_bytes()
    assert peak > block.nbytes
    del block
    # Linux counts pages in batches for each thread: the peak is accurate to a few hundred kB.
    assert hardware.peak_memory_bytes() > peak - 2**20


def test_peak_memory_of_a_process_is_not_that_of_its_parent() -> None:
    block = torch.ones(96 * 2**20 // 4)
    assert hardware.peak_memory_bytes() > block.nbytes
    code = "from octavo.hardware import peak_memory_bytes; print(peak_memory_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**20 < int(child.stdout) < block.nbytes
