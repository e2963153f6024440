"""The charts of a run's curves, for the report and for TensorBoard: one title and one word for each curve in both."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dpo_lightning.judging.quantities import quantity, reply_charts, reply_tag, verdict_of, what_is_good


class Chart(NamedTuple):
    """Curves in one picture."""

    title: str
    curves: Mapping[str, str]  # the tag of a curve -> its word
    good: str  # a sentence on what good looks like
    share: bool = False  # all values are in [0, 1]
    group: str = "Learning"  # the section


def _both(metric: str) -> dict[str, str]:
    return {f"train/{metric}": "training", f"val/{metric}": "validation"}


CHARTS = (
    Chart(
        "Loss",
        _both("loss"),
        "Falls, then levels off. If validation rises again while training falls, the pairs are learnt by heart.",
    ),
    Chart(
        "Accuracy: pairs with a positive margin",
        _both("rewards/accuracies"),
        "Rises towards 1, in validation as in training. It says nothing about the replies: look at those as well.",
        share=True,
    ),
    Chart(
        "Margin: chosen − rejected reward",
        _both("rewards/margins"),
        "Rises from 0. If it still rises when the replies no longer change, the run could have ended earlier.",
    ),
    Chart(
        "Rewards in training",
        {"train/rewards/chosen": "chosen", "train/rewards/rejected": "rejected"},
        "Chosen stays at 0 or above, rejected falls. Both falling is displacement: try dpop, or add sft to the loss.",
    ),
    Chart(
        "Log-probs: chosen and rejected",
        {
            "train/logps/chosen": "chosen",
            "train/logps/rejected": "rejected",
            "val/logps/chosen": "chosen (val)",
            "val/logps/rejected": "rejected (val)",
        },
        "In nats for a completion. Chosen rises or holds, since it is what the model should say. Rejected may fall.",
    ),
    Chart(
        "Displaced: chosen less likely than before",
        _both("rewards/displaced"),
        "Stays low. Above a half, most chosen completions have become less likely than before training.",
        share=True,
    ),
    Chart(
        "KL from the reference",
        _both("kl"),
        "Rises from 0 and levels off: how far the model has moved, in nats a token. A larger beta keeps it nearer.",
        group="Diagnostics",
    ),
    Chart(
        "Displaced first token of chosen",
        _both("rewards/first_displaced"),
        "Stays near 0: replies still begin as they should.",
        share=True,
        group="Diagnostics",
    ),
    Chart(
        "Reference point of kto",
        {"train/reference_point": "training"},
        "Rises slowly: an estimate of the KL that rewards are compared with.",
        group="Diagnostics",
    ),
    Chart(
        "Gradient left in the loss",
        {"train/gradient_weight": "training"},
        "Falls from about twice beta. Near 0 the pairs have nothing left to teach.",
        group="Diagnostics",
    ),
    Chart(
        "Gradient norm",
        {"train/grad_norm": "before clipping"},
        "Settles. Peaks that grow mean a learning rate that is too high.",
        group="Diagnostics",
    ),
    Chart(
        "Learning rate", {"train/learning_rate": "training"}, "As scheduled: warm-up, then decay.", group="Diagnostics"
    ),
    Chart(
        "Pairs per second",
        {"train/pairs_per_second": "training"},
        "Level. It varies with the length of the pairs.",
        group="Diagnostics",
    ),
)


def judged_charts(tags: Iterable[str]) -> list[Chart]:
    """A chart for each judge whose verdicts are among the tags."""
    verdicts = [name for tag in tags if (name := verdict_of(tag))]
    charts = []
    for title, words in reply_charts(verdicts).items():
        share = all(quantity(name).share for name in words)
        curves = {reply_tag(name): word for name, word in words.items()}
        charts.append(Chart(title, curves, what_is_good(words), share, "Replies"))
    return charts
