import json

import pytest

from dpo_lightning.cli.entry import main
from dpo_lightning.data.prompt_format import PromptFormat
from dpo_lightning.data.speakers import Sampling, load_speakers
from dpo_lightning.errors import UserError
from dpo_lightning.judging.judge import find_score
from dpo_lightning.page.prompts import read_prompts
from dpo_lightning.page.tasks import TaskMaker

TEMPLATE = PromptFormat(False, "{context}\nQ: {question}\nA:")
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=8)


@pytest.fixture(scope="module")
def speaker(model_folder):
    (speaker,) = load_speakers(str(model_folder), None, False)
    return speaker


def test_questions_are_asked_as_in_training(write_rows, tokenizer):
    rows = [{"question": f"Who is {n}?", "context": "a b", "answer": "c"} for n in (1, 2, 1)]
    (first, second), repeated = read_prompts(write_rows(rows), TEMPLATE, tokenizer)
    assert (first.pair.prompt, first.question, first.context) == ("a b\nQ: Who is 1?\nA:", "Who is 1?", "a b")
    assert first.pair.chosen == " c" and first.rendered and repeated == 1
    assert first.key != second.key


def test_plain_prompts_are_left_as_they_are_but_for_chat_models(write_rows, tokenizer, tmp_path):
    name = write_rows([{"prompt": "Hello", "chosen": "Hi", "rejected": "No", "context": "c"}])
    ((plain,), _) = read_prompts(name, TEMPLATE, tokenizer)
    assert (plain.pair.prompt, plain.question, plain.context, plain.rendered) == ("Hello", "Hello", "", False)
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    ((asked,), _) = read_prompts(name, PromptFormat(True), tokenizer)
    assert (asked.pair.prompt, asked.pair.chat, asked.question) == ("[Hello]", True, "Hello")
    lines = tmp_path / "questions.txt"
    lines.write_text("Who?\n\n Where? \nWho?\n")
    prompts, repeated = read_prompts(str(lines), TEMPLATE, tokenizer)
    assert [prompt.pair.prompt for prompt in prompts] == ["\nQ: Who?\nA:", "\nQ: Where?\nA:"] and repeated == 1


def test_prompts_that_cannot_be_read_are_named(write_rows, tokenizer, tmp_path):
    for content in ([{"text": "a"}], [{"prompt": "a"}, {"prompt": ""}], ["not JSON"]):
        with pytest.raises(UserError, match="rows.jsonl"):
            read_prompts(write_rows(content), TEMPLATE, tokenizer)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("latin.txt", "empty.txt", "none.txt"):
        with pytest.raises(UserError, match=name):
            read_prompts(str(tmp_path / name), TEMPLATE, tokenizer)


def test_tasks_are_the_same_in_every_run_and_their_order_is_drawn(speaker, write_rows, tokenizer):
    rows = [{"question": f"Who is {n}?", "context": "a", "answer": "c"} for n in range(8)]
    prompts, _ = read_prompts(write_rows(rows), TEMPLATE, tokenizer)
    score = find_score("exact")
    tasks = [TaskMaker([("m", speaker)], SAMPLING, 1, score=score)(prompt) for prompt in prompts]
    again = TaskMaker([("m", speaker)], SAMPLING, 1, score=score)
    assert [again(prompt) for prompt in prompts] == tasks
    assert all(one.replies[0].text != one.replies[1].text for one in tasks)
    assert {tuple(reply.sample for reply in one.replies) for one in tasks} == {(0, 1), (1, 0)}
    assert tasks[0].replies[0].verdicts["exact/match"] is False and tasks[0].replies[0].score == 0.0
    other = TaskMaker([("m", speaker)], SAMPLING, 2)(prompts[0])
    assert {reply.text for reply in other.replies} != {reply.text for reply in tasks[0].replies}
    assert TaskMaker([("m", speaker)], SAMPLING, 1, pairs=False)(prompts[0]).replies[0].sample == 0


def test_two_models_give_a_reply_each_and_equal_ones_are_drawn_again(speaker, write_rows, tokenizer):
    prompts, _ = read_prompts(write_rows([{"prompt": "a"}]), TEMPLATE, tokenizer)
    greedy = SAMPLING._replace(temperature=0.0)
    assert TaskMaker([("m", speaker), ("n", speaker)], greedy, 1)(prompts[0]) is None
    sharp = SAMPLING._replace(temperature=0.01, max_new_tokens=1)
    assert TaskMaker([("m", speaker)], sharp, 1)(prompts[0]) is None
    task = TaskMaker([("m", speaker), ("n", speaker)], SAMPLING, 1)(prompts[0])
    assert {reply.model for reply in task.replies} == {"m", "n"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mode", "thumbs", "--next", "disagree"], "leave --model_b and --next disagree out"),
        (["--mode", "thumb"], "one of pairs, thumbs; did you mean 'thumbs'?"),
        (["--temperature", "0"], "--temperature 0 makes the same reply twice"),
        (["--temperature", "-1"], "it must be 0 or more"),
        (["--output", "labels.csv"], "must end in .jsonl"),
        (["--host", "0.0.0.0"], "needs --token"),
        (["--token", "short"], "at least 16 characters"),
        (["--port", "99999"], "give another --port"),
        (["--judge", "sqll"], "did you mean 'sql'?"),
        (["--model", "/no/such"], "there is no such folder"),
        (["--outptu", "x.jsonl"], "did you mean --output?"),
    ],
)
def test_mistakes_are_answered_in_one_line(options, words, tmp_path, monkeypatch, capsys):
    pytest.importorskip("starlette", reason="the page needs the extra `ui`")
    monkeypatch.chdir(tmp_path)
    args = ["label", "--model", "/no/such", "--prompts", "rows.jsonl", "--port", "7999", *options]
    assert main(args) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["label", "--model", "m", "--prompts", "rows.jsonl"]) == 2
    assert "pip install starlette uvicorn" in capsys.readouterr().err


def test_labels_of_another_program_are_kept(tmp_path, monkeypatch, capsys):
    pytest.importorskip("starlette", reason="the page needs the extra `ui`")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.jsonl").write_text(json.dumps({"prompt": "mine"}) + "\n")
    assert main(["label", "--model", "/no/such", "--prompts", "rows.jsonl", "--port", "7998"]) == 2
    assert "set --output" in capsys.readouterr().err
    assert (tmp_path / "labels.jsonl").read_text() == '{"prompt": "mine"}\n'
