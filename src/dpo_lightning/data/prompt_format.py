"""How a model was trained to be asked -> a small JSON file beside its weights, and back.

A model answers as it was trained only where it is asked as it was trained: with the same template, or with its chat
template, or with the bare prompt. So that travels with the model, in checkpoints and in exported folders, as plain
data. What is read was perhaps written by a stranger: a template is text with `{question}` and `{context}`, no more.
"""

import json
import string
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dpo_lightning.data.formats import FORMATS, RowOptions
from dpo_lightning.data.rendering import render_chats
from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import first_line

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from transformers import PreTrainedTokenizerBase

FILE = "dpo_lightning.json"  # in an exported folder
KEY = "dpo_lightning_asking"  # in a checkpoint
LARGEST = 1_000_000  # bytes of the file
LONGEST = 100_000  # characters of a template
PLACES = ("context", "question")


class PromptFormat(NamedTuple):
    """How a model was trained to be asked.

    With `chat`, by its tokenizer's chat template; else by `prompt_template`; with neither, by the prompt as it is.
    """

    chat: bool
    prompt_template: str | None = None  # of rows with a question and a context
    completion_start: str | None = None  # what a reply begins with; None where that was up to the rows
    end_token: str | None = None  # what a reply ends with
    format: str | None = None  # of the training data, for readers: it is never looked up
    chat_template: str | None = None  # Jinja, in checkpoints alone: an exported tokenizer has it

    @property
    def uses_schema(self) -> bool:
        """Whether a schema can be a part of the prompt."""
        return self.chat or self.prompt_template is not None and "context" in placeholders(self.prompt_template)

    def prompt(self, question: str, schema: str, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The prompt, as training makes it.

        Raises:
            UserError: the tokenizer's chat template is missing or refuses the question.
        """
        if self.prompt_template is not None:
            return self.prompt_template.format_map({"context": schema, "question": question})
        if not self.chat:
            return question
        messages = [{"role": "user", "content": f"{schema}\n{question}" if schema else question}]
        try:
            return render_chats(tokenizer, None, [(messages, True)])[0]
        except UserError:
            raise
        except Exception as error:  # Jinja's, or whatever the template raises
            raise UserError(f"the model's chat template cannot be used: {first_line(error)}") from error

    def fit_out(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Gives a tokenizer the end of replies and the chat template that were trained with it."""
        if self.end_token and self.end_token in tokenizer.get_vocab():
            tokenizer.eos_token = self.end_token
        if self.chat_template:
            tokenizer.chat_template = self.chat_template


def trained_prompt_format(
    formats: Iterable[tuple[str, bool]], options: RowOptions, end_token: str, chat_template: str | None
) -> PromptFormat:
    """The way of asking that training data follow.

    Args:
        formats: of each data set the format's name, and whether it holds conversations.
        chat_template: Jinja, where it is not the tokenizer's own.
    """
    names, chats = zip(*formats, strict=True)
    said = ", ".join(dict.fromkeys(names))
    if any(chats):
        return PromptFormat(True, end_token=end_token, format=said, chat_template=chat_template)
    if any(name in FORMATS and "question" in FORMATS[name].prompt_columns for name in names):
        start = next(iter(string.Formatter().parse(options.completion_template)), ("", None, None, None))[0]
        return PromptFormat(False, options.prompt_template, start, end_token, said)
    return PromptFormat(False, end_token=end_token, format=said)


def prompt_format_of(trainer: "Trainer | None") -> PromptFormat | None:
    """The way of asking of a run; None where it has no training data of ours."""
    data = getattr(trainer, "datamodule", None)
    return data.prompt_format() if data is not None and hasattr(data, "prompt_format") else None


def resolved_template(given: str | None, prompt_format: PromptFormat | None, where: str) -> str:
    """The template to ask with: the one that was given, else the one of training, else the usual one.

    Args:
        given: the user's setting.
        prompt_format: how the model was trained to be asked, if that is known.
        where: what says so, for messages.
    """
    trained = prompt_format.prompt_template if prompt_format else None
    if trained is None:
        return given if given is not None else RowOptions().prompt_template
    if given is None:
        rank_zero_info(f"data.prompt_template is {quoted(trained)}, with which '{where}' was trained")
    elif given != trained:
        rank_zero_warn(
            f"data.prompt_template is {quoted(given)}, but '{where}' was trained with {quoted(trained)} and may answer "
            "worse to another; leave data.prompt_template out to use that"
        )
    return trained if given is None else given


# ---------------------------------------------------------------------- file and checkpoint


def write_prompt_format(folder: Path, prompt_format: PromptFormat | None) -> None:
    """Writes the file into a model's folder, if the way of asking is known."""
    if prompt_format is not None:
        values = {name: value for name, value in prompt_format._asdict().items() if name != "chat_template"}
        text = json.dumps({"written by": "dpo-lightning", **values}, indent=2)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_prompt_format(folder: str) -> PromptFormat | None:
    """What a model's folder says, None where it says nothing.

    Raises:
        UserError: the file cannot be read, or is not what `write_prompt_format` writes.
    """
    path = Path(folder).expanduser() / FILE
    if not path.exists():
        return None
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise ValueError(f"it is no file of at most {LARGEST:,} bytes")
        prompt_format = checked(json.loads(path.read_bytes().decode("utf-8")))
        return prompt_format._replace(chat_template=None)  # the tokenizer beside has it
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"'{path}', which says how to ask the model, cannot be used: {first_line(error)}; mend it, or remove it"
        ) from error


