"""Makes a command's flags from the sections of its configuration, so that each option is written down once."""

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

from octavo.config import Config, RunOptions, Section, fields
from octavo.config.section import flag_of
from octavo.config.settings import read_settings
from octavo.errors import UsageError
from octavo.exits import EXIT_CODES
from octavo.streams import output

Command = Callable[[Config, bool], None]


def command(
    app: typer.Typer,
    kinds: tuple[type[Section], ...],
    *,
    usual: tuple[str, ...],
    positional: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[Command], Command]:
    """Registers a command on `app` whose flags are the fields of `kinds`; `positional` names the one that stands bare.

    `usual` are the fields that most people need: --help shows them first, the others in a panel for each section.
    `defaults` are the command's own where they differ from the sections'. The function gets the checked Config and
    whether `--json` was given.
    """
    own = dict(defaults or {})

    def register(function: Command) -> Command:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            file, print_config, as_json = given.pop("config"), given.pop("print_config"), given.pop("as_json")
            bare = given.pop("bare", None)
            flags = {name: value for name, value in given.items() if value not in (None, [])}
            if bare and positional:
                flags[positional] = [*bare, *flags.get(positional, [])] if isinstance(bare, list) else bare
            saved = None if file else _saved_config(kinds, {**own, **flags})
            config = Config.read(kinds, flags, file or saved, defaults=own)
            if print_config:
                with output():
                    typer.echo(config.to_yaml(), nl=False)
                return
            function(config, as_json)

        run.__signature__ = _signature(kinds, usual, positional, own)  # type: ignore[attr-defined]
        run.__annotations__ = {name: p.annotation for name, p in run.__signature__.parameters.items()}  # type: ignore[attr-defined]
        app.command(name=function.__name__, help=function.__doc__, epilog=EXIT_CODES)(run)
        return function

    return register


def _signature(
    kinds: tuple[type[Section], ...], usual: tuple[str, ...], positional: str | None, defaults: Mapping[str, Any]
) -> inspect.Signature:
    """The parameters that typer reads: one flag a field, unset unless given, then the common ones."""
    parameters = []
    if positional is not None:
        field = dict(fields(kinds))[positional]
        kind = str if field.annotation == (str | None) else list[str]
        argument = typer.Argument(help=_literal(str(field.description)), show_default=False, metavar=positional.upper())
        parameters.append(_parameter("bare", Annotated[kind | None, argument]))
    panels = {name: kind.panel for kind in kinds for name in kind.model_fields}
    assert set(usual) <= panels.keys(), usual
    known = dict(fields(kinds))
    for name in [*usual, *(name for name in known if name not in usual)]:
        field = known[name]
        option = typer.Option(
            flag_of(name) + (f"/{flag_of(f'no_{name}')}" if field.annotation is bool else ""),
            help=_help(field, defaults.get(name, field.default)),
            show_default=False,
            rich_help_panel=None if name in usual else panels[name],
        )
        parameters.append(_parameter(name, Annotated[_flag_type(field) | None, option]))
    panel = "Settings and output"
    config = typer.Option("--config", help="A YAML file with these options.", show_default=False, rich_help_panel=panel)
    show = typer.Option("--print-config", help="Print all values as a YAML file and stop.", rich_help_panel=panel)
    as_json = typer.Option(
        "--json",
        help="Print one JSON document on stdout, an error too, and nothing else there.",
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
    """The type that the command line reads; choices and bounds are checked with the rest, by the Config."""
    annotation: Any = field.annotation
    plain = (bool, int, float, str, Path)
    if get_origin(annotation) is list:
        return list[str]
    if annotation in plain:
        return annotation
    return next((kind for kind in get_args(annotation) if kind in plain), str)


def _help(field: FieldInfo, default: Any) -> str:
    """The description, the choices, and the default; bool defaults as on and off."""
    if isinstance(default, bool):
        shown: object = "on" if default else "off"
    else:
        shown = ", ".join(default) if isinstance(default, list) else default
    choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
    notes = [f"[{'|'.join(choices)}]"] if choices else []
    if shown not in (None, "", PydanticUndefined):
        notes.append(f"[default: {shown}]")
    return _literal(" ".join([str(field.description), *notes]))


def _literal(text: str) -> str:
    """`text` with its brackets kept: rich takes "[serve]" for a style."""
    return re.sub(r"\[(?=[a-zA-Z#/@])", r"\\[", text)


def _saved_config(kinds: tuple[type[Section], ...], flags: Mapping[str, Any]) -> Path | None:
    """A resumed run goes on with its own settings unless a file is named."""
    if RunOptions in kinds and flags.get("resume"):
        saved = Path(flags.get("out", RunOptions.model_fields["out"].default)) / "config.yaml"
        if not saved.is_file():
            return None
        last = list(kinds[-1].model_fields)[-1]
        if last not in read_settings(saved):
            hint = "Give the run's settings with --config FILE, or as flags once you have deleted it."
            raise UsageError(f"{saved} is cut short: it lacks `{last}`, which ends it.", hint=hint)
        return saved
    return None
