"""The rules of `sql/`, and every statement against the server."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import elizasql
from elizasql import AgentRunCounts, AgentRunSummary, Component, Entity, Model, Participant, _codecs, _statements
from elizasql._statements import SQL, Statement, find_folder
from elizasql.types import DIMENSIONS

PACKAGE = Path(elizasql.__file__).parent
ADMINISTRATION = {"_migrate.py", "_embedded.py", "_pool.py"}


def test_every_file_has_a_header_and_only_statements() -> None:
    for path in sorted(find_folder("sql").glob("*.sql")):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("-- ") and not text.startswith("-- name:"), path.name
        for number, line in enumerate(text.splitlines(), 1):
            assert "--" not in line or line.lstrip().startswith("--"), f"{path.name}:{number}: comment behind SQL"
        assert not re.search(r"^\s*(CREATE|ALTER|DROP|GRANT|TRUNCATE)\b", text, re.MULTILINE), path.name
        assert "SELECT *\nFROM elizasql" not in text, path.name


# What the end of the transaction takes back, and the SET of an UPDATE, also of ON CONFLICT, which sets columns.
_OF_THE_TRANSACTION = re.compile(
    r"\bset_config\([^()]+, TRUE\)|\bSET\s+(LOCAL|TRANSACTION|CONSTRAINTS)\b"
    r"|\bUPDATE(\s+(ONLY\s+)?[\w.]+(\s+AS\s+\w+)?)?\s+SET\b",
    re.IGNORECASE,
)
# What outlives it. DECLARE: a cursor may be held.
_OF_THE_SESSION = re.compile(
    r"\b(SET|RESET|DISCARD|LISTEN|UNLISTEN|PREPARE|DEALLOCATE|DECLARE|LOAD|TEMP|TEMPORARY"
    r"|set_config|setseed|pg_(?:try_)?advisory_(?:un)?lock\w*)\b",
    re.IGNORECASE,
)


def session_state(sql: str) -> list[str]:
    """What a statement does to the session, by its words; comments and texts do nothing."""
    plain = re.sub(r"--.*|'[^']*'", "", sql)
    return [match[0] for match in _OF_THE_SESSION.finditer(_OF_THE_TRANSACTION.sub("", plain))]


@pytest.mark.parametrize("statement", list(SQL.values()), ids=list(SQL))
def test_statement_sets_no_session_state(statement: Statement) -> None:
    """Nothing is reset between two users of a pooled connection; what is set to the transaction's end resets itself."""
    assert session_state(statement.sql) == []


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        ("SET jit = off", "SET"),
        ("SET hnsw.ef_search TO 40", "SET"),
        ("set SESSION statement_timeout = 0", "set"),
        ("SET ROLE somebody", "SET"),
        ("SELECT 1; SET\n    enable_seqscan = on", "SET"),
        ("RESET ALL", "RESET"),
        ("DISCARD PLANS", "DISCARD"),
        ("LISTEN tasks", "LISTEN"),
        ("UNLISTEN *", "UNLISTEN"),
        ("PREPARE one AS SELECT 1", "PREPARE"),
        ("DEALLOCATE one", "DEALLOCATE"),
        ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "DECLARE"),
        ("LOAD 'vector'", "LOAD"),
        ("SELECT id INTO TEMP given FROM elizasql.rooms", "TEMP"),
        ("SELECT set_config('jit', 'off', FALSE)", "set_config"),
        ("SELECT set_config('jit', 'off', $1)", "set_config"),
        ("SELECT pg_advisory_lock(1)", "pg_advisory_lock"),
        ("SELECT pg_advisory_lock_shared(1)", "pg_advisory_lock_shared"),
        ("SELECT pg_try_advisory_lock(1)", "pg_try_advisory_lock"),
        ("SELECT pg_advisory_unlock_all()", "pg_advisory_unlock_all"),
        ("UPDATE elizasql.rooms SET name = 'x'; SET jit = off", "SET"),
    ],
)
def test_a_statement_that_sets_session_state_is_found(sql: str, found: str) -> None:
    assert session_state(sql) == [found]


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE elizasql.rooms SET name = 'SET jit = off' -- RESET ALL",
        "UPDATE elizasql.rooms AS r\nSET\n    name = g.name FROM given AS g",
        "INSERT INTO elizasql.rooms (id) VALUES ($1) ON CONFLICT (id)\n    DO UPDATE SET name = excluded.name",
        "SET LOCAL jit = off",
        "SET TRANSACTION READ ONLY",
        "SELECT set_config('hnsw.ef_search', choice.ef, TRUE)",
        "SELECT pg_try_advisory_xact_lock($1), pg_advisory_xact_lock($2), jsonb_set($3, $4, $5)",
    ],
)
def test_what_ends_with_the_transaction_is_no_session_state(sql: str) -> None:
    assert session_state(sql) == []


