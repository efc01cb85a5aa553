"""ElizaOS-shaped doors: the factory, the plugin with a runtime as a program of its own would have it, and ids."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

import elizasql
from elizasql import DatabaseAdapter, create_database_adapter, elizaos, plugin
from elizasql.elizaos import create_unique_uuid, string_to_uuid

NOWHERE = "postgresql://127.0.0.1:1/nowhere"


class Runtime:
    """A runtime that takes one adapter and no second one."""

    def __init__(self, settings: dict[str, Any] | None = None, *, adapter: Any = None) -> None:
        self.agent_id: UUID | str = uuid4()
        self.settings = settings or {}
        self.asked: list[str] = []
        self.registered: list[Any] = [] if adapter is None else [adapter]

    @property
    def adapter(self) -> Any | None:
        return self.registered[0] if self.registered else None

    def get_setting(self, key: str) -> Any | None:
        self.asked.append(key)
        return self.settings.get(key)

    def register_database_adapter(self, adapter: Any) -> None:
        if self.registered:
            raise RuntimeError("a database adapter is registered already")
        self.registered.append(adapter)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[DatabaseAdapter]]:
    """The adapters that were opened."""
    found: list[DatabaseAdapter] = []
    real = elizasql.open

    async def noted(**settings: Any) -> DatabaseAdapter:
        found.append(await real(**settings))
        return found[-1]

    monkeypatch.setattr(elizaos, "open", noted)
    yield found
    assert all(adapter._executor._closed for adapter in found), "an adapter was left open"


@pytest.fixture(autouse=True)
def no_address_of_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("POSTGRES_URL", raising=False)
    monkeypatch.delenv("PGLITE_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)


# --- the factory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["postgresUrl", "postgres_url", "dsn"])
async def test_address(dsn: str, key: str) -> None:
    agent = uuid4()
    db = await create_database_adapter({key: dsn, "dataDir": None}, str(agent))
    try:
        assert db.agent_id == agent
        assert db.config.dsn == dsn
        assert await db.is_ready()
        assert await db.ensure_agent_exists({"name": "Ada"})
    finally:
        await db.close()


@pytest.mark.parametrize("key", ["dataDir", "data_dir"])
async def test_folder(dsn: str, server_dir: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if str(server_dir) not in dsn:
        pytest.skip("the embedded server is not used")
    monkeypatch.setenv("POSTGRES_URL", NOWHERE)
    db = await create_database_adapter({key: str(server_dir)}, uuid4())
    try:
        assert await db.is_ready()
        assert db._embedded is not None
    finally:
        await db.close()


async def test_neither_takes_the_environment(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", dsn)
    db = await create_database_adapter({}, uuid4())
    try:
        assert db.config.dsn == dsn
    finally:
        await db.close()


async def test_both_exclude_each_other(opened: list[DatabaseAdapter]) -> None:
    with pytest.raises(elizasql.ArgumentError, match="postgresUrl and dataDir"):
        await create_database_adapter({"postgresUrl": NOWHERE, "dataDir": "x"}, uuid4())
    assert opened == []


@pytest.mark.parametrize(
    "config",
    [
        {"postgresUrl": "postgresql://a:secret@127.0.0.1:1/a", "POSTGRES_URL": "postgresql://a:secret@127.0.0.1:1/b"},
        {"dataDir": "a", "data_dir": "b"},
        {"pool_max_size": 3, "POSTGRES_POOL_MAX": "4"},
    ],
)
async def test_two_names_of_a_setting_agree(config: dict[str, Any], opened: list[DatabaseAdapter]) -> None:
    with pytest.raises(elizasql.ArgumentError, match="two values") as caught:
        await create_database_adapter(config, uuid4())
    assert "secret" not in str(caught.value)
    assert opened == []


async def test_the_same_value_under_two_names(dsn: str) -> None:
    db = await create_database_adapter({"postgresUrl": dsn, "POSTGRES_URL": dsn, "dsn": None}, uuid4())
    await db.close()


async def test_further_settings(dsn: str) -> None:
    config = {"postgresUrl": dsn, "pool_max_size": 3, "indexing": "manual", "batch_size": 7}
    before = dict(config)
    db = await create_database_adapter(config, uuid4())
    try:
        assert (db.config.pool_max_size, db.config.indexing, db.config.batch_size) == (3, "manual", 7)
        assert config == before
    finally:
        await db.close()


async def test_settings_by_their_variables(dsn: str) -> None:
    config = {"POSTGRES_URL": dsn, "PGLITE_DATA_DIR": "", "POSTGRES_POOL_MAX": "3", "ELIZASQL_INDEXING": ""}
    db = await create_database_adapter(config, uuid4())
    try:
        assert (db.config.dsn, db.config.pool_max_size, db.config.indexing) == (dsn, 3, "background")
    finally:
        await db.close()


@pytest.mark.parametrize("config", [{"postgresURL": NOWHERE}, {"poolSize": 3}, {"pool_size": 3}])
async def test_unknown_key(config: dict[str, Any]) -> None:
    with pytest.raises(elizasql.ConfigurationError, match=next(iter(config))):
        await create_database_adapter({"dsn": NOWHERE, **config}, uuid4())


async def test_agent_that_is_no_id() -> None:
    with pytest.raises(elizasql.ArgumentError, match="agent_id"):
        await create_database_adapter({"postgresUrl": NOWHERE}, "Ada")


# --- the plugin ------------------------------------------------------------------------------------------------------


def test_plugin_tells_who_it_is() -> None:
    assert plugin.name == "elizasql"
    assert plugin.description
    assert plugin.priority == 0
    assert isinstance(plugin, elizaos.Plugin)


async def test_registers_where_none_is(dsn: str, opened: list[DatabaseAdapter]) -> None:
    runtime = Runtime({"POSTGRES_URL": dsn})
    await plugin.init({}, runtime)
    assert runtime.registered == opened
    adapter = opened[0]
    assert adapter.agent_id == runtime.agent_id
    assert await adapter.is_ready()
    await adapter.close()


@pytest.mark.parametrize("config", [None, {}, {"postgresUrl": NOWHERE}, {"nonsense": 1}])
async def test_keeps_the_one_that_is_there(config: Any, opened: list[DatabaseAdapter]) -> None:
    there = object()
    runtime = Runtime({"POSTGRES_URL": NOWHERE}, adapter=there)
    await plugin.init(config, runtime)
    assert runtime.registered == [there]
    assert opened == []


async def test_config_wins_over_the_runtime(dsn: str, opened: list[DatabaseAdapter]) -> None:
    runtime = Runtime({"POSTGRES_URL": NOWHERE, "PGLITE_DATA_DIR": "/nowhere"})
    await plugin.init({"postgresUrl": dsn, "indexing": "manual"}, runtime)
    assert runtime.asked == []
    assert opened[0].config.indexing == "manual"
    await opened[0].close()


async def test_an_empty_setting_is_none(dsn: str, opened: list[DatabaseAdapter]) -> None:
    await plugin.init({"POSTGRES_URL": "", "indexing": "manual"}, Runtime({"POSTGRES_URL": dsn}))
    assert (opened[0].config.dsn, opened[0].config.indexing) == (dsn, "manual")
    await opened[0].close()


async def test_address_of_the_runtime_wins_over_its_folder(dsn: str, opened: list[DatabaseAdapter]) -> None:
    runtime = Runtime({"POSTGRES_URL": dsn, "PGLITE_DATA_DIR": "/nowhere"})
    await plugin.init(None, runtime)
    assert opened[0].config.dsn == dsn
    await opened[0].close()


async def test_folder_of_the_runtime(
    dsn: str, server_dir: Path, opened: list[DatabaseAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    if str(server_dir) not in dsn:
        pytest.skip("the embedded server is not used")
    monkeypatch.setenv("POSTGRES_URL", NOWHERE)
    await plugin.init({}, Runtime({"PGLITE_DATA_DIR": str(server_dir)}))
    assert opened[0].config.data_dir == server_dir
    await opened[0].close()


async def test_settings_of_the_process_come_last(
    dsn: str, opened: list[DatabaseAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRES_URL", dsn)
    await plugin.init({}, Runtime({"POSTGRES_URL": "", "PGLITE_DATA_DIR": None}))
    assert opened[0].config.dsn == dsn
    await opened[0].close()


async def test_refused_registration(dsn: str, opened: list[DatabaseAdapter]) -> None:
    class Refusing(Runtime):
        def register_database_adapter(self, adapter: Any) -> None:
            raise RuntimeError("not today")

    with pytest.raises(elizasql.ConfigurationError, match="not today") as caught:
        await plugin.init({"postgresUrl": dsn}, Refusing())
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert len(opened) == 1
    with pytest.raises(elizasql.ClosedError):
        await opened[0].get_memory_by_id(uuid4())


async def test_failed_open_registers_nothing(opened: list[DatabaseAdapter]) -> None:
    runtime = Runtime({"POSTGRES_URL": NOWHERE})
    with pytest.raises(elizasql.ConnectionLostError):
        await plugin.init({}, runtime)
    assert runtime.registered == []
    assert opened == []


async def test_two_at_once_register_exactly_one(dsn: str, opened: list[DatabaseAdapter]) -> None:
    runtime = Runtime({"POSTGRES_URL": dsn})
    results = await asyncio.gather(*(plugin.init({}, runtime) for _ in range(4)), return_exceptions=True)
    assert results.count(None) == 1
    refused = [result for result in results if result is not None]
    assert all(isinstance(result, elizasql.ConfigurationError) for result in refused)
    assert all("registered meanwhile" in str(result) for result in refused)
    assert len(runtime.registered) == 1
    assert await runtime.registered[0].is_ready()
    assert [adapter for adapter in opened if not adapter._executor._closed] == runtime.registered
    await runtime.registered[0].close()


async def test_another_plugin_that_registers_meanwhile_stays(dsn: str, opened: list[DatabaseAdapter]) -> None:
    there = object()
    runtime = Runtime({"POSTGRES_URL": dsn})
    task = asyncio.create_task(plugin.init({}, runtime))
    await asyncio.sleep(0)
    runtime.register_database_adapter(there)
    with pytest.raises(elizasql.ConfigurationError, match="registered meanwhile"):
        await task
    assert runtime.registered == [there]
    assert opened[0]._executor._closed


# --- ids -------------------------------------------------------------------------------------------------------------

AGENT = "b850bc30-45f8-0041-a00a-83df46d8555d"


class Platform(str, Enum):
    TELEGRAM = "telegram:4711"


class Number(IntEnum):
    ANSWER = 42


# Beside each text what stringToUuid of @elizaos/core 1.7.2 gives for it.
@pytest.mark.parametrize(
    ("target", "id"),
    [
        ("", "da39a3ee-5e6b-0b0d-b255-bfef95601890"),
        ("telegram:4711", "04f5b725-fe1d-0599-b7c6-0976f36fc54c"),
        (Platform.TELEGRAM, "04f5b725-fe1d-0599-b7c6-0976f36fc54c"),
        ("hello world", "f0355dd5-2823-054c-ae66-a0b12842c215"),
        ("!'()*", "6c8f9af9-85ab-0b1e-b3f5-28c3212c0f5b"),
        ("-_.~", "7008eaf6-26d9-0454-9acb-263aa74a28ab"),
        ("a&b=c/d?e#f%20+@$,;:[]", "2b22c1bb-9ad9-037d-aa46-5dae431a43e2"),
        ("Grüße, Ærø", "d71ca789-943e-0c4e-9daa-0a549e08475e"),
        ("日本語", "783fc0ab-b904-0759-a125-627bcd50aed7"),
        ("\U0001f600", "3b1cb9c3-73ce-0f5d-95b7-896b3fd16f69"),
        ("\ud83d\ude00", "3b1cb9c3-73ce-0f5d-95b7-896b3fd16f69"),  # the same, as JavaScript holds it
        ("é", "51b673b1-3118-0437-9b1d-d95aa960dbf0"),
        ("e\u0301", "e1f229ed-4c31-0e46-97ca-57028526a3ae"),
        ("tab\tline\nzero\0", "e6669de8-2af9-07b4-a783-e756c05b010c"),
        ("\x7f\x80", "138644bc-0413-0b06-b2c6-95943d4d1fb0"),
        ("x" * 3000, "f212f0ce-b6b8-0884-b051-5c68d357b3a2"),
        (AGENT, AGENT),
        (AGENT.upper(), AGENT),
        (UUID(AGENT), AGENT),
        # Of no version and no variant that there is.
        ("ffffffff-ffff-ffff-ffff-ffffffffffff", "ffffffff-ffff-ffff-ffff-ffffffffffff"),
        (f"{AGENT}\n", "19156d2e-dd3e-0459-abc2-4330a7c414ac"),
        (f"{{{AGENT}}}", "81fb2c41-2062-072e-95da-28b03a334937"),
        (AGENT.replace("-", ""), "3b4a140c-d90b-0ef7-857e-3b83c27334d7"),
        (0, "b6589fc6-ab0d-082c-b120-99d1c2d40ab9"),
        (42, "92cfceb3-9d57-0914-ad8b-14d0e37643de"),
        ("42", "92cfceb3-9d57-0914-ad8b-14d0e37643de"),
        (Number.ANSWER, "92cfceb3-9d57-0914-ad8b-14d0e37643de"),
        (-7, "565e8bd1-01bd-0025-b6fe-79ba40584a15"),
        (2**53 - 1, "183c25f1-2286-0ccb-ab0c-26069be84781"),
    ],
)
def test_text_has_the_id_that_elizaos_gives_it(target: Any, id: str) -> None:
    made = string_to_uuid(target)
    assert type(made) is UUID and str(made) == id


@pytest.mark.parametrize(
    "target",
    ["\ud800", "a\udc00\ud800", None, True, 1.5, 2**53, -(2**53), 10**5000, b"x", ["x"]],
    ids=lambda target: type(target).__name__,  # Python does not write a number of 5,000 digits
)
def test_what_has_no_id_of_elizaos(target: Any) -> None:
    with pytest.raises(elizasql.ArgumentError, match=r"^target "):
        string_to_uuid(target)
    with pytest.raises(elizasql.ArgumentError):
        create_unique_uuid(AGENT, target)


# Beside each id what createUniqueUuid of @elizaos/core 1.7.2 gives for it.
@pytest.mark.parametrize(
    ("agent", "base", "id"),
    [
        (AGENT, AGENT, AGENT),
        (UUID(AGENT), AGENT, AGENT),
        (AGENT, UUID(AGENT), AGENT),
        (AGENT, AGENT.upper(), "07e3df2b-2497-05e2-a267-701ce038db64"),
        (AGENT.upper(), "4711", "fbbb7fcd-48cb-00c8-ac49-128847ee1c2b"),
        (AGENT, "4711", "baa4e824-114a-07d0-99d9-50d29d2eaaea"),
        (UUID(AGENT), 4711, "baa4e824-114a-07d0-99d9-50d29d2eaaea"),
        (AGENT, "general", "3d4dc0ca-9441-0da4-9811-1d81e18afa8a"),
        (AGENT, "0d3c5b6e-0b1a-4e8e-9a1c-3f1f3c2b7a10", "34cafe8f-bd6d-068c-8dc7-7333dc9ef43f"),
        (AGENT, UUID("0d3c5b6e-0b1a-4e8e-9a1c-3f1f3c2b7a10"), "34cafe8f-bd6d-068c-8dc7-7333dc9ef43f"),
        (AGENT, "", "af8538cd-76ed-0482-a76f-612fd3bfe66a"),
        (AGENT, "Zoë \U0001f600", "40b6f2bb-7620-0fc0-847a-c45b9fd27d13"),
    ],
)
def test_what_is_outside_has_an_id_for_each_agent(agent: Any, base: Any, id: str) -> None:
    made = create_unique_uuid(agent, base)
    assert type(made) is UUID and str(made) == id


def test_an_agent_whose_id_is_none_has_none_for_others() -> None:
    with pytest.raises(elizasql.ArgumentError, match=r"^agent_id must be a UUID, not 'Ada'.*string_to_uuid"):
        create_unique_uuid("Ada", "4711")
