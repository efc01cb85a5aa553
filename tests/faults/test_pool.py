"""More callers than connections: they wait in order, give up in time, and whoever goes away leaves no trace."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

import elizasql
from elizasql import DatabaseAdapter
from tests.faults.conftest import MakeAdapter
from tests.faults.harness import (
    TYPE,
    Ledger,
    check,
    embedding_of,
    has_embedding,
    memory_of,
    new_id,
    pool_is_whole,
)
from tests.faults.proxy import Proxy
from tests.faults.server import FaultServer, until


async def take_all(db: DatabaseAdapter, size: int, release: asyncio.Event) -> list[asyncio.Task[None]]:
    """Begin so many transactions, which hold a connection each until `release`."""
    begun = 0

    async def hold() -> None:
        nonlocal begun
        async with db.transaction():
            begun += 1
            await release.wait()

    tasks = [asyncio.create_task(hold()) for _ in range(size)]

    async def all_begun() -> bool:
        return begun == size

    await until(all_begun, "every connection is taken")
    return tasks


async def waiting(db: DatabaseAdapter, number: int) -> None:
    async def reached() -> bool:
        return db._connections.interactive.waiting == number

    await until(reached, f"{number} calls wait")


async def test_exhausted_pool_is_said_so_and_says_nothing_about_the_server(make_db: MakeAdapter) -> None:
    # As long as that takes to make three connections on a machine that is busy, too.
    db = await make_db(pool_max_size=3, connection_timeout=2.0, failure_threshold=2)
    release = asyncio.Event()
    holders = await take_all(db, 3, release)
    results = await asyncio.gather(*(db.is_ready() for _ in range(2)), *(reads(db) for _ in range(8)))
    assert results[:2] == [False, False]
    assert all(isinstance(result, elizasql.PoolTimeoutError) for result in results[2:]), results
    assert "all 3 are in use" in str(results[2])
    health = (await db.health())["breaker"]
    assert (health["state"], health["failures"]) == ("closed", 0)
    # Background work has connections of its own.
    assert await db.index_memories() == 0
    release.set()
    await asyncio.gather(*holders)
    assert await reads(db) is None
    await pool_is_whole(db)


async def reads(db: DatabaseAdapter) -> elizasql.ElizaSQLError | None:
    try:
        await db.get_memory_by_id(uuid4())
    except elizasql.ElizaSQLError as error:
        return error
    return None


async def test_callers_are_served_in_the_order_in_which_they_came(make_db: MakeAdapter) -> None:
    db = await make_db(pool_max_size=1, timeout=60.0, connection_timeout=60.0)
    release = asyncio.Event()
    holders = await take_all(db, 1, release)
    served: list[int] = []

    async def call(number: int) -> None:
        await db.get_memory_by_id(uuid4())
        served.append(number)

    tasks = []
    for number in range(30):
        tasks.append(asyncio.create_task(call(number)))
        await waiting(db, number + 1)
    for number in (3, 4, 17):
        tasks[number].cancel()
    release.set()
    await asyncio.gather(*holders, *tasks, return_exceptions=True)
    assert served == [number for number in range(30) if number not in (3, 4, 17)]
    await pool_is_whole(db)


@pytest.mark.parametrize(
    "number", [1000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)], id="10000-slow")]
)
async def test_cancelled_waiters_leave_no_trace(make_db: MakeAdapter, seed: int, number: int) -> None:
    """Calls are cancelled at every point: while they wait, as they are handed a connection, in the middle of a query.

    Invariant: every call that was not cancelled is answered, and afterwards every connection is there and free.
    """
    chance = random.Random(seed)
    db = await make_db(pool_max_size=4, connection_timeout=60.0, timeout=120.0)
    ended = {"answered": 0, "cancelled": 0}

    async def call() -> None:
        try:
            await db.get_memory_by_id(uuid4())
            ended["answered"] += 1
        except asyncio.CancelledError:
            ended["cancelled"] += 1
            raise

    async def wave(size: int) -> None:
        release = asyncio.Event()
        holders = await take_all(db, 4, release) if chance.random() < 0.5 else []
        tasks = [asyncio.create_task(call()) for _ in range(size)]
        doomed = [task for task in tasks if chance.random() < 0.8]
        chance.shuffle(doomed)
        let_go = chance.randrange(len(doomed))
        for position, task in enumerate(doomed):
            if position == let_go:
                # In the same turn of the event loop some are handed a connection and cancelled.
                release.set()
            if chance.random() < 0.3:
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*holders)
        for task in tasks:
            if task not in doomed:
                await task
        await asyncio.gather(*tasks, return_exceptions=True)

    for start in range(0, number, 250):
        await wave(min(250, number - start))
    assert ended["cancelled"] >= number / 2
    assert ended["answered"] + ended["cancelled"] <= number  # some were cancelled before they began
    assert ended["answered"] >= number / 10
    assert (await db.health())["breaker"]["failures"] == 0
    await pool_is_whole(db)


async def test_rollback_that_gets_no_answer_costs_no_place(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer
) -> None:
    """A call is cancelled in the middle of its chunks, and the rollback in the background is swallowed."""
    db = await make_db(dsn=proxy.dsn, pool_max_size=1, batch_size=1, connection_timeout=0.3)
    chance = random.Random(1)
    memories = [memory_of(new_id(chance), 1) for _ in range(50)]
    stored = proxy.when("server", b"C", "note", holding=b"INSERT")
    swallowed = proxy.when("client", b"Q", "hold", holding=b"ROLLBACK")
    task = asyncio.create_task(db.create_memories(memories, TYPE))
    await stored.fired.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await db._connections.interactive.let_go()
    assert swallowed.count == 1
    await proxy.heal()
    assert await reads(db) is None
    assert await db.count_memories() == 0
    await pool_is_whole(db)


async def test_time_limits_of_microseconds_leave_no_trace(make_db: MakeAdapter, seed: int) -> None:
    """As cancelled waiters, by the calls' own time limit."""
    chance = random.Random(seed)
    db = await make_db(pool_max_size=4)
    ended = {"answered": 0, "too late": 0}

    async def call(limit: float) -> None:
        try:
            await db.get_memory_by_id(uuid4(), timeout=limit)
        except (elizasql.DeadlineError, elizasql.PoolTimeoutError):
            ended["too late"] += 1
        else:
            ended["answered"] += 1

    for _ in range(4):
        await asyncio.gather(*(call(10 ** chance.uniform(-5, 1)) for _ in range(100)))
    assert ended["answered"] > 20 and ended["too late"] > 20, ended
    await pool_is_whole(db)


