"""Opening, closing and looking after an adapter: what is checked, what is left behind, what is never shown."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import resource
import ssl
import traceback
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
import numpy as np
import pytest

import elizasql
from elizasql import Config, DatabaseAdapter, Entity, Memory, _embedded, _hosts, _migrate, _pool, _registry, _store
from elizasql._pool import Server
from elizasql._statements import SQL
from tests.conftest import MakeAdapter
from tests.locking import blocked_pid, locked

SECRET = "hunter2-secret"
# Nobody listens there, and only root could.
REFUSED = f"postgresql://ann:{SECRET}@127.0.0.1:1/agents"


def memory(text: str = "x", **fields: Any) -> Memory:
    return Memory(content={"text": text}, **fields)


def with_query(dsn: str, **params: str) -> str:
    parts = urlsplit(dsn)
    query = dict(parse_qsl(parts.query)) | params
    return urlunsplit(parts._replace(query=urlencode(query, quote_via=quote)))


async def sessions(raw: asyncpg.Connection[Any], name: str) -> int:
    return int(await raw.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name))


async def assert_gone(raw: asyncpg.Connection[Any], name: str, *, but: int = 0) -> None:
    """Wait for the server to end the sessions of that name; the client's side is closed already."""
    while await sessions(raw, name) > but:
        pass


@contextmanager
def nothing_left() -> Iterator[None]:
    """Check that no task and no embedded server is left."""
    tasks, servers = asyncio.all_tasks(), set(_embedded._servers)
    yield
    left = asyncio.all_tasks() - tasks
    assert not [task for task in left if "listening.<locals>" not in str(task)]
    assert _embedded._servers == servers


# --- open ------------------------------------------------------------------------------------------------------------


async def test_open_and_close(dsn: str, raw: asyncpg.Connection[Any]) -> None:
    name = f"test {uuid4()}"
    with nothing_left():
        agent = uuid4()
        # Not in the background: the indexer's first look opens a connection more, at once or a moment later.
        db = await elizasql.open(
            agent_id=str(agent), dsn=dsn, application_name=name, pool_min_size=2, indexing="manual"
        )
        assert db.agent_id == agent
        assert isinstance(db.config, Config)
        assert await db.is_ready()
        await assert_gone(raw, name, but=2)  # that of the first look at the server
        assert await sessions(raw, name) == 2
        await db.close()
        await assert_gone(raw, name)
        assert not await db.is_ready()


async def test_a_closed_adapter_leaves_the_memory_at_once(dsn: str) -> None:
    """Not only when the collector finds it: whoever opens an adapter for each request would pile them up."""
    db = await elizasql.open(agent_id=uuid4(), dsn=dsn, indexing="manual")
    assert await db.search_memories(embedding=np.ones(384, np.float32), table_name="messages") == []
    await db.close()
    await asyncio.sleep(0)
    gc.collect()  # what the driver has left of opening
    left = weakref.ref(db)
    gc.disable()
    try:
        del db
        assert left() is None
    finally:
        gc.enable()


async def test_connect_closes_whatever_happens(dsn: str) -> None:
    with nothing_left():
        with pytest.raises(ZeroDivisionError):
            async with elizasql.connect(agent_id=uuid4(), dsn=dsn) as db:
                assert await db.is_ready()
                raise ZeroDivisionError
        with pytest.raises(elizasql.ClosedError):
            await db.get_memory_by_id(uuid4())


async def test_connect_that_is_cancelled_closes(dsn: str, raw: asyncpg.Connection[Any]) -> None:
    name = f"test {uuid4()}"
    opened = asyncio.Event()

    async def work() -> None:
        async with elizasql.connect(agent_id=uuid4(), dsn=dsn, application_name=name):
            opened.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await opened.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await assert_gone(raw, name)


@pytest.mark.parametrize("agent_id", ["no id", None, 5, "'; DROP SCHEMA elizasql; --"])
async def test_agent_id_is_checked_before_anything(agent_id: Any) -> None:
    with nothing_left(), pytest.raises(elizasql.ArgumentError, match="agent_id"):
        await elizasql.open(agent_id=agent_id, dsn=REFUSED)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("/agents?host=127.0.0.1,127.0.0.2,127.0.0.3&port=1,2", "3 hosts and 2 ports"),
        ("127.0.0.1:99999/agents", "port"),
    ],
)
async def test_address_that_nobody_can_connect_to(address: str, message: str) -> None:
    with nothing_left(), pytest.raises(elizasql.ConfigurationError, match=message) as caught:
        await elizasql.open(agent_id=uuid4(), dsn=f"postgresql://ann:{SECRET}@{address}")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("address", "named"),
    [("127.0.0.1:1/agents", "127.0.0.1:1/agents"), ("/agents?host=/no/folder", "/agents?host=/no/folder")],
)
async def test_a_server_that_is_not_there_is_named(address: str, named: str) -> None:
    """The system's own words, as for a host that nobody knows, do not always say where."""
    with nothing_left(), pytest.raises(elizasql.ConnectionLostError) as caught:
        await elizasql.open(agent_id=uuid4(), dsn=f"postgresql://ann:{SECRET}@{address}")
    assert str(caught.value).startswith(f"no connection to postgresql://{named}: ")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "said", [KeyError("getpwuid(): uid not found: 1"), OSError("No username set in the environment")]
)
async def test_an_address_without_a_user_where_the_system_has_none(
    monkeypatch: pytest.MonkeyPatch, said: Exception
) -> None:
    def nobody() -> str:
        raise said

    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.delenv("PGUSER", raising=False)
    with nothing_left(), pytest.raises(elizasql.ConfigurationError, match="names no user"):
        await elizasql.open(agent_id=uuid4(), dsn="postgresql://127.0.0.1:1/agents")


async def test_unknown_setting_is_refused_before_anything() -> None:
    with nothing_left(), pytest.raises(elizasql.ConfigurationError, match="unknown setting pool_size"):
        await elizasql.open(agent_id=uuid4(), dsn=REFUSED, pool_size=3)  # type: ignore[call-arg]


