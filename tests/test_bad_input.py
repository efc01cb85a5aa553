"""What is refused before anything is sent, by the memory methods above all; and what they convert, exactly."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pgvector
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from elizasql import ArgumentError, DatabaseAdapter, EmbeddingDimensionError, EmbeddingError, Memory, Room, _codecs
from elizasql._statements import SQL
from elizasql.types import DIMENSIONS

from .conftest import MakeAdapter, Scene

Call = Callable[[DatabaseAdapter, Any], Awaitable[Any]]

WIDTH = 384
ID = UUID(int=7)
NAIVE = datetime(2025, 1, 1)  # noqa: DTZ001


@contextmanager
def refused(error: type[ArgumentError], round_trips: list[str], case: str, match: str | None = None) -> Iterator[None]:
    """Expect an error of exactly this class, with nothing sent to the server."""
    round_trips.clear()
    with pytest.raises(ArgumentError, match=match) as caught:
        yield
        pytest.fail(f"{case} was accepted")
    assert caught.type is error, case
    assert round_trips == [], case


def ones(width: int = WIDTH, **changes: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    vector = np.ones(width, np.float32)
    for position, value in changes.items():
        vector[int(position.removeprefix("at"))] = value
    return vector


# --- embeddings that are refused ---

TAKES_EMBEDDING: dict[str, Call] = {
    "create_memory": lambda db, v: db.create_memory({"content": {}, "embedding": v}, "messages"),
    "create_memory given unique": lambda db, v: db.create_memory(
        {"content": {}, "embedding": v}, "messages", unique=True
    ),
    "create_memory of a model": lambda db, v: db.create_memory(Memory(content={}, embedding=v), "messages"),
    "create_memories": lambda db, v: db.create_memories(
        [{"content": {}, "embedding": ones()}, {"content": {}, "embedding": v}], "messages"
    ),
    "create_memories wrapped": lambda db, v: db.create_memories(
        [{"memory": {"content": {}, "embedding": v}, "tableName": "messages", "unique": True}]
    ),
    "upsert_memories": lambda db, v: db.upsert_memories(
        [{"content": {}, "embedding": ones()}, {"content": {}, "embedding": v}], "messages"
    ),
    "load_memories": lambda db, v: db.load_memories(
        [{"content": {}, "embedding": ones()}, {"content": {}, "embedding": v}], "messages"
    ),
    "update_memory": lambda db, v: db.update_memory({"id": ID, "embedding": v}),
    "update_memories": lambda db, v: db.update_memories([{"id": ID, "embedding": v}]),
}
SEARCHES: dict[str, Call] = {
    "search_memories": lambda db, v: db.search_memories(embedding=v, table_name="messages"),
    "search_memories of a room": lambda db, v: db.search_memories(embedding=v, table_name="messages", room_id=ID),
    "search_memories_by_embedding": lambda db, v: db.search_memories_by_embedding(v, table_name="messages"),
}

# A component below this is zero in the index; one above 65504 is infinite there.
SMALLEST = 2.0**-24

BAD_EMBEDDINGS: dict[str, Any] = {
    "NaN": ones(at3=math.nan),
    "only NaN": np.full(WIDTH, np.nan, np.float32),
    "infinity": ones(at383=math.inf),
    "minus infinity": ones(at0=-math.inf),
    "NaN in float64": np.full(WIDTH, np.nan),
    "NaN in a list": [math.nan, *[1.0] * (WIDTH - 1)],
    "infinity in float16": np.full(WIDTH, np.inf, np.float16),
    "infinity in a list": [math.inf, *[1.0] * (WIDTH - 1)],
    "zeros": np.zeros(WIDTH, np.float32),
    "minus zeros": np.full(WIDTH, -0.0, np.float32),
    "zeros in a list": [0] * WIDTH,
    "all below the smallest": np.full(WIDTH, np.nextafter(np.float32(SMALLEST), np.float32(0)), np.float32),
    "1e-30, whose square is zero": np.full(WIDTH, 1e-30),
    "float64 that is zero as float32": np.full(WIDTH, 1e-300),
    "1e30, whose square is infinite": np.full(WIDTH, 1e30),
    "1e39, infinite as float32": np.full(WIDTH, 1e39),
    "-1e39": np.full(WIDTH, -1e39),
    "one 1e39": np.append(np.ones(WIDTH - 1), 1e39),
    "just above 65504": ones(at5=float(np.nextafter(np.float32(65504), np.float32(np.inf)))),
    "just below -65504": ones(at5=-65505),
    "integers beyond 65504": np.full(WIDTH, 65505, np.int64),
    "integers as wide as float32, whose squares wrap around": np.full(WIDTH, 65536 + 96, np.int32),
    "integers beyond 64 bits": [2**70] * WIDTH,
    "two axes": np.ones((1, WIDTH), np.float32),
    "a column": np.ones((WIDTH, 1), np.float32),
    "nested list": [[1.0] * WIDTH],
    "ragged list": [[1.0], [1.0, 2.0]],
    "no axis": np.float32(1.0),
    "no axis, an array": np.array(1.0),
    "a number": 1.0,
    "complex": np.ones(WIDTH, np.complex64),
    "complex list": [1j] * WIDTH,
    "booleans": np.ones(WIDTH, bool),
    "list of booleans": [True] * WIDTH,
    "text": "1" * WIDTH,
    "vector text": str([1.0] * WIDTH),
    "list of texts": ["1.0"] * WIDTH,
    "list of letters": list("x" * WIDTH),
    "array of texts": np.full(WIDTH, "1.0"),
    "array of bytes": np.full(WIDTH, b"1"),
    "objects": np.ones(WIDTH, object),
    "list of None": [None] * WIDTH,
    "None among numbers": [None, *[1.0] * (WIDTH - 1)],
    "dates": np.zeros(WIDTH, "datetime64[s]"),
    "durations": np.ones(WIDTH, "timedelta64[s]"),
    "a structure": np.zeros(WIDTH, [("x", np.float32)]),
    "masked": np.ma.masked_array(ones(), mask=[True, *[False] * (WIDTH - 1)]),
    "empty list": [],
    "empty tuple": (),
    "empty array": np.empty(0, np.float32),
    "bytes": ones().tobytes(),
    "as many bytes as dimensions": b"\x01" * WIDTH,
    "bytearray": bytearray(b"\x01" * WIDTH),
    "view of bytes": memoryview(b"\x01" * WIDTH),
    "mapping": dict.fromkeys(range(WIDTH), 1.0),
    "set": {float(i) for i in range(WIDTH)},
    "generator": (1.0 for _ in range(WIDTH)),
    "object": object(),
    "sparse vector": pgvector.SparseVector({1: 1.0}, WIDTH),
    "unsupported width": ones(385),
    "one too few": ones(383),
    "width 1": ones(1),
    "width beyond two bytes": ones(65536 + WIDTH),
}
WRONG_WIDTHS = {
    f"{type(value).__name__} of {width}": value
    for width in DIMENSIONS
    if width != WIDTH
    for value in (ones(width), [1.0] * width, pgvector.Vector([1.0] * width))
}


@pytest.mark.parametrize("method", [*TAKES_EMBEDDING, *SEARCHES])
async def test_embeddings_that_no_agent_can_have_are_refused(
    db: DatabaseAdapter, round_trips: list[str], method: str
) -> None:
    call = (TAKES_EMBEDDING | SEARCHES)[method]
    for name, value in BAD_EMBEDDINGS.items():
        with refused(EmbeddingError, round_trips, f"{method}: {name}"):
            await call(db, value)
    assert await db.count_memories() == 0


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("NaN", "not finite as float32"),
        ("infinity", "not finite as float32"),
        ("one 1e39", "not finite as float32"),
        ("minus zeros", "a zero vector"),
        ("just below -65504", "a component of magnitude 65505; at most 65504"),
        ("all below the smallest", "no component above"),
        ("two axes", r"one axis, not shape \(1, 384\): .* row by row"),
    ],
)
def test_of_an_embedding_the_error_says_what_is_wrong(case: str, reason: str) -> None:
    with pytest.raises(EmbeddingError, match=reason):
        _codecs.as_embedding(BAD_EMBEDDINGS[case])


@pytest.mark.parametrize("method", [*TAKES_EMBEDDING, *SEARCHES])
async def test_another_width_than_the_agents_is_refused(
    db: DatabaseAdapter, round_trips: list[str], method: str
) -> None:
    call = (TAKES_EMBEDDING | SEARCHES)[method]
    for name, value in WRONG_WIDTHS.items():
        round_trips.clear()
        with pytest.raises(EmbeddingDimensionError, match="Cannot change embedding dimension") as caught:
            await call(db, value)
        # Another process may have moved the agent to this width: the server is asked for its width, and for no more.
        assert set(round_trips) <= {SQL["get_embedding_dimension"].sql}, f"{method}: {name}"
        width = value.dimensions() if isinstance(value, pgvector.Vector) else len(value)
        assert (caught.value.agent_id, caught.value.locked, caught.value.given) == (db.agent_id, WIDTH, width)
    assert await db.count_memories() == 0


@pytest.mark.parametrize("method", SEARCHES)
async def test_a_search_needs_an_embedding(db: DatabaseAdapter, round_trips: list[str], method: str) -> None:
    with refused(EmbeddingError, round_trips, method):
        await SEARCHES[method](db, None)


async def test_an_array_whose_conversion_fails_is_refused(db: DatabaseAdapter, round_trips: list[str]) -> None:
    class NeedsGrad:
        """As a torch tensor that requires a gradient."""

        def __array__(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    for method, call in (TAKES_EMBEDDING | SEARCHES).items():
        with refused(EmbeddingError, round_trips, method, "requires grad"):
            await call(db, NeedsGrad())


@pytest.mark.parametrize("value", [0, 1, 383, 385, -384, 384.0, "384", True, None, [384], math.nan, 2**40])
async def test_a_dimension_that_is_not_supported_is_refused(
    db: DatabaseAdapter, round_trips: list[str], value: Any
) -> None:
    with refused(ArgumentError, round_trips, repr(value), "dimension must be"):
        await db.ensure_embedding_dimension(value)


# --- embeddings that are converted ---


def nearest(values: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Round each number to the nearest float32, by way of the struct module's own rounding of Python numbers."""
    return np.frombuffer(b"".join(np.float32(float(value)).tobytes() for value in values), np.float32)


