"""Files and folders that are not what they seem, and downloads onto what is the user's."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from conftest import REPO, ROWS
from dpo_lightning import PreferenceDataModule
from dpo_lightning.cli.entry import main
from dpo_lightning.data.sources import open_source
from dpo_lightning.errors import UserError


@pytest.fixture
def refusal(tmp_path, monkeypatch, model_folder, capsys):
    """Runs `fit` on a data set that must be refused; gives the one line."""
    monkeypatch.chdir(tmp_path)

    def call(name, *args):
        argv = ["fit", "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model_folder)]
        argv += ["--data.train_dataset", str(name), "--data.max_length", "128", "--trainer.accelerator", "cpu"]
        assert main([*argv, *args]) == 2
        stderr = capsys.readouterr().err
        lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in stderr.split("--- Logging error")[0], stderr
        return lines[0]

    return call


def test_a_parquet_file_with_two_columns_of_a_name_is_refused(tmp_path, refusal):
    columns = [pa.array(["a", "b"])] * 4
    table = pa.Table.from_arrays(columns, names=["prompt", "prompt", "chosen", "rejected"])
    pq.write_table(table, tmp_path / "twice.parquet")
    assert "twice.parquet': two columns have the name 'prompt'" in refusal("twice.parquet")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "wrapped", [{"data": ROWS}, {"version": "1.0", "meta": {"by": "me"}, "rows": ROWS}, {"tags": ["a"], "train": ROWS}]
)
def test_rows_under_a_single_key_are_read(tmp_path, wrapped, indent):
    (tmp_path / "rows.json").write_text(json.dumps(wrapped, indent=indent))
    source = open_source(str(tmp_path / "rows.json"), "train")
    assert [row for _, row in source.rows()] == ROWS
    assert source.location(2).endswith("rows.json, row 2")


@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_that_is_no_unambiguous_wrapper_names_its_keys(tmp_path, refusal, indent):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({"train": ROWS, "test": ROWS}, indent=indent))
    if indent:
        assert "is an object with several lists ('train', 'test')" in refusal(path)
    path.write_text(json.dumps({"question": {"0": "q"}, "answer": {"0": "a"}}, indent=indent))
    line = refusal(path)
    assert "'question', 'answer'" in line and "'odd.json'" not in line
    if indent:
        assert "is one object (with 'question', 'answer') where a list of objects" in line


def test_an_object_per_line_in_a_json_file_stays_one_row_per_line(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns}, {"messages": turns[:1] + turns[1:]}]
    path = tmp_path / "rows.json"
    for kept in (rows, rows[:1]):  # a single row is no wrapper of its messages
        path.write_text("\n".join(map(json.dumps, kept)))
        assert [row for _, row in open_source(str(path), "train").rows()] == kept


def test_a_cut_off_pretty_printed_file_is_not_valid_json(tmp_path, refusal):
    (tmp_path / "cut.json").write_text(json.dumps({"data": ROWS}, indent=2)[:-40])
    assert "cut.json': not valid JSON" in refusal("cut.json")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows", "./rows", "owner/rows"])
def test_what_is_no_file_is_said_and_never_waited_for(tmp_path, refusal, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    assert f"data set '{name}' is a named pipe" in refusal(name)


def test_a_folder_with_the_name_of_a_file_is_taken_for_a_folder(tmp_path, refusal):
    (tmp_path / "rows.jsonl").mkdir()
    line = refusal("rows.jsonl")
    assert "dataset folder 'rows.jsonl' cannot be loaded" in line and "no such file" not in line
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved.json"))
    assert len(list(open_source(str(tmp_path / "saved.json"), "train").rows())) == len(ROWS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 300 + ".jsonl", "too long"),
        ("~nobody-of-this-name/rows.jsonl", "no such file or folder"),
        ("circle.jsonl", "symbolic links"),
        ("nul\0.jsonl", "null byte"),
        ("/dev/zero", "a device"),
    ],
)
def test_names_that_cannot_be_looked_up_are_one_line(tmp_path, refusal, name, words):
    (tmp_path / "circle.jsonl").symlink_to("circle.jsonl")
    assert words in refusal(name)


@pytest.mark.parametrize("option", ["--data.chat_template"])
def test_a_template_that_is_no_file_is_not_waited_for(tmp_path, refusal, write_rows, option):
    os.mkfifo(tmp_path / "t.jinja")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_rows([{"messages": turns}])
    for name in ("t.jinja", "/dev/zero", "."):
        assert "data.chat_template" in refusal(path, option, name)


# ---------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("length", [4, 0, -1, 1.5, "many", "512", True])
def test_a_tokenizer_with_a_length_that_fits_no_pair_is_refused(tmp_path, refusal, tokenizer, rows_file, length):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
    for args in ([], ["--data.max_length", "64"]):
        line = refusal(rows_file, "--data.tokenizer", "./tokenizer", *args)
        assert "tokenizer './tokenizer'" in line and "model_max_length" in line and str(length) in line


@pytest.mark.parametrize("length", [10**30, 1e30, 128.0])
def test_a_tokenizer_that_knows_no_length_is_not(tmp_path, tokenizer, rows_file, length):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
    data = PreferenceDataModule(str(tmp_path / "tokenizer"), rows_file, val_size=2, test_size=2)
    data.setup("fit")
    assert data.max_length == min(1024, length)


# ---------------------------------------------------------------------- download


@pytest.fixture
def download(tmp_path, monkeypatch, model_folder, capsys):
    """Runs `download` of a small model and data set into `offline`; gives its exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "hub" / "rows"))
    (tmp_path / "hub" / "gpt2").symlink_to(model_folder)
    capsys.readouterr()

    def call(*args):
        argv = ["download", "--config", str(REPO / "configs" / "gpt2.yaml"), "--output_dir", "offline"]
        argv += ["--model.name_or_path", "hub/gpt2", "--data.train_dataset", "hub/rows"]
        return main([*argv, *args]), capsys.readouterr().err

    return call


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }


