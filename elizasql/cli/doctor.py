"""The check-up: what is wrong with a server and its data, and what to do about it."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal
from uuid import UUID

import asyncpg
import typer

from elizasql import _migrate, _pool
from elizasql._statements import SQL, find_folder
from elizasql.errors import (
    ConfigurationError,
    DeadlineError,
    ElizaSQLError,
    MigrationError,
    PermissionDeniedError,
    translate,
)
from elizasql.types import DIMENSIONS

from . import _out, _place
from ._place import DataDir, Dsn, Json, Place

Severity = Literal["ok", "note", "warning", "error"]
Rows = Sequence[asyncpg.Record]

# What a question may end with, and the connection goes on.
FAILURES = (asyncpg.PostgresError, asyncio.TimeoutError)

_MB = 1 << 20
_GB = 1 << 30

# From here on a tail costs a search more than the index does: 0.3 ms for 500 rows.
_LONG_TAIL = 2000
# From here on a processor does not remember where all pages of the HNSW indexes are.
_LARGE_INDEX = 16 * _MB
# Seconds between two clocks that nobody notices, and that make "newest first" wrong.
_SKEW_NOTICED, _SKEW_WRONG = 2.0, 60.0
_PINGS = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look found.

    Attributes:
        check: What was looked at.
        severity: "ok"; "note": good to know; "warning": costs speed or will cost more; "error": does not work, or may
            lose data.
        finding: What is the case.
        remedy: What to do; empty where nothing is to be done.
    """

    check: str
    severity: Severity
    finding: str
    remedy: str = ""


def add_to(app: typer.Typer) -> None:
    """Put the command into the application."""
    app.command()(doctor)


