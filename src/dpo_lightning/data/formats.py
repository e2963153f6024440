"""Data set row -> PreferencePair(prompt, chosen, rejected): one small function per format, found by name.

A format says which columns it reads, so it can be recognised from the columns of the data. Adding one is a
function and a line in `FORMATS`; a user's own is a function named in YAML (`my_pkg.my_module:my_row_fn`).
"""

import os
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_lightning.data.cells import _cut, messages, number, text
from dpo_lightning.data.pair import BadCell, BadRow, PreferencePair
from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.parsing import imported_function
from dpo_lightning.storage.digests import file_digest
from dpo_lightning.visible import one_line

if TYPE_CHECKING:
    from dpo_lightning.data.chat import ChatTemplate

LISTED = 20  # names of columns in a message
ASSISTANT_TURN = "\n\nAssistant:"  # ends the prompt in transcripts such as Anthropic's HH


def no_chat_template() -> "ChatTemplate":
    """Stands for the chat template where there is none: raises UserError."""
    raise UserError(
        "the data are conversations, but the tokenizer has no chat template: give data.chat_template a Jinja file"
    )


class RowOptions(NamedTuple):
    """How columns become a prompt and a completion (used by formats that have no ready-made prompt)."""

    prompt_template: str = "{context}\nQuestion: {question}\nAnswer:"
    completion_template: str = " {answer}"
    chat: "Callable[[], ChatTemplate]" = no_chat_template  # called for rows that hold messages


class RowFormat(NamedTuple):
    """A named way to read a row: `prompt_columns` are always needed, `completion_columns` only for training.

    `to_pair(row, options, completions)` may raise BadCell; what it returns is checked by `row_to_pair`.
    """

    prompt_columns: tuple[str, ...]
    completion_columns: tuple[str, ...]
    to_pair: Callable[[Mapping[str, Any], RowOptions, bool], PreferencePair]
    fingerprint: str = ""  # of a user's function: changes with its file


OPTIONAL_COLUMNS = ("context", "weight", "margin")  # read in every format

# ---------------------------------------------------------------------- cells


# ---------------------------------------------------------------------- formats


def sql_create_context(row: Mapping[str, Any], options: RowOptions, completions: bool) -> PreferencePair:
    """The format of `b-mc2/sql-create-context`: question + CREATE TABLE context, and the SQL that answers.

    The rejected completion is the empty text (its only token will be EOS): "say nothing" is what is dispreferred.
    """
    cells = {column: text(row, column) for column in ("question", "context")}
    if completions or row.get("answer") is not None:
        cells["answer"] = text(row, "answer")
    return PreferencePair(
        prompt=options.prompt_template.format_map(cells),
        chosen=options.completion_template.format_map(cells) if "answer" in cells else "",
        rejected="",
    )


def preference(row: Mapping[str, Any], options: RowOptions, completions: bool) -> PreferencePair:
    """An explicit prompt with two completions, each of them text or messages.

    Where chosen and rejected are whole conversations (UltraFeedback-binarized), the prompt is what they share.
    """
    if not isinstance(row.get("prompt"), list | tuple) and not isinstance(row.get("chosen"), list | tuple):
        chosen, rejected = (
            text(row, side) if completions or row.get(side) is not None else "" for side in ("chosen", "rejected")
        )
        return PreferencePair(text(row, "prompt"), chosen, rejected)
    if completions and messages(row, "chosen")[0]["role"] != "assistant":
        return implicit_preference(row, options, completions)
    prompt = _prompt_messages(row)
    good, bad = (messages(row, side) if completions else [] for side in ("chosen", "rejected"))
    return options.chat().pair(prompt, good, bad)


