"""The report as HTML: one file that needs no network, no scripts and no other files.

The layout is `page.html.jinja`; its contents are selected here. All text is escaped (`templates`), and as a second
barrier the page's content security policy forbids to load or run anything.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dpo_lightning.callbacks.replies import Showing
from dpo_lightning.callbacks.report.charts import histogram, line_chart, number_text
from dpo_lightning.callbacks.report.history import Curve
from dpo_lightning.callbacks.report.outcome import Change, changes, percent
from dpo_lightning.callbacks.report.templates import filled
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.judging.quantities import marks, quantity, reply_charts

REPLIES = 5  # to each prompt: the first, the last, and some between


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


def render(run: Run) -> str:
    """The page."""
    page = filled(
        "page.html.jinja",
        title=run.title,
        run=run,
        tiles=_tiles(run),
        charts=[line_chart(*chart) for chart in charts(run.curves)],
        margins=histogram("Margins of pairs", run.margins),
        forgetting=_forgetting(run.curves),
        prompts=[prompt for number in range(len(run.pairs)) if (prompt := _prompt(run, number))],
    )
    return str(page)  # no longer Markup, which another template would not escape


def _tiles(run: Run) -> list[Change]:
    """The most important results: of the replies before and after training, then of the validations."""
    tiles = changes(run.showings)
    for name, label, as_text in (
        ("val/rewards/accuracies", "pairs with a positive margin", percent),
        ("val/loss", "validation loss", number_text),
    ):
        # Lightning counts steps from 0.
        points = [(step + 1, value) for step, value in run.curves.get(name, []) if math.isfinite(value)]
        if points:
            ends = points[:1] + points[1:][-1:]
            when = " and ".join(str(step) for step, _ in ends)
            of = f"of {run.val_pairs} validation pairs, " if run.val_pairs else ""
            where = f"{of}after {when} step{'s' * (when != '1')}"
            tiles.append(Change(label, " → ".join(as_text(value) for _, value in ends), where))
    return tiles


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


def charts(curves: Mapping[str, Curve]) -> list[tuple[str, dict[str, Curve], bool]]:
    """The charts of a run: a title, the curves by their names in the chart, and whether all of them are shares."""

    def both(metric: str) -> dict[str, str]:
        return {f"train/{metric}": "training", f"val/{metric}": "validation"}

    judged = reply_charts(name.removeprefix("replies/") for name in curves if name.startswith("replies/"))
    shares = {title for title, words in judged.items() if all(quantity(name).share for name in words)}
    metrics = {title: {f"replies/{name}": word for name, word in words.items()} for title, words in judged.items()} | {
        "Loss": both("loss"),
        "Accuracy: pairs with a positive margin": both("rewards/accuracies"),
        "Margin, chosen − rejected reward": both("rewards/margins"),
        "Rewards in training": {"train/rewards/chosen": "chosen", "train/rewards/rejected": "rejected"},
        "KL from the reference": both("kl"),
        "Reference point of kto": {"train/reference_point": "training"},
        "Displaced: chosen less likely than before": both("rewards/displaced"),
        "Displaced first token of chosen": both("rewards/first_displaced"),
        "Gradient left in the loss": {"train/gradient_weight": "training"},
        "Learning rate": {"train/learning_rate": "learning rate"},
        "Gradient norm": {"train/grad_norm": "before clipping"},
        "Pairs per second": {"train/pairs_per_second": "training"},
    }
    shares |= {"Accuracy: pairs with a positive margin", "Displaced: chosen less likely than before"}
    shares |= {"Displaced first token of chosen"}
    return [
        (title, {label: curves.get(name, []) for name, label in names.items()}, title in shares)
        for title, names in metrics.items()
    ]


def _prompt(run: Run, number: int) -> dict[str, object] | None:
    """A prompt with its replies before, during and after training, and the wanted one; None without any reply."""
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
