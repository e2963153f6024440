"""sql/valid, sql/exact and sql/execution: judged by hand, and on the WikiSQL rows where they are at hand."""

import json
import math
from pathlib import Path

import pytest

from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.judging.judge import VerdictMeans, verdicts
from dpo_lightning.judging.sql.fill import draw_fillings, plan_fillings
from dpo_lightning.judging.sql.judge import sql
from dpo_lightning.judging.sql.normalize import equivalent_text
from dpo_lightning.judging.sql.sandbox import Sandbox
from dpo_lightning.judging.sql.tokens import tokenize
from dpo_lightning.models.reply import Reply
from sql_verdicts import compiles, same_result

WIKISQL = Path(__file__).parents[2] / ".." / "shared" / "data" / "wikisql-test.jsonl"

PLAYERS = "CREATE TABLE players (name VARCHAR, team VARCHAR, goals INTEGER, year INTEGER, country VARCHAR)"
SCHOOL = (
    "CREATE TABLE student (id INTEGER PRIMARY KEY, name TEXT, age INTEGER, city TEXT); "
    "CREATE TABLE grade (student_id INTEGER, course TEXT, mark REAL)"
)
SHOP = (
    "CREATE TABLE customer (customer_id VARCHAR, name VARCHAR, city VARCHAR); "
    "CREATE TABLE orders (order_id VARCHAR, customer_id VARCHAR, total INTEGER, day DATE)"
)

