"""The demo without a database: reading, embedding, asking, printing, and the flow over a list in memory."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import elizasql
from elizasql import Memory, demo
from elizasql.demo import embedders, show
from elizasql.demo import text as demo_text
from elizasql.demo.embedders import HashingEmbedder, SentenceTransformersEmbedder, best_embedder
from elizasql.demo.text import NOBODY, Line

EPOCH = datetime(2025, 1, 1, tzinfo=timezone.utc)


def lines_of(text: str) -> list[Line]:
    return list(demo_text.read_lines(text, EPOCH))


def conversation() -> list[Line]:
    return lines_of(demo_text.decode(demo_text.CONVERSATION.read_bytes()))


# --- the conversation and its questions ---


def test_conversation_is_long_and_every_line_has_a_speaker() -> None:
    lines = conversation()
    assert len(lines) >= 150
    assert {line.speaker for line in lines} == {"Mara", "Ada", "Pia", "Jonas"}


def test_each_question_has_exactly_one_answer_and_does_not_quote_it() -> None:
    lines = conversation()
    assert len(demo_text.QUESTIONS) == 10
    for question, words in demo_text.QUESTIONS:
        assert sum(words in line.text for line in lines) == 1, words
        answer = next(line.text for line in lines if words in line.text)
        assert question.casefold().rstrip("?") not in answer.casefold()


def test_the_built_in_embedder_finds_nine_of_ten_answers_among_three() -> None:
    lines = conversation()
    embedder = HashingEmbedder()
    memory = embedder.embed([line.whole for line in lines])
    questions = demo_text.built_in_questions(lines)
    scores = embedder.embed([question.text for question in questions]) @ memory.T
    best = np.argsort(-scores, axis=1)[:, : demo.HITS]
    found = [question.answer in [lines[i].text for i in row] for question, row in zip(questions, best, strict=True)]
    assert sum(found) >= 9, [q.text for q, ok in zip(questions, found, strict=True) if not ok]


# --- the built-in embedder ---


@given(st.lists(st.text(st.characters(codec=None), max_size=80), max_size=8))
def test_every_text_has_a_unit_vector_that_does_not_depend_on_its_batch(texts: list[str]) -> None:
    embedder = HashingEmbedder()
    vectors = embedder.embed(texts)
    assert vectors.shape == (len(texts), 384)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    for text, vector in zip(texts, vectors, strict=True):
        assert np.array_equal(embedder.embed([text])[0], vector)


@pytest.mark.parametrize(
    "text", ["", "   ", "!?", "😀🎉", "日本語の文章", "Привет, мир", "\ud800", "\0", "x" * 100_000]
)
def test_odd_texts_have_unit_vectors(text: str) -> None:
    assert np.linalg.norm(HashingEmbedder().embed([text])[0]) == pytest.approx(1.0, abs=1e-5)


def test_features_that_cancel_out_still_give_a_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = embedders._Word("x", False, np.array([1, 1]), np.array([1.0, -1.0]))
    monkeypatch.setattr(embedders, "_word", lambda word: nothing)
    assert np.linalg.norm(HashingEmbedder().embed(["x"])) == 1.0


def test_hashes_are_the_same_on_every_machine() -> None:
    buckets, signs = embedders._hash(["boiler", "hazelnut", ""])
    assert (buckets.tolist(), signs.tolist()) == ([271, 242, 0], [1.0, -1.0, -1.0])


def test_word_forms_spelling_and_order_count() -> None:
    embedder = HashingEmbedder()

    def similarity(left: str, right: str) -> float:
        a, b = embedder.embed([left, right])
        return float(a @ b)

    assert similarity("Planning the TRIPS", "planned a trip") > 0.6
    assert similarity("café au lait", "Cafe au lait") == pytest.approx(1.0, abs=1e-5)
    assert similarity("the croissant", "the croisant") > similarity("the croissant", "the herring") + 0.2
    assert similarity("dog bites man", "dog bites man") > similarity("dog bites man", "man bites dog") + 0.05
    assert similarity("what is the boiler", "boiler") > similarity("what is the boiler", "what is the dog")


# --- the user's own model ---


def fake_library(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    library = ModuleType("sentence_transformers")
    library.SentenceTransformer = model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)


def test_a_model_that_loads_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def __init__(self, name: str, *, local_files_only: bool) -> None:
            assert name == "all-MiniLM-L6-v2"
            assert local_files_only

        def encode(self, texts: list[str], **options: Any) -> NDArray[np.float64]:
            assert options == {"normalize_embeddings": True, "show_progress_bar": False}
            return np.eye(384)[: len(texts)]

    fake_library(monkeypatch, Model)
    embedder = best_embedder()
    assert isinstance(embedder, SentenceTransformersEmbedder)
    assert embedder.dimension == 384
    assert embedder.embed(["a", "b"]).dtype == np.float32


@pytest.mark.parametrize("error", [OSError("no files"), TypeError("too old"), RuntimeError("broken"), ImportError()])
def test_a_model_that_does_not_load_is_replaced(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    fake_library(monkeypatch, fail)
    assert isinstance(best_embedder(), HashingEmbedder)


# --- reading ---


def test_speakers_dates_and_copies() -> None:
    lines = lines_of("Anna: hi\n\n  no name here \n# 2025-03-04  a day\nAnna: hi\nDr. O'Neil: x: y\n# 2025-02-30\n")
    nine = datetime(2025, 3, 4, 9, tzinfo=timezone.utc)
    assert lines == [
        Line("Anna", "hi", EPOCH, 0),
        Line(NOBODY, "no name here", EPOCH + timedelta(seconds=1), 0),
        Line("Anna", "hi", nine, 1),
        Line("Dr. O'Neil", "x: y", nine + timedelta(seconds=1), 0),
        Line(NOBODY, "# 2025-02-30", nine + timedelta(seconds=2), 0),
    ]


@pytest.mark.parametrize("line", ["https://example.org/x", "12:30 lunch", "C:\\temp", "He said that it was: late", ":"])
def test_no_speaker_in(line: str) -> None:
    assert lines_of(line) == [Line(NOBODY, line, EPOCH, 0)]


def test_a_new_line_above_leaves_the_ids_below() -> None:
    room = uuid4()
    before = [line.id_in(room) for line in lines_of("A: x\nA: y\nA: x")]
    after = [line.id_in(room) for line in lines_of("A: new\nA: x\nA: y\nA: x")]
    assert len(set(before)) == 3
    assert after[1:] == before


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"plain", "plain"),
        ("Grüße".encode(), "Grüße"),
        ("Grüße".encode("utf-8-sig"), "Grüße"),
        ("Grüße".encode("utf-16"), "Grüße"),
        ("Grüße".encode("latin-1"), "Grüße"),
        ("“süß” für 5 €".encode("cp1252"), "“süß” für 5 €"),
        ("Grüße, größer".encode() + b" \xff", "Grüße, größer \N{REPLACEMENT CHARACTER}"),
        (b"", ""),
    ],
)
def test_decode(data: bytes, expected: str) -> None:
    assert demo_text.decode(data) == expected


@given(st.binary(max_size=200))
def test_any_bytes_become_lines_without_control_characters(data: bytes) -> None:
    for line in lines_of(demo_text.decode(data)):
        assert line.text.strip()
        assert not any(ord(character) < 32 or 0x7F <= ord(character) < 0xA0 for character in line.text)
        line.whole.encode()


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=40))
def test_questions_about_any_file(texts: list[str]) -> None:
    lines = lines_of("\n".join(texts))
    if not lines:
        return
    questions = demo_text.questions_about(lines)
    assert questions == demo_text.questions_about(lines)
    assert 1 <= len(questions) <= 10
    assert len({question.answer for question in questions}) == len(questions)
    assert all(question.text and question.answer in {line.text for line in lines} for question in questions)


def test_a_question_is_the_longer_half_of_a_line() -> None:
    (question,) = demo_text.questions_about(lines_of("Mara: the oven is a Swedish deck oven"))
    assert question.text == "oven Swedish deck oven"


# --- printing ---


@given(st.text(max_size=60), st.integers(3, 40))
def test_fit_fills_the_width_exactly(text: str, width: int) -> None:
    assert sum(map(show._columns, show.fit(text, width))) == width


def test_fit_cuts_wide_letters_by_columns() -> None:
    assert show.fit("日本語の文章", 8) == "日本... "
    assert show.fit("short", 8) == "short   "
    assert show.fit("exactly8", 8) == "exactly8"


def test_table_is_as_wide_as_asked() -> None:
    answers = [show.Answer("Why?", [show.Hit("Mara: " + "because " * 40, 0.5, True)], 1.25)]
    printed = show.table(answers, width=80)
    assert max(map(len, printed.splitlines())) == 80
    assert "* Mara: because" in printed
    assert "0.500" in printed
    assert "1.25" in printed


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    progress = show.Progress("storing", 1000)
    for done in range(10, 1001, 10):
        progress(done)
    printed = capsys.readouterr().out
    assert printed.count("\n") == (1 if is_terminal else 10)
    assert printed.count("\r") == (100 if is_terminal else 0)
    assert printed.endswith("1,000 of 1,000  (100 %)\n")


# --- the flow ---


class Remembering:
    """The part of the adapter that the demo uses, over a dictionary."""

    def __init__(self) -> None:
        self.agent: object = None
        self.memories: dict[UUID | None, Memory] = {}
        self.batches: list[int] = []

    async def get_agent(self, agent_id: UUID) -> object:
        return self.agent

    async def ensure_agent_exists(self, agent: object) -> None:
        self.agent = agent

    async def _accept(self, *values: object) -> None:
        """Take anything: the flow does not look at what these return."""

    ensure_embedding_dimension = create_worlds = create_rooms = create_entities = add_participants_room = _accept

    async def get_memories_by_ids(self, ids: Sequence[UUID], *, table_name: str) -> list[Memory]:
        return [self.memories[memory_id] for memory_id in ids if memory_id in self.memories]

    async def create_memories(self, memories: Sequence[Memory], *, table_name: str) -> None:
        self.batches.append(len(memories))
        self.memories.update({memory.id: memory for memory in memories})

    async def search_memories(
        self, *, embedding: NDArray[np.float32], table_name: str, room_id: UUID, count: int
    ) -> list[Memory]:
        scored = [
            dataclasses.replace(memory, similarity=float(np.dot(np.asarray(memory.embedding), embedding)))
            for memory in self.memories.values()
            if memory.room_id == room_id
        ]
        return sorted(scored, key=lambda memory: -(memory.similarity or 0.0))[:count]

    async def count_memories(self, *, room_id: UUID, table_name: str, unique: bool) -> int:
        return sum(memory.room_id == room_id for memory in self.memories.values())


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Remembering:
    """Give the demo a database in memory and the built-in embedder."""
    remembering = Remembering()

    @asynccontextmanager
    async def connect(**options: object) -> AsyncIterator[Remembering]:
        assert options == {
            "agent_id": demo.AGENT_ID, "dsn": None, "data_dir": None, "memory_types": {"messages"},
        }  # fmt: skip
        yield remembering

    monkeypatch.setattr(elizasql, "connect", connect)
    monkeypatch.setattr(demo, "best_embedder", HashingEmbedder)
    return remembering


def test_second_run_stores_nothing_and_answers_again(database: Remembering, capsys: pytest.CaptureFixture[str]) -> None:
    count = len(conversation())
    assert demo.main([]) == 0
    first = capsys.readouterr().out
    assert "first open" in first
    assert f"stored    {count} memories of conversation.txt" in first
    assert max(database.batches) == demo.BATCH
    assert sum(database.batches) == count
    assert demo.main([]) == 0
    second = capsys.readouterr().out
    assert f"{count} memories from the last run are still here; nothing to store" in second
    assert "later open" in second
    assert sum(database.batches) == count
    assert first.count("\n    * ") == second.count("\n    * ") >= 9


def test_own_file_stores_only_what_is_new(
    database: Remembering, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes("Anna: the key is under the blue pot\nEin Gruß an alle\n".encode("latin-1"))
    assert demo.main(["--file", str(file)]) == 0
    file.write_text("a new line on top\nAnna: the key is under the blue pot\nEin Gruß an alle\n", "utf-8")
    assert demo.main(["--file", str(file)]) == 0
    printed = capsys.readouterr().out
    assert database.batches == [2, 1]
    assert "2 memories from the last run are still here; 1 new to store" in printed
    assert "for 3 of 3 questions" in printed
    copy = tmp_path / "copy.txt"
    copy.write_bytes(file.read_bytes())
    assert demo.main(["--file", str(copy)]) == 0
    assert database.batches == [2, 1, 3]  # a room of its own


@pytest.mark.parametrize(("content", "code"), [(b"", 1), (b" \n\n\0\n", 1), (b"# 2025-01-01\n", 1), (None, 2)])
def test_files_without_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, code: int
) -> None:
    file = tmp_path / "file.txt"
    if content is not None:
        file.write_bytes(content)
    assert demo.main(["--file", str(file)]) == code
    assert str(file) in capsys.readouterr().err
    assert demo.main(["--file", str(tmp_path)]) == 2
