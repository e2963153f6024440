"""A name and a template from the command line -> the folder to load, and how its model is asked; for `chat`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_lightning.data.formats import RowOptions, placeholders, quoted
from dpo_lightning.data.prompt_format import FILE, PromptFormat
from dpo_lightning.errors import UserError
from dpo_lightning.models.policy import ADAPTER_CONFIG
from dpo_lightning.visible import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def model_folder(name: str, option: str) -> str:
    """The folder or hub id to load for what was given; of a run's folder, the model that it wrote.

    Raises:
        UserError: it is a checkpoint, another file, or a run's folder without a model.
    """
    path = Path(name).expanduser()
    if path.suffix == ".ckpt" and path.exists():
        raise UserError(
            f"{option} '{name}' is a checkpoint: write its model as a folder first, with "
            f"`python cli.py export --ckpt_path {name} --output_dir FOLDER`, and give that folder"
        )
    if path.is_file():
        raise UserError(f"{option} '{name}' is a file: give the folder of a model, or a hub id")
    if not path.is_dir() or any((path / config).exists() for config in ("config.json", ADAPTER_CONFIG)):
        return name
    inner = path / "huggingface"
    if inner.is_dir():
        note(f"{option}: the model of this run, '{inner}'")
        return str(inner)
    if found := next((p for folder in (path, path / "checkpoints") for p in sorted(folder.glob("*.ckpt"))), None):
        raise UserError(
            f"{option} '{name}' has checkpoints but no exported model: write one first, with "
            f"`python cli.py export --ckpt_path {found} --output_dir FOLDER`, and give that folder"
        )
    return name


def check_template(prompt_format: PromptFormat | None, where: str) -> None:
    """Raises UserError for a template that does not ask the question, or has more than plain places."""
    if prompt_format is None or prompt_format.prompt_template is None:
        return
    try:
        found = placeholders(prompt_format.prompt_template)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if "question" not in found:
        raise UserError(f"{where}: the template {quoted(prompt_format.prompt_template)} does not have {{question}}")


def assumed_prompt_format(tokenizer: "PreTrainedTokenizerBase") -> PromptFormat:
    """The usual way to ask a model of which no more is known than its tokenizer."""
    if tokenizer.chat_template:
        return PromptFormat(chat=True)
    return PromptFormat(chat=False, prompt_template=RowOptions().prompt_template)


def remarks(model: str, prompt_format: PromptFormat, trained: PromptFormat | None, given: bool) -> Iterator[str]:
    """What the user is to know of how the model is asked, a line each.

    Args:
        prompt_format: how it is asked.
        trained: how it was trained to be asked, if that is known.
        given: the user chose the template.
    """
    if trained is None and not given:
        assumed = way(prompt_format)
        yield f"it is not known how '{model}' was trained to be asked (no {FILE} in it); assumed is {assumed}"
    elif trained is not None and given and (trained.chat or trained.prompt_template != prompt_format.prompt_template):
        yield f"'{model}' was trained with {way(trained)}, and may answer worse to --prompt_template"
    elif trained is not None and not given:
        yield f"'{model}' is asked as it was trained, with {way(trained)}"
    if not prompt_format.uses_schema:
        yield "a schema has no part in this"


def way(prompt_format: PromptFormat) -> str:
    """A way of asking in words."""
    if prompt_format.chat:
        return "the tokenizer's chat template"
    if prompt_format.prompt_template is None:
        return "bare prompts: the line that is typed is the prompt, as it is"
    return f"the template {quoted(prompt_format.prompt_template)}"


def note(text: str) -> None:
    """Says something that is no reply."""
    print(visible(text), file=sys.stderr, flush=True)
