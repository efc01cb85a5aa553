"""The background indexer and index_memories."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal
from uuid import UUID

import asyncpg
import numpy as np
import pytest

from elizasql import (
    ArgumentError,
    ConfigurationError,
    ConnectionLostError,
    DatabaseAdapter,
    ElizaSQLError,
    LockTimeoutError,
    Memory,
    PermissionDeniedError,
    Room,
    UnavailableError,
    World,
    _indexer,
)
from elizasql._calls import current_deadline
from elizasql._statements import SQL
from elizasql.types import DIMENSIONS

from .conftest import MakeAdapter, neighbour_of
from .locking import blocked_pid

V = np.random.default_rng(0).normal(size=(500, 384)).astype(np.float32)


async def tail_of(raw: asyncpg.Connection[Any], agent: UUID) -> int:
    count: int = await raw.fetchval(
        "SELECT count(*) FROM elizasql.embeddings WHERE agent_id = $1 AND NOT indexed", agent
    )
    return count


async def write(db: DatabaseAdapter, number: int = 100) -> list[UUID]:
    return await db.create_memories([Memory(content={}, embedding=v, unique=True) for v in V[:number]], "messages")


async def until(condition: Any, seconds: float = 30) -> None:
    """Poll a condition; the time is a bound for a hung test, not a measure."""
    async with asyncio.timeout(seconds) if hasattr(asyncio, "timeout") else _no_bound():
        while not await condition():
            await asyncio.sleep(0.01)


class _no_bound:  # noqa: N801
    async def __aenter__(self) -> None: ...
    async def __aexit__(self, *error: object) -> None: ...


async def test_manual_indexing_leaves_the_tail_until_it_is_asked(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], round_trips: list[str]
) -> None:
    await write(db)
    assert await tail_of(raw, db.agent_id) == 100
    calls: list[tuple[int, int]] = []
    db._indexer._config = type(db.config).load(environ={}, index_batch_size=30)
    assert await db.index_memories(lambda done, total: calls.append((done, total))) == 100
    assert calls == sorted(calls) and {total for _, total in calls} == {100}
    assert len(calls) >= 4 and calls[-1] == (100, 100)
    assert await tail_of(raw, db.agent_id) == 0
    assert sum("refresh_statistics" in sent for sent in round_trips) == 1
    assert await db.index_memories() == 0
    assert sum("refresh_statistics" in sent for sent in round_trips) == 1, "nothing moved"


async def test_background_indexing_empties_the_tail(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db(indexing="background", index_batch_size=20)
    ids = await write(db)

    async def empty() -> bool:
        return await tail_of(raw, db.agent_id) == 0

    await until(empty)
    for id, v in zip(ids[:10], V, strict=False):
        assert (await db.search_memories(embedding=v, table_name="messages", count=1))[0].id == id
    await db.update_memory({"id": ids[0], "embedding": V[200]})
    await until(empty)
    await db.update_memory({"id": ids[0], "unique": False})
    await until(empty)
    await db.upsert_memories([{"id": ids[0], "content": {}, "unique": True}], "messages")
    await until(empty)


async def test_inline_indexing_leaves_no_tail(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db(indexing="inline")
    ids = await write(db, 20)
    await db.create_memory(Memory(content={}, embedding=V[30], unique=True), "messages")
    await db.create_memory(Memory(content={}, embedding=V[31]), "messages")
    await db.update_memory({"id": ids[0], "embedding": V[32]})
    await db.upsert_memories([Memory(id=ids[1], content={}, embedding=V[33])], "messages")
    assert await tail_of(raw, db.agent_id) == 0
    assert len(await db.search_memories(embedding=V[0], table_name="messages", count=50)) == 22


@pytest.mark.parametrize("indexing", ["manual", "inline"])
async def test_what_changes_its_scope_does_not_wait_for_the_index(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], indexed: None, indexing: Literal["manual", "inline"]
) -> None:
    """A new entry in HNSW takes milliseconds: to remove a world of some ten thousand memories took minutes."""
    db = await make_db(indexing=indexing)
    world, room = await db.create_world(World()), await db.create_room(Room(source="test", type="GROUP"))
    memories = [Memory(content={}, embedding=v, world_id=world, unique=True) for v in V[:20]]
    ids = await db.create_memories(memories, "messages")
    await db.index_memories()
    expected = 0
    for change in (
        lambda: db.upsert_memories([{"id": ids[7], "content": {}, "unique": False}], "messages"),
        lambda: db.upsert_memories([{"id": ids[8], "content": {}, "unique": False, "embedding": V[8]}], "messages"),
        lambda: db.update_memory({"id": ids[0], "room_id": room}),
        lambda: db.update_memories([{"id": id, "unique": False} for id in ids[:5]]),
        lambda: db.remove_world(world),
    ):
        db._indexer._wanted.clear()
        await change()
        assert db._indexer._wanted.is_set(), "the indexer is told"
        expected = {0: 1, 1: 2, 2: 3, 3: 7, 7: 20}[expected] if indexing == "manual" else 0
        assert await tail_of(raw, db.agent_id) == expected
    await db.update_memories([{"id": id, "content": {"text": "new"}} for id in ids])
    for id, v in zip(ids, V, strict=False):
        [found] = await db.search_memories(embedding=v, table_name="messages", count=1)
        assert (found.id, found.world_id) == (id, None)
    assert await db.index_memories() == expected


async def test_an_adapter_takes_over_what_another_left(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db()
    await write(db)
    other = await make_db(db.agent_id, indexing="background")

    async def empty() -> bool:
        return await tail_of(raw, other.agent_id) == 0

    await until(empty)


async def test_several_indexers_share_the_work(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db()
    await write(db, 400)
    others = [await make_db(db.agent_id, index_batch_size=25) for _ in range(4)]
    moved = await asyncio.gather(*(adapter.index_memories() for adapter in others))
    assert sum(moved) == 400
    assert await tail_of(raw, db.agent_id) == 0


async def test_rows_that_are_locked_are_passed_over(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], indexed: None
) -> None:
    ids = await write(db, 10)
    async with raw.transaction():
        await raw.execute(
            "SELECT 1 FROM elizasql.embeddings WHERE agent_id = $1 AND memory_id = $2 FOR UPDATE", db.agent_id, ids[0]
        )
        assert await db.index_memories() == 9
    assert await db.index_memories() == 1


@pytest.mark.parametrize("name", ["index_embeddings", "index_reembeddings"])
async def test_a_batch_ends_before_others_wait_for_long(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], name: str
) -> None:
    """Who changes or deletes one of its vectors waits for its end."""
    db = await make_db()
    await write(db, 10)
    given = {"agent_id": db.agent_id, "target": 384, "batch_size": 10, "waits": False}
    params = [given[each] for each in SQL[name].params]
    part = await raw.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)
    transaction = raw.transaction()
    await transaction.start()
    await raw.execute(
        f"""CREATE FUNCTION elizasql.slow() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN PERFORM pg_sleep(CASE WHEN NEW.agent_id = ''{db.agent_id}'' THEN 0.06 END); RETURN NEW; END';
        CREATE TRIGGER slow BEFORE UPDATE ON elizasql.{part} FOR EACH ROW EXECUTE FUNCTION elizasql.slow()"""
    )
    assert [await raw.fetchval(SQL[name].sql, *params) for _ in range(11)] == [1] * 10 + [0]
    await transaction.rollback()


async def test_rebuild_moves_everything_and_keeps_answers(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db()
    ids = await write(db, 300)
    await db.index_memories()
    more = await db.create_memories([Memory(content={}, embedding=v, unique=True) for v in V[300:]], "messages")
    calls: list[tuple[int, int]] = []
    assert await db.index_memories(lambda done, total: calls.append((done, total)), rebuild=True) == 200
    assert calls == [(200, 200)]
    assert await tail_of(raw, db.agent_id) == 0
    for id, v in zip([*ids[:5], *more[:5]], [*V[:5], *V[300:305]], strict=True):
        assert (await db.search_memories(embedding=v, table_name="messages", count=1))[0].id == id
    # The index stands as the migration made it.
    definitions = {
        row["indexdef"].split(" USING ")[1]
        for row in await raw.fetch("SELECT indexdef FROM pg_indexes WHERE indexname LIKE 'embeddings_p%_dim_384_hnsw'")
    }
    assert len(definitions) == 1


async def test_a_rebuild_does_not_hold_up_searches_behind_who_reads_for_long(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    db = await make_db(max_retries=1)
    await write(db, 30)
    await db.index_memories()
    part = await raw.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)
    async with raw.transaction():
        await raw.fetchval(f"SELECT count(*) FROM elizasql.{part}")
        with pytest.raises(LockTimeoutError):
            await db.index_memories(rebuild=True)
    assert await raw.fetchval("SELECT to_regclass($1)", f"elizasql.{part}_dim_384_hnsw") is not None
    await db.index_memories(rebuild=True)


async def test_a_build_that_waits_for_vacuum_does_not_hold_up_writes(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    db = await make_db()
    await write(db, 30)
    assert await db._indexer.drop()
    part = await raw.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)
    async with raw.transaction():
        await raw.execute(f"LOCK TABLE elizasql.{part} IN SHARE UPDATE EXCLUSIVE MODE")
        building = asyncio.ensure_future(db._indexer.build())
        await blocked_pid(raw, building)
        await db.create_memory(Memory(content={}, embedding=V[30], unique=True), "messages", timeout=5)
    assert await building == 31


async def test_of_two_that_build_an_index_the_second_finds_it(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """It looks before it waits for the other one, and has to look again after that."""
    db = await make_db()
    await write(db, 30)
    assert await db._indexer.drop()
    async with raw.transaction():
        assert await raw.fetchval("SELECT elizasql.build_index($1)", db.agent_id) == 30
        building = asyncio.ensure_future(db._indexer.build())
        await blocked_pid(raw, building)
    assert await building == 0


async def test_what_waits_for_a_locked_partition_is_moved_soon_after(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], round_trips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The background comes back by itself, long before the next look."""
    monkeypatch.setattr(_indexer, "_FIRST_PAUSE", 1e-6)
    agent = (await make_db()).agent_id
    await write(await make_db(agent), 10)
    part = await raw.fetchval("SELECT elizasql.partition_of($1)", agent)

    async def tried() -> bool:
        return sum("index_embeddings" in sent for sent in round_trips) > 2

    async def empty() -> bool:
        return await tail_of(raw, agent) == 0

    async with raw.transaction():
        await raw.execute(f"LOCK TABLE elizasql.{part} IN SHARE ROW EXCLUSIVE MODE")
        db = await make_db(agent, indexing="background", index_interval=1000.0)
        await until(tried)
        assert (db._indexer.failures, db._indexer.error) == (0, None)
    await until(empty)


