"""Without a database at all: how fast vectors of an agent can be searched where they lie in the caller's memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import COUNT, Peer


class _InProcess(Peer):
    asynchronous = False

    def open(self) -> None: ...

    def close(self) -> None: ...

    def index(self) -> None: ...

    def vector(self, vector: NDArray[np.float32]) -> Any:
        return vector

    def _of_each(self, rows: range) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Give each agent's rows and their vectors."""
        numbers = np.arange(rows.start, rows.stop)
        each = [numbers[self.rows.agents[numbers] == agent] for agent in range(len(self.rows.agent_ids))]
        return [(mine, np.ascontiguousarray(self.rows.vectors[mine])) for mine in each]

    def found(self, answer: Any) -> list[object]:
        return [f"{row:012x}" for row in answer]


class Numpy(_InProcess):
    """One product of an agent's vectors with the question, exact."""

    def load(self, rows: range) -> None:
        self.agents = self._of_each(rows)

    def search(self, question: Any, agent: int) -> Any:
        rows, vectors = self.agents[agent]
        similarities = vectors @ question
        best = np.argpartition(similarities, -COUNT)[-COUNT:]
        return rows[best[np.argsort(-similarities[best])]]


class USearch(_InProcess):
    """An HNSW index for each agent, by usearch."""

    def load(self, rows: range) -> None:
        from usearch.index import Index  # type: ignore[import-not-found]

        self.agents = []
        for mine, vectors in self._of_each(rows):
            index = Index(
                ndim=self.rows.width,
                metric="cos",
                dtype="f32",
                connectivity=16,
                expansion_add=128,
                expansion_search=self.knob.ef_search or 100,
            )
            index.add(mine, vectors)
            self.agents.append(index)

    def search(self, question: Any, agent: int) -> Any:
        return self.agents[agent].search(question, COUNT).keys
