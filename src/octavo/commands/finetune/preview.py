"""`octavo finetune --dry-run`: what a run would do, from its options, its data and the model's config.

The text is read and packed as in the run, and the memory is planned as in the run. Weights are not loaded and no step
is made: that the plan is right shows in the trial step, with which the run itself begins (dry_run.py).
"""

from __future__ import annotations

from typing import Any

from octavo.commands.finetune.length import evaluation_interval
from octavo.commands.finetune.prepare import Inputs, read_inputs, total_steps
from octavo.commands.run_plan import GIB
from octavo.config import Config, RunOptions, TextOptions, TrainingData, TrainOptions
from octavo.reporting import Report, duration
from octavo.runs.folder import RunFolder, check_usable
from octavo.tracking import check_trackers


def preview(config: Config, report: Report) -> dict[str, Any]:
    """Prints the ledgers, the steps and the memory plan of a run; returns them as JSON. Writes nothing.

    Errors are those of the run before its weights are loaded, the run folder's included.
    """
    options = config[RunOptions]
    check_usable(RunFolder(options.out), resume=options.resume, startable=bool(config[TrainingData].data))
    check_trackers(options.track)
    inputs = read_inputs(config, report)
    training, plan = inputs.config[TrainOptions], inputs.fitting.plan
    steps = total_steps(training, len(inputs.text.rows))
    parameters = sum(p.numel() for p in inputs.fitting.planner.model.parameters() if p.requires_grad)
    held_out_rows = len(inputs.held_out.measurable(options.eval_rows)) if inputs.held_out else 0
    every = evaluation_interval(inputs.config, steps, train_rows=len(inputs.text.rows), held_out_rows=held_out_rows)
    batch = min(training.batch_size, len(inputs.text.rows))
    report.result(
        f"The run trains {parameters:,} parameters in {steps:,} step{'s' * (steps != 1)} of {batch:,} x "
        f"{inputs.config[TextOptions].seq_len:,} tokens"
        + (f", and evaluates every {every:,} steps." if held_out_rows else ", without an evaluation.")
    )
    seconds = None if plan.seconds_range is None else [end * steps for end in plan.seconds_range]
    report.result(_memory(inputs))
    if seconds is not None:
        report.result(
            f"Time of all steps, computed: {duration(seconds[0])} to {duration(seconds[1])}. Evaluations and loading "
            "come on top."
        )
    report.result(f"Nothing was trained, and nothing was written to {options.out} (--dry-run).")
    return {
        "out": str(options.out),
        "train": inputs.text.ledger.to_dict(),
        "test": inputs.held_out.ledger.to_dict() if inputs.held_out else None,
        "scheme": inputs.scheme.name,
        "trained_parameters": parameters,
        "steps": steps,
        "batch_size": batch,
        "micro_batch_size": plan.rows,
        "eval_every": every if held_out_rows else None,
        "peak_bytes": plan.peak_bytes,
        "budget_bytes": inputs.fitting.budget_bytes,
        "seconds": seconds,
    }


def _memory(inputs: Inputs) -> str:
    """The memory plan; on a CPU with what it is worth there."""
    fitting = inputs.fitting
    if inputs.hardware.capabilities.is_gpu:
        return fitting.describe()
    return (
        f"Memory: about {fitting.plan.peak_bytes / GIB:.2f} GiB, in micro-batches of {fitting.plan.rows}, computed for "
        "a GPU's allocator: a CPU takes another amount. No time is computed for a CPU. `octavo plan --gpu NAME` has "
        "both for a GPU."
    )
