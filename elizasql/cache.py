"""Cache."""

from __future__ import annotations

from ._store import Store


class Cache(Store):
    """To be written."""
