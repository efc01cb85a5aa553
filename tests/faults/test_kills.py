"""Processes are killed while they work: sessions, the server, clients. No acknowledged write is lost.

The invariant of every test: what was acknowledged is stored, what is stored was attempted, memory and embedding and
the parts of a batch are there together or not at all; every call ends within its time limit and a second, with a
result or an error of the library; nothing is left in a transaction, and the next call succeeds.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

import elizasql
from elizasql import DatabaseAdapter, _embedded
from elizasql._statements import SQL
from tests.faults.conftest import MakeAdapter, make_room
from tests.faults.harness import TYPE, Ledger, Workload, check, check_indexes, memory_of, new_id, pool_is_whole
from tests.faults.server import FaultServer, count, until
from tests.test_embedded import running

REPOSITORY = Path(__file__).parents[2]

Kill = Callable[[], Awaitable[Any]]


@asynccontextmanager
async def under_load(
    make_db: MakeAdapter, server: FaultServer, seed: int, *, agents: int = 2, **settings: Any
) -> AsyncIterator[list[Workload]]:
    """Run workloads of several agents; at the end hold them to the invariant."""
    settings = {"batch_size": 5, "timeout": 6.0, "indexing": "background", "index_interval": 1.5, **settings}
    async with AsyncExitStack() as stack:
        works = []
        for number in range(agents):
            db = await make_db(**settings)
            work = Workload(db, seed=seed + number, timeout=settings["timeout"], room_id=await make_room(db))
            works.append(await stack.enter_async_context(work))
        yield works
        await server.recovered()
        for work in works:
            await work.advance(3)
    for work in works:
        print(work)
        assert work.figures.violations == [], work
        assert await check(server.dsn, work.ledger) == [], work
        await server.no_idle_transactions(work.db.config.application_name)
        await tail_is_indexed(work.db)
        await pool_is_whole(work.db)
    async with server.admin() as admin:
        assert await check_indexes(admin) == []


async def tail_is_indexed(db: DatabaseAdapter) -> None:
    """After many crashes it is long; until it is gone the indexer has a connection."""

    async def gone() -> bool:
        return bool((await db.stats())["unindexed"] == 0)

    await until(gone, "every vector is indexed", 300)


def slow(seconds: float, *, rounds: float) -> Any:
    return pytest.param(rounds, marks=[pytest.mark.slow, pytest.mark.timeout(seconds)], id=f"{rounds}-slow")


# --- sessions --------------------------------------------------------------------------------------------------------


async def test_end_of_a_session_that_is_seen_late(make_db: MakeAdapter) -> None:
    """The pool says goodbye to a session that is gone already; no error of that is left for nobody (`no_leaks`)."""
    db = await make_db(pool_max_size=1)
    lane = db._executor.lane
    connection, _ = await lane.acquire(5)
    pid = connection.get_server_pid()
    lane.give_back(connection)
    await lane.let_go()
    os.kill(pid, signal.SIGTERM)
    count("sessions by SIGTERM", under_load=False)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.001)  # the loop must not see the end before
    await lane.replace()
    assert await db.get_memory_by_id(uuid4()) is None


async def test_end_of_a_session_that_is_announced(make_db: MakeAdapter) -> None:
    """The server says goodbye and hangs up some milliseconds later: what the driver does not send was not done."""
    db = await make_db(pool_max_size=1)
    lane = db._executor.lane
    connection, _ = await lane.acquire(5)
    lane.keep(connection)
    said = b"".join(part + b"\0" for part in (b"SFATAL", b"C57P01", b"Mterminating connection", b""))
    connection._protocol.data_received(b"E" + (len(said) + 4).to_bytes(4, "big") + said)
    assert await db.delete_memories([uuid4()]) == 0
    assert not SQL["delete_memories"].repeatable


@pytest.mark.parametrize("rounds", [6, slow(600, rounds=60)])
async def test_sessions_are_killed_under_load(
    make_db: MakeAdapter, server: FaultServer, seed: int, rounds: int
) -> None:
    """About every second a session dies by SIGKILL; the server throws everybody out, recovers, and goes on."""
    chance = random.Random(seed)
    kills = 0
    async with under_load(make_db, server, seed) as works:
        name = works[0].db.config.application_name
        while kills < rounds:
            # The rhythm of the kills, not a wait for something.
            await asyncio.sleep(chance.uniform(0.05, 0.9))
            kills += await server.kill_backend(chance, name) is not None
            await server.recovered()
            for work in works:
                await work.advance(1)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_hundred_and_fifty_kills(make_db: MakeAdapter, server: FaultServer, seed: int) -> None:
    """As often as the server can take it: a session dies as soon as some writes went well since the last time."""
    chance = random.Random(seed)
    kills = 0
    async with under_load(make_db, server, seed) as works:
        name = works[0].db.config.application_name
        while kills < 150:
            await server.recovered()
            for work in works:
                await work.advance(chance.randint(1, 10))
            kills += await server.kill_backend(chance, name) is not None


@pytest.mark.parametrize("rounds", [20, slow(300, rounds=600)])
async def test_sessions_are_ended_by_an_administrator(
    make_db: MakeAdapter, server: FaultServer, seed: int, rounds: int
) -> None:
    """One session ends while the server is well: only the call on it may notice, and what is repeatable does not."""
    chance = random.Random(seed)
    async with under_load(make_db, server, seed) as works:
        name = works[0].db.config.application_name
        ended = 0
        while ended < rounds:
            await works[0].advance(1)
            ended += await server.terminate_backend(chance, name) is not None


async def test_one_crash_with_the_settings_as_they_are_is_not_noticed(
    server: FaultServer, make_db: MakeAdapter
) -> None:
    """Reads and repeatable writes that run while the server crashes all succeed: waits of a second outlast it."""
    defaults = {"base_delay": 1.0, "max_delay": 10.0, "jitter_max": 1.0, "failure_threshold": 5, "reset_timeout": 60.0}
    db = await make_db(timeout=60.0, connection_timeout=5.0, pool_max_size=8, **defaults)
    chance = random.Random(1)
    ids = [new_id(chance) for _ in range(40)]
    crashed = asyncio.Event()

    async def work(own: list[UUID]) -> int:
        done = 0
        while not crashed.is_set():
            for id in own:
                await db.create_memory(memory_of(id, 1), TYPE)
                assert await db.get_memory_by_id(id) is not None
                done += 1
        return done

    tasks = [asyncio.create_task(work(ids[number::8])) for number in range(8)]
    calls = db._meter.snapshot

    async def begun() -> bool:
        return bool(calls().get("create_memory", {"count": 0})["count"] > 20)

    await until(begun, "the calls are running")
    async with server.admin() as admin:
        await admin.execute("CHECKPOINT")  # else the recovery does anew what the tests before this one did
    assert await server.kill_backend(chance, db.config.application_name)
    await server.recovered()
    crashed.set()
    assert all(await asyncio.gather(*tasks))
    assert db._meter.retries > 0
    assert (await db.health())["breaker"]["state"] == "closed"
    ledger = Ledger(db.agent_id)
    ledger.begin(dict.fromkeys(ids, 1)).acknowledge()
    assert await check(server.dsn, ledger) == []


@pytest.mark.parametrize("when", ["idle", "idle, no tick", "in a transaction", "before the end of a transaction"])
async def test_session_is_ended_at_a_certain_point(server: FaultServer, make_db: MakeAdapter, when: str) -> None:
    """Whatever the session was doing: a single call does not notice, a transaction fails as a whole, and says so."""
    db = await make_db(pool_max_size=1)
    app = db.config.application_name
    chance = random.Random(1)
    a, b = new_id(chance), new_id(chance)
    ledger = Ledger(db.agent_id)

    async def end() -> None:
        (pid,) = await server.backends(app)
        async with server.admin() as admin:
            assert await admin.fetchval("SELECT pg_terminate_backend($1, 10000)", pid)

    if when.startswith("idle"):
        (pid,) = await server.backends(app)
        if when == "idle":
            await end()
        else:
            # The event loop has not seen it when the next call is made: only the call itself finds out.
            async with server.admin() as admin:
                gone = asyncio.create_task(admin.execute("SELECT pg_terminate_backend($1, 10000)", pid))
                await asyncio.sleep(0)
                os.kill(pid, signal.SIGTERM)
                while Path(f"/proc/{pid}").exists():
                    time.sleep(0.005)  # the loop must stand still
                await asyncio.gather(gone, return_exceptions=True)
        await db.create_memory(memory_of(a, 1), TYPE)
        ledger.begin({a: 1}).acknowledge()
    else:
        operation = ledger.begin({a: 1, b: 1})
        with pytest.raises(elizasql.UnavailableError):
            async with db.transaction() as tx:
                await tx.create_memory(memory_of(a, 1), TYPE)
                if when == "in a transaction":
                    await end()
                await tx.create_memory(memory_of(b, 1), TYPE)
                if when == "before the end of a transaction":
                    await end()
        operation.refuse()
    assert await check(server.dsn, ledger) == []
    assert await db.count_memories() == len(ledger.acknowledged)
    await pool_is_whole(db)


# --- the server ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [3, slow(600, rounds=20)])
async def test_postmaster_is_killed_in_the_middle_of_a_batch(
    make_db: MakeAdapter, server: FaultServer, seed: int, rounds: int
) -> None:
    """Its sessions end one after the other, and the next start recovers."""
    async with under_load(make_db, server, seed, timeout=4.0) as works:
        name = works[0].db.config.application_name
        for _ in range(rounds):
            async with server.admin() as admin:

                async def in_the_middle(admin: asyncpg.Connection[Any] = admin) -> bool:
                    # A batch of several chunks is a transaction that has written.
                    return bool(
                        await admin.fetchval(
                            "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
                            " AND backend_xid IS NOT NULL",
                            name,
                        )
                    )

                await until(in_the_middle, "a batch is under way")
                server.kill_postmaster()
            await server.start(migrate=False)
            for work in works:
                await work.advance(5)


async def test_postmaster_is_killed_between_the_chunks_of_a_batch(
    make_db: MakeAdapter, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first chunk is written and the second one waits for a lock: none of it may be there afterwards."""

    async def not_ours(dsn: str, timeout: float) -> bool:
        return False

    monkeypatch.setattr(_embedded, "revive", not_ours)  # which would do the batch again
    db = await make_db(batch_size=4, timeout=3.0, max_retries=1)
    chance = random.Random(2)
    ids = [new_id(chance) for _ in range(8)]
    ledger = Ledger(db.agent_id)
    last = max(ids)
    await db.create_memory(memory_of(last, 1), TYPE)
    ledger.begin({last: 1}).acknowledge()
    ids = [*sorted(set(ids) - {last}), last]
    raw = await asyncpg.connect(server.admin_dsn)
    await raw.execute("BEGIN")
    await raw.execute("SELECT FROM elizasql.memories WHERE agent_id = $1 AND id = $2 FOR UPDATE", db.agent_id, last)
    operation = ledger.begin({id: 2 if id == last else 1 for id in ids})
    batch = [memory_of(id, operation.wanted[id]) for id in ids]
    task = asyncio.create_task(db.upsert_memories(batch, TYPE))

    async def waits() -> bool:
        question = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
        return bool(await raw.fetchval(question))

    await until(waits, "the second chunk waits")
    server.kill_postmaster()
    with pytest.raises(elizasql.UnavailableError):
        await task
    raw.terminate()
    await server.start(migrate=False)
    operation.refuse()
    assert await check(server.dsn, ledger) == []
    await db.upsert_memories(batch, TYPE)
    ledger.begin(operation.wanted).acknowledge()
    assert await check(server.dsn, ledger) == []


