"""Spans and durations of the public methods through OpenTelemetry's API, by its stable conventions for databases.

The application brings the SDK and configures it; this library imports the API alone, and does nothing where it is not
installed. Extra: `elizasql[otel]`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, unquote

from .config import split_address

Observe = Callable[[str, float, float, "BaseException | None"], None]

# Bounds of a histogram's buckets by the conventions, in seconds. An SDK's own are meant for milliseconds: every call of
# less than five seconds would be in the first one.
_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)

# Seconds after which tracing that is set up late is noticed.
_LOOK_AGAIN = 1.0


def observer(address: str) -> Observe | None:
    """Give what records one call that has ended, None where OpenTelemetry is not installed.

    Args:
        address: Connection string; of it host, port and database are recorded, never a name or a password.
    """
    try:
        from opentelemetry import trace  # noqa: PLC0415 - an extra
    except ImportError:
        return None
    tracer, durations = _instruments()
    common = _attributes(address)
    known: dict[str, dict[str, Any]] = {}
    look_again = 0.0

    def observe(name: str, started: float, seconds: float, error: BaseException | None) -> None:
        nonlocal look_again
        attributes = known.get(name)
        if attributes is None:
            attributes = known[name] = common | {"db.operation.name": name}
        if error is not None:
            attributes = attributes | {"error.type": type(error).__name__}
            if sqlstate := getattr(error, "sqlstate", None):
                attributes["db.response.status_code"] = sqlstate
        durations.record(seconds, attributes)
        if started < look_again:
            return
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            # Nobody has set up tracing. A span that goes nowhere costs 3 us, and finding out 6 us after a search.
            look_again = started + _LOOK_AGAIN
            return
        # The call has ended: its span is made with the times that it had, in the context of whoever made the call.
        began = time.time_ns() - int((time.monotonic() - started) * 1e9)
        span = tracer.start_span(name, kind=trace.SpanKind.CLIENT, attributes=attributes, start_time=began)
        if error is not None:
            span.set_status(trace.StatusCode.ERROR, str(error))
        span.end(began + int(seconds * 1e9))

    return observe


@functools.cache
def _instruments() -> tuple[Any, Any]:
    """Give the tracer and the histogram, once: the API keeps all that it has made, for an SDK that may come late."""
    from opentelemetry import metrics, trace  # noqa: PLC0415 - an extra

    durations = metrics.get_meter("elizasql").create_histogram(
        "db.client.operation.duration",
        unit="s",
        description="Duration of database client operations.",
        explicit_bucket_boundaries_advisory=_BUCKETS,
    )
    return trace.get_tracer("elizasql"), durations


def _attributes(address: str) -> dict[str, Any]:
    parts = split_address(address)
    query = dict(parse_qsl(parts.query))
    database = unquote(parts.path[1:]) or query.get("dbname") or query.get("database")
    # Of several hosts the first.
    host = unquote(parts.netloc.rpartition("@")[2]).partition(",")[0] or query.get("host", "").partition(",")[0]
    name, _, port = host.rpartition(":")
    if not port.isdigit():
        name, port = host, query.get("port", "").partition(",")[0]
    attributes: dict[str, Any] = {"db.system.name": "postgresql"}
    if database:
        attributes["db.namespace"] = database
    if name:
        attributes["server.address"] = name.strip("[]")
    if port.isdigit() and port != "5432":
        attributes["server.port"] = int(port)
    return attributes
