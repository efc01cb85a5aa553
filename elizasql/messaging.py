"""Messaging."""

from __future__ import annotations

from ._store import Store


class Messaging(Store):
    """To be written."""
