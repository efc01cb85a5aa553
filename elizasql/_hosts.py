"""Connecting to one of several hosts.

A connection string may name several (`postgresql://a,b/name?target_session_attrs=primary`). The driver goes on to the
next one after a refused connection only, within one time limit for all: a host that is silent, or hangs up, hides those
behind it. Here each is tried by itself, with its share of the time, and the one that took the last connection first.
"""

from __future__ import annotations

import configparser
import functools
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlunsplit

import asyncpg

from . import _embedded
from ._retry import Outcome, classify
from .config import redact, split_address
from .errors import ConfigurationError

# A network forgets connections on which nothing is said, and swallows what comes later: after 10 s of silence the
# system asks for a sign of life, and one that gives none for 25 s is lost. Each name where the system has it.
_SIGNS_OF_LIFE = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPALIVE": 10,  # macOS's name of it
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 25_000,
}

# What libpq takes in an address and the driver does not know: it would ask the server for settings of these names.
# Signs of life are ours, `connect_timeout` is read by `Config`, and the rest lets the driver do as it does.
_OF_LIBPQ = {
    "channel_binding",
    "connect_timeout",
    "fallback_application_name",
    "gssdelegation",
    "gssencmode",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "sslcompression",
    "sslsni",
    "tcp_user_timeout",
}
# What a pooler takes from each client and sets on whatever connection it gives it.
_OF_EVERY_CLIENT = ("application_name", "client_encoding", "TimeZone")


class _Hosts:
    """The hosts of one connection string.

    Attributes:
        each: Connection strings with one host, the one to try first in front.
        wanted: What the server must be, one round for each: who prefers a standby takes another when there is none.
        without_tls: Whether it says so.
        bare: Whether it is a pooler that refuses settings of the session; never of several hosts, since an adapter
            asks once whether the settings are in force, and another host may answer for the role.
    """

    def __init__(self, dsn: str) -> None:
        self.each = _split(_for_driver(dsn))
        self.bare = False
        query = dict(parse_qsl(split_address(dsn).query))
        # Where it says that there is no TLS, what libpq's variables say of it is meant for other servers, and refused.
        self.without_tls = query.get("sslmode") == "disable"
        wanted = query.get("target_session_attrs") or os.environ.get("PGTARGETSESSIONATTRS") or "any"
        self.wanted = ("standby", "any") if wanted == "prefer-standby" else (wanted,)


@functools.lru_cache(maxsize=64)
def _hosts_of(dsn: str) -> _Hosts:
    return _Hosts(dsn)


async def connect(dsn: str, *, timeout: float, **options: Any) -> asyncpg.Connection[Any]:
    """Connect as `asyncpg.connect` does, to one of the hosts; an embedded server that was killed is started again.

    Args:
        dsn: Connection string.
        timeout: Seconds for all of it.
        options: Passed on. The text is UTF-8 whatever the address says: what the codecs send is, and the server would
            take it for something else and store that. A pooler that refuses settings of the session is asked without:
            they may be the role's.

    Raises:
        Exception: What asyncpg raised at the host that was tried last, or at the first one that refused for good, such
            as for a wrong password.
        ConfigurationError: The service file cannot be read.
    """
    options["server_settings"] = {**options.get("server_settings", {}), "client_encoding": "UTF8"}
    hosts = _hosts_of(dsn)
    if hosts.without_tls:
        options["direct_tls"] = False
    tries = [(wanted, each) for wanted in hosts.wanted for each in hosts.each]
    until = time.monotonic() + timeout
    if len(hosts.each) == 1:
        try:
            return await _connect(hosts, hosts.each[0], timeout=timeout, **options)
        except (ConnectionRefusedError, FileNotFoundError):
            if not await _embedded.revive(dsn, timeout):
                raise
            return await _connect(hosts, hosts.each[0], timeout=max(until - time.monotonic(), 0.001), **options)
    for number, (wanted, each) in enumerate(tries):
        share = max(until - time.monotonic(), 0.001) / (len(tries) - number)
        try:
            connection = await _connect(hosts, each, timeout=share, target_session_attrs=wanted, **options)
        except Exception as error:
            if number + 1 == len(tries) or classify(error, sent=False, lost=True) is not Outcome.NOT_APPLIED:
                raise
        else:
            hosts.each = [each, *(other for other in hosts.each if other != each)]
            return connection
    raise AssertionError


