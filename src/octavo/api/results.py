"""The documents that commands return, the same as with `--json` on the command line. NaN is null there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict


class Interval(TypedDict):
    """The bounds of an interval of the `level` 0.95, from `units` documents or rows in order (`over`)."""

    low: float
    high: float
    units: int
    over: str
    level: float


class Score(TypedDict):
    """How well a model predicts a text. `tokens` are those that were predicted, `loss` is in nats a token.

    `interval` is that of the loss; None for a text that is too short for one (fewer than 10 documents or rows).
    """

    perplexity: float
    bits_per_byte: float
    tokens: int
    loss: float | None
    interval: Interval | None


class NamedScore(Score):
    """A row of the table of scores: "base", "quantized base" or "tuned" under a scheme, the latter with its adapter.

    "initial" is the tuned model of --init-adapter before training.

    `loss` and `context` are None in rows of runs before they were recorded. `context` is the most tokens that a
    prediction reads: of a packed row, or with a `stride` of the sliding window.

    `size_bytes` are the frozen weights; `also_in_training` is
    the fraction of the held-out text that also occurs in the training text.
    """

    name: str
    scheme: str
    adapter: str | None
    context: int | None
    stride: int | None
    size_bytes: NotRequired[int]
    also_in_training: NotRequired[float]


class Difference(TypedDict):
    """`lower_by`: the loss of the row `before` minus that of the row `after`, on the same text, in nats a token.

    It is positive if `after` is better. `interval` is that of `lower_by`.
    """

    before: str
    before_scheme: str
    after: str
    after_scheme: str
    lower_by: float | None
    interval: Interval | None


class Verdict(TypedDict):
    """What the held-out text shows, in `sentences` and as values.

    `change`: "better", "worse", "unclear" or "not measured", by `gain` bits per byte, whose 95 % interval is
    +- `plus_minus`. `trend` of the held-out loss: "falling" (by `percent_a_pass`), "flat", "overfits" (since
    `best_step`), "rising" (from the start) or "not measured". `files`: the gain in nats a
    token in the files that changed most.
    """

    change: str
    gain: float | None
    plus_minus: float | None
    trend: str
    percent_a_pass: float | None
    best_step: int | None
    files: list[dict[str, Any]]
    sentences: list[str]


class Forgot(TypedDict):
    """The loss on the general text that octavo has, in bits per byte; `rise` is after minus before."""

    step: int | None
    documents: int
    tokens: int
    before: float | None
    after: float | None
    rise: float | None
    interval: Interval | None
    reason: str  # why it was not measured


class Learned(TypedDict):
    """Cloze probes of the held-out text: the share whose true answer is likelier than the `wrong` ones.

    `control_`: the same of a wrong answer in place of the true one. `gain`: of the log-probability, in nats per token.
    """

    step: int | None
    probes: int
    documents: int
    wrong: int
    before: float | None
    after: float | None
    rise: float | None
    interval: Interval | None
    control_before: float | None
    control_after: float | None
    control_rise: float | None
    control_interval: Interval | None
    gain: float | None
    gain_interval: Interval | None
    control_gain: float | None
    control_gain_interval: Interval | None
    examples: Sequence[dict[str, str]]
    reason: str


class Copies(TypedDict):
    """Which share of the runs of `ngram` generated tokens the training text has; `longest` has that many tokens."""

    step: int | None
    samples: int
    ngram: int
    before: float | None
    after: float | None
    rise: float | None
    interval: Interval | None
    shuffled: float | None
    of_training_prompts: float | None
    longest: int
    text: str
    source: str
    reason: str


class FinetuneResult(TypedDict):
    """A run. `adapter` is None, and `rows` are those of the base, if it stopped before its last step.

    `train_loss` is that of the last step, `differences` has the tuned model against the untuned one.
    """

    out: str
    adapter: str | None
    report: str
    steps: int
    train_loss: float | None
    best_step: int | None
    stopped_early: str | None  # why --early-stop ended the run
    rows: list[NamedScore]
    differences: list[Difference]
    verdict: Verdict
    learned: Learned | None
    forgot: Forgot | None
    copies: Copies | None
    held_out: dict[str, Any] | None
    peak_memory_bytes: int


class TuneCell(TypedDict):
    """A learning rate with a rank. Each of its `trials` has `steps` and the `loss` on the text that chooses.

    The loss is None for a trial that diverged.
    """

    lr: float
    rank: int
    trials: list[dict[str, Any]]


class TuneComparison(TypedDict):
    """How much lower the loss of the choice is than that of `other`, in nats a token.

    `probability` is that of a positive difference on other text of this kind.
    """

    other: str
    lower_by: float
    interval: Interval | None
    probability: float | None


class TuneResult(TypedDict):
    """The choice of a search, and how sure it is.

    `measured_on`: "verdict", held-out text that chose nothing, or "choosing" if the time ended before. `beats_default`:
    the interval against the default settings has positive values alone. `command` trains with the choice, `steps` are
    those of the trials that chose, `complete` is False if the time ended before the last round.
    """

    out: str
    choice: dict[str, Any]
    default: dict[str, Any]
    steps: int
    measured_on: str
    against_base: TuneComparison | None
    against_default: TuneComparison | None
    against_second: TuneComparison | None
    complete: bool
    beats_default: bool
    sentences: list[str]
    command: str
    cells: list[TuneCell]
    seconds: float
    report: str | None


class EvaluateResult(TypedDict):
    """Scores of the base and the tuned model; with `tasks` the results of lm-evaluation-harness too.

    `differences`: the tuned model against the untuned one, or with `compare` each scheme against the first.
    `attached`: how many modules of each last name the adapter has LoRA on.
    """

    rows: list[NamedScore]
    differences: list[Difference]
    verdict: Verdict
    learned: Learned | None
    forgot: Forgot | None
    copies: Copies | None
    attached: NotRequired[dict[str, int]]
    tasks: NotRequired[list[dict[str, Any]]]


class GenerateResult(TypedDict):
    """One answer. `finish_reason` is "stop" or "length"."""

    text: str
    token_ids: list[int]
    finish_reason: str


class PlanRow(TypedDict):
    """The plan of a scheme: its memory (`least_gib`: the smallest limit that fits), and time if the GPU is known.

    Times are computed, not measured, so they are ranges: [low, high].
    """

    scheme: str
    fits: bool
    peak_bytes: int
    peak_gib: float
    least_bytes: int
    least_gib: float
    host_gib: float
    micro_batch_size: int
    layers_all: int
    layers_attention: int
    layers_transposed: int  # whose 8-bit weights are stored transposed too
    seconds: list[float] | None  # of an optimizer step
    tokens_per_second: list[float] | None
    flops_per_token: dict[str, float]  # of body, head and attention, without what is recomputed


class PlanResult(TypedDict):
    """The memory budget and the plan of each scheme."""

    budget_bytes: int
    time_basis: str  # what the times rest on
    gpu: str | None
    plans: list[PlanRow]


class WrittenWeight(TypedDict):
    """A frozen weight as written; `error` is ||W - W'|| / ||W||."""

    name: str
    shape: list[int]
    bytes: int
    error: float


