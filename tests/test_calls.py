"""What every method has in common: its time limit, its figures, its log line and its span."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import inspect
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import asyncpg
import numpy as np
import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import elizasql
from elizasql import DatabaseAdapter, Memory, _calls, _hosts, _telemetry
from elizasql._store import Store
from tests.conftest import MakeAdapter
from tests.locking import locked


def memory(text: str = "x", **fields: Any) -> Memory:
    return Memory(content={"text": text}, **fields)


# --- the limit -------------------------------------------------------------------------------------------------------


def test_every_method_takes_a_time_limit() -> None:
    for name, method in inspect.getmembers(DatabaseAdapter, inspect.iscoroutinefunction):
        if name.startswith("_") or name in ("close", "with_entity_context"):
            continue
        parameter = inspect.signature(method).parameters["timeout"]
        assert (parameter.kind, parameter.default) == (parameter.KEYWORD_ONLY, None), name


def test_a_method_without_one_is_refused_when_its_class_is_made() -> None:
    with pytest.raises(TypeError, match=r"Other\.get_thing must take timeout"):

        class Other(Store):
            async def get_thing(self) -> None:
                pass

    with pytest.raises(TypeError, match="keyword-only"):

        class Another(Store):
            async def get_thing(self, timeout: float | None = None) -> None:
                pass


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e9, True, "1", object()])
async def test_a_limit_that_is_none(db: DatabaseAdapter, round_trips: list[str], timeout: Any) -> None:
    with pytest.raises(elizasql.ArgumentError, match="timeout"):
        await db.get_memory_by_id(uuid4(), timeout=timeout)
    assert not round_trips


async def test_limit_of_one_call(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    """The server is told to stop, the connection is used again, and the next call has its own limit."""
    db = await make_db(pool_max_size=1)
    id = await db.create_memory(memory(), "messages")
    # Its only connection is open and knows the statement: however slow the machine, the limit passes in the wait.
    assert await db.update_memory(memory("x", id=id))
    connection, used = await db._executor.lane.acquire(5)
    pid = connection.get_server_pid()
    db._executor.lane.keep(connection)
    assert used
    async with locked(raw, id):
        with pytest.raises(elizasql.DeadlineError) as caught:
            await db.update_memory(memory("y", id=id), timeout=0.3)
        assert caught.value.statement == "update_memories"
        await db._executor.lane.let_go()
        assert await raw.fetchval("SELECT state FROM pg_stat_activity WHERE pid = $1", pid) in ("idle", None)
    assert await db.update_memory(memory("y", id=id))
    # The server answered that it has stopped: that speaks for it.
    assert db._connections.breaker.failures == 0


async def test_limit_holds_for_the_whole_of_a_call(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    """Several statements of one call have one limit between them, and so have the tries."""
    db = await make_db(batch_size=1)
    ids = await db.create_memories([memory(), memory()], "messages")
    async with locked(raw, max(ids)):
        with pytest.raises(elizasql.DeadlineError):
            await db.update_memories([memory("y", id=id) for id in ids], timeout=0.3)
    assert [found.content for found in await db.get_memories(table_name="messages")] == [{"text": "x"}] * 2


async def test_limit_bounds_the_wait_for_a_connection(make_db: MakeAdapter) -> None:
    db = await make_db(pool_max_size=1)
    connection, _ = await db._executor.lane.acquire(5)
    with pytest.raises(elizasql.PoolTimeoutError):
        await db.get_memory_by_id(uuid4(), timeout=0.05)
    db._executor.lane.keep(connection)
    assert await db.get_memory_by_id(uuid4(), timeout=5) is None


async def test_background_work_waits_for_other_background_work(make_db: MakeAdapter) -> None:
    """Who builds an index has a connection for longer than a caller would wait for one."""
    db = await make_db(pool_max_size=1, background_pool_size=1, connection_timeout=1.0)
    ours, theirs = (await db._background.lane.acquire(5))[0], (await db._executor.lane.acquire(5))[0]
    patient = asyncio.ensure_future(db.index_memories())
    with pytest.raises(elizasql.PoolTimeoutError):
        await db.get_memory_by_id(uuid4())
    db._executor.lane.keep(theirs)
    assert not patient.done()
    db._background.lane.keep(ours)
    assert await patient == 0


async def test_a_write_that_ran_into_its_limit_says_whether_it_may_be_repeated(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    id = await db.create_memory(memory(), "messages")
    async with locked(raw, id):
        with pytest.raises(elizasql.DeadlineError) as caught:
            await db.update_memory(memory("y", id=id), timeout=0.2)
        assert caught.value.retryable
        await db._executor.lane.let_go()  # the next call has a connection at once
        with pytest.raises(elizasql.DeadlineError) as caught:
            await db.delete_memory(id, timeout=0.2)
        assert not caught.value.retryable, "a second time would give another number"


async def test_limit_bounds_the_tries(make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that would reach beyond it is not begun: the caller gets the error that there is."""
    db = await make_db()
    tried = 0

    async def refused(timeout: float, late: Any) -> Any:
        nonlocal tried
        tried += 1
        raise ConnectionRefusedError

    monkeypatch.setattr(db._executor.lane, "take", lambda: None)
    monkeypatch.setattr(db._executor.lane, "acquire", refused)
    with pytest.raises(elizasql.ConnectionLostError):
        await db.get_memory_by_id(uuid4(), timeout=0.5)
    assert tried == 1


