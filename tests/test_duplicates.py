"""Near-duplicates within a batch."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import threading
import time
import tracemalloc
from collections.abc import Callable, Container, Sequence
from itertools import product
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elizasql import (
    ClosedError,
    DatabaseAdapter,
    DeadlineError,
    Entity,
    Memory,
    Room,
    World,
    _codecs,
    _duplicates,
    memories,
)
from elizasql._duplicates import find_alike

from .conftest import MakeAdapter
from .locking import blocked_pid

Row = dict[str, Any]

# Four directions, each with vectors near it, of other lengths; the last two are near the first two, not each other.
_RANDOM = np.random.default_rng(5)
_AXES = np.linalg.qr(_RANDOM.normal(size=(384, 40)))[0].T.astype(np.float32)
_TURNED = [(1, 9, 1), (0.9999, 10, 300), (0.951, 11, 1), (0.951, 12, 1e-4)]
VECTORS = [
    scale * (similarity * _AXES[axis] + (1 - similarity**2) ** 0.5 * _AXES[other])
    for axis, (similarity, other, scale) in product(range(4), _TURNED)
]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("others", [0, 2500])
async def test_a_similarity_of_just_0_95_is_near(
    make_db: MakeAdapter, own_database: str, together: bool, others: int
) -> None:
    """As a search with this threshold finds it; compared with all there are, and found by the graph."""
    db = await make_db(dsn=own_database)
    first, second = np.zeros((2, 384), np.float32)
    first[0], second[:5] = 1, (19, 6, 1, 1, 1)
    if others:
        noise = np.random.default_rng(3).normal(size=(others, 384)).astype(np.float32)
        await db.create_memories([{"content": {}, "embedding": each, "unique": True} for each in noise], "messages")
        await db.index_memories(rebuild=True)
    rows = [{"content": {}, "embedding": each} for each in (first, second)]
    if together:
        ids = await db.create_memories(rows, "messages")
    else:
        ids = [await db.create_memory(each, "messages") for each in rows]
        await db.index_memories()
    hits = await db.search_memories(embedding=first, table_name="messages", match_threshold=0.95, count=3)
    assert {hit.id: hit.unique for hit in hits} == dict(zip(ids, (True, False), strict=True))


def is_near(later: Row, earlier: Row) -> bool:
    a, b = (np.asarray(row["vector"], np.float64) for row in (later, earlier))
    return bool(a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= 0.95) and all(
        later[name] == earlier[name] or (later[name] is None and name != "type")
        for name in ("type", "room_id", "world_id", "entity_id")
    )


def expected(rows: Sequence[Row], left_out: Container[UUID] = ()) -> set[UUID]:
    """Give what `find_alike` gives, one pair after the other."""
    compared = [row for row in rows if row["vector"] is not None and row["id"] not in left_out]
    return {
        later["id"]
        for position, later in enumerate(compared)
        if later["unique"] is None and any(is_near(later, earlier) for earlier in compared[:position])
    }


@st.composite
def batches(draw: st.DrawFn, *, scopes: Sequence[Sequence[UUID | None]], most: int) -> list[Row]:
    """Draw the memories of a batch; `scopes` are the rooms, worlds and entities."""
    rows = []
    for position in range(draw(st.integers(0, most))):
        vector = draw(st.none() | st.sampled_from(VECTORS))
        rows.append(
            {
                "id": UUID(int=draw(st.integers(0, 9)) * 1000 + position),
                "type": draw(st.sampled_from(["messages", "facts"])),
                "unique": draw(st.sampled_from([None, None, None, True, False])),
                "vector": vector,
                **{
                    name: draw(st.sampled_from(ids))
                    for name, ids in zip(("room_id", "world_id", "entity_id"), scopes, strict=True)
                },
            }
        )
    return rows


@settings(max_examples=100)
@given(batches(scopes=[[None, UUID(int=1), UUID(int=2)]] * 3, most=12), st.sets(st.integers(0, 11)), st.integers(1, 5))
def test_what_is_alike_in_a_batch(rows: list[Row], without: set[int], block: int) -> None:
    for row in rows:
        row["embedding"] = None if row["vector"] is None else _codecs.encode_vector(row["vector"])
        row["width"] = 384
    left_out = {row["id"] for position, row in enumerate(rows) if position in without}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_duplicates, "_BLOCK", block)
        assert find_alike(rows, left_out) == expected(rows, left_out)


def test_a_batch_of_equal_memories_takes_little_more_room_than_its_vectors() -> None:
    row = {"type": "m", "room_id": None, "world_id": None, "entity_id": None, "unique": None, "width": 384}
    rows = [row | {"id": UUID(int=i), "embedding": _codecs.encode_vector(VECTORS[0])} for i in range(8000)]
    tracemalloc.start()
    try:
        assert len(find_alike(rows)) == 7999
        assert tracemalloc.get_traced_memory()[1] < 3 * 8000 * 4 * 384 + 8000 * 256 * 6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("cut", ["time", "cancellation"])
async def test_a_comparison_ends_with_its_call(make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    """It runs in a thread, which nothing else would end, and which the interpreter's exit waits for."""
    db = await make_db()
    began, ended = threading.Event(), threading.Event()

    def compare(rows: Sequence[Row], left_out: Container[UUID], is_over: Callable[[], bool]) -> set[UUID]:
        began.set()
        while not is_over():
            time.sleep(0.001)
        assert find_alike(rows, left_out, is_over) == set()
        ended.set()
        return set()

    monkeypatch.setattr(memories, "find_alike", compare)
    batch = [Memory(content={}, embedding=vector) for vector in VECTORS * 20]
    creating = asyncio.ensure_future(db.create_memories(batch, "messages", timeout=0.3 if cut == "time" else 60))
    await asyncio.to_thread(began.wait)
    if cut == "cancellation":
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating
    else:
        with pytest.raises(DeadlineError):
            await creating
    await asyncio.to_thread(ended.wait)
    assert await db.count_memories() == 0


