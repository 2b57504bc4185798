"""`octavo finetune`: trains an adapter on text files, and evaluates the model before and after.

A checkpoint has the whole state of a run: adapter, optimizer, loss scaler, data position and the best result so far.
Data order and dropout are functions of the seed and the step, without state. So a run that was killed and resumed gives
the same bits as an uninterrupted one. The files of a run folder are listed in runs/folder.py.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from octavo import html_report
from octavo.commands.finetune.dry_run import dry_run
from octavo.commands.finetune.folder import (
    failure_recorded,
    rewrite_lost_files,
    run_folder,
    write_readme,
    write_settings,
)
from octavo.commands.finetune.length import evaluation_interval
from octavo.commands.finetune.measure import (
    ensure_best_adapter,
    evaluate_held_out,
    measure_base,
    measure_tuned,
    read_back,
    save_adapter,
)
from octavo.commands.finetune.precision import choose_precision
from octavo.commands.finetune.prepare import prepare
from octavo.commands.finetune.probes import measure_probes_after, measure_probes_before
from octavo.commands.finetune.samples import sample
from octavo.commands.finetune.state import Run, resume, save_checkpoint
from octavo.commands.finetune.trackers import begin, tracked
from octavo.commands.scores import ScoreTable, show_probes, show_scores, show_verdict
from octavo.config import Config, RunOptions, TrainOptions
from octavo.data.loader import batches
from octavo.errors import StoppedError, TrainingError
from octavo.hardware import peak_memory_bytes
from octavo.reporting import Report
from octavo.runs import events
from octavo.runs.folder import RunFolder
from octavo.runs.probe_sentences import probe_results
from octavo.runs.verdict import verdict_of
from octavo.stopping import StopRequest, StopSignals, stop_signals
from octavo.system import own_command, quoted
from octavo.train.loop import Step, train


def finetune(
    config: Config,
    *,
    console: bool = True,
    results: bool | None = False,
    compare_full: bool = False,
    observer: Callable[[Report], Callable[[Mapping[str, Any]], None]] | None = None,
) -> dict[str, Any]:
    """Trains from the start or from the newest checkpoint; returns the JSON result (`--json`).

    `results` is that of Report: whether the final tables go to stdout. With `compare_full` the unquantized base is
    evaluated too. `observer(report)` is called with each event as it is recorded. A signal (Ctrl-C, SIGTERM) during the
    training loop ends it after the current step, with a checkpoint and a StoppedError. A second signal, or one at any
    other time, raises StopRequest at once. Other errors are those of errors.py.
    """
    with stop_signals() as signals:
        try:
            with (
                run_folder(config) as folder,
                Report(console=console, results=results, metrics=folder.metrics, append=True) as report,
                tracked(config, folder, report, observer and observer(report)) as tracking,
                failure_recorded(report),
            ):
                run = _prepared_run(config, report)
                begin(tracking, run)
                if run.state.done == 0:
                    measure_base(run, compare_full=compare_full)
                    measure_probes_before(run)
                _train(run, signals)
                result = _finish(run)
                signals.check()
                return result
        except KeyboardInterrupt as error:
            number = signals.received[0] if signals.received else signal.SIGINT
            raise StopRequest(number, f"Stopped. {_resume_hint(config)}") from error


def _prepared_run(config: Config, report: Report) -> Run:
    """Prepares a run: loads data, model and adapter, restores the newest checkpoint if resumed, makes a dry run.

    Writes the settings only after the dry run: a run that does not fit into memory writes none.
    """
    if not config[RunOptions].resume:
        events.drop_events_after(report, -1)  # all events: of a call that was killed before its first step
    run = prepare(config, report)
    resumed = config[RunOptions].resume and resume(run)
    run = choose_precision(run, resumed=resumed)
    dry_run(run)
    write_settings(run)
    if resumed:
        ensure_best_adapter(run)
        _go_on_after_early_stop(run)
        if run.finished:
            done = f"all {run.total:,} steps are done"
            longer = "raise --steps or --epochs"
            if stopped := run.state.stopped:
                done = f"--early-stop ended it after step {stopped['step']:,}"
                longer += ", or add --no-early-stop"
            report.say(
                f"The run is complete: {done}, and nothing is trained. The adapter is checked, the tuned model is "
                f"evaluated again, and the report is written again. To train longer, {longer}."
            )
    return run


def _go_on_after_early_stop(run: Run) -> None:
    """Lets a run that --early-stop ended train on, if the user raised its steps or turned the option off."""
    state = run.state
    if state.stopped is None or (run.config[RunOptions].early_stop and run.total <= state.stopped["total"]):
        return
    run.report.say(f"Early stopping ended this run after step {state.stopped['step']:,}; it goes on now.")
    state.stopped = None
    if state.watch is not None:
        state.watch = replace(state.watch, waits=0)


def _train(run: Run, signals: StopSignals) -> None:
    """The training loop with metrics, held-out losses, samples, checkpoints and stop signals."""
    options, training, state = run.config[RunOptions], run.config[TrainOptions], run.state
    if run.finished:
        return
    epochs = None if training.steps is not None else training.epochs
    stream = batches(
        run.train.rows, batch_size=training.batch_size, seed=training.seed, start=state.position, epochs=epochs
    )
    stop_at = min(run.total, state.done + (options.stop_after or run.total))
    steps_without_loss = 0
    try:
        with signals.waits(), run.report.progress(run.total, "Training", done=state.done) as bar:
            for step in train(run.trainer, stream, done=state.done):
                state.done, state.position, state.last = step.number, step.following, step
                bar.advance(**_shown(step))
                steps_without_loss += step.loss is None
                _record(run, step, is_first_without_loss=step.loss is None and steps_without_loss == 1)
                improved = _evaluate_if_due(run, step)
                stopping = bool(signals.received) or step.number >= stop_at or run.finished
                due = options.checkpoint_every > 0 and step.number % options.checkpoint_every == 0
                # If it improved too: the adapter in the folder is always one of a checkpoint.
                if due or stopping or improved:
                    rewrite_lost_files(run)
                    save_checkpoint(run)
                if stopping:
                    break
    except TrainingError as error:
        raise TrainingError(error.message, hint=f"{error.hint} {_resume_hint(run.config)}".strip()) from error
    if steps_without_loss > 1:
        run.report.warn(
            f"{steps_without_loss:,} steps had no token to train on: they have no loss and changed nothing."
        )
    command = f"{own_command()} finetune --resume {quoted(['--out', run.folder.path])}"
    if signals.received:
        number = signals.received[0]
        raise StoppedError(
            f"Stopped after step {state.done:,}; a checkpoint is saved.",
            number=number,
            hint=f"Resume with: {command}",
        )
    if state.stopped is not None:
        best = f" The adapter of step {state.best['step']:,} is kept." if state.best else ""
        run.report.say(f"Stopped early after step {state.done:,} of {run.total:,}: {state.stopped['reason']}.{best}")
    if not run.finished:
        if options.stop_after is None:
            raise TrainingError(
                f"The data ended after step {state.done:,}; a checkpoint is saved.", hint=f"Resume with: {command}"
            )
        run.report.say(f"Stopped after step {state.done:,} (--stop-after). Resume with: {command}")


def _resume_hint(config: Config) -> str:
    """The newest checkpoint of an interrupted run, and the command that resumes it."""
    out = config[RunOptions].out
    command = f"{own_command()} finetune --resume {quoted(['--out', out])}"
    steps = RunFolder(out).steps()
    if not steps:
        return f"There is no checkpoint yet: {command} starts from the beginning."
    return f"The newest checkpoint is of step {steps[-1]:,}. Resume with: {command}"


def _shown(step: Step) -> dict[str, object]:
    """The values of a step in the progress bar, without those that are None."""
    speed = step.tokens_per_second
    values = {"loss": step.loss, "tokens_per_second": None if speed is None else round(speed)}
    return {name: value for name, value in values.items() if value is not None}


def _record(run: Run, step: Step, *, is_first_without_loss: bool) -> None:
    events.Step(
        step=step.number,
        loss=step.loss,
        learning_rate=step.learning_rate,
        grad_norm=step.gradient_norm,
        tokens=step.tokens,
        trained_tokens=step.trained_tokens,
        tokens_per_second=step.tokens_per_second,
    ).write(run.report)
    if step.skipped:
        scale = run.trainer.scaler.scale
        run.report.warn(f"Step {step.number}: gradients overflowed float16, update skipped, loss scale {scale:g}.")
    if is_first_without_loss:
        run.report.warn(
            f"Step {step.number} had no token to train on: its rows have only prompts, for example because --truncate "
            "removed the answers. Such a step has no loss and changes nothing."
        )


def _evaluate_if_due(run: Run, step: Step) -> bool:
    """Evaluates and samples after a step, before its checkpoint, if due. Returns whether the held-out loss improved."""
    options = run.config[RunOptions]
    every = evaluation_interval(run.config, run.total, train_rows=len(run.train.rows), held_out_rows=len(run.test_rows))
    improved = (step.number % every == 0 or step.number == run.total) and evaluate_held_out(run)
    if options.sample_every and step.number % options.sample_every == 0 and step.number < run.total:
        sample(run, which="training", step=step.number)
    return improved


def _recorded_loss(run: Run) -> float | None:
    """The loss of the last step, of an earlier call."""
    step = events.last(events.read(run.folder.metrics), events.Step)
    return step.loss if step else None


def _finish(run: Run) -> dict[str, Any]:
    """Saves the adapter and reads it back, evaluates the tuned model, writes report.html; returns the JSON."""
    report, state = run.report, run.state
    finished = run.finished
    table = ScoreTable(list(state.base_rows))
    if finished:
        if state.best is None:
            save_adapter(run)
        ensure_best_adapter(run)
        read_back(run)
        table = measure_tuned(run)
        sample(run, which="tuned", step=state.done)
        measure_probes_after(run)
        events.Evaluation(state.done, tuple(table.rows), tuple(table.differences), tuple(table.files)).write(report)
    memory = peak_memory_bytes(run.hardware.device)
    events.Memory(state.done, memory).write(report)
    rewrite_lost_files(run)
    if finished:
        write_readme(run)
    written = html_report.write(run.folder.path)
    found = events.read(run.folder.metrics) if finished else []
    verdict = verdict_of(found)
    if finished:  # results last: stdout may be closed, and the run folder must be complete in that case too
        report.say(f"Peak memory: {memory / 2**30:.2f} GiB.")
        if table.rows:
            show_scores(table, report, verdict)
        show_probes(found, report)
        show_verdict(verdict, report)
        if state.best is not None and state.best["step"] != state.done:
            report.result(
                f"The adapter is that of step {state.best['step']:,} of {state.done:,}: the best on the held-out text."
            )
        report.result(f"adapter  {run.folder.adapter}\nmetrics  {run.folder.metrics}\nreport   {written}")
    return {
        "out": str(run.folder.path),
        "adapter": str(run.folder.adapter) if finished else None,
        "report": str(written),
        "steps": state.done,
        "train_loss": state.last.loss if state.last else _recorded_loss(run),
        "best_step": state.best["step"] if state.best else None,
        "stopped_early": state.stopped["reason"] if state.stopped else None,
        "rows": [row.to_dict() for row in table.rows],
        "differences": [asdict(one) for one in table.differences],
        "verdict": verdict.to_dict(),
        **probe_results(found),
        "held_out": asdict(run.test.ledger.overlap) if run.test and run.test.ledger.overlap else None,
        "peak_memory_bytes": memory,
    }
