"""agno's PgVector: the agent as `user_id`, its documented scope, which has a b-tree; HNSW made by hand.

Its own `optimize()`, the only thing of it that makes an HNSW index, fails in this version: it is tried first, and then
what it would have made is made by hand. Its `async_search` is the blocking one in a thread; that one is measured.
"""

from __future__ import annotations

import sys
from typing import Any

from agno.knowledge.document import Document  # type: ignore[import-not-found]
from agno.knowledge.embedder.base import Embedder  # type: ignore[import-not-found]
from agno.vectordb.pgvector import HNSW, PgVector  # type: ignore[import-not-found]
from sqlalchemy import create_engine, text  # type: ignore[import-not-found]

from .base import COUNT, POOL, Peer, copy_binary, jsonb, row_id


class _Embedder(Embedder):  # type: ignore[misc]
    """Looks vectors up, so that embedding costs next to nothing."""

    def __init__(self, width: int) -> None:
        super().__init__(dimensions=width)
        self.known: dict[str, list[float]] = {}

    def get_embedding(self, text: str) -> list[float]:
        return self.known[text]

    def get_embedding_and_usage(self, text: str) -> tuple[list[float], None]:
        return self.known[text], None


class OnAgno(Peer):
    """Blocking. Searches with ef_search 5 unless told otherwise."""

    asynchronous = False
    loads_itself = False

    def open(self) -> None:
        self.embedder = _Embedder(self.rows.width)
        self.engine = create_engine(self.place.url("postgresql+psycopg"), pool_size=POOL, max_overflow=0)
        self.store = PgVector(
            table_name="memories",
            schema="public",
            db_engine=self.engine,
            embedder=self.embedder,
            vector_index=HNSW(ef_search=self.knob.ef_search) if self.knob.ef_search else HNSW(),
        )
        self.store.create()

    def close(self) -> None:
        self.engine.dispose()

    def load(self, rows: range) -> None:
        records = (
            [
                *(str(row_id(row)).encode(), jsonb({"row": row}), self.rows.content(row).encode(), self.binary(row)),
                *(b"benchmark", str(self.rows.agent(row)).encode()),
            ]
            for row in rows
        )
        columns = "id, meta_data, content, embedding, content_hash, user_id"
        with self.engine.connect() as connection:
            cursor = connection.connection.cursor()
            with cursor.copy(f"COPY memories ({columns}) FROM STDIN WITH (FORMAT BINARY)") as copy:
                for part in copy_binary(records):
                    copy.write(part)
            connection.connection.commit()

    def index(self) -> None:
        try:
            self.store.optimize()
        except Exception as error:  # noqa: BLE001 - what it would have made is made below
            print(f"optimize() fails: {error}", file=sys.stderr)
        with self.engine.begin() as connection:
            made = text("SELECT count(*) FROM pg_indexes WHERE tablename = 'memories' AND indexdef LIKE '%USING hnsw%'")
            if not connection.execute(made).scalar():
                connection.execute(
                    text(
                        "CREATE INDEX memories_hnsw ON memories USING hnsw (embedding vector_cosine_ops) "
                        "WITH (m = 16, ef_construction = 200)"
                    )
                )

    def question(self, query: int) -> str:
        asked = f"query {query}"
        self.embedder.known[asked] = self.vector(self.rows.queries[query])
        return asked

    def search(self, question: str, agent: int) -> Any:
        return self.store.search(question, limit=COUNT, user_id=str(self.rows.agent_ids[agent]))

    def found(self, answer: Any) -> list[object]:
        return [f"{document.meta_data['row']:012x}" for document in answer]

    def prepare(self, row: int) -> Any:
        return [
            Document(
                content=self.rows.content(row),
                meta_data={"row": row},
                embedding=self.vector(self.rows.vectors[row]),
                embedder=self.embedder,
            )
        ], str(self.rows.agent(row))

    def insert_one(self, prepared: Any) -> None:
        documents, agent = prepared
        self._keep(documents)
        self.store.insert("benchmark", documents, user_id=agent)

    def _keep(self, documents: list[Any]) -> None:
        # The store embeds anew what comes with its embedding.
        for document in documents:
            self.embedder.known[document.content] = document.embedding

    def insert_many(self, prepared: list[Any]) -> None:
        by_agent: dict[str, list[Any]] = {}
        for documents, agent in prepared:
            by_agent.setdefault(agent, []).extend(documents)
        self.embedder.known.clear()
        for agent, documents in by_agent.items():
            self._keep(documents)
            self.store.insert("benchmark", documents, user_id=agent, batch_size=1000)
