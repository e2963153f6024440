"""Chat at the keyboard: its commands, Ctrl-C, bytes and settings that are wrong. Never a traceback."""

import builtins
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attacked import error_line
from conftest import REPO
from dpo_lightning.cli import chat_prompts
from dpo_lightning.cli.chat import converse, show
from dpo_lightning.cli.entry import main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def piped(text):
    """Standard input as a pipe gives it."""
    return io.TextIOWrapper(io.BytesIO(text), encoding="utf-8")


class Keyboard(io.StringIO):
    """Lines that are typed; an exception among them is a key."""

    def __init__(self, monkeypatch, *keys):
        super().__init__()
        keys = iter(keys)

        def read(prompt=""):
            key = next(keys, EOFError())
            if isinstance(key, str):
                return key
            raise key

        monkeypatch.setattr(builtins, "input", read)

    def isatty(self):
        return True


@pytest.fixture
def talk():
    """Converses and gives the prompts that were asked."""

    def converse_on(lines, reply=lambda prompt: iter(["ok"])):
        asked = []

        def answer(prompt):
            asked.append(prompt)
            return reply(prompt)

        converse({"policy": answer}, lambda question, schema: f"{schema}|{question}", "", lines)
        return asked

    return converse_on


# ---------------------------------------------------------------------- commands


@pytest.mark.parametrize("end", ["exit", "quit", "/exit", "/quit", " exit "])
def test_a_word_ends_it(talk, monkeypatch, end):
    assert talk(Keyboard(monkeypatch, "one", end, "two")) == ["|one"]
    assert talk(io.StringIO(f"one\n{end}\ntwo\n")) == ["|one"]


def test_questions_that_only_begin_with_such_a_word_are_asked(talk):
    assert talk(io.StringIO("exit row of the table?\nquits?\n")) == ["|exit row of the table?", "|quits?"]


def test_help_and_unknown_commands_ask_nothing(talk, monkeypatch, capsys):
    assert talk(Keyboard(monkeypatch, "/help", "/hlep me", "/schemas T", "", "   ", "one")) == ["|one"]
    said = capsys.readouterr()
    assert said.out.count("/schema CREATE TABLE") == 2  # at the start, and when asked for
    assert "/hlep is not a command: /help" in said.err and "/schemas is not a command" in said.err


def test_lines_of_a_pipe_give_replies_alone_on_stdout(talk, capsys):
    assert talk(io.StringIO("/nope\n\n/schema T\none\n")) == ["T|one"]
    assert capsys.readouterr().out == "policy: ok\n"


def test_a_question_keeps_its_blanks(talk):
    assert talk(io.StringIO(" one \r\ntwo")) == ["| one ", "|two"]


# ---------------------------------------------------------------------- keys


def test_ctrl_c_stops_the_reply_that_is_coming_and_nothing_else(talk, monkeypatch, capsys):
    closed = []

    def reply(prompt):
        try:
            yield "first half,"
            if "one" in prompt:
                raise KeyboardInterrupt
            yield " second half"
        finally:
            closed.append(prompt)

    assert talk(Keyboard(monkeypatch, "one", "two"), reply) == ["|one", "|two"]
    assert closed == ["|one", "|two"]
    out = capsys.readouterr().out
    assert "first half, [stopped]\n" in out and "first half, second half\n" in out


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_stops_one_of_two_replies(monkeypatch, capsys, terminal):
    def rambling():
        yield "so"
        raise KeyboardInterrupt

    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    show({"reference": rambling(), "policy": iter(["SELECT"])}, stoppable=True)
    out = capsys.readouterr().out
    assert "so [stopped]" in out and "SELECT" in out


@pytest.mark.parametrize("key", [KeyboardInterrupt(), EOFError()])
def test_ctrl_c_and_ctrl_d_at_the_prompt_end_it(talk, monkeypatch, key):
    assert talk(Keyboard(monkeypatch, "one", key, "two")) == ["|one"]


def test_ctrl_c_ends_what_comes_from_a_pipe(talk):
    def reply(prompt):
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        talk(io.StringIO("one\ntwo\n"), reply)


def test_lines_are_edited_and_remembered_where_python_can(talk, monkeypatch):
    monkeypatch.delitem(sys.modules, "readline", raising=False)
    talk(Keyboard(monkeypatch, "exit"))
    assert "readline" in sys.modules
    monkeypatch.setitem(sys.modules, "readline", None)  # as on Windows
    assert talk(Keyboard(monkeypatch, "one")) == ["|one"]


# ---------------------------------------------------------------------- bytes


def test_bytes_that_are_no_utf8_are_shown_as_such(talk, capsys):
    assert talk(piped("caf\u00e9\n".encode("latin-1") + "caf\u00e9\n".encode() + b"\xff\xfe\n")) == [
        "|caf\ufffd",
        "|caf\u00e9",
        "|\ufffd\ufffd",
    ]
    said = capsys.readouterr().err
    assert "line 1 has bytes that are not UTF-8" in said and "line 3" in said and "line 2" not in said


