"""The blocking face: the same methods, from any thread, and nothing that hangs."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest

import elizasql
from elizasql import Memory, _executor, _shutdown, sync
from elizasql._statements import Statement
from tests import sync_stub

ASYNCHRONOUS = {
    name: member
    for name, member in inspect.getmembers(elizasql.DatabaseAdapter)
    if not name.startswith("_") and callable(member)
}
DEADLINE = 60.0
# The stub does not show them.
INTERNALS: Any = sync


def memory(text: str = "x", **fields: Any) -> Memory:
    return Memory(content={"text": text}, **fields)


def test_the_module_need_not_be_imported() -> None:
    code = "import elizasql; print(elizasql.sync.connect.__module__, hasattr(elizasql, 'nothing'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["elizasql.sync", "False"]


def texts(db: sync.DatabaseAdapter) -> list[str]:
    return sorted(found.content["text"] for found in db.get_memories(table_name="messages"))  # type: ignore[index]


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "elizasql-sync"}


def run_in_threads(function: Callable[[int], Any], count: int) -> list[Any]:
    """Run it `count` times at once, and give the results or errors; fails when one of them hangs."""
    barrier = threading.Barrier(count)

    def together(number: int) -> Any:
        barrier.wait(DEADLINE)
        try:
            return function(number)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return [future.result(DEADLINE) for future in [pool.submit(together, number) for number in range(count)]]


@pytest.fixture
def make(dsn: str) -> Iterator[Callable[..., sync.DatabaseAdapter]]:
    opened: list[sync.DatabaseAdapter] = []

    def make(agent_id: UUID | None = None, **options: Any) -> sync.DatabaseAdapter:
        options = {"dsn": dsn, "indexing": "manual", "pool_max_size": 5, "pool_min_size": 0, **options}
        opened.append(sync.open(agent_id=agent_id or uuid4(), **options))
        opened[-1].ensure_agent_exists({"name": "test"})
        opened[-1].ensure_embedding_dimension(384)
        return opened[-1]

    yield make
    for adapter in opened:
        adapter.close()


@pytest.fixture
def db(make: Callable[..., sync.DatabaseAdapter]) -> sync.DatabaseAdapter:
    return make()


class Holder:
    """A bare connection that holds a memory's row, so that whoever changes it has to wait."""

    def __init__(self, dsn: str, memory_id: UUID) -> None:
        self.loop: Any = INTERNALS._Loop()
        self.connection = self.loop.run(asyncpg.connect(dsn))
        self.loop.run(self.connection.execute("BEGIN"))
        question = "SELECT FROM elizasql.memories WHERE id = $1 FOR UPDATE"
        self.loop.run(self.connection.fetchrow(question, memory_id))

    def wait_for(self, number: int) -> None:
        """Wait until so many sessions wait for the row."""
        question = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
        while self.loop.run(self.connection.fetchval(question)) != number:
            pass

    def let_go(self) -> None:
        self.loop.run(self.connection.execute("ROLLBACK"))

    def close(self) -> None:
        self.loop.run(self.connection.close())
        self.loop.stop()


# --- the face --------------------------------------------------------------------------------------------------------


def test_every_method_is_there() -> None:
    blocking = {name for name in vars(sync.DatabaseAdapter) if not name.startswith("_")}
    assert blocking - {"agent_id", "config"} == set(ASYNCHRONOUS)


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_method_is_the_same_but_blocks(name: str) -> None:
    method, blocking = ASYNCHRONOUS[name], getattr(sync.DatabaseAdapter, name)
    assert not inspect.iscoroutinefunction(blocking)
    assert not inspect.isasyncgenfunction(blocking)
    assert list(inspect.signature(blocking).parameters) == list(inspect.signature(method).parameters)
    assert inspect.getdoc(blocking)
    # What the blocking face makes of anything else would be wrong.
    assert name == "transaction" or inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)


def test_doors_are_the_same() -> None:
    for name in ("open", "connect"):
        theirs = inspect.signature(getattr(elizasql, name)).parameters
        assert list(inspect.signature(getattr(sync, name)).parameters) == list(theirs)


