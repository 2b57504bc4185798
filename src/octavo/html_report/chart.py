"""Line charts over steps as inline SVG, with axes, round ticks and a legend. Colors are CSS variables of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Points = list[tuple[float, float]]

# More points would make the page of a long run slow, and are denser than the pixels of a screen.
MAX_POINTS = 1500
LARGE = 600  # pixels of width


@dataclass(frozen=True)
class Series:
    """One curve of a chart: points (x, y), the CSS variable of its color, and the function that draws it.

    A curve without a name is not in the legend.
    """

    name: str
    points: Points
    color: str
    draw: Callable[[Points, str], str]


def draw(title: str, series: Sequence[Series], *, width: int, height: int) -> str:
    """An HTML card with an SVG chart: axes, ticks, and a legend for several series. "" if there are no points."""
    series = [curve for curve in series if curve.points]
    if not series:
        return ""
    xs, ys = zip(*(point for curve in series for point in curve.points), strict=True)
    x_ticks, y_ticks = ticks(min(xs), max(xs), width // 80), ticks(min(ys), max(ys), height // 55)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    left, right, top, bottom = 58, width - 14, 10, height - 40
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def to_pixels(point: tuple[float, float]) -> tuple[float, float]:
        x_share, y_share = (point[0] - x_low) / (x_high - x_low), (point[1] - y_low) / (y_high - y_low)
        return round(left + x_share * (right - left), 1), round(bottom - y_share * (bottom - top), 1)

    # On a narrow screen a large chart has larger text, and the card of another one scrolls.
    large = ' class="large"' if width > LARGE else ""
    svg_attributes = f'{large} viewBox="0 0 {width} {height}" style="min-width:{0.62 * width:.0f}px"'
    parts = [f'<svg{svg_attributes} role="img" aria-label="{escape(title)} by step">']
    for tick in y_ticks:
        y = to_pixels((x_low, tick))[1]
        parts.append(f'<path class="grid" d="M{left} {y}H{right}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{_tick(tick, y_ticks)}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high and tick == int(tick):  # steps
            x = to_pixels((tick, y_low))[0]
            parts.append(f'<path class="grid" d="M{x} {bottom}v5"/>')
            parts.append(f'<text x="{x}" y="{bottom + 19}" text-anchor="middle">{tick:,.0f}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 4}" text-anchor="middle">step</text>')
    for curve in series:
        parts.append(curve.draw([to_pixels(point) for point in _downsample(curve.points)], f"var(--{curve.color})"))
    legend = "".join(
        f'<span><i style="background:var(--{curve.color});opacity:{0.4 if curve.draw is dots else 1}"></i>'
        f"{escape(curve.name)}</span>"
        for curve in series
        if curve.name
    )
    shown_legend = f'<div class="legend">{legend}</div>' if len(series) > 1 else ""
    return f'<div class="card"><h3>{escape(title)}</h3>{shown_legend}{"".join(parts)}</svg></div>'


def dots(points: Points, color: str) -> str:
    return f'<path class="dots" stroke="{color}" d="{"".join(f"M{x} {y}h0" for x, y in points)}"/>'


def line(points: Points, color: str) -> str:
    path = "L".join(f"{x} {y}" for x, y in points)
    # "h0" draws a single point as a dot; a path with one point would be invisible.
    return f'<path class="curve" stroke="{color}" stroke-linecap="round" d="M{path}h0"/>'


def marks(points: Points, color: str) -> str:
    circles = "".join(f'<circle cx="{x}" cy="{y}" r="4" fill="{color}"/>' for x, y in points)
    return line(points, color) + circles


def bars(points: Points, color: str) -> str:
    """Vertical bars; two points in a row are the ends of one."""
    pairs = zip(points[::2], points[1::2], strict=False)
    path = "".join(f"M{x} {y}V{other}M{x - 4} {y}h8M{x - 4} {other}h8" for (x, y), (_, other) in pairs)
    return f'<path class="bars" stroke="{color}" d="{path}"/>'


def ring(points: Points, color: str) -> str:
    return "".join(f'<circle class="ring" cx="{x}" cy="{y}" r="8" stroke="{color}"/>' for x, y in points)


def smooth(points: Points) -> Points:
    """Exponential moving average over about 1/30 of the points, with bias correction as in Adam.

    m_t = d m_(t-1) + (1 - d) y_t and w_t = d w_(t-1) + (1 - d); the result is m_t / w_t.
    """
    decay = 1 - 1 / max(1.0, len(points) / 30)
    mean, weight, smoothed = 0.0, 0.0, []
    for x, y in points:
        mean, weight = decay * mean + (1 - decay) * y, decay * weight + (1 - decay)
        smoothed.append((x, mean / weight))
    return smoothed


def ticks(low: float, high: float, most: int) -> list[float]:
    """About `most` ticks that cover `low` to `high`. The step is 1, 2 or 5 times a power of ten."""
    if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-300):
        margin = max(abs(low) / 2, 1e-9)
        low, high = low - margin, high + margin
    raw_step = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(raw_step))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= raw_step * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [count * step for count in range(first, last + 1)]


def _tick(value: float, ticks_of_axis: Sequence[float]) -> str:
    step = ticks_of_axis[1] - ticks_of_axis[0]
    if not 1e-3 <= step < 1e6:
        return "0" if abs(value) < step / 2 else f"{value:.4g}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _downsample(points: Points) -> Points:
    stride = math.ceil(len(points) / MAX_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]
