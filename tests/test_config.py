"""Where settings come from, what is refused, and that no secret is ever shown."""

from __future__ import annotations

import dataclasses
import os
import re
import traceback
import typing
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import elizasql
from elizasql import Config, ConfigurationError, Settings, sync
from elizasql.config import redact

SECRET = "hunter2-secret"
DSN = f"postgresql://ann:{SECRET}@db.example:5433/agents?application_name=x"
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
VARIABLES = {name: field.metadata["variable"] for name, field in FIELDS.items()}

# For each setting: as text, what it becomes, and another value as an argument.
VALUES: dict[str, tuple[str, Any, Any]] = {
    "dsn": ("postgres://a/b", "postgres://a/b", "postgresql://c/d"),
    "data_dir": ("some/where", Path("some/where"), Path("elsewhere")),
    "migrate": ("false", False, True),
    "migration_dsn": ("postgres://direct/b", "postgres://direct/b", "postgresql://other/d"),
    "pool_max_size": ("7", 7, 8),
    "pool_min_size": ("3", 3, 4),
    "pool_idle_timeout": ("12.5", 12.5, 13.0),
    "background_pool_size": ("3", 3, 4),
    "prepared_statements": ("no", False, True),
    "connection_timeout": ("2", 2.0, 2.5),
    "timeout": ("9", 9.0, 9.5),
    "max_retries": ("4", 4, 5),
    "base_delay": ("0.5", 0.5, 0.25),
    "max_delay": ("5", 5.0, 6.0),
    "jitter_max": ("0", 0.0, 0.5),
    "failure_threshold": ("3", 3, 4),
    "reset_timeout": ("30", 30.0, 31.0),
    "half_open_max_attempts": ("2", 2, 1),
    "slow_call": ("0.5", 0.5, 0.25),
    "telemetry": ("off", False, True),
    "handle_signals": ("0", False, True),
    "indexing": ("manual", "manual", "inline"),
    "index_batch_size": ("50", 50, 51),
    "index_interval": ("0.5", 0.5, 0.25),
    "ef_search": ("200", 200, 300),
    "batch_size": ("10", 10, 11),
    "log_lane": ("background", "background", "interactive"),
    "memory_types": ("messages, facts", frozenset({"messages", "facts"}), frozenset({"documents"})),
    "resident": ("off", "off", "required"),
    "resident_memory_mb": ("64", 64, 65),
    "resident_max_vectors": ("100", 100, 101),
    "application_name": ("ada", "ada", "bob"),
}


def test_type_checkers_know_every_setting() -> None:
    types = {name: str(field.type) for name, field in FIELDS.items()}
    del types["dsn"], types["data_dir"]  # arguments of their own
    types["memory_types"] = "str | Iterable[str]"
    written = {name: kind.__forward_arg__ for name, kind in Settings.__annotations__.items()}
    assert written == {name: kind.removesuffix(" | None") + " | None" for name, kind in types.items()}


@pytest.mark.parametrize("function", [elizasql.open, elizasql.connect, sync.open, sync.connect])
def test_types_can_be_asked_for_at_run_time(function: Any) -> None:
    """As frameworks do that hand arguments in."""
    assert typing.get_args(typing.get_type_hints(function)["settings"]) == (Settings,)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment and a working folder without any setting."""
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def beside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address for migrations counts beside one of the same database only."""
    if request.node.callspec.params["name"] == "migration_dsn":
        monkeypatch.setenv("POSTGRES_URL", "postgres://a/b")


