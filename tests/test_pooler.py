"""Through a pooler in transaction mode, and to one of several hosts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit
from uuid import uuid4

import asyncpg
import numpy as np
import pytest

import elizasql
from elizasql import Config, DatabaseAdapter, Memory, _hosts, _pool
from elizasql.cli._place import Place
from elizasql.cli.queries import explain_call, measure_recall
from elizasql.transfer import Archive, export_archive, import_archive, import_elizaos

from .conftest import make_scene

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
V = np.random.default_rng(5).normal(size=(50, 384)).astype(np.float32)

needs_pgbouncer = pytest.mark.skipif(PGBOUNCER is None, reason="the program pgbouncer is not installed")


def memory(text: str = "x", **fields: Any) -> Memory:
    return Memory(content={"text": text}, **fields)


def version() -> tuple[int, ...]:
    said = subprocess.run([str(PGBOUNCER), "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"(\d+)\.(\d+)", said).groups()))  # type: ignore[union-attr]


class Pooler:
    """A PgBouncer in transaction mode, with two connections to the server."""

    def __init__(self, dsn: str, folder: Path, *, settings: bool = True, ignored: bool = True) -> None:
        parts = urlsplit(dsn)
        host = parse_qs(parts.query).get("host", [parts.hostname or "127.0.0.1"])[0]
        wanted = _pool.session_settings(Config.load(environ={}))
        del wanted["TimeZone"], wanted["application_name"]  # it takes these from each client
        query = ";".join(f"SET {name} = '{value}'" for name, value in wanted.items())
        connect_query = "connect_query='{}'".format(query.replace("'", "''")) if settings else ""
        (folder / "pgbouncer.ini").write_text(
            f"""[databases]
