"""The move to another width: nothing is missed, nothing is mixed, and whatever breaks it off can be gone on with."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest

import elizasql
from elizasql import (
    ArgumentError,
    DatabaseAdapter,
    EmbeddingDimensionError,
    EmbeddingError,
    NotFoundError,
    ReembeddingError,
)
from elizasql import reembedding as module
from elizasql._executor import Executor
from elizasql._statements import SQL, Statement

from .conftest import MakeAdapter, Scene, make_scene, neighbour_of
from .locking import blocked_pid
from .reembed_worker import embedder, vector_of
from .test_adapter import with_query
from .test_dimension_lock import until_waiting

Raw: TypeAlias = "asyncpg.Connection[Any]"

WORKER = Path(__file__).with_name("reembed_worker.py")
OLD, NEW = 384, 512


def memory(text: str | None, width: int = OLD, **fields: Any) -> dict[str, Any]:
    content = {} if text is None else {"text": text}
    return {"content": content, "embedding": vector_of(text or "none", width), "unique": True, **fields}


async def remember(db: DatabaseAdapter, count: int, word: str = "text") -> list[UUID]:
    return await db.create_memories([memory(f"{word} {number}") for number in range(count)], "messages")


async def vectors(raw: Raw, agent: UUID) -> dict[UUID, dict[int, np.ndarray[Any, Any]]]:
    """Give every vector that is stored for an agent, by memory and width."""
    found: dict[UUID, dict[int, Any]] = {}
    for row in await raw.fetch(
        """SELECT memory_id, dimension, coalesce(
            dim_384, dim_512, dim_768, dim_1024, dim_1536, dim_3072)::real[] AS vector
        FROM elizasql.embeddings WHERE agent_id = $1""",
        agent,
    ):
        assert len(row["vector"]) == row["dimension"]
        found.setdefault(row["memory_id"], {})[row["dimension"]] = np.array(row["vector"], np.float32)
    return found


async def check_end(raw: Raw, agent: UUID, width: int = NEW) -> int:
    """Check that every memory with a text has one vector, of this width and of its text; give their number."""
    assert not await raw.fetch("SELECT FROM elizasql.reembeddings WHERE agent_id = $1", agent)
    assert await raw.fetchval("SELECT embedding_dimension FROM elizasql.agents WHERE id = $1", agent) == width
    texts = {
        row["id"]: row["text"]
        for row in await raw.fetch(
            "SELECT id, content ->> 'text' AS text FROM elizasql.memories WHERE agent_id = $1", agent
        )
        if row["text"]
    }
    found = await vectors(raw, agent)
    assert set(found) == set(texts)
    for id, text in texts.items():
        assert list(found[id]) == [width]
        assert found[id][width].tolist() == vector_of(text, width).tolist(), text
    return len(texts)


async def check_search(db: DatabaseAdapter, raw: Raw, width: int = NEW, **scope: Any) -> None:
    """Check that searches, exact and by HNSW, give what comparing with every vector gives."""
    found = await vectors(raw, db.agent_id)
    for word in ("one", "two", "three"):
        query = vector_of(word, width)

        def distance(id: UUID, query: Any = query) -> float:
            vector = found[id][width]
            return -float(vector @ query / np.linalg.norm(vector))

        nearest = sorted(found, key=distance)[:5]
        for until in (0.0, float("inf")):
            # So many candidates that HNSW looks at all: what it leaves out of fewer is no matter of the move.
            db._measured["messages", 100, (None, None, None)] = (True, "1000", until)
            hits = await db.search_memories(embedding=query, table_name="messages", count=5, include_embedding=True)
            assert [hit.id for hit in hits] == nearest, ("exact", "by HNSW")[until > 0]
            assert all(hit.embedding is not None and hit.embedding.shape == (width,) for hit in hits)
    db._measured.clear()


# --- a move --------------------------------------------------------------------------------------------------------


async def test_a_move_gives_every_memory_a_vector_of_the_new_width(make_db: MakeAdapter, raw: Raw) -> None:
    db = await make_db()
    other = await make_db(await neighbour_of(db.agent_id, raw))
    await remember(db, 25)
    await db.create_memories([memory(f"fact {number}") for number in range(5)], "facts")
    bare = await db.create_memory({"content": {"text": "never embedded"}}, "messages")
    await remember(other, 3)
    told: list[tuple[int, int]] = []
    done = await db.reembed(NEW, embedder(NEW), batch_size=8, progress=lambda *numbers: told.append(numbers))
    assert (done.dimension, done.embedded, done.skipped, done.dropped) == (NEW, 30, [], 30)
    assert done.types == {"facts": 5, "messages": 25}
    assert done.seconds > 0
    assert told[:5] == [(0, 30), (8, 30), (16, 30), (24, 30), (30, 30)]
    await raw.execute("DELETE FROM elizasql.memories WHERE agent_id = $1 AND id = $2", db.agent_id, bare)
    assert await check_end(raw, db.agent_id) == 30
    assert await check_end(raw, other.agent_id, OLD) == 3
    assert (await db.stats())["unindexed"] == 0, "the index was built before the switch"
    await db.delete_all_memories([], "facts")
    await raw.execute("DELETE FROM elizasql.memories WHERE agent_id = $1 AND type = 'facts'", db.agent_id)
    await check_search(db, raw)
    assert await db.get_embedding_dimension() == NEW
    # And the agent goes on with it.
    await db.create_memory(memory("new", NEW), "messages")
    await db.update_memory({"id": (await remember_one(db, NEW)), "embedding": vector_of("x", NEW)})
    with pytest.raises(EmbeddingDimensionError):
        await db.create_memory(memory("old"), "messages")


async def test_models_of_one_width_take_turns(db: DatabaseAdapter) -> None:
    """The second one's vectors are filled up with zeros to the next width, the third one's are of the first again."""
    ids = dict(zip(map("text {}".format, range(30)), await remember(db, 30), strict=True))

    def by(model: str, texts: list[str], width: int) -> np.ndarray[Any, Any]:
        made = np.array([vector_of(f"{model}: {text}", 384) for text in texts])
        return np.pad(made / np.linalg.norm(made, axis=1, keepdims=True), ((0, 0), (0, width - 384)))

    for model, width in (("second", 512), ("third", 384)):
        await db.reembed(width, functools.partial(by, model, width=width))
        (query,) = by(model, ["?"], width)
        nearest = np.argsort(-(by(model, list(ids), 384) @ query[:384]))[:10]
        hits = await db.search_memories(embedding=query, table_name="messages", count=10)
        assert [hit.id for hit in hits] == [list(ids.values())[number] for number in nearest]


async def remember_one(db: DatabaseAdapter, width: int = OLD) -> UUID:
    return await db.create_memory(memory(str(uuid4()), width), "messages")


async def test_a_second_run_finds_nothing_to_do(db: DatabaseAdapter, raw: Raw) -> None:
    await remember(db, 3)
    await db.reembed(NEW, embedder(NEW))

    def never(texts: list[str]) -> Any:
        raise AssertionError("nothing is to be embedded")

    again = await db.reembed(NEW, never)
    assert (again.embedded, again.skipped, again.dropped, again.types) == (0, [], 0, {"messages": 3})
    assert await check_end(raw, db.agent_id) == 3
    assert (await db.reembed(OLD, embedder(OLD))).embedded == 3, "and back"
    assert await check_end(raw, db.agent_id, OLD) == 3


async def test_an_agent_without_vectors_moves_at_once(db: DatabaseAdapter, raw: Raw) -> None:
    assert (await db.reembed(3072, embedder(3072))).types == {}
    assert await db.get_embedding_dimension() == 3072
    assert await check_end(raw, db.agent_id, 3072) == 0


class Model:
    async def __call__(self, texts: list[str]) -> Any:
        return [vector_of(text, NEW) for text in texts]

    async def embed(self, texts: list[str]) -> Any:
        return await self(texts)


class Array:
    """An array of another library."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.values, np.float64)


