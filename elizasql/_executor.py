"""The only module that runs the statements of `sql/` for the domains.

One place orders the arguments, asks the circuit breaker, takes a connection, runs, judges failures, tries again and
translates errors; all within the time that the call has. `_retry` says what a failure means, `_breaker` whether the
server is asked at all, `_pool` where the connections come from.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import random
import time
import weakref
from collections import OrderedDict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

import asyncpg

from ._calls import Meter, current_deadline, has_new_ids, spawn, wait_for
from ._pool import Lane, is_open
from ._registry import Connections, retry_policy
from ._retry import OUT_OF_MEMORY, Outcome, classify, is_answer
from ._statements import SQL, Statement
from .config import Config
from .errors import (
    CircuitOpenError,
    ClosedError,
    ConnectionLostError,
    DeadlineError,
    ElizaSQLError,
    ForeignKeyError,
    LockTimeoutError,
    PermissionDeniedError,
    PoolTimeoutError,
    TransactionError,
    UnknownOutcomeError,
    translate,
)

logger = logging.getLogger("elizasql")

T = TypeVar("T")
Work = Callable[[Any, float], Awaitable[Any]]
Fetch = Callable[..., Awaitable[list[asyncpg.Record]]]

# What speaks of the connection, where another one does better: it leads to a standby since a failover, or what it knows
# of types and statements is no longer so.
_OUTDATED = (asyncpg.ReadOnlySQLTransactionError, asyncpg.InvalidCachedStatementError, asyncpg.InternalServerError)

# What a call meets that waits for a transaction, or does not see what that has done.
_OF_BESIDE = (DeadlineError, ForeignKeyError, LockTimeoutError, PoolTimeoutError)

# The transactions in whose blocks the caller's code runs, the outermost first. A task or a timer that is begun in one
# takes this along, and may outlive it by far.
_around: contextvars.ContextVar[tuple[weakref.ref[Executor], ...]] = contextvars.ContextVar(
    "elizasql_around", default=()
)

# Seconds that a rollback has in any case, also when the call that failed has none left.
_UNDO_TIME = 0.5

# Calls that may be at what one at a time can lock: one has it, and the statement of the next is at the server already.
_AT_A_LOCK = 2

# Seconds between two looks at a transaction whose end the server has not decided yet.
_SETTLE_PAUSE = 0.05


@dataclass(frozen=True, slots=True)
class Home:
    """Where the rows of an agent are.

    Attributes:
        agent_id: The agent.
        partition: What the names of its partitions end in, such as "_p07".
    """

    agent_id: UUID
    partition: str


class _Failed(Exception):  # noqa: N818 - never leaves this module
    """A try that failed: the driver's error, and what it means."""

    def __init__(self, error: Exception, outcome: Outcome, connection: Any, *, used: bool) -> None:
        super().__init__(error)
        self.error = error
        self.outcome = outcome
        # Under which the breaker knows the try; None: it does not.
        self.permit: int | None = None
        # A connection that was used before: when it is gone, that may say nothing about the server any more.
        self.stale = used and outcome is not Outcome.PERMANENT and not is_open(connection)


class _EndUnheard(asyncio.TimeoutError):
    """The time limit passed while a transaction ended: nobody is left to ask whether it was kept."""


