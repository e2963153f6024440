"""`report.json` and the command `report`: what a run wrote is read back, and nothing else is."""

import json
import re

import pytest
from test_report import HOSTILE, assert_harmless, hostile_run

from dpo_lightning.callbacks.report.page import render
from dpo_lightning.callbacks.report.saved import as_json, read_run
from dpo_lightning.callbacks.report.side_by_side import names_of
from dpo_lightning.cli.entry import main


def full_run(**changes):
    """A run with hostile texts, and replies as a real run has them."""
    run = hostile_run()
    extra = {"reply/eos_rate": 1.0, "reply/length": 9.0, "reply/repetition": 0.0}
    showings = [showing._replace(shares=showing.shares | extra) for showing in run.showings]
    return run._replace(showings=showings)._replace(**changes)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def folder(name, run):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "report.json").write_text(run if isinstance(run, str) else as_json(run))
        return tmp_path / name

    return folder


def test_what_was_written_is_read_back(write):
    run = full_run(curves={"train/loss": [(1, 0.5)]}, margins={"step 4": [0.1]})
    assert as_json(read_run(write("a", run))) == as_json(run)
    assert render(read_run(write("b", full_run()))) == render(full_run())


def test_runs_are_side_by_side_and_nothing_in_them_can_act(write, capsys, tmp_path):
    first = full_run(settings={"beta": 0.1, "seed": 42, HOSTILE: HOSTILE})
    second = full_run(settings={"beta": 0.3, "seed": 42, HOSTILE: HOSTILE}, curves={"val/loss": [(1, 0.4), (2, 0.3)]})
    folders = [str(write(name, run)) for name, run in (("version_0", first), ("version_1", second))]
    assert main(["report", "--runs", *folders]) == 0
    assert capsys.readouterr().out == "report: runs.html\n"
    html = (tmp_path / "runs.html").read_text()
    page = assert_harmless(html)
    assert "2 runs side by side" in page.text
    cells = re.findall(r"<tr><th>(\w+)</th><td>([^<]+)</td><td>([^<]+)</td></tr>", html)
    assert ("beta", "0.1", "0.3") in cells and "seed" not in [name for name, *_ in cells]
    assert html.count("<th>version_0</th><td><pre>") == 1, "the last reply of each run"
    assert "Loss: validation" in page.text and "version_1, step 3: 0.3" in html
    assert main(["report", "--runs", *folders, "-o", "runs.html"]) == 0, "our own page is written anew"


def test_another_file_is_not_overwritten(write, tmp_path, capsys):
    folders = [str(write(name, full_run())) for name in ("a", "b")]
    (tmp_path / "mine.html").write_text("<html>mine</html>")
    for output in ("mine.html", "."):
        assert main(["report", "--runs", *folders, "-o", output]) == 2
    assert (tmp_path / "mine.html").read_text() == "<html>mine</html>"
    assert "choose another file with -o" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "null", "[" * 100_000, '{"title": 3}', "\x00"),
        json.dumps(json.loads(as_json(full_run())) | {"curves": {"a": [["x", 1]]}}),
        json.dumps(json.loads(as_json(full_run())) | {"showings": [[1, ["a"], [], {}, {}, 2]]}),
        json.dumps(json.loads(as_json(full_run())) | {"pairs": [["a", "b"]]}),
    ],
)
def test_a_file_that_is_no_report_is_one_line(write, text, capsys):
    folders = [str(write("a", full_run())), str(write("b", text))]
    assert main(["report", "--runs", *folders]) == 2
    error = capsys.readouterr().err
    assert "report.json' is not a report of a run: " in error and error.count("\n") == 1 and len(error) < 700


def test_what_is_missing_is_said(write, capsys, tmp_path):
    folder = write("a", full_run())
    (tmp_path / "empty").mkdir()
    for args, words in (
        ([folder], "needs two or more folders"),
        ([folder, folder], "needs two or more folders"),
        ([folder, tmp_path / "none"], "there is no such folder"),
        ([folder, tmp_path / "empty"], "has no report.json: it is written with report.html when a run ends"),
    ):
        assert main(["report", "--runs", *map(str, args)]) == 2
        assert words in capsys.readouterr().err


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    assert names_of([tmp_path / "a" / "version_0", tmp_path / "a" / "version_1"]) == ["version_0", "version_1"]
    assert names_of([tmp_path / "a" / "version_0", tmp_path / "b" / "version_0"]) == ["a/version_0", "b/version_0"]
