"""What each failure means, and the waits between the tries."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elizasql._retry import Outcome, RetryPolicy, classify, is_answer, is_conflict

NOT_APPLIED, UNKNOWN, EXHAUSTED, PERMANENT = Outcome


def server_error(sqlstate: str) -> asyncpg.PostgresError:
    error = asyncpg.PostgresError("it went wrong")
    error.sqlstate = sqlstate
    return error


@pytest.mark.parametrize(
    ("sqlstate", "outcome", "answer"),
    [
        *((state, NOT_APPLIED, False) for state in ("57P03", "53300", "08001", "08004")),
        *((state, NOT_APPLIED, True) for state in ("40001", "40P01", "55P03")),
        *((state, UNKNOWN, False) for state in ("08000", "08003", "08006", "08007", "08P01", "40003")),
        *((state, UNKNOWN, False) for state in ("57P01", "57P02", "57P05", "25P03", "25P04")),
        *((state, EXHAUSTED, False) for state in ("53000", "53100", "53200", "58000", "58030")),
        *(
            (state, PERMANENT, True)
            for state in ("22000", "22021", "22P02", "21000", "23502", "23503", "23505", "23514")
        ),
        *(
            (state, PERMANENT, True)
            for state in ("28000", "28P01", "3D000", "3F000", "42501", "42703", "42P01", "54001")
        ),
        *((state, PERMANENT, True) for state in ("0A000", "57014", "P0001", "P0002", "XX000", "25P02")),
    ],
)
def test_sqlstates(sqlstate: str, outcome: Outcome, answer: bool) -> None:
    error = server_error(sqlstate)
    assert classify(error, sent=True, lost=False) is outcome
    assert is_answer(error, outcome) is answer
    # What never reached the server has no unknown outcome.
    assert classify(error, sent=False, lost=True) is (NOT_APPLIED if outcome is UNKNOWN else outcome)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        FileNotFoundError(),
        ConnectionResetError(),
        BrokenPipeError(),
        socket.gaierror(),
        asyncio.TimeoutError(),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        asyncpg.InternalClientError("unknown error in protocol implementation"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_broken_connection(error: Exception) -> None:
    assert classify(error, sent=False, lost=True) is NOT_APPLIED
    assert classify(error, sent=True, lost=True) is UNKNOWN
    assert not is_answer(error, UNKNOWN)


def test_what_the_driver_did_not_send_was_not_done() -> None:
    error = asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")
    assert classify(error, sent=True, lost=True) is NOT_APPLIED
    assert not is_answer(error, NOT_APPLIED)


def test_what_the_driver_refuses_by_itself_is_permanent() -> None:
    assert classify(asyncpg.InterfaceError("the server expects 2 arguments"), sent=True, lost=False) is PERMANENT
    assert classify(asyncpg.ClientConfigurationError("sslmode"), sent=False, lost=True) is PERMANENT
    assert classify(ssl.SSLCertVerificationError(1, "not trusted"), sent=False, lost=True) is PERMANENT
    assert classify(TypeError("expected str"), sent=True, lost=False) is PERMANENT
    assert classify(TypeError("expected str"), sent=False, lost=True) is PERMANENT
    assert classify(asyncpg.DataError("invalid input for query argument"), sent=True, lost=False) is PERMANENT


def test_a_plan_that_no_longer_fits_was_not_run() -> None:
    error = asyncpg.InvalidCachedStatementError("cached statement plan is invalid")
    assert classify(error, sent=True, lost=False) is NOT_APPLIED
    assert is_answer(error, NOT_APPLIED)


def test_a_standby_answers_but_another_connection_may_lead_to_the_primary() -> None:
    error = asyncpg.ReadOnlySQLTransactionError("cannot execute INSERT in a read-only transaction")
    assert classify(error, sent=True, lost=False) is NOT_APPLIED
    assert is_answer(error, NOT_APPLIED)


def test_waits_are_those_of_the_original() -> None:
    policy = RetryPolicy()
    error = ConnectionRefusedError()
    assert [policy.delay(failed, error, lambda: 0.0) for failed in range(1, 7)] == [1, 2, 4, 8, 10, 10]
    assert [policy.delay(failed, error, lambda: 1.0) for failed in range(1, 7)] == [2, 3, 5, 9, 11, 11]


@given(
    failed=st.integers(1, 10_000),
    base=st.floats(0, 1e6),
    longest=st.floats(0, 1e6),
    jitter=st.floats(0, 1e6),
    seed=st.integers(),
)
def test_waits_stay_within_their_bounds(failed: int, base: float, longest: float, jitter: float, seed: int) -> None:
    policy = RetryPolicy(3, base, longest, jitter)
    delay = policy.delay(failed, OSError(), random.Random(seed).random)
    assert 0 <= delay <= longest + jitter
    assert delay >= min(base, longest)


def test_a_conflict_waits_for_milliseconds() -> None:
    """The server is well: another transaction was quicker."""
    for sqlstate in ("40001", "40P01", "55P03"):
        error = server_error(sqlstate)
        assert is_conflict(error)
        assert 0.01 <= RetryPolicy().delay(1, error, random.Random(1).random) <= 0.02
