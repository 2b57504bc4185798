"""Fits a run into memory before its weights are read: the plan that `octavo finetune` takes and `octavo plan` shows."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from octavo import adapters
from octavo.adapters import AdapterPlan
from octavo.commands.loading import check_context, chosen_scheme, open_model
from octavo.config import (
    Config,
    LoraOptions,
    MemoryOptions,
    ModelOptions,
    PlanOptions,
    TextOptions,
    TrainOptions,
    size_in_bytes,
)
from octavo.errors import UsageError
from octavo.hardware import CARDS, Hardware, Peak, free_memory_bytes, peak, pick
from octavo.layers.context import Save
from octavo.layers.lora import LoraSpec, flatten_
from octavo.ops.attention import use_attention
from octavo.ops.quantize import SCHEMES, Scheme
from octavo.reporting import Report
from octavo.runtime.dispatch import hopper_kernels_disabled_reason, kernels_missing, use_kernels
from octavo.store.contents import stored_scheme
from octavo.store.sources import Source
from octavo.store.weights import allocated
from octavo.train.memory import MARGIN, MemoryPlan, Planner
from octavo.train.precision import set_precision_

LEVELS = {"none": Save.ALL, "selective": Save.ATTENTION, "full": Save.INPUT}
GIB = 2**30
LIBRARIES_BYTES = 400 * 2**20  # code that CUDA's libraries load into the card once they are used
SHORT = 256  # tokens: rows of fewer hardly take less memory


@dataclass(frozen=True)
class FittedPlan:
    """A plan, the bytes that it may take, and the planner to ask for another."""

    plan: MemoryPlan
    budget_bytes: int
    planner: Planner
    asked: tuple[Save, ...] | None = None  # what layers keep, if that was said

    def with_exact(self, names: Collection[str]) -> MemoryPlan:
        """The plan anew, with these products exact and all others in 8 bits.

        What channels apart take is left out: some MB, and up to 4.5 % of a step.
        """
        set_precision_(self.planner.model, exact=names)
        self.planner.forget()
        if self.asked is not None:
            return self.planner.asked(self.asked, self.budget_bytes)
        return self.planner.best(self.budget_bytes) or self.planner.smallest()

    def words(self, plan: MemoryPlan) -> str:
        """A plan for people, so that its surprises can be understood."""
        pace = f", {plan.seconds:.3g} s a batch" if plan.seconds else ""
        return (
            f"Plan: {plan.rows} rows a pass, {plan.describe()}; {plan.peak_bytes / GIB:.2f} of "
            f"{self.budget_bytes / GIB:.2f} GiB predicted{pace}."
        )

    def fault(self, plan: MemoryPlan) -> str:
        """What is wrong with a plan of `with_exact`; "" if it fits."""
        if self.asked is not None and plan.peak_bytes > self.budget_bytes:
            return "With so many products exact, what --recompute asks for does not fit. --recompute auto may."
        if self.asked is None and plan.peak_bytes > MARGIN * self.budget_bytes:
            return "With so many products exact no plan fits for sure: this is the one for the least memory."
        return ""

    def cheaper(self, plan: MemoryPlan) -> MemoryPlan | None:
        """A plan for less memory than `plan`; None if none is left."""
        found = self.planner.best(min(self.budget_bytes, plan.peak_bytes) * 0.94) or self.planner.smallest()
        return found if found.peak_bytes < plan.peak_bytes else None


def adapter_plan(options: LoraOptions) -> AdapterPlan:
    """What is trained."""
    spec = LoraSpec(options.rank, options.alpha, options.dropout, options.rslora)
    return AdapterPlan(spec, tuple(options.lora_targets), norms=options.train_norms, biases=options.train_biases)


def planner_for(config: Config, source: Source, scheme: Scheme, hardware: Hardware, card: Peak | None) -> Planner:
    """The planner of a run. Wrong targets and rows longer than the model's context are refused here already."""
    training, length = config[TrainOptions], config[TextOptions].seq_len
    model = allocated(source.config, scheme, dtype=hardware.dtype, device=torch.device("meta"))
    check_context(model.config.context, length)
    adapters.create_(model, adapter_plan(config[LoraOptions]), seed=training.seed)
    flatten_(adapters.trained(model))
    model.train()  # with the dropout that there is
    set_precision_(model, wanted=wants_eight(config[MemoryOptions], hardware, card))
    state = 8 if training.optimizer == "adamw" else 2
    offloads = {"off": (False,), "on": (True,), "auto": (False, True)}[config[MemoryOptions].offload]
    return Planner(model, length, training.batch, state, card, offloads, free_memory_bytes("cpu") / 2)


