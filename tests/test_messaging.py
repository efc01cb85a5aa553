"""Messaging: servers, channels, participants, messages; their races, their paging, their plans."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elizasql import (
    ArgumentError,
    Channel,
    ChannelMessage,
    Config,
    DatabaseAdapter,
    ForeignKeyError,
    MessageServer,
    NotFoundError,
    UniqueViolationError,
    _pool,
)
from elizasql._statements import SQL

from .conftest import MakeAdapter
from .locking import overtaken

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
MICROSECOND = timedelta(microseconds=1)
INJECTION = "'); DROP TABLE elizasql.channels; -- $1 :id %s {} \\"
MESSAGING = [statement for statement in SQL.values() if statement.file == "messaging.sql"]


async def make_server(db: DatabaseAdapter) -> UUID:
    server = await db.create_message_server(MessageServer(name="server", source_type="test"))
    assert server.id is not None
    return server.id


async def make_channel(db: DatabaseAdapter, server: UUID | None = None, **fields: Any) -> UUID:
    channel = Channel(message_server_id=server or await make_server(db), name="general", type="GROUP")
    for name, value in fields.items():
        setattr(channel, name, value)
    created = await db.create_channel(channel)
    assert created.id is not None
    return created.id


def message(channel: UUID, content: str = "hello", **fields: Any) -> ChannelMessage:
    return ChannelMessage(channel_id=channel, author_id=uuid4(), content=content, **fields)


def ids(messages: list[ChannelMessage]) -> list[UUID | None]:
    return [message.id for message in messages]


async def wait_until_blocked(
    task: asyncio.Task[Any], raw: asyncpg.Connection[Any], by: asyncpg.Connection[Any]
) -> None:
    """Wait until the task waits for a lock that `by` holds."""
    blocked = "SELECT count(*) FROM pg_stat_activity WHERE $1 = ANY(pg_blocking_pids(pid))"
    while not await raw.fetchval(blocked, by.get_server_pid()):
        assert not task.done(), "it did not wait"


@pytest.fixture
async def holder(dsn: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Give a second bare connection, to hold a lock with."""
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


async def test_what_is_there_is_given_while_others_point_at_it(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], holder: asyncpg.Connection[Any]
) -> None:
    """A create of what is there waits for no transaction that writes into it, and the other way round."""
    server = await make_server(db)
    channel = {"id": uuid4(), "messageServerId": server, "name": "c", "type": "GROUP"}
    message = {"id": uuid4(), "channelId": channel["id"], "authorId": uuid4(), "content": "x"}
    await db.create_channel(channel)
    stored = await db.create_message(message)
    write = (
        ("INSERT INTO elizasql.channels (message_server_id, name, type) VALUES ($1, 'd', 'GROUP')", server),
        (
            "INSERT INTO elizasql.central_messages (channel_id, author_id, content, in_reply_to_root_message_id) "
            "VALUES ($1, $2, 'y', $3)",
            channel["id"],
            uuid4(),
            message["id"],
        ),
    )

    async def create(adapter: DatabaseAdapter) -> None:
        await adapter.create_message_server({"id": server, "name": "s", "sourceType": "t"}, timeout=20)
        await adapter.create_channel(channel, timeout=20)
        assert await adapter.create_message(message, timeout=20) == stored

    async with raw.transaction():
        for statement, *arguments in write:
            await raw.execute(statement, *arguments)
        await create(db)
    async with db.transaction() as tx:
        await create(tx)
        for statement, *arguments in write:
            await holder.execute(statement, *arguments, timeout=20)


# --- message servers -------------------------------------------------------------------------------------------------


async def test_server_comes_back_with_every_field(db: DatabaseAdapter) -> None:
    id = uuid4()
    given = {"id": str(id), "name": INJECTION, "sourceType": "discord", "sourceId": "42", "metadata": {"a": [1, None]}}
    before = copy.deepcopy(given)
    created = await db.create_message_server(given)
    assert given == before
    assert created == await db.get_message_server_by_id(str(id))
    assert created.created_at is not None
    assert created == MessageServer(
        id=id,
        name=INJECTION,
        source_type="discord",
        source_id="42",
        metadata={"a": [1, None]},
        created_at=created.created_at,
        updated_at=created.created_at,
    )
    assert MessageServer.from_dict(created.to_dict()).id == id


async def test_second_create_of_a_server_gives_the_first_ones_row(db: DatabaseAdapter) -> None:
    first = await db.create_message_server(MessageServer(id=uuid4(), name="one", source_type="a", source_id="1"))
    again = await db.create_message_server(MessageServer(id=first.id, name="two", source_type="b", metadata={"x": 1}))
    assert again == first
    assert await db.get_message_server_by_id(first.id or "") == first


async def test_racing_creates_of_a_server_all_get_one_row(make_db: MakeAdapter) -> None:
    one, two = await make_db(), await make_db()
    id = uuid4()
    made = await asyncio.gather(
        *(
            (one, two)[i % 2].create_message_server(MessageServer(id=id, name=f"name {i}", source_type="test"))
            for i in range(8)
        )
    )
    assert all(server == made[0] for server in made)
    assert made[0] == await one.get_message_server_by_id(id)


async def test_servers_in_one_batch(db: DatabaseAdapter, round_trips: list[str]) -> None:
    old = await db.create_message_server(MessageServer(name="old", source_type="test"))
    twice = uuid4()
    given: list[MessageServer | dict[str, Any]] = [
        MessageServer(name="b", source_type="test"),
        old,
        MessageServer(id=twice, name="first", source_type="test"),
        {"id": twice, "name": "second", "sourceType": "test"},
        MessageServer(name="a", source_type="test"),
    ]
    round_trips.clear()
    made = await db.create_message_servers(given)
    assert len(round_trips) == 1
    assert [server.name for server in made] == ["b", "old", "first", "first", "a"]
    assert made[1] == old
    listed = await db.get_message_servers()
    assert listed == sorted(listed, key=lambda server: (server.created_at, server.id))
    assert {server.id for server in made} <= {server.id for server in listed}


async def test_bad_server_sends_nothing(db: DatabaseAdapter, round_trips: list[str]) -> None:
    good = MessageServer(name="a", source_type="test")
    for bad in (
        MessageServer(source_type="test"),
        MessageServer(name="a"),
        {"name": "a", "sourceType": 5},
        {"name": "a", "sourceType": "b", "metadata": "text"},
        {"name": "a", "sourceType": "b", "unknown": 1},
    ):
        with pytest.raises(ArgumentError, match="position 1"):
            await db.create_message_servers([good, bad])
    with pytest.raises(ArgumentError, match="collection"):
        await db.create_message_servers(good)  # type: ignore[arg-type]
    assert await db.create_message_servers([]) == []
    assert round_trips == []


