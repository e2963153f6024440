"""Questions about a schema and the SQL that answers them: Schema + random.Random -> Query.

Every kind of query is a function below that returns (gist, sql). The gist is a noun phrase ("the average salary of the
employees"). A question is a frame around a gist ("What is {gist}?"), and the prose of the pretraining texts is built
around the same gist.
"""

from typing import NamedTuple

from .schemas import Column, Schema, Table


class Query(NamedTuple):
    kind: str
    gist: str
    question: str
    sql: str


FRAMES = (
    "What is {}?", "What are {}?", "Show {}.", "Show me {}.", "List {}.", "Find {}.",
    "Give {}.", "Give me {}.", "Return {}.", "Tell me {}.", "Can you get {}?", "I need {}.",
)  # fmt: skip
COMPARISONS = {
    "number": {
        ">": ("is greater than", "is more than", "is above", "is over"),
        "<": ("is less than", "is below", "is under", "is smaller than"),
        ">=": ("is at least",),
        "<=": ("is at most",),
        "=": ("is", "equals", "is exactly"),
    },
    "date": {">": ("is after", "is later than"), "<": ("is before", "is earlier than"), "=": ("is",)},
    "text": {"=": ("is", "is", "equals"), "!=": ("is not",)},
}
WHOSE = ("whose {}", "whose {}", "where {}", "where the {}", "for which the {}")
NUMBERS = ("integer", "real")
VALUES = ("text", "integer", "real", "date")


def words(name: str) -> str:
    """The name of a table or column as a question has it."""
    return name.replace("_", " ")


def value(rng, column: Column) -> str:
    """A random value of the column, as a question has it."""
    if column.kind == "text":
        return rng.choice(column.values)
    if column.kind == "date":
        return f"{rng.randint(1990, 2023)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    low, high = column.values
    return str(rng.randint(low, high)) if column.kind == "integer" else f"{rng.uniform(low, high):.1f}"


def literal(column: Column, text: str) -> str:
    """A value as SQL has it: text and dates in single quotes."""
    return text if column.kind in NUMBERS else "'" + text.replace("'", "''") + "'"


def condition(rng, column: Column) -> tuple[str, str]:
    """A condition in words, and its SQL after the column's name: ("age is above 30", "> 30")."""
    comparisons = COMPARISONS["number" if column.kind in NUMBERS else column.kind]
    operator = rng.choice(list(comparisons))
    text = value(rng, column)
    phrase = f"{words(column.name)} {rng.choice(comparisons[operator])} {text}"
    return phrase, f"{operator} {literal(column, text)}"


def _where(rng, column: Column) -> tuple[str, str]:
    phrase, sql = condition(rng, column)
    return rng.choice(WHOSE).format(phrase), f"WHERE {column.name} {sql}"


def _all(rng, table: Table) -> str:
    return f"{rng.choice(('the', 'all', 'all the'))} {words(table.name)}"


def _subject(rng, table: Table, selected: Column, phrase: str) -> str:
    return f"the {words(selected.name)} of {_all(rng, table)} {rng.choice(WHOSE).format(phrase)}"


def filter_(rng, table: Table) -> tuple[str, str]:
    """One condition, one or two columns."""
    selected = rng.sample(table.of(*VALUES), 1 if rng.random() < 0.7 else 2)
    phrase, where = _where(rng, rng.choice([c for c in table.of(*VALUES) if c not in selected]))
    what = " and ".join(words(column.name) for column in selected)
    columns = ", ".join(column.name for column in selected)
    return f"the {what} of {_all(rng, table)} {phrase}", f"SELECT {columns} FROM {table.name} {where}"


def filters(rng, table: Table) -> tuple[str, str]:
    """Two conditions."""
    selected, first, second = rng.sample(table.of(*VALUES), 3)
    (phrase_1, sql_1), (phrase_2, sql_2) = condition(rng, first), condition(rng, second)
    word = rng.choice(("and", "and", "or"))
    phrase = rng.choice(WHOSE[:3]).format(f"{phrase_1} {word} {phrase_2}")
    where = f"{first.name} {sql_1} {word.upper()} {second.name} {sql_2}"
    sql = f"SELECT {selected.name} FROM {table.name} WHERE {where}"
    return f"the {words(selected.name)} of {_all(rng, table)} {phrase}", sql


def count(rng, table: Table) -> tuple[str, str]:
    """How many rows there are, or meet a condition."""
    what = rng.choice(("the number of", "the total number of", "the count of", "how many"))
    what = f"{what} {words(table.name)}"
    if rng.random() < 0.25:
        return f"{what} {rng.choice(('in the table', 'overall'))}", f"SELECT COUNT(*) FROM {table.name}"
    phrase, where = _where(rng, rng.choice(table.of(*VALUES)))
    return f"{what} {phrase}", f"SELECT COUNT(*) FROM {table.name} {where}"


