"""Data set row -> PreferencePair(prompt, chosen, rejected): one small function per format.

A format lists the columns that it reads, so that it can be recognized from the columns of a data set. To add one, write
a function and a line in `FORMATS`; users name a function of their own in YAML (`my_package.my_module:my_function`).
"""

import os
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_lightning.data.cells import messages, number, shortened, text, truth
from dpo_lightning.data.pair import BadCell, BadRow, PreferencePair
from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.storage.digests import file_digest
from dpo_lightning.visible import one_line
from dpo_lightning.worker import imported_function

if TYPE_CHECKING:
    from dpo_lightning.data.chat import ChatTemplate

LISTED = 20  # column names in a message
LONGEST_TEMPLATE = 100_000  # characters
ASSISTANT_TURN = "\n\nAssistant:"  # ends the prompt in transcripts such as Anthropic's HH


def no_chat_template() -> "ChatTemplate":
    """Takes the place of a chat template that does not exist: raises UserError."""
    raise UserError(
        "the data are conversations, but the tokenizer has no chat template: give data.chat_template a Jinja file"
    )


class RowOptions(NamedTuple):
    """Templates for the formats whose columns are not prompt and completion themselves."""

    prompt_template: str = "{context}\nQuestion: {question}\nAnswer:"
    completion_template: str = " {answer}"
    chat: "Callable[[], ChatTemplate]" = no_chat_template  # called for rows with messages


class RowFormat(NamedTuple):
    """How to read a row. `prompt_columns` are always needed, `completion_columns` only for training.

    `to_pair(row, options, completions)` may raise BadCell; `row_to_pair` checks what it returns.
    """

    prompt_columns: tuple[str, ...]
    completion_columns: tuple[str, ...]
    to_pair: Callable[[Mapping[str, Any], RowOptions, bool], PreferencePair]
    fingerprint: str = ""  # of a user's function: the digest of its file


OPTIONAL_COLUMNS = ("context", "weight", "margin")  # read in every format

# ---------------------------------------------------------------------- formats


def sql_create_context(row: Mapping[str, Any], options: RowOptions, completions: bool) -> PreferencePair:
    """The format of `b-mc2/sql-create-context`: a question, CREATE TABLE statements as context, and SQL as the answer.

    The rejected completion is empty (EOS alone): saying nothing is what is dispreferred.
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
    """An explicit prompt with two completions, each as text or as messages.

    Where chosen and rejected are complete conversations (UltraFeedback-binarized), the prompt is what they share.
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
    """Two complete texts, transcripts or conversations; the prompt is what they share, up to a reply."""
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
    """A prompt and a good completion, as text or as messages; the rejected completion is empty."""
    if not any(isinstance(row.get(column), list | tuple) for column in ("prompt", "completion")):
        return PreferencePair(text(row, "prompt"), text(row, "completion") if completions else "", "")
    return options.chat().pair(_prompt_messages(row), messages(row, "completion") if completions else [], [])


def unpaired(row: Mapping[str, Any], options: RowOptions, completions: bool) -> PreferencePair:
    """A prompt and one completion, as text or as messages, with a `label` that says whether it is good."""
    pair = prompt_completion(row, options, completions)
    if not completions:
        return pair
    if truth(row, "label"):
        return pair._replace(label=True)
    return pair._replace(chosen="", rejected=pair.chosen, label=False)


def conversation(row: Mapping[str, Any], options: RowOptions, completions: bool) -> PreferencePair:
    """A good conversation in `messages`: its last reply is chosen, the rejected completion is empty."""
    turns = messages(row, "messages")
    if turns[-1]["role"] == "assistant":
        return options.chat().pair(turns[:-1], turns[-1:], [])
    if completions:
        raise BadCell("no reply", "messages", f"found a last message by {turns[-1]['role']!r} where a reply belongs")
    return options.chat().pair(turns, [], [])


def rendered(row: Mapping[str, Any], options: RowOptions, completions: bool) -> PreferencePair:
    """As `preference` or `unpaired`, for texts that `rounds` and `label` wrote: a template has made their prompts, and
    where `chat` is true a chat template."""
    pair = (unpaired if "completion" in row and "chosen" not in row else preference)(row, options, completions)
    return pair._replace(chat=pair.chat or row.get("chat") is True)


