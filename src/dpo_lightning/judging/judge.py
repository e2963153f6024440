"""Judges of replies, and the means of their verdicts.

A judge is a function that takes a `Reply` and the `PreferencePair` it answers, and returns verdicts by name: True or
False, a number, or None where it cannot tell. To add one, write the function and a line of `JUDGES`, or name your own
in YAML (`my_pkg.my_module:my_judge`). `quantities.QUANTITIES` has the words for verdicts in reports and charts.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch

from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.judging.sql.judge import sql
from dpo_lightning.models.generate import Reply
from dpo_lightning.parsing import imported_function

Verdict = bool | float | None
Judge = Callable[[Reply, PreferencePair], Mapping[str, Verdict]]
Score = Callable[[Reply, PreferencePair], float | None]

NGRAM = 4


def any_reply(reply: Reply, pair: PreferencePair) -> dict[str, Verdict]:
    """Judges any reply, whatever it is about: whether it ended with EOS, its tokens, and how much it repeats itself."""
    return {
        "eos_rate": reply.stopped,
        "length": len(reply.token_ids),
        "repetition": repetition(reply.token_ids),
    }


def repetition(token_ids: Sequence[int]) -> float:
    """The share of 4-grams that repeat an earlier one: [7] * 8 -> 0.8; 0.0 for fewer than 4 tokens."""
    ngrams = [tuple(token_ids[start : start + NGRAM]) for start in range(len(token_ids) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


JUDGES: dict[str, Judge] = {"sql": sql, "reply": any_reply}


def find_judges(names: str | Sequence[str]) -> dict[str, Judge]:
    """The judges with these names and `reply`, which is part of every run, by the prefix of their verdicts.

    Raises:
        UserError: a name is unknown, a function cannot be imported, or two judges share a name.
    """
    judges: dict[str, Judge] = {}
    for name in [names] if isinstance(names, str) else names:
        if ":" not in name and name not in JUDGES:
            near = did_you_mean(name, JUDGES)
            raise UserError(
                f"replies.judge '{name}' is unknown: one of {', '.join(JUDGES)}, or my_module:my_judge{near}"
            )
        short = name.rpartition(":")[2]
        if short in judges or ":" in name and short in JUDGES:
            raise UserError(f"replies.judge '{name}': there is another judge called {short}: rename the function")
        judges[short] = _checked(name, imported_function(name, "replies.judge")) if ":" in name else JUDGES[name]
    return judges | {"reply": any_reply}


def _checked(name: str, function: Callable[..., Any]) -> Judge:
    """A user's function, with one-line errors and only verdicts that can be averaged."""

    def judge(reply: Reply, pair: PreferencePair) -> dict[str, Verdict]:
        try:
            verdicts = dict(function(reply, pair))
        except Exception as error:  # a user's function may raise anything
            raise UserError(f"replies.judge '{name}' raised {type(error).__name__}: {error}") from error
        for key, verdict in verdicts.items():
            if not isinstance(key, str) or not isinstance(verdict, Real | None):
                raise UserError(
                    f"replies.judge '{name}' returned {key!r}: {verdict!r}: its verdicts are names with True, False, a "
                    "number, or None where it cannot tell"
                )
            if verdict is not None and not isinstance(verdict, bool):
                verdicts[key] = float(verdict) if math.isfinite(verdict) else None
        return verdicts

    return judge


def find_score(setting: str) -> Score:
    """A judge as one number for each reply: 1.0 right, 0.0 wrong, None where it cannot tell; or any score.

    Args:
        setting: `sql` (the wanted query, or the same result as it), or a function of the user's own that returns the
            score, `my_module:my_score`.

    Raises:
        UserError: there is no such judge, or it does not tell right from wrong.
    """
    if setting == "sql":
        return _sql_score
    if ":" not in str(setting):
        raise UserError(f"the judge '{setting}' gives no score: give sql, or my_module:my_score")
    function = imported_function(setting, "the judge")

    def score(reply: Reply, pair: PreferencePair) -> float | None:
        try:
            value = function(reply, pair)
        except Exception as error:  # a user's function may raise anything
            raise UserError(f"the judge '{setting}' raised {type(error).__name__}: {error}") from error
        if not isinstance(value, Real | None):
            raise UserError(f"the judge '{setting}' returned {value!r}: a score is a number, or None")
        return float(value) if value is not None and math.isfinite(value) else None

    return score


def _sql_score(reply: Reply, pair: PreferencePair) -> float | None:
    found = sql(reply, pair)
    same = True if found.get("exact") else found.get("execution")
    return None if same is None else float(same)


def verdicts(judges: Mapping[str, Judge], reply: Reply, pair: PreferencePair) -> dict[str, Verdict]:
    """All judges' verdicts on one reply: {"sql/valid": True, "sql/execution": None, "reply/length": 12, ...}."""
    return {f"{name}/{key}": verdict for name, judge in judges.items() for key, verdict in judge(reply, pair).items()}


class VerdictMeans:
    """Means of verdicts by name, each over the replies that had that verdict.

    Attributes:
        totals: for each name the sum of the verdicts that are not None, and how many there are.
    """

    def __init__(self) -> None:
        self.totals: dict[str, tuple[float, int]] = {}

    def update(self, judged: Iterable[Mapping[str, Verdict]]) -> None:
        """Adds the verdicts on more replies."""
        for found in judged:
            self.merge({name: (0.0, 0) if value is None else (float(value), 1) for name, value in found.items()})

    def merge(self, totals: Mapping[str, tuple[float, int]]) -> None:
        """Adds other replies' `totals`; the names may differ."""
        for name, (total, count) in totals.items():
            before, counted = self.totals.get(name, (0.0, 0))
            self.totals[name] = (before + total, counted + count)

    def gathered(self) -> "VerdictMeans":
        """The means over the replies of all processes, each of which must call this."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        processes: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(processes, self.totals)
        means = VerdictMeans()
        for totals in processes:
            means.merge(totals)
        return means

    def compute(self) -> dict[str, float]:
        """The means, nan where no reply had a verdict."""
        return {name: total / count if count else math.nan for name, (total, count) in self.totals.items()}
