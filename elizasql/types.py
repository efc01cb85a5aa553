"""The names of types that the public signatures use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pgvector import HalfVector, Vector

__all__ = [
    "DIMENSIONS",
    "JSON",
    "Dimension",
    "Embedding",
    "EmbeddingInput",
    "GoalStatus",
    "IdInput",
    "Indexing",
    "Key",
    "MaxAttempts",
    "Objective",
    "Recall",
    "RunStatus",
    "SupportsArray",
    "UserState",
]

Dimension: TypeAlias = Literal[384, 512, 768, 1024, 1536, 3072]
"""The widths that an embedding may have."""

DIMENSIONS: tuple[Dimension, ...] = (384, 512, 768, 1024, 1536, 3072)

Embedding: TypeAlias = NDArray[np.float32]
"""float32[dimension]"""


class SupportsArray(Protocol):
    """An array of another library, such as a tensor."""

    def __array__(self) -> Any: ...


EmbeddingInput: TypeAlias = "NDArray[Any] | Sequence[float] | SupportsArray | Vector | HalfVector"
"""What is taken as an embedding: a 1-D array or sequence of real numbers, or a vector of the pgvector package."""

IdInput: TypeAlias = "UUID | str"
"""What is taken as an id: a UUID or its text."""

JSON: TypeAlias = "Mapping[str, Any] | Sequence[Any] | str | int | float | bool | None"
"""What a jsonb column holds."""

Indexing: TypeAlias = Literal["background", "manual", "inline"]
"""When new vectors enter the HNSW index: by a task of the adapter, on `index_memories()`, or within the write."""

Recall: TypeAlias = Literal["fast", "balanced", "exact"]
"""How much a search may miss for the sake of time."""

UserState: TypeAlias = Literal["FOLLOWED", "MUTED"]
"""How an agent follows an entity in a room."""

GoalStatus: TypeAlias = Literal["IN_PROGRESS", "DONE", "FAILED"]
"""How far a goal is."""

Key: TypeAlias = str
"""Text that rows are looked up by: at most 1,024 bytes in UTF-8."""

MaxAttempts: TypeAlias = int
"""How often a task may be claimed: 1 to 2**31 - 1 times."""

Objective: TypeAlias = "dict[str, Any]"
"""A step of a goal: `id`, `description`, `completed`, and whatever else belongs to it."""

RunStatus: TypeAlias = Literal["started", "completed", "timeout", "error"]
"""How a run ended, or that it has not."""
