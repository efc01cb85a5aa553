"""The workload that runs while things break, the ledger of what it was told, and the checker of what is there.

Every row that is written says by itself whether it is right: the text, its hash and the embedding follow from the id
and a version. The ledger keeps for each id the versions that may be stored; an operation whose end is unknown leaves
two, and its ids are not touched again, since a write that was lost on the way may still arrive. `check` compares:

    what was acknowledged is stored, what is stored was attempted, what was refused is not stored;
    every id once, by every way to it; content and embedding belong together; a batch is there as a whole or not at all.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import numpy as np

from elizasql import DatabaseAdapter, ElizaSQLError, ForeignKeyError, Memory, _codecs
from tests.faults.clock import running_time
from tests.faults.server import WRITES, FaultServer, until

WIDTH = 384
TYPE = "messages"
ABSENT = 0  # the version of what is not stored; others begin at 1

# What a call may take beyond its time limit, by the clock that counts no stall of the machine.
GRACE = 1.0

# How long what was closed may take to be gone.
LEAK_PATIENCE = 20.0


# --- rows that say whether they are right --------------------------------------------------------------------------


def new_id(chance: random.Random) -> UUID:
    """Make an id from a seed."""
    return UUID(int=chance.getrandbits(128), version=4)


def has_embedding(id: UUID) -> bool:
    """Tell whether a memory of this id has an embedding: four of five have."""
    return id.int % 5 != 0


def embedding_of(id: UUID, version: int) -> Any:
    """Give the embedding that follows from id and version, None where there is none."""
    if not has_embedding(id):
        return None
    return np.random.default_rng([id.int & 0xFFFFFFFFFFFFFFFF, version]).normal(size=WIDTH).astype(np.float32)


def content_of(id: UUID, version: int) -> dict[str, Any]:
    """Give the content that follows from id and version."""
    text = f"{id} in version {version}"
    return {"text": text, "version": version, "hash": hashlib.sha256(text.encode()).hexdigest()}


def version_of(id: UUID, content: Any) -> int | None:
    """Read the version out of a content; None when it is not one of this id's."""
    if not isinstance(content, dict) or not isinstance(version := content.get("version"), int):
        return None
    return version if content == content_of(id, version) else None


def memory_of(id: UUID, version: int, **place: Any) -> Memory:
    """Make the memory that follows from id and version."""
    return Memory(id=id, content=content_of(id, version), embedding=embedding_of(id, version), unique=True, **place)


# --- the ledger ------------------------------------------------------------------------------------------------------


class Operation:
    """One write that is under way: the version that it gives to each of its ids."""

    def __init__(self, ledger: Ledger, wanted: dict[UUID, int]) -> None:
        self._ledger = ledger
        self.wanted = wanted
        self.before = {id: ledger.possible.get(id, frozenset({ABSENT})) for id in wanted}
        ledger.attempted.update(wanted)
        for id, version in wanted.items():
            ledger.versions.setdefault(id, set()).add(version)
            ledger.possible[id] = self.before[id] | {version}
        ledger.running.add(self)

    def acknowledge(self) -> None:
        """It was done."""
        self._end()
        self._ledger.counts["acknowledged"] += 1
        for id, version in self.wanted.items():
            self._ledger.possible[id] = frozenset({version})
            self._ledger.acknowledged.add(id)

    def refuse(self) -> None:
        """It was not done."""
        self._end()
        self._ledger.counts["refused"] += 1
        for id, before in self.before.items():
            self._ledger.possible[id] = before
            if before == {ABSENT}:
                self._ledger.refused.add(id)

    def lose(self) -> None:
        """Nobody knows."""
        self._end()
        self._ledger.counts["unknown"] += 1
        self._ledger.unknown.update(self.wanted)
        self._ledger.lost.append(self)

    def _end(self) -> None:
        self._ledger.running.discard(self)


