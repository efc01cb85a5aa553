"""load_memories: what it stores, what it keeps when it fails, and what becomes of the index."""

from __future__ import annotations

import asyncio
import sys
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import elizasql
from elizasql import (
    ArgumentError,
    DatabaseAdapter,
    DeadlineError,
    EmbeddingDimensionError,
    ForeignKeyError,
    LoadSummary,
    Memory,
    UniqueViolationError,
    World,
    _loader,
    sync,
)
from elizasql import memories as _memories
from elizasql._indexer import Indexer
from elizasql._statements import SQL

from .conftest import MakeAdapter, Scene, make_scene
from .locking import blocked_pid

V = np.random.default_rng(0).normal(size=(600, 384)).astype(np.float32)
T0 = datetime(2026, 1, 1, tzinfo=timezone.utc)


def some(count: int, **fields: Any) -> list[Memory]:
    return [Memory(id=uuid4(), content={"n": n}, embedding=V[n % len(V)], **fields) for n in range(count)]


async def stored(raw: asyncpg.Connection[Any], agent: UUID) -> tuple[int, int, int]:
    """Give the agent's memories, embeddings, and those of them in the tail."""
    row = await raw.fetchrow(
        """SELECT (SELECT count(*) FROM elizasql.memories WHERE agent_id = $1),
                  (SELECT count(*) FROM elizasql.embeddings WHERE agent_id = $1),
                  (SELECT count(*) FROM elizasql.embeddings WHERE agent_id = $1 AND NOT indexed)""",
        agent,
    )
    return tuple(row)


async def index_of(raw: asyncpg.Connection[Any], agent: UUID) -> int | None:
    """Give the oid of the HNSW index that holds the agent's vectors, None when there is none."""
    name = "SELECT to_regclass('elizasql.' || elizasql.partition_of($1) || '_dim_384_hnsw')::oid"
    oid: int | None = await raw.fetchval(name, agent)
    return oid


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a load of ten vectors count as large, whatever other tests have left in the partition."""
    real = Indexer.drop
    monkeypatch.setattr(_loader, "_LARGE", 10)
    monkeypatch.setattr(Indexer, "drop", lambda self, coming=None: real(self, coming and coming * 10**6))


# --- what is stored --------------------------------------------------------------------------------------------------

FIELDS = st.fixed_dictionaries(
    {
        "number": st.integers(0, 40),
        "text": st.text(max_size=8),
        "vector": st.none() | st.integers(0, len(V) - 1),
        "unique": st.booleans(),
        "room": st.booleans(),
        "entity": st.booleans(),
        "world": st.booleans(),
        "time": st.none() | st.integers(0, 10**6),
        "metadata": st.none() | st.dictionaries(st.text(max_size=3), st.integers(-9, 9), max_size=2),
        "form": st.sampled_from(["model", "mapping", "wrapped"]),
    }
)


def build(fields: dict[str, Any], names: dict[int, UUID], scene: Scene) -> Any:
    memory = Memory(
        id=names[fields["number"]],
        content={"text": fields["text"]},
        metadata=fields["metadata"],
        unique=fields["unique"],
        room_id=scene.room if fields["room"] else None,
        entity_id=scene.entity if fields["entity"] else None,
        world_id=scene.world if fields["world"] else None,
        created_at=None if fields["time"] is None else T0 + timedelta(seconds=fields["time"]),
        embedding=None if fields["vector"] is None else V[fields["vector"]],
    )
    if fields["form"] == "model":
        return memory
    mapping = memory.to_dict()
    return mapping if fields["form"] == "mapping" else {"memory": mapping, "unique": fields["unique"]}


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(FIELDS, max_size=40), size=st.integers(1, 17), lazy=st.booleans())
async def test_it_stores_what_create_memories_does(
    make_db: MakeAdapter, rows: list[dict[str, Any]], size: int, lazy: bool
) -> None:
    one, other = await make_db(batch_size=7), await make_db()
    here, there = await make_scene(one), await make_scene(other)
    names = {number: uuid4() for number in range(41)}
    values = [build(fields, names, here) for fields in rows]
    loaded = await one.load_memories(
        iter(values) if lazy else values, "messages", batch_size=size, on_conflict="skip", build_index=False
    )
    ids = await other.create_memories([build(fields, names, there) for fields in rows], "messages")
    assert (loaded.loaded, loaded.skipped) == (len(set(ids)), len(ids) - len(set(ids)))
    first = {names[fields["number"]]: fields for fields in reversed(rows)}
    found: list[list[Any]] = []
    for db, scene in ((one, here), (other, there)):
        memories = await db.get_memories_by_ids(ids, include_embedding=True)
        scopes = {scene.room: "room", scene.entity: "entity", scene.world: "world", None: None}
        found.append(
            sorted(
                (
                    str(m.id),
                    m.type,
                    m.content,
                    m.metadata,
                    m.unique,
                    scopes[m.room_id],
                    scopes[m.entity_id],
                    scopes[m.world_id],
                    None if first[m.id]["time"] is None else m.created_at,  # type: ignore[index]
                    None if m.embedding is None else m.embedding.tolist(),
                )
                for m in memories
            )
        )
    assert found[0] == found[1]


async def test_it_takes_whatever_can_be_iterated(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    async def produce() -> AsyncIterator[Memory]:
        for memory in some(7):
            yield memory

    assert (await db.load_memories(some(7), "messages")).loaded == 7
    assert (await db.load_memories(tuple(some(7)), "messages")).loaded == 7
    assert (await db.load_memories((m for m in some(7)), "messages", batch_size=3)).loaded == 7
    assert (await db.load_memories(produce(), "messages", batch_size=3)).loaded == 7
    assert await stored(raw, db.agent_id) == (28, 28, 0)


def test_the_blocking_face_loads_too(dsn: str) -> None:
    with sync.connect(agent_id=uuid4(), dsn=dsn, indexing="manual") as db:
        db.ensure_agent_exists({"name": "test"})
        db.ensure_embedding_dimension(384)
        assert db.load_memories((m for m in some(9)), "messages", batch_size=2).loaded == 9
        assert db.count_memories() == 9


async def test_the_order_of_what_has_no_time_is_that_of_the_input(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=3)
    memories = [Memory(id=uuid4(), content={}) for _ in range(50)]
    await db.load_memories(memories, "messages", batch_size=10)
    assert [m.id for m in await db.get_memories(table_name="messages")] == [m.id for m in reversed(memories)]


async def test_unique_left_out_is_true_and_nobody_looks_for_near_duplicates(db: DatabaseAdapter) -> None:
    memories = [Memory(id=uuid4(), content={}, embedding=V[0], unique=given) for given in (None, None, False)]
    await db.load_memories(memories, "messages")
    found = {m.id: m.unique for m in await db.get_memories(table_name="messages")}
    assert [found[m.id] for m in memories] == [True, True, False]


async def test_nothing_to_load_costs_nothing(db: DatabaseAdapter, round_trips: list[str]) -> None:
    round_trips.clear()
    assert (await db.load_memories([], "messages")) == LoadSummary(0, 0, 0, pytest.approx(0, abs=60))  # type: ignore[arg-type]
    assert not round_trips


async def test_each_batch_is_one_transaction(make_db: MakeAdapter, round_trips: list[str]) -> None:
    db = await make_db(batch_size=5)
    memories = some(20)
    await db.load_memories(some(1), "messages", build_index=False)  # makes the connection
    round_trips.clear()
    await db.load_memories(memories, "messages", batch_size=10, build_index=False)
    kinds = [text.split()[0].rstrip(";") for text in round_trips]
    assert kinds == ["BEGIN", "WITH", "WITH", "SELECT", "COMMIT"] * 2


async def test_a_slow_source_does_not_hold_up_what_is_stored(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that makes the embeddings: the server's answers would count as late, and the server as down."""
    now = 0.0
    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(_loader, "time", clock)
    turns: list[int] = []
    given = 0

    def source() -> Iterator[Memory]:
        nonlocal now, given
        for memory in some(40):
            now += 0.004
            given += 1
            yield memory

    async def others() -> None:
        while True:
            turns.append(given)
            await asyncio.sleep(0)

    db = await make_db()
    beside = asyncio.ensure_future(others())
    try:
        await db.load_memories(source(), "messages", batch_size=20, build_index=False)
    finally:
        beside.cancel()
    assert all(later - earlier <= 2 for earlier, later in pairwise(turns))


