"""Every public method under every failure, without a network: a connection that plays back what the server said once,
and fails where a seed says so, with a clock that only the waits move.

And against the real server: what is run again when the reply was lost must change and say the same as one run.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import random
import re
import socket
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

import elizasql
from elizasql import (
    CircuitOpenError,
    DatabaseAdapter,
    DeadlineError,
    ElizaSQLError,
    UnknownOutcomeError,
    _codecs,
    _executor,
)
from elizasql._statements import SQL
from tests.conftest import MakeAdapter
from tests.shared import WITHOUT_A_LIMIT, share, shared_calls
from tests.test_isolation import METHODS, filled, snapshot

# What they tell is how the calls went; or they are many calls, each with tries of its own.
ABOUT_ITSELF = {"stats", "health", "index_memories", "reembed", "abandon_reembedding"}

# Their rows have two unique keys; where the one that no statement heeds was in the way, they are written anew.
TWO_KEYS = ("create_channel", "create_pairing", "upsert_component")


def lost() -> BaseException:
    error: BaseException = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
    return error


def server_error(kind: type[asyncpg.PostgresError]) -> Callable[[], BaseException]:
    return lambda: kind("it went wrong")


# What can happen, and whether the connection is gone afterwards.
FAULTS: list[tuple[Callable[[], BaseException], bool]] = [
    (lost, True),
    (lambda: asyncpg.InterfaceError("connection is closed"), True),
    (lambda: asyncpg.InternalClientError("unknown error in protocol implementation"), True),
    (ConnectionResetError, True),
    (BrokenPipeError, True),
    (server_error(asyncpg.AdminShutdownError), True),
    (server_error(asyncpg.CrashShutdownError), True),
    (server_error(asyncpg.CannotConnectNowError), True),
    (lambda: asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress"), True),
    (server_error(asyncpg.SerializationError), False),
    (server_error(asyncpg.DeadlockDetectedError), False),
    (server_error(asyncpg.LockNotAvailableError), False),
    (server_error(asyncpg.OutOfMemoryError), False),
    (server_error(asyncpg.DiskFullError), False),
    (server_error(asyncpg.UniqueViolationError), False),
    (server_error(asyncpg.ForeignKeyViolationError), False),
    (server_error(asyncpg.UndefinedTableError), False),
    (server_error(asyncpg.QueryCanceledError), False),
    (server_error(asyncpg.InvalidCachedStatementError), False),
    (server_error(asyncpg.ReadOnlySQLTransactionError), False),
    (asyncio.TimeoutError, False),
    (asyncio.CancelledError, False),
]
CONNECT_FAULTS: list[Callable[[], BaseException]] = [
    ConnectionRefusedError,
    FileNotFoundError,
    asyncio.TimeoutError,
    lambda: socket.gaierror("no such host"),
    server_error(asyncpg.CannotConnectNowError),
    server_error(asyncpg.TooManyConnectionsError),
    server_error(asyncpg.InvalidPasswordError),
    asyncio.CancelledError,
]


def same_new_ids(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Give what makes new ids begin anew: what was recorded speaks of the ids of then."""
    counter = itertools.count()

    def begin() -> None:
        nonlocal counter
        counter = itertools.count()

    monkeypatch.setattr(_codecs, "new_id", lambda: UUID(int=(0xFACE << 64) + next(counter)))
    return begin