class Ledger:
    """What was attempted for an agent, and what came of it.

    Attributes:
        possible: For each id the versions of which one is stored.
        versions: For each id every version that was ever attempted.
        attempted, acknowledged, unknown, refused: Ids; one may be in several, by its operations.
        lost: Operations whose end is unknown.
        running: Operations that have not ended.
        counts: Operations by their end.
        counted: Acknowledged operations that are in the summary of the run already.
    """

    def __init__(self, agent_id: UUID) -> None:
        self.agent_id = agent_id
        self.possible: dict[UUID, frozenset[int]] = {}
        self.versions: dict[UUID, set[int]] = {}
        self.attempted: set[UUID] = set()
        self.acknowledged: set[UUID] = set()
        self.unknown: set[UUID] = set()
        self.refused: set[UUID] = set()
        self.lost: list[Operation] = []
        self.running: set[Operation] = set()
        self.counts: Counter[str] = Counter()
        self.counted = 0

    def begin(self, wanted: dict[UUID, int]) -> Operation:
        """Note a write before it is sent."""
        return Operation(self, wanted)

    def settled(self, id: UUID) -> int | None:
        """Give the version that is stored for certain; ABSENT for none, None when it is not known."""
        possible = self.possible.get(id, frozenset())
        return next(iter(possible)) if len(possible) == 1 else None


# --- the checker -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A memory as it is stored, with what is stored beside it."""

    id: UUID
    content: Any
    embedding: Any
    type: str = TYPE
    scope_agrees: bool = True


_ROWS = """
SELECT
    coalesce(m.id, e.memory_id) AS id, m.type, m.content, e.dim_384 AS embedding,
    m.id IS NULL AS orphan, e.memory_id IS NOT NULL AS accompanied,
    e.memory_id IS NULL OR (
        e.type = m.type AND e.room_id IS NOT DISTINCT FROM m.room_id AND e.entity_id IS NOT DISTINCT FROM m.entity_id
        AND e.world_id IS NOT DISTINCT FROM m.world_id AND e."unique" = m."unique" AND e.dimension = 384
    ) AS scope_agrees
FROM (SELECT * FROM elizasql.memories WHERE agent_id = $1) AS m
FULL JOIN (SELECT * FROM elizasql.embeddings WHERE agent_id = $1) AS e ON e.memory_id = m.id
"""


async def check(dsn: str, ledger: Ledger, *, planted: bool = False) -> list[str]:
    """Compare what is stored with the ledger, over a connection that has nothing to do with the library.

    Args:
        dsn: The address of the server itself.
        ledger: What is expected.
        planted: Faults were planted: nothing is counted for the summary of the run.

    Returns:
        What is wrong, one sentence each; empty when all is well.
    """
    connection = await asyncpg.connect(dsn, timeout=30)
    try:
        await _codecs.register(connection, "public")
        rows = await connection.fetch(_ROWS, ledger.agent_id)
        problems = [f"{row['id']}: an embedding without its memory" for row in rows if row["orphan"]]
        stored = [
            Row(row["id"], _object(row["content"]), row["embedding"], row["type"], row["scope_agrees"])
            for row in rows
            if not row["orphan"]
        ]
        problems += compare(stored, ledger)
        # By the index and by the heap: after a crash both must say the same.
        for table, key in (("memories", "id"), ("embeddings", "memory_id")):
            found = []
            for way in ("seqscan", "indexscan"):
                async with connection.transaction():
                    for other in {"seqscan", "indexscan", "indexonlyscan", "bitmapscan"} - {way}:
                        await connection.execute(f"SET LOCAL enable_{other} = off")
                    ids = await connection.fetch(
                        f"SELECT {key} FROM elizasql.{table} WHERE agent_id = $1", ledger.agent_id
                    )
                found.append(Counter(row[0] for row in ids))
            if found[0] != found[1]:
                problems.append(f"{table}: heap and index differ: {found[0] - found[1]} {found[1] - found[0]}")
    finally:
        connection.terminate()
    if not planted:
        WRITES["lost"] += sum("is not stored" in problem for problem in problems)
        WRITES["acknowledged"] += ledger.counts["acknowledged"] - ledger.counted
        ledger.counted = ledger.counts["acknowledged"]
    return problems


_INDEXES = """
    SELECT
        c.relname::text AS name, i.indexrelid AS id, i.indrelid AS table_id, i.indrelid::regclass::text AS of_table,
        pg_get_indexdef(i.indexrelid, 1, FALSE) AS first, coalesce(pg_get_expr(i.indpred, i.indrelid), 'TRUE') AS held
    FROM pg_index AS i
    INNER JOIN pg_class AS c ON c.oid = i.indexrelid
    INNER JOIN pg_am AS m ON m.oid = c.relam
    WHERE
        c.relnamespace = 'elizasql'::regnamespace AND c.relkind = 'i' AND m.amname = 'btree' AND i.indisvalid
        AND pg_relation_size(i.indrelid) > 0
"""