def bits(vector: Any) -> list[int]:
    assert isinstance(vector, np.ndarray)
    assert vector.dtype == np.float32
    return np.ascontiguousarray(vector).view(np.uint32).tolist()  # type: ignore[no-any-return]


class Tensor:
    """An array of another library."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.values, dtype)


def read_only(vector: Any) -> Any:
    vector.flags.writeable = False
    return vector


RANDOM = np.random.default_rng(11).normal(size=WIDTH)
GOOD_EMBEDDINGS: dict[str, Any] = {
    "float32": RANDOM.astype(np.float32),
    "float16": RANDOM.astype(np.float16),
    "float64": RANDOM,
    "longdouble": RANDOM.astype(np.longdouble),
    "big-endian float32": RANDOM.astype(">f4"),
    "big-endian float64": RANDOM.astype(">f8"),
    "big-endian float16": RANDOM.astype(">f2"),
    "strided": np.repeat(RANDOM.astype(np.float32), 3)[::3],
    "backwards": RANDOM.astype(np.float32)[::-1],
    "a column of a matrix": np.asfortranarray(RANDOM.astype(np.float32).reshape(WIDTH, 1).repeat(2, 1))[:, 1],
    "unaligned": np.frombuffer(b"\x00" + RANDOM.astype(np.float32).tobytes(), np.uint8)[1:].view(np.float32),
    "read-only": read_only(RANDOM.astype(np.float32)),
    "int8": np.arange(WIDTH).astype(np.int8),
    "uint8": np.arange(WIDTH).astype(np.uint8),
    "int32": np.arange(-5, WIDTH - 5, dtype=np.int32),
    "int64": np.arange(-5, WIDTH - 5),
    "uint16": np.arange(WIDTH).astype(np.uint16),
    "list": RANDOM.tolist(),
    "tuple": tuple(RANDOM.tolist()),
    "list of integers": list(range(WIDTH)),
    "list of integers and floats": [1, 2.5] * (WIDTH // 2),
    "list of numpy numbers": list(RANDOM.astype(np.float32)),
    "range": range(WIDTH),
    "pgvector's vector": pgvector.Vector(RANDOM),
    "pgvector's halfvec": pgvector.HalfVector(RANDOM.astype(np.float16)),
    "another library's": Tensor(RANDOM.tolist()),
    "not normal numbers": np.append(np.full(WIDTH - 1, 1e-40, np.float32), np.float32(1)),
    "minus zeros": np.append(np.full(WIDTH - 1, -0.0, np.float32), np.float32(1)),
    "halfway between two float32": np.append(np.ones(WIDTH - 1) + 2.0**-24, 1 + 3 * 2.0**-24),
    "the smallest": np.full(WIDTH, SMALLEST),
    "the largest": np.full(WIDTH, 65504, np.float32),
    "minus the largest": [-65504] * WIDTH,
}


async def test_every_kind_of_numbers_is_stored_as_the_nearest_float32(db: DatabaseAdapter) -> None:
    for name, value in GOOD_EMBEDDINGS.items():
        numbers = value.to_list() if isinstance(value, (pgvector.Vector, pgvector.HalfVector)) else value
        expected = bits(nearest(np.asarray(numbers)))
        created = await db.create_memory({"content": {}, "embedding": value}, "messages", unique=True)
        (batched,) = await db.create_memories([{"content": {}, "embedding": value}], "messages")
        (upserted,) = await db.upsert_memories([Memory(content={}, embedding=value)], "messages")
        updated = await db.create_memory({"content": {}}, "messages")
        assert await db.update_memory({"id": updated, "embedding": value})
        found = await db.get_memories_by_ids([created, batched, upserted, updated], include_embedding=True)
        assert len(found) == 4
        for memory in found:
            assert bits(memory.embedding) == expected, name
            assert memory.embedding is not None
            assert memory.embedding.flags.writeable
        hits = await db.search_memories(embedding=value, table_name="messages", count=1, include_embedding=True)
        assert hits[0].similarity == pytest.approx(1), name


@pytest.mark.parametrize("width", DIMENSIONS)
async def test_each_supported_width_comes_back_bit_for_bit(make_db: MakeAdapter, width: int) -> None:
    db = await make_db(dimension=width)
    vector = np.random.default_rng(width).normal(size=width).astype(np.float32)
    id = await db.create_memory({"content": {}, "embedding": vector}, "messages")
    memory = await db.get_memory_by_id(id, include_embedding=True)
    assert memory is not None
    assert bits(memory.embedding) == bits(vector)


VECTORS = hnp.arrays(
    np.float32,
    WIDTH,
    elements=st.floats(-65504, 65504, width=32),
    fill=st.floats(-65504, 65504, width=32),
).filter(lambda vector: bool(np.abs(vector).max() >= SMALLEST))


@settings(max_examples=40)
@given(vector=VECTORS)
async def test_any_float32_vector_comes_back_bit_for_bit(
    db: DatabaseAdapter, vector: np.ndarray[Any, np.dtype[np.float32]]
) -> None:
    await db.upsert_memories([{"id": ID, "content": {}, "embedding": vector}], "messages")
    memory = await db.get_memory_by_id(ID, include_embedding=True)
    assert memory is not None
    assert bits(memory.embedding) == bits(vector)


@given(vector=VECTORS)
def test_the_binary_form_is_the_one_of_the_pgvector_package(vector: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    encoded = _codecs.encode_vector(_codecs.as_embedding(vector))
    assert encoded == pgvector.Vector(vector).to_binary()
    assert bits(_codecs._decode_vector(encoded)) == bits(pgvector.Vector.from_binary(encoded).to_numpy())


@given(
    values=st.lists(st.floats(-65504, 65504), min_size=WIDTH, max_size=WIDTH)
    | st.lists(st.integers(-65504, 65504), min_size=WIDTH, max_size=WIDTH)
)
@settings(max_examples=30)
def test_any_list_becomes_the_nearest_float32(values: list[float]) -> None:
    expected = nearest(values)
    if np.abs(expected).max() < SMALLEST:
        with pytest.raises(EmbeddingError):
            _codecs.as_embedding(values)
    else:
        assert bits(_codecs.as_embedding(values)) == bits(expected)


@given(
    value=st.none() | st.integers() | st.text() | st.binary() | st.lists(st.floats() | st.text() | st.none())
    | hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(max_dims=3))
)  # fmt: skip
def test_nothing_but_an_embedding_error_comes_out(value: Any) -> None:
    with pytest.raises(EmbeddingError):
        _codecs.as_embedding(value)


# --- ids ---

BAD_IDS: list[Any] = [
    "nope",
    "",
    " ",
    "00000000-0000-0000-0000-00000000000",
    "00000000-0000-0000-0000-0000000000000",
    "00000000-0000-0000-0000-00000000000g",
    "0x345678123456781234567812345678",
    "+2345678123456781234567812345678",
    " 2345678123456781234567812345678",
    "1_345678-1234-5678-1234-567812345678",
    "\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18-1234-5678-1234-567812345678",
    "00000000-0000-0000-0000-000000000007\n",
    "00000000-0000-0000-0000-000000000007\x00",
    "\ud800",
    "'; DROP TABLE elizasql.memories; --",
    7,
    7.0,
    True,
    b"00000000-0000-0000-0000-000000000007",
    ID.bytes,
    ["00000000-0000-0000-0000-000000000007"],
    {"id": "00000000-0000-0000-0000-000000000007"},
    object(),
]  # fmt: skip

OPTIONAL_IDS: dict[str, Call] = {
    "get_memories room_id": lambda db, id: db.get_memories(table_name="messages", room_id=id),
    "get_memories entity_id": lambda db, id: db.get_memories(table_name="messages", entity_id=id),
    "get_memories world_id": lambda db, id: db.get_memories(table_name="messages", world_id=id),
    "get_memories agent_id": lambda db, id: db.get_memories(table_name="messages", agent_id=id),
    "count_memories agent_id": lambda db, id: db.count_memories(agent_id=id),
    "count_memories room_id": lambda db, id: db.count_memories(id),
    "count_memories entity_id": lambda db, id: db.count_memories(entity_id=id),
    "count_memories world_id": lambda db, id: db.count_memories(world_id=id),
    "search_memories room_id": lambda db, id: db.search_memories(embedding=ones(), table_name="m", room_id=id),
    "search_memories world_id": lambda db, id: db.search_memories(embedding=ones(), table_name="m", world_id=id),
    "search_memories entity_id": lambda db, id: db.search_memories(embedding=ones(), table_name="m", entity_id=id),
    "create_memory id": lambda db, id: db.create_memory({"id": id, "content": {}}, "m"),
    "create_memory entityId": lambda db, id: db.create_memory({"entityId": id, "content": {}}, "m"),
    "create_memory roomId": lambda db, id: db.create_memory({"roomId": id, "content": {}}, "m"),
    "create_memory worldId": lambda db, id: db.create_memory({"worldId": id, "content": {}}, "m"),
    "create_memory agentId": lambda db, id: db.create_memory({"agentId": id, "content": {}}, "m"),
    "create_memory model": lambda db, id: db.create_memory(Memory(room_id=id, content={}), "m"),
    "create_memories": lambda db, id: db.create_memories([{"content": {}}, {"id": id, "content": {}}], "m"),
    "upsert_memories": lambda db, id: db.upsert_memories([{"content": {}}, {"id": id, "content": {}}], "m"),
    "load_memories": lambda db, id: db.load_memories([{"content": {}}, {"id": id, "content": {}}], "m"),
    "update_memory roomId": lambda db, id: db.update_memory({"id": ID, "roomId": id}),
    "update_memories worldId": lambda db, id: db.update_memories([{"id": ID, "worldId": id}]),
}
NEEDED_IDS: dict[str, Call] = {
    "get_memories cursor": lambda db, id: db.get_memories(
        table_name="messages", cursor=(datetime.now(timezone.utc), id)
    ),
    "get_memories cursor mapping": lambda db, id: db.get_memories(
        table_name="messages", cursor={"createdAt": 1, "id": id}
    ),
    "get_memory_by_id": lambda db, id: db.get_memory_by_id(id),
    "get_memories_by_ids": lambda db, id: db.get_memories_by_ids([ID, id]),
    "get_memories_by_room_ids": lambda db, id: db.get_memories_by_room_ids(room_ids=[ID, id], table_name="m"),
    "get_memories_by_world_id": lambda db, id: db.get_memories_by_world_id(world_id=id),
    "get_memories_by_world_id world_ids": lambda db, id: db.get_memories_by_world_id(world_ids=[ID, id]),
    "count_memories room_ids": lambda db, id: db.count_memories(room_ids=[ID, id]),
    "update_memory id": lambda db, id: db.update_memory({"id": id, "content": {}}),
    "update_memories id": lambda db, id: db.update_memories([{"id": id, "content": {}}]),
    "delete_memory": lambda db, id: db.delete_memory(id),
    "delete_memories": lambda db, id: db.delete_memories([ID, id]),
    "delete_all_memories": lambda db, id: db.delete_all_memories([ID, id], "messages"),
}


@pytest.mark.parametrize("method", [*OPTIONAL_IDS, *NEEDED_IDS])
async def test_a_malformed_id_is_refused(db: DatabaseAdapter, round_trips: list[str], method: str) -> None:
    for value in [*BAD_IDS, *([None] if method in NEEDED_IDS else [])]:
        with refused(ArgumentError, round_trips, f"{method}: {value!r}"):
            await (OPTIONAL_IDS | NEEDED_IDS)[method](db, value)
    assert await db.count_memories(table_name="m") == 0


async def test_the_error_of_a_malformed_id_names_the_argument(db: DatabaseAdapter, round_trips: list[str]) -> None:
    swept = 0
    for name, method in inspect.getmembers(DatabaseAdapter, inspect.iscoroutinefunction):
        needed = [each for each in inspect.signature(method).parameters.values() if each.default is each.empty][1:]
        if name.startswith("_") or {each.annotation for each in needed} != {"UUID | str"}:
            continue
        for bad in needed:
            given = {each.name: "nope" if each is bad else ID for each in needed}
            with refused(ArgumentError, round_trips, name, rf"^{bad.name} must be a UUID, not 'nope'"):
                await getattr(db, name)(**given)
            swept += 1
    assert swept > 50


COLLECTIONS: dict[str, Call] = {
    "get_memories_by_ids": lambda db, ids: db.get_memories_by_ids(ids),
    "get_memories_by_room_ids": lambda db, ids: db.get_memories_by_room_ids(room_ids=ids, table_name="messages"),
    "count_memories": lambda db, ids: db.count_memories(room_ids=ids),
    "delete_memories": lambda db, ids: db.delete_memories(ids),
}


@pytest.mark.parametrize("method", COLLECTIONS)
async def test_one_id_is_no_collection_of_ids(db: DatabaseAdapter, round_trips: list[str], method: str) -> None:
    # A string is a collection of its letters, and 32 hexadecimal digits of it would each be one.
    for value in (str(ID), ID, ID.bytes, 7, object()):
        with refused(ArgumentError, round_trips, f"{method}: {value!r}", "collection"):
            await COLLECTIONS[method](db, value)


@pytest.mark.parametrize(
    "text",
    [
        "01890a5d-ac96-774b-bcce-b302099a8057",
        "01890A5D-AC96-774B-BCCE-B302099A8057",
        "01890a5dac96774bbcceb302099a8057",
        "{01890a5d-ac96-774b-bcce-b302099a8057}",
        "urn:uuid:01890a5d-ac96-774b-bcce-b302099a8057",
    ],
)
def test_the_usual_texts_of_an_id_are_taken(text: str) -> None:
    id = UUID(int=0x01890A5DAC96774BBCCEB302099A8057)
    assert _codecs.as_id(text) == id
    assert _codecs.as_ids(np.array([text, id], object)) == [id, id]


def test_an_outside_id_is_refused_with_a_way_to_a_uuid() -> None:
    with pytest.raises(ArgumentError, match=r"must be a UUID, not 'telegram:4711': .*uuid5.*string_to_uuid"):
        _codecs.as_id("telegram:4711")
    with pytest.raises(ArgumentError, match=r"^id must be a UUID, not 4711$"):
        _codecs.as_id(4711)


@given(st.text(alphabet="0123456789abcdefABCDEF-_+ x{}\n\uff11\u0661", min_size=30, max_size=40))
def test_an_id_is_taken_only_when_all_its_digits_are(text: str) -> None:
    digits = text.replace("-", "").strip("{}").lower()
    try:
        id = _codecs.as_id(text)
    except ArgumentError:
        return
    assert id.hex == digits


# --- numbers, times, thresholds ---

LARGEST = 2**63 - 1
BAD_COUNTS: list[Any] = [-1, -(2**63), 2**63, 2**64, True, False, 1.0, 1.5, math.nan, "5", b"5", [5], np.float64(1)]

OPTIONAL_COUNTS: dict[str, Call] = {
    "get_memories count": lambda db, n: db.get_memories(table_name="messages", count=n),
    "get_memories limit": lambda db, n: db.get_memories(table_name="messages", limit=n),
    "get_memories offset": lambda db, n: db.get_memories(table_name="messages", offset=n),
    "get_memories count, offset": lambda db, n: db.get_memories(table_name="messages", count=n, offset=n),
    "get_memories_by_room_ids count": lambda db, n: db.get_memories_by_room_ids(
        room_ids=[ID], table_name="messages", count=n
    ),
    "get_memories_by_room_ids limit": lambda db, n: db.get_memories_by_room_ids(
        room_ids=[ID], table_name="messages", limit=n
    ),
    "get_memories_by_world_id count": lambda db, n: db.get_memories_by_world_id(world_id=ID, count=n),
    "get_memories_by_world_id limit": lambda db, n: db.get_memories_by_world_id(world_id=ID, limit=n),
    "search_memories count": lambda db, n: db.search_memories(embedding=ones(), table_name="messages", count=n),
    "search_memories limit": lambda db, n: db.search_memories(embedding=ones(), table_name="messages", limit=n),
    "search_memories_by_embedding count": lambda db, n: db.search_memories_by_embedding(
        ones(), table_name="messages", count=n
    ),
    "search_memories of a room, count": lambda db, n: db.search_memories(
        embedding=ones(), table_name="messages", room_id=ID, count=n
    ),
}
NEEDED_COUNTS: dict[str, Call] = {
    "get_cached_embeddings query_threshold": lambda db, n: db.get_cached_embeddings(
        query_table_name="messages", query_threshold=n, query_input="x"
    ),
    "get_cached_embeddings query_match_count": lambda db, n: db.get_cached_embeddings(
        query_table_name="messages", query_threshold=3, query_input="x", query_match_count=n
    ),
}


@pytest.mark.parametrize("method", [*OPTIONAL_COUNTS, *NEEDED_COUNTS])
async def test_a_count_is_a_whole_number_that_is_not_negative(
    db: DatabaseAdapter, round_trips: list[str], method: str
) -> None:
    call = (OPTIONAL_COUNTS | NEEDED_COUNTS)[method]
    for value in [*BAD_COUNTS, *([None] if method in NEEDED_COUNTS else [])]:
        with refused(ArgumentError, round_trips, f"{method}: {value!r}"):
            await call(db, value)
    await db.create_memory({"content": {"text": "x"}, "embedding": ones()}, "messages")
    # The numbers at the ends of the range are no error, nor is numpy's kind.
    for good in (0, np.int64(1), np.uint8(1), LARGEST):
        assert isinstance(await call(db, good), list), (method, good)


async def test_count_and_limit_are_one_argument(db: DatabaseAdapter, round_trips: list[str]) -> None:
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: db.get_memories(table_name="messages", count=1, limit=2),
        lambda: db.get_memories_by_room_ids(room_ids=[ID], table_name="messages", count=0, limit=1),
        lambda: db.get_memories_by_world_id(world_id=ID, count=2, limit=1),
        lambda: db.search_memories(embedding=ones(), table_name="messages", count=3, limit=0),
    ]
    for call in calls:
        with refused(ArgumentError, round_trips, "both", "count and limit"):
            await call()
    assert await db.get_memories(table_name="messages", count=1, limit=1) == []


async def test_cursor_and_offset_exclude_each_other(db: DatabaseAdapter, round_trips: list[str]) -> None:
    cursor = (datetime.now(timezone.utc), ID)
    with refused(ArgumentError, round_trips, "both", "cursor and offset"):
        await db.get_memories(table_name="messages", cursor=cursor, offset=1)
    for bad in [(), (1,), (1, ID, 2), {"id": ID}, {"createdAt": 1}, Memory(id=ID), "x", 1, [NAIVE, ID]]:
        with refused(ArgumentError, round_trips, repr(bad)):
            await db.get_memories(table_name="messages", cursor=bad)  # type: ignore[arg-type]


HUGE = pytest.param(10**400, id="huge")


@pytest.mark.parametrize(
    "value", [1.0000001, -1.0000001, 2, -2, HUGE, math.nan, math.inf, -math.inf, True, "0.5", [0.5]]
)
async def test_a_threshold_lies_between_minus_one_and_one(
    db: DatabaseAdapter, round_trips: list[str], value: Any
) -> None:
    with refused(ArgumentError, round_trips, repr(value), "match_threshold"):
        await db.search_memories(embedding=ones(), table_name="messages", match_threshold=value)
    with refused(ArgumentError, round_trips, repr(value), "match_threshold"):
        await db.search_memories_by_embedding(ones(), table_name="messages", match_threshold=value)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("unique", True, 1),
        ("unique", False, 0.0),
        ("include_embedding", True, 1.0),
        ("count", 1, True),
        ("limit", 1, 1.0),
        ("match_threshold", 1, True),
        ("ef_search", 1, True),
        ("table_name", "messages", ["messages"]),
        ("room_id", ID, {ID}),
    ],
)
async def test_what_equals_a_good_argument_is_refused_all_the_same(
    db: DatabaseAdapter, round_trips: list[str], name: str, good: Any, bad: Any
) -> None:
    """A search remembers which arguments it has checked."""
    search = functools.partial(db.search_memories, embedding=ones())
    for _ in range(2):
        assert await search(**{"table_name": "messages"} | {name: good}) == []
        with refused(ArgumentError, round_trips, f"{name}: {bad!r}", "count" if name == "limit" else name):
            await search(**{"table_name": "messages"} | {name: bad})


class Nowhere(tzinfo):
    """A time zone that does not say its distance from UTC: what has it is naive all the same."""

    def utcoffset(self, _: datetime | None) -> None:
        return None

    def dst(self, _: datetime | None) -> None:
        return None

    def tzname(self, _: datetime | None) -> str:
        return "nowhere"


class NaT(datetime):
    """As that of pandas: an instance that has no time."""

    def utcoffset(self) -> timedelta:
        raise ValueError("NaTType does not support utcoffset")


BAD_TIMES: list[Any] = [
    NAIVE,
    NaT(2025, 1, 1),
    datetime(2025, 1, 1, tzinfo=Nowhere()),
    datetime.max.replace(tzinfo=timezone(-timedelta(hours=1))),
    datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
    "2025-01-01",
    "2025-01-01T00:00:00",
    "yesterday",
    "",
    math.nan,
    math.inf,
    10**30,
    -(10**30),
    True,
    b"0",
    [0],
    timedelta(1),
]  # fmt: skip
TAKES_TIME: dict[str, Call] = {
    "get_memories start": lambda db, t: db.get_memories(table_name="messages", start=t),
    "get_memories end": lambda db, t: db.get_memories(table_name="messages", end=t),
    "get_memories cursor": lambda db, t: db.get_memories(table_name="messages", cursor=(t, ID)),
    "get_memories cursor mapping": lambda db, t: db.get_memories(
        table_name="messages", cursor={"createdAt": t, "id": ID}
    ),
    "count_memories start": lambda db, t: db.count_memories(start=t),
    "count_memories end": lambda db, t: db.count_memories(end=t),
    "create_memory": lambda db, t: db.create_memory({"content": {}, "createdAt": t}, "messages"),
    "create_memories": lambda db, t: db.create_memories([Memory(content={}, created_at=t)], "messages"),
    "load_memories": lambda db, t: db.load_memories([Memory(content={}, created_at=t)], "messages"),
    "upsert_memories": lambda db, t: db.upsert_memories([{"content": {}, "created_at": t}], "messages"),
    "update_memory": lambda db, t: db.update_memory({"id": ID, "createdAt": t}),
}


@pytest.mark.parametrize("method", TAKES_TIME)
async def test_a_time_needs_its_zone_and_a_place_in_the_calendar(
    db: DatabaseAdapter, round_trips: list[str], method: str
) -> None:
    for value in BAD_TIMES:
        with refused(ArgumentError, round_trips, f"{method}: {value!r}"):
            await TAKES_TIME[method](db, value)
    assert await db.count_memories() == 0


@given(st.integers(-62135596800000, 253402300799999))
def test_milliseconds_are_taken_exactly(milliseconds: int) -> None:
    time = _codecs.as_time(milliseconds, "time")
    assert time - datetime(1970, 1, 1, tzinfo=timezone.utc) == timedelta(milliseconds=milliseconds)


@pytest.mark.parametrize("seconds", [1_796_060_855.9, np.float64(1.7e9), np.float32(1.7e9), 1e8])
def test_seconds_are_no_milliseconds(seconds: float) -> None:
    with pytest.raises(ArgumentError, match="start looks like seconds since 1970"):
        _codecs.as_time(seconds, "start")
    assert _codecs.as_time(seconds * 1000, "start").year >= 1973
    assert _codecs.as_time(0.0, "start").year == _codecs.as_time(-seconds, "start").year + 1 == 1970


# --- types, texts, filters ---

BAD_TYPES: list[Any] = ["", 5, True, b"messages", ["messages"], {"messages"}, object(), "x" * 1025]
TAKES_TYPE: dict[str, Call] = {
    "create_memory": lambda db, kind: db.create_memory({"content": {}}, kind),
    "create_memory type": lambda db, kind: db.create_memory({"content": {}, "type": kind}),
    "create_memories": lambda db, kind: db.create_memories([{"content": {}}], kind),
    "create_memories type": lambda db, kind: db.create_memories([{"content": {}, "type": kind}]),
    "create_memories wrapped": lambda db, kind: db.create_memories([{"memory": {"content": {}}, "tableName": kind}]),
    "load_memories": lambda db, kind: db.load_memories([{"content": {}}], kind),
    "upsert_memories": lambda db, kind: db.upsert_memories([{"content": {}}], kind),
    "delete_all_memories": lambda db, kind: db.delete_all_memories(ID, kind),
    "prune_memories": lambda db, kind: db.prune_memories(kind, keep=1),
    "get_memories": lambda db, kind: db.get_memories(table_name=kind),
    "get_memories_by_ids": lambda db, kind: db.get_memories_by_ids([ID], kind),
    "get_memories_by_room_ids": lambda db, kind: db.get_memories_by_room_ids(room_ids=[ID], table_name=kind),
    "get_memories_by_world_id": lambda db, kind: db.get_memories_by_world_id(world_id=ID, table_name=kind),
    "count_memories": lambda db, kind: db.count_memories(table_name=kind),
    "search_memories": lambda db, kind: db.search_memories(embedding=ones(), table_name=kind),
    "search_memories_by_embedding": lambda db, kind: db.search_memories_by_embedding(ones(), table_name=kind),
    "get_cached_embeddings": lambda db, kind: db.get_cached_embeddings(
        query_table_name=kind, query_threshold=1, query_input="x"
    ),
}
TYPE_MAY_BE_NONE = {"get_memories_by_ids"}


@pytest.mark.parametrize("method", TAKES_TYPE)
async def test_a_table_name_is_a_text_that_is_not_empty(
    db: DatabaseAdapter, round_trips: list[str], method: str
) -> None:
    for value in [*BAD_TYPES, *([] if method in TYPE_MAY_BE_NONE else [None])]:
        with refused(ArgumentError, round_trips, f"{method}: {value!r:.80}"):
            await TAKES_TYPE[method](db, value)


@pytest.mark.parametrize("method", TAKES_TYPE)
async def test_a_table_name_outside_memory_types_is_refused(
    make_db: MakeAdapter, request: pytest.FixtureRequest, method: str
) -> None:
    db = await make_db(memory_types={"messages", "facts"})
    round_trips: list[str] = request.getfixturevalue("round_trips")
    for value in ("documents", "message", "messages ", "Messages", "messages\x00"):
        with refused(ArgumentError, round_trips, f"{method}: {value!r}", "facts, messages"):
            await TAKES_TYPE[method](db, value)
    await TAKES_TYPE[method](db, "messages")


BAD_CALLS: dict[str, Callable[[DatabaseAdapter], Awaitable[Any]]] = {
    "text_contains": lambda db: db.get_memories(table_name="messages", text_contains=5),  # type: ignore[arg-type]
    "text_contains bytes": lambda db: db.count_memories(text_contains=b"x"),  # type: ignore[arg-type]
    "metadata list": lambda db: db.get_memories(table_name="messages", metadata=[1]),  # type: ignore[arg-type]
    "metadata text": lambda db: db.count_memories(metadata="{}"),  # type: ignore[arg-type]
    "metadata set": lambda db: db.count_memories(metadata={"a": {1}}),
    "unique text": lambda db: db.get_memories(table_name="messages", unique="yes"),  # type: ignore[arg-type]
    "unique number": lambda db: db.count_memories(unique=1),  # type: ignore[arg-type]
    "unique of a search": lambda db: db.search_memories(
        embedding=ones(), table_name="messages", unique=None  # type: ignore[arg-type]
    ),
    "unique of create": lambda db: db.create_memory({"content": {}}, "messages", unique="no"),  # type: ignore[arg-type]
    "unique of a memory": lambda db: db.create_memory({"content": {}, "unique": 0}, "messages"),
    "room_id and room_ids": lambda db: db.count_memories(ID, room_ids=[ID]),
    "include_embedding of get_memories": lambda db: db.get_memories(
        table_name="messages", include_embedding="yes"  # type: ignore[arg-type]
    ),
    "include_embedding of get_memory_by_id": lambda db: db.get_memory_by_id(
        ID, include_embedding="yes"  # type: ignore[arg-type]
    ),
    "include_embedding of get_memories_by_ids": lambda db: db.get_memories_by_ids(
        [ID], include_embedding=1  # type: ignore[arg-type]
    ),
    "include_embedding of get_memories_by_room_ids": lambda db: db.get_memories_by_room_ids(
        room_ids=[ID], table_name="messages", include_embedding="no"  # type: ignore[arg-type]
    ),
    "include_embedding of get_memories_by_world_id": lambda db: db.get_memories_by_world_id(
        world_id=ID, include_embedding="no"  # type: ignore[arg-type]
    ),
    "include_embedding of a search": lambda db: db.search_memories(
        embedding=ones(), table_name="messages", include_embedding=None  # type: ignore[arg-type]
    ),
    "query_input": lambda db: db.get_cached_embeddings(
        query_table_name="m", query_threshold=1, query_input=5  # type: ignore[arg-type]
    ),
    "query_input None": lambda db: db.get_cached_embeddings(
        query_table_name="m", query_threshold=1, query_input=None  # type: ignore[arg-type]
    ),
    "query_field_name": lambda db: db.get_cached_embeddings(
        query_table_name="m", query_threshold=1, query_input="x", query_field_name="embedding"
    ),
    "query_field_name list": lambda db: db.get_cached_embeddings(
        query_table_name="m", query_threshold=1, query_input="x", query_field_name=["content"]  # type: ignore[arg-type]
    ),
    "query_field_sub_name": lambda db: db.get_cached_embeddings(
        query_table_name="m", query_threshold=1, query_input="x", query_field_sub_name=""
    ),
    "query_field_sub_name None": lambda db: db.get_cached_embeddings(
        query_table_name="m", query_threshold=1, query_input="x", query_field_sub_name=None  # type: ignore[arg-type]
    ),
    "foreign agent": lambda db: db.get_memories(table_name="messages", agent_id=uuid4()),
    "foreign agent to count": lambda db: db.count_memories(agent_id=uuid4()),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
async def test_other_arguments_are_checked_too(db: DatabaseAdapter, round_trips: list[str], case: str) -> None:
    with refused(ArgumentError, round_trips, case):
        await BAD_CALLS[case](db)


@pytest.mark.parametrize("value", ["5", None, True, -0.1, math.nan, math.inf, HUGE, [5], object()])
async def test_what_is_no_time_to_wait_closes_nothing(db: DatabaseAdapter, round_trips: list[str], value: Any) -> None:
    with refused(ArgumentError, round_trips, repr(value), "timeout must be a number of seconds"):
        await db.close(timeout=value)
    assert await db.is_ready()
    await db.close(timeout=0)
    assert not await db.is_ready()


@pytest.mark.parametrize("value", ["no", None, 1, [], np.ones(2)])
async def test_an_index_is_not_built_anew_for_something_like_true(
    db: DatabaseAdapter, round_trips: list[str], value: Any
) -> None:
    with refused(ArgumentError, round_trips, repr(value), "rebuild"):
        await db.index_memories(rebuild=value)


# --- memories ---


class Unserializable:
    pass


def circle(text: str) -> dict[str, Any]:
    content: dict[str, Any] = {"text": text}
    content["self"] = [content]
    return content


def deep(text: str) -> dict[str, Any]:
    content: dict[str, Any] = {"text": text}
    for _ in range(5000):
        content = {"a": content}
    return content


BAD_MEMORIES: dict[str, Any] = {
    "None": None,
    "text": "hello",
    "a number": 5,
    "a list": [{"content": {}}],
    "pairs": [("content", {})],
    "unknown key": {"content": {}, "roomID": ID},
    "another unknown key": {"content": {}, "embeddings": ones()},
    "a key that is no text": {"content": {}, 5: 1},
    "no agent's key": {"content": {}, "agentId": uuid4()},
    "content text": {"content": "{}"},
    "content list": {"content": []},
    "content number": {"content": 1},
    "content with bytes": {"content": {"a": b"x"}},
    "content with a set": {"content": {"a": {1}}},
    "content with an object": {"content": {"a": Unserializable()}},
    "content with a key of a tuple": {"content": {(1, 2): 3}},
    "content with an integer beyond 64 bits": {"content": {"a": 2**64}},
    "content with complex numbers": {"content": {"a": np.ones(2, complex)}},
    "content in a circle": {"content": circle("x")},
    "content in a circle with an unpaired surrogate": {"content": circle("\ud800")},
    "content in a circle with NUL": {"content": circle("\x00")},
    "content too deep": {"content": deep("x")},
    "content too deep with an unpaired surrogate": {"content": deep("\udfff")},
    "content too deep with NUL": {"content": deep("\x00")},
    "metadata text": {"content": {}, "metadata": "{}"},
    "metadata list": {"content": {}, "metadata": [1]},
    "metadata with bytes": {"content": {}, "metadata": {"a": [b"x"]}},
    "naive time": {"content": {}, "createdAt": NAIVE},
    "bad id": {"content": {}, "id": "x"},
    "bad unique": {"content": {}, "unique": "yes"},
    "bad similarity": {"content": {}, "similarity": "high"},
    "similarity beyond a float": {"content": {}, "similarity": 10**400},
    "type of another kind": {"content": {}, "type": 5},
    "model with a bad field": Memory(content=5),  # type: ignore[arg-type]
    "model of a foreign agent": Memory(content={}, agent_id=uuid4()),
    "model with a bad embedding": Memory(content={}, embedding=np.zeros(WIDTH, np.float32)),
    "two spellings, two values": {"content": {}, "roomId": uuid4(), "room_id": uuid4()},
}
BAD_TO_CREATE: dict[str, Any] = {
    "no content": {"metadata": {}},
    "content None": {"content": None},
    "nothing": {},
    "model without content": Memory(),
    "wrapped, unknown key": {"memory": {"content": {}}, "table": "messages"},
    "wrapped, nothing": {"memory": None},
    "wrapped, bad type": {"memory": {"content": {}}, "tableName": 5},
    "wrapped, bad unique": {"memory": {"content": {}}, "unique": 5},
    "wrapped, unknown key inside": {"memory": {"contents": {}}},
}
BAD_TO_UPDATE: dict[str, Any] = {
    "no id": {"content": {}},
    "id None": {"id": None, "content": {}},
    "model without id": Memory(content={}),
}


@pytest.mark.parametrize("case", [*BAD_MEMORIES, *BAD_TO_CREATE])
async def test_a_memory_that_does_not_fit_is_not_created(
    db: DatabaseAdapter, round_trips: list[str], case: str
) -> None:
    bad = (BAD_MEMORIES | BAD_TO_CREATE)[case]
    good = {"content": {"text": "good"}}
    with refused(ArgumentError if "embedding" not in case else EmbeddingError, round_trips, case):
        await db.create_memory(bad, "messages")
    error = ArgumentError if "embedding" not in case else EmbeddingError
    for method in (db.create_memories, db.upsert_memories):
        with refused(error, round_trips, f"{method.__name__}: {case}", "at position 2"):
            await method([good, good, bad, good], "messages")
        same = uuid4()
        with refused(error, round_trips, f"{method.__name__}: {case}, behind one id twice", "at position 2"):
            await method([{"id": same, **good}, {"id": same, **good}, bad], "messages")
        with refused(error, round_trips, f"{method.__name__}: {case}, from a generator", "at position 1"):
            await method((memory for memory in (good, bad)), "messages")
    with refused(error, round_trips, f"load_memories: {case}", "at position 1"):
        await db.load_memories([good, bad], "messages")
    assert await db.count_memories() == 0


@pytest.mark.parametrize("case", [*BAD_MEMORIES, *BAD_TO_UPDATE])
async def test_a_memory_is_not_updated_with_what_does_not_fit(
    db: DatabaseAdapter, round_trips: list[str], case: str
) -> None:
    id = await db.create_memory({"content": {"text": "old"}}, "messages")
    bad = (BAD_MEMORIES | BAD_TO_UPDATE)[case]
    if isinstance(bad, dict) and "id" not in bad and case in BAD_MEMORIES:
        bad = {"id": id, **bad}
    elif isinstance(bad, Memory) and case in BAD_MEMORIES:
        bad = copy.copy(bad)
        bad.id = id
    error = ArgumentError if "embedding" not in case else EmbeddingError
    with refused(error, round_trips, case):
        await db.update_memory(bad)
    with refused(error, round_trips, case, "at position 1"):
        await db.update_memories([{"id": id, "content": {"text": "new"}}, bad])
    found = await db.get_memories(table_name="messages")
    assert [memory.content for memory in found] == [{"text": "old"}]


async def test_the_error_of_a_batch_names_the_position_of_the_wrong_width(
    db: DatabaseAdapter, round_trips: list[str]
) -> None:
    good = {"content": {}, "embedding": ones()}
    bad = {"content": {}, "embedding": ones(512)}
    methods: list[Callable[..., Awaitable[Any]]] = [db.create_memories, db.upsert_memories, db.load_memories]
    for method in methods:
        with refused(EmbeddingDimensionError, round_trips, method.__name__, "at position 2"):
            await method([good, {"content": {}}, bad], "messages")
    with refused(EmbeddingDimensionError, round_trips, "update_memories", "at position 1"):
        await db.update_memories([{"id": uuid4(), "embedding": ones()}, {"id": UUID(int=0), "embedding": ones(768)}])


async def test_two_widths_in_one_batch_are_refused_whatever_the_agent_has(make_db: MakeAdapter) -> None:
    db = await make_db(dimension=None)
    batch = [{"content": {}, "embedding": ones(512)}, {"content": {}, "embedding": ones(768)}]
    methods: list[Callable[..., Awaitable[Any]]] = [db.create_memories, db.upsert_memories, db.load_memories]
    for method in methods:
        with pytest.raises(ArgumentError) as caught:
            await method(batch, "messages")
        if isinstance(caught.value, EmbeddingDimensionError):
            assert caught.value.locked is None, "the agent has no dimension yet"
    assert await db.count_memories() == 0
    assert await db.get_embedding_dimension() is None


async def test_a_collection_of_memories_is_no_single_one(db: DatabaseAdapter, round_trips: list[str]) -> None:
    methods: list[Callable[..., Awaitable[Any]]] = [
        db.create_memories,
        db.upsert_memories,
        db.load_memories,
        db.update_memories,
    ]
    for method in methods:
        values: list[Any] = [{"content": {}}, Memory(content={}), "text", b"bytes", 5, None]
        for value in values:
            with refused(ArgumentError, round_trips, f"{method.__name__}: {value!r}", "collection"):
                await method(value)


async def test_empty_batches_send_nothing(db: DatabaseAdapter, round_trips: list[str]) -> None:
    round_trips.clear()
    assert await db.create_memories([]) == []
    assert await db.create_memories(iter(()), "messages") == []
    assert await db.upsert_memories([]) == []
    assert await db.update_memories([]) is None  # type: ignore[func-returns-value]
    assert await db.delete_memories([]) == 0
    assert await db.delete_all_memories([], "messages") == 0
    assert await db.get_memories_by_ids([]) == []
    assert await db.get_memories_by_room_ids(room_ids=[], table_name="messages") == []
    assert await db.search_memories(embedding=ones(), table_name="messages", count=0) == []
    assert round_trips == []


async def test_an_empty_batch_does_not_excuse_a_bad_table_name(db: DatabaseAdapter, round_trips: list[str]) -> None:
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: db.create_memories([], ""),
        lambda: db.upsert_memories([], ""),
        lambda: db.get_memories_by_ids([], ""),
        lambda: db.get_memories_by_room_ids(room_ids=[], table_name=""),
        lambda: db.delete_all_memories([], ""),
        lambda: db.search_memories(embedding=ones(), table_name="", count=0),
    ]
    for call in calls:
        with refused(ArgumentError, round_trips, "empty", "table_name"):
            await call()


# --- arguments stay as they are ---


def argument(scene: Scene, **more: Any) -> dict[str, Any]:
    """Make a memory that the store has something to clean and to convert in."""
    return {
        "id": str(uuid4()),
        "roomId": str(scene.room),
        "entity_id": scene.entity,
        "createdAt": 1_700_000_000_000,
        "content": {"text": "nul\x00 and \ud800", "nested": {"k\x00": ["\udc00", {"deep": (1, 2)}]}},
        "metadata": {"list": [1, 2, {"a": "\x00"}]},
        "embedding": RANDOM.copy(),
        **more,
    }


def same(left: Any, right: Any) -> bool:
    """Compare by type, value, order of keys, and of arrays the bytes."""
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return bool(left.dtype == right.dtype and left.tobytes() == right.tobytes())
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(*pair) for pair in zip(left, right, strict=True))
    if isinstance(left, Memory):
        return all(same(getattr(left, name), getattr(right, name)) for name in Memory.__slots__)
    return bool(left == right)


async def test_arguments_are_not_changed(db: DatabaseAdapter, agent_world: Scene) -> None:
    memory = argument(agent_world)
    model = Memory(content={"text": "\x00", "l": [{"a": "\ud800"}]}, metadata={}, embedding=RANDOM.astype(np.float32))
    wrapped = {"memory": argument(agent_world), "tableName": "facts\x00", "unique": True}
    batch: list[Any] = [memory, model, wrapped, argument(agent_world)]
    change = {"id": memory["id"], "content": {"text": "changed\x00"}, "embedding": RANDOM[::-1].copy()}
    changes = [change, {"id": wrapped["memory"]["id"], "metadata": {"x": ["\ud800"]}}]  # type: ignore[index]
    filter_ = {"list": [{"a": "\x00"}]}
    given = [memory, model, wrapped, batch, change, changes, filter_]
    before = copy.deepcopy(given)
    await db.create_memory(memory, "messages")
    await db.create_memory(model, "messages", unique=False)
    await db.create_memories(batch, "messages")
    await db.upsert_memories(batch, "messages")
    assert await db.update_memory(change)
    await db.update_memories(changes)
    ids = [memory["id"], str(uuid4())]
    await db.get_memories_by_ids(ids)
    assert await db.get_memories(table_name="messages", metadata=filter_)
    await db.count_memories(metadata=filter_)
    await db.search_memories(embedding=memory["embedding"], table_name="messages")
    await db.delete_memories(ids)
    assert same(given, before)
    assert model.id is None, "the id that was made must not be written into the caller's model"


VECTOR_A = ones(at0=2)
VECTOR_B = ones(at0=-500)


async def run_while_changed(call: Awaitable[Any], change: Callable[[], None]) -> Any:
    """Start a call, change its arguments when it waits for the server for the first time, and give its result."""
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0)  # the task runs up to its first wait
    assert not task.done()
    change()
    return await task


@pytest.mark.parametrize("method", ["create_memory", "create_memory given unique", "create_memories", "upsert_memories",
                                    "update_memory", "update_memories"])  # fmt: skip
async def test_a_change_after_the_call_has_begun_is_not_stored(make_db: MakeAdapter, method: str) -> None:
    db = await make_db(batch_size=2)  # the later chunks of a batch are sent much later
    count = 1 if method.startswith(("create_memory", "update_memory")) and "memories" not in method else 7
    memories = [
        {"id": uuid4(), "content": {"text": "old", "n": [i]}, "metadata": {"m": ["old"]}, "embedding": VECTOR_A.copy()}
        for i in range(count)
    ]
    ids = [memory["id"] for memory in memories]
    call: Awaitable[Any]
    if method.startswith("update"):
        await db.create_memories([{"id": id, "content": {}} for id in ids], "messages")
        call = db.update_memory(memories[0]) if method == "update_memory" else db.update_memories(memories)
    elif method == "create_memory":
        call = db.create_memory(memories[0], "messages")
    elif method == "create_memory given unique":
        call = db.create_memory(memories[0], "messages", unique=True)
    else:
        call = getattr(db, method)(memories, "messages")

    def change() -> None:
        for memory in memories:
            memory["embedding"][:] = VECTOR_B
            memory["content"]["text"] = "new"
            memory["content"]["n"].append("new")
            memory["metadata"]["m"][0] = "new"
        memories.clear()

    await run_while_changed(call, change)
    found = {memory.id: memory for memory in await db.get_memories_by_ids(ids, include_embedding=True)}
    for position, id in enumerate(ids):
        assert found[id].content == {"text": "old", "n": [position]}
        assert found[id].metadata == {"m": ["old"]}
        assert bits(found[id].embedding) == bits(VECTOR_A)


@pytest.mark.parametrize("way", ["in the database", "by an adapter that knows no width", "in the process"])
async def test_a_search_looks_for_the_vector_that_it_was_given(make_db: MakeAdapter, way: str) -> None:
    early = await make_db(dimension=None)
    writer = await make_db(early.agent_id)
    room = await writer.create_room(Room(source="t", type="DM"))
    # What the query is changed to is nearly orthogonal to all of them.
    vectors = (np.random.default_rng(5).normal(size=(40, WIDTH)) + 1).astype(np.float32)
    vectors[:, 0] = np.arange(40) / 100
    other = np.zeros(WIDTH, np.float32)
    other[0] = 1
    ids = await writer.create_memories(
        [{"content": {}, "roomId": room, "embedding": vector, "unique": True} for vector in vectors], "messages"
    )
    db = early
    if way != "by an adapter that knows no width":
        db = await make_db(early.agent_id, resident="required" if way == "in the process" else "off")
    query = vectors[0].copy()
    call = db.search_memories(embedding=query, table_name="messages", room_id=room, count=1)
    hits = await run_while_changed(call, lambda: query.__setitem__(slice(None), other))
    assert [hit.id for hit in hits] == [ids[0]]
    assert db._resident.stats.hits == (way == "in the process")


# --- batches of other rows ---

PLACE = {"entityId": ID, "roomId": ID}
PAIR = {"sourceEntityId": ID, "targetEntityId": ID}
STEP = {"description": "d"}

# A row of each kind, the last key of which is needed; and with a field that is not JSON.
BATCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "create_agents": ({"name": "x"}, {"settings": {"a": 1j}}),
    "create_components": ({**PLACE, "type": "t"}, {"data": {"a": 1j}}),
    "create_entities": ({"id": ID}, {"metadata": {"a": 1j}}),
    "create_goals": ({"name": "x"}, {"objectives": [{**STEP, "a": 1j}]}),
    "create_logs": ({**PLACE, "type": "t", "body": {}}, {"body": {"a": 1j}}),
    "create_message_servers": ({"name": "x", "sourceType": "t"}, {"metadata": {"a": 1j}}),
    "create_messages": ({"channelId": ID, "authorId": ID, "content": "x"}, {"metadata": {"a": 1j}}),
    "create_pairing_allowlist_entries": ({"channel": "c", "senderId": "s"}, {"metadata": {"a": 1j}}),
    "create_pairing_requests": ({"channel": "c", "senderId": "s", "code": "x"}, {"metadata": {"a": 1j}}),
    "create_relationships": (PAIR, {"metadata": {"a": 1j}}),
    "create_rooms": ({"source": "s", "type": "t"}, {"metadata": {"a": 1j}}),
    "create_tasks": ({"name": "x"}, {"metadata": {"a": 1j}}),
    "update_agents": ({"id": ID}, {"settings": {"a": 1j}}),
    "update_components": ({"id": ID}, {"data": {"a": 1j}}),
    "update_entities": ({"id": ID}, {"metadata": {"a": 1j}}),
    "update_relationships": ({"id": ID}, {"metadata": {"a": 1j}}),
    "upsert_agents": ({"name": "x"}, {"settings": {"a": 1j}}),
    "upsert_components": ({**PLACE, "type": "t", "data": {}}, {"data": {"a": 1j}}),
    "upsert_entities": ({"id": ID}, {"metadata": {"a": 1j}}),
}


@pytest.mark.parametrize("name", BATCHES)
async def test_the_error_of_a_batch_names_the_position_of_the_wrong_row(
    db: DatabaseAdapter, round_trips: list[str], name: str
) -> None:
    row, no_json = BATCHES[name]
    method = getattr(db, name)
    good = {**row, "id": uuid4()}
    needed = list(row)[-1]
    twice = [good, good] if "agents" not in name else [good, {**row, "id": uuid4()}]
    lacking = {key: value for key, value in row.items() if key != needed}
    for bad, match in ((lacking, " is missing"), ({**row, "id": uuid4(), **no_json}, " is not JSON")):
        with refused(ArgumentError, round_trips, name, f"at position 2.*{match}"):
            await method([*twice, bad])


# A value of what other methods take many of.
OTHERS: dict[str, Any] = {
    "are_room_participants": (ID, ID),
    "get_components_by_natural_keys": {"entityId": ID, "type": "t"},
    "get_pairing_allowlists": "c",
    "get_relationships_by_pairs": (ID, ID),
    "patch_components": {"componentId": ID, "ops": []},
    "set_caches": {"key": "k", "value": 1},
    "update_logs": {"id": ID, "updates": {"body": {}}},
    "update_participants": {**PLACE, "updates": {"metadata": {}}},
    "update_tasks": {"id": ID, "task": {"name": "x"}},
}


async def test_others_have_their_turn_while_a_large_batch_is_checked(
    db: DatabaseAdapter, round_trips: list[str]
) -> None:
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def produce(value: Any, seen: list[int]) -> Iterator[Any]:
        for _ in range(200):
            seen.append(turns)
            yield value
        yield object()

    others = asyncio.ensure_future(take_turns())
    for name, value in ({name: {**row, "id": ID} for name, (row, _) in BATCHES.items()} | OTHERS).items():
        seen: list[int] = []
        with refused(ArgumentError, round_trips, name, "at position 200"):
            await getattr(db, name)(produce(value, seen))
        assert len(set(seen)) == 4, name
    others.cancel()


async def test_what_is_iterated_over_asynchronously_is_no_batch(db: DatabaseAdapter, round_trips: list[str]) -> None:
    async def produce() -> AsyncIterator[Any]:
        yield {"content": {}}

    for method in (db.create_memories, db.upsert_memories, db.delete_memories):
        with refused(ArgumentError, round_trips, method.__name__, "not async_generator: make a list .*async for"):
            await method(produce())


class CountedId(UUID):
    """Counts how often one is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        CountedId.compared += 1
        return super().__eq__(other)

    __hash__ = UUID.__hash__


