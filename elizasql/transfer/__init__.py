"""Moving data: archives of agents, out and in, and the way over from ElizaOS.

An archive is a folder or a tar file: rows as JSON lines, embeddings as .npy, and a manifest with a checksum of each
part. `export_archive` reads one consistent snapshot and `import_archive` may be repeated: rows that are there stay as
they are. `import_elizaos` takes over a database that @elizaos/plugin-sql wrote. All three work in constant memory.
"""

from __future__ import annotations

from ._archive import Archive, ArchiveError
from ._rows import Summary
from .elizaos import Decisions, import_elizaos
from .export import export_archive
from .importer import import_archive

__all__ = [
    "Archive",
    "ArchiveError",
    "Decisions",
    "Summary",
    "export_archive",
    "import_archive",
    "import_elizaos",
]
