"""Runs untrusted SQL in an in-memory sqlite3: the CREATE TABLE statements of a context, then queries.

Replies come from a model and contexts from a data set of the hub, so both are treated as hostile:

- only SELECT, WITH and VALUES over the context's own tables get past sqlite's authorizer, with the functions
  listed here: no files, ATTACH, PRAGMA, writes, extensions, virtual tables or schema tables;
- text, cells, rows and columns are capped, and a progress handler stops a query after a number of steps;
- `query.read_query` refuses queries whose *compilation* explodes: sqlite before 3.41 cannot be interrupted then.

Verdicts depend on counts, not on the clock, so that they are the same on a busy machine. The time limit, in CPU
seconds of this thread, is only a safety net.
"""

import contextlib
import re
import sqlite3
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from dpo_lightning.judging.sql.tokens import Token, cte_names, tokenize

MAX_QUERY_CHARS = 5_000
MAX_CONTEXT_CHARS = 30_000
MAX_SIBLINGS = 64  # SELECTs combined by UNION and the like, in total
MAX_STEPS = 400_000  # sqlite's virtual machine instructions per query, about 10 ms
TICK = 100  # instructions between two checks of the limits
MAX_SECONDS = 0.1  # CPU time per query
MAX_ROWS = 2_000
MAX_RESULT_BYTES = 1_000_000
MAX_CELL_BYTES = 8_192  # of every string, blob and row that sqlite handles, not only of results

_LIMITS = {  # names of sqlite3.SQLITE_LIMIT_*
    "LENGTH": MAX_CELL_BYTES,
    "SQL_LENGTH": 4 * MAX_CONTEXT_CHARS,
    "COLUMN": 500,
    "EXPR_DEPTH": 200,
    "COMPOUND_SELECT": MAX_SIBLINGS,
    "VDBE_OP": 25_000,
    "FUNCTION_ARG": 32,
    "ATTACHED": 0,
    "LIKE_PATTERN_LENGTH": 500,
    "TRIGGER_DEPTH": 1,
    "WORKER_THREADS": 0,
}
# sqlite's functions, of all versions, that compute something from their arguments. Left out on purpose: randomblob,
# since a verdict must not be random; json_pretty, whose indent exceeds every limit; those about the library or the
# connection; all that reach outside (load_extension, fts3_tokenizer, ...).
_FUNCTIONS = frozenset(
    """
    abs acos acosh asin asinh atan atan2 atanh avg ceil ceiling char coalesce concat concat_ws cos cosh count
    cume_dist current_date current_time current_timestamp date datetime degrees dense_rank exp first_value floor
    glob group_concat hex if ifnull iif instr julianday lag last_value lead length like likelihood likely ln log
    log10 log2 lower ltrim max median min mod nth_value ntile nullif octet_length percent_rank percentile
    percentile_cont percentile_disc pi pow power quote radians random rank replace round row_number rtrim sign
    sin sinh soundex sqrt strftime string_agg substr substring subtype sum tan tanh time timediff total trim
    trunc typeof unhex unicode unistr unistr_quote unixepoch unlikely upper
    """.split()
)
# Allowed in queries alone: contexts do not need them.
_QUERY_FUNCTIONS = _FUNCTIONS | frozenset(
    """
    -> ->> format json json_array json_array_insert json_array_length json_error_position json_extract
    json_group_array json_group_object json_insert json_object json_patch json_quote json_remove json_replace
    json_set json_type json_valid jsonb jsonb_array jsonb_array_insert jsonb_extract jsonb_group_array
    jsonb_group_object jsonb_insert jsonb_object jsonb_patch jsonb_remove jsonb_replace jsonb_set printf zeroblob
    """.split()
)
_WIDE = re.compile(r"%[^a-zA-Z%]*(?:[0-9]{4}|\*)")  # in a format: a width or precision of over 999

_READ, _FUNCTION, _SELECT = sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_SELECT
# What CREATE TABLE does to sqlite's own table.
_BOOKKEEPING = frozenset({sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE})
_SCHEMA_ACTIONS = frozenset({sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_INDEX, _READ})
_FILL_ACTIONS = frozenset({sqlite3.SQLITE_PRAGMA, sqlite3.SQLITE_INSERT, sqlite3.SQLITE_DELETE, _SELECT, _READ})
_QUERY_ACTIONS = frozenset({_SELECT, sqlite3.SQLITE_RECURSIVE})

# What sqlite3 raises for refused, broken or oversized SQL: ValueError for a nul byte or a lone surrogate.
_SQL_ERRORS = (sqlite3.Error, ValueError, OverflowError, MemoryError)


class QueryError(Exception):
    """The query was refused, failed, or exceeded a limit."""


