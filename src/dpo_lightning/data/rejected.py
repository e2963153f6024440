"""Rejected completions for data without them: the answers of other rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_lightning.errors import UserError


def shuffled_partners(texts: Sequence[Any] | np.ndarray, seed: int, source: str) -> np.ndarray:
    """For `rejected: shuffled`: a random permutation, int64 [n], that pairs each text with a different one.

    Equal texts are put side by side and the sequence is rotated by the size of the largest group, so that no text meets
    its equal.

    Args:
        texts: the texts or their hashes, [n].

    Raises:
        UserError: one text makes up more than half of the data, so that there is no such permutation.
    """
    groups, inverse, counts = np.unique(np.asarray(texts), return_inverse=True, return_counts=True)
    most = int(counts.max())
    if 2 * most > len(texts):
        raise UserError(
            f"{source}: rejected: shuffled needs other rows' answers, but {most} of {len(texts)} have the same one"
        )
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(texts)), rng.permutation(len(groups))[inverse]))
    partners = np.empty(len(texts), dtype=np.int64)
    partners[order] = np.roll(order, most)
    return partners
