"""SIGTERM and Ctrl-C end a run between two steps, with a checkpoint from which the very same run goes on."""

import os
import signal

import pytest
import torch

from conftest import REPO
from dpo_lightning.cli.entry import main, stopped
from dpo_lightning.dpo.module import DPOModule
from dpo_lightning.errors import Stopped
from ranks import run_ranks

SETTINGS = [
    "--data.val_size", "4", "--data.test_size", "0", "--data.batch_size", "4", "--data.max_length", "128",
    "--model.max_new_tokens", "4", "--model.learning_rate", "1e-3", "--model.lr_scheduler_type", "cosine",
    "--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.accumulate_grad_batches", "2",
    "--trainer.log_every_n_steps", "2", "--replies.num_prompts", "2",
]  # fmt: skip


@pytest.fixture
def fit(tmp_path, monkeypatch, model_folder, rows_file):
    """Trains 6 steps of 2 batches in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["cli.py"])

    def call(*args):
        argv = ["fit", "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model_folder)]
        return main([*argv, "--data.train_dataset", rows_file, *SETTINGS, *args])

    return call


@pytest.fixture
def signalled(monkeypatch):
    """Sends a signal, `times` times, while the `at`th batch is trained on."""
    step = DPOModule.training_step
    batches = []

    def send(number, at, times=1):
        def training_step(self, batch, batch_idx):
            batches.append(batch_idx)
            if len(batches) == at:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            return step(self, batch, batch_idx)

        monkeypatch.setattr(DPOModule, "training_step", training_step)

    yield send


def weights(run="version_0"):
    return torch.load(f"lightning_logs/{run}/checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(fit, signalled, capsys, tmp_path, number, code):
    assert fit() == 0
    signalled(number, at=5)  # the first of the third step's two batches
    before = signal.getsignal(number)
    assert fit() == code
    assert signal.getsignal(number) == before
    last = capsys.readouterr().err.strip().splitlines()
    assert last[-2] == "stopped after step 3, which is saved; to resume:"
    assert last[-1].startswith("    python cli.py fit --config ") and last[-1].endswith(" --ckpt_path last")
    assert weights("version_1")["global_step"] == 3
    run = tmp_path / "lightning_logs" / "version_1"
    assert not list(run.glob("huggingface*"))
    assert "Stopped by hand after 3 steps" in (run / "report.html").read_text()

    assert fit("--ckpt_path", "last") == 0
    ended, twin = weights("version_1"), weights("version_0")
    assert ended["global_step"] == twin["global_step"] > 3
    assert all(torch.equal(weight, ended["state_dict"][name]) for name, weight in twin["state_dict"].items())
    assert (run / "huggingface").is_dir() and not (tmp_path / "lightning_logs" / "version_2").exists()
    curves = [checkpoint["callbacks"]["ReportCallback"]["curves"] for checkpoint in (ended, twin)]
    assert curves[0]["train/loss"] == curves[1]["train/loss"]
    assert curves[0]["val/loss"] == curves[1]["val/loss"]


def test_a_signal_to_one_process_stops_all_after_the_same_step(fit, monkeypatch, capfd):
    step, batches = DPOModule.training_step, []

    def training_step(self, batch, batch_idx):
        batches.append(batch_idx)
        if len(batches) == 3 and self.global_rank == 1:  # in the second of five steps
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DPOModule, "training_step", training_step)
    args = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2")
    assert run_ranks(2, lambda rank: fit(*args)) == [143, 0]
    assert "stopped after step 3, which is saved" in capfd.readouterr().err
    assert weights()["global_step"] == 3


def test_a_second_ctrl_c_stops_at_once(fit, signalled, capsys, tmp_path):
    signalled(signal.SIGINT, at=5, times=2)
    assert fit() == 130
    assert "stopped at once; to resume:" in capsys.readouterr().err
    assert not (tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt").exists()


def test_ctrl_c_before_the_first_step_is_one_word(fit, monkeypatch, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` may have had it ignored
    monkeypatch.setattr(DPOModule, "on_fit_start", lambda self: os.kill(os.getpid(), signal.SIGINT))
    assert fit() == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "interrupted"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored


def test_slurms_requeue_signal_saves_between_steps_and_the_requeued_job_goes_on(fit, signalled, monkeypatch, tmp_path):
    assert fit() == 0
    job = {"NTASKS": "1", "JOB_ID": "7", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in (job | {"JOB_NUM_NODES": "1", "NODELIST": "here"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    requeued = []
    monkeypatch.setattr(
        "lightning.pytorch.trainer.connectors.signal_connector.call", lambda command: requeued.append(command) or 0
    )
    signalled(signal.SIGUSR1, at=5)
    assert fit() == 0  # nothing stops the job here, as SLURM would
    assert requeued == [["scontrol", "requeue", "7"]]
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert fit() == 0  # no --ckpt_path: Lightning finds it
    twin = weights("version_0")["state_dict"]
    assert all(torch.equal(weight, weights("version_2")["state_dict"][name]) for name, weight in twin.items())


def test_the_command_to_go_on_has_one_ckpt_path(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/dpo-lightning"])
    args = ["fit", "--ckpt_path", "old.ckpt", "--data.prompt_template", "a b", "--ckpt_path=older.ckpt"]
    text = stopped(args, Stopped(signal.SIGTERM, 4))
    assert text.endswith("    dpo-lightning fit --data.prompt_template 'a b' --ckpt_path last")


def test_sigterm_before_the_first_step_is_not_success(fit, capsys, monkeypatch):
    """Until the first step the signals are Lightning's, which would exit with 0."""
    monkeypatch.setattr(DPOModule, "on_validation_start", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    assert fit("--trainer.num_sanity_val_steps", "2") == 143
    assert capsys.readouterr().err.strip().splitlines()[-1] == "ended by SIGTERM"
