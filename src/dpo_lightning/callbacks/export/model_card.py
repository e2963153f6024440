"""The README.md of an exported model: its origin and training, how to prompt it, and how it replies."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import transformers
from lightning.pytorch import Trainer

from dpo_lightning.callbacks.context import find_callback, optimized_by
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.data.prompt_format import PromptFormat
from dpo_lightning.data.splits import dataset_weights
from dpo_lightning.judging.views import markdown_table, markdown_text, visible
from dpo_lightning.models.hub import looks_local

if TYPE_CHECKING:
    from dpo_lightning.dpo.module import DPOModule

REPLIES = 3  # in the card
SETTINGS = (
    "loss_type loss_weights loss_options beta label_smoothing lora quantization sync_ref_model"
).split()  # of the module, left out if they are unset
OPTIMIZATION = "learning_rate lr_scheduler_type warmup_steps weight_decay".split()  # what the user may have replaced
DATA = (
    "train_dataset val_dataset format rejected prompt_template completion_template max_length batch_size batch_tokens "
    "seed".split()
)

USAGE = """from transformers import pipeline

generate = pipeline("text-generation", "PATH OF THIS FOLDER")
print(generate({prompt}, max_new_tokens=64, return_full_text=False)[0]["generated_text"])"""
EXAMPLE = {
    "context": "CREATE TABLE singer (name VARCHAR, age INTEGER)",
    "question": "How many singers are there?",
}


def model_card(
    module: "DPOModule",
    data: Mapping[str, Any],
    adapter: bool,
    trainer: Trainer | None = None,
    prompt_format: PromptFormat | None = None,
    has_chat_template: bool = False,
) -> str:
    """The text of a README.md with the metadata that model hubs read.

    Args:
        data: the datamodule's settings.
        adapter: the folder has an adapter, not a complete model.
        trainer: of the run, for metrics and replies.
        prompt_format: of the training prompts, if known.
        has_chat_template: whether the exported tokenizer has one.
    """
    h = module.hparams
    base = public_name(h.name_or_path)
    replies = trainer and find_callback(trainer, RepliesCallback)
    example = replies.pairs[0].prompt if replies and replies.pairs else None
    if prompt_format and prompt_format.prompt_template is not None:
        example = example or prompt_format.prompt_template.format_map(EXAMPLE)
    prompt = (
        [{"role": "user", "content": EXAMPLE["question"]}]
        if prompt_format and prompt_format.chat
        else example or "your prompt"
    )
    kind = "An adapter for" if adapter else "A model trained from"
    parts = [
        _metadata(base, dataset_weights(data.get("train_dataset")), adapter),
        f"# {markdown_text(Path(base).name)}, DPO",
        f"{kind} {markdown_text(base)} with Direct Preference Optimization "
        "([Rafailov et al. 2023](https://arxiv.org/abs/2305.18290)) by dpo-lightning.",
        f"```python\n{USAGE.format(prompt=_literal(prompt))}\n```",
        *([how_to_ask(prompt_format, has_chat_template, example)] if prompt_format else []),
        "## Data\n\n" + _settings({name: data.get(name) for name in DATA}),
        "## Training\n\n" + _settings({name: h.get(name) for name in SETTINGS} | _run(trainer, module)),
    ]
    if metrics := _metrics(trainer):
        parts.append("## Metrics\n\n" + markdown_table(("metric", "value"), metrics))
    if replies and replies.showings:
        parts.append("## Replies\n\nGreedy, to prompts that were not trained on.\n\n" + _replies(replies))
    return "\n\n".join(parts) + "\n"


def how_to_ask(prompt_format: PromptFormat, has_chat_template: bool, example: str | None) -> str:
    """The section on how to prompt the model from any other program.

    Args:
        example: a prompt with its template filled in.
    """
    parts = ["## How to ask"]
    if prompt_format.chat:
        parts.append("It was trained on conversations as the tokenizer's chat template renders them: ask through it.")
    elif prompt_format.prompt_template is not None:
        parts += [
            "It was trained on prompts that are this template, filled in, with nothing before or after it:",
            _fenced(prompt_format.prompt_template),
            "In Python, exactly:",
            f"```python\ntemplate = {_literal(prompt_format.prompt_template)}\n```",
        ]
    else:
        parts.append("It was trained on prompts as they stand in its data: give it yours without anything around it.")
    if example:
        parts += ["A prompt that is filled in:", _fenced(example)]
    if has_chat_template and not prompt_format.chat:
        parts.append("The tokenizer has a chat template, with which the model was **not** trained: do not use it.")
    parts_of_reply = {"begins with": prompt_format.completion_start, "ends with the token": prompt_format.end_token}
    if words := " and ".join(f"{verb} `{_literal(text)}`" for verb, text in parts_of_reply.items() if text):
        parts.append(f"A reply {words}.")
    return "\n\n".join(parts)


def public_name(name: str) -> str:
    """A hub id unchanged; of a local folder or file only its last name."""
    local = looks_local(name) or Path(name).expanduser().exists()
    return Path(name).expanduser().resolve().name if local else name


def _metadata(base: str, datasets: Iterable[str], adapter: bool) -> str:
    fields: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "preference-optimization", "dpo-lightning"],
    }
    if "/" in base:
        fields["base_model"] = base
    if on_hub := [name.partition(":")[0] for name in datasets if "/" in public_name(name)]:
        fields["datasets"] = on_hub
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]  # JSON is YAML
    return "\n".join(["---", *lines, "---"])


def _literal(value: Any) -> str:
    # A backtick would end inline code, three of them a code block.
    return repr(value).replace("`", r"\x60")


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{visible(text)}\n{fence}"


def _settings(values: Mapping[str, Any]) -> str:
    rows = [
        (name, ", ".join(map(public_name, dataset_weights(value))) if name.endswith("_dataset") else str(value))
        for name, value in values.items()
        if value not in (None, False)
    ]
    return markdown_table(("setting", "value"), rows)


def _run(trainer: Trainer | None, module: "DPOModule") -> dict[str, Any]:
    versions = {"lightning": lightning.__version__, "transformers": transformers.__version__}
    if trainer is None:
        return {name: module.hparams.get(name) for name in OPTIMIZATION} | versions
    return {
        "optimizer": optimized_by(trainer, module),
        "weight decay": trainer.optimizers[0].defaults.get("weight_decay") if trainer.optimizers else None,
        "optimizer steps": trainer.global_step,
        "batches per step": trainer.accumulate_grad_batches,
        "devices": trainer.world_size,
        "precision": trainer.precision,
    } | versions


def _metrics(trainer: Trainer | None) -> Sequence[tuple[str, str]]:
    values = trainer.callback_metrics if trainer else {}
    held_out = {name: value for name, value in values.items() if name.startswith(("val/", "test/"))}
    return [(name, f"{float(value):.4g}") for name, value in sorted((held_out or values).items())]


def _replies(replies: RepliesCallback) -> str:
    first, last = replies.showings[0], replies.showings[-1]
    rows = [
        (pair.prompt, before, after, pair.chosen)
        for pair, before, after in zip(replies.pairs, first.texts, last.texts, strict=False)
    ]
    return markdown_table(("prompt", "before training", "after training", "wanted"), rows[:REPLIES])
