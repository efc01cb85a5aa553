"""What the demo reads and asks: lines out of a text file, and ten questions about them."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from uuid import UUID, uuid5

CONVERSATION = Path(__file__).with_name("conversation.txt")
NOBODY = "Narrator"

# Each question with words that only the line which answers it contains.
QUESTIONS = (
    ("Which nuts is Jonas allergic to?", "allergic to hazelnuts"),
    ("How much did it cost to repair the boiler?", "repair cost 240 pounds"),
    ("Which noises is the dog terrified of?", "terrified of thunder"),
    ("When do we leave for the sailing trip?", "cast off on 24 May"),
    ("Which flowers and which novels does their mother love?", "loves dahlias"),
    ("How many croissants does the hotel need each morning?", "ninety croissants every morning"),
    ("Who starts as the second baker at the shop?", "found the second baker"),
    ("Where do the chess players of the club meet?", "meets on Tuesday evenings"),
    ("Which job was Pia offered at the veterinary school?", "At the veterinary school"),
    ("How old is the sourdough, and who began the starter?", "starter is older than the shop"),
)

_DATE = re.compile(r"#\s*(\d{4}-\d\d-\d\d)\b")
# A name starts with a letter and has at most four words, so that neither a time of day nor a web address is one.
_SPEAKER = re.compile(r"([^\W\d_][\w.'\u2019-]*(?: [\w.'\u2019-]+){0,3}):\s+(\S.*)")
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if code != 0x09} | {0x09: " "}


@dataclass(frozen=True)
class Line:
    """One line of a conversation, to become one memory.

    Attributes:
        speaker: who says it, `Narrator` when the line names nobody.
        text: what is said.
        said_at: when, rising from line to line.
        copy: how many equal lines stand before it.
    """

    speaker: str
    text: str
    said_at: datetime
    copy: int

    @property
    def whole(self) -> str:
        """The line as it is embedded: who says something is part of what it means."""
        return said_by(self.speaker, self.text)

    def id_in(self, room_id: UUID) -> UUID:
        """Return the id of the line's memory."""
        # Counted among equal lines, not from the top: a line put in above makes no new memory of each line below.
        return uuid5(room_id, f"memory {self.copy} {self.speaker}: {self.text}")


@dataclass(frozen=True)
class Question:
    """A question, and the line that should come back.

    Attributes:
        text: the words that are searched with.
        answer: the text of the line that answers.
    """

    text: str
    answer: str


def said_by(speaker: str, text: str) -> str:
    """Return the line that a speaker said, as it stands in the file."""
    return text if speaker == NOBODY else f"{speaker}: {text}"


def decode(data: bytes) -> str:
    """Return the text in a file's bytes, whatever its encoding; never fails.

    Args:
        data: UTF-8 (also with some broken bytes), UTF-16 with its mark, or a Western single-byte encoding.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    text = data.decode("utf-8-sig", "replace")
    broken = text.count("\N{REPLACEMENT CHARACTER}")
    if not broken or broken * 2 < sum(not sign.isascii() for sign in text):  # most of what is not ASCII is good UTF-8
        return text
    return data.decode("cp1252", "replace")


def read_lines(text: str, start: datetime) -> Iterator[Line]:
    """Yield one line for each that is not empty; `Name: words` gives the speaker, `# 2025-03-04 ...` the date.

    Args:
        text: the whole text.
        start: the time of the first line, until a date says something else.
    """
    seen: Counter[tuple[str, str]] = Counter()
    said_at = start
    for raw in text.splitlines():
        words = raw.translate(_CONTROLS).strip()
        if date := _DATE.match(words):
            try:
                said_at = datetime.fromisoformat(date[1]).replace(hour=9, tzinfo=timezone.utc)
                continue
            except ValueError:  # 2025-02-30 is no date but a line like any other
                pass
        if not words:
            continue
        named = _SPEAKER.fullmatch(words)
        speaker, said = (named[1], named[2]) if named else (NOBODY, words)
        yield Line(speaker, said, said_at, seen[speaker, said])
        seen[speaker, said] += 1
        said_at += timedelta(seconds=1)


def questions_about(lines: Sequence[Line]) -> list[Question]:
    """Return up to ten questions about any lines: spread over them, each one half of a line's own words.

    Args:
        lines: the lines to ask about; the same lines always give the same questions.
    """
    texts = list(dict.fromkeys(line.text for line in lines))
    texts = [text for text in texts if len(text.split()) >= 4] or texts
    count = min(10, len(texts))
    return [Question(_half(text), text) for text in (texts[i * len(texts) // count] for i in range(count))]


def built_in_questions(lines: Sequence[Line]) -> list[Question]:
    """Return the ten questions about the built-in conversation, each with the line that answers it."""
    return [
        Question(question, next(line.text for line in lines if words in line.text)) for question, words in QUESTIONS
    ]


def _half(text: str) -> str:
    """Return the longer half of a text's words in their order; of a single word, its first half."""
    words = text.split()
    if len(words) == 1:
        return text[: (len(text) + 1) // 2]
    longest = sorted(range(len(words)), key=lambda i: (-len(words[i]), i))[: (len(words) + 1) // 2]
    return " ".join(words[i] for i in sorted(longest))
