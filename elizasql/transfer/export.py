"""Writing an archive: one consistent snapshot, streamed."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import numpy as np
import orjson

from elizasql import __version__, _codecs, _migrate
from elizasql._statements import SQL
from elizasql.config import Config

from . import _archive
from ._connection import Snapshot, snapshot
from ._rows import TABLES, Table, refuse_missing

# A part holds at most so many rows, and ends at so many bytes; what is asked for at a time is less.
_ROWS = 5000
_BYTES = 4 << 20
_FETCH = 500

Advance = Callable[[str, int, int | None], None]


def _silent(*_: object) -> None:
    pass


async def export_archive(
    address: str,
    path: str | os.PathLike[str],
    config: Config,
    *,
    agent_ids: Collection[UUID] | None = None,
    advance: Advance = _silent,
) -> dict[str, Any]:
    """Write agents, with everything that belongs to them, into a new archive.

    Args:
        address: Connection string; its schema must be up to date.
        path: A name that ends in .tar, .tar.gz or .tgz: one file; any other: a folder.
        config: Time limits.
        agent_ids: Which agents; None: all, and all that is shared.
        advance: Told how far it is: the table, rows so far, and of how many where that is known.

    Returns:
        The manifest without its parts: format, agents, rows of each table.

    Raises:
        ArgumentError: An id is none, or there is something of this name already.
        NotFoundError: There is no such agent.
        ArchiveError: A row is too large, or parts are too many.
        PermissionDeniedError: The role does not see all rows.
    """
    given = None if agent_ids is None else _codecs.as_ids(agent_ids, "agent_ids")
    _archive.fills_folder(Path(path))  # before anything is asked
    async with snapshot(address, config) as source:
        agents = await source.fetch(SQL["list_agents_for_export"], agent_ids=given)
        refuse_missing(given, agents)
        async with _archive.create(Path(path)) as writer:
            export = _Export(source, writer, advance, agents)
            facts = await export.run(given)
            await writer.finish(**facts)
    return {"format": _archive.FORMAT, **facts}


class _Export:
    def __init__(
        self,
        source: Snapshot,
        writer: _archive.Writer,
        advance: Advance,
        agents: list[asyncpg.Record],
    ) -> None:
        self._source = source
        self._writer = writer
        self._advance = advance
        self._agents = agents
        self._totals = {name: sum(agent[name] for agent in agents) for name in ("memories", "embeddings")}
        self._rows: dict[str, int] = {}

    async def run(self, chosen: list[UUID] | None) -> dict[str, Any]:
        for table in TABLES:
            if not table.shared:
                for agent in self._agents:
                    await self._lines(table, agent["id"], f"{agent['id']}/")
                if table.name == "memories":
                    for agent in self._agents:
                        await self._embeddings(agent)
            elif chosen is None:
                await self._lines(table, None, "shared/")
            else:
                for agent in self._agents:
                    await self._lines(table, agent["id"], f"shared/{agent['id']}/")
        return {
            "elizasql": __version__,
            "schema": _migrate.known_versions()[-1],
            "created_at": datetime.now(timezone.utc).isoformat(),
            "agents": [
                {"id": str(agent["id"]), "name": agent["name"], "dimension": agent["dimension"]}
                for agent in self._agents
            ],
            "rows": self._rows,
        }

    def _count(self, name: str, rows: int) -> None:
        self._rows[name] = self._rows.get(name, 0) + rows
        self._advance(name, self._rows[name], self._totals.get(name))

    async def _lines(self, table: Table, agent_id: UUID | None, prefix: str) -> None:
        """Write the rows of a table in as many parts as they need."""
        lines: list[bytes] = []
        size = number = 0

        async def write() -> None:
            nonlocal lines, size, number
            if lines:
                number += 1
                name = f"{prefix}{table.name}-{number:05}.jsonl"
                owner = None if table.shared else str(agent_id)
                await self._writer.add(name, table.name, owner, len(lines), b"\n".join(lines) + b"\n")
                self._count(table.name, len(lines))
            lines, size = [], 0

        async for rows in self._source.stream(SQL[table.exports], _FETCH, agent_id=agent_id):
            for row in rows:
                lines.append(row["line"].encode())
                size += len(lines[-1]) + 1
                if len(lines) >= _ROWS or size >= _BYTES:
                    await write()
        await write()

    async def _embeddings(self, agent: asyncpg.Record) -> None:
        """Write the vectors of an agent: a .npy with one row for each line of ids beside it."""
        dimension = agent["dimension"]
        if dimension is None:
            return
        most = min(_ROWS, _BYTES // (4 * dimension))
        number = 0
        waiting: list[asyncpg.Record] = []

        async def write(rows: list[asyncpg.Record]) -> None:
            nonlocal number
            number += 1
            name = f"{agent['id']}/embeddings-{number:05}"
            matrix = io.BytesIO()
            np.save(matrix, np.stack([row["embedding"] for row in rows]), allow_pickle=False)
            ids = b"".join(orjson.dumps({"memory_id": str(row["memory_id"])}) + b"\n" for row in rows)
            await self._writer.add(f"{name}.jsonl", "embeddings", str(agent["id"]), len(rows), ids)
            await self._writer.add(f"{name}.npy", "embeddings", str(agent["id"]), len(rows), matrix.getvalue())
            self._count("embeddings", len(rows))

        statement = SQL.at("export_embeddings", dimension)
        async for rows in self._source.stream(statement, _FETCH, agent_id=agent["id"]):
            waiting += rows
            while len(waiting) >= most:
                await write(waiting[:most])
                waiting = waiting[most:]
        if waiting:
            await write(waiting)
