"""The folders of checkpoints: their names, their manifests, and whether every byte is as it was written.

checkpoints/
  step-00000040/            a checkpoint; complete from the moment it exists
    manifest.json           format version, step, versions, and size and SHA-256 of every other file at any depth
  latest                    the name of the newest checkpoint, for people and scripts
  .tmp-step-00000080-PID    a checkpoint that is being written (atomic.py)
  .old-step-00000040-PID    a checkpoint that is being replaced by one of the same step
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from octavo.bounded_json import read_object
from octavo.errors import CheckpointError
from octavo.store.files import check_format, durable_write, json_bytes, sha256_of

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
FORMAT = 2  # of the manifest and of what the other files hold; increase it when either changes
UNREADABLE = "Resume it with the octavo that wrote it, or start a new run with another --out."
DELETE = "Delete its folder to resume from the checkpoint before it, or start again with another --out."

_FINISHED = re.compile(r"step-\d+")
# Between the two renames of a replacement the old checkpoint is still a candidate for loading.
_REPLACED = re.compile(r"\.old-step-\d+-\d+")


def folder_of(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return checkpoints / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint by its folder's name."""
    match = re.search(r"step-(\d+)", path.name)
    assert match, path
    return int(match[1])


def finished(checkpoints: Path) -> list[Path]:
    """The checkpoints in `checkpoints`, the newest first. They are not verified."""
    return [path for path in candidates(checkpoints) if _FINISHED.fullmatch(path.name)]


def candidates(checkpoints: Path) -> list[Path]:
    """All possible checkpoints in `checkpoints`, the newest first. A replaced one comes after its replacement."""
    paths = checkpoints.iterdir() if checkpoints.is_dir() else ()
    matches = [path for path in paths if _FINISHED.fullmatch(path.name) or _REPLACED.fullmatch(path.name)]
    return sorted(matches, key=lambda path: (step_of(path), path.name.startswith("step-")), reverse=True)


def newest_valid(checkpoints: Path, *, warn: Callable[[str], None]) -> Path | None:
    """The valid checkpoint of the highest step, or None if there is no checkpoint at all.

    `warn` gets one line for each damaged checkpoint that is skipped. Raises CheckpointError if all are damaged, and for
    a checkpoint of another format version.
    """
    paths = candidates(checkpoints)
    for path in paths:
        problems = verify(path)
        if not problems:
            return path
        if not path.exists():  # the run, which trains in another process, has deleted it and saved a newer one
            return newest_valid(checkpoints, warn=warn)
        warn(f"{path}: the checkpoint is damaged ({problems[0]}); looking for an earlier one.")
    if paths:
        raise CheckpointError(
            f"{checkpoints}: none of its {len(paths)} checkpoints is whole.",
            hint="Start again without --resume, with another --out.",
        )
    return None


def write_manifest(path: Path, step: int, *, versions: Mapping[str, str]) -> None:
    """Writes the manifest of a complete checkpoint folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    entries = {
        file.relative_to(path).as_posix(): {"size_bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in files
    }
    manifest = {"format": FORMAT, "step": step, "versions": dict(versions), "files": entries}
    durable_write(path / MANIFEST, json_bytes(manifest))


def files_of(path: Path) -> list[str]:
    """The files of a verified checkpoint as its manifest lists them, sorted."""
    return sorted(read_object(path / MANIFEST, error=CheckpointError)["files"])


def verify(path: Path) -> list[str]:
    """The problems of the checkpoint folder `path`; empty if every byte is as it was saved.

    Raises CheckpointError for a checkpoint of another format version.
    """
    try:
        manifest = read_object(path / MANIFEST, error=CheckpointError)
    except CheckpointError as error:
        return [error.message]
    if type(manifest.get("format")) is int:  # without one the manifest is damaged
        check_format(manifest["format"], FORMAT, where=path, error=CheckpointError, hint=UNREADABLE)
    try:
        step, files = manifest["step"], manifest["files"]
        expected = {name: (entry["size_bytes"], entry["sha256"]) for name, entry in files.items()}
    except (KeyError, TypeError, AttributeError):
        expected = None
    if expected is None or any(type(size) is not int or type(digest) is not str for size, digest in expected.values()):
        return [f"{MANIFEST} is not what octavo writes"]
    problems = [] if manifest.get("format") == FORMAT else [f"{MANIFEST} has no format version"]
    problems += [] if step == step_of(path) else [f"{MANIFEST} is that of step {step}"]
    problems += [] if STATE in expected else [f"{MANIFEST} does not list {STATE}"]
    for name, (size_bytes, digest) in expected.items():
        problems += _file_problems(path, name, size_bytes=size_bytes, digest=digest)
    return problems


def _file_problems(folder: Path, name: str, *, size_bytes: int, digest: str) -> list[str]:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        return [f"{MANIFEST} names a file outside the checkpoint"]
    try:
        actual_bytes = (folder / name).stat().st_size
        if actual_bytes != size_bytes:
            return [f"{name} has {actual_bytes:,} bytes instead of {size_bytes:,}"]
        return [] if sha256_of(folder / name) == digest else [f"{name} has changed since it was saved"]
    except OSError as error:
        return [f"{name} cannot be read: {error.strerror}"]