@pytest.mark.parametrize("kind", ["tokenizer/hub/gpt2", "model/hub/gpt2", "dataset/hub/rows"])
@pytest.mark.parametrize("what", ["file", "config", "link", "filled"])
def test_a_download_overwrites_nothing_of_the_users(download, tmp_path, kind, what):
    folder = tmp_path / "offline" / kind
    folder.parent.mkdir(parents=True)
    if what == "file":
        folder.write_text("mine")
    elif what == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        (folder / ("config.json" if what == "config" else "thesis.tex")).write_text("mine")
    before = tree(tmp_path)
    code, err = download()
    assert code == 2 and f"error: 'offline/{kind}' already exists, and" in err
    assert tree(tmp_path) == before  # nothing written at all, since it is looked at first


def test_a_second_download_renews_its_own_folders_but_none_that_was_changed(download, tmp_path):
    assert download()[0] == 0
    first = tree(tmp_path / "offline")
    assert download()[0] == 0
    assert tree(tmp_path / "offline").keys() == first.keys()
    (tmp_path / "offline" / "model/hub/gpt2/config.json").write_text("{}")  # edited by the user
    before = tree(tmp_path)
    code, err = download()
    assert code == 2 and "'config.json' in it is not as a download wrote it" in err
    assert tree(tmp_path) == before


def test_a_failed_download_leaves_nothing(download, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    def full(self, folder, *args, **kwargs):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "half").write_text("half")
        raise OSError(28, "No space left on device")

    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
        code, err = download()
    assert code == 2 and "No space left on device" in err
    assert tree(tmp_path) == before
    assert download()[0] == 0
    before = tree(tmp_path)
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    assert download()[0] == 2
    assert tree(tmp_path) == before


def test_settings_of_a_folder_like_dot_stay_inside(tmp_path, monkeypatch, model_folder):
    from dpo_lightning.cli.download import path_below

    monkeypatch.chdir(tmp_path)
    for name in (".", "", "./", "/", "..", "../..", "a/../..", "/etc/x", "../x"):
        assert len(path_below(name).parts) == 1 and ".." not in path_below(name).parts


def test_user_errors_of_sources_are_one_line_for_the_library_too(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_source(str(tmp_path / "a\nb.jsonl"), "train")
