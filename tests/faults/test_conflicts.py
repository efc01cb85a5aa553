"""Transactions get into each other's way: deadlocks, locks that are not let go, plans that no longer fit.

The invariant: what the server has undone is tried again, and is there exactly once; inside of a transaction, where it
cannot be tried again, the caller gets an error of the right kind and nothing of it is stored.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest

import elizasql
from elizasql import DatabaseAdapter
from tests.faults.conftest import MakeAdapter, make_room
from tests.faults.harness import (
    TYPE,
    WIDTH,
    Ledger,
    Workload,
    check,
    content_of,
    embedding_of,
    has_embedding,
    memory_of,
    new_id,
    pool_is_whole,
)
from tests.faults.server import FaultServer, until, with_database


@pytest.fixture
async def hasty(server: FaultServer) -> AsyncIterator[None]:
    """Let the server look for deadlocks after 50 ms, and so end the library's session instead of the test's."""
    async with server.admin() as admin:
        await admin.execute("ALTER ROLE elizasql SET deadlock_timeout = '50ms'")
        yield
        await admin.execute("ALTER ROLE elizasql RESET deadlock_timeout")


async def lock(raw: asyncpg.Connection[Any], db: DatabaseAdapter, id: UUID) -> None:
    await raw.execute("SELECT FROM elizasql.memories WHERE agent_id = $1 AND id = $2 FOR UPDATE", db.agent_id, id)


async def waits_for(raw: asyncpg.Connection[Any], task: asyncio.Task[Any]) -> None:
    """Wait until a session waits for `raw`."""

    async def blocked() -> bool:
        assert not task.done(), task
        question = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
        return bool(await raw.fetchval(question))

    await until(blocked, "somebody waits")


async def deadlock(raw: asyncpg.Connection[Any], db: DatabaseAdapter, task: asyncio.Task[Any], id: UUID) -> None:
    """Close the circle: take what the library's session has, which waits for us; returns when that was undone."""
    await waits_for(raw, task)
    await raw.execute("SET LOCAL deadlock_timeout = '1h'")
    await lock(raw, db, id)


async def test_deadlock_of_a_statement_is_tried_again(make_db: MakeAdapter, server: FaultServer, hasty: None) -> None:
    db = await make_db(base_delay=1.0, max_delay=10.0, jitter_max=1.0)
    chance = random.Random(1)
    ledger = Ledger(db.agent_id)
    a, b = sorted(new_id(chance) for _ in range(2))
    await db.create_memories([memory_of(id, 1) for id in (a, b)], TYPE)
    ledger.begin({a: 1, b: 1}).acknowledge()
    async with server.admin() as raw:
        async with raw.transaction():
            await lock(raw, db, b)
            task = asyncio.create_task(db.upsert_memories([memory_of(id, 2) for id in (b, a)], TYPE))
            await deadlock(raw, db, task, a)
            assert not task.done()
        assert await task == [b, a]
    ledger.begin({a: 2, b: 2}).acknowledge()
    assert db._meter.retries >= 1
    assert await check(server.dsn, ledger) == []
    assert (await db.health())["breaker"]["failures"] == 0


async def test_deadlock_of_a_batch_of_several_chunks_is_tried_again_as_a_whole(
    make_db: MakeAdapter, server: FaultServer, hasty: None
) -> None:
    db = await make_db(batch_size=2)
    chance = random.Random(1)
    ledger = Ledger(db.agent_id)
    ids = sorted(new_id(chance) for _ in range(8))
    await db.create_memories([memory_of(id, 1) for id in ids], TYPE)
    ledger.begin(dict.fromkeys(ids, 1)).acknowledge()
    async with server.admin() as raw:
        async with raw.transaction():
            await lock(raw, db, ids[-1])
            task = asyncio.create_task(db.upsert_memories([memory_of(id, 2) for id in ids], TYPE))
            await deadlock(raw, db, task, ids[0])
        assert await task == ids
    ledger.begin(dict.fromkeys(ids, 2)).acknowledge()
    assert await check(server.dsn, ledger) == []


async def test_deadlock_in_a_transaction_is_the_callers(make_db: MakeAdapter, server: FaultServer, hasty: None) -> None:
    """What else the transaction did is not known here: it is undone, and the caller may do it all again."""
    db = await make_db()
    chance = random.Random(1)
    ledger = Ledger(db.agent_id)
    a, b, c = (new_id(chance) for _ in range(3))
    await db.create_memories([memory_of(id, 1) for id in (a, b)], TYPE)
    ledger.begin({a: 1, b: 1}).acknowledge()

    async def transact() -> None:
        async with db.transaction() as tx:
            await tx.create_memory(memory_of(c, 1), TYPE)
            await tx.update_memory({"id": a, "content": content_of(a, 2)})
            await tx.update_memory({"id": b, "content": content_of(b, 2)})

    async with server.admin() as raw:
        async with raw.transaction():
            await lock(raw, db, b)
            task = asyncio.create_task(transact())
            await deadlock(raw, db, task, a)
        with pytest.raises(elizasql.DeadlockError) as caught:
            await task
        assert caught.value.retryable
    assert await check(server.dsn, ledger) == []
    await transact()
    assert await db.get_memory_by_id(c) is not None
    await pool_is_whole(db)


