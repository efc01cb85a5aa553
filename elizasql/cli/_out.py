"""What a command shows: tables for people, JSON for programs, progress on a terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Protocol

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# What a memory holds must not move the cursor or colour the terminal; surrogates, as in names of files that are not
# UTF-8, cannot be written at all.
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# A column of texts is not made narrower than this.
_FOLDED = 20

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}


def console() -> Console:
    """Give a console of standard output as it is now; wider than any row when nobody looks at it."""
    width = None if sys.stdout.isatty() else 10_000
    return Console(markup=False, highlight=False, emoji=False, width=width, soft_wrap=True)


def clean(value: object) -> str:
    """Write a value in a form that a terminal shows and does not act on."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3f}"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    return _CONTROL.sub("\ufffd", str(value))


def counted(count: int, noun: str) -> str:
    """Write how many there are of something, whose plural ends in s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def say(*words: object, style: str | None = None) -> None:
    """Print a line of text."""
    console().print(Text(" ".join(map(clean, words)), style=STYLES.get(style or "", "")))


def emit(value: Any, *, lines: bool = False) -> None:
    """Print a value as JSON, indented, or in one line."""
    option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS | orjson.OPT_UTC_Z
    option |= 0 if lines else orjson.OPT_INDENT_2
    sys.stdout.write(orjson.dumps(_encodable(value), option=option, default=str).decode())
    sys.stdout.flush()


def _encodable(value: Any) -> Any:
    """Replace what UTF-8, and so JSON, cannot hold: surrogates, as in names of files that are not UTF-8."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_encodable(key): _encodable(each) for key, each in value.items()}
    return [_encodable(each) for each in value] if isinstance(value, (list, tuple)) else value


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], styles: Iterable[str] | None = None) -> None:
    """Print rows as a table; numbers stand to the right, and long texts are folded, never cut.

    Numbers and ids stay whole, to be read and copied: the terminal wraps a row of them that is wider than it is.
    """
    rows = [list(row) for row in rows]
    made = Table(box=None, pad_edge=False, header_style="bold")
    least = -2
    for position, column in enumerate(columns):
        cells = [row[position] for row in rows]
        numbers = all(cell is None or type(cell) in (int, float) for cell in cells)
        whole = numbers or all(map(_ID.fullmatch, map(clean, cells)))
        longest = max(map(len, [column, *map(clean, cells)]))
        least += 2 + (longest if whole else min(longest, _FOLDED))
        made.add_column(column, justify="right" if numbers and rows else "left", overflow="fold", no_wrap=whole)
    for row, style in zip(rows, styles or [""] * len(rows), strict=True):
        made.add_row(*(Text(clean(value)) for value in row), style=STYLES.get(style, ""))
    out = console()
    if least > out.width:
        made.width = least
    out.print(made)


def mapping(values: dict[str, object]) -> None:
    """Print names and values, one pair a line."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        say(f"{name:<{width}}  {clean(value)}")


class Advance(Protocol):
    """Told how far a piece of work has come."""

    def __call__(self, name: str, done: int, total: int | None) -> None:
        """Take the name of what is being done, how much of it is done, and of how much."""


@contextmanager
def progress(*, shown: bool = True) -> Iterator[Advance]:
    """Give a function that shows progress on standard error; it does nothing where that is no terminal."""
    if not shown or not sys.stderr.isatty():
        yield lambda *_: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, markup=False, emoji=False), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield advance
