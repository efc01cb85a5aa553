"""The checker and the workload themselves: they find every kind of fault that is planted, and nothing where none is."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest

import elizasql
from elizasql import DatabaseAdapter
from tests.faults.conftest import MakeAdapter, make_room
from tests.faults.harness import (
    ABSENT,
    TYPE,
    Ledger,
    Row,
    Workload,
    check,
    check_indexes,
    compare,
    content_of,
    embedding_of,
    has_embedding,
    memory_of,
    new_id,
    no_leaks,
    pool_is_whole,
    version_of,
)
from tests.faults.server import FaultServer

CHANCE = random.Random(7)
IDS = [id for id in (new_id(CHANCE) for _ in range(40)) if has_embedding(id)][:12]
BARE = next(id for id in (new_id(CHANCE) for _ in range(100)) if not has_embedding(id))


def row(id: UUID, version: int = 1) -> Row:
    return Row(id, content_of(id, version), embedding_of(id, version))


def ledger_of(*, acknowledged: list[UUID] = IDS[:4], lost: list[UUID] = IDS[4:7]) -> Ledger:
    """Some memories that were acknowledged, a batch that was lost, one that was refused, one that was deleted."""
    ledger = Ledger(uuid4())
    ledger.begin(dict.fromkeys(acknowledged, 1)).acknowledge()
    ledger.begin(dict.fromkeys(lost, 1)).lose()
    ledger.begin({IDS[7]: 1}).refuse()
    ledger.begin({IDS[8]: 1, BARE: 1}).acknowledge()
    ledger.begin({IDS[8]: ABSENT}).acknowledge()
    return ledger


def stored() -> list[Row]:
    return [*map(row, IDS[:4]), row(BARE)]


# --- what is compared ------------------------------------------------------------------------------------------------


def test_all_is_well() -> None:
    assert compare(stored(), ledger_of()) == []
    assert compare([*stored(), *map(row, IDS[4:7])], ledger_of()) == [], "what was lost may be there as a whole"


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (lambda rows: rows[1:], "acknowledged and is not stored"),
        (lambda rows: [*rows, row(IDS[11])], "never attempted"),
        (lambda rows: [*rows, rows[0]], "stored twice"),
        (lambda rows: [*rows, row(IDS[7])], "version 1 is stored"),
        (lambda rows: [*rows, row(IDS[8])], "version 1 is stored"),
        (lambda rows: [replace(rows[0], embedding=None), *rows[1:]], "not both there"),
        (lambda rows: [*rows[:-1], replace(rows[-1], embedding=np.ones(384))], "not both there"),
        (lambda rows: [replace(rows[0], embedding=embedding_of(IDS[0], 2)), *rows[1:]], "is not the one of version 1"),
        (lambda rows: [replace(rows[0], content=content_of(IDS[1], 1)), *rows[1:]], "content is not right"),
        (lambda rows: [replace(rows[0], content={"text": "x"}), *rows[1:]], "content is not right"),
        (lambda rows: [replace(rows[0], content=[]), *rows[1:]], "content is not right"),
        (lambda rows: [row(IDS[0], 2), *rows[1:]], "version 2 is stored"),
        (lambda rows: [*rows, row(IDS[4])], "stored in part"),
        (lambda rows: [*rows, row(IDS[4]), row(IDS[6])], "stored in part"),
        (lambda rows: [replace(rows[0], type="facts"), *rows[1:]], "type or scope"),
        (lambda rows: [replace(rows[0], scope_agrees=False), *rows[1:]], "type or scope"),
    ],
)
def test_planted_fault_is_found(plant: Callable[[list[Row]], list[Row]], found: str) -> None:
    problems = compare(plant(stored()), ledger_of())
    assert any(found in problem for problem in problems), problems


def test_change_that_was_lost_leaves_the_old_version_or_the_new_one() -> None:
    ledger = Ledger(uuid4())
    ledger.begin(dict.fromkeys(IDS[:2], 1)).acknowledge()
    ledger.begin(dict.fromkeys(IDS[:2], 2)).lose()
    assert compare([row(IDS[0]), row(IDS[1])], ledger) == []
    assert compare([row(IDS[0], 2), row(IDS[1], 2)], ledger) == []
    assert "in part" in compare([row(IDS[0]), row(IDS[1], 2)], ledger)[0]
    assert "not stored" in compare([row(IDS[0])], ledger)[0]


def test_deletion_that_was_lost() -> None:
    ledger = Ledger(uuid4())
    ledger.begin(dict.fromkeys(IDS[:2], 1)).acknowledge()
    ledger.begin(dict.fromkeys(IDS[:2], ABSENT)).lose()
    assert compare([], ledger) == []
    assert compare([row(IDS[0]), row(IDS[1])], ledger) == []
    assert "in part" in compare([row(IDS[0])], ledger)[0]


def test_ledger_keeps_its_sets() -> None:
    ledger = ledger_of()
    assert ledger.acknowledged == {*IDS[:4], IDS[8], BARE}
    assert ledger.unknown == set(IDS[4:7])
    assert ledger.refused == {IDS[7]}
    assert ledger.attempted == {*IDS[:9], BARE}
    assert ledger.settled(IDS[0]) == 1
    assert ledger.settled(IDS[4]) is None
    assert ledger.settled(IDS[8]) == ABSENT
    assert not ledger.running
    running = ledger.begin({IDS[0]: 2})
    assert ledger.running == {running}
    assert ledger.settled(IDS[0]) is None
    running.refuse()
    assert ledger.settled(IDS[0]) == 1
    assert IDS[0] not in ledger.refused


def test_rows_say_whether_they_are_right() -> None:
    assert version_of(IDS[0], content_of(IDS[0], 3)) == 3
    assert version_of(IDS[1], content_of(IDS[0], 3)) is None
    assert version_of(IDS[0], {**content_of(IDS[0], 3), "version": 4}) is None
    assert version_of(IDS[0], None) is None
    assert np.array_equal(embedding_of(IDS[0], 1), embedding_of(IDS[0], 1))
    assert not np.array_equal(embedding_of(IDS[0], 1), embedding_of(IDS[0], 2))
    assert embedding_of(BARE, 1) is None


# --- what is stored --------------------------------------------------------------------------------------------------


async def filled(db: DatabaseAdapter) -> Ledger:
    """Store what `ledger_of` says; the lost batch has arrived."""
    ledger = ledger_of()
    ledger.agent_id = db.agent_id
    room = await make_room(db)
    for ids in (IDS[:4], IDS[4:7], [BARE]):
        await db.create_memories([memory_of(id, 1, room_id=room) for id in ids], TYPE)
    return ledger


async def test_check_finds_nothing_where_all_is_well(make_db: MakeAdapter, server: FaultServer) -> None:
    db = await make_db()
    await db.create_memories([memory_of(id, 1) for id in IDS], TYPE)  # another agent's, of the same ids
    ledger = await filled(await make_db())
    assert await check(server.dsn, ledger, planted=True) == []


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        ("DELETE FROM elizasql.memories WHERE agent_id = $1 AND id = $2", "acknowledged and is not stored"),
        ("DELETE FROM elizasql.embeddings WHERE agent_id = $1 AND memory_id = $2", "not both there"),
        ("UPDATE elizasql.memories SET content = '{}' WHERE agent_id = $1 AND id = $2", "content is not right"),
        ("UPDATE elizasql.memories SET type = 'facts' WHERE agent_id = $1 AND id = $2", "type or scope"),
        ("UPDATE elizasql.memories SET room_id = NULL WHERE agent_id = $1 AND id = $2", "type or scope"),
        (
            "UPDATE elizasql.embeddings SET dim_384 = (SELECT array_agg(1)::vector FROM generate_series(1, 384))"
            " WHERE agent_id = $1 AND memory_id = $2",
            "is not the one of version 1",
        ),
        ("UPDATE elizasql.memories SET id = gen_random_uuid() WHERE agent_id = $1 AND id = $2", "never attempted"),
    ],
)
async def test_check_finds_what_was_done_behind_its_back(
    make_db: MakeAdapter, server: FaultServer, sql: str, found: str
) -> None:
    ledger = await filled(await make_db())
    async with server.admin() as admin:
        # Foreign keys and triggers of the schema would prevent or repair it.
        await admin.execute("SET session_replication_role = replica")
        await admin.execute(sql, ledger.agent_id, IDS[0])
    problems = await check(server.dsn, ledger, planted=True)
    assert any(found in problem for problem in problems), problems


async def test_check_finds_an_orphan(make_db: MakeAdapter, server: FaultServer) -> None:
    ledger = await filled(await make_db())
    async with server.admin() as admin:
        await admin.execute("SET session_replication_role = replica")
        await admin.execute("DELETE FROM elizasql.memories WHERE agent_id = $1 AND id = $2", ledger.agent_id, IDS[0])
    assert any("without its memory" in problem for problem in await check(server.dsn, ledger, planted=True))


async def test_check_finds_a_batch_that_was_stored_in_part(make_db: MakeAdapter, server: FaultServer) -> None:
    ledger = await filled(await make_db())
    async with server.admin() as admin:
        await admin.execute("DELETE FROM elizasql.memories WHERE agent_id = $1 AND id = $2", ledger.agent_id, IDS[5])
    assert any("in part" in problem for problem in await check(server.dsn, ledger, planted=True))


# --- the workload ----------------------------------------------------------------------------------------------------


async def test_an_index_without_a_row_of_its_table_is_found(make_db: MakeAdapter, server: FaultServer) -> None:
    db = await make_db()
    async with server.admin() as admin:
        assert await check_indexes(admin) == []
        # As a crash might leave it: what was stored meanwhile, it does not know.
        ready = "UPDATE pg_index SET indisready = {} WHERE indexrelid = 'elizasql.worlds_created_at_idx'::regclass"
        await admin.execute(ready.format("FALSE"))
        await db.create_world({"name": "a"})
        await admin.execute(ready.format("TRUE"))
        [found] = await check_indexes(admin)
        assert found.startswith("worlds_created_at_idx: ")
        await admin.execute("REINDEX INDEX elizasql.worlds_created_at_idx")
        assert await check_indexes(admin) == []


async def test_workload_on_a_server_that_is_well(make_db: MakeAdapter, server: FaultServer, seed: int) -> None:
    db = await make_db(batch_size=5, indexing="background", index_interval=0.3)
    async with Workload(db, seed=seed, timeout=10, room_id=await make_room(db), readers=2) as work:
        await work.advance(250)
    assert work.figures.violations == [], work
    assert set(work.figures.errors) <= {"ForeignKeyError"}, work
    assert work.ledger.counts["unknown"] == 0
    assert len(work.figures.calls) == 12, work
    assert await check(server.dsn, work.ledger) == []
    await pool_is_whole(db)


async def test_workload_notices_a_library_that_lies(
    make_db: MakeAdapter, server: FaultServer, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An acknowledged write that was not done, by every tenth single one."""
    db = await make_db()
    real, calls = db.create_memory, 0

    async def lies(memory: Any, *args: Any, **kwargs: Any) -> UUID:
        nonlocal calls
        calls += 1
        return memory.id if calls % 10 == 0 else await real(memory, *args, **kwargs)  # type: ignore[no-any-return]

    monkeypatch.setattr(db, "create_memory", lies)
    async with Workload(db, seed=seed, timeout=10) as work:
        await work.advance(200)
        for _ in range(20):
            if work.figures.violations:
                break
            await work.advance(200)  # the readers had little of the processor
    ledger = work.ledger
    lost = [problem for problem in compare(await rows_of(server, ledger), ledger) if "is not stored" in problem]
    assert lost
    assert work.figures.violations, "a search or a look-up must have missed one"


