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
from datetime import datetime, timedelta

from dpo_lightning.judging.sql.sandbox import Column
from dpo_lightning.judging.sql.tokens import Token

_END = Token("sign", ";", ";")

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
    letters: bool = False  # plain texts are words, never numbers, which come before all words


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
    """What the fillings are drawn from."""

    tables: Tables  # those that a query names
    pools: dict[str, Pool]  # by lower-case column name; comparable columns share one object
    rows: int  # at least so many rows in a table: what LIMIT, OFFSET and HAVING COUNT(*) need
    crowded: int  # how often the longer query names a table; joins of many tables need few rows each


def plan_fillings(tables: Tables, queries: list[list[Token]]) -> Plan:
    """Read the queries' literals, comparisons and joins off their tokens."""
    mentions = [
        [
            token.name
            for token, after in itertools.pairwise([*tokens, _END])
            if token.name in tables and not after.is_sign(".")
        ]
        for tokens in queries
    ]
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


def without_summed(plan: Plan, queries: list[list[Token]], seed: str) -> Iterator[dict[str, list[list[Value]]]]:
    """A filling in which the columns that a query sums are NULL, where there are any: `sum` is NULL there, `total` 0.

    Only those are, so that conditions still find rows: of no rows even `max(x)` and `ORDER BY x DESC LIMIT 1` differ.
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
    calls_around = _date_calls(tokens)
    dated = _date_formats(tokens, calls_around, pools)
    of_format = None
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
            of_format = dated.get(index)
        elif (literal := _literal(token, tokens[index - 1] if index else None)) is not None:
            if calls_around[index] and not (calls_around[index] in _DATE_CALLS and _DATE.match(str(literal))):
                continue  # a format, a modifier, a place in a date
            if of_format and not calls_around[index] and (found := _dates_by_format(of_format, literal, operator)):
                pools[column].hits += found[0]
                pools[column].misses += found[1]
                continue
            if counting and isinstance(literal, int):
                sizes.append(min(literal, MAX_ROWS_PER_TABLE // 3))
            for pool in [pools[column]] if column else [] if counting else pools.values():
                _add_literal(pool, operator, literal)
            if operator == "like" and column:
                patterns.setdefault(column, []).append(str(literal).strip("%"))
    for column, cores in patterns.items():
        if len(cores) > 1:  # `x LIKE '%a%' AND x LIKE '%b%'`
            pools[column].hits.append("".join(cores))


_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_DATE_CALLS = ("strftime", "date", "datetime", "time", "julianday", "unixepoch", "timediff")
_PART_CALLS = ("substr", "substring")


def _date_calls(tokens: list[Token]) -> list[str]:
    """For each token the call around it of a function of dates or of parts of texts; empty outside of all."""
    around, stack = [], [""]
    for index, token in enumerate(tokens):
        if token.is_sign(")") and len(stack) > 1:
            stack.pop()
        around.append(stack[-1])
        if token.is_sign("("):
            before = tokens[index - 1].name if index else ""
            inside = stack[-1] if before not in ("in", "select") else ""
            stack.append(before if before in _DATE_CALLS + _PART_CALLS else inside)
    return around


def _date_formats(tokens: list[Token], around: list[str], pools: dict[str, Pool]) -> dict[int, str]:
    """Places of the columns inside of calls on dates -> what the call makes of them, as strftime's format.

    A column of texts that a date is read from is one of dates. `'1990' = strftime('%Y', day)` works, too: the
    columns that no literal follows do no harm.
    """
    formats, found = "", {}
    for index, token in enumerate(tokens):
        if token.is_word("strftime") and index + 2 < len(tokens):
            formats = tokens[index + 2].text
        following = tokens[index + 1] if index + 1 < len(tokens) else None
        if around[index] in _DATE_CALLS and _is_column(token, following, pools):
            if pools[token.name].kind == "text":
                pools[token.name].kind = "date"
            call = {"strftime": formats, "date": "%Y-%m-%d", "time": "%H:%M:%S", "datetime": "%Y-%m-%d %H:%M:%S"}
            found[index] = call.get(around[index], "")
    return found


_FIELDS = {"%Y": "(?P<year>[0-9]{4})", "%m": "(?P<month>[0-9]{1,2})", "%d": "(?P<day>[0-9]{1,2})"}
_FIELDS |= {"%H": "(?P<hour>[0-9]{1,2})", "%M": "(?P<minute>[0-9]{1,2})", "%S": "(?P<second>[0-9]{1,2})"}
_FIELDS |= {"%w": "(?P<weekday>[0-6])", "%j": "(?P<yearday>[0-9]{1,3})", "%F": "(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"}


def _dates_by_format(form: str, literal: int | float | str, operator: str) -> tuple[list[str], list[str]] | None:
    """Dates for which `strftime(form, day) operator literal` holds, and dates beside them."""
    if len(form) > 20 or not 0 <= len(str(literal)) <= 20:
        return None
    parts = re.split("(%.)", form)
    if len(set(parts) & set(_FIELDS)) != sum(part in _FIELDS for part in parts):
        return None
    match = re.fullmatch("".join(_FIELDS.get(part, re.escape(part)) for part in parts), str(literal))
    if not match or not match.groupdict():
        return None
    field = match.lastgroup
    try:
        dates = [_date_from(match.groupdict(), field, by) for by in (-1, 0, 1)]
    except (ValueError, OverflowError):
        return None
    timed = field in ("hour", "minute", "second")
    below, same, above = ([str(date if timed else date.date()) for date in group] for group in dates)
    hits = {"<": below, "<=": below + same, ">": above, ">=": same + above, "<>": below + above, "!=": below + above}
    return hits.get(operator, same), below + same + above


def _date_from(fields: dict[str, str], last: str, by: int) -> list[datetime]:
    """Two dates with the fields, the last field moved by `by`."""
    if "date" in fields:
        return [datetime.fromisoformat(fields["date"]) + timedelta(days=by)]
    given = {name: int(value) for name, value in fields.items()}
    if last in ("year", "month"):
        given[last] += by
        by = 0
    if not 1 <= given.get("month", 1) <= 12:  # January has no month before it in the same year
        given["month"] = 6
    dates = []
    for month, day in ((1, 1), (12, 28)):
        start = datetime(given.get("year", 2011), given.get("month", month), given.get("day", day))
        start += timedelta(**{f"{unit}s": given.get(unit, 0) for unit in ("hour", "minute", "second")})
        if "yearday" in given:
            start = start.replace(month=1, day=1) + timedelta(days=given["yearday"] - 1)
        if "weekday" in given:
            start += timedelta(days=(given["weekday"] - start.isoweekday()) % 7)
        unit = f"{last}s" if last in ("hour", "minute", "second") else "days"
        dates.append(start + timedelta(**{unit: by}))
    return dates


def _is_column(token: Token, following: Token | None, pools: dict[str, Pool]) -> bool:
    qualifier_or_function = following is not None and following.is_sign(".", "(")
    return token.kind in ("word", "quoted") and token.name in pools and not qualifier_or_function


def _literal(token: Token, before: Token | None) -> int | float | str | None:
    """The value of a literal; a double-quoted text that names no column is one to sqlite."""
    if token.kind == "number":
        hexadecimal = token.name.startswith("0x")
        value = int(token.text, 16) % 2**62 if hexadecimal else float(token.text)
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
    dates = None
    if pool.kind == "date" and isinstance(literal, str):
        dates = _dates_by_format("%Y-%m-%d", literal, operator) or _dates_with(literal)
    if dates:
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
            misses += [literal.swapcase(), f" {literal} ", literal + "q", "q" + literal, literal[:-1]]
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
    if month and not 1 <= int(month[1]) <= 12:  # `substr(day, 9) = '15'`
        day = int(month[1])
        return ([f"2011-07-{day}"], [f"2011-07-{day - 1}", f"2011-07-{day + 1}"]) if 13 <= day <= 30 else None
    if month:
        in_year = literal[:4] if literal[:4].isdecimal() else "2011"
        others = (max(1, int(month[1]) - 1), min(int(month[1]) + 1, 12))
        return [f"{in_year}-{month[1]}-04"], [f"{in_year}-{other:02d}-04" for other in others]
    return None


def _plain_value(kind: str, letters: bool, rng: random.Random) -> Value:
    if kind == "integer":
        return rng.randint(0, 99)
    if kind == "real":
        return rng.randint(0, 199) / 2
    if kind == "date":
        return f"20{rng.randint(8, 14):02d}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    # Texts, among them numbers: many data sets declare every column VARCHAR and then add them up.
    if letters or rng.random() < 0.6:
        return rng.choice("abcdeABCDE") + rng.choice("fgh")
    return str(rng.randint(1, 120))


def _draw_filling(plan: Plan, style: Style, rng: random.Random) -> dict[str, list[list[Value]]]:
    plain = {}
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
