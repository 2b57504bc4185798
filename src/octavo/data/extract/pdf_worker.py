"""Reads PDF files in a process of its own: PDFium parses untrusted bytes in C++.

A file on which that process crashes, hangs or needs too much memory is a DataError, and the next file is read by a new
process. Requests and replies are lines of JSON: what a damaged process sends cannot execute code here, as pickles can.
The process is started with `-c` and not by multiprocessing, which would import the user's script again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, BinaryIO

from octavo.data.extract.pdf import extract
from octavo.data.files import MAX_DOCUMENT_BYTES, name_of
from octavo.data.raw_records import RawRecord
from octavo.errors import DataError, OctavoError, UsageError

START_SECONDS = 300.0  # for Python to start and to import the readers, also on a busy machine
# A page takes some 10 ms, and 1 MiB has 20 pages or so: 0.2 s. The limits are for files that never end.
BASE_SECONDS, SECONDS_PER_MIB = 120.0, 20.0
# PDFium needs some 10 times the size of a file of drawings.
BASE_MEMORY_BYTES, MEMORY_PER_BYTE = 4 * 2**30, 16
MAX_REPLY_BYTES = 2 * MAX_DOCUMENT_BYTES

CODE = "import sys; sys.path[:] = sys.argv[1:]; from octavo.data.extract.pdf_worker import serve; serve()"
_SKIP = "Take it out of the data, or skip such files with --skip-bad."


def read_pdf(path: Path, split_on: str | None) -> Iterator[RawRecord]:
    """The text of a PDF as one record, read in a process that ends with it. Errors are those of `PdfWorker.read`."""
    with PdfWorker() as worker:
        yield worker.read(path)


def seconds_for(n_bytes: int) -> float:
    """The longest time that a file may take."""
    return BASE_SECONDS + SECONDS_PER_MIB * n_bytes / 2**20


class PdfWorker:
    """A context with a process that reads PDF files, which the first file starts."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._replies: SimpleQueue[bytes] = SimpleQueue()
        self._thread: Thread | None = None

    def __enter__(self) -> PdfWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def read(self, path: Path) -> RawRecord:
        """The text of a PDF as one record: see `extract`, whose errors arrive as they are.

        DataError too for a file on which the process ends, takes longer than `seconds_for` its size, or needs more
        memory than BASE_MEMORY_BYTES and MEMORY_PER_BYTE allow, where the operating system has such a limit.
        """
        source = name_of(path)
        try:
            n_bytes = path.stat().st_size
        except OSError:  # `extract` reports it
            n_bytes = 0
        seconds = seconds_for(n_bytes)
        memory = BASE_MEMORY_BYTES + MEMORY_PER_BYTE * n_bytes
        request = {"folder": _folder(), "path": str(path), "seconds": seconds, "memory": memory}
        process = self._started()
        assert process.stdin is not None
        with suppress(OSError):  # it has ended: there is no reply
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        try:
            line = self._replies.get(timeout=seconds)
        except Empty:
            self._end()
            message = f"cannot be read: it takes more than {seconds:,.0f} s."
            raise DataError(message, source=source, hint=_SKIP) from None
        reply = _parsed(line)
        if reply is None:
            how = self._end()
            raise DataError(f"cannot be read: PDFium crashed on it ({how}).", source=source, hint=_SKIP)
        return _result(reply, source)

    def _started(self) -> subprocess.Popen[bytes]:
        """The process, started if there is none that runs."""
        if self._process is None or self._process.poll() is not None:
            self._end()
            command = [sys.executable, "-c", CODE, *filter(None, map(str, sys.path))]
            pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing)
            self._replies = SimpleQueue()
            # A thread, as a pipe has no timeout on every operating system.
            self._thread = Thread(target=_receive, args=(self._process.stdout, self._replies), daemon=True)
            self._thread.start()
            try:
                ready = self._replies.get(timeout=START_SECONDS)
            except Empty:
                ready = b""
            if not ready:
                how = self._end()
                hint = "Run it again; if it stays, reinstall octavo and pypdfium2."
                raise OctavoError(f"The process that reads PDF files did not start ({how}).", hint=hint)
        return self._process

    def _end(self) -> str:
        """Ends the process; returns how it ended: "signal 9", "exit code 1"."""
        process, self._process = self._process, None
        if process is None:
            return ""
        assert process.stdin is not None
        with suppress(OSError):  # of a request that was not read
            process.stdin.close()
        # A pipe that is closed means that the process is ending, on its own and with a code that says how.
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.kill()
        code = process.wait()
        if self._thread is not None:  # it closes its pipe
            self._thread.join()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _receive(stream: BinaryIO, replies: SimpleQueue[bytes]) -> None:
    """Puts each line of `stream` into `replies`, and b"" at its end."""
    with stream, suppress(OSError, ValueError):
        while (line := stream.readline(MAX_REPLY_BYTES)).endswith(b"\n"):
            replies.put(line)
    replies.put(b"")


def _parsed(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        reply = json.loads(line)
        return reply if isinstance(reply, dict) else None
    return None


def _result(reply: dict[str, Any], source: str) -> RawRecord:
    """The record of a reply, or the error that it tells."""
    try:
        if "record" in reply:
            record = reply["record"]
            positions = tuple((int(at), str(name)) for at, name in record["positions"])
            return RawRecord(
                int(record["line"]), str(record["value"]), int(record["n_bytes"]), positions,
                *({str(kind): int(count) for kind, count in record[key].items()} for key in ("removed", "unread")),
            )  # fmt: skip
        kind, message, hint, line = reply["kind"], str(reply["message"]), str(reply["hint"]), int(reply["line"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError("cannot be read: the reply about it is damaged.", source=source, hint=_SKIP) from error
    if kind == "usage":
        raise UsageError(message, hint=hint)
    raise DataError(message, source=source, line=line, hint=hint)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def serve() -> None:
    """What the process runs: replies to requests on stdin until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent ends this process
    # Whatever a library prints goes to stderr, and not between the replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    replies.write(b"ready\n")
    replies.flush()
    for line in sys.stdin.buffer:
        reply = _reply(json.loads(line))
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _reply(request: dict[str, Any]) -> dict[str, Any]:
    path, error = Path(request["path"]), None
    try:
        if request["folder"] is not None:
            os.chdir(request["folder"])
        _limit(request["seconds"], request["memory"])
        return {"record": asdict(extract(path))}
    except UsageError as caught:
        return {"kind": "usage", "message": caught.message, "hint": caught.hint, "line": 0}
    except DataError as caught:
        error = caught
    except MemoryError:
        error = DataError(f"cannot be read: it needs more than {request['memory'] / 2**30:.0f} GiB.", hint=_SKIP)
    except Exception as caught:  # of a library, on a file that is no valid PDF
        error = DataError(f"cannot be read: {type(caught).__name__}: {str(caught)[:200]}", hint=_SKIP)
    where = f"{error.source}:{error.line}: " if error.line else f"{error.source}: "
    message = error.message.removeprefix(where) if error.source else error.message
    return {"kind": "data", "message": message, "hint": error.hint, "line": error.line}


def _limit(seconds: float, memory: int) -> None:
    """Limits the address space, and the processor time from now on, where the operating system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    # The parent ends this process by the clock. This limit is for a parent that was killed.
    until = int(used.ru_utime + used.ru_stime + seconds) + 60
    for kind, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, until)):
        with suppress(OSError, ValueError):  # macOS refuses some
            _, most = resource.getrlimit(kind)
            resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))