class Executor:
    """Runs statements, each on a connection of its lane.

    Attributes:
        in_flight: Calls that are running or waiting for a connection.
        in_transaction: Whether all of them run in one transaction.
        home: Where the rows of the adapter's agent are; None: statements go through the partitioned tables.
    """

    in_transaction = False

    def __init__(
        self, connections: Connections, lane: Lane, config: Config, meter: Meter, home: Home | None = None
    ) -> None:
        self.connections = connections
        self.lane = lane
        self.meter = meter
        self.home = home
        self._config = config
        self._breaker = connections.breaker
        self._policy = retry_policy(config)
        self._closed = False
        self._cut = False
        self._drained = asyncio.Event()
        self._held: set[Any] = set()  # connections that calls have
        self.in_flight = 0

    # Each gives the coroutine of `_attempts` itself: one that only waits for another costs a microsecond or two.

    def fetch(self, statement: Statement, **params: Any) -> Coroutine[Any, Any, list[asyncpg.Record]]:
        """Run a statement and give its rows."""
        return self._run(statement, "fetch", params)

    def fetch_row(self, statement: Statement, **params: Any) -> Coroutine[Any, Any, asyncpg.Record | None]:
        """Run a statement and give its first row, None where there is none."""
        return self._run(statement, "fetchrow", params)

    def fetch_value(self, statement: Statement, **params: Any) -> Coroutine[Any, Any, Any]:
        """Run a statement and give the first column of its first row, None where there is none."""
        return self._run(statement, "fetchval", params)

    def execute(self, statement: Statement, **params: Any) -> Coroutine[Any, Any, object]:
        """Run a statement for its effect."""
        return self._run(statement, "execute", params)

    async def fetch_chunks(
        self, statement: Statement, chunks: Sequence[dict[str, Any]], *, settle: bool = False, unlimited: bool = False
    ) -> list[asyncpg.Record]:
        """Run a statement once for each chunk, all in one transaction when there are several; give all rows.

        Args:
            statement: What to run.
            chunks: Its parameters.
            settle: A transaction for a single chunk, too: three round trips more, and a lost end is settled.
            unlimited: A transaction in which no `statement_timeout` of the role ends what takes long: it is meant for
                what callers wait for. One round trip more.
        """
        if len(chunks) == 1 and not settle and not unlimited:
            return await self.fetch(statement, **chunks[0])

        async def work(fetch: Fetch) -> list[asyncpg.Record]:
            rows: list[asyncpg.Record] = []
            if unlimited:
                await fetch(SQL["lift_limits"])
            for chunk in chunks:
                rows += await fetch(statement, **chunk)
            return rows

        return await self.fetch_together(statement, work)

    def fetch_in_turn(
        self, statement: Statement, keys: Iterable[Hashable], **params: Any
    ) -> Coroutine[Any, Any, list[asyncpg.Record]]:
        """Run a statement that waits for others which lock the same, and give its rows.

        Args:
            statement: What to run.
            keys: What it locks, in the order of all who lock several. Where others of the process are at one of these,
                the call waits for them here, without a connection; in a transaction, which has one, at the server.
            **params: Its parameters.
        """
        return self._run(statement, "fetch", params, keys)

    def fetch_together(
        self, statement: Statement, work: Callable[[Fetch], Awaitable[T]], keys: Iterable[Hashable] = ()
    ) -> Coroutine[Any, Any, T]:
        """Run several statements in one transaction.

        Args:
            statement: What the transaction is for: errors name it.
            work: Takes what runs a statement and gives its rows. It is called once more for each new try.
            keys: As of `fetch_in_turn`.
        """

        async def on(connection: Any, deadline: float) -> T:
            def fetch(each: Statement, **params: Any) -> Coroutine[Any, Any, list[asyncpg.Record]]:
                rows: Coroutine[Any, Any, list[asyncpg.Record]] = connection.fetch(
                    each.sql, *each.order(params), timeout=_left(deadline)
                )
                return rows

            return await work(fetch)

        # What broke before the end of the transaction was not done; its end is settled by `_commit_on`.
        return self._attempts(statement.name, self._in_transaction(on, settle=True), Outcome.NOT_APPLIED, keys=keys)

    async def probe(self) -> None:
        """Ask the server for a sign of life, once: no try is made again, and the breaker is not asked."""
        self._enter("ping")
        try:
            deadline = current_deadline(self._config.timeout, self.meter)
            connection, _ = await self._acquire("ping", deadline, None)
            try:
                patience = min(_left(deadline), self._config.connection_timeout)
                await connection.fetchval(SQL["ping"].sql, timeout=patience)
            except BaseException as error:
                self.lane.give_back(connection)
                if isinstance(error, Exception):
                    raise self._explain(error, "ping") from error
                raise
            self.lane.keep(connection)
        except _Failed as failed:
            made = self._explain(failed.error, "ping")
            raise made from made.__cause__
        finally:
            self._leave()

    # --- tries -------------------------------------------------------------------------------------------------------

    def text(self, statement: Statement, params: Mapping[str, Any]) -> str:
        """Give what the server gets: of what reads this agent's rows alone, the text that names its partitions."""
        home = self.home
        if home is None or not statement.of_one_agent or params["agent_id"] != home.agent_id:
            return statement.sql
        return statement.within(home.partition)

    def _run(
        self, statement: Statement, method: str, params: dict[str, Any], keys: Iterable[Hashable] = ()
    ) -> Coroutine[Any, Any, Any]:
        sql, arguments = self.text(statement, params), statement.order(params)

        def work(connection: Any, deadline: float) -> Any:
            return getattr(connection, method)(sql, *arguments, timeout=_left(deadline))

        if self._config.prepared_statements or self.in_transaction:
            lost = Outcome.NOT_APPLIED if statement.repeatable else Outcome.UNKNOWN
            return self._attempts(statement.name, work, lost, keys=keys)
        # Without names a statement takes two steps, and a pooler leads them to one server inside of a transaction only.
        # What broke before its end was not done, and a lost end is settled where it cannot be done again.
        wrapped = self._in_transaction(work, settle=not statement.repeatable)
        return self._attempts(statement.name, wrapped, Outcome.NOT_APPLIED, keys=keys)

    def _in_transaction(self, work: Work, *, settle: bool) -> Work:
        """Wrap work in a transaction, whose end is settled when it is lost."""

        async def wrapped(connection: Any, deadline: float) -> Any:
            await self._begin_on(connection, deadline)
            try:
                result = await work(connection, deadline)
            except BaseException as error:
                # Outside of a transaction the connection goes back, and takes the rest with it.
                if self.in_transaction or isinstance(error, asyncpg.PostgresError):
                    await self._undo_on(connection)
                raise
            if settle:
                await self._commit_on(connection, deadline)
            else:
                await _send(connection, self._commit, deadline)
            return result

        return wrapped

    async def _attempts(
        self, name: str, work: Work, lost: Outcome, *, hold: bool = False, keys: Iterable[Hashable] = ()
    ) -> Any:
        """Do work on a connection, and again as often as it makes sense.

        Args:
            name: What errors call it.
            work: Takes the connection and the time by which it must have ended.
            lost: What a connection that breaks after something was sent means: NOT_APPLIED where the work may be done
                again all the same.
            hold: The connection stays the caller's when it went well.
            keys: As of `fetch_in_turn`.

        Raises:
            ElizaSQLError: What the last try met.
        """
        deadline = current_deadline(self._config.timeout, self.meter)
        self._enter(name)
        turns: list[_Turn] = []
        unheard = False
        try:
            for key in keys:
                turn = self._turn_of(key)
                await turn.take(name, deadline, "the locks that it needs")
                turns.append(turn)
            if turns and self._cut:
                raise ClosedError(f"{name}: the adapter was closed meanwhile", statement=name)
            failures = 0
            spared = False
            permit: int | None = None
            while True:
                try:
                    return await self._attempt(name, work, deadline, hold, permit, renewed=spared)
                except _Failed as failed:
                    error, outcome = failed.error, failed.outcome
                    made = self._explain(error, name)
                    stale = failed.stale and not spared
                    if stale:
                        # It broke while nobody used it, perhaps long ago. So may the others have: none is trusted.
                        await self.lane.replace()
                    unheard = unheard or outcome is Outcome.UNKNOWN
                    if isinstance(error, _EndUnheard):
                        outcome = Outcome.NOT_APPLIED if SQL[name].repeatable else Outcome.UNKNOWN
                    elif outcome is Outcome.UNKNOWN:
                        outcome = lost
                    if outcome is Outcome.UNKNOWN and isinstance(made, (DeadlineError, ClosedError)):
                        made.retryable = False  # it may have been done, and a second time would be once too often
                    elif outcome is Outcome.UNKNOWN:
                        raise UnknownOutcomeError(
                            f"{made}; the statement was sent, and is done as a whole or not at all",
                            statement=name,
                            sqlstate=made.sqlstate,
                        ) from error
                    if stale:
                        # The try that follows at once is about the same event, and counts with this one.
                        spared, pause, permit = True, 0.0, failed.permit
                    else:
                        # Whoever waits to try again does not hear what the others meet meanwhile.
                        permit = self._breaker.era
                        failures += 1
                        pause = self._policy.delay(failures, error, random.random)
                    if not self._again(made, outcome, failures, deadline - pause):
                        raise made from made.__cause__
                self.meter.retries += 1
                logger.warning("%s; tried again in %.2f s", made, pause)
                await asyncio.sleep(pause)
                if self._closed:
                    raise ClosedError(f"{name}: the adapter was closed meanwhile", statement=name)
        except ElizaSQLError as error:
            if unheard and has_new_ids():
                error.retryable = False  # the caller's next call would not find what this one may have made
            if isinstance(error, _OF_BESIDE):
                self._point_out(error)
            raise
        finally:
            for turn in turns:
                turn.pass_on()
            self._leave()

    def _point_out(self, error: ElizaSQLError) -> None:
        """Say with an error that a transaction of the adapter is open around the call, which was not made on it.

        Such a call may wait for what waits for it, and the server cannot tell.
        """
        found = (transaction() for transaction in _around.get())
        if any(each and each.meter is self.meter and not each._closed and not self._is_in(each) for each in found):
            error.args = (
                f"{str(error).rstrip('.')}; the call stands in a transaction of this adapter and is no part of it: "
                "was the adapter meant that transaction() gave?",
            )

    def _is_in(self, transaction: Executor) -> bool:  # noqa: ARG002
        """Tell whether this is a transaction, or a savepoint in it."""
        return False

    def _turn_of(self, key: Hashable) -> _Turn:
        """Give whose turn it is at what a key stands for; it lasts as long as somebody has it or waits for it."""
        turns = self.connections.turns
        turn: _Turn | None = turns.get(key)
        if turn is None:
            turn = turns[key] = _Turn(max(1, min(_AT_A_LOCK, self.lane.max_size // 2)))
        return turn

    def _again(self, made: ElizaSQLError, outcome: Outcome, failures: int, latest: float) -> bool:
        """Decide whether another try makes sense; `latest` is when it would have to begin."""
        if failures >= self._policy.max_retries or time.monotonic() >= latest or self._closed:
            return False
        if isinstance(made, (CircuitOpenError, ClosedError, DeadlineError, PoolTimeoutError)):
            return False
        if outcome is Outcome.EXHAUSTED:
            return made.sqlstate == OUT_OF_MEMORY and failures <= 1
        return outcome is Outcome.NOT_APPLIED

    async def _attempt(
        self, name: str, work: Work, deadline: float, hold: bool, earlier: int | None, *, renewed: bool
    ) -> Any:
        try:
            permit = self._breaker.enter()
            if earlier is not None and self._breaker.state == "closed":
                permit = earlier
        except CircuitOpenError as error:
            error.statement = name
            raise
        connection, used = self.lane.take(), True
        if connection is None:
            try:
                connection, used = await self._acquire(name, deadline, permit)
            except _Failed as failed:
                self._judge(permit, failed)
                raise
            except BaseException:
                self._breaker.leave(permit)
                raise
        self._held.add(connection)
        try:
            try:
                result = await work(connection, deadline)
            except asyncpg.ReadOnlySQLTransactionError as error:
                # One that was made before the call may say what is no longer so: the next try has a new one.
                if renewed or not used:
                    _tell_read_only(error, connection, name)
                raise
        except BaseException as error:
            self._held.discard(connection)
            if isinstance(error, Exception):
                raise self._fail(error, connection, permit, used=used) from error
            self._breaker.leave(permit)
            self.lane.give_back(connection)
            raise
        if not hold:
            self._held.discard(connection)
            self.lane.keep(connection)
        self._breaker.succeed(permit)
        return result

    async def _acquire(self, name: str, deadline: float, permit: int | None) -> tuple[Any, bool]:
        def late(error: Exception) -> None:
            # The call is over and has let go of its permit: all that is left to say is that the server is silent.
            if permit is not None and not is_answer(error, classify(error, sent=False, lost=True)):
                self._breaker.fail(permit)

        began = time.monotonic()
        try:
            found = await self.lane.acquire(_left(deadline), late)
        except PoolTimeoutError as error:
            raise PoolTimeoutError(
                f"{name}: waited {time.monotonic() - began:.3g} s for a connection; all {self.lane.in_use} are in use",
                statement=name,
            ) from error
        except (asyncio.TimeoutError, TimeoutError) as error:
            if time.monotonic() >= deadline:
                raise DeadlineError(f"{name}: no connection within the time limit", statement=name) from error
            made = ConnectionLostError(
                f"{name}: no connection within {self._config.connection_timeout:g} s; the server does not answer",
                statement=name,
            )
            made.__cause__ = error
            raise _Failed(made, Outcome.NOT_APPLIED, None, used=False) from error
        except ElizaSQLError as error:
            error.statement = name
            raise
        except Exception as error:
            outcome, failure = classify(error, sent=False, lost=True), error
            if isinstance(error, OSError) and outcome is Outcome.NOT_APPLIED:
                # The system's word for a server that is not there does not name it, at a socket in a folder not at all.
                failure = ConnectionLostError(f"{name}: no connection to {self._config.where}: {error}", statement=name)
                failure.__cause__ = error
            raise _Failed(failure, outcome, None, used=False) from error
        if self._cut:
            self.lane.keep(found[0])  # others share it
            raise ClosedError(f"{name}: the adapter was closed meanwhile", statement=name)
        return found

    def _fail(self, error: Exception, connection: Any, permit: int, *, used: bool) -> _Failed:
        """Judge a failure after the connection was taken, and let go of it."""
        error = _as_lost(error, connection)
        if isinstance(error, (asyncpg.InternalClientError, *_OUTDATED)):
            self.lane.drop(connection)  # the driver has lost its place in the conversation, or it is of no use any more
        failed = _Failed(error, classify(error, sent=True, lost=not is_open(connection)), connection, used=used)
        if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
            # Too little time, or a dead server? Its answer to the cancellation tells.
            self.lane.give_back(
                connection, lambda answered: (self._breaker.succeed if answered else self._breaker.fail)(permit)
            )
            return failed
        self._judge(permit, failed)
        if isinstance(error, asyncpg.PostgresError) and _is_free(connection):
            self.lane.keep(connection)
        else:
            self.lane.give_back(connection)
        return failed

    def _judge(self, permit: int, failed: _Failed) -> None:
        failed.permit = permit
        if isinstance(failed.error, UnknownOutcomeError):
            self._breaker.leave(permit)  # the tries to settle it have spoken
        elif failed.stale and self._breaker.state == "half_open":
            self._breaker.leave(permit)  # a probe that the server has not heard of: the next try asks it
        elif is_answer(failed.error, failed.outcome):
            self._breaker.succeed(permit)
        else:
            self._breaker.fail(permit)

    def _explain(self, error: Exception, name: str) -> ElizaSQLError:
        """Give the error to raise for one that was met, which is its cause or, of this library, itself."""
        made = translate(error, name)
        if made.statement is None:
            made.statement = name
        if self._is_cut_off() and isinstance(made, ConnectionLostError):
            made = ClosedError(f"{name}: the adapter was closed meanwhile", statement=name)
        if made is not error:
            made.__cause__ = error
        return made

    def _is_cut_off(self) -> bool:
        """Tell whether the adapter is closed: its connections are cut when its calls do not end in time."""
        return self._closed

    def _enter(self, name: str) -> None:
        if self._closed:
            raise ClosedError("the adapter is closed", statement=name)
        self.connections.check()
        self.in_flight += 1

    def _leave(self) -> None:
        self.in_flight -= 1
        if self._closed and not self.in_flight:
            self._drained.set()

    # --- transactions ------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Executor]:
        """Open a transaction: what runs on the executor that it gives is done as a whole or not at all."""
        self._enter("transaction")
        try:

            async def begin(connection: Any, deadline: float) -> Any:
                await self._begin_on(connection, deadline)
                return connection

            connection = await self._attempts("transaction", begin, Outcome.NOT_APPLIED, hold=True)
            inner = _TransactionExecutor(self, connection)
            try:
                with around(inner):
                    yield inner
                await inner.end(self._commit_on)
            except GeneratorExit:
                # Perhaps of a task that nobody held and the garbage collector has ended: nothing more can be awaited.
                inner.refuse()  # the connection goes back, and takes the rest with it
                raise
            except BaseException:
                await inner.undo(self._undo_on)
                raise
            finally:
                self._held.discard(connection)
                if _is_free(connection):
                    self.lane.keep(connection)
                else:
                    self.lane.give_back(connection, first=inner.wait_for_end)
        finally:
            self._leave()

    _commit = SQL["commit_transaction"]
    _undo: tuple[Statement, ...] = (SQL["roll_back_transaction"],)

    async def _begin_on(self, connection: Any, deadline: float) -> None:
        await _send(connection, SQL["begin_transaction"], deadline)

    async def _commit_on(self, connection: Any, deadline: float) -> None:
        """End a transaction; when its end is lost, find out how it ended.

        Raises:
            UnknownOutcomeError: Nobody can tell.
            _EndUnheard: Nor is there time left to ask.
            Exception: What the driver raised; then nothing was kept.
        """
        # The server answers a COMMIT after an error with a ROLLBACK that asyncpg does not report: this look reports it.
        row = await connection.fetchrow(SQL["get_transaction_id"].sql, timeout=_left(deadline))
        try:
            await _send(connection, self._commit, deadline)
        except Exception as error:
            if row["id"] is None:
                raise
            if is_open(connection):
                if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
                    raise _EndUnheard from error
                raise
            self.lane.drop(connection)  # its place is free for the question, with a pool of one connection, too
            status = await self._settle(row["id"], row["timeline"], deadline)
            if status == "committed":
                return
            if status == "aborted":
                raise
            raise UnknownOutcomeError(
                "transaction: the connection was lost at its end; it was kept as a whole or not at all",
                statement="transaction",
            ) from error

    async def _undo_on(self, connection: Any) -> None:
        """Undo a transaction; the error that led here is what the caller gets."""
        if self.connections.inherited:
            return  # it is the parent's, and goes on there
        # Not much beyond the time of the call: a server that is silent undoes it without being told.
        now = time.monotonic()
        left = max(current_deadline(self._config.timeout, self.meter), now + _UNDO_TIME)
        deadline = min(now + self._config.connection_timeout, left)
        try:
            for statement in self._undo:
                await _send(connection, statement, deadline)
        except BaseException as error:
            # Without the connection the server undoes the transaction, whatever state it is in.
            # Without the traceback: that would show the error that led here, with the row that the server refused.
            logger.debug("a rollback failed, the connection is dropped: %r", error)
            self.lane.drop(connection)
            if not isinstance(error, Exception):
                raise

    async def _settle(self, id: str, timeline: str | None, deadline: float) -> str | None:
        """Ask what became of a transaction, until the server knows or the time is over."""
        statement = SQL["get_transaction_status"]

        outside = Executor(self.connections, self.lane, self._config, self.meter)
        status: str | None = None
        while time.monotonic() < deadline:
            try:
                status = await outside.fetch_value(statement, id=id, timeline=timeline)
            except PoolTimeoutError:
                continue  # other calls had every connection: that says nothing, and the time is not over
            except ElizaSQLError:
                logger.warning("what became of a transaction could not be found out", exc_info=True)
                return None
            if status != "in progress":
                return status
            await asyncio.sleep(_SETTLE_PAUSE)
        return None

    # --- the end -----------------------------------------------------------------------------------------------------

    def refuse(self) -> None:
        """Refuse new calls from now on."""
        self._closed = True

    async def drain(self, timeout: float) -> None:
        """Wait for the calls in flight at most `timeout` seconds, once new ones are refused, and cut what is left."""
        if self.in_flight:
            try:
                await wait_for(self._drained.wait(), timeout, "elizasql-drain")
            except (asyncio.TimeoutError, TimeoutError):
                self.cut()

    def cut(self) -> None:
        """Cut the connections of the calls that are running, which end with a ClosedError; so do those that wait."""
        self._cut = True
        for connection in tuple(self._held):
            self.lane.drop(connection)


@contextmanager
def around(transaction: Executor) -> Iterator[None]:
    """Let what runs in the block, and the tasks that it begins, know of the transaction around it."""
    token = _around.set((*_around.get(), weakref.ref(transaction)))
    try:
        yield
    finally:
        with suppress(ValueError):  # whoever leaves it is in another context, such as the garbage collector
            _around.reset(token)


class _TransactionExecutor(Executor):
    """Runs statements on the one connection of a transaction, one after the other; a transaction in it is a savepoint.

    Nothing is tried again in here: what failed is known to the server as part of the whole.
    """

    in_transaction = True

    def __init__(self, outer: Executor, connection: Any) -> None:
        # No partitions are named: their locks would be held while a write needs that of the partitioned table, and an
        # ALTER TABLE takes the two in the other order.
        super().__init__(outer.connections, outer.lane, outer._config, outer.meter)
        self._outer = outer
        self._connection = connection
        self._turn = _Turn()
        self._nested = False
        # Of all savepoints in the transaction, each of which has a name of its own.
        self._numbers: itertools.count[int] = (
            outer._numbers if isinstance(outer, _TransactionExecutor) else itertools.count(1)
        )
        self._cut_short: str | None = None

    async def _attempts(
        self,
        name: str,
        work: Work,
        lost: Outcome,  # noqa: ARG002
        *,
        hold: bool = False,  # noqa: ARG002
        keys: Iterable[Hashable] = (),  # noqa: ARG002
    ) -> Any:
        self._check(name)
        deadline = current_deadline(self._config.timeout, self.meter)
        await self._turn.take(name, deadline)
        try:
            self._check(name)  # it may have ended while this call waited
            try:
                return await work(self._connection, deadline)
            except BaseException as error:
                if not isinstance(error, asyncpg.PostgresError) and is_open(self._connection):
                    self._cut_short = name
                if not isinstance(error, Exception):
                    raise
                if isinstance(error, asyncpg.InternalClientError):
                    self.lane.drop(self._connection)
                if isinstance(error, _OUTDATED):
                    await self.lane.replace()  # the caller may try again: not on this one, nor on one like it
                if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
                    _tell_read_only(error, self._connection, name)
                raise self._explain(_as_lost(error, self._connection), name) from error
        except _OF_BESIDE as error:
            self._point_out(error)
            raise
        finally:
            self._turn.pass_on()

    def _is_in(self, transaction: Executor) -> bool:
        return transaction is self or self._outer._is_in(transaction)

    async def probe(self) -> None:
        """Ask the server for a sign of life, on the transaction's connection."""
        await self.fetch_value(SQL["ping"])

    def _is_cut_off(self) -> bool:
        return self._outer._is_cut_off()  # this one is closed when the transaction is over

    def _check(self, name: str) -> None:
        if self._closed:
            raise ClosedError("the transaction is over", statement=name)
        if self._nested:
            # To wait for the savepoint's end could be to wait for oneself.
            raise TransactionError("a savepoint is open: use the adapter that it gave", statement=name)
        self.connections.check()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Executor]:
        """Open a savepoint; until it ends, nothing else runs on this executor."""
        self._check("transaction")
        deadline = current_deadline(self._config.timeout, self.meter)
        await self._turn.take("transaction", deadline)
        undoing: asyncio.Task[None] | None = None
        try:
            self._check("transaction")
            try:
                await self._begin_on(self._connection, deadline)
            except Exception as error:
                raise self._explain(error, "transaction") from error
            inner = _TransactionExecutor(self, self._connection)
            self._nested = True
            try:
                yield inner
                await inner.end(self._commit_on)
            except GeneratorExit:  # as above
                undoing = spawn(inner.undo(self._undo_on), "elizasql-undo")
                raise
            except BaseException:
                await inner.undo(self._undo_on)
                raise
            finally:
                self._nested = False
        finally:
            if undoing is None:
                self._turn.pass_on()
            else:
                undoing.add_done_callback(lambda _: self._turn.pass_on())

    async def _begin_on(self, connection: Any, deadline: float) -> None:
        number = next(self._numbers)
        self._commit = SQL["release_savepoint"].numbered(number)
        self._undo = (SQL["roll_back_savepoint"].numbered(number), self._commit)
        await _send(connection, SQL["begin_savepoint"].numbered(number), deadline)

    async def _commit_on(self, connection: Any, deadline: float) -> None:
        await _send(connection, self._commit, deadline)

    async def end(self, commit: Callable[[Any, float], Awaitable[None]]) -> None:
        """Keep what was done, once the calls that are running have ended."""
        self._closed = True
        self.connections.check()  # a forked child has no part in its parent's
        # Calls have limits of their own; a savepoint that was left open may never end.
        await self._turn.take("transaction", self._in_time(self._config.timeout))
        deadline = current_deadline(self._config.timeout, self.meter)  # what ran before had its own time
        try:
            try:
                if self._cut_short is not None:
                    # The server may have done it before it heard that nobody waits any more.
                    raise TransactionError(
                        f"transaction: {self._cut_short} was cut short in it, done or not: nothing is kept",
                        statement="transaction",
                    )
                await commit(self._connection, deadline)
            except ElizaSQLError:
                raise
            except _EndUnheard as error:
                self.lane.drop(self._connection)
                raise UnknownOutcomeError(
                    "transaction: the time limit passed at its end; it was kept as a whole or not at all",
                    statement="transaction",
                ) from error
            except Exception as error:
                raise self._explain(error, "transaction") from error
        finally:
            self._turn.pass_on()

    async def undo(self, undo: Callable[[Any], Awaitable[None]]) -> None:
        """Undo what was done, once the calls that are running have ended."""
        self._closed = True
        if self.connections.inherited:
            return
        try:
            await self._turn.take("transaction", self._in_time(_UNDO_TIME))
        except BaseException as error:
            # Who waits is sent away: without the connection the server undoes it, and ends what is running.
            self.lane.drop(self._connection)
            if isinstance(error, DeadlineError):
                return
            raise
        try:
            await undo(self._connection)
        finally:
            self._turn.pass_on()

    async def wait_for_end(self, seconds: float) -> None:
        """Wait until nothing runs on the connection any more, such as the undoing of a savepoint that was left, too.

        Raises:
            DeadlineError: Something still does.
        """
        if not self._nested:  # a savepoint that is open may stay so
            await self._turn.take("transaction", time.monotonic() + seconds)
            self._turn.pass_on()

    def _in_time(self, seconds: float) -> float | None:
        """Give until when to wait for a savepoint that is open; None: there is none."""
        return time.monotonic() + seconds if self._nested else None


class _Turn:
    """Lets so many at a time through, in the order in which they came: a lock, but whoever waits may say how long."""

    def __init__(self, places: int = 1) -> None:
        self._free = places
        self._waiters: OrderedDict[asyncio.Future[bool], None] = OrderedDict()

    async def take(self, name: str, deadline: float | None = None, what: str = "the transaction") -> None:
        """Wait for one's turn; `pass_on` ends it.

        Args:
            name: What errors call the one who waits.
            deadline: Until when, by `time.monotonic`; None: however long it takes.
            what: What errors call what is waited for.

        Raises:
            DeadlineError: It did not come in time; nothing was sent.
        """
        if self._free:
            self._free -= 1
            return
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        self._waiters[waiter] = None
        timer = None if deadline is None else loop.call_later(_left(deadline), _expire, waiter)
        try:
            came = await waiter
        except asyncio.CancelledError:
            # The turn may have come together with the cancellation.
            if waiter.done() and not waiter.cancelled() and waiter.result():
                self.pass_on()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._waiters.pop(waiter, None)
        if not came:
            raise DeadlineError(f"{name}: others had {what} for all of the time limit", statement=name)

    def pass_on(self) -> None:
        """Give the turn to whoever has waited longest."""
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(True)
                return
        self._free += 1


def _expire(waiter: asyncio.Future[bool]) -> None:
    if not waiter.done():
        waiter.set_result(False)


def _as_lost(error: Exception, connection: Any) -> Exception:
    """Give what asyncpg means when a connection is cut between the two steps of a new statement: it falls over None."""
    if not isinstance(error, AttributeError) or is_open(connection):
        return error
    made: Exception = asyncpg.ConnectionDoesNotExistError("the connection was cut")
    made.__cause__ = error
    return made


def _tell_read_only(error: asyncpg.ReadOnlySQLTransactionError, connection: Any, name: str) -> None:
    """Raise what it means that nothing can be written where the server is no standby: a setting is in the way.

    Raises:
        PermissionDeniedError: No wait mends that, as it may for a standby.
    """
    said = connection.get_settings()  # the server tells them by itself, also through a pooler
    default, standby = (getattr(said, key, None) for key in ("default_transaction_read_only", "in_hot_standby"))
    if (default, standby) == ("on", "off"):
        raise PermissionDeniedError(
            f"{name}: {error}: default_transaction_read_only is on for this role or database",
            statement=name,
            sqlstate=error.sqlstate,
        ) from error


def _is_free(connection: Any) -> bool:
    """Tell whether a connection can serve the next call."""
    return is_open(connection) and not connection.is_in_transaction()


def _left(deadline: float) -> float:
    """Give the seconds until then; never zero, which asyncpg would take for none at all."""
    return max(deadline - time.monotonic(), 0.001)


async def _send(connection: Any, statement: Statement, deadline: float) -> None:
    """Begin or end a transaction; as text and without arguments, since such statements cannot be prepared."""
    await connection.execute(statement.sql, timeout=_left(deadline))
