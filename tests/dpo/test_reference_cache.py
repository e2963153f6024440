"""The cached reference: the same training as with the online one, and never a number that is not this run's own."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
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
from dpo_lightning.storage.digests import content_digest, key_digest, weights_digest
from ranks import run_ranks


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """A cache of each test's own; the folders of log-probs in it are `caches(root)`."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "dpo_lightning"


def caches(root):
    """The notes of the reference log-probs, by the pairs that they are of."""
    notes = [(path, json.loads(path.read_text())) for path in root.glob("*/note.json")]
    return [path for path, note in notes if "precision" in note.get("key", ())]


def remove(root):
    for path in caches(root):
        shutil.rmtree(path.parent)


@pytest.fixture
def fit(model_folder, tokenizer, rows_file, quiet_trainer):
    def run(reference="cached", rows=rows_file, ckpt_path=None, callbacks=(), data=None, model=model_folder, **options):
        settings = {key: options.pop(key) for key in ("lora", "loss_type", "attn_implementation") if key in options}
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


@pytest.mark.parametrize(("precision", "unpacked", "kept"), [("32-true", "sdpa", 1), ("bf16-mixed", "eager", 2)])
def test_log_probs_cached_without_packing_are_used_where_they_are_as_exact(fit, root, precision, unpacked, kept):
    first = fit(attn_implementation=unpacked, precision=precision)
    train = {path for path in caches(root) if json.loads(path.read_text())["key"]["pairs"] == 44}
    second = fit(attn_implementation="packed", precision=precision)
    assert len(train) == 1 and second.scoring.packed and not first.scoring.packed
    assert first.loaded_attention == second.loaded_attention
    assert sum(json.loads(path.read_text())["key"]["pairs"] == 44 for path in caches(root)) == kept


def test_margins_are_zero_before_the_first_step_and_the_preflight_agrees(fit, recwarn):
    class First(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 1:
                assert batch.reference_logps.shape == batch.targets.shape
                assert outputs["loss"].item() == pytest.approx(np.log(2), abs=1e-5)

    fit(callbacks=[First(), GuardsCallback()])
    assert not [w for w in recwarn if "policy and reference" in str(w.message)]


def only_note(root, pairs):
    (path,) = (path for path in caches(root) if json.loads(path.read_text())["key"]["pairs"] == pairs)
    return path


def test_the_note_says_what_it_is_for(fit, root, model_folder):
    fit()
    note = json.loads(only_note(root, 44).read_text())
    assert note["key"]["model"] == str(model_folder)
    assert note["key"]["layout"] == "shared" and note["key"]["precision"] == "32-true"
    assert note["key"]["weights"] == weights_digest(load_policy(str(model_folder)))
    assert not list(root.glob("*.partial"))


@pytest.mark.parametrize("change", ["flipped", "cut", "no note", "foreign", "half a note"])
def test_a_cache_that_is_not_right_is_said_and_computed_anew(fit, root, recwarn, change):
    good = fit()
    note = only_note(root, 44)
    rows = note.with_name("rows.arrow")
    whole = rows.read_bytes()
    if change == "flipped":
        rows.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    elif change == "cut":
        rows.write_bytes(whole[:-8])
    elif change == "no note":
        note.unlink()
    elif change == "half a note":
        note.write_text(note.read_text()[:50])
    else:
        content = json.loads(note.read_text())
        content["key"]["weights"] = "0" * 64
        note.write_text(json.dumps(content))
    recwarn.clear()
    again = fit()
    assert [w for w in recwarn if "are damaged" in str(w.message) and "made anew" in str(w.message)]
    assert torch.equal(weights(good), weights(again))
    assert rows.read_bytes() == whole


def test_a_cache_in_the_format_of_earlier_versions_is_left_and_computed_anew(fit, root, caplog):
    good = fit()
    key = json.loads(only_note(root, 44).read_text())["key"]
    before = root.parent / "reference_logps" / key_digest(key | {"format": 1})
    before.mkdir(parents=True)
    remove(root)
    again = fit()
    assert f"computed once and kept, because '{before}' was written by an earlier version" in caplog.text
    assert before.exists() and torch.equal(weights(good), weights(again))


def test_a_column_stays_with_its_rows(tokenizer, rows_file, write_rows):
    """Also where the data set is a selection of its table, has a pair twice, or is made of several."""
    other = write_rows(ROWS[:7], "other.jsonl")
    for train, sizes in ((rows_file, 0), (rows_file, 0.1), ({rows_file: 1.5, other: 2}, 0.1)):
        data = PreferenceDataModule(tokenizer, train, val_size=sizes, test_size=0)
        data.setup("fit")
        plain = data.datasets["train"][:]
        values = [[float(i) for i in ids] for ids in plain["prompt_ids"]]
        data.add_column("train", "reference_logps", pa.chunked_array([pa.array(values, pa.list_(pa.float32()))]))
        assert data.datasets["train"][:] == plain | {"reference_logps": values}
        batch = data.batch("train", [3, 1])
        assert batch.reference_logps.tolist() == values[3] + values[1]
        data.setup("fit")
        assert data.datasets["train"][:] == plain, "the next fit computes its own"


def test_other_rows_weights_or_precision_have_a_cache_of_their_own(fit, root, write_rows, model_folder, tmp_path):
    fit()
    count = len(caches(root))
    fit(rows=write_rows(ROWS[::-1], "other.jsonl"))
    assert len(caches(root)) > count
    count = len(caches(root))
    fit(precision="bf16-mixed")
    assert len(caches(root)) == count + 2
    policy = load_policy(str(model_folder))
    with torch.no_grad():
        policy.transformer.wpe.weight[0, 0] += 1
    policy.save_pretrained(tmp_path / "other")
    fit(model=tmp_path / "other")
    assert len(caches(root)) == count + 4


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
    remove(root)
    assert torch.equal(weights(interrupted), weights(fit()))


def test_two_ranks_share_the_pass_and_have_the_same_column(model_folder, tokenizer, rows_file, quiet_trainer, root):
    look = FrozenCopy.logps

    def rank(number):
        scored = []
        FrozenCopy.logps = lambda *args: scored.append(args[1].num_pairs) or look(*args)
        data = PreferenceDataModule(tokenizer, rows_file, batch_size=4, val_size=4, test_size=0)
        trainer = quiet_trainer(devices=2, strategy="ddp", max_steps=2, limit_val_batches=0)
        trainer.fit(DPOModule(str(model_folder), reference="cached"), data)
        return sum(scored), data.datasets["train"]["reference_logps"][:]

    (here, column), (there, same) = run_ranks(2, rank)
    assert here == there == 24 and column == same and len(column) == 44
    assert len(caches(root)) == 2 and not list(root.glob("*.partial"))


def test_a_resumed_run_without_a_cache_loads_the_starting_weights(fit, root, tmp_path):
    kept = tmp_path / "kept"

    class Keep(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 11:
                trainer.save_checkpoint(kept)

    whole = fit(callbacks=[Keep()], max_epochs=2)
    remove(root)
    resumed = fit(ckpt_path=kept, max_epochs=2)
    assert torch.equal(weights(whole), weights(resumed))


def test_it_is_the_default_for_several_epochs_only(fit, root):
    fit(reference=None, max_epochs=1)
    assert not caches(root)
    fit(reference=None, max_epochs=5, max_steps=3)
    assert not caches(root)
    fit(reference=None, max_epochs=2)
    assert caches(root)


def test_test_after_a_cached_fit_scores_with_the_starting_weights(fit, quiet_trainer, tokenizer, rows_file):
    module = fit()
    data = PreferenceDataModule(tokenizer, rows_file, batch_size=4, val_size=4, test_size=8)
    (metrics,) = quiet_trainer().test(module, data, verbose=False)
    assert metrics["test/rewards/margins"] > 0


def test_a_folder_that_cannot_be_written_is_one_line(fit, tmp_path, tokenizer, rows_file, monkeypatch):
    data = PreferenceDataModule(tokenizer, rows_file, batch_size=4, val_size=4, test_size=0)
    data.setup("fit")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "dpo_lightning").write_text("in the way")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "other")
    with pytest.raises(UserError, match="reference log-probs of the 44 train pairs cannot be kept in"):
        fit(data=data)


