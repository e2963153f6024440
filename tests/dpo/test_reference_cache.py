"""The cached reference: the same training as with the online one, and never a number that is not this run's own."""

import json
import os

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from conftest import ROWS
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.guards import GuardsCallback
from dpo_lightning.dpo import cached_reference as reference_cache
from dpo_lightning.dpo.reference import AdapterOff, FrozenCopy
from dpo_lightning.errors import UserError
from dpo_lightning.models.policy import load_policy
from dpo_lightning.storage.digests import weights_digest


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    folder = tmp_path / "reference_logps"
    monkeypatch.setattr(reference_cache, "cache_root", lambda: folder)
    return folder


@pytest.fixture
def fit(model_folder, tokenizer, rows_file, quiet_trainer):
    def run(reference="cached", rows=rows_file, ckpt_path=None, callbacks=(), data=None, model=model_folder, **options):
        settings = {key: options.pop(key) for key in ("lora", "loss_type") if key in options}
        module = DPOModule(str(model), learning_rate=1e-3, warmup_steps=0, reference=reference, **settings)
        data = data or PreferenceDataModule(tokenizer, rows, batch_size=4, val_size=4, test_size=0)
        trainer = quiet_trainer(**{"max_epochs": 2, "callbacks": list(callbacks)} | options)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return module

    return run


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()])


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_training_is_that_of_the_online_reference(fit, lora):
    """Batches of the pass are other than those of training, so sums are rounded differently: not bitwise."""
    torch.manual_seed(0)
    cached = fit(lora=lora)
    torch.manual_seed(0)
    online = fit("online", lora=lora)
    torch.testing.assert_close(weights(cached), weights(online), rtol=1e-4, atol=1e-5)
    if lora is None:
        assert cached.reference is None and isinstance(online.reference, FrozenCopy)
    else:
        assert isinstance(cached.reference, AdapterOff)


def test_a_second_run_neither_scores_nor_loads_the_reference(fit, monkeypatch, caplog):
    first = fit()
    monkeypatch.setattr(DPOModule, "make_reference", lambda self: pytest.fail("the reference was wanted"))
    second = fit()
    assert torch.equal(weights(first), weights(second))
    assert "reference log-probs of the 44 train pairs: taken from " in caplog.text


