"""Real Redis and PostgreSQL servers, each one process in a directory of its own.

They run out of a private Debian root (`sluice.cli.debian`), listen on 127.0.0.1 and are meant for
`sluice run` and for tests, which kill, freeze and restart them.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Final, Literal
from urllib.parse import quote

from sluice.cli.debian import POSTGRES_BIN, TEMPLATE, inside

READY_SECONDS: Final = 120.0
STOP_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.02
_ATTEMPTS: Final = 10

# A parent-death signal comes when the *thread* that started the process ends, so this one starts
# them all and lives as long as the process.
_starter = ThreadPoolExecutor(1, "servers")


class ServerError(RuntimeError):
    """A server did not start or stop; the message ends with the last lines of its log."""


def free_port() -> int:
    """Find a free port that the kernel gives to no outgoing connection.

    So it is still free when a server that was stopped starts again.
    """
    range_file = Path("/proc/sys/net/ipv4/ip_local_port_range")
    low = int(range_file.read_text(encoding="ascii").split()[0])
    first = min(10_000, low // 2)
    while True:
        port = first + secrets.randbelow(low - first)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class _Server(ABC):
    """One server process in `directory`, which may hold the data of an earlier one.

    `port` is kept for the life of the directory; without one a free port is found. `options` go
    over the defaults. Without a `password` whoever reaches the loopback address is let in. With
    `dies_with_parent` the kernel ends the server when this process ends, however it does; otherwise
    it runs on, and another object for the same directory takes it over.
    """

    user: ClassVar[str]
    defaults: ClassVar[Mapping[str, str]]

    def __init__(
        self,
        root: Path,
        directory: Path,
        *,
        port: int | None = None,
        options: Mapping[str, str] | None = None,
        password: str | None = None,
        dies_with_parent: bool = True,
    ) -> None:
        self.root = root
        self.directory = directory.resolve()
        self.options = {**self.defaults, **(options or {})}
        self.password = password
        self._dies_with_parent = dies_with_parent
        self._is_port_given = port is not None
        self._port = port or self._number("port")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """The port on 127.0.0.1; there is none before the first start."""
        if self._port is None:
            raise ServerError(f"{self.directory} was never started")
        return self._port

    @property
    def pid(self) -> int | None:
        """The id of the server's (first) process, or None while it does not run."""
        if self._process is not None:
            return self._process.pid if self._process.poll() is None else None
        pid = self._number("pid")
        return pid if pid and self._is_ours(pid) else None

    @property
    def is_running(self) -> bool:
        """Whether the server's process exists; a frozen one does."""
        return self.pid is not None

    def start(self) -> None:
        """Start the server and wait until it answers; nothing where it runs already.

        Raises:
            ServerError: it ended, or does not answer within two minutes.
        """
        if self.is_running:
            self._wait_until_ready()
            return
        uid, gid = self._owner()
        self.directory.mkdir(parents=True, exist_ok=True)
        os.chown(self.directory, uid, gid)
        self.directory.chmod(0o700)
        for _ in range(_ATTEMPTS):
            if self._port is None:
                self._port = free_port()
            self._prepare(uid, gid)
            self._launch()
            if self._wait_until_ready():
                self._note("port", self._port)
                return
            if self._is_port_given or not self._is_port_taken():
                break
            self._port = None
        raise ServerError(f"{type(self).__name__} did not start:\n{self.log_tail()}")

    def stop(self) -> None:
        """End the server in good order; nothing where it does not run."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End all its processes at once with SIGKILL."""
        if (pid := self.pid) is None:
            return
        family = [pid, *_descendants(pid)]
        # The first process must not see its children end and clean up after them.
        for member in family:
            _signal(member, signal.SIGKILL)
        self._wait_until_gone(family)

    def restart(self) -> None:
        """Stop it, then start it on the same port."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Stop all its processes with SIGSTOP: connections stay open and nobody answers."""
        if (pid := self.pid) is None:
            return
        _signal(pid, signal.SIGSTOP)
        for member in _descendants(pid):
            _signal(member, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let frozen processes go on."""
        if (pid := self.pid) is None:
            return
        for member in [*_descendants(pid), pid]:
            _signal(member, signal.SIGCONT)

    def log_tail(self, lines: int = 15) -> str:
        """Give the last lines of the server's log."""
        log = self.directory / "log"
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    @property
    @abstractmethod
    def home(self) -> Path:
        """The working directory of the running server, by which it is recognised."""

    @abstractmethod
    def _command(self) -> list[str]:
        """Give the command line as it is inside the root."""

    @abstractmethod
    def _prepare(self, uid: int, gid: int) -> None:
        """Write what the server needs before it starts."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether it takes commands."""

    def _launch(self) -> None:
        privileges = [
            *("setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--init-groups"),
            *(["--pdeathsig", "KILL"] if self._dies_with_parent else []),
        ]
        command = inside(
            self.root,
            self.directory,
            [*privileges, *self._command()],
            has_own_ipc=self._dies_with_parent,  # segments of the killed go with their namespace
        )

        def launch() -> subprocess.Popen[bytes]:
            with (self.directory / "log").open("ab") as log:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    cwd="/",
                    env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
                )

        self._process = _starter.submit(launch).result()
        self._note("pid", self._process.pid)

    def _wait_until_ready(self) -> bool:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if not self.is_running:
                return False
            if self._is_ready():
                return True
            time.sleep(_POLL_SECONDS)
        self.kill()
        raise ServerError(f"{type(self).__name__} does not answer:\n{self.log_tail()}")

    def _end(self, number: signal.Signals) -> None:
        if (pid := self.pid) is None:
            return
        self.thaw()
        _signal(pid, number)
        try:
            self._wait_until_gone([pid])
        except ServerError:
            self.kill()

    def _wait_until_gone(self, pids: Iterable[int]) -> None:
        deadline = time.monotonic() + STOP_SECONDS
        for pid in pids:
            while not _is_gone(pid):
                if self._process is not None:
                    self._process.poll()  # it is ours to bury
                if time.monotonic() > deadline:
                    raise ServerError(f"process {pid} of {self.directory} does not end")
                time.sleep(_POLL_SECONDS)
        if self._process is not None:
            self._process.wait()

    def _is_ours(self, pid: int) -> bool:
        """Whether the process works in our directory; another one may have got its number."""
        try:
            return self.home.samefile(f"/proc/{pid}/cwd")
        except OSError:
            return False

    def _is_port_taken(self) -> bool:
        return "Address already in use" in self.log_tail()

    def _owner(self) -> tuple[int, int]:
        passwd = (self.root / "etc/passwd").read_text(encoding="utf-8").splitlines()
        fields = next(line.split(":") for line in passwd if line.startswith(f"{self.user}:"))
        return int(fields[2]), int(fields[3])

    def _note(self, name: str, number: int) -> None:
        (self.directory / name).write_text(f"{number}\n", encoding="ascii")

    def _number(self, name: str) -> int | None:
        try:
            return int((self.directory / name).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None


class RedisServer(_Server):
    """A Redis server; its unix socket is `redis.sock` in its directory."""

    user = "redis"
    defaults: ClassVar[Mapping[str, str]] = {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": '""',
        "maxmemory": "512mb",
        "maxmemory-policy": "noeviction",
    }

    @property
    def home(self) -> Path:
        """The directory of its append-only file."""
        return self.directory

    @property
    def url(self) -> str:
        """The address of its database 0."""
        user = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis://{user}127.0.0.1:{self.port}/0"

    @property
    def environment(self) -> dict[str, str]:
        """The settings that lead a process to it."""
        return {
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(self.port),
            "REDIS_PASSWORD": self.password or "",
        }

    def _command(self) -> list[str]:
        return ["/usr/bin/redis-server", "/srv/redis.conf"]

    def _prepare(self, uid: int, gid: int) -> None:
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "unixsocket": "/srv/redis.sock",
            "unixsocketperm": "700",
            "dir": "/srv",
            **({"requirepass": _quoted(self.password)} if self.password else {}),
            **self.options,
        }
        path = self.directory / "redis.conf"
        path.touch(mode=0o600)
        text = "".join(f"{name} {value}\n" for name, value in options.items())
        path.write_text(text, encoding="utf-8")
        os.chown(path, uid, gid)

    def _is_ready(self) -> bool:
        request = "PING\r\n"
        if self.password:
            request = f"AUTH {_quoted(self.password)}\r\n{request}"
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(request.encode())
                connection.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: connection.recv(4096), b""))
        except OSError:
            return False
        return answer.endswith(b"+PONG\r\n")


