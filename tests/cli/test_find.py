"""`find`: what it tries, how it ranks, and whole searches on the tiny model."""

import json
import signal

import pytest
import yaml

from attacked import error_line
from conftest import REPO
from dpo_lightning.cli import find as command
from dpo_lightning.cli.arms import Arm, Find, Result, arms, overlay, ranked, score, score_names
from dpo_lightning.cli.entry import main
from dpo_lightning.errors import Stopped, UserError

VALID, EXACT, DISPLACED = "sql/valid", "sql/exact", "val/rewards/displaced"


def result(rate, valid=0.5, displaced=0.0, loss=1.0, steps=50, failed=None, **others):
    metrics = {VALID: valid, DISPLACED: displaced, "val/loss": loss, **others}
    return Result(Arm(rate, 0.1), steps, "version_0", 1.0, {} if failed else metrics, failed)


def rates(results, names=(VALID,)):
    return [found.arm.learning_rate for found in ranked(results, list(names))]


# ---------------------------------------------------------------------- arms and ranking


def test_arms_are_all_combinations_and_the_configuration_is_first():
    tried = arms(Find(learning_rates=[1e-4, 2e-4], betas=[0.1, 0.5]), 2e-4, 0.1, "sigmoid")
    assert tried == [Arm(2e-4, 0.1), Arm(1e-4, 0.1), Arm(1e-4, 0.5), Arm(2e-4, 0.5)]
    assert Arm(1e-5, 0.2) in arms(Find(learning_rates=[1.0], betas=[1.0]), 1e-5, 0.2, "sigmoid")
    assert {arm.beta for arm in arms(Find(), 1e-5, 0.1, "sft", uses_beta=False)} == {0.1}
    assert sorted({arm.learning_rate for arm in arms(Find(), 1e-5, 0.1, "sft")}) == [3.3e-6, 1e-5, 3e-5]


def test_a_loss_of_the_list_replaces_weights_and_options_unless_it_is_the_configured_one():
    find = Find(learning_rates=[1e-4], betas=[0.1], losses=["sigmoid", ["sigmoid", "sft"]])
    own, other = arms(find, 1e-4, 0.1, "sigmoid")
    assert own.model == {"learning_rate": 1e-4, "beta": 0.1}
    assert other.model == own.model | {"loss_type": ["sigmoid", "sft"], "loss_weights": None, "loss_options": None}


def test_better_replies_come_first_whatever_the_loss_is():
    assert rates([result(1, valid=0.6, loss=0.1), result(2, valid=0.8, loss=9.0)]) == [2, 1]


def test_between_equal_replies_displacement_decides_and_then_what_was_tried_first():
    short = [result(1, displaced=0.2), result(2, displaced=0.1, loss=9.0), result(3, displaced=0.1)]
    assert rates(short) == [2, 3, 1]
    longer = [result(3, displaced=0.1, steps=200), result(2, displaced=0.1, loss=9.0, steps=200)]
    assert rates([*short, *longer]) == [2, 3, 1]


def test_an_arm_that_displaces_most_chosen_completions_comes_after_those_that_do_not():
    assert rates([result(1, valid=0.9, displaced=0.51), result(2, valid=0.1, displaced=0.5)]) == [2, 1]


def test_longer_arms_come_first_and_an_arm_is_listed_once():
    results = [result(1, valid=0.9), result(2, valid=0.8), result(2, valid=0.4, steps=200)]
    assert rates(results) == [2, 1]


def test_a_failed_arm_is_last_even_if_its_short_run_was_best():
    results = [result(1, valid=0.9), result(2, valid=0.1), result(1, steps=200, failed="the loss is nan")]
    assert rates(results) == [2, 1]
    assert rates([result(1, failed="the loss is nan"), result(2, displaced=0.9)]) == [2, 1]


