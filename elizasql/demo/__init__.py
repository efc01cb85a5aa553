"""A demo that stands alone: an agent reads a conversation, remembers it in PostgreSQL and answers ten questions.

`python -m elizasql demo` reads the conversation beside this module; `--file` takes any text file of yours. What was
stored stays: the next run finds it and stores only what is new.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from uuid import NAMESPACE_OID, UUID, uuid5

import elizasql
from elizasql import Agent, DatabaseAdapter, Entity, Memory, Room, World
from elizasql.cli import give_up_output
from elizasql.demo.embedders import MODEL, Embedder, HashingEmbedder, best_embedder
from elizasql.demo.show import Answer, Hit, Progress, table
from elizasql.demo.text import (
    CONVERSATION,
    Line,
    Question,
    built_in_questions,
    decode,
    questions_about,
    read_lines,
    said_by,
)
from elizasql.errors import DeadlineError, ElizaSQLError, EmbeddedServerError, UnavailableError

__all__ = ["main"]

NAMESPACE = uuid5(NAMESPACE_OID, "elizasql demo")
AGENT_ID = uuid5(NAMESPACE, "agent Ada")
WORLD_ID = uuid5(NAMESPACE, "world")
TABLE = "messages"
BATCH = 64
HITS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: the arguments after `demo`, by default those of the process.

    Returns:
        The exit code: 0 when all went well, 1 when the file holds no line or the database fails, 2 when the file
        cannot be read, 3 when the server cannot be reached, 130 when it was interrupted.
    """
    parser = argparse.ArgumentParser("elizasql demo", description="An agent remembers a conversation and answers.")
    parser.add_argument("--file", help="a text file of yours, one memory a line (`Name: text` gives the speaker)")
    parser.add_argument("--data-dir", help="where the embedded server keeps its data (default: as configured)")
    parser.add_argument("--dsn", help="a PostgreSQL server of yours in place of the embedded one")
    options = parser.parse_args(argv)
    try:
        code = _main(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough
        give_up_output()
        return 0
    except KeyboardInterrupt:
        sys.unraisablehook = lambda _: None  # what was cut in the middle of its making complains when it goes
        print("elizasql demo: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        give_up_output()
        print(f"elizasql demo: {error.strerror or error}", file=sys.stderr)
        return 1
    return code


def _main(options: argparse.Namespace) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a memory may hold letters that this terminal has not
    path = Path(options.file) if options.file else CONVERSATION
    try:
        path = path.expanduser()  # `make demo FILE=~/notes.txt`: no shell does it there
        data, changed = path.read_bytes(), path.stat().st_mtime
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of nobody
        print(f"elizasql demo: cannot read {path}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 2
    lines = list(read_lines(decode(data), datetime.fromtimestamp(changed, timezone.utc)))
    if not lines:
        print(f"elizasql demo: {path} holds no line to remember", file=sys.stderr)
        return 1
    questions = questions_about(lines) if options.file else built_in_questions(lines)
    embedder = best_embedder()
    print(f"embedder  {embedder.name}, {embedder.dimension} dimensions")
    if isinstance(embedder, HashingEmbedder):
        print(f"          (built in; sentence-transformers with {MODEL} is used where both are installed)")
    try:
        asyncio.run(_run(path, lines, questions, embedder, dsn=options.dsn, data_dir=options.data_dir))
    except ElizaSQLError as error:
        print(f"elizasql demo: {error}", file=sys.stderr)
        return 3 if isinstance(error, (DeadlineError, EmbeddedServerError, UnavailableError)) else 1
    return 0


async def _run(
    path: Path,
    lines: Sequence[Line],
    questions: Sequence[Question],
    embedder: Embedder,
    *,
    dsn: str | None,
    data_dir: str | None,
) -> None:
    """Store the lines that are new, ask the questions and print what came back."""
    # Vectors of two embedders do not compare, so each has its own room for the same file.
    name = bytes(path.resolve()).decode(errors="backslashreplace")  # noqa: ASYNC240 - need not be UTF-8
    key = "the built-in conversation" if path == CONVERSATION else name
    room_id = uuid5(NAMESPACE, f"room {embedder.name} {key}")
    by_id = {line.id_in(room_id): line for line in lines}

    started = perf_counter()
    async with elizasql.connect(agent_id=AGENT_ID, dsn=dsn, data_dir=data_dir, memory_types={TABLE}) as db:
        is_new = await db.get_agent(AGENT_ID) is None
        await _prepare(db, path, room_id, sorted({line.speaker for line in lines}), embedder.dimension)
        opened = perf_counter()
        await _remember(db, room_id, by_id, embedder)
        stored = perf_counter()
        answers = [await _ask(db, room_id, questions[0], embedder)]
        answered = perf_counter()
        answers += [await _ask(db, room_id, question, embedder) for question in questions[1:]]
        print(table(answers))
        found = sum(any(hit.is_answer for hit in answer.hits) for answer in answers)
        print(f"recall    the line asked for (*) is among the best {HITS} for {found} of {len(answers)} questions")
        print(
            f"{'first' if is_new else 'later'} open{answered - started:7.2f} s to the first answered search"
            f" ({opened - started:.2f} s to open, {stored - opened:.2f} s to look up and store)"
        )
        count = await db.count_memories(room_id=room_id, table_name=TABLE, unique=False)
        print(f"stored    {count:,} memories of {path.name}")


async def _prepare(db: DatabaseAdapter, path: Path, room_id: UUID, speakers: Sequence[str], dimension: int) -> None:
    """Create the agent, its world, the room and those who speak in it; what is already there stays as it is."""
    await db.ensure_agent_exists(Agent(id=AGENT_ID, name="Ada", bio=["Remembers what she is told."]))
    await db.ensure_embedding_dimension(dimension)
    await db.create_worlds([World(id=WORLD_ID, name="Demo")])
    await db.create_rooms([Room(id=room_id, name=path.name, source="demo", type="GROUP", world_id=WORLD_ID)])
    entities = [Entity(id=_entity_id(room_id, name), names=[name]) for name in speakers]
    await db.create_entities(entities)
    await db.add_participants_room([_entity_id(room_id, name) for name in speakers], room_id)


async def _remember(db: DatabaseAdapter, room_id: UUID, by_id: dict[UUID, Line], embedder: Embedder) -> None:
    """Embed and store the lines that are not yet in the room."""
    ids = list(by_id)
    known: set[UUID | None] = set()
    for begin in range(0, len(ids), 1000):
        known |= {memory.id for memory in await db.get_memories_by_ids(ids[begin : begin + 1000], table_name=TABLE)}
    new = [memory_id for memory_id in ids if memory_id not in known]
    if known:
        rest = f"{len(new):,} new to store" if new else "nothing to store"
        print(f"memory    {len(known):,} memories from the last run are still here; {rest}")
    progress = Progress("storing ", len(new))
    for begin in range(0, len(new), BATCH):
        batch = new[begin : begin + BATCH]
        vectors = embedder.embed([by_id[memory_id].whole for memory_id in batch])
        memories = [
            Memory(
                id=memory_id,
                entity_id=_entity_id(room_id, by_id[memory_id].speaker),
                room_id=room_id,
                world_id=WORLD_ID,
                content={"text": by_id[memory_id].text, "speaker": by_id[memory_id].speaker, "source": "demo"},
                embedding=vector,
                unique=True,  # known beforehand: no look for near-duplicates
                created_at=by_id[memory_id].said_at,
            )
            for memory_id, vector in zip(batch, vectors, strict=True)
        ]
        await db.create_memories(memories, table_name=TABLE)
        progress(begin + len(batch))


async def _ask(db: DatabaseAdapter, room_id: UUID, question: Question, embedder: Embedder) -> Answer:
    """Search the room for one question."""
    vector = embedder.embed([question.text])[0]
    started = perf_counter()
    found = await db.search_memories(embedding=vector, table_name=TABLE, room_id=room_id, count=HITS)
    milliseconds = (perf_counter() - started) * 1000
    hits = [
        Hit(
            text=said_by(content["speaker"], content["text"]),
            similarity=memory.similarity or 0.0,
            is_answer=content["text"] == question.answer,
        )
        for memory in found
        if (content := memory.content) is not None
    ]
    return Answer(question.text, hits, milliseconds)


def _entity_id(room_id: UUID, name: str) -> UUID:
    """Return the id of a speaker; the same name in two files is two people."""
    return uuid5(room_id, f"entity {name}")
