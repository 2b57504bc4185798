"""What a search has done, in a file that survives an interruption: a line for each round and each trial."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from octavo.bounded_json import JsonError, parse
from octavo.commands.tune.rounds import Cell, Costs
from octavo.errors import CheckpointError
from octavo.intervals import Units
from octavo.metrics_file import MetricsFile

FORMAT = 1  # of the lines


@dataclass(frozen=True)
class ShortRun:
    """A finished trial: its losses by unit on the part of the text that chooses, and in the last round on the other.

    `nats` is None if the run diverged.
    """

    cell: Cell
    round: int  # from 1
    steps: int
    seconds: float
    nats: tuple[float, ...] | None
    verdict: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Round:
    """The cells of a round, and the steps of each of its trials."""

    number: int
    steps: int
    cells: tuple[Cell, ...]
    last: bool


_ROUND, _TRIAL, _COSTS = TypeAdapter(Round), TypeAdapter(ShortRun), TypeAdapter(Costs)
_LOSSES = TypeAdapter(tuple[float, ...])


@dataclass
class Record:
    """All of a search. `identity` are the settings that must be equal to go on with it."""

    path: Path
    identity: dict[str, Any]
    rounds: list[Round] = field(default_factory=list)
    trials: list[ShortRun] = field(default_factory=list)
    base: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # losses of the untuned model on both halves
    costs: dict[str, float] | None = None
    spent: float = 0.0  # seconds, those of earlier calls included
    begun: bool = False  # whether the file has its first line
    mark: float = field(default_factory=monotonic)  # up to which the time of this call is recorded

    def of_round(self, number: int) -> dict[Cell, ShortRun]:
        """The trials of a round by cell."""
        return {trial.cell: trial for trial in self.trials if trial.round == number}

    def write(self, kind: str, **values: Any) -> None:
        """Appends a line."""
        file = MetricsFile(self.path, append=True)
        try:
            file.write(json.dumps({"kind": kind, **values}).encode() + b"\n")
        finally:
            file.close()

    def begin(self) -> None:
        """Writes the first line of a new file."""
        self.write("search", format=FORMAT, identity=self.identity)
        self.begun = True

    def add_time(self) -> None:
        """Records the time since the last call of this method."""
        now = monotonic()
        self.write("time", seconds=now - self.mark)
        self.spent += now - self.mark
        self.mark = now

    def add_round(self, one: Round) -> None:
        self.rounds.append(one)
        self.write("round", **asdict(one))

    def add_trial(self, one: ShortRun) -> None:
        self.trials.append(one)
        self.write("trial", **asdict(one))
        self.add_time()

    def add_base(self, choosing: Units, verdict: Units, costs: dict[str, float]) -> None:
        self.base, self.costs = (tuple(choosing.nats.tolist()), tuple(verdict.nats.tolist())), costs
        self.write("base", choosing=self.base[0], verdict=self.base[1], costs=costs)
        self.add_time()


def read(path: Path, identity: dict[str, Any]) -> Record:
    """The record of an earlier call. CheckpointError if its settings, data or model are not those of this call.

    A line that a killed process cut is left out; so is what a round has twice.
    """
    record = Record(path, identity)
    hint = "Choose another --out, or the settings that the search began with."
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            values = parse(line, strict=False)  # a loss may be NaN
        except JsonError:
            continue
        if not isinstance(values, dict):
            continue
        kind = values.pop("kind", None)
        if kind == "search":
            _check(path, values, identity, hint)
            record.begun = True
        elif not record.begun:
            raise CheckpointError(f"{path} does not say which search it is of: its first line is missing.", hint=hint)
        else:
            try:
                _add(record, kind, values)
            except (KeyError, ValueError) as error:  # pydantic's is a ValueError
                what = str(error).splitlines()[0]
                raise CheckpointError(f"{path}: line {number} is not what octavo writes: {what}.", hint=hint) from error
    return record


def _add(record: Record, kind: object, values: dict[str, Any]) -> None:
    """Adds what a line has. KeyError or ValueError for missing values, those of another type, and too few losses."""
    if kind == "round":
        record.rounds.append(_ROUND.validate_python(values))
    elif kind == "trial":
        trial = _TRIAL.validate_python(values)
        for losses, base in zip((trial.nats, trial.verdict), record.base or ((), ()), strict=True):
            if losses is not None and len(losses) != len(base):
                raise ValueError(f"{len(losses):,} losses of {len(base):,} units")
        record.trials.append(trial)
    elif kind == "base":
        choosing, verdict = (_LOSSES.validate_python(values[name]) for name in ("choosing", "verdict"))
        record.base, record.costs = (choosing, verdict), asdict(_COSTS.validate_python(values["costs"]))
    elif kind == "time":
        record.spent += max(0.0, float(values["seconds"]))


def _check(path: Path, values: dict[str, Any], identity: dict[str, Any], hint: str) -> None:
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {values.get('format')}; this octavo reads {FORMAT}.", hint=hint)
    now = json.loads(json.dumps(identity))
    saved = values.get("identity")
    different = [key for key in now if not isinstance(saved, dict) or saved.get(key) != now[key]]
    if different:
        raise CheckpointError(f"{path.parent} has a search with other settings: {', '.join(different)}.", hint=hint)


def with_nats(units: Units, nats: Sequence[float]) -> Units:
    """Recorded losses as units of the same text."""
    return replace(units, nats=np.array(nats, dtype=np.float64))
