"""Written run folders for tests of commands that read runs: the files of a run without its training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from octavo.config import Config
from octavo.config.commands import FINETUNE
from octavo.reporting import Report
from octavo.runs import events
from octavo.runs.folder import FORMAT
from octavo.runs.packed_numbers import pack_counts, pack_floats

TOKENS = 100  # of each held-out document
PROMPT = "To be, or not to be,"


def write_run(
    folder: Path,
    *,
    steps: int = 4,
    planned: int | None = 4,
    before: Sequence[float] = (),
    after: Sequence[float] = (),
    labels: str = "labels",
    text: str = "text",
    n_bytes: int = 10_000,
    sample: str = "that is the question",
    losses: bool = True,
    settings: dict[str, Any] | None = None,
) -> Path:
    """A run of `steps` of `planned` steps, with the mean losses of held-out documents; finished if it has all steps.

    `planned` None: by epochs, of the 16 rows in the ledger.
    """
    before = before or list(np.linspace(3, 5, 20))
    after = after or [loss - 0.5 for loss in before]
    folder.mkdir(parents=True)
    options = {"model": "some/model", "data": ["texts/train"], "steps": planned, **(settings or {})}
    (folder / "run.json").write_text(json.dumps({"format": FORMAT, "octavo": "0.1.0"}))
    (folder / "config.yaml").write_text(Config.read(FINETUNE, options).to_yaml())
    (folder / "ledger.json").write_text(json.dumps({"train": {"rows": 16, "trained": 1600}}))
    with Report(console=False, metrics=folder / "metrics.jsonl") as report:
        events.Hardware("cpu", "a CPU", "torch.float32").write(report)
        events.Versions("0.1.0", "2.13.0", "5.0").write(report)

        def record(row: str, step: int, each: Sequence[float]) -> None:
            if losses:
                events.HeldOutLosses(
                    step, row, "documents", pack_floats([TOKENS * loss for loss in each]),
                    pack_counts([TOKENS] * len(each)), len(each), 7, n_bytes, labels, text,
                ).write(report)  # fmt: skip

        record("quantized base", 0, before)
        events.Sample(0, PROMPT, "base", "base").write(report)
        for step in range(1, steps + 1):
            events.Step(step, 4 - step / 10, 1e-3, 1.0, 512, 512, 800.0).write(report)
            if step % 2 == 0:
                loss = float(np.mean(before)) - step / 10
                events.HeldOut(step, loss, float(np.exp(loss))).write(report)
        if steps == (8 if planned is None else planned):
            record("tuned", steps, after)
            events.Sample(steps, PROMPT, sample, "tuned").write(report)
            rows = [
                events.ScoreRow(
                    name, "int8", None, float(np.exp(np.mean(each))), bits(each, n_bytes), TOKENS * len(each),
                    loss=float(np.mean(each)),
                )
                for name, each in (("quantized base", before), ("tuned", after))
            ]  # fmt: skip
            gain = float(np.mean(before) - np.mean(after))
            bounds = events.Interval(gain - 0.1, gain + 0.1, len(after), "documents")
            difference = events.Difference("quantized base", "int8", "tuned", "int8", gain, bounds)
            events.Evaluation(steps, tuple(rows), (difference,)).write(report)
            events.Memory(steps, 2**30).write(report)
    return folder


def bits(losses: Sequence[float], n_bytes: int) -> float:
    """Bits per byte of documents of TOKENS tokens with these mean losses."""
    return float(TOKENS * np.sum(losses) / np.log(2) / n_bytes)
