"""asyncpg without anything above it: as pgvector's documentation has it, and as a careful hand would write it."""

from __future__ import annotations

import json
from struct import pack
from typing import Any

import asyncpg
import numpy as np
from numpy.typing import NDArray

from .base import COUNT, POOL, Peer, row_id

_SCHEMA = """
CREATE TABLE IF NOT EXISTS memories (
    id uuid NOT NULL, agent_id uuid NOT NULL, content jsonb NOT NULL, embedding vector({width}) NOT NULL, {key}
){partitions}
"""
_INSERT = "INSERT INTO memories (id, agent_id, content, embedding) VALUES ($1, $2, $3, $4)"
_SEARCH = f"""
SELECT id, content, embedding <=> $1 AS distance FROM memories WHERE agent_id = $2 ORDER BY embedding <=> $1
LIMIT {COUNT}
"""


class OnAsyncpg(Peer):
    """One table with a b-tree on the agent and HNSW; with the option "partitions" a partition for each agent."""

    async def open(self) -> None:
        self.pool = await asyncpg.create_pool(
            host=self.place.host,
            port=self.place.port,
            user=self.place.user,
            password=self.place.password or None,
            database=self.place.database,
            min_size=1,
            max_size=POOL,
            init=_register,
        )
        parted = self.option == "partitions"
        sql = _SCHEMA.format(
            width=self.rows.width,
            key="PRIMARY KEY (agent_id, id)" if parted else "PRIMARY KEY (id)",
            partitions=" PARTITION BY LIST (agent_id)" if parted else "",
        )
        await self.pool.execute(sql)
        if parted:
            for number, agent in enumerate(self.rows.agent_ids):
                await self.pool.execute(
                    f"CREATE TABLE IF NOT EXISTS memories_{number} PARTITION OF memories FOR VALUES IN ('{agent}')"
                )

    async def close(self) -> None:
        await self.pool.close()

    async def index(self) -> None:
        async with self.pool.acquire() as connection:
            if self.option != "partitions":
                await connection.execute("CREATE INDEX IF NOT EXISTS memories_agent ON memories (agent_id)")
            await connection.execute(
                "CREATE INDEX IF NOT EXISTS memories_hnsw ON memories USING hnsw (embedding vector_cosine_ops)"
            )

    def vector(self, vector: NDArray[np.float32]) -> Any:
        return vector

    async def search(self, question: Any, agent: int) -> list[Any]:
        return await self.pool.fetch(_SEARCH, question, self.rows.agent_ids[agent])  # type: ignore[no-any-return]

    def found(self, answer: list[Any]) -> list[object]:
        return [row["id"] for row in answer]

    def prepare(self, row: int) -> tuple[Any, ...]:
        return (row_id(row), self.rows.agent(row), {"text": self.rows.content(row)}, self.rows.vectors[row])

    async def insert_one(self, prepared: tuple[Any, ...]) -> None:
        await self.pool.execute(_INSERT, *prepared)

    async def insert_many(self, prepared: list[tuple[Any, ...]]) -> None:
        async with self.pool.acquire() as connection:
            await connection.copy_records_to_table(
                "memories", records=prepared, columns=["id", "agent_id", "content", "embedding"]
            )


_BY_HAND_SCHEMA = """
CREATE TABLE IF NOT EXISTS memories (
    id uuid NOT NULL, agent_id uuid NOT NULL, content jsonb NOT NULL, embedding vector({width}) NOT NULL,
    PRIMARY KEY (agent_id, id)
) PARTITION BY LIST (agent_id)
"""
_BY_HAND_INDEX = """
CREATE INDEX IF NOT EXISTS memories_hnsw ON memories
USING hnsw ((embedding::halfvec({width})) halfvec_cosine_ops) WITH (m = 16, ef_construction = 128)
"""
_BY_HAND_SEARCH = f"""
SELECT id, content, embedding <=> $1 AS distance
FROM (
    SELECT id, content, embedding FROM memories WHERE agent_id = $2
    ORDER BY embedding::halfvec({{width}}) <=> $1::vector::halfvec({{width}}) LIMIT {COUNT}
) AS nearest
ORDER BY distance
"""


class ByHand(OnAsyncpg):
    """What a careful hand writes for this one task and no other: the floor of what a client of this server can do.

    It knows all agents beforehand, has one filter, and nothing else: no check of what it is given, no rooms, no foreign
    keys, no retries, no time limit, and a session that nobody resets. What of elizasql makes a search fast it has, too:
    one graph an agent and half the bytes in it, the same graph parameters, plans made once, and vectors in binary form.
    """

    async def open(self) -> None:
        self._search = _BY_HAND_SEARCH.format(width=self.rows.width)
        self.pool = await asyncpg.create_pool(
            host=self.place.host,
            port=self.place.port,
            user=self.place.user,
            password=self.place.password or None,
            database=self.place.database,
            min_size=1,
            max_size=POOL,
            init=self._prepare,
            reset=_keep,
            server_settings={
                "enable_seqscan": "off",
                "hnsw.ef_search": str(self.knob.ef_search or 100),
                "jit": "off",
                "max_parallel_workers_per_gather": "0",
                "plan_cache_mode": "force_generic_plan",
            },
        )
        await self.pool.execute(_BY_HAND_SCHEMA.format(width=self.rows.width))
        for number, agent in enumerate(self.rows.agent_ids):
            await self.pool.execute(
                f"CREATE TABLE IF NOT EXISTS memories_{number} PARTITION OF memories FOR VALUES IN ('{agent}')"
            )

    async def _prepare(self, connection: Any) -> None:
        import orjson  # what elizasql decodes with

        head = pack("!HH", self.rows.width, 0)
        await connection.set_type_codec(
            "vector",
            schema="public",
            format="binary",
            encoder=lambda vector: head + vector.astype(">f4").tobytes(),
            decoder=lambda value: np.frombuffer(value, ">f4", offset=4),
        )
        await connection.set_type_codec(
            "jsonb",
            schema="pg_catalog",
            format="binary",
            encoder=lambda value: b"\x01" + orjson.dumps(value),
            decoder=lambda value: orjson.loads(value[1:]),
        )

    async def index(self) -> None:
        await self.pool.execute(_BY_HAND_INDEX.format(width=self.rows.width), timeout=3600)

    async def search(self, question: Any, agent: int) -> list[Any]:
        return await self.pool.fetch(self._search, question, self.rows.agent_ids[agent])  # type: ignore[no-any-return]


async def _keep(_: Any) -> None:
    """Reset nothing: no statement of this program leaves anything behind in the session."""


async def _register(connection: Any) -> None:
    from pgvector.asyncpg import register_vector

    await register_vector(connection)
    # Binary, which COPY needs: a version, then the text.
    await connection.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        format="binary",
        encoder=lambda value: b"\x01" + json.dumps(value).encode(),
        decoder=lambda value: json.loads(value[1:]),
    )
