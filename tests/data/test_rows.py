import re
from collections import Counter

import numpy as np
import pytest

from dpo_lightning.data.formats import FORMATS, RowOptions, check_templates, find_format, row_to_pair
from dpo_lightning.data.rejected import shuffled_partners
from dpo_lightning.errors import UserError

OPTIONS = RowOptions()
ROW = {"question": "How many?", "context": "CREATE TABLE t (a INT)", "answer": "SELECT count(*) FROM t"}


def test_founding_row_becomes_prompt_and_spaced_answer_with_empty_rejected():
    pair = row_to_pair(ROW, FORMATS["sql_create_context"], OPTIONS, "f, row 1")
    assert pair.prompt == "CREATE TABLE t (a INT)\nQuestion: How many?\nAnswer:"
    assert pair.chosen == " SELECT count(*) FROM t"
    assert pair.rejected == ""
    assert pair.context == ROW["context"]


def test_standard_row_is_taken_as_it_is():
    row = {"prompt": "p ", "chosen": " c", "rejected": " r\n"}
    assert row_to_pair(row, FORMATS["preference"], OPTIONS, "f, row 1")[:3] == ("p ", " c", " r\n")


def test_templates_are_the_users():
    options = RowOptions("Q: {question} S: {context} A:", "\n{answer};")
    pair = row_to_pair(ROW, FORMATS["sql_create_context"], options, "f, row 1")
    assert pair[:2] == ("Q: How many? S: CREATE TABLE t (a INT) A:", "\nSELECT count(*) FROM t;")


def test_braces_in_a_row_are_text():
    pair = row_to_pair(ROW | {"question": "{answer} {0}"}, FORMATS["sql_create_context"], OPTIONS, "f, row 1")
    assert "{answer} {0}" in pair.prompt


@pytest.mark.parametrize(
    ("columns", "name", "found"),
    [
        (["answer", "context", "question"], None, "sql_create_context"),
        (["prompt", "chosen", "rejected", "score"], None, "preference"),
        (["prompt", "chosen", "rejected", "question", "context", "answer"], "preference", "preference"),
    ],
)
def test_format_is_found_from_columns_and_can_be_overridden(columns, name, found):
    assert find_format(columns, "f", name) == found


def test_prediction_needs_no_completions():
    assert find_format(["prompt"], "f", completions=False) == "preference"
    assert row_to_pair({"prompt": "p"}, FORMATS["preference"], OPTIONS, "f, row 1", completions=False).chosen == ""


@pytest.mark.parametrize(
    ("columns", "name", "message"),
    [
        (["text"], None, "f: columns 'text' fit no data format (sql_create_context needs question, context, answer;"),
        (
            ["question", "context"],
            "sql_create_context",
            "f: column 'answer' is missing for format 'sql_create_context'",
        ),
        (["prompt"], "alpaca", "unknown data format 'alpaca'"),
    ],
)
def test_columns_that_do_not_fit_are_named(columns, name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        find_format(columns, "f", name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "f, row 7, column 'answer': found null where text belongs"),
        ({"answer": 5}, "f, row 7, column 'answer': found int 5 where text belongs"),
        ({"answer": "  "}, "f, row 7: the chosen completion is empty"),
        ({"question": ["a"]}, "f, row 7, column 'question': found list ['a'] where text belongs"),
    ],
)
def test_a_bad_cell_is_named_with_file_row_and_column(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        row_to_pair(ROW | change, FORMATS["sql_create_context"], OPTIONS, "f, row 7")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            RowOptions(prompt_template="{contxt} {question}"),
            "contxt.* may have {context}, {question}, {answer} in braces",
        ),
        (RowOptions(prompt_template="{question} {answer}"), "would contain the reply"),
        (RowOptions(completion_template="{answer"), "not a valid template"),
    ],
)
def test_a_bad_template_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        check_templates(options)


def test_shuffled_partners_use_every_text_once_and_never_its_equal():
    texts = ["a"] * 5 + ["b"] * 3 + ["c", "d", "e"]
    partners = shuffled_partners(texts, seed=0, source="f")
    assert sorted(partners) == list(range(len(texts)))
    assert all(texts[i] != texts[j] for i, j in enumerate(partners))
    assert np.array_equal(partners, shuffled_partners(texts, seed=0, source="f"))
    assert not np.array_equal(partners, shuffled_partners(texts, seed=1, source="f"))


def test_shuffled_partners_are_not_always_the_same_text():
    texts = [str(i) for i in range(50)]
    met = Counter(int(shuffled_partners(texts, seed, "f")[0]) for seed in range(30))
    assert len(met) > 10


def test_shuffled_partners_need_other_texts():
    with pytest.raises(UserError, match="3 of 4 have the same one"):
        shuffled_partners(["a", "a", "a", "b"], seed=0, source="f")
