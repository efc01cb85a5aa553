"""Connections: the pool, what every connection is set to, and what the server must be.

The settings travel in the startup packet: no round trip, and they are what RESET returns to. Generic plans search in
0.42 ms where custom ones take 0.60 ms. They go with `enable_seqscan` and `enable_sort` off: every statement of `sql/`
is written for an index, and a plan that was made while a table was small, or without knowing the LIMIT, must neither
scan a table that has grown nor sort what HNSW gives in order. Where no index serves, the server still scans and sorts.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import ssl
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg

from . import _codecs, _hosts
from ._calls import spawn, wait_for
from ._statements import SQL
from .config import Config, redact
from .errors import (
    ClosedError,
    ConfigurationError,
    ConnectionLostError,
    DeadlineError,
    ElizaSQLError,
    InternalError,
    PoolTimeoutError,
    UnavailableError,
    translate,
)

logger = logging.getLogger("elizasql")

MINIMUM_POSTGRES = 150000
MINIMUM_PGVECTOR = (0, 8, 4)

# Seconds for which no other connection is tried where there was no room for one.
_FULL = 1.0

# Seconds after which connections that were kept go back to asyncpg's pool, which closes what is idle for long.
_KEEP = 1.0

Late = Callable[[Exception], None] | None


def session_settings(config: Config, vector_path: str | None = None) -> dict[str, str]:
    """Give the settings of every pooled connection.

    Args:
        config: The settings in force.
        vector_path: As in `Server`.

    `default_transaction_isolation`: the check for near-duplicates has to see what was committed while it waited, and a
    database may have been given another default.
    `hnsw.iterative_scan`: without it a filtered search returns fewer rows than asked for. `relaxed_order`: the exact
    ranking behind it puts the rows in order, and `strict_order` drops rows that come late (recall 0.91 instead of 0.97
    for the 300 nearest of 6,000). `scan_mem_multiplier`: with work_mem alone the scan may stop early.
    `idle_in_transaction_session_timeout`: a client that hangs inside a transaction must not hold its locks for ever.
    `max_parallel_workers_per_gather`: starting workers costs more than any of these statements.
    """
    return {
        "application_name": config.application_name,
        "default_transaction_isolation": "read committed",
        "enable_seqscan": "off",
        "enable_sort": "off",
        "hnsw.ef_search": str(config.ef_search),
        "hnsw.iterative_scan": "relaxed_order",
        "hnsw.scan_mem_multiplier": "4",
        "idle_in_transaction_session_timeout": "60s",
        "jit": "off",
        "max_parallel_workers_per_gather": "0",
        "plan_cache_mode": "force_generic_plan",
        "TimeZone": "UTC",
        # Statements name the schema of all else.
        **({"search_path": vector_path} if vector_path else {}),
    }


@dataclass(frozen=True, slots=True)
class Server:
    """What a look at the server found.

    Attributes:
        version: `server_version_num`, such as 180004.
        vector_version: Of the extension in this database; None: not created yet.
        vector_schema: The schema that it is in.
        vector_available: Version that the server could create or update it to; None: not installed.
        invalid_indexes: Names of indexes that a build left unfinished, and that the server keeps but does not use.
        encoding: Of the database.
        vector_path: What `search_path` must be for the extension to be found, or made; None: as it is.
        may_use_vector: Whether the role may use what is in the extension's schema.
        fires_triggers: Whether triggers fire, and references are checked, for what the session writes.
    """

    version: int
    vector_version: str | None
    vector_schema: str | None
    vector_available: str | None
    invalid_indexes: Sequence[str] = ()
    encoding: str = "UTF8"
    vector_path: str | None = None
    may_use_vector: bool = True
    fires_triggers: bool = True

    def check(self) -> None:
        """Refuse a server that this library cannot trust.

        Raises:
            ConfigurationError: PostgreSQL below 15; pgvector missing, or below 0.8.4, whose index can be damaged by
                vacuum and whose parallel build can overflow, or closed to the role; a database that is not in UTF8:
                it could not hold what is said in most languages; a role for which no trigger fires: neither
                references nor the width of vectors would be checked.

        Invalid indexes are logged: everything works without them, slower, and one may be in the making right now.
        """
        if self.invalid_indexes:
            logger.warning(
                "the server does not use %s, whose build did not end: REINDEX INDEX elizasql.<name>",
                ", ".join(self.invalid_indexes),
            )
        if self.version < MINIMUM_POSTGRES:
            raise ConfigurationError(f"PostgreSQL 15 or newer is needed; the server is {self.version // 10000}")
        found = self.vector_version or self.vector_available
        if found is None:
            raise ConfigurationError("the server does not have the extension pgvector: install version 0.8.4 or newer")
        if _version(found) < MINIMUM_PGVECTOR:
            remedy = "install a newer one"
            if _version(self.vector_available) >= MINIMUM_PGVECTOR:
                remedy = "run ALTER EXTENSION vector UPDATE"
            raise ConfigurationError(
                f"pgvector 0.8.4 or newer is needed: older ones damage HNSW indexes; found {found}: {remedy}"
            )
        if not self.may_use_vector:
            raise ConfigurationError(f'the role may not use pgvector: GRANT USAGE ON SCHEMA "{self.vector_schema}"')
        if self.encoding != "UTF8":
            raise ConfigurationError(f"the database is in {self.encoding}: make one in UTF8")
        self.check_triggers()

    def check_triggers(self) -> None:
        """Refuse a session whose writes nothing checks: migrations, too, are noted by a trigger.

        Raises:
            ConfigurationError: `session_replication_role` is replica.
        """
        if not self.fires_triggers:
            raise ConfigurationError(
                "session_replication_role is replica: nothing that is written would be checked: "
                "ALTER ROLE, or ALTER DATABASE, ... RESET session_replication_role"
            )


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text or ""))


async def look_at(connection: asyncpg.Connection[Any]) -> Server:
    """Ask the server what it is; one round trip."""
    row = await connection.fetchrow(SQL["look_at_server"].sql)
    assert row is not None
    return Server(*row)


@asynccontextmanager
async def steady(connection: asyncpg.Connection[Any], config: Config) -> AsyncIterator[None]:
    """Keep to one server for a moment, behind a pooler that would change it between two steps of one statement.

    A connection on which it fails is in no state to be used again.
    """
    if config.prepared_statements:
        yield
        return
    await connection.execute(SQL["begin_transaction"].sql, timeout=config.connection_timeout)
    yield
    await connection.execute(SQL["commit_transaction"].sql, timeout=config.connection_timeout)


async def connect(dsn: str, config: Config) -> asyncpg.Connection[Any]:
    """Open one connection outside the pool, for looks at the server and for migrations."""
    try:
        return await _hosts.connect(
            dsn,
            timeout=config.connection_timeout,
            command_timeout=config.timeout,
            statement_cache_size=100 if config.prepared_statements else 0,
            server_settings={"application_name": config.application_name},
        )
    except ConfigurationError:
        raise  # it says all
    except Exception as error:
        raise _explain(error, dsn, config) from error


# What the server says to a setting of the session that it does not know, cannot change, or whose value does not fit.
_REFUSED_SETTINGS = (
    asyncpg.UndefinedObjectError,
    asyncpg.CantChangeRuntimeParamError,
    asyncpg.InvalidParameterValueError,
)


def _missing_file(dsn: str) -> str | None:
    """Name a file of TLS that an address, its service or libpq's variables name, and that cannot be read."""
    for name, file in _hosts.files_of_tls(dsn).items():
        if not (Path(file).is_file() and os.access(file, os.R_OK)):
            return f"{name} {file}"
    return None