class Column(NamedTuple):
    name: str
    declared: str  # the declared type in upper case; may be empty


class Result(NamedTuple):
    columns: int
    rows: list[tuple]  # texts and blobs as bytes


class Sandbox:
    """A database with a context's tables, empty at first: `with Sandbox(context) as sandbox: sandbox.run(query)`.

    Raises:
        ValueError: the context is anything but `CREATE TABLE` statements that sqlite accepts.
    """

    def __init__(self, context: str) -> None:
        self._formatter: sqlite3.Connection | None = None  # opened for the first printf
        self._filled: dict[str, list[str]] = {}
        self._ctes: set[str] = set()
        # By lower-case name, without generated columns, which take no values.
        self.tables: dict[str, list[Column]] = {}
        try:
            tokens = _check_only_tables(context)
            try:
                self._create(context)
            except sqlite3.OperationalError:  # possibly a column named `order` or `2nd_run`
                self._create(_quote_column_names(tokens))
        except _SQL_ERRORS as error:
            raise ValueError(
                f"the SQL context is not a set of CREATE TABLE statements that sqlite accepts ({error}): "
                f"{context[:200]!r}; correct it, or leave out the rows that have it"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        if self._formatter is not None:
            self._formatter.close()

    def check(self, query: str) -> None:
        """Compiles the query without running it; raises QueryError if sqlite refuses it."""
        self._query("EXPLAIN " + query, fetch=False)

    def run(self, query: str) -> Result:
        """The query's result; raises QueryError if sqlite refuses it or a limit stops it."""
        return self._query(query, fetch=True)

    def fill(self, rows: Mapping[str, Sequence[Sequence[Any]]]) -> None:
        """Replaces the tables' rows, without those that the context's own constraints forbid."""
        self._allowed = _FILL_ACTIONS
        for table, values in rows.items():
            columns = [column.name for column in self.tables[table]]
            self._filled[table] = columns
            self._replace_rows(table, columns, values)

    def reverse_rows(self) -> None:
        """Stores the same rows in the opposite order, which changes results that depend on the order of storage."""
        self._allowed = _FILL_ACTIONS
        for table, columns in self._filled.items():
            names = ", ".join(map(_quote, columns))
            rows = self._execute(f"SELECT {names} FROM {_quote(table)}").fetchall()
            # Stored again as bytes they would be blobs, which equal no text.
            texts = [[cell.decode() if isinstance(cell, bytes) else cell for cell in row] for row in rows]
            self._replace_rows(table, columns, texts[::-1])

    def _replace_rows(self, table: str, columns: list[str], rows: Sequence[Sequence[Any]]) -> None:
        self._execute(f"DELETE FROM {_quote(table)}")
        names, marks = ", ".join(map(_quote, columns)), ", ".join("?" * len(columns))
        insert = f"INSERT OR IGNORE INTO {_quote(table)} ({names}) VALUES ({marks})"
        try:
            self._start_counting()
            self._connection.executemany(insert, rows)
        except sqlite3.Error:
            # OR IGNORE does not cover a text as INTEGER PRIMARY KEY, or a CHECK that fails to compute.
            self._execute(f"DELETE FROM {_quote(table)}")
            for row in rows:
                with contextlib.suppress(sqlite3.Error):
                    self._execute(insert, row)

    def _query(self, query: str, fetch: bool) -> Result:
        self._allowed = _QUERY_ACTIONS
        # sqlite asks for permission to read a CTE, too, if none of its columns is used.
        self._ctes = cte_names(query)
        try:
            cursor = self._execute(query)
            rows = self._fetch(cursor) if fetch else []
            columns = len(cursor.description or ())
            cursor.close()
            return Result(columns, rows)
        except _SQL_ERRORS as error:
            raise QueryError(str(error)) from error

    def _fetch(self, cursor: sqlite3.Cursor) -> list[tuple]:
        rows, size = [], 0
        for row in cursor:
            rows.append(row)
            size += sum(len(cell) if isinstance(cell, bytes) else 8 for cell in row)
            if len(rows) > MAX_ROWS or size > MAX_RESULT_BYTES:
                raise QueryError(f"the result has more than {MAX_ROWS} rows or {MAX_RESULT_BYTES} bytes")
        return rows

    def _execute(self, sql: str, values: Sequence = ()) -> sqlite3.Cursor:
        self._start_counting()
        return self._connection.execute(sql, values)

    def _start_counting(self) -> None:
        self._steps, self._deadline = 0, time.thread_time() + MAX_SECONDS

    def _lock_down(self) -> None:
        self._allowed = _SCHEMA_ACTIONS
        connection = self._connection
        connection.text_factory = bytes  # a reply can make texts that are not UTF-8
        connection.execute("PRAGMA temp_store = MEMORY")  # a large sort would otherwise go to a file
        connection.execute("PRAGMA trusted_schema = OFF")
        for name, limit in _LIMITS.items():
            connection.setlimit(getattr(sqlite3, f"SQLITE_LIMIT_{name}"), limit)
        # The text of a CREATE TABLE is stored in a row, so the context needs longer ones.
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 4 * MAX_CONTEXT_CHARS)
        if sys.version_info >= (3, 12):  # "South Australia" is a string in every build of sqlite
            connection.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, True)
        # A verdict must not be random.
        connection.create_function("random", 0, lambda: 0, deterministic=True)
        # sqlite's own run for seconds over a wide field before the limit on lengths stops them.
        for name in ("printf", "format"):
            connection.create_function(name, -1, self._format, deterministic=True)
        connection.set_progress_handler(self._over_limit, TICK)
        connection.set_authorizer(self._authorize)

    def _format(self, *values: str | bytes | float | None) -> str | None:
        """sqlite's printf without wide fields."""
        if values and _WIDE.search(str(values[0])):
            raise ValueError("the format has a wide field, or one whose width is an argument")
        if self._formatter is None:
            self._formatter = sqlite3.connect(":memory:", check_same_thread=False)
        (text,) = self._formatter.execute(f"SELECT printf({', '.join('?' * len(values))})", values).fetchone()
        return text

    def _over_limit(self) -> bool:
        self._steps += TICK
        return self._steps > MAX_STEPS or time.thread_time() > self._deadline

    def _authorize(self, action: int, first: str | None, second: str | None, *_: object) -> int:
        if action == _FUNCTION:
            allowed = str(second).lower() in (_QUERY_FUNCTIONS if self._allowed is _QUERY_ACTIONS else _FUNCTIONS)
        elif action == _READ and self._allowed is _QUERY_ACTIONS:
            table = str(first).lower()
            allowed = table in self.tables or (not second and table in self._ctes)
        elif action in _BOOKKEEPING and self._allowed is _SCHEMA_ACTIONS:
            allowed = first in ("sqlite_master", "sqlite_schema")
        else:
            allowed = action in self._allowed
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    def _create(self, statements: str) -> None:
        self._connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)
        try:
            self._lock_down()
            self._start_counting()
            self._connection.executescript(statements)
            self.tables = self._describe_tables()
            self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_CELL_BYTES)
        except BaseException:
            self._connection.close()
            raise

    def _describe_tables(self) -> dict[str, list[Column]]:
        self._allowed = _FILL_ACTIONS
        select = "SELECT name FROM sqlite_master WHERE type = 'table' AND name != 'sqlite_sequence'"
        tables = {}
        for (name,) in self._execute(select).fetchall():
            columns = self._execute(f"PRAGMA table_xinfo({_quote(name.decode())})").fetchall()
            tables[name.decode().lower()] = [
                Column(column[1].decode(), column[2].decode().upper()) for column in columns if column[6] == 0
            ]
        return tables


