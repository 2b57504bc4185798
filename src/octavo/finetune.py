"""`octavo finetune`: text files in, a tuned adapter out, measured before and after.

A run folder holds config.yaml, ledger.json, metrics.jsonl, checkpoints/, adapter/ and report.html. Everything of a
run that counts is in its newest checkpoint, so a run that was killed goes on as if it had not been: data order and
dropout are functions of the seed, and adapter, optimizer, scaler and the best result so far are stored.
"""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octavo import page
from octavo._version import __version__
from octavo.card import model_card
from octavo.config import Config, LoraOptions, ModelOptions, RunOptions, TextOptions, TrainingData, TrainOptions
from octavo.data import documents
from octavo.data.loader import Position, batches, batches_per_epoch
from octavo.data.prompt import encode_prompt
from octavo.errors import AdapterError, CheckpointError, TrainingError, UsageError
from octavo.evaluate import Score
from octavo.hardware import Hardware, peak_memory_bytes, pick
from octavo.infer.engine import complete
from octavo.infer.sample import Sampling
from octavo.layers.lora import LoraSpec, flatten_
from octavo.models import Model
from octavo.ops.quantize import Scheme, scheme_named
from octavo.report import Report
from octavo.run import (
    Text,
    check_context,
    chosen_scheme,
    end_ids,
    full_precision,
    load_model,
    open_model,
    read_documents,
    score_row,
    score_rows,
    show_ledger,
    show_scores,
    to_text,
)
from octavo.store import adapter, checkpoint
from octavo.store.adapter import AdapterPlan
from octavo.store.files import lock, write_json_atomically
from octavo.store.sources import Source, fingerprint
from octavo.train.loop import Step, Trainer, train
from octavo.train.memory import policy
from octavo.train.optim import Adam, LossScaler, OptimizerSettings, Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROBE_TOKENS = 64  # on which the saved adapter is compared with the one in memory
HELD_OUT_POINTS = 5  # held-out losses in a run that does not say how many


@dataclass
class Run:
    """What a run works with, and what it has found so far."""

    config: Config
    report: Report
    hardware: Hardware
    source: Source
    scheme: Scheme
    tokenizer: PreTrainedTokenizerFast
    train: Text
    test: Text | None
    model: Model
    plan: AdapterPlan
    trainer: Trainer
    done: int = 0
    position: Position = Position()
    base_rows: list[dict[str, Any]] | None = None  # the table before training
    best: dict[str, Any] | None = None  # {"step", "loss"} of the adapter in the folder
    probe: Tensor | None = None  # logits of the model whose adapter is in the folder
    last: Step | None = None

    @property
    def folder(self) -> Path:
        return self.config[RunOptions].out

    @property
    def total(self) -> int:
        return self.trainer.schedule.total

    @property
    def test_rows(self) -> list[Any]:
        return self.test.rows[: self.config[RunOptions].eval_rows or None] if self.test else []