def _explain(error: Exception, dsn: str, config: Config) -> ElizaSQLError:
    where = redact(dsn)
    if isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError)) and (file := _missing_file(dsn)):
        # Python's TLS does not say which; and it is no server that does not answer.
        return ConfigurationError(f"{where}: {file} cannot be read: {error.strerror}")
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
        return ConnectionLostError(f"no connection to {where} within {config.connection_timeout:g} s")
    if (isinstance(error, KeyError) and "getpwuid" in str(error)) or "No username set" in str(error):
        # asyncpg asks the system, which may have no name for this process's uid, as in a container.
        return ConfigurationError(
            f"{where}: the address names no user, nor does the system: write USER@ before the host"
        )
    made = translate(error)
    if isinstance(made, InternalError) and isinstance(error, (ValueError, OverflowError)):
        # Of the address: a port that is none, or fewer ports than hosts.
        return ConfigurationError(f"{where}: {error}")
    if isinstance(error, _REFUSED_SETTINGS):
        return ConfigurationError(f"{where}: {made}; the address sets it, as all that the driver does not know")
    if isinstance(made, UnavailableError) or isinstance(error, ssl.SSLCertVerificationError):
        # The system's word for an unknown host does not name it.
        made.args = (f"no connection to {where}: {made}",)
    return made


