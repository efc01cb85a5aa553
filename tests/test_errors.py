"""The error tree, and the one table that makes errors out of the server's answers."""

from __future__ import annotations

import asyncio
import builtins
import copy
import inspect
import logging
import pickle
import re
import socket
import ssl
import traceback
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

import elizasql
from elizasql import DatabaseAdapter, Memory, Room, _executor, errors, memories
from elizasql._statements import Statement
from elizasql.errors import _BY_SQLSTATE, ElizaSQLError, translate
from tests.conftest import MakeAdapter

CLASSES: dict[str, type[ElizaSQLError]] = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, ElizaSQLError) and kind.__module__ == errors.__name__
}
RETRYABLE = {
    "UnavailableError",
    "ConnectionLostError",
    "PoolTimeoutError",
    "CircuitOpenError",
    "ServerBusyError",
    "DeadlineError",
    "ConflictError",
    "SerializationError",
    "DeadlockError",
    "LockTimeoutError",
}


def example(kind: type[ElizaSQLError]) -> ElizaSQLError:
    if kind is errors.EmbeddingDimensionError:
        return errors.EmbeddingDimensionError(UUID(int=1), locked=384, given=768, statement="search_memories")
    made = kind("get_thing: it went wrong", statement="get_thing", sqlstate="XX000")
    if isinstance(made, errors.IntegrityError):
        made.constraint, made.table, made.detail = "rooms_pkey", "rooms", "Key (id)=(1)"
    return made


# --- the tree --------------------------------------------------------------------------------------------------------


def _documented() -> list[tuple[str, list[str], str]]:
    """Name, bases and explanation of each line of the tree in the docstring."""
    assert errors.__doc__
    lines = [line.removeprefix("    ") for line in errors.__doc__.splitlines()]
    path = [next(line for line in lines if line == "ElizaSQLError")]
    found = [("ElizaSQLError", ["Exception"], "")]
    for line in lines:
        if match := re.fullmatch(r"((?:│   |    )*)[├└]── (\w+)(?: \((\w+)\))? +(.*)", line):
            depth = len(match[1]) // 4 + 1
            del path[depth:]
            found.append((match[2], [path[-1], *([match[3]] if match[3] else [])], match[4]))
            path.append(match[2])
    return found


def test_docstring_is_the_tree() -> None:
    written = {name: bases for name, bases, _ in _documented()}
    assert written == {name: [base.__name__ for base in kind.__bases__] for name, kind in CLASSES.items()}


def test_docstring_is_the_table() -> None:
    written = {
        code.rstrip("*"): CLASSES[name]
        for name, _, text in _documented()
        for code in re.findall(r"\b(?:[0-9][0-9A-Z]\*|[0-9P][0-9A-Z]{4}\b)", text)
    }
    # A time limit is the caller's, whoever noticed that it had passed.
    assert written == _BY_SQLSTATE


def test_every_error_is_exported() -> None:
    assert set(errors.__all__) == {*CLASSES, "translate"}
    assert set(CLASSES) <= set(elizasql.__all__)
    assert all(getattr(elizasql, name) is kind for name, kind in CLASSES.items())
    assert "translate" not in elizasql.__all__


def test_names_do_not_hide_what_python_calls_otherwise() -> None:
    assert not [name for name in CLASSES if hasattr(builtins, name)]


@pytest.mark.parametrize("name", CLASSES)
def test_retryable(name: str) -> None:
    assert CLASSES[name].retryable == (name in RETRYABLE)


@pytest.mark.parametrize("name", CLASSES)
def test_error_explains_itself_without_a_message(name: str) -> None:
    if name != "EmbeddingDimensionError":
        error = CLASSES[name]()
        assert str(error) == inspect.getdoc(CLASSES[name]).splitlines()[0]  # type: ignore[union-attr]
        assert (error.statement, error.sqlstate) == (None, None)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "way", [copy.copy, copy.deepcopy, *(lambda e, p=p: pickle.loads(pickle.dumps(e, p)) for p in range(6))]
)
def test_error_survives_copying_and_pickling(name: str, way: Any) -> None:
    error = example(CLASSES[name])
    again = way(error)
    assert type(again) is type(error)
    assert again is not error
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert again.args == error.args


@pytest.mark.parametrize("locked", [None, 384])
def test_dimension_error_says_what_is_locked_and_given(locked: int | None) -> None:
    agent = uuid4()
    error = errors.EmbeddingDimensionError(agent, locked=locked, given=768)
    assert (error.agent_id, error.locked, error.given) == (agent, locked, 768)
    assert str(agent) in str(error)
    assert "768" in str(error)
    assert isinstance(error, ValueError)
    assert ("Cannot change embedding dimension for agent" in str(error)) == (locked is not None)
    assert ("ensure_embedding_dimension(768)" if locked is None else "to 768 with reembed()") in str(error)


