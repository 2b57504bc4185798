"""Keyword arguments from the sections of options, so that the Python API and the command line have one definition.

A function gets its signature (`inspect.signature`) and the list of options in its documentation (`help`) from the
sections. Calls check the names of the options and configure the command.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic.fields import FieldInfo

from octavo.bounded_json import shortened
from octavo.config import Section, fields
from octavo.config.commands import configure
from octavo.errors import OctavoError, UnknownOptionError, UsageError

_COMMAND = re.compile(r"(`[^`\n]*`|octavo [a-z]+ -[^\n]*)")
_FLAG = re.compile(r"--([a-z][a-z0-9-]*)")

Result = TypeVar("Result")

QUIET = "Print no progress and no messages on stderr."
CONFIG = "A YAML file with these options; keyword arguments have precedence."


def with_options(
    sections: tuple[type[Section], ...],
    *,
    positional: str = "",
    name: str = "",
    callbacks: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Makes a function of (configuration, quiet) one of the options of `sections` as keyword arguments.

    The option `positional` can be given without its name, `name` is that of the function if its own is another. Each
    function also takes `config` and `quiet`, and functions as the keywords `callbacks` (name: description), which are
    no options: they are passed on. Calls raise UnknownOptionError for an unknown option and UsageError for an invalid
    value.
    """
    callbacks = callbacks or {}

    def decorate(run: Callable[..., Result]) -> Callable[..., Result]:
        function = name or run.__name__
        names = [option for option, _ in fields(sections)]

        @functools.wraps(run)
        def call(*values: Any, config: str | Path | None = None, quiet: bool = False, **given: Any) -> Any:
            if not isinstance(quiet, bool):
                raise UsageError(f"quiet: must be True or False, not {shortened(repr(quiet))}.", hint=_hint(function))
            if len(values) > bool(positional) or (values and positional in given):
                accepted = f"only {positional} without its name" if positional else "options by their names only"
                raise TypeError(f"octavo.{function} takes {accepted}, once.")
            called = {each: given.pop(each) for each in callbacks if each in given}
            for each, value in called.items():
                if value is not None and not callable(value):
                    raise UsageError(f"{each}: must be a function, not {shortened(repr(value))}.", hint=_hint(function))
            options = options_of(
                {**given, **dict(zip([positional], values, strict=False))}, [*names, *callbacks], function=function
            )
            if not isinstance(config, str | Path | None):
                raise UsageError(
                    f"config: must be a path, not {shortened(repr(config))}.",
                    hint="Give the path of a YAML file, and options as keyword arguments.",
                )
            file = None if config is None else Path(config)
            try:
                return run(configure(sections, options, file, shown=str, hint=_hint(function)), quiet, **called)
            except OctavoError as error:
                name_keywords_(error)
                raise

        call.__name__ = call.__qualname__ = function
        keyword = inspect.Parameter.KEYWORD_ONLY
        extra = [
            *(
                inspect.Parameter(each, keyword, default=None, annotation="Callable[[Any], object] | None")
                for each in callbacks
            ),
            inspect.Parameter("config", keyword, default=None, annotation="str | Path | None"),
            inspect.Parameter("quiet", keyword, default=False, annotation=bool),
        ]
        returns = inspect.signature(run).return_annotation
        signature = signature_of(fields(sections), first=positional, extra=extra, returns=returns)
        described = [*described_options(fields(sections)), *callbacks.items(), ("config", CONFIG), ("quiet", QUIET)]
        document(call, signature, described)
        return call

    return decorate


def signature_of(
    options: Iterable[tuple[str, FieldInfo]],
    *,
    first: str = "",
    before: Iterable[inspect.Parameter] = (),
    extra: Iterable[inspect.Parameter] = (),
    returns: Any,
) -> inspect.Signature:
    """The signature with the options as keywords; `first` may be positional, `before` and `extra` are other ones."""
    parameters = {
        name: inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD if name == first else inspect.Parameter.KEYWORD_ONLY,
            default=_plain(field.get_default(call_default_factory=True)),
            annotation=field.annotation,
        )
        for name, field in options
    }
    head = [parameters.pop(first)] if first else []
    return inspect.Signature([*before, *head, *parameters.values(), *extra], return_annotation=returns)


def described_options(options: Iterable[tuple[str, FieldInfo]]) -> list[tuple[str, str]]:
    """(name, help text) of each option. In the text the flag --seq-len is the keyword seq_len."""
    return [(name, _FLAG.sub(_keyword, str(field.description))) for name, field in options]


def _keyword(flag: re.Match[str]) -> str:
    name = flag[1].replace("-", "_")
    return f"{name.removeprefix('no_')}=False" if name.startswith("no_") else name


def name_keywords_(error: OctavoError) -> None:
    """Writes the flags in an error as keywords. Commands to call in a shell keep theirs."""
    error.message, error.hint = _with_keywords(error.message), _with_keywords(error.hint)
    error.args = (error.message, *error.args[1:])


def _with_keywords(text: str) -> str:
    parts = _COMMAND.split(text)  # every second one is a command
    return "".join(part if number % 2 else _FLAG.sub(_keyword, part) for number, part in enumerate(parts))


def document(function: Any, signature: inspect.Signature, described: Iterable[tuple[str, str]]) -> None:
    """Gives a function its signature, and a docstring that ends with its options and their defaults."""
    function.__signature__ = signature
    function.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
    function.__annotations__["return"] = signature.return_annotation
    lines = [f"    {name}: {text} [{signature.parameters[name].default!r}]" for name, text in described]
    function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options [and defaults]:", *lines])


def options_of(given: Mapping[str, Any], names: Collection[str], *, function: str) -> dict[str, Any]:
    """The options of a call as plain values: paths as strings, tuples as lists.

    UnknownOptionError names the most similar ones of `names` for an unknown option.
    """
    for name in given:
        if name not in names:
            near = get_close_matches(name, names, n=3, cutoff=0.7)
            hint = f"Did you mean {' or '.join(near)}?" if near else _hint(function)
            raise UnknownOptionError(f"octavo.{function} has no option {name!r}.", hint=hint)
    return {name: _plain(value) for name, value in given.items()}


def _hint(function: str) -> str:
    return f"help(octavo.{function}) lists the options."


def _plain(value: Any) -> Any:
    """A value as the sections take it: paths as strings, tuples as lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