def _aggregate(function: str, adjectives: tuple[str, ...]):
    def kind(rng, table: Table) -> tuple[str, str]:
        column = rng.choice(table.of(*NUMBERS))
        gist = f"the {rng.choice(adjectives)} {words(column.name)} of {_all(rng, table)}"
        sql = f"SELECT {function}({column.name}) FROM {table.name}"
        if rng.random() < 0.4:
            return gist, sql
        phrase, where = _where(rng, rng.choice([c for c in table.of(*VALUES) if c != column]))
        return f"{gist} {phrase}", f"{sql} {where}"

    return kind


def distinct(rng, table: Table) -> tuple[str, str]:
    """The different values of a column, or their number."""
    column = rng.choice(table.of("text"))
    adjective = rng.choice(("different", "distinct", "unique"))
    if rng.random() < 0.3:
        gist = f"the number of {adjective} {words(column.name)} values of {_all(rng, table)}"
        return gist, f"SELECT COUNT(DISTINCT {column.name}) FROM {table.name}"
    gist = f"the {adjective} {words(column.name)} {rng.choice(('values ', ''))}of {_all(rng, table)}"
    return gist, f"SELECT DISTINCT {column.name} FROM {table.name}"


def order_limit(rng, table: Table) -> tuple[str, str]:
    """The first few in an order, or all of them."""
    key = rng.choice(table.of(*NUMBERS))
    selected = rng.choice([c for c in table.of(*VALUES) if c != key])
    order, adjective, way = rng.choice((("DESC", "highest", "descending"), ("ASC", "lowest", "ascending")))
    sql = f"SELECT {selected.name} FROM {table.name} ORDER BY {key.name} {order}"
    what, by = f"the {words(selected.name)} of", words(key.name)
    if rng.random() < 0.35:
        verb = rng.choice(("sorted by", "ordered by"))
        return f"{what} {_all(rng, table)} {verb} {by} in {way} order", sql
    limit = rng.randint(2, 12)
    phrase = f"{rng.choice(('the ', ''))}{limit} {words(table.name)} with the {adjective} {by}"
    return f"{what} {phrase}", f"{sql} LIMIT {limit}"


def group_by(rng, table: Table) -> tuple[str, str]:
    """A count or an average for each group."""
    group = rng.choice(table.of("text"))
    per = f"{rng.choice(('for each', 'per', 'by'))} {words(group.name)}"
    if rng.random() < 0.5:
        gist = f"the number of {words(table.name)} {per}"
        return gist, f"SELECT {group.name}, COUNT(*) FROM {table.name} GROUP BY {group.name}"
    column = rng.choice(table.of(*NUMBERS))
    function, adjective = rng.choice((("AVG", "average"), ("MAX", "highest"), ("SUM", "total")))
    gist = f"the {adjective} {words(column.name)} of {_all(rng, table)} {per}"
    return gist, f"SELECT {group.name}, {function}({column.name}) FROM {table.name} GROUP BY {group.name}"


def having(rng, table: Table) -> tuple[str, str]:
    """Groups that meet a condition."""
    group = rng.choice(table.of("text"))
    sql = f"SELECT {group.name} FROM {table.name} GROUP BY {group.name} HAVING"
    sign, phrase = rng.choice(((">", "more than"), ("<", "fewer than"), (">=", "at least")))
    if rng.random() < 0.6:
        number = rng.randint(2, 30)
        phrase = f"{rng.choice(('that has', 'shared by', 'with'))} {phrase} {number} {words(table.name)}"
        return f"each {words(group.name)} {phrase}", f"{sql} COUNT(*) {sign} {number}"
    column = rng.choice(table.of(*NUMBERS))
    sign, phrase = rng.choice(((">", "above"), ("<", "below")))
    number = value(rng, column)
    phrase = f"with an average {words(column.name)} {phrase} {number}"
    gist = f"each {words(group.name)} of {_all(rng, table)} {phrase}"
    return gist, f"{sql} AVG({column.name}) {sign} {number}"


def between(rng, table: Table) -> tuple[str, str]:
    """A range."""
    column = rng.choice(table.of("integer", "real", "date"))
    selected = rng.choice([c for c in table.of(*VALUES) if c != column])
    texts = [value(rng, column), value(rng, column)]
    low, high = sorted(texts, key=str if column.kind == "date" else float)
    phrase = rng.choice(("is between {} and {}", "is from {} to {}", "lies between {} and {}"))
    gist = _subject(rng, table, selected, f"{words(column.name)} {phrase.format(low, high)}")
    bounds = f"{literal(column, low)} AND {literal(column, high)}"
    return gist, f"SELECT {selected.name} FROM {table.name} WHERE {column.name} BETWEEN {bounds}"


