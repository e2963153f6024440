"""What is judged of replies and what it is called wherever people read it: reports, charts, closing lines.

The keys are the names of logged metrics without what goes before them (`replies/`, `val/`, `test/`).
"""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple


class Quantity(NamedTuple):
    """A verdict's mean over many replies, and the verdict on one."""

    label: str  # of the mean, where it stands alone
    word: str | None = None  # of the verdict on one reply, and in charts that have a title; None: not told of one reply
    share: bool = False  # in [0, 1], read as a percentage; of one reply it is yes or no
    better: Literal["higher", "lower"] | None = "higher"  # None: neither, so it is not among a run's results


QUANTITIES = {
    "sql/valid": Quantity("valid SQL", "valid", share=True),
    "sql/exact": Quantity("exactly the wanted SQL", "exact", share=True),
    "sql/execution": Quantity("same result as wanted", "same result", share=True),
    "sql/unjudged": Quantity("results that could not be compared", share=True, better=None),
    "reply/eos_rate": Quantity("replies that end by themselves", "ended", share=True),
    "reply/length": Quantity("tokens of a reply", better=None),
    "reply/repetition": Quantity("4-grams that came before in the reply", share=True, better="lower"),
}
TITLES = {"sql": "SQL", "reply": "Replies"}  # of the charts with a judge's verdicts


def quantity(name: str) -> Quantity:
    """What is known of a name; of one that only a user's judge knows, that it is a number and the higher the better."""
    return QUANTITIES.get(name) or Quantity(name, name.rpartition("/")[2])


def results(names: Iterable[str]) -> list[str]:
    """Those of the names that tell how good a run's replies are, in their order."""
    return [name for name in names if quantity(name).better]


def reply_charts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Charts of a judge's results: {"SQL: valid, exact": {"sql/valid": "valid", "sql/exact": "exact"}}."""
    charts: dict[str, dict[str, str]] = {}
    for name in results(names):
        judge, _, verdict = name.partition("/")
        charts.setdefault(judge, {})[name] = quantity(name).word or verdict
    return {f"{TITLES.get(judge, judge)}: {', '.join(words.values())}": words for judge, words in charts.items()}


def marks(verdicts: Mapping[str, bool | float | None]) -> list[tuple[str, bool]]:
    """What one reply is and is not: {"sql/valid": True, "sql/exact": None, "reply/length": 9} -> [("valid", True)]."""
    told = [(quantity(name), verdict) for name, verdict in verdicts.items() if verdict is not None]
    return [(of.word, bool(verdict)) for of, verdict in told if of.word and (of.share or isinstance(verdict, bool))]
