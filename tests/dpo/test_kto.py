"""Runs on rows with one completion: what they learn, with every kind of reference, and what is refused."""

import json
import math

import pytest
import torch
from test_module import Record

from conftest import REPO, ROWS
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.guards import GuardsCallback
from dpo_lightning.cli.entry import main
from dpo_lightning.dpo.logps import PairLogps, Scoring, pair_logps
from dpo_lightning.errors import UserError

THUMBS = [
    {
        "prompt": f"{row['context']}\nQuestion: {row['question']}\nAnswer:",
        "completion": f" {row['answer']}" if i % 2 else f" What about {row['question']}",
        "context": row["context"],
        "label": bool(i % 2),
    }
    for i, row in enumerate(ROWS)
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of each test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def run(model_folder, tokenizer, write_rows, quiet_trainer):
    """Trains on rows; gives the module, the losses of the steps and the logged metrics."""

    def run(rows=THUMBS, loss_type="kto", batch_size=8, options=None, **settings):
        module = DPOModule(
            str(model_folder), learning_rate=1e-3, warmup_steps=0, loss_type=loss_type, loss_options=options, **settings
        )
        data = PreferenceDataModule(tokenizer, write_rows(rows), batch_size=batch_size, val_size=8, test_size=0)
        record = Record(module)
        trainer = quiet_trainer(max_epochs=3, log_every_n_steps=1, callbacks=[GuardsCallback()])
        trainer.fit(module, data)
        return module, record.losses, trainer.callback_metrics

    return run


@pytest.mark.filterwarnings("error:.*before the first step", "error:.*does not end in EOS")
@pytest.mark.parametrize(
    "settings", [{}, {"lora": {"r": 2}}, {"attn_implementation": "packed"}, {"loss_type": ["kto", "sft"]}], ids=str
)
def test_thumbs_teach_and_are_measured(run, settings):
    _, losses, metrics = run(**settings)
    if "loss_type" not in settings:
        assert losses[0] == pytest.approx(0.5, abs=1e-4) and losses[-1] < 0.499
    assert metrics["val/rewards/chosen"] > metrics["val/rewards/rejected"]
    margin = metrics["val/rewards/chosen"] - metrics["val/rewards/rejected"]
    assert float(metrics["val/rewards/margins"]) == pytest.approx(float(margin))
    assert metrics["train/reference_point"] >= 0
    assert not any(name.endswith("accuracies") for name in metrics)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_cached_reference_gives_the_losses_of_the_online_one(run, lora):
    online, cached = (run(lora=lora, reference=kind)[1] for kind in ("online", "cached"))
    assert cached == pytest.approx(online, abs=1e-5)


def test_pairs_are_a_good_and_a_bad_completion_each(run):
    rows = [{"prompt": r["prompt"], "chosen": f" yes {i}", "rejected": f" no {i}"} for i, r in enumerate(THUMBS)]
    _, losses, metrics = run(rows)
    assert losses[0] == pytest.approx(0.5, abs=1e-4) and losses[-1] < 0.49
    assert "val/rewards/accuracies" in metrics


@pytest.mark.parametrize(
    "scoring", [Scoring(), Scoring(packed=True), Scoring(shared=False)], ids=lambda s: str(s[:5:4])
)
@torch.no_grad()
def test_a_row_with_one_completion_has_the_logps_of_its_sequence(run, scoring):
    module, _, _ = run(THUMBS[:24])
    batch = module.trainer.datamodule.batch("train", range(6))
    found = pair_logps(module.causal_lm, batch, scoring)
    for b, row in enumerate(module.trainer.datamodule.datasets["train"].select(range(6))):
        side = 0 if row["label"] else 1
        completion = row["chosen_ids"] or row["rejected_ids"]
        ids = torch.tensor([row["prompt_ids"] + completion])
        logps = module.causal_lm(ids).logits[0, -len(completion) - 1 : -1].log_softmax(-1)
        expected = logps.gather(1, ids[0, -len(completion) :, None]).sum()
        torch.testing.assert_close(found.sums[b, side], expected, rtol=1e-4, atol=1e-4)
        assert found.sums[b, 1 - side] == 0 and found.lengths[b, 1 - side] == 0


def test_the_reference_point_is_the_mean_over_the_rows_of_all_ranks(run, monkeypatch):
    module, _, _ = run(THUMBS[:24])
    batch = next(iter(module.trainer.datamodule.train_dataloader()))
    ratios = [
        torch.tensor([[0.0, 2.0], [4.0, 0.0]]),  # a bad and a good completion
        torch.tensor([[3.0, 0.0]]),
    ]
    policy = PairLogps(torch.tensor([2.0, 4.0]), torch.tensor([1, 2]), 2)
    monkeypatch.setattr("dpo_lightning.dpo.policy_module.pair_logps", lambda *_: policy)
    monkeypatch.setattr(module, "reference_logps", lambda _: policy._replace(token_logps=torch.zeros(2)))
    assert module.batch_kl(batch) == ratios[0].sum() / 2
    monkeypatch.setattr(module.trainer.strategy, "reduce", lambda sums, reduce_op: sums + torch.tensor([3.0, 1.0]))
    assert module.batch_kl(batch) == sum(ratio.sum() for ratio in ratios) / 3
    monkeypatch.setattr(module.trainer.strategy, "reduce", lambda sums, reduce_op: -sums)
    assert module.batch_kl(batch) == 3  # -6 / -2
    monkeypatch.setattr(module.trainer.strategy, "reduce", lambda sums, reduce_op: sums * torch.tensor([-1.0, 1.0]))
    assert module.batch_kl(batch) == 0


@pytest.mark.parametrize("loss_type", ["sigmoid", "sft", ["kto", "dpop"]])
def test_other_losses_refuse_thumbs_in_every_command(model_folder, tokenizer, write_rows, quiet_trainer, loss_type):
    path = write_rows(THUMBS)
    for command, name in (("fit", "train"), ("validate", "val"), ("test", "test")):
        module = DPOModule(str(model_folder), loss_type=loss_type)
        data = PreferenceDataModule(tokenizer, path, val_dataset=path, test_dataset=path, val_size=0, test_size=0)
        with pytest.raises(UserError, match="data have rows with one completion .*: set model.loss_type: kto") as error:
            getattr(quiet_trainer(), command)(module, datamodule=data)
        assert name in str(error.value) or command == "fit"
        assert module.policy is None, "refused before the model is loaded"


def test_a_batch_of_one_row_is_refused(run):
    with pytest.raises(UserError, match="set data.batch_size .* to 2 or more"):
        run(batch_size=1)


def test_unbalanced_thumbs_name_the_weight_to_set(run):
    rows = [row for i, row in enumerate(THUMBS) if row["label"] or i % 3]
    with pytest.warns(UserWarning, match=r"set model.loss_options: \{undesirable_weight: "):
        run(rows)


def test_a_margin_has_no_meaning(run):
    with pytest.raises(UserError, match="a margin other than 0 .* has no meaning for the loss kto"):
        run([row | {"margin": 0.5} for row in THUMBS])


def test_a_weight_multiplies_the_loss(run):
    _, losses, _ = run([row | {"weight": 3.0} for row in THUMBS])
    assert losses[0] == pytest.approx(1.5, abs=1e-3) and not math.isnan(losses[-1])


@pytest.mark.slow
def test_thumbs_teach_the_demos_model_sql(write_rows, tmp_path):
    """Thumbs up for SQL, thumbs down for prose such as the model replies with: a whole run from the command line."""
    demo, files = REPO / "src" / "dpo_lightning" / "demo", {}
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (demo / "data" / f"{name}.jsonl").read_text().splitlines()]
        thumbs = [
            {
                "prompt": f"{row['context']}\nQuestion: {row['question']}\nAnswer:",
                "completion": f" It is about {row['question'][:-1].lower()}." if i % 2 else f" {row['answer']}",
                "context": row["context"],
                "label": i % 2 == 0,
            }
            for i, row in enumerate(rows)
        ]
        files[name] = write_rows(thumbs, f"{name}.jsonl")
    model = ["--model.name_or_path", str(demo / "model"), "--model.loss_type", "kto", "--model.loss_weights", "null"]
    data = ["--data.train_dataset", files["train"], "--data.val_dataset", files["test"], "--trainer.max_epochs", "1"]
    args = ["fit", "--config", str(REPO / "configs" / "demo.yaml"), *model, *data]
    assert main([*args, "--trainer.default_root_dir", str(tmp_path)]) == 0
    (replies,) = tmp_path.glob("**/replies.jsonl")
    lines = [json.loads(line) for line in replies.read_text().splitlines()]
    valid = {step: [line["sql/valid"] for line in lines if line["step"] == step] for step in (0, lines[-1]["step"])}
    before, after = (sum(verdicts) / len(verdicts) for verdicts in valid.values())
    assert before < 0.05 and after > 0.6
