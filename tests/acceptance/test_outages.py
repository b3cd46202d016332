"""The database goes away under a steady stream, a record is poison, a process is told to stop."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest
from redis.asyncio import Redis

from sluice import records
from sluice.cli.servers import PostgresServer
from sluice.clock import now_micros
from sluice.queue import RecordQueue
from sluice.records import Trade
from tests.acceptance.completeness import account, complete, fresh
from tests.acceptance.processes import CEILING, processes, wait_until
from tests.faults.disk import filled, small_file_system
from tests.faults.framing import PostgresDialogue
from tests.faults.postgres_faults import (
    connections_refused,
    read_only,
    restart_immediately,
    table_locked,
    terminate_backends,
)
from tests.faults.proxy import Proxy
from tests.faults.waiting import eventually
from tests.servers import SCHEMA, Database, database_of, execute

OUTAGE_SECONDS = 20.0
SYMBOLS = "BTCUSDT,ETHUSDT"
HELD_SECONDS = float(os.environ.get("SLUICE_OUTAGE_SECONDS", "1"))
"""How long each outage of the table lasts."""


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


Outage = Callable[["Rig"], Awaitable[None]]


@dataclass(frozen=True)
class Rig:
    """What an outage is made with."""

    server: PostgresServer
    database: Database
    flusher: Database
    """The same database, as the flusher's own role."""
    proxy: Proxy
    """Between the flusher and the server."""
    queue: RecordQueue

    async def hold(self) -> None:
        """Wait for the time of an outage, in which the queue must be seen to grow."""
        await asyncio.sleep(HELD_SECONDS)

        async def has_grown() -> bool:
            return await self.queue.length() > 100

        await eventually(has_grown)


async def backends_are_terminated(rig: Rig) -> None:
    ended, began = 0, time.monotonic()
    while time.monotonic() - began < HELD_SECONDS or ended < 3:
        ended += await terminate_backends(rig.flusher)
        await asyncio.sleep(0.1)


async def the_server_restarts(rig: Rig) -> None:
    began = time.monotonic()
    while True:
        await asyncio.to_thread(restart_immediately, rig.server)
        if time.monotonic() - began > HELD_SECONDS:
            break
        await asyncio.sleep(1)


async def the_reply_to_commit_is_lost(rig: Rig) -> None:
    lost = rig.proxy.counts.lost_replies
    rig.proxy.lose_reply(to=b"COMMIT", then="hang")
    await eventually(lambda: rig.proxy.counts.lost_replies > lost)


async def the_disk_is_full(rig: Rig) -> None:
    with filled(rig.server.directory):
        await rig.hold()
    if not rig.server.is_running:  # its log of changes could not grow
        await asyncio.to_thread(rig.server.start)


def held(fault: Callable[[Rig], AbstractAsyncContextManager[None]]) -> Outage:
    async def outage(rig: Rig) -> None:
        async with fault(rig):
            await rig.hold()

    return outage


OUTAGES: Final[dict[str, Outage]] = {
    "backends terminated every 100 ms": backends_are_terminated,
    "immediate restarts": the_server_restarts,
    "the reply to COMMIT lost": the_reply_to_commit_is_lost,
    "table locked": held(lambda rig: table_locked(rig.database, "trades")),
    "read-only": held(lambda rig: read_only(rig.database)),
    "connection limit 0": held(lambda rig: connections_refused(rig.flusher)),
    "disk full": the_disk_is_full,
}


@pytest.mark.timeout(300 + 10 * len(OUTAGES) * HELD_SECONDS)
async def test_after_each_outage_of_postgresql_the_rows_are_exact_and_the_queue_is_empty(
    root: Path, tmp_path: Path, redis: Redis, redis_environment: dict[str, str]
) -> None:
    directory = tmp_path / "small"
    directory.mkdir()
    options = {"min_wal_size": "32MB", "max_wal_size": "48MB"}
    with small_file_system(directory, 160):
        server = PostgresServer(root, directory, options=options)
        try:
            server.start()
            server.create_database("sluice")
            database = database_of(server, "sluice")
            execute(database, SCHEMA, "ALTER ROLE sluice_flusher LOGIN")
            await each_outage(server, database, tmp_path, redis, redis_environment)
        finally:
            server.kill()


async def each_outage(
    server: PostgresServer,
    database: Database,
    tmp_path: Path,
    redis: Redis,
    redis_environment: dict[str, str],
) -> None:
    symbol = "BTCUSDT"
    environment = {
        **redis_environment,
        **database.environment,
        "SYMBOLS": f"binance:{symbol}",
    }
    async with Proxy(database.host, database.port, dialogue=PostgresDialogue) as proxy:
        flusher = replace(database, user="sluice_flusher")
        rig = Rig(server, database, flusher, proxy, RecordQueue(redis, "trade"))
        with processes(tmp_path, environment) as running:
            running.simulate("--rate", "300", "--symbols", symbol)
            through_proxy = replace(flusher, host="127.0.0.1", port=proxy.port)
            running.start("flusher", "flusher", None, **through_proxy.environment)
            running.start("collector")
            await fresh(database.dsn, 0)
            first = min((await account(database.dsn, running, symbol)).stored)
            for name, outage in OUTAGES.items():
                await outage(rig)
                waiting, ended = await rig.queue.length(), now_micros()
                seconds = await fresh(database.dsn, ended)
                print(f"{name}: {waiting} trades waited, up to date after {seconds:.1f} s")
            await complete(database.dsn, running, [symbol], {symbol: first})

            async def is_empty() -> bool:
                return await rig.queue.length() == 0

            await eventually(is_empty)
            assert await asyncio.to_thread(running.terminate, "collector") == 0
            assert await asyncio.to_thread(running.terminate, "flusher") == 0
            assert "a bug" not in running.log("flusher")
        balance = await rig.queue.balance()
        assert balance.is_exact
        assert (balance.dead, balance.length) == (0, 0)


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
