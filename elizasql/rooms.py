"""Rooms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from . import _codecs
from ._statements import SQL
from ._store import Store, as_reach, by_id, order_by_id
from .models import Room


class Rooms(Store):
    """Create, find, change and delete rooms of the agent."""

    async def create_room(self, room: Room | Mapping[str, Any], *, timeout: float | None = None) -> UUID:
        """Create a room and give its id; one that is there already stays as it is.

        Raises:
            As `create_rooms`.

        Statement: sql/rooms.sql create_rooms. Source: createRooms.
        """
        return (await self.create_rooms([room]))[0]

    async def create_rooms(
        self, rooms: Iterable[Room | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[UUID]:
        """Create rooms, all or none, and give their ids in the order given; those that are there stay as they are.

        Raises:
            ArgumentError: `source` or `type` is missing.
            ForeignKeyError: The world or the agent does not exist.

        Statement: sql/rooms.sql create_rooms. One round trip a chunk. Source: createRooms; differs: `serverId` is an
        alias of `messageServerId`, and an id that another agent has is no obstacle.
        """
        ids, rows = await self._read_all(Room, rooms, needed=("source", "type"))
        order_by_id(rows)
        await self._write_rows("create_rooms", "rooms", Room, rows, ids)
        return ids

    async def upsert_rooms(
        self, rooms: Iterable[Room | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[UUID]:
        """Create rooms, or change the given fields of those that are there, all or none; give their ids in order.

        Of a mapping its keys are given, of a `Room` what is not None. `created_at` of a room that is there stays.

        Raises:
            ArgumentError: `source` or `type` is missing.
            ForeignKeyError: The world or the agent does not exist.

        Statement: sql/rooms.sql upsert_rooms. One round trip a chunk. Source: upsertRooms; differs: what is not given
        stays, and ids come back.
        """
        ids, rows = await self._read_partial(Room, rooms, needed=("source", "type"), new_ids=True)
        await self._write_rows("upsert_rooms", "rooms", Room, rows, ids, form=by_id)
        return ids

    async def get_room(self, room_id: UUID | str, *, timeout: float | None = None) -> Room | None:
        """Get a room, None where there is none.

        Statement: sql/rooms.sql get_rooms_by_ids. Source: getRoomsByIds.
        """
        found = await self.get_rooms_by_ids([room_id])
        return found[0] if found else None

    async def get_rooms_by_ids(self, room_ids: Iterable[UUID | str], *, timeout: float | None = None) -> list[Room]:
        """Get those of the rooms that exist, in the order of the ids, each once.

        Statement: sql/rooms.sql get_rooms_by_ids. One round trip. Source: getRoomsByIds.
        """
        return await self._get_by_ids("get_rooms_by_ids", Room, room_ids, "room_ids")

    async def get_rooms_by_world(self, world_id: UUID | str, *, timeout: float | None = None) -> list[Room]:
        """Get the rooms of a world, oldest first.

        Statement: sql/rooms.sql get_rooms_by_world. Source: getRoomsByWorld; differs: this agent's only.
        """
        world = _codecs.as_id(world_id, "world_id")
        rows = await self._executor.fetch(SQL["get_rooms_by_world"], agent_id=self.agent_id, world_id=world)
        return [Room(*row) for row in rows]

    async def get_rooms_by_worlds(
        self,
        world_ids: Iterable[UUID | str],
        limit: int | None = None,
        offset: int | None = None,
        *,
        timeout: float | None = None,
    ) -> list[Room]:
        """Get the rooms of several worlds together, oldest first; equal times are ordered by id.

        Args:
            world_ids: The worlds.
            limit: At most so many of all; None: all.
            offset: Leave out so many of the oldest.

        Statement: sql/rooms.sql get_rooms_by_worlds. One round trip. Source: getRoomsByWorlds; differs: the order is
        total, so that pages neither repeat nor skip.
        """
        worlds = _codecs.as_distinct_ids(world_ids, "world_ids")
        count = _codecs.as_optional_count(limit, "limit")
        skipped = _codecs.as_optional_count(offset, "offset")
        if not worlds or count == 0:
            return []
        rows = await self._executor.fetch(
            SQL["get_rooms_by_worlds"],
            agent_id=self.agent_id,
            world_ids=worlds,
            reach=as_reach(count, skipped),
            count=count,
            skipped=skipped,
        )
        return [Room(*row) for row in rows]

    async def update_room(self, room: Room | Mapping[str, Any], *, timeout: float | None = None) -> bool:
        """Change the given fields of a room; False when there is no room of this id.

        Args:
            room: `id` and the fields to change: of a mapping its keys, of a `Room` what is not None. In a mapping None
                clears `name`, `channel_id`, `message_server_id`, `world_id` and empties `metadata`. `metadata` is
                replaced as a whole.

        Raises:
            ArgumentError: `id` is missing, or `source`, `type` or `created_at` is None.
            ForeignKeyError: The world does not exist.

        Statement: sql/rooms.sql update_rooms. Source: updateRoom; differs: another agent's room cannot be moved.
        """
        return bool(await self._update_rooms([room], required=False))

    async def update_rooms(self, rooms: Iterable[Room | Mapping[str, Any]], *, timeout: float | None = None) -> None:
        """Change rooms as `update_room` does, all or none; changes of one room in several places are put together.

        Raises:
            NotFoundError: A room does not exist; names it. Nothing was changed.
            As `update_room`.

        Statement: sql/rooms.sql update_rooms. One round trip a chunk. Source: updateRooms.
        """
        await self._update_rooms(rooms, required=True)

    async def _update_rooms(self, rooms: Iterable[Room | Mapping[str, Any]], *, required: bool) -> list[Any]:
        ids, rows = await self._read_partial(Room, rooms, fixed=("source", "type", "created_at"))
        return await self._write_rows("update_rooms", "rooms", Room, rows, ids, required=required)

    async def delete_room(self, room_id: UUID | str, *, timeout: float | None = None) -> bool:
        """Delete a room with its participants, memories, logs, goals and components; False when there was none.

        Statement: sql/rooms.sql delete_rooms. Source: deleteRoom; differs: this agent's only.
        """
        return await self.delete_rooms([room_id]) > 0

    async def delete_rooms(self, room_ids: Iterable[UUID | str], *, timeout: float | None = None) -> int:
        """Delete rooms as `delete_room` does, all or none, and give how many there were.

        Statement: sql/rooms.sql delete_rooms. One round trip a chunk. Source: deleteRooms.
        """
        return await self._delete_by_ids("delete_rooms", room_ids, "room_ids")

    async def delete_rooms_by_world_id(self, world_id: UUID | str, *, timeout: float | None = None) -> int:
        """Delete the rooms of a world as `delete_room` does, all or none, and give how many there were.

        Statement: sql/rooms.sql delete_rooms_by_world_ids. Source: deleteRoomsByWorldId; differs: one statement.
        """
        return await self.delete_rooms_by_world_ids([world_id])

    async def delete_rooms_by_world_ids(self, world_ids: Iterable[UUID | str], *, timeout: float | None = None) -> int:
        """Delete the rooms of several worlds as `delete_room` does, all or none, and give how many there were.

        Statement: sql/rooms.sql delete_rooms_by_world_ids. One round trip. Source: deleteRoomsByWorldIds.
        """
        worlds = sorted(set(_codecs.as_ids(world_ids, "world_ids")), key=lambda id: id.int)
        if not worlds:
            return 0
        deleted: int = await self._executor.fetch_value(
            SQL["delete_rooms_by_world_ids"], agent_id=self.agent_id, world_ids=worlds
        )
        return deleted
