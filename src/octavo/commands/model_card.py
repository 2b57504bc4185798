"""The model card of an adapter (README.md): what the held-out text shows, data, settings, use, limits.

The same text is in the adapter folder of a finished run and on the hub. It has names of files and no folders, and
nothing that the run did not record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import yaml

from octavo._version import __version__
from octavo.runs import events
from octavo.runs.interval import Interval
from octavo.runs.loss_unit import NATS, LossUnit, unit_of
from octavo.runs.verdict import verdict_of

MAX_FILES = 200  # of the data that are listed; ledger.json of the run has all
SETTINGS = (
    "scheme", "dtype", "seq_len", "rank", "alpha", "dropout", "rslora", "lora_targets", "train_norms", "train_biases",
    "steps", "epochs", "batch_size", "lr", "schedule", "warmup", "weight_decay", "optimizer", "seed", "keep",
    "init_adapter",
)  # fmt: skip


@dataclass(frozen=True)
class About:
    """What a model card is written from. `base` is the hub id of the base, or the name or path that --model had."""

    settings: Mapping[str, Any]
    base: str
    base_sha256: str
    step: int
    licence: str = ""  # of the base, as the hub writes it; "" if it is not known
    events: Sequence[events.Event] = ()
    ledgers: Mapping[str, Any] = field(default_factory=dict)  # ledger.json
    file_names: bool = True
    adapter: str = "THIS_FOLDER"  # how the examples of use name it


def model_card(about: About) -> str:
    """The text of README.md, with the metadata block that the hub reads."""
    base = public_name(about.base)
    metadata: dict[str, Any] = {"base_model": base} if is_hub_id(base) else {}
    metadata |= {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "octavo"]}
    if about.licence:
        metadata["license"] = about.licence
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# LoRA adapter for {base}",
        f"Made by octavo {__version__}; the adapter of optimizer step {about.step:,}.",
        *results(about),
        *data_files(about),
        settings_table(about),
        _use(about, base),
        "## Limits\n\nThe figures are those of the held-out text alone: they say nothing about other text, about "
        "facts, or about safety. The adapter can repeat parts of its training text word for word. "
        + ("" if about.licence else "The licence of the base is not recorded here; its terms apply to the adapter. "),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def results(about: About) -> list[str]:
    """The verdict, and the table of scores with 95 % intervals."""
    evaluation = events.last(about.events, events.Evaluation)
    if evaluation is None or not evaluation.rows:
        return []
    lines = ["| model | weights | bits per byte | 95 % interval | perplexity | tokens | context |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in evaluation.rows:
        unit = unit_of(row)
        bounds = _interval(row.interval, unit) if row.interval and unit is not NATS else "-"
        numbers = (_number(row.bits_per_byte), bounds, _number(row.perplexity))
        counts = [f"{count:,}" if count is not None else "-" for count in (row.tokens, row.context)]
        lines.append("| " + " | ".join([row.name, row.scheme, *numbers, *counts]) + " |")
    sentences = _sentences(about)
    rows = {(row.name, row.scheme): row for row in evaluation.rows}
    differences = [
        _difference(one, unit_of(rows.get((one.before, one.before_scheme))))
        for one in evaluation.differences
        if one.lower_by is not None
    ]
    return ["## Held-out text", "\n".join(f"- {each}" for each in sentences), "\n".join(lines), "\n".join(differences)]


def _difference(one: events.Difference, unit: LossUnit) -> str:
    assert one.lower_by is not None
    interval = f", 95 % interval {_interval(one.interval, unit)}" if one.interval else ""
    size = f"{unit.of(one.lower_by):.4f} {unit.name}"
    return f"The loss of {one.after} is lower than that of {one.before} by {size}{interval}."


def _interval(bounds: Interval, unit: LossUnit) -> str:
    low, high = unit.bounds(bounds)
    return f"{low:.4f} to {high:.4f}"


def _sentences(about: About) -> list[str]:
    """The sentences of the verdict. Those about single files are left out, unless file names may be shown."""
    verdict = verdict_of(about.events)
    count = len(verdict.files) if verdict.files and len(verdict.sentences) > len(verdict.files) else 0
    sentences = list(verdict.sentences)
    if about.file_names or not count or ": gain " not in sentences[-1]:
        return sentences
    return [each for each in sentences if ": gain " not in each]


def data_files(about: About) -> list[str]:
    """The files of the data with their SHA-256 and counts."""
    rows = []
    for key, side in (("train", "training"), ("test", "held out")):
        ledger = about.ledgers.get(key)
        files = ledger.get("files") if isinstance(ledger, dict) else None
        listed = [file for file in files if isinstance(file, dict)] if isinstance(files, list) else []
        for number, file in enumerate(listed, start=1):
            name = PurePath(str(file.get("source", ""))).name if about.file_names else f"file {number}"
            digest = f"`{file['sha256']}`" if file.get("sha256") else "-"
            rows.append(f"| {side} | {_cell(name)} | {_count(file.get('tokens'))} | {digest} |")
    if not rows:
        return []
    more = [f"{len(rows) - MAX_FILES:,} more files are not listed."] if len(rows) > MAX_FILES else []
    head = "| text | file | tokens | SHA-256 |\n|---|---|---|---|\n"
    return ["## Data", head + "\n".join(rows[:MAX_FILES]), *more]


def settings_table(about: About) -> str:
    values = [(name, about.settings.get(name)) for name in SETTINGS]
    values = [(name, PurePath(value).name if name == "init_adapter" and value else value) for name, value in values]
    rows = [
        f"| {name.replace('_', ' ')} | {_cell(', '.join(map(str, value)) if isinstance(value, list) else str(value))} |"
        for name, value in values
        if value is not None and not (name == "epochs" and about.settings.get("steps") is not None)
    ]
    rows.append(f"| base weights, SHA-256 | `{about.base_sha256}` |")
    if versions := events.last(about.events, events.Versions):
        named = f"octavo {versions.octavo}, PyTorch {versions.torch}, transformers {versions.transformers}"
        rows.append(f"| versions | {named} |")
    if hardware := events.last(about.events, events.Hardware):
        rows.append(f"| hardware | {_cell(hardware.name or hardware.device)} ({hardware.dtype}) |")
    return "## Settings\n\n| setting | value |\n|---|---|\n" + "\n".join(rows)


def _use(about: About, base: str) -> str:
    model = str(about.settings.get("model", base))
    command = f"octavo generate --model {public_name(model)} --adapter {about.adapter} --prompt '..'"
    return f"""## Use

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{about.adapter}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
```

or `{command}`, with the adapter in a folder."""


def is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def public_name(name: str) -> str:
    """A hub id as it is; of a path the last name, so that it has no folders of a machine."""
    return name if is_hub_id(name) and PurePath(name).suffix != ".gguf" else PurePath(name).name or name


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
