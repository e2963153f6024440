"""Replies as a table in the console and in markdown. Replies are hostile text: nothing in them is interpreted."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_lightning.judging.quantities import means_text
from dpo_lightning.visible import visible

if TYPE_CHECKING:
    from rich.text import Text

FOLDED_LENGTH = 240


def fold(text: str, length: int = FOLDED_LENGTH) -> str:
    """Visible text, without its middle where it is longer than `length`."""
    text = visible(text.strip())
    return text if len(text) <= length else f"{text[: length * 2 // 3]} … {text[-length // 3 :]}"


def show_replies(
    title: str,
    prompts: Sequence[str],
    columns: dict[str, Sequence[str]],
    means: dict[str, float],
    syntax: str | None = None,
) -> None:
    """Prints a table with a row per prompt to rich's shared console, above any progress bar.

    Args:
        columns: title -> a text per prompt; there may be more texts than prompts.
        means: of the verdicts on all texts, for the caption.
        syntax: the language, such as "sql", in which the columns are highlighted.
    """
    from rich import get_console
    from rich.table import Table
    from rich.text import Text
    from tqdm import tqdm

    asked = max(map(len, columns.values()))
    caption = f"All {asked} replies: " * (asked > len(prompts)) + means_text(means)
    table = Table(title=f"Replies, {title}", show_lines=True, caption=Text(visible(caption)))
    for name in ("prompt", *columns):
        table.add_column(name, overflow="fold", ratio=1)
    for i, prompt in enumerate(prompts):
        # Text, not markup: a reply must not be able to style or link itself.
        cells = [fold(column[i]) for column in columns.values()]
        table.add_row(Text(fold(prompt)), *(_highlighted(cell, syntax) if syntax else Text(cell) for cell in cells))
    with tqdm.external_write_mode():  # a bar drawn by tqdm, such as Lightning's, makes room as well
        get_console().print(table)


def _highlighted(text: str, language: str) -> "Text":
    from rich.syntax import Syntax

    code = Syntax("", language, theme="ansi_dark", background_color="default").highlight(text)
    code.rstrip()
    code.no_wrap = False  # by default code is cut instead of wrapped
    return code


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; markdown and HTML in its cells are shown, not interpreted."""
    lines = [header, ["---"] * len(header), *([markdown_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_text(text: str) -> str:
    """Markdown (and HTML) that shows exactly this text: all punctuation becomes character references."""
    text = re.sub(r"[^\w\s]|_", lambda match: f"&#{ord(match[0])};", visible(text))
    return text.replace("\n", "<br>")
