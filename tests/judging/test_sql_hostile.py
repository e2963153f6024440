"""Hostile replies and contexts: judged within limits, nothing written, no crash."""

import resource
import sys
import time

import pytest

from dpo_lightning.judging.sql.normalize import equivalent_text
from dpo_lightning.judging.sql.sandbox import MAX_QUERY_CHARS, QueryError, Sandbox
from sql_verdicts import compiles, same_result

CONTEXT = "CREATE TABLE t (x VARCHAR, y INTEGER); CREATE TABLE u (x VARCHAR, z REAL)"
WANTED = "SELECT x FROM t WHERE y > 3"
HANG_SECONDS = 1.0  # CPU time of this thread, so a busy machine fails no test
MAX_GROWTH_MIB = 256


def doubling_ctes(levels: int) -> str:
    links = [f"c{i} AS (SELECT 1 FROM c{i - 1} p, c{i - 1} q)" for i in range(1, levels)]
    return "WITH c0 AS (SELECT 1 FROM t), " + ", ".join(links) + f" SELECT 1 FROM c{levels - 1}"


def fibonacci_ctes(levels: int) -> str:
    links = [f"c{i} AS (SELECT 1 FROM c{i - 1}, c{i - 2})" for i in range(2, levels)]
    starts = "WITH c0 AS (SELECT 1 FROM t), c1 AS (SELECT 1 FROM t), "
    return starts + ", ".join(links) + f" SELECT 1 FROM c{levels - 1}"


def chained_ctes(levels: int) -> str:
    """Flattened, `x || x` at each level makes an expression of 2 ** levels terms."""
    links = [f"c{i} AS (SELECT x || x AS x FROM c{i - 1})" for i in range(1, levels)]
    return "WITH c0 AS (SELECT x FROM t), " + ", ".join(links) + f" SELECT x FROM c{levels - 1}"


def sibling_ctes(levels: int, siblings: int) -> str:
    """Fibonacci's CTEs, each of several SELECTs strung together."""
    links = [
        f"c{i} AS ({' UNION ALL '.join([f'SELECT 1 FROM c{i - 1}, c{i - 2}'] * siblings)})" for i in range(2, levels)
    ]
    starts = "WITH c0 AS (SELECT 1 FROM t), c1 AS (SELECT 1 FROM t), "
    return starts + ", ".join(links) + f" SELECT 1 FROM c{levels - 1}"


def nested_replace(levels: int) -> str:
    text = "'aaaaaaaa'"
    for _ in range(levels):
        text = f"replace({text}, 'a', 'aaaaaaaa')"
    return f"SELECT {text}"


def shadowed_ctes(levels: int) -> str:
    query = "SELECT 1 FROM t"
    for _ in range(levels):
        query = f"WITH a AS ({query}) SELECT 1 FROM a p, a q"
    return query


COUNTER = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) "
GROWING = "WITH RECURSIVE r(s) AS (SELECT 'a' UNION ALL SELECT s || s FROM r) "
LONG = "hex(" * 9 + "'aaaaaaaa'" + ")" * 9  # 4096 characters
LONG_ROWS = f"WITH RECURSIVE r(s) AS (SELECT {LONG} UNION ALL SELECT s FROM r) "

