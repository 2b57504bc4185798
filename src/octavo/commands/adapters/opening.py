"""The adapters that `octavo adapters` reads, and the base that --model names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from octavo.bounded_json import shown
from octavo.commands.loading import open_model
from octavo.config import AdapterBaseOptions, AdapterFileOptions, Config, ModelOptions
from octavo.models import names_in_file
from octavo.reporting import Report
from octavo.runs.adapter import adapter_folder, read_adapter
from octavo.runs.folder import RunFolder
from octavo.store.base_names import base_warning
from octavo.store.base_weights import BaseWeights
from octavo.store.peft import Adapter, renamed


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter as it was named, and the folder in PEFT's format that this is."""

    name: str
    folder: Path
    adapter: Adapter

    @property
    def base_name(self) -> str:
        """The name of its base: that of adapter_config.json, else that of octavo.json."""
        recorded = self.adapter.origin.get("base")
        return self.adapter.base or (str(recorded.get("name", "")) if isinstance(recorded, dict) else "")

    @property
    def run(self) -> RunFolder | None:
        """The run whose adapter, or whose checkpoint's adapter, this is."""
        folder = self.folder.absolute()
        parents = list(folder.parents)
        candidates = [parents[0]] if parents and folder.name == "adapter" else []
        if len(parents) > 2 and parents[1].name == "checkpoints":
            candidates = [parents[2]]
        return next((run for path in candidates if (run := RunFolder(path)).is_run() and run.metrics.exists()), None)

    @property
    def ends_run(self) -> bool:
        """Whether it is the adapter that its run keeps, not that of a checkpoint."""
        return self.run is not None and self.folder.absolute() == self.run.adapter


def open_adapter(name: str, config: Config, report: Report) -> OpenedAdapter:
    """The adapter that `name` names: a folder, a run or RUN@STEP, as everywhere (runs/adapter.py)."""
    find = partial(adapter_folder, say=report.say, warn=report.warn)
    allow_pickle = config[AdapterFileOptions].allow_pickle
    folder, adapter = read_adapter(Path(name), find=find, allow_pickle=allow_pickle)
    return OpenedAdapter(name, folder, adapter)


def with_names_of(first: OpenedAdapter, other: OpenedAdapter) -> OpenedAdapter:
    """`other` with the names that its modules have in `first`: those of a text model, or of a composite one."""
    names = names_in_file(module_names(other.adapter), module_names(first.adapter))
    return replace(other, adapter=renamed(other.adapter, names))


def module_names(adapter: Adapter) -> list[str]:
    """The modules that an adapter changes, each once."""
    names = (*adapter.lora, *adapter.tokens, *(key.rpartition(".")[0] for key in adapter.full))
    return list(dict.fromkeys(names))


def open_base(config: Config, opened: Iterable[OpenedAdapter], report: Report) -> BaseWeights | None:
    """The weights of --model, None without it. Warns about adapters that were trained on another base."""
    options = config[AdapterBaseOptions]
    if options.model is None:
        return None
    values = {"model": options.model, "revision": options.revision}
    model_options = ModelOptions(**values, allow_pickle=config[AdapterFileOptions].allow_pickle)
    source = open_model(model_options, report)
    given: list[str] = []
    for one in opened:
        given += module_names(one.adapter)
        if warning := base_warning(one.adapter, one.folder, source):
            report.warn(warning)
    return BaseWeights(source, given)


def base_text(opened: OpenedAdapter) -> str:
    """The base as results show it: its name and the beginning of its hash."""
    name = shown(opened.base_name) if opened.base_name else "not named"
    return f"{name} (SHA-256 {opened.adapter.trained_on})" if opened.adapter.trained_on else f"{name} (hash unknown)"
