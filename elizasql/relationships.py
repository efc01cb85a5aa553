"""Relationships."""

from __future__ import annotations

from ._store import Store


class Relationships(Store):
    """To be written."""
