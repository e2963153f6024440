"""Is a generated reply good SQL? Reply + wanted query + CREATE TABLE context -> valid, exact, same result.

A reply is judged as generated: nobody fishes a query out of prose. Nothing in it or in the context can do harm: see
`sandbox`. Where a question cannot be asked the answer is None.
"""

from __future__ import annotations

import time
from collections import Counter
from itertools import chain

from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.judging.sql.fill import draw_fillings, plan_fillings, without_summed
from dpo_lightning.judging.sql.normalize import equivalent_text
from dpo_lightning.judging.sql.query import read_query
from dpo_lightning.judging.sql.sandbox import QueryError, Result, Sandbox
from dpo_lightning.judging.sql.tokens import tokenize
from dpo_lightning.models.generate import Reply

FILLINGS = 24
MAX_SECONDS = 0.3  # CPU time; of queries so slow the remaining fillings are left out


def sql(reply: Reply, pair: PreferencePair) -> dict[str, bool | None]:
    """Judges a reply to a prompt whose pair has a context: CREATE TABLE statements. Others get no verdicts.

    - `valid`: it compiles; None where the context itself does not.
    - `exact`: it is the chosen completion's text after normalising.
    - `execution`: it gives the chosen completion's result (see `same_result`).
    - `unjudged`: `execution` is None.
    """
    if not pair.context:
        return {}
    wanted = pair.chosen.strip()
    valid, same = _run(reply.text, wanted, pair.context)
    return {"valid": valid, "exact": equivalent_text(reply.text, wanted), "execution": same, "unjudged": same is None}


def compiles(reply: str, context: str) -> bool | None:
    """Whether the reply is one read query that sqlite compiles against the context's tables.

    None when the context itself does not compile.
    """
    return _run(reply, "", context)[0]


def same_result(reply: str, wanted: str, context: str) -> bool | None:
    """Whether the reply gives what the wanted query gives, on random fillings of the tables.

    Rows are compared as multisets, and in order where the wanted query has an ORDER BY of its own; columns by
    place, not by name; floats to nine digits. A filling on which the wanted result hangs on the order in
    which rows happen to be stored (ties under ORDER BY ... LIMIT) decides only if all fillings are so.

    None when the context does not compile, when the wanted query does not run, or when both agree, but only
    on nothing: on no rows, or on rows of 0 and NULL.
    """
    return _run(reply, wanted, context)[1]


def _run(reply: str, wanted: str, context: str) -> tuple[bool | None, bool | None]:
    """What `compiles` and `same_result` say."""
    try:
        sandbox = Sandbox(context)
    except ValueError:
        return None, None
    with sandbox:
        wanted_query, reply_query = _compiled(sandbox, wanted), _compiled(sandbox, reply)
        valid = reply_query is not None
        if not valid or wanted_query is None:
            return valid, None if wanted_query is None else False
        return valid, _agree_on_fillings(sandbox, reply_query, wanted_query, seed=context + "\n" + wanted)


def _compiled(sandbox: Sandbox, text: str) -> str | None:
    """The text's query, None where it has none that sqlite compiles."""
    try:
        query = read_query(text)
        sandbox.check(query)
    except QueryError:
        return None
    return query


def _agree_on_fillings(sandbox: Sandbox, reply: str, wanted: str, seed: str) -> bool | None:
    queries = [tokenize(wanted), tokenize(reply)]
    plan = plan_fillings(sandbox.tables, queries)
    ordered = _is_ordered(wanted)
    clear, unclear, telling = False, [], False
    deadline = time.thread_time() + MAX_SECONDS
    for filling in chain(without_summed(plan, queries, seed), draw_fillings(plan, FILLINGS, seed)):
        sandbox.fill(filling)
        if (expected := _rows(sandbox, wanted)) is None:
            return None
        if (got := _rows(sandbox, reply)) is None:
            return False
        sandbox.reverse_rows()
        if (shuffled := _rows(sandbox, wanted)) is None:
            return None
        telling |= any(cell for row in expected.rows for cell in row)
        if not _same_rows(expected, shuffled):
            unclear.append(_same_rows(got, expected) or _same_rows(got, shuffled))
        elif not _same_rows(got, expected) or (ordered and expected == shuffled and got != expected):
            return False
        else:
            clear = True
        if time.thread_time() > deadline:
            break
    if not (clear or all(unclear)):
        return False
    return True if telling else None


def _rows(sandbox: Sandbox, query: str) -> Result | None:
    """The query's rows, floats rounded to nine digits since sums depend on the order of their terms."""
    try:
        result = sandbox.run(query)
    except QueryError:
        return None
    rows = [tuple(_rounded(cell) if isinstance(cell, float) else cell for cell in row) for row in result.rows]
    return Result(result.columns, rows)


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")


def _is_ordered(query: str) -> bool:
    """Whether the query has an ORDER BY outside all parentheses."""
    depth = 0
    for token in tokenize(query):
        depth += token.is_sign("(") - token.is_sign(")")
        if depth == 0 and token.is_word("order"):
            return True
    return False


def _same_rows(left: Result, right: Result) -> bool:
    return left.columns == right.columns and Counter(left.rows) == Counter(right.rows)
