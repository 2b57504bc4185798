"""Plans the memory of a run before its weights are read, for `octavo finetune` and `octavo plan`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from octavo import adapters
from octavo.adapters import AdapterPlan
from octavo.commands.backends import backward_8bit, is_ampere, wants_8bit
from octavo.commands.loading import check_context
from octavo.config import (
    Config,
    LoraOptions,
    MemoryOptions,
    TextOptions,
    TrainOptions,
    size_in_bytes,
)
from octavo.errors import AdapterError, UsageError
from octavo.hardware import Hardware, Peak, free_memory_bytes, memory_limit_bytes, peak
from octavo.layers.context import Save
from octavo.layers.lora import LoraSpec, flatten_
from octavo.models import Decoder, build
from octavo.ops.quantize import SCHEMES
from octavo.ops.scheme import Scheme
from octavo.store.contents import stored_scheme
from octavo.store.sources import Source
from octavo.store.weights import allocated
from octavo.train.memory import MARGIN, MemoryPlan, Planner
from octavo.train.precision import Precision, all_8bit

LEVELS = {"none": Save.ALL, "selective": Save.ATTENTION, "full": Save.INPUT}
GIB = 2**30
LIBRARIES_BYTES = 400 * 2**20  # kernels that CUDA libraries load into device memory at their first use
SHORTEST = 256  # tokens: shorter rows hardly take less memory


@dataclass(frozen=True)
class FittedPlan:
    """A plan, its memory budget, and the planner for alternatives."""

    plan: MemoryPlan
    budget_bytes: int
    planner: Planner
    fixed: tuple[Save, ...] | None = None  # the save level of each layer, if --recompute sets it

    def with_precision(self, precision: Precision) -> FittedPlan:
        """The plan for another precision of the matmuls."""
        if precision == self.planner.precision:
            return self
        planner = replace(self.planner, precision=precision)
        if self.fixed is not None:
            plan = planner.fixed(self.fixed, self.budget_bytes)
        else:
            plan = planner.best(self.budget_bytes) or planner.smallest()
        return replace(self, plan=plan, planner=planner)

    def describe(self) -> str:
        """The plan for people."""
        plan, ends = self.plan, self.plan.seconds_range
        time = f", {range_text(*ends)} s a step (computed)" if ends else ""
        return (
            f"Plan: {plan.describe()}; {plan.peak_bytes / GIB:.2f} of "
            f"{self.budget_bytes / GIB:.2f} GiB predicted{time}."
        )

    def warning(self) -> str:
        """A warning if the plan of `with_precision` may not fit; "" if it fits."""
        if self.fixed is not None and self.plan.peak_bytes > self.budget_bytes:
            return "With this many exact matmuls the level of --recompute does not fit. --recompute auto may fit."
        if self.fixed is None and self.plan.peak_bytes > MARGIN * self.budget_bytes:
            return "With this many exact matmuls no plan is certain to fit: this is the plan of the least memory."
        return ""

    def cheaper(self, plan: MemoryPlan) -> MemoryPlan | None:
        """A plan that takes less memory than `plan`; None if there is none."""
        cheaper = self.planner.best(min(self.budget_bytes, plan.peak_bytes) * 0.94) or self.planner.smallest()
        return cheaper if cheaper.peak_bytes < plan.peak_bytes else None


def adapter_plan(options: LoraOptions) -> AdapterPlan:
    """The trained parameters of a run: LoRA, norms, biases."""
    spec = LoraSpec(options.rank, options.alpha, options.dropout, options.rslora)
    return AdapterPlan(spec, tuple(options.lora_targets), norms=options.train_norms, biases=options.train_biases)


def check_run(config: Config, source: Source) -> None:
    """UsageError for rows longer than the model's context and for unknown LoRA targets, by config.json alone."""
    model = build(source.config)
    check_context(model.config.context, config[TextOptions].seq_len)
    check_targets(model, config[LoraOptions])


