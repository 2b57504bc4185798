"""`octavo compare`: what differs between runs, in their settings, results, held-out losses, curves and samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from octavo.commands.compare.paired import Paired, bits_per_nat_per_token, compare_pair, same_text
from octavo.commands.compare.plot import SEVERAL, text_plot
from octavo.commands.compare.read import ReadRun, read_runs
from octavo.commands.compare.settings import differing_circumstances, differing_settings, shown_setting
from octavo.commands.run_list import to_dict
from octavo.config import CompareOptions, Config
from octavo.html_report import comparison
from octavo.html_report.chart import smooth
from octavo.html_report.comparison import Comparison, SamplesOfPrompt
from octavo.reporting import Report, duration, shown
from octavo.runs import events
from octavo.runs.loss_unit import NATS, LossUnit

SHOWN_PROMPTS = 3  # in the terminal; the page has all


def compare(config: Config, report: Report) -> dict[str, Any]:
    """Prints the comparison of 2 to 8 runs, the first against each other one; returns the JSON result.

    UsageError for a folder that is no run, and for too few or too many.
    """
    options = config[CompareOptions]
    runs = read_runs(options.runs)
    settings = {**differing_settings(runs), **differing_circumstances(runs)}
    pairs = [compare_pair(runs[0], other) for other in runs[1:]]
    scales, unit = _units(runs)
    result = Comparison(
        names=[run.name for run in runs],
        letters=[run.letter for run in runs],
        settings=[(name, shown_setting(values)) for name, values in settings.items()],
        results=_results(runs),
        statements=_statements(pairs, runs),
        curves=[run.curve(scale) for run, scale in zip(runs, scales, strict=True)],
        unit=unit,
        samples=_samples(runs),
    )
    _show(result, runs, report)
    if options.report is not None:
        comparison.write(result, options.report)
        report.result(f"report  {options.report}")
    return {
        "runs": [_run_dict(run) for run in runs],
        "settings": settings,
        "differences": [_pair_dict(pair) for pair in pairs],
        "samples": [{"prompt": one.prompt, "texts": list(one.texts)} for one in result.samples],
        "report": None if options.report is None else str(options.report),
    }


def _units(runs: Sequence[ReadRun]) -> tuple[list[float], str]:
    """What the held-out losses of each run are multiplied by in the plot, and the unit."""
    kinds = {same_text(a.measured, b.measured) for a, b in combinations(runs, 2)}
    measured = [run.measured for run in runs]
    if kinds <= {"loss", "bits_per_byte"} and "bits_per_byte" in kinds:
        scales = [bits_per_nat_per_token(one) for one in measured if one]
        if all(map(math.isfinite, scales)):
            return scales, "bits per byte"
    note = "" if kinds == {"loss"} else " (of different held-out texts: compare only how far each curve falls)"
    return [1.0] * len(runs), f"nats per token{note}"


def _results(runs: Sequence[ReadRun]) -> list[tuple[str, list[object]]]:
    """The rows of the table of results; None: not measured. Rows that no run has are left out."""
    compared = [run.summary.unit for run in runs if run.summary.difference]
    unit = NATS.name if NATS in compared else "bits per byte"
    rows: list[tuple[str, list[object]]] = [
        ("state", [run.summary.state for run in runs]),
        ("steps", [_steps(run) for run in runs]),
        ("training loss", [run.train_loss for run in runs]),
        ("bits per byte before", [run.rows[-2].bits_per_byte if len(run.rows) > 1 else None for run in runs]),
        ("bits per byte after", [run.rows[-1].bits_per_byte if run.rows else None for run in runs]),
        ("perplexity before", [run.summary.perplexity_before for run in runs]),
        ("perplexity after", [run.summary.perplexity_after for run in runs]),
        (f"gain in {unit}", [_gain(run, unit) for run in runs]),
        ("95% interval of this", [_bounds(run, unit) for run in runs]),
        ("general text: change of the loss in bits per byte", [one and one.rise for one in map(_forgot, runs)]),
        ("share of cloze probes recovered", [one and one.after for one in map(_learned, runs)]),
        ("share of copied n-grams in samples", [one and one.after for one in map(_copies, runs)]),
        ("tokens per second", [run.summary.tokens_per_second for run in runs]),
        ("training time", [None if (time := run.training_seconds) is None else duration(time) for run in runs]),
        ("peak memory in GiB", [None if (peak := run.peak_memory_bytes) is None else peak / 2**30 for run in runs]),
    ]
    return [(name, values) for name, values in rows if any(value is not None for value in values)]


def _forgot(run: ReadRun) -> events.Forgot | None:
    return events.last(run.events, events.Forgot)


def _learned(run: ReadRun) -> events.Learned | None:
    return events.last(run.events, events.Learned)


def _copies(run: ReadRun) -> events.Copies | None:
    return events.last(run.events, events.Copies)


def _steps(run: ReadRun) -> str:
    planned = run.summary.planned_steps
    return f"{run.summary.steps:,} / {'?' if planned is None else format(planned, ',')}"


def _gain(run: ReadRun, unit: str) -> float | None:
    difference = run.summary.difference
    if difference is None or difference.lower_by is None:
        return None
    return _unit(run, unit).of(difference.lower_by)


def _bounds(run: ReadRun, unit: str) -> str | None:
    bounds = run.summary.difference.interval if run.summary.difference else None
    if bounds is None:
        return None
    low, high = _unit(run, unit).bounds(bounds)
    return f"{shown(low)} to {shown(high)}"


def _unit(run: ReadRun, name: str) -> LossUnit:
    """That of the run, or nats per token if the table has them, since a run has no bits per byte."""
    return run.summary.unit if run.summary.unit.name == name else NATS


def _statements(pairs: Sequence[Paired], runs: Sequence[ReadRun]) -> list[str]:
    sentences = [pair.sentence for pair in pairs]
    with_interval = sum(pair.interval is not None for pair in pairs)
    if with_interval:
        sentences.append(
            "An interval is about other held-out text of this kind. It does not contain how much a run differs with "
            "another seed."
        )
    if with_interval > 1:
        sentences.append(
            f"Each of the {with_interval} intervals misses the true difference in 5 % of such texts; that one of them "
            "does is more likely."
        )
    sentences += [f"{run.letter} {run.summary.state}: {run.summary.problem}" for run in runs if run.summary.problem]
    return sentences


def _samples(runs: Sequence[ReadRun]) -> list[SamplesOfPrompt]:
    """The newest trained sample of each prompt that several runs have."""
    texts: dict[str, list[str | None]] = {}
    for number, run in enumerate(runs):
        for sample in events.only(run.events, events.Sample):
            if sample.which != "base":
                texts.setdefault(sample.prompt, [None] * len(runs))[number] = sample.text
    return [SamplesOfPrompt(prompt, each) for prompt, each in texts.items() if sum(one is not None for one in each) > 1]


def _show(result: Comparison, runs: Sequence[ReadRun], report: Report) -> None:
    report.result("\n".join(f"{run.letter}  {run.summary.path}" for run in runs))
    columns = ["", *result.letters]
    for title, rows in (("Settings that differ", result.settings), ("Results", result.results)):
        cells = [[name, *("" if value is None else value for value in values)] for name, values in rows]
        if cells:
            report.table(title, columns, cells, result=True)
        else:
            report.result(f"{title}: none")
    curves, what = [(curve.letter, curve.held_out) for curve in result.curves], "Held-out loss"
    if sum(len(points) > 1 for _, points in curves) < len(curves):
        curves, what = [(run.letter, smooth(run.training)) for run in runs], "Training loss, smoothed"
    if plot := text_plot(curves):
        unit = result.unit if what == "Held-out loss" else "nats per token"
        report.result(f"\n{what} in {unit}; {SEVERAL}: several runs\n{plot}\n")
    for sentence in result.statements:
        report.result(sentence)
    for one in result.samples[:SHOWN_PROMPTS]:
        lines = [f"{letter}: {text.strip()}" for letter, text in zip(result.letters, one.texts, strict=True) if text]
        report.result("\n".join([f"\nSamples for {one.prompt!r}", *lines]))
    if (more := len(result.samples) - SHOWN_PROMPTS) > 0:
        report.result(f"\nThere are samples for {more:,} more prompts: --report FILE.html has them.")


def _run_dict(run: ReadRun) -> dict[str, Any]:
    return {
        **to_dict(run.summary),
        "letter": run.letter,
        "rows": [row.to_dict() for row in run.rows],
        "train_loss": run.train_loss,
        "training_tokens": run.training_tokens,
        "training_seconds": run.training_seconds,
        "peak_memory_bytes": run.peak_memory_bytes,
        "held_out": [list(point) for point in run.held_out],
    }


def _pair_dict(pair: Paired) -> dict[str, Any]:
    return {
        "before": str(pair.before.summary.path),
        "after": str(pair.after.summary.path),
        "comparable": pair.comparable,
        "lower_by": pair.lower_by,
        "unit": {"loss": "nats per token", "bits_per_byte": "bits per byte", "nothing": None}[pair.comparable],
        "interval": asdict(pair.interval) if pair.interval else None,
        "text": pair.sentence,
    }
