"""`octavo finetune`: text files in, a tuned adapter out, measured before and after.

A run folder holds config.yaml, ledger.json, metrics.jsonl, checkpoints/, adapter/ and report.html. Everything of a
run that counts is in its newest checkpoint, so a run that was killed goes on as if it had not been: data order and
dropout are functions of the seed, and adapter, optimizer, scaler and the best result so far are stored.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from octavo import page
from octavo.config import Config, RunOptions, TrainOptions
from octavo.data.loader import batches
from octavo.errors import TrainingError, UsageError
from octavo.finetune.compute import settle
from octavo.finetune.measure import hold_out, measure_base, measure_tuned, read_back, sample, save_adapter
from octavo.finetune.prepare import prepare
from octavo.finetune.rehearse import rehearse
from octavo.finetune.state import Run, resume, save_checkpoint
from octavo.hardware import peak_memory_bytes
from octavo.report import Report
from octavo.scores import show_scores
from octavo.store import checkpoint
from octavo.store.files import atomic_write, lock, write_json_atomically
from octavo.system import own_command, quoted
from octavo.train.loop import Step, train

HELD_OUT_POINTS = 5  # held-out losses in a run that does not say how many


def finetune(
    config: Config, *, console: bool = True, results: bool = False, compare_full: bool = False
) -> dict[str, Any]:
    """One run, from its start or from its newest checkpoint; returns what `--json` prints.

    `results`: the closing table goes to stdout. `compare_full` measures the unquantised base too. Raises the errors of
    errors.py; whatever happens, the newest checkpoint is whole.
    """
    options = config[RunOptions]
    _check_folder(options)
    metrics = options.out / "metrics.jsonl"
    with lock(options.out):
        fresh = not metrics.exists()
        with Report(console=console, results=results, metrics=metrics, append=options.resume) as report:
            checkpoint.sweep(options.out / "checkpoints")
            try:
                run = prepare(config, report)
                resumed = options.resume and resume(run)
                settle(run, resumed=resumed)
                rehearse(run)
            except BaseException:
                if fresh:  # nothing was begun: the same call with the fault mended must not meet a run
                    metrics.unlink()
                raise
            _write_settings(run)
            if not resumed:
                measure_base(run, compare_full=compare_full)
            _train(run)
            return _finish(run)


def _check_folder(options: RunOptions) -> None:
    held = [name for name in ("metrics.jsonl", "checkpoints", "adapter") if (options.out / name).exists()]
    if held and not options.resume:
        raise UsageError(
            f"{options.out} already holds a run ({', '.join(held)}).",
            hint="Go on with it with --resume, or choose another folder with --out.",
        )


def _write_settings(run: Run) -> None:
    """config.yaml, without what holds for this call alone, and ledger.json; only once it is sure that the run goes."""
    settings = run.config.replace(resume=False, force=False, stop_after=None)
    atomic_write(run.folder / "config.yaml", settings.to_yaml().encode())
    ledgers = {"train": run.train.ledger.to_dict()}
    if run.test:
        ledgers["test"] = run.test.ledger.to_dict()
    write_json_atomically(run.folder / "ledger.json", ledgers)


def _train(run: Run) -> None:
    """The loop with all that happens around it: metrics, held-out losses, samples, checkpoints, stopping."""
    options, training, found = run.config[RunOptions], run.config[TrainOptions], run.found
    epochs = None if training.steps is not None else training.epochs
    stream = batches(run.train.rows, batch_size=training.batch, seed=training.seed, start=found.position, epochs=epochs)
    stop_at = min(run.total, found.done + (options.stop_after or run.total))
    with _stop_signal() as signals, run.report.progress(run.total, "Training", done=found.done) as bar:
        for step in train(run.trainer, stream, done=found.done):
            found.done, found.position, found.last = step.number, step.following, step
            bar.advance(loss=step.loss, tokens_per_second=round(step.tokens_per_second))
            _record(run, step)
            improved = _between(run, step)
            stopping = bool(signals) or step.number >= stop_at
            due = options.checkpoint_every > 0 and step.number % options.checkpoint_every == 0
            if due or stopping or improved:  # the adapter in its folder always is one that a checkpoint knows
                save_checkpoint(run)
            if stopping:
                break
    if found.done < run.total:
        again = f"{own_command()} finetune --resume {quoted(['--out', run.folder])}"
        if options.stop_after is None:
            raise TrainingError(f"Stopped after step {found.done:,}; the work is saved.", hint=f"Go on with: {again}")
        run.report.say(f"Stopped after step {found.done:,} as asked. Go on with: {again}")


def _record(run: Run, step: Step) -> None:
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


def _between(run: Run, step: Step) -> bool:
    """What is due after a step, before its checkpoint; whether the held-out loss improved."""
    options = run.config[RunOptions]
    every = options.eval_every or math.ceil(run.total / HELD_OUT_POINTS)
    improved = (step.number % every == 0 or step.number == run.total) and hold_out(run)
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
        read_back(run)
        rows = measure_tuned(run)
        if found.best is not None and found.best["step"] != found.done:
            report.say(f"The adapter of step {found.best['step']:,}, the best on the held-out text, is kept.")
        sample(run, which="tuned", step=found.done)
        report.event("evaluation", step=found.done, rows=rows)
        if rows:
            show_scores(rows, report)
    memory = peak_memory_bytes(run.hardware.device)
    report.event("memory", step=found.done, peak_bytes=memory)
    written = page.write(run.folder)
    if finished:
        report.say(f"Peak memory: {memory / 2**30:.2f} GiB.")
        report.result(f"adapter  {run.adapter_folder}\nmetrics  {run.folder / 'metrics.jsonl'}\nreport   {written}")
    return {
        "out": str(run.folder),
        "adapter": str(run.adapter_folder) if finished else None,
        "report": str(written),
        "steps": found.done,
        "loss": found.last.loss if found.last else None,
        "best_step": found.best["step"] if found.best else None,
        "rows": rows,
        "peak_memory_bytes": memory,
    }


@contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM puts itself into, so that the step at hand is finished and saved.

    A second signal does what it would do without octavo.
    """
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background job is not to hear Ctrl-C
                before[number] = signal.signal(number, on_signal)
    except ValueError:  # not in the main thread: signals are somebody else's business
        before.clear()
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
