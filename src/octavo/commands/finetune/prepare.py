"""Prepares a run from its configuration: reads and packs the text, loads the model, attaches the adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

from octavo import adapters
from octavo.commands.backends import configure_backends
from octavo.commands.data import Text
from octavo.commands.finetune.early_stop import check_early_stop
from octavo.commands.finetune.held_out_size import warn_if_small
from octavo.commands.finetune.initial import with_initial_adapter
from octavo.commands.finetune.length import with_length
from octavo.commands.finetune.samples import check_prompts
from octavo.commands.finetune.sides import read_sides
from octavo.commands.finetune.state import Run, RunState, fingerprint_of
from octavo.commands.loading import chosen_scheme, load_model, opened, with_fitting_rows
from octavo.commands.run_plan import FittedPlan, adapter_plan, check_run, fit
from octavo.config import (
    Config,
    LoraOptions,
    MemoryOptions,
    ModelOptions,
    RunOptions,
    TextOptions,
    TrainingData,
    TrainOptions,
)
from octavo.data.loader import batches_per_epoch
from octavo.data.packing import most_documents
from octavo.data.prompt import writes_date
from octavo.hardware import Hardware, memory_limit_bytes
from octavo.layers.lora import flatten_
from octavo.models import Decoder, parse
from octavo.ops.scheme import Scheme
from octavo.reporting import Report
from octavo.store.hub_datasets import is_dataset, pinned
from octavo.store.peft import Adapter
from octavo.store.sources import Source
from octavo.train.loop import Trainer
from octavo.train.optim import Adam, LossScaler, OptimizerSettings, Schedule
from octavo.train.step import PlannedStep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Inputs:
    """What a run begins with, before any weight is loaded."""

    config: Config
    hardware: Hardware
    source: Source
    scheme: Scheme
    tokenizer: PreTrainedTokenizerFast
    text: Text
    held_out: Text | None
    fitting: FittedPlan
    initial: Adapter | None


def read_inputs(config: Config, report: Report) -> Inputs:
    """Checks the options, reads and packs the text, and plans the memory, so that errors of these appear first."""
    options = config[ModelOptions]
    hardware, source = opened(options, report)
    config = with_fitting_rows(config, source, report)
    config, initial = with_initial_adapter(config, source, report)
    check_run(config, source)
    configure_backends(config[MemoryOptions], hardware, report)
    tokenizer, scheme = source.tokenizer(), chosen_scheme(options, source)
    if config[TextOptions].template_date is None and writes_date(tokenizer):
        # Otherwise the run could not be resumed on another day: its texts would differ.
        config = config.replace(template_date=date.today().isoformat())
    check_prompts(config[RunOptions], tokenizer, parse(source.config).context)
    config = _with_pinned_data(config, report)
    text, held_out = read_sides(config, tokenizer, report, context=parse(source.config).context)
    measured = held_out.measurable(config[RunOptions].eval_rows) if held_out else []
    check_early_stop(config, measured)
    warn_if_small(config, measured, report)
    rows = len(text.rows)
    config = with_length(config, rows, report)
    resumed, documents = config[RunOptions].resume, most_documents(text.rows)
    fitting = fit(config, source, scheme, hardware, rows=rows, documents=documents, resumed=resumed)
    config = _with_micro_batch_size(config, fitting.plan.rows, rows, report)
    return Inputs(config, hardware, source, scheme, tokenizer, text, held_out, fitting, initial)


def prepare(config: Config, report: Report) -> Run:
    """A run before its first step."""
    inputs = read_inputs(config, report)
    config, hardware, source, fitting = inputs.config, inputs.hardware, inputs.source, inputs.fitting
    base_sha256 = fingerprint_of(source, report)
    model = load_model(source, inputs.scheme, hardware, report)
    plan = adapter_plan(config[LoraOptions])
    adapters.create_(model, plan, seed=config[TrainOptions].seed)
    micro_step = planned_step(config, model, hardware, fitting, report)
    trainer = trainer_for(config[TrainOptions], model, hardware, micro_step, rows=len(inputs.text.rows))
    count = sum(parameter.numel() for parameter in trainer.parameters.values())
    steps = f"{trainer.schedule.total:,} step{'s' * (trainer.schedule.total != 1)}"
    report.say(f"Training {count:,} parameters in {len(trainer.parameters)} tensors for {steps}.")
    return Run(
        config, report, hardware, source, inputs.scheme, inputs.tokenizer, inputs.text, inputs.held_out, model, plan,
        trainer, fitting, micro_step, base_sha256, RunState(), inputs.initial,
    )  # fmt: skip


def _with_pinned_data(config: Config, report: Report) -> Config:
    """The settings with the commits of the hub's data sets, so that a resumed run reads the same data."""
    data = config[TrainingData]
    given = {"data": data.data, "test_data": data.test_data}
    changed = {name: pinned(paths, report) for name, paths in given.items() if any(map(is_dataset, paths))}
    return config.replace(**changed) if changed else config