async def test_workload_notices_another_error_and_a_call_that_is_late(
    make_db: MakeAdapter, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = await make_db()

    async def raises(*args: Any, **kwargs: Any) -> None:
        raise OSError("raw")

    monkeypatch.setattr(db, "create_memory", raises)
    work = Workload(db, seed=seed, timeout=10, writers=1, readers=0)
    work.start()
    with pytest.raises(OSError, match="raw"):
        await work.advance(10_000)
    with pytest.raises(OSError, match="raw"):
        await work.stop()
    assert any("no error of the library" in violation for violation in work.figures.violations)

    monkeypatch.undo()
    late = Workload(db, seed=seed, timeout=-0.999, writers=1, readers=0)
    with late._timed("nothing"):
        await asyncio.sleep(0.01)
    assert any("with a time limit" in violation for violation in late.figures.violations)


async def test_workload_is_the_same_for_a_seed(make_db: MakeAdapter, seed: int) -> None:
    attempted = []
    for _ in range(2):
        db = await make_db()
        async with Workload(db, seed=seed, timeout=10, writers=1, readers=0) as work:
            await work.advance(20)
        attempted.append(list(work.ledger.versions))
    shorter = min(map(len, attempted))
    assert shorter >= 20
    assert attempted[0][:shorter] == attempted[1][:shorter]


async def rows_of(server: FaultServer, ledger: Ledger) -> list[Row]:
    """What is stored, for a comparison that is not counted in the summary of the run."""
    async with server.admin() as admin:
        await elizasql._codecs.register(admin, "public")
        rows = await admin.fetch(
            "SELECT m.id, m.content, e.dim_384 FROM elizasql.memories m LEFT JOIN elizasql.embeddings e"
            " ON e.agent_id = m.agent_id AND e.memory_id = m.id WHERE m.agent_id = $1",
            ledger.agent_id,
        )
    return [Row(id, content, embedding) for id, content, embedding in rows]


# --- leaks -----------------------------------------------------------------------------------------------------------


async def test_leaks_are_found(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.faults.harness.LEAK_PATIENCE", 0.2)
    leaked = asyncio.Event()

    with pytest.raises(AssertionError, match="left behind"):
        async with no_leaks():
            task = asyncio.create_task(leaked.wait())
    leaked.set()
    await task

    with pytest.raises(AssertionError, match="left behind"):
        async with no_leaks():
            connection = await asyncpg.connect(server.dsn)
    await connection.close()

    with pytest.raises(AssertionError, match="nobody saw"):
        async with no_leaks():
            asyncio.get_running_loop().call_exception_handler({"message": "planted"})

    other = await asyncpg.connect(server.dsn, server_settings={"application_name": "leaky"})
    with pytest.raises(AssertionError, match="session has ended"):
        async with no_leaks(server, "leaky"):
            pass
    await other.execute("BEGIN")
    with pytest.raises(AssertionError, match="idle in a transaction"):
        await server.no_idle_transactions("leaky", 0.2)
    await other.close()
    await server.no_idle_transactions("leaky")
    async with no_leaks(server, "leaky"):
        pass


async def test_pool_that_is_not_whole(make_db: MakeAdapter) -> None:
    db = await make_db(pool_max_size=2)
    await pool_is_whole(db)
    async with db.transaction():
        with pytest.raises(AssertionError, match="nothing is in use"):
            await pool_is_whole(db, 0.1)
    await pool_is_whole(db)


def test_clock_stands_still_with_the_process() -> None:
    """A second in which it could run counts, also where it did nothing; one in which it was stopped does not."""
    code = "from tests.faults.clock import running_time as t; t(); print(flush=True); input(); print(t())"
    counted = []
    for stopped in (False, True):
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=Path(__file__).parents[2]) as child:
            assert child.stdout is not None
            child.stdout.readline()
            if stopped:
                child.send_signal(signal.SIGSTOP)
            time.sleep(1)  # how long it is stopped, or blocked
            child.send_signal(signal.SIGCONT)
            counted.append(float(child.communicate("\n")[0]))
    assert counted[1] < 0.6 < counted[0]
