"""Training checkpoints that survive kill -9, a full disk and a flipped bit.

    step-00000040/
      adapter/           a folder in PEFT's format (store/peft.py), as the adapter of a finished run
      NAME/              other adapters, in the same format
      NAME.safetensors   a group of other tensors, e.g. the optimizer's state
      state.json         everything else
      manifest.json      runs/checkpoint_folder.py

A checkpoint is written by atomic.new_folder: under a temporary name, forced to disk, read back against its manifest and
renamed. So a folder named step-* is complete from the moment it exists. Loading trusts only the manifest (size and
SHA-256 of every file), not the name, and not `latest`, which a crash can leave one save behind.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from octavo._version import __version__
from octavo.atomic import atomic_write, new_folder, remove_folder
from octavo.bounded_json import read_object
from octavo.errors import AdapterError, CheckpointError
from octavo.failures import cut, explained
from octavo.runs.checkpoint_folder import (
    DELETE,
    LATEST,
    STATE,
    files_of,
    finished,
    folder_of,
    newest_valid,
    step_of,
    verify,
    write_manifest,
)
from octavo.store import peft
from octavo.store.files import durable_write, json_bytes
from octavo.store.peft import Adapter


@dataclass(frozen=True)
class Contents:
    """What a checkpoint is made of.

    Each entry of `tensors` becomes one safetensors file, for any dtype, shape and shared memory, and each entry of
    `adapters` a folder that its function fills. `state` must be JSON: numbers of any size, strings, lists, dicts with
    string keys. Tuples are read back as lists.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    adapters: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `tensors` by file stem and tensor name, on the CPU; `state` as it was saved."""

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    def adapter(self, name: str = "adapter") -> Adapter:
        """One of its adapters. CheckpointError if it cannot be read."""
        try:
            return peft.read(self.path / name)
        except AdapterError as error:
            raise CheckpointError(error.message, hint=error.hint) from error


def save(
    folder: Path,
    step: int,
    contents: Contents,
    *,
    keep: int = 2,
    protect: Collection[int] = (),
    warn: Callable[[str], None] = lambda _: None,
) -> Path:
    """Writes the checkpoint of `step` into `folder` and returns its path. It is durable on return.

    Of this and the earlier steps the newest `keep` are kept, and every step in `protect`. `warn` gets a line if an old
    checkpoint cannot be deleted. Raises CheckpointError if this one cannot be written; the earlier checkpoints are then
    untouched.
    """
    assert keep >= 1, "a save must not delete itself"
    target = folder_of(folder, step)
    try:
        with new_folder(target, replace=True, check=_read_back) as temporary:
            _write(temporary, step, contents)
        atomic_write(folder / LATEST, f"{target.name}\n".encode())
    except (OSError, safetensors.SafetensorError) as error:
        known = explained(error)  # safetensors wraps errors of the operating system in a class of its own
        raise CheckpointError(
            f"{target}: the checkpoint cannot be written. {known.message if known else cut(error)}",
            hint=f"{known.hint if known else ''} The earlier checkpoints are untouched.".strip(),
        ) from error
    try:
        _delete_earlier(folder, step, keep=keep, protect=protect)
    except OSError as error:  # the new checkpoint is complete nevertheless
        warn(f"An earlier checkpoint cannot be deleted ({error.strerror}: {error.filename or folder}).")
    return target


def newest(folder: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The valid checkpoint of the highest step in `folder`, loaded; None if there is no checkpoint at all.

    Warns and raises as `newest_valid`.
    """
    path = newest_valid(folder, warn=warn)
    if path is None:
        return None
    # load() of bytes, since safetensors opens no path that is not UTF-8.
    names = [Path(name) for name in files_of(path) if name.endswith(".safetensors") and "/" not in name]
    tensors = {name.stem: _loaded(path / name) for name in names}
    state = read_object(path / STATE, error=CheckpointError, strict=False)  # allows NaN: losses of a diverged run
    return Checkpoint(step=step_of(path), path=path, tensors=tensors, state=state)


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


def _loaded(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of a checkpoint. CheckpointError if it is not safetensors."""
    try:
        return load(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a safetensors file: {cut(error)}. The checkpoint's manifest lists it with this content.",
            hint=DELETE,
        ) from error


def _write(path: Path, step: int, contents: Contents) -> None:
    durable_write(path / STATE, json_bytes(dict(contents.state)))
    for name, fill in contents.adapters.items():
        (path / name).mkdir()
        fill(path / name)
    for stem, group in contents.tensors.items():
        file = path / f"{stem}.safetensors"
        # safetensors rejects tensors that overlap in memory, as views of one flat buffer may: so copy them.
        save_file({name: t.detach().to("cpu", copy=True).contiguous() for name, t in group.items()}, file)
        # safetensors creates files that only the owner can read; files of Python have the mode of the umask.
        shutil.copymode(path / STATE, file)
    versions = {
        "octavo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
    }
    write_manifest(path, step, versions=versions)


def _read_back(path: Path) -> None:
    """CheckpointError unless the files of a written checkpoint are those of its manifest."""
    if problems := verify(path):
        raise CheckpointError(
            f"{path}: reading the checkpoint back gave different data: {problems[0]}",
            hint="The disk or the memory is failing. The earlier checkpoints are untouched.",
        )


def _delete_earlier(folder: Path, step: int, *, keep: int, protect: Collection[int]) -> None:
    # Later steps are of an earlier run that went further; this save does not delete them.
    earlier = [path for path in finished(folder) if step_of(path) <= step]
    for path in earlier[keep:]:
        if step_of(path) not in protect:
            remove_folder(path)
