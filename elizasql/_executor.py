"""The only module that runs the statements of `sql/` for the domains.

One place orders the arguments, takes a connection, runs, and translates errors; retries, the circuit breaker and
metrics have their place here, around `_run`. It costs about 1 us over a bare `connection.fetch`, and the pool 16 us.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from ._statements import Statement
from .errors import ClosedError, ConnectionLostError, PoolTimeoutError, translate

Arguments = list[Any]


class Executor:
    """Runs statements, each on a pooled connection.

    Attributes:
        in_flight: Calls that are running or waiting for a connection.
    """

    def __init__(self, pool: asyncpg.Pool[Any], acquire_timeout: float) -> None:
        self._pool = pool
        self._acquire_timeout = acquire_timeout
        self._closed = False
        self.in_flight = 0

    async def fetch(self, statement: Statement, **params: Any) -> list[asyncpg.Record]:
        """Run a statement and give its rows."""
        rows: list[asyncpg.Record] = await self._run(statement, "fetch", _order(statement, params))
        return rows

    async def fetch_row(self, statement: Statement, **params: Any) -> asyncpg.Record | None:
        """Run a statement and give its first row, None where there is none."""
        return await self._run(statement, "fetchrow", _order(statement, params))

    async def fetch_value(self, statement: Statement, **params: Any) -> Any:
        """Run a statement and give the first column of its first row, None where there is none."""
        return await self._run(statement, "fetchval", _order(statement, params))

    async def execute(self, statement: Statement, **params: Any) -> None:
        """Run a statement for its effect."""
        await self._run(statement, "execute", _order(statement, params))

    async def fetch_chunks(self, statement: Statement, chunks: Sequence[dict[str, Any]]) -> list[asyncpg.Record]:
        """Run a statement once for each chunk, all in one transaction when there are several; give all rows."""
        if len(chunks) == 1:
            return await self.fetch(statement, **chunks[0])
        rows: list[asyncpg.Record] = []
        connection = await self._acquire(statement.name)
        try:
            async with connection.transaction():
                for chunk in chunks:
                    rows += await connection.fetch(statement.sql, *_order(statement, chunk))
        except Exception as error:
            raise translate(error, statement.name) from error
        finally:
            await self._release(connection)
        return rows

    async def _run(self, statement: Statement, method: str, arguments: Arguments) -> Any:
        connection = await self._acquire(statement.name)
        try:
            return await getattr(connection, method)(statement.sql, *arguments)
        except Exception as error:
            raise translate(error, statement.name) from error
        finally:
            await self._release(connection)

    async def _acquire(self, statement: str) -> Any:
        if self._closed:
            raise ClosedError("the adapter is closed", statement=statement)
        self.in_flight += 1
        try:
            return await self._pool.acquire(timeout=self._acquire_timeout)
        except BaseException as error:
            self.in_flight -= 1
            if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
                raise self._explain_timeout(statement) from error
            if isinstance(error, Exception):
                raise translate(error, statement) from error
            raise

    async def _release(self, connection: Any) -> None:
        self.in_flight -= 1
        # Both limits are needed: without one here, a network that swallows packets would never let go.
        await self._pool.release(connection, timeout=self._acquire_timeout)

    def _explain_timeout(self, statement: str) -> PoolTimeoutError | ConnectionLostError:
        waited = f"{statement}: waited {self._acquire_timeout:g} s for a connection"
        if self._pool.get_size() >= self._pool.get_max_size():
            return PoolTimeoutError(f"{waited}; all {self._pool.get_size()} are in use", statement=statement)
        return ConnectionLostError(f"{waited}; the server does not answer", statement=statement)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Executor]:
        """Open a transaction: what runs on the executor that it gives is done as a whole or not at all."""
        connection = await self._acquire("transaction")
        transaction = connection.transaction()
        try:
            try:
                await transaction.start()
            except Exception as error:
                raise translate(error, "transaction") from error
            inner = _TransactionExecutor(self._pool, self._acquire_timeout, connection)
            try:
                yield inner
            except BaseException:
                inner._closed = True
                if not connection.is_closed():
                    await transaction.rollback()
                raise
            inner._closed = True
            try:
                await transaction.commit()
            except Exception as error:
                raise translate(error, "transaction") from error
        finally:
            await self._release(connection)

    async def close(self, timeout: float) -> None:
        """Refuse new calls, wait for those in flight at most `timeout` seconds, and close the pool. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            await asyncio.wait_for(self._pool.close(), timeout)
        except (asyncio.TimeoutError, TimeoutError):
            self._pool.terminate()


class _TransactionExecutor(Executor):
    """Runs statements on the one connection of a transaction, one after the other; a transaction in it is a savepoint.

    Nothing is tried again in here: what failed is known to the server as part of the whole.
    """

    def __init__(self, pool: asyncpg.Pool[Any], acquire_timeout: float, connection: Any) -> None:
        super().__init__(pool, acquire_timeout)
        self._connection = connection
        self._turn = asyncio.Lock()

    async def _acquire(self, statement: str) -> Any:
        if self._closed:
            raise ClosedError("the transaction is over", statement=statement)
        await self._turn.acquire()
        return self._connection

    async def _release(self, connection: Any) -> None:  # noqa: ARG002
        self._turn.release()


def _order(statement: Statement, params: dict[str, Any]) -> Arguments:
    return [params[name] for name in statement.params]
