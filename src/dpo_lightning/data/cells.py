"""Cell of a row -> its text, its messages or its number; BadCell says what is wrong with it."""

import math
from collections.abc import Mapping
from typing import Any

from dpo_lightning.data.pair import BadCell

MAX_CELL = 1_000_000  # characters: far more than any model reads, and tokenized within a second or two


def text(row: Mapping[str, Any], column: str) -> str:
    """The text of a cell.

    Raises:
        BadCell: it is missing, null, not text, longer than `MAX_CELL`, or not valid Unicode.
    """
    value = row.get(column)
    if not isinstance(value, str):
        raise _not_a(row, column, "text")
    return _valid_text(value, column)


def messages(row: Mapping[str, Any], column: str) -> list[dict[str, str]]:
    """The messages of a cell: [{"role": "user", "content": "Hi"}, ...]. Other keys of a message are left out.

    Raises:
        BadCell: it is not such a list, it is empty, or a content fails the checks of `text`.
    """
    value = row.get(column)
    if not isinstance(value, list | tuple):
        raise _not_a(row, column, "a list of messages")
    if not value:
        raise BadCell("no messages", column, "found an empty list where messages belong")
    read = []
    for index, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            words = f"found {_described(message)} where message {index}, a role and a content, belongs"
            raise BadCell("not a message", column, words)
        if not isinstance(content := message.get("content"), str):
            words = f"found {_described(content)} where the content of message {index}, text, belongs"
            raise BadCell("not a message", column, words)
        read.append({"role": message["role"], "content": _valid_text(content, column)})
    return read


def number(row: Mapping[str, Any], column: str, default: float) -> float:
    """The number in a cell, or `default` where the cell is missing, null or (as in a CSV file) empty.

    Raises:
        BadCell: it is not a finite number.
    """
    value = row.get(column)
    if value is None or value == "":
        return default
    try:
        parsed = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        parsed = math.nan
    if not math.isfinite(parsed):
        raise BadCell(f"bad {column}", column, f"found {shortened(repr(value))} where a finite number belongs")
    return parsed


def truth(row: Mapping[str, Any], column: str) -> bool:
    """The truth value of a cell: true or false, 1 or 0, or (as in a CSV file) one of these as text.

    Raises:
        BadCell: it is missing, null, or something else.
    """
    value = row.get(column)
    word = value.strip().lower() if isinstance(value, str) else value
    for known, words in ((True, ("true", "1", 1)), (False, ("false", "0", 0))):
        if word in words:
            return known
    raise _not_a(row, column, "true or false")


def _not_a(row: Mapping[str, Any], column: str, wanted: str) -> BadCell:
    if column not in row:
        return BadCell("missing column", column, f"found nothing where {wanted} belongs")
    value = row[column]
    return BadCell(
        "null" if value is None else f"not {wanted}", column, f"found {_described(value)} where {wanted} belongs"
    )


def _described(value: Any) -> str:
    return "null" if value is None else shortened(f"{type(value).__name__} {value!r}")


def _valid_text(value: str, column: str) -> str:
    if len(value) > MAX_CELL:
        raise BadCell("too long", column, f"found {len(value):,} characters where at most {MAX_CELL:,} belong")
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as `surrogateescape` keeps it
            found = f"found the byte 0x{code - 0xDC00:X} where UTF-8 belongs"
            raise BadCell("not UTF-8", column, found) from None
        found = f"found half a character (\\u{code:x}) where Unicode text belongs"
        raise BadCell("not Unicode", column, found) from None
    return value


def shortened(text: str, length: int = 60) -> str:
    """A text for a message, cut to `length` characters."""
    return text if len(text) <= length else text[:length] + "…"