# (context, wanted, reply): each pair was judged by reading it, before any of this code ran on it.
SAME = [
    (
        PLAYERS,
        'SELECT name FROM players WHERE team = "Ajax"',
        "select T1.name from players as T1 where T1.team='Ajax'",
    ),
    (PLAYERS, "SELECT name FROM players WHERE goals > 10", "SELECT name FROM players WHERE NOT goals <= 10"),
    (PLAYERS, "SELECT name FROM players WHERE goals >= 10", "SELECT name FROM players WHERE goals > 9"),
    (PLAYERS, "SELECT COUNT(*) FROM players", "SELECT SUM(1) FROM players"),
    (
        PLAYERS,
        "SELECT name FROM players WHERE goals BETWEEN 3 AND 7",
        "SELECT name FROM players WHERE 3 <= goals AND goals <= 7",
    ),
    (
        PLAYERS,
        "SELECT name FROM players WHERE team IN ('Ajax', 'PSV')",
        "SELECT name FROM players WHERE team = 'PSV' OR team = 'Ajax'",
    ),
    (
        PLAYERS,
        "SELECT name FROM players WHERE team = 'Ajax' AND year = 2010",
        "SELECT name FROM players WHERE year = 2010 AND team = 'Ajax'",
    ),
    (PLAYERS, "SELECT DISTINCT team FROM players", "SELECT team FROM players GROUP BY team"),
    (
        PLAYERS,
        "SELECT team, COUNT(*) FROM players GROUP BY team ORDER BY COUNT(*) DESC",
        "SELECT team, COUNT(*) AS n FROM players GROUP BY team ORDER BY n DESC",
    ),
    (PLAYERS, "SELECT AVG(goals) FROM players", "SELECT SUM(goals) * 1.0 / COUNT(goals) FROM players"),
    (PLAYERS, "SELECT MAX(goals) FROM players", "SELECT -MIN(-goals) FROM players"),
    (
        PLAYERS,
        "SELECT name FROM players WHERE goals = (SELECT MAX(goals) FROM players)",
        "SELECT name FROM players WHERE goals >= (SELECT MAX(p.goals) FROM players AS p)",
    ),
    (
        SCHOOL,
        "SELECT T1.name FROM student T1 JOIN grade T2 ON T1.id = T2.student_id WHERE T2.course = 'Math'",
        "SELECT name FROM grade, student WHERE student_id = id AND course = 'Math'",
    ),
    (
        SCHOOL,
        "SELECT name FROM student WHERE id IN (SELECT student_id FROM grade WHERE mark > 5.5)",
        "SELECT name FROM student s WHERE EXISTS (SELECT 1 FROM grade g WHERE g.student_id = s.id AND g.mark > 5.5)",
    ),
    (
        SCHOOL,
        "SELECT id FROM student EXCEPT SELECT student_id FROM grade",
        "SELECT id FROM student WHERE NOT EXISTS (SELECT 1 FROM grade WHERE student_id = id)",
    ),
    (
        SCHOOL,
        "SELECT s.name, g.course FROM student s LEFT JOIN grade g ON g.student_id = s.id",
        "SELECT s.name, g.course FROM student s LEFT OUTER JOIN grade g ON s.id = g.student_id",
    ),
    (
        SCHOOL,
        "SELECT name FROM student WHERE age > 20 INTERSECT SELECT name FROM student WHERE city = 'Oslo'",
        "SELECT DISTINCT a.name FROM student a JOIN student b ON a.name IS b.name WHERE a.age > 20 AND b.city = 'Oslo'",
    ),
    (
        SHOP,
        "SELECT name FROM customer JOIN orders USING (customer_id) GROUP BY name HAVING COUNT(*) > 3",
        "WITH n AS (SELECT name, COUNT(*) AS k FROM customer c JOIN orders o ON c.customer_id = o.customer_id"
        " GROUP BY name) SELECT name FROM n WHERE k >= 4",
    ),
    (
        SHOP,
        "SELECT COUNT(*) FROM orders WHERE strftime('%Y', day) = '2010'",
        "SELECT COUNT(*) FROM orders WHERE day LIKE '2010-%'",
    ),
    (
        SHOP,
        "SELECT name FROM customer WHERE city LIKE '%York%'",
        "SELECT name FROM customer WHERE instr(lower(city), 'york') > 0",
    ),
]
DIFFERENT = [
    (PLAYERS, "SELECT name FROM players WHERE goals > 10", "SELECT name FROM players WHERE goals >= 10"),
    (PLAYERS, "SELECT name FROM players WHERE year = 1990", "SELECT name FROM players WHERE year = 1991"),
    (PLAYERS, "SELECT name FROM players WHERE team = 'Ajax'", "SELECT name FROM players WHERE team = 'ajax'"),
    (
        PLAYERS,
        "SELECT name FROM players WHERE team = 'Ajax' AND year > 2000 AND country = 'Mali'",
        "SELECT name FROM players WHERE team = 'Ajax' AND year > 2000 OR country = 'Mali'",
    ),
    (
        PLAYERS,
        "SELECT name FROM players WHERE team = 'Ajax' AND goals = 7",
        "SELECT name FROM players WHERE team = 'Ajax'",
    ),
    (PLAYERS, "SELECT MIN(goals) FROM players", "SELECT MAX(goals) FROM players"),
    (
        PLAYERS,
        "SELECT COUNT(*) FROM players WHERE team = 'Ajax'",
        "SELECT COUNT(country) FROM players WHERE team = 'Ajax'",
    ),
    (
        PLAYERS,
        "SELECT COUNT(DISTINCT country) FROM players WHERE team = 'Ajax'",
        "SELECT COUNT(country) FROM players WHERE team = 'Ajax'",
    ),
    (PLAYERS, "SELECT DISTINCT country FROM players", "SELECT country FROM players"),
    (
        PLAYERS,
        "SELECT name FROM players WHERE team = 'Ajax'",
        "SELECT country FROM players WHERE team = 'Ajax'",
    ),
    (PLAYERS, "SELECT name, team FROM players", "SELECT team, name FROM players"),
    (
        PLAYERS,
        "SELECT name FROM players ORDER BY goals DESC LIMIT 3",
        "SELECT name FROM players ORDER BY goals DESC LIMIT 4",
    ),
    (PLAYERS, "SELECT name FROM players ORDER BY goals", "SELECT name FROM players ORDER BY goals DESC"),
    (PLAYERS, "SELECT name FROM players ORDER BY goals", "SELECT name FROM players"),
    (PLAYERS, "SELECT SUM(goals) FROM players", "SELECT AVG(goals) FROM players"),
    (
        SCHOOL,
        "SELECT s.name, g.course FROM student s LEFT JOIN grade g ON s.id = g.student_id",
        "SELECT s.name, g.course FROM student s JOIN grade g ON s.id = g.student_id",
    ),
    (
        SCHOOL,
        "SELECT name FROM student WHERE id NOT IN (SELECT student_id FROM grade WHERE course = 'Math'"
        " AND NOT student_id IS NULL)",
        "SELECT T1.name FROM student T1 JOIN grade T2 ON T1.id = T2.student_id WHERE T2.course <> 'Math'",
    ),
    (
        SCHOOL,
        "SELECT course FROM grade GROUP BY course HAVING COUNT(*) > 5",
        "SELECT course FROM grade GROUP BY course HAVING COUNT(*) >= 5",
    ),
    (
        SHOP,
        "SELECT city FROM customer WHERE name LIKE 'Mc%'",
        "SELECT city FROM customer WHERE name LIKE '%Mc%'",
    ),
    (
        SHOP,
        "SELECT name FROM customer T1 JOIN orders T2 ON T1.customer_id = T2.customer_id WHERE total > 100",
        "SELECT name FROM customer T1 JOIN orders T2 ON T1.customer_id = T2.order_id WHERE total > 100",
    ),
]


