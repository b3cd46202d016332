"""Redis and PostgreSQL for a fresh machine: named ones, `docker compose`, or a private root.

`Services.environment` holds the settings that lead a process to them. What is brought here keeps
its data between runs and runs on until `stop`.
"""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dotenv import dotenv_values

from sluice.cli.debian import RootError, Say, ensure_root, locked, why_not
from sluice.cli.servers import PostgresServer, RedisServer, ServerError

__all__ = [
    "NoServicesError",
    "PostgresServer",
    "RedisServer",
    "Services",
    "find_or_bring",
    "stop",
]

DIRECTORY: Final = Path(".services")
_ENV_FILE: Final = Path(".env")
_COMPOSE_FILE: Final = Path("docker-compose.yml")
_COMPOSE_SERVICES: Final = {"redis": 6379, "timescaledb": 5432}
_THREE_WAYS: Final = """\
No Redis and PostgreSQL with TimescaleDB. There are three ways to have them:
  1. name servers of your own in the environment or in .env:
     REDIS_HOST, REDIS_PORT, POSTGRES_HOST, POSTGRES_PORT, POSTGRES_USER, POSTGRES_PASSWORD
  2. start a Docker engine ({docker})
  3. be root on Debian or Ubuntu, for a private Debian under .services ({debian})"""


class NoServicesError(RuntimeError):
    """There are no servers and none can be brought; the message says what would help."""


@dataclass(frozen=True)
class Services:
    """Where Redis and PostgreSQL are."""

    how: str
    environment: dict[str, str]


def find_or_bring(say: Say, directory: Path = DIRECTORY) -> Services:
    """Find the servers, or bring them up; servers that run already are used as they are.

    Raises:
        NoServicesError: none of the three ways is open.
    """
    if named := named_servers():
        return Services("named in the environment", named)
    reasons = {}
    for name, bring in (("docker", _bring_compose), ("debian", _bring_debian)):
        try:
            return bring(say, directory)
        except (RootError, ServerError, _ClosedError) as error:
            if not isinstance(error, _ClosedError):
                say(f"{error}")
            reasons[name] = f"{error}".splitlines()[0]
    raise NoServicesError(_THREE_WAYS.format(**reasons))


def named_servers() -> dict[str, str]:
    """Give the settings of servers that the environment or `.env` names, where it names any.

    Naming one of the two says that both are the operator's own.
    """
    settings = {**dotenv_values(_ENV_FILE), **os.environ}
    if not (settings.get("REDIS_HOST") or settings.get("POSTGRES_HOST")):
        return {}
    return {
        name: value
        for name, value in settings.items()
        if name.startswith(("REDIS_", "POSTGRES_")) and value
    }


def stop(say: Say, directory: Path = DIRECTORY) -> None:
    """Stop what `find_or_bring` brought; the data stays."""
    root = directory / "root"
    for server in _servers(root, directory, password=None):
        if server.is_running:
            say(f"stopping {type(server).__name__.removesuffix('Server')}")
            server.stop()
    if docker_problem() is None and _compose("ps", "--quiet").stdout.strip():
        say("docker compose down")
        _compose("down")


class _ClosedError(Exception):
    """A way that is not open here."""


def docker_problem() -> str | None:
    """Give the reason why `docker compose` can not be used, or None where it can."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    try:
        for command in (["docker", "info"], ["docker", "compose", "version"]):
            if subprocess.run(command, capture_output=True, timeout=30, check=False).returncode:
                return f"`{' '.join(command)}` fails"
    except subprocess.TimeoutExpired:
        return "the engine does not answer"
    return None


def _compose(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", "compose", "--file", _COMPOSE_FILE, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )


def _bring_compose(say: Say, _: Path) -> Services:
    if problem := docker_problem():
        raise _ClosedError(problem)
    if not _COMPOSE_FILE.is_file():
        raise _ClosedError(f"there is no {_COMPOSE_FILE} here")
    say("docker compose up: Redis and TimescaleDB")
    # Its own progress goes to our standard error.
    if _compose("up", "--detach", "--wait", *_COMPOSE_SERVICES).returncode:
        raise _ClosedError("`docker compose up` fails")
    addresses = {
        name: _compose("port", name, str(port)).stdout.strip().rpartition(":")
        for name, port in _COMPOSE_SERVICES.items()
    }
    environment = {
        "REDIS_HOST": addresses["redis"][0],
        "REDIS_PORT": addresses["redis"][2],
        "POSTGRES_HOST": addresses["timescaledb"][0],
        "POSTGRES_PORT": addresses["timescaledb"][2],
        "POSTGRES_USER": "sluice",
        "POSTGRES_SSLMODE": "disable",
    }
    password = {**dotenv_values(_ENV_FILE), **os.environ}.get("POSTGRES_PASSWORD")
    return Services("docker compose", {**environment, "POSTGRES_PASSWORD": password or "sluice"})


def _bring_debian(say: Say, directory: Path) -> Services:
    if problem := why_not():
        raise _ClosedError(problem)
    root = ensure_root(directory, say)
    environment: dict[str, str] = {}
    with locked(directory / "servers.lock"):
        for server in _servers(root, directory, password=_password(directory)):
            if not server.is_running:
                say(f"starting {type(server).__name__.removesuffix('Server')}")
            server.start()
            environment |= server.environment
    return Services(f"a private Debian in {root}", environment)


def _servers(
    root: Path, directory: Path, *, password: str | None
) -> Iterator[RedisServer | PostgresServer]:
    for server, name in ((RedisServer, "redis"), (PostgresServer, "postgres")):
        yield server(root, directory / name, password=password, dies_with_parent=False)


def _password(directory: Path) -> str:
    """Give the password of the servers of this directory, made at first use."""
    path = directory / "password"
    if not path.exists():
        partial = directory / "password.partial"
        partial.touch(mode=0o600)
        partial.write_text(secrets.token_urlsafe(24), encoding="ascii")
        partial.rename(path)
    return path.read_text(encoding="ascii")
