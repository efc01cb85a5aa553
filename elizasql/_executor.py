"""The only module that runs the statements of `sql/` for the domains.

One place orders the arguments, takes a connection, runs, and translates errors; retries, the circuit breaker and
metrics have their place here, around `_run`.

A connection whose call went well is kept for the next one, up to a second, before it goes back to the pool: taking it
from asyncpg's pool and giving it back costs more than all else that this library adds to a call, a task and two timers
each time. While a call waits for the pool nothing is kept, so that the pool's order of waiting holds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg

from ._statements import SQL, Statement
from .errors import (
    ClosedError,
    ConnectionLostError,
    ElizaSQLError,
    PoolTimeoutError,
    TransactionError,
    translate,
)

logger = logging.getLogger("elizasql")

Arguments = list[Any]

# Seconds after which connections that were kept go back to the pool, which closes what is idle for long.
_KEEP = 1.0


class Executor:
    """Runs statements, each on a pooled connection.

    Attributes:
        in_flight: Calls that are running or waiting for a connection.
        in_transaction: Whether all of them run in one transaction.
    """

    in_transaction = False

    def __init__(self, pool: asyncpg.Pool[Any], acquire_timeout: float) -> None:
        self._pool = pool
        self._acquire_timeout = acquire_timeout
        self._closed = False
        self._drained = asyncio.Event()
        self._kept: list[Any] = []
        self._waiting = 0
        self._sweep: asyncio.TimerHandle | None = None
        self._sweeping: asyncio.Task[None] | None = None
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
            raise self._explain(error, statement.name, connection) from error
        finally:
            await self._release(connection)
        return rows

    async def _run(self, statement: Statement, method: str, arguments: Arguments) -> Any:
        connection = await self._acquire(statement.name)
        try:
            result = await getattr(connection, method)(statement.sql, *arguments)
        except BaseException as error:
            # Made before the release: what it says depends on whether the adapter is closed now.
            made = self._explain(error, statement.name, connection) if isinstance(error, Exception) else None
            await self._release(connection)
            if made is None:
                raise
            raise made from error
        await self._keep(connection)
        return result

    async def _acquire(self, statement: str) -> Any:
        if self._closed:
            raise ClosedError("the adapter is closed", statement=statement)
        self.in_flight += 1
        while self._kept:
            connection = self._kept.pop()
            if _is_open(connection):
                return connection
            await self._give_back(connection)
        self._waiting += 1
        try:
            return await self._pool.acquire(timeout=self._acquire_timeout)
        except BaseException as error:
            self._leave()
            if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
                raise self._explain_timeout(statement) from error
            if isinstance(error, Exception):
                raise self._explain(error, statement) from error
            raise
        finally:
            self._waiting -= 1

    async def _keep(self, connection: Any) -> None:
        """End a call that went well: its connection is free and in no transaction."""
        if self._closed or self._waiting:
            await self._release(connection)
            return
        self._kept.append(connection)
        self._leave()
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(_KEEP, self._begin_sweep)

    def _begin_sweep(self) -> None:
        self._sweep = None
        self._sweeping = asyncio.get_running_loop().create_task(self.let_go(), name="elizasql-sweep")

    async def let_go(self) -> None:
        """Give the connections that are kept back to the pool."""
        while self._kept:
            await self._give_back(self._kept.pop())

    async def _release(self, connection: Any) -> None:
        try:
            await self._give_back(connection)
        finally:
            self._leave()

    async def _give_back(self, connection: Any) -> None:
        try:
            # Both limits are needed: without one here, a network that swallows packets would never let go.
            await self._pool.release(connection, timeout=self._acquire_timeout)
        except Exception:
            # What the call gives or raises is known already; the pool has dropped the connection.
            logger.debug("a connection was dropped when it was released", exc_info=True)

    def _leave(self) -> None:
        self.in_flight -= 1
        if self._closed and not self.in_flight:
            self._drained.set()

    def _explain(self, error: Exception, statement: str, connection: Any = None) -> ElizaSQLError:
        if connection is not None and isinstance(error, asyncpg.InternalClientError):
            _drop(connection)  # the driver has lost its place in the conversation
        made = translate(error, statement)
        if self._closed and not self.in_transaction and isinstance(made, ConnectionLostError):
            return ClosedError(f"{statement}: the adapter was closed meanwhile", statement=statement)
        return made

    def _explain_timeout(self, statement: str) -> PoolTimeoutError | ConnectionLostError:
        waited = f"{statement}: waited {self._acquire_timeout:g} s for a connection"
        if self._pool.get_size() >= self._pool.get_max_size():
            return PoolTimeoutError(f"{waited}; all {self._pool.get_size()} are in use", statement=statement)
        return ConnectionLostError(f"{waited}; the server does not answer", statement=statement)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Executor]:
        """Open a transaction: what runs on the executor that it gives is done as a whole or not at all."""
        connection = await self._acquire("transaction")
        try:
            try:
                transaction = connection.transaction()
                await transaction.start()
            except BaseException as error:
                self._doubt(connection)
                if isinstance(error, Exception):
                    raise self._explain(error, "transaction", connection) from error
                raise
            inner = _TransactionExecutor(self._pool, self._acquire_timeout, connection)
            try:
                yield inner
                await inner.commit(transaction)
            except BaseException:
                await inner.roll_back(transaction)
                raise
        finally:
            await self._release(connection)

    def _doubt(self, connection: Any) -> None:
        """Deal with a connection of which nobody knows whether a transaction was begun on it."""
        _drop(connection)

    async def close(self, timeout: float) -> None:
        """Refuse new calls, wait for those in flight at most `timeout` seconds, and close the pool. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            await asyncio.wait_for(self._drain(), timeout)
        except (asyncio.TimeoutError, TimeoutError):
            self._pool.terminate()
        except BaseException:
            self._pool.terminate()
            raise

    async def _drain(self) -> None:
        # The pool waits for connections that are in use, but not for the calls that wait for one.
        if self.in_flight:
            await self._drained.wait()
        if self._sweep is not None:
            self._sweep.cancel()
        if self._sweeping is not None:
            await self._sweeping
        await self.let_go()
        await self._pool.close()