EMBEDS: dict[str, Any] = {
    "array": lambda texts: np.array([vector_of(text, NEW) for text in texts]),
    "lists": lambda texts: [vector_of(text, NEW).tolist() for text in texts],
    "another library's": lambda texts: Array([vector_of(text, NEW) for text in texts]),
    "coroutine function": Model().embed,
    "object": Model(),
    "function that gives an awaitable": lambda texts: Model()(texts),
}


async def test_embed_may_be(db: DatabaseAdapter, raw: Raw) -> None:
    await remember(db, 3)
    for name, embed in EMBEDS.items():
        assert (await db.reembed(NEW, embed, batch_size=2)).embedded == 3, name
        assert await check_end(raw, db.agent_id) == 3, name
        await db.reembed(OLD, embedder(OLD))


# --- bad input -------------------------------------------------------------------------------------------------------


async def test_bad_arguments_are_refused(db: DatabaseAdapter, round_trips: list[str]) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"to": 100}, "to must be one of 384"),
        ({"to": "512"}, "to must be"),
        ({"to": None}, "to must be"),
        ({"to": True}, "to must be"),
        ({"embed": None}, "embed must be callable"),
        ({"embed": "module:function"}, "embed must be callable"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"skip_missing": 1}, "skip_missing"),
        ({"progress": 1}, "progress"),
        ({"timeout": -1}, "timeout"),
    ]
    for arguments, match in bad:
        with pytest.raises(ArgumentError, match=match):
            await db.reembed(**{"to": NEW, "embed": embedder(NEW), **arguments})
    assert not round_trips


async def test_there_is_nothing_to_move_in_a_transaction_or_without_agent_or_width(
    db: DatabaseAdapter, make_db: MakeAdapter
) -> None:
    async with db.transaction() as tx:
        with pytest.raises(ArgumentError, match="transaction"):
            await tx.reembed(NEW, embedder(NEW))
        with pytest.raises(ArgumentError, match="transaction"):
            await tx.abandon_reembedding()
    unlocked = await make_db(dimension=None)
    with pytest.raises(EmbeddingDimensionError, match="ensure_embedding_dimension") as caught:
        await unlocked.reembed(NEW, embedder(NEW))
    assert (caught.value.locked, caught.value.given) == (None, NEW)
    await unlocked.delete_agent(unlocked.agent_id)
    for call in (unlocked.reembed(NEW, embedder(NEW)), unlocked.abandon_reembedding()):
        with pytest.raises(NotFoundError, match="ensure_agent_exists"):
            await call


def changed(change: Callable[[Any], Any]) -> Any:
    return lambda texts: change(np.array([vector_of(text, NEW) for text in texts]))


def with_first(value: float) -> Any:
    def change(matrix: Any) -> Any:
        matrix[0] = value
        return matrix

    return changed(change)


BAD_EMBEDS: dict[str, Any] = {
    "another width": embedder(OLD),
    "one too few": changed(lambda matrix: matrix[1:]),
    "one too many": changed(lambda matrix: np.concatenate([matrix, matrix[:1]])),
    "one axis": changed(lambda matrix: matrix[0]),
    "three axes": changed(lambda matrix: matrix[None]),
    "nothing": lambda texts: None,
    "text": lambda texts: "vectors",
    "the texts": lambda texts: texts,
    "a mapping": lambda texts: dict.fromkeys(texts, 1.0),
    "ragged": lambda texts: [[1.0] * (NEW - position) for position, _ in enumerate(texts)],
    "texts in it": lambda texts: [["x"] * NEW for _ in texts],
    "objects in it": lambda texts: [[None] * NEW for _ in texts],
    "complex": changed(lambda matrix: matrix * 1j),
    "a zero vector": with_first(0.0),
    "not a number": with_first(float("nan")),
    "infinite": with_first(float("inf")),
    "beyond halfvec": with_first(1e6),
}


async def test_an_answer_that_is_no_vectors_is_refused(db: DatabaseAdapter, raw: Raw) -> None:
    await remember(db, 3)
    for name, embed in BAD_EMBEDS.items():
        with pytest.raises(EmbeddingError, match="embed"):
            await db.reembed(NEW, embed)
            pytest.fail(f"{name} was accepted")
        assert {width for each in (await vectors(raw, db.agent_id)).values() for width in each} == {OLD}, name
    await db.create_memory(memory("still here"), "messages")
    assert (await db.reembed(NEW, embedder(NEW))).embedded == 4
    await check_end(raw, db.agent_id)


async def test_an_embed_that_does_not_fit_begins_nothing(db: DatabaseAdapter) -> None:
    await remember(db, 3)

    def gone(texts: list[str]) -> Any:
        raise ConnectionResetError("the model is gone")

    for embed, error in ((embedder(768), EmbeddingError), (gone, ConnectionResetError)):
        with pytest.raises(error):
            await db.reembed(NEW, embed)
    assert (await db.reembed(768, embedder(768))).embedded == 3, "no other move is under way"


async def test_what_embed_raises_comes_as_it_is_and_the_next_run_goes_on(db: DatabaseAdapter, raw: Raw) -> None:
    await remember(db, 10)
    calls: list[list[str]] = []

    def fails(texts: list[str]) -> Any:
        calls.append(texts)
        if len(calls) == 4:
            raise ConnectionResetError("the model is gone")
        return [vector_of(text, NEW) for text in texts]

    with pytest.raises(ConnectionResetError, match="the model is gone"):
        await db.reembed(NEW, fails, batch_size=3)
    assert await db.get_embedding_dimension() == OLD
    await check_search(db, raw, OLD)
    told: list[tuple[int, int]] = []
    done = await db.reembed(NEW, fails, batch_size=3, progress=lambda *numbers: told.append(numbers))
    assert done.embedded == 4
    assert told[0] == (6, 10)
    assert [len(texts) for texts in calls] == [1, 3, 3, 3, 1, 3, 1], "each run tries one text first"
    assert calls[4][0] in calls[1] + calls[2], "to see that it is the same model"
    assert sorted(text for texts in (*calls[1:3], *calls[5:]) for text in texts) == sorted(
        f"text {number}" for number in range(10)
    ), "nothing else is embedded twice"
    await check_end(raw, db.agent_id)


# --- memories without text -------------------------------------------------------------------------------------------


async def test_memories_without_text_are_listed_before_anything_is_embedded(db: DatabaseAdapter, raw: Raw) -> None:
    await remember(db, 3)
    contents: Sequence[Any] = [{}, {"text": ""}, {"text": None}, {"url": "x"}]
    bare = await db.create_memories([{**memory(None), "content": content} for content in contents], "messages")
    calls: list[Any] = []
    with pytest.raises(ReembeddingError, match="4 memories have a vector and no text") as caught:
        await db.reembed(NEW, calls.append)
    assert not calls
    assert sorted(caught.value.missing) == sorted(bare)
    assert all(str(id) in str(caught.value) for id in bare)
    assert await db.get_embedding_dimension() == OLD
    done = await db.reembed(NEW, embedder(NEW), skip_missing=True)
    assert sorted(done.skipped) == sorted(bare)
    assert (done.embedded, done.dropped) == (3, 7)
    assert await check_end(raw, db.agent_id) == 3
    assert len(await db.get_memories(table_name="messages")) == 7, "the memories stay"


async def test_many_without_text_are_all_in_the_error(db: DatabaseAdapter) -> None:
    bare = await db.create_memories([memory(None) for _ in range(25)], "messages")
    with pytest.raises(ReembeddingError, match="and 15 more") as caught:
        await db.reembed(NEW, embedder(NEW))
    assert sorted(caught.value.missing) == sorted(bare)