async def test_text_that_cannot_be_stored_is_replaced(db: DatabaseAdapter) -> None:
    server = await db.create_message_server(
        {"name": "a\x00b\ud800", "sourceType": "\ud83d\ude00", "metadata": {"k\x00": "v\udfff"}}
    )
    assert (server.name, server.source_type) == ("a\ufffdb\ufffd", "\U0001f600")
    assert server.metadata == {"k\ufffd": "v\ufffd"}
    channel = await make_channel(db, server.id, name="c\x00", topic="t\x00")
    details = await db.get_channel_details(channel)
    assert details is not None
    assert (details.name, details.topic) == ("c\ufffd", "t\ufffd")
    made = await db.create_message(message(channel, "hi\x00", raw_message={"x": ["\x00"]}))
    assert (made.content, made.raw_message) == ("hi\ufffd", {"x": ["\ufffd"]})
    changed = await db.update_message(made.id or "", {"content": "\ud800!", "rawMessage": "\x00"})
    assert changed is not None
    assert (changed.content, changed.raw_message) == ("\ufffd!", "\ufffd")


async def test_agents_of_a_server(make_db: MakeAdapter) -> None:
    db, other = await make_db(), await make_db()
    server = await make_server(db)
    assert await db.get_agents_for_message_server(server) == []
    for _ in range(2):
        await db.add_agent_to_message_server(server, db.agent_id)
        await db.add_agent_to_message_server(server, str(other.agent_id))
    assert await other.get_agents_for_message_server(server) == sorted([db.agent_id, other.agent_id])
    assert await db.remove_agent_from_message_server(server, other.agent_id) is True
    assert await db.remove_agent_from_message_server(server, other.agent_id) is False
    assert await db.get_agents_for_message_server(server) == [db.agent_id]
    await other.delete_agent(db.agent_id)
    assert await other.get_agents_for_message_server(server) == []
    with pytest.raises(ForeignKeyError) as caught:
        await other.add_agent_to_message_server(server, uuid4())
    assert caught.value.constraint == "message_server_agents_agent_fkey"
    with pytest.raises(ForeignKeyError) as caught:
        await other.add_agent_to_message_server(uuid4(), other.agent_id)
    assert caught.value.constraint == "message_server_agents_message_server_fkey"


# --- channels --------------------------------------------------------------------------------------------------------


async def test_channel_and_its_participants_come_in_one_statement(db: DatabaseAdapter, round_trips: list[str]) -> None:
    server, ann, bob = await make_server(db), uuid4(), uuid4()
    given = {
        "messageServerId": server,
        "name": INJECTION,
        "type": "GROUP",
        "sourceType": "test",
        "sourceId": "7",
        "topic": "all",
        "metadata": {"a": 1},
    }
    before = copy.deepcopy(given)
    # The first array of ids on a connection makes the driver ask for the type.
    await db.create_channel(given, [ann])
    round_trips.clear()
    created = await db.create_channel(given, [ann, str(bob), ann])
    assert len(round_trips) == 1
    assert given == before
    assert created == await db.get_channel_details(created.id or "")
    assert created.to_dict() | {"id": 0, "createdAt": 0, "updatedAt": 0} == {
        **given,
        "messageServerId": str(server),
        "id": 0,
        "createdAt": 0,
        "updatedAt": 0,
    }
    assert await db.get_channel_participants(created.id or "") == sorted([ann, bob])


async def test_second_create_of_a_channel_gives_the_stored_values(db: DatabaseAdapter) -> None:
    server, ann, bob = await make_server(db), uuid4(), uuid4()
    first = await db.create_channel(Channel(message_server_id=server, name="one", type="GROUP", topic="t"), [ann])
    # Not even a server that does not exist counts.
    again = await db.create_channel(Channel(id=first.id, message_server_id=uuid4(), name="two", type="VOICE"), [bob])
    assert again == first
    assert await db.get_channel_participants(first.id or "") == sorted([ann, bob])


