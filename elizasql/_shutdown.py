"""The end of the process: what is open is closed when it comes by SIGTERM or SIGHUP, too.

SIGINT needs nothing here: it unwinds the program as KeyboardInterrupt or a cancellation, and what is left open after
that is closed at interpreter exit. SIGTERM, and SIGHUP when its terminal is closed, end a process on the spot where
nobody handles them: the embedded server would run on. So, from before the first adapter is opened: where the
application has a handler of its own, the shutdown is its business, and nothing is done about it. Where it has none, the
adapters are closed, with a bound on the wait for calls that are running, the embedded servers are released, those that
are being started, too, and then the signal does what it would have done; the same where a handler that came later
passes the signal on to what was there before. A second SIGTERM waits for none of it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Literal

from . import _embedded

if TYPE_CHECKING:
    from .adapter import DatabaseAdapter

# Seconds for calls that are running to end, for an adapter to close, and for the main thread to take the signal.
_DRAIN, _BOUND, _PATIENCE = 5.0, 15.0, 5.0

# Adapters that are open, in all event loops of the process.
opened: set[DatabaseAdapter] = set()

_state: Literal["running", "closing", "closed"] = "running"
_closing: threading.Thread | None = None
_pipe: tuple[int, int] | None = None  # where Python writes the numbers of signals, in a worker of multiprocessing
_sent_again = False  # by ourselves, see _wake
_heard: set[int] = set()  # the numbers of signals that have come

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def install() -> None:
    """Handle what ends the process from now on; in the main thread, and not over what the application has chosen."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _handle)
    _embedded.at_end_of_worker(_end_as_told, priority=100)
    if _embedded.is_worker() and os.name == "posix":
        _watch()


def _watch() -> None:
    """See to it that the handler runs in a worker of multiprocessing, which a pool ends by SIGTERM as a rule.

    There all workers wait for one semaphore. A signal that comes as another one has taken what woke this one finds it
    going to sleep again, without the handler: it would sleep on, and the pool wait for it for ever.
    """
    global _pipe  # noqa: PLW0603
    if _pipe is not None:
        return
    _pipe = told, written = os.pipe()
    os.set_blocking(written, False)
    if (others := signal.set_wakeup_fd(written, warn_on_full_buffer=False)) != -1:
        signal.set_wakeup_fd(others)  # an event loop's, which it wakes
    threading.Thread(target=_wake, args=(told,), name="elizasql-signals", daemon=True).start()


def _wake(told: int) -> None:
    """Send a signal again that the main thread has slept through."""
    global _sent_again  # noqa: PLW0603
    while number := os.read(told, 1):
        if number[0] in _SIGNALS:
            time.sleep(0.1)
            if _state == "running" and signal.getsignal(number[0]) is _handle:
                _sent_again = True
                os.kill(os.getpid(), number[0])


def _handle(number: int, _: FrameType | None) -> None:
    global _state, _closing, _sent_again  # noqa: PLW0603 - a process ends once
    if _state == "running":
        _state = "closing"
        # In a thread: a handler must not wait, and the event loops must go on.
        _closing = threading.Thread(target=_close_all, args=(number,), name="elizasql-shutdown", daemon=True)
        _closing.start()
    elif _state == "closing" and _sent_again:
        _sent_again = False  # it was awake after all
    elif _state == "closed" or (number == signal.SIGTERM and number in _heard):
        # All is closed, or whoever sends SIGTERM twice does not want to wait. SIGHUP says nothing of the kind: of a
        # terminal that is closed both the shell and the system tell, and systemd sends it right behind SIGTERM.
        # The parent sees how the process ended.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    _heard.add(number)


def _close_all(number: int) -> None:
    """Close what is open, each adapter in its own event loop, and end the process."""
    global _state  # noqa: PLW0603
    closing = []
    for adapter in list(opened):
        loop = adapter._connections.loop
        if loop.is_running():
            with contextlib.suppress(RuntimeError):  # it was closed just now
                closing.append(asyncio.run_coroutine_threadsafe(adapter.close(_DRAIN), loop))
    until = time.monotonic() + _BOUND
    for future in closing:
        with contextlib.suppress(Exception):
            future.result(max(until - time.monotonic(), 0.0))
    with contextlib.suppress(Exception):
        asyncio.run(_embedded.end())
    _state = "closed"
    os.kill(os.getpid(), number)
    # The handler runs in the main thread. A signal that comes just before that goes to sleep does not wake it, hence
    # more than one; and it may be stuck in something that cannot be interrupted.
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        time.sleep(0.05)
        os.kill(os.getpid(), number)
    os._exit(128 + number)


@atexit.register
def _end_as_told() -> None:
    """Wait for the signal's end of a program that came to its own meanwhile, as by a `ClosedError`."""
    if _closing is not None:
        _closing.join()


def _forget_in_child() -> None:
    global _state, _closing, _sent_again, _pipe  # noqa: PLW0603
    _state, _closing, _sent_again = "running", None, False
    opened.clear()
    _heard.clear()
    # It has nothing open: until it has, a signal ends it on the spot.
    for number in _SIGNALS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_DFL)
    if _pipe is not None:
        if (others := signal.set_wakeup_fd(-1)) != _pipe[1]:  # else its signals would be told to the parent
            signal.set_wakeup_fd(others)
        for end in _pipe:
            os.close(end)
        _pipe = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
