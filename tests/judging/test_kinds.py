"""The judges that a setting can name: what each says of a reply, its options, and which verdict decides."""

import json

import pytest
import yaml

from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.errors import UserError
from dpo_lightning.judging.judge import find_judges, find_score, verdicts
from dpo_lightning.judging.quantities import quantity
from dpo_lightning.models.reply import Reply

PLAYERS = "CREATE TABLE players (name VARCHAR, team VARCHAR, goals INTEGER, day DATE)"
AJAX = "SELECT name FROM players WHERE team = 'Ajax'"
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0}, "name": {"type": "string", "pattern": "^(a+)+$"}},
    "required": ["age"],
}


def judged(setting, reply, chosen="", context=""):
    """The verdicts on a reply, and what decides."""
    score, reply, pair = find_score(setting), Reply(reply, [1], True), PreferencePair("p", chosen, "", context)
    found = verdicts(score.judges, reply, pair)
    assert score.read(found) == score(reply, pair)
    return found, score.read(found)


@pytest.mark.parametrize(
    ("options", "reply", "chosen", "same"),
    [
        ({}, "  SELECT a\n\tFROM t ", " SELECT a FROM t", 1.0),
        ({}, "SELECT A FROM t", "SELECT a FROM t", 0.0),
        ({}, "SELECTa FROM t", "SELECT a FROM t", 0.0),
        ({"ignore_case": True}, "STRASSE  a", "straße A", 1.0),
        ({"ignore_case": True}, "", "a", 0.0),
    ],
)
def test_exact(options, reply, chosen, same):
    found, score = judged({"exact": options}, reply, chosen)
    assert found["exact/match"] == same == score


@pytest.mark.parametrize(
    ("options", "reply", "matches"),
    [
        ("^SELECT", " SELECT a", 1.0),
        ("^SELECT", "I think SELECT", 0.0),
        ({"pattern": r"\d+"}, "a 12 b", 1.0),
        ({"pattern": r"\d+", "full_match": True}, "a 12 b", 0.0),
        ({"pattern": r"\d+", "full_match": True}, "\n12 ", 1.0),
    ],
)
def test_regex(options, reply, matches):
    found, score = judged({"regex": options}, reply)
    assert found["regex/match"] == matches == score and found["regex/unjudged"] is False


@pytest.mark.parametrize(
    ("reply", "parses", "valid"),
    [
        (' {"age": 3}\n', True, True),
        ('{"age": -1}', True, False),
        ("[]", True, False),
        ('{"age": NaN}', False, False),
        ('{"age": 3} and more', False, False),
        ("", False, False),
        ("[" * 100_000, False, False),
        ('{"age": ' + "9" * 5_000 + "}", False, False),
    ],
)
def test_json_schema(reply, parses, valid, tmp_path):
    pytest.importorskip("jsonschema")
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    found, score = judged({"json_schema": str(tmp_path / "person.json")}, reply)
    assert (found["json_schema/parses"], found["json_schema/valid"]) == (parses, valid) and score == valid


def test_a_schema_fetches_nothing_and_a_hostile_reply_does_not_hang():
    pytest.importorskip("jsonschema")
    fetching = {"json_schema": {"schema": {"$ref": "http://127.0.0.1:1/s.json"}}}
    with pytest.warns(UserWarning, match="json_schema/unjudged is their share"):
        assert judged(fetching, "{}")[1] is None
    hanging = {"json_schema": {"schema": PERSON, "timeout": 0.5}}
    with pytest.warns(UserWarning, match="took more than 0.5 seconds"):
        found, score = judged(hanging, json.dumps({"age": 1, "name": "a" * 40 + "b"}))
    assert found["json_schema/unjudged"] is True and score is None


