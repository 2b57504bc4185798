"""Builds the sdist and the wheel and tests them as a user would: `make release`.

    python tools/release.py [--allow-missing] [--python 3.12=/path/to/python3.12 ..] [--without-torch 3.12 ..]

1. Checks SECURITY.md (versions, formats and contact; `--write` fills them in), the plays and the licenses of
   dependencies.
2. Builds dist/ with `build`, checks the metadata with `twine`, and the files that both archives must have.
3. Installs the wheel into a clean environment of each Python that octavo supports, and the sdist into another one, and
   runs tools/release_smoke.py there: imports, help without torch, data, a tiny fine-tuning, generation, the server.

An interpreter that is not on this machine, or a test without PyTorch, is an error; --allow-missing reports it and goes
on. PyTorch is that of constraints.txt: its CPU build if pip finds one (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from release_contents import (
    ROOT,
    archive_problems,
    archives,
    license_table,
    requirements,
    security,
    source_problems,
)

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
WORK = ROOT / ".venv-release"
TOOLS = ("build", "twine")
# The pins of constraints.txt that a smoke test takes: those of others are of Python 3.11, and not all have wheels for
# later versions.
PINNED = ("torch", "transformers")


@dataclass(frozen=True)
class Result:
    """One archive tested with one Python: the PyTorch, how long it took, and the end of its output if it failed."""

    python: str
    archive: str
    seconds: float
    torch: str = ""  # the version that the smoke test ran with, or "none"
    failure: str = ""


def interpreter(version: str, given: Sequence[str]) -> str | None:
    """The Python of a version: as given, on the PATH, or installed by pyenv or uv. None if there is none."""
    for pair in given:
        name, _, path = pair.partition("=")
        if name == version:
            return path
    candidates = [
        shutil.which(f"python{version}"),
        *sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")), reverse=True),
        *sorted(map(str, Path.home().glob(f".local/share/uv/python/cpython-{version}.*/bin/python")), reverse=True),
    ]
    return next((path for path in candidates if path and _is(version, path)), None)


def _is(version: str, path: str) -> bool:
    """Whether a program starts and is of this version: a shim of pyenv may lead nowhere."""
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    run = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
    return run.returncode == 0 and run.stdout.strip() == version


def build(dist: Path) -> list[Path]:
    """The sdist and the wheel, built and checked."""
    tools = WORK / "tools"
    _run([sys.executable, "-m", "venv", "--clear", str(tools)])
    python = str(tools / "bin" / "python")
    _run([python, "-m", "pip", "install", "--quiet", *TOOLS])
    shutil.rmtree(dist, ignore_errors=True)
    _run([python, "-m", "build", "--outdir", str(dist), str(ROOT)])
    found = archives(dist)
    _run([python, "-m", "twine", "check", "--strict", *map(str, found)])
    return found


def test(archive: Path, version: str, python: str, *, with_torch: bool) -> Result:
    """Installs an archive into a clean environment and runs the smoke test there.

    Without torch, where there is no CPU build of it for this Python, only what needs none is tested.
    """
    start = time.monotonic()
    kind = "wheel" if archive.suffix == ".whl" else "sdist"
    folder = WORK / f"{version}-{kind}"
    shutil.rmtree(folder, ignore_errors=True)
    constraints = WORK / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints.write_text("\n".join(line for line in lines if line.partition("==")[0] in PINNED) + "\n")
    inside = str(folder / "bin" / "python")
    pip = [inside, "-m", "pip", "install", "--quiet", "-c", str(constraints)]
    others = [one for one in requirements() if not one.startswith("torch")]
    smoke = [inside, str(ROOT / "tools" / "release_smoke.py")]
    steps = [[python, "-m", "venv", str(folder)]]
    if with_torch:
        steps += [[*pip, f"{archive}[serve]"], smoke]
    else:
        steps += [[*pip, *others], [*pip, "--no-deps", str(archive)], [*smoke, "--without-torch"]]
    torch = "" if with_torch else "none"
    failure = ""
    for step in steps:
        run = subprocess.run(step, cwd=WORK, capture_output=True, text=True, check=False)
        if run.returncode:
            failure = f"{' '.join(step)}\n{(run.stdout + run.stderr)[-3000:]}"
            break
        if with_torch and step == smoke:  # its last line: "passed with PyTorch .."
            torch = run.stdout.split()[-1]
    shutil.rmtree(folder, ignore_errors=True)
    return Result(version, kind, time.monotonic() - start, torch, failure)


def _run(command: Sequence[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{' '.join(command)}\n{run.stdout}{run.stderr}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allow-missing", action="store_true", help="report missing interpreters, without an error")
    parser.add_argument("--python", action="append", default=[], metavar="VERSION=PATH", help="an interpreter to use")
    parser.add_argument("--only", nargs="+", choices=PYTHONS, default=PYTHONS, help="versions to test")
    parser.add_argument(
        "--without-torch", nargs="+", default=[], choices=PYTHONS, help="versions for which there is no CPU build"
    )
    parser.add_argument("--write", action="store_true", help="write the tables and the contact of SECURITY.md, and end")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if arguments.write:
        page = ROOT / "SECURITY.md"
        page.write_text(security(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    if problems := source_problems():
        sys.exit("\n".join(problems))
    WORK.mkdir(exist_ok=True)
    print("Building ...", flush=True)
    found = build(ROOT / "dist")
    if problems := [problem for archive in found for problem in archive_problems(archive)]:
        sys.exit("\n".join(problems))
    print(license_table())
    missing, results = [version for version in PYTHONS if version not in arguments.only], []
    for version in arguments.only:
        python = interpreter(version, arguments.python)
        if python is None:
            missing.append(version)
            continue
        with_torch = version not in arguments.without_torch
        if not with_torch:
            missing.append(f"{version} with PyTorch")
        for archive in found:
            results.append(test(archive, version, python, with_torch=with_torch))
            outcome = "failed" if results[-1].failure else "passed"
            print(f"Python {version}, {results[-1].archive}: {outcome}", flush=True)
    print("\n| Python | archive | PyTorch | result | seconds |\n|---|---|---|---|---|")
    for result in results:
        outcome = "FAILED" if result.failure else "passed"
        print(f"| {result.python} | {result.archive} | {result.torch} | {outcome} | {result.seconds:.0f} |")
    for version in sorted(missing):
        print(f"| {version} | both | | NOT TESTED | |")
    failures = [result.failure for result in results if result.failure]
    if failures:
        sys.exit("\n\n".join(failures))
    if missing and not arguments.allow_missing:
        sys.exit(
            f"Not tested: Python {', '.join(sorted(missing))}. Install them, name them with --python, or pass "
            "--allow-missing."
        )


if __name__ == "__main__":
    main()
