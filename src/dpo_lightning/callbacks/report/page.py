"""The report as HTML: one file that needs no network, no scripts and no other files.

The layout is `page.html.jinja`; its contents are selected here. All text is escaped (`templates`), and as a second
barrier the page's content security policy forbids to load or run anything.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from dpo_lightning.callbacks.curves import CHARTS, Chart, judged_charts
from dpo_lightning.callbacks.replies import Showing
from dpo_lightning.callbacks.report.charts import histogram, line_chart
from dpo_lightning.callbacks.report.history import Curve
from dpo_lightning.callbacks.report.outcome import Change, changes
from dpo_lightning.callbacks.report.templates import filled
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.judging.quantities import marks, number_text, percent

REPLIES = 5  # to each prompt: the first, the last, and some between
SHORT = 110  # characters of a prompt's end that stand for it
MARGINS = "Before training every margin is 0. Pairs should move to the right, and few stay below 0."


class Run(NamedTuple):
    """The contents of a report."""

    title: str
    outcome: str  # one sentence: finished, or why and when it stopped
    facts: Mapping[str, str]  # what was trained on what
    settings: Mapping[str, object]
    curves: Mapping[str, Curve]
    margins: Mapping[str, Sequence[float]]  # name of a validation -> margin of every pair
    pairs: Sequence[PreferencePair]
    showings: Sequence[Showing]
    costs: Mapping[str, str]
    warnings: Sequence[str]
    val_pairs: int = 0  # pairs in each validation
    again: Mapping[str, str] = {}  # what it takes to run this again: command, commit, seeds


def render(run: Run) -> str:
    """The page."""
    page = filled(
        "page.html.jinja",
        title=run.title,
        run=run,
        tiles=tiles(run),
        groups=_charts(run),
        forgetting=_forgetting(run.curves),
        prompts=[prompt for number in range(len(run.pairs)) if (prompt := _prompt(run, number))],
    )
    return str(page)  # no longer Markup, which another template would not escape


def tiles(run: Run) -> list[Change]:
    """The most important results: of the replies before and after training, then of the validations."""
    found = changes(run.showings)
    for name, label, as_text in (
        ("val/rewards/accuracies", "pairs with a positive margin", percent),
        ("val/loss", "validation loss", number_text),
    ):
        points = [(step, value) for step, value in points_of(run.curves, name) if math.isfinite(value)]
        if points:
            ends = points[:1] + points[1:][-1:]
            when = " and ".join(str(step) for step, _ in ends)
            of = f"of {run.val_pairs} validation pairs, " if run.val_pairs else ""
            where = f"{of}after {when} step{'s' * (when != '1')}"
            found.append(Change(label, " → ".join(as_text(value) for _, value in ends), where))
    return found


def _forgetting(curves: Mapping[str, Curve]) -> dict[str, str]:
    """What training cost elsewhere (`ForgettingCallback`), {} where it was not measured."""
    perplexity, reference, kl = (
        [value for _, value in curves.get(f"forgetting/{name}", [])]
        for name in ("perplexity", "reference_perplexity", "kl")
    )
    rows = {"perplexity of the policy": " → ".join(map(number_text, perplexity[:1] + perplexity[1:][-1:]))}
    rows |= {"perplexity of the reference": number_text(reference[-1])} if reference else {}
    rows |= {"KL of the policy from the reference": f"{number_text(kl[-1])} nats a token"} if kl else {}
    return rows if perplexity else {}


def points_of(curves: Mapping[str, Curve], tag: str) -> Curve:
    """A curve by the number of steps that were made: Lightning counts from 0, the callback for replies does not."""
    later = 0 if tag.startswith("replies/") else 1
    return [(step + later, value) for step, value in curves.get(tag, [])]


def charts(curves: Mapping[str, Curve]) -> list[tuple[Chart, dict[str, Curve]]]:
    """The charts of a run, each with its curves by their words in it; a curve may be empty."""
    return [
        (chart, {word: points_of(curves, tag) for tag, word in chart.curves.items()})
        for chart in (*judged_charts(curves), *CHARTS)
    ]


def _charts(run: Run) -> dict[str, list[str]]:
    """The charts that have a curve, by their group."""
    groups: dict[str, list[str]] = {}
    for chart, series in charts(run.curves):
        if figure := line_chart(chart.title, series, chart.share, chart.good):
            groups.setdefault(chart.group, []).append(figure)
    if margins := histogram("Margins of validation pairs", run.margins, good=MARGINS):
        groups.setdefault("Learning", []).append(margins)
    return groups


def _prompt(run: Run, number: int) -> dict[str, object] | None:
    """A prompt with its replies before, during and after training, and the wanted one; None without any reply."""
    answered = [showing for showing in run.showings if number < len(showing.texts)]
    if not answered:
        return None
    same = groupby(answered, lambda showing: (showing.texts[number], showing.judged[number]))
    groups = [list(showings) for _, showings in same]  # of steps with the same reply
    last = len(groups) - 1
    picked = sorted({round(i * last / (REPLIES - 1)) for i in range(REPLIES)})
    replies = [
        {
            "when": _when(groups[i]),
            "text": groups[i][0].texts[number].strip(),
            "judged": marks(groups[i][0].judged[number]),
        }
        for i in picked
    ]
    pair = run.pairs[number]
    return {"text": pair.prompt, "short": shortened(pair.prompt), "replies": replies, "wanted": pair.chosen.strip()}


def shortened(prompt: str) -> str:
    """The last lines of a prompt, as many as fit, or the end of the last one."""
    kept = ""
    for line in reversed(prompt.split("\n")):
        if len(longer := f"{' '.join(line.split())} {kept}".strip()) > SHORT:
            return f"… {kept or longer[-SHORT:]}"
        kept = longer
    return kept


def _when(showings: Sequence[Showing]) -> str:
    first, last = showings[0].step, showings[-1].step
    if first == last:
        return f"step {first}" if first else "before"
    return f"step {first} to {last}" if first else f"before, and to step {last}"
