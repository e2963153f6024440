"""Judges, one function each, and the one metric that averages whatever they return."""

import json
import re
import sys

import numpy as np
import pytest
import torch

from conftest import REPO
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.evaluation import EvaluationCallback
from dpo_lightning.callbacks.predictions import ReplyWriter
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.callbacks.report.callback import ReportCallback
from dpo_lightning.cli.entry import main
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.errors import UserError
from dpo_lightning.judging.judge import FAILURES, VerdictMeans, check_round, find_judges, verdicts
from dpo_lightning.judging.kinds import JUDGES, repetition
from dpo_lightning.judging.quantities import QUANTITIES, TITLES, marks
from dpo_lightning.models.reply import Reply
from ranks import run_ranks

PAIR = PreferencePair("p", " SELECT a FROM t", "", "CREATE TABLE t (a INT)")
EXAMPLE = re.search(r"## A new judge.*?```python\n(.*?)```", (REPO / "docs/extending.md").read_text(), re.DOTALL)[1]


@pytest.mark.parametrize(
    ("token_ids", "share"),
    [([], 0.0), ([1, 1, 1], 0.0), ([1, 2, 3, 4], 0.0), ([7] * 8, 0.8), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2)],
)
def test_repetition(token_ids, share):
    assert repetition(token_ids) == pytest.approx(share)


def judged(*replies):
    means = VerdictMeans()
    means.update([verdicts(find_judges([]), Reply("", *reply), PAIR) for reply in replies])
    return means


def test_means_over_replies_merge_over_ranks():
    """Two ranks with 2 and 1 replies."""
    first, second = judged(([7] * 8, False), ([1, 2, 3, 4], True)), judged(([], True))
    first.merge(second.totals)
    values = first.compute()
    assert values["reply/eos_rate"] == 2 / 3
    assert values["reply/length"] == 4.0
    assert values["reply/repetition"] == pytest.approx(0.8 / 3)


def test_processes_need_not_have_seen_the_same_names():
    seen = [[{"a": True, "b": 2.0}, {"a": None}], [{"c": None, "b": 5}], []]

    def rank(number):
        torch.distributed.init_process_group("gloo", rank=number, world_size=3)
        means = VerdictMeans()
        means.update(seen[number])
        everywhere, alone = means.gathered().compute(), list(means.compute())
        means.update([{"b": 5.0}] if number == 2 else [])  # and goes on with its own replies
        return everywhere, alone, means.gathered().compute()["b"]

    results = run_ranks(3, rank)
    for everywhere, _, later in results:
        assert {name: value for name, value in everywhere.items() if name != "c"} == {"a": 1.0, "b": 3.5}
        assert np.isnan(everywhere["c"]) and later == 4.0
    assert [names for _, names, _ in results] == [["a", "b"], ["c", "b"], []]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module of the user's own into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="my_judges"):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "path", sys.path[:])

    yield write
    QUANTITIES.pop("brevity/short", None)


RETURNS = "def odd(reply, pair):\n    return {}"


@pytest.mark.parametrize(
    ("code", "name", "words"),
    [
        ("", "sqll", "replies.judge 'sqll' is unknown.*did you mean 'sql'"),
        ("", "nowhere:odd", "cannot be imported: ModuleNotFoundError"),
        ("odd = 3", "my_judges:odd", "is int, not a function"),
        ("def sql(reply, pair):\n    return {}", "my_judges:sql", "there is another judge called sql"),
    ],
)
def test_a_judge_that_cannot_be_used_is_one_line(own, code, name, words):
    own(code)
    with pytest.raises(UserError, match=words) as error:
        find_judges(name)
    assert "\n" not in str(error.value)


REPLIES = [Reply(text, [1], True) for text in ("1", "2", "3")]


def a_round(judges, replies=REPLIES):
    judged = [verdicts(judges, reply, PAIR) for reply in replies]
    means = VerdictMeans()
    means.update(judged)
    check_round(judges, means)
    return judged, means.compute()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{'a': 'yes'}", "returned 'a': 'yes': its verdicts are names with"),
        ("{1: True}", "returned 1: True"),
        ("'good'", "returned 'good': it must return a number"),
        ("{'a': 1 / 0}", "raised ZeroDivisionError: division by zero"),
        ("exit(1)", "raised SystemExit"),
        ("'\\x1b[31m\\nred'.index('x')", "raised ValueError"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_judge_that_fails_on_every_reply_of_the_first_round_ends_the_run(own, body, words):
    own(RETURNS.format(body))
    with pytest.raises(UserError, match=f"replies.judge: python 'odd' failed on every reply: it .*{words}") as error:
        a_round(find_judges("my_judges:odd"))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"failed on each of the first {FAILURES} replies: it .*{words}"):
        a_round(find_judges("my_judges:odd"), REPLIES * 9)


