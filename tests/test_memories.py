"""Memories: store, read, change and delete."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timedelta, timezone
from enum import Enum
from itertools import product
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein

import elizasql
from elizasql import (
    ArgumentError,
    CheckError,
    DatabaseAdapter,
    EmbeddingDimensionError,
    Entity,
    ForeignKeyError,
    Memory,
    NotFoundError,
    Room,
    World,
    _loader,
)
from elizasql import memories as _memories
from elizasql._statements import Statement

from .conftest import MakeAdapter, Scene, make_scene
from .locking import blocked_pid, locked, overtaken

T0 = datetime(2026, 1, 1, tzinfo=timezone.utc)


def vector(seed: int, dimension: int = 384) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=dimension).astype(np.float32)


def memory(scene: Scene, text: str = "hello", **fields: Any) -> Memory:
    return Memory(**{"entity_id": scene.entity, "room_id": scene.room, "content": {"text": text}, **fields})


async def rows_of(raw: asyncpg.Connection[Any], db: DatabaseAdapter, table: str) -> int:
    count: int = await raw.fetchval(f"SELECT count(*) FROM elizasql.{table} WHERE agent_id = $1", db.agent_id)
    return count


# --- create ----------------------------------------------------------------------------------------------------------


async def test_create_gives_everything_back(db: DatabaseAdapter, agent_world: Scene) -> None:
    given = memory(
        agent_world,
        "hello",
        id=uuid4(),
        world_id=agent_world.world,
        metadata={"a": [1, None, {"b": "c"}]},
        unique=False,
        created_at=T0,
        embedding=vector(1),
    )
    id = await db.create_memory(given, "messages")
    assert id == given.id
    stored = await db.get_memory_by_id(id, include_embedding=True)
    assert stored is not None
    assert stored.type == "messages"
    assert stored.agent_id == db.agent_id
    for name in ("entity_id", "room_id", "world_id", "content", "metadata", "unique", "created_at"):
        assert getattr(stored, name) == getattr(given, name), name
    assert stored.embedding is not None
    np.testing.assert_array_equal(stored.embedding, vector(1))
    assert stored.embedding.dtype == np.float32
    without = await db.get_memory_by_id(id)
    assert without is not None and without.embedding is None


async def test_create_fills_in_what_is_missing(db: DatabaseAdapter) -> None:
    before = datetime.now(timezone.utc) - timedelta(minutes=5)
    id = await db.create_memory({"content": {}}, table_name="facts")
    stored = await db.get_memory_by_id(id)
    assert stored is not None
    assert (stored.entity_id, stored.room_id, stored.world_id) == (None, None, None)
    assert stored.metadata == {} and stored.unique is True
    assert stored.created_at is not None and stored.created_at > before


@pytest.mark.parametrize("time", [datetime.min.replace(tzinfo=timezone.utc), datetime.max.replace(tzinfo=timezone.utc)])
async def test_the_ends_of_the_calendar_are_times(db: DatabaseAdapter, agent_world: Scene, time: datetime) -> None:
    """Go's zero time is one of them."""
    s = agent_world
    made = [
        await db.create_memory(memory(s, created_at=time), "messages"),
        await db.create_memory(memory(s, created_at=time, embedding=vector(1), unique=True), "messages"),
        await db.create_memory(memory(s, created_at=time, embedding=vector(2)), "messages"),
        *await db.create_memories([memory(s, created_at=time, embedding=vector(i)) for i in (3, 4)], "messages"),
        *await db.create_memories([memory(s, created_at=time), memory(s, created_at=time)], "messages"),
        *await db.upsert_memories([memory(s, created_at=time)], "messages"),
    ]
    await db.load_memories([memory(s, created_at=time)], "messages")
    found = await db.get_memories(table_name="messages")
    assert [each.created_at for each in found] == [time] * (len(made) + 1)
    assert await db.get_memories(table_name="messages", cursor=found[3]) == found[4:]
    await db.create_logs([{"entityId": s.entity, "roomId": s.room, "type": "t", "body": {}, "createdAt": time}])
    assert [each.created_at for each in await db.get_logs()] == [time]


