"""Values on their way to the server and back: vectors, JSON, text, ids and times.

Everything is checked and encoded here, before a connection is taken, so that bad input costs no I/O. The codecs that
`register` puts on a connection pass what this module made through unchanged and decode what comes back.

Text follows one policy wherever it is stored, in a text column or anywhere inside JSON, keys included: PostgreSQL can
hold every character but U+0000 and unpaired surrogates. A surrogate pair is joined to the character that it stands for;
U+0000 and an unpaired surrogate become U+FFFD, one for one; nothing else is altered. Of keys that become one, the last
counts. How many texts this has altered, the adapter's `stats` tell.
"""

from __future__ import annotations

import json
import os
import re
import struct
import time
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeGuard
from uuid import UUID

import numpy as np
import orjson
from pgvector import HalfVector, Vector

from ._calls import count_replaced_text
from ._statements import SQL
from .errors import ArgumentError, EmbeddingError, show
from .types import DIMENSIONS

if TYPE_CHECKING:
    import asyncpg
    from numpy.typing import NDArray

    from .types import Embedding

# The HNSW index holds halfvec: 65504 is its largest number, 2**-24 the smallest that is not rounded to zero there. A
# vector whose largest component is outside is either not finite, zero, or has no place in the index.
_PEAK_MIN = 2.0**-24
_PEAK_MAX = 65504.0

# Sequences whose items are no numbers, or numbers that nobody meant as such.
_NO_NUMBERS = (str, bytes, bytearray, memoryview, Mapping)

# The same limits for the sum of the squares, which takes a third of the time: whoever keeps them has a largest
# component of at least 2**-24, even with the most components that there are, and of at most 65504.
_SQUARES_MIN = max(DIMENSIONS) * _PEAK_MIN**2
_SQUARES_MAX = _PEAK_MAX**2

_FLOAT32 = np.dtype(np.float32)
_DENSE = (_FLOAT32.itemsize,)
_BIG_ENDIAN = np.dtype(">f4")
_HEADERS = {dimension: struct.pack(">HH", dimension, 0) for dimension in DIMENSIONS}

_JSON_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS | orjson.OPT_UTC_Z
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")

# What `UUID` reads beyond this, such as "0x..." or digits of other scripts, is more likely a mistake than an id.
_UUID = re.compile("(urn:uuid:)?[{]?[0-9a-fA-F-]{32,36}[}]?")

# Bytes that the server takes as one jsonb; with several such the message would end the connection.
_MOST_JSON = 1 << 28

# Bytes of a text that rows are looked up by. An entry of a b-tree has 2,704: room for two such texts, and for the ids
# and the time that stand beside them.
_MOST_KEY = 1024

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


# --- text and JSON ---------------------------------------------------------------------------------------------------


def clean_text(text: str) -> str:
    """Make text storable by the policy above; text that is storable already comes back as it is."""
    if not _UNSTORABLE.search(text):
        return text
    # UTF-16 joins the pairs of surrogates; what is left of them is unpaired and becomes U+FFFD.
    paired = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    clean = paired.replace("\x00", "\ufffd")
    if clean.count("\ufffd") > text.count("\ufffd"):
        count_replaced_text()
    return clean


def as_text(value: object, name: str, *, empty: bool = True) -> str:
    """Check that an argument is text, and clean it."""
    if not isinstance(value, str):
        raise ArgumentError(f"{name} must be a string, not {type(value).__name__}")
    if not value and not empty:
        raise ArgumentError(f"{name} must not be empty")
    return clean_text(value)


def as_key(value: object, name: str, *, empty: bool = True) -> str:
    """Check text that an index holds, and clean it."""
    key = as_text(value, name, empty=empty)
    if len(key) * 4 > _MOST_KEY and len(key.encode()) > _MOST_KEY:
        raise ArgumentError(f"{name} must have at most {_MOST_KEY:,} bytes in UTF-8, not {len(key.encode()):,}")
    return key


def as_optional_text(value: object, name: str) -> str | None:
    """Check that an argument is text or None."""
    return None if value is None else as_text(value, name)


def as_texts(values: object, name: str) -> list[str]:
    """Check a collection of texts, and clean them; a text alone is refused: it would be read letter by letter."""
    return [as_text(value, name) for value in as_collection(values, f"{name} must be a collection of strings")]


def as_choice(value: object, allowed: Sequence[str], name: str) -> str:
    """Check that an argument is one of a few texts; of an enumeration of texts its value counts."""
    if not isinstance(value, str) or value not in allowed:
        raise ArgumentError(f"{name} must be one of {', '.join(allowed)}, not {show(value, 40)}")
    return allowed[allowed.index(value)]


