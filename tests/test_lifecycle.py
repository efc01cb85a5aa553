"""Connections from the first adapter to the last, and the end of the process: who shares, who closes, what is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import numpy as np
import pytest

import elizasql
from elizasql import DatabaseAdapter, Memory, _embedded, _pool, _registry
from tests.conftest import MakeAdapter, make_scene
from tests.locking import blocked_pid, locked


def memory(text: str = "x", **fields: Any) -> Memory:
    return Memory(content={"text": text}, **fields)


async def backends(raw: asyncpg.Connection[Any], name: str) -> int:
    count: int = await raw.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name)
    return count


async def gone(raw: asyncpg.Connection[Any], name: str) -> bool:
    """Wait until the server has ended every backend of that name."""
    for _ in range(2000):
        if not await backends(raw, name):
            return True
        await asyncio.sleep(0.005)
    return False


# --- who shares ------------------------------------------------------------------------------------------------------


async def test_adapters_share_their_connections_and_the_last_one_closes_them(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    name = f"test {uuid4()}"
    options: dict[str, Any] = {"application_name": name, "pool_max_size": 3}
    options["connection_timeout"] = 600.0  # what closing would wait for a connection that nobody gives back
    first, second = await make_db(**options), await make_db(**options)
    assert first._connections is second._connections
    await asyncio.gather(*(db.create_memory(memory(), "messages") for db in (first, second) for _ in range(30)))
    assert await backends(raw, name) <= 3
    await first.close()
    await first.close()
    assert await second.count_memories() == 30
    with pytest.raises(elizasql.ClosedError):
        await first.count_memories()
    await second.close()
    assert await gone(raw, name)


async def test_adapters_that_open_at_once_make_one_pool(dsn: str, raw: asyncpg.Connection[Any]) -> None:
    name = f"test {uuid4()}"
    opened = await asyncio.gather(
        *(elizasql.open(agent_id=uuid4(), dsn=dsn, application_name=name, indexing="manual") for _ in range(8))
    )
    assert len({id(db._connections) for db in opened}) == 1
    assert opened[0]._connections.users == 8
    await asyncio.gather(*(db.close() for db in opened))
    assert await gone(raw, name)


@pytest.mark.parametrize(
    "different", [{"ef_search": 50}, {"pool_max_size": 4}, {"application_name": "other"}, {"failure_threshold": 2}]
)
async def test_other_settings_of_the_connections_are_other_connections(
    make_db: MakeAdapter, different: dict[str, Any]
) -> None:
    first, second = await make_db(), await make_db(**different)
    assert first._connections is not second._connections
    # They know the same about the server, by the same rules.
    same_rules = "failure_threshold" not in different
    assert (first._connections.breaker is second._connections.breaker) is same_rules


@pytest.mark.parametrize(
    "same", [{"batch_size": 7}, {"memory_types": ["messages"]}, {"timeout": 7.0}, {"max_retries": 1}]
)
async def test_settings_of_the_adapter_alone_share_them(make_db: MakeAdapter, same: dict[str, Any]) -> None:
    first, second = await make_db(), await make_db(**same)
    assert first._connections is second._connections


async def test_failed_open_leaves_the_others_alone(
    make_db: MakeAdapter, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = await make_db()

    def broken(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(elizasql._pool, "check_settings", broken)
    with pytest.raises(ZeroDivisionError):
        await elizasql.open(agent_id=uuid4(), dsn=dsn, indexing="manual", pool_max_size=5, pool_min_size=0)
    assert db._connections.users == 1
    assert await db.is_ready()


async def test_connections_survive_a_second_import(make_db: MakeAdapter) -> None:
    db = await make_db()
    spec = importlib.util.find_spec("elizasql._registry")
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)

    async def never() -> str:
        raise AssertionError("the connections are there")

    joined = await again.join(db._address, db.config, never)
    assert joined is db._connections
    await joined.leave()
    assert await db.is_ready()


def test_each_event_loop_has_its_own(dsn: str) -> None:
    async def work() -> tuple[DatabaseAdapter, Any]:
        db = await elizasql.open(agent_id=uuid4(), dsn=dsn, indexing="manual")
        assert await db.is_ready()
        return db, db._connections

    async def misuse(db: DatabaseAdapter) -> None:
        with pytest.raises(elizasql.WrongLoopError, match="another event loop"):
            await db.count_memories()
        with pytest.raises(elizasql.WrongLoopError):
            async with db.transaction():
                pass
        assert not await db.is_ready()
        with pytest.raises(elizasql.WrongLoopError):
            await db.close()

    async def use(db: DatabaseAdapter) -> None:
        assert await db.is_ready()

    loops = [asyncio.new_event_loop() for _ in range(2)]
    opened = [loop.run_until_complete(work()) for loop in loops]
    assert opened[0][1] is not opened[1][1]
    loops[1].run_until_complete(misuse(opened[0][0]))
    loops[0].run_until_complete(use(opened[0][0]))
    for loop, (db, _) in zip(loops, opened, strict=True):
        loop.run_until_complete(db.close())
        loop.close()


def test_opening_where_no_loop_of_asyncio_runs(tmp_path: Path) -> None:
    """As in trio, which drives coroutines by itself: nothing is begun."""
    with pytest.raises(elizasql.WrongLoopError, match="asyncio"):
        elizasql.open(agent_id=uuid4(), data_dir=tmp_path / "pg").send(None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_loops_that_were_closed_before_their_adapters_are_let_go_of(dsn: str) -> None:
    name = f"left-{uuid4().hex}"

    async def forgetful() -> weakref.ref[asyncio.AbstractEventLoop]:
        db = await elizasql.open(agent_id=uuid4(), dsn=dsn, application_name=name)
        assert await db.is_ready()
        return weakref.ref(asyncio.get_running_loop())

    async def tidy() -> None:
        async with elizasql.connect(agent_id=uuid4(), dsn=dsn):
            gc.collect()
            raw = await asyncpg.connect(dsn)
            count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
            while await raw.fetchval(count, name):
                pass
            await raw.close()

    loops = [asyncio.run(forgetful()) for _ in range(3)]
    asyncio.run(tidy())
    assert [loop() for loop in loops] == [None] * 3


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_loops_that_were_closed_let_go_of_the_embedded_server(dsn: str, server_dir: Path) -> None:
    if str(server_dir) not in dsn:
        pytest.skip("the embedded server is not used")

    async def forgetful() -> None:
        await elizasql.open(agent_id=uuid4(), data_dir=server_dir, indexing="manual", pool_min_size=0)

    async def tidy() -> None:
        async with elizasql.connect(agent_id=uuid4(), dsn=dsn, indexing="manual"):
            gc.collect()

    servers, locks = len(_embedded._servers), len(_embedded._locks)
    for _ in range(3):
        asyncio.run(forgetful())
    asyncio.run(tidy())
    assert (len(_embedded._servers), len(_embedded._locks)) == (servers, locks)


def test_loops_in_threads_do_not_meet(dsn: str) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        async def run() -> None:
            async with elizasql.connect(agent_id=uuid4(), dsn=dsn, indexing="manual") as db:
                await db.ensure_agent_exists({"name": "x"})
                await asyncio.gather(*(db.create_memory(memory(), "messages") for _ in range(20)))
                assert await db.count_memories() == 20

        try:
            asyncio.run(run())
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
def test_after_a_fork(dsn: str) -> None:
    """The child is told, may open its own, and the parent's connections go on working."""
    program = f"""
        import asyncio, os, uuid, elizasql

        async def child(db, tx):
            for each in (db, tx):
                try:
                    await each.count_memories()
                except elizasql.WrongLoopError as error:
                    assert "fork" in str(error), error
                else:
                    raise SystemExit(3)
            try:
                await db.close()
            except elizasql.WrongLoopError:
                pass
            else:
                raise SystemExit(5)
            async with elizasql.connect(agent_id=uuid.uuid4(), dsn={dsn!r}, indexing="manual") as own:
                assert own._connections is not db._connections
                assert await own.is_ready()

        async def main():
            async with elizasql.connect(agent_id=uuid.uuid4(), dsn={dsn!r}, indexing="manual") as db:
                await db.ensure_agent_exists({{"name": "x"}})
                async with db.transaction() as tx:
                    await tx.create_memory({{"content": {{"text": "x"}}}}, "messages")
                    pid = os.fork()
                    if pid == 0:
                        asyncio._set_running_loop(None)
                        code = 4
                        try:
                            asyncio.run(child(db, tx))
                            code = 0
                        finally:
                            os._exit(code)
                    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
                assert await db.count_memories() == 1

        asyncio.run(main())
    """
    done = run(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
def test_forked_child_that_leaves_the_block_leaves_the_parent_alone(dsn: str) -> None:
    program = f"""
        import asyncio, os, sys, uuid, elizasql

        async def main():
            async with elizasql.connect(agent_id=uuid.uuid4(), dsn={dsn!r}, indexing="manual") as db:
                await db.ensure_agent_exists({{"name": "x"}})
                pid = os.fork()
                if pid == 0:
                    raise KeyError("child")
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
                assert await db.count_memories() == 0

        try:
            asyncio.run(main())
        except KeyError:
            os._exit(7)
    """
    done = run(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
@pytest.mark.parametrize("depth", [1, 2], ids=["transaction", "savepoint"])
@pytest.mark.parametrize("raises", [True, False])
def test_forked_child_that_leaves_a_transaction_leaves_it_to_the_parent(dsn: str, depth: int, raises: bool) -> None:
    program = f"""
        import asyncio, contextlib, os, uuid, elizasql

        async def main():
            async with elizasql.connect(agent_id=uuid.uuid4(), dsn={dsn!r}, indexing="manual") as db:
                await db.ensure_agent_exists({{"name": "x"}})
                async with contextlib.AsyncExitStack() as stack:
                    tx = db
                    for _ in range({depth}):
                        tx = await stack.enter_async_context(tx.transaction())
                    await tx.create_memory({{"content": {{"text": "before"}}}}, "messages")
                    pid = os.fork()
                    if pid:
                        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
                        await tx.create_memory({{"content": {{"text": "after"}}}}, "messages")
                    elif {raises}:
                        raise KeyError("child")
                assert await db.count_memories() == 2
                assert (await db.health())["pool"]["size"] == 1

        try:
            asyncio.run(main())
        except {"KeyError" if raises else "elizasql.WrongLoopError"}:
            os._exit(7)
    """
    done = run(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
def test_forked_child_that_ends_leaves_the_parents_calls_alone(dsn: str) -> None:
    program = f"""
        import asyncio, os, uuid, asyncpg, elizasql

        async def main():
            raw = await asyncpg.connect({dsn!r})
            async with elizasql.connect(agent_id=uuid.uuid4(), dsn={dsn!r}, indexing="manual") as db:
                await db.ensure_agent_exists({{"name": "x"}})
                id = await db.create_memory({{"content": {{"text": "x"}}}}, "messages")
                await raw.execute("BEGIN")
                await raw.fetchrow("SELECT FROM elizasql.memories WHERE id = $1 FOR UPDATE", id)
                waits = "SELECT FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
                async with db.transaction() as tx:
                    call = asyncio.create_task(tx.update_memory({{"id": id, "content": {{"text": "y"}}}}))
                    while not await raw.fetch(waits):
                        pass
                    pid = os.fork()
                    if pid == 0:
                        raise KeyError("child")
                    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
                    await raw.execute("COMMIT")
                    assert await call
            await raw.close()

        try:
            asyncio.run(main())
        except KeyError:
            os._exit(7)
    """
    done = run(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
def test_forked_child_that_ends_leaves_the_parents_notifications_alone(dsn: str) -> None:
    program = f"""
        import asyncio, os, uuid, asyncpg
        from elizasql import Config
        from elizasql._listener import Listener

        async def main():
            name = f"forked-{{uuid.uuid4().hex}}"
            raw = await asyncpg.connect({dsn!r})
            listener = Listener({dsn!r}, Config.load(dsn={dsn!r}, application_name=name), name)
            await listener.wait(60)  # for the connection
            pids = "SELECT array_agg(pid) FROM pg_stat_activity WHERE application_name = $1"
            before = await raw.fetchval(pids, name)
            pid = os.fork()
            if pid == 0:
                raise KeyError("child")
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
            await raw.execute(f'NOTIFY "{{name}}"')
            await listener.wait(60)
            assert await raw.fetchval(pids, name) == before
            await listener.close()
            await raw.close()

        try:
            asyncio.run(main())
        except KeyError:
            os._exit(7)
    """
    done = run(program)
    assert done.returncode == 0, done.stderr


# --- two lanes -------------------------------------------------------------------------------------------------------


async def test_background_work_never_takes_a_callers_connection(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    db = await make_db(pool_max_size=1, background_pool_size=1)
    id = await db.create_memory(memory(embedding=np.ones(384, np.float32), unique=True), "messages")
    async with raw.transaction():
        await raw.execute(
            "LOCK TABLE elizasql.agents IN ACCESS SHARE MODE"
        )  # any transaction: what follows is the lock
        await raw.execute("SELECT FROM elizasql.embeddings WHERE memory_id = $1 FOR UPDATE", id)
        await raw.execute("LOCK TABLE elizasql.embeddings IN SHARE ROW EXCLUSIVE MODE")
        indexing = asyncio.create_task(db.index_memories())
        assert await blocked_pid(raw, indexing)
        assert (await db.health())["background"]["in_use"] == 1
        for _ in range(20):
            assert await db.get_memory_by_id(id, timeout=5) is not None
    assert await indexing == 1


async def test_work_that_nobody_waits_for_has_a_lane_of_its_own(make_db: MakeAdapter) -> None:
    db = await make_db(pool_max_size=1, log_lane="background")
    scene = await make_scene(db)
    connection, _ = await db._executor.lane.acquire(5)
    log = {"type": "t", "body": {}, "entity_id": scene.entity, "room_id": scene.room}
    await db.log(log, timeout=5)
    assert await db.prune_logs(keep=0, timeout=5) == 1
    assert await db.sweep_cache(timeout=5) == 0
    with pytest.raises(elizasql.PoolTimeoutError):
        await db.get_logs(timeout=0.05)
    db._executor.lane.keep(connection)
    with pytest.raises(ZeroDivisionError):
        async with db.transaction() as tx:
            await tx.log(log)
            raise ZeroDivisionError
    assert await db.get_logs() == [], "it was part of the transaction all the same"


async def test_a_connection_goes_to_whoever_has_waited_longest(make_db: MakeAdapter) -> None:
    db = await make_db(pool_max_size=1)
    lane = db._executor.lane
    connection, _ = await lane.acquire(5)
    order: list[int] = []

    async def call(number: int) -> None:
        await db.get_memory_by_id(uuid4())
        order.append(number)

    tasks = [asyncio.create_task(call(number)) for number in range(20)]
    await asyncio.sleep(0)
    assert lane.waiting == 20
    lane.keep(connection)
    await asyncio.gather(*tasks)
    assert order == list(range(20))
    assert lane.size == 1


async def test_a_connection_that_was_dropped_is_nobodys(make_db: MakeAdapter) -> None:
    """Its place is free at once, and is given back once only; whoever waits gets a new one."""
    db = await make_db(pool_max_size=1)
    lane = db._executor.lane
    connection, _ = await lane.acquire(5)
    waiting = asyncio.create_task(lane.acquire(5))
    await asyncio.sleep(0)
    lane.drop(connection)
    lane.keep(connection)
    assert lane.in_use == 0
    lane.give_back(connection)
    other, used = await waiting
    await lane.let_go()
    assert (lane.in_use, lane.size, used) == (1, 1, False)
    assert await other.fetchval("SELECT 1") == 1
    lane.keep(other)
    assert lane.in_use == 0


async def test_an_attempt_that_fails_leaves_its_place_to_whoever_waits(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own caller alone hears of it; the one behind makes another, and does not wait in vain."""
    lane = (await make_db(pool_max_size=1))._executor.lane
    await lane.replace()
    await lane.let_go()
    real = lane.pool._connect
    waiting: list[asyncio.Task[Any]] = []

    async def refuse_first(*args: Any, **options: Any) -> Any:
        if not waiting:
            waiting.append(asyncio.create_task(lane.acquire(5)))
            while not lane.waiting:
                await asyncio.sleep(0)
            raise ConnectionRefusedError
        return await real(*args, **options)

    monkeypatch.setattr(lane.pool, "_connect", refuse_first)
    with pytest.raises(ConnectionRefusedError):
        await lane.acquire(5)
    connection, used = await waiting[0]
    assert not used
    lane.keep(connection)


async def test_a_connection_that_was_begun_before_all_were_replaced_is_not_kept(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may lead to where the others led."""
    lane = (await make_db())._executor.lane
    await lane.replace()
    await lane.let_go()
    real = lane.pool._connect

    async def overtaken(*args: Any, **options: Any) -> Any:
        made = await real(*args, **options)
        await lane.replace()
        return made

    with monkeypatch.context() as patch:
        patch.setattr(lane.pool, "_connect", overtaken)
        connection, _ = await lane.acquire(5)
    pid = connection.get_server_pid()
    lane.keep(connection)
    other, used = await lane.acquire(5)
    assert not used and other.get_server_pid() != pid
    lane.keep(other)


async def test_room_that_comes_together_with_a_cancellation_is_passed_on(make_db: MakeAdapter) -> None:
    lane = (await make_db(pool_max_size=1))._executor.lane
    connection, _ = await lane.acquire(5)
    first, second = (asyncio.create_task(lane.acquire(5)) for _ in range(2))
    await asyncio.sleep(0)
    lane.drop(connection)  # there is room for another one, which the first is told
    first.cancel()
    other, used = await second
    assert first.cancelled() and not used
    lane.keep(other)


async def test_a_cancellation_that_comes_together_with_the_end_of_the_wait_is_heard(make_db: MakeAdapter) -> None:
    lane = (await make_db(pool_max_size=1))._executor.lane
    connection, _ = await lane.acquire(5)
    waiting = asyncio.create_task(lane.acquire(5))
    await asyncio.sleep(0)
    _pool._expire(next(iter(lane._waiters)))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    lane.keep(connection)


@pytest.mark.parametrize("error", [asyncio.CancelledError, asyncio.TimeoutError])
async def test_a_call_that_ends_between_the_steps_of_a_statement_leaves_no_locks(
    make_db: MakeAdapter,
    raw: asyncpg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    """As where a cancellation comes together with the first step's answer; the server would wait for the second."""
    db = await make_db(pool_max_size=1)
    lane = db._executor.lane
    connection, _ = await lane.acquire(5)
    pid = connection.get_server_pid()
    lane.keep(connection)
    real = asyncpg.Connection._get_statement

    async def cut(self: Any, query: str, *args: Any, **kwargs: Any) -> Any:
        await real(self, query, *args, **kwargs)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(asyncpg.Connection, "_get_statement", cut)
        with pytest.raises((asyncio.CancelledError, elizasql.DeadlineError)):
            await db.count_memories()
    await lane.let_go()
    assert await raw.fetchval("SELECT array_agg(mode) FROM pg_locks WHERE pid = $1", pid) is None
    assert await db.count_memories() == 0


# --- close -----------------------------------------------------------------------------------------------------------


async def test_close_waits_for_calls_that_are_running(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db()
    id = await db.create_memory(memory(), "messages")
    async with locked(raw, id):
        task = asyncio.create_task(db.update_memory(memory("y", id=id)))
        assert await blocked_pid(raw, task)
        closing = asyncio.create_task(db.close())
        while not db._executor._closed:
            await asyncio.sleep(0)
        with pytest.raises(elizasql.ClosedError):
            await db.count_memories()
    assert await task
    await closing


async def test_close_does_not_wait_for_ever(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    name = f"test {uuid4()}"
    db = await make_db(application_name=name)
    id = await db.create_memory(memory(), "messages")
    async with locked(raw, id):
        task = asyncio.create_task(db.update_memory(memory("y", id=id)))
        assert await blocked_pid(raw, task)
        await db.close(timeout=0.1)
        with pytest.raises(elizasql.ClosedError):
            await task
    assert await gone(raw, name)


async def test_close_cuts_what_takes_too_long_where_others_share_the_connections(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """The pool goes on, and with it would the call, for as long as the row is locked."""
    db, other = await make_db(), await make_db()
    id = await db.create_memory(memory(), "messages")
    async with locked(raw, id):
        task = asyncio.create_task(db.update_memory(memory("y", id=id)))
        assert await blocked_pid(raw, task)
        await db.close(timeout=0.0)
        with pytest.raises(elizasql.ClosedError):
            await task
    assert await other.is_ready()
    assert other._executor.lane.in_use == 0


@pytest.mark.parametrize("depth", [1, 2], ids=["transaction", "savepoint"])
async def test_close_that_cuts_a_transaction_is_said_to_its_calls(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], depth: int
) -> None:
    db = await make_db()
    id = await db.create_memory(memory(), "messages")
    said: list[elizasql.ElizaSQLError] = []

    async def work() -> None:
        async with contextlib.AsyncExitStack() as stack:
            tx = db
            for _ in range(depth):
                tx = await stack.enter_async_context(tx.transaction())
            for _ in range(2):  # the call that is cut, and one that comes behind
                try:
                    await tx.update_memory(memory("y", id=id))
                except elizasql.ElizaSQLError as error:
                    said.append(error)

    async with locked(raw, id):
        task = asyncio.create_task(work())
        assert await blocked_pid(raw, task)
        await db.close(timeout=0.1)
        with pytest.raises(elizasql.ClosedError, match="transaction: the adapter was closed meanwhile"):
            await task
    assert [(type(error), error.statement) for error in said] == [(elizasql.ClosedError, "update_memories")] * 2


async def test_close_ends_a_call_that_waits_to_be_tried_again(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    db, other = [await make_db(base_delay=0.001, jitter_max=0.0) for _ in range(2)]
    lane = db._executor.lane
    assert other._executor.lane is lane  # so that another try would find a connection
    take = lane.take
    closing: list[asyncio.Task[None]] = []

    async def refuse(*args: Any) -> None:
        closing.append(asyncio.create_task(db.close(timeout=0.0)))
        raise ConnectionResetError

    monkeypatch.setattr(lane, "take", lambda: take() if closing else None)
    with (
        monkeypatch.context() as patch,
        pytest.raises(elizasql.ClosedError, match="get_tasks: the adapter was closed meanwhile"),
    ):
        patch.setattr(lane, "acquire", refuse)
        await db.get_tasks()
    await closing[0]
    assert await other.get_tasks() == []


async def test_a_connection_that_is_cut_between_the_steps_of_a_statement_is_lost(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `close` does with what is still running; asyncpg raises an AttributeError then."""
    db = await make_db(base_delay=0.001)
    real = asyncpg.Connection._get_statement
    cuts = 0

    async def cut(self: Any, query: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal cuts
        prepared = await real(self, query, *args, **kwargs)
        if cuts and "elizasql" in query:
            cuts -= 1
            self.terminate()
        return prepared

    monkeypatch.setattr(asyncpg.Connection, "_get_statement", cut)
    cuts = 2
    assert await db.count_memories() == 0 and cuts == 0
    cuts = 1
    with pytest.raises(elizasql.ConnectionLostError, match="count_memories"):
        async with db.transaction() as tx:
            await tx.count_memories()
    cuts = 1
    with pytest.raises(elizasql.UnknownOutcomeError):
        await db.delete_agent(uuid4())


@pytest.mark.parametrize("shared", [True, False])
async def test_close_that_is_cancelled_anywhere(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], shared: bool
) -> None:
    """Whichever step of the loop it hits: nothing of the adapter's own is left, and it is closed all the same."""
    name = f"test {uuid4()}"
    other = await make_db(application_name=name, pool_min_size=2) if shared else None
    before = asyncio.all_tasks()
    steps, further, cancelled = 1, 2, 0
    while True:
        db = await make_db(application_name=name, pool_min_size=2)
        waiting = [asyncio.create_task(anext(db.wait_for_tasks())) for _ in range(2)]
        await asyncio.gather(*(db.count_memories() for _ in range(3)), db.sweep_cache())
        closing = asyncio.create_task(db.close())
        for _ in range(steps):
            await asyncio.sleep(0)
        done = closing.done()
        closing.cancel()
        await asyncio.wait([closing])
        cancelled += closing.cancelled()
        with pytest.raises(elizasql.ClosedError):
            await db.count_memories()
        with pytest.raises(elizasql.ClosedError):
            await db.sweep_cache()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [elizasql.ClosedError] * 2
        await db.close()
        if other is not None:
            assert await other.is_ready()
            assert other._connections.users == 1
        else:
            assert await gone(raw, name)
        if done:
            break
        steps, further = further, steps + further
    assert cancelled > 3
    while asyncio.all_tasks() - before:
        await asyncio.sleep(0)


@pytest.mark.parametrize("name", ["interactive", "background"])
async def test_close_that_is_cancelled_while_it_closes_the_connections(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    application = f"test {uuid4()}"
    db = await make_db(application_name=application)
    await asyncio.gather(db.count_memories(), db.sweep_cache())
    reached = asyncio.Event()

    async def never() -> None:
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(getattr(db._connections, name), "let_go", never)
    closing = asyncio.create_task(db.close())
    await reached.wait()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert await gone(raw, application)


@pytest.mark.parametrize("name", ["interactive", "background"])
async def test_close_hears_a_cancellation_that_comes_when_it_has_closed_connections(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    db = await make_db(application_name=f"test {uuid4()}")
    await asyncio.gather(db.count_memories(), db.sweep_cache())
    pool, real = getattr(db._connections, name).pool, asyncpg.Pool.close

    async def close(closed: asyncpg.Pool) -> None:
        await real(closed)
        if closed is pool:
            closing.cancel()

    monkeypatch.setattr(asyncpg.Pool, "close", close)
    closing = asyncio.create_task(db.close())
    with pytest.raises(asyncio.CancelledError):
        await closing


async def test_close_that_does_not_wait_stops_calls_that_have_no_connection_yet(make_db: MakeAdapter) -> None:
    """The connections are shared and go on: what comes to one after the end of its adapter writes nothing."""
    db, other = [await make_db(pool_max_size=1) for _ in range(2)]
    lane = db._executor.lane
    assert lane is other._executor.lane
    connection, _ = await lane.acquire(5)
    task = asyncio.create_task(db.create_memory(memory(), "messages"))
    while not lane.waiting:
        await asyncio.sleep(0)
    await db.close(timeout=0.01)
    lane.keep(connection)
    with pytest.raises(elizasql.ClosedError) as caught:
        await task
    assert caught.value.statement == "create_memory"
    assert await other.is_ready()
    assert lane.in_use == 0


async def test_close_lets_no_task_behind(dsn: str) -> None:
    before = asyncio.all_tasks()
    async with elizasql.connect(agent_id=uuid4(), dsn=dsn) as db:
        await db.ensure_agent_exists({"name": "x"})
        await asyncio.gather(*(db.create_memory(memory(), "messages") for _ in range(50)))
    assert {task.get_name() for task in asyncio.all_tasks() - before} == set()
    assert not [key for key in _registry._table().get(asyncio.get_running_loop(), {}) if key[0] == dsn]


# --- the end of the process ------------------------------------------------------------------------------------------


def run(program: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=90,
        cwd=Path(__file__).parent.parent,
        check=False,
        **options,
    )


OPEN = """
import asyncio, os, signal, sys, uuid
import elizasql

async def main():
    db = await elizasql.open(agent_id=uuid.uuid4(), data_dir=sys.argv[1])
    await db.ensure_agent_exists({"name": "x"})
    print("ready", flush=True)
    await work(db)

"""


@contextlib.contextmanager
def process(program: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, "-c", OPEN + textwrap.dedent(program), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", child.stderr and child.stderr.read()
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


def rest(child: subprocess.Popen[str]) -> tuple[str, str]:
    """Give what a process still says, up to its end; `communicate` would lose what `readline` has read ahead."""
    assert child.stdout is not None and child.stderr is not None
    out, err = child.stdout.read(), child.stderr.read()
    child.wait(60)
    return out, err


def postmaster(folder: Path) -> int:
    return int((folder / "data" / "postmaster.pid").read_text().split()[0])


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("p") / "pg"
    path.parent.chmod(0o755)
    for parent in (path.parent.parent, path.parent.parent.parent):
        with contextlib.suppress(OSError):
            parent.chmod(0o755)
    return path


WAIT = """
async def work(db):
    await asyncio.Event().wait()

asyncio.run(main())
"""


BLOCKING = """
import threading
import weakref
from elizasql import sync

db = sync.open(agent_id=uuid.uuid4(), data_dir=sys.argv[1])
print("ready", flush=True)
threading.Event().wait()
"""

# The usual way to add a handler: do something, then what was done before.
CHAINED = """
def bye(number, frame):
    before(number, frame)

async def work(db):
    global before
    before = signal.signal(signal.SIGTERM, bye)
    async with elizasql.connect(agent_id=uuid.uuid4(), data_dir=sys.argv[1]):
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.parametrize("program", [WAIT, BLOCKING], ids=["asynchronous", "blocking"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_the_embedded_server(folder: Path, number: signal.Signals, program: str) -> None:
    with process(program, folder) as child:
        pid = postmaster(folder)
        assert is_running(pid)
        child.send_signal(number)
        _, err = rest(child)
        # As where nobody handles it: the parent sees that it was the signal, or Python's own word for SIGINT.
        assert child.returncode in ((-number,) if number == signal.SIGTERM else (-number, 130, 1)), err
        assert not is_running(pid)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_handler_that_passes_the_signal_on_shuts_down(folder: Path) -> None:
    with process(CHAINED, folder) as child:
        pid = postmaster(folder)
        _, err = rest(child)
        assert child.returncode == -signal.SIGTERM, err
        assert not is_running(pid)


def test_calls_that_are_running_end_before_the_process(folder: Path) -> None:
    program = """
    import atexit
    import threading
    from elizasql import _shutdown

    async def end():
        ended.wait()  # the program comes to its own end meanwhile, and ends by the signal all the same
        await real()

    real, _shutdown._embedded.end = _shutdown._embedded.end, end
    ended = threading.Event()
    atexit.register(ended.set)

    async def work(db):
        async def sleepy():
            connection, _ = await db._executor.lane.acquire(5)
            db._executor.in_flight += 1
            print(await connection.fetchval("SELECT 'slept' FROM pg_sleep(1)"), flush=True)
            db._executor.lane.keep(connection)
            db._executor._leave()
        task = asyncio.create_task(sleepy())
        while not db._executor.in_flight:
            await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)
        while not db._executor._closed:
            await asyncio.sleep(0.001)
        try:
            await db.count_memories()
        except elizasql.ClosedError:
            print("refused", flush=True)
        os.kill(os.getpid(), signal.SIGHUP)  # as systemd does, right behind SIGTERM
        await task

    asyncio.run(main())
    """
    with process(program, folder) as child:
        pid = postmaster(folder)
        out, err = rest(child)
        assert (child.returncode, out.split()) == (-signal.SIGTERM, ["refused", "slept"]), err
        assert not is_running(pid)


def test_signal_ends_a_process_where_nothing_can_be_closed(dsn: str) -> None:
    program = f"""
        import asyncio, os, signal, uuid, elizasql
        from elizasql import _shutdown

        async def fail(*args):
            print("failed", flush=True)
            raise ZeroDivisionError

        async def main():
            db = await elizasql.open(agent_id=uuid.uuid4(), dsn={dsn!r}, indexing="manual")
            db.close = _shutdown._embedded.end = fail
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()

        asyncio.run(main())
    """
    done = run(program)
    assert (done.returncode, done.stdout.split()) == (-signal.SIGTERM, ["failed"] * 2), done.stderr


def test_signal_ends_a_process_whose_event_loop_stands_still(dsn: str) -> None:
    """What belongs to the loop nobody can close, and nobody waits for that."""
    program = f"""
        import asyncio, os, signal, uuid, elizasql
        from elizasql import _shutdown

        _shutdown._BOUND = 3600.0
        loop = asyncio.new_event_loop()
        db = loop.run_until_complete(elizasql.open(agent_id=uuid.uuid4(), dsn={dsn!r}, indexing="manual"))
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            signal.pause()
    """
    done = run(program)
    assert done.returncode == -signal.SIGTERM, done.stderr


def test_signal_ends_a_process_whose_main_thread_never_hears_it() -> None:
    """It is in something that nothing interrupts, and Python runs handlers in no other thread."""
    program = """
        import collections, ctypes, functools, itertools, operator, signal, threading
        from elizasql import _shutdown

        async def end():
            stuck.acquire()

        stuck = threading.Lock()
        stuck.acquire()
        _shutdown._embedded.end = end
        _shutdown._PATIENCE = 0.1
        _shutdown.install()
        signal.raise_signal(signal.SIGTERM)
        sleep = functools.partial(ctypes.CDLL(None).sleep, 60)
        # No Python in between, where the handler could run.
        calls = itertools.chain((stuck.release,), itertools.repeat(sleep))
        collections.deque(map(operator.methodcaller("__call__"), calls), maxlen=0)
    """
    done = run(program)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr


def test_second_signal_cuts_the_end_short_only_when_somebody_sends_it() -> None:
    """A terminal that is closed sends SIGHUP twice, and systemd sends it behind SIGTERM."""
    program = """
        import os, signal, threading
        from elizasql import _shutdown

        def end(*numbers):
            told, closed = os.pipe()
            if not (child := os.fork()):
                goes_on = threading.Event()

                async def end():
                    goes_on.wait()
                    os.write(closed, b"closed")

                _shutdown._embedded.end = end
                _shutdown.install()
                for number in numbers:
                    signal.raise_signal(number)
                goes_on.set()
                while True:
                    signal.pause()
            os.close(closed)
            said = os.read(told, 6)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(*(number.name for number in numbers), "->", signal.Signals(-ended).name, said.decode())

        TERM, HUP = signal.SIGTERM, signal.SIGHUP
        for number in (TERM, HUP):
            signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored
        for numbers in ((HUP, HUP), (TERM, HUP, HUP), (HUP, TERM), (HUP, TERM, TERM), (TERM, TERM)):
            end(*numbers)
    """
    done = run(program)
    assert done.stdout.splitlines() == [
        "SIGHUP SIGHUP -> SIGHUP closed",
        "SIGTERM SIGHUP SIGHUP -> SIGTERM closed",
        "SIGHUP SIGTERM -> SIGHUP closed",
        "SIGHUP SIGTERM SIGTERM -> SIGTERM ",
        "SIGTERM SIGTERM -> SIGTERM ",
    ], done.stderr


def test_handler_of_the_application_is_called_and_decides(folder: Path) -> None:
    program = """
    def bye(number, frame):
        print("bye", flush=True)
        done.set()

    async def work(db):
        # Asked after the signal: the application's own shutdown still has its memory.
        os.kill(os.getpid(), signal.SIGTERM)
        await done.wait()
        print(await db.count_memories(), flush=True)

    done = asyncio.Event()
    signal.signal(signal.SIGTERM, bye)
    asyncio.run(main())
    """
    with process(program, folder) as child:
        pid = postmaster(folder)
        out, err = rest(child)
        assert (child.returncode, out.split()) == (0, ["bye", "0"]), err
        assert not is_running(pid)


def test_handler_is_not_set_when_not_wanted(dsn: str) -> None:
    program = f"""
        import asyncio, signal, uuid, elizasql
        from elizasql import sync

        async def main(**settings):
            async with elizasql.connect(agent_id=uuid.uuid4(), dsn={dsn!r}, **settings):
                return signal.getsignal(signal.SIGTERM)

        assert asyncio.run(main(handle_signals=False)) is signal.SIG_DFL is signal.getsignal(signal.SIGHUP)
        with sync.connect(agent_id=uuid.uuid4(), dsn={dsn!r}, handle_signals=False):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL is signal.getsignal(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert asyncio.run(main()) is signal.SIG_IGN
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert callable(asyncio.run(main())) and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert asyncio.run(main()) is signal.getsignal(signal.SIGHUP)
        mine = lambda number, frame: None
        signal.signal(signal.SIGTERM, mine)
        assert asyncio.run(main()) is mine
    """
    done = run(program)
    assert done.returncode == 0, done.stderr


def test_opening_in_a_thread_leaves_the_signals_alone(dsn: str) -> None:
    """Python lets only the main thread choose what they do; the adapter works all the same."""
    program = f"""
        import asyncio, signal, threading, uuid, elizasql

        async def main():
            async with elizasql.connect(agent_id=uuid.uuid4(), dsn={dsn!r}, indexing="manual") as db:
                said.extend((await db.is_ready(), signal.getsignal(signal.SIGTERM)))

        said = []
        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        thread.join()
        assert said == [True, signal.SIG_DFL], said
    """
    done = run(program)
    assert done.returncode == 0, done.stderr


def test_worker_of_multiprocessing_ends_by_a_signal_that_comes_as_it_goes_to_sleep() -> None:
    program = """
        import ctypes, functools, multiprocessing, operator, signal, threading
        from elizasql import _shutdown

        def work(lock):
            _shutdown.install()
            threads = threading.active_count()
            _shutdown.install()  # as with each adapter that is opened
            assert threading.active_count() == threads
            # No Python in between, where the handler could run; as where another worker has taken what woke this one.
            come = functools.partial(ctypes.CDLL(None)["raise"], signal.SIGTERM)
            list(map(operator.methodcaller("__call__"), (come, lock.acquire)))

        context = multiprocessing.get_context("fork")
        lock = context.Lock()
        lock.acquire()
        worker = context.Process(target=work, args=(lock,), daemon=True)
        worker.start()
        worker.join(20)
        assert worker.exitcode == -signal.SIGTERM, worker.exitcode
    """
    done = run(program)
    assert done.returncode == 0, done.stderr


def test_worker_of_multiprocessing_that_comes_to_its_own_end_meanwhile_ends_by_the_signal() -> None:
    program = """
        import multiprocessing.util, signal, threading
        from elizasql import _shutdown

        def work():
            ended = threading.Event()

            async def end():
                ended.wait()

            _shutdown._embedded.end = end
            _shutdown.install()
            multiprocessing.util.Finalize(None, ended.set, exitpriority=200)
            signal.raise_signal(signal.SIGTERM)

        worker = multiprocessing.get_context("fork").Process(target=work)
        worker.start()
        worker.join()
        assert worker.exitcode == -signal.SIGTERM, worker.exitcode
    """
    done = run(program)
    assert done.returncode == 0, done.stderr


def test_worker_of_multiprocessing_leaves_its_event_loop_the_signals_that_it_handles() -> None:
    program = """
        import asyncio, multiprocessing, os, signal
        from elizasql import _shutdown

        async def main():
            heard = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.set)
            _shutdown.install()
            os.kill(os.getpid(), signal.SIGUSR1)
            await heard.wait()

        worker = multiprocessing.get_context("fork").Process(target=lambda: asyncio.run(main()), daemon=True)
        worker.start()
        worker.join(20)
        assert worker.exitcode == 0, worker.exitcode
    """
    done = run(program)
    assert done.returncode == 0, done.stderr


def test_signal_ends_a_forked_child_that_has_nothing_open(dsn: str) -> None:
    """Nor does the end of one that has opened something of its own wait for what its parent has open."""
    program = f"""
        import os, signal, uuid
        from elizasql import _shutdown, sync

        with sync.connect(agent_id=uuid.uuid4(), dsn={dsn!r}):
            if (child := os.fork()) == 0:
                assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL is signal.getsignal(signal.SIGHUP)
                with sync.connect(agent_id=uuid.uuid4(), dsn={dsn!r}):
                    assert callable(signal.getsignal(signal.SIGTERM))
                    _shutdown._BOUND = 3600.0  # nobody waits for the parent's
                    os.kill(os.getpid(), signal.SIGTERM)
                    while True:
                        signal.pause()
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
            assert callable(signal.getsignal(signal.SIGTERM))
    """
    done = run(program)
    assert done.returncode == 0, done.stderr


def test_opening_when_the_interpreter_ends_is_an_error_of_the_library(tmp_path: Path) -> None:
    program = f"""
        import asyncio, atexit, uuid
        import elizasql

        @atexit.register
        def late():
            try:
                asyncio.run(elizasql.open(agent_id=uuid.uuid4(), data_dir={str(tmp_path / "pg")!r}))
            except elizasql.EmbeddedServerError as error:
                print(error)
    """
    done = run(program)
    told = "The interpreter ends and begins no threads: open the adapter before that\n"
    assert (done.stdout, done.stderr) == (told, "")


def test_exit_without_close_stops_the_embedded_server(folder: Path) -> None:
    program = """
    async def work(db):
        pass

    asyncio.run(main())
    """
    with process(program, folder) as child:
        pid = postmaster(folder)
        _, err = rest(child)
        assert child.returncode == 0, err
        assert not is_running(pid)
