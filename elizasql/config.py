"""Settings: an argument wins over the environment, the environment over `.env`, `.env` over the default."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Number
from pathlib import Path
from typing import Any, Literal, TypedDict
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from dotenv import dotenv_values, find_dotenv

from .errors import ConfigurationError, show

__all__ = ["Config", "Settings"]


def _number(
    kind: type[int] | type[float], least: float, most: int | None = None, why: str = ""
) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (str, Number)):
            raise ValueError("must be a number")
        number: Any = kind(value)  # type: ignore[arg-type]
        if kind is int and not isinstance(value, str) and number != value:
            raise ValueError("must be a whole number")
        if not least <= number < 1e9:
            raise ValueError(f"must be at least {least:g} and below 1,000,000,000")
        if most is not None and number > most:
            raise ValueError(f"must be at most {most:,}: {why}")
        return number

    return parse


# All at once, before the first connection: a million took a minute and a gigabyte.
_places = _number(int, 1, 10_000, "their places are made beforehand")


def _one_of(*allowed: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return allowed[allowed.index(value)]  # of an enumeration its value: its text is another one

    return parse


def _boolean(value: Any) -> bool:
    if str(value).lower() in ("1", "true", "yes", "on"):
        return True
    if str(value).lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("must be true or false")


def _dsn(value: Any) -> str:
    text = str(value).strip()
    if not text.startswith(("postgres://", "postgresql://")):
        raise ValueError("must start with postgres:// or postgresql://")
    if not _is_unambiguous(text):
        # A password with a bare "/" would be taken for host and database, and shown in messages as such.
        raise ValueError("is no address: write @ : / ? # % in a name or password as %40 %3A %2F %3F %23 %25")
    return text


_HOST = re.compile(r"([^:@\[\]]*|\[[0-9a-fA-F:.%]*\])(:[0-9]*)?")


def split_address(dsn: str) -> SplitResult:
    """Cut a connection string as `urlsplit` does, which takes one host, and of several with an IPv6 address none.

    Raises:
        ValueError: It is no address.
    """
    scheme, _, rest = dsn.partition("://")
    hosts = re.split("[/?#]", rest, maxsplit=1)[0]
    urlsplit("//" + re.sub(r"[\[\]]", "", hosts))  # refuses letters that somebody may read as / or @
    return urlsplit(f"{scheme}://{rest[len(hosts) :]}")._replace(netloc=hosts)


def _is_unambiguous(dsn: str) -> bool:
    try:
        parts = split_address(dsn)
        parse_qsl(parts.query, strict_parsing=bool(parts.query))
    except ValueError:
        return False
    user, _, location = parts.netloc.rpartition("@")
    if "@" in user + parts.path or "#" in dsn or re.search("%(?![0-9a-fA-F]{2})", dsn):
        return False
    return all(map(_HOST.fullmatch, location.split(",")))


def _folder(value: Any) -> Path:
    if isinstance(value, str) and not value.strip():
        raise ValueError("must not be empty: it would be the working directory")
    return Path(value).expanduser()


def _names(value: Any) -> frozenset[str]:
    names = value.split(",") if isinstance(value, str) else list(value)
    if not all(isinstance(name, str) for name in names):
        raise ValueError("must be names of memory types")
    cleaned = frozenset(name.strip() for name in names)
    if not cleaned or "" in cleaned:
        raise ValueError("must name at least one memory type, and none may be empty")
    return cleaned


def _label(value: Any) -> str:
    if not re.fullmatch("[ -~]{1,63}", str(value)):
        raise ValueError("must be 1 to 63 characters of ASCII: the server would alter anything else")
    return str(value)


# What an address says of a setting that is not given otherwise.
_SAID_BY_DSN = {"application_name": "application_name", "connect_timeout": "connection_timeout"}


def _setting(default: Any, variable: str, parse: Callable[[Any], Any], *, secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"variable": variable, "parse": parse})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that can be set. `Config.load()` fills it; the fields' environment variables stand in brackets.

    Attributes:
        dsn: PostgreSQL to connect to; None: the embedded server. Never shown. [POSTGRES_URL]
        data_dir: Folder of the embedded server. [PGLITE_DATA_DIR]
        migrate: Apply pending migrations at open. [ELIZASQL_MIGRATE]
        migration_dsn: Direct connection for migrations and notifications when `dsn` goes through a pooler. The
            environment's counts beside the environment's `dsn` only, and none does for the embedded server.
            [ELIZASQL_MIGRATION_URL]
        pool_max_size: Most connections for calls, of the adapters of one event loop with the same address and settings
            of the connection. Each adapter of `elizasql.sync` has a loop of its own; each `wait_for_tasks` takes one
            more. [POSTGRES_POOL_MAX]
        pool_min_size: Connections made at open and kept when idle; those that are lost are made anew as calls need
            them. [POSTGRES_POOL_MIN]
        pool_idle_timeout: Seconds after which an idle connection is closed, but for `pool_min_size`; 0: none is.
            [ELIZASQL_POOL_IDLE_TIMEOUT]
        background_pool_size: Connections besides, for the indexer and other work that nobody waits for.
            [ELIZASQL_BACKGROUND_POOL_SIZE]
        prepared_statements: False behind a pooler that cannot keep them apart, such as PgBouncer before 1.21 in
            transaction mode. [ELIZASQL_PREPARED_STATEMENTS]
        connection_timeout: Seconds to wait for a new connection, and for a pooled one of the callers'; where it is not
            set, the `connect_timeout` of `dsn`. [ELIZASQL_CONNECTION_TIMEOUT]
        timeout: Seconds that a call may take altogether, waits and retries included; most methods take their own.
            [ELIZASQL_TIMEOUT]
        max_retries: Tries of a call in all, the first included; 1: none is made again. [ELIZASQL_MAX_RETRIES]
        base_delay: Seconds before the second try; doubles with every further one. [ELIZASQL_BASE_DELAY]
        max_delay: Longest wait between tries, in seconds, without the jitter. [ELIZASQL_MAX_DELAY]
        jitter_max: At most so many seconds more, by chance. [ELIZASQL_JITTER_MAX]
        failure_threshold: Failures in a row that open the circuit breaker. [ELIZASQL_FAILURE_THRESHOLD]
        reset_timeout: Seconds that it stays open. [ELIZASQL_RESET_TIMEOUT]
        half_open_max_attempts: Calls that then try at a time, and successes that close it.
            [ELIZASQL_HALF_OPEN_MAX_ATTEMPTS]
        slow_call: Seconds from which a call is logged as slow, but for those whose work takes long, such as
            `load_memories`. [ELIZASQL_SLOW_CALL]
        telemetry: Spans and durations through OpenTelemetry, where it is installed. [ELIZASQL_TELEMETRY]
        handle_signals: Shut down in order at SIGTERM and SIGHUP, where the application does not handle them.
            [ELIZASQL_HANDLE_SIGNALS]
        indexing: Who moves new vectors into the HNSW index: "background": a task of the adapter; "manual": nobody but
            `index_memories`; "inline": each write itself. [ELIZASQL_INDEXING]
        index_batch_size: Most rows that the indexer moves in one transaction; it ends one after 50 ms in any case.
            [ELIZASQL_INDEX_BATCH_SIZE]
        index_interval: Seconds between the indexer's looks for what others have written; what is written by its own
            adapter it moves at once. After trouble it goes on sooner. [ELIZASQL_INDEX_INTERVAL]
        ef_search: Candidates that an HNSW search keeps, 1 to 1,000; more is slower and finds more. In an index of more
            than 100,000 vectors more are kept, of a million 1.8 times as many. [ELIZASQL_EF_SEARCH]
        batch_size: Rows in one statement of a batch write, 1 to 5,000. [ELIZASQL_BATCH_SIZE]
        log_lane: Whose connections writing logs takes: "interactive", or "background", so that a flood of logs keeps no
            other caller waiting; while two loads or builds have these, it waits itself. [ELIZASQL_LOG_LANE]
        memory_types: The only values taken as `table_name`; None: any. [ELIZASQL_MEMORY_TYPES, comma-separated]
        resident: Whether memories are held in the process and searched there: "off"; "auto": where that pays, loaded in
            the background; "required": wherever they fit and are not too many, from the first search on, which
            waits while they are loaded, by one of the callers' connections. [ELIZASQL_RESIDENT]
        resident_memory_mb: What the process may hold of them, over all agents, in MiB; 0: nothing.
            [ELIZASQL_RESIDENT_MEMORY_MB]
        resident_max_vectors: Most vectors that a search compares in the process; 0: none, nothing is held; None: 40,000
            of 384 dimensions, and fewer of more: 10,000 of 1536. [ELIZASQL_RESIDENT_MAX_VECTORS]
        application_name: What the server's activity view shows; where it is not set, what `dsn` says.
            [ELIZASQL_APPLICATION_NAME]
    """

    dsn: str | None = _setting(None, "POSTGRES_URL", _dsn, secret=True)
    data_dir: Path = _setting(Path("pglite"), "PGLITE_DATA_DIR", _folder)
    migrate: bool = _setting(True, "ELIZASQL_MIGRATE", _boolean)
    migration_dsn: str | None = _setting(None, "ELIZASQL_MIGRATION_URL", _dsn, secret=True)
    pool_max_size: int = _setting(20, "POSTGRES_POOL_MAX", _places)
    pool_min_size: int = _setting(1, "POSTGRES_POOL_MIN", _number(int, 0))
    pool_idle_timeout: float = _setting(30.0, "ELIZASQL_POOL_IDLE_TIMEOUT", _number(float, 0))
    background_pool_size: int = _setting(2, "ELIZASQL_BACKGROUND_POOL_SIZE", _places)
    prepared_statements: bool = _setting(True, "ELIZASQL_PREPARED_STATEMENTS", _boolean)
    connection_timeout: float = _setting(5.0, "ELIZASQL_CONNECTION_TIMEOUT", _number(float, 0.001))
    timeout: float = _setting(60.0, "ELIZASQL_TIMEOUT", _number(float, 0.001))
    max_retries: int = _setting(3, "ELIZASQL_MAX_RETRIES", _number(int, 1))
    base_delay: float = _setting(1.0, "ELIZASQL_BASE_DELAY", _number(float, 0))
    max_delay: float = _setting(10.0, "ELIZASQL_MAX_DELAY", _number(float, 0))
    jitter_max: float = _setting(1.0, "ELIZASQL_JITTER_MAX", _number(float, 0))
    failure_threshold: int = _setting(5, "ELIZASQL_FAILURE_THRESHOLD", _number(int, 1))
    reset_timeout: float = _setting(60.0, "ELIZASQL_RESET_TIMEOUT", _number(float, 0))
    half_open_max_attempts: int = _setting(3, "ELIZASQL_HALF_OPEN_MAX_ATTEMPTS", _number(int, 1))
    slow_call: float = _setting(2.0, "ELIZASQL_SLOW_CALL", _number(float, 0))
    telemetry: bool = _setting(True, "ELIZASQL_TELEMETRY", _boolean)
    handle_signals: bool = _setting(True, "ELIZASQL_HANDLE_SIGNALS", _boolean)
    indexing: Literal["background", "manual", "inline"] = _setting(
        "background", "ELIZASQL_INDEXING", _one_of("background", "manual", "inline")
    )
    index_batch_size: int = _setting(200, "ELIZASQL_INDEX_BATCH_SIZE", _number(int, 1))
    index_interval: float = _setting(30.0, "ELIZASQL_INDEX_INTERVAL", _number(float, 0.001))
    ef_search: int = _setting(100, "ELIZASQL_EF_SEARCH", _number(int, 1, 1000, "pgvector takes no more"))
    batch_size: int = _setting(1000, "ELIZASQL_BATCH_SIZE", _number(int, 1, 5000, "no more rows go in one statement"))
    log_lane: Literal["interactive", "background"] = _setting(
        "interactive", "ELIZASQL_LOG_LANE", _one_of("interactive", "background")
    )
    memory_types: frozenset[str] | None = _setting(None, "ELIZASQL_MEMORY_TYPES", _names)
    resident: Literal["auto", "off", "required"] = _setting(
        "auto", "ELIZASQL_RESIDENT", _one_of("auto", "off", "required")
    )
    resident_memory_mb: int = _setting(256, "ELIZASQL_RESIDENT_MEMORY_MB", _number(int, 0))
    resident_max_vectors: int | None = _setting(None, "ELIZASQL_RESIDENT_MAX_VECTORS", _number(int, 0))
    application_name: str = _setting("elizasql", "ELIZASQL_APPLICATION_NAME", _label)

    @classmethod
    def load(cls, *, environ: Mapping[str, str] | None = None, **given: Any) -> Config:
        """Collect the settings.

        Args:
            environ: Environment variables; None: those of the process, over a `.env` found from the working directory
                upwards. The process's environment is not changed.
            **given: Settings by name; None counts as not given.

        Raises:
            ConfigurationError: An unknown setting, or a value that does not fit; names the setting and its origin. Or
                ENABLE_DATA_ISOLATION is true, ElizaOS's row isolation between servers, which does not exist here.
        """
        if environ is None:
            environ = {**_read_env_file(), **os.environ}
        if environ.get("ENABLE_DATA_ISOLATION", "").strip().lower() == "true":
            # In the original it turns on row security between deployments: to go on without would be to lie.
            raise ConfigurationError(
                "ENABLE_DATA_ISOLATION: there is no row isolation between servers here; give each its own database, "
                "and set it to false"
            )
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(given) - set(known))
        if unknown:
            near = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
            hint = f"; did you mean {', '.join(near)}?" if near else f"; known are {', '.join(known)}"
            raise ConfigurationError(f"unknown setting {', '.join(unknown)}{hint}")
        if given.get("dsn") is not None and given.get("data_dir") is not None:
            raise ConfigurationError("dsn and data_dir exclude each other: PostgreSQL, or the embedded server's folder")
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for name, setting in known.items():
            variable = setting.metadata["variable"]
            if given.get(name) is not None:
                raw, origin = given[name], name
            elif environ.get(variable, "").strip():
                raw, origin = environ[variable].strip(), variable
            else:
                continue
            origins[name] = origin
            try:
                values[name] = setting.metadata["parse"](raw)
            except (TypeError, ValueError, OverflowError, RuntimeError) as error:
                shown = "" if not setting.repr else f" {show(raw)}"
                raise ConfigurationError(f"{origin}{shown}: {error}") from None
        if given.get("data_dir") is not None:
            # A folder that the call names means the embedded server, whatever the environment says.
            values.pop("dsn", None)
        if "dsn" not in values or (given.get("dsn") is not None and given.get("migration_dsn") is None):
            # The environment's address for migrations is of the environment's database, not of the one that is opened.
            values.pop("migration_dsn", None)
        said = dict(parse_qsl(split_address(values.get("dsn", "")).query))
        if said.get("connect_timeout") == "0":
            del said["connect_timeout"]  # libpq's word for no limit
        for parameter, name in _SAID_BY_DSN.items():
            if parameter not in said or name in values:
                continue
            try:
                values[name] = known[name].metadata["parse"](said[parameter])
            except ValueError as error:
                raise ConfigurationError(f"{parameter} of dsn {show(said[parameter])}: {error}") from None
        config = cls(**values)
        if config.pool_min_size > config.pool_max_size:
            least, most = (
                f"{origins.get(name, name)} {getattr(config, name)}" for name in ("pool_min_size", "pool_max_size")
            )
            raise ConfigurationError(f"{least} is larger than {most}")
        return config

    @property
    def where(self) -> str:
        """Where the data is, without any secret: for messages and logs."""
        return f"embedded server in {self.data_dir}" if self.dsn is None else redact(self.dsn)