# What a server has said of types: by their numbers, and by where and under which number it has `vector`.
_INTROSPECTED: dict[tuple[Any, ...], Any] = {}
# In place of the statement that asked: with a name, which says that the one without was left as it is.
_NOT_SENT = SimpleNamespace(name="remembered")


class _Connection(asyncpg.Connection):  # type: ignore[misc]
    """asyncpg's, whose end is no error when the server was gone before: the pool closes in tasks that nobody awaits."""

    __slots__ = ("_looked_up", "_pid")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._looked_up: tuple[Any, ...] = ()
        self._pid = os.getpid()

    def _cancel_current_command(self, *args: Any) -> None:
        if self._pid == os.getpid():  # what ends in a forked child goes on in its parent
            super()._cancel_current_command(*args)

    async def _introspect_type(self, typename: str, schema: str) -> Any:
        found = await super()._introspect_type(typename, schema)
        self._looked_up += (typename, schema, found["oid"])
        return found

    async def _introspect_types(self, typeoids: Any, timeout: float | None) -> Any:
        """Learn types while the connection is made; no later, when asyncpg would read `vector` as text.

        A type that is new then is that of an extension which was created anew, as by a dump that was restored: the
        codecs belong to the one that is gone.

        What one connection has learnt the next is told: asyncpg's question about types takes 17 of the 24 ms of
        processor time in which a connection is made, nearly all of it the server's, which plans it anew each time. A
        server's own types have the same numbers everywhere, and what depends on the database is in the key.
        """
        if self._pool_holder is not None:
            raise asyncpg.InvalidCachedStatementError("the types that this connection knows have been made anew")
        key = (*self._looked_up, *sorted(typeoids))
        if (types := _INTROSPECTED.get(key)) is not None:
            return types, _NOT_SENT
        types, statement = await super()._introspect_types(typeoids, timeout)
        if len(_INTROSPECTED) < 100:  # as many databases
            _INTROSPECTED[key] = types
        return types, statement

    async def close(self, *, timeout: float | None = None) -> None:
        """Close in good order, or cut what cannot be closed any more."""
        with suppress(OSError, asyncio.TimeoutError, asyncpg.PostgresConnectionError):
            await super().close(timeout=timeout)


class _Pool(asyncpg.Pool):  # type: ignore[misc]
    """asyncpg's, where a lost connection comes back with the call that needs it, not by itself.

    Its least connections are made by `Lane`; here they are what is not closed when it is idle.
    """

    def __init__(self, dsn: str, *, min_size: int, **options: Any) -> None:
        super().__init__(dsn, min_size=0, **options)
        self._least = min_size

    def get_min_size(self) -> int:
        return self._least

    async def expire_connections(self) -> None:
        """Let none be used again; those that are idle go at once, since no timer ends the least of them."""
        await super().expire_connections()
        for holder in self._holders:
            if holder.is_idle():
                holder.terminate()

    def _schedule_min_size_maintenance(self) -> None:
        """Leave it: a server that is down would be asked past the breaker, with a traceback in the log each time."""


