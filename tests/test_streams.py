"""Closed or full standard streams: a failed write of results is an error, of messages it is ignored."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.forks import OCTAVO, Forks

from octavo.reporting import Report
from octavo.streams import Forgiving

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")


class ClosedStream(io.StringIO):
    """A stream that fails like a closed terminal."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")

    def isatty(self) -> bool:
        raise ValueError("I/O operation on closed file")


def test_writing_to_a_closed_stream_does_not_raise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stream = Forgiving(lambda: ClosedStream())
    assert stream.write("lost") == 4
    stream.flush()
    assert not stream.isatty()
    monkeypatch.setattr(sys, "stderr", ClosedStream())
    with Report(metrics=tmp_path / "metrics.jsonl") as report:
        report.say("said")
        report.table("a table", ["x"], [[1]])
        with report.progress(2, "Working") as bar:
            bar.advance()
    assert b'"text": "said"' in (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(sys, "stderr", None)
    with Report() as report:
        report.say("to nobody")


def shell(line: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Runs the shell command `line`, in which "$@" is octavo with `arguments`."""
    command: Sequence[str] = ["sh", "-c", line, "sh", sys.executable, "-m", "octavo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, env=dict(os.environ))


@needs_full
@pytest.mark.parametrize("stream", ["> /dev/full", ">&-"])
def test_a_failed_write_of_results_is_an_error(stream: str) -> None:
    done = shell(f'"$@" {stream}', "finetune", "--print-config")
    assert done.returncode == 1
    assert b"cannot be read or written" in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


GENERATE = ("generate", "--prompt", "a", "--max-new-tokens", 2, "--model")


@needs_full
def test_a_failed_write_of_messages_does_not_end_the_command(tiny_llama: Path) -> None:
    done = shell('"$@" 0<&- 2>&-', *GENERATE, tiny_llama)
    assert done.returncode == 0
    assert done.stdout


@needs_full
@pytest.mark.parametrize(
    "streams",
    ["os.dup2(os.open('/dev/full', os.O_WRONLY), 2)", "os.close(2)", "os.close(2); sys.stderr = sys.__stderr__ = None"],
)
def test_a_closed_stderr_does_not_end_the_command(streams: str, tiny_llama: Path, forks: Forks) -> None:
    process = forks.run(f"import os, sys; {streams}; {OCTAVO}", *GENERATE, tiny_llama)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert out


@needs_full
def test_an_error_that_cannot_be_printed_keeps_its_exit_code() -> None:
    assert shell('"$@" 2> /dev/full', "generate", "--model", "nowhere/at-all/x", "--prompt", "a").returncode in (1, 2)
    assert shell('"$@" 2>&-', "finetune", "--no-such-flag").returncode == 2
