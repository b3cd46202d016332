"""`sluice maintain` on both editions: late rows, closed days, chunks, columnstore, retention."""

import asyncio
import json
import secrets
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from redis.asyncio import Redis
from typer.testing import CliRunner, Result

from sluice.cli import app
from tests.integration.candles import Row, assert_candles_are_of, draw_trades, insert
from tests.integration.flusher_rig import drained, flushing, push, trade
from tests.servers import Database

DAY = timedelta(days=1)


class Maintenance:
    """The command, with settings that lead to one database."""

    def __init__(self, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.sign_in(dsn)

    def sign_in(self, dsn: str) -> None:
        parts = urlsplit(dsn)
        self.set(
            POSTGRES_HOST=str(parts.hostname),
            POSTGRES_PORT=str(parts.port),
            POSTGRES_USER=str(parts.username),
            POSTGRES_PASSWORD=parts.password or "",
            POSTGRES_DB=parts.path.removeprefix("/"),
            POSTGRES_SSLMODE="disable",
        )

    def set(self, **settings: str) -> None:
        for name, value in settings.items():
            self._monkeypatch.setenv(name, value)

    async def run(self, *options: str) -> list[tuple[str, str]]:
        """Run it; gives what was done to which table."""
        result = await self.invoke("--json", *options)
        assert result.exit_code == 0, result.output
        return [(step["what"], step["table"]) for step in json.loads(result.stdout)]

    async def invoke(self, *options: str) -> Result:
        # In a thread: the command has a loop of its own.
        return await asyncio.to_thread(CliRunner().invoke, app, ["maintain", *options])


@pytest.fixture
def maintenance(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Maintenance:
    return Maintenance(dsn, monkeypatch)


@pytest.fixture
def today() -> datetime:
    """Give the start of the day, but not just before the day ends or the last one is closed."""
    while True:
        now = datetime.now(tz=UTC)
        if now.hour not in {23, 0} or now.minute < 58:
            return now.replace(hour=0, minute=0, second=0, microsecond=0)
        time.sleep(1)


async def _is_community(connection: asyncpg.Connection) -> bool:
    return bool(
        await connection.fetchval("SELECT current_setting('timescaledb.license') = 'timescale'")
    )


async def _mark_late(connection: asyncpg.Connection, trades: list[Row]) -> None:
    """Do what the flusher does beside the trades."""
    for hour in {row["time"].replace(minute=0, second=0, microsecond=0) for row in trades}:
        times = [row["time"] for row in trades if hour <= row["time"] < hour + timedelta(hours=1)]
        await connection.execute(
            "INSERT INTO late_ranges (from_time, to_time, market_ids) VALUES ($1, $2, '{1,2}')",
            min(times),
            max(times),
        )


async def test_candles_follow_late_trades(
    database: asyncpg.Connection,
    maintenance: Maintenance,
    today: datetime,
) -> None:
    trades = draw_trades(1, start=today - 3 * DAY, hours=50)
    late = [row for row in trades if 7 <= (row["time"] - today + 3 * DAY) / DAY * 24 < 9][::2]
    await insert(database, "trades", [row for row in trades if row not in late])
    await database.execute("CALL refresh_candles('-infinity', 'infinity')")
    if await _is_community(database):
        await database.execute("SELECT compress_chunk(c) FROM show_chunks('trades') AS c")
    await insert(database, "trades", late)
    await _mark_late(database, late)

    planned = await maintenance.run("--dry-run")
    done = await maintenance.run()

    assert planned == done == [("candles of late trades", "candles")]
    await assert_candles_are_of(database, trades)
    assert await database.fetchval("SELECT count(*) FROM late_ranges") == 0
    assert await maintenance.run() == []


async def test_late_trades_of_one_market_leave_the_others_alone(
    database: asyncpg.Connection,
    maintenance: Maintenance,
    today: datetime,
) -> None:
    if await _is_community(database):
        pytest.skip("the Community edition refreshes what its own log names")
    trades = draw_trades(2, start=today - 2 * DAY, hours=5)
    await insert(database, "trades", trades)
    await maintenance.run()
    await database.execute("UPDATE candles_kept SET trade_count = 0, close = 1")
    await database.execute(
        "INSERT INTO late_ranges (from_time, to_time, market_ids)"
        " SELECT min(time), max(time), '{2}' FROM trades"
    )

    await maintenance.run()

    wrong = await database.fetch("SELECT DISTINCT market_id FROM candles_1m WHERE trade_count = 0")
    assert [row["market_id"] for row in wrong] == [1]


async def test_candles_are_kept_when_their_trades_are_dropped(
    database: asyncpg.Connection,
    maintenance: Maintenance,
    today: datetime,
) -> None:
    trades = draw_trades(3, start=today - 12 * DAY + DAY / 3, hours=100)
    await insert(database, "trades", trades)
    maintenance.set(RETENTION_DAYS="trades=10")
    steps = [("candles of closed days", "candles"), ("drop", "trades")]
    if await _is_community(database):
        steps = [("candles of all days", "candles"), ("retention", "trades")]

    assert await maintenance.run("--dry-run") == steps
    assert await database.fetchval("SELECT count(*) FROM trades") == len(trades)
    assert await maintenance.run() == steps

    if await _is_community(database):
        await database.execute(
            "SELECT drop_chunks('trades', older_than => (config ->> 'drop_after')::interval)"
            " FROM timescaledb_information.jobs WHERE proc_name = 'policy_retention'"
            " AND hypertable_name = 'trades'"
        )
        await database.execute("CALL refresh_candles('-infinity', 'infinity')")
    kept = [row for row in trades if row["time"] >= today - 10 * DAY]
    stored = await database.fetch("SELECT time FROM trades")
    assert len(kept) <= len(stored) < len(trades)
    await assert_candles_are_of(database, trades)
    assert await maintenance.run() == []


async def test_a_late_trade_of_a_dropped_day_spoils_no_candle(
    database: asyncpg.Connection,
    maintenance: Maintenance,
    today: datetime,
) -> None:
    if await _is_community(database):
        pytest.skip("the Community edition drops by its own jobs")
    trades = draw_trades(4, start=today - 12 * DAY, hours=30)
    await insert(database, "trades", trades)
    maintenance.set(RETENTION_DAYS="trades=5")
    await maintenance.run()
    assert await database.fetchval("SELECT count(*) FROM trades") == 0
    again = trades[:5]
    await insert(database, "trades", again)
    await _mark_late(database, again)

    assert await maintenance.run() == [("candles of late trades", "candles"), ("drop", "trades")]

    await assert_candles_are_of(database, trades)


async def test_every_table_can_be_given_its_retention_and_chunks(
    database: asyncpg.Connection,
    maintenance: Maintenance,
    today: datetime,
) -> None:
    for days in (1, 30):
        await database.execute(
            "INSERT INTO tickers (time, received_at, market_id, kind, last_price, open, high, low,"
            " volume, quote_volume) VALUES ($1, now(), 1, 'ticker', 1, 1, 1, 1, 1, 1)",
            today - days * DAY,
        )
    maintenance.set(RETENTION_DAYS="tickers=7", CHUNK_INTERVAL="trades=6h,klines=60d")
    last = ("retention" if await _is_community(database) else "drop", "tickers")

    steps = await maintenance.run()

    assert steps == [("chunk interval", "trades"), ("chunk interval", "klines"), last]
    intervals = await database.fetch(
        "SELECT hypertable_name::text AS name, time_interval"
        " FROM timescaledb_information.dimensions WHERE hypertable_schema = 'public'"
    )
    assert {row["name"]: row["time_interval"] for row in intervals} == {
        "trades": timedelta(hours=6),
        "orderbook_snapshots": DAY,
        "klines": 60 * DAY,
        "tickers": DAY,
    }
    if not await _is_community(database):
        assert await database.fetchval("SELECT count(*) FROM tickers") == 1
    assert await maintenance.run() == []


async def _policies(connection: asyncpg.Connection) -> dict[str, Any]:
    """Give what is refreshed and dropped of trades, and when chunks are compressed."""
    row = await connection.fetchrow(
        "SELECT max((config ->> 'drop_after')::interval) FILTER (WHERE hypertable_name = 'trades')"
        " AS drop_after, max((config ->> 'start_offset')::interval) AS start_offset,"
        " array_agg(DISTINCT (config ->> 'compress_after')::interval) FILTER ("
        " WHERE config ? 'compress_after') AS compress_after FROM timescaledb_information.jobs"
    )
    assert row is not None
    return dict(row)


async def test_a_refresh_starts_after_what_is_dropped(
    database: asyncpg.Connection, maintenance: Maintenance
) -> None:
    if not await _is_community(database):
        pytest.skip("the Apache edition has no policies")
    for days in (30, 2, 60):
        maintenance.set(RETENTION_DAYS=f"trades={days}", COLUMNSTORE_AFTER_DAYS="1")
        await maintenance.run()
        assert await _policies(database) == {
            "drop_after": days * DAY,
            "start_offset": (days - 1) * DAY,
            "compress_after": [DAY],
        }
        assert await maintenance.run() == []

    await database.execute(
        "SELECT alter_job(job_id, config => config || '{\"start_offset\": null}')"
        " FROM timescaledb_information.jobs WHERE config ->> 'start_offset' IS NOT NULL"
    )
    checked = await asyncio.to_thread(CliRunner().invoke, app, ["db", "check", "--json"])
    unsound = [row["what"] for row in json.loads(checked.stdout) if not row["is_sound"]]
    assert "candles and retention" in unsound
    assert await maintenance.run() == [("retention", "trades")]

    maintenance.set(RETENTION_DAYS="")
    await maintenance.run()
    policies = await _policies(database)
    assert (policies["drop_after"], policies["start_offset"]) == (None, None)


async def test_two_runs_at_once_do_not_disturb_each_other(
    database: asyncpg.Connection,
    maintenance: Maintenance,
    today: datetime,
) -> None:
    await _mark_late(database, draw_trades(5, start=today - 2 * DAY, hours=1))
    await database.execute("SELECT pg_advisory_lock(hashtext('sluice.maintain'))")

    result = await maintenance.invoke("--json")

    assert (result.exit_code, json.loads(result.stdout)) == (0, [])
    assert "another sluice maintain runs" in result.stderr
    await database.execute("SELECT pg_advisory_unlock(hashtext('sluice.maintain'))")
    assert len(await maintenance.run()) == 1


async def test_who_does_not_own_the_tables_is_told_so(
    database: asyncpg.Connection, maintenance: Maintenance
) -> None:
    member, password = f"sluice_test_{secrets.token_hex(6)}", secrets.token_hex(16)
    await database.execute(f"CREATE ROLE {member} LOGIN PASSWORD '{password}'")
    try:
        maintenance.set(POSTGRES_USER=member, POSTGRES_PASSWORD=password)
        refused = await maintenance.invoke()
        await database.execute(f"GRANT sluice_owner TO {member}")
        accepted = await maintenance.invoke()
    finally:
        await database.execute(f"DROP ROLE {member}")

    assert refused.exit_code == 2
    assert f"GRANT sluice_owner TO {member}" in refused.stderr
    assert accepted.exit_code == 0
    assert "nothing to do" in accepted.stdout


async def test_trades_can_not_be_dropped_before_their_candles_are_made(
    maintenance: Maintenance,
) -> None:
    maintenance.set(RETENTION_DAYS="1")

    result = await maintenance.invoke()

    assert result.exit_code == 2


async def test_an_older_schema_is_not_maintained(
    database: asyncpg.Connection, maintenance: Maintenance
) -> None:
    await database.execute("UPDATE schema_version SET version = 1")

    result = await maintenance.invoke()

    assert result.exit_code == 1
    assert "sluice db upgrade" in result.stderr


async def test_the_flusher_names_where_trades_came_in_late(
    redis_environment: dict[str, str],
    postgres: Database,
    redis: Redis,
    today: datetime,
) -> None:
    def at(trade_id: int, age: timedelta, symbol: str) -> bytes:
        moment = int((today - age).timestamp() * 1e6)
        return trade(trade_id, ts_event=moment, symbol=symbol)

    await push(
        redis,
        [
            trade(1, ts_event=int(datetime.now(tz=UTC).timestamp() * 1e6)),
            at(2, DAY, "BTCUSDT"),
            at(3, DAY - timedelta(minutes=5), "ETHUSDT"),
            at(4, 9 * DAY, "ETHUSDT"),
        ],
    )
    async with flushing({**redis_environment, **postgres.environment}):
        await drained(redis, "trade")

    connection = await asyncpg.connect(postgres.dsn)
    try:
        rows = await connection.fetch(
            "SELECT from_time, to_time, cardinality(market_ids) FROM late_ranges ORDER BY from_time"
        )
    finally:
        await connection.close()
    assert [tuple(row) for row in rows] == [
        (today - 9 * DAY, today - 9 * DAY, 1),
        (today - DAY, today - DAY + timedelta(minutes=5), 2),
    ]
