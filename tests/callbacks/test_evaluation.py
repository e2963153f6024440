import json
import math

import pytest

from conftest import REPO
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.evaluation import EvaluationCallback
from dpo_lightning.callbacks.replies import answer
from dpo_lightning.cli.entry import main
from dpo_lightning.judging.judge import VerdictMeans, find_judges, verdicts
from ranks import run_ranks

NAMES = {"loss", "rewards/margins", "rewards/accuracies", "kl", "sql/valid", "sql/exact", "sql/execution",
         "reply/eos_rate", "reply/length", "reply/repetition"}  # fmt: skip


@pytest.fixture
def parts(model_folder, tokenizer, rows_file):
    module = DPOModule(str(model_folder), max_new_tokens=8, learning_rate=1e-3)
    return module, PreferenceDataModule(tokenizer, rows_file, val_size=8, test_size=6, batch_size=4)


@pytest.mark.parametrize(("command", "prefix"), [("validate", "val"), ("test", "test")])
def test_metrics_json_is_what_was_logged(parts, quiet_trainer, tmp_path, command, prefix):
    trainer = quiet_trainer(callbacks=[EvaluationCallback()])
    (logged,) = getattr(trainer, command)(*parts, verbose=False)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["command"] == command and written["ckpt_path"] is None
    assert written["pairs"] == len(trainer.datamodule.datasets[prefix])
    assert {f"{prefix}/{name}" for name in NAMES} <= set(written["metrics"]) == set(logged)
    for name, value in logged.items():
        assert written["metrics"][name] is None if math.isnan(value) else written["metrics"][name] == value


def test_the_whole_split_is_judged(parts, quiet_trainer):
    module, data = parts
    trainer = quiet_trainer(callbacks=[EvaluationCallback()])
    (logged,) = trainer.test(*parts, verbose=False)
    positions = range(len(data.datasets["test"]))
    prompts = data.datasets["test"]["prompt_ids"][:]
    from dpo_lightning.data.batching import collate_prompts

    replies = answer(trainer, module, collate_prompts(prompts, positions))
    judged, judges = VerdictMeans(), find_judges("sql")
    judged.update(
        [verdicts(judges, *answered) for answered in zip(replies, data.pairs("test", positions), strict=True)]
    )
    expected = {name: mean for name, mean in judged.compute().items() if not math.isnan(mean)}
    assert {name: logged[f"test/{name}"] for name in expected} == pytest.approx(expected)


def test_validations_inside_fit_stay_cheap(parts, quiet_trainer, tmp_path):
    trainer = quiet_trainer(callbacks=[EvaluationCallback()], max_steps=2, val_check_interval=2)
    trainer.fit(*parts)
    assert "val/loss" in trainer.callback_metrics and "val/reply/length" not in trainer.callback_metrics
    assert not (tmp_path / "metrics.json").exists()


def test_data_without_a_context_have_no_sql_shares(model_folder, tokenizer, write_rows, quiet_trainer):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    data = PreferenceDataModule(tokenizer, test_dataset=write_rows(rows), batch_size=4)
    (logged,) = quiet_trainer(callbacks=[EvaluationCallback()]).test(
        DPOModule(str(model_folder), max_new_tokens=4), data, verbose=False
    )
    assert "test/reply/length" in logged and not any("sql" in name for name in logged)


def test_two_processes_judge_as_one(model_folder, tokenizer, write_rows, quiet_trainer):
    """Rows in pairs, so that contexts are on one rank alone."""
    plain = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "context": ""} for i in range(4)]
    contexts = ["CREATE TABLE t (a INT)", "no SQL"]
    sql = [{"prompt": "p", "chosen": "SELECT a FROM t", "rejected": "b", "context": context} for context in contexts]
    rows = write_rows([row for pair in zip(sql, plain[:2], strict=True) for row in pair] + plain[2:])

    def logged(**options):
        data = PreferenceDataModule(tokenizer, test_dataset=rows, batch_size=2)
        trainer = quiet_trainer(callbacks=[EvaluationCallback()], **options)
        (found,) = trainer.test(DPOModule(str(model_folder), max_new_tokens=8), data, verbose=False)
        return {name: found[name] for name in found if "/sql/" in name or "/reply/" in name}

    alone = logged()
    assert {"test/sql/valid", "test/sql/exact", "test/sql/unjudged", "test/reply/length"} <= set(alone)
    both = run_ranks(2, lambda number: logged(devices=2, strategy="ddp"))
    assert both == [pytest.approx(alone, nan_ok=True)] * 2


def test_the_command_judges_a_checkpoint_a_folder_and_the_bare_model(
    tmp_path, monkeypatch, model_folder, rows_file, capsys
):
    monkeypatch.chdir(tmp_path)

    def run(command, *args):
        settings = {
            "--config": REPO / "configs" / "gpt2.yaml", "--model.name_or_path": model_folder,
            "--data.train_dataset": rows_file, "--data.val_size": 4, "--data.test_size": 4, "--data.batch_size": 4,
            "--data.max_length": 128, "--model.max_new_tokens": 8, "--trainer.accelerator": "cpu",
            "--model.learning_rate": 0.001,
        }  # fmt: skip
        argv = [str(part) for pair in settings.items() for part in pair]
        assert main([command, *argv, *map(str, args)]) == 0
        newest = max((tmp_path / "lightning_logs").iterdir(), key=lambda path: int(path.name.split("_")[1]))
        metrics = newest / "metrics.json"
        return newest, json.loads(metrics.read_text()) if metrics.exists() else None

    folder, nothing = run("fit")
    assert nothing is None and (folder / "report.html").is_file()
    _, bare = run("test")
    _, trained = run("test", "--ckpt_path", folder / "checkpoints" / "last.ckpt")
    _, exported = run("test", "--model.name_or_path", folder / "huggingface")
    _, validated = run("validate", "--ckpt_path", folder / "checkpoints" / "last.ckpt")
    assert "test/sql/valid" in capsys.readouterr().out
    assert bare["metrics"]["test/rewards/margins"] == 0.0 and trained["metrics"]["test/rewards/margins"] > 0
    assert trained["ckpt_path"].endswith("last.ckpt") and "val/sql/valid" in validated["metrics"]
    for name in ("logps/chosen", "reply/length", "reply/repetition", "sql/valid"):
        assert exported["metrics"][f"test/{name}"] == pytest.approx(trained["metrics"][f"test/{name}"], rel=1e-4)
