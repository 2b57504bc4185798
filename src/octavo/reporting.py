"""What a run reports: messages and progress on stderr, results on stdout, one JSON line an event in metrics.jsonl."""

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
# Without a terminal a bar would fill a log file: a plain line this often instead.
PLAIN_SECONDS = 10.0
WIDE = 10_000  # columns of a file or a pipe
FIRST_SECONDS = 1.5  # after which a line says that something goes on at all
SURE_SECONDS, SURE_SHARE = 5.0, 0.02  # of the work: before either the time left is not told


class Report:
    """The one place a run speaks through; a context manager that closes the metrics file.

    Progress and messages go to stderr. `results`: what was asked for goes to stdout; else to stderr too, since stdout
    has a JSON document. `console=False` is silent; `metrics` is the JSON lines file, begun anew unless `append`. On
    append a last line that a killed process left half written is removed. Raises UsageError if the file cannot be
    written.
    """

    def __init__(
        self, *, console: bool = True, results: bool = False, metrics: Path | None = None, append: bool = False
    ) -> None:
        # No markup: what is said holds file names and text of the user's, where "[b]" is just that.
        # Written through a stream that never fails: a terminal that is gone or a log on a full disk must not end a run.
        plain: dict[str, Any] = {
            "markup": False,
            "highlight": False,
            "emoji": False,
            "force_jupyter": False,
            "quiet": not console,
        }
        self._console = Console(file=standard_error(), **plain)
        # In a file or a pipe nothing is folded: there is no edge of a screen, unless one is asked for.
        wide = None if not results or sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE
        self._results = Console(width=wide, **plain) if results else self._console
        self._metrics = MetricsFile(metrics, append=append) if metrics else None

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the metrics file; events after this are no longer recorded."""
        if self._metrics:
            self._metrics.close()
            self._metrics = None

    def say(self, text: str) -> None:
        """One sentence for people; recorded as the event "say"."""
        self._console.print(Text(printable(text)), soft_wrap=True)
        self.event("say", text=text)

    def warn(self, text: str) -> None:
        """One sentence about something that is probably not as wished; recorded as the event "warn"."""
        line = Text.assemble(("warning: ", "bold yellow"), printable(text))
        self._console.print(line, soft_wrap=True)
        self.event("warn", text=text)

    def result(self, text: str) -> None:
        """A part of what was asked for; recorded as the event "say"."""
        self.event("say", text=text)
        with self._output():
            self._results.print(Text(printable(text)), soft_wrap=True)

    def _output(self) -> AbstractContextManager[None]:
        """Around results on stdout, where a failed write is an error."""
        return nullcontext() if self._results is self._console else output()

    def event(self, name: str, /, **fields: object) -> None:
        """Record one JSON line: "event", "time" (UTC, ISO 8601), then `fields`; nothing is shown.

        JSON has no number for them, so NaN and the infinities become the strings "nan", "inf" and "-inf",
        which Python's float() reads. The line is handed to the system before this returns.
        """
        assert not fields.keys() & {"event", "time"}, "the two names are the report's own"
        if self._metrics is not None:
            record = {"event": name, "time": datetime.now(UTC).isoformat(timespec="seconds"), **fields}
            self._metrics.write(_line(record))

    @contextmanager
    def progress(self, total: int, label: str, *, done: int = 0, unit: str = "") -> Iterator[Progress]:
        """A bar over `total` steps, `done` of them behind us; without a terminal a line now and then.

        With `unit` "bytes" the numbers are bytes: they are shown as MB, with a rate.
        """
        if self._console.quiet or not self._console.is_terminal or self._console.is_dumb_terminal or in_notebook():
            plain = Progress(total, label, done=done, unit=unit, console=self._console)
            yield plain
            plain.finish()
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
        """Show a table; a column of nothing but numbers is aligned right. Nothing is recorded.

        `result`: the table is what was asked for, not a part of the way there.
        """
        table = Table(title=printable(title), title_justify="left", title_style="bold")
        for place, column in enumerate(columns):
            numbers = bool(rows) and all(isinstance(row[place], int | float) or row[place] == "" for row in rows)
            table.add_column(printable(column), justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(shown(cell) for cell in row))
        if not result:
            self._console.print(table)
            return
        with self._output():
            self._results.print(table)

    def resume_from(self, step: int) -> None:
        """Forget what was recorded after `step` and will be recorded again; all but what was said if `step` is -1.

        A crash leaves either the old file or the new one. Lines that cannot be read are dropped too, with a warning,
        and there is one if steps up to `step` are not recorded.
        """
        if self._metrics is None:
            return
        path = self._metrics.path
        events, unreadable = read_events(path)
        kept = [event for event in events if not _comes_again(event, step)]
        self._metrics.replace([_line(event) for event in kept])
        if unreadable:
            self.warn(f"{path}: dropped {unreadable} lines that could not be read")
        recorded = {event.get("step") for event in kept if event.get("event") == "step"}
        if missing := sum(number not in recorded for number in range(1, step + 1)):
            self.warn(f"{path} lacks {missing:,} of the steps 1 to {step:,}: so does the report.")

    def restore(self) -> bool:
        """Write the metrics file anew if it was deleted while it was written. Whether it was."""
        return self._metrics is not None and self._metrics.restore()


class Progress:
    """How far a piece of work is. `advance` after each step; anything shown with it stays until replaced."""

    def __init__(
        self, total: int, label: str, *, done: int, console: Console, unit: str = "", bar: Bar | None = None
    ) -> None:
        self._total, self._label, self._unit = total, printable(label), unit
        self._done = self._done_at_start = done
        self._console, self._bar = console, bar
        self._started = self._told = monotonic()
        self._told_done = -1
        self._fields: dict[str, object] = {}
        if bar:
            self._task = bar.add_task(self._label, total=total, completed=done, shown=self._text())

    def advance(self, n: int = 1, /, **shown: object) -> None:
        """`n` more steps are done. `shown` are named values, like loss=2.31, tokens_per_second=840."""
        self._done += n
        self._fields.update(shown)
        if self._bar:
            self._bar.update(self._task, completed=self._done, shown=self._text())
        elif monotonic() - self._told >= (FIRST_SECONDS if self._told_done < 0 else PLAIN_SECONDS):
            self.finish()

    def reach(self, done: int) -> None:
        """`done` steps of all are behind us: more than before, or fewer where work had to begin again."""
        self._done_at_start = min(self._done_at_start, done)
        self.advance(done - self._done)

    def finish(self) -> None:
        """Say where the work stands as a plain line, unless that was just said."""
        if self._bar or self._told_done == self._done:
            return
        self._told, self._told_done = monotonic(), self._done
        self._console.print(Text(f"{self._label}: {self._text()}"), soft_wrap=True)

    def seconds_left(self) -> float | None:
        """At the pace so far; None before the first step, and while there is too little of it to tell."""
        taken, seconds = self._done - self._done_at_start, monotonic() - self._started
        if taken <= 0 or (seconds < SURE_SECONDS and taken < SURE_SHARE * self._total):
            return None
        return seconds / taken * max(0, self._total - self._done)

    def _text(self) -> str:
        left = self.seconds_left()
        values = [
            f"{shown(value)} {name.removesuffix('_per_second')}/s"
            if name.endswith("_per_second")
            else f"{name.replace('_', ' ')} {shown(value)}"
            for name, value in self._fields.items()
        ]
        clock = [] if left is None else [f"{duration(left)} left"]
        if self._unit == "bytes":
            taken, seconds = self._done - self._done_at_start, monotonic() - self._started
            rate = [f"{taken / seconds / 1e6:.1f} MB/s"] if taken > 0 and seconds > 0 else []
            return "  ".join([f"{self._done / 1e6:.1f}/{self._total / 1e6:.1f} MB", *rate, *clock])
        return "  ".join([f"{self._done:,}/{self._total:,}", *values, *clock])


def read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The events of a metrics file in order, and the number of lines that are no JSON object."""
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
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def shown(value: object) -> str:
    """A value for people: whole numbers with commas, others to four digits, text made printable."""
    if isinstance(value, float) and math.isfinite(value):
        whole_digits = len(str(int(abs(value))))
        if value == 0 or abs(value) >= 0.1:
            return f"{value:,.{max(0, 4 - whole_digits)}f}"
        return f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return printable(str(value))


def printable(text: str) -> str:
    """`text` without what could move the cursor, recolour the terminal or turn lines around, and in Unicode.

    Control characters, controls of the direction of writing, and the halves of characters that stand for the bytes of a
    file name that is not UTF-8 become replacement characters.
    """
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def _line(record: Mapping[str, object]) -> bytes:
    return json.dumps(jsonable(record), allow_nan=False).encode() + b"\n"


def jsonable(value: object, *, not_finite: Callable[[float], object] = str) -> object:
    """`value` with paths as strings, and with what `not_finite` makes of NaN and infinities, which JSON lacks.

    By default that is "nan", "inf" or "-inf", which float() reads.
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


def _comes_again(event: Mapping[str, Any], step: int) -> bool:
    """Whether a run that goes on after `step` will record the event once more."""
    if step < 0:
        return event.get("event") not in ("say", "warn")
    recorded = event.get("step")
    if not isinstance(recorded, int | float):
        return False
    of_the_end = event.get("event") in ("evaluation", "memory") or event.get("which") == "tuned"
    return recorded > step or (of_the_end and recorded == step)
