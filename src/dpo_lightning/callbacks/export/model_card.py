"""The README.md of an exported model: its origin and training, how to prompt it, and how it replies."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import transformers
from lightning.pytorch import Trainer

from dpo_lightning.callbacks.context import find_callback, optimized_by
from dpo_lightning.callbacks.methods import method_name, methods
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.callbacks.report.outcome import changes
from dpo_lightning.data.prompt_format import PromptFormat
from dpo_lightning.data.splits import dataset_weights
from dpo_lightning.models.hub import looks_local, short_name
from dpo_lightning.visible import visible

if TYPE_CHECKING:
    from dpo_lightning.dpo.module import DPOModule

REPLIES = 3  # in the card
TAGS = ["preference-optimization", "dpo-lightning"]
# Nothing that markdown or HTML would interpret, also in a table: no emphasis (a _b_), link or address.
PLAIN = re.compile(r"(?!.*www\.)(?!.* .*_)(?!.*_.* )-?[^\W_](?:[\w ./,=+%→()-]*[\w).%])?", re.IGNORECASE)
SETTINGS = (
    "loss_type loss_weights loss_options beta label_smoothing lora quantization sync_ref_model"
).split()  # of the module, left out if they are unset
OPTIMIZATION = "learning_rate lr_scheduler_type warmup_steps weight_decay".split()  # what the user may have replaced
DATA = (
    "train_dataset val_dataset format rejected prompt_template completion_template max_length batch_size batch_tokens "
    "seed".split()
)

USAGE = """from transformers import pipeline

