"""The prompt format that a model was trained with -> a small JSON file beside its weights, and back.

A model answers as it was trained only if its prompts look as in training: made by the same template, by its chat
template, or by no template at all. So the format travels with the model, in checkpoints and in exported folders, as
plain data. A stranger may have written what is read: a template is text with `{question}` and `{context}`, no more.
"""

import json
import string
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dpo_lightning.data.formats import FORMATS, LONGEST_TEMPLATE, RowOptions, placeholders, quoted
from dpo_lightning.data.rendering import render_chats
from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import first_line, local_path

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from transformers import PreTrainedTokenizerBase

FILE = "dpo_lightning.json"  # in an exported folder
KEY = "dpo_lightning_asking"  # in a checkpoint; the name is older than "prompt format"
LARGEST = 1_000_000  # bytes of the file


class PromptFormat(NamedTuple):
    """How the prompts of a model's training were made.

    With `chat`, by the tokenizer's chat template; else by `prompt_template`; with neither, a prompt is used as it is.
    """

    chat: bool
    prompt_template: str | None = None  # for rows with a question and a context
    completion_start: str | None = None  # what replies begin with; None where the rows decided
    end_token: str | None = None  # what replies end with
    format: str | None = None  # of the training data; for readers, never looked up
    chat_template: str | None = None  # Jinja; only in checkpoints, an exported tokenizer has it

    @property
    def uses_schema(self) -> bool:
        """Whether a prompt can contain a schema."""
        return self.chat or self.prompt_template is not None and "context" in placeholders(self.prompt_template)

    def prompt(self, question: str, schema: str, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The prompt of a question, as in training.

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

    def apply_to(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Gives a tokenizer the EOS token and the chat template of training."""
        if self.end_token and self.end_token in tokenizer.get_vocab():
            tokenizer.eos_token = self.end_token
        if self.chat_template:
            tokenizer.chat_template = self.chat_template


def trained_prompt_format(
    formats: Iterable[tuple[str, bool]], options: RowOptions, end_token: str, chat_template: str | None
) -> PromptFormat:
    """The prompt format of training data.

    Args:
        formats: for each data set, the name of its row format and whether it has conversations.
        chat_template: Jinja source, if it is not the tokenizer's own.
    """
    names, chats = zip(*formats, strict=True)
    row_formats = ", ".join(dict.fromkeys(names))
    if any(chats):
        return PromptFormat(True, end_token=end_token, format=row_formats, chat_template=chat_template)
    templated = [name for name in names if name in FORMATS and "question" in FORMATS[name].prompt_columns]
    if templated or {"rendered", "rendered_unpaired"} & set(names):  # of which a template made the prompts before
        start = next(iter(string.Formatter().parse(options.completion_template)), ("", None, None, None))[0]
        return PromptFormat(False, options.prompt_template, start, end_token, row_formats)
    return PromptFormat(False, end_token=end_token, format=row_formats)


def prompt_format_of(trainer: "Trainer | None") -> PromptFormat | None:
    """The prompt format of a run, None if it has no training data of ours."""
    data = getattr(trainer, "datamodule", None)
    return data.prompt_format() if data is not None and hasattr(data, "prompt_format") else None


def resolved_template(given: str | None, prompt_format: PromptFormat | None, where: str) -> str:
    """The prompt template to use: the user's, else that of training, else the default.

    Args:
        given: the user's setting.
        prompt_format: of the model's training, if known.
        where: the folder or checkpoint that it was read from, for messages.
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
    """Writes the file into a model's folder, if the format is known."""
    if prompt_format is not None:
        values = {name: value for name, value in prompt_format._asdict().items() if name != "chat_template"}
        text = json.dumps({"written by": "dpo-lightning", **values}, indent=2)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_prompt_format(folder: str) -> PromptFormat | None:
    """The prompt format in a model's folder, None without one.

    Raises:
        UserError: the file cannot be read, or is not what `write_prompt_format` writes.
    """
    path = local_path(folder) / FILE
    if not path.exists():
        return None
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise ValueError(f"it is not a file of at most {LARGEST:,} bytes")
        prompt_format = checked(json.loads(path.read_bytes().decode("utf-8")))
        return prompt_format._replace(chat_template=None)  # the tokenizer in the folder has it
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"'{path}', which says how to ask the model, cannot be used: {first_line(error)}; fix it, or remove it"
        ) from error


def checkpoint_prompt_format(checkpoint: Mapping[str, Any], path: str) -> PromptFormat | None:
    """The prompt format in a checkpoint, None without one.

    Raises:
        UserError: it is not valid.
    """
    values = checkpoint.get(KEY)
    try:
        return None if values is None else checked(values)
    except ValueError as error:
        raise UserError(f"checkpoint '{path}' is not valid where it says how to ask its model: {error}") from error


def checked(values: Any) -> PromptFormat:
    """A PromptFormat from what was read. Unknown names are ignored.

    Raises:
        ValueError: a value is missing or of the wrong type, or the template is not valid (see `placeholders`).
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"it is {type(values).__name__} where names with values belong")
    if not isinstance(values.get("chat"), bool):
        raise ValueError("its 'chat' is not true or false")
    known = {name: values[name] for name in PromptFormat._fields if values.get(name) is not None}
    for name, value in known.items():
        if name == "chat":
            continue
        if not isinstance(value, str):
            raise ValueError(f"its '{name}' is {type(value).__name__} where text belongs")
        if len(value) > LONGEST_TEMPLATE:
            raise ValueError(f"its '{name}' has {len(value):,} characters where at most {LONGEST_TEMPLATE:,} belong")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"its '{name}' has half a character where Unicode text belongs")
    if "prompt_template" in known:
        if known["chat"]:
            raise ValueError("it has a 'prompt_template' although its 'chat' is true")
        placeholders(known["prompt_template"])
    return PromptFormat(**known)
