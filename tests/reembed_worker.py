"""A process that reembeds, for test_reembedding: it says what it does and goes on when it is told to.

    python reembed_worker.py DSN AGENT_ID WIDTH

Before and after every statement it writes the statement's name on a line and waits for a line on stdin; at the end it
writes "done". What stands here is deterministic: the vector of a text is the same in every process.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from typing import Any
from uuid import UUID

import numpy as np

import elizasql
from elizasql._executor import Executor
from elizasql._statements import SQL, Statement

Vector = np.ndarray[Any, np.dtype[np.float32]]


def vector_of(text: str, width: int) -> Vector:
    """Give the vector of a text, which no other text has."""
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


def embedder(width: int) -> Any:
    return lambda texts: [vector_of(text, width) for text in texts]


OWN = {name for name, statement in SQL.items() if statement.file == "reembeddings.sql"}


async def main(dsn: str, agent_id: UUID, width: int) -> None:
    real = Executor._run

    async def observed(
        self: Executor, statement: Statement, method: str, params: dict[str, Any], keys: Any = ()
    ) -> Any:
        if statement.name not in OWN:
            return await real(self, statement, method, params, keys)
        await ask(f"before {statement.name}")
        result = await real(self, statement, method, params, keys)
        await ask(f"after {statement.name}")
        return result

    Executor._run = observed  # type: ignore[method-assign]
    settings: dict[str, Any] = {"indexing": "manual", "pool_min_size": 0, "resident": "off"}
    async with elizasql.connect(agent_id=agent_id, dsn=dsn, migrate=False, **settings) as db:
        await db.reembed(width, embedder(width), batch_size=10)
    print("done", flush=True)


async def ask(event: str) -> None:
    print(event, flush=True)
    await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], UUID(sys.argv[2]), int(sys.argv[3])))