async def test_an_error_in_a_large_batch_is_found_in_one_pass(db: DatabaseAdapter, round_trips: list[str]) -> None:
    CountedId.compared = 0
    ids = [CountedId(int=number + 1) for number in range(1000)]
    rows = [{"id": id, "name": "x"} for id in ids]
    with refused(ArgumentError, round_trips, "what is not JSON", "at position 999"):
        await db.create_tasks([*rows[:-1], {**rows[-1], "metadata": {"a": 1j}}])
    with refused(ArgumentError, round_trips, "an id twice", "is given twice"):
        await db.upsert_agents([*rows, rows[-1]])
    assert CountedId.compared < 20 * len(ids)


async def test_json_that_is_larger_than_a_jsonb_is_refused(
    db: DatabaseAdapter, round_trips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_codecs, "_MOST_JSON", 1 << 20)
    large = {"text": "x" * (1 << 20)}
    with refused(ArgumentError, round_trips, "a large content", "content has 1 MB as JSON"):
        await db.create_memory({"content": large}, "messages")
    with refused(ArgumentError, round_trips, "a large content after others", "at position 1.*content has 1 MB"):
        await db.create_memories([{"content": {}}, {"content": large}], "messages")
    with refused(ArgumentError, round_trips, "two that are large together", "a batch of World has 1 MB as JSON"):
        await db.create_worlds([{"metadata": {"text": "x" * (1 << 19)}}] * 2)
    with refused(ArgumentError, round_trips, "a large cleaned text", "value has 3 MB"):
        await db.set_cache("key", "\0" * (1 << 20))
    await db.create_memory({"content": {"text": "x" * ((1 << 20) - 20)}}, "messages")


