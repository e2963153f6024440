"""A data set that `arrow_cache` wrote -> its columns, without a Python object for every cell."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_lightning.data.reading import PAIR_COLUMNS
from dpo_lightning.internals.datasets import fingerprint, selected
from dpo_lightning.storage.arrow_cache import Columns

if TYPE_CHECKING:
    from datasets import Dataset


def numeric_column(data: "Dataset", name: str) -> np.ndarray:
    """A column of numbers or bools, [n], read straight from the table."""
    return selected(data, data.data.column(name).to_numpy())


def id_counts(data: "Dataset", name: str) -> np.ndarray:
    """The length of each list in a column, int32 [n]."""
    return selected(data, pc.list_value_length(data.data.column(name)).to_numpy())


def thumbs(data: "Dataset") -> tuple[int, int]:
    """How many encoded rows have a chosen completion alone, and how many a rejected one alone."""
    chosen, rejected = (id_counts(data, f"{side}_ids") for side in ("chosen", "rejected"))
    return int((rejected == 0).sum()), int((chosen == 0).sum())


def distinct(data: "Dataset") -> np.ndarray:
    """The positions of a selection's rows, ascending, each row once however often it was selected."""
    return np.unique(selected(data, np.arange(data.data.num_rows)), return_index=True)[1]


def id_lists(data: "Dataset", name: str, positions: np.ndarray) -> list[np.ndarray]:
    """A column's lists of token ids at some positions, int32 [tokens] each."""
    (column,) = data.select_columns(name).with_format("arrow")[positions].columns
    column = column.combine_chunks()
    return np.split(column.flatten().to_numpy(), np.cumsum(column.value_lengths().to_numpy())[:-1])


def with_column(data: "Dataset", name: str, values: pa.ChunkedArray) -> "Dataset":
    """The data set with one more column.

    Args:
        values: [n]. They are copied into memory if the data set is a selection of its table's rows.
    """
    from datasets import Dataset, concatenate_datasets

    table_rows = np.arange(data.data.num_rows)
    rows = selected(data, table_rows)
    if rows is table_rows:  # not a selection
        return concatenate_datasets([data, Dataset(pa.table({name: values}), fingerprint=name)], axis=1)
    order = np.full(len(table_rows), -1)
    order[rows] = np.arange(len(rows))
    column = Dataset(pa.table({name: values.take(pa.array(order, mask=order < 0))}), fingerprint=name)
    return concatenate_datasets([Dataset(data.data, fingerprint=fingerprint(data)), column], axis=1).select(rows)


def batches_of(data: "Dataset", columns: Sequence[str] = PAIR_COLUMNS.names) -> Iterator[Columns]:
    """The columns of the table under a data set, a few rows at a time."""
    for batch in data.data.table.select(list(columns)).to_batches():
        yield batch.to_pydict()


def text_keys(data: "Dataset", name: str) -> np.ndarray:
    """A hash of each text of a column, uint64 [n]: the same in every process."""
    texts = (text for columns in batches_of(data, [name]) for text in columns[name])
    return selected(data, np.fromiter(map(_text_key, texts), np.uint64, data.data.num_rows))


def _text_key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def context_keys(data: "Dataset") -> np.ndarray:
    """A hash of each pair's context, or of its prompt if it has no context, uint64 [n]."""
    contexts, prompts = text_keys(data, "context"), text_keys(data, "prompt")
    return np.where(contexts == _text_key(""), prompts, contexts)