async def check_indexes(admin: asyncpg.Connection[Any]) -> list[str]:
    """Compare each b-tree of the schema with its table; gives what is wrong, one sentence each.

    As amcheck would, which the embedded server has not: what an index leads to is what the table holds, row for row.

    Args:
        admin: A superuser's connection: it hides a table's other indexes, in transactions that are rolled back.
    """
    problems = []
    for index in await admin.fetch(_INDEXES):
        # Both see the same rows, whoever moves some meanwhile.
        transaction = admin.transaction(isolation="repeatable_read")
        await transaction.start()
        try:
            await admin.execute(
                "UPDATE pg_index SET indisvalid = FALSE WHERE indrelid = $1 AND indexrelid <> $2",
                *(index["table_id"], index["id"]),
            )
            found = []
            for way in ("Seq Scan on ", f"Index Scan using {index['name']} on "):
                for setting in ("seqscan", "indexscan", "indexonlyscan", "bitmapscan", "sort"):
                    value = "on" if setting == way.lower().replace(" ", "")[: len(setting)] else "off"
                    await admin.execute(f"SET LOCAL enable_{setting} = {value}")
                order = f"ORDER BY {index['first']}" if way.startswith("Index") else ""
                rows = f"SELECT ctid FROM {index['of_table']} WHERE {index['held']} {order} OFFSET 0"
                # Named for the index: a text that was prepared for another one keeps that one's plan.
                question = (
                    f"SELECT count(*) AS rows, sum(hashtid(ctid)::bigint) AS places FROM ({rows}) AS {index['name']}"
                )
                assert way in str(await admin.fetch(f"EXPLAIN {question}"))
                found.append(dict(await admin.fetchrow(question) or {}))
        finally:
            await transaction.rollback()
        if found[0] != found[1]:
            problems.append(f"{index['name']}: the table has {found[0]}, the index {found[1]}")
    return problems


def compare(rows: Iterable[Row], ledger: Ledger) -> list[str]:
    """Compare rows with the ledger; gives what is wrong."""
    problems: list[str] = []
    stored: dict[UUID, int] = {}
    for row in rows:
        if row.id in stored:
            problems.append(f"{row.id}: stored twice")
        version = version_of(row.id, row.content)
        stored[row.id] = -1 if version is None else version
        if row.id not in ledger.attempted:
            problems.append(f"{row.id}: stored, and never attempted")
            continue
        if version is None:
            problems.append(f"{row.id}: its content is not right: {row.content!r:.200}")
            continue
        if version not in ledger.possible[row.id]:
            problems.append(f"{row.id}: version {version} is stored, expected {sorted(ledger.possible[row.id])}")
        wanted = embedding_of(row.id, version)
        if (wanted is None) != (row.embedding is None):
            problems.append(f"{row.id}: memory and embedding are not both there")
        elif wanted is not None and not np.array_equal(wanted, row.embedding):
            problems.append(f"{row.id}: the embedding is not the one of version {version}")
        if row.type != TYPE or not row.scope_agrees:
            problems.append(f"{row.id}: type or scope is not right")
    for id, possible in ledger.possible.items():
        if ABSENT not in possible and id not in stored:
            problems.append(f"{id}: acknowledged and is not stored, expected version {sorted(possible)}")
    for operation in ledger.lost:
        # Ids that were lost twice say nothing about one operation; the workload never does that.
        done = {
            stored.get(id, ABSENT) == version
            for id, version in operation.wanted.items()
            if version not in operation.before[id]
        }
        if len(done) > 1:
            problems.append(f"{next(iter(operation.wanted))}: its batch of {len(operation.wanted)} is stored in part")
    return problems


def _object(content: Any) -> Any:
    return json.loads(content) if isinstance(content, (str, bytes)) else content


# --- the workload ----------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What the workload saw."""

    calls: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    violations: list[str] = field(default_factory=list)


