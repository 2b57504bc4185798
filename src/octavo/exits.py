"""How a command ends: a message on stderr, with --json also a JSON document on stdout, and the exit code.

0    success
1    failure: model, adapter, data, disk, memory, or a bug in octavo
2    invalid usage; nothing was started
3    the time of `octavo tune` is too short for any result; what was done is saved
130  Ctrl-C (128 + signal number: 143 SIGTERM, 129 SIGHUP)
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from contextlib import suppress
from typing import Any, NoReturn

import typer

from octavo.failures import cut, explained
from octavo.stopping import StopRequest
from octavo.streams import output

EXIT_CODES = (
    "Exit codes: 0 success, 1 failure, 2 invalid usage, 3 too little time (tune), 130 Ctrl-C (128 + signal). "
    "With --json errors are JSON too: {'error': {'type', 'message', 'hint', 'exit_code'}}."
)
_BUG_HINT = "This is a bug in octavo. Please report it with the lines above."


def exit_with(error: BaseException | None, *, as_json: bool) -> NoReturn:
    """Ends the process with the message and exit code of `error`, the exception that ended a command, or None."""
    if error is None:
        sys.exit(0)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        signal_number = error.number if isinstance(error, StopRequest) else signal.SIGINT
        _fail("Interrupted", str(error) or "Stopped.", "", 128 + signal_number, as_json=as_json)
    if isinstance(error, BrokenPipeError):  # the reader of stdout has closed the pipe, as `head` does
        sys.exit(1)
    if isinstance(error, SystemExit):
        sys.exit(error.code)
    if hasattr(error, "show") and hasattr(error, "format_message"):  # an error of click about options
        usage_error: Any = error
        if not (message := usage_error.format_message()):  # `octavo` without a command: the help was printed
            sys.exit(usage_error.exit_code)
        usage, hint = _usage(usage_error)
        _fail("UsageError", message, hint, usage_error.exit_code, as_json=as_json, prefix=usage)
    if (explanation := explained(error)) is not None:
        _fail(type(explanation).__name__, explanation.message, explanation.hint, explanation.exit_code, as_json=as_json)
    if (code := getattr(error, "exit_code", None)) is not None:
        sys.exit(code)
    trace = "".join(traceback.format_exception(error))
    _fail(type(error).__name__, cut(error), _BUG_HINT, 1, as_json=as_json, prefix=trace)


def _usage(error: Any) -> tuple[str, str]:
    """(usage line, hint) of a click error."""
    context = getattr(error, "ctx", None)
    if context is None:
        return "", ""
    return f"{context.get_usage()}\n", f"`{context.command_path} --help` lists the options."


def _fail(error_type: str, message: str, hint: str, code: int, *, as_json: bool, prefix: str = "") -> NoReturn:
    """Writes the error and ends the process. `prefix` goes to stderr only.

    Messages contain untrusted file names, keys and arguments, so control characters are replaced.
    """
    from octavo.reporting import printable

    sys.stderr.write(printable(f"{prefix}octavo: {message}\n" + (f"{hint}\n" if hint else "")))
    sys.stderr.flush()
    if as_json:
        document = {"error": {"type": error_type, "message": message, "hint": hint, "exit_code": code}}
        with suppress(OSError), output():
            sys.stdout.write(json.dumps(document) + "\n")
    sys.exit(code)