def as_collection(values: Any, wanted: str) -> Iterator[Any]:
    """Check that there may be several values: one alone would be read by its letters or its keys.

    Args:
        values: What the caller gave.
        wanted: What the error says that it should have been.
    """
    # An array without axes says that it can be iterated over, and cannot.
    empty = isinstance(values, np.ndarray) and not values.ndim
    if empty or isinstance(values, (str, bytes, bytearray, Mapping)) or not isinstance(values, Iterable):
        hint = ": make a list of it, [each async for each in it]" if isinstance(values, AsyncIterable) else ""
        raise ArgumentError(f"{wanted}, not {type(values).__name__}{hint}")
    return iter(values)


def encode_json(value: object, name: str = "value") -> bytes:
    """Encode a value as the server's binary jsonb.

    UUIDs, datetimes and numpy arrays are written as their JSON forms; NaN and infinities become null, as in
    JavaScript. Raises ArgumentError for what JSON cannot hold, integers beyond 64 bits included, and for more than the
    server takes.
    """
    try:
        text = orjson.dumps(value, option=_JSON_OPTIONS, default=_write_other)
        if b"\\u0000" not in text:
            return _as_jsonb(text, name)
        # What was written is cleaned, not `value`: the text may stand in a dataclass or an enumeration.
        value = orjson.loads(text)
    except TypeError:
        pass  # an unpaired surrogate, or what has a form that orjson does not know
    try:
        return _as_jsonb(orjson.dumps(_clean_json(value), option=_JSON_OPTIONS, default=_write_other), name)
    except (TypeError, RecursionError) as error:
        raise ArgumentError(f"{name} is not JSON: {error}") from None


def _as_jsonb(text: bytes, name: str) -> bytes:
    if len(text) > _MOST_JSON:
        raise ArgumentError(f"{name} has {len(text) >> 20} MB as JSON, more than the {_MOST_JSON >> 20} MB of a jsonb")
    return b"\x01" + text


def _write_other(value: object) -> str | datetime:
    # orjson knows UUID and datetime alone; asyncpg's ids are of a class under the one, other libraries' times of one
    # under the other.
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, datetime):
        return datetime.combine(value, value.timetz())
    raise TypeError


def encode_object(value: object, name: str) -> bytes:
    """Encode a JSON object; anything but a mapping is refused."""
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{name} must be a mapping, not {type(value).__name__}")
    return encode_json(value if type(value) is dict else dict(value), name)


def _clean_json(value: Any) -> Any:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Mapping):
        return {_clean_key(key): _clean_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean_json(item) for item in value]
    if isinstance(value, Enum):
        return _clean_json(value.value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _clean_json(getattr(value, field.name)) for field in fields(value) if field.name[0] != "_"}
    if isinstance(value, np.ndarray):
        return _densify(value)
    return value


def _clean_key(key: Any) -> Any:
    if isinstance(key, str):
        return clean_text(key)
    return str(key) if isinstance(key, UUID) else key


def _densify(array: NDArray[Any]) -> Any:
    """Give an array as orjson writes it: dense, in the machine's byte order, of numbers or times."""
    if array.dtype.kind in "OU":
        return _clean_json(array.tolist())
    return np.ascontiguousarray(array, array.dtype.newbyteorder("=")) if array.ndim else array[()]


def decode_json(data: bytes) -> Any:
    """Decode the server's binary jsonb; a number that is beyond a float's range becomes infinite."""
    try:
        return orjson.loads(data[1:])
    except orjson.JSONDecodeError:
        # Raw SQL and imports may store such a number: one row must not keep all others from being read.
        return json.loads(data[1:], parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))


# --- ids, times, numbers ---------------------------------------------------------------------------------------------


