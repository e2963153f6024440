"""Checkpoints that were edited, or hold less than a run needs: one clear line each, and no file is lost."""

import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from attacked import LAST, command, edited, error_line, trained
from dpo_lightning.cli.entry import main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights(model, **changed):
    return torch.load(trained(model) / LAST, weights_only=True)["state_dict"] | changed


WEIGHT = "policy.transformer.wte.weight"
EDITS = {
    "shape": (lambda m: {"state_dict": weights(m, **{WEIGHT: torch.zeros(3, 5)})}, f"size mismatch for {WEIGHT}"),
    "no tensor": (lambda m: {"state_dict": weights(m, **{WEIGHT: [1, 2]})}, f"the weight '{WEIGHT}' is list"),
    "no names": (lambda m: {"state_dict": weights(m) | {7: torch.zeros(1)}}, "its state_dict is not a table"),
    "no weights": (lambda m: {"state_dict": None}, "its state_dict is missing"),
    "step is text": (lambda m: {"global_step": "many"}, "its global_step is 'many'"),
    "step below 0": (lambda m: {"global_step": -5}, "its global_step is -5"),
    "step is true": (lambda m: {"global_step": True}, "its global_step is True"),
    "settings a list": (lambda m: {"hyper_parameters": ["beta"]}, "its hyper_parameters is not a table"),
    "data a list": (lambda m: {"datamodule_hyper_parameters": [1]}, "its datamodule_hyper_parameters is not a table"),
    "unknown setting": (lambda m: {"settings": {"betaa": 0.2}}, "has the unknown setting 'betaa'"),
    "wrong kind": (lambda m: {"settings": {"beta": "much"}}, "has a setting that does not fit"),
    "no value": (lambda m: {"settings": {"learning_rate": None}}, "has the setting learning_rate without a value"),
    "commands a terminal": (lambda m: {"settings": {"dtype": "\x1b[2J\x9b2J"}}, r"model.dtype is '\x1b[2J\x9b2J'"),
    "of a name": (lambda m: {"state_dict": weights(m) | {"\x1b[2J": torch.zeros(1)}}, r"unknown weight \x1b[2J"),
    "wrong lora": (lambda m: {"settings": {"lora": {"r": "x"}}}, "model.lora.r is 'x'"),
    "path for lora": (lambda m: {"settings": {"lora": "/etc/hostname"}}, "has a setting that does not fit"),
    "wrong loss": (lambda m: {"settings": {"loss_options": {"ld_alpha": [1]}}}, "ld_alpha"),
}


