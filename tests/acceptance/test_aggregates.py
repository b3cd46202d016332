"""Trades that the exchange serves within aggregates only: stored, never lost, never twice."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import pytest
from redis.asyncio import Redis

from sluice.cli.audit import certify
from sluice.cli.backfill import reopen
from sluice.clock import now_micros
from sluice.queue import Holes, head_field
from sluice.settings import Market
from tests.acceptance.completeness import account, complete, fresh
from tests.acceptance.processes import processes
from tests.faults.waiting import eventually
from tests.servers import Database

SYMBOL = "BTCUSDT"
BEGINNING, END = datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
GAPS = "SELECT cause, status FROM gaps WHERE channel = 'trade'"


async def fetch(database: Database, query: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(database.dsn)
    try:
        return list(await connection.fetch(query))
    finally:
        await connection.close()


@pytest.mark.timeout(300)
async def test_ids_no_longer_served_one_by_one_are_stored_as_aggregates(
    tmp_path: Path, postgres: Database, redis: Redis, redis_environment: dict[str, str]
) -> None:
    environment = {**redis_environment, **postgres.environment, "SYMBOLS": f"binance:{SYMBOL}"}
    with processes(tmp_path, environment) as running:
        running.simulate("--rate", "200", "--symbols", SYMBOL)
        running.start("flusher")
        running.start("collector")
        await fresh(postgres.dsn, 0)
        first = min((await account(postgres.dsn, running, SYMBOL)).stored)
        running.control("retire", {"symbol": SYMBOL, "from_id": first, "to_id": first + 20_000})
        # Single fills, which leave an aggregate in part, and then all of a second and more.
        running.control("rates", {"rates": {"drop": 0.05}, "seed": 3})
        await asyncio.sleep(2)
        running.kill("collector")
        await asyncio.sleep(1.5)
        restarted = now_micros()
        running.start("collector")
        await fresh(postgres.dsn, restarted)
        await complete(postgres.dsn, running, [SYMBOL], {SYMBOL: first})
        gaps = await fetch(postgres, GAPS)
        # Asked for by hand, what is held is told from what is not, and stays as it is.
        held = max((await account(postgres.dsn, running, SYMBOL, first=first)).stored)
        market = Market("binance", SYMBOL)
        await reopen(redis, market, first, held, is_awaited=False)
        holes = Holes(redis, head_field("binance", SYMBOL, "trade"))

        async def is_filled() -> bool:
            return not await holes.read()

        await eventually(is_filled)
        await complete(postgres.dsn, running, [SYMBOL], {SYMBOL: first})
    connection = await asyncpg.connect(postgres.dsn)
    try:
        certificates = await certify(connection, None, BEGINNING, END)
        aggregates = await connection.fetchval(
            "SELECT count(*) FROM trades WHERE first_id < trade_id"
        )
    finally:
        await connection.close()
    assert aggregates > 0, "inconclusive: no aggregate was needed"
    filled = [gap["cause"] for gap in gaps if gap["status"] == "filled"]
    assert filled
    assert [cause for cause in filled if "stored as aggregates" not in cause] == []
    assert all("quantity is in the row" in g["cause"] for g in gaps if g["status"] == "lost")
    assert {gap["status"] for gap in gaps} <= {"filled", "lost"}
    for certificate in certificates:
        assert (certificate["unexplained"], certificate["duplicates"]) == (0, 0)
        assert certificate["stored"] + certificate["lost"] == certificate["expected"]
