"""The checks of `inspect` on training data: each finds its fault, and nothing is found in data without one."""

import random
import sys

import numpy as np
import pytest

from conftest import ROWS
from dpo_lightning import PreferenceDataModule
from dpo_lightning.cli.doctor import CHECKS, examine
from dpo_lightning.data.near_duplicates import near_duplicates
from dpo_lightning.dpo.preference_loss import PreferenceLoss

WORDS = sorted({word for row in ROWS for word in row["question"].split() + row["answer"].split()})


def words(number, seed):
    return " ".join(random.Random(seed).choices(WORDS, k=number))


def pair(seed, **columns):
    """A pair without any fault."""
    completions = {"chosen": f" {words(12, seed + 1)}", "rejected": f" {words(12, seed + 2)}"}
    return {"prompt": f"{words(12, seed)}:\n", **completions, **columns}


@pytest.fixture
def findings(tokenizer, write_rows):
    """Rows -> the first line, and what was found with what to do about it."""

    def find(rows, loss="sigmoid", options=None, held_out=None, **settings):
        val = {"val_dataset": write_rows(held_out, "val.jsonl"), "test_size": 0} if held_out else {}
        data = PreferenceDataModule(tokenizer, write_rows(rows), **val, **settings)
        data.setup("fit")
        first, *lines = examine(data, PreferenceLoss(loss, options=options))
        assert all(line.startswith("  warning: ") for line in lines[::2])
        assert all(line.startswith("    to do: ") and len(line) > 20 for line in lines[1::2])
        return first, [
            f"{what.split(': ', 1)[1]} -> {do.split(': ', 1)[1]}"
            for what, do in zip(lines[::2], lines[1::2], strict=True)
        ]

    return find


def rows(change=None, number=200):
    """Pairs without any fault but what `change` makes of every other one."""
    return [pair(10 * n, **(change(pair(10 * n)) if change and n % 2 else {})) for n in range(number)]


def test_nothing_is_found_in_good_data(findings):
    first, found = findings(rows())
    assert not found and first == f"nothing found in {len(CHECKS) + 3} checks of the data"


@pytest.mark.parametrize(
    ("change", "words", "remedy"),
    [
        (lambda row: {"chosen": row["chosen"] * 3}, "chosen is longer than rejected in ", "ld_alpha: 0.5"),
        (lambda row: {"rejected": row["rejected"] * 4}, "chosen is shorter than rejected in ", "sigmoid_norm"),
        (lambda row: {"rejected": row["chosen"] + " is"}, "share at least 80% of their tokens in ", "dpop"),
        (lambda row: {"prompt": f"<|im_start|>{row['prompt']}"}, "<|im_start|> in the texts of ", "messages"),
        (lambda row: {"chosen": f"{row['chosen']}<|endoftext|>"}, "end token <|endoftext|> itself in ", "remove it"),
    ],
)
def test_a_fault_is_found_with_its_remedy(findings, change, words, remedy):
    _, (line,) = findings(rows(change))
    what, _, do = line.partition(" -> ")
    assert words in what and remedy in do


@pytest.mark.parametrize(
    ("change", "loss", "options"),
    [
        (lambda row: {"chosen": row["chosen"] * 3}, "sigmoid", {"ld_alpha": 0.5}),
        (lambda row: {"chosen": row["chosen"] * 3}, "simpo", None),
        (lambda row: {"rejected": row["chosen"] + " is"}, "dpop", None),
        (lambda row: {"rejected": row["chosen"] + " is"}, ["sigmoid", "sft"], None),
        (lambda row: {"rejected": ""}, "sigmoid", None),
    ],
)
def test_what_the_loss_takes_care_of_is_no_finding(findings, change, loss, options):
    assert not findings(rows(change), loss, options)[1]


def test_marks_that_the_tokenizer_has_are_no_finding(findings):
    assert not findings(rows(lambda row: {"prompt": f"<|endoftext|>{row['prompt']}"}))[1]


def test_prompts_that_begin_with_two_bos_tokens_are_found(write_rows, tokenizer):
    from transformers import GPT2TokenizerFast

    adds_bos = GPT2TokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, add_bos_token=True)
    if adds_bos("a").input_ids[0] != adds_bos.bos_token_id:
        from tokenizers.processors import TemplateProcessing

        bos = ("<|endoftext|>", adds_bos.bos_token_id)
        adds_bos.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", special_tokens=[bos])
    path = write_rows(rows(lambda row: {"prompt": f"<|endoftext|>{row['prompt']}"}))
    data = PreferenceDataModule(adds_bos, path)
    data.setup("fit")
    _, what, remedy = examine(data, PreferenceLoss())
    assert "begin with two <|endoftext|>" in what and "the tokenizer adds one" in remedy


