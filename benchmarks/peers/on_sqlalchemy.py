"""SQLAlchemy 2 with pgvector's types over asyncpg: ORM classes, a session for each call, as both document it."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from pgvector.sqlalchemy import VECTOR  # type: ignore[import-not-found]
from sqlalchemy import Index, insert, select  # type: ignore[import-not-found]
from sqlalchemy.dialects.postgresql import JSONB  # type: ignore[import-not-found]
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine  # type: ignore[import-not-found]
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column  # type: ignore[import-not-found]

from .base import COUNT, POOL, Peer, row_id


class _Base(DeclarativeBase):  # type: ignore[misc]
    pass


class OnSQLAlchemy(Peer):
    """One table with a b-tree on the agent and HNSW."""

    async def open(self) -> None:
        if not hasattr(self, "table"):
            self.table = _model(self.rows.width)
        self.engine = create_async_engine(self.place.url("postgresql+asyncpg"), pool_size=POOL, max_overflow=0)
        self.session = async_sessionmaker(self.engine, expire_on_commit=False)
        async with self.engine.begin() as connection:
            await connection.run_sync(_Base.metadata.create_all)

    async def close(self) -> None:
        await self.engine.dispose()

    async def index(self) -> None:
        hnsw = Index(
            "memories_hnsw",
            self.table.embedding,
            postgresql_using="hnsw",
            postgresql_ops={"embedding": "vector_cosine_ops"},
        )
        async with self.engine.begin() as connection:
            await connection.run_sync(hnsw.create)

    async def search(self, question: Any, agent: int) -> list[Any]:
        distance = self.table.embedding.cosine_distance(question)
        statement = (
            select(self.table.id, self.table.content, distance.label("distance"))
            .where(self.table.agent_id == self.rows.agent_ids[agent])
            .order_by(distance)
            .limit(COUNT)
        )
        async with self.session() as session:
            return (await session.execute(statement)).all()  # type: ignore[no-any-return]

    def found(self, answer: list[Any]) -> list[object]:
        return [row.id for row in answer]

    def prepare(self, row: int) -> Any:
        return {
            "id": row_id(row),
            "agent_id": self.rows.agent(row),
            "content": {"text": self.rows.content(row)},
            "embedding": self.vector(self.rows.vectors[row]),
        }

    async def insert_one(self, prepared: Any) -> None:
        async with self.session() as session:
            session.add(self.table(**prepared))
            await session.commit()

    async def insert_many(self, prepared: list[Any]) -> None:
        async with self.session() as session:
            for start in range(0, len(prepared), 1000):
                await session.execute(insert(self.table), prepared[start : start + 1000])
            await session.commit()


def _model(width: int) -> Any:
    class Memory(_Base):
        __tablename__ = "memories"
        __annotations__ = {
            "id": Mapped[UUID],
            "agent_id": Mapped[UUID],
            "content": Mapped[dict[str, Any]],
            "embedding": Mapped[Any],
        }
        id = mapped_column(primary_key=True)
        agent_id = mapped_column(index=True)
        content = mapped_column(JSONB)
        embedding = mapped_column(VECTOR(width))

    return Memory
