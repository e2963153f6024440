import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import REPO, ROWS
from dpo_lightning import PreferenceDataModule
from dpo_lightning.data import pipeline
from dpo_lightning.data.batching import PairBatch, PromptBatch, to_pairs
from dpo_lightning.data.loaders import IndexedRows, make_loader
from dpo_lightning.data.splits import split_by_key
from dpo_lightning.errors import UserError


def make(tokenizer, train, stage="fit", **options):
    data = PreferenceDataModule(tokenizer, train, **{"val_size": 4, "test_size": 4, "batch_size": 4} | options)
    data.setup(stage)
    return data


def test_loader_yields_pair_batches_of_the_rows(tokenizer, rows_file):
    data = make(tokenizer, rows_file, shuffle=False)
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, PairBatch)
    pair = to_pairs(batch)[0]
    text = data.pairs("train", [0])[0]
    assert tokenizer.decode(pair.prompt_ids) == text.prompt
    assert tokenizer.decode(pair.chosen_ids) == text.chosen + tokenizer.eos_token
    assert pair.rejected_ids == [tokenizer.eos_token_id]


def test_splits_share_no_context_and_lose_no_row(tokenizer, rows_file):
    data = make(tokenizer, rows_file)
    contexts = {name: set(split["context"]) for name, split in data.datasets.items()}
    assert set(contexts) == {"train", "val", "test"}
    assert sum(len(split) for split in data.datasets.values()) == len(ROWS)
    assert len(set.union(*contexts.values())) == sum(map(len, contexts.values()))
    again = make(tokenizer, rows_file)
    other = make(tokenizer, rows_file, seed=1)
    assert set(again.datasets["val"]["context"]) == contexts["val"] != set(other.datasets["val"]["context"])


def test_held_out_data_sets_are_used_whole(tokenizer, rows_file, write_rows):
    held_out = write_rows(ROWS[:3], "val.jsonl")
    data = make(tokenizer, rows_file, val_dataset=held_out, test_size=0)
    assert len(data.datasets["val"]) == 3
    assert len(data.datasets["train"]) == len(ROWS)
    assert "test" not in data.datasets
    with pytest.raises(UserError, match="there are no test pairs: give data.test_dataset, or a data.test_size above 0"):
        data.test_dataloader()


def test_one_context_cannot_be_split():
    with pytest.raises(UserError, match="its 5 rows have only 1 different contexts.*set data.val_size to 0"):
        split_by_key(["same"] * 5, {"val": 0.2}, 0, "rows.jsonl")


def test_sizes_are_shares_or_counts():
    keys = [str(i) for i in range(100)]
    splits = split_by_key(keys, {"val": 0.1, "test": 7}, 0, "f")
    assert {name: len(rows) for name, rows in splits.items()} == {"val": 10, "test": 7, "train": 83}


def test_a_number_larger_than_a_tenth_leaves_small_data_to_train_on():
    splits = split_by_key([str(i) for i in range(20)], {"val": 200, "test": 200}, 0, "f")
    assert {name: len(rows) for name, rows in splits.items()} == {"val": 2, "test": 2, "train": 16}


def test_shuffled_rejected_is_another_rows_answer(tokenizer, rows_file):
    data = make(tokenizer, rows_file, rejected="shuffled")
    pairs = data.pairs("train", range(len(data.datasets["train"])))
    answers = {" " + row["answer"] for row in ROWS}
    assert all(pair.rejected in answers and pair.rejected != pair.chosen for pair in pairs)


def test_shuffled_is_refused_where_rejected_is_given(tokenizer, write_rows):
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(9)]
    with pytest.raises(UserError, match="has rejected completions of its own"):
        make(tokenizer, write_rows(rows), rejected="shuffled")


def test_encoding_is_cached(tokenizer, rows_file, monkeypatch):
    make(tokenizer, rows_file)

    def encode_again(*args, **kwargs):
        raise AssertionError("encoded twice")

    monkeypatch.setattr(pipeline, "encode_batch", encode_again)
    make(tokenizer, rows_file)
    with pytest.raises(AssertionError, match="encoded twice"):
        make(tokenizer, rows_file, max_length=100)


def test_cut_prompts_are_counted_and_said(tokenizer, rows_file):
    with pytest.warns(
        UserWarning,
        match=r"train: of 40 pairs 40 had their prompt cut from the left and 0 a completion .*first: .*, line \d",
    ):
        make(tokenizer, rows_file, max_length=24)


def test_a_bad_row_is_named(tokenizer, write_rows):
    path = write_rows([*ROWS[:5], ROWS[5] | {"answer": None}])
    with pytest.raises(UserError, match=re.escape(f"{path}, line 6, column 'answer': found null")):
        make(tokenizer, path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rejected": "emtpy"}, "data.rejected is 'emtpy': it must be one of empty, shuffled"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"val_size": -1}, "data.val_size is -1"),
        ({"max_length": 4}, "data.max_length is 4"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"prompt_template": "{x}"}, "data.prompt_template"),
    ],
)
def test_settings_out_of_range_are_refused(tokenizer, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        PreferenceDataModule(tokenizer, "rows.jsonl", **options)


def test_missing_settings_are_named(tokenizer):
    with pytest.raises(UserError, match="data.train_dataset is missing"):
        PreferenceDataModule(tokenizer).setup("fit")
    with pytest.raises(UserError, match="data.tokenizer is missing"):
        _ = PreferenceDataModule().tokenizer


def test_prompts_to_answer_need_no_completion(tokenizer, write_rows):
    path = write_rows([{"prompt": "one two"}, {"prompt": "three"}])
    data = make(tokenizer, None, stage="predict", predict_dataset=path)
    batch = next(iter(data.predict_dataloader()))
    assert isinstance(batch, PromptBatch)
    assert [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(*batch[:2], strict=True)] == ["one two", "three"]


def test_loader_workers_give_the_same_batches(tokenizer, rows_file):
    here, there = (make(tokenizer, rows_file, num_workers=n).train_dataloader() for n in (0, 2))
    for one, other in zip(here, there, strict=True):
        assert one.lengths == other.lengths
        pairs = zip(one, other, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs if torch.is_tensor(a))


def test_the_script_of_the_docs_prints_a_decoded_batch(tmp_path, model_folder, rows_file):
    page = (REPO / "docs" / "lightning.md").read_text()
    script = next(block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "train_dataloader" in block)
    assert len(script.strip().splitlines()) <= 10
    script = re.sub(r'tokenizer="[^"]*"', f"tokenizer={json.dumps(str(model_folder))}", script)
    script = re.sub(r'train_dataset="[^"]*"', f"train_dataset={json.dumps(rows_file)}", script)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "Question: Which" in run.stdout and "<|endoftext|>" in run.stdout


def test_batches_for_a_gpu_are_pinned(tokenizer, rows_file, monkeypatch):
    data = make(tokenizer, rows_file)
    for device, pinned in {"cpu": False, "cuda": True}.items():
        trainer = SimpleNamespace(
            global_rank=0,
            world_size=1,
            overfit_batches=0,
            strategy=SimpleNamespace(root_device=torch.device(device)),
        )
        assert make_loader(IndexedRows(data.datasets, "train"), 8, True, 0, 0, trainer).pin_memory == pinned
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *args: tensor + 1)  # as a loader pins each tensor
    batch = data.batch("train", [0, 1])
    found = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert type(found) is PairBatch and found.reference_logps is None
    assert torch.equal(found.targets, batch.targets + 1)