class Lane:
    """Connections of one purpose: asyncpg's pool, and in front of it those that wait for the next call.

    A connection whose call went well is kept, up to a second, and the next call takes it, or the call that has waited
    longest: going through asyncpg's pool costs a task and two timers each time, more than all else that this library
    adds to a call.

    In a forked child it touches none of its parent's connections, whatever ends there: it would speak in the parent's
    conversation with the server, or tell the event loop of both to listen no more.

    Attributes:
        in_use: Connections that a call has.
        waiting: Calls that wait for one.
        max_size: Most connections.
    """

    def __init__(
        self, dsn: str, config: Config, server: Server, *, max_size: int, min_size: int, patient: bool = False
    ) -> None:
        self._dsn = dsn
        self._config = config
        self._server = server
        self._min_size = min_size
        self._patient = patient
        # Who has a place of asyncpg's pool: connections in use, kept or on their way back, and attempts to make one;
        # and the generation of each.
        self._places: dict[Any, int] = {}
        self._generation = 0
        self._kept: list[Any] = []
        # In the order in which they came. Whoever gives up goes at once: it may be long until a connection is free.
        self._waiters: OrderedDict[asyncio.Future[Any], None] = OrderedDict()
        self._returning: set[asyncio.Task[None]] = set()
        self._connecting: set[asyncio.Task[Any]] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._full_until = 0.0
        self._closed = False
        self._pid = os.getpid()
        self.max_size = max_size
        self.pool: Any = None  # set by open

    async def open(self) -> Lane:
        """Make the pool, and its least connections.

        Raises:
            ElizaSQLError: The server does not take them.
        """
        config = self._config
        vector_schema = self._server.vector_schema
        assert vector_schema is not None

        async def prepare(connection: asyncpg.Connection[Any]) -> None:
            try:
                async with steady(connection, config):
                    await _codecs.register(connection, vector_schema, named=config.prepared_statements)
            except BaseException:
                # asyncpg would close it in good order: a server that is silent would keep the call beyond its time.
                connection.terminate()
                raise

        async def keep(connection: asyncpg.Connection[Any]) -> None:
            """Stand in for asyncpg's reset, a round trip: 63 -> 36 us a lookup. No statement sets session state."""

        try:
            self.pool = await _Pool(
                self._dsn,
                min_size=self._min_size,
                max_size=self.max_size,
                max_queries=50_000,
                max_inactive_connection_lifetime=config.pool_idle_timeout,
                init=prepare,
                reset=keep,
                connect=_hosts.connect,
                connection_class=_Connection,
                record_class=asyncpg.Record,
                loop=None,
                timeout=config.connection_timeout,
                command_timeout=config.connection_timeout,  # for what asyncpg asks by itself: each call has its own
                # Above the number of texts in use, 1,100 with agents in all 16 partitions: with a cache of 100 and 130
                # texts in use a call takes 257 us instead of 70.
                statement_cache_size=2048 if config.prepared_statements else 0,
                # Otherwise each is prepared anew every 5 minutes, and the caller who does so waits without limit while
                # asyncpg closes all that have expired, one round trip each.
                max_cached_statement_lifetime=0,
                server_settings=session_settings(config, self._server.vector_path),
            )
            try:
                await self._connect_first()
            except BaseException:
                self.terminate()
                if self._connecting:
                    await asyncio.wait(self._connecting)
                raise
        except ConfigurationError:
            raise
        except Exception as error:
            raise _explain(error, self._dsn, config) from error
        return self

    async def _connect_first(self) -> None:
        """Make the least connections, the first one alone: it learns what the others are told, and what is wrong.

        asyncpg would leave behind those that come after another one has failed.
        """
        until = time.monotonic() + self._config.connection_timeout
        made = [await self._take(until, None)] if self._min_size else []
        made += await asyncio.gather(*(self._take(until, None) for _ in range(1, self._min_size)))
        for connection, _ in made:
            self.keep(connection)

    @property
    def in_use(self) -> int:
        return len(self._places) - len(self._kept)

    @property
    def waiting(self) -> int:
        return sum(not waiter.done() for waiter in self._waiters)

    @property
    def size(self) -> int:
        """Connections that are open."""
        return int(self.pool.get_size())

    def take(self) -> Any:
        """Give a connection that is kept, None when there is none; at once, as most calls find one."""
        while self._kept:
            connection = self._kept.pop()
            if is_open(connection):
                return connection
            self.give_back(connection)
        return None

    async def acquire(self, timeout: float, late: Late = None) -> tuple[Any, bool]:
        """Give a connection, and whether it was used before.

        Args:
            timeout: Seconds to wait for one to become free, or to be made. Nobody waits for the server longer than
                `connection_timeout`, and in a lane that is not patient nobody waits for other calls longer either. A
                call that builds an index has its connection for minutes: who has the time waits for it.
            late: Called with what asyncpg raised when it connected, where nobody waits for that any more.

        Raises:
            PoolTimeoutError: All were in use for that time.
            ClosedError: The lane was closed meanwhile.
            TimeoutError: None was made in that time.
            Exception: What asyncpg raised when it connected.
        """
        at_most = self._config.connection_timeout
        until = time.monotonic() + (timeout if self._patient else min(timeout, at_most))
        while True:
            if self._closed:
                raise ClosedError("the connections were closed meanwhile")
            if (connection := self.take()) is not None:
                return connection, True
            if self._may_grow():
                try:
                    return await self._take(min(until, time.monotonic() + at_most), late)
                except (asyncpg.TooManyConnectionsError, OSError) as error:
                    if not self._places or not _is_full(error):
                        raise
                    continue  # others have the rest: ours go round
            connection = await self._wait(until)
            if connection is not None:
                return connection, True

    def _may_grow(self) -> bool:
        """Tell whether a call may take another connection from asyncpg's pool, or make one."""
        if len(self._places) >= self.max_size:
            return False
        return not self._places or time.monotonic() >= self._full_until or self.pool.get_idle_size() > 0

    async def _take(self, until: float, late: Late) -> tuple[Any, bool]:
        """Take one from asyncpg's pool, which has one or makes one.

        A call with little time does not end the attempt: the connection serves the next one, and a server that does
        not answer is known to be silent.
        """
        idle = self.pool.get_idle_size() > 0
        # What it waits for is the network alone: it has a place for each that we ask for.
        task = spawn(self._connect(), "elizasql-connect")
        self._places[task] = self._generation
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        try:
            await asyncio.wait({task}, timeout=max(until - time.monotonic(), 0.001))
            if not task.done():
                raise asyncio.TimeoutError
        except BaseException:
            task.add_done_callback(lambda task: self._come_late(task, late))
            raise
        return self._arrive(task), idle

    async def _connect(self) -> Any:
        return await self.pool.acquire(timeout=self._config.connection_timeout)

    def _arrive(self, task: asyncio.Task[Any]) -> Any:
        """Give the connection that an attempt has made, which takes its place."""
        generation = self._places.pop(task)
        try:
            connection = task.result()
        except BaseException as error:
            if _is_full(error):
                self._full_until = time.monotonic() + _FULL
            self._wake()
            if isinstance(error, asyncio.CancelledError):
                # Nobody but `close` cancels an attempt: the caller was not cancelled.
                raise ClosedError("the connections were closed meanwhile") from error
            raise
        self._places[connection] = generation
        return connection

    def _come_late(self, task: asyncio.Task[Any], late: Late) -> None:
        try:
            self.keep(self._arrive(task))
        except ClosedError:
            pass
        except Exception as error:  # noqa: BLE001 - it is told
            if late is not None:
                late(error)

    async def _wait(self, until: float) -> Any:
        """Wait for a connection that another call ends with; None: there may be room for a new one now."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Any] = loop.create_future()
        self._waiters[waiter] = None
        expires = len(self._places) >= self.max_size or until <= self._full_until
        end = until if expires else self._full_until
        timer = loop.call_later(max(end - time.monotonic(), 0.0), _expire if expires else _look_again, waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            # The connection may have come together with the cancellation.
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._pass_on(waiter.result())
            raise
        finally:
            timer.cancel()
            self._waiters.pop(waiter, None)

    def keep(self, connection: Any) -> None:
        """End a call that went well: its connection is free, and in no transaction."""
        generation = self._places.get(connection)
        if generation is None or self._is_inherited():
            return  # it was dropped meanwhile, or is the parent's
        if generation != self._generation:
            self.give_back(connection, sound=True)
        elif not self._hand_over(connection):
            self._kept.append(connection)
            if self._sweep is None:
                self._sweep = asyncio.get_running_loop().call_later(_KEEP, self._sweep_kept)

    def give_back(
        self,
        connection: Any,
        then: Callable[[bool], None] | None = None,
        *,
        sound: bool = False,
        first: Callable[[float], Awaitable[None]] | None = None,
    ) -> None:
        """Return a connection to asyncpg's pool in the background: a server that is silent keeps nobody waiting.

        Args:
            connection: One that is broken, was cancelled, or is in a transaction.
            then: Called with whether the server answered meanwhile.
            sound: It is none of these, and its last call went well.
            first: Waits so many seconds for what may still run on it.
        """
        if self._is_inherited():
            return
        task = spawn(self._return(connection, then, sound=sound, first=first), "elizasql-return")
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)

    async def _return(
        self,
        connection: Any,
        then: Callable[[bool], None] | None,
        *,
        sound: bool,
        first: Callable[[float], Awaitable[None]] | None,
    ) -> None:
        answered = False
        patience = self._config.connection_timeout
        try:
            if first is not None and is_open(connection):
                await first(patience)
            if is_open(connection) and not sound:
                # asyncpg has asked the server to cancel what is running; its answer says what became of a BEGIN, too.
                await connection._protocol._wait_for_cancellation(patience)
                # Cut between the two steps of a new statement, the server waits for the second one and keeps the locks
                # of the first: only another command ends that.
                end = "roll_back_transaction" if connection.is_in_transaction() else "ping"
                await connection.execute(SQL[end].sql, timeout=patience)
                answered = is_open(connection)
            await self.pool.release(connection, timeout=patience)
        except BaseException as error:
            # What the call gives or raises is known already, and the server undoes what it was not told to.
            logger.debug("a connection is dropped that could not be released", exc_info=True)
            occupied = isinstance(error, (DeadlineError, asyncpg.InterfaceError)) and is_open(connection)
            self.drop(connection)
            if not isinstance(error, Exception):
                raise
            if not occupied:  # by a call of ours, which says nothing about the others
                await self.replace()  # a server that is silent on one may be so on all
        finally:
            self._free(connection)
            if then is not None:
                then(answered)

    def drop(self, connection: Any) -> None:
        """Close a connection at once, unless the pool has already taken it back because it broke; its place is free."""
        if self._is_inherited():
            return
        with suppress(asyncpg.InterfaceError):
            connection.terminate()
        self._free(connection)

    def _free(self, connection: Any) -> None:
        if connection in self._places:
            del self._places[connection]
            self._wake()

    async def let_go(self) -> None:
        """Give the connections that are kept back to asyncpg's pool, and wait for those that are on their way."""
        self._release_kept()
        while self._returning:
            await asyncio.wait(self._returning)

    async def replace(self) -> None:
        """Let every connection that there is be replaced by a new one before another call gets it."""
        if self._is_inherited():
            return
        self._generation += 1
        self._release_kept()
        await self.pool.expire_connections()

    def _is_inherited(self) -> bool:
        return self._pid != os.getpid()

    async def close(self) -> None:
        """Close every connection; none may be in use. A server that is silent is not waited for."""
        self._end()
        await self.let_go()
        with suppress(asyncio.TimeoutError, TimeoutError):
            await wait_for(self.pool.close(), self._config.connection_timeout, "elizasql-close")  # else it cuts them

    def terminate(self) -> None:
        """Cut every connection."""
        self._end()
        self._kept.clear()
        self.pool.terminate()

    def _end(self) -> None:
        self._closed = True
        for task in self._connecting:
            task.cancel()
        if self._sweep is not None:
            self._sweep.cancel()
        while self._hand_over(None):
            pass  # whoever waits hears of it

    def _sweep_kept(self) -> None:
        self._sweep = None
        self._release_kept()

    def _release_kept(self) -> None:
        while self._kept:
            self.give_back(self._kept.pop(), sound=True)

    def _pass_on(self, connection: Any) -> None:
        if connection is None:
            self._wake()
        else:
            self.keep(connection)

    def _hand_over(self, connection: Any) -> bool:
        """Give a connection to the call that has waited longest, None meaning room for one; False: nobody waits."""
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(connection)
                return True
        return False

    def _wake(self) -> None:
        if self._may_grow():
            self._hand_over(None)


