"""The file metrics.jsonl: unbuffered whole lines, which survive a killed process and a deleted file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from octavo.atomic import atomic_write, named
from octavo.errors import UsageError
from octavo.failures import explained


class MetricsFile:
    """Appends lines to a file, which is truncated first unless `append`. UsageError if it cannot be written."""

    def __init__(self, path: Path, *, append: bool) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open(truncate=not append)
        except OSError as error:
            explanation = explained(error)
            raise UsageError(
                f"cannot write {path}: {error.strerror}",
                hint=(explanation and explanation.hint) or "Choose a writable folder with --out.",
            ) from error

    def write(self, line: bytes) -> None:
        """Writes a line without buffering. OSError has the file name; reopening the file removes a partial line."""
        remaining = memoryview(line)
        with named(self.path):
            while remaining:
                remaining = remaining[self._file.write(remaining) or 0 :]

    def replace(self, lines: Sequence[bytes]) -> None:
        """Replaces the content atomically: after a crash there are either the old or the new lines."""
        self._file.close()  # Windows does not replace an open file
        try:
            atomic_write(self.path, b"".join(lines))
        finally:
            self._open(truncate=False)

    def restore(self) -> bool:
        """Writes the file again if another process deleted it; the open descriptor still has the content.

        Returns whether it was deleted.
        """
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
        """Closes the file."""
        self._file.close()

    def _open(self, *, truncate: bool) -> None:
        # Unbuffered: a line that failed on a full disk must not be written again when the file is closed.
        self._file = self.path.open("a+b", buffering=0)
        self._file.truncate(0) if truncate else self._repair_last_line()

    def _repair_last_line(self) -> None:
        """Removes a partial last line; appends a missing newline to a complete one."""
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
