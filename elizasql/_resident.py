"""The resident tier: an agent's vectors of one type in the process, searched exactly.

What an agent asks of its memory again and again is one vector against its own few thousand. Where the contents of the
memories are held, too, one statement, `check_resident`, is sent that only tells what has changed, and while the server
is busy with it `Matrix` ranks the rows that are here. When nothing has changed, that is the answer; rows that were
written since come with it, are merged, and all is ranked again. Of what was updated or removed it tells only that: then
the contents are brought up to date in the background, and until that is done the server fetches the rows.

So it does where contents are not held, or the order hangs on less than the server's own arithmetic is off by: `Matrix`
finds the candidates; one statement, `fetch_resident`, fetches their rows, ranks them exactly, and tells in the same
snapshot what has changed since this process last looked. So a search is one round trip, two when something was updated
or removed or the order is too close to tell, and what it gives is what an exact search in the database gives at the
moment of the last one, whoever wrote what until then. As for `fetch_resident`:

- Rows that were written since are in the statement's ranking, and come back with it to be merged here. When there are
  too many for that, they are read first and the search is done again.
- Rows that were deleted or moved out of the scope are missing from it; a few candidates more than asked for are sent,
  and when those do not make up for it, the search is done again with more.
- `Matrix` says how similar a row that it did not send can be at most: the answer holds when the last row is above.

What cannot be answered here is left to the database: a search among more rows than are compared fast here, a type that
is not loaded yet or over the budget, and everything inside a transaction, which must see what it has written itself. Of
a type with more rows than that, what is asked of a room, a world or an entity can still be answered here.

`sql/resident.sql` says how a change is recognised.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Coroutine, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from uuid import UUID

from . import _codecs
from ._calls import current_deadline, end, spawn
from ._executor import Executor
from ._matrix import LISTED, Matrix, Row, size_of
from ._statements import SQL
from .config import Config
from .errors import ElizaSQLError
from .models import Memory
from .types import Embedding

logger = logging.getLogger("elizasql")

Snapshot = tuple[int, int, tuple[int, ...]]

# Candidates beyond those asked for: they stand in for rows that were deleted meanwhile.
_SPARE = 4

# A fetch brings fewer changes than this itself; more are read before the search is done again.
_MOST_CHANGES = 65

# Bytes of vectors that are read at once, as a page of a load or as changes: some milliseconds.
_PAGE_BYTES = 1 << 20
_CHANGES_BYTES = 8 << 20

# Times that a search is done here; each takes four times the candidates of the one before.
_ROUNDS = 6

# More memories than this are left to the server to rank: of a hundred, some two stand closer than it can tell.
_MOST_RANKED = 50

# Contents that are read at once, some milliseconds of the event loop's time, and bytes of them.
_CONTENTS = 500
_CONTENTS_BYTES = 1 << 20

# Listed memories that are compared at once.
_LISTED_AT_ONCE = 2000

# Seconds between two times that contents are brought up to date, and times as long as one took, at least.
_RENEWAL = 1.0
_RENEWAL_SHARE = 50

# In "auto" a type is loaded at this search of it: a load takes as much of the processor as some hundred searches save,
# so that a script which asks a few times does not pay for it; whoever asks that often goes on asking.
_LOAD_AFTER = 16

# So many components a search compares here, in a millisecond at most: measured, 25,000 vectors of 384 dimensions took
# 0.64 times what they take in the database, 50,000 0.72 times, 100,000 as long; of 1536 dimensions 10,000 as long.
_MOST_COMPONENTS = 40_000 * 384

# In "auto" fewer rows than this, of a type or in the scope of a search, are left to the database, which compares them
# all just as well: measured, rooms of 100 took 0.8 times what they take here, of 200 the same, of 500 1.2 times.
_LEAST = 200

# Seconds for which a tier that was just used is not put out for another: agents that take turns would do nothing but
# load one another out.
_REST = 10.0

# Seconds until a type that was too large or too small, or whose load failed, is looked at again; it may have changed.
_TOO_LARGE = 300.0
_TOO_SMALL = 30.0
_FAILED = 30.0

# Seconds for which nothing is loaded after more was written than can be merged: an import is likely still going on.
_CALM = 5.0

# Types of which an adapter keeps in mind how often they were asked, and parts of a type that were too large; names may
# be made up as they are needed.
_MOST_KNOWN = 1000

# What counts the memories of a part, the narrowest first.
_COUNTS = {
    "room_id": "count_memories_of_rooms",
    "entity_id": "count_memories_of_entity",
    "world_id": "count_memories_of_world",
}
Scope = Mapping[str, UUID]

# What a search filters by.
_SCOPE = ("room_id", "world_id", "entity_id", "only_unique")

# The columns of a memory come first in a row of fetch_resident.
_FIELDS = 12
_SIMILARITY = 11

# What is held of a memory comes last in a row of check_resident and of read_resident_contents.
_CONTENT = -4


# --- the tiers of the process ----------------------------------------------------------------------------------------


class Tier:
    """What the process holds of one agent's memories of one type.

    Attributes:
        matrix: The rows; None: not loaded. A load in another thread may put them out at any moment.
        granted: Bytes of the budget that it has, for the matrix and for the load of another.
        seen: The snapshot that they were read in, changes merged up to it.
        listed: The snapshot up to which updates and removals are known; None: contents are not held, or not yet.
        behind: Whether there were any since, or rows came without contents.
        quiet: Whether the last check told of nothing new.
        renew_at: When contents may be brought up to date again, by `time.monotonic`.
        life: The server's life in which its numbers of transactions count.
        used: When it was last asked, by `time.monotonic`.
        asked: Searches since it was last loaded or put out, while there is no matrix.
        loading: The task that loads it, or its contents.
        not_before: When it may be loaded, by `time.monotonic`.
        large_until: Until when it counts as one that has more rows than are searched as a whole, while there is no
            matrix, by `time.monotonic`.
        large_parts: By room, entity or world, until when it counts as one that has more rows than are searched.
        catching_up: Done when whoever reads many changes has ended.
        loaded_size: Rows that the load found.
        dropped: Rows that were found to be gone since.
    """

    __slots__ = (
        "__weakref__",
        "asked",
        "behind",
        "catching_up",
        "dropped",
        "granted",
        "large_parts",
        "large_until",
        "life",
        "listed",
        "loaded_size",
        "loading",
        "matrix",
        "not_before",
        "quiet",
        "renew_at",
        "seen",
        "used",
    )

    def __init__(self) -> None:
        self.matrix: Matrix | None = None
        self.granted = 0
        self.seen: Snapshot = (0, 0, ())
        self.listed: Snapshot | None = None
        self.behind = False
        self.quiet = True
        self.renew_at = 0.0
        self.life = ""
        self.used = 0.0
        self.asked = 0
        self.loading: asyncio.Task[None] | None = None
        self.not_before = 0.0
        self.large_until = 0.0
        self.large_parts: dict[UUID, float] = {}
        # Not a lock: one that was waited for holds its event loop, which holds the tier.
        self.catching_up: asyncio.Future[None] | None = None
        self.loaded_size = 0
        self.dropped = 0

    @property
    def outlived(self) -> bool:
        """Whether so much has gone since the load that another one pays, for the memory."""
        return self.dropped > self.loaded_size // 4 + 1000


class _Shelf:
    """The tiers of an event loop: all that somebody uses, and those that hold something or are about to."""

    def __init__(self) -> None:
        self.tiers: weakref.WeakValueDictionary[Any, Tier] = weakref.WeakValueDictionary()
        self.filled: set[Tier] = set()


# Tiers go with their event loop; the budget is the process's.
_shelves: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Shelf] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _forget() -> None:
    """Begin anew in a forked child: the loops, and what they hold, are the parent's."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()
    _shelves.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _shelf() -> _Shelf:
    with _lock:
        return _shelves.setdefault(asyncio.get_running_loop(), _Shelf())