# --- text that an index holds ---

TAKES_KEY: dict[str, Callable[[DatabaseAdapter, Scene, str], Awaitable[Any]]] = {
    "type of a memory": lambda db, scene, key: db.create_memory(
        {"content": {}, "roomId": scene.room, "worldId": scene.world, "entityId": scene.entity, "embedding": ones()},
        key,
    ),
    "type of a component": lambda db, scene, key: db.create_component(
        {
            "entityId": scene.entity,
            "roomId": scene.room,
            "worldId": scene.world,
            "sourceEntityId": scene.other,
            "type": key,
        }
    ),
    "type of a log": lambda db, scene, key: db.log(
        {"entityId": scene.entity, "roomId": scene.room, "type": key, "body": {}}
    ),
    "name of a task": lambda db, scene, key: db.create_task({"name": key, "tags": ["queue"], "roomId": scene.room}),
    "what a request names": lambda db, scene, key: db.create_pairing_request(
        {"channel": key, "senderId": key, "code": key}
    ),
    "what an entry names": lambda db, scene, key: db.create_pairing_allowlist_entry({"channel": key, "senderId": key}),
}


@pytest.mark.parametrize("case", TAKES_KEY)
async def test_text_that_an_index_holds(
    db: DatabaseAdapter, agent_world: Scene, round_trips: list[str], case: str
) -> None:
    # Of characters that the server cannot compress.
    longest = "".join(chr(0x4E00 + i * 7919 % 20000) for i in range(341)) + "x"
    assert len(longest.encode()) == 1024
    await TAKES_KEY[case](db, agent_world, longest)
    with refused(ArgumentError, round_trips, case, r"at most 1,024 bytes in UTF-8, not 1,025"):
        await TAKES_KEY[case](db, agent_world, longest + "x")