def new_id() -> UUID:
    """Make an id of version 7: ids made one after the other stand side by side in the indexes."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    high, low = random >> 68, random & ((1 << 62) - 1)
    return UUID(int=milliseconds << 80 | 7 << 76 | high << 64 | 2 << 62 | low)


def as_id(value: object, name: str = "id") -> UUID:
    """Check that an argument is a UUID or its text."""
    if isinstance(value, UUID):
        return value
    if isinstance(value, str) and _UUID.fullmatch(value):
        try:
            return UUID(value)
        except ValueError:
            pass
    text = isinstance(value, str)
    hint = ": make one of it by uuid.uuid5, or by elizasql.elizaos.string_to_uuid as ElizaOS does" if text else ""
    raise ArgumentError(f"{name} must be a UUID, not {show(value)}{hint}")


def as_optional_id(value: object, name: str) -> UUID | None:
    """Check that an argument is a UUID, its text, or None."""
    return None if value is None else as_id(value, name)


def as_ids(values: Iterable[object], name: str = "ids") -> list[UUID]:
    """Check a collection of ids; a single string is refused, since it would be read letter by letter."""
    one = name.removesuffix("s")  # what the methods call it that take a single one and go this way, too
    return [as_id(value, one) for value in as_collection(values, f"{name} must be a collection of UUIDs")]


def as_distinct_ids(values: Iterable[object], name: str = "ids") -> list[UUID]:
    """Check a collection of ids; give each once, in the order given."""
    return list(dict.fromkeys(as_ids(values, name)))


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether a value is a real number: a boolean is none, nor is a duration of numpy, which says that it is."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, (bool, np.timedelta64))


def as_count(value: object, name: str, *, least: int = 0) -> int:
    """Check that an argument is a whole number that a bigint can hold."""
    if not is_number(value) or not isinstance(value, (int, np.integer)):
        raise ArgumentError(f"{name} must be a whole number, not {show(value)}")
    if value < least:
        raise ArgumentError(f"{name} must be at least {least}, not {show(value)}")
    if value >= 2**63:
        raise ArgumentError(f"{name} must be below 2**63, what a bigint holds")
    return int(value)


def as_optional_count(value: object, name: str) -> int | None:
    """Check that an argument is a whole number or None."""
    return None if value is None else as_count(value, name)


# What `time.time()` gives from 1973 on. Taken for milliseconds, a memory would be older than all others,
# and a range of time would hold everything. Only where it is a float: JavaScript's milliseconds are whole.
_LEAST_SECONDS, _MOST_SECONDS = 1e8, 1e11


def as_time(value: object, name: str) -> datetime:
    """Check that an argument is an aware datetime, ISO-8601 text, or milliseconds since 1970."""
    if isinstance(value, str):
        with suppress(ValueError):
            # Python 3.10 does not read the "Z" that JavaScript writes.
            value = datetime.fromisoformat(value.removesuffix("Z") + "+00:00" if value.endswith("Z") else value)
    if isinstance(value, datetime):
        try:
            if value.utcoffset() is not None:
                return value.astimezone(timezone.utc)
        except OverflowError:
            raise ArgumentError(f"{name} lies outside the calendar: {show(value)}") from None
        except Exception as error:
            raise ArgumentError(f"{name} is not a time: {show(value)}") from error
        raise ArgumentError(f"{name} must have a time zone, as datetime.now(timezone.utc) has")
    if is_number(value):
        if isinstance(value, (float, np.floating)) and _LEAST_SECONDS <= value < _MOST_SECONDS:
            raise ArgumentError(
                f"{name} looks like seconds since 1970: give an aware datetime, or milliseconds, not {show(value)}"
            )
        try:
            # Not through seconds as a float, which are off by a microsecond from the year 2106 on.
            exact = int(value) if isinstance(value, (int, np.integer)) else float(value)
            return _EPOCH + timedelta(milliseconds=exact)
        except (OverflowError, ValueError):
            pass
    raise ArgumentError(f"{name} is not a time: {show(value)}")


def as_optional_time(value: object, name: str) -> datetime | None:
    """Check that an argument is a time or None."""
    return None if value is None else as_time(value, name)


def as_optional_end(value: object, name: str) -> datetime | None:
    """Check the end of a time range that includes it, a time or None.

    Whole milliseconds mean to the end of the last one: ElizaOS's JSON cuts times to them, and the row that a time comes
    from is in the range.
    """
    time = as_optional_time(value, name)
    return time if time is None or time.microsecond % 1000 else time + timedelta(microseconds=999)


def as_bool(value: object, name: str) -> bool:
    """Check that an argument is a boolean."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{name} must be True or False, not {show(value)}")
    return bool(value)


def check_callable(value: object, name: str) -> None:
    """Check that an argument can be called, before anything is done."""
    if not callable(value):
        raise ArgumentError(f"{name} must be callable, not {type(value).__name__}")


def check_progress(value: object) -> None:
    """Check that whoever wants to hear of progress can be called; None: nobody does."""
    if value is not None:
        check_callable(value, "progress")


# --- vectors ---------------------------------------------------------------------------------------------------------


