"""The network breaks in every way that the proxy knows.

The invariant: every call returns within its time limit and a second, with a result or an error of the library; once the
network is well, the very next call succeeds; nothing that was acknowledged is lost, and nothing leaks.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest

import elizasql
from elizasql import DatabaseAdapter, ElizaSQLError
from tests.faults.clock import running_time
from tests.faults.conftest import MakeAdapter
from tests.faults.harness import (
    GRACE,
    TYPE,
    Ledger,
    Workload,
    check,
    embedding_of,
    has_embedding,
    memory_of,
    new_id,
    pool_is_whole,
)
from tests.faults.proxy import Proxy
from tests.faults.server import FaultServer, until
from tests.shared import share, shared_calls
from tests.test_isolation import METHODS, filled

# Of a call while the network is broken, and while it is only slow. Far less than what a connection may take to be made:
# neither making one nor letting go of it may keep a call.
SHORT, LONG = 0.3, 10.0
CONNECTION_TIMEOUT = 5.0

# The server's last word but one on a statement.
ANSWER = b"Cs"


# --- calls -----------------------------------------------------------------------------------------------------------


class Caller:
    """Makes one call of each kind with known ids, and keeps the ledger."""

    def __init__(self, db: DatabaseAdapter, impatient: DatabaseAdapter, chance: random.Random) -> None:
        self.db = db
        # A transaction has no argument for its time limit: it is the adapter's.
        self.impatient = impatient
        self.ledger = Ledger(db.agent_id)
        self._chance = chance
        self._known = self._id()

    def _id(self) -> UUID:
        return next(id for id in iter(lambda: new_id(self._chance), None) if has_embedding(id))

    async def begin(self) -> None:
        """Store what is read and searched for; every statement is prepared on the way."""
        operation = self.ledger.begin({self._known: 1})
        await self.db.create_memory(memory_of(self._known, 1), TYPE)
        operation.acknowledge()
        for kind in KINDS:
            await self.call(kind, LONG)

    async def call(self, kind: str, timeout: float) -> None:
        """Make a call of a kind."""
        await getattr(self, kind)(timeout)

    async def _write(self, number: int, write: Callable[[list[Any]], Awaitable[Any]]) -> None:
        ids = [self._id() for _ in range(number)]
        operation = self.ledger.begin(dict.fromkeys(ids, 1))
        try:
            await write([memory_of(id, 1) for id in ids])
        except BaseException:
            operation.lose()
            raise
        operation.acknowledge()

    async def read(self, timeout: float) -> None:
        found = await self.db.get_memory_by_id(self._known, timeout=timeout)
        assert found is not None and found.id == self._known

    async def search(self, timeout: float) -> None:
        hits = await self.db.search_memories(
            embedding=embedding_of(self._known, 1), table_name=TYPE, count=1, timeout=timeout
        )
        assert [hit.id for hit in hits] == [self._known]

    async def write_one(self, timeout: float) -> None:
        await self._write(1, lambda memories: self.db.create_memory(memories[0], TYPE, timeout=timeout))

    async def write_many(self, timeout: float) -> None:
        await self._write(3, lambda memories: self.db.create_memories(memories, TYPE, timeout=timeout))

    async def write_chunks(self, timeout: float) -> None:
        """More than `batch_size`: several statements in a transaction."""
        await self._write(10, lambda memories: self.db.create_memories(memories, TYPE, timeout=timeout))

    async def transact(self, timeout: float) -> None:
        async def write(memories: list[Any]) -> None:
            context = (self.db if timeout == LONG else self.impatient).transaction()
            with within(timeout, "begin"):
                tx = await context.__aenter__()
            try:
                for memory in memories:
                    with within(timeout, "call in a transaction"):
                        await tx.create_memory(memory, TYPE, timeout=timeout)
            except BaseException as error:
                with within(timeout, "roll back"):
                    await context.__aexit__(type(error), error, error.__traceback__)
                raise
            with within(timeout, "commit"):
                await context.__aexit__(None, None, None)

        await self._write(2, write)


@contextmanager
def within(timeout: float, what: str) -> Iterator[None]:
    """Hold something to its time limit."""
    began = running_time()
    try:
        yield
    finally:
        took = running_time() - began
        assert took <= timeout + GRACE, f"{what} took {took:.2f} s with a time limit of {timeout:g} s"


KINDS = ("read", "search", "write_one", "write_many", "write_chunks", "transact")


@dataclass
class Mode:
    """A way in which the network can break.

    Attributes:
        breaks: Breaks it.
        cold: No connection is there yet when it is broken.
        works: It is slow, and nothing more: every call succeeds.
    """

    breaks: Callable[[Proxy], Any]
    cold: bool = False
    works: bool = False

    async def begin(self, proxy: Proxy, db: DatabaseAdapter) -> None:
        """Break the network of an adapter."""
        if self.cold:
            await db._connections.interactive.replace()
            proxy.cut_all()
        done = self.breaks(proxy)
        if inspect.isawaitable(done):
            await done


def _latency(proxy: Proxy) -> None:
    proxy.latency = 0.05


def _jitter(proxy: Proxy) -> None:
    proxy.latency, proxy.jitter = 0.0, 0.1


def _slices(proxy: Proxy) -> None:
    proxy.slices = True


async def _refuse(proxy: Proxy) -> None:
    await proxy.refuse()
    proxy.cut_all()


def _silent(proxy: Proxy) -> None:
    proxy.accepting = "silent"
    proxy.cut_all()


def _reset_accepted(proxy: Proxy) -> None:
    proxy.accepting = "reset"
    proxy.cut_all()


MODES = {
    "latency": Mode(_latency, works=True),
    "jitter": Mode(_jitter, works=True),
    "slices": Mode(_slices, works=True),
    "slices, cold": Mode(_slices, cold=True, works=True),
    "black hole": Mode(Proxy.hold),
    "black hole, cold": Mode(Proxy.hold, cold=True),
    "black hole after the startup packet": Mode(
        lambda proxy: proxy.when("client", b"", "hold", "after", times=None), cold=True
    ),
    "black hole after the authentication": Mode(
        lambda proxy: proxy.when("server", b"R", "hold", "after", times=None), cold=True
    ),
    "black hole while the connection is prepared": Mode(
        lambda proxy: proxy.when("client", b"PB", "hold", times=None), cold=True
    ),
    "black hole before the statement": Mode(lambda proxy: proxy.when("client", b"B", "hold", times=None)),
    "black hole before the answer": Mode(lambda proxy: proxy.when("server", ANSWER, "hold", times=None)),
    "black hole in the middle of the answer": Mode(
        lambda proxy: proxy.when("server", ANSWER, "hold", "middle", times=None)
    ),
    "black hole before the server is ready": Mode(lambda proxy: proxy.when("server", b"Z", "hold", times=None)),
    "refused": Mode(_refuse, cold=True),
    "accepted and never answered": Mode(_silent, cold=True),
    "reset when accepted": Mode(_reset_accepted, cold=True),
    "reset before the answer": Mode(lambda proxy: proxy.when("server", ANSWER, "reset", times=None)),
    "reset in the middle of a message": Mode(lambda proxy: proxy.when("server", ANSWER, "reset", "middle", times=None)),
    "reset before the statement": Mode(lambda proxy: proxy.when("client", b"B", "reset", times=None)),
    "closed before the answer": Mode(lambda proxy: proxy.when("server", ANSWER, "close", times=None)),
    "closed before the server is ready": Mode(lambda proxy: proxy.when("server", b"Z", "close", times=None)),
}


async def broken(caller: Caller, kind: str, timeout: float) -> tuple[str, float, ElizaSQLError | None]:
    """Make a call; give how long it took, and its error. Of a transaction each step has the time of a call."""
    began = running_time()
    error = None
    try:
        with within(timeout * 4 if kind == "transact" else timeout, kind):
            await caller.call(kind, timeout)
    except ElizaSQLError as raised:
        error = raised
    return kind, running_time() - began, error


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "slices, cold" else name for name in MODES]
)
async def test_every_call_ends_in_time(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, seed: int, name: str
) -> None:
    mode = MODES[name]
    timeout = LONG if mode.works else SHORT
    settings = {"dsn": proxy.dsn, "batch_size": 4, "connection_timeout": CONNECTION_TIMEOUT, "pool_max_size": 6}
    db = await make_db(timeout=60.0, **settings)
    caller = Caller(db, await make_db(db.agent_id, timeout=timeout, **settings), random.Random(seed))
    await caller.begin()
    # A connection for each.
    await asyncio.gather(*(caller.call(kind, LONG) for kind in KINDS))
    await mode.begin(proxy, db)
    results = await asyncio.gather(*(broken(caller, kind, timeout) for kind in KINDS))
    for kind, took, error in results:
        print(f"{name}: {kind} took {took:.2f} s: {type(error).__name__}")
        assert error is None or not mode.works, f"{kind}: {error!r}"
    assert mode.works or any(error for _, _, error in results), "nothing was broken"
    await proxy.heal()
    for kind in KINDS:
        await caller.call(kind, LONG)
    assert await check(server.dsn, caller.ledger) == []
    await server.no_idle_transactions(db.config.application_name)
    await pool_is_whole(db)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_of_call_alone(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, seed: int, name: str, kind: str
) -> None:
    """With one connection in all, so that the call that is looked at is the one that meets the fault."""
    mode = MODES[name]
    timeout = LONG if mode.works else SHORT
    settings = {"dsn": proxy.dsn, "batch_size": 4, "connection_timeout": CONNECTION_TIMEOUT, "pool_max_size": 1}
    db = await make_db(timeout=60.0, **settings)
    caller = Caller(db, await make_db(db.agent_id, timeout=timeout, **settings), random.Random(seed))
    await caller.begin()
    for _ in range(3):
        await mode.begin(proxy, db)
        _, _, error = await broken(caller, kind, timeout)
        assert error is None or not mode.works, repr(error)
        await proxy.heal(cut=bool(random.Random(seed).getrandbits(1)))
        await caller.call(kind, LONG)
    assert await check(server.dsn, caller.ledger) == []
    await pool_is_whole(db)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [
        name if name == "black hole" else pytest.param(name, marks=pytest.mark.slow)
        for name, mode in MODES.items()
        if not mode.works
    ],
)
async def test_every_public_method_ends_in_time(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, name: str
) -> None:
    """Not by its kind, but each of them: with arguments by which it really goes to the server."""
    together = 40
    db = await make_db(dsn=proxy.dsn, timeout=60.0, connection_timeout=60.0, pool_max_size=together)
    own = await filled(db)
    coroutines = (method for method in METHODS if inspect.iscoroutinefunction(getattr(DatabaseAdapter, method)))
    calls = {method: own.arguments(method) for method in coroutines} | shared_calls(await share(db))
    methods = list(calls)
    assert len(methods) > 150
    silent = []
    took = {}

    async def one(method: str) -> None:
        began = running_time()
        try:
            await getattr(db, method)(**{**calls[method], "timeout": SHORT})
        except elizasql.ArgumentError:
            raise  # nothing was sent
        except ElizaSQLError:
            pass
        else:
            silent.append(method)
        took[method] = running_time() - began

    async def meet(methods: list[str]) -> None:
        """Let each of them meet the fault, with a connection that was well."""
        await proxy.heal(cut=True)
        assert all(await asyncio.gather(*(db.is_ready(timeout=LONG) for _ in methods)))
        await MODES[name].begin(proxy, db)
        await asyncio.gather(*map(one, methods))

    for start in range(0, len(methods), together):
        await meet(methods[start : start + together])
    # They shared a processor that may be busy; whoever was late is alone now. Every other limit is a minute.
    late = [method for method in methods if took[method] > SHORT + GRACE]
    for method in late:
        await meet([method])
    print(f"{name}: late among others: {late}, alone: {[round(took[method], 2) for method in late]}")
    assert max(took.values()) <= SHORT + GRACE, took
    # Those need no server.
    assert set(silent) <= {"health", "stats"}, silent
    await proxy.heal()
    assert await db.is_ready(timeout=LONG)
    await pool_is_whole(db)


# --- more than a call ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(300)])])
async def test_everything_breaks_under_load(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, seed: int, seconds: float
) -> None:
    """One mode after the other, by chance, while several tasks write, read and search."""
    chance = random.Random(seed)
    settings = {"timeout": 1.5, "connection_timeout": 1.0, "batch_size": 5, "indexing": "background"}
    db = await make_db(dsn=proxy.dsn, index_interval=1.5, **settings)
    seen: list[str] = []
    async with Workload(db, seed=seed, timeout=1.5, writers=4, readers=2) as work:
        await work.advance(5)
        until_then = time.monotonic() + seconds
        while time.monotonic() < until_then:
            seen.append(name := chance.choice(list(MODES)))
            if MODES[name].cold and chance.random() < 0.5:
                proxy.cut_all()
            done = MODES[name].breaks(proxy)
            if inspect.isawaitable(done):
                await done
            # How long it stays broken, not a wait for something.
            await asyncio.sleep(chance.uniform(0.1, 1.0))
            await proxy.heal(cut=chance.random() < 0.5)
            await work.advance(3)
    print(seen, work)
    assert work.figures.violations == [], (seen, work)
    assert await check(server.dsn, work.ledger) == [], (seen, work)
    await server.no_idle_transactions(db.config.application_name)
    await pool_is_whole(db)


async def test_cancelled_call_is_let_go_at_once_in_a_black_hole(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer
) -> None:
    """The connection goes back in the background: the driver waits there for an answer to its cancellation."""
    db = await make_db(dsn=proxy.dsn, pool_max_size=2, timeout=60.0, connection_timeout=1.0)
    rule = proxy.when("server", ANSWER, "hold", everywhere=True)
    task = asyncio.create_task(db.get_memory_by_id(uuid4()))
    await rule.fired.wait()
    began = running_time()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert running_time() - began < GRACE
    assert await broken_within(db, 0.5) is not None
    await proxy.heal()
    assert await db.get_memory_by_id(uuid4(), timeout=LONG) is None
    await pool_is_whole(db)


@pytest.mark.parametrize(
    ("how", "timeout", "connection_timeout"),
    [("rolled back", SHORT, CONNECTION_TIMEOUT), ("rolled back", 60.0, 1.0), ("kept", SHORT, CONNECTION_TIMEOUT)],
)
async def test_transaction_ends_in_time_in_a_black_hole(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, how: str, timeout: float, connection_timeout: float
) -> None:
    """Neither the end of a transaction nor the release of its connection may hang; the server undoes it."""
    db = await make_db(dsn=proxy.dsn, pool_max_size=1, timeout=timeout, connection_timeout=connection_timeout)
    ledger = Ledger(db.agent_id)
    id = new_id(random.Random(3))
    operation = ledger.begin({id: 1})
    context = db.transaction()
    tx = await context.__aenter__()
    await tx.create_memory(memory_of(id, 1), TYPE, timeout=LONG)
    proxy.hold()
    began = running_time()
    if how == "kept":
        with pytest.raises(ElizaSQLError):
            await context.__aexit__(None, None, None)
        operation.lose()
    else:
        error = ZeroDivisionError()
        assert not await context.__aexit__(ZeroDivisionError, error, None)
        operation.refuse()
    assert running_time() - began <= min(timeout, connection_timeout) + GRACE
    await proxy.heal(cut=True)
    assert await db.is_ready(timeout=LONG)
    await server.no_idle_transactions(db.config.application_name)
    assert await check(server.dsn, ledger) == []
    await pool_is_whole(db)


@pytest.mark.parametrize("busy", [False, True])
async def test_closing_ends_in_time_in_a_black_hole(proxy: Proxy, make_db: MakeAdapter, busy: bool) -> None:
    db = await make_db(dsn=proxy.dsn, timeout=60.0, connection_timeout=1.0)
    await asyncio.gather(*(db.is_ready() for _ in range(3)))
    proxy.hold()
    task = asyncio.create_task(db.get_memory_by_id(uuid4())) if busy else None
    await asyncio.sleep(0)
    began = running_time()
    await db.close(timeout=0.5)
    # The connections that are idle have as long to be closed in order as others have to be made.
    assert running_time() - began <= 0.5 + 2.0 + GRACE
    if task is not None:
        with pytest.raises(elizasql.ClosedError):
            await task
    await proxy.heal(cut=True)


async def test_closing_waits_for_everything_at_once(proxy: Proxy, make_db: MakeAdapter) -> None:
    """Four workers' notifications, and calls in both lanes, have the time of one."""
    db = await make_db(dsn=proxy.dsn, timeout=60.0, connection_timeout=1.0)
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(anext(db.wait_for_tasks())) for _ in range(4)]

    async def all_listen() -> bool:
        # Each looks once at first, and again as soon as it listens.
        return bool(db._meter.snapshot().get("claim_tasks", {"count": 0})["count"] >= 8 and not db._executor.in_flight)

    await until(all_listen, "all listen")
    proxy.hold()
    tasks += [asyncio.create_task(db.get_memory_by_id(uuid4())), asyncio.create_task(db.index_memories())]
    await asyncio.sleep(0)
    began = running_time()
    await db.close(timeout=1.0)
    # What listens, the calls, and the connections of both lanes, one after the other.
    assert running_time() - began <= 1.0 + 1.0 + 2.0 + GRACE
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [elizasql.ClosedError] * 6
    await proxy.heal(cut=True)


