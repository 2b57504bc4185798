"""Before a run: which products are computed in 8 bits. Tried on the first batch, shown, kept in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.config import MemoryOptions, TextOptions, TrainOptions
from octavo.data.loader import batches
from octavo.finetune.state import Run
from octavo.ops.eight import FP8, gradient_type
from octavo.ops.frozen import APART
from octavo.train.compute import LIMIT, Cost, compute_in_eight_, layers, speedup, try_eight


def settle(run: Run, *, resumed: bool) -> None:
    """Sets what is computed in 8 bits: as the checkpoint says, or as a trial finds; then the plan follows."""
    found = run.found
    if not run.in_eight:
        found.exact_products, found.apart = None, {}
    elif not resumed or found.exact_products is None:
        _try(run)
    compute_in_eight_(run.model, exact=found.exact_products or (), apart=found.apart, wanted=run.in_eight)
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
    asked = run.config[MemoryOptions].compute == "8bit"
    if not asked and run.hardware.device.type == "cuda" and not _fast(run):
        run.found.exact_products, run.found.apart = [name for name, _ in layers(run.model)], {}
        return
    seed = run.config[TrainOptions].seed
    batch = next(iter(batches(run.train.rows, batch_size=1, seed=seed, epochs=1)))
    costs = try_eight(run.model, batch)
    run.trainer.optimizer.zero_gradients()
    exact = [] if asked else [name for name, cost in costs.items() if not cost.fair]
    apart = {name: list(cost.channels) for name, cost in costs.items() if cost.parted and name not in exact}
    run.found.exact_products, run.found.apart = exact, apart
    _show(run, costs)
    told = {name: (c.forward, c.backward, c.apart) for name, c in costs.items()}
    run.report.event("compute", exact=exact, apart=apart, costs=told)


def _fast(run: Run) -> bool:
    """Whether 8 bits are faster on this card, which is said."""
    times = speedup(run.model, run.fit.plan.rows * run.config[TextOptions].seq_len)
    run.report.event("compute_speed", times=times)
    if times > 1:
        run.report.say(f"In 8 bits this card computes the largest product {times:.2f} times as fast.")
        return True
    run.report.say(f"Products stay exact: in 8 bits this card takes {1 / times:.2f} times as long for the largest one.")
    return False


def _show(run: Run, costs: Mapping[str, Cost]) -> None:
    """A row for each kind of layer."""
    exact, apart = run.found.exact_products or [], run.found.apart
    kinds: dict[str, list[str]] = {}
    for name in costs:
        kinds.setdefault(name.partition(".")[2], []).append(name)
    rows = []
    for kind, names in kinds.items():
        forward = [costs[name].apart if name in apart else costs[name].forward for name in names]
        backward = [cost for name in names if (cost := costs[name].backward) is not None]
        counts = (sum(name not in exact for name in names), sum(name in apart for name in names), len(names))
        rows.append([kind, *counts, _percent(forward), _percent(backward)])
    columns = ["layer", "in 8 bits", "channels apart", "of", "error of its output", "of the gradient to its input"]
    kind = "fp8" if gradient_type(run.hardware.device) == FP8 else "int8"
    title = f"Products in 8 bits: int8 forward, {kind} backward; exact where the error is over {LIMIT:.0%}"
    run.report.table(title, columns, rows)
    if apart:
        run.report.say(f"Of {len(apart)} layers the {APART} channels with the largest inputs stay in the compute type.")
    if exact:
        run.report.say(f"Exact: {', '.join(exact)}.")


def _percent(errors: list[float]) -> str:
    if not errors:
        return "not taken"
    ordered = sorted(errors)
    return f"{ordered[len(ordered) // 2]:.2%}, at most {ordered[-1]:.2%}"