async def test_channel_of_an_unknown_server_leaves_nothing(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    ann = uuid4()
    with pytest.raises(ForeignKeyError) as caught:
        await db.create_channel(Channel(message_server_id=uuid4(), name="a", type="GROUP"), [ann])
    assert caught.value.constraint == "channels_message_server_fkey"
    assert await raw.fetchval("SELECT count(*) FROM elizasql.channel_participants WHERE entity_id = $1", ann) == 0


async def test_bad_channel_sends_nothing(db: DatabaseAdapter, round_trips: list[str]) -> None:
    server = uuid4()
    for bad in (
        Channel(name="a", type="GROUP"),
        Channel(message_server_id=server, type="GROUP"),
        Channel(message_server_id=server, name="a"),
        {"messageServerId": "nope", "name": "a", "type": "GROUP"},
        {"messageServerId": server, "name": "a", "type": "GROUP", "topic": 1},
        "general",
    ):
        with pytest.raises(ArgumentError):
            await db.create_channel(bad)  # type: ignore[arg-type]
    good = Channel(message_server_id=server, name="a", type="GROUP")
    for participants in ("not a list", ["nope"], [None], str(uuid4())):
        with pytest.raises(ArgumentError):
            await db.create_channel(good, participants)  # type: ignore[arg-type]
    assert round_trips == []


async def test_racing_creates_of_a_channel_all_get_one_row(make_db: MakeAdapter) -> None:
    one, two = await make_db(), await make_db()
    server, id, users = await make_server(one), uuid4(), [uuid4() for _ in range(8)]
    made = await asyncio.gather(
        *(
            (one, two)[i % 2].create_channel(
                Channel(id=id, message_server_id=server, name=f"name {i}", type="GROUP"), [user]
            )
            for i, user in enumerate(users)
        )
    )
    assert all(channel == made[0] for channel in made)
    assert await one.get_channel_participants(id) == sorted(users)


async def test_channels_of_a_server_are_in_order(db: DatabaseAdapter) -> None:
    server, elsewhere = await make_server(db), await make_server(db)
    made = [await make_channel(db, server, created_at=START + MICROSECOND * (i % 2)) for i in range(6)]
    await make_channel(db, elsewhere)
    listed = await db.get_channels_for_message_server(str(server))
    assert {channel.id for channel in listed} == set(made)
    assert listed == sorted(listed, key=lambda channel: (channel.created_at, channel.id))
    assert await db.get_channels_for_message_server(uuid4()) == []
    assert await db.get_channel_details(uuid4()) is None


async def test_deleting_a_channel_takes_its_messages_and_participants(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    channel, other = await make_channel(db), await make_channel(db)
    await db.add_channel_participants(channel, [uuid4(), uuid4()])
    root = await db.create_message(message(channel))
    await db.create_message(message(channel, in_reply_to_root_message_id=root.id))
    elsewhere = await db.create_message(message(other, in_reply_to_root_message_id=root.id))
    assert await db.delete_channel(channel) is True
    assert await db.delete_channel(channel) is False
    for table in ("channel_participants", "central_messages"):
        assert await raw.fetchval(f"SELECT count(*) FROM elizasql.{table} WHERE channel_id = $1", channel) == 0
    left = await db.get_message_by_id(elsewhere.id or "")
    assert left is not None
    assert left.in_reply_to_root_message_id is None


async def test_everything_goes_with_its_server(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    server = await make_server(db)
    channel = await make_channel(db, server)
    await db.add_agent_to_message_server(server, db.agent_id)
    await db.create_message(message(channel))
    await raw.execute("DELETE FROM elizasql.message_servers WHERE id = $1", server)
    assert await db.get_channel_details(channel) is None
    assert await db.get_messages_for_channel(channel) == []
    assert await db.get_agents_for_message_server(server) == []


# --- changing a channel ----------------------------------------------------------------------------------------------


async def test_update_of_a_channel_changes_what_is_given(db: DatabaseAdapter, round_trips: list[str]) -> None:
    ann = uuid4()
    server = await make_server(db)
    first = await db.create_channel(
        Channel(
            message_server_id=server,
            name="a",
            type="GROUP",
            topic="t",
            source_type="s",
            source_id="1",
            metadata={"a": 1},
        ),
        [ann],
    )
    assert first.id is not None
    given = {"name": INJECTION}
    round_trips.clear()
    changed = await db.update_channel(first.id, given)
    assert len(round_trips) == 1
    assert given == {"name": INJECTION}
    assert changed.updated_at is not None
    assert first.updated_at is not None
    assert changed.updated_at > first.updated_at
    first.name, first.updated_at = INJECTION, changed.updated_at
    assert changed == first == await db.get_channel_details(first.id)
    assert await db.get_channel_participants(first.id) == [ann]
    # A model changes what is not None in it; what never changes stays.
    changed = await db.update_channel(first.id, Channel(id=uuid4(), message_server_id=uuid4(), topic="new"))
    assert (changed.id, changed.message_server_id) == (first.id, server)
    assert (changed.name, changed.topic, changed.metadata) == (INJECTION, "new", {"a": 1})
    changed = await db.update_channel(first.id, {"type": "VOICE", "metadata": {"b": None}})
    assert (changed.type, changed.metadata, changed.topic) == ("VOICE", {"b": None}, "new")


async def test_update_of_a_channel_clears_what_is_none(db: DatabaseAdapter) -> None:
    id = await make_channel(db, topic="t", source_type="s", source_id="1", metadata={"a": 1})
    changed = await db.update_channel(id, {"topic": None, "sourceType": None, "source_id": None, "metadata": None})
    assert (changed.topic, changed.source_type, changed.source_id, changed.metadata) == (None, None, None, {})
    assert (changed.name, changed.type) == ("general", "GROUP")


async def test_update_of_a_channel_replaces_participants(db: DatabaseAdapter, round_trips: list[str]) -> None:
    ann, bob, cyd = sorted(uuid4() for _ in range(3))
    id, other = await make_channel(db), await make_channel(db)
    await db.add_channel_participants(other, [ann])
    await db.add_channel_participants(id, [ann, bob])
    round_trips.clear()
    await db.update_channel(id, {}, [bob, str(cyd), bob])
    assert len(round_trips) == 1
    assert await db.get_channel_participants(id) == [bob, cyd]
    changed = await db.update_channel(id, {"name": "n", "participantCentralUserIds": [ann]})
    assert changed.name == "n"
    assert await db.get_channel_participants(id) == [ann]
    await db.update_channel(id, {"participantCentralUserIds": None})
    assert await db.get_channel_participants(id) == [ann]
    await db.update_channel(id, {}, [])
    assert await db.get_channel_participants(id) == []
    assert await db.get_channel_participants(other) == [ann]


async def test_update_of_a_channel_refuses(db: DatabaseAdapter, round_trips: list[str]) -> None:
    with pytest.raises(NotFoundError, match="no such channel"):
        await db.update_channel(uuid4(), {"name": "a"}, [uuid4()])
    id = uuid4()
    round_trips.clear()
    bad: list[Any] = [
        {"name": None},
        {"type": None},
        {"id": uuid4()},
        {"messageServerId": uuid4()},
        {"createdAt": 0},
        {"nome": "a"},
        {"topic": 1},
        {"metadata": []},
        MessageServer(name="a"),
        None,
    ]
    for updates in bad:
        with pytest.raises(ArgumentError):
            await db.update_channel(id, updates)
    with pytest.raises(ArgumentError, match="exclude"):
        await db.update_channel(id, {"participantCentralUserIds": []}, [])
    with pytest.raises(ArgumentError):
        await db.update_channel(id, {}, "all")
    assert round_trips == []


async def test_update_of_a_channel_is_all_or_nothing(db: DatabaseAdapter) -> None:
    server, ann, bob = await make_server(db), uuid4(), uuid4()
    direct = await db.find_or_create_dm_channel(ann, bob, server)
    second = await db.create_channel(Channel(message_server_id=server, name="Chat", type="DM"), [ann])
    assert second.id is not None
    with pytest.raises(UniqueViolationError):
        await db.update_channel(second.id, {"name": direct.name}, [bob])
    assert await db.get_channel_details(second.id) == second
    assert await db.get_channel_participants(second.id) == [ann]


async def test_concurrent_updates_of_different_fields_both_hold(make_db: MakeAdapter) -> None:
    one, two = await make_db(), await make_db()
    id = await make_channel(one)
    await asyncio.gather(
        one.update_channel(id, {"name": "n"}),
        two.update_channel(id, {"topic": "t"}),
        one.update_channel(id, {"sourceId": "s"}),
        two.update_channel(id, {"metadata": {"m": 1}}),
    )
    channel = await one.get_channel_details(id)
    assert channel is not None
    assert (channel.name, channel.topic, channel.source_id, channel.metadata) == ("n", "t", "s", {"m": 1})


async def test_replaced_participants_are_never_a_mixture(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], holder: asyncpg.Connection[Any]
) -> None:
    ann, bob, cyd = uuid4(), uuid4(), uuid4()
    id = await make_channel(db)
    await db.add_channel_participants(id, [ann])
    # Another session replaces Ann by Bob and has not committed when this one starts to replace Ann by Cyd.
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute("UPDATE elizasql.channels SET name = name WHERE id = $1", id)
    await holder.execute("SELECT elizasql.replace_channel_participants($1, $2)", id, [bob])
    replacing = asyncio.create_task(db.update_channel(id, {}, [cyd]))
    await wait_until_blocked(replacing, raw, holder)
    await transaction.commit()
    await replacing
    assert await db.get_channel_participants(id) == [cyd]


@pytest.mark.slow
async def test_very_many_participants_are_replaced_in_time(db: DatabaseAdapter) -> None:
    server, ids = await make_server(db), sorted(uuid4() for _ in range(100_000))
    channel = await db.create_channel({"messageServerId": server, "name": "c", "type": "GROUP"}, ids[1:])
    await db.update_channel(channel.id or "", {}, ids[:-1])
    assert await db.get_channel_participants(channel.id or "") == ids[:-1]


async def test_concurrent_replacements_leave_one_of_them(make_db: MakeAdapter) -> None:
    one, two = await make_db(), await make_db()
    id = await make_channel(one)
    wanted = [sorted(uuid4() for _ in range(3)) for _ in range(8)]
    await asyncio.gather(*((one, two)[i % 2].update_channel(id, {}, users) for i, users in enumerate(wanted)))
    assert await one.get_channel_participants(id) in wanted


# --- direct channels -------------------------------------------------------------------------------------------------


async def test_concurrent_callers_get_one_direct_channel(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    adapters = [await make_db(), await make_db(), await make_db()]
    server, ann, bob = await make_server(adapters[0]), uuid4(), uuid4()
    made = await asyncio.gather(
        *(adapters[i % 3].find_or_create_dm_channel(*((ann, bob) if i % 2 else (bob, ann)), server) for i in range(15))
    )
    assert all(channel == made[0] for channel in made)
    first, second = sorted([str(ann), str(bob)])
    assert (made[0].name, made[0].type) == (f"DM-{first}-{second}", "DM")
    assert made[0].metadata == {"user1": first, "user2": second}
    assert await raw.fetchval("SELECT count(*) FROM elizasql.channels WHERE message_server_id = $1", server) == 1
    assert await adapters[0].get_channel_participants(made[0].id or "") == sorted([ann, bob])


async def test_direct_channel_that_is_being_created_is_waited_for(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], holder: asyncpg.Connection[Any]
) -> None:
    server, ann, bob, id = await make_server(db), uuid4(), uuid4(), uuid4()
    first, second = sorted([str(ann), str(bob)])
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute(
        "INSERT INTO elizasql.channels (id, message_server_id, name, type) VALUES ($1, $2, $3, 'DM')",
        *(id, server, f"DM-{first}-{second}"),
    )
    finding = asyncio.create_task(db.find_or_create_dm_channel(ann, bob, server))
    await wait_until_blocked(finding, raw, holder)
    await transaction.commit()
    assert (await finding).id == id
    assert await db.get_channel_participants(id) == sorted([ann, bob])


async def test_finding_a_direct_channel_writes_nothing(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], round_trips: list[str]
) -> None:
    server, ann, bob = await make_server(db), uuid4(), uuid4()
    created = await db.find_or_create_dm_channel(str(ann), str(bob), str(server))
    version = "SELECT xmin::text, ctid::text FROM elizasql.channels WHERE id = $1"
    before = await raw.fetchrow(version, created.id)
    round_trips.clear()
    assert await db.find_or_create_dm_channel(bob, ann, server) == created
    assert len(round_trips) == 1
    assert await raw.fetchrow(version, created.id) == before


async def test_both_users_are_in_the_direct_channel_again(db: DatabaseAdapter) -> None:
    server, ann, bob = await make_server(db), uuid4(), uuid4()
    created = await db.find_or_create_dm_channel(ann, bob, server)
    await db.remove_channel_participants(created.id or "", [ann])
    await db.find_or_create_dm_channel(ann, bob, server)
    assert await db.get_channel_participants(created.id or "") == sorted([ann, bob])


async def test_direct_channels_of_others_are_others(db: DatabaseAdapter) -> None:
    server, elsewhere = await make_server(db), await make_server(db)
    ann, bob, cyd = uuid4(), uuid4(), uuid4()
    channels = [
        await db.find_or_create_dm_channel(ann, bob, server),
        await db.find_or_create_dm_channel(ann, cyd, server),
        await db.find_or_create_dm_channel(ann, bob, elsewhere),
        await db.find_or_create_dm_channel(ann, ann, server),
    ]
    assert len({channel.id for channel in channels}) == 4
    assert await db.get_channel_participants(channels[3].id or "") == [ann]
    assert channels[3].name == f"DM-{ann}-{ann}"
    with pytest.raises(ForeignKeyError):
        await db.find_or_create_dm_channel(ann, bob, uuid4())


async def test_users_may_have_more_direct_channels_with_titles(db: DatabaseAdapter) -> None:
    """Clients open a direct channel for each conversation, and titles repeat."""
    server, (ann, bob) = await make_server(db), sorted([uuid4(), uuid4()])
    first = await make_channel(db, server, name=f"DM-{ann}-{bob}", type="GROUP")
    direct = await db.find_or_create_dm_channel(ann, bob, server)
    assert (direct.type, direct.name, direct.id == first) == ("DM", f"DM-{ann}-{bob}", False)
    chats = [await make_channel(db, server, name=name, type="DM") for name in ("Chat", "Chat", "DM-Ann-Bob")]
    await db.update_channel(chats[0], {"name": "DM-Ann-Bob"})
    assert (await db.find_or_create_dm_channel(ann, bob, server)).id == direct.id
    # A group may have the name; a second direct channel of it may not.
    group = await make_channel(db, server, name=direct.name, type="GROUP")
    assert (await db.find_or_create_dm_channel(ann, bob, server)).id == direct.id
    with pytest.raises(UniqueViolationError) as caught:
        await make_channel(db, server, name=direct.name, type="DM")
    assert caught.value.constraint == "channels_dm_key"
    with pytest.raises(UniqueViolationError):
        await db.update_channel(group, {"type": "DM"})


# --- participants ----------------------------------------------------------------------------------------------------


async def test_participants(db: DatabaseAdapter, round_trips: list[str]) -> None:
    ann, bob = sorted([uuid4(), uuid4()])
    id = await make_channel(db)
    round_trips.clear()
    await db.add_channel_participants(id, [])
    assert await db.remove_channel_participants(id, []) == 0
    assert round_trips == []
    await db.add_channel_participants(id, [bob, str(ann), bob])
    await db.add_channel_participants(id, [ann])
    assert len(round_trips) == 2
    assert await db.get_channel_participants(str(id)) == [ann, bob]
    assert await db.is_channel_participant(id, str(ann)) is True
    assert await db.is_channel_participant(id, uuid4()) is False
    assert await db.is_channel_participant(uuid4(), ann) is False
    assert await db.remove_channel_participants(id, [ann, uuid4(), ann]) == 1
    assert await db.get_channel_participants(id) == [bob]
    assert await db.get_channel_participants(uuid4()) == []
    with pytest.raises(ForeignKeyError) as caught:
        await db.add_channel_participants(uuid4(), [ann])
    assert caught.value.constraint == "channel_participants_channel_fkey"


async def test_racing_additions_of_participants(make_db: MakeAdapter) -> None:
    one, two = await make_db(), await make_db()
    id, users = await make_channel(one), [uuid4() for _ in range(20)]
    await asyncio.gather(
        *((one, two)[i % 2].add_channel_participants(id, users[:: 1 if i % 4 < 2 else -1]) for i in range(8))
    )
    assert await one.get_channel_participants(id) == sorted(users)


@pytest.mark.parametrize("call", ["add", "remove"])
@pytest.mark.parametrize("stays", [True, False])
async def test_participants_come_and_go_beside_a_replacement(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], call: str, stays: bool
) -> None:
    """Another session replaces Bob by Ann, who may be there already: it has let him go, and lets her in next."""
    ann, bob = sorted([uuid4(), uuid4()])
    id = await make_channel(db)
    await db.add_channel_participants(id, [ann, bob] if stays else [bob])
    update = """
        WITH updated AS (UPDATE elizasql.channels SET topic = 'new' WHERE id = $1)
        DELETE FROM elizasql.channel_participants WHERE channel_id = $1 AND entity_id = $2"""
    insert = "INSERT INTO elizasql.channel_participants (channel_id, entity_id) VALUES ($1, $2) ON CONFLICT DO NOTHING"
    change = db.add_channel_participants if call == "add" else db.remove_channel_participants
    given = await overtaken(raw, change(id, [ann, bob]), (update, id, bob), (insert, id, ann))  # type: ignore[arg-type]
    # Whoever comes second sees what the first one has done.
    assert given == (None if call == "add" else 1)
    assert await db.get_channel_participants(id) == ([ann, bob] if call == "add" else [])
    assert db._meter.retries == 0


