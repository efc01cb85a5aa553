"""A server that may be broken, a proxy in front of it, and adapters that are held to leaving nothing behind."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

import elizasql
from elizasql import DatabaseAdapter, DeadlineError, Room, UnavailableError
from tests.faults.harness import WIDTH, no_leaks
from tests.faults.proxy import Proxy
from tests.faults.server import KILLS, OTHER_KILLS, WRITES, FaultServer, until

HERE = Path(__file__).parent
SEED = int(os.environ.get("ELIZASQL_FAULT_SEED", "20261101"))

# Waits of a test's length: the defaults are made for a server that is away for seconds.
QUICK = {"base_delay": 0.05, "max_delay": 0.4, "jitter_max": 0.05, "reset_timeout": 0.3, "connection_timeout": 15.0}

MakeAdapter = Callable[..., Awaitable[DatabaseAdapter]]

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)
            if "ELIZASQL_TEST_URL" in os.environ or not Path("/proc/self").is_dir():
                item.add_marker(
                    pytest.mark.skip(reason="needs an embedded server that it may break, and Linux's /proc")
                )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not KILLS and not OTHER_KILLS:
        return
    terminalreporter.write_line(
        f"faults, seed {SEED}: {WRITES['acknowledged']} writes acknowledged, {WRITES['lost']} of them lost,"
        f" in {sum(KILLS.values())} kills ({_listed(KILLS)}); other kills: {_listed(OTHER_KILLS)}"
    )


def _listed(kills: dict[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in sorted(kills.items())) or "none"


@pytest.fixture(scope="session")
def fault_server() -> Iterator[FaultServer]:
    """Give the server of all fault tests; its own, so that nobody else is hurt."""
    loop = asyncio.new_event_loop()
    server = FaultServer()
    loop.run_until_complete(server.start())
    yield server
    loop.run_until_complete(server.stop())
    loop.close()


@pytest.fixture
async def server(fault_server: FaultServer) -> FaultServer:
    """Give the server, well, whatever the test before has done to it."""
    if not await fault_server.answers():
        await fault_server.start(migrate=False)
    return fault_server


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Give the seed of a test; what it prints is shown when the test fails."""
    print(f"ELIZASQL_FAULT_SEED={SEED}")
    return SEED


@pytest.fixture
async def make_db(server: FaultServer) -> AsyncIterator[MakeAdapter]:
    """Open adapters with short waits; at the end each is closed, and nothing of it may be left.

    Each has an application name and so connections and a breaker of its own, unless `application_name` is given; the
    attribute `config.application_name` tells it.
    """
    name = f"faults-{next(_numbers)}"
    async with no_leaks(server, name), AsyncExitStack() as stack:

        async def make(agent_id: UUID | None = None, *, dsn: str | None = None, **settings: Any) -> DatabaseAdapter:
            settings = {
                "application_name": name,
                "indexing": "manual",
                "pool_max_size": 5,
                "pool_min_size": 0,
                "timeout": 30.0,
                "failure_threshold": 1000,
                **QUICK,
                **settings,
            }
            hurried = min(settings["timeout"], settings["connection_timeout"]) < 1.0

            async def opened() -> DatabaseAdapter | None:
                async with AsyncExitStack() as opening:
                    try:
                        db = await elizasql.open(agent_id=agent_id or uuid4(), dsn=dsn or server.dsn, **settings)
                        opening.push_async_callback(db.close)
                        await db.ensure_agent_exists({"name": "test"})
                        await db.ensure_embedding_dimension(WIDTH)
                    except (DeadlineError, UnavailableError):
                        if not hurried:
                            raise
                        return None
                    stack.push_async_callback(opening.pop_all().aclose)
                    return db

            # A short limit is for what the test does then: a machine that is busy may need longer to open.
            db: DatabaseAdapter = await until(opened, "an adapter is opened")
            return db

        yield make


@pytest.fixture
async def proxy(server: FaultServer, seed: int) -> AsyncIterator[Proxy]:
    """Give a proxy on loopback TCP; must be asked for before `make_db` is, so that it is closed last."""
    async with no_leaks(), Proxy(server.dsn, seed=seed) as made:
        yield made


async def make_room(db: DatabaseAdapter) -> UUID:
    """Give an agent a room."""
    return await db.create_room(Room(id=uuid4(), source="test", type="GROUP"))
