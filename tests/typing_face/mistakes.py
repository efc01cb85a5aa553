"""A user's program with mistakes: each line that is marked must be reported, and no other."""

from __future__ import annotations

from uuid import UUID, uuid4

import numpy as np

import elizasql
import elizasql.sync
from elizasql import DatabaseAdapter, Memory, Room


async def mistakes(db: DatabaseAdapter) -> None:
    await db.create_memory("just text")  # mistake: neither a model nor a mapping
    await db.search_memories(np.ones(384), table_name="facts")  # mistake: the embedding goes by its name
    await db.search_memories(embedding="nuts", table_name="facts")  # mistake: a text is no embedding
    await db.search_memories(embedding=np.ones(384))  # mistake: of which type?
    await db.create_memories(Memory(content={}))  # mistake: one where several are expected
    text: str = await db.create_memory(Memory(content={}), "facts")  # mistake: an id is no text
    memory = await db.get_memory_by_id(uuid4())
    print(memory.content)  # mistake: there may be none
    Memory(contents={})  # mistake: no such field
    Room(id=3)  # mistake: a number is no id
    await db.set_participant_user_state(uuid4(), uuid4(), "LOUD")  # mistake: no such state
    await db.update_goal_status(uuid4(), "LATE")  # mistake: no such status
    await db.remember("x")  # mistake: no such method
    count: UUID = await db.count_memories(table_name="facts")  # mistake: a number is no id
    await db.get_memories(table_name="facts", timeout="5 s")  # mistake: seconds are a number
    with elizasql.connect(agent_id=uuid4()):  # mistake: asynchronous
        pass
    await elizasql.open(agent_id=uuid4(), data_dir=5432)  # mistake: a number is no folder
    await elizasql.open(agent_id=uuid4(), pool_size=5)  # mistake: no such setting
    await elizasql.open(agent_id=uuid4(), timeout="5 s")  # mistake: seconds are a number
    await elizasql.open(agent_id=uuid4(), resident="always")  # mistake: no such choice
    print(text, count)


def blocking() -> None:
    elizasql.sync.open(agent_id=uuid4(), data_dir=b"memory")  # mistake: bytes are no folder
    elizasql.sync.open(agent_id=uuid4(), index="manual")  # mistake: no such setting
    with elizasql.sync.connect(agent_id=uuid4()) as db:
        hits = db.search_memories(embedding=np.ones(384), table_name="facts")
        print(hits.similarity)  # mistake: a list
        db.create_memory(3)  # mistake: neither a model nor a mapping
        db.remember("x")  # mistake: no such method
        print(db.get_room(uuid4()).name)  # mistake: there may be none
