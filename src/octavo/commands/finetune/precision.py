"""Chooses the matmuls in 8 bits by their error on the first batch; the choice is printed and stored in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from octavo.commands.backends import backward_8bit
from octavo.commands.finetune.prepare import planned_step
from octavo.commands.finetune.state import Run
from octavo.config import MemoryOptions, TextOptions, TrainOptions
from octavo.data.loader import batches
from octavo.ops.linear_spec import OUTLIERS
from octavo.ops.matmul8 import FP8, gradient_type
from octavo.runs import events
from octavo.train.precision import (
    LIMIT,
    Precision,
    QuantError,
    chosen_precision,
    layers,
    measure_8bit_error,
    speedup,
)


def choose_precision(run: Run, *, resumed: bool) -> Run:
    """Chooses which layers use 8-bit matmuls, by the checkpoint or by measuring; returns the run with a plan for it."""
    state = run.state
    if not run.use_8bit:
        state.precision = None
    elif not resumed or state.precision is None:
        state.precision = _measured(run)
    elif state.precision.forward_only and backward_8bit(run.hardware):
        run.report.say("The run began on a GPU without 8-bit matmuls in backward: their errors are measured again.")
        state.precision = _measured(run)
    else:
        state.precision = replace(state.precision, forward_only=not backward_8bit(run.hardware))
    fit = run.fit.with_precision(state.precision or Precision())
    if fit is run.fit:
        return run
    if run.hardware.capabilities.is_gpu and (warning := fit.warning()):
        run.report.warn(warning)
    step = planned_step(run.config, run.model, run.hardware, fit, run.report)
    return replace(run, fit=fit, micro_step=step, trainer=replace(run.trainer, micro_step=step))


def _measured(run: Run) -> Precision:
    """The layers in 8 bits and the outlier channels of their inputs by measured errors; reports both."""
    run.model.train()
    forced = run.config[MemoryOptions].matmul == "8bit"
    if not forced and run.hardware.capabilities.is_gpu and not _is_faster(run):
        return Precision()
    seed, forward_only = run.config[TrainOptions].seed, not backward_8bit(run.hardware)
    batch = next(iter(batches(run.train.rows, batch_size=1, seed=seed, epochs=1)))
    errors = measure_8bit_error(run.model, batch, run.fit.planner.objective, forward_only=forward_only)
    run.trainer.optimizer.zero_gradients()
    precision = chosen_precision(errors, forced=forced, forward_only=forward_only)
    exact = [name for name, _ in layers(run.model) if name not in precision]
    outliers = {name: list(channels) for name, channels in precision.outliers.items() if channels}
    _show(run, errors, precision)
    values = {name: (error.forward, error.backward, error.outliers) for name, error in errors.items()}
    events.Matmul(exact, outliers, values).write(run.report)
    return precision


def _is_faster(run: Run) -> bool:
    """Times the largest matmul both ways and reports whether 8 bits are faster on this GPU."""
    tokens = run.fit.plan.rows * run.config[TextOptions].seq_len
    times = speedup(run.model, tokens, forward_only=not backward_8bit(run.hardware))
    events.MatmulSpeed(times).write(run.report)
    if times > 1:
        run.report.say(f"8-bit matmuls: the largest one is {times:.2f} times as fast on this GPU.")
        return True
    run.report.say(f"Exact matmuls: in 8 bits the largest one takes {1 / times:.2f} times as long on this GPU.")
    return False


def _show(run: Run, errors: Mapping[str, QuantError], precision: Precision) -> None:
    """Prints the table of errors, a row for each kind of layer."""
    exact = [name for name in errors if name not in precision]
    outliers = [name for name, channels in precision.outliers.items() if channels]
    kinds: dict[str, list[str]] = {}
    for name in errors:
        kinds.setdefault(name.partition(".")[2], []).append(name)
    rows = []
    for kind, names in kinds.items():
        forward = [errors[name].outliers if name in outliers else errors[name].forward for name in names]
        backward = [error for name in names if (error := errors[name].backward) is not None]
        counts = (sum(name not in exact for name in names), sum(name in outliers for name in names), len(names))
        rows.append([kind, *counts, _percent(forward), "exact" if precision.forward_only else _percent(backward)])
    columns = ["layer", "in 8 bits", "with outliers", "of", "error of the output", "of the input gradient"]
    kind = "fp8" if gradient_type(run.hardware.device) == FP8 else "int8"
    in_backward = "exact" if precision.forward_only else kind
    title = f"8-bit matmuls: int8 forward, {in_backward} backward; exact if the error is over {LIMIT:.0%}"
    run.report.table(title, columns, rows)
    if outliers:
        run.report.say(
            f"In {len(outliers)} layers the {OUTLIERS} outlier channels of the input stay in the compute dtype."
        )
    if exact:
        run.report.say(f"Exact: {', '.join(exact)}.")


def _percent(errors: list[float]) -> str:
    if not errors:
        return "not measured"
    ordered = sorted(errors)
    return f"{ordered[len(ordered) // 2]:.2%}, at most {ordered[-1]:.2%}"
