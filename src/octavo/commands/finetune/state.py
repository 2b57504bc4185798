"""What a run works with and what it has found, and how both go into a checkpoint and come back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octavo._version import __version__
from octavo.adapters import AdapterPlan
from octavo.commands.data import Text
from octavo.commands.plan import FittedPlan, wants_eight
from octavo.config import Config, LoraOptions, MemoryOptions, RunOptions, TextOptions, TrainOptions
from octavo.config.settings import parse_settings
from octavo.data.loader import Position
from octavo.data.packing import Row
from octavo.errors import CheckpointError
from octavo.hardware import Hardware
from octavo.models import Model
from octavo.ops.quantize import Scheme
from octavo.reporting import Report
from octavo.store import checkpoint
from octavo.store.sources import Source, fingerprint
from octavo.train.loop import Step, Trainer
from octavo.train.step import PlannedStep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class Found:
    """What a run has found so far; all of it is in its checkpoints."""

    done: int = 0  # optimizer steps
    position: Position = field(default_factory=Position)  # where the data go on
    base_rows: list[dict[str, Any]] = field(default_factory=list)  # the perplexity table before training
    best: dict[str, Any] | None = None  # {"step", "loss"} of the adapter in the folder
    best_adapter: Mapping[str, Tensor] | None = None  # its trained parameters, float32, on the CPU
    probe: Tensor | None = None  # (T, V) logits of the model whose adapter is in the folder
    exact_products: list[str] | None = None  # those that are not in 8 bits; None: nothing is
    outliers: dict[str, list[int]] = field(default_factory=dict)  # of products in 8 bits: inputs that stay out of that
    last: Step | None = None  # of this call


@dataclass(frozen=True)
class Run:
    """What a run works with."""

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
    fit: FittedPlan
    micro_step: PlannedStep
    base_sha256: str
    found: Found

    @property
    def folder(self) -> Path:
        return self.config[RunOptions].out

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def adapter_folder(self) -> Path:
        return self.folder / "adapter"

    @property
    def total(self) -> int:
        return self.trainer.schedule.total

    @property
    def use_8bit(self) -> bool:
        """Whether products are computed in 8 bits, as far as they may be."""
        return wants_eight(self.config[MemoryOptions], self.hardware)

    @property
    def test_rows(self) -> list[Row]:
        return self.test.measurable(self.config[RunOptions].eval_rows) if self.test else []

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on. Steps, epochs and learning rate may change."""
        training, lora = self.config[TrainOptions], self.config[LoraOptions]
        return {
            "model": self.base_sha256,
            "scheme": self.scheme.name,
            "dtype": str(self.hardware.dtype),
            "matmul": "8bit" if self.use_8bit else "exact",
            "data": _digest(self.train.rows),
            "test_data": _digest(self.test_rows),  # else the table and the best loss would compare two texts
            "seq_len": self.config[TextOptions].seq_len,
            "batch": training.batch,
            "accumulate": training.accumulate,
            "seed": training.seed,
            "optimizer": training.optimizer,
            **{name: getattr(lora, name) for name in LoraOptions.model_fields},
        }


def save_checkpoint(run: Run) -> None:
    """Everything that the run needs to go on from here."""
    tensors, state = state_of(run)
    keep = run.config[RunOptions].keep_checkpoints
    checkpoint.save(run.checkpoints, run.found.done, tensors=tensors, state=state, keep=keep, warn=run.report.warn)


def state_of(run: Run) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors, the rest) of a checkpoint."""
    found, parameters = run.found, run.trainer.parameters
    tensors: dict[str, dict[str, Tensor]] = {
        "adapter": {name: parameter.detach().cpu() for name, parameter in parameters.items()},
        "optimizer": run.trainer.optimizer.state(),
    }
    if found.probe is not None:
        tensors["probe"] = {"logits": found.probe}
    if found.best is not None and found.best_adapter is not None and found.best["step"] != found.done:
        tensors["best"] = dict(found.best_adapter)  # so that damage to the adapter's folder is no dead end
    state = {
        "identity": run.identity,
        "position": {"epoch": found.position.epoch, "index": found.position.index},
        "scaler": run.trainer.scaler.state(),
        "base_rows": found.base_rows,
        "best": found.best,
        "exact_products": found.exact_products,
        "outliers": found.outliers,
        "config": run.config.to_yaml(),
        "versions": versions(),
    }
    return tensors, state


def resume(run: Run) -> bool:
    """Takes up the newest valid checkpoint; False, with a warning, if there is none.

    CheckpointError if it belongs to another model, data or settings, unless forced, or does not fit all the same.
    """
    saved = checkpoint.newest(run.checkpoints, warn=run.report.warn)
    if saved is None:
        run.report.resume_from(-1)
        run.report.warn(f"{run.folder} holds no checkpoint: starting from the beginning.")
        return False
    force = run.config[RunOptions].force
    checkpoint.check_identity(saved.state["identity"], run.identity, force=force, warn=run.report.warn)
    for name, parameter in run.trainer.parameters.items():
        stored = saved.tensors["adapter"].get(name)
        if stored is None or stored.shape != parameter.shape:
            raise CheckpointError(f"The checkpoint {saved.path} lacks {name} in this shape.")
        parameter.data.copy_(stored)
    run.trainer.optimizer.load_state(saved.tensors["optimizer"])
    run.trainer.scaler.load_state(saved.state["scaler"])
    _take_up(run, saved)
    run.report.resume_from(saved.step)
    run.report.say(f"Going on after step {saved.step:,} from {saved.path}.")
    _say_changes(run, saved.state)
    return True


def _take_up(run: Run, saved: checkpoint.Checkpoint) -> None:
    found = run.found
    found.done, found.position = saved.step, Position(**saved.state["position"])
    found.base_rows, found.best = saved.state["base_rows"], saved.state["best"]
    found.exact_products, found.outliers = saved.state.get("exact_products"), saved.state.get("outliers", {})
    found.probe = saved.tensors.get("probe", {}).get("logits")
    if run.config[RunOptions].keep == "last":
        found.best = None
    if found.best is not None:
        found.best_adapter = saved.tensors["adapter" if found.best["step"] == saved.step else "best"]


def _say_changes(run: Run, state: dict[str, Any]) -> None:
    """Steps, epochs and learning rates may change; a schedule that does is told with what it is now."""
    saved = parse_settings(state["config"], "The configuration in the checkpoint")
    options, schedule, done = run.config[TrainOptions], run.trainer.schedule, run.found.done
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


def versions() -> dict[str, str]:
    """Of octavo and of what its numbers depend on."""
    import transformers

    return {
        "octavo": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.ids.tobytes() + row.labels.tobytes() + row.document.tobytes())
    return digest.hexdigest()


def fingerprint_of(source: Source, report: Report) -> str:
    """The identity of the base weights; reading them through takes a while for a folder without a manifest."""
    with report.progress(len(source.files), "Hashing the base weights") as bar:
        sha256 = fingerprint(source)
        bar.advance(len(source.files))
    return sha256