def test_the_score_is_the_mean_of_the_judges_results():
    found = [result(1, valid=0.8, **{EXACT: 0.4, "sql/unjudged": 0.1, "reply/eos_rate": 1.0, "reply/length": 9.0})]
    names = score_names(found, None)
    assert names == [VALID, EXACT] and score(found[0], names) == pytest.approx(0.6)
    assert score(found[0]._replace(metrics={VALID: 0.8}), names) == pytest.approx(0.4)  # no reply has got the other
    assert score_names(found, [EXACT]) == [EXACT]
    with pytest.raises(UserError, match="find.rank_by has 'sql/exakt', but .* sql/valid, sql/exact"):
        score_names(found, ["sql/exakt"])


def test_lower_is_better_where_the_verdict_says_so():
    name = "reply/repetition"
    assert rates([result(1, **{name: 0.9}), result(2, **{name: 0.1})], [name]) == [2, 1]


def test_a_result_survives_its_file_and_something_else_is_refused():
    found = result(1e-4)._replace(arm=Arm(1e-4, 0.1, ["sigmoid", "sft"]))
    assert Result.read(json.loads(json.dumps(found.line()))) == found
    with pytest.raises(ValueError, match="'steps'"):
        Result.read(found.line() | {"steps": "many"})


def test_an_overlay_is_read_as_it_was_meant():
    for rate in (2e-5, 1e-4, 1.0):
        text = overlay(result(rate), [VALID], 96)
        assert yaml.safe_load(text) == {"model": {"learning_rate": rate, "beta": 0.1}}
        assert "After 50 steps: valid SQL 50%, on 96 held-out questions" in text


# ---------------------------------------------------------------------- the command


