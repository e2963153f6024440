"""Fills tables with random rows that distinguish queries.

In the spirit of test-suite evaluation (Zhong et al. 2020, "Semantic Evaluation for Text-to-SQL with Distilled Test
Suites"): two queries mean the same if they agree on many small databases whose values lie around the queries' own
literals. Values are therefore drawn from `pools`, or are ordinary ones of the column's type.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from dpo_lightning.judging.sql.pools import MAX_ROWS_PER_TABLE, Pool, Tables, Value, column_pools, read_query_into
from dpo_lightning.judging.sql.tokens import Token

_END = Token("sign", ";", ";")
Filling = dict[str, list[list[Value]]]  # rows by table


@dataclass(frozen=True)
class Style:
    """One kind of filling: the shares of hits, misses (see `pools`) and NULL among its cells; the rest is ordinary."""

    rows: int
    hit: float
    miss: float
    null: float
    variety: int  # ordinary values of a pool
    distinct: bool = False  # no value twice in a column, so that ORDER BY and LIMIT have no ties
    letters: bool = False  # ordinary texts are words, never numbers, which sort before all words


STYLES = (
    Style(rows=14, hit=0.45, miss=0.30, null=0.10, variety=4),
    Style(rows=12, hit=0.85, miss=0.12, null=0.03, variety=8),
    Style(rows=12, hit=0.40, miss=0.25, null=0.0, variety=14, distinct=True),
    Style(rows=16, hit=0.60, miss=0.20, null=0.20, variety=2),
    Style(rows=10, hit=0.60, miss=0.25, null=0.10, variety=20),
    Style(rows=12, hit=0.40, miss=0.25, null=0.10, variety=14, distinct=True),
    Style(rows=10, hit=0.20, miss=0.10, null=0.0, variety=30, distinct=True, letters=True),
    Style(rows=14, hit=0.10, miss=0.20, null=0.10, variety=6),
)


@dataclass
class Plan:
    """The source of the fillings."""

    tables: Tables  # the ones that a query names
    pools: dict[str, Pool]  # by lower-case column name; comparable columns share one object
    rows: int  # minimum in a table, for LIMIT, OFFSET and HAVING COUNT(*)
    crowded: int  # table names in the longer query; joins of many tables need few rows each


def plan_fillings(tables: Tables, queries: list[list[Token]]) -> Plan:
    """Collects the queries' literals, comparisons and joins from their tokens."""
    mentions = [
        [
            token.name
            for token, after in itertools.pairwise([*tokens, _END])
            if token.name in tables and not after.is_sign(".")
        ]
        for tokens in queries
    ]
    named = {name: tables[name] for name in tables if any(name in names for names in mentions)}
    pools = column_pools(named)
    sizes: list[int] = []
    for tokens in queries:
        read_query_into(pools, tokens, sizes)
    return Plan(named, pools, max(sizes, default=0), max(map(len, mentions), default=0))


def draw_fillings(plan: Plan, count: int, seed: str) -> Iterator[Filling]:
    """Yields `count` fillings, the rows by table name; the same seed gives the same ones."""
    rng = random.Random(seed)
    for style in itertools.islice(itertools.cycle(STYLES), count):
        yield _draw_filling(plan, style, rng)


def without_summed(plan: Plan, queries: list[list[Token]], seed: str) -> Iterator[Filling]:
    """Yields a filling in which the columns that a query sums, if any, are NULL: then `sum` is NULL and `total` 0.

    All other columns are filled, so that conditions still find rows: on no rows `max(x)` and `ORDER BY x DESC LIMIT 1`
    would differ as well.
    """
    summed = set()
    for tokens in queries:
        for index, token in enumerate(tokens[:-2]):
            if token.is_word("sum", "total") and tokens[index + 1].is_sign("("):
                named = tokens[index + 4] if len(tokens) > index + 4 and tokens[index + 3].is_sign(".") else None
                summed.add((named or tokens[index + 2]).name)
    if not summed.isdisjoint(plan.pools):
        filling = next(draw_fillings(plan, 1, seed))
        for table, columns in plan.tables.items():
            filling[table] = [
                [None if column.name.lower() in summed else cell for column, cell in zip(columns, row, strict=True)]
                for row in filling[table]
            ]
        yield filling


def _plain_value(kind: str, letters: bool, rng: random.Random) -> Value:
    if kind == "integer":
        return rng.randint(0, 99)
    if kind == "real":
        return rng.randint(0, 199) / 2
    if kind == "date":
        return f"20{rng.randint(8, 14):02d}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    # Texts, some of them numbers: many data sets declare every column VARCHAR and then sum them.
    if letters or rng.random() < 0.6:
        return rng.choice("abcdeABCDE") + rng.choice("fgh")
    return str(rng.randint(1, 120))


def _draw_filling(plan: Plan, style: Style, rng: random.Random) -> Filling:
    plain: dict[int, list[Value]] = {}
    for pool in plan.pools.values():
        plain[id(pool)] = [_plain_value(pool.kind, style.letters, rng) for _ in range(style.variety)]
    rows = max(style.rows, min(3 * plan.rows, MAX_ROWS_PER_TABLE))
    if plan.crowded > 2:  # the cross product must stay within the sandbox's steps
        rows = min(rows, max(4 if plan.crowded <= 10 else 1, int(20_000 ** (1 / plan.crowded))))
    filling = {}
    for table, columns in plan.tables.items():
        cells = [_draw_column(plan.pools[column.name.lower()], plain, style, rows, rng) for column in columns]
        filling[table] = [list(row) for row in zip(*cells, strict=True)]
    return filling


def _draw_column(pool: Pool, plain: dict[int, list[Value]], style: Style, rows: int, rng: random.Random) -> list[Value]:
    others = plain[id(pool)]
    if style.distinct:
        candidates = list(dict.fromkeys(pool.hits + pool.misses + others))
        while len(candidates) < rows:
            number = len(candidates) + 1000
            candidates.append(f"{'mN'[number % 2]}{number}" if style.letters and pool.kind == "text" else number)
        column = rng.sample(candidates, rows)
        if style.null:
            column[rng.randrange(rows)] = None
        return column
    column = []
    for index in range(rows):
        draw = rng.random()
        # The first two rows of each table satisfy all conditions and join with each other.
        if index < 2 and (pool.hits or pool.joined):
            column.append(rng.choice(pool.hits) if pool.hits else others[0])
        elif draw < style.null:
            column.append(None)
        elif draw < style.null + style.hit and pool.hits:
            column.append(rng.choice(pool.hits))
        elif draw < style.null + style.hit + style.miss and pool.misses:
            column.append(rng.choice(pool.misses))
        else:
            column.append(rng.choice(others))
    return column