def planned_step(
    config: Config, model: Decoder, hardware: Hardware, fitting: FittedPlan, report: Report
) -> PlannedStep:
    """Forward and backward with the memory plan, which is reported on a GPU."""
    options = config[MemoryOptions]
    if hardware.capabilities.is_gpu:
        report.say(fitting.describe())
    return PlannedStep(
        model,
        fitting.plan,
        graphs=hardware.capabilities.cuda_graphs and options.cuda_graphs,
        cheaper=fitting.cheaper,
        warn=report.warn,
        precision=fitting.planner.precision,
        objective=fitting.planner.objective,
        fused=options.fused,
        documents=fitting.planner.documents,
        limited=memory_limit_bytes(hardware.device) is not None,
    )


def _with_micro_batch_size(config: Config, planned: int, rows: int, report: Report) -> Config:
    """The settings with the micro-batch size of the plan; reports it if it is not that of the settings.

    `rows` are those of the data.
    """
    training, requested = config[TrainOptions], config[TrainOptions].micro_batch_size
    most = min(training.batch_size, rows)
    if requested is not None and planned != min(requested, most):
        dropout = config[LoraOptions].dropout > 0
        effect = "The dropout masks change, and the losses slightly" if dropout else "Results stay equal up to rounding"
        report.warn(
            f"Micro-batches of {requested} sequences do not fit into memory any more: they have {planned} now. "
            f"{effect}."
        )
    elif requested is not None and requested > most:
        report.say(f"A step has {most:,} sequences: --micro-batch-size {requested:,} is used as {most:,}.")
    return config.replace(micro_batch_size=planned)


def trainer_for(
    options: TrainOptions, model: Decoder, hardware: Hardware, micro_step: PlannedStep, *, rows: int
) -> Trainer:
    """The trainer of the parameters that are marked as trained, with a new optimizer."""
    parameters = adapters.trained(model)
    total = total_steps(options, rows)
    warmup = round(options.warmup if options.warmup >= 1 else options.warmup * total)
    settings = OptimizerSettings(options.optimizer, options.weight_decay, max_grad_norm=options.max_grad_norm)
    return Trainer(
        model=model,
        parameters=parameters,
        optimizer=Adam(flatten_(parameters), settings),
        schedule=Schedule(options.lr, total, warmup=warmup, kind=options.schedule, floor=options.lr_floor),
        scaler=LossScaler(hardware.dtype),
        micro_step=micro_step,
        seed=options.seed,
    )


def total_steps(options: TrainOptions, rows: int) -> int:
    """Optimizer steps of a run: --steps, else those of --epochs."""
    if options.steps is not None:
        return options.steps
    assert options.epochs is not None, "`with_length` sets it"
    return math.ceil(batches_per_epoch(rows, options.batch_size) * options.epochs)
