"""The search itself: the model is loaded once, and rounds of trials are made as far as the time reaches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import monotonic

from octavo import adapters
from octavo.adapters import Adapter
from octavo.commands.finetune.dry_run import dry_run
from octavo.commands.finetune.length import FORWARD_SHARE
from octavo.commands.finetune.precision import choose_precision
from octavo.commands.finetune.prepare import prepare
from octavo.commands.finetune.state import Run
from octavo.commands.tune.outcome import loss_of
from octavo.commands.tune.record import Record, Round, ShortRun, read
from octavo.commands.tune.rounds import (
    MIN_STEPS,
    RANKS_SHARE,
    Cell,
    Costs,
    finalists,
    learning_rates,
    least_seconds,
    other_ranks,
    steps_of_first_rounds,
    steps_of_last_round,
)
from octavo.commands.tune.trial import (
    Clock,
    Halves,
    OutOfTimeError,
    halves,
    losses,
    prepared,
    trained,
    with_cell,
    with_new_adapter_,
)
from octavo.config import Config, LoraOptions, TrainOptions, TuneOptions
from octavo.config.commands import FINETUNE
from octavo.data.loader import batches_per_epoch
from octavo.errors import TimeLimitError, TrainingError, UsageError
from octavo.intervals import Units
from octavo.reporting import Report, duration
from octavo.runs.folder import RunFolder

DEFAULT = Cell(TrainOptions().lr, LoraOptions().rank)
SAFETY = 1.25  # of the minutes that are named: a step of another call takes another time
FINALS = 2  # trials of the last round, without that of another rank
TIMED_STEPS = 6  # of which the fastest is the time of a step: the first ones compile kernels, fill caches, capture


@dataclass(frozen=True)
class Search:
    """A prepared search."""

    run: Run  # with the largest rank, for which the memory is planned
    untuned: Adapter
    parts: Halves
    record: Record
    clock: Clock
    report: Report
    minutes: float  # of --minutes
    resume: str  # the command that goes on
    loading_seconds: float  # of this call until the first trial

    @property
    def most(self) -> int:
        """Optimizer steps of a whole run."""
        return self.run.total


def prepared_search(config: Config, cells: Sequence[Cell], report: Report, clock: Clock, *, resume: str) -> Search:
    """Loads data and model, and the record of an earlier call. `clock` has the deadline without earlier calls.

    `resume` is the command that goes on with the search.
    """
    options, began = config[TuneOptions], monotonic()
    run = prepare(run_config(config, max([*cells, DEFAULT], key=lambda cell: cell.rank)), report)
    run = choose_precision(run, resumed=False)
    dry_run(run)
    parts = halves(run.test_rows)
    if not parts.choosing or not parts.verdict:
        raise UsageError(
            "There is too little held-out text: one half chooses the settings, the other one measures the gain.",
            hint="Give more with --test-data, or raise --test-fraction.",
        )
    report.say(
        f"Held-out text: the settings are chosen on {len(parts.choosing):,} of its rows, and compared on the other "
        f"{len(parts.verdict):,}. On the first ones the best would look better than it is."
    )
    same = {name: value for name, value in run.identity.items() if name not in ("rank", "alpha")}
    identity = {**same, "lr": list(options.lr), "ranks": list(options.rank), "steps": run.total}
    path = RunFolder(options.out).search
    record = read(path, identity) if path.exists() else Record(path, identity)
    record.mark = began
    if record.trials:
        report.say(f"Going on after {len(record.trials):,} trials in {duration(record.spent)}.")
    if not record.begun:
        record.begin()
    untuned = adapters.copied(adapters.collect(run.model, run.plan.spec))
    left = Clock(clock.deadline - record.spent, clock.signals)
    loading = monotonic() - began
    return Search(run, untuned, parts, record, left, report, options.minutes, resume, loading)


def run_config(config: Config, cell: Cell) -> Config:
    """The settings of `octavo finetune` with a cell; those that are not given have its defaults."""
    named = {name for kind in FINETUNE for name in kind.model_fields} - {"lr", "rank", "resume"}
    sections = [config[kind].model_dump(exclude_unset=True) for kind in config.kinds]
    given = {name: value for section in sections for name, value in section.items() if name in named}
    return with_cell(Config.read(FINETUNE, given), cell)


def searched(search: Search, cells: Sequence[Cell]) -> tuple[Units, Units]:
    """Makes rounds of trials until the last one is done or the time ends; the record has them.

    Returns the units of both halves of the held-out text. TimeLimitError if no trial was finished.
    """
    units = None
    estimate = _estimate(search, cells)
    try:
        units = _base(search, estimate.step)
        while (one := _current_round(search, cells, units[0])) is not None:
            for number, cell in enumerate(one.cells, 1):
                if cell not in search.record.of_round(one.number):
                    title = f"Round {one.number}, trial {number} of {len(one.cells)}: {cell}"
                    search.record.add_trial(_tried(search, one, cell, title, units[0]))
            if one.last:
                break
    except OutOfTimeError:
        search.record.add_time()
        if units is None or not search.record.trials:
            raise _too_short(search, cells, estimate) from None
        search.report.say("The time of --minutes is used up. The trial that it interrupted is left out.")
    return units


def _estimate(search: Search, cells: Sequence[Cell]) -> Costs:
    """The costs, those of evaluations from the time of a step if they are not measured yet; says what they mean.

    A few steps are timed even if the time is over, so that it can be said how much is needed. TimeLimitError if the
    steps of the shortest search alone take more than there is.
    """
    if search.record.costs is not None:
        return Costs(**search.record.costs)
    run = search.run
    timed = prepared(run, DEFAULT, TIMED_STEPS, search.untuned, report=Report(console=False))
    with search.report.progress(TIMED_STEPS, "Timing a step") as bar:
        seconds = trained(timed, Clock(math.inf, search.clock.signals), bar)
    with_new_adapter_(run, run.config, search.untuned)  # the untuned model is measured next
    if not seconds:
        raise TrainingError(
            "The loss of the default settings is not finite within a few steps.",
            hint="Check the model and the data with `octavo finetune --steps 3`.",
        )
    step = min(seconds)
    of_row = FORWARD_SHARE * step / min(run.config[TrainOptions].batch_size, len(run.train.rows))
    costs = Costs(step, of_row * len(search.parts.choosing), of_row * len(search.parts.verdict))
    least = _least_seconds(search, cells, costs)
    first = costs.evaluation + costs.verdict + costs.trial(min(MIN_STEPS, search.most))
    search.report.say(
        f"A step takes {step:.2g} s. The first trial needs about {duration(max(1.0, first))}, the shortest search "
        f"about {duration(max(1.0, least))}; {_left(search)} left."
    )
    if _least_seconds(search, cells, Costs(step, 0.0, 0.0)) > search.clock.left:
        raise _too_short(search, cells, costs)
    return costs


def _least_seconds(search: Search, cells: Sequence[Cell], costs: Costs) -> float:
    """The time of the shortest search, that of the untuned model included if it is not measured yet."""
    every, first = list(dict.fromkeys([DEFAULT, *cells])), learning_rates(cells, DEFAULT)
    base = costs.evaluation + costs.verdict if search.record.base is None else 0.0
    return base + least_seconds(len(first), len(every), FINALS, costs, most=search.most)


def _too_short(search: Search, cells: Sequence[Cell], costs: Costs) -> TimeLimitError:
    """The error of a search without a result, with the minutes that it needs when it is resumed."""
    record, needed = search.record, _least_seconds(search, cells, costs)
    loading = search.loading_seconds  # again, in the call that goes on
    record.add_time()
    minutes = math.ceil((record.spent + loading + needed) * SAFETY / 60)
    given = search.minutes
    return TimeLimitError(
        f"--minutes {given:g} is too short for any trial to be finished: loading took {duration(loading)}, and the "
        f"shortest search of this grid takes about {duration(needed)} more (a step {costs.step:.2g} s, an evaluation "
        f"{costs.evaluation:.2g} s).",
        hint=f"What was done is saved. Go on with: {search.resume} --minutes {minutes}\n"
        "Less time is needed in another --out with fewer --lr, a shorter --seq-len or less held-out text "
        "(--test-fraction).",
    )


def _base(search: Search, step: float) -> tuple[Units, Units]:
    """The losses of the untuned model on both halves; records the costs of a new search, with `step` seconds a step."""
    run, record, clock = search.run, search.record, search.clock
    times = [monotonic()]
    measured = []
    for rows in (search.parts.choosing, search.parts.verdict):
        measured.append(losses(run, rows, clock))
        times.append(monotonic())
    if record.base is None:
        costs = Costs(step, times[1] - times[0], times[2] - times[1])
        record.add_base(measured[0], measured[1], asdict(costs))
    return measured[0], measured[1]


def _current_round(search: Search, cells: Sequence[Cell], choosing: Units) -> Round | None:
    """The round that is not done yet, or the next one; None if there is no time for it."""
    record = search.record
    if not record.rounds:
        one: Round | None = _first_round(search, cells)
    else:
        newest = record.rounds[-1]
        done = record.of_round(newest.number)
        if newest.last or len(done) < len(newest.cells):
            return newest
        one = _next_round(search, cells, choosing)
    if one is not None:
        steps, count = f"{one.steps:,} step{'s' * (one.steps != 1)}", len(one.cells)
        search.report.say(f"Round {one.number}: {count} cells, {steps} each; {_left(search)} left.")
        record.add_round(one)
    return one


def _first_round(search: Search, cells: Sequence[Cell]) -> Round:
    """The whole grid if there is time for it, else the learning rates. TimeLimitError if there is no time for those."""
    assert search.record.costs is not None
    costs, left, most = Costs(**search.record.costs), search.clock.left, search.most
    everyone = list(dict.fromkeys([DEFAULT, *cells]))
    whole = Costs(costs.step, costs.evaluation + costs.verdict, 0.0)
    if steps_of_first_rounds(left, len(everyone), 0, whole, most=most) == most:
        return Round(1, most, tuple(everyone), last=True)
    first = learning_rates(cells, DEFAULT)
    steps = steps_of_first_rounds(left, len(first), FINALS, costs, most=most)
    if not steps:
        raise _too_short(search, cells, costs)
    ranks = len({cell.rank for cell in cells}) - 1
    with_ranks = ranks and steps_of_first_rounds(left, len(first) + ranks, FINALS + 1, costs, most=most)
    if with_ranks and with_ranks >= RANKS_SHARE * most:
        return Round(1, with_ranks, tuple(first), last=False)
    if ranks and steps < most:
        search.report.say(
            f"Learning rates at rank {first[-1].rank} alone: with this time trials of other ranks would have less than "
            f"{RANKS_SHARE:.0%} of a whole run's steps."
        )
    return Round(1, steps, tuple(first), last=False)


def _next_round(search: Search, cells: Sequence[Cell], choosing: Units) -> Round | None:
    """After the learning rates the ranks, if there is time for them and for the last round, which comes after them."""
    assert search.record.costs is not None
    record, newest = search.record, search.record.rounds[-1]
    costs = Costs(**record.costs or {})
    timed = [trial for trial in record.trials if trial.nats is not None]
    if timed:  # the mean of real trials, in place of the fastest of a few steps
        step = sum(one.seconds for one in timed) / sum(one.steps for one in timed)
        costs = Costs(step, costs.evaluation, costs.verdict)
    losses = {one.cell: loss for one in record.trials if (loss := loss_of(one, choosing)) is not None}
    ranks = other_ranks(cells, losses)
    if newest.steps >= search.most:  # whole runs, measured on both halves: none is repeated
        ranks = ranks[: max(0, math.floor(search.clock.left / costs.trial(search.most, last=True)))]
        return Round(2, search.most, tuple(ranks), last=True) if ranks else None
    if newest.number == 1 and ranks and newest.steps >= RANKS_SHARE * search.most:
        needed = len(ranks) * costs.trial(newest.steps) + (FINALS + 1) * costs.trial(newest.steps, last=True)
        if needed <= search.clock.left:
            return Round(2, newest.steps, tuple(ranks), last=False)
        search.report.say("The time is too short for other ranks: they are not tried.")
    batches = batches_per_epoch(len(search.run.train.rows), search.run.config[TrainOptions].batch_size)
    last = finalists(cells, losses, DEFAULT, share=newest.steps / search.most, passes=search.most / batches)
    steps = steps_of_last_round(search.clock.left, len(last), costs, most=search.most)
    return Round(newest.number + 1, steps, tuple(last), last=True) if steps else None


def _tried(search: Search, one: Round, cell: Cell, title: str, choosing: Units) -> ShortRun:
    """One trial: trains and evaluates, in the last round on both halves of the text."""
    clock = search.clock
    clock.check()
    began = monotonic()
    run = prepared(search.run, cell, one.steps, search.untuned, report=Report(console=False))
    with search.report.progress(one.steps, title) as bar:
        seconds = trained(run, clock, bar)
    elapsed = monotonic() - began
    if seconds is None:
        search.report.say(f"{title}: diverged.")
        return ShortRun(cell, one.number, one.steps, elapsed, None)
    chosen = losses(run, search.parts.choosing, clock)
    # A whole run is not repeated in the last round.
    verdict = losses(run, search.parts.verdict, clock) if one.last or one.steps >= search.most else None
    trial = ShortRun(
        cell, one.number, one.steps, elapsed, tuple(chosen.nats.tolist()),
        tuple(verdict.nats.tolist()) if verdict else None,
    )  # fmt: skip
    search.report.say(f"{title}: loss {loss_of(trial, choosing) or float('nan'):.4f}; {_left(search)} left.")
    return trial


def _left(search: Search) -> str:
    return duration(max(0.0, search.clock.left))
