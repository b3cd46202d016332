"""An older database is brought up to what a fresh one is, under its writers, on both editions."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from redis.asyncio import Redis

from sluice import schema
from sluice.schema import SCHEMA_VERSION, Migration, SchemaError, read_migrations, upgrade
from tests.faults.waiting import eventually
from tests.integration.conftest import Server
from tests.integration.flusher_rig import drained, flushing, push, trade
from tests.servers import SCHEMA, fresh_database

FIRST_SCHEMA = (Path(__file__).resolve().parents[1] / "data" / "schema-v1.sql").read_text()
CATALOGUE = """
    SELECT 'column' AS kind, attrelid::regclass::text AS name, attnum::text AS place,
        format(
            '%s %s %s %s %s', attname, format_type(atttypid, atttypmod), attnotnull, attidentity,
            (SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef
            WHERE adrelid = attrelid AND adnum = attnum)) AS detail
    FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
    WHERE relnamespace = 'public'::regnamespace AND attnum > 0
    UNION ALL
    SELECT 'relation', oid::regclass::text, relkind::text,
        format('%s %s %s', relowner::regrole, relacl, reloptions)
    FROM pg_class WHERE relnamespace = 'public'::regnamespace
    UNION ALL
    SELECT 'constraint', conrelid::regclass::text, conname::text, pg_get_constraintdef(oid)
    FROM pg_constraint WHERE connamespace = 'public'::regnamespace
    UNION ALL
    SELECT 'index', tablename::text, indexname::text, indexdef FROM pg_indexes
    WHERE schemaname = 'public'
    UNION ALL
    SELECT 'view', viewname::text, viewowner::text, definition FROM pg_views
    WHERE schemaname = 'public'
    UNION ALL
    SELECT 'function', oid::regprocedure::text, proowner::regrole::text,
        format('%s %s', proacl, pg_get_functiondef(oid))
    FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prokind IN ('f', 'p')
        AND NOT EXISTS (
            SELECT FROM pg_depend WHERE objid = pg_proc.oid AND deptype = 'e')
    UNION ALL
    SELECT 'hypertable', hypertable_name::text, compression_enabled::text, time_interval::text
    FROM timescaledb_information.hypertables
    JOIN timescaledb_information.dimensions USING (hypertable_schema, hypertable_name)
    WHERE hypertable_schema = 'public'
    UNION ALL
    SELECT 'job', hypertable_name::text, proc_name::text,
        format('%s %s', schedule_interval, config - 'hypertable_id' - 'mat_hypertable_id')
    FROM timescaledb_information.jobs WHERE hypertable_name IS NOT NULL
    ORDER BY 1, 2, 3, 4
"""
TRADE = (
    "INSERT INTO trades (market_id, time, trade_id, first_id, price, quantity, side, received_at)"
    " VALUES (1, now(), {0}, {0}, 2, 3, 'buy', now()) ON CONFLICT DO NOTHING"
)


@pytest.fixture
def old(server: Server) -> Iterator[str]:
    """Give the address of a database for the first version's schema."""
    with fresh_database(server.administration) as database:
        yield database.dsn


async def _make_old(connection: asyncpg.Connection) -> None:
    await connection.execute(FIRST_SCHEMA)
    await connection.execute(TRADE.format(1))


async def test_an_upgraded_database_is_a_fresh_one(old: str, blank: str) -> None:
    upgraded, fresh = await asyncpg.connect(old), await asyncpg.connect(blank)
    said: list[str] = []
    try:
        await _make_old(upgraded)

        await upgrade(upgraded, said.append)
        await upgrade(fresh, said.append)

        assert said == [
            *(f"applied migration {m.version:04}-{m.name}" for m in read_migrations()),
            f"made the schema, version {SCHEMA_VERSION}",
        ]
        assert await upgraded.fetch(CATALOGUE) == await fresh.fetch(CATALOGUE)
        assert await upgraded.fetchval("SELECT count(*) FROM candles_1m") == 1
    finally:
        await upgraded.close()
        await fresh.close()


async def test_a_second_upgrade_has_nothing_to_do(database: asyncpg.Connection) -> None:
    said: list[str] = []
    before = await database.fetch(CATALOGUE)

    await upgrade(database, said.append)

    assert said == []
    assert await database.fetch(CATALOGUE) == before


