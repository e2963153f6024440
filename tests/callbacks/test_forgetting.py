"""What training costs elsewhere is measured before and after it and in `test`, with each kind of reference."""

import json
import re

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from conftest import REPO
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.forgetting import LONGEST, ForgettingCallback, read_text, shipped_text
from dpo_lightning.callbacks.report.history import History
from dpo_lightning.cli.entry import main
from dpo_lightning.errors import UserError


@pytest.fixture
def data(tokenizer, rows_file):
    return PreferenceDataModule(tokenizer, rows_file, val_size=4, test_size=4, batch_size=4)


@pytest.fixture
def fit(quiet_trainer, data, model_folder, tmp_path):
    """Trains a few steps; gives the module and the curves."""

    def run(callback=None, options=None, **settings):
        module = DPOModule(str(model_folder), learning_rate=1e-3, warmup_steps=0, max_new_tokens=4, **settings)
        history = History(str(tmp_path))
        trainer = quiet_trainer(
            callbacks=[callback or ForgettingCallback()], logger=history, limit_val_batches=0, max_steps=4,
            **options or {},
        )  # fmt: skip
        trainer.fit(module, data)
        return module, {name: dict(curve) for name, curve in history.curves.items() if "forgetting" in name}

    return run


@torch.no_grad()
def perplexity(model, tokenizer):
    """Directly, by transformers' own loss, in pieces of the tiny model's 128 positions."""
    pieces = torch.tensor(tokenizer(shipped_text())["input_ids"]).split(128)
    losses = [(model(ids[None], labels=ids[None]).loss, len(ids) - 1) for ids in pieces]
    return (sum(loss * count for loss, count in losses) / sum(count for _, count in losses)).exp().item()


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_before_and_after_training(fit, tokenizer, lora, caplog):
    module, curves = fit(lora=lora)
    after, (before, last) = perplexity(module.causal_lm, tokenizer), curves["forgetting/perplexity"].values()
    assert last == pytest.approx(after, rel=1e-4) and last != pytest.approx(before, rel=1e-3)
    start = DPOModule(module.hparams.name_or_path).load_policy()
    assert before == pytest.approx(perplexity(start, tokenizer), rel=1e-4)
    assert curves["forgetting/reference_perplexity"] == {4: pytest.approx(before, rel=1e-5)}
    assert curves["forgetting/kl"][4] > 1e-4
    assert f"perplexity on other text {before:.4g} → {last:.4g} (a rise is bad), KL " in caplog.text


@pytest.mark.parametrize("settings", [{"reference": "cached"}, {"loss_type": "simpo"}])
def test_without_a_reference_model_there_is_no_kl(fit, settings, caplog):
    _, curves = fit(**settings)
    before, _ = curves["forgetting/perplexity"].values()
    assert curves["forgetting/reference_perplexity"] == {4: before} and "forgetting/kl" not in curves
    assert "no KL, since" in caplog.text


def test_packed_attention_reads_a_text_like_any_other(fit):
    plain, packed = (fit(attn_implementation=kind)[1] for kind in ("sdpa", "packed"))
    for name, curve in plain.items():
        assert packed[name] == pytest.approx(curve, rel=1e-2)


def test_training_is_the_same_with_and_without(fit):
    measured, plain = fit()[0], fit(ForgettingCallback(enabled=False))
    assert plain[1] == {}
    twin = plain[0].policy.state_dict()
    assert all(torch.equal(weight, twin[name]) for name, weight in measured.policy.state_dict().items())


def test_a_text_of_ones_own(fit, tmp_path):
    (tmp_path / "own.txt").write_text("SELECT name FROM singer WHERE age = 3\n" * 3, encoding="utf-8")
    own, shipped = (
        fit(ForgettingCallback(text=text))[1]["forgetting/perplexity"] for text in (str(tmp_path / "own.txt"), None)
    )
    assert own[0] != shipped[0]


def test_texts_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "long.txt").write_text("a" * (LONGEST + 1))
    with pytest.raises(UserError, match="is not a file"):
        ForgettingCallback(text=str(tmp_path))
    with pytest.raises(UserError, match="no text in UTF-8"):
        ForgettingCallback(text=str(tmp_path / "bytes"))
    assert len(read_text(str(tmp_path / "long.txt"))) == LONGEST


def test_a_text_without_tokens_is_refused(fit, tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="less than two tokens"):
        fit(ForgettingCallback(text=str(tmp_path / "empty.txt")))


def test_a_resumed_run_knows_what_came_before(quiet_trainer, data, model_folder, tmp_path):
    def trainer(steps):
        history = History(str(tmp_path))
        callbacks = [ForgettingCallback(), ModelCheckpoint(tmp_path, "two", every_n_train_steps=2)]
        made = quiet_trainer(
            max_steps=steps, callbacks=callbacks, logger=history, limit_val_batches=0, enable_checkpointing=True
        )
        return made, history

    first, before = trainer(2)
    first.fit(DPOModule(str(model_folder), learning_rate=1e-3), data)
    second, after = trainer(4)
    second.fit(DPOModule(str(model_folder), learning_rate=1e-3), data, ckpt_path=tmp_path / "two.ckpt")
    assert [step for step, _ in after.curves["forgetting/perplexity"]] == [4]
    start = before.curves["forgetting/perplexity"][0][1]
    assert after.curves["forgetting/reference_perplexity"] == [(4, pytest.approx(start, rel=1e-5))]


def test_the_report_and_the_test_command_have_it(tmp_path, monkeypatch, model_folder, rows_file, caplog):
    monkeypatch.chdir(tmp_path)

    def run(command, *args):
        argv = [command, "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model_folder)]
        argv += ["--data.train_dataset", rows_file, "--data.val_size", "4", "--data.test_size", "4"]
        argv += ["--data.batch_size", "4", "--data.max_length", "128", "--model.max_new_tokens", "4"]
        argv += ["--model.learning_rate", "1e-3", "--trainer.accelerator", "cpu", "--trainer.max_steps", "4"]
        assert main([*argv, "--export.enabled", "false", *args]) == 0

    run("fit")
    folder = tmp_path / "lightning_logs" / "version_0"
    report = (folder / "report.html").read_text()
    assert "perplexity of the policy" in report and "nats a token" in report
    number = r"(\d\S*)"
    said = re.search(rf"other text {number} → {number} \(a rise is bad\), KL {number} nats", caplog.text)
    run("test", "--ckpt_path", str(folder / "checkpoints" / "last.ckpt"))
    metrics = json.loads((tmp_path / "lightning_logs" / "version_1" / "metrics.json").read_text())["metrics"]
    for name, value in zip(("reference_perplexity", "perplexity", "kl"), said.groups(), strict=True):
        assert metrics[f"test/forgetting/{name}"] == pytest.approx(float(value), rel=0.05)
    run("test", "--forgetting.enabled", "false")
    metrics = json.loads((tmp_path / "lightning_logs" / "version_2" / "metrics.json").read_text())["metrics"]
    assert not any("forgetting" in name for name in metrics)
