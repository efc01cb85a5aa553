"""langgraph's AsyncPostgresStore with its index: a namespace for each agent, its pool, its batches."""

from __future__ import annotations

from typing import Any

from langgraph.store.base import PutOp  # type: ignore[import-not-found]
from langgraph.store.postgres.aio import AsyncPostgresStore  # type: ignore[import-not-found]
from psycopg import AsyncConnection  # type: ignore[import-not-found]

from .base import COUNT, POOL, Peer, copy_binary, jsonb, row_id


class OnLangGraph(Peer):
    """The store embeds texts itself; its embedder looks the vector up, so that embedding costs next to nothing."""

    loads_itself = False

    async def open(self) -> None:
        self.known: dict[str, list[float]] = getattr(self, "known", {})
        self.context = AsyncPostgresStore.from_conn_string(
            self.place.url(),
            pool_config={"min_size": 1, "max_size": POOL},
            index={"dims": self.rows.width, "embed": self._embed, "fields": ["text"], "distance_type": "cosine"},
        )
        self.store = await self.context.__aenter__()
        await self.store.setup()

    async def close(self) -> None:
        await self.context.__aexit__(None, None, None)

    async def load(self, rows: range) -> None:
        # As aput writes it.
        keys = {row: [f"memories.{self.rows.agent(row)}".encode(), str(row_id(row)).encode()] for row in rows}
        values = ([*keys[row], jsonb({"text": self.rows.content(row)})] for row in rows)
        vectors = ([*keys[row], self.binary(row), b"text"] for row in rows)
        async with await AsyncConnection.connect(self.place.url()) as connection, connection.cursor() as cursor:
            for table, records in (
                ("store (prefix, key, value)", values),
                ("store_vectors (prefix, key, embedding, field_name)", vectors),
            ):
                async with cursor.copy(f"COPY {table} FROM STDIN WITH (FORMAT BINARY)") as copy:
                    for part in copy_binary(records):
                        await copy.write(part)

    async def _embed(self, texts: list[str]) -> list[list[float]]:
        return [self.known[text] for text in texts]

    def question(self, query: int) -> str:
        text = f"query {query}"
        self.known[text] = self.vector(self.rows.queries[query])
        return text

    async def search(self, question: str, agent: int) -> list[Any]:
        namespace = ("memories", str(self.rows.agent_ids[agent]))
        return await self.store.asearch(namespace, query=question, limit=COUNT)  # type: ignore[no-any-return]

    def found(self, answer: list[Any]) -> list[object]:
        return [item.key for item in answer]

    def prepare(self, row: int) -> Any:
        text = self.rows.content(row)
        self.known[text] = self.vector(self.rows.vectors[row])
        return PutOp(("memories", str(self.rows.agent(row))), str(row_id(row)), {"text": text})

    async def insert_one(self, prepared: Any) -> None:
        await self.store.aput(prepared.namespace, prepared.key, prepared.value)

    def prepare_many(self, rows: range) -> Any:
        self.known.clear()
        return super().prepare_many(rows)

    async def insert_many(self, prepared: list[Any]) -> None:
        for start in range(0, len(prepared), 1000):
            await self.store.abatch(prepared[start : start + 1000])
