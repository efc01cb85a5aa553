"""The connection is cut after a write was sent and before the answer came: nobody knows what became of it.

The invariant: what can be repeated is repeated, and is there exactly once; the end of a transaction is found out from
the server; what can be neither repeated nor found out raises UnknownOutcomeError, and was done as a whole or not at
all.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest

import elizasql
from elizasql import DatabaseAdapter, Memory, Task
from elizasql._statements import SQL
from elizasql.transfer._rows import as_array, put
from tests.conftest import make_scene
from tests.faults.conftest import MakeAdapter
from tests.faults.harness import (
    ABSENT,
    TYPE,
    Ledger,
    check,
    content_of,
    embedding_of,
    has_embedding,
    memory_of,
    new_id,
    pool_is_whole,
)
from tests.faults.proxy import Proxy, Rule
from tests.faults.server import FaultServer, count, until

ANSWER = b"Cs"

# Where the cut is: (rule, whether the server did it).
CUTS: dict[str, tuple[Callable[[Proxy], Rule], bool]] = {
    "before the server hears of it": (lambda proxy: proxy.when("client", b"B", "reset"), False),
    "after it was done, before the answer": (lambda proxy: proxy.when("server", ANSWER, "reset"), True),
    "in the middle of the answer": (lambda proxy: proxy.when("server", ANSWER, "reset", "middle"), True),
    "closed in good order instead of an answer": (lambda proxy: proxy.when("server", ANSWER, "close"), True),
    "after the answer, before the server is ready": (lambda proxy: proxy.when("server", b"Z", "reset"), True),
}


@pytest.fixture
def chance(seed: int) -> random.Random:
    return random.Random(seed)


def ids_of(chance: random.Random, number: int) -> list[UUID]:
    ids: list[UUID] = []
    while len(ids) < number:
        if has_embedding(id := new_id(chance)):
            ids.append(id)
    return ids


# --- what can be repeated --------------------------------------------------------------------------------------------

REPEATABLE: dict[str, Callable[[DatabaseAdapter, list[UUID]], Awaitable[Any]]] = {
    "create_memory": lambda db, ids: db.create_memory(memory_of(ids[0], 2), TYPE),
    "create_memory, unique undecided": lambda db, ids: db.create_memory(
        {"id": ids[0], "content": content_of(ids[0], 2), "embedding": embedding_of(ids[0], 2)}, TYPE
    ),
    "create_memories": lambda db, ids: db.create_memories([memory_of(id, 2) for id in ids[:3]], TYPE),
    "upsert_memories": lambda db, ids: db.upsert_memories([memory_of(id, 2) for id in ids[2:5]], TYPE),
    "update_memory": lambda db, ids: db.update_memory(
        {"id": ids[3], "content": content_of(ids[3], 2), "embedding": embedding_of(ids[3], 2)}
    ),
    "update_memories": lambda db, ids: db.update_memories(
        [{"id": id, "content": content_of(id, 2), "embedding": embedding_of(id, 2)} for id in ids[3:5]]
    ),
}
TOUCHED = {
    "create_memory": slice(0, 1),
    "create_memory, unique undecided": slice(0, 1),
    "create_memories": slice(0, 3),
    "upsert_memories": slice(2, 5),
    "update_memory": slice(3, 4),
    "update_memories": slice(3, 5),
}


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        # Each statement with one cut and each cut with one statement; all with all are slow.
        pytest.param(name, cut, marks=[] if name == "create_memory" or "done" in cut else pytest.mark.slow)
        for name in REPEATABLE
        for cut in CUTS
    ],
)
async def test_what_can_be_repeated_is_done_exactly_once(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, chance: random.Random, name: str, cut: str
) -> None:
    db = await make_db(dsn=proxy.dsn, pool_max_size=1)
    ledger = Ledger(db.agent_id)
    ids = ids_of(chance, 5)
    await db.create_memories([memory_of(id, 1) for id in ids[3:]], TYPE)
    ledger.begin(dict.fromkeys(ids[3:], 1)).acknowledge()
    # The statement is known to the connection: what is cut is its execution.
    told = await REPEATABLE[name](db, ids_of(chance, 3) + ids[3:])
    ledger.begin(dict.fromkeys(set(ids[TOUCHED[name]]) & set(ids[3:]), 2)).acknowledge()
    before = await db.count_memories()
    rule = CUTS[cut][0](proxy)
    result = await REPEATABLE[name](db, ids)
    assert rule.count == 1
    # It says what an uninterrupted one would say.
    touched = ids[TOUCHED[name]]
    assert result == {UUID: touched[0], list: touched, bool: True, type(None): None}[type(told)]
    assert await db.count_memories() == before + len(set(touched) - set(ids[3:]))
    ledger.begin(dict.fromkeys(touched, 2)).acknowledge()
    async with server.admin() as admin:
        rows = await admin.fetch(
            "SELECT count(*) AS n FROM elizasql.memories WHERE agent_id = $1 AND id = ANY($2) GROUP BY id",
            db.agent_id,
            touched,
        )
        assert [row["n"] for row in rows] == [1] * len(touched)
        # What was stored to prepare the statement is nobody's business here.
        others = "DELETE FROM elizasql.memories WHERE agent_id = $1 AND NOT id = ANY($2)"
        await admin.execute(others, db.agent_id, ids)
    assert await check(server.dsn, ledger) == []


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_cut_again_and_again(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, chance: random.Random, times: int
) -> None:
    """Three tries, and one more for the connection that was there before; then it is said."""
    db = await make_db(dsn=proxy.dsn, pool_max_size=1, max_retries=3)
    ledger = Ledger(db.agent_id)
    ids = ids_of(chance, 3)
    await db.create_memories([memory_of(id, 1) for id in ids_of(chance, 2)], "other")
    rule = proxy.when("server", ANSWER, "reset", holding=b"INSERT", times=times)
    operation = ledger.begin(dict.fromkeys(ids, 1))
    call = db.create_memories([memory_of(id, 1) for id in ids], TYPE)
    if times <= 2:
        assert await call == ids
        operation.acknowledge()
        assert rule.count == times
    else:
        with pytest.raises(elizasql.ConnectionLostError):
            await call
        operation.lose()
        assert rule.count == 4
    async with server.admin() as admin:
        await admin.execute("DELETE FROM elizasql.memories WHERE agent_id = $1 AND type = 'other'", db.agent_id)
    assert await check(server.dsn, ledger) == []


# --- what ends a transaction -----------------------------------------------------------------------------------------

COMMIT = b"COMMIT"
ENDS: dict[str, tuple[Callable[[Proxy], Rule], bool]] = {
    "before the server hears of it": (lambda proxy: proxy.when("client", b"Q", "reset", holding=COMMIT), False),
    "in the middle of the question": (
        lambda proxy: proxy.when("client", b"Q", "reset", "middle", holding=COMMIT),
        False,
    ),
    "after it was done, before the answer": (lambda proxy: proxy.when("server", b"C", "reset", holding=COMMIT), True),
    "in the middle of the answer": (lambda proxy: proxy.when("server", b"C", "close", "middle", holding=COMMIT), True),
}


@pytest.mark.parametrize("end", ENDS)
async def test_end_of_a_transaction_is_found_out(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, chance: random.Random, end: str
) -> None:
    rule_of, done = ENDS[end]
    db = await make_db(dsn=proxy.dsn)
    ledger = Ledger(db.agent_id)
    ids = ids_of(chance, 3)
    operation = ledger.begin(dict.fromkeys(ids, 1))
    asked = proxy.when("client", b"P", "note", holding=b"pg_xact_status", times=None)

    async def transact() -> None:
        async with db.transaction() as tx:
            for id in ids:
                await tx.create_memory(memory_of(id, 1), TYPE)
            rules.append(rule_of(proxy))

    rules: list[Rule] = []
    if done:
        await transact()
        operation.acknowledge()
    else:
        with pytest.raises(elizasql.ConnectionLostError):
            await transact()
        operation.refuse()
    assert rules[0].count == 1
    assert asked.count == 1
    assert await check(server.dsn, ledger) == []
    assert await db.count_memories() == (3 if done else 0)


async def test_end_of_a_transaction_that_wrote_nothing_needs_no_finding_out(proxy: Proxy, make_db: MakeAdapter) -> None:
    """However it ended, it may be made again."""
    db = await make_db(dsn=proxy.dsn)
    asked = proxy.when("client", b"P", "note", holding=b"pg_xact_status", times=None)
    with pytest.raises(elizasql.ConnectionLostError) as caught:
        async with db.transaction() as tx:
            assert await tx.count_memories() == 0
            lost = proxy.when("server", b"C", "reset", holding=COMMIT)
    assert caught.value.retryable
    assert (lost.count, asked.count) == (1, 0)
    assert await db.count_memories() == 0
    await pool_is_whole(db)


@pytest.mark.parametrize("end", ENDS)
async def test_batch_of_several_chunks_is_there_exactly_once(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, chance: random.Random, end: str
) -> None:
    """Its end is found out; where it was not done, it is done again."""
    rule_of, done = ENDS[end]
    db = await make_db(dsn=proxy.dsn, batch_size=4)
    ledger = Ledger(db.agent_id)
    ids = ids_of(chance, 10)
    operation = ledger.begin(dict.fromkeys(ids, 1))
    rule = rule_of(proxy)
    begun = proxy.when("client", b"Q", "note", holding=b"BEGIN", times=None)
    assert await db.create_memories([memory_of(id, 1) for id in ids], TYPE) == ids
    operation.acknowledge()
    assert rule.count == 1
    assert begun.count == (1 if done else 2)
    assert await check(server.dsn, ledger) == []


async def test_deletion_of_several_chunks_is_counted_right(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, chance: random.Random
) -> None:
    """Repeated it would find nothing left and say 0; found out, it says the truth."""
    db = await make_db(dsn=proxy.dsn, batch_size=4)
    ledger = Ledger(db.agent_id)
    ids = ids_of(chance, 10)
    await db.create_memories([memory_of(id, 1) for id in ids], TYPE)
    ledger.begin(dict.fromkeys(ids, 1)).acknowledge()
    rule = proxy.when("server", b"C", "reset", holding=COMMIT)
    assert await db.delete_memories(ids) == 10
    assert rule.count == 1
    ledger.begin(dict.fromkeys(ids, ABSENT)).acknowledge()
    assert await check(server.dsn, ledger) == []


@pytest.mark.parametrize("lost", ["the answer of a batch", "its end", "the end of a build"])
async def test_vectors_that_are_moved_into_the_index_are_counted_right(
    proxy: Proxy, make_db: MakeAdapter, chance: random.Random, lost: str
) -> None:
    """Repeated, a batch would not count what it has moved before."""
    db = await make_db(dsn=proxy.dsn, index_batch_size=4)
    await db.create_memories([memory_of(id, 1) for id in ids_of(chance, 10)], TYPE)
    rules: list[Rule] = []

    def lose(done: int, total: int) -> None:
        if not rules:
            rules.append(
                proxy.when("server", b"D", "reset")
                if "answer" in lost
                else proxy.when("server", b"C", "reset", holding=COMMIT)
            )

    if lost == "the end of a build":
        lose(0, 10)
        assert await db.index_memories(rebuild=True) == 10
    else:
        assert await db.index_memories(lose) == 10
    assert rules[0].count == 1
    assert (await db.stats())["unindexed"] == 0


@pytest.mark.parametrize("kind", ["transaction", "batch", "load"])
@pytest.mark.parametrize("size", [1, 3])
async def test_ends_are_found_out_when_every_connection_is_lost(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, chance: random.Random, kind: str, size: int
) -> None:
    """All ask at once what became of theirs, and the pool has no connection but those that are gone."""
    db = await make_db(dsn=proxy.dsn, pool_max_size=size, background_pool_size=size, batch_size=2)
    ledger = Ledger(db.agent_id)
    inside, all_inside = 0, asyncio.Event()

    async def work(memories: list[Memory]) -> None:
        nonlocal inside
        if kind == "batch":
            await db.create_memories(memories, TYPE)
        elif kind == "load":
            await db.load_memories(memories, TYPE, build_index=False)
        else:
            async with db.transaction() as tx:
                await tx.create_memories(memories, TYPE)
                inside += 1
                if inside == size:
                    all_inside.set()
                await all_inside.wait()

    rule = proxy.when("server", b"C", "reset", holding=COMMIT, times=size)
    ids = [ids_of(chance, 3) for _ in range(size)]
    operation = ledger.begin(dict.fromkeys((id for each in ids for id in each), 1))
    await asyncio.gather(*(work([memory_of(id, 1) for id in each]) for each in ids))
    operation.acknowledge()
    assert rule.count == size
    assert await db.count_memories() == 3 * size
    assert await check(server.dsn, ledger) == []
    await pool_is_whole(db)


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("kind", ["transaction", "batch"])
async def test_end_that_cannot_be_found_out(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, chance: random.Random, kind: str, done: bool
) -> None:
    """Nobody answers the question afterwards: the caller is told so, within its time."""
    db = await make_db(dsn=proxy.dsn, batch_size=4, timeout=1.5, connection_timeout=0.5)
    ledger = Ledger(db.agent_id)
    ids = ids_of(chance, 10)
    operation = ledger.begin(dict.fromkeys(ids, 1))
    memories = [memory_of(id, 1) for id in ids]
    rule = (
        proxy.when("server", b"C", "reset", holding=COMMIT)
        if done
        else proxy.when("client", b"Q", "reset", holding=COMMIT)
    )

    async def work() -> None:
        if kind == "batch":
            await db.create_memories(memories, TYPE)
            return
        async with db.transaction() as tx:
            for memory in memories:
                await tx.create_memory(memory, TYPE)

    task = asyncio.create_task(work())
    await rule.fired.wait()
    await proxy.refuse()
    began = asyncio.get_running_loop().time()
    with pytest.raises(elizasql.UnknownOutcomeError) as caught:
        await task
    assert asyncio.get_running_loop().time() - began < 1.5 + 1
    assert not caught.value.retryable
    operation.lose()
    await proxy.heal()
    assert await db.count_memories() == (10 if done else 0)
    assert await check(server.dsn, ledger) == []


@pytest.mark.parametrize("kind", ["transaction", "batch", "batch that is not repeatable"])
async def test_end_that_outlasts_the_time_limit(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, chance: random.Random, kind: str
) -> None:
    """The connection is not lost: a batch ran into its limit as any call does, and says whether it may be repeated."""
    db = await make_db(dsn=proxy.dsn, batch_size=4, pool_max_size=1, timeout=60.0)
    impatient = await make_db(db.agent_id, dsn=proxy.dsn, batch_size=4, pool_max_size=1, timeout=0.3)
    ids = ids_of(chance, 10)
    memories = [memory_of(id, 1) for id in ids]
    deletes = kind == "batch that is not repeatable"
    if deletes:
        await db.create_memories(memories, TYPE)
    await impatient.is_ready()
    proxy.when("server", b"C", "hold", holding=COMMIT)
    if kind == "transaction":
        with pytest.raises(elizasql.UnknownOutcomeError, match="the time limit passed at its end"):
            async with impatient.transaction() as tx:
                await tx.create_memories(memories, TYPE, timeout=60.0)
    else:
        with pytest.raises(elizasql.DeadlineError) as caught:
            await (impatient.delete_memories(ids) if deletes else impatient.create_memories(memories, TYPE))
        assert caught.value.retryable is not deletes
    assert impatient._connections.breaker.failures == 0
    await proxy.heal()
    await pool_is_whole(impatient)
    assert await db.count_memories() == (0 if deletes else 10)


@pytest.mark.parametrize("given", [False, True], ids=["without an id", "with an id"])
@pytest.mark.parametrize("end", ["time limit", "lost connection"])
async def test_create_that_may_be_done_is_retryable_where_its_id_was_given(
    proxy: Proxy, make_db: MakeAdapter, end: str, given: bool
) -> None:
    """Made again as it is, it would make another id, and a second row."""
    db = await make_db(dsn=proxy.dsn, pool_max_size=1, max_retries=2, base_delay=0.0, jitter_max=0.0)
    task: dict[str, Any] = {"name": "once", "tags": ["queue"]} | ({"id": uuid4()} if given else {})
    await db.create_task({"name": "another"})
    proxy.when("server", ANSWER, "hold" if end == "time limit" else "reset")
    if end == "lost connection":
        await proxy.refuse()
    with pytest.raises((elizasql.DeadlineError, elizasql.ConnectionLostError)) as caught:
        await db.create_task(task, timeout=0.3 if end == "time limit" else 60.0)
    assert caught.value.retryable is given
    await proxy.heal()
    await pool_is_whole(db)
    assert [row.name for row in await db.get_tasks(tags=["queue"])] == ["once"]


async def test_what_was_never_sent_is_retryable_without_an_id(proxy: Proxy, make_db: MakeAdapter) -> None:
    db = await make_db(dsn=proxy.dsn, pool_max_size=1, base_delay=0.0, jitter_max=0.0)
    async with db.transaction():
        with pytest.raises((elizasql.PoolTimeoutError, elizasql.DeadlineError)) as caught:
            await db.create_task({"name": "never sent"}, timeout=0.1)
    assert caught.value.retryable


@pytest.mark.parametrize("reset", [False, True], ids=["as it is", "statistics are reset"])
async def test_end_is_found_out_while_it_is_in_progress(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, chance: random.Random, reset: bool
) -> None:
    """The server is still at it when it is asked: it is asked again until it knows.

    Statistics that were reset meanwhile look like a crash; what is in progress is not lost for that.
    """
    db = await make_db(dsn=proxy.dsn)
    ids = ids_of(chance, 2)
    asked = proxy.when("client", b"P", "note", holding=b"pg_xact_status", times=None)
    async with server.admin() as admin, server.admin() as other:
        # A trigger that runs at the end of the transaction, and waits there.
        await admin.execute("""
            CREATE OR REPLACE FUNCTION public.wait_at_the_end() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN NULL; END $$""")
        await admin.execute(
            "CREATE CONSTRAINT TRIGGER wait_at_the_end AFTER INSERT ON elizasql.memories"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION public.wait_at_the_end()"
        )
        try:
            await admin.execute("SELECT pg_advisory_lock(4711)")

            async def transact() -> None:
                async with db.transaction() as tx:
                    for id in ids:
                        await tx.create_memory(memory_of(id, 1), TYPE)
                    proxy.when("client", b"Q", "hold", "after", holding=COMMIT)

            task = asyncio.create_task(transact())

            async def waits() -> bool:
                return bool(await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

            await until(waits, "the end of the transaction waits")
            if reset:
                await admin.execute("SELECT pg_stat_reset_shared('bgwriter')")
            proxy.cut_all()

            async def was_asked() -> bool:
                return asked.count >= 1

            await until(was_asked, "the server is asked")
            assert not task.done()
            await admin.execute("SELECT pg_advisory_unlock(4711)")
            with pytest.raises(elizasql.UnknownOutcomeError) if reset else nullcontext():
                await task
        finally:
            await other.execute("DROP TRIGGER IF EXISTS wait_at_the_end ON elizasql.memories")
    assert await db.count_memories() == 2


@pytest.mark.parametrize("kind", ["transaction", "batch"])
async def test_number_of_a_transaction_that_is_used_again_after_a_crash(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, chance: random.Random, kind: str
) -> None:
    """A crash takes along what was not written down, numbers of transactions included: the next one gets the same.

    Whoever asks by the number what became of his transaction would be told what became of the other's.
    """
    db = await make_db(dsn=proxy.dsn, batch_size=2, timeout=20.0, max_retries=1)
    name = db.config.application_name

    async def work(memories: list[Memory]) -> None:
        if kind == "batch":
            await db.create_memories(memories, TYPE)
            return
        async with db.transaction() as tx:
            await tx.create_memories(memories, TYPE)

    async def crash() -> Ledger | None:
        """Crash at the end of the work; None: its number was not used again, since another's commit wrote it down."""
        life = await server.life()
        ids = ids_of(chance, 4)
        ledger = Ledger(db.agent_id)
        operation = ledger.begin(dict.fromkeys(ids, 1))
        rule = proxy.when("client", b"Q", "hold", holding=COMMIT)
        task = asyncio.create_task(work([memory_of(id, 1) for id in ids]))
        await rule.fired.wait()
        async with server.admin() as admin:
            row = await admin.fetchrow(
                "SELECT pid, backend_xid::text::bigint AS xid FROM pg_stat_activity"
                " WHERE application_name = $1 AND backend_xid IS NOT NULL",
                name,
            )
        postmaster = server.postmaster()
        assert row is not None and postmaster is not None and server.kill_child(row["pid"], postmaster)
        count("sessions by SIGKILL")

        await server.recovered_since(life)
        async with server.admin() as admin:
            number = "SELECT pg_current_xact_id()::text::bigint"
            again = await admin.fetchval(number) <= row["xid"]
            while again and await admin.fetchval(number) < row["xid"] + 3:
                pass
            status = await admin.fetchval("SELECT pg_xact_status($1::text::xid8)", str(row["xid"]))
            assert status == ("committed" if again else "aborted")
        proxy.cut_all()
        if again:
            with pytest.raises(elizasql.UnknownOutcomeError):
                await task
            operation.lose()
            assert await db.count_memories() == 0
            return ledger
        await asyncio.wait({task})
        task.exception()
        await db.delete_memories(ids)
        return None

    async with server.admin() as admin:
        await admin.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
        await admin.execute("SELECT pg_reload_conf()")
    try:
        for _ in range(5):
            ledger = await crash()
            if ledger is not None:
                break
        else:
            pytest.fail("its number was written down each time: nothing was tested")
    finally:
        async with server.admin() as admin:
            await admin.execute("ALTER SYSTEM RESET wal_writer_delay")
            await admin.execute("SELECT pg_reload_conf()")
    assert await check(server.dsn, ledger) == []


