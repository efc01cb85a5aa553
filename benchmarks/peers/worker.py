"""The process of one peer: reads requests from the driver, one JSON object a line, and answers each with one line.

Requests: open, load, index, catch_up, search, insert_one, insert_many, mixed, knob, close. An answer has what was asked
for, or `error`. Standard output belongs to the protocol; what a library prints goes to standard error.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import queue
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from .base import POOL, Knob, Peer, Place, Rows, row_of

T = TypeVar("T")


class Worker:
    """Carries out requests with one peer.

    Args:
        kind: `module:class` of the peer, in this package.
        option: What the class is to do in particular.
    """

    def __init__(self, kind: str, option: str) -> None:
        module, _, name = kind.partition(":")
        self._class: type[Peer] = getattr(import_module(f".{module}", __package__), name)
        self._option = option
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        answer = function(*arguments)
        return self._loop.run_until_complete(answer) if isinstance(answer, Coroutine) else answer

    def open(self, place: dict[str, Any], folder: str, width: int) -> dict[str, Any]:
        """Connect."""
        place.pop("folder", None)
        self.peer = self._class(Place(**place), Rows(Path(folder), width), self._option)
        self._call(self.peer.open)
        return {"versions": self.peer.versions(), "python": sys.version.split()[0]}

    def knob(self, ef_search: int | None, iterative: str | None) -> dict[str, Any]:
        """Set how widely HNSW searches. New connections, so that what was set for the database holds."""
        self._call(self.peer.close)
        self.peer.knob = Knob(ef_search, iterative)
        self._call(self.peer.open)
        return {}

    def load(self, first: int, last: int) -> dict[str, Any]:
        """Store many rows, without the index where the peer builds it later."""
        begun = time.perf_counter()
        self._call(self.peer.load, range(first, last))
        return {"seconds": time.perf_counter() - begun, "by_itself": self.peer.loads_itself}

    def index(self) -> dict[str, Any]:
        """Build the index."""
        begun = time.perf_counter()
        self._call(self.peer.index)
        return {"seconds": time.perf_counter() - begun}

    def catch_up(self) -> dict[str, Any]:
        """Bring what was stored since into the index."""
        begun = time.perf_counter()
        moved = self._call(self.peer.catch_up)
        return {"seconds": time.perf_counter() - begun, "moved": moved}

    def search(self, asked: list[tuple[int, int]], warmup: int, room: bool = False) -> dict[str, Any]:
        """Search one after the other: [query, agent] each; the first `warmup` ones are not counted."""
        ready = [(self.peer.question(query), agent) for query, agent in asked]
        seconds, answers = self._timed(self.peer.search_room if room else self.peer.search, ready)
        found = [[row_of(id) for id in self.peer.found(answer)] for answer in answers]
        return {"seconds": seconds[warmup:], "found": found[warmup:]}

    def insert_one(self, rows: list[int]) -> dict[str, Any]:
        """Store rows one by one."""
        ready = [(self.peer.prepare(row),) for row in rows]
        return {"seconds": self._timed(self.peer.insert_one, ready)[0]}

    def insert_many(self, first: int, last: int) -> dict[str, Any]:
        """Store the rows of one agent together."""
        ready = self.peer.prepare_many(range(first, last))
        gc.collect()
        begun = time.perf_counter()
        self._call(self.peer.insert_many, ready)
        return {"seconds": time.perf_counter() - begun}

    def mixed(self, asked: list[tuple[int, int]], rows: list[int], callers: int) -> dict[str, Any]:
        """Search and store with several callers at once, each with its share of the work, in random order.

        Before the clock starts they search a few times for each connection, so that these are there.
        """
        work: list[tuple[bool, tuple[Any, ...]]] = [
            (True, (self.peer.question(query), agent)) for query, agent in asked
        ]
        before = [work[number % len(work)] for number in range(min(callers, POOL) * 4)]
        work += [(False, (self.peer.prepare(row),)) for row in rows]
        random.Random(1).shuffle(work)
        gc.collect()
        at_once = self._at_once_async if self.peer.asynchronous else self._at_once_in_threads
        at_once(before, callers)
        begun = time.perf_counter()
        searches, inserts, answers = at_once(work, callers)
        total = time.perf_counter() - begun
        fewest = min((len(self.peer.found(answer)) for answer in answers), default=None)
        return {"total": total, "searches": searches, "inserts": inserts, "fewest": fewest}

    def _at_once_async(self, work: list[Any], callers: int) -> tuple[list[float], list[float], list[Any]]:
        searches: list[float] = []
        inserts: list[float] = []
        answers: list[Any] = []
        left = iter(work)

        async def caller() -> None:
            for is_search, arguments in left:
                begun = time.perf_counter()
                answer = await (self.peer.search if is_search else self.peer.insert_one)(*arguments)
                (searches if is_search else inserts).append(time.perf_counter() - begun)
                if is_search:
                    answers.append(answer)

        async def all_callers() -> None:
            await asyncio.gather(*(caller() for _ in range(callers)))

        self._loop.run_until_complete(all_callers())
        return searches, inserts, answers

    def _at_once_in_threads(self, work: list[Any], callers: int) -> tuple[list[float], list[float], list[Any]]:
        searches: list[float] = []
        inserts: list[float] = []
        answers: list[Any] = []
        errors: list[str] = []
        left = queue.SimpleQueue[Any]()
        for each in work:
            left.put(each)

        def caller() -> None:
            try:
                while True:
                    try:
                        is_search, arguments = left.get_nowait()
                    except queue.Empty:
                        return
                    begun = time.perf_counter()
                    answer = (self.peer.search if is_search else self.peer.insert_one)(*arguments)
                    (searches if is_search else inserts).append(time.perf_counter() - begun)
                    if is_search:
                        answers.append(answer)
            except Exception:  # noqa: BLE001 - told to the driver
                errors.append(traceback.format_exc())

        threads = [threading.Thread(target=caller) for _ in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise RuntimeError(errors[0])
        return searches, inserts, answers

    def close(self) -> dict[str, Any]:
        """Let go of everything."""
        self._call(self.peer.close)
        return {}

    def _timed(self, function: Callable[..., Any], ready: list[tuple[Any, ...]]) -> tuple[list[float], list[Any]]:
        seconds: list[float] = []
        answers: list[Any] = []
        gc.collect()
        if self.peer.asynchronous:

            async def run() -> None:
                for arguments in ready:
                    begun = time.perf_counter()
                    answer = await function(*arguments)
                    seconds.append(time.perf_counter() - begun)
                    answers.append(answer)

            self._loop.run_until_complete(run())
        else:
            for arguments in ready:
                begun = time.perf_counter()
                answer = function(*arguments)
                seconds.append(time.perf_counter() - begun)
                answers.append(answer)
        return seconds, answers


def main(kind: str, option: str = "") -> None:
    """Serve until standard input ends."""
    # Libraries may print; file descriptor 1 is theirs from here on, and shows in the log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        try:
            worker = worker or Worker(kind, option)
            answer = getattr(worker, name)(**request)
        except BaseException as error:  # noqa: BLE001 - the driver reports it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
