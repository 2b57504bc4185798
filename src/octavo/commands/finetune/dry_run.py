"""Before a run: one micro-batch, one evaluation, one save. What would fail after hours fails now, and nothing is kept.

All rows of a run are of one length, so any batch is as large as the others; but rows of one document and packed ones
take different kernels, so both kinds are tried.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import torch

from octavo.commands.finetune.state import Run, state_of
from octavo.config import TrainOptions
from octavo.data.loader import Batch, batches
from octavo.data.packing import IGNORE_INDEX, Row
from octavo.metrics import score
from octavo.store import checkpoint
from octavo.train.loop import gradients


def rehearse(run: Run) -> None:
    """Runs a step, an evaluation and a save; TrainingError if even the plan for the least memory does not fit."""
    run.model.train()
    rehearsed = None
    while rehearsed != run.micro_step.plan:  # a plan that gave way to another leaves that to be rehearsed
        rehearsed = run.micro_step.plan
        for batch in one_of_each_kind(run):
            for _ in range(2 if run.micro_step.record else 1):  # launched, then recorded
                gradients(run.trainer, [batch], 0, seed=run.trainer.scaler.scale)
    run.trainer.optimizer.zero_gradients()
    run.micro_step.release()
    run.model.eval()
    rows = run.test_rows[: run.micro_step.plan.rows]
    if rows:
        score(run.model, rows, n_bytes=0, batch_size=len(rows))
    if run.hardware.device.type == "cuda":
        torch.cuda.empty_cache()
    folder = run.folder / ".rehearsal"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        tensors, state = state_of(run)
        checkpoint.save(folder, 0, tensors=tensors, state=state, keep=1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def one_of_each_kind(run: Run) -> Iterator[Batch]:
    """A batch of rows with one document each, and one of packed rows, as far as the data have them.

    Of each kind the row from which most is learned: one that is prompt alone would leave backward out.
    """
    size = run.config[TrainOptions].batch
    found: dict[bool, tuple[int, Row]] = {}
    for row in run.train.rows:
        packed = bool(row.document.max() > row.document[0])  # documents of a row count up; padding is -1
        learned = int((row.labels != IGNORE_INDEX).sum())
        if packed not in found or learned > found[packed][0]:
            found[packed] = learned, row
    for _, row in found.values():
        yield from batches([row] * size, batch_size=size, seed=0, epochs=1)
