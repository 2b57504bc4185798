"""Evaluation in a run: the perplexity table, held-out losses, and the check of the saved adapter."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from octavo import adapters
from octavo.atomic import new_folder
from octavo.commands.evaluate import full_precision
from octavo.commands.finetune.early_stop import Watch, watched
from octavo.commands.finetune.losses import record_losses
from octavo.commands.finetune.samples import sample
from octavo.commands.finetune.state import Run, adapter_files, trained_adapter, versions
from octavo.commands.finetune.unit_losses import base_losses, next_of_curve, start_of_curve, units_before
from octavo.commands.loading import load_model
from octavo.commands.scores import (
    BASE,
    QUANTIZED_BASE,
    TUNED,
    ScoreTable,
    file_differences,
    loss_difference,
    score_row,
    score_rows,
)
from octavo.config import ModelOptions, RunOptions, TextOptions, TrainOptions, WindowOptions
from octavo.data.loader import batches_per_epoch
from octavo.errors import AdapterError
from octavo.hardware.capabilities import actual_capabilities
from octavo.metrics import Score
from octavo.models import Decoder
from octavo.ops.quantize import scheme_named
from octavo.ops.scheme import Scheme
from octavo.runs import events
from octavo.runs.events import FileDifference, ScoreRow
from octavo.runs.loss_unit import bits_per_byte
from octavo.store import peft
from octavo.store.peft import Adapter

REFERENCE_TOKENS = 64  # on which the logits with the saved adapter are compared with those of the trained model


def measure_base(run: Run, *, compare_full: bool) -> None:
    """The held-out table and samples before training: with new adapters (B = 0) the model equals the base.

    Then the adapter of --init-adapter is put on the model.
    """
    report, hardware = run.report, run.hardware
    events.Hardware(str(hardware.device), _name_of(run), str(hardware.dtype)).write(report)
    versions().write(report)
    if run.test and run.test.ledger.overlap:
        events.Overlap(**asdict(run.test.ledger.overlap)).write(report)
    quantized, full = run.scheme.name != "none", None
    if run.test_rows and compare_full and quantized:
        plain = scheme_named("none")
        model = load_model(run.source, plain, full_precision(hardware), report)
        full = _score(run, model, "Evaluating the base")
        run.state.base_rows.append(table_row(run, BASE, plain, full))
    if run.test_rows:
        name, label = (QUANTIZED_BASE, "Evaluating the quantized base") if quantized else (BASE, "Evaluating the base")
        result = _score(run, run.model, label)
        rows = run.state.base_rows
        rows.append(table_row(run, name, run.scheme, result))
        if full:
            cost = loss_difference(rows[-2], rows[-1], full.units, result.units)
            events.QuantizationCost(cost).write(report)
        _begin_curve(run, result)
        _record_losses(run, name, result)
    sample(run, which="base", step=0)
    if run.initial is not None:
        _start_from(run, run.initial)


def _start_from(run: Run, initial: Adapter) -> None:
    """Puts the adapter of --init-adapter on the model, whose new adapter changed nothing, and measures it."""
    state = run.state
    adapters.restore_(run.model, initial)
    path = run.config[RunOptions].init_adapter
    state.initial = {"path": str(path), "sha256": initial.sha256, "step": initial.origin.get("step")}
    if not run.test_rows:
        return
    result = _score(run, run.model, "Evaluating the initial adapter")
    state.base_rows.append(table_row(run, "initial", run.scheme, result))
    state.base_losses_plain = state.base_losses
    _begin_curve(run, result)
    _record_losses(run, "initial", result)


def _begin_curve(run: Run, result: Score) -> None:
    """The losses before the first step as the begin of the held-out curve."""
    if result.units:
        run.state.base_losses = base_losses(result.units, result.files)
        run.state.curve = start_of_curve(result.units)
        run.state.watch = Watch.begin(result.units) if run.config[RunOptions].early_stop else None


def measure_tuned(run: Run) -> ScoreTable:
    """The complete perplexity table, with the tuned model as last row and its difference from the row before it.

    With --init-adapter that row is the initial adapter, and a first difference is that from the base.
    """
    if not run.test_rows:
        return ScoreTable()
    result, base_rows = _score_of_kept(run), run.state.base_rows
    tuned, units, before = table_row(run, TUNED, run.scheme, result), result.units, None
    _record_losses(run, tuned.name, result)
    files: list[FileDifference] = []
    if units and run.state.base_losses:
        before, files_before = units_before(run.state.base_losses, units, result.files)
        files = file_differences(files_before, result.files)
    differences = [loss_difference(base_rows[-1], tuned, before, units)] if base_rows else []
    if run.state.initial is not None and len(base_rows) > 1:  # the last one, which the verdict is on, is of this run
        plain = run.state.base_losses_plain
        units_plain = units_before(plain, units, result.files)[0] if units and plain else None
        differences.insert(0, loss_difference(base_rows[-2], tuned, units_plain, units))
    return ScoreTable([*base_rows, tuned], differences, units, files)


def evaluate_held_out(run: Run) -> bool:
    """Computes a held-out loss, and saves the adapter if it is the best so far. Whether it was saved."""
    if not run.test_rows:
        return False
    state = run.state
    result = _score(run, run.model, f"Held-out loss after step {state.done}")
    event = events.HeldOut(state.done, result.loss, result.perplexity, passes=passes(run))
    if result.units and state.curve:
        event, state.curve = next_of_curve(event, state.curve, result.units)
    event.write(run.report)
    _stop_early_if_due(run, event, result)
    if run.config[RunOptions].keep == "last":
        state.kept_score = state.done, result
    better = math.isfinite(result.loss) and (state.best is None or result.loss < state.best["loss"])
    improved = better and run.config[RunOptions].keep == "best"
    if improved:
        state.best = {"step": state.done, "loss": result.loss}
        state.kept_score = state.done, result
        state.best_adapter = adapters.copied(trained_adapter(run))
        save_adapter(run)
    return improved


def _stop_early_if_due(run: Run, event: events.HeldOut, result: Score) -> None:
    """Records with --early-stop whether the run should end after this evaluation."""
    state = run.state
    if not run.config[RunOptions].early_stop or result.units is None:
        return
    if state.watch is None:  # of a run that began without the option: this evaluation is the first one
        state.watch = Watch.begin(result.units)
        return
    unit = bits_per_byte(result.bits_per_byte / result.loss if result.loss else None)
    state.watch, reason = watched(state.watch, event, result.units, unit)
    if reason and state.done < run.total:
        state.stopped = {"step": state.done, "total": run.total, "reason": reason}
        events.EarlyStop(state.done, reason).write(run.report)


def _score_of_kept(run: Run) -> Score:
    """The score of the adapter that is kept, which `read_back` has applied to the model.

    If this call evaluated it during training, that score is returned: it is of the same weights on the same text, and
    `read_back` has compared the logits of the saved file with those of the trained model.
    """
    state = run.state
    kept = state.best["step"] if state.best is not None else state.done
    if state.kept_score is not None and state.kept_score[0] == kept:
        run.report.say(f"The tuned model is the adapter of step {kept:,}, which was evaluated after that step.")
        return state.kept_score[1]
    return _score(run, run.model, "Evaluating the tuned model")


def passes(run: Run) -> float:
    """Over the training text, up to the step that is done."""
    return run.state.done / batches_per_epoch(len(run.train.rows), run.config[TrainOptions].batch_size)


def save_adapter(run: Run) -> None:
    """Writes the adapter folder, and stores reference logits of the model with this adapter."""
    _write_adapter(run, trained_adapter(run))
    run.state.reference_logits = _reference_logits(run)


def ensure_best_adapter(run: Run) -> None:
    """Writes the best adapter again, with a warning, if its folder is missing, damaged or has another adapter."""
    best = run.state.best_adapter
    if best is not None and not _is_in_folder(run, best):
        run.report.warn(
            f"{run.folder.adapter} does not contain the best adapter (step {best.origin['step']:,}): it is written "
            "again from the checkpoint."
        )
        _write_adapter(run, best)


def _is_in_folder(run: Run, adapter: Adapter) -> bool:
    """Whether the adapter folder has `adapter`, bit for bit, saved as that of its step."""
    try:
        saved = peft.read(run.folder.adapter)
    except (AdapterError, OSError):
        return False
    expected, tensors = peft.tensors_of(adapter), peft.tensors_of(saved)
    same = tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    return same and saved.origin.get("step") == adapter.origin["step"]


def _write_adapter(run: Run, adapter: Adapter) -> None:
    with new_folder(run.folder.adapter, replace=True) as temporary:
        adapter_files(run, adapter)(temporary)


def read_back(run: Run) -> None:
    """Applies the saved adapter to the model; AdapterError if its logits differ from the reference logits."""
    adapters.apply_(run.model, peft.read(run.folder.adapter))
    expected = run.state.reference_logits
    assert expected is not None
    difference = float((_reference_logits(run) - expected).abs().max())
    if not difference <= 1e-4 * float(expected.abs().max()):
        raise AdapterError(
            f"The adapter in {run.folder.adapter} gives other logits than the trained model "
            f"(difference {difference:.3g}).",
            hint="The newest checkpoint is complete: resume from it with --resume.",
        )


def table_row(run: Run, name: str, scheme: Scheme, result: Score) -> ScoreRow:
    """A row of the perplexity table."""
    folders = {TUNED: run.folder.adapter, "initial": run.config[RunOptions].init_adapter}
    folder: Path | None = folders.get(name)
    context, stride = len(run.test_rows[0].ids), run.config[WindowOptions].stride
    row = score_row(name, scheme, folder, result, context=context, stride=stride)
    return replace(row, also_in_training=run.test.ledger.overlap.share) if run.test and run.test.ledger.overlap else row


def _name_of(run: Run) -> str:
    """The name of the device; under --pretend those of both GPUs: the speed of a run is that of the real one."""
    name, device = run.hardware.name, run.hardware.device
    if run.config[ModelOptions].pretend is None:
        return name
    return f"{actual_capabilities(device).name}, as {name}"


def _record_losses(run: Run, name: str, result: Score) -> None:
    documents = run.test.documents if run.test else []
    record_losses(name, result, run.test_rows, documents, step=run.state.done, report=run.report)


def _score(run: Run, model: Decoder, label: str) -> Score:
    run.micro_step.release()  # frees the memory of captured graphs for the evaluation
    # A window may be longer than the rows that the memory plan is for.
    plan = run.micro_step.plan
    batch = max(1, plan.rows * run.config[TextOptions].seq_len // len(run.test_rows[0].ids))
    return score_rows(
        model, run.test_rows, run.tokenizer, batch=batch, label=label, report=run.report, tiled_head=plan.tiled_head
    )


def _reference_logits(run: Run) -> Tensor:
    """Logits (T, V) on the first tokens of the training text."""
    ids = torch.from_numpy(run.train.rows[0].ids[:REFERENCE_TOKENS].astype("int64"))[None]  # (1, T)
    was_training = run.model.training
    run.model.eval()
    with torch.no_grad():
        logits: Tensor = run.model(ids.to(run.hardware.device))[0]
    run.model.train(was_training)
    return logits.float().cpu()
