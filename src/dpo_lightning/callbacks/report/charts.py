"""Small SVG charts for a page without scripts, fonts and libraries.

The template `chart.html.jinja` draws them in the page's colours: series n in the CSS variable `--series-n`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_lightning.callbacks.report.templates import filled
from dpo_lightning.judging.quantities import number_text

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 28  # margins around the plot; wide labels enlarge the left and the right one
CHARACTER = 9  # largest width of a character in a tick label
LINE = 15  # height of a label
LONGEST_LABEL = 14  # characters of a name that is written at its line's end; longer ones are in a legend
SERIES_COLOURS = 6
DASHES = ("", "8 5", "2 4", "10 4 2 4")  # lines one under another are seen through the gaps
FEW_POINTS = 12  # of a line, up to which each is marked
MAX_POINTS = 300  # of a line; more would only make the file larger
LARGEST = 1e100  # values from here on, NaN and infinity are not drawn: differences would overflow

Points = Sequence[tuple[float, float]]


def line_chart(title: str, series: Mapping[str, Points], share: bool = False, good: str = "") -> str:
    """The figure of `line_plot`; "" if there is no point to draw.

    Args:
        good: a sentence on what good looks like.
    """
    plot = line_plot(series, share)
    if plot is None:
        return ""
    return filled("chart.html.jinja", title=title, plot=plot, good=good, axis="step", legend=len(plot.series) > 1)


def line_plot(series: Mapping[str, Points], share: bool = False) -> "Plot | None":
    """A line for each named series of (x, y) points; None if there is no point to draw.

    Args:
        share: the y axis is from 0 to 1, instead of fitting the data.
    """
    finite = {name: [(x, y) for x, y in points if abs(y) < LARGEST] for name, points in series.items()}
    series = {name: _thinned(points) for name, points in finite.items() if points}
    if not series:
        return None
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    at_the_end = len(series) > 1 and max(map(len, series)) <= LONGEST_LABEL
    space = RIGHT + 8 * max(map(len, series)) if at_the_end else RIGHT
    plot = Plot(ticks(min(xs), max(xs)), ticks(0, 1) if share else ticks(min(ys), max(ys)), space)
    for name, points in series.items():
        marks = [
            {"x": plot.x(x), "y": plot.y(y), "label": f"step {number_text(x)}: {number_text(y)}"} for x, y in points
        ]
        plot.add(name, points=marks)
    if at_the_end:
        plot.label_ends()
    return plot


def histogram(title: str, series: Mapping[str, Sequence[float]], bins: int = 30, good: str = "") -> str:
    """A figure with the distribution of each named series over the same bins; "" if there is no value to draw."""
    series = {name: [v for v in values if abs(v) < LARGEST] for name, values in series.items()}
    series = {name: values for name, values in series.items() if values}
    if not series:
        return ""
    x_ticks = ticks(min(map(min, series.values())), max(map(max, series.values())))
    counts = {name: np.histogram(values, bins, (x_ticks[0], x_ticks[-1])) for name, values in series.items()}
    plot = Plot(x_ticks, ticks(0, max(int(heights.max()) for heights, _ in counts.values())))
    for name, (heights, edges) in counts.items():
        bars = zip(edges[:-1].tolist(), edges[1:].tolist(), heights.tolist(), strict=True)
        plot.add(name, bars=[plot.bar(*bar) for bar in bars if bar[-1]])
    return filled("chart.html.jinja", title=title, plot=plot, good=good, axis="", legend=True)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Evenly spaced round numbers that enclose low and high: (0, 0.93) -> [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        space = abs(high) / 2 if abs(high) > 1e-100 else 1.0
        low, high = low - space, high + space
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


class Plot:
    """A chart in SVG coordinates, for the template: axes, which span their ticks, and series."""

    width, height = WIDTH, HEIGHT

    def __init__(self, x_ticks: list[float], y_ticks: list[float], right: float = RIGHT) -> None:
        self._x_ticks, self._y_ticks = x_ticks, y_ticks
        labels = [number_text(value) for value in y_ticks]
        self.left, self.right = max(LEFT, 12 + CHARACTER * max(map(len, labels))), WIDTH - right
        self.x_labels = [(self.x(value), number_text(value)) for value in x_ticks]
        self.y_labels = [(self.y(value), label) for value, label in zip(y_ticks, labels, strict=True)]
        self.series: list[dict[str, Any]] = []
        self.ends: list[dict[str, Any]] = []  # names beside the ends of their lines

    def add(self, name: str, points: Sequence[Any] = (), bars: Sequence[Any] = ()) -> None:
        """Adds a line through `points`, or `bars`, in the next colour and dash pattern.

        An earlier line is wider than a later one, which may have the same values.
        """
        number = len(self.series)
        self.series.append(
            {
                "name": name,
                "colour": f"var(--series-{number % SERIES_COLOURS})",
                "dash": DASHES[number % len(DASHES)],
                "width": round(max(1.8, 3.2 - 0.7 * number), 1),
                "points": points,
                "bars": bars,
                "radius": 5 if len(points) == 1 else 3.5 if len(points) <= FEW_POINTS else 0,
            }
        )

    def label_ends(self) -> None:
        """Puts the series' names at the ends of their lines, without overlaps."""
        ends = sorted(self.series, key=lambda series: series["points"][-1]["y"])
        lowest = TOP + 4.0
        for series in ends:
            lowest = max(lowest, series["points"][-1]["y"])
            self.ends.append({"name": series["name"], "colour": series["colour"], "y": lowest})
            lowest += LINE
        highest = float(HEIGHT - BOTTOM)
        for end in reversed(self.ends):
            end["y"] = round(min(end["y"], highest), 1)
            highest = end["y"] - LINE

    def x(self, value: float) -> float:
        """The SVG coordinate of a value on the x axis."""
        share = (value - self._x_ticks[0]) / (self._x_ticks[-1] - self._x_ticks[0])
        return round(self.left + share * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        """The SVG coordinate of a value on the y axis."""
        share = (value - self._y_ticks[0]) / (self._y_ticks[-1] - self._y_ticks[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def bar(self, left: float, right: float, count: int) -> dict[str, Any]:
        """A bar between two values on the x axis."""
        return {
            "x": self.x(left),
            "y": self.y(count),
            "width": round(self.x(right) - self.x(left), 1),
            "height": round(self.y(0) - self.y(count), 1),
            "label": f"{number_text(left)} to {number_text(right)}: {count}",
        }


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `MAX_POINTS` evenly chosen points, with the last one."""
    return points[: -1 : math.ceil(len(points) / MAX_POINTS)] + points[-1:]
