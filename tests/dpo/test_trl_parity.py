"""The same tiny GPT-2, the same rows in the same order, the same AdamW: our losses are TRL's."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from test_module import Record
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM

from conftest import ROWS
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.data.batching import to_separate
from dpo_lightning.dpo.logps import PairLogps, Scoring

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


TRL_SETTINGS = {  # of both trainers
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
}


def trl_losses(rows, model_folder, tokenizer, output, model=None, **settings):
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    config = DPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=BATCH,
        **TRL_SETTINGS | settings,
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


@pytest.fixture
def thumbs():
    """Rows as prompt, completion, label: every third completion is another row's answer, and bad."""
    return [
        {
            "prompt": f"{row['context']}\nQuestion: {row['question']}\nAnswer:",
            "completion": " " + ROWS[i - i % 3 // 2]["answer"],
            "label": i % 3 != 2,
        }
        for i, row in enumerate(ROWS[: STEPS * BATCH])
    ]


def trl_kto(model, rows, tokenizer, output, reference=None, batch_size=BATCH, **settings):
    from trl import KTOConfig, KTOTrainer

    config = KTOConfig(
        output_dir=str(output),
        per_device_train_batch_size=batch_size,
        **TRL_SETTINGS | settings,
    )
    rows = Dataset.from_list(rows)
    return KTOTrainer(model, reference, args=config, train_dataset=rows, processing_class=tokenizer)


def test_kto_is_trls_over_20_steps(thumbs, model_folder, tokenizer, write_rows, quiet_trainer, tmp_path):
    weights = {"desirable_weight": 1.0, "undesirable_weight": 2.0}
    module = DPOModule(
        str(model_folder),
        learning_rate=RATE,
        warmup_steps=0,
        lr_scheduler_type="constant",
        loss_type="kto",
        loss_options=weights,
    )
    record = Record(module)
    data = PreferenceDataModule(tokenizer, write_rows(thumbs), batch_size=BATCH, shuffle=False, val_size=0, test_size=0)
    quiet_trainer(gradient_clip_val=1.0).fit(module, data)
    trainer = trl_kto(
        AutoModelForCausalLM.from_pretrained(model_folder), thumbs, tokenizer, tmp_path / "trl", **weights
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    points = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert len(record.losses) == len(theirs) == STEPS
    assert record.losses == pytest.approx(theirs, abs=1e-4)
    assert max(points) > 0.1 and min(points) == 0, "its reference point must have had an influence"


def float64_logps(model, batch, *_, **__):
    """`pair_logps` without our head, which computes in float32."""
    batch = to_separate(batch)
    logits = model(input_ids=batch.input_ids, attention_mask=(batch.segment_ids >= 0).long()).logits
    logps = logits.flatten(0, 1)[batch.predict_index].log_softmax(-1)
    return PairLogps(logps.gather(1, batch.targets[:, None])[:, 0], batch.sequence, batch.num_pairs)


def without_fused_head(model):
    """What TRL's fused head, which computes in float32, gives its trainers."""
    forward = type(model).forward

    def scored(input_ids, attention_mask, labels, **_):
        logits, labels = forward(model, input_ids, attention_mask=attention_mask).logits[:, :-1], labels[:, 1:]
        logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0)
        unused = torch.zeros(labels.shape)
        return SimpleNamespace(log_probs=logps, entropy=unused, mean_logits=unused)

    model.forward = scored


@pytest.mark.parametrize("swapped", [False, True], ids=["kl below 0", "kl above 0"])
@pytest.mark.parametrize("paired", [False, True], ids=["thumbs", "pairs"])
def test_a_kto_batch_is_trls_in_float64(
    rows, thumbs, paired, swapped, model_folder, tokenizer, write_rows, tmp_path, monkeypatch
):
    """A real batch of both packages, made by their own collation, through a GPT-2 and its gradient."""
    rows = rows[:6] if paired else thumbs[:6]
    reference, other = (AutoModelForCausalLM.from_pretrained(model_folder).double().eval() for _ in range(2))
    torch.manual_seed(1)
    for weight in other.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    policy, reference = (reference, other) if swapped else (other, reference)
    weights = {"desirable_weight": 0.7, "undesirable_weight": 1.5}

    module = DPOModule(str(model_folder), loss_type="kto", beta=0.3, loss_options=weights)
    data = PreferenceDataModule(tokenizer, write_rows(rows), batch_size=6, shuffle=False, val_size=0, test_size=0)
    data.trainer = SimpleNamespace(
        lightning_module=module, global_rank=0, world_size=1, overfit_batches=0, training=False,
        strategy=SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda tensor, reduce_op: tensor),
    )  # fmt: skip
    data.setup("fit")
    module.trainer, module.policy, module.scoring = data.trainer, copy.deepcopy(policy), Scoring()
    module.reference = SimpleNamespace(logps=lambda batch, _: float64_logps(reference, batch))
    for file in ("module", "policy_module"):
        monkeypatch.setattr(f"dpo_lightning.dpo.{file}.pair_logps", float64_logps)
    ours = module._shared_step(next(iter(data.train_dataloader())), "train")
    ours.backward()

    trainer = trl_kto(
        policy, rows, tokenizer, tmp_path / "trl", copy.deepcopy(reference), 12 if paired else 6, beta=0.3, **weights
    )
    without_fused_head(trainer.model)
    without_fused_head(trainer.ref_model)
    theirs = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    theirs.backward()
    kl = trainer._metrics["train" if trainer.model.training else "eval"]["kl"][0]
    assert (kl > 0.1) == swapped and (kl == 0) != swapped
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    for found, expected in zip(module.policy.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)
