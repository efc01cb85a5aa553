"""One set of connections for a server and an event loop, shared by the adapters of the process.

Who opens an adapter joins, who closes it leaves, and the last one out closes the connections. What can differ between
two adapters' connections is part of the key: the address, the session's settings, the sizes and the limits.

The table lives in `sys.modules` and not in this module: a package that is imported twice, or reloaded, finds it again.
Entries belong to an event loop, since a socket does. Those of a loop that was closed before its adapters go when the
next adapter is opened: until then they hold their connections, and the loop. After a fork the child's table is empty:
the parent's sockets are the parent's, and an adapter that came along says so.
"""

from __future__ import annotations

import asyncio
import os
import sys
import weakref
from collections.abc import Awaitable, Callable, Hashable, Iterable
from dataclasses import fields
from types import ModuleType
from typing import Any

from ._breaker import CircuitBreaker
from ._pool import Lane, Server
from ._retry import RetryPolicy
from .config import Config
from .errors import WrongLoopError

# What has no part in the connections: two adapters may differ in it and share them.
_APART = frozenset(
    (
        *("dsn", "data_dir"),  # the address stands for them
        *("migrate", "migration_dsn"),
        *("indexing", "index_batch_size", "index_interval", "batch_size", "log_lane"),
        *("memory_types", "slow_call", "telemetry", "handle_signals", "timeout"),
        *("max_retries", "base_delay", "max_delay", "jitter_max"),
        *("resident", "resident_memory_mb", "resident_max_vectors"),
    )
)

Table = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Any, "Connections"]]


class Connections:
    """The connections to one server from one event loop.

    Attributes:
        interactive: What callers wait for.
        background: What nobody waits for: the indexer, loads, sweeps. It never takes a caller's connection.
        server: What the server is.
        breaker: The server's circuit breaker, shared with all other connections to it from this loop.
        limits: The server's address and what its breaker is set to.
        turns: Whose turn it is at what calls lock, by what that is; only while somebody has it or waits for it.
        loop: The event loop that they belong to.
        users: Adapters that have joined.
    """

    def __init__(self, address: str, config: Config, others: Iterable[Connections]) -> None:
        self._key = _key(address, config)
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._opening = asyncio.Lock()
        self._opened = False
        self.users: int = 0
        self.turns: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()
        self.server: Server = None  # type: ignore[assignment] # set by join
        self.interactive: Lane = None  # type: ignore[assignment]
        self.background: Lane = None  # type: ignore[assignment]
        self.limits: tuple[Any, ...] = (
            address,
            config.failure_threshold,
            config.reset_timeout,
            config.half_open_max_attempts,
        )
        # What one of them has found out about the server holds for all.
        known = (each.breaker for each in others if each.limits == self.limits)
        self.breaker: CircuitBreaker = next(known, None) or CircuitBreaker(
            failure_threshold=config.failure_threshold,
            reset_timeout=config.reset_timeout,
            half_open_max_attempts=config.half_open_max_attempts,
        )

    async def open(self, address: str, config: Config, prepare: Callable[[], Awaitable[Server]]) -> None:
        """Make the pools, once; whoever comes meanwhile waits."""
        async with self._opening:
            if self._opened:
                return
            self.server = await prepare()
            self.interactive = await Lane(
                address, config, self.server, max_size=config.pool_max_size, min_size=config.pool_min_size
            ).open()
            try:
                self.background = await Lane(
                    address, config, self.server, max_size=config.background_pool_size, min_size=0, patient=True
                ).open()
            except BaseException:
                self.interactive.terminate()
                raise
            self._opened = True

    @property
    def inherited(self) -> bool:
        """Whether a forked child has them from its parent: what it sent would be in the parent's conversation."""
        return self._pid != os.getpid()

    def check(self) -> None:
        """Refuse to be used outside of the event loop and the process that opened it.

        Raises:
            WrongLoopError: A socket cannot be shared between loops, nor with a forked child.
        """
        if self.inherited:
            raise WrongLoopError("the adapter was opened before a fork: open one in this process")
        if asyncio.get_running_loop() is not self.loop:
            raise WrongLoopError("the adapter was opened in another event loop: open one in this loop")

    def snapshot(self) -> dict[str, Any]:
        """Give the state of the breaker and of both lanes."""
        breaker = self.breaker
        return {
            "breaker": {
                "state": breaker.state,
                "failures": breaker.failures,
                "opened": breaker.opened,
                "retry_after": breaker.retry_after,
            },
            **{
                name: {
                    "size": lane.size,
                    "in_use": lane.in_use,
                    "waiting": lane.waiting,
                    "max_size": lane.max_size,
                }
                for name, lane in (("pool", self.interactive), ("background", self.background))
            },
        }

    async def leave(self) -> None:
        """Close the connections when nobody else uses them."""
        self.users -= 1
        if self.users:
            return
        forget(self.loop, self._key, self)
        if self._opened:
            try:
                await self.interactive.close()
                await self.background.close()
            except BaseException:
                self._cut()
                raise

    def abandon(self) -> None:
        """Leave at once, cutting the connections when nobody else uses them."""
        self.users -= 1
        if self.users:
            return
        forget(self.loop, self._key, self)
        if self._opened:
            self._cut()

    def _cut(self) -> None:
        self.interactive.terminate()
        self.background.terminate()


def _key(address: str, config: Config) -> tuple[Any, ...]:
    return (address, *(getattr(config, field.name) for field in fields(config) if field.name not in _APART))


def _table() -> Table:
    holder = sys.modules.get("_elizasql_connections_1")
    if holder is None:
        holder = sys.modules["_elizasql_connections_1"] = ModuleType("_elizasql_connections_1")
        holder.table = weakref.WeakKeyDictionary()  # type: ignore[attr-defined]
    table: Table = holder.table
    return table


def _forget_closed_loops() -> None:
    """Take out what nobody can use or close any more; the garbage collector closes the sockets."""
    table = _table()
    for reference in table.keyrefs():
        loop = reference()
        if loop is not None and loop.is_closed():
            table.pop(loop, None)


def forget(loop: asyncio.AbstractEventLoop, key: Any, connections: Connections) -> None:
    """Take connections out of the table, so that whoever opens next makes new ones."""
    entries = _table().get(loop, {})
    if entries.get(key) is connections:
        del entries[key]


async def join(address: str, config: Config, prepare: Callable[[], Awaitable[Server]]) -> Connections:
    """Give the connections for an address, made when nobody has any; `leave` when done.

    Args:
        address: Connection string.
        config: Sizes, limits and settings of the session.
        prepare: Checks the server and brings its schema up to date before the first connection is made; gives what
            it is.
    """
    _forget_closed_loops()
    entries = _table().setdefault(asyncio.get_running_loop(), {})
    key = _key(address, config)
    connections = entries.get(key)
    if connections is None:
        connections = entries[key] = Connections(address, config, entries.values())
    connections.users += 1
    try:
        await connections.open(address, config, prepare)
    except BaseException:
        connections.abandon()
        raise
    return connections


def retry_policy(config: Config) -> RetryPolicy:
    """Read the waits between tries from the settings."""
    return RetryPolicy(config.max_retries, config.base_delay, config.max_delay, config.jitter_max)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _table().clear())