async def test_upgrades_at_once_apply_each_migration_once(old: str) -> None:
    connections = [await asyncpg.connect(old) for _ in range(3)]
    said: list[str] = []
    try:
        await _make_old(connections[0])

        await asyncio.gather(*(upgrade(connection, said.append) for connection in connections))

        assert len(said) == len(read_migrations())
    finally:
        for connection in connections:
            await connection.close()


async def test_an_upgrade_does_not_wait_for_a_writer(old: str) -> None:
    connection, writer = await asyncpg.connect(old), await asyncpg.connect(old)
    try:
        await _make_old(connection)
        async with writer.transaction():
            await writer.execute(TRADE.format(2))

            await upgrade(connection, print)

            await writer.execute(TRADE.format(3))
        assert await connection.fetchval("SELECT count(*) FROM trades") == 3
    finally:
        await connection.close()
        await writer.close()


async def test_a_newer_flusher_waits_for_the_upgrade_and_goes_on(
    old: str, redis_environment: dict[str, str], redis: Redis
) -> None:
    parts = urlsplit(old)
    environment = {
        "POSTGRES_HOST": str(parts.hostname),
        "POSTGRES_PORT": str(parts.port),
        "POSTGRES_USER": str(parts.username),
        "POSTGRES_PASSWORD": parts.password or "",
        "POSTGRES_DB": parts.path.removeprefix("/"),
        "POSTGRES_SSLMODE": "disable",
    }
    connection = await asyncpg.connect(old)
    try:
        await _make_old(connection)
        await push(redis, [trade(number) for number in range(2, 100)])
        async with flushing({**redis_environment, **environment}) as flusher:
            await eventually(
                lambda: any(
                    "run `sluice db upgrade`" in reason for reason in flusher.process.health.reasons
                )
            )

            await upgrade(connection, print)

            await drained(redis, "trade")
        assert await connection.fetchval("SELECT count(*) FROM trades") == 99
    finally:
        await connection.close()


async def test_an_older_schema_is_not_stamped_by_the_newer_file(old: str) -> None:
    connection = await asyncpg.connect(old)
    try:
        await _make_old(connection)

        with pytest.raises(asyncpg.RaiseError, match="at version 1") as refusal:
            await connection.execute(SCHEMA)

        assert refusal.value.hint == "Run: sluice db upgrade"
    finally:
        await connection.close()


async def test_a_newer_database_is_refused(database: asyncpg.Connection) -> None:
    await database.execute("INSERT INTO schema_version (version) VALUES (1000)")

    with pytest.raises(SchemaError, match="at version 1000"):
        await upgrade(database, print)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the only migration one that needs a lock, and its attempts short."""
    text = "LOCK TABLE trades; CREATE TABLE locked ()"
    monkeypatch.setattr(schema, "read_migrations", lambda: [Migration(2, "locks", text)])
    monkeypatch.setattr(schema, "_LOCK_TIMEOUT", "50ms")
    monkeypatch.setattr(schema, "_PAUSE_SECONDS", 0.05)


@pytest.mark.usefixtures("impatient")
async def test_a_migration_that_gets_no_lock_changes_nothing_and_holds_nobody_up(old: str) -> None:
    connection, writer = await asyncpg.connect(old), await asyncpg.connect(old)
    try:
        await _make_old(connection)
        async with writer.transaction():
            await writer.execute(TRADE.format(2))

            with pytest.raises(SchemaError, match="0002-locks got no lock"):
                await upgrade(connection, print)

            await writer.execute(TRADE.format(3))
        assert await connection.fetchval("SELECT max(version) FROM schema_version") == 1
        assert await connection.fetchval("SELECT to_regclass('locked')") is None
    finally:
        await connection.close()
        await writer.close()


@pytest.mark.usefixtures("impatient")
async def test_a_migration_is_tried_again_until_it_gets_its_lock(
    old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "_ATTEMPTS", 10_000)
    connection, writer = await asyncpg.connect(old), await asyncpg.connect(old)
    try:
        await _make_old(connection)
        transaction = writer.transaction()
        await transaction.start()
        await writer.execute(TRADE.format(2))
        # schema.sql is of another version than this migration leaves behind.
        monkeypatch.setattr(schema, "read_schema", lambda: "SELECT 1")

        upgrading = asyncio.create_task(upgrade(connection, print))
        await asyncio.sleep(0.2)  # some attempts; with none of them the test shows less, not more
        assert not upgrading.done()
        await transaction.commit()
        await upgrading

        assert await connection.fetchval("SELECT to_regclass('locked')") is not None
    finally:
        await connection.close()
        await writer.close()
