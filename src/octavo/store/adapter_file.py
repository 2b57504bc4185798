"""The tensors of an adapter folder: adapter_model.safetensors, or adapter_model.bin if pickles are allowed.

Also the error for a folder that holds no adapter.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from octavo.bounded_json import some
from octavo.errors import AdapterError, ModelError
from octavo.store.peft_config import CONFIG, function_of
from octavo.store.sources import load_pickle

TENSORS = "adapter_model.safetensors"
ORIGIN = "octavo.json"
HASH_DIGITS = 16  # of a tensor in octavo.json: enough to name damaged tensors; the hash of all has 64
PICKLE = "adapter_model.bin"  # written by PEFT before 0.7 and by alpaca-lora
EXPECTED = "Give the folder of an adapter or of a run, or RUN@STEP for the adapter of a checkpoint."
DAMAGED = "Is the file complete? Fetch it again, or restore it from a copy."
LFS_START = b"version https://git-lfs"


def read_tensors(folder: Path, *, allow_pickle: bool) -> tuple[dict[str, Tensor], str]:
    """(the tensors by their names in the file, the SHA-256 of the file).

    The tensors are copies, so overwriting the file does not change them. AdapterError if the file is missing, broken, a
    Git LFS pointer, or a pickle that is not allowed, and for tensors that are not floating-point or not finite.
    """
    path = folder / TENSORS
    if not path.exists() and (folder / PICKLE).exists():
        path = folder / PICKLE
        if not allow_pickle:
            raise AdapterError(
                f"The adapter in {folder} is a pickle ({PICKLE}): a format that can carry programs.",
                hint="octavo reads it with weights_only, which refuses programs. If you trust where it comes from, "
                "pass --allow-pickle.",
            )
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise AdapterError(f"{path} is not a regular file.")
        data = path.read_bytes()
        if data.startswith(LFS_START):
            raise AdapterError(
                f"{path} is a Git LFS pointer: the file itself was not fetched.",
                hint="Run `git lfs pull` in its clone.",
            )
        tensors = load(data) if path.name == TENSORS else _unpickled(path)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror or error}).") from error
    except (SafetensorError, ModelError) as error:
        raise AdapterError(f"The adapter in {folder} cannot be read: {path.name}: {error}", hint=DAMAGED) from error
    for key, tensor in tensors.items():
        _check(folder, key, tensor)
    return tensors, hashlib.sha256(data).hexdigest()


def _unpickled(path: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in load_pickle(path).items()}


def _check(folder: Path, key: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise AdapterError(f"The adapter in {folder} holds {key[:200]} as {tensor.dtype}; octavo reads 16 to 64 bits.")
    # A NaN or an infinity appears in the minimum or the maximum. Unlike isfinite() this allocates nothing.
    # The model has adapters in float32, where a large float64 value is infinite.
    if tensor.numel() and not bool(torch.stack(tensor.aminmax()).float().isfinite().all()):
        raise AdapterError(
            f"The adapter in {folder} holds values that are not finite in float32, in {key[:200]}.",
            hint="Did its training diverge, or was the file damaged? Use an earlier checkpoint of it.",
        )


def tensors_sha256(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """The hash of everything that decides an adapter's output: its tensors by name, and FUNCTION_KEYS of the config.

    It does not depend on the layout of the file. `config` is the content of adapter_config.json.
    """
    digest = hashlib.sha256(json.dumps(function_of(config), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The hash of each tensor, with its type and shape, so that an error can name those that changed."""
    return {
        name: hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode() + _bytes_of(tensor)).hexdigest()[
            :HASH_DIGITS
        ]
        for name, tensor in tensors.items()
    }


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).reshape(-1).numpy().tobytes() if tensor.numel() else b""


def changed(folder: Path, tensors: Mapping[str, Tensor], recorded: object) -> AdapterError:
    """The error for an adapter of octavo that is not as it was written.

    `recorded` are the hashes of the tensors in octavo.json; octavo.json of earlier versions has none.
    """
    found = f"its tensors or the values in {CONFIG} do not have the hash in {ORIGIN}"
    if isinstance(recorded, dict) and recorded:
        actual = tensor_hashes(tensors)
        faults = {
            "lacks": [name for name in recorded if name not in actual],
            "has, and should not have,": [name for name in actual if name not in recorded],
            "has other values or another shape in": [k for k in actual if recorded.get(k, actual[k]) != actual[k]],
        }
        parts = [f"{fault} {some(sorted(names))}" for fault, names in faults.items() if names]
        found = f"{TENSORS} " + "; it ".join(parts) if parts else f"the values in {CONFIG} are others"
    return AdapterError(
        f"The adapter in {folder} has changed since it was written: {found}.",
        hint="Restore it from a copy.",
    )


def no_adapter(folder: Path) -> AdapterError:
    """The error for a folder without adapter_config.json, with the kind of the folder and a next step."""
    if not folder.is_dir():
        return AdapterError(f"There is no folder {folder}.", hint=EXPECTED)
    if checkpoint := newest_checkpoint(folder, CONFIG):
        what, hint = "holds checkpoints of a Trainer", f"Give its newest adapter: {checkpoint}"
    elif (folder / "config.json").is_file():
        what, hint = "is a model's folder", f"Give it with --model {folder}, without --adapter."
    elif (folder / TENSORS).exists() or (folder / PICKLE).exists():
        what, hint = f"holds an adapter's tensors without {CONFIG}", f"Copy the adapter's {CONFIG} into it."
    else:
        return AdapterError(f"{folder} holds no adapter (no {CONFIG}).", hint=EXPECTED)
    return AdapterError(f"{folder} {what}, not an adapter (no {CONFIG}).", hint=hint)


def newest_checkpoint(folder: Path, *files: str) -> Path | None:
    """The folder checkpoint-N of a Trainer with the highest N below `folder` that contains one of `files`."""
    folders = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,18}", path.name)]
    complete = [path for path in folders if any((path / name).is_file() for name in files)]
    return max(complete, key=lambda path: int(path.name.partition("-")[2]), default=None)
