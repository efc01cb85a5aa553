"""The base of the domain classes: what each of them needs of the adapter."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Literal, TypeVar
from uuid import UUID

import asyncpg

from . import _codecs
from ._calls import Meter, bound_methods, note_new_id
from ._executor import Executor
from ._indexer import Indexer
from ._statements import SQL
from .config import Config
from .errors import ArgumentError, IntegrityError, UniqueViolationError, show
from .models import Model

T = TypeVar("T")
_Twice = Literal["first", "last", "together"]


# The server takes no message of 1 GB, and ends the connection: 60 documents of 20 MB could not be stored together.
_CHUNK_BYTES = 1 << 26

# Rows that are checked and encoded without leaving the event loop, which takes 15 to 30 us for a memory: other calls of
# the process must not wait for a whole batch.
READ_AT_ONCE = 64

# What the server says of a key, its columns and their values; and of a row that breaks a rule, which begins with the
# agent and the id, and may name other rows behind them.
_KEY = re.compile(r"[^(]*\(([\w, ]+)\)=\((.*)\)", re.DOTALL)
_ROW = re.compile(r"[^(]*\([0-9a-f-]{36}, ([0-9a-f-]{36}),")

# A greater age leads out of the server's calendar, and there is nothing as old.
_LONGEST_AGE = timedelta(days=365 * 1000)

# Below it a number is no time in milliseconds that anything would be older than, but an age: of years even in
# milliseconds. Taken for a time in 1970 it would delete nothing, and nobody would notice.
_LEAST_TIME = 1e11


class Store:
    """A part of the adapter: statements of one domain, scoped to one agent.

    Attributes:
        agent_id: The agent whose rows this adapter reads and writes.
        config: The settings in force.
    """

    agent_id: UUID
    config: Config
    _address: str
    _executor: Executor
    _background: Executor
    _indexer: Indexer
    _meter: Meter

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        bound_methods(cls)

    @property
    def _inline(self) -> bool:
        return self.config.indexing == "inline"

    @property
    def _aside(self) -> Executor:
        """What runs work that nobody waits for: it takes no caller's connection, but stays in a transaction."""
        return self._executor if self._executor.in_transaction else self._background

    async def _read_all(
        self,
        kind: type[Model],
        values: Iterable[object],
        *,
        needed: Sequence[str] = (),
        new_ids: bool = True,
        read: Callable[[Any], dict[str, Any]] | None = None,
        twice: _Twice = "first",
    ) -> tuple[list[UUID], list[dict[str, Any]]]:
        """Check a batch before any I/O.

        Args:
            kind: The model.
            values: Models or mappings.
            needed: Fields that must be given.
            new_ids: Make an id for whatever has none; otherwise that is an error.
            read: How a value is read; None: as the model does.
            twice: Of two rows with one id, which one counts; "together": what the later one sets, over the earlier.

        Returns:
            The id of every value in the order given; and the fields of each row, every id once.

        Raises:
            ArgumentError: Names the position of the row that is wrong.
        """
        given = await self._read_each(kind, values, needed=needed, new_ids=new_ids, read=read)
        rows: dict[UUID, dict[str, Any]] = {}
        for row in given:
            if twice == "first":
                rows.setdefault(row["id"], row)
            elif twice == "together" and row["id"] in rows:
                rows[row["id"]] |= {name: field for name, field in row.items() if field is not None}
            else:
                rows[row["id"]] = row
        return [row["id"] for row in given], list(rows.values())

    async def _read_partial(
        self,
        kind: type[Model],
        values: Iterable[object],
        *,
        needed: Sequence[str] = (),
        fixed: Sequence[str] = (),
        new_ids: bool = False,
        read: Callable[[Any], dict[str, Any]] | None = None,
    ) -> tuple[list[UUID], list[dict[str, Any]]]:
        """Check a batch of updates, or of upserts, before any I/O.

        Args:
            kind: The model.
            values: Models or mappings: of a mapping its keys are given, of a model what is not None.
            needed: Fields that must be given.
            fixed: Fields that None cannot clear.
            new_ids: Make an id for whatever has none; otherwise that is an error.
            read: How a value is read; None: as the model does.

        Returns:
            The id of every value in the order given; and the fields that are given, ordered by id, every id once: what
            several values give for one id is put together, the later over the earlier.

        Raises:
            ArgumentError: Names the position of the row that is wrong.
        """
        given = await self._read_each(kind, values, needed=needed, fixed=fixed, new_ids=new_ids, read=read)
        rows: dict[UUID, dict[str, Any]] = {}
        for row in given:
            rows[row["id"]] = rows.get(row["id"], {}) | row
        return [row["id"] for row in given], sorted(rows.values(), key=lambda row: row["id"].int)

    async def _read_each(
        self,
        kind: type[Model],
        values: Iterable[object],
        *,
        needed: Sequence[str] = (),
        fixed: Sequence[str] = (),
        new_ids: bool = True,
        read: Callable[[Any], dict[str, Any]] | None = None,
    ) -> list[dict[str, Any]]:
        """Check a batch row by row, as `_read_all` and `_read_partial` say; ids that come twice stand there twice."""
        read_row = partial(self._read_row, read=read or kind.read, needed=needed, fixed=fixed, new_ids=new_ids)
        return await read_each(values, kind.__name__, read_row)

    def _read_row(
        self,
        value: object,
        read: Callable[[Any], dict[str, Any]],
        *,
        needed: Sequence[str] = (),
        fixed: Sequence[str] = (),
        new_ids: bool = True,
    ) -> dict[str, Any]:
        """Check one row, as `_read_all` and `_read_partial` say."""
        row = read(value)
        self._check_agent(row)
        if row.get("id") is None:
            if not new_ids:
                raise ArgumentError("id is missing")
            row["id"] = _codecs.new_id()
            note_new_id()
        need(row, *needed)
        for name in fixed:
            if name in row and row[name] is None:
                raise ArgumentError(f"{name} cannot be None")
        return row

    async def _get_by_ids(self, name: str, kind: Callable[..., T], ids: Iterable[object], what: str) -> list[T]:
        """Get those of some rows that exist, in the order of their ids, each once.

        Args:
            name: Of the statement.
            kind: The model.
            ids: As the caller gave them.
            what: What an error calls them.
        """
        wanted = _codecs.as_distinct_ids(ids, what)
        if not wanted:
            return []
        return [kind(*row) for row in await self._executor.fetch(SQL[name], agent_id=self.agent_id, ids=wanted)]

    async def _delete_by_ids(self, name: str, ids: Iterable[object], what: str, **params: Any) -> int:
        """Delete some rows, all or none, and give how many there were; `name`, `ids` and `what` as in `_get_by_ids`."""
        # In order, so that two batches cannot wait for each other; as numbers, a quarter of the time of 50,000 UUIDs.
        doomed = sorted(set(_codecs.as_ids(ids, what)), key=lambda id: id.int)
        if not doomed:
            return 0
        chunks = [{"agent_id": self.agent_id, "ids": chunk, **params} for chunk in self._chunks(doomed)]
        return sum(row[0] for row in await self._executor.fetch_chunks(SQL[name], chunks))

    def _refuse_in_transaction(self, name: str) -> None:
        if self._executor.in_transaction:
            raise ArgumentError(f"{name}() does not run in a transaction: call it on the adapter that was opened")

    def _check_agent(self, row: dict[str, Any]) -> None:
        """Take the agent out of a row, and refuse another one: it would be written to this one."""
        self._check_agent_id(row.pop("agent_id", None))

    def _check_agent_id(self, agent_id: UUID | None) -> None:
        """Refuse another agent than the adapter's; None is this one."""
        if agent_id is not None and agent_id != self.agent_id:
            raise ArgumentError(f"agent_id is {agent_id}, but this adapter belongs to agent {self.agent_id}")

    def _chunks(self, rows: Sequence[T], weigh: Callable[[T], int] | None = None) -> Iterator[Sequence[T]]:
        """Cut a batch into the pieces that one statement takes.

        Args:
            rows: `config.batch_size` of them make a piece.
            weigh: Gives the bytes of a row, where it may have many: fewer rows make a piece then.
        """
        start = size = 0
        for position, row in enumerate(rows):
            weight = 0 if weigh is None else weigh(row)
            if position - start == self.config.batch_size or (size and size + weight > _CHUNK_BYTES):
                yield rows[start:position]
                start, size = position, 0
            size += weight
        if rows:
            yield rows[start:]

    async def _write_under_two_keys(self, name: str, chunks: Sequence[dict[str, Any]]) -> list[asyncpg.Record]:
        """Run a batch write whose rows have two unique keys, of which ON CONFLICT heeds one.

        A concurrent call with the same rows may hold the other one. By the time that this one is refused, that call has
        ended, and a second run finds its rows under the key that is heeded; a true conflict is refused again.
        """
        try:
            return await self._executor.fetch_chunks(SQL[name], chunks)
        except UniqueViolationError:
            if self._executor.in_transaction:  # which has ended with it
                raise
            return await self._executor.fetch_chunks(SQL[name], chunks)

    async def _write_rows(
        self,
        name: str,
        key: str,
        kind: type[Model],
        rows: Sequence[Mapping[str, Any]],
        ids: Iterable[UUID],
        *,
        form: Callable[[Sequence[Mapping[str, Any]]], object] = list,
        **about: Any,
    ) -> list[asyncpg.Record]:
        """Run a write that takes a batch as jsonb, all or none; give what came back. No rows: nothing is sent.

        Args:
            name: Of the statement.
            key: The parameter that takes the rows.
            kind, rows, ids, form: As of `_encode_chunks`.
            **about: The other parameters, without the agent.
        """
        encoded = self._encode_chunks(kind, rows, ids, form=form)
        chunks = [{"agent_id": self.agent_id, key: chunk, **about} for chunk in encoded]
        if not chunks:
            return []
        return await naming_row(self._executor.fetch_chunks(SQL[name], chunks), kind.__name__, rows, ids)

    async def _create_in_order(
        self, name: str, key: str, kind: type[Model], values: Iterable[object], *, needed: Sequence[str]
    ) -> list[UUID]:
        """Create rows whose times, where none is given, keep the order given; give their ids in it.

        Args:
            name, key, kind: As of `_write_rows`.
            values, needed: As of `_read_all`.
        """
        ids, rows = await self._read_all(kind, values, needed=needed)
        positions = order_by_id(rows)
        if rows:
            encoded = zip(self._encode_chunks(kind, rows, ids), self._chunks(positions), strict=True)
            chunks = [
                {"agent_id": self.agent_id, key: chunk, "positions": where, "begins": number == 0}
                for number, (chunk, where) in enumerate(encoded)
            ]
            await naming_row(self._executor.fetch_chunks(SQL[name], chunks), kind.__name__, rows, ids)
        return ids

    async def _create_or_keep(
        self,
        name: str,
        key: str,
        kind: type[Model],
        values: Iterable[object],
        *,
        needed: Sequence[str],
        order: Callable[[dict[str, Any]], Any],
    ) -> list[tuple[UUID, bool]]:
        """Create rows whose place others may have; give for each the id that is stored, and whether it is new.

        Args:
            name, key, kind: As of `_write_rows`.
            values, needed: As of `_read_all`.
            order: The key to sort by, over all chunks, so that two batches cannot wait for each other.
        """
        asked, rows = await self._read_all(kind, values, needed=needed)
        rows.sort(key=order)
        answers = await self._write_rows(name, key, kind, rows, asked)
        stored: dict[UUID, tuple[UUID, bool]] = {}
        for chunk, (ids, created) in zip(self._chunks(rows), answers, strict=True):
            stored |= zip((row["id"] for row in chunk), zip(ids, created, strict=True), strict=True)
        return [stored[id] for id in asked]

    def _encode_chunks(
        self,
        kind: type[Model],
        rows: Sequence[Mapping[str, Any]],
        ids: Iterable[UUID],
        *,
        form: Callable[[Sequence[Mapping[str, Any]]], object] = list,
    ) -> list[bytes]:
        """Encode a batch as jsonb, a value for each chunk; the error of one that is not JSON names its position.

        Args:
            kind: The model.
            rows: The fields, every id once.
            ids: The id of every value in the order given.
            form: Makes the value of the rows of a chunk: an array of them, or something else.
        """
        try:
            return [_codecs.encode_json(form(chunk), f"a batch of {kind.__name__}") for chunk in self._chunks(rows)]
        except ArgumentError:
            positions: dict[UUID, int] = {}
            for position, id in enumerate(ids):
                positions.setdefault(id, position)
            for row in rows:
                _codecs.encode_json(row, f"{kind.__name__} at position {positions[row['id']]}")
            raise