# family -> replies
FAMILIES = {
    "files": [
        "SELECT readfile('/etc/passwd')",
        "SELECT writefile('stolen.txt', 'x')",
        "SELECT edit('x', 'vi')",
        "SELECT load_file('/etc/passwd')",
        "SELECT x FROM t INTO OUTFILE 'stolen.txt'",
        "SELECT * FROM fsdir('/')",
        "SELECT * FROM csv('/etc/passwd')",
        "SELECT * FROM read_csv_auto('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "COPY t TO 'stolen.txt'",
        ".output stolen.txt",
        ".shell touch stolen.txt",
        "SELECT * FROM dbstat",
        "SELECT * FROM zipfile('a.zip')",
    ],
    "attach": [
        "ATTACH 'stolen.db' AS s",
        "ATTACH DATABASE 'file:stolen.db?mode=rwc' AS s",
        "attach ':memory:' as m",
        "DETACH main",
        "SELECT 1; ATTACH 'stolen.db' AS s",
        "EXPLAIN ATTACH 'stolen.db' AS s",
        "/* SELECT */ ATTACH 'stolen.db' AS s",
    ],
    "pragma": [
        "PRAGMA writable_schema = 1",
        "PRAGMA journal_mode = WAL",
        "PRAGMA temp_store_directory = '.'",
        "PRAGMA hard_heap_limit = 1",
        "PRAGMA trusted_schema = ON",
        "SELECT * FROM pragma_table_info('t')",
        "SELECT * FROM pragma_database_list",
        "SELECT * FROM pragma_function_list",
        "SELECT * FROM pragma_module_list",
        "SELECT * FROM pragma_compile_options",
        "SELECT 1 FROM pragma_table_info('t')",
        "SELECT (SELECT name FROM pragma_database_list LIMIT 1)",
        "SELECT x FROM t, pragma_user_version",
    ],
    "extensions": [
        "SELECT load_extension('evil.so')",
        "SELECT load_extension('evil.so', 'main')",
        "SELECT x FROM t WHERE load_extension('evil.so') IS NULL",
        "SELECT fts3_tokenizer('simple', x'0000000000000000')",
        "SELECT fts3_tokenizer('simple')",
        "SELECT * FROM t ORDER BY load_extension(x)",
        "SELECT sqlite_log(1, 'x')",
        "SELECT rtreecheck('t')",
        "SELECT fts5(1)",
    ],
    "schema": [
        "SELECT * FROM sqlite_master",
        "SELECT sql FROM sqlite_schema",
        "SELECT name FROM sqlite_master AS sqlite_master",
        "SELECT * FROM sqlite_temp_master",
        "SELECT count(*) FROM sqlite_master",
        "SELECT 1 FROM sqlite_stmt",
        "WITH sqlite_master AS (SELECT 1) SELECT sql FROM main.sqlite_master",
        "SELECT sqlite_version(), sqlite_source_id()",
        "SELECT sqlite_compileoption_get(0)",
        "SELECT last_insert_rowid(), changes(), total_changes()",
    ],
    "writes": [
        "INSERT INTO t VALUES ('a', 1)",
        "UPDATE t SET x = 'a'",
        "DELETE FROM t",
        "REPLACE INTO t VALUES ('a', 1)",
        "DROP TABLE t",
        "ALTER TABLE t RENAME TO v",
        "CREATE TABLE s AS SELECT * FROM t",
        "CREATE TEMP TABLE s (x)",
        "CREATE VIEW v AS SELECT * FROM v",
        "CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT load_extension('evil.so'); END",
        "CREATE VIRTUAL TABLE v USING fts5(x)",
        "CREATE VIRTUAL TABLE v USING csv(filename='/etc/passwd')",
        "CREATE INDEX i ON t (x)",
        "VACUUM INTO 'stolen.db'",
        "VACUUM",
        "REINDEX",
        "ANALYZE",
        "BEGIN EXCLUSIVE",
        "SAVEPOINT s",
        "WITH a AS (SELECT 1) DELETE FROM t",
        "WITH a AS (SELECT 1) INSERT INTO t SELECT 'a', 1 FROM a",
        "WITH a AS (SELECT 1) UPDATE t SET x = 'a' RETURNING x",
        "SELECT * FROM (DELETE FROM t RETURNING x)",
    ],
    "statements": [
        "SELECT 1; SELECT 2",
        "SELECT 1; DROP TABLE t",
        "SELECT 1;;",
        "; SELECT 1",
        "SELECT 1; -- one",
        "SELECT 1; /*",
        "SELECT ';'; SELECT ';'",
        "SELECT 1 -- \n; DELETE FROM t",
        "SELECT 1 /* ; */; VACUUM INTO 'stolen.db'",
        "SELECT ?",
        "SELECT :a, @b, $c, ?1",
        "SELECT ?" + ", ?" * 400,
    ],
    "prose": [
        "Sure! SELECT x FROM t WHERE y > 3",
        "```sql\nSELECT x FROM t WHERE y > 3\n```",
        "SELECT x FROM t WHERE y > 3\n\nThis query selects x.",
        "SELECT",
        "WITH",
        "VALUES",
        ";",
        "",
        " \n\t",
        "--",
        "/*",
        "SELECT '",
        'SELECT "',
        "SELECT [",
        "SELECT `",
        "SELECT /* SELECT 1",
    ],
    "bytes": [
        "\0",
        "SELECT 'a\0b'",
        "SELECT 1\0; DROP TABLE t",
        "\0SELECT x FROM t",
        "SELECT \ud800",
        "SELECT '\udfff\ud800' FROM t",
        "SELECT x\ufeff FROM t",
        "\ufeffSELECT x FROM t WHERE y > 3",
        "SELECT\u00a0x FROM t",
        "SELECT x\u200b FROM t",
        "SELECT '\U0001f4a3' FROM \U0001f4a3",
        "ＳＥＬＥＣＴ x FROM t",
        "SELECT x FROM t WHERE x = '\u202e\u2066'",
        "ſELECT x FROM t",
        "SELECT CAST(x'fffe' AS TEXT), x'00', CAST(x'c0af' AS TEXT) FROM t",
        "SELECT char(0, 55296, 1114111, 1114112)",
        "\x1b[31mSELECT x FROM t",
        "\x01\x02\x03\x7f\x85\u2028",
    ],
    "size": [
        "a" * 1_000_000,
        "SELECT '" + "a" * 1_000_000 + "'",
        "SELECT " + "1," * 500_000 + "1",
        "SELECT 1" + " " * 1_000_000,
        "SELECT 1" + " " * 1_000_000 + "FROM t",
        "SELECT 1 --" + "-" * 1_000_000,
        ";" * 1_000_000,
        "\n" * 1_000_000,
        "SELECT " + "é" * 1_000_000,
        "'" * 1_000_000,
        "SELECT " + '"' * 1_000_001,
        "SELECT " + "/*" * 500_000,
        "SELECT 9" + "9" * (MAX_QUERY_CHARS - 20),
        "SELECT 9" + "9" * (MAX_QUERY_CHARS - 20) + "a",
        "SELECT " + "[" * (MAX_QUERY_CHARS - 20),
        "SELECT " + "'\"`" * (MAX_QUERY_CHARS // 3 - 20),
        "SELECT 1e" + "9" * (MAX_QUERY_CHARS - 20),
        "SELECT x FROM t WHERE x IN (" + ", ".join(map(str, range(900))) + ")",
    ],
    "nesting": [
        "SELECT " + "(" * 100_000 + "1" + ")" * 100_000,
        "(" * 100_000,
        *("SELECT " + "(" * depth + "1" + ")" * depth for depth in (40, 400, 2400)),
        *("SELECT " + "NOT " * depth + "1" for depth in (150, 1200)),
        *("SELECT " + "- " * depth + "1" for depth in (150, 2400)),
        *("SELECT 1" + " + 1" * count for count in (150, 1200)),
        *("SELECT " + "abs(" * depth + "1" + ")" * depth for depth in (90, 900)),
        *("SELECT " + "CASE WHEN 1 THEN " * depth + "1" + " END" * depth for depth in (30, 200)),
        *("SELECT * FROM (" * depth + "SELECT 1" + ")" * depth for depth in (10, 300)),
        "SELECT 1 WHERE 1 IN (" + "SELECT 1 WHERE 1 IN (" * 150 + "1" + ")" * 151,
        "SELECT 1" + " UNION ALL SELECT 1" * 200,
        "SELECT 1" + " UNION SELECT x FROM t" * 15,
        "SELECT x FROM t WHERE " + " OR ".join(f"(x = '{i}' AND y = {i})" for i in range(150)),
    ],
    "unfolding": [
        *map(doubling_ctes, (4, 12, 14, 15, 30, 60)),
        *map(fibonacci_ctes, (14, 40, 80)),
        *map(chained_ctes, (6, 13, 40, 80)),
        *map(shadowed_ctes, (4, 13, 40)),
        *(sibling_ctes(levels, siblings) for levels in (6, 10, 13, 16) for siblings in (2, 3, 4)),
    ],
    "endless": [
        COUNTER + "SELECT n FROM r",
        COUNTER + "SELECT count(*) FROM r",
        COUNTER + "SELECT max(n) FROM r ORDER BY 1",
        COUNTER + "SELECT n FROM r ORDER BY n DESC LIMIT 1",
        COUNTER + "SELECT DISTINCT n % 7 FROM r",
        COUNTER + "SELECT a.n FROM r a, r b",
        COUNTER + "SELECT 1 WHERE 5 NOT IN (SELECT -n FROM r)",
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION SELECT (n * 7 + 1) % 1000003 FROM r) SELECT count(*) FROM r",
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n FROM r LIMIT 1000000000) SELECT sum(n) FROM r",
        *("SELECT count(*) FROM " + ", ".join(f"t a{i}" for i in range(n)) for n in (6, 12, 40, 64, 65)),
        "SELECT * FROM " + ", ".join(f"t a{i}" for i in range(12)),
        "SELECT count(*) FROM " + " JOIN ".join(f"t a{i}" for i in range(8)) + " ON 1 ORDER BY 1",
        "SELECT count(*) FROM " + " CROSS JOIN ".join(f"t a{i} CROSS JOIN u b{i}" for i in range(8)),
    ],
    "memory": [
        "SELECT zeroblob(1000000000)",
        "SELECT randomblob(1000000000)",
        "SELECT replace(hex(zeroblob(100000000)), '0', 'aaaaaaaa')",
        "SELECT printf('%.*c', 1000000000, 'x')",
        "SELECT format('%1000000000d', 1)",
        "SELECT hex(hex(hex(hex(hex(hex(hex(hex('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'))))))))",
        *map(nested_replace, (3, 8, 60)),
        GROWING + "SELECT length(s) FROM r",
        GROWING + "SELECT s FROM r WHERE length(s) < 9000",
        LONG_ROWS + "SELECT s FROM r",
        LONG_ROWS + "SELECT s FROM r ORDER BY s",
        LONG_ROWS + "SELECT s, row_number() OVER (ORDER BY s) FROM r",
        LONG_ROWS + "SELECT DISTINCT s || random() FROM r",
        LONG_ROWS + "SELECT group_concat(s) FROM r",
        LONG_ROWS + "SELECT " + ", ".join(["s"] * 400) + " FROM r LIMIT 1900",
        COUNTER + "SELECT group_concat(n) FROM r",
        "SELECT group_concat(a.x || b.x || c.x || d.x || e.x) FROM t a, t b, t c, t d, t e",
        "SELECT " + ", ".join(["*"] * 300) + " FROM t a, t b, t c",
    ],
    "json": [
        "SELECT json('" + "[" * 2000 + "]" * 2000 + "')",
        "SELECT json_extract('" + "[" * 2000 + "', '$" + "[0]" * 300 + "')",
        "SELECT '" + "[" * 1500 + "' -> '$'",
        "SELECT json_group_array(a.x) FROM t a, t b, t c, t d, t e, t f",
    ],
    "table functions": [
        "SELECT * FROM json_each('[1, 2]')",
        "SELECT count(*) FROM json_tree('" + "[" * 900 + "]" * 900 + "')",
        "SELECT 1 FROM generate_series(1, 1000000000)",
    ],
    "windows": [
        *("SELECT " + ", ".join(f"sum(y) OVER (ORDER BY x, {i})" for i in range(count)) + " FROM t"
          for count in (20, 120)),
        "SELECT sum(a.y) OVER (ROWS BETWEEN 1000 PRECEDING AND 1000 FOLLOWING) FROM t a, t b, t c, t d",
        "SELECT group_concat(a.x) OVER (ORDER BY a.x, b.x, c.x) FROM t a, t b, t c",
        "SELECT nth_value(n, 1000000) OVER (ORDER BY n DESC) FROM (" + COUNTER + "SELECT n FROM r)",
    ],
    "slow functions": [
        LONG_ROWS + "SELECT count(*) FROM r WHERE s LIKE '" + "%3%6" * 100 + "%z'",
        LONG_ROWS + "SELECT count(*) FROM r WHERE s GLOB '" + "*3*6" * 100 + "*z'",
        LONG_ROWS + "SELECT sum(instr(s, substr(s, 2) || 'z')) FROM r",
        LONG_ROWS + "SELECT count(replace(s, '3', 'b')) FROM r",
        "SELECT " + " + ".join(f"instr({LONG}, substr({LONG}, {i}) || 'z')" for i in range(15)) + " FROM t",
        "SELECT round(1.5, 1000000000), substr('a', -9223372036854775807, 9223372036854775807)",
        "SELECT abs(-9223372036854775808)",
        "SELECT 9223372036854775807 + 1, 1e308 * 10, 1 / 0, -9223372036854775808 / -1",
        "SELECT strftime('" + "%J" * 1500 + "', 'now')",
    ],
}  # fmt: skip
REPLIES = [
    pytest.param(reply, id=f"{family}-{number}")
    for family, replies in FAMILIES.items()
    for number, reply in enumerate(replies)
]
NEVER_VALID = ("files", "attach", "pragma", "extensions", "schema", "writes", "statements", "prose", "table functions")


