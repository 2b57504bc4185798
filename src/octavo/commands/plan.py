"""`octavo plan`: the memory and time of a run on a GPU, without reading weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from time import monotonic
from typing import Any

import torch

from octavo.commands.backends import MATH_MEMORY, check_gpu
from octavo.commands.loading import chosen_hardware, chosen_scheme, open_model, with_fitting_rows
from octavo.commands.run_plan import (
    GIB,
    LEVELS,
    budget_bytes,
    check_cpu_memory,
    gib_text,
    least_bytes,
    planner_for,
    range_text,
    too_small,
)
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
from octavo.config.section import arguments_of, flag_of
from octavo.errors import UsageError
from octavo.failures import cut
from octavo.hardware import (
    GPUS,
    USABLE,
    Hardware,
    Peak,
    basis,
    gpu_named,
    gpus_with,
    nearest,
    other_sizes,
    peak,
)
from octavo.layers.context import Save
from octavo.models.flops import model_flops
from octavo.ops.quantize import SCHEMES
from octavo.ops.scheme import Scheme
from octavo.reporting import Report, duration
from octavo.store.contents import stored_scheme
from octavo.store.sources import Source
from octavo.system import quoted
from octavo.train.memory import MARGIN

EXAMPLE_MEMORY = "5GiB"
PROGRESS_SECONDS = 5  # between two lines: a plan of a large model with little memory takes up to a minute


def plan(config: Config, report: Report) -> dict[str, Any]:
    """`octavo plan`: the memory and time of a run, without reading weights."""
    model_options, options = config[ModelOptions], config[MemoryOptions]
    hardware = chosen_hardware(model_options, report)
    name = _gpu_name(config) or hardware.name
    gpu = peak(name)
    check_gpu(options, hardware, gpu, dtype=model_options.dtype)
    if options.attention == "math":
        report.warn(MATH_MEMORY)
    source = open_model(model_options, report, weights=False)
    config = with_fitting_rows(config, source, report)
    budget = _budget_bytes(options, hardware, name, report)
    if not hardware.capabilities.is_gpu:  # the plan is for a GPU, whose compute dtype has 2 bytes
        dtype = torch.bfloat16 if model_options.dtype == "auto" else hardware.dtype
        hardware = replace(hardware, dtype=dtype)
    chosen = chosen_scheme(model_options, source).name
    selectable = model_options.scheme == "auto" and stored_scheme(source).name == "none"
    names = [chosen, *(name for name in ("int8", "nf4") if selectable and name != chosen)]
    simulated = _progress(report)
    rows = [_row(config, source, SCHEMES[name], hardware, gpu, budget, simulated) for name in names]
    titles = [
        "scheme",
        "fits",
        "peak GiB",
        "least --gpu-memory",
        "CPU GiB",
        "micro-batch",
        "full layers",
        "s a step",
        "tokens/s",
    ]
    shape = f"{config[TrainOptions].batch_size} x {config[TextOptions].seq_len}"
    title = f"{model_options.model}: {shape} in {budget / GIB:.1f} GiB"
    report.table(title, titles, [_cells(row) for row in rows], result=True)
    report.explain(
        "peak GiB: the forecast of the plan. least --gpu-memory: the smallest limit, in GiB, with which the scheme "
        f"fits{_margin(options)}. full layers: the layers that keep all activations for backward; the others "
        "recompute them. The plan is of rows with one document each: rows of several short documents take more."
    )
    time_basis = _time_basis(gpu, name, options, hardware.dtype)
    report.explain(time_basis)
    flops = rows[0]["flops_per_token"]
    total = sum(flops.values())
    shares = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in flops.items())
    report.explain(f"Each token of training is {_flop_text(total)} ({shares}), without what is recomputed.")
    first = next((row for row in rows if row["fits"]), None)
    if first is None:
        raise too_small(
            config, source, SCHEMES[chosen], hardware, gpu, rows[0]["least_bytes"], budget, simulated=simulated
        )
    report.result(f"octavo finetune {quoted(_arguments(config, first['scheme']))} --data YOUR_TEXTS")
    return {"budget_bytes": budget, "gpu": name if gpu else None, "time_basis": time_basis, "plans": rows}


def _progress(report: Report) -> Callable[[], None]:
    """To be called after each simulated step: says at an interval how many there were."""
    count, started, said = 0, monotonic(), monotonic()

    def simulated() -> None:
        nonlocal count, said
        count += 1
        if monotonic() - said >= PROGRESS_SECONDS:
            said = monotonic()
            report.say(f"Planning: {count} steps simulated in {duration(said - started)}.")

    return simulated


def _time_basis(gpu: Peak | None, name: str, options: MemoryOptions, dtype: torch.dtype) -> str:
    """What the times rest on, for people."""
    if dtype == torch.float32:
        return "No time is computed for --dtype float32: the rates of GPUs that octavo has are those of 16-bit matmuls."
    if gpu is None:
        return f"No time is computed, since no GPU is named: --gpu T4, --gpu {quoted(['RTX 3060'])} or another."
    without = [flag for flag, used in (("--no-kernels", options.kernels), ("--no-fused", options.fused)) if not used]
    without += [] if options.cuda_graphs else ["--no-cuda-graphs"]
    slower = f" With {' and '.join(without)} steps are slower than that." if without else ""
    return basis(gpu, name) + slower


def _flop_text(count: float) -> str:
    """A number of FLOP in GFLOP, MFLOP or kFLOP."""
    for unit, size in (("GFLOP", 1e9), ("MFLOP", 1e6)):
        if count >= 0.1 * size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kFLOP"


def _gpu_name(config: Config) -> str | None:
    """The key of the GPU that --gpu names, None without the option. UsageError for an unknown or ambiguous name."""
    asked = config[PlanOptions].gpu
    if asked is None:
        return None
    key = gpu_named(asked)
    if key is None:
        raise _unknown_gpu(asked, config)
    return key


def _unknown_gpu(name: str, config: Config) -> UsageError:
    if len(several := gpus_with(name)) > 1:
        return UsageError(f"--gpu {cut(name)!r} can be several GPUs.", hint=f"Use one of {_names(several)}.")
    near = nearest(name)
    similar = f"Similar names: {_names(near)}. " if near else ""
    given = [argument for kind in _RUN for argument in arguments_of(config[kind], leave_out={"gpu_memory"})]
    size = config[MemoryOptions].gpu_memory
    place = "" if size != "auto" else f" (the memory that the GPU has for a run, in place of {EXAMPLE_MEMORY})"
    command = quoted(["octavo", "plan", *given, "--gpu-memory", EXAMPLE_MEMORY if size == "auto" else size])
    return UsageError(
        f"octavo has no data of the GPU {cut(name)!r}.",
        hint=f"{similar}Its memory alone can be planned, without times: {command}{place}",
    )


def _names(keys: list[str]) -> str:
    """Names of GPUs as they are typed in a shell."""
    return ", ".join(quoted([key]) for key in keys)


def _budget_bytes(options: MemoryOptions, hardware: Hardware, name: str, report: Report) -> int:
    """--gpu-memory, else the free memory of this machine's GPU, else the known memory of the GPU `name`, and says so.

    UsageError if the memory is not known.
    """
    gpu = peak(name)
    is_present = hardware.capabilities.is_gpu and gpu == peak(hardware.name)
    requested = size_in_bytes(options.gpu_memory)
    if is_present:
        return budget_bytes(options, hardware)
    if requested is not None:
        sizes = [GPUS[each].memory_gib or 0 for each in (name, *other_sizes(name)) if each in GPUS]
        if gpu is not None and requested > (most := gpu.memory_gib or max(sizes)) * GIB:
            raise UsageError(
                f"--gpu-memory {options.gpu_memory} is more than the {most} GiB of the {gpu.name}.",
                hint=f"Give --gpu-memory {most}GiB or less. For a GPU with more memory, leave --gpu out: "
                "then no time is computed.",
            )
        return requested
    if gpu is None:
        raise UsageError(
            f"There is no GPU to plan for. {hardware.reason}",
            hint=f"Name one: --gpu {quoted(['RTX 3060'])}. Or give its memory: --gpu-memory 11GiB.",
        )
    others = other_sizes(name)
    if gpu.usable_bytes is None:
        raise UsageError(
            f"The memory of the {name} is not known: it is sold with several sizes.",
            hint=f"Use --gpu with one of {_names(others)}, or give its memory: --gpu-memory 11GiB.",
        )
    also = f" It is sold with another size too: --gpu {quoted(others[:1])}." if others else ""
    usable = f"{100 * USABLE:.0f} % of it, {gpu.usable_bytes / GIB:.1f} GiB"
    report.say(
        f"The {name} has {gpu.memory_gib} GiB; the plan counts on {usable}, since the driver and libraries take some. "
        f"--gpu-memory sets another limit.{also}"
    )
    return gpu.usable_bytes


def _margin(options: MemoryOptions) -> str:
    """Why the smallest limit is more than the peak of the smallest plan."""
    if options.recompute != "auto":
        return ""
    return f": the peak of its smallest plan and {100 * (1 - MARGIN):.0f} % of the limit for the error of the forecast"


def _cells(row: dict[str, Any]) -> list[object]:
    """A row of the table for people. A plan that does not fit is never run, so it has no time."""
    cells = {**row, "fits": "yes" if row["fits"] else "no"}
    for time in ("seconds", "tokens_per_second"):
        cells[time] = "-" if not row["fits"] else range_text(*row[time]) if row[time] else None
    return ["" if cells[key] is None else cells[key] for key in _COLUMNS]


def _arguments(config: Config, scheme: str) -> list[str]:
    """The arguments of the planned run: those that are always shown, and all values that differ from the default."""
    always = {"seq_len": config[TextOptions].seq_len, "batch_size": config[TrainOptions].batch_size}
    arguments = ["--model", config[ModelOptions].model, "--scheme", scheme]
    arguments += [text for name, value in always.items() for text in (flag_of(name), str(value))]
    for kind in _RUN:
        arguments += arguments_of(config[kind], leave_out={"model", "scheme", *always})
    return arguments


_RUN = (ModelOptions, TextOptions, LoraOptions, TrainOptions, MemoryOptions)  # the options of the planned run
_COLUMNS = (
    "scheme",
    "fits",
    "peak_gib",
    "least_gib",
    "host_gib",
    "micro_batch_size",
    "layers_all",
    "seconds",
    "tokens_per_second",
)


def _row(
    config: Config,
    source: Source,
    scheme: Scheme,
    hardware: Hardware,
    gpu: Peak | None,
    budget: int,
    simulated: Callable[[], None],
) -> dict[str, Any]:
    """The best plan of a scheme, as in `--json`."""
    training = config[TrainOptions]
    planner = planner_for(config, source, scheme, hardware, gpu, simulated=simulated)
    level = config[MemoryOptions].recompute
    if level == "auto":
        best = planner.best(budget)
        plan, fits, least = best or planner.smallest(), best is not None, least_bytes(planner)
    else:  # a level that is given is planned without a margin
        levels = (LEVELS[level],) * len(planner.model.blocks)
        plan, least = planner.fixed(levels, budget), planner.fixed(levels, 0).peak_bytes
        fits = plan.peak_bytes <= budget
    check_cpu_memory(plan, planner)
    tokens, seconds = training.batch_size * planner.length, plan.seconds_range
    return {
        "scheme": scheme.name,
        "fits": fits,
        "peak_bytes": plan.peak_bytes,
        "peak_gib": round(plan.peak_bytes / GIB, 2),
        "least_bytes": least,
        "least_gib": float(gib_text(least)),
        "host_gib": round(plan.host_bytes / GIB, 2),
        "micro_batch_size": plan.rows,
        "layers_all": plan.save.count(Save.ALL),
        "layers_attention": plan.save.count(Save.ATTENTION),
        "layers_transposed": plan.transposed,
        "seconds": list(seconds) if seconds else None,
        "tokens_per_second": [tokens / end for end in reversed(seconds)] if seconds else None,
        "flops_per_token": asdict(model_flops(planner.model, planner.length)),
    }
