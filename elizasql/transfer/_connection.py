"""The one place that reads over a connection of its own: a snapshot of a database, and a query's rows as a stream."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from elizasql import _codecs, _pool
from elizasql._statements import Statement
from elizasql.config import Config
from elizasql.errors import ElizaSQLError, translate

# Seconds that one statement may take: a large sort before the first row is no failure.
_PATIENCE = 3600.0


class Snapshot:
    """A database as it was at one moment. Made by `snapshot`; one query at a time reads the connection."""

    def __init__(self, connection: asyncpg.Connection[Any]) -> None:
        self._connection = connection
        self._turn = asyncio.Lock()

    async def fetch(self, statement: Statement, **params: Any) -> list[asyncpg.Record]:
        """Give the rows of a statement; also while a stream is being read."""
        async with self._turn:
            rows: list[asyncpg.Record] = await self._connection.fetch(statement.sql, *_order(statement, params))
            return rows

    async def stream(self, statement: Statement, size: int, **params: Any) -> AsyncIterator[list[asyncpg.Record]]:
        """Give the rows of a statement, at most `size` at a time, without holding more than twice these.

        The server is asked for the next rows while the caller works on the last ones.
        """
        async with self._turn:
            cursor = await self._connection.cursor(statement.sql, *_order(statement, params))

        async def fetch() -> list[asyncpg.Record]:
            async with self._turn:
                rows: list[asyncpg.Record] = await cursor.fetch(size)
                return rows

        ahead = asyncio.ensure_future(fetch())
        try:
            while rows := await ahead:
                ahead = asyncio.ensure_future(fetch())
                yield rows
        finally:
            ahead.cancel()
            await asyncio.wait([ahead])
            if not ahead.cancelled():
                ahead.exception()  # nobody else will ask for it


def _order(statement: Statement, params: dict[str, Any]) -> list[Any]:
    return [params[name] for name in statement.params]


@asynccontextmanager
async def snapshot(address: str, config: Config) -> AsyncIterator[Snapshot]:
    """Open a connection whose every query sees the database as it is now, and that can write nothing."""
    connection = await _pool.connect(address, dataclasses.replace(config, timeout=_PATIENCE))
    try:
        server = await _pool.look_at(connection)
        if server.vector_schema is not None:
            await _codecs.register(connection, server.vector_schema)
        await connection.transaction(isolation="repeatable_read", readonly=True).start()
        yield Snapshot(connection)
    except ElizaSQLError:
        raise
    except (asyncpg.PostgresError, asyncpg.InterfaceError, ConnectionError, asyncio.TimeoutError) as error:
        raise translate(error) from error
    finally:
        # Neither an end of the transaction nor a farewell: nothing was written, a fetch may still be under way when the
        # caller fails, and a PGlite does not answer the farewell.
        connection.terminate()
