"""An export never costs the user a file: what it did not write itself it neither replaces nor mixes with."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from attacked import LAST, command, edited, error_line, trained
from dpo_lightning.callbacks.export.folder import MANIFEST
from dpo_lightning.cli.entry import main
from ranks import run_ranks


@pytest.fixture(autouse=True)
def here(model_folder, tmp_path, monkeypatch):
    """A working directory, under one of the test's own, that holds a copy of a run and nothing else."""
    here = tmp_path / "here"
    shutil.copytree(trained(model_folder) / "lightning_logs", here / "lightning_logs")
    monkeypatch.chdir(here)
    return here


def export(folder, *args):
    return main(["export", "--ckpt_path", str(LAST), "--output_dir", str(folder), *args])


def contents(root):
    return {str(path.relative_to(root)): path.is_file() and path.read_bytes() for path in root.rglob("*")}


def refused(folder, words, capsys, root=Path()):
    """Asserts that an export is refused by a line with `words`, and that nothing at all has changed."""
    before = contents(root)
    assert export(folder) == 2
    line = error_line(capsys)
    assert words in line and str(folder) in line, line
    assert contents(root) == before


@pytest.mark.parametrize("name", ["thesis.tex", "chapters/1.tex", "empty/", ".hidden", "dangling", MANIFEST])
def test_a_folder_with_anything_else_is_refused(name, capsys):
    path = Path("out", name)
    path.parent.mkdir(parents=True)
    if name == "dangling":
        path.symlink_to("nowhere")
    elif name.endswith("/"):
        path.mkdir()
    else:
        path.write_text("mine")
    refused(
        "out", f"it contains '{Path(name).parts[0]}', which is not as an export left it, and nothing is deleted", capsys
    )


def test_an_empty_folder_and_a_previous_export_are_written(here):
    Path("out").mkdir()
    for args in ([], ["--dtype", "bfloat16"]):
        assert export("out", *args) == 0
    assert str(AutoModelForCausalLM.from_pretrained("out", dtype="auto").dtype) == "torch.bfloat16"
    Path("out", "README.md").unlink()  # nothing of the user's is lost by replacing what is left
    assert export("out") == 0
    listed = json.loads(Path("out", MANIFEST).read_text(encoding="utf-8"))["files"]
    assert set(listed) | {MANIFEST} == {path.name for path in Path("out").iterdir()}
    assert {path.name for path in here.iterdir()} == {"lightning_logs", "out"}


@pytest.mark.parametrize("change", ["added", "edited", "added deep", "replaced by a link"])
def test_a_previous_export_that_the_user_worked_on_is_refused(change, here, capsys):
    assert export("out") == 0
    card = Path("out", "README.md")
    if change == "added":
        Path("out", "model.gguf").write_text("converted")
    elif change == "edited":
        card.write_text(card.read_text(encoding="utf-8").replace("DPO", "DP0"), encoding="utf-8")  # of the same size
    elif change == "added deep":
        Path("out", "notes").mkdir()
        Path("out", "notes", "a.txt").write_text("mine")
    else:
        card.rename("card.md")
        card.symlink_to(here / "card.md")
    refused("out", "which is not as an export left it", capsys)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', '{"files": {}}', "[" * 100_000, "\0"])
def test_a_manifest_that_lists_nothing_gives_nothing_away(text, capsys):
    Path("out").mkdir()
    Path("out", MANIFEST).write_text(text)
    refused("out", "which is not as an export left it", capsys)


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        (".", "it is the working directory"),
        ("..", "it is the working directory or contains it"),
        ("lightning_logs/version_0", "it is or contains the checkpoints' folder"),
        ("lightning_logs", "it is or contains the checkpoints' folder"),
        ("lightning_logs/version_0/checkpoints", "it is or contains the checkpoints' folder"),
        ("lightning_logs/version_0/checkpoints/out", "it lies in the checkpoints' folder"),
        ("link", "it is a symbolic link"),
        ("dangling", "it is a symbolic link"),
        ("there/version_0", "it is or contains the checkpoints' folder"),
        ("file", "it is a file"),
        (str(LAST), "it is a file"),
        ("file/out", "nothing can be written in"),
    ],
)
def test_a_target_where_it_would_harm_is_refused(folder, words, here, capsys):
    Path("empty").mkdir()
    Path("link").symlink_to("empty")
    Path("dangling").symlink_to("nowhere")
    Path("there").symlink_to("lightning_logs")
    Path("file").write_text("mine")
    refused(folder, words, capsys, here)