class Workload:
    """Writes, reads and searches for one agent, from several tasks, and keeps the ledger.

    Attributes:
        ledger: What it was told.
        figures: What it saw.
        seed: Of everything that it chooses.
    """

    def __init__(
        self,
        db: DatabaseAdapter,
        *,
        seed: int,
        timeout: float,
        room_id: UUID | None = None,
        writers: int = 3,
        readers: int = 1,
        largest_batch: int = 12,
    ) -> None:
        self.db = db
        self.seed = seed
        self.ledger = Ledger(db.agent_id)
        self.figures = Figures()
        self.progress = asyncio.Event()
        self._timeout = timeout
        self._place = {"room_id": room_id}
        self._writers = writers
        self._readers = readers
        self._largest_batch = largest_batch
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        ledger, figures = self.ledger, self.figures
        return (
            f"workload of seed {self.seed}: {len(ledger.attempted)} ids, operations {dict(ledger.counts)}, "
            f"calls {dict(figures.calls)}, errors {dict(figures.errors)}, longest {figures.longest:.2f} s"
        )

    def start(self) -> None:
        """Begin."""
        chance = random.Random(self.seed)
        for work, number in ((self._write, self._writers), (self._read, self._readers)):
            for _ in range(number):
                loop_of = self._loop(work, random.Random(chance.getrandbits(64)))
                self._tasks.append(asyncio.get_running_loop().create_task(loop_of, name="workload"))

    async def stop(self) -> None:
        """Let every call that is running end, and stop; raises what a task has met that it did not expect."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        assert not self.ledger.running

    async def __aenter__(self) -> Workload:
        self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *more: object) -> None:
        self._stopping = True
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        if kind is None:
            await self.stop()
        else:
            print(f"{self!r}, ended {ended}")

    async def advance(self, operations: int = 1, patience: float = 60.0) -> None:
        """Wait until so many more writes were acknowledged."""
        goal = self.ledger.counts["acknowledged"] + operations

        async def reached() -> bool:
            for task in self._tasks:
                if task.done():
                    task.result()
            return self.ledger.counts["acknowledged"] >= goal

        await until(reached, f"{operations} more writes are acknowledged; {self!r}", patience)

    async def _loop(self, work: Callable[[random.Random, list[UUID]], Awaitable[None]], chance: random.Random) -> None:
        own: list[UUID] = []
        while not self._stopping:
            await work(chance, own)

    # --- calls -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Hold a call to its time limit, and its errors to the library's own."""
        self.figures.calls[name] += 1
        began = running_time()
        try:
            yield
        except ElizaSQLError as error:
            self.figures.errors[type(error).__name__] += 1
            raise
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.figures.violations.append(f"{name} raised {error!r}, which is no error of the library")
            raise
        finally:
            took = running_time() - began
            self.figures.longest = max(self.figures.longest, took)
            if took > self._timeout + GRACE:
                self.figures.violations.append(f"{name} took {took:.2f} s with a time limit of {self._timeout:g} s")

    def _broken(self, what: str) -> None:
        self.figures.violations.append(what)

    async def _perform(self, name: str, wanted: dict[UUID, int], call: Callable[[], Awaitable[Any]], says: Any) -> bool:
        """Do one write, and note what came of it; `says` is what it must give. Tells whether it was acknowledged."""
        operation = self.ledger.begin(wanted)
        try:
            # Of a transaction each call has a time limit of its own.
            with self._timed(name) if name != "transaction" else nullcontext():
                given = await call()
        except ForeignKeyError:
            operation.refuse()
            return False
        except BaseException as error:
            operation.lose()
            if not isinstance(error, ElizaSQLError):
                raise
            # A server that is down answers at once: without a pause this task would be all that runs.
            await asyncio.sleep(0.01)
            return False
        operation.acknowledge()
        if given != says:
            self._broken(f"{name} gave {given!r:.200}, expected {says!r:.200}")
        return True

    async def _write(self, chance: random.Random, own: list[UUID]) -> None:
        """Do one write by chance. `own` are ids that only this task touches, and of which it knows the state."""
        db, timeout, table = self.db, self._timeout, TYPE
        kind = chance.choices(
            ("single", "batch", "upsert", "update", "updates", "delete", "deletes", "transaction", "refused"),
            (30, 20, 10, 12, 5, 8, 4, 8, 3),
        )[0]
        fresh = [new_id(chance) for _ in range(chance.randint(1, self._largest_batch))]
        there = [id for id in own if self.ledger.settled(id) not in (ABSENT, None)]
        some = chance.sample(there, min(len(there), chance.randint(1, 4)))

        def following(ids: Sequence[UUID]) -> dict[UUID, int]:
            return {id: max(self.ledger.versions.get(id, {ABSENT})) + 1 for id in ids}

        def memories(wanted: dict[UUID, int], **place: Any) -> list[Memory]:
            return [memory_of(id, version, **{**self._place, **place}) for id, version in wanted.items()]

        def changes(wanted: dict[UUID, int]) -> list[dict[str, Any]]:
            made = []
            for id, version in wanted.items():
                change: dict[str, Any] = {"id": id, "content": content_of(id, version)}
                if has_embedding(id):
                    change["embedding"] = embedding_of(id, version)
                made.append(change)
            return made

        if kind == "single":
            wanted = following(fresh[:1])
            (one,) = memories(wanted)
            done = await self._perform(
                "create_memory", wanted, lambda: db.create_memory(one, table, timeout=timeout), fresh[0]
            )
        elif kind == "batch":
            wanted = following(fresh)
            done = await self._perform(
                "create_memories",
                wanted,
                lambda: db.create_memories(memories(wanted), table, timeout=timeout),
                list(wanted),
            )
        elif kind == "upsert":
            wanted = following([*fresh, *some])
            done = await self._perform(
                "upsert_memories",
                wanted,
                lambda: db.upsert_memories(memories(wanted), table, timeout=timeout),
                list(wanted),
            )
        elif kind == "update" and some:
            wanted = following(some[:1])
            (change,) = changes(wanted)
            done = await self._perform("update_memory", wanted, lambda: db.update_memory(change, timeout=timeout), True)
        elif kind == "updates" and some:
            wanted = following(some)
            done = await self._perform(
                "update_memories", wanted, lambda: db.update_memories(changes(wanted), timeout=timeout), None
            )
        elif kind == "delete" and some:
            wanted = {some[0]: ABSENT}
            done = await self._perform(
                "delete_memory", wanted, lambda: db.delete_memory(some[0], timeout=timeout), True
            )
        elif kind == "deletes" and some:
            wanted = dict.fromkeys(some, ABSENT)
            done = await self._perform(
                "delete_memories", wanted, lambda: db.delete_memories(some, timeout=timeout), len(some)
            )
        elif kind == "transaction":
            # It also changes what is there, so that "all or nothing" is about more than one statement.
            wanted = following([*fresh[:3], *some[:1]])
            done = await self._perform("transaction", wanted, lambda: self._transact(wanted, memories, changes), None)
        elif kind == "refused":
            wanted = following(fresh)
            homeless = new_id(chance)
            await self._perform(
                "create_memories",
                wanted,
                lambda: db.create_memories(memories(wanted, room_id=homeless), table, timeout=timeout),
                "an error",
            )
            # Refused or interrupted: in neither case may one of them be there.
            for id in wanted:
                self.ledger.possible[id] = frozenset({ABSENT})
            return
        else:
            return
        if done:
            for id in wanted:
                if id not in own:
                    own.append(id)

    async def _transact(
        self,
        wanted: dict[UUID, int],
        memories: Callable[..., list[Memory]],
        changes: Callable[[dict[UUID, int]], list[dict[str, Any]]],
    ) -> None:
        context = self.db.transaction()
        with self._timed("begin"):
            tx = await context.__aenter__()
        try:
            for id, version in wanted.items():
                with self._timed("in a transaction"):
                    if version == 1:
                        await tx.create_memory(memories({id: version})[0], TYPE, timeout=self._timeout)
                    else:
                        await tx.update_memory(changes({id: version})[0], timeout=self._timeout)
        except BaseException as error:
            with self._timed("roll back"):
                await context.__aexit__(type(error), error, error.__traceback__)
            raise
        with self._timed("commit"):
            await context.__aexit__(None, None, None)

    # --- reading -----------------------------------------------------------------------------------------------------

    async def _read(self, chance: random.Random, own: list[UUID]) -> None:
        """Search or look up by chance; what comes must be what may be there."""
        if not self.ledger.attempted:
            await asyncio.sleep(0)
            return
        # A list of its own, brought up to date now and then: choosing from a set would copy it every time.
        if len(own) < len(self.ledger.attempted) * 0.8:
            own[:] = self.ledger.attempted
        id = chance.choice(own)
        before = self.ledger.possible[id]
        try:
            if chance.random() < 0.5 and has_embedding(id):
                await self._search(chance, id, before)
            else:
                await self._look_up(id, before)
        except ElizaSQLError:
            await asyncio.sleep(0.01)

    async def _search(self, chance: random.Random, id: UUID, before: frozenset[int]) -> None:
        version = max(self.ledger.versions[id])
        vector = embedding_of(id, version or 1)
        count = chance.choice((1, 5, 20))
        place = self._place if chance.random() < 0.3 else {}
        with self._timed("search_memories"):
            hits = await self.db.search_memories(
                embedding=vector, table_name=TYPE, count=count, timeout=self._timeout, **place
            )
        for hit in hits:
            found = version_of(hit.id, hit.content)
            if hit.agent_id != self.db.agent_id or hit.id not in self.ledger.attempted:
                self._broken(f"a search gave {hit.id} of agent {hit.agent_id}, which was never attempted")
            elif hit.id in self.ledger.refused:
                self._broken(f"a search gave {hit.id}, which was refused")
            elif found not in self.ledger.versions[hit.id]:
                self._broken(f"a search gave {hit.id} in version {found}, which was never attempted")
        similarities = [hit.similarity for hit in hits]
        if similarities != sorted(similarities, reverse=True) or len({hit.id for hit in hits}) < len(hits):
            self._broken("a search gave its hits in a wrong order, or one twice")
        if before == {version} == self.ledger.possible[id] and version and (not hits or hits[0].id != id):
            self._broken(f"a search for {id} did not find it: {[hit.id for hit in hits]}")

    async def _look_up(self, id: UUID, before: frozenset[int]) -> None:
        with self._timed("get_memory_by_id"):
            found = await self.db.get_memory_by_id(id, include_embedding=True, timeout=self._timeout)
        version = ABSENT if found is None else version_of(id, found.content)
        # While it was read, its own task may have gone on.
        possible = before | self.ledger.possible[id]
        between = self.ledger.versions[id] - set(range(1, max(before) + 1))
        if version not in possible | between:
            self._broken(f"{id} was read in version {version}, expected {sorted(possible)}")
        elif found is not None and version:
            wanted = embedding_of(id, version)
            if (wanted is None) != (found.embedding is None) or (
                wanted is not None and not np.array_equal(wanted, found.embedding)
            ):
                self._broken(f"{id} was read with an embedding that is not the one of version {version}")


