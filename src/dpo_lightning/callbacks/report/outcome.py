"""The first and the last replies of a run -> what has changed, in words: the closing line and the report's tiles."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dpo_lightning.callbacks.replies import Showing
from dpo_lightning.judging.quantities import quantity, results

ALL = "reply/eos_rate"  # can be told of every reply, so it counts them


class Change(NamedTuple):
    """How a mean over the replies went from the first showing to the last."""

    values: str  # "0% → 86%"; one value where there is one showing, or where it stayed
    where: str  # "on 96 questions", and since when, if it was not before training


def percent(share: float) -> str:
    """0.857 -> "86%"; none and all are only what is none and all: 0.001 -> "<1%", 0.999 -> ">99%"."""
    if 0 < share < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= share < 1 else f"{share:.0%}"


def judged_quantities(showings: Sequence[Showing]) -> list[str]:
    """The names of the results that were judged, the most telling first."""
    return results(dict.fromkeys(name for showing in reversed(showings) for name in showing.shares))


def change(showings: Sequence[Showing], name: str) -> Change | None:
    """What became of a mean, None where it was never known."""
    known = [showing for showing in showings if math.isfinite(showing.shares.get(name, math.nan))]
    if not known:
        return None
    first, last = known[0], known[-1]
    text = percent if quantity(name).share else "{:.3g}".format
    values = list(dict.fromkeys(text(showing.shares[name]) for showing in (first, last)))
    counts = sorted({showing.counts[name] for showing in (first, last) if name in (showing.counts or {})})
    where = [f"on {' to '.join(map(str, counts))} question{'s' * (counts != [1])}"] if counts else []
    if first is last:
        where.append("before training" if first.step == 0 else f"at step {first.step}")
    elif first.step:
        where.append(f"since step {first.step}")  # of a run that did not show its replies from its beginning
    return Change(" → ".join(values), ", ".join(where))


def closing_line(showings: Sequence[Showing], steps: int, paths: Mapping[str, object]) -> str:
    """How a run ended, in one line: before → after, on how many questions, and where things are.

    Args:
        steps: optimizer steps that were done.
        paths: such as {"model": a folder, "report": a file}.
    """
    return "; ".join([_summary(showings, steps), *(f"{name}: {path}" for name, path in paths.items())])


def _summary(showings: Sequence[Showing], steps: int) -> str:
    found = next(((name, found) for name in judged_quantities(showings) if (found := change(showings, name))), None)
    if found is None or len(showings) < 2:
        return f"trained for {steps} step{'s' * (steps != 1)}"
    (name, (values, where)), last = found, showings[-1]
    label = quantity(name).label
    asked = (last.counts or {}).get(ALL)
    if last.changed == 0 and asked:
        since = f"at step {showings[0].step}" if showings[0].step else "before training"
        return f"all {asked} replies are still what they were {since} ({label}: {values})"
    if "→" in values:
        return f"{label} {values} {where}"
    other = f"; {last.changed} of the {asked} replies have changed" if asked else ""
    return f"{label} still {values} {where}{other}"
