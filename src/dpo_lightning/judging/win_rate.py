"""How often one of two models gives the better reply, from verdicts on pairs of their replies."""

import math
from statistics import NormalDist
from typing import NamedTuple

CONFIDENCE = 0.95


class WinRate(NamedTuple):
    """The share of replies to which a model's are preferred, with its confidence interval.

    A tie is half a win for both, so that the two models' rates add up to 1.
    """

    wins: int
    losses: int
    ties: int
    rate: float  # nan without any pair
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the interval leaves one half out: chance alone would rarely give such a rate to equal models."""
        return self.low > 0.5 or self.high < 0.5


def win_rate(wins: int, losses: int, ties: int) -> WinRate:
    """The win rate (wins + ties / 2) / n of n pairs, with the score interval of Wilson (1927) for n trials.

    Wilson's interval keeps its level for few pairs and for rates near 0 and 1, where the usual one does not (Brown, Cai
    and DasGupta 2001, "Interval estimation for a binomial proportion"). It takes each pair to be won or lost. Half wins
    vary less, so with ties it is wider than it need be, never narrower.
    """
    n = wins + losses + ties
    if not n:
        return WinRate(0, 0, 0, math.nan, 0.0, 1.0)
    rate, z = (wins + ties / 2) / n, NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return WinRate(wins, losses, ties, rate, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))