@pytest.mark.parametrize("batch_size", [3, 1000])
async def test_a_batch_against_itself_and_what_is_there(make_db: MakeAdapter, batch_size: int) -> None:
    """However it is cut into chunks, each memory is judged by those before it, and by what is stored."""
    db = await make_db(batch_size=batch_size, indexing="manual", resident="off")
    entities = await db.create_entities([Entity(id=uuid4(), names=[name]) for name in "ab"])
    worlds = await db.create_worlds([World(name=name) for name in "ab"])
    rooms = await db.create_rooms([Room(source="t", type="DM") for _ in "ab"])
    scopes: list[list[UUID | None]] = [[None, *rooms], [None, *worlds], [None, *entities]]
    stored: dict[UUID, bool] = {}
    kept: list[Row] = []  # as a batch that was decided before
    random = np.random.default_rng(7)

    def some(count: int) -> list[Row]:
        return [
            {
                "id": uuid4(),
                "type": ["messages", "facts"][random.integers(2)],
                "unique": [None, None, None, True][random.integers(4)],
                "vector": None if random.random() < 0.1 else VECTORS[random.integers(len(VECTORS))],
                **{
                    name: ids[random.integers(3) if random.random() < 0.5 else 1]
                    for name, ids in zip(("room_id", "world_id", "entity_id"), scopes, strict=True)
                },
            }
            for _ in range(count)
        ]

    for count in (2, 10, 40, 60):
        # Some ids are there already, with other vectors: these are not stored.
        batch = some(count) + [row | {"id": old["id"]} for row, old in zip(some(2), kept[:2], strict=False)]
        batch = [batch[position] for position in random.permutation(len(batch))]
        there = set(stored)
        alike = expected(kept + [row for row in batch if row["id"] not in there])
        fields = [name for name in batch[0] if name != "vector"]
        await db.create_memories(
            [Memory(content={}, embedding=row["vector"], **{name: row[name] for name in fields}) for row in batch]
        )
        for row in batch:
            if row["id"] not in there:
                stored[row["id"]] = row["id"] not in alike if row["unique"] is None else row["unique"]
                kept.append(row | {"unique": stored[row["id"]]})
        found = await db.get_memories_by_ids(list(stored))
        assert {memory.id: memory.unique for memory in found} == stored
    assert 20 < list(stored.values()).count(False) < 90


async def test_round_trips_of_a_batch_that_is_undecided(make_db: MakeAdapter, round_trips: list[str]) -> None:
    """All chunks are looked up before any is stored, so that the server compares none with what the batch stores."""
    db = await make_db(batch_size=4)

    async def kinds(axes: Sequence[int]) -> list[str]:
        round_trips.clear()
        await db.create_memories([Memory(content={}, embedding=_AXES[axis]) for axis in axes], "messages")
        return [
            next(word for word in ("near_duplicates", "INSERT", "BEGIN", "COMMIT", "xact_id") if word in text)
            for text in round_trips
        ]

    def together(chunks: int) -> list[str]:
        return ["BEGIN", *["near_duplicates"] * chunks, *["INSERT"] * chunks, "xact_id", "COMMIT"]

    assert await kinds([0, 1, 2, 3]) == ["near_duplicates"]
    assert await kinds([4, 5, 4]) == together(1)
    assert await kinds(range(6, 16)) == together(3)
    stored = await db.get_memories(table_name="messages")
    assert sorted(memory.unique is True for memory in stored) == [False] + [True] * 16


