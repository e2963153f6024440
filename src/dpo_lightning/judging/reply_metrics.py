"""What any reply shows, whatever it is about: does it stop, how long is it, does it repeat itself?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchmetrics

NGRAM = 4


def repetition(token_ids: Sequence[int]) -> float:
    """The share of 4-grams that came before: [1, 2, 3, 4] -> 0.0, [7] * 8 -> 0.8, 0.0 below 4 tokens."""
    ngrams = [tuple(token_ids[start : start + NGRAM]) for start in range(len(token_ids) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


class ReplyMetrics(torchmetrics.Metric):
    """Means over the replies of all ranks; nan when there was none.

    - `reply/eos_rate`: stopped by itself, not by the limit on new tokens;
    - `reply/length`: tokens;
    - `reply/repetition`: see `repetition`.
    """

    full_state_update = False

    def __init__(self):
        super().__init__()
        for name, zero in (("replies", 0), ("stopped", 0), ("tokens", 0), ("repetition", 0.0)):
            self.add_state(name, default=torch.tensor(zero), dist_reduce_fx="sum")

    def update(self, token_ids: list[list[int]], stopped: list[bool]) -> None:
        """token_ids: each reply's own tokens, without prompt, padding and EOS; stopped: EOS came?"""
        for ids, stops in zip(token_ids, stopped, strict=True):
            self.replies += 1
            self.stopped += bool(stops)
            self.tokens += len(ids)
            self.repetition += repetition(ids)

    def compute(self) -> dict[str, torch.Tensor]:
        return {
            "reply/eos_rate": self.stopped / self.replies,
            "reply/length": self.tokens / self.replies,
            "reply/repetition": self.repetition / self.replies,
        }
