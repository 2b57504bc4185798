"""Before a run: one micro-batch, one evaluation, one save. What would fail after hours fails now, and nothing is kept.

All rows of a run are of one length, so the first batch is as large as any.
"""

from __future__ import annotations

import shutil
from itertools import islice

import torch

from octavo.config import TrainOptions
from octavo.data.loader import batches
from octavo.evaluate import score
from octavo.finetune.state import Run, state_of
from octavo.store import checkpoint
from octavo.train.loop import gradients


def rehearse(run: Run) -> None:
    """Runs a step, an evaluation and a save; TrainingError if even the plan for the least memory does not fit."""
    training = run.config[TrainOptions]
    stream = batches(run.train.rows, batch_size=training.batch, seed=training.seed)
    chosen = list(islice(stream, 1))
    run.model.train()
    for _ in range(2):  # launched, then recorded
        gradients(run.trainer, chosen, 0, seed=run.trainer.scaler.scale)
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
