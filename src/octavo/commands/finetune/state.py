"""A run, its state, and how both are stored in checkpoints and restored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octavo import adapters
from octavo._version import __version__
from octavo.adapters import AdapterPlan
from octavo.commands.data import Text
from octavo.commands.finetune.model_card import model_card
from octavo.commands.plan import FittedPlan, wants_8bit
from octavo.config import Config, LoraOptions, MemoryOptions, ModelOptions, RunOptions, TextOptions, TrainOptions
from octavo.config.settings import parse_settings
from octavo.data.loader import Position
from octavo.data.packing import Row
from octavo.errors import AdapterError, CheckpointError
from octavo.hardware import Hardware
from octavo.models import Decoder, module_names
from octavo.ops.quantize import Scheme
from octavo.reporting import Report
from octavo.runs import checkpoint, events
from octavo.runs.checkpoint_folder import STATE
from octavo.runs.events import ScoreRow
from octavo.runs.folder import RunFolder
from octavo.store import peft
from octavo.store.peft import Adapter
from octavo.store.sources import Source, fingerprint
from octavo.train.loop import Step, Trainer
from octavo.train.precision import Precision
from octavo.train.step import PlannedStep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STATE_KEYS = ("identity", "position", "scaler", "base_rows", "best", "precision", "config")  # that resuming reads


@dataclass
class RunState:
    """What changes during a run; everything except `last` is in its checkpoints."""

    done: int = 0  # optimizer steps
    position: Position = field(default_factory=Position)  # of the next batch in the data
    base_rows: list[ScoreRow] = field(default_factory=list)  # the perplexity table before training
    best: dict[str, Any] | None = None  # {"step", "loss"} of the adapter in the folder
    best_adapter: Adapter | None = None  # a copy of it on the CPU
    reference_logits: Tensor | None = None  # (T, V) of the model with the adapter in the folder
    precision: Precision | None = None  # of the matmuls, if they may be in 8 bits
    last: Step | None = None  # the last step of this call


@dataclass(frozen=True)
class Run:
    """A prepared run: its configuration, text, model, trainer and state."""

    config: Config
    report: Report
    hardware: Hardware
    source: Source
    scheme: Scheme
    tokenizer: PreTrainedTokenizerFast
    train: Text
    test: Text | None
    model: Decoder
    plan: AdapterPlan
    trainer: Trainer
    fit: FittedPlan
    micro_step: PlannedStep
    base_sha256: str
    state: RunState

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config[RunOptions].out)

    @property
    def total(self) -> int:
        return self.trainer.schedule.total

    @property
    def use_8bit(self) -> bool:
        """Whether layers may use 8-bit matmuls."""
        return wants_8bit(self.config[MemoryOptions], self.hardware)

    @property
    def test_rows(self) -> list[Row]:
        return self.test.measurable(self.config[RunOptions].eval_rows) if self.test else []

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The settings that must be equal to resume a run. Steps, epochs and learning rate may change."""
        training, lora = self.config[TrainOptions], self.config[LoraOptions]
        return {
            "model": self.base_sha256,
            "scheme": self.scheme.name,
            "dtype": str(self.hardware.dtype),
            "matmul": "8bit" if self.use_8bit else "exact",
            "data": _digest(self.train.rows),
            "test_data": _digest(self.test_rows),  # so that the table and the best loss compare the same text
            "seq_len": self.config[TextOptions].seq_len,
            "batch_size": training.batch_size,
            "seed": training.seed,
            "optimizer": training.optimizer,
            **{name: getattr(lora, name) for name in LoraOptions.model_fields},
        }


def save_checkpoint(run: Run) -> None:
    """Writes a checkpoint with all state that is needed to resume the run."""
    keep = run.config[RunOptions].keep_checkpoints
    checkpoint.save(run.folder.checkpoints, run.state.done, contents_of(run), keep=keep, warn=run.report.warn)


def contents_of(run: Run) -> checkpoint.Contents:
    """All state that is needed to resume the run."""
    state = run.state
    adapters_ = {"adapter": adapter_files(run, trained_adapter(run))}
    if state.best is not None and state.best_adapter is not None and state.best["step"] != state.done:
        adapters_["best"] = adapter_files(run, state.best_adapter)  # to restore a damaged adapter folder
    tensors = {"optimizer": run.trainer.optimizer.state()}
    if state.reference_logits is not None:
        tensors["probe"] = {"logits": state.reference_logits}
    values = {
        "identity": run.identity,
        "position": {"epoch": state.position.epoch, "index": state.position.index},
        "scaler": run.trainer.scaler.state(),
        "base_rows": [row.to_dict() for row in state.base_rows],
        "best": state.best,
        "precision": state.precision.to_json() if state.precision is not None else None,
        "config": run.config.to_yaml(),
        "versions": asdict(versions()),
    }
    return checkpoint.Contents(tensors, values, adapters_)


