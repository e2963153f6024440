"""What a user sees in a real terminal: every table whole, one line of progress, nothing drawn over, a sane cursor."""

import json
import re
from itertools import takewhile

import pytest

from conftest import REPO
from terminal import in_terminal

DEMO = REPO / "src" / "dpo_lightning" / "demo"
FIT = (
    "fit", "--config", REPO / "configs" / "demo.yaml",
    "--data.train_dataset", "train.jsonl", "--data.val_dataset", "val.jsonl", "--data.test_dataset", "val.jsonl",
    "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "3",
    "--replies.every_n_steps", "2", "--replies.num_prompts", "3", "--replies.num_shown", "2",
    "--model.max_new_tokens", "24",
)  # fmt: skip
STEPS = (0, 2, 4, 6)


@pytest.fixture
def folder(tmp_path):
    """An empty folder with a few of the demo's rows."""
    for name, source, rows in (("train", "train", 96), ("val", "test", 16)):
        lines = (DEMO / "data" / f"{source}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:rows]))
    return tmp_path


def squeezed(text):
    return "".join(text.split())


def table_below(lines, title):
    """The rows of the table under a title, each a list of its cells without white space, and its caption."""
    (start,) = [number for number, line in enumerate(lines) if line.strip() == title]
    body = list(takewhile(lambda line: line[:1] in "┏┃┡│├└" and line, lines[start + 1 :]))
    assert body[0].startswith("┏") and body[-1].startswith("└"), f"the table under {title} is not whole"
    assert len({len(line) for line in body}) == 1
    rows = [[]]
    for line in body[3:-1]:
        if line.startswith("├"):
            rows.append([])
        else:
            rows[-1].append([squeezed(cell) for cell in line.strip("│").split("│")])
    after = start + 1 + len(body)
    caption = " ".join(line.strip() for line in lines[after : after + 2])
    return [["".join(cells) for cells in zip(*row, strict=True)] for row in rows], caption


# How the lines of a fit begin, beside its tables. A line that wraps would have another one below. Whether six steps
# change a reply hangs on the rounding of the machine.
LINES = (
    "precision: ", "data: ", "model: ", "step ", "forgetting: ", "time: ",
    "all 3 replies|.* 3 que", "model: ", "report: ",
)  # fmt: skip


def beside_tables(lines):
    """All lines but those of tables, their titles and captions."""
    return [line for line in lines if line and line[0] not in "┏┃┡│├└ " and not re.search(r"\d%(,|$)", line)]


def bars(lines):
    """Lines that a progress bar has left."""
    return [line for line in lines if "━━━" in line and line[:1] not in "┏┡╇"]


@pytest.mark.parametrize("columns", [80, pytest.param(120, marks=pytest.mark.slow)])
def test_the_results_of_a_fit_stay_on_the_screen(folder, columns):
    seen = in_terminal([*FIT, "--trainer.max_steps", 6], folder, columns)
    assert seen.status == 0 and seen.cursor_shown, "\n".join(seen.lines)
    said = [json.loads(x) for x in (folder / "lightning_logs/version_0/replies.jsonl").read_text().splitlines()]
    for step in STEPS:
        rows, caption = table_below(seen.lines, f"Replies, step {step}" if step else "Replies, before training")
        lines = [line for line in said if line["step"] == step][:2]
        names = ("prompt", "reference", "reply", "wanted") if step else ("prompt", "reference", "wanted")
        assert rows == [[squeezed(line[name]) for name in names] for line in lines]
        assert re.match(r"All 3 replies: valid SQL \d+%, .*, same result as wanted \d+%", caption), caption
    (bar,) = bars(seen.lines)
    words = r"step 6/6 ━+ loss \d+\.\d{3} accuracy \d+% margin -?\d+\.\d\d \d+\.\d pairs/s in \d+:\d\d"
    assert re.fullmatch(words, bar) and len(bar) <= columns
    assert not any("batch " in line for line in seen.lines), "validations leave nothing behind"
    rest = [line for line in beside_tables(seen.lines) if not line.startswith("replies took")]  # if they took long
    assert len(rest) == len(LINES) and all(map(re.match, LINES, rest)), "\n".join(rest)
    assert rest[-2:] == [f"{name}: lightning_logs/version_0/{file}" for name, file in
                         (("model", "huggingface"), ("report", "report.html"))]  # fmt: skip


def test_warnings_and_log_lines_land_above_the_bar_and_ctrl_c_gives_the_terminal_back(folder):
    seen = in_terminal(
        [*FIT, "--trainer.max_epochs", 1000, "--trainer.val_check_interval", "1.0"], folder, 80,
        interrupt_at=lambda raw: b"Replies, step 4" in raw,
    )  # fmt: skip
    assert seen.status == 130 and seen.cursor_shown
    text = squeezed("".join(seen.lines))
    assert "Ctrl-C:finishingthisstep;Ctrl-Cagainstopsatonce" in text and "toresume:" in text
    assert "report:lightning_logs/version_0/report.html" in text
    assert len(bars(seen.lines)) == 1
    for step in (2, 4):
        rows, _ = table_below(seen.lines, f"Replies, step {step}")
        assert len(rows) == 2


@pytest.mark.slow
def test_a_dumb_terminal_gets_plain_text(folder):
    seen = in_terminal([*FIT, "--trainer.max_steps", 2], folder, 80, term="dumb")
    assert seen.status == 0 and b"\x1b[" not in seen.raw.replace(b"\x1b[A", b"")
    assert len(bars(seen.lines)) == 1 and table_below(seen.lines, "Replies, step 2")[0]


@pytest.mark.slow
def test_a_bar_of_the_users_own_or_none_is_possible(folder):
    own = ["--trainer.callbacks", "lightning.pytorch.callbacks.TQDMProgressBar"]
    for args in (own, ["--trainer.enable_progress_bar", "false"]):
        seen = in_terminal([*FIT, "--trainer.max_steps", 2, *args], folder, 100)
        assert seen.status == 0, "\n".join(seen.lines)
        for title in ("before training", "step 2"):
            assert table_below(seen.lines, f"Replies, {title}")[0]


def test_verbose_shows_what_libraries_say(folder):
    seen = in_terminal([*FIT, "--trainer.max_steps", 1, "--replies.num_prompts", 1, "--verbose"], folder, 120)
    text = "\n".join(seen.lines)
    assert seen.status == 0, text
    assert all(words in text for words in ("Seed set to 42", "GPU available: ", "Total params: ", "Loading weights: "))


def test_an_error_breaks_between_words(tmp_path):
    command = ["fit", "--config", "no such file.yaml"]
    wide, narrow = (in_terminal(command, tmp_path, columns=columns) for columns in (400, 30))
    (whole,), lines = ([line.strip() for line in seen.lines if line.strip()] for seen in (wide, narrow))
    assert wide.status == narrow.status == 2 and len(lines) > 1 and " ".join(lines) == whole
