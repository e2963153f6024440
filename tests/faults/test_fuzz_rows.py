"""Bad files and rows, made at random, through the real datamodule: every row is kept, counted as skipped, or an error.

A short version runs with the other tests; `DPO_FAULTS=long` (set by `make faults`) runs more than a thousand examples.
"""

import csv
import io
import json
import os
import shutil
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_lightning import PreferenceDataModule
from dpo_lightning.errors import UserError

EXAMPLES = 400 if os.environ.get("DPO_FAULTS") == "long" else 15  # of each of the four kinds of file
SECONDS = 20.0  # longer than any example may take, on a busy machine too
COLUMNS = ("prompt", "chosen", "rejected", "weight", "margin", "context", "question", "answer", "messages")
outcomes: Counter[str] = Counter()

words = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["a", " yes", "", "\x00", "\ud800", "é", "{", '"']
)
message = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", 1]), "content": words | st.none()}
)
cell = st.one_of(
    words, words, words, st.none(), st.booleans(), st.integers(), st.floats(), st.lists(message, max_size=3),
    st.lists(words, max_size=2), st.dictionaries(words, words, max_size=2),
)  # fmt: skip
good = st.builds(lambda i: {"prompt": f"Say {i}", "chosen": f" yes {i}", "rejected": f" no {i}"}, st.integers(0, 10**6))
odd = st.dictionaries(st.sampled_from(COLUMNS), cell, max_size=5)
mended = st.builds(lambda a, b: a | b, good, odd)
rows = st.tuples(st.lists(good, min_size=1, max_size=5), st.lists(odd | mended | mended, max_size=5)).flatmap(
    lambda lists: st.permutations(lists[0] + lists[1])
)
# How the bytes of a file are damaged afterwards: half of them not at all, else cut off, replaced or inserted somewhere.
wound = st.tuples(
    st.sampled_from(["replace", "insert", "replace", "insert", "cut"]), st.floats(0, 1), st.binary(max_size=3)
)
damage = st.just([]) | st.lists(wound, min_size=1, max_size=3)


def as_jsonl(values):
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def as_json(values):
    return json.dumps(values).encode()


def as_csv(values):
    names = list(dict.fromkeys(name for value in values for name in value)) or ["prompt"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, restval="")
    writer.writeheader()
    writer.writerows(values)
    return text.getvalue().encode(errors="surrogatepass")


def as_parquet(values):
    names = list(dict.fromkeys(name for value in values for name in value)) or ["prompt"]
    columns = {}
    for name in names:
        cells = [value.get(name) for value in values]
        try:
            columns[name] = pa.array(cells)
            pq.write_table(pa.table({name: columns[name]}), io.BytesIO())  # not every type can be written
        except (pa.ArrowException, UnicodeError, OverflowError):  # nor has every column one type
            columns[name] = pa.array([str(value).encode(errors="replace").decode() for value in cells])
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def damaged(content, wounds):
    for kind, place, new in wounds:
        at = int(place * len(content))
        content = {
            "cut": content[:at],
            "replace": content[:at] + new + content[at + len(new) :],
            "insert": content[:at] + new + content[at:],
        }[kind]
    return content


def records(suffix, content):
    """How many rows a file of this content has, counted on their own: lines, or what the parser of others gives."""
    if suffix == "jsonl":
        return sum(bool(line.strip()) for line in content.split(b"\n"))
    if suffix == "csv":
        text = content.decode("utf-8-sig", errors="surrogateescape")
        return sum(bool(cells) for cells in csv.reader(io.StringIO(text, newline=""))) - 1
    if suffix == "parquet":
        return pq.ParquetFile(io.BytesIO(content)).metadata.num_rows
    return len(json.loads(content)) if content.lstrip().startswith(b"[") else records("jsonl", content)


def check(tokenizer, suffix, content, on_bad_row):
    """Loads a file; it must be refused in one line, or every one of its rows accounted for."""
    folder = Path(tempfile.mkdtemp(prefix="dpo-fuzz-"))
    path = folder / f"rows.{suffix}"
    path.write_bytes(content)
    data = PreferenceDataModule(tokenizer, str(path), val_size=0, test_size=0, batch_size=4, on_bad_row=on_bad_row)
    began = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            data.setup("fit")
        trained = sum(batch.num_pairs for batch in data.train_dataloader())
        account = data.accounts[str(path)]
        assert trained == account.pairs == account.rows - sum(account.skipped.values())
        assert account.rows == records(suffix, content)
        assert on_bad_row == "skip" or not account.skipped
        outcomes[f"{suffix}: trained on, {'some' if account.skipped else 'none'} skipped"] += 1
        outcomes["rows trained on"] += trained
        outcomes["rows skipped"] += sum(account.skipped.values())
    except UserError as error:
        assert "rows." in str(error), "the message names the file"
        assert "\n" not in str(error) and len(str(error)) < 1500
        outcomes[f"{suffix}: refused in a line"] += 1
    finally:
        shutil.rmtree(folder)
    assert time.monotonic() - began < SECONDS


@pytest.fixture(scope="module", autouse=True)
def say_outcomes():
    yield
    print("\n" + "\n".join(f"{count:6} {outcome}" for outcome, count in sorted(outcomes.items())))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "json", "parquet"])
def test_every_row_is_trained_on_or_skipped_or_the_file_refused(tokenizer, tmp_path_factory, monkeypatch, suffix):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    write = {"jsonl": as_jsonl, "csv": as_csv, "json": as_json, "parquet": as_parquet}[suffix]

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(rows, damage, st.sampled_from(["skip", "skip", "error"]))
    def fuzz(values, wounds, on_bad_row):
        check(tokenizer, suffix, damaged(write(values), wounds), on_bad_row)

    fuzz()
