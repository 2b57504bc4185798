"""The file metrics.jsonl: whole lines that reach the system at once, and survive kills and the file's deletion."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from octavo.atomic import atomic_write, named
from octavo.errors import UsageError
from octavo.failures import explained


class MetricsFile:
    """Lines at the end of a file, begun anew unless `append`. UsageError if it cannot be written."""

    def __init__(self, path: Path, *, append: bool) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open(truncate=not append)
        except OSError as error:
            known = explained(error)
            raise UsageError(
                f"cannot write {path}: {error.strerror}",
                hint=(known and known.hint) or "choose a folder you may write to with --out",
            ) from error

    def write(self, line: bytes) -> None:
        """Hand a line to the system. OSError names the file; a part of a line is cut off when it is opened again."""
        left = memoryview(line)
        with named(self.path):
            while left:
                left = left[self._file.write(left) or 0 :]

    def replace(self, lines: Sequence[bytes]) -> None:
        """Replace the content by other lines: a crash leaves either the old or the new."""
        self._file.close()  # Windows replaces no file that is open
        try:
            atomic_write(self.path, b"".join(lines))
        finally:
            self._open(truncate=False)

    def restore(self) -> bool:
        """Write the file anew, from what this process still holds, if another one deleted it. Whether it was."""
        try:
            if os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                return False
        except FileNotFoundError:
            pass
        with named(self.path):
            self._file.seek(0)
            content = self._file.readall()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.replace([content])
        return True

    def close(self) -> None:
        """Close the file; nothing is written any more."""
        self._file.close()

    def _open(self, *, truncate: bool) -> None:
        # Without a buffer: what did not fit on a full disk must not be written once more on closing.
        self._file = self.path.open("a+b", buffering=0)
        self._file.truncate(0) if truncate else self._repair_last_line()

    def _repair_last_line(self) -> None:
        """Cuts off a torn last line; gives a whole one the line end that it lacks."""
        self._file.seek(0)
        whole, newline, last = self._file.readall().rpartition(b"\n")
        if not last:
            return
        try:
            torn = not isinstance(json.loads(last), dict)
        except (ValueError, RecursionError):
            torn = True
        if torn:
            self._file.truncate(len(whole) + len(newline))
        else:
            self.write(b"\n")