def trained_adapter(run: Run) -> Adapter:
    """The adapter of the step that is done. Nothing is copied."""
    origin = {
        "version": __version__,
        "base": {"name": run.config[ModelOptions].model, "sha256": run.base_sha256, "scheme": run.scheme.name},
        "step": run.state.done,
    }
    return adapters.collect(run.model, run.plan.spec, origin=origin)


def adapter_files(run: Run, adapter: Adapter) -> Callable[[Path], None]:
    """A function that writes the files of an adapter of this run into an empty folder."""
    base, step = run.config[ModelOptions].model, adapter.origin["step"]
    modules = module_names(run.model.config)
    readme = model_card(run.config, base=base, base_sha256=run.base_sha256, step=step)
    return partial(peft.fill, adapter=adapter, modules=modules, biases=run.plan.biases, base=base, readme=readme)


def resume(run: Run) -> bool:
    """Restores the newest valid checkpoint; False, with a warning, if there is none.

    CheckpointError if its model, data or settings differ, unless --force is given, and if its tensors do not fit.
    """
    saved = checkpoint.newest(run.folder.checkpoints, warn=run.report.warn)
    if saved is None:
        events.drop_events_after(run.report, -1)
        run.report.warn(f"{run.folder.path} has no checkpoint: starting from the beginning.")
        return False
    _check_complete(saved)
    force = run.config[RunOptions].force
    # A run of an earlier version had no option that it does not name: it was trained as with the default.
    identity = {**LoraOptions().model_dump(), **saved.state["identity"]}
    checkpoint.check_identity(identity, run.identity, force=force, warn=run.report.warn)
    try:
        adapters.restore_(run.model, saved.adapter())
    except AdapterError as error:
        raise CheckpointError(f"The checkpoint {saved.path} does not fit. {error.message}", hint=error.hint) from error
    run.trainer.optimizer.load_state(saved.tensors["optimizer"])
    run.trainer.scaler.load_state(saved.state["scaler"])
    _restore_state(run, saved)
    events.drop_events_after(run.report, saved.step)
    run.report.say(f"Resuming after step {saved.step:,} from {saved.path}.")
    _report_changes(run, saved.state)
    return True


def _check_complete(saved: checkpoint.Checkpoint) -> None:
    """CheckpointError that names what the checkpoint lacks of `contents_of`, although its manifest lists the rest."""
    missing = [f"{STATE}: {key}" for key in STATE_KEYS if key not in saved.state]
    best = saved.state.get("best")
    files = ["optimizer"] + ["probe"] * (best is not None)
    missing += [f"{name}.safetensors" for name in files if name not in saved.tensors]
    folders = ["adapter"] + ["best"] * (best is not None and best["step"] != saved.step)
    missing += [name for name in folders if not (saved.path / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"The checkpoint {saved.path} lacks {', '.join(missing)}.",
            hint="Delete its folder to resume from the checkpoint before it, or start again with another --out.",
        )


def _restore_state(run: Run, saved: checkpoint.Checkpoint) -> None:
    state = run.state
    state.done, state.position = saved.step, Position(**saved.state["position"])
    state.base_rows = [ScoreRow.read(row) for row in saved.state["base_rows"]]
    state.best = saved.state["best"]
    precision = saved.state["precision"]
    state.precision = Precision.from_json(precision) if precision is not None else None
    state.reference_logits = saved.tensors.get("probe", {}).get("logits")
    if run.config[RunOptions].keep == "last":
        state.best = None
    if state.best is not None:
        state.best_adapter = saved.adapter("adapter" if state.best["step"] == saved.step else "best")


def _report_changes(run: Run, state: dict[str, Any]) -> None:
    """Warns if steps, epochs or learning rates differ from the checkpoint, with the schedule that is used now."""
    saved = parse_settings(state["config"], "The configuration in the checkpoint")
    options, schedule, done = run.config[TrainOptions], run.trainer.schedule, run.state.done
    changes = [
        f"--{name.replace('_', '-')} {saved.get(name)} is now {getattr(options, name)}"
        for name in TrainOptions.model_fields
        if name not in run.identity and saved.get(name) != getattr(options, name)
    ]
    if not changes:
        return
    now = f"steps {done + 1:,} to {run.total:,} have learning rates from {schedule.at(done + 1):.3g}"
    now += f" to {schedule.at(run.total):.3g} ({schedule.kind})" if run.total > done else ""
    if run.total <= done:
        now = f"all {run.total:,} steps are done"
    run.report.warn(f"The training settings differ from the checkpoint's: {', '.join(changes)}; {now}.")


def versions() -> events.Versions:
    """The versions of octavo and of the libraries that its results depend on."""
    import transformers

    return events.Versions(__version__, str(torch.__version__), transformers.__version__)


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.ids.tobytes() + row.labels.tobytes() + row.piece.tobytes())
    return digest.hexdigest()


def fingerprint_of(source: Source, report: Report) -> str:
    """The identity of the base weights. Without a manifest all weight files are read, which takes a while."""
    with report.progress(len(source.files), "Hashing the base weights") as bar:
        sha256 = fingerprint(source)
        bar.advance(len(source.files))
    return sha256