@pytest.fixture
def same_ids(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return same_new_ids(monkeypatch)


class Clock:
    """Time as it is, and what was slept on top of it."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return time.monotonic() + sum(self.slept)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@dataclass
class Player:
    """Plays back what each operation gave, and fails the operations that it is told to."""

    recorded: list[Any]
    faults: dict[int, tuple[Callable[[], BaseException], bool]]
    connect_faults: dict[int, Callable[[], BaseException]]
    operations: int = 0
    connects: int = 0
    applied: int = 0
    open_connections: list[PlayedConnection] = field(default_factory=list)

    def play(self, connection: PlayedConnection, number_in_call: int) -> Any:
        number, self.operations = self.operations, self.operations + 1
        fault = self.faults.get(number)
        if fault is not None:
            make, breaks = fault
            connection.closed = connection.closed or breaks
            raise make()
        self.applied += 1
        return self.recorded[min(number_in_call, len(self.recorded) - 1)] if self.recorded else None


class PlayedConnection:
    """As far as the executor looks at one."""

    def __init__(self, player: Player) -> None:
        self.player = player
        self.closed = False
        self.in_transaction = False
        self.done = 0

    def is_closed(self) -> bool:
        return self.closed

    def is_in_transaction(self) -> bool:
        return self.in_transaction

    def terminate(self) -> None:
        self.closed = True
        self.in_transaction = False

    async def execute(self, sql: str, *args: Any, timeout: float) -> Any:
        assert timeout > 0
        word = sql.split()[0].rstrip(";")
        if word in ("BEGIN", "COMMIT", "ROLLBACK"):
            self.player.play(self, 0)
            self.in_transaction = word == "BEGIN"
            return word
        return await self.fetch(sql, *args, timeout=timeout)

    async def fetch(self, sql: str, *args: Any, timeout: float) -> Any:
        assert timeout > 0
        if sql == SQL["get_transaction_id"].sql:
            self.player.play(self, 0)
            return {"id": "7", "timeline": "00000001"}
        if sql == SQL["get_transaction_status"].sql:
            return "aborted"
        number, self.done = self.done, self.done + 1
        return self.player.play(self, number)

    fetchrow = fetchval = fetch


class PlayedLane:
    """A lane whose connections are played."""

    max_size = 5

    def __init__(self, player: Player) -> None:
        self.player = player
        self.kept: list[PlayedConnection] = [PlayedConnection(player)]
        self.out = 1  # made and not yet gone

    def take(self) -> Any:
        while self.kept:
            connection = self.kept.pop()
            connection.done = 0
            if not connection.closed:
                return connection
            self.out -= 1
        return None

    async def acquire(self, timeout: float, late: Any = None) -> tuple[Any, bool]:
        assert timeout > 0
        number, self.player.connects = self.player.connects, self.player.connects + 1
        if number in self.player.connect_faults:
            make = self.player.connect_faults[number]
            raise make()
        self.out += 1
        return PlayedConnection(self.player), False

    def keep(self, connection: PlayedConnection) -> None:
        assert not connection.closed
        assert not connection.in_transaction
        self.kept.append(connection)

    def drop(self, connection: PlayedConnection) -> None:
        connection.terminate()

    def give_back(self, connection: PlayedConnection, then: Callable[[bool], None] | None = None) -> None:
        self.out -= 1
        if then is not None:
            then(not connection.closed)

    async def replace(self) -> None:
        self.out -= len(self.kept)
        self.kept.clear()

    in_use = waiting = size = 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_executor, "time", types.SimpleNamespace(monotonic=clock.monotonic))
    shim = types.ModuleType("asyncio")
    vars(shim).update(vars(asyncio))
    shim.sleep = clock.sleep  # type: ignore[attr-defined]
    monkeypatch.setattr(_executor, "asyncio", shim)
    return clock


@dataclass(frozen=True)
class Recorded:
    """What an agent's methods did: the arguments of each, what each operation gave, and what it gave itself."""

    agent: UUID
    methods: dict[str, tuple[dict[str, Any], list[Any], Any]]


@pytest.fixture(scope="module")
def recorded(dsn: str) -> Recorded:
    """Run every method once for real."""

    async def run() -> Recorded:
        async with elizasql.connect(agent_id=uuid4(), dsn=dsn, indexing="manual", resident="off", batch_size=1) as db:
            await db.ensure_agent_exists({"name": "recorded"})
            await db.ensure_embedding_dimension(384)
            own = await filled(db)
            calls = {name: own.arguments(name) for name in METHODS} | shared_calls(await share(db))
            public = (name for name, _ in inspect.getmembers(DatabaseAdapter, inspect.isfunction) if name[0] != "_")
            assert set(public) == {*calls, "is_ready"} | WITHOUT_A_LIMIT
            methods = {name: await record(db, name, calls[name]) for name in calls if name not in ABOUT_ITSELF}
            return Recorded(db.agent_id, methods)

    return asyncio.run(run())


async def record(db: DatabaseAdapter, name: str, arguments_of: dict[str, Any]) -> tuple[dict[str, Any], list[Any], Any]:
    said: list[Any] = []

    def recorder(method: str) -> Any:
        original = getattr(asyncpg.Connection, method)

        async def recorded(self: Any, *args: Any, **options: Any) -> Any:
            result = await original(self, *args, **options)
            if args[1:] and args[0] != SQL["get_transaction_id"].sql:
                said.append(result)
            return result

        return recorded

    with pytest.MonkeyPatch.context() as patch:
        same_new_ids(patch)()
        for method in ("fetch", "fetchrow", "fetchval", "execute"):
            patch.setattr(asyncpg.Connection, method, recorder(method))
        try:
            result = await getattr(db, name)(**arguments_of)
        except ElizaSQLError as error:
            result = error
    return arguments_of, said, result


@pytest.fixture
async def recordings(
    make_db: MakeAdapter, recorded: Recorded
) -> tuple[DatabaseAdapter, dict[str, tuple[dict[str, Any], list[Any], Any]]]:
    """Give an adapter of the agent of which there are recordings, and these."""
    return await make_db(recorded.agent, batch_size=1), recorded.methods


def faulted(seed: int) -> tuple[dict[int, Any], dict[int, Any], float]:
    """Give the faults of a seed: of which operations, of which new connections, and the time limit of the call."""
    chance = random.Random(seed)
    share = chance.choice([0.1, 0.3, 0.6, 1.0])
    faults = {number: chance.choice(FAULTS) for number in range(30) if chance.random() < share}
    connects = {number: chance.choice(CONNECT_FAULTS) for number in range(30) if chance.random() < share / 2}
    return faults, connects, chance.choice([0.5, 3.0, 60.0])


async def test_every_method_under_every_failure(
    recordings: tuple[DatabaseAdapter, dict[str, tuple[dict[str, Any], list[Any], Any]]],
    clock: Clock,
    same_ids: Callable[[], None],
) -> None:
    """It gives what it gives without failures, or raises an error of this library, within its time and its tries."""
    db, methods = recordings
    names = [name for name, (_, said, _) in methods.items() if said]
    assert len(names) > 150
    real = db._executor.lane, db._background.lane
    plain = sum(not isinstance(result, Exception) for _, _, result in methods.values())
    assert plain > 150
    ended: dict[str, int] = {}
    breaker = db._connections.breaker
    try:
        for seed in range(6000):
            name = names[seed % len(names)]
            arguments_of, said, wanted = methods[name]
            faults, connects, limit = faulted(seed)
            player = Player(said, faults, connects)
            lane = PlayedLane(player)
            db._executor.lane = db._background.lane = lane  # type: ignore[assignment]
            clock.slept.clear()
            breaker._move("closed")
            context = f"seed {seed}: {name}"
            same_ids()
            try:
                result = await getattr(db, name)(**arguments_of, timeout=limit)
            except (ElizaSQLError, asyncio.CancelledError) as error:
                result = error
            assert db._executor.in_flight == 0, context
            assert sum(clock.slept) <= limit, context
            assert len(clock.slept) <= (6 if name.startswith(TWO_KEYS) else 3), context
            assert lane.out == len(lane.kept), f"{context}: a connection is missing or too many"
            assert breaker.state in ("closed", "open"), context
            kind = type(result).__name__ if isinstance(result, BaseException) else "result"
            ended[kind] = ended.get(kind, 0) + 1
            if not isinstance(result, BaseException) and not isinstance(wanted, BaseException):
                assert type(result) is type(wanted), context
    finally:
        db._executor.lane, db._background.lane = real
        breaker._move("closed")
    # All of the ways are there: else the seeds would not say much.
    assert {"result", "CancelledError", "ConnectionLostError", "DeadlineError", "UnknownOutcomeError"} <= set(ended)
    assert {"UniqueViolationError", "ServerBusyError", "DeadlockError", "PermissionDeniedError"} <= set(ended)
    assert ended["result"] > 1000, ended


# A concurrent call may hold the key that ON CONFLICT does not look at: these run once more, and find its row.
UNDER_TWO_KEYS = {
    "create_channel",
    "create_pairing_allowlist_entries",
    "create_pairing_allowlist_entry",
    "create_pairing_request",
    "create_pairing_requests",
    "upsert_components",
}


@pytest.mark.parametrize(
    ("number", "fault"), list(enumerate(FAULTS)), ids=[str(number) for number in range(len(FAULTS))]
)
async def test_one_failure_and_then_all_is_well(
    recordings: tuple[DatabaseAdapter, dict[str, tuple[dict[str, Any], list[Any], Any]]],
    clock: Clock,
    same_ids: Callable[[], None],
    number: int,
    fault: tuple[Callable[[], BaseException], bool],
) -> None:
    """The k-th operation of each method fails, for each k: what is transient is not seen, what is not comes at once."""
    db, methods = recordings
    real = db._executor.lane, db._background.lane
    example = fault[0]()
    transient = isinstance(
        example,
        (
            OSError,
            asyncpg.PostgresConnectionError,
            asyncpg.InterfaceError,
            asyncpg.InternalClientError,
            asyncpg.AdminShutdownError,
            asyncpg.CrashShutdownError,
            asyncpg.CannotConnectNowError,
            asyncpg.SerializationError,
            asyncpg.DeadlockDetectedError,
            asyncpg.LockNotAvailableError,
            asyncpg.OutOfMemoryError,
            asyncpg.InvalidCachedStatementError,
            asyncpg.ReadOnlySQLTransactionError,
        ),
    ) and not isinstance(example, asyncio.TimeoutError)
    breaker = db._connections.breaker
    seen: set[str] = set()
    try:
        for name, (arguments_of, said, wanted) in methods.items():
            for position in range(len(said)):
                player = Player(said, {position: fault}, {})
                db._executor.lane = db._background.lane = PlayedLane(player)  # type: ignore[assignment]
                clock.slept.clear()
                breaker._move("closed")
                same_ids()
                try:
                    result: Any = await getattr(db, name)(**arguments_of)
                except (ElizaSQLError, asyncio.CancelledError) as error:
                    result = error
                context = f"{name}: operation {position} of {len(said)}: {result!r}"
                seen.add(type(result).__name__)
                if isinstance(wanted, Exception):
                    continue
                if name in UNDER_TWO_KEYS and isinstance(example, asyncpg.UniqueViolationError):
                    assert result == wanted and not clock.slept, context
                elif not transient:
                    assert isinstance(result, BaseException), context
                    assert player.operations <= position + 2, context  # it, and a rollback
                    assert not clock.slept, context
                elif not isinstance(result, UnknownOutcomeError):
                    assert type(result) is type(wanted), context
    finally:
        db._executor.lane, db._background.lane = real
        breaker._move("closed")
    assert not transient or "UnknownOutcomeError" in seen or not fault[1] or number in (7, 8)


# --- run again -------------------------------------------------------------------------------------------------------


def rows(found: dict[str, list[str]]) -> Counter[str]:
    """Count rows by table; two agents' partitions differ."""
    counts: Counter[str] = Counter()
    for table, lines in found.items():
        counts[re.sub(r"_p\d\d$", "", table)] += len(lines)
    del counts["memory_rewrites"]  # a second upsert updates what the first has inserted
    return counts


def shape(result: Any) -> Any:
    """Give a result without what differs by nature: times and new ids."""
    if isinstance(result, dict):
        return {key: shape(value) for key, value in result.items()}
    if isinstance(result, (list, tuple)):
        return [shape(item) for item in result]
    return result if isinstance(result, (bool, int, str, type(None))) else type(result).__name__


@contextmanager
def first_reply_lost() -> Iterator[None]:
    """Let the server do the first operation, and its connection break before anybody hears of it."""
    operation = itertools.count()

    def cut(method: str) -> Any:
        original = getattr(asyncpg.Connection, method)

        async def reply_lost(self: Any, *args: Any, **options: Any) -> Any:
            result = await original(self, *args, **options)
            if next(operation) == 0:
                self.terminate()
                raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
            return result

        return reply_lost

    with pytest.MonkeyPatch.context() as patch:
        for method in ("fetch", "fetchrow", "fetchval", "execute"):
            patch.setattr(asyncpg.Connection, method, cut(method))
        yield


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ABOUT_ITSELF])
async def test_reply_that_is_lost(make_db: MakeAdapter, raw: asyncpg.Connection[Any], name: str) -> None:
    """The server did it, and nobody heard: run again, it leaves the same rows and gives the same result, or says so."""
    once, again = [await make_db(base_delay=0.0, jitter_max=0.0) for _ in range(2)]
    results: list[Any] = []
    for db in (once, again):
        arguments_of = (await filled(db)).arguments(name)
        with first_reply_lost() if db is again else nullcontext():
            try:
                results.append(await getattr(db, name)(**arguments_of))
            except ElizaSQLError as error:
                results.append(error)
    assert rows(await snapshot(raw, again.agent_id)) == rows(await snapshot(raw, once.agent_id))
    agree(*results)


