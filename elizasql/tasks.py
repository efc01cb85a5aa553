"""Tasks, and the workers that share them."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

from . import _codecs
from ._listener import Listener
from ._statements import SQL
from ._store import Store, as_limit, unwrap
from .errors import ArgumentError, DeadlineError, ElizaSQLError, UnknownOutcomeError, show
from .models import Task

logger: logging.Logger = logging.getLogger("elizasql")

# What an update changes. The rest is what the claims keep, or stays for good.
_CHANGEABLE = frozenset(
    {"id", "name", "description", "room_id", "world_id", "entity_id", "tags", "metadata", "due_at", "max_attempts"}
)

# Seconds until a worker whose look has failed, after all tries, looks again.
_AFTER_ERROR = 1.0

# Tasks that one claim takes at most: each is written.
_MOST_CLAIMS = 10_000

# The filter whose index serves, the narrowest first.
_BY_SCOPE = {"room_id": "get_tasks_of_room", "entity_id": "get_tasks_of_entity", "world_id": "get_tasks_of_world"}


class Tasks(Store):
    """Create, find, change and delete tasks, and share them among workers.

    A worker takes what is tagged "queue" and ready, does it within the lease, and ends the claim:

        async for task in db.wait_for_tasks(lease=30):
            try:
                await do(task)
            except Exception as error:
                await db.fail_task(task, error)
            else:
                await db.complete_task(task)

    Every task is done at least once: a worker that dies leaves its task to the next one when the lease ends. One is
    done again, too, where the answer to its creation was lost and a worker had completed it before the creation was
    tried again: what is done is not remembered. Times are the server's.
    """

    _listeners: set[Listener]

    # --- the tasks themselves ----------------------------------------------------------------------------------------

    async def create_task(self, task: Task | Mapping[str, Any], *, timeout: float | None = None) -> UUID:
        """Create a task and give its id; one that is there already stays as it is.

        Raises:
            ArgumentError: `name` is missing, or a value does not fit.
            ForeignKeyError: The agent does not exist.

        Statement: sql/tasks.sql create_tasks. One round trip. Source: createTask; differs: no world is needed, the
        entity is stored.
        """
        return (await self.create_tasks([task]))[0]

    async def create_tasks(
        self, tasks: Iterable[Task | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[UUID]:
        """Create tasks, all or none, and give their ids in the order given. What only claims change is not written.

        Tasks without a time keep the order given.

        Raises:
            As `create_task`; errors of a task name its position.

        Statement: sql/tasks.sql create_tasks. One round trip a chunk. Source: createTasks.
        """
        return await self._create_in_order("create_tasks", "tasks", Task, tasks, needed=("name",))

    async def get_task(self, task_id: UUID | str, *, timeout: float | None = None) -> Task | None:
        """Get a task, None where there is none.

        Statement: sql/tasks.sql get_tasks_by_ids. One round trip. Source: getTask.
        """
        found = await self.get_tasks_by_ids([task_id])
        return found[0] if found else None

    async def get_tasks_by_ids(self, task_ids: Iterable[UUID | str], *, timeout: float | None = None) -> list[Task]:
        """Get those of the tasks that exist, in the order of the ids, each once.

        Statement: sql/tasks.sql get_tasks_by_ids. One round trip. Source: getTasksByIds.
        """
        return await self._get_by_ids("get_tasks_by_ids", Task, task_ids, "task_ids")

    async def get_tasks(
        self,
        *,
        room_id: UUID | str | None = None,
        entity_id: UUID | str | None = None,
        world_id: UUID | str | None = None,
        tags: Iterable[str] | str | None = None,
        agent_ids: Iterable[UUID | str] | None = None,
        count: int | None = None,
        limit: int | None = None,
        offset: int | None = None,
        timeout: float | None = None,
    ) -> list[Task]:
        """Get tasks, oldest first; equal times are ordered by id. Filters combine with AND.

        Args:
            room_id, entity_id, world_id: Only of these.
            tags: Only those that have all of these tags; none: no filter.
            agent_ids: Taken for ElizaOS's sake: the adapter's agent; another one is refused. Empty: no tasks.
            count: At most so many; None: all.
            limit: Another name of `count`.
            offset: Leave out so many of the oldest.

        Raises:
            ArgumentError: One of `agent_ids` is another one, `count` and `limit` differ, or a value does not fit;
                nothing was sent.

        Statement: sql/tasks.sql get_tasks, get_tasks_by_tags, get_tasks_of_room, get_tasks_of_entity or
        get_tasks_of_world. One round trip. Source: getTasks; differs: the entity filters, in a fixed order.
        """
        agents = None if agent_ids is None else _codecs.as_ids(agent_ids, "agent_ids")
        for agent_id in agents or ():
            self._check_agent_id(agent_id)
        params: dict[str, Any] = {
            "room_id": _codecs.as_optional_id(room_id, "room_id"),
            "entity_id": _codecs.as_optional_id(entity_id, "entity_id"),
            "world_id": _codecs.as_optional_id(world_id, "world_id"),
            "tags": _texts(tags, "tags"),
            "count": as_limit(count, limit),
            "skip": _codecs.as_optional_count(offset, "offset"),
        }
        if agents == []:
            return []
        by_tags = "get_tasks_by_tags" if params["tags"] else "get_tasks"
        name = next((_BY_SCOPE[scope] for scope in _BY_SCOPE if params[scope] is not None), by_tags)
        return [Task(*row) for row in await self._executor.fetch(SQL[name], agent_id=self.agent_id, **params)]

    async def get_tasks_by_name(
        self,
        name: str,
        *,
        count: int | None = None,
        limit: int | None = None,
        offset: int | None = None,
        timeout: float | None = None,
    ) -> list[Task]:
        """Get the tasks of a name, oldest first.

        Args:
            name: Exactly this.
            count, limit, offset: As in `get_tasks`.

        Raises:
            ArgumentError: `count` and `limit` differ, or a value does not fit; nothing was sent.

        Statement: sql/tasks.sql get_tasks_by_name. One round trip. Source: getTasksByName; differs: in a fixed order.
        """
        rows = await self._executor.fetch(
            SQL["get_tasks_by_name"],
            agent_id=self.agent_id,
            name=_codecs.as_text(name, "name"),
            count=as_limit(count, limit),
            skip=_codecs.as_optional_count(offset, "offset"),
        )
        return [Task(*row) for row in rows]

    async def update_task(
        self, task_id: UUID | str, task: Task | Mapping[str, Any], *, timeout: float | None = None
    ) -> bool:
        """Change the fields of a task that are given; False when there is no task of this id.

        Args:
            task_id: The task.
            task: Of a mapping its keys, of a model what is not None: name, description, room_id, world_id, entity_id,
                tags, metadata (replaced as a whole), due_at, max_attempts. None clears what can be empty. A new
                `due_at` counts from the end of a claim on, unless success deletes the task, and ends the pause after a
                failure; the one that is there, also cut to milliseconds, changes nothing. Whatever else is in it is
                left as it is.

        Raises:
            ArgumentError: `name` or `max_attempts` is None, or a value does not fit.

        Statement: sql/tasks.sql update_tasks. One round trip. Source: updateTask; differs: the entity can be changed,
        the answer tells whether there was one.
        """
        patch = _with_id(_codecs.as_id(task_id, "task_id"), task)
        return bool(await self._update_tasks([patch], required=False))

    async def update_tasks(self, tasks: Iterable[Task | Mapping[str, Any]], *, timeout: float | None = None) -> None:
        """Change tasks as `update_task` does, all or none.

        Args:
            tasks: Models or mappings with `id`, or mappings `{"id": ..., "task": ...}`.

        Raises:
            ArgumentError: Names the position of the task that is wrong.
            NotFoundError: A task does not exist; names it. Nothing was changed.

        Statement: sql/tasks.sql update_tasks. One round trip a chunk. Source: updateTasks.
        """
        await self._update_tasks(tasks, unwrap(Task, "task"), required=True)

    async def _read_patches(
        self, tasks: Iterable[Task | Mapping[str, Any]], read: Callable[[Any], dict[str, Any]] | None = None
    ) -> tuple[list[UUID], list[dict[str, Any]]]:
        ids, rows = await self._read_partial(Task, tasks, fixed=("name", "max_attempts"), read=read)
        return ids, [{key: value for key, value in row.items() if key in _CHANGEABLE} for row in rows]

    async def _update_tasks(
        self,
        tasks: Iterable[Task | Mapping[str, Any]],
        read: Callable[[Any], dict[str, Any]] | None = None,
        *,
        required: bool,
    ) -> list[Any]:
        ids, rows = await self._read_patches(tasks, read)
        return await self._write_rows("update_tasks", "tasks", Task, rows, ids, required=required)

    async def update_pending_task(
        self, task_id: UUID | str, task: Task | Mapping[str, Any], *, timeout: float | None = None
    ) -> bool:
        """Change a task as `update_task` does, only while it is tagged "queue" and no worker has it; False otherwise.

        Of concurrent callers whose change takes the tag away, exactly one gets True: it has the task, and a worker
        whose lease had ended has lost it.

        Raises:
            As `update_task`.
            UnknownOutcomeError: The connection was lost before the answer came: look at the task.

        Statement: sql/tasks.sql update_pending_task. One round trip. Source: updatePendingTask.
        """
        id = _codecs.as_id(task_id, "task_id")
        _, rows = await self._read_patches([_with_id(id, task)])
        encoded = _codecs.encode_json(rows[0], "task")
        return bool(
            await self._executor.fetch_value(SQL["update_pending_task"], agent_id=self.agent_id, id=id, task=encoded)
        )

    async def delete_task(self, task_id: UUID | str, *, timeout: float | None = None) -> bool:
        """Delete a task, claimed or not; False when there was none.

        Statement: sql/tasks.sql delete_tasks. One round trip. Source: deleteTask.
        """
        return await self.delete_tasks([task_id]) > 0

    async def delete_tasks(self, task_ids: Iterable[UUID | str], *, timeout: float | None = None) -> int:
        """Delete tasks, all or none; give how many there were.

        Statement: sql/tasks.sql delete_tasks. One round trip a chunk. Source: deleteTasks; differs: this agent's only.
        """
        return await self._delete_by_ids("delete_tasks", task_ids, "task_ids")

    # --- workers -----------------------------------------------------------------------------------------------------

    async def claim_tasks(
        self,
        limit: int = 1,
        lease: float | timedelta = 30.0,
        *,
        worker: str | None = None,
        names: Iterable[str] | str | None = None,
        tags: Iterable[str] | str | None = None,
        timeout: float | None = None,
    ) -> list[Task]:
        """Take tasks that are tagged "queue" and ready: no other worker gets them until the lease ends.

        Those that have been ready for longest come first. Tasks that another transaction has locked are stepped over.

        Args:
            limit: At most so many, up to 10,000; default 1.
            lease: Seconds that they are the caller's, default 30; `heartbeat_task` extends it.
            worker: The caller's name, for people who look at the table.
            names: Only tasks of these names.
            tags: Only tasks that have all of these tags besides "queue".

        Returns:
            Tasks with a `claim_token`, which ends the claim: pass them to `complete_task`, `fail_task` or
            `release_task`. `ready_at` is the end of the lease.

        Raises:
            ArgumentError: A value does not fit; nothing was sent.

        Statement: sql/tasks.sql claim_tasks or claim_tasks_by_names. One round trip.
        """
        params: dict[str, Any] = {
            "agent_id": self.agent_id,
            "count": _codecs.as_count(limit, "limit"),
            "lease": _seconds(lease, "lease", least=0.001),
            "worker": _codecs.as_optional_text(worker, "worker"),
            "names": _texts(names, "names"),
            "tags": _texts(tags, "tags"),
        }
        if params["count"] > _MOST_CLAIMS:
            raise ArgumentError(f"limit must be at most {_MOST_CLAIMS}, not {limit}")
        if params["count"] == 0 or params["names"] == []:
            return []
        statement = SQL["claim_tasks" if names is None else "claim_tasks_by_names"]
        return [Task(*row) for row in await self._executor.fetch(statement, **params)]

    async def heartbeat_task(
        self, task: Task | Mapping[str, Any], lease: float | timedelta = 30.0, *, timeout: float | None = None
    ) -> bool:
        """Extend the lease of a claim to so many seconds from now, default 30; False when the claim is lost.

        It is lost when another worker has taken the task after the lease ended, or the task is gone. That the lease
        ended does not lose it.

        Raises:
            ArgumentError: The task has no `claim_token`, or another value does not fit; nothing was sent.

        Statement: sql/tasks.sql heartbeat_task. One round trip.
        """
        params = self._claim(task) | {"lease": _seconds(lease, "lease", least=0.001)}
        return bool(await self._executor.fetch_value(SQL["heartbeat_task"], **params))

    async def complete_task(
        self, task: Task | Mapping[str, Any], *, again_in: float | timedelta | None = None, timeout: float | None = None
    ) -> bool:
        """End a claim with success: the task is deleted, or due again in so many seconds; False when the claim is lost.

        Args:
            task: As `claim_tasks` gave it.
            again_in: None: delete it, whatever its tags: that "repeat" and `updateInterval` mean something is up to the
                worker. Otherwise its attempts begin anew; a `due_at` in the future that `update_task` set during the
                claim counts in place of this.

        Raises:
            ArgumentError: The task has no `claim_token`, or another value does not fit; nothing was sent.

        Statement: sql/tasks.sql complete_task or repeat_task. One round trip.
        """
        params = self._claim(task)
        if again_in is None:
            return bool(await self._executor.fetch_value(SQL["complete_task"], **params))
        params["delay"] = _seconds(again_in, "again_in")
        return bool(await self._executor.fetch_value(SQL["repeat_task"], **params))

    async def release_task(
        self, task: Task | Mapping[str, Any], *, delay: float | timedelta = 0.0, timeout: float | None = None
    ) -> bool:
        """Give a claim back as if it had not been: the attempt does not count. False when the claim is lost.

        Args:
            task: As `claim_tasks` gave it.
            delay: Seconds before a worker may take it.

        Raises:
            ArgumentError: The task has no `claim_token`, or another value does not fit; nothing was sent.

        Statement: sql/tasks.sql release_task. One round trip.
        """
        params = self._claim(task) | {"delay": _seconds(delay, "delay")}
        return bool(await self._executor.fetch_value(SQL["release_task"], **params))

    async def fail_task(
        self,
        task: Task | Mapping[str, Any],
        error: str | BaseException,
        *,
        retry: bool = True,
        base_delay: float | timedelta = 1.0,
        max_delay: float | timedelta = 3600.0,
        timeout: float | None = None,
    ) -> bool:
        """End a claim with an error; False when the claim is lost.

        The task is ready again after `base_delay * 2 ** (attempts - 1)` seconds, at most `max_delay`, and up to a
        quarter more, and not before it is due. After `max_attempts` claims it is dead: it stays with its error, and a
        greater `max_attempts` revives it.

        Args:
            task: As `claim_tasks` gave it.
            error: What to remember: text or an exception.
            retry: False: it is dead at once.
            base_delay, max_delay: Seconds; default 1 and 3,600.

        Raises:
            ArgumentError: The task has no `claim_token`, or another value does not fit; nothing was sent.

        Statement: sql/tasks.sql fail_task. One round trip.
        """
        text = _text_of(error) if isinstance(error, BaseException) else error
        params = self._claim(task) | {
            "error": _codecs.as_text(text, "error"),
            "retry": _codecs.as_bool(retry, "retry"),
            "base_delay": _seconds(base_delay, "base_delay"),
            "max_delay": _seconds(max_delay, "max_delay"),
        }
        return bool(await self._executor.fetch_value(SQL["fail_task"], **params))

    async def wait_for_tasks(
        self,
        *,
        lease: float | timedelta = 30.0,
        worker: str | None = None,
        names: Iterable[str] | str | None = None,
        tags: Iterable[str] | str | None = None,
        poll_interval: float | timedelta = 10.0,
    ) -> AsyncGenerator[Task, None]:
        """Claim tasks one by one, as they become ready, without end.

        The server's notification wakes it at once, on a connection of its own. A task that becomes due, a lease that
        ends, or a task whose notification was lost is found at its time or after `poll_interval`. While the server does
        not answer it logs a warning and goes on waiting. Use `contextlib.aclosing` when the loop may be left early:
        that closes the connection.

        Args:
            lease, worker, names, tags: As in `claim_tasks`.
            poll_interval: Seconds after which it looks in any case; default 10.

        Yields:
            Tasks as `claim_tasks` gives them.

        Raises:
            ArgumentError: A value does not fit; nothing was sent.
            ClosedError: The adapter was closed.

        Statement: sql/tasks.sql claim_tasks or claim_tasks_by_names; get_seconds_to_next_task when nothing is ready.
        """
        self._refuse_in_transaction("wait_for_tasks")
        longest = _seconds(poll_interval, "poll_interval", least=0.001)
        wanted = {"names": _texts(names, "names"), "tags": _texts(tags, "tags")}
        if wanted["names"] == []:
            raise ArgumentError("names must not be empty: no task would ever come")
        _seconds(lease, "lease", least=0.001)
        listener = Listener(
            self.config.migration_dsn or self._address, self.config, f"elizasql_tasks_{self.agent_id.hex}"
        )
        self._listeners.add(listener)
        try:
            while True:
                pause = longest
                try:
                    claimed = await self.claim_tasks(
                        1, lease, worker=worker, names=wanted["names"], tags=wanted["tags"]
                    )
                    if not claimed:
                        pause = await self._until_next(longest, wanted)
                except ElizaSQLError as error:
                    # A claim that was done after all comes back when its lease ends.
                    if not (error.retryable or isinstance(error, (DeadlineError, UnknownOutcomeError))):
                        raise
                    logger.warning("waiting for tasks is interrupted: %s", error)
                    claimed = []
                    # Whatever woke it is used up.
                    pause = min(longest, max(getattr(error, "retry_after", 0.0), _AFTER_ERROR))
                for task in claimed:
                    yield task
                if not claimed:
                    await listener.wait(pause)
        finally:
            self._listeners.discard(listener)
            await listener.close()

    async def _until_next(self, longest: float, wanted: dict[str, Any]) -> float:
        """Give the seconds to wait for the next task that is known to become ready."""
        seconds: float | None = await self._executor.fetch_value(
            SQL["get_seconds_to_next_task"], agent_id=self.agent_id, **wanted
        )
        # What is ready already was locked or came a moment too late: it is looked for again, but not without a pause.
        return longest if seconds is None else min(max(seconds, 0.05), longest)

    def _claim(self, task: Task | Mapping[str, Any]) -> dict[str, Any]:
        """Give what identifies a claim."""
        given = Task.read(task)
        self._check_agent(given)
        if given.get("id") is None or given.get("claim_token") is None:
            raise ArgumentError("the task is not claimed: it needs id and claim_token, as claim_tasks gives them")
        return {"agent_id": self.agent_id, "id": given["id"], "claim_token": given["claim_token"]}


def _with_id(id: UUID, task: Task | Mapping[str, Any]) -> dict[str, Any]:
    given = Task.read(task)
    if given.get("id") not in (None, id):
        raise ArgumentError(f"the task's id is {given['id']}, but {id} is to be changed")
    return given | {"id": id}


def _text_of(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - of the task's own code, and the task has failed all the same
        return type(error).__name__


def _texts(value: Iterable[str] | str | None, name: str) -> list[str] | None:
    if value is None:
        return None
    return _codecs.as_texts([value] if isinstance(value, str) else value, name)


def _seconds(value: float | timedelta, name: str, *, least: float = 0.0) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not least <= seconds < 1e9:
        raise ArgumentError(f"{name} must be a number of seconds, at least {least:g}, not {show(value, 40)}")
    return float(seconds)
