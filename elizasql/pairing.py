"""Pairing: who may write to the agent directly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

from . import _codecs
from ._statements import SQL
from ._store import Store, naming_row, order_by_id, read_each
from .errors import ArgumentError
from .models import PairingAllowlistEntry, PairingRequest

T = TypeVar("T")

Query: TypeAlias = "str | Mapping[str, Any]"
"""A channel, or a mapping with `channel` and, when given, `agentId`."""


class Pairing(Store):
    """Requests of senders who want to write to the agent, and the lists of those who may. A channel is a text.

    `agent_id` is the adapter's everywhere; another one is refused.
    """

    # --- requests ----------------------------------------------------------------------------------------------------

    async def get_pairing_requests(
        self, queries: Iterable[Query], *, timeout: float | None = None
    ) -> list[list[PairingRequest]]:
        """Get the requests of each channel, oldest first, in the order of the queries.

        Args:
            queries: Channels, or mappings with `channel` and, when given, `agentId`.

        Raises:
            ArgumentError: A query is about another agent, or does not fit; names its position.

        Statement: sql/pairing.sql get_pairing_requests. One round trip. Source: getPairingRequests; differs: lists of
        requests instead of objects around them.
        """
        return await self._get_of_channels("get_pairing_requests", PairingRequest, queries)

    async def create_pairing_request(
        self, request: PairingRequest | Mapping[str, Any], *, timeout: float | None = None
    ) -> UUID:
        """Create a request and give its id; one whose id is there already stays as it is.

        Raises:
            As `create_pairing_requests`.

        Statement: sql/pairing.sql create_pairing_requests. Source: createPairingRequest.
        """
        return (await self.create_pairing_requests([request]))[0]

    async def create_pairing_requests(
        self, requests: Iterable[PairingRequest | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[UUID]:
        """Create requests, all or none, and give their ids in the order given.

        Raises:
            ArgumentError: `channel`, `sender_id` or `code` is missing.
            UniqueViolationError: The channel has a request with this code, or of this sender, already.
            ForeignKeyError: The agent does not exist.

        Statement: sql/pairing.sql create_pairing_requests. One round trip a chunk. Source: createPairingRequests.
        """
        ids, rows = await self._read_all(PairingRequest, requests, needed=("channel", "sender_id", "code"))
        order_by_id(rows)
        if rows:
            chunks = [
                {"agent_id": self.agent_id, "requests": chunk}
                for chunk in self._encode_chunks(PairingRequest, rows, ids)
            ]
            write = self._write_under_two_keys("create_pairing_requests", chunks)
            await naming_row(write, "PairingRequest", rows, ids)
        return ids

    async def update_pairing_request(
        self, request: PairingRequest | Mapping[str, Any], *, timeout: float | None = None
    ) -> bool:
        """Change `last_seen_at`, `metadata` or both of a request; False when there is no request of this id.

        Args:
            request: `id` and what to change; metadata are replaced as a whole. Other fields are what they are: the
                whole request may be given, and they are not changed. The time that is there, also cut to milliseconds,
                changes nothing.

        Raises:
            ArgumentError: `id` is missing, or `last_seen_at` is None.

        Statement: sql/pairing.sql update_pairing_requests. Source: updatePairingRequest; differs: metadata that are not
        given stay.
        """
        return bool(await self._update_pairing_requests([request], required=False))

    async def update_pairing_requests(
        self, requests: Iterable[PairingRequest | Mapping[str, Any]], *, timeout: float | None = None
    ) -> None:
        """Change requests as `update_pairing_request` does, all or none.

        Raises:
            NotFoundError: A request does not exist; names it. Nothing was changed.
            As `update_pairing_request`.

        Statement: sql/pairing.sql update_pairing_requests. One round trip a chunk. Source: updatePairingRequests.
        """
        await self._update_pairing_requests(requests, required=True)

    async def _update_pairing_requests(
        self, requests: Iterable[PairingRequest | Mapping[str, Any]], *, required: bool
    ) -> list[Any]:
        ids, rows = await self._read_partial(PairingRequest, requests, fixed=("last_seen_at",))
        return await self._write_rows(
            "update_pairing_requests", "requests", PairingRequest, rows, ids, required=required
        )

    async def delete_pairing_request(self, request_id: UUID | str, *, timeout: float | None = None) -> bool:
        """Delete a request; False when there was none.

        Statement: sql/pairing.sql delete_pairing_requests. Source: deletePairingRequest.
        """
        return await self.delete_pairing_requests([request_id]) > 0

    async def delete_pairing_requests(self, request_ids: Iterable[UUID | str], *, timeout: float | None = None) -> int:
        """Delete requests, all or none, and give how many there were.

        Statement: sql/pairing.sql delete_pairing_requests. One round trip a chunk. Source: deletePairingRequests.
        """
        return await self._delete_by_ids("delete_pairing_requests", request_ids, "request_ids")

    # --- allowlists --------------------------------------------------------------------------------------------------

    async def get_pairing_allowlist(
        self, channel: str, agent_id: UUID | str | None = None, *, timeout: float | None = None
    ) -> list[PairingAllowlistEntry]:
        """Get who may write to the agent on a channel, oldest entry first.

        Raises:
            ArgumentError: `agent_id` is another one, or a value does not fit.

        Statement: sql/pairing.sql get_pairing_allowlists. Source: getPairingAllowlist.
        """
        return (await self.get_pairing_allowlists([{"channel": channel, "agent_id": agent_id}]))[0]

    async def get_pairing_allowlists(
        self, queries: Iterable[Query], *, timeout: float | None = None
    ) -> list[list[PairingAllowlistEntry]]:
        """Get for each channel what `get_pairing_allowlist` gives, in the order of the queries.

        Args:
            queries: Channels, or mappings with `channel` and, when given, `agentId`.

        Raises:
            ArgumentError: A query is about another agent, or does not fit; names its position.

        Statement: sql/pairing.sql get_pairing_allowlists. One round trip. Source: getPairingAllowlists; differs: lists
        of entries instead of objects around them.
        """
        return await self._get_of_channels("get_pairing_allowlists", PairingAllowlistEntry, queries)

    async def create_pairing_allowlist_entry(
        self, entry: PairingAllowlistEntry | Mapping[str, Any], *, timeout: float | None = None
    ) -> UUID:
        """Let a sender write to the agent on a channel, and give the id of the entry.

        A sender who may already keeps the entry that is there, and that one's id comes back.

        Raises:
            As `create_pairing_allowlist_entries`.

        Statement: sql/pairing.sql create_pairing_allowlist_entries. Source: createPairingAllowlistEntry; differs: the
        id is the real one.
        """
        return (await self.create_pairing_allowlist_entries([entry]))[0]

    async def create_pairing_allowlist_entries(
        self, entries: Iterable[PairingAllowlistEntry | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[UUID]:
        """Create entries as `create_pairing_allowlist_entry` does, all or none; give their ids in the order given.

        Raises:
            ArgumentError: `channel` or `sender_id` is missing.
            ForeignKeyError: The agent does not exist.

        Statement: sql/pairing.sql create_pairing_allowlist_entries. One round trip a chunk. Source:
        createPairingAllowlistEntries.
        """
        ids, rows = await self._read_all(PairingAllowlistEntry, entries, needed=("channel", "sender_id"))
        if not rows:
            return []
        chunks = [
            {"agent_id": self.agent_id, "entries": chunk}
            for chunk in self._encode_chunks(PairingAllowlistEntry, rows, ids)
        ]
        write = self._write_under_two_keys("create_pairing_allowlist_entries", chunks)
        listed: dict[UUID, UUID] = dict(await naming_row(write, "PairingAllowlistEntry", rows, ids))
        return [listed[id] for id in ids]

    async def update_pairing_allowlist_entry(
        self, entry: PairingAllowlistEntry | Mapping[str, Any], *, timeout: float | None = None
    ) -> bool:
        """Replace the metadata of an entry; False when there is no entry of this id.

        Args:
            entry: `id` and `metadata`. Other fields are what they are: the whole entry may be given, and they are not
                changed.

        Raises:
            ArgumentError: `id` is missing.

        Statement: sql/pairing.sql update_pairing_allowlist_entries. Source: updatePairingAllowlistEntry; differs:
        metadata that are not given stay.
        """
        return bool(await self._update_pairing_allowlist_entries([entry], required=False))

    async def update_pairing_allowlist_entries(
        self, entries: Iterable[PairingAllowlistEntry | Mapping[str, Any]], *, timeout: float | None = None
    ) -> None:
        """Change entries as `update_pairing_allowlist_entry` does, all or none.

        Raises:
            NotFoundError: An entry does not exist; names it. Nothing was changed.
            As `update_pairing_allowlist_entry`.

        Statement: sql/pairing.sql update_pairing_allowlist_entries. One round trip a chunk. Source:
        updatePairingAllowlistEntries.
        """
        await self._update_pairing_allowlist_entries(entries, required=True)

    async def _update_pairing_allowlist_entries(
        self, entries: Iterable[PairingAllowlistEntry | Mapping[str, Any]], *, required: bool
    ) -> list[Any]:
        ids, rows = await self._read_partial(PairingAllowlistEntry, entries)
        return await self._write_rows(
            "update_pairing_allowlist_entries", "entries", PairingAllowlistEntry, rows, ids, required=required
        )

    async def delete_pairing_allowlist_entry(self, entry_id: UUID | str, *, timeout: float | None = None) -> bool:
        """Delete an entry: its sender may no longer write to the agent. False when there was none.

        Statement: sql/pairing.sql delete_pairing_allowlist_entries. Source: deletePairingAllowlistEntry.
        """
        return await self.delete_pairing_allowlist_entries([entry_id]) > 0

    async def delete_pairing_allowlist_entries(
        self, entry_ids: Iterable[UUID | str], *, timeout: float | None = None
    ) -> int:
        """Delete entries, all or none, and give how many there were.

        Statement: sql/pairing.sql delete_pairing_allowlist_entries. One round trip a chunk. Source:
        deletePairingAllowlistEntries.
        """
        return await self._delete_by_ids("delete_pairing_allowlist_entries", entry_ids, "entry_ids")

    async def _get_of_channels(self, name: str, kind: Callable[..., T], queries: Iterable[Query]) -> list[list[T]]:
        """Get what each channel has, in the order of the queries."""
        channels = await read_each(queries, "query", self._read_pairing_channel, names="queries")
        found: list[list[T]] = [[] for _ in channels]
        if channels:
            rows = await self._executor.fetch(SQL[name], agent_id=self.agent_id, channels=channels)
            for *fields, position in rows:
                found[position - 1].append(kind(*fields))
        return found

    def _read_pairing_channel(self, query: Query) -> str:
        row = PairingRequest.read(query if isinstance(query, Mapping) else {"channel": query})
        self._check_agent(row)
        unknown = row.keys() - {"channel"}
        if unknown:
            raise ArgumentError(f"a query has no {', '.join(sorted(unknown))}")
        return _codecs.as_text(row.get("channel"), "channel")