def test_create_and_search(db: sync.DatabaseAdapter) -> None:
    vector = np.ones(384, dtype=np.float32)
    id = db.create_memory(memory("hello", embedding=vector), "messages")
    assert isinstance(id, UUID)
    hits = db.search_memories(embedding=vector, table_name="messages", count=1)
    assert [hit.id for hit in hits] == [id]
    assert hits[0].similarity == pytest.approx(1.0)
    assert db.is_ready()
    assert db.config.pool_max_size == 5
    assert isinstance(db.agent_id, UUID)


def test_an_adapter_says_whose_and_where_it_is(db: sync.DatabaseAdapter) -> None:
    assert repr(db) == f"<DatabaseAdapter of agent {db.agent_id}, {db.config.where}>"
    with db.transaction() as tx:
        assert repr(tx) == repr(db)


def test_connect(dsn: str) -> None:
    before = threads()
    with sync.connect(agent_id=uuid4(), dsn=dsn) as db:
        assert db.is_ready()
        assert len(threads() - before) == 1
    assert threads() == before
    with pytest.raises(ZeroDivisionError), sync.connect(agent_id=uuid4(), dsn=dsn):
        raise ZeroDivisionError
    assert threads() == before


def test_failed_open_leaves_no_thread() -> None:
    before = threads()
    with pytest.raises(elizasql.ConnectionLostError):
        sync.open(agent_id=uuid4(), dsn="postgresql://127.0.0.1:1/x")
    with pytest.raises(elizasql.ConfigurationError):
        sync.open(agent_id=uuid4(), pool_size=1)  # type: ignore[call-arg]
    with pytest.raises(elizasql.ArgumentError), sync.connect(agent_id="no id"):
        pass
    assert threads() == before


def test_errors_come_through(db: sync.DatabaseAdapter) -> None:
    with pytest.raises(elizasql.ForeignKeyError) as caught:
        db.create_memory(memory(room_id=uuid4()), "messages")
    assert caught.value.constraint == "memories_room_fkey"
    assert isinstance(caught.value.__cause__, asyncpg.ForeignKeyViolationError)
    assert "create_memory" in "".join(traceback.format_tb(caught.value.__traceback__))
    with pytest.raises(elizasql.ArgumentError, match="position 1"):
        db.create_memories([memory(), {"nonsense": 1}], "messages")
    with pytest.raises(TypeError):
        db.create_memory()  # type: ignore[call-arg]


# --- transactions ----------------------------------------------------------------------------------------------------


def test_transaction(db: sync.DatabaseAdapter) -> None:
    with db.transaction() as tx:
        tx.create_memory(memory("a"), "messages")
        assert texts(db) == []
        with pytest.raises(ZeroDivisionError), tx.transaction() as inner:
            inner.create_memory(memory("b"), "messages")
            raise ZeroDivisionError
        with pytest.raises(elizasql.TransactionError, match="savepoint"), tx.transaction():
            tx.create_memory(memory("b"), "messages")
    assert texts(db) == ["a"]
    with pytest.raises(elizasql.ClosedError):
        tx.create_memory(memory("late"), "messages")


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration])
def test_rollback(db: sync.DatabaseAdapter, error: type[BaseException]) -> None:
    """Whatever ends the block, nothing is kept, and the loop goes on."""
    raised = error("mine")
    try:
        with db.transaction() as tx:
            tx.create_memory(memory("lost"), "messages")
            raise raised
    except BaseException as caught:
        # contextlib shows a StopIteration in the wrapping that generators need.
        found = caught
    assert raised in (found, found.__cause__)
    assert any(frame.name == "test_rollback" for frame in traceback.extract_tb(raised.__traceback__))
    assert texts(db) == []
    db.create_memory(memory("kept"), "messages")
    assert texts(db) == ["kept"]


def test_caught_error_is_no_success(db: sync.DatabaseAdapter) -> None:
    with pytest.raises(elizasql.TransactionError), db.transaction() as tx:
        tx.create_memory(memory("lost"), "messages")
        with pytest.raises(elizasql.ForeignKeyError):
            tx.create_memory(memory(room_id=uuid4()), "messages")
    assert texts(db) == []