async def test_a_call_is_not_tried_again_before_its_wait_is_over(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tries at once would neither spare the server nor outlast its restart."""
    db = await make_db(base_delay=60.0, max_delay=60.0)
    tried = 0

    async def refused(timeout: float, late: Any) -> Any:
        nonlocal tried
        tried += 1
        raise ConnectionRefusedError

    with monkeypatch.context() as patch:
        patch.setattr(db._executor.lane, "take", lambda: None)
        patch.setattr(db._executor.lane, "acquire", refused)
        call = asyncio.create_task(db.get_memory_by_id(uuid4(), timeout=3600))
        while not tried:
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert (tried, db._meter.retries) == (1, 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert db._executor.in_flight == 0


@pytest.mark.parametrize(("kind", "tries"), [(asyncpg.OutOfMemoryError, 2), (asyncpg.DiskFullError, 1)])
async def test_tries_of_a_server_that_has_run_out_of_something(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch, kind: type[asyncpg.PostgresError], tries: int
) -> None:
    """Memory may be free a moment later, and not a third time; a disk that is full stays so."""
    db = await make_db(base_delay=0.0, jitter_max=0.0, max_retries=5)
    tried = 0

    async def refused(*args: Any, **options: Any) -> Any:
        nonlocal tried
        tried += 1
        raise kind("none left")

    monkeypatch.setattr(asyncpg.Connection, "fetch", refused)
    with pytest.raises(elizasql.ServerBusyError):
        await db.get_tasks()
    assert tried == tries


@pytest.mark.parametrize("given", [True, False])
async def test_limit_of_a_call_that_the_callers_code_makes_inside_another(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], given: bool
) -> None:
    """The source of a load calls an adapter, while the load itself may take a day."""
    db, other = await make_db(), await make_db()
    called = db if given else other
    id = await called.create_memory(memory(), "messages")
    other.config = replace(other.config, timeout=0.2)  # not before: on a busy machine that is too short to open it

    async def source() -> AsyncIterator[Memory]:
        yield memory("1")
        await called.update_memory(memory("y", id=id), timeout=0.2 if given else None)

    async with locked(raw, id):
        with pytest.raises(elizasql.DeadlineError) as caught:
            await asyncio.wait_for(db.load_memories(source(), "messages"), 10)
    assert caught.value.statement == "update_memories"
    assert called._meter.snapshot()["update_memory"]["errors"] == {"DeadlineError": 1}


async def test_limit_of_another_adapters_transaction_inside_a_call(make_db: MakeAdapter) -> None:
    db, other = await make_db(), await make_db(pool_max_size=1, connection_timeout=60.0)
    other._executor._config = replace(other.config, timeout=0.2)
    connection, _ = await other._executor.lane.acquire(5)

    async def source() -> AsyncIterator[Memory]:
        async with other.transaction():
            yield memory()

    with pytest.raises(elizasql.PoolTimeoutError):
        await asyncio.wait_for(db.load_memories(source(), "messages"), 10)
    other._executor.lane.keep(connection)


async def test_call_inside_another_does_not_outlast_it() -> None:
    class Adapter:
        config = elizasql.Config(timeout=60.0)

        def __init__(self) -> None:
            self._meter = _calls.Meter(1e9, None)

        async def left(self, *, timeout: float | None = None) -> float:
            return _calls.current_deadline(60.0) - time.monotonic()

        async def ask(self, called: Any, *, timeout: float | None = None, **limit: float) -> Any:
            await called.left(timeout=0.5)
            return await called.left(**limit)

    _calls.bound_methods(Adapter)
    one, other = Adapter(), Adapter()
    for called in (one, other):
        assert await one.ask(called, timeout=5.0) <= 5.0
        with _calls.within(5.0):
            assert await called.left() <= 5.0
            assert await called.left(timeout=1.0) <= 1.0
    assert one._meter.snapshot()["ask"]["count"] == 2


def test_time_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    own, other = _calls.Meter(1e9, None), _calls.Meter(1e9, None)

    def deadlines() -> list[float]:
        return [_calls.current_deadline(5.0, meter) for meter in (None, own, other)]

    assert deadlines() == [105.0, 105.0, 105.0]
    with _calls.within(30.0):
        # Of no adapter, as where the background builds an index: in force for every one.
        assert deadlines() == [130.0, 130.0, 130.0]
        with _calls.within(20.0):
            assert deadlines() == [120.0, 120.0, 120.0]
        with _calls.within(60.0):
            assert deadlines() == [130.0, 130.0, 130.0]
        assert deadlines() == [130.0, 130.0, 130.0]
        with pytest.raises(KeyError), _calls.within(20.0):
            raise KeyError
        assert deadlines() == [130.0, 130.0, 130.0]
        outlives = contextvars.copy_context()
    assert deadlines() == outlives.run(deadlines) == [105.0, 105.0, 105.0]

    def inside_a_call() -> None:
        _calls._running.set(_calls._Call(130.0, own))
        assert deadlines() == [130.0, 130.0, 105.0]
        with _calls.within(60.0):
            assert deadlines() == [130.0, 130.0, 105.0]

    contextvars.copy_context().run(inside_a_call)


async def test_task_that_a_call_starts_has_not_its_limit() -> None:
    async def running() -> object:
        return _calls._running.get()

    with _calls.within(1.0):
        assert await _calls.spawn(running(), "test") is None
        assert await asyncio.create_task(running()) is not None


@pytest.mark.parametrize("steps", range(5))
async def test_wait_for_hears_a_cancellation_that_comes_together_with_the_result(steps: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[int] = loop.create_future()

    async def wait() -> int:
        return await ready

    task = asyncio.create_task(_calls.wait_for(wait(), 60.0, "test"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    ready.set_result(1)
    for _ in range(steps):
        await asyncio.sleep(0)
    done = task.done()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled() is not done


async def test_wait_for_ends_what_takes_longer() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    with pytest.raises(asyncio.TimeoutError):
        await _calls.wait_for(work(), 0.0, "test")
    assert ended
    with pytest.raises(ZeroDivisionError):
        await _calls.wait_for(_divide(), 60.0, "test")


async def test_wait_for_ends_what_nobody_waits_for_any_more() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(_calls.wait_for(work(), 60.0, "test"))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert ended.is_set()


async def test_end_of_a_task() -> None:
    untold: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: untold.append(context))
    endless, failed = asyncio.ensure_future(asyncio.Event().wait()), asyncio.ensure_future(_divide())
    await asyncio.wait({failed})
    for task in (endless, failed):
        await _calls.end(task)
    assert endless.cancelled()
    del task, failed
    gc.collect()
    assert not untold


async def _divide() -> float:
    return 1 / 0


async def test_task_that_outlives_the_call_in_which_it_was_begun(db: DatabaseAdapter) -> None:
    """Such as a worker that the source of a load, or what makes vectors, begins for good at its first use."""
    over = asyncio.Event()
    tasks: list[asyncio.Task[float]] = []

    async def work() -> float:
        await over.wait()
        assert await db.count_memories() == 1
        return _calls.current_deadline(60.0) - time.monotonic()

    async def source() -> AsyncIterator[Memory]:
        tasks.append(asyncio.create_task(work()))
        yield memory()

    await db.load_memories(source(), "messages", timeout=20.0)
    over.set()
    assert await tasks[0] > 30.0, "the load's limit is not the worker's"
    assert db._meter.snapshot()["count_memories"]["count"] == 1


# --- the figures -----------------------------------------------------------------------------------------------------


async def test_stats(db: DatabaseAdapter) -> None:
    before = (await db.stats())["methods"]["ensure_agent_exists"]["count"]
    for _ in range(20):
        await db.create_memory(memory(), "messages")
    await db.ensure_agent_exists({"name": "x"})
    with pytest.raises(elizasql.ForeignKeyError):
        await db.create_memory(memory(room_id=uuid4()), "messages")
    with pytest.raises(elizasql.ArgumentError):
        await db.create_memory(memory(), "messages", unique="yes")  # type: ignore[arg-type]
    stats = await db.stats()
    created = stats["methods"]["create_memory"]
    assert created["count"] == 22
    assert created["errors"] == {"ForeignKeyError": 1, "ArgumentError": 1}
    assert 0 < created["p50"] <= created["p95"] <= created["p99"] <= created["longest"] < 60
    assert 0 < created["mean"] <= created["longest"]
    assert stats["methods"]["ensure_agent_exists"]["count"] == before + 1
    assert (stats["retries"], stats["unindexed"]) == (0, 0)
    assert stats["breaker"] == {"state": "closed", "failures": 0, "opened": 0, "retry_after": 0.0}
    assert stats["pool"] == {"size": 1, "in_use": 0, "waiting": 0, "max_size": 5}


async def test_methods_that_a_method_calls_are_not_counted(db: DatabaseAdapter) -> None:
    await db.search_memories_by_embedding(np.ones(384, np.float32), table_name="messages")
    methods = (await db.stats())["methods"]
    assert methods["search_memories_by_embedding"]["count"] == 1
    assert "search_memories" not in methods


async def test_tail_is_told(db: DatabaseAdapter) -> None:
    await db.create_memory(memory(embedding=np.ones(384, np.float32)), "messages")
    assert (await db.stats())["unindexed"] == 1
    await db.index_memories()
    assert (await db.stats())["unindexed"] == 0


def test_quantiles_are_right_within_a_bucket() -> None:
    meter = _calls.Meter(1e9, None)
    for microseconds in range(1, 10_001):
        meter.record("m", 0.0, microseconds * 1e-6, None)
    found = meter.snapshot()["m"]
    for name, wanted in (("p50", 5000), ("p95", 9500), ("p99", 9900)):
        assert abs(found[name] * 1e6 / wanted - 1) < 0.05, name
    assert found["longest"] == pytest.approx(0.01)
    assert found["mean"] == pytest.approx(0.0050005)


def test_quantiles_of_two_calls_are_the_two() -> None:
    meter = _calls.Meter(1e9, None)
    for seconds in (0.001, 1.0):
        meter.record("m", 0.0, seconds, None)
    found = meter.snapshot()["m"]
    assert found["p50"] == pytest.approx(0.001, rel=0.05)
    assert found["p95"] == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e-6, 1.0, 3600.0, 1e9])
def test_any_duration_can_be_recorded(seconds: float) -> None:
    meter = _calls.Meter(1e12, None)
    meter.record("m", 0.0, seconds, None)
    found = meter.snapshot()["m"]
    assert found["longest"] == seconds
    assert 0 <= found["p50"] <= found["p99"] <= seconds


# --- health ----------------------------------------------------------------------------------------------------------


async def test_health(db: DatabaseAdapter) -> None:
    health = await db.health()
    assert health["ready"]
    assert 0 < health["latency"] < 60
    assert health["error"] is None
    assert health["breaker"]["state"] == "closed"


async def test_health_of_a_closed_adapter_is_no_error(make_db: MakeAdapter) -> None:
    db = await make_db()
    await db.close()
    health = await db.health()
    assert (health["ready"], health["latency"]) == (False, None)
    assert health["error"].startswith("ClosedError")


async def test_health_where_the_server_gives_no_sign_of_life(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = await make_db(pool_max_size=1)
    lane = db._executor.lane
    connection, _ = await lane.acquire(5)
    await connection.execute("BEGIN")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.execute("SELECT 1 / 0")
    lane.keep(connection)
    health = await db.health()
    assert (health["ready"], health["latency"]) == (False, None)
    assert health["error"].startswith("TransactionError: ping: ")
    assert await db.is_ready(), "what failed is not kept as it is"

    async def refuse(*args: Any, **options: Any) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(_hosts, "_ask_driver", refuse)
    await lane.replace()
    health = await db.health()
    assert (health["ready"], health["latency"]) == (False, None)
    assert health["error"].startswith("ConnectionLostError: ping: ")
    assert not await db.is_ready()
    assert db._executor.in_flight == 0


async def test_a_sign_of_life_that_nobody_waits_for_any_more(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = await make_db(pool_max_size=1)
    asked = asyncio.Event()

    async def never(*args: Any, **options: Any) -> None:
        asked.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(asyncpg.Connection, "fetchval", never)
        asking = asyncio.create_task(db.is_ready())
        await asked.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    await db._executor.lane.let_go()
    assert (db._executor.lane.in_use, db._executor.in_flight) == (0, 0)
    assert await db.is_ready()


async def test_open_circuit_answers_without_the_server(db: DatabaseAdapter, round_trips: list[str]) -> None:
    breaker = db._connections.breaker
    for _ in range(5):
        breaker.fail(breaker.enter())
    with pytest.raises(elizasql.CircuitOpenError) as caught:
        await db.get_memory_by_id(uuid4())
    assert 0 < caught.value.retry_after <= 60
    assert caught.value.retryable
    assert caught.value.statement == "get_memory_by_id"
    assert not round_trips
    health = await db.health()
    assert health["breaker"]["state"] == "open"
    assert health["ready"], "one try is made all the same: it is how to find out"


# --- the log line ----------------------------------------------------------------------------------------------------


async def test_slow_call_is_logged(make_db: MakeAdapter, caplog: pytest.LogCaptureFixture) -> None:
    db = await make_db(slow_call=0.0)
    caplog.clear()
    with pytest.raises(elizasql.ForeignKeyError):
        await db.create_memory(memory(room_id=uuid4()), "messages")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "create_memory took" in caplog.text
    assert "ForeignKeyError" in caplog.text


async def test_a_call_whose_work_takes_long_is_not_slow(make_db: MakeAdapter, caplog: pytest.LogCaptureFixture) -> None:
    db = await make_db(slow_call=0.0)
    caplog.clear()
    await db.load_memories([memory(embedding=np.ones(384, np.float32))], "messages")
    await db.index_memories()
    assert not caplog.records


async def test_a_call_whose_work_takes_long_has_the_time_for_it(make_db: MakeAdapter) -> None:
    db = await make_db(timeout=30.0)
    left: list[float] = []

    def progress(*_: object) -> None:
        left.append(_calls.current_deadline(0.0) - time.monotonic())

    await db.load_memories([memory(embedding=np.ones(384, np.float32))], "messages", progress=progress)
    await db.create_memory(memory(embedding=np.ones(384, np.float32)), "messages")
    await db.index_memories(progress)
    day, hour = left
    assert 86_000 < day <= 86_400 and 3_500 < hour <= 3_600


async def test_quick_call_is_not(make_db: MakeAdapter, caplog: pytest.LogCaptureFixture) -> None:
    db = await make_db(slow_call=60.0)
    await db.create_memory(memory(), "messages")
    assert not caplog.records


# --- the span --------------------------------------------------------------------------------------------------------


async def test_spans_and_durations(make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_telemetry, "_instruments", functools.cache(_telemetry._instruments.__wrapped__))
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    meters = MeterProvider(metric_readers=[reader])
    monkeypatch.setattr(trace, "get_tracer", tracers.get_tracer)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: tracers)
    monkeypatch.setattr(metrics, "get_meter", meters.get_meter)
    db = await make_db()
    exporter.clear()
    with tracers.get_tracer("application").start_as_current_span("turn") as turn:
        await db.get_memory_by_id(uuid4())
        with pytest.raises(elizasql.ForeignKeyError):
            await db.create_memory(memory(room_id=uuid4()), "messages")
    found = {span.name: span for span in exporter.get_finished_spans()}
    read, failed = found["get_memory_by_id"], found["create_memory"]
    assert read.kind is trace.SpanKind.CLIENT
    assert read.parent is not None and read.parent.span_id == turn.get_span_context().span_id
    assert read.attributes["db.system.name"] == "postgresql"
    assert read.attributes["db.operation.name"] == "get_memory_by_id"
    began: Any = turn
    assert began.start_time <= (read.start_time or 0) <= (read.end_time or 0)
    assert read.status.status_code is trace.StatusCode.UNSET
    assert failed.status.status_code is trace.StatusCode.ERROR
    assert failed.attributes["error.type"] == "ForeignKeyError"
    assert failed.attributes["db.response.status_code"] == "23503"
    assert "postgresql://" not in str(failed.to_json())
    data = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics[0]
    assert (data.name, data.unit) == ("db.client.operation.duration", "s")
    points: Any = data.data.data_points
    assert sum(point.count for point in points) >= 2
    assert points[0].explicit_bounds[0] == 0.001, "the SDK's own are meant for milliseconds"
    tracers.shutdown()
    meters.shutdown()


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("postgresql://ann:secret@db.example:6000/agents", {"server.address": "db.example", "server.port": 6000}),
        ("postgresql://db.example/agents", {"server.address": "db.example"}),
        ("postgresql://ann@[::1]:6000/agents", {"server.address": "::1", "server.port": 6000}),
        ("postgresql://a:1,b:2/agents", {"server.address": "a", "server.port": 1}),
        ("postgresql://ann@/agents?host=/run/x&port=7", {"server.address": "/run/x", "server.port": 7}),
        ("postgresql:///agents", {}),
        ("postgresql:///?dbname=agents&host=a,b&port=1,2", {"server.address": "a", "server.port": 1}),
        ("postgresql://%2Frun%2Fx/%61gents", {"server.address": "/run/x"}),
    ],
)
def test_address_is_told_without_secrets(address: str, wanted: dict[str, Any]) -> None:
    found = _telemetry._attributes(address)
    assert found == {"db.system.name": "postgresql", "db.namespace": "agents", **wanted}


def test_database_that_is_not_named_is_not_told() -> None:
    assert "db.namespace" not in _telemetry._attributes("postgresql://ann@db.example")


async def test_recording_that_fails_changes_no_result(
    db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a span processor of the application that raises."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(db._meter, "_observe", broken)
    id = await db.create_memory(memory(), "messages")
    assert await db.get_memory_by_id(id) is not None
    with pytest.raises(elizasql.ForeignKeyError):
        await db.create_memory(memory(room_id=uuid4()), "messages")
    assert caplog.text.count("could not be recorded") == 3


def test_adapters_that_come_and_go_leave_no_instruments() -> None:
    """Where no SDK is set up the API keeps what it has made, and a process may open adapters for ever."""

    def kept() -> int:
        gc.collect()
        return sum(type(each).__name__ == "_ProxyMeter" for each in gc.get_objects())

    assert _telemetry.observer("postgresql://a/b") is not None
    before = kept()
    for _ in range(3):
        assert _telemetry.observer("postgresql://a/b") is not None
    assert kept() == before


def test_without_opentelemetry_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry", None)
    assert _telemetry.observer("postgresql://a/b") is None
