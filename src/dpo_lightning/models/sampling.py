"""Sampling of tokens, with random numbers of each reply's own."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Draws:
    """A logits processor that samples each row with random numbers of its own.

    transformers samples a batch from one stream of random numbers, so that a reply would depend on its batch.

    Args:
        seeds: one per row.
        temperature: divides the logits.
        top_p: only the likeliest tokens that together have this probability are drawn.
        max_new_tokens: the most tokens to draw for a row.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float, max_new_tokens: int) -> None:
        self.temperature, self.top_p, self.step = temperature, top_p, 0
        draws = [np.random.default_rng(seed).random(max_new_tokens, np.float32) for seed in seeds]
        self.uniform = torch.from_numpy(1 - np.stack(draws))  # [rows, max_new_tokens], in (0, 1]

    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the rows, given by their indices."""
        self.uniform = self.uniform[rows.cpu()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [rows, V] -> 0 at the sampled token and -inf elsewhere. Called once per new token."""
        uniform = self.uniform[:, self.step].to(scores.device)
        self.step += 1
        tokens = draw(scores, uniform, self.temperature, self.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Samples a token per row by inverting the distribution function, within the nucleus of Holtzman et al. (2020).

    Args:
        logits: [rows, V] float.
        uniform: [rows], random in (0, 1]: without 0, no token of probability 0 is drawn.

    Returns:
        Tokens [rows, 1], int64.
    """
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True)
    mass = probabilities.cumsum(dim=-1)
    total = mass[:, -1:].contiguous()
    if order is not None:
        total = mass.gather(1, torch.searchsorted(mass, top_p * total))  # of the nucleus, with its last token
    ranks = torch.searchsorted(mass, uniform[:, None] * total)
    return ranks if order is None else order.gather(1, ranks)
