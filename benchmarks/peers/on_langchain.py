"""langchain-postgres' PGVectorStore: metadata in columns and its HNSW index, as its documentation advises."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import asyncpg
from langchain_postgres import Column, PGEngine, PGVectorStore  # type: ignore[import-not-found]
from langchain_postgres.v2.indexes import HNSWIndex, HNSWQueryOptions  # type: ignore[import-not-found]
from sqlalchemy.ext.asyncio import create_async_engine  # type: ignore[import-not-found]

from .base import COUNT, POOL, Peer, copy_binary, row_id

_TABLE = "memories"


class OnLangChain(Peer):
    """The store on an engine of the running loop, which spares it the hop to a thread with a loop of its own."""

    loads_itself = False

    async def open(self) -> None:
        engine = create_async_engine(self.place.url("postgresql+asyncpg"), pool_size=POOL, max_overflow=0)
        self.engine = PGEngine.from_engine(engine)
        found = await self._exists(engine)
        if not found:
            await self.engine.ainit_vectorstore_table(
                _TABLE, self.rows.width, metadata_columns=[Column("agent_id", "UUID")]
            )
        options = HNSWQueryOptions(ef_search=self.knob.ef_search) if self.knob.ef_search else None
        self.store = await PGVectorStore.create(
            self.engine, _Embeddings(), _TABLE, metadata_columns=["agent_id"], index_query_options=options
        )

    async def _exists(self, engine: Any) -> bool:
        async with engine.connect() as connection:
            answer = await connection.exec_driver_sql(f"SELECT to_regclass('public.{_TABLE}') IS NOT NULL")
            return bool(answer.scalar())

    async def close(self) -> None:
        await self.engine.close()

    async def load(self, rows: range) -> None:
        records = (
            [row_id(row).bytes, self.rows.content(row).encode(), self.binary(row), self.rows.agent(row).bytes, b"{}"]
            for row in rows
        )
        columns = ["langchain_id", "content", "embedding", "agent_id", "langchain_metadata"]
        connection = await asyncpg.connect(self.place.url())
        try:
            await connection.copy_to_table(_TABLE, source=_each(copy_binary(records)), columns=columns, format="binary")
        finally:
            await connection.close()

    async def index(self) -> None:
        await self.store.aapply_vector_index(HNSWIndex())

    async def search(self, question: Any, agent: int) -> list[Any]:
        return await self.store.asimilarity_search_with_score_by_vector(  # type: ignore[no-any-return]
            question, k=COUNT, filter={"agent_id": str(self.rows.agent_ids[agent])}
        )

    def found(self, answer: list[Any]) -> list[object]:
        return [document.id for document, _ in answer]

    def prepare(self, row: int) -> Any:
        return self._columns(range(row, row + 1))

    def prepare_many(self, rows: range) -> Any:
        return [self._columns(rows[start : start + 1000]) for start in range(0, len(rows), 1000)]

    def _columns(self, rows: range) -> dict[str, Any]:
        return {
            "texts": [self.rows.content(row) for row in rows],
            "embeddings": [self.vector(self.rows.vectors[row]) for row in rows],
            "metadatas": [{"agent_id": str(self.rows.agent(row))} for row in rows],
            "ids": [str(row_id(row)) for row in rows],
        }

    async def insert_one(self, prepared: Any) -> None:
        await self.store.aadd_embeddings(**prepared)

    async def insert_many(self, prepared: list[dict[str, Any]]) -> None:
        for columns in prepared:
            await self.store.aadd_embeddings(**columns)


async def _each(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


class _Embeddings:
    """Is asked for nothing: the vectors are given."""

    def embed_query(self, text: str) -> list[float]:
        raise NotImplementedError

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raise NotImplementedError