class Settings(TypedDict, total=False):
    """What `open` and `connect` take by name besides the address, for type checkers: `**settings: Unpack[Settings]`.

    Fields of `Config`, which says what each means; None counts as not given.
    """

    migrate: bool | None
    migration_dsn: str | None
    pool_max_size: int | None
    pool_min_size: int | None
    pool_idle_timeout: float | None
    background_pool_size: int | None
    prepared_statements: bool | None
    connection_timeout: float | None
    timeout: float | None
    max_retries: int | None
    base_delay: float | None
    max_delay: float | None
    jitter_max: float | None
    failure_threshold: int | None
    reset_timeout: float | None
    half_open_max_attempts: int | None
    slow_call: float | None
    telemetry: bool | None
    handle_signals: bool | None
    indexing: Literal["background", "manual", "inline"] | None
    index_batch_size: int | None
    index_interval: float | None
    ef_search: int | None
    batch_size: int | None
    log_lane: Literal["interactive", "background"] | None
    memory_types: str | Iterable[str] | None
    resident: Literal["auto", "off", "required"] | None
    resident_memory_mb: int | None
    resident_max_vectors: int | None
    application_name: str | None


def _read_env_file() -> dict[str, str]:
    path = ".env"
    try:
        path = find_dotenv(usecwd=True)
        found = dotenv_values(path, encoding="utf-8-sig")  # not every release passes over the mark of an editor
    except (OSError, UnicodeDecodeError) as error:
        # What was read stays out of the message: the file holds secrets.
        raise ConfigurationError(f"{path} cannot be read: {type(error).__name__}") from None
    return {name: value for name, value in found.items() if value is not None}


def redact(dsn: str) -> str:
    """Take everything out of a connection string that could be a secret: keep host, port and database."""
    try:
        parts = split_address(_dsn(dsn))
    except ValueError:
        return "(address)"
    # A host may be a folder with a socket, which only a parameter can name.
    where = urlencode([each for each in parse_qsl(parts.query) if each[0] in ("host", "port")], safe="/,")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" + (f"?{where}" if where else "")
