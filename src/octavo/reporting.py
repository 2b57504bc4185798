"""Output of a run: messages and progress on stderr, results on stdout, events as JSON lines in metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from octavo.bounded_json import JsonError, parse
from octavo.metrics_file import MetricsFile
from octavo.streams import in_notebook, output, standard_error

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Without a terminal, progress is printed as a line at this interval instead of a bar, which would fill a log file.
LINE_SECONDS = 10.0
UNLIMITED_WIDTH = 10_000  # in columns, for a file or a pipe
FIRST_LINE_SECONDS = 1.5  # until the first progress line
SAY, WARN = "say", "warn"  # the events of messages and warnings
MIN_ESTIMATE_SECONDS, MIN_ESTIMATE_SHARE = 5.0, 0.02  # of the work: before both, no remaining time is shown


class Report:
    """All output of a run. A context manager that closes the metrics file.

    Messages and progress go to stderr. With `results`, results go to stdout, otherwise to stderr, because stdout has a
    JSON document; with None they are printed nowhere, because the caller returns them. `console=False` prints nothing.
    `metrics` is the path of the JSON lines file. It is truncated unless `append`; then a partial last line of a killed
    process is removed. Raises UsageError if the file cannot be written.
    """

    def __init__(
        self,
        *,
        console: bool = True,
        results: bool | None = False,
        metrics: Path | None = None,
        append: bool = False,
    ) -> None:
        # No markup: messages contain file names and text of the user, where "[b]" is literal.
        # The stream's writes never fail: a closed terminal or a log on a full disk must not end a run.
        console_options: dict[str, Any] = {
            "markup": False,
            "highlight": False,
            "emoji": False,
            "force_jupyter": False,
            "quiet": not console,
        }
        self._console = Console(file=standard_error(), **console_options)
        # Lines are not wrapped in a file or a pipe, unless COLUMNS is set.
        width = None if not results or sys.stdout.isatty() or "COLUMNS" in os.environ else UNLIMITED_WIDTH
        self._results = Console(width=width, **console_options) if results else self._console
        if results is None:
            self._results = Console(file=standard_error(), **{**console_options, "quiet": True})
        self._on_stdout = bool(results)
        self._metrics = MetricsFile(metrics, append=append) if metrics else None
        # Called with each event as it is recorded, also without a metrics file.
        self.observer: Callable[[Mapping[str, Any]], None] | None = None
        # The number of events in the file that earlier calls recorded.
        self.earlier_events = len(read_events(metrics)[0]) if metrics and append else 0

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the metrics file. Later events are not recorded."""
        if self._metrics:
            self._metrics.close()
            self._metrics = None

    def say(self, text: str) -> None:
        """Prints a message; records it as the event "say"."""
        self._console.print(Text(printable(text)), soft_wrap=True)
        self.event(SAY, text=text)

    def warn(self, text: str) -> None:
        """Prints a warning; records it as the event "warn"."""
        line = Text.assemble(("warning: ", "bold yellow"), printable(text))
        self._console.print(line, soft_wrap=True)
        self.event(WARN, text=text)

    def result(self, text: str) -> None:
        """Prints a result; records it as the event "say"."""
        self.event(SAY, text=text)
        with self._output():
            self._results.print(Text(printable(text)), soft_wrap=True)

    def explain(self, text: str) -> None:
        """Prints how a result is to be read: as a message, and only if results are printed. Records it as `say`."""
        if self._results.quiet:
            self.event(SAY, text=text)
        else:
            self.say(text)

    def _output(self) -> AbstractContextManager[None]:
        """Context for writing results: on stdout a failed write is an error."""
        return output() if self._on_stdout else nullcontext()

    def event(self, name: str, /, **fields: object) -> None:
        """Records one JSON line: "event", "time" (UTC, ISO 8601), then `fields`. Prints nothing.

        JSON cannot represent NaN and infinities: they become the strings "nan", "inf" and "-inf", which float() parses.
        The line is written without buffering.
        """
        assert not fields.keys() & {"event", "time"}, "event and time are reserved"
        record = {"event": name, "time": datetime.now(UTC).isoformat(timespec="seconds"), **fields}
        if self._metrics is not None:
            self._metrics.write(_line(record))
        if self.observer is not None:
            self.observer(record)

    @contextmanager
    def progress(self, total: int, label: str, *, done: int = 0, unit: str = "") -> Iterator[Progress]:
        """A progress bar of `total` steps, of which `done` are done; without a terminal, lines at an interval.

        With `unit` "bytes" the steps are bytes, shown in MB with a rate.
        """
        if self._console.quiet or not self._console.is_terminal or self._console.is_dumb_terminal or in_notebook():
            progress = Progress(total, label, done=done, unit=unit, console=self._console)
            yield progress
            progress.finish()
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[shown]}", markup=False),
        )
        with Bar(*columns, console=self._console, expand=True) as bar:
            yield Progress(total, label, done=done, unit=unit, console=self._console, bar=bar)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, result: bool = False
    ) -> None:
        """Prints a table; numeric columns are right-aligned. Records nothing.

        `result`: the table is a result, not a message.
        """
        table = Table(title=printable(title), title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            is_numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
            table.add_column(printable(column), justify="right" if is_numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(shown(cell) for cell in row))
        if not result:
            self._console.print(table)
            return
        with self._output():
            self._results.print(table)

    @property
    def width(self) -> int:
        """The columns of the terminal that results are printed on; very many for a file or a pipe."""
        return self._results.width

    @property
    def metrics(self) -> Path | None:
        """The metrics file, if events are recorded."""
        return self._metrics.path if self._metrics else None

    def keep_events(self, keep: Callable[[Mapping[str, Any]], bool]) -> list[dict[str, Any]]:
        """Removes the recorded events for which `keep` is false, and returns the others.

        Atomic: after a crash there is either the old or the new file. Invalid lines are removed with a warning.
        """
        if self._metrics is None:
            return []
        events, unreadable = read_events(self._metrics.path)
        kept = [event for event in events if keep(event)]
        self._metrics.replace([_line(event) for event in kept])
        if unreadable:
            self.warn(f"{self._metrics.path}: removed {unreadable} invalid lines")
        return kept

    def restore(self) -> bool:
        """Writes the metrics file again if it was deleted during the run. Returns whether it was."""
        return self._metrics is not None and self._metrics.restore()


class Progress:
    """Progress of a task. Call `advance` after each step; values passed to it are shown until replaced."""

    def __init__(
        self, total: int, label: str, *, done: int, console: Console, unit: str = "", bar: Bar | None = None
    ) -> None:
        self._total, self._label, self._unit = total, printable(label), unit
        self._done = self._done_at_start = done
        self._console, self._bar = console, bar
        self._started = self._printed_at = monotonic()
        self._printed_done = -1
        self._fields: dict[str, object] = {}
        if bar:
            self._task = bar.add_task(self._label, total=total, completed=done, shown=self._text())

    def advance(self, n: int = 1, /, **shown: object) -> None:
        """Adds `n` steps. `shown` are values to show, for example loss=2.31, tokens_per_second=840."""
        self._done += n
        self._fields.update(shown)
        if self._bar:
            self._bar.update(self._task, completed=self._done, shown=self._text())
        elif monotonic() - self._printed_at >= (FIRST_LINE_SECONDS if self._printed_done < 0 else LINE_SECONDS):
            self.finish()

    def reach(self, done: int, total: int | None = None) -> None:
        """Sets the number of steps done, which may decrease if the task restarts, and with `total` that of all."""
        if total is not None:
            self._total = total
            if self._bar:
                self._bar.update(self._task, total=total)
        self._done_at_start = min(self._done_at_start, done)
        self.advance(done - self._done)

    def finish(self) -> None:
        """Prints the progress as a line, unless it was just printed."""
        if self._bar or self._printed_done == self._done:
            return
        self._printed_at, self._printed_done = monotonic(), self._done
        self._console.print(Text(f"{self._label}: {self._text()}"), soft_wrap=True)

    def seconds_left(self) -> float | None:
        """Remaining seconds at the average speed so far; None while there are too few steps for an estimate."""
        steps_done, seconds = self._done - self._done_at_start, monotonic() - self._started
        if steps_done <= 0 or (seconds < MIN_ESTIMATE_SECONDS and steps_done < MIN_ESTIMATE_SHARE * self._total):
            return None
        return seconds / steps_done * max(0, self._total - self._done)

    def _text(self) -> str:
        remaining = self.seconds_left()
        named_values = [
            f"{shown(value)} {name.removesuffix('_per_second')}/s"
            if name.endswith("_per_second")
            else f"{name.replace('_', ' ')} {shown(value)}"
            for name, value in self._fields.items()
        ]
        time_left = [] if remaining is None else [f"{duration(remaining)} left"]
        if self._unit == "bytes":
            steps_done, seconds = self._done - self._done_at_start, monotonic() - self._started
            rate = [f"{steps_done / seconds / 1e6:.1f} MB/s"] if steps_done > 0 and seconds > 0 else []
            return "  ".join([f"{self._done / 1e6:.1f}/{self._total / 1e6:.1f} MB", *rate, *time_left])
        return "  ".join([f"{self._done:,}/{self._total:,}", *named_values, *time_left])


def read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The events of a metrics file in order, and the number of lines that are not a JSON object."""
    events, unreadable = [], 0
    for line in path.read_bytes().splitlines():
        event = _parse(line)
        if event is None:
            unreadable += 1
        else:
            events.append(event)
    return events, unreadable


def duration(seconds: float) -> str:
    """`seconds` in the two largest units: "42 s", "3 min 05 s", "2 h 07 min"."""
    total_seconds = round(seconds)
    if total_seconds < 60:
        return f"{total_seconds} s"
    if total_seconds < 3600:
        return f"{total_seconds // 60} min {total_seconds % 60:02d} s"
    return f"{total_seconds // 3600} h {total_seconds % 3600 // 60:02d} min"


def shown(value: object) -> str:
    """A value as text: integers with commas, floats with four digits, strings made printable."""
    if isinstance(value, float) and math.isfinite(value):
        whole_digits = len(str(int(abs(value))))
        if value == 0 or abs(value) >= 0.1:
            return f"{value:,.{max(0, 4 - whole_digits)}f}"
        return f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return printable(str(value))


def _is_number(cell: object) -> bool:
    """Whether a cell is a number; empty cells and dashes are of missing numbers."""
    return isinstance(cell, int | float) or cell in ("", "-")


def printable(text: str) -> str:
    """`text` that is safe to print on a terminal.

    Control characters, bidirectional controls and lone surrogates (bytes of a file name that is not UTF-8) become
    replacement characters.
    """
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def _line(record: Mapping[str, object]) -> bytes:
    return json.dumps(jsonable(record), allow_nan=False).encode() + b"\n"


def jsonable(value: object, *, not_finite: Callable[[float], object] = str) -> object:
    """`value` with paths as strings, and with NaN and infinities, which JSON lacks, replaced by `not_finite`.

    The default replaces them by "nan", "inf" or "-inf", which float() parses.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return not_finite(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item, not_finite=not_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item, not_finite=not_finite) for item in value]
    return str(value) if isinstance(value, Path) else value


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = parse(line, strict=False)
    except JsonError:
        return None
    return event if isinstance(event, dict) else None