async def test_batches_in_opposite_orders_are_all_written(
    make_db: MakeAdapter, server: FaultServer, hasty: None, seed: int
) -> None:
    """Two adapters of one agent replace the same memories, one forwards and one backwards, over and over."""
    rounds = 6
    one = await make_db(batch_size=5, max_retries=50)
    two = await make_db(one.agent_id, batch_size=5, max_retries=50)
    chance = random.Random(seed)
    ids = [new_id(chance) for _ in range(40)]
    await one.create_memories([memory_of(id, 1) for id in ids], TYPE)

    async def replace(db: DatabaseAdapter, order: list[UUID], first: int) -> None:
        for version in range(first, first + 2 * rounds, 2):
            assert await db.upsert_memories([memory_of(id, version) for id in order], TYPE) == order

    await asyncio.gather(replace(one, ids, 2), replace(two, ids[::-1], 3))
    assert one._meter.retries == two._meter.retries == 0  # both take the rows in the order of their ids
    stored = await one.get_memories(table_name=TYPE)
    versions = {memory.content["version"] for memory in stored}  # type: ignore[index]
    assert len(stored) == 40
    # One after the other, whole: whoever came last, all is from its last batch.
    assert versions in ({2 * rounds}, {2 * rounds + 1})
    ledger = Ledger(one.agent_id)
    ledger.begin(dict.fromkeys(ids, versions.pop())).acknowledge()
    assert await check(server.dsn, ledger) == []


async def test_lock_that_is_not_let_go_ends_the_call_in_time(make_db: MakeAdapter, server: FaultServer) -> None:
    """The call ends, and so does the statement on the server: it does not go on waiting behind the caller's back."""
    db = await make_db(pool_max_size=2)
    id = uuid4()
    await db.create_memory(memory_of(id, 1), TYPE)
    async with server.admin() as raw:
        async with raw.transaction():
            await lock(raw, db, id)
            with pytest.raises(elizasql.DeadlineError):
                await db.update_memory({"id": id, "content": content_of(id, 2)}, timeout=0.3)

            async def nobody_waits() -> bool:
                return not await raw.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted")

            await until(nobody_waits, "the statement was cancelled")
        found = await db.get_memory_by_id(id)
        assert found is not None and found.content == content_of(id, 1)
    assert (await db.health())["breaker"]["failures"] == 0
    await pool_is_whole(db)


# --- the schema changes while it is used -----------------------------------------------------------------------------


async def administer(admin: asyncpg.Connection[Any], statement: str) -> None:
    """Run a statement, again where a deadlock ended it: REINDEX and VACUUM FULL lock a table, then its indexes, and a
    transaction that has read the table and then writes to it stands in the way. Either may be the one to give way."""
    for _ in range(10):
        try:
            await admin.execute(statement, timeout=60)
        except asyncpg.DeadlockDetectedError:
            continue
        return
    raise AssertionError(f"ten deadlocks: {statement}")


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
async def test_schema_changes_under_load(make_db: MakeAdapter, server: FaultServer, seed: int, rounds: int) -> None:
    """An administrator adds columns, rebuilds indexes, rewrites tables, and makes statistics: nobody notices."""
    db = await make_db(
        batch_size=5, timeout=30.0, connection_timeout=30.0, max_retries=30, indexing="background", index_interval=1.5
    )
    work = Workload(db, seed=seed, timeout=30, room_id=await make_room(db), writers=3, readers=2)
    async with work, server.admin() as admin:
        await work.advance(20)
        partition = await admin.fetchval(
            "SELECT tableoid::regclass::text FROM elizasql.embeddings WHERE agent_id = $1 LIMIT 1", db.agent_id
        )
        assert partition.startswith("elizasql.embeddings_p")
        memories = partition.replace("embeddings", "memories")
        for _ in range(rounds):
            for statement in (
                "ALTER TABLE elizasql.memories ADD COLUMN added integer NOT NULL DEFAULT 7",
                "ALTER TABLE elizasql.embeddings ADD COLUMN added text",
                f"REINDEX TABLE {memories}",
                f"REINDEX TABLE {partition}",
                f"REINDEX INDEX CONCURRENTLY {partition}_pkey",
                f"VACUUM FULL {partition}",
                f"VACUUM FULL {memories}",
                f"VACUUM (ANALYZE) {partition}",
                f"ANALYZE {memories}",
                "ALTER TABLE elizasql.memories DROP COLUMN added",
                "ALTER TABLE elizasql.embeddings DROP COLUMN added",
                "ALTER TABLE elizasql.rooms ALTER COLUMN source TYPE varchar(100)",
                "ALTER TABLE elizasql.rooms ALTER COLUMN source TYPE text",
            ):
                await administer(admin, statement)
                await work.advance(1 if rounds == 1 else 3)
    print(work)
    assert work.figures.violations == [], work
    # A batch that is in the way of a table's rewriting may lose a deadlock against it, and is tried again; of a
    # transaction that is the caller's business.
    assert set(work.figures.errors) <= {"ForeignKeyError", "DeadlockError", "SchemaError", "TransactionError"}, work
    assert work.ledger.counts["unknown"] <= 3 * rounds, work
    assert await check(server.dsn, work.ledger) == []
    await pool_is_whole(db)


