"""Every error that this library raises, and the one table that makes them out of the server's answers.

    ElizaSQLError
    ├── ConfigurationError            3D*: a setting is missing or wrong; the server or pgvector is too old, or its
    │                                 certificate is not trusted
    ├── EmbeddedServerError           the embedded server could not be started, joined or stopped
    ├── MigrationError                a migration failed, or the database is newer than this library
    ├── ClosedError                   the adapter is closed or closing
    │   └── WrongLoopError            the adapter was opened in another event loop, or before a fork
    ├── ArgumentError (ValueError)    found before any I/O; nothing was written
    │   ├── EmbeddingError            no finite, non-zero vector of a supported width that the index can hold
    │   └── EmbeddingDimensionError   another width than the agent is locked to: `locked`, `given`
    ├── NotFoundError                 P0002: the row that the call is about does not exist
    ├── ReembeddingError              the agent cannot move to another width of embeddings now: `missing`
    ├── UnavailableError              no answer; 25006: no writes; a later try may succeed, except UnknownOutcomeError
    │   ├── ConnectionLostError       08*, 25P03, 25P04, 57P01, 57P02, 57P03, 57P05, a refused or broken connection
    │   ├── PoolTimeoutError          no pooled connection became free in time
    │   ├── CircuitOpenError          the server failed too often; refused without asking it: `retry_after`
    │   ├── UnknownOutcomeError       the connection was lost after a write was sent that cannot be repeated
    │   └── ServerBusyError           53*, 58*: connections, memory or disk exhausted
    ├── DeadlineError                 the call's own time limit passed (57014, or no answer in time); writes may be done
    ├── ConflictError                 40*: another transaction was in the way; a later try may succeed
    │   ├── SerializationError        40001
    │   ├── DeadlockError             40P01
    │   └── LockTimeoutError          55P03
    ├── TransactionError              25*: the transaction failed, a call in it was cut short, or a savepoint is open
    ├── IntegrityError                23*: a rule of the schema refused the row: `constraint`, `table`, `detail`
    │   ├── UniqueViolationError      23505
    │   ├── ForeignKeyError           23503: the row points at something that does not exist
    │   ├── NotNullError              23502
    │   └── CheckError                23514
    ├── DataError                     21*, 22*, 54*: a value that the server cannot store
    ├── PermissionDeniedError         28*, 42501: also a role or a database that is set to read only
    ├── SchemaError                   0A*, 3F*, 42*: the database's schema is not the one expected, or no longer
    └── InternalError                 anything else the server or the driver said

Each carries `statement` (the name in `sql/`), `sqlstate` and `retryable`; the driver's error is `__cause__`.
No message holds a password; of an address it shows host, port and database. Nor does one hold the row that a rule
refused, so that nothing of it is logged: that is in `detail` alone, and no longer in the driver's error.

Nothing of a batch is written when one row is wrong, and the message begins with its place in the order given, counted
from 0: "Memory at position 17: ...". So do the server's refusals, where it tells which row it means; of several that
are wrong the first one is named, and of a row that several values make, each of these.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import asyncpg
import orjson

__all__ = [
    "ArgumentError",
    "CheckError",
    "CircuitOpenError",
    "ClosedError",
    "ConfigurationError",
    "ConflictError",
    "ConnectionLostError",
    "DataError",
    "DeadlineError",
    "DeadlockError",
    "ElizaSQLError",
    "EmbeddedServerError",
    "EmbeddingDimensionError",
    "EmbeddingError",
    "ForeignKeyError",
    "IntegrityError",
    "InternalError",
    "LockTimeoutError",
    "MigrationError",
    "NotFoundError",
    "NotNullError",
    "PermissionDeniedError",
    "PoolTimeoutError",
    "ReembeddingError",
    "SchemaError",
    "SerializationError",
    "ServerBusyError",
    "TransactionError",
    "UnavailableError",
    "UniqueViolationError",
    "UnknownOutcomeError",
    "WrongLoopError",
    "translate",
]


class ElizaSQLError(Exception):
    """Base of every error that this library raises."""

    retryable = False
    """True when the same call may be made again as it is, and may succeed later.

    False where a write may have been done that must not be repeated blindly, or would be done once more, as a create
    that was given no ids: these are made anew for each call.
    """

    kept: int | None = None
    """Of `load_memories`: how many memories, from the first on, are stored in spite of the error."""

    def __init__(self, message: str = "", *, statement: str | None = None, sqlstate: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip().splitlines()[0])
        self.statement = statement
        self.sqlstate = sqlstate


class ConfigurationError(ElizaSQLError):
    """A setting is missing or wrong, or the server does not meet the requirements."""


class EmbeddedServerError(ElizaSQLError):
    """The embedded server could not be started, joined or stopped."""


class MigrationError(ElizaSQLError):
    """A migration failed, or the database was migrated by a newer version of this library."""


class ClosedError(ElizaSQLError):
    """The adapter is closed or closing."""


class WrongLoopError(ClosedError):
    """The adapter was opened in another event loop, or before a fork; its connections cannot be used here."""


class ArgumentError(ElizaSQLError, ValueError):
    """An argument is wrong. Found before any I/O: nothing was written."""


class EmbeddingError(ArgumentError):
    """The embedding is no finite, non-zero vector of real numbers, of a supported width, that the index can hold."""


class EmbeddingDimensionError(ArgumentError):
    """The embedding has another width than the one that the agent is locked to.

    Attributes:
        agent_id: The agent.
        locked: The dimension in force; None when the agent has none yet.
        given: The dimension that the call asked for.
    """

    def __init__(self, agent_id: UUID, *, locked: int | None, given: int, statement: str | None = None) -> None:
        if locked is None:
            message = (
                f"No embedding dimension is set for agent {agent_id}: "
                f"call ensure_embedding_dimension({given}) before writing {given}-dimensional embeddings"
            )
        else:
            message = (
                f"Cannot change embedding dimension for agent {agent_id}: locked at {locked}, given {given}; "
                f"embed with the model of {locked} dimensions, or take the agent to {given} with reembed()"
            )
        super().__init__(message, statement=statement)
        self.agent_id = agent_id
        self.locked = locked
        self.given = given

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_dimension_error, (self.agent_id, self.locked, self.given, self.statement, self.args)


def _rebuild_dimension_error(
    agent_id: UUID, locked: int | None, given: int, statement: str | None, args: tuple[Any, ...]
) -> EmbeddingDimensionError:
    """Rebuild the error in another process; `Exception.__reduce__` cannot pass keyword arguments."""
    error = EmbeddingDimensionError(agent_id, locked=locked, given=given, statement=statement)
    error.args = args  # the message may have got the position in a batch
    return error


class NotFoundError(ElizaSQLError):
    """The row that the call is about does not exist."""


class ReembeddingError(ElizaSQLError):
    """The agent cannot move to another width: another move is under way, or memories have no text to embed.

    Attributes:
        missing: Ids of the memories without text; empty where something else is the matter.
    """

    missing: Sequence[UUID] = ()


class UnavailableError(ElizaSQLError):
    """The server gave no answer, or takes no writes at the moment, as a standby does."""

    retryable = True


class ConnectionLostError(UnavailableError):
    """The connection was refused, lost, or the server is starting up or shutting down."""


class PoolTimeoutError(UnavailableError):
    """No pooled connection became free in time."""


class CircuitOpenError(UnavailableError):
    """The server has failed too often of late: calls are refused without asking it.

    Attributes:
        retry_after: Seconds until the next call is let through; 0 when others are finding out right now.
    """

    retry_after: float = 0.0


class UnknownOutcomeError(UnavailableError):
    """The connection was lost after a write was sent: it was done as a whole or not at all, and nobody knows which.

    Raised only for what cannot be repeated safely, such as a claim or a count of what was deleted; look at the rows
    before you call again.
    """

    retryable = False


class ServerBusyError(UnavailableError):
    """The server has run out of connections, memory or disk."""


class DeadlineError(ElizaSQLError):
    """The call did not finish within its time limit.

    A write that ran into it is done as a whole or not at all, and may be done. Look at the rows before you repeat what
    would end otherwise the second time, such as a claim, an increment, a create of agents, one without ids, or a delete
    that counts: `retryable` is False on the errors of these.
    """

    retryable = True


class ConflictError(ElizaSQLError):
    """A concurrent transaction was in the way."""

    retryable = True


class SerializationError(ConflictError):
    """A concurrent transaction changed the same rows."""


class DeadlockError(ConflictError):
    """Two transactions waited for each other."""


class LockTimeoutError(ConflictError):
    """A lock was not available in time."""


class TransactionError(ElizaSQLError):
    """The transaction cannot go on: an error ended it, a call in it was cut short, or a savepoint in it is open."""


class IntegrityError(ElizaSQLError):
    """A rule of the schema refused the row.

    Attributes:
        constraint: Name of the constraint.
        table: Name of the table; a partition is given by its parent's name.
        detail: The server's own explanation. Of a `NotNullError` or a `CheckError` it may hold the whole row.
    """

    constraint: str | None = None
    table: str | None = None
    detail: str | None = None


class UniqueViolationError(IntegrityError):
    """A row with this key is there already."""


class ForeignKeyError(IntegrityError):
    """The row points at something that does not exist."""


class NotNullError(IntegrityError):
    """A value that is needed is missing."""


class CheckError(IntegrityError):
    """The row breaks a check constraint."""


class DataError(ElizaSQLError):
    """The server cannot store this value."""


class PermissionDeniedError(ElizaSQLError):
    """The server refused the login, the role lacks a privilege, or it is set to read only."""


class SchemaError(ElizaSQLError):
    """The database's schema is not the one that this library expects; run the migrations."""


