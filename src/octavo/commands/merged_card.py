"""The model card (README.md) of a merged model: base, adapter, type, use, and what the adapter's run measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from octavo._version import __version__
from octavo.commands.model_card import About, data_files, is_hub_id, public_name, results
from octavo.commands.push import about
from octavo.runs.folder import RunFolder
from octavo.store.base_names import hub_id, licence_of
from octavo.store.merged import MergedSource
from octavo.store.sources import fingerprint

FROM_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

or `octavo generate --model THIS_FOLDER --prompt '..'`."""
OCTAVO_ALONE = "`octavo generate --model THIS_FOLDER --prompt '..'`. The weights are in octavo's format."


@dataclass(frozen=True)
class MergedModel:
    """`name` is that of the folder, `base` what --model names, stored as `base_scheme`; `adapter` is its folder."""

    name: str
    base: str
    base_scheme: str
    adapter: Path
    type: str
    source: MergedSource


def merged_card(model: MergedModel) -> str:
    """The text of README.md, with the metadata block that the hub reads. It has names of files and no folders."""
    base, run = public_name(hub_id(model.base)), run_of(model.adapter)
    licence = licence_of(model.base)
    trained = about(run.path, model.adapter) if run is not None else None
    metadata: dict[str, Any] = {"base_model": base} if is_hub_id(base) else {}
    metadata |= {"library_name": "transformers" if _is_plain(model) else "octavo"}
    metadata |= {"pipeline_tag": "text-generation", "tags": ["octavo", "merged-lora"]}
    metadata |= {"license": licence} if licence else {}
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# {model.name}: {base} with a LoRA adapter merged",
        f"Made by octavo {__version__} with `octavo merge`: the adapter is part of the weights.",
        _table(model, base, trained),
        *_measured(trained),
        *(data_files(trained) if trained is not None else []),
        f"## Use\n\n{FROM_TRANSFORMERS if _is_plain(model) else OCTAVO_ALONE}",
        "## Limits\n\nThe merged weights are rounded to their type, so the model differs slightly from its base with "
        "the adapter. It can repeat parts of the training text of the adapter word for word. "
        + ("" if licence else "The licence of the base is not recorded here; its terms apply to this model."),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def run_of(adapter: Path) -> RunFolder | None:
    """The run that an adapter's folder belongs to, as RUN/adapter or the adapter of one of its checkpoints."""
    runs = [RunFolder(parent) for parent in list(adapter.parents)[:3]]
    return next((run for run in runs if run.settings.is_file() and run.is_run()), None)


def _is_plain(model: MergedModel) -> bool:
    """Whether transformers loads the folder."""
    return model.type in ("bfloat16", "float16", "float32")


def _table(model: MergedModel, base: str, trained: About | None) -> str:
    """The facts of the merge."""
    adapter = model.source.adapter
    into = "unquantized" if model.base_scheme == "none" else f"dequantized {model.base_scheme}"
    modules, identity = model.source.merged(), fingerprint(model.source.base)
    rows = [
        ("base", f"{base}, {into} weights"),
        ("base weights, SHA-256", f"`{identity}`"),
        ("adapter, SHA-256 of its tensors", f"`{adapter.sha256}`"),
        ("type", model.type),
        ("modules with LoRA", f"{len(adapter.lora):,}"),
        ("other modules", f"{len(modules.keys() - adapter.lora.keys()):,}"),
    ]
    if adapter.trained_on not in (None, identity):
        rows.append(("the adapter was trained on other weights, SHA-256", f"`{adapter.trained_on}`"))
    if trained is not None:
        rows.append(("optimizer step of the adapter", f"{trained.step:,}"))
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _measured(trained: About | None) -> list[str]:
    """The results of the run, before the merge."""
    if trained is None or not (parts := results(trained)):
        return []
    scheme = trained.settings.get("scheme")
    return [*parts, f"Measured in training, with the adapter over the frozen weights (scheme {scheme}), not merged."]