async def test_plan_that_no_longer_fits_is_made_anew(make_db: MakeAdapter, server: FaultServer) -> None:
    """A prepared statement gives other types than it promised: the server refuses it, and nobody notices."""
    db = await make_db(pool_max_size=1)
    room = await make_room(db)
    assert await db.get_room(room) is not None
    async with server.admin() as admin:
        for kind in ("varchar(100)", "text", "varchar(50)", "text"):
            await admin.execute(f"ALTER TABLE elizasql.rooms ALTER COLUMN source TYPE {kind}")
            found = await db.get_room(room)
            assert found is not None and found.source == "test"
            assert [room.id for room in await db.get_rooms_by_ids([room])] == [room]
    assert (await db.health())["breaker"]["failures"] == 0


async def test_types_that_were_made_anew(server: FaultServer) -> None:
    """A dump was restored under a running process: the types have other numbers, the driver's codecs not."""
    async with server.admin() as admin:
        await admin.execute("DROP DATABASE IF EXISTS restored WITH (FORCE)")
        await admin.execute("CREATE DATABASE restored")
    dsn = with_database(server.admin_dsn, "restored")
    async with elizasql.connect(agent_id=uuid4(), dsn=dsn, indexing="manual", pool_max_size=3, resident="off") as db:
        chance = random.Random(1)
        ids = [id for id in (new_id(chance) for _ in range(20)) if has_embedding(id)]

        async def begin() -> None:
            await db.ensure_agent_exists({"name": "x"})
            await db.ensure_embedding_dimension(WIDTH)

        async def use(id: UUID) -> None:
            await db.create_memory(memory_of(id, 1), TYPE)
            found = await db.get_memory_by_id(id, include_embedding=True)
            assert found is not None and isinstance(found.embedding, np.ndarray)
            await db.search_memories(embedding=embedding_of(id, 1), table_name=TYPE)

        await begin()
        await asyncio.gather(*(use(id) for id in ids[:3]))
        async with server.admin("restored") as admin:
            await admin.execute("DROP SCHEMA elizasql CASCADE; DROP EXTENSION vector CASCADE")
        async with elizasql.connect(agent_id=uuid4(), dsn=dsn, indexing="manual", application_name="restores"):
            pass
        await begin()
        refused = 0
        for id in ids[3:]:
            try:
                await use(id)
            except elizasql.InternalError:
                refused += 1  # what was prepared for the old types; once for a connection
        assert refused <= 3
        assert db._connections.breaker.failures == 0
    async with server.admin() as admin:
        await admin.execute("DROP DATABASE restored WITH (FORCE)")


async def test_plan_that_no_longer_fits_in_a_transaction(make_db: MakeAdapter, server: FaultServer) -> None:
    """The server has ended the transaction: the caller hears of it, and the next one goes well."""
    db = await make_db(pool_max_size=1)
    room = await make_room(db)
    assert await db.get_room(room) is not None
    async with server.admin() as admin:
        await admin.execute("ALTER TABLE elizasql.rooms ALTER COLUMN source TYPE varchar(100)")
        try:
            with pytest.raises(elizasql.ElizaSQLError) as caught:
                async with db.transaction() as tx:
                    await tx.create_memory(memory_of(uuid4(), 1), TYPE)
                    await tx.get_room(room)
            assert isinstance(caught.value, (elizasql.SchemaError, elizasql.TransactionError)), repr(caught.value)
            async with db.transaction() as tx:
                assert await tx.get_room(room) is not None
        finally:
            await admin.execute("ALTER TABLE elizasql.rooms ALTER COLUMN source TYPE text")
    assert await db.count_memories() == 0
    assert (await db.health())["breaker"]["failures"] == 0
    await pool_is_whole(db)