class InternalError(ElizaSQLError):
    """The server or the driver failed in a way that this library does not know."""


# Five characters first, then the two-character class.
_BY_SQLSTATE: dict[str, type[ElizaSQLError]] = {
    "23505": UniqueViolationError,
    "23503": ForeignKeyError,
    "23502": NotNullError,
    "23514": CheckError,
    "40001": SerializationError,
    "40P01": DeadlockError,
    "P0002": NotFoundError,
    "42501": PermissionDeniedError,
    "55P03": LockTimeoutError,
    "57014": DeadlineError,
    "57P01": ConnectionLostError,
    "57P02": ConnectionLostError,
    "57P03": ConnectionLostError,
    # A limit of the server's has ended the connection: of an idle transaction, of a long one, of an idle session.
    "25P03": ConnectionLostError,
    "25P04": ConnectionLostError,
    "57P05": ConnectionLostError,
    "08": ConnectionLostError,
    "0A": SchemaError,
    "21": DataError,
    "22": DataError,
    "23": IntegrityError,
    # After a failover another connection may lead to the primary. What is set to read only the executor tells apart.
    "25006": UnavailableError,
    "25": TransactionError,
    "28": PermissionDeniedError,
    "3D": ConfigurationError,
    "3F": SchemaError,
    "40": ConflictError,
    "42": SchemaError,
    "53": ServerBusyError,
    "54": DataError,
    "58": ServerBusyError,
}

