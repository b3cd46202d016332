"""Streams without ids: what a dead collector missed is refilled or named."""

import asyncio
import json
import signal
import sys
import time
import urllib.request
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from sluice.clock import now_micros
from sluice.queue import STREAMS_COVERED
from tests.acceptance.completeness import fresh
from tests.acceptance.processes import CEILING, Processes, processes
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
async def test_what_a_dead_collector_missed_is_refilled_or_named(
    pipeline: Processes, postgres: Database, redis: Redis
) -> None:
    pipeline.start("collector")
    await fresh(postgres.dsn, 0)

    async def is_noted() -> bool:
        return await redis.hlen(STREAMS_COVERED) == 2

    await eventually(is_noted)
    pipeline.kill("collector")
    await asyncio.sleep(3)
    for point in ("candles.page_read", "candles.page_pushed"):
        armed = {"SLUICE_TESTING": "1", "SLUICE_FAILPOINT": f"{point}:1"}
        process = pipeline.start("collector", "", None, **armed)
        assert await asyncio.to_thread(process.wait, CEILING) == -signal.SIGKILL
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


async def backfill(running: Processes, *arguments: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from sluice.cli import main; main()", "backfill"),
        *(f"binance:{SYMBOL}", *arguments, "--json"),
        env=running.environment,
        stdout=PIPE,
        stderr=PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, err.decode()
    (row,) = json.loads(out)
    assert isinstance(row, dict)
    return row


@pytest.mark.timeout(300)
async def test_history_is_fetched_by_time(pipeline: Processes, postgres: Database) -> None:
    await asyncio.sleep(4)  # a history that nobody recorded
    pipeline.start("collector")
    await fresh(postgres.dsn, 0)
    first_id, _ = pipeline.control(f"truth?symbol={SYMBOL}")["ids"]
    since = datetime.fromtimestamp(time.time() - 120, UTC).isoformat()
    until = datetime.fromtimestamp(time.time(), UTC).isoformat()
    row = await backfill(pipeline, "--from", since, "--to", until)
    assert (row["from_id"], row["left"]) == (first_id, 0)
    stored = "SELECT min(first_id), count(*), sum(trade_id - first_id + 1) FROM trades"
    whole = [(first_id, row["to_id"] - first_id + 1)]

    async def has_history() -> bool:
        found = await fetch(postgres, f"{stored} WHERE trade_id <= {row['to_id']}")
        return [(found[0][0], found[0][2])] == whole

    await eventually(has_history)
    row = await backfill(pipeline, "--from", since, "--to", until, "--stream", "kline_1s")
    assert row["left"] == 0
    opened = min(await asyncio.to_thread(published, pipeline, 0))

    async def begins() -> bool:
        found = await fetch(postgres, CANDLES)
        return bool(found) and found[0][0] == opened

    await eventually(begins)
    await eventually(lambda: candles_are_whole(pipeline, postgres))
