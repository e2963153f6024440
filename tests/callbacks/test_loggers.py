"""Other loggers are Lightning's, chosen in YAML alone; runs keep what they have with TensorBoard."""

import csv
import importlib.util
import json
import re
from pathlib import Path

import pytest

from conftest import REPO
from dpo_lightning.cli import trainer as commands
from dpo_lightning.cli.entry import main

LOGGERS = {path.stem: path for path in sorted((REPO / "configs" / "loggers").glob("*.yaml"))}
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
OFFLINE = {
    "csv": [],
    "wandb": ["--trainer.logger.offline", "true"],
    "mlflow": [],
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


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_one_line(name, model_folder, rows_file, monkeypatch, tmp_path, capsys):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    monkeypatch.chdir(tmp_path)
    assert main(arguments(name, model_folder, rows_file)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and name in error


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_folders():
    return {path.parent.parent for path in Path().rglob("last.ckpt")}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOGGERS)
def test_each_run_keeps_its_own_files_and_can_be_resumed(name, model_folder, rows_file, monkeypatch, tmp_path):
    if name in PACKAGES:
        pytest.importorskip(name, reason=f"{name} is of the extra loggers, which is not installed")
    monkeypatch.chdir(tmp_path)
    args = [*arguments(name, model_folder, rows_file), *OFFLINE[name]]
    assert main(args) == 0
    FINISH.get(name, lambda: None)()
    (first,) = run_folders()
    files = {"report.html", "replies.jsonl", "config.yaml", "huggingface", "checkpoints"}
    assert files <= {path.name for path in first.iterdir()}
    before = contents(first)
    assert main([*args, "--trainer.max_steps", "4", "--ckpt_path", "last"]) == 0
    (second,) = run_folders() - {first}
    assert files <= {path.name for path in second.iterdir()}
    assert {line["step"] for line in map(json.loads, (second / "replies.jsonl").open())} == {4}
    assert contents(first) == before
    CHECKS[name](first)
    FINISH.get(name, lambda: None)()


def check_csv(folder):
    columns = next(csv.reader((folder / "metrics.csv").open()))
    assert {"step", "train/loss", "val/loss", "val/rewards/margins", "replies/eos_rate"} <= set(columns)


def check_mlflow(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient("sqlite:///mlflow.db")
    run = client.get_run(folder.name)
    assert run.data.params["beta"] == "0.1"
    assert {"train/loss", "val/loss", "replies/eos_rate"} <= set(run.data.metrics)
    steps = {Path(file.path).name for file in client.list_artifacts(folder.name, "replies")}
    assert steps == {"step0.md", "step2.md"}


def check_wandb(folder):
    (offline,) = Path("wandb_logs", "wandb").glob(f"offline-run-*-{folder.name}")
    tables = [json.loads(path.read_text()) for path in offline.rglob("replies/*.table.json")]
    assert len(tables) == 2 and all(table["columns"][:2] == ["prompt", "policy"] for table in tables)
    (recorded,) = offline.glob("*.wandb")
    assert all(word in recorded.read_bytes() for word in (b"train/loss", b"replies/eos_rate", b"label_smoothing"))


def finish_wandb():
    """What the end of a command does: in the same process, the next run would go on with this one."""
    import wandb

    wandb.finish()


FINISH = {"wandb": finish_wandb}
CHECKS = {"csv": check_csv, "mlflow": check_mlflow, "wandb": check_wandb}


@pytest.mark.parametrize("loggers", ["two", "none"])
def test_two_loggers_or_none(loggers, model_folder, rows_file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = arguments("csv", model_folder, rows_file)
    if loggers == "two":
        tensorboard, csv_files = (
            {"class_path": f"lightning.pytorch.loggers.{kind}Logger", "init_args": {"save_dir": folder, "name": "runs"}}
            for kind, folder in (("TensorBoard", "."), ("CSV", "csv"))
        )
        Path("two.yaml").write_text(json.dumps({"trainer": {"logger": [tensorboard, csv_files]}}))
        args = [arg if not arg.endswith("csv.yaml") else "two.yaml" for arg in args]
    else:
        args += ["--trainer.logger", "false"]
    assert main(args) == 0
    (folder,) = run_folders()
    assert folder == (Path("runs", "version_0") if loggers == "two" else Path())
    assert {"report.html", "replies.jsonl", "config.yaml", "huggingface"} <= {path.name for path in folder.iterdir()}
    if loggers == "two":
        assert list(folder.glob("events.*")) and "replies/" in Path("csv/runs/version_0/metrics.csv").read_text()


@pytest.mark.slow
def test_a_sweep_with_optuna(model_folder, rows_file, monkeypatch, tmp_path):
    """The script of docs/lightning.md, on a tiny model, twice: the second time it goes on."""
    optuna = pytest.importorskip("optuna", reason="optuna is of the extra loggers, which is not installed")
    monkeypatch.chdir(tmp_path)
    script = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "lightning.md").read_text(), re.DOTALL)[-1]
    for written, small in (
        ('"gpt2", "rows.jsonl"', f'"{model_folder}", "{rows_file}"'),
        ('DPOModule("gpt2"', f'DPOModule("{model_folder}", max_new_tokens=4'),
        ("max_steps=200", 'max_steps=2, accelerator="cpu", enable_progress_bar=False'),
        ("num_prompts=96", "num_prompts=2"),
        ("n_trials=20", "n_trials=2"),
    ):
        assert written in script
        script = script.replace(written, small)
    for _ in range(2):
        exec(compile(script, "docs/lightning.md", "exec"), {})
    study = optuna.load_study(study_name="gpt2", storage="sqlite:///sweep.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    assert {"beta", "learning_rate"} == set(study.best_params)
    assert {path.name for path in Path("sweep").iterdir()} == {"0", "1", "2", "3"}
