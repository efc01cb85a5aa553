"""What every public method has in common: a time limit for the whole of it, and figures about it.

`_bounded` is put on each public coroutine method when its class is made (`Store.__init_subclass__`). A method that
another one calls belongs to that call: it has its limit, and is not counted. One that is given a limit, or is another
adapter's, was called by the caller's code inside, such as the source of a load: it has its own, too, and is counted.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from .errors import ArgumentError, show

logger = logging.getLogger("elizasql")

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_UNBOUNDED = "__elizasql_unbounded__"
_LIMIT = "__elizasql_limit__"


class _Call:
    """A call that is running.

    A timer or a task of the caller's code that is begun meanwhile may keep this for long after the call, and is no part
    of it any more: so it knows whether the call is over, and does not hold the adapter.

    Attributes:
        deadline: When it must have ended, by `time.monotonic`.
        meter: Of its adapter, None: of any.
        over: Whether it has ended.
        new_ids: Whether it has made ids: the same call, made again, makes others.
    """

    __slots__ = ("deadline", "meter", "new_ids", "over")

    def __init__(self, deadline: float, meter: Meter | None) -> None:
        self.deadline = deadline
        self.meter = meter
        self.over = False
        self.new_ids = False


_running: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("elizasql_running", default=None)


def _current_call() -> _Call | None:
    call = _running.get()
    return None if call is None or call.over else call


def current_deadline(default: float, meter: Meter | None = None) -> float:
    """Give the end of the running call's time, by `time.monotonic`; outside of a call, `default` seconds from now.

    Args:
        default: Seconds.
        meter: Of the adapter that asks: inside of a call of another one both hold.
    """
    running = _current_call()
    if running is None:
        return time.monotonic() + default
    if meter is None or running.meter is None or running.meter is meter:
        return running.deadline
    return min(running.deadline, time.monotonic() + default)


def count_replaced_text() -> None:
    """Count a text of which a part cannot be stored, for the adapter whose method it was given to."""
    running = _current_call()
    if running is not None and running.meter is not None:
        running.meter.replaced_texts += 1


def note_new_id() -> None:
    """Take note that the running call has made an id."""
    running = _current_call()
    if running is not None:
        running.new_ids = True


def has_new_ids() -> bool:
    """Tell whether the running call has made ids."""
    running = _current_call()
    return running is not None and running.new_ids


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Give what runs in the block so many seconds, and never more than the running call has left."""
    outer = _current_call()
    deadline = time.monotonic() + seconds
    call = _Call(deadline, None) if outer is None else _Call(min(outer.deadline, deadline), outer.meter)
    call.new_ids = outer is not None and outer.new_ids
    token = _running.set(call)
    try:
        yield
    finally:
        _running.reset(token)
        call.over = True


def unbounded(method: F) -> F:
    """Mark a public coroutine method that has no limit of its own: it runs what the caller gives it, or for ever."""
    setattr(method, _UNBOUNDED, True)
    return method


def lasting(seconds: float) -> Callable[[F], F]:
    """Give a public coroutine method another limit than `config.timeout`, where none is given: its work takes long."""

    def mark(method: F) -> F:
        setattr(method, _LIMIT, seconds)
        return method

    return mark


