"""Reading an archive into a database."""

from __future__ import annotations

import io
from collections.abc import Collection
from typing import Any
from uuid import UUID

import numpy as np
import orjson

from elizasql import DatabaseAdapter, _codecs
from elizasql._statements import SQL
from elizasql.errors import EmbeddingDimensionError

from ._archive import Archive, ArchiveError, Part, in_thread
from ._rows import Refuse, Refused, Summary, put, put_lines, put_replies
from .export import Advance, _silent


async def import_archive(
    db: DatabaseAdapter,
    archive: Archive,
    *,
    agent_ids: Collection[UUID] | None = None,
    refuse: Refuse = _silent,
    advance: Advance = _silent,
) -> Summary:
    """Take over what is in an archive; what is there already stays as it is, so it may be repeated.

    Every part is checked before the first row is written, and goes in as a whole or not at all. An import that is
    interrupted is finished by doing it again.

    Args:
        db: An adapter of the database, of whatever agent.
        archive: Where the rows come from.
        agent_ids: Only these agents; what is shared is taken in any case.
        refuse: Told of each row that cannot be taken, or not as it was.
        advance: Told how far it is.

    Raises:
        ArgumentError: An id is none.
        ArchiveError: It is damaged, or a part holds rows of another agent than its own; nothing was written.
        NotFoundError: An agent is not in it.
        EmbeddingDimensionError: An agent is in the database with vectors of another width; nothing was written.
    """
    agents = archive.find_agents(agent_ids)
    parts = archive.parts_of(agents)
    await check_parts(archive, parts, advance)
    await _check_dimensions(db, agents)
    summary = Summary()
    totals: dict[str, int] = {}
    for part in parts:
        totals[part.table] = totals.get(part.table, 0) + part.rows * (part.table != "embeddings" or _is_matrix(part))
    matrices = {part.name.removesuffix(".npy"): part for part in archive.parts if _is_matrix(part)}
    replies: list[Part] = []
    for part in parts:
        if part.table == "embeddings":
            if not _is_matrix(part):
                matrix = matrices[part.name.removesuffix(".jsonl")]
                await _put_embeddings(db, archive, part, matrix, summary, refuse)
        else:
            lines = (await _read(archive, part)).splitlines()
            summary.read[part.table] += len(lines)
            await put_lines(db, part.table, lines, summary, refuse)
            if part.table == "central_messages":
                replies.append(part)
        advance(part.table, summary.read[part.table], totals[part.table])
    for part in replies:
        await put_replies(db, (await _read(archive, part)).splitlines(), summary, refuse)
    return summary


async def check_parts(archive: Archive, parts: list[Part], advance: Advance) -> None:
    """Check parts one after the other, in a thread: meanwhile others have the event loop, and an interrupt is heard.

    Raises:
        ArchiveError: As `Archive.verify`.
    """
    checked = archive.verify(parts)
    for number in range(1, len(parts) + 1):
        await in_thread(lambda: next(checked))
        advance("check", number, len(parts))


async def _read(archive: Archive, part: Part) -> bytes:
    return await in_thread(lambda: archive.read(part))


def _is_matrix(part: Part) -> bool:
    return part.name.endswith(".npy")


async def _check_dimensions(db: DatabaseAdapter, agents: list[dict[str, Any]]) -> None:
    given = {UUID(agent["id"]): agent["dimension"] for agent in agents if agent["dimension"] is not None}
    for row in await db._executor.fetch(SQL["get_dimensions_of"], agent_ids=list(given)):
        if row["dimension"] not in (None, given[row["id"]]):
            raise EmbeddingDimensionError(row["id"], locked=row["dimension"], given=given[row["id"]])


async def _put_embeddings(
    db: DatabaseAdapter, archive: Archive, part: Part, beside: Part, summary: Summary, refuse: Refuse
) -> None:
    """Import vectors: a part of ids and the matrix beside it."""
    lines = (await _read(archive, part)).splitlines()
    try:
        matrix = np.lib.format.read_array(io.BytesIO(await _read(archive, beside)), allow_pickle=False)
        ids = [_codecs.as_id(orjson.loads(line)["memory_id"]) for line in lines]
        if not ids or matrix.ndim != 2 or matrix.shape[0] != len(ids):
            raise ValueError("there are not as many vectors as ids")
        vectors = [_codecs.as_embedding(vector) for vector in matrix]
    except ArchiveError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever numpy and orjson find wrong with it
        raise ArchiveError(f"{archive.path}: {part.name} cannot be read: {error}") from None
    summary.read["embeddings"] += len(ids)
    created, refused = await put_vectors(db, UUID(part.agent_id or ""), ids, vectors)
    summary.created["embeddings"] += created
    for each in refused:
        summary.refused["embeddings"] += 1
        refuse("embeddings", lines[each.position], each)


async def put_vectors(
    db: DatabaseAdapter, agent_id: UUID, ids: list[UUID], vectors: list[Any]
) -> tuple[int, list[Refused]]:
    """Store vectors of one width for memories that are there."""
    statement = SQL.at("import_embeddings", vectors[0].shape[0])
    encoded = [_codecs.encode_vector(vector) for vector in vectors]
    return await put(db, statement, agent_id=agent_id, ids=ids, embeddings=encoded)


__all__ = ["import_archive", "put_vectors"]