def test_every_setting_is_tested_here() -> None:
    assert list(VALUES) == list(FIELDS)


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("name", FIELDS)
def test_argument_environment_file_default(name: str, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable, (text, parsed, argument) = VARIABLES[name], VALUES[name]
    assert getattr(Config.load(), name) == FIELDS[name].default

    (bare / ".env").write_text(f"{variable}={text}\n")
    assert getattr(Config.load(), name) == parsed

    # What is behind is not even looked at.
    (bare / ".env").write_text(f"{variable}={'?' * 70}\n")
    monkeypatch.setenv(variable, text)
    assert getattr(Config.load(), name) == parsed

    monkeypatch.setenv(variable, "?" * 70)
    assert getattr(Config.load(**{name: argument}), name) == argument


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_variable_counts_as_unset(name: str, empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLES[name], empty)
    assert getattr(Config.load(), name) == FIELDS[name].default


def test_none_counts_as_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_POOL_MAX", "7")
    assert Config.load(pool_max_size=None).pool_max_size == 7


@pytest.mark.parametrize("word", ["1", "true", "YES", "On"])
def test_words_for_true(word: str) -> None:
    assert Config.load(environ={VARIABLES["telemetry"]: word}).telemetry is True


def test_names_of_the_original_are_kept() -> None:
    config = Config.load(
        environ={
            "POSTGRES_URL": "postgres://a/b",
            "PGLITE_DATA_DIR": "~/x",
            "POSTGRES_POOL_MAX": " 9 ",
            "POSTGRES_POOL_MIN": "2",
        }
    )
    assert (config.dsn, config.pool_max_size, config.pool_min_size) == ("postgres://a/b", 9, 2)
    assert config.data_dir == Path("~/x").expanduser()


@pytest.mark.parametrize(
    ("given", "environ", "wanted"),
    [
        ({}, {"POSTGRES_URL": "postgres://a/b"}, "postgres://env/d"),
        ({"migration_dsn": "postgres://call/d"}, {"POSTGRES_URL": "postgres://a/b"}, "postgres://call/d"),
        ({"dsn": "postgres://a/b", "migration_dsn": "postgres://call/d"}, {}, "postgres://call/d"),
        ({"dsn": "postgres://a/b"}, {}, None),
        ({"dsn": "postgres://a/b"}, {"POSTGRES_URL": "postgres://a/b"}, None),
        ({}, {}, None),
        ({"data_dir": "x"}, {"POSTGRES_URL": "postgres://a/b"}, None),
        ({"data_dir": "x", "migration_dsn": "postgres://call/d"}, {"POSTGRES_URL": "postgres://a/b"}, None),
    ],
)
def test_address_for_migrations_is_of_the_database_that_is_opened(
    given: dict[str, Any], environ: dict[str, str], wanted: str | None
) -> None:
    config = Config.load(environ={"ELIZASQL_MIGRATION_URL": "postgres://env/d", **environ}, **given)
    assert config.migration_dsn == wanted
    assert (config.dsn is None) == ("data_dir" in given or not (given or environ))


def test_application_name_of_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """As every other client takes it; what is set for this library counts more."""
    monkeypatch.setenv("POSTGRES_URL", "postgres://a/b?application_name=ada%20%26%20co&sslmode=disable")
    assert Config.load().application_name == "ada & co"
    assert Config.load(application_name="bob").application_name == "bob"
    assert Config.load(dsn="postgres://a/b").application_name == Config.load(data_dir="x").application_name
    assert Config.load(data_dir="x").application_name == "elizasql"
    monkeypatch.setenv("ELIZASQL_APPLICATION_NAME", "cyd")
    assert Config.load().application_name == "cyd"
    with pytest.raises(ConfigurationError, match="application_name of dsn 'naïve': must be"):
        Config.load(environ={"POSTGRES_URL": "postgres://a/b?application_name=na%C3%AFve"})


def test_time_to_connect_of_the_address() -> None:
    address = "postgres://a/b?sslmode=require&connect_timeout="
    default = Config.load(environ={}).connection_timeout
    for said, option, wanted in (("7", {}, 7.0), ("7", {"connection_timeout": 3}, 3.0), ("0", {}, default)):
        assert Config.load(dsn=address + said, environ={}, **option).connection_timeout == wanted
    assert Config.load(dsn=address + "7", environ={"ELIZASQL_CONNECTION_TIMEOUT": "4"}).connection_timeout == 4.0
    with pytest.raises(ConfigurationError, match="connect_timeout of dsn 'soon'"):
        Config.load(dsn=address + "soon", environ={})


def test_file_is_found_upwards_and_environment_is_left_alone(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / ".env").write_text("POSTGRES_POOL_MAX=7\nOTHER=thing\n")
    below = bare / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    before = dict(os.environ)
    assert Config.load().pool_max_size == 7
    assert dict(os.environ) == before


def test_name_without_a_value_in_the_file_counts_as_unset(bare: Path) -> None:
    (bare / ".env").write_text("POSTGRES_POOL_MIN\nPOSTGRES_POOL_MAX=7\n")
    assert (Config.load().pool_min_size, Config.load().pool_max_size) == (FIELDS["pool_min_size"].default, 7)


def test_file_that_begins_with_a_byte_order_mark(bare: Path) -> None:
    (bare / ".env").write_text("POSTGRES_POOL_MAX=7\n", encoding="utf-8-sig")
    assert Config.load().pool_max_size == 7


def test_given_environment_replaces_process_and_file(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / ".env").write_text("POSTGRES_POOL_MAX=7\n")
    monkeypatch.setenv("POSTGRES_POOL_MAX", "8")
    assert Config.load(environ={}).pool_max_size == 20


def test_file_that_is_no_text(bare: Path) -> None:
    (bare / ".env").write_bytes(b"POSTGRES_URL=\xff\xfe" + SECRET.encode())
    with pytest.raises(ConfigurationError, match=rf"^{re.escape(str(bare / '.env'))} cannot be read") as caught:
        Config.load()
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_working_folder_that_is_gone(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = bare / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigurationError, match=r"^\.env cannot be read: FileNotFoundError$"):
        Config.load()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dsn", "mysql://a/b", "postgres://"),
        ("dsn", "host=a", "postgres://"),
        ("migration_dsn", "POSTGRES://a", "postgres://"),
        ("data_dir", 5, ""),
        ("data_dir", " ", "must not be empty"),
        ("data_dir", "~no-such-user-here/x", "home"),
        ("migrate", "maybe", "true or false"),
        ("pool_max_size", 0, "at least 1"),
        ("pool_max_size", "many", "'many'"),
        ("pool_max_size", True, "number"),
        ("pool_max_size", 2.5, "whole"),
        ("pool_max_size", Decimal("2.5"), "whole"),
        ("pool_max_size", Fraction(5, 2), "whole"),
        ("pool_max_size", np.float32(2.5), "whole"),
        ("pool_max_size", np.True_, "number"),
        ("pool_max_size", b"2", "number"),
        ("pool_max_size", "2.5", "2.5"),
        ("pool_max_size", 10**9, "below"),
        ("pool_max_size", 10_001, "at most 10,000"),
        ("pool_max_size", "10001", "at most 10,000"),
        ("background_pool_size", 10_001, "at most 10,000"),
        ("pool_max_size", float("inf"), "infinity"),
        ("pool_min_size", -1, "at least 0"),
        ("pool_idle_timeout", -1, "at least 0"),
        ("connection_timeout", 0, "at least 0.001"),
        ("connection_timeout", "nan", "at least"),
        ("timeout", "inf", "below"),
        ("indexing", "sometimes", "background, manual, inline"),
        ("index_batch_size", 0, "at least 1"),
        ("index_interval", 0, "at least"),
        ("ef_search", 1001, "at most 1,000"),
        ("ef_search", "2000", "ef_search '2000': must be at most 1,000"),
        ("batch_size", 5001, "at most 5,000"),
        ("batch_size", "5001", "at most 5,000"),
        ("memory_types", "", "memory type"),
        ("memory_types", "a,,b", "none may be empty"),
        ("memory_types", [], "at least one memory type"),
        ("memory_types", 5, "iterable"),
        ("memory_types", b"a", "names"),
        ("application_name", "x" * 64, "63"),
        ("application_name", "naïve", "ASCII"),
        ("application_name", "a\x00b", "ASCII"),
    ],
)
def test_bad_value_names_setting_and_origin(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Config.load(**{name: value})
    assert str(caught.value).startswith(name)
    assert message in str(caught.value)
    assert not caught.value.retryable
    if isinstance(value, str) and value.strip():
        with pytest.raises(ConfigurationError, match=f"^{VARIABLES[name]}"):
            Config.load(environ={VARIABLES[name]: value})


def test_a_word_may_come_from_an_enumeration() -> None:
    class Mode(str, Enum):
        MANUAL = "manual"

    found: str = Config.load(environ={}, indexing=Mode.MANUAL).indexing
    assert type(found) is str
    assert found == "manual"


def test_sizes_that_contradict_each_other() -> None:
    """Each is called what it was given as: a variable is easily overlooked."""
    for options, environ, message in (
        ({"pool_min_size": 5, "pool_max_size": 4}, {}, "pool_min_size 5 is larger than pool_max_size 4"),
        ({}, {"POSTGRES_POOL_MIN": "5", "POSTGRES_POOL_MAX": "4"}, "POSTGRES_POOL_MIN 5 .* than POSTGRES_POOL_MAX 4"),
        ({"pool_max_size": 4}, {"POSTGRES_POOL_MIN": "5"}, "POSTGRES_POOL_MIN 5 is larger than pool_max_size 4"),
        ({"pool_min_size": 21}, {}, "pool_min_size 21 is larger than pool_max_size 20"),
    ):
        with pytest.raises(ConfigurationError, match=f"^{message}$"):
            Config.load(environ=environ, **options)
    assert Config.load(environ={}, pool_min_size=5, pool_max_size=5).pool_min_size == 5


def test_unknown_setting() -> None:
    with pytest.raises(ConfigurationError, match="unknown setting pqr, zzz; known are dsn, data_dir") as caught:
        Config.load(pqr=3, zzz=SECRET)
    assert SECRET not in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"unknown setting datadir; did you mean data_dir\?"):
        Config.load(datadir="x")


