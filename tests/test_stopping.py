"""Ctrl-C ends every command with "Stopped." and exit code 130, even if a library swallows the exception."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.stopping import handled, interrupts

Octavo = Callable[..., Any]


def interrupt(*_: object, **__: object) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("octavo.commands.evaluate.evaluate", ["evaluate", "x.txt"]),
        ("octavo.commands.generate.generate_text", ["generate", "--prompt", "a"]),
        ("octavo.commands.quantize.quantize", ["quantize", "--out", "q"]),
        ("octavo.commands.convert.convert", ["convert", "m", "--out", "q"]),
        ("octavo.commands.plan.plan", ["plan"]),
        ("octavo.commands.loading.open_model", ["data", "x.txt"]),
        ("octavo.commands.chat.talk", ["chat"]),
        ("octavo.commands.finetune.finetune", ["finetune", "--data", "x.txt"]),
        ("octavo.commands.finetune.demo.demo", ["demo"]),
        ("octavo.cli._print_json", ["convert", "m", "--out", "q"]),  # at the end of the command
    ],
)
def test_every_command_reports_ctrl_c(
    function: str, arguments: list[str], octavo: Octavo, monkeypatch: pytest.MonkeyPatch
) -> None:
    previous_handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("octavo.commands.convert.convert", lambda *_: {})
    monkeypatch.setattr(function, interrupt)
    done = octavo(*arguments)
    assert (done.code, done.out) == (130, "")
    assert done.err == "octavo: Stopped.\n"
    assert signal.getsignal(signal.SIGINT) == previous_handler


@pytest.mark.parametrize("next_error", [None, ImportError("half imported"), SystemError("no reason was given")])
def test_ctrl_c_swallowed_by_a_library_still_stops(
    next_error: Exception | None, octavo: Octavo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallow(*_: object) -> dict[str, Any]:
        try:
            interrupt()
        except BaseException:
            if next_error:
                raise next_error from None
        return {}

    monkeypatch.setattr("octavo.commands.convert.convert", swallow)
    done = octavo("convert", "m", "--out", "q", "--json")
    assert (done.code, done.err) == (130, "octavo: Stopped.\n")


def test_a_second_ctrl_c_during_the_report(octavo: Octavo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.commands.convert.convert", interrupt)
    monkeypatch.setattr("octavo.cli.exit_with", interrupt)
    assert octavo("convert", "m", "--out", "q").code == 130


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """A shell starts background jobs with SIGINT ignored, nohup with SIGHUP ignored."""
    previous_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts() as received:
            interrupt()
        assert received == []
    finally:
        signal.signal(signal.SIGINT, previous_handler)


def test_handlers_are_restored_and_errors_propagate() -> None:
    previous_handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), handled(lambda *_: None, (signal.SIGINT, signal.SIGTERM)):
        raise KeyError
    assert signal.getsignal(signal.SIGINT) == previous_handler


@pytest.mark.parametrize("moment", ["import", "exit"])
def test_ctrl_c_before_and_after_the_command(moment: str, tmp_path: Path) -> None:
    """The signal is sent while a module is imported, or by a function that Python calls at exit."""
    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    code = "import atexit, os, sys\n"
    if moment == "import":
        (tmp_path / "typer.py").write_text(kill)
        code += f"sys.path.insert(0, {str(tmp_path)!r})\n"
    else:
        code += "import octavo.cli\noctavo.cli.main = lambda: atexit.register(os.kill, os.getpid(), 2)\n"
    code += "sys.argv = ['octavo', '--version']\nfrom octavo.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 130
    assert done.stderr == "octavo: Stopped.\n"
