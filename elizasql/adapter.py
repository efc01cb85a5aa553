"""The adapter: an agent's whole memory."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar
from uuid import UUID

from . import _codecs, _embedded, _migrate, _pool, _registry, _shutdown, _telemetry
from ._calls import Meter, as_timeout, lasting, spawn, unbounded
from ._embedded import EmbeddedServer
from ._executor import Executor, Home
from ._indexer import Indexer
from ._listener import Listener
from ._pool import Server
from ._registry import Connections
from ._resident import Resident
from ._shutdown import opened as _opened
from ._statements import SQL
from .agents import Agents
from .cache import Cache, Unswept
from .components import Components
from .config import Config, Settings
from .entities import Entities
from .errors import (
    ArgumentError,
    ConfigurationError,
    ElizaSQLError,
    EmbeddedServerError,
    MigrationError,
    WrongLoopError,
    translate,
)
from .goals import Goals
from .logs import Logs
from .memories import Memories, check_search
from .messaging import Messaging
from .pairing import Pairing
from .participants import Participants
from .reembedding import Reembedding
from .relationships import Relationships
from .rooms import Rooms
from .tasks import Tasks
from .worlds import Worlds

__all__ = ["DatabaseAdapter", "connect", "open"]

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack

T = TypeVar("T")


class DatabaseAdapter(
    Agents,
    Worlds,
    Rooms,
    Entities,
    Participants,
    Components,
    Relationships,
    Memories,
    Reembedding,
    Cache,
    Tasks,
    Goals,
    Logs,
    Messaging,
    Pairing,
):
    """An agent's memory on PostgreSQL. Made by `elizasql.connect` or `elizasql.open`; bound to their event loop.

    Every method refuses an argument of a wrong type and a number out of range by an `ArgumentError`, before any I/O.
    Its own `Raises` names that error where a method has more rules than these.

    Attributes:
        agent_id: The agent whose rows are read and written.
        config: The settings in force.
    """

    def __init__(
        self,
        agent_id: UUID,
        config: Config,
        address: str,
        connections: Connections,
        embedded: EmbeddedServer | None,
        dimension: int | None,
        home: Home | None,
        *,
        guarded: bool,
    ) -> None:
        self.agent_id = agent_id
        self.config = config
        self._address = address
        self._connections = connections
        self._meter = Meter(config.slow_call, _telemetry.observer(address) if config.telemetry else None)
        self._executor = Executor(connections, connections.interactive, config, self._meter, home)
        self._background = Executor(connections, connections.background, config, self._meter, home)
        self._embedded = embedded
        self._dimension = dimension
        self._measured: dict[tuple[Any, ...], tuple[bool, str | None, float]] = {}
        # By type, too: 1 is no answer where True is asked for.
        self._asked = functools.lru_cache(maxsize=256, typed=True)(functools.partial(check_search, agent_id, config))
        self._unswept = Unswept()
        self._guarded = guarded
        # A load that callers wait for is theirs: the background's connections may be in use while indexes are built.
        loading = self._executor if config.resident == "required" else self._background
        self._resident = Resident(loading, agent_id, config, address, guarded=guarded)
        self._listeners: set[Listener] = set()
        self._closing = asyncio.Lock()
        self._left = False
        self._indexer = Indexer(self._background, self._executor, agent_id, config)
        self._indexer.start()
        self._indexer.wake()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of agent {self.agent_id}, {self.config.where}>"

    async def is_ready(self, *, timeout: float | None = None) -> bool:
        """Tell whether the server answers, by one try; False, too, in another event loop and after `close`.

        Statement: sql/server.sql ping. Source: isReady.
        """
        try:
            await self._executor.probe()
        except ElizaSQLError:
            return False
        return True

    async def health(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Tell how the server and the connections to it are; never raises for a server that is down.

        Returns:
            `ready`: whether the server answered one try; `latency`: its seconds, None when it did not; `error`: what
            it was then; `breaker`: `state` ("closed", "open", "half_open"), `failures` in a row, `opened` times,
            `retry_after` seconds; `pool` and `background`: `size` connections that are open, `in_use`, `waiting`
            calls, `max_size`.

        Statement: sql/server.sql ping. One round trip.
        """
        began = time.monotonic()
        try:
            await self._executor.probe()
        except ElizaSQLError as failure:
            return self._tell_health(failure)
        return self._tell_health(None, time.monotonic() - began)

    def _tell_health(self, failure: ElizaSQLError | None, latency: float | None = None) -> dict[str, Any]:
        return {
            "ready": failure is None,
            "latency": latency,
            "error": None if failure is None else f"{type(failure).__name__}: {failure}",
            **self._connections.snapshot(),
        }

    async def stats(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Give figures of this adapter since it was opened, and of its connections.

        Returns:
            `methods`: of each public method that was called its `count`, `errors` by type, `mean`, `p50`, `p95`, `p99`
            and `longest` in seconds; `retries`: tries that were made again; `replaced_texts`: texts given to methods,
            also as keys of JSON, in which U+0000 or an unpaired surrogate, which PostgreSQL cannot store, became
            U+FFFD; `unindexed`: vectors of the agent that are not in the HNSW index yet; `indexing`: `failures` in a
            row of the background's looks at them, and the last `error`; `resident`: searches that memories in the
            process answered (`hits`, of these `checks` with nothing to fetch) or left to the database (`misses`), what
            was merged and loaded, and the `vectors` and `bytes` held; and `breaker`, `pool` and `background` as in
            `health`.

        Statement: sql/embeddings.sql count_unindexed_embeddings. One round trip.
        """
        unindexed = await self._executor.fetch_value(SQL["count_unindexed_embeddings"], agent_id=self.agent_id)
        return {
            "methods": self._meter.snapshot(),
            "retries": self._meter.retries,
            "replaced_texts": self._meter.replaced_texts,
            "unindexed": unindexed,
            "indexing": {"failures": self._indexer.failures, "error": self._indexer.error},
            "resident": self._resident.snapshot(),
            **self._connections.snapshot(),
        }

    @lasting(3600.0)
    async def index_memories(
        self, progress: Callable[[int, int], None] | None = None, *, rebuild: bool = False, timeout: float | None = None
    ) -> int:
        """Move every new vector of the agent into the HNSW index now; give how many moved.

        Searches are right without it: they scan exactly what is not indexed yet. It makes them fast after a large load.

        Args:
            progress: Called with the number moved so far and the number to move.
            rebuild: Build the index of the agent's partition anew, faster when most of it is new. Meanwhile searches of
                agents in the same partition scan exactly what is theirs, and their writes of vectors wait. 100,000
                vectors take about a minute.
            timeout: Seconds for the whole of it; None: an hour.

        Raises:
            ArgumentError: A value does not fit; nothing was sent.
            PermissionDeniedError: `rebuild` is True, and the role does not own the tables.
            LockTimeoutError: `rebuild` is True, and a transaction that has read the partition did not end; the index
                stands as before.

        Statement: sql/embeddings.sql index_embeddings, one transaction a batch; or drop_index and build_index.
        """
        self._refuse_in_transaction("index_memories")
        _codecs.check_progress(progress)
        rebuild = _codecs.as_bool(rebuild, "rebuild")
        try:
            if not rebuild:
                return await self._indexer.drain(progress)
            moved = await self._indexer.rebuild()
            if progress is not None:
                progress(moved, moved)
            return moved
        finally:
            self._measure_anew()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[DatabaseAdapter]:
        """Open a transaction: `async with db.transaction() as tx`, and every method of `tx` runs in it.

        All is kept when the block ends, and nothing when it raises. `tx.transaction()` is a savepoint: an error in it
        undoes what it did, and what was before can go on; without one, an error that the server raised ends the whole
        transaction: later calls are refused, and so is the end of the block if it is reached. `tx` has one connection:
        concurrent calls on it run one after the other, and while a savepoint is open only its own adapter may be used.
        What is called on `db` in the block is no part of it: it is kept whatever becomes of the block, and what needs a
        row that the block has changed waits in vain, until its time limit; the error says which adapter was meant.
        `load_memories`, `index_memories`, `reembed`, `abandon_reembedding`, `wait_for_tasks` and `close` are refused on
        `tx` by an ArgumentError: they have transactions, or a connection, of their own.

        Raises:
            TransactionError: An error was caught inside that had ended the transaction, or a call in it was cut short;
                nothing was kept.
            DeadlineError: A savepoint in it was left open, and did not end in time; nothing was kept.
            ConnectionLostError: The connection broke; nothing was kept.
            UnknownOutcomeError: It broke at the very end, or the time limit passed there, and the server could not be
                asked how that ended: all was kept or nothing.

        Statement: sql/server.sql begin_transaction, get_transaction_id and commit_transaction: three round trips more
        than its calls. What is inside is never tried again by itself. Source: transaction; differs: really is one.
        """
        async with self._executor.transaction() as executor:
            bound = copy.copy(self)
            bound._executor = executor
            yield bound
        self._indexer.wake()

    @unbounded
    async def with_entity_context(
        self, entity_id: UUID | str | None, callback: Callable[[DatabaseAdapter], Awaitable[T]]
    ) -> T:
        """Run `callback(tx)` in a `transaction` on behalf of an entity, and give what it gives.

        Raises:
            ArgumentError: `entity_id` is no id, or `callback` cannot be called, and nothing was begun; or what it gives
                cannot be awaited, and nothing is kept.

        Source: withEntityContext.
        """
        _codecs.as_optional_id(entity_id, "entity_id")
        _codecs.check_callable(callback, "callback")
        async with self.transaction() as bound:
            answer = callback(bound)
            if not inspect.isawaitable(answer):
                raise ArgumentError(f"callback must give something to await, not {type(answer).__name__}")
            return await answer

    @unbounded
    async def close(self, timeout: float = 10.0) -> None:
        """Stop the indexer, wait for running calls, and let the connections and the embedded server go. Idempotent.

        Connections that other adapters of this process share stay open. Calls that arrive meanwhile get a ClosedError.

        Args:
            timeout: Seconds to wait for calls that are running, default 10; after that their connections are cut.

        Raises:
            ArgumentError: `timeout` is no such number; nothing is closed.
            WrongLoopError: The adapter was opened in another event loop, or before a fork; nothing is closed.

        Source: close.
        """
        self._refuse_in_transaction("close")
        timeout = as_timeout(timeout, least=0.0)
        self._connections.check()
        async with self._closing:  # whoever comes second waits, too
            if self._left:
                return
            self._left = True
            self._executor.refuse()
            self._background.refuse()
            try:
                await self._resident.close()  # first: what it has begun must not meet what is refused now
                await self._indexer.stop()
                await asyncio.gather(*(listener.close() for listener in self._listeners))
                await asyncio.gather(self._executor.drain(timeout), self._background.drain(timeout))
            except BaseException:
                # What is waited for no longer ends by itself.
                for listener in self._listeners:
                    spawn(listener.close(), "elizasql-close")
                self._executor.cut()
                self._background.cut()
                self._connections.abandon()
                raise
            else:
                await self._connections.leave()
            finally:
                _opened.discard(self)
                embedded, self._embedded = self._embedded, None
                if embedded is not None:
                    await embedded.release()


async def open(  # noqa: A001
    *,
    agent_id: UUID | str,
    dsn: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    **settings: Unpack[Settings],
) -> DatabaseAdapter:
    """Open an agent's memory; `await adapter.close()` when done. `connect` does both.

    Args:
        agent_id: The agent.
        dsn: PostgreSQL to connect to; None: POSTGRES_URL, else the embedded server.
        data_dir: Folder of the embedded server; None: PGLITE_DATA_DIR, else ./pglite.
        **settings: Any other field of `elizasql.Config`.

    Raises:
        ArgumentError, ConfigurationError: A setting does not fit, or the server is too old.
        EmbeddedServerError: The embedded server does not start.
        MigrationError: The schema could not be brought up to date, or it is not and `migrate=False`.
        UnavailableError: The server does not answer.
        WrongLoopError: No event loop of asyncio runs here.
    """
    id = _codecs.as_id(agent_id, "agent_id")
    config = Config.load(dsn=dsn, data_dir=data_dir, **settings)
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # under trio, which drives coroutines by itself
        raise WrongLoopError("no event loop of asyncio runs here, and elizasql works in no other") from None
    if config.handle_signals:
        _shutdown.install()  # before there is anything that would be left behind
    embedded = await _embedded.acquire(config.data_dir) if config.dsn is None else None
    try:
        address = embedded.dsn if embedded is not None else config.dsn
        assert address is not None
        connections = await _registry.join(address, config, lambda: _prepare(address, config))
        try:
            executor = Executor(connections, connections.interactive, config, Meter(config.slow_call, None))
            wanted = _pool.session_settings(config, connections.server.vector_path)
            _pool.check_settings(await executor.fetch(SQL["get_settings"], names=list(wanted)), wanted)
            agent = await executor.fetch_row(SQL["look_at_agent"], agent_id=id)
            assert agent is not None
            # Of connections that were open already: somebody else may have migrated since.
            await _bring_up_to_date(_migrate.lacking(agent["versions"]), address, config)
            await _let_go_of_closed_loops()
        except BaseException:
            connections.abandon()
            raise
    except BaseException:
        if embedded is not None:
            await embedded.release()
        raise
    home = None if agent["partition"] is None else Home(id, agent["partition"])
    adapter = DatabaseAdapter(
        *(id, config, address, connections, embedded, agent["dimension"], home), guarded=agent["guarded"]
    )
    _opened.add(adapter)
    return adapter


@asynccontextmanager
async def connect(
    *,
    agent_id: UUID | str,
    dsn: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    **settings: Unpack[Settings],
) -> AsyncIterator[DatabaseAdapter]:
    """Open an agent's memory for the time of an `async with` block. Takes and raises what `open` does."""
    adapter = await open(agent_id=agent_id, dsn=dsn, data_dir=data_dir, **settings)
    try:
        yield adapter
    finally:
        with suppress(WrongLoopError):  # a forked child that leaves the block leaves its parent's alone
            await asyncio.shield(adapter.close())


async def _let_go_of_closed_loops() -> None:
    """Let go of adapters whose loop is gone, and of their servers: nobody can close them any more."""
    for each in [each for each in tuple(_opened) if each._connections.loop.is_closed()]:
        if each._embedded is not None:
            with suppress(EmbeddedServerError):
                await each._embedded.release()
        _opened.discard(each)


async def _prepare(dsn: str, config: Config) -> Server:
    """Check the server and apply pending migrations; give what it is then."""
    server, pending = await _look_at(dsn, config)
    await _bring_up_to_date(pending, dsn, config)
    if pending or server.vector_schema is None:  # another process may have applied them just now
        server, _ = await _look_at(dsn, config)
    if server.vector_schema is None:
        raise ConfigurationError(
            "the extension pgvector was taken out of this database, and every vector with it: restore a backup"
        )
    return server


async def _bring_up_to_date(pending: list[str], dsn: str, config: Config) -> None:
    """Apply the migrations that a database lacks, or refuse to."""
    if pending and not config.migrate:
        raise MigrationError(f"migrations are pending: {', '.join(pending)}")
    if pending:
        await _migrate.migrate(dsn, config)


async def _look_at(dsn: str, config: Config) -> tuple[Server, list[str]]:
    """Check the server; give what it is, and the versions of the migrations that it lacks."""
    connection = await _pool.connect(dsn, config)
    try:
        async with _pool.steady(connection, config):
            server = await _pool.look_at(connection)
        server.check()
        async with _pool.steady(connection, config):
            pending = await _migrate.pending_versions(connection)
        await connection.close(timeout=config.connection_timeout)
    except ElizaSQLError:
        raise
    except Exception as error:
        raise translate(error) from error
    finally:
        connection.terminate()
    return server, pending
