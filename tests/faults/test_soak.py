"""One process that calls on and on, and connects anew now and then: what it needs does not grow with that."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

import elizasql
from elizasql import DatabaseAdapter, ElizaSQLError
from elizasql._statements import SQL
from tests.faults.conftest import MakeAdapter
from tests.faults.harness import pool_is_whole
from tests.faults.server import FaultServer
from tests.shared import share, shared_calls
from tests.test_isolation import METHODS, filled

ROUNDS, WARM = 50, 15
# They take the agent to another width, build an index anew, or delete the agents of other tests.
LEFT_OUT = {"abandon_reembedding", "cleanup_agents", "index_memories", "reembed"}


def megabytes() -> float:
    """Give what the process occupies."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def call_everything(db: DatabaseAdapter) -> int:
    """Call every method with what reaches rows, several at once; what one has taken away, another misses.

    Returns:
        How many calls it was.
    """
    await db.ensure_agent_exists({"name": "soak"})
    await db.ensure_embedding_dimension(384)
    own, shared = await filled(db), await share(db)
    calls = {name: own.arguments(name) for name in METHODS} | shared_calls(shared)
    names = [name for name in calls if name not in LEFT_OUT]

    async def call(name: str) -> None:
        with suppress(ElizaSQLError):
            await getattr(db, name)(**calls[name])

    for start in range(0, len(names), 10):
        await asyncio.gather(*map(call, names[start : start + 10]))
    await db.delete_agents([db.agent_id, shared["other"]])
    return len(names)


async def prepared(db: DatabaseAdapter) -> list[list[str]]:
    """Give the texts that each connection of an adapter has prepared."""
    await db._executor.lane.let_go()
    pool = db._executor.lane.pool
    held = [await pool.acquire() for _ in range(pool.get_max_size())]
    texts = [[row[0] for row in await each.fetch("SELECT statement FROM pg_prepared_statements")] for each in held]
    for each in held:
        await pool.release(each)
    return texts


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_what_a_process_needs_does_not_grow(make_db: MakeAdapter, server: FaultServer, seed: int) -> None:
    """One adapter stays open, and has a session ended now and then; beside it others are opened and closed."""
    chance = random.Random(seed)
    # Vectors of agents that are gone stay for other adapters, as far as there is room.
    settings: dict[str, Any] = {"resident": "required", "resident_memory_mb": 2}
    settings |= {"indexing": "background", "index_interval": 1.5, "pool_max_size": 2}
    db = await make_db(**settings)
    calls, seen = 0, []
    for number in range(ROUNDS):
        calls += await call_everything(db)
        async with elizasql.connect(agent_id=uuid4(), dsn=server.dsn, **settings) as other:
            calls += await call_everything(other)
        del other
        if number in (5, 20):
            assert await server.terminate_backend(chance, db.config.application_name)
        gc.collect()
        seen.append((megabytes(), len([*Path("/proc/self/fd").iterdir()]), len(asyncio.all_tasks())))
    memory, descriptors, tasks = ([each[i] for each in seen[WARM:]] for i in range(3))
    texts = await prepared(db)
    print(f"{calls} calls; {memory[-1] - memory[0]:.1f} MB more; descriptors {sorted(set(descriptors))}", end="; ")
    print(f"tasks {sorted(set(tasks))}; {[len(each) for each in texts]} statements prepared")
    # Half a kilobyte for a call; what is not given back to the system counts, too.
    assert memory[-1] - memory[0] < 8
    assert max(descriptors) <= descriptors[0] + 3
    assert max(tasks) <= tasks[0] + 3
    # A text once; of a statement two at most, the one that names the agent's partitions and the one of transactions.
    for each in texts:
        assert len(each) == len(set(each)) < 2 * len(SQL)
    await pool_is_whole(db)
