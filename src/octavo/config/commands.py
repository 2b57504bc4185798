"""The sections of each command, and its configuration from given options, a settings file or the run to resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from octavo.config import (
    AdapterBaseOptions,
    AdapterCombineOptions,
    AdapterDiffOptions,
    AdapterFileOptions,
    AdapterShowOptions,
    ChatOptions,
    CheckOptions,
    CompareOptions,
    Config,
    ConvertOptions,
    DataOptions,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    LoraCommon,
    LoraOptions,
    MemoryOptions,
    MergeOptions,
    ModelOptions,
    PlanOptions,
    ProbeOptions,
    PromptOptions,
    PushOptions,
    QuantizeOptions,
    RunOptions,
    RunsOptions,
    ServeOptions,
    TextOptions,
    TrainCommon,
    TrainingData,
    TrainOptions,
    TuneOptions,
    WindowOptions,
)
from octavo.config.section import Section, flag_of
from octavo.config.settings import read_settings
from octavo.errors import UsageError
from octavo.runs.folder import RunFolder

Sections = tuple[type[Section], ...]

FINETUNE: Sections = (
    ModelOptions, TrainingData, TextOptions, LoraOptions, TrainOptions, MemoryOptions, WindowOptions, ProbeOptions,
    RunOptions,
)  # fmt: skip
TUNE: Sections = (ModelOptions, TrainingData, TextOptions, LoraCommon, TrainCommon, MemoryOptions, TuneOptions)
PLAN: Sections = (ModelOptions, TextOptions, LoraOptions, TrainOptions, MemoryOptions, PlanOptions)
EVALUATE: Sections = (ModelOptions, EvaluateOptions, WindowOptions, ProbeOptions, TextOptions)
GENERATE: Sections = (ModelOptions, GenerateOptions, PromptOptions)
CHAT: Sections = (ModelOptions, GenerateOptions, ChatOptions)
SERVE: Sections = (ModelOptions, ServeOptions)
QUANTIZE: Sections = (ModelOptions, QuantizeOptions)
CONVERT: Sections = (ConvertOptions,)
MERGE: Sections = (MergeOptions,)
EXPORT: Sections = (ExportOptions,)
RUNS: Sections = (RunsOptions,)
COMPARE: Sections = (CompareOptions,)
PUSH: Sections = (PushOptions,)
ADAPTER_SHOW: Sections = (AdapterShowOptions, AdapterBaseOptions, AdapterFileOptions)
ADAPTER_DIFF: Sections = (AdapterDiffOptions, AdapterFileOptions)
ADAPTER_COMBINE: Sections = (AdapterCombineOptions, AdapterBaseOptions, AdapterFileOptions)
CHECK: Sections = (CheckOptions,)
DATA: Sections = (ModelOptions, DataOptions, TextOptions)


# The last key of every run's config.yaml. Options of later versions go before it: older runs do not have them.
LAST_SETTING = "stop_after"
LAST_OF_SEARCH = "out"  # the same of `octavo tune`


def configure(
    sections: Sections,
    given: Mapping[str, Any],
    file: Path | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
    shown: Callable[[str], str] = flag_of,
    hint: str = "",
) -> Config:
    """The configuration of one call of a command, as `Config.read`.

    Without `file`, a run that is resumed has the settings in its config.yaml.
    """
    saved = None if file else _saved_settings(sections, {**(defaults or {}), **given})
    options: dict[str, Any] = {"hint": hint} if hint else {}
    return Config.read(sections, given, file or saved, defaults=defaults, shown=shown, **options)


def _saved_settings(sections: Sections, given: Mapping[str, Any]) -> Path | None:
    """The config.yaml of the run to resume."""
    kind = next((kind for kind in (RunOptions, TuneOptions) if kind in sections), None)
    if kind is None or not given.get("resume"):
        return None
    try:
        run = RunFolder(kind.model_validate({key: given[key] for key in given if key == "out"}).out)
    except ValidationError:  # `Config.read` names the option
        return None
    run.check_format()
    if not run.settings.is_file():
        return None
    last = LAST_SETTING if kind is RunOptions else LAST_OF_SEARCH
    if last not in read_settings(run.settings):
        hint = "Pass the run's settings with --config FILE, or delete the file and pass them as options."
        raise UsageError(f"{run.settings} is cut short: its last key `{last}` is missing.", hint=hint)
    return run.settings