class PostgresServer(_Server):
    """A PostgreSQL server with TimescaleDB; its superuser is `sluice`.

    Its unix socket is in its directory, its data in `data` below it, copied from the root's
    template when it starts for the first time.
    """

    user = "postgres"
    defaults: ClassVar[Mapping[str, str]] = {
        "shared_preload_libraries": "timescaledb",
        "timescaledb.telemetry_level": "off",
        "max_worker_processes": "32",
        "timezone": "UTC",
        "log_timezone": "UTC",
    }

    @property
    def home(self) -> Path:
        """The data directory."""
        return self.directory / "data"

    @property
    def dsn(self) -> str:
        """The superuser's address of the database `postgres`."""
        return self.dsn_of("postgres")

    def dsn_of(self, database: str) -> str:
        """Give the superuser's address of a database."""
        password = f":{quote(self.password, safe='')}" if self.password else ""
        return f"postgresql://sluice{password}@127.0.0.1:{self.port}/{database}"

    @property
    def environment(self) -> dict[str, str]:
        """The settings that lead a process to it, but for the database."""
        return {
            "POSTGRES_HOST": "127.0.0.1",
            "POSTGRES_PORT": str(self.port),
            "POSTGRES_USER": "sluice",
            "POSTGRES_PASSWORD": self.password or "",
            "POSTGRES_SSLMODE": "disable",
        }

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """End the server; `immediate` makes it recover at its next start."""
        self._end(signal.SIGINT if mode == "fast" else signal.SIGQUIT)

    def create_database(self, name: str) -> None:
        """Create an empty database."""
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')

    def execute(self, sql: str, database: str = "postgres") -> str:
        """Run SQL as the superuser with psql and give what it printed, unaligned.

        Raises:
            ServerError: what psql said.
        """
        psql = [
            *("setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--init-groups"),
            *("psql", "--no-psqlrc", "--quiet", "--no-align", "--tuples-only"),
            *("--set=ON_ERROR_STOP=1", "--host=/srv", f"--port={self.port}", "--username=sluice"),
            f"--dbname={database}",
        ]
        done = subprocess.run(
            inside(self.root, self.directory, psql),
            input=sql,
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
        )
        if done.returncode:
            raise ServerError(done.stderr.strip())
        return done.stdout.strip()

    def _command(self) -> list[str]:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "/srv",
            **self.options,
        }
        return [
            *(f"/{POSTGRES_BIN}/postgres", "-D", "/srv/data"),
            *(part for name, value in options.items() for part in ("-c", f"{name}={value}")),
        ]

    def _prepare(self, uid: int, gid: int) -> None:
        if not self.home.exists():
            partial = self.directory / "data.partial"
            shutil.rmtree(partial, ignore_errors=True)
            subprocess.run(
                ["cp", "-a", "--reflink=auto", self.root / TEMPLATE, partial], check=True
            )
            if self.password:
                self._set_password(partial, uid, gid)
            partial.rename(self.home)
        # None of ours runs; its number may by now be another's, and PostgreSQL would wait for that.
        (self.home / "postmaster.pid").unlink(missing_ok=True)
        method = "scram-sha-256" if self.password else "trust"
        # The socket is in a directory that only its owner and root can enter.
        rules = f"local all all trust\nhost all all 127.0.0.1/32 {method}\n"
        (self.home / "pg_hba.conf").write_text(rules, encoding="utf-8")

    def _set_password(self, data: Path, uid: int, gid: int) -> None:
        statement = self.directory / "password.sql"
        statement.touch(mode=0o600)
        os.chown(statement, uid, gid)
        quoted = (self.password or "").replace("'", "''")
        statement.write_text(f"ALTER ROLE sluice PASSWORD '{quoted}'\n", encoding="utf-8")
        single = [
            *("setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--init-groups"),
            *(f"/{POSTGRES_BIN}/postgres", "--single", "-D", f"/srv/{data.name}", "postgres"),
        ]
        with statement.open("rb") as source:
            done = subprocess.run(
                inside(self.root, self.directory, single),
                stdin=source,
                capture_output=True,
                check=False,
                cwd="/",
            )
        statement.unlink()
        if done.returncode:
            raise ServerError(done.stderr.decode(errors="replace"))

    def _is_ready(self) -> bool:
        # What pg_ctl looks at: the eighth line of the lock file is the state, the first the pid.
        try:
            lines = (self.home / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except OSError:
            return False
        state = 7
        return len(lines) > state and lines[0] == str(self.pid) and lines[state].strip() == "ready"


def _quoted(text: str) -> str:
    """Quote an argument as Redis reads it, in its configuration and on a line of its own."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _is_gone(pid: int) -> bool:
    """Whether a process has ended, buried or not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


def _descendants(pid: int) -> list[int]:
    """Give the ids of all processes below one; PostgreSQL's leave its process group."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            number, _, rest = path.read_text(encoding="utf-8").partition(" (")
            children.setdefault(int(rest.rpartition(")")[2].split()[1]), []).append(int(number))
    found = children.get(pid, [])
    for child in found:
        found.extend(children.get(child, []))
    return found