def spawn(coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Start a task that does not belong to the call that starts it: the call's time limit is not the task's."""
    return contextvars.Context().run(asyncio.get_running_loop().create_task, coroutine, name=name)


async def end(task: asyncio.Future[Any]) -> None:
    """Cancel a task that has not ended, and wait for it; what it met is told already, or nobody misses it."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


async def see_through(future: asyncio.Future[T]) -> T:
    """Give what a thread's work gives; when cancelled, wait for its end all the same: it uses what we will drop.

    Args:
        future: Of `run_in_executor`. No task: those are cancelled, and so over, when Ctrl-C comes up in the event loop.
    """
    try:
        return await asyncio.shield(future)
    except BaseException:
        while not future.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        future.exception()  # nobody else will ask for it
        raise


async def wait_for(coroutine: Coroutine[Any, Any, T], seconds: float, name: str) -> T:
    """Give what a coroutine gives, which is cancelled when it takes longer, or when the caller is.

    In place of `asyncio.wait_for`, which before Python 3.12 swallows a cancellation that comes with the result.

    Args:
        coroutine: Runs in a task of its own.
        seconds: How long at most.
        name: Of the task.

    Raises:
        asyncio.TimeoutError: It took longer, and has ended since.
        Exception: What it raised.
    """
    task = spawn(coroutine, name)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        task.cancel()
    await asyncio.wait({task})
    if task.cancelled():
        raise asyncio.TimeoutError
    return task.result()


def bound_methods(kind: type) -> None:
    """Put `_bounded` on the public coroutine methods that a class defines.

    Raises:
        TypeError: One of them takes no `timeout`.
    """
    for name, method in list(vars(kind).items()):
        if name.startswith("_") or not inspect.iscoroutinefunction(method) or hasattr(method, _UNBOUNDED):
            continue
        parameter = inspect.signature(method).parameters.get("timeout")
        if parameter is None or parameter.kind is not parameter.KEYWORD_ONLY:
            raise TypeError(f"{kind.__name__}.{name} must take timeout, keyword-only")
        setattr(kind, name, _bounded(method))


def _bounded(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    name = method.__name__
    own_limit: float | None = getattr(method, _LIMIT, None)
    clock = time.monotonic

    @functools.wraps(method)
    async def call(self: Any, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        meter = self._meter
        outer = _current_call()
        if outer is not None and timeout is None and outer.meter is meter:
            return await method(self, *args, **kwargs)
        limit = as_timeout(timeout) if timeout is not None else own_limit or self.config.timeout
        started = clock()
        deadline = started + limit
        running = _Call(deadline if outer is None else min(deadline, outer.deadline), meter)
        token = _running.set(running)
        failed: BaseException | None = None
        try:
            return await method(self, *args, **kwargs)
        except BaseException as error:
            failed = error
            raise
        finally:
            _running.reset(token)
            running.over = True
            meter.record(name, started, clock() - started, failed, may_last=own_limit is not None)

    return call


def as_timeout(value: object, *, least: float = math.ulp(0.0)) -> float:
    """Check that an argument is a number of seconds, at least `least`; left out, above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1e9:
        raise ArgumentError(f"timeout must be a number of seconds{' above 0' if least else ''}, not {show(value, 40)}")
    return float(value)


# Eight buckets for each doubling, from one microsecond: a figure is off by at most 5 %.
_PER_DOUBLING = 8
_BUCKETS = 36 * _PER_DOUBLING


class _Method:
    """Figures of one method."""

    __slots__ = ("buckets", "count", "errors", "longest", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * _BUCKETS
        self.count = 0
        self.errors: dict[str, int] = {}
        self.seconds = 0.0
        self.longest = 0.0

    def quantile(self, share: float) -> float:
        """Give the seconds within which this share of the calls ended."""
        left = share * self.count
        for position, count in enumerate(self.buckets):
            left -= count
            if left <= 0:
                return min(float(2 ** ((position + 0.5) / _PER_DOUBLING)) * 1e-6, self.longest)
        return self.longest


class Meter:
    """Counts the calls of one adapter: how many, how long, how they failed. Costs about a microsecond a call.

    Attributes:
        retries: Tries that were made again, of all methods.
        replaced_texts: Texts of which a part cannot be stored, and was replaced.
    """

    def __init__(
        self, slow_call: float, observe: Callable[[str, float, float, BaseException | None], None] | None
    ) -> None:
        self._slow_call = slow_call
        self._observe = observe
        self._methods: dict[str, _Method] = {}
        self.retries = 0
        self.replaced_texts = 0

    def record(
        self, name: str, started: float, seconds: float, error: BaseException | None, *, may_last: bool = False
    ) -> None:
        """Count one call that has ended.

        Args:
            name: The method.
            started: When it began, by `time.monotonic`.
            seconds: How long it took.
            error: What it raised, None when it went well.
            may_last: Its work takes long: it is never slow.
        """
        method = self._methods.get(name)
        if method is None:
            method = self._methods[name] = _Method()
        method.count += 1
        method.seconds += seconds
        method.longest = max(method.longest, seconds)
        position = int(math.log2(seconds * 1e6 + 1.0) * _PER_DOUBLING)
        method.buckets[position if position < _BUCKETS else _BUCKETS - 1] += 1
        if error is not None:
            kind = type(error).__name__
            method.errors[kind] = method.errors.get(kind, 0) + 1
        if seconds >= self._slow_call and not may_last:
            logger.warning("%s took %.3f s%s", name, seconds, "" if error is None else f" ({type(error).__name__})")
        if self._observe is not None:
            try:
                self._observe(name, started, seconds, error)
            except Exception:  # of the application's SDK: the call has its own result
                logger.warning("%s could not be recorded", name, exc_info=True)

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Give for each method that was called: count, errors by type, mean, p50, p95, p99 and longest, in seconds."""
        return {
            name: {
                "count": method.count,
                "errors": dict(method.errors),
                "mean": method.seconds / method.count,
                "p50": method.quantile(0.50),
                "p95": method.quantile(0.95),
                "p99": method.quantile(0.99),
                "longest": method.longest,
            }
            for name, method in sorted(self._methods.items())
        }