@pytest.mark.parametrize(
    ("reply", "wanted", "strict", "ignoring"),
    [
        ("SELECT name FROM players WHERE team = 'ajax'", AJAX, False, True),
        ("SELECT name FROM players WHERE upper(team) = 'AJAX'", "SELECT name FROM players WHERE lower(team) = 'ajax'",
         True, True),
        ("SELECT name FROM players WHERE team = 'PSV'", AJAX, False, False),
        ("SELECT goals FROM players WHERE team = 'ajax'", AJAX, False, False),
        ("SELECT lower(name) FROM players WHERE team = 'Ajax'", AJAX, False, True),
        ("SELECT name FROM players WHERE team IN ('PSV', 'AJAX')",
         'SELECT name FROM players WHERE team = "Ajax" OR team = "psv"', False, True),
        # The formats %m and %M are not letters' case.
        ("SELECT name FROM players WHERE strftime('%M', day) = '05'",
         "SELECT name FROM players WHERE strftime('%m', day) = '05'", False, False),
        ("SELECT name FROM", AJAX, False, False),
        ("SELECT x'4A' FROM players", "SELECT x'4a' FROM players", True, True),
        (AJAX, "not a query", None, None),
    ],
)  # fmt: skip
def test_sql_with_and_without_regard_to_case(reply, wanted, strict, ignoring):
    found, score = judged({"sql": {"ignore_case": True}}, reply, wanted, PLAYERS)
    assert (found["sql/execution"], found["sql/execution_ignoring_case"]) == (strict, ignoring)
    assert score == ignoring
    found, score = judged("sql", reply, wanted, PLAYERS)
    assert "sql/execution_ignoring_case" not in found and score == found["sql/execution"] == strict


def test_a_tables_own_texts_are_lower_case_too():
    context = "CREATE TABLE people (sex VARCHAR CHECK (sex IN ('M', 'F')), age INTEGER)"
    wanted = "SELECT age FROM people WHERE sex = 'M'"
    found, _ = judged({"sql": {"ignore_case": True}}, wanted.replace("'M'", "'m'"), wanted, context)
    assert found["sql/execution"] is False and found["sql/execution_ignoring_case"] is True


@pytest.mark.parametrize("ignore_case", [False, True])
@pytest.mark.parametrize(
    ("reply", "wanted", "right"),
    [
        ("SELECT goals FROM players", AJAX, 0.0),
        (AJAX, AJAX, 1.0),
        ("SELECT goals FROM players", "", 1.0),
        ("SELECT goal FROM players", "", 0.0),
    ],
)
def test_without_an_answer_valid_sql_can_be_enough(reply, wanted, right, ignore_case):
    options = {"valid_without_answer": True, "ignore_case": ignore_case}
    found, score = judged({"sql": options}, reply, wanted, PLAYERS)
    assert score == right
    listed = [f"sql/{verdict}" for verdict in find_score({"sql": options}).judges["sql"].verdicts]
    assert sorted(listed) == sorted(name for name in found if name.startswith("sql/")), "for the charts of TensorBoard"
    assert judged({"sql": options}, reply, wanted)[1] is None  # nor tables to be valid for
    assert judged("sql", reply, "", PLAYERS)[1] is None


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"scores_{abs(hash(tmp_path))}"

    def write(body):
        (tmp_path / f"{name}.py").write_text(f"import numpy\ndef grade(reply, pair):\n    return {body}\n")
        return f"{name}:grade"

    return write


@pytest.mark.parametrize(
    ("body", "name", "score"),
    [
        ("len(reply.text) / 2", "grade/score", 2.0),
        ("numpy.float32(0.5)", "grade/score", 0.5),
        ("pair.chosen == ' ab' and reply.stopped", "grade/score", 1.0),
        ("None", "grade/score", None),
        ("float('nan')", "grade/score", None),
        ("{'short': True}", "grade/short", 1.0),
        ("{'short': True, 'score': -3}", "grade/score", -3.0),
        ("{}", "grade/score", None),
    ],
)
def test_python_takes_any_number_or_verdicts(own, body, name, score):
    scored = find_score({"python": {"function": own(body), "margin": 0.25}})
    assert scored(Reply("abcd", [1], True), PreferencePair("p", " ab", "")) == score
    assert (scored.name, scored.margin) == (name, 0.25)


def test_several_verdicts_do_not_say_which_one_decides(own):
    score = find_score(own("{'a': 1, 'b': 2}"))
    with pytest.raises(UserError, match="returns 2 verdicts, none of which is called score"):
        score(Reply("", [], True), PreferencePair("p", "", ""))


