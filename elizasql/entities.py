"""Entities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from . import _codecs
from ._statements import SQL
from ._store import Store
from .models import Entity


class Entities(Store):
    """Create, find and delete entities of the agent."""

    async def create_entity(self, entity: Entity | Mapping[str, Any]) -> UUID:
        """Create an entity and give its id; one that is there already stays as it is.

        Statement: sql/entities.sql create_entities. Source: createEntities.
        """
        return (await self.create_entities([entity]))[0]

    async def create_entities(self, entities: Iterable[Entity | Mapping[str, Any]]) -> list[UUID]:
        """Create entities, all or none, and give their ids in the order given.

        Raises:
            ArgumentError: An `id` is missing.

        Statement: sql/entities.sql create_entities. Source: createEntities; differs: gives ids, as its successor does.
        """
        ids, rows = self._read_all(Entity, entities, new_ids=False)
        if rows:
            chunks = [
                {"agent_id": self.agent_id, "entities": _codecs.encode_json(chunk, "entities")}
                for chunk in self._chunks(rows)
            ]
            await self._executor.fetch_chunks(SQL["create_entities"], chunks)
        return ids

    async def ensure_entity_exists(self, entity: Entity | Mapping[str, Any]) -> bool:
        """Create an entity unless it is there; True either way.

        Statement: sql/entities.sql create_entities. Source: ensureEntityExists.
        """
        await self.create_entities([entity])
        return True

    async def get_entity(self, entity_id: UUID | str) -> Entity | None:
        """Get an entity, None where there is none.

        Statement: sql/entities.sql get_entities_by_ids. Source: getEntitiesByIds.
        """
        found = await self.get_entities_by_ids([entity_id])
        return found[0] if found else None

    async def get_entities_by_ids(self, entity_ids: Iterable[UUID | str]) -> list[Entity]:
        """Get those of the entities that exist, in the order of the ids.

        Statement: sql/entities.sql get_entities_by_ids. Source: getEntitiesByIds; differs: this agent's only.
        """
        ids = _codecs.as_ids(entity_ids, "entity_ids")
        if not ids:
            return []
        rows = await self._executor.fetch(SQL["get_entities_by_ids"], agent_id=self.agent_id, ids=ids)
        found = {row["id"]: Entity(*row) for row in rows}
        return [found[id] for id in dict.fromkeys(ids) if id in found]

    async def get_entities_for_room(self, room_id: UUID | str) -> list[Entity]:
        """Get the entities that take part in a room, oldest first.

        Statement: sql/entities.sql get_entities_for_room. Source: getEntitiesForRoom.
        """
        room = _codecs.as_id(room_id, "room_id")
        rows = await self._executor.fetch(SQL["get_entities_for_room"], agent_id=self.agent_id, room_id=room)
        return [Entity(*row) for row in rows]

    async def delete_entity(self, entity_id: UUID | str) -> bool:
        """Delete an entity with its components, memberships, relationships, logs and memories; False: none there.

        Statement: sql/entities.sql delete_entities. Source: deleteEntity.
        """
        ids = [_codecs.as_id(entity_id, "entity_id")]
        return bool(await self._executor.fetch(SQL["delete_entities"], agent_id=self.agent_id, ids=ids))
