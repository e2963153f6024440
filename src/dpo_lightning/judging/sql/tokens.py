"""Splits SQL into tokens by sqlite's rules for quotes, numbers and comments, without a grammar.

Blanks are sqlite's own five. Other characters that look blank are part of a word (U+00A0, like everything that is not
ASCII) or an error (a vertical tab).
"""

import re
from typing import NamedTuple


class Token(NamedTuple):
    kind: str  # word, quoted (an identifier; in double quotes possibly a string), string, number or sign
    text: str  # without its quotes
    raw: str

    @property
    def name(self) -> str:
        return self.text.lower()

    def is_word(self, *words: str) -> bool:
        return self.kind == "word" and self.name in words

    def is_sign(self, *signs: str) -> bool:
        return self.kind == "sign" and self.text in signs


_TOKEN = re.compile(
    r"""(?P<space>[ \t\n\r\f]+|--[^\n]*|/\*.*?(?:\*/|\Z))
      | (?P<string>'[^']*(?:''[^']*)*(?:'|\Z))
      | (?P<quoted>"[^"]*(?:""[^"]*)*(?:"|\Z)|`[^`]*(?:``[^`]*)*(?:`|\Z)|\[[^\]]*(?:\]|\Z))
      | (?P<number>(?:0[xX][0-9a-fA-F]+|(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)(?![\w$]|[^\0-\x7f]))
      | (?P<word>(?:\w|[^\0-\x7f])(?:[\w$]|[^\0-\x7f])*)
      | (?P<sign><>|!=|<=|>=|==|\|\||.)""",
    re.DOTALL | re.VERBOSE,
)


def without_blanks(sql: str) -> str:
    """The text with one space for each run of blanks and comments, except in quotes."""
    parts: list[str] = []
    gap = False
    for match in _TOKEN.finditer(sql):
        if match.lastgroup == "space":
            gap = True
        else:
            parts.append(" " * (gap and bool(parts)) + match.group())
            gap = False
    return "".join(parts)


def lower_texts(sql: str) -> str:
    """The same with its texts in lower case: `name = 'Jo' AND upper(x) = 'A'` -> `name = 'jo' AND lower(x) = 'a'`.

    Formats of dates and numbers stay as they are, since `%m` and `%M` mean different things.
    """
    parts: list[str] = []
    before = last = ""  # the two tokens in front
    word = 0  # where the last word is
    for match in _TOKEN.finditer(sql):
        raw = match.group()
        if match.lastgroup == "space":
            parts.append(raw)
            continue
        is_format = last == "(" and before in ("strftime", "printf", "format")
        if raw == "(" and last == "upper":
            parts[word] = "lower"
        if match.lastgroup == "word":
            word = len(parts)
        parts.append(raw.lower() if match.lastgroup in ("string", "quoted") and not is_format else raw)
        before, last = last, raw.lower()
    return "".join(parts)


def tokenize(sql: str) -> list[Token]:
    """`SELECT "a" FROM t -- x` -> word SELECT, quoted a, word FROM, word t.

    Never fails, and takes time linear in the text: unclosed quotes and comments end with the text.
    """
    tokens = []
    for match in _TOKEN.finditer(sql):
        kind, raw = str(match.lastgroup), match.group()
        if kind in ("string", "quoted"):
            closing = raw[-1]
            tokens.append(Token(kind, raw[1:-1].replace(closing * 2, closing), raw))
        elif kind != "space":
            tokens.append(Token(kind, raw, raw))
    return tokens


def cte_names(query: str) -> set[str]:
    """The names that a WITH defines: `WITH a AS (...), b (x, y) AS (...)` -> {"a", "b"}."""
    tokens = tokenize(query) if "with" in query.lower() else []
    names = set()
    for index, token in enumerate(tokens):
        follows = [after.name for after in tokens[index + 1 : index + 4]]
        if not token.is_word("as") or index == 0 or "(" not in follows:
            continue
        before = index - 1
        if tokens[before].is_sign(")"):
            while before > 0 and not tokens[before].is_sign("("):
                before -= 1
            before -= 1
        names.add(tokens[before].name)
    return {name for name in names if not name.startswith("sqlite_")}
