"""The settings and the circumstances in which runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from octavo.commands.compare.read import ReadRun
from octavo.config import fields
from octavo.config.commands import FINETUNE
from octavo.runs import events

# Of one call, or of the folder: they do not change what is trained.
NOT_COMPARED = frozenset({"out", "resume", "force", "stop_after"})


def differing_settings(runs: Sequence[ReadRun]) -> dict[str, list[Any]]:
    """Each setting that differs, with its value in each run, in the order of config.yaml.

    A setting that an older run does not have has its default. A run without config.yaml has None.
    """
    defaults = {name: field.get_default(call_default_factory=True) for name, field in fields(FINETUNE)}
    names = list(dict.fromkeys([*defaults, *(name for run in runs for name in run.settings)]))
    values = {name: [run.settings.get(name, _missing(run, defaults, name)) for run in runs] for name in names}
    return {
        name: each for name, each in values.items() if name not in NOT_COMPARED and any(one != each[0] for one in each)
    }


def differing_circumstances(runs: Sequence[ReadRun]) -> dict[str, list[Any]]:
    """What differs although no setting says it: the training text, the device, its dtype, and versions."""
    rows = [_circumstances(run) for run in runs]
    return {name: [row[name] for row in rows] for name in rows[0] if any(row[name] != rows[0][name] for row in rows)}


def shown_setting(values: Sequence[Any]) -> list[str]:
    """The values of one setting as text; absolute paths by their last parts, as many as tell them apart."""
    lists = [value if isinstance(value, list) else [value] for value in values]
    texts = [[_text(item) for item in items] for items in lists]
    for count in range(1, 8):
        shortened = [", ".join(_last_parts(text, count) for text in line) for line in texts]
        if len(set(shortened)) == len({tuple(line) for line in texts}):
            return shortened
    return [", ".join(line) for line in texts]


def _missing(run: ReadRun, defaults: Mapping[str, Any], name: str) -> Any:
    default = defaults.get(name) if run.settings else None
    return default if isinstance(default, bool | int | float | str | list | None) else str(default)


def _circumstances(run: ReadRun) -> dict[str, Any]:
    hardware = events.last(run.events, events.Hardware)
    versions = events.last(run.events, events.Versions)
    return {
        "training tokens": run.training_tokens,
        "device name": hardware.name if hardware else None,
        "compute dtype": hardware.dtype.removeprefix("torch.") if hardware else None,
        "octavo": versions.octavo if versions else None,
        "torch": versions.torch if versions else None,
        "transformers": versions.transformers if versions else None,
    }


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _last_parts(text: str, count: int) -> str:
    """The last parts of an absolute path; other text as it is."""
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(text)
        if path.is_absolute() and len(path.parts) > count + 1:
            return "/".join(["..", *path.parts[-count:]])
    return text
