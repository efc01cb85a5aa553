"""Components."""

from __future__ import annotations

from ._store import Store


class Components(Store):
    """To be written."""