def test_of_text_that_an_index_holds_the_bytes_count() -> None:
    assert _codecs.as_key("\U0001f600" * 256, "name") == "\U0001f600" * 256
    with pytest.raises(ArgumentError, match="at most 1,024 bytes in UTF-8, not 1,028"):
        _codecs.as_key("\U0001f600" * 257, "name")


async def test_text_that_an_index_holds_is_checked_in_updates(db: DatabaseAdapter, round_trips: list[str]) -> None:
    with refused(ArgumentError, round_trips, "update_task", "name must have at most 1,024 bytes"):
        await db.update_task(uuid4(), {"name": "x" * 1025})
    with refused(ArgumentError, round_trips, "update_logs", "type must have at most 1,024 bytes"):
        await db.update_logs([{"id": uuid4(), "type": "x" * 1025}])


@pytest.mark.parametrize(
    ("metadata", "missing"),
    [
        ({"type": "document", "title": "x"}, "'document' need timestamp"),
        ({"type": "fragment", "documentId": "x"}, "'fragment' need position"),
        ({"type": "fragment", "position": 0}, "'fragment' need documentId"),
        ({"type": "fragment"}, "'fragment' need documentId and position"),
    ],
)
async def test_metadata_of_documents_and_fragments_that_lack_something(
    db: DatabaseAdapter, round_trips: list[str], metadata: dict[str, Any], missing: str
) -> None:
    bad = {"id": uuid4(), "content": {"text": "secret"}, "metadata": metadata}
    both = [{"id": uuid4(), "content": {}, "metadata": {"type": "document", "timestamp": None}}, bad]
    said = rf"^metadata of type {missing}$"
    at = rf"^Memory at position 1: {said[1:]}"
    with refused(ArgumentError, round_trips, "create_memory", said):
        await db.create_memory(bad, "documents")
    with refused(ArgumentError, round_trips, "create_memories", at):
        await db.create_memories(both, "documents")
    with refused(ArgumentError, round_trips, "load_memories", at):
        await db.load_memories(both, "documents")
    with refused(ArgumentError, round_trips, "upsert_memories", at):
        await db.upsert_memories(both, "documents")
    with refused(ArgumentError, round_trips, "update_memory", at.replace("1", "0")):
        await db.update_memory(bad)
    with refused(ArgumentError, round_trips, "update_memories", at):
        await db.update_memories(both)


async def test_a_document_id_may_be_longer_than_an_index_entry(db: DatabaseAdapter) -> None:
    document = uuid4()
    long = str(document) + "".join(chr(0x4E00 + i * 7919 % 20000) for i in range(9000))
    fragments = [{"type": "fragment", "documentId": id, "position": 0} for id in (long, str(document).upper())]
    ids = await db.create_memories([{"content": {}, "metadata": metadata} for metadata in fragments], "documents")
    await db.delete_memories([document])
    assert [memory.id for memory in await db.get_memories_by_ids(ids)] == [ids[0]]


def test_a_count_that_a_bigint_cannot_hold() -> None:
    assert _codecs.as_count(2**63 - 1, "count") == 2**63 - 1
    with pytest.raises(ArgumentError, match=r"count must be below 2\*\*63"):
        _codecs.as_count(2**63, "count")
    with pytest.raises(ArgumentError, match="count must be at least 0, not -1"):
        _codecs.as_count(-1, "count")