async def test_closing_ends_calls_that_wait_for_a_connection(proxy: Proxy, make_db: MakeAdapter) -> None:
    """The attempt to connect is given up, and those behind it need not wait either; nobody has cancelled them."""
    db = await make_db(dsn=proxy.dsn, timeout=60.0, connection_timeout=60.0, pool_max_size=1)
    await db._connections.interactive.replace()
    await db._connections.interactive.let_go()
    proxy.accepting = "silent"
    before = proxy.accepted
    tasks = [asyncio.create_task(db.get_memory_by_id(uuid4())) for _ in range(3)]

    async def connecting() -> bool:
        return proxy.accepted > before and db._connections.interactive.waiting == 2

    await until(connecting, "one connects, two wait")
    await db.close(timeout=0.05)
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LONG)
    assert [type(result) for result in results] == [elizasql.ClosedError] * 3
    assert {result.statement for result in results if isinstance(result, ElizaSQLError)} == {"get_memory_by_id"}
    await proxy.heal()


@pytest.mark.parametrize("name", ["is_ready", "health"])
@pytest.mark.parametrize(("timeout", "connection_timeout"), [(SHORT, 60.0), (60.0, 1.0)])
async def test_sign_of_life_has_the_limit_of_its_call_and_that_of_a_connection(
    proxy: Proxy, make_db: MakeAdapter, name: str, timeout: float, connection_timeout: float
) -> None:
    db = await make_db(dsn=proxy.dsn, connection_timeout=connection_timeout, pool_max_size=1)
    proxy.hold()
    with within(min(timeout, connection_timeout), name):
        answer = await getattr(db, name)(timeout=timeout)
    assert answer is False or answer["error"].startswith("DeadlineError")
    await proxy.heal(cut=True)
    assert await db.is_ready(timeout=LONG)
    await pool_is_whole(db)