async def test_a_second_create_of_an_id_changes_nothing(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    id = uuid4()
    assert (
        await db.create_memory(memory(agent_world, "first", id=id, embedding=vector(1), unique=True), "messages") == id
    )
    assert (
        await db.create_memory(memory(agent_world, "second", id=id, embedding=vector(2), unique=True), "messages") == id
    )
    assert await db.create_memory(memory(agent_world, "third", id=id, embedding=vector(3)), "messages") == id
    assert await db.create_memories([memory(agent_world, "fourth", id=id, embedding=vector(4))], "messages") == [id]
    stored = await db.get_memory_by_id(id, include_embedding=True)
    assert stored is not None and stored.content == {"text": "first"}
    np.testing.assert_array_equal(stored.embedding, vector(1))  # type: ignore[arg-type]
    assert await rows_of(raw, db, "embeddings") == 1


async def test_batch_gives_ids_in_order_and_the_first_of_an_id_counts(db: DatabaseAdapter, agent_world: Scene) -> None:
    a, b = uuid4(), uuid4()
    batch = [memory(agent_world, "b", id=b), memory(agent_world, "a", id=a), memory(agent_world, "again", id=b)]
    assert await db.create_memories(batch, "messages") == [b, a, b]
    assert {m.id: m.content for m in await db.get_memories_by_ids([a, b])} == {a: {"text": "a"}, b: {"text": "b"}}
    assert await db.create_memories([], "messages") == []


async def test_batch_without_times_keeps_its_order(make_db: MakeAdapter) -> None:
    """Whatever the ids: the chunks go by them, the times do not."""
    db = await make_db(batch_size=20)
    agent_world = await make_scene(db)
    batches = [[memory(agent_world, f"{name} {i}", id=uuid4()) for i in range(50)] for name in ("a", "b", "c")]
    for row in batches[1]:
        row.embedding = vector(1)
    await db.create_memories(batches[0], "messages")
    async with db.transaction() as tx:
        await tx.create_memories(batches[1], "messages")
        await tx.upsert_memories(batches[2], "messages")
    newest_first = await db.get_memories(table_name="messages")
    assert [m.id for m in reversed(newest_first)] == [m.id for batch in batches for m in batch]


async def test_a_batch_is_ordered_by_id_over_its_chunks(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    """One that waits for its first row holds no other."""
    db = await make_db(batch_size=2)
    scene = await make_scene(db)
    ids = sorted(uuid4() for _ in range(6))
    batch = [memory(scene, id=id) for id in reversed(ids)]
    await db.create_memories(batch, "messages")
    async with locked(raw, ids[0]):
        waiting = asyncio.ensure_future(db.upsert_memories(batch, "messages"))
        await blocked_pid(raw, waiting)
        question = "SELECT id FROM elizasql.memories WHERE agent_id = $1 FOR UPDATE NOWAIT"
        assert len(await raw.fetch(question, db.agent_id)) == 6
    assert await waiting == ids[::-1]


async def test_batch_of_several_types_and_of_the_batch_contract(db: DatabaseAdapter, agent_world: Scene) -> None:
    ids = await db.create_memories(
        [
            {"memory": memory(agent_world, "f"), "tableName": "facts", "unique": False},
            {"memory": {"content": {"text": "d"}, "roomId": str(agent_world.room)}, "tableName": "documents"},
            memory(agent_world, "m", type="messages"),
        ]
    )
    stored = {m.id: m for m in await db.get_memories_by_ids(ids)}
    assert [stored[id].type for id in ids] == ["facts", "documents", "messages"]
    assert stored[ids[0]].unique is False
    with pytest.raises(ArgumentError, match="table_name is missing"):
        await db.create_memories([memory(agent_world, "x")])


async def test_a_bad_row_leaves_nothing_of_the_batch(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db(batch_size=10)
    scene = await make_scene(db)
    good = [memory(scene, str(i), embedding=vector(i), unique=True) for i in range(35)]
    with pytest.raises(ForeignKeyError) as caught:
        await db.create_memories([*good, memory(scene, "bad", room_id=uuid4())], "messages")
    assert caught.value.constraint == "memories_room_fkey"
    assert caught.value.table == "memories"
    assert await rows_of(raw, db, "memories") == await rows_of(raw, db, "embeddings") == 0
    assert len(await db.create_memories(good, "messages")) == 35
    assert await rows_of(raw, db, "embeddings") == 35


@pytest.mark.parametrize(
    ("field", "constraint"),
    [("room_id", "memories_room_fkey"), ("entity_id", "memories_entity_fkey"), ("world_id", "memories_world_fkey")],
)
async def test_broken_references_are_errors(
    db: DatabaseAdapter, agent_world: Scene, field: str, constraint: str
) -> None:
    for bad in (memory(agent_world, **{field: uuid4()}), memory(agent_world, embedding=vector(1), **{field: uuid4()})):
        with pytest.raises(ForeignKeyError) as caught:
            await db.create_memory(bad, "messages")
        assert caught.value.constraint == constraint
        assert str(getattr(bad, field)) in str(caught.value)


class Kind(Enum):
    DOCUMENT = "document"


METADATA: list[dict[Any, Any]] = [
    {},
    {"type": None},
    {"type": ["document"]},
    {"type": {"document": 1}},
    {"type": "Document"},
    {"type": "message", "of": ["document", "fragment"]},
    {"about": {"type": "document"}},
    {"type": "document"},
    {"type": Kind.DOCUMENT},
    {"type": "document", "at": "\0"},
    {"type": "document", "\ud800": 1},
    {"type": "document", "about": {"timestamp": 1}},
    {"type": "document", "timestamp": None},
    {"type": "document", "timestamp": "whenever"},
    {"type": "fragment"},
    {"type": "fragment", "timestamp": 1},
    {"type": "fragment", "documentId": "x"},
    {"type": "fragment", "position": 0},
    {"type": "fragment", "documentId": None, "position": None},
]


@pytest.mark.parametrize("metadata", METADATA, ids=repr)
async def test_metadata_are_refused_that_the_table_refuses(
    db: DatabaseAdapter, agent_world: Scene, monkeypatch: pytest.MonkeyPatch, metadata: dict[Any, Any]
) -> None:
    def change(id: UUID) -> Memory:
        return memory(agent_world, id=id, metadata=metadata)

    there = await db.create_memory(memory(agent_world), "documents")
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: db.create_memory(change(uuid4()), "documents"),
        lambda: db.update_memory(change(there)),
        lambda: db.upsert_memories([change(there)], "documents"),
    ]

    async def refusals(error: type[Exception]) -> list[bool]:
        said: list[bool] = []
        for call in calls:
            try:
                await call()
            except error:
                said.append(True)
            else:
                said.append(False)
        return said

    early = await refusals(ArgumentError)
    monkeypatch.setattr(_memories, "_check_metadata", lambda encoded: None)
    assert early == await refusals(CheckError)
    assert len(set(early)) == 1


async def test_an_embedding_needs_a_locked_dimension(make_db: MakeAdapter) -> None:
    db = await make_db(dimension=None)
    scene = await make_scene(db)
    assert await db.get_embedding_dimension() is None
    for unique in (True, None):
        with pytest.raises(EmbeddingDimensionError) as caught:
            await db.create_memory(memory(scene, embedding=vector(1), unique=unique), "messages")
        assert (caught.value.locked, caught.value.given) == (None, 384)
    assert await db.count_memories() == 0
    assert await db.search_memories(embedding=vector(1), table_name="messages") == []
    await db.create_memory(memory(scene), "messages")


async def test_a_vector_of_an_agent_that_is_not_there(dsn: str) -> None:
    """Whoever is not there lacks more than a width."""
    given = Memory(content={"text": "hello"}, embedding=vector(1))
    async with elizasql.connect(agent_id=uuid4(), dsn=dsn, indexing="manual") as db:
        for call in (
            lambda: db.create_memory(given, "messages"),
            lambda: db.create_memory(given, "messages", unique=True),
            lambda: db.create_memories([given, given], "messages"),
            lambda: db.upsert_memories([given], "messages"),
            lambda: db.load_memories([given], "messages"),
            lambda: db.create_memory(Memory(content={}), "messages"),
        ):
            with pytest.raises(ForeignKeyError, match=str(db.agent_id)) as caught:
                await call()
            assert (caught.value.constraint, caught.value.table) == ("memories_agent_fkey", "memories")
        assert await db.update_memory({"id": uuid4(), "embedding": vector(1)}) is False
        assert await db.search_memories(embedding=vector(1), table_name="messages") == []


async def test_a_lock_by_another_adapter_is_found(make_db: MakeAdapter) -> None:
    early = await make_db(dimension=None)
    other = await make_db(early.agent_id, dimension=768)
    scene = await make_scene(other)
    with pytest.raises(EmbeddingDimensionError) as caught:
        await early.create_memory(memory(scene, embedding=vector(1)), "messages")
    assert (caught.value.locked, caught.value.given) == (768, 384)
    id = await early.create_memory(memory(scene, embedding=vector(1, 768)), "messages")
    stored = await early.get_memory_by_id(id, include_embedding=True)
    assert stored is not None and stored.embedding is not None and stored.embedding.shape == (768,)


@pytest.mark.parametrize("dimension", [384, 512, 768, 1024, 1536, 3072])
async def test_every_dimension_stores_indexes_and_finds(make_db: MakeAdapter, dimension: int) -> None:
    db = await make_db(dimension=dimension)
    scene = await make_scene(db)
    ids = await db.create_memories(
        [memory(scene, str(i), embedding=vector(i, dimension), unique=True) for i in range(5)], "messages"
    )
    one = await db.create_memory(memory(scene, "one", embedding=vector(77, dimension)), "messages")
    for _ in range(2):
        for seed, id in [*enumerate(ids), (77, one)]:
            for scope in ({}, {"room_id": scene.room}, {"entity_id": scene.entity}):
                found = await db.search_memories(
                    embedding=vector(seed, dimension), table_name="messages", count=1, include_embedding=True, **scope
                )
                assert found[0].id == id
                assert found[0].similarity == pytest.approx(1.0, abs=1e-5)
                np.testing.assert_array_equal(found[0].embedding, vector(seed, dimension))  # type: ignore[arg-type]
        await db.index_memories()
    await db.update_memory({"id": one, "embedding": vector(78, dimension)})
    await db.upsert_memories([Memory(id=ids[0], content={}, embedding=vector(79, dimension))], "messages")
    found = await db.search_memories(embedding=vector(78, dimension), table_name="messages", count=1)
    assert found[0].id == one
    found = await db.search_memories(embedding=vector(79, dimension), table_name="messages", count=1)
    assert found[0].id == ids[0]
    assert await db.index_memories(rebuild=True) == 2
    cached = await db.get_cached_embeddings(query_table_name="messages", query_threshold=0, query_input="one")
    np.testing.assert_array_equal(cached[0]["embedding"], vector(78, dimension))


# --- near-duplicates -------------------------------------------------------------------------------------------------


async def test_near_duplicates_are_marked_in_their_scope(db: DatabaseAdapter, agent_world: Scene) -> None:
    other_room = await db.create_room(Room(source="t", type="DM"))
    base = vector(1)
    near = base + 0.01 * vector(2)
    far = vector(3)

    async def unique_of(given: Memory, table: str = "messages") -> bool | None:
        stored = await db.get_memory_by_id(await db.create_memory(given, table))
        assert stored is not None
        return stored.unique

    assert await unique_of(memory(agent_world, embedding=base)) is True
    assert await unique_of(memory(agent_world, embedding=near)) is False
    assert await unique_of(memory(agent_world, embedding=far)) is True
    assert await unique_of(memory(agent_world, embedding=near), "facts") is True
    assert await unique_of(memory(agent_world, embedding=near, room_id=other_room)) is True
    assert await unique_of(memory(agent_world, embedding=near, entity_id=agent_world.other)) is True
    # Without a room every memory of the type counts.
    assert await unique_of(memory(agent_world, embedding=near, room_id=None, entity_id=None)) is False
    # What is said wins over what is found.
    assert await unique_of(memory(agent_world, embedding=near, unique=True)) is True
    stored = await db.get_memory_by_id(
        await db.create_memory(memory(agent_world, embedding=far), "messages", unique=True)
    )
    assert stored is not None and stored.unique is True
    only_unique = await db.search_memories(embedding=base, table_name="messages", unique=True, count=50)
    assert all(m.unique for m in only_unique) and len(only_unique) == 6


@pytest.mark.parametrize("indexed", [False, True])
async def test_near_duplicates_within_a_batch_and_against_the_index(
    db: DatabaseAdapter, agent_world: Scene, indexed: bool
) -> None:
    await db.create_memory(memory(agent_world, embedding=vector(1)), "messages")
    if indexed:
        await db.index_memories()
    batch = [
        memory(agent_world, "near the stored", embedding=vector(1) * 3),
        memory(agent_world, "new", embedding=vector(2)),
        memory(agent_world, "near the one before", embedding=vector(2) + 0.001),
        memory(agent_world, "said to be unique", embedding=vector(2), unique=True),
        memory(agent_world, "no embedding"),
        memory(agent_world, "another new", embedding=vector(3)),
        memory(agent_world, "near in another room", embedding=vector(3), room_id=None),
    ]
    ids = await db.create_memories(batch, "messages")
    stored = {m.id: m.unique for m in await db.get_memories_by_ids(ids)}
    assert [stored[id] for id in ids] == [False, True, False, True, True, True, False]


async def test_what_is_not_stored_has_no_near_duplicates(make_db: MakeAdapter) -> None:
    """A memory that is there keeps its vector: what a batch gives for it in vain is like nothing."""
    db = await make_db(batch_size=2)
    scene = await make_scene(db)
    there = await db.create_memory(memory(scene, embedding=vector(1)), "messages")
    batch = [
        memory(scene, "in vain", id=there, embedding=vector(2)),
        memory(scene, "like what was in vain", embedding=vector(2)),
        memory(scene, "like the stored", embedding=vector(1)),
        memory(scene, "in vain, and unlike", id=there, embedding=vector(3)),
        memory(scene, "like the second", embedding=vector(2)),
    ]
    ids = await db.create_memories(batch, "messages")
    stored = {m.id: m for m in await db.get_memories_by_ids(ids)}
    assert [stored[id].unique for id in ids] == [True, True, False, True, False]
    assert stored[there].content == {"text": "hello"}


async def test_of_concurrent_near_duplicates_exactly_one_is_unique(make_db: MakeAdapter) -> None:
    db = await make_db(pool_max_size=8)
    scene = await make_scene(db)
    others = [await make_db(db.agent_id, pool_max_size=3) for _ in range(3)]
    for turn in range(5):
        base = vector(100 + turn)
        calls = [
            adapter.create_memory(memory(scene, embedding=base + 0.001 * vector(i)), "messages")
            for i, adapter in enumerate([db, db, db, db, *others])
        ]
        calls += [
            adapter.create_memories([memory(scene, embedding=base + 0.001 * vector(9)) for _ in range(3)], "messages")  # type: ignore[misc]
            for adapter in others
        ]
        done: list[Any] = await asyncio.gather(*calls)
        ids = [id for item in done for id in (item if isinstance(item, list) else [item])]
        uniques = [m.unique for m in await db.get_memories_by_ids(ids)]
        assert len(uniques) == 16 and uniques.count(True) == 1


async def test_a_room_is_not_locked_before_the_first_look_at_the_partitions(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    """That look is what takes a new connection long: the room's other writers need not wait for it."""
    async with raw.transaction():
        part = await raw.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)
        await raw.execute(f"LOCK TABLE elizasql.{part} IN ACCESS EXCLUSIVE MODE")
        call = asyncio.ensure_future(db.create_memory(memory(agent_world, embedding=vector(1)), "messages"))
        await blocked_pid(raw, call)
        key = f"{db.agent_id} {agent_world.room} messages"
        assert await raw.fetchval("SELECT pg_try_advisory_xact_lock(hashtextextended($1, 0))", key)
    assert await db.get_memory_by_id(await call) is not None


@pytest.mark.parametrize("method", ["create_memories", "load_memories", "upsert_memories", "update_memories"])
async def test_others_have_their_turn_while_a_batch_is_read(
    db: DatabaseAdapter, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each memory is read before the next one is asked for: it may be made in the same array."""
    monkeypatch.setattr(_loader, "_READ_FOR", math.inf)  # as on a machine that is fast enough
    ids = await db.create_memories([Memory(content={}) for _ in range(200)], "messages")
    turns, seen = 0, []
    buffer = np.zeros(384, np.float32)

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def produce() -> Iterator[Memory]:
        for number, id in enumerate(ids):
            seen.append(turns)
            buffer[:] = number + 1
            buffer[0] = 0
            id = uuid4() if method in ("create_memories", "load_memories") else id
            yield Memory(id=id, type="messages", content={"n": number}, embedding=buffer, unique=True)

    others = asyncio.ensure_future(take_turns())
    await getattr(db, method)(produce())
    others.cancel()
    assert len(set(seen)) == 4
    stored = await db.get_memories(table_name="messages", include_embedding=True)
    read = {memory.content["n"]: memory.embedding for memory in stored if memory.embedding is not None}
    assert [read[number][1] for number in range(200)] == [number + 1 for number in range(200)]  # type: ignore[index]


async def test_a_batch_is_what_was_given_when_it_was_begun(db: DatabaseAdapter) -> None:
    """Others have their turn while it is read, and may write to the collection."""
    waiting = {number: Memory(content={"n": number}) for number in range(200)}

    async def write() -> None:
        waiting.clear()

    writing = asyncio.ensure_future(write())
    assert len(await db.create_memories(waiting.values(), "messages")) == 200
    assert writing.done() and not waiting
    broken = [Memory(content={"n": number}) if number != 130 else {"content": None} for number in range(200)]
    with pytest.raises(ArgumentError, match="Memory at position 130: content is missing"):
        await db.create_memories(broken, "messages")


class Incomparable(UUID):
    """Cannot be compared in Python, which takes long."""

    def __lt__(self, other: object) -> bool:
        raise AssertionError


async def test_ids_are_put_in_order_as_numbers(db: DatabaseAdapter) -> None:
    """Of 50,000 UUIDs that takes a quarter of the time, in which the event loop is kept from others."""
    ids = [Incomparable(int=number) for number in (2, 1)]
    pairs = [(id, id) for id in ids]
    assert await db.delete_memories(ids) == 0
    assert await db.delete_rooms_by_world_ids(ids) == 0
    assert not await db.delete_participants(pairs)
    with pytest.raises(NotFoundError):
        await db.update_participants([{"entityId": id, "roomId": id, "updates": {"metadata": {}}} for id in ids])
    with pytest.raises(NotFoundError):
        await db.patch_components([{"componentId": id, "ops": []} for id in ids])


@pytest.mark.parametrize("batch_size", [2, 1000])
async def test_batches_over_rooms_in_opposite_order_do_not_block_each_other(
    make_db: MakeAdapter, batch_size: int
) -> None:
    db = await make_db(pool_max_size=8, batch_size=batch_size)
    scene = await make_scene(db)
    rooms = await db.create_rooms([Room(source="t", type="GROUP") for _ in range(6)])
    for turn in range(4):
        await asyncio.gather(
            *(
                db.create_memories(
                    [
                        memory(scene, room_id=room, embedding=vector(1000 * turn + 100 * i + j))
                        for j, room in enumerate(rooms if i % 2 else reversed(rooms))
                    ],
                    "messages",
                )
                for i in range(8)
            )
        )
    assert await db.count_memories() == 4 * 8 * 6
    assert db._meter.retries == 0


# --- read ------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def library(db: DatabaseAdapter, agent_world: Scene) -> list[Memory]:
    """Give 60 memories, newest first, over two rooms, two entities and two worlds, with equal times among them."""
    room = await db.create_room(Room(id=uuid4(), source="t", type="GROUP", world_id=agent_world.world))
    world = await db.create_world(World(name="w2"))
    given = [
        Memory(
            id=uuid4(),
            room_id=agent_world.room if i % 3 else room,
            entity_id=agent_world.entity if i % 4 else agent_world.other,
            world_id=[agent_world.world, world, None][i % 3],
            content={"text": f"Text {i} {'needle' if i % 7 == 0 else ''}"},
            metadata={"n": i, "tag": {"x": i % 2}},
            unique=i % 5 != 0,
            created_at=T0 + timedelta(seconds=i // 4, microseconds=i % 3),
        )
        for i in range(60)
    ]
    await db.create_memories(given, "messages")
    await db.create_memories([Memory(content={"text": "other"})], "facts")
    return sorted(given, key=lambda m: (m.created_at, m.id), reverse=True)  # type: ignore[type-var,return-value]


def ids_of(memories: list[Memory]) -> list[UUID | None]:
    return [m.id for m in memories]


async def test_get_memories_filters_and_orders(db: DatabaseAdapter, agent_world: Scene, library: list[Memory]) -> None:
    room, entity, world = agent_world.room, agent_world.other, agent_world.world

    async def check(wanted: Any, **filters: Any) -> None:
        expected = [m for m in library if wanted(m)]
        assert 0 < len(expected) < 61
        assert ids_of(await db.get_memories(table_name="messages", **filters)) == ids_of(expected), filters
        counted = {k: v for k, v in filters.items() if k not in ("count", "offset")}
        assert await db.count_memories(table_name="messages", **counted) == len(expected), filters

    await check(lambda m: True)
    await check(lambda m: True, agent_id=db.agent_id)
    await check(lambda m: m.room_id == room, room_id=room)
    await check(lambda m: m.entity_id == entity, entity_id=entity)
    await check(lambda m: m.world_id == world, world_id=world)
    await check(lambda m: m.room_id == room and m.entity_id == entity, room_id=str(room), entity_id=entity)
    await check(lambda m: m.entity_id == entity and m.world_id == world, world_id=world, entity_id=entity)
    await check(lambda m: m.unique, unique=True)
    await check(lambda m: m.unique and m.room_id == room, unique=True, room_id=room)
    five, nine = T0 + timedelta(seconds=5), T0 + timedelta(seconds=9, microseconds=1)
    await check(lambda m: five <= m.created_at <= nine, start=five, end=nine)
    milliseconds = five.timestamp() * 1000
    await check(lambda m: m.created_at >= five and m.room_id == room, start=milliseconds, room_id=room)
    await check(lambda m: m.created_at <= nine and m.entity_id == entity, end=nine, entity_id=entity)
    await check(lambda m: m.metadata["tag"] == {"x": 1}, metadata={"tag": {"x": 1}})
    await check(lambda m: "needle" in m.content["text"], text_contains="NEEDLE")
    await check(lambda m: "needle" in m.content["text"] and m.world_id == world, text_contains="needle", world_id=world)
    # Zero is a time and a number, None is not given.
    assert await db.get_memories(table_name="messages", end=0) == []
    assert len(await db.get_memories(table_name="messages", start=0)) == 60
    assert await db.get_memories(table_name="messages", count=0) == []
    assert await db.get_memories(table_name="nothing") == []
    assert await db.count_memories(room_ids=[room, uuid4()]) == await db.count_memories(room)
    assert await db.count_memories(room_ids=[]) == 0


# Each filter, as it is given and as it is meant.
FILTERS: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "unique": ({"unique": True}, lambda m: m.unique),
    "metadata": ({"metadata": {"tag": {"x": 1}}}, lambda m: m.metadata["tag"] == {"x": 1}),
    "start": ({"start": T0 + timedelta(seconds=5)}, lambda m: m.created_at >= T0 + timedelta(seconds=5)),
    "end": (
        {"end": T0 + timedelta(seconds=9, microseconds=1)},
        lambda m: m.created_at <= T0 + timedelta(seconds=9, microseconds=1),
    ),
    "text_contains": ({"text_contains": "NEEDLE"}, lambda m: "needle" in m.content["text"]),
}


@pytest.mark.parametrize("names", [[], *([name] for name in FILTERS), list(FILTERS)], ids=" and ".join)
async def test_every_filter_holds_in_every_scope(db: DatabaseAdapter, library: list[Memory], names: list[str]) -> None:
    """Whatever else is given; and what is listed is what is counted."""
    await db.create_memories([dataclasses.replace(memory, id=uuid4()) for memory in library], "facts")
    filters: dict[str, Any] = {"table_name": "messages"}
    for name in names:
        filters |= FILTERS[name][0]
    places = ("room_id", "entity_id", "world_id")
    values = [{None, *(getattr(memory, place) for memory in library)} for place in places]
    rooms = values[0] - {None}
    for ids in product(*values):
        scope = {place: id for place, id in zip(places, ids, strict=True) if id is not None}
        inside = [m for m in library if all(getattr(m, place) == id for place, id in scope.items())]
        wanted = [m for m in inside if all(FILTERS[name][1](m) for name in names)]
        assert len(wanted) < len(inside) or not names or not inside, scope
        assert ids_of(await db.get_memories(**scope, **filters)) == ids_of(wanted), scope
        assert await db.count_memories(**scope, **filters) == len(wanted), scope
        room = scope.pop("room_id", None)
        given = [*rooms, *rooms] if room is None else [room, uuid4()]
        assert await db.count_memories(room_ids=given, **scope, **filters) == len(wanted), (given, scope)
        page = [m for m in wanted if m in library[21:]]
        found = await db.get_memories(room_id=room, cursor=library[20], **scope, **filters)
        assert ids_of(found) == ids_of(page), (room, scope)


async def test_end_in_milliseconds_is_the_end_of_the_last_one(db: DatabaseAdapter, agent_world: Scene) -> None:
    """ElizaOS's JSON cuts times to milliseconds; the memory that an end comes from is in the range."""
    time = T0 + timedelta(microseconds=123_456)
    await db.create_memory(memory(agent_world, "x", created_at=time, world_id=agent_world.world), "messages")
    (found,) = await db.get_memories(table_name="messages")
    given = found.to_dict()["createdAt"]
    cut = T0 + timedelta(milliseconds=123)
    scopes: list[dict[str, Any]] = [
        {},
        {"room_id": agent_world.room},
        {"entity_id": agent_world.entity},
        {"world_id": agent_world.world},
    ]
    for scope in scopes:
        for end, number in ((given, 1), (cut, 1), (time, 1), (time - timedelta(microseconds=1), 0), (given - 1, 0)):
            assert len(await db.get_memories(table_name="messages", end=end, **scope)) == number, (scope, end)
            assert await db.count_memories(table_name="messages", end=end, **scope) == number, (scope, end)
        assert len(await db.get_memories(table_name="messages", start=given, end=given, **scope)) == 1


async def test_pages_by_offset_and_by_cursor_cover_all_once(
    db: DatabaseAdapter, agent_world: Scene, library: list[Memory]
) -> None:
    for scope in (
        {},
        {"room_id": agent_world.room},
        {"entity_id": agent_world.entity},
        {"world_id": agent_world.world},
    ):
        everything = await db.get_memories(table_name="messages", **scope)  # type: ignore[arg-type]
        for size in (1, 4, 6, 7, 100):
            by_offset: list[Memory] = []
            by_cursor: list[Memory] = []
            while page := await db.get_memories(
                table_name="messages",
                count=size,
                offset=len(by_offset),
                **scope,  # type: ignore[arg-type]
            ):
                by_offset += page
            cursor: Any = None
            while page := await db.get_memories(table_name="messages", limit=size, cursor=cursor, **scope):  # type: ignore[arg-type]
                by_cursor += page
                last = page[-1]
                time, id = last.created_at, last.id
                assert time is not None
                cursor = [last, (time, id), last.to_dict(), [time.isoformat(), str(id)]][size % 4]
            assert ids_of(by_offset) == ids_of(by_cursor) == ids_of(everything)


async def test_the_newest_come_first_and_no_more_than_asked_for(db: DatabaseAdapter, agent_world: Scene) -> None:
    place = {"room_id": agent_world.room, "entity_id": agent_world.entity, "world_id": agent_world.world}
    ids = sorted((uuid4() for _ in range(4)), reverse=True)
    times = [T0 + timedelta(seconds=n) for n in range(4)]
    for id, time in zip(ids, times, strict=True):
        await db.create_memory(memory(agent_world, id=id, world_id=agent_world.world, created_at=time), "messages")
    whole = await db.get_memories(table_name="messages")
    assert [each.id for each in whole] == ids[::-1]
    assert await db.get_memories_by_ids(ids) == whole
    for kept in (*place, None):
        scope: dict[str, Any] = {word: id for word, id in place.items() if word == kept}
        assert await db.get_memories(table_name="messages", count=2, offset=1, **scope) == whole[1:3], kept
    asked: dict[str, Any] = {"table_name": "messages", "limit": 2}
    assert await db.get_memories_by_room_ids(room_ids=[agent_world.room], **asked) == whole[:2]
    assert await db.get_memories_by_world_id(world_id=agent_world.world, **asked) == whole[:2]
    # Those that name the world, and those in a room of it.
    for kind, only in (("facts", {"world_id": agent_world.world, "room_id": None}), ("notes", {})):
        await db.create_memories([memory(agent_world, **only) for _ in range(4)], kind)
        newest = await db.get_memories(table_name=kind, count=2)
        assert await db.get_memories_by_world_id(world_id=agent_world.world, table_name=kind, limit=2) == newest


async def test_a_cursor_and_an_end_hold_together(db: DatabaseAdapter, agent_world: Scene) -> None:
    """Whichever of the two is earlier; what is of the end's own time belongs to it, whatever the id."""
    ids = [UUID(int=0), UUID(int=2**128 - 1), *(uuid4() for _ in range(10))]
    times = [T0 + timedelta(milliseconds=n % 4) for n in range(12)]
    await db.create_memories(
        [
            memory(agent_world, id=id, created_at=time, world_id=agent_world.world)
            for id, time in zip(ids, times, strict=True)
        ],
        "messages",
    )
    rows = sorted(zip(times, ids, strict=True), reverse=True)
    scopes = ({}, *({f"{kind}_id": getattr(agent_world, kind)} for kind in ("room", "entity", "world")))
    for time, id in [*rows, (T0 + timedelta(seconds=1), uuid4()), (T0 - timedelta(seconds=1), uuid4())]:
        for n in range(-1, 5):
            end = T0 + timedelta(milliseconds=n)
            wanted = [row[1] for row in rows if row < (time, id) and row[0] <= end]
            for scope in scopes:
                found = await db.get_memories(table_name="messages", cursor=(time, id), end=end, **scope)
                assert ids_of(found) == wanted, (scope, time, id, end)


@pytest.mark.parametrize("as_cursor", [Memory.to_dict, lambda last: Memory.from_dict(last.to_dict())])
async def test_pages_go_on_behind_a_memory_that_is_gone(
    db: DatabaseAdapter, as_cursor: Callable[[Memory], Any]
) -> None:
    """JSON cuts times to milliseconds, and a batch is made in one."""
    ids = await db.create_memories([Memory(content={}) for _ in range(50)], "messages")
    seen: list[UUID | None] = []
    cursor: Any = None
    while page := await db.get_memories(table_name="messages", count=10, cursor=cursor):
        seen += ids_of(page)
        cursor = as_cursor(page[-1])
        await db.delete_memories([memory.id for memory in page])  # type: ignore[misc]
    assert seen == ids[::-1]


async def test_get_by_ids_rooms_and_worlds(db: DatabaseAdapter, agent_world: Scene, library: list[Memory]) -> None:
    some = [library[20].id, library[3].id, uuid4(), library[40].id]
    assert ids_of(await db.get_memories_by_ids(some)) == [library[3].id, library[20].id, library[40].id]  # type: ignore[arg-type]
    assert await db.get_memories_by_ids(some, "facts") == []  # type: ignore[arg-type]
    assert await db.get_memories_by_ids([]) == []
    assert await db.get_memory_by_id(uuid4()) is None
    rooms = list({m.room_id for m in library})
    by_rooms = await db.get_memories_by_room_ids(room_ids=[*rooms, *rooms], table_name="messages")  # type: ignore[list-item]
    assert ids_of(by_rooms) == ids_of(library)
    assert ids_of(await db.get_memories_by_room_ids(room_ids=rooms, table_name="messages", count=9)) == ids_of(
        library[:9]
    )  # type: ignore[arg-type]
    assert await db.get_memories_by_room_ids(room_ids=[], table_name="messages") == []
    # Both rooms are of the world; and one memory that names the world stands in no room.
    lone = await db.create_memory(Memory(content={}, world_id=agent_world.world, created_at=T0), "messages")
    by_world = await db.get_memories_by_world_id(world_id=agent_world.world)
    assert set(ids_of(by_world)) == {*ids_of(library), lone}
    assert ids_of(await db.get_memories_by_world_id(world_id=agent_world.world, count=5)) == ids_of(library[:5])


async def test_get_by_several_worlds(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    other = await db.create_world({"name": "other"})
    far = await db.create_room(Room(source="t", type="DM", world_id=other))
    ids = [
        await db.create_memory(Memory(content={}, created_at=T0 + timedelta(n), **scope), "messages")
        for n, scope in enumerate(
            [
                {"room_id": agent_world.room},
                {"room_id": far, "world_id": agent_world.world},  # of both worlds
                {"world_id": other},
                {"room_id": far, "world_id": other},  # in two ways of one world
            ]
        )
    ]
    worlds = [other, str(agent_world.world), other, uuid4()]
    round_trips.clear()
    assert ids_of(await db.get_memories_by_world_id(world_ids=worlds)) == ids[::-1]
    assert len(round_trips) == 1
    assert ids_of(await db.get_memories_by_world_id(world_ids=worlds, limit=2)) == ids[:1:-1]
    assert ids_of(await db.get_memories_by_world_id(world_id=other)) == ids[:0:-1]
    round_trips.clear()
    assert await db.get_memories_by_world_id(world_ids=[]) == []
    for wrong in ({}, {"world_id": other, "world_ids": [other]}, {"world_ids": str(other)}, {"world_ids": ["x"]}):
        with pytest.raises(ArgumentError, match="world_id"):
            await db.get_memories_by_world_id(**wrong)  # type: ignore[arg-type]
    assert round_trips == []


# --- change ----------------------------------------------------------------------------------------------------------


async def test_update_changes_what_is_given(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    room = await db.create_room(Room(source="t", type="DM"))
    id = await db.create_memory(memory(agent_world, "a", metadata={"k": 1}, embedding=vector(1)), "messages")
    before = await db.get_memory_by_id(id)
    assert before is not None
    assert await db.update_memory({"id": id, "content": {"text": "b"}}) is True
    assert await db.update_memory(Memory(id=id, metadata={"z": 2}, unique=False)) is True
    assert await db.update_memory({"id": str(id), "roomId": room, "worldId": agent_world.world}) is True
    after = await db.get_memory_by_id(id, include_embedding=True)
    assert after is not None
    assert (after.content, after.metadata, after.unique) == ({"text": "b"}, {"z": 2}, False)
    assert (after.room_id, after.world_id, after.entity_id) == (room, agent_world.world, agent_world.entity)
    assert (after.type, after.created_at) == (before.type, before.created_at)
    np.testing.assert_array_equal(after.embedding, vector(1))  # type: ignore[arg-type]
    # The scope beside the vector moved with it.
    scope = await raw.fetchrow(
        'SELECT room_id, world_id, entity_id, "unique", type FROM elizasql.embeddings WHERE memory_id = $1', id
    )
    assert tuple(scope) == (room, agent_world.world, agent_world.entity, False, "messages")
    assert await db.search_memories(embedding=vector(1), table_name="messages", room_id=agent_world.room) == []
    assert len(await db.search_memories(embedding=vector(1), table_name="messages", room_id=room)) == 1


async def test_each_part_of_the_scope_reaches_the_vector_alone(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    room = await db.create_room(Room(source="t", type="DM"))
    id = await db.create_memory(memory(agent_world, embedding=vector(1), unique=True), "messages")
    for column, value in (
        ("entity_id", agent_world.other),
        ("room_id", room),
        ("world_id", agent_world.world),
        ("unique", False),
        ("type", "facts"),
    ):
        if column == "type":  # no method changes that
            await raw.execute("UPDATE elizasql.memories SET type = $2 WHERE id = $1", id, value)
        else:
            assert await db.update_memory({"id": id, column: value}) is True
        stored = await db.get_memory_by_id(id)
        assert getattr(stored, column) == value
        beside = f'SELECT "{column}" FROM elizasql.embeddings WHERE memory_id = $1'
        assert await raw.fetchval(beside, id) == value, column


async def test_update_replaces_and_adds_vectors(db: DatabaseAdapter, agent_world: Scene) -> None:
    with_vector = await db.create_memory(memory(agent_world, "a", embedding=vector(1)), "messages")
    without = await db.create_memory(memory(agent_world, "b"), "messages")
    await db.index_memories()
    await db.update_memories([{"id": with_vector, "embedding": vector(2)}, {"id": without, "embedding": vector(3)}])
    for seed, id in ((2, with_vector), (3, without)):
        assert (await db.search_memories(embedding=vector(seed), table_name="messages", count=1))[0].id == id
    assert (await db.search_memories(embedding=vector(1), table_name="messages", count=1))[0].similarity < 0.9  # type: ignore[operator]


async def test_changes_of_one_memory_in_several_places_are_put_together(
    db: DatabaseAdapter, agent_world: Scene
) -> None:
    id = await db.create_memory(memory(agent_world, "a"), "messages")
    await db.update_memories(
        [
            {"id": id, "content": {"text": "first"}, "unique": False},
            {"id": id, "metadata": {"b": 1}, "content": None},
            {"id": id, "metadata": {"c": 2}},
        ]
    )
    stored = await db.get_memory_by_id(id)
    assert stored is not None
    assert (stored.content, stored.metadata, stored.unique) == ({"text": "first"}, {"c": 2}, False)


async def test_updates_of_unknown_memories(db: DatabaseAdapter, agent_world: Scene) -> None:
    id = await db.create_memory(memory(agent_world, "a"), "messages")
    unknown = uuid4()
    assert await db.update_memory({"id": unknown, "content": {}}) is False
    assert await db.update_memory({"id": unknown, "embedding": vector(1)}) is False
    with pytest.raises(NotFoundError, match=str(unknown)):
        await db.update_memories([{"id": id, "content": {"text": "changed"}}, {"id": unknown, "content": {}}])
    stored = await db.get_memory_by_id(id)
    assert stored is not None and stored.content == {"text": "a"}
    with pytest.raises(ArgumentError, match="id is missing"):
        await db.update_memory({"content": {}})
    await db.update_memories([])


async def test_concurrent_vector_updates_leave_one_row(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    id = await db.create_memory(memory(agent_world), "messages")
    await asyncio.gather(*(db.update_memory({"id": id, "embedding": vector(i)}) for i in range(12)))
    assert await rows_of(raw, db, "embeddings") == 1
    assert len(await db.get_memories(table_name="messages", include_embedding=True)) == 1


async def test_upsert_replaces_what_is_given_and_keeps_the_rest(db: DatabaseAdapter, agent_world: Scene) -> None:
    room = await db.create_room(Room(source="t", type="DM"))
    id, new = uuid4(), uuid4()
    await db.create_memory(
        memory(agent_world, "a", id=id, metadata={"k": 1}, embedding=vector(1), unique=False, created_at=T0), "messages"
    )
    assert await db.upsert_memories(
        [
            Memory(id=id, content={"text": "lost"}, embedding=vector(3)),
            Memory(
                id=id,
                content={"text": "b"},
                room_id=room,
                entity_id=agent_world.other,
                created_at=T0 + timedelta(days=1),
            ),
            Memory(id=new, content={"text": "new"}, room_id=room, embedding=vector(2)),
        ],
        "facts",
    ) == [id, id, new]
    old = await db.get_memory_by_id(id, include_embedding=True)
    assert old is not None
    assert (old.content, old.metadata, old.unique, old.type) == ({"text": "b"}, {"k": 1}, False, "messages")
    assert (old.room_id, old.entity_id, old.created_at) == (agent_world.room, agent_world.entity, T0)
    np.testing.assert_array_equal(old.embedding, vector(1))  # type: ignore[arg-type]
    created = await db.get_memory_by_id(new)
    assert created is not None and (created.type, created.unique, created.room_id) == ("facts", True, room)
    await db.upsert_memories([Memory(id=id, content={}, metadata={}, unique=True, embedding=vector(5))], "messages")
    found = await db.search_memories(embedding=vector(5), table_name="messages", unique=True, count=1)
    assert found[0].id == id and found[0].similarity == pytest.approx(1, abs=1e-5)
    assert found[0].metadata == {}


async def test_a_deleted_world_is_cleared_from_memory_and_vector(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    id = await db.create_memory(memory(agent_world, world_id=agent_world.world, embedding=vector(1)), "messages")
    assert await db.remove_world(agent_world.world) is True
    stored = await db.get_memory_by_id(id)
    assert stored is not None and stored.world_id is None
    assert await raw.fetchval("SELECT world_id FROM elizasql.embeddings WHERE memory_id = $1", id) is None
    room = await db.get_room(agent_world.room)
    assert room is not None and room.world_id is None


# --- delete ----------------------------------------------------------------------------------------------------------


async def test_delete_takes_fragments_and_vectors_along(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    document, other = uuid4(), uuid4()
    await db.create_memory(
        memory(agent_world, id=document, metadata={"type": "document", "timestamp": 1}, embedding=vector(1)),
        "documents",
    )
    fragments = [
        memory(
            agent_world,
            metadata={"type": "fragment", "documentId": str(owner).upper() if i % 2 else str(owner), "position": i},
            embedding=vector(i),
            unique=True,
        )
        for owner in (document, other)
        for i in range(10, 15)
    ]
    await db.create_memories(fragments, "fragments")
    assert await db.delete_memory(document) is True
    assert await db.count_memories(table_name="fragments") == 5
    assert await rows_of(raw, db, "embeddings") == 5
    assert await db.delete_memory(document) is False
    assert await db.delete_memories([]) == 0
    assert await db.delete_memories([other, uuid4()]) == 5
    assert await rows_of(raw, db, "memories") == await rows_of(raw, db, "embeddings") == 0


async def test_delete_all_of_rooms(db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]) -> None:
    room = await db.create_room(Room(source="t", type="DM"))
    document = uuid4()
    await db.create_memories([memory(agent_world, str(i)) for i in range(20)], "messages")
    await db.create_memories([memory(agent_world, str(i), room_id=room) for i in range(3)], "messages")
    await db.create_memory(memory(agent_world, "kept"), "facts")
    await db.create_memory(memory(agent_world, id=document, metadata={"type": "document", "timestamp": 1}), "documents")
    fragment = {"type": "fragment", "documentId": str(document).upper(), "position": 0}
    await db.create_memory(memory(agent_world, room_id=room, metadata=fragment), "fragments")
    assert await db.delete_all_memories(agent_world.room, "messages") == 20
    assert await db.delete_all_memories(agent_world.room, "documents") == 2
    assert await db.delete_all_memories([agent_world.room, room], "messages") == 3
    assert await db.delete_all_memories([], "messages") == 0
    assert await rows_of(raw, db, "memories") == 1


async def test_what_is_moved_before_a_deletion_has_its_row_stays(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    room = await db.create_room(Room(source="t", type="DM"))
    document, part = uuid4(), uuid4()
    about = {"type": "document", "timestamp": 1}
    whole = memory(agent_world, id=document, metadata=about, embedding=vector(1), unique=True)
    await db.create_memories([whole, memory(agent_world)], "documents")
    fragment = {"type": "fragment", "documentId": str(document), "position": 0}
    await db.create_memory(memory(agent_world, id=part, metadata=fragment), "fragments")
    change = "UPDATE elizasql.memories SET {} WHERE agent_id = $1 AND id = $2"
    move = (change.format("room_id = $3"), db.agent_id, document, room)
    assert await overtaken(raw, db.delete_all_memories(agent_world.room, "documents"), move, ("SELECT 1",)) == 1
    assert {found.id: found.room_id for found in await db.get_memories_by_ids([document, part])} == {
        document: room,
        part: agent_world.room,
    }
    assert await rows_of(raw, db, "embeddings") == 1
    give = (change.format("metadata = metadata || jsonb_build_object('documentId', 'x')"), db.agent_id, part)
    assert await overtaken(raw, db.delete_memory(document), give, ("SELECT 1",)) is True
    assert await rows_of(raw, db, "memories") == 1


# --- prune -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_room", [False, True])
async def test_prune_by_time_and_number(make_db: MakeAdapter, round_trips: list[str], *, of_room: bool) -> None:
    db = await make_db(batch_size=3)
    other = await make_db()
    scene = await make_scene(db)
    elsewhere = await db.create_room(Room(source="t", type="DM"))
    where = {"room_id": scene.room} if of_room else {}
    made: list[UUID] = []

    def at(seconds: float) -> datetime:
        return T0 + timedelta(seconds=seconds)

    async def fill() -> None:
        await db.prune_memories("messages", keep=0, **where)
        # Pairs of equal times: the order is by id then.
        rows = [memory(scene, id=UUID(int=i), created_at=at(i // 2)) for i in range(1, 11)]
        made[:] = await db.create_memories(rows, "messages")

    async def left() -> list[UUID | None]:
        return [found.id for found in await db.get_memories(table_name="messages", **where)]

    # Nobody asks for these: of another agent, another type, and another room.
    beside = [
        (other, await other.create_memory(Memory(content={}, created_at=T0), "messages")),
        (db, await db.create_memory(memory(scene, created_at=T0), "facts")),
    ]
    if of_room:
        far = [memory(scene, room_id=elsewhere, created_at=T0 + timedelta(days=i)) for i in (-1, 0, 1)]
        beside += [(db, id) for id in await db.create_memories(far, "messages")]
    await fill()
    assert await db.prune_memories("messages", older_than=at(2), **where) == 3
    assert await left() == made[:2:-1]
    assert await db.prune_memories("messages", at(2), **where) == 0
    await fill()
    assert await db.prune_memories("messages", keep=4, **where) == 6
    assert await left() == made[:5:-1]
    await fill()
    # Both: only what is beyond both goes.
    assert await db.prune_memories("messages", older_than=at(2), keep=9, **where) == 1
    assert await db.prune_memories("messages", older_than=at(2), keep=1, **where) == 2
    assert await db.prune_memories("messages", older_than=T0, keep=1, **where) == 0
    assert await left() == made[:2:-1]
    for age in (timedelta(days=365_000), timedelta.max):
        assert await db.prune_memories("messages", older_than=age, **where) == 0
    late = at(100).timestamp() * 1000
    assert await db.prune_memories("messages", older_than=late, keep=7, **where) == 0
    for keep in (7, 8, 2**63 - 1):
        assert await db.prune_memories("messages", keep=keep, **where) == 0
    assert await db.prune_memories("messages", keep=0, room_id=uuid4()) == 0
    assert await db.prune_memories("nothing", keep=0, **where) == 0
    await fill()
    del round_trips[:]
    assert await db.prune_memories("messages", older_than=timedelta(0), **where) == 10
    # Three full batches, and what is left.
    assert len(round_trips) == 4
    await fill()
    del round_trips[:]
    assert await db.prune_memories("messages", keep=9, **where) == 1
    assert len(round_trips) == 2
    await fill()
    assert await db.prune_memories("messages", keep=0, **where) == 10
    assert await left() == []
    for adapter, id in beside:
        assert await adapter.get_memory_by_id(id) is not None


async def test_prune_keeps_what_stands_at_the_end_of_the_calendar(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=2)
    scene = await make_scene(db)
    last = datetime.max.replace(tzinfo=timezone.utc)
    rows = [memory(scene, id=UUID(int=i), created_at=last) for i in range(1, 8)]
    made = await db.create_memories(rows, "messages")
    for where, keep in (({}, 5), ({"room_id": scene.room}, 2)):
        assert await db.prune_memories("messages", keep=keep, **where) == len(made) - keep
        made = made[len(made) - keep :]
        assert [found.id for found in await db.get_memories(table_name="messages")] == made[::-1]
    assert await db.prune_memories("messages", keep=0) == 2


async def test_prune_never_defaults_to_everything(db: DatabaseAdapter, round_trips: list[str]) -> None:
    with pytest.raises(ArgumentError, match="older_than, keep or both"):
        await db.prune_memories("messages")
    bad: dict[str, Any]
    for bad in (
        {"keep": -1},
        {"keep": 1.5},
        {"keep": True},
        {"older_than": "soon"},
        {"older_than": timedelta(seconds=-1)},
        {"older_than": 30 * 86400},  # an age in seconds, and one in milliseconds
        {"older_than": 365 * 86_400_000.0},
        {"older_than": datetime(2026, 1, 1)},  # noqa: DTZ001
        {"keep": 1, "room_id": "no"},
        {"keep": 1, "table_name": ""},
    ):
        with pytest.raises(ArgumentError):
            await db.prune_memories(**{"table_name": "messages", **bad})
    assert round_trips == []


async def test_prune_takes_fragments_and_vectors_along(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    """Wherever the fragments are and however young, also of the very type; those of documents that stay, stay."""
    db = await make_db(batch_size=2)
    scene = await make_scene(db)
    room = await db.create_room(Room(source="t", type="DM"))
    about = {"type": "document", "timestamp": 1}
    documents = [
        memory(scene, id=uuid4(), metadata=about, created_at=T0 + timedelta(days=i), embedding=vector(i), unique=True)
        for i in range(4)
    ]

    def fragment(document: Memory, position: int) -> Memory:
        name = str(document.id).upper() if position % 2 else str(document.id)
        told = {"type": "fragment", "documentId": name, "position": position}
        return memory(scene, room_id=room, metadata=told, embedding=vector(9 + position), unique=True)

    await db.create_memories(documents, "documents")
    await db.create_memories([fragment(document, i) for document in documents for i in range(2)], "fragments")
    await db.create_memory(fragment(documents[0], 2), "documents")
    # Three documents and their fragments; one of these is the newest of its type.
    assert await db.prune_memories("documents", keep=1, older_than=T0 + timedelta(days=2, hours=1)) == 3 * 3 + 1
    assert await rows_of(raw, db, "memories") == await rows_of(raw, db, "embeddings") == 3
    assert await db.prune_memories("documents", keep=0, room_id=room) == 0
    # A fragment goes alone.
    assert await db.prune_memories("fragments", keep=1) == 1
    assert await db.prune_memories("documents", keep=0, room_id=scene.room) == 2
    assert await rows_of(raw, db, "memories") == await rows_of(raw, db, "embeddings") == 0


@pytest.mark.parametrize("guarded", [False, True])
async def test_batches_of_a_prune_end_where_the_fragments_come_to_one(
    make_db: MakeAdapter, own_database: str, monkeypatch: pytest.MonkeyPatch, *, guarded: bool
) -> None:
    """Whoever waits for one of a thousand books should not wait for all their pages."""
    db = await make_db(dsn=own_database, batch_size=10)
    if guarded:
        session = await asyncpg.connect(own_database)
        await session.execute(
            "ALTER TABLE elizasql.memories ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;"
            "CREATE POLICY guard ON elizasql.memories USING (true)"
        )
        await session.close()
    pages = [4, 4, 0, 0, 4, 30, 0, 4, 4]
    about = {"type": "document", "timestamp": 1}
    books = [
        Memory(id=uuid4(), content={}, metadata=about, created_at=T0 + timedelta(days=i)) for i in range(len(pages))
    ]
    await db.create_memories(books, "documents")
    parts = [
        {"type": "fragment", "documentId": str(book.id), "position": position}
        for book, number in zip(books, pages, strict=True)
        for position in range(number)
    ]
    await db.create_memories([Memory(content={}, metadata=each) for each in parts], "fragments")
    went = []
    fetch = db._background.fetch

    async def told(statement: Statement, **params: Any) -> list[asyncpg.Record]:
        rows = await fetch(statement, **params)
        went.append(rows[0]["deleted"])
        return rows

    monkeypatch.setattr(db._background, "fetch", told)
    assert await db.prune_memories("documents", keep=0) == sum(pages) + len(pages)
    assert went == [4 + 8, 1 + 4, 1 + 30, 3 + 8]


@pytest.mark.parametrize(
    "change",
    ["room_id = NULL", "type = 'others'", "created_at = created_at + interval '1 day'"],
)
async def test_what_no_longer_fits_when_a_prune_has_its_row_stays(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any], change: str
) -> None:
    document = memory(agent_world, id=uuid4(), metadata={"type": "document", "timestamp": 1}, created_at=T0)
    await db.create_memories([document, memory(agent_world, created_at=T0)], "documents")
    told = {"type": "fragment", "documentId": str(document.id), "position": 0}
    part = await db.create_memory(memory(agent_world, metadata=told), "fragments")
    first = (f"UPDATE elizasql.memories SET {change} WHERE agent_id = $1 AND id = $2", db.agent_id, document.id)
    prune = db.prune_memories("documents", T0 + timedelta(hours=1), room_id=agent_world.room)
    assert await overtaken(raw, prune, first, ("SELECT 1",)) == 1
    assert {found.id for found in await db.get_memories_by_ids([document.id, part])} == {document.id, part}


async def test_a_prune_goes_on_behind_what_another_has_deleted(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """Fewer may go in a batch than there are in it."""
    db = await make_db(batch_size=3)
    rows = [Memory(content={}, created_at=T0 + timedelta(seconds=i)) for i in range(10)]
    made = await db.create_memories(rows, "messages")
    theirs = ("DELETE FROM elizasql.memories WHERE agent_id = $1 AND id = ANY($2)", db.agent_id, made[:3])
    assert await overtaken(raw, db.prune_memories("messages", timedelta(0)), theirs, ("SELECT 1",)) == 7
    assert await rows_of(raw, db, "memories") == 0


async def test_concurrent_prunes_count_each_memory_once(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=7)
    other = await make_db(db.agent_id, batch_size=5)
    await db.create_memories([Memory(content={}) for _ in range(200)], "messages")
    deleted = await asyncio.gather(*(each.prune_memories("messages", keep=20) for each in (db, other, db, other)))
    assert sum(deleted) == 180
    assert await db.count_memories(table_name="messages") == 20
    assert db._meter.retries == other._meter.retries == 0


@pytest.mark.parametrize("of_room", [False, True])
async def test_prune_does_not_go_through_what_it_has_deleted_batch_by_batch(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], *, of_room: bool
) -> None:
    """It stays in the index while somebody may see it, as here until the transaction ends."""
    db = await make_db(batch_size=10)
    scene = await make_scene(db)
    await db.create_memories([memory(scene) for _ in range(300)], "messages")
    partition = await raw.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)
    kind = "agent_id_room_id_type_created_at_id" if of_room else "agent_id_type_greatest_id"
    name = f"elizasql.memories{partition[-4:]}_{kind}_idx"
    count = Statement("count", f"SELECT pg_stat_get_xact_tuples_returned('{name}'::regclass)", (), "", "")
    async with db.transaction() as tx:
        where = {"room_id": scene.room} if of_room else {}
        assert await tx.prune_memories("messages", keep=0, **where) == 300
        read = await tx._executor.fetch_value(count)
    # Each once as chosen by its batch, and in some plans again as locked and as deleted, which an index with the id in
    # it serves as well as the primary key does; thirty batches from the start would be 4,650 for the choosing alone.
    assert 300 <= read <= 1000


# --- one agent and another -------------------------------------------------------------------------------------------


async def test_no_method_reaches_another_agents_memories(make_db: MakeAdapter) -> None:
    mine, theirs = await make_db(), await make_db()
    scene = await make_scene(theirs)
    # The same ids exist for both agents: rooms, entities, worlds and memories do not collide.
    await mine.create_world(World(id=scene.world))
    await mine.create_room(Room(id=scene.room, source="t", type="GROUP"))
    await mine.create_entities([Entity(id=scene.entity), Entity(id=scene.other)])
    id = await theirs.create_memory(memory(scene, "secret", world_id=scene.world, embedding=vector(1)), "messages")
    assert await mine.get_memory_by_id(id) is None
    assert await mine.get_memories_by_ids([id]) == []
    assert await mine.get_memories(table_name="messages") == []
    assert await mine.get_memories(table_name="messages", room_id=scene.room) == []
    assert await mine.get_memories_by_room_ids(room_ids=[scene.room], table_name="messages") == []
    assert await mine.get_memories_by_world_id(world_id=scene.world) == []
    assert await mine.count_memories() == 0
    for scope in ({}, {"room_id": scene.room}, {"entity_id": scene.entity}, {"world_id": scene.world}):
        assert await mine.search_memories(embedding=vector(1), table_name="messages", **scope) == []
    assert await mine.get_cached_embeddings(query_table_name="messages", query_threshold=9, query_input="secret") == []
    assert await mine.update_memory({"id": id, "content": {"text": "mine"}}) is False
    assert await mine.delete_memory(id) is False
    assert await mine.delete_all_memories(scene.room, "messages") == 0
    assert await mine.prune_memories("messages", keep=0) == 0
    assert await mine.prune_memories("messages", keep=0, room_id=scene.room) == 0
    assert await mine.create_memory(Memory(id=id, content={"text": "own"}, embedding=vector(1)), "messages") == id
    own, secret = await mine.get_memory_by_id(id), await theirs.get_memory_by_id(id)
    assert own is not None and own.content == {"text": "own"} and own.unique is True
    assert secret is not None and secret.content == {"text": "secret"}
    await mine.upsert_memories([Memory(id=id, content={"text": "own 2"})], "messages")
    assert await mine.delete_memory(id) is True
    secret = await theirs.get_memory_by_id(id)
    assert secret is not None and secret.content == {"text": "secret"}
    with pytest.raises(ArgumentError, match="agent_id"):
        await mine.create_memory(Memory(agent_id=theirs.agent_id, content={}), "messages")
    with pytest.raises(ArgumentError, match="agent_id"):
        await mine.get_memories(table_name="messages", agent_id=theirs.agent_id)


# --- cached embeddings -----------------------------------------------------------------------------------------------


async def test_cached_embeddings_by_edit_distance(db: DatabaseAdapter, agent_world: Scene) -> None:
    texts = ["kitten", "sitting", "mitten", "kitte", "x" * 600, "", "sitten " * 100]
    await db.create_memories(
        [memory(agent_world, text, embedding=vector(i), unique=True) for i, text in enumerate(texts)], "messages"
    )
    await db.create_memory(memory(agent_world, "kitten"), "messages")

    async def ask(text: str, threshold: int, count: int = 10, **more: Any) -> list[tuple[int, int]]:
        found = await db.get_cached_embeddings(
            query_table_name="messages", query_threshold=threshold, query_input=text, query_match_count=count, **more
        )
        known = {vector(i).tobytes(): i for i in range(len(texts))}
        return [(known[hit["embedding"].tobytes()], hit["levenshtein_score"]) for hit in found]

    assert await ask("kitten", 0) == [(0, 0)]
    assert sorted(await ask("kitten", 1)) == [(0, 0), (2, 1), (3, 1)]
    assert await ask("kitten", 3, 1) == [(0, 0)]
    assert (1, 3) in await ask("kitten", 3)
    assert await ask("x" * 598 + "yy", 2) == [(4, 2)]
    assert await ask("z" * 5000, 5) == []
    assert await ask("", 0) == [(5, 0)]
    assert await ask("kitten", 0, 0) == []
    assert await ask("", 0, query_field_name="metadata") == []


async def test_others_have_their_turn_while_long_texts_are_compared(
    db: DatabaseAdapter, agent_world: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [letter * 20_000 for letter in "abc"]
    await db.create_memories(
        [memory(agent_world, text, embedding=vector(i), unique=True) for i, text in enumerate(texts)], "messages"
    )
    turns, seen = 0, []

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def distance(*texts: str, score_cutoff: int) -> int:
        seen.append(turns)
        return Levenshtein.distance(*texts, score_cutoff=score_cutoff)

    monkeypatch.setattr("elizasql.memories.Levenshtein", SimpleNamespace(distance=distance))
    others = asyncio.ensure_future(take_turns())
    found = await db.get_cached_embeddings(query_table_name="messages", query_threshold=2**63 - 1, query_input=texts[0])
    others.cancel()
    assert [hit["levenshtein_score"] for hit in found] == [0, 20_000, 20_000]
    assert len(set(seen)) == 3


async def test_cached_embeddings_of_other_fields(db: DatabaseAdapter) -> None:
    await db.create_memory(Memory(content={"name": "Ann"}, metadata={"alias": "Anna"}, embedding=vector(1)), "people")
    for field, key in (("content", "name"), ("metadata", "alias")):
        found = await db.get_cached_embeddings(
            query_table_name="people",
            query_threshold=1,
            query_input="Anne",
            query_field_name=field,
            query_field_sub_name=key,
        )
        assert [hit["levenshtein_score"] for hit in found] == [1]
    with pytest.raises(ArgumentError):
        await db.get_cached_embeddings(
            query_table_name="people", query_threshold=1, query_input="x", query_field_name="embedding"
        )


async def test_cached_embeddings_beyond_one_round_trip(
    db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]
) -> None:
    await db.create_memories(
        [memory(agent_world, f"text {i:03}", embedding=vector(i), unique=True) for i in range(300)], "messages"
    )
    round_trips.clear()
    found = await db.get_cached_embeddings(query_table_name="messages", query_threshold=0, query_input="text 123")
    np.testing.assert_array_equal(found[0]["embedding"], vector(123))
    assert len(round_trips) == 2


@pytest.mark.parametrize(("field", "key"), [("content", "text"), ("content", "title"), ("metadata", "title")])
async def test_a_cached_embedding_is_of_the_type_and_the_memory(db: DatabaseAdapter, field: str, key: str) -> None:
    texts = [("a", "facts"), ("a", "messages"), ("something else", "messages")]
    for seed, (text, kind) in enumerate(texts):
        await db.create_memory(
            Memory(**{"content": {}, field: {key: text}}, embedding=vector(seed), unique=True), table_name=kind
        )
    found = await db.get_cached_embeddings(
        query_table_name="messages",
        query_threshold=1,
        query_input="b",
        query_field_name=field,
        query_field_sub_name=key,
    )
    assert [each["embedding"].tolist() for each in found] == [vector(1).tolist()]


@pytest.mark.parametrize("field", ["content", "metadata"])
async def test_a_cached_embedding_is_that_of_the_text_which_was_compared(
    db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """Between the two round trips, too, and also where another one still has that text."""
    ids = await db.create_memories(
        [
            Memory(**{"content": {}, field: {"text": f"text {i:03}"}}, embedding=vector(i), unique=True)
            for i in [*range(300), 123]
        ],
        "messages",
    )
    fetch = db._executor.fetch

    async def after_a_change(statement: Statement, **params: Any) -> Any:
        if statement.name == "get_cached_vectors":
            await db.update_memory({"id": ids[123], field: {"text": "other"}, "embedding": vector(999)})
        return await fetch(statement, **params)

    monkeypatch.setattr(db._executor, "fetch", after_a_change)
    found = await db.get_cached_embeddings(
        query_table_name="messages", query_threshold=1, query_input="text 123", query_field_name=field
    )
    assert [hit["levenshtein_score"] for hit in found] == [0, *[1] * 8]
    assert not any(np.array_equal(hit["embedding"], vector(999)) for hit in found)
