"""Random rows that tell queries apart: tables + queries -> fillings of the tables.

In the spirit of test-suite evaluation (Zhong et al. 2020, "Semantic Evaluation for Text-to-SQL with Distilled
Test Suites"): two queries mean the same when they agree on many small databases whose values lie around the
queries' own literals. Values are therefore drawn from pools:

- `hits` satisfy the conditions of a query (`year > 1990` -> 1991), so that its result is not empty;
- `misses` nearly do (1990, 1989), so that `>` and `>=`, AND and OR, or another literal differ;
- `plain` ones are anything of the column's type.

Columns that a query compares with each other share a pool, as columns of one name do, so joins find partners.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from dpo_lightning.sql_sandbox import Column
from dpo_lightning.sql_tokens import Token

MAX_ROWS_PER_TABLE = 60
MAX_LITERALS_PER_COLUMN = 24
MAX_LITERAL_CHARS = 200

Value = int | float | str | None
Tables = dict[str, list[Column]]


@dataclass
class Pool:
    """The values a set of comparable columns draws from."""

    hits: list[Value] = field(default_factory=list)
    misses: list[Value] = field(default_factory=list)
    kind: str = "text"  # text, integer, real or date
    joined: bool = False


@dataclass(frozen=True)
class Style:
    """How one filling looks. `hit`, `miss` and `null` are the shares of cells drawn so; the rest is plain."""

    rows: int
    hit: float
    miss: float
    null: float
    variety: int  # how many plain values a pool has
    distinct: bool = False  # no value twice in a column: no ties, so ORDER BY and LIMIT are unambiguous


STYLES = (
    Style(rows=14, hit=0.45, miss=0.30, null=0.10, variety=4),
    Style(rows=12, hit=0.85, miss=0.12, null=0.03, variety=8),
    Style(rows=12, hit=0.40, miss=0.25, null=0.0, variety=14, distinct=True),
    Style(rows=16, hit=0.60, miss=0.20, null=0.20, variety=2),
    Style(rows=10, hit=0.60, miss=0.25, null=0.10, variety=20),
    Style(rows=14, hit=0.10, miss=0.20, null=0.10, variety=6),
)


@dataclass
class Plan:
    """What the fillings are drawn from."""

    tables: Tables  # those that a query names
    pools: dict[str, Pool]  # by lower-case column name; comparable columns share one object
    rows: int  # at least so many rows in a table: what LIMIT, OFFSET and HAVING COUNT(*) need
    crowded: int  # how often the longer query names a table; joins of many tables need few rows each


def plan_fillings(tables: Tables, queries: list[list[Token]]) -> Plan:
    """Read the queries' literals, comparisons and joins off their tokens."""
    mentions = [[token.name for token in tokens if token.name in tables] for tokens in queries]
    named = {name: tables[name] for name in tables if any(name in names for names in mentions)}
    pools = _column_pools(named)
    sizes: list[int] = []
    for tokens in queries:
        _read_query_into(pools, tokens, sizes)
    return Plan(named, pools, max(sizes, default=0), max(map(len, mentions), default=0))


def draw_fillings(plan: Plan, count: int, seed: str) -> Iterator[dict[str, list[list[Value]]]]:
    """`count` fillings, table name -> rows. The same seed gives the same ones."""
    rng = random.Random(seed)
    for style in itertools.islice(itertools.cycle(STYLES), count):
        yield _draw_filling(plan, style, rng)


def _column_pools(tables: Tables) -> dict[str, Pool]:
    pools: dict[str, Pool] = {}
    for column in itertools.chain.from_iterable(tables.values()):
        pool = pools.setdefault(column.name.lower(), Pool(kind=_kind(column)))
        pool.joined |= sum(column in columns for columns in tables.values()) > 1
    return pools


def _kind(column: Column) -> str:
    """Which plain values suit a column, by its declared type; sqlite itself lets any value in."""
    for kind, words in (
        ("date", ("DATE", "TIME")),
        ("integer", ("INT", "BOOL", "SERIAL")),
        ("real", ("REAL", "FLOA", "DOUB", "NUM", "DEC", "MONEY")),
    ):
        if any(word in column.declared for word in words):
            return kind
    return "text"


