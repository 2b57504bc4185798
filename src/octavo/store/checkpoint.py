"""Training checkpoints that survive kill -9, a full disk and a flipped bit.

    folder/
      step-00000040/   <name>.safetensors for each group of tensors, state.json, manifest.json
      latest           the name of the newest checkpoint, for people and scripts
      .lock            held by the one process that trains here
      .tmp-*           a checkpoint being written; removed at the next start if its process died
      .old-*           a checkpoint being replaced by one of the same step

A checkpoint is written under a temporary name, flushed to disk, read back against its manifest and renamed. So a folder
named step-* is complete from the moment it exists. Loading trusts only the manifest (size and SHA-256 of every file),
not the name, and not `latest`, which a crash can leave one save behind.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save_file

from octavo._version import __version__
from octavo.atomic import exchange
from octavo.bounded_json import read_object
from octavo.errors import CheckpointError
from octavo.failures import cut, explained
from octavo.store.files import atomic_write, durable_write, fsync_file, fsync_folder, json_bytes, sha256_of
from octavo.store.files import lock as lock
from octavo.system import is_alive, rename_over

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
FORMAT = 1

_FINISHED = re.compile(r"step-(\d+)")
_REPLACED = re.compile(r"\.old-(\d+)-(\d+)")
_LEFTOVER = re.compile(r"\.(?:tmp-\d+-|old-(?P<step>\d+)-|latest\.)(?P<pid>\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `tensors` by file stem and tensor name, on the CPU; `state` as it was saved."""

    step: int
    path: Path
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
    protect: Collection[int] = (),
    warn: Callable[[str], None] = lambda _: None,
) -> Path:
    """Writes the checkpoint of `step` into `folder` and returns its path. It is durable on return.

    Each entry of `tensors` becomes one safetensors file, for any dtype, shape and shared memory. `state` must be JSON:
    numbers of any size, strings, lists, dicts with string keys. Tuples are read back as lists. Of this and the earlier
    steps the newest `keep` are kept, and every step in `protect`.

    `warn` gets a line if an old checkpoint cannot be deleted. Raises CheckpointError if this one cannot be written; the
    earlier checkpoints are then untouched.
    """
    assert keep >= 1, "a save must not delete itself"
    target = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{step:08d}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        _write(temporary, step, tensors, state)
        problems = verify(temporary)
        if problems:
            raise CheckpointError(
                f"{temporary}: reading the checkpoint back gave different data: {problems[0]}",
                hint="The disk or the memory is failing. The earlier checkpoints are untouched.",
            )
        _publish(temporary, target)
        atomic_write(folder / LATEST, f"{target.name}\n".encode())
    except (OSError, safetensors.SafetensorError) as error:
        known = explained(error)  # safetensors wraps errors of the operating system in a class of its own
        raise CheckpointError(
            f"{target}: the checkpoint cannot be written. {known.message if known else cut(error)}",
            hint=f"{known.hint if known else ''} The earlier checkpoints are untouched.".strip(),
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        _delete_earlier(folder, step, keep=keep, protect=protect)
    except OSError as error:  # the new checkpoint is complete nevertheless
        warn(f"An earlier checkpoint cannot be deleted ({error.strerror}: {error.filename or folder}).")
    return target


def newest(folder: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The valid checkpoint of the highest step in `folder`, or None if there is no checkpoint at all.

    `warn` gets one line for each damaged checkpoint that is skipped. Raises CheckpointError if all are damaged.
    """
    candidates = _candidates(folder)
    for path in candidates:
        problems = verify(path)
        if not problems:
            return _load(path)
        warn(f"{path}: the checkpoint is damaged ({problems[0]}); looking for an earlier one.")
    if candidates:
        raise CheckpointError(
            f"{folder}: none of its {len(candidates)} checkpoints is whole.",
            hint="Start again without --resume, with another --out.",
        )
    return None


def any_in(folder: Path) -> bool:
    """Whether `folder` contains a checkpoint, complete or not, or is a file instead."""
    return bool(_candidates(folder)) or (folder.exists() and not folder.is_dir())


def newest_step(folder: Path) -> int | None:
    """The highest step with a checkpoint by its name, or None. The checkpoint is not verified; `newest` does that."""
    return next((_step(path) for path in _candidates(folder)), None)


def verify(path: Path) -> list[str]:
    """The problems of the checkpoint folder `path`; empty if every byte is as it was saved."""
    try:
        manifest = read_object(path / MANIFEST, error=CheckpointError)
        files, step = manifest["files"], manifest["step"]
        expected = {name: (entry["size_bytes"], entry["sha256"]) for name, entry in files.items()}
    except CheckpointError as error:
        return [error.message]
    except (KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is not what octavo writes"]
    problems = [] if step == _step(path) else [f"{MANIFEST} is that of step {step}"]
    problems += [] if STATE in expected else [f"{MANIFEST} does not list {STATE}"]
    for name, (size_bytes, digest) in expected.items():
        problems += _file_problems(path, name, size_bytes=size_bytes, digest=digest)
    return problems


def check_identity(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, force: bool, warn: Callable[[str], None]
) -> None:
    """Refuses to resume from a checkpoint of another run: model, rank, data, and whatever else the mappings contain.

    Raises CheckpointError with every key that differs and both values; with `force` it only warns.
    """
    # A round trip through JSON, as `saved` has made it: tuples become lists.
    now = json.loads(json_bytes(dict(current)))
    differing = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key)]
    if not differing:
        return
    lines = [f"  {key}: {saved.get(key)!r} in the checkpoint, {now.get(key)!r} now" for key in differing]
    message = "\n".join(["The checkpoint belongs to another run:", *lines])
    if not force:
        raise CheckpointError(
            message,
            hint="Give the same settings as before, or --force to resume nevertheless, or another --out.",
        )
    warn(message)


def sweep(folder: Path) -> list[Path]:
    """Cleans up after processes that died during a save, and returns the removed paths. Call it under `lock`.

    A checkpoint that was being replaced is renamed back if its replacement is missing.
    """
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or _is_alive(int(match["pid"])):
            continue
        if match["step"] and not (target := folder / f"step-{match['step']}").exists():
            rename_over(path, target)
            continue
        _remove(path)
        removed.append(path)
    return removed


def _write(path: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]) -> None:
    path.mkdir()
    durable_write(path / STATE, json_bytes(dict(state)))
    # safetensors creates files that only the owner can read; files of Python have the mode of the umask.
    for stem, group in tensors.items():
        file = path / f"{stem}.safetensors"
        # safetensors rejects tensors that overlap in memory, as views of one flat buffer may: so copy them.
        save_file({name: t.detach().to("cpu", copy=True).contiguous() for name, t in group.items()}, file)
        shutil.copymode(path / STATE, file)
        fsync_file(file)
    manifest = {
        "format": FORMAT,
        "step": step,
        "versions": {
            "octavo": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
        "files": {
            file.name: {"size_bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(path.iterdir())
        },
    }
    durable_write(path / MANIFEST, json_bytes(manifest))
    fsync_folder(path)


def _publish(temporary: Path, target: Path) -> None:
    # Between the two renames the old checkpoint, under its .old- name, is still a candidate for loading.
    exchange(temporary, target, old=target.with_name(f".old-{target.name.removeprefix('step-')}-{os.getpid()}"))


def _delete_earlier(folder: Path, step: int, *, keep: int, protect: Collection[int]) -> None:
    finished = [path for path in _candidates(folder) if _FINISHED.fullmatch(path.name)]
    # Later steps are of an earlier run that went further; this save does not delete them.
    own_steps = [path for path in finished if _step(path) <= step]
    for path in own_steps[keep:]:
        if _step(path) not in protect:
            # Renamed before the removal: a kill must not leave half a checkpoint named step-*.
            condemned = folder / f".tmp-{_step(path):08d}-{os.getpid()}"
            rename_over(path, condemned)
            _remove(condemned)


def _candidates(folder: Path) -> list[Path]:
    """All possible checkpoints in `folder`, the newest first. A replaced one comes after its replacement."""
    paths = folder.iterdir() if folder.is_dir() else ()
    matches = [p for p in paths if _FINISHED.fullmatch(p.name) or _REPLACED.fullmatch(p.name)]
    return sorted(matches, key=lambda p: (_step(p), p.name.startswith("step-")), reverse=True)


def _step(path: Path) -> int:
    match = re.search(r"-(\d+)", path.name)
    assert match, path
    return int(match[1])


def _file_problems(folder: Path, name: str, *, size_bytes: int, digest: str) -> list[str]:
    if Path(name).name != name or "\0" in name:
        return [f"{MANIFEST} names a file outside the checkpoint"]
    try:
        actual_bytes = (folder / name).stat().st_size
        if actual_bytes != size_bytes:
            return [f"{name} has {actual_bytes:,} bytes instead of {size_bytes:,}"]
        return [] if sha256_of(folder / name) == digest else [f"{name} has changed since it was saved"]
    except OSError as error:
        return [f"{name} cannot be read: {error.strerror}"]


def _load(path: Path) -> Checkpoint:
    """Reads the verified checkpoint at `path`: only the files in its manifest."""
    names = sorted(read_object(path / MANIFEST, error=CheckpointError)["files"])
    # load() of bytes, since safetensors opens no path that is not UTF-8.
    tensors = {Path(name).stem: load((path / name).read_bytes()) for name in names if name.endswith(".safetensors")}
    state = read_object(path / STATE, error=CheckpointError, strict=False)  # allows NaN: losses of a diverged run
    return Checkpoint(step=_step(path), path=path, tensors=tensors, state=state)


def _is_alive(pid: int) -> bool:
    # This process does not save while it sweeps: its own pid is of an earlier process, as happens in containers.
    return pid != os.getpid() and is_alive(pid)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