def test_a_transaction_is_undone_when_its_block_has_ended(
    db: sync.DatabaseAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What steps over locked rows would miss them, where the undoing was left to the background."""
    give_back = type(vars(db)["_adapter"]._executor.lane)._return

    async def late(*args: Any, **kwargs: Any) -> None:
        await undone.wait()
        await give_back(*args, **kwargs)

    undone = asyncio.Event()
    id = db.create_task({"name": "t", "tags": ["queue"]})
    monkeypatch.setattr(type(vars(db)["_adapter"]._executor.lane), "_return", late)
    try:
        for error in (ZeroDivisionError, StopIteration):
            with pytest.raises(error), db.transaction() as tx:
                assert [task.id for task in tx.claim_tasks()] == [id]
                raise error
            with db.transaction() as tx, suppress(ZeroDivisionError), tx.transaction() as inner:
                assert [task.id for task in inner.claim_tasks()] == [id]
                raise ZeroDivisionError
        assert [task.id for task in db.claim_tasks()] == [id]
    finally:
        vars(db)["_loop"]._loop.call_soon_threadsafe(undone.set)


def test_interrupt_that_leaves_a_savepoint_and_its_transaction_costs_no_connection(
    db: sync.DatabaseAdapter, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The undoing of the savepoint is at the server when the connection goes back."""
    lane, loop = vars(db)["_adapter"]._executor.lane, vars(db)["_loop"]
    id = db.create_memory(memory("old"), "messages")
    holder = Holder(dsn, id)
    send = _executor._send

    async def held_up(connection: Any, statement: Statement, deadline: float) -> None:
        if statement.name == "roll_back_savepoint":
            await connection.execute(f"SELECT FROM elizasql.memories WHERE id = '{id}' FOR UPDATE")
        await send(connection, statement, deadline)

    monkeypatch.setattr(_executor, "_send", held_up)
    try:
        with pytest.raises(KeyboardInterrupt), db.transaction() as tx, tx.transaction() as inner:
            inner.create_memory(memory("lost"), "messages")
            raise KeyboardInterrupt
        holder.wait_for(1)
        assert texts(db) == ["old"]
        holder.let_go()
        loop.run(lane.let_go())
    finally:
        holder.close()
    assert lane._generation == 0
    assert (lane.in_use, lane.size, lane.pool.get_idle_size()) == (0, 2, 2)
    assert texts(db) == ["old"]


def test_with_entity_context(db: sync.DatabaseAdapter) -> None:
    def work(tx: sync.DatabaseAdapter) -> str:
        tx.create_memory(memory("kept"), "messages")
        assert texts(db) == []
        return "given back"

    assert db.with_entity_context(uuid4(), work) == "given back"
    assert db.with_entity_context(None, lambda tx: texts(tx)) == ["kept"]
    with pytest.raises(elizasql.ArgumentError, match="entity_id"):
        db.with_entity_context("no id", work)
    with pytest.raises(elizasql.ArgumentError, match="callback must be callable, not int"):
        db.with_entity_context(None, 5)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        db.with_entity_context(None, lambda tx: [tx.create_memory(memory("lost"), "messages"), 1 / 0])
    assert texts(db) == ["kept"]


def test_adapter_of_a_transaction_does_not_close(db: sync.DatabaseAdapter) -> None:
    with db.transaction() as tx:
        with pytest.raises(elizasql.ArgumentError, match="transaction"):
            tx.close()
        tx.create_memory(memory("a"), "messages")
    assert texts(db) == ["a"]


# --- without end -----------------------------------------------------------------------------------------------------


def test_iterating(db: Any) -> None:
    listeners = db._adapter._listeners
    for name in ("one", "two", "three"):
        db.create_task({"name": name, "tags": ["queue"]})
    with closing(db.wait_for_tasks()) as tasks:
        assert {next(tasks).name, next(tasks).name} == {"one", "two"}
    assert not listeners
    for task in db.wait_for_tasks():
        assert task.name == "three"
        break
    assert not listeners
    with pytest.raises(elizasql.ArgumentError):
        next(db.wait_for_tasks(lease=-1))


def test_iteration_ends_with_the_adapter(make: Callable[..., sync.DatabaseAdapter]) -> None:
    db = make()
    db.create_task({"name": "one", "tags": ["queue"]})
    begun = threading.Event()

    def iterate(number: int) -> Any:
        if number:
            begun.wait(DEADLINE)
            db.close()
            return None
        for _ in db.wait_for_tasks():
            begun.set()
        return None

    results = run_in_threads(iterate, 2)
    assert isinstance(results[0], elizasql.ClosedError)
    assert results[1] is None


def test_iteration_that_outlives_the_adapter(make: Callable[..., sync.DatabaseAdapter]) -> None:
    db = make()
    db.create_task({"name": "one", "tags": ["queue"]})
    tasks = db.wait_for_tasks()
    assert next(tasks).name == "one"
    db.close()
    tasks.close()
    with pytest.raises(elizasql.ClosedError):
        next(db.wait_for_tasks())


# --- left by the garbage collector -----------------------------------------------------------------------------------


def in_transaction(db: sync.DatabaseAdapter) -> Iterator[None]:
    with db.transaction() as tx:
        tx.create_memory(memory("lost"), "messages")
        yield


def iterating(db: sync.DatabaseAdapter) -> Iterator[Any]:
    db.create_task({"name": "one", "tags": ["queue"]})
    return db.wait_for_tasks()


def left_open(db: sync.DatabaseAdapter) -> bool:
    adapter = vars(db)["_adapter"]
    return bool(adapter._executor.in_flight or adapter._listeners)


@pytest.mark.parametrize("begin", [in_transaction, iterating])
def test_left_in_the_thread_of_the_loop(
    db: sync.DatabaseAdapter, begin: Callable[[sync.DatabaseAdapter], Iterator[Any]]
) -> None:
    """The garbage collector runs in whatever thread has made enough garbage."""
    begun = [begin(db)]
    next(begun[0])
    assert left_open(db)
    db.load_memories([memory("kept")], "messages", progress=lambda done, total: begun.clear())
    assert begun == []
    while left_open(db):
        assert db.is_ready()
    assert texts(db) == ["kept"]


def test_error_in_a_transaction_that_is_left_in_the_thread_of_the_loop(db: sync.DatabaseAdapter) -> None:
    context = db.transaction()
    context.__enter__().create_memory(memory("lost"), "messages")

    def progress(done: int, total: int | None) -> None:
        error = ZeroDivisionError()
        assert not context.__exit__(ZeroDivisionError, error, None)
        raise error

    with pytest.raises(ZeroDivisionError) as kept:
        db.load_memories([memory("kept")], "messages", progress=progress)
    assert kept.tb is not None
    while left_open(db):
        assert db.is_ready()
    assert texts(db) == ["kept"]


def test_left_while_a_call_is_handed_over(db: sync.DatabaseAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = [iterating(db)]
    next(begun[0])
    real = asyncio.run_coroutine_threadsafe

    def run(coroutine: Any, loop: asyncio.AbstractEventLoop) -> Any:
        begun.clear()
        return real(coroutine, loop)

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", run)
    assert db.is_ready()
    assert not left_open(db)


# --- threads ---------------------------------------------------------------------------------------------------------


def test_eight_threads_at_once(db: sync.DatabaseAdapter) -> None:
    def work(number: int) -> int:
        for turn in range(10):
            db.create_memory(memory(f"{number}.{turn}"), "messages")
            with db.transaction() as tx:
                tx.create_memory(memory(f"{number}.{turn} tx"), "messages")
            assert len(db.get_memories(table_name="messages", text_contains=f"{number}.{turn}")) == 2
        return number

    assert run_in_threads(work, 8) == list(range(8))
    assert db.count_memories() == 160


def test_one_transaction_from_several_threads(db: sync.DatabaseAdapter) -> None:
    with db.transaction() as tx:
        results = run_in_threads(lambda number: tx.create_memory(memory(str(number)), "messages"), 8)
        assert all(isinstance(result, UUID) for result in results)
    assert texts(db) == list("01234567")


def test_interrupt_frees_the_call(db: sync.DatabaseAdapter, dsn: str) -> None:
    id = db.create_memory(memory("old"), "messages")
    holder = Holder(dsn, id)

    def interrupt() -> None:
        holder.wait_for(1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            db.update_memory(memory("new", id=id))
        assert vars(db)["_adapter"]._executor.in_flight == 0
        helper.join(DEADLINE)
        # The server has been told, too.
        holder.wait_for(0)
        assert texts(db) == ["old"]
        holder.let_go()
        assert db.update_memory(memory("new", id=id))
    finally:
        holder.close()


def interrupt_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next blocking call be interrupted when it has ended and not yet given its result."""
    real = asyncio.run_coroutine_threadsafe

    def run(coroutine: Any, loop: asyncio.AbstractEventLoop) -> Any:
        monkeypatch.undo()
        future: Any = real(coroutine, loop)
        ended = future.result

        def result() -> None:
            ended()
            raise KeyboardInterrupt

        future.result = result
        return future

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", run)


def test_interrupt_of_an_open_that_has_just_ended(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, opened = threads(), set(_shutdown.opened)
    interrupt_next(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        sync.open(agent_id=uuid4(), dsn=dsn)
    assert (threads(), _shutdown.opened) == (before, opened)


def test_interrupt_of_an_open_before_its_end(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter is open by then, and nobody has it."""

    def interrupted() -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    before, opened = threads(), set(_shutdown.opened)
    monkeypatch.setattr(_shutdown, "install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sync.open(agent_id=uuid4(), dsn=dsn, handle_signals=True)
    assert (threads(), _shutdown.opened) == (before, opened)


def test_interrupt_of_a_transaction_that_has_just_begun(
    db: sync.DatabaseAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_next(monkeypatch)
    # Who keeps the error keeps its frames, and so what they hold.
    with pytest.raises(KeyboardInterrupt) as kept, db.transaction():
        pass
    assert kept.tb is not None
    assert vars(db)["_adapter"]._executor.in_flight == 0


@pytest.mark.parametrize("begun", [False, True])
def test_interrupt_while_a_call_is_handed_over(
    db: sync.DatabaseAdapter, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """The loop may have it and run it, or not: nobody waits for it, and it must not go on."""
    real = asyncio.run_coroutine_threadsafe

    def run(coroutine: Any, loop: asyncio.AbstractEventLoop) -> None:
        monkeypatch.undo()
        if begun:
            real(coroutine, loop)
        raise KeyboardInterrupt

    def interrupt_next() -> None:
        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", run)

    interrupt_next()
    with pytest.raises(KeyboardInterrupt):
        db.count_memories()
    interrupt_next()
    with pytest.raises(KeyboardInterrupt):
        next(db.wait_for_tasks())
    interrupt_next()
    with pytest.raises(KeyboardInterrupt), db.transaction():
        pass
    with pytest.raises(KeyboardInterrupt), db.transaction() as tx:
        interrupt_next()
        with tx.transaction():
            pass
    assert vars(db)["_adapter"]._executor.in_flight == 0


def test_call_inside_the_own_loop_is_refused(db: sync.DatabaseAdapter) -> None:
    db.create_memory(memory(embedding=np.ones(384)), "messages")

    def progress(done: int, total: int) -> None:
        db.count_memories()

    with pytest.raises(elizasql.ArgumentError, match="own event loop"):
        db.index_memories(progress)
    with pytest.raises(elizasql.ArgumentError, match="own event loop"):
        db.index_memories(lambda done, total: db.close(), rebuild=True)
    assert db.is_ready()


# --- the caller's code in the loop ------------------------------------------------------------------------------------


def from_source(db: sync.DatabaseAdapter, error: BaseException) -> None:
    def source() -> Iterator[Memory]:
        yield memory()
        raise error

    db.load_memories(source(), "messages")


def from_progress(db: sync.DatabaseAdapter, error: BaseException) -> None:
    def progress(done: int, total: int | None) -> None:
        raise error

    db.load_memories([memory()], "messages", progress=progress)


def from_embed(db: sync.DatabaseAdapter, error: BaseException) -> None:
    def embed(given: list[str]) -> Any:
        raise error

    db.create_memory(memory(embedding=np.ones(384)), "messages")
    db.reembed(768, embed)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("call", [from_source, from_progress, from_embed])
def test_exit_is_the_callers_and_the_others_go_on(
    db: sync.DatabaseAdapter,
    dsn: str,
    call: Callable[[sync.DatabaseAdapter, BaseException], None],
    error: type[BaseException],
) -> None:
    raised = error("mine")
    id = db.create_memory(memory("old"), "messages")
    holder = Holder(dsn, id)
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(db.update_memory, memory("new", id=id))
            holder.wait_for(1)
            with pytest.raises(error) as caught:
                call(db, raised)
            holder.let_go()
            assert waiting.result(DEADLINE)
    finally:
        holder.close()
    assert caught.value is raised
    assert "new" in texts(db)


def test_exit_while_the_adapter_closes(make: Callable[..., sync.DatabaseAdapter]) -> None:
    before = threads()
    db = make()
    begun = threading.Event()

    async def source() -> AsyncIterator[Memory]:
        yield memory()
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            sys.exit("mine")

    def work(number: int) -> Any:
        if number:
            begun.wait(DEADLINE)
            return db.close()
        return db.load_memories(source(), "messages")

    results = run_in_threads(work, 2)
    assert isinstance(results[0], SystemExit)
    assert results[1] is None
    assert threads() == before


def test_error_of_a_call_beside_the_transaction_around_it_says_so(db: sync.DatabaseAdapter) -> None:
    beside = "is no part of it"
    with pytest.raises(elizasql.ForeignKeyError, match=beside), db.transaction() as tx:
        db.create_memory(memory(room_id=tx.create_room({"source": "test", "type": "GROUP"})), "messages")
    for where in (db.transaction, lambda: nullcontext(db)):
        with pytest.raises(elizasql.ForeignKeyError) as caught, where() as tx:
            tx.create_memory(memory(room_id=uuid4()), "messages")
        assert beside not in str(caught.value)


# --- close -----------------------------------------------------------------------------------------------------------


def test_use_after_close(make: Callable[..., sync.DatabaseAdapter]) -> None:
    before = threads()
    db = make()
    db.close()
    assert threads() == before
    db.close()
    for call in (
        db.get_agents,
        lambda: db.create_memory(memory(), "messages"),
        lambda: db.transaction().__enter__(),
        lambda: db.with_entity_context(None, lambda tx: None),
    ):
        with pytest.raises(elizasql.ClosedError):
            call()
    assert isinstance(db.agent_id, UUID)


def test_health_after_close(make: Callable[..., sync.DatabaseAdapter]) -> None:
    """What a readiness check asks of a program that is about to end is no error, as little as with `await`."""
    db = make()
    open_keys = list(db.health())
    db.close()
    assert db.is_ready() is False
    health = db.health()
    assert list(health) == open_keys
    assert (health["ready"], health["latency"], health["error"]) == (False, None, "ClosedError: the adapter is closed")


def test_closing_from_many_threads(make: Callable[..., sync.DatabaseAdapter]) -> None:
    before = threads()
    db = make()
    assert run_in_threads(lambda number: db.close(), 8) == [None] * 8
    assert threads() == before


def test_closing_under_calls(make: Callable[..., sync.DatabaseAdapter]) -> None:
    """Every call ends, with its result or as closed."""
    for _ in range(5):
        db = make()
        agent = db.agent_id

        def work(number: int, db: sync.DatabaseAdapter = db) -> int:
            if number == 7:
                db.close()
            done = 0
            try:
                while True:
                    db.create_memory(memory(), "messages")
                    done += 1
            except elizasql.ClosedError:
                return done

        results = run_in_threads(work, 8)
        assert all(isinstance(result, int) for result in results), results
        assert make(agent).count_memories() == sum(results)


def test_close_that_fails_keeps_nothing(make: Callable[..., sync.DatabaseAdapter]) -> None:
    """As where the embedded server does not stop."""
    db: Any = make()

    async def fail() -> None:
        raise elizasql.EmbeddedServerError("it does not stop")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db._adapter._resident, "close", fail)
        with pytest.raises(elizasql.EmbeddedServerError):
            db.close()
    assert db not in vars(sync)["_opened"]
    assert db._loop._loop.is_closed()


def test_close_in_a_transaction_of_another_thread(make: Callable[..., sync.DatabaseAdapter], dsn: str) -> None:
    db = make()
    id = db.create_memory(memory("old"), "messages")
    holder = Holder(dsn, id)

    def work(number: int) -> None:
        if number:
            holder.wait_for(1)
            db.close(timeout=0.1)
        else:
            with db.transaction() as tx:
                tx.update_memory(memory("new", id=id))

    try:
        results = run_in_threads(work, 2)
        assert isinstance(results[0], (elizasql.ClosedError, elizasql.ConnectionLostError))
        assert results[1] is None
    finally:
        holder.close()


EXIT = """
import contextlib, sys, threading, uuid
import elizasql, elizasql.sync as sync

place, how = sys.argv[1:]
db = sync.open(agent_id=uuid.uuid4(), **({"dsn": place} if "://" in place else {"data_dir": place}))
db.ensure_agent_exists({"name": "test"})
if how == "transaction":
    context = db.transaction()
    tx = context.__enter__()
    tx.create_memory({"content": {"text": "lost"}}, "messages")
elif how == "iterating":
    def iterate():
        with contextlib.suppress(elizasql.ClosedError):
            next(db.wait_for_tasks())

    threading.Thread(target=iterate, daemon=True).start()
elif how == "closed":
    db.close()
print("done", flush=True)
"""


def _run(script: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        **options,
    )


@pytest.mark.parametrize("how", ["idle", "transaction", "iterating", "closed"])
def test_interpreter_ends_without_close(dsn: str, how: str) -> None:
    run = _run(EXIT, dsn, how)
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")


def test_interpreter_ends_without_close_of_the_embedded_server(dsn: str, server_dir: Path) -> None:
    if str(server_dir) not in dsn:
        pytest.skip("the embedded server is not used")
    run = _run(EXIT, str(server_dir), "idle")
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")


FORK = """
import os, signal, sys, uuid, warnings

import elizasql
from elizasql import sync

warnings.simplefilter("ignore", DeprecationWarning)  # of fork: there are threads
_, dsn, how = sys.argv
db = sync.open(agent_id=uuid.uuid4(), dsn=dsn, indexing="manual")
pid = os.fork()
if pid == 0:
    signal.alarm(30)  # what hangs must not outlive the test
    if how != "exit":
        try:
            if how == "health":
                sys.exit(8 if db.is_ready() or not db.health()["error"].startswith("WrongLoopError: ") else 0)
            db.close() if how == "close" else db.get_agents()
        except elizasql.WrongLoopError:
            sys.exit(7)
    sys.exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), db.is_ready())
db.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(("how", "code"), [("call", 7), ("health", 0), ("close", 0), ("exit", 0)])
def test_forked_child_is_refused_and_ends(dsn: str, how: str, code: int) -> None:
    run = _run(FORK, dsn, how)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{code} True\n", "")


# --- types -----------------------------------------------------------------------------------------------------------


def test_stub_is_what_the_methods_are() -> None:
    assert sync_stub.generate() == sync_stub.STUB.read_text(encoding="utf-8"), sync_stub.HOW


def test_stub_names_every_method() -> None:
    text = sync_stub.STUB.read_text(encoding="utf-8")
    for name in ASYNCHRONOUS:
        assert f"    def {name}(" in text, name


@pytest.mark.timeout(300)
def test_source_beside_the_stub_is_checked_too() -> None:
    """mypy takes the stub for the module and would never look at what is behind it."""
    source = sync_stub.STUB.with_suffix(".py")
    command = [sys.executable, "-m", "mypy", "--strict", str(source)]
    run = subprocess.run(command, cwd=source.parent.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
