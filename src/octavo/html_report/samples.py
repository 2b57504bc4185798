"""The samples in a report, side by side: the held-out text, before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from octavo.html_report.elements import section, text
from octavo.reporting import shown
from octavo.runs.events import Event, Sample, only

SIDES = (("base", "Before"), ("initial", "Before, with the initial adapter"), ("tuned", "After"))


def samples_section(events: Sequence[Event]) -> str:
    """Each prompt once, with its continuations; "" without samples."""
    by_prompt: dict[str, list[Sample]] = {}
    for sample in only(events, Sample):
        by_prompt.setdefault(sample.prompt, []).append(sample)
    return section("Samples", "".join(_of_prompt(samples) for samples in by_prompt.values()))


def _of_prompt(samples: Sequence[Sample]) -> str:
    reference = next((sample.reference for sample in samples if sample.reference), "")
    boxes = [_box("Reference", replace(samples[0], text=reference))] if reference else []
    boxes += [_box(title, _last_where(samples, which)) for which, title in SIDES]
    training = "".join(
        _box(f"Step {'?' if sample.step is None else shown(sample.step)}", sample)
        for sample in samples
        if sample.which == "training"
    )
    folded = f"<details><summary>While training</summary>{training}</details>" if training else ""
    prompt = f'<p class="prompt">{text(samples[0].prompt)}</p>'
    return f'<article>{prompt}<div class="pair">{"".join(boxes)}</div>{folded}</article>'


def _box(title: str, sample: Sample | None) -> str:
    if sample is None:
        return ""
    continuation = sample.text.removeprefix(sample.prompt).lstrip("\n")
    return f'<div class="card"><h3>{text(title)}</h3><pre>{text(continuation)}</pre></div>'


def _last_where(samples: Sequence[Sample], which: str) -> Sample | None:
    return next((sample for sample in reversed(samples) if sample.which == which), None)
