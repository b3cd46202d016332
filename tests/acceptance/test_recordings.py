"""Recorded days through real sockets, Redis and TimescaleDB, compared with the oracles.

The oracles were computed apart from any pipeline, with exact decimals. Where the recordings are
absent the same is done with the small one of the simulated market that is committed here.
"""

import asyncio
import json
import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from sluice.cli.audit import certify
from sluice.queue import RecordQueue
from sluice.settings import Market
from tests.acceptance.processes import CEILING, ROOT, processes, wait_until
from tests.servers import Database

RECORDINGS = ROOT.parent / "shared" / "recordings"
REPLAY_CEILING = 240.0

BARS = """
SELECT extract(epoch FROM time)::bigint * 1000 AS t, open, high, low, close, volume, trade_count
FROM candles_1m WHERE market_id = market($1, $2) ORDER BY time
"""
TOTALS = """
SELECT count(*) AS count, min(trade_id) AS first_id, max(trade_id) AS last_id,
       sum(quantity) AS sum_qty, sum(price * quantity) AS sum_px_qty,
       count(*) FILTER (WHERE side = 'sell') AS buyer_is_maker,
       (extract(epoch FROM min(time)) * 1000)::bigint AS first_t,
       (extract(epoch FROM max(time)) * 1000)::bigint AS last_t
FROM trades WHERE market_id = market($1, $2)
"""
LAST_BOOK = """
SELECT update_id, bid_prices, bid_sizes, ask_prices, ask_sizes FROM orderbook_snapshots
WHERE market_id = market($1, $2) ORDER BY time DESC LIMIT 1
"""


def cases() -> list[Any]:
    """Name the recordings there are: files, symbol, oracle."""
    spot = RECORDINGS / "binance-spot"
    if not spot.is_dir():
        data = ROOT / "tests" / "data"
        print("the recordings are absent: replaying the committed one")  # pytest -s
        return [
            pytest.param(
                [data / f"simulated_{symbol}.gz"],
                symbol.upper(),
                data / "simulated.json",
                id=f"simulated-{symbol}",
            )
            for symbol in ("btcusdt", "nexousdt")
        ]
    oracles = RECORDINGS / "oracles"
    return [
        pytest.param(
            sorted(spot.glob("nexousdt_*")),
            "NEXOUSDT",
            oracles / "binance-spot_nexousdt_day1-2.json",
            id="nexousdt-day",
        ),
        pytest.param(
            sorted(spot.glob("spot_btcusdt_*")),
            "BTCUSDT",
            oracles / "binance-spot_btcusdt.json",
            id="btcusdt",
        ),
    ]


async def matches(connection: asyncpg.Connection, symbol: str, oracle: dict[str, Any]) -> None:
    """Compare totals, every bar and the last book with the oracle, exactly."""
    expected = oracle["trade"]
    totals = await connection.fetchrow(TOTALS, "binance", symbol)
    assert totals is not None
    assert (totals["count"], totals["first_id"], totals["last_id"]) == (
        expected["count"],
        expected["first_id"],
        expected["last_id"],
    )
    assert totals["sum_qty"] == Decimal(expected["sum_qty"])
    assert totals["sum_px_qty"] == Decimal(expected["sum_px_qty"])
    assert totals["buyer_is_maker"] == expected["buyer_is_maker"]
    assert (totals["first_t"], totals["last_t"]) == (expected["first_T"], expected["last_T"])

    bars = [tuple(row) for row in await connection.fetch(BARS, "binance", symbol)]
    assert bars == [
        (t, Decimal(o), Decimal(h), Decimal(low), Decimal(c), Decimal(v), n)
        for t, o, h, low, c, v, n in expected["bars_1m_MARKET_only"]
    ]

    book = await connection.fetchrow(LAST_BOOK, "binance", symbol)
    assert book is not None
    assert book["update_id"] == oracle["book"]["last_u"]
    for side, kind in (("bid", "bids"), ("ask", "asks")):
        stored = list(zip(book[f"{side}_prices"], book[f"{side}_sizes"], strict=True))
        assert stored == [(Decimal(p), Decimal(s)) for p, s in oracle["book"][f"top20_{kind}"]]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("files", "symbol", "oracle_path"), cases())