def checkpoint_prompt_format(checkpoint: Mapping[str, Any], path: str) -> PromptFormat | None:
    """What a checkpoint says, None where it says nothing.

    Raises:
        UserError: what it says is not what a run writes.
    """
    values = checkpoint.get(KEY)
    try:
        return None if values is None else checked(values)
    except ValueError as error:
        raise UserError(f"checkpoint '{path}' does not say rightly how to ask its model: {error}") from error


def checked(values: Any) -> PromptFormat:
    """An Asking from what was read; what it does not know is left out.

    Raises:
        ValueError: something is missing or is not of its type, or a template has more than plain places.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"it is {type(values).__name__} where names with values belong")
    if not isinstance(values.get("chat"), bool):
        raise ValueError("its 'chat' is not true or false")
    known = {name: values[name] for name in PromptFormat._fields if values.get(name) is not None}
    for name, value in known.items():
        if name != "chat" and not isinstance(value, str):
            raise ValueError(f"its '{name}' is {type(value).__name__} where text belongs")
        if name != "chat" and len(value) > LONGEST:
            raise ValueError(f"its '{name}' has {len(value):,} characters where at most {LONGEST:,} belong")
        if name != "chat" and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"its '{name}' has half a character where Unicode text belongs")
    if "prompt_template" in known:
        if known["chat"]:
            raise ValueError("it has a 'prompt_template' though its 'chat' is true")
        placeholders(known["prompt_template"])
    return PromptFormat(**known)


def placeholders(template: str) -> set[str]:
    """The places of a template: of `question` and `context`, those that it has.

    Raises:
        ValueError: it has another one, or one with a format, a conversion, an attribute or an index.
    """
    if len(template) > LONGEST:
        raise ValueError(f"the template {quoted(template)} has more than {LONGEST:,} characters")
    try:
        pieces = string.Formatter().parse(template)
        parsed = [(name, spec, conversion) for _, name, spec, conversion in pieces if name is not None]
    except ValueError as error:
        raise ValueError(f"the template {quoted(template)} is not valid: {error}") from error
    for name, spec, conversion in parsed:
        if name not in PLACES or spec or conversion:
            raise ValueError(
                f"the template {quoted(template)} may have {{context}} and {{question}} in braces and nothing else"
            )
    return {name for name, _, _ in parsed}


def quoted(template: str) -> str:
    """A template on one line, for messages."""
    return repr(template if len(template) <= 200 else template[:200] + "…")  # repr escapes what terminals obey
