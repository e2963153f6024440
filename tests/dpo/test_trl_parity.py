"""The same tiny GPT-2, the same rows in the same order, the same AdamW: our losses are TRL's."""

import pytest
from datasets import Dataset
from test_module import Record
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM

from conftest import ROWS
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.dpo.logps import Scoring

STEPS, BATCH, RATE = 20, 2, 1e-3


@pytest.fixture
def rows():
    """Rows as prompt, chosen, rejected: every second rejected is another row's answer, the others are empty."""
    return [
        {
            "prompt": f"{row['context']}\nQuestion: {row['question']}\nAnswer:",
            "chosen": " " + row["answer"],
            "rejected": " " + ROWS[i - 1]["answer"] if i % 2 else "",
        }
        for i, row in enumerate(ROWS[: STEPS * BATCH])
    ]


def trl_losses(rows, model_folder, tokenizer, output, model=None, **settings):
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    config = DPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        num_train_epochs=1,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = InOrder(
        model=model or AutoModelForCausalLM.from_pretrained(model_folder),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ["sigmoid"], "beta": 0.1},
        # (Every loss's value and gradient are compared in test_losses_vs_trl.py; these are whole runs.)
        {"loss_type": ["hinge"], "beta": 0.3},
        {"loss_type": ["ipo"], "beta": 0.1},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1], "beta": 0.1},
        {"loss_type": ["sigmoid"], "beta": 0.3, "use_weighting": True},
        {"loss_type": ["robust"], "beta": 0.1, "label_smoothing": 0.1, "ld_alpha": 0.5},
        {"loss_type": ["sigmoid_norm"], "beta": 2.0, "f_divergence_type": "js_divergence"},
    ],
    ids=lambda settings: "+".join(settings["loss_type"]),
)
def test_first_20_losses_agree(rows, settings, model_folder, tokenizer, write_rows, quiet_trainer, tmp_path):
    beside = {"loss_type", "loss_weights", "beta", "label_smoothing"}
    module = DPOModule(
        str(model_folder),
        learning_rate=RATE,
        warmup_steps=0,
        lr_scheduler_type="constant",
        **{name: value for name, value in settings.items() if name in beside},
        loss_options={name: value for name, value in settings.items() if name not in beside},
    )
    record = Record(module)
    data = PreferenceDataModule(tokenizer, write_rows(rows), batch_size=BATCH, shuffle=False, val_size=0, test_size=0)
    quiet_trainer(gradient_clip_val=1.0).fit(module, data)
    theirs = trl_losses(rows, model_folder, tokenizer, tmp_path / "trl", **settings)
    assert len(record.losses) == len(theirs) == STEPS
    assert record.losses == pytest.approx(theirs, abs=1e-4)
    assert abs(theirs[-1] - theirs[0]) > 1e-2, "the run must have learnt something to compare"


def count_tokens(model):
    """Counts the positions that go through the transformer's blocks and through the LM head of a model."""
    counts = {"blocks": 0, "head": 0}

    def count(name):
        def hook(module, args, kwargs):
            states = args[0] if args else kwargs["hidden_states"]
            counts[name] += states.shape[:-1].numel()

        return hook

    model.transformer.h[0].register_forward_pre_hook(count("blocks"), with_kwargs=True)
    model.lm_head.register_forward_pre_hook(count("head"), with_kwargs=True)
    return counts


def test_the_same_pairs_take_half_the_tokens(rows, model_folder, tokenizer, write_rows, quiet_trainer, tmp_path):
    """With an empty rejected completion the policy reads about half the positions that TRL's reads."""
    rows = [row | {"rejected": ""} for row in rows]
    module = DPOModule(str(model_folder), warmup_steps=0)
    module.configure_model()
    module.scoring = Scoring()  # chosen already: the comparison before the first step is not part of training
    ours = count_tokens(module.policy)
    data = PreferenceDataModule(tokenizer, write_rows(rows), batch_size=BATCH, shuffle=False, val_size=0, test_size=0)
    quiet_trainer().fit(module, data)
    policy = AutoModelForCausalLM.from_pretrained(model_folder)
    theirs = count_tokens(policy)
    trl_losses(rows, model_folder, tokenizer, tmp_path / "trl", model=policy, loss_type=["sigmoid"], beta=0.1)
    print(f"positions of {len(rows)} pairs: ours {ours}, TRL's {theirs}")
    assert ours["blocks"] < 0.6 * theirs["blocks"]
    targets = sum(len(tokenizer(row["chosen"])["input_ids"]) + 2 for row in rows)
    assert ours["head"] == targets
