"""What fell at the second look at checkpoints, model folders and settings: one clear line each, and nothing is lost."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch

from attacked import LAST, command, edited, error_line, trained
from dpo_lightning.cli.entry import main
from dpo_lightning.storage.locks import hold


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def checkpoint(model):
    return torch.load(trained(model) / LAST, weights_only=True)


def resumed(model, folder, change, *args):
    """The exit code of a run that goes on from the checkpoint after `change` was made to it."""
    saved = checkpoint(model)
    change(saved)
    given = edited(model, folder / "given.ckpt", **saved)
    return command("fit", model, "--ckpt_path", given, "--trainer.max_steps", "3", *args)


def of(saved, callback):
    return next(state for name, state in saved["callbacks"].items() if name.startswith(callback))


def group(saved):
    return saved["optimizer_states"][0]["param_groups"][0]


def moments(saved):
    return saved["optimizer_states"][0]["state"][0]


def showing(**changed):
    shares = {"reply/eos_rate": 1.0, "reply/length": 2.0, "reply/repetition": 0.0}
    return [list(({"step": 0, "texts": ["a"], "judged": [{}], "shares": shares} | changed).values())]


def loop(saved):
    return saved["loops"]["fit_loop"]


AUTOMATIC = "epoch_loop.automatic_optimization.optim_progress"
EDITS = {
    "curves a text": lambda c: of(c, "ReportCallback").update(curves="x"),
    "points of a curve": lambda c: of(c, "ReportCallback").update(curves={"val/loss": [("a", "b")]}),
    "a curve of numbers": lambda c: of(c, "ReportCallback").update(curves={"val/loss": [1, 2]}),
    "margins": lambda c: of(c, "ReportCallback").update(margins={0: [None]}),
    "warnings": lambda c: of(c, "ReportCallback").update(warnings=[1]),
    "seconds": lambda c: of(c, "ReportCallback").update(seconds=float("nan")),
    "step of a showing": lambda c: of(c, "RepliesCallback").update(showings=showing(step="a")),
    "shares missing": lambda c: of(c, "RepliesCallback").update(showings=showing(shares={})),
    "texts of a showing": lambda c: of(c, "RepliesCallback").update(showings=showing(texts=[1])),
    "a showing of later": lambda c: of(c, "RepliesCallback").update(showings=showing(step=10**9)),
    "reply no text": lambda c: of(c, "RepliesCallback").update(reference=[[1, [1], True]]),
    "best scores": lambda c: of(c, "ModelCheckpoint").update(best_k_models={"a.ckpt": "x"}),
    "best no table": lambda c: of(c, "ModelCheckpoint").update(best_k_models="x"),
    "rate a text": lambda c: group(c).update(lr="x"),
    "betas missing": lambda c: group(c).pop("betas"),
    "betas": lambda c: group(c).update(betas=(0.9, 2.0)),
    "uphill": lambda c: group(c).update(maximize=True),
    "amsgrad": lambda c: group(c).update(amsgrad=True),
    "decay below 0": lambda c: group(c).update(weight_decay=-5.0),
    "step below 0": lambda c: moments(c).update(step=torch.tensor(-1.0)),
    "moment a number": lambda c: moments(c).update(exp_avg=torch.tensor(1.0)),  # read past its end
    "moment missing": lambda c: moments(c).pop("exp_avg"),
    "moment below 0": lambda c: moments(c)["exp_avg_sq"].fill_(-1.0),
    "base rates a text": lambda c: c["lr_schedulers"][0].update(base_lrs="xy"),
    "no base rates": lambda c: c["lr_schedulers"][0].update(base_lrs=[]),
    "other base rates": lambda c: c["lr_schedulers"][0].update(base_lrs=[1.0, 1.0]),
    "schedule's function": lambda c: c["lr_schedulers"][0].update(get_lr="x"),
    "schedule of another step": lambda c: c["lr_schedulers"][0].update(last_epoch=0),
    "no schedule": lambda c: c.update(lr_schedulers=[]),
    "metric's function": lambda c: c["dpo_lightning"]["metrics"].update(compute=torch.zeros(1)),
    "shape of a metric": lambda c: c["dpo_lightning"]["metrics"].update(sums=torch.zeros(2)),
    "start": lambda c: c["dpo_lightning"].update(start=7),
    "batches": lambda c: c["dpo_lightning"].update(batches=10**9),
    "nothing of ours": lambda c: c.update(dpo_lightning=None),
    "skipped steps": lambda c: c.update(skipped_steps="x"),
    "counter": lambda c: loop(c)[AUTOMATIC]["optimizer"]["step"]["total"].update(completed="x"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_deep_in_a_checkpoint_is_one_line(edit, model_folder, tmp_path, capsys):
    assert resumed(model_folder, tmp_path, EDITS[edit]) == 2
    line = error_line(capsys)
    assert "edited" in line and "list.remove" not in line


def test_a_file_beside_the_checkpoints_is_none_of_them(model_folder, tmp_path, capsys):
    """ModelCheckpoint deletes what its state names, and that may lie in its own folder without being its own."""
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    mine = {"dirpath": str(tmp_path), "last_model_path": "", "best_model_path": str(thesis)}
    mine |= {"best_k_models": {str(thesis): torch.tensor(1e9)}, "kth_best_model_path": str(thesis)}
    mine |= {"kth_value": torch.tensor(1e9)}
    args = ["--checkpoint.dirpath", str(tmp_path), "--trainer.val_check_interval", "1"]
    assert resumed(model_folder, tmp_path / "elsewhere", lambda c: of(c, "ModelCheckpoint").update(mine), *args) == 2
    assert "thesis.tex" in error_line(capsys)
    assert thesis.read_text() == "years of work"


def test_another_number_of_prompts_is_one_line(model_folder, tmp_path, capsys):
    assert resumed(model_folder, tmp_path, lambda c: None, "--replies.num_prompts", "2") == 2
    assert "replies.num_prompts gives 2, but 1 were answered" in error_line(capsys)


def hold_until_told(path, held, told):
    held.put(hold(path))
    told.get()


def test_a_folder_of_checkpoints_is_one_runs_alone(model_folder, tmp_path, capsys):
    lock = tmp_path / "kept" / ".dpo-lightning.lock"
    context = multiprocessing.get_context("fork")
    held, told = context.Queue(), context.Queue()
    other = context.Process(target=hold_until_told, args=(lock, held, told))
    other.start()
    try:
        assert held.get()
        assert command("fit", model_folder, "--checkpoint.dirpath", "kept") == 2
        assert "checkpoint.dirpath" in (line := error_line(capsys)) and "is in use by another run" in line
        assert not list(tmp_path.glob("kept/*.ckpt"))
    finally:
        told.put(None)
        other.join()
    assert command("fit", model_folder, "--checkpoint.dirpath", "kept") == 0
    assert (tmp_path / "kept" / "last.ckpt").exists() and not lock.exists()


@pytest.mark.parametrize("name", ["model.beta", "model.learning_rate", "model.max_new_tokens", "data.batch_size"])
def test_null_is_no_number(name, model_folder, capsys):
    assert command("fit", model_folder, f"--{name}", "null") == 2
    assert error_line(capsys).startswith(f"error: {name} is 'null': it must be a")  # no file is named: none says so


@pytest.fixture
def own_folder(model_folder, tmp_path):
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_layer": -1}, "num_hidden_layers -1, which must be from 1"),
        ({"n_layer": 10**6}, "num_hidden_layers 1000000, which must be from 1"),
        ({"n_head": -4}, "num_attention_heads -4, which must be from 1"),
        ({"vocab_size": 0}, "vocab_size 0, which must be from 1"),
        ({"vocab_size": 7}, "its weights have other sizes than its config says"),
        ({"vocab_size": "x"}, "TypeError: Field 'vocab_size' expected int"),
    ],
)
def test_sizes_that_no_model_has(settings, words, own_folder, capsys):
    config = own_folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    assert command("fit", own_folder) == 2
    assert words in error_line(capsys)


def test_a_tokenizer_that_makes_no_tokens(own_folder, capsys):
    file = own_folder / "tokenizer.json"
    nothing = {"type": "Replace", "pattern": {"Regex": "[\\s\\S]"}, "content": ""}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": nothing}))
    assert command("fit", own_folder) == 2
    assert "makes no tokens of a prompt" in error_line(capsys)


@pytest.mark.parametrize("out", ["a\0b", "~nobody-of-this-name/out", "a" * 5000])
def test_a_target_that_is_no_path(out, model_folder, capsys):
    status = main(["export", "--ckpt_path", str(trained(model_folder) / LAST), "--output_dir", out])
    if out.startswith("~"):  # then it is a folder's name
        assert status == 0 and Path(out, "config.json").is_file()
    else:
        assert status == 2 and "cannot be looked up" in error_line(capsys)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("a" * 5000, "cannot be looked up"),
        ("best", "--ckpt_path: "),
        ("hpc", "--ckpt_path: "),
        ("memory://x", "cannot be read: Checkpoint file not found"),
        ("/dev/zero", "is not a file"),
    ],
)
def test_a_checkpoint_that_is_none(given, words, model_folder, capsys):
    assert command("fit", model_folder, "--ckpt_path", given) == 2
    assert words in error_line(capsys)


def test_a_folder_numbered_in_another_way_is_none_of_ours(model_folder):
    Path("lightning_logs", "version_²").mkdir(parents=True)
    assert command("fit", model_folder) == 0
    assert Path("lightning_logs", "version_0", "report.html").is_file()


@pytest.mark.parametrize("make", [lambda p: p.symlink_to("nowhere"), os.mkfifo], ids=["dead link", "pipe"])
def test_last_passes_over_what_is_no_file(make, model_folder):
    folder = Path("lightning_logs", "version_0", "checkpoints")
    folder.mkdir(parents=True)
    make(folder / "last.ckpt")
    assert command("fit", model_folder, "--ckpt_path", "last") == 0


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_replies_that_are_no_file(make, model_folder, tmp_path, capsys):
    shutil.copytree(trained(model_folder) / "lightning_logs", tmp_path / "lightning_logs")
    replies = Path("lightning_logs", "version_0", "replies.jsonl")
    replies.unlink()
    make(replies)
    assert command("fit", model_folder, "--ckpt_path", "last", "--trainer.max_steps", "3") == 2
    assert "is not a file of replies: move it away" in error_line(capsys)


def test_nothing_of_the_users_is_replaced_in_a_folder_of_checkpoints(model_folder, tmp_path, capsys):
    mine = [tmp_path / "kept" / name for name in ("step1.ckpt", "draft.partial")]
    mine[0].parent.mkdir()
    for path in mine:
        path.write_text("mine")
    assert command("fit", model_folder, "--checkpoint.dirpath", "kept") == 2
    assert "step1.ckpt' is another run's" in error_line(capsys)
    mine[0].rename(mine := tmp_path / "step1.ckpt")
    assert command("fit", model_folder, "--checkpoint.dirpath", "kept") == 0
    assert (tmp_path / "kept" / "draft.partial").read_text() == "mine" == mine.read_text()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("checkpoint.filename=../../../x", "must lie in the run's folder"),
        ("checkpoint.dirpath=a\0b", "cannot be looked up"),
        ("trainer.default_root_dir=a\0b", "cannot be looked up"),
    ],
)
def test_places_that_are_none(setting, words, model_folder, capsys):
    assert command("fit", model_folder, f"--{setting}") == 2
    assert words in error_line(capsys)


@pytest.mark.parametrize("settings", [{"repetition_penalty": -3.0}, {"stop_strings": ["a"]}], ids=str)
def test_a_models_own_generation_settings_do_not_matter(settings, own_folder):
    (own_folder / "generation_config.json").write_text(json.dumps(settings))
    assert command("fit", own_folder, "--export.enabled", "false") == 0