# --- what cannot be repeated -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS)
async def test_what_cannot_be_repeated_is_not(
    proxy: Proxy, make_db: MakeAdapter, server: FaultServer, chance: random.Random, cut: str
) -> None:
    rule_of, done = CUTS[cut]
    db = await make_db(dsn=proxy.dsn, pool_max_size=1)
    ledger = Ledger(db.agent_id)
    ids = ids_of(chance, 3)
    await db.create_memories([memory_of(id, 1) for id in ids], TYPE)
    ledger.begin(dict.fromkeys(ids, 1)).acknowledge()
    assert await db.delete_memories([uuid4()]) == 0
    operation = ledger.begin(dict.fromkeys(ids[:2], ABSENT))
    rule = rule_of(proxy)
    with pytest.raises(elizasql.UnknownOutcomeError) as caught:
        await db.delete_memories(ids[:2])
    assert rule.count == 1
    assert caught.value.statement == "delete_memories"
    assert not caught.value.retryable
    operation.lose()

    async def ended() -> bool:
        return await db.count_memories() == (1 if done else 3)

    await until(ended, "the server has done it, or has not")
    assert await check(server.dsn, ledger) == []


@pytest.mark.parametrize("message", ["BEGIN", "DELETE", "COMMIT", "the answer to COMMIT"])
async def test_what_runs_in_a_transaction_of_its_own_is_done_once(
    proxy: Proxy, make_db: MakeAdapter, chance: random.Random, message: str
) -> None:
    """Without prepared statements: what broke before the end was not done, and the end is found out."""
    db = await make_db(dsn=proxy.dsn, pool_max_size=1, prepared_statements=False)
    ids = ids_of(chance, 3)
    await db.create_memories([memory_of(id, 1) for id in ids], TYPE)
    if message.startswith("the answer"):
        rule = proxy.when("server", b"C", "reset", holding=COMMIT)
    else:
        rule = proxy.when("client", b"P" if message == "DELETE" else b"Q", "reset", holding=message.encode())
    assert await db.delete_memories(ids[:2]) == 2
    assert rule.count == 1
    assert await db.count_memories() == 1
    await pool_is_whole(db)


