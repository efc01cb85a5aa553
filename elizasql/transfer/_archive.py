"""The archive: parts with checksums and a manifest, in a folder or a tar file.

Parts are small enough to be held in memory as a whole. The manifest is written last, and everything under another name
that is changed when all is on disk: an archive that has its name is complete.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tarfile
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

from elizasql.errors import ElizaSQLError

FORMAT = 1
MANIFEST = "manifest.json"

# Bytes: far above what `export_archive` makes of a part, far below what would hurt.
_LARGEST = 256 << 20
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


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(parents=True)

    def add(self, name: str, data: bytes) -> None:
        target = self._path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        pass


class _Tar:
    def __init__(self, path: Path, mode: str) -> None:
        self._file = path.open("xb")
        self._tar = tarfile.open(fileobj=self._file, mode=mode)  # type: ignore[call-overload]  # noqa: SIM115

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


class Writer:
    """Writes an archive."""

    def __init__(self, store: _Store) -> None:
        self._store = store
        self.parts: list[Part] = []

    def add(self, name: str, table: str, agent_id: str | None, rows: int, data: bytes) -> None:
        """Add a part."""
        self._store.add(name, data)
        self.parts.append(Part(name, table, agent_id, rows, len(data), hashlib.sha256(data).hexdigest()))

    def finish(self, **facts: Any) -> None:
        """Add the manifest."""
        manifest = {"format": FORMAT, **facts, "parts": [asdict(part) for part in self.parts]}
        self._store.add(MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def tar_mode(path: Path) -> str | None:
    """Tell by the name what is meant: a mode of tarfile, or None for a folder."""
    if path.name.endswith((".tar.gz", ".tgz")):
        return "gz"
    return "" if path.name.endswith(".tar") else None


@contextmanager
def create(path: Path) -> Iterator[Writer]:
    """Write a new archive; it gets its name when all of it is on disk, and nothing is left of one that failed.

    Raises:
        ArchiveError: There is something of this name already.
    """
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise ArchiveError(f"{path} is there already: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    mode = tar_mode(path)
    try:
        store: _Store = _Folder(unfinished) if mode is None else _Tar(unfinished, f"w:{mode}")
        try:
            yield Writer(store)
        finally:
            store.close()
        unfinished.rename(path)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        else:
            unfinished.unlink(missing_ok=True)


class Archive:
    """An archive that is read.

    Attributes:
        path: Where it is.
        manifest: What it says of itself.
        parts: In the order in which they go in.
    """

    def __init__(self, path: Path) -> None:
        """Open it and read its manifest.

        Raises:
            ArchiveError: It is none, or of a newer format.
        """
        self.path = path
        self._tar: tarfile.TarFile | None = None
        if not path.is_dir():
            try:
                self._tar = tarfile.open(path)  # noqa: SIM115
            except (tarfile.TarError, EOFError, zlib.error) as error:
                what = str(error).partition(":")[0]  # what follows is a list of every compression that was tried
                raise ArchiveError(f"{path} is no archive of elizasql: {what}") from None
        try:
            self.manifest: dict[str, Any] = self._read_manifest()
            self.parts: list[Part] = [self._read_part(part) for part in self.manifest["parts"]]
        except BaseException:
            self.close()
            raise

    def _read_manifest(self) -> dict[str, Any]:
        data = self._read(MANIFEST)
        try:
            manifest = orjson.loads(data)
            number = manifest["format"]
            if not isinstance(manifest["parts"], list) or not isinstance(number, int):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ArchiveError(f"{self.path}: {MANIFEST} is damaged") from None
        if number > FORMAT:
            raise ArchiveError(
                f"{self.path} has format {number}, this version knows {FORMAT}: install a newer elizasql"
            )
        return dict(manifest)

    def _read_part(self, given: Any) -> Part:
        try:
            part = Part(**given)
        except TypeError:
            raise ArchiveError(f"{self.path}: {MANIFEST} is damaged") from None
        if not (isinstance(part.name, str) and _NAME.fullmatch(part.name)):
            raise ArchiveError(f"{self.path}: a part has the name {part.name!r:.80}")
        return part

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
        try:
            if self._tar is None:
                path = self.path / name
                size = path.stat().st_size
                if size > _LARGEST:
                    raise ArchiveError(f"{self.path}: {name} is too large for a part")
                return path.read_bytes()
            member = self._tar.getmember(name)
            file = self._tar.extractfile(member) if member.isreg() and member.size <= _LARGEST else None
            if file is None:
                raise ArchiveError(f"{self.path}: {name} is no part")
            return file.read()
        except (KeyError, FileNotFoundError, NotADirectoryError):
            what = "is no archive of elizasql, or not a complete one" if name == MANIFEST else f"lacks {name}"
            raise ArchiveError(f"{self.path} {what}") from None
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise ArchiveError(f"{self.path} is damaged: {error}") from None

    def verify(self) -> Iterator[Part]:
        """Read every part and check it; give each that is in order."""
        for part in self.parts:
            self.read(part)
            yield part
