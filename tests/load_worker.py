"""Loads memories until somebody kills it, and says on stdout how many are kept."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Iterator
from uuid import UUID

import numpy as np

import elizasql
from elizasql import Memory, _loader
from elizasql._indexer import Indexer
from elizasql._statements import SQL


def memories() -> Iterator[Memory]:
    generator = np.random.default_rng(3)
    for number in itertools.count():
        yield Memory(content={"n": number}, unique=True, embedding=generator.normal(size=384).astype(np.float32))


async def main(dsn: str, agent: UUID, size: int) -> None:
    async with elizasql.connect(agent_id=agent, dsn=dsn, indexing="manual") as db:
        await db.load_memories(
            memories(), "messages", batch_size=size, progress=lambda done, total: print(done, total, flush=True)
        )


async def drop(self: Indexer, coming: int | None = None) -> bool:
    """Drop the index, however small the load and however large what other tests have left in it."""
    dropped: bool = await self._executor.fetch_value(SQL["drop_index"], agent_id=self._agent_id, coming=None)
    return dropped


if __name__ == "__main__":
    _loader._LARGE = 1
    Indexer.drop = drop  # type: ignore[method-assign]
    asyncio.run(main(sys.argv[1], UUID(sys.argv[2]), int(sys.argv[3])))
