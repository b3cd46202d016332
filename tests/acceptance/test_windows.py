"""Streams without ids: what a dead collector missed is refilled or named."""

import asyncio
import json
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from sluice.clock import now_micros
from sluice.queue import STREAMS_COVERED
from tests.acceptance.completeness import fresh
from tests.acceptance.processes import Processes, processes
from tests.faults.waiting import eventually
from tests.servers import Database

SYMBOL = "BTCUSDT"
CANDLES = """
SELECT (extract(epoch FROM time) * 1000)::bigint, open::text, high::text, low::text, close::text,
       volume::text, trade_count
FROM klines WHERE interval = '1s' ORDER BY time
"""
GAPS = """
SELECT channel, status, cause, from_time, to_time FROM gaps WHERE channel = $1 ORDER BY from_time
"""


@pytest.fixture
def pipeline(
    tmp_path: Path, postgres: Database, redis_environment: dict[str, str]
) -> Iterator[Processes]:
    environment = {
        **redis_environment,
        **postgres.environment,
        "SYMBOLS": f"binance:{SYMBOL}",
        "STREAMS": "trade,kline_1s,ticker",
    }
    with processes(tmp_path, environment) as running:
        running.simulate("--rate", "50", "--symbols", SYMBOL)
        running.start("flusher")
        yield running


async def fetch(database: Database, query: str, *arguments: object) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(database.dsn)
    try:
        return list(await connection.fetch(query, *arguments))
    finally:
        await connection.close()


def published(running: Processes, since_ms: int) -> dict[int, tuple[Any, ...]]:
    """Give the exchange's own candles: time to prices, volume and count."""
    address = f"{running.simulator_url}/api/v3/klines?symbol={SYMBOL}&interval=1s&limit=1000"
    with urllib.request.urlopen(f"{address}&startTime={since_ms}", timeout=60) as answer:  # noqa: S310  # our own simulator on loopback
        return {row[0]: (*row[1:6], row[8]) for row in json.load(answer)}


async def candles_are_whole(running: Processes, database: Database) -> bool:
    rows = [tuple(row) for row in await fetch(database, CANDLES)]
    times = [row[0] for row in rows]
    if times != list(range(times[0], times[-1] + 1, 1000)):
        return False
    truth = await asyncio.to_thread(published, running, times[0])
    for row in rows:
        assert row[1:] == truth[row[0]]
    return True


async def settled(database: Database, channel: str) -> list[asyncpg.Record]:
    """Wait until a window of a stream is named and none is open."""

    async def is_settled() -> bool:
        gaps = await fetch(database, GAPS, channel)
        return bool(gaps) and all(gap["status"] != "open" for gap in gaps)

    await eventually(is_settled)
    return await fetch(database, GAPS, channel)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", ["", "candles.page_read", "candles.page_pushed"])
async def test_what_a_dead_collector_missed_is_refilled_or_named(
    point: str, pipeline: Processes, postgres: Database, redis: Redis
) -> None:
    pipeline.start("collector")
    await fresh(postgres.dsn, 0)

    async def is_noted() -> bool:
        return await redis.hlen(STREAMS_COVERED) == 2

    await eventually(is_noted)
    pipeline.kill("collector")
    await asyncio.sleep(3)
    if point:
        armed = {"SLUICE_TESTING": "1", "SLUICE_FAILPOINT": f"{point}:1"}
        process = pipeline.start("collector", "", None, **armed)
        await eventually(lambda: process.poll() is not None)
        assert process.returncode == -signal.SIGKILL
        del pipeline.running["collector"]
    restarted = now_micros()
    pipeline.start("collector")
    await fresh(postgres.dsn, restarted)
    candles = await settled(postgres, "kline_1s")
    assert {gap["status"] for gap in candles} == {"filled"}
    await eventually(lambda: candles_are_whole(pipeline, postgres))
    tickers = await settled(postgres, "ticker")
    assert {gap["status"] for gap in tickers} == {"lost"}
    assert all(gap["from_time"] < gap["to_time"] for gap in tickers)
