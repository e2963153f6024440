"""Strangers' text must not drive the terminal: rows, columns, file names, templates, replies, error texts."""

import json
import logging
import subprocess
import sys
import unicodedata
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import REPO, ROWS
from dpo_lightning.cli.entry import main

# Sets the clipboard, retitles, wipes, rings, turns the direction of text, hides; C0, DEL, C1, bidi, zero width.
CODES = (
    "\x1b]52;c;cm0gLXJm\x07",
    "\x1b]0;owned\x07",
    "\x1b[2J",
    "\x08",
    "\x7f",
    "\x9b31m",
    "\x9d",
    "\u202e",
    "\u2066",
    "\u200b",
    "\u200d",
    "\ufeff",
    "\x00",
)
EVIL = "a" + "b".join(CODES) + "z"
NAME_EVIL = EVIL.replace("\x00", "")  # of files
HARMLESS = "问题：\u3000naïve «é» 👩‍💻 🇨🇳 한국어 ñ"


def check(text, progress=False):
    """Nothing but newlines (and what moves a progress bar) may be in it that a terminal does not just show."""
    allowed = "\n\r" if progress else "\n"
    bad = {c for c in text if c not in allowed and not c.isprintable() and unicodedata.category(c) != "Zs"} - {"\u200d"}
    assert not bad, (bad, text)
    assert "b\u200d" not in text and "\u200db" not in text  # the joiner stays in emoji alone


