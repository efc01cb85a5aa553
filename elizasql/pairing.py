"""Pairing."""

from __future__ import annotations

from ._store import Store


class Pairing(Store):
    """To be written."""