@pytest.mark.parametrize("writers", ["go on", "wait"])
@pytest.mark.parametrize("skip_missing", [True, False])
async def test_a_text_that_goes_away_meanwhile(
    db: DatabaseAdapter,
    make_db: MakeAdapter,
    raw: Raw,
    skip_missing: bool,
    writers: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if writers == "wait":
        monkeypatch.setattr(module, "_TRIES", 0)
    ids = sorted(await remember(db, 4))
    other = await make_db(db.agent_id)

    async def embed(texts: list[str]) -> Any:
        # The first one is stored already when the last one is asked for.
        last = await other.get_memory_by_id(ids[3])
        if str(last.content.get("text")) in texts:
            await other.update_memories([{"id": ids[0], "content": {"url": "x"}}, {"id": ids[3], "content": {}}])
        return [vector_of(text, NEW) for text in texts]

    if not skip_missing:
        with pytest.raises(ReembeddingError) as caught:
            await db.reembed(NEW, embed, batch_size=1)
        assert sorted(caught.value.missing) == [ids[0], ids[3]]
        assert await db.get_embedding_dimension() == OLD
    done = await db.reembed(NEW, embed, batch_size=1, skip_missing=True)
    assert sorted(done.skipped) == [ids[0], ids[3]]
    assert await check_end(raw, db.agent_id) == 2


# --- what happens meanwhile ------------------------------------------------------------------------------------------

Change: TypeAlias = Callable[[DatabaseAdapter, Raw, list[UUID], Scene], Awaitable[Any]]
CHANGES: dict[str, Change] = {
    "text": lambda db, raw, ids, s: db.update_memories([{"id": id, "content": {"text": f"new {id}"}} for id in ids]),
    "text and vector": lambda db, raw, ids, s: db.update_memories(
        [{"id": id, "content": {"text": f"new {id}"}, "embedding": vector_of("x", OLD)} for id in ids]
    ),
    "vector": lambda db, raw, ids, s: db.update_memories([{"id": id, "embedding": vector_of("x", OLD)} for id in ids]),
    "upsert": lambda db, raw, ids, s: db.upsert_memories([memory(f"new {id}", id=id) for id in ids], "messages"),
    "delete": lambda db, raw, ids, s: db.delete_memories(ids[1:3]),
    "create": lambda db, raw, ids, s: remember(db, 5, str(uuid4())),
    "load": lambda db, raw, ids, s: db.load_memories([memory(str(uuid4())) for _ in range(5)], "messages"),
    "create first": lambda db, raw, ids, s: db.create_memory(memory("first", id=UUID(int=0)), "messages"),
    "create last": lambda db, raw, ids, s: db.create_memory(memory("last", id=UUID(int=2**128 - 1)), "messages"),
    "scope": lambda db, raw, ids, s: db.update_memories([{"id": id, "room_id": s.room} for id in ids]),
    "first vector": lambda db, raw, ids, s: db.update_memory({"id": s.world, "embedding": vector_of("x", OLD)}),
    "raw text": lambda db, raw, ids, s: raw.execute(
        "UPDATE elizasql.memories SET content = jsonb_build_object('text', id::text) WHERE agent_id = $1", db.agent_id
    ),
    "raw delete": lambda db, raw, ids, s: raw.execute(
        "DELETE FROM elizasql.memories WHERE agent_id = $1 AND id = $2", db.agent_id, ids[0]
    ),
}


@pytest.mark.parametrize(("name", "at"), list(zip(CHANGES, itertools.cycle([1, 3, 5]))))
async def test_a_change_while_embed_runs_is_covered(
    db: DatabaseAdapter, make_db: MakeAdapter, raw: Raw, name: str, at: int
) -> None:
    other = await make_db(db.agent_id)
    scene = await make_scene(other)
    ids = await remember(db, 9)
    await db.create_memory({"id": scene.world, "content": {"text": "no vector yet"}}, "messages")
    calls = itertools.count()  # 0 is the one text that is tried

    async def embed(texts: list[str]) -> Any:
        if next(calls) == at:
            await CHANGES[name](other, raw, ids, scene)
        return [vector_of(text, NEW) for text in texts]

    await db.reembed(NEW, embed, batch_size=2)
    assert next(calls) > at
    if name != "first vector":
        await db.delete_memory(scene.world)
    await check_end(raw, db.agent_id)
    await check_search(db, raw)
    if name == "scope":
        hits = await other.search_memories(embedding=vector_of("x", NEW), table_name="messages", room_id=scene.room)
        assert {hit.id for hit in hits} == set(ids)


async def test_reads_and_searches_see_the_old_width_alone_until_the_switch(
    db: DatabaseAdapter, make_db: MakeAdapter, raw: Raw
) -> None:
    ids = await remember(db, 30)
    inline = await make_db(db.agent_id, indexing="inline")
    resident = await make_db(db.agent_id, resident="required")
    looks = 0

    async def embed(texts: list[str]) -> Any:
        nonlocal looks
        looks += 1
        for reader in (db, inline, resident):
            await check_search(reader, raw, OLD)
        found = await db.get_memories(table_name="messages", include_embedding=True)
        assert {memory.id for memory in found} == set(ids)
        assert all(memory.embedding is not None and memory.embedding.shape == (OLD,) for memory in found)
        cached = await db.get_cached_embeddings(query_table_name="messages", query_threshold=0, query_input="text 3")
        assert [each["embedding"].tolist() for each in cached] == [vector_of("text 3", OLD).tolist()]
        return [vector_of(text, NEW) for text in texts]

    await db.reembed(NEW, embed, batch_size=10)
    assert looks == 4, "one text is tried, then three batches"
    (cached,) = await inline.get_cached_embeddings(query_table_name="messages", query_threshold=0, query_input="text 3")
    assert cached["embedding"].tolist() == vector_of("text 3", NEW).tolist()
    stale = await inline.get_memory_by_id(ids[3], include_embedding=True)
    assert stale is not None and stale.embedding is not None and stale.embedding.shape == (NEW,)


async def test_every_read_gives_the_vector_in_force_where_there_are_two(make_db: MakeAdapter) -> None:
    # To the smaller width: what takes any one of the two takes the first.
    db = await make_db(dimension=NEW)
    scene = await make_scene(db)
    place: dict[str, Any] = {"room_id": scene.room, "entity_id": scene.entity, "world_id": scene.world}
    title = {"title": "title"}
    fields: dict[str, Any] = {**place, "content": {"text": "text", **title}, "metadata": title}
    ids = await db.create_memories([memory("text", NEW, **fields) for _ in range(2)], "messages")
    looks = 0

    async def check(width: int) -> None:
        asked: dict[str, Any] = {"table_name": "messages", "include_embedding": True}
        expected = [vector_of("text", width).tolist()] * 2
        found: list[list[Any]] = [
            [await db.get_memory_by_id(id, include_embedding=True) for id in ids],
            await db.get_memories_by_ids(ids, include_embedding=True),
            await db.get_memories_by_room_ids(room_ids=[scene.room], **asked),
            await db.get_memories_by_world_id(world_id=scene.world, **asked),
        ]
        for kept in (*place, None):
            scope = {word: value for word, value in place.items() if word == kept}
            search: dict[str, Any] = {**scope, **asked, "embedding": vector_of("text", width)}
            found += [
                await db.get_memories(**scope, **asked),
                await db.search_memories(**search),
                await db.search_memories(**search, metadata=title),
            ]
        assert [[each.embedding.tolist() for each in memories] for memories in found] == [expected] * 16
        for field, key, text in (
            ("content", "text", "text"),
            ("content", "title", "title"),
            ("metadata", "title", "title"),
        ):
            cached = await db.get_cached_embeddings(
                query_table_name="messages",
                query_threshold=0,
                query_input=text,
                query_field_name=field,
                query_field_sub_name=key,
            )
            assert [each["embedding"].tolist() for each in cached] == expected, (field, key)
            about = {"agent_id": db.agent_id, "type": "messages", "ids": ids, "texts": [text] * 2, "key": key}
            of_many = dict(
                await db._executor.fetch(SQL["get_cached_vectors"], **about, of_metadata=field == "metadata")
            )
            assert [of_many[id].tolist() for id in ids] == expected, (field, key)

    async def embed(texts: list[str]) -> Any:
        nonlocal looks
        looks += 1
        await check(NEW)
        return [vector_of(text, OLD) for text in texts]

    await db.reembed(OLD, embed, batch_size=1)
    assert looks == 3, "one text is tried; at the second batch, the first memory has two vectors"
    await check(OLD)


async def test_an_export_holds_the_width_in_force(db: DatabaseAdapter, raw: Raw, dsn: str, tmp_path: Path) -> None:
    from elizasql.transfer import Archive, export_archive

    await remember(db, 4)

    async def embed(texts: list[str]) -> Any:
        folder = tmp_path / uuid4().hex
        told = await export_archive(dsn, folder, db.config, agent_ids=[db.agent_id], advance=lambda *_: None)
        assert told["rows"]["embeddings"] == 4
        with Archive(folder) as archive:
            assert list(archive.verify())
        return [vector_of(text, NEW) for text in texts]

    await db.reembed(NEW, embed, batch_size=3)
    await check_end(raw, db.agent_id)


async def test_a_vector_that_is_stored_beside_a_move_has_the_scope_that_its_memory_gets(
    db: DatabaseAdapter, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory moves in a transaction that sees no vector of the coming width, and ends after it has come."""
    (id,) = await remember(db, 1)
    room = await db.create_room({"source": "x", "type": "DM"})
    put = module._Move._put

    async def moved(self: module._Move, executor: Executor, rows: Sequence[Any]) -> int:
        async with raw.transaction():
            change = "UPDATE elizasql.memories SET room_id = $3 WHERE agent_id = $1 AND id = $2"
            await raw.execute(change, db.agent_id, id, room)
            storing = asyncio.ensure_future(put(self, executor, rows))
            await blocked_pid(raw, storing)
        return await storing

    monkeypatch.setattr(module._Move, "_put", moved)
    await db.reembed(NEW, embedder(NEW))
    hits = await db.search_memories(embedding=vector_of("x", NEW), table_name="messages", room_id=room)
    assert [hit.id for hit in hits] == [id]


@pytest.mark.parametrize("memory_is_there", [False, True])
async def test_the_switch_waits_for_a_write_that_has_begun(
    db: DatabaseAdapter, dsn: str, raw: Raw, monkeypatch: pytest.MonkeyPatch, memory_is_there: bool
) -> None:
    await remember(db, 4)
    id, content = uuid4(), {"text": "in flight"}
    if memory_is_there:
        await db.create_memory({"id": id, "content": content}, "messages")
    transaction = raw.transaction()
    await transaction.start()
    real = module._Move._switch

    async def write_before(self: module._Move) -> bool:
        if not await raw.fetchval("SELECT count(*) FROM elizasql.embeddings WHERE agent_id = $1 AND memory_id = $2",
                                  db.agent_id, id):  # fmt: skip
            await raw.execute(
                "INSERT INTO elizasql.memories (agent_id, id, type, content) VALUES ($1, $2, 'messages', $3) "
                "ON CONFLICT DO NOTHING",
                db.agent_id, id, json.dumps(content),
            )  # fmt: skip
            await raw.execute(
                f"""INSERT INTO elizasql.embeddings (agent_id, memory_id, type, "unique", dimension, dim_{OLD})
                VALUES ($1, $2, 'messages', TRUE, {OLD}, $3::text::vector)""",
                db.agent_id, id, str(vector_of("x", OLD).tolist()),
            )  # fmt: skip
        return await real(self)

    monkeypatch.setattr(module._Move, "_switch", write_before)
    moving = asyncio.ensure_future(db.reembed(NEW, embedder(NEW)))
    await until_waiting(dsn, raw, 1)
    await transaction.commit()
    assert (await moving).embedded == 5
    assert await check_end(raw, db.agent_id) == 5


async def test_where_writers_never_pause_the_last_few_are_embedded_while_they_wait(
    db: DatabaseAdapter, make_db: MakeAdapter, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    await remember(db, 4)
    other = await make_db(db.agent_id)
    tried: list[str] = []
    real, held = module._Move._switch, module._Move._switch_while_writers_wait

    async def busy(self: module._Move) -> bool:
        tried.append("switch")
        await remember(other, 3, str(uuid4()))
        return await real(self)

    async def last(self: module._Move) -> int:
        tried.append("held")
        await remember(other, 130, str(uuid4()))
        return await held(self)

    monkeypatch.setattr(module._Move, "_switch", busy)
    monkeypatch.setattr(module._Move, "_switch_while_writers_wait", last)
    done = await db.reembed(NEW, embedder(NEW))
    assert tried == ["switch"] * 3 + ["held"]
    assert done.embedded == 4 + 3 * 3 + 130
    assert await check_end(raw, db.agent_id) == done.embedded


async def test_who_writes_waits_while_the_last_few_are_embedded(
    db: DatabaseAdapter, make_db: MakeAdapter, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else there could be something new whenever the switch is tried."""
    await remember(db, 4)
    other = await make_db(db.agent_id)
    held, put = module._Move._switch_while_writers_wait, module._Move._put
    writing: list[asyncio.Future[Any]] = []

    async def late(self: module._Move) -> int:
        await remember(db, 1, "late")
        return await held(self)

    async def beside(self: module._Move, executor: Executor, rows: Sequence[Any]) -> int:
        if executor.in_transaction:
            holder = await executor.fetch_value(Statement("pid", "SELECT pg_backend_pid()", (), "", ""))
            writing.append(asyncio.ensure_future(remember_one(other)))
            waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND $1 = ANY(pg_blocking_pids(pid))"
            while not await raw.fetchval(waits, holder):
                assert not writing[-1].done(), "it did not wait"
        return await put(self, executor, rows)

    monkeypatch.setattr(module, "_TRIES", 0)
    monkeypatch.setattr(module._Move, "_switch_while_writers_wait", late)
    monkeypatch.setattr(module._Move, "_put", beside)
    assert (await db.reembed(NEW, embedder(NEW))).embedded == 5
    (written,) = await asyncio.gather(*writing, return_exceptions=True)
    assert isinstance(written, EmbeddingDimensionError)
    assert await check_end(raw, db.agent_id) == 5


async def test_a_text_that_never_rests_is_embedded_while_its_writer_waits(
    db: DatabaseAdapter, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a message which is still being streamed: it is another one whenever its vector comes."""
    streamed = (await remember(db, 3))[0]
    put = module._Move._put
    changes: list[str] = []

    async def overtaken(self: module._Move, executor: Executor, rows: Sequence[Any]) -> int:
        change = """UPDATE elizasql.memories SET content = jsonb_build_object('text', $3::text)
            WHERE agent_id = $1 AND id = (
                SELECT id FROM elizasql.memories WHERE agent_id = $1 AND id = $2 FOR NO KEY UPDATE SKIP LOCKED
            )"""
        changes.append(await raw.execute(change, db.agent_id, streamed, f"word {len(changes)}"))
        assert len(changes) < 10
        return await put(self, executor, rows)

    monkeypatch.setattr(module, "_TRIES", 0)
    monkeypatch.setattr(module._Move, "_put", overtaken)
    assert (await db.reembed(NEW, embedder(NEW))).embedded == 3
    assert changes == ["UPDATE 1", "UPDATE 0"]
    assert await check_end(raw, db.agent_id) == 3


async def test_while_writers_wait_a_build_of_the_index_keeps_no_other_agent_waiting(
    db: DatabaseAdapter, make_db: MakeAdapter, raw: Raw, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not begin, which would take minutes and keep the last vectors from being stored; and it waits where no
    other agent's writers wait behind it."""
    await remember(db, 4)
    neighbour = await make_db(await neighbour_of(db.agent_id, raw))
    await remember(neighbour, 1)
    held, put = module._Move._switch_while_writers_wait, module._Move._put
    part = await raw.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)
    building: list[asyncio.Task[Any]] = []

    async def late(self: module._Move) -> int:
        await remember(db, 3, "late")
        await raw.execute(f"DROP INDEX elizasql.{part}_dim_{NEW}_hnsw")
        return await held(self)

    async def begin_to_build(self: module._Move, executor: Executor, rows: Sequence[Any]) -> int:
        if executor.in_transaction:
            building.append(asyncio.ensure_future(builder.execute("SELECT elizasql.build_index($1)", db.agent_id)))
            question = "SELECT cardinality(pg_blocking_pids($1)) > 0"
            while not await raw.fetchval(question, builder.get_server_pid()):
                assert not building[0].done()
            await remember(neighbour, 1, "meanwhile")
        return await put(self, executor, rows)

    monkeypatch.setattr(module, "_TRIES", 0)
    monkeypatch.setattr(module._Move, "_switch_while_writers_wait", late)
    monkeypatch.setattr(module._Move, "_put", begin_to_build)
    builder = await asyncpg.connect(dsn)
    try:
        assert (await db.reembed(NEW, embedder(NEW))).embedded == 7
        await asyncio.gather(*building)
    finally:
        await builder.close()
    assert len(building) == 1
    assert await check_end(raw, db.agent_id) == 7


@pytest.mark.parametrize("rights", ["of the partitions", "of the partitioned table alone"])
async def test_who_waits_for_the_build_of_the_index_keeps_nobody_waiting(
    make_db: MakeAdapter, own_database: str, monkeypatch: pytest.MonkeyPatch, rights: str
) -> None:
    raw = await asyncpg.connect(own_database.replace("//elizasql@", "//postgres@"))
    db = await make_db(dsn=own_database)
    await remember(db, 4)
    part = await raw.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)
    if rights != "of the partitions":
        await raw.execute(f"ALTER TABLE elizasql.{part} OWNER TO postgres; REVOKE ALL ON elizasql.{part} FROM elizasql")
        db = await make_db(db.agent_id, dsn=own_database)
    other = await make_db(db.agent_id, dsn=own_database, timeout=20.0)
    held = module._Move._switch_while_writers_wait
    building, begun = raw.transaction(), asyncio.Event()

    async def behind_a_build(self: module._Move) -> int:
        if not begun.is_set():
            await remember(db, 3, "late")
            await building.start()
            await raw.execute(f"LOCK TABLE elizasql.{part} IN SHARE ROW EXCLUSIVE MODE")
            begun.set()
        return await held(self)

    monkeypatch.setattr(module, "_TRIES", 0)
    monkeypatch.setattr(module._Move, "_switch_while_writers_wait", behind_a_build)
    moving = asyncio.ensure_future(db.reembed(NEW, embedder(NEW)))
    try:
        await begun.wait()
        await blocked_pid(raw, moving)
        await other.create_memory({"content": {"url": "no vector"}}, "messages")
        await building.commit()
        assert (await moving).embedded == 7
        assert await check_end(raw, db.agent_id) == 7
    finally:
        await raw.close()


async def test_no_limit_of_the_servers_own_ends_the_switch_while_embed_works(
    make_db: MakeAdapter, raw: Raw, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction stands idle for as long as `embed` takes."""
    limits = ["idle_in_transaction_session_timeout"]
    if raw.get_server_version().major >= 17:
        limits.append("transaction_timeout")
    db = await make_db(dsn=with_query(dsn, **dict.fromkeys(limits[1:], "40s")))
    await remember(db, 4)
    held, put = module._Move._switch_while_writers_wait, module._Move._put
    found: list[dict[str, str]] = []

    async def late(self: module._Move) -> int:
        await remember(db, 3, "late")
        return await held(self)

    async def look(self: module._Move, executor: Executor, rows: Sequence[Any]) -> int:
        if executor.in_transaction:
            found.append(dict(await executor.fetch(SQL["get_settings"], names=limits)))
        return await put(self, executor, rows)

    monkeypatch.setattr(module, "_TRIES", 0)
    monkeypatch.setattr(module._Move, "_switch_while_writers_wait", late)
    monkeypatch.setattr(module._Move, "_put", look)
    assert (await db.reembed(NEW, embedder(NEW))).embedded == 7
    assert found == [dict.fromkeys(limits, "0")]


async def test_what_is_abandoned_while_writers_wait_ends(
    db: DatabaseAdapter, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    await remember(db, 4)
    held, made = module._Move._switch_while_writers_wait, embedder(NEW)
    asked: list[int] = []

    async def abandoned(self: module._Move) -> int:
        await remember(db, 3, "late")
        await raw.execute(
            "UPDATE elizasql.reembeddings SET source = target, target = NULL WHERE agent_id = $1", db.agent_id
        )
        asked.clear()
        return await held(self)

    def embed(texts: list[str]) -> Any:
        asked.append(len(texts))
        assert len(asked) < 20
        return made(texts)

    monkeypatch.setattr(module, "_TRIES", 0)
    monkeypatch.setattr(module._Move, "_switch_while_writers_wait", abandoned)
    with pytest.raises(ReembeddingError, match="abandoned"):
        await db.reembed(NEW, embed)
    assert len(asked) == 1


# --- others learn of it ----------------------------------------------------------------------------------------------

STALE: dict[str, Callable[[DatabaseAdapter, int], Awaitable[Any]]] = {
    "create": lambda db, width: db.create_memory(memory("s", width), "messages"),
    "create, unique undecided": lambda db, width: db.create_memory(memory("s", width, unique=None), "messages"),
    "create many": lambda db, width: db.create_memories([memory(f"s {n}", width) for n in range(3)], "messages"),
    "upsert": lambda db, width: db.upsert_memories([memory("s", width, id=UUID(int=7))], "messages"),
    "update": lambda db, width: db.update_memory({"id": UUID(int=7), "embedding": vector_of("s", width)}),
    "search": lambda db, width: db.search_memories(embedding=vector_of("s", width), table_name="messages"),
    "search in a room": lambda db, width: db.search_memories(
        embedding=vector_of("s", width), table_name="messages", room_id=uuid4()
    ),
    "search of an entity": lambda db, width: db.search_memories(
        embedding=vector_of("s", width), table_name="messages", entity_id=uuid4()
    ),
    "search in a world": lambda db, width: db.search_memories(
        embedding=vector_of("s", width), table_name="messages", world_id=uuid4()
    ),
}


@pytest.mark.parametrize("cleaned", [True, False])
async def test_an_adapter_that_missed_the_switch_learns_by_its_next_vector(
    make_db: MakeAdapter, raw: Raw, round_trips: list[str], monkeypatch: pytest.MonkeyPatch, cleaned: bool
) -> None:
    db = await make_db()
    await db.create_memory(memory("there", id=UUID(int=7)), "messages")
    await remember(db, 5)
    stale = {(name, way): await make_db(db.agent_id) for name in STALE for way in ("plain", "hnsw", "bound", "asks")}
    if not cleaned:

        async def end(*args: Any) -> Any:
            raise InterruptedError

        monkeypatch.setattr(module.Reembedding, "_drop_leaving", end)
    with contextlib.nullcontext() if cleaned else pytest.raises(InterruptedError):
        await db.reembed(NEW, embedder(NEW))
    before = {id: list(widths) for id, widths in (await vectors(raw, db.agent_id)).items()}
    for (name, way), adapter in stale.items():
        if way == "asks":  # what has the new width is taken by those who do not know it, too
            continue
        if way == "hnsw":
            adapter._measured["messages", 100, (None, None, None)] = (True, "100", float("inf"))
        round_trips.clear()
        with pytest.raises(EmbeddingDimensionError, match="Cannot change") as caught:
            if way == "bound":
                async with adapter.transaction() as tx:
                    await STALE[name](tx, OLD)
            else:
                await STALE[name](adapter, OLD)
        assert (caught.value.agent_id, caught.value.locked, caught.value.given) == (db.agent_id, NEW, OLD)
        assert caught.value.statement is not None, "the database refused it"
        if way != "bound":
            assert len(round_trips) == 1
            assert adapter._dimension == NEW, "and told why"
    assert {id: list(widths) for id, widths in (await vectors(raw, db.agent_id)).items()} == before
    for (name, _), adapter in stale.items():
        await STALE[name](adapter, NEW)


async def test_the_resident_tier_learns_too(make_db: MakeAdapter, raw: Raw) -> None:
    db = await make_db()
    await remember(db, 30)
    stale = await make_db(db.agent_id, resident="required")
    await check_search(stale, raw, OLD)
    assert (await stale.stats())["resident"]["vectors"] == 30
    await db.reembed(NEW, embedder(NEW))
    with pytest.raises(EmbeddingDimensionError) as caught:
        await stale.search_memories(embedding=vector_of("x", OLD), table_name="messages")
    assert (caught.value.locked, caught.value.statement) == (NEW, "check_resident")
    assert (await stale.stats())["resident"]["vectors"] == 0
    await check_search(stale, raw)
    assert (await stale.stats())["resident"]["vectors"] == 30


async def test_the_resident_tier_counts_the_vectors_in_force_alone(make_db: MakeAdapter, raw: Raw) -> None:
    """What the move has made already does not make a type too large."""
    db = await make_db()
    await remember(db, 100)
    await broken_off(db, NEW, 4, size=20)
    searching = await make_db(db.agent_id, resident="required", resident_max_vectors=150)
    assert sum(len(widths) for widths in (await vectors(raw, db.agent_id)).values()) > 150
    await searching.search_memories(embedding=vector_of("x", OLD), table_name="messages")
    told = (await searching.stats())["resident"]
    assert (told["loads"], told["hits"], told["vectors"]) == (1, 1, 100)


# --- one at a time ---------------------------------------------------------------------------------------------------


async def broken_off(db: DatabaseAdapter, to: int, after: int, model: str = "", size: int = 2) -> None:
    """Begin a move, or go on with it, and break it off after some batches."""
    calls = itertools.count(-1)

    def embed(texts: list[str]) -> Any:
        if next(calls) == after:
            raise InterruptedError
        return [vector_of(f"{model}{text}", to) for text in texts]

    with pytest.raises(InterruptedError):
        await db.reembed(to, embed, batch_size=size)


async def test_another_width_waits_until_the_move_is_abandoned(
    db: DatabaseAdapter, make_db: MakeAdapter, raw: Raw
) -> None:
    assert await db.abandon_reembedding() == 0
    await remember(db, 7)
    await broken_off(db, NEW, 2)
    other = await make_db(db.agent_id)
    for to in (768, OLD):
        with pytest.raises(ReembeddingError, match=r"from 384 to 512 dimensions: .*abandon_reembedding\(\)") as caught:
            await other.reembed(to, embedder(to))
        assert caught.value.missing == ()
    assert await other.abandon_reembedding() == 4
    assert await other.abandon_reembedding() == 0
    await check_end(raw, db.agent_id, OLD)
    await check_search(db, raw, OLD)
    assert (await other.reembed(768, embedder(768))).embedded == 7
    await check_end(raw, db.agent_id, 768)


async def test_a_move_does_not_go_on_with_another_model(db: DatabaseAdapter) -> None:
    await remember(db, 7)
    await broken_off(db, NEW, 2)
    calls: list[list[str]] = []

    def other(texts: list[str]) -> Any:
        calls.append(texts)
        return [vector_of(f"another model's {text}", NEW) for text in texts]

    with pytest.raises(ReembeddingError, match=r"another model .*abandon_reembedding\(\)"):
        await db.reembed(NEW, other)
    assert [len(texts) for texts in calls] == [1]
    # The same one, but for rounding.
    rounded = await db.reembed(NEW, lambda texts: [vector_of(text, NEW).astype(np.float16) for text in texts])
    assert rounded.embedded == 3


async def test_a_move_that_is_abandoned_while_it_runs_ends(db: DatabaseAdapter, make_db: MakeAdapter, raw: Raw) -> None:
    await remember(db, 9)
    other = await make_db(db.agent_id)
    calls = itertools.count()

    async def embed(texts: list[str]) -> Any:
        if next(calls) == 3:
            assert await other.abandon_reembedding() == 4
        return [vector_of(text, NEW) for text in texts]

    with pytest.raises(ReembeddingError, match="was abandoned"):
        await db.reembed(NEW, embed, batch_size=2)
    assert next(calls) == 4, "no more was embedded"
    await check_end(raw, db.agent_id, OLD)


@pytest.mark.parametrize("at", [0, 1, 2])
async def test_a_run_that_was_abandoned_stores_nothing_in_the_move_of_another_model(
    db: DatabaseAdapter, make_db: MakeAdapter, raw: Raw, at: int
) -> None:
    """Both move to one width, and `embed` may take long: half of the vectors by another model find nothing."""
    await remember(db, 9)
    await broken_off(db, NEW, 1)
    other = await make_db(db.agent_id)
    calls = itertools.count()  # 0 is the one text that is tried

    async def embed(texts: list[str]) -> Any:
        if next(calls) == at:
            await other.abandon_reembedding()
            await broken_off(other, NEW, 1, "another model's ")
        return [vector_of(text, NEW) for text in texts]

    with pytest.raises(ReembeddingError, match="was abandoned"):
        await db.reembed(NEW, embed, batch_size=2)
    assert next(calls) == at + 1, "no more was embedded"
    made = [each[NEW].tolist() for each in (await vectors(raw, db.agent_id)).values() if NEW in each]
    theirs = [vector_of(f"another model's text {number}", NEW).tolist() for number in range(9)]
    assert len(made) == 2 and all(vector in theirs for vector in made)
    await broken_off(other, NEW, 2, "another model's ")


async def test_a_run_that_was_abandoned_does_not_switch_to_the_move_of_another_model(
    db: DatabaseAdapter, make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    await remember(db, 3)
    other = await make_db(db.agent_id)
    real = module._Move._switch

    async def late(self: module._Move) -> bool:
        if self._store is other:
            raise InterruptedError
        await other.abandon_reembedding()
        with pytest.raises(InterruptedError):
            await other.reembed(NEW, lambda texts: [vector_of(f"another model's {text}", NEW) for text in texts])
        return await real(self)

    monkeypatch.setattr(module._Move, "_switch", late)
    with pytest.raises(ReembeddingError, match="was abandoned"):
        await db.reembed(NEW, embedder(NEW))
    assert await db.get_embedding_dimension() == OLD


async def test_a_run_that_another_has_finished_drops_nothing_that_is_in_force(
    db: DatabaseAdapter, make_db: MakeAdapter, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was about to drop what has lost its text: by now a memory without one may have a vector of that width."""
    await remember(db, 3)
    other = await make_db(db.agent_id)
    execute = db._background.execute
    made: list[UUID] = []

    async def end(*args: Any) -> Any:
        raise InterruptedError

    async def late(statement: Any, **params: Any) -> None:
        if statement.name == "drop_textless_reembeddings":
            with pytest.raises(InterruptedError):
                await other.reembed(NEW, embedder(NEW))
            made.append(await other.create_memory(memory(None, NEW), "messages"))
        await execute(statement, **params)

    monkeypatch.setattr(other, "_drop_leaving", end)
    monkeypatch.setattr(db._background, "execute", late)
    assert (await db.reembed(NEW, embedder(NEW))).dropped == 3
    assert len(made) == 1 and made[0] in await vectors(raw, db.agent_id)


async def test_a_move_to_another_width_that_came_first_is_left_as_it_is(
    db: DatabaseAdapter, make_db: MakeAdapter, raw: Raw
) -> None:
    """It begins while this run tries `embed`, and may be running: what it skips is its own matter."""
    await remember(db, 3)
    other = await make_db(db.agent_id)

    async def embed(texts: list[str]) -> Any:
        await broken_off(other, 768, 0)
        return [vector_of(text, NEW) for text in texts]

    with pytest.raises(ReembeddingError, match="from 384 to 768 dimensions"):
        await db.reembed(NEW, embed, skip_missing=True)
    (move,) = await raw.fetch("SELECT target, skip_missing FROM elizasql.reembeddings WHERE agent_id = $1", db.agent_id)
    assert tuple(move) == (768, False)


async def test_two_that_move_at_once_do_it_once(db: DatabaseAdapter, make_db: MakeAdapter, raw: Raw) -> None:
    await remember(db, 40)
    movers = [db, *[await make_db(db.agent_id, application_name=f"mover {number}") for number in range(2)]]
    done = await asyncio.gather(*(mover.reembed(NEW, embedder(NEW), batch_size=3) for mover in movers))
    assert {each.dimension for each in done} == {NEW}
    assert sum(each.dropped for each in done) == 40
    assert await check_end(raw, db.agent_id) == 40


@pytest.mark.parametrize("to", [NEW, 768])
async def test_cleaning_up_that_was_broken_off_is_finished_by_the_next_run(
    db: DatabaseAdapter, raw: Raw, monkeypatch: pytest.MonkeyPatch, to: int
) -> None:
    await remember(db, 6)
    with monkeypatch.context() as patch, pytest.raises(asyncio.CancelledError):

        async def end(*args: Any) -> Any:
            raise asyncio.CancelledError

        patch.setattr(module.Reembedding, "_drop_leaving", end)
        await db.reembed(NEW, embedder(NEW))
    assert {tuple(sorted(each)) for each in (await vectors(raw, db.agent_id)).values()} == {(OLD, NEW)}
    await db.get_embedding_dimension()
    await check_search(db, raw)
    done = await db.reembed(to, embedder(to))
    assert (done.embedded, done.dropped) == ((0, 6) if to == NEW else (6, 12))
    await check_end(raw, db.agent_id, to)


# --- raw SQL ---------------------------------------------------------------------------------------------------------


async def test_what_is_deleted_meanwhile_does_not_end_the_cleaning_up(
    db: DatabaseAdapter, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch gives one less than it looked at."""
    monkeypatch.setattr(module, "_DROPPED_AT_ONCE", 10)
    ids = sorted(await remember(db, 25))
    fetch_row, transaction = db._background.fetch_row, raw.transaction()
    batches: list[str] = []

    async def overtaken(statement: Any, **params: Any) -> Any:
        call = asyncio.ensure_future(fetch_row(statement, **params))
        batches.append(statement.name)
        if statement.name == "drop_leaving_embeddings" and params["first"] == UUID(int=0):
            await blocked_pid(raw, call)
            await transaction.commit()
        return await call

    drop_leaving = db._drop_leaving

    async def begin_to_delete(source: int) -> Any:
        await transaction.start()
        await raw.execute("DELETE FROM elizasql.memories WHERE agent_id = $1 AND id = $2", db.agent_id, ids[3])
        return await drop_leaving(source)

    monkeypatch.setattr(db._background, "fetch_row", overtaken)
    monkeypatch.setattr(db, "_drop_leaving", begin_to_delete)
    done = await db.reembed(NEW, embedder(NEW))
    assert (done.dimension, done.dropped) == (NEW, 24)
    assert batches.count("drop_leaving_embeddings") == 4, "of ten, ten and five; and none is left"
    assert [set(found) for found in (await vectors(raw, db.agent_id)).values()] == [{NEW}] * 24
    assert await raw.fetchval("SELECT count(*) FROM elizasql.reembeddings WHERE agent_id = $1", db.agent_id) == 0


async def test_another_run_that_says_otherwise_about_what_has_no_text(db: DatabaseAdapter, raw: Raw) -> None:
    """The server goes by the later one: this one's switch could be refused for ever."""
    await remember(db, 3)
    await db.create_memory(memory(None), "messages")

    async def embed(texts: list[str]) -> Any:
        await raw.execute("UPDATE elizasql.reembeddings SET skip_missing = FALSE WHERE agent_id = $1", db.agent_id)
        return embedder(NEW)(texts)

    with pytest.raises(ReembeddingError, match="skip_missing=False"):
        await db.reembed(NEW, embed, skip_missing=True)
    assert await db.get_embedding_dimension() == OLD


async def test_raw_sql_cannot_switch_too_early_nor_write_what_is_not_in_force(db: DatabaseAdapter, raw: Raw) -> None:
    ids = sorted(await remember(db, 6))
    await broken_off(db, NEW, 2)
    insert = (
        'INSERT INTO elizasql.embeddings (agent_id, memory_id, type, "unique", dimension, dim_{width}) '
        "VALUES ($1, $2, 'messages', TRUE, {width}, $3::text::vector) "
        "ON CONFLICT (agent_id, memory_id, dimension) DO UPDATE SET dim_{width} = excluded.dim_{width}"
    )

    async def write(width: int, id: UUID) -> None:
        await raw.execute(insert.format(width=width), db.agent_id, id, str(vector_of("raw", width).tolist()))

    async def switch(width: int | None) -> None:
        await raw.execute("UPDATE elizasql.agents SET embedding_dimension = $1 WHERE id = $2", width, db.agent_id)

    with pytest.raises(asyncpg.CheckViolationError, match="memories lack a vector") as early:
        await switch(NEW)
    assert early.value.constraint_name == "reembeddings_complete"
    for width in (768, None):
        with pytest.raises(asyncpg.CheckViolationError, match="Cannot change embedding dimension"):
            await switch(width)
    for id in (ids[0], ids[5]):
        for width in (NEW, 768):
            with pytest.raises(asyncpg.ForeignKeyViolationError, match=f"has vectors of width 384, not {width}"):
                await write(width, id)
    await write(OLD, ids[0])
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await raw.execute(
            "UPDATE elizasql.embeddings SET dimension = 768, dim_384 = NULL, dim_768 = $2::text::vector "
            "WHERE agent_id = $1 AND dimension = 384",
            db.agent_id,
            str(vector_of("raw", 768).tolist()),
        )
    async with raw.transaction(isolation="repeatable_read"):
        with pytest.raises(asyncpg.InvalidTransactionStateError, match="read committed"):
            async with raw.transaction():
                await switch(NEW)
    await db.reembed(NEW, embedder(NEW))
    assert await check_end(raw, db.agent_id) == 6


async def test_the_isolation_level_is_ours(db: DatabaseAdapter, make_db: MakeAdapter, dsn: str) -> None:
    """Under another one the checks for near-duplicates and of the switch would miss what was committed meanwhile."""
    await remember(db, 3)
    setting = "default_transaction_isolation=repeatable%20read"
    strict = await make_db(db.agent_id, dsn=f"{dsn}{'&' if '?' in dsn else '?'}{setting}", pool_max_size=6)
    alike = [memory("the same", unique=None) for _ in range(6)]
    await asyncio.gather(*(strict.create_memory(each, "thoughts") for each in alike))
    assert [each.unique for each in await db.get_memories(table_name="thoughts")].count(True) == 1
    assert (await strict.reembed(NEW, embedder(NEW))).dropped == 9


async def test_vectors_of_another_agent_stand_in_for_none(db: DatabaseAdapter, make_db: MakeAdapter, raw: Raw) -> None:
    """Its memories have the same ids and the same texts, and have moved already."""
    other = await make_db(await neighbour_of(db.agent_id, raw))
    memories = [memory(f"text {number}", id=uuid4()) for number in range(3)]
    for each in (db, other):
        await each.create_memories(memories, "messages")
    await other.reembed(NEW, embedder(NEW))
    await broken_off(db, NEW, 0)
    with pytest.raises(asyncpg.CheckViolationError, match="memories lack a vector"):
        await raw.execute("UPDATE elizasql.agents SET embedding_dimension = $1 WHERE id = $2", NEW, db.agent_id)
    assert (await db.reembed(NEW, embedder(NEW))).embedded == 3
    for each in (db, other):
        assert await check_end(raw, each.agent_id) == 3


async def test_raw_sql_may_switch_what_is_complete(db: DatabaseAdapter, raw: Raw, monkeypatch: Any) -> None:
    await remember(db, 4)

    async def end(self: Any) -> Any:
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(module._Move, "_switch", end)
        await db.reembed(NEW, embedder(NEW))
    switch = "UPDATE elizasql.agents SET embedding_dimension = $1 WHERE id = $2", NEW, db.agent_id
    with pytest.raises(asyncpg.PostgresError, match="read committed"):
        async with raw.transaction(isolation="repeatable_read"):
            await raw.execute(*switch)
    await raw.execute(*switch)
    assert (await db.reembed(NEW, embedder(NEW))).dropped == 4
    await check_end(raw, db.agent_id)


async def test_rebuilding_the_index_meanwhile_is_about_the_width_in_force(db: DatabaseAdapter, raw: Raw) -> None:
    await remember(db, 20)

    async def embed(texts: list[str]) -> Any:
        await remember(db, 1, str(uuid4()))
        await db.index_memories(rebuild=True)
        return [vector_of(text, NEW) for text in texts]

    await broken_off(db, NEW, 3)
    await db.index_memories(rebuild=True)
    assert (await db.stats())["unindexed"] == 0
    await check_search(db, raw, OLD)
    calls = itertools.count(-1)
    await db.reembed(NEW, lambda texts: embed(texts) if next(calls) < 2 else embedder(NEW)(texts), batch_size=7)
    await check_search(db, raw)
    await check_end(raw, db.agent_id)


# --- killed at any point ---------------------------------------------------------------------------------------------


class Mover:
    """A process that reembeds, step by step."""

    def __init__(self, dsn: str, agent_id: UUID) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.reembed_worker", dsn, str(agent_id), str(NEW)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(elizasql.__file__).parents[1],
            env=dict(os.environ),
        )

    def step(self) -> str:
        """Let it go on to its next event; "" when it has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        event = self.process.stdout.readline().strip()
        if event not in ("", "done"):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return event

    def end(self, *, kill: bool) -> None:
        if kill:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate(timeout=60)


class World:
    """An agent that works while it is moved: it writes, searches and checks what it finds."""

    def __init__(self, adapters: list[DatabaseAdapter], raw: Raw, chance: random.Random) -> None:
        self.adapters = adapters
        self.raw = raw
        self.chance = chance
        self.agent = adapters[0].agent_id
        self.anchors: dict[UUID, str] = {}
        self.ids: list[UUID] = []
        self.done = dict.fromkeys(("create", "update", "rewrite", "delete", "search"), 0)

    async def begin(self) -> None:
        # Of this world alone: HNSW finds its way badly among the equal vectors of many agents.
        word = str(uuid4())
        ids = await remember(self.adapters[0], 20, word)
        self.anchors = {id: f"{word} {number}" for number, id in enumerate(ids)}

    async def work(self) -> None:
        """Do something through some of the adapters at once; who knows the old width only, learns."""

        async def act(db: DatabaseAdapter, what: str) -> None:
            with contextlib.suppress(EmbeddingDimensionError):
                await getattr(self, what)(db, db._dimension)
                self.done[what] += 1

        chosen = [db for db in self.adapters if self.chance.random() < 0.4]
        await asyncio.gather(*(act(db, self.chance.choice(list(self.done))) for db in chosen))

    async def create(self, db: DatabaseAdapter, width: int) -> None:
        made = await db.create_memories([memory(str(uuid4()), width) for _ in range(2)], "messages")
        self.ids += made

    async def update(self, db: DatabaseAdapter, width: int) -> None:
        if self.ids:
            text = str(uuid4())
            await db.update_memory(
                {"id": self.chance.choice(self.ids), "content": {"text": text}, "embedding": vector_of(text, width)}
            )

    async def rewrite(self, db: DatabaseAdapter, width: int) -> None:
        """Change a text alone, by raw SQL, and before the switch: behind it the vector would stay as it is."""
        if self.ids:
            async with db._executor.transaction() as tx:
                await tx._connection.execute(  # type: ignore[attr-defined]
                    "UPDATE elizasql.memories SET content = jsonb_build_object('text', gen_random_uuid()::text) "
                    "WHERE agent_id = $1 AND id = $2 AND EXISTS (SELECT FROM elizasql.agents WHERE id = $1 AND "
                    "embedding_dimension = $3 FOR KEY SHARE)",
                    self.agent, self.chance.choice(self.ids), OLD,
                )  # fmt: skip

    async def delete(self, db: DatabaseAdapter, width: int) -> None:
        if len(self.ids) > 30:
            await db.delete_memory(self.ids.pop(self.chance.randrange(len(self.ids))))

    async def search(self, db: DatabaseAdapter, width: int) -> None:
        hits = await db.search_memories(
            embedding=vector_of("x", width), table_name="messages", count=10_000, include_embedding=True
        )
        found = {hit.id: hit.embedding for hit in hits}
        assert len(found) == len(hits)
        assert all(vector is not None and vector.shape == (width,) for vector in found.values()), "a mix of widths"
        for id, text in self.anchors.items():
            assert found[id].tolist() == vector_of(text, width).tolist(), "a memory is missing"  # type: ignore[union-attr]

    async def check(self) -> None:
        """Look at the tables: of the width in force no memory's vector is missing."""
        rows = await self.raw.fetch(
            """SELECT m.id, (SELECT count(*) FROM elizasql.embeddings AS e
                WHERE e.agent_id = a.id AND e.memory_id = m.id AND e.dimension = a.embedding_dimension) AS vectors
            FROM elizasql.agents AS a INNER JOIN elizasql.memories AS m ON a.id = m.agent_id WHERE a.id = $1""",
            self.agent,
        )
        assert {row["vectors"] for row in rows} == {1}
        assert {row["id"] for row in rows} >= set(self.anchors)


async def move_and_kill(make_db: MakeAdapter, dsn: str, raw: Raw, seed: int) -> dict[str, int]:
    """Move an agent that works, kill the mover twice at points of chance, and go on to the end."""
    chance = random.Random(seed)
    first = await make_db()
    second = await make_db(first.agent_id, indexing="background", index_interval=0.3, application_name="second")
    world = World([first, second], raw, chance)
    await world.begin()
    working = asyncio.ensure_future(world.work())
    # Early ones are of the beginning and of the first pass, late ones of further passes, the switch and cleaning up.
    for steps in (chance.randrange(1, 30), chance.randrange(10, 80), None):
        mover = Mover(dsn, world.agent)
        try:
            for _ in itertools.count() if steps is None else range(steps):
                # Some of it goes on for several steps: in the last resort of a move writers wait.
                if working.done():
                    working.result()
                    working = asyncio.ensure_future(world.work())
                if await asyncio.to_thread(mover.step) in ("", "done"):
                    break
        finally:
            await asyncio.to_thread(mover.end, kill=steps is not None)
        assert steps is not None or mover.process.returncode == 0
        await working
        await world.check()
    await check_end(raw, world.agent)
    assert (await first.reembed(NEW, embedder(NEW))).embedded == 0
    for db in world.adapters:
        assert await db.get_embedding_dimension() == NEW
        await check_search(db, raw)
        await world.search(db, NEW)
    return world.done


async def test_killed_at_any_point_while_the_agent_works(make_db: MakeAdapter, dsn: str, raw: Raw) -> None:
    done = await move_and_kill(make_db, dsn, raw, random.randrange(2**32))
    assert done["search"], done


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(25))
async def test_the_same_many_times(make_db: MakeAdapter, dsn: str, raw: Raw, seed: int) -> None:
    await move_and_kill(make_db, dsn, raw, seed)


@pytest.fixture
async def events(make_db: MakeAdapter, dsn: str) -> list[str]:
    """Give the events of a move of six memories, in the order in which they come."""
    db = await make_db()
    await remember(db, 6)
    mover = Mover(dsn, db.agent_id)
    found = []
    try:
        while (event := await asyncio.to_thread(mover.step)) not in ("", "done"):
            found.append(event)
    finally:
        mover.end(kill=True)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_killed_at_each_point_once(make_db: MakeAdapter, dsn: str, raw: Raw, events: list[str]) -> None:
    assert {event.split()[1] for event in events} >= {"switch_dimension", "drop_leaving_embeddings", "put_reembeddings"}
    for number, event in enumerate(events):
        db = await make_db()
        await remember(db, 6)
        mover = Mover(dsn, db.agent_id)
        for _ in range(number):
            await asyncio.to_thread(mover.step)
        assert mover.process.stdout is not None
        assert await asyncio.to_thread(mover.process.stdout.readline) == f"{event}\n"
        await asyncio.to_thread(mover.end, kill=True)
        width = await db.get_embedding_dimension()
        assert width is not None
        await check_search(db, raw, width)
        await db.reembed(NEW, embedder(NEW))
        assert await check_end(raw, db.agent_id) == 6
        await db.close()
