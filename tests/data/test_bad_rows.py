"""Every kind of bad row through the real datamodule: one line that names it, or skipped and counted."""

import csv
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import ROWS
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.data.cells import MAX_CELL
from dpo_lightning.errors import UserError

GOOD = ROWS[0]
PAIRS = [{"prompt": f"Question {i}?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(20)]


def load(tokenizer, path, **options):
    data = PreferenceDataModule(tokenizer, str(path), **{"val_size": 2, "test_size": 2} | options)
    data.setup("fit")
    return data


def kept(data):
    return sum(len(split) for split in data.datasets.values())


# what stands in line 3, the reason it is counted under, what the line says of it
BAD = {
    "missing column": ({"question": "q", "context": "c"}, ", column 'answer': found nothing where text belongs"),
    "null": (GOOD | {"answer": None}, ", column 'answer': found null where text belongs"),
    "not text": (GOOD | {"question": 5}, ", column 'question': found int 5 where text belongs"),
    "empty chosen": (GOOD | {"answer": " \n"}, ": the chosen completion is empty"),
    "not JSON": ('{"question": "q", ', ": not valid JSON ("),
    "not an object": ("[1, 2]", ": found list where an object with named columns belongs"),
    "not Unicode": (GOOD | {"answer": "a\ud800b"}, ", column 'answer': found half a character (\\ud800)"),
    "too long": (
        GOOD | {"context": "x" * 10_485_760},
        f", column 'context': found 10,485,760 characters where at most {MAX_CELL:,} belong",
    ),
    "bad weight": (GOOD | {"weight": -1}, ", column 'weight': found -1 where a number of 0 or more belongs"),
    "bad margin": (GOOD | {"margin": "wide"}, ", column 'margin': found 'wide' where a finite number belongs"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_one_line_or_skipped_and_counted(tokenizer, write_rows, reason):
    row, found = BAD[reason]
    path = write_rows([*ROWS[1:3], row, *ROWS[3:]])
    with pytest.raises(UserError) as error:
        load(tokenizer, path)
    line = f"{path}, line 3{found}"
    assert str(error.value).startswith(line) and str(error.value).endswith("or set data.on_bad_row: skip")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    with pytest.warns(UserWarning, match=re.escape(f"{path}: 1 of 48 rows are skipped: 1 {reason} (the first: {line}")):
        data = load(tokenizer, path, on_bad_row="skip")
    account = data.accounts[path]
    assert (account.rows, account.pairs, account.skipped) == (48, kept(data), {reason: 1})


def test_an_empty_prompt_is_bad(tokenizer, write_rows):
    path = write_rows([*PAIRS, {"prompt": " ", "chosen": "c", "rejected": "r"}])
    with pytest.raises(UserError, match=re.escape(f"{path}, line 21: the prompt is empty; fix or remove the row")):
        load(tokenizer, path)


def test_bytes_that_are_not_utf8_are_bad(tokenizer, tmp_path, write_rows):
    path = tmp_path / "latin.jsonl"
    lines = [json.dumps(row).encode() for row in PAIRS]
    lines[4] = '{"prompt": "é"}'.encode("latin-1")
    path.write_bytes(b"\n\n".join(lines))
    with pytest.raises(UserError, match=r"latin.jsonl, line 9: not UTF-8 \(byte 13 of the line\); save it as UTF-8"):
        load(tokenizer, path)
    assert load(tokenizer, path, on_bad_row="skip").accounts[str(path)].skipped == {"not UTF-8": 1}


def test_repeated_and_identical_pairs_are_kept_and_said_or_skipped(tokenizer, write_rows):
    same = {"prompt": "p", "chosen": "s", "rejected": "s"}
    path = write_rows([*PAIRS, same, PAIRS[3], PAIRS[4]])
    said = (
        f"{path}: 3 of 23 rows teach nothing but are kept: 1 chosen same as rejected, 2 repeated row (the first: "
        f"{path}, line 21; {path}, line 22; {path}, line 23); data.on_bad_row: skip leaves them out"
    )
    with pytest.warns(UserWarning, match=re.escape(said)):
        assert kept(load(tokenizer, path)) == 23
    data = load(tokenizer, path, on_bad_row="skip")
    assert kept(data) == 20
    assert data.accounts[path].skipped == {"chosen same as rejected": 1, "repeated row": 2}


def test_a_second_run_says_the_same_from_the_cache(tokenizer, write_rows, monkeypatch):
    path = write_rows([*PAIRS, "{", PAIRS[0] | {"prompt": 1}, "{"])
    first = load(tokenizer, path, on_bad_row="skip").accounts
    monkeypatch.setattr("dpo_lightning.data.reading.row_to_pair", None)  # nothing is read again
    with pytest.warns(UserWarning, match="3 of 23 rows are skipped: 2 not JSON, 1 not text"):
        assert load(tokenizer, path, on_bad_row="skip").accounts == first


def test_row_numbers_are_those_of_the_file_whatever_is_skipped(tokenizer, write_rows):
    path = write_rows(["{", *PAIRS[:10], "", "[]", *PAIRS[10:]])
    data = load(tokenizer, path, on_bad_row="skip")
    for split, pairs in data.datasets.items():
        for position, prompt in enumerate(pairs["prompt"]):
            number = int(prompt.split()[1].rstrip("?"))
            line = number + (2 if number < 10 else 4)
            assert data.row_numbers(split, [position]) == [line]
            assert data.locations(split, [position]) == [f"{path}, line {line}"]


def test_no_row_left_is_an_error_that_shows_the_first(tokenizer, write_rows):
    path = write_rows([{"prompt": None, "chosen": "c", "rejected": "r"}] * 4)
    with pytest.raises(
        UserError, match="none of its 4 rows can be used; the first: .*line 1, column 'prompt': found null"
    ):
        load(tokenizer, path, on_bad_row="skip")


def test_prompts_to_answer_may_repeat_and_bad_ones_are_skipped(tokenizer, write_rows):
    path = write_rows([{"prompt": "a"}, {"prompt": None}, {"prompt": "a"}])
    data = PreferenceDataModule(tokenizer, predict_dataset=path, on_bad_row="skip")
    data.setup("predict")
    assert data.row_numbers("predict", range(2)) == [1, 3]


def test_csv_rows_are_checked_one_by_one(tokenizer, tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, PAIRS[0])
        writer.writeheader()
        writer.writerows([PAIRS[0] | {"prompt": "two\nlines"}, *PAIRS[1:]])
    text = path.read_bytes()
    bad = (
        b'a,b\r\n\r\n"x"y,b,c\r\n'
        + "é,b,c\r\n".encode("latin-1")
        + b"1,2,3\r\n,b,c\r\n"
        + b"a" * 2_000_000
        + b",b,c\r\n"
    )
    path.write_bytes(text + bad)
    with pytest.raises(UserError, match=r"rows.csv, line 23: found 2 cells where 3 belong; fix or remove"):
        load(tokenizer, path)
    data = load(tokenizer, path, on_bad_row="skip")
    account = data.accounts[str(path)]
    assert account.skipped == {"not CSV": 2, "not UTF-8": 1, "empty prompt": 1, "too long": 1}
    assert (account.rows, account.pairs) == (26, 21)
    assert account.first["not UTF-8"] == [f"{path}, line 26, column 'prompt': found the byte 0xE9 where UTF-8 belongs"]
    path.write_bytes(text + b'"a,b,c\r\n1,2,3\r\n')
    with pytest.raises(UserError, match="rows.csv, line 23: a quoted cell is never closed"):
        load(tokenizer, path, on_bad_row="skip")


def test_parquet_rows_are_checked_one_by_one(tokenizer, tmp_path):
    path = tmp_path / "rows.parquet"
    columns = {name: pa.array([row[name] for row in PAIRS] + [None, "x"]) for name in PAIRS[0]}
    latin = [row["prompt"].encode() for row in PAIRS] + [b"p", b"\xe9"]
    columns["prompt"] = pa.Array.from_buffers(pa.string(), 22, pa.array(latin, pa.binary()).buffers())
    pq.write_table(pa.table(columns), path)
    with pytest.raises(UserError, match="rows.parquet, row 21, column 'chosen': found null"):
        load(tokenizer, path)
    account = load(tokenizer, path, on_bad_row="skip").accounts[str(path)]
    assert account.skipped == {"null": 1, "not UTF-8": 1}
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="rows.parquet' cannot be read"):
        load(tokenizer, path, on_bad_row="skip")


def test_json_rows_are_checked_one_by_one(tokenizer, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*PAIRS, 5, {"prompt": ["a"], "chosen": "c", "rejected": "r"}]))
    with pytest.raises(UserError, match="rows.json, row 21: found int where an object"):
        load(tokenizer, path)
    account = load(tokenizer, path, on_bad_row="skip").accounts[str(path)]
    assert account.skipped["not an object"] == 1 and account.pairs == 20
    path.write_text("[{]")
    with pytest.raises(UserError, match="rows.json': not valid JSON"):
        load(tokenizer, path, on_bad_row="skip")


def test_a_token_that_the_model_does_not_know_is_named(tokenizer, model_folder, write_rows, quiet_trainer):
    from copy import deepcopy

    larger = deepcopy(tokenizer)
    larger.add_tokens(["brandnew"])
    path = write_rows([*PAIRS, {"prompt": "a brandnew word", "chosen": " c", "rejected": ""}])
    data = PreferenceDataModule(larger, path, val_size=0, test_size=0)
    unknown = len(larger) - 1
    with pytest.raises(
        UserError, match=re.escape(f"{path}, line 21, prompt: its token 'brandnew' has the id {unknown}, but model '")
    ):
        quiet_trainer().fit(DPOModule(str(model_folder)), data)


def test_a_cache_that_cannot_be_written_is_one_line(tokenizer, rows_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(UserError, match="cache folder '.*' cannot be written: .*HF_DATASETS_CACHE"):
        load(tokenizer, rows_file)


def test_a_damaged_cache_is_made_anew(tokenizer, rows_file, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    before = load(tokenizer, rows_file).datasets["train"]["chosen_ids"][:]
    for path in tmp_path.rglob("rows.arrow"):
        path.write_bytes(path.read_bytes()[:500])
    assert load(tokenizer, rows_file).datasets["train"]["chosen_ids"][:] == before
    assert not list(tmp_path.rglob("*.partial"))


THUMBS = [{"prompt": f"Question {i}?", "completion": f" yes {i}", "label": i % 2 == 0} for i in range(20)]


@pytest.mark.parametrize(
    ("change", "reason", "found"),
    [
        ({"label": "maybe"}, "not true or false", ", column 'label': found str 'maybe' where true or false belongs"),
        ({"label": 2}, "not true or false", ", column 'label': found int 2 where true or false belongs"),
        ({"label": None}, "null", ", column 'label': found null where true or false belongs"),
        ({"completion": ""}, "empty chosen", ": the chosen completion is empty"),
    ],
)
def test_a_bad_label_is_one_line_or_skipped_and_counted(tokenizer, write_rows, change, reason, found):
    path = write_rows([*THUMBS[:2], THUMBS[2] | change, *THUMBS[3:]])
    with pytest.raises(UserError, match=re.escape(f"{path}, line 3{found}; fix or remove the row")):
        load(tokenizer, path)
    with pytest.warns(UserWarning, match=f"1 of 20 rows are skipped: 1 {reason}"):
        assert kept(load(tokenizer, path, on_bad_row="skip")) == 19


def test_labels_may_be_numbers_or_texts_and_a_bad_completion_may_be_empty(tokenizer, tmp_path):
    path = tmp_path / "thumbs.csv"
    path.write_text("prompt,completion,label\na b,good,True\nc d,good,1\ne f,bad,false\ng h,,0\n")
    data = load(tokenizer, path, val_size=0, test_size=0)
    assert [pair.label for pair in data.pairs("train", range(4))] == [True, True, False, False]
    ids = data.datasets["train"][:]
    assert [len(row) for row in ids["chosen_ids"]][2:] == [0, 0] and ids["rejected_ids"][:2] == [[], []]
    assert ids["rejected_ids"][3] == [tokenizer.eos_token_id]


def test_a_completion_that_is_labelled_both_ways_is_reported_or_skipped(tokenizer, write_rows):
    path = write_rows([*THUMBS, THUMBS[3] | {"label": True}])
    with pytest.warns(
        UserWarning, match="1 of 21 rows teach nothing but are kept: 1 completion labelled both good and bad"
    ):
        assert kept(load(tokenizer, path)) == 21
    with pytest.warns(UserWarning, match="1 of 21 rows are skipped: 1 completion labelled both good and bad"):
        assert kept(load(tokenizer, path, on_bad_row="skip")) == 20


@pytest.mark.parametrize("rejected", ["shuffled", "generated"])
def test_rows_with_one_completion_get_no_other(tokenizer, write_rows, model_folder, rejected):
    rows = [row for row in THUMBS if row["label"]]
    with pytest.raises(UserError, match="has one completion with a label in each row: leave data.rejected out"):
        load(tokenizer, write_rows(rows), rejected=rejected, generation={"name_or_path": str(model_folder)})


def test_functions_may_give_labels(tokenizer, write_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "votes.py").write_text(
        "from dpo_lightning import PreferencePair\n"
        "def as_dict(row): return {'prompt': row['q'], 'completion': row['a'], 'label': row['up']}\n"
        "def as_pair(row): return PreferencePair(row['q'], '', row['a'], label=row['up'])\n"
    )
    path = write_rows([{"q": "Sky?", "a": " Green.", "up": 0}])
    for name in ("as_dict", "as_pair"):
        (pair,) = load(tokenizer, path, format=f"votes:{name}", val_size=0, test_size=0).pairs("train", [0])
        assert (pair.chosen, pair.rejected, pair.label) == ("", " Green.", False)
    with pytest.raises(UserError, match="found a label beside two completions"):
        load(tokenizer, write_rows([{"q": "Sky?", "a": " Green.", "up": 1}]), format="votes:as_pair")
