"""Runs that start, or go on, at the same moment do not meet: each has its folder, or one is refused in one line.

DPO_TRIES sets how often the slow test lets two of everything meet.
"""

import csv
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from conftest import REPO, ROWS
from dpo_lightning.dpo.module import DPOModule
from dpo_lightning.dpo.reference import FrozenCopy
from side_by_side import at_once, command

TRIES = int(os.environ.get("DPO_TRIES", 3))
LIMIT = "--trainer.max_steps"


@pytest.fixture
def arguments(tmp_path, model_folder, write_rows, monkeypatch):
    """The command line of a run of a few steps in an empty folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    rows = write_rows(ROWS)

    def make(*args, name="fit"):
        argv = [name, "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model_folder)]
        argv += ["--data.train_dataset", rows, "--data.val_size", "4", "--data.test_size", "4"]
        argv += ["--data.batch_size", "4", "--data.max_length", "128", "--model.max_new_tokens", "4"]
        argv += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_epochs", "-1"]
        argv += [LIMIT, "2", "--trainer.log_every_n_steps", "1", "--replies.num_prompts", "1"]
        argv += ["--replies.every_n_steps", "1", "--export.enabled", "false", "--trainer.limit_val_batches", "1"]
        return [*argv, *args]

    return make


def fit(argv):
    return lambda: command(argv)


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def check_run(run, like):
    """One whole run's files, and no other's."""
    assert all(torch.equal(weight, like[name]) for name, weight in weights(run).items())
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    steps = [line.split('"step": ')[1][0] for line in (run / "replies.jsonl").read_text().splitlines()]
    assert steps == ["0", "1", "2"]
    assert (run / "config.yaml").is_file() and (run / "hparams.yaml").is_file()


def test_two_fits_that_start_together_have_a_folder_each(arguments, tmp_path):
    assert [code for code, _ in at_once(*[fit(arguments())] * 3)] == [0, 0, 0]
    runs = sorted((tmp_path / "lightning_logs").iterdir())
    assert [run.name for run in runs] == ["version_0", "version_1", "version_2"]
    for run in runs:
        check_run(run, weights(runs[0]))


def test_so_do_fits_with_another_logger(arguments, tmp_path):
    argv = arguments("--config", str(REPO / "configs" / "loggers" / "csv.yaml"))
    results = at_once(fit(argv), fit(argv))
    assert [code for code, _ in results] == [0, 0]
    for number in (0, 1):
        with (tmp_path / "lightning_logs" / f"version_{number}" / "metrics.csv").open() as file:
            assert [row["step"] for row in csv.DictReader(file) if row["train/loss"]] == ["0", "1"]


@pytest.mark.parametrize("name", ["test", "predict", "validate"])
def test_other_commands_at_once_have_a_folder_each_too(arguments, tmp_path, name):
    both = [fit(arguments("--predictions.output", f"{i}.jsonl", name=name)) for i in (0, 1)]
    assert [code for code, _ in at_once(*both)] == [0, 0]
    assert {len(list(run.glob("events*"))) for run in (tmp_path / "lightning_logs").iterdir()} <= {1}


def test_a_run_that_dies_of_its_rows_or_only_tries_leaves_no_folder(arguments, tmp_path, write_rows):
    bad = write_rows([{"question": "?"}], "bad.jsonl")
    assert command(arguments("--data.train_dataset", bad))[0] == 2
    assert command(arguments("--trainer.fast_dev_run", "true"))[0] == 0
    assert not (tmp_path / "lightning_logs").exists()


def slow_steps(monkeypatch, seconds=0.3, die_at=None):
    step = DPOModule.training_step

    def slow(self, batch, batch_idx):
        time.sleep(seconds)
        if self.global_step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DPOModule, "training_step", slow)


def test_of_two_that_resume_one_run_the_second_is_refused_in_one_line(arguments, tmp_path, monkeypatch):
    assert command(arguments())[0] == 0
    run = tmp_path / "lightning_logs" / "version_0"
    slow_steps(monkeypatch)
    resume = fit(arguments("--ckpt_path", "last", LIMIT, "8"))
    results = sorted(at_once(resume, resume))
    assert [code for code, _ in results] == [0, 2]
    assert results[1][1].startswith("error: ") and "version_0 is in use by another run" in results[1][1]
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]
    assert len(list(run.glob("events.out.tfevents.*"))) == 2, "the first run's and the one that went on"
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
    assert command(arguments("--ckpt_path", "last", LIMIT, "9"))[0] == 0, "afterwards it is free"


def test_a_killed_run_whose_loader_workers_live_on_is_resumed_at_once(arguments, tmp_path, monkeypatch):
    argv = arguments("--last.every_n_steps", "1", "--data.num_workers", "2", LIMIT, "4")
    with monkeypatch.context() as patch:
        slow_steps(patch, 0, die_at=2)
        assert at_once(fit(argv)) == [-signal.SIGKILL]
    assert command([*argv, "--ckpt_path", "last"])[0] == 0
    (run,) = (tmp_path / "lightning_logs").iterdir()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.slow
def test_two_of_everything_at_once(arguments, tmp_path, monkeypatch):
    """Two runs with a cached reference and generated rejected completions, two predicts into files of their own."""
    made = ("--model.reference", "cached", "--data.rejected", "generated", "--data.generation")
    generated = arguments(*made, '{"max_new_tokens": 4}')
    predict = arguments("--data.predict_dataset", "rows.jsonl", name="predict")
    one_file = [*predict, "--predictions.output", "same.jsonl"]
    assert command(generated)[0] == command([*predict, "--predictions.output", "alone.jsonl"])[0] == 0
    alone, answers = weights(tmp_path / "lightning_logs" / "version_0"), Path("alone.jsonl").read_bytes()
    for name, owner in (("logps", FrozenCopy), ("predict_step", DPOModule)):  # so that they do meet
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, call=call: time.sleep(0.02) or call(*args))
    for number in range(TRIES):
        home = tmp_path / f"try{number}"
        home.mkdir()
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home / "cache")
        run = fit([*generated, "--trainer.default_root_dir", str(home)])
        assert [code for code, _ in at_once(run, run)] == [0, 0], number
        runs = sorted((home / "lightning_logs").iterdir())
        assert [path.name for path in runs] == ["version_0", "version_1"]
        for path in runs:
            check_run(path, alone)
        both = [fit([*predict, "--predictions.output", str(home / f"{i}.jsonl")]) for i in (0, 1)]
        assert [code for code, _ in at_once(*both)] == [0, 0], number
        assert [(home / f"{i}.jsonl").read_bytes() for i in (0, 1)] == [answers] * 2
        results = sorted(at_once(fit(one_file), fit(one_file)))
        assert [code for code, _ in results] in ([0, 2], [0, 0]), results  # the second may come after the first's end
        assert "is being written by another predict" in results[1][1] or results[1][0] == 0
        assert Path("same.jsonl").read_bytes() == answers
        Path("same.jsonl").unlink()
        print(f"try {number + 1}: two runs, two predicts, two predicts into one file")