@pytest.fixture(autouse=True)
def nothing_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reply", REPLIES)
def test_hostile_replies_are_judged_within_limits(reply):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for judge in (
        lambda: compiles(reply, CONTEXT),
        lambda: equivalent_text(reply, WANTED),
        lambda: same_result(reply, WANTED, CONTEXT),
        lambda: same_result(reply, reply, CONTEXT),  # as the wanted query of a hostile data set
    ):
        start = time.thread_time()
        judge()
        assert time.thread_time() - start < HANG_SECONDS
    assert not same_result(reply, WANTED, CONTEXT)
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit < MAX_GROWTH_MIB


@pytest.mark.parametrize("family", NEVER_VALID)
def test_what_must_not_run_is_not_valid(family):
    assert [reply for reply in FAMILIES[family] if compiles(reply, CONTEXT)] == []


def test_there_are_two_hundred_hostile_replies():
    assert len(REPLIES) >= 200
    assert len({reply.values[0] for reply in REPLIES}) == len(REPLIES)


@pytest.mark.parametrize(
    "context",
    [
        "ATTACH 'stolen.db' AS s",
        "CREATE TABLE t (x); ATTACH 'stolen.db' AS s",
        "CREATE TABLE t (x); VACUUM INTO 'stolen.db'",
        "CREATE TABLE t (x); PRAGMA journal_mode = WAL",
        "CREATE TABLE t (x); INSERT INTO t VALUES (1)",
        "CREATE TABLE t AS SELECT 1",
        "CREATE TABLE t AS VALUES (1)",
        "CREATE TABLE t AS " + doubling_ctes(60),
        "CREATE TEMP TABLE t (x)",
        "CREATE TABLE temp.t (x)",
        "CREATE TABLE sqlite_stat1 (tbl, idx, stat)",
        "CREATE VIRTUAL TABLE t USING fts5(x)",
        "CREATE VIEW t AS SELECT 1",
        "CREATE TABLE t (x); CREATE TRIGGER g AFTER INSERT ON t BEGIN DELETE FROM t; END",
        "CREATE TABLE t (x CHECK (load_extension(x)))",
        "CREATE TABLE t (x, y GENERATED ALWAYS AS (randomblob(1000000000)))",
        "CREATE TABLE t (x CHECK (printf('%.*c', 1000000000, 'x') <> ''))",
        "CREATE TABLE t (x\0)",
        "CREATE TABLE t (\ud800 TEXT)",
        "CREATE TABLE t (" + "(" * 14_000 + "x" + ")" * 14_000 + ")",
        "CREATE TABLE t (x);" * 100_000,
        ";" * 1_000_000,
        "CREATE TABLE t (x " + "[" * 29_000,
        "CREATE TABLE t (x DEFAULT " + "9" * 29_000 + "a)",
        "CREATE TABLE t (x " + "/*" * 14_000,
        "CREATE TABLE t (" + ", ".join(f"c{i}" for i in range(5000)) + ")",
        "a" * 1_000_000,
    ],
)
def test_hostile_contexts_are_refused(context):
    start = time.thread_time()
    assert compiles("SELECT 1", context) is None
    assert time.thread_time() - start < HANG_SECONDS
    assert same_result("SELECT 1", "SELECT 1", context) is None


