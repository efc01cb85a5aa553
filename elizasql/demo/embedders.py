"""Embedders of the demo: text in, unit vectors out.

The built-in one hashes features, so that the demo runs on any machine, without a model and without a network. A user
who has `sentence-transformers` and its model on disk gets that instead.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import log, sqrt
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

MODEL = "all-MiniLM-L6-v2"

LONGEST_TEXT = 20_000  # characters that are looked at; a whole book on one line has no one meaning
PAIR_WEIGHT = 0.5
GRAM_WEIGHT = 0.6
FUNCTION_WORD_WEIGHT = 0.25

# Words that say how a sentence is built, not what it is about; a whole word is compared, before stemming.
_FUNCTION_WORDS = """
    a about after again all also am an and any are as at be because been before being both but by can could did
    do does doing done down each even for from get gets got had has have he her here hers him his how i if in
    into is it its just may me might more most much must my no not now of off on one only or other our out over
    own s shall she should so some such t than that the their them then there these they this those through to
    too under until up us very was we well were what when where whether which while who whom whose why will with
    would you your yours
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())

# Forty letters at most: a run of base64, or of a script without spaces, becomes several words.
_WORD = re.compile(r"\w{1,40}")
_ACCENT = re.compile("[\u0300-\u036f]")
# Longest first; what is left must keep three letters.
_SUFFIXES = ("ations", "ation", "ings", "ing", "ies", "ied", "ers", "ed", "er", "es", "ly", "al", "s", "y", "e")


class Embedder(Protocol):
    """Turns texts into vectors of one dimension."""

    @property
    def name(self) -> str:
        """What the embedder is called; vectors of two names are never compared."""

    @property
    def dimension(self) -> int:
        """The width of its vectors."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one unit vector for each text, as an array `[len(texts), dimension]`."""


class HashingEmbedder:
    """A deterministic embedder without a model: words, pairs of words and pieces of words, hashed with a sign.

    It finds texts that share words, inflected or misspelt; it knows nothing about synonyms. The same text has the
    same vector, bit for bit, in every process and in every batch.
    """

    name = "feature hashing 1"  # another number for other features: stored vectors are compared with new ones
    dimension = 384

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one unit vector for each text; never a zero vector, whatever the text.

        Args:
            texts: any texts, also empty ones.

        Returns:
            An array `[len(texts), 384]`.
        """
        rows: list[int] = []
        words: list[_Word] = []
        weights: list[float] = []
        pair_rows: list[int] = []
        pairs: list[str] = []
        for row, text in enumerate(texts):
            found = _split(text)
            for word, count in Counter(found).items():
                rows.append(row)
                words.append(_word(word))
                weights.append(1.0 if count == 1 else 1.0 + log(count))
            stems = [word.stem for word in map(_word, found) if not word.is_function]
            pairs += map(" ".join, pairwise(stems))
            pair_rows += [row] * (len(stems) - 1)
        if not words:
            return np.zeros((0, self.dimension), np.float32)
        sizes = [len(word.buckets) for word in words]
        cells = np.repeat(rows, sizes) * self.dimension + np.concatenate([word.buckets for word in words])
        values = np.repeat(weights, sizes) * np.concatenate([word.values for word in words])
        buckets, signs = _hash(pairs)
        # bincount adds in the order given, so a vector does not depend on the texts that share its batch.
        size = len(texts) * self.dimension
        sums = np.bincount(cells, values, size)
        sums += np.bincount(np.array(pair_rows, np.int64) * self.dimension + buckets, signs * PAIR_WEIGHT, size)
        vectors = sums.reshape(-1, self.dimension)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        lost = norms[:, 0] < 1e-6  # opposite signs in the same buckets: rare, but a zero vector has no direction
        vectors[lost, 0] = norms[lost] = 1.0
        return np.asarray(vectors / norms, np.float32)


class SentenceTransformersEmbedder:
    """The model `all-MiniLM-L6-v2` of `sentence-transformers`, from the files on this machine only."""

    name: str = f"sentence-transformers {MODEL}"

    def __init__(self) -> None:
        """Load the model.

        Raises:
            Exception: whatever the library raises when it is missing, too old, broken or without the model's files.
        """
        library = importlib.import_module("sentence_transformers")
        self._model: Any = library.SentenceTransformer(MODEL, local_files_only=True)
        self.dimension: int = self.embed(["probe"]).shape[1]

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one unit vector for each text, as an array `[len(texts), dimension]`."""
        vectors = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, np.float32)


def best_embedder() -> Embedder:
    """Return the model of `sentence-transformers` if it loads from this machine, else the built-in embedder."""
    try:
        return SentenceTransformersEmbedder()
    except Exception:  # noqa: BLE001 - an optional library fails in its own ways; a demo must run without it
        return HashingEmbedder()


@dataclass(frozen=True, eq=False)
class _Word:
    """What a word adds to a vector."""

    stem: str
    is_function: bool
    buckets: NDArray[np.int64]
    values: NDArray[np.float64]


def _split(text: str) -> list[str]:
    """Return the words of a text in lower case, without accents; its first signs if it has none. Never empty."""
    text = text[:LONGEST_TEXT]
    if not text.isascii():
        text = _ACCENT.sub("", unicodedata.normalize("NFKD", text))
    return _WORD.findall(text.casefold()) or [text.strip()[:40]]


@lru_cache(maxsize=1 << 16)
def _word(word: str) -> _Word:
    """Return the features of a word: its stem, and its character n-grams of 3 to 5 with a smaller weight together."""
    stem = _stem(word)
    edged = f"<{word}>"
    grams = [edged[i : i + n] for n in (3, 4, 5) for i in range(len(edged) - n + 1)] or [edged]
    # A stem takes four buckets: one that it shares with another word then counts for a quarter.
    buckets, values = _hash([f"{stem} {i}" for i in range(4)] + grams)
    values[:4] /= 2.0
    values[4:] *= GRAM_WEIGHT / sqrt(len(grams))
    is_function = word in FUNCTION_WORDS
    return _Word(stem, is_function, buckets, values * (FUNCTION_WORD_WEIGHT if is_function else 1.0))


def _stem(word: str) -> str:
    """Cut the commonest English endings, and one of a doubled last letter (`planning` and `planned` → `plan`)."""
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word[: -len(suffix)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def _hash(features: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the bucket and the sign of each feature, the same in every process."""
    checksums = np.array([zlib.crc32(feature.encode("utf-8", "surrogatepass")) for feature in features], np.uint64)
    mixed = checksums * np.uint64(0x9E3779B97F4A7C15)  # spreads the bits of a checksum, which is linear, upwards
    buckets = (mixed >> np.uint64(40)) % np.uint64(HashingEmbedder.dimension)
    return buckets.astype(np.int64), np.where(mixed >> np.uint64(39) & np.uint64(1), 1.0, -1.0)
