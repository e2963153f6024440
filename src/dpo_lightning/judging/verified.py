"""Judged replies to one prompt -> a training pair, or why there is none. Pure functions, on plain text and numbers.

Preferences pay where the rejected completion is what the model itself says and is known to be wrong (on-policy pairs:
Tajwar et al. 2024, arXiv 2404.14367), so a pair is made of a model's own replies and a judge's scores.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from dpo_lightning.judging.quantities import marks

Chosen = Literal["data", "own"]
Rejected = Literal["likeliest", "frequent"]
RIGHT = 1.0  # the score of a right reply, by judges that tell right from wrong
NOT_WRONG, NOT_RIGHT = "no wrong reply", "no right reply"
UNJUDGED, CUT = "no reply that the judge can tell", "cut off"


class Judged(NamedTuple):
    """A reply, or the data's answer, and what is known of it."""

    text: str
    score: float | None  # None: the judge cannot tell
    logp: float = 0.0  # log-prob of the whole reply under the policy at temperature 1, in nats
    stopped: bool = True  # ended by EOS


class Rule(NamedTuple):
    """How a prompt's pair is chosen.

    Without a margin a reply is right at a score of 1 and wrong below. With one, scores are compared: the rejected reply
    is the worst, and it is at least `margin` below the chosen one. Where the data have no answer, chosen is `own`.
    """

    chosen: Chosen = "data"
    rejected: Rejected = "likeliest"
    margin: float | None = None


class Pair(NamedTuple):
    """A training pair."""

    chosen: str
    rejected: str


def make_pair(answer: Judged, replies: Sequence[Judged], rule: Rule) -> Pair | str:
    """The pair of a prompt, or the reason why it has none: `NOT_WRONG`, `NOT_RIGHT` or `UNJUDGED`.

    Args:
        answer: the data's chosen completion, "" if they have none. Without a margin it counts as right, whatever its
            score.
        replies: samples of the policy, repeated ones included.
    """
    known = [reply for reply in replies if reply.score is not None and _is_text(reply.text)]
    if not known:
        return UNJUDGED
    if not answer.text.strip():
        rule = rule._replace(chosen="own")
    good, wrong = _compared(answer, known, rule) if rule.margin is not None else _told_apart(answer, known, rule)
    if good.score is None and rule.margin is not None:
        return UNJUDGED
    wrong = [reply for reply in wrong if reply.text.strip() != good.text.strip()]
    if not wrong:
        return NOT_WRONG
    if not good.text.strip():
        return NOT_RIGHT
    times = Counter(reply.text for reply in wrong)
    worst = max(
        wrong,
        key=lambda reply: (
            (reply.logp, times[reply.text]) if rule.rejected == "likeliest" else (times[reply.text], reply.logp)
        ),
    )
    return Pair(good.text, worst.text)


def _told_apart(answer: Judged, known: Sequence[Judged], rule: Rule) -> tuple[Judged, list[Judged]]:
    """The chosen completion and the wrong replies, by a judge that tells right from wrong."""
    right = [reply for reply in known if is_right(reply.score) and reply.text.strip()]
    own = max(right, key=lambda reply: reply.logp, default=answer)
    return own if rule.chosen == "own" else answer, [reply for reply in known if not is_right(reply.score)]


def _compared(answer: Judged, known: Sequence[Judged], rule: Rule) -> tuple[Judged, list[Judged]]:
    """The chosen completion and the worst replies that are far enough below it, by a judge that gives scores."""
    scores = [reply.score for reply in known if reply.score is not None]
    texts = [reply for reply in known if reply.text.strip()]
    own = max(texts, key=lambda reply: (reply.score, reply.logp), default=answer)
    good = own if rule.chosen == "own" else answer
    margin = rule.margin or 0.0
    far = good.score is not None and min(scores) < good.score and good.score - min(scores) >= margin
    return good, [reply for reply in known if far and reply.score == min(scores)]


def is_right(score: float | None) -> bool:
    """Whether a score is that of a right reply."""
    return score is not None and score >= RIGHT


def _is_text(text: str) -> bool:
    """Whether a reply can be written to a file of rows: halves of characters cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


# ---------------------------------------------------------------------- a model's replies to the held-out prompts


class HeldOut(NamedTuple):
    """A greedy reply to a held-out prompt."""

    prompt: str
    wanted: str
    reply: str
    stopped: bool
    score: float | None
    verdicts: Mapping[str, Any]  # by the judge's names


def mean_score(lines: Iterable[HeldOut]) -> float | None:
    """The mean score of the replies that could be judged: the share of right ones; None if there are none."""
    scores = [line.score for line in lines if line.score is not None]
    return sum(scores) / len(scores) if scores else None


def mistakes(lines: Sequence[HeldOut]) -> dict[str, int]:
    """How many replies are wrong in which way: each in the first verdict that fails, and only there.

    Verdicts that right replies fail as well, such as being the wanted text to the letter, are no mistakes.
    """
    harmless = {word for line in lines if is_right(line.score) for word, is_so in marks(line.verdicts) if not is_so}
    counts: Counter[str] = Counter()
    for line in lines:
        if line.score is not None and not is_right(line.score):
            failed = [word for word, is_so in marks(line.verdicts) if not is_so and word not in harmless]
            counts[CUT if not line.stopped else f"not {failed[0]}" if failed else "wrong"] += 1
    return dict(counts.most_common())


def turned(before: Sequence[HeldOut], after: Sequence[HeldOut]) -> tuple[list[int], list[int]]:
    """Positions of the prompts whose reply has turned right, and of those whose reply has turned wrong.

    With scores that are not right or wrong: those whose score has risen, and those whose score has fallen.
    """
    right: list[int] = []
    wrong: list[int] = []
    for position, (old, new) in enumerate(zip(before, after, strict=True)):
        if old.score is not None and new.score is not None and old.score != new.score:
            (right if new.score > old.score else wrong).append(position)
    return right, wrong