def as_embedding(value: object, name: str = "embedding") -> Embedding:
    """Check an embedding and make it float32, as it will be stored.

    Args:
        value: A 1-D array of any real dtype, byte order or stride, a sequence of numbers, or a `pgvector.Vector` or
            `HalfVector`. Integers and wider floats are rounded to the nearest float32.
        name: What the error calls it.

    Returns:
        float32[dimension], C-contiguous; `value` itself when it is that already.

    Raises:
        EmbeddingError: Another type or shape, a width that is not supported, a component that is not finite or beyond
            +-65504, or all components zero or below 2**-24, which the index would round to zero.
    """
    # What comes from a model, and nothing the matter with it: 1.1 us instead of 3.3.
    if (
        type(value) is np.ndarray
        and value.dtype is _FLOAT32
        and len(shape := value.shape) == 1
        and shape[0] in _HEADERS
        and value.strides == _DENSE
        and _SQUARES_MIN <= float(value.dot(value)) <= _SQUARES_MAX
    ):
        return value
    if isinstance(value, (Vector, HalfVector)):
        value = value.to_numpy()
    if not isinstance(value, np.ndarray):
        if isinstance(value, _NO_NUMBERS) or not (isinstance(value, Sequence) or hasattr(value, "__array__")):
            raise EmbeddingError(f"{name} must be an array of numbers, not {type(value).__name__}")
        try:
            value = np.asarray(value)
        except (ValueError, TypeError, OverflowError, RuntimeError) as error:
            # RuntimeError: a tensor of torch that requires a gradient, or is on another device.
            raise EmbeddingError(f"{name} must be an array of numbers: {error}") from None
    if type(value) is not np.ndarray and np.ma.is_masked(value):
        raise EmbeddingError(f"{name} has components that are masked out")
    if value.ndim != 1:
        hint = ": what a model gives for several texts is taken row by row" if value.ndim == 2 else ""
        raise EmbeddingError(f"{name} must have one axis, not shape {value.shape}{hint}")
    if value.dtype.kind not in "fiu":
        raise EmbeddingError(f"{name} must hold real numbers, not {value.dtype}")
    if value.shape[0] not in _HEADERS:
        raise EmbeddingError(f"{name} has {value.shape[0]} dimensions; supported are {', '.join(map(str, DIMENSIONS))}")
    if value.dtype == _FLOAT32:
        vector = np.ascontiguousarray(value)
    else:
        # An overflow becomes infinite and is found below; the warning about it costs 3 us to silence.
        with np.errstate(over="ignore", invalid="ignore"):
            vector = np.ascontiguousarray(value, dtype=np.float32)
    # One pass finds every fault: NaN is carried by max() and fails the comparison.
    peak = float(np.abs(vector).max())
    if not _PEAK_MIN <= peak <= _PEAK_MAX:
        raise EmbeddingError(f"{name} {_explain_peak(vector)}")
    return vector


def _explain_peak(vector: NDArray[np.float32]) -> str:
    if not np.isfinite(vector).all():
        return "has components that are not finite as float32"
    if not vector.any():
        return "is a zero vector, which has no direction"
    peak = float(np.abs(vector).max())
    if peak > _PEAK_MAX:
        return f"has a component of magnitude {peak:g}; at most {_PEAK_MAX:g} can be indexed"
    return f"has no component above {_PEAK_MIN:g} in magnitude; scale it up, cosine similarity stays the same"


def encode_vector(vector: Embedding) -> bytes:
    """Encode a checked embedding in the server's binary form: two bytes of width, two of zero, float32 big-endian."""
    return _HEADERS[vector.shape[0]] + vector.astype(_BIG_ENDIAN).tobytes()


def _decode_vector(data: bytes) -> Embedding:
    return np.frombuffer(data, dtype=_BIG_ENDIAN, offset=4).astype(np.float32)


# --- registration ----------------------------------------------------------------------------------------------------


def _as_is(value: bytes) -> bytes:
    return value


async def register(connection: asyncpg.Connection[Any], vector_schema: str, *, named: bool = True) -> None:
    """Put the codecs on a new connection; a few round trips, once in its life.

    Parameters arrive encoded by this module, also inside arrays: asyncpg would take an ndarray in a list for a nested
    array. The array type is made known here, so that the first batch does not pay for it.

    Args:
        connection: The new connection.
        vector_schema: The schema that the extension `vector` is installed in.
        named: Whether prepared statements may have names, which a pooler may confuse.
    """
    await connection.set_type_codec(
        "vector", schema=vector_schema, encoder=_as_is, decoder=_decode_vector, format="binary"
    )
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=_as_is, decoder=decode_json, format="binary")
    await connection.prepare(SQL["introduce_types"].sql, name=None if named else "")