@pytest.mark.parametrize("name", ["accepted and never answered", "reset before the answer"])
async def test_causes_of_an_error_have_an_end(proxy: Proxy, make_db: MakeAdapter, name: str) -> None:
    """The last one is not of this library; whoever follows them must not go round in a circle."""
    db = await make_db(dsn=proxy.dsn, connection_timeout=SHORT, max_retries=1, pool_max_size=1)
    MODES[name].breaks(proxy)
    with pytest.raises(elizasql.UnavailableError) as caught:
        async with db.transaction() as tx:
            await tx.get_memory_by_id(uuid4())
    chain: list[BaseException] = [caught.value]
    while (cause := chain[-1].__cause__) is not None:
        assert cause not in chain
        chain.append(cause)
    assert not isinstance(chain[-1], ElizaSQLError), chain
    await proxy.heal()


async def test_opening_ends_in_time(proxy: Proxy, server: FaultServer) -> None:
    names = ("black hole", "black hole while the connection is prepared", "accepted and never answered")
    for name in (*names, "refused", "reset when accepted"):
        done = MODES[name].breaks(proxy)
        if inspect.isawaitable(done):
            await done
        began = running_time()
        with pytest.raises((elizasql.UnavailableError, elizasql.DeadlineError)):
            await elizasql.open(agent_id=uuid4(), dsn=proxy.dsn, connection_timeout=SHORT, timeout=SHORT)
        assert running_time() - began <= SHORT + GRACE, name
        await proxy.heal(cut=True)
        db = await elizasql.open(agent_id=uuid4(), dsn=proxy.dsn)
        await db.close()


