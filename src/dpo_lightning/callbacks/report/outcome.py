"""What changed between the first and the last replies, in words: for the last lines of a run and the report's tiles."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dpo_lightning.callbacks.replies import Showing
from dpo_lightning.judging.quantities import mean_text, quantity, results
from dpo_lightning.visible import one_line

ALL = "reply/eos_rate"  # every reply has this verdict, so its count is that of the replies


class Change(NamedTuple):
    """How a result changed from its first to its last value."""

    label: str
    values: str  # "0% → 86%", or a single value if there is one or it stayed the same
    where: str  # "on 96 questions" or "of 8 validation pairs", and when


def changes(showings: Sequence[Showing]) -> list[Change]:
    """The change of each result that was judged, those of the last replies first."""
    names = results(dict.fromkeys(name for showing in reversed(showings) for name in showing.shares))
    return [change for name in names if (change := _change(showings, name))]


def _change(showings: Sequence[Showing], name: str) -> Change | None:
    known = [showing for showing in showings if math.isfinite(showing.shares.get(name, math.nan))]
    if not known:
        return None
    first, last = known[0], known[-1]
    values = list(dict.fromkeys(mean_text(name, showing.shares[name]) for showing in (first, last)))
    counts = sorted({showing.counts[name] for showing in (first, last) if showing.counts and name in showing.counts})
    where = [f"on {' to '.join(map(str, counts))} question{'s' * (counts != [1])}"] if counts else []
    if first is last:
        where.append("before training" if first.step == 0 else f"at step {first.step}")
    elif first.step:
        where.append(f"since step {first.step}")  # the verdict was missing before
    return Change(quantity(name).label, " → ".join(values), ", ".join(where))


def closing_lines(showings: Sequence[Showing], steps: int, paths: Mapping[str, object]) -> str:
    """The result of a run: a line with a mean before → after, on how many questions, and one for each of its files.

    Args:
        steps: optimizer steps of the run.
        paths: for example {"model": a folder, "report": a file}.
    """
    return "\n".join([_summary(showings, steps), *(one_line(f"{name}: {path}") for name, path in paths.items())])


def _summary(showings: Sequence[Showing], steps: int) -> str:
    judged = changes(showings)
    if not judged or len(showings) < 2:
        return f"trained for {steps} step{'s' * (steps != 1)}"
    (label, values, where), last = judged[0], showings[-1]
    asked = (last.counts or {}).get(ALL)
    if last.changed == 0 and asked:
        since = f"at step {showings[0].step}" if showings[0].step else "before training"
        still = f"all {asked} replies are still what they were" if asked > 1 else "the only reply is still what it was"
        return f"{still} {since} ({label}: {values})"
    if "→" in values:
        return f"{label} {values} {where}"
    other = f"; {last.changed} of the {asked} replies have changed" if asked else ""
    return f"{label} still {values} {where}{other}"
