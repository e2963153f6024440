"""Cell of a row -> its text, messages or number, or what is wrong with it."""

import math
from collections.abc import Mapping
from typing import Any

from dpo_lightning.data.pair import BadCell

MAX_CELL = 1_000_000  # characters; far more than any model reads, and still tokenized within a second or two


def text(row: Mapping[str, Any], column: str) -> str:
    """The text of a cell.

    Raises:
        BadCell: it is absent, null, not text, longer than `MAX_CELL`, or not whole Unicode characters.
    """
    value = row.get(column)
    if not isinstance(value, str):
        raise _not_a(row, column, "text")
    return _whole_characters(value, column)


def messages(row: Mapping[str, Any], column: str) -> list[dict[str, str]]:
    """The messages of a cell: [{"role": "user", "content": "Hi"}, ...]. Whatever else a message holds is left out.

    Raises:
        BadCell: it is no such list, is empty, or the text of a message is not as `text` wants it.
    """
    value = row.get(column)
    if not isinstance(value, list | tuple):
        raise _not_a(row, column, "a list of messages")
    if not value:
        raise BadCell("no messages", column, "found an empty list where messages belong")
    read = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            found = _cut(f"{type(message).__name__} {message!r}")
            raise BadCell(
                "not a message", column, f"found {found} where message {number}, a role and a content, belongs"
            )
        if not isinstance(content := message.get("content"), str):
            found = _cut("null" if content is None else f"{type(content).__name__} {content!r}")
            raise BadCell(
                "not a message", column, f"found {found} where the content of message {number}, text, belongs"
            )
        read.append({"role": message["role"], "content": _whole_characters(content, column)})
    return read


def number(row: Mapping[str, Any], column: str, otherwise: float) -> float:
    """The number of a cell, `otherwise` where it is absent, null or, as in a CSV file, empty.

    Raises:
        BadCell: it is no finite number.
    """
    value = row.get(column)
    if value is None or value == "":
        return otherwise
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise BadCell(f"bad {column}", column, f"found {_cut(repr(value))} where a finite number belongs")
    return found


def _not_a(row: Mapping[str, Any], column: str, wanted: str) -> BadCell:
    if column not in row:
        return BadCell("missing column", column, f"found nothing where {wanted} belongs")
    value = row[column]
    if value is None:
        return BadCell("null", column, f"found null where {wanted} belongs")
    return BadCell(f"not {wanted}", column, f"found {_cut(f'{type(value).__name__} {value!r}')} where {wanted} belongs")


def _whole_characters(value: str, column: str) -> str:
    if len(value) > MAX_CELL:
        raise BadCell("too long", column, f"found {len(value):,} characters where at most {MAX_CELL:,} belong")
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is no UTF-8
            found = f"found the byte 0x{code - 0xDC00:X} where UTF-8 belongs"
            raise BadCell("not UTF-8", column, found) from None
        found = f"found half a character (\\u{code:x}) where Unicode text belongs"
        raise BadCell("not Unicode", column, found) from None
    return value


def _cut(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[:length] + "…"
