"""What the flusher says of a server before it trusts rows to it: a clear line for each fault."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from loguru import logger

from flusher.checks import UnfitDatabaseError, check
from flusher.tables import TABLES
from flusher.writer import Writer
from sluice.cli.servers import PostgresServer
from sluice.settings import Settings
from tests.conftest import Shared
from tests.servers import SCHEMA, Database, database_of, execute, fresh_database


@asynccontextmanager
async def connected(database: Database) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database.dsn)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Give what is logged from WARNING on."""
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    yield lines
    logger.remove(sink)


async def test_a_database_without_timescaledb_or_schema_is_refused(shared: Shared) -> None:
    with fresh_database(shared.administration) as blank:
        async with connected(blank) as connection:
            with pytest.raises(UnfitDatabaseError, match="TimescaleDB is not in this database"):
                await check(connection)

            await connection.execute("CREATE EXTENSION timescaledb")

            with pytest.raises(UnfitDatabaseError, match="no schema: run `sluice db init`"):
                await check(connection)


async def test_a_schema_of_another_version_is_refused(postgres: Database) -> None:
    async with connected(postgres) as connection:
        await connection.execute("UPDATE schema_version SET version = 1")
        with pytest.raises(UnfitDatabaseError, match="run `sluice db upgrade`"):
            await check(connection)

        await connection.execute("UPDATE schema_version SET version = 99")
        with pytest.raises(UnfitDatabaseError, match=r"version 99.*upgrade this flusher"):
            await check(connection)


async def test_an_old_timescaledb_is_refused(
    postgres: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flusher.checks.LEAST_TIMESCALEDB", (99, 0, 0))

    async with connected(postgres) as connection:
        with pytest.raises(UnfitDatabaseError, match=r"TimescaleDB \S+ is too old: 2\.19 or later"):
            await check(connection)


async def test_every_setting_that_loses_rows_has_its_line(root: Path, warnings: list[str]) -> None:
    off = ("fsync", "full_page_writes", "synchronous_commit")
    with tempfile.TemporaryDirectory(prefix="sluice-test-") as directory:
        server = PostgresServer(root, Path(directory), options=dict.fromkeys(off, "off"))
        try:
            server.start()
            server.create_database("sluice")
            database = database_of(server, "sluice")
            execute(database, SCHEMA)

            async with connected(database) as connection:
                await check(connection)

            assert len(warnings) == len(off)
            for setting in off:
                assert [line for line in warnings if f"with {setting} off" in line]
            await _assert_a_writer_waits_for_the_disk(database)
        finally:
            server.kill()


async def _assert_a_writer_waits_for_the_disk(database: Database) -> None:
    values = {name.lower(): value for name, value in database.environment.items()}
    settings = Settings.model_validate(values)
    writer = await Writer.open(settings, TABLES["trade"])
    try:
        setting = await writer._connection.fetchval("SHOW synchronous_commit")  # noqa: SLF001  # no other sees it
    finally:
        writer.close()
    assert setting == "on"


async def test_a_sound_server_has_no_line(postgres: Database, warnings: list[str]) -> None:
    async with connected(postgres) as connection:
        await check(connection)
        fsync = await connection.fetchval("SHOW fsync")

    # The tests' own server may run without fsync, and a named one be of a version with a fault.
    lines = [line for line in warnings if not line.startswith("TimescaleDB")]
    assert [line for line in lines if "fsync" not in line or fsync == "on"] == []
