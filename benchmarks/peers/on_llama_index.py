"""llama-index' PGVectorStore with HNSW and an index on the metadata key, as its documentation advises."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import asyncpg
from llama_index.core.schema import TextNode  # type: ignore[import-not-found]
from llama_index.core.vector_stores import (  # type: ignore[import-not-found]
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
)
from llama_index.core.vector_stores.utils import node_to_metadata_dict  # type: ignore[import-not-found]
from llama_index.vector_stores.postgres import PGVectorStore  # type: ignore[import-not-found]

from .base import COUNT, POOL, Peer, copy_binary, jsonb, row_id


async def _each(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


class OnLlamaIndex(Peer):
    """The store's asynchronous methods."""

    loads_itself = False

    async def open(self) -> None:
        self.store = PGVectorStore.from_params(
            connection_string=self.place.url("postgresql+psycopg2"),
            async_connection_string=self.place.url("postgresql+asyncpg"),
            table_name="memories",
            embed_dim=self.rows.width,
            use_jsonb=True,
            hnsw_kwargs={
                "hnsw_m": 16,
                "hnsw_ef_construction": 64,
                "hnsw_ef_search": self.knob.ef_search or 40,
                "hnsw_dist_method": "vector_cosine_ops",
            },
            indexed_metadata_keys={("agent_id", "text")},
            create_engine_kwargs={"pool_size": POOL, "max_overflow": 0},
        )

    async def close(self) -> None:
        if self.store.client is not None:
            await self.store.close()

    async def load(self, rows: range) -> None:
        # The first row goes through the store, which makes its table then.
        await self.insert_one(self.prepare(rows.start))
        records = (
            [str(row_id(row)).encode(), self.rows.content(row).encode(), self.binary(row), self._metadata(row)]
            for row in rows[1:]
        )
        connection = await asyncpg.connect(self.place.url())
        try:
            columns = ["node_id", "text", "embedding", "metadata_"]
            await connection.copy_to_table(
                "data_memories", source=_each(copy_binary(records)), columns=columns, format="binary"
            )
        finally:
            await connection.close()

    def _metadata(self, row: int) -> bytes:
        node = TextNode(id_=str(row_id(row)), metadata={"agent_id": str(self.rows.agent(row))})
        return jsonb(node_to_metadata_dict(node, remove_text=True))

    async def search(self, question: Any, agent: int) -> Any:
        filters = MetadataFilters(filters=[MetadataFilter(key="agent_id", value=str(self.rows.agent_ids[agent]))])
        return await self.store.aquery(
            VectorStoreQuery(query_embedding=question, similarity_top_k=COUNT, filters=filters)
        )

    def found(self, answer: Any) -> list[object]:
        return list(answer.ids)

    def prepare(self, row: int) -> Any:
        return TextNode(
            id_=str(row_id(row)),
            text=self.rows.content(row),
            metadata={"agent_id": str(self.rows.agent(row))},
            embedding=self.vector(self.rows.vectors[row]),
        )

    async def insert_one(self, prepared: Any) -> None:
        await self.store.async_add([prepared])

    async def insert_many(self, prepared: list[Any]) -> None:
        for start in range(0, len(prepared), 1000):
            await self.store.async_add(prepared[start : start + 1000])
