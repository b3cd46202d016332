"""The databases of tests that look at the schema itself, on both editions of TimescaleDB.

Such a test runs on the suite's server and, where `SLUICE_COMMUNITY_DSN` names a server of
the Community edition (a superuser's address of any of its databases), on that one too.
"""

import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import asyncpg
import pytest

from tests.conftest import Shared
from tests.servers import Database, execute, fresh_database, schema_template

JOBS_OFF = """
    DO $$ BEGIN
        IF current_setting('timescaledb.license') = 'timescale' THEN
            PERFORM alter_job(job_id, scheduled => false) FROM timescaledb_information.jobs;
        END IF;
    END $$
"""


@dataclass(frozen=True)
class Server:
    """Where databases are made, and which of them has the schema to copy."""

    administration: Database
    template: str


@pytest.fixture(scope="session")
def community() -> Iterator[Server]:
    """Give the server of the Community edition."""
    parts = urlsplit(os.environ["SLUICE_COMMUNITY_DSN"])
    administration = Database(
        parts.hostname or "",
        parts.port or 5432,
        unquote(parts.username or ""),
        unquote(parts.password or ""),
        parts.path.removeprefix("/"),
    )
    with schema_template(administration) as template:
        yield Server(administration, template)


@pytest.fixture(
    params=["suite", "community"] if "SLUICE_COMMUNITY_DSN" in os.environ else ["suite"]
)
def server(request: pytest.FixtureRequest) -> Server:
    """Give the suite's server, then the one of the Community edition."""
    if request.param == "suite":
        shared: Shared = request.getfixturevalue("shared")
        return Server(shared.administration, shared.template)
    community: Server = request.getfixturevalue("community")
    return community


@pytest.fixture
def blank(server: Server) -> Iterator[str]:
    """Give the address of a database with nothing in it."""
    with fresh_database(server.administration) as database:
        yield database.dsn


@pytest.fixture
def dsn(server: Server) -> Iterator[str]:
    """Give the address of a database with the schema, and with its background jobs off."""
    with fresh_database(server.administration, template=server.template) as database:
        execute(database, JOBS_OFF)
        yield database.dsn


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """Give a superuser's connection to that database."""
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()
