"""Races without sleeping: hold a row, and wait until the server says that someone waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from uuid import UUID

import asyncpg

T = TypeVar("T")
# A statement and its arguments.
Change = tuple[Any, ...]


@asynccontextmanager
async def locked(raw: asyncpg.Connection[Any], memory_id: UUID) -> AsyncIterator[None]:
    """Hold a memory's row, so that whoever changes it has to wait."""
    async with raw.transaction():
        question = "SELECT id FROM elizasql.memories WHERE id = $1 FOR UPDATE"
        assert await raw.fetchval(question, memory_id) == memory_id
        yield


async def overtaken(raw: asyncpg.Connection[Any], call: Coroutine[Any, Any, T], first: Change, then: Change) -> T:
    """Let `raw` do `first`, the call wait for it, and `raw` do `then` before it commits; give what the call gives."""
    async with raw.transaction():
        await raw.execute(*first)
        waiting = asyncio.ensure_future(call)
        await blocked_pid(raw, waiting)
        await raw.execute(*then)
    return await waiting


async def blocked_pid(raw: asyncpg.Connection[Any], waiting: asyncio.Task[Any]) -> int:
    """Wait until a session waits for `raw`, and give its pid; `waiting` is the task that makes it wait."""
    # Not pg_stat_activity: it stands still for the time of a transaction.
    question = "SELECT pid FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
    while (pid := await raw.fetchval(question)) is None:
        if waiting.done():
            raise AssertionError(f"it did not wait: {waiting}")
    return int(pid)
