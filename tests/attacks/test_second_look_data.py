"""A second look at what comes from outside: templates, data files, replies and SQL that were made to hurt."""

import json

import pytest

from conftest import REPO, ROWS
from dpo_lightning.cli.entry import main
from dpo_lightning.data import rendering
from dpo_lightning.data.chat import ChatTemplate
from dpo_lightning.data.sources import open_source
from dpo_lightning.errors import UserError

CHAT = [[{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}] for i in range(20)]
PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if not loop.last %}|{% endif %}{% endfor %}"


@pytest.fixture
def command(tmp_path, monkeypatch, model_folder, capsys):
    """Runs a command on a data set; gives its exit code, what it printed and its `error: ` lines."""
    monkeypatch.chdir(tmp_path)

    def call(name, data, *args):
        argv = [name, "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model_folder)]
        argv += ["--data.train_dataset", str(data), "--data.max_length", "128", "--trainer.accelerator", "cpu"]
        argv += ["--data.val_size", "2", "--data.test_size", "2", "--data.batch_size", "2", "--trainer.max_steps", "1"]
        argv += ["--trainer.enable_progress_bar", "false", "--model.max_new_tokens", "4"]
        code = main([*argv, *args])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, [line for line in captured.err.splitlines() if line.startswith("error: ")]

    return call


# ---------------------------------------------------------------------- chat templates


@pytest.fixture
def one_second(monkeypatch):
    """Little time for templates; the process that knows it ends with the test."""
    rendering._WORKER.end()
    monkeypatch.setattr(rendering._WORKER, "seconds", 0.5)
    yield
    rendering._WORKER.end()


@pytest.mark.parametrize(
    "endless",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(50) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{{ '%99999999999d' % 1 }}",
        "{{ 'a' | center(10**11) }}",
        "{{ lipsum(n=10**9) }}",
    ],
)
def test_a_chat_template_neither_hangs_nor_fills_the_memory(one_second, command, write_rows, tmp_path, endless):
    on_one_row = "{% if messages[0].content == 'q 7' %}" + endless + "{% endif %}"
    (tmp_path / "t.jinja").write_text((on_one_row if "range" in endless else endless) + PLAIN)
    code, _, errors = command(
        "inspect", write_rows([{"messages": turns} for turns in CHAT]), "--data.chat_template", "t.jinja",
        "--data.on_bad_row", "skip",
    )  # fmt: skip
    assert code == 2 and len(errors) == 1 and "the chat template takes more than 0.5 seconds or 512 MiB" in errors[0]


def test_a_strangers_model_folder_cannot_stop_chat_with_its_template(one_second, tokenizer, monkeypatch):
    from dpo_lightning.data.prompt_format import PromptFormat

    monkeypatch.setattr(tokenizer, "chat_template", "{{ 'x' * 10**10 }}" + PLAIN, raising=False)
    with pytest.raises(UserError, match="the chat template takes more than"):
        PromptFormat(True).prompt("q", "", tokenizer)


def test_templates_render_as_transformers_renders_them(tokenizer):
    template = (
        "{{ bos_token }}{% for m in messages %}\n  {%- if m['role'] == 'user' %}U {{ m.content | trim | tojson }}\n"
        "{% else %}{% generation %}A {{ m.content }}{% endgeneration %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A {% endif %}{{ tools is none }}"
    )
    turns = [{"role": "user", "content": " é\u2028\x00<&>\n "}, {"role": "assistant", "content": "\U0001f600\r\n x"}]
    chats = [(turns[:1], True), (turns, False)]
    assert rendering.render_chats(tokenizer, template, chats) == [
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=follows)
        for messages, follows in chats
    ]


def test_the_process_of_templates_comes_back_after_it_was_killed(tokenizer):
    chat = ChatTemplate(tokenizer, PLAIN + "{% if add_generation_prompt %}|<|assistant|>{% endif %}")
    pair = chat.pair(CHAT[0][:1], CHAT[0][1:], [])
    rendering._WORKER._process.kill()
    assert chat.pair(CHAT[0][:1], CHAT[0][1:], []) == pair and pair.prompt == "<|user|>q 0|<|assistant|>"


