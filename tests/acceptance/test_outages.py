"""The database goes away under a steady stream, a record is poison, a process is told to stop."""

import asyncio
import time
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from sluice import records
from sluice.cli.servers import PostgresServer
from sluice.queue import RecordQueue
from sluice.records import Trade
from tests.acceptance.processes import CEILING, processes, wait_until
from tests.servers import Database

OUTAGE_SECONDS = 20.0
SYMBOLS = "BTCUSDT,ETHUSDT"


async def value(dsn: str, query: str) -> Any:  # whatever the query gives
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def until(condition: Any, what: str) -> float:  # an async function
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < CEILING, f"not within {CEILING:.0f} s: {what}"
        await asyncio.sleep(0.1)
    return time.monotonic() - began


@pytest.mark.timeout(300)
async def test_nothing_is_lost_while_postgresql_is_stopped_for_20_s_at_500_trades_a_second(
    tmp_path: Path,
    private_postgres: PostgresServer,
    private_database: Database,
    redis: Redis,
    redis_environment: dict[str, str],
) -> None:
    server, dsn = private_postgres, private_database.dsn
    queue = RecordQueue(redis, "trade")
    environment = {
        **redis_environment,
        **private_database.environment,
        "SYMBOLS": ",".join(f"binance:{symbol}" for symbol in SYMBOLS.split(",")),
    }
    with processes(tmp_path, environment) as running:
        running.simulate("--rate", "500", "--symbols", SYMBOLS)
        running.start("flusher")
        running.start("collector")

        async def stored() -> bool:
            return bool(await value(dsn, "SELECT count(*) > 1000 FROM trades"))

        await until(stored, "the first thousand trades")
        server.stop("immediate")
        await asyncio.sleep(OUTAGE_SECONDS)
        waiting = await queue.length()
        server.start()
        back = time.monotonic()

        async def drained() -> bool:
            return await queue.length() < 1000

        await until(drained, "the backlog to drain")
        print(  # pytest -s
            f"{waiting} trades waited; drained {time.monotonic() - back:.1f} s after the return"
        )
        assert waiting > OUTAGE_SECONDS * 100, "the outage was not under load"
        running.control("quiet", {"quiet": True})
        assert running.terminate("collector") == 0

        async def empty() -> bool:
            return await queue.length() == 0

        await until(empty, "an empty queue")
        assert running.terminate("flusher") == 0
        await holds_what_was_published(dsn, running.control("status")["symbols"])
    balance = await queue.balance()
    assert balance.is_exact
    assert balance.dead == 0


async def holds_what_was_published(dsn: str, published: dict[str, Any]) -> None:
    """Every id from the first one stored to the last one stored is there, and there once."""
    connection = await asyncpg.connect(dsn)
    try:
        for symbol, truth in published.items():
            row = await connection.fetchrow(
                "SELECT count(*) AS rows, count(DISTINCT trade_id) AS ids, min(trade_id) AS first,"
                " max(trade_id) AS last FROM trades WHERE market_id = market('binance', $1)",
                symbol,
            )
            assert row is not None
            assert row["rows"] == row["ids"] == row["last"] - row["first"] + 1, symbol
            assert row["last"] <= truth["ids"][1]
    finally:
        await connection.close()


def trade(trade_id: int, price: str = "1.5") -> bytes:
    return records.encode(
        Trade("binance", "BTCUSDT", trade_id, trade_id, price, "2", "buy", 1_790_000_000_000_000, 1)
    )


async def test_of_500_records_with_one_poison_499_are_stored_and_one_is_dead_with_its_reason(
    tmp_path: Path,
    postgres: Database,
    redis: Redis,
    redis_environment: dict[str, str],
) -> None:
    queue = RecordQueue(redis, "trade")
    poison = trade(250, price="0")
    await queue.push([poison if number == 250 else trade(number) for number in range(1, 501)])
    with processes(tmp_path, {**redis_environment, **postgres.environment}) as running:
        running.start("flusher")

        async def empty() -> bool:
            return await queue.length() == 0

        await until(empty, "an empty queue")
        assert running.terminate("flusher") == 0
    assert await value(postgres.dsn, "SELECT count(*) FROM trades") == 499
    (letter,) = await redis.lrange(queue.dead_key, 0, -1)
    assert b"trades_price_check" in letter
    assert b'\\"0\\"' in letter
    balance = await queue.balance()
    assert (balance.pushed, balance.acked, balance.dead, balance.length) == (500, 499, 1, 0)


@pytest.mark.parametrize("service", ["collector", "orderbook", "flusher"])
async def test_sigterm_ends_each_process_with_0_though_every_server_is_away(
    service: str, tmp_path: Path
) -> None:
    nowhere = {
        "REDIS_PORT": "1",
        "POSTGRES_PORT": "1",
        "SYMBOLS": "binance:BTCUSDT",
        "BINANCE_SPOT_WS_URL": "ws://127.0.0.1:1",
        "BINANCE_SPOT_REST_URL": "http://127.0.0.1:1",
    }
    with processes(tmp_path, nowhere) as running:
        running.start(service)
        wait_until(lambda: "started" in running.log(service), "the start")
        assert running.terminate(service) == 0