# --- leaks -----------------------------------------------------------------------------------------------------------


def _sockets() -> int:
    found = 0
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found += path.readlink().name.startswith("socket:")
    return found


@asynccontextmanager
async def no_leaks(server: FaultServer | None = None, application_name: str = "") -> AsyncIterator[None]:
    """Hold what is done inside to leaving nothing behind: no task, no socket, no session, no error that nobody saw."""
    loop = asyncio.get_running_loop()
    unseen: list[dict[str, Any]] = []
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: unseen.append(context))
    tasks, sockets = asyncio.all_tasks(), _sockets()
    try:
        yield

        def left() -> set[asyncio.Task[Any]]:
            # A fixture begins and ends in tasks of its own.
            return asyncio.all_tasks() - tasks - {asyncio.current_task()}  # type: ignore[arg-type]

        async def none() -> bool:
            return not left() and _sockets() <= sockets

        try:
            await until(none, "nothing is left", LEAK_PATIENCE)
        except AssertionError:
            raise AssertionError(f"left behind: {left()}, sockets {sockets} -> {_sockets()}") from None
        if server is not None:
            await server.no_sessions(application_name, LEAK_PATIENCE)
    finally:
        loop.set_exception_handler(handler)
    assert not unseen, f"errors that nobody saw: {unseen}"


