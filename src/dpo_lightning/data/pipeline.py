"""source -> checked -> rejected -> encoded: the steps from a data set's name to tokens.

Each step is a function that takes the result of the one before:

    encoded(shuffled(checked(open_source(name, stage), ...), ...), ...)

What a step writes to disk is found again by a digest of everything that it depends on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from dpo_lightning.data.columns import batches_of, context_keys, text_keys
from dpo_lightning.data.encoding import encode_batch, encode_prompts, tokenizer_fingerprint
from dpo_lightning.data.formats import RowOptions, find_format, get_format
from dpo_lightning.data.origins import Origin
from dpo_lightning.data.reading import PAIR_COLUMNS, OnBadRow, PairReader, RowAccount
from dpo_lightning.data.rejected import shuffled_partners
from dpo_lightning.data.sources import Source
from dpo_lightning.data.splits import mixed, split_by_key
from dpo_lightning.errors import UserError
from dpo_lightning.internals.datasets import fingerprint
from dpo_lightning.storage.arrow_cache import Columns, cached_dataset
from dpo_lightning.storage.digests import key_digest
from dpo_lightning.storage.progress import progress

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ENCODING_VERSION = 3  # raise it when encoding or reading changes, so that old caches are not used
IDS = pa.list_(pa.int32())
PROMPT_COLUMNS = pa.schema([*PAIR_COLUMNS, pa.field("prompt_ids", IDS)])
ENCODED_COLUMNS = pa.schema(
    [*PAIR_COLUMNS, *(pa.field(name, IDS) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))]
    + [pa.field("length", pa.int32()), pa.field("prompt_cut", pa.bool_()), pa.field("completion_cut", pa.bool_())]
)


class Checked(NamedTuple):
    """The rows of a source that can be used."""

    source: Source
    pairs: "Dataset"  # PAIR_COLUMNS
    account: RowAccount  # what became of all rows
    format: str
    chat: bool  # whether any of them is a conversation


class Completions(NamedTuple):
    """Pairs, and rejected completions in place of their own."""

    source: Source
    pairs: "Dataset"
    method: tuple = ("empty",)  # how the completions were made, for the digest
    # Positions [start, stop) -> `rejected`, and its ids where a model generated it.
    columns: Callable[[int, int], Columns] = lambda start, stop: {}


class Encoded(NamedTuple):
    """Pairs, or prompts, with their token ids."""

    data: "Dataset"  # ENCODED_COLUMNS or PROMPT_COLUMNS
    largest_id: int
    origin: Origin


def checked(
    source: Source,
    format_name: str | None,
    options: RowOptions,
    chat_source: str | None,
    tokenizer: "PreTrainedTokenizerBase",
    on_bad_row: OnBadRow,
    completions: bool = True,
) -> Checked:
    """Reads the rows of a source. Those that cannot be used are left out, or an error.

    Args:
        format_name: None: recognized from the columns.
        chat_source: Jinja source of the chat template in `options`.
        completions: False for prediction, which needs only prompts.
    """
    format_name = find_format(source.columns, source.name, format_name, completions)
    row_format = get_format(format_name)
    reader = PairReader(source, row_format, options, completions, on_bad_row)
    key = _digest(
        *(source.fingerprint, source.name, format_name, row_format.fingerprint, options[:2]),
        *(chat_source, str(tokenizer.special_tokens_map), completions, on_bad_row),
    )
    pairs, note = cached_dataset(
        key,
        PAIR_COLUMNS,
        lambda: progress(reader.batches(), f"Reading {source.name}"),
        lambda: {"account": reader.account._asdict(), "chat": reader.chat},
    )
    return Checked(source, pairs, RowAccount(**note["account"]), format_name, note["chat"])


def own_or_empty(rows: Checked) -> Completions:
    """The pairs' own rejected completions, or the empty text for pairs without."""
    return Completions(rows.source, rows.pairs)


def shuffled(rows: Checked, seed: int) -> Completions:
    """The chosen completions of other pairs as rejected ones (see `shuffled_partners`)."""
    _refuse_own(rows)
    chosen = rows.pairs.select_columns("chosen")
    partners = shuffled_partners(text_keys(rows.pairs, "chosen"), seed, rows.source.name)
    return Completions(
        *(rows.source, rows.pairs, ("shuffled", seed)),
        lambda start, stop: {"rejected": chosen[partners[start:stop].tolist()]["chosen"]},
    )


