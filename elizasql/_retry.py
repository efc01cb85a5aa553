"""What a failure means for trying again: one table by SQLSTATE, and the waits between the tries.

===========  ==================================================================  =============================
outcome      what                                                                what is done
===========  ==================================================================  =============================
NOT_APPLIED  no connection; 57P03, 53300, 08001, 08004, 25006; 40001, 40P01,     tried again
             55P03; a cached plan that no longer fits; the driver sends nothing,
             since the server has said goodbye
UNKNOWN      a connection that broke after the statement was sent: 08*, 57P01,   tried again if the statement
             57P02, 57P05, 25P03, 25P04, 40003, OSError, the driver lost its     is repeatable
             place
EXHAUSTED    53*, 58*: memory, disk                                              53200 once more, else raised
PERMANENT    everything else that the server answers; a certificate that is not  raised at once
             trusted
===========  ==================================================================  =============================
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import asyncpg

OUT_OF_MEMORY = "53200"


class Outcome(Enum):
    """Whether what failed may have been done."""

    NOT_APPLIED = "not applied"
    UNKNOWN = "unknown"
    EXHAUSTED = "exhausted"
    PERMANENT = "permanent"


# Five characters first, then the two-character class.
_BY_SQLSTATE = {
    "08001": Outcome.NOT_APPLIED,
    "08004": Outcome.NOT_APPLIED,
    "25006": Outcome.NOT_APPLIED,  # a standby, after a failover: another connection may lead to the primary
    "25P03": Outcome.UNKNOWN,
    "25P04": Outcome.UNKNOWN,
    "40003": Outcome.UNKNOWN,
    "53300": Outcome.NOT_APPLIED,
    "55P03": Outcome.NOT_APPLIED,
    "57P01": Outcome.UNKNOWN,
    "57P02": Outcome.UNKNOWN,
    "57P03": Outcome.NOT_APPLIED,
    "57P05": Outcome.UNKNOWN,
    "08": Outcome.UNKNOWN,
    "40": Outcome.NOT_APPLIED,
    "53": Outcome.EXHAUSTED,
    "58": Outcome.EXHAUSTED,
}

# What asyncpg says before it sends anything: an idle session was told that it ends, as when the server shuts down, and
# its connection is not closed yet. For some milliseconds all that it is asked fails so.
_NOT_SENT = "cannot switch to state"

# The server is well, and somebody else was quicker: the wait is a hundredth of the one for a server that is down.
_CONFLICTS = frozenset({"40001", "40P01", "55P03"})
_CONFLICT_SHARE = 0.01


def classify(error: BaseException, *, sent: bool, lost: bool) -> Outcome:
    """Say what a failure means.

    Args:
        error: What asyncpg, asyncio or the operating system raised.
        sent: Whether the statement may have reached the server.
        lost: Whether the connection is gone.
    """
    if isinstance(error, asyncpg.InvalidCachedStatementError):
        return Outcome.NOT_APPLIED
    if isinstance(error, asyncpg.InternalClientError) and str(error).startswith(_NOT_SENT):
        return Outcome.NOT_APPLIED
    if isinstance(error, asyncpg.PostgresError):
        sqlstate = error.sqlstate or ""
        outcome = _BY_SQLSTATE.get(sqlstate) or _BY_SQLSTATE.get(sqlstate[:2], Outcome.PERMANENT)
    elif isinstance(
        error,
        (asyncpg.ClientConfigurationError, asyncpg.UnsupportedClientFeatureError, ssl.SSLCertVerificationError),
    ):
        outcome = Outcome.PERMANENT
    elif isinstance(
        error, (OSError, asyncio.TimeoutError, asyncpg.InternalClientError, asyncpg.OutdatedSchemaCacheError)
    ):
        outcome = Outcome.UNKNOWN
    elif isinstance(error, asyncpg.InterfaceError):
        outcome = Outcome.UNKNOWN if lost else Outcome.PERMANENT
    else:
        outcome = Outcome.PERMANENT
    return Outcome.NOT_APPLIED if outcome is Outcome.UNKNOWN and not sent else outcome


def is_conflict(error: BaseException) -> bool:
    """Tell whether another transaction was in the way: the server is well."""
    return isinstance(error, asyncpg.PostgresError) and error.sqlstate in _CONFLICTS


def is_answer(error: BaseException, outcome: Outcome) -> bool:
    """Tell whether a failure is a healthy server's answer, which speaks for it."""
    return (
        outcome is Outcome.PERMANENT
        or is_conflict(error)
        or isinstance(error, (asyncpg.InvalidCachedStatementError, asyncpg.ReadOnlySQLTransactionError))
    )


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a call is tried, and the waits in between; the names are the original's, the unit is seconds.

    Attributes:
        max_retries: Tries in all, the first included, as in the original; 1: none is made again.
        base_delay: Before the second try; doubles with every further one.
        max_delay: Longest, without the jitter.
        jitter_max: At most so much more, by chance: callers that failed together do not come back together.
    """

    max_retries: int = 3
    base_delay: float = 1.0
    max_delay: float = 10.0
    jitter_max: float = 1.0

    def delay(self, failed: int, error: BaseException, random: Callable[[], float]) -> float:
        """Give the seconds to wait after `failed` tries have failed, the last one with `error`."""
        # The exponent is bounded: 2.0 ** 1024 is an error.
        delay = min(self.base_delay * 2.0 ** min(failed - 1, 64), self.max_delay) + random() * self.jitter_max
        return delay * _CONFLICT_SHARE if is_conflict(error) else delay