@pytest.mark.parametrize(("context", "wanted", "reply"), SAME)
def test_equal_in_different_clothes_gives_the_same_result(context, wanted, reply):
    assert same_result(reply, wanted, context) is True
    assert same_result(wanted, reply, context) is True


@pytest.mark.parametrize(("context", "wanted", "reply"), DIFFERENT)
def test_different_though_similar_gives_another_result(context, wanted, reply):
    assert same_result(reply, wanted, context) is False
    if ("ORDER BY" in wanted) == ("ORDER BY" in reply):  # a reply may be in an order that nobody asked for
        assert same_result(wanted, reply, context) is False


def test_there_are_forty_hand_judged_pairs():
    assert len(SAME) == len(DIFFERENT) == 20


@pytest.mark.parametrize(
    "reply",
    [
        "SELECT name FROM players",
        "  SELECT name FROM players ;\n",
        "select NAME from Players where TEAM = 'Ajax'",
        'SELECT name FROM players WHERE country = "South Australia"',  # a string to sqlite: no such column
        "SELECT `name`, [team] FROM players -- with a comment",
        "WITH a AS (SELECT name FROM players) SELECT COUNT(*) FROM a",
        "WITH RECURSIVE a(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM a WHERE n < 9) SELECT COUNT(*) FROM a",
        "VALUES (1, 2)",
        "SELECT name, RANK() OVER (PARTITION BY team ORDER BY goals) FROM players",
        "SELECT team FROM players GROUP BY team HAVING COUNT(*) > (SELECT COUNT(*) FROM players) / 9",
    ],
)
def test_valid(reply):
    assert compiles(reply, PLAYERS) is True


@pytest.mark.parametrize(
    "reply",
    [
        "",
        ";",
        "The answer is SELECT name FROM players",
        "```sql\nSELECT name FROM players\n```",
        "SELECT name FROM players;;",
        "SELECT name FROM players; SELECT 1",
        "SELECT nmae FROM players",
        "SELECT name FROM player",
        "SELECT name FROM players WHERE country = South Australia",
        "SELECT name FROM players WHERE",
        "SELECTname FROM players",
        "INSERT INTO players (name) VALUES ('x')",
        "EXPLAIN SELECT name FROM players",
        "SELECT name FROM players WHERE name = ?",
        "SELECT NOW() FROM players",
    ],
)
def test_invalid(reply):
    assert compiles(reply, PLAYERS) is False


