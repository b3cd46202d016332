"""Real servers for tests: shared ones with a namespace a test, and private ones to break.

The servers are found as `make run` finds them: named in the environment, `docker compose`, or out
of a private Debian root. In the last case each session has servers of its own on data of its own.
"""

import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from sluice.cli.debian import ensure_root, why_not
from sluice.cli.servers import PostgresServer, RedisServer
from sluice.cli.services import docker_problem, find_or_bring, named_servers
from tests.servers import SCHEMA, Database, database_of, execute, fresh_database, schema_template

SERVICES = Path(__file__).resolve().parents[1] / ".services"


@dataclass(frozen=True)
class Shared:
    """The servers that all tests share."""

    redis: dict[str, str]
    administration: Database
    template: str


def _say(line: str) -> None:
    sys.__stderr__.write(f"{line}\n")  # type: ignore[union-attr]  # progress is not captured
    sys.__stderr__.flush()  # type: ignore[union-attr]


@contextmanager
def _directory() -> Iterator[Path]:
    """Make a directory for a server's data and remove it, which pytest's own would not do."""
    path = Path(tempfile.mkdtemp(prefix="sluice-test-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture(scope="session")
def root() -> Path:
    """Give the private Debian root that holds the servers' programs."""
    if problem := why_not():
        pytest.skip(f"tests that break servers need a private Debian: {problem}")
    return ensure_root(SERVICES, _say)


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    """Bring the servers that all tests share."""
    with ExitStack() as stack:
        if named_servers() or docker_problem() is None or why_not() is not None:
            environment = find_or_bring(_say, SERVICES).environment
            administration = Database(
                environment.get("POSTGRES_HOST", "127.0.0.1"),
                int(environment.get("POSTGRES_PORT", "5432")),
                environment.get("POSTGRES_USER", "sluice"),
                environment.get("POSTGRES_PASSWORD", ""),
                environment.get("POSTGRES_DB", "postgres"),
            )
            redis = _empty_redis_database(environment)
        else:
            root = request.getfixturevalue("root")
            directory = stack.enter_context(_directory())
            # Nothing here outlives the session, so it need not outlive a power cut.
            postgres = PostgresServer(root, directory / "postgres", options={"fsync": "off"})
            server = RedisServer(root, directory / "redis")
            for started in (postgres, server):
                stack.callback(started.stop)
                started.start()
            administration = database_of(postgres)
            redis = {**server.environment, "REDIS_DB": "0"}
        template = stack.enter_context(schema_template(administration))
        yield Shared(redis, administration, template)


def _empty_redis_database(environment: dict[str, str]) -> dict[str, str]:
    """Find a database of somebody's Redis that holds nothing, for tests empty it."""
    for number in range(15, 0, -1):
        settings = {
            **{name: value for name, value in environment.items() if name.startswith("REDIS_")},
            "REDIS_DB": str(number),
        }
        with BlockingRedis.from_url(_redis_url(settings)) as client:
            if client.dbsize() == 0:
                return settings
    pytest.exit("the named Redis has no empty database among 1 to 15 for the tests", returncode=1)


def _redis_url(environment: dict[str, str]) -> str:
    user = quote(environment.get("REDIS_USERNAME", ""), safe="")
    password = quote(environment.get("REDIS_PASSWORD", ""), safe="")
    access = f"{user}:{password}@" if password else ""
    host = environment.get("REDIS_HOST", "127.0.0.1")
    port = environment.get("REDIS_PORT", "6379")
    return f"redis://{access}{host}:{port}/{environment['REDIS_DB']}"


@pytest.fixture
def redis_environment(shared: Shared) -> Iterator[dict[str, str]]:
    """Give the settings that lead a process to an empty Redis database."""
    with BlockingRedis.from_url(_redis_url(shared.redis)) as client:
        client.flushdb()
        yield shared.redis
        client.flushdb()


@pytest.fixture
def redis_url(redis_environment: dict[str, str]) -> str:
    """Give the address of the same empty Redis database."""
    return _redis_url(redis_environment)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """Give a client of the same empty Redis database, with the library's retries off."""
    # With a timeout, Python 3.11 may lose a cancellation that comes while a command is sent.
    client = Redis.from_url(redis_url, retry=Retry(NoBackoff(), 0), socket_timeout=None)
    yield client
    await client.aclose()


@pytest.fixture
def postgres(shared: Shared) -> Iterator[Database]:
    """Give a database of the test's own with the schema applied."""
    with fresh_database(shared.administration, template=shared.template) as database:
        yield database


@pytest.fixture
def private_redis(root: Path) -> Iterator[RedisServer]:
    """Give a running Redis of the test's own, to kill, freeze and restart."""
    with _directory() as directory:
        server = RedisServer(root, directory)
        try:
            server.start()
            yield server
        finally:
            server.kill()


@pytest.fixture
def private_postgres(root: Path) -> Iterator[PostgresServer]:
    """Give a running PostgreSQL of the test's own, to kill, freeze and restart."""
    with _directory() as directory:
        server = PostgresServer(root, directory)
        try:
            server.start()
            yield server
        finally:
            server.kill()


@pytest.fixture
def private_database(private_postgres: PostgresServer) -> Database:
    """Give a database with the schema on the private PostgreSQL."""
    private_postgres.create_database("sluice")
    database = database_of(private_postgres, "sluice")
    execute(database, SCHEMA)
    return database