@pytest.mark.parametrize(
    ("timeout", "connection_timeout"),
    [(0.5, 0.2), (0.2, 0.5)],
)
async def test_breaker_spares_a_server_that_is_silent(
    proxy: Proxy, make_db: MakeAdapter, timeout: float, connection_timeout: float
) -> None:
    """After five failures nobody asks any more; when it is well, a few find out, and all may call again.

    Also where the calls have less time than a connection may take to be made.
    """
    db = await make_db(
        dsn=proxy.dsn, failure_threshold=5, reset_timeout=0.3, timeout=timeout, connection_timeout=connection_timeout
    )
    breaker = db._connections.breaker
    proxy.hold()

    async def opened() -> bool:
        assert await broken_within(db, timeout) is not None
        return breaker.state == "open"

    try:
        await until(opened, "the breaker opens", 20)
        before = proxy.accepted
        with pytest.raises(elizasql.CircuitOpenError) as caught:
            await db.get_memory_by_id(uuid4())
        assert 0 < caught.value.retry_after <= 0.3
        assert proxy.accepted == before
        assert (await db.health())["breaker"]["state"] in ("open", "half_open")
    finally:
        await proxy.heal(cut=True)

    async def closed() -> bool:
        await broken_within(db, LONG)
        return breaker.state == "closed"

    await until(closed, "the breaker closes", 20)
    assert breaker.opened >= 1
    assert await db.get_memory_by_id(uuid4()) is None


