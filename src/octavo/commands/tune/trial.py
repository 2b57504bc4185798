"""One trial of `octavo tune`: a short run of one cell on the model that is loaded once for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np
import torch

from octavo import adapters
from octavo.adapters import Adapter, AdapterPlan
from octavo.commands.finetune.prepare import planned_step, trainer_for
from octavo.commands.finetune.state import Run, RunState
from octavo.commands.run_plan import adapter_plan
from octavo.commands.tune.rounds import Cell
from octavo.config import Config, LoraOptions, TrainOptions
from octavo.data.loader import batches, order
from octavo.data.packing import IGNORE_INDEX, Row
from octavo.errors import StoppedError, TrainingError
from octavo.intervals import Units
from octavo.metrics import score
from octavo.reporting import Progress, Report
from octavo.stopping import StopSignals
from octavo.train.loop import train

MIN_DOCUMENTS = 20  # of held-out text, from which on its halves are documents, each with enough for an interval
DIVERGED = ("The loss is ", "is not finite")  # in the errors of train/loop.py for a learning rate that is too high


SHARE_EPOCH = -1  # its order is that of no pass


class OutOfTimeError(Exception):
    """The time of the search ended within a trial."""


@dataclass(frozen=True)
class Clock:
    """When the search must end, by `time.monotonic`, and the signals that stop it before."""

    deadline: float
    signals: StopSignals

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - monotonic()

    def check(self) -> None:
        """OutOfTimeError at the deadline; StoppedError after a signal."""
        if self.signals.received:
            raise StoppedError("Stopped.", number=self.signals.received[0])
        if self.left <= 0:
            raise OutOfTimeError


@dataclass(frozen=True)
class Halves:
    """The held-out text in two parts: one chooses a cell, the other one, which chose nothing, is for the verdict."""

    choosing: list[Row]
    verdict: list[Row]


def halves(rows: Sequence[Row]) -> Halves:
    """Every second document of the held-out text by its position; of few documents the first and second half of rows.

    Labels of the other half are ignored in rows that have documents of both.
    """
    scored = sorted({document for row in rows for document in _scored_documents(row)})
    if len(scored) < MIN_DOCUMENTS:
        return Halves(list(rows[: (len(rows) + 1) // 2]), list(rows[(len(rows) + 1) // 2 :]))
    return Halves(_only(rows, set(scored[::2])), _only(rows, set(scored[1::2])))


def _scored_documents(row: Row) -> list[int]:
    pieces = np.unique(row.piece[row.labels != IGNORE_INDEX])
    return [row.documents[piece] for piece in pieces]


def _only(rows: Sequence[Row], documents: set[int]) -> list[Row]:
    """The rows with labels of these documents alone, without rows that have none."""
    kept = []
    for row in rows:
        pieces = [piece for piece, document in enumerate(row.documents) if document in documents]
        labels = np.where(np.isin(row.piece, pieces), row.labels, np.int32(IGNORE_INDEX)).astype(np.int32)  # (T,)
        if (labels != IGNORE_INDEX).any():
            kept.append(replace(row, labels=labels))
    return kept


def with_cell(config: Config, cell: Cell) -> Config:
    """The settings of a run with the learning rate and the rank of a cell. alpha / rank is that of the defaults."""
    scale = LoraOptions().alpha / LoraOptions().rank
    return config.replace(lr=cell.lr, rank=cell.rank, alpha=scale * cell.rank)


def prepared(base: Run, cell: Cell, steps: int, untuned: Adapter, *, report: Report) -> Run:
    """A run of `steps` steps of a cell on the model of `base`, with a new adapter, optimizer and complete schedule.

    `untuned` are the norms and biases of the base model: an earlier trial may have trained them. The memory plan is
    that of `base`, whose rank is the largest. The training text is `share_of_text`.
    """
    config = with_cell(base.config, cell).replace(steps=steps)
    plan = with_new_adapter_(base, config, untuned)
    micro_step = planned_step(config, base.model, base.hardware, base.fit, report)
    trainer = trainer_for(config[TrainOptions], base.model, base.hardware, micro_step, rows=len(base.train.rows))
    rows = share_of_text(base.train.rows, steps / base.total, config[TrainOptions])
    return replace(
        base, config=config, plan=plan, trainer=trainer, micro_step=micro_step, train=replace(base.train, rows=rows),
        state=RunState(),
    )  # fmt: skip


def with_new_adapter_(base: Run, config: Config, untuned: Adapter) -> AdapterPlan:
    """Puts a new adapter of `config` on the model, which then equals the base model."""
    plan = adapter_plan(config[LoraOptions])
    adapters.create_(base.model, plan, seed=config[TrainOptions].seed)
    fresh = adapters.collect(base.model, plan.spec)
    adapters.restore_(base.model, replace(fresh, full=untuned.full))
    return plan


def share_of_text(rows: Sequence[Row], share: float, options: TrainOptions) -> list[Row]:
    """A share of the rows, chosen by a hash of the seed and the row; at least a batch, or all.

    A trial with a share of the steps of a whole run makes as many passes over it as a whole run over all rows.
    """
    count = min(len(rows), max(options.batch_size, math.ceil(len(rows) * share)))
    return [rows[index] for index in sorted(order(len(rows), seed=options.seed, epoch=SHARE_EPOCH)[:count])]


def trained(run: Run, clock: Clock, progress: Progress) -> list[float] | None:
    """Trains all steps of a trial; returns their seconds. None if the run diverged: such a cell has no loss.

    Raises as `Clock.check`.
    """
    options = run.config[TrainOptions]
    seconds: list[float] = []
    stream = batches(run.train.rows, batch_size=options.batch_size, seed=options.seed)
    try:
        for step in train(run.trainer, stream):
            progress.advance(**({"loss": step.loss} if step.loss is not None else {}))
            seconds.append(step.seconds)
            clock.check()
    except TrainingError as error:
        if not any(text in error.message for text in DIVERGED):
            raise
        return None
    finally:
        run.micro_step.release()
        if run.hardware.capabilities.is_gpu:
            torch.cuda.empty_cache()
    return seconds


def losses(run: Run, rows: Sequence[Row], clock: Clock) -> Units:
    """The losses of a model on a part of the held-out text, by unit. Raises as `Clock.check`."""
    run.micro_step.release()
    plan = run.micro_step.plan
    units = score(
        run.model, rows, n_bytes=0, batch_size=plan.rows, tiled_head=plan.tiled_head, progress=lambda _: clock.check()
    ).units
    assert units is not None
    return units