def implicit_preference(row: Mapping[str, Any], options: RowOptions, completions: bool) -> PreferencePair:
    """Two whole texts, transcripts or conversations; the prompt is what they share, up to a reply."""
    if isinstance(row.get("chosen"), list | tuple):
        good, bad = messages(row, "chosen"), messages(row, "rejected")
        shared = shared_messages(good, bad)
        if shared is None:
            raise BadCell("no shared prompt", "chosen", "found no assistant's reply after what it shares with rejected")
        return options.chat().pair(good[:shared], good[shared:], bad[shared:])
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    shared = shared_text(chosen, rejected)
    return PreferencePair(chosen[:shared], chosen[shared:], rejected[shared:])


def prompt_completion(row: Mapping[str, Any], options: RowOptions, completions: bool) -> PreferencePair:
    """A prompt and one good completion, text or messages; the rejected completion is empty."""
    if not any(isinstance(row.get(column), list | tuple) for column in ("prompt", "completion")):
        return PreferencePair(text(row, "prompt"), text(row, "completion") if completions else "", "")
    return options.chat().pair(_prompt_messages(row), messages(row, "completion") if completions else [], [])


def conversation(row: Mapping[str, Any], options: RowOptions, completions: bool) -> PreferencePair:
    """One good conversation in `messages`: its last reply is chosen, the rejected completion is empty."""
    turns = messages(row, "messages")
    if turns[-1]["role"] == "assistant":
        return options.chat().pair(turns[:-1], turns[-1:], [])
    if completions:
        raise BadCell("no reply", "messages", f"found a last message by {turns[-1]['role']!r} where a reply belongs")
    return options.chat().pair(turns, [], [])


FORMATS: dict[str, RowFormat] = {
    "sql_create_context": RowFormat(("question", "context"), ("answer",), sql_create_context),
    "preference": RowFormat(("prompt",), ("chosen", "rejected"), preference),
    "implicit_preference": RowFormat(("chosen", "rejected"), (), implicit_preference),
    "prompt_completion": RowFormat(("prompt",), ("completion",), prompt_completion),
    "messages": RowFormat(("messages",), (), conversation),
}


def shared_text(chosen: str, rejected: str) -> int:
    """How many characters of two texts are their prompt.

    What they share, back to the end of its last "\\n\\nAssistant:" where they are transcripts; else back to the
    last blank, which goes to the completions, so that no word is cut in two.
    """
    shared = len(os.path.commonprefix([chosen, rejected]))
    marker = chosen.rfind(ASSISTANT_TURN, 0, shared)
    if marker >= 0:
        return marker + len(ASSISTANT_TURN)
    return max(0, *(chosen.rfind(blank, 0, shared + 1) for blank in (" ", "\n", "\t")))


def shared_messages(chosen: Sequence[dict[str, str]], rejected: Sequence[dict[str, str]]) -> int | None:
    """How many messages of two conversations are their prompt: those they share, back to where both are replied to."""
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    for turn in range(min(shared, len(chosen) - 1, len(rejected) - 1), 0, -1):
        if chosen[turn]["role"] == rejected[turn]["role"] == "assistant":
            return turn
    return None


def _prompt_messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    if isinstance(row.get("prompt"), str):
        return [{"role": "user", "content": text(row, "prompt")}]
    return messages(row, "prompt")


def user_format(name: str) -> RowFormat:
    """The user's own row function `package.module:function`: row -> PreferencePair, or a dict read as `preference`.

    Raises:
        UserError: it cannot be imported.
    """
    function = imported_function(name, "data.format")

    def to_pair(row: Mapping[str, Any], options: RowOptions, completions: bool) -> PreferencePair:
        try:
            made = function(dict(row))
        except Exception as error:
            found = _cut(" ".join(f"{type(error).__name__}: {error}".split()), 200)
            raise BadCell("format function", "", f"{name} raised {found}") from error
        if isinstance(made, PreferencePair):
            for field in ("prompt", "chosen", "rejected"):
                text(made._asdict(), field)
            return with_optional_columns(made, made._asdict())
        if isinstance(made, Mapping):
            form = preference if "prompt" in made else implicit_preference
            pair = form({"rejected": "", **made}, options, completions)
            return with_optional_columns(pair, made)
        found = _cut(f"{type(made).__name__} {made!r}")
        raise BadCell("format function", "", f"{name} returned {found} where a PreferencePair or a dict belongs")

    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)  # a module that is built in has none
    return RowFormat((), (), to_pair, file_digest(Path(file)) if file else "")


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
        if absent := missing(get_format(name)):
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
    raise UserError(
        f"{source}: columns {_quoted(columns)} fit no data format ({wanted}); rename the columns, or give data.format "
        "a function of yours (my_module:my_function)"
    )


