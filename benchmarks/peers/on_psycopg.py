"""psycopg 3 without anything above it, its asynchronous pool, as pgvector's documentation has it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pgvector.psycopg import register_vector_async  # type: ignore[import-not-found]
from psycopg.types.json import Jsonb  # type: ignore[import-not-found]
from psycopg_pool import AsyncConnectionPool  # type: ignore[import-not-found]

from .base import COUNT, POOL, Peer, row_id

_SCHEMA = """
CREATE TABLE IF NOT EXISTS memories (
    id uuid PRIMARY KEY, agent_id uuid NOT NULL, content jsonb NOT NULL, embedding vector({width}) NOT NULL
)
"""
_INSERT = "INSERT INTO memories (id, agent_id, content, embedding) VALUES (%s, %s, %s, %s)"
_COPY = "COPY memories (id, agent_id, content, embedding) FROM STDIN WITH (FORMAT BINARY)"
_SEARCH = f"""
SELECT id, content, embedding <=> %(vector)s AS distance FROM memories WHERE agent_id = %(agent)s
ORDER BY embedding <=> %(vector)s LIMIT {COUNT}
"""


class OnPsycopg(Peer):
    """One table with a b-tree on the agent and HNSW."""

    async def open(self) -> None:
        self.pool = AsyncConnectionPool(
            self.place.url(), min_size=1, max_size=POOL, open=False, kwargs={"autocommit": True}, configure=_configure
        )
        await self.pool.open(wait=True)
        async with self.pool.connection() as connection:
            await connection.execute(_SCHEMA.format(width=self.rows.width))

    async def close(self) -> None:
        await self.pool.close()

    async def insert_many(self, prepared: list[tuple[Any, ...]]) -> None:
        async with self.pool.connection() as connection, connection.cursor() as cursor, cursor.copy(_COPY) as copy:
            copy.set_types(["uuid", "uuid", "jsonb", "vector"])
            for record in prepared:
                await copy.write_row(record)

    async def index(self) -> None:
        async with self.pool.connection() as connection:
            await connection.execute("CREATE INDEX IF NOT EXISTS memories_agent ON memories (agent_id)")
            await connection.execute(
                "CREATE INDEX IF NOT EXISTS memories_hnsw ON memories USING hnsw (embedding vector_cosine_ops)"
            )

    def vector(self, vector: NDArray[np.float32]) -> Any:
        return vector

    async def search(self, question: Any, agent: int) -> list[Any]:
        parameters = {"vector": question, "agent": self.rows.agent_ids[agent]}
        async with self.pool.connection() as connection, connection.cursor(binary=True) as cursor:
            await cursor.execute(_SEARCH, parameters)
            return await cursor.fetchall()  # type: ignore[no-any-return]

    def found(self, answer: list[Any]) -> list[object]:
        return [row[0] for row in answer]

    def prepare(self, row: int) -> tuple[Any, ...]:
        return (row_id(row), self.rows.agent(row), Jsonb({"text": self.rows.content(row)}), self.rows.vectors[row])

    async def insert_one(self, prepared: tuple[Any, ...]) -> None:
        async with self.pool.connection() as connection:
            await connection.execute(_INSERT, prepared)


async def _configure(connection: Any) -> None:
    await register_vector_async(connection)