@pytest.mark.parametrize(
    "context",
    [
        "CREATE TABLE t (x TEXT, y INTEGER CHECK (y IS NULL OR y < 0))",
        "CREATE TABLE t (x TEXT UNIQUE NOT NULL, y INTEGER PRIMARY KEY)",
        "CREATE TABLE t (x CHECK (abs(-9223372036854775807 - length(x)) > 0), y)",
        "CREATE TABLE t (x CHECK (length(hex(hex(hex(hex(hex(hex(hex(hex(x))))))))) > 0), y)",
        "CREATE TABLE t (x INTEGER PRIMARY KEY, y TEXT) WITHOUT ROWID",
        "CREATE TABLE t (x INT, y INT) STRICT",
        "CREATE TABLE t (x, y, z GENERATED ALWAYS AS (hex(hex(hex(hex(x))))))",
        "CREATE TABLE t (x DEFAULT (hex(hex(hex(1)))), y)",
        'CREATE TABLE t ("x" PRIMARY KEY ON CONFLICT FAIL, y)',
        "CREATE TABLE t (x, y, " + ", ".join(f"c{i} TEXT" for i in range(400)) + ")",
        "; ".join(["CREATE TABLE t (x, y)", *(f"CREATE TABLE t{i} (x, y)" for i in range(300))]),
        "CREATE TABLE t (x, y, z CHECK (" + " AND ".join(["length(hex(x)) < 99"] * 90) + "))",
    ],
)
def test_odd_contexts_do_no_harm(context):
    start = time.thread_time()
    assert compiles("SELECT x, y FROM t", context) is True
    verdict = same_result("SELECT x, y FROM t WHERE x > 'a'", "SELECT x, y FROM t WHERE x > 'a'", context)
    assert verdict in (True, None)
    assert time.thread_time() - start < HANG_SECONDS


def test_a_query_cannot_leave_anything_behind():
    with Sandbox(CONTEXT) as sandbox:
        for reply in FAMILIES["writes"]:
            if reply == "REINDEX":  # there is no index, so there is nothing to stop
                continue
            with pytest.raises(QueryError):
                sandbox.run(reply)  # past read_query: the authorizer alone must stop it
        assert sandbox.run("SELECT count(*) FROM t").rows == [(0,)]


@pytest.mark.parametrize("family", ["attach", "pragma", "extensions", "schema", "files", "table functions"])
def test_the_authorizer_alone_stops_what_reaches_outside(family):
    with Sandbox(CONTEXT) as sandbox:
        for reply in FAMILIES[family]:
            with pytest.raises(QueryError):
                sandbox.run(reply)


def test_a_year_as_limit_belongs_to_no_column_of_dates():
    query = "SELECT name FROM t WHERE strftime('%Y', day) = '2010' LIMIT 2010"
    assert same_result(query, query, "CREATE TABLE t (name TEXT, day DATE)") is True
