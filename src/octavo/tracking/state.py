"""trackers.json of a run folder: the id of the run in each tracker, and the first step that one did not get.

It has no addresses and no keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from octavo.atomic import atomic_write
from octavo.bounded_json import JsonError, integer, read_object, text
from octavo.errors import CheckpointError
from octavo.store.files import json_bytes

FILE = "trackers.json"


@dataclass(frozen=True)
class TrackerState:
    """The run's id in a tracker, and the lowest step of the points that it did not get, if there are any."""

    id: str
    unsent_step: int | None = None

    def sent(self, recorded: set[tuple[str, int]]) -> set[tuple[str, int]]:
        """Those of the recorded points that the tracker got."""
        if self.unsent_step is None:
            return set(recorded)
        return {(name, step) for name, step in recorded if step < self.unsent_step}


def read_states(folder: Path) -> dict[str, TrackerState]:
    """The states by tracker; {} without the file. CheckpointError if it is damaged."""
    path = folder / FILE
    if not path.exists():
        return {}
    states = {}
    try:
        for name, value in read_object(path, error=CheckpointError).items():
            if not isinstance(value, dict):
                raise JsonError(f"{name} is no object")
            unsent = value.get("unsent_step")
            states[name] = TrackerState(
                text(value, "id"), None if unsent is None else integer(value, "unsent_step", least=0, most=2**53)
            )
    except JsonError as error:
        hint = "Delete the file: each tracker then gets a new run with all points."
        raise CheckpointError(f"{path} is damaged: {error}.", hint=hint) from error
    return states


def write_states(folder: Path, states: Mapping[str, TrackerState]) -> None:
    """Writes the file atomically."""
    atomic_write(folder / FILE, json_bytes({name: asdict(state) for name, state in states.items()}))
