"""For tests of your own: one embedded server a run, and an empty database with an open adapter for each test.

Loaded by pytest wherever elizasql is installed; nothing is started until a test asks for a fixture::

    async def test_remembers(elizasql_db):
        await elizasql_db.create_memory({"content": {"text": "hello"}}, table_name="messages")
        assert await elizasql_db.count_memories(table_name="messages") == 1

`elizasql_server` (session) is the server: a folder of its own, removed at the end; with pytest-xdist one for each
worker. `elizasql_db` (function) is an adapter of a new agent, on a database in which there is nothing else. It is
asynchronous and needs pytest-asyncio or anyio's plugin; `elizasql_sync_db` is the same for blocking tests. What
`@pytest.mark.elizasql(dimension=384, ...)` or the fixture `elizasql_options` gives goes to the adapter; `dimension`
locks it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import pytest

import elizasql
from elizasql import DatabaseAdapter, _embedded, sync
from elizasql._statements import SQL

T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """The server of a test run.

    Attributes:
        dsn: Its address; give it to what you test.
        data_dir: Its folder.
    """

    dsn: str
    data_dir: Path


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "elizasql(**options): settings of the adapter that elizasql_db opens")


@pytest.fixture(scope="session")
def elizasql_server() -> Iterator[Server]:
    """Give the embedded server of this run, its schema up to date."""
    # Not in pytest's folder: the path of a socket may have about 100 bytes.
    folder = Path(tempfile.mkdtemp(prefix="esql-"))
    loop = asyncio.new_event_loop()
    try:
        server = _run(loop, _embedded.acquire(folder / "pg"))
        try:
            _run(loop, _migrate(server.dsn))
            yield Server(server.dsn, folder / "pg")
        finally:
            _run(loop, server.release())
    finally:
        loop.close()
        shutil.rmtree(folder, ignore_errors=True)


def _run(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also when Ctrl-C ends the loop: what it has begun is taken back."""
    task = loop.create_task(coroutine)
    try:
        return loop.run_until_complete(task)
    except BaseException:
        task.cancel()
        loop.run_until_complete(asyncio.wait({task}))
        raise


async def _migrate(dsn: str) -> None:
    # Whatever the project's own settings say of its own server.
    async with elizasql.connect(agent_id=uuid4(), dsn=dsn, migrate=True, indexing="manual", pool_min_size=0):
        pass


@pytest.fixture
def elizasql_options() -> dict[str, Any]:
    """Give the settings of the adapter of each test; override it in your conftest.py."""
    return {}


def _read_options(request: pytest.FixtureRequest) -> tuple[dict[str, Any], int | None]:
    options: dict[str, Any] = {"agent_id": uuid4(), "indexing": "manual", "pool_min_size": 0, "pool_max_size": 5}
    options |= request.getfixturevalue("elizasql_options")
    marker = request.node.get_closest_marker("elizasql")
    if marker is not None:
        if marker.args:
            raise pytest.UsageError(f"pytest.mark.elizasql takes settings by name, as dimension=384, not {marker.args}")
        options |= marker.kwargs
    return options, options.pop("dimension", None)


@pytest.fixture
def _elizasql_emptied() -> list[bool]:
    """Give what tells the second adapter of a test that the database was emptied for the first."""
    return []


@asynccontextmanager
async def _opened(server: Server, request: pytest.FixtureRequest) -> AsyncIterator[DatabaseAdapter]:
    options, dimension = _read_options(request)
    async with elizasql.connect(dsn=server.dsn, **options) as db:
        await _empty(db, request)
        await db.ensure_agent_exists({"name": "test"})
        if dimension is not None:
            await db.ensure_embedding_dimension(dimension)
        yield db


async def _empty(db: DatabaseAdapter, request: pytest.FixtureRequest) -> None:
    """Delete whatever the test before has left, also in other agents and in what all share; once for each test."""
    emptied: list[bool] = request.getfixturevalue("_elizasql_emptied")
    if not emptied:
        await db._executor.execute(SQL["delete_everything"])
        emptied.append(True)


if importlib.util.find_spec("pytest_asyncio") is not None:
    import pytest_asyncio

    _async_fixture: Any = pytest_asyncio.fixture
else:
    _async_fixture = pytest.fixture


@_async_fixture  # type: ignore[untyped-decorator, unused-ignore]
async def elizasql_db(elizasql_server: Server, request: pytest.FixtureRequest) -> AsyncIterator[DatabaseAdapter]:
    """Give an adapter of a new agent, on a database in which there is nothing else."""
    opened: AbstractAsyncContextManager[DatabaseAdapter] = _opened(elizasql_server, request)
    async with opened as db:
        yield db


@pytest.fixture
def elizasql_sync_db(elizasql_server: Server, request: pytest.FixtureRequest) -> Iterator[sync.DatabaseAdapter]:
    """Give the same for blocking tests."""
    options, dimension = _read_options(request)
    asyncio.run(_clear(elizasql_server.dsn, request))
    with sync.connect(dsn=elizasql_server.dsn, **options) as db:
        db.ensure_agent_exists({"name": "test"})
        if dimension is not None:
            db.ensure_embedding_dimension(dimension)
        yield db


async def _clear(dsn: str, request: pytest.FixtureRequest) -> None:
    async with elizasql.connect(agent_id=uuid4(), dsn=dsn, indexing="manual", pool_min_size=0) as db:
        await _empty(db, request)
