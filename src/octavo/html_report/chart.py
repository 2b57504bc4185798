"""Curves by step as inline SVG: axes, round ticks, a legend. Colours are variables of the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Points = list[tuple[float, float]]

# More would make a long run's page slow, and stand closer than the screen's own points.
MOST_POINTS = 1500


@dataclass(frozen=True)
class Series:
    """One curve of a chart: points (x, y), the CSS variable of its colour, and how it is drawn."""

    name: str
    points: Points
    colour: str
    draw: Callable[[Points, str], str]


def draw(title: str, series: Sequence[Series], *, width: int, height: int) -> str:
    """An SVG in a card, with axes, ticks and a legend if there are several series; "" without points."""
    series = [one for one in series if one.points]
    if not series:
        return ""
    xs, ys = zip(*(point for one in series for point in one.points), strict=True)
    x_ticks, y_ticks = ticks(min(xs), max(xs), width // 80), ticks(min(ys), max(ys), height // 55)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    left, right, top, bottom = 58, width - 14, 10, height - 40
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across, up = (point[0] - x_low) / (x_high - x_low), (point[1] - y_low) / (y_high - y_low)
        return round(left + across * (right - left), 1), round(bottom - up * (bottom - top), 1)

    # On a narrow screen the card scrolls rather than letting the words shrink out of sight.
    frame = f'viewBox="0 0 {width} {height}" style="min-width:{0.62 * width:.0f}px"'
    parts = [f'<svg {frame} role="img" aria-label="{escape(title)} by step">']
    for tick in y_ticks:
        y = place((x_low, tick))[1]
        parts.append(f'<path class="grid" d="M{left} {y}H{right}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{_tick(tick, y_ticks)}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x = place((tick, y_low))[0]
            parts.append(f'<path class="grid" d="M{x} {bottom}v5"/>')
            parts.append(f'<text x="{x}" y="{bottom + 19}" text-anchor="middle">{_tick(tick, x_ticks)}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 4}" text-anchor="middle">step</text>')
    for one in series:
        parts.append(one.draw([place(point) for point in _thin(one.points)], f"var(--{one.colour})"))
    legend = "".join(
        f'<span><i style="background:var(--{one.colour});opacity:{0.4 if one.draw is dots else 1}"></i>'
        f"{escape(one.name)}</span>"
        for one in series
    )
    shown_legend = f'<div class="legend">{legend}</div>' if len(series) > 1 else ""
    return f'<div class="card"><h3>{escape(title)}</h3>{shown_legend}{"".join(parts)}</svg></div>'


def dots(points: Points, colour: str) -> str:
    return f'<path class="dots" stroke="{colour}" d="{"".join(f"M{x} {y}h0" for x, y in points)}"/>'


def line(points: Points, colour: str) -> str:
    path = "L".join(f"{x} {y}" for x, y in points)
    # A single point is drawn as a dot: a path of one place has no length.
    return f'<path class="curve" stroke="{colour}" stroke-linecap="round" d="M{path}h0"/>'


def marks(points: Points, colour: str) -> str:
    circles = "".join(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>' for x, y in points)
    return line(points, colour) + circles


def smooth(points: Points) -> Points:
    """Exponential mean over about a thirtieth of the points, without the bias of its start at zero."""
    keep = 1 - 1 / max(1.0, len(points) / 30)
    mean, weight, smoothed = 0.0, 0.0, []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        smoothed.append((x, mean / weight))
    return smoothed


def ticks(low: float, high: float, most: int) -> list[float]:
    """About `most` round numbers from under `low` to over `high`, 1, 2 or 5 times a power of ten apart."""
    if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-300):
        around = max(abs(low) / 2, 1e-9)
        low, high = low - around, high + around
    raw = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [count * step for count in range(first, last + 1)]


def _tick(value: float, beside: Sequence[float]) -> str:
    step = beside[1] - beside[0]
    if not 1e-3 <= step < 1e6:
        return "0" if abs(value) < step / 2 else f"{value:.4g}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _thin(points: Points) -> Points:
    stride = math.ceil(len(points) / MOST_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]