@pytest.mark.parametrize("prepared", [True, False])
async def test_limit_that_passes_at_the_begin_of_a_transaction_is_no_silence(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, prepared: bool
) -> None:
    """The server answers the cancellation, and by that what has become of the BEGIN; the connection serves again."""
    db = await make_db(dsn=proxy.dsn, pool_max_size=1, batch_size=1, prepared_statements=prepared, failure_threshold=1)
    chance = random.Random(1)
    lane = db._connections.interactive
    connection, _ = await lane.acquire(5)
    pid = connection.get_server_pid()
    lane.keep(connection)
    held = proxy.when("server", b"C", "hold", holding=b"BEGIN")
    memories = [memory_of(new_id(chance), 1) for _ in range(2)]
    with pytest.raises(elizasql.DeadlineError):
        await db.create_memories(memories, TYPE, timeout=SHORT)
    assert held.count == 1
    await proxy.heal()
    await lane.let_go()
    assert db._connections.breaker.failures == 0
    assert db._connections.breaker.state == "closed"
    assert await db.count_memories() == 0
    assert await server.backends(db.config.application_name) == [pid]
    await server.no_idle_transactions(db.config.application_name)
    await pool_is_whole(db)


@pytest.mark.parametrize("why", ["the connections are to be replaced", "another adapter opened them with little time"])
async def test_limit_that_the_server_acted_on_is_no_silence(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, why: str
) -> None:
    first = await make_db(dsn=proxy.dsn, timeout=0.2 if "another" in why else LONG)
    db = await make_db(dsn=proxy.dsn, timeout=LONG)
    assert db._connections is first._connections
    id = await db.create_memory(memory_of(new_id(random.Random(1)), 1), TYPE)
    await db.update_memory({"id": id, "content": {"text": "x"}})
    lane = db._connections.interactive
    proxy.latency = 0.15
    async with server.admin() as admin, admin.transaction():
        await admin.execute("SELECT FROM elizasql.memories WHERE id = $1 FOR UPDATE", id)
        task = asyncio.create_task(db.update_memory({"id": id, "content": {"text": "y"}}, timeout=1.0))

        async def waits() -> bool:
            return bool(await admin.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

        await until(waits, "the update waits")
        if "replaced" in why:
            await lane.replace()
        with pytest.raises(elizasql.DeadlineError):
            await task
        await lane.let_go()
    assert db._connections.breaker.failures == 0
    proxy.latency = 0.0
    assert await db.update_memory({"id": id, "content": {"text": "z"}})


async def test_probe_on_a_connection_that_died_meanwhile(proxy: Proxy, make_db: MakeAdapter) -> None:
    """A router has forgotten it while nobody was let through: that is no sign that the server is still down."""
    db = await make_db(dsn=proxy.dsn, pool_min_size=1, failure_threshold=1, reset_timeout=0.0)
    breaker = db._connections.breaker
    await db.count_memories()
    await db._connections.interactive.let_go()
    breaker.fail(breaker.enter())
    assert breaker.opened == 1
    forgotten = proxy.when("client", b"B", "reset")
    assert await db.count_memories() == 0
    assert forgotten.count == 1
    assert breaker.opened == 1
    for _ in range(2):
        assert await db.count_memories() == 0
    assert (breaker.state, breaker.opened) == ("closed", 1)


async def test_one_dead_connection_speaks_for_the_others(proxy: Proxy, make_db: MakeAdapter) -> None:
    """Also where the call cannot be made again: it says so, and not one call for each connection."""
    db = await make_db(dsn=proxy.dsn, pool_max_size=3)
    lane = db._connections.interactive

    async def look_at_all() -> set[int]:
        connections = [(await lane.acquire(30))[0] for _ in range(3)]
        pids = {connection.get_server_pid() for connection in connections}
        for connection in connections:
            lane.keep(connection)
        return pids

    pids = await look_at_all()
    proxy.when("client", b"B", "reset")
    with pytest.raises(elizasql.UnknownOutcomeError):
        await db.delete_memories([uuid4()])
    assert not pids & await look_at_all()
    assert await db.delete_memories([uuid4()]) == 0


async def test_one_silent_connection_speaks_for_the_others(proxy: Proxy, make_db: MakeAdapter) -> None:
    """As after a failover of which nobody was told: one caller waits in vain, and not one for each connection."""
    db = await make_db(dsn=proxy.dsn, pool_max_size=4, connection_timeout=2.0)
    lane = db._connections.interactive
    connections: list[Any] = []
    while len(connections) < 4:
        with suppress(asyncio.TimeoutError):  # a machine that is busy may take longer than the short time for one
            connections.append((await lane.acquire(5))[0])
    for connection in connections:
        lane.keep(connection)
    silent = proxy.when("client", b"PB", "hold", times=None)
    with pytest.raises(elizasql.DeadlineError):
        await db.get_memory_by_id(uuid4(), timeout=SHORT)
    proxy.accepting = "reset"  # nor does anybody hear of the cancellation
    await lane.let_go()
    assert silent.count == 1
    proxy.accepting = "pass"
    proxy._rules.clear()
    for link in list(proxy._links):
        link.flow.clear()
    for _ in range(4):
        assert await db.get_memory_by_id(uuid4(), timeout=LONG) is None
    await proxy.heal(cut=True)
    await pool_is_whole(db)


async def broken_within(db: DatabaseAdapter, timeout: float) -> ElizaSQLError | None:
    """Make a call that must end in time; give its error."""
    began = running_time()
    try:
        await db.get_memory_by_id(uuid4(), timeout=timeout)
    except ElizaSQLError as error:
        return error
    finally:
        assert running_time() - began <= timeout + GRACE
    return None


@pytest.mark.parametrize(
    "how",
    ["refused", "reset when accepted", "accepted and never answered"],
)
async def test_next_host_is_taken_when_the_first_is_down(proxy: Proxy, server: FaultServer, how: str) -> None:
    async with Proxy(server.dsn) as other:
        done = MODES[how].breaks(proxy)
        if inspect.isawaitable(done):
            await done
        one, two = (each.dsn.partition("@")[2].partition("/")[0] for each in (proxy, other))
        both = proxy.dsn.replace(one, f"{one},{two}")
        async with elizasql.connect(
            agent_id=uuid4(), dsn=both, connection_timeout=5 * SHORT, indexing="manual", migrate=False, pool_min_size=0
        ) as db:
            assert await db.is_ready()
            assert other.open > 0


async def test_connection_that_is_silent_is_asked_for_a_sign_of_life(proxy: Proxy, make_db: MakeAdapter) -> None:
    """A network that has forgotten it swallows what comes later: the first call after a pause would run out of time."""
    db = await make_db(dsn=proxy.dsn)
    lane = db._executor.lane
    connection, _ = await lane.acquire(5)
    lane.keep(connection)
    made = connection._transport.get_extra_info("socket")
    assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    idle, interval, count = (
        made.getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    )
    assert (idle, idle + interval * count) == (10, 25)
    assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 25_000
