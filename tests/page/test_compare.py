"""The comparison of two models, with replies and judges made up."""

import json
from collections import Counter

import pytest

from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.errors import UserError
from dpo_lightning.judging.judge import find_score
from dpo_lightning.models.reply import Reply
from dpo_lightning.page.compare import Comparison
from dpo_lightning.page.prompts import Prompt
from dpo_lightning.page.work import Work

PROMPTS = [Prompt(str(row), PreferencePair(f"question {row}", "right", "")) for row in range(1, 21)]


@pytest.fixture
def work():
    work = Work()
    yield work
    work.end()


def reply(text):
    return Reply(text, [1], True)


def good_and_bad(prompt):
    return reply("right"), reply(f"wrong {prompt.question}")


@pytest.fixture
def compare(tmp_path, work):
    def make(replies=good_and_bad, names=("new", "old"), settings=None, **options):
        return Comparison(names, PROMPTS, replies, tmp_path / "verdicts.jsonl", work, settings or {}, **options)

    return make


def lines(comparison):
    return [json.loads(line) for line in comparison.file.read_text().splitlines()]


def prefer_right(comparison, count):
    """A person who knows what is right decides on some prompts; how often that was on the left."""
    sides = Counter()
    for _ in range(count):
        item = comparison.next()["item"]
        side = "left" if item["left"]["text"] == "right" else "right"
        sides[side] += 1
        comparison.answer(item["id"], side)
    return sides["left"]


def test_a_person_decides_blind_and_the_win_rate_is_that_of_model_a(compare):
    comparison = compare()
    item = comparison.next()["item"]
    assert set(item) == {"id", "question", "context", "left", "right"}  # nothing that tells whose reply is whose
    assert 1 <= prefer_right(comparison, 20) <= 19  # all on one side: once in 500,000 tries
    assert comparison.next()["item"] is None
    person = comparison.state()["person"]
    assert (person["wins"], person["losses"], person["ties"], person["rate"]) == (20, 0, 0, 1.0)
    assert person["decided"] and 0.8 < person["low"] < 1
    for line in lines(comparison):
        assert line["verdict"] == "a" and (line["a"], line["b"]) == ("new", "old") and line["left"] in "ab"
        assert line["reply_a"] == "right" and line["prompt"].startswith("question ")


def test_the_first_prompts_are_a_random_sample_and_the_same_one_again(compare):
    order = [prompt.key for prompt in compare().prompts]
    assert order == [prompt.key for prompt in compare().prompts] != [prompt.key for prompt in PROMPTS]
    assert order != [prompt.key for prompt in compare(seed=1).prompts]


def test_a_comparison_goes_on_where_it_stopped(compare):
    first = compare()
    prefer_right(first, 3)
    item = first.next()["item"]
    with first.file.open("a") as file:
        file.write('{"key": "7", "by": "per')  # a kill in the middle of a line
    again = compare()
    assert again.state()["person"]["wins"] == 3
    assert again.next()["item"] == item
    again.answer(item["id"], "tie")  # as of a tab that was open all the time
    assert len(lines(again)) == 4 and again.state()["person"]["ties"] == 1


def test_a_verdict_on_replies_that_are_others_now_is_refused(compare):
    item = compare().next()["item"]
    for other in (compare(lambda prompt: (reply("new"), reply("newer"))), compare(seed=3)):
        with pytest.raises(UserError, match="others now"):
            other.answer(item["id"], "left")
        with pytest.raises(UserError, match="others now"):
            other.answer("../x", "left")
        assert not other.file.exists() or not other.file.read_text()


def test_verdicts_on_other_models_or_settings_stay_in_the_file_and_do_not_count(compare):
    prefer_right(compare(), 2)
    other = compare(settings={"temperature": 1})
    assert other.state()["person"]["rate"] is None
    prefer_right(other, 1)
    assert compare().state()["person"]["wins"] == 2 and len(lines(other)) == 3


