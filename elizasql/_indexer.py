"""The background indexer: moves the tail of new vectors into the HNSW index, off the callers' path."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any
from uuid import UUID

from ._calls import spawn, within
from ._executor import Executor
from ._statements import SQL
from .config import Config
from .errors import ElizaSQLError

logger = logging.getLogger("elizasql")

# The indexer gives way to callers: it begins a batch when none is running, or after this many seconds at the latest,
# half as long as a batch takes: where callers never rest, it works two thirds of the time.
_PATIENCE = 0.025

# The part of the time between two looks for which it pauses after trouble, at first; each time twice as long, at most
# the whole.
_FIRST_PAUSE = 1 / 30

# Statistics are made anew when so many vectors have moved since the last time; a share of what is indexed, since the
# planner's choice hangs on orders of magnitude.
_ANALYZE_SHARE = 0.2
_ANALYZE_LEAST = 500

# What a standby says to every write.
_READ_ONLY = "25006"

# A partition without an index that grows less than this from one look to the next is not being loaded: one of 100,000
# vectors by 33 a second.
_LEFT_ALONE = 1.01

# Seconds that the index of a partition may take to build: 1,000 to 4,000 vectors a second.
BUILD_TIME = 6 * 3600.0


class Indexer:
    """An asyncio task that looks at the agent's tail when it is woken, and now and then.

    Batches are small transactions with SKIP LOCKED, so that several processes may run one for the same agent.

    Attributes:
        failures: Of the background's looks, in a row.
        error: What the last one met; None: it went well.
    """

    def __init__(self, executor: Executor, callers: Executor, agent_id: UUID, config: Config) -> None:
        self._executor = executor
        self._callers = callers
        self._agent_id = agent_id
        self._config = config
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._moved = 0
        self._analyzed_at = 0
        # A load or a rebuild of this process has left the partition without its index; and the size that the partition
        # had when it was last seen without one, whoever had dropped it.
        self._lost = False
        self._lost_size: int | None = None
        self.failures = 0
        self.error: str | None = None

    def start(self) -> None:
        """Begin the task, when indexing is "background"."""
        if self._config.indexing == "background" and self._task is None:
            self._task = spawn(self._run(), "elizasql-indexer")

    def wake(self) -> None:
        """Tell that there is something to do."""
        self._wanted.set()

    async def stop(self) -> None:
        """End the task and wait for it; a batch that is running is rolled back by the server."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})  # a cancellation of the caller is the caller's
            if not task.cancelled():
                task.result()

    async def drain(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Move everything that is in the tail now; give how many vectors moved.

        Args:
            progress: Called with the number moved so far and the number that was in the tail at the beginning.
        """
        total: int = await self._executor.fetch_value(SQL["count_unindexed_embeddings"], agent_id=self._agent_id)
        done = 0
        while done < total:
            moved = await self._move_batch(settle=True)
            if not moved:
                break
            done += moved
            if progress is not None:
                progress(done, total)
        if await self._executor.fetch_value(SQL["find_lost_index"], agent_id=self._agent_id) is not None:
            done += await self.build()
        if done:
            await self._refresh_statistics()
        return done

    async def drop(self, coming: int | None = None) -> bool:
        """Drop the index of the agent's partition; give whether there is none now. `build` makes it again.

        Args:
            coming: Vectors that will come at least: the index stays when feeding it is cheaper. None: it goes anyway.
        """
        dropped: bool = await self._executor.fetch_value(SQL["drop_index"], agent_id=self._agent_id, coming=coming)
        return dropped

    async def build(self) -> int:
        """Build the indexes that the agent's partition lacks, the tail in them; give how many vectors moved.

        Also of another width: what was dropped is missing to all agents of the partition, whatever this one has now.
        """
        moved = await self._build(waits=True)
        assert moved is not None
        return moved

    async def _build(self, *, waits: bool) -> int | None:
        """Do so; None: somebody else has the partition locked, and `waits` is False."""
        self._lost = False  # not after it: it may be lost again, once it is built
        try:
            return await self._fetch_count("build_index", settle=True, waits=waits)
        except BaseException:
            self.restore()
            raise

    async def rebuild(self) -> int:
        """Build the index of the agent's partition anew with the tail in it; give how many vectors moved."""
        try:
            await self.drop()
        except BaseException:
            self.restore()
            raise
        return await self.build()

    def restore(self) -> None:
        """Let the background see to it that the partition has its index, soon."""
        self._lost = True
        self.wake()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        pause = first_pause = self._config.index_interval * _FIRST_PAUSE
        next_look = loop.time() + self._config.index_interval
        while True:
            # Not by wait_for: before Python 3.12 it swallows a cancellation that comes together with its result.
            timer = loop.call_at(next_look, self._wanted.set)
            try:
                await self._wanted.wait()
            finally:
                timer.cancel()
            self._wanted.clear()
            # By the clock, however often it is woken: an agent that always writes needs its index, too.
            looks = loop.time() >= next_look
            if looks:
                next_look = loop.time() + self._config.index_interval
            try:
                await self._give_way()
                while moved := await self._move_batch():
                    await self._analyze_when_it_pays()
                    await self._give_way()
                locked = moved is None
                if looks or self._lost:
                    locked |= await self._restore_index()
                self.failures, self.error = 0, None
                if not locked:
                    pause = first_pause
                    continue
                again = True  # no trouble: somebody builds the index, which takes milliseconds or an hour
            except ElizaSQLError as error:
                # The next look tries again: soon where time may mend it, and not where the role may only read, or the
                # server, a standby, where the primary's indexer does the work. Callers meet the same trouble
                # themselves, as an error of their own call; but not what ends the build of an index time and again,
                # while their writes wait for it. So the pause grows; and a server that is down for an hour does not
                # fill the log, a line a second and agent.
                self.failures, self.error = self.failures + 1, f"{type(error).__name__}: {error}"
                logger.warning("indexing is interrupted, and goes on in %.3g s: %s", pause, error)
                again = error.retryable and error.sqlstate != _READ_ONLY
            except Exception as error:
                # No trouble of the server's: the task ends, and `stop` raises it, which may be long after.
                self.failures, self.error = self.failures + 1, f"{type(error).__name__}: {error}"
                logger.exception("indexing has ended")
                raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, self._config.index_interval)
            if again:
                self._wanted.set()

    async def _restore_index(self) -> bool:
        """Build the index that a load has dropped and not built: it failed, or its process was killed.

        A load that is running must not be disturbed, and may be another process's: only a partition that has hardly
        grown from one look to the next is taken for left alone.

        Returns:
            Whether it is left to the next look, since somebody else has the partition locked.
        """
        locked = False
        lost, self._lost = self._lost, False  # not after the look: it may be lost meanwhile, and the look miss that
        try:
            size = await self._executor.fetch_value(SQL["find_lost_index"], agent_id=self._agent_id)
        except BaseException:
            self._lost |= lost
            raise
        if size is not None and (lost or (self._lost_size is not None and size <= self._lost_size * _LEFT_ALONE)):
            with within(BUILD_TIME):
                locked = await self._build(waits=False) is None
            if locked:
                self._lost |= lost
            else:
                size = None
        self._lost_size = size
        return locked

    async def _give_way(self) -> None:
        """Wait until no call is running, at most for the time of patience."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _PATIENCE
        while self._callers.in_flight and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.005)  # an event would cost every call; this loop runs off the callers' path

    async def _move_batch(self, *, settle: bool = False) -> int | None:
        """Move some vectors; give how many, or None: the partition is locked, for which the background does not wait.

        The background's connections are few, an index may be built for an hour, and a partition has many agents: to
        wait there would keep the loads of all others from a connection.
        """
        size = self._config.index_batch_size
        moved = await self._fetch_count("index_embeddings", settle=settle, batch_size=size, waits=settle)
        self._moved += moved or 0
        return moved

    async def _fetch_count(self, name: str, *, settle: bool, **params: Any) -> int | None:
        """Run a statement that moves vectors and gives their number, or null.

        Args:
            name: Of the statement.
            settle: The number matters: when an answer is lost, a second run would not count what the first has moved.
                And what takes long may do so.
            **params: Of the statement, without the agent.
        """
        chunk = {"agent_id": self._agent_id, **params}
        [row] = await self._executor.fetch_chunks(SQL[name], [chunk], settle=settle, unlimited=settle)
        moved: int | None = row[0]
        return moved

    async def _analyze_when_it_pays(self) -> None:
        since = self._moved - self._analyzed_at
        if since >= max(_ANALYZE_LEAST, self._analyzed_at * _ANALYZE_SHARE):
            await self._refresh_statistics(waits=False)
            self._analyzed_at = self._moved

    async def _refresh_statistics(self, *, waits: bool = True) -> None:
        chunk = {"agent_id": self._agent_id, "waits": waits}
        await self._executor.fetch_chunks(SQL["refresh_statistics"], [chunk], unlimited=True)
