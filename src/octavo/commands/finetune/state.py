"""A run, its state, and how both are stored in checkpoints and restored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from octavo import adapters
from octavo._version import __version__
from octavo.adapters import AdapterPlan
from octavo.bounded_json import JsonError, integer, number, shown
from octavo.commands.backends import wants_8bit
from octavo.commands.data import Text
from octavo.commands.finetune.early_stop import Watch
from octavo.commands.model_card import About, model_card
from octavo.commands.run_plan import FittedPlan
from octavo.config import Config, LoraOptions, MemoryOptions, ModelOptions, RunOptions, TextOptions, TrainOptions
from octavo.config.settings import parse_settings
from octavo.data.loader import Position
from octavo.data.packing import Row
from octavo.errors import AdapterError, CheckpointError
from octavo.hardware import Hardware
from octavo.metrics import Score
from octavo.models import Decoder, module_names
from octavo.ops.scheme import Scheme
from octavo.reporting import Report
from octavo.runs import checkpoint, events
from octavo.runs.checkpoint_folder import DELETE, STATE
from octavo.runs.events import ScoreRow
from octavo.runs.folder import RunFolder
from octavo.store import peft
from octavo.store.base_names import hub_id, licence_of
from octavo.store.peft import ORIGIN, Adapter
from octavo.store.sources import Source, fingerprint
from octavo.train.loop import Step, Trainer
from octavo.train.precision import Precision, layers
from octavo.train.step import PlannedStep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

N = TypeVar("N", int, float)

# What resuming reads of state.json, and the types. `step` is compared with the manifest's, where the
# checkpoint has it.
STATE_TYPES: dict[str, tuple[type, ...]] = {
    "identity": (dict,), "position": (dict,), "scaler": (dict,), "base_rows": (list,), "best": (dict, NoneType),
    "precision": (dict, NoneType), "config": (str,),
}  # fmt: skip
MAX_COUNT = 2**53  # of steps, epochs, batches and channels; a float is exact up to it


@dataclass
class RunState:
    """What changes during a run; everything except `last` and `kept_score` is in its checkpoints."""

    done: int = 0  # optimizer steps
    position: Position = field(default_factory=Position)  # of the next batch in the data
    base_rows: list[ScoreRow] = field(default_factory=list)  # the perplexity table before training
    base_losses: dict[str, Tensor] | None = None  # before training: nats and tokens of each unit of metrics.Score
    base_losses_plain: dict[str, Tensor] | None = None  # with --init-adapter those of the base without it
    initial: dict[str, Any] | None = None  # {"path", "sha256", "step"} of the adapter of --init-adapter
    # Of held-out evaluations: the nats of each unit at the "newest" one and at that with the "lowest" loss, the
    # "passes" of the former and the step of the latter.
    curve: dict[str, Tensor] | None = None
    watch: Watch | None = None  # of --early-stop
    stopped: dict[str, Any] | None = None  # {"step", "total", "reason"} after --early-stop has ended the run
    best: dict[str, Any] | None = None  # {"step", "loss"} of the adapter in the folder
    best_adapter: Adapter | None = None  # a copy of it on the CPU
    reference_logits: Tensor | None = None  # (T, V) of the model with the adapter in the folder
    probes: dict[str, Tensor] | None = None  # before training: commands.probes.Measured
    precision: Precision | None = None  # of the matmuls, if they may be in 8 bits
    last: Step | None = None  # the last step of this call
    # (step, score on the held-out text) of the adapter in the folder, if this call measured it.
    kept_score: tuple[int, Score] | None = None


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
    initial: Adapter | None = None  # the adapter of --init-adapter; a resumed run has it in its checkpoint

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config[RunOptions].out)

    @property
    def total(self) -> int:
        return self.trainer.schedule.total

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or --early-stop has ended the run."""
        return self.state.done >= self.total or self.state.stopped is not None

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
    if state.base_losses is not None:
        tensors["base_losses"] = state.base_losses
    if state.base_losses_plain is not None:
        tensors["base_losses_plain"] = state.base_losses_plain
    if state.watch is not None:
        tensors["early_stop"] = state.watch.tensors()
    if state.curve is not None:
        tensors["curve"] = state.curve
    if state.probes is not None:
        tensors["probes"] = state.probes
    values = {
        "step": state.done,
        "identity": run.identity,
        "position": {"epoch": state.position.epoch, "index": state.position.index},
        "scaler": run.trainer.scaler.state(),
        "base_rows": [row.to_dict() for row in state.base_rows],
        "best": state.best,
        **({} if state.initial is None else {"initial": state.initial}),
        **({} if state.stopped is None else {"stopped": state.stopped}),
        "precision": state.precision.to_json() if state.precision is not None else None,
        "forward_only": state.precision is not None and state.precision.forward_only,
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
    if run.state.initial is not None:
        origin["initial"] = run.state.initial
    return adapters.collect(run.model, run.plan.spec, origin=origin)


def adapter_files(run: Run, adapter: Adapter) -> Callable[[Path], None]:
    """A function that writes the files of an adapter of this run into an empty folder."""
    base, step = hub_id(run.config[ModelOptions].model), adapter.origin["step"]
    modules = module_names(run.model.config)
    settings = parse_settings(run.config.to_yaml(), "The settings of the run")
    # Without results, which a finished run adds (finetune/folder.py).
    readme = model_card(About(settings, base, run.base_sha256, step, licence_of(run.config[ModelOptions].model)))
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
    try:
        run.trainer.optimizer.load_state(saved.tensors["optimizer"])
    except CheckpointError as error:
        where = saved.path / "optimizer.safetensors"
        raise CheckpointError(f"{where}: {error.message}", hint=error.hint or DELETE) from error
    _restore_state(run, saved)
    events.drop_events_after(run.report, saved.step)
    run.report.say(f"Resuming after step {saved.step:,} from {saved.path}.")
    _report_changes(run, saved.state)
    return True


def _check_complete(saved: checkpoint.Checkpoint) -> None:
    """CheckpointError that names what the checkpoint lacks of `contents_of`, although its manifest lists the rest."""
    missing = [f"{STATE}: {key}" for key in STATE_TYPES if key not in saved.state]
    best = saved.state.get("best")
    files = ["optimizer"] + ["probe"] * (best is not None)
    missing += [f"{name}.safetensors" for name in files if name not in saved.tensors]
    if best is not None and "logits" not in saved.tensors.get("probe", {"logits"}):
        missing.append("probe.safetensors: logits")
    folders = ["adapter"] + ["best"] * (isinstance(best, dict) and best.get("step") != saved.step)
    missing += [name for name in folders if not (saved.path / name).is_dir()]
    if missing:
        raise CheckpointError(f"The checkpoint {saved.path} lacks {', '.join(missing)}.", hint=DELETE)
    for key, kinds in STATE_TYPES.items():
        if type(saved.state[key]) not in kinds:
            raise _wrong_state(saved, f"{key} is {shown(saved.state[key])}")
    if (step := saved.state.get("step", saved.step)) != saved.step:
        raise _wrong_state(saved, f"step is {shown(step)}; the manifest's is {saved.step:,}")


def _wrong_state(saved: checkpoint.Checkpoint, problem: str) -> CheckpointError:
    return CheckpointError(f"{saved.path / STATE} is not what octavo writes: {problem}.", hint=DELETE)


def _restore_state(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Restores what state.json has. CheckpointError that names a field of another type or value."""
    state = run.state
    try:
        position, scaler = saved.state["position"], saved.state["scaler"]
        state.position = Position(*(_count(position, "position", key) for key in ("epoch", "index")))
        if saved.state["identity"].get("dtype") == str(run.hardware.dtype):  # with --force it may be another
            scale = _field(number, scaler, "scaler", "scale", least=0, most=MAX_COUNT)
            run.trainer.scaler.load_state({"scale": scale, "good_steps": _count(scaler, "scaler", "good_steps")})
        state.best = saved.state["best"]
        if state.best is not None:
            _count(state.best, "best", "step")
            _field(number, state.best, "best", "loss", least=0, most=float("inf"))
        state.precision = _precision(saved.state, [name for name, _ in layers(run.model)])
    except JsonError as error:
        raise _wrong_state(saved, str(error)) from error
    try:
        state.base_rows = [ScoreRow.read(row) for row in saved.state["base_rows"]]
    except (ValueError, TypeError) as error:
        raise _wrong_state(saved, f"base_rows: {error}") from error
    state.done = saved.step
    state.reference_logits = saved.tensors.get("probe", {}).get("logits")
    if {"newest", "lowest", "passes", "lowest_step"} == (curve := saved.tensors.get("curve", {})).keys():
        state.curve = curve
    if {"nats", "tokens"} <= (base_losses := saved.tensors.get("base_losses", {})).keys():
        state.base_losses = base_losses  # a run of an earlier version has none
    if {"nats", "tokens"} <= (plain := saved.tensors.get("base_losses_plain", {})).keys():
        state.base_losses_plain = plain
    _restore_initial(run, saved)
    state.watch = Watch.read(saved.tensors.get("early_stop", {}))
    state.stopped = _stopped(saved)
    if {"general", "cloze", "samples"} == (probes := saved.tensors.get("probes", {})).keys():
        state.probes = probes
    if run.config[RunOptions].keep == "last":
        state.best = None
    if state.best is not None:
        name = "adapter" if state.best["step"] == saved.step else "best"
        state.best_adapter = saved.adapter(name)
        if (step := state.best_adapter.origin.get("step")) != state.best["step"]:
            raise CheckpointError(
                f"{saved.path / name / ORIGIN}: step is {shown(step)}; {STATE} has {state.best['step']:,} for the "
                "best adapter.",
                hint=DELETE,
            )


def _stopped(saved: checkpoint.Checkpoint) -> dict[str, Any] | None:
    """Where and why --early-stop ended the run."""
    stopped = saved.state.get("stopped")
    try:
        if stopped is not None:
            for key in ("step", "total"):
                _count(stopped, "stopped", key)
            stopped["reason"] = str(stopped.get("reason", ""))
    except JsonError as error:
        raise _wrong_state(saved, str(error)) from error
    return stopped


def _restore_initial(run: Run, saved: checkpoint.Checkpoint) -> None:
    """What the run began from. CheckpointError if --init-adapter names another adapter now."""
    run.state.initial = initial = saved.state.get("initial")
    if initial is not None and not isinstance(initial, dict):
        raise _wrong_state(saved, f"initial is {shown(initial)}")
    began, now = (initial or {}).get("path"), run.config[RunOptions].init_adapter
    if now is not None and began != str(now):
        raise CheckpointError(
            f"The run in {run.folder.path} began from {began or 'a new adapter'}, not from {now}.",
            hint="A run that is resumed goes on from its own checkpoint. For another start choose another --out.",
        )


def _field(read: Callable[..., N], source: Mapping[str, Any], name: str, key: str, **bounds: float) -> N:
    """A field of an object in state.json. JsonError that names both."""
    try:
        return read(source, key, **bounds)
    except JsonError as error:
        raise JsonError(f"{name}: {error}") from error


def _count(source: Mapping[str, Any], name: str, key: str) -> int:
    return _field(integer, source, name, key, least=0, most=MAX_COUNT)


def _precision(state: Mapping[str, Any], names: Collection[str]) -> Precision | None:
    """The precision of the matmuls of the layers `names`. JsonError if it is of other layers or types."""
    value, forward_only = state["precision"], state.get("forward_only", False)  # a run of an earlier version has none
    if not isinstance(forward_only, bool):
        raise JsonError(f"forward_only is {shown(forward_only)}; it must be true or false")
    for name, channels in (value or {}).items():
        if name not in names:
            raise JsonError(f"precision: there is no layer {shown(name)}")
        if not isinstance(channels, list) or not all(type(channel) is int and channel >= 0 for channel in channels):
            raise JsonError(f"precision: the channels of {name} are {shown(channels)}; they must be a list of integers")
    return None if value is None else Precision.from_json(value, forward_only=forward_only)


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
