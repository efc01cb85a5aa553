"""A process that writes, for test_resident: `python -m tests.resident_worker` with its orders, pickled, on stdin.

It says what it is about to do before it does it, and that it is done after the commit, one line each:

    try create ID ROOM | done create ID ROOM        the vector is `vector_of(ID)`
    try move ID ROOM   | done move ID ROOM
    try edit ID NUMBER | done edit ID NUMBER        the content is {"edit": NUMBER}, {} before the first
    try delete ID      | done delete ID

So whoever has read all lines knows what must be found, what must not, and what may or may not.
"""

from __future__ import annotations

import asyncio
import pickle
import random
import sys
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

import elizasql
from elizasql import Memory, _codecs

TABLE = "messages"


def vector_of(id: UUID) -> NDArray[np.float32]:
    """Give the vector that belongs to an id: nobody else's is near it."""
    return np.random.default_rng(id.int).normal(size=384).astype(np.float32)


def say(*words: Any) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


async def write(dsn: str, agent_id: UUID, rooms: list[UUID], seed: int, steps: int) -> None:
    chance = random.Random(seed)
    where: dict[UUID, UUID] = {}
    async with elizasql.connect(dsn=dsn, agent_id=agent_id, indexing="background", resident="off") as db:
        for step in range(steps):
            action = chance.choices(("create", "batch", "move", "edit", "delete", "transaction"), (5, 1, 3, 2, 2, 1))[0]
            if action in ("move", "edit", "delete") and where:
                id = chance.choice(list(where))
                if action == "delete":
                    say("try delete", id)
                    await db.delete_memory(id)
                    say("done delete", id)
                    del where[id]
                elif action == "edit":
                    say("try edit", id, step)
                    await db.update_memory({"id": id, "content": {"edit": step}})
                    say("done edit", id, step)
                else:
                    where[id] = chance.choice(rooms)
                    say("try move", id, where[id])
                    await db.update_memory({"id": id, "room_id": where[id]})
                    say("done move", id, where[id])
                continue
            new = [
                Memory(
                    id=(id := _codecs.new_id()),
                    room_id=chance.choice(rooms),
                    content={},
                    unique=True,
                    embedding=vector_of(id),
                )
                for _ in range({"batch": chance.randrange(2, 100), "transaction": 3}.get(action, 1))
            ]
            for memory in new:
                say("try create", memory.id, memory.room_id)
            if action == "transaction":
                async with db.transaction() as tx:
                    for memory in new:
                        await tx.create_memory(memory, TABLE)
            elif action == "batch":
                await db.create_memories(new, TABLE)
            else:
                await db.create_memory(new[0], TABLE)
            for memory in new:
                say("done create", memory.id, memory.room_id)
                where[memory.id] = memory.room_id  # type: ignore[index,assignment]


if __name__ == "__main__":
    asyncio.run(write(*pickle.load(sys.stdin.buffer)))