# --- messages --------------------------------------------------------------------------------------------------------


async def test_message_comes_back_with_every_field(db: DatabaseAdapter, round_trips: list[str]) -> None:
    channel, author, id = await make_channel(db), uuid4(), uuid4()
    root = await db.create_message(message(channel))
    given = {
        "messageId": id,
        "channelId": str(channel),
        "authorId": author,
        "content": INJECTION,
        "rawMessage": {"text": INJECTION, "parts": [1, None]},
        "sourceType": "discord",
        "sourceId": "9",
        "metadata": {"m": {"n": 1}},
        "inReplyToRootMessageId": str(root.id),
    }
    before = copy.deepcopy(given)
    round_trips.clear()
    created = await db.create_message(given)
    assert len(round_trips) == 1
    assert given == before
    assert created.created_at is not None
    assert created == ChannelMessage(
        id=id,
        channel_id=channel,
        author_id=author,
        content=INJECTION,
        raw_message={"text": INJECTION, "parts": [1, None]},
        source_type="discord",
        source_id="9",
        metadata={"m": {"n": 1}},
        in_reply_to_root_message_id=root.id,
        created_at=created.created_at,
        updated_at=created.created_at,
    )
    assert created == await db.get_message_by_id(str(id))
    assert await db.get_message_by_id(uuid4()) is None
    assert (root.raw_message, root.metadata, root.source_type) == (None, {}, None)