async def pool_is_whole(db: DatabaseAdapter, patience: float = 30.0) -> None:
    """Hold every lane to coming to rest, and every connection of it to being usable."""
    for name, lane in (("interactive", db._connections.interactive), ("background", db._connections.background)):

        async def at_rest(lane: Any = lane) -> bool:
            # Nobody waits for the background work, which may begin at any time.
            await lane.let_go()
            whole = lane.pool.get_size() == lane.pool.get_idle_size()
            return bool(lane.in_use == 0 and lane.waiting == 0 and whole)

        async def rests(name: str = name, lane: Any = lane, at_rest: Any = at_rest) -> None:
            try:
                await until(at_rest, "nothing is in use", patience)
            except AssertionError as error:
                raise AssertionError(
                    f"{error}: {name}, {lane.in_use} in use, {lane.waiting} waiting, pool {lane.pool.get_size()} open,"
                    f" {lane.pool.get_idle_size()} idle; in flight {db._executor.in_flight} {db._background.in_flight}"
                ) from None

        await rests()
        held = [await lane.acquire(30) for _ in range(lane.max_size)]
        assert lane.in_use == lane.max_size
        for connection, _ in held:
            assert not connection.is_in_transaction()
            assert await connection.fetchval("SELECT pg_current_xact_id_if_assigned() IS NULL", timeout=30)
            lane.keep(connection)
        await rests()
    assert db._executor.in_flight == 0