@pytest.mark.parametrize(
    ("context", "reply"),
    [
        ("CREATE TABLE t (a INT)", "SELECT a FROM t"),
        ("CREATE TABLE `my table` (`a b` VARCHAR(9), [c] DECIMAL(9, 2));", 'SELECT "a b", c FROM "my table"'),
        ("CREATE TABLE t (order INTEGER, to VARCHAR, 2nd_run VARCHAR)", 'SELECT "to", "2nd_run" FROM t'),
        ("create table if not exists t (a int default 3, check (a > 0), unique (a))", "SELECT a FROM t"),
        ("CREATE TABLE a (x INT); -- one\nCREATE TABLE b (y INT REFERENCES a (x));", "SELECT y FROM b"),
        ("CREATE TABLE t (a INT, b INT GENERATED ALWAYS AS (a + 1)) ", "SELECT b FROM t"),
    ],
)
def test_contexts_of_all_kinds(context, reply):
    assert compiles(reply, context) is True
    assert same_result(reply, reply, context) is True


@pytest.mark.parametrize(
    ("context", "complaint"),
    [
        ("", "no statement"),
        ("players(name, team)", "statement 1 begins with 'players"),
        ("CREATE TABLE t (a INT); INSERT INTO t VALUES (1)", "statement 2 begins with 'INSERT INTO t'"),
        ("CREATE TABLE t (a INT", "incomplete input"),
        ("CREATE TABLE t AS SELECT 1", "a query in it"),
        ("CREATE TABLE t (a INT); CREATE TABLE t (a INT)", "already exists"),
    ],
)
def test_a_broken_context_is_not_judged(context, complaint):
    assert compiles("SELECT 1", context) is None
    assert same_result("SELECT 1", "SELECT 1", context) is None
    with pytest.raises(ValueError, match=complaint):
        Sandbox(context)


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("select NAME from PLAYERS", "SELECT name FROM players;"),
        ('SELECT "name" FROM `players`', "SELECT name FROM players"),
        ("SELECT name FROM players WHERE team='Ajax'", 'SELECT name FROM players WHERE team = "Ajax"'),
        ("SELECT name FROM p WHERE team IN ('a', 'b')", 'SELECT name FROM p WHERE team IN ("a", "b")'),
        ("SELECT T1.name FROM players AS T1 WHERE T1.n <> 'A'", "SELECT name FROM players WHERE n != 'A'"),
        ("SELECT x.c FROM a x INNER JOIN b y ON x.i = y.i", "SELECT p.c FROM a AS p JOIN b q ON p.i = q.i"),
        ("SELECT a.c FROM a JOIN b ON a.i = b.i", "SELECT T1.c FROM a AS T1 JOIN b AS T2 ON T1.i = T2.i"),
        ("SELECT a FROM t WHERE (x=1) AND ((y=2) AND z=3)", "SELECT a FROM t WHERE x=1 AND y=2 AND z=3"),
        ("SELECT a, COUNT(*) AS n FROM t GROUP BY a ORDER BY n ASC",
         "SELECT a, count( * ) FROM t GROUP BY a ORDER BY COUNT(*)"),
        ("SELECT a FROM t AS o WHERE x > (SELECT AVG(i.x) FROM t AS i WHERE i.b = o.b)",
         "SELECT a FROM t AS p WHERE x > (SELECT AVG(q.x) FROM t AS q WHERE q.b = p.b)"),
        ("no   query", "no query"),
    ],
)  # fmt: skip
def test_equivalent_text(reply, wanted):
    assert equivalent_text(reply, wanted)
    assert equivalent_text(wanted, reply)


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("SELECT name FROM players WHERE team = 'ajax'", "SELECT name FROM players WHERE team = 'Ajax'"),
        ('SELECT name FROM players WHERE team = "ajax"', "SELECT name FROM players WHERE team = 'Ajax'"),
        ("SELECT name FROM players", "SELECT team FROM players"),
        ("SELECT a FROM t WHERE (x=1 OR y=2) AND z=3", "SELECT a FROM t WHERE x=1 OR y=2 AND z=3"),
        ("SELECT a FROM t ORDER BY a DESC", "SELECT a FROM t ORDER BY a"),
        ("SELECT x.a FROM t x JOIN t y ON x.i = y.j", "SELECT y.a FROM t x JOIN t y ON x.i = y.j"),
        ("SELECT a FROM t AS o WHERE x > (SELECT AVG(i.x) FROM t AS i WHERE i.b = i.b)",
         "SELECT a FROM t AS o WHERE x > (SELECT AVG(i.x) FROM t AS i WHERE i.b = o.b)"),
        ("SELECT a FROM t LEFT JOIN u ON t.i = u.i", "SELECT a FROM t JOIN u ON t.i = u.i"),
        ("SELECT a AS n FROM t HAVING n > 3", "SELECT a FROM t HAVING n > 3"),
        ("SELECT 1; SELECT 1", "SELECT 1"),
        ("Answer: SELECT 1", "SELECT 1"),
        ("", "SELECT 1"),
    ],
)  # fmt: skip
def test_not_equivalent_text(reply, wanted):
    assert not equivalent_text(reply, wanted)
    assert not equivalent_text(wanted, reply)


