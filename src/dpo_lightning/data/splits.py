"""Pairs -> positions of those that are held out, and of the others as often as an epoch has them. Seeded."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_lightning.errors import UserError


def dataset_weights(names: str | Sequence[str] | Mapping[str, float] | None) -> dict[str, float]:
    """The data sets of a setting with their weights: how often an epoch has each of their pairs, by default once.

    Raises:
        UserError: a weight that is not above 0, or a data set that is named twice.
    """
    if not names:
        return {}
    if isinstance(names, Mapping):
        for name, weight in names.items():
            if not 0 < weight < math.inf:
                raise UserError(f"data.train_dataset: the weight of '{name}' is {weight}: it must be above 0")
        return {name: float(weight) for name, weight in names.items()}
    names = [names] if isinstance(names, str) else names
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"data.train_dataset names '{twice[0]}' twice: give it a weight of 2, as in {{{twice[0]}: 2}}")
    return dict.fromkeys(names, 1.0)


def mixed(rows: np.ndarray, starts: Sequence[int], weights: Sequence[float], seed: int) -> np.ndarray:
    """Positions as often as the weight of their data set says, ascending: 2.5 is all twice and a random half once more.

    Args:
        rows: positions in the concatenated data sets, ascending, [n].
        starts: position of each data set's first row.
        weights: one per data set.
    """
    rng = np.random.default_rng(seed)
    parts = np.split(rows, np.searchsorted(rows, starts[1:]))
    kept = []
    for part, weight in zip(parts, weights, strict=True):
        times, share = divmod(weight, 1)
        kept += [part] * int(times) + ([rng.permutation(part)[: round(share * len(part))]] if share else [])
    return np.sort(np.concatenate(kept))


def split_by_key(
    keys: Sequence[Any] | np.ndarray, sizes: dict[str, float], seed: int, source: str
) -> dict[str, np.ndarray]:
    """A seeded random split of positions in which rows with equal keys (contexts) stay together.

    Args:
        keys: one per row.
        sizes: of each held-out split, the least share of the rows (below 1) or number of rows (cut to a tenth).

    Returns:
        Name -> positions, ascending int64, for every size above 0 and for "train", the rest.

    Raises:
        UserError: there are too few different keys to give every split one.
    """
    most = math.ceil(0.1 * len(keys))  # most of a small data set is for training
    wanted = {
        name: min(size, most) if size >= 1 else math.ceil(size * len(keys)) for name, size in sizes.items() if size > 0
    }
    _, first, group, counts = np.unique(np.asarray(keys), return_index=True, return_inverse=True, return_counts=True)
    left = np.argsort(first).tolist()  # groups, in the order of their first rows
    np.random.default_rng(seed).shuffle(left)
    split_of_group = np.zeros(len(first), dtype=np.int64)
    for number, size in enumerate(wanted.values(), 1):
        rows = 0
        while rows < size and left:
            split_of_group[left[-1]] = number
            rows += counts[left.pop()]
    split_of_row = split_of_group[group]
    splits = {name: np.flatnonzero(split_of_row == number) for number, name in enumerate(("train", *wanted))}
    if empty := [name for name in (*wanted, "train") if not len(splits[name])]:
        raise UserError(
            f"{source}: its {len(keys)} rows have only {len(first)} different contexts, too few to keep "
            f"{' and '.join(wanted)} apart from train (nothing is left for {empty[0]}); "
            + ", ".join(f"give data.{name}_dataset or set data.{name}_size to 0" for name in wanted)
        )
    return splits
