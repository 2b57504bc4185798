"""Derives the options of a command from the sections of its configuration, so that each option is defined once."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from octavo.config import Section, fields
from octavo.config.commands import configure
from octavo.config.section import flag_of
from octavo.exits import EXIT_CODES
from octavo.streams import output

Command = Callable[..., None]  # of the Config, whether --json was passed, and the switches by name

POSITIONAL = "positional"  # the beginning of the Python parameters of positional arguments


def command(
    app: typer.Typer,
    sections: tuple[type[Section], ...],
    *,
    usual: tuple[str, ...],
    positional: str | tuple[str, ...] = (),
    defaults: Mapping[str, Any] | None = None,
    switches: Mapping[str, str] | None = None,
) -> Callable[[Command], Command]:
    """Registers a command on `app` whose options are the fields of `sections`.

    `usual` are the fields that --help shows first; the others are in one panel for each section. `positional` names the
    fields that can also be positional arguments. `defaults` override those of the sections. `switches` (name: help) are
    flags of one call, which no settings file has. The function gets the validated Config, whether `--json` was passed,
    and the switches as keywords.
    """
    command_defaults, command_switches = dict(defaults or {}), dict(switches or {})
    names = (positional,) if isinstance(positional, str) else positional

    def register(function: Command) -> Command:
        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            file, print_config = arguments.pop("config"), arguments.pop("print_config")
            as_json = arguments.pop("as_json")
            passed = {name: arguments.pop(name) for name in command_switches}
            given = {name: arguments.pop(f"{POSITIONAL}_{name}", None) for name in names}
            flags = {name: value for name, value in arguments.items() if value not in (None, [])}
            for name, argument in given.items():
                if argument:
                    flags[name] = [*argument, *flags.get(name, [])] if isinstance(argument, list) else argument
            config = configure(sections, flags, file, defaults=command_defaults)
            if print_config:
                with output():
                    typer.echo(config.to_yaml(), nl=False)
                return
            function(config, as_json, **passed)

        run.__signature__ = _signature(sections, usual, names, command_defaults, command_switches)  # type: ignore[attr-defined]
        run.__annotations__ = {name: p.annotation for name, p in run.__signature__.parameters.items()}  # type: ignore[attr-defined]
        app.command(name=function.__name__, help=function.__doc__, epilog=EXIT_CODES)(run)
        return function

    return register


def _signature(
    sections: tuple[type[Section], ...],
    usual: tuple[str, ...],
    positional: tuple[str, ...],
    defaults: Mapping[str, Any],
    switches: Mapping[str, str],
) -> inspect.Signature:
    """The parameters for typer: one option for each field, None unless passed, then --config and others."""
    parameters = []
    for name in positional:
        field = dict(fields(sections))[name]
        argument_type = str if field.annotation == (str | None) else list[str]
        argument = typer.Argument(help=_escaped(str(field.description)), show_default=False, metavar=name.upper())
        parameters.append(_parameter(f"{POSITIONAL}_{name}", Annotated[argument_type | None, argument]))
    panels = {name: section.panel for section in sections for name in section.model_fields}
    assert set(usual) <= panels.keys(), usual
    all_fields = dict(fields(sections))
    for name in [*usual, *(name for name in all_fields if name not in usual)]:
        field = all_fields[name]
        option = typer.Option(
            flag_of(name) + (f"/{flag_of(f'no_{name}')}" if field.annotation is bool else ""),
            help=_help(field, defaults.get(name, field.default)),
            show_default=False,
            rich_help_panel=None if name in usual else panels[name],
        )
        parameters.append(_parameter(name, Annotated[_flag_type(field) | None, option]))
    panel = "Settings and output"
    for name, text in switches.items():
        switch = typer.Option(flag_of(name), help=text, rich_help_panel=panel)
        parameters.append(_parameter(name, Annotated[bool, switch], default=False))
    config = typer.Option("--config", help="A YAML file with these options.", show_default=False, rich_help_panel=panel)
    show = typer.Option("--print-config", help="Print all values as YAML and exit.", rich_help_panel=panel)
    as_json = typer.Option(
        "--json",
        help="Print one JSON document on stdout and nothing else; errors are JSON too.",
        rich_help_panel=panel,
    )
    parameters += [
        _parameter("config", Annotated[Path | None, config]),
        _parameter("print_config", Annotated[bool, show], default=False),
        _parameter("as_json", Annotated[bool, as_json], default=False),
    ]
    return inspect.Signature(parameters)


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flag_type(field: FieldInfo) -> Any:
    """The type that typer parses; Config checks choices and bounds."""
    annotation: Any = field.annotation
    basic_types = (bool, int, float, str, Path)
    if get_origin(annotation) is list:
        return list[str]
    if annotation in basic_types:
        return annotation
    return next((member for member in get_args(annotation) if member in basic_types), str)


def _help(field: FieldInfo, default: Any) -> str:
    """The help text: description, choices and default; a bool default is shown as on or off."""
    if isinstance(default, bool):
        default_text: object = "on" if default else "off"
    else:
        default_text = ", ".join(map(_item, default)) if isinstance(default, list) else default
    choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
    notes = [f"[{'|'.join(choices)}]"] if choices else []
    if default_text not in (None, "", PydanticUndefined):
        notes.append(f"[default: {default_text}]")
    return _escaped(" ".join([str(field.description), *notes]))


def _item(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    """`text` with escaped brackets: rich would parse "[serve]" as a style."""
    return re.sub(r"\[(?=[a-zA-Z#/@])", r"\\[", text)
