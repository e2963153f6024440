"""Numbers -> small SVG charts as text, for a page that must work alone: no scripts, no fonts, no libraries.

Colours are the page's: series n is drawn in the CSS variable `--series-n`, lines and text in `currentColor`.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

from dpo_lightning.visible import visible

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 28  # margins around the plot
SERIES_COLOURS = 4
MAX_POINTS = 300  # of a line; more would only make the page heavy
LARGEST = 1e100  # that is drawn; no NaN, no infinity, nothing whose difference to another overflows

Points = Sequence[tuple[float, float]]


def line_chart(title: str, series: Mapping[str, Points], limits: tuple[float, float] | None = None) -> str:
    """A figure with a line for each named series of (x, y) points, or nothing where none can be drawn.

    Args:
        limits: of the y axis; left out, they fit the data.
    """
    series = {name: _thinned([(x, y) for x, y in points if abs(y) < LARGEST]) for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_ticks = ticks(min(xs), max(xs))
    y_ticks = ticks(*(limits or (min(ys), max(ys))))
    plot = _Plot(x_ticks, y_ticks)
    shapes = [plot.axes()]
    for number, (name, points) in enumerate(series.items()):
        colour = f"var(--series-{number % SERIES_COLOURS})"
        path = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in points)
        width = max(1.5, 4 - number)  # so that a line shows under another with the same values
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        shapes += [
            f'<circle cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="{width / 2 + 1}" fill="{colour}">'
            f"<title>{_safe(name)}, step {number_text(x)}: {number_text(y)}</title></circle>"
            for x, y in points
        ]
    return _figure(title, list(series), shapes)


def histogram(title: str, series: Mapping[str, Sequence[float]], bins: int = 30) -> str:
    """A figure with the distribution of each named series, all over the same bins, or nothing where there is none."""
    series = {name: [v for v in values if abs(v) < LARGEST] for name, values in series.items()}
    series = {name: values for name, values in series.items() if values}
    if not series:
        return ""
    x_ticks = ticks(min(map(min, series.values())), max(map(max, series.values())))
    low, width = x_ticks[0], (x_ticks[-1] - x_ticks[0]) / bins
    counts = {name: [0] * bins for name in series}
    for name, values in series.items():
        for value in values:
            counts[name][min(bins - 1, int((value - low) / width))] += 1
    plot = _Plot(x_ticks, ticks(0, max(map(max, counts.values()))))
    shapes = [plot.axes()]
    for number, (name, heights) in enumerate(counts.items()):
        colour = f"var(--series-{number % SERIES_COLOURS})"
        for i, count in enumerate(heights):
            left, right = low + i * width, low + (i + 1) * width
            if count:
                shapes.append(
                    f'<rect x="{plot.x(left):.1f}" y="{plot.y(count):.1f}" width="{plot.x(right) - plot.x(left):.1f}" '
                    f'height="{plot.y(0) - plot.y(count):.1f}" fill="{colour}" fill-opacity="0.6">'
                    f"<title>{_safe(name)}, {number_text(left)} to {number_text(right)}: {count}</title></rect>"
                )
    return _figure(title, list(series), shapes)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that enclose low and high, evenly spaced: (0, 0.93) -> [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        space = abs(high) / 2 if abs(high) > 1e-100 else 1.0
        low, high = low - space, high + space
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number_text(value: float) -> str:
    """A number short enough for an axis: 0.000025 -> 2.5e-5, 12000 -> 12000, 0.69314 -> 0.693."""
    if value == int(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")


class _Plot:
    """Data coordinates -> SVG coordinates, from the ticks of both axes."""

    def __init__(self, x_ticks: list[float], y_ticks: list[float]) -> None:
        self.x_ticks, self.y_ticks = x_ticks, y_ticks

    def x(self, value: float) -> float:
        share = (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> str:
        """Grid lines and the numbers at them."""
        lines = [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(value):.1f}" y2="{self.y(value):.1f}" class="grid"/>'
            f'<text x="{LEFT - 6}" y="{self.y(value) + 4:.1f}" text-anchor="end">{number_text(value)}</text>'
            for value in self.y_ticks
        ]
        lines += [
            f'<text x="{self.x(value):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number_text(value)}</text>'
            for value in self.x_ticks
        ]
        return "".join(lines)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every n-th point, and the last one."""
    every = math.ceil(len(points) / MAX_POINTS)
    return points[::every] + ([points[-1]] if every > 1 and (len(points) - 1) % every else []) if points else []


def _figure(title: str, names: list[str], shapes: list[str]) -> str:
    legend = "".join(
        f'<span><i style="background:var(--series-{number % SERIES_COLOURS})"></i>{_safe(name)}</span>'
        for number, name in enumerate(names)
    )
    return (
        f"<figure><figcaption><b>{_safe(title)}</b>{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_safe(title)}">{"".join(shapes)}</svg></figure>'
    )


def _safe(text: str) -> str:
    return escape(visible(text))
