"""The demo's data set: schemas of a split -> rows {question, context, answer}."""

import json
import random
from pathlib import Path

from .queries import KINDS, make_query
from .schemas import Schema, create_statement, load_schemas

ROWS_PER_SCHEMA = {"train": 44, "valid": 24, "test": 24}
QUESTIONS_PER_SCHEMA = 20


def schema_rows(rng, schema: Schema, number: int) -> list[dict]:
    """`number` distinct rows about one schema, cycling through the kinds of query."""
    kinds = [kind for kind in KINDS if kind != "join" or len(schema) == 2]
    # Two tables are there to be joined: every other row is a join.
    turns = [kind for kind in kinds for kind in ((kind, "join") if len(schema) == 2 else (kind,))]
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < number:
        asked, query = make_query(rng, schema, turns[len(rows) % len(turns)])
        row = {"question": query.question, "context": create_statement(asked), "answer": query.sql}
        rows.setdefault(query.question, row)
    return list(rows.values())


def make_rows(split: str) -> list[dict]:
    """All rows of "train", "valid" or "test", shuffled; the same on every call."""
    rng = random.Random(f"rows {split}")
    rows = [row for schema in load_schemas(split) for row in schema_rows(rng, schema, ROWS_PER_SCHEMA[split])]
    rng.shuffle(rows)
    return rows


def make_questions() -> list[dict]:
    """Rows {question, context} about the schemas of "test", shuffled. No question is one of its rows."""
    known = {(row["question"], row["context"]) for row in make_rows("test")}
    rng = random.Random("questions")
    questions = []
    for schema in load_schemas("test"):
        rows = schema_rows(rng, schema, QUESTIONS_PER_SCHEMA + ROWS_PER_SCHEMA["test"])
        new = [row for row in rows if (row["question"], row["context"]) not in known]
        questions += [{"question": row["question"], "context": row["context"]} for row in new[:QUESTIONS_PER_SCHEMA]]
    rng.shuffle(questions)
    return questions


def write_data(folder: Path) -> None:
    """Writes {train,valid,test,questions}.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {split: make_rows(split) for split in ROWS_PER_SCHEMA} | {"questions": make_questions()}
    for name, rows in made.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