@pytest.mark.parametrize("statement", list(SQL.values()), ids=list(SQL))
def test_statement_names_tables_with_their_schema(statement: Statement) -> None:
    tables = re.findall(r"(?<!DISTINCT )\b(?:FROM|JOIN|INTO|UPDATE|USING)\s+([a-z_.]+)\b(?!\s*\()", statement.sql)
    catalog = {"pg_class", "pg_index", "pg_extension", "pg_namespace", "pg_available_extensions", "pg_stat_ssl"}
    names = set(re.findall(r"(\w+) AS (?:NOT )?(?:MATERIALIZED )?\(", statement.sql)) | catalog
    aliases = set(re.findall(r"\bAS (\w+)", statement.sql))
    for table in tables:
        assert table.startswith(("elizasql.", "pg_catalog.")) or table in names | aliases | {"set"}, (
            statement.name,
            table,
        )


def test_no_file_is_read_after_the_import(tmp_path: Path) -> None:
    """A call needs no descriptor for it, and an upgrade under a running process does not mix two versions."""
    file = tmp_path / "a.sql"
    file.write_text("-- name: get_one()\nSELECT 1;\n")
    statements = _statements.Statements(tmp_path)
    file.unlink()
    assert statements["get_one"].sql == "SELECT 1;"


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.sql", "b.sql"):
        (tmp_path / name).write_text("-- name: get_one()\nSELECT 1;\n")
    with pytest.raises(elizasql.ConfigurationError, match=r"a\.sql and in b\.sql"):
        _statements.Statements(tmp_path)


def test_dimension_texts_differ_in_nothing_but_the_number() -> None:
    for statement in SQL.values():
        if statement.dimension is None:
            assert "384" not in statement.sql or "dim_512" in statement.sql  # takes whichever width is there
            continue
        for dimension in DIMENSIONS:
            text = SQL.at(statement.name, dimension)
            assert text.params == statement.params
            assert re.sub(rf"(?<!\d){dimension}(?!\d)", "384", text.sql) == statement.sql
    assert len({text.sql for text in SQL.texts()}) == len(list(SQL.texts()))


@pytest.mark.parametrize("scope", ["entity", "world"])
@pytest.mark.parametrize("name", ["get_memories", "search_memories", "search_memories_where"])
def test_scope_texts_differ_in_nothing_but_the_column(name: str, scope: str) -> None:
    room, other = SQL[f"{name}_of_room"], SQL[f"{name}_of_{scope}"]
    assert other.params == tuple(param.replace("room_id", f"{scope}_id") for param in room.params)
    returned = "m.id, m.entity_id, m.agent_id, m.room_id, m.world_id"
    assert returned in other.sql
    ours, theirs = (text.sql.replace(returned, "").replace(f"{scope}_id", "room_id") for text in (other, room))
    assert ours == theirs


def test_statements_fit_into_the_cache_of_a_connection() -> None:
    size = int(re.search(r"statement_cache_size=(\d{4,}) if", (PACKAGE / "_pool.py").read_text())[1])  # type: ignore[index]
    assert len(list(SQL.texts())) < size
    # asyncpg does not cache longer texts.
    assert all(len(text.sql) < 15_000 for text in SQL.texts())


async def test_server_accepts_every_statement(raw: asyncpg.Connection[Any]) -> None:
    for statement in SQL.texts():
        try:
            prepared = await raw.prepare(statement.sql)
        except asyncpg.PostgresError as error:
            pytest.fail(f"{statement.name} at {statement.dimension}: {error}")
        assert len(prepared.get_parameters()) == len(statement.params), statement.name
        for column in prepared.get_attributes():
            assert column.name != "?column?", f"{statement.name} has a column without a name"


