import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.replies import RepliesCallback, Showing
from dpo_lightning.callbacks.report.callback import ReportCallback
from dpo_lightning.callbacks.report.charts import histogram, line_chart, ticks
from dpo_lightning.callbacks.report.facts import commit
from dpo_lightning.callbacks.report.page import Run, render
from dpo_lightning.callbacks.report.saved import read_run
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.errors import UserError
from dpo_lightning.judging.quantities import number_text

HOSTILE = '</pre><script>alert(1)</script><img src="http://127.0.0.1/x.png" onerror=alert(1)>\x1b[31m\x00\u202e&amp;'


class Page(HTMLParser):
    """All tags with their attributes, and the text outside of style."""

    VOID = {"meta", "br", "img", "link"}

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def assert_harmless(html):
    page = Page(html)
    assert not page.open, "every tag is closed"
    names = {name for name, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "form", "base"}
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for tag, attributes in page.tags:
        assert not any(key == "src" or key.startswith("on") for key in attributes)
        assert "href" not in attributes or tag == "a" and attributes["href"].removeprefix("#") in ids
    assert "http:" not in re.sub(r">[^<]*<", "><", html) and "url(" not in html and "@import" not in html
    assert "\x1b" not in html and "\x00" not in html and "\u202e" not in html
    return page


def hostile_run():
    flags = {"sql/valid": 1.0, "sql/exact": 0.0, "sql/execution": None, "reply/eos_rate": 1.0}
    return Run(
        title=HOSTILE,
        outcome=HOSTILE,
        facts={HOSTILE: HOSTILE},
        settings={HOSTILE: HOSTILE},
        curves={"train/loss": [(1, 0.7), (2, float("nan")), (3, 0.5)], "replies/sql/valid": [(0, 0.0), (3, 0.75)]},
        margins={"step 4": [0.1, 0.2, float("nan")]},
        pairs=[PreferencePair(HOSTILE, HOSTILE, "", HOSTILE)],
        showings=[
            Showing(step, [f"{HOSTILE}{step}"], [flags], {"sql/valid": 0.75 if step else 0.0}, {"sql/valid": 4}, 4)
            for step in range(0, 100, 10)
        ],
        costs={HOSTILE: HOSTILE},
        warnings=[HOSTILE],
        again={HOSTILE: HOSTILE},
    )


def test_nothing_in_the_report_can_act_and_all_of_it_is_shown():
    page = assert_harmless(render(hostile_run()))
    assert page.text.count("<script>alert(1)</script>") >= 12
    assert "\\x1b[31m\\x00\\u202e&amp;" in page.text
    assert "0% → 75%valid SQLon 4 questions" in page.text and "✓ valid" in page.text and "✗ exact" in page.text
    assert "same result" not in page.text.split("Replies")[-1], "what could not be judged is not marked"


def test_a_prompt_shows_first_last_and_some_replies_between():
    rows = re.findall(r"<th>(before|step \d+|wanted)</th>", render(hostile_run()))
    assert rows == ["before", "step 20", "step 40", "step 70", "step 90", "wanted"]


def test_steps_with_the_same_reply_are_one_row():
    run, flags = hostile_run(), [{"sql/valid": True}]
    texts = {0: "a", 10: "b", 20: "b", 30: "c", 40: "c", 50: "c"}
    showings = [Showing(step, [text], flags, {}) for step, text in texts.items()]
    rows = re.findall(r"<th>([^<]+)</th><td><pre>(.)<", render(run._replace(showings=showings)))
    assert rows == [("before", "a"), ("step 10 to 20", "b"), ("step 30 to 50", "c")]
    same = [Showing(step, ["a"], flags, {}) for step in (0, 10)]
    assert ">before, and to step 10<" in render(run._replace(showings=same))


def test_lines_with_the_same_values_can_be_told_apart():
    chart = line_chart("Same", {name: [(step, 0.5) for step in range(50)] for name in ("one", "two", "three")})
    lines = re.findall(r'<polyline.*stroke-width="([^"]+)" stroke-dasharray="([^"]*)"', chart)
    widths, dashes = zip(*((float(width), dash) for width, dash in lines), strict=True)
    assert list(widths) == sorted(widths, reverse=True) and len(set(dashes)) == 3 and dashes[0] == ""
    labels = re.findall(r'<text [^>]* y="([^"]+)"[^>]*class="end"[^>]*>(\w+)<', chart)
    heights = sorted(float(y) for y, _ in labels)
    assert {name for _, name in labels} == {"one", "two", "three"}
    assert all(below - above >= 14.8 for above, below in zip(heights, heights[1:], strict=False))
    assert 0 < heights[0] and heights[-1] < 220, "labels stay within the picture"


