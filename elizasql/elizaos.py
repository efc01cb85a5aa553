"""ElizaOS-shaped doors: the factory of adapters, the plugin that registers one with a runtime, and its ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol
from urllib.parse import quote
from uuid import UUID

from ._codecs import as_id
from .adapter import DatabaseAdapter, open
from .config import Config
from .errors import ArgumentError, ConfigurationError, show

__all__ = ["Plugin", "Runtime", "create_database_adapter", "create_unique_uuid", "plugin", "string_to_uuid"]

# Names that a configuration may use besides those of `Config` itself: ElizaOS's, and the environment variables'.
_SETTINGS = {setting.metadata["variable"]: setting.name for setting in fields(Config)} | {
    "postgresUrl": "dsn",
    "postgres_url": "dsn",
    "dataDir": "data_dir",
}

# The one form of a UUID that ElizaOS leaves as it is; all other text is hashed.
_UUID = re.compile("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


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


def string_to_uuid(target: str | int | UUID) -> UUID:
    """Give the id that ElizaOS makes of a text: of the name of a character, or of an id that is no UUID.

    The same text always has the same id. A UUID, or the text of one with its four dashes, is its own.

    Args:
        target: Any text, also an empty one; or a whole number, which counts as its digits.

    Raises:
        ArgumentError: Neither text nor a whole number; an unpaired surrogate in the text; or a number from 2**53 on,
            which JavaScript rounds: give its digits as text.

    Source: stringToUuid of `@elizaos/core` 1.7.2; differs: numbers with a fraction are refused, since the two languages
    write them differently; a UUID comes without the case of its letters.
    """
    text = _spell(target, "target")
    if _UUID.fullmatch(text):
        return UUID(text)
    try:
        # Through UTF-16, which joins the pairs of surrogates.
        encoded = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le").encode()
    except UnicodeDecodeError:
        raise ArgumentError(f"target has an unpaired surrogate: {show(target)}") from None
    escaped = quote(encoded, safe="!'()*")
    digest = bytearray(hashlib.sha1(escaped.encode(), usedforsecurity=False).digest()[:16])
    digest[6] &= 0x0F  # a version that no other UUID has: 0
    digest[8] = digest[8] & 0x3F | 0x80
    return UUID(bytes=bytes(digest))


def create_unique_uuid(agent_id: UUID | str, base_id: UUID | str | int) -> UUID:
    """Give the id that an agent of ElizaOS has for something outside: a user, a channel, a server of a platform.

    Args:
        agent_id: The agent. Of text the letters count as they are: the original hashes what its runtime has.
        base_id: The id there; the agent's own stays what it is.

    Raises:
        ArgumentError: `agent_id` is no UUID; or as `string_to_uuid`.

    Source: createUniqueUuid of `@elizaos/core` 1.7.2; differs: takes the agent's id in place of a runtime.
    """
    own = as_id(agent_id, "agent_id")
    base, agent = _spell(base_id, "base_id"), _spell(agent_id, "agent_id")
    return own if base == agent else string_to_uuid(f"{base}:{agent}")


def _spell(value: object, name: str) -> str:
    """Write an id as JavaScript would."""
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, str):
        return str.__str__(value)  # of an enumeration its value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return int.__repr__(value)
    raise ArgumentError(f"{name} must be text, or a whole number below 2**53, not {show(value)}")