db = host={host} port={parts.port or 5432} dbname={parts.path.lstrip("/")} user={parts.username} {connect_query}
[pgbouncer]
listen_addr =
unix_socket_dir = {folder}
unix_socket_mode = 0777
listen_port = 6432
auth_type = any
pool_mode = transaction
default_pool_size = 2
max_client_conn = 200
{"ignore_startup_parameters = " + ",".join(wanted) if ignored else ""}
{"max_prepared_statements = 200" if version() >= (1, 21) else ""}
"""
        )
        # It refuses to be root, and the socket's folder lets its owner in alone.
        owner = os.stat(host).st_uid if host.startswith("/") else pwd.getpwnam("nobody").pw_uid  # noqa: PTH116
        user = {} if os.geteuid() else {"user": owner}
        if user:
            os.chown(folder, user["user"], -1)
            folder.chmod(0o755)
            if host.startswith(tempfile.gettempdir()):
                Path(host).parent.parent.chmod(0o711)  # the folder of this test run
        self._process = subprocess.Popen(
            [str(PGBOUNCER), str(folder / "pgbouncer.ini")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **user,  # type: ignore[call-overload]
        )
        self.dsn = f"postgresql://anybody@/db?host={quote(str(folder), safe='')}&port=6432"
        assert self._process.stderr is not None
        said = []
        for line in self._process.stderr:
            said.append(line)
            if "process up" in line:
                break
        else:
            raise AssertionError("".join(said))

    def stop(self) -> None:
        self._process.terminate()
        _, said = self._process.communicate(timeout=30)
        print(said[-3000:])  # shown when a test fails


@pytest.fixture
def pooler(dsn: str) -> Iterator[Callable[..., Pooler]]:
    with contextlib.ExitStack() as stack:

        def start(address: str = dsn, **options: Any) -> Pooler:
            folder = Path(tempfile.mkdtemp(prefix="esql-b"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            made = Pooler(address, folder, **options)
            stack.callback(made.stop)
            return made

        yield start


MODES = [pytest.param(False, id="without names")]
if PGBOUNCER is not None and version() >= (1, 21):
    MODES.append(pytest.param(True, id="with names"))


@pytest.fixture
async def through(dsn: str, pooler: Callable[..., Pooler], request: Any) -> AsyncIterator[DatabaseAdapter]:
    db = await elizasql.open(
        agent_id=uuid4(),
        dsn=pooler().dsn,
        migration_dsn=dsn,
        prepared_statements=request.param,
        indexing="manual",
        batch_size=7,
        pool_max_size=10,
    )
    yield db
    await db.close()


@needs_pgbouncer
@pytest.mark.parametrize("through", MODES, indirect=True)
async def test_ten_connections_on_two(through: DatabaseAdapter) -> None:
    db = through
    await db.ensure_agent_exists({"name": "x"})
    await db.ensure_embedding_dimension(384)
    scene = await make_scene(db)

    async def turn(number: int) -> None:
        mark = f"turn {number}"
        id = await db.create_memory(memory(mark, embedding=V[number], room_id=scene.room), "messages")
        found = await db.search_memories(embedding=V[number], table_name="messages", room_id=scene.room, count=1)
        assert found[0].id == id
        ids = await db.create_memories([memory(mark) for _ in range(20)], "facts")
        assert len(await db.get_memories_by_ids(ids)) == 20
        async with db.transaction() as tx:
            await tx.create_memory(memory(mark), "notes")
            with contextlib.suppress(elizasql.ForeignKeyError):
                async with tx.transaction() as inner:
                    await inner.create_memory(memory(mark, room_id=uuid4()), "notes")
            assert await tx.count_memories(table_name="notes") >= 1
        assert await db.delete_memory(id)
        with pytest.raises(elizasql.ForeignKeyError):
            await db.create_memory(memory(room_id=uuid4()), "messages")

    await asyncio.gather(*(turn(number) for number in range(len(V))))
    assert await db.count_memories(table_name="facts") == 20 * len(V)
    assert await db.count_memories(table_name="notes") == len(V)
    assert await db.index_memories() == 0
    assert (await db.health())["ready"]


@needs_pgbouncer
@pytest.mark.parametrize("through", MODES, indirect=True)
async def test_tasks_are_heard_of_on_a_direct_connection(through: DatabaseAdapter) -> None:
    db = through
    await db.ensure_agent_exists({"name": "x"})
    tasks = db.wait_for_tasks(poll_interval=600)
    waiting = asyncio.ensure_future(anext(tasks))
    while not db._listeners:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    id = await db.create_task({"name": "t", "tags": ["queue"]})
    assert (await asyncio.wait_for(waiting, 30)).id == id
    await tasks.aclose()


@needs_pgbouncer
@pytest.mark.parametrize("through", MODES, indirect=True)
async def test_data_is_moved_through_it(through: DatabaseAdapter, tmp_path: Path) -> None:
    db, agent = through, through.agent_id
    await db.ensure_agent_exists({"name": "x"})
    await db.ensure_embedding_dimension(384)
    await db.create_memories([memory(embedding=v, unique=True) for v in V], "facts")

    async def move(number: int) -> None:
        path = tmp_path / f"{number}.tar"
        told = await export_archive(db.config.dsn or "", path, db.config, agent_ids=[agent])
        assert told["rows"] == {"agents": 1, "memories": len(V), "embeddings": len(V)}
        with Archive(path) as archive:
            assert not +(await import_archive(db, archive)).created

    await asyncio.gather(*(move(number) for number in range(10)))
    # The pooler does not know the settings that reading needs, and need not: they go with the transaction.
    with pytest.raises(elizasql.ConfigurationError, match="no database of ElizaOS"):
        await import_elizaos(db.config.dsn or "", db.config, None)


@needs_pgbouncer
@pytest.mark.parametrize("through", MODES, indirect=True)
async def test_calls_are_explained_through_it(through: DatabaseAdapter) -> None:
    db = through
    await db.ensure_agent_exists({"name": "x"})
    await db.ensure_embedding_dimension(384)
    await db.create_memories([memory(embedding=v, unique=True) for v in V], "facts")
    for method, given in (
        ("get_memories", {"table_name": "facts", "count": 5}),
        ("search_memories", {"embedding": V[0], "table_name": "facts", "count": 5}),
    ):
        told = await explain_call(db, method, given)
        assert told["rows"] == 5 and told["index_used"], told
    left = "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'explained%'"
    executor: Any = db._executor
    async with executor.transaction() as session:
        assert await session._connection.fetchval(left) == 0


@needs_pgbouncer
@pytest.mark.parametrize("through", MODES, indirect=True)
async def test_recall_is_measured_through_it(through: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pooler's connections have the role's ef_search, whichever is tried."""
    db = through
    await db.ensure_agent_exists({"name": "x"})
    await db.ensure_embedding_dimension(384)
    await db.create_memories([memory(embedding=v, unique=True) for v in V], "facts")
    monkeypatch.setenv("ELIZASQL_PREPARED_STATEMENTS", str(db.config.prepared_statements))
    place = Place(db.config.dsn or "", db.config, embedded=False)
    told = await measure_recall(place, db.agent_id, None, 5, 3, 0.99, lambda *_: None)
    assert [step["ef_search"] for step in told["steps"]] == [20, 40, 60, 80, 100]
    assert {step["recall"] for step in told["steps"]} == {1.0}


