"""Judged replies become pairs, or a reason why not; wrong replies are counted by what is wrong with them."""

import pytest

from dpo_lightning.judging.verified import (
    NOT_RIGHT,
    NOT_WRONG,
    UNJUDGED,
    HeldOut,
    Judged,
    Rule,
    make_pair,
    mean_score,
    mistakes,
    turned,
)

ANSWER = Judged(" data", None)
RIGHT, OTHER_RIGHT = Judged(" right", 1.0, -5.0), Judged(" right too", 1.0, -2.0)
LIKELY, OFTEN = Judged(" likely", 0.0, -1.0), Judged(" often", 0.0, -9.0)
UNKNOWN = Judged(" who knows", None, -0.1)


@pytest.mark.parametrize(
    ("replies", "rule", "pair"),
    [
        ([RIGHT, LIKELY, OFTEN, OFTEN], Rule(), (" data", " likely")),
        ([RIGHT, LIKELY, OFTEN, OFTEN], Rule(rejected="frequent"), (" data", " often")),
        ([RIGHT, OTHER_RIGHT, OFTEN], Rule(chosen="own"), (" right too", " often")),
        ([UNKNOWN, LIKELY], Rule(chosen="own"), (" data", " likely")),  # none of its own is right
        ([RIGHT, RIGHT], Rule(), NOT_WRONG),
        ([RIGHT, UNKNOWN], Rule(), NOT_WRONG),
        ([UNKNOWN, UNKNOWN], Rule(), UNJUDGED),
        ([Judged("data ", 0.0)], Rule(), NOT_WRONG),  # the judge says so of the answer itself
        ([Judged(" half \ud83d", 0.0, -1.0), OFTEN], Rule(), (" data", " often")),  # no file can hold the first
        ([Judged("", 0.0, -1.0), OFTEN], Rule(), (" data", "")),
        ([Judged("", 1.0, -1.0), OFTEN], Rule(chosen="own"), (" data", " often")),  # nothing cannot be chosen
    ],
)
def test_the_pair_of_a_prompt(replies, rule, pair):
    assert make_pair(ANSWER, replies, rule) == pair


@pytest.mark.parametrize(
    ("replies", "rule", "pair"),
    [
        ([RIGHT, OTHER_RIGHT, LIKELY], Rule(), (" right too", " likely")),
        ([UNKNOWN, LIKELY], Rule(), NOT_RIGHT),
        ([Judged(" ", 1.0), LIKELY], Rule("own"), NOT_RIGHT),
        ([RIGHT], Rule(), NOT_WRONG),
        ([Judged(" best", 7.0), LIKELY], Rule(margin=2.0), (" best", " likely")),
    ],
)
def test_where_the_data_have_no_answer_the_models_own_is_chosen(replies, rule, pair):
    assert make_pair(Judged("", 0.0), replies, rule) == pair


BEST, MIDDLE, WORST = Judged(" best", 7.5), Judged(" middle", 3.0), Judged(" worst", -2.0)


@pytest.mark.parametrize(
    ("answer", "rule", "pair"),
    [
        (5.0, Rule("own", margin=2.0), (" best", " worst")),
        (5.0, Rule("data", margin=2.0), (" data", " worst")),
        (5.0, Rule("data", margin=8.0), NOT_WRONG),
        (5.0, Rule("own", margin=9.5), (" best", " worst")),
        (5.0, Rule("own", margin=9.6), NOT_WRONG),
        (-2.0, Rule("data", margin=0.0), NOT_WRONG),
        (None, Rule("data", margin=2.0), UNJUDGED),
        (None, Rule("own", margin=2.0), (" best", " worst")),
    ],
)
def test_scores_give_the_best_against_the_worst(answer, rule, pair):
    assert make_pair(Judged(" data", answer), [MIDDLE, WORST, UNKNOWN, BEST], rule) == pair


def reply(score, stopped=True, **verdicts):
    return HeldOut("p", "w", "r", stopped, score, {f"sql/{name}": value for name, value in verdicts.items()})


def test_each_wrong_reply_is_counted_once_in_what_is_wrong_with_it():
    lines = [
        reply(1.0, valid=True, exact=False, execution=True),  # so not being exact is no mistake
        reply(1.0, valid=True, exact=True, execution=True),
        reply(0.0, valid=False, exact=False, execution=False),
        reply(0.0, valid=True, exact=False, execution=False),
        reply(0.0, valid=True, exact=False, execution=False),
        reply(0.0, stopped=False, valid=False, exact=False, execution=False),
        reply(0.0),
        reply(None, valid=True, exact=False),
    ]
    assert mistakes(lines) == {"not same result": 2, "not valid": 1, "cut off": 1, "wrong": 1}
    assert mean_score(lines) == 2 / 7
    assert mean_score([reply(None)]) is None


def test_what_turned_right_and_what_turned_wrong():
    before = [reply(score) for score in (0.0, 1.0, 1.0, None, 0.0)]
    after = [reply(score) for score in (1.0, 0.0, 1.0, 1.0, 0.0)]
    assert turned(before, after) == ([0], [1])