{prompt}
generate = pipeline("text-generation", ".")  # this folder, or its name on the hub
print(generate(prompt, max_new_tokens=64, return_full_text=False)[0]["generated_text"])"""
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
    base, short = public_name(h.name_or_path), short_name(h.name_or_path)
    replies = trainer and find_callback(trainer, RepliesCallback)
    example = replies.pairs[0].prompt if replies and replies.pairs else None
    if prompt_format and prompt_format.prompt_template is not None:
        example = example or prompt_format.prompt_template.format_map(EXAMPLE)
    kind = "An adapter for" if adapter else "A model trained from"
    datasets = dataset_weights(data.get("train_dataset"))
    trained_on = f" on {', '.join(_name(public_name(name)) for name in datasets)}" if datasets else ""
    parts = [
        _metadata(base, h.loss_type, datasets, adapter),
        f"# {_name(short)}, trained with {_name(method_name(h.loss_type))}",
        f"{kind} {_name(base if '/' in base else short)}{trained_on} with {_cited(h.loss_type)}, by dpo-lightning.",
        "## How to ask\n\n" + how_to_ask(prompt_format, has_chat_template, example),
    ]
    if replies and (results := changes(replies.showings)):
        rows = [(change.label, change.values, change.where) for change in results]
        parts.append("## Results\n\n" + _table(("replies", "before → after training", "measured"), rows))
    if metrics := _metrics(trainer):
        parts.append(_table(("metric of the pairs", "value"), metrics))
    if replies and replies.showings:
        held_out = trainer is not None and "val" in trainer.datamodule.datasets  # otherwise these are training prompts
        asked = "prompts that were not trained on" if held_out else "prompts of the training data"
        parts.append(f"## Replies\n\nGreedy, to {asked}.\n\n" + _replies(replies))
    parts += [
        "## Training\n\n" + _settings({name: h.get(name) for name in SETTINGS} | _run(trainer, module)),
        "## Data\n\n" + _settings({name: data.get(name) for name in DATA}),
    ]
    return "\n\n".join(parts) + "\n"


def how_to_ask(prompt_format: PromptFormat | None, has_chat_template: bool, example: str | None) -> str:
    """How to prompt the model from any other program, with code that runs in its folder.

    Args:
        example: a prompt with its template filled in.
    """
    template = prompt_format and prompt_format.prompt_template
    if prompt_format and prompt_format.chat:
        said = ["It was trained on conversations as the tokenizer's chat template renders them: ask through it."]
        code = f"prompt = {_literal([{'role': 'user', 'content': EXAMPLE['question']}])}"
    elif template is not None:
        said = [
            "It was trained on prompts that are this template, filled in, with nothing before or after it:",
            _fenced(template),
        ]
        values = ", ".join(f"{name}={EXAMPLE[name]!r}" for name in EXAMPLE)
        code = f"template = {_literal(template)}\nprompt = template.format({values})"
    else:
        as_is = "It was trained on prompts as they stand in its data: give it yours without anything around it."
        said = [as_is] if prompt_format else []
        code = f"prompt = {_literal(example or 'Your prompt')}"
    said.append(f"```python\n{USAGE.format(prompt=code)}\n```")
    if example:
        said += ["A prompt of its data:", _fenced(example)]
    if has_chat_template and prompt_format and not prompt_format.chat:
        said.append("The tokenizer has a chat template, with which the model was **not** trained: do not use it.")
    if prompt_format:
        parts = {"begins with": prompt_format.completion_start, "ends with the token": prompt_format.end_token}
        if words := " and ".join(f"{verb} {_code(repr(text))}" for verb, text in parts.items() if text):
            said.append(f"A reply {words}.")
    return "\n\n".join(said)


def public_name(name: str) -> str:
    """A hub id unchanged; of a local folder or file only its last name."""
    local = looks_local(name) or Path(name).expanduser().exists()
    return Path(name).expanduser().resolve().name if local else name


def _metadata(base: str, loss_type: str | Sequence[str], datasets: Iterable[str], adapter: bool) -> str:
    fields: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*(method.name.lower().replace(" ", "-") for method in methods(loss_type)), *TAGS],
    }
    if "/" in base:
        fields["base_model"] = base
    if on_hub := [name.partition(":")[0] for name in datasets if "/" in public_name(name)]:
        fields["datasets"] = on_hub
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]  # JSON is YAML
    return "\n".join(["---", *lines, "---"])


def _cited(loss_type: str | Sequence[str]) -> str:
    """The losses with their papers, linked."""
    return " + ".join(
        f"{_name(method.name)} ([{method.authors}](https://arxiv.org/abs/{method.arxiv}))"
        if method.arxiv
        else _name(method.name)
        for method in methods(loss_type)
    )


def _name(text: str) -> str:
    """A name in running text: as it is, or as code if it has characters that markdown could interpret."""
    return text if PLAIN.fullmatch(text) else _code(text)


def _code(text: str) -> str:
    """Text as inline code, in which nothing is interpreted."""
    text = visible(text).replace("\n", "\\n")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text[:1] in ("`", " ", "") or text[-1:] in ("`", " ") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; names and values that are not plain words become code."""
    lines = [header, ["---"] * len(header), *([_name(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    return _table(("setting", "value"), rows)


def _run(trainer: Trainer | None, module: "DPOModule") -> dict[str, Any]:
    versions = {"lightning": lightning.__version__, "transformers": transformers.__version__}
    if trainer is None:
        return {name: module.hparams.get(name) for name in OPTIMIZATION} | versions
    return {
        "optimizer": optimized_by(trainer, module),
        "weight decay": trainer.optimizers[0].defaults.get("weight_decay") if trainer.optimizers else None,
        "optimizer steps": trainer.global_step,
        "epochs": trainer.max_epochs if trainer.max_steps < 0 else None,
        "seed of everything": os.environ.get("PL_GLOBAL_SEED"),
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
    parts = []
    for pair, before, after in list(zip(replies.pairs, first.texts, last.texts, strict=False))[:REPLIES]:
        texts = {"Prompt": pair.prompt, "Before training": before, "After training": after, "Wanted": pair.chosen}
        parts += [f"{name}:\n\n{_fenced(text.strip())}" for name, text in texts.items()]
    return "\n\n".join(parts)
