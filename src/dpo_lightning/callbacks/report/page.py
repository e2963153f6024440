"""What a run was and did -> `report.html`: one file that needs no network, no scripts and nothing beside it.

The page is `page.html.jinja`; here is what it shows. All text is escaped (`templates`), and a content security policy
in the page forbids loading or running anything, should something still slip through.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dpo_lightning.callbacks.replies import Showing
from dpo_lightning.callbacks.report.charts import histogram, line_chart, number_text
from dpo_lightning.callbacks.report.history import Curve
from dpo_lightning.callbacks.report.outcome import change, judged_quantities, percent
from dpo_lightning.callbacks.report.templates import filled
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.judging.quantities import marks, quantity, reply_charts

REPLIES = 5  # of a prompt: before, after, and some between


class Run(NamedTuple):
    """All that the report tells."""

    title: str
    outcome: str  # one sentence: finished, or stopped where and why
    facts: Mapping[str, str]  # what was trained on what
    settings: Mapping[str, object]
    curves: Mapping[str, Curve]
    margins: Mapping[str, Sequence[float]]  # name of a validation -> margin of every pair
    pairs: Sequence[PreferencePair]
    showings: Sequence[Showing]
    costs: Mapping[str, str]
    warnings: Sequence[str]
    val_pairs: int = 0  # pairs that each validation is about


class Tile(NamedTuple):
    """A number that matters, what it is, and of how many or since when."""

    value: str
    words: str
    where: str


def render(run: Run) -> str:
    """The page."""
    page = filled(
        "page.html.jinja",
        run=run,
        tiles=_tiles(run),
        charts=_charts(run.curves),
        margins=histogram("Margins of pairs", run.margins),
        prompts=[prompt for number in range(len(run.pairs)) if (prompt := _prompt(run, number))],
    )
    return str(page)  # to be put into no other page, where it would pass unescaped


def _tiles(run: Run) -> list[Tile]:
    """What matters most: of replies before and after, of how many; of validations only what was measured, and when."""
    changes = [(quantity(name).label, change(run.showings, name)) for name in judged_quantities(run.showings)]
    tiles = [Tile(found.values, words, found.where) for words, found in changes if found]
    for name, words, as_text in (
        ("val/rewards/accuracies", "pairs with a positive margin", percent),
        ("val/loss", "validation loss", number_text),
    ):
        # A point's step counts from 0.
        points = [(step + 1, value) for step, value in run.curves.get(name, []) if math.isfinite(value)]
        if points:
            ends = points[:1] + points[1:][-1:]
            when = " and ".join(str(step) for step, _ in ends)
            of = f"of {run.val_pairs} validation pairs, " if run.val_pairs else ""
            where = f"{of}after {when} step{'s' * (when != '1')}"
            tiles.append(Tile(" → ".join(as_text(value) for _, value in ends), words, where))
    return tiles


def _charts(curves: Mapping[str, Curve]) -> tuple[str, ...]:
    def chart(title: str, names: Mapping[str, str], limits: tuple[float, float] | None = None) -> str:
        return line_chart(title, {label: curves.get(name, []) for name, label in names.items()}, limits)

    def both(metric: str) -> dict[str, str]:
        return {f"train/{metric}": "training", f"val/{metric}": "validation"}

    share = (0.0, 1.0)
    judged = reply_charts(name.removeprefix("replies/") for name in curves if name.startswith("replies/"))
    replies = [
        chart(
            title,
            {f"replies/{name}": words[name] for name in words},
            share if all(quantity(name).share for name in words) else None,
        )
        for title, words in judged.items()
    ]
    rewards = {"train/rewards/chosen": "chosen", "train/rewards/rejected": "rejected"}
    return (
        *replies,
        chart("Loss", both("loss")),
        chart("Accuracy: pairs with a positive margin", both("rewards/accuracies"), share),
        chart("Margin, chosen − rejected reward", both("rewards/margins")),
        chart("Rewards in training", rewards),
        chart("KL from the reference", both("kl")),
        chart("Displaced: chosen less likely than before", both("rewards/displaced"), share),
        chart("Learning rate", {"train/learning_rate": "learning rate"}),
        chart("Gradient norm", {"train/grad_norm": "before clipping"}),
        chart("Pairs per second", {"train/pairs_per_second": "training"}),
    )


def _prompt(run: Run, number: int) -> dict[str, object] | None:
    """One prompt with its replies before, during and after, and the wanted one; None where nothing was answered."""
    answered = [showing for showing in run.showings if number < len(showing.texts)]
    if not answered:
        return None
    last = len(answered) - 1
    picked = sorted({round(i * last / (REPLIES - 1)) for i in range(REPLIES)})
    replies = [
        {
            "when": "before" if showing.step == 0 else f"step {showing.step}",
            "text": showing.texts[number].strip(),
            "judged": marks(showing.judged[number]),
        }
        for showing in (answered[i] for i in picked)
    ]
    pair = run.pairs[number]
    return {"text": pair.prompt, "replies": replies, "wanted": pair.chosen.strip()}
