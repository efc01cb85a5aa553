"""mem0's pgvector store with hnsw: what its Memory calls, without the language model around it."""

from __future__ import annotations

import os
from typing import Any

from .base import COUNT, POOL, Peer, copy_binary, jsonb, row_id

os.environ["MEM0_TELEMETRY"] = "False"

from mem0.vector_stores.pgvector import PGVector  # type: ignore[import-not-found]


class OnMem0(Peer):
    """Blocking; the agent is a key of the payload."""

    asynchronous = False
    loads_itself = False

    def open(self) -> None:
        self.store = PGVector(
            dbname=None,
            collection_name="memories",
            embedding_model_dims=self.rows.width,
            user=None,
            password=None,
            host=None,
            port=None,
            diskann=False,
            hnsw=True,
            minconn=1,
            maxconn=POOL,
            connection_string=self.place.url(),
        )

    def close(self) -> None:
        self.store.connection_pool.close()

    def load(self, rows: range) -> None:
        # The first row goes through the store, which makes its table then.
        self.insert_many(self.prepare_many(rows[:1]))
        records = ([row_id(row).bytes, self.binary(row), jsonb(self._payload(row))] for row in rows[1:])
        command = "COPY memories (id, vector, payload) FROM STDIN WITH (FORMAT BINARY)"
        with (
            self.store.connection_pool.connection() as connection,
            connection.cursor() as cursor,
            cursor.copy(command) as copy,
        ):
            for part in copy_binary(records):
                copy.write(part)

    def _payload(self, row: int) -> dict[str, str]:
        return {"data": self.rows.content(row), "agent_id": str(self.rows.agent(row))}

    def search(self, question: Any, agent: int) -> Any:
        filters = {"agent_id": str(self.rows.agent_ids[agent])}
        return self.store.search(query="", vectors=question, top_k=COUNT, filters=filters)

    def found(self, answer: Any) -> list[object]:
        return [hit.id for hit in answer]

    def prepare(self, row: int) -> Any:
        return self._columns(range(row, row + 1))

    def prepare_many(self, rows: range) -> Any:
        return [self._columns(rows[start : start + 1000]) for start in range(0, len(rows), 1000)]

    def _columns(self, rows: range) -> dict[str, Any]:
        return {
            "vectors": [self.vector(self.rows.vectors[row]) for row in rows],
            "payloads": [self._payload(row) for row in rows],
            "ids": [str(row_id(row)) for row in rows],
        }

    def insert_one(self, prepared: Any) -> None:
        self.store.insert(**prepared)

    def insert_many(self, prepared: list[dict[str, Any]]) -> None:
        for columns in prepared:
            self.store.insert(**columns)