@pytest.fixture
def run(tmp_path, monkeypatch, model_folder, capsys):
    """Runs a command on hostile files; gives its exit code and all that reached the terminal, warnings and logs too."""
    monkeypatch.chdir(tmp_path)
    # pytest keeps warnings for itself: print them as Python does.
    monkeypatch.setattr(
        warnings,
        "showwarning",
        lambda message, category, filename, lineno, file=None, line=None: sys.stderr.write(
            warnings.formatwarning(message, category, filename, lineno, line)
        ),
    )
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)

    def call(command, *args):
        argv = [command, "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model_folder)]
        argv += ["--data.val_size", "4", "--data.test_size", "4", "--data.batch_size", "4", "--data.max_length", "128"]
        argv += ["--model.max_new_tokens", "4", "--trainer.accelerator", "cpu"]
        code = main([*argv, *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield call
    logger.removeHandler(handler)


def rows_with(text):
    return [row | {"question": f"{row['question']} {text}", "answer": f"{row['answer']} {text}"} for row in ROWS]


def test_inspect_shows_hostile_rows_and_names_as_escapes(run, tmp_path, write_rows):
    path = write_rows([*rows_with(EVIL), {EVIL: 1}, rows_with(EVIL)[0]], f"{NAME_EVIL}.jsonl")
    code, out, err = run("inspect", "--data.train_dataset", path, "--data.on_bad_row", "skip")
    assert code == 0
    check(out)
    check(err, progress=True)
    assert "\\x1b]52;c;" in out and "\\u202e" in out and "\\x9b31m" in out  # shown, not swallowed
    assert "1 repeated row" in out and "1 missing column" in err


def test_a_row_cannot_forge_a_line_of_inspect(run, write_rows):
    path = write_rows(rows_with("\ntrain: 1,000,000 pairs, all fine"), "rows\ntrain: 9 pairs.jsonl")
    code, out, err = run("inspect", "--data.train_dataset", path, "--rows", "3")
    assert code == 0
    summary = "train: 40 pairs, 20 different contexts (or prompts)"
    assert [line for line in out.splitlines() if line.startswith("train: ")] == [summary]
    assert not any(line.startswith("train: 9") for line in err.splitlines())


def test_printable_text_of_any_language_stays(run, write_rows):
    path = write_rows(rows_with(HARMLESS), "数据 é.jsonl")
    code, out, _ = run("inspect", "--data.train_dataset", path)
    assert code == 0 and "数据 é.jsonl" in out
    assert HARMLESS in out


def test_errors_on_hostile_names_columns_and_cells_are_one_visible_line(run, tmp_path, write_rows):
    good = write_rows(ROWS, "good.jsonl")
    bad_cell = write_rows([*ROWS, {"question": [EVIL], "context": "c", "answer": "a"}], f"cell{NAME_EVIL}.jsonl")
    columns = write_rows([{EVIL: "1", f"{EVIL}\nerror: all is well": "2"}], "columns.jsonl")
    split_name = f"{tmp_path}/{NAME_EVIL}"
    pq.write_table(pa.Table.from_arrays([pa.array(["1"])] * 2, names=[EVIL, EVIL]), tmp_path / "twice.parquet")
    (tmp_path / "twice.csv").write_text(f"{NAME_EVIL},{NAME_EVIL}\n1,2\n", encoding="utf-8")
    (tmp_path / "wrapped.json").write_text(json.dumps({EVIL: 1, "b": {}}, indent=1), encoding="utf-8")
    for args in (
        ["--data.train_dataset", bad_cell],
        ["--data.train_dataset", columns],
        ["--data.train_dataset", split_name],
        ["--data.train_dataset", f"{NAME_EVIL}/{NAME_EVIL}"],
        ["--data.train_dataset", "twice.parquet"],
        ["--data.train_dataset", "twice.csv"],
        ["--data.train_dataset", "wrapped.json"],
        ["--data.train_dataset", good, "--data.tokenizer", f"./{NAME_EVIL}"],
        ["--data.train_dataset", good, "--model.name_or_path", f"./{NAME_EVIL}"],
        ["--data.train_dataset", good, "--data.format", NAME_EVIL],
        ["--data.train_dataset", good, "--data.prompt_template", f"{{{NAME_EVIL}}}"],
        ["--data.train_dataset", good, "--data.chat_template", f"./{NAME_EVIL}"],
        ["--data.train_dataset", good, "--ckpt_path", f"{NAME_EVIL}.ckpt"],
        [f"--data.{NAME_EVIL}", "1"],
    ):
        code, out, err = run("fit", *args)
        assert code == 2, args
        check(out)
        check(err, progress=True)
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err


def test_what_a_template_raises_is_visible(run, tmp_path, write_rows):
    turns = [[{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}] for i in range(30)]
    path = write_rows([{"messages": messages} for messages in turns])
    template = (
        "{% for m in messages %}{% if m.content == 'q 7' %}{{ raise_exception('" + NAME_EVIL + "') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
    args = ("--data.train_dataset", path, "--data.chat_template", "t.jinja")
    code, out, err = run("fit", *args)
    assert code == 2 and "the chat template refuses it: " in err
    check(out + err, progress=True)
    code, out, err = run("inspect", *args, "--data.on_bad_row", "skip")
    assert code == 0 and "1 chat template" in out + err
    check(out + err, progress=True)


def test_a_fit_on_hostile_rows_prints_no_code_of_theirs(run, tmp_path, write_rows):
    path = write_rows([*rows_with(EVIL), {EVIL: 1}], f"{NAME_EVIL}.jsonl")
    code, out, err = run(
        "fit", "--data.train_dataset", path, "--data.on_bad_row", "skip", "--trainer.max_steps", "1",
        "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(tmp_path / NAME_EVIL),
    )  # fmt: skip
    assert code == 0
    check(out + err, progress=True)
    assert "warning: " in err and "1 missing column" in err and "report: " in err and "\\x1b]52" in err


@pytest.mark.slow
def test_warnings_logs_and_tracebacks_of_a_process_are_visible():
    code = f"""
import sys
from dpo_lightning.cli import entry as cli
from dpo_lightning.visible import show_only_visible
show_only_visible()
try:
    cli.run(["inspect", "--nonsense"])
except cli.UserError:
    pass
import logging, warnings
evil = {EVIL!r}
logging.getLogger("some.library").warning("%s", evil)
try:
    raise KeyError("inner" + evil)
except KeyError:
    logging.getLogger("other").exception("caught")
warnings.warn(evil)
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
rank_zero_warn(evil)
rank_zero_info(evil)
raise RuntimeError(evil)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=REPO)
    text = (done.stdout + done.stderr).decode()
    check(text)
    assert text.count("\\x1b]52;c;") >= 6
