"""Before a run: which products are computed in 8 bits. Tried on the first batch, shown, kept in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.config import MemoryOptions, TrainOptions
from octavo.data.loader import batches
from octavo.finetune.state import Run
from octavo.train.compute import LIMIT, Cost, compute_in_eight_, try_eight


def settle(run: Run, *, resumed: bool) -> None:
    """Sets what is computed in 8 bits: as the checkpoint says, or as a trial finds; then the plan follows."""
    found = run.found
    if not run.in_eight:
        found.exact_products = None
    elif not resumed or found.exact_products is None:
        found.exact_products = _tried(run)
    compute_in_eight_(run.model, exact=found.exact_products or (), wanted=run.in_eight)
    if found.exact_products:
        run.micro_step.release()
        run.micro_step.take(run.fit.with_exact(found.exact_products))


def _tried(run: Run) -> list[str]:
    """The products that stay exact."""
    run.model.train()
    seed = run.config[TrainOptions].seed
    batch = next(iter(batches(run.train.rows, batch_size=1, seed=seed, epochs=1)))
    costs = try_eight(run.model, batch)
    run.trainer.optimizer.zero_gradients()
    asked = run.config[MemoryOptions].compute == "8bit"
    exact = [] if asked else [name for name, cost in costs.items() if not cost.fair]
    _show(run, costs, exact)
    run.report.event("compute", exact=exact, costs={name: (c.forward, c.backward) for name, c in costs.items()})
    return exact


def _show(run: Run, costs: Mapping[str, Cost], exact: list[str]) -> None:
    """A row for each kind of layer."""
    kinds: dict[str, list[str]] = {}
    for name in costs:
        kinds.setdefault(name.partition(".")[2], []).append(name)
    rows = []
    for kind, names in kinds.items():
        own = [costs[name] for name in names]
        forward, backward = [c.forward for c in own], [c.backward for c in own if c.backward is not None]
        in_eight = sum(name not in exact for name in names)
        rows.append([kind, in_eight, len(names), _percent(forward), _percent(backward)])
    run.report.table(
        f"Products in 8 bits: int8 forward, fp8 backward; exact where the error is over {LIMIT:.0%}",
        ["layer", "in 8 bits", "of", "error of its output", "of the gradient to its input"],
        rows,
    )
    if exact:
        run.report.say(f"Exact: {', '.join(exact)}.")


def _percent(errors: list[float]) -> str:
    if not errors:
        return "not taken"
    ordered = sorted(errors)
    return f"{ordered[len(ordered) // 2]:.2%}, at most {ordered[-1]:.2%}"