def test_names_that_are_too_long_for_the_end_of_a_line_are_in_a_legend():
    chart = line_chart("Long", {"a" * 40: [(0, 1)], "b": [(0, 2)]})
    assert 'class="end"' not in chart and chart.count('class="sample"') == 2


def test_a_single_validation_is_seen():
    chart = line_chart("Loss", {"training": [(n, n) for n in range(50)], "validation": [(50, 3)]})
    assert len(re.findall(r'<circle [^>]*class="mark"', chart)) == 1 and chart.count('class="hover"') == 50


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 0.93, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3, 12, [-5, 0, 5, 10, 15]),
        (1e-6, 4e-6, [1e-6, 2e-6, 3e-6, 4e-6]),
        (0, 0, [-1, -0.5, 0, 0.5, 1]),
        (0, 3e-15, [-2e-15, 0, 2e-15, 4e-15, 6e-15]),
    ],
)
def test_ticks_are_round_and_enclose_the_data(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected, abs=1e-20)


def test_a_line_keeps_inside_its_axes_and_says_its_values():
    chart = line_chart("Loss", {"training": [(0, 0.0), (10, float("nan")), (20, 1.0)], "empty": []})
    points = re.search(r'points="([^"]+)"', chart)[1].split()
    assert points == ["52.0,212.0", "428.0,10.0"]
    assert "<title>training, step 20: 1</title>" in chart and "empty" not in chart
    assert line_chart("Loss", {"training": [(1, float("nan"))]}) == ""


def test_long_labels_of_an_axis_have_room():
    chart = line_chart("Learning rate", {"learning rate": [(0, 0.00102), (1, 0.00104)]})
    labels = re.findall(r'<text x="(\d+)"[^>]*end">([^<]+)', chart)
    assert max(len(label) for _, label in labels) == 7
    assert all(int(x) >= 9 * len(label) for x, label in labels)


def test_a_long_line_is_thinned_to_its_last_point():
    chart = line_chart("Loss", {"training": [(i, i) for i in range(1001)]})
    assert 250 <= chart.count("<circle") <= 301 and "step 1000: 1000" in chart


def test_a_histogram_counts_every_value_once():
    chart = histogram("Margins", {"step 4": [0.0] * 5 + [1.0] * 3, "step 8": [2.0]})
    counts = [int(number) for number in re.findall(r"<title>.*?: (\d+)</title>", chart)]
    assert counts == [5, 3, 1]


def test_numbers_are_short():
    assert [number_text(v) for v in (12000.0, 0.69314718, 2.5e-5, 3412.7)] == ["12000", "0.693", "2.5e-5", "3413"]


# ---------------------------------------------------------------------- of a whole run


@pytest.fixture
def run(model_folder, tokenizer, rows_file):
    module = DPOModule(str(model_folder), max_new_tokens=8, learning_rate=1e-3)
    return module, PreferenceDataModule(tokenizer, rows_file, val_size=4, test_size=4, batch_size=4)


def callbacks():
    return [RepliesCallback(every_n_steps=4, num_prompts=2, num_shown=0), ReportCallback()]


def test_a_fit_leaves_a_report_of_what_it_logged(run, quiet_trainer, tmp_path):
    report = callbacks()
    trainer = quiet_trainer(callbacks=report, log_every_n_steps=2, val_check_interval=4, max_steps=8)
    show = warnings.showwarning
    trainer.fit(*run)
    assert warnings.showwarning is show and trainer.loggers == []
    html = (tmp_path / "report.html").read_text()
    page = assert_harmless(html)
    assert "Finished after 8 steps" in page.text and "rows.jsonl" in page.text and "beta 0.1" in page.text
    curves = report[1]._curves
    assert len(curves["train/loss"]) == 4 and len(curves["val/loss"]) == 2
    assert curves["val/loss"][-1][1] == pytest.approx(trainer.callback_metrics["val/loss"].item())
    for value in (curves["train/loss"][0][1], curves["val/loss"][-1][1]):
        assert f": {number_text(value)}</title>" in html
    assert "step 4" in page.text and "step 8" in page.text and "wanted" in page.text
    assert "tiny-gpt2 after DPO on rows.jsonl" in page.text, "a title in words, not a path"
    assert "command" in page.text and "of the data 42" in page.text
    assert read_run(tmp_path).curves["train/loss"] == [list(point) for point in curves["train/loss"]]
    assert re.search(r"\d\.\d\d GiB of the process", page.text)
    assert re.search(r"of it for replies\d+\.\d s \(\d+\.\d%\)", page.text)


def test_the_commit_is_that_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    of_whom = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for args in (["init", "-q"], [*of_whom, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *args], check=True)
    assert re.fullmatch("[0-9a-f]{40}", commit())
    monkeypatch.setenv("PATH", "")
    assert commit() is None


