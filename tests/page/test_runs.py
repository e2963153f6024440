"""Runs as the page lists them: real TensorBoard files and a real report's head, and hostile ones."""

import json
import os
import time

import pytest
from torch.utils.tensorboard import SummaryWriter

from dpo_lightning.callbacks.report.page import Run, render
from dpo_lightning.callbacks.report.saved import as_json
from dpo_lightning.callbacks.run_folders import LOCK
from dpo_lightning.page.runs import Runs, figures, plots
from dpo_lightning.storage.locks import hold, is_held, let_go

HOSTILE = "<script>alert(1)</script>\x1b[2J\u202egnp"


def events(folder, **values):
    """A run's curves: a value of each name a step; returns the open writer."""
    writer = SummaryWriter(str(folder))
    for name, points in values.items():
        for step, value in enumerate(points):
            writer.add_scalar(name.replace("__", "/"), value, step)
    writer.flush()
    return writer


def report(folder, title="m on d", outcome="Finished after 3 steps and 2 s, 2026-01-01 10:00."):
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(title, outcome, {}, {}, {}, {}, [], [], {}, [])
    (folder / "report.json").write_text(as_json(run))
    (folder / "report.html").write_text(render(run), encoding="utf-8")


def aged(path, seconds):
    for file in (path, *path.iterdir()):
        os.utime(file, (time.time() - seconds,) * 2)


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def test_runs_are_listed_newest_first_with_what_became_of_them(runs, tmp_path):
    report(tmp_path / "a" / "version_0")
    report(tmp_path / "a" / "version_1", outcome="Stopped by hand after 3 steps and 2 s.")
    report(tmp_path / "b", title=HOSTILE, outcome=f"Stopped by an error ({HOSTILE}) after 3 steps.")
    events(tmp_path / "killed", train__loss=[0.7]).close()
    (tmp_path / "no run").mkdir()
    for age, name in enumerate(("b", "a/version_1", "killed", "a/version_0")):
        aged(tmp_path / name, 100 * age)
    found, count = runs.newest()
    assert [(run.name, run.state) for run in found] == [
        ("b", "failed"),
        ("a/version_1", "stopped"),
        ("killed", "ended"),
        ("a/version_0", "finished"),
    ]
    assert count == 4 and found[3].title == "m on d" and found[3].outcome.startswith("Finished after 3 steps")
    assert found[0].title == "<script>alert(1)</script>\\x1b[2J\\u202egnp"  # of which the page makes a text node


def test_a_run_that_goes_on_is_running_and_its_curves_grow(runs, tmp_path):
    folder = tmp_path / "version_0"
    writer = events(folder, train__loss=[0.7, 0.6], val__rewards__accuracies=[0.5])
    config = {"model": {"name_or_path": "gpt2"}, "data": {"train_dataset": {"x.jsonl": 1.0, "y.jsonl": 0.5}}}
    (folder / "config.yaml").write_text(json.dumps(config))
    hold(folder / LOCK)
    try:
        (run,), _ = runs.newest()
        assert (run.state, run.title, run.has_report) == ("running", "gpt2 on x.jsonl + y.jsonl", False)
        assert len(runs.curves(run)["train/loss"]) == 2
        writer.add_scalar("train/loss", 0.5, 2)
        writer.close()
        curves = runs.curves(run)
        assert [step for step, _ in curves["train/loss"]] == [0, 1, 2]
        assert ("training loss", "0.7 → 0.5") in figures(curves) and ("pairs with a positive margin", "50%") in figures(
            curves
        )
    finally:
        let_go(folder / LOCK)
    assert runs.find(run.id).state == "ended"
    report(folder)
    assert runs.find(run.id).state == "finished"
    writer = events(folder, train__loss=[0.4])  # resumed, and killed
    writer.close()
    os.utime(folder / "report.html", (time.time() - 60,) * 2)
    assert runs.find(run.id).state == "ended"


def test_curves_become_charts_in_coordinates(runs, tmp_path):
    events(tmp_path, train__loss=[0.7, float("nan"), 0.5], val__loss=[0.6], replies__sql__valid=[0.0, 1.0]).close()
    (run,), _ = runs.newest()
    drawn = {plot["title"]: plot for plot in json.loads(json.dumps(plots(runs.curves(run))))}
    loss = drawn["Loss"]
    assert [(line["name"], len(line["points"])) for line in loss["series"]] == [("training", 2), ("validation", 1)]
    first, last = loss["series"][0]["points"]
    assert loss["left"] == first["x"] < last["x"] <= loss["right"] and first["y"] < last["y"]
    assert "valid" in drawn["SQL: valid"]["series"][0]["name"]


def test_only_plain_files_of_the_folder_are_read(runs, tmp_path):
    (tmp_path / "secret").write_text("secret")
    linked, piped, away = tmp_path / "runs" / "linked", tmp_path / "runs" / "piped", tmp_path / "away"
    for folder in (linked, piped):
        folder.mkdir(parents=True)
        events(folder, train__loss=[1.0]).close()
    report(away)
    (linked / "report.html").symlink_to(tmp_path / "secret")
    (linked / "report.json").symlink_to(away / "report.json")
    (linked / "config.yaml").symlink_to(tmp_path / "secret")
    os.mkfifo(piped / "report.html")
    os.mkfifo(piped / "report.json")
    os.mkfifo(piped / "events.out.tfevents.2")
    os.mkfifo(piped / LOCK)
    (tmp_path / "runs" / "link").symlink_to(away)
    runs = Runs(tmp_path / "runs")
    found = {run.name: run for run in runs.newest()[0]}
    assert set(found) == {"linked", "piped"}
    for run in found.values():
        assert not run.has_report and runs.report(run.id) is None and run.title == run.name
    assert runs.curves(found["piped"]) == {} and runs.find("../away") is None and runs.report("../away") is None


@pytest.mark.parametrize(
    "contents",
    [
        b'{"title": "' + b"x" * 100_000,
        b'{"title": "\xff", "outcome": ""}',
        b'{"title": "\\q", "outcome": ""}',
        b"[1]",
        b"",
    ],
    ids=len,
)
def test_what_is_no_report_and_no_curve_is_still_a_run(runs, tmp_path, contents):
    (tmp_path / "report.html").write_bytes(b"\xff<title>" + b"x" * 100_000)
    (tmp_path / "report.json").write_bytes(contents)
    (tmp_path / "events.out.tfevents.1").write_bytes(b"\x00" * 500)
    (tmp_path / "config.yaml").write_text("a: &a [1]\nmodel: *a\ndata: 3\n")
    (run,), _ = runs.newest()
    assert run.state == "ended" and run.title == run.name
    assert runs.curves(run) == {} and figures({}) == [] and plots({}) == []


def test_merge_keys_of_settings_are_never_expanded(runs, tmp_path):
    lines = ["x0: &x0 {k: v}"] + [f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 9)}]}}" for n in range(1, 30)]
    (tmp_path / "config.yaml").write_text("\n".join([*lines, "model: *x29", "data: *x29"]))
    events(tmp_path, train__loss=[1.0]).close()
    (run,), _ = runs.newest()  # expanded, it would never end
    assert run.title == run.name


def test_asking_for_a_lock_takes_nothing(tmp_path):
    lock = tmp_path / "lock"
    assert not is_held(lock) and not lock.exists()
    assert hold(lock) and is_held(lock)
    let_go(lock)
    assert not is_held(lock)
