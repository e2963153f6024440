"""Work that takes longer than a moment -> the same work with a bar that shows how far it is."""

from collections.abc import Iterator

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from dpo_lightning.storage.arrow_cache import Columns
from dpo_lightning.visible import one_line


def progress(batches: Iterator[Columns], what: str, total: int | None = None) -> Iterator[Columns]:
    """Hands batches on and shows how many rows have come, where that takes longer than a moment."""
    from tqdm.auto import tqdm

    with tqdm(desc=one_line(what), total=total, unit=" rows", delay=2, disable=rank_zero_only.rank != 0) as bar:
        for columns in batches:
            yield columns
            bar.update(len(columns["prompt"]))


def with_progress(positions: np.ndarray, size: int, description: str, shown: bool) -> Iterator[list[int]]:
    """Hands out positions, `size` at a time, and shows how many pairs are done."""
    from tqdm import tqdm

    with tqdm(total=len(positions), desc=one_line(description), unit="pair", disable=not shown) as bar:
        for start in range(0, len(positions), size):
            yield positions[start : start + size].tolist()
            bar.update(len(positions[start : start + size]))