# ---------------------------------------------------------------------- data files


def test_a_json_file_of_lines_whose_first_is_broken_off_loses_that_line_alone(tmp_path, command):
    lines = [json.dumps(row) for row in ROWS]
    for first in ('{"question": "a",', "{", '{"question": "a"'):
        path = tmp_path / "rows.json"
        path.write_text("\n".join([first, *lines]) + "\n")
        code, out, errors = command("inspect", path, "--data.on_bad_row", "skip")
        assert code == 0, errors
        source = open_source(str(path), "train")
        assert [row for number, row in source.rows() if number > 1] == ROWS
        code, _, errors = command("inspect", path)
        assert code == 2 and "rows.json, line 1: not valid JSON" in errors[0]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_file_of_very_many_columns_is_refused_in_a_short_line(tmp_path, command, kind):
    names = [f"c{i}" for i in range(60_000)]  # counting each of them among all of them took minutes
    table = ",".join(names) + "\n" + ",".join("x" for _ in names)
    text = table if kind == "csv" else json.dumps(dict.fromkeys(names, "x"))
    (tmp_path / f"wide.{kind}").write_text(text + "\n")
    code, _, errors = command("inspect", f"wide.{kind}")
    assert code == 2 and "'c19' and 59,980 more fit no data format" in errors[0] and len(errors[0]) < 1000


# ---------------------------------------------------------------------- SQL


@pytest.mark.parametrize(
    ("wanted", "reply", "same"),
    [
        ("SELECT sum(a) FROM t", "SELECT total(a) FROM t", False),
        ("SELECT total(t.a) FROM t WHERE b = 'x'", "SELECT sum(t.a) FROM t WHERE b = 'x'", False),
        ("SELECT sum(a) FROM t WHERE b = 'x'", "SELECT coalesce(sum(a), 0) FROM t WHERE b = 'x'", False),
        ("SELECT sum(a) FROM t WHERE b = 'x'", "SELECT sum(t.a) FROM t WHERE 'x' = b", True),
        ("SELECT sum(a) FROM t GROUP BY b", "SELECT SUM(a) FROM t GROUP BY t.b", True),
    ],
)
def test_a_sum_of_nothing_is_not_a_total_of_nothing(wanted, reply, same):
    from sql_verdicts import same_result

    assert same_result(reply, wanted, "CREATE TABLE t (a INT, b TEXT)") is same


# ---------------------------------------------------------------------- the report and the closing line


def test_charts_of_any_numbers_are_drawn_or_left_out():
    from dpo_lightning.callbacks.report.charts import histogram, line_chart, ticks

    for values in ([1e308, -1e308], [5e-324, 1e-323], [float("nan"), 1.0], [float("inf"), 3e38], [0.0, 5e-324]):
        assert "Infinity" not in line_chart("t", {"a": list(enumerate(values))})
        histogram("t", {"a": values})
    assert ticks(5e-324, 1e-323)[0] < 0 < ticks(5e-324, 1e-323)[-1]
    assert "<svg" in line_chart("t", {"a": [(0, 3e38), (1, -3e38), (2, 1e308)]})


@pytest.mark.parametrize("counts", [None, {}, {"sql/valid": 3}])
@pytest.mark.parametrize("shares", [{}, {"reply/eos_rate": float("nan")}, {"sql/valid": 0.5}])
def test_the_closing_lines_are_said_whatever_a_checkpoint_kept_of_replies(counts, shares):
    from dpo_lightning.callbacks.replies import Showing
    from dpo_lightning.callbacks.report.outcome import closing_lines

    showings = [Showing(step, [], [], shares, counts, 0) for step in (0, 3)]
    lines = closing_lines(showings, 3, {"report": "r.html"})
    assert "nan" not in lines and lines.endswith("\nreport: r.html")