def _open_shelves() -> list[_Shelf]:
    """Give the shelves whose loops can still run, and let go of what the others hold; under `_lock`.

    The garbage collector comes late for a loop that was closed, and never where a load was cut, which holds the loop:
    one after the other, such as those of blocking adapters, would use up the budget.
    """
    for reference in _shelves.keyrefs():
        loop = reference()
        if loop is not None and loop.is_closed():
            for tier in _shelves.pop(loop).filled:
                tier.matrix, tier.granted = None, 0
    return list(_shelves.values())


def _held() -> int:
    """Give the bytes that all tiers of the process have; under `_lock`."""
    return sum(tier.granted for shelf in _open_shelves() for tier in shelf.filled)


def _make_room(tier: Tier, needed: int, limit: int) -> int | None:
    """Put tiers out until `needed` bytes for this one fit beside the others; give how many went, None: it cannot be.

    The bytes are this tier's from then on: loads that run at the same time must not count on the same ones.
    """
    now = time.monotonic()
    with _lock:
        others = [(shelf, each) for shelf in _open_shelves() for each in shelf.filled if each is not tier]
        excess = needed + sum(each.granted for _, each in others) - limit
        out: list[tuple[_Shelf, Tier]] = []
        others = sorted((pair for pair in others if pair[1].loading is None), key=lambda pair: pair[1].used)
        # The contents of all go before the vectors of one.
        bare: list[tuple[Tier, Matrix]] = []
        for _, each in others:
            matrix = each.matrix
            if excess > 0 and matrix is not None and matrix.contents_size:
                excess -= matrix.contents_size
                bare.append((each, matrix))
        for shelf, each in others:
            if excess <= 0 or now - each.used < _REST:
                break
            excess -= each.granted - (0 if each.matrix is None else each.matrix.contents_size)
            out.append((shelf, each))
        if excess > 0:
            return None
        for each, matrix in bare:
            matrix.release_contents()
            each.listed, each.renew_at, each.granted = None, now + _TOO_LARGE, matrix.footprint
        for shelf, each in out:
            each.matrix = None
            each.asked = each.granted = 0
            shelf.filled.discard(each)
        tier.granted = needed
        _shelves[asyncio.get_running_loop()].filled.add(tier)
    return len(out)