@pytest.fixture
def run(tmp_path, monkeypatch, model_folder, rows_file):
    """Runs a command on the tiny model and the small rows in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(name, *args):
        argv = [name, "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model_folder)]
        argv += ["--data.train_dataset", rows_file, "--data.val_size", "4", "--data.test_size", "0"]
        argv += ["--data.batch_size", "4", "--data.max_length", "128", "--model.max_new_tokens", "4"]
        argv += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
        argv += ["--trainer.enable_progress_bar", "false"]
        return main([*argv, *args])

    return call


SMALL = ["--find.learning_rates", "[1e-3]", "--find.betas", "[0.1]", "--find.steps", "2"]
ONE_ROUND = ["--trainer.max_steps", "2"]


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "find" / "arms.jsonl").read_text().splitlines()]


def test_it_ends_with_a_table_and_an_overlay_that_fit_takes(run, tmp_path, capsys):
    assert run("find", *SMALL) == 0
    printed = capsys.readouterr().out
    # The configuration's learning rate, 1e-5, is not in the list: it is an arm all the same, and in the second round.
    assert "find: 2 arms of 2 steps, then the best 1 and the configuration's own for 8" in printed
    assert "Replies, " not in printed
    rows = [line.split() for line in printed[printed.index("best first") :].splitlines()]
    ranking = [row for row in rows if row and row[0].strip("*").isdigit() and row[-1].startswith("version_")]
    assert [row[0].strip("*") for row in ranking] == ["1", "2"] and ranking[0][3] == "8"
    assert [row[1] for row in ranking if "*" in row[0]] == ["1e-05"]

    found = yaml.safe_load((tmp_path / "found.yaml").read_text())
    assert found["model"]["learning_rate"] == float(ranking[0][1])
    assert "fit --config" in printed and "--config found.yaml" in printed.splitlines()[-1]
    assert "--find" not in printed.splitlines()[-1]
    assert run("fit", "--config", "found.yaml", "--trainer.max_steps", "1") == 0

    for line in lines(tmp_path):
        folder = tmp_path / "find" / "lightning_logs" / line["run"]
        assert list(folder.glob("events.*")) and (folder / "report.html").is_file()
        assert set(line["metrics"]) >= {VALID, DISPLACED, "val/loss"} and not list(folder.glob("**/*.ckpt"))


def test_started_again_it_trains_only_what_is_missing(run, tmp_path, capsys, monkeypatch):
    trained = []
    train = command.Search._train

    def stopped_at_the_second(self, arm, steps, overrides):
        trained.append((arm, steps))
        if len(trained) == 2:
            raise Stopped(signal.SIGINT, 1)
        return train(self, arm, steps, overrides)

    monkeypatch.setattr(command.Search, "_train", stopped_at_the_second)
    with pytest.raises(SystemExit) as end:
        run("find", *SMALL, *ONE_ROUND)
    assert end.value.code == 130
    assert "finished arms are kept; to go on:\n    " in capsys.readouterr().err
    (tmp_path / "find" / "arms.jsonl").open("a").write('{"key": "cut sh')  # as by a kill
    assert run("find", *SMALL, *ONE_ROUND) == 0
    assert [rate for (rate, _, _), _ in trained] == [1e-5, 1e-3, 1e-3] and len(lines(tmp_path)) == 2
    first = (tmp_path / "found.yaml").read_text()
    assert run("find", *SMALL, *ONE_ROUND, "--find.minutes", "9") == 0  # with nothing left to train
    assert len(trained) == 3 and (tmp_path / "found.yaml").read_text() == first
    assert run("find", *SMALL, "--data.seed", "1", "--find.minutes", "0.0001") == 0  # another search, of one arm
    printed = capsys.readouterr().out
    assert len(trained) == 4 and "2 arms were not trained, because find.minutes were over" in printed


def test_an_arm_that_diverges_ranks_last_with_its_reason(run, tmp_path, capsys):
    rates = ["--find.learning_rates", "[1e30]", "--find.betas", "[0.1]", "--find.steps", "3"]
    assert run("find", *rates, "--trainer.gradient_clip_val", "null", "--trainer.max_steps", "3") == 0
    printed = capsys.readouterr().out
    assert "1e+30, beta 0.1: failed" in printed
    assert "(learning rate 1e+30, beta 0.1) failed: the loss is nan at step" in " ".join(printed.split())
    assert yaml.safe_load((tmp_path / "found.yaml").read_text())["model"]["learning_rate"] == 1e-5


def test_losses_are_arms_too_and_those_without_a_reference_get_none(run, tmp_path, capsys):
    losses = ["--find.losses", "[[sigmoid, sft], sigmoid, simpo]", "--find.learning_rates", "[1e-5]"]
    args = [*losses, "--find.betas", "[0.1]", "--find.steps", "11", "--trainer.max_steps", "11"]
    assert run("find", *args) == 0
    printed = capsys.readouterr().out
    assert "3 sigmoid, learning rate 1e-05, beta 0.1: score" in printed
    by_loss = {str(line["arm"]["loss"]): line["metrics"] for line in lines(tmp_path)}
    assert set(by_loss) == {"None", "sigmoid", "simpo"}
    assert DISPLACED in by_loss["None"] and DISPLACED not in by_loss["simpo"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--find.betas", "[]"], "find.betas is empty: give at least one value"),
        (["--find.betas", "[0.1, 0]"], "find.betas is [0.1, 0.0]: it must be a list, each above 0"),
        (["--find.learning_rates", "much"], "find.learning_rates is 'much': it must be a number or a list"),
        (["--find.step", "9"], "there is no setting --find.step: did you mean --find.steps?"),
        (["--find.losses", "[sigmoyd]"], "find.losses, sigmoyd, learning rate"),
        (["--data.val_size", "0"], "find ranks by replies to held-out prompts, but there are none"),
        (["--trainer.devices", "2"], "find trains its arms in one process, not in 2: give --trainer.devices 1"),
        (["--optimizer", "RMSprop", "--optimizer.lr", "0.1"], "model.learning_rate has no effect"),
        (["--find.output", "notes.yaml"], "find.output 'notes.yaml' is there and was not written by find"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(run, capsys, tmp_path, args, words):
    (tmp_path / "notes.yaml").write_text("mine: true\n")
    assert run("find", *args) == 2
    assert words in error_line(capsys)
    assert not (tmp_path / "find").exists() and (tmp_path / "notes.yaml").read_text() == "mine: true\n"


def test_a_foreign_file_among_the_results_is_left_alone(run, capsys, tmp_path):
    (tmp_path / "find").mkdir()
    (tmp_path / "find" / "arms.jsonl").write_text('{"mine": true}\n')
    assert run("find", *SMALL) == 2
    assert "arms.jsonl' does not hold the arms of a search: move it away" in error_line(capsys)
    assert (tmp_path / "find" / "arms.jsonl").read_text() == '{"mine": true}\n'
