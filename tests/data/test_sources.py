import json
import re

import pytest
from datasets import Dataset, DatasetDict

from dpo_lightning.data.pair import BadRow
from dpo_lightning.data.sources import open_source
from dpo_lightning.errors import UserError

ROWS = [{"prompt": "p1", "chosen": "12", "rejected": ""}, {"prompt": "p2", "chosen": "NA", "rejected": "r"}]


def test_every_kind_of_file_and_folder_gives_the_same_rows(tmp_path, write_rows):
    data = Dataset.from_list(ROWS)
    data.to_csv(str(tmp_path / "rows.csv"))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    names = [write_rows(ROWS), *(str(tmp_path / name) for name in ("rows.csv", "rows.parquet", "rows.json", "saved"))]
    for name in [*names, str(tmp_path / "splits"), str(tmp_path / "splits:train")]:
        source = open_source(name, "train")
        assert list(source.columns) == ["prompt", "chosen", "rejected"], name
        assert [row for _, row in source.rows()] == ROWS, name
        assert source.fingerprint == open_source(name, "train").fingerprint
    picked = open_source(str(tmp_path / "splits"), "test")
    assert list(picked.rows()) == [(1, ROWS[1])]
    assert picked.location(1) == f"{tmp_path}/splits:test, row 1"


def test_jsonl_is_read_anew_each_time_and_changes_its_fingerprint(write_rows):
    first = open_source(write_rows(ROWS), "train")
    assert list(first.rows()) == list(first.rows()) != []
    assert open_source(write_rows(ROWS[:1]), "train").fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "there is no such file or folder"),
        ("./no/such/folder", None, "there is no such file or folder"),
        ("empty.jsonl", b"", "is an empty file"),
        ("blank.jsonl", b"\n\n", "has no rows"),
        ("rows.txt", b"hello", "files of type .jsonl, .json, .csv, .parquet can be read, not '.txt'"),
        ("list.jsonl", b'{"a": "b"}\n[1]\n', "line 2: found list where an object with named columns belongs"),
        ("broken.jsonl", b'{"a": "b"}\n\n{"a": \n', "line 3: not valid JSON"),
        ("latin.jsonl", '{"a": "é"}\n'.encode("latin-1"), "line 1: not UTF-8 (byte 8 of the line)"),
        ("broken.parquet", b"PAR1 nonsense", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        for _, row in open_source(str(path), "train").rows():
            if isinstance(row, BadRow):
                raise row
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_split_that_is_not_there_or_not_named_is_said(tmp_path):
    data = Dataset.from_list(ROWS)
    DatasetDict({"a": data, "b": data}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UserError, match="has the splits a, b: name one, as in"):
        open_source(str(tmp_path / "splits"), "train")
    with pytest.raises(UserError, match="there is no split 'c', only a, b"):
        open_source(str(tmp_path / "splits") + ":c", "train")


def test_a_hub_name_without_a_network_names_both_ways_out():
    with pytest.raises(UserError, match="hub cannot be reached.*download.*local dataset folder"):
        open_source("someone/some-data", "train")