class QuantizeResult(TypedDict):
    """A written folder and its frozen weights."""

    out: str
    scheme: str
    bytes: int
    bytes_before: int  # of the weight files of the input
    layers: list[WrittenWeight]


class MergedModule(TypedDict):
    """A module of the base and what the adapter changed: "LoRA", "tokens", "weight", "bias"."""

    name: str
    merged: list[str]


class MergeResult(TypedDict):
    """A merged model. `base_scheme` is that of the weights that the adapter was merged into, none: unquantized.

    `error` is ||W - W'|| / ||W|| over all weights that were quantized, W the merged ones; None for a floating type.
    """

    out: str
    type: str
    base: str
    base_scheme: str
    adapter: str
    adapter_sha256: str
    modules: list[MergedModule]
    bytes: int
    seconds: float
    error: float | None
    layers: list[WrittenWeight]


class ConvertResult(TypedDict):
    """A model that was split. `contents` has a row for the frozen weights, LoRA matrices, and norms and biases."""

    out: str
    base: str
    adapter: str
    contents: list[dict[str, Any]]


class RunRow(TypedDict):
    """A run folder. `state` is finished, running, stopped, failed or unreadable; `problem` says why.

    `difference` is that of the tuned model from the untuned one. `started` is in UTC (ISO 8601).
    """

    path: str
    state: str
    problem: str | None
    model: str | None
    data: list[str]
    steps: int
    planned_steps: int | None
    perplexity_before: float | None
    perplexity_after: float | None
    difference: Difference | None
    tokens_per_second: float | None
    started: str | None
    device: str | None


class RunsResult(TypedDict):
    """The runs that were found, in the order of `sort`."""

    runs: list[RunRow]


class ComparedRun(RunRow):
    """A compared run. `rows` is its table of scores, `held_out` has pairs of a step and the held-out loss after it."""

    letter: str
    rows: list[NamedScore]
    train_loss: float | None  # at the end, smoothed
    training_tokens: int | None
    training_seconds: float | None
    peak_memory_bytes: int | None
    held_out: list[list[float]]


class RunDifference(TypedDict):
    """The run `after` against the run `before`; `lower_by` is positive if `after` is better.

    `comparable` is loss, bits_per_byte (the same text under another tokenizer) or nothing; `unit` is that of
    `lower_by`, and `text` is the difference, or why there is none, in words.
    """

    before: str
    after: str
    comparable: str
    lower_by: float | None
    unit: str | None
    interval: Interval | None
    text: str


class SamplesOfPrompt(TypedDict):
    """What each run generated for a prompt, in the order of the runs; None for a run without a sample of it."""

    prompt: str
    texts: list[str | None]


class CompareResult(TypedDict):
    """The compared runs, the settings that differ with their value in each run, and the others against the first."""

    runs: list[ComparedRun]
    settings: dict[str, list[Any]]
    differences: list[RunDifference]
    samples: list[SamplesOfPrompt]
    report: str | None


class PushResult(TypedDict):
    """What was uploaded: the files with their sizes in bytes. `url` and `commit` are None after a dry run."""

    repository: str
    revision: str
    files: dict[str, int]
    url: str | None
    commit: str | None
    readme: str
