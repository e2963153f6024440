import json

import pytest

pytest.importorskip("starlette", reason="the page needs the extra `ui`")
from starlette.testclient import TestClient

from dpo_lightning.data.prompt_format import PromptFormat
from dpo_lightning.data.speakers import Sampling, load_speakers
from dpo_lightning.page.server import page
from dpo_lightning.page.talk import Talk
from dpo_lightning.page.work import Work


@pytest.fixture(scope="module")
def ask(model_folder):
    """Asks one model, and returns what its view sends, line by line."""
    speakers = load_speakers(str(model_folder), None, False)
    talk = Talk(speakers, PromptFormat(False, "{context}|{question}"), Work(), Sampling(0.0, 1.0, 8))
    client = TestClient(page([talk.view()]), base_url="http://127.0.0.1:7865")

    def post(action="ask", **values):
        answer = client.post(f"/api/chat/{action}", json=values)
        return answer.status_code, [json.loads(line) for line in answer.text.splitlines()]

    return post


def test_a_question_becomes_the_prompt_of_training_and_the_reply_comes_in_pieces(ask):
    status, (prompt, *pieces) = ask(question="Which name?", schema="CREATE TABLE a (b INT)", max_new_tokens=8)
    assert status == 200 and prompt == {"prompt": "CREATE TABLE a (b INT)|Which name?", "cut": 0}
    assert len(pieces) > 1 and {piece["name"] for piece in pieces} == {"policy"}
    assert ask("about")[1][0]["names"] == ["policy"] and ask("about")[1][0]["schema"] is True


def test_what_is_cut_from_a_prompt_is_said(ask):
    _, (prompt, *_) = ask(question="x " * 200, max_new_tokens=28)  # of 128 positions
    assert prompt["cut"] > 0
    assert ask(question="x " * 200, max_new_tokens=38)[1][0]["cut"] == prompt["cut"] + 10


def test_sampling_is_the_askers(ask):
    def said(**sampling):
        return "".join(piece["text"] for piece in ask(question="Which?", max_new_tokens=6, **sampling)[1][1:])

    assert said(temperature=2.0, seed=1) == said(temperature=2.0, seed=1) != said(temperature=2.0, seed=2)
    assert said(temperature=0.0, seed=1) == said(temperature=0.0, seed=2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"max_new_tokens": 10**9}, "max_new_tokens is 1000000000: it must be from 1 to 100000"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"schema": None}, "schema is null"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(ask, values, words):
    status, (answer,) = ask(question="Which?", **values)
    assert status == 400 and answer["error"].startswith(words)


def test_hostile_questions_and_schemas_are_only_text(ask):
    bad = "{question.__class__}\x1b[2J\u202e<b>"
    _, (prompt, *_) = ask(question=bad, schema=bad, max_new_tokens=1)
    assert prompt["prompt"].count("{question.__class__}\\x1b[2J\\u202e<b>") == 2
