"""One embedded server and one migrated database for the whole run; every test has agents of its own in it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, settings

import elizasql
from elizasql import Config, DatabaseAdapter, Entity, Room, World, _codecs, _embedded, _pool

from .skew import Skew, load

settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
settings.load_profile("default")

# A shell gives what it starts in the background a SIGINT that is ignored, and so would every process of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MakeAdapter = Callable[..., Awaitable[DatabaseAdapter]]

# How CREATE DATABASE copies its template: as files half the work of through the WAL, 0.25 s in place of 0.56.
COPIED = "STRATEGY file_copy"


@pytest.fixture(scope="session")
def server_dir() -> Iterator[Path]:
    """Give the folder of the embedded server of this run; short, for the socket's path."""
    folder = Path(tempfile.mkdtemp(prefix="esql-"))
    yield folder / "pg"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def dsn(server_dir: Path) -> Iterator[str]:
    """Give the address of a migrated database; ELIZASQL_TEST_URL names another server's."""
    given = os.environ.get("ELIZASQL_TEST_URL")
    loop = asyncio.new_event_loop()
    server = None if given else loop.run_until_complete(_embedded.acquire(server_dir))
    address = given or server.dsn  # type: ignore[union-attr]
    loop.run_until_complete(_migrated(address))
    yield address
    if server is not None:
        loop.run_until_complete(server.release())
    loop.close()


@contextmanager
def database(dsn: str, template: str | None = None) -> Iterator[str]:
    """Give the address of a new database on the server of another: with nothing but the extension, or as a template."""
    if "ELIZASQL_TEST_URL" in os.environ:
        pytest.skip("needs a server to make databases on")
    name = f"test_{uuid4().hex}"
    made = urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))

    async def execute(address: str, statement: str) -> None:
        connection = await asyncpg.connect(address.replace("//elizasql@", "//postgres@"))
        await connection.execute(statement)
        await connection.close()

    like = "" if template is None else f" TEMPLATE {urlsplit(template).path[1:]}"
    asyncio.run(execute(dsn, f"CREATE DATABASE {name} OWNER elizasql{like} {COPIED}"))
    if template is None:
        asyncio.run(execute(made, "CREATE EXTENSION vector"))
    yield made
    asyncio.run(execute(dsn, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def empty_database(dsn: str) -> Iterator[str]:
    """Give the address of a database without anything but the extension, of the test's own."""
    with database(dsn) as made:
        yield made


@pytest.fixture(scope="session")
def migrated_template(dsn: str) -> Iterator[str]:
    """Give the address of a migrated database to make others of; nobody may stay connected to it."""
    with database(dsn) as made:
        asyncio.run(_migrated(made))
        yield made


@pytest.fixture
def own_database(dsn: str, migrated_template: str) -> Iterator[str]:
    """Give the address of a migrated database of the test's own."""
    with database(dsn, migrated_template) as made:
        yield made


async def _migrated(address: str) -> None:
    async with elizasql.connect(agent_id=uuid4(), dsn=address, indexing="manual", pool_min_size=0):
        pass


@pytest.fixture
async def make_db(dsn: str) -> AsyncIterator[MakeAdapter]:
    """Open adapters that are closed at the end: a new agent unless `agent_id` is given, indexing by hand."""
    async with AsyncExitStack() as stack:

        async def make(agent_id: UUID | None = None, *, dimension: int | None = 384, **options: Any) -> DatabaseAdapter:
            options = {
                "dsn": dsn,
                "indexing": "manual",
                "resident": "off",
                "pool_max_size": 5,
                "pool_min_size": 0,
                **options,
            }
            db = await elizasql.open(agent_id=agent_id or uuid4(), **options)
            stack.push_async_callback(db.close)
            await db.ensure_agent_exists({"name": "test"})
            if dimension is not None:
                await db.ensure_embedding_dimension(dimension)
            return db

        yield make


@pytest.fixture
async def db(make_db: MakeAdapter) -> DatabaseAdapter:
    """Give an adapter of a new agent, locked to 384 dimensions."""
    return await make_db()


async def neighbour_of(agent: UUID, raw: asyncpg.Connection[Any]) -> UUID:
    """Give the id of a new agent in the same partitions: what reads an agent's rows looks into no others."""
    found: UUID = await raw.fetchval(
        """SELECT id FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, 1000)) AS new
        WHERE elizasql.partition_of(id) = elizasql.partition_of($1) LIMIT 1""",
        agent,
    )
    return found


@dataclass(frozen=True)
class Scene:
    """A world with a room in it and two entities that take part."""

    world: UUID
    room: UUID
    entity: UUID
    other: UUID


async def make_scene(db: DatabaseAdapter, ids: Scene | None = None) -> Scene:
    """Create a world, a room and two entities for an adapter's agent; with the ids of another's scene, where given."""
    scene = ids or Scene(uuid4(), uuid4(), uuid4(), uuid4())
    await db.create_world(World(id=scene.world, name="world"))
    await db.create_room(Room(id=scene.room, source="test", type="GROUP", world_id=scene.world))
    await db.create_entities([Entity(id=scene.entity, names=["Ann"]), Entity(id=scene.other, names=["Bob"])])
    await db.add_participants_room([scene.entity, scene.other], scene.room)
    return scene


@pytest.fixture
async def agent_world(db: DatabaseAdapter) -> Scene:
    """Give `db`'s agent a world, a room and two entities."""
    return await make_scene(db)


@pytest.fixture
async def raw(dsn: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Give a bare connection with plain settings, to look at the tables and to attack them."""
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


@pytest.fixture
async def indexed(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    """Let the partition of `db`'s agent have its index: another test may have left it out."""
    await raw.execute("SELECT elizasql.build_index($1)", db.agent_id)


@pytest.fixture
async def session(dsn: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Give a connection that is set as the pooled ones are."""
    connection = await asyncpg.connect(dsn, server_settings=_pool.session_settings(Config.load(environ={})))
    await _codecs.register(connection, "public")
    yield connection
    await connection.close()


@pytest.fixture
async def skew(dsn: str) -> AsyncIterator[Skew]:
    """Give one large agent among many small ones, gone at the end."""
    async with load(dsn) as skewed:
        yield skewed


@pytest.fixture
def round_trips(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give the list of statements that went to the server, one entry a round trip, from here on."""
    sent: list[str] = []
    real = asyncpg.Connection._do_execute

    async def counted(self: Any, query: Any, executor: Any, timeout: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(str(query))
        return await real(self, query, executor, timeout, *args, **kwargs)

    monkeypatch.setattr(asyncpg.Connection, "_do_execute", counted)
    real_query = asyncpg.Connection.execute

    async def counted_query(self: Any, query: str, *args: Any, timeout: float | None = None) -> Any:
        if not args:
            # BEGIN, COMMIT and the like go as simple queries, past _do_execute.
            sent.append(query)
        return await real_query(self, query, *args, timeout=timeout)

    monkeypatch.setattr(asyncpg.Connection, "execute", counted_query)
    return sent