async def test_claimed_task_is_not_claimed_twice(proxy: Proxy, make_db: MakeAdapter) -> None:
    """A claim that was lost is not made again, for other tasks, behind the back of the caller."""
    db = await make_db(dsn=proxy.dsn, pool_max_size=1)
    scene = await make_scene(db)
    tasks = [
        Task(id=uuid4(), name=f"task {number}", tags=["queue"], room_id=scene.room, metadata={}) for number in range(2)
    ]
    await db.create_tasks(tasks)
    assert await db.claim_tasks(1, tags=["none"]) == []
    rule = proxy.when("server", ANSWER, "reset")
    with pytest.raises(elizasql.UnknownOutcomeError):
        await db.claim_tasks(1, tags=["queue"])
    assert rule.count == 1
    assert len(await db.claim_tasks(10, tags=["queue"])) == 1


async def test_pending_task_is_not_updated_twice(proxy: Proxy, make_db: MakeAdapter) -> None:
    """The one who took the tag away is not told that somebody else did."""
    db = await make_db(dsn=proxy.dsn, pool_max_size=1)
    known, taken = await db.create_tasks([Task(name="task", tags=["queue"]) for _ in range(2)])
    assert await db.update_pending_task(known, {"tags": ["known"]}) is True
    rule = proxy.when("server", ANSWER, "reset")
    with pytest.raises(elizasql.UnknownOutcomeError):
        await db.update_pending_task(taken, {"tags": ["taken"]})
    assert rule.count == 1
    task = await db.get_task(taken)
    assert task is not None and task.tags == ["taken"]


