"""The vectors that the benchmarks store and ask for, and what an exact search finds in them.

Real sentence embeddings where they are at hand, otherwise generated ones of the same structure. Random vectors would
not do: they make every index look bad and every second ranking useless.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

FILE = "sentences-384.npz"
WIDTH = 384
QUERIES = 1000


@dataclass(frozen=True)
class Data:
    """Vectors of unit norm, in no order, and questions of the same kind that are not among them.

    Attributes:
        source: Where they come from, for the report.
        vectors: float32[n, 384].
        topics: int[n], 0-44, of very different sizes.
        queries: float32[q, 384].
        query_topics: int[q].
    """

    source: str
    vectors: Floats
    topics: Ints
    queries: Floats
    query_topics: Ints


def load(rows: int, queries: int = QUERIES) -> Data:
    """Load real embeddings, or make some; always the same ones for the same numbers.

    Real ones are in a file sentences-384.npz, in the folder that ELIZASQL_BENCH_DATA names or in `shared/data` beside
    the checkout: `vectors` and `queries` as int8 with a float32 scale a row, `topic` and `query_topic`.
    """
    named = os.environ.get("ELIZASQL_BENCH_DATA")
    path = Path(named or Path(__file__).parents[2] / "shared" / "data") / FILE
    if path.is_file():
        with np.load(path) as arrays:
            data = _read(arrays, rows, queries)
        if len(data.vectors) == rows:
            return data
    elif named:
        raise FileNotFoundError(f"ELIZASQL_BENCH_DATA: there is no {path}")
    return generate(rows, queries)


def _read(arrays: Any, rows: int, queries: int) -> Data:
    # A part is drawn at random, so that it has every topic.
    chosen = np.random.default_rng(1).permutation(len(arrays["vectors"]))[:rows]
    return Data(
        source=f"real sentence embeddings ({FILE})",
        vectors=_unit(arrays["vectors"][chosen] * arrays["scales"][chosen, None]),
        topics=arrays["topic"][chosen].astype(np.int64),
        queries=_unit(arrays["queries"][:queries] * arrays["query_scales"][:queries, None]),
        query_topics=arrays["query_topic"][:queries].astype(np.int64),
    )


def generate(rows: int, queries: int = QUERIES, seed: int = 7, width: int = WIDTH) -> Data:
    """Make vectors with the structure that was measured on real ones (all-MiniLM-L6-v2, 100,000 definitions).

    A vector is a sum of directions that it shares: with all, with its topic (45, of skewed sizes), with about 1,000,
    100, 10 and 2 neighbours; the rest is its own. Directions are drawn with variances that fall as those of real ones
    do. Similarity of a question to the 1st, 10th, 100th and 1,000th vector, median: 0.69, 0.54, 0.41, 0.29 for real
    ones of 100,000; 0.68, 0.51, 0.37, 0.28 here. Other widths than 384 get the same structure, spread over more axes.
    More than 100,000 fill the same groups, so that the first 100,000 of a million are as real ones are; groups of the
    same sizes, ten times as many, would leave a tenth of each there, and nothing that is near to anything.
    """
    rng = np.random.default_rng(seed)
    axis = np.arange(width) * (WIDTH / width)
    spread = ((1.0 + axis) ** -0.175 * np.exp(-axis / 260)).astype(np.float32)

    def directions(count: int) -> Floats:
        made = np.empty((count, width), np.float32)
        for some in _parts(count):  # a part at a time: a million are 1.5 GB
            made[some] = _unit(rng.standard_normal((some.stop - some.start, width), dtype=np.float32) * spread)
        return made

    total = rows + queries
    growth = max(1.0, total / 101_000)
    weights = rng.lognormal(sigma=1.5, size=45)
    topics = np.sort(rng.choice(45, total, p=weights / weights.sum()))
    group = topics
    shares = {0: 0.06, 45: 0.09, 1000: 0.10, 100: 0.13, 10: 0.16, 2: 0.13}
    vectors = directions(total)
    vectors *= np.float32((1 - sum(shares.values())) ** 0.5)
    for size, share in shares.items():
        if size == 0:
            vectors += directions(1) * np.float32(share**0.5)
        else:
            if size != 45:
                # Split each group into groups of about `size`, the first ones smaller.
                parts = np.ceil(np.bincount(group)[group] / (size * growth))
                part = (rng.random(total) ** 1.5 * parts).astype(np.int64)
                group = np.unique(group * total + part, return_inverse=True)[1]
            common = directions(int(group.max()) + 1)
            for some in _parts(total):
                vectors[some] += common[group[some]] * np.float32(share**0.5)
            del common
    for some in _parts(total):
        vectors[some] = _unit(vectors[some])
    order = rng.permutation(total)
    vectors, topics = vectors[order], topics[order]
    return Data(
        source="generated clusters",
        vectors=vectors[:rows],
        topics=topics[:rows],
        queries=vectors[rows:],
        query_topics=topics[rows:],
    )


def _parts(count: int, size: int = 10_000) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _unit(vectors: NDArray[Any]) -> Floats:
    wide = vectors.astype(np.float32)
    return np.ascontiguousarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))


class Exact:
    """Exact answers, to which others are held. Each question is searched once, however often it is asked.

    Args:
        vectors: All that can be found.
        count: How many are asked for.
    """

    def __init__(self, vectors: Floats, count: int = 10) -> None:
        self._vectors = vectors
        self._wanted = min(count, len(vectors))
        self._worst: dict[bytes, float] = {}

    def recall(self, query: Floats, found: Sequence[int]) -> float:
        """Give the share of the true nearest that were found; of equally near ones any counts.

        Args:
            query: What was asked.
            found: Positions of what came back, each once.
        """
        if not self._wanted:
            return 1.0
        key = query.tobytes()
        if key not in self._worst:
            self._worst[key] = float(np.partition(self._vectors @ query, -self._wanted)[-self._wanted])
        # The server sums in another order: what differs by less than this is equal.
        near = self._vectors[list(found)] @ query >= self._worst[key] - 1e-6
        return float(near.sum() / self._wanted)

    def recall_in_full(self, query: Floats, found: Sequence[int]) -> float:
        """Give the same for a search of ours, which never comes back short: fewer rows than match are an error."""
        assert len(set(found)) == len(found) == self._wanted, "fewer rows than match"
        return self.recall(query, found)


def recall_in_full(vectors: Floats, query: Floats, found: Sequence[int], count: int) -> float:
    """Give the same for a question that is asked once."""
    return Exact(vectors, count).recall_in_full(query, found)