def check_targets(model: Decoder, options: LoraOptions) -> None:
    """UsageError for a name in --lora-targets that no layer of the model has."""
    try:
        adapters.select(model, options.lora_targets)
    except AdapterError as error:
        raise UsageError(f"--lora-targets: {error.message}", hint=error.hint) from error


def planner_for(
    config: Config,
    source: Source,
    scheme: Scheme,
    hardware: Hardware,
    gpu: Peak | None,
    *,
    rows: int | None = None,
    documents: int = 1,
    simulated: Callable[[], None] | None = None,
) -> Planner:
    """The planner of a run. UsageError for unknown LoRA targets and for rows longer than the model's context.

    `rows` is the number of rows of the data, if it is known: no step has more. `documents` are the most of a row, its
    padding counted as one. `simulated` is called after each simulation.
    """
    training, length = config[TrainOptions], config[TextOptions].seq_len
    batch_size = training.batch_size if rows is None else min(training.batch_size, rows)
    model = allocated(source.config, scheme, dtype=hardware.dtype, device=torch.device("meta"))
    check_context(model.config.context, length)
    check_targets(model, config[LoraOptions])
    adapters.create_(model, adapter_plan(config[LoraOptions]), seed=training.seed)
    flatten_(adapters.trained(model))
    model.train()  # so that dropout is simulated too
    options, forward_only = config[MemoryOptions], not backward_8bit(hardware, gpu)
    return Planner(
        model,
        length,
        batch_size,
        optimizer_bytes=8 if training.optimizer == "adamw" else 2,
        gpu=None if hardware.dtype == torch.float32 else gpu,  # its rates are those of 16-bit matmuls
        offloads={"off": (False,), "on": (True,), "auto": (False, True)}[options.offload],
        host_bytes=free_memory_bytes("cpu") / 2,
        micro_batch_size=min(micro, batch_size) if (micro := training.micro_batch_size) else None,
        precision=all_8bit(model, forward_only=forward_only) if wants_8bit(options, hardware, gpu) else Precision(),
        fused=options.fused,
        documents=documents,
        ampere=is_ampere(hardware, gpu),
        simulated=simulated,
    )


def budget_bytes(options: MemoryOptions, hardware: Hardware) -> int:
    """The memory budget of a run: --gpu-memory, else all free device memory, or half of the free RAM on a CPU.

    A --gpu-memory beyond the memory of the GPU of --pretend is cut to that.
    """
    requested, limit = size_in_bytes(options.gpu_memory), memory_limit_bytes(hardware.device)
    if requested is not None:
        return requested if limit is None else min(requested, limit)
    free = free_memory_bytes(hardware.device)
    return free - LIBRARIES_BYTES if hardware.capabilities.is_gpu else free // 2


def fit(
    config: Config,
    source: Source,
    scheme: Scheme,
    hardware: Hardware,
    *,
    rows: int | None = None,
    documents: int = 1,
    resumed: bool = False,
) -> FittedPlan:
    """The fastest plan that fits; if none does, a UsageError with settings that would fit.

    `rows` are those of the data, `documents` the most of a row, its padding counted as one. The settings of a resumed
    run have the micro-batch size of its start; if that does not fit, another is chosen.
    """
    options = config[MemoryOptions]
    planner = planner_for(config, source, scheme, hardware, peak(hardware.name), rows=rows, documents=documents)
    budget = budget_bytes(options, hardware)
    if hardware.device.type == "cpu":
        if options.offload == "on":
            raise UsageError("--offload on needs a GPU.", hint="Leave the option out.")
        planner.offloads = (False,)
    if options.recompute != "auto":
        level = LEVELS[options.recompute]
        levels = (level,) * len(planner.model.blocks)
        fixed = planner.fixed(levels, budget)
        check_cpu_memory(fixed, planner)
        return FittedPlan(fixed, budget, planner, levels)
    best = planner.best(budget)
    if best is None and resumed and planner.micro_batch_size is not None:
        planner = replace(planner, micro_batch_size=None)
        best = planner.best(budget)
    if best is not None:
        return FittedPlan(best, budget, planner)
    if hardware.device.type == "cpu":  # the simulation is of a GPU's allocator: no reason for an error on a CPU
        return FittedPlan(planner.smallest(), budget, planner)
    check_cpu_memory(planner.smallest(), planner)
    needed = least_bytes(planner)
    raise too_small(config, source, scheme, hardware, planner.gpu, needed, budget, documents=documents)


