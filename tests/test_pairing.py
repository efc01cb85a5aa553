"""Pairing: requests and allowlists."""

from __future__ import annotations

import asyncio
import copy
import json
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from elizasql import (
    ArgumentError,
    DatabaseAdapter,
    ForeignKeyError,
    NotFoundError,
    PairingAllowlistEntry,
    PairingRequest,
    UniqueViolationError,
)
from elizasql._statements import SQL

from .conftest import MakeAdapter
from .locking import overtaken
from .skew import Skew

T0 = datetime(2026, 1, 1, tzinfo=timezone.utc)
SECOND = timedelta(seconds=1)


def request(channel: str = "discord", **fields: Any) -> dict[str, Any]:
    name = uuid4().hex
    return {"id": uuid4(), "channel": channel, "senderId": f"sender {name}", "code": name[:8], **fields}


def entry(channel: str = "discord", **fields: Any) -> dict[str, Any]:
    return {"id": uuid4(), "channel": channel, "senderId": f"sender {uuid4()}", **fields}


async def count(raw: asyncpg.Connection[Any], table: str, db: DatabaseAdapter) -> int:
    found: int = await raw.fetchval(f"SELECT count(*) FROM elizasql.{table} WHERE agent_id = $1", db.agent_id)
    return found


# --- requests --------------------------------------------------------------------------------------------------------


async def test_a_request_gives_everything_back(db: DatabaseAdapter) -> None:
    given = PairingRequest(uuid4(), db.agent_id, "telegram", "+43 1", "ABCDEFGH", {"name": "Ann"}, T0, T0 + SECOND)
    assert await db.create_pairing_request(given) == given.id
    assert await db.get_pairing_requests(["telegram"]) == [[given]]
    assert PairingRequest.from_dict(given.to_dict()) == given


async def test_a_request_is_filled_in(db: DatabaseAdapter) -> None:
    id = await db.create_pairing_request({"channel": "c", "sender_id": "s", "code": "x"})
    (stored,) = (await db.get_pairing_requests(["c"]))[0]
    assert stored.id == id
    assert id.version == 7
    assert stored.metadata == {}
    assert stored.created_at == stored.last_seen_at
    assert stored.created_at is not None
    await db.create_pairing_request(request("d", createdAt=T0))
    assert (await db.get_pairing_requests(["d"]))[0][0].last_seen_at == T0