def doctor(
    every: Annotated[bool, typer.Option("--all", help="Show what is in order, too.")] = False,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Examine the server, the schema and the data. Changes nothing. Exit code 1 when something does not work."""
    findings = asyncio.run(_examine(dsn, data_dir))
    if json:
        _out.emit([asdict(finding) for finding in findings])
    else:
        _show(findings, every=every)
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(1)


def _show(findings: Sequence[Finding], *, every: bool) -> None:
    counts = {kind: sum(finding.severity == kind for finding in findings) for kind in _out.STYLES}
    for finding in findings:
        if every or finding.severity != "ok":
            _out.say(f"{finding.severity:<8} {finding.check}: {finding.finding}", style=finding.severity)
            if finding.remedy:
                _out.say(f"{'':8} -> {finding.remedy}")
    _out.say(", ".join(f"{count} {kind}" for kind, count in counts.items()))


async def _examine(dsn: str | None, data_dir: str | None) -> list[Finding]:
    async with _place.reach(dsn, data_dir) as place, place.connect(ready=False) as connection:
        return await examine(place, connection)


async def examine(place: Place, connection: asyncpg.Connection[Any]) -> list[Finding]:
    """Do all checks, one after the other; those of the data only where the schema is up to date."""
    try:
        began = time.time()
        row = await connection.fetchrow(SQL["check_server"].sql)
        clock = (began + time.time()) / 2
        server = await _pool.look_at(connection)
    except FAILURES as error:
        return [failed("server", error)]  # all else needs the answer
    assert row is not None

    async def look(check: str, judge: Callable[[Rows], Iterable[Finding]], statement: str, *arguments: object) -> None:
        """Ask, and judge the answer; a question that fails is a finding, too, and takes none of the others with it."""
        try:
            rows = await connection.fetch(SQL[statement].sql, *arguments)
        except FAILURES as error:
            findings.append(failed(check, error))
        else:
            findings.extend(judge(rows))

    findings = [
        *check_server(server),
        *check_settings(row),
        *check_role(row),
        check_clock(row["clock"] - clock),
        await check_distance(connection),
        check_pooler(connection, row["pid"]),
        check_connections(row, place.config.pool_max_size + place.config.background_pool_size),
        *check_disk(place, row["bytes"]),
    ]
    await look("extensions", check_extensions, "list_extensions", ["vector", "pg_stat_statements"])
    # In front of what needs them: without any not even the migrations may be read.
    await look("privileges", check_privileges, "list_lacking_privileges")
    await look("policies", check_policies, "list_hidden_tables")
    findings.append(migrations := await check_migrations(connection))
    if migrations.severity == "error":
        return findings
    if server.vector_version is None:
        # To create it again brings no column back, nor what else depends on it.
        remedy = "restore a backup into a new database, as an administrator, who may create extensions"
        lost = "pgvector was taken out of this database, and every vector with it"
        return [*findings, Finding("extensions", "error", lost, remedy)]
    findings.append(await check_session(place))
    await look("schema", check_schema, "list_objects")
    await look(
        "indexes",
        lambda indexes: (*check_indexes(indexes), *check_memory(row, indexes, place.embedded)),
        "list_indexes",
    )
    await look("triggers", check_triggers, "list_weak_triggers")
    await look("tables", check_tables, "list_tables")
    await look("tail", check_tails, "list_tails")
    await look("reembed", check_moves, "list_reembeddings")
    await look("transactions", check_transactions, "list_long_transactions", 300.0)
    return findings


def failed(check: str, error: Exception) -> Finding:
    """Tell why a look could not be taken."""
    made = translate(error)
    remedy = "see the message"
    if isinstance(made, PermissionDeniedError):
        remedy = "GRANT USAGE ON SCHEMA elizasql, and what the check of privileges names"
    elif isinstance(made, DeadlineError):
        remedy = "raise ELIZASQL_TIMEOUT and the role's statement_timeout, or ask when the server is less busy"
    return Finding(check, "error", f"cannot be looked at: {made}", remedy)


# --- the server ------------------------------------------------------------------------------------------------------


def check_server(server: _pool.Server) -> Iterator[Finding]:
    """Look at the versions."""
    try:
        server.check()
    except ConfigurationError as error:
        yield Finding("server", "error", str(error), "see the message")
        return
    major = server.version // 10000
    vector = server.vector_version or f"{server.vector_available}, not created in this database"
    yield Finding("server", "ok", f"PostgreSQL {major}.{server.version % 10000}, pgvector {vector}")


def check_settings(row: asyncpg.Record) -> Iterator[Finding]:
    """Look at the settings that decide whether data is taken, and safe."""
    if row["in_recovery"]:
        remedy = "connect to the primary; of several hosts target_session_attrs=read-write finds it"
        yield Finding("writes", "error", "the server is a standby: it takes none", remedy)
    elif row["read_only"] == "on":
        yield Finding(
            "writes",
            "error",
            "none are taken: default_transaction_read_only is on for this role or database",
            "ALTER ROLE, or ALTER DATABASE, ... RESET default_transaction_read_only",
        )
    if not row["knows_case"]:
        yield Finding(
            "locale",
            "note",
            "the locale knows no letters beyond ASCII: É and é are different in searches for names and texts",
            "make one with LC_CTYPE C.UTF-8 or that of a language, and move the data",
        )
    for name in ("fsync", "full_page_writes"):
        if row[name] != "on":
            yield Finding(name, "error", "off: a crash of the machine may destroy the database", f"turn {name} on")
    if row["synchronous_commit"] == "off":
        yield Finding("synchronous_commit", "note", "off: a crash loses what was written in the last moments")
    for name in ("autovacuum", "track_counts"):
        if row[name] != "on":
            yield Finding(name, "warning", "off: statistics grow stale and dead rows stay", f"turn {name} on")
    if row["data_checksums"] != "on":
        yield Finding("data_checksums", "note", "off: damage by a disk goes unnoticed", "pg_checksums --enable")
    if row["collation_changed"]:
        yield Finding(
            "collation",
            "warning",
            "the operating system sorts text otherwise than when the database was made: indexes of text may be wrong",
            "REINDEX DATABASE, then ALTER DATABASE ... REFRESH COLLATION VERSION",
        )
    if row["xid_age"] > 1_000_000_000:
        yield Finding("vacuum", "error", f"{row['xid_age']:,} transactions since the last freeze", "VACUUM FREEZE")
    if row["idle_slots"]:
        yield Finding(
            "replication",
            "warning",
            f"{row['idle_slots']} replication slots that nobody reads keep the log from being removed",
            "drop those that are not needed with pg_drop_replication_slot",
        )


def check_role(row: asyncpg.Record) -> Iterator[Finding]:
    """Look at what the role may do beside its tables."""
    if row["is_above_policies"]:
        yield Finding(
            "role",
            "warning",
            "the role is a superuser or passes row level security: policies do not bind it",
            "connect as a role of its own, made by CREATE ROLE ... LOGIN",
        )
    else:
        yield Finding("role", "ok", "no superuser, bound by policies")
    if row["hidden"]:
        yield Finding(
            "role",
            "note",
            f"{row['hidden']} sessions of other roles are hidden from it: their transactions cannot be looked at",
            "GRANT pg_read_all_stats to it, or ask as another role",
        )
    if not row["may_migrate"]:
        yield Finding(
            "role",
            "note",
            "it may neither make the schema nor change it: migrations need another role",
            "set ELIZASQL_MIGRATION_URL to one that may",
        )


def check_clock(skew: float) -> Finding:
    """Compare the server's clock with this machine's."""
    if abs(skew) < _SKEW_NOTICED:
        return Finding("clock", "ok", f"within {abs(skew) * 1000:.0f} ms of this machine's")
    severity: Severity = "error" if abs(skew) >= _SKEW_WRONG else "warning"
    ahead = "ahead of" if skew > 0 else "behind"
    return Finding(
        "clock", severity, f"{abs(skew):.1f} s {ahead} this machine's", "set both by NTP: times order what is newest"
    )


async def check_distance(connection: asyncpg.Connection[Any]) -> Finding:
    """Measure how long the shortest of all statements takes."""
    seconds = []
    for _ in range(_PINGS):
        began = time.perf_counter()
        await connection.fetchval(SQL["ping"].sql)
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds)[_PINGS // 2] * 1000
    if median < 5:
        return Finding("distance", "ok", f"{median:.2f} ms for a round trip")
    return Finding(
        "distance", "warning", f"{median:.1f} ms for a round trip, which every call pays", "move closer to the server"
    )


def check_pooler(connection: asyncpg.Connection[Any], pid: int) -> Finding:
    """Tell whether a pooler stands between us: then the process that answers is not the one that greeted us."""
    if connection.get_server_pid() == pid:
        return Finding("pooler", "ok", "none: connected directly")
    return Finding(
        "pooler",
        "note",
        "the connection goes through a pooler",
        "set ELIZASQL_MIGRATION_URL to a direct connection, and the session settings by ALTER ROLE ... SET if the "
        "check 'session' complains",
    )


def check_connections(row: asyncpg.Record, one_takes: int) -> Finding:
    """Compare the connections that are open with those that may be."""
    used, most = row["connections"], row["free_for_all"]
    said = f"{used} of {most} connections are open; one process of elizasql takes up to {one_takes}"
    if used > 0.8 * most:
        return Finding(
            "connections", "warning", said, "raise max_connections, lower POSTGRES_POOL_MAX, or use a pooler"
        )
    return Finding("connections", "ok", said)


def check_disk(place: Place, size: int) -> Iterator[Finding]:
    """Look at the room that is left, where the disk is this machine's."""
    if not place.embedded:
        yield Finding(
            "disk", "note", f"the database has {size / _MB:,.0f} MB; the server's disk cannot be seen from here"
        )
        return
    folder = place.config.data_dir
    free = shutil.disk_usage(folder).free
    said = f"{free / _MB:,.0f} MB free for a database of {size / _MB:,.0f} MB in {folder}"
    if free < 256 * _MB:
        yield Finding("disk", "error", said, "make room now: the server stops at a full disk")
    elif free < max(_GB, size // 2):
        yield Finding("disk", "warning", said, "make room: building an index anew needs half as much again")
    else:
        yield Finding("disk", "ok", said)


def check_extensions(rows: Rows) -> Iterator[Finding]:
    """Compare the versions of extensions that are created with those that are installed."""
    for row in rows:
        if row["created"] is None:
            if row["name"] == "pg_stat_statements" and row["available"] is not None:
                yield Finding(
                    "extensions", "note", "pg_stat_statements could be had, and shows what the server's time goes to"
                )
        elif row["available"] is not None and row["created"] != row["available"]:
            yield Finding(
                "extensions",
                "note",
                f"{row['name']} is {row['created']} here, {row['available']} is installed",
                f"ALTER EXTENSION {row['name']} UPDATE",
            )
        else:
            yield Finding("extensions", "ok", f"{row['name']} {row['created']}")


# --- the schema ------------------------------------------------------------------------------------------------------


async def check_migrations(connection: asyncpg.Connection[Any]) -> Finding:
    """Compare the schema with what this version of the library expects."""
    try:
        _place.check_ready(await _migrate.pending_versions(connection))
    except MigrationError as error:
        return Finding("migrations", "error", str(error), "install the newer elizasql")
    except ElizaSQLError as error:
        return Finding("migrations", "error", str(error), "elizasql migrate up")
    except FAILURES as error:
        return failed("migrations", error)
    return Finding("migrations", "ok", f"up to date: {_migrate.known_versions()[-1]}")


async def check_session(place: Place) -> Finding:
    """Open the pool as an application does: it refuses where a setting is not in force."""
    try:
        async with place.open(UUID(int=0)):
            return Finding("session", "ok", f"{len(_pool.session_settings(place.config))} settings are in force")
    except ConfigurationError as error:
        return Finding("session", "error", str(error), "set them with ALTER ROLE ... SET, or connect directly")
    except ElizaSQLError as error:
        return failed("session", error)


def check_schema(rows: Rows) -> Iterator[Finding]:
    """Find what somebody has dropped, or a restore could not make; what is there besides is nobody's concern here."""
    found = {(row["kind"], row["name"]) for row in rows}
    lost: dict[str, list[str]] = {}
    for kind, name in sorted(_list_made() - found):
        if kind in ("column", "constraint", "trigger") and ("table", name.partition(".")[0]) not in found:
            continue  # it went with its table
        lost.setdefault(kind, []).append(name)
    for kind, names in lost.items():
        what, price = {
            "index": ("missing index", ": calls that it serves, where there are any, read whole tables"),
            "constraint": ("missing constraint, or one that was not validated", ": rows may break its rule"),
        }.get(kind, (f"missing {kind}", ""))
        yield Finding(
            "schema",
            "warning" if kind == "index" else "error",
            f"{what}: {_some(names)}{price}",
            "make it again as migrations/schema.sql has it; where much is missing, restore a backup",
        )
    if not lost:
        yield Finding("schema", "ok", "all that the migrations make is there")


def _list_made() -> set[tuple[str, str]]:
    """Give kind and name of what the migrations make, as `list_objects` does, but for what has a check of its own.

    The indexes of partitions come and go with those of the partitioned table, and servers name them as they like.
    """
    text = (find_folder("migrations") / "schema.sql").read_text(encoding="utf-8")
    attached = set(re.findall(r"^ALTER INDEX .* ATTACH PARTITION elizasql\.(\w+)", text, re.MULTILINE))
    created = re.findall(r"^CREATE (?:UNIQUE )?([A-Z]+) (?:elizasql\.)?(\w+)(.*)", text, re.MULTILINE)
    made = {
        (kind.lower(), name)
        for kind, name, rest in created
        if kind in ("TABLE", "FUNCTION", "INDEX") and name not in attached and "USING hnsw" not in rest
    }
    triggers = re.findall(r"^CREATE TRIGGER (\w+) .*? ON elizasql\.(\w+) ", text, re.MULTILINE)
    made |= {("trigger", f"{table}.{name}") for name, table in triggers}
    for table, body in re.findall(r"^CREATE [A-Z]+ elizasql\.(\w+) \(\n(.*?)^\)", text, re.MULTILINE | re.DOTALL):
        for constraint, column in re.findall(r'^    (?:CONSTRAINT (\w+)|"?([a-z]\w*)"?) ', body, re.MULTILINE):
            made.add(("constraint", f"{table}.{constraint}") if constraint else ("column", f"{table}.{column}"))
    for table, name in re.findall(r"^ALTER TABLE .*elizasql\.(\w+)\n    ADD CONSTRAINT (\w+)", text, re.MULTILINE):
        if name not in attached:
            made.add(("constraint", f"{table}.{name}"))
    return made


def check_indexes(rows: Rows) -> Iterator[Finding]:
    """Find indexes that are broken, missing, or never read."""
    broken = [row for row in rows if not row["is_valid"]]
    for row in broken:
        # What is left of a REINDEX CONCURRENTLY that did not end is one too many.
        leftover = re.search(r"_cc(new|old)\d*$", row["name"])
        remedy = f"{'DROP' if leftover else 'REINDEX'} INDEX {row['name']}"
        yield Finding("indexes", "error", f"{row['name']} is invalid: no search uses it", remedy)
    vectors = {row["name"] for row in rows if row["method"] == "hnsw"}
    partitions = {row["table_name"] for row in rows if row["table_name"].startswith("elizasql.embeddings_p")}
    if missing := {f"{name}_dim_{dimension}_hnsw" for name in partitions for dimension in DIMENSIONS} - vectors:
        yield Finding(
            "indexes",
            "error",
            f"{len(missing)} HNSW indexes are missing: searches of their agents scan everything",
            "elizasql index makes the ones of the agents that there are; migrations/schema.sql has them all",
        )
    unused = [row for row in rows if row["scans"] == 0 and not row["is_unique"] and row["bytes"] > 64 * _MB]
    for row in unused:
        yield Finding(
            "indexes",
            "note",
            f"{row['name']} ({row['bytes'] / _MB:,.0f} MB) was not read since the statistics were reset",
            "nothing at once: it serves calls that this application may not make; DROP INDEX saves its space",
        )
    if not broken and not missing:
        yield Finding("indexes", "ok", f"{len(rows)} indexes are valid, {len(vectors)} of them HNSW")


def _some(names: Sequence[str]) -> str:
    """Name three, and say how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def check_privileges(rows: Rows) -> Iterator[Finding]:
    """Find what the role may not do with the tables and functions."""
    lacking = [f"{'/'.join(row['lacking'])} on {row['name']}" for row in rows]
    if lacking:
        rights = "EXECUTE ON ALL FUNCTIONS"
        if any("EXECUTE" not in row["lacking"] for row in rows):
            rights = "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES"
        remedy = f"GRANT {rights} IN SCHEMA elizasql TO the role"
        yield Finding("privileges", "error", f"the role lacks {_some(lacking)}", remedy)


def check_policies(rows: Rows) -> Iterator[Finding]:
    """Find tables that look empty to the role, without any error."""
    if rows:
        tables = _some([row["name"] for row in rows])
        yield Finding(
            "policies",
            "error",
            f"row level security hides every row of {tables} from the role",
            "CREATE POLICY for what it may see, or ALTER TABLE ... DISABLE ROW LEVEL SECURITY",
        )


def check_triggers(rows: Rows) -> Iterator[Finding]:
    """Find triggers that are off, as a restore or an import may leave them."""
    for row in rows[:10]:
        table, names = row["table_name"], row["names"]
        if row["disabled"]:
            yield Finding(
                "triggers",
                "error",
                f"triggers of {table} are off: references are not checked, or changes go unnoticed by processes that "
                "hold memories",
                f"ALTER TABLE {table} ENABLE TRIGGER ALL, then open what is open anew",
            )
        else:
            yield Finding(
                "triggers",
                "note",
                f"{', '.join(names)} of {table} do not fire for what is replicated",
                "; ".join(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {name}" for name in names),
            )
    if not rows:
        yield Finding("triggers", "ok", "all are on")


def check_tables(rows: Rows) -> Iterator[Finding]:
    """Find statistics that are old, and dead rows that nobody has removed."""
    stale = [row for row in rows if row["modified"] > max(1000, 0.2 * row["live"])]
    for row in stale:
        when = "never" if row["analyzed_at"] is None else f"{row['analyzed_at']:%Y-%m-%d %H:%M}"
        # Not a share of the rows: one may have changed several times, or be gone.
        said = f"{row['modified']:,} inserts, updates and deletes in {row['name']} since it was analyzed ({when})"
        said += f"; it has about {row['live']:,} rows by the server's estimate"
        yield Finding("statistics", "warning", said, f"ANALYZE {row['name']}")
    bloated = [row for row in rows if row["dead"] > max(10_000, 0.2 * row["live"])]
    for row in bloated:
        said = f"{row['dead']:,} dead rows beside {row['live']:,} in {row['name']}: searches walk over them"
        remedy = f"VACUUM ANALYZE {row['name']}"
        if row["name"].startswith("elizasql.embeddings_p"):
            # Vacuum mends the graph at each place where a vector stood.
            remedy = f"REINDEX TABLE CONCURRENTLY {row['name']}, and then, which is many times as quick, {remedy}"
        yield Finding("bloat", "warning", said, remedy)
    if not (stale or bloated):
        yield Finding(
            "tables", "ok", f"{sum(row['bytes'] for row in rows) / _MB:,.0f} MB, statistics and space in order"
        )


def check_memory(row: asyncpg.Record, indexes: Rows, embedded: bool) -> Iterator[Finding]:
    """Compare the server's memory with the size of the vector indexes, which a search walks at random."""
    sizes = [index["bytes"] for index in indexes if index["method"] == "hnsw"]
    total, largest = sum(sizes), max(sizes, default=0)
    buffers, maintenance = row["shared_buffers"], row["maintenance_work_mem"]
    said = f"HNSW indexes of {total / _MB:,.0f} MB, shared_buffers of {buffers / _MB:,.0f} MB"
    if total > row["effective_cache_size"]:
        remedy = "give the server more memory, then raise shared_buffers and effective_cache_size"
        yield Finding(
            "memory", "warning", f"{said}, effective_cache_size below that: searches wait for the disk", remedy
        )
    elif total > buffers:
        yield Finding(
            "memory",
            "note",
            f"{said}: part of each search comes from outside",
            "stop the server once: it starts with room for all that is stored, up to a quarter of the memory"
            if embedded
            else f"raise shared_buffers to {total / _MB:,.0f}MB",
        )
    else:
        yield Finding("memory", "ok", said)
    if row["huge_pages"] == "off" and row["huge_pages_needed"] > 0 and total >= _LARGE_INDEX:
        yield Finding(
            "huge pages",
            "note",
            "the server's memory stands on small pages: in a virtual machine many a search waits for them to be found",
            f"sysctl vm.nr_hugepages={row['huge_pages_needed']} on the server's machine, then start the server anew",
        )
    if largest > maintenance:
        yield Finding(
            "memory",
            "note",
            f"the largest HNSW index has {largest / _MB:,.0f} MB, maintenance_work_mem {maintenance / _MB:,.0f} MB: "
            "building it anew is slow",
            f"raise maintenance_work_mem to {largest * 5 // 4 // _MB + 1}MB for a rebuild",
        )


def check_tails(rows: Rows) -> Iterator[Finding]:
    """Find agents whose new vectors nobody moves into the index."""
    long = [row for row in rows if row["tail"] > _LONG_TAIL]
    for row in long[:10]:
        yield Finding(
            "tail",
            "warning",
            f"{row['tail']:,} of {row['embeddings']:,} vectors of agent {row['id']} are not in the index: "
            "every search scans them",
            'an application with indexing="background" moves them; elizasql index does it at once',
        )
    if not long:
        yield Finding("tail", "ok", f"{sum(row['tail'] for row in rows):,} vectors wait to be indexed")


def check_moves(rows: Rows) -> Iterator[Finding]:
    """Find moves to another width of embeddings that nobody has ended: they take the room of both."""
    for row in rows:
        if row["target"] is None:
            said = f"vectors of {row['source']} dimensions that agent {row['agent_id']} does not use any more are left"
            remedy = "elizasql reembed --abandon drops them, if no reembed is doing it right now"
        else:
            said = f"agent {row['agent_id']} is on its way from {row['source']} to {row['target']} dimensions"
            remedy = "if no reembed is running, run it again to go on, or elizasql reembed --abandon"
        yield Finding("reembed", "note", said, remedy)
    if not rows:
        yield Finding("reembed", "ok", "no agent is on its way to another width")


def check_transactions(rows: Rows) -> Iterator[Finding]:
    """Find transactions that keep dead rows from being removed."""
    for row in rows:
        minutes = f"{row['seconds'] / 60:,.0f} minutes"
        if row["prepared"] is not None:
            said = f"a transaction was prepared {minutes} ago, and keeps its locks until somebody ends it"
            remedy = f"ROLLBACK PREPARED {row['prepared']}, unless what prepared it is about to commit it"
        else:
            who = f"{row['application_name'] or 'somebody'} (pid {row['pid']}, {row['state']})"
            said, remedy = (
                f"{who} has been in a transaction for {minutes}",
                f"pg_terminate_backend({row['pid']}) ends it",
            )
        yield Finding("transactions", "warning", said, remedy)