def like(rng, table: Table) -> tuple[str, str]:
    """A text that starts with, ends with or contains some letters."""
    column = rng.choice(table.of("text"))
    selected = rng.choice([c for c in table.of(*VALUES) if c != column])
    text = rng.choice(value(rng, column).split())
    size = rng.randint(1, 3)
    phrase, pattern = rng.choice((
        (f"{rng.choice(('starts with', 'begins with'))} {text[:size]}", f"{text[:size]}%"),
        (f"ends with {text[-size:]}", f"%{text[-size:]}"),
        (f"{rng.choice(('contains', 'includes'))} {text}", f"%{text}%"),
    ))  # fmt: skip
    gist = _subject(rng, table, selected, f"{words(column.name)} {phrase}")
    return gist, f"SELECT {selected.name} FROM {table.name} WHERE {column.name} LIKE {literal(column, pattern)}"


def in_(rng, table: Table) -> tuple[str, str]:
    """A list of allowed values."""
    column = rng.choice(table.of("text", "integer"))
    selected = rng.choice([c for c in table.of(*VALUES) if c != column])
    texts = list(dict.fromkeys(value(rng, column) for _ in range(rng.randint(2, 3))))
    phrase = f"{words(column.name)} is {rng.choice(('one of', 'in the list', 'any of'))} {', '.join(texts)}"
    gist = _subject(rng, table, selected, phrase)
    items = ", ".join(literal(column, text) for text in texts)
    return gist, f"SELECT {selected.name} FROM {table.name} WHERE {column.name} IN ({items})"


def nested(rng, table: Table) -> tuple[str, str]:
    """A comparison with an average, or the row that holds the extreme."""
    column = rng.choice(table.of(*NUMBERS))
    selected = rng.choice([c for c in table.of(*VALUES) if c != column])
    function, sign, phrase = rng.choice((
        ("AVG", ">", "is above the average"), ("AVG", ">", "is greater than the average"),
        ("AVG", "<", "is below the average"), ("AVG", "<", "is less than the average"),
        ("MAX", "=", "is the highest"), ("MIN", "=", "is the lowest"),
    ))  # fmt: skip
    gist = _subject(rng, table, selected, f"{words(column.name)} {phrase}")
    inner = f"SELECT {function}({column.name}) FROM {table.name}"
    return gist, f"SELECT {selected.name} FROM {table.name} WHERE {column.name} {sign} ({inner})"


def join(rng, schema: Schema) -> tuple[str, str]:
    """A column, a number of rows or an average of one table under a condition on the other."""
    first, second = rng.sample(schema, 2)
    (key,) = {column.name for column in first.of("key")} & {column.name for column in second.of("key")}
    tested = rng.choice(second.of(*VALUES))
    phrase, sql = condition(rng, tested)
    link = rng.choice(("that go with", "linked to", "that belong to", "joined with"))
    whose = rng.choice(WHOSE).format(phrase)
    tail = f"{link} {words(second.name)} {whose}"
    source = f"FROM {first.name} AS T1 JOIN {second.name} AS T2 ON T1.{key} = T2.{key}"
    source = f"{source} WHERE T2.{tested.name} {sql}"
    draw = rng.random()
    if draw < 0.2:
        return f"the number of {words(first.name)} {tail}", f"SELECT COUNT(*) {source}"
    if draw < 0.4:
        column = rng.choice(first.of(*NUMBERS) or first.of(*VALUES))
        function, adjective = rng.choice((("AVG", "average"), ("MAX", "highest"), ("MIN", "lowest")))
        gist = f"the {adjective} {words(column.name)} of {_all(rng, first)} {tail}"
        return gist, f"SELECT {function}(T1.{column.name}) {source}"
    selected = rng.choice(first.of(*VALUES))
    return f"the {words(selected.name)} of {_all(rng, first)} {tail}", f"SELECT T1.{selected.name} {source}"


ONE_TABLE = {
    "filter": filter_,
    "filters": filters,
    "count": count,
    "min": _aggregate("MIN", ("lowest", "minimum", "smallest")),
    "max": _aggregate("MAX", ("highest", "maximum", "largest")),
    "avg": _aggregate("AVG", ("average", "mean")),
    "sum": _aggregate("SUM", ("total", "combined", "summed")),
    "distinct": distinct,
    "order_limit": order_limit,
    "group_by": group_by,
    "having": having,
    "between": between,
    "like": like,
    "in": in_,
    "nested": nested,
}
KINDS = (*ONE_TABLE, "join")


def make_query(rng, schema: Schema, kind: str) -> tuple[Schema, Query]:
    """A query of that kind, and the part of the schema it needs: both tables of a join, else one of them."""
    if kind == "join":
        gist, sql = join(rng, schema)
    else:
        schema = (rng.choice(schema),)
        gist, sql = ONE_TABLE[kind](rng, schema[0])
    return schema, Query(kind, gist, _question(rng, gist), sql)


def _question(rng, gist: str) -> str:
    return f"H{gist[1:]}?" if gist.startswith("how many") else rng.choice(FRAMES).format(gist)
