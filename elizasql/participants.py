"""Participants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, get_args
from uuid import UUID

from . import _codecs
from ._statements import SQL
from ._store import Store, naming_row, need, read_each
from .errors import ArgumentError, show
from .models import Entity, Participant
from .types import UserState

Pair: TypeAlias = "tuple[UUID | str, UUID | str] | Mapping[str, Any] | Participant"
"""What names a membership: (entity_id, room_id), a mapping with `entityId` and `roomId`, or a participant."""

_STATES = get_args(UserState)


class Participants(Store):
    """Which entities are in which rooms, and how the agent follows them there.

    A pair is always (entity_id, room_id); the methods that take the room first are those of the original.
    """

    # --- joining and leaving -----------------------------------------------------------------------------------------

    async def add_participant(
        self, entity_id: UUID | str, room_id: UUID | str, *, timeout: float | None = None
    ) -> bool:
        """Make an entity a participant of a room; True also when it was one.

        Raises:
            ForeignKeyError: The entity or the room does not exist.

        Statement: sql/participants.sql add_participants. Source: addParticipant; differs: once is enough.
        """
        return await self.add_participants_room([entity_id], room_id)

    async def add_participants_room(
        self, entity_ids: Iterable[UUID | str], room_id: UUID | str, *, timeout: float | None = None
    ) -> bool:
        """Make entities participants of a room, all or none; True also for those that were. No entities: False.

        Raises:
            ForeignKeyError: An entity or the room does not exist.

        Statement: sql/participants.sql add_participants. One round trip. Source: addParticipantsRoom.
        """
        entities = _codecs.as_ids(entity_ids, "entity_ids")
        room = _codecs.as_id(room_id, "room_id")
        if not entities:
            return False
        write = self._executor.execute(
            SQL["add_participants"], agent_id=self.agent_id, room_id=room, entity_ids=entities
        )
        await naming_row(write, "entity", _rows_of(entities), entities)
        return True

    async def create_room_participants(
        self, entity_ids: Iterable[UUID | str], room_id: UUID | str, *, timeout: float | None = None
    ) -> list[UUID]:
        """Make entities participants of a room, all or none, and give the ids of the memberships in the order given.

        A membership that is there already stays as it is and gives its id.

        Raises:
            ForeignKeyError: An entity or the room does not exist.

        Statement: sql/participants.sql create_room_participants. One round trip. Source: createRoomParticipants;
        differs: the ids are real.
        """
        entities = _codecs.as_ids(entity_ids, "entity_ids")
        room = _codecs.as_id(room_id, "room_id")
        if not entities:
            return []
        write = self._executor.fetch(
            SQL["create_room_participants"], agent_id=self.agent_id, room_id=room, entity_ids=entities
        )
        return [row[0] for row in await naming_row(write, "entity", _rows_of(entities), entities)]

    async def remove_participant(
        self, entity_id: UUID | str, room_id: UUID | str, *, timeout: float | None = None
    ) -> bool:
        """End a membership; False when there was none.

        Statement: sql/participants.sql remove_participant. Source: removeParticipant; differs: this agent's only.
        """
        return bool(
            await self._executor.fetch_value(
                SQL["remove_participant"],
                agent_id=self.agent_id,
                room_id=_codecs.as_id(room_id, "room_id"),
                entity_id=_codecs.as_id(entity_id, "entity_id"),
            )
        )

    async def delete_participants(self, participants: Iterable[Pair], *, timeout: float | None = None) -> bool:
        """End memberships; True when there was one for every pair, as for no pairs at all.

        Those that are there end, whatever the others: the answer says whether something was missing.

        Args:
            participants: (entity_id, room_id), or mappings with `entityId` and `roomId`.

        Raises:
            ArgumentError: Names the position of the pair that is wrong.

        Statement: sql/participants.sql delete_participants. One round trip. Source: deleteParticipants; differs: does
        not stop at the first pair that was no membership.
        """
        # In the order of the key, so that two batches cannot wait for each other.
        pairs = sorted(set(await self._read_memberships(participants)), key=lambda pair: (pair[1].int, pair[0].int))
        if not pairs:
            return True
        deleted = await self._executor.fetch_value(
            SQL["delete_participants"], agent_id=self.agent_id, **_columns_of(pairs)
        )
        return bool(deleted == len(pairs))

    # --- who is where ------------------------------------------------------------------------------------------------

    async def get_participants_for_entity(
        self, entity_id: UUID | str, *, timeout: float | None = None
    ) -> list[Participant]:
        """Get the memberships of an entity, oldest first, each with the entity in it.

        Statement: sql/participants.sql get_participants_for_entities. Source: getParticipantsForEntity; differs: all
        of the membership comes, and the entity without its components.
        """
        return await self.get_participants_for_entities([entity_id])

    async def get_participants_for_entities(
        self, entity_ids: Iterable[UUID | str], *, timeout: float | None = None
    ) -> list[Participant]:
        """Get the memberships of several entities in one list: in the order of the entities, each one's oldest first.

        Statement: sql/participants.sql get_participants_for_entities. One round trip. Source:
        getParticipantsForEntities; differs as `get_participants_for_entity`.
        """
        entities = _codecs.as_distinct_ids(entity_ids, "entity_ids")
        if not entities:
            return []
        rows = await self._executor.fetch(
            SQL["get_participants_for_entities"], agent_id=self.agent_id, entity_ids=entities
        )
        found = []
        for id, agent, room, entity, state, metadata, created_at, *whole in rows:
            of_entity = Entity(entity, agent, *whole)
            found.append(Participant(id, agent, room, entity, state, metadata, created_at, of_entity))
        return found

    async def get_participants_for_room(self, room_id: UUID | str, *, timeout: float | None = None) -> list[UUID]:
        """Get the ids of the entities in a room, in the order in which they came.

        Statement: sql/participants.sql get_participants_for_room. Source: getParticipantsForRoom; differs: this
        agent's only.
        """
        room = _codecs.as_id(room_id, "room_id")
        rows = await self._executor.fetch(SQL["get_participants_for_room"], agent_id=self.agent_id, room_id=room)
        return [row[0] for row in rows]

    async def get_participants_for_rooms(
        self, room_ids: Iterable[UUID | str], *, timeout: float | None = None
    ) -> list[list[UUID]]:
        """Get for each room what `get_participants_for_room` gives, in the order of the rooms.

        Statement: sql/participants.sql get_participants_for_rooms. One round trip. Source: getParticipantsForRooms;
        differs: lists of ids instead of objects around them.
        """
        rooms = _codecs.as_ids(room_ids, "room_ids")
        if not rooms:
            return []
        rows = await self._executor.fetch(SQL["get_participants_for_rooms"], agent_id=self.agent_id, room_ids=rooms)
        return [row[0] for row in rows]

    async def get_rooms_for_participant(self, entity_id: UUID | str, *, timeout: float | None = None) -> list[UUID]:
        """Get the ids of the rooms that an entity is in, ordered by id.

        Statement: sql/participants.sql get_rooms_for_participants. Source: getRoomsForParticipant.
        """
        return await self.get_rooms_for_participants([entity_id])

    async def get_rooms_for_participants(
        self, entity_ids: Iterable[UUID | str], *, timeout: float | None = None
    ) -> list[UUID]:
        """Get the ids of the rooms that any of the entities is in, each once, ordered by id.

        Statement: sql/participants.sql get_rooms_for_participants. One round trip. Source: getRoomsForParticipants.
        """
        entities = _codecs.as_distinct_ids(entity_ids, "entity_ids")
        if not entities:
            return []
        rows = await self._executor.fetch(
            SQL["get_rooms_for_participants"], agent_id=self.agent_id, entity_ids=entities
        )
        return [row[0] for row in rows]

    async def is_room_participant(
        self, room_id: UUID | str, entity_id: UUID | str, *, timeout: float | None = None
    ) -> bool:
        """Tell whether an entity is in a room.

        Statement: sql/participants.sql is_room_participant. Source: isRoomParticipant; differs: this agent's only.
        """
        return bool(
            await self._executor.fetch_value(
                SQL["is_room_participant"],
                agent_id=self.agent_id,
                room_id=_codecs.as_id(room_id, "room_id"),
                entity_id=_codecs.as_id(entity_id, "entity_id"),
            )
        )

    async def are_room_participants(self, pairs: Iterable[Pair], *, timeout: float | None = None) -> list[bool]:
        """Tell for each pair whether the entity is in the room, in the order of the pairs.

        Args:
            pairs: (entity_id, room_id), or mappings with `entityId` and `roomId`.

        Raises:
            ArgumentError: Names the position of the pair that is wrong.

        Statement: sql/participants.sql are_room_participants. One round trip. Source: areRoomParticipants.
        """
        given = await self._read_memberships(pairs)
        if not given:
            return []
        rows = await self._executor.fetch(SQL["are_room_participants"], agent_id=self.agent_id, **_columns_of(given))
        return [row[0] for row in rows]

    # --- how the agent follows ---------------------------------------------------------------------------------------

    async def get_participant_user_state(
        self, room_id: UUID | str, entity_id: UUID | str, *, timeout: float | None = None
    ) -> UserState | None:
        """Get how the agent follows an entity in a room; None also where it is no participant.

        Statement: sql/participants.sql get_participant_user_state. Source: getParticipantUserState.
        """
        state: UserState | None = await self._executor.fetch_value(
            SQL["get_participant_user_state"],
            agent_id=self.agent_id,
            room_id=_codecs.as_id(room_id, "room_id"),
            entity_id=_codecs.as_id(entity_id, "entity_id"),
        )
        return state

    async def get_participant_user_states(
        self, pairs: Iterable[Pair], *, timeout: float | None = None
    ) -> list[UserState | None]:
        """Get for each pair what `get_participant_user_state` gives, in the order of the pairs.

        Args:
            pairs: (entity_id, room_id), or mappings with `entityId` and `roomId`.

        Raises:
            ArgumentError: Names the position of the pair that is wrong.

        Statement: sql/participants.sql get_participant_user_states. One round trip. Source: getParticipantUserStates.
        """
        given = await self._read_memberships(pairs)
        if not given:
            return []
        rows = await self._executor.fetch(
            SQL["get_participant_user_states"], agent_id=self.agent_id, **_columns_of(given)
        )
        return [row[0] for row in rows]

    async def set_participant_user_state(
        self, room_id: UUID | str, entity_id: UUID | str, state: UserState | None, *, timeout: float | None = None
    ) -> None:
        """Set how the agent follows an entity in a room.

        Args:
            room_id: Where.
            entity_id: Whom.
            state: "FOLLOWED", "MUTED", or None for neither.

        Raises:
            ArgumentError: Another state.
            NotFoundError: The entity is no participant of the room.

        Statement: sql/participants.sql update_participants. Source: setParticipantUserState; differs: a membership that
        is missing is an error.
        """
        await self.update_participant_user_states([{"room_id": room_id, "entity_id": entity_id, "state": state}])

    async def update_participant_user_states(
        self, updates: Iterable[Mapping[str, Any]], *, timeout: float | None = None
    ) -> None:
        """Set how the agent follows entities in rooms, all or none; of two states for one pair the last counts.

        Args:
            updates: Mappings with `roomId`, `entityId` and `state`.

        Raises:
            As `set_participant_user_state`; nothing was changed.

        Statement: sql/participants.sql update_participants. One round trip a chunk. Source:
        updateParticipantUserStates.
        """
        await self._update_participants(await self._read_membership_changes(updates, _as_state_change))

    async def update_participants(
        self, participants: Iterable[Mapping[str, Any]], *, timeout: float | None = None
    ) -> None:
        """Change memberships, all or none; changes of one membership in several places are put together.

        Args:
            participants: Mappings with `entityId`, `roomId` and `updates`, a mapping with `roomState`, `metadata` or
                both. `metadata` is replaced as a whole; None empties it.

        Raises:
            ArgumentError: Another field to update, or another state than "FOLLOWED", "MUTED" and None.
            NotFoundError: A membership does not exist; names it. Nothing was changed.

        Statement: sql/participants.sql update_participants. One round trip a chunk. Source: updateParticipants;
        differs: metadata count, too.
        """
        await self._update_participants(await self._read_membership_changes(participants, _as_change))

    async def _update_participants(self, changes: list[dict[str, Any]]) -> None:
        rows: dict[tuple[UUID, UUID], dict[str, Any]] = {}
        for change in changes:
            pair = change["room_id"], change["entity_id"]
            rows[pair] = rows.get(pair, {}) | change
        if not rows:
            return
        # In the order of the key, so that two batches cannot wait for each other.
        in_order = [rows[pair] for pair in sorted(rows, key=lambda pair: (pair[0].int, pair[1].int))]
        try:
            encoded = [_codecs.encode_json(chunk, "participants") for chunk in self._chunks(in_order)]
        except ArgumentError:
            for position, change in enumerate(changes):
                _codecs.encode_json(change, f"pair at position {position}")
            raise
        chunks = [{"agent_id": self.agent_id, "participants": chunk} for chunk in encoded]
        await self._executor.fetch_chunks(SQL["update_participants"], chunks)

    # --- how arguments are read --------------------------------------------------------------------------------------

    async def _read_memberships(self, pairs: Iterable[Pair]) -> list[tuple[UUID, UUID]]:
        """Give the pairs as (entity_id, room_id), checked, in their order."""
        return [(row["entity_id"], row["room_id"]) for row in await self._read_membership_changes(pairs, _as_pair)]

    async def _read_membership_changes(
        self, values: Iterable[Any], read: Callable[[Any], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Read each value, check whose it is, and name the position of one that is wrong."""

        def read_row(value: Any) -> dict[str, Any]:
            row = read(value)
            self._check_agent(row)
            need(row, "entity_id", "room_id")
            if row.get("room_state") is not None:
                _codecs.as_choice(row["room_state"], _STATES, "the state")
            return row

        return await read_each(values, "pair", read_row, names="pairs")