def test_margins_are_zero_before_the_first_step_and_the_preflight_agrees(fit, recwarn):
    class First(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 1:
                assert batch.reference_logps.shape == batch.targets.shape
                assert outputs["loss"].item() == pytest.approx(np.log(2), abs=1e-5)

    fit(callbacks=[First(), GuardsCallback()])
    assert not [w for w in recwarn if "policy and reference" in str(w.message)]


def only_manifest(root, pairs):
    (path,) = (p for p in root.glob("*/manifest.json") if json.loads(p.read_text())["key"]["pairs"] == pairs)
    return path


def test_the_manifest_says_what_it_is_for(fit, root, model_folder):
    fit()
    manifest = json.loads(only_manifest(root, 44).read_text())
    assert manifest["key"]["model"] == str(model_folder)
    assert manifest["key"]["layout"] == "shared" and manifest["key"]["precision"] == "32-true"
    assert manifest["key"]["weights"] == weights_digest(load_policy(str(model_folder)))
    assert not list(root.glob("*.partial"))


@pytest.mark.parametrize("change", ["flipped", "cut", "no manifest", "foreign", "half a manifest"])
def test_a_cache_that_is_not_right_is_said_and_computed_anew(fit, root, caplog, change):
    good = fit()
    manifest = only_manifest(root, 44)
    logps = manifest.with_name(reference_cache.LOGPS)
    whole = logps.read_bytes()
    if change == "flipped":
        logps.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    elif change == "cut":
        logps.write_bytes(whole[:-8])
    elif change == "no manifest":
        manifest.unlink()
    elif change == "half a manifest":
        manifest.write_text(manifest.read_text()[:50])
    else:
        content = json.loads(manifest.read_text())
        content["key"]["weights"] = "0" * 64
        manifest.write_text(json.dumps(content))
    caplog.clear()
    again = fit()
    assert "cannot be used" in caplog.text
    assert torch.equal(weights(good), weights(again))
    assert logps.read_bytes() == whole


def test_other_rows_weights_or_precision_have_a_cache_of_their_own(fit, root, write_rows, model_folder, tmp_path):
    fit()
    count = len(list(root.iterdir()))
    fit(rows=write_rows(ROWS[::-1], "other.jsonl"))
    assert len(list(root.iterdir())) > count
    count = len(list(root.iterdir()))
    fit(precision="bf16-mixed")
    assert len(list(root.iterdir())) == count + 2
    policy = load_policy(str(model_folder))
    with torch.no_grad():
        policy.transformer.wpe.weight[0, 0] += 1
    policy.save_pretrained(tmp_path / "other")
    fit(model=tmp_path / "other")
    assert len(list(root.iterdir())) == count + 4


def test_an_interrupted_pass_goes_on_where_it_stopped(fit, root, monkeypatch):
    scored = []
    look = FrozenCopy.logps

    def stopping(self, batch, scoring):
        if len(scored) == 5:
            raise KeyboardInterrupt
        scored.append(batch.num_pairs)
        return look(self, batch, scoring)

    monkeypatch.setattr(FrozenCopy, "logps", stopping)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit()
    assert list(root.glob("*.partial")) and sum(scored) == 20
    monkeypatch.setattr(FrozenCopy, "logps", lambda *args: scored.append(args[1].num_pairs) or look(*args))
    interrupted = fit()
    assert sum(scored) == 48, "44 training and 4 validation pairs, each scored once"
    for path in root.glob("*/*"):
        path.unlink()
    assert torch.equal(weights(interrupted), weights(fit()))


def test_a_resumed_run_without_a_cache_loads_the_starting_weights(fit, root, tmp_path):
    kept = tmp_path / "kept"

    class Keep(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 11:
                trainer.save_checkpoint(kept)

    whole = fit(callbacks=[Keep()], max_epochs=2)
    for path in root.glob("*/*"):
        path.unlink()
    resumed = fit(ckpt_path=kept, max_epochs=2)
    assert torch.equal(weights(whole), weights(resumed))


def test_it_is_the_default_for_several_epochs_only(fit, root):
    fit(reference=None, max_epochs=1)
    assert not root.exists()
    fit(reference=None, max_epochs=5, max_steps=3)
    assert not root.exists()
    fit(reference=None, max_epochs=2)
    assert root.exists()


def test_test_after_a_cached_fit_scores_with_the_starting_weights(fit, quiet_trainer, tokenizer, rows_file):
    module = fit()
    data = PreferenceDataModule(tokenizer, rows_file, batch_size=4, val_size=4, test_size=8)
    (metrics,) = quiet_trainer().test(module, data, verbose=False)
    assert metrics["test/rewards/margins"] > 0


def test_a_folder_that_cannot_be_written_is_one_line(fit, root):
    root.parent.mkdir(exist_ok=True)
    root.write_text("in the way")
    with pytest.raises(UserError, match="reference log-probs cannot be kept in"):
        fit()


def test_tokens_of_all_columns_are_in_the_digest(tokenizer, write_rows):
    def digest(rows):
        data = PreferenceDataModule(
            tokenizer, write_rows(rows, f"{os.urandom(4).hex()}.jsonl"), val_size=0, test_size=0
        )
        data.setup("fit")
        return reference_cache.tokenized_pairs(data.datasets["train"]).digest

    rows = [{"prompt": "a b", "chosen": "c", "rejected": "d"}] * 2
    assert digest(rows) == digest(rows)
    for column in rows[0]:
        assert digest([rows[0], rows[1] | {column: "e"}]) != digest(rows)