FORMS = [
    ("sql", ["sql"]),
    ("[sql, exact]", ["sql", "exact"]),
    ("{sql: }", ["sql"]),
    ("{sql: {ignore_case: true}}", ["sql"]),
    ("{regex: '^a'}", ["regex"]),
    ("{regex: {pattern: '^a', name: starts}}", ["starts"]),
    ("[sql, {regex: a}, {regex: {pattern: b, name: b}}]", ["sql", "regex", "b"]),
    ("{sql: {}, exact: {ignore_case: true}}", ["sql", "exact"]),
    ("math:cos", ["cos"]),
    ("[exact, {python: math:cos}]", ["exact", "cos"]),
    ("{python: {function: math:cos, timeout: 3, memory: 0.5, name: angle}}", ["angle"]),
    ("[]", []),
]


@pytest.mark.parametrize(("text", "names"), FORMS)
def test_forms_in_yaml(text, names):
    assert list(find_judges(yaml.safe_load(text))) == [*names, "reply"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[[sql]]",
            "replies.judge is .* it must be a text or settings of its own .* or a list, each a text or settings",
        ),
        ("exakt", "replies.judge 'exakt' is unknown: one of sql, exact, regex, .*did you mean 'exact'"),
        ("{regx: a}", "'regx' is unknown"),
        ("regex", "replies.judge: regex needs pattern: {regex: {pattern: ...}}"),
        (
            "{regex: {patterns: a}}",
            "regex has no option 'patterns': it has pattern, full_match, .*did you mean 'pattern'",
        ),
        ("{regex: '('}", r"regex: pattern '\(' is no regular expression: missing \)"),
        ("{regex: {pattern: 3}}", "replies.judge: regex.pattern is 3: it must be a text"),
        ("{regex: 3}", "replies.judge: regex is 3: it must be its options"),
        ("{regex: {pattern: a, timeout: 0}}", "regex.timeout is 0: it must be above 0"),
        ("{regex: {pattern: a, name: a/b}}", "regex.name is 'a/b': it must be letters, digits"),
        ("{sql: {timeout: 3}}", "sql has no option 'timeout': it has ignore_case, valid_without_answer, name"),
        ("{sql: {ignore_case: 1}}", "sql.ignore_case is 1: it must be true or false"),
        ("{json_schema: none.json}", "schema 'none.json' cannot be read: No such file"),
        ("{json_schema: {schema: {type: thing}}}", r"schema is no JSON schema: 'thing' is not valid .* at \$.type"),
        ("{python: math}", "function 'math' cannot be imported"),
        ("{python: {function: math:cos, margin: -1}}", "margin is -1: it must be 0 or more"),
        ("[{regex: a}, {regex: b}]", r"there is another judge called regex: give .* {regex: {name: ..., ...}}"),
        ("[{regex: {pattern: a, name: sql}}]", "there is another judge called sql"),
        ("[exact, {regex: {pattern: a, name: reply}}]", "there is another judge called reply"),
    ],
)
def test_a_wrong_setting_is_one_line(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "json_schema" in text:
        pytest.importorskip("jsonschema")
    with pytest.raises(UserError, match=words) as error:
        find_judges(yaml.safe_load(text))
    assert "\n" not in str(error.value) and str(error.value).startswith("replies.judge")


def test_a_file_that_is_no_json_is_one_line(tmp_path):
    pytest.importorskip("jsonschema")
    (tmp_path / "s.json").write_text("{type: object}")
    with pytest.raises(UserError, match=r"schema '.*s.json' is no JSON: Expecting"):
        find_judges({"json_schema": str(tmp_path / "s.json")})


def test_a_judge_with_a_name_of_its_own_is_told_apart_in_words():
    find_judges({"regex": {"pattern": "a", "name": "begins"}})
    assert quantity("begins/match").label == "replies that match (begins)" and quantity("begins/match").share
    assert quantity("begins/unjudged").better is None and "begins failed" in quantity("begins/unjudged").label