def finetune(config: Config, *, console: bool = True, compare_full: bool = False) -> dict[str, Any]:
    """One run, from its start or from its newest checkpoint; returns what `--json` prints.

    `compare_full` measures the unquantised base too. Raises the errors of errors.py; whatever happens, the
    newest checkpoint is whole.
    """
    options = config[RunOptions]
    _check_folder(options)
    with lock(options.out), Report(
        console=console, metrics=options.out / "metrics.jsonl", append=options.resume
    ) as report:
        checkpoint.sweep(options.out / "checkpoints")
        (options.out / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        run = _prepare(config, report)
        if not _resume(run):
            _measure_base(run, compare_full=compare_full)
        _train(run)
        return _finish(run)


def _check_folder(options: RunOptions) -> None:
    held = [name for name in ("metrics.jsonl", "checkpoints", "adapter") if (options.out / name).exists()]
    if held and not options.resume:
        raise UsageError(
            f"{options.out} already holds a run ({', '.join(held)}).",
            hint="Go on with it with --resume, or choose another folder with --out.",
        )


def _prepare(config: Config, report: Report) -> Run:
    asked, training = config[ModelOptions], config[TrainOptions]
    hardware = pick(asked.device, asked.dtype)
    report.say(hardware.reason)
    source = open_model(asked, report)
    tokenizer, scheme = source.tokenizer(), chosen_scheme(asked, source)
    text, held_out = _read(config, tokenizer, report)
    model = load_model(source, scheme, hardware, report)
    check_context(model.config.context, config[TextOptions].seq_len)
    plan = _plan(config[LoraOptions])
    adapter.create_(model, plan, seed=training.seed)
    parameters = adapter.trained(model)
    groups = flatten_(parameters)
    total = _total_steps(training, len(text.rows))
    warmup = round(training.warmup if training.warmup >= 1 else training.warmup * total)
    trainer = Trainer(
        model,
        parameters,
        Adam(groups, OptimizerSettings(training.optimizer, training.weight_decay, clip=training.clip)),
        Schedule(training.lr, total, warmup=warmup, kind=training.schedule, floor=training.lr_floor),
        LossScaler(hardware.dtype),
        policy(checkpointing=training.checkpointing),
        training.seed,
        training.accumulate,
    )
    count = sum(parameter.numel() for parameter in parameters.values())
    report.say(f"Training {count:,} numbers in {len(parameters)} tensors for {total:,} steps.")
    return Run(
        config, report, hardware, source, scheme, tokenizer, text, held_out, model, plan, trainer
    )


def _plan(options: LoraOptions) -> AdapterPlan:
    spec = LoraSpec(options.rank, options.alpha, options.dropout, options.rslora)
    return AdapterPlan(spec, tuple(options.targets), norms=options.train_norms, biases=options.train_biases)


def _total_steps(options: TrainOptions, rows: int) -> int:
    if options.steps is not None:
        return options.steps
    return math.ceil(math.ceil(batches_per_epoch(rows, options.batch) * options.epochs) / options.accumulate)


def _read(config: Config, tokenizer: PreTrainedTokenizerFast, report: Report) -> tuple[Text, Text | None]:
    """The training text and the held-out one, their ledgers shown and saved."""
    data, options = config[TrainingData], config[TextOptions]
    learned, skipped = read_documents(data.data, options)
    held: Sequence[documents.Document] = ()
    held_skipped: Sequence[documents.Skipped] = ()
    if data.test_data:
        held, held_skipped = read_documents(data.test_data, options)
    elif data.test_fraction > 0 and len(learned) > 1:
        learned, held = documents.split(learned, fraction=data.test_fraction, seed=config[TrainOptions].seed)
    text = to_text(learned, skipped, options, tokenizer, report)
    if text.ledger.trained == 0:
        raise UsageError("The data hold no token to learn.", hint="Look at them with `octavo data`.")
    show_ledger(text.ledger, "Training text", report)
    ledgers = {"train": text.ledger.to_dict()}
    held_out = None
    if held:
        held_out = to_text(held, held_skipped, options, tokenizer, report)
        show_ledger(held_out.ledger, "Held-out text", report)
        ledgers["test"] = held_out.ledger.to_dict()
    if held_out is None or held_out.ledger.trained == 0:
        held_out = None
        report.warn("Nothing is held out, so nothing will show whether the tuned model is better: give --test-data.")
    write_json_atomically(config[RunOptions].out / "ledger.json", ledgers)
    return text, held_out


def _identity(run: Run) -> dict[str, Any]:
    """What must be the same for a run to go on. Steps, epochs and learning rate may change."""
    training, lora = run.config[TrainOptions], run.config[LoraOptions]
    digest = hashlib.sha256()
    for row in run.train.rows:
        digest.update(row.ids.tobytes() + row.labels.tobytes() + row.document.tobytes())
    return {
        "model": fingerprint(run.source),
        "scheme": run.scheme.name,
        "dtype": str(run.hardware.dtype),
        "data": digest.hexdigest(),
        "seq_len": run.config[TextOptions].seq_len,
        "batch": training.batch,
        "accumulate": training.accumulate,
        "seed": training.seed,
        "optimizer": training.optimizer,
        **{name: getattr(lora, name) for name in LoraOptions.model_fields},
    }


def _resume(run: Run) -> bool:
    """Takes up the newest valid checkpoint if asked to; whether there was one."""
    options = run.config[RunOptions]
    if not options.resume:
        return False
    found = checkpoint.newest(run.folder / "checkpoints", warn=run.report.warn)
    if found is None:
        run.report.warn(f"{run.folder} holds no checkpoint: starting from the beginning.")
        run.report.resume_from(-1)
        return False
    checkpoint.check_identity(
        found.state["identity"], _identity(run), force=options.force, warn=run.report.warn
    )
    for name, parameter in run.trainer.parameters.items():
        stored = found.tensors["adapter"].get(name)
        if stored is None or stored.shape != parameter.shape:
            raise CheckpointError(f"The checkpoint {found.path} lacks {name} in this shape.")
        parameter.data.copy_(stored)
    run.trainer.optimizer.load_state(found.tensors["optimizer"])
    run.trainer.scaler.load_state(found.state["scaler"])
    run.done = found.step
    run.position = Position(**found.state["position"])
    run.base_rows, run.best = found.state["base_rows"], found.state["best"]
    run.probe = found.tensors.get("probe", {}).get("logits")
    run.report.resume_from(found.step)
    run.report.say(f"Going on after step {found.step:,} from {found.path}.")
    return True


def _save_checkpoint(run: Run) -> None:
    """Everything that the run needs to go on from here."""
    options = run.config[RunOptions]
    tensors: dict[str, dict[str, Tensor]] = {
        "adapter": {name: parameter.detach().cpu() for name, parameter in run.trainer.parameters.items()},
        "optimizer": run.trainer.optimizer.state(),
    }
    if run.probe is not None:
        tensors["probe"] = {"logits": run.probe}
    state = {
        "identity": _identity(run),
        "position": {"epoch": run.position.epoch, "index": run.position.index},
        "scaler": run.trainer.scaler.state(),
        "base_rows": run.base_rows,
        "best": run.best,
        "config": run.config.to_yaml(),
        "versions": _versions(),
    }
    checkpoint.save(
        run.folder / "checkpoints", run.done, tensors=tensors, state=state, keep=options.keep_checkpoints
    )


def _measure_base(run: Run, *, compare_full: bool) -> None:
    """The held-out table and samples before training; while pairs are new the model is the base."""
    report = run.report
    report.event("hardware", device=str(run.hardware.device), name=run.hardware.name, dtype=str(run.hardware.dtype))
    report.event("versions", **_versions())
    run.base_rows = []
    if run.test_rows and compare_full and run.scheme.name != "none":
        plain = scheme_named("none")
        model = load_model(run.source, plain, full_precision(run.hardware), report)
        run.base_rows.append(_score_row(run, "base", plain, _score(run, model, "Measuring the base")))
    if run.test_rows:
        name = "quantised" if run.scheme.name != "none" else "base"
        run.base_rows.append(
            _score_row(run, name, run.scheme, _score(run, run.model, f"Measuring the {name} base"))
        )
    _sample(run, which="base", step=0)


def _score(run: Run, model: Model, label: str) -> Score:
    batch = run.config[TrainOptions].batch
    return score_rows(model, run.test_rows, run.tokenizer, batch=batch, label=label, report=run.report)


def _score_row(run: Run, name: str, scheme: Scheme, result: Score) -> dict[str, Any]:
    return score_row(name, scheme, run.folder / "adapter" if name == "tuned" else None, result)


def _train(run: Run) -> None:
    """The loop with all that happens around it: metrics, held-out losses, samples, checkpoints, stopping."""
    options, training = run.config[RunOptions], run.config[TrainOptions]
    epochs = None if training.steps is not None else training.epochs
    stream = batches(
        run.train.rows, batch_size=training.batch, seed=training.seed, start=run.position, epochs=epochs
    )
    every = options.eval_every or math.ceil(run.total / HELD_OUT_POINTS)
    stop_at = min(run.total, run.done + (options.stop_after or run.total))
    with _stop_signal() as asked_to_stop, run.report.progress(run.total, "Training", done=run.done) as bar:
        for step in train(run.trainer, stream, done=run.done):
            run.done, run.position, run.last = step.number, step.following, step
            bar.advance(loss=step.loss, tokens_per_second=round(step.tokens_per_second))
            _record(run, step)
            if step.number % every == 0 or step.number == run.total:
                _hold_out(run)
            if options.sample_every and step.number % options.sample_every == 0 and step.number < run.total:
                _sample(run, which="training", step=step.number)
            stopping = bool(asked_to_stop) or step.number >= stop_at
            due = options.checkpoint_every and step.number % options.checkpoint_every == 0
            if due or stopping or step.number == run.total:
                _save_checkpoint(run)
            if stopping:
                break
    if run.done < run.total:
        again = f"octavo finetune --resume --out {run.folder}"
        if options.stop_after is None:
            raise TrainingError(f"Stopped after step {run.done:,}; the work is saved.", hint=f"Go on with: {again}")
        run.report.say(f"Stopped after step {run.done:,} as asked. Go on with: {again}")


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
        run.report.warn(
            f"Step {step.number}: gradients overflowed float16, update left out, loss scale "
            f"{run.trainer.scaler.scale:g}."
        )


def _hold_out(run: Run) -> None:
    """A held-out loss; the adapter goes to its folder if it is the best so far."""
    if not run.test_rows:
        return
    result = _score(run, run.model, f"Held-out loss after step {run.done}")
    run.report.event("heldout", step=run.done, loss=result.loss, perplexity=result.perplexity)
    best = run.config[RunOptions].keep == "best"
    if best and (run.best is None or result.loss < run.best["loss"]):
        run.best = {"step": run.done, "loss": result.loss}
        _save_adapter(run)


def _save_adapter(run: Run) -> None:
    base = run.config[ModelOptions].model
    origin = {
        "version": __version__,
        "base": {"name": base, "sha256": fingerprint(run.source), "scheme": run.scheme.name},
        "step": run.done,
    }
    card = model_card(run.config, base=base, base_sha256=origin["base"]["sha256"], step=run.done)
    adapter.save(run.folder / "adapter", run.model, run.plan, base=base, origin=origin, card=card)
    run.probe = _probe(run)


def _probe(run: Run) -> Tensor:
    """(T, V) logits on the first tokens of the training text."""
    ids = torch.from_numpy(run.train.rows[0].ids[:PROBE_TOKENS].astype("int64"))[None]
    was_training = run.model.training
    run.model.eval()
    with torch.no_grad():
        logits: Tensor = run.model(ids.to(run.hardware.device))[0]
    run.model.train(was_training)
    return logits.float().cpu()


def _finish(run: Run) -> dict[str, Any]:
    """Saves, reads back and compares, measures the tuned model, writes the page, and says where everything lies."""
    report, folder = run.report, run.folder
    finished = run.done >= run.total
    if run.best is None and finished:
        _save_adapter(run)
        _save_checkpoint(run)
    rows = list(run.base_rows or [])
    if finished:
        _read_back(run)
        if run.test_rows:
            rows.append(_score_row(run, "tuned", run.scheme, _score(run, run.model, "Measuring the tuned model")))
        if run.best is not None and run.best["step"] != run.done:
            report.say(f"The adapter of step {run.best['step']:,} was the best on the held-out text and is kept.")
        _sample(run, which="tuned", step=run.done)
        if rows:
            report.event("evaluation", step=run.done, rows=rows)
            show_scores(rows, report)
    memory = peak_memory_bytes(run.hardware.device)
    report.event("memory", step=run.done, peak_bytes=memory)
    written = page.write(folder)
    if finished:
        report.say(f"Peak memory: {memory / 2**30:.2f} GiB.")
        report.say(f"Adapter: {folder / 'adapter'}   metrics: {folder / 'metrics.jsonl'}   report: {written}")
    return {
        "out": str(folder),
        "adapter": str(folder / "adapter") if finished else None,
        "report": str(written),
        "steps": run.done,
        "loss": run.last.loss if run.last else None,
        "best_step": run.best["step"] if run.best else None,
        "rows": rows,
        "peak_memory_bytes": memory,
    }


def _read_back(run: Run) -> None:
    """Puts the saved adapter on the model in place of the trained one; AdapterError unless the logits agree."""
    adapter.apply_(run.model, adapter.read(run.folder / "adapter"))
    if run.probe is None:
        return
    difference = float((_probe(run) - run.probe).abs().max())
    if not difference <= 1e-4 * float(run.probe.abs().max()):
        raise AdapterError(
            f"The adapter in {run.folder / 'adapter'} gives other logits than the trained model "
            f"(difference {difference:.3g}).",
            hint="The newest checkpoint is whole: go on from it with --resume.",
        )


def _sample(run: Run, *, which: str, step: int) -> None:
    """Continues each prompt and records it."""
    options = run.config[RunOptions]
    sampling = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=options.sample_tokens, seed=0)
    for prompt in options.sample_prompt or _first_words(run):
        ids = encode_prompt(prompt, run.tokenizer)
        text = complete(run.model, run.tokenizer, ids, sampling, ends=end_ids(run.source)).text
        run.report.event("sample", step=step, prompt=prompt, text=text, which=which)
        run.report.say(f"\n{which} model, {prompt!r} goes on:\n{text}\n")


def _first_words(run: Run) -> list[str]:
    """A prompt where none is given: how the first held-out text begins."""
    first = (run.test or run.train).documents[0]
    text = first.prompt or " ".join(first.text.split()[:12])
    return [text] if text else []


def _versions() -> dict[str, str]:
    import bitsandbytes
    import transformers

    return {
        "octavo": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bitsandbytes": bitsandbytes.__version__,
    }


@contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM puts itself into, so that the step at hand is finished and saved.

    A second signal ends the process at once, as without octavo.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, on_signal)
    except ValueError:  # not in the main thread: signals are somebody else's business
        before.clear()
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
