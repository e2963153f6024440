"""Reads the one query of a reply as generated.

Queries whose *compilation* explodes (CTEs that double each other) are recognised by their tokens and refused: sqlite
before 3.41 cannot be interrupted while it compiles.
"""

from __future__ import annotations

import re
from collections import Counter

from dpo_lightning.judging.sql.sandbox import MAX_QUERY_CHARS, MAX_SIBLINGS, QueryError
from dpo_lightning.judging.sql.tokens import Token, cte_names, tokenize

MAX_SELECTS = 16  # nested in each other; with MAX_EXPANSION this limits what sqlite expands while compiling
MAX_EXPANSION = 4_000

_SPACE = " \t\r\n\f"  # what sqlite skips; str.strip() would also remove what it refuses


def read_query(reply: str) -> str:
    """The reply's one read query, without surrounding space and one closing `;`.

    Raises:
        QueryError: the reply is anything else: prose, a write, empty, several statements, longer than the limit.
    """
    query = reply.strip(_SPACE).removesuffix(";").rstrip(_SPACE)
    if len(query) > MAX_QUERY_CHARS:
        raise QueryError(f"the query has {len(query)} characters; at most {MAX_QUERY_CHARS} are judged")
    tokens = tokenize(query)
    if not re.match(r"(?:SELECT|WITH|VALUES)\b", query, re.IGNORECASE | re.ASCII):
        raise QueryError("a read query begins with SELECT, WITH or VALUES")
    if any(token.is_sign(";") for token in tokens):
        raise QueryError("there is more than one statement")
    _check_expansion(tokens, cte_names(query))
    return query


class _Level:
    """The SELECTs that UNION and the like combine within one pair of parentheses, or outside of all.

    sqlite copies a CTE or a flattened subquery wherever it is named. A SELECT therefore multiplies what is nested in
    it by the number of times it repeats one name, or names CTEs; siblings add up; the CTEs of a WITH, which may copy
    each other, multiply.
    """

    def __init__(self, ctes: set[str]):
        self._ctes = ctes
        self._shared, self._added = 1, 0
        self._nested, self._names = 0, Counter[str]()
        self.mentioned: set[str] = set()
        self.selects = 0

    def begin_select(self) -> None:
        if self.selects:
            self._added += self._sibling()
            self._nested, self._names = 0, Counter[str]()
        self.selects += 1

    def name(self, name: str) -> None:
        self._names[name] += 1
        self.mentioned.add(name)

    def add_nested(self, inner: _Level) -> None:
        """Adds a closed pair of parentheses that contains SELECTs."""
        if not self.selects:  # a CTE of this level's WITH
            self._shared *= inner.expansion
            return
        self._nested += inner.expansion
        for name in inner.mentioned:
            self.name(name)

    @property
    def expansion(self) -> int:
        return self._shared * (self._added + self._sibling())

    def _sibling(self) -> int:
        repeated = max(self._names.values(), default=1)
        copied = sum(count for name, count in self._names.items() if name in self._ctes)
        return max(repeated, copied) * max(1, self._nested)


def _check_expansion(tokens: list[Token], ctes: set[str]) -> None:
    """Refuses a query that sqlite could expand into too many parts while it compiles."""
    outermost = _Level(ctes)
    levels, open_levels, selects, nested = [outermost], [], 0, 0
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        level = levels[-1]
        if token.is_sign("("):
            begins = following is not None and following.is_word("select", "values", "with")
            open_levels.append(begins)
            if begins:
                nested += 1
                levels.append(_Level(ctes))
        elif token.is_sign(")") and open_levels:
            if open_levels.pop():
                inner = levels.pop()
                levels[-1].add_nested(inner)
        elif token.is_word("select", "values"):
            selects += 1
            level.begin_select()
        elif token.kind in ("word", "quoted", "string") and not _is_syntax(token, following):
            level.name(token.name)
    while len(levels) > 1:  # unclosed parentheses, which sqlite refuses
        inner = levels.pop()
        levels[-1].add_nested(inner)
    if nested >= MAX_SELECTS or selects > MAX_SIBLINGS or outermost.expansion > MAX_EXPANSION:
        raise QueryError(
            f"too deeply nested: {selects} SELECTs, {nested} of them within others, whose repeated names "
            f"multiply to {outermost.expansion}"
        )


_KEYWORDS = frozenset("and or not as on is in null case when then else end between like by asc desc join".split())


def _is_syntax(token: Token, following: Token | None) -> bool:
    """Whether the token is a keyword or a qualifier, which name nothing that sqlite could copy."""
    qualifier = following is not None and following.is_sign(".")
    return qualifier or (token.kind == "word" and token.name in _KEYWORDS)