async def test_message_keeps_a_given_time(db: DatabaseAdapter) -> None:
    channel = await make_channel(db)
    for time in (START, START.isoformat(), int(START.timestamp() * 1000)):
        created = await db.create_message({**message(channel).to_dict(), "createdAt": time})
        assert created.created_at == created.updated_at == START


async def test_second_create_of_a_message_gives_the_stored_row(db: DatabaseAdapter) -> None:
    channel = await make_channel(db)
    first = await db.create_message(message(channel, "one", raw_message=[1]))
    again = await db.create_message(message(uuid4(), "two", id=first.id, in_reply_to_root_message_id=uuid4()))
    assert again == first == await db.get_message_by_id(first.id or "")


async def test_racing_creates_of_a_message_all_get_one_row(make_db: MakeAdapter) -> None:
    one, two = await make_db(), await make_db()
    channel, id = await make_channel(one), uuid4()
    made = await asyncio.gather(
        *((one, two)[i % 2].create_message(message(channel, f"text {i}", id=id)) for i in range(8))
    )
    assert all(created == made[0] for created in made)
    assert await one.get_messages_for_channel(channel) == [made[0]]


async def test_broken_references_of_a_message(db: DatabaseAdapter) -> None:
    channel = await make_channel(db)
    with pytest.raises(ForeignKeyError) as caught:
        await db.create_message(message(uuid4()))
    assert caught.value.constraint == "central_messages_channel_fkey"
    with pytest.raises(ForeignKeyError) as caught:
        await db.create_message(message(channel, in_reply_to_root_message_id=uuid4()))
    assert caught.value.constraint == "central_messages_reply_fkey"
    made = await db.create_message(message(channel))
    with pytest.raises(ForeignKeyError):
        await db.update_message(made.id or "", {"content": "new", "inReplyToRootMessageId": uuid4()})
    assert await db.get_messages_for_channel(channel) == [made]


async def test_messages_in_one_batch(make_db: MakeAdapter, round_trips: list[str]) -> None:
    db = await make_db(batch_size=7)
    channel = await make_channel(db)
    old = await db.create_message(message(channel, "old", created_at=START))
    root = uuid4()
    given = [message(channel, f"text {i}") for i in range(18)]
    given[3].id = root
    for answer in (2, 4, 17):
        given[answer].in_reply_to_root_message_id = root
    batch = [*given, old, message(channel, "not this", id=root)]
    before = copy.deepcopy(batch)
    round_trips.clear()
    made = await db.create_messages(batch)
    # Three chunks between BEGIN, the look at the transaction's id, and COMMIT.
    assert len(round_trips) == 6
    assert batch == before
    assert [created.content for created in made] == [*(f"text {i}" for i in range(18)), "old", "text 3"]
    # Whatever their ids, they stand in the channel as they were given.
    listed = await db.get_messages_for_channel(channel, oldest_first=True)
    assert listed == [old, *made[:18]]
    assert len({created.created_at for created in listed}) == 19
    assert ids(await db.get_replies(root)) == [made[2].id, made[4].id, made[17].id]