async def test_an_index_that_somebody_else_builds_is_not_waited_for(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    indexer = (db := await make_db())._indexer
    await write(db, 10)
    assert await indexer.drop()
    indexer.restore()
    building = raw.transaction()
    await building.start()
    assert await raw.fetchval("SELECT elizasql.build_index($1)", db.agent_id) == 10  # and it is not over yet
    assert await asyncio.wait_for(indexer._restore_index(), 30)
    assert indexer._lost is True, "whoever builds it may fail"
    await building.rollback()
    assert not await indexer._restore_index()
    assert await tail_of(raw, db.agent_id) == 0


async def test_statistics_that_somebody_else_makes_are_not_waited_for(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor those of a partition whose index is about to be built."""
    monkeypatch.setattr(_indexer, "_ANALYZE_LEAST", 1)
    monkeypatch.setattr(_indexer, "_ANALYZE_SHARE", 0)
    db = await make_db(indexing="background")
    part = await raw.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)

    async def empty() -> bool:
        return await tail_of(raw, db.agent_id) == 0

    async with raw.transaction():
        await raw.execute(f"LOCK TABLE elizasql.{part} IN SHARE UPDATE EXCLUSIVE MODE")
        for _ in range(2):
            await write(db, 5)
            await until(empty)


async def test_the_partitioned_table_is_locked_before_the_partition(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """As by whoever makes a trigger for it: else each could wait for the other."""
    await write(db, 5)
    part = await raw.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)
    async with raw.transaction():
        await raw.execute("LOCK TABLE ONLY elizasql.embeddings IN SHARE ROW EXCLUSIVE MODE")
        moving = asyncio.ensure_future(db._indexer._move_batch())
        pid = await blocked_pid(raw, moving)
        held = "SELECT count(*) FROM pg_locks WHERE pid = $1 AND granted AND relation = $2::text::regclass"
        assert await raw.fetchval(held, pid, f"elizasql.{part}") == 0
    assert await moving == 5


async def test_a_role_without_rights_on_the_partition_moves_vectors_too(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], dsn: str
) -> None:
    if "//elizasql@" not in dsn:
        pytest.skip("the embedded server is not used")
    db = await make_db()
    await write(db, 10)
    part = await raw.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)
    admin = await asyncpg.connect(dsn.replace("//elizasql@", "//postgres@"))
    try:
        await admin.execute("CREATE ROLE mover LOGIN")
        await admin.execute("GRANT USAGE ON SCHEMA elizasql TO mover")
        await admin.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA elizasql TO mover")
        await admin.execute(f"REVOKE ALL ON elizasql.{part} FROM mover")
        app = await make_db(db.agent_id, dsn=dsn.replace("//elizasql@", "//mover@"))
        left = 10
        while left:  # a batch ends after 50 ms, which may be before the tenth
            moved = await app._indexer._move_batch()
            assert moved
            left -= moved
        await app.close()
    finally:
        await admin.execute("DROP OWNED BY mover")
        await admin.execute("DROP ROLE mover")
        await admin.close()


async def test_a_build_waits_for_no_vacuum_of_the_memories(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    """At its end, when writers already wait for it."""
    db = await make_db()
    await write(db, 30)
    part = (await raw.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)).replace("embeddings", "memories")
    async with raw.transaction():
        await raw.execute(f"LOCK TABLE elizasql.{part} IN SHARE UPDATE EXCLUSIVE MODE")
        assert await db.index_memories(rebuild=True, timeout=20) == 30


async def test_a_build_counts_what_it_moves(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    """Not what is of another width, which waits for another index."""
    db = await make_db()
    await db._indexer.build()  # whatever another test has left out
    await write(db, 30)
    assert await db._indexer.drop()
    async with raw.transaction():
        begun = {"agent_id": db.agent_id, "target": 512, "skip_missing": True, "begun": None}
        await raw.execute(SQL["begin_reembedding"].sql, *SQL["begin_reembedding"].order(begun))
        await raw.execute(
            """INSERT INTO elizasql.embeddings (agent_id, memory_id, type, "unique", dimension, dim_512, text_hash)
            SELECT agent_id, memory_id, type, "unique", 512, array_fill(1, ARRAY[512])::vector, 1
            FROM elizasql.embeddings WHERE agent_id = $1 LIMIT 3""",
            db.agent_id,
        )
        assert await raw.fetchval("SELECT elizasql.build_index($1)", db.agent_id) == 30


@pytest.mark.parametrize(
    ("beside", "asked", "least", "workers"),
    [("1", True, "0", "1"), ("1", False, "0", "3"), ("5", True, "0", "3"), ("1", True, "1GB", "3")],
)
async def test_an_index_that_is_built_while_others_ask_leaves_them_a_core(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], dsn: str, beside: str, asked: bool, least: str, workers: str
) -> None:
    """Where it is large enough for workers at all."""
    db = await make_db()
    await write(db)
    settings = {
        "max_parallel_maintenance_workers": "3",
        "min_parallel_table_scan_size": least,
        "elizasql.build_workers_beside_callers": beside,
    }
    asking = True

    async def ask() -> None:
        while asking:
            await raw.execute("SELECT 1")

    async def taken() -> object:
        await db._indexer.drop()
        async with builder.transaction():
            assert await builder.fetchval("SELECT elizasql.build_index($1)", db.agent_id) in (0, 100)
            return await builder.fetchval("SHOW max_parallel_maintenance_workers")

    async def alone() -> bool:
        """Another test's connection may just be going."""
        return await taken() == workers

    builder = await asyncpg.connect(dsn, server_settings=settings)
    caller = asyncio.ensure_future(ask()) if asked else None
    try:
        if caller is None:
            await until(alone)
        else:
            assert await taken() == workers
    finally:
        asking = False
        if caller is not None:
            await caller
        await builder.close()


def with_first(first: float, rest: float = 0.0) -> str:
    return str([first] + [rest] * 383)


@pytest.mark.parametrize(
    ("vector", "match"),
    [
        (with_first(0.0), "embeddings_range_check"),
        (with_first(2.0**-26), "embeddings_range_check"),
        (with_first(1e-30, 1e-30), "embeddings_range_check"),
        (with_first(65520.0, 1.0), "out of range for type halfvec"),
        (with_first(-1e30), "out of range for type halfvec"),
    ],
)
async def test_what_no_index_can_hold_is_not_there(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], vector: str, match: str
) -> None:
    """One such vector would stop the indexing of its agent: whoever writes it is refused."""
    _, bad = await write(db, 2)
    with pytest.raises((asyncpg.CheckViolationError, asyncpg.NumericValueOutOfRangeError), match=match):
        await raw.execute(
            "UPDATE elizasql.embeddings SET dim_384 = $3::text::vector WHERE agent_id = $1 AND memory_id = $2",
            *(db.agent_id, bad, vector),
        )
    assert await db.index_memories() == 2


@pytest.mark.parametrize("dimension", DIMENSIONS)
async def test_the_greatest_and_the_smallest_are_indexed(make_db: MakeAdapter, dimension: int) -> None:
    db = await make_db(dimension=dimension)
    extremes = np.zeros((6, dimension), np.float32)
    extremes[0], extremes[1] = 65504, -65504
    extremes[range(2, 6), range(4)] = 65504, -65504, 2.0**-24, -(2.0**-24)
    ids = await db.create_memories([Memory(content={}, embedding=v, unique=True) for v in extremes], "messages")
    assert await db.index_memories() == 6
    assert await db.index_memories(rebuild=True) == 0
    for id, vector in zip(ids, extremes, strict=True):
        assert (await db.search_memories(embedding=vector, table_name="messages", count=1))[0].id == id


@pytest.mark.parametrize("bad", [{"rebuild": "no"}, {"rebuild": 1}, {"rebuild": None}, {"progress": 1}])
async def test_what_does_not_fit_moves_nothing(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], round_trips: list[str], bad: dict[str, Any]
) -> None:
    await write(db, 3)
    round_trips.clear()
    with pytest.raises(ArgumentError, match=next(iter(bad))):
        await db.index_memories(**bad)
    assert round_trips == []
    assert await tail_of(raw, db.agent_id) == 3


