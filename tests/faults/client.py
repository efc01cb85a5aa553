"""A client in a process of its own that writes until it is killed: `python -m tests.faults.client TARGET AGENT SEED`.

TARGET is an address, or the folder of an embedded server. Before every batch it prints "+ SIZE", after it "=": what was
attempted, and what was acknowledged. The ids follow from the seed. It ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import random
import sys
from uuid import UUID

import elizasql
from tests.faults.harness import TYPE, WIDTH, memory_of, new_id

SIZES = (1, 60, 7)  # a single one, a batch of several chunks, a batch of one


async def main() -> None:
    target, agent, seed = sys.argv[1:]
    where = {"dsn": target} if "://" in target else {"data_dir": target}
    settings = {"batch_size": 25, "pool_max_size": 2, "application_name": f"client-{seed}"}
    async with elizasql.connect(agent_id=UUID(agent), **where, **settings) as db:  # type: ignore[arg-type]
        await db.ensure_agent_exists({"name": "test"})
        await db.ensure_embedding_dimension(WIDTH)
        ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
        chance, number = random.Random(int(seed)), 0
        while not ended.done():
            size = SIZES[number % len(SIZES)]
            number += 1
            memories = [memory_of(new_id(chance), 1) for _ in range(size)]
            print(f"+ {size}", flush=True)
            await db.create_memories(memories, TYPE)
            print("=", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
