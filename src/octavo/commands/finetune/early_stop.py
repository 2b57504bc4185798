"""--early-stop: ends a run when its held-out loss no longer falls, by the intervals that the verdict uses.

After each evaluation the loss is compared, on the same units of text (intervals.py), with that of the last clear fall,
the reference; before the first one it is the loss before training. All intervals are paired, at 95 %.

- The interval of the fall since the reference is above 0: a clear fall. This evaluation is the new reference.
- The loss is above the lowest one before, by more than the interval, widened for the choice of the lowest (as the
  verdict "overfits" of runs/verdict.py): the run stops at once.
- Neither, at PATIENCE evaluations in a row: the run stops. The reference stays meanwhile, so that small falls add up
  to a clear one.

The text must have as many units as an interval needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.commands.finetune.held_out_size import counts_of
from octavo.config import Config, RunOptions
from octavo.data.packing import Row
from octavo.errors import UsageError
from octavo.intervals import MIN_UNITS, Units, difference
from octavo.runs.events import HeldOut
from octavo.runs.loss_unit import LossUnit
from octavo.runs.verdict import clear_rise

PATIENCE = 2  # evaluations without a clear fall: one alone is no fall in 1 of 40 by chance, and at the warm-up often


@dataclass(frozen=True)
class Watch:
    """The state of early stopping, which a checkpoint has as tensors."""

    reference: Tensor  # (n,) nats of each unit at the last clear fall
    step: int = 0  # of the reference
    waits: int = 0  # evaluations since then
    evaluations: int = 0  # before the newest one, that before training included

    @classmethod
    def begin(cls, units: Units) -> Watch:
        """Before the first step."""
        return cls(torch.from_numpy(units.nats.copy()), evaluations=1)

    def tensors(self) -> dict[str, Tensor]:
        counts = torch.tensor([self.step, self.waits, self.evaluations], dtype=torch.int64)
        return {"reference": self.reference, "counts": counts}

    @classmethod
    def read(cls, tensors: dict[str, Tensor]) -> Watch | None:
        """The state of `tensors`; None if a checkpoint has none."""
        if not {"reference", "counts"} <= tensors.keys() or tensors["counts"].numel() != 3:
            return None
        step, waits, evaluations = tensors["counts"].tolist()
        return cls(tensors["reference"], step, waits, evaluations)


def watched(watch: Watch, event: HeldOut, units: Units, unit: LossUnit) -> tuple[Watch, str]:
    """(the state after an evaluation, why the run should stop); "" if it should go on.

    `event` has the intervals of the evaluation, `units` its losses; `unit` is that of the text, for the reason.
    """
    seen = replace(watch, evaluations=watch.evaluations + 1)
    if rise := clear_rise(event, watch.evaluations, unit):
        lowest = f"at step {event.lowest_step:,}" if event.lowest_step else "before training"
        return seen, f"the held-out loss is {rise} higher than {lowest}"
    if len(watch.reference) != len(units.nats):
        return watch, ""
    fall = difference(replace(units, nats=watch.reference.numpy()), units)
    if fall is None:
        return watch, ""
    if fall.low > 0:
        return replace(seen, reference=torch.from_numpy(units.nats.copy()), step=event.step, waits=0), ""
    seen = replace(seen, waits=watch.waits + 1)
    if seen.waits < PATIENCE:
        return seen, ""
    low, high = unit.bounds(fall)
    since = f"since step {watch.step:,}" if watch.step else "since the beginning"
    return seen, (
        f"the held-out loss shows no fall {since}, at {seen.waits} evaluations in a row (95 % interval of the fall "
        f"{low:.4f} to {high:.4f} {unit.name})"
    )


def check_early_stop(config: Config, rows: Sequence[Row]) -> None:
    """UsageError if --early-stop cannot work: with --keep last, or with too little held-out text for an interval."""
    options = config[RunOptions]
    if not options.early_stop:
        return
    if options.keep == "last":
        raise UsageError(
            "--early-stop with --keep last would keep an adapter of after the loss had stopped falling.",
            hint="Leave --keep out: the adapter with the lowest held-out loss is kept.",
        )
    if not rows:
        raise UsageError(
            "--early-stop needs held-out text.", hint="Give it with --test-data, or with a --test-fraction above 0."
        )
    documents, n_rows = counts_of(rows)
    if max(documents, n_rows) < MIN_UNITS:
        raise UsageError(
            f"--early-stop needs held-out text of {MIN_UNITS} documents or rows for its intervals; this has "
            f"{documents} documents in {n_rows} rows.",
            hint="Give more with --test-data or --test-fraction, or shorter rows with --seq-len.",
        )
