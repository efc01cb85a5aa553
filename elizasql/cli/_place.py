"""Where a command works: the server that is meant, reached without making one by accident."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any
from uuid import UUID

import asyncpg
import typer

import elizasql
from elizasql import DatabaseAdapter, _codecs, _embedded, _migrate, _pool
from elizasql._statements import SQL
from elizasql.config import Config
from elizasql.errors import (
    ArgumentError,
    ConfigurationError,
    EmbeddedServerError,
    NotFoundError,
    SchemaError,
    show,
    translate,
)

Dsn = Annotated[
    str | None,
    typer.Option(help="PostgreSQL to use; better set POSTGRES_URL, a command line can be read by others."),
]
DataDir = Annotated[str | None, typer.Option(help="Folder of the embedded server. Default: PGLITE_DATA_DIR, ./pglite.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AgentId = Annotated[str | None, typer.Option("--agent", help="Id of the agent; needed when there are several.")]


@dataclass(frozen=True, slots=True)
class Place:
    """A server that answers.

    Attributes:
        address: Connection string.
        config: The settings in force.
        embedded: Whether it is the embedded server.
    """

    address: str
    config: Config
    embedded: bool

    @asynccontextmanager
    async def connect(self, *, ready: bool = True) -> AsyncIterator[asyncpg.Connection[Any]]:
        """Open a connection outside any pool, with plain settings.

        Args:
            ready: Refuse a database whose schema is not this library's, or not up to date.
        """
        connection = await _pool.connect(self.address, self.config)
        try:
            if ready:
                check_ready(await _migrate.pending_versions(connection))
            yield connection
            await connection.close(timeout=self.config.connection_timeout)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, asyncio.TimeoutError) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise  # of a file, not of the connection
            raise translate(error) from error
        finally:
            connection.terminate()

    async def choose_agent(self, given: str | None) -> UUID:
        """Give the agent that is meant: the one that is given, else the only one that there is."""
        id = None if given is None else read_agent(given)
        async with self.connect() as connection:
            rows = await connection.fetch(SQL["get_first_agents"].sql, id, 10)
        if not rows and id is not None:
            raise NotFoundError(f"there is no agent {id}")
        if not rows:
            raise ArgumentError("there is no agent in this database yet")
        if len(rows) > 1:
            names = ", ".join(f"{row['id']} ({row['name']:.30})" for row in rows)
            raise ArgumentError(f"which agent? give --agent; there are {names}{' and more' if len(rows) > 9 else ''}")
        return UUID(bytes=rows[0]["id"].bytes)

    @asynccontextmanager
    async def open(self, agent_id: UUID, **settings: Any) -> AsyncIterator[DatabaseAdapter]:
        """Open an adapter on a database whose schema is up to date."""
        settings = {"migrate": False, "indexing": "manual", "pool_min_size": 0, "handle_signals": False, **settings}
        async with elizasql.connect(agent_id=agent_id, dsn=self.address, **settings) as adapter:
            yield adapter


def read_agent(given: str) -> UUID:
    """Read what --agent gives; of an agent people know the name."""
    try:
        return _codecs.as_id(given, "--agent")
    except ArgumentError:
        raise ArgumentError(f"--agent must be a UUID, not {show(given)}: `elizasql stats` lists the agents") from None


def check_ready(pending: list[str]) -> None:
    """Refuse a database that lacks migrations."""
    if pending and len(pending) == len(_migrate.known_versions()):
        raise SchemaError("this database has no schema of elizasql: `elizasql migrate up` makes it")
    if pending:
        raise SchemaError(f"{len(pending)} migrations are pending: run `elizasql migrate up`")


def load(dsn: str | None, data_dir: str | None) -> Config:
    """Read the settings; a wrong one is a wrong use."""
    try:
        if dsn is not None and data_dir is not None:
            raise ConfigurationError("--dsn and --data-dir exclude each other")
        return Config.load(dsn=dsn, data_dir=data_dir)
    except ConfigurationError as error:
        raise ArgumentError(str(error)) from None


def has_cluster(config: Config) -> bool:
    """Tell whether there is an embedded server in the folder, running or not."""
    return (config.data_dir / "data" / "PG_VERSION").is_file()


@asynccontextmanager
async def reach(dsn: str | None, data_dir: str | None, *, create: bool = False) -> AsyncIterator[Place]:
    """Reach the server that is meant; the embedded one is started if it does not run, and stopped behind us.

    Args:
        dsn, data_dir: As given.
        create: Make a new embedded server where there is none.

    Raises:
        EmbeddedServerError: There is none: a command run in the wrong folder must not leave one behind.
    """
    config = load(dsn, data_dir)
    if config.dsn is not None:
        yield Place(config.dsn, config, embedded=False)
        return
    if not create and not has_cluster(config):
        raise EmbeddedServerError(
            f"there is no embedded server in {config.data_dir.resolve()}: --data-dir names another folder, "
            "`elizasql up` makes one, or set POSTGRES_URL"
        )
    server = await _embedded.acquire(config.data_dir)
    try:
        yield Place(server.dsn, config, embedded=True)
    finally:
        await server.release()
