"""vecs: a collection with its HNSW index for cosine distance; the agent in the metadata."""

from __future__ import annotations

import io
from typing import Any

import vecs  # type: ignore[import-not-found]

from .base import COUNT, LOADED, Peer, copy_binary, jsonb, row_id


class OnVecs(Peer):
    """Blocking; the ids alone are what a query gives by default, metadata were asked for here."""

    asynchronous = False
    loads_itself = False

    def open(self) -> None:
        self.client = vecs.create_client(self.place.url("postgresql+psycopg2"))
        self.collection = self.client.get_or_create_collection(name="memories", dimension=self.rows.width)

    def close(self) -> None:
        self.client.disconnect()

    def load(self, rows: range) -> None:
        command = "COPY vecs.memories (id, vec, metadata) FROM STDIN WITH (FORMAT BINARY)"
        with self.client.engine.connect() as connection:
            cursor = connection.connection.cursor()
            for start in range(0, len(rows), LOADED):
                records = (
                    [str(row_id(row)).encode(), self.binary(row), jsonb(self._metadata(row))]
                    for row in rows[start : start + LOADED]
                )
                cursor.copy_expert(command, io.BytesIO(b"".join(copy_binary(records))))
            connection.connection.commit()

    def _metadata(self, row: int) -> dict[str, str]:
        return {"agent_id": str(self.rows.agent(row)), "text": self.rows.content(row)}

    def index(self) -> None:
        self.collection.create_index(
            method=vecs.IndexMethod.hnsw,
            measure=vecs.IndexMeasure.cosine_distance,
            index_arguments=vecs.IndexArgsHNSW(),
        )

    def search(self, question: Any, agent: int) -> Any:
        return self.collection.query(
            data=question,
            limit=COUNT,
            filters={"agent_id": {"$eq": str(self.rows.agent_ids[agent])}},
            measure="cosine_distance",
            include_value=True,
            include_metadata=True,
            **({"ef_search": self.knob.ef_search} if self.knob.ef_search else {}),
        )

    def found(self, answer: Any) -> list[object]:
        return [hit[0] for hit in answer]

    def prepare(self, row: int) -> Any:
        return (str(row_id(row)), self.vector(self.rows.vectors[row]), self._metadata(row))

    def insert_one(self, prepared: Any) -> None:
        self.collection.upsert(records=[prepared])

    def insert_many(self, prepared: list[Any]) -> None:
        self.collection.upsert(records=prepared)