async def test_progress_comes_after_each_batch(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    told: list[tuple[int, int | None]] = []
    await db.load_memories(some(25), "messages", batch_size=10, progress=lambda *at: told.append(at))
    assert told == [(10, 25), (20, 25), (25, 25)]
    told.clear()
    await db.load_memories(iter(some(15)), "messages", batch_size=10, progress=lambda *at: told.append(at))
    assert told == [(10, None), (15, None)]

    def fail(done: int, total: int | None) -> None:
        raise RuntimeError(f"{done} of {total}")

    with pytest.raises(RuntimeError, match="10 of 30"):
        await db.load_memories(some(30), "messages", batch_size=10, progress=fail)
    assert (await stored(raw, db.agent_id))[0] in (50, 60)  # the next batch was perhaps under way


# --- conflicts -------------------------------------------------------------------------------------------------------


async def test_an_id_that_is_there_is_an_error_or_is_skipped(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    memories = some(30)
    await db.create_memories([Memory(id=memories[17].id, content={"old": True}, unique=True)], "messages")
    with pytest.raises(UniqueViolationError, match="Memory at position 17: ") as caught:
        await db.load_memories(memories, "messages", batch_size=5)
    assert caught.value.kept == 15
    assert caught.value.constraint == "memories_pkey"
    assert (await stored(raw, db.agent_id))[0] == 15 + 1
    rest = await db.load_memories(memories, "messages", batch_size=5, on_conflict="skip")
    assert (rest.loaded, rest.skipped) == (14, 16)
    kept = await db.get_memory_by_id(memories[17].id, include_embedding=True)  # type: ignore[arg-type]
    assert kept is not None and kept.content == {"old": True} and kept.embedding is None


@pytest.mark.parametrize("kept", [0, 10])
@pytest.mark.parametrize("with_ids", [False, True], ids=["ids are made", "ids are given"])
@pytest.mark.parametrize("on_conflict", ["error", "skip"])
async def test_a_load_may_be_repeated_where_it_would_not_meet_what_is_kept(
    db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch, on_conflict: str, with_ids: bool, kept: int
) -> None:
    store, batches = db._load, iter(range(2))

    async def lost(rows: list[dict[str, Any]], *, skip: bool) -> list[Any]:
        if next(batches) * 10 == kept:
            raise elizasql.ConnectionLostError("before anything was sent")
        return await store(rows, skip=skip)

    monkeypatch.setattr(db, "_load", lost)
    memories = [replace(memory, id=memory.id if with_ids else None) for memory in some(20)]
    with pytest.raises(elizasql.ConnectionLostError) as caught:
        await db.load_memories(memories, "messages", batch_size=10, on_conflict=on_conflict)
    assert caught.value.kept == kept
    assert caught.value.retryable is (not kept or (with_ids and on_conflict == "skip"))


async def test_a_second_run_that_skips_changes_nothing(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], small: None
) -> None:
    memories = some(30)
    rows = """SELECT m.ctid, m.xmin::text, e.ctid, e.xmin::text
              FROM elizasql.memories AS m
              INNER JOIN elizasql.embeddings AS e ON e.agent_id = m.agent_id AND e.memory_id = m.id
              WHERE m.agent_id = $1 ORDER BY m.id"""
    await db.load_memories(memories, "messages", batch_size=7, on_conflict="skip")
    before, index = await raw.fetch(rows, db.agent_id), await index_of(raw, db.agent_id)
    again = await db.load_memories(memories, "messages", batch_size=7, on_conflict="skip")
    assert (again.loaded, again.skipped, again.indexed) == (0, 30, 0)
    assert await raw.fetch(rows, db.agent_id) == before
    assert await index_of(raw, db.agent_id) == index is not None


async def test_an_id_that_comes_twice(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    memories = some(12)
    memories[5].id = memories[3].id
    with pytest.raises(ArgumentError, match=r"Memory at position 5: id .* was given before") as early:
        await db.load_memories(memories, "messages", batch_size=6)
    assert early.value.kept == 0
    memories[5].id, memories[10].id = uuid4(), memories[3].id
    with pytest.raises(UniqueViolationError, match="Memory at position 10: ") as late:
        await db.load_memories(memories, "messages", batch_size=6)
    assert late.value.kept == 6
    memories[11].id = memories[10].id
    summary = await db.load_memories(memories, "messages", batch_size=6, on_conflict="skip")
    assert (summary.loaded, summary.skipped) == (4, 8)
    assert (await stored(raw, db.agent_id))[0] == 10


async def test_two_loads_of_the_same_rows_store_each_once(
    make_db: MakeAdapter, db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    other = await make_db(db.agent_id)
    memories = some(200)
    both = await asyncio.gather(
        *(each.load_memories(memories, "messages", batch_size=20, on_conflict="skip") for each in (db, other))
    )
    assert sum(each.loaded for each in both) == sum(each.skipped for each in both) == 200
    assert await stored(raw, db.agent_id) == (200, 200, 0)


# --- errors ----------------------------------------------------------------------------------------------------------

BAD: dict[str, Any] = {
    "no content": {"content": None},
    "another agent": {"content": {}, "agent_id": uuid4()},
    "another width": {"content": {}, "embedding": np.ones(512, np.float32)},
    "not a number": {"content": {}, "embedding": np.full(384, np.nan, np.float32)},
    "not JSON": {"content": {"x": object()}},
    "no timestamp": {"content": {}, "metadata": {"type": "document"}},
    "no such field": {"content": {}, "nonsense": 1},
    "no memory": 7,
}


@pytest.mark.parametrize("bad", BAD)
async def test_a_memory_that_is_wrong_is_named_and_what_was_before_is_kept(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], bad: str
) -> None:
    memories: list[Any] = some(40)
    memories[23] = BAD[bad]
    with pytest.raises(ArgumentError, match="23") as caught:
        await db.load_memories(memories, "messages", batch_size=10)
    assert caught.value.kept == 20
    assert not db._indexer._lost, "an index that it has not dropped may be another load's"
    assert (await stored(raw, db.agent_id))[:2] == (20, 20)
    memories[23] = some(1)[0]
    assert (await db.load_memories(memories, "messages", batch_size=10, on_conflict="skip")).loaded == 20
    assert await stored(raw, db.agent_id) == (40, 40, 0)


async def test_what_the_server_refuses_is_named_too(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = some(30, room_id=agent_world.room)
    memories[14].room_id = uuid4()
    with pytest.raises(ForeignKeyError, match="Memory at position 14: ") as caught:
        await db.load_memories(memories, "messages", batch_size=10)
    assert caught.value.kept == 10
    memories[14].room_id, memories[27].metadata = None, {"type": "fragment"}
    monkeypatch.setattr(_memories, "_check_metadata", lambda encoded: None)  # the table's rule speaks
    with pytest.raises(elizasql.CheckError, match="Memory at position 27: ") as checked:
        await db.load_memories(memories, "messages", batch_size=10, on_conflict="skip")
    assert checked.value.kept == 20
    assert (await stored(raw, db.agent_id))[0] == 20


async def test_what_the_server_refuses_is_named_though_others_are_named_beside_it(
    db: DatabaseAdapter, agent_world: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent among the entities; in a row that breaks a rule the ids of other memories, of rooms and the like."""
    memories = some(3)
    memories[2].entity_id = db.agent_id
    with pytest.raises(ForeignKeyError, match="Memory at position 2: "):
        await db.load_memories(memories, "messages")
    memories = some(3, room_id=agent_world.room)
    memories[2].content = {"inReplyTo": str(memories[0].id), "note": "(id)=(x)"}
    memories[2].metadata = {"type": "fragment"}
    monkeypatch.setattr(_memories, "_check_metadata", lambda encoded: None)
    with pytest.raises(elizasql.CheckError, match="Memory at position 2: "):
        await db.load_memories(memories, "messages")
    memories[1].id = db.agent_id
    memories[2].metadata = None
    await db.create_memory(memories[1], "messages")
    with pytest.raises(UniqueViolationError, match="Memory at position 1: "):
        await db.load_memories(memories, "messages")


async def test_an_error_of_the_source_comes_through(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    def broken() -> Iterator[Memory]:
        yield from some(25)
        raise LookupError("the file ends here")

    with pytest.raises(LookupError, match="the file ends here"):
        await db.load_memories(broken(), "messages", batch_size=10)
    assert (await stored(raw, db.agent_id))[0] == 20


async def test_once_a_batch_has_failed_the_next_one_is_not_read(
    db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = db._load, asyncio.Event()
    read: list[int] = []

    async def load(*args: Any, **options: Any) -> Any:
        try:
            return await real(*args, **options)
        finally:
            failed.set()

    async def produce() -> AsyncIterator[Memory]:
        for memory in some(10, room_id=uuid4()):
            yield memory
        await failed.wait()
        for number, memory in enumerate(some(9)):
            read.append(number)
            yield memory

    monkeypatch.setattr(db, "_load", load)
    with pytest.raises(ForeignKeyError, match="Memory at position 0: "):
        await db.load_memories(produce(), "messages", batch_size=10)
    assert read == [0]


async def test_the_dimension_lock_holds(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db(dimension=None)
    with pytest.raises(EmbeddingDimensionError) as none:
        await db.load_memories(some(10), "messages")
    assert none.value.locked is None and none.value.kept == 0
    await (await make_db(db.agent_id, dimension=None)).ensure_embedding_dimension(512)
    with pytest.raises(EmbeddingDimensionError) as other:
        await db.load_memories(some(10), "messages")
    assert (other.value.locked, other.value.given) == (512, 384)
    assert await stored(raw, db.agent_id) == (0, 0, 0)


async def test_arguments_are_checked_before_anything_is_sent(db: DatabaseAdapter, round_trips: list[str]) -> None:
    round_trips.clear()
    wrong: list[dict[str, Any]] = [
        {"batch_size": 0},
        {"batch_size": 50_001},
        {"batch_size": 1.5},
        {"on_conflict": "replace"},
        {"on_conflict": None},
        {"build_index": "yes"},
        {"progress": 1},
        {"table_name": ""},
        {"timeout": 0},
    ]
    for arguments in wrong:
        with pytest.raises(ArgumentError):
            await db.load_memories(some(2), **{"table_name": "messages", **arguments})
    refused: list[Any] = [7, None, "messages", Memory(content={}), {"content": {}}, b"rows"]
    for memories in refused:
        with pytest.raises(ArgumentError, match="collection of Memory"):
            await db.load_memories(memories, "messages")
    assert not round_trips


async def test_it_does_not_run_in_a_transaction(db: DatabaseAdapter) -> None:
    async with db.transaction() as tx:
        with pytest.raises(ArgumentError, match="does not run in a transaction"):
            await tx.load_memories(some(2), "messages")


async def test_a_load_has_the_time_that_it_is_given(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    async with raw.transaction():
        await raw.execute("LOCK TABLE elizasql.agents IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(DeadlineError) as caught:
            await db.load_memories(some(20), "messages", batch_size=10, timeout=0.3)
        assert caught.value.kept == 0


async def test_a_batch_has_the_time_of_a_call(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    """A load may take a day, and its server be gone within the first minute."""
    db.config = replace(db.config, timeout=0.2)
    async with raw.transaction():
        await raw.execute("SELECT FROM elizasql.agents WHERE id = $1 FOR UPDATE", db.agent_id)
        with pytest.raises(DeadlineError) as caught:
            await asyncio.wait_for(db.load_memories(some(20), "messages", batch_size=10, build_index=False), 20)
    assert caught.value.kept == 0


# --- how it ends early, and what it costs others ---------------------------------------------------------------------


async def test_a_cancelled_load_keeps_whole_batches(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    reached = asyncio.Event()

    async def produce() -> AsyncIterator[Memory]:
        for memory in some(47):
            yield memory
        reached.set()
        await asyncio.Event().wait()

    load = asyncio.create_task(db.load_memories(produce(), "messages", batch_size=10))
    await reached.wait()
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    memories, embeddings, _ = await stored(raw, db.agent_id)
    assert memories == embeddings and memories in (30, 40)  # the fourth batch was perhaps under way
    assert (await db.load_memories(some(5), "messages")).loaded == 5


async def test_a_cancelled_load_leaves_no_batch_behind(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    async def produce() -> AsyncIterator[Memory]:
        for memory in some(10):
            yield memory
        await asyncio.Event().wait()

    async with raw.transaction():
        await raw.execute("SELECT FROM elizasql.agents WHERE id = $1 FOR UPDATE", db.agent_id)
        load = asyncio.create_task(db.load_memories(produce(), "messages", batch_size=10, build_index=False))
        await blocked_pid(raw, load)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        assert not [task for task in asyncio.all_tasks() if "_store_batch" in str(task)]
    assert (await db.load_memories(some(5), "messages")).loaded == 5
    assert await stored(raw, db.agent_id) == (5, 5, 0)


async def test_callers_keep_their_connections(make_db: MakeAdapter) -> None:
    """The only connection for callers is in a transaction; the load has one of its own."""
    db = await make_db(pool_max_size=1)
    counts: list[int] = []
    async with db.transaction() as tx:

        async def produce() -> AsyncIterator[Memory]:
            for number, memory in enumerate(some(40)):
                if number % 10 == 0:
                    counts.append(await tx.count_memories())
                yield memory

        assert (await db.load_memories(produce(), "messages", batch_size=10)).loaded == 40
    assert counts[0] == 0 and counts[-1] >= 10


def generated(count: int) -> Iterator[Memory]:
    generator = np.random.default_rng(1)
    for number in range(count):
        yield Memory(content={"n": number, "text": "x" * 200}, embedding=generator.random(384, np.float32))


@pytest.mark.parametrize("count", [3000, pytest.param(50_000, marks=pytest.mark.slow)])
async def test_memory_does_not_grow_with_the_load(db: DatabaseAdapter, count: int) -> None:
    """All of 3,000 rows are 15 MB, as given and as encoded; two batches of 200 are 2."""
    await db.load_memories(generated(400), "messages", batch_size=200, build_index=False)  # caches, the connection
    tracemalloc.start()
    try:
        await db.load_memories(generated(count), "messages", batch_size=200, build_index=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000


# --- the index -------------------------------------------------------------------------------------------------------


async def test_a_small_load_is_moved_into_the_index_that_is_there(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], indexed: None
) -> None:
    before = await index_of(raw, db.agent_id)
    summary = await db.load_memories(some(50), "messages", batch_size=20)
    assert summary.indexed == 50
    assert await stored(raw, db.agent_id) == (50, 50, 0)
    assert await index_of(raw, db.agent_id) == before is not None


async def test_without_an_index_the_vectors_wait_in_the_tail(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], indexed: None, small: None
) -> None:
    before = await index_of(raw, db.agent_id)
    db._indexer._wanted.clear()
    summary = await db.load_memories(some(50), "messages", build_index=False)
    assert summary.indexed == 0
    assert db._indexer._wanted.is_set()
    assert await stored(raw, db.agent_id) == (50, 50, 50)
    assert await index_of(raw, db.agent_id) == before
    assert await db.index_memories() == 50


@pytest.mark.parametrize("known", [True, False])
async def test_a_large_load_builds_the_index_and_writes_no_row_twice(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], small: None, known: bool
) -> None:
    before = await index_of(raw, db.agent_id)
    memories = some(300)
    during: list[Any] = []

    async def produce() -> AsyncIterator[Memory]:
        for number, memory in enumerate(memories):
            if number == 200:
                during.append((await index_of(raw, db.agent_id), (await stored(raw, db.agent_id))[2]))
                hits = await db.search_memories(embedding=V[3], table_name="messages", count=5)
                during.append(hits[0].id)
            yield memory

    if known:
        summary = await db.load_memories(memories, "messages", batch_size=20)
    else:
        summary = await db.load_memories(produce(), "messages", batch_size=20)
        assert during == [(None, 0), memories[3].id]
    assert (summary.loaded, summary.indexed) == (300, 300)
    assert await stored(raw, db.agent_id) == (300, 300, 0)
    assert await index_of(raw, db.agent_id) not in (None, before)
    # A row that was changed later would carry another transaction than the one that brought it.
    changed = "SELECT count(*) FROM elizasql.embeddings WHERE agent_id = $1 AND xmin::text <> xid::text"
    assert await raw.fetchval(changed, db.agent_id) == 0
    for number in (0, 150, 299):
        assert (await db.search_memories(embedding=V[number], table_name="messages"))[0].id == memories[number].id
    definitions = await raw.fetch(
        """SELECT DISTINCT substring(indexdef FROM ' USING .*') FROM pg_indexes
           WHERE schemaname = 'elizasql' AND indexname LIKE 'embeddings_p%_dim_384_hnsw'"""
    )
    assert len(definitions) == 1


async def test_a_tail_that_was_there_comes_into_the_new_index(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], small: None
) -> None:
    await db.create_memories(some(15, unique=True), "facts")
    summary = await db.load_memories(some(100), "messages", batch_size=50)
    assert (summary.loaded, summary.indexed) == (100, 115)
    assert (await stored(raw, db.agent_id))[2] == 0


async def test_an_index_that_holds_much_more_stays(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_loader, "_LARGE", 10)
    await db.load_memories(some(400), "messages")
    before = await index_of(raw, db.agent_id)
    await raw.execute(f"ANALYZE elizasql.{await raw.fetchval('SELECT elizasql.partition_of($1)', db.agent_id)}")
    assert (await db.load_memories(some(20), "messages")).indexed == 20
    assert await index_of(raw, db.agent_id) == before
    assert (await stored(raw, db.agent_id))[2] == 0


async def test_the_index_is_looked_at_when_what_comes_has_doubled(
    db: DatabaseAdapter, indexed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as many as will come for all that is known; each time, it was dropped, and is there again by another load."""
    known: list[Any] = []

    async def drop(self: Indexer, coming: int | None = None) -> bool:
        known.append(coming)
        return True

    monkeypatch.setattr(_loader, "_LARGE", 10)
    monkeypatch.setattr(Indexer, "drop", drop)
    memories, mixed = some(40), some(40)
    for number in (0, 10, 11, 12, 13, 14):
        mixed[number].embedding = None
    for load, options, expected in (
        (some(40), {}, [40]),
        (iter(some(40)), {}, [10, 20, 40]),
        (mixed, {}, [14, 29]),
        (memories, {"on_conflict": "skip"}, [40]),
        (memories, {"on_conflict": "skip", "batch_size": 20}, []),
        (some(40), {"build_index": False}, []),
    ):
        known.clear()
        await db.load_memories(load, "messages", **{"batch_size": 5, **options})
        assert known == expected


async def test_a_role_that_may_not_build_the_index_does_without_it(
    make_db: MakeAdapter, db: DatabaseAdapter, raw: asyncpg.Connection[Any], dsn: str, small: None
) -> None:
    """Also where it is gone, as while the owner builds it anew."""
    if "//elizasql@" not in dsn:
        pytest.skip("the embedded server is not used")
    admin = await asyncpg.connect(dsn.replace("//elizasql@", "//postgres@"))
    try:
        await admin.execute("CREATE ROLE loader LOGIN")
        await admin.execute("GRANT USAGE ON SCHEMA elizasql TO loader")
        await admin.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA elizasql TO loader")
        app = await make_db(db.agent_id, dsn=dsn.replace("//elizasql@", "//loader@"))
        before = await index_of(raw, db.agent_id)
        assert (await app.load_memories(some(30), "messages", batch_size=10)).indexed == 30
        assert await index_of(raw, db.agent_id) == before
        assert await db._indexer.drop()
        assert (await app.load_memories(some(30), "messages", batch_size=10)).indexed == 30
        await db._indexer.build()
        assert await stored(raw, db.agent_id) == (60, 60, 0)
        await app.close()
    finally:
        await admin.execute("DROP OWNED BY loader")
        await admin.execute("DROP ROLE loader")
        await admin.close()


async def test_an_index_that_comes_back_in_the_middle_is_used(
    make_db: MakeAdapter, db: DatabaseAdapter, raw: asyncpg.Connection[Any], small: None
) -> None:
    other = await make_db(db.agent_id)
    memories = some(100)

    async def produce() -> AsyncIterator[Memory]:
        for number, memory in enumerate(memories):
            if number == 50:
                await other.index_memories(rebuild=True)
            yield memory

    assert (await db.load_memories(produce(), "messages", batch_size=10)).loaded == 100
    assert await stored(raw, db.agent_id) == (100, 100, 0)
    assert await index_of(raw, db.agent_id) is not None
    assert (await db.search_memories(embedding=V[99], table_name="messages"))[0].id == memories[99].id


async def test_whoever_reads_the_partition_does_not_hold_up_a_load(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], indexed: None, small: None
) -> None:
    before = await index_of(raw, db.agent_id)
    async with raw.transaction():
        await raw.fetch("SELECT 1 FROM elizasql.embeddings WHERE agent_id = $1", db.agent_id)
        assert (await db.load_memories(some(30), "messages", batch_size=30)).indexed == 30
        assert await index_of(raw, db.agent_id) == before


async def test_vectors_of_a_wrong_width_do_not_cost_the_partition_its_index(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], indexed: None, small: None
) -> None:
    before = await index_of(raw, db.agent_id)
    wide = [Memory(content={}, embedding=np.append(V[n], V[0][:128])) for n in range(50)]
    with pytest.raises(EmbeddingDimensionError, match="512"):
        await db.load_memories(wide, "messages", batch_size=10)
    assert before is not None and await index_of(raw, db.agent_id) == before


async def test_the_width_is_asked_for_once(make_db: MakeAdapter, round_trips: list[str]) -> None:
    db = await make_db(dimension=None)
    await make_db(db.agent_id)
    assert db._dimension is None
    round_trips.clear()
    await db.load_memories(some(30), "messages", batch_size=10, build_index=False)
    assert sum(sent == SQL["get_embedding_dimension"].sql for sent in round_trips) == 1


async def test_after_a_load_that_failed_the_background_builds_the_index(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], small: None
) -> None:
    db = await make_db(indexing="background")
    memories: list[Any] = [*some(50), {"nonsense": 1}]
    with pytest.raises(ArgumentError, match="position 50"):
        await db.load_memories(iter(memories), "messages", batch_size=10)
    while await index_of(raw, db.agent_id) is None:
        await asyncio.sleep(0.01)
    assert await stored(raw, db.agent_id) == (50, 50, 0)


async def test_after_a_load_that_was_cut_while_it_dropped_the_index_the_background_builds_it(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = await make_db(indexing="background")
    real = Indexer.drop

    async def drop(self: Indexer, coming: int | None = None) -> bool:
        assert await real(self, coming)
        raise asyncio.CancelledError

    monkeypatch.setattr(Indexer, "drop", drop)
    with pytest.raises(asyncio.CancelledError):
        await db.load_memories(some(50), "messages", batch_size=10)
    assert db._indexer._lost
    while await index_of(raw, db.agent_id) is None:
        await asyncio.sleep(0.01)


async def test_a_lost_index_comes_back_also_where_the_agent_always_writes(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    db = await make_db(indexing="background", index_interval=0.3)
    await raw.execute("SELECT elizasql.drop_index($1, NULL)", db.agent_id)

    while await index_of(raw, db.agent_id) is None:
        db._indexer.wake()
        await asyncio.sleep(0.01)


async def test_a_partition_that_grows_fast_is_not_disturbed(make_db: MakeAdapter, own_database: str) -> None:
    db = await make_db(dsn=own_database)  # of its own: beside what other tests leave, 600 vectors may be no growth
    raw = await asyncpg.connect(own_database)
    await db.load_memories(some(600), "messages", build_index=False)
    await raw.execute("SELECT elizasql.drop_index($1, NULL)", db.agent_id)
    for count, built in ((0, False), (600, False), (1, True)):
        await db.load_memories(some(count), "messages", build_index=False)
        await db._indexer._restore_index()
        assert (await index_of(raw, db.agent_id) is not None) is built
    await raw.close()


@pytest.mark.parametrize("ours", [False, True], ids=["built by somebody else", "built here"])
async def test_an_index_that_was_lost_once_leaves_later_loads_alone(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], indexed: None, ours: bool
) -> None:
    """A load was broken off, and the index was built; the next load is another process's, and under way."""
    await db.load_memories(some(600), "messages", build_index=False)
    await db.index_memories()  # not by the build: the partition would grow
    if ours:
        await raw.execute("SELECT elizasql.drop_index($1, NULL)", db.agent_id)
    db._indexer.restore()
    await db._indexer._restore_index()
    await raw.execute("SELECT elizasql.drop_index($1, NULL)", db.agent_id)
    await db._indexer._restore_index()
    assert await index_of(raw, db.agent_id) is None


@pytest.mark.parametrize("during", ["drop", "build"])
async def test_after_a_rebuild_that_was_cut_the_background_builds_the_index(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    db = await make_db(indexing="background")
    indexer = db._indexer
    name = {"drop": "drop", "build": "_fetch_count"}[during]
    real: Any = getattr(indexer, name)

    async def cut(*args: Any, **options: Any) -> Any:
        if during == "drop":
            assert await real()
        elif args != ("build_index",):
            return await real(*args, **options)
        raise asyncio.CancelledError

    with monkeypatch.context() as patched:
        patched.setattr(indexer, name, cut)
        with pytest.raises(asyncio.CancelledError):
            await db.index_memories(rebuild=True)
    assert indexer._lost
    while await index_of(raw, db.agent_id) is None:
        await asyncio.sleep(0.01)


async def test_after_a_load_that_failed_index_memories_builds_the_index(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], small: None
) -> None:
    with pytest.raises(ArgumentError, match="position 50"):
        await db.load_memories([*some(50), {"nonsense": 1}], "messages", batch_size=10)
    assert await index_of(raw, db.agent_id) is None
    await db.index_memories()
    assert await index_of(raw, db.agent_id) is not None


async def test_a_build_without_shared_memory_is_done_by_one_process(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], indexed: None
) -> None:
    """A parallel build would take all of maintenance_work_mem from the shared memory at once."""
    await db.load_memories(some(600), "messages", build_index=False)
    await raw.execute("SELECT elizasql.drop_index($1, NULL)", db.agent_id)
    notices: list[Any] = []
    async with raw.transaction():
        await raw.execute("SET LOCAL min_parallel_table_scan_size = 0; SET LOCAL maintenance_work_mem = '1TB'")
        await raw.execute("SET LOCAL client_min_messages = debug1")
        raw.add_log_listener(lambda _, message: notices.append(str(message)))
        assert await raw.fetchval("SELECT elizasql.build_index($1)", db.agent_id) == 600
        assert await raw.fetchval("SHOW max_parallel_maintenance_workers") == "0"
    assert await index_of(raw, db.agent_id) is not None


async def test_a_killed_load_keeps_whole_batches_and_somebody_builds_the_index(
    make_db: MakeAdapter, dsn: str, raw: asyncpg.Connection[Any]
) -> None:
    db = await make_db()
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.load_worker", dsn, str(db.agent_id), "20",
        stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert worker.stdout is not None
    kept = 0
    while kept < 200:
        kept = int((await worker.stdout.readline()).split()[0])
    worker.kill()
    kept = max([kept, *(int(line.split()[0]) for line in (await worker.stdout.read()).splitlines())])
    await worker.wait()
    # The server ends what was under way before it takes the lock.
    async with raw.transaction():
        await raw.execute("LOCK TABLE elizasql.memories, elizasql.embeddings IN SHARE MODE")
        memories, embeddings, _ = await stored(raw, db.agent_id)
    assert memories == embeddings and memories % 20 == 0 and kept <= memories <= kept + 20
    assert await index_of(raw, db.agent_id) is None
    await make_db(db.agent_id, indexing="background", index_interval=0.3)
    while await index_of(raw, db.agent_id) is None:
        await asyncio.sleep(0.01)
    assert (await stored(raw, db.agent_id))[2] == 0


async def test_while_the_index_is_built_searches_go_on_and_writes_wait(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    memories = some(30)
    await db.load_memories(memories, "messages")
    await raw.execute("SELECT elizasql.drop_index($1, NULL)", db.agent_id)
    async with raw.transaction():
        await raw.execute("SELECT elizasql.build_index($1)", db.agent_id)  # and it is not over yet
        assert (await db.search_memories(embedding=V[7], table_name="messages"))[0].id == memories[7].id
        with pytest.raises(DeadlineError):
            await db.create_memories(some(1, unique=True), "messages", timeout=0.3)
        await db.create_memory(Memory(content={}), "messages")
    await db.create_memories(some(1, unique=True), "messages")


async def test_while_the_index_of_another_partition_is_built_nobody_waits(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    db, other = await make_db(timeout=20.0), await make_db()
    own = await raw.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)
    while await raw.fetchval("SELECT elizasql.partition_of($1)", other.agent_id) == own:
        other = await make_db()
    world = uuid4()
    await db.create_world(World(id=world))
    first, second, *rest = await db.create_memories(some(10, unique=True), "messages")
    await raw.execute("SELECT elizasql.drop_index($1, NULL)", other.agent_id)
    async with raw.transaction():
        await raw.execute("SELECT elizasql.build_index($1)", other.agent_id)  # and it is not over yet
        await db.update_memories([{"id": first, "unique": False}, {"id": second, "world_id": world}])
        assert await db.remove_world(world)
        await db.upsert_memories([Memory(id=first, content={}, unique=True, embedding=V[20])], "messages")
        assert await db.index_memories() == 10
        assert (await db.load_memories(some(5), "messages")).indexed == 5
        assert await db.delete_memories(rest) == 8
        assert await stored(raw, db.agent_id) == (7, 7, 0)
        await db.update_memories([{"id": id, "content": {"text": "text"}} for id in (first, second)])
        move = await db.reembed(512, lambda texts: np.ones((len(texts), 512)), skip_missing=True, timeout=20.0)
        assert (move.embedded, move.dropped) == (2, 7)

        def break_off(done: int, total: int) -> None:
            if done:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            await db.reembed(768, lambda texts: np.ones((len(texts), 768)), progress=break_off)
        assert await db.abandon_reembedding(timeout=20.0) == 2
    assert await stored(raw, db.agent_id) == (7, 2, 0)


async def test_while_an_index_is_built_loads_into_other_partitions_find_a_connection(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], round_trips: list[str]
) -> None:
    """The background of the partition's agents waits without one; what it has left, it does when the build is over."""
    agents, part = [uuid4()], "SELECT elizasql.partition_of($1)"
    own = await raw.fetchval(part, agents[0])
    for same in (True, False):
        while (await raw.fetchval(part, another := uuid4()) == own) is not same:
            pass
        agents.append(another)
    for agent in agents[:2]:
        await (await make_db(agent)).create_memories(some(3, unique=True), "messages")
    await raw.execute("SELECT elizasql.drop_index($1, NULL)", agents[0])
    building = raw.transaction()
    await building.start()
    await raw.execute("SELECT elizasql.build_index($1)", agents[0])  # and it is not over yet
    options: dict[str, Any] = {"timeout": 10.0, "index_interval": 0.3}
    both = [await make_db(agent, indexing="background", **options) for agent in agents[:2]]
    other = await make_db(agents[2], **options)
    assert len({db._background.connections for db in (*both, other)}) == 1
    while sum("index_embeddings" in sent for sent in round_trips) < 2:
        await asyncio.sleep(0.01)
    assert (await other.load_memories(some(50), "messages", batch_size=10)).indexed == 50
    for db in both:
        assert (await db.stats())["indexing"] == {"failures": 0, "error": None}
    await building.rollback()
    for agent in agents[:2]:
        while await stored(raw, agent) != (3, 3, 0) or await index_of(raw, agent) is None:
            await asyncio.sleep(0.01)


async def test_of_two_that_build_one_builds(
    make_db: MakeAdapter, db: DatabaseAdapter, raw: asyncpg.Connection[Any], small: None
) -> None:
    other = await make_db(db.agent_id)
    both = await asyncio.gather(*(each.load_memories(some(100), "messages", batch_size=25) for each in (db, other)))
    assert [each.loaded for each in both] == [100, 100]
    assert await stored(raw, db.agent_id) == (200, 200, 0)
    assert await index_of(raw, db.agent_id) is not None
