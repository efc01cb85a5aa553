"""Cache: values, missing and null, expiry, sweeping, compare and set."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import secrets
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elizasql import MISSING, ArgumentError, DatabaseAdapter, ForeignKeyError, Missing, UnknownOutcomeError
from elizasql import cache as cache_module
from elizasql._statements import SQL, Statement

from .conftest import MakeAdapter
from .locking import blocked_pid, overtaken
from .skew import Skew
from .test_plans import indexes, plan_of

HOUR = timedelta(hours=1)


async def expire(raw: asyncpg.Connection[Any], db: DatabaseAdapter, *keys: str) -> None:
    """Let time pass for some entries: they have expired a second ago."""
    done = await raw.execute(
        "UPDATE elizasql.cache SET expires_at = now() - interval '1 second' WHERE agent_id = $1 AND key = ANY($2)",
        db.agent_id,
        list(keys),
    )
    assert done == f"UPDATE {len(set(keys))}"


async def stored(raw: asyncpg.Connection[Any], db: DatabaseAdapter) -> dict[str, datetime | None]:
    rows = await raw.fetch("SELECT key, expires_at FROM elizasql.cache WHERE agent_id = $1", db.agent_id)
    return dict(rows)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, False, True, 0, -1, 1.5, "", "text", "null", "\\u0000", [], {}, [None], {"a": [1, {"b": None}]}, 2**53],
)
async def test_values_come_back_as_they_were(db: DatabaseAdapter, value: Any) -> None:
    assert await db.set_cache("key", value) is True
    found = await db.get_cache("key", MISSING)
    assert found == value
    assert type(found) is type(value)
    assert await db.get_caches(["key"]) == {"key": value}


async def test_null_is_not_missing(db: DatabaseAdapter) -> None:
    await db.set_cache("null", None)
    assert await db.get_cache("null", "default") is None
    assert await db.get_cache("missing", "default") == "default"
    assert await db.get_cache("null") is None
    assert await db.get_cache("missing") is None
    assert await db.get_cache("missing", MISSING) is MISSING
    assert isinstance(MISSING, Missing)
    assert await db.get_caches(["missing", "null"]) == {"null": None}


async def test_set_replaces(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    await db.set_cache("key", {"a": 1})
    await db.set_cache("key", [2])
    assert await db.get_cache("key") == [2]
    assert await db.set_caches([{"key": "key", "value": 3}, {"key": "other", "value": 4}, {"key": "key", "value": 5}])
    assert await db.get_caches(["other", "key"]) == {"key": 5, "other": 4}
    assert set(await stored(raw, db)) == {"key", "other"}


async def test_many_come_in_the_order_of_the_keys(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=7)
    values = {f"key {i}": {"i": i} for i in range(50)}
    assert await db.set_caches(values) is True
    asked = ["key 30", "nope", "key 2", "key 30", "key 11"]
    assert list((await db.get_caches(asked)).items()) == [(key, values[key]) for key in ("key 30", "key 2", "key 11")]
    assert await db.get_caches(list(values)) == values
    assert await db.get_caches(iter(values)) == values


async def test_arguments_stay_as_they_are(db: DatabaseAdapter) -> None:
    value = {"a\x00": ["\ud800", {"deep": [1]}]}
    entries = [{"key": "k\x00", "value": value, "ttl": 5}]
    before = copy.deepcopy((value, entries))
    await db.set_cache("k", value)
    await db.set_caches(entries)
    await db.set_caches({"k": value}, ttl=HOUR)
    await db.compare_and_set_cache("k", value, value)
    assert (value, entries) == before


@pytest.mark.parametrize("bad", [object(), {"a": {1, 2}}, 2**64, MISSING, b"bytes"])
async def test_what_json_cannot_hold_is_refused(db: DatabaseAdapter, round_trips: list[str], bad: Any) -> None:
    with pytest.raises(ArgumentError, match="value"):
        await db.set_cache("key", bad)
    with pytest.raises(ArgumentError, match="value"):
        await db.compare_and_set_cache("key", MISSING, bad)
    with pytest.raises(ArgumentError, match="entry at position 1"):
        await db.set_caches([{"key": "a", "value": 1}, {"key": "b", "value": bad}])
    assert round_trips == []


async def test_numpy_and_nan_become_json(db: DatabaseAdapter) -> None:
    await db.set_cache("key", {"array": np.arange(3, dtype=np.float32), "nan": float("nan")})
    assert await db.get_cache("key") == {"array": [0.0, 1.0, 2.0], "nan": None}


# --- keys ------------------------------------------------------------------------------------------------------------

ATTACK = "k'; DROP TABLE elizasql.cache; --"


async def test_keys_of_any_kind(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    long = secrets.token_urlsafe(75_000)
    assert len(long) == 100_000
    keys = [
        "",
        " ",
        "a",
        "A",
        "ä",
        "a\u0308",
        "\\x00",
        "\\",
        "%",
        "_",
        "'",
        ATTACK,
        "🔑",
        long,
        long[:-1] + "!",
        "a" * 3000,
    ]
    for number, key in enumerate(keys):
        await db.set_cache(key, number)
    assert [await db.get_cache(key) for key in keys] == list(range(len(keys)))
    assert await db.get_caches(keys) == {key: number for number, key in enumerate(keys)}
    assert set(await stored(raw, db)) == set(keys), "the key itself is stored"
    assert await db.compare_and_set_cache(long, keys.index(long), "new") is True
    assert await db.get_cache(long) == "new"
    await db.delete_cache(long)
    assert await db.get_cache(long) is None
    assert await db.get_cache(long[:-1] + "!") == keys.index(long[:-1] + "!")
    await db.delete_caches(keys)
    assert await stored(raw, db) == {}


async def test_keys_follow_the_text_policy(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    await db.set_cache("a\x00b", 1)
    await db.set_cache("\ud83d\ude00", 2)
    assert await db.get_cache("a\x00b") == 1
    assert await db.get_cache("a\ufffdb") == 1
    assert await db.get_cache("😀") == 2
    assert await db.get_caches(["a\x00b", "😀", "\ud83d\ude00"]) == {"a\x00b": 1, "😀": 2, "\ud83d\ude00": 2}
    assert set(await stored(raw, db)) == {"a\ufffdb", "😀"}
    await db.set_caches([{"key": "\x00", "value": 1}, {"key": "\ufffd", "value": 2}])
    assert await db.get_cache("\x00") == 2, "two names of one key: the last one counts"
    assert await db.compare_and_set_cache("\ud800", 2, 3) is True
    await db.delete_cache("\ud800")
    assert await db.get_cache("\ufffd") is None


@pytest.mark.parametrize("bad", [None, 5, b"key", ["key"]])
async def test_keys_are_texts(db: DatabaseAdapter, round_trips: list[str], bad: Any) -> None:
    calls: list[Any] = [
        lambda: db.get_cache(bad),
        lambda: db.set_cache(bad, 1),
        lambda: db.delete_cache(bad),
        lambda: db.compare_and_set_cache(bad, MISSING, 1),
        lambda: db.compare_and_set_cache(bad, 1, 1),
        lambda: db.get_caches(["a", bad]),
        lambda: db.delete_caches(["a", bad]),
        lambda: db.set_caches([{"key": bad, "value": 1}]),
    ]
    for call in calls:
        with pytest.raises(ArgumentError):
            await call()
    assert round_trips == []


async def test_entries_are_checked(db: DatabaseAdapter, round_trips: list[str]) -> None:
    good = {"key": "a", "value": 1}
    wrong: list[Any] = [
        {"key": "a"},
        {"value": 1},
        {**good, "x": 1},
        {**good, "ttl": 0},
        {**good, "ttl": "1"},
        "a",
        None,
    ]
    for bad in wrong:
        with pytest.raises(ArgumentError, match="entry at position 1"):
            await db.set_caches([good, bad])
    wrong = ["key", b"key", 5, None]
    for bad in wrong:
        with pytest.raises(ArgumentError, match="collection of entries"):
            await db.set_caches(bad)
        for many in (db.get_caches, db.delete_caches):
            with pytest.raises(ArgumentError, match="collection"):
                await many(bad)
    with pytest.raises(ArgumentError, match="collection"):
        await db.get_caches({"key": 1})
    assert round_trips == []


@settings(max_examples=60)
@given(key=st.text())
async def test_python_and_the_server_hash_alike(db: DatabaseAdapter, raw: asyncpg.Connection[Any], key: str) -> None:
    await db.set_cache(key, 1)
    cleaned = cache_module._key(key)
    made = "SELECT key_hash FROM elizasql.cache WHERE agent_id = $1 AND key = $2"
    assert await raw.fetchval(made, db.agent_id, cleaned) == cache_module._hash(key)
    assert cache_module._hash(key) == hashlib.sha256(cleaned.encode()).digest()


# --- delete ----------------------------------------------------------------------------------------------------------


async def test_delete(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    await db.set_caches({str(i): i for i in range(10)})
    assert await db.delete_cache("3") is True
    assert await db.delete_cache("3") is True, "there is none afterwards, as in the original"
    assert await db.delete_caches(["1", "nope", "2", "1"]) is True
    assert set(await stored(raw, db)) == {"0", "4", "5", "6", "7", "8", "9"}


# --- expiry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl", [3600, 3600.0, np.float32(3600), np.int64(3600), HOUR])
async def test_a_ttl_counts_from_now_on_the_servers_clock(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], ttl: Any
) -> None:
    before = await raw.fetchval("SELECT clock_timestamp()")
    await db.set_cache("one", 1, ttl)
    await db.set_caches([{"key": "two", "value": 2, "ttl": ttl}])
    await db.set_caches({"three": 3}, ttl=ttl)
    await db.compare_and_set_cache("four", MISSING, 4, ttl)
    await db.set_cache("five", 0)
    await db.compare_and_set_cache("five", 0, 5, ttl)
    after = await raw.fetchval("SELECT clock_timestamp()")
    times = await stored(raw, db)
    assert set(times) == {"one", "two", "three", "four", "five"}
    for time in times.values():
        assert time is not None
        assert before <= time - HOUR <= after
    assert await db.get_caches(list(times)) == {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


async def test_what_has_expired_is_not_there(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    await db.set_caches({"gone": None, "kept": None}, ttl=HOUR)
    await expire(raw, db, "gone")
    assert await db.get_cache("gone", MISSING) is MISSING
    assert await db.get_caches(["gone", "kept"]) == {"kept": None}
    assert await db.compare_and_set_cache("gone", None, 1) is False
    assert await db.get_cache("gone", MISSING) is MISSING
    assert await db.compare_and_set_cache("gone", MISSING, 1) is True
    assert await db.get_cache("gone") == 1
    assert (await stored(raw, db))["gone"] is None


async def test_an_entry_expires_at_its_time_to_the_microsecond(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """Within one statement now and the time of expiry are the same: it is over then."""
    read = SQL["get_cache"].sql.replace("statement_timestamp()", "$3::timestamptz")
    await db.set_cache("key", 1, HOUR)
    time = (await stored(raw, db))["key"]
    assert time is not None
    for when, there in ((time - timedelta(microseconds=1), True), (time, False), (time + HOUR, False)):
        assert (await raw.fetchrow(read, db.agent_id, cache_module._hash("key"), when) is not None) is there


async def test_a_set_without_ttl_clears_the_old_one(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    calls: list[Any] = [
        lambda: db.set_cache("key", 2),
        lambda: db.set_caches({"key": 2}),
        lambda: db.set_caches([{"key": "key", "value": 2, "ttl": None}], ttl=5),
        lambda: db.compare_and_set_cache("key", 1, 2),
    ]
    for call in calls:
        await db.set_cache("key", 1, HOUR)
        assert (await stored(raw, db))["key"] is not None
        assert await call() is True
        assert await stored(raw, db) == {"key": None}
        await db.set_cache("key", 3, HOUR)
        assert (await stored(raw, db))["key"] is not None, "and the other way round"


async def test_expired_entries_come_back_to_life_when_they_are_set(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    await db.set_caches({"a": 1, "b": 1}, ttl=HOUR)
    await expire(raw, db, "a", "b")
    await db.set_cache("a", 2)
    await db.set_caches({"b": 2}, ttl=HOUR)
    assert await db.get_caches(["a", "b"]) == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    "bad",
    [
        0,
        -1,
        -0.5,
        float("nan"),
        float("inf"),
        1e-9,
        1e30,
        True,
        "60",
        [1],
        timedelta(0),
        timedelta(days=-1),
        timedelta.max,
    ],
)
async def test_a_ttl_that_is_none_is_refused(db: DatabaseAdapter, round_trips: list[str], bad: Any) -> None:
    calls: list[Any] = [
        lambda: db.set_cache("key", 1, bad),
        lambda: db.set_caches({"key": 1}, ttl=bad),
        lambda: db.set_caches([], ttl=bad),
        lambda: db.compare_and_set_cache("key", MISSING, 1, bad),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match="ttl"):
            await call()
    assert round_trips == []


async def test_the_longest_ttl_is_stored(db: DatabaseAdapter) -> None:
    await db.set_cache("key", 1, timedelta(days=365_000))
    assert await db.get_cache("key") == 1
    with pytest.raises(ArgumentError):
        await db.set_cache("key", 1, timedelta(days=365_001))


async def test_expiry_within_a_transaction_follows_the_clock(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    """The time of the transaction's begin would keep alive what expires during it."""
    async with db.transaction() as tx:
        begin = await raw.fetchval("SELECT clock_timestamp()")
        await tx.set_cache("key", 1, timedelta(milliseconds=1))
        while await raw.fetchval("SELECT clock_timestamp() <= $1", begin + timedelta(milliseconds=50)):
            pass
        assert await tx.get_cache("key", MISSING) is MISSING