def test_a_pair_and_its_opposite_are_named(findings, tmp_path):
    good = rows()
    opposite = good[3] | {"chosen": good[3]["rejected"], "rejected": good[3]["chosen"]}
    _, (line,) = findings([*good, opposite], val_size=0, test_size=0)
    assert f"2 of 201 training pairs (1.0%) contradict another one, {line.split(', ', 1)[1]}" in line
    assert f"(the first: {tmp_path}/rows.jsonl, line 4)" in line


def test_repeated_pairs_are_counted(findings):
    _, (line,) = findings(rows() + rows(number=20), val_size=0, test_size=0)
    assert "20 of 220 training pairs repeat another one exactly and 9.1% nearly" in line


def test_a_data_set_that_counts_twice_is_no_repetition(tokenizer, write_rows):
    data = PreferenceDataModule(tokenizer, {write_rows(rows()): 2.0}, val_size=0, test_size=0)
    data.setup("fit")
    assert len(data.datasets["train"]) == 400
    assert len(list(examine(data, PreferenceLoss()))) == 1


def test_rankings_are_no_repetition(findings):
    """The same prompt with several pairs of completions."""
    ranked = [pair(10 * n, prompt=f"{words(40, n // 4)}:\n") for n in range(200)]
    assert not findings(ranked)[1]


@pytest.mark.parametrize("near", [False, True])
def test_held_out_prompts_that_were_trained_on_are_found(findings, near, tmp_path, monkeypatch):
    trained = [pair(10 * n, prompt=f"{words(80, n)}:\n") for n in range(100)]
    if near:
        pytest.importorskip("rensa")
        seen = [row | {"prompt": "Well: " + row["prompt"]} for row in trained[:5]]
    else:
        monkeypatch.setitem(sys.modules, "rensa", None)
        monkeypatch.setattr("dpo_lightning.cli.doctor.find_spec", lambda name: None)
        seen = trained[:5]
    first, (line,) = findings(trained, held_out=[*seen, *(pair(5000 + 10 * n) for n in range(15))])
    assert "5 of 20 val prompts (25.0%) are training prompts" in line
    assert ("rensa" in first) is not near
    assert (f"(the first: {tmp_path}/val.jsonl, line 1, and {tmp_path}/rows.jsonl, line 1)" in line) is near


def thumbs(number=60):
    return [{"prompt": words(12, n), "completion": f" {words(12, -n)}", "label": n % 2 == 0} for n in range(number)]


def test_a_loss_that_does_not_fit_is_found(findings):
    _, (line,) = findings(thumbs(), "sigmoid")
    assert (
        "fit will refuse this" in line
        and line.endswith("ignores the labels)")
        and "-> set model.loss_type: kto" in line
    )
    assert not findings(thumbs(), "kto")[1]
    _, (line,) = findings(rows(), "kto")
    assert line.endswith("-> model.loss_type: sigmoid compares the two")
    _, (line,) = findings(rows(lambda row: {"margin": 1.0}), "ipo")
    assert "fit will refuse this, since a margin other than 0" in line


def test_near_duplicates_are_found_and_others_are_not():
    pytest.importorskip("rensa")
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 1000, 60).astype(np.int32) for _ in range(300)]
    near = [row.copy() for row in rows[:50]]
    for row in near:
        row[30] = 1001
    repeated, found = near_duplicates([*rows, *near], [*near, *(row[::-1] for row in rows)])
    assert not repeated[:300].any() and repeated[300:].all()
    assert found == {number: number for number in range(50)}
    system = rng.integers(0, 1000, 300).astype(np.int32)
    asked = [np.concatenate([system, row[:20]]) for row in rows]
    repeated, found = near_duplicates([*asked, asked[0]], [np.concatenate([system, row[20:40]]) for row in rows])
    assert repeated.tolist() == [False] * 300 + [True] and not found, "a common system prompt does not make them alike"
    short = [np.array(ids, np.int32) for ids in ([], [1], [1, 2], [1, 2, 3])]
    assert near_duplicates(short, short[1:2])[1] == {0: 1}