async def test_data_dir_of_the_call_beats_the_address_of_the_environment(
    dsn: str, server_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if str(server_dir) not in dsn:
        pytest.skip("the embedded server is not used")
    monkeypatch.setenv("POSTGRES_URL", REFUSED)
    with nothing_left():
        async with elizasql.connect(agent_id=uuid4(), data_dir=server_dir) as db:
            assert await db.is_ready()
            assert db._embedded is not None
        with pytest.raises(elizasql.ConnectionLostError):
            await elizasql.open(agent_id=uuid4())
        with pytest.raises(elizasql.ConfigurationError, match="dsn and data_dir exclude each other"):
            await elizasql.open(agent_id=uuid4(), dsn=dsn, data_dir="/nowhere")


async def test_embedded_server_is_the_default(dsn: str, server_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if str(server_dir) not in dsn:
        pytest.skip("the embedded server is not used")
    monkeypatch.delenv("POSTGRES_URL", raising=False)
    monkeypatch.setenv("PGLITE_DATA_DIR", str(server_dir))
    async with elizasql.connect(agent_id=uuid4()) as db:
        assert await db.is_ready()
        assert db._embedded is not None
        assert db._embedded.data_dir == server_dir.resolve()


@pytest.mark.parametrize("stage", ["_prepare", "Lane", "Lane of the background", "check_settings"])
@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError])
async def test_failed_open_leaves_nothing_behind(
    dsn: str,
    server_dir: Path,
    raw: asyncpg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: type[BaseException],
) -> None:
    if str(server_dir) not in dsn:
        pytest.skip("the embedded server is not used")

    real = _pool.Lane

    def broken(*args: Any, **kwargs: Any) -> Any:
        if stage == "Lane of the background" and "patient" not in kwargs:
            return real(*args, **kwargs)
        raise error

    place = {"_prepare": elizasql.adapter, "check_settings": _pool}.get(stage, _registry)
    monkeypatch.setattr(place, stage.removesuffix(" of the background"), broken)
    name = f"test {uuid4()}"
    with nothing_left(), pytest.raises(error):
        await elizasql.open(agent_id=uuid4(), data_dir=server_dir, application_name=name, pool_min_size=2)
    await assert_gone(raw, name)


@pytest.mark.parametrize("steps", range(0, 200, 20))
async def test_open_that_is_cancelled_leaves_nothing_behind(dsn: str, raw: asyncpg.Connection[Any], steps: int) -> None:
    name = f"test {uuid4()}"
    with nothing_left():
        task = asyncio.create_task(
            elizasql.open(agent_id=uuid4(), dsn=dsn, application_name=name, pool_min_size=3, indexing="manual")
        )
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        result = (await asyncio.gather(task, return_exceptions=True))[0]
        if isinstance(result, DatabaseAdapter):
            await result.close()
        else:
            assert isinstance(result, asyncio.CancelledError)
    await assert_gone(raw, name)


