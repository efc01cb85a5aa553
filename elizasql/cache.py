"""Cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any, TypeAlias

from . import _codecs
from ._statements import SQL
from ._store import Store, read_each
from .errors import ArgumentError, ElizaSQLError, show
from .models import MISSING, Missing
from .types import JSON

Ttl: TypeAlias = "float | timedelta | None"
"""How long an entry is there: seconds or a timedelta; None: until it is deleted."""

# Key, encoded value, and how long it is there.
_Entry: TypeAlias = "tuple[str, bytes, timedelta | None]"

# Expired entries are swept along with an adapter's first entry that can expire and every 16th after it, two for each
# that came: what has expired does not pile up, nor where adapters are open for a few calls only. Within every write it
# would cost 50 us of the server, more than the write itself. Not in a transaction, which would hold the locks to its
# end: what came there is made up for outside, 500 entries with a call.
_SWEEP_EVERY = 16
_SWEEP_EACH = 2
_MOST_MADE_UP = 500

# Far within the server's calendar, which ends in the year 294276.
_LONGEST_TTL = timedelta(days=365_000)


@dataclass(slots=True)
class Unswept:
    """What an adapter and its transactions have written since the last sweep.

    Attributes:
        entries: Those that can expire; as if there were some from the start, left by adapters that wrote fewer.
    """

    entries: int = _SWEEP_EVERY - 1


class Cache(Store):
    """JSON by key. What has expired is not there, whether it is deleted yet or not.

    Keys may be of any length. Values are what JSON can hold; JSON's null is a value, and other than a missing entry.
    """

    _unswept: Unswept

    # --- reading -----------------------------------------------------------------------------------------------------

    async def get_cache(self, key: str, default: Any = None, *, timeout: float | None = None) -> Any:
        """Get the value of a key, `default` where there is none.

        With `default=elizasql.MISSING` the answer tells a missing entry from one whose value is null, which is None.

        Statement: sql/cache.sql get_cache. One round trip. Source: getCache; differs: what has expired is not there,
        and a failure is an error.
        """
        row = await self._executor.fetch_row(SQL["get_cache"], agent_id=self.agent_id, key_hash=_hash(key))
        return default if row is None else row[0]

    async def get_caches(self, keys: Iterable[str], *, timeout: float | None = None) -> dict[str, Any]:
        """Get the values of several keys; keys that are missing are left out.

        Statement: sql/cache.sql get_caches. One round trip. Source: getCaches.
        """
        hashes = {key: _hash(key) for key in _read_keys(keys)}
        if not hashes:
            return {}
        rows = await self._executor.fetch(SQL["get_caches"], agent_id=self.agent_id, key_hashes=list(hashes.values()))
        found: dict[bytes, Any] = dict(rows)
        return {key: found[key_hash] for key, key_hash in hashes.items() if key_hash in found}

    # --- writing -----------------------------------------------------------------------------------------------------

    async def set_cache(self, key: str, value: JSON, ttl: Ttl = None, *, timeout: float | None = None) -> bool:
        """Set the value of a key; True.

        Args:
            key: The key.
            value: What JSON can hold, None for null included.
            ttl: How long it is there, in seconds or as a timedelta; None: until it is deleted, also when the value
                before had a limit.

        Raises:
            ArgumentError: The value is not JSON, or the ttl is not above 0.
            ForeignKeyError: The agent does not exist.

        Statement: sql/cache.sql set_cache, or set_caches when expired entries are to be swept. One round trip. Source:
        setCache; differs: null can be stored, entries can expire, and a failure is an error.
        """
        row = _key(key), _encode(value), _as_ttl(ttl)
        if swept := self._count_to_sweep([row[2]]):
            await self._set_caches([row], swept=swept)
        else:
            await self._executor.execute(SQL["set_cache"], agent_id=self.agent_id, key=row[0], value=row[1], ttl=row[2])
        return True

    async def set_caches(
        self, entries: Iterable[Mapping[str, Any]] | Mapping[str, Any], ttl: Ttl = None, *, timeout: float | None = None
    ) -> bool:
        """Set the values of several keys, all or none; True. Of two values for one key the last counts.

        Args:
            entries: Mappings with `key`, `value` and, when it has one of its own, `ttl`; or one mapping of keys to
                values.
            ttl: Of the entries that have none of their own.

        Raises:
            ArgumentError: Names the position of the entry that is wrong.
            ForeignKeyError: The agent does not exist.

        Statement: sql/cache.sql set_caches. One round trip a chunk. Source: setCaches.
        """
        rows = await _read_entries(entries, ttl)
        if rows:
            await self._set_caches(rows, swept=self._count_to_sweep([life for _, _, life in rows]))
        return True

    async def _set_caches(self, rows: Sequence[_Entry], *, swept: int) -> None:
        # In the order of the hashes over all chunks, so that two batches cannot wait for each other.
        in_order = sorted((_hash(row[0]), *row) for row in rows)
        chunks = [
            {
                "agent_id": self.agent_id,
                "key_hashes": [key_hash for key_hash, *_ in chunk],
                "keys": [key for _, key, _, _ in chunk],
                "values": [value for _, _, value, _ in chunk],
                "ttls": [life for *_, life in chunk],
                "swept": 0,
            }
            for chunk in self._chunks(in_order, lambda row: len(row[1]) + len(row[2]))
        ]
        # Last of all: what has expired has any hash, and whoever holds it must not wait for the rest of the batch.
        chunks[-1]["swept"] = swept
        await self._executor.fetch_chunks(SQL["set_caches"], chunks)

    def _count_to_sweep(self, lives: Sequence[timedelta | None]) -> int:
        """Count the entries that can expire; give how many expired ones are to be swept with them, 0 after few."""
        coming = sum(life is not None for life in lives)
        unswept = self._unswept
        unswept.entries += coming
        if unswept.entries < _SWEEP_EVERY or self._executor.in_transaction:
            return 0
        made_up = min(unswept.entries, coming + _MOST_MADE_UP)
        unswept.entries -= made_up
        return _SWEEP_EACH * made_up

    async def compare_and_set_cache(
        self, key: str, expected: JSON | Missing, value: JSON, ttl: Ttl = None, *, timeout: float | None = None
    ) -> bool:
        """Set the value of a key if its value is the expected one; False when it is not.

        Of concurrent calls that expect the same value exactly one succeeds.

        Args:
            key: The key.
            expected: Its value now, compared as the server compares jsonb: the order of an object's keys does not
                matter, 1 and 1.0 are equal. `elizasql.MISSING`: only if there is no entry. What has expired is not
                there.
            value: Its value from now on.
            ttl: As in `set_cache`.

        Raises:
            As `set_cache`.

        Statement: sql/cache.sql compare_and_set_cache, or set_missing_cache. One round trip; one more,
        sweep_cache, when expired entries are to be swept. Source: compareAndSetCache.
        """
        life = _as_ttl(ttl)
        params: dict[str, Any] = {"agent_id": self.agent_id, "value": _encode(value), "ttl": life}
        if isinstance(expected, Missing):
            statement = SQL["set_missing_cache"]
            params["key"] = _key(key)
        else:
            statement = SQL["compare_and_set_cache"]
            params |= {"key_hash": _hash(key), "expected": _codecs.encode_json(expected, "expected")}
        if swept := self._count_to_sweep([life]):
            # Nobody has asked for it: whether the server answers, the call itself tells.
            with suppress(ElizaSQLError):
                await self._executor.fetch_value(SQL["sweep_cache"], agent_id=self.agent_id, count=swept)
        return bool(await self._executor.fetch_value(statement, **params))

    # --- deleting ----------------------------------------------------------------------------------------------------

    async def delete_cache(self, key: str, *, timeout: float | None = None) -> bool:
        """Delete the entry of a key; True, also when there was none: either way there is none now.

        Statement: sql/cache.sql delete_caches. Source: deleteCache; differs: a failure is an error.
        """
        return await self.delete_caches([key])

    async def delete_caches(self, keys: Iterable[str], *, timeout: float | None = None) -> bool:
        """Delete the entries of several keys, all or none; True as for `delete_cache`.

        Statement: sql/cache.sql delete_caches. One round trip. Source: deleteCaches.
        """
        hashes = sorted({_hash(key) for key in _read_keys(keys)})
        if hashes:
            await self._executor.execute(SQL["delete_caches"], agent_id=self.agent_id, key_hashes=hashes)
        return True

    async def sweep_cache(self, limit: int | None = None, *, timeout: float | None = None) -> int:
        """Delete entries that have expired, the longest expired first, and give how many went.

        Nobody needs to call it who sets entries that can expire outside transactions, too: that sweeps, also for those
        that were set in transactions.

        Args:
            limit: At most so many; None: all.

        Statement: sql/cache.sql sweep_cache. One round trip. Source: none.
        """
        count = _codecs.as_optional_count(limit, "limit")
        if count == 0:
            return 0
        swept: int = await self._aside.fetch_value(SQL["sweep_cache"], agent_id=self.agent_id, count=count)
        return swept


def _key(key: object) -> str:
    return _codecs.as_text(key, "key")


def _hash(key: object) -> bytes:
    """Give what the server makes of a key, too; made here, it saves a lookup a third of its time there."""
    return sha256(_key(key).encode()).digest()


def _read_keys(keys: Iterable[str]) -> list[str]:
    return list(_codecs.as_collection(keys, "keys must be a collection of strings"))


def _encode(value: object) -> bytes:
    if isinstance(value, Missing):
        raise ArgumentError("value is missing")
    return _codecs.encode_json(value, "value")


def _as_ttl(ttl: object) -> timedelta | None:
    if ttl is None:
        return None
    life = ttl
    if _codecs.is_number(life):
        try:
            life = timedelta(seconds=float(life))
        except (OverflowError, ValueError):
            raise ArgumentError(f"ttl is not a time: {show(ttl, 40)}") from None
    if not isinstance(life, timedelta):
        raise ArgumentError(f"ttl must be seconds or a timedelta, not {type(ttl).__name__}")
    if not timedelta(0) < life <= _LONGEST_TTL:
        raise ArgumentError(f"ttl must be above 0 and at most {_LONGEST_TTL.days} days, not {show(ttl, 40)}")
    return life


async def _read_entries(entries: Any, ttl: Ttl) -> list[_Entry]:
    """Read the entries, every key once, the last one's."""
    if isinstance(entries, Mapping):
        entries = [{"key": key, "value": value} for key, value in entries.items()]
    default = _as_ttl(ttl)
    read = await read_each(entries, "entry", lambda entry: _read_entry(entry, default), names="entries")
    return list({entry[0]: entry for entry in read}.values())


def _read_entry(entry: object, default: timedelta | None) -> _Entry:
    if not isinstance(entry, Mapping):
        raise ArgumentError(f"expected a mapping with key and value, not {type(entry).__name__}")
    unknown = entry.keys() - {"key", "value", "ttl"}
    if unknown:
        raise ArgumentError(f"an entry has no {', '.join(sorted(map(show, unknown)))}")
    life = _as_ttl(entry["ttl"]) if "ttl" in entry else default
    return _key(entry.get("key")), _encode(entry.get("value", MISSING)), life