@pytest.mark.parametrize(
    ("folder", "words"), [("", "it is or contains"), ("..", "it is or contains"), ("out", "it lies in")]
)
def test_the_model_that_was_trained_is_not_replaced(folder, words, model_folder, here, capsys):
    """Not even where it is a previous export itself, whose files an export might replace."""
    assert export("all/base") == 0
    given = edited(model_folder, here / "given.ckpt", {"name_or_path": "all/base"})
    before = contents(here)
    target = str(Path("all", "base", folder))
    assert main(["export", "--ckpt_path", given, "--output_dir", target]) == 2
    assert f"{words} the model's folder" in error_line(capsys)
    assert command("fit", Path("all/base"), "--export.folder", target) == 2
    assert f"{words} the model's folder" in error_line(capsys)
    shutil.rmtree("lightning_logs/version_1", ignore_errors=True)
    Path("rows.jsonl").unlink()
    assert contents(here) == before


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device"), KeyboardInterrupt()]
)
def test_a_failed_export_leaves_what_was_there_and_nothing_else(error, here, monkeypatch, capsys):
    for folder in ("new", "out"):
        if folder == "out":
            assert export("out") == 0
        capsys.readouterr()
        before = contents(here)

        def fail(self, path, **options):
            Path(path, "half.safetensors").write_text("half")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(GPT2LMHeadModel, "save_pretrained", fail)
            assert export(folder) == (130 if isinstance(error, KeyboardInterrupt) else 2)
        stderr = capsys.readouterr().err
        assert "Traceback" not in stderr and ("No space left" in stderr or "interrupted" in stderr)
        assert contents(here) == before


def test_what_comes_while_the_model_is_written_is_kept(here, monkeypatch, capsys):
    assert export("out") == 0
    save = GPT2LMHeadModel.save_pretrained

    def save_and_add(self, path, **options):
        save(self, path, **options)
        Path("out", "notes.txt").write_text("mine")

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", save_and_add)
    assert export("out") == 2
    assert "notes.txt" in error_line(capsys)
    assert Path("out", "notes.txt").read_text() == "mine" and Path("out", "model.safetensors").exists()
    assert {path.name for path in here.iterdir()} == {"lightning_logs", "out"}


def test_a_folder_that_is_called_partial_is_nobodys_scratch(model_folder):
    for folder in ("out.partial", "final.partial"):
        Path(folder).mkdir()
        Path(folder, "mine").write_text("mine")
    assert export("out") == 0
    assert command("fit", model_folder, "--export.folder", "final") == 0
    for folder in ("out", "final"):
        assert Path(folder, "model.safetensors").exists() and Path(f"{folder}.partial", "mine").read_text() == "mine"


