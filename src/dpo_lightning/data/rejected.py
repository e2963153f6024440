"""Rejected completions for data without them: another row's answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_lightning.errors import UserError


def shuffled_partners(texts: Sequence[Any] | np.ndarray, seed: int, source: str) -> np.ndarray:
    """For `rejected: shuffled`: a permutation, int64 [n], that pairs each text with a different text of the data.

    Equal texts are laid side by side in a seeded order and the order is then turned by the size of the largest
    group, so no text can meet its equal, and every text is used exactly once.

    Args:
        texts: the texts, or numbers that stand for them (their hashes), [n].

    Raises:
        UserError: one text makes up more than half of the data, so there is no such permutation.
    """
    groups, inverse, counts = np.unique(np.asarray(texts), return_inverse=True, return_counts=True)
    turn = int(counts.max())
    if 2 * turn > len(texts):
        raise UserError(
            f"{source}: rejected: shuffled needs other rows' answers, but {turn} of {len(texts)} have the same one"
        )
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(texts)), rng.permutation(len(groups))[inverse]))
    partners = np.empty(len(texts), dtype=np.int64)
    partners[order] = np.roll(order, turn)
    return partners
