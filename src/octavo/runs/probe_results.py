"""What a run learned, forgot and copies, as values: the fields of the events and of the JSON result.

`reason` says why there is no measurement; then the other fields have their defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.runs.interval import Interval


@dataclass(frozen=True)
class Forgot:
    """The loss on the small general text, in bits per byte."""

    step: int | None = None
    documents: int = 0
    tokens: int = 0
    before: float | None = None
    after: float | None = None
    rise: float | None = None  # after - before
    interval: Interval | None = None  # of the rise
    reason: str = ""


@dataclass(frozen=True)
class Example:
    """A cloze probe: the end of its context, the true answer, and the likeliest answer before and after training."""

    context: str = ""
    answer: str = ""
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Learned:
    """Cloze probes: in which share of them the true answer is likelier than all `wrong` ones, and how much likelier.

    `control` is the same of a wrong answer in place of the true one. Gains are in nats per token of the answer.
    """

    step: int | None = None
    probes: int = 0
    documents: int = 0
    wrong: int = 0
    before: float | None = None
    after: float | None = None
    rise: float | None = None  # after - before
    interval: Interval | None = None  # of the rise
    control_before: float | None = None
    control_after: float | None = None
    control_rise: float | None = None
    control_interval: Interval | None = None
    gain: float | None = None  # log-probability of the true answer after training minus before
    gain_interval: Interval | None = None
    control_gain: float | None = None
    control_gain_interval: Interval | None = None
    examples: tuple[Example, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Copies:
    """Which share of the n-grams of generated text the training text has. `longest` is of the tuned model."""

    step: int | None = None
    samples: int = 0
    ngram: int = 0  # tokens
    before: float | None = None
    after: float | None = None
    rise: float | None = None  # after - before
    interval: Interval | None = None  # of the rise
    shuffled: float | None = None  # after, of the same tokens in another order
    of_training_prompts: float | None = None  # after, of the continuations of training text
    longest: int = 0  # tokens of the longest copy
    text: str = ""  # of the longest copy
    source: str = ""  # where the training text has it
    reason: str = ""
