"""Before a run: which products are computed in 8 bits. Tried on the first batch, shown, kept in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.commands.finetune.state import Run
from octavo.config import MemoryOptions, TextOptions, TrainOptions
from octavo.data.loader import batches
from octavo.ops.linear_spec import OUTLIERS
from octavo.ops.matmul8 import FP8, gradient_type
from octavo.train.precision import LIMIT, QuantError, layers, measure_8bit_error, set_precision_, speedup


def choose_precision(run: Run, *, resumed: bool) -> None:
    """Sets what is computed in 8 bits: as the checkpoint says, or as a trial finds; then the plan follows."""
    found = run.found
    if not run.use_8bit:
        found.exact_products, found.outliers = None, {}
    elif not resumed or found.exact_products is None:
        _try(run)
    set_precision_(run.model, exact=found.exact_products or (), outliers=found.outliers, wanted=run.use_8bit)
    if found.exact_products:
        plan = run.fit.with_exact(found.exact_products)
        run.micro_step.release()
        run.micro_step.take(plan)
        if run.hardware.device.type == "cuda":
            run.report.say(run.fit.words(plan))
            if fault := run.fit.fault(plan):
                run.report.warn(fault)


def _try(run: Run) -> None:
    """Finds the products that stay exact, and the channels that stay out of those in 8 bits; tells of both."""
    run.model.train()
    asked = run.config[MemoryOptions].matmul == "8bit"
    if not asked and run.hardware.device.type == "cuda" and not _fast(run):
        run.found.exact_products, run.found.outliers = [name for name, _ in layers(run.model)], {}
        return
    seed = run.config[TrainOptions].seed
    batch = next(iter(batches(run.train.rows, batch_size=1, seed=seed, epochs=1)))
    costs = measure_8bit_error(run.model, batch)
    run.trainer.optimizer.zero_gradients()
    exact = [] if asked else [name for name, cost in costs.items() if not cost.acceptable]
    outliers = {name: list(cost.channels) for name, cost in costs.items() if cost.splits_outliers and name not in exact}
    run.found.exact_products, run.found.outliers = exact, outliers
    _show(run, costs)
    told = {name: (c.forward, c.backward, c.outliers) for name, c in costs.items()}
    run.report.event("matmul", exact=exact, outliers=outliers, costs=told)


def _fast(run: Run) -> bool:
    """Whether 8 bits are faster on this card, which is said."""
    times = speedup(run.model, run.fit.plan.rows * run.config[TextOptions].seq_len)
    run.report.event("compute_speed", times=times)
    if times > 1:
        run.report.say(f"In 8 bits this card computes the largest product {times:.2f} times as fast.")
        return True
    run.report.say(f"Products stay exact: in 8 bits this card takes {1 / times:.2f} times as long for the largest one.")
    return False


def _show(run: Run, costs: Mapping[str, QuantError]) -> None:
    """A row for each kind of layer."""
    exact, outliers = run.found.exact_products or [], run.found.outliers
    kinds: dict[str, list[str]] = {}
    for name in costs:
        kinds.setdefault(name.partition(".")[2], []).append(name)
    rows = []
    for kind, names in kinds.items():
        forward = [costs[name].outliers if name in outliers else costs[name].forward for name in names]
        backward = [cost for name in names if (cost := costs[name].backward) is not None]
        counts = (sum(name not in exact for name in names), sum(name in outliers for name in names), len(names))
        rows.append([kind, *counts, _percent(forward), _percent(backward)])
    columns = ["layer", "in 8 bits", "channels apart", "of", "error of its output", "of the gradient to its input"]
    kind = "fp8" if gradient_type(run.hardware.device) == FP8 else "int8"
    title = f"Products in 8 bits: int8 forward, {kind} backward; exact where the error is over {LIMIT:.0%}"
    run.report.table(title, columns, rows)
    if outliers:
        run.report.say(
            f"Of {len(outliers)} layers the {OUTLIERS} channels with the largest inputs stay in the compute type."
        )
    if exact:
        run.report.say(f"Exact: {', '.join(exact)}.")


def _percent(errors: list[float]) -> str:
    if not errors:
        return "not taken"
    ordered = sorted(errors)
    return f"{ordered[len(ordered) // 2]:.2%}, at most {ordered[-1]:.2%}"