@needs_pgbouncer
async def test_pooler_that_drops_the_settings_is_refused(dsn: str, pooler: Callable[..., Pooler]) -> None:
    with pytest.raises(elizasql.ConfigurationError, match=r"does not apply .*enable_seqscan"):
        await elizasql.open(
            agent_id=uuid4(), dsn=pooler(settings=False).dsn, migration_dsn=dsn, prepared_statements=False
        )


@needs_pgbouncer
async def test_pooler_that_refuses_settings_is_asked_without(own_database: str, pooler: Callable[..., Pooler]) -> None:
    """As one whose configuration is somebody else's; each connection that comes later saves itself the refusal."""
    admin = await asyncpg.connect(own_database.replace("//elizasql@", "//postgres@"))
    await admin.execute(f"ALTER DATABASE {urlsplit(own_database).path[1:]} SET timezone = 'Europe/Berlin'")
    await admin.close()
    address = pooler(own_database, ignored=False).dsn
    options: dict[str, Any] = {"dsn": address, "migration_dsn": own_database, "prepared_statements": False}
    async with elizasql.connect(agent_id=uuid4(), pool_min_size=3, indexing="manual", **options) as db:
        await db.ensure_agent_exists({"name": "x"})
        assert _hosts._hosts_of(address).bare
    with pytest.raises(elizasql.ConfigurationError, match=r"does not apply .*enable_seqscan.*ALTER ROLE"):
        refused = pooler(own_database, ignored=False, settings=False).dsn
        await elizasql.open(agent_id=uuid4(), **options | {"dsn": refused})


@needs_pgbouncer
async def test_pooler_among_several_hosts_is_not_asked_without(pooler: Callable[..., Pooler]) -> None:
    """Settings are looked at once: the next host may have none from the role, and searches would come back short."""
    host = re.compile("host=([^&]*)")
    address = host.sub(r"host=\1,\1", pooler(ignored=False).dsn)
    with pytest.raises(asyncpg.ProtocolViolationError, match="unsupported startup parameter"):
        await _hosts.connect(address, timeout=5.0, server_settings={"jit": "off"})
    assert not _hosts._hosts_of(address).bare


async def test_address_with_what_only_libpq_knows(dsn: str) -> None:
    """As hosts of databases give it out."""
    more = (
        "channel_binding=prefer&gssencmode=disable&gssdelegation=0&connect_timeout=30&fallback_application_name=x"
        "&keepalives=1&keepalives_count=3&keepalives_idle=60&keepalives_interval=5&tcp_user_timeout=1000"
        "&sslsni=1&sslcompression=0"
    )
    address = f"{dsn}{'&' if '?' in dsn else '?'}{more}"
    async with elizasql.connect(agent_id=uuid4(), dsn=address, indexing="manual") as db:
        await db.ensure_agent_exists({"name": "x"})
        assert db.config.connection_timeout == 30.0
    for asked in ("channel_binding=prefer", "gssencmode=disable"):
        name = asked.partition("=")[0]
        with pytest.raises(elizasql.ConfigurationError, match=rf"{name}=require is more than .*=verify-full"):
            await elizasql.open(agent_id=uuid4(), dsn=address.replace(asked, f"{name}=require"))


