"""Compares two SQL texts by their normalised syntax trees, with sqlglot.

Normalised are the case of keywords and names, quotes, spacing, `<>` and `!=`, `INNER JOIN` and `JOIN`, redundant
parentheses, ASC and AS, table aliases, the qualifiers of a single table's columns, and output columns' names. The
schema is not used, so what only a schema can decide (`name` or `t.name` in a join) stays different.
"""

from functools import partial, reduce

import sqlglot
from sqlglot import exp
from sqlglot.expressions import Expression

from dpo_lightning.judging.sql.query import read_query
from dpo_lightning.judging.sql.sandbox import QueryError
from dpo_lightning.judging.sql.tokens import tokenize, without_blanks

MAX_CHARS = 2_000  # for which sqlglot takes up to about 25 ms
RIGHT_OPERANDS = ("expression", "expressions", "low", "high")  # of a predicate
MAX_DEPTH = 20  # of parentheses; sqlglot recurses
MAX_SPACED = 20_000  # characters; normalising the spacing takes 250 bytes of memory for each


def equivalent_text(reply: str, wanted: str) -> bool:
    """Whether both are the same query after normalising. Texts that are no query may differ in spacing alone."""
    if reply == wanted or max(len(reply), len(wanted)) > MAX_SPACED:
        return reply == wanted
    if (plain := without_blanks(reply)) and plain == without_blanks(wanted):
        return True
    reply_tree, wanted_tree = _normalized(reply), _normalized(wanted)
    if reply_tree is None or wanted_tree is None or reply_tree != wanted_tree:
        return False
    return _text(reply_tree) == _text(wanted_tree)


def _text(tree: Expression) -> str:
    """The tree as SQL, because sqlglot ignores the case of JSON paths when it compares trees."""
    return tree.sql(dialect="sqlite", comments=False, normalize_functions="upper")


def _normalized(text: str) -> Expression | None:
    """The query's normalised tree; None if the text is no query."""
    try:
        # sqlglot and sqlite disagree on where comments and blanks end.
        query = without_blanks(read_query(text))
        if len(query) > MAX_CHARS or _depth(query) > MAX_DEPTH or _has_other_blanks(query):
            return None
        trees = sqlglot.parse(query, dialect="sqlite")
        if len(trees) != 1 or not isinstance(trees[0], exp.Query):
            return None
        tree = trees[0]
        for normalize in (
            _literals_from_double_quotes,
            _lower_names,
            _drop_parentheses,
            _plain_joins_and_orders,
            _rename_tables,
            _drop_output_names,
        ):
            tree = normalize(tree)
        return tree
    except QueryError:
        return None
    except Exception:  # sqlglot may raise anything on an untrusted text, such as RecursionError
        return None


def _has_other_blanks(query: str) -> bool:
    """Whether sqlglot would skip a character outside of quotes that sqlite does not."""
    return any(not token.raw.isprintable() for token in tokenize(query) if token.kind in ("word", "sign", "number"))


def _depth(query: str) -> int:
    depth = deepest = 0
    for token in tokenize(query):
        depth += token.is_sign("(") - token.is_sign(")")
        deepest = max(deepest, depth)
    return deepest


def _literals_from_double_quotes(tree: Expression) -> Expression:
    """`player = "Jo"` -> `player = 'Jo'`: on the right of a comparison, double quotes nearly always mean a string."""
    for column in list(tree.find_all(exp.Column)):
        quoted = isinstance(column.this, exp.Identifier) and column.this.quoted and not column.table
        compared = isinstance(column.parent, exp.Predicate) and column.arg_key in RIGHT_OPERANDS
        if quoted and compared:
            column.replace(exp.Literal.string(column.name))
    return tree


def _lower_names(tree: Expression) -> Expression:
    for name in tree.find_all(exp.Identifier):
        name.set("this", name.this.lower())
        name.set("quoted", False)
    for collation in tree.find_all(exp.Collate):
        for name in collation.find_all(exp.Var):
            name.set("this", name.name.lower())
    return tree


def _drop_parentheses(tree: Expression) -> Expression:
    """`(a) AND (b AND c)` -> `a AND b AND c`; precedence stays in the tree's structure."""
    for parentheses in list(tree.find_all(exp.Paren)):
        parentheses.replace(parentheses.this)
    for kind in (exp.And, exp.Or):
        for node in list(tree.find_all(kind)):
            if not isinstance(node.parent, kind):
                operands = [operand.copy() for operand in node.flatten(unnest=False)]
                node.replace(reduce(partial(_combine, kind), operands))
    return tree


def _combine(kind: type[Expression], left: Expression, right: Expression) -> Expression:
    return kind(this=left, expression=right)


def _plain_joins_and_orders(tree: Expression) -> Expression:
    for join in tree.find_all(exp.Join):
        kind = join.args.get("kind")
        if kind == "INNER" or (kind == "OUTER" and join.args.get("side")):  # LEFT OUTER JOIN is LEFT JOIN
            join.set("kind", None)
    for term in tree.find_all(exp.Ordered):
        term.set("nulls_first", bool(term.args.get("nulls_first")))  # sqlglot fills in sqlite's default
        if not term.args.get("desc"):
            term.set("desc", None)
    return tree


def _rename_tables(tree: Expression) -> Expression:
    """Names tables by position, `t AS T1 JOIN u` -> 0.0, 0.1; a single table's columns need no qualifier."""
    positions: dict[int, dict[str, str]] = {}
    for number, select in enumerate(tree.find_all(exp.Select)):
        positions[id(select)] = {
            source.alias_or_name: f"{number}.{position}" for position, source in enumerate(_sources(select))
        }
    for column in list(tree.find_all(exp.Column)):
        select = own = column.find_ancestor(exp.Select)
        while select is not None and column.table not in positions[id(select)]:
            select = select.find_ancestor(exp.Select)
        if not column.table or select is None:
            continue
        alone = select is own and len(positions[id(select)]) == 1
        column.set("table", None if alone else exp.to_identifier(positions[id(select)][column.table]))
    for select in tree.find_all(exp.Select):
        for source in _sources(select):
            source.set("alias", None)
    return tree


def _sources(select: Expression) -> list[Expression]:
    """The tables and subqueries of a SELECT's FROM and JOINs."""
    source = select.args.get("from_") or select.args.get("from")  # sqlglot 28 renamed the key
    sources = [source] if source is not None else []
    return [part.this for part in sources + (select.args.get("joins") or [])]


def _drop_output_names(tree: Expression) -> Expression:
    """`SELECT count(*) AS n ... ORDER BY n` -> `SELECT count(*) ... ORDER BY count(*)`."""
    if not isinstance(tree, exp.Select):
        return tree
    for output in list(tree.expressions):
        if not isinstance(output, exp.Alias):
            continue
        uses = [
            column
            for column in tree.find_all(exp.Column)
            if column.name == output.alias and not column.table
            if column.find_ancestor(exp.Alias) is not output
        ]
        if all(isinstance(column.parent, exp.Ordered) for column in uses):
            for column in uses:
                column.replace(output.this.copy())
            output.replace(output.this)
    return tree
