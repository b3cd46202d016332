"""A collector that dies beside its spool: what it had put aside comes back with the next one."""

import asyncio
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from redis.asyncio import Redis

from sluice.cli.servers import RedisServer
from sluice.clock import now_micros
from tests.acceptance.completeness import account, complete, fresh
from tests.acceptance.processes import processes
from tests.faults import redis_faults
from tests.faults.waiting import eventually
from tests.servers import Database

SYMBOL = "BTCUSDT"


def spooled_batches(directory: Path) -> int:
    count = 0
    for path in directory.glob("*.spool"):
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            try:
                count += database.execute("SELECT count(*) FROM batches").fetchone()[0]
            except sqlite3.OperationalError:
                continue  # it has just begun, or ended
    return count


@pytest.mark.parametrize("point", ["publisher.spooled", "publisher.returned"])
async def test_a_collector_killed_beside_its_spool_loses_and_repeats_nothing(
    point: str, tmp_path: Path, private_redis: RedisServer, postgres: Database
) -> None:
    environment = {
        **private_redis.environment,
        **postgres.environment,
        "SYMBOLS": f"binance:{SYMBOL}",
    }
    spool = tmp_path / "spool"
    with processes(tmp_path, environment) as running:
        running.simulate("--rate", "100", "--symbols", SYMBOL)
        running.start("flusher")
        process = running.start("collector", SLUICE_TESTING="1", SLUICE_FAILPOINT=f"{point}:2")
        await fresh(postgres.dsn, 0)
        first = min((await account(postgres.dsn, running, SYMBOL)).stored)
        async with (
            Redis.from_url(private_redis.url, socket_timeout=None) as client,
            redis_faults.memory_full(client),
        ):
            # It returns one batch, and dies before the next one.
            await eventually(lambda: spooled_batches(spool) >= 2)
        await eventually(lambda: process.poll() is not None)
        assert process.returncode == -signal.SIGKILL
        assert spooled_batches(spool) > 0, "inconclusive: nothing was left on the disk"
        del running.running["collector"]
        restarted = now_micros()
        running.start("collector")
        await fresh(postgres.dsn, restarted)
        await complete(postgres.dsn, running, [SYMBOL], {SYMBOL: first})
        await eventually(lambda: spooled_batches(spool) == 0)
        assert "adopted a spool" in running.log("collector")
        assert await asyncio.to_thread(running.terminate, "collector") == 0
    assert list(spool.glob("*.broken")) == []