# --- the table -------------------------------------------------------------------------------------------------------


async def provoke(raw: asyncpg.Connection[Any], sqlstate: str) -> asyncpg.PostgresError:
    with pytest.raises(asyncpg.PostgresError) as caught:
        await raw.execute(f"DO $$ BEGIN RAISE EXCEPTION 'it went wrong' USING ERRCODE = '{sqlstate}'; END $$")
    assert caught.value.sqlstate == sqlstate
    return caught.value


@pytest.mark.parametrize("row", _BY_SQLSTATE)
async def test_every_row_of_the_table(raw: asyncpg.Connection[Any], row: str) -> None:
    sqlstate = row if len(row) == 5 else f"{row}000"
    error = await provoke(raw, sqlstate)
    made = translate(error, "get_thing")
    assert type(made) is _BY_SQLSTATE[row]
    assert (made.statement, made.sqlstate) == ("get_thing", sqlstate)
    assert str(made) == "get_thing: it went wrong"
    assert str(translate(error)) == "it went wrong"


@pytest.mark.parametrize("group", [row for row in _BY_SQLSTATE if len(row) == 2])
async def test_unknown_code_of_a_known_class(raw: asyncpg.Connection[Any], group: str) -> None:
    made = translate(await provoke(raw, f"{group}ZZ9"))
    assert type(made) is _BY_SQLSTATE[group]
    assert made.sqlstate == f"{group}ZZ9"


@pytest.mark.parametrize("sqlstate", ["P0001", "XX000", "57000", "2F000", "ZZZZ9", "3B001"])
async def test_everything_else_is_internal(raw: asyncpg.Connection[Any], sqlstate: str) -> None:
    made = translate(await provoke(raw, sqlstate))
    assert type(made) is errors.InternalError
    assert made.sqlstate == sqlstate


async def test_message_is_one_line(raw: asyncpg.Connection[Any]) -> None:
    with pytest.raises(asyncpg.PostgresError) as caught:
        await raw.execute("DO $$ BEGIN RAISE EXCEPTION E'first\\nsecond'; END $$")
    assert str(translate(caught.value, "x")) == "x: first"


async def test_row_of_a_partition_is_named_by_its_table(raw: asyncpg.Connection[Any]) -> None:
    with pytest.raises(asyncpg.NotNullViolationError) as caught:
        await raw.execute("INSERT INTO elizasql.memories (agent_id, id, type) VALUES ($1, $1, 'x')", uuid4())
    assert re.fullmatch(r"memories_p\d\d", caught.value.table_name or "")
    made = translate(caught.value)
    assert isinstance(made, errors.NotNullError)
    assert made.table == "memories"
    assert errors._parent_table("map_p1") == "map_p1"


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [("null", errors.NotNullError), ('\'{"type": "document"}\'', errors.CheckError)],
    ids=["not null", "check"],
)
async def test_no_message_holds_the_row(
    raw: asyncpg.Connection[Any], db: DatabaseAdapter, metadata: str, kind: type[errors.IntegrityError]
) -> None:
    text = uuid4().hex
    with pytest.raises(asyncpg.IntegrityConstraintViolationError) as caught:
        await raw.execute(
            "INSERT INTO elizasql.memories (agent_id, id, type, content, metadata)"
            f" VALUES ($1, $1, 'documents', jsonb_build_object('text', $2::text), {metadata})",
            db.agent_id,
            text,
        )
    assert text in str(caught.value)
    made = translate(caught.value, "get_thing")
    assert type(made) is kind
    assert text not in str(made)
    assert str(made).startswith("get_thing: ")
    assert made.detail is not None
    assert text in made.detail
    assert text not in str(caught.value), "it is printed, too, as the cause"


def test_no_message_holds_the_row_in_another_language() -> None:
    said = {"C": "23514", "M": "es ging schief", "D": "Fehlgeschlagene Zeile enthält (1, geheim)."}
    made = translate(asyncpg.CheckViolationError.new(said))
    assert isinstance(made, errors.CheckError)
    assert str(made) == "es ging schief"
    assert made.detail == said["D"]


def test_no_message_holds_what_is_told_of_a_value() -> None:
    made = translate(asyncpg.PostgresError.new({"C": "22P02", "M": "it went wrong", "D": "Token geheim is invalid."}))
    assert type(made) is errors.DataError
    assert str(made) == "it went wrong"


