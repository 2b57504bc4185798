"""The HTML page of `octavo compare`: settings that differ, results, differences, loss curves, samples.

A run is a letter and a color everywhere on the page. The letters are also the marks of its curve: the curves differ
without colors too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from octavo.atomic import atomic_write
from octavo.html_report.chart import Points, Series, draw, line, smooth
from octavo.html_report.elements import page, section, table, text

# Of eight runs, on a light and on a dark page: a contrast of at least 3 with the background, and different lightness.
LIGHT = ("#2f6f9f", "#c2571a", "#2e7d4f", "#8e3b8a", "#8a6a00", "#b3264a", "#4a4fb5", "#5b6470")
DARK = ("#6cb2e6", "#f0a35e", "#74c795", "#d58ad0", "#d9bb4a", "#f0839f", "#a3a7ff", "#b3bac4")

_COLORS = "; ".join(f"--run-{number}: {color}" for number, color in enumerate(LIGHT))
_DARK_COLORS = "; ".join(f"--run-{number}: {color}" for number, color in enumerate(DARK))
STYLE = f"""
:root {{ {_COLORS}; }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK_COLORS}; }} }}
.thin {{ fill: none; stroke-width: 1.2; stroke-linejoin: round; opacity: .55; }}
.mark {{ font-weight: 700; text-anchor: middle; paint-order: stroke; stroke: var(--card); stroke-width: 4px;
  stroke-linejoin: round; }}
.run {{ display: block; font-weight: 600; }}
.card > p {{ margin: 0; }}
.card > p + p {{ margin-top: .6rem; }}
td {{ vertical-align: top; }}
th, td {{ overflow-wrap: break-word; }}
"""


@dataclass(frozen=True)
class Curve:
    """The losses of a run by step: of each training step, and on the held-out text."""

    letter: str
    training: Points
    held_out: Points


@dataclass(frozen=True)
class SamplesOfPrompt:
    """The continuations of one prompt, one for each run; None if a run has no sample of it."""

    prompt: str
    texts: Sequence[str | None]


@dataclass(frozen=True)
class Comparison:
    """What is known of some runs together; all sequences have an entry for each run, in the same order."""

    names: Sequence[str]
    letters: Sequence[str]
    settings: Sequence[tuple[str, Sequence[object]]]  # of each setting that differs its values
    results: Sequence[tuple[str, Sequence[object]]]
    statements: Sequence[str]  # the differences, and what cannot be compared, in sentences
    curves: Sequence[Curve]
    unit: str  # of the losses of `curves`
    samples: Sequence[SamplesOfPrompt]


def write(comparison: Comparison, path: Path) -> None:
    """Writes the page to `path`, atomically. OSError if it cannot be written."""
    names = [f"{letter} {name}" for letter, name in zip(comparison.letters, comparison.names, strict=True)]
    title = f"{len(names)} runs compared"
    statements = "".join(f"<p>{text(one)}</p>" for one in comparison.statements)
    columns = ["", *names]
    parts = [
        f'<h1>{text(title)}</h1>\n<p class="lead">{_legend(names)}</p>',
        section("Differences", f'<div class="card">{statements}</div>' if statements else ""),
        section("Results", _table(columns, comparison.results)),
        section("Settings that differ", _table(columns, comparison.settings) or "<p>None.</p>"),
        section("Loss curves", _curves(comparison)),
        section("Samples", "".join(_samples(one, names) for one in comparison.samples)),
    ]
    atomic_write(path, page(f"{text(title)} · octavo", parts, style=STYLE).encode("utf-8", "replace"))


def _legend(names: Sequence[str]) -> str:
    return "".join(
        f'<span class="run" style="color:var(--run-{number})">{text(name)}</span>' for number, name in enumerate(names)
    )


def _table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[object]]]) -> str:
    cells = [[name, *("" if value is None else value for value in values)] for name, values in rows]
    return table(columns, cells, text_columns=len(columns)) if rows else ""


def _curves(comparison: Comparison) -> str:
    training = [
        Series("", smooth(curve.training), f"run-{number}", _thin) for number, curve in enumerate(comparison.curves)
    ]
    held_out = [
        Series(f"{curve.letter} {name}", curve.held_out, f"run-{number}", _lettered(curve.letter))
        for number, (curve, name) in enumerate(zip(comparison.curves, comparison.names, strict=True))
    ]
    chart = draw(f"Loss in {comparison.unit}", [*training, *held_out], width=920, height=380)
    caption = "With letters: on the held-out text. Thin lines: on the training text, smoothed."
    return f'{chart}<p class="caption">{caption}</p>' if chart else ""


def _thin(points: Points, color: str) -> str:
    return line(points, color).replace('class="curve"', 'class="thin"')


def _lettered(letter: str) -> Callable[[Points, str], str]:
    """Draws a line with the letter of its run at each point."""

    def marks(points: Points, color: str) -> str:
        labels = (f'<text class="mark" style="fill:{color}" x="{x}" y="{y + 4:.1f}">{letter}</text>' for x, y in points)
        return line(points, color) + "".join(labels)

    return marks


def _samples(samples: SamplesOfPrompt, names: Sequence[str]) -> str:
    cards = [
        f'<div class="card"><h3 style="color:var(--run-{number})">{text(name)}</h3>'
        f'<pre><span class="prompt">{text(samples.prompt)}</span>{text(continuation)}</pre></div>'
        for number, (name, continuation) in enumerate(zip(names, samples.texts, strict=True))
        if continuation is not None
    ]
    return f'<div class="pair" style="margin-top:1rem">{"".join(cards)}</div>'
