"""Verdicts that a reader of both queries would not agree with: exact, same result, valid."""

import pytest

from dpo_lightning.judging.sql.normalize import equivalent_text
from sql_verdicts import compiles, same_result

PLAYERS = "CREATE TABLE players (name VARCHAR, team VARCHAR, goals INTEGER, year INTEGER, country VARCHAR)"
EVENTS = "CREATE TABLE e (id INTEGER, name VARCHAR, d DATE, s VARCHAR)"
CHAIN = "; ".join(f"CREATE TABLE t{i} (id INTEGER, n VARCHAR)" for i in range(30))
JOIN_OF_30 = "SELECT t0.n FROM t0 " + " ".join(f"JOIN t{i} ON t{i}.id = t{i - 1}.id" for i in range(1, 30))


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("SELECT x FROM t WHERE y = 'New  York'", "SELECT x FROM t WHERE y = 'New York'"),
        ("SELECT x FROM t -- c WHERE y > 3", "SELECT x FROM t -- c\nWHERE y > 3"),
        *((f"SELECT{blank}x FROM t", "SELECT x FROM t") for blank in "\u00a0\u3000\x0b\x1c\x85\u2028"),
        *((f"SELECT x FROM t WHERE y{blank}= 1", "SELECT x FROM t WHERE y = 1") for blank in "\u00a0\u3000\x0b"),
        ("SELECT x FROM t ORDER BY x NULLS LAST", "SELECT x FROM t ORDER BY x"),
        ("SELECT x FROM t ORDER BY x DESC NULLS FIRST", "SELECT x FROM t ORDER BY x DESC"),
        ("SELECT json_extract(x, '$.A') FROM t", "SELECT json_extract(x, '$.a') FROM t"),
        ("SELECT x -> '$.A' FROM t", "SELECT x -> '$.a' FROM t"),
        ("SELECT * FROM t OUTER JOIN u ON t.x = u.x", "SELECT * FROM t JOIN u ON t.x = u.x"),
        ("SELECT strftime('%m', x) FROM t", "SELECT strftime('%M', x) FROM t"),
    ],
)
def test_not_exact(reply, wanted):
    assert not equivalent_text(reply, wanted)
    assert not equivalent_text(wanted, reply)


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("SELECT x FROM t -- c", "SELECT x FROM t"),
        ("SELECT /* a\n b */x\tFROM\ft", "SELECT x FROM t"),
        ("SELECT x FROM t ORDER BY x NULLS FIRST", "SELECT x FROM t ORDER BY x"),
        ("SELECT x FROM t ORDER BY x DESC NULLS LAST", "SELECT x FROM t ORDER BY x DESC"),
        ("SELECT x FROM t ORDER BY x COLLATE nocase", "SELECT x FROM t ORDER BY x COLLATE NOCASE"),
        ("SELECT x FROM t WHERE y = \"a\u00a0b\"", "SELECT x FROM t WHERE y = 'a\u00a0b'"),
    ],
)  # fmt: skip
def test_exact(reply, wanted):
    assert equivalent_text(reply, wanted)
    assert equivalent_text(wanted, reply)


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("ORDER BY goals NULLS LAST", "ORDER BY goals"),
        ("ORDER BY goals DESC NULLS FIRST", "ORDER BY goals DESC"),
        ("ORDER BY goals NULLS LAST LIMIT 1", "ORDER BY goals LIMIT 1"),
        ("ORDER BY name COLLATE NOCASE LIMIT 1", "ORDER BY name LIMIT 1"),
        ("ORDER BY name COLLATE NOCASE DESC LIMIT 1", "ORDER BY name DESC LIMIT 1"),
        ("ORDER BY lower(name)", "ORDER BY name"),
    ],
)
def test_another_order_is_another_result(reply, wanted):
    wanted = f"SELECT name FROM players {wanted}"
    assert same_result(f"SELECT name FROM players {reply}", wanted, PLAYERS) is False
    assert same_result(wanted, wanted, PLAYERS) is True


@pytest.mark.parametrize("day", ["d", "s"])
@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("'1990' = strftime('%Y', {})", "strftime('%Y', {}) = '1990'"),
        ("strftime('%Y', {}) = '1990'", "'1990' = strftime('%Y', {})"),
        ("strftime('%Y', {}) = '1990'", "CAST(strftime('%Y', {}) AS INTEGER) = 1990"),
        ("strftime('%Y', {}) IN ('1990')", "strftime('%Y', {}) = '1990'"),
        ("strftime('%d', {}) = '15'", "strftime('%d', {}) = '15'"),
        ("strftime('%w', {}) = '0'", "strftime('%w', {}) = '0'"),
        ("{} >= '1990-01-01' AND {} < '1991-01-01'", "strftime('%Y', {}) = '1990'"),
        ("strftime('%H', {}) = '13'", "strftime('%H', {}) = '13'"),
        ("date({}, '+1 day') = '1990-05-04'", "date({}, '+1 day') = '1990-05-04'"),
    ],
)
def test_dates_are_drawn_around_the_formats(reply, wanted, day):
    reply, wanted = (f"SELECT name FROM e WHERE {text.replace('{}', day)}" for text in (reply, wanted))
    assert same_result(reply, wanted, EVENTS) is True


@pytest.mark.parametrize(
    ("reply", "context"),
    [
        ("SELECT printf('%.2f', goals), format('%05d', goals) FROM players", PLAYERS),
        ("SELECT json_extract(name, '$.a'), json_array(1), json_group_array(name) FROM players", PLAYERS),
        ("SELECT name FROM players WHERE likely(goals > 1) AND unlikely(year > 1)", PLAYERS),
        ("SELECT quote(name), zeroblob(9), sin(goals), degrees(goals) FROM players", PLAYERS),
        (" UNION ".join(["SELECT name FROM players WHERE name > 'a' AND name < 'c' AND name != 'b'"] * 6), PLAYERS),
        (" UNION ALL ".join(["SELECT name FROM players"] * 18), PLAYERS),
        (JOIN_OF_30, CHAIN),
    ],
)
def test_valid(reply, context):
    assert compiles(reply, context) is True


def test_blanks_around_a_text_count():
    wanted = "SELECT goals FROM players WHERE name = 'ab'"
    assert same_result("SELECT goals FROM players WHERE trim(name) = 'ab'", wanted, PLAYERS) is False


def test_a_join_of_thirty_tables_is_executed():
    assert same_result(JOIN_OF_30, JOIN_OF_30, CHAIN) is True


def test_a_hexadecimal_literal_is_a_number():
    wanted = "SELECT name FROM players WHERE goals = 0x10"
    assert same_result("SELECT name FROM players WHERE goals = 16", wanted, PLAYERS) is True
    assert same_result("SELECT name FROM players WHERE goals = 15", wanted, PLAYERS) is False


@pytest.mark.parametrize("reply", ["SELECT printf('%*d', 1000000000, 1)", "SELECT format('%.1000000000d', 1)"])
def test_wide_fields_are_refused(reply):
    assert same_result("SELECT 1", reply, PLAYERS) is None