class _TransactionExecutor(Executor):
    """Runs statements on the one connection of a transaction, one after the other; a transaction in it is a savepoint.

    Nothing is tried again in here: what failed is known to the server as part of the whole.
    """

    in_transaction = True

    def __init__(self, pool: asyncpg.Pool[Any], acquire_timeout: float, connection: Any) -> None:
        super().__init__(pool, acquire_timeout)
        self._connection = connection
        self._turn = asyncio.Lock()
        self._nested = False
        self._doubtful = False

    async def _acquire(self, statement: str) -> Any:
        self._check(statement)
        await self._turn.acquire()
        try:
            self._check(statement)  # it may have ended while this call waited
        except BaseException:
            self._turn.release()
            raise
        return self._connection

    def _check(self, statement: str) -> None:
        if self._closed:
            raise ClosedError("the transaction is over", statement=statement)
        if self._nested:
            # To wait for the savepoint's end could be to wait for oneself.
            raise TransactionError("a savepoint is open: use the adapter that it gave", statement=statement)

    async def _release(self, connection: Any) -> None:  # noqa: ARG002
        self._turn.release()

    async def _keep(self, connection: Any) -> None:
        await self._release(connection)

    async def fetch_chunks(self, statement: Statement, chunks: Sequence[dict[str, Any]]) -> list[asyncpg.Record]:
        """Run a statement once for each chunk, all or none; give all rows."""
        try:
            return await super().fetch_chunks(statement, chunks)
        except BaseException:
            self._doubtful = True
            raise

    async def _run(self, statement: Statement, method: str, arguments: Arguments) -> Any:
        try:
            return await super()._run(statement, method, arguments)
        except BaseException:
            self._doubtful = True
            raise

    def _doubt(self, connection: Any) -> None:  # noqa: ARG002
        self._doubtful = True

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Executor]:
        """Open a savepoint; until it ends, nothing else runs on this executor."""
        async with super().transaction() as inner:
            self._nested = True
            try:
                yield inner
            finally:
                self._nested = False

    async def commit(self, transaction: Any) -> None:
        """Keep what was done, once the calls that are running have ended."""
        self._closed = True
        async with self._turn:
            try:
                if self._doubtful:
                    # The server answers a COMMIT after an error with a ROLLBACK that asyncpg does not report.
                    await self._connection.fetchval(SQL["ping"].sql)
                await transaction.commit()
            except Exception as error:
                raise translate(error, "transaction") from error

    async def roll_back(self, transaction: Any) -> None:
        """Undo what was done, once the calls that are running have ended; the error that led here is raised."""
        self._closed = True
        async with self._turn:
            try:
                await transaction.rollback()
            except BaseException as error:
                # Without the connection the server undoes the transaction, whatever state it is in.
                logger.debug("a rollback failed, the connection is dropped", exc_info=True)
                _drop(self._connection)
                if not isinstance(error, Exception):
                    raise


def _is_open(connection: Any) -> bool:
    """Tell whether a kept connection can be used; the pool takes one back by itself when it breaks."""
    try:
        return not connection.is_closed()
    except asyncpg.InterfaceError:
        return False


def _drop(connection: Any) -> None:
    """Close a connection at once, unless the pool has already taken it back because it broke."""
    with suppress(asyncpg.InterfaceError):
        connection.terminate()


def _order(statement: Statement, params: dict[str, Any]) -> Arguments:
    return [params[name] for name in statement.params]
