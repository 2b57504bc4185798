"""`octavo evaluate`: a table of perplexity on text, and a table of lm-evaluation-harness tasks.

`octavo finetune` computes rows of the first table too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octavo.adapters import apply_, attached, attached_text
from octavo.commands.data import encode, read_documents, to_rows, with_windows
from octavo.commands.loading import (
    check_context,
    chosen_scheme,
    end_ids,
    load_model,
    opened,
    read_adapter,
    tokenizer_with,
    with_fitting_rows,
)
from octavo.commands.probes import Measured, ProbeSet, measure, prepare, results
from octavo.commands.scores import (
    BASE,
    QUANTIZED_BASE,
    TUNED,
    ScoreTable,
    file_differences,
    loss_difference,
    score_row,
    score_rows,
    show_probes,
    show_scores,
    show_verdict,
)
from octavo.config import Config, EvaluateOptions, ModelOptions, ProbeOptions, TextOptions, WindowOptions
from octavo.data.packing import Row
from octavo.errors import UsageError
from octavo.hardware import Hardware
from octavo.harness.tasks import load_tasks, run_tasks, show_tasks
from octavo.infer.loaded_model import LoadedModel
from octavo.intervals import Units
from octavo.models import parse
from octavo.ops.quantize import scheme_named
from octavo.ops.scheme import Scheme
from octavo.reporting import Report
from octavo.runs.events import Difference, Evaluation, Event, QuantizationCost, ScoreRow
from octavo.runs.probe_sentences import probe_results
from octavo.runs.verdict import Verdict, verdict_of
from octavo.runtime.optional import bitsandbytes
from octavo.store.contents import stored_scheme
from octavo.store.embedded_adapter import base_of, has_embedded_adapter
from octavo.store.hf_folder import written_bytes
from octavo.store.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Candidate:
    """A model that is loaded once, and its rows in the table. For the row TUNED the --adapter is applied."""

    scheme: Scheme
    hardware: Hardware
    names: tuple[str, ...]


@dataclass(frozen=True)
class Scored:
    """A row of the table, and what its differences from other rows are computed from."""

    row: ScoreRow
    units: Units | None
    candidate: Candidate
    files: Mapping[str, Units]


def evaluate(config: Config, report: Report) -> dict[str, Any]:
    """Perplexity, bits per byte and size of the base, the quantized base and the tuned model, or of some schemes."""
    options, model_options = config[EvaluateOptions], config[ModelOptions]
    schemes = _compared(options, model_options)
    if not options.data and not options.tasks:
        raise UsageError(
            "There is no text and no task to evaluate on.", hint="Name text with --data, or tasks with --tasks."
        )
    tasks = load_tasks(options, report)
    hardware, source = opened(model_options, report, own_adapters=options.adapter is None)
    allow_pickle = model_options.allow_pickle
    named = options.adapter and read_adapter(options.adapter, source, report, allow_pickle=allow_pickle)
    adapter_folder, adapter = named or (None, None)
    tokenizer = tokenizer_with(adapter, adapter_folder, source, report)
    rows = _rows(with_fitting_rows(config, source, report), source, tokenizer, report) if options.data else []
    stride = config[WindowOptions].stride
    table: list[Scored] = []
    compares = adapter is not None and not schemes and config[ProbeOptions].probes
    probes = prepare(rows, None, tokenizer, context=parse(source.config).context) if rows and compares else None
    measured: list[Measured] = []  # of the last model, before and after the adapter is applied
    task_rows: list[dict[str, Any]] = []
    candidates = _candidates(schemes, source, config, hardware)
    _check_schemes(schemes, candidates, stored_scheme(source), report)
    for candidate in candidates:
        model = load_model(source, candidate.scheme, candidate.hardware, report)
        size = written_bytes(base_of(source), candidate.scheme)
        for name in candidate.names:
            folder = adapter_folder if name == TUNED else None
            if folder and adapter:
                apply_(model, adapter)
                if candidate is candidates[-1]:
                    report.say(attached_text(adapter))
            if (beyond := _largest_id(rows)) >= model.config.vocabulary:
                report.warn(f"{name} is not evaluated: the text has the token id {beyond:,}, beyond its vocabulary.")
                continue
            label = f"Evaluating {name} ({candidate.scheme.name})"
            if rows:
                result = score_rows(model, rows, tokenizer, batch=options.batch_size, label=label, report=report)
                row = score_row(name, candidate.scheme, folder, result, context=len(rows[0].ids), stride=stride)
                row = replace(row, size_bytes=size)
                table.append(Scored(row, result.units, candidate, result.files))
                if probes and candidate is candidates[-1]:
                    measured.append(measure(model, probes, tokenizer, batch=options.batch_size, report=report))
            if tasks:
                report.say(f"{label} on tasks")
                loaded = LoadedModel(model, tokenizer, end_ids(source))
                of_tasks = run_tasks(tasks, loaded, batch=options.batch_size, report=report)
                task_rows += [{**_named(name, candidate.scheme, folder), **row} for row in of_tasks]
                del loaded
        del model  # frees its memory before the next one is loaded
    differences = _differences(table, compared=bool(schemes))
    found = _probe_events(probes, measured, tokenizer)
    verdict = _verdict(table, differences, found) if not schemes else Verdict()
    _show(table, differences, found, verdict, report)
    if tasks:
        show_tasks(task_rows, report)
    return {
        "rows": [one.row.to_dict() for one in table],
        "differences": [asdict(one) for one in differences],
        "verdict": verdict.to_dict(),
        **probe_results(found),
        **({"attached": attached(adapter)} if adapter else {}),
        **({"tasks": task_rows} if tasks else {}),
    }


def _show(
    table: Sequence[Scored], differences: Sequence[Difference], found: Sequence[Event], verdict: Verdict, report: Report
) -> None:
    """Prints the tables and the verdict."""
    if table:
        show_scores(ScoreTable([one.row for one in table], differences, table[-1].units), report, verdict)
    show_probes(found, report)
    show_verdict(verdict, report)


def _probe_events(
    probes: ProbeSet | None, measured: Sequence[Measured], tokenizer: PreTrainedTokenizerFast
) -> list[Event]:
    """What the adapter changed; [] unless the model was measured without it and with it."""
    if probes is None or len(measured) != 2:
        return []
    return results(probes, measured[0], measured[1], None, tokenizer, step=None)


def _check_schemes(schemes: Sequence[Scheme], candidates: Sequence[Candidate], stored: Scheme, report: Report) -> None:
    """Raises if bitsandbytes is missing and needed, before any row is computed; warns of weights quantized twice."""
    if stored.name != "none" and any(scheme is not stored for scheme in schemes):
        report.warn(f"The weights are stored in {stored.name}: other schemes quantize its dequantized weights.")
    if stored.name != "dynamic8" and any(candidate.scheme.name == "dynamic8" for candidate in candidates):
        bitsandbytes()


def _differences(table: Sequence[Scored], *, compared: bool) -> list[Difference]:
    """Of compared schemes, from the first to each other one; else from each model without the adapter to it with."""
    pairs = [(table[0], one) for one in table[1:]]
    if not compared:
        pairs = [(before, after) for before, after in pairwise(table) if before.candidate is after.candidate]
    return [loss_difference(before.row, after.row, before.units, after.units) for before, after in pairs]


def _verdict(table: Sequence[Scored], differences: Sequence[Difference], found: Sequence[Event]) -> Verdict:
    """The verdict on the tuned model, with what the scheme of its base costs if the unquantized base has a row."""
    if not differences or len(table) < 2:
        return Verdict()
    first, before, after = table[0], table[-2], table[-1]
    files = tuple(file_differences(before.files, after.files))
    events: list[Event] = [Evaluation(None, tuple(one.row for one in table), tuple(differences), files), *found]
    if first is not before:
        events.append(QuantizationCost(loss_difference(first.row, before.row, first.units, before.units)))
    return verdict_of(events)


def _rows(config: Config, source: Source, tokenizer: PreTrainedTokenizerFast, report: Report) -> list[Row]:
    """The packed rows for perplexity. UsageError if there are none, or they are longer than the model's context."""
    context = parse(source.config).context
    check_context(context, config[TextOptions].seq_len)
    encoded = encode(
        read_documents(config[EvaluateOptions].data, config[TextOptions], report),
        config[TextOptions],
        tokenizer,
        report,
    )
    text = to_rows(encoded, config[TextOptions], tokenizer)
    text = with_windows(text, encoded, config, tokenizer, context=context)
    rows = text.measurable(config[EvaluateOptions].rows)
    if not rows:
        raise UsageError("The text has no token to evaluate.", hint="Inspect it with `octavo data`.")
    return rows