def test_warnings_of_the_run_are_in_its_report(run, quiet_trainer, tmp_path):
    from lightning.pytorch import Callback

    class Warns(Callback):
        def on_train_start(self, *_):
            warnings.warn("something <b>odd</b>", stacklevel=1)

    with pytest.warns(UserWarning, match="odd"):
        quiet_trainer(callbacks=[*callbacks(), Warns()], max_steps=1).fit(*run)
    assert "something <b>odd</b>" in assert_harmless((tmp_path / "report.html").read_text()).text


@pytest.mark.parametrize(("error", "words"), [(KeyboardInterrupt(), "Stopped by hand"), (UserError("x<y"), "(x<y)")])
def test_a_run_that_is_stopped_leaves_a_report_too(run, quiet_trainer, tmp_path, error, words):
    from lightning.pytorch import Callback

    class Stops(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                raise error

    with pytest.raises((SystemExit, UserError)):
        quiet_trainer(callbacks=[*callbacks(), Stops()], log_every_n_steps=1).fit(*run)
    page = assert_harmless((tmp_path / "report.html").read_text())
    assert words in page.text and "after 3 steps" in page.text


def test_a_resumed_run_reports_the_whole_run(run, model_folder, tokenizer, rows_file, quiet_trainer, tmp_path):
    saves = ModelCheckpoint(tmp_path, "four", every_n_train_steps=4)
    options = {"log_every_n_steps": 2, "enable_checkpointing": True}
    quiet_trainer(callbacks=[*callbacks(), saves], max_steps=4, **options).fit(*run)
    report = callbacks()
    module = DPOModule(str(model_folder), max_new_tokens=8, learning_rate=1e-3)
    data = PreferenceDataModule(tokenizer, rows_file, val_size=4, test_size=4, batch_size=4)
    quiet_trainer(callbacks=report, log_every_n_steps=2, max_steps=8).fit(
        module, data, ckpt_path=tmp_path / "four.ckpt"
    )
    # A callback's checkpoint is written before the module logs its step, so the point of step 4 is not in it.
    assert [step for step, _ in report[1]._curves["train/loss"]] == [1, 5, 7]
    assert [showing.step for showing in report[0].showings] == [0, 4, 8]
    lines = (tmp_path / "replies.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 2, "two prompts at three steps, those before the resume kept"


def test_curves_of_an_earlier_checkpoint_go_on_under_their_new_name():
    report = ReportCallback()
    curves = {"replies/reply/length": [(0, 9.0)], "replies/sql/valid": [(0, 0.0)], "train/loss": [(1, 0.7)]}
    report.load_state_dict({"curves": curves, "margins": {}, "warnings": [], "seconds": 0.0})
    assert set(report._curves) == {"replies/length", "replies/sql/valid", "train/loss"}


def test_a_trial_run_writes_nothing(run, quiet_trainer, tmp_path):
    quiet_trainer(callbacks=callbacks(), fast_dev_run=True).fit(*run)
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "replies.jsonl").exists()


def test_the_callbacks_say_what_they_need(run, quiet_trainer):
    module, data = run
    data.setup("fit")
    for callback in callbacks():
        with pytest.raises(UserError, match=f"{type(callback).__name__} needs .* PreferenceDataModule.*is none"):
            quiet_trainer(callbacks=[callback]).fit(module, train_dataloaders=data.train_dataloader())


def test_replies_stay_readable_after_a_kill(tmp_path, model_folder, rows_file):
    """SIGKILL at any point: what was written is whole lines, and a half one is dropped on the way in."""
    import json
    import signal

    from conftest import REPO

    process = subprocess.Popen(
        [
            sys.executable, str(REPO / "cli.py"), "fit", "--config", str(REPO / "configs" / "gpt2.yaml"),
            "--model.name_or_path", str(model_folder), "--data.train_dataset", rows_file, "--data.val_size", "4",
            "--data.test_size", "4", "--data.max_length", "128", "--model.max_new_tokens", "8",
            "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1000", "--replies.every_n_steps", "1",
        ],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for line in process.stdout:
        if "Replies, step 5" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.wait(timeout=60)
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    lines = (folder / "replies.jsonl").read_bytes().split(b"\n")
    whole = [json.loads(line) for line in lines[:-1]]
    assert {line["step"] for line in whole} >= {0, 1, 2, 3, 4}
    assert set(whole[0]) == {
        "step", "prompt", "reply", "reference", "wanted", "stopped", "sql/valid", "sql/exact", "sql/execution"
    }  # fmt: skip

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert "replies/sql/valid" in events.Tags()["scalars"] and "replies/text_summary" in events.Tags()["tensors"]
