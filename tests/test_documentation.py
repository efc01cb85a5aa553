"""What the documentation says is true: examples run, commands parse, links lead somewhere, names are those of the code.

A page's Python blocks run one after the other in one namespace, which begins with what docs/index.md promises. Blocks
that start a loop of their own are programs and run as such, on an embedded server; blocks with the title of a test file
are run by pytest. A block titled "output" is what the Python block before it prints.
"""

from __future__ import annotations

import ast
import configparser
import contextlib
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import numpy as np
import pytest
import typer.main
import yaml

import elizasql
from elizasql import Config, DatabaseAdapter, Memory, _embedded, _pool
from elizasql._statements import SQL
from elizasql.cli import _app

from .conftest import MakeAdapter, make_scene

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]

# What the example on the first page prints: that page shows no output.
README_SAYS = "1.000  My brother is allergic to nuts.\n"

_FENCE = re.compile(
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A block of code on a page; `line` is where its text begins."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str

    @property
    def where(self) -> str:
        return f"{named(self.page)}:{self.line}"


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall("^```", text, re.MULTILINE)) == 2 * len(_FENCE.findall(text)), named(page)
    return [
        Block(page, text[: match.start("text")].count("\n") + 1, match["language"], match["title"], match["text"])
        for match in _FENCE.finditer(text)
        if not languages or match["language"] in languages
    ]


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


pages = pytest.mark.parametrize("page", PAGES, ids=named)


# --- Python ----------------------------------------------------------------------------------------------------------