def test_same_result_is_not_judged_without_a_wanted_query_that_runs_and_tells():
    assert same_result("SELECT name FROM players", "SELECT nmae FROM players", PLAYERS) is None
    never = "SELECT name FROM players WHERE 1 = 2"
    assert same_result(never, never, PLAYERS) is None
    assert same_result("SELECT name FROM players", never, PLAYERS) is False


def test_same_result_looks_at_the_replys_literals_too():
    wanted, reply = "SELECT name FROM players", "SELECT name FROM players WHERE country != 'Chad'"
    assert same_result(reply, wanted, PLAYERS) is False


def test_ties_are_not_held_against_a_reply():
    wanted = "SELECT name FROM players ORDER BY goals DESC LIMIT 3"
    assert same_result(wanted.replace("players", "players p, (SELECT 1) q"), wanted, PLAYERS) is True


def test_fillings_depend_on_the_seed_alone():
    with Sandbox(PLAYERS) as sandbox:
        plan = plan_fillings(sandbox.tables, [tokenize("SELECT name FROM players WHERE year > 1990")])
    first, again, other = (list(draw_fillings(plan, 6, seed)) for seed in ("a", "a", "b"))
    assert first == again != other
    years = {row[3] for filling in first for row in filling["players"]}
    assert {1989, 1990, 1991, None} <= years


WANTED = "SELECT name FROM players WHERE goals > 9"


def judged(*answered):
    """The means of the verdicts on (reply, context) pairs, as they were added up."""
    means = VerdictMeans()
    pairs = [PreferencePair("p", f" {WANTED}", "", context) for _, context in answered]
    replies = [Reply(text, [], True) for text, _ in answered]
    means.update([verdicts({"sql": sql}, reply, pair) for reply, pair in zip(replies, pairs, strict=True)])
    return means


def test_means_weigh_replies_and_merge_over_ranks():
    """Two ranks with 3 and 1 replies."""
    replies = ["SELECT name FROM players WHERE goals >= 10", "Well,", WANTED.lower()]
    rank_0, rank_1 = [(reply, PLAYERS) for reply in replies], [("SELECT 1", "no table")]
    first, second, both = judged(*rank_0), judged(*rank_1), judged(*rank_0, *rank_1)
    first.merge(second.totals)
    assert (
        first.compute()
        == both.compute()
        == {
            "sql/valid": 2 / 3,
            "sql/exact": 1 / 4,
            "sql/execution": 2 / 3,
            "sql/unjudged": 1 / 4,
        }
    )


def test_means_of_nothing_are_nan():
    values = judged(("SELECT 1", "no table")).compute()
    assert set(values) == {"sql/valid", "sql/exact", "sql/execution", "sql/unjudged"}
    assert {name for name, value in values.items() if math.isnan(value)} == {"sql/valid", "sql/execution"}


@pytest.mark.skipif(not WIKISQL.exists(), reason="the WikiSQL rows are not at hand")
def test_wikisql_rows_are_valid_exact_and_executable():
    rows = [json.loads(line) for line in WIKISQL.read_text().splitlines()]
    assert len(rows) > 90
    for row in rows:
        assert compiles(row["answer"], row["context"]) is True
        assert equivalent_text(row["answer"], row["answer"])
        assert same_result(row["answer"], row["answer"], row["context"]) is True
