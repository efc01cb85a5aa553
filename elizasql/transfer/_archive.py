"""The archive: parts with checksums and a manifest, in a folder or a tar file.

Parts are small enough to be held in memory as a whole. The manifest is written last, and everything under another name
that is changed when all is on disk: an archive that has its name is complete.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import lzma
import os
import re
import tarfile
import threading
import uuid
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import UUID

import orjson

from elizasql import _codecs, _migrate
from elizasql._calls import see_through
from elizasql.errors import ArgumentError, ElizaSQLError, NotFoundError

from ._report import naming, open_private, place
from ._rows import BY_NAME

T = TypeVar("T")

FORMAT = 1
MANIFEST = "manifest.json"

# Bytes: far above what `export_archive` makes of a part, far below what would hurt.
_LARGEST = 256 << 20
# What the modules for tar and the compressions say of a file that is not what it should be.
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)
_NAME = re.compile(r"[a-z0-9_-]+(/[a-z0-9_-]+)*\.(jsonl|npy)")


class ArchiveError(ElizaSQLError):
    """The file is no archive of this library, is damaged, or was made by a newer version."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an archive: rows of one table, of one agent or shared.

    Attributes:
        name: Of the file.
        table: Whose rows; "embeddings" are a .npy beside a part of ids.
        agent_id: Whose, as text; None: shared.
        rows: How many.
        bytes: Size.
        sha256: Checksum.
    """

    name: str
    table: str
    agent_id: str | None
    rows: int
    bytes: int
    sha256: str


class _Store(Protocol):
    def add(self, name: str, data: bytes) -> None: ...
    def close(self) -> None: ...
    def discard(self) -> None: ...


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._made: list[Path] = []
        self._make(path)

    def add(self, name: str, data: bytes) -> None:
        target = self._path / name
        for folder in reversed(target.parents[: name.count("/")]):
            self._make(folder)
        with open_private(target, "xb") as file:
            self._made.append(target)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _make(self, folder: Path) -> None:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            self._made.append(folder)

    def close(self) -> None:
        pass

    def discard(self) -> None:
        """Remove what was made here; what others have put there stays."""
        for each in reversed(self._made):
            if not each.is_dir():
                each.unlink(missing_ok=True)
            elif not any(each.iterdir()):
                each.rmdir()


class _Tar:
    def __init__(self, path: Path, mode: str) -> None:
        self._path = path
        self._file = open_private(path, "xb")
        try:
            self._tar = tarfile.open(fileobj=self._file, mode=mode)  # type: ignore[call-overload]  # noqa: SIM115
        except BaseException:
            self._file.close()
            self.discard()
            raise

    def add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o600
        self._tar.addfile(member, io.BytesIO(data))

    def close(self) -> None:
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def discard(self) -> None:
        self._path.unlink(missing_ok=True)


async def in_thread(function: Callable[[], T]) -> T:
    """Run what waits for a disk or computes for long, and only that at a time: also when cancelled, to its end."""
    return await see_through(asyncio.get_running_loop().run_in_executor(None, function))


class Writer:
    """Writes an archive."""

    def __init__(self, store: _Store, path: Path) -> None:
        self._store = store
        self._path = path
        self.parts: list[Part] = []

    async def add(self, name: str, table: str, agent_id: str | None, rows: int, data: bytes) -> None:
        """Add a part; meanwhile others have the event loop: to compress 4 MB takes 0.2 s, and a disk what it likes.

        Raises:
            ArchiveError: A row in it is larger than what is read again.
        """
        if len(data) > _LARGEST:
            raise ArchiveError(f"{name} has a row that is too large for an archive: {len(data):,} bytes")
        checksum = await in_thread(lambda: self._add(name, data))
        self.parts.append(Part(name, table, agent_id, rows, len(data), checksum))

    def _add(self, name: str, data: bytes) -> str:
        with naming(self._path):
            self._store.add(name, data)
        return hashlib.sha256(data).hexdigest()

    async def finish(self, **facts: Any) -> None:
        """Add the manifest.

        Raises:
            ArchiveError: It is larger than what is read again.
        """
        manifest = {"format": FORMAT, **facts, "parts": [asdict(part) for part in self.parts]}
        data = orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        if len(data) > _LARGEST:
            raise ArchiveError(f"{len(self.parts):,} parts are too many for an archive: export some agents at a time")
        await in_thread(lambda: self._add(MANIFEST, data))


def _reraise_real(error: Exception) -> None:
    """Raise what the operating system said; gzip and bz2 say of damage that it is an OSError, one without a number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _check_types(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    if not all(isinstance(given[name], kind) for name, kind in wanted.items()):
        raise TypeError


def tar_mode(path: Path) -> str | None:
    """Tell by the name what is meant: a mode of tarfile, or None for a folder."""
    if path.name.endswith((".tar.gz", ".tgz")):
        return "gz"
    return "" if path.name.endswith(".tar") else None


def fills_folder(path: Path) -> bool:
    """Tell whether an archive of this name would fill an empty folder that is there.

    Raises:
        ArgumentError: There is something else of this name.
    """
    fills = tar_mode(path) is None and path.is_dir() and not any(path.iterdir())
    if os.path.lexists(path) and not fills:
        raise ArgumentError(f"{path} is there already: choose another name")
    return fills


@asynccontextmanager
async def create(path: Path) -> AsyncIterator[Writer]:
    """Write a new archive; it gets its name when all of it is on disk, and nothing is left of one that failed.

    An empty folder that is there is filled, and stays when that fails: it may be one that cannot be replaced, such as
    where a disk is mounted. While it lacks the manifest, it is no archive. Only its owner may read what is made.

    Raises:
        ArgumentError: There is something of this name already.
    """
    mode, fills = tar_mode(path), fills_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path if fills else path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with naming(path):
        store: _Store = _Folder(unfinished) if mode is None else _Tar(unfinished, f"w:{mode}")
    try:
        try:
            yield Writer(store, path)
        finally:
            with naming(path):
                await in_thread(store.close)
        if not fills:
            place(unfinished, path)
    except BaseException:
        store.discard()
        raise


class Archive:
    """An archive that is read.

    Attributes:
        path: Where it is.
        manifest: What it says of itself.
        parts: In the order in which they go in.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open it and read its manifest. Blocks: one that is compressed is read once as a whole, 50 MB in 0.8 s.

        Raises:
            ArchiveError: It is none, is not complete, or was made by a newer version.
            OSError: It is not there, or cannot be read.
        """
        self.path: Path = Path(path)
        self._tar: tarfile.TarFile | None = None
        self._members: dict[str, tarfile.TarInfo] = {}
        self._turn = threading.Lock()  # imports that share it read in threads, and a tar file has one position
        folder = self.path.is_dir()
        if not folder and self.path.exists() and not self.path.is_file():
            raise ArchiveError(
                f"{self.path} is a pipe or a device: an archive is read more than once, it must be a file or a folder"
            )
        if not folder:
            try:
                self._tar = tarfile.open(self.path)  # noqa: SIM115
            except _DAMAGE as error:
                _reraise_real(error)
                what = str(error).partition(":")[0]  # what follows is a list of every compression that was tried
                raise ArchiveError(f"{self.path} is no archive of elizasql: {what}") from None
        try:
            self.manifest: dict[str, Any] = self._read_manifest()
            self.parts: list[Part] = [self._read_part(part) for part in self.manifest["parts"]]
            if not self._agrees():
                raise ArchiveError(f"{path}: {MANIFEST} is damaged")
        except BaseException:
            self.close()
            raise

    def _read_manifest(self) -> dict[str, Any]:
        data = self._read(MANIFEST)
        try:
            manifest = orjson.loads(data)
            number = manifest["format"]
            if type(number) is not int or number < 1:
                raise TypeError
            if number > FORMAT:
                raise ArchiveError(
                    f"{self.path} has format {number}, this version knows {FORMAT}: install a newer elizasql"
                )
            if manifest["schema"] > (known := _migrate.known_versions()[-1]):
                # A column that a newer schema has would be left out of every row, and nobody told.
                raise ArchiveError(
                    f"{self.path} has rows of schema {manifest['schema']}, this version knows {known}: "
                    "install a newer elizasql"
                )
            if not (isinstance(manifest["parts"], list) and isinstance(manifest["rows"], dict)):
                raise TypeError
            for agent in manifest["agents"]:
                _check_types(agent, {"id": str, "name": str, "dimension": (int, type(None))})
                agent["id"] = str(UUID(agent["id"]))
        except (ValueError, KeyError, TypeError):
            raise ArchiveError(f"{self.path}: {MANIFEST} is damaged") from None
        return dict(manifest)

    def _read_part(self, given: Any) -> Part:
        try:
            part = Part(**given)
            _check_types(given, {"name": str, "table": str, "agent_id": (str, type(None)), "rows": int, "bytes": int})
            if part.agent_id is not None:
                part = replace(part, agent_id=str(UUID(part.agent_id)))
            elif part.table == "embeddings":
                raise TypeError
        except (ValueError, TypeError):
            raise ArchiveError(f"{self.path}: {MANIFEST} is damaged") from None
        if not _NAME.fullmatch(part.name):
            raise ArchiveError(f"{self.path}: a part has the name {part.name!r:.80}")
        return part

    def _agrees(self) -> bool:
        """Tell whether the parts are those of the agents, and all that the manifest counts, ids beside vectors."""
        rows: Counter[str] = Counter()
        ids, vectors = set(), set()
        for part in self.parts:
            stem, _, kind = part.name.rpartition(".")
            if kind == "npy":
                vectors.add(stem)
                continue
            rows[part.table] += part.rows
            if part.table == "embeddings":
                ids.add(stem)
        owners = {None, *(agent["id"] for agent in self.manifest["agents"])}
        return {part.agent_id for part in self.parts} <= owners and ids == vectors and rows == self.manifest["rows"]

    def find_agents(self, agent_ids: Collection[UUID] | None = None) -> list[dict[str, Any]]:
        """Give what the manifest says of agents: id, name, dimension.

        Args:
            agent_ids: Which; None: all.

        Raises:
            ArgumentError: An id is none.
            NotFoundError: It holds no such agent.
        """
        agents: list[dict[str, Any]] = self.manifest["agents"]
        if agent_ids is None:
            return agents
        wanted = set(map(str, _codecs.as_ids(agent_ids, "agent_ids")))
        if missing := wanted - {agent["id"] for agent in agents}:
            raise NotFoundError(f"{self.path} holds no agent {', '.join(sorted(missing))}")
        return [agent for agent in agents if agent["id"] in wanted]

    def parts_of(self, agents: list[dict[str, Any]]) -> list[Part]:
        """Give the parts of agents that `find_agents` gave, and what is shared."""
        owners = {None, *(agent["id"] for agent in agents)}
        return [part for part in self.parts if part.agent_id in owners]

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._tar is not None:
            self._tar.close()

    def read(self, part: Part) -> bytes:
        """Give a part, checked.

        Raises:
            ArchiveError: It is missing or not what the manifest says.
        """
        data = self._read(part.name)
        if len(data) != part.bytes or hashlib.sha256(data).hexdigest() != part.sha256:
            raise ArchiveError(f"{self.path}: {part.name} is damaged: its checksum is another one")
        return data

    def _read(self, name: str) -> bytes:
        with self._turn:
            return self._read_alone(name)

    def _read_alone(self, name: str) -> bytes:
        try:
            if self._tar is None:
                path = self.path / name
                if path.stat().st_size > _LARGEST or not path.is_file():
                    raise ArchiveError(f"{self.path}: {name} is no part")
                return path.read_bytes()
            if not self._members:  # `getmember` looks through all of them for each
                self._members = {member.name: member for member in self._tar.getmembers()}
            member = self._members[name]
            file = self._tar.extractfile(member) if member.isreg() and member.size <= _LARGEST else None
            if file is None:
                raise ArchiveError(f"{self.path}: {name} is no part")
            return file.read()
        except (KeyError, FileNotFoundError, NotADirectoryError):
            what = "is no archive of elizasql, or not a complete one" if name == MANIFEST else f"lacks {name}"
            raise ArchiveError(f"{self.path} {what}") from None
        except _DAMAGE as error:
            _reraise_real(error)
            raise ArchiveError(f"{self.path} is damaged: {error}") from None

    def verify(self, parts: Iterable[Part] | None = None) -> Iterator[Part]:
        """Read parts and check them; give each that is in order. None: all.

        Raises:
            ArchiveError: One is missing, is not what the manifest says, is of a table that this version does not know,
                or holds rows of another agent than its own.
        """
        for part in self.parts if parts is None else parts:
            if part.table != "embeddings" and part.table not in BY_NAME:
                raise ArchiveError(f"{self.path}: this version knows no table {part.table!r:.40}")
            data = self.read(part)
            # Rows of embeddings name memories, and are looked for among those of the part's agent.
            scoped = part.table != "embeddings" and not BY_NAME[part.table].shared
            if scoped and self._owners(part, data) - {part.agent_id}:
                raise ArchiveError(f"{self.path}: {part.name} is damaged: it holds rows that are not its agent's")
            yield part

    def _owners(self, part: Part, data: bytes) -> set[str | None]:
        key = "id" if part.table == "agents" else "agent_id"
        try:
            return {str(_read_line(line)[key]).lower() for line in data.splitlines()}
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise ArchiveError(f"{self.path}: {part.name} cannot be read: {error!r:.80}") from None


def _read_line(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line, parse_int=str, parse_float=str)  # a jsonb holds numbers of any size
