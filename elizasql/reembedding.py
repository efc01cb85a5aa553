"""The move of an agent's vectors to another width."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias
from uuid import UUID

import numpy as np

from . import _codecs
from ._calls import lasting
from ._executor import Executor
from ._statements import SQL
from ._store import Store
from .errors import (
    ArgumentError,
    CheckError,
    ConflictError,
    EmbeddingDimensionError,
    EmbeddingError,
    NotFoundError,
    PermissionDeniedError,
    ReembeddingError,
    show,
)
from .types import DIMENSIONS, Embedding

__all__ = ["Embed", "Reembedded"]

Embed: TypeAlias = "Callable[[list[str]], Any | Awaitable[Any]]"
"""Texts to vectors: takes n texts and gives an array-like of shape (n, width), at once or awaited."""

# Times that the switch is tried before writers are held back: more than one where much is written all the time.
_TRIES = 3

# Cosine between two vectors of one text by one model: 1 but for rounding, also where it runs elsewhere.
_SAME_MODEL = 0.9

# Vectors that are dropped by one statement: some 10 ms.
_DROPPED_AT_ONCE = 1000

_FIRST, _LAST = UUID(int=0), UUID(int=2**128 - 1)


@dataclass(frozen=True, slots=True)
class Reembedded:
    """What a move to another width did.

    Attributes:
        dimension: The width that is in force now.
        embedded: Vectors that this run has made; what runs before it had made is not counted again.
        skipped: Ids of the memories that have no vector any more, because they have no text.
        dropped: Vectors of the old width that this run has dropped.
        types: The number of vectors in force, by type of memory.
        seconds: How long it took.
    """

    dimension: int
    embedded: int
    skipped: list[UUID]
    dropped: int
    types: dict[str, int]
    seconds: float


class Reembedding(Store):
    """The way out of a width, for an agent that changes its embedding model."""

    _background: Executor
    _learn: Callable[[int | None], None]

    @lasting(86400.0)
    async def reembed(
        self,
        to: int,
        embed: Embed,
        *,
        batch_size: int = 64,
        skip_missing: bool = False,
        progress: Callable[[int, int], None] | None = None,
        timeout: float | None = None,
    ) -> Reembedded:
        """Give every vector of the agent another width, while the agent goes on working with the old one.

        Every memory that has a vector gets one of the new width, made of its `content["text"]`, and the HNSW index
        with it. Memories that are written, changed or deleted meanwhile are covered, by whomever and by raw SQL. When
        none is missing the new width is switched on for everybody at once, and the old vectors are dropped in batches.
        Whatever breaks it off, the old width or the new is in force as a whole; call it again with the same `embed` to
        go on. One text is embedded first, to see that `embed` fits, and is the same: if not, nothing is begun. An agent
        that has the width already is left as it is, with counts of 0: another model of the same width is a move to
        the next larger one, with vectors that are filled up with zeros.

        The switch is one transaction that keeps writers of this agent waiting, and no search: 0.05 s for 10,000
        vectors, 0.25 s for 50,000, up to three times as long when they have to come from the disk. Where so much is
        written that something new is there each time, the last few are embedded while writers wait, so `embed` must
        not write to this agent's memory itself.

        From then on other adapters and processes get an EmbeddingDimensionError for their next vector of the old width,
        be it to write or to search, and know the new one after it.

        Args:
            to: 384, 512, 768, 1024, 1536 or 3072.
            embed: Takes a list of up to `batch_size` texts; gives array-like numbers of shape (len(texts), to).
                May be a coroutine function; one that is none runs in a thread. Called again where texts change.
            batch_size: Texts in one call of `embed`; default 64.
            skip_missing: Let memories without text lose their vectors; False: they are an error before the switch.
            progress: Called with the number of vectors that are there and the number that there have to be.
            timeout: Seconds for the whole of it; None: a day.

        Raises:
            ArgumentError: An argument does not fit; nothing was sent.
            EmbeddingDimensionError: The agent has no width yet.
            EmbeddingError: `embed` gave another shape, or a vector that cannot be stored. What it raises itself comes
                as it is. What was stored before stays for the next run; at the first text nothing is begun.
            ReembeddingError: A move to another width or by another model is under way (`abandon_reembedding` ends it);
                another run of this move was begun meanwhile with another `skip_missing`;
                or memories have a vector and no text: `missing` lists them.
            PermissionDeniedError: Policies guard memories or embeddings from the role: it may not see all. Nothing is
                begun. Or something on the agents' table keeps the width from being changed: what was made stays.
            NotFoundError: The agent does not exist.

        Statement: sql/reembeddings.sql. Four round trips a batch, and one for each further 50 ms that the index takes,
        some 10 ms for a vector of 1536 dimensions, in the background. Source: none, ours.
        """
        self._refuse_in_transaction("reembed")
        target = _codecs.as_count(to, "to")
        if target not in DIMENSIONS:
            raise ArgumentError(f"to must be one of {', '.join(map(str, DIMENSIONS))}, not {show(to, 40)}")
        _codecs.check_callable(embed, "embed")
        size = _codecs.as_count(batch_size, "batch_size", least=1)
        skips = _codecs.as_bool(skip_missing, "skip_missing")
        _codecs.check_progress(progress)
        began = time.monotonic()
        move = await self._look_at_move()
        locked, source, coming = move["locked"], move["source"], move["target"]
        embedded, dropped, skipped = 0, 0, list[UUID]()
        if source is not None and coming is None:  # the end of a move that was broken off
            dropped, skipped = await self._drop_leaving(source)
        elif coming is not None and coming != target:
            raise ReembeddingError(
                f"agent {self.agent_id} is on its way from {locked} to {coming} dimensions: "
                "go on with that, or call abandon_reembedding() first"
            )
        if locked is None:
            raise EmbeddingDimensionError(self.agent_id, locked=None, given=target)
        if locked != target:
            begun = move["begun"] if coming == target else None
            embedded = await _Move(self, locked, target, begun, embed, size, skips, progress).run()
            self._learn(target)
            more = await self._drop_leaving(locked)
            dropped, skipped = dropped + more[0], skipped + more[1]
        self._learn(target)
        rows = await self._background.fetch(SQL["count_embeddings_by_type"], agent_id=self.agent_id)
        return Reembedded(
            target, embedded, skipped, dropped, {row["type"]: row["vectors"] for row in rows}, time.monotonic() - began
        )

    @lasting(3600.0)
    async def abandon_reembedding(self, *, timeout: float | None = None) -> int:
        """Give up a move to another width that was not switched yet; give how many vectors were dropped.

        The old width stays in force. A `reembed` that is running somewhere ends with a ReembeddingError. Where the new
        width is in force already, what is left of the old one is dropped instead. Nothing under way: 0.

        Args:
            timeout: Seconds for the whole of it; None: an hour.

        Raises:
            ArgumentError: It is called in a transaction.
            PermissionDeniedError: Policies guard memories or embeddings from the role: it may not see all.
            NotFoundError: The agent does not exist.

        Statement: sql/reembeddings.sql abandon_reembedding, drop_leaving_embeddings. Source: none, ours.
        """
        self._refuse_in_transaction("abandon_reembedding")
        await self._background.execute(SQL["abandon_reembedding"], agent_id=self.agent_id)
        source = (await self._look_at_move())["source"]
        return 0 if source is None else (await self._drop_leaving(source))[0]

    async def _look_at_move(self) -> Mapping[str, Any]:
        """Give the width in force; and of the move under way the widths that go and come, its skips, when it began."""
        row: Mapping[str, Any] | None = await self._background.fetch_row(SQL["get_reembedding"], agent_id=self.agent_id)
        if row is None:
            raise NotFoundError(f"no such agent: {self.agent_id}; call ensure_agent_exists() first")
        return row

    async def _drop_leaving(self, source: int) -> tuple[int, list[UUID]]:
        """Drop the vectors that are not in force; give how many there were, and whose memories have none now."""
        about: dict[str, Any] = {"agent_id": self.agent_id}
        bare = await self._background.fetch(SQL["get_left_behind"], source=source, **about)
        dropped, first = 0, _FIRST
        while True:
            row = await self._background.fetch_row(
                SQL["drop_leaving_embeddings"], first=first, batch_size=_DROPPED_AT_ONCE, **about
            )
            assert row is not None
            dropped += row["dropped"]
            if row["last"] is None:
                break
            first = _after(row["last"])
        await self._background.execute(SQL["end_reembedding"], **about)
        await self._background.execute(SQL["refresh_statistics"], waits=True, **about)
        return dropped, [row["memory_id"] for row in bare]


class _Move:
    """One run of a move: fills, and switches when nothing is missing.

    When it began tells it from all others of the same widths: one that was abandoned while `embed` worked, which may
    take long, must not leave its vectors among those of another model.
    """

    def __init__(
        self,
        store: Reembedding,
        source: int,
        target: int,
        begun: datetime | None,
        embed: Embed,
        batch_size: int,
        skip_missing: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._store = store
        self._executor = store._background
        # What every statement of the move is about.
        self._about: dict[str, Any] = {"agent_id": store.agent_id, "source": source, "target": target, "begun": begun}
        self._target = target
        self._embed = embed
        self._batch_size = batch_size
        self._skip_missing = skip_missing
        self._progress = progress
        # Whether the last switch that was not refused has changed nothing: the move was over, or something forbids it.
        self._unheeded = False

    async def run(self) -> int:
        """Fill and switch; give how many vectors were made."""
        await self._check_textless()
        await self._try_embed()
        self._about["begun"] = await self._executor.fetch_value(
            SQL["begin_reembedding"], skip_missing=self._skip_missing, **self._about
        )
        embedded = refused = 0
        while await self._goes_on():
            if self._unheeded:
                raise PermissionDeniedError(
                    f"the width of agent {self._store.agent_id} stays as it is, without an error from the server: "
                    "a policy or a trigger of yours on elizasql.agents stands in the way"
                )
            await self._executor.execute(SQL["drop_textless_reembeddings"], **self._about)
            filled = await self._fill()
            embedded += filled
            # While a long pass ran, much may have come: the switch would find that out with writers waiting.
            if filled <= self._batch_size:
                if refused < _TRIES:
                    refused += not await self._switch()
                else:
                    embedded += await self._switch_while_writers_wait()
        return embedded

    async def _goes_on(self) -> bool:
        """Tell whether the switch is still to come."""
        found = await self._store._look_at_move()
        locked, coming, skips = found["locked"], found["target"], found["skip_missing"]
        if locked == self._target:
            return False
        if coming != self._target or found["begun"] != self._about["begun"]:
            raise ReembeddingError(
                f"the move of agent {self._store.agent_id} to {self._target} dimensions was abandoned"
                if coming in {None, self._target}
                else f"agent {self._store.agent_id} is on its way from {locked} to {coming} dimensions"
            )
        if skips != self._skip_missing:
            # The server goes by what was said last, and might refuse this run's switch for ever.
            raise ReembeddingError(
                f"another run of the move of agent {self._store.agent_id} was begun with skip_missing={skips}"
            )
        return True

    async def _check_textless(self) -> None:
        if self._skip_missing:
            return
        rows = await self._executor.fetch(SQL["get_textless"], **self._about)
        if rows:
            missing = [row["id"] for row in rows]
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            error = ReembeddingError(
                f"{len(missing)} memories have a vector and no text to make another one of: "
                f"{', '.join(map(str, missing[:10]))}{more}; skip_missing=True lets them lose it"
            )
            error.missing = missing
            raise error

    async def _try_embed(self) -> None:
        """Embed one text, so that what does not fit begins nothing, and another model does not go on with a move."""
        made = await self._executor.fetch_row(SQL.at("get_sample_reembedding", self._target), **self._about)
        rows = [made] if made is not None else await self._fetch_left(self._executor, _FIRST, 1)
        if not rows:
            return
        text = rows[0]["text"]
        (vector,) = self._read(await call(self._embed, [text]), [f"the text {show(text, 40)}"])
        if made is None:
            return
        # Half of an agent's vectors by another model find nothing.
        alike = float(vector @ made["embedding"] / np.linalg.norm(vector) / np.linalg.norm(made["embedding"]))
        if alike < _SAME_MODEL:
            raise ReembeddingError(
                f"embed is another model than that of the run before (cosine {alike:.2f} for one text): "
                "go on with that one, or call abandon_reembedding() first"
            )

    async def _fill(self) -> int:
        """Embed what is left, from the first id to the last, and index it; give how many vectors were stored."""
        counts = await self._executor.fetch_row(SQL["count_reembedded"], **self._about)
        assert counts is not None
        stored, first = 0, _FIRST
        self._tell(counts["done"], counts["total"])
        while rows := await self._fetch_left(self._executor, first, self._batch_size):
            number = await self._put(self._executor, rows)
            stored += number
            self._tell(counts["done"] + stored, counts["total"])
            await self._index()
            if not number and not await self._goes_on():
                break
            first = _after(rows[-1]["id"])
        await self._index()
        return stored

    def _tell(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, max(done, total))

    async def _fetch_left(self, executor: Executor, first: UUID, count: int) -> list[Any]:
        return await executor.fetch(SQL["get_left_to_embed"], first=first, count=count, **self._about)

    async def _put(self, executor: Executor, rows: Sequence[Any]) -> int:
        """Embed texts and store the vectors of those that have not changed meanwhile; give how many."""
        answer = await call(self._embed, [row["text"] for row in rows])
        vectors = self._read(answer, [f"memory {row['id']}" for row in rows])
        stored: int = await executor.fetch_value(
            SQL.at("put_reembeddings", self._target),
            **self._about,
            ids=[row["id"] for row in rows],
            text_hashes=[row["text_hash"] for row in rows],
            embeddings=[_codecs.encode_vector(vector) for vector in vectors],
        )
        return stored

    def _read(self, answer: Any, names: Sequence[str]) -> list[Embedding]:
        """Check what `embed` gave; `names` say in errors whose vectors they are."""
        try:
            matrix = np.asarray(answer)
        except (ValueError, TypeError, RuntimeError) as error:
            raise EmbeddingError(f"embed gave no array of numbers: {error}") from error
        if matrix.shape != (len(names), self._target):
            raise EmbeddingError(
                f"embed gave an array of shape {matrix.shape} for {len(names)} texts, not {(len(names), self._target)}"
            )
        return [
            _codecs.as_embedding(vector, f"embed's vector for {name}")
            for name, vector in zip(names, matrix, strict=True)
        ]

    async def _index(self) -> None:
        """Move the vectors that were stored into their HNSW index."""
        size = self._store.config.index_batch_size
        while await self._executor.fetch_value(SQL["index_reembeddings"], batch_size=size, **self._about):
            pass

    async def _put_in_force(self, executor: Executor) -> None:
        self._unheeded = await executor.fetch_value(SQL["switch_dimension"], **self._about) is None

    async def _switch(self) -> bool:
        """Put the new width in force; False when the server finds that something is missing."""
        try:
            await self._put_in_force(self._executor)
        except CheckError as error:
            if error.constraint not in _NOT_YET:
                raise
            await self._check_textless()
            return False
        return True

    async def _switch_while_writers_wait(self) -> int:
        """Embed the last few with the agent's row in hand, and switch; give how many vectors were made."""
        stored = 0
        try:
            async with self._executor.transaction() as tx:
                # A build takes minutes. It is waited for before anybody waits for this, and none begins meanwhile.
                await tx.fetch(SQL["lift_limits"])
                await tx.execute(SQL["hold_partition"], **self._about)
                await tx.execute(SQL["hold_agent"], **self._about)
                while left := await self._fetch_left(tx, _FIRST, self._batch_size):
                    rows = await tx.fetch(SQL["hold_texts"], ids=[row["id"] for row in left], **self._about)
                    if not rows or not (number := await self._put(tx, rows)):
                        return stored  # without text, or abandoned meanwhile, which the next look says
                    stored += number
                await self._put_in_force(tx)
        except CheckError as error:
            if error.constraint not in _NOT_YET:
                raise
            await self._check_textless()
            return 0
        except ConflictError:
            return 0  # somebody who waited for us had a memory that we waited for
        return stored


# The second one: there is no move any more; the next look says why.
_NOT_YET = ("reembeddings_complete", "agents_embedding_dimension_locked")


async def call(embed: Embed, texts: list[str]) -> Any:
    """Give what `embed` makes of texts; what is no coroutine function runs in a thread."""
    method = getattr(embed, "__call__", None)  # noqa: B004 - of an object, its method may be the coroutine function
    if inspect.iscoroutinefunction(embed) or inspect.iscoroutinefunction(method):
        return await embed(texts)
    answer = await asyncio.to_thread(embed, texts)
    return await answer if inspect.isawaitable(answer) else answer


def _after(id: UUID) -> UUID:
    """Give the id that follows."""
    return UUID(int=min(id.int + 1, _LAST.int))