def get_format(name: str) -> RowFormat:
    """A format of `FORMATS`, or a user's function.

    Raises:
        UserError: there is none of this name.
    """
    if ":" in name:
        return user_format(name)
    if name not in FORMATS:
        raise UserError(
            f"unknown data format '{name}': data.format is one of {', '.join(FORMATS)}, or my_module:my_function"
            + did_you_mean(name, FORMATS)
        )
    return FORMATS[name]


def check_templates(options: RowOptions) -> None:
    """Checks that templates hold nothing but text and the plain fields that the founding format has.

    Raises:
        UserError: another field, or a format, conversion, index or attribute with one: these fail on some rows and
            not on others, fill the memory (`{question:>9999999999}`) or show what is no data (`{question.__class__}`).
    """
    for key in ("prompt_template", "completion_template"):
        template = getattr(options, key)
        said = f"data.{key} {_cut(template)!r}"
        try:
            fields = [part[1:] for part in string.Formatter().parse(template)]
        except ValueError as error:
            raise UserError(f"{said} is not a valid template: {error}; write a brace of the text twice") from error
        if unknown := sorted(
            {field for field, _, _ in fields if field is not None} - {"question", "context", "answer"}
        ):
            raise UserError(
                f"{said} names {_quoted(unknown)}: it may use {{context}}, {{question}} and {{answer}}, and has a "
                "brace of the text twice"
            )
        if formatted := [field for field, spec, conversion in fields if spec or conversion]:
            raise UserError(f"{said} gives {{{formatted[0]}}} a format: nothing but the name may stand in the braces")
    if "answer" in {field for _, field, _, _ in string.Formatter().parse(options.prompt_template)}:
        raise UserError("data.prompt_template holds {answer}: the prompt would contain the reply that is to be learnt")


# ---------------------------------------------------------------------- rows


def row_to_pair(
    row: Mapping[str, Any], row_format: RowFormat, options: RowOptions, where: str, completions: bool = True
) -> PreferencePair:
    """Checks the columns that the format reads and makes the pair.

    Args:
        where: file and row number, for the message.

    Raises:
        BadRow: a column that is absent, null, of the wrong type or damaged, or empty where text is needed.
    """
    try:
        pair = row_format.to_pair(row, options, completions)
        if row_format.prompt_columns:
            pair = with_optional_columns(pair, row)
        if not pair.prompt.strip():
            raise BadCell("empty prompt", "", "the prompt is empty")
        if completions and not pair.chosen.strip():
            raise BadCell("empty chosen", "", "the chosen completion is empty")
        return pair
    except BadCell as error:
        column = f", column '{error.column}'" if error.column else ""
        raise BadRow(error.reason, f"{where}{column}: {error}") from None


def with_optional_columns(pair: PreferencePair, row: Mapping[str, Any]) -> PreferencePair:
    """Adds `context`, `weight` and `margin` where the row has them.

    Raises:
        BadCell: a weight below 0, a weight or margin that is not finite, a damaged context.
    """
    if isinstance(row.get("context"), str):
        pair = pair._replace(context=text(row, "context"))
    if row.get("weight") is None and row.get("margin") is None:
        return pair
    weight, margin = number(row, "weight", 1.0), number(row, "margin", 0.0)
    if weight < 0:
        raise BadCell("bad weight", "weight", f"found {weight:g} where a number of 0 or more belongs")
    return pair._replace(weight=weight, margin=margin)


def _quoted(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(f"'{one_line(_cut(str(name)))}'" for name in names[:LISTED]) + more