def wants_eight(options: MemoryOptions, hardware: Hardware, card: Peak | None = None) -> bool:
    """Whether products are to be in 8 bits. UsageError if they are asked for and cannot be."""
    if options.matmul == "exact":
        return False
    on_card = hardware.device.type == "cuda"
    able = hardware.eight if on_card else card is not None and card.eight
    if options.matmul == "8bit":
        if on_card and not able:
            raise UsageError(
                f"{hardware.name} is too old for products in 8 bits: they take compute capability 8.0.",
                hint="Take --matmul exact.",
            )
        return True
    return able and options.kernels and (not on_card or not kernels_missing())


def budget_bytes(options: MemoryOptions, hardware: Hardware) -> int:
    """What a run may take: as asked, all that is free on the card, or half of the free RAM."""
    asked = size_in_bytes(options.gpu_memory)
    if asked is not None:
        return asked
    free = free_memory_bytes(hardware.device)
    return free - LIBRARIES_BYTES if hardware.device.type == "cuda" else free // 2


def fit(config: Config, source: Source, scheme: Scheme, hardware: Hardware) -> FittedPlan:
    """The fastest plan that fits; UsageError that says what would, if none does."""
    options = config[MemoryOptions]
    planner = planner_for(config, source, scheme, hardware, peak(hardware.name))
    budget = budget_bytes(options, hardware)
    if hardware.device.type == "cpu":
        if options.offload == "on":
            raise UsageError("There is no card here whose memory --offload on could spare.", hint="Leave it out.")
        planner.offloads = (False,)
    if options.recompute != "auto":
        level = LEVELS[options.recompute]
        asked = (level,) * len(planner.model.blocks)
        taken = planner.asked(asked, budget)
        _check_host(taken, planner)
        return FittedPlan(taken, budget, planner, asked)
    best = planner.best(budget)
    if best is not None:
        return FittedPlan(best, budget, planner)
    if hardware.device.type == "cpu":  # a forecast of a card's memory: on a CPU it is no reason to refuse
        return FittedPlan(planner.smallest(), budget, planner)
    _check_host(planner.smallest(), planner)
    raise _too_small(config, source, scheme, hardware, planner.card, planner.smallest().peak_bytes, budget)


def _check_host(plan: MemoryPlan, planner: Planner) -> None:
    """UsageError where a plan takes more of the host's memory than it may."""
    if plan.host_bytes > planner.host_bytes:
        raise UsageError(
            f"The plan takes {plan.host_bytes / GIB:.2f} GiB of the host's memory, and "
            f"{planner.host_bytes / GIB:.2f} GiB, half of what is free, may be used.",
            hint="Take --offload off, fewer or shorter rows, or free memory of the host.",
        )


def configure_backends(options: MemoryOptions, hardware: Hardware, report: Report) -> None:
    """Sets what steps run on in this process, and says once what was chosen and why."""
    use_attention(options.attention)
    use_kernels(None if options.kernels else False)
    if hardware.device.type != "cuda":
        return
    missing = kernels_missing()
    kernels = "off, as asked" if not options.kernels else f"off ({missing})" if missing else _triton(hardware)
    steps = "recorded as CUDA graphs" if options.cuda_graphs else "launched kernel by kernel, as asked"
    report.say(
        f"Kernels: {kernels}. Attention: {options.attention}. Steps: {steps}. Products: {_products(options, hardware)}."
    )
    asked = size_in_bytes(options.gpu_memory)
    if asked is not None:
        total = torch.cuda.get_device_properties(hardware.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, asked / total), hardware.device)


def _triton(hardware: Hardware) -> str:
    """Which of Triton's kernels, where that is not all that there are for this card."""
    left_out = hopper_kernels_disabled_reason() if hardware.hopper else ""
    return f"Triton (without those for Hopper: {left_out})" if left_out else "Triton"


def _products(options: MemoryOptions, hardware: Hardware) -> str:
    """How products of frozen weights are computed, and why."""
    if wants_eight(options, hardware):
        return "in 8 bits, as asked" if options.matmul == "8bit" else "in 8 bits where a trial finds it fast and fair"
    if options.matmul == "exact":
        return "exact, as asked"
    return "exact (this card is too old for 8 bits)" if not hardware.eight else "exact (8 bits need the kernels)"