async def test_reply_about_what_is_shared_that_is_lost(make_db: MakeAdapter) -> None:
    once, again = await make_db(), await make_db(base_delay=0.0, jitter_max=0.0)
    theirs, ours = await share(once), await share(again)
    first, second = shared_calls(theirs), shared_calls(ours)
    for name in first:
        results: list[Any] = []
        for db, calls in ((once, first), (again, second)):
            with first_reply_lost() if db is again else nullcontext():
                try:
                    results.append(await getattr(db, name)(**calls[name]))
                except ElizaSQLError as error:
                    results.append(error)
        agree(*results)
        assert await sizes(once, theirs) == await sizes(again, ours), name


async def sizes(db: DatabaseAdapter, ids: dict[str, Any]) -> list[int]:
    """Count what a message server and its channel have."""
    found = (
        await db.get_agents_for_message_server(ids["server"]),
        await db.get_channels_for_message_server(ids["server"]),
        await db.get_channel_participants(ids["channel"]),
        await db.get_messages_for_channel(ids["channel"], None),
    )
    return [len(each) for each in found]


def agree(first: Any, second: Any) -> None:
    """Compare what a call gave, and what it gave where its first reply was lost."""
    if isinstance(second, UnknownOutcomeError):
        assert not isinstance(first, ElizaSQLError)
        assert second.statement is not None and not SQL[second.statement].repeatable
    elif isinstance(first, ElizaSQLError):
        assert type(second) is type(first)
    else:
        assert not isinstance(second, (ElizaSQLError, CircuitOpenError, DeadlineError)), repr(second)
        assert shape(second) == shape(first)
