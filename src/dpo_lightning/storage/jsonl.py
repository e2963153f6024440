"""Files of JSON lines that stay readable whenever the process is killed."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


def append_lines(path: Path, lines: Iterable[dict[str, Any]], to_disk: bool = False) -> None:
    """Appends a line per object and flushes each, so that a kill can cut only the last one short.

    With `to_disk` they also survive a power cut, which takes some milliseconds.
    """
    with path.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(as_line(line))
            file.flush()
        if to_disk:
            os.fsync(file.fileno())


def as_line(line: dict[str, Any]) -> str:
    """An object as a line of a file."""
    # Lone surrogates, which a model can generate, have no UTF-8 encoding and stay escaped.
    text = json.dumps(line, ensure_ascii=False)
    return (json.dumps(line) if any("\ud800" <= c <= "\udfff" for c in text) else text) + "\n"


class Lines(NamedTuple):
    """The content of a file of JSON lines."""

    objects: list[dict[str, Any]]  # of the complete lines
    ends: list[int]  # offset in bytes of each line's end
    rest: bytes  # after the last newline: nothing, a line that a kill cut short, or something foreign


def read_lines(path: Path) -> Lines:
    """The content of a file, empty if there is none.

    Raises:
        ValueError: a complete line is not a JSON object, so the file is something else.
    """
    lines = Lines([], [], b"")
    if not path.exists():
        return lines
    end = 0
    *complete, rest = path.read_bytes().split(b"\n")
    for line in complete:
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError(f"found {type(value).__name__} where an object belongs")
        end += len(line) + 1
        lines.objects.append(value)
        lines.ends.append(end)
    return lines._replace(rest=rest)


def could_be_half(rest: bytes, beginning: dict[str, Any]) -> bool:
    """Whether `rest` can be a line of ours that a kill cut short.

    Args:
        beginning: the line's first values; the last one, "" or 0, stands for any value.
    """
    heads = (json.dumps(beginning, ensure_ascii=ascii)[:-2].encode(errors="replace") for ascii in (False, True))
    return any(rest.startswith(head) or head.startswith(rest) for head in heads)


def keep_lines(path: Path, lines: Lines, count: int) -> None:
    """Cuts a file, created if missing, to its first `count` lines."""
    with path.open("ab") as file:
        file.truncate(lines.ends[count - 1] if count else 0)
