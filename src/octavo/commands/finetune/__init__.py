"""`octavo finetune`: text files in, a tuned adapter out, measured before and after.

A run folder holds config.yaml, ledger.json, metrics.jsonl, checkpoints/, adapter/ and report.html. Everything of a
run that counts is in its newest checkpoint, so a run that was killed goes on as if it had not been: data order and
dropout are functions of the seed, and adapter, optimizer, scaler and the best result so far are stored.
"""

from __future__ import annotations

import math
import signal
from typing import Any

from octavo import html_report
from octavo.commands.evaluate import show_scores
from octavo.commands.finetune.dry_run import rehearse
from octavo.commands.finetune.folder import RunFolder, restore, run_folder, write_settings
from octavo.commands.finetune.measure import (
    evaluate_held_out,
    keep_best_adapter,
    measure_base,
    measure_tuned,
    read_back,
    sample,
    save_adapter,
)
from octavo.commands.finetune.precision import choose_precision
from octavo.commands.finetune.prepare import prepare
from octavo.commands.finetune.state import Run, resume, save_checkpoint
from octavo.config import Config, RunOptions, TrainOptions
from octavo.data.loader import batches
from octavo.errors import StoppedError, TrainingError
from octavo.hardware import peak_memory_bytes
from octavo.reporting import Report
from octavo.stopping import StopRequest, StopSignals, stop_signals
from octavo.store import checkpoint
from octavo.system import own_command, quoted
from octavo.train.loop import Step, train

HELD_OUT_POINTS = 5  # held-out losses in a run that does not say how many


def finetune(
    config: Config, *, console: bool = True, results: bool = False, compare_full: bool = False
) -> dict[str, Any]:
    """One run, from its start or from its newest checkpoint; returns what `--json` prints.

    `results`: the closing table goes to stdout. `compare_full` measures the unquantised base too. Raises the errors of
    errors.py, and StopRequest for a signal outside of the loop; whatever happens, the newest checkpoint is whole.
    """
    with stop_signals() as signals:
        try:
            with (
                run_folder(config) as folder,
                Report(console=console, results=results, metrics=folder.metrics, append=True) as report,
            ):
                run = _ready(config, report, folder)
                if run.found.done == 0:
                    measure_base(run, compare_full=compare_full)
                _train(run, signals)
                answer = _finish(run)
                signals.check()
                return answer
        except KeyboardInterrupt as error:
            number = signals.received[0] if signals.received else signal.SIGINT
            raise StopRequest(number, f"Stopped. {_what_is_saved(config)}") from error


def _ready(config: Config, report: Report, folder: RunFolder) -> Run:
    """A run that has been rehearsed, with what its newest checkpoint holds if it goes on; its settings are written."""
    if not config[RunOptions].resume:
        report.resume_from(-1)  # of a call that was killed before its first step
    run = prepare(config, report)
    resumed = config[RunOptions].resume and resume(run)
    choose_precision(run, resumed=resumed)
    rehearse(run)
    write_settings(run, folder)
    if resumed:
        keep_best_adapter(run)
    return run


def _train(run: Run, signals: StopSignals) -> None:
    """The loop with all that happens around it: metrics, held-out losses, samples, checkpoints, stopping."""
    options, training, found = run.config[RunOptions], run.config[TrainOptions], run.found
    epochs = None if training.steps is not None else training.epochs
    stream = batches(run.train.rows, batch_size=training.batch, seed=training.seed, start=found.position, epochs=epochs)
    stop_at = min(run.total, found.done + (options.stop_after or run.total))
    untrained = 0
    try:
        with signals.waits(), run.report.progress(run.total, "Training", done=found.done) as bar:
            for step in train(run.trainer, stream, done=found.done):
                found.done, found.position, found.last = step.number, step.following, step
                bar.advance(**_shown(step))
                untrained += step.loss is None
                _record(run, step, first_untrained=step.loss is None and untrained == 1)
                improved = _between(run, step)
                stopping = bool(signals.received) or step.number >= stop_at
                due = options.checkpoint_every > 0 and step.number % options.checkpoint_every == 0
                if due or stopping or improved:  # the adapter in its folder always is one that a checkpoint has
                    restore(run)
                    save_checkpoint(run)
                if stopping:
                    break
    except TrainingError as error:
        raise TrainingError(error.message, hint=f"{error.hint} {_what_is_saved(run.config)}".strip()) from error
    if untrained > 1:
        run.report.warn(f"{untrained:,} steps had no token to learn from: they record no loss and changed nothing.")
    again = f"{own_command()} finetune --resume {quoted(['--out', run.folder])}"
    if signals.received:
        number = signals.received[0]
        raise StoppedError(
            f"Stopped after step {found.done:,}; the work is saved.", number=number, hint=f"Go on with: {again}"
        )
    if found.done < run.total:
        if options.stop_after is None:
            raise TrainingError(
                f"The data ended after step {found.done:,}; the work is saved.", hint=f"Go on with: {again}"
            )
        run.report.say(f"Stopped after step {found.done:,} as asked. Go on with: {again}")


