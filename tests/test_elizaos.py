"""ElizaOS-shaped doors: the factory and the plugin, with a runtime as a program of its own would have it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

import elizasql
from elizasql import DatabaseAdapter, create_database_adapter, elizaos, plugin

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
