"""Rooms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from . import _codecs
from ._statements import SQL
from ._store import Store
from .models import Room


class Rooms(Store):
    """Create, find and delete rooms of the agent."""

    async def create_room(self, room: Room | Mapping[str, Any]) -> UUID:
        """Create a room and give its id; one that is there already stays as it is.

        Statement: sql/rooms.sql create_rooms. Source: createRooms.
        """
        return (await self.create_rooms([room]))[0]

    async def create_rooms(self, rooms: Iterable[Room | Mapping[str, Any]]) -> list[UUID]:
        """Create rooms, all or none, and give their ids in the order given.

        Raises:
            ArgumentError: `source` or `type` is missing.
            ForeignKeyError: The world or the agent does not exist.

        Statement: sql/rooms.sql create_rooms. Source: createRooms.
        """
        ids, rows = self._read_all(Room, rooms)
        self._need(rows, Room, "source", "type")
        if rows:
            chunks = [
                {"agent_id": self.agent_id, "rooms": _codecs.encode_json(chunk, "rooms")}
                for chunk in self._chunks(rows)
            ]
            await self._executor.fetch_chunks(SQL["create_rooms"], chunks)
        return ids

    async def get_room(self, room_id: UUID | str) -> Room | None:
        """Get a room, None where there is none.

        Statement: sql/rooms.sql get_rooms_by_ids. Source: getRoomsByIds.
        """
        found = await self.get_rooms_by_ids([room_id])
        return found[0] if found else None

    async def get_rooms_by_ids(self, room_ids: Iterable[UUID | str]) -> list[Room]:
        """Get those of the rooms that exist, in the order of the ids.

        Statement: sql/rooms.sql get_rooms_by_ids. Source: getRoomsByIds.
        """
        ids = _codecs.as_ids(room_ids, "room_ids")
        if not ids:
            return []
        rows = await self._executor.fetch(SQL["get_rooms_by_ids"], agent_id=self.agent_id, ids=ids)
        found = {row["id"]: Room(*row) for row in rows}
        return [found[id] for id in dict.fromkeys(ids) if id in found]

    async def get_rooms_by_world(self, world_id: UUID | str) -> list[Room]:
        """Get the rooms of a world, oldest first.

        Statement: sql/rooms.sql get_rooms_by_world. Source: getRoomsByWorld; differs: this agent's only.
        """
        world = _codecs.as_id(world_id, "world_id")
        rows = await self._executor.fetch(SQL["get_rooms_by_world"], agent_id=self.agent_id, world_id=world)
        return [Room(*row) for row in rows]

    async def delete_room(self, room_id: UUID | str) -> bool:
        """Delete a room with its participants, memories, logs and components; False when there was none.

        Statement: sql/rooms.sql delete_rooms. Source: deleteRoom.
        """
        ids = [_codecs.as_id(room_id, "room_id")]
        return bool(await self._executor.fetch(SQL["delete_rooms"], agent_id=self.agent_id, ids=ids))
