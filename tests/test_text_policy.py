"""Text: one policy for what PostgreSQL cannot hold, in every text and JSON field; and text is nothing but text."""

from __future__ import annotations

import dataclasses
import enum
import unicodedata
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import orjson
import pytest
from asyncpg.pgproto import pgproto
from hypothesis import given, settings
from hypothesis import strategies as st

from elizasql import ArgumentError, DatabaseAdapter, Memory, _codecs

from .conftest import MakeAdapter, Scene, make_scene

REPLACEMENT = "\ufffd"


def policy(text: str) -> str:
    """Apply the policy code point by code point, as the documentation says it."""
    result = []
    position = 0
    while position < len(text):
        code = ord(text[position])
        after = ord(text[position + 1]) if position + 1 < len(text) else 0
        if 0xD800 <= code < 0xDC00 and 0xDC00 <= after < 0xE000:
            result.append(chr(0x10000 + ((code - 0xD800) << 10) + (after - 0xDC00)))
            position += 1
        elif code == 0 or 0xD800 <= code < 0xE000:
            result.append(REPLACEMENT)
        else:
            result.append(text[position])
        position += 1
    return "".join(result)


def cleaned(value: Any) -> Any:
    """Apply the policy to every text in a JSON value, keys included."""
    if isinstance(value, str):
        return policy(value)
    if isinstance(value, dict):
        return {cleaned(key): cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    return value


TEXTS = {
    "NUL": "\x00",
    "NUL inside": "a\x00b\x00\x00c",
    "NUL at both ends": "\x00a\x00",
    "a high surrogate": "a\ud83db",
    "a low surrogate": "a\ude00b",
    "a high surrogate at the end": "a\ud83d",
    "a low surrogate at the beginning": "\ude00a",
    "a pair": "\ud83d\ude00",
    "pairs": "a\ud83d\ude00\ud83d\ude01b",
    "a pair the wrong way round": "\ude00\ud83d",
    "two high ones and a low one": "\ud83d\ud83d\ude00",
    "a high one and two low ones": "\ud83d\ude00\ude00",
    "a pair with NUL between": "\ud83d\x00\ude00",
    "a high one before an astral character": "\ud83d\U0001f600",
    "the last pair": "\udbff\udfff",
    "astral": "\U0001f600\U00010000\U0010ffff",
    "the replacement character itself": REPLACEMENT,
    "no characters": "\ufffe\uffff\ufdd0\U0001ffff",
    "a byte order mark": "\ufeffa\ufeff",
    "controls": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f",
    "line ends": "a\r\nb\rc\nd\u2028e\u2029f\x0b\x0c\x85",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c \u2067x\u2069 \u0645\u0631\u062d\u0628\u0627",
    "combining": "e\u0301 n\u0303 \u0061\u0300\u0301\u0302\u0303 \u1112\u1161\u11ab \u0e01\u0e33",
    "joined": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1e9\U0001f1ea",
    "width": "\uff21\uff22\uff23 \u200b\u00ad\u2060 \u00a0",
    "case": "\u0130\u0131\u00df\u1e9e\u03a3\u03c3\u03c2\ufb01 \u01c5",
    "escapes that are only text": '\\u0000 \\x00 \\0 \\ud800 \\ \\\\ \\" \\n %00 &#0; \\\\u0000',
    "blank": " \t ",
    "a name from JavaScript": "__proto__",
    "another one": "constructor",
    "words of JSON": 'null true {"a": [1]} NaN',
    "long": "\u00e9" * 3000,
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_cannot_be_stored_becomes_the_replacement_character(name: str) -> None:
    text = TEXTS[name]
    clean = _codecs.clean_text(text)
    assert clean == policy(text)
    assert _codecs.as_text(text, "text") == _codecs.as_optional_text(text, "text") == clean
    assert _codecs.clean_text(clean) is clean, "text that can be stored is left alone, not copied"


async def test_the_texts_that_were_altered_are_counted(db: DatabaseAdapter, make_db: MakeAdapter) -> None:
    async def count() -> int:
        found: int = (await db.stats())["replaced_texts"]
        return found

    assert await count() == 0
    harmless = [name for name, text in TEXTS.items() if policy(text).count(REPLACEMENT) == text.count(REPLACEMENT)]
    assert {"a pair", "astral", "escapes that are only text", "the replacement character itself"} <= {*harmless}
    await db.create_memory({"content": {TEXTS[name]: TEXTS[name] for name in harmless}}, "messages")
    assert await count() == 0
    altered = [text for name, text in TEXTS.items() if name not in harmless]
    for number, text in enumerate(altered, 1):
        await db.create_memory({"content": {"text": text, "n": ["x"]}}, "messages")
        assert await count() == number
    await db.create_memories([{"content": {}}, {"content": {"a\x00": "b\ud800"}, "metadata": {"c": "\x00"}}], "facts")
    assert await count() == len(altered) + 3
    await db.load_memories([{"content": {"text": "\ude00"}}], "facts")
    await db.create_room({"source": "a\x00", "type": "b", "metadata": {"c": "d\x00"}})
    assert await count() == len(altered) + 6
    assert (await (await make_db(db.agent_id)).stats())["replaced_texts"] == 0, "of another adapter"


ANY_TEXT = st.text(st.characters() | st.sampled_from("\x00\ud800\udbff\udc00\udfff\ud83d\ude00\ufffd\\u0"))
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(ANY_TEXT)
@settings(max_examples=500)
def test_the_policy_is_lossless_but_for_what_cannot_be_stored(text: str) -> None:
    clean = _codecs.clean_text(text)
    assert clean == policy(text)
    assert _codecs.clean_text(clean) is clean
    assert "\x00" not in clean
    clean.encode()  # every surrogate is gone
    # One for one, counted in UTF-16 as JavaScript does: a pair is two units before and after.
    assert len(clean.encode("utf-16-le")) == len(text.encode("utf-16-le", "surrogatepass"))
    if clean == text:
        assert clean is text


@given(ANY_JSON)
@settings(max_examples=300)
def test_json_follows_the_same_policy(value: Any) -> None:
    encoded = _codecs.encode_json(value)
    assert encoded[:1] == b"\x01"
    assert orjson.loads(encoded[1:]) == cleaned(value)
    assert b"\\u0000" not in encoded.replace(b"\\\\", b"")
    assert _codecs.encode_json(orjson.loads(encoded[1:])) == encoded


class Mood(enum.Enum):
    BAD = "\x00\ud800"
    NUL = "a\x00"


@dataclasses.dataclass
class Note:
    text: str
    more: list[Any]
    _own: str = "none of the reader's business"


@pytest.mark.parametrize("text", ["a\x00b", "a\ud800b", "\x00\udfff"])
def test_text_within_other_values_follows_it_too(text: str) -> None:
    value = {"note": Note(text, [{text: text}, (text,)]), "mood": [Mood.NUL, Mood.BAD], "array": np.arange(3)}
    clean = policy(text)
    expected = {
        "note": {"text": clean, "more": [{clean: clean}, [clean]]},
        "mood": ["a\ufffd", "\ufffd\ufffd"],
        "array": [0, 1, 2],
    }
    assert orjson.loads(_codecs.encode_json(value)[1:]) == expected
    nul = {"note": Note("\x00", []), "mood": Mood.NUL}
    assert orjson.loads(_codecs.encode_json(nul)[1:]) == {"note": {"text": REPLACEMENT, "more": []}, "mood": "a\ufffd"}


def test_a_time_within_json_is_written_as_javascript_writes_it() -> None:
    value = {"at": datetime(2026, 1, 1, tzinfo=timezone.utc)}
    assert _codecs.encode_json(value) == b'\x01{"at":"2026-01-01T00:00:00Z"}'


# --- every field that holds text ---


def json_with(text: str) -> dict[str, Any]:
    return {text: text, "list": [text, {"a": text, text: [text, 1, None]}], "n": 1}


async def in_a_memory(db: DatabaseAdapter, scene: Scene, text: str) -> dict[str, Any]:
    value = json_with(text)
    created = await db.create_memory({"content": value, "metadata": value, "roomId": scene.room}, "messages")
    (batched,) = await db.create_memories([Memory(content=value, metadata=value)], "messages")
    (upserted,) = await db.upsert_memories([{"content": value, "metadata": value}], "messages")
    (replaced,) = await db.upsert_memories([{"id": created, "content": value, "metadata": value}], "messages")
    updated = await db.create_memory({"content": {}}, "messages")
    assert await db.update_memory({"id": updated, "content": value, "metadata": value})
    ids = [created, batched, upserted, updated]
    assert replaced == created
    found = {memory.id: memory for memory in await db.get_memories_by_ids(ids)}
    return {f"content {n}": found[id].content for n, id in enumerate(ids)} | {
        f"metadata {n}": found[id].metadata for n, id in enumerate(ids)
    }


async def in_a_world(db: DatabaseAdapter, scene: Scene, text: str) -> dict[str, Any]:
    id = await db.create_world({"name": text, "metadata": json_with(text)})
    world = await db.get_world(id)
    assert world is not None
    return {"name": world.name, "metadata": world.metadata}


async def in_a_room(db: DatabaseAdapter, scene: Scene, text: str) -> dict[str, Any]:
    id = await db.create_room(
        {"name": text, "source": text, "type": text, "channelId": text, "metadata": json_with(text)}
    )
    room = await db.get_room(id)
    assert room is not None
    names = ("name", "source", "type", "channel_id", "metadata")
    return {name: getattr(room, name) for name in names}


async def in_an_entity(db: DatabaseAdapter, scene: Scene, text: str) -> dict[str, Any]:
    id = await db.create_entity({"id": uuid4(), "names": [text, "Ann"], "metadata": json_with(text)})
    await db.add_participants_room([id], scene.room)
    entity = await db.get_entity(id)
    listed = next(one for one in await db.get_entities_for_room(scene.room) if one.id == id)
    assert entity is not None
    assert entity.names is not None
    assert entity.names[1:] == ["Ann"]
    assert listed == entity
    return {"names": entity.names[0], "metadata": entity.metadata}


async def in_an_agent(db: DatabaseAdapter, scene: Scene, text: str) -> dict[str, Any]:
    texts = ("name", "username", "system")
    lists = ("bio", "message_examples", "post_examples", "topics", "adjectives", "knowledge", "plugins")
    objects = ("settings", "style")
    id = uuid4()
    given = (
        {"id": id}
        | dict.fromkeys(texts, text)
        | {name: [text, json_with(text)] for name in lists}
        | {name: json_with(text) for name in objects}
    )
    assert await db.create_agent(given)
    agent = await db.get_agent(id)
    assert agent is not None
    for name in lists:
        assert getattr(agent, name)[1] == cleaned(json_with(text)), name
    await db.delete_agent(id)
    return {name: getattr(agent, name) for name in (*texts, *objects)} | {
        name: getattr(agent, name)[0] for name in lists
    }


STORES: dict[str, Callable[[DatabaseAdapter, Scene, str], Awaitable[dict[str, Any]]]] = {
    "memory": in_a_memory,
    "world": in_a_world,
    "room": in_a_room,
    "entity": in_an_entity,
    "agent": in_an_agent,
}


async def check_store(store: str, db: DatabaseAdapter, scene: Scene, text: str) -> None:
    for field, stored in (await STORES[store](db, scene, text)).items():
        expected = cleaned(json_with(text)) if isinstance(stored, dict) else policy(text)
        assert stored == expected, f"{field} of a {store}"


@pytest.mark.parametrize("store", STORES)
async def test_every_field_follows_the_same_policy(db: DatabaseAdapter, agent_world: Scene, store: str) -> None:
    for text in (*TEXTS.values(), ""):
        await check_store(store, db, agent_world, text)


@settings(max_examples=25)
@given(text=ANY_TEXT)
async def test_any_text_is_stored_by_the_policy(db: DatabaseAdapter, agent_world: Scene, text: str) -> None:
    for store in ("memory", "world", "room"):
        await check_store(store, db, agent_world, text)


async def test_table_names_follow_it_and_find_again(db: DatabaseAdapter, agent_world: Scene) -> None:
    vector = np.ones(384, np.float32)
    for text in TEXTS.values():
        kind = text[:255]
        memory = {"content": {"text": "x"}, "roomId": agent_world.room, "embedding": vector, "unique": True}
        id = await db.create_memory(memory, kind)
        for asked in (kind, policy(kind)):
            read = [
                await db.get_memories(table_name=asked),
                await db.get_memories_by_ids([id], asked),
                await db.get_memories_by_room_ids(room_ids=[agent_world.room], table_name=asked),
                await db.get_memories_by_world_id(world_id=agent_world.world, table_name=asked),
                await db.search_memories(embedding=vector, table_name=asked, query=text),
                await db.search_memories(embedding=vector, table_name=asked, room_id=agent_world.room),
            ]
            assert [[(memory.id, memory.type) for memory in found] for found in read] == [[(id, policy(kind))]] * 6
            assert await db.count_memories(table_name=asked) == 1
            cached = await db.get_cached_embeddings(query_table_name=asked, query_threshold=0, query_input="x")
            assert len(cached) == 1
        assert await db.delete_all_memories(agent_world.room, kind) == 1


async def test_what_was_stored_is_found_by_the_text_that_was_given(db: DatabaseAdapter) -> None:
    vectors = np.eye(len(TEXTS), 384, dtype=np.float32)
    marks = {}
    for vector, text in zip(vectors, TEXTS.values(), strict=True):
        memory = {"content": {"text": text, text: text}, "metadata": {"key": text, text: [text]}, "embedding": vector}
        marks[await db.create_memory(memory, "messages", unique=True)] = (text, vector)
    for id, (text, vector) in marks.items():
        for asked in (text, policy(text)):
            found = await db.get_memories(table_name="messages", text_contains=asked)
            assert id in [memory.id for memory in found]
            assert await db.count_memories(text_contains=asked) == len(found)
            for metadata in ({"key": asked}, {asked: [asked]}):
                found = await db.get_memories(table_name="messages", metadata=metadata)
                # Different texts may be the same one after cleaning.
                same = [other for other, (stored, _) in marks.items() if policy(stored) == policy(text)]
                assert {memory.id for memory in found} == set(same)
                assert await db.count_memories(metadata=metadata) == len(same)
            for field, key in (("content", "text"), ("content", asked), ("metadata", "key")):
                cached = await db.get_cached_embeddings(
                    query_table_name="messages",
                    query_threshold=0,
                    query_input=asked,
                    query_field_name=field,
                    query_field_sub_name=key,
                    query_match_count=5,
                )
                assert any(np.array_equal(one["embedding"], vector) for one in cached), (field, ascii(key))
                assert {one["levenshtein_score"] for one in cached} == {0}


# --- large, deep and odd ---


async def test_a_text_of_a_megabyte(db: DatabaseAdapter) -> None:
    text = "a\x00\u00e9\U0001f600\ud800 " * 175_000
    assert len(text) > 1_000_000
    vector = np.ones(384, np.float32)
    id = await db.create_memory({"content": {"text": text, "x" * 100_000: 1}, "embedding": vector}, "messages")
    memory = await db.get_memory_by_id(id)
    assert memory is not None
    assert memory.content == {"text": policy(text), "x" * 100_000: 1}
    assert [found.id for found in await db.get_memories(table_name="messages", text_contains=text)] == [id]
    cached = await db.get_cached_embeddings(
        query_table_name="messages", query_threshold=3, query_input=text + "\x00yz", query_match_count=1
    )
    assert [one["levenshtein_score"] for one in cached] == [3]
    room = await db.get_room(await db.create_room({"name": text, "source": text, "type": "GROUP"}))
    assert room is not None
    assert room.name == room.source == policy(text)


@pytest.mark.parametrize("text", ["x", "\x00", "\ud800"])
async def test_deep_json(db: DatabaseAdapter, text: str) -> None:
    content: dict[str, Any] = {"text": text}
    for _ in range(120):
        content = {text: [content]}
    id = await db.create_memory({"content": content, "metadata": content}, "messages")
    memory = await db.get_memory_by_id(id)
    assert memory is not None
    assert memory.content == memory.metadata == cleaned(content)
    for _ in range(200):
        content = {"a": content}
    with pytest.raises(ArgumentError, match="content is not JSON"):
        await db.create_memory({"content": content}, "messages")


ARRAYS: dict[str, Any] = {
    "strided": np.arange(6)[::2],
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "big-endian": np.arange(3, dtype=">f4"),
    "without an axis": np.array(1.5),
    "texts": np.array(["a", "b"]),
    "objects": np.array([1, "a", None], dtype=object),
}


@pytest.mark.parametrize("name", ARRAYS)
async def test_an_array_is_written_whatever_its_layout(db: DatabaseAdapter, name: str) -> None:
    id = await db.create_memory({"content": {"array": ARRAYS[name], "text": "\ud800"}}, "messages")
    memory = await db.get_memory_by_id(id)
    assert memory is not None
    assert memory.content == {"array": ARRAYS[name].tolist(), "text": REPLACEMENT}


async def test_an_id_that_was_given_back_is_a_key(db: DatabaseAdapter) -> None:
    """As one of uuid's own class is."""
    (id,) = [memory.id for memory in await db.get_memories_by_ids([await db.create_memory({"content": {}}, "facts")])]
    await db.update_memory({"id": id, "content": {id: 1}, "metadata": {"seen": {id: UUID(int=1)}}})
    memory = await db.get_memory_by_id(str(id))
    assert memory is not None
    assert (memory.content, memory.metadata) == ({str(id): 1}, {"seen": {str(id): str(UUID(int=1))}})


class OtherTime(datetime):
    """As pandas' and pendulum's are."""


async def test_a_time_of_another_library_is_a_time(db: DatabaseAdapter) -> None:
    plain = datetime(2026, 10, 25, 2, 30, 0, 123456, timezone(timedelta(hours=1)))
    other = OtherTime.fromisoformat(plain.isoformat())
    world = await db.get_world(await db.create_world({"name": "w", "created_at": other}))
    task = await db.get_task(await db.create_task({"name": "t", "due_at": other}))
    assert world is not None and world.created_at == plain
    assert task is not None and task.due_at == plain
    await db.set_caches({"plain": {"at": [plain]}, "other": {"at": [other]}, "cleaned": {"at": [other], "\ud800": 1}})
    found = await db.get_caches(["plain", "other", "cleaned"])
    assert found["plain"] == found["other"] == {"at": [plain.isoformat()]}
    assert found["cleaned"] == {"at": [plain.isoformat()], REPLACEMENT: 1}


async def test_an_id_of_the_driver_is_its_text(db: DatabaseAdapter) -> None:
    """What a statement has given is of asyncpg's own class, under the standard one."""
    plain = uuid4()
    other = pgproto.UUID(str(plain))
    assert type(other) is not UUID
    await db.set_caches({"value": {"by": [other]}, "key": {other: 1}, "cleaned": {"by": [other], other: "\ud800"}})
    assert await db.get_caches(["value", "key", "cleaned"]) == {
        "value": {"by": [str(plain)]},
        "key": {str(plain): 1},
        "cleaned": {"by": [str(plain)], str(plain): REPLACEMENT},
    }


async def test_odd_keys(db: DatabaseAdapter) -> None:
    content: dict[str, Any] = {
        "": "empty",
        " ": "blank",
        "__proto__": {"polluted": True},
        "constructor": {"prototype": 1},
        "toString": 1,
        "0": "number",
        "-1": "number",
        "a.b": 1,
        "$1": 1,
        "a b\tc\nd": 1,
        'quo"te': 1,
        "quo'te": 1,
        "back\\slash": 1,
        "A": 1,
        "a": 2,
        "\u00e9": "composed",
        "e\u0301": "decomposed",
        "k" * 50_000: 1,
    }
    assert unicodedata.normalize("NFC", "e\u0301") == "\u00e9", "the same to the eye, but two keys"
    id = await db.create_memory({"content": content, "metadata": content}, "messages")
    memory = await db.get_memory_by_id(id)
    assert memory is not None
    assert memory.content == memory.metadata == content
    for key, value in content.items():
        assert len(await db.get_memories(table_name="messages", metadata={key: value})) == 1, ascii(key[:80])


async def test_keys_that_become_one_keep_the_last_value(db: DatabaseAdapter) -> None:
    content = {"a\x00": 1, "a\ud800": 2, f"a{REPLACEMENT}": 3, "b\ud83d\ude00": 4, "b\U0001f600": 5}
    memory = await db.get_memory_by_id(await db.create_memory({"content": content}, "messages"))
    assert memory is not None
    assert memory.content == {f"a{REPLACEMENT}": 3, "b\U0001f600": 5}


async def test_keys_that_are_no_text_become_text(db: DatabaseAdapter) -> None:
    id = UUID(int=5)
    content: dict[Any, Any] = {1: "a", 2.5: "b", False: "c", None: "d", id: id, "nul\x00": {3: "\x00"}}
    memory = await db.get_memory_by_id(await db.create_memory({"content": content}, "messages"))
    assert memory is not None
    assert memory.content == {
        "1": "a",
        "2.5": "b",
        "false": "c",
        "null": "d",
        str(id): str(id),
        f"nul{REPLACEMENT}": {"3": REPLACEMENT},
    }


# --- injection ---

INJECTIONS = [
    "'",
    "''",
    "'''",
    '"',
    '""',
    "`",
    ";",
    "--",
    "-- ",
    "/*",
    "*/",
    "/* */",
    "'; DROP TABLE elizasql.memories; --",
    "'; DROP TABLE elizasql.memories CASCADE; SELECT '",
    '"; DROP TABLE elizasql.rooms; --',
    "x'); DELETE FROM elizasql.memories; --",
    "' OR '1'='1",
    "' OR 1=1 --",
    "1; TRUNCATE elizasql.agents CASCADE",
    "' UNION SELECT name, NULL FROM elizasql.agents --",
    "'||(SELECT string_agg(name, ',') FROM elizasql.agents)||'",
    "admin'--",
    "\\'; DROP TABLE elizasql.memories; --",
    "\\",
    "\\\\",
    "\\' OR 1=1 --",
    "E'\\x27; DROP TABLE elizasql.memories; --'",
    "$1",
    "$2::text",
    "$$; DROP TABLE elizasql.memories; $$",
    "$body$ x $body$",
    ":agent_id",
    ":name",
    "%(agent_id)s",
    "%s",
    "%d %n %x",
    "%",
    "_",
    "%_%",
    "{}",
    "{0}",
    "{agent_id.__class__}",
    "{{7*7}}",
    "${jndi:ldap://127.0.0.1/a}",
    "?",
    "@>",
    "{a,b}",
    "[1,2,3]",
    '{"$gt": ""}',
    '"}\'::jsonb; DROP TABLE elizasql.memories; --',
    "NULL",
    "null",
    "true",
    "DEFAULT",
    "\u2019; DROP TABLE elizasql.memories; --",
    "\u02bc OR 1=1",
    "\uff07; DROP TABLE elizasql.memories; \uff0d\uff0d",
    "\u2018\u201c\u201d",
    "\x00'; DROP TABLE elizasql.memories; --",
    "\xbf'; DROP TABLE elizasql.memories; --",
    "\ud800\ud801'; DROP TABLE elizasql.memories; --",
    "\r\n'; DROP TABLE elizasql.memories;\r\n--",
    "<script>alert('x')</script>",
    "../../etc/passwd",
    "pg_sleep(10)",
    "'; SELECT pg_sleep(10); --",
    "'; COPY elizasql.memories TO PROGRAM 'true'; --",
    "' || chr(39) || '",
]  # fmt: skip


@pytest.fixture
async def untouched(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> Any:
    """Check at the end that every table is still there, and what another agent has in them."""
    other = await make_db()
    scene = await make_scene(other)
    await other.create_memory({"content": {"text": "mine"}, "roomId": scene.room}, "messages")
    tables = "SELECT array_agg(tablename ORDER BY tablename) FROM pg_tables WHERE schemaname = 'elizasql'"
    before = await raw.fetchval(tables)
    assert {"agents", "memories", "embeddings", "rooms", "worlds", "entities", "participants"} <= set(before)
    yield
    assert await raw.fetchval(tables) == before
    assert [memory.content for memory in await other.get_memories(table_name="messages")] == [{"text": "mine"}]
    assert await other.get_participants_for_room(scene.room) != []


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("store", STORES)
async def test_injections_are_stored_as_text(db: DatabaseAdapter, agent_world: Scene, store: str) -> None:
    for text in INJECTIONS:
        await check_store(store, db, agent_world, text)


@pytest.mark.usefixtures("untouched")
async def test_injections_as_a_table_name(db: DatabaseAdapter, agent_world: Scene) -> None:
    vector = np.ones(384, np.float32)
    memory = {"content": {"text": "x"}, "roomId": agent_world.room, "embedding": vector}
    ids = {kind: await db.create_memory(memory, kind, unique=True) for kind in INJECTIONS}
    assert len({policy(kind) for kind in INJECTIONS}) == len(INJECTIONS)
    for kind, id in ids.items():
        found = [
            await db.get_memories(table_name=kind),
            await db.get_memories(table_name=kind, room_id=agent_world.room),
            await db.get_memories_by_ids(ids.values(), kind),
            await db.get_memories_by_room_ids(room_ids=[agent_world.room], table_name=kind),
            await db.get_memories_by_world_id(world_id=agent_world.world, table_name=kind),
            await db.search_memories(embedding=vector, table_name=kind, query=kind),
            await db.search_memories(embedding=vector, table_name=kind, room_id=agent_world.room),
        ]
        assert [[(memory.id, memory.type) for memory in page] for page in found] == [[(id, policy(kind))]] * 7
        assert await db.count_memories(table_name=kind) == 1
        assert await db.count_memories(agent_world.room, table_name=kind) == 1
        cached = await db.get_cached_embeddings(query_table_name=kind, query_threshold=0, query_input="x")
        assert len(cached) == 1
    assert await db.update_memory({"id": ids["'"], "content": {"text": INJECTIONS[12]}})
    for left, kind in enumerate(reversed(INJECTIONS)):
        assert await db.delete_all_memories(agent_world.room, kind) == 1
        assert len(await db.get_memories_by_ids(ids.values())) == len(INJECTIONS) - left - 1


@pytest.mark.usefixtures("untouched")
async def test_injections_in_content_and_filters_are_found_as_text(db: DatabaseAdapter, agent_world: Scene) -> None:
    vectors = np.eye(len(INJECTIONS), 384, dtype=np.float32)
    stored = {policy(text): vector for text, vector in zip(INJECTIONS, vectors, strict=True)}
    ids = {}
    for text, vector in zip(INJECTIONS, vectors, strict=True):
        memory = {
            "roomId": agent_world.room,
            "content": {"text": text, "k" + text: text},
            "metadata": {"key": text, "k" + text: "there"},
            "embedding": vector,
        }
        ids[await db.create_memory(memory, "messages", unique=True)] = policy(text)
    for text in INJECTIONS:
        clean = policy(text)
        for room in (None, agent_world.room):
            found = await db.get_memories(table_name="messages", room_id=room, text_contains=text)
            # A percent sign, an underscore and a backslash are no patterns.
            expected = {other for other in stored if clean.lower() in other.lower()}
            assert {ids[memory.id] for memory in found if memory.id} == expected, text
            assert await db.count_memories(room, text_contains=text) == len(expected)
            for metadata in ({"key": text}, {"k" + text: "there"}):
                found = await db.get_memories(table_name="messages", room_id=room, metadata=metadata)
                assert [ids[memory.id] for memory in found if memory.id] == [clean], text
                assert await db.count_memories(room, metadata=metadata) == 1
        for field, key in (("content", "text"), ("content", "k" + text), ("metadata", "key")):
            cached = await db.get_cached_embeddings(
                query_table_name="messages",
                query_threshold=0,
                query_input=text,
                query_field_name=field,
                query_field_sub_name=key,
            )
            assert [one["levenshtein_score"] for one in cached] == [0], (text, field)
            assert np.array_equal(cached[0]["embedding"], stored[clean])
        # Nothing has the text itself for a key.
        nothing = await db.get_cached_embeddings(
            query_table_name="messages", query_threshold=0, query_input=text, query_field_sub_name=f"no {text}"
        )
        assert nothing == []


@pytest.mark.usefixtures("untouched")
async def test_injections_as_ids_and_fields_are_refused(db: DatabaseAdapter) -> None:
    for text in INJECTIONS:
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda text=text: db.get_memory_by_id(text),  # type: ignore[misc]
            lambda text=text: db.get_memories(table_name="messages", room_id=text),  # type: ignore[misc]
            lambda text=text: db.delete_all_memories([text], "messages"),  # type: ignore[misc]
            lambda text=text: db.get_room(text),  # type: ignore[misc]
            lambda text=text: db.get_rooms_by_world(text),  # type: ignore[misc]
            lambda text=text: db.get_world(text),  # type: ignore[misc]
            lambda text=text: db.get_entity(text),  # type: ignore[misc]
            lambda text=text: db.get_agent(text),  # type: ignore[misc]
            lambda text=text: db.delete_agent(text),  # type: ignore[misc]
            lambda text=text: db.add_participants_room([text], text),  # type: ignore[misc]
            lambda text=text: db.create_memory({"content": {}, text: 1}, "messages"),  # type: ignore[misc]
            lambda text=text: db.get_cached_embeddings(  # type: ignore[misc]
                query_table_name="messages", query_threshold=1, query_input="x", query_field_name=text
            ),
        ]
        for call in calls:
            with pytest.raises(ArgumentError):
                await call()