async def test_a_batch_of_many_chunks_does_not_reach_into_the_future(make_db: MakeAdapter) -> None:
    """A reader who has seen its last message finds what is said next, whoever says it."""
    db = await make_db(batch_size=10)
    channel = await make_channel(db)
    async with db.transaction() as tx:
        # Those of the first chunk all have a time: nobody asks for another one until the second.
        await tx.create_messages([message(channel, created_at=START) for _ in range(10)] + [message(channel)])
        made = await tx.create_messages([message(channel) for _ in range(200)])
        after = await tx.create_message(message(channel))
    # A microsecond each, and a statement takes longer.
    first = made[0].created_at
    assert first is not None
    assert [created.created_at for created in made] == [first + i * MICROSECOND for i in range(200)]
    assert await db.get_messages_for_channel(channel, 2) == [after, made[-1]]
    assert await db.get_messages_for_channel(channel, cursor=made[-1], oldest_first=True) == [after]


async def test_batch_with_one_bad_message_writes_nothing(make_db: MakeAdapter, round_trips: list[str]) -> None:
    db = await make_db(batch_size=4)
    channel = await make_channel(db)
    good = [message(channel) for _ in range(9)]
    with pytest.raises(ForeignKeyError):
        await db.create_messages([*good, message(uuid4())])
    assert await db.get_messages_for_channel(channel) == []
    round_trips.clear()
    for bad in (
        ChannelMessage(channel_id=channel, author_id=uuid4()),
        ChannelMessage(channel_id=channel, content="a"),
        ChannelMessage(author_id=uuid4(), content="a"),
        {**message(channel).to_dict(), "content": {"text": "a"}},
        {**message(channel).to_dict(), "createdAt": "yesterday"},
        {**message(channel).to_dict(), "raw": 1},
        None,
    ):
        with pytest.raises(ArgumentError, match="position 9"):
            await db.create_messages([*good, bad])  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match="JSON"):
        await db.create_messages([message(channel, raw_message={"x": object()})])
    assert await db.create_messages([]) == []
    assert round_trips == []


async def test_messages_of_one_transaction_stay_in_order(db: DatabaseAdapter) -> None:
    channel = await make_channel(db)
    async with db.transaction() as tx:
        made = [await tx.create_message(message(channel, str(i))) for i in range(20)]
    assert await db.get_messages_for_channel(channel, oldest_first=True) == made


async def test_messaging_is_shared_by_all_agents(make_db: MakeAdapter) -> None:
    one, two = await make_db(), await make_db()
    channel = await make_channel(one)
    made = await one.create_message(message(channel))
    assert await two.get_messages_for_channel(channel) == [made]
    changed = await two.update_message(made.id or "", {"content": "changed"})
    assert changed is not None
    assert await one.get_message_by_id(made.id or "") == changed
    await one.delete_agent(one.agent_id)
    assert await two.get_message_by_id(made.id or "") == changed


# --- changing and deleting messages ----------------------------------------------------------------------------------


async def test_update_of_a_message_changes_what_is_given(db: DatabaseAdapter, round_trips: list[str]) -> None:
    channel = await make_channel(db)
    root = await db.create_message(message(channel))
    fields = {"raw_message": {"r": 1}, "metadata": {"m": 1}, "source_type": "k", "source_id": "s"}
    first = await db.create_message(message(channel, "one", in_reply_to_root_message_id=root.id, **fields))
    assert first.id is not None
    given = {"content": ""}
    round_trips.clear()
    changed = await db.update_message(first.id, given)
    assert len(round_trips) == 1
    assert given == {"content": ""}
    assert changed is not None
    assert changed.updated_at is not None
    assert first.updated_at is not None
    assert changed.updated_at > first.updated_at
    assert changed == await db.get_message_by_id(first.id)
    first.content, first.updated_at = "", changed.updated_at
    assert changed == first
    changed = await db.update_message(first.id, ChannelMessage(id=uuid4(), channel_id=uuid4(), source_type="t"))
    assert changed is not None
    assert (changed.id, changed.channel_id, changed.content) == (first.id, channel, "")
    assert (changed.source_type, changed.source_id, changed.raw_message) == ("t", "s", {"r": 1})
    root = await db.create_message(message(channel))
    changed = await db.update_message(first.id, {"in_reply_to_root_message_id": str(root.id), "rawMessage": [None]})
    assert changed is not None
    assert (changed.in_reply_to_root_message_id, changed.raw_message) == (root.id, [None])
    assert await db.get_replies(root.id or "") == [changed]


async def test_update_of_a_message_clears_what_is_none(db: DatabaseAdapter) -> None:
    channel = await make_channel(db)
    root = await db.create_message(message(channel))
    made = await db.create_message(
        message(
            channel,
            "kept",
            raw_message={"r": 1},
            metadata={"m": 1},
            source_type="t",
            source_id="s",
            in_reply_to_root_message_id=root.id,
        )
    )
    names = ("rawMessage", "metadata", "sourceType", "sourceId", "inReplyToRootMessageId")
    changed = await db.update_message(made.id or "", dict.fromkeys(names))
    assert changed is not None
    assert (changed.raw_message, changed.metadata, changed.source_type, changed.source_id) == (None, {}, None, None)
    assert (changed.in_reply_to_root_message_id, changed.content) == (None, "kept")
    assert await db.get_replies(root.id or "") == []


async def test_update_of_a_message_refuses(db: DatabaseAdapter, round_trips: list[str]) -> None:
    assert await db.update_message(uuid4(), {"content": "a"}) is None
    round_trips.clear()
    for updates in (
        {"content": None},
        {"content": {"text": "a"}},
        {"channelId": uuid4()},
        {"authorId": uuid4()},
        {"createdAt": 0},
        {"updatedAt": 0},
        {"id": uuid4()},
        {"inReplyToRootMessageId": "nope"},
        {"unknown": 1},
        Channel(topic="t"),
    ):
        with pytest.raises(ArgumentError):
            await db.update_message(uuid4(), updates)  # type: ignore[arg-type]
    assert round_trips == []


