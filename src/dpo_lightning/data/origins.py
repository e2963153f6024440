"""An encoded data set -> the files and rows that its pairs were read from, for messages about them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dpo_lightning.data.columns import numeric_column
from dpo_lightning.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class Origin(NamedTuple):
    """Where the pairs of a data set come from."""

    sources: list[tuple[str, str, int]]  # name, unit of its row numbers, position of its first pair
    positions: np.ndarray | None = None  # of the pairs among those of all sources; None: all of them

    def locations(self, data: "Dataset", positions: Sequence[int]) -> list[str]:
        """The source and row of the pairs at some positions: "rows.jsonl, line 6"."""
        starts = [start for _, _, start in self.sources]
        names = []
        for position, number in zip(positions, row_numbers(data, positions), strict=True):
            among_all = position if self.positions is None else self.positions[position]
            source, unit, _ = self.sources[np.searchsorted(starts, among_all, side="right") - 1]
            names.append(f"{source}, {unit} {number}")
        return names


def row_numbers(data: "Dataset", positions: Sequence[int]) -> list[int]:
    """The rows that pairs were read from, counted from 1; in .jsonl and .csv files, the lines."""
    return data.select_columns("row")[list(positions)]["row"]


def cuts(data: "Dataset", origin: Origin, max_length: int) -> str | None:
    """A line about the pairs that were cut to fit `max_length` tokens, None if there are none."""
    prompts, completions = (numeric_column(data, name) for name in ("prompt_cut", "completion_cut"))
    if not (prompts | completions).any():
        return None
    first = origin.locations(data, np.flatnonzero(prompts | completions)[:1].tolist())[0]
    return (
        f"of {len(data)} pairs {prompts.sum()} had their prompt cut from the left and {completions.sum()} a completion "
        f"cut (its EOS kept) to fit data.max_length = {max_length} (the first: {first})"
    )


def check_fits(data: "Dataset", origin: Origin, batch_tokens: int | None) -> None:
    """Raises UserError if the longest pair alone has more tokens than a batch may have."""
    lengths = numeric_column(data, "length")
    if batch_tokens and lengths.max() > batch_tokens:
        longest = int(lengths.argmax())
        raise UserError(
            f"data.batch_tokens is {batch_tokens}, but the pair of {origin.locations(data, [longest])[0]} has "
            f"{lengths[longest]} tokens: set it to {lengths[longest]} or more, or shorten pairs by data.max_length"
        )


def check_ids(data: "Dataset", origin: Origin, size: int, model: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises UserError for the first token that has no row in a model's embedding of `size` rows."""
    for position, pair in enumerate(data):
        for column in ("prompt", "chosen", "rejected"):
            if unknown := [token for token in pair.get(f"{column}_ids", ()) if token >= size]:
                raise UserError(
                    f"{origin.locations(data, [position])[0]}, {column}: its token "
                    f"{tokenizer.convert_ids_to_tokens(unknown[0])!r} has the id {unknown[0]}, but model '{model}' has "
                    f"embeddings for {size} tokens only: data.tokenizer belongs to another model"
                )
