"""Collects the values for each column of the tables from the literals that queries compare it with.

The `hits` of a column's `Pool` satisfy the conditions of a query (`year > 1990` -> 1991), so that its result is not
empty; the `misses` nearly do (1990, 1989), so that `>` and `>=`, AND and OR, or another literal differ. Columns that a
query compares with each other share a pool, as do columns of the same name, so that joins find partners.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from dpo_lightning.judging.sql.dates import dates_by_format, dates_with
from dpo_lightning.judging.sql.sandbox import Column
from dpo_lightning.judging.sql.tokens import Token

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


def column_pools(tables: Tables) -> dict[str, Pool]:
    """Empty pools by lower-case column name."""
    pools: dict[str, Pool] = {}
    for column in itertools.chain.from_iterable(tables.values()):
        pool = pools.setdefault(column.name.lower(), Pool(kind=_kind(column)))
        pool.joined |= sum(column in columns for columns in tables.values()) > 1
    return pools


def _kind(column: Column) -> str:
    """The kind of values for a column, by its declared type; sqlite itself accepts any value."""
    for kind, words in (
        ("date", ("DATE", "TIME")),
        ("integer", ("INT", "BOOL", "SERIAL")),
        ("real", ("REAL", "FLOA", "DOUB", "NUM", "DEC", "MONEY")),
    ):
        if any(word in column.declared for word in words):
            return kind
    return "text"


def read_query_into(pools: dict[str, Pool], tokens: list[Token], sizes: list[int]) -> None:
    """Adds each literal to the pool of the last column before it, and joins columns around a `=` or an `IN (SELECT`.

    That is right for `x > 3`, `x IN (3, 4)`, `x BETWEEN 3 AND 4`, `lower(x) LIKE '%a%'` and `avg(x) > 3`, and
    harmless elsewhere, since a wrong literal only widens a pool. Literals before any column (`3 < x`) go to all.

    Args:
        sizes: receives the numbers that rows are counted with, as in LIMIT.
    """
    column, operator, counting = "", "=", False
    patterns: dict[str, list[str]] = {}
    calls_around = _date_calls(tokens)
    formats = _date_formats(tokens, calls_around, pools)
    date_format = ""
    for index, token in enumerate(tokens):
        following = tokens[index + 1] if index + 1 < len(tokens) else None
        calls = following is not None and following.is_sign("(")
        if token.is_word("limit", "offset") or (calls and token.is_word("count")):
            counting, column = True, ""
        elif token.is_word("and", "or", "where", "select", "order", "group", "having"):
            counting = False
        if token.is_sign("=", "==", "<", "<=", ">", ">=", "<>", "!=") or token.is_word("like", "glob"):
            operator = token.name
        elif token.is_word("in", "between"):
            operator = "="
        elif _is_column(token, following, pools):
            if column and _compares(tokens, index):
                _join(pools, column, token.name)
            column, operator = token.name, "="
            date_format = formats.get(index, "")
        elif (literal := _literal(token, tokens[index - 1] if index else None)) is not None:
            call = calls_around[index]
            if call and not (call in _DATE_CALLS and _DATE.match(str(literal))):
                continue  # a format, a modifier, a position in a date
            known_format = column and date_format and not call
            if known_format and (dates := dates_by_format(date_format, literal, operator)):
                pools[column].hits += dates[0]
                pools[column].misses += dates[1]
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
    """For each token the date or substring function whose arguments it is in; "" for none."""
    around, stack = [], [""]
    for index, token in enumerate(tokens):
        if token.is_sign(")") and len(stack) > 1:
            stack.pop()
        around.append(stack[-1])
        if token.is_sign("("):
            before = tokens[index - 1].name if index else ""
            outer = stack[-1] if before not in ("in", "select") else ""
            stack.append(before if before in _DATE_CALLS + _PART_CALLS else outer)
    return around


def _date_formats(tokens: list[Token], around: list[str], pools: dict[str, Pool]) -> dict[int, str]:
    """By the index of each column in a call of a date function: the strftime format of the call's result.

    A text column that a date is read from becomes one of dates. Columns that no literal follows, as in
    `'1990' = strftime('%Y', day)`, do no harm.
    """
    strftime = ""
    formats: dict[int, str] = {}
    for index, token in enumerate(tokens):
        if token.is_word("strftime") and index + 2 < len(tokens):
            strftime = tokens[index + 2].text
        following = tokens[index + 1] if index + 1 < len(tokens) else None
        if around[index] in _DATE_CALLS and _is_column(token, following, pools):
            if pools[token.name].kind == "text":
                pools[token.name].kind = "date"
            call = {"strftime": strftime, "date": "%Y-%m-%d", "time": "%H:%M:%S", "datetime": "%Y-%m-%d %H:%M:%S"}
            formats[index] = call.get(around[index], "")
    return formats


def _is_column(token: Token, following: Token | None, pools: dict[str, Pool]) -> bool:
    qualifier_or_function = following is not None and following.is_sign(".", "(")
    return token.kind in ("word", "quoted") and token.name in pools and not qualifier_or_function


def _literal(token: Token, before: Token | None) -> int | float | str | None:
    """The value of a literal; to sqlite a double-quoted text that names no column is one."""
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
    hits: Sequence[Value]
    misses: Sequence[Value]
    dates = None
    if pool.kind == "date" and isinstance(literal, str):
        dates = dates_by_format("%Y-%m-%d", literal, operator) or dates_with(literal)
    if dates:
        hits, misses = dates
    elif isinstance(literal, str) and operator in ("like", "glob"):
        hits, misses = _around_pattern(literal)
    else:
        lower, upper = _step(literal, -1), _step(literal, 1)
        beside = {"<": [lower], "<=": [literal, lower], ">": [upper], ">=": [literal, upper]}
        beside |= dict.fromkeys(("<>", "!="), [lower, upper])
        hits = beside.get(operator, [literal])
        similar: list[Value] = []
        if isinstance(literal, str):
            similar = [literal.swapcase(), f" {literal} ", literal + "q", "q" + literal, literal[:-1]]
        elif isinstance(literal, float) and abs(literal) < 1e15:
            similar = [int(literal)]
        misses = [literal, lower, upper, *similar]
    pool.hits += hits
    pool.misses += misses


def _around_pattern(pattern: str) -> tuple[list[str], list[str]]:
    """Texts that match a pattern such as `%ab_`, and texts that do not, or match a similar pattern."""
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
