"""What Lightning users try on the command line and in YAML: it works, or one line says where and what may be there."""

import os
import subprocess
import sys

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from conftest import REPO
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.guards import GuardsCallback
from dpo_lightning.cli.entry import main

GPT2 = str(REPO / "configs" / "gpt2.yaml")


@pytest.fixture
def run(tmp_path, monkeypatch, model_folder, rows_file):
    """Runs `fit` in an empty folder on tiny things and gives its exit code."""
    monkeypatch.chdir(tmp_path)

    def no_processes(*_):
        raise AssertionError("further processes would be started")

    # Else thousands of them would be, were `trainer.devices` not checked.
    monkeypatch.setattr(_SubprocessScriptLauncher, "_call_children_scripts", no_processes)

    def call(*args, batch_size=True):
        argv = ["fit", "--config", GPT2, "--model.name_or_path", str(model_folder), "--data.train_dataset", rows_file]
        argv += ["--data.val_size", "4", "--data.test_size", "4", "--data.max_length", "128", "--export.enabled"]
        argv += ["false", "--trainer.accelerator", "cpu", "--replies.every_n_steps", "0", "--model.max_new_tokens"]
        argv += ["4", *(["--data.batch_size", "4"] if batch_size else [])]
        return main([*argv, *args])

    return call


def error_line(capsys):
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--model.max_new_tokens 0", "model.max_new_tokens is 0: it must be at least 1"),
        ("--model.max_new_tokens -3", "model.max_new_tokens is -3"),
        ("--seed_everything 99999999999", "seed_everything is 99999999999: it must be from 0 to 4294967295"),
        ("--seed_everything -1", "seed_everything is -1"),
        ("--trainer.check_val_every_n_epoch 0", "trainer.check_val_every_n_epoch is 0: it must be at least 1"),
        ("--trainer.log_every_n_steps 0", "trainer.log_every_n_steps is 0: it must be at least 1"),
        ("--trainer.accumulate_grad_batches 0", "trainer.accumulate_grad_batches is 0"),
        ("--trainer.gradient_clip_val -1", "trainer.gradient_clip_val is -1"),
        ("--trainer.precision transformer-engine", "trainer: Requirement 'transformer_engine"),
        ("--trainer.precision bf16mixed", "did you mean 'bf16-mixed'?"),
        ("--trainer.default_root_dir /proc/nowhere", "'/proc/nowhere/lightning_logs/version_0' cannot be written"),
        ("--trainer.devices 0", "trainer.devices is 0: on the CPU it is a number of processes"),
        ("--trainer.devices 9999", "trainer.devices is 9999: on the CPU it is a number of processes"),
        ("--trainer.devices -1", "trainer.devices is -1"),
        ("--trainer 5", "trainer"),
        ("--model.lora.r abc", "model.lora.r is 'abc': it must be a whole number"),
        ("--model.lora.r 1.5", "model.lora.r is '1.5': it must be a whole number"),
        ("--model.lora {r:\N{SPACE}8,\N{SPACE}lora_alfa:\N{SPACE}4}", "did you mean model.lora.lora_alpha?"),
        ("--model.lora.bias foo", "model.lora.bias is 'foo': it must be one of none, all, lora_only"),
        ("--model.lora.target_modules 3.5", "error: model.lora"),
        ("--model.lora.rank_pattern 5", "model.lora.rank_pattern is '5'"),
        ("--model.lora.use_rslora maybe", "model.lora.use_rslora is 'maybe': it must be true or false"),
        ("--trainer.max_epoch 2", "no setting --trainer.max_epoch: did you mean --trainer.max_epochs?"),
        ("--model.learning_rat=2", "did you mean --model.learning_rate?"),
        ("--learning_rate 2", "did you mean --model.learning_rate?"),
        ("--trainr.max_epochs 2", "did you mean --trainer.max_epochs?"),
        ("--ckpt_pth last", "did you mean --ckpt_path?"),
        ("--model.loss_type sigmoyd", "did you mean 'sigmoid'?"),
        ("--model.lr_scheduler_type linaer", "did you mean 'linear'?"),
        ("--model.dtype flot32", "did you mean 'float32'?"),
        ("--model.reference cahced", "did you mean 'cached'?"),
        ("--model.quantization 4bits", "did you mean '4bit'?"),
        ("--data.rejected shufled", "did you mean 'shuffled'?"),
        ("--data.on_bad_row skp", "did you mean 'skip'?"),
        ("--data.format mesages", "did you mean 'messages'?"),
        ("positional", "'positional' is neither a setting nor its value"),
        ("--config nowhere.yaml", "--config nowhere.yaml: no such file"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_one_line(run, capsys, args, words):
    assert run(*args.split(" ", 1)) == 2
    line = error_line(capsys)
    assert words in line, line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model:\n  beta: 0.1\n  loss_typ: sigmoid\n", "line 3: there is no setting model.loss_typ: did you mean"),
        (b"modl:\n  beta: 0.1\n", "line 2: there is no setting modl.beta: did you mean model.beta?"),
        (b"model:\n  beta: much\n", "line 2: model.beta is 'much': it must be a number"),
        (b"data:\n  batch_size: 16.5\n", "line 2: data.batch_size is '16.5': it must be a whole number"),
        (b"model:\n  loss_type: sigmoyd\n", "line 2: model.loss_type 'sigmoyd' is unknown"),
        (b"data:\n  format: mesages\n", "line 2: unknown data format 'mesages'"),
        (b"model:\n  beta: 0.1\n loss: [\n", "line 3: this is not valid YAML"),
        (b"model:\n\tbeta: 1\n", "line 2: this is not valid YAML"),
        (b"model:\n  beta: 0.1\n  beta: 0.2\n", "line 3: 'beta' is given twice (first in line 2)"),
        (b"model:\n  beta: 0.1 # \xe9\xff\n", "line 2: this is not UTF-8 text"),
        (b"- a\n- b\n", "line 1: this is a list, but"),
        (b"just text\n", "line 1: this is a text, but"),
        (b"", "is empty"),
        (b"trainer: 5\n", "line 1: trainer is '5': it must be a section"),
        (b"model:\n  beta: null\n", "line 2: model.beta is null: it must be "),
        (b"last:\n  every_n_steps: null\n", "line 2: last.every_n_steps is null: it must be "),
    ],
)
def test_a_mistake_in_a_file_names_file_and_line(run, capsys, tmp_path, content, words):
    (tmp_path / "mine.yaml").write_bytes(content)
    assert run("--config", "mine.yaml", batch_size=False) == 2
    line = error_line(capsys)
    assert "mine.yaml" in line and words in line, line