async def test_a_recorded_day_is_stored_exactly_though_the_flusher_is_killed(
    files: list[Path],
    symbol: str,
    oracle_path: Path,
    tmp_path: Path,
    postgres: Database,
    redis: Redis,
    redis_environment: dict[str, str],
) -> None:
    oracle = json.loads(oracle_path.read_text())["symbols"][symbol]
    stream = symbol.lower()
    environment = {**redis_environment, **postgres.environment, "SYMBOLS": f"binance:{symbol}"}
    queues = [RecordQueue(redis, kind) for kind in ("trade", "orderbook_snapshot")]
    with processes(tmp_path, environment) as running:
        running.simulate(
            "--speed",
            "0",
            "--start-when",
            f"{stream}@trade,{stream}@depth@100ms",
            *(word for path in files for word in ("--recording", str(path))),
        )
        for module in ("collector", "orderbook", "flusher"):
            running.start(module)
        began = time.monotonic()
        for kills in (1, 2, 3):
            await stored_at_least(postgres.dsn, kills * oracle["trade"]["count"] // 5)
            running.kill("flusher")
            running.start("flusher")
        wait_until(
            lambda: running.control("status")["source"] == "finished",
            "the replay's end",
            REPLAY_CEILING,
        )
        connection = await asyncpg.connect(postgres.dsn)
        try:
            await last_book_is(connection, symbol, oracle["book"]["last_u"])
            for module in ("collector", "orderbook"):
                assert running.terminate(module) == 0
            await empty(queues)
            assert running.terminate("flusher") == 0
            print(f"{symbol}: replayed and stored in {time.monotonic() - began:.1f} s")  # pytest -s
            await matches(connection, symbol, oracle)
            await is_certified(connection, symbol, oracle)
            assert await connection.fetchval("SELECT count(*) FROM gaps WHERE status = 'open'") == 0
        finally:
            await connection.close()
    for queue in queues:
        balance = await queue.balance()
        assert balance.is_exact
        assert (balance.length, balance.dead) == (0, 0)


async def is_certified(connection: asyncpg.Connection, symbol: str, oracle: dict[str, Any]) -> None:
    """See the audit find every day complete, and, with one row deleted by hand, that row's id."""
    market = Market("binance", symbol)
    always = (datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC))
    whole = await certify(connection, market, *always)
    assert sum(day["expected"] for day in whole) == oracle["trade"]["count"]
    assert sum(day["stored"] for day in whole) == oracle["trade"]["count"]
    faults = ("unexplained", "duplicates", "klines_different", "book_levels_different")
    assert not any(day[fault] for day in whole for fault in faults)
    victim = (oracle["trade"]["first_id"] + oracle["trade"]["last_id"]) // 2
    by_hand = connection.transaction()
    await by_hand.start()
    await connection.execute("DELETE FROM trades WHERE trade_id = $1", victim)
    holed = await certify(connection, market, *always)
    await by_hand.rollback()
    assert [day["unexplained_ids"] for day in holed if day["unexplained"]] == [str(victim)]


async def stored_at_least(dsn: str, count: int) -> None:
    """Wait until so many trades are stored."""
    connection = await asyncpg.connect(dsn)
    try:
        deadline = time.monotonic() + REPLAY_CEILING
        while await connection.fetchval("SELECT count(*) FROM trades") < count:
            assert time.monotonic() < deadline, f"{count} trades were not stored"
            await asyncio.sleep(0.1)
    finally:
        await connection.close()


async def last_book_is(connection: asyncpg.Connection, symbol: str, update_id: int) -> None:
    """Wait until the book after the last change is stored."""
    deadline = time.monotonic() + CEILING
    while True:
        book = await connection.fetchrow(LAST_BOOK, "binance", symbol)
        if book is not None and book["update_id"] == update_id:
            return
        assert time.monotonic() < deadline, f"the last book is {book and book['update_id']}"
        await asyncio.sleep(0.1)


async def empty(queues: list[RecordQueue]) -> None:
    """Wait until the queues are."""
    deadline = time.monotonic() + CEILING
    while any([await queue.length() for queue in queues]):
        assert time.monotonic() < deadline, "the queues did not drain"
        await asyncio.sleep(0.1)
