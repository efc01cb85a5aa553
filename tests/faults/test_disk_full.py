"""The disk is full: on a small file system of its own, mounted for the test.

The invariant: whoever writes is told ServerBusyError (53100), at once and without a second try; reads and searches go
on; nothing is stored in part; once there is room, writes succeed again.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

import elizasql
from elizasql import DatabaseAdapter
from tests.faults.conftest import MakeAdapter
from tests.faults.harness import TYPE, Ledger, check, embedding_of, has_embedding, memory_of, new_id, pool_is_whole
from tests.faults.server import NOT_NOW, FaultServer, until

Mount = Callable[[int], Path]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mount small file systems; they are gone at the end, whatever is in them."""
    mounted: list[Path] = []

    def make(megabytes: int) -> Path:
        if sys.platform != "linux" or os.geteuid() != 0:
            pytest.skip("a file system that is full needs root, to mount one of its own")
        folder = Path(tempfile.mkdtemp(prefix="esqd-"))
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0755", "elizasql-test", str(folder)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            folder.rmdir()
            pytest.skip(f"a file system that is full needs the right to mount one of its own: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        # Lazily, should somebody still be in it.
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def fill(folder: Path, *, leave: int) -> Path:
    """Write a file that takes all the room but so many bytes."""
    ballast = folder / "ballast"
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize - leave
    with ballast.open("wb") as file, suppress(OSError):
        for _ in range(max(free, 0) >> 16):
            file.write(bytes(1 << 16))
    return ballast


async def write(
    db: DatabaseAdapter, ledger: Ledger, chance: random.Random, number: int
) -> elizasql.ElizaSQLError | None:
    """Write a batch; gives its error."""
    ids = [new_id(chance) for _ in range(number)]
    operation = ledger.begin(dict.fromkeys(ids, 1))
    try:
        await db.create_memories([memory_of(id, 1) for id in ids], TYPE)
    except elizasql.ElizaSQLError as error:
        # The server itself has said no, or nobody knows.
        if isinstance(error, (elizasql.ServerBusyError, elizasql.CircuitOpenError)):
            operation.refuse()
        else:
            operation.lose()
        return error
    operation.acknowledge()
    return None


async def test_data_do_not_fit_any_more(mount: Mount, make_db: MakeAdapter, server: FaultServer, seed: int) -> None:
    """Tables are on the full file system, the journal is not: the server says 53100 and stays well."""
    chance = random.Random(seed)
    folder = mount(96)
    place = folder / "space"
    place.mkdir(mode=0o700)
    status = (server.home / "data").stat()
    os.chown(place, status.st_uid, status.st_gid)
    async with server.admin() as admin:
        await admin.execute(f"CREATE TABLESPACE small LOCATION '{place}'")
    try:
        async with server.database("small") as dsn:
            db = await make_db(dsn=dsn, failure_threshold=5)
            ledger = Ledger(db.agent_id)
            first = next(id for id in iter(lambda: new_id(chance), None) if has_embedding(id))
            await db.create_memory(memory_of(first, 1), TYPE)
            ledger.begin({first: 1}).acknowledge()
            ballast = fill(folder, leave=2 << 20)
            before = db._meter.retries
            error = None
            while error is None:
                error = await write(db, ledger, chance, 100)
                assert len(ledger.attempted) < 100_000
            assert isinstance(error, elizasql.ServerBusyError) and error.sqlstate == "53100", repr(error)
            assert db._meter.retries == before, "a full disk is not full of retries"
            # Larger ones still do not fit; a single one may find a gap.
            assert isinstance(await write(db, ledger, chance, 400), elizasql.ServerBusyError)
            await write(db, ledger, chance, 1)
            hits = await db.search_memories(embedding=embedding_of(first, 1), table_name=TYPE, count=5)
            assert hits[0].id == first
            assert (await db.get_memory_by_id(first)) is not None
            assert await db.count_memories() == len(ledger.acknowledged)
            ballast.unlink()

            async def writes_again() -> bool:
                return await write(db, ledger, chance, 20) is None

            await until(writes_again, "writes succeed again", 20)
            assert await check(dsn, ledger) == []
            await pool_is_whole(db)
            await db.close()
    finally:
        async with server.admin() as admin:
            await admin.execute("DROP TABLESPACE IF EXISTS small")


@pytest.mark.slow
async def test_journal_does_not_fit_any_more(mount: Mount, seed: int) -> None:
    """The server cannot go on without its journal and panics; when there is room it recovers, and nothing is lost."""
    chance = random.Random(seed)
    folder = mount(96)
    server = FaultServer()
    await server.start()
    try:
        await server.stop(keep=True)
        journal = server.home / "data" / "pg_wal"
        shutil.copytree(journal, folder / "pg_wal")
        for path in (folder / "pg_wal", *(folder / "pg_wal").rglob("*")):
            os.chown(path, journal.stat().st_uid, journal.stat().st_gid)
        (folder / "pg_wal").chmod(0o700)
        shutil.rmtree(journal)
        journal.symlink_to(folder / "pg_wal")
        await server.start(migrate=False)
        settings: dict[str, Any] = {"base_delay": 0.05, "jitter_max": 0.05, "max_delay": 0.2, "failure_threshold": 1000}
        async with elizasql.connect(
            agent_id=uuid4(),
            dsn=server.dsn,
            indexing="manual",
            timeout=10.0,
            application_name="faults-full",
            **settings,
        ) as db:
            await db.ensure_agent_exists({"name": "test"})
            await db.ensure_embedding_dimension(384)
            ledger = Ledger(db.agent_id)
            ballast = fill(folder, leave=1 << 20)
            error = None
            while error is None:
                # To the end of one segment after the other, until a new one is needed.
                error = await write(db, ledger, chance, 50)
                with suppress(*NOT_NOW, asyncpg.PostgresError):
                    admin = await asyncpg.connect(server.admin_dsn, timeout=5)
                    await admin.execute("SELECT pg_switch_wal()")
                    await admin.close()
            assert isinstance(error, elizasql.ConnectionLostError), repr(error)
            print(f"{len(ledger.acknowledged)} written before {error!r}")
            assert ledger.acknowledged
            assert "No space left" in (server.home / "server.log").read_text(errors="replace")
            ballast.unlink()
            await server.start(migrate=False)

            async def answers() -> bool:
                return await db.is_ready()

            await until(answers, "the server is well")
            assert await check(server.dsn, ledger) == []
            assert await write(db, ledger, chance, 50) is None
            assert await check(server.dsn, ledger) == []
            await pool_is_whole(db)
    finally:
        await server.stop()