async def test_open_that_is_refused_a_connection_leaves_none_behind(
    dsn: str, raw: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the server has no more: those that are on their way then come to nobody."""
    name = f"test {uuid4()}"
    connect, number = _hosts.connect, count()
    refused = asyncio.Event()

    async def refuse_one(dsn: str, **options: Any) -> Any:
        match next(number):
            case 0 | 1:  # of the look at the server, and the first that stays
                pass
            case 2:
                refused.set()
                raise asyncpg.TooManyConnectionsError("no more")
            case _:
                await refused.wait()
        return await connect(dsn, **options)

    monkeypatch.setattr(_hosts, "connect", refuse_one)
    gc.disable()  # it comes when it comes
    try:
        with nothing_left(), pytest.raises(elizasql.ServerBusyError):
            await elizasql.open(agent_id=uuid4(), dsn=dsn, application_name=name, pool_min_size=6, indexing="manual")
        await assert_gone(raw, name)
    finally:
        gc.enable()


# --- addresses that do not work --------------------------------------------------------------------------------------


async def assert_hidden(kind: type[Exception], dsn: str, **settings: Any) -> elizasql.ElizaSQLError:
    """Open in vain, and look for the password in all that the error shows."""
    with nothing_left(), pytest.raises(elizasql.ElizaSQLError) as caught:
        await elizasql.open(agent_id=uuid4(), dsn=dsn, **settings)
    shown = everything_about(caught.value)
    assert SECRET not in shown
    assert isinstance(caught.value, kind), shown
    return caught.value


def everything_about(error: BaseException | None) -> str:
    """Give all that an error shows, also by what it came from, whether a traceback has that or not."""
    if error is None:
        return ""
    shown = "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))
    return shown + everything_about(error.__cause__) + everything_about(error.__context__)


async def test_nobody_listens() -> None:
    error = await assert_hidden(elizasql.ConnectionLostError, REFUSED)
    assert error.retryable
    assert isinstance(error.__cause__, OSError)


async def test_no_such_host() -> None:
    await assert_hidden(elizasql.ConnectionLostError, f"postgres://ann:{SECRET}@no-such-host.invalid/db")


async def test_no_such_socket(tmp_path: Path) -> None:
    await assert_hidden(elizasql.ConnectionLostError, f"postgres://ann:{SECRET}@/db?host={quote(str(tmp_path))}")


@asynccontextmanager
async def listening(answer: bytes) -> AsyncIterator[str]:
    """Give the address of a server that says one thing only, and then waits for the client to go."""
    ended: list[asyncio.Future[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end = asyncio.get_running_loop().create_future()
        ended.append(end)
        writer.write(answer)
        try:
            await reader.read()
        except ConnectionResetError:
            pass
        finally:
            writer.close()
            end.set_result(None)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.gather(*ended)


async def test_server_that_does_not_answer() -> None:
    async with listening(b"") as where:
        dsn = f"postgres://ann:{SECRET}@{where}/db?sslmode=disable"
        error = await assert_hidden(elizasql.ConnectionLostError, dsn, connection_timeout=0.2)
        assert where in str(error)
        assert error.retryable


async def test_something_else_listens() -> None:
    async with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as where:
        dsn = f"postgres://ann:{SECRET}@{where}/db?sslmode=disable"
        await assert_hidden(elizasql.UnavailableError, dsn, connection_timeout=0.5)


async def test_wrong_password_and_missing_database(dsn: str, server_dir: Path) -> None:
    if str(server_dir) not in dsn:
        pytest.skip("the embedded server is not used")
    await assert_hidden(
        elizasql.ConfigurationError, urlunsplit(urlsplit(dsn)._replace(path=f"/{uuid4()}")) + f"&password={SECRET}"
    )
    hba = server_dir / "data" / "pg_hba.conf"
    text = hba.read_text()
    admin = await asyncpg.connect(dsn.replace("//elizasql@", "//postgres@"))
    try:
        await admin.execute("CREATE ROLE guarded LOGIN PASSWORD 'right'")
        hba.write_text(f"local all guarded scram-sha-256\n{text}")
        await admin.execute("SELECT pg_reload_conf()")
        while not await admin.fetchval(
            "SELECT EXISTS (SELECT FROM pg_hba_file_rules WHERE 'guarded' = ANY(user_name))"
        ):
            pass
        guarded = dsn.replace("//elizasql@", f"//guarded:{SECRET}@")
        error = await assert_hidden(elizasql.PermissionDeniedError, guarded)
        assert error.sqlstate == "28P01"
        assert not error.retryable
        await assert_hidden(elizasql.PermissionDeniedError, with_query(guarded, sslmode="prefer"))
    finally:
        hba.write_text(text)
        await admin.execute("SELECT pg_reload_conf()")
        await admin.execute("DROP ROLE guarded")
        await admin.close()


async def test_role_without_rights(dsn: str, server_dir: Path) -> None:
    if str(server_dir) not in dsn:
        pytest.skip("the embedded server is not used")
    admin = await asyncpg.connect(dsn.replace("//elizasql@", "//postgres@"))
    try:
        await admin.execute("CREATE ROLE nobody_special LOGIN")
        await assert_hidden(elizasql.PermissionDeniedError, dsn.replace("//elizasql@", f"//nobody_special:{SECRET}@"))
    finally:
        await admin.execute("DROP ROLE nobody_special")
        await admin.close()


async def test_partitions_are_named_where_that_changes_nothing(dsn: str, server_dir: Path) -> None:
    if str(server_dir) not in dsn:
        pytest.skip("the embedded server is not used")
    admin = await asyncpg.connect(dsn.replace("//elizasql@", "//postgres@"))
    agent_id, vector = uuid4(), np.ones(384, np.float32)

    async def use(*, named: bool) -> None:
        address = dsn.replace("//elizasql@", "//tenant@")
        async with elizasql.connect(agent_id=agent_id, dsn=address, pool_min_size=0, indexing="manual") as db:
            await db.ensure_agent_exists({"name": "tenant"})
            await db.ensure_embedding_dimension(384)
            assert (db._executor.home is not None) is named
            async with db.transaction() as tx:
                id = await tx.create_memory(Memory(content={"a": 1}, embedding=vector), "messages")
            assert id in [hit.id for hit in await db.search_memories(embedding=vector, table_name="messages", count=50)]
            assert await db.update_memory({"id": id, "content": {"b": 2}})
            found = await db.get_memory_by_id(id)
            assert found is not None and found.content == {"b": 2}
            assert await db.update_memory({"id": id, "unique": False})  # which its embedding's scope follows
            assert await db.index_memories() == 1

    try:
        await admin.execute("CREATE ROLE tenant LOGIN")
        await admin.execute("GRANT USAGE ON SCHEMA elizasql TO tenant")
        await admin.execute("GRANT ALL ON ALL TABLES IN SCHEMA elizasql TO tenant")
        await use(named=True)
        # Whoever may use the partitioned tables alone need not have rights on each partition.
        part = await admin.fetchval("SELECT right(elizasql.partition_of($1), 4)", agent_id)
        for table in ("memories", "embeddings"):
            await admin.execute(f"REVOKE UPDATE ON elizasql.{table}{part} FROM tenant")
            await use(named=False)
            await admin.execute(f"GRANT UPDATE ON elizasql.{table}{part} TO tenant")
            # Nor is it looked at there whether they are guarded, as where every table is, whatever it is for.
            await admin.execute(f"ALTER TABLE elizasql.{table}{part} ENABLE ROW LEVEL SECURITY")
            await use(named=False)
            await admin.execute(f"ALTER TABLE elizasql.{table}{part} DISABLE ROW LEVEL SECURITY")
        # Policies hold for the table that a statement names: for the partitioned one, not for its partitions.
        await admin.execute("ALTER TABLE elizasql.memories ENABLE ROW LEVEL SECURITY")
        await admin.execute(f"CREATE POLICY own ON elizasql.memories TO tenant USING (agent_id = '{agent_id}')")
        await use(named=False)
        await admin.execute("DROP POLICY own ON elizasql.memories")
        async with elizasql.connect(agent_id=agent_id, dsn=dsn.replace("//elizasql@", "//tenant@")) as db:
            assert await db.get_memories(table_name="messages") == []
    finally:
        await admin.execute("DROP POLICY IF EXISTS own ON elizasql.memories")
        await admin.execute("ALTER TABLE elizasql.memories DISABLE ROW LEVEL SECURITY")
        await admin.execute("DROP OWNED BY tenant")
        await admin.execute("DROP ROLE tenant")
        await admin.close()


@pytest.mark.parametrize(
    "setting", [{"sslmode": "sometimes"}, {"channel_binding": "require"}, {"ssl": "true"}, {"statement_timeout": "x"}]
)
async def test_address_that_the_driver_or_the_server_does_not_take(dsn: str, setting: dict[str, str]) -> None:
    """Other clients know more than asyncpg, or leave out what they do not know; the error names what it is."""
    error = await assert_hidden(elizasql.ConfigurationError, with_query(dsn, **setting))
    assert next(iter(setting)) in str(error)


@pytest.mark.parametrize("name", ["sslrootcert", "sslcert", "sslcrl"])
@pytest.mark.parametrize("by_variable", [False, True])
async def test_file_that_is_missing_is_no_server_that_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, by_variable: bool
) -> None:
    for file in (tmp_path / "none.pem", tmp_path):
        address = with_query(REFUSED, sslmode="require")
        if by_variable:
            monkeypatch.setenv(f"PG{name.upper()}", str(file))
        else:
            address = with_query(address, **{name: str(file)})
        error = await assert_hidden(elizasql.ConfigurationError, address)
        assert f"{name} {file} cannot be read" in str(error)
        assert not error.retryable


def test_certificate_that_is_not_trusted_is_no_server_that_is_down() -> None:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed: Hostname mismatch")
    made = _pool._explain(error, REFUSED, Config.load(environ={}))
    assert isinstance(made, elizasql.ConfigurationError)
    assert re.match("no connection to postgres.*Hostname mismatch", str(made))


async def test_nor_is_one_that_is_met_by_a_call(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    db = await make_db(pool_min_size=0)
    await db._executor.lane.let_go()
    await db._executor.lane.replace()

    async def refuse(*address: Any, **options: Any) -> None:
        raise ssl.SSLCertVerificationError(1, "certificate verify failed: certificate has expired")

    monkeypatch.setattr(db._executor.lane.pool, "_connect", refuse)
    with pytest.raises(elizasql.ConfigurationError, match="certificate has expired"):
        await db.get_tasks()
    assert db._meter.retries == 0


# What is said of each quotes the line that is wrong.
SERVICE_FILES = {
    "no header": f"password={SECRET}\n",
    "no value": f"[memory]\npassword {SECRET}\n",
    "percent": f"[memory]\npassword=100%{SECRET}\n",
}


@pytest.mark.parametrize("text", SERVICE_FILES.values(), ids=SERVICE_FILES)
async def test_service_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    file = tmp_path / "services"
    file.write_text(text)
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    error = await assert_hidden(elizasql.ConfigurationError, "postgresql://?service=memory")
    assert f"the service file {file} cannot be read" in str(error)


@pytest.mark.parametrize("text", SERVICE_FILES.values(), ids=SERVICE_FILES)
async def test_service_file_that_is_none_any_more(
    make_db: MakeAdapter,
    dsn: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    text: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "services"
    file.write_text("[memory]\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    address = with_query(dsn, service="memory")
    db = await make_db(dsn=address)
    await db._executor.lane.let_go()
    await db._executor.lane.replace()
    file.write_text(text)
    with pytest.raises(elizasql.ConfigurationError, match="cannot be read") as call:
        await db.get_tasks()
    with pytest.raises(elizasql.MigrationError, match="cannot be read") as migration:
        await _migrate.run_dbmate("status", dsn=address, config=db.config)
    with pytest.raises(elizasql.ConfigurationError, match="cannot be read") as lane:
        await _pool.Lane(address, db.config, db._connections.server, max_size=1, min_size=1).open()
    for error in (call.value, migration.value, lane.value):
        assert SECRET not in everything_about(error)
    assert SECRET not in caplog.text


# --- what the server must be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (Server(140012, "0.8.5", "public", "0.8.5"), "PostgreSQL 15 or newer is needed; the server is 14"),
        (Server(90624, None, None, None), "the server is 9"),
        (Server(180004, None, None, None), "does not have the extension pgvector"),
        (Server(180004, None, None, "0.8.3"), "found 0.8.3: install a newer"),
        (Server(180004, "0.8.3", "public", "0.8.3"), "found 0.8.3: install a newer"),
        (Server(180004, "0.5.1", "public", "0.8.5"), "found 0.5.1: run ALTER EXTENSION vector UPDATE"),
        (Server(180004, "0.7", "public", "0.10.0"), "run ALTER EXTENSION"),
        (Server(180004, "0.8.5", "ours", "0.8.5", may_use_vector=False), 'GRANT USAGE ON SCHEMA "ours"'),
        (Server(180004, "0.8.5", "public", "0.8.5", encoding="SQL_ASCII"), "the database is in SQL_ASCII"),
        (Server(180004, "0.8.5", "public", "0.8.5", fires_triggers=False), "RESET session_replication_role"),
    ],
)
def test_servers_that_are_refused(server: Server, message: str) -> None:
    with pytest.raises(elizasql.ConfigurationError, match=message):
        server.check()


@pytest.mark.parametrize(
    "server",
    [
        Server(150000, "0.8.4", "public", "0.8.4"),
        Server(180004, None, None, "0.8.4"),
        Server(180004, "0.10.0", "other", None),
        Server(190000, "1.0", "public", "1.0"),
    ],
)
def test_servers_that_are_taken(server: Server) -> None:
    server.check()


async def test_an_index_that_the_server_does_not_use_is_named(
    own_database: str, make_db: MakeAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    """As a build that broke off leaves it; all works without it, and nobody would ever hear why it is slow."""
    admin = await asyncpg.connect(own_database.replace("//elizasql@", "//postgres@"))
    await admin.execute(
        "UPDATE pg_index SET indisvalid = FALSE WHERE indexrelid = 'elizasql.rooms_world_idx'::regclass"
    )
    await admin.close()
    await make_db(dsn=own_database)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("does not use rooms_world_idx, whose build" in text for text in said) == 1, said


async def test_settings_of_the_role_that_change_what_text_means(make_db: MakeAdapter, dsn: str) -> None:
    given = {
        "DateStyle": "SQL, DMY",
        "IntervalStyle": "sql_standard",
        "array_nulls": "off",
        "bytea_output": "escape",
        "standard_conforming_strings": "off",
        "transform_null_equals": "on",
    }
    db = await make_db(dsn=with_query(dsn, **given))
    user = Entity(id=uuid4(), names=["M\u00e5r\\a 'x'"], metadata={"path": "C:\\x41"})
    await db.create_entity(user)
    assert [found.metadata for found in await db.search_entities_by_name("m\u00e5r\\")] == [user.metadata]
    await db.set_cache("\\k'", ["\\", None], ttl=60)
    assert await db.get_cache("\\k'") == ["\\", None]


@pytest.mark.parametrize("settings", [{}, {"prepared_statements": False}], ids=["prepared", "unprepared"])
async def test_a_limit_of_the_role_holds_for_what_callers_wait_for(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], dsn: str, settings: dict[str, Any]
) -> None:
    """The build of an index takes minutes, and one that is ended is tried again."""
    limits = {"statement_timeout": "30s"}
    if raw.get_server_version().major >= 17:
        limits["transaction_timeout"] = "40s"
    db = await make_db(dsn=with_query(dsn, **limits), **settings)
    for unlimited, wanted in ((True, dict.fromkeys(limits, "0")), (False, limits)):
        chunk = {"names": list(limits)}
        rows = await db._background.fetch_chunks(SQL["get_settings"], [chunk], unlimited=unlimited)
        assert dict(rows) == wanted


@pytest.mark.parametrize("rebuild", [False, True])
async def test_the_build_of_an_index_goes_without_a_limit(
    db: DatabaseAdapter, round_trips: list[str], rebuild: bool
) -> None:
    if not rebuild:
        await db._indexer.drop()
    await db.index_memories(rebuild=rebuild)
    build = next(position for position, sent in enumerate(round_trips) if "build_index" in sent)
    assert round_trips[build - 1] == SQL["lift_limits"].sql


async def test_refused_server_is_let_go(
    dsn: str, raw: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"test {uuid4()}"
    monkeypatch.setattr(_pool, "MINIMUM_POSTGRES", 990000)
    with nothing_left(), pytest.raises(elizasql.ConfigurationError, match="PostgreSQL"):
        await elizasql.open(agent_id=uuid4(), dsn=dsn, application_name=name)
    await assert_gone(raw, name)


async def test_settings_are_in_force_on_every_connection(make_db: MakeAdapter) -> None:
    db = await make_db(ef_search=77, application_name="ada")
    pool = db._executor.lane.pool
    held = [await pool.acquire() for _ in range(3)]
    for connection in held:
        for name, value in _pool.session_settings(db.config).items():
            found = await connection.fetchval("SELECT current_setting($1)", name)
            assert found in (value, "1min") if value == "60s" else found == value, name
        await pool.release(connection)
    assert _pool.session_settings(db.config)["hnsw.ef_search"] == "77"
    assert _pool.session_settings(db.config)["application_name"] == "ada"


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "EUC_JP"])
async def test_text_is_stored_as_it_is_whatever_the_address_says(
    dsn: str, make_db: MakeAdapter, raw: asyncpg.Connection[Any], encoding: str
) -> None:
    text = "Zoë, 日本"
    db = await make_db(dsn=with_query(dsn, client_encoding=encoding))
    id = await db.create_memory(memory(text), "messages")
    assert await raw.fetchval("SELECT content ->> 'text' FROM elizasql.memories WHERE id = $1", id) == text
    assert [each.id for each in await db.get_memories(table_name="messages", text_contains="日")] == [id]
    connection = await _pool.connect(with_query(dsn, client_encoding=encoding), db.config)
    assert await connection.fetchval("SELECT current_setting('client_encoding')") == "UTF8"
    await connection.close()


async def test_prepared_statements_do_not_expire(db: DatabaseAdapter) -> None:
    """asyncpg closes the expired ones in the next call that prepares one, a round trip each, without a time limit."""
    for lane in (db._executor.lane, db._background.lane):
        connection, _ = await lane.acquire(5)
        assert connection._stmt_cache.get_max_lifetime() == 0
        lane.keep(connection)


async def test_settings_survive_use(db: DatabaseAdapter) -> None:
    """Nothing is reset when a connection is given back, so nothing may be set."""
    pool = db._executor.lane.pool
    question = "SELECT current_setting(name) FROM unnest($1::text[]) AS name"
    names = list(_pool.session_settings(db.config))
    before = await pool.fetch(question, names)
    await db.create_memories([memory() for _ in range(3)], "messages")
    await db.get_memories(table_name="messages")
    assert await pool.fetch(question, names) == before


@pytest.mark.parametrize("name", sorted(_pool.session_settings(Config())))
async def test_setting_that_is_not_in_force(dsn: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As behind a pooler that drops what the connection asks for."""
    real = _pool.session_settings
    calls = 0

    def dropped(*args: Any) -> dict[str, str]:
        nonlocal calls
        calls += 1
        settings = real(*args)
        if calls == 1:  # what the connections are asked to be
            del settings[name]
        return settings

    monkeypatch.setattr(_pool, "session_settings", dropped)
    # Where the server's own default is what we want.
    other = {
        "TimeZone": "Asia/Tokyo",
        "jit": "on",
        "idle_in_transaction_session_timeout": "30s",
        "default_transaction_isolation": "serializable",
    }
    address = with_query(dsn, **{name: other[name]}) if name in other else dsn
    with nothing_left(), pytest.raises(elizasql.ConfigurationError, match=rf"does not apply {name}:"):
        await elizasql.open(agent_id=uuid4(), dsn=address, pool_min_size=0)


# --- calls -----------------------------------------------------------------------------------------------------------


async def test_pool_exhausted(make_db: MakeAdapter) -> None:
    db = await make_db(pool_max_size=2, connection_timeout=0.2)
    lane = db._executor.lane
    held: list[Any] = []
    while len(held) < 2:
        with suppress(asyncio.TimeoutError):  # to make one may take a busy machine longer
            held.append((await lane.acquire(5))[0])
    with pytest.raises(elizasql.PoolTimeoutError, match="all 2 are in use") as caught:
        await db.get_memory_by_id(uuid4())
    assert caught.value.retryable
    assert caught.value.statement == "get_memory_by_id"
    assert not await db.is_ready()
    assert db._executor.in_flight == 0
    for connection in held:
        lane.keep(connection)
    assert await db.is_ready()


async def test_server_that_takes_no_more_connections(dsn: str, server_dir: Path) -> None:
    """What there is goes round, as in a pool that has reached its size; a process that has none is told."""
    if str(server_dir) not in dsn:
        pytest.skip("the embedded server is not used")
    crowded = dsn.replace("//elizasql@", "//crowded@")
    admin = await asyncpg.connect(dsn.replace("//elizasql@", "//postgres@"))
    try:
        await admin.execute("CREATE ROLE crowded LOGIN CONNECTION LIMIT 2")
        await admin.execute("GRANT USAGE ON SCHEMA elizasql TO crowded")
        await admin.execute("GRANT ALL ON ALL TABLES IN SCHEMA elizasql TO crowded")
        options = {"pool_min_size": 0, "max_retries": 1, "indexing": "manual", "resident": "off"}
        async with elizasql.connect(agent_id=uuid4(), dsn=crowded, **options) as db:
            lane = db._executor.lane
            await db.ensure_agent_exists({"name": "crowded"})
            assert all(await asyncio.gather(*(db.set_cache(str(number), number) for number in range(50))))
            assert 1 <= lane.size <= 2
            assert db._connections.breaker.failures == 0

            await lane.replace()
            held, _ = await lane.acquire(5)
            other = await connect_again(crowded)
            waiting = asyncio.create_task(db.get_cache("7"))
            while not lane.waiting:
                await asyncio.sleep(0)
            await other.close()
            assert await waiting == 7  # on another connection, when the server has room again

            lane.drop(held)
            await lane.replace()
            others = [await connect_again(crowded) for _ in range(2)]
            with pytest.raises(elizasql.ServerBusyError):
                await db.get_cache("7")
            for connection in others:
                await connection.close()
    finally:
        await admin.execute("DROP OWNED BY crowded")
        await admin.execute("DROP ROLE crowded")
        await admin.close()


async def test_process_that_has_no_descriptor_left(make_db: MakeAdapter) -> None:
    """As where the server takes no more connections: what there is goes round."""
    db = await make_db(max_retries=1)
    lane = db._executor.lane
    await db.set_cache("first", 1)
    size = lane.size
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 10, hard))  # noqa: PTH208
    taken: list[int] = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        assert all(await asyncio.gather(*(db.set_cache(str(number), number) for number in range(20))))
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert lane.size == size
    assert db._connections.breaker.failures == 0