def run(arguments: list[str], folder: Path, data: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, on an embedded server in `data`."""
    environ = {name: value for name, value in os.environ.items() if name != "POSTGRES_URL"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environ, "PGLITE_DATA_DIR": str(data)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


async def execute(block: Block, namespace: dict[str, Any]) -> str:
    """Run a block in a namespace, as if it stood in a coroutine, and give what it prints."""
    code = compile(
        "\n" * (block.line - 1) + block.text,
        str(block.page),
        "exec",
        flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
        dont_inherit=True,
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        result = eval(code, namespace)
        if inspect.iscoroutine(result):
            await result
    return said.getvalue()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=named)
async def test_examples_run(
    page: Path, make_db: MakeAdapter, dsn: str, server_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRES_URL", dsn)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "example"}
    said: str | None = None
    tests = False
    for block in blocks(page, "python", "text"):
        if block.title == "output":
            assert block.text == said, block.where
        elif block.language == "text":
            continue
        elif block.title is not None:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
            tests = True
        elif "asyncio.run(" in block.text:
            (tmp_path / "example.py").write_text(block.text, encoding="utf-8")
            done = run(["-W", "error", "example.py"], tmp_path, server_dir.parent / "documentation")
            assert done.returncode == 0, f"{block.where}: {done.stderr}"
            said = done.stdout
            assert said == README_SAYS or page.name != "README.md"
        else:
            if "db" not in namespace:
                db = await make_db()
                scene = await make_scene(db)
                namespace |= {"db": db, "agent": db.agent_id, "room": scene.room, "user": scene.entity}
                namespace |= {"vector": np.random.default_rng(1).normal(size=384).astype(np.float32)}
                namespace |= {"url": dsn, "owner_url": dsn, "old_ids": [scene.other]}
            said = await execute(block, namespace)
    if tests:
        done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider"], tmp_path, server_dir.parent / "unused")
        assert done.returncode == 0, done.stdout + done.stderr
        written = sum(block.text.count("def test_") for block in blocks(page, "python"))
        assert f"{written} passed" in done.stdout


# --- commands --------------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[tuple[str, bool]]:
    """Every command line that a page shows, and whether it is whole: those in a sentence may leave arguments out."""
    shown = [line for block in blocks(page, "sh") for line in block.text.replace("\\\n", "").splitlines()]
    shown += re.findall(r"^ {4}((?:make|elizasql) .*)$", prose(page), re.MULTILINE)
    yield from ((line, True) for line in shown)
    yield from ((line, False) for line in re.findall(r"`((?:make|elizasql) [^`]+)`", prose(page)))


def check_elizasql(words: list[str], *, whole: bool) -> None:
    command: Any = typer.main.get_command(_app.app)
    while words and hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    if command.context_settings.get("ignore_unknown_options"):
        return
    if whole:
        command.make_context("elizasql", words)
    else:
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, given, _ = word.partition("=")
        assert re.search(rf"^{name} \?=" if given else rf"^{name}:", makefile, re.MULTILINE)


@pages
def test_commands_parse(page: Path) -> None:
    for line, whole in commands(page):
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        try:
            if words[:1] == ["elizasql"]:
                check_elizasql(words[1:], whole=whole)
            elif words[:1] == ["make"]:
                check_make(words[1:])
            else:
                assert not words or words[0] in ("pip", "python", "export", "docker", "npm", "pg_dump")
        except Exception as error:
            raise AssertionError(f"{named(page)}: {line}: {error!r}") from error


def test_a_wrong_command_is_found() -> None:
    check_elizasql(["export", "x.tar"], whole=True)
    for words in (["exprot"], ["export"], ["export", "x.tar", "--nonsense"]):
        with pytest.raises(Exception):  # noqa: B017 - typer's own, in a module that differs between versions
            check_elizasql(words, whole=True)
    with pytest.raises(AssertionError):
        check_make(["nonsense"])


# --- other languages -------------------------------------------------------------------------------------------------


@pages
def test_blocks_say_what_they_are(page: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            assert yaml.safe_load(block.text), block.where
        elif block.language == "ini":
            configparser.ConfigParser(interpolation=None).read_string(block.text)
        elif block.language == "dockerfile":
            words = {line.split()[0] for line in block.text.splitlines()}
            assert words <= {"FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "VOLUME", "CMD"}, block.where
        else:
            assert block.language in ("python", "sh", "sql", "text"), block.where
        if block.language == "python" and DOCS in page.parents:
            assert max(map(len, block.text.splitlines())) <= 84, f"{block.where}: wider than the page"


def test_settings_behind_a_pooler_are_those_of_the_library() -> None:
    # The pooler itself carries the other two from the client to the server.
    wanted = {
        name: value
        for name, value in _pool.session_settings(Config.load(environ={})).items()
        if name not in ("application_name", "TimeZone")
    }
    page = DOCS / "how-to" / "pgbouncer.md"
    [ini] = blocks(page, "ini")
    pooler = configparser.ConfigParser(interpolation=None)
    pooler.read_string(ini.text)
    assert pooler["pgbouncer"]["ignore_startup_parameters"].split(", ") == sorted(wanted)
    sql, _ = blocks(page, "sql")
    assert dict(re.findall(r"^ALTER ROLE agents_app SET (\S+) = '(.*)';$", sql.text, re.MULTILINE)) == wanted


@pytest.fixture
async def administrator(dsn: str, server_dir: Path) -> AsyncIterator[Callable[[str], str]]:
    """Give addresses in a server in which the roles and the database of the page can be made; takes them away again."""
    if os.environ.get("ELIZASQL_TEST_URL"):
        pytest.skip("needs a superuser, whom only the embedded server lends")
    cluster = _embedded._Cluster(server_dir)
    yield lambda role: cluster.dsn(role, "elizasql" if role == "postgres" else "agents")
    connection = await asyncpg.connect(cluster.dsn("postgres"))
    await connection.execute("DROP DATABASE IF EXISTS agents")
    await connection.execute("DROP ROLE IF EXISTS agents_app; DROP ROLE IF EXISTS agents_owner")
    await connection.close()


async def test_the_roles_of_production_suffice(administrator: Callable[[str], str]) -> None:
    before, inside, *later = blocks(DOCS / "how-to" / "production.md", "sql")
    settings, by_itself = blocks(DOCS / "how-to" / "pgbouncer.md", "sql")
    connection = await asyncpg.connect(administrator("postgres"))
    for statement in before.text.split(";")[:-1]:
        await connection.execute(statement)  # one by one: CREATE DATABASE takes no company
    await connection.close()
    there = await asyncpg.connect(administrator("postgres").replace("/elizasql?", "/agents?"))
    for block in (inside, *later, settings):
        await there.execute(block.text)
    await there.close()

    agent = uuid4()
    with pytest.raises(elizasql.MigrationError):
        await elizasql.open(agent_id=agent, dsn=administrator("agents_app"), migrate=False)
    owner = await elizasql.open(agent_id=agent, dsn=administrator("agents_owner"), indexing="manual")
    app = await elizasql.open(agent_id=agent, dsn=administrator("agents_app"), migrate=False, indexing="manual")
    try:
        await _use(app)
        with pytest.raises(elizasql.PermissionDeniedError):
            await app.index_memories(rebuild=True)
        assert await owner.index_memories(rebuild=True) == 0  # all were indexed before
        assert await app.delete_agent(agent)
        plain = await asyncpg.connect(administrator("agents_app"))
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await plain.execute("DROP TABLE elizasql.memories")
        await plain.execute(by_itself.text)
        for name, value in _pool.session_settings(Config.load(environ={})).items():
            if name not in ("application_name", "TimeZone"):
                assert await plain.fetchval("SELECT current_setting($1)", name) in (value, "1min")
        await plain.close()
    finally:
        await app.close()
        await owner.close()


async def _use(db: DatabaseAdapter) -> None:
    """Write to many tables, search, index, and let statistics be made."""
    await db.ensure_agent_exists({"name": "Ada"})
    await db.ensure_embedding_dimension(384)
    scene = await make_scene(db)
    vectors = np.random.default_rng(1).normal(size=(600, 384)).astype(np.float32)
    await db.create_memories(
        [Memory(content={"text": str(n)}, embedding=vector, unique=True) for n, vector in enumerate(vectors)], "facts"
    )
    assert await db.index_memories() == 600
    assert len(await db.search_memories(embedding=vectors[0], table_name="facts")) == 10
    await db.set_cache("key", 1)
    await db.create_task({"name": "x", "tags": ["queue"]})
    [task] = await db.claim_tasks()
    assert await db.complete_task(task)
    await db.log({"entityId": scene.entity, "roomId": scene.room, "type": "action", "body": {}})
    server = await db.create_message_server({"name": "s", "sourceType": "x"})
    await db.create_channel({"messageServerId": server.id, "name": "c", "type": "GROUP"})


# --- pages, links, names ---------------------------------------------------------------------------------------------


def in_navigation(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for below in entry.values() if isinstance(entry, dict) else entry:
            yield from in_navigation(below)


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(in_navigation(config["nav"]))
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def anchors(page: Path) -> set[str] | None:
    """The anchors of a page's headings; None where more are generated."""
    if re.search(r"^(?::::|<!--)", page.read_text(encoding="utf-8"), re.MULTILINE):
        return None
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{named(page)}: {target}"
        if DOCS in page.parents:
            # The site has nothing but its pages.
            assert DOCS in there.parents, f"{named(page)}: {target}"
        if anchor and (known := anchors(there)) is not None:
            assert anchor in known, f"{named(page)}: {target}"


VARIABLES = {field.metadata["variable"]: field.name for field in fields(Config)}


@pytest.fixture(scope="module")
def sources() -> str:
    """Every text in which a variable that is no setting may be read."""
    paths = [*(ROOT / "elizasql").rglob("*.py"), ROOT / "tests" / "conftest.py", ROOT / "Makefile"]
    return "".join(path.read_text(encoding="utf-8") for path in paths)


@pages
def test_names_are_those_of_the_code(page: Path, sources: str) -> None:
    text = page.read_text(encoding="utf-8")
    for variable in re.findall(r"\bELIZA(?:SQL)?_[A-Z_]+\b", text):
        assert variable in VARIABLES or variable in sources, f"{named(page)}: {variable}"
    for method in re.findall(r"\bdb\.(\w+)\(", prose(page)):
        assert hasattr(DatabaseAdapter, method), f"{named(page)}: {method}"
    for name in re.findall(r"\b([A-Z]\w+Error)\b", prose(page)):
        assert hasattr(elizasql, name) or name == "CancelledError", f"{named(page)}: {name}"
    for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE):
        module, _, name = path.rpartition(".")
        assert path in sys.modules or hasattr(sys.modules[module], name), f"{named(page)}: {path}"


