"""`start`: what it chooses for which rows, what it shows and writes, and that it neither asks nor trains twice."""

import io
import json

import pytest
import yaml

from conftest import ROWS
from dpo_lightning.callbacks.learning_checks import ENOUGH_STEPS
from dpo_lightning.cli import start
from dpo_lightning.cli.entry import main
from dpo_lightning.cli.memory import Choice
from dpo_lightning.cli.peaks import Point, Probe
from dpo_lightning.cli.start import about, settings_of, training_seconds
from dpo_lightning.cli.start_rules import Facts, plan, savings
from dpo_lightning.errors import UserError

FACTS = Facts("rows.csv", "gpt2", "start-rows", "preference", 200, 200, True, 0, 0, 20.0, 124_000_000)
TIMED = [{"seconds": 2.0, "tokens": 100, "stepped": True}, {"seconds": 1.0, "tokens": 100, "stepped": False}]


# ---------------------------------------------------------------------- the rules


def test_rows_with_rejected_completions_get_dpo_and_enough_steps():
    settings = plan(FACTS).settings
    assert settings["model"]["loss_type"] == "sigmoid" and settings["model"]["learning_rate"] == 1e-5
    steps = settings["trainer"]["max_epochs"] * -(-180 // settings["data"]["batch_size"])
    assert settings["data"]["val_size"] == 20 and ENOUGH_STEPS <= steps < 1.5 * ENOUGH_STEPS
    assert plan(FACTS._replace(pairs=5000)).settings["trainer"]["max_epochs"] == 1
    assert plan(FACTS._replace(pairs=12)).settings["trainer"]["max_epochs"] == 10


def test_rows_without_get_the_likelihood_of_the_answer_as_well():
    found = plan(FACTS._replace(rejected=False, format="sql_create_context"))
    assert found.settings["model"]["loss_type"] == ["sigmoid", "sft"]
    assert found.settings["replies"]["judge"] == "sql" and "no rejected" in found.reasons[0]


@pytest.mark.parametrize(
    ("good", "bad", "options"),
    [(100, 100, None), (50, 150, {"desirable_weight": 3.0}), (150, 50, {"undesirable_weight": 3.0}), (200, 0, None)],
)
def test_thumbs_get_kto_and_weigh_the_same_together(good, bad, options):
    model = plan(FACTS._replace(rejected=False, good=good, bad=bad)).settings["model"]
    assert model["loss_type"] == "kto" and model.get("loss_options") == options
    assert "loss_type" not in savings(FACTS._replace(good=good, bad=bad))[-1].changes["model"]


def test_the_learning_rate_follows_the_size_of_the_model():
    rates = [plan(FACTS._replace(parameters=n)).settings["model"]["learning_rate"] for n in (2e6, 2e7, 2e8, 2e9)]
    assert rates == [2e-4, 5e-5, 1e-5, 5e-6]


def test_few_contexts_cannot_be_split():
    assert plan(FACTS._replace(contexts=3)).settings["data"]["val_size"] == 0


def test_settings_of_the_command_line():
    assert settings_of(["--trainer.max_epochs", "3", "--model.loss_type=[sigmoid, sft]"]) == {
        "trainer": {"max_epochs": 3},
        "model": {"loss_type": ["sigmoid", "sft"]},
    }
    for flags, words in (
        (["--config", "x"], "use fit --config"),
        (["--yess"], "does not know '--yess'"),
        (["y"], "'y'"),
    ):
        with pytest.raises(UserError, match=words):
            settings_of(flags)


def test_time_is_that_of_tokens_and_of_steps():
    probe = Probe({}, [], TIMED, 1)
    assert training_seconds(probe, tokens=1000, steps=5) == 10 + 5
    assert training_seconds(probe._replace(timed=TIMED[:1]), tokens=1000, steps=5) == 20
    assert [about(seconds) for seconds in (0.3, 9.7, 83, 4000)] == ["1 s", "10 s", "1 min 20 s", "1 h 7 min"]


# ---------------------------------------------------------------------- the command


@pytest.fixture
def begin(tmp_path, monkeypatch, model_folder, write_rows, capsys):
    """Runs `start` on a tiny model where every run fits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    rows = write_rows([*ROWS, "{"])
    point = Point(1, 4, 100, 2**30)
    choice = Choice({"data": {"batch_size": 4}}, Probe({}, [point], TIMED, 2**30), point, ["memory: enough"])
    monkeypatch.setattr(start, "chosen", lambda *args: choice)

    def call(*args, code=0):
        assert main(["start", rows, "--model", str(model_folder), *args]) == code
        return capsys.readouterr()

    return call


QUICK = ("--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--forgetting.enabled", "false")
QUICK += ("--replies.num_prompts", "2", "--model.max_new_tokens", "2")


def test_without_a_terminal_it_shows_the_plan_and_trains_nothing(begin, tmp_path):
    seen = begin(code=2)
    lines = seen.out.splitlines()
    assert lines[0] == "rows are read as sql_create_context"
    assert "rows.jsonl: 49 rows read, 48 pairs" in lines[1] and "  skipped: 1 not JSON" in lines
    assert "memory: enough" in lines and lines[-1].startswith("time: about ")
    assert seen.out.count("  chosen    ⟦ SELECT ") == 3
    assert seen.err.startswith("error: nothing was trained") and "--yes" in seen.err
    assert not (tmp_path / "start-rows").exists()


def test_it_trains_once_and_then_goes_on_with_what_is_there(begin, tmp_path, model_folder, capsys):
    first = begin("--yes", *QUICK)
    folder = tmp_path / "start-rows"
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    assert settings["trainer"]["max_steps"] == 2 and settings["data"]["batch_size"] == 4
    model = folder / "lightning_logs" / "version_0" / "huggingface"
    assert model.is_dir() and f"chat --model {model.relative_to(tmp_path)}" in first.out
    again = begin(*QUICK)  # no question, no second run
    assert "was begun before" in again.out and "time: about" not in again.out
    assert len(list(folder.glob("lightning_logs/*"))) == 1
    assert "with another settings" in begin("--trainer.max_steps", "3", code=2).err
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text() + json.dumps(ROWS[0] | {"question": "Who?"}) + "\n")
    assert "the rows have changed" in begin(*QUICK, code=2).err
    assert main(["fit", "--config", str(folder / "settings.yaml")]) == 0  # an ordinary configuration
    assert (folder / "lightning_logs" / "version_1" / "huggingface").is_dir()


def test_other_content_is_left_alone(begin, tmp_path):
    (tmp_path / "start-rows").mkdir()
    (tmp_path / "start-rows" / "mine.txt").write_text("mine")
    assert "has other content" in begin("--yes", code=2).err


def test_a_hub_that_cannot_be_reached_is_said_with_what_to_do(begin, rows_file, monkeypatch, capsys):
    monkeypatch.setattr(start, "switch_offline_if_unreachable", lambda: False)
    assert main(["start", rows_file]) == 2
    error = capsys.readouterr().err
    assert "gpt2 would be trained" in error and "hub cannot be reached" in error and "--model FOLDER" in error


def test_a_question_is_asked_at_a_terminal(begin, monkeypatch, tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    asked = []
    monkeypatch.setattr("builtins.input", lambda words: asked.append(words) or "")
    assert "nothing was trained" in begin().out
    assert asked == ["\nTrain with these settings? [y/N] "] and not (tmp_path / "start-rows").exists()
