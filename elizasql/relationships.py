"""Relationships."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from . import _codecs
from ._statements import SQL
from ._store import Store, as_reach, need, read_each
from .errors import ArgumentError
from .models import Relationship

_NEEDED = ("source_entity_id", "target_entity_id")


class Relationships(Store):
    """Create, find, change and delete relationships between entities of the agent.

    They are directed: from a to b is not from b to a. There is one for each ordered pair; an entity may have one with
    itself.
    """

    # --- writing -----------------------------------------------------------------------------------------------------

    async def create_relationship(
        self, relationship: Relationship | Mapping[str, Any], *, timeout: float | None = None
    ) -> bool:
        """Create a relationship; False when it is there already, by pair or id, which leaves that one unchanged.

        Raises:
            As `create_relationships`.

        Statement: sql/relationships.sql create_relationships. Source: createRelationship; differs: an unknown entity
        is an error, never False.
        """
        [(_, created)] = await self._create_relationships([relationship])
        return created

    async def create_relationships(
        self, relationships: Iterable[Relationship | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[UUID]:
        """Create relationships, all or none, and give their ids in the order given.

        Where the pair is there already, before or earlier in the batch, that relationship stays as it is and its id is
        given.

        Raises:
            ArgumentError: `source_entity_id` or `target_entity_id` is missing.
            ForeignKeyError: An entity or the agent does not exist.
            SerializationError: A relationship of the pair was there and was deleted meanwhile; try again.

        Statement: sql/relationships.sql create_relationships. One round trip a chunk. Source: createRelationships;
        differs: the ids are those that are stored.
        """
        return [id for id, _ in await self._create_relationships(relationships)]

    async def _create_relationships(
        self, relationships: Iterable[Relationship | Mapping[str, Any]]
    ) -> list[tuple[UUID, bool]]:
        """Give for each relationship the id that is stored, and whether it is new."""
        return await self._create_or_keep(
            "create_relationships",
            "relationships",
            Relationship,
            relationships,
            needed=_NEEDED,
            # By pair, as the statement orders each chunk.
            order=lambda row: tuple(row[name].int for name in _NEEDED),
        )

    async def update_relationship(
        self, relationship: Relationship | Mapping[str, Any], *, timeout: float | None = None
    ) -> bool:
        """Change tags and metadata of a relationship, those that are given; False when there is none of this id.

        Args:
            relationship: `id` and the fields to change: of a mapping its keys, of a `Relationship` what is not None. In
                a mapping None empties them. Each is replaced as a whole. The pair and the time stay.

        Raises:
            ArgumentError: `id` is missing.

        Statement: sql/relationships.sql update_relationships. Source: updateRelationship; differs: what is not given
        stays, and an unknown id is False.
        """
        return bool(await self._update_relationships([relationship], required=False))

    async def update_relationships(
        self, relationships: Iterable[Relationship | Mapping[str, Any]], *, timeout: float | None = None
    ) -> None:
        """Change relationships as `update_relationship` does, all or none; changes of one of them are put together.

        Raises:
            NotFoundError: A relationship does not exist; names it. Nothing was changed.
            As `update_relationship`.

        Statement: sql/relationships.sql update_relationships. One round trip a chunk. Source: updateRelationships.
        """
        await self._update_relationships(relationships, required=True)

    async def _update_relationships(
        self, relationships: Iterable[Relationship | Mapping[str, Any]], *, required: bool
    ) -> list[Any]:
        ids, rows = await self._read_partial(Relationship, relationships)
        return await self._write_rows(
            "update_relationships", "relationships", Relationship, rows, ids, required=required
        )

    async def delete_relationship(self, relationship_id: UUID | str, *, timeout: float | None = None) -> bool:
        """Delete a relationship; False when there was none.

        Statement: sql/relationships.sql delete_relationships. Source: deleteRelationships.
        """
        return await self.delete_relationships([relationship_id]) > 0

    async def delete_relationships(
        self, relationship_ids: Iterable[UUID | str], *, timeout: float | None = None
    ) -> int:
        """Delete relationships, all or none; give how many there were.

        Statement: sql/relationships.sql delete_relationships. One round trip a chunk. Source: deleteRelationships;
        differs: gives a number.
        """
        return await self._delete_by_ids("delete_relationships", relationship_ids, "relationship_ids")

    # --- reading -----------------------------------------------------------------------------------------------------

    async def get_relationship(
        self, source_entity_id: UUID | str, target_entity_id: UUID | str, *, timeout: float | None = None
    ) -> Relationship | None:
        """Get the relationship from one entity to another, None where there is none.

        Statement: sql/relationships.sql get_relationship. Source: getRelationship; differs: this agent's only.
        """
        row = await self._executor.fetch_row(
            SQL["get_relationship"],
            agent_id=self.agent_id,
            source_entity_id=_codecs.as_id(source_entity_id, "source_entity_id"),
            target_entity_id=_codecs.as_id(target_entity_id, "target_entity_id"),
        )
        return None if row is None else Relationship(*row)

    async def get_relationships(
        self,
        entity_id: UUID | str | None = None,
        *,
        entity_ids: Iterable[UUID | str] | None = None,
        tags: Iterable[str] | None = None,
        limit: int | None = None,
        offset: int | None = None,
        timeout: float | None = None,
    ) -> list[Relationship]:
        """Get the relationships of an entity, or of several, as source or target; oldest first, equal times by id.

        Args:
            entity_id: The entity.
            entity_ids: The entities, instead of `entity_id`; each relationship comes once.
            tags: Only those that have at least one of these tags; None or empty: all.
            limit: At most so many; None: all.
            offset: Leave out so many of the oldest.

        Raises:
            ArgumentError: Neither `entity_id` nor `entity_ids` is given, or both.

        Statement: sql/relationships.sql get_relationships, get_relationships_of_entities. One round trip. Source:
        getRelationships; differs: this agent's only, in a total order.
        """
        if (entity_id is None) == (entity_ids is None):
            raise ArgumentError("give either entity_id or entity_ids")
        count = _codecs.as_optional_count(limit, "limit")
        skipped = _codecs.as_optional_count(offset, "offset")
        params = {
            "agent_id": self.agent_id,
            "tags": _read_tags(tags),
            "reach": as_reach(count, skipped),
            "count": count,
            "skipped": skipped,
        }
        if entity_ids is None:
            id = _codecs.as_id(entity_id, "entity_id")
            rows = await self._executor.fetch(SQL["get_relationships"], entity_id=id, **params)
        else:
            ids = _codecs.as_distinct_ids(entity_ids, "entity_ids")
            if not ids:
                return []
            rows = await self._executor.fetch(SQL["get_relationships_of_entities"], entity_ids=ids, **params)
        return [Relationship(*row) for row in rows]

    async def get_relationships_by_ids(
        self, relationship_ids: Iterable[UUID | str], *, timeout: float | None = None
    ) -> list[Relationship]:
        """Get those of the relationships that exist, in the order of the ids, each once.

        Statement: sql/relationships.sql get_relationships_by_ids. One round trip. Source: getRelationshipsByIds.
        """
        return await self._get_by_ids("get_relationships_by_ids", Relationship, relationship_ids, "relationship_ids")

    async def get_relationships_by_pairs(
        self,
        pairs: Iterable[Relationship | Mapping[str, Any] | tuple[UUID | str, UUID | str]],
        *,
        timeout: float | None = None,
    ) -> list[Relationship | None]:
        """Get a relationship for each pair, in the order of the pairs; None where there is none.

        Args:
            pairs: Source and target: mappings with `sourceEntityId` and `targetEntityId`, or tuples.

        Raises:
            ArgumentError: Names the position of the pair that is wrong.

        Statement: sql/relationships.sql get_relationships_by_pairs. One round trip. Source: getRelationshipsByPairs.
        """
        wanted = await read_each(pairs, "pair", _read_pair, names="pairs")
        if not wanted:
            return []
        rows = await self._executor.fetch(
            SQL["get_relationships_by_pairs"],
            agent_id=self.agent_id,
            source_entity_ids=[source for source, _ in wanted],
            target_entity_ids=[target for _, target in wanted],
        )
        return [None if row["id"] is None else Relationship(*row) for row in rows]


def _read_pair(pair: Any) -> tuple[UUID, UUID]:
    if isinstance(pair, tuple):
        if len(pair) != 2:
            raise ArgumentError(f"expected source and target, not {len(pair)} values")
        return _codecs.as_id(pair[0], "source_entity_id"), _codecs.as_id(pair[1], "target_entity_id")
    row = Relationship.read(pair)
    need(row, *_NEEDED)
    return row["source_entity_id"], row["target_entity_id"]


def _read_tags(tags: Any) -> list[str] | None:
    return None if tags is None else _codecs.as_texts(tags, "tags") or None
