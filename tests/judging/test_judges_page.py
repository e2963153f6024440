"""The examples of docs/judges.md, as they stand there, run through the command line."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from conftest import REPO, ROWS
from dpo_lightning.cli.entry import main
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.judging.judge import find_judges
from dpo_lightning.judging.kinds import JUDGES
from dpo_lightning.models.reply import Reply

PAGE = (REPO / "docs" / "judges.md").read_text()
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
(PYTHON,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
OVERLAYS = dict(zip(re.findall(r"`(\w+\.yaml)`:", PAGE), YAML[1:], strict=True))
COMMANDS = re.findall(r"^    (python cli.py .*)$", PAGE, re.MULTILINE)
SMALL = {"replies.num_prompts": 3, "replies.num_shown": 1, "replies.every_n_steps": 0, "trainer.max_steps": 1}
CHECKED = {"trainer.accelerator": "cpu", "data.max_length": 128, "data.batch_size": 4, "model.max_new_tokens": 8}


@pytest.fixture
def run(tmp_path, monkeypatch, model_folder, rows_file):
    """Runs a command with the settings of the demo and of a page's overlay, on a small model and few rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "my_scores", raising=False)
    (tmp_path / "my_scores.py").write_text(PYTHON)
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))

    def call(command, overlay, **more):
        (tmp_path / "overlay.yaml").write_text(overlay)
        settings = SMALL | CHECKED | {"model.name_or_path": model_folder, "data.train_dataset": rows_file} | more
        settings |= {f"data.{split}_dataset": "few.jsonl" for split in ("val", "test")}
        args = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        configs = ["--config", str(REPO / "configs" / "demo.yaml"), "--config", "overlay.yaml"]
        return main([command, *configs, *args])

    return call


def replies(folder):
    (path,) = folder.glob("lightning_logs/*/replies.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_schema_of_the_page_judges_what_its_template_makes(run, tmp_path):
    pytest.importorskip("jsonschema")
    example = OVERLAYS["json.yaml"]
    assert run("fit", example) == 0
    lines = replies(tmp_path)
    assert len(lines) == 6 and all(line["json_schema/valid"] is False for line in lines)
    judges = find_judges(yaml.safe_load(example)["replies"]["judge"])
    wanted = {line["wanted"] for line in lines}
    assert all(json.loads(text)["sql"].startswith("SELECT") for text in wanted)
    assert all(judges["json_schema"](Reply(text, [1], True), PreferencePair("", text, ""))["valid"] for text in wanted)


def test_the_function_of_the_page_judges_in_fit_test_and_predict(run, tmp_path, capsys, caplog):
    example = OVERLAYS["overlap.yaml"]
    assert run("fit", example) == 0
    assert all(0 <= line["overlap/score"] < 1 and "sql/valid" in line for line in replies(tmp_path))
    assert run("test", example) == 0
    metrics = [json.loads(path.read_text())["metrics"] for path in tmp_path.glob("lightning_logs/*/metrics.json")]
    assert 0 <= metrics[0]["test/overlap/score"] < 1 and metrics[0]["test/overlap/unjudged"] == 0
    predicted = {"predictions.output": "out.jsonl", "predictions.judge": "my_scores:overlap"}
    assert run("predict", example, **predicted) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all("overlap/score" in line and "sql/valid" not in line for line in lines)
    mean = sum(line["overlap/score"] for line in lines) / 4
    assert f"overlap/score {mean:.3g}" in caplog.text
    assert run("predict", example, **predicted | {"predictions.judge": "sql"}) == 2
    assert "judged otherwise" in capsys.readouterr().err


def test_every_form_of_the_page_is_a_setting_and_every_judge_is_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_module.py").write_text("def my_function(reply, pair):\n    return 1\n")
    monkeypatch.setattr(sys, "path", sys.path[:])
    for line in YAML[0].splitlines()[1:]:
        assert find_judges(yaml.safe_load(line)["judge"])
    assert set(re.findall(r"^\| `(\w+)`", PAGE, re.M)) - {"fit", "validate", "predict"} == set(JUDGES)


def test_a_wrong_judge_is_one_line_with_its_place(run, capsys):
    assert run("fit", "replies:\n  judge:\n    regex: '('\n") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: overlay.yaml, line 2: replies.judge: regex: pattern '(' is no regular expression")


def test_a_judge_on_the_command_line(run, tmp_path):
    assert run("fit", "replies: {}\n", **{"replies.judge": '{"regex": {"pattern": "a", "name": "has_a"}}'}) == 0
    lines = replies(tmp_path)
    assert all(line["has_a/match"] == ("a" in line["reply"].strip()) for line in lines) and "sql/valid" not in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs_to_its_end_in_a_fresh_clone(command, tmp_path):
    if "json" in command:
        pytest.importorskip("jsonschema")
    for name in ("cli.py", "configs", "src"):
        (tmp_path / name).symlink_to(REPO / name)
    for name, text in {"my_scores.py": PYTHON, **OVERLAYS}.items():
        (tmp_path / name).write_text(text)
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(REPO / "src")}
    arguments = [sys.executable, *command.split()[1:]]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    if " rounds " in command:
        (account,) = tmp_path.glob("runs/*/round-1/pairs.json")
        assert json.loads(account.read_text())["pairs"] > 0
        assert len(json.loads((account.parents[1] / "rounds.json").read_text())) == 2
    else:
        assert replies(tmp_path)
