"""Runs the GPU tests in several processes: `python tests/gpu/run.py [arguments of pytest]`.

Most of their time is the compilation of kernels, each on one core; processes share Triton's cache. The processes are
workers of pytest-xdist; without it every test file has one process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER, OTHERS = "tests/gpu", ("tests/kernels/test_parity.py",)
MAX_WORKERS = 12  # a process needs 4 GB of CPU memory and 1 GB of GPU memory


def main(arguments: list[str]) -> int:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    cores = len(os.sched_getaffinity(0))
    workers = max(1, min(MAX_WORKERS, cores - 2))
    if workers > 1 and find_spec("xdist") is not None:
        return run(["-p", "no:benchmark", "-n", str(workers), "--dist", "worksteal", *arguments, FOLDER, *OTHERS])
    files = [*OTHERS, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / FOLDER).glob("test_*.py"))]
    with ThreadPoolExecutor(workers) as pool:
        codes = list(pool.map(lambda file: run([*arguments, file]), files))
    return max(0 if code == 5 else code for code in codes)  # 5: no test of the file is selected


def run(arguments: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
