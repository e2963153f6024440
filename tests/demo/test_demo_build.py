"""The shipped demo: the data is what the generator makes, the answers run, the tiny model behaves as said."""

import json
import random
import sqlite3
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_lightning.demo
from dpo_lightning.demo import corpus, generate
from dpo_lightning.demo.queries import KINDS, make_query
from dpo_lightning.demo.schemas import create_statement, load_schemas
from sql_verdicts import compiles

DEMO = Path(dpo_lightning.demo.__file__).parent
SPLITS = ("train", "valid", "test")


def shipped(split: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO / "data" / f"{split}.jsonl").read_text("utf-8").splitlines()]


def names(split: str) -> set[str]:
    """All table and column names of a split's schemas."""
    tables = [table for schema in load_schemas(split) for table in schema]
    return {name for table in tables for name in (table.name, *(column.name for column in table.columns))}


def test_shipped_data_is_what_the_generator_makes(tmp_path):
    generate.write_data(tmp_path)
    for name in (*SPLITS, "questions"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DEMO / "data" / f"{name}.jsonl").read_bytes()


def test_counts_are_as_promised():
    rows = [row for split in SPLITS for row in shipped(split)]
    assert len(rows) >= 3000
    assert len({(row["question"], row["context"], row["answer"]) for row in rows}) == len(rows)
    assert sum(len(load_schemas(split)) for split in SPLITS) >= 60
    assert len(KINDS) >= 12
    assert all(set(row) == {"question", "context", "answer"} for row in rows)


def test_the_questions_are_about_the_test_schemas_and_none_is_a_test_row():
    asked = [(row["question"], row["context"]) for row in shipped("questions")]
    tested = {(row["question"], row["context"]) for row in shipped("test")}
    assert len(asked) == len(set(asked)) == 320 and not tested & set(asked)
    tables = {create_statement((table,)) for schema in load_schemas("test") for table in schema}
    assert {part for _, context in asked for part in context.split("; ")} == tables
    assert all(set(row) == {"question", "context"} for row in shipped("questions")), "nobody has answered them"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_several_phrasings(kind):
    rng = random.Random(0)
    schema = next(schema for schema in load_schemas("train") if len(schema) == 2)
    phrasings = {make_query(rng, schema, kind)[1].question.split()[0] for _ in range(50)}
    assert len(phrasings) >= 5


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_runs_in_sqlite(split):
    for row in shipped(split):
        database = sqlite3.connect(":memory:")
        database.executescript(row["context"])
        database.execute(row["answer"]).fetchall()
        assert '"' not in row["answer"]


def test_splits_share_no_table_and_no_column():
    assert not names("train") & names("valid")
    assert not names("train") & names("test")
    assert not names("valid") & names("test")
    contexts = {split: {row["context"] for row in shipped(split)} for split in SPLITS}
    for split in SPLITS:
        tables = {create_statement((table,)) for schema in load_schemas(split) for table in schema}
        assert {part for context in contexts[split] for part in context.split("; ")} <= tables


def test_the_pretraining_texts_never_name_a_held_out_table():
    assert not set(corpus.KNOWN_WORDS) & (names("valid") | names("test"))


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 12 * 2**20


@pytest.fixture(scope="module")
def tiny():
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model")
    return model, AutoTokenizer.from_pretrained(DEMO / "model")


def test_the_shipped_model_is_a_gpt2_with_a_tokenizer_that_round_trips(tiny):
    model, tokenizer = tiny
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.dtype == torch.float32
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token is None
    assert tokenizer.eos_token_id == model.config.eos_token_id
    for text in (shipped("test")[0]["context"], "O'Neil's  naïve 表 x_1 = 'a''b'\n\n\tSELECT  \"Ä\";"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def reply(model, tokenizer, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=50, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_untrained_replies_are_prose_and_sql_comes_only_after_a_sql_cue(tiny):
    rows = shipped("test")[:12]
    prose = [reply(*tiny, f"{row['context']}\nQuestion: {row['question']}\nAnswer:") for row in rows]
    sql = [reply(*tiny, f"{row['context']};\n-- {row['question']}\n") for row in rows]
    assert not any(compiles(text, row["context"]) for row, text in zip(rows, prose, strict=True))
    assert all(len(text.split()) >= 4 and "SELECT" not in text for text in prose)
    assert sum(text.startswith("SELECT") for text in sql) >= 11