# What cannot be repeated: names of statements, and what the pages call them.
NOT_REPEATABLE = {
    r"create_(\w+)": r"\bcreates? of\b[^.;]*\b{}\b",
    r"load_memories": r"`load_memories`",
    r"claim_tasks|claim_tasks_by_names": r"\bclaims?\b",
    r"(?:complete|repeat|release|fail)_task": r"\bclaims? (of tasks )?and (its end|their ends)\b",
    r"update_pending_task": r"\bupdates? of (a )?pending\b",
    r"compare_and_set_cache|set_missing_cache": r"\bcompare-and-set\b",
    r"patch_components": r"\bpatch(es)? with increments\b",
    r"(?:delete|remove|prune|sweep|cleanup)_\w+": r"\bdelete that counts\b",
    r"drop_leaving_embeddings": r"\bend of a `reembed`",
}


@pytest.mark.parametrize(
    ("page", "begin", "end"),
    [
        ("failures.md", "What cannot be repeated", "\n\n**"),
        ("discussions/lost-connection.md", "## After it was sent", "```"),
    ],
    ids=["failures", "lost-connection"],
)
def test_what_cannot_be_repeated_is_told(page: str, begin: str, end: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    told = " ".join(re.sub(r"[*\n]+", " ", text).split())
    for name in (statement.name for statement in SQL.values() if not statement.repeatable):
        (called,) = (
            words.format(*match.groups())
            for pattern, words in NOT_REPEATABLE.items()
            if (match := re.fullmatch(pattern, name))
        )
        assert re.search(called, told), name


def test_settings_of_the_readme() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Settings")[2]
    rows = re.findall(r"^\| (`[A-Z].*?) \| (`.*?) \|", table, re.MULTILINE)
    assert len(rows) >= 5
    for variables, arguments in rows:
        named_here = re.findall(r"`([a-z_]+)`", arguments)
        assert [VARIABLES[variable] for variable in re.findall(r"`([A-Z_]+)`", variables)] == named_here