def fields(kind: type[Model]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


# Rows become models by position; these are taken apart first.
WITH_COMPONENTS = [*fields(Entity)[:-1], *(f"{name}s" for name in fields(Component))]
TAKEN_APART = {
    "get_entities_by_ids": WITH_COMPONENTS,
    "get_entities_for_rooms": ["position", *WITH_COMPONENTS],
    "query_entities": WITH_COMPONENTS,
    "get_participants_for_entities": [
        *fields(Participant)[:-1],
        *(f"entity_{name}" for name in ("names", "metadata", "created_at")),
    ],
    "get_agent_run_summaries": ["total", *fields(AgentRunSummary)[:-1], *fields(AgentRunCounts)],
}
# These become none, nor does what is of no store.
NO_MODELS = r"look_at_agent|upsert_components|load_memories|get_cached_embeddings|prune_logs|prune_memories"
NO_STORES = {"doctor.sql", "reembeddings.sql", "resident.sql", "server.sql", "transfer.sql"}
# Behind the fields of a model.
BESIDE = {"by_hnsw", "ef", "position"}


async def test_columns_are_the_fields_of_a_model(raw: asyncpg.Connection[Any]) -> None:
    # The last field of some models is not a column: what a search or another table adds.
    forms = [form for kind in Model.__subclasses__() for form in (fields(kind), fields(kind)[:-1])]
    read = 0
    for statement in SQL.values():
        columns = [column.name for column in (await raw.prepare(statement.sql)).get_attributes()]
        if statement.file in NO_STORES or len(columns) < 3 or re.match(NO_MODELS, statement.name):
            continue
        if statement.name in TAKEN_APART:
            assert columns == TAKEN_APART[statement.name], statement.name
        else:
            assert [column for column in columns if column not in BESIDE] in forms, statement.name
        read += 1
    assert read >= 60


def test_a_time_or_a_distance_is_never_the_whole_order() -> None:
    """Rows with equal ones would come as the plan has them, and pages and cursors would leave some out."""
    end = r"(?=\s(?:LIMIT|OFFSET|FOR|ON|UNION)\b|;|\)|\n\n)"
    orders = 0
    for path in find_folder("sql").glob("*.sql"):
        text = re.sub(r"--[^\n]*", "", path.read_text())
        for order in re.findall(rf"ORDER BY\s+((?:[^()]|\([^()]*\))*?){end}", text):
            keys = [key.strip() for key in order.split(",")]
            if not re.search(r"\b(\w+_at|distance)\b", order) or (path.name, keys[-1].split(".")[-1]) == SWEPT:
                continue
            assert re.fullmatch(r"(\w+\.)?(\w+_)?id( ASC| DESC)?", keys[-1]), (path.name, order)
            orders += 1
    assert orders > 60


# Whichever goes first.
SWEPT = ("cache.sql", "expires_at")


# --- the Python side -------------------------------------------------------------------------------------------------


def _strings(path: Path) -> Iterator[tuple[int, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_no_sql_text_in_the_package() -> None:
    sql = re.compile(
        r"\b(SELECT\s|INSERT\s+INTO|UPDATE\s+\w+\s+SET|DELETE\s+FROM|CREATE\s+TABLE|LISTEN\s|NOTIFY\s)", re.IGNORECASE
    )
    found = [
        f"{path.name}:{line}: {text:.60}"
        for path in PACKAGE.rglob("*.py")
        if path.name not in ADMINISTRATION
        for line, text in _strings(path)
        if sql.search(text) and not text.startswith("%")
    ]
    assert not found


METHODS = {
    name: method
    for name, method in inspect.getmembers(elizasql.DatabaseAdapter, inspect.isfunction)
    if not name.startswith("_")
}


@pytest.mark.parametrize(("name", "method"), METHODS.items(), ids=list(METHODS))
def test_docstring_names_statements_that_exist(name: str, method: Any) -> None:
    doc = inspect.getdoc(method)
    assert doc, name
    for block in re.findall(r"Statement: (.*?)(?:\n\n|\.\s|Source:|\Z)", doc, re.DOTALL):
        for file, words in re.findall(r"sql/(\w+\.sql) ([\w,\s]+)", block):
            first = words.split()[0].rstrip(",")
            assert first in SQL, (name, first)
            assert SQL[first].file == file, (name, first)


def with_what_it_refers_to(method: Any) -> str:
    """Give a method's docstring with those of the methods that it names, each on one line."""
    doc = inspect.getdoc(method) or ""
    named = [METHODS[word] for word in re.findall(r"`(\w+)`", doc) if word in METHODS]
    return "\n".join(" ".join((inspect.getdoc(one) or "").split()) for one in (method, *named))


@pytest.mark.parametrize(("name", "method"), METHODS.items(), ids=list(METHODS))
def test_docstring_names_statement_and_defaults(name: str, method: Any) -> None:
    doc = with_what_it_refers_to(method)
    assert "Statement: sql/" in doc or name == "close"
    for parameter in inspect.signature(method).parameters.values():
        default = parameter.default
        if isinstance(default, str):
            assert f'"{default}"' in doc, parameter
        elif type(default) in (int, float) and default:
            assert re.search(rf"\bdefault\b[^.;:]*(?<![\d,]){default:,g}(?!,?\d)", doc), parameter


def test_every_statement_is_used_and_every_name_exists() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    used = set(re.findall(r"SQL(?:\.at\(|\[)\s*\"(\w+)\"", source))
    assert used <= set(SQL), used - set(SQL)
    for name in SQL:
        scoped = re.sub(r"_of_(rooms?|entity|world)$", "", name)
        assert f'"{name}"' in source or f'"{scoped}"' in source, f"{name} is not used"


def test_new_ids_are_of_version_7_and_ascend() -> None:
    ids = [_codecs.new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert {id.version for id in ids} == {7}
    assert [id.int >> 80 for id in ids] == sorted(id.int >> 80 for id in ids)


def test_every_method_stands_in_the_parity_table() -> None:
    text = (PACKAGE.parent / "docs" / "parity.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if not re.search(rf"(?<!\w){name}(?!\w)", text)] == []
