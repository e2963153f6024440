"""What `start` chooses: facts of the rows and the model -> the settings of a `fit`, each with its reason.

The rules are simple on purpose, and docs/start.md lists them: the learning rates are those of the shipped
configurations, and the epochs are those that make about as many steps as taught GPT-2's size SQL.
"""

import math
from typing import Any, NamedTuple

from dpo_lightning.callbacks.learning_checks import ENOUGH_STEPS
from dpo_lightning.cli.memory import CACHED, RECOMPUTED, Saving, merged
from dpo_lightning.cli.peaks import Config

BATCHES = ((500, 16), (50, 8), (0, 4))  # from so many training pairs on -> pairs per step
MOST_EPOCHS = 10
RATES = ((1e9, 5e-6), (5e7, 1e-5), (1e7, 5e-5), (0, 2e-4))  # from so many parameters on -> learning rate
DECAYING = 5e7  # smaller models train at higher rates, which decay to 0
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}  # as configs/lora.yaml
LORA_RATE = 2e-4
HELD_OUT, MOST_HELD_OUT, LEAST_CONTEXTS = 0.1, 200, 10
SHOWINGS = 4  # of replies during training
MIXED: dict[str, Any] = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}


class Facts(NamedTuple):
    """What the rules depend on."""

    rows: str  # the data set
    model: str
    folder: str  # of the run
    format: str
    pairs: int
    contexts: int  # different ones, or prompts
    rejected: bool  # whether there are rejected completions
    good: int  # rows with a good completion alone
    bad: int  # rows with a bad one alone
    longest_answers: float  # tokens of the longest chosen completions, but for one in twenty
    parameters: int


class Plan(NamedTuple):
    """Settings for `fit`, and why."""

    settings: dict[str, dict[str, Any]]
    reasons: list[str]  # a line each


def plan(facts: Facts, own: Config | None = None) -> Plan:
    """The settings for some rows and a model.

    Args:
        own: settings that the user gives, which come before those that are chosen.
    """
    own = own or {}
    model, data, trainer = (own.get(section, {}) for section in ("model", "data", "trainer"))
    held_out = data.get("val_size", _held_out(facts))
    training = facts.pairs - int(held_out if held_out >= 1 else held_out * facts.pairs)
    batch_size = data.get("batch_size") or next(size for least, size in BATCHES if training >= least)
    per_epoch = max(1, math.ceil(training / batch_size))
    epochs = trainer.get("max_epochs") or min(MOST_EPOCHS, max(1, math.ceil(ENOUGH_STEPS / per_epoch)))
    loss, why = _loss(facts) if "loss_type" not in model else ({}, f"{model['loss_type']}, as you give it")
    rate, decays = next(rate for least, rate in RATES if facts.parameters >= least), facts.parameters < DECAYING
    settings = {
        "model": {
            "name_or_path": facts.model,
            "beta": 0.1,
            **loss,
            "learning_rate": rate,
            "warmup_steps": 5,
            "lr_scheduler_type": "linear" if decays else "constant",
            "max_new_tokens": min(256, max(32, 16 * math.ceil(1.25 * facts.longest_answers / 16))),
        },
        "data": {
            "train_dataset": facts.rows,
            "on_bad_row": "skip",
            "val_size": held_out,
            "test_size": 0,
            "batch_size": batch_size,
        },
        "trainer": {
            "default_root_dir": facts.folder,
            "devices": 1,
            "max_epochs": epochs,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": min(5, per_epoch),
            "val_check_interval": 1.0,
            "num_sanity_val_steps": 0,
        },
        "replies": {
            "every_n_steps": max(1, math.ceil(epochs * per_epoch / SHOWINGS)),
            "num_shown": 3,
            "judge": "sql" if facts.format == "sql_create_context" else "exact",
        },
    }
    kept = f"{held_out:g} pairs are held out" if held_out else "no pairs are held out: there are too few contexts"
    steps = f"{epochs} epoch{'s' * (epochs > 1)} of {per_epoch} steps of {batch_size} pairs"
    return Plan(
        merged(settings, own),
        [f"loss: {why}", f"learning rate: {_rate(rate, decays, model)}", f"length: {steps}; {kept}"],
    )


def _rate(rate: float, decays: bool, given: Config) -> str:
    if "learning_rate" in given:
        return f"{given['learning_rate']:g}, as you give it"
    return f"{rate:g}, {'which decays to 0' if decays else 'constant'}: what a model of this size takes"


def _held_out(facts: Facts) -> int:
    """Pairs for validation. No context is in two splits, so that few contexts cannot be split."""
    return min(MOST_HELD_OUT, int(HELD_OUT * facts.pairs)) if facts.contexts >= LEAST_CONTEXTS else 0


def _loss(facts: Facts) -> tuple[dict[str, Any], str]:
    """The settings of the loss, and why."""
    if facts.good or facts.bad:
        options = {}
        if facts.good and facts.bad and facts.good != facts.bad:  # equally heavy together (Ethayarajh 2024, eq. 8)
            rare = "desirable" if facts.good < facts.bad else "undesirable"
            ratio = max(facts.good, facts.bad) / min(facts.good, facts.bad)
            options = {"loss_options": {f"{rare}_weight": round(ratio, 3)}}
        return {"loss_type": "kto", **options}, "kto, as each row has one completion and a label"
    if facts.rejected:
        return {"loss_type": "sigmoid"}, "sigmoid (DPO), as the rows have rejected completions"
    return dict(
        MIXED
    ), "[sigmoid, sft], as there are no rejected completions: DPO alone would soon have nothing to teach"


def savings(facts: Facts) -> tuple[Saving, ...]:
    """What may be taken where memory is short: what `--memory` takes, then LoRA with its own recipe."""
    loss = {} if facts.good or facts.bad else MIXED
    lora = {"lora": LORA, "learning_rate": LORA_RATE, "lr_scheduler_type": "linear", **loss}
    words = f"a LoRA adapter is trained instead of all weights, as configs/lora.yaml does (learning rate {LORA_RATE:g})"
    return (CACHED, RECOMPUTED, Saving(words, {"model": lora}, "can_adapt"))
