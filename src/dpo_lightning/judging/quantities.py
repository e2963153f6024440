"""The words for verdicts wherever people read them: reports, charts, closing lines.

Names are those of logged metrics without their prefix (`replies/`, `val/`, `test/`).
"""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple


class Quantity(NamedTuple):
    """How a verdict is presented: its mean over many replies, and the verdict on one reply."""

    label: str  # of the mean, on its own
    word: str | None = None  # for one reply, and in charts with a title; None: not reported for one reply
    share: bool = False  # the mean is in [0, 1] and printed as a percentage; the verdict is yes or no
    better: Literal["higher", "lower"] | None = "higher"  # None: neither, so it is no result of a run


QUANTITIES: dict[str, Quantity] = {}  # by the name of a verdict; `kinds` enters the package's own
TITLES: dict[str, str] = {}  # of the charts with a judge's verdicts, by the judge's name
UNJUDGED = "unjudged"  # the verdict of a judge on whether it failed on a reply


def quantity(name: str) -> Quantity:
    """The entry for a name; a user's verdict without one counts as a number, and higher is better."""
    judge, _, verdict = name.rpartition("/")
    if verdict == UNJUDGED and name not in QUANTITIES:
        return Quantity(f"replies on which {judge} failed", share=True, better=None)
    return QUANTITIES.get(name) or Quantity(name, verdict)


def reply_tag(name: str) -> str:
    """The tag of a verdict's mean among the logged curves: "sql/valid" -> "replies/sql/valid".

    The verdicts on any reply are directly there: "reply/length" -> "replies/length".
    """
    return f"replies/{name.removeprefix('reply/')}"


def verdict_of(tag: str) -> str | None:
    """The verdict whose mean has a tag, None for other tags. Older runs have tags such as "replies/reply/length"."""
    prefix, _, name = tag.partition("/")
    if prefix != "replies":
        return None
    return name if "/" in name else f"reply/{name}"


def percent(share: float) -> str:
    """0.857 -> "86%"; "0%" and "100%" are exact: 0.001 -> "<1%", 0.999 -> ">99%"."""
    if 0 < share < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= share < 1 else f"{share:.0%}"


def number_text(value: float) -> str:
    """A short form of a number: 0.000025 -> 2.5e-5, 12000 -> 12000, 3412.7 -> 3413, 0.69314 -> 0.693."""
    if (value == int(value) or abs(value) >= 1000) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")


def mean_text(name: str, mean: float) -> str:
    """The mean of a verdict for people: "86%" of a share, otherwise a number, "23.8"; "unknown" for nan."""
    if mean != mean:
        return "unknown"
    return percent(mean) if quantity(name).share else number_text(mean)


def means_text(means: Mapping[str, float]) -> str:
    """The results among some means, and shares of failures above 0: "valid SQL 86%, exactly the wanted SQL 84%"."""
    told = [name for name, mean in means.items() if quantity(name).better or quantity(name).share and mean > 0]
    return ", ".join(f"{quantity(name).label} {mean_text(name, means[name])}" for name in told)


def results(names: Iterable[str]) -> list[str]:
    """The names that say how good a run's replies are, in the given order."""
    return [name for name in names if quantity(name).better]


def reply_charts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """A chart of each judge's results: {"SQL: valid, exact": {"sql/valid": "valid", "sql/exact": "exact"}}."""
    charts: dict[str, dict[str, str]] = {}
    for name in results(names):
        judge, _, verdict = name.partition("/")
        charts.setdefault(judge, {})[name] = quantity(name).word or verdict
    return {f"{TITLES.get(judge, judge)}: {', '.join(words.values())}": words for judge, words in charts.items()}


def what_is_good(names: Iterable[str]) -> str:
    """A sentence on where means should go: "Should rise: ended. Should stay low: repetition."."""
    words: dict[str, list[str]] = {"higher": [], "lower": []}
    for name in results(names):
        words[str(quantity(name).better)].append(quantity(name).word or name.rpartition("/")[2])
    parts = [("Should rise", words["higher"]), ("Should stay low", words["lower"])]
    return " ".join(f"{verb}: {', '.join(those)}." for verb, those in parts if those)


def marks(verdicts: Mapping[str, bool | float | None]) -> list[tuple[str, bool]]:
    """The yes-or-no verdicts on one reply: {"sql/valid": True, "reply/length": 9} -> [("valid", True)]."""
    known = [(quantity(name), verdict) for name, verdict in verdicts.items() if verdict is not None]
    return [(kind.word, bool(value)) for kind, value in known if kind.word and (kind.share or isinstance(value, bool))]