async def test_concurrent_updates_of_a_message_both_hold(make_db: MakeAdapter) -> None:
    one, two = await make_db(), await make_db()
    made = await one.create_message(message(await make_channel(one)))
    assert made.id is not None
    await asyncio.gather(
        one.update_message(made.id, {"content": "c"}),
        two.update_message(made.id, {"rawMessage": {"r": 1}}),
        one.update_message(made.id, {"sourceId": "s"}),
        two.update_message(made.id, {"metadata": {"m": 1}}),
    )
    changed = await one.get_message_by_id(made.id)
    assert changed is not None
    assert (changed.content, changed.raw_message, changed.source_id, changed.metadata) == ("c", {"r": 1}, "s", {"m": 1})


async def test_deleting_messages_leaves_their_replies(make_db: MakeAdapter, round_trips: list[str]) -> None:
    db = await make_db(batch_size=2)
    channel = await make_channel(db)
    root = await db.create_message(message(channel))
    assert root.id is not None
    first, second = await db.create_messages([message(channel, in_reply_to_root_message_id=root.id) for _ in range(2)])
    assert first.id is not None
    assert second.id is not None
    # A message and an answer to it in one call.
    assert await db.delete_messages([root.id, str(first.id), root.id, uuid4()]) == 2
    left = await db.get_messages_for_channel(channel)
    assert ids(left) == [second.id]
    assert left[0].in_reply_to_root_message_id is None
    assert await db.delete_message(second.id) is True
    assert await db.delete_message(second.id) is False
    round_trips.clear()
    assert await db.delete_messages([]) == 0
    assert round_trips == []


async def test_replies_are_direct_and_paged(db: DatabaseAdapter) -> None:
    channel, other = await make_channel(db), await make_channel(db)
    root = await db.create_message(message(channel))
    assert root.id is not None
    replies = await db.create_messages(
        [
            message(
                (channel, other)[i % 2], in_reply_to_root_message_id=root.id, created_at=START + MICROSECOND * (i % 3)
            )
            for i in range(7)
        ]
    )
    await db.create_message(message(channel, in_reply_to_root_message_id=replies[0].id))
    expected = sorted(replies, key=lambda reply: (reply.created_at, reply.id))
    assert await db.get_replies(root.id) == expected
    assert await db.get_replies(root.id, None) == expected
    assert await db.get_replies(root.id, 3) == expected[:3]
    paged: list[ChannelMessage] = []
    while page := await db.get_replies(root.id, 2, cursor=paged[-1] if paged else None):
        paged += page
    assert paged == expected
    assert await db.get_replies(uuid4()) == []


# --- paging ----------------------------------------------------------------------------------------------------------


async def read_pages(
    get: Callable[..., Awaitable[list[ChannelMessage]]], size: int, as_cursor: Callable[[ChannelMessage], Any]
) -> list[ChannelMessage]:
    found: list[ChannelMessage] = []
    cursor = None
    while page := await get(size, cursor=cursor):
        assert len(page) <= size
        found += page
        assert len(found) <= 12, "a page came twice"
        cursor = as_cursor(page[-1])
    return found


CURSORS: list[Callable[[ChannelMessage], Any]] = [
    lambda last: last,
    # ElizaOS's JSON: whole milliseconds, which stand for a thousand different times.
    lambda last: json.loads(json.dumps(last.to_dict())),
    lambda last: (last.created_at, last.id),
    lambda last: (last.created_at.isoformat(), str(last.id)),  # type: ignore[union-attr]
]


@settings(max_examples=40)
@given(
    ticks=st.lists(st.integers(0, 3), max_size=12),
    unit=st.sampled_from([MICROSECOND, timedelta(microseconds=700), timedelta(seconds=1)]),
    size=st.integers(1, 5),
    oldest_first=st.booleans(),
    as_cursor=st.sampled_from(CURSORS),
    before=st.none() | st.integers(0, 4),
)
async def test_pages_are_the_list_cut_up(
    db: DatabaseAdapter,
    ticks: list[int],
    unit: timedelta,
    size: int,
    oldest_first: bool,
    as_cursor: Callable[[ChannelMessage], Any],
    before: int | None,
) -> None:
    """Whatever the times, the pages after one another are the whole list, every message once and in order."""
    channel = await make_channel(db)
    made = await db.create_messages([message(channel, created_at=START + unit * tick) for tick in ticks])
    limit = None if before is None else START + unit * before
    expected = sorted(
        (row for row in made if limit is None or (row.created_at or START) < limit),
        key=lambda row: (row.created_at, row.id),
        reverse=not oldest_first,
    )

    def get(size: int, cursor: Any) -> Coroutine[Any, Any, list[ChannelMessage]]:
        return db.get_messages_for_channel(channel, size, limit, cursor=cursor, oldest_first=oldest_first)

    assert await db.get_messages_for_channel(channel, None, limit, oldest_first=oldest_first) == expected
    assert await read_pages(get, size, as_cursor) == expected


async def test_ten_messages_of_one_time_come_in_two_pages(db: DatabaseAdapter) -> None:
    channel = await make_channel(db)
    made = await db.create_messages([message(channel, created_at=START) for _ in range(10)])
    first = await db.get_messages_for_channel(channel, 5)
    second = await db.get_messages_for_channel(channel, 5, cursor=first[-1])
    assert ids([*first, *second]) == sorted(ids(made), reverse=True)  # type: ignore[type-var]
    # The original's own argument keeps its meaning: strictly before.
    assert await db.get_messages_for_channel(channel, 5, START) == []
    assert len(await db.get_messages_for_channel(channel, 5, START + MICROSECOND)) == 5
    milliseconds = int(START.timestamp() * 1000)
    assert await db.get_messages_for_channel(channel, before_timestamp=milliseconds) == []
    assert len(await db.get_messages_for_channel(channel, before_timestamp=milliseconds + 1)) == 10