def test_a_folder_that_cannot_be_made_is_one_line_without_a_logger_too(run, capsys):
    assert run("--trainer.default_root_dir", "/proc/nowhere", "--trainer.logger", "false") == 2
    assert "/proc/nowhere cannot be used: No such file or directory" in error_line(capsys)


def test_the_command_line_is_not_blamed_on_a_file(run, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("model:\n  beta: 0.1\n")
    assert run("--config", "mine.yaml", "--model.beta", "0") == 2
    assert error_line(capsys).startswith("error: model.beta is 0")
    assert run("--data.rejected", "generated", "--data.generation.top_p", "0") == 2
    assert error_line(capsys).startswith("error: data.generation: top_p is 0"), "in the file it is null"


def test_a_folder_as_configuration_names_what_is_in_it(run, capsys, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.yaml").touch()
    assert run("--config", "here") == 2
    assert "here is a folder: name a .yaml file in it (mine.yaml)" in error_line(capsys)


@pytest.mark.parametrize(
    "args",
    [
        "--trainer.overfit_batches 2",
        "--trainer.overfit_batches 0.5",
        "--trainer.enable_checkpointing false --trainer.max_steps 2",
        "--trainer.val_check_interval 100000",
        "--trainer.fast_dev_run true",
        "--trainer.max_time 00:00:00:10",
        "--trainer.detect_anomaly true --trainer.max_steps 2",
        "--trainer.num_sanity_val_steps 5 --trainer.max_steps 2",
        "--trainer.check_val_every_n_epoch 2 --trainer.max_epochs 2",
        "--trainer.profiler simple --trainer.max_steps 2",
        "--trainer.precision 64-true --trainer.max_steps 2",
        "--model.lora.lora_alpha 0.5 --model.lora.r 4 --trainer.max_steps 2",
    ],
)
def test_what_lightning_users_try_runs(run, args):
    assert run(*args.split()) == 0


def test_a_validation_interval_longer_than_the_epoch_validates_at_its_end(run, caplog, tmp_path):
    assert run("--trainer.val_check_interval", "100000") == 0
    assert "trainer.val_check_interval is 100000, but an epoch has 10 batches: validating at the end" in caplog.text
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/step10.ckpt")), "what was validated was kept"


@pytest.mark.parametrize("share", [2, 0.2])
def test_overfitting_trains_on_the_same_batches_every_epoch(quiet_trainer, model_folder, tokenizer, rows_file, share):
    seen, losses, validated = [], [], []

    class Notes(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(tuple(batch.pair_ids.tolist()))
            losses.append(outputs["loss"].item())

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_):
            validated.append(batch.num_pairs)

    module = DPOModule(str(model_folder), learning_rate=1e-3, warmup_steps=0, lr_scheduler_type="constant")
    data = PreferenceDataModule(tokenizer, rows_file, val_size=4, test_size=4, batch_size=4)
    trainer = quiet_trainer(overfit_batches=share, max_epochs=4, callbacks=[GuardsCallback(), Notes()])
    trainer.fit(module, data)
    assert len(seen) == 8 and len(set(seen)) == 2 and seen[:2] * 4 == seen, "two batches, in the same order"
    assert losses[-1] < losses[0] / 2
    assert validated and set(validated) == {4}


def test_last_without_an_earlier_run_says_so_on_the_screen(model_folder, rows_file, tmp_path):
    args = ["--config", GPT2, "--model.name_or_path", str(model_folder), "--data.train_dataset", rows_file]
    args += ["--data.max_length", "128", "--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true"]
    done = subprocess.run(
        [sys.executable, str(REPO / "cli.py"), "fit", *args, "--ckpt_path", "last"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--ckpt_path last: there is no checkpoint yet" in done.stdout + done.stderr


def test_misspelt_files_get_a_suggestion(run, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("model:\n  beta: 0.1\n")
    assert run("--config", "mein.yaml") == 2
    assert "did you mean 'mine.yaml'?" in error_line(capsys)


def test_output_that_nobody_reads_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(REPO / "cli.py"), "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
