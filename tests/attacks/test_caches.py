"""Caches that a disk has changed, and caches that several runs fill at the same time."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from conftest import ROWS
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.data import generated
from dpo_lightning.dpo.reference import FrozenCopy
from dpo_lightning.storage.arrow_cache import cached_dataset
from side_by_side import at_once

SCHEMA = pa.schema([("n", pa.int64())])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of each test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def pairs(tokenizer, rows_file):
    """Sets up a datamodule and gives the encoded training pairs."""

    def load():
        data = PreferenceDataModule(tokenizer, rows_file, val_size=0, test_size=0)
        data.setup("fit")
        return data.datasets["train"][:]

    return load


# ---------------------------------------------------------------------- what a disk has changed


def test_a_flipped_byte_in_encoded_rows_is_seen_and_made_anew(pairs, cache, recwarn):
    before = pairs()
    files = list(cache.rglob("rows.arrow"))
    for path in files:
        content = bytearray(path.read_bytes())
        place = content.index(b"SELECT")  # in the texts, where no format notices
        content[place] ^= 1
        path.write_bytes(content)
    assert pairs() == before
    said = [str(w.message) for w in recwarn if "are damaged" in str(w.message)]
    assert said and all("made anew" in line and "\n" not in line for line in said)
    recwarn.clear()
    assert pairs() == before and not [w for w in recwarn if "damaged" in str(w.message)]
    assert sorted(cache.rglob("rows.arrow")) == sorted(files)


@pytest.mark.parametrize("note", ["[]", "5", "null", '"largest_id"', "{}", '{"foreign": 1}', "", "[[" * 10_000])
def test_a_note_that_is_something_else_is_made_anew(pairs, cache, note):
    before = pairs()
    for path in cache.rglob("note.json"):
        path.write_text(note)
    assert pairs() == before
    assert all("crc32" in json.loads(path.read_text()) for path in cache.rglob("note.json"))


def test_a_changed_note_is_made_anew(pairs, cache):
    before = pairs()
    paths = [path for path in cache.rglob("note.json") if "largest_id" in path.read_text()]
    whole = paths[0].read_text()
    paths[0].write_text(whole.replace('"largest_id": ', '"largest_id": 1'))
    assert pairs() == before and paths[0].read_text() == whole


def test_caches_written_before_there_was_a_check_are_used(pairs, cache):
    before = pairs()
    written = {}
    for path in cache.rglob("note.json"):
        note = json.loads(path.read_text())
        note.pop("crc32")
        path.write_text(json.dumps(note))
        written[path] = path.stat().st_mtime_ns
    assert pairs() == before
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("note.json")} == written


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_no_folder_is_renamed_while_its_file_is_mapped(fit, monkeypatch):
    """Windows refuses that."""
    rename, seen = os.rename, []

    def look(source, target):
        seen.append(Path(source).name)
        assert str(source) not in Path("/proc/self/maps").read_text(), f"{source} is open"
        return rename(source, target)

    monkeypatch.setattr(os, "rename", look)
    fit()
    assert len([name for name in seen if name.endswith(".partial")]) == 4, "rows, pairs, log-probs of two splits"


# ---------------------------------------------------------------------- several runs at once


@pytest.fixture
def fit(model_folder, tokenizer, rows_file, quiet_trainer):
    """Trains two steps with cached reference log-probs and gives the weights."""

    def run():
        module = DPOModule(str(model_folder), learning_rate=1e-3, warmup_steps=0, reference="cached")
        data = PreferenceDataModule(tokenizer, rows_file, batch_size=4, val_size=4, test_size=0)
        quiet_trainer(max_steps=2, limit_val_batches=0).fit(module, data)
        return torch.cat([p.detach().flatten() for p in module.policy.parameters()]).tolist()

    return run


def slowed(monkeypatch, tmp_path, owner, name, count, die_at=None):
    """Makes each call slow enough for others to come in between, and notes in a file what it worked on."""
    call, log = getattr(owner, name), tmp_path / "worked.txt"

    def slow(self, *args):
        time.sleep(0.03)
        with log.open("a") as file:
            file.write(f"{count(*args)}\n")
        if die_at is not None and len(log.read_text().splitlines()) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, *args)

    monkeypatch.setattr(owner, name, slow)
    return lambda: sum(map(int, log.read_text().split()))


def test_runs_that_want_the_same_data_write_them_once(cache, tmp_path):
    def write():
        def batches():
            (tmp_path / f"writer-{os.getpid()}").touch()
            for n in range(5):
                time.sleep(0.03)
                yield {"n": [n]}

        data, note = cached_dataset("key", SCHEMA, batches, lambda: {"a": 1})
        return data["n"][:], note

    assert at_once(*[write] * 3) == [([0, 1, 2, 3, 4], {"a": 1})] * 3
    assert len(list(tmp_path.glob("writer-*"))) == 1


def test_runs_that_find_the_same_damage_mend_it_once(cache, tmp_path):
    cached_dataset("key", SCHEMA, lambda: iter([{"n": [1]}]), lambda: {"a": 1})
    (path,) = cache.rglob("rows.arrow")
    path.write_bytes(path.read_bytes()[:-3])

    def mend():
        return cached_dataset("key", SCHEMA, lambda: iter([{"n": [1]}] * 2), lambda: {"a": 2})[0]["n"][:]

    assert at_once(*[mend] * 4) == [[1, 1]] * 4


def test_reference_log_probs_are_filled_once_by_runs_at_once(fit, pairs, monkeypatch, tmp_path):
    pairs()  # the encoded rows are there: the runs meet at the reference
    worked = slowed(monkeypatch, tmp_path, FrozenCopy, "logps", lambda batch, scoring: batch.num_pairs)
    one, other = at_once(fit, fit)
    assert isinstance(one, list) and one == other == fit()
    assert worked() == len(ROWS), "each pair is scored once"


def test_a_run_that_is_killed_while_another_waits_is_gone_on_from(fit, monkeypatch, tmp_path):
    worked = slowed(monkeypatch, tmp_path, FrozenCopy, "logps", lambda batch, scoring: batch.num_pairs, die_at=4)
    results = at_once(fit, fit)
    assert -signal.SIGKILL in results and results.count(-signal.SIGKILL) == 1
    (weights,) = (result for result in results if result != -signal.SIGKILL)
    assert weights == fit()
    assert worked() == len(ROWS) + 4, "only the batch that the kill came in is scored again"


def test_replies_of_the_model_are_made_once_by_runs_at_once(tokenizer, model_folder, rows_file, monkeypatch, tmp_path):
    def load():
        data = PreferenceDataModule(
            *(tokenizer, rows_file), rejected="generated", batch_size=4, val_size=0, test_size=0, max_length=100,
            generation={"name_or_path": str(model_folder), "max_new_tokens": 4},
        )  # fmt: skip
        data.setup("fit")
        return data.datasets["train"]["rejected"][:]

    worked = slowed(monkeypatch, tmp_path, generated.RejectedGenerator, "lines", lambda *args: len(args[-1]))
    one, other = at_once(load, load)
    assert isinstance(one, list) and one == other == load()
    assert worked() == len(ROWS), "each prompt is answered once"