def _check_only_tables(context: str) -> list[Token]:
    """The context's tokens; raises ValueError unless each of its statements is a plain CREATE TABLE."""
    if len(context) > MAX_CONTEXT_CHARS:
        raise ValueError(f"it has {len(context)} characters; at most {MAX_CONTEXT_CHARS} are read")
    tokens = tokenize(context)
    starts = [0] + [index + 1 for index, token in enumerate(tokens) if token.is_sign(";")]
    created = 0
    for start in starts:
        if start == len(tokens) or tokens[start].is_sign(";"):
            continue
        created += 1
        if [token.name for token in tokens[start : start + 2]] != ["create", "table"]:
            beginning = " ".join(token.raw for token in tokens[start : start + 3])[:40]
            raise ValueError(f"statement {created} begins with {beginning!r}, not with CREATE TABLE")
    if not created:
        raise ValueError("it has no statement")
    if any(token.is_word("select", "values") for token in tokens):
        raise ValueError("it has a query in it")
    return tokens


_TABLE_CONSTRAINTS = ("constraint", "primary", "unique", "check", "foreign")


def _quote_column_names(tokens: list[Token]) -> str:
    """`CREATE TABLE t (order INT, to TEXT)` -> `CREATE TABLE t ( "order" INT , "to" TEXT )`."""
    parts: list[str] = []
    depth = 0
    for before, token in zip([None, *tokens[:-1]], tokens, strict=True):
        if token.is_sign(")"):
            depth -= 1
        begins_item = before is not None and before.is_sign("(", ",") and depth == 1
        if begins_item and token.kind == "word" and not token.is_word(*_TABLE_CONSTRAINTS):
            parts.append(_quote(token.text))
        else:
            parts.append(token.raw)
        if token.is_sign("("):
            depth += 1
    return " ".join(parts)


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
