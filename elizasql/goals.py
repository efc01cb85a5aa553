"""Goals."""

from __future__ import annotations

from ._store import Store


class Goals(Store):
    """To be written."""
