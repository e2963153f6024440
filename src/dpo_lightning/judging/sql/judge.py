"""Is a generated reply good SQL? Reply + wanted query + CREATE TABLE context -> valid, exact, same result.

A reply is judged as generated: nobody fishes a query out of prose. Nothing in it or in the context can hurt:
see `sql_sandbox`. Where a question cannot be asked the answer is None, and `SQLMetrics` counts those apart.
"""

from __future__ import annotations

import time
from collections import Counter
from itertools import chain

import torch
import torchmetrics

from dpo_lightning.judging.sql.fill import draw_fillings, plan_fillings, without_summed
from dpo_lightning.judging.sql.normalize import equivalent_text
from dpo_lightning.judging.sql.sandbox import QueryError, Result, Sandbox, read_query
from dpo_lightning.judging.sql.tokens import tokenize

__all__ = ["SQLMetrics", "compiles", "equivalent_text", "same_result"]

FILLINGS = 24
MAX_SECONDS = 0.3  # CPU time; of queries so slow the remaining fillings are left out


def compiles(reply: str, context: str) -> bool | None:
    """Whether the reply is one read query that sqlite compiles against the context's tables.

    None when the context itself does not compile.
    """
    try:
        sandbox = Sandbox(context)
    except ValueError:
        return None
    with sandbox:
        try:
            sandbox.check(read_query(reply))
            return True
        except QueryError:
            return False


def same_result(reply: str, wanted: str, context: str) -> bool | None:
    """Whether the reply gives what the wanted query gives, on random fillings of the tables.

    Rows are compared as multisets, and in order where the wanted query has an ORDER BY of its own; columns by
    place, not by name; floats to nine digits. A filling on which the wanted result hangs on the order in
    which rows happen to be stored (ties under ORDER BY ... LIMIT) decides only if all fillings are so.

    None when the context does not compile, when the wanted query does not run, or when both agree, but only
    on nothing: on no rows, or on rows of 0 and NULL.
    """
    try:
        sandbox = Sandbox(context)
    except ValueError:
        return None
    with sandbox:
        try:
            wanted_query = read_query(wanted)
            sandbox.check(wanted_query)
        except QueryError:
            return None
        try:
            reply_query = read_query(reply)
            sandbox.check(reply_query)
        except QueryError:
            return False
        return _agree_on_fillings(sandbox, reply_query, wanted_query, seed=context + "\n" + wanted)


def _agree_on_fillings(sandbox: Sandbox, reply: str, wanted: str, seed: str) -> bool | None:
    queries = [tokenize(wanted), tokenize(reply)]
    plan = plan_fillings(sandbox.tables, queries)
    ordered = _is_ordered(wanted)
    clear, unclear, telling = False, [], False
    deadline = time.thread_time() + MAX_SECONDS
    for filling in chain(without_summed(plan, queries, seed), draw_fillings(plan, FILLINGS, seed)):
        sandbox.fill(filling)
        if (expected := _run(sandbox, wanted)) is None:
            return None
        if (got := _run(sandbox, reply)) is None:
            return False
        sandbox.reverse_rows()
        if (shuffled := _run(sandbox, wanted)) is None:
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


def _run(sandbox: Sandbox, query: str) -> Result | None:
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


class SQLMetrics(torchmetrics.Metric):
    """Shares of replies, each in [0, 1], over all ranks:

    - `sql/valid`: compiles, of those whose context compiles;
    - `sql/exact`: the wanted query's text after normalising, of all;
    - `sql/execution`: the wanted query's result, of those whose context compiles and whose wanted query runs;
    - `sql/unjudged`: left out of `sql/execution`, of all.

    A share of nothing is nan.
    """

    full_state_update = False

    def __init__(self):
        super().__init__()
        for name in ("replies", "exact", "valid", "judged_valid", "execution", "judged_execution"):
            self.add_state(name, default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, replies: list[str], wanted: list[str], contexts: list[str]) -> None:
        for reply, query, context in zip(replies, wanted, contexts, strict=True):
            self.replies += 1
            self.exact += equivalent_text(reply, query)
            valid, execution = compiles(reply, context), same_result(reply, query, context)
            self.valid += valid is True
            self.judged_valid += valid is not None
            self.execution += execution is True
            self.judged_execution += execution is not None

    def compute(self) -> dict[str, torch.Tensor]:
        return {
            "sql/valid": self.valid / self.judged_valid,
            "sql/exact": self.exact / self.replies,
            "sql/execution": self.execution / self.judged_execution,
            "sql/unjudged": 1 - self.judged_execution / self.replies,
        }