async def test_close_ends_the_task_in_the_middle_of_its_work(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    db = await make_db(indexing="background", index_batch_size=1)
    await write(db, 300)
    task = db._indexer._task
    assert task is not None
    await db.close()
    assert task.done()
    assert db._indexer._task is None
    left = await tail_of(raw, db.agent_id)
    other = await make_db(db.agent_id)
    assert await other.index_memories() == left


@pytest.mark.parametrize("steps", range(4))
async def test_cancellation_that_comes_together_with_work_is_heard(make_db: MakeAdapter, steps: int) -> None:
    """As at the end of `asyncio.run` where nobody has closed: it waits for its tasks, and would wait for ever."""
    db = await make_db(indexing="background")
    task = db._indexer._task
    assert task is not None
    while db._indexer._wanted.is_set() or not db._indexer._wanted._waiters:
        await asyncio.sleep(0)
    db._indexer.wake()
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=10)
    assert task.cancelled()


async def test_stopping_leaves_a_cancellation_to_its_caller(make_db: MakeAdapter) -> None:
    db = await make_db(indexing="background")
    stopping = asyncio.ensure_future(db._indexer.stop())
    await asyncio.sleep(0)  # it waits for the task now
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping


async def test_what_has_ended_the_task_is_told_at_once_and_when_it_is_stopped(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    indexer = (await make_db(indexing="background"))._indexer
    task = indexer._task
    assert task is not None

    async def broken() -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(indexer, "_move_batch", broken)
    indexer.wake()
    await asyncio.wait({task})
    assert indexer.failures == 1 and indexer.error is not None and indexer.error.startswith("ZeroDivisionError")
    assert [record.message for record in caplog.records] == ["indexing has ended"]
    with pytest.raises(ZeroDivisionError):
        await indexer.stop()


async def test_trouble_is_logged_and_the_next_look_goes_on(
    make_db: MakeAdapter,
    raw: asyncpg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    db = await make_db(indexing="background", index_interval=0.3)
    real = db._indexer._move_batch
    failures = [ConnectionLostError("cut"), ConnectionLostError("cut again")]

    async def failing() -> int | None:
        if failures:
            raise failures.pop()
        return await real()

    monkeypatch.setattr(db._indexer, "_move_batch", failing)
    with caplog.at_level(logging.WARNING, "elizasql"):
        await write(db)

        async def empty() -> bool:
            return await tail_of(raw, db.agent_id) == 0

        await until(empty)
    assert "indexing is interrupted" in caplog.text


async def test_stats_tell_of_trouble_in_the_background(make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    db = await make_db(indexing="background", index_interval=0.03)
    real, failures = db._indexer._move_batch, 5

    async def failing(**options: Any) -> int | None:
        nonlocal failures
        if failures:
            failures -= 1
            if not failures:
                assert (await db.stats())["indexing"] == {"failures": 4, "error": "ConnectionLostError: cut"}
            raise ConnectionLostError("cut")
        return await real(**options)

    monkeypatch.setattr(db._indexer, "_move_batch", failing)
    db._indexer.wake()

    async def mended() -> bool:
        return not failures and (await db.stats())["indexing"] == {"failures": 0, "error": None}

    await until(mended)


@pytest.mark.parametrize(
    ("trouble", "again"),
    [
        (ConnectionLostError("cut"), 1),
        (PermissionDeniedError("no"), 0),
        (UnavailableError("a standby", sqlstate="25006"), 0),
    ],
)
async def test_what_time_does_not_mend_is_tried_again_at_the_next_look(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch, trouble: ElizaSQLError, again: int
) -> None:
    indexer = (await make_db(indexing="background", index_interval=0.3))._indexer
    await indexer.stop()
    seen: list[str] = []

    class Wanted(asyncio.Event):
        def set(self) -> None:
            seen.append("woken")
            super().set()

        async def wait(self) -> Literal[True]:
            seen.append("waits")
            return await super().wait()

    async def failing() -> int:
        seen.append("fails")
        raise trouble

    indexer._wanted = Wanted()
    monkeypatch.setattr(indexer, "_move_batch", failing)
    indexer.start()
    indexer.wake()

    async def waits_again() -> bool:
        return seen.count("waits") > 1

    await until(waits_again)
    assert seen[: 4 + again] == ["woken", "waits", "fails", *["woken"] * again, "waits"]


async def test_trouble_that_lasts_does_not_fill_the_log(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    indexer = (await make_db(indexing="background", index_interval=30.0))._indexer
    await indexer.stop()
    pauses: list[float] = []
    outcomes: list[Any] = [*[ConnectionLostError("down")] * 8, 0, ConnectionLostError("down again")]
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        indexer.wake()  # as callers do that write meanwhile
        await real_sleep(0)

    async def move() -> Any:
        if not outcomes:
            await asyncio.Event().wait()
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        indexer.wake()
        return outcome

    monkeypatch.setattr(indexer, "_move_batch", move)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "elizasql"):
        patched.setattr(asyncio, "sleep", sleep)
        indexer.start()
        indexer.wake()
        while outcomes or len(pauses) < 9:
            await real_sleep(0)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30, 1]
    assert caplog.text.count("indexing is interrupted") == 9


async def test_statistics_are_made_anew_when_the_index_has_grown_by_a_share(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexer = (await make_db(indexing="background"))._indexer
    moves, made, done = [499, 1, 499, 1, 4000, 999, 1], [], asyncio.Event()

    async def move() -> int:
        if not moves:
            done.set()
            return 0
        moved = moves.pop(0)
        indexer._moved += moved
        return moved

    async def refresh(*, waits: bool) -> None:
        assert not waits
        made.append(indexer._moved)

    monkeypatch.setattr(indexer, "_move_batch", move)
    monkeypatch.setattr(indexer, "_refresh_statistics", refresh)
    indexer.wake()
    await done.wait()
    assert made == [500, 1000, 5000, 6000]


async def test_the_background_makes_statistics_of_what_it_has_moved(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch, round_trips: list[str]
) -> None:
    monkeypatch.setattr(_indexer, "_ANALYZE_LEAST", 30)
    db = await make_db(indexing="background", index_batch_size=10)
    await write(db, 40)

    async def made() -> bool:
        return any("refresh_statistics" in sent for sent in round_trips)

    await until(made)


async def test_giving_way_ends_with_the_calls_or_with_patience(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexer = (await make_db())._indexer
    running = [2, 1, 1, 0]

    class Callers:
        @property
        def in_flight(self) -> int:
            return running.pop(0)

    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(indexer, "_callers", Callers())
    monkeypatch.setattr(_indexer, "_PATIENCE", 3600.0)
    others = asyncio.ensure_future(take_turns())
    await indexer._give_way()
    others.cancel()
    assert running == [] and turns >= 3
    monkeypatch.setattr(_indexer, "_PATIENCE", 0.0)
    running += [1, 1]
    await indexer._give_way()
    assert running == [1]


async def test_the_background_gives_way_before_each_batch_and_looks_once_in_a_while(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexer = (await make_db(indexing="background"))._indexer
    await indexer.stop()
    done: list[str] = []

    async def note(what: str) -> int:
        done.append(what)
        return 0 if done.count("move") > 2 else 1

    for name in ("give_way", "move_batch", "restore_index", "analyze_when_it_pays"):
        monkeypatch.setattr(indexer, f"_{name}", partial(note, name.split("_")[0]))
    monkeypatch.setattr(indexer, "_config", SimpleNamespace(indexing="background", index_interval=0.0))
    indexer.start()
    await asyncio.sleep(0)  # it has begun, and has a look at once
    monkeypatch.setattr(indexer, "_config", SimpleNamespace(index_interval=1e6))
    while done.count("move") < 5:
        indexer.wake()
        await asyncio.sleep(0)
    batch = ["give", "move", "analyze"]
    assert done == [*batch, *batch, "give", "move", "restore", "give", "move", "give", "move"]


@pytest.mark.parametrize(("lost_before", "during"), [(False, "find_lost_index"), (True, "build_index")])
async def test_an_index_that_is_lost_while_the_background_looks_comes_back(
    make_db: MakeAdapter,
    raw: asyncpg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    lost_before: bool,
    during: str,
) -> None:
    """As by a load that drops it just after the look, or after the build, and fails before either is answered."""
    db = await make_db(indexing="background", index_interval=60.0)
    indexer, executor = db._indexer, db._indexer._executor
    name = "SELECT to_regclass('elizasql.' || elizasql.partition_of($1) || '_dim_384_hnsw') IS NOT NULL"
    lost = False

    def patch(method: str) -> None:
        real: Any = getattr(executor, method)

        async def answer(statement: Any, *args: Any, **params: Any) -> Any:
            nonlocal lost
            given = await real(statement, *args, **params)
            if statement.name == during and not lost:
                lost = True
                assert await indexer.drop()
                indexer.restore()
            return given

        monkeypatch.setattr(executor, method, answer)

    patch("fetch_value")
    patch("fetch_chunks")
    if lost_before:
        assert await indexer.drop()
    indexer.restore()

    async def restored() -> bool:
        return lost and await raw.fetchval(name, db.agent_id)

    await until(restored)


@pytest.mark.parametrize("deleted", [False, True], ids=["moved", "deleted"])
async def test_a_lost_index_comes_back_whatever_has_become_of_the_agent_since(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], deleted: bool
) -> None:
    """It is its neighbours' index, too: who builds it goes by what the partition lacks, not by the agent's width."""
    db = await make_db()
    elsewhere = await make_db(db.agent_id)
    neighbour = await make_db(await neighbour_of(db.agent_id, raw), dimension=None)
    await db.create_memory(Memory(content={"text": "x"}, embedding=V[0], unique=True), "messages")
    index = f"elizasql.{await raw.fetchval('SELECT elizasql.partition_of($1)', db.agent_id)}_dim_384_hnsw"
    assert await db._indexer.drop()
    if deleted:
        await elsewhere.delete_agents([db.agent_id])
    else:
        await elsewhere.reembed(512, lambda texts: np.ones((len(texts), 512)))

    async def look() -> None:
        db._indexer.restore()
        await db._indexer._restore_index()

    for build in (db._indexer.build, db.index_memories, look, neighbour.index_memories):
        await build()
        assert await raw.fetchval("SELECT to_regclass($1)", index) is not None
        await raw.execute(f"DROP INDEX {index}")
    await db._indexer.build()


async def test_the_background_has_the_time_that_a_build_takes(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer by far than a call may take: it would begin again and again, and the index never stand."""
    indexer = (await make_db(timeout=5.0))._indexer
    assert await indexer.drop()
    indexer.restore()
    fetch_chunks, left = indexer._executor.fetch_chunks, []

    async def note(*args: Any, **options: Any) -> Any:
        left.append(current_deadline(0.0) - time.monotonic())
        return await fetch_chunks(*args, **options)

    monkeypatch.setattr(indexer._executor, "fetch_chunks", note)
    assert not await indexer._restore_index()
    assert len(left) == 1 and left[0] > 3600


async def test_a_look_that_fails_is_still_to_be_done(make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    indexer = (await make_db())._indexer

    async def failing(*args: Any, **params: Any) -> Any:
        raise ConnectionLostError("cut")

    indexer.restore()
    monkeypatch.setattr(indexer._executor, "fetch_value", failing)
    with pytest.raises(ConnectionLostError):
        await indexer._restore_index()
    assert indexer._lost


async def test_an_unknown_way_of_indexing_is_refused(make_db: MakeAdapter) -> None:
    with pytest.raises(ConfigurationError, match="indexing"):
        await make_db(indexing="later")