@pytest.mark.parametrize(
    "number", [1000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)], id="10000-slow")]
)
async def test_searches_far_beyond_the_pool(make_db: MakeAdapter, server: FaultServer, seed: int, number: int) -> None:
    """All at once on eight connections: each finds what is its own, writes among them are not starved."""
    chance = random.Random(seed)
    db = await make_db(pool_max_size=8, connection_timeout=300.0, timeout=600.0)
    ledger = Ledger(db.agent_id)
    ids = [id for id in (new_id(chance) for _ in range(400)) if has_embedding(id)]
    operation = ledger.begin(dict.fromkeys(ids, 1))
    await db.create_memories([memory_of(id, 1) for id in ids], TYPE)
    operation.acknowledge()
    vectors = {id: embedding_of(id, 1) for id in ids}
    done: list[Any] = []

    async def search(id: UUID) -> None:
        hits = await db.search_memories(embedding=vectors[id], table_name=TYPE, count=1)
        assert [hit.id for hit in hits] == [id]
        done.append(id)

    async def write(id: UUID) -> None:
        written = ledger.begin({id: 1})
        await db.create_memory(memory_of(id, 1), TYPE)
        written.acknowledge()
        done.append("write")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls = [search(chance.choice(ids)) for _ in range(number)]
    # In the middle of the queue, so that searches come before and after.
    calls[number // 2 : number // 2] = [write(new_id(chance)) for _ in range(20)]
    await asyncio.gather(*calls)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{number} searches: {grown:.0f} MB more")
    assert len(done) == number + 20
    places = [place for place, what in enumerate(done) if what == "write"]
    assert places[-1] < number * 0.9, "writes wait for searches that came after them"
    assert db._connections.interactive.size <= 8
    assert grown < 60 + number * 0.03
    assert await check(server.dsn, ledger) == []
    await pool_is_whole(db)


async def test_server_that_is_full_for_a_while(make_db: MakeAdapter, server: FaultServer) -> None:
    """53300 is tried again, and succeeds when others have gone."""
    db = await make_db(pool_max_size=3, base_delay=0.1, max_delay=0.3, max_retries=100, timeout=60.0)
    await db._connections.interactive.replace()
    async with server.admin() as admin:
        most: int = await admin.fetchval("SELECT current_setting('max_connections')::int")
        reserved: int = await admin.fetchval("SELECT current_setting('superuser_reserved_connections')::int")
    others: list[asyncpg.Connection[Any]] = []
    try:
        with pytest.raises(asyncpg.TooManyConnectionsError):
            while len(others) < most:
                others.append(await asyncpg.connect(server.dsn))
        assert len(others) >= most - reserved - 3
        before = db._meter.retries
        id = uuid4()
        tasks = [
            asyncio.create_task(db.get_memory_by_id(id)),
            asyncio.create_task(db.create_memory(memory_of(id, 1), TYPE)),
        ]

        async def tried_again() -> bool:
            return db._meter.retries >= before + 2

        await until(tried_again, "the calls are tried again")
        assert not any(task.done() for task in tasks)
        with pytest.raises(elizasql.ServerBusyError) as caught:
            await elizasql.open(agent_id=uuid4(), dsn=server.dsn)
        assert caught.value.sqlstate == "53300"
    finally:
        for other in others:
            other.terminate()
    assert await tasks[1] == id
    await tasks[0]
    await pool_is_whole(db)


# --- connections that are of no use any more -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["call", "batch", "transaction", "savepoint"])
async def test_connections_to_a_standby_are_replaced(
    make_db: MakeAdapter, server: FaultServer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """All were made before the failover. One try tells; inside a transaction the caller has to make the next one."""
    db = await make_db(pool_max_size=3, batch_size=1)
    lane, chance = db._connections.interactive, random.Random(1)
    memories = [memory_of(new_id(chance), 1) for _ in range(2)]
    connections = [(await lane.acquire(5))[0] for _ in range(3)]
    pids = {connection.get_server_pid() for connection in connections}
    for connection in connections:
        # As on a server that was a standby when they were made: for the session, whatever is asked of it.
        await connection.execute("SET default_transaction_read_only = on")
        lane.keep(connection)
    said = SimpleNamespace(default_transaction_read_only="off", in_hot_standby="on")
    monkeypatch.setattr(asyncpg.Connection, "get_settings", lambda self: said)

    async def write() -> None:
        if kind == "call":
            await db.create_memory(memories[0], TYPE)
        elif kind == "batch":
            await db.create_memories(memories, TYPE)
        else:
            async with db.transaction() as tx:
                if kind == "transaction":
                    await tx.create_memory(memories[0], TYPE)
                else:
                    async with tx.transaction() as inner:
                        await inner.create_memories(memories, TYPE)

    if kind in ("transaction", "savepoint"):
        with pytest.raises(elizasql.UnavailableError) as caught:
            await write()
        assert (caught.value.sqlstate, caught.value.retryable) == ("25006", True)
        await write()
        assert db._meter.retries == 0
    else:
        await write()
        assert db._meter.retries == 1
    await lane.let_go()
    await db.create_memory(memory_of(new_id(chance), 1), TYPE)
    assert not pids & set(await server.backends(db.config.application_name))
    assert db._connections.breaker.failures == 0
    await pool_is_whole(db)


@pytest.mark.parametrize("kind", ["call", "batch", "transaction", "savepoint"])
@pytest.mark.parametrize("settings", [{}, {"prepared_statements": False}], ids=["prepared", "unprepared"])
async def test_a_role_that_may_only_read_is_told_so_at_once(
    make_db: MakeAdapter, server: FaultServer, kind: str, settings: dict[str, Any]
) -> None:
    """No wait mends that, as it may for a standby; where the setting is gone, the next call finds it so."""
    agent_id, chance = (await make_db()).agent_id, random.Random(1)
    memories = [memory_of(new_id(chance), 1) for _ in range(2)]
    async with server.admin() as admin:
        await admin.execute("CREATE ROLE reader LOGIN IN ROLE elizasql")
        await admin.execute("ALTER ROLE reader SET default_transaction_read_only = on")
        dsn = server.dsn.replace("//elizasql@", "//reader@")
        try:
            async with elizasql.connect(
                agent_id=agent_id, dsn=dsn, indexing="manual", batch_size=1, base_delay=1000.0, **settings
            ) as db:
                for number in (1, 2):
                    with pytest.raises(elizasql.PermissionDeniedError, match="default_transaction_read_only") as caught:
                        async with contextlib.AsyncExitStack() as stack:
                            tx = db
                            for _ in range({"transaction": 1, "savepoint": 2}.get(kind, 0)):
                                tx = await stack.enter_async_context(tx.transaction())
                            await (
                                tx.create_memories(memories, TYPE)
                                if kind == "batch"
                                else tx.create_memory(memories[0], TYPE)
                            )
                    assert (caught.value.sqlstate, caught.value.retryable) == ("25006", False)
                    # The connection was made before the call: a second one tells whether a new one is no better.
                    assert db._meter.retries == (0 if tx is not db else number)
                    assert await db.get_memories_by_ids([memory.id for memory in memories if memory.id]) == []
                assert db._connections.breaker.failures == 0
                await pool_is_whole(db)
                await admin.execute("ALTER ROLE reader RESET default_transaction_read_only")
                await db.create_memory(memories[0], TYPE)
        finally:
            await admin.execute("DROP ROLE reader")
