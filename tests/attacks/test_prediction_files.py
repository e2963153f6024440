"""Files of replies: nothing of the user's is lost, nothing is mixed, and one `predict` at a time writes."""

import json
import os
import signal
import time

import pytest
from tokenizers import AddedToken

from conftest import REPO, ROWS
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.predictions import ReplyWriter
from dpo_lightning.errors import UserError
from dpo_lightning.models import generate as generation
from side_by_side import at_once, command


@pytest.fixture
def predict(quiet_trainer, model_folder, tokenizer, rows_file, tmp_path):
    """Answers the prompts into out.jsonl and gives what is in it."""

    def run(tokenizer=tokenizer, max_length=128, **options):
        data = PreferenceDataModule(
            tokenizer, rows_file, predict_dataset=rows_file, batch_size=4, max_length=max_length
        )
        trainer = quiet_trainer(callbacks=[ReplyWriter(str(tmp_path / "out.jsonl"))], **options)
        trainer.predict(DPOModule(str(model_folder), max_new_tokens=4), data, return_predictions=False)
        return (tmp_path / "out.jsonl").read_bytes()

    return run


FOREIGN = [
    b"my notes",
    b'{"a": 1}',
    b"[1, 2",
    b'{"row": 1, "prompt": "SELECT"}',
    b'{"row": 1, "reply": "SELECT"}',
    b"\xff\xfe",
    b" ",
    b"one\ntwo",
]


@pytest.mark.parametrize("content", FOREIGN, ids=repr)
def test_a_foreign_file_is_refused_and_left_as_it_is(predict, tmp_path, content):
    (tmp_path / "out.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"out.jsonl' is not a file of replies.*choose another file"):
        predict()
    assert (tmp_path / "out.jsonl").read_bytes() == content
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("kept", [1, 3, 48])
def test_what_the_user_wrote_after_replies_is_not_lost_either(predict, tmp_path, kept):
    content = b"\n".join(predict().split(b"\n")[:kept]) + b"\nTODO: look at line 2"
    (tmp_path / "out.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"its last line, {kept + 1}, is not part of one"):
        predict()
    assert (tmp_path / "out.jsonl").read_bytes() == content


def test_a_row_of_data_without_a_newline_is_no_half_reply(predict, tmp_path):
    first = json.loads(predict().split(b"\n")[0])
    content = json.dumps({"row": first["row"], "prompt": first["prompt"]}).encode()
    (tmp_path / "out.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="is not a file of replies"):
        predict()
    assert (tmp_path / "out.jsonl").read_bytes() == content


def test_files_beside_it_are_left_alone(predict, tmp_path):
    (tmp_path / "out.jsonl.partial").write_text("mine")
    predict()
    assert (tmp_path / "out.jsonl.partial").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.glob("*out.jsonl*")) == ["out.jsonl", "out.jsonl.partial"]


@pytest.mark.parametrize("change", ["max_length", "precision", "tokenizer"])
def test_replies_that_were_made_in_another_way_are_not_mixed_in(predict, tokenizer, tmp_path, change):
    whole = predict()
    half = b"\n".join(whole.split(b"\n")[:20]) + b"\n"
    (tmp_path / "out.jsonl").write_bytes(half)
    if change == "tokenizer":
        from copy import deepcopy

        other = deepcopy(tokenizer)
        other.add_tokens([AddedToken("SELECT")])  # the same texts, other tokens
        options = {"tokenizer": other}
    else:
        options = {"max_length": {"max_length": 100}, "precision": {"precision": "bf16-mixed"}}[change]
    with pytest.raises(UserError, match="of another model .*tokenizer, trainer.precision, data.max_length"):
        predict(**options)
    assert (tmp_path / "out.jsonl").read_bytes() == half
    assert predict() == whole, "as it was begun it is gone on with"


def test_two_at_once_one_is_refused_in_one_line(predict, rows_file, model_folder, tmp_path, monkeypatch):
    alone = predict()
    (tmp_path / "out.jsonl").unlink()
    generate = generation.generate
    monkeypatch.setattr(generation, "generate", lambda *args: time.sleep(0.2) or generate(*args))

    def run():
        try:
            return predict()
        except UserError as error:
            return str(error)

    results = at_once(run, run)
    assert alone in results
    (refused,) = (result for result in results if result != alone)
    assert "out.jsonl' is being written by another predict: choose another file with --predictions.output" in refused
    assert (tmp_path / "out.jsonl").read_bytes() == alone
    assert not list(tmp_path.glob(".out*")), "the lock's file is gone"


def test_a_file_whose_writer_was_killed_is_gone_on_with(predict, tmp_path, monkeypatch):
    alone = predict()
    (tmp_path / "out.jsonl").unlink()
    generate, calls = generation.generate, []

    def until_killed(*args):
        calls.append(1)
        return os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 4 else generate(*args)

    def dying():
        monkeypatch.setattr(generation, "generate", until_killed)
        predict()

    assert at_once(dying) == [-9]
    assert 0 < len((tmp_path / "out.jsonl").read_bytes()) < len(alone)
    assert predict() == alone


# ---------------------------------------------------------------------- replies.jsonl of fit


@pytest.mark.parametrize("tail", [b"remark", b'{"step": 1, "loss": 2}\n', b"2024\n", b'{"s'])
def test_a_runs_replies_with_something_foreign_are_not_cut(tail, model_folder, write_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model_folder)]
    args += ["--data.train_dataset", write_rows(ROWS), "--data.val_size", "0", "--data.test_size", "0"]
    args += ["--data.batch_size", "4", "--data.max_length", "128", "--model.max_new_tokens", "4"]
    args += ["--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--trainer.max_epochs", "-1"]
    args += ["--replies.num_prompts", "1", "--replies.every_n_steps", "1", "--export.enabled", "false"]
    assert command(args)[0] == 0
    path = tmp_path / "lightning_logs" / "version_0" / "replies.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    code, line = command([*args, "--trainer.max_steps", "3", "--ckpt_path", "last"])
    if tail == b'{"s':  # half a line of our own
        assert code == 0 and path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 4
    else:
        assert code == 2 and "replies.jsonl' is not a file of replies: move it away" in line
        assert path.read_bytes() == whole + tail
