"""Other loggers are Lightning's, chosen in YAML alone."""

import csv
import importlib.util

import pytest

from conftest import REPO
from dpo_lightning.cli import trainer as commands
from dpo_lightning.cli.entry import main

LOGGERS = {path.stem: path for path in sorted((REPO / "configs" / "loggers").glob("*.yaml"))}
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
OFFLINE = {
    "csv": [],
    "wandb": ["--trainer.logger.offline", "true"],
    "mlflow": ["--trainer.logger.tracking_uri", "file:mlruns"],
}


def arguments(name, model_folder, rows_file):
    args = ["fit", "--config", str(REPO / "configs" / "gpt2.yaml"), "--config", str(LOGGERS[name])]
    args += ["--model.name_or_path", str(model_folder), "--data.train_dataset", rows_file]
    args += ["--data.val_size", "4", "--data.test_size", "0", "--data.batch_size", "4", "--data.max_length", "128"]
    args += ["--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1"]
    return [*args, "--replies.num_prompts", "2", "--model.max_new_tokens", "4"]


def test_there_is_an_overlay_for_each():
    assert set(LOGGERS) == {"csv", "mlflow", "wandb"}


@pytest.mark.parametrize("name", LOGGERS)
def test_an_overlay_parses(name, model_folder, rows_file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parsed = []

    class ParseOnly(commands.DPOCLI):
        def instantiate_classes(self):
            parsed.append(self.settings.trainer.logger)

        def _run_subcommand(self, subcommand):
            pass

    commands.configured(ParseOnly, arguments(name, model_folder, rows_file), run=True)
    assert parsed[0].class_path.lower().endswith(f"{name}logger")


@pytest.mark.parametrize("name", LOGGERS)
def test_an_overlay_runs_or_says_what_is_missing(name, model_folder, rows_file, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    args = [*arguments(name, model_folder, rows_file), *OFFLINE[name]]
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        assert main(args) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and package in error
        pytest.skip(f"{package} is not installed: that it is missing was said in one line")
    assert main(args) == 0
    if name == "csv":
        (path,) = (tmp_path / "lightning_logs").glob("version_0/metrics.csv")
        columns = next(csv.reader(path.open()))
        assert {"step", "train/loss", "val/loss", "val/rewards/margins"} <= set(columns)
        assert (path.parent / "huggingface" / "model.safetensors").is_file()