def _is_later(snapshot: Snapshot, other: Snapshot) -> bool:
    """Tell whether more transactions have ended in a snapshot of the same server."""
    return (snapshot[1], -len(snapshot[2])) > (other[1], -len(other[2]))


# --- the adapter's side ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Stats:
    """What happened, as counts since the adapter was opened.

    Attributes:
        hits: Searches that were answered here.
        misses: Searches that were left to the database, those inside a transaction apart.
        repeats: Times that a search was done once more in the same way.
        deltas: Times that changes were merged.
        changes: Rows that were merged.
        checks: Searches that `check_resident` alone answered.
        renewals: Times that contents were brought up to date.
        loads: Types that were loaded.
        evictions: Types that were put out to make room.
    """

    hits: int = 0
    misses: int = 0
    repeats: int = 0
    deltas: int = 0
    changes: int = 0
    checks: int = 0
    renewals: int = 0
    loads: int = 0
    evictions: int = 0


class Resident:
    """An adapter's way to the tiers of its agent.

    Attributes:
        stats: What happened.
        off: Whether every search is left to the database.
    """

    def __init__(
        self, executor: Executor, agent_id: UUID, config: Config, address: str, *, guarded: bool = False
    ) -> None:
        self.stats = Stats()
        self._executor = executor
        self._agent_id = agent_id
        self._address = address
        self._mode = config.resident
        self._budget = int(config.resident_memory_mb * (1 << 20))
        self._max_vectors = config.resident_max_vectors
        self._least = _LEAST if self._mode == "auto" else 0
        # Policies may show at any time what nobody has changed: no transaction tells of it.
        self.off = self._mode == "off" or not self._budget or self._max_vectors == 0 or guarded
        self._tiers: dict[tuple[str, int], Tier] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def snapshot(self) -> dict[str, int]:
        """Give the counts; `vectors` and `bytes` that are held now: of this adapter's agent, and of the process."""
        matrices = [matrix for tier in self._tiers.values() if (matrix := tier.matrix) is not None]
        with _lock:
            held = _held()
        return {**asdict(self.stats), "vectors": sum(matrix.size for matrix in matrices), "bytes": held}

    def _most(self, dimension: int) -> int:
        """Give how many vectors a search compares here."""
        return _MOST_COMPONENTS // dimension if self._max_vectors is None else self._max_vectors

    def forget(self) -> None:
        """Let go of what is held: the agent has moved to another width."""
        for tier in self._tiers.values():
            if tier.loading is not None:
                tier.loading.cancel()
            self._give_up(tier, 0.0)
        self._tiers.clear()

    async def close(self) -> None:
        """End the loads that this adapter has begun. What is loaded stays for other adapters of the process."""
        self._closed = True
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()  # all, before any can meet a closed executor: that would put the tier off for others, too
        for task in tasks:
            await end(task)

    async def search(self, executor: Executor, vector: Embedding, params: Mapping[str, Any]) -> list[Memory] | None:
        """Search here, where that can be done; None: ask the database.

        Args:
            executor: The caller's.
            vector: What is asked, checked.
            params: Those of `search_memories`, the scope included: embedding, agent_id, type, room_id, world_id,
                entity_id, only_unique, threshold, count, include_embedding.

        Statement: sql/resident.sql check_resident or fetch_resident. One round trip; more after many changes.
        """
        if executor.in_transaction:
            return None
        tier = self._find_tier(params["type"], vector.shape[0])
        now = time.monotonic()
        scope = next(({name: params[name]} for name in _COUNTS if params[name] is not None), None)
        most = self._most(vector.shape[0])
        matrix = tier.matrix
        large = now < tier.large_until if matrix is None else matrix.size > most
        outgrown = tier.outlived or (large and tier.loaded_size <= most)
        if outgrown and matrix is not None and now >= tier.not_before:
            # By rows that are gone, or may be: nobody tells of these, and no search meets them any more.
            self._begin_load(tier, params["type"], vector.shape[0])
        found = None
        if scope is not None or not large:
            tier.used = now
            if tier.matrix is None:
                await self._consider(tier, params["type"], vector.shape[0], scope)
            if tier.matrix is not None:
                try:
                    found = await self._answer(tier, executor, vector, params)
                    if found is None and tier.matrix is not None:
                        found = await self._search(tier, executor, vector, params)
                except MemoryError as error:
                    # A change may have been made by half. The database can answer all the more without what is held.
                    logger.warning("vectors of type %s are let go of: %s", params["type"], error)
                    self._give_up(tier, _FAILED)
        if found is None:
            self.stats.misses += 1
        else:
            self.stats.hits += 1
        return found

    async def _answer(
        self, tier: Tier, executor: Executor, vector: Embedding, params: Mapping[str, Any]
    ) -> list[Memory] | None:
        """Search here, when the server confirms that what is held is all there is; None: it has to fetch the rows."""
        kind, count = params["type"], params["count"]
        if params["include_embedding"] or count > _MOST_RANKED:
            return None
        scope: dict[str, Any] = {name: params[name] for name in _SCOPE}
        threshold, most = params["threshold"], self._most(vector.shape[0])
        for number in range(_ROUNDS):
            matrix, seen, listed = tier.matrix, tier.seen, tier.listed
            if matrix is None or listed is None or tier.behind or tier.loading is not None or not matrix.contents_size:
                self._begin_renewal(tier, kind)
                return None
            if not matrix.suits(self._least, most, **scope):
                return None
            self.stats.repeats += number > 0
            checking = asyncio.ensure_future(
                executor.fetch(
                    SQL.at("check_resident", vector.shape[0]),
                    agent_id=self._agent_id,
                    type=kind,
                    seen=seen,
                    listed=listed,
                    life=tier.life,
                    most=_MOST_CHANGES,
                )
            )
            found = None
            try:
                # The server works while the rows are ranked: in vain if it tells of changes, as it did last time.
                await asyncio.sleep(0)
                ranked = tier.quiet and tier.matrix is matrix and tier.seen is seen
                if ranked:
                    found = self._give_out(matrix.rank(vector, count, threshold=threshold, **scope), kind)
                news = await checking
            finally:
                await end(checking)
            first = news[0]
            unchanged = tier.quiet = first["changed"] is None
            if tier.matrix is not matrix:
                continue
            if not first["alive"]:
                self._give_up(tier, 1.0)
                return None
            if first["rewritten"]:
                tier.behind |= tier.listed is listed
            elif len(news) >= _MOST_CHANGES:
                await self._catch_up(tier, matrix, seen, executor, kind)
            elif ranked and unchanged:
                # What ended meanwhile, of other widths and other agents, need not be looked through again.
                if tier.seen is seen and _is_later(first["seen"], seen):
                    tier.seen = first["seen"]
                self.stats.checks += found is not None
                return found
            elif (
                tier.listed is listed
                and not tier.behind
                and tier.loading is None
                # What another search has merged since may be of transactions that removed rows, too.
                and not _is_later(tier.seen, first["seen"])
            ):
                # Also where another search has merged a part: these are the rows as they are now, in any case.
                if _is_later(first["seen"], tier.seen):
                    changed = b"".join(row["changed"] for row in news if not unchanged)
                    contents = [tuple(row[_CONTENT:]) for row in news]
                    self._merge(tier, matrix, first["seen"], changed, contents=contents)
                if tier.matrix is matrix:
                    found = self._give_out(matrix.rank(vector, count, threshold=threshold, **scope), kind)
                    self.stats.checks += found is not None
                    return found
        return None

    def _give_out(self, rows: list[Row] | None, kind: str) -> list[Memory] | None:
        if rows is None:
            return None
        decode = _codecs.decode_json
        return [
            Memory(
                *(row.id, row.entity_id, self._agent_id, row.room_id, row.world_id, kind),
                *(decode(row.content), decode(row.metadata), row.unique, row.created_at, None, row.similarity),
            )
            for row in rows
        ]

    async def _search(
        self, tier: Tier, executor: Executor, vector: Embedding, params: Mapping[str, Any]
    ) -> list[Memory] | None:
        statement = SQL.at("fetch_resident", vector.shape[0])
        count = params["count"]
        wanted, most = count + _SPARE, self._most(vector.shape[0])
        filters = {name: params[name] for name in (*_SCOPE, "threshold")}
        for number in range(_ROUNDS):
            matrix, seen = tier.matrix, tier.seen
            if matrix is None:
                return None
            candidates = matrix.search(vector, wanted, **filters, least=self._least, most=most)
            if candidates is None:
                return None
            self.stats.repeats += number > 0
            rows = await executor.fetch(
                statement,
                embedding=params["embedding"],
                agent_id=self._agent_id,
                type=params["type"],
                ids=candidates.ids,
                seen=seen,
                life=tier.life,
                **filters,
                count=count,
                most=_MOST_CHANGES,
                include_embedding=params["include_embedding"],
            )
            *found, news = rows
            # Who was faster has merged it already; whoever comes next sees the rest.
            current = tier.matrix is matrix and tier.seen is seen
            if not news["alive"]:
                if current:
                    self._give_up(tier, 1.0)
                return None
            if news["number"] >= _MOST_CHANGES:
                await self._catch_up(tier, matrix, seen, executor, params["type"])
                continue
            if current:
                self._merge(tier, matrix, news["seen"], news["changed"], news["gone"])
            if candidates.reach == -math.inf or (len(found) == count and found[-1][_SIMILARITY] > candidates.reach):
                return [Memory(*row[:_FIELDS]) for row in found]
            wanted *= 4
        return None

    # --- changes -----------------------------------------------------------------------------------------------------

    def _merge(
        self,
        tier: Tier,
        matrix: Matrix,
        seen: Snapshot,
        changed: bytes | None,
        gone: list[UUID] | None = None,
        contents: list[Any] | None = None,
    ) -> None:
        """Bring a tier up to a snapshot; only with what was read for the state that it is in."""
        if changed:
            matrix.put(changed, contents=contents)
            tier.behind |= contents is None or any(version is None for version, *_ in contents)
            self.stats.deltas += 1
            self.stats.changes += matrix.rows_in(changed)
            if matrix.footprint > tier.granted and not self._grant(tier, matrix.footprint - tier.granted):
                self._release_contents(tier, matrix)
                if matrix.footprint > tier.granted:
                    self._make_room(tier, matrix.footprint)
            if tier.matrix is not matrix:
                self._settle(tier)
                return
        if gone:
            matrix.drop(gone)
            tier.dropped += len(gone)
        tier.seen = seen
        if contents is not None:
            self._settle(tier)

    async def _catch_up(self, tier: Tier, matrix: Matrix, seen: Snapshot, executor: Executor, kind: str) -> None:
        """Read and merge what has changed since `seen`; of several that want it, one does."""
        if tier.catching_up is not None:
            await asyncio.wait({tier.catching_up}, timeout=self._left())
            return
        if tier.matrix is not matrix or tier.seen is not seen:
            return
        tier.catching_up = asyncio.get_running_loop().create_future()
        try:
            most = _CHANGES_BYTES // (4 * matrix.dimension)
            row = await executor.fetch_row(
                SQL.at("read_resident_changes", matrix.dimension),
                agent_id=self._agent_id,
                type=kind,
                seen=seen,
                life=tier.life,
                most=most,
            )
            assert row is not None
            if tier.matrix is not matrix or tier.seen is not seen:
                return
            if not row["alive"]:
                self._give_up(tier, 1.0)
            elif row["number"] < most:
                self._merge(tier, matrix, row["seen"], row["content"])
            else:
                self._give_up(tier, _CALM)
        finally:
            tier.catching_up.set_result(None)
            tier.catching_up = None

    def _give_up(self, tier: Tier, seconds: float) -> None:
        """Let go of what a tier holds, and leave it at that for a while."""
        tier.matrix = tier.listed = None
        tier.not_before = time.monotonic() + seconds
        self._settle(tier)

    def _settle(self, tier: Tier) -> None:
        """Leave a tier what it holds of the bytes that it was granted."""
        with _lock:
            if tier.matrix is not None:
                tier.granted = tier.matrix.footprint
                return
            tier.granted = 0
            for shelf in _shelves.values():
                shelf.filled.discard(tier)

    # --- loading -----------------------------------------------------------------------------------------------------

    def _find_tier(self, kind: str, dimension: int) -> Tier:
        tier = self._tiers.get((kind, dimension))
        if tier is None:
            # Adapters of one agent share it, where they agree on what may be held.
            key = (self._address, self._agent_id, kind, dimension, self._budget, self._max_vectors)
            shelf = _shelf()
            tier = shelf.tiers.get(key)
            if tier is None:
                tier = shelf.tiers[key] = Tier()
            if len(self._tiers) >= _MOST_KNOWN:
                self._tiers = {key: each for key, each in self._tiers.items() if each.granted or each.loading}
            self._tiers[kind, dimension] = tier
        return tier

    async def _consider(self, tier: Tier, kind: str, dimension: int, scope: Scope | None) -> None:
        """Begin to load a tier when that pays; "required" waits for it."""
        if any(tier.used < tier.large_parts.get(id, 0.0) for id in (scope or {}).values()):
            return
        tier.asked += 1
        required = self._mode == "required"
        if tier.used >= tier.not_before and (required or tier.asked >= _LOAD_AFTER):
            self._begin_load(tier, kind, dimension, scope)
        if required and tier.loading is not None:
            await asyncio.wait({tier.loading}, timeout=self._left())

    def _left(self) -> float:
        """Give the seconds that the call has left to wait for the work of another one."""
        return max(current_deadline(60.0) - time.monotonic(), 0.0)

    def _begin_load(self, tier: Tier, kind: str, dimension: int, scope: Scope | None = None) -> None:
        if tier.loading is None and not self._closed:
            self._begin(tier, self._load(tier, kind, dimension, scope), "elizasql-resident-load")

    def _begin(self, tier: Tier, work: Coroutine[Any, Any, None], name: str) -> None:
        tier.loading = spawn(work, name)
        self._tasks.add(tier.loading)
        tier.loading.add_done_callback(partial(self._end, tier))

    def _end(self, tier: Tier, task: asyncio.Task[None]) -> None:
        """Take note that a load has ended, also one that was cancelled before it began to run."""
        self._tasks.discard(task)
        tier.loading = None
        self._settle(tier)

    async def _load(self, tier: Tier, kind: str, dimension: int, scope: Scope | None) -> None:
        try:
            await self._read(tier, kind, dimension, scope)
            await self._renew(tier, kind)
        except (ElizaSQLError, MemoryError) as error:
            # Searches go on in the database; if that cannot be reached, they tell.
            logger.warning("loading vectors of type %s is put off: %s", kind, error)
            tier.not_before = time.monotonic() + _FAILED

    async def _read(self, tier: Tier, kind: str, dimension: int, scope: Scope | None) -> None:
        """Measure a type, then read it page by page, each in a snapshot of its own; all counts as seen by the first.

        A row that is written meanwhile moves to a later page, and is a change for the first search in any case.
        """
        about = {"agent_id": self._agent_id, "type": kind}
        first = await self._executor.fetch_row(
            SQL["measure_resident"], dimension=dimension, most=self._budget // (4 * dimension) + 1, **about
        )
        assert first is not None
        if not await self._fits(tier, first, kind, dimension, scope):
            return
        statement = SQL.at("load_resident", dimension)
        page_size = _PAGE_BYTES // (4 * dimension)
        after, matrix = 0, Matrix(dimension, first["size"])
        while True:
            page = await self._executor.fetch_row(statement, after=after, page_size=page_size, **about)
            assert page is not None
            if page["life"] != first["life"]:
                tier.not_before = time.monotonic() + 1.0
                return
            for start in range(0, page["number"], page_size):
                matrix.put(page["content"], start, min(page_size, page["number"] - start))
                await asyncio.sleep(0)  # a page may be large: all that one transaction wrote
            if page["number"] < page_size:
                break
            if matrix.footprint > self._budget:
                tier.not_before = time.monotonic() + _TOO_LARGE
                return
            after = page["last"]
        if not self._make_room(tier, matrix.footprint):
            return
        tier.matrix, tier.seen, tier.life, tier.listed = matrix, first["seen"], first["life"], None
        tier.loaded_size, tier.dropped, tier.asked, tier.not_before = matrix.size, 0, 0, 0.0
        self.stats.loads += 1

    # --- contents ----------------------------------------------------------------------------------------------------

    def _begin_renewal(self, tier: Tier, kind: str) -> None:
        if tier.loading is None and not self._closed and time.monotonic() >= tier.renew_at:
            self._begin(tier, self._renew_alone(tier, kind), "elizasql-resident-renewal")

    async def _renew_alone(self, tier: Tier, kind: str) -> None:
        try:
            await self._renew(tier, kind)
        except (ElizaSQLError, MemoryError) as error:
            logger.warning("contents of type %s are not brought up to date: %s", kind, error)
            tier.renew_at = time.monotonic() + _FAILED

    async def _renew(self, tier: Tier, kind: str) -> None:
        """Bring the contents of a tier up to date: the server lists what there is, and what is not known is read.

        All counts as known by the snapshot of the list; what is read later may be newer, and a check tells of that.
        What is merged meanwhile comes without contents, since it may be older than the list.
        """
        matrix, begun = tier.matrix, time.monotonic()
        if matrix is None:
            return
        if not matrix.contents_size and not self._grant(tier, Matrix.estimate_contents(matrix.size)):
            tier.renew_at = begun + _TOO_LARGE
            return
        since = matrix.hold_contents()
        about = {"agent_id": self._agent_id, "type": kind, "dimension": matrix.dimension, "life": tier.life}
        row = await self._executor.fetch_row(SQL["list_resident"], **about)
        assert row is not None
        if not row["alive"]:
            tier.renew_at = time.monotonic() + _FAILED
            return
        listed: bytes = row["content"] or b""
        outdated: list[UUID] = []
        part = LISTED * _LISTED_AT_ONCE
        for start in range(0, len(listed), part):
            outdated += matrix.find_outdated(listed[start : start + part])
            await asyncio.sleep(0)
        gone = matrix.find_gone(listed, since)
        if tier.matrix is not matrix:
            return
        matrix.drop(gone)
        tier.dropped += len(gone)
        # What will not fit is not even read. These are the bytes that the server has compressed them to; what they are
        # beyond that is counted as they come.
        ahead = max(0, row["size"] - matrix.contents_size)
        if not self._grant(tier, ahead):
            self._release_contents(tier, matrix)
            return
        at_once = min(_CONTENTS, 1 + _CONTENTS_BYTES * len(listed) // LISTED // (row["size"] + 1))
        for _ in range(_ROUNDS):
            for start in range(0, len(outdated), at_once):
                rows = await self._executor.fetch(
                    SQL["read_resident_contents"], ids=outdated[start : start + at_once], **about
                )
                if not rows[0]["alive"]:
                    tier.renew_at = time.monotonic() + _FAILED
                    return
                rows = [each for each in rows if each["id"] is not None]
                needed = sum(size_of(each["content"], each["metadata"]) for each in rows)
                if tier.matrix is not matrix or not matrix.contents_size:
                    return
                if not self._grant(tier, max(0, needed - ahead)):
                    self._release_contents(tier, matrix)
                    return
                ahead = max(0, ahead - needed)
                for each in rows:
                    matrix.put_contents(each["id"], tuple(each[_CONTENT:]))
            # What was merged meanwhile came without.
            outdated = matrix.find_unknown()
            if not outdated:
                break
        tier.listed, tier.behind = row["seen"], bool(outdated)
        now = time.monotonic()
        tier.renew_at = now + max(_RENEWAL, _RENEWAL_SHARE * (now - begun))
        self.stats.renewals += 1

    def _release_contents(self, tier: Tier, matrix: Matrix) -> None:
        """Let go of the contents of a tier, which fit no more beside what is held, and leave it at that for a while."""
        matrix.release_contents()
        tier.listed, tier.renew_at = None, time.monotonic() + _TOO_LARGE

    def _grant(self, tier: Tier, more: int) -> bool:
        """Take more of the budget for a tier, where nothing else has to go for it."""
        with _lock:
            if _held() + more > self._budget:
                return False
            tier.granted += more
            return True

    async def _fits(self, tier: Tier, found: Mapping[str, Any], kind: str, dimension: int, scope: Scope | None) -> bool:
        """Tell by what `measure_resident` found whether to go on, and make room."""
        needed = Matrix.estimate(dimension, found["size"])
        if not found["numbers_transactions"] or needed > self._budget:
            self._give_up(tier, _TOO_LARGE)
            return False
        most = self._most(dimension)
        if found["size"] > most and tier.matrix is None:
            # From here on only searches of a part count; as many of them must be asked, and the last is the sample.
            known, tier.large_until = time.monotonic() < tier.large_until, time.monotonic() + _TOO_LARGE
            asked = known or self._mode == "required"
            if scope is None or not asked or not self._least <= await self._count_part(tier, kind, scope, most) <= most:
                tier.asked = 0
                return False
        if found["size"] < self._least:
            self._give_up(tier, _TOO_SMALL)
            return False
        if (matrix := tier.matrix) is not None:
            # Contents serve no search during a load. Where there is no room for both, what is replaced goes first.
            matrix.release_contents()
            tier.listed = None
            self._settle(tier)
            if self._grant(tier, needed):
                return True
            tier.matrix = None
        return self._make_room(tier, needed)

    async def _count_part(self, tier: Tier, kind: str, scope: Scope, most: int) -> int:
        """Count the memories of a part, and keep in mind one that has more than `most`."""
        [(name, id)] = scope.items()
        params: dict[str, Any] = {"agent_id": self._agent_id, "type": kind, "only_unique": False}
        for other in ("world_id", "entity_id", "start_time", "end_time", "metadata", "text_contains"):
            params[other] = None
        params |= {"room_ids": [id]} if name == "room_id" else {name: id}
        number: int = await self._executor.fetch_value(SQL[_COUNTS[name]], **params)
        if number > most:
            if len(tier.large_parts) >= _MOST_KNOWN:
                tier.large_parts.clear()
            tier.large_parts[id] = time.monotonic() + _TOO_LARGE
        return number

    def _make_room(self, tier: Tier, needed: int) -> bool:
        """Put other tiers out so that this one fits; otherwise it has to wait."""
        put_out = _make_room(tier, needed, self._budget)
        if put_out is None:
            self._give_up(tier, _FAILED)
            return False
        self.stats.evictions += put_out
        return True