def _is_full(error: BaseException) -> bool:
    """Tell whether there is no room for another connection: at the server, or for its descriptor here."""
    return isinstance(error, asyncpg.TooManyConnectionsError) or (
        isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    )


def _expire(waiter: asyncio.Future[Any]) -> None:
    if not waiter.done():
        waiter.set_exception(PoolTimeoutError("no connection became free in time"))


def _look_again(waiter: asyncio.Future[Any]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def is_open(connection: Any) -> bool:
    """Tell whether a connection can be used; the pool takes one back by itself when it breaks."""
    try:
        return not connection.is_closed()
    except asyncpg.InterfaceError:
        return False


def check_settings(rows: list[asyncpg.Record], wanted: dict[str, str]) -> None:
    """Compare what the server says is in force: it answers a value that it does not know with a warning only.

    Args:
        rows: name and value, from the statement get_settings.
        wanted: What `session_settings` gave.

    Raises:
        ConfigurationError: A setting is not in force, as behind a pooler that drops startup parameters.
    """
    found = {row["name"]: row["value"] for row in rows}
    wanted = wanted | {"idle_in_transaction_session_timeout": "1min"}
    wrong = sorted(name for name, value in wanted.items() if found.get(name) != value)
    if wrong:
        raise ConfigurationError(
            f"the server does not apply {', '.join(wrong)}: set them with ALTER ROLE ... SET, or connect directly"
        )
