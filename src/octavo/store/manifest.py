"""manifest.json of a folder that octavo wrote: the identity of its origin, and size and SHA-256 of every file.

octavo's manifest has the keys "octavo" and "format". A manifest.json of another program, such as a web app, is ignored.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from octavo.bounded_json import JsonError, integer, read_object, shown, text
from octavo.errors import ModelError
from octavo.store.files import check_format, sha256_of

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest; increase it when its content changes
OTHER_FORMAT = "Write the folder again with `octavo quantize`, or use the octavo that wrote it."
# The hint for a damaged folder. A damaged folder in the cache is made again instead.
REMEDY = (
    "Write the folder again with `octavo quantize`, or take it from a copy. If you changed the file on purpose, delete "
    "manifest.json."
)


@dataclass(frozen=True)
class Manifest:
    """`origin` is the identity of the weights that the folder was made from, `files` is name -> (bytes, SHA-256)."""

    origin: str
    files: dict[str, tuple[int, str]]


def read_manifest(folder: Path) -> Manifest | None:
    """octavo's manifest of a folder, None if there is none. ModelError if it is damaged or of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = read_object(path, error=ModelError)
    except ModelError as error:
        if _written_by_octavo(folder):
            raise ModelError(f"{folder} is damaged: {error.message}", hint=REMEDY) from error
        return None
    if "octavo" not in content:
        return None
    check_format(content.get("format"), FORMAT, where=path, error=ModelError, hint=OTHER_FORMAT)
    try:
        listed = content.get("files")
        if not isinstance(listed, dict) or not listed:
            raise JsonError(f"files is {shown(listed)}")
        files = {name: _entry(name, entry) for name, entry in listed.items()}
        return Manifest(text(content, "origin"), files)
    except JsonError as error:
        raise ModelError(
            f"{folder} is damaged: {MANIFEST} is not what octavo writes ({error}).", hint=REMEDY
        ) from error


def verify(folder: Path, *, say: Callable[[str], None] | None = None) -> None:
    """ModelError with the file's name unless every file in octavo's manifest is as it was written.

    A process reads a file once, as long as size and modification time stay the same. `say` reports a check that takes
    seconds. A folder without octavo's manifest is not checked.
    """
    if (manifest := read_manifest(folder)) is None:
        return
    large = sum(size for size, _ in manifest.files.values()) > 2**31  # two seconds
    if large and say:
        say(f"Checking the hashes of {folder}.")
    if problem := next(filter(None, (_problem(folder, name, *entry) for name, entry in manifest.files.items())), None):
        raise ModelError(f"{folder} is damaged: {problem}.", hint=REMEDY)


def is_whole(folder: Path) -> bool:
    """Whether the folder has octavo's manifest and every file in it is as it was written."""
    try:
        verify(folder)
        return read_manifest(folder) is not None
    except ModelError:
        return False


def sha256_of_state(path: Path) -> str:
    """The SHA-256 of a file. A process reads a file of the same size and modification time once.

    Within two seconds of a change the hash is not cached: a further change could have the same time, since file
    systems round it.
    """
    status = path.stat()
    if abs(time.time_ns() - status.st_mtime_ns) < 2_000_000_000:
        return sha256_of(path)
    return _sha256(path.absolute(), status.st_size, status.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    return sha256_of(path)


def _entry(name: str, entry: object) -> tuple[int, str]:
    if not name or Path(name).name != name or "\0" in name or not isinstance(entry, dict):
        raise JsonError(f"it lists {shown(name)}")
    return integer(entry, "size", least=0, most=2**63), text(entry, "sha256")


def _problem(folder: Path, name: str, size: int, sha256: str) -> str:
    """The problem of a file, or ""."""
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    try:
        if (actual := path.stat().st_size) != size:
            return f"{name} has {actual:,} bytes instead of {size:,}"
        return "" if sha256_of_state(path) == sha256 else f"{name} has changed since it was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _written_by_octavo(folder: Path) -> bool:
    try:
        return isinstance(read_object(folder / "config.json", error=ModelError).get("octavo"), dict)
    except ModelError:
        return False