async def read_each(values: Any, name: str, read: Callable[[Any], T], *, names: str | None = None) -> list[T]:
    """Read a batch, a value at a time, and leave the event loop to others now and then.

    What an iterator gives is read before it is asked for the next, which may stand in the same array. A collection is
    taken as it is now: others may change it meanwhile.

    Args:
        values: What the caller gave.
        name: What errors call a value.
        read: Checks one.
        names: What errors call several; None: as one.

    Raises:
        ArgumentError: `values` is no collection of several, or as `read`, naming the position of what is wrong.
    """
    rest = _codecs.as_collection(values, f"expected a collection of {names or name}")
    found: list[T] = []
    for value in tuple(values) if isinstance(values, Collection) else rest:
        try:
            found.append(read(value))
        except ArgumentError as error:
            error.args = (f"{name} at position {len(found)}: {error}",)
            raise
        if len(found) % READ_AT_ONCE == 0:
            await asyncio.sleep(0)
    return found


async def naming_row(write: Awaitable[T], name: str, rows: Iterable[Mapping[str, Any]], ids: Iterable[UUID]) -> T:
    """Wait for the write of a batch; the error of a row that the server refuses names its position.

    Args:
        write: What writes it.
        name: What errors call a row.
        rows: What is written, each with its id.
        ids: The id of every value in the order given.
    """
    try:
        return await write
    except IntegrityError as error:
        name_row(error, name, rows, enumerate(ids))
        raise