def test_the_written_folder_is_as_readable_as_any_other(here):
    before = os.umask(0o022)
    try:
        assert export("out") == 0
    finally:
        os.umask(before)
    assert Path("out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("size", ["", "much", "5", "0GB", "5 stone"])
def test_a_size_that_is_none_is_said_before_anything_is_trained(size, model_folder, capsys):
    assert export("out", "--max_shard_size", size) == 2
    assert "must be a size such as" in error_line(capsys)
    assert command("fit", model_folder, "--export.max_shard_size", size) == 2
    assert "must be a size such as" in error_line(capsys) and not Path("lightning_logs/version_1").exists()


# ---------------------------------------------------------------------- fit


@pytest.mark.parametrize(
    "folder", ["mine", "lightning_logs/version_0", "lightning_logs", ".", "link", "file", "file/out"]
)
def test_fit_looks_at_the_folder_before_it_trains(folder, model_folder, here, capsys):
    Path("mine").mkdir()
    Path("mine", "thesis.tex").write_text("mine")
    Path("link").symlink_to("mine")
    Path("file").write_text("mine")
    before = contents(here)
    assert command("fit", model_folder, "--export.folder", folder) == 2
    line = error_line(capsys)
    assert f"the model cannot be written to '{folder}'" in line and "export.folder" in line
    assert "optimizer" not in capsys.readouterr().out and not list(Path("lightning_logs/version_1").glob("*/*.ckpt"))
    assert before.items() <= contents(here).items()


def test_all_ranks_are_refused_together(model_folder, capsys):
    Path("mine").mkdir()
    Path("mine", "thesis.tex").write_text("mine")
    assert command("fit", model_folder, "--export.folder", "mine") == 2
    args = ["--export.folder", "mine", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    assert run_ranks(2, lambda rank: command("fit", model_folder, *args)) == [2, 2]
    assert Path("mine", "thesis.tex").read_text() == "mine"


def test_fit_keeps_away_from_its_own_checkpoints(model_folder, capsys):
    for folder in ("kept", "kept/model"):
        assert command("fit", model_folder, "--checkpoint.dirpath", "kept", "--export.folder", folder) == 2
        assert "the checkpoints' folder" in error_line(capsys)
    assert not Path("kept").exists() or not list(Path("kept").iterdir())


def test_a_resumed_run_replaces_its_own_export(model_folder):
    exported = Path("lightning_logs/version_0/huggingface")
    before = exported.joinpath("model.safetensors").read_bytes()
    assert command("fit", model_folder, "--ckpt_path", "last", "--trainer.max_steps", "4") == 0
    assert exported.joinpath("model.safetensors").read_bytes() != before
    assert not Path("lightning_logs/version_1").exists()
    assert {path.name for path in exported.parent.iterdir() if "huggingface" in path.name} == {"huggingface"}


def test_a_resumed_run_is_refused_at_once_where_the_user_worked_on_its_export(model_folder, capsys):
    Path("lightning_logs/version_0/huggingface/model.gguf").write_text("converted")
    before = LAST.read_bytes()
    assert command("fit", model_folder, "--ckpt_path", "last", "--trainer.max_steps", "4") == 2
    assert "it contains 'model.gguf'" in error_line(capsys)
    assert LAST.read_bytes() == before, "refused before anything is trained"
    args = ["--export.enabled", "false", "--trainer.max_steps", "3"]
    assert command("fit", model_folder, "--ckpt_path", "last", *args) == 0
    assert Path("lightning_logs/version_0/huggingface/model.gguf").read_text() == "converted"


@pytest.mark.parametrize("where", ["lightning_logs/version_0/last.ckpt", "last.ckpt"])
def test_a_checkpoint_that_lies_elsewhere_does_not_forbid_the_default_folder(where, model_folder):
    given = edited(model_folder, Path(where))
    assert command("fit", model_folder, "--ckpt_path", given, "--trainer.max_steps", "3") == 0
    assert Path("lightning_logs/version_1/huggingface/model.safetensors").exists()
    assert main(["export", "--ckpt_path", given, "--output_dir", "out"]) == 0


# ---------------------------------------------------------------------- nothing was trained


@pytest.mark.parametrize(
    "args", [["--trainer.limit_train_batches", "0"], ["--trainer.max_steps", "0"]], ids=lambda args: args[0]
)
def test_a_run_that_trains_nothing_writes_no_model(args, model_folder):
    with pytest.warns(UserWarning, match="no model is written, because nothing was trained"):
        assert command("fit", model_folder, *args) == 0
    assert not Path("lightning_logs/version_1/huggingface").exists()


def test_a_checkpoint_without_a_step_is_no_trained_model(model_folder, capsys):
    given = edited(model_folder, Path("given.ckpt"), global_step=0)
    assert main(["export", "--ckpt_path", given, "--output_dir", "out"]) == 2
    assert "nothing was trained" in error_line(capsys) and not Path("out").exists()
