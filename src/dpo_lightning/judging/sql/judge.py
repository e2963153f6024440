"""Judges a generated reply as SQL: whether it is valid, is the wanted query, and gives the same result.

A reply is judged as generated: no query is searched for in prose. Neither it nor the context can do harm, see
`sandbox`. A verdict that is not possible is None.
"""

import time
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Any

from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.judging.sql.fill import draw_fillings, plan_fillings, without_summed
from dpo_lightning.judging.sql.query import read_query
from dpo_lightning.judging.sql.sandbox import QueryError, Result, Sandbox
from dpo_lightning.judging.sql.tokens import lower_texts, tokenize
from dpo_lightning.models.reply import Reply

FILLINGS = 24
MAX_SECONDS = 0.3  # of CPU time, after which the remaining fillings are skipped


def sql(reply: Reply, pair: PreferencePair, ignore_case: bool = False) -> dict[str, bool | None]:
    """Judges a reply to a pair whose context is CREATE TABLE statements. Without a context there are no verdicts.

    - `valid` and `execution`: see `validity_and_execution`.
    - `exact`: the reply's text is the chosen completion's, after both are normalised; None if there is none.
    - `execution_ignoring_case`, with `ignore_case`: the same without regard to the case of letters in texts.
    - `unjudged`: `execution` is None.
    """
    if not pair.context:
        return {}
    from dpo_lightning.judging.sql.normalize import equivalent_text  # sqlglot takes 0.2 s to import

    wanted = pair.chosen.strip()
    valid, same = validity_and_execution(reply.text, wanted, pair.context)
    exact = equivalent_text(reply.text, wanted) if wanted else None
    found = {"valid": valid, "exact": exact, "execution": same}
    if ignore_case:
        differ = valid and same is False
        _, same_in_lower = validity_and_execution(reply.text, wanted, pair.context, True) if differ else (valid, same)
        found["execution_ignoring_case"] = same_in_lower
    return found | {"unjudged": same is None}


def validity_and_execution(
    reply: str, wanted: str, context: str, lower: bool = False
) -> tuple[bool | None, bool | None]:
    """Two verdicts: whether the reply is valid, and whether it has the wanted query's result.

    Valid is one read query that sqlite compiles against the context's tables. The results are compared on random
    fillings of the tables: rows as multisets, and in order if the wanted query has an ORDER BY of its own; columns by
    position, not by name; floats to nine digits. A filling on which the wanted result depends on the order in which
    rows are stored (ties under ORDER BY ... LIMIT) decides only if that is so for all fillings.

    Both are None if the context does not compile. The second is also None if the wanted query does not run, or if both
    agree only on results that say nothing: no rows, or rows of 0 and NULL.

    Args:
        lower: all letters in texts count as lower case: in the queries, the context, the tables and the results.
    """
    if lower:
        reply, wanted, context = map(lower_texts, (reply, wanted, context))
    try:
        sandbox = Sandbox(context)
    except ValueError:
        return None, None
    with sandbox:
        wanted_query, reply_query = _compiled(sandbox, wanted), _compiled(sandbox, reply)
        if reply_query is None or wanted_query is None:
            return reply_query is not None, None if wanted_query is None else False
        return True, _agree_on_fillings(sandbox, reply_query, wanted_query, context + "\n" + wanted, lower)


def _compiled(sandbox: Sandbox, text: str) -> str | None:
    """The text's one query; None if it has none that sqlite compiles."""
    try:
        query = read_query(text)
        sandbox.check(query)
    except QueryError:
        return None
    return query


def _agree_on_fillings(sandbox: Sandbox, reply: str, wanted: str, seed: str, lower: bool) -> bool | None:
    queries = [tokenize(wanted), tokenize(reply)]
    plan = plan_fillings(sandbox.tables, queries)
    ordered = _is_ordered(wanted)
    clear, unclear, meaningful = False, [], False
    deadline = time.thread_time() + MAX_SECONDS
    for filling in chain(without_summed(plan, queries, seed), draw_fillings(plan, FILLINGS, seed)):
        sandbox.fill({table: list(map(_lower, rows)) for table, rows in filling.items()} if lower else filling)
        if (expected := _rows(sandbox, wanted, lower)) is None:
            return None
        if (got := _rows(sandbox, reply, lower)) is None:
            return False
        sandbox.reverse_rows()
        if (shuffled := _rows(sandbox, wanted, lower)) is None:
            return None
        meaningful |= any(cell for row in expected.rows for cell in row)
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
    return True if meaningful else None


def _rows(sandbox: Sandbox, query: str, lower: bool) -> Result | None:
    """The query's result, floats rounded to nine digits since sums depend on the order of their terms."""
    try:
        result = sandbox.run(query)
    except QueryError:
        return None
    rows = [tuple(float(f"{cell:.9g}") if isinstance(cell, float) else cell for cell in row) for row in result.rows]
    return Result(result.columns, [tuple(_lower(row)) for row in rows] if lower else rows)


def _lower(row: Iterable[Any]) -> list[Any]:
    return [cell.lower() if isinstance(cell, str | bytes) else cell for cell in row]


def _is_ordered(query: str) -> bool:
    """Whether the query has an ORDER BY outside of all parentheses."""
    depth = 0
    for token in tokenize(query):
        depth += token.is_sign("(") - token.is_sign(")")
        if depth == 0 and token.is_word("order"):
            return True
    return False


def _same_rows(left: Result, right: Result) -> bool:
    return left.columns == right.columns and Counter(left.rows) == Counter(right.rows)