def test_a_log_prob_that_is_not_a_number_is_refused_and_its_row_named(fit, root, monkeypatch):
    look = FrozenCopy.logps

    def broken(self, batch, scoring):
        found = look(self, batch, scoring)
        found.token_logps[(batch.pair_ids[batch.sequence // 2] == 6)] = torch.nan
        return found

    monkeypatch.setattr(FrozenCopy, "logps", broken)
    with pytest.raises(UserError, match="the reference's log-prob of pair 7 is not a number: look at that row"):
        fit()
    assert not caches(root)


def test_log_probs_are_bitwise_those_that_were_computed(fit, root, monkeypatch):
    computed = []
    look = FrozenCopy.logps

    def keep(self, batch, scoring):
        found = look(self, batch, scoring)
        for b, position in enumerate(batch.pair_ids.tolist()):
            computed.append((position, found.token_logps[batch.sequence // 2 == b].tolist()))
        return found

    class Seen(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            for b, position in enumerate(batch.pair_ids.tolist()):
                assert (position, batch.reference_logps[batch.sequence // 2 == b].tolist()) in computed

    monkeypatch.setattr(FrozenCopy, "logps", keep)
    fit(callbacks=[Seen()])
    assert computed


def test_tokens_of_all_columns_are_in_the_digest(tokenizer, write_rows):
    def digest(rows):
        data = PreferenceDataModule(
            tokenizer, write_rows(rows, f"{os.urandom(4).hex()}.jsonl"), val_size=0, test_size=0
        )
        data.setup("fit")
        return content_digest(data.datasets["train"], reference_cache.TOKEN_COLUMNS)

    rows = [{"prompt": "a b", "chosen": "c", "rejected": "d"}] * 2
    assert digest(rows) == digest(rows)
    for column in rows[0]:
        assert digest([rows[0], rows[1] | {column: "e"}]) != digest(rows)
