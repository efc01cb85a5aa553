"""Hearing the server's notifications, on a connection of its own: a pooled one is somebody else's a moment later."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import asyncpg

from . import _pool
from ._calls import spawn
from ._statements import SQL
from .config import Config
from .errors import ClosedError, ElizaSQLError, translate

logger = logging.getLogger("elizasql")

# Seconds between two tries to connect: the first, and the longest that doubling leads to.
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 30.0

# Seconds after which a silent connection is asked whether it still lives: a network that swallows packets says nothing.
_CHECK_INTERVAL = 30.0


class Listener:
    """Waits for notifications on one channel.

    A notification only says that it is worth looking. While the connection is down none arrives; whoever waits gives a
    timeout and looks then, too. After every new connection `wait` ends at once, because something may have been missed.
    """

    def __init__(self, address: str, config: Config, channel: str, *, check_interval: float = _CHECK_INTERVAL) -> None:
        self._address = address
        self._config = config
        self._channel = channel
        self._check_interval = check_interval
        self._awake = asyncio.Event()
        self._closed = False
        self._pause = _FIRST_PAUSE
        self._pid = os.getpid()
        self._task = spawn(self._run(), "elizasql-listener")

    async def wait(self, timeout: float) -> None:
        """Wait for a notification, a new connection, or at most `timeout` seconds.

        Raises:
            ClosedError: The listener is closed, before or meanwhile.
        """
        timer = asyncio.get_running_loop().call_later(timeout, self._awake.set)
        try:
            await self._awake.wait()
        finally:
            timer.cancel()
        if self._closed:
            raise ClosedError("the adapter is closed")
        self._awake.clear()

    async def close(self) -> None:
        """Let the connection go and end every `wait`. Idempotent."""
        self._closed = True
        self._awake.set()
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            try:
                await self._listen()
            except ElizaSQLError as error:
                # Looking now and then goes on, and tells the callers what is wrong with the server.
                logger.warning("notifications are interrupted: %s", error)
            await asyncio.sleep(self._pause)
            self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    async def _listen(self) -> None:
        """Listen until the connection is lost."""
        connection = await _pool.connect(self._address, self._config)
        lost = asyncio.get_running_loop().create_future()
        connection.add_termination_listener(lambda _: lost.cancel())
        try:
            await connection.add_listener(self._channel, self._hear)
            self._pause = _FIRST_PAUSE
            self._awake.set()
            while not lost.done():
                await asyncio.wait([lost], timeout=self._check_interval)
                await connection.fetchval(SQL["ping"].sql, timeout=self._config.connection_timeout)
        except Exception as error:
            raise translate(error, "listen") from error
        finally:
            if self._pid == os.getpid():  # a forked child leaves its parent's connection alone
                await _close(connection, self._config.connection_timeout)

    def _hear(self, *_: Any) -> None:
        self._awake.set()


async def _close(connection: asyncpg.Connection[Any], timeout: float) -> None:
    try:
        await connection.close(timeout=timeout)
    except (OSError, asyncio.TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        # The other end does not take the farewell; the connection is to go in any case.
        connection.terminate()
