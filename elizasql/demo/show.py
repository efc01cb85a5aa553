"""How the demo prints: a progress line, and a table as wide as the terminal."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Hit:
    """One remembered line that came back.

    Attributes:
        text: who said what.
        similarity: cosine similarity to the question.
        is_answer: whether it is the line that the question was made for.
    """

    text: str
    similarity: float
    is_answer: bool


@dataclass(frozen=True)
class Answer:
    """A question and what the memory gave for it.

    Attributes:
        question: the words searched with.
        hits: the best lines, best first.
        milliseconds: how long the search took.
    """

    question: str
    hits: Sequence[Hit]
    milliseconds: float


class Progress:
    """A progress line: rewritten in place on a terminal, a new line for each tenth elsewhere (a log, a pipe)."""

    def __init__(self, what: str, total: int) -> None:
        """Start at nothing done.

        Args:
            what: what is being done, such as `storing`.
            total: how many there are to do.
        """
        self._what, self._total, self._tenths = what, total, 0
        self._in_place = sys.stdout.isatty()

    def __call__(self, done: int) -> None:
        """Show that `done` of all are done."""
        line = f"{self._what}  {done:,} of {self._total:,}  ({done * 100 // self._total} %)"
        if self._in_place:
            print(f"\r{line}", end="\n" if done == self._total else "", flush=True)
        elif (tenths := done * 10 // self._total) > self._tenths:
            self._tenths = tenths
            print(line, flush=True)


def table(answers: Sequence[Answer], width: int | None = None) -> str:
    """Return the answers as a table: each question, its best lines (`*` marks the one that was asked for), the time.

    Args:
        answers: what to show.
        width: columns to fill, the terminal's by default.
    """
    width = max(48, width or shutil.get_terminal_size((100, 24)).columns)
    room = width - 4 - 2 * 11
    rule = "-" * width
    rows = [rule, f"{'':4}{fit('question, and the best memories', room)} {'similarity':>10} {'search ms':>10}", rule]
    for number, answer in enumerate(answers, 1):
        rows.append(f"{number:2}  {fit(answer.question, room)} {'':10} {answer.milliseconds:10.2f}")
        rows += [
            f"{'':4}{fit(('* ' if hit.is_answer else '  ') + hit.text, room)} {hit.similarity:10.3f}"
            for hit in answer.hits
        ]
    return "\n".join([*rows, rule])


def fit(text: str, width: int) -> str:
    """Return the text cut or padded to exactly `width` terminal columns.

    Args:
        text: one line; wide letters (Chinese, emoji) take two columns, combining marks none.
        width: at least 3.
    """
    widths = [_columns(character) for character in text[: 4 * width]]
    if sum(widths) > width:
        kept, used = 0, 0
        while used + widths[kept] <= width - 3:
            used += widths[kept]
            kept += 1
        text, widths = text[:kept] + "...", [used, 3]
    return text + " " * (width - sum(widths))


def _columns(character: str) -> int:
    """Return how many terminal columns a character takes."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
