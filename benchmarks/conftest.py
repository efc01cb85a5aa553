"""The databases that the benchmarks work on: ten agents, or one, with 100,000 memories together.

ELIZASQL_BENCH=quick runs everything once on tiny sizes, ELIZASQL_BENCH_ROWS sets another number of memories.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import NAMESPACE_OID, UUID, uuid5

import asyncpg
import numpy as np
import pytest

import elizasql
from benchmarks import data
from benchmarks.report import Report, machine, measured_before
from elizasql import Config, DatabaseAdapter, Entity, Memory, Room, World, _codecs, _embedded, _pool
from elizasql._executor import Executor
from elizasql._statements import Statement

T = TypeVar("T")

QUICK = os.environ.get("ELIZASQL_BENCH") == "quick"
ROWS = int(os.environ.get("ELIZASQL_BENCH_ROWS") or (2_000 if QUICK else 100_000))
TABLE = "messages"

# Shares of an agent's memories that are in each world; there is one more, of ten memories.
WORLDS = (0.001, 0.01, 0.05, 0.2, 0.739)
TINY = 10

# When an agent remembered the first thing; it went on at one a second.
BEGUN = datetime(2025, 1, 1, tzinfo=timezone.utc)

_FILLER = "what was said here is of no account, only that it is about as long as what people say to each other. " * 2
_REPORT = pytest.StashKey[Report]()
# The line of the report that names the file of the peers' results.
PEERS_KEPT = "results of the peers"


class Run(Protocol):
    """Runs a coroutine on the event loop of all benchmarks."""

    def __call__(self, work: Awaitable[T], /) -> T: ...


def sized(full: int, quick: int) -> int:
    """Choose a number by the size of the run."""
    return quick if QUICK else full


# --- the run ---------------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_REPORT] = Report(size=ROWS, judged=not QUICK)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the order of the files, whatever shuffles, since the writes must come last; and take the time limit off."""
    ours = [item for item in items if item.path.parent == Path(__file__).parent]
    others = [item for item in items if item.path.parent != Path(__file__).parent]
    ours.sort(key=lambda item: (item.path.name, item.reportinfo()[1] or 0, item.name))
    items[:] = others + ours
    if not QUICK:
        for item in ours:
            item.add_marker(pytest.mark.timeout(0))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    report = config.stash[_REPORT]
    # Nobody reads the figures of a quick run.
    if report.tables and (config.getoption("benchmark_enable") or not QUICK):
        report.setup["load at the end"] = " ".join(f"{load:.2f}" for load in os.getloadavg())
        terminalreporter.section("elizasql benchmarks")
        terminalreporter.write_line(report.text())
        kept = f"kept in {report.save()}"
        if PEERS_KEPT in report.setup:
            from benchmarks import charts

            kept += f"; the page: {charts.write(Path(report.setup[PEERS_KEPT]), report)}"
        terminalreporter.write_line(f"\n{kept}")


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    """Give the place for what a benchmark has found."""
    report = pytestconfig.stash[_REPORT]
    report.setup |= machine() | {"memories": f"{ROWS:,}"}
    return report


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """Give the one event loop of the run, asyncio's own: connections cannot change theirs."""
    loop = asyncio.SelectorEventLoop()
    yield loop.run_until_complete
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