# --- sweeping --------------------------------------------------------------------------------------------------------


async def test_sweep_deletes_what_has_expired_and_nothing_else(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    db, other = await make_db(), await make_db()
    for adapter in (db, other):
        await adapter.set_caches({f"old {i}": i for i in range(10)}, ttl=HOUR)
        await expire(raw, adapter, *(f"old {i}" for i in range(10)))
        await adapter.set_caches({"live": 1}, ttl=HOUR)
        await adapter.set_cache("for ever", 1)
    await raw.execute(
        "UPDATE elizasql.cache SET expires_at = expires_at - interval '1 day' WHERE agent_id = $1 AND key = 'old 7'",
        db.agent_id,
    )
    assert await db.sweep_cache(0) == 0
    assert await db.sweep_cache(1) == 1
    assert "old 7" not in await stored(raw, db), "the longest expired goes first"
    assert await db.sweep_cache(limit=4) == 4
    assert await db.sweep_cache() == 5
    assert await db.sweep_cache() == 0
    assert set(await stored(raw, db)) == {"live", "for ever"}
    assert len(await stored(raw, other)) == 12
    wrong: list[Any] = [-1, 1.5, "1", True]
    for bad in wrong:
        with pytest.raises(ArgumentError):
            await db.sweep_cache(bad)


async def test_what_has_expired_is_deleted_by_its_key(skew: Skew) -> None:
    """While the server knows of nothing that has expired, its time looks as narrow, and leads through all that has."""
    await skew.session.execute("UPDATE elizasql.cache SET expires_at = expires_at + interval '90 days'")
    await skew.session.execute("ANALYZE elizasql.cache")
    for name in ("sweep_cache", "set_caches"):
        assert "cache_pkey" in indexes(await plan_of(skew.session, SQL[name], {})), name


async def test_setting_entries_that_expire_sweeps_in_small_bits(
    db: DatabaseAdapter, make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    old = [f"old {i}" for i in range(100)]
    other = await make_db(dimension=None)
    await other.set_caches(dict.fromkeys(old, 2))
    await expire(raw, other, *old[50:])
    untouched = await stored(raw, other)
    await db.set_caches(dict.fromkeys(old, 1))
    await expire(raw, db, *old)
    for i in range(30):
        await db.set_cache("for ever", i)
    assert len(await stored(raw, db)) == 101, "entries that cannot expire leave nothing to sweep"
    for i in range(16):
        await db.set_cache("live", i, HOUR)
    assert len(await stored(raw, db)) == 102 - 32, "with the first of them"
    await db.set_cache("live", 16, HOUR)
    assert len(await stored(raw, db)) == 102 - 64
    assert await db.get_cache("live") == 16
    await db.set_caches({f"live {i}": i for i in range(18)}, ttl=HOUR)
    assert len(await stored(raw, db)) == 102 - 64 + 18 - 36
    for i in range(100):
        await db.set_cache(f"live {i % 20}", i, HOUR)
    assert set(await stored(raw, db)) == {"for ever", "live", *(f"live {i}" for i in range(20))}
    assert await stored(raw, other) == untouched, "another agent's entries, of the same keys"


async def test_adapters_that_set_few_entries_sweep_too(
    db: DatabaseAdapter, make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    for i in range(5):
        again = await make_db(db.agent_id, dimension=None)
        await again.set_cache(f"seen {i}", i, HOUR)
        await expire(raw, db, f"seen {i}")
    assert set(await stored(raw, db)) == {"seen 4"}


async def test_a_transaction_does_not_sweep(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    await db.set_caches({"old 1": 1, "old 2": 1})
    await expire(raw, db, "old 1", "old 2")
    async with db.transaction() as tx:
        for i in range(20):
            await tx.set_cache("live", i, HOUR)
        await tx.set_caches({f"live {i}": i for i in range(20)}, ttl=HOUR)
    assert {"old 1", "old 2"} <= set(await stored(raw, db))
    assert await db.sweep_cache() == 2


async def test_a_sweep_takes_no_callers_connection_and_stays_in_its_transaction(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    db = await make_db(pool_max_size=1)
    await db.set_caches({"a": 1, "b": 2})
    await expire(raw, db, "a", "b")
    with suppress(ZeroDivisionError):
        async with db.transaction() as tx:
            assert await tx.sweep_cache(1) == 1
            assert await db.sweep_cache() == 1
            raise ZeroDivisionError
    assert await db.sweep_cache() == 1, "the one that came back"


async def test_what_was_set_in_transactions_is_made_up_for_outside(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    old = [f"old {i}" for i in range(1100)]
    async with db.transaction() as tx:
        await tx.set_caches(dict.fromkeys(old, 1), ttl=HOUR)
        async with tx.transaction() as inner:
            await inner.set_cache("live", 0, HOUR)
    await expire(raw, db, *old)
    await db.set_cache("for ever", 1)
    assert len(await stored(raw, db)) == 1102 - 1000, "little by little"
    await db.set_cache("for ever", 2)
    assert set(await stored(raw, db)) == {"for ever", "live"}


async def test_compare_and_set_sweeps_too(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], round_trips: list[str]
) -> None:
    old = [f"old {i}" for i in range(100)]
    await db.set_caches(dict.fromkeys(old, 1))
    await expire(raw, db, *old)
    for i in range(16):
        assert await db.compare_and_set_cache(f"seen {i}", MISSING, i, HOUR) is True
    assert len(await stored(raw, db)) == 116 - 32
    round_trips.clear()
    assert await db.compare_and_set_cache("seen 15", 15, 16, HOUR) is True
    assert len(round_trips) == 2
    assert len(await stored(raw, db)) == 116 - 64
    for i in range(100):
        assert await db.compare_and_set_cache(f"seen {16 + i}", MISSING, i, HOUR) is True
    assert not set(old) & set(await stored(raw, db))


async def test_a_sweep_that_fails_does_not_fail_what_was_asked_for(
    db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_value, failed = db._executor.fetch_value, []

    async def fail_to_sweep(statement: Statement, **params: Any) -> Any:
        if statement is SQL["sweep_cache"]:
            failed.append(params)
            raise UnknownOutcomeError("the connection was lost")
        return await fetch_value(statement, **params)

    monkeypatch.setattr(db._executor, "fetch_value", fail_to_sweep)
    for i in range(16):
        assert await db.compare_and_set_cache(f"seen {i}", MISSING, i, HOUR) is True
    assert len(failed) == 1


async def test_a_sweep_spares_what_the_same_statement_sets(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    keys = [f"key {i}" for i in range(40)]
    await db.set_caches(dict.fromkeys(keys, 1))
    await expire(raw, db, *keys)
    await db.set_caches(dict.fromkeys(keys[:20], 2), ttl=HOUR)
    assert await db.get_caches(keys) == dict.fromkeys(keys[:20], 2)
    assert set(await stored(raw, db)) == set(keys[:20])


async def test_sweeps_and_sets_do_not_wait_for_each_other(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db()
    second = await make_db(db.agent_id)
    keys = [f"key {i}" for i in range(60)]
    for turn in range(5):
        await db.set_caches(dict.fromkeys(keys, -1))
        await expire(raw, db, *keys)
        await asyncio.gather(
            db.set_caches(dict.fromkeys(keys[:30], turn), ttl=HOUR),
            second.set_caches(dict.fromkeys(keys[29::-1], turn), ttl=HOUR),
            db.sweep_cache(),
            second.sweep_cache(),
            *(db.set_cache(key, turn, HOUR) for key in keys[:10]),
        )
        assert await db.get_caches(keys) == dict.fromkeys(keys[:30], turn)
    await db.sweep_cache()
    assert set(await stored(raw, db)) == set(keys[:30])


@pytest.mark.parametrize("by_itself", [True, False])
async def test_a_sweep_skips_what_is_being_set(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], by_itself: bool
) -> None:
    await db.set_caches({"a": 1, "b": 1})
    await expire(raw, db, "a", "b")
    async with db.transaction() as tx:
        await tx.set_cache("a", 2)
        if by_itself:
            assert await db.sweep_cache() == 1
        else:
            await db.set_caches({f"new {i}": i for i in range(20)}, ttl=HOUR)
    assert await db.get_cache("a") == 2
    assert "b" not in await stored(raw, db)


async def test_sets_and_deletes_in_any_order_do_not_wait_for_each_other(make_db: MakeAdapter) -> None:
    first = await make_db(batch_size=7)
    second = await make_db(first.agent_id)
    values = {f"key {i}": i for i in range(50)}
    keys = list(values)
    for _ in range(10):
        await asyncio.gather(
            first.set_caches(values),
            second.set_caches(dict(reversed(values.items()))),
            second.delete_caches(keys),
            first.delete_caches(keys[::-1]),
            second.set_caches(values, ttl=HOUR),
        )
    await first.set_caches(values)
    assert await second.get_caches(keys) == values


@pytest.mark.parametrize("write", ["set", "delete"])
async def test_a_batch_locks_entries_in_the_order_of_their_hashes(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], write: str
) -> None:
    """Somebody has the first entry: then all behind it are still to be had, also those of other chunks."""
    db = await make_db(batch_size=2)
    keys = sorted((f"key {i}" for i in range(6)), key=lambda key: hashlib.sha256(key.encode()).digest(), reverse=True)
    await db.set_caches(dict.fromkeys(keys, 0))
    first = "SELECT FROM elizasql.cache WHERE agent_id = $1 ORDER BY key_hash LIMIT 1 FOR UPDATE"
    free = "SELECT FROM elizasql.cache WHERE agent_id = $1 FOR UPDATE SKIP LOCKED"
    async with raw.transaction():
        await raw.execute(first, db.agent_id)
        call = db.set_caches(dict.fromkeys(keys, 1)) if write == "set" else db.delete_caches(keys)
        waiting = asyncio.ensure_future(call)
        await blocked_pid(raw, waiting)
        assert len(await raw.fetch(free, db.agent_id)) == len(keys)
    assert await waiting


async def test_a_batch_sweeps_when_it_waits_for_nobody_any_more(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """Somebody has an entry of its second chunk, and sets an expired one, whose hash is greater, behind it."""
    db = await make_db(batch_size=2)
    keys = sorted((f"key {i}" for i in range(5)), key=lambda key: hashlib.sha256(key.encode()).digest())
    await db.set_caches(dict.fromkeys(keys, 0))
    await expire(raw, db, keys[-1])
    change = "UPDATE elizasql.cache SET value = '2', expires_at = NULL WHERE agent_id = $1 AND key = $2"
    setting = db.set_caches(dict.fromkeys(keys[:4], 1), ttl=HOUR)
    await overtaken(raw, setting, (change, db.agent_id, keys[2]), (change, db.agent_id, keys[-1]))
    assert db._meter.retries == 0
    assert await db.get_caches(keys) == {**dict.fromkeys(keys[:4], 1), keys[-1]: 2}


# --- compare and set -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "expected", "equal"),
    [
        ({"a": 1, "b": [2]}, {"b": [2], "a": 1}, True),
        ({"a": 1}, {"a": 1.0}, True),
        ([1, 2], [2, 1], False),
        (None, None, True),
        (None, MISSING, False),
        (0, False, False),
        ("1", 1, False),
        ("", None, False),
        ({"a": None}, {}, False),
        ("a\ufffd", "a\x00", True),
    ],
)
async def test_compare_and_set(db: DatabaseAdapter, now: Any, expected: Any, equal: bool) -> None:
    await db.set_caches({"key": now, "another of the same value": now})
    assert await db.compare_and_set_cache("key", expected, "new") is equal
    assert await db.get_cache("key") == ("new" if equal else now)
    assert await db.get_cache("another of the same value") == now


async def test_compare_and_set_where_nothing_is(db: DatabaseAdapter) -> None:
    assert await db.compare_and_set_cache("key", None, 1) is False
    assert await db.get_cache("key", MISSING) is MISSING
    assert await db.compare_and_set_cache("key", MISSING, 1) is True
    assert await db.compare_and_set_cache("key", MISSING, 2) is False
    assert await db.get_cache("key") == 1


async def test_of_concurrent_creators_one_succeeds(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    first = await make_db()
    adapters = [first, *[await make_db(first.agent_id) for _ in range(3)]]
    await first.set_cache("expired", 0, HOUR)
    await expire(raw, first, "expired")
    for key in ("new", "expired"):
        won = await asyncio.gather(
            *(adapter.compare_and_set_cache(key, MISSING, i) for i, adapter in enumerate(adapters * 5))
        )
        assert won.count(True) == 1
        assert await first.get_cache(key) == won.index(True)


async def test_concurrent_increments_lose_nothing(make_db: MakeAdapter) -> None:
    first = await make_db()
    adapters = [first, *[await make_db(first.agent_id) for _ in range(3)]]

    async def increment(db: DatabaseAdapter) -> None:
        while True:
            now = await db.get_cache("counter", MISSING)
            if await db.compare_and_set_cache("counter", now, 1 if now is MISSING else now + 1):
                return

    await asyncio.gather(*(increment(adapter) for adapter in adapters for _ in range(5)))
    assert await first.get_cache("counter") == 20


# --- all or nothing, another agent, round trips, plans ---------------------------------------------------------------


async def test_a_set_of_many_is_all_or_nothing(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db(batch_size=5)
    with pytest.raises(RuntimeError):
        async with db.transaction() as tx:
            await tx.set_caches({str(i): i for i in range(12)})
            raise RuntimeError
    assert await stored(raw, db) == {}
    await db.delete_agent(db.agent_id)
    with pytest.raises(ForeignKeyError):
        await db.set_caches({str(i): i for i in range(12)})
    with pytest.raises(ForeignKeyError):
        await db.set_cache("key", 1)
    with pytest.raises(ForeignKeyError):
        await db.compare_and_set_cache("key", MISSING, 1)
    assert await stored(raw, db) == {}


async def test_another_agents_entries_are_out_of_reach(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    mine, other = await make_db(), await make_db()
    await other.set_caches({"key": "theirs", "old": 1})
    await expire(raw, other, "old")
    assert await mine.get_cache("key", MISSING) is MISSING
    assert await mine.get_caches(["key"]) == {}
    assert await mine.compare_and_set_cache("key", "theirs", "stolen") is False
    assert await mine.compare_and_set_cache("key", MISSING, "mine") is True
    await mine.set_caches({f"live {i}": 1 for i in range(20)}, ttl=HOUR)
    assert await mine.sweep_cache() == 0
    await mine.delete_caches(["key", "old"])
    assert set(await stored(raw, other)) == {"key", "old"}
    assert await other.get_cache("key") == "theirs"
    await other.delete_agent(other.agent_id)
    assert await stored(raw, other) == {}


async def test_one_round_trip_each(make_db: MakeAdapter, round_trips: list[str]) -> None:
    db = await make_db(batch_size=50, pool_min_size=1)
    values = {f"key {i}": i for i in range(50)}
    calls: list[Any] = [
        lambda: db.set_cache("key", 1),
        lambda: db.set_cache("key", 1, HOUR),
        lambda: db.set_caches(values),
        lambda: db.set_caches(values, ttl=HOUR),
        lambda: db.get_cache("key"),
        lambda: db.get_caches(list(values)),
        lambda: db.compare_and_set_cache("key", 1, 2),
        lambda: db.compare_and_set_cache("key", MISSING, 2),
        db.sweep_cache,
        lambda: db.delete_cache("key"),
        lambda: db.delete_caches(list(values)),
        *[lambda: db.set_cache("key", 1, HOUR)] * 20,
    ]
    for call in calls:
        await call()  # a connection looks up the types of its parameters when it meets them first
    for number, call in enumerate(calls):
        round_trips.clear()
        await call()
        assert len(round_trips) == 1, (number, round_trips)


async def test_nothing_in_nothing_out_without_a_round_trip(db: DatabaseAdapter, round_trips: list[str]) -> None:
    round_trips.clear()
    assert await db.get_caches([]) == {}
    assert await db.set_caches([]) is True
    assert await db.set_caches({}) is True
    assert await db.delete_caches(iter(())) is True
    assert round_trips == []


async def test_a_large_agent_among_small_ones_is_read_by_the_index(skew: Skew) -> None:
    one = {"key_hash": skew.key_hash}
    new: dict[str, Any] = {"key": "key 5", "value": "2", "ttl": "1 hour"}
    many = {"keys": ["key 5"], "key_hashes": [skew.key_hash], "values": ["2"], "ttls": ["1 hour"], "swept": 32}
    statements: dict[str, dict[str, Any]] = {
        "get_cache": one,
        "get_caches": {"key_hashes": [skew.key_hash]},
        "set_cache": new,
        "set_caches": many,
        "compare_and_set_cache": {**one, "expected": "2", "value": "3", "ttl": None},
        "set_missing_cache": new,
        "sweep_cache": {"count": 10},
        "delete_caches": {"key_hashes": [skew.key_hash]},
    }
    for name, params in statements.items():
        await skew.check(SQL[name], **params)