async def test_pages_hold_while_messages_come_and_go(db: DatabaseAdapter) -> None:
    channel = await make_channel(db)
    made = await db.create_messages([message(channel, created_at=START + MICROSECOND * (i // 3)) for i in range(9)])
    expected = sorted(made, key=lambda row: (row.created_at, row.id), reverse=True)
    first = await db.get_messages_for_channel(channel, 4)
    new = await db.create_message(message(channel))
    # The cursor's own row may be gone.
    await db.delete_message(first[-1].id or "")
    rest = await db.get_messages_for_channel(channel, cursor=first[-1])
    assert [*first, *rest] == expected
    # Nor does JSON, which cuts its time to milliseconds, lose the rest of its millisecond.
    cut = first[-1].to_dict()
    for cursor in (cut, ChannelMessage.from_dict(cut), (cut["createdAt"], first[-1].id)):
        again = await db.get_messages_for_channel(channel, cursor=cursor)  # type: ignore[arg-type]
        assert again[-len(rest) :] == rest
        later = await db.get_messages_for_channel(channel, cursor=cursor, oldest_first=True)  # type: ignore[arg-type]
        assert later[-4:] == [*first[-2::-1], new]
    # An exact time is one, also in whole milliseconds.
    assert rest[-3].created_at == START
    await db.delete_message(rest[-3].id or "")
    assert await db.get_messages_for_channel(channel, cursor=(START, rest[-3].id or "")) == rest[-2:]
    # Catching up from the newest one that was seen.
    assert await db.get_messages_for_channel(channel, cursor=first[0], oldest_first=True) == [new]
    assert await db.get_messages_for_channel(channel, cursor=new, oldest_first=True) == []


async def test_limits(db: DatabaseAdapter, round_trips: list[str]) -> None:
    channel, other = await make_channel(db), await make_channel(db)
    made = await db.create_messages([message(channel) for _ in range(53)])
    await db.create_message(message(other))
    round_trips.clear()
    assert await db.get_messages_for_channel(channel) == made[:2:-1]
    assert len(round_trips) == 1
    assert await db.get_messages_for_channel(channel, None) == made[::-1]
    assert await db.get_messages_for_channel(channel, 0) == []
    assert await db.get_messages_for_channel(channel, 1, oldest_first=True) == made[:1]
    assert await db.get_messages_for_channel(uuid4()) == []
    round_trips.clear()
    bad: list[dict[str, Any]] = [
        {"limit": -1},
        {"limit": 2.5},
        {"before_timestamp": datetime(2026, 1, 1)},  # noqa: DTZ001 - that is the case
        {"cursor": {"id": str(uuid4())}},
        {"cursor": (START,)},
        {"cursor": (START, "nope")},
        {"cursor": uuid4()},
        {"oldest_first": 1},
    ]
    for arguments in bad:
        with pytest.raises(ArgumentError):
            await db.get_messages_for_channel(channel, **arguments)
    assert round_trips == []


# --- the statements --------------------------------------------------------------------------------------------------


@pytest.fixture
async def session(dsn: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Give a connection that is set as the pooled ones are."""
    connection = await asyncpg.connect(dsn, server_settings=_pool.session_settings(Config.load(environ={})))
    yield connection
    await connection.close()


async def explain(session: asyncpg.Connection[Any], sql: str, parameters: int) -> str:
    """Give the generic plan of a statement."""
    await session.execute(f"PREPARE planned AS {sql}")
    arguments = f"({', '.join(['NULL'] * parameters)})" if parameters else ""
    lines = await session.fetch(f"EXPLAIN EXECUTE planned{arguments}")
    await session.execute("DEALLOCATE planned")
    return "\n".join(line[0] for line in lines)


@pytest.mark.parametrize("statement", MESSAGING, ids=lambda statement: statement.name)
async def test_no_table_is_read_whole(session: asyncpg.Connection[Any], statement: Any) -> None:
    plan = await explain(session, statement.sql, len(statement.params))
    assert "Seq Scan" not in plan, plan


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("get_message_servers", "message_servers_created_at_idx"),
        ("get_agents_for_message_server", "message_server_agents_pkey"),
        ("get_channels_for_message_server", "channels_message_server_idx"),
        ("find_or_create_dm_channel", "channels_dm_key"),
        ("get_channel_participants", "channel_participants_pkey"),
        ("get_messages_for_channel", "central_messages_channel_idx"),
        ("get_messages_for_channel_oldest_first", "central_messages_channel_idx"),
        ("get_replies", "central_messages_reply_idx"),
    ],
)
async def test_lists_come_off_their_index_in_order(session: asyncpg.Connection[Any], name: str, index: str) -> None:
    plan = await explain(session, SQL[name].sql, len(SQL[name].params))
    assert index in plan, plan
    assert "Sort" not in plan, plan


async def test_a_deep_page_reads_one_page(db: DatabaseAdapter, session: asyncpg.Connection[Any]) -> None:
    channel = await make_channel(db)
    made = await db.create_messages([message(channel) for _ in range(300)])
    middle = made[150]
    for name in ("get_messages_for_channel", "get_messages_for_channel_oldest_first"):
        await session.execute(f"PREPARE planned AS {SQL[name].sql}")
        values = {"channel_id": channel, "cursor_id": middle.id, "cursor_time": middle.created_at, "count": 10}
        given = (values.get(param) for param in SQL[name].params)
        arguments = ", ".join("NULL" if value is None else f"'{value}'" for value in given)
        plan = await session.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE planned({arguments})")
        await session.execute("DEALLOCATE planned")
        nodes = json.loads(plan)[0]["Plan"]["Plans"]
        scan = next(node for node in nodes if node.get("Index Name") == "central_messages_channel_idx")
        assert (scan["Actual Rows"], scan.get("Rows Removed by Filter", 0)) == (10, 0)


@pytest.mark.parametrize("bound", ["before", "cursor"])
async def test_a_page_far_back_reads_nothing_newer(
    db: DatabaseAdapter, session: asyncpg.Connection[Any], bound: str
) -> None:
    channel = await make_channel(db)
    made = await db.create_messages([message(channel) for _ in range(3000)])
    statement = SQL["get_messages_for_channel"]
    await session.execute(f"PREPARE planned AS {statement.sql}")

    async def count_blocks(**values: Any) -> int:
        given = {"channel_id": channel, "count": 10, **values}
        arguments = ", ".join(f"'{given[param]}'" if param in given else "NULL" for param in statement.params)
        plan = await session.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE planned({arguments})")
        root = json.loads(plan)[0]["Plan"]
        assert root["Actual Rows"] == 10
        blocks: int = root["Shared Hit Blocks"] + root["Shared Read Blocks"]
        return blocks

    def behind(position: int) -> dict[str, Any]:
        start = made[position]
        return {f"{bound}_time": start.created_at, **({"cursor_id": start.id} if bound == "cursor" else {})}

    await count_blocks()
    near = await count_blocks(**behind(-20))
    # How deep the indexes are, other tests decide, for both alike, and whether the ten rows fill gaps that these have
    # left, each in a block of its own; all that is newer would be 20 blocks more.
    assert await count_blocks(**behind(20)) <= near + 10
    await session.execute("DEALLOCATE planned")