def _read_query_into(pools: dict[str, Pool], tokens: list[Token], sizes: list[int]) -> None:
    """Give each literal to the column named last before it, and join columns around a `=` or an `IN (SELECT`.

    That is right for `x > 3`, `x IN (3, 4)`, `x BETWEEN 3 AND 4`, `lower(x) LIKE '%a%'` and `avg(x) > 3`, and
    harmless elsewhere: a literal too many only widens a pool. Literals before any column (`3 < x`) go to all.
    """
    column, operator, counting, patterns = None, "=", False, {}
    for index, token in enumerate(tokens):
        following = tokens[index + 1] if index + 1 < len(tokens) else None
        calls = following is not None and following.is_sign("(")
        if token.is_word("limit", "offset") or (calls and token.is_word("count")):
            counting, column = True, None
        elif token.is_word("and", "or", "where", "select", "order", "group", "having"):
            counting = False
        if token.is_sign("=", "==", "<", "<=", ">", ">=", "<>", "!=") or token.is_word("like", "glob"):
            operator = token.name
        elif token.is_word("in", "between"):
            operator = "="
        elif _is_column(token, following, pools):
            if column is not None and _compares(tokens, index):
                _join(pools, column, token.name)
            column, operator = token.name, "="
        elif index >= 2 and tokens[index - 2].is_word("strftime"):
            continue  # its format
        elif (literal := _literal(token, tokens[index - 1] if index else None)) is not None:
            if counting and isinstance(literal, int):
                sizes.append(min(literal, MAX_ROWS_PER_TABLE // 3))
            for pool in [pools[column]] if column else [] if counting else pools.values():
                _add_literal(pool, operator, literal)
            if operator == "like" and column:
                patterns.setdefault(column, []).append(str(literal).strip("%"))
    for column, cores in patterns.items():
        if len(cores) > 1:  # `x LIKE '%a%' AND x LIKE '%b%'`
            pools[column].hits.append("".join(cores))


def _is_column(token: Token, following: Token | None, pools: dict[str, Pool]) -> bool:
    qualifier_or_function = following is not None and following.is_sign(".", "(")
    return token.kind in ("word", "quoted") and token.name in pools and not qualifier_or_function


def _literal(token: Token, before: Token | None) -> int | float | str | None:
    """The value of a literal; a double-quoted text that names no column is one to sqlite."""
    if token.kind == "number":
        value = float(token.text)
        if token.text.isascii() and token.text.isdecimal() and value < 2**62:  # sqlite's integers: 64 bits
            value = int(token.text)
        negative = before is not None and before.is_sign("-")
        return -value if negative else value
    is_text = token.kind == "string" or (token.kind == "quoted" and token.raw.startswith('"'))
    return token.text[:MAX_LITERAL_CHARS] if is_text else None


def _compares(tokens: list[Token], index: int) -> bool:
    """Whether the column at `index` is compared with the one before it: `a = t.b`, `a IN (SELECT b`."""
    start = index - 2 if index >= 2 and tokens[index - 1].is_sign(".") else index
    before = [token.name for token in tokens[max(0, start - 3) : start]]
    return bool(before) and (before[-1] in ("=", "==") or before == ["in", "(", "select"])


def _join(pools: dict[str, Pool], left: str, right: str) -> None:
    kept, dropped = pools[left], pools[right]
    kept.joined = True
    if kept is dropped:
        return
    kept.hits += dropped.hits
    kept.misses += dropped.misses
    for name, pool in pools.items():
        if pool is dropped:
            pools[name] = kept


def _add_literal(pool: Pool, operator: str, literal: int | float | str) -> None:
    if len(pool.hits) >= MAX_LITERALS_PER_COLUMN:
        return
    if pool.kind == "date" and isinstance(literal, str) and (dates := _dates_with(literal)):
        hits, misses = dates
    elif isinstance(literal, str) and operator in ("like", "glob"):
        hits, misses = _around_pattern(literal)
    else:
        lower, upper = _step(literal, -1), _step(literal, 1)
        beside = {"<": [lower], "<=": [literal, lower], ">": [upper], ">=": [literal, upper]}
        beside |= dict.fromkeys(("<>", "!="), [lower, upper])
        hits = beside.get(operator, [literal])
        misses = [literal, lower, upper]
        if isinstance(literal, str):
            misses += [literal.swapcase(), literal + "q", "q" + literal, literal[:-1]]
        elif isinstance(literal, float):
            misses += [int(literal)] if abs(literal) < 1e15 else []
    pool.hits += hits
    pool.misses += misses


def _around_pattern(pattern: str) -> tuple[list[str], list[str]]:
    """`%ab_` -> texts that match it; texts that match it no longer, or match a similar pattern."""
    core = re.sub(r"[%*]", "", pattern).replace("_", "x").replace("?", "x")
    spread = re.sub(r"[%*]", "qu", pattern).replace("_", "y").replace("?", "y")
    return [core, spread], ["q" + core, core + "q", "q" + core + "q", core[:-1], core[1:], core.swapcase()]


def _step(literal: int | float | str, by: int) -> int | float | str:
    """The literal's neighbour: 3 -> 4, "2010-01-09" -> "2010-01-10", "abc" -> "abd"."""
    if not isinstance(literal, str):
        return literal + by
    numbers = list(re.finditer(r"[0-9]+", literal))
    if numbers:
        last = numbers[-1]
        stepped = str(max(0, int(last[0]) + by)).zfill(len(last[0]))
        return literal[: last.start()] + stepped + literal[last.end() :]
    return literal[:-1] + chr(max(32, min(ord(literal[-1]) + by, 0xD7FF))) if literal else literal


def _dates_with(literal: str) -> tuple[list[str], list[str]] | None:
    """Dates in and beside the year of `strftime('%Y', day) = '2010'` or the month of `day LIKE '2010-07-%'`.

    Where the literal allows it, nothing but dates goes into a column of dates: queries may rely on that.
    """
    year = re.fullmatch(r"%?([12][0-9]{3})-?%?", literal)
    month = re.fullmatch(r"(?:[12][0-9]{3}|%|____)?-?([0-9]{2})-?%?", literal)
    if year:
        inside, outside = int(year[1]), (int(year[1]) - 1, int(year[1]) + 1)
        return [f"{inside}-01-01", f"{inside}-12-31"], [f"{outside[0]}-12-31", f"{outside[1]}-01-01"]
    if month:
        in_year = literal[:4] if literal[:4].isdecimal() else "2011"
        others = (max(1, int(month[1]) - 1), min(int(month[1]) + 1, 12))
        return [f"{in_year}-{month[1]}-04"], [f"{in_year}-{other:02d}-04" for other in others]
    return None


def _plain_value(kind: str, rng: random.Random) -> Value:
    if kind == "integer":
        return rng.randint(0, 99)
    if kind == "real":
        return rng.randint(0, 199) / 2
    if kind == "date":
        return f"20{rng.randint(8, 14):02d}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    # Texts, among them numbers: many data sets declare every column VARCHAR and then add them up.
    return rng.choice("abcdeABCDE") + rng.choice("fgh") if rng.random() < 0.6 else str(rng.randint(1, 120))


def _draw_filling(plan: Plan, style: Style, rng: random.Random) -> dict[str, list[list[Value]]]:
    plain = {}
    for pool in plan.pools.values():
        plain[id(pool)] = [_plain_value(pool.kind, rng) for _ in range(style.variety)]
    rows = max(style.rows, min(3 * plan.rows, MAX_ROWS_PER_TABLE))
    if plan.crowded > 2:  # the cross product must stay within the sandbox's steps
        rows = min(rows, max(4, int(20_000 ** (1 / plan.crowded))))
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
            candidates.append(len(candidates) + 1000)
        return rng.sample(candidates, rows)
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