async def test_import_counts_right(proxy: Proxy, make_db: MakeAdapter) -> None:
    """Repeated it would find its own rows and count none of them as created."""
    db = await make_db(dsn=proxy.dsn, pool_max_size=1)

    def world() -> bytes:
        row = {
            "id": uuid4(),
            "agent_id": db.agent_id,
            "name": "w",
            "metadata": {},
            "created_at": "2026-01-01T00:00:00Z",
        }
        return as_array([orjson.dumps(row, default=str)])

    assert await put(db, SQL["import_worlds"], rows=world()) == (1, [])
    rule = proxy.when("server", ANSWER, "reset")
    assert await put(db, SQL["import_worlds"], rows=world()) == (1, [])
    assert rule.count == 1
    assert len(await db.get_all_worlds()) == 2


@pytest.mark.parametrize("name", ["delete_memories", "delete_rooms", "delete_worlds", "delete_tasks"])
async def test_statement_that_is_not_repeatable_is_sent_once(proxy: Proxy, make_db: MakeAdapter, name: str) -> None:
    db = await make_db(dsn=proxy.dsn, pool_max_size=1)
    assert not SQL[name].repeatable
    ids = [uuid4()]
    assert await db._executor.fetch_value(SQL[name], agent_id=db.agent_id, ids=ids, indexed=False) == 0
    sent = proxy.when("client", b"B", "note", holding=ids[0].bytes, times=None)
    proxy.when("server", ANSWER, "reset")
    with pytest.raises(elizasql.UnknownOutcomeError):
        await db._executor.fetch_value(SQL[name], agent_id=db.agent_id, ids=ids, indexed=False)
    assert sent.count == 1