@pytest.mark.parametrize("name", ["test", "export"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_checkpoint_is_one_line(name, edit, model_folder, tmp_path, capsys):
    change, words = EDITS[edit]
    given = edited(model_folder, tmp_path / "given.ckpt", **change(model_folder))
    if (name, edit) == ("export", "wrong loss"):
        assert main(["export", "--ckpt_path", given, "--output_dir", "out"]) == 0  # which uses no loss
        return
    if name == "export":
        assert main(["export", "--ckpt_path", given, "--output_dir", "out"]) == 2
        assert not Path("out").exists()
    else:
        assert command("test", model_folder, "--ckpt_path", given) == 2
    assert words in error_line(capsys)


def test_the_tokenizer_of_a_checkpoint_is_a_name(model_folder, tmp_path, capsys):
    for tokenizer in ({"a": 1}, None, 7):
        given = edited(model_folder, tmp_path / "given.ckpt", datamodule_hyper_parameters={"tokenizer": tokenizer})
        assert main(["export", "--ckpt_path", given, "--output_dir", "out"]) == 2
        assert "does not name its tokenizer" in error_line(capsys)


def states(model, **changed):
    """The states of the run's callbacks, ModelCheckpoint's changed."""
    saved = torch.load(trained(model) / LAST, weights_only=True)["callbacks"]
    return {name: state | changed if name.startswith("ModelCheckpoint") else state for name, state in saved.items()}


RESUMED = {
    "callbacks a list": (lambda m: {"callbacks": [1]}, "its callbacks is not a table"),
    "callback's state a text": (lambda m: {"callbacks": dict.fromkeys(states(m), "x")}, "state is str"),
    "callback's state another": (lambda m: {"callbacks": dict.fromkeys(states(m), {"x": 1})}, "state has no best"),
    "loops a text": (lambda m: {"loops": "x"}, "states do not fit it"),
    "no loops": (lambda m: {"loops": None}, "has only the weights"),
    "own part a list": (lambda m: {"dpo_lightning": [1]}, "states do not fit it"),
    "schedule a number": (lambda m: {"lr_schedulers": [5]}, "states do not fit it"),
    "optimizer a number": (lambda m: {"optimizer_states": [5]}, "states do not fit it"),
}


@pytest.mark.parametrize("edit", RESUMED)
def test_a_run_cannot_go_on_from_states_that_do_not_fit(edit, model_folder, tmp_path, capsys):
    change, words = RESUMED[edit]
    given = edited(model_folder, tmp_path / "given.ckpt", **change(model_folder))
    assert command("fit", model_folder, "--ckpt_path", given, "--trainer.max_steps", "3") == 2
    assert words in error_line(capsys)


@pytest.mark.parametrize("value", [torch.zeros(3), None, "x"], ids=["shape", "none", "text"])
def test_an_optimizers_state_that_does_not_fit_is_one_line(value, model_folder, tmp_path, capsys):
    saved = torch.load(trained(model_folder) / LAST, weights_only=True)["optimizer_states"]
    saved[0]["state"][0]["exp_avg"] = value
    given = edited(model_folder, tmp_path / "given.ckpt", optimizer_states=saved)
    assert command("fit", model_folder, "--ckpt_path", given, "--trainer.max_steps", "3") == 2
    assert "the optimizer's exp_avg has the " in error_line(capsys)


def test_a_fused_optimizers_state_that_does_not_fit_is_one_line(model_folder, tmp_path, capsys):
    """A fused step would read past its end."""
    args = ["--optimizer", "SGD", "--optimizer.momentum", "0.9", "--export.enabled", "false"]
    assert command("fit", model_folder, *args) == 0
    checkpoint = torch.load(LAST, weights_only=True)
    checkpoint["optimizer_states"][0]["state"][0]["momentum_buffer"] = torch.zeros(3)
    torch.save(checkpoint, tmp_path / "given.ckpt")
    assert command("fit", model_folder, "--ckpt_path", "given.ckpt", "--trainer.max_steps", "3", *args) == 2
    assert "the optimizer's momentum_buffer has the shape [3]" in error_line(capsys)


def test_an_optimizers_state_of_no_weight_is_one_line(model_folder, tmp_path, capsys):
    saved = torch.load(trained(model_folder) / LAST, weights_only=True)["optimizer_states"]
    saved[0]["param_groups"][0]["params"][0] = 1000
    given = edited(model_folder, tmp_path / "given.ckpt", optimizer_states=saved)
    assert command("fit", model_folder, "--ckpt_path", given, "--trainer.max_steps", "3") == 2
    assert "the optimizer's " in error_line(capsys)


@pytest.mark.parametrize("field", ["best_k_models", "kth_best_model_path", "last_model_path"])
def test_a_checkpoint_cannot_have_the_users_files_deleted(field, model_folder, tmp_path, capsys):
    """ModelCheckpoint takes the paths of its checkpoints from the state, and deletes those that it no longer wants."""
    shutil.copytree(trained(model_folder) / "lightning_logs", tmp_path / "lightning_logs")
    thesis = tmp_path / "thesis" / "chapter.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    folder = LAST.parent
    saved = torch.load(trained(model_folder) / LAST, weights_only=True)["callbacks"]
    state = next(state for name, state in saved.items() if name.startswith("ModelCheckpoint"))
    stray = f"{state['dirpath']}/../../../thesis"
    value = {stray: torch.tensor(1e9)} if field == "best_k_models" else stray
    worst = {"kth_best_model_path": stray, "kth_value": torch.tensor(1e9)} if field == "best_k_models" else {}
    given = edited(model_folder, folder / "last.ckpt", callbacks=states(model_folder, **worst | {field: value}))
    args = ["--trainer.max_steps", "4", "--checkpoint.save_last", "true"]
    assert command("fit", model_folder, "--ckpt_path", given, *args) == 2
    line = error_line(capsys)
    assert "thesis" in line and "lies elsewhere" in line
    assert thesis.read_text() == "years of work"


def test_the_best_checkpoint_has_the_weights_alone_and_no_run_is_resumed_from_it(model_folder, capsys):
    assert command("fit", model_folder) == 0
    (best,) = LAST.parent.glob("step*.ckpt")
    assert best.stat().st_size < 0.5 * LAST.stat().st_size
    weights, everything = (torch.load(path, weights_only=True) for path in (best, LAST))
    assert not {"optimizer_states", "lr_schedulers", "callbacks"} & set(weights)
    assert all(torch.equal(weight, everything["state_dict"][name]) for name, weight in weights["state_dict"].items())
    capsys.readouterr()
    assert command("fit", model_folder, "--ckpt_path", str(best)) == 2
    line = error_line(capsys)
    assert "has only the weights (checkpoint.save_weights_only)" in line and f"resume with --ckpt_path '{LAST}'" in line
    best.touch()  # the newest one: `last` is what a run can be resumed from
    assert command("fit", model_folder, "--ckpt_path", "last", "--trainer.max_steps", "3") == 0
    assert not Path("lightning_logs", "version_1").exists()
    assert torch.load(LAST, weights_only=True)["global_step"] == 3
    (best,) = LAST.parent.glob("step*.ckpt")
    assert command("test", model_folder, "--ckpt_path", str(best)) == 0
    assert main(["export", "--ckpt_path", str(best), "--output_dir", "out"]) == 0


def test_a_run_killed_before_its_first_last_checkpoint_starts_anew(model_folder, capsys):
    assert command("fit", model_folder) == 0
    LAST.unlink()
    capsys.readouterr()
    assert command("fit", model_folder, "--ckpt_path", *map(str, LAST.parent.glob("step*.ckpt"))) == 2
    assert "there is none beside it" in error_line(capsys)
    assert command("fit", model_folder, "--ckpt_path", "last") == 0
    assert Path("lightning_logs", "version_1", "checkpoints", "last.ckpt").exists() and not LAST.exists()


def test_lightnings_own_last_checkpoint_can_be_resumed_from_too(model_folder):
    assert command("fit", model_folder, "--checkpoint.save_last", "true") == 0
    assert "optimizer_states" in torch.load(LAST, weights_only=True)


def test_a_resumed_run_checks_the_bytes_once_and_maps_the_tensors(model_folder, monkeypatch):
    assert command("fit", model_folder) == 0
    checked, loaded, load, test = [], [], torch.load, zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda archive: checked.append(archive.filename) or test(archive))
    monkeypatch.setattr(torch, "load", lambda file, **options: loaded.append(options["mmap"]) or load(file, **options))
    assert command("fit", model_folder, "--ckpt_path", "last", "--trainer.max_steps", "3") == 0
    assert checked == [str(LAST)]
    assert loaded == [True] * 3  # its parts, the settings, the states


def test_a_sharded_checkpoint_is_not_exported_but_said(tmp_path, capsys):
    (tmp_path / "last.ckpt").mkdir()
    torch.save({"global_step": 4, "hyper_parameters": {}}, tmp_path / "last.ckpt" / "meta.pt")
    assert main(["export", "--ckpt_path", "last.ckpt", "--output_dir", "out"]) == 2
    assert "is a sharded checkpoint" in error_line(capsys)
