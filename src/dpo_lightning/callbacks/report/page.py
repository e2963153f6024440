"""What a run was and did -> `report.html`: one file that needs no network, no scripts and nothing beside it.

The page is `page.html.jinja`; here is what it shows. All text is escaped (`templates`), and a content security policy
in the page forbids loading or running anything, should something still slip through.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_lightning.callbacks.replies import Showing
from dpo_lightning.callbacks.report.charts import histogram, line_chart, number_text
from dpo_lightning.callbacks.report.history import Curve
from dpo_lightning.callbacks.report.outcome import WORDS, change, percent
from dpo_lightning.callbacks.report.templates import filled
from dpo_lightning.data.pair import PreferencePair

SHOWN_REPLIES = 5  # of a prompt: before, after, and some between
MARKS = {"sql/valid": "valid", "sql/exact": "exact", "sql/execution": "same result", "reply/eos_rate": "ended"}
SHARE = (0.0, 1.0)  # limits of an axis


def _both(metric: str) -> dict[str, str]:
    return {f"train/{metric}": "training", f"val/{metric}": "validation"}


# Of each chart: title, {metric: name of its line}, and limits of the y axis, if they are not to fit the data.
CHARTS: tuple[tuple[Any, ...], ...] = (
    ("Share of valid SQL", {f"replies/{name}": word for name, word in MARKS.items() if "sql" in name}, SHARE),
    ("Loss", _both("loss")),
    ("Accuracy: pairs with a positive margin", _both("rewards/accuracies"), SHARE),
    ("Margin, chosen − rejected reward", _both("rewards/margins")),
    ("Rewards in training", {"train/rewards/chosen": "chosen", "train/rewards/rejected": "rejected"}),
    ("Replies", {"replies/reply/eos_rate": "end by themselves", "replies/reply/repetition": "repetition"}, SHARE),
    ("KL from the reference", _both("kl")),
    ("Displaced: chosen less likely than before", _both("rewards/displaced"), SHARE),
    ("Learning rate", {"train/learning_rate": "learning rate"}),
    ("Gradient norm", {"train/grad_norm": "before clipping"}),
    ("Pairs per second", {"train/pairs_per_second": "training"}),
)


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
        tiles=[*_reply_tiles(run.showings), *_validation_tiles(run)],
        charts=[
            line_chart(title, {label: run.curves.get(name, []) for name, label in lines.items()}, *limits)
            for title, lines, *limits in CHARTS
        ],
        margins=histogram("Margins of pairs", run.margins),
        prompts=[prompt for number in range(len(run.pairs)) if (prompt := _prompt(run, number))],
    )
    return str(page)  # to be put into no other page, where it would pass unescaped


def _reply_tiles(showings: Sequence[Showing]) -> list[Tile]:
    """Of replies before and after, and of how many."""
    changes = [(words, change(showings, name)) for name, words in WORDS.items()]
    return [Tile(found.values, words, found.where) for words, found in changes if found]


def _validation_tiles(run: Run) -> list[Tile]:
    """Only what was measured, and when."""
    tiles = []
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


def _prompt(run: Run, number: int) -> dict[str, object] | None:
    """One prompt with its replies before, during and after, and the wanted one; None where nothing was answered."""
    answered = [showing for showing in run.showings if number < len(showing.texts)]
    if not answered:
        return None
    last = len(answered) - 1
    picked = sorted({round(i * last / (SHOWN_REPLIES - 1)) for i in range(SHOWN_REPLIES)})
    replies = [
        {
            "when": "before" if showing.step == 0 else f"step {showing.step}",
            "text": showing.texts[number].strip(),
            "judged": {
                word: flag for name, word in MARKS.items() if (flag := showing.judged[number].get(name)) is not None
            },
        }
        for showing in (answered[i] for i in picked)
    ]
    pair = run.pairs[number]
    return {"text": pair.prompt, "replies": replies, "wanted": pair.chosen.strip()}
