"""Reads the beginning and the end of metrics.jsonl: enough to list a run, however many steps it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from octavo.bounded_json import JsonError, parse
from octavo.runs.events import Event, of_record

HEAD_BYTES, TAIL_BYTES = 2**15, 2**14
HEAD_LINES = 40  # more than there are before the first step
GROWTH = 4  # of the end that is read, as long as `enough` is false


@dataclass(frozen=True)
class MetricsEnds:
    """Events in order, and the time of the first line. `whole`: no line between them was left out."""

    events: Sequence[Event]
    first_time: str | None
    whole: bool


def read_ends(path: Path, *, enough: Callable[[Sequence[Event]], bool]) -> MetricsEnds:
    """The events at the beginning and at the end of a metrics file. OSError if it cannot be read.

    More of the end is read until `enough` is true for its events, at most the whole file.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(HEAD_BYTES)
        tail_bytes = TAIL_BYTES
        while len(head) + tail_bytes < size:
            file.seek(size - tail_bytes)
            tail = _events(_records(file.read(tail_bytes).partition(b"\n")[2]))
            if enough(tail):
                records = list(islice(_records(head.rpartition(b"\n")[0]), HEAD_LINES))
                return MetricsEnds([*_events(records), *tail], _first_time(records), whole=False)
            tail_bytes *= GROWTH
        file.seek(len(head))
        records = list(_records(head + file.read()))
        return MetricsEnds(_events(records), _first_time(records), whole=True)


def _events(records: Iterable[dict[str, Any]]) -> list[Event]:
    return [event for record in records if (event := of_record(record)) is not None]


def _first_time(records: Iterable[dict[str, Any]]) -> str | None:
    return next((time for record in records if isinstance(time := record.get("time"), str)), None)


def _records(content: bytes) -> Iterator[dict[str, Any]]:
    """The lines that are JSON objects; a killed run may leave a partial one."""
    for line in content.splitlines():
        try:
            record = parse(line, strict=False)
        except JsonError:
            continue
        if isinstance(record, dict):
            yield record