# --- the databases ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """An agent, its adapter, and what it was given to remember.

    Attributes:
        db: Its adapter; indexing is by hand.
        ids: The memory of each vector.
        positions: The vector of each memory.
        vectors: float32[n, 384].
        topics: int[n].
        rooms: The room of each topic.
        entities: Who said it.
        worlds: Of sizes that WORLDS tells, without regard to the topic; the last one has TINY memories.
        world_of: int[n], the world of each vector, as its place in `worlds`.
    """

    db: DatabaseAdapter
    ids: list[UUID]
    positions: dict[UUID, int]
    vectors: data.Floats
    topics: data.Ints
    rooms: dict[int, UUID]
    entities: list[UUID]
    worlds: list[UUID]
    world_of: data.Ints

    def memory(self, vector: data.Floats, topic: int, number: int, *, unique: bool | None = True) -> Memory:
        """Make another memory like those that are stored."""
        return _memory(self.rooms[topic], self.entities, vector, number, unique)


@dataclass(frozen=True)
class Database:
    """A server with agents in it."""

    dsn: str
    agents: list[Stored]


@pytest.fixture(scope="session")
def vectors(report: Report) -> data.Data:
    """Give what is stored and what is asked."""
    vectors = data.load(ROWS, 100 if QUICK else data.QUERIES)
    report.setup["vectors"] = vectors.source
    report.before |= measured_before(report.setup)
    return vectors


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Give the folder of the embedded servers."""
    folder = Path(tempfile.mkdtemp(prefix="esql-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ten(run: Run, folder: Path, vectors: data.Data, report: Report) -> Iterator[Database]:
    """Give ten agents, the vectors dealt to them in turn; each topic is a room of each agent."""
    yield from _database(run, folder, vectors, report, 10)


@pytest.fixture(scope="session")
def one(run: Run, folder: Path, vectors: data.Data, report: Report) -> Iterator[Database]:
    """Give one agent that owns all vectors."""
    yield from _database(run, folder, vectors, report, 1)


def _database(run: Run, folder: Path, vectors: data.Data, report: Report, agents: int) -> Iterator[Database]:
    """Load a server."""
    stack = AsyncExitStack()
    with served(run, folder / ("pg" if QUICK else f"pg{agents}")) as dsn:
        try:
            yield run(_load(dsn, vectors, agents, stack, report))
        finally:
            run(stack.aclose())


@contextmanager
def served(run: Run, folder: Path) -> Iterator[str]:
    """Give the address of an embedded server in a folder of its own, or of the database of ELIZASQL_TEST_URL."""
    given = os.environ.get("ELIZASQL_TEST_URL")
    server = None if given else run(_embedded.acquire(folder))
    try:
        yield given or (server.dsn if server else "")
    finally:
        if server is not None:
            run(server.release())


async def _load(dsn: str, vectors: data.Data, agents: int, stack: AsyncExitStack, report: Report) -> Database:
    begun = time.perf_counter()
    stored = [await load_agent(dsn, vectors, stack, number, agents) for number in range(agents)]
    loaded = time.perf_counter()
    async with bare(dsn) as raw:
        tail = "SELECT count(*) FROM elizasql.embeddings WHERE agent_id = $1 AND NOT indexed"
        for agent in stored:
            # An agent of the same partition may have brought this one's tail into the index already.
            if await raw.fetchval(tail, agent.db.agent_id):
                await agent.db.index_memories(rebuild=True)
        indexed = time.perf_counter()
        await raw.execute("VACUUM (ANALYZE) elizasql.memories, elizasql.embeddings")
        parts = "SELECT tableoid::regclass::text FROM elizasql.embeddings WHERE agent_id = ANY($1) GROUP BY agent_id, 1"
        partitions = Counter(row[0] for row in await raw.fetch(parts, [agent.db.agent_id for agent in stored]))
        report.setup["server"] = await raw.fetchval("SELECT version()")
        vector = await raw.fetchval("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
        report.setup["pgvector"] = vector
    shared = ", ".join(map(str, sorted(partitions.values())))
    report.setup[f"database of {agents} agents"] = (
        f"{ROWS:,} memories, {vectors.source}; agents in each used partition: {shared}; "
        f"created at {ROWS / (loaded - begun):,.0f} rows/s, index built at {ROWS / (indexed - loaded):,.0f} rows/s"
    )
    return Database(dsn, stored)


def agent_named(name: str, number: int = 0, agents: int = 1) -> UUID:
    """Give the id of the agent that `load_agent` makes."""
    return uuid5(NAMESPACE_OID, f"benchmark {name} {number} of {agents}")


async def load_agent(
    dsn: str, vectors: data.Data, stack: AsyncExitStack, number: int = 0, agents: int = 1, *, name: str = "agent"
) -> Stored:
    """Open an agent's adapter and let it remember its share, rooms mixed as in life."""
    agent_id = agent_named(name, number, agents)
    db = await open_adapter(dsn, agent_id)
    stack.push_async_callback(db.close)
    await db.delete_agent(agent_id)  # left behind by a run that was broken off
    if os.environ.get("ELIZASQL_TEST_URL"):
        stack.push_async_callback(db.delete_agent, agent_id)
    await db.ensure_agent_exists({"name": f"Agent {number}"})
    await db.ensure_embedding_dimension(vectors.vectors.shape[1])
    rooms = {topic: uuid5(agent_id, f"room {topic}") for topic in range(45)}
    await db.create_rooms([Room(id=id, source="benchmark", type="GROUP") for id in rooms.values()])
    entities = [uuid5(agent_id, f"entity {each}") for each in range(20)]
    await db.create_entities([Entity(id=id, names=[f"Entity {each}"]) for each, id in enumerate(entities)])
    worlds = [uuid5(agent_id, f"world {each}") for each in range(len(WORLDS) + 1)]
    await db.create_worlds([World(id=id, name=f"World {each}") for each, id in enumerate(worlds)])
    # Dealt topic by topic, so that every agent has its share of the smallest.
    random = np.random.default_rng(number)
    share = random.permutation(np.argsort(vectors.topics, kind="stable")[number::agents])
    mine, topics = np.ascontiguousarray(vectors.vectors[share]), vectors.topics[share]
    world_of = random.choice(len(WORLDS), len(mine), p=WORLDS)
    world_of[random.choice(len(mine), min(TINY, len(mine)), replace=False)] = len(WORLDS)
    ids: list[UUID] = []
    for start in range(0, len(mine), 5000):
        batch = [
            _memory(rooms[int(topics[row])], entities, mine[row], row, True, worlds[int(world_of[row])])
            for row in range(start, min(start + 5000, len(mine)))
        ]
        for row, memory in enumerate(batch, start):
            memory.created_at = BEGUN + timedelta(seconds=row)
        ids += await db.create_memories(batch, TABLE)
    positions = {id: position for position, id in enumerate(ids)}
    return Stored(db, ids, positions, mine, topics, rooms, entities, worlds, world_of)


def _memory(
    room: UUID, entities: list[UUID], vector: data.Floats, number: int, unique: bool | None, world: UUID | None = None
) -> Memory:
    return Memory(
        entity_id=entities[number % len(entities)],
        room_id=room,
        world_id=world,
        content={"text": f"Memory {number}: {_FILLER[number % 50 : 90 + number % 70]}", "source": "benchmark"},
        # So that a filter can keep one of two, of ten, or of a hundred.
        metadata={f"of_{parts}": number % parts for parts in (2, 10, 100)},
        unique=unique,
        embedding=vector,
    )


async def partition_of(connection: asyncpg.Connection[Any], agent: UUID) -> int:
    """Give the number of the partition in which an agent's rows lie."""
    place = """
        SELECT r FROM generate_series(0, 15) AS r
        WHERE satisfies_hash_partition('elizasql.embeddings'::regclass, 16, r, $1::uuid)
    """
    number: int = await connection.fetchval(place, agent)
    return number


@dataclass(frozen=True)
class Sent:
    """What a method gives to the executor: one statement with its parameters."""

    statement: Statement
    params: dict[str, Any]
    sql: str

    @property
    def arguments(self) -> list[Any]:
        """The parameters in the order of the text, as asyncpg takes them."""
        return self.statement.order(self.params)


class _Recorder:
    """Stands in for the executor: keeps what it is given and sends nothing."""

    def __init__(self, real: Executor) -> None:
        self._real = real
        self.sent: list[Sent] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def fetch(self, statement: Statement, **params: Any) -> list[Any]:
        self._keep(statement, params)
        return []

    async def fetch_row(self, statement: Statement, **params: Any) -> None:
        self._keep(statement, params)

    fetch_value = fetch_row
    execute = fetch_row

    async def fetch_chunks(
        self, statement: Statement, chunks: Iterable[dict[str, Any]], *, settle: bool = False
    ) -> list[Any]:
        for params in chunks:
            self._keep(statement, params)
        return []

    def _keep(self, statement: Statement, params: dict[str, Any]) -> None:
        self.sent.append(Sent(statement, params, self._real.text(statement, params)))


async def sent_by(db: DatabaseAdapter, call: Callable[[], Awaitable[Any]]) -> list[Sent]:
    """Find out what a call of a method would send to the server, without sending it."""
    real = db._executor
    recorder = _Recorder(real)
    db._executor = recorder  # type: ignore[assignment]
    try:
        await call()
    finally:
        db._executor = real
    return recorder.sent


async def open_adapter(dsn: str, agent_id: UUID, *, resident: str = "off", **options: Any) -> DatabaseAdapter:
    """Open an adapter that indexes by hand, if not told otherwise; to build an index takes longer than a call may."""
    return await elizasql.open(
        agent_id=agent_id,
        dsn=dsn,
        resident=resident,
        **{"indexing": "manual", "pool_min_size": 1, "pool_max_size": 4, "timeout": 3600.0} | options,
    )


@asynccontextmanager
async def bare(dsn: str, *, tuned: bool = False) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Open a connection past the library.

    Args:
        dsn: Where.
        tuned: With the session settings and codecs of the library's own connections, so that what is compared is the
            way to the server and nothing that the server does.
    """
    settings = _pool.session_settings(Config()) if tuned else {}
    connection = await asyncpg.connect(dsn, server_settings=settings)
    try:
        if tuned:
            await _codecs.register(connection, (await _pool.look_at(connection)).vector_schema or "public")
        yield connection
    finally:
        await connection.close()
