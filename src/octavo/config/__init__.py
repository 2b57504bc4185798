"""The configuration of a command: sections of options (options.py), read from flags and YAML files.

A command has some of the sections. Every option is a flag (`--seq-len`) and a YAML key (`seq_len`) with the
same name; a flag has precedence over the file, the file over the default. flags.py makes the command line from these
fields, so an option is defined once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from octavo.bounded_json import shortened
from octavo.config.adapter_options import (
    AdapterBaseOptions,
    AdapterCombineOptions,
    AdapterDiffOptions,
    AdapterFileOptions,
    AdapterShowOptions,
)
from octavo.config.command_options import (
    ChatOptions,
    CheckOptions,
    CompareOptions,
    ConvertOptions,
    DataOptions,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    MergeOptions,
    PlanOptions,
    PromptOptions,
    PushOptions,
    QuantizeOptions,
    RunsOptions,
    ServeOptions,
)
from octavo.config.demo import DEMO
from octavo.config.options import (
    LoraCommon,
    LoraOptions,
    MemoryOptions,
    ModelOptions,
    ProbeOptions,
    RunOptions,
    TextOptions,
    TrainCommon,
    TrainingData,
    TrainOptions,
    WindowOptions,
)
from octavo.config.search import TuneOptions
from octavo.config.section import Section, fields, flag_of, size_in_bytes
from octavo.config.settings import read_settings
from octavo.errors import UsageError

__all__ = [
    "DEMO",
    "AdapterBaseOptions",
    "AdapterCombineOptions",
    "AdapterDiffOptions",
    "AdapterFileOptions",
    "AdapterShowOptions",
    "ChatOptions",
    "CheckOptions",
    "CompareOptions",
    "Config",
    "ConvertOptions",
    "DataOptions",
    "EvaluateOptions",
    "ExportOptions",
    "GenerateOptions",
    "LoraCommon",
    "LoraOptions",
    "MemoryOptions",
    "MergeOptions",
    "ModelOptions",
    "PlanOptions",
    "ProbeOptions",
    "PromptOptions",
    "PushOptions",
    "QuantizeOptions",
    "RunOptions",
    "RunsOptions",
    "Section",
    "ServeOptions",
    "TextOptions",
    "TrainCommon",
    "TrainOptions",
    "TrainingData",
    "TuneOptions",
    "WindowOptions",
    "fields",
    "size_in_bytes",
]

MAX_PROBLEMS = 20  # reported errors of a section: a list may have thousands

SectionT = TypeVar("SectionT", bound=Section)


class Config:
    """The validated sections of one command: `config[TrainOptions].lr` is a value."""

    def __init__(self, sections: Mapping[type[Section], Section]) -> None:
        self._sections = dict(sections)

    def __getitem__(self, kind: type[SectionT]) -> SectionT:
        section = self._sections[kind]
        assert isinstance(section, kind)
        return section

    @property
    def kinds(self) -> tuple[type[Section], ...]:
        """The types of the sections."""
        return tuple(self._sections)

    @classmethod
    def read(
        cls,
        kinds: tuple[type[Section], ...],
        flags: Mapping[str, Any],
        file: Path | None = None,
        *,
        defaults: Mapping[str, Any] | None = None,
        shown: Callable[[str], str] = flag_of,
        hint: str = "`--help` lists the options, `--print-config` their values.",
    ) -> Self:
        """Reads the sections `kinds`: flags (by field name) have precedence over a YAML file, the file over defaults.

        `defaults` are the defaults of a command that differ from those of the sections. The UsageError for an invalid
        value names the key and the problem; for an unknown key it suggests the most similar one. `shown` is how errors
        write an option of `flags`, `hint` what they add.
        """
        given = {**(defaults or {}), **(_read_file(file, kinds) if file else {}), **flags}
        names = [name for name, _ in fields(kinds)]
        problems = [
            f"There is no option {shortened(repr(key))}.{_similar(str(key), names)}"
            for key in flags
            if key not in names
        ]
        # A settings file may have them: YAML reads 1e-4 as a string.
        mistyped = {key: wanted for key, field in fields(kinds) if (wanted := _mistyped(field, flags.get(key)))}
        problems += [
            f"{shown(key)}: must be {wanted}, not {shortened(repr(flags[key]))}." for key, wanted in mistyped.items()
        ]
        sections = {}
        for kind in kinds:
            values = {key: given[key] for key in kind.model_fields if key in given and key not in mistyped}
            try:
                sections[kind] = kind.model_validate(values)
            except ValidationError as error:
                errors = error.errors()[:MAX_PROBLEMS]
                problems += [
                    _problem(entry["loc"][0], entry["msg"], entry["input"], flags=flags, shown=shown)
                    for entry in errors
                ]
        if problems:
            raise UsageError("\n".join(problems), hint=hint)
        return cls(sections)

    def to_yaml(self) -> str:
        """All values, section by section, as a YAML file for `--config`."""
        blocks = []
        for section in self._sections.values():
            title = f"# {(type(section).__doc__ or '').strip()}"
            values = section.model_dump(mode="json")
            text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
            # PyYAML writes rare Unicode line separators unescaped, but reads them as spaces.
            if not text.isascii() and yaml.safe_load(text) != values:
                text = yaml.safe_dump(values, sort_keys=False)
            blocks.append(f"{title}\n{text}")
        return "\n".join(blocks)

    def replace(self, **values: Any) -> Config:
        """A copy with some values changed and validated."""
        dumps = [section.model_dump(exclude_unset=True) for section in self._sections.values()]
        flags = {key: value for dump in dumps for key, value in dump.items()}
        return Config.read(self.kinds, {**flags, **values})


def _read_file(path: Path, kinds: tuple[type[Section], ...]) -> dict[str, Any]:
    content = read_settings(path)
    names = [name for name, _ in fields(kinds)]
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = get_close_matches(name, names, n=1)
            raise UsageError(
                f"{path}: this command has no option {shortened(repr(key))}.",
                hint=f"Did you mean {near[0]!r}?" if near else f"The options are: {', '.join(names)}.",
            )
        values[name] = value
    return values


def _similar(name: str, names: list[str]) -> str:
    near = get_close_matches(name, names, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _mistyped(field: FieldInfo, value: object) -> str:
    """What a string should be that pydantic would convert to the type of the field; "" for other values."""
    kinds = {field.annotation, *get_args(field.annotation)}
    if not isinstance(value, str) or not kinds & {int, float, bool}:
        return ""
    return "True or False" if bool in kinds else "a number"


def _problem(key: object, message: str, value: object, *, flags: Mapping[str, Any], shown: Callable[[str], str]) -> str:
    """The error of an option, which is named as the user wrote it: `--seq-len`, or `seq_len` in a file."""
    message = message.removeprefix("Value error, ").replace("Input should be", "must be")
    hint = ""
    if key not in flags and any(kind in message for kind in ("string", "list", "path")):
        if isinstance(value, bool):
            hint = f" (YAML reads an unquoted word like yes, no, on or off as {value}: put it in quotes)"
        elif isinstance(value, int | float):
            hint = f" (YAML reads it as the number {value}: put it in quotes)"
        elif isinstance(value, date):
            hint = f" (YAML reads it as the date {value}: put it in quotes)"
    name = shown(str(key)) if key in flags else key
    return f"{name}: {message[0].lower()}{message[1:]}, not {shortened(repr(value))}{hint}."