# --- clients ---------------------------------------------------------------------------------------------------------


async def killed_client(
    target: str, agent: UUID, seed: int, signal_number: signal.Signals, ledger: Ledger, batches: int, delay: float
) -> int:
    """Start a client and kill it in the middle of a batch; notes in the ledger what it said. Gives its exit code."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.client", target, str(agent), str(seed)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=REPOSITORY,
    )
    assert process.stdout is not None and process.stderr is not None
    said: list[bytes] = []
    try:
        while said.count(b"=\n") < batches or said[-1] == b"=\n":
            line = await asyncio.wait_for(process.stdout.readline(), 60)
            if not line:
                raise AssertionError((await process.stderr.read()).decode())
            said.append(line)
        # Somewhere in the batch; which part of it is what the seed is for.
        await asyncio.sleep(delay)
        process.send_signal(signal_number)
        count(f"clients by {signal_number.name}")
        rest, errors = await asyncio.wait_for(process.communicate(), 30)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    said += rest.splitlines(keepends=True)
    assert b"Traceback" not in errors or signal_number is signal.SIGTERM, errors.decode()
    chance = random.Random(seed)
    operation = None
    for line in said:
        if line.startswith(b"+"):
            operation = ledger.begin({new_id(chance): 1 for _ in range(int(line[1:]))})
        elif operation is not None:
            operation.acknowledge()
            operation = None
    if operation is not None:
        operation.lose()
    assert process.returncode is not None
    return process.returncode


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rounds", [1, slow(600, rounds=20)])
async def test_client_is_killed_in_the_middle_of_a_batch(
    server: FaultServer, seed: int, kind: signal.Signals, rounds: int
) -> None:
    """What it had been told is stored; its last batch is there as a whole or not at all; its sessions end."""
    chance = random.Random(seed)
    ledger = Ledger(uuid4())
    for number in range(rounds):
        code = await killed_client(
            server.dsn, ledger.agent_id, seed + number, kind, ledger, 1 + number % 4, chance.random() * 0.03
        )
        assert code == -kind
        await server.no_sessions(f"client-{seed + number}")
        assert await check(server.dsn, ledger) == []
    assert ledger.attempted
    assert len(ledger.lost) <= rounds


@pytest.mark.parametrize("rounds", [2, slow(600, rounds=12)])
async def test_client_with_an_embedded_server_is_killed(seed: int, tmp_path: Path, rounds: int) -> None:
    """By SIGTERM it takes its server along; by SIGKILL the server stays, and the next client takes both over."""
    server = FaultServer()
    chance = random.Random(seed)
    ledger = Ledger(uuid4())
    try:
        for number in range(rounds):
            kind = (signal.SIGKILL, signal.SIGTERM)[number % 2]
            code = await killed_client(
                str(server.home), ledger.agent_id, seed + number, kind, ledger, 2, chance.random() * 0.03
            )
            assert code == -kind
            if kind is signal.SIGTERM:
                assert not running(server.home)
        await server.start(migrate=False)
        assert await check(server.dsn, ledger) == []
    finally:
        await server.stop()
    assert not running(server.home) if server.home.exists() else True
