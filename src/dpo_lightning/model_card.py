"""A run -> the README.md of its exported model: what it was made from and how, how good it is, how it answers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import transformers
from lightning.pytorch import Trainer

from dpo_lightning.hub import looks_local
from dpo_lightning.replies import RepliesCallback
from dpo_lightning.reply_views import markdown_table, markdown_text
from dpo_lightning.run_context import find_callback
from dpo_lightning.sources import dataset_weights

if TYPE_CHECKING:
    from dpo_lightning.module import DPOModule

SHOWN = 3  # replies
SETTINGS = (
    "loss_type loss_weights loss_options beta label_smoothing learning_rate lr_scheduler_type warmup_steps "
    "weight_decay lora quantization sync_ref_model"
).split()  # of the module, left out where they are unset
DATA = (
    "train_dataset val_dataset format rejected prompt_template completion_template max_length batch_size seed".split()
)

USAGE = """from transformers import pipeline

generate = pipeline("text-generation", "PATH OF THIS FOLDER")
print(generate({prompt}, max_new_tokens=64, return_full_text=False)[0]["generated_text"])"""


def model_card(module: "DPOModule", data: Mapping[str, Any], adapter: bool, trainer: Trainer | None = None) -> str:
    """The text of a README.md with the metadata that model hubs read.

    Args:
        data: the datamodule's settings.
        adapter: the folder holds an adapter, not a whole model.
        trainer: of the run, for metrics and replies.
    """
    h = module.hparams
    base = public_name(h.name_or_path)
    replies = trainer and find_callback(trainer, RepliesCallback)
    prompt = replies.pairs[0].prompt if replies and replies.pairs else "your prompt"
    kind = "An adapter for" if adapter else "A model trained from"
    parts = [
        _metadata(base, dataset_weights(data.get("train_dataset")), adapter),
        f"# {markdown_text(Path(base).name)}, DPO",
        f"{kind} {markdown_text(base)} with Direct Preference Optimization "
        "([Rafailov et al. 2023](https://arxiv.org/abs/2305.18290)) by dpo-lightning.",
        f"```python\n{USAGE.format(prompt=_literal(prompt))}\n```",
        "## Data\n\n" + _settings({name: data.get(name) for name in DATA}),
        "## Training\n\n" + _settings({name: h.get(name) for name in SETTINGS} | _run(trainer)),
    ]
    if metrics := _metrics(trainer):
        parts.append("## Metrics\n\n" + markdown_table(("metric", "value"), metrics))
    if replies and replies.showings:
        parts.append("## Replies\n\nGreedy, to prompts that were not trained on.\n\n" + _replies(replies))
    return "\n\n".join(parts) + "\n"


def public_name(name: str) -> str:
    """A hub id as it is, of a folder or file of this machine only its own name."""
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


def _literal(text: str) -> str:
    # A run of three backticks would end the code block.
    return repr(text).replace("```", r"\x60\x60\x60")


def _settings(values: Mapping[str, Any]) -> str:
    rows = [
        (name, ", ".join(map(public_name, dataset_weights(value))) if name.endswith("_dataset") else str(value))
        for name, value in values.items()
        if value not in (None, False)
    ]
    return markdown_table(("setting", "value"), rows)


def _run(trainer: Trainer | None) -> dict[str, Any]:
    versions = {"lightning": lightning.__version__, "transformers": transformers.__version__}
    if trainer is None:
        return versions
    return {
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
    return markdown_table(("prompt", "before training", "after training", "wanted"), rows[:SHOWN])