# What the server explains by the row, in whatever language; the other rules it explains by the key.
_WITH_ROW = (asyncpg.NotNullViolationError, asyncpg.CheckViolationError)

_ENTITY_MADE_BY = "An entity is made by create_entity(), also the one of the agent's own id, as which it speaks"
# By the ending of the foreign key's name.
_MADE_BY: dict[str, str] = {
    "_agent_fkey": "An agent is made by ensure_agent_exists() or create_agent()",
    "_channel_fkey": "A channel is made by create_channel()",
    "_entity_fkey": _ENTITY_MADE_BY,
    "_message_server_fkey": "A message server is made by create_message_server()",
    "_room_fkey": "A room is made by create_room()",
    "_source_fkey": _ENTITY_MADE_BY,
    "_target_fkey": _ENTITY_MADE_BY,
    "_world_fkey": "A world is made by create_world()",
}


def translate(error: BaseException, statement: str | None = None) -> ElizaSQLError:
    """Make this library's error out of the driver's.

    Args:
        error: What asyncpg, asyncio or the operating system raised. A refused row is taken out of it, for tracebacks.
        statement: Name of the statement that was running.

    Returns:
        The error to raise, with `error` as its intended `__cause__`. An error of this library comes back unchanged.
    """
    if isinstance(error, ElizaSQLError):
        return error
    prefix = f"{statement}: " if statement else ""
    if isinstance(error, asyncpg.PostgresError):
        if error.constraint_name == "embeddings_dimension_fkey" and (error.detail or "").startswith("{"):
            said = orjson.loads(error.detail)
            return EmbeddingDimensionError(
                UUID(said["agent_id"]), locked=said["locked"], given=said["given"], statement=statement
            )
        sqlstate = error.sqlstate or ""
        kind = _BY_SQLSTATE.get(sqlstate) or _BY_SQLSTATE.get(sqlstate[:2], InternalError)
        said = error.detail
        if isinstance(error, _WITH_ROW):
            error.detail = None
        detail = ""
        if isinstance(error, asyncpg.InFailedSQLTransactionError):
            detail = ": an error before has ended it; around what may fail, open a savepoint with tx.transaction()"
        if error.detail and isinstance(error, asyncpg.IntegrityConstraintViolationError):
            detail = f": {error.detail}"
        detail += _explain_reference(error.constraint_name or "")
        made = kind(f"{prefix}{_first_line(error)}{detail}", statement=statement, sqlstate=sqlstate or None)
        if isinstance(made, IntegrityError):
            made.constraint = error.constraint_name
            made.table = _parent_table(error.table_name)
            made.detail = said
        return made
    # asyncio's TimeoutError is an OSError from Python 3.11 on: it must be asked for first.
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
        return DeadlineError(f"{prefix}no answer within the time limit", statement=statement)
    # A certificate that is not trusted is one, too, and no wait mends it.
    if isinstance(error, (asyncpg.ClientConfigurationError, ssl.SSLCertVerificationError)):
        return ConfigurationError(f"{prefix}{_first_line(error)}", statement=statement)
    if isinstance(error, asyncpg.OutdatedSchemaCacheError):
        return SchemaError(f"{prefix}{_first_line(error)}", statement=statement)
    if isinstance(error, (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError)):
        return ConnectionLostError(f"{prefix}{_first_line(error)}", statement=statement)
    return InternalError(f"{prefix}{_first_line(error)}", statement=statement)


def _explain_reference(constraint: str) -> str:
    """Say how that is made at which a row points by this foreign key; "" where the key is another."""
    said = (hint for ending, hint in _MADE_BY.items() if constraint.endswith(ending))
    return next((f" {hint}." for hint in said), "")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _parent_table(table: str | None) -> str | None:
    """Name the table that a caller knows, where the server names one of its hash partitions."""
    return None if table is None else re.sub(r"_p\d\d$", "", table)


def show(value: object, length: int = 80) -> str:
    """Give a value as an error names it: the beginning of its repr, or its type where it has none.

    What does not fit may be anything: a number of more digits than Python writes, a list deeper than its stack.
    """
    try:
        return repr(value)[:length]
    except Exception:  # noqa: BLE001 - of the caller's class
        return f"a value of type {type(value).__name__}"
