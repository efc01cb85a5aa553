"""ElizaOS-shaped doors: `create_database_adapter` and the plugin that registers an adapter with a runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol
from uuid import UUID

from .adapter import DatabaseAdapter, open
from .config import Config
from .errors import ArgumentError, ConfigurationError, show

__all__ = ["Plugin", "Runtime", "create_database_adapter", "plugin"]

# Names that a configuration may use besides those of `Config` itself: ElizaOS's, and the environment variables'.
_SETTINGS = {setting.metadata["variable"]: setting.name for setting in fields(Config)} | {
    "postgresUrl": "dsn",
    "postgres_url": "dsn",
    "dataDir": "data_dir",
}


def _read_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise ArgumentError(f"a configuration must be a mapping, not {type(config).__name__}")
    given: dict[str, Any] = {}
    for key, value in config.items():
        if value is None or (isinstance(value, str) and not value):
            continue
        if not isinstance(key, str):
            raise ArgumentError(f"the name of a setting must be a string, not {show(key)}")
        name = _SETTINGS.get(key, key)
        if name in given and given[name] != value:
            # Not shown: it may be an address with a password.
            raise ArgumentError(f"{name} has two values: under {key!r} and another key")
        given[name] = value
    return given


class Runtime(Protocol):
    """What the plugin needs of an agent's runtime."""

    agent_id: UUID | str

    @property
    def adapter(self) -> Any | None:
        """The database adapter that is registered, None where there is none."""

    def get_setting(self, key: str) -> Any | None:
        """Give a setting of the agent, None where it is not set."""

    def register_database_adapter(self, adapter: Any) -> None:
        """Take the adapter that the agent shall use."""


async def create_database_adapter(config: Mapping[str, Any], agent_id: UUID | str) -> DatabaseAdapter:
    """Open an adapter from a configuration in ElizaOS's form; `await adapter.close()` when done.

    Args:
        config: `postgresUrl` or `dataDir`, neither for the environment's; and any field of `elizasql.Config`, also by
            the name of its environment variable. None and "" count as not given.
        agent_id: The agent.

    Raises:
        ArgumentError: `postgresUrl` and `dataDir` are both given, or a setting has two values under two names.
        As `elizasql.open`.

    Source: createDatabaseAdapter; differs: gives an adapter that is connected and migrated.
    """
    settings = _read_settings(config)
    if "dsn" in settings and "data_dir" in settings:
        raise ArgumentError("postgresUrl and dataDir exclude each other")
    return await open(agent_id=agent_id, **settings)


@dataclass(frozen=True, slots=True)
class Plugin:
    """The plugin, as a runtime loads it."""

    name: str = "elizasql"
    description: str = "The agent's memory on PostgreSQL: raw SQL, vector search, an embedded server by default."
    priority: int = 0

    async def init(self, config: Mapping[str, Any] | None, runtime: Runtime) -> None:
        """Open an adapter for the runtime's agent and register it; a runtime that has one keeps it.

        Settings come from `config`, then from the runtime's POSTGRES_URL and PGLITE_DATA_DIR, then from the process.

        Raises:
            ConfigurationError: The runtime refused the adapter, as when another plugin registered one meanwhile; ours
                is closed again.
            As `elizasql.open`.
        """
        if runtime.adapter is not None:
            return
        settings = _read_settings(config or {})
        if not settings.keys() & {"dsn", "data_dir"}:
            address = runtime.get_setting("POSTGRES_URL")
            settings |= {"dsn": address} if address else {"data_dir": runtime.get_setting("PGLITE_DATA_DIR")}
        adapter = await create_database_adapter(settings, runtime.agent_id)
        try:
            if runtime.adapter is not None:
                raise ConfigurationError("another database adapter was registered meanwhile: load one database plugin")
            runtime.register_database_adapter(adapter)
        except ConfigurationError:
            await adapter.close()
            raise
        except Exception as error:
            await adapter.close()
            raise ConfigurationError(f"the runtime refused the database adapter: {error}") from error


plugin: Plugin = Plugin()
