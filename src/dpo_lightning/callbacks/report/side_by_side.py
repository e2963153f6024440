"""Several runs on one page: results, settings that differ, a line for each run in every chart, and their replies."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_lightning.callbacks.curves import CHARTS, judged_charts
from dpo_lightning.callbacks.report.charts import line_chart
from dpo_lightning.callbacks.report.page import Run, points_of, shortened, tiles
from dpo_lightning.callbacks.report.templates import filled
from dpo_lightning.judging.quantities import marks


def names_of(folders: list[Path]) -> list[str]:
    """The runs' names: of their folders, or if these are the same, of the paths from what they have in common."""
    names = [folder.name for folder in folders]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath(folders)
    return [os.path.relpath(folder, common) for folder in folders]


def render_side_by_side(runs: Mapping[str, Run]) -> str:
    """The page of runs by their names."""
    results: dict[str, list[str]] = {}
    for number, run in enumerate(runs.values()):
        for tile in tiles(run):
            only_before = ", before training" if tile.where.endswith("before training") else ""
            results.setdefault(tile.label, [""] * len(runs))[number] = f"{tile.values}{only_before}"
    about = {
        "run": [run.title for run in runs.values()],
        "ended": [run.outcome for run in runs.values()],
        **{name: [run.costs.get(name, "") for run in runs.values()] for name in ("speed", "peak memory")},
    }
    settings = dict.fromkeys(name for run in runs.values() for name in run.settings)
    values = {name: [_text(run.settings.get(name, "")) for run in runs.values()] for name in settings}
    page = filled(
        "side_by_side.html.jinja",
        title=f"{len(runs)} runs side by side",
        runs=list(runs),
        results=results,
        about=about,
        settings={name: row for name, row in values.items() if len(set(row)) > 1},
        groups=_charts(runs),
        prompts=_prompts(runs),
    )
    return str(page)


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _charts(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """A chart for each curve that at least one run has more than a point of, by their group."""
    groups: dict[str, list[str]] = {}
    tags = dict.fromkeys(tag for run in runs.values() for tag in run.curves)
    for chart in (*judged_charts(tags), *CHARTS):
        topic = chart.title.partition(": ")[0]
        for tag, word in chart.curves.items():
            series = {name: points_of(run.curves, tag) for name, run in runs.items()}
            if max(map(len, series.values())) > 1:
                figure = line_chart(
                    f"{topic}: {word}", series, chart.share, chart.good if len(chart.curves) == 1 else ""
                )
                groups.setdefault(chart.group, []).append(figure)
    return {group: list(filter(None, figures)) for group, figures in groups.items()}


def _prompts(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """The prompts that all runs answered, with the last reply of each."""
    first, *others = runs.values()
    prompts = []
    for pair in first.pairs:
        if not all(any(pair.prompt == other.prompt for other in run.pairs) for run in others):
            continue
        replies = []
        for name, run in runs.items():
            number = next(number for number, other in enumerate(run.pairs) if other.prompt == pair.prompt)
            answered = [showing for showing in run.showings if number < len(showing.texts)]
            if answered:
                last = answered[-1]
                judged = marks(last.judged[number])
                replies.append({"when": name, "text": last.texts[number].strip(), "judged": judged})
        if replies:
            text, short = pair.prompt, shortened(pair.prompt)
            prompts.append({"text": text, "short": short, "replies": replies, "wanted": pair.chosen.strip()})
    return prompts