@pytest.mark.parametrize(
    ("constraint", "detail"),
    [
        ("embeddings_dimension_fkey", "Key (agent_id, dimension)=(1, 384) is not present."),
        ("embeddings_dimension_fkey", None),
        ("rooms_agent_fkey", '{"locked": null}'),
    ],
)
def test_reference_that_the_server_refuses_by_itself(constraint: str, detail: str | None) -> None:
    """The words of a width that is not the agent's are those of the schema's own check."""
    said = {"C": "23503", "M": "it went wrong", "n": constraint, **({} if detail is None else {"D": detail})}
    made = translate(asyncpg.PostgresError.new(said))
    assert type(made) is errors.ForeignKeyError
    assert (made.constraint, made.detail) == (constraint, detail)


async def test_unique_violation_says_which_row(raw: asyncpg.Connection[Any], db: DatabaseAdapter) -> None:
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await raw.execute("INSERT INTO elizasql.agents (id, name) VALUES ($1, 'x')", db.agent_id)
    made = translate(caught.value)
    assert isinstance(made, errors.UniqueViolationError)
    assert (made.constraint, made.table, made.retryable) == ("agents_pkey", "agents", False)
    assert made.detail is not None
    assert str(db.agent_id) in made.detail
    assert str(db.agent_id) in str(made)


async def test_missing_agent_says_how_one_is_made(dsn: str) -> None:
    async with elizasql.connect(agent_id=uuid4(), dsn=dsn, indexing="manual") as db:
        with pytest.raises(errors.ForeignKeyError, match=rf"{db.agent_id}.* ensure_agent_exists\(\)"):
            await db.create_memory({"content": {"text": "hello"}}, "messages")
        with pytest.raises(errors.ForeignKeyError, match=r"ensure_agent_exists\(\)"):
            await db.set_cache("key", 1)


async def test_missing_reference_says_how_what_is_missing_is_made(
    raw: asyncpg.Connection[Any], db: DatabaseAdapter
) -> None:
    with pytest.raises(errors.ForeignKeyError, match=r"create_entity\(\), also the one of the agent's own id"):
        await db.create_memory(Memory(entity_id=db.agent_id, content={"text": "I speak."}), "messages")
    keys = await raw.fetch(
        "SELECT conname, confrelid::regclass::text AS refers_to FROM pg_constraint"
        " WHERE contype = 'f' AND conparentid = 0 AND connamespace = 'elizasql'::regnamespace"
    )
    for name, refers_to in keys:
        made = translate(asyncpg.ForeignKeyViolationError.new({"C": "23503", "M": "it is missing", "n": name}))
        said = re.findall(r"\b(?:create|ensure)_(\w+?)(?:_exists)?\(\)", str(made))
        # A memory, or a message to answer, is what the caller has just deleted, not what it forgot to make.
        table = str(errors._parent_table(refers_to.removeprefix("elizasql.")))
        one = re.sub("ies$", "y", table).removesuffix("s")
        assert set(said) == {one} - {"memory", "central_message"}, name