async def test_without_names_and_without_a_pooler(dsn: str, round_trips: list[str]) -> None:
    """Each statement is a transaction of its own."""
    async with elizasql.connect(agent_id=uuid4(), dsn=dsn, prepared_statements=False, indexing="manual") as db:
        await db.ensure_agent_exists({"name": "x"})
        round_trips.clear()
        id = await db.create_memory(memory(), "messages")
        assert [text.split()[0].rstrip(";") for text in round_trips] == ["BEGIN", "INSERT", "COMMIT"]
        assert (await db.get_memory_by_id(id)).content == {"text": "x"}  # type: ignore[union-attr]


# --- several hosts ---------------------------------------------------------------------------------------------------


def socket_folder(dsn: str) -> str:
    found = parse_qs(urlsplit(dsn).query).get("host")
    if found is None:
        pytest.skip("the server has no socket here")
    return found[0]


async def test_first_host_that_is_there(dsn: str, tmp_path: Path) -> None:
    parts = urlsplit(dsn)
    several = f"{tmp_path},{socket_folder(dsn)}"
    address = (
        f"postgresql://{parts.netloc}{parts.path}?host={quote(several, safe='/,')}&target_session_attrs=read-write"
    )
    async with elizasql.connect(agent_id=uuid4(), dsn=address, indexing="manual") as db:
        await db.ensure_agent_exists({"name": "x"})
        await db.create_memory(memory(), "messages")
        assert await db.count_memories() == 1


@pytest.mark.parametrize(
    ("dsn", "wanted"),
    [
        ("postgresql://u:p@a:1,b:2/d?x=y", ["postgresql://u:p@a:1/d?x=y", "postgresql://u:p@b:2/d?x=y"]),
        ("postgresql://[::1]:1,b/d", ["postgresql://[::1]:1/d", "postgresql://b/d"]),
        ("postgresql://u@a,[::1]/d", ["postgresql://u@a/d", "postgresql://u@[::1]/d"]),
        ("postgresql://[::1],[::2]:5/d?x=y", ["postgresql://[::1]/d?x=y", "postgresql://[::2]:5/d?x=y"]),
        ("postgresql://a/d", ["postgresql://a/d"]),
        (
            "postgresql://u@/d?host=/x,b&port=1,2",
            ["postgresql://u@/d?host=%2Fx&port=1", "postgresql://u@/d?host=b&port=2"],
        ),
        ("postgresql:///d?host=/x,b&port=1", ["postgresql:/d?host=%2Fx&port=1", "postgresql:/d?host=b&port=1"]),
        ("postgresql:///d?host=a,b", ["postgresql:/d?host=a", "postgresql:/d?host=b"]),
    ],
)
def test_each_host_has_an_address_of_its_own(dsn: str, wanted: list[str]) -> None:
    assert _hosts._split(dsn) == wanted
    assert Config.load(dsn=dsn, environ={}).dsn == dsn


async def test_host_that_answered_last_is_tried_first(dsn: str, tmp_path: Path) -> None:
    several = f"postgresql://{urlsplit(dsn).netloc}{urlsplit(dsn).path}?host={tmp_path},{socket_folder(dsn)}"
    for _ in range(2):
        connection = await _hosts.connect(several, timeout=5.0)
        await connection.close()
        first, second = _hosts._hosts_of(several).each
        assert quote(socket_folder(dsn), safe="") in first
        assert quote(str(tmp_path), safe="") in second


@pytest.mark.parametrize("said_by", ["the address", "the environment"])
@pytest.mark.parametrize(
    ("wanted", "found"), [("prefer-standby", True), ("any", True), ("primary", True), ("standby", False)]
)
async def test_what_the_server_is_counts(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, found: bool, said_by: str
) -> None:
    several = f"{dsn.partition('?')[0]}?host={tmp_path},{socket_folder(dsn)}"
    if said_by == "the address":
        several += f"&target_session_attrs={wanted}"
    else:
        monkeypatch.setenv("PGTARGETSESSIONATTRS", wanted)
    try:
        connection = await _hosts.connect(several, timeout=5.0)
    except (asyncpg.InternalClientError, OSError):
        assert not found
    else:
        await connection.close()
        assert found


async def test_what_no_other_host_can_mend_is_told_at_once(dsn: str, tmp_path: Path) -> None:
    path = urlsplit(dsn).path + "-none"
    several = f"postgresql://{urlsplit(dsn).netloc}{path}?host={socket_folder(dsn)},{tmp_path}"
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await _hosts.connect(several, timeout=5.0)
