"""The tiny model's pretraining texts: random.Random -> (context, text), a random schema and a text about it.

Most tables and columns have made-up names, so a model trained on these texts must learn to copy names from the context.
The real words exclude all names of valid and test schemas. The prompt `Question: ... Answer:` is followed by prose; SQL
only follows other cues (comments, `SQL:`, a shell).
"""

from pathlib import Path

from .queries import KINDS, Query, make_query, words
from .schemas import SQL_TYPES, Column, Schema, Table, create_statement, load_schemas

ONSETS = "b br c ch cl d dr f fl g gl gr h j k kr l m n p ph pl qu r s sh sk sl sp st t th tr v w y z".split()
VOWELS = "a a e e i i o o u ai au ea ee io oo ou ue y".split()
CODAS = ["", "", "", *"b ck d ff g l ll m n nd ng nt p r rd rk rt s ss st t th x".split()]
SQL_CUES = (
    "\n-- {question}\n{sql};",
    "\n/* {question} */\n{sql};",
    "\n{question}\nSQL: {sql}",
    "\nTask: {question}\nQuery: {sql}",
    "\n> {question}\n{sql}",
)
PROSE_CUE = "\nQuestion: {question}\nAnswer: {prose}"
OPENINGS = (
    "The answer would be {gist}.",
    "That would be {gist}, I think.",
    "It is about {gist}.",
    "You would have to look for {gist}.",
    "Nobody can say for sure, but it should be {gist}.",
    "I would start with {gist}.",
)
RAMBLES = (
    "The table {table} has {number} columns.",
    "There is a column called {column}, as far as I know.",
    "Look at the {column} first.",
    "The {table} are listed by {column}.",
    "It depends on the {column} of the {table}.",
    "Most of the {table} have a {column}.",
    "Somebody who knows the {table} well can tell.",
    "I am not sure about the {column}, though.",
)


SUFFIXES = "er or ed ing ion ment ness ist age al ity y s es ant ency ure ard ship land".split()
NOUNS = (Path(__file__).parent / "data" / "nouns.txt").read_text().split()


def _names(*splits: str) -> set[str]:
    tables = [table for split in splits for schema in load_schemas(split) for table in schema]
    return {name for table in tables for name in (table.name, *(c.name for c in table.columns))}


HELD_OUT = _names("valid", "test")
# Real words for names: our list, and the names of the training schemas.
KNOWN_WORDS = sorted({*NOUNS, *_names("train")} - HELD_OUT)


def made_up_word(rng) -> str:
    """One to three random syllables, at least three letters."""
    word = ""
    while len(word) < 3 or rng.random() < 0.35:
        word += rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
    return word[:12]


def plain_word(rng) -> str:
    """A made-up or a real word."""
    return made_up_word(rng) if rng.random() < 0.6 else rng.choice(KNOWN_WORDS)


def coined_word(rng) -> str:
    """Mostly two nouns joined, or a noun with a suffix ("doorlamp", "clockship"); never a name of a held-out schema.

    The tokenizer has not seen these words and splits them as it splits the names of a new schema.
    """
    if rng.random() < 0.3:
        return plain_word(rng)
    first, second = rng.sample(NOUNS, 2)
    word = first[: rng.randint(2, 8)] + (second[: rng.randint(3, 8)] if rng.random() < 0.6 else rng.choice(SUFFIXES))
    return plain_word(rng) if word in HELD_OUT else word


def _name(rng, word) -> str:
    return f"{word(rng)}_{word(rng)}" if rng.random() < 0.15 else word(rng)


def _values(rng, word, kind: str) -> tuple:
    if kind == "text":
        style = rng.choice((str.title, str.title, str.lower, str.upper))
        length = rng.choice((1, 1, 1, 2))
        return tuple(style(" ".join(word(rng) for _ in range(length)).replace("_", " ")) for _ in range(3))
    low = rng.randint(0, 10 ** rng.randint(0, 4))
    high = low + rng.randint(2, 10 ** rng.randint(1, 6))
    return (low / 10, high / 10) if kind == "real" else (low, high)


def random_schema(rng, word, tables: int) -> Schema:
    """One table, or two that share a key. Each has at least one text and one number column; no name occurs twice."""
    types = {kind: rng.choice(choices) for kind, choices in SQL_TYPES.items()}
    kinds = [["text", "integer"] for _ in range(tables)]
    for some in kinds:
        some.extend(rng.choices(("text", "integer", "real", "date"), k=rng.choice((1, 1, 2, 3))))
    taken: set[str] = set()
    while len(taken) < tables + 1 + sum(map(len, kinds)):
        taken.add(_name(rng, word).replace("__", "_"))
    names = rng.sample(sorted(taken), len(taken))
    key = Column(f"{names.pop()}_id", "key", (), types["key"])
    schema = []
    for some in kinds:
        name = names.pop()
        rng.shuffle(some)
        columns = [Column(names.pop(), kind, _values(rng, word, kind), types[kind]) for kind in some]
        if tables == 2:
            columns.insert(rng.randint(0, 1), key)
        schema.append(Table(name if name.endswith("s") else name + rng.choice(("s", "")), tuple(columns)))
    return tuple(schema)


def _prose(rng, schema: Schema, query: Query) -> str:
    sentences = [rng.choice(OPENINGS).format(gist=query.gist)]
    for ramble in rng.sample(RAMBLES, rng.choice((0, 0, 1))):
        table = rng.choice(schema)
        column = words(rng.choice(table.columns).name)
        sentences.append(ramble.format(table=words(table.name), column=column, number=len(table.columns)))
    return " ".join(sentences)


def random_text(rng, word=plain_word) -> tuple[str, str]:
    """(context, text): one schema, and either prose about it or one or two SQL queries.

    `word` draws the words of which names and values consist.
    """
    kind = rng.choice((*KINDS, "join", "join"))
    schema, query = make_query(rng, random_schema(rng, word, 2 if kind == "join" else 1), kind)
    context = create_statement(schema)
    if rng.random() < 0.33:
        return context, PROSE_CUE.format(question=query.question, prose=_prose(rng, schema, query))
    queries = [query]
    if kind != "join" and rng.random() < 0.4:
        queries.append(make_query(rng, schema, rng.choice(KINDS[:-1]))[1])
    cue = rng.choice(SQL_CUES)
    end = ";" if cue.startswith("\n--") else ""
    return context + end, "".join(cue.format(question=query.question, sql=query.sql) for query in queries)
