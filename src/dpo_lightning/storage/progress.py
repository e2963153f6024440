"""Work that takes longer than a moment -> the same work with a bar that shows how far it is; of a run, see `RunBar`."""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from dpo_lightning.visible import one_line

B = TypeVar("B", bound=Sized)


def progress(batches: Iterable[B], what: str, total: int | None = None, unit: str = "rows") -> Iterator[B]:
    """Hands batches on and, on the first rank, shows how many rows have come once that takes longer than a moment.

    Args:
        batches: each a list of rows, or columns (a dictionary of lists).
        what: is done, in front of the bar.
        total: rows, if it is known.
    """
    from tqdm.auto import tqdm

    with tqdm(desc=one_line(what), total=total, unit=f" {unit}", delay=2, disable=rank_zero_only.rank != 0) as bar:
        for batch in batches:
            yield batch
            bar.update(len(next(iter(batch.values()))) if isinstance(batch, dict) else len(batch))


def with_progress(positions: np.ndarray, size: int, description: str, shown: bool) -> Iterator[list[int]]:
    """Hands out positions, `size` at a time, and shows how many pairs are done."""
    batches = (positions[start : start + size].tolist() for start in range(0, len(positions), size))
    return progress(batches, description, len(positions), "pairs") if shown else iter(batches)
