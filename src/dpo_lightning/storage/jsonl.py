"""Files of JSON lines that stay readable whenever the process is killed: lines out, whole lines back in."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Appends a line per object. Each is handed to the system as it is written, so a kill costs at most half of one."""
    with path.open("a", encoding="utf-8") as file:
        for line in lines:
            # Lone surrogates, which a model can emit, have no UTF-8: they stay escaped.
            text = json.dumps(line, ensure_ascii=False)
            file.write((json.dumps(line) if any("\ud800" <= c <= "\udfff" for c in text) else text) + "\n")
            file.flush()


class Lines(NamedTuple):
    """What a file of JSON lines holds."""

    objects: list[dict[str, Any]]  # of its whole lines
    ends: list[int]  # bytes of the file up to the end of each of them
    rest: bytes  # what follows the last newline: nothing, or a line that a kill cut in half, or something foreign


def read_lines(path: Path) -> Lines:
    """The content of a file; nothing where there is none.

    Raises:
        ValueError: a line that is not the last one is no JSON object, so the file is something else.
    """
    lines = Lines([], [], b"")
    if not path.exists():
        return lines
    end = 0
    *whole, rest = path.read_bytes().split(b"\n")
    for line in whole:
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError(f"found {type(value).__name__} where an object belongs")
        end += len(line) + 1
        lines.objects.append(value)
        lines.ends.append(end)
    return lines._replace(rest=rest)


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of our own, up to a line that a kill cut in half; raises as `read_lines` does."""
    return read_lines(path).objects


def could_be_half(rest: bytes, beginning: dict[str, Any]) -> bool:
    """Whether `rest` can be what a kill left of a line of ours.

    Args:
        beginning: the line's first values; the last one, "" or 0, stands for any.
    """
    heads = (json.dumps(beginning, ensure_ascii=ascii)[:-2].encode(errors="replace") for ascii in (False, True))
    return any(rest.startswith(head) or head.startswith(rest) for head in heads)


def keep_lines(path: Path, lines: Lines, count: int) -> None:
    """Cuts a file, made where there is none, to the first of its lines."""
    with path.open("ab") as file:
        file.truncate(lines.ends[count - 1] if count else 0)