def test_the_last_verdict_can_be_taken_back_and_given_again(compare):
    comparison = compare()
    prefer_right(comparison, 2)
    prompt = comparison.next()["item"]["question"]
    comparison.answer(comparison.next()["item"]["id"], "tie")
    back = comparison.undo()
    assert back["item"]["question"] == prompt and back["state"]["person"]["ties"] == 0
    assert compare().next()["item"]["question"] == prompt  # also after a kill
    prefer_right(comparison, 1)
    assert comparison.state()["person"]["wins"] == 3 and len(lines(comparison)) == 5  # nothing is overwritten
    assert compare(settings={"seed": 1}).undo()["item"] is not None  # nothing to take back


def test_a_second_tab_shows_the_same_order_and_the_later_verdict_counts(compare):
    comparison = compare()
    one, two = comparison.next()["item"], comparison.next()["item"]
    assert one == two
    comparison.answer(one["id"], "left")
    comparison.answer(two["id"], "tie")
    person = comparison.state()["person"]
    assert (person["wins"] + person["losses"], person["ties"]) == (0, 1)


def test_the_same_reply_twice_is_a_tie_that_nobody_is_asked_about(compare):
    comparison = compare(lambda prompt: (reply("x"), reply("x" if int(prompt.question) % 2 else "y")))
    calls = 0
    while (found := comparison.next())["more"]:
        calls += 1
        if found["item"]:
            comparison.answer(found["item"]["id"], "tie")
    assert calls == 20  # so the page can tell how far it is
    person = comparison.state()["person"]
    assert (person["ties"], person["same"]) == (20, 10)


def test_the_judge_compares_without_a_person_and_goes_on(compare):
    made = []

    def replies(prompt):
        made.append(prompt.key)
        return reply("right"), reply("right" if int(prompt.question) <= 5 else "wrong")

    comparison = compare(replies, score=find_score("exact"))
    going = comparison.judge()
    for _ in range(4):
        next(going)
    going.close()
    again = compare(replies, score=find_score("exact"))
    assert again.state()["judge"]["ties"] + again.state()["judge"]["wins"] == 3
    judge = list(again.judge())[-1]["judge"]
    assert (judge["wins"], judge["losses"], judge["ties"], judge["unknown"]) == (15, 0, 5, 0)
    assert judge["rate"] == 17.5 / 20 and ("exactly the wanted reply", "100%", "25%") in judge["means"]
    assert again.state()["person"]["rate"] is None and len(made) == 20  # no reply was made twice
    assert {line["by"] for line in lines(again)} == {"judge"}
    other = compare(replies, score=find_score({"exact": {"name": "loose", "ignore_case": True}}))
    assert other.state()["judge"]["rate"] is None


def test_where_the_judge_cannot_tell_is_counted_apart(compare):
    score = find_score("exact")
    score.read = lambda found: None
    judge = list(compare(score=score).judge())[-1]["judge"]
    assert judge["unknown"] == 20 and judge["rate"] is None


def test_an_error_of_a_model_is_the_users_and_can_be_tried_again(compare):
    failing = [True]

    def replies(prompt):
        if failing:
            raise UserError("the prompt has no tokens")
        return good_and_bad(prompt)

    comparison = compare(replies)
    with pytest.raises(UserError, match="no tokens"):
        comparison.next()
    failing.clear()
    assert comparison.next()["item"]


def test_hostile_texts_arrive_as_text_and_in_the_file(compare):
    bad = "<img src=x onerror=alert(1)>\x1b[2J\u202e\ud800"
    comparison = compare(lambda prompt: (reply(bad), reply("x" * 1_000_000)), names=(bad, "b"))
    found = comparison.next()
    text = json.dumps(found)
    assert "\\\\x1b" in text and "\\\\u202e" in text and "\x1b" not in found["state"]["names"][0]
    comparison.answer(found["item"]["id"], "left")
    assert lines(comparison)[0]["reply_a"] == bad


@pytest.mark.parametrize("content", ["not json\n", "[1]\n", '{"key": "1"}\nmy notes', "half of something"])
def test_a_file_of_something_else_is_refused_and_unchanged(compare, tmp_path, content):
    (tmp_path / "verdicts.jsonl").write_text(content)
    with pytest.raises(UserError, match="not a file of verdicts"):
        compare()
    assert (tmp_path / "verdicts.jsonl").read_text() == content
