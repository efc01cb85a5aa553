"""Finding the statements of a migration that take data away."""

from __future__ import annotations

import re
from collections.abc import Iterator

# In this order: what a word of SQL may stand in without being one comes first.
_TOKEN = re.compile(
    r"""
    --[^\n]*
    | /\*(?:[^*]|\*(?!/))*(?:\*/|$)
    | (?P<dollar>\$(?:[A-Za-z_]\w*)?\$).*?(?:(?P=dollar)|$)
    | [eE]'(?:[^'\\]|\\.|'')*(?:'|$)
    | '(?:[^']|'')*(?:'|$)
    | "(?:[^"]|"")*(?:"|$)
    | \w[\w$]*
    | [;,()]
    """,
    re.VERBOSE | re.DOTALL,
)

# What has rows, or takes the columns of others with it.
_HOLDS_DATA = {
    "TABLE", "SCHEMA", "DATABASE", "EXTENSION", "TYPE", "DOMAIN", "SEQUENCE", "OWNED", "MATERIALIZED", "FOREIGN",
}  # fmt: skip
# What is made of a text, and runs later.
_CODE = {"FUNCTION", "PROCEDURE"}
# Behind these a statement begins in a block of code.
_BEFORE_STATEMENT = {"BEGIN", "THEN", "ELSE", "LOOP"}
# ALTER ... TYPE to one of these loses nothing, whatever was there before.
_WIDEST = {"TEXT", "NUMERIC", "JSONB"}


def split_migration(text: str) -> tuple[str, str]:
    """Give the two parts of a migration file: up and down."""
    parts: dict[str, list[str]] = {"": [], "up": [], "down": []}
    part = ""
    for line in text.splitlines(keepends=True):
        if match := re.match(r"--\s*migrate:(up|down)\b", line):
            part = match[1]
        else:
            parts[part].append(line)
    return "".join(parts["up"]).strip(), "".join(parts["down"]).strip()


def find_destructive(sql: str) -> list[str]:
    """Give the statements that drop tables, columns or rows, or that may narrow a type; each as it begins.

    The file does not tell which type a column had: of the new ones text, numeric and jsonb alone hold whatever it was.
    A function that is only created is not looked into; a DO block is, with every text in it that it may execute.
    """
    return [_shorten(statement) for statement, words in _statements(sql) if _destroys(words)]


def _shorten(statement: str) -> str:
    text = " ".join(statement.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _statements(sql: str, *, executes: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Give each statement's text, and its words in capitals with commas and brackets between them.

    Args:
        sql: The statements.
        executes: Whether they are of a block that executes texts: each of its texts may be one, or begin or end one.
    """
    words: list[str] = []
    begin = None
    atomic = False  # in the body of a function, which ends with an END behind a semicolon
    for match in _TOKEN.finditer(sql):
        token = match[0]
        if token.startswith(("--", "/*")):
            continue
        atomic = words[-2:] == ["BEGIN", "ATOMIC"] or (atomic and not (words[-1] == ";" and token.upper() == "END"))
        if token == ";" and not atomic:  # noqa: S105
            if words and begin is not None:
                yield sql[begin : match.start()], words
            words, begin = [], None
            continue
        begin = match.start() if begin is None else begin
        if token[0] in "$'" or token[:2] in ("e'", "E'"):
            if match["dollar"]:
                body = token[len(match["dollar"]) : -len(match["dollar"])]
            else:
                body = token[token.index("'") + 1 :].removesuffix("'").replace("''", "'")
            if words[:1] == ["DO"]:
                yield from _statements(body, executes="EXECUTE" in body.upper())
            elif _CODE.isdisjoint(words) and ("EXECUTE" in words or (executes and not _speaks(words))):
                yield from _statements(body, executes=executes)
            words.append("''")
        else:
            words.append(token if token.startswith('"') else token.upper())
    if words and begin is not None:
        yield sql[begin:], words


def _start(words: list[str]) -> int:
    """Give where the last statement begins that is begun in a block of code."""
    return max((at + 1 for at, word in enumerate(words) if word in _BEFORE_STATEMENT), default=0)


def _speaks(words: list[str]) -> bool:
    """Tell whether the texts of a statement are for people."""
    return words[_start(words) :][:1] in (["RAISE"], ["COMMENT"])


def _acts_later(words: list[str]) -> bool:
    """Tell whether what a statement says is done by others, or later; what fills a table is done at once."""
    if words[:1] == ["CREATE"]:
        return {"TABLE", "MATERIALIZED"}.isdisjoint(words[1:4])
    return words[:1] in (["GRANT"], ["REVOKE"], ["COMMENT"], ["RAISE"]) or words[:2] == ["ALTER", "DEFAULT"]


def _destroys(words: list[str]) -> bool:
    pairs = list(zip(words, [*words[1:], ""], strict=True))
    if "TRUNCATE" in words or ("DELETE", "FROM") in pairs or ("THEN", "DELETE") in pairs:
        return not (_acts_later(words) or _acts_later(words[_start(words) :]))
    for position, (word, following) in enumerate(pairs):
        if word in ("ALTER", "DROP") and following == "COLUMN":
            # The end of an ALTER TABLE whose beginning is in another text.
            rest = ["ALTER", "TABLE", *words[position:]]
            return _drops_column(rest) or _narrows(rest)
        if word == "DROP" and (following in _HOLDS_DATA or "CASCADE" in words[position:]):
            if "ALTER" not in words[:position]:
                return True
            # A table that leaves a publication or an extension stays.
            return words[words.index("ALTER") + 1] not in ("PUBLICATION", "EXTENSION") and _drops_column(words)
        if word == "ALTER" and following in ("TABLE", "FOREIGN", "TYPE"):
            return _drops_column(words[position:]) or _narrows(words[position:])
    return False


def _drops_column(words: list[str]) -> bool:
    """Tell whether ALTER TABLE drops a column, and not a constraint, a default or a NOT NULL."""
    for action in _actions(words):
        if action[0] == "DROP" and action[1:2] not in (["CONSTRAINT"], ["EXPRESSION"]):
            return True
    return False


def _narrows(words: list[str]) -> bool:
    """Tell whether ALTER TABLE gives a column another type that may not hold all that the old one held."""
    noun = "ATTRIBUTE" if words[1] == "TYPE" else "COLUMN"
    for action in _actions(words):
        # The name comes before: it may be "type" itself.
        rest = action[3 if action[1:2] == [noun] else 2 :]
        if action[0] == "ALTER" and "TYPE" in rest:
            kind = rest[rest.index("TYPE") + 1 :]
            if kind[:1] and (kind[0] not in _WIDEST or kind[1:2] == ["("] or "USING" in kind):
                return True
    return False


def _actions(words: list[str]) -> Iterator[list[str]]:
    """Cut ALTER TABLE ... into its actions at the commas outside of brackets."""
    depth, begun = 0, False
    action: list[str] = []
    for word in [*words[2:], ","]:
        depth += {"(": 1, ")": -1}.get(word, 0)
        if word == "," and depth == 0:
            if action:
                yield action
            action = []
        elif begun or word in ("ADD", "ALTER", "DROP", "RENAME", "SET", "ATTACH", "DETACH", "VALIDATE"):
            begun = True
            action.append(word)
