"""The one place that reads over a connection of its own: a snapshot of a database, and a query's rows as a stream."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from elizasql import _codecs, _pool
from elizasql._calls import end
from elizasql._statements import SQL, Statement
from elizasql.config import Config
from elizasql.errors import ElizaSQLError, translate

# Seconds that one statement may take: a large sort before the first row is no failure.
_PATIENCE = 3600.0

# What is asked for at a time: so many rows at most, and fewer when the last ones were larger than so many bytes.
_ROWS = 200
_BYTES = 4 << 20


class Snapshot:
    """A database as it was at one moment. Made by `snapshot`; one query at a time reads the connection."""

    def __init__(self, connection: asyncpg.Connection[Any]) -> None:
        self._connection = connection
        self._turn = asyncio.Lock()

    async def fetch(self, statement: Statement, **params: Any) -> list[asyncpg.Record]:
        """Give the rows of a statement; also while a stream is being read."""
        async with self._turn:
            rows: list[asyncpg.Record] = await self._connection.fetch(statement.sql, *statement.order(params))
            return rows

    async def stream(self, statement: Statement, size: int, **params: Any) -> AsyncIterator[list[asyncpg.Record]]:
        """Give the rows of a statement, at most `size` of them and about 4 MB of text at a time; one row may be larger.

        The server is asked for the next rows while the caller works on the last ones.
        """
        async with self._turn:
            # Without a name: it need not be there any more when the rows are fetched.
            prepared = await self._connection.prepare(statement.sql, name="")
            cursor = await prepared.cursor(*statement.order(params))

        async def fetch(count: int) -> list[asyncpg.Record]:
            async with self._turn:
                rows: list[asyncpg.Record] = await cursor.fetch(count)
                return rows

        rows: list[asyncpg.Record] = []
        weight = 0
        ahead = asyncio.ensure_future(fetch(1))
        try:
            while found := await ahead:
                weights = [_weigh(row) for row in found]
                fitting = _BYTES * len(found) // max(sum(weights), 1)
                ahead = asyncio.ensure_future(fetch(max(1, min(_ROWS, fitting))))
                for row, each in zip(found, weights, strict=True):
                    rows.append(row)
                    weight += each
                    if len(rows) >= size or weight >= _BYTES:
                        yield rows
                        rows, weight = [], 0
            if rows:
                yield rows
        finally:
            await end(ahead)


def _weigh(row: asyncpg.Record) -> int:
    """Give the length of a row's texts; what else there is in a row is small."""
    return sum(len(value) for value in row.values() if isinstance(value, str))


@asynccontextmanager
async def snapshot(address: str, config: Config) -> AsyncIterator[Snapshot]:
    """Open a connection whose every query sees the database as it is now, and that can write nothing."""
    connection = await _pool.connect(address, dataclasses.replace(config, timeout=_PATIENCE))
    try:
        # First of all: behind a pooler only a transaction stays with one server.
        await connection.transaction(isolation="repeatable_read", readonly=True).start()
        await connection.execute(SQL["prepare_snapshot"].sql)
        server = await _pool.look_at(connection)
        if server.vector_schema is not None:
            await _codecs.register(connection, server.vector_schema, named=config.prepared_statements)
        yield Snapshot(connection)
    except ElizaSQLError:
        raise
    except (
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        ConnectionError,
        asyncio.TimeoutError,
    ) as error:
        raise translate(error) from error
    finally:
        # Neither an end of the transaction nor a farewell: nothing was written, a fetch may still be under way when the
        # caller fails, and a PGlite does not answer the farewell.
        connection.terminate()