def generated(rows: Checked, replies_to: "Callable[[Dataset, str], Dataset | None]") -> Completions:
    """A model's replies as rejected completions.

    Args:
        replies_to: pairs and their name -> `generated.COLUMNS`, or None to leave the completions empty.
    """
    _refuse_own(rows)
    replies = replies_to(rows.pairs, rows.source.name)
    if replies is None:
        return own_or_empty(rows)

    def columns(start: int, stop: int) -> Columns:
        rows = replies[start:stop]
        return {"rejected": rows["text"], "rejected_tokens": rows["tokens"]}

    return Completions(rows.source, rows.pairs, ("generated", fingerprint(replies)), columns)


def _refuse_own(rows: Checked) -> None:
    if rows.pairs.data.column("label").null_count < rows.pairs.data.num_rows:
        raise UserError(f"{rows.source.name} has one completion with a label in each row: leave data.rejected out")
    if any(any(columns["rejected"]) for columns in batches_of(rows.pairs, ["rejected"])):
        raise UserError(f"{rows.source.name} has rejected completions of its own: leave data.rejected out")


def encoded(completed: Completions, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Encoded:
    """Tokenizes pairs.

    Args:
        max_length: tokens of a prompt and completion together.

    Raises:
        UserError: the tokenizer makes no tokens of a prompt.
    """
    source, pairs, method, rejected_columns = completed

    def batches() -> Iterator[Columns]:
        start = 0
        for columns in progress(batches_of(pairs), f"Encoding {source.name}", len(pairs)):
            stop = start + len(columns["prompt"])
            columns |= rejected_columns(start, stop)
            columns |= encode_batch(columns, tokenizer, max_length)
            if not all(columns["prompt_ids"]):
                raise UserError(
                    f"the tokenizer '{tokenizer.name_or_path}' makes no tokens of a prompt in {source.name}: "
                    "it is damaged or incomplete; give the model's own one as data.tokenizer"
                )
            yield columns
            start = stop

    key = _digest(fingerprint(pairs), method, tokenizer_fingerprint(tokenizer), max_length)
    return _with_largest_id(key, ENCODED_COLUMNS, batches, source)


def encoded_prompts(rows: Checked, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Encoded:
    """Tokenizes prompts that are to be answered."""
    source, pairs = rows.source, rows.pairs

    def batches() -> Iterator[Columns]:
        for columns in progress(batches_of(pairs), f"Encoding {source.name}", len(pairs)):
            yield columns | {"prompt_ids": encode_prompts(tokenizer, columns["prompt"], max_length, columns["chat"])}

    key = _digest(fingerprint(pairs), ("prompts",), tokenizer_fingerprint(tokenizer), max_length)
    return _with_largest_id(key, PROMPT_COLUMNS, batches, source)


def _with_largest_id(key: str, schema: pa.Schema, batches: Callable[[], Iterator[Columns]], source: Source) -> Encoded:
    """An encoded data set, from the cache or from `batches`, with its largest token id, which the cache's note has."""
    largest: list[int] = []  # of each batch

    def noted() -> Iterator[Columns]:
        for columns in batches():
            ids = chain.from_iterable(rows for name, rows in columns.items() if name.endswith("_ids"))
            largest.append(max(map(max, filter(None, ids))))
            yield columns

    data, note = cached_dataset(key, schema, noted, lambda: {"largest_id": max(largest)})
    return Encoded(data, note["largest_id"], Origin([(source.name, source.unit, 0)]))


def split(
    parts: Sequence[Encoded], weights: Mapping[str, float], sizes: dict[str, float], seed: int
) -> dict[str, Encoded]:
    """Encoded data sets -> the held-out splits and "train", with each pair as often as its data set's weight says.

    Args:
        weights: of the data sets, by name.
        sizes: of the held-out splits, by name (see `split_by_key`).
    """
    from datasets import concatenate_datasets

    pairs = concatenate_datasets([part.data for part in parts]) if len(parts) > 1 else parts[0].data
    starts = [0, *accumulate(len(part.data) for part in parts)][:-1]
    sources = [(*part.origin.sources[0][:2], start) for part, start in zip(parts, starts, strict=True)]
    splits = split_by_key(context_keys(pairs), sizes, seed, ", ".join(weights))
    splits["train"] = mixed(splits["train"], starts, list(weights.values()), seed)
    largest_id = max(part.largest_id for part in parts)
    return {name: Encoded(pairs.select(rows), largest_id, Origin(sources, rows)) for name, rows in splits.items()}


def _digest(*parts: Any) -> str:
    return key_digest([ENCODING_VERSION, *parts])
