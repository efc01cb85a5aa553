"""The same face for blocking code: `with elizasql.sync.connect(agent_id=AGENT) as db: db.create_memory(...)`.

Every method of `elizasql.DatabaseAdapter` is here under its own name, with the same arguments, results and errors. An
adapter has a thread of its own with an event loop in it; any number of threads may call one adapter at once.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import inspect
import os
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from uuid import UUID

from . import _codecs, _embedded, _shutdown
from . import adapter as _asynchronous
from ._executor import around
from .config import Config, Settings
from .errors import ArgumentError, ClosedError, ElizaSQLError, WrongLoopError

__all__ = ["DatabaseAdapter", "connect", "open"]

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack

T = TypeVar("T")

# Seconds in which a call that was interrupted ends.
_PATIENCE = 5.0


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        # Reentrant: the garbage collector may close an iterator wherever a thread is.
        self._lock = threading.RLock()
        self._stopped = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="elizasql-sync", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self._complete(self._ended)
            # Whoever waits for a call that came in at the last moment must not wait for ever.
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            if left:
                self._complete(asyncio.gather(*left, return_exceptions=True))
            # Opened when an interrupt came: nobody has it.
            for adapter in [each for each in tuple(_shutdown.opened) if each._connections.loop is self._loop]:
                with suppress(ElizaSQLError):
                    self._complete(adapter.close())
            # Results that are there already have yet to be handed to the threads that wait for them.
            self._complete(asyncio.sleep(0))
        finally:
            self._loop.close()

    def _complete(self, work: Coroutine[Any, Any, Any] | asyncio.Future[Any]) -> None:
        """Run the loop until this has ended, whatever the caller's code in it raises.

        A task that a SystemExit or KeyboardInterrupt ends passes it to whoever waits for it, and to the loop, which
        stops: it has to go on for the others, and to tell the one.
        """
        future = asyncio.ensure_future(work, loop=self._loop)
        while not future.done():
            with suppress(SystemExit, KeyboardInterrupt):
                self._loop.run_until_complete(future)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for it; an interrupt of the waiting thread cancels it.

        What was interrupted is over then, unless it blocks the loop, or a second interrupt comes. Where it ended in the
        very moment, what it gave is lost.
        """
        if self._pid != os.getpid():
            # The thread stayed in the parent: nobody would ever answer, and its lock may be taken for ever.
            coroutine.close()
            raise WrongLoopError("the adapter was opened before a fork: open one in this process")
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise ArgumentError("a blocking call inside the adapter's own event loop would wait for itself")
        future: Future[T] | None = None
        try:
            future = self._submit(coroutine)
            return future.result()
        except CancelledError:
            raise ClosedError("the adapter was closed while the call ran") from None
        except BaseException:
            # An interrupt; also one that came while the coroutine was handed over, and may or may not have been.
            if future is None or not future.done():
                with suppress(ClosedError):
                    wait([self._submit(_end(coroutine))], _PATIENCE)
            raise

    def leave(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """End what calls have begun by running a coroutine, from anywhere: the garbage collector takes any thread.

        The loop's own does not wait for it. No error of the library comes of it: the caller gets the one that led here.
        """
        if threading.current_thread() is self._thread:
            asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        else:
            with suppress(ElizaSQLError):
                self.run(coroutine)

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if self._stopped:
                coroutine.close()
                raise ClosedError("the adapter is closed")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """End the thread and close the loop. Idempotent; a forked child has neither."""
        if self._pid != os.getpid():
            return
        with self._lock:
            if not self._stopped:
                self._stopped = True
                self._loop.call_soon_threadsafe(self._ended.set_result, None)
        self._thread.join()


async def _end(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Cancel what runs a coroutine in this loop, and wait until it has ended; one that has not begun never will."""
    running = [task for task in asyncio.all_tasks() if task.get_coro() is coroutine]
    for task in running:
        task.cancel()
        await asyncio.wait([task])
    coroutine.close()


class DatabaseAdapter:
    """An agent's memory, blocking. Made by `connect` or `open`."""

    def __init__(self, loop: _Loop, adapter: _asynchronous.DatabaseAdapter) -> None:
        self._loop = loop
        self._adapter = adapter

    def __repr__(self) -> str:
        return repr(self._adapter)

    @property
    def agent_id(self) -> UUID:
        """The agent whose rows are read and written."""
        return self._adapter.agent_id

    @property
    def config(self) -> Config:
        """The settings in force."""
        return self._adapter.config

    def is_ready(self, *, timeout: float | None = None) -> bool:
        """Tell whether the server answers, by one try; False, too, after `close` and in a forked child."""
        try:
            return self._loop.run(self._adapter.is_ready(timeout=timeout))
        except ClosedError:
            return False

    def health(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Tell how the server and the connections to it are; raises as little as the asynchronous one."""
        try:
            return self._loop.run(self._adapter.health(timeout=timeout))
        except ClosedError as failure:
            return self._adapter._tell_health(failure)

    @contextmanager
    def transaction(self) -> Iterator[DatabaseAdapter]:
        """Open a transaction: every method of what it gives runs in it; see the asynchronous one."""
        context = self._adapter.transaction()
        entered = False
        try:
            bound = self._loop.run(context.__aenter__())
            entered = True
            with around(bound._executor):  # in the caller's thread, from where calls take it along
                yield DatabaseAdapter(self._loop, bound)
        except BaseException as error:
            if entered and isinstance(error, Exception):
                self._loop.leave(context.__aexit__(type(error), error, error.__traceback__))
            else:
                # It may have begun when an interrupt came, and lasts as long as the traceback that holds it.
                self._loop.leave(_leave(context.gen))
            raise
        else:
            self._loop.run(context.__aexit__(None, None, None))

    def with_entity_context(self, entity_id: UUID | str | None, callback: Callable[[DatabaseAdapter], T]) -> T:
        """Run `callback(tx)` in a transaction on behalf of an entity, and give what it gives."""
        _codecs.as_optional_id(entity_id, "entity_id")
        _codecs.check_callable(callback, "callback")
        with self.transaction() as bound:
            return callback(bound)

    def close(self, timeout: float = 10.0) -> None:
        """Close the adapter and end its thread. Idempotent."""
        try:
            self._loop.run(self._adapter.close(timeout))
        except ArgumentError:
            raise  # in a transaction, or on the loop's own thread: nothing was closed
        except ClosedError:
            self._stop()
        except BaseException:
            self._stop()
            raise
        else:
            self._stop()

    def _stop(self) -> None:
        self._loop.stop()
        _opened.discard(self)


_opened: set[DatabaseAdapter] = set()


@atexit.register
def _close_all() -> None:
    """Close what was left open: afterwards the loops stand still, and whoever asks them for something would hang."""
    for adapter in list(_opened):
        with suppress(ElizaSQLError):
            adapter.close(timeout=1.0)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_opened.clear)


_END: Any = object()


async def _next(items: AsyncIterator[Any]) -> Any:
    return await anext(items, _END)


async def _leave(items: AsyncGenerator[Any, None]) -> None:
    # A coroutine, not what `aclose` gives: that one enters the generator even where it is thrown away unused.
    await items.aclose()


def _blocking(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(method):

        @functools.wraps(method)
        def iterate(self: DatabaseAdapter, *args: Any, **kwargs: Any) -> Iterator[Any]:
            items = getattr(self._adapter, name)(*args, **kwargs)
            try:
                while (item := self._loop.run(_next(items))) is not _END:
                    yield item
            except BaseException:  # left early, else it has ended by itself
                self._loop.leave(_leave(items))
                raise

        return iterate

    @functools.wraps(method)
    def call(self: DatabaseAdapter, *args: Any, **kwargs: Any) -> Any:
        return self._loop.run(getattr(self._adapter, name)(*args, **kwargs))

    return call


for _name, _method in inspect.getmembers(_asynchronous.DatabaseAdapter, inspect.isfunction):
    if not _name.startswith("_") and not hasattr(DatabaseAdapter, _name):
        setattr(DatabaseAdapter, _name, _blocking(_name, _method))


def open(  # noqa: A001
    *,
    agent_id: UUID | str,
    dsn: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    **settings: Unpack[Settings],
) -> DatabaseAdapter:
    """Open an agent's memory for blocking code; `close()` when done. Takes and raises what `elizasql.open` does."""
    if Config.load(dsn=dsn, data_dir=data_dir, **settings).handle_signals:
        _shutdown.install()  # only the main thread can, and the adapter is opened in another one
    loop = _Loop()
    try:
        opened = loop.run(_asynchronous.open(agent_id=agent_id, dsn=dsn, data_dir=data_dir, **settings))
        adapter = DatabaseAdapter(loop, opened)
        _opened.add(adapter)
        _embedded.at_end_of_worker(_close_all, priority=1)  # before the server goes
    except BaseException:  # an interrupt, too: until the caller has the adapter nobody else could close it
        loop.stop()
        raise
    else:
        return adapter


@contextmanager
def connect(
    *,
    agent_id: UUID | str,
    dsn: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    **settings: Unpack[Settings],
) -> Iterator[DatabaseAdapter]:
    """Open an agent's memory for the time of a `with` block."""
    adapter = open(agent_id=agent_id, dsn=dsn, data_dir=data_dir, **settings)
    try:
        yield adapter
    finally:
        adapter.close()
