"""Ctrl-C ends every command with "Stopped." and exit code 130, wherever it comes and whatever swallows it."""

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
    ("place", "arguments"),
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
        ("octavo.cli._answer", ["convert", "m", "--out", "q"]),  # at the very end of the work
    ],
)
def test_every_command_says_that_it_was_stopped(
    place: str, arguments: list[str], octavo: Octavo, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("octavo.commands.convert.convert", lambda *_: {})
    monkeypatch.setattr(place, interrupt)
    done = octavo(*arguments)
    assert (done.code, done.out) == (130, "")
    assert done.err == "octavo: Stopped.\n"
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("then", [None, ImportError("half imported"), SystemError("no reason was given")])
def test_a_library_that_swallows_it_changes_nothing(
    then: Exception | None, octavo: Octavo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallow(*_: object) -> dict[str, Any]:
        try:
            interrupt()
        except BaseException:
            if then:
                raise then from None
        return {}

    monkeypatch.setattr("octavo.commands.convert.convert", swallow)
    done = octavo("convert", "m", "--out", "q", "--json")
    assert (done.code, done.err) == (130, "octavo: Stopped.\n")


def test_one_more_while_the_first_is_reported(octavo: Octavo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.commands.convert.convert", interrupt)
    monkeypatch.setattr("octavo.cli.exit_with", interrupt)
    assert octavo("convert", "m", "--out", "q").code == 130


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """So a shell starts jobs in the background; nohup does it with SIGHUP."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts() as received:
            interrupt()
        assert received == []
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_are_put_back_and_errors_pass() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), handled(lambda *_: None, (signal.SIGINT, signal.SIGTERM)):
        raise KeyError
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("moment", ["import", "exit"])
def test_the_process_says_so_before_and_after_the_command_too(moment: str, tmp_path: Path) -> None:
    """A module that the command line imports interrupts its process, and a function that Python calls at its end."""
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
