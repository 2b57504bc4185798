"""The events of a run: a frozen dataclass for each kind of line in metrics.jsonl.

A line is a JSON object: "event" (the kind of the dataclass), "time" (UTC, ISO 8601), and the fields. A command makes an
event and writes it to its report; html_report reads the file back into the same classes. A reader ignores kinds and
fields that it does not have, so that it also reads the files of a newer octavo.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from octavo.data.ledger import Overlap as OverlapValues
from octavo.reporting import SAY, WARN, Report, read_events
from octavo.runs import probe_results
from octavo.runs.interval import Interval as Interval
from octavo.runs.json_fields import read_fields

E = TypeVar("E", bound="Event")


@dataclass(frozen=True)
class Event:
    """The base class. `step` is the optimizer step that an event belongs to, if its class has one."""

    kind: ClassVar[str]

    @property
    def ends_run(self) -> bool:
        """Whether it is recorded after the last step, and so again by every later call on a finished run."""
        return False

    def write(self, report: Report) -> None:
        """Appends the event to the metrics file of `report`."""
        report.event(self.kind, **{field.name: _plain(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class Step(Event):
    """An optimizer step: mean loss in nats a trained token, None if it had none."""

    kind = "step"
    step: int
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class HeldOut(Event):
    """An evaluation on the held-out text during training. Its intervals are of paired differences of the loss."""

    kind = "heldout"
    step: int
    loss: float | None = None
    perplexity: float | None = None
    passes: float | None = None  # over the training text up to this step
    passes_before: float | None = None  # up to the evaluation before; the first one is before training
    fall: Interval | None = None  # the loss of the evaluation before minus this one
    rise: Interval | None = None  # this loss minus the lowest one before
    lowest_step: int | None = None  # of the lowest one before; 0 is before training


@dataclass(frozen=True)
class Sample(Event):
    """A text generated from `prompt`. `which` model: base (before training), training, or tuned."""

    kind = "sample"
    step: int | None = None
    prompt: str = ""  # of a conversation: the question, the user's last message
    text: str = ""
    which: str = ""
    reference: str = ""  # how the held-out text answers or goes on; "" for a prompt of --sample-prompt

    @property
    def ends_run(self) -> bool:
        return self.which == "tuned"


@dataclass(frozen=True)
class ScoreRow:
    """A row of the perplexity table, also in the JSON result (`--json`) and in checkpoints."""

    name: str
    scheme: str = ""
    adapter: str | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tokens: int | None = None
    also_in_training: float | None = None  # fraction of the held-out text
    size_bytes: int | None = None  # of the frozen weights
    loss: float | None = None  # nats a token
    interval: Interval | None = None  # of the loss
    context: int | None = None  # the most tokens that a prediction reads: of a packed row or of a sliding window
    stride: int | None = None  # of the sliding window; None: packed rows

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> ScoreRow:
        """A row from its JSON object. ValueError if it has no name."""
        row = read_fields(cls, values)
        if row is None:
            raise ValueError("a row of the perplexity table has no name")
        return row

    def to_dict(self) -> dict[str, Any]:
        """The JSON object. `also_in_training` and `size_bytes` are left out where a table does not have them."""
        left_out = {name for name in ("also_in_training", "size_bytes") if getattr(self, name) is None}
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@dataclass(frozen=True)
class Difference:
    """How much lower the loss of one row of the perplexity table is than that of another, on the same text."""

    before: str = ""  # the name of a row
    before_scheme: str = ""
    after: str = ""
    after_scheme: str = ""
    lower_by: float | None = None  # loss before - loss after in nats a token: positive if `after` is better
    interval: Interval | None = None  # of lower_by


@dataclass(frozen=True)
class FileDifference:
    """How much lower the loss of the tuned model is on one file, as `Difference`."""

    source: str = ""
    tokens: int = 0
    lower_by: float | None = None
    interval: Interval | None = None  # None with too few documents or rows


@dataclass(frozen=True)
class QuantizationCost(Event):
    """The loss of the unquantized base against that of the quantized one, before training."""

    kind = "quantization_cost"
    difference: Difference


@dataclass(frozen=True)
class Evaluation(Event):
    """The perplexity table at the end of a run."""

    kind = "evaluation"
    step: int | None = None
    rows: tuple[ScoreRow, ...] = ()
    differences: tuple[Difference, ...] = ()
    files: tuple[FileDifference, ...] = ()  # of the last difference

    @property
    def ends_run(self) -> bool:
        return True


@dataclass(frozen=True)
class HeldOutLosses(Event):
    """The held-out losses of one row of the perplexity table by unit (intervals.py), so that runs can be compared.

    `nats` and `tokens` have the sums over each unit, as runs/packed_numbers.py writes them. Two runs with equal
    `labels` were measured on the same tokens of the same documents.
    """

    kind = "heldout_losses"
    step: int
    row: str = ""  # the name of the row
    over: str = ""  # the kind of the units
    nats: str = ""
    tokens: str = ""
    documents: int = 0
    rows: int = 0
    bytes: int = 0  # of the text of the tokens in UTF-8
    labels: str = ""  # SHA-256 of the tokens of each document
    text: str = ""  # SHA-256 of the held-out documents, whichever part of them was measured

    @property
    def ends_run(self) -> bool:
        return self.row == "tuned"


@dataclass(frozen=True)
class EarlyStop(Event):
    """The end of a run by --early-stop, after `step`, and why."""

    kind = "early_stop"
    step: int
    reason: str = ""


@dataclass(frozen=True)
class Failure(Event):
    """The error that ended a call. A run that was resumed after it has later events."""

    kind = "failure"
    text: str = ""


@dataclass(frozen=True)
class Memory(Event):
    """The peak memory of a call: of the device, or of the process on a CPU."""

    kind = "memory"
    step: int | None = None
    peak_bytes: int | None = None

    @property
    def ends_run(self) -> bool:
        return True


@dataclass(frozen=True)
class Hardware(Event):
    """The device of a run and its compute dtype."""

    kind = "hardware"
    device: str = ""
    name: str = ""
    dtype: str = ""


@dataclass(frozen=True)
class Versions(Event):
    """The versions of octavo and of the libraries that its results depend on."""

    kind = "versions"
    octavo: str = ""
    torch: str = ""
    transformers: str = ""


@dataclass(frozen=True)
class Overlap(OverlapValues, Event):
    """The overlap of the held-out text with the training text."""

    kind = "overlap"


@dataclass(frozen=True)
class Forgot(probe_results.Forgot, Event):
    """The change on the general text."""

    kind = "forgot"

    @property
    def ends_run(self) -> bool:
        return True


@dataclass(frozen=True)
class Learned(probe_results.Learned, Event):
    """The cloze probes of the held-out text."""

    kind = "learned"

    @property
    def ends_run(self) -> bool:
        return True


@dataclass(frozen=True)
class Copies(probe_results.Copies, Event):
    """The verbatim copies of training text in samples."""

    kind = "copies"

    @property
    def ends_run(self) -> bool:
        return True


@dataclass(frozen=True)
class Matmul(Event):
    """The choice of 8-bit matmuls by layer: exact layers, outlier channels, and the measured errors.

    `costs` has (forward, backward, forward with outlier channels) of each layer; backward is None if not measured.
    """

    kind = "matmul"
    exact: Sequence[str] = ()
    outliers: Mapping[str, Sequence[int]] | None = None
    costs: Mapping[str, Sequence[float | None]] | None = None


@dataclass(frozen=True)
class MatmulSpeed(Event):
    """How many times as fast the largest matmul is in 8 bits."""

    kind = "matmul_speed"
    times: float


@dataclass(frozen=True)
class Say(Event):
    """A message."""

    kind = SAY
    text: str = ""


@dataclass(frozen=True)
class Warn(Event):
    """A warning."""

    kind = WARN
    text: str = ""


KINDS: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        Step, HeldOut, Sample, Evaluation, HeldOutLosses, Failure, Memory, Hardware, Versions, Overlap, Matmul,
        MatmulSpeed, Say, Warn, QuantizationCost, EarlyStop, Forgot, Learned, Copies,
    )
}  # fmt: skip


def read(path: Path) -> list[Event]:
    """The events of a metrics file in order, without lines that are no event of a known kind. [] without the file.

    A field that is missing or of another type has its default; without a default the line is no event.
    """
    if not path.is_file():
        return []
    return [event for record in read_events(path)[0] if (event := of_record(record)) is not None]


def of_record(record: Mapping[str, Any]) -> Event | None:
    """The event of one line, or None if it is not one of a known kind."""
    kind = record.get("event")
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    return None if cls is None else read_fields(cls, record)


def only(events: Iterable[Event], cls: type[E]) -> list[E]:
    """The events of one class."""
    return [event for event in events if isinstance(event, cls)]


def last(events: Iterable[Event], cls: type[E]) -> E | None:
    """The last event of one class."""
    return next(reversed(only(events, cls)), None)


def drop_events_after(report: Report, step: int) -> None:
    """Removes the events after `step`, which a resumed run records again; if `step` is -1, all but messages.

    Of earlier calls the messages after the last event that is kept are removed too (warnings only if `step` is -1): a
    call that was killed recorded them, and each call records its own. Atomic: after a crash there is either the old or
    the new file. Warns if steps up to `step` are missing.
    """
    if report.metrics is None:
        return
    records, earlier = read_events(report.metrics)[0], report.earlier_events
    messages = (SAY, WARN) if step < 0 else (SAY,)
    lasting = [
        number
        for number, record in enumerate(records[:earlier])
        if record.get("event") not in messages and not is_recorded_again(record, step)
    ]
    numbers = count()

    def keep(record: Mapping[str, Any]) -> bool:
        number = next(numbers)
        if record.get("event") in messages:
            return number >= earlier or number < max(lasting, default=0)
        return not is_recorded_again(record, step)

    kept = report.keep_events(keep)
    recorded = {event.step for record in kept if isinstance(event := of_record(record), Step)}
    if missing := sum(number not in recorded for number in range(1, step + 1)):
        report.warn(
            f"{report.metrics} lacks {missing:,} of the steps 1 to {step:,}. They are missing in the report too."
        )


def is_recorded_again(record: Mapping[str, Any], step: int) -> bool:
    """Whether a run that resumes after `step` records the line again."""
    if step < 0:
        return record.get("event") not in (Say.kind, Warn.kind)
    event = of_record(record)
    number = getattr(event, "step", record.get("step"))  # of an unknown kind too
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return number > step or (number == step and event is not None and event.ends_run)


def _plain(value: object) -> object:
    """The value of a field for JSON."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Difference | FileDifference | Interval | probe_results.Example):
        return asdict(value)
    return value.to_dict() if isinstance(value, ScoreRow) else value
