"""How a command ends: a message for people on stderr, with --json a document on stdout, and the exit code.

0    done
1    failed: a model, an adapter, data, a disk, memory, or a fault of octavo's own
2    the request itself was wrong, and nothing was started
130  Ctrl-C (128 + the number of the signal: 143 SIGTERM, 129 SIGHUP)
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
    "Exit codes: 0 done, 1 failed, 2 wrong request, 130 Ctrl-C (128 + the signal). "
    "With --json an error is a document too: {'error': {'type', 'message', 'hint', 'exit_code'}}."
)
_OWN_FAULT = "This is a fault of octavo's own. Please report it with the lines above."


def exit_with(error: BaseException | None, *, as_json: bool) -> NoReturn:
    """Ends the process with the message and the exit code of what ended a command; None: it is done."""
    if error is None:
        sys.exit(0)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        number = error.number if isinstance(error, StopRequest) else signal.SIGINT
        _fail("Interrupted", str(error) or "Stopped.", "", 128 + number, as_json=as_json)
    if isinstance(error, BrokenPipeError):  # whoever read the results has left, as `head` does
        sys.exit(1)
    if isinstance(error, SystemExit):
        sys.exit(error.code)
    if hasattr(error, "show") and hasattr(error, "format_message"):  # the command line's own, about flags
        shown: Any = error
        if not (message := shown.format_message()):  # of a bare `octavo`, whose help is printed
            sys.exit(shown.exit_code)
        usage, hint = _usage(shown)
        _fail("UsageError", message, hint, shown.exit_code, as_json=as_json, before=usage)
    if (known := explained(error)) is not None:
        _fail(type(known).__name__, known.message, known.hint, known.exit_code, as_json=as_json)
    if (code := getattr(error, "exit_code", None)) is not None:
        sys.exit(code)
    trace = "".join(traceback.format_exception(error))
    _fail(type(error).__name__, cut(error), _OWN_FAULT, 1, as_json=as_json, before=trace)


def _usage(error: Any) -> tuple[str, str]:
    """(the usage line, where to look) of an error about flags."""
    context = getattr(error, "ctx", None)
    if context is None:
        return "", ""
    return f"{context.get_usage()}\n", f"`{context.command_path} --help` lists the options."


def _fail(kind: str, message: str, hint: str, code: int, *, as_json: bool, before: str = "") -> NoReturn:
    """Writes what went wrong and ends the process. `before` goes to stderr only.

    File names, keys and arguments of strangers are in messages: nothing of them may steer the terminal.
    """
    from octavo.reporting import printable

    sys.stderr.write(printable(f"{before}octavo: {message}\n" + (f"{hint}\n" if hint else "")))
    sys.stderr.flush()
    if as_json:
        document = {"error": {"type": kind, "message": message, "hint": hint, "exit_code": code}}
        with suppress(OSError), output():
            sys.stdout.write(json.dumps(document) + "\n")
    sys.exit(code)
