"""Messaging: message servers, channels, participants and messages.

Shared by all agents, as in the original: a channel is the same for everybody in it. What an agent makes of a message
is a memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, TypeAlias
from uuid import UUID

from . import _codecs
from ._statements import SQL
from ._store import Store, naming_row, read_cursor
from .errors import ArgumentError, NotFoundError
from .models import Channel, ChannelMessage, MessageServer, Model

Cursor: TypeAlias = "ChannelMessage | Mapping[str, Any] | tuple[datetime, UUID | str]"

# The fields that an update may change, and whether None clears them.
_CHANNEL_UPDATES = {
    "name": False,
    "type": False,
    "source_type": True,
    "source_id": True,
    "topic": True,
    "metadata": True,
}
_MESSAGE_UPDATES = {
    "content": False,
    "raw_message": True,
    "in_reply_to_root_message_id": True,
    "source_type": True,
    "source_id": True,
    "metadata": True,
}


class Messaging(Store):
    """Create, find, change and delete message servers, channels and messages, whichever agent made them."""

    # --- message servers ---------------------------------------------------------------------------------------------

    async def create_message_server(
        self, server: MessageServer | Mapping[str, Any], *, timeout: float | None = None
    ) -> MessageServer:
        """Create a message server and give the row that is stored: one that is there already stays as it is.

        Raises:
            ArgumentError: `name` or `source_type` is missing.

        Statement: sql/messaging.sql create_message_servers. Source: createMessageServer.
        """
        return (await self.create_message_servers([server]))[0]

    async def create_message_servers(
        self, servers: Iterable[MessageServer | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[MessageServer]:
        """Create message servers, all or none, and give the rows that are stored, in the order given.

        Raises:
            ArgumentError: `name` or `source_type` is missing.

        Statement: sql/messaging.sql create_message_servers. One round trip a chunk.
        """
        ids, rows = await self._read_all(MessageServer, servers, needed=("name", "source_type"))
        stored = await self._write_rows("create_message_servers", "servers", MessageServer, rows, ids)
        found = {row["id"]: MessageServer(*row) for row in stored}
        return [found[id] for id in ids]

    async def get_message_servers(self, *, timeout: float | None = None) -> list[MessageServer]:
        """Get all message servers, oldest first.

        Statement: sql/messaging.sql get_message_servers. Source: getMessageServers; differs: in a fixed order.
        """
        return [MessageServer(*row) for row in await self._executor.fetch(SQL["get_message_servers"])]

    async def get_message_server_by_id(
        self, server_id: UUID | str, *, timeout: float | None = None
    ) -> MessageServer | None:
        """Get a message server, None where there is none.

        Statement: sql/messaging.sql get_message_server_by_id. Source: getMessageServerById.
        """
        row = await self._executor.fetch_row(SQL["get_message_server_by_id"], id=_codecs.as_id(server_id, "server_id"))
        return None if row is None else MessageServer(*row)

    async def add_agent_to_message_server(
        self, server_id: UUID | str, agent_id: UUID | str, *, timeout: float | None = None
    ) -> None:
        """Put an agent, this one or another, on a message server; one that is there already is no error.

        Raises:
            ForeignKeyError: The server or the agent does not exist.

        Statement: sql/messaging.sql add_agent_to_message_server. Source: addAgentToMessageServer.
        """
        await self._executor.execute(
            SQL["add_agent_to_message_server"],
            message_server_id=_codecs.as_id(server_id, "server_id"),
            agent_id=_codecs.as_id(agent_id, "agent_id"),
        )

    async def get_agents_for_message_server(self, server_id: UUID | str, *, timeout: float | None = None) -> list[UUID]:
        """Get the ids of the agents on a message server, ordered by id.

        Statement: sql/messaging.sql get_agents_for_message_server. Source: getAgentsForMessageServer.
        """
        server = _codecs.as_id(server_id, "server_id")
        rows = await self._executor.fetch(SQL["get_agents_for_message_server"], message_server_id=server)
        return [row[0] for row in rows]

    async def remove_agent_from_message_server(
        self, server_id: UUID | str, agent_id: UUID | str, *, timeout: float | None = None
    ) -> bool:
        """Take an agent off a message server; False when it was not on it.

        Statement: sql/messaging.sql remove_agent_from_message_server. Source: removeAgentFromMessageServer.
        """
        return bool(
            await self._executor.fetch_value(
                SQL["remove_agent_from_message_server"],
                message_server_id=_codecs.as_id(server_id, "server_id"),
                agent_id=_codecs.as_id(agent_id, "agent_id"),
            )
        )

    # --- channels ----------------------------------------------------------------------------------------------------

    async def create_channel(
        self,
        channel: Channel | Mapping[str, Any],
        participant_ids: Iterable[UUID | str] = (),
        *,
        timeout: float | None = None,
    ) -> Channel:
        """Create a channel with its participants, both or neither, and give the row that is stored.

        A channel that is there already stays as it is; the participants are added to those that it has.

        Raises:
            ArgumentError: `message_server_id`, `name` or `type` is missing.
            ForeignKeyError: The message server does not exist.
            UniqueViolationError: Of type DM with the name that `find_or_create_dm_channel` gives, under another id.

        Statement: sql/messaging.sql create_channel. One round trip. Source: createChannel; differs: one statement, and
        of an id that is there the stored values come back.
        """
        participants = _codecs.as_ids(participant_ids, "participant_ids")
        _, rows = await self._read_all(Channel, [channel], needed=("message_server_id", "name", "type"))
        chunk = {"channel": _codecs.encode_json(rows[0], "channel"), "participant_ids": participants}
        [row] = await self._write_under_two_keys("create_channel", [chunk])
        return Channel(*row)

    async def find_or_create_dm_channel(
        self, user1_id: UUID | str, user2_id: UUID | str, server_id: UUID | str, *, timeout: float | None = None
    ) -> Channel:
        """Get the direct channel of two users on a message server, and create it when it is not there yet.

        Of any number of concurrent calls, in whichever order of the users, all get the same channel. Both users take
        part in it afterwards. A user may have a direct channel with itself.

        Raises:
            ForeignKeyError: The message server does not exist.

        Statement: sql/messaging.sql find_or_create_dm_channel. One round trip. Source: findOrCreateDmChannel; differs:
        no race.
        """
        # UUIDs and their texts have the same order.
        first, second = sorted((_codecs.as_id(user1_id, "user1_id"), _codecs.as_id(user2_id, "user2_id")))
        row = await self._executor.fetch_row(
            SQL["find_or_create_dm_channel"],
            id=_codecs.new_id(),
            message_server_id=_codecs.as_id(server_id, "server_id"),
            name=f"DM-{first}-{second}",
            user1=first,
            user2=second,
        )
        return Channel(*row)  # type: ignore[misc]

    async def get_channels_for_message_server(
        self, server_id: UUID | str, *, timeout: float | None = None
    ) -> list[Channel]:
        """Get the channels of a message server, oldest first.

        Statement: sql/messaging.sql get_channels_for_message_server. Source: getChannelsForMessageServer; differs: in a
        fixed order.
        """
        server = _codecs.as_id(server_id, "server_id")
        rows = await self._executor.fetch(SQL["get_channels_for_message_server"], message_server_id=server)
        return [Channel(*row) for row in rows]

    async def get_channel_details(self, channel_id: UUID | str, *, timeout: float | None = None) -> Channel | None:
        """Get a channel, None where there is none.

        Statement: sql/messaging.sql get_channel_details. Source: getChannelDetails.
        """
        row = await self._executor.fetch_row(SQL["get_channel_details"], id=_codecs.as_id(channel_id, "channel_id"))
        return None if row is None else Channel(*row)

    async def update_channel(
        self,
        channel_id: UUID | str,
        updates: Channel | Mapping[str, Any],
        participant_ids: Iterable[UUID | str] | None = None,
        *,
        timeout: float | None = None,
    ) -> Channel:
        """Change the fields of a channel that are given and, where given, replace its participants, all or nothing.

        Args:
            channel_id: The channel.
            updates: Of name, type, source_type, source_id, topic and metadata those to change: of a mapping its keys, a
                None clears the field; of a model what is not None. Metadata are replaced as a whole.
            participant_ids: Who takes part from now on, [] for nobody; None: as before. ElizaOS's form, the key
                `participantCentralUserIds` of the mapping, is understood.

        Raises:
            ArgumentError: A field that cannot be changed, or `name` or `type` is None.
            NotFoundError: The channel does not exist.
            UniqueViolationError: As `create_channel`.

        Statement: sql/messaging.sql update_channel. One round trip. Source: updateChannel; differs: every field but the
        message server can be changed, and cleared.
        """
        id = _codecs.as_id(channel_id, "channel_id")
        if isinstance(updates, Mapping):
            updates = dict(updates)
            for key in ("participantCentralUserIds", "participant_central_user_ids"):
                named = updates.pop(key, None)
                if named is not None and participant_ids is not None:
                    raise ArgumentError(f"{key} and participant_ids exclude each other")
                participant_ids = participant_ids if named is None else named
        row = await self._executor.fetch_row(
            SQL["update_channel"],
            id=id,
            updates=_read_updates(Channel, updates, _CHANNEL_UPDATES),
            participant_ids=None if participant_ids is None else _codecs.as_ids(participant_ids, "participant_ids"),
        )
        if row is None:
            raise NotFoundError(f"no such channel: {id}", statement="update_channel")
        return Channel(*row)

    async def delete_channel(self, channel_id: UUID | str, *, timeout: float | None = None) -> bool:
        """Delete a channel with its participants and messages; False when there was none.

        Statement: sql/messaging.sql delete_channel. Source: deleteChannel.
        """
        id = _codecs.as_id(channel_id, "channel_id")
        return bool(await self._executor.fetch_value(SQL["delete_channel"], id=id))

    # --- participants ------------------------------------------------------------------------------------------------

    async def add_channel_participants(
        self, channel_id: UUID | str, entity_ids: Iterable[UUID | str], *, timeout: float | None = None
    ) -> None:
        """Let users take part in a channel; one who does already is no error.

        Raises:
            ForeignKeyError: The channel does not exist.

        Statement: sql/messaging.sql add_channel_participants. One round trip. Source: addChannelParticipants.
        """
        channel = _codecs.as_id(channel_id, "channel_id")
        entities = _codecs.as_ids(entity_ids, "entity_ids")
        if entities:
            await self._executor.execute(SQL["add_channel_participants"], channel_id=channel, entity_ids=entities)

    async def remove_channel_participants(
        self, channel_id: UUID | str, entity_ids: Iterable[UUID | str], *, timeout: float | None = None
    ) -> int:
        """End the participation of users in a channel; give how many took part.

        Statement: sql/messaging.sql remove_channel_participants. One round trip.
        """
        channel = _codecs.as_id(channel_id, "channel_id")
        entities = _codecs.as_ids(entity_ids, "entity_ids")
        if not entities:
            return 0
        removed: int = await self._executor.fetch_value(
            SQL["remove_channel_participants"], channel_id=channel, entity_ids=entities
        )
        return removed

    async def get_channel_participants(self, channel_id: UUID | str, *, timeout: float | None = None) -> list[UUID]:
        """Get the ids of the users who take part in a channel, ordered by id.

        Statement: sql/messaging.sql get_channel_participants. Source: getChannelParticipants.
        """
        channel = _codecs.as_id(channel_id, "channel_id")
        rows = await self._executor.fetch(SQL["get_channel_participants"], channel_id=channel)
        return [row[0] for row in rows]

    async def is_channel_participant(
        self, channel_id: UUID | str, entity_id: UUID | str, *, timeout: float | None = None
    ) -> bool:
        """Tell whether a user takes part in a channel.

        Statement: sql/messaging.sql is_channel_participant. Source: isChannelParticipant.
        """
        return bool(
            await self._executor.fetch_value(
                SQL["is_channel_participant"],
                channel_id=_codecs.as_id(channel_id, "channel_id"),
                entity_id=_codecs.as_id(entity_id, "entity_id"),
            )
        )

    # --- messages ----------------------------------------------------------------------------------------------------

    async def create_message(
        self, message: ChannelMessage | Mapping[str, Any], *, timeout: float | None = None
    ) -> ChannelMessage:
        """Create a message and give the row that is stored: one that is there already stays as it is.

        Raises:
            ArgumentError: `channel_id`, `author_id` or `content` is missing.
            ForeignKeyError: The channel, or the message that this one answers, does not exist.

        Statement: sql/messaging.sql create_messages. Source: createMessage; differs: an id that is there is no error.
        """
        return (await self.create_messages([message]))[0]

    async def create_messages(
        self, messages: Iterable[ChannelMessage | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[ChannelMessage]:
        """Create messages, all or none, and give the rows that are stored, in the order given.

        Messages without `created_at` stand in the channel in the order given. One may answer another one before it.

        Raises:
            As `create_message`; errors of a message name its position.

        Statement: sql/messaging.sql create_messages. One round trip a chunk.
        """
        ids, rows = await self._read_all(ChannelMessage, messages, needed=("channel_id", "author_id", "content"))
        if not rows:
            return []
        chunks = [
            {"messages": chunk, "first": number * self.config.batch_size, "begins": number == 0}
            for number, chunk in enumerate(self._encode_chunks(ChannelMessage, rows, ids))
        ]
        write = self._executor.fetch_chunks(SQL["create_messages"], chunks)
        stored = await naming_row(write, "ChannelMessage", rows, ids)
        found = {row["id"]: ChannelMessage(*row) for row in stored}
        return [found[id] for id in ids]

    async def get_message_by_id(self, message_id: UUID | str, *, timeout: float | None = None) -> ChannelMessage | None:
        """Get a message, None where there is none.

        Statement: sql/messaging.sql get_message_by_id. Source: getMessageById.
        """
        row = await self._executor.fetch_row(SQL["get_message_by_id"], id=_codecs.as_id(message_id, "message_id"))
        return None if row is None else ChannelMessage(*row)

    async def update_message(
        self, message_id: UUID | str, updates: ChannelMessage | Mapping[str, Any], *, timeout: float | None = None
    ) -> ChannelMessage | None:
        """Change the fields of a message that are given and give the row that is stored then, None where there is none.

        Args:
            message_id: The message.
            updates: Of content, raw_message, in_reply_to_root_message_id, source_type, source_id and metadata those to
                change: of a mapping its keys, a None clears the field; of a model what is not None. JSON is replaced as
                a whole.

        Raises:
            ArgumentError: A field that cannot be changed, or `content` is None.
            ForeignKeyError: The message to answer does not exist.

        Statement: sql/messaging.sql update_message. One round trip. Source: updateMessage; differs: fields can be
        cleared, and concurrent updates of different fields both hold.
        """
        row = await self._executor.fetch_row(
            SQL["update_message"],
            id=_codecs.as_id(message_id, "message_id"),
            updates=_read_updates(ChannelMessage, updates, _MESSAGE_UPDATES),
        )
        return None if row is None else ChannelMessage(*row)

    async def get_messages_for_channel(
        self,
        channel_id: UUID | str,
        limit: int | None = 50,
        before_timestamp: datetime | float | str | None = None,
        *,
        cursor: Cursor | None = None,
        oldest_first: bool = False,
        timeout: float | None = None,
    ) -> list[ChannelMessage]:
        """Get messages of a channel, newest first; equal times are ordered by id.

        Page with `cursor`: no message is left out or comes twice, whatever the times. To catch up with a channel, give
        the last message seen as `cursor` and `oldest_first=True`. A message whose transaction commits after a newer one
        was read is missed by that cursor.

        Args:
            channel_id: The channel.
            limit: At most so many, default 50; None: all.
            before_timestamp: Only what is older, exclusive: an aware datetime or milliseconds since 1970. Leaves out
                messages of the same time, so it is no cursor.
            cursor: Only what comes after this message in the order asked for, exclusive: the last one of the page
                before, or its time and id.
            oldest_first: The other way round.

        Raises:
            ArgumentError: A value does not fit; nothing was sent.

        Statement: sql/messaging.sql get_messages_for_channel or get_messages_for_channel_oldest_first. One round trip.
        Source: getMessagesForChannel; differs: a total order, `cursor` and `oldest_first`.
        """
        oldest = _codecs.as_bool(oldest_first, "oldest_first")
        rows = await self._executor.fetch(
            SQL["get_messages_for_channel_oldest_first" if oldest else "get_messages_for_channel"],
            channel_id=_codecs.as_id(channel_id, "channel_id"),
            before_time=_codecs.as_optional_time(before_timestamp, "before_timestamp"),
            count=_codecs.as_optional_count(limit, "limit"),
            **read_cursor(ChannelMessage, cursor, forward=oldest),
        )
        return [ChannelMessage(*row) for row in rows]

    async def get_replies(
        self,
        message_id: UUID | str,
        limit: int | None = 50,
        *,
        cursor: Cursor | None = None,
        timeout: float | None = None,
    ) -> list[ChannelMessage]:
        """Get the messages that answer a message directly, oldest first; equal times are ordered by id.

        Args:
            message_id: The message that they answer.
            limit: At most so many, default 50; None: all.
            cursor: As in `get_messages_for_channel`.

        Raises:
            ArgumentError: A value does not fit; nothing was sent.

        Statement: sql/messaging.sql get_replies. One round trip.
        """
        rows = await self._executor.fetch(
            SQL["get_replies"],
            message_id=_codecs.as_id(message_id, "message_id"),
            count=_codecs.as_optional_count(limit, "limit"),
            **read_cursor(ChannelMessage, cursor, forward=True),
        )
        return [ChannelMessage(*row) for row in rows]

    async def delete_message(self, message_id: UUID | str, *, timeout: float | None = None) -> bool:
        """Delete a message; False when there was none. Replies to it stay and no longer point at it.

        Statement: sql/messaging.sql delete_messages. Source: deleteMessage.
        """
        return await self.delete_messages([message_id]) > 0

    async def delete_messages(self, message_ids: Iterable[UUID | str], *, timeout: float | None = None) -> int:
        """Delete messages, all or none, as `delete_message` does; give how many went.

        Statement: sql/messaging.sql delete_messages. One round trip a chunk.
        """
        return await self._delete_by_ids("delete_messages", message_ids, "message_ids")


def _read_updates(kind: type[Model], updates: object, changeable: Mapping[str, bool]) -> bytes:
    """Check and encode the fields to change; those that never change are refused in a mapping, left out of a model."""
    given = kind.read(updates)
    fixed = given.keys() - changeable.keys()
    if fixed and isinstance(updates, Mapping):
        raise ArgumentError(f"{kind.__name__}: {', '.join(sorted(fixed))} cannot be changed")
    for name, clears in changeable.items():
        if not clears and name in given and given[name] is None:
            raise ArgumentError(f"{kind.__name__}: {name} must not be None")
    return _codecs.encode_json({name: given[name] for name in changeable if name in given}, "updates")
