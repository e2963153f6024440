"""Source -> the columns of its pairs, a few rows at a time, and an account of all rows.

Rows that cannot be trained on are an error, or with `data.on_bad_row: skip` counted and left out. Doubtful rows, which
teach nothing (repeated rows, pairs with two equal completions), are counted and kept, or with `skip` left out too.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from dpo_lightning.data.formats import OPTIONAL_COLUMNS, RowFormat, RowOptions, row_to_pair
from dpo_lightning.data.pair import BadRow, PreferencePair
from dpo_lightning.data.sources import READ_ROWS, Source
from dpo_lightning.errors import UserError

OnBadRow = Literal["error", "skip"]
REMEDY = "fix or remove the row, or set data.on_bad_row: skip"
READ_CHARACTERS = 10_000_000  # held in memory at a time
LISTED = 3  # rows in messages, of each reason
PAIR_COLUMNS = pa.schema(
    [(name, pa.string()) for name in ("prompt", "chosen", "rejected", "context")]
    + [
        ("weight", pa.float64()),
        ("margin", pa.float64()),
        ("chat", pa.bool_()),
        ("label", pa.bool_()),
        ("row", pa.int64()),
    ]
)
REPEATED, IDENTICAL, CONTRADICTED = "repeated row", "chosen same as rejected", "completion labelled both good and bad"


class RowAccount(NamedTuple):
    """What became of the rows of a data set: `rows` = `pairs` + all of `skipped`."""

    source: str
    rows: int  # read
    pairs: int  # kept
    skipped: dict[str, int]  # reason -> rows left out
    doubtful: dict[str, int]  # reason -> rows kept although they teach nothing
    first: dict[str, list[str]]  # reason -> what is wrong with the first few rows

    def lines(self) -> list[str]:
        """For the user: a line on the rows that were left out and one on those that teach nothing."""
        lines = []
        if self.skipped:
            lines.append(self._line(self.skipped, "are skipped"))
        if self.doubtful:
            line = self._line(self.doubtful, "teach nothing but are kept")
            lines.append(f"{line}; data.on_bad_row: skip leaves them out")
        return lines

    def _line(self, counts: dict[str, int], words: str) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        examples = "; ".join([line for reason in counts for line in self.first[reason]][:LISTED])
        return f"{self.source}: {sum(counts.values())} of {self.rows} rows {words}: {reasons} (the first: {examples})"


class PairReader:
    """Reads a source once, through `batches`; `account` then says what became of its rows.

    Args:
        completions: False for prediction: a prompt is enough, and repeated ones are answered.
    """

    def __init__(
        self, source: Source, row_format: RowFormat, options: RowOptions, completions: bool, on_bad_row: OnBadRow
    ) -> None:
        self.source, self.row_format, self.options = source, row_format, options
        self.completions, self.skip = completions, on_bad_row == "skip"
        self.rows = self.pairs = 0
        self.chat = False  # whether any row is a conversation
        self.skipped: dict[str, int] = {}
        self.doubtful: dict[str, int] = {}
        self.first: dict[str, list[str]] = {}
        self._seen: set[int] = set()  # hashes of the pairs so far; 64 bits tell millions apart

    @property
    def account(self) -> RowAccount:
        """What became of the rows read so far."""
        return RowAccount(self.source.name, self.rows, self.pairs, self.skipped, self.doubtful, self.first)

    def batches(self) -> Iterator[dict[str, list[Any]]]:
        """`PAIR_COLUMNS`: the fields of PreferencePair and `row`, its number in the source; a few rows at a time.

        Raises:
            BadRow: for the first bad row, if `on_bad_row` is "error".
            UserError: no row can be used, or the rest of the file cannot be read.
        """
        kept: list[tuple] = []
        size = 0
        columns = self.row_format.prompt_columns + self.row_format.completion_columns
        for number, row in self.source.rows((*columns, *OPTIONAL_COLUMNS) if columns else ()):
            self.rows += 1
            pair = self._pair(number, row)
            if pair is not None:
                kept.append((*pair, number))
                self.chat |= pair.chat
                size += len(pair.prompt) + len(pair.chosen) + len(pair.rejected) + len(pair.context)
            if len(kept) == READ_ROWS or size > READ_CHARACTERS:
                yield self._columns(kept)
                kept, size = [], 0
        if kept:
            yield self._columns(kept)
        if not self.pairs:
            first = next(iter(self.first.values()), ["there is none"])[0]
            raise UserError(f"{self.source.name}: none of its {self.rows} rows can be used; the first: {first}")

    def _columns(self, kept: list[tuple]) -> dict[str, list[Any]]:
        self.pairs += len(kept)
        return dict(zip(PAIR_COLUMNS.names, map(list, zip(*kept, strict=True)), strict=True))

    def _pair(self, number: int, row: dict[str, Any] | BadRow) -> PreferencePair | None:
        try:
            if isinstance(row, BadRow):
                raise row
            pair = row_to_pair(row, self.row_format, self.options, self.source.location(number), self.completions)
        except BadRow as error:
            if not self.skip:
                raise BadRow(error.reason, f"{error}; {REMEDY}") from None
            self._count(self.skipped, error.reason, str(error))
            return None
        reason = self._doubt(pair) if self.completions else None
        if reason is None:
            return pair
        self._count(self.skipped if self.skip else self.doubtful, reason, self.source.location(number))
        return None if self.skip else pair

    def _doubt(self, pair: PreferencePair) -> str | None:
        if pair.label is None and pair.chosen == pair.rejected:
            return IDENTICAL
        if pair.label is not None:
            opposite = pair._replace(chosen=pair.rejected, rejected=pair.chosen, label=not pair.label)
            if hash(opposite) in self._seen:
                return CONTRADICTED
        key = hash(pair)
        if key in self._seen:
            return REPEATED
        self._seen.add(key)
        return None

    def _count(self, counts: dict[str, int], reason: str, line: str) -> None:
        counts[reason] = counts.get(reason, 0) + 1
        lines = self.first.setdefault(reason, [])
        if len(lines) < LISTED:
            lines.append(line)
