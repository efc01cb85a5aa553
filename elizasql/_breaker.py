"""The circuit breaker: when the server is down, calls fail at once instead of queueing up to wait for it.

Closed: calls go through; `failure_threshold` failures in a row open it. Open: calls are refused for `reset_timeout`
seconds. Half-open: at most `half_open_max_attempts` calls at a time go through as probes; as many successes close it,
one failure opens it again.

Failures of calls that ran at the same time count once: when one backend crashes, the server cuts every connection, and
twenty calls that end together are one event, not four times the threshold. Nor are they when they try again, one after
the other: the wait before a try belongs to it. Whoever began after a failure was counted knew of it, and counts again.

No transition awaits anything: in one event loop each is atomic.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from .errors import CircuitOpenError

State = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """One per server.

    Attributes:
        state: "closed", "open" or "half_open".
        failures: Counted since the last success.
        opened: How often it has opened.
        era: Moves on with every transition and with every failure that counts. What a call reports under an older
            number is about a time that is over.
    """

    def __init__(
        self,
        *,
        failure_threshold: int = 5,
        reset_timeout: float = 60.0,
        half_open_max_attempts: int = 3,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._threshold = failure_threshold
        self._reset_timeout = reset_timeout
        self._probes = half_open_max_attempts
        self._clock = clock
        self._opened_at = 0.0
        self._in_flight = 0
        self._successes = 0
        self.state: State = "closed"
        self.failures: int = 0
        self.opened: int = 0
        self.era: int = 0

    @property
    def retry_after(self) -> float:
        """Seconds until calls are let through again; 0 when they are."""
        if self.state != "open":
            return 0.0
        return max(0.0, self._opened_at + self._reset_timeout - self._clock())

    def _refuse(self, retry_after: float) -> CircuitOpenError:
        error = CircuitOpenError(f"the server failed too often: calls are refused for another {retry_after:.1f} s")
        error.retry_after = retry_after
        return error

    def enter(self) -> int:
        """Let a call through, or not; what it gives goes to `succeed`, `fail` or `leave`, exactly once.

        Raises:
            CircuitOpenError: The circuit is open, or half-open with all its probes under way.
        """
        if self.state == "closed":
            return self.era
        if self.state == "open":
            remaining = self.retry_after
            if remaining > 0:
                raise self._refuse(remaining)
            self._move("half_open")
        if self._in_flight >= self._probes:
            raise self._refuse(0.0)
        self._in_flight += 1
        return self.era

    def succeed(self, permit: int) -> None:
        """Say that the server answered: with a result, or with an error that is about the call."""
        if self.state == "closed":
            self.failures = 0
        elif self.state == "half_open" and permit == self.era:
            self._in_flight -= 1
            self._successes += 1
            if self._successes >= self._probes:
                self._move("closed")

    def fail(self, permit: int) -> None:
        """Say that the server did not answer, or could not serve anybody."""
        if permit != self.era or self.state == "open":
            return
        self.failures += 1
        self.era += 1
        if self.state == "half_open" or self.failures >= self._threshold:
            self._opened_at = self._clock()
            self.opened += 1
            self._move("open")

    def leave(self, permit: int) -> None:
        """Say nothing about the server: the call was cancelled, or never reached it."""
        if self.state == "half_open" and permit == self.era:
            self._in_flight -= 1

    def _move(self, state: State) -> None:
        self.state = state
        self.era += 1
        self._in_flight = 0
        self._successes = 0
        if state == "closed":
            self.failures = 0
