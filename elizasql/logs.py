"""Logs."""

from __future__ import annotations

from ._store import Store


class Logs(Store):
    """To be written."""
