"""The judges that a setting can name, one function each: its keyword-only arguments are the judge's options.

Such a function checks its options (ValueError says what is wrong with them) and returns the judge itself, which takes a
`Reply` and the `PreferencePair` it answers and returns verdicts by name, together with the name of the verdict that
means "right". A reply is judged as generated: nothing is cut out of it.

This file does not import torch, so that the processes of judges start at once.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.judging.quantities import QUANTITIES, TITLES, Quantity
from dpo_lightning.judging.sql import judge as sql_judge
from dpo_lightning.models.reply import Reply
from dpo_lightning.worker import imported_function

Verdict = bool | float | None  # None: it cannot tell
JudgeFunction = Callable[[Reply, PreferencePair], Mapping[str, Verdict]]

NGRAM = 4
SCORE = "score"  # the verdict of a function that returns a number


class Kind(NamedTuple):
    """A judge as a setting names it.

    Attributes:
        make: options -> the judge, and the verdict that means "right".
        contained: it runs in a process of its own, because a reply, or a function of the user's, may make it hang.
        syntax: of the replies, for the console.
        verdicts: the names of those that are known beforehand.
        optional: verdicts that only an option adds -> that option.
    """

    make: Callable[..., tuple[JudgeFunction, str]]
    contained: bool
    syntax: str | None
    verdicts: Sequence[str]
    optional: Mapping[str, str]


JUDGES: dict[str, Kind] = {}


def judge(
    title: str,
    contained: bool = False,
    syntax: str | None = None,
    optional: Mapping[str, str] = MappingProxyType({}),
    **quantities: Quantity,
) -> Callable:
    """Registers a function as a kind of judge, with the title of its charts and the words for its verdicts."""

    def register(make: Callable[..., tuple[JudgeFunction, str]]) -> Callable:
        JUDGES[make.__name__] = Kind(make, contained, syntax, list(quantities), optional)
        TITLES[make.__name__] = title
        QUANTITIES.update({f"{make.__name__}/{verdict}": words for verdict, words in quantities.items()})
        return make

    return register


@judge(
    "SQL",
    syntax="sql",
    optional={"execution_ignoring_case": "ignore_case", "right": "valid_without_answer"},
    valid=Quantity("valid SQL", "valid", share=True),
    exact=Quantity("exactly the wanted SQL", "exact", share=True),
    execution=Quantity("same result as wanted", "same result", share=True),
    execution_ignoring_case=Quantity("same result but for letters' case", "same but for case", share=True),
    right=Quantity("same result as wanted, or valid where none is wanted", "right", share=True),
    unjudged=Quantity("results that could not be compared", share=True, better=None),
)
def sql(*, ignore_case: bool = False, valid_without_answer: bool = False) -> tuple[JudgeFunction, str]:
    """Is it the wanted query, by its result? Its context is CREATE TABLE statements (`sql.judge`).

    With `ignore_case`, what decides is the result without regard to the case of letters in texts. With
    `valid_without_answer`, a reply to a row that has no answer is right if it is valid.
    """
    result = "execution_ignoring_case" if ignore_case else "execution"

    def judging(reply: Reply, pair: PreferencePair) -> dict[str, Verdict]:
        found: dict[str, Verdict] = {**sql_judge.sql(reply, pair, ignore_case)}
        return found | {"right": found[result if pair.chosen.strip() else "valid"]} if found else {}

    return (judging, "right") if valid_without_answer else (partial(sql_judge.sql, ignore_case=ignore_case), result)


@judge("Exact", match=Quantity("exactly the wanted reply", "exact", share=True))
def exact(*, ignore_case: bool = False) -> tuple[JudgeFunction, str]:
    """Is it the chosen completion? Blanks and line breaks count as one space, and around the text as nothing."""
    return partial(_same_text, ignore_case=ignore_case), "match"


def _same_text(reply: Reply, pair: PreferencePair, ignore_case: bool) -> dict[str, Verdict]:
    got, wanted = (" ".join(text.split()) for text in (reply.text, pair.chosen))
    return {"match": got.casefold() == wanted.casefold() if ignore_case else got == wanted}


@judge("Regular expression", contained=True, match=Quantity("replies that match", "matches", share=True))
def regex(*, pattern: str, full_match: bool = False) -> tuple[JudgeFunction, str]:
    """Is the regular expression (of Python's `re`) found in it, or, with `full_match`, does all of it match?

    Blanks and line breaks around the reply are not part of it.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
    find = compiled.fullmatch if full_match else compiled.search
    return lambda reply, pair: {"match": find(reply.text.strip()) is not None}, "match"


@judge(
    "JSON",
    contained=True,
    syntax="json",
    valid=Quantity("replies that fit the JSON schema", "fits the schema", share=True),
    parses=Quantity("replies that are JSON", "JSON", share=True),
)
def json_schema(*, schema: dict[str, Any] | str) -> tuple[JudgeFunction, str]:
    """Is it JSON that fits a JSON schema, a mapping or the file that has it? By default of draft 2020-12."""
    try:
        import jsonschema
        from referencing import Registry
    except ImportError as error:
        raise ValueError("it needs a missing package: pip install jsonschema") from error
    where = "schema" if isinstance(schema, Mapping) else f"schema '{schema}'"
    try:
        content = schema if isinstance(schema, Mapping) else json.loads(Path(schema).read_text(encoding="utf-8"))
        kind = jsonschema.validators.validator_for(content, default=jsonschema.Draft202012Validator)
        kind.check_schema(content)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from error
    except jsonschema.SchemaError as error:
        raise ValueError(f"{where} is no JSON schema: {error.message} at {error.json_path}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    validator = kind(content, registry=Registry())  # without one, a $ref to a web address would be fetched

    def valid(reply: Reply, pair: PreferencePair) -> dict[str, Verdict]:
        try:
            value = json.loads(reply.text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return {"valid": False, "parses": False}
        return {"valid": validator.is_valid(value), "parses": True}

    return valid, "valid"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@judge("Python", contained=True)
def python(*, function: str, margin: float = 0.0) -> tuple[JudgeFunction, str]:
    """A function of the user's own, `my_module:my_function`: it returns a number, the better the higher.

    True and False are numbers, and None means that it cannot tell. Instead it may return several verdicts by name; then
    the one called `score` decides, or the only one. `margin`: see `judge.Score`.
    """
    judging = imported_function(function, "function")
    if not margin >= 0:
        raise ValueError(f"margin is {margin}: it must be 0 or more")

    def verdicts(reply: Reply, pair: PreferencePair) -> dict[str, Verdict]:
        found = judging(reply, pair)
        if found is None or isinstance(found, Real):
            found = {SCORE: found}
        if not isinstance(found, Mapping):
            raise TypeError(f"it returned {found!r}: it must return a number, None, or verdicts by name")
        return {name: _verdict(name, value) for name, value in found.items()}

    return verdicts, SCORE


def _verdict(name: Any, value: Any) -> Verdict:
    if not isinstance(name, str) or not isinstance(value, Real | None):
        raise TypeError(
            f"it returned {name!r}: {value!r}: its verdicts are names with True, False, a number, or None where it "
            "cannot tell"
        )
    if value is None or isinstance(value, bool):
        return value
    return float(value) if math.isfinite(value) else None


@judge(
    "Replies",
    eos_rate=Quantity("replies that end by themselves", "ended", share=True),
    length=Quantity("tokens of a reply", better=None),
    repetition=Quantity("repeated 4-grams", share=True, better="lower"),
)
def reply() -> tuple[JudgeFunction, str]:
    """Any reply, whatever it is about: whether it ended with EOS, its tokens, and how much it repeats itself."""
    return _any_reply, "eos_rate"


def _any_reply(reply: Reply, pair: PreferencePair) -> dict[str, Verdict]:
    repeated = repetition(reply.token_ids)
    return {"eos_rate": reply.stopped, "length": len(reply.token_ids), "repetition": repeated}


def repetition(token_ids: Sequence[int]) -> float:
    """The share of 4-grams that repeat an earlier one: [7] * 8 -> 0.8; 0.0 for fewer than 4 tokens."""
    ngrams = [tuple(token_ids[start : start + NGRAM]) for start in range(len(token_ids) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


# ---------------------------------------------------------------------- in a process of its own


def contained(kind: str, options: dict[str, Any]) -> Callable[[list[Any]], dict[str, Verdict]]:
    """What the process of a judge runs: the fields of a reply and of a pair -> verdicts."""
    judging, _ = JUDGES[kind].make(**options)
    return lambda request: dict(judging(Reply(*request[0]), PreferencePair(*request[1])))
