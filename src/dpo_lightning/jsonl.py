"""Files of JSON lines that stay readable whenever the process is killed: lines out, whole lines back in."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Appends a line per object. Each is handed to the system as it is written, so a kill costs at most half of one."""
    with path.open("a", encoding="utf-8") as file:
        for line in lines:
            # Lone surrogates, which a model can emit, have no UTF-8: they stay escaped.
            text = json.dumps(line, ensure_ascii=False)
            file.write((json.dumps(line) if any("\ud800" <= c <= "\udfff" for c in text) else text) + "\n")
            file.flush()


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, up to a line that a kill cut in half; none where there is no file.

    Raises:
        ValueError: a line that is not the last one is no JSON object, so the file is something else.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    objects = []
    for line in lines[:-1]:  # what follows the last newline is empty, or half a line
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError(f"found {type(value).__name__} where an object belongs")
        objects.append(value)
    return objects


def replace_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Makes `lines` all that the file holds; a kill meanwhile leaves the old file."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    append_lines(partial, lines)
    partial.replace(path)
