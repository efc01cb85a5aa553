"""The memory of an AI agent on PostgreSQL: raw SQL, performance first.

import elizasql

async with elizasql.connect(agent_id=AGENT) as db:
    await db.ensure_agent_exists({"name": "Ada"})
    await db.ensure_embedding_dimension(384)
    ...
"""

import importlib as _importlib
from typing import Any as _Any

from .adapter import DatabaseAdapter, connect, open
from .config import Config, Settings
from .elizaos import create_database_adapter, plugin
from .errors import *  # noqa: F403
from .errors import __all__ as _errors
from .models import *  # noqa: F403
from .models import __all__ as _models
from .reembedding import Reembedded

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    """Import the blocking face, `elizasql.sync`, when it is first asked for."""
    if name == "sync":
        return _importlib.import_module(f"{__name__}.sync")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [  # noqa: PLE0604
    "Config",
    "DatabaseAdapter",
    "Reembedded",
    "Settings",
    "connect",
    "create_database_adapter",
    "open",
    "plugin",
    *_models,
    *(name for name in _errors if name != "translate"),
]