async def test_calls_where_the_server_was_full_a_moment_ago(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for what there is no longer than they may, take what is idle, and ask where they have none at all."""
    monkeypatch.setattr(_pool, "_FULL", 3600.0)
    db = await make_db()
    lane = db._executor.lane
    one, other = [(await lane.acquire(5))[0] for _ in range(2)]

    async def refuse(*args: Any, **options: Any) -> None:
        raise asyncpg.TooManyConnectionsError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(lane.pool, "_connect", refuse)
        with pytest.raises((elizasql.PoolTimeoutError, elizasql.DeadlineError)):
            await db.get_tasks(timeout=0.1)
    pid = other.get_server_pid()
    lane.give_back(other, sound=True)
    await lane.let_go()
    other, used = await lane.acquire(5)
    assert (other.get_server_pid(), used) == (pid, True)
    for connection in (one, other):
        lane.drop(connection)
    assert await db.get_tasks() == []


async def connect_again(address: str) -> asyncpg.Connection[Any]:
    """Connect when the server has noticed the end of an earlier connection."""
    while True:
        with suppress(asyncpg.TooManyConnectionsError):
            return await asyncpg.connect(address)


async def test_what_the_server_refuses_costs_no_connection(make_db: MakeAdapter) -> None:
    db = await make_db(pool_max_size=1)
    lane = db._executor.lane
    for _ in range(3):
        with pytest.raises(elizasql.ForeignKeyError):
            await db.create_memory(memory(room_id=uuid4()), "messages")
        assert (lane.in_use, lane.size) == (0, 1)


async def test_more_calls_than_connections(db: DatabaseAdapter) -> None:
    await asyncio.gather(*(db.create_memory(memory(str(number)), "messages") for number in range(100)))
    assert await db.count_memories() == 100
    assert db._executor.in_flight == 0


async def test_cancelled_waiters_take_no_connection_with_them(make_db: MakeAdapter) -> None:
    db = await make_db(pool_max_size=2)
    lane = db._executor.lane
    held = [(await lane.acquire(5))[0] for _ in range(2)]
    tasks = [asyncio.create_task(db.get_memory_by_id(uuid4())) for _ in range(100)]
    await asyncio.sleep(0)
    assert db._executor.in_flight == 100
    for task in tasks[::2]:
        task.cancel()
    for connection in held:
        lane.keep(connection)
    for task in tasks[1::4]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {type(None), asyncio.CancelledError}
    assert db._executor.in_flight == 0
    assert (lane.in_use, lane.waiting) == (0, 0)
    await lane.let_go()
    assert lane.pool.get_idle_size() == lane.pool.get_size()


async def test_calls_that_gave_up_leave_nothing_behind(make_db: MakeAdapter) -> None:
    """A connection may be held for hours, as by the build of an index."""
    db = await make_db(pool_max_size=1)
    lane = db._executor.lane
    connection, _ = await lane.acquire(5)
    calls = (db.get_memory_by_id(uuid4(), timeout=0.001) for _ in range(200))
    for result in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(result, (elizasql.PoolTimeoutError, elizasql.DeadlineError))
    assert not lane._waiters
    lane.keep(connection)
    assert await db.get_memory_by_id(uuid4()) is None


async def test_ready_tells_and_never_raises(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db(pool_max_size=1)
    lane = db._executor.lane
    connection, _ = await lane.acquire(5)
    lane.keep(connection)
    pid = connection.get_server_pid()
    # Asked before the loop has looked at the socket: that the connection is broken is found out by asking.
    killed = await raw.fetchval("SELECT pg_terminate_backend($1, 10000)", pid)
    assert killed
    for _ in range(2):
        ready = await db.is_ready()
    assert ready


async def test_killed_connection_is_replaced(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db(pool_max_size=1)
    id = await db.create_memory(memory("old"), "messages")
    async with locked(raw, id):
        task = asyncio.create_task(db.update_memory(memory("new", id=id)))
        assert await raw.fetchval("SELECT pg_terminate_backend($1, 10000)", await blocked_pid(raw, task))
        assert await blocked_pid(raw, task)  # the call is tried again at once
    assert await task
    assert db._meter.retries == 1


async def test_a_connection_whose_end_was_heard_of_is_not_used(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """What was never sent was not done: it is not tried again, and nobody is told that its outcome is unknown."""
    db = await make_db(pool_max_size=1)
    lane = db._executor.lane
    connection, _ = await lane.acquire(5)
    pid = connection.get_server_pid()
    lane.keep(connection)
    assert await raw.fetchval("SELECT pg_terminate_backend($1, 10000)", pid)
    while lane.size:
        await asyncio.sleep(0)
    assert not SQL["delete_memories"].repeatable
    assert await db.delete_memories([uuid4()]) == 0
    assert db._meter.retries == 0


async def test_a_lost_connection_and_the_try_that_follows_count_once(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a crash: first the connection goes, then the server is in recovery for whoever comes at once."""
    db = await make_db(pool_max_size=1, base_delay=0.01, max_delay=0.01, jitter_max=0.0)
    id = await db.create_memory(Memory(content={"text": "x"}, unique=True), "messages")
    breaker, acquire = db._connections.breaker, db._executor.lane.acquire
    counted: list[int] = []

    async def in_recovery_once(*args: Any) -> Any:
        counted.append(breaker.failures)
        if len(counted) == 1:
            raise asyncpg.CannotConnectNowError("the database system is in recovery mode")
        return await acquire(*args)

    async with locked(raw, id):
        task = asyncio.create_task(db.update_memory({"id": id, "content": {"text": "y"}}))
        pid = await blocked_pid(raw, task)
        monkeypatch.setattr(db._executor.lane, "acquire", in_recovery_once)
        assert await raw.fetchval("SELECT pg_terminate_backend($1, 10000)", pid)
    assert await task
    assert counted == [1, 1]
    assert breaker.failures == 0


async def test_tries_that_callers_make_again_count_once_a_round(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty callers that wait for a server in recovery come back one after the other, and are no more than one."""
    db = await make_db(base_delay=0.05, max_delay=0.05, jitter_max=0.2, pool_max_size=20, failure_threshold=5)
    id = await db.create_memory(Memory(content={"text": "x"}, unique=True), "messages")
    breaker, acquire = db._connections.breaker, db._executor.lane.acquire
    tries: Counter[object] = Counter()
    counted: list[int] = []

    async def in_recovery_twice(*args: Any) -> Any:
        caller = asyncio.current_task()
        tries[caller] += 1
        await asyncio.sleep(0)
        counted.append(breaker.failures)
        if tries[caller] <= 2:
            raise asyncpg.CannotConnectNowError("the database system is in recovery mode")
        return await acquire(*args)

    monkeypatch.setattr(db._executor.lane, "take", lambda: None)
    monkeypatch.setattr(db._executor.lane, "acquire", in_recovery_twice)
    found = await asyncio.gather(*(asyncio.create_task(db.get_memory_by_id(id)) for _ in range(20)))
    assert all(found) and max(counted) == 2 and breaker.opened == 0


@pytest.mark.parametrize(
    ("met", "state"),
    [
        (asyncpg.UniqueViolationError("it is there already"), "closed"),
        (asyncpg.DeadlockDetectedError("another one was quicker"), "closed"),
        (elizasql.UnknownOutcomeError("nobody can tell"), "half_open"),
        (asyncio.CancelledError(), "half_open"),
        (asyncpg.CannotConnectNowError("the database system is in recovery mode"), "open"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
async def test_a_probe_makes_room_for_the_next_one_whatever_it_meets(
    make_db: MakeAdapter, met: BaseException, state: str
) -> None:
    db = await make_db(failure_threshold=1, reset_timeout=0.0, half_open_max_attempts=1, max_retries=1)
    breaker = db._connections.breaker
    breaker.fail(breaker.enter())

    async def meets(*args: Any, **options: Any) -> Any:
        raise met

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncpg.Connection, "fetch", meets)
        with pytest.raises((elizasql.ElizaSQLError, asyncio.CancelledError)):
            await db.get_tasks()
    assert breaker.state == state
    assert await db.get_tasks() == []
    assert await db.get_tasks() == []


@pytest.mark.parametrize(
    ("met", "state"),
    [
        (elizasql.PoolTimeoutError("none became free"), "half_open"),
        (asyncio.CancelledError(), "half_open"),
        (ConnectionResetError("connection lost"), "open"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
async def test_a_probe_that_gets_no_connection_makes_room_for_the_next_one(
    make_db: MakeAdapter, met: BaseException, state: str
) -> None:
    db = await make_db(failure_threshold=1, reset_timeout=0.0, half_open_max_attempts=1, max_retries=1)
    breaker = db._connections.breaker
    breaker.fail(breaker.enter())

    async def meets(*args: Any) -> Any:
        raise met

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db._executor.lane, "take", lambda: None)
        patch.setattr(db._executor.lane, "acquire", meets)
        with pytest.raises((elizasql.UnavailableError, asyncio.CancelledError)):
            await db.get_tasks()
    assert breaker.state == state
    assert await db.get_tasks() == []
    assert breaker.state == "closed"


async def test_result_is_given_even_if_the_connection_breaks_on_its_way_back(
    db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = asyncpg.pool.PoolConnectionHolder.release

    async def broken(self: Any, timeout: float | None) -> None:
        await real(self, timeout)
        raise asyncio.TimeoutError

    monkeypatch.setattr(asyncpg.pool.PoolConnectionHolder, "release", broken)
    id = await db.create_memory(memory("kept"), "messages")
    found = await db.get_memory_by_id(id)
    assert found is not None
    with pytest.raises(elizasql.ForeignKeyError):
        await db.create_memory(memory(room_id=uuid4()), "messages")
    assert db._executor.in_flight == 0


async def test_idle_connections_that_are_lost_come_back_with_the_next_call(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    name = f"test-{uuid4().hex}"
    db = await make_db(pool_min_size=3, application_name=name, max_retries=1)
    pool = db._executor.lane.pool
    assert pool.get_size() == 3
    asked = []

    async def refuse(*address: Any, **options: Any) -> None:
        asked.append(address)
        raise FileNotFoundError(2, "No such file or directory")  # of the socket in the server's folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "_connect", refuse)
        await raw.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", name)
        while pool.get_size():
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert asked == []  # while the server is down that would go on, whatever the breaker says
        with pytest.raises(elizasql.ConnectionLostError, match=r"tasks: no connection to postgresql://.*: .*No such"):
            await db.get_tasks()
    assert caplog.records == []
    assert await db.get_tasks() == []
    assert pool.get_size() == 1


async def test_the_least_connections_stay_when_they_are_idle(make_db: MakeAdapter) -> None:
    db = await make_db(pool_min_size=2, pool_max_size=4, pool_idle_timeout=0.001)
    lane = db._executor.lane
    pool = lane.pool

    async def all_are_idle_for_long() -> None:
        await lane.let_go()
        while any(holder._inactive_callback for holder in pool._holders):
            await asyncio.sleep(0)

    await all_are_idle_for_long()
    assert pool.get_size() == 2
    held = [(await lane.acquire(5))[0] for _ in range(4)]
    assert pool.get_size() == 4
    for connection in held:
        lane.keep(connection)
    await all_are_idle_for_long()
    assert pool.get_size() == pool.get_idle_size() == 2
    # What is not to be used any more is not kept either.
    await lane.replace()
    assert pool.get_size() == 0
    assert await db.get_tasks() == []
    await all_are_idle_for_long()
    assert pool.get_size() == 1


async def test_connections_of_a_busy_time_are_closed_each_time(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept for the next call nobody gives back but a timer, and not the first time only."""
    monkeypatch.setattr(_pool, "_KEEP", 0.0)
    lane = (await make_db(pool_max_size=3, pool_idle_timeout=0.001))._executor.lane
    for _ in range(2):
        held = [(await lane.acquire(5))[0] for _ in range(3)]
        for connection in held:
            lane.keep(connection)
        while lane.size:
            await asyncio.sleep(0)


# --- close -----------------------------------------------------------------------------------------------------------


async def test_use_after_close(make_db: MakeAdapter) -> None:
    db = await make_db()
    await db.close()
    await db.close()
    with pytest.raises(elizasql.ClosedError, match="closed") as caught:
        await db.get_memory_by_id(uuid4())
    assert caught.value.statement == "get_memory_by_id"
    assert not caught.value.retryable
    with pytest.raises(elizasql.ClosedError):
        await db.create_memories([memory(), memory()], "messages")
    with pytest.raises(elizasql.ClosedError):
        await db.index_memories()
    assert not await db.is_ready()


async def test_closing_one_adapter_leaves_the_others(make_db: MakeAdapter) -> None:
    one, other = await make_db(), await make_db()
    await one.close()
    assert await other.is_ready()


async def test_close_waits_for_calls_that_run_and_for_those_that_wait(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    db = await make_db(pool_max_size=1)
    other = await make_db(db.agent_id)
    id = await db.create_memory(memory("old"), "messages")
    async with locked(raw, id):
        running = asyncio.create_task(db.update_memory(memory("new", id=id)))
        await blocked_pid(raw, running)
        waiting = [asyncio.create_task(db.create_memory(memory(f"{number}"), "messages")) for number in range(5)]
        await asyncio.sleep(0)
        closing = [asyncio.create_task(db.close()) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(elizasql.ClosedError):
            await db.get_memory_by_id(id)
        assert not any(task.done() for task in (running, *waiting, *closing))
    await asyncio.gather(*closing)
    assert running.done()
    assert await running
    assert all(task.done() for task in waiting)
    await asyncio.gather(*waiting)
    assert await other.count_memories() == 6


async def test_close_cuts_calls_that_take_too_long(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    name = f"test {uuid4()}"
    db = await make_db(pool_max_size=1, application_name=name)
    id = await db.create_memory(memory("old"), "messages")
    async with locked(raw, id):
        running = asyncio.create_task(db.update_memory(memory("new", id=id)))
        await blocked_pid(raw, running)
        waiting = asyncio.create_task(db.get_memory_by_id(id))
        await asyncio.sleep(0)
        await db.close(timeout=0.1)
        results = await asyncio.gather(running, waiting, return_exceptions=True)
    assert [type(result) for result in results] == [elizasql.ClosedError, elizasql.ClosedError]
    await assert_gone(raw, name)


async def test_close_that_is_cancelled_cuts_at_once(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    name = f"test {uuid4()}"
    db = await make_db(pool_max_size=1, application_name=name)
    id = await db.create_memory(memory("old"), "messages")
    async with locked(raw, id):
        running = asyncio.create_task(db.update_memory(memory("new", id=id)))
        await blocked_pid(raw, running)
        closing = asyncio.create_task(db.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await db.close(timeout=0.1)
        with pytest.raises(elizasql.ClosedError):
            await running
    await assert_gone(raw, name)


async def test_embedded_server_stays_until_running_calls_have_ended(
    dsn: str, server_dir: Path, raw: asyncpg.Connection[Any]
) -> None:
    """Whoever closes second must not take the server away from under the first one."""
    if str(server_dir) not in dsn:
        pytest.skip("the embedded server is not used")
    db = await elizasql.open(agent_id=uuid4(), data_dir=server_dir, indexing="manual")
    await db.ensure_agent_exists({"name": "test"})
    id = await db.create_memory(memory("old"), "messages")
    async with locked(raw, id):
        running = asyncio.create_task(db.update_memory(memory("new", id=id)))
        await blocked_pid(raw, running)
        closing = [asyncio.create_task(db.close()) for _ in range(2)]
        for _ in range(20):
            await asyncio.sleep(0)
        assert db._embedded in _embedded._servers
    await asyncio.gather(*closing)
    assert await running
    assert db._embedded is None


async def test_background_indexer_ends_with_the_adapter(dsn: str) -> None:
    with nothing_left():
        async with elizasql.connect(agent_id=uuid4(), dsn=dsn, indexing="background"):
            assert any(task.get_name() == "elizasql-indexer" for task in asyncio.all_tasks())


# --- the parts it is made of -----------------------------------------------------------------------------------------


def test_no_two_domains_share_a_name() -> None:
    """They are all one object: a private helper of the same name would stand in for the other's."""
    owner: dict[str, str] = {}
    for domain in DatabaseAdapter.__bases__:
        assert domain.__bases__ == (_store.Store,), domain
        for name in vars(domain):
            if name.startswith("__"):
                continue
            assert name not in owner, f"{name} stands in {owner[name]} and in {domain.__name__}"
            owner[name] = domain.__name__
            assert name not in vars(_store.Store), name
            assert name not in vars(DatabaseAdapter), name