def _as_pair(value: Any) -> dict[str, Any]:
    if isinstance(value, (tuple, list)) and len(value) == 2:
        value = {"entity_id": value[0], "room_id": value[1]}
    if not isinstance(value, (Participant, Mapping)):
        raise ArgumentError(f"expected (entity_id, room_id) or a mapping, not {show(value)}")
    return Participant.read(value)


def _as_state_change(value: Any) -> dict[str, Any]:
    return _as_key(value, "state") | {"room_state": value["state"]}


def _as_change(value: Any) -> dict[str, Any]:
    key = _as_key(value, "updates")
    updates = Participant.read(value["updates"])
    refused = updates.keys() - {"room_state", "metadata"}
    if refused:
        raise ArgumentError(f"{', '.join(sorted(refused))} cannot be updated")
    return key | updates


def _as_key(value: Any, change: str) -> dict[str, Any]:
    """Read which membership is to change: what stands beside `change` names it, and changes nothing."""
    if not isinstance(value, Mapping) or change not in value:
        raise ArgumentError(f"expected a mapping with entityId, roomId and {change}")
    key = Participant.read({name: item for name, item in value.items() if name != change})
    refused = key.keys() - {"agent_id", "entity_id", "room_id"}
    if refused:
        raise ArgumentError(f"{', '.join(sorted(refused))} beside {change}: give entityId and roomId alone")
    return key


def _rows_of(entities: list[UUID]) -> Iterator[dict[str, UUID]]:
    """Give what the server knows the entities of a room by."""
    return ({"id": id, "entity_id": id} for id in entities)


def _columns_of(pairs: list[tuple[UUID, UUID]]) -> dict[str, list[UUID]]:
    return {"entity_ids": [entity for entity, _ in pairs], "room_ids": [room for _, room in pairs]}
