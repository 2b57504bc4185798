"""Writes docs/design/kernels-by-gpu.md: `python -m tests.kernels.gpu_table`. It compiles everything for all GPUs.

The page has a row for each shown call of real_calls.py and each kernel that GPUs choose for it. test_generations.py
compares the kernels of the page with what the code chooses now, which needs no compiling.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests.kernels.real_calls import CALLS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "design" / "kernels-by-gpu.md"
GPUS = (60, 61, 70, 75, 80, 86, 89, 90, 100, 120)
WORK = 100  # the GPU from whose calls bytes are taken: all of its operations have kernels
HEAD = """# Which kernel runs on which GPU

Written by `python -m tests.kernels.gpu_table`, not by hand, with Triton {triton} and ptxas {ptxas}. Each kernel was
compiled for each generation of GPUs, with the tiles that a call chooses there. Only 9.0 was measured.

- Shapes are of GPT-J-6B, with one row of 2048 tokens in training, or of the model that uses the operation.
- Bytes count each operand once, or twice if it is read and written. FLOP are additions and multiplications; an
  exponential, a division and a root count as one.
- GPUs: 6.0 is P100, 6.1 GTX 10, 7.0 V100, 7.5 T4 and RTX 20, 8.0 A100, 8.6 RTX 30, 8.9 RTX 40 and L4, 9.0 H100 and
  H200, 10.0 B200, 12.0 RTX 50.
- Registers are of a thread, at most 255; "+ 16" means that 16 bytes of them spill to memory. Shared memory is KiB of a
  program. A range is over the GPUs of the row and the variants of the kernels. Dots are the instructions of tensor
  cores with which a kernel multiplies matrices.

## Without a kernel of octavo

| operation | GPUs | what runs |
|---|---|---|
| matmuls of training in 2 bytes, and low-rank GEMMs | all | cuBLAS |
| attention of training, one document a row | 6.0 to 7.5 | PyTorch: memory-efficient attention |
| | 8.0 and higher | PyTorch: the first of cuDNN, FlashAttention and memory-efficient attention that supports the call |
| attention of training, packed documents or windows | 6.0 to 7.5 | PyTorch: memory-efficient attention with a mask |
| | 8.0 and higher | PyTorch: FlashAttention, or where it lacks an argument of the call, as for documents below 8.0 |

## Kernels

| operation | call | MB | GFLOP | GPUs | kernels | registers | shared | dots |
|---|---|---|---|---|---|---|---|---|
"""


class Choice(NamedTuple):
    """What runs for a shown call on some GPUs: the names of kernels in order, or what runs in place of them."""

    operation: str
    call: str
    kernels: str
    gpus: tuple[int, ...]


Row = dict[str, Any]


def chosen_now() -> list[Choice]:
    """By the code, of all GPUs."""
    return choices(rows_of("--chosen"))


def choices(rows: Iterable[Row]) -> list[Choice]:
    """The choices in rows of all GPUs (compiled.py), in the order of CALLS; a choice that GPUs share is one."""
    found: dict[tuple[str, str], dict[int, list[str]]] = {}
    for row in rows:
        if not row.get("fallback"):
            names = found.setdefault((row["operation"], row["call"]), {}).setdefault(row["capability"], [])
            name = f"`{row['kernel']}`" if row["kernel"] else row["reference"]
            if row["kernel"].startswith("matmul8_cublas."):
                name = f"cuBLAS, {name}"  # the matmul, before the kernel
            names += [name] if name not in names else []
            if row["operation"].startswith("lora_backward.") and not row["kernel"].startswith("hopper."):
                names += ["cuBLAS"]  # the low-rank GEMMs after the activation's own kernel
    result = []
    for call in CALLS:
        by_gpu = found[call.operation, call.text]
        kinds = dict.fromkeys(", ".join(names) for names in by_gpu.values())
        for kind in kinds if call.shown else ():
            gpus = tuple(gpu for gpu, names in by_gpu.items() if ", ".join(names) == kind)
            result.append(Choice(call.operation, call.text, kind, gpus))
    return result


def on_page() -> list[Choice]:
    """By the page."""
    found, operation, call = list[Choice](), "", ""
    for line in PAGE.read_text(encoding="utf-8").partition("## Kernels")[2].splitlines()[4:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        operation, call = cells[0].strip("`") or operation, cells[1] or call
        found.append(Choice(operation, call, cells[5], _gpus_of(cells[4])))
    return found


def _text_of(gpus: tuple[int, ...]) -> str:
    """6.0 to 7.5, 9.0: neighbours in GPUS are a range."""
    runs = list[list[int]]()
    for gpu in gpus:
        if runs and GPUS.index(runs[-1][-1]) + 1 == GPUS.index(gpu):
            runs[-1].append(gpu)
        else:
            runs.append([gpu])
    ends = [[f"{gpu // 10}.{gpu % 10}" for gpu in dict.fromkeys((run[0], run[-1]))] for run in runs]
    return ", ".join(" to ".join(run) for run in ends)


def _gpus_of(text: str) -> tuple[int, ...]:
    """The GPUs of a text by `_text_of`."""
    ends = [[GPUS.index(int(end.replace(".", ""))) for end in run.split(" to ")] for run in text.split(", ")]
    return tuple(gpu for run in ends for gpu in GPUS[run[0] : run[-1] + 1])


def page(rows: list[Row], triton: str, ptxas: str) -> str:
    """The text, from the rows of all GPUs."""
    lines, before = [], ("", "")
    for choice in choices(rows):
        here = [r for r in rows if (r["operation"], r["call"]) == choice[:2] and not r.get("fallback")]
        work = next(r for r in here if r["capability"] == WORK)
        mine = [r for r in here if r["capability"] in choice.gpus and r["kernel"]]
        sizes = f"{work['bytes'] / 1e6:,.1f} | {work['flops'] / 1e9:,.3f}"
        about = f"`{choice.operation}` | {choice.call} | {sizes}"
        about = " | | |" if before == choice[:2] else about
        before = choice[:2]
        resources = f"{_registers(mine)} | {_shared(mine)} | {_dots(mine)}"
        lines.append(f"| {about} | {_text_of(choice.gpus)} | {choice.kernels} | {resources} |")
    return HEAD.format(triton=triton, ptxas=ptxas) + "\n".join(lines) + "\n"


def _registers(rows: list[Row]) -> str:
    spilled = max((row["stack"] for row in rows), default=0)
    return _range([row["registers"] for row in rows]) + (f" + {spilled}" if spilled else "")


def _shared(rows: list[Row]) -> str:
    return _range([round(row["shared"] / 1024) for row in rows])


def _dots(rows: list[Row]) -> str:
    return ", ".join(dict.fromkeys(row["dot"] for row in rows if row["dot"]))


def _range(numbers: list[int]) -> str:
    if not numbers:
        return ""
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def rows_of(argument: str) -> Iterator[Row]:
    """What compiled.py prints, in a process of its own: Triton's interpreter must not be set there."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled", argument], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    for line in ran.stdout.splitlines():
        yield json.loads(line)


def main() -> None:
    import triton
    from triton import knobs

    ptxas = f"{knobs.nvidia.ptxas.version} ({knobs.nvidia.ptxas_blackwell.version} for 10.0 and 12.0)"
    with ThreadPoolExecutor(max_workers=2) as pool:
        parts = pool.map(lambda gpu: [row | {"capability": gpu} for row in rows_of(str(gpu))], GPUS)
        rows = [row for part in parts for row in part]
    PAGE.write_text(page(rows, triton.__version__, ptxas), encoding="utf-8")


if __name__ == "__main__":
    main()