def least_bytes(planner: Planner) -> int:
    """The smallest memory budget with which a run fits."""
    return math.ceil(planner.smallest().peak_bytes / MARGIN)


def check_cpu_memory(plan: MemoryPlan, planner: Planner) -> None:
    """UsageError if a plan offloads more than half of the free CPU memory."""
    if plan.host_bytes > planner.host_bytes:
        raise UsageError(
            f"The plan offloads {plan.host_bytes / GIB:.2f} GiB to CPU memory; the limit is "
            f"{planner.host_bytes / GIB:.2f} GiB, half of the free CPU memory.",
            hint="Use --offload off, fewer or shorter rows, or free CPU memory.",
        )


def too_small(
    config: Config,
    source: Source,
    scheme: Scheme,
    hardware: Hardware,
    gpu: Peak | None,
    needed: int,
    budget: int,
    *,
    documents: int = 1,
    simulated: Callable[[], None] | None = None,
) -> UsageError:
    """The error for a run that does not fit. Its hint has the longest rows that fit for each scheme.

    `documents` are the most of a row. Shorter rows are counted with as many, although they have fewer.
    """
    names = [scheme.name]
    if stored_scheme(source).name == "none":
        names += [name for name in ("int8", "nf4", "nf4-double") if name != scheme.name]
    lengths = [config[TextOptions].seq_len]
    while lengths[-1] > SHORTEST:
        lengths.append(lengths[-1] // 2)
    auto = " --recompute auto" if config[MemoryOptions].recompute != "auto" else ""
    hints = []
    tried: dict[str, int] = {}  # what does not fit, and the memory that it needs
    for name in names:
        for length in lengths:
            shorter = config.replace(seq_len=length)
            planner = planner_for(
                shorter, source, SCHEMES[name], hardware, gpu, documents=documents, simulated=simulated
            )
            smallest, least = planner.smallest().peak_bytes, least_bytes(planner)
            if least <= budget:
                hints.append(f"--scheme {name} --seq-len {length}{auto} takes {smallest / GIB:.1f} GiB")
                break
            tried[f"--scheme {name} --seq-len {length}{auto}"] = least
    is_limited = size_in_bytes(config[MemoryOptions].gpu_memory) == budget
    more = "raise --gpu-memory" if is_limited else "free device memory"
    if hints:
        hint = f"This fits: {'; '.join(hints)}."
    else:
        cheapest = min(tried, key=lambda options: tried[options])
        hint = f"Use a smaller model, or {more}: {cheapest} needs {gib_text(tried[cheapest])} GiB."
    return UsageError(
        f"With --scheme {scheme.name} --seq-len {config[TextOptions].seq_len} the run needs at least "
        f"{gib_text(needed)} GiB; {budget / GIB:.2f} GiB are available.",
        hint=hint,
    )


def gib_text(budget: int) -> str:
    """A memory budget in GiB, rounded up: with the shown value the run fits."""
    return f"{math.ceil(budget / GIB * 100) / 100:.2f}"


def range_text(low: float, high: float) -> str:
    """A range with two digits of each end: "310 to 620", or one number if both are the same."""
    ends = [_two_digits(end) for end in (low, high)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _two_digits(number: float) -> str:
    places = 1 - math.floor(math.log10(number)) if number > 0 else 0
    return f"{round(number, places):,.{max(0, places)}f}"