async def test_requests_come_oldest_first_in_the_order_of_the_queries(db: DatabaseAdapter) -> None:
    given = [request(channel, createdAt=T0 + SECOND * (i // 3)) for channel in ("a", "b") for i in range(9)]
    await db.create_pairing_requests(given[::-1])
    given.sort(key=lambda one: (one["createdAt"], one["id"]))
    order = {channel: [one["id"] for one in given if one["channel"] == channel] for channel in ("a", "b", "c")}
    queries: list[Any] = [
        "b",
        {"channel": "c"},
        {"channel": "a", "agentId": str(db.agent_id)},
        {"channel": "b", "agentId": None},
    ]
    found = await db.get_pairing_requests(queries)
    assert [[one.id for one in requests] for requests in found] == [order["b"], [], order["a"], order["b"]]


@pytest.mark.parametrize("same", ["code", "senderId"])
async def test_a_code_or_a_sender_is_there_once_a_channel(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], same: str
) -> None:
    db = await make_db(batch_size=2)
    first = request()
    await db.create_pairing_request(first)
    again = request(**{same: first[same]})
    with pytest.raises(UniqueViolationError) as caught:
        await db.create_pairing_request(again)
    assert caught.value.constraint == f"pairing_requests_{'code' if same == 'code' else 'sender'}_key"
    with pytest.raises(UniqueViolationError):
        await db.create_pairing_requests([request(), request(), request(), again])
    with pytest.raises(UniqueViolationError):
        await db.create_pairing_requests([one := request(), request(**{same: one[same]})])
    assert await count(raw, "pairing_requests", db) == 1
    await db.create_pairing_request({**again, "channel": "another"})
    other = await make_db()
    await other.create_pairing_request(again)


async def test_a_request_that_is_there_stays(db: DatabaseAdapter) -> None:
    first, new = request(createdAt=T0), request()
    await db.create_pairing_request(first)
    ids = await db.create_pairing_requests([{**first, "code": "later", "senderId": "x"}, first, new, new])
    assert ids == [first["id"], first["id"], new["id"], new["id"]]
    (found, _) = (await db.get_pairing_requests(["discord"]))[0]
    assert (found.id, found.code, found.sender_id) == (first["id"], first["code"], first["senderId"])


async def test_concurrent_creates_of_one_request(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    first = await make_db()
    adapters = [first, *[await make_db(first.agent_id) for _ in range(3)]]
    results = await asyncio.gather(
        *(adapter.create_pairing_request(request(senderId="one")) for adapter in adapters * 3), return_exceptions=True
    )
    assert sum(isinstance(result, UUID) for result in results) == 1
    assert sum(isinstance(result, UniqueViolationError) for result in results) == 11
    assert await count(raw, "pairing_requests", first) == 1


async def test_only_time_and_metadata_of_a_request_change(db: DatabaseAdapter) -> None:
    given = request(metadata={"a": 1}, createdAt=T0, lastSeenAt=T0)
    id = await db.create_pairing_request(given)

    async def stored() -> PairingRequest:
        return (await db.get_pairing_requests(["discord"]))[0][0]

    wanted = await stored()
    assert await db.update_pairing_request({"id": id, "lastSeenAt": T0 + SECOND}) is True
    wanted.last_seen_at = T0 + SECOND
    assert await stored() == wanted, "metadata that are not given stay"
    assert await db.update_pairing_request({"id": id, "metadata": {"b": 2}}) is True
    wanted.metadata = {"b": 2}
    assert await stored() == wanted
    changed = PairingRequest(id, db.agent_id, "other", "x", "y", {"c\x00": "\ud800"}, T0 - SECOND, T0)
    assert await db.update_pairing_request(changed) is True
    wanted.metadata, wanted.last_seen_at = {"c\ufffd": "\ufffd"}, T0
    assert await stored() == wanted
    await db.update_pairing_requests([{"id": id, "metadata": None}, {"id": id, "lastSeenAt": T0 + SECOND}])
    wanted.metadata, wanted.last_seen_at = {}, T0 + SECOND
    assert await stored() == wanted, "changes of one request are put together"
    wanted.last_seen_at += timedelta(microseconds=123)
    await db.update_pairing_request({"id": id, "last_seen_at": wanted.last_seen_at})
    await db.update_pairing_request(wanted.to_dict())
    assert await stored() == wanted, "the time that is there, cut to milliseconds, changes nothing"


async def test_a_request_that_is_missing(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=2)
    ids = await db.create_pairing_requests([request(metadata={"old": 1}) for _ in range(5)])
    missing = UUID(int=2**128 - 1)
    assert await db.update_pairing_request({"id": missing, "metadata": {}}) is False
    with pytest.raises(NotFoundError, match=str(missing)):
        await db.update_pairing_requests([{"id": id, "metadata": {}} for id in [*ids, missing]])
    assert all(one.metadata == {"old": 1} for one in (await db.get_pairing_requests(["discord"]))[0])
    assert await db.delete_pairing_request(missing) is False
    assert await db.delete_pairing_request(ids[0]) is True
    assert await db.delete_pairing_requests([ids[1], missing, ids[1], str(ids[2]), ids[0]]) == 2
    assert {one.id for one in (await db.get_pairing_requests(["discord"]))[0]} == set(ids[3:])


# --- allowlists ------------------------------------------------------------------------------------------------------


async def test_an_entry_gives_everything_back(db: DatabaseAdapter) -> None:
    given = PairingAllowlistEntry(uuid4(), db.agent_id, "signal", "+43 1", {"name": "Ann"}, T0)
    assert await db.create_pairing_allowlist_entry(given) == given.id
    assert await db.get_pairing_allowlist("signal") == [given]
    assert await db.get_pairing_allowlist("signal", db.agent_id) == [given]
    assert await db.get_pairing_allowlist("discord") == []
    assert PairingAllowlistEntry.from_dict(given.to_dict()) == given
    id = await db.create_pairing_allowlist_entry({"channel": "c", "sender_id": "s"})
    (stored,) = await db.get_pairing_allowlist("c")
    assert (stored.id, stored.metadata) == (id, {})


async def test_allowlists_come_oldest_first_in_the_order_of_the_queries(db: DatabaseAdapter) -> None:
    given = [entry(channel, createdAt=T0 + SECOND * (i // 3)) for channel in ("a", "b") for i in range(9)]
    await db.create_pairing_allowlist_entries(given[::-1])
    given.sort(key=lambda one: (one["createdAt"], one["id"]))
    order = {channel: [one["id"] for one in given if one["channel"] == channel] for channel in ("a", "b", "c")}
    found = await db.get_pairing_allowlists(["b", {"channel": "c", "agentId": db.agent_id}, "a", "b"])
    assert [[one.id for one in entries] for entries in found] == [order["b"], [], order["a"], order["b"]]


async def test_the_id_that_comes_back_is_the_real_one(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db(batch_size=3)
    old = entry(metadata={"old": True})
    id = await db.create_pairing_allowlist_entry(old)
    assert await db.create_pairing_allowlist_entry({**old, "id": uuid4(), "metadata": {}}) == id
    new, other = entry(), entry("other", senderId=old["senderId"])
    ids = await db.create_pairing_allowlist_entries(
        [
            new,
            {"channel": "discord", "senderId": old["senderId"]},
            {**new, "id": uuid4(), "metadata": {"later": 1}},
            other,
            new,
            {**new, "id": uuid4()},
            {"id": id, "channel": "elsewhere", "senderId": "somebody"},
        ]
    )
    assert ids == [new["id"], id, new["id"], other["id"], new["id"], new["id"], id]
    stored = {one.id: one for one in await db.get_pairing_allowlist("discord")}
    assert set(stored) == {id, new["id"]}
    assert (stored[id].metadata, stored[new["id"]].metadata) == ({"old": True}, {})
    assert await db.get_pairing_allowlist("elsewhere") == [], "an id that is there keeps its row"
    taken, new = entry(id=id, channel="elsewhere", senderId="new"), entry(channel="elsewhere", senderId="new")
    listed = await db.create_pairing_allowlist_entries([new, taken])
    (one,) = await db.get_pairing_allowlist("elsewhere")
    assert listed == [one.id, one.id], "which the batch itself has listed"
    await db.delete_pairing_allowlist_entry(one.id or "")
    assert await count(raw, "pairing_allowlist", db) == 3
    both = [entry(channel, senderId="of both") for channel in ("one", "two")]
    assert await db.create_pairing_allowlist_entries(both) == [each["id"] for each in both]


async def test_concurrent_creates_of_one_entry_give_one_id(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    first = await make_db()
    adapters = [first, *[await make_db(first.agent_id) for _ in range(3)]]
    senders = [f"sender {i}" for i in range(10)]
    results = await asyncio.gather(
        *(
            adapter.create_pairing_allowlist_entries(
                [{"channel": "c", "senderId": sender} for sender in (senders if turn % 2 else senders[::-1])]
            )
            for turn, adapter in enumerate(adapters * 3)
        )
    )
    listed = {one.sender_id: one.id for one in await first.get_pairing_allowlist("c")}
    assert set(listed) == set(senders)
    for turn, ids in enumerate(results):
        assert ids == [listed[sender] for sender in (senders if turn % 2 else senders[::-1])]
    assert await count(raw, "pairing_allowlist", first) == 10


async def test_an_entry_that_waits_for_another_one_gives_its_id(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """The other one commits after our statement began: its row is not in our snapshot."""
    id = uuid4()
    transaction = raw.transaction()
    await transaction.start()
    await raw.execute(
        "INSERT INTO elizasql.pairing_allowlist (agent_id, id, channel, sender_id) VALUES ($1, $2, 'c', 's')",
        db.agent_id,
        id,
    )
    call = asyncio.ensure_future(db.create_pairing_allowlist_entry({"channel": "c", "senderId": "s"}))
    waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND $1 = ANY(pg_blocking_pids(pid))"
    while not await raw.fetchval(waits, raw.get_server_pid()):
        assert not call.done(), "it did not wait"
    await transaction.commit()
    assert await call == id


async def test_a_sender_that_is_listed_meanwhile_under_the_same_id(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """The server refuses it by the id, which is not the key that the statement looks at."""
    given = entry("c", senderId="s")
    insert = "INSERT INTO elizasql.pairing_allowlist (agent_id, id, channel, sender_id) VALUES ($1, $2, 'c', 'other')"
    update = "UPDATE elizasql.pairing_allowlist SET sender_id = 's' WHERE agent_id = $1 AND id = $2"
    about = db.agent_id, given["id"]
    call = db.create_pairing_allowlist_entry(given)
    assert await overtaken(raw, call, (insert, *about), (update, *about)) == given["id"]


async def test_only_the_metadata_of_an_entry_change(db: DatabaseAdapter) -> None:
    id = await db.create_pairing_allowlist_entry(entry(metadata={"a": 1}, createdAt=T0))
    (wanted,) = await db.get_pairing_allowlist("discord")
    changed = PairingAllowlistEntry(id, db.agent_id, "other", "x", {"b": 2}, T0 + SECOND)
    assert await db.update_pairing_allowlist_entry(changed) is True
    wanted.metadata = {"b": 2}
    assert await db.get_pairing_allowlist("discord") == [wanted]
    assert await db.update_pairing_allowlist_entry({"id": id}) is True
    assert await db.get_pairing_allowlist("discord") == [wanted]
    await db.update_pairing_allowlist_entries([{"id": id, "metadata": {"c": 3}}, {"id": id, "metadata": None}])
    wanted.metadata = {}
    assert await db.get_pairing_allowlist("discord") == [wanted]


async def test_an_entry_that_is_missing(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=2)
    ids = await db.create_pairing_allowlist_entries([entry(metadata={"old": 1}) for _ in range(5)])
    missing = UUID(int=2**128 - 1)
    assert await db.update_pairing_allowlist_entry({"id": missing, "metadata": {}}) is False
    with pytest.raises(NotFoundError, match=str(missing)):
        await db.update_pairing_allowlist_entries([{"id": id, "metadata": {}} for id in [*ids, missing]])
    assert all(one.metadata == {"old": 1} for one in await db.get_pairing_allowlist("discord"))
    assert await db.delete_pairing_allowlist_entry(missing) is False
    assert await db.delete_pairing_allowlist_entry(ids[0]) is True
    assert await db.delete_pairing_allowlist_entries([ids[1], missing, ids[1], str(ids[2]), ids[0]]) == 2
    assert {one.id for one in await db.get_pairing_allowlist("discord")} == set(ids[3:])


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"channel": None}, "channel"),
        ({"senderId": None}, "sender_id"),
        ({"senderId": 5}, "string"),
        ({"id": "nope"}, "UUID"),
        ({"metadata": [1]}, "mapping"),
        ({"metadata": {"a": object()}}, "JSON"),
        ({"agentId": uuid4()}, "belongs to agent"),
        ({"sender": "typo"}, "no field"),
    ],
)
async def test_what_is_wrong_is_named_before_anything_is_sent(
    db: DatabaseAdapter, round_trips: list[str], wrong: dict[str, Any], words: str
) -> None:
    for create, make in (
        (db.create_pairing_requests, request),
        (db.create_pairing_allowlist_entries, entry),
    ):
        with pytest.raises(ArgumentError, match=words) as caught:
            await create([make(), make(), make(**wrong)])
        assert "position 2" in str(caught.value)
    with pytest.raises(ArgumentError, match="code"):
        await db.create_pairing_request(request(code=None))
    assert round_trips == []


async def test_queries_and_updates_are_checked_before_anything_is_sent(
    db: DatabaseAdapter, round_trips: list[str]
) -> None:
    wrong: list[Any] = [
        {},
        {"channel": None},
        {"channel": "c", "agentId": uuid4()},
        {"channel": "c", "code": "x"},
        5,
        None,
    ]
    for many in (db.get_pairing_requests, db.get_pairing_allowlists):
        for bad in wrong:
            with pytest.raises(ArgumentError, match="query at position 1"):
                await many(["c", bad])
        with pytest.raises(ArgumentError, match="collection"):
            await many("discord")
        with pytest.raises(ArgumentError, match="collection"):
            await many({"channel": "discord"})
    with pytest.raises(ArgumentError, match="belongs to agent"):
        await db.get_pairing_allowlist("c", uuid4())
    with pytest.raises(ArgumentError, match="last_seen_at cannot be None"):
        await db.update_pairing_request({"id": uuid4(), "lastSeenAt": None})
    for update in (db.update_pairing_requests, db.update_pairing_allowlist_entries):
        with pytest.raises(ArgumentError, match=r"position 1: id is missing"):
            await update([{"id": uuid4()}, {"metadata": {}}])
    for delete in (db.delete_pairing_request, db.delete_pairing_allowlist_entry):
        with pytest.raises(ArgumentError):
            await delete("nope")
    assert round_trips == []


async def test_text_is_stored_as_it_is_and_arguments_stay(db: DatabaseAdapter) -> None:
    attack = "'; DROP TABLE elizasql.pairing_requests; --"
    given = {"channel": "a\x00b", "senderId": attack, "code": "\ud800", "metadata": {"\x00": attack}}
    listed = {key: value for key, value in given.items() if key != "code"}
    before = copy.deepcopy((given, listed))
    await db.create_pairing_request(given)
    await db.create_pairing_allowlist_entry(listed)
    for channel in ("a\x00b", "a\ufffdb"):
        (found,) = (await db.get_pairing_requests([channel]))[0]
        assert (found.sender_id, found.code, found.metadata) == (attack, "\ufffd", {"\ufffd": attack})
        (one,) = await db.get_pairing_allowlist(channel)
        assert (one.channel, one.sender_id, one.metadata) == ("a\ufffdb", attack, {"\ufffd": attack})
    assert (given, listed) == before


async def test_another_agents_pairing_is_out_of_reach(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    mine, other = await make_db(), await make_db()
    asked, listed = request(metadata={"a": 1}), entry(metadata={"a": 1})
    await other.create_pairing_request(asked)
    await other.create_pairing_allowlist_entry(listed)
    assert await mine.get_pairing_requests(["discord"]) == [[]]
    assert await mine.get_pairing_allowlist("discord") == []
    assert await mine.update_pairing_request({"id": asked["id"], "metadata": {}}) is False
    assert await mine.update_pairing_allowlist_entry({"id": listed["id"], "metadata": {}}) is False
    assert await mine.delete_pairing_requests([asked["id"]]) == 0
    assert await mine.delete_pairing_allowlist_entries([listed["id"]]) == 0
    assert await mine.create_pairing_request(asked) == asked["id"]
    assert await mine.create_pairing_allowlist_entry({**listed, "id": None}) != listed["id"]
    assert (await other.get_pairing_requests(["discord"]))[0][0].metadata == {"a": 1}
    assert (await other.get_pairing_allowlist("discord"))[0].metadata == {"a": 1}
    await other.delete_agent(other.agent_id)
    for table in ("pairing_requests", "pairing_allowlist"):
        assert await count(raw, table, other) == 0
        assert await count(raw, table, mine) == 1
    with pytest.raises(ForeignKeyError):
        await other.create_pairing_request(asked)
    with pytest.raises(ForeignKeyError):
        await other.create_pairing_allowlist_entry(listed)


async def test_one_round_trip_each(make_db: MakeAdapter, round_trips: list[str]) -> None:
    db = await make_db(batch_size=50, pool_min_size=1)
    requests, entries = [request() for _ in range(50)], [entry() for _ in range(50)]
    calls: list[Any] = [
        lambda: db.create_pairing_requests(requests),
        lambda: db.create_pairing_request(requests[0]),
        lambda: db.update_pairing_requests(requests),
        lambda: db.update_pairing_request(requests[0]),
        lambda: db.get_pairing_requests(["discord", "signal"]),
        lambda: db.delete_pairing_request(requests[0]["id"]),
        lambda: db.delete_pairing_requests([one["id"] for one in requests[:10]]),
        lambda: db.create_pairing_allowlist_entries(entries),
        lambda: db.create_pairing_allowlist_entry(entries[0]),
        lambda: db.update_pairing_allowlist_entries(entries),
        lambda: db.update_pairing_allowlist_entry(entries[0]),
        lambda: db.get_pairing_allowlists(["discord", "signal"]),
        lambda: db.get_pairing_allowlist("discord"),
        lambda: db.delete_pairing_allowlist_entry(entries[0]["id"]),
        lambda: db.delete_pairing_allowlist_entries([one["id"] for one in entries[:10]]),
    ]
    # A connection looks up the types of its parameters when it meets them first.
    await db.get_pairing_requests(["discord"])
    await db.delete_pairing_requests([uuid4()])
    for number, call in enumerate(calls):
        round_trips.clear()
        await call()
        assert len(round_trips) == 1, (number, round_trips)


async def test_nothing_in_nothing_out_without_a_round_trip(db: DatabaseAdapter, round_trips: list[str]) -> None:
    round_trips.clear()
    assert await db.get_pairing_requests([]) == []
    assert await db.create_pairing_requests(iter(())) == []
    await db.update_pairing_requests([])
    assert await db.delete_pairing_requests([]) == 0
    assert await db.get_pairing_allowlists([]) == []
    assert await db.create_pairing_allowlist_entries([]) == []
    await db.update_pairing_allowlist_entries([])
    assert await db.delete_pairing_allowlist_entries([]) == 0
    assert round_trips == []


async def test_a_large_agent_among_small_ones_is_read_by_the_index(skew: Skew) -> None:
    asked = {"id": str(skew.request), "channel": "channel 5", "sender_id": "sender 5", "code": "code 5"}
    listed = {"id": str(uuid4()), "channel": "channel 5", "sender_id": "sender 5"}
    changed = {"id": str(skew.entry), "metadata": {}}
    statements: dict[str, dict[str, Any]] = {
        "get_pairing_requests": {"channels": ["channel 5"]},
        "create_pairing_requests": {"requests": json.dumps([asked])},
        "update_pairing_requests": {"requests": json.dumps([asked]), "required": True},
        "delete_pairing_requests": {"ids": [skew.request]},
        "get_pairing_allowlists": {"channels": ["channel 5"]},
        "create_pairing_allowlist_entries": {"entries": json.dumps([listed])},
        "update_pairing_allowlist_entries": {"entries": json.dumps([changed]), "required": True},
        "delete_pairing_allowlist_entries": {"ids": [skew.entry]},
    }
    for name, params in statements.items():
        await skew.check(SQL[name], **params)
