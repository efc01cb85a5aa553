"""A clock that stands still while the process may not run, for what must be over in time on whatever machine."""

from __future__ import annotations

import functools
import threading
import time

_TICK = 0.05

# What one tick counts for at most. A machine that stalls, or has no processor for the tests, lets whole seconds pass
# from one to the next; an event loop that is blocked does not, since the ticks come from a thread of their own.
_MOST = 0.2


class RunningClock:
    """Counts seconds in which the process could run."""

    def __init__(self) -> None:
        self._counted = 0.0
        self._ticked_at = time.monotonic()
        self._lock = threading.Lock()
        threading.Thread(target=self._tick, name="running-clock", daemon=True).start()

    def now(self) -> float:
        """Give seconds since some moment, as `time.monotonic` does."""
        with self._lock:
            at = time.monotonic()
            self._counted += min(at - self._ticked_at, _MOST)
            self._ticked_at = at
            return self._counted

    def _tick(self) -> None:
        while True:
            time.sleep(_TICK)
            self.now()


@functools.cache
def _clock() -> RunningClock:
    return RunningClock()


def running_time() -> float:
    """Give seconds in which this process could run, since some moment."""
    return _clock().now()
