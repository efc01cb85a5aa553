"""elizasql, through its public methods: an adapter for each agent, all on one pool."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import asyncpg
import numpy as np

import elizasql
from elizasql import DatabaseAdapter, Memory

from .base import POOL, Peer, row_id

_TABLE = "messages"
_TAIL = "SELECT count(*) FROM elizasql.embeddings WHERE agent_id = $1 AND NOT indexed"


class OnElizaSQL(Peer):
    """Indexes by hand, so that the indexer does not work while others are measured.

    With the option "required" searches go to the resident tier, loaded at the first one. With "check" a new memory is
    compared with those that are there, as the original does by default.
    """

    async def open(self) -> None:
        resident = self.option if self.option == "required" else "off"
        knob = {"ef_search": self.knob.ef_search} if self.knob.ef_search else {}
        self.adapters: list[DatabaseAdapter] = []
        self.unique = None if self.option == "check" else True
        for number, agent in enumerate(self.rows.agent_ids):
            db = await elizasql.open(
                agent_id=agent,
                dsn=self.place.url(),
                indexing="manual",
                pool_max_size=POOL,
                timeout=3600.0,
                slow_call=3600.0,
                resident=resident,
                **knob,
            )
            self.adapters.append(db)
            await db.ensure_agent_exists({"name": f"Agent {number}"})
            await db.ensure_embedding_dimension(self.rows.width)
            await db.create_rooms([{"id": _room(agent, n), "source": "benchmark", "type": "GROUP"} for n in (0, 1)])
            await db.create_entities([{"id": _entity(agent), "names": ["Somebody"]}])

    async def close(self) -> None:
        for db in self.adapters:
            await db.close()

    async def load(self, rows: range) -> None:
        """Load one agent after the other, each with its index; what few have is left to `index`, which builds it once.

        A load of less than 10,000 would move its vectors row by row, which takes longer.
        """
        for number, db in enumerate(self.adapters):
            mine = np.flatnonzero(self.rows.agents[rows.start : rows.stop] == number)
            memories = (self.prepare(rows[place])[1] for place in mine)
            await db.load_memories(memories, _TABLE, build_index=len(mine) >= 10_000)

    async def index(self) -> None:
        connection = await asyncpg.connect(self.place.url())
        try:
            for db in self.adapters:
                # An agent of the same partition may have brought this one's tail into the index already.
                tail = await connection.fetchval(_TAIL, db.agent_id)
                if tail:
                    await db.index_memories(rebuild=tail > await db.count_memories(table_name=_TABLE) / 5)
        finally:
            await connection.close()

    async def catch_up(self) -> int:
        """Move it row by row, as the background indexer does."""
        return sum([await db.index_memories() for db in self.adapters])

    def vector(self, vector: Any) -> Any:
        return vector

    async def search(self, question: Any, agent: int) -> list[Memory]:
        return await self.adapters[agent].search_memories(embedding=question, table_name=_TABLE)

    async def search_room(self, question: Any, agent: int) -> list[Memory]:
        room = _room(self.rows.agent_ids[agent], 1)
        return await self.adapters[agent].search_memories(embedding=question, table_name=_TABLE, room_id=room)

    def found(self, answer: list[Memory]) -> list[object]:
        return [memory.id for memory in answer]

    def prepare(self, row: int) -> Any:
        agent = self.rows.agent(row)
        memory = Memory(
            id=row_id(row),
            entity_id=_entity(agent),
            room_id=_room(agent, int(self.rows.rooms[row])),
            content={"text": self.rows.content(row)},
            unique=self.unique,
            embedding=self.rows.vectors[row],
        )
        return self.adapters[self.rows.agents[row]], memory

    async def insert_one(self, prepared: Any) -> None:
        db, memory = prepared
        await db.create_memory(memory, _TABLE)

    def prepare_many(self, rows: range) -> Any:
        by_agent: dict[DatabaseAdapter, list[Memory]] = {}
        for row in rows:
            db, memory = self.prepare(row)
            by_agent.setdefault(db, []).append(memory)
        return by_agent

    async def insert_many(self, prepared: Any) -> None:
        for db, memories in prepared.items():
            await db.create_memories(memories, _TABLE)


def _room(agent: UUID, number: int) -> UUID:
    return UUID(int=agent.int + ((1, 3)[number] << 64))


def _entity(agent: UUID) -> UUID:
    return UUID(int=agent.int + (2 << 64))