FORMATS: dict[str, RowFormat] = {
    "sql_create_context": RowFormat(("question", "context"), ("answer",), sql_create_context),
    "rendered": RowFormat(("prompt", "chat"), ("chosen", "rejected"), rendered),
    "rendered_unpaired": RowFormat(("prompt", "chat"), ("completion", "label"), rendered),
    "preference": RowFormat(("prompt",), ("chosen", "rejected"), preference),
    "implicit_preference": RowFormat(("chosen", "rejected"), (), implicit_preference),
    "unpaired": RowFormat(("prompt",), ("completion", "label"), unpaired),
    "prompt_completion": RowFormat(("prompt",), ("completion",), prompt_completion),
    "messages": RowFormat(("messages",), (), conversation),
}


def shared_text(chosen: str, rejected: str) -> int:
    """Characters of two texts that are their prompt.

    In transcripts the shared text ends at its last "\\n\\nAssistant:", in others before its last blank, so that no word
    is cut in two.
    """
    shared = len(os.path.commonprefix([chosen, rejected]))
    marker = chosen.rfind(ASSISTANT_TURN, 0, shared)
    if marker >= 0:
        return marker + len(ASSISTANT_TURN)
    return max(0, *(chosen.rfind(blank, 0, shared + 1) for blank in (" ", "\n", "\t")))


def shared_messages(chosen: Sequence[dict[str, str]], rejected: Sequence[dict[str, str]]) -> int | None:
    """Messages of two conversations that are their prompt: those they share, up to where both have a reply."""
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
    """A user's function `package.module:function`: row -> PreferencePair, or a dict in the format `preference`.

    Raises:
        UserError: it cannot be imported.
    """
    function = imported_function(name, "data.format")

    def to_pair(row: Mapping[str, Any], options: RowOptions, completions: bool) -> PreferencePair:
        try:
            result = function(dict(row))
        except Exception as error:
            words = shortened(" ".join(f"{type(error).__name__}: {error}".split()), 200)
            raise BadCell("format function", "", f"{name} raised {words}") from error
        if isinstance(result, PreferencePair):
            for field in ("prompt", "chosen", "rejected"):
                text(result._asdict(), field)
            if result.label is not None:
                result = result._replace(label=truth(result._asdict(), "label"))
                if result.rejected if result.label else result.chosen:
                    raise BadCell("two completions", "label", "found a label beside two completions")
            return with_optional_columns(result, result._asdict())
        if isinstance(result, Mapping):
            read = preference if "prompt" in result else implicit_preference
            if {"completion", "label"} <= set(result):
                read = unpaired
            return with_optional_columns(read({"rejected": "", **result}, options, completions), result)
        words = shortened(f"{type(result).__name__} {result!r}")
        raise BadCell("format function", "", f"{name} returned {words} where a PreferencePair or a dict belongs")

    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)  # a module that is built in has none
    return RowFormat((), (), to_pair, file_digest(Path(file)) if file else "")


def find_format(columns: Sequence[str], source: str, name: str | None = None, completions: bool = True) -> str:
    """The format to read `columns` with: `name`, or without one the first format whose columns are all there.

    Args:
        completions: False for prediction, which needs only the columns of the prompt.

    Raises:
        UserError: an unknown `name`, a column that `name` needs and the data lacks, or columns that fit no format.
    """

    def needed(row_format: RowFormat) -> tuple[str, ...]:
        return row_format.prompt_columns + (row_format.completion_columns if completions else ())

    if name is not None:
        if absent := [column for column in needed(get_format(name)) if column not in columns]:
            raise UserError(
                f"{source}: column {_listed(absent)} is missing for format '{name}'; the data has {_listed(columns)}"
            )
        return name
    for candidate, row_format in FORMATS.items():
        if set(needed(row_format)) <= set(columns):
            return candidate
    needs = "; ".join(f"{name} needs {', '.join(needed(row_format))}" for name, row_format in FORMATS.items())
    raise UserError(
        f"{source}: columns {_listed(columns)} fit no data format ({needs}); rename the columns, or give data.format "
        "a function of yours (my_module:my_function)"
    )


