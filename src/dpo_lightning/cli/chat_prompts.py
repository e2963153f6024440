"""For `chat` and `label`: the models that their arguments name, and the format of their prompts."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_lightning.data.formats import RowOptions, placeholders, quoted
from dpo_lightning.data.prompt_format import FILE, PromptFormat, read_prompt_format
from dpo_lightning.data.speakers import Speaker, load_speakers
from dpo_lightning.errors import UserError
from dpo_lightning.models.policy import ADAPTER_CONFIG
from dpo_lightning.visible import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_asked(
    model: str,
    reference: str | None,
    prompt_template: str | None,
    trust_remote_code: bool,
    options: tuple[str, str] = ("--model", "--reference"),
) -> tuple[list[Speaker], PromptFormat]:
    """The reference, if there is one, and the policy, in this order, and how to ask them.

    Args:
        prompt_template: the user's; None: that of the model's training, or else the usual one.
        options: that name the models, for messages.

    Raises:
        UserError: a model cannot be loaded, or the template is not valid.
    """
    model = model_folder(model, options[0])
    reference = reference and model_folder(reference, options[1])
    trained = read_prompt_format(model)
    prompt_format = trained if prompt_template is None else PromptFormat(False, prompt_template)
    check_template(prompt_format, "--prompt_template" if prompt_template is not None else f"'{model}'")
    speakers = load_speakers(model, reference, trust_remote_code)
    tokenizer = speakers[-1].tokenizer
    if trained:
        trained.apply_to(tokenizer)
    prompt_format = prompt_format or assumed_prompt_format(tokenizer)
    prompt_format.prompt("probe", "", tokenizer)  # a broken chat template is reported before the first question
    for line in remarks(model, prompt_format, trained, given=prompt_template is not None):
        note(line)
    return speakers, prompt_format


def model_folder(name: str, option: str) -> str:
    """The folder or hub id to load for an argument; for a run's folder, the model that the run exported.

    Raises:
        UserError: it is a checkpoint, another file, or a run's folder without an exported model.
    """
    path = Path(name).expanduser()
    if path.suffix == ".ckpt" and path.exists():
        raise UserError(
            f"{option} '{name}' is a checkpoint: write its model as a folder first, with "
            f"`dpo-lightning export --ckpt_path {name} --output_dir FOLDER`, and give that folder"
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
            f"`dpo-lightning export --ckpt_path {found} --output_dir FOLDER`, and give that folder"
        )
    return name


def check_template(prompt_format: PromptFormat | None, where: str) -> None:
    """Raises UserError for a template without {question}, or with more than plain placeholders."""
    if prompt_format is None or prompt_format.prompt_template is None:
        return
    try:
        names = placeholders(prompt_format.prompt_template)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if "question" not in names:
        raise UserError(f"{where}: the template {quoted(prompt_format.prompt_template)} does not have {{question}}")


def assumed_prompt_format(tokenizer: "PreTrainedTokenizerBase") -> PromptFormat:
    """The usual prompt format of a model about which only its tokenizer is known."""
    if tokenizer.chat_template:
        return PromptFormat(chat=True)
    return PromptFormat(chat=False, prompt_template=RowOptions().prompt_template)


def remarks(model: str, prompt_format: PromptFormat, trained: PromptFormat | None, given: bool) -> Iterator[str]:
    """Notes for the user on the format of the prompts, one a line.

    Args:
        prompt_format: the one in use.
        trained: the one in training, if known.
        given: whether the user gave the template.
    """
    if trained is None and not given:
        yield f"the prompt format of '{model}' is unknown (it has no {FILE}): using {description(prompt_format)}"
    elif trained is not None and given and (trained.chat or trained.prompt_template != prompt_format.prompt_template):
        yield f"'{model}' was trained with {description(trained)}: --prompt_template may make its replies worse"
    elif trained is not None and not given:
        yield f"prompts are as in the training of '{model}': {description(trained)}"
    if not prompt_format.uses_schema:
        yield "these prompts do not use a schema"


def description(prompt_format: PromptFormat) -> str:
    """A prompt format in words."""
    if prompt_format.chat:
        return "the tokenizer's chat template"
    if prompt_format.prompt_template is None:
        return "bare prompts: each line is used as a prompt, unchanged"
    return f"the template {quoted(prompt_format.prompt_template)}"


def note(text: str) -> None:
    """Prints something other than a reply, to stderr."""
    print(visible(text), file=sys.stderr, flush=True)