@pytest.mark.parametrize("value", ["true", "TRUE", " true "])
def test_row_isolation_of_the_original_is_refused(value: str) -> None:
    with pytest.raises(ConfigurationError, match="ENABLE_DATA_ISOLATION"):
        Config.load(environ={"ENABLE_DATA_ISOLATION": value})
    assert Config.load(environ={"ENABLE_DATA_ISOLATION": "false"}) == Config()


def test_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config.load().dsn = "postgres://x/y"  # type: ignore[misc]


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_address_is_not_shown() -> None:
    config = Config.load(dsn=DSN, migration_dsn=DSN)
    assert config.dsn == DSN
    for shown in (repr(config), str(config), config.where, f"{config}"):
        assert SECRET not in shown
        assert "ann" not in shown
    assert config.where == "postgresql://db.example:5433/agents"
    assert Config.load(data_dir="/var/x").where == "embedded server in /var/x"


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgres://ann:pa/{SECRET}@host/db",
        f"postgres://ann:pa?{SECRET}@host/db",
        f"postgres://ann:pa#{SECRET}@host/db",
        f"postgres://ann:{SECRET}@x@host/db",
        f"postgres://ann:{SECRET}%zz@host/db",
        f"postgres://ann:{SECRET}/db",
        f"postgres://ann:{SECRET}",
        f"postgres://ann:{SECRET}\u2100@host/db",
        f"postgres://ann:{SECRET}@[::1/db",
        f"postgres://ann:p@host/db?{SECRET}",
        f"postgres://ann:p@host/db#{SECRET}",
        f"mysql://ann:{SECRET}@host/db",
        f"{SECRET}",
        f"postgres:/ann:{SECRET}@host/db",
    ],
)
@pytest.mark.parametrize("name", ["dsn", "migration_dsn"])
def test_address_that_could_be_read_in_two_ways_is_refused(dsn: str, name: str) -> None:
    """What stands on the wrong side of a bare "/" or "@" would be shown as the host."""
    ways: list[dict[str, Any]] = [{name: dsn}, {"environ": {VARIABLES[name]: dsn}}]
    for way in ways:
        with pytest.raises(ConfigurationError) as caught:
            Config.load(**way)
        assert SECRET not in "".join(traceback.format_exception(caught.value))
        assert SECRET not in repr(caught.value)
    assert SECRET not in redact(dsn)


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgres://", "postgres://"),
        ("postgresql://localhost", "postgresql://localhost"),
        ("postgres://ann@host:5432/db?sslmode=require", "postgres://host:5432/db"),
        ("postgres://ann:a%40b%2Fc@h1:1,h2:2/db", "postgres://h1:1,h2:2/db"),
        ("postgres://ann:p:q@[::1]:5432/db", "postgres://[::1]:5432/db"),
        ("postgres://ann@/db?host=%2Ftmp%2Frun&sslmode=disable", "postgres:///db?host=/tmp/run"),
        (f"postgres://host/db?user=ann&password={SECRET}", "postgres://host/db"),
        (f"postgres://host/db?password={SECRET}@x", "postgres://host/db"),
    ],
)
def test_addresses_of_every_form_are_taken(dsn: str, shown: str) -> None:
    config = Config.load(dsn=dsn)
    assert config.dsn == dsn
    assert config.where == shown


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\t"), min_size=6).filter(str.strip))
def test_no_password_of_any_kind_is_shown(password: str) -> None:
    marked = f"Zq{password}qZ"
    dsn = f"postgres://ann:{marked}@host.example:5432/db"
    try:
        shown = Config.load(environ={}, dsn=dsn).where
    except ConfigurationError as error:
        shown = "".join(traceback.format_exception(error))
    assert "Zq" not in shown
    assert "qZ" not in shown
