"""The memory of an AI agent on PostgreSQL: raw SQL, performance first.

import elizasql

async with elizasql.connect(agent_id=AGENT) as db:
    await db.ensure_agent_exists({"name": "Ada"})
    await db.ensure_embedding_dimension(384)
    ...
"""

from .adapter import DatabaseAdapter, connect, open
from .config import Config, Settings
from .elizaos import create_database_adapter, plugin
from .errors import *  # noqa: F403
from .errors import __all__ as _errors
from .models import *  # noqa: F403
from .models import __all__ as _models
from .reembedding import Reembedded

__version__ = "0.1.0"

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