def test_such_bytes_reach_a_model(model_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", piped(b"Which n\xe4me?\n\x00\n"))
    assert main(["chat", "--model", str(model_folder), "--max_new_tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("policy: ") == 2 and "line 1 has bytes" in captured.err


def test_a_byte_order_mark_is_no_part_of_a_question(talk):
    assert talk(piped(b"\xef\xbb\xbfone\n")) == ["|one"]


def test_a_line_that_never_ends_is_left_out(talk, capsys):
    assert talk(piped(b"x" * 3_000_000 + b"\none\n")) == ["|one"]
    assert "line 1 has more than 1,000,000 characters" in capsys.readouterr().err


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "template",
    [
        "{nope}",
        "{question",
        "{question:>999999999}",
        "{question.__class__}",
        "{question[0]}",
        "{question!r}",
        "{}",
        "{answer} {question}",
        "no question at all",
        "",
        "{question}" + "x" * 200_000,
    ],
)
def test_a_template_is_checked_before_the_model_is_loaded(template, monkeypatch, capsys):
    monkeypatch.setattr(chat_prompts, "load_speakers", lambda *_: pytest.fail("the model was loaded"))
    assert main(["chat", "--model", "anything", "--prompt_template", template]) == 2
    line = error_line(capsys)
    assert "--prompt_template" in line and len(line) < 500


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "many"])
def test_a_number_of_tokens_that_is_none(number, capsys):
    assert main(["chat", "--model", "anything", "--max_new_tokens", number]) == 2
    assert "max_new_tokens" in error_line(capsys)


def test_more_tokens_than_the_model_has_positions_are_no_traceback(model_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Which name?\n"))
    assert main(["chat", "--model", str(model_folder), "--max_new_tokens", "100000"]) == 0
    assert "policy: " in capsys.readouterr().out


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}", "{{ 1/0 }}", ""])
def test_a_chat_template_that_fails_is_one_line(model_folder, monkeypatch, capsys, template):
    shutil.copytree(model_folder, "chatty")
    Path("chatty", "chat_template.jinja").write_text(template)
    Path("chatty", "dpo_lightning.json").write_text('{"chat": true}')
    monkeypatch.setattr("sys.stdin", io.StringIO("Which name?\n"))
    assert main(["chat", "--model", "chatty"]) == 2
    assert len(error_line(capsys)) < 500


# ---------------------------------------------------------------------- what is no model


def checkpoint(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({}, path)
    return path


@pytest.mark.parametrize("option", ["--model", "--reference"])
def test_a_checkpoint_is_to_be_exported_first(model_folder, capsys, option):
    path = checkpoint(Path("version_3", "checkpoints", "last.ckpt"))
    args = {"--model": str(model_folder)} | {option: str(path)}
    assert main(["chat", *(arg for pair in args.items() for arg in pair)]) == 2
    line = error_line(capsys)
    assert option in line and f"export --ckpt_path {path} --output_dir" in line


def test_a_run_that_wrote_no_model(capsys):
    path = checkpoint(Path("version_3", "checkpoints", "last.ckpt"))
    for folder in ("version_3", "version_3/checkpoints"):
        assert main(["chat", "--model", folder]) == 2
        assert f"export --ckpt_path {path} --output_dir" in error_line(capsys)


@pytest.mark.parametrize("name", ["notes.txt", "empty"])
def test_neither_a_model_nor_a_run(capsys, name):
    Path("notes.txt").write_text("notes")
    Path("empty").mkdir()
    assert main(["chat", "--model", name]) == 2
    assert name in error_line(capsys)


# ---------------------------------------------------------------------- trust

CODE = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
Path({marker!r}).write_text("ran")
class OwnConfig(GPT2Config): pass
class OwnModel(GPT2LMHeadModel): config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""
AUTO = {
    "config.json": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    "tokenizer_config.json": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
}


@pytest.mark.parametrize("own_type", [False, True])
def test_nothing_in_a_folder_turns_its_code_on(model_folder, monkeypatch, capsys, tmp_path, own_type):
    folder, marker = shutil.copytree(model_folder, "evil"), tmp_path / "the code of a stranger ran"
    Path(folder, "own.py").write_text(CODE.format(marker=str(marker)))
    for name, auto_map in AUTO.items():
        values = json.loads(Path(folder, name).read_text()) | {"auto_map": auto_map, "trust_remote_code": True}
        values |= {"model_type": "own"} if own_type and name == "config.json" else {}
        Path(folder, name).write_text(json.dumps(values))
    prompt_format = {
        "chat": False,
        "prompt_template": "{question}",
        "trust_remote_code": True,
        "format": "own:OwnModel",
    }
    Path(folder, "dpo_lightning.json").write_text(json.dumps(prompt_format))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.stdin", io.StringIO("Which name?\n"))
    code = main(["chat", "--model", str(folder), "--max_new_tokens", "2"])
    assert "Traceback" not in capsys.readouterr().err
    assert code == (2 if own_type else 0) and not marker.exists()


# ---------------------------------------------------------------------- a whole process


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_conversation_on_a_terminal(model_folder):
    """Arrow-up asks the last line again, Ctrl-D ends."""
    import pty

    leader, follower = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(REPO / "src"), "TERM": "xterm", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_lightning", "chat", "--model", str(model_folder), "--max_new_tokens", "1"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
        close_fds=True,
        start_new_session=True,
    )
    os.close(follower)
    said = b""

    def until(text):
        nonlocal said
        while text not in said:
            said += os.read(leader, 4096)
        said = said[said.index(text) + len(text) :]

    until(b"> ")
    os.write(leader, b"Which name?\n")
    until(b"policy")
    until(b"> ")
    os.write(leader, b"\x1b[A")  # arrow up
    until(b"Which name?")
    os.write(leader, b"\n")
    until(b"policy")
    until(b"> ")
    os.write(leader, b"\x04")
    assert process.wait(60) == 0
    os.close(leader)
