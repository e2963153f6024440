"""Table schemas: the hand-written text files data/schemas-{train,valid,test}.txt -> list[Schema].

A line is a schema, `table: column=values, ...`. Two tables that share an `*_id` column are on one line with ` + `
between them. The values determine the type: `@pool` or `a|b|c` is text, `1..9` an integer, `0.5..9.5` a real number,
`@date` a date, `@key` the shared key. No table or column name is in two splits.
"""

import random
from pathlib import Path
from typing import NamedTuple

POOLS = {
    "@person": "Ann Berg|Omar Diaz|Lena Fox|Ivan Petrov|Mia Wong|Tom Hale|Sara Lind|Raj Patel|Eva Costa|"
    "Paul Roy|Nina Adler|Hugo Marsh|Clara Stein|Yuki Mori|Ben Carter|Zoe Hart",
    "@city": "Paris|Rome|Oslo|Lima|Berlin|Madrid|Cairo|Dublin|Vienna|Boston|Kyoto|Lagos|Prague|Delhi|Quito|Perth",
    "@country": "France|Italy|Norway|Peru|Germany|Spain|Egypt|Ireland|Austria|Japan|Kenya|India|Chile|Canada|Poland",
    "@color": "red|blue|green|black|white|yellow|grey|brown|orange",
    "@title": "Silent River|Golden Hour|The Last Door|Winter Light|Broken Crown|Paper Moon|Night Train|"
    "Open Sea|Lost Garden|Second Sun|Blue Harbor|Stone Bridge",
    "@firm": "Acme|Globex|Initech|Umbra|Vertex|Nordlys|Kestrel|Solaris|Pioneer|Atlas|Borealis|Cobalt",
}

# The declared type of a column is drawn once per schema from these.
SQL_TYPES = {
    "text": ("VARCHAR", "VARCHAR", "TEXT"),
    "integer": ("INTEGER", "INTEGER", "INT"),
    "real": ("REAL", "DECIMAL", "FLOAT"),
    "date": ("DATE",),
    "key": ("INTEGER",),
}


class Column(NamedTuple):
    """`kind` is a key of SQL_TYPES; `values` are texts to draw from, or (low, high) for numbers."""

    name: str
    kind: str
    values: tuple
    sql_type: str


class Table(NamedTuple):
    name: str
    columns: tuple[Column, ...]

    def of(self, *kinds: str) -> list[Column]:
        """The columns of these kinds."""
        return [column for column in self.columns if column.kind in kinds]


# One table, or two that share a column of kind "key".
Schema = tuple[Table, ...]


def create_statement(schema: Schema) -> str:
    """`CREATE TABLE a (x VARCHAR, y INTEGER); CREATE TABLE b (...)`, as in b-mc2/sql-create-context."""

    def create(table: Table) -> str:
        return f"CREATE TABLE {table.name} ({', '.join(f'{c.name} {c.sql_type}' for c in table.columns)})"

    return "; ".join(create(table) for table in schema)


def load_schemas(split: str) -> list[Schema]:
    """The hand-written schemas of "train", "valid" or "test"."""
    rng = random.Random(split)
    lines = (Path(__file__).parent / "data" / f"schemas-{split}.txt").read_text().splitlines()
    return [_parse_schema(line, rng) for line in lines]


def _parse_schema(line: str, rng) -> Schema:
    types = {kind: rng.choice(choices) for kind, choices in SQL_TYPES.items()}
    tables = []
    for part in line.split(" + "):
        table, columns = part.split(": ")
        tables.append(Table(table, tuple(_parse_column(text, types) for text in columns.split(", "))))
    return tuple(tables)


def _parse_column(text: str, types: dict) -> Column:
    name, values = text.split("=")
    if values in ("@date", "@key"):
        return Column(name, values[1:], (), types[values[1:]])
    if ".." in values:
        low, high = values.split("..")
        kind, number = ("real", float) if "." in low else ("integer", int)
        return Column(name, kind, (number(low), number(high)), types[kind])
    return Column(name, "text", tuple(POOLS.get(values, values).split("|")), types["text"])