def _largest_id(rows: Sequence[Row]) -> int:
    return max((int(row.ids.max()) for row in rows if len(row.ids)), default=-1)


def _compared(options: EvaluateOptions, model_options: ModelOptions) -> list[Scheme]:
    """The schemes of --compare, without duplicates, in order; UsageError for an unknown one."""
    if options.compare and model_options.scheme != "auto":
        raise UsageError("--compare and --scheme both select schemes.", hint="Give one of them.")
    return [scheme_named(name) for name in dict.fromkeys(options.compare)]


def _candidates(schemes: Sequence[Scheme], source: Source, config: Config, hardware: Hardware) -> list[Candidate]:
    """The models to load, in the order of the table."""
    options, model_options = config[EvaluateOptions], config[ModelOptions]
    plain, stored = scheme_named("none"), stored_scheme(source)
    precise = full_precision(hardware) if model_options.dtype == "auto" else hardware
    tuned = (TUNED,) if options.adapter else ()

    def untuned(scheme: Scheme) -> str:
        if has_embedded_adapter(source):
            return TUNED
        return BASE if scheme.name == stored.name == "none" else QUANTIZED_BASE

    def hardware_for(scheme: Scheme) -> Hardware:
        # A base without an adapter is evaluated in full precision; a tuned model in its compute dtype.
        return precise if scheme is plain and not tuned else hardware

    if schemes:
        return [Candidate(scheme, hardware_for(scheme), tuned or (untuned(scheme),)) for scheme in schemes]
    scheme = chosen_scheme(model_options, source)
    base = options.base and scheme is not plain and stored is plain
    return [
        *([Candidate(plain, precise, (BASE,))] if base else []),
        Candidate(scheme, hardware_for(scheme), (untuned(scheme), *tuned)),
    ]


def _named(name: str, scheme: Scheme, folder: Path | None) -> dict[str, Any]:
    """The columns that identify the model of a row."""
    return {"name": name, "scheme": scheme.name, "adapter": str(folder) if folder else None}


def full_precision(hardware: Hardware) -> Hardware:
    """The hardware with the dtype of "full precision": float32 on a CPU, the compute dtype on a GPU."""
    if hardware.device.type != "cpu":
        return hardware
    return replace(hardware, dtype=torch.float32)