async def _connect(hosts: _Hosts, dsn: str, **options: Any) -> asyncpg.Connection[Any]:
    given = options["server_settings"]
    bare = {name: given[name] for name in _OF_EVERY_CLIENT if name in given}
    try:
        connection = await _ask_driver(dsn, **(options | {"server_settings": bare} if hosts.bare else options))
    except asyncpg.PostgresError as error:
        if hosts.bare or bare == given or len(hosts.each) > 1 or "unsupported startup parameter" not in str(error):
            raise
        connection = await _ask_driver(dsn, **options | {"server_settings": bare})
        hosts.bare = True
    made = connection._transport.get_extra_info("socket")
    if made.family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):  # it may be closed already
            made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _SIGNS_OF_LIFE.items():
                if (option := getattr(socket, name, None)) is not None:
                    made.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection


async def _ask_driver(dsn: str, **options: Any) -> asyncpg.Connection[Any]:
    """Connect by `asyncpg.connect`, which reads service files: its errors quote their lines, and so passwords."""
    try:
        return await asyncpg.connect(dsn, **options)
    except configparser.Error as error:
        met = type(error).__name__
    # Here, and not above: no context of the error shows the other one.
    file = os.environ.get("PGSERVICEFILE", "~/.pg_service.conf")
    raise ConfigurationError(
        f"{redact(dsn)}: the service file {file} cannot be read ({met}): it takes lines NAME=VALUE below a line "
        "[SERVICE], and a % in a value is written %%"
    )


def files_of_tls(dsn: str) -> dict[str, str]:
    """Give the files that an address, its service or libpq's variables name for TLS, in the order that the driver has.

    A path that is not absolute begins at the working directory.
    """
    said = dict(parse_qsl(split_address(dsn).query))
    of_service: dict[str, str] = {}
    if service := said.get("service") or os.environ.get("PGSERVICE"):
        with suppress(configparser.Error, KeyError, RuntimeError):  # the latter of a user without a home
            services = configparser.ConfigParser()
            services.read(os.environ.get("PGSERVICEFILE") or Path("~/.pg_service.conf").expanduser())
            of_service = dict(services[service])
    found = {
        name: said.get(name) or of_service.get(name) or os.environ.get(f"PG{name.upper()}")
        for name in ("sslrootcert", "sslcrl", "sslcert", "sslkey")
    }
    return {name: path for name, path in found.items() if path}


def _for_driver(dsn: str) -> str:
    """Leave out what only libpq reads.

    Raises:
        ValueError: It asks for a protection that the driver does not have.
    """
    parts = split_address(dsn)
    query = parse_qsl(parts.query)
    for name in ("channel_binding", "gssencmode"):
        if (name, "require") in query:
            raise ValueError(
                f"{name}=require is more than the driver asyncpg can do: leave it out, and have the server verified by "
                "sslmode=verify-full and sslrootcert"
            )
    kept = [each for each in query if each[0] not in _OF_LIBPQ]
    return dsn if len(kept) == len(query) else urlunsplit(parts._replace(query=urlencode(kept)))


def _split(dsn: str) -> list[str]:
    """Give a connection string for each host of one, in the same order."""
    parts = split_address(dsn)
    user, at, hosts = parts.netloc.rpartition("@")
    if "," in hosts:
        return [urlunsplit(parts._replace(netloc=f"{user}{at}{host}")) for host in hosts.split(",")]
    query = dict(parse_qsl(parts.query))
    names = query.get("host", "").split(",")
    if len(names) == 1:
        return [dsn]
    ports = query.get("port", "").split(",")
    ports = ports * len(names) if len(ports) == 1 else ports
    if len(ports) != len(names):
        raise ValueError(f"{len(names)} hosts and {len(ports)} ports")
    return [
        urlunsplit(parts._replace(query=urlencode(query | {"host": name} | ({"port": port} if port else {}))))
        for name, port in zip(names, ports, strict=True)
    ]
