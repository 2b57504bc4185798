"""What a run learned, forgot and copies: measured before training and with the adapter that is kept."""

from __future__ import annotations

from octavo.commands import probes
from octavo.commands.finetune.state import Run
from octavo.commands.loading import end_ids
from octavo.commands.probes import Measured, ProbeSet
from octavo.config import ProbeOptions, TextOptions


def measure_probes_before(run: Run) -> None:
    """Stores the measurements of the base for checkpoints, unless --no-probes is given."""
    if run.config[ProbeOptions].probes:
        run.state.probes = _measured(run, _prepared(run)).tensors()


def measure_probes_after(run: Run) -> None:
    """Records what changed, as events of the last step."""
    if not run.config[ProbeOptions].probes:
        return
    prepared = _prepared(run)
    before = Measured.of_tensors(run.state.probes) if run.state.probes else None
    after = _measured(run, prepared)
    for event in probes.results(prepared, before, after, run.train.rows, run.tokenizer, step=run.state.done):
        event.write(run.report)


def _prepared(run: Run) -> ProbeSet:
    """The probes of the whole held-out text, whatever --eval-rows is: they are few."""
    held_out = run.test.rows if run.test else []
    return probes.prepare(held_out, run.train.rows, run.tokenizer, context=run.model.config.context)


def _measured(run: Run, prepared: ProbeSet) -> Measured:
    run.micro_step.release()  # frees the memory of captured graphs
    batch = max(1, run.micro_step.plan.rows * run.config[TextOptions].seq_len // len(prepared.general[0].ids))
    return probes.measure(
        run.model,
        prepared,
        run.tokenizer,
        batch=batch,
        stop_ids=end_ids(run.source),
        report=run.report,
        tiled_head=run.micro_step.plan.tiled_head,
    )