def _too_small(
    config: Config, source: Source, scheme: Scheme, hardware: Hardware, card: Peak | None, needed: int, budget: int
) -> UsageError:
    """The error that names what would fit: for each scheme the longest rows."""
    names = [scheme.name]
    if stored_scheme(source).name == "none":
        names += [name for name in ("int8", "nf4") if name != scheme.name]
    lengths = [config[TextOptions].seq_len]
    while lengths[-1] > SHORT:
        lengths.append(lengths[-1] // 2)
    auto = " --recompute auto" if config[MemoryOptions].recompute != "auto" else ""
    hints = []
    for name in names:
        for length in lengths:
            shorter = config.replace(seq_len=length)
            smallest = planner_for(shorter, source, SCHEMES[name], hardware, card).smallest().peak_bytes
            if smallest <= MARGIN * budget:
                hints.append(f"--scheme {name} --seq-len {length}{auto} takes {smallest / GIB:.1f} GiB")
                break
    return UsageError(
        f"The run needs {needed / MARGIN / GIB:.2f} GiB at least, and {budget / GIB:.2f} GiB are there.",
        hint=f"What fits: {'; '.join(hints)}." if hints else "Take a smaller model, or free memory of the card.",
    )


def plan(config: Config, report: Report) -> dict[str, Any]:
    """`octavo plan`: what a run would take, without reading weights."""
    asked, options = config[ModelOptions], config[MemoryOptions]
    hardware = pick(asked.device, asked.dtype)
    name = config[PlanOptions].gpu or hardware.name
    card = peak(name)
    if config[PlanOptions].gpu and card is None:
        raise UsageError(f"octavo does not know the card {name!r}.", hint=f"It knows {', '.join(CARDS)}.")
    here = hardware.device.type == "cuda" and card == peak(hardware.name)
    if size_in_bytes(options.gpu_memory) is None and not here:
        fault = f"How much memory the {name} has is not known" if card else "There is no card here to plan for"
        raise UsageError(f"{fault}.", hint="Give its memory: --gpu-memory 11GiB.")
    source, budget = open_model(asked, report, weights=False), budget_bytes(options, hardware)
    if hardware.device.type != "cuda":  # the plan is for a card, which multiplies 2-byte types
        dtype = torch.bfloat16 if asked.dtype == "auto" else hardware.dtype
        hardware = Hardware(hardware.device, dtype, hardware.reason, hardware.name)
    own = chosen_scheme(asked, source).name
    free = asked.scheme == "auto" and stored_scheme(source).name == "none"  # to take another scheme
    names = [own, *(name for name in ("int8", "nf4") if free and name != own)]
    rows = [_row(config, source, SCHEMES[name], hardware, card, budget) for name in names]
    shown = ["scheme", "fits", "peak GiB", "least GiB", "host GiB", "rows", "full layers", "s a step", "tokens/s"]
    title = f"{asked.model}: {config[TrainOptions].batch} x {config[TextOptions].seq_len} in {budget / GIB:.1f} GiB"
    report.table(
        title, shown, [["" if row[key] is None else row[key] for key in _COLUMNS] for row in rows], result=True
    )
    first = next((row for row in rows if row["fits"]), None)
    if first is None:
        raise _too_small(config, source, SCHEMES[own], hardware, card, rows[0]["peak_bytes"], budget)
    report.result(
        f"octavo finetune --model {shlex.quote(asked.model)} --scheme {first['scheme']} "
        f"--seq-len {config[TextOptions].seq_len} --batch {config[TrainOptions].batch} --data YOUR_TEXTS"
    )
    return {"budget_bytes": budget, "gpu": name if card else None, "plans": rows}


_COLUMNS = ("scheme", "fits", "peak_gib", "least_gib", "host_gib", "rows", "layers_all", "seconds", "tokens_per_second")


def _row(
    config: Config, source: Source, scheme: Scheme, hardware: Hardware, card: Peak | None, budget: int
) -> dict[str, Any]:
    """One scheme's best plan, as `--json` has it."""
    training = config[TrainOptions]
    planner = planner_for(config, source, scheme, hardware, card)
    level = config[MemoryOptions].recompute
    if level == "auto":
        best = planner.best(budget)
        taken, fits = best or planner.smallest(), best is not None
    else:
        taken = planner.asked((LEVELS[level],) * len(planner.model.blocks), budget)
        fits = taken.peak_bytes <= budget
    _check_host(taken, planner)
    seconds = taken.seconds * training.accumulate if taken.seconds else None
    tokens = training.batch * training.accumulate * planner.length
    return {
        "scheme": scheme.name,
        "fits": fits,
        "peak_bytes": taken.peak_bytes,
        "peak_gib": round(taken.peak_bytes / GIB, 2),
        "least_gib": round(planner.smallest().peak_bytes / GIB, 2),
        "host_gib": round(taken.host_bytes / GIB, 2),
        "rows": taken.rows,
        "layers_all": taken.save.count(Save.ALL),
        "layers_attention": taken.save.count(Save.ATTENTION),
        "weights_transposed": taken.transposed,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
    }
