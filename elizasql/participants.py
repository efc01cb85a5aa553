"""Participants."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from . import _codecs
from ._statements import SQL
from ._store import Store


class Participants(Store):
    """Which entities are in which rooms."""

    async def add_participant(self, entity_id: UUID | str, room_id: UUID | str) -> bool:
        """Make an entity a participant of a room; True also when it was one.

        Raises:
            ForeignKeyError: The entity or the room does not exist.

        Statement: sql/participants.sql add_participants. Source: addParticipant; differs: once is enough.
        """
        return await self.add_participants_room([entity_id], room_id)

    async def add_participants_room(self, entity_ids: Iterable[UUID | str], room_id: UUID | str) -> bool:
        """Make entities participants of a room, all or none; True also for those that were. No entities: False.

        Raises:
            ForeignKeyError: An entity or the room does not exist.

        Statement: sql/participants.sql add_participants. Source: addParticipantsRoom.
        """
        entities = _codecs.as_ids(entity_ids, "entity_ids")
        room = _codecs.as_id(room_id, "room_id")
        if not entities:
            return False
        await self._executor.execute(
            SQL["add_participants"], agent_id=self.agent_id, room_id=room, entity_ids=entities
        )
        return True

    async def remove_participant(self, entity_id: UUID | str, room_id: UUID | str) -> bool:
        """End a membership; False when there was none.

        Statement: sql/participants.sql remove_participant. Source: removeParticipant.
        """
        return bool(
            await self._executor.fetch_value(
                SQL["remove_participant"],
                agent_id=self.agent_id,
                room_id=_codecs.as_id(room_id, "room_id"),
                entity_id=_codecs.as_id(entity_id, "entity_id"),
            )
        )

    async def get_participants_for_room(self, room_id: UUID | str) -> list[UUID]:
        """Get the ids of the entities in a room, in the order in which they came.

        Statement: sql/participants.sql get_participants_for_room. Source: getParticipantsForRoom.
        """
        room = _codecs.as_id(room_id, "room_id")
        rows = await self._executor.fetch(SQL["get_participants_for_room"], agent_id=self.agent_id, room_id=room)
        return [row[0] for row in rows]

    async def is_room_participant(self, room_id: UUID | str, entity_id: UUID | str) -> bool:
        """Tell whether an entity is in a room.

        Statement: sql/participants.sql is_room_participant. Source: isRoomParticipant.
        """
        return bool(
            await self._executor.fetch_value(
                SQL["is_room_participant"],
                agent_id=self.agent_id,
                room_id=_codecs.as_id(room_id, "room_id"),
                entity_id=_codecs.as_id(entity_id, "entity_id"),
            )
        )

    async def get_rooms_for_participant(self, entity_id: UUID | str) -> list[UUID]:
        """Get the ids of the rooms that an entity is in, ordered by id.

        Statement: sql/participants.sql get_rooms_for_participants. Source: getRoomsForParticipant.
        """
        return await self.get_rooms_for_participants([entity_id])

    async def get_rooms_for_participants(self, entity_ids: Iterable[UUID | str]) -> list[UUID]:
        """Get the ids of the rooms that any of the entities is in, each once, ordered by id.

        Statement: sql/participants.sql get_rooms_for_participants. Source: getRoomsForParticipants.
        """
        entities = _codecs.as_ids(entity_ids, "entity_ids")
        if not entities:
            return []
        rows = await self._executor.fetch(
            SQL["get_rooms_for_participants"], agent_id=self.agent_id, entity_ids=entities
        )
        return [row[0] for row in rows]
