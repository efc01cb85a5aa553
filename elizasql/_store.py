"""The base of the domain classes: what each of them needs of the adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from uuid import UUID

from . import _codecs
from ._executor import Executor
from .config import Config
from .errors import ArgumentError
from .models import Model

T = TypeVar("T")


class Store:
    """A part of the adapter: statements of one domain, scoped to one agent.

    Attributes:
        agent_id: The agent whose rows this adapter reads and writes.
        config: The settings in force.
    """

    agent_id: UUID
    config: Config
    _address: str
    _executor: Executor

    def _read_all(
        self, kind: type[Model], values: Iterable[object], *, new_ids: bool = True, first_wins: bool = True
    ) -> tuple[list[UUID], list[dict[str, Any]]]:
        """Check a batch before any I/O.

        Args:
            kind: The model.
            values: Models or mappings.
            new_ids: Make an id for whatever has none; otherwise that is an error.
            first_wins: Of two rows with one id, which one counts.

        Returns:
            The id of every value in the order given; and the fields of each row, every id once.

        Raises:
            ArgumentError: Names the position of the row that is wrong.
        """
        if isinstance(values, (Model, Mapping, str, bytes)) or not isinstance(values, Iterable):
            raise ArgumentError(f"expected a collection of {kind.__name__}, not {type(values).__name__}")
        ids: list[UUID] = []
        rows: dict[UUID, dict[str, Any]] = {}
        for position, value in enumerate(values):
            try:
                row = kind.read(value)
                self._check_agent(row)
            except ArgumentError as error:
                error.args = (f"{kind.__name__} at position {position}: {error}",)
                raise
            if row.get("id") is None:
                if not new_ids:
                    raise ArgumentError(f"{kind.__name__} at position {position}: id is missing")
                row["id"] = _codecs.new_id()
            ids.append(row["id"])
            if first_wins:
                rows.setdefault(row["id"], row)
            else:
                rows[row["id"]] = row
        return ids, list(rows.values())

    def _check_agent(self, row: dict[str, Any]) -> None:
        """Refuse a row that names another agent: it would be written to this one."""
        given = row.pop("agent_id", None)
        if given is not None and given != self.agent_id:
            raise ArgumentError(f"agent_id is {given}, but this adapter belongs to agent {self.agent_id}")

    def _chunks(self, rows: Sequence[T]) -> Iterator[Sequence[T]]:
        """Cut a batch into the pieces that one statement takes."""
        for start in range(0, len(rows), self.config.batch_size):
            yield rows[start : start + self.config.batch_size]

    def _need(self, rows: Iterable[Mapping[str, Any]], kind: type[Model], *names: str) -> None:
        """Refuse rows that lack a field which creating one needs."""
        for position, row in enumerate(rows):
            for name in names:
                if row.get(name) is None:
                    raise ArgumentError(f"{kind.__name__} at position {position}: {name} is missing")
