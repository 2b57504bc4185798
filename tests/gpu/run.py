"""The tests of a GPU in as many processes as compile kernels at once: `python tests/gpu/run.py [arguments of pytest]`.

Most of their time goes into compiling, one kernel on one core; compiled ones are shared through Triton's cache. With
pytest-xdist that are its workers; without it each file is a process.
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
MOST = 12  # processes; each takes 4 GB of the host's memory, and 1 GB of the GPU's


def main(arguments: list[str]) -> int:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    cores = len(os.sched_getaffinity(0))
    workers = max(1, min(MOST, cores - 2))
    if workers > 1 and find_spec("xdist") is not None:
        return run(["-p", "no:benchmark", "-n", str(workers), "--dist", "worksteal", *arguments, FOLDER, *OTHERS])
    files = [*OTHERS, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / FOLDER).glob("test_*.py"))]
    with ThreadPoolExecutor(workers) as pool:
        codes = list(pool.map(lambda file: run([*arguments, file]), files))
    return max(0 if code == 5 else code for code in codes)  # 5: none of a file's tests were asked for


def run(arguments: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