def name_row(
    error: IntegrityError, name: str, rows: Iterable[Mapping[str, Any]], places: Iterable[tuple[int, UUID]]
) -> None:
    """Put before the server's refusal of a batch where the row stands, of several that are refused the first one.

    Where the server does not tell which row it means, as when the role may not see its key, the error stays as it is.

    Args:
        error: The refusal.
        name, rows: As of `naming_row`.
        places: The positions and ids of what was given.
    """
    refused = {row["id"] for row in _find_refused(error.detail or "", rows)}
    positions: dict[UUID, list[str]] = {}
    for position, id in places:
        if id in refused:
            positions.setdefault(id, []).append(str(position))
    if positions:
        # One row may be made of several values; of very many the first ones do.
        where = ", ".join(next(iter(positions.values()))[:10])
        error.args = (f"{name} at position {where}: {error}",)


def _find_refused(detail: str, rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Give the rows of a batch that are what the server has refused, by its explanation."""
    if (key := _KEY.match(detail)) is not None:
        columns, values = key[1].split(", "), key[2].split(", ")
        if len(columns) != len(values):
            return []  # a text with a comma in it
        named = dict(zip(columns, values, strict=True))
        named.pop("agent_id", None)
    else:
        failing = _ROW.match(detail)
        named = {} if failing is None else {"id": failing[1]}
    found: list[Mapping[str, Any]] = []
    whole = True
    for row in rows:
        given = {name: "null" if row[name] is None else str(row[name]) for name in named.keys() & row.keys()}
        if given and given.items() <= named.items():
            found.append(row)
            whole = whole and len(given) == len(named)
    # An update may give a part of a key, whose rest stands in the table: of two such rows either may be the one.
    return found if whole or len(found) == 1 else []


def need(row: Mapping[str, Any], *names: str) -> None:
    """Refuse a row that lacks one of these fields."""
    for name in names:
        if row.get(name) is None:
            raise ArgumentError(f"{name} is missing")


def by_id(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Give rows as an object by id, for the statements that look up what is given of each."""
    return {str(row["id"]): row for row in rows}


def order_by_id(rows: list[dict[str, Any]]) -> list[int]:
    """Order a batch by id, over all its chunks, so that two batches cannot wait for each other.

    Returns:
        Where each row stood before, for those whose times keep the order given.
    """
    positions = sorted(range(len(rows)), key=lambda position: rows[position]["id"].int)
    rows[:] = [rows[position] for position in positions]
    return positions


def unwrap(kind: type[Model], key: str) -> Callable[[Any], dict[str, Any]]:
    """Give what reads an update: the fields of one, or the batch contract's form of it, {id, key: fields}."""

    def read(value: Any) -> dict[str, Any]:
        if not (isinstance(value, Mapping) and key in value):
            return kind.read(value)
        if set(value) != {"id", key}:
            raise ArgumentError(f"expected id and {key}, and nothing else")
        id = _codecs.as_id(value["id"])
        fields = kind.read(value[key])
        if fields.get("id") not in (None, id):
            raise ArgumentError(f"id is {id} outside and {fields['id']} inside")
        return fields | {"id": id}

    return read


def as_limit(count: int | None, limit: int | None) -> int | None:
    """Check the two names of "at most so many"."""
    if count is None and limit is None:
        return None
    if count is not None and limit is not None and count != limit:
        raise ArgumentError("count and limit are two names of one argument: give one")
    return _codecs.as_count(limit if count is None else count, "count")


def as_reach(count: int | None, skipped: int | None) -> int | None:
    """Give how many rows a part of the whole can have on a page, None where the page has no end."""
    # The server's numbers end where Python's do not.
    return None if count is None else min(count + (skipped or 0), 2**63 - 1)


def read_limits(older_than: object, keep: object) -> dict[str, Any]:
    """Check what is to be pruned, and give what a statement that prunes takes for its first batch.

    Args:
        older_than: A time, or an age on the server's clock.
        keep: How many of the newest stay; the caller looks for the oldest of these.
    """
    if older_than is None and keep is None:
        raise ArgumentError("give older_than, keep or both: there is no default that deletes everything")
    limits: dict[str, Any] = dict.fromkeys(("before", "age", "kept_time", "kept_id", "after_time", "after_id"))
    if isinstance(older_than, timedelta):
        if older_than < timedelta(0):
            raise ArgumentError(f"older_than must not be negative, not {show(older_than)}")
        limits["age"] = min(older_than, _LONGEST_AGE)
    elif _codecs.is_number(older_than) and 0 <= older_than < _LEAST_TIME:
        raise ArgumentError(
            f"older_than: {show(older_than)} milliseconds since 1970 are a time before 1973; "
            "give an age as a timedelta, and a time as an aware datetime"
        )
    else:
        limits["before"] = _codecs.as_optional_time(older_than, "older_than")
    _codecs.as_optional_count(keep, "keep")
    return limits


def read_cursor(kind: type[Model], cursor: Any, *, forward: bool = False) -> dict[str, Any]:
    """Check where a page is to go on: behind a row, or the time and the id of one.

    Statements read the exact time by the id. Where the row is gone the one that is given counts; of a time that JSON
    may have cut to milliseconds, also before a model was made of it, the rest of its millisecond is rather given twice
    than never. A time and an id are taken as they are.

    Args:
        kind: The model of the rows.
        cursor: A row, a mapping of one, (time, id), which JSON makes a list of, or None.
        forward: The page goes on with later rows, not with earlier ones.
    """
    if cursor is None:
        return {"cursor_time": None, "cursor_id": None}
    if isinstance(cursor, (tuple, list)):
        if len(cursor) != 2:
            raise ArgumentError(f"cursor must be a {kind.__name__}, or the time and the id of one")
        given, id = cursor
    else:
        row = kind.read(cursor)
        given, id = row.get("created_at"), row.get("id")
        if given is None or id is None:
            raise ArgumentError("cursor needs created_at and id")
    cut = not (isinstance(cursor, (tuple, list)) and isinstance(given, datetime))
    read = _codecs.as_optional_end if cut and not forward else _codecs.as_time
    return {"cursor_time": read(given, "cursor"), "cursor_id": _codecs.as_id(id, "cursor")}
