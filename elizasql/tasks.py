"""Tasks."""

from __future__ import annotations

from ._store import Store


class Tasks(Store):
    """To be written."""