async def test_failed_transaction(raw: asyncpg.Connection[Any]) -> None:
    with pytest.raises(asyncpg.InFailedSQLTransactionError) as caught:
        async with raw.transaction():
            with pytest.raises(asyncpg.UndefinedTableError):
                await raw.execute("TABLE nowhere")
            await raw.execute("SELECT 1")
    assert isinstance(translate(caught.value), errors.TransactionError)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (asyncio.TimeoutError(), errors.DeadlineError),
        (TimeoutError(), errors.DeadlineError),
        (ConnectionRefusedError(111, "refused"), errors.ConnectionLostError),
        (FileNotFoundError(2, "no socket"), errors.ConnectionLostError),
        (socket.gaierror(-2, "unknown"), errors.ConnectionLostError),
        (ConnectionResetError(), errors.ConnectionLostError),
        (BrokenPipeError(), errors.ConnectionLostError),
        (OSError(), errors.ConnectionLostError),
        (asyncpg.InterfaceError("connection is closed"), errors.ConnectionLostError),
        (asyncpg.ConnectionDoesNotExistError("closed"), errors.ConnectionLostError),
        (asyncpg.ClientConfigurationError("no user"), errors.ConfigurationError),
        (ssl.SSLCertVerificationError(1, "certificate verify failed"), errors.ConfigurationError),
        (asyncpg.OutdatedSchemaCacheError("changed"), errors.SchemaError),
        (asyncpg.InternalClientError("lost"), errors.ConnectionLostError),
        (asyncpg.ProtocolError("lost"), errors.ConnectionLostError),
        (RuntimeError("odd"), errors.InternalError),
        (AssertionError(), errors.InternalError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
def test_errors_that_are_not_the_servers(error: Exception, kind: type[ElizaSQLError]) -> None:
    made = translate(error, "get_thing")
    assert type(made) is kind
    assert made.sqlstate == getattr(error, "sqlstate", None)
    assert made.statement == "get_thing"
    assert re.match("get_thing: .", str(made))


def test_error_of_ours_comes_back_unchanged() -> None:
    error = errors.NotFoundError("gone")
    assert translate(error, "get_thing") is error
    assert error.statement is None


# --- through real methods --------------------------------------------------------------------------------------------


async def test_broken_reference(db: DatabaseAdapter) -> None:
    with pytest.raises(elizasql.ForeignKeyError) as caught:
        await db.create_room(Room(source="x", type="GROUP", world_id=uuid4()))
    error = caught.value
    assert (error.sqlstate, error.constraint, error.table) == ("23503", "rooms_world_fkey", "rooms")
    assert error.statement is not None
    assert elizasql._statements.SQL[error.statement].file == "rooms.sql"
    assert isinstance(error.__cause__, asyncpg.ForeignKeyViolationError)
    assert error.detail is not None
    assert "worlds" in error.detail
    assert not error.retryable
    again = pickle.loads(pickle.dumps(error))
    assert (again.constraint, again.table, again.statement) == (error.constraint, error.table, error.statement)


async def test_broken_reference_of_a_partitioned_table(db: DatabaseAdapter) -> None:
    with pytest.raises(elizasql.ForeignKeyError) as caught:
        await db.create_memory(Memory(content={"text": "x"}, room_id=uuid4()), "messages")
    assert (caught.value.table, caught.value.constraint) == ("memories", "memories_room_fkey")


async def test_broken_rule(db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged of it, with the driver's error as its cause, holds nothing of the memory."""
    monkeypatch.setattr(memories, "_check_metadata", lambda encoded: None)
    text = uuid4().hex
    with pytest.raises(elizasql.CheckError) as caught:
        await db.create_memory(Memory(content={"text": text}, metadata={"type": "document"}), "documents")
    error = caught.value
    assert (error.table, error.constraint) == ("memories", "memories_document_check")
    assert "memories_document_check" in str(error)
    assert isinstance(error.__cause__, asyncpg.CheckViolationError)
    assert text not in "".join(traceback.format_exception(error))
    assert error.detail is not None
    assert text in error.detail


async def test_broken_rule_whose_transaction_cannot_be_undone(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is logged of the undoing shows nothing of the memory either."""
    caplog.set_level(logging.DEBUG)
    db = await make_db(batch_size=1)
    monkeypatch.setattr(memories, "_check_metadata", lambda encoded: None)
    send, text = _executor._send, uuid4().hex

    async def silent(connection: Any, statement: Statement, deadline: float) -> None:
        if statement.name == "roll_back_transaction":
            raise asyncio.TimeoutError
        await send(connection, statement, deadline)

    monkeypatch.setattr(_executor, "_send", silent)
    batch = [Memory(content={}), Memory(content={"text": text}, metadata={"type": "document"})]
    with pytest.raises(elizasql.CheckError):
        await db.create_memories(batch, "documents")
    assert "a rollback failed" in caplog.text
    assert text not in caplog.text


async def test_missing_row(db: DatabaseAdapter) -> None:
    missing = uuid4()
    with pytest.raises(elizasql.NotFoundError, match=str(missing)) as caught:
        await db.update_memories([Memory(id=missing, content={})])
    assert caught.value.sqlstate == "P0002"
    assert isinstance(caught.value.__cause__, asyncpg.NoDataFoundError)


async def test_call_that_takes_too_long(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    memory = Memory(id=await db.create_memory(Memory(content={"text": "x"}), "messages"), content={"text": "y"})
    async with raw.transaction():
        await raw.execute("SELECT FROM elizasql.memories WHERE id = $1 FOR UPDATE", memory.id)
        with pytest.raises(elizasql.DeadlineError) as caught:
            await db.update_memory(memory, timeout=0.2)
    assert caught.value.retryable
    assert caught.value.statement == "update_memories"
    assert isinstance(caught.value.__cause__, asyncio.TimeoutError)
    assert await db.update_memory(memory)


async def test_driver_that_lost_its_place_is_not_used_again(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncpg gives such a connection back to the pool as if it were sound."""
    db = await make_db(pool_max_size=1)
    before = await _pid(db)

    async def confused(*args: Any, **kwargs: Any) -> Any:
        raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")

    with monkeypatch.context() as patch:
        patch.setattr(asyncpg.Connection, "_execute", confused)
        with pytest.raises(elizasql.ConnectionLostError):
            await db.get_memory_by_id(uuid4())
    assert await _pid(db) != before


async def _pid(db: elizasql.DatabaseAdapter) -> int:
    connection, _ = await db._executor.lane.acquire(5)
    db._executor.lane.keep(connection)
    pid: int = connection.get_server_pid()
    return pid