def _what_is_saved(config: Config) -> str:
    """From where an interrupted run goes on."""
    out = config[RunOptions].out
    again = f"{own_command()} finetune --resume {quoted(['--out', out])}"
    step = checkpoint.newest_step(out / "checkpoints")
    if step is None:
        return f"There is no checkpoint yet: {again} begins anew."
    return f"The newest checkpoint is that of step {step:,}. Go on with: {again}"


def _shown(step: Step) -> dict[str, object]:
    """What the bar shows of a step, as far as there is such a number."""
    speed = step.tokens_per_second
    values = {"loss": step.loss, "tokens_per_second": None if speed is None else round(speed)}
    return {name: value for name, value in values.items() if value is not None}


def _record(run: Run, step: Step, *, first_untrained: bool) -> None:
    run.report.event(
        "step",
        step=step.number,
        loss=step.loss,
        learning_rate=step.learning_rate,
        grad_norm=step.gradient_norm,
        tokens=step.tokens,
        trained_tokens=step.trained_tokens,
        tokens_per_second=step.tokens_per_second,
    )
    if step.skipped:
        scale = run.trainer.scaler.scale
        run.report.warn(f"Step {step.number}: gradients overflowed float16, update left out, loss scale {scale:g}.")
    if first_untrained:
        run.report.warn(
            f"Step {step.number} had no token to learn from: its rows are prompts alone, as where --truncate cuts "
            "answers off. Such a step has no loss and changes nothing."
        )


def _between(run: Run, step: Step) -> bool:
    """What is due after a step, before its checkpoint; whether the held-out loss improved."""
    options = run.config[RunOptions]
    every = options.eval_every or math.ceil(run.total / HELD_OUT_POINTS)
    improved = (step.number % every == 0 or step.number == run.total) and evaluate_held_out(run)
    if options.sample_every and step.number % options.sample_every == 0 and step.number < run.total:
        sample(run, which="training", step=step.number)
    return improved


def _finish(run: Run) -> dict[str, Any]:
    """Saves, reads back and compares, measures the tuned model, writes the page, and says where everything lies."""
    report, found = run.report, run.found
    finished = found.done >= run.total
    rows = list(found.base_rows)
    if finished:
        if found.best is None:
            save_adapter(run)
        keep_best_adapter(run)
        read_back(run)
        rows = measure_tuned(run)
        if found.best is not None and found.best["step"] != found.done:
            report.say(f"The adapter of step {found.best['step']:,}, the best on the held-out text, is kept.")
        sample(run, which="tuned", step=found.done)
        report.event("evaluation", step=found.done, rows=rows)
    memory = peak_memory_bytes(run.hardware.device)
    report.event("memory", step=found.done, peak_bytes=memory)
    restore(run)
    written = html_report.write(run.folder)
    if finished:  # the results last: standard output may be gone, and the run is whole all the same
        report.say(f"Peak memory: {memory / 2**30:.2f} GiB.")
        if rows:
            show_scores(rows, report)
        report.result(f"adapter  {run.adapter_folder}\nmetrics  {run.folder / 'metrics.jsonl'}\nreport   {written}")
    return {
        "out": str(run.folder),
        "adapter": str(run.adapter_folder) if finished else None,
        "report": str(written),
        "steps": found.done,
        "loss": found.last.loss if found.last else None,
        "best_step": found.best["step"] if found.best else None,
        "rows": rows,
        "held_out": dict(run.test.ledger.overlap) if run.test else None,
        "peak_memory_bytes": memory,
    }