def get_format(name: str) -> RowFormat:
    """A format of `FORMATS`, or a user's function.

    Raises:
        UserError: there is no format of this name.
    """
    if ":" in name:
        return user_format(name)
    if name not in FORMATS:
        raise UserError(
            f"unknown data format '{name}': data.format is one of {', '.join(FORMATS)}, or my_module:my_function"
            + did_you_mean(name, FORMATS)
        )
    return FORMATS[name]


def placeholders(template: str, allowed: Sequence[str] = ("context", "question")) -> set[str]:
    """The names that a template has in braces.

    Raises:
        ValueError: a name that is not `allowed`, or a name with a format, conversion, index or attribute. Those fail on
            some rows only, fill the memory (`{question:>9999999999}`) or reveal internals (`{question.__class__}`).
    """
    if len(template) > LONGEST_TEMPLATE:
        raise ValueError(f"the template {quoted(template)} has more than {LONGEST_TEMPLATE:,} characters")
    try:
        fields = [field for _, *field in string.Formatter().parse(template) if field[0] is not None]
    except ValueError as error:
        raise ValueError(
            f"{quoted(template)} is not a valid template: {error}; write a brace of the text twice"
        ) from error
    if any(name not in allowed or spec or conversion for name, spec, conversion in fields):
        names = ", ".join(f"{{{name}}}" for name in allowed)
        raise ValueError(
            f"the template {quoted(template)} may have {names} in braces and nothing else; "
            "write a brace of the text twice"
        )
    return {str(name) for name, *_ in fields}


def quoted(template: str) -> str:
    """A template on one line, for messages."""
    return repr(shortened(template, 200))  # repr escapes what terminals obey


def check_templates(options: RowOptions) -> None:
    """Checks the templates of a user's settings.

    Raises:
        UserError: one is not valid (see `placeholders`), or the prompt would contain the answer.
    """
    for key in ("prompt_template", "completion_template"):
        try:
            names = placeholders(getattr(options, key), ("context", "question", "answer"))
        except ValueError as error:
            raise UserError(f"data.{key}: {error}") from error
        if key == "prompt_template" and "answer" in names:
            raise UserError(f"data.{key} has {{answer}}: the prompt would contain the reply that is to be learned")


# ---------------------------------------------------------------------- rows


def row_to_pair(
    row: Mapping[str, Any], row_format: RowFormat, options: RowOptions, where: str, completions: bool = True
) -> PreferencePair:
    """Reads a row as its format says, and checks the pair.

    Args:
        where: file and row number, for messages.

    Raises:
        BadRow: a column is missing, null, of the wrong type or damaged, or the prompt or chosen completion is empty.
    """
    try:
        pair = row_format.to_pair(row, options, completions)
        if row_format.prompt_columns:
            pair = with_optional_columns(pair, row)
        if not pair.prompt.strip():
            raise BadCell("empty prompt", "", "the prompt is empty")
        if completions and pair.label is not False and not pair.chosen.strip():
            raise BadCell("empty chosen", "", "the chosen completion is empty")
        return pair
    except BadCell as error:
        column = f", column '{error.column}'" if error.column else ""
        raise BadRow(error.reason, f"{where}{column}: {error}") from None


def with_optional_columns(pair: PreferencePair, row: Mapping[str, Any]) -> PreferencePair:
    """Adds `context`, `weight` and `margin` where the row has them.

    Raises:
        BadCell: a weight below 0, a weight or margin that is not finite, or a damaged context.
    """
    if isinstance(row.get("context"), str):
        pair = pair._replace(context=text(row, "context"))
    if row.get("weight") is None and row.get("margin") is None:
        return pair
    weight, margin = number(row, "weight", 1.0), number(row, "margin", 0.0)
    if weight < 0:
        raise BadCell("bad weight", "weight", f"found {weight:g} where a number of 0 or more belongs")
    return pair._replace(weight=weight, margin=margin)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(f"'{one_line(shortened(str(name)))}'" for name in names[:LISTED]) + more
