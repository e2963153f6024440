"""Data set row -> PreferencePair(prompt, chosen, rejected): one small function per format, found by name.

A format says which columns it reads, so it can be recognised from the columns of the data. Adding one is a
function and a line in `FORMATS`.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_lightning.errors import UserError


class PreferencePair(NamedTuple):
    """One prompt with the completion that is wanted and the one that is not, all as text.

    `context` is what a reply is judged against (for SQL its CREATE TABLE statements), empty where there is none.
    """

    prompt: str
    chosen: str
    rejected: str
    context: str = ""


class RowOptions(NamedTuple):
    """How text columns become a prompt and a completion (used by formats that have no ready-made prompt)."""

    prompt_template: str = "{context}\nQuestion: {question}\nAnswer:"
    completion_template: str = " {answer}"


class RowFormat(NamedTuple):
    """A named way to read a row: `prompt_columns` are always needed, `completion_columns` only for training."""

    prompt_columns: tuple[str, ...]
    completion_columns: tuple[str, ...]
    to_pair: Callable[[Mapping[str, str], RowOptions], PreferencePair]


def sql_create_context(row: Mapping[str, str], options: RowOptions) -> PreferencePair:
    """The format of `b-mc2/sql-create-context`: question + CREATE TABLE context, and the SQL that answers.

    The rejected completion is the empty text (its only token will be EOS): "say nothing" is what is dispreferred.
    """
    return PreferencePair(
        prompt=options.prompt_template.format_map(row),
        chosen=options.completion_template.format_map(row) if "answer" in row else "",
        rejected="",
        context=row["context"],
    )


def preference(row: Mapping[str, str], options: RowOptions) -> PreferencePair:
    """The standard explicit-prompt format of preference data, its three texts taken as they are."""
    return PreferencePair(row["prompt"], row.get("chosen", ""), row.get("rejected", ""), row.get("context", ""))


FORMATS: dict[str, RowFormat] = {
    "sql_create_context": RowFormat(("question", "context"), ("answer",), sql_create_context),
    "preference": RowFormat(("prompt",), ("chosen", "rejected"), preference),
}


def find_format(columns: Sequence[str], source: str, name: str | None = None, completions: bool = True) -> str:
    """Name of the format that fits `columns`: `name` checked if given, else the first whose columns are there.

    `completions=False` asks for the prompt's columns alone (prediction).

    Raises:
        UserError: an unknown `name`, a column that `name` needs but the data lacks, or columns that fit no format.
    """

    def missing(row_format: RowFormat) -> list[str]:
        needed = row_format.prompt_columns + (row_format.completion_columns if completions else ())
        return [column for column in needed if column not in columns]

    if name is not None:
        if name not in FORMATS:
            raise UserError(f"unknown data format '{name}': data.format is one of {', '.join(FORMATS)}")
        if absent := missing(FORMATS[name]):
            raise UserError(
                f"{source}: column {_quoted(absent)} is missing for format '{name}'; the data has {_quoted(columns)}"
            )
        return name
    for candidate, row_format in FORMATS.items():
        if not missing(row_format):
            return candidate
    wanted = "; ".join(
        f"{name} needs {', '.join(f.prompt_columns + (f.completion_columns if completions else ()))}"
        for name, f in FORMATS.items()
    )
    raise UserError(f"{source}: columns {_quoted(columns)} fit no data format ({wanted}); rename the columns")


def check_templates(options: RowOptions) -> None:
    """Raises UserError where a template names a field that the founding format does not have."""
    for key, template in options._asdict().items():
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
        except ValueError as error:
            raise UserError(f"data.{key} {template!r} is not a valid template: {error}") from error
        if unknown := sorted(fields - {"question", "context", "answer"}):
            raise UserError(
                f"data.{key} {template!r} names {_quoted(unknown)}: it may use {{context}}, {{question}} and {{answer}}"
            )
    if "answer" in {field for _, field, _, _ in string.Formatter().parse(options.prompt_template)}:
        raise UserError("data.prompt_template holds {answer}: the prompt would contain the reply that is to be learnt")


def row_to_pair(
    row: Mapping[str, Any], format_name: str, options: RowOptions, where: str, completions: bool = True
) -> PreferencePair:
    """Checks the columns that the format reads and makes the pair.

    Args:
        where: file and row number, for the message.

    Raises:
        UserError: a column that is absent, null, not text, or empty where text is needed.
    """
    row_format = FORMATS[format_name]
    for column in row_format.prompt_columns + (row_format.completion_columns if completions else ()):
        value = row.get(column)
        if not isinstance(value, str):
            found = "nothing" if column not in row else "null" if value is None else f"{type(value).__name__} {value!r}"
            raise UserError(
                f"{where}, column '{column}': found {_cut(found)} where text belongs; mend or remove the row"
            )
    text = {column: value for column, value in row.items() if isinstance(value, str)}
    pair = row_format.to_pair(text, options)
    if not pair.prompt.strip():
        raise UserError(f"{where}: the prompt is empty; mend or remove the row")
    if completions and not pair.chosen.strip():
        raise UserError(f"{where}: the chosen completion is empty; mend or remove the row")
    return pair


def shuffled_partners(texts: Sequence[str], seed: int, source: str) -> np.ndarray:
    """For `rejected: shuffled`: a permutation, int64 [n], that pairs each text with a different text of the data.

    Equal texts are laid side by side in a seeded order and the order is then turned by the size of the largest
    group, so no text can meet its equal, and every text is used exactly once.

    Raises:
        UserError: one text makes up more than half of the data, so there is no such permutation.
    """
    groups, inverse, counts = np.unique(np.asarray(texts, dtype=object), return_inverse=True, return_counts=True)
    turn = int(counts.max())
    if 2 * turn > len(texts):
        raise UserError(
            f"{source}: rejected: shuffled needs other rows' answers, but {turn} of {len(texts)} have the same one"
        )
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(texts)), rng.permutation(len(groups))[inverse]))
    partners = np.empty(len(texts), dtype=np.int64)
    partners[order] = np.roll(order, turn)
    return partners


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _cut(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[:length] + "…"
