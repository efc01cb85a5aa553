"""The statements of `sql/`, loaded through aiosql.

aiosql parses and numbers the parameters; it is not on the call path, where it would add 11-16 us to a lookup of 25 us.
Each file is loaded alone: from a folder, a name that stands in two files silently takes the last one's text.

A statement that mentions `dim_384` alone is written for that dimension, as SQL that psql and the linter accept; the
texts for the other five are derived from it here, once. So are those for an entity and a world, from one for a room
whose comment says "Also for: entity, world."; and, at first use, the texts that name an agent's partitions in place of
the partitioned tables. Nothing is formatted at call time but the names of savepoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiosql
from aiosql.adapters.asyncpg import AsyncPGAdapter

from .errors import ConfigurationError
from .types import DIMENSIONS

_WIDTH = re.compile(r"(?<![0-9])384(?![0-9])")
# A column that is compared; m.room_id is one that is returned.
_ROOM_ID = re.compile(r"(?<![.\w])room_id\b")
_HEADER = re.compile(r"^-- name: (\w+).*\n((?:--.*\n)*)", re.MULTILINE)
_ALSO_FOR = re.compile(r"Also for: ([\w, ]+)\.")
_SAVEPOINT = re.compile(r"\bnested\b")
_PARTITIONED = re.compile(r"\belizasql\.(?:memories|embeddings)\b")
_WRITES = re.compile(r"\b(?:INSERT|UPDATE|DELETE)\b")


@dataclass(frozen=True, slots=True, eq=False)
class Statement:
    """One statement of `sql/`.

    Attributes:
        name: As in the file; the same word as the Python method.
        sql: The text that the server gets, with $1, $2, ...
        params: Names of the parameters, in the order of their numbers.
        doc: The comment under the name.
        file: Name of the file.
        dimension: What the text is for; None where it mentions no vector.
        repeatable: Whether it may be run again when nobody knows if it was done: the second run changes and says the
            same. So are all but those whose comment says "Not repeatable".
        of_one_agent: Whether it reads the partitioned tables, and there the rows of `agent_id` alone. A write to a
            partition looks at the partitioned table after it has locked the partition: the other way round than an
            ALTER TABLE, and one of the two would end in a deadlock.
    """

    name: str
    sql: str
    params: tuple[str, ...]
    doc: str
    file: str
    dimension: int | None = None
    repeatable: bool = field(init=False)
    of_one_agent: bool = field(init=False)
    _within: dict[str, str] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "repeatable", "Not repeatable:" not in self.doc)
        object.__setattr__(self, "of_one_agent", self._reads_one_agent())

    def _reads_one_agent(self) -> bool:
        return "agent_id" in self.params and bool(_PARTITIONED.search(self.sql)) and not _WRITES.search(self.sql)

    def order(self, params: Mapping[str, Any]) -> list[Any]:
        """Give the values of its parameters as the driver takes them; what else is in `params` is left out."""
        return [params[name] for name in self.params]

    def within(self, partition: str) -> str:
        """Give the text for the agents of a partition, such as "_p07".

        Through the partitioned tables a plan has a part for each of the 16 partitions: a connection's first call takes
        12-22 ms in place of 2-6, every later one 12-20 us more.
        """
        text = self._within.get(partition)
        if text is None:
            text = self._within[partition] = _PARTITIONED.sub(lambda table: table[0] + partition, self.sql)
        return text

    def numbered(self, number: int) -> Statement:
        """Give the statement for one savepoint of many, which has its number in its name."""
        return replace(self, sql=_SAVEPOINT.sub(f"nested_{number}", self.sql))


class Statements(Mapping[str, Statement]):
    """All statements of a folder by name; `at(name, dimension)` gives the text for a dimension.

    A file is parsed when one of its statements is first asked for: all of them take 0.12 s, a quarter of an import. It
    is read before: a call needs no file then, and an upgrade under a running process does not mix two versions.
    """

    def __init__(self, folder: Path) -> None:
        self._texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.sql"))}
        self._files: dict[str, str] = {}
        for file, text in self._texts.items():
            for name in _find_names(text):
                if name in self._files:
                    raise ConfigurationError(f"statement {name} stands in {self._files[name]} and in {file}")
                self._files[name] = file
        self._statements: dict[str, Statement] = {}
        self._by_dimension: dict[tuple[str, int], Statement] = {}

    def __getitem__(self, name: str) -> Statement:
        found = self._statements.get(name)
        if found is None:
            file = self._files[name]
            for statement in _parse(file, self._texts[file]):
                # Of two threads that parse the same file, the first one's statements count.
                self._statements.setdefault(statement.name, statement)
            found = self._statements[name]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def at(self, name: str, dimension: int) -> Statement:
        """Give the statement for vectors of `dimension`."""
        found = self._by_dimension.get((name, dimension))
        if found is None:
            if self[name].dimension is None or dimension not in DIMENSIONS:
                raise KeyError((name, dimension))
            found = self._by_dimension.setdefault((name, dimension), _derive_width(self[name], dimension))
        return found

    def texts(self) -> Iterator[Statement]:
        """Give every text that can reach the server."""
        for name, statement in self.items():
            if statement.dimension is None:
                yield statement
            else:
                yield from (self.at(name, dimension) for dimension in DIMENSIONS)


def find_folder(name: str) -> Path:
    """Find `sql` or `migrations`: inside the package in a wheel, beside it in a checkout."""
    for base in (Path(__file__).parent, Path(__file__).parent.parent):
        if (base / name).is_dir():
            return base / name
    raise ConfigurationError(f"the installation is incomplete: folder {name} is missing")


def _find_names(text: str) -> Iterator[str]:
    for name, doc in _HEADER.findall(text):
        yield name
        yield from (name.replace("room", scope) for scope in _find_scopes(doc))


def _parse(file: str, text: str) -> Iterator[Statement]:
    adapter = AsyncPGAdapter()  # type: ignore[no-untyped-call]
    queries = aiosql.from_str(text, lambda: adapter)
    for name in queries.available_queries:
        if name.endswith("_cursor") and name.removesuffix("_cursor") in queries.available_queries:
            continue  # aiosql makes one beside every select
        query = getattr(queries, name)
        statement = Statement(
            name=name,
            sql=query.sql,
            params=tuple(adapter.var_sorted[name]),
            doc=(query.__doc__ or "").strip(),
            file=file,
            dimension=384 if _is_for_one_width(query.sql) else None,
        )
        yield statement
        yield from (_derive_scope(statement, scope) for scope in _find_scopes(statement.doc))


def _find_scopes(doc: str) -> list[str]:
    """Give the scopes that a statement for a room is also for."""
    found = _ALSO_FOR.search(doc)
    return found[1].split(", ") if found else []


def _is_for_one_width(sql: str) -> bool:
    """Tell whether a text is written for dim_384; one that names the other columns, too, takes whatever is there."""
    return ("dim_384" in sql and "dim_512" not in sql) or "_384(" in sql


def _derive_scope(statement: Statement, scope: str) -> Statement:
    return replace(
        statement,
        name=statement.name.replace("room", scope),
        sql=_ROOM_ID.sub(f"{scope}_id", statement.sql),
        params=tuple(name.replace("room_id", f"{scope}_id") for name in statement.params),
    )


def _derive_width(statement: Statement, dimension: int) -> Statement:
    return replace(statement, sql=_WIDTH.sub(str(dimension), statement.sql), dimension=dimension)


SQL = Statements(find_folder("sql"))