HANGS_ON_2 = """
def odd(reply, pair):
    if reply.text == "2":
        {}
    if pair.chosen == "":
        1 / 0
    return int(reply.text)
"""


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("while True: pass", "took more than 0.5 seconds"),
        ("raise RuntimeError('\\x1b[31mno\\nanswer')", r"raised RuntimeError: \\x1b\[31mno answer"),
        ("__import__('os')._exit(0)", r"ended its process \(exit code 0\)"),
        ("return 'x' * 10**9", "took more than 128 MiB"),
    ],
)
def test_a_reply_on_which_a_judge_fails_has_no_verdict_and_is_counted(own, what, words):
    own(HANGS_ON_2.format(what))
    judges = find_judges({"python": {"function": "my_judges:odd", "timeout": 0.5, "memory": 0.125}})
    with pytest.warns(UserWarning, match=words) as warned:
        judged, means = a_round(judges)
    assert len([one for one in warned if "odd" in str(one.message)]) == 1
    assert [found.get("odd/score") for found in judged] == [1.0, None, 3.0]
    assert [found["odd/unjudged"] for found in judged] == [False, True, False]
    assert means["odd/score"] == 2 and means["odd/unjudged"] == pytest.approx(1 / 3)
    with pytest.warns(UserWarning, match="failed on every reply"):  # it has judged some before: the run goes on
        judged = [verdicts(judges, reply, PAIR._replace(chosen="")) for reply in REPLIES[:1]]
        means = VerdictMeans()
        means.update(judged)
        check_round(judges, means)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RepliesCallback(judge=["sql", 3]), "replies.judge is .* a list, each a text"),
        (lambda: RepliesCallback(num_prompts=0), "replies.num_prompts is 0: it must be at least 1"),
        (lambda: EvaluationCallback(judge=3), "evaluation.judge is 3: it must be a text"),
        (lambda: ReplyWriter(None), "predictions.output is null: it must be a text"),
    ],
)
def test_settings_are_checked_in_python_too(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_what_is_no_number_is_not_judged(own):
    own("import numpy\n" + RETURNS.format("{'a': numpy.float32('nan'), 'b': numpy.float32(0.5), 'c': None, 'd': True}"))
    found = verdicts(find_judges(["my_judges:odd"]), Reply("x", [3], False), PAIR)
    assert {name: found[f"odd/{name}"] for name in "abcd"} == {"a": None, "b": 0.5, "c": None, "d": True}
    assert type(found["odd/b"]) is float and found["reply/eos_rate"] is False
    assert marks(found) == [("d", True), ("ended", False)]


def test_every_verdict_of_the_packages_judges_has_its_name():
    pytest.importorskip("jsonschema")
    others = ["exact", {"regex": "a"}, {"json_schema": {"schema": {}}}]
    found, listed = set(), set()
    for option in ("ignore_case", "valid_without_answer"):
        judges = find_judges([{"sql": {option: True}}, *others])
        found |= set(verdicts(judges, Reply("SELECT a FROM t", [1], True), PAIR))
        listed |= {f"{name}/{verdict}" for name, judge in judges.items() for verdict in judge.verdicts}
    own = {name for name in QUANTITIES if name.partition("/")[0] in JUDGES}
    assert found - {"regex/unjudged", "json_schema/unjudged"} == own and set(TITLES) == set(JUDGES)
    assert own == listed


@pytest.fixture
def parts(model_folder, tokenizer, rows_file):
    module = DPOModule(str(model_folder), max_new_tokens=8, learning_rate=1e-3)
    return module, PreferenceDataModule(tokenizer, rows_file, val_size=4, test_size=4, batch_size=4)


def test_a_judge_from_outside_is_seen_wherever_replies_are(own, parts, quiet_trainer, tmp_path, capsys):
    """The example of docs/extending.md, as it stands there."""
    own(EXAMPLE)
    replies = RepliesCallback(every_n_steps=0, num_prompts=3, num_shown=1, judge=["sql", "my_judges:brevity"])
    trainer = quiet_trainer(callbacks=[replies, ReportCallback()], max_steps=2)
    trainer.fit(*parts)
    first, last = replies.showings
    assert {"sql/valid", "brevity/short", "reply/length"} <= set(first.shares) == set(last.shares)
    assert f"replies no longer than wanted {last.shares['brevity/short']:.0%}" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all(isinstance(line["brevity/short"], bool) for line in lines)
    page = (tmp_path / "report.html").read_text()
    assert "replies no longer than wanted" in page and "brevity: short" in page and re.search("[✓✗] short", page)
    (logged,) = quiet_trainer(callbacks=[EvaluationCallback("my_judges:brevity")]).test(*parts, verbose=False)
    assert 0 <= logged["test/brevity/short"] <= 1 and "test/reply/length" in logged and "test/sql/valid" not in logged


def test_a_judge_is_named_in_yaml_once(own, tmp_path, model_folder, rows_file):
    own(EXAMPLE)
    (tmp_path / "mine.yaml").write_text("replies:\n  judge: [my_judges:brevity]\n")
    settings = {
        "--config": REPO / "configs" / "gpt2.yaml", "--model.name_or_path": model_folder,
        "--data.train_dataset": rows_file, "--data.test_size": 4, "--data.max_length": 128,
        "--model.max_new_tokens": 8, "--trainer.accelerator": "cpu",
    }  # fmt: skip
    args = [str(part) for pair in settings.items() for part in pair]
    assert main(["test", *args, "--config", "mine.yaml"]) == 0
    (metrics,) = (tmp_path / "lightning_logs").glob("*/metrics.json")
    names = set(json.loads(metrics.read_text())["metrics"])
    assert {"test/brevity/short", "test/reply/eos_rate"} <= names and "test/sql/valid" not in names
