"""The dry run before training: one micro-batch, one evaluation and one checkpoint, so that errors appear at once.

Rows with one document and rows with several use different attention kernels, so both kinds are run. All rows of a run
have one length, so batches of one kind take the same memory, but for the documents of packed rows: each takes some in
the backward of attention. The dry run changes nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import torch

from octavo.commands.finetune.state import Run, contents_of
from octavo.config import TrainOptions
from octavo.data.loader import Batch, batches
from octavo.data.packing import IGNORE_INDEX, Row, most_documents
from octavo.metrics import score
from octavo.runs import checkpoint
from octavo.train.loop import accumulate_gradients


def dry_run(run: Run) -> None:
    """Runs a step, an evaluation and a checkpoint. TrainingError if even the plan of the least memory does not fit."""
    run.model.train()
    tried = None
    while tried != run.micro_step.plan:  # repeats if memory ran out and a cheaper plan replaced this one
        tried = run.micro_step.plan
        for batch in batch_of_each_kind(run):
            for _ in range(2 if run.micro_step.graphs else 1):  # eager, then captured as a CUDA graph
                accumulate_gradients(run.trainer, batch, 0, loss_scale=run.trainer.scaler.scale)
    run.trainer.optimizer.zero_gradients()
    run.micro_step.release()
    run.model.eval()
    plan = run.micro_step.plan
    rows = run.test_rows[: plan.rows]
    if rows:
        score(run.model, rows, n_bytes=0, batch_size=len(rows), tiled_head=plan.tiled_head)
    if run.hardware.capabilities.is_gpu:
        torch.cuda.empty_cache()
    folder = run.folder.dry_run
    shutil.rmtree(folder, ignore_errors=True)
    try:
        checkpoint.save(folder, 0, contents_of(run), keep=1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def batch_of_each_kind(run: Run) -> Iterator[Batch]:
    """A batch of rows with one document and a batch of rows with several, as far as the data have both kinds.

    Each repeats one row of its kind, with targets, since a row without them would skip backward: the packed row with
    the most documents, and the other one with the most targets.
    """
    size = min(run.micro_step.rows, run.config[TrainOptions].batch_size)
    best: dict[bool, tuple[tuple[bool, int, int], Row]] = {}
    for row in run.train.rows:
        documents = most_documents([row])
        targets = int((row.labels != IGNORE_INDEX).sum())
        packed, key = documents > 1, (targets > 0, documents, targets)
        if packed not in best or key > best[packed][0]:
            best[packed] = key, row
    for _, row in best.values():
        yield from batches([row] * size, batch_size=size, seed=0, epochs=1)
