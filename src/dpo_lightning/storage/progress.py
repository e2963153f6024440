"""A progress bar for work outside of training; a run's own is `RunBar`."""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_only

from dpo_lightning.visible import one_line

B = TypeVar("B", bound=Sized)


def progress(batches: Iterable[B], description: str, total: int | None = None, unit: str = "rows") -> Iterator[B]:
    """Passes batches on and, on the first rank, shows a bar with the number of rows if that takes over 2 seconds, until
    it is done.

    Args:
        batches: each is a list of rows, or columns (a dictionary of lists).
        description: of the work, shown before the bar.
        total: number of rows, if known.
    """
    from tqdm.auto import tqdm

    with tqdm(
        desc=one_line(description),
        total=total,
        unit=f" {unit}",
        delay=2,
        leave=False,
        disable=rank_zero_only.rank != 0,
    ) as bar:
        for batch in batches:
            yield batch
            bar.update(len(next(iter(batch.values()))) if isinstance(batch, dict) else len(batch))
