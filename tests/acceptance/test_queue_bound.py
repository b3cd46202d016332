"""Hours of outage, in small: the queues grow to QUEUE_MAX_MB, then the disk takes over."""

import asyncio
import os
import time
from pathlib import Path

import pytest
from redis.asyncio import Redis

from sluice.cli.servers import PostgresServer
from sluice.queue import RecordQueue
from tests.acceptance.completeness import account, complete, fresh
from tests.acceptance.processes import processes
from tests.acceptance.spooled import spooled_batches
from tests.faults.waiting import eventually
from tests.servers import Database

SYMBOLS = ["BTCUSDT", "ETHUSDT"]
RATE = 1000
OUTAGE_SECONDS = float(os.environ.get("SLUICE_OUTAGE_SECONDS", "5"))
"""How long the outage goes on once the queues are full."""
MB = 2**20


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / MB


@pytest.mark.timeout(300)
async def test_beyond_their_bound_the_queues_do_not_grow_and_nothing_is_lost(
    tmp_path: Path,
    private_postgres: PostgresServer,
    private_database: Database,
    redis: Redis,
    redis_environment: dict[str, str],
) -> None:
    environment = {
        **redis_environment,
        **private_database.environment,
        "SYMBOLS": ",".join(f"binance:{symbol}" for symbol in SYMBOLS),
        "QUEUE_MAX_MB": "1",
    }
    queue, spool = RecordQueue(redis, "trade"), tmp_path / "spool"
    with processes(tmp_path, environment) as running:
        running.simulate("--rate", str(RATE), "--symbols", ",".join(SYMBOLS))
        running.start("flusher")
        collector = running.start("collector")
        await fresh(private_database.dsn, 0)
        firsts = {
            symbol: min((await account(private_database.dsn, running, symbol)).stored)
            for symbol in SYMBOLS
        }
        private_postgres.kill()
        await eventually(lambda: "the queues hold" in running.log("collector"))
        await eventually(lambda: spooled_batches(spool) > 0)
        at_the_bound, resident = await queue.memory(), resident_mb(collector.pid)
        await asyncio.sleep(OUTAGE_SECONDS)
        batches = spooled_batches(spool)
        print(
            f"queue {at_the_bound / MB:.2f} MB at its bound, {await queue.memory() / MB:.2f} after "
            f"{OUTAGE_SECONDS:.0f} s more; {batches} batches on the disk; collector "
            f"{resident:.0f} MB, then {resident_mb(collector.pid):.0f} MB"
        )
        assert await queue.memory() <= 1.1 * at_the_bound
        before = (await queue.balance()).acked
        await asyncio.to_thread(private_postgres.start)
        began = time.monotonic()
        await eventually(lambda: spooled_batches(spool) == 0)
        acked = (await queue.balance()).acked - before
        seconds = time.monotonic() - began
        print(
            f"{acked} records left the queue within {seconds:.1f} s of the server's return, until "
            f"nothing was on the disk: {acked / seconds / RATE:.1f} times the live rate"
        )
        await complete(private_database.dsn, running, SYMBOLS, firsts)
        assert running.terminate("collector") == 0
        assert running.terminate("flusher") == 0
    balance = await queue.balance()
    assert balance.is_exact
    assert balance.dead == balance.length == 0