async def test_a_batch_that_is_tried_again_is_decided_anew(
    make_db: MakeAdapter, db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two tries somebody may have stored what is alike."""
    others = await make_db(db.agent_id)
    batch = [Memory(content={}, embedding=_AXES[axis]) for axis in (0, 1, 1)]
    real, refused = asyncpg.Connection.fetch, False

    async def fetch(self: Any, query: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal refused
        if "INSERT" in query and not refused:
            refused = True
            await others.create_memory(Memory(content={}, embedding=_AXES[0], unique=True), "messages")
            raise asyncpg.DeadlockDetectedError("injected")
        return await real(self, query, *args, **kwargs)

    monkeypatch.setattr(asyncpg.Connection, "fetch", fetch)
    ids = await db.create_memories(batch, "messages")
    stored = {memory.id: memory.unique for memory in await db.get_memories_by_ids(ids)}
    assert refused and [stored[id] for id in ids] == [False, True, False]


async def test_who_waits_for_a_room_leaves_the_connections_to_others(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """The server lets one at a time look into a room: those behind it wait in the process."""
    db = await make_db(pool_max_size=4)
    await db.create_memory(Memory(content={}, embedding=_AXES[0], unique=True), "documents")
    one, two, three, four = (Memory(content={}, embedding=_AXES[axis]) for axis in range(4))
    typed = (two, "messages"), (one, "facts"), (two, "messages")
    lock = "SELECT pg_advisory_xact_lock(hashtextextended($1::text || ' - messages', 0))"
    async with raw.transaction():
        await raw.execute(lock, str(db.agent_id))
        calls = [
            db.create_memory(one, "messages"),
            db.create_memory(two, "messages"),
            db.create_memories([one, two, three, three], "messages"),
            db.create_memories([dataclasses.replace(each, type=kind) for each, kind in typed]),
            db.create_memory(four, "messages"),
        ]
        creating = [asyncio.ensure_future(call) for call in calls]
        await blocked_pid(raw, creating[0])
        assert await db.search_memories(embedding=_AXES[0], table_name="documents", count=1)
        await db.create_memory(one, "documents")
        with pytest.raises(DeadlineError, match="others had the locks that it needs"):
            await db.create_memory(one, "messages", timeout=0.01)
        creating[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating[1]
        async with db.transaction() as tx:
            await tx.create_memory(one, "facts")
    await asyncio.gather(*creating[2:], creating[0])
    assert await db.count_memories(table_name="messages", unique=False) == 8
    assert await db.count_memories(table_name="messages", unique=True) == 4
    gc.collect()
    assert not db._executor.connections.turns


async def test_batches_take_their_turns_at_rooms_in_one_order(
    db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each of two could wait in the process for what the other one has."""
    rooms = await db.create_rooms([Room(source="t", type="DM") for _ in range(20)])
    turn_of, turns = db._executor._turn_of, []

    def note(key: Any) -> Any:
        turns.append(key)
        return turn_of(key)

    monkeypatch.setattr(db._executor, "_turn_of", note)
    for batch in (rooms, rooms[::-1]):
        await db.create_memories(
            [Memory(room_id=room, content={}, embedding=_AXES[axis]) for axis, room in enumerate(batch)], "messages"
        )
    assert len(turns) == 40 and turns[:20] == turns[20:] == sorted(turns[20:], key=str)


async def test_who_waits_for_a_room_of_others_stores_nothing_after_its_close(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    db = await make_db(pool_max_size=4)
    other = await make_db(db.agent_id, pool_max_size=4)
    lock = "SELECT pg_advisory_xact_lock(hashtextextended($1::text || ' - messages', 0))"
    async with raw.transaction():
        await raw.execute(lock, str(db.agent_id))
        creating = [
            asyncio.ensure_future(each.create_memory(Memory(content={}, embedding=_AXES[axis]), "messages"))
            for axis, each in enumerate((other, other, db))
        ]
        await blocked_pid(raw, creating[0])
        closing = asyncio.ensure_future(db.close(timeout=0.0))
        while not db._executor._cut:
            await asyncio.sleep(0)
    with pytest.raises(ClosedError, match="the adapter was closed meanwhile"):
        await creating[2]
    await closing
    await asyncio.gather(*creating[:2])
    assert await other.count_memories(table_name="messages", unique=False) == 2
