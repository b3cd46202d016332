"""Whole flushers, killed at every step and told to stop while their servers hang."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from redis.asyncio import Redis

from sluice.cli.servers import PostgresServer, RedisServer
from sluice.failpoints import POINTS
from sluice.queue import RecordQueue, balance_of
from tests.acceptance.processes import CEILING, processes
from tests.faults.waiting import eventually
from tests.integration.flusher_rig import drained, letters, push, stored_ids, trade
from tests.integration.test_shards import are_drained, is_shared, push_sharded
from tests.servers import Database

HITS = int(os.environ.get("SLUICE_FLUSHER_KILLS", "1"))
"""How often each step is hit, by each of two flushers."""
STEPS = sorted(name for name in POINTS if name.startswith("flusher."))
ROWS = 600
BATCH = 100
POISON = 150
"""Each so many-th trade has a price of zero."""


@pytest.mark.timeout(120 + 60 * HITS)
async def test_two_flushers_that_are_killed_at_every_step_store_every_row_once(
    tmp_path: Path, postgres: Database, redis: Redis, redis_environment: dict[str, str]
) -> None:
    environment = {
        **redis_environment,
        **postgres.environment,
        "FLUSH_BATCH_SIZE": str(BATCH),
        "SLUICE_TESTING": "1",
    }
    queue = RecordQueue(redis, "trade")
    pushed = 0
    with processes(tmp_path, environment) as running:
        for turn, step in enumerate(STEPS * HITS):
            # Half of it comes twice, as after a lost reply.
            rows = [row(number) for number in range(turn * ROWS + 1, (turn + 1) * ROWS + 1)]
            await push(redis, rows + rows[: ROWS // 2])
            pushed += ROWS + ROWS // 2
            for name, number in (("first", 1), ("second", 2)):
                running.start("flusher", name, SLUICE_FAILPOINT=f"{step}:{number}")
            for name in ("first", "second"):
                process = running.running.pop(name)
                code = await asyncio.to_thread(process.wait, CEILING)
                assert code == -signal.SIGKILL, f"{name} not killed at {step}: {running.log(name)}"
        running.start("flusher", "last")
        await drained(redis, "trade")
        assert running.terminate("last") == 0
    last = len(STEPS) * HITS * ROWS
    assert await stored_ids(postgres) == [n for n in range(1, last + 1) if n % POISON]
    balance = await queue.balance()
    assert balance.is_exact
    assert (balance.pushed, balance.length) == (pushed, 0)
    dead = await letters(redis)
    assert balance.dead == len(dead)
    assert {letter["raw"] for letter in dead} == {
        row(number) for number in range(POISON, last + 1, POISON)
    }


def row(number: int) -> bytes:
    return trade(number, price="1.5" if number % POISON else "0")


async def test_sigterm_writes_what_is_queued_and_ends_with_0(
    tmp_path: Path, postgres: Database, redis: Redis, redis_environment: dict[str, str]
) -> None:
    settings = {"FLUSH_BATCH_SIZE": "200", "FLUSH_INTERVAL_MS": "600000"}
    with processes(tmp_path, {**redis_environment, **postgres.environment, **settings}) as running:
        running.start("flusher")
        await push(redis, map(trade, range(200)))
        await drained(redis, "trade")
        await push(redis, map(trade, range(200, 350)))
        await push(redis, [b"[]"], "gap")
        assert running.terminate("flusher") == 0
        assert "drained no further" not in running.log("flusher")
    assert await stored_ids(postgres) == list(range(350))
    assert len(await letters(redis, "gap")) == 1
    assert (await RecordQueue(redis, "trade").balance()).length == 0


async def test_the_lists_of_a_flusher_that_is_killed_are_drained_by_the_other(
    tmp_path: Path, postgres: Database, redis: Redis, redis_environment: dict[str, str]
) -> None:
    environment = {**redis_environment, **postgres.environment, "FLUSH_BATCH_SIZE": "50"}
    with processes(tmp_path, environment) as running:
        for name in ("first", "second"):
            running.start("flusher", name)
        await push_sharded(redis, range(400))
        await eventually(lambda: is_shared(redis, 2, 2))
        await push_sharded(redis, range(400, 800))
        killed = running.running.pop("first")
        killed.kill()
        await asyncio.to_thread(killed.wait)
        await push_sharded(redis, range(800, 1200))
        await eventually(lambda: are_drained(redis))
        await eventually(lambda: is_shared(redis, 4))
        assert running.terminate("second") == 0
    assert await stored_ids(postgres) == list(range(1200))
    balance = await balance_of(redis, "trade")
    assert balance.is_exact
    assert (balance.pushed, balance.acked, balance.length) == (1200, 1200, 0)


@pytest.mark.parametrize("frozen", ["postgres", "redis"])
async def test_sigterm_ends_it_with_0_though_a_server_is_frozen(
    frozen: str,
    tmp_path: Path,
    private_postgres: PostgresServer,
    private_database: Database,
    private_redis: RedisServer,
) -> None:
    environment = {
        **private_redis.environment,
        **private_database.environment,
        "DRAIN_SECONDS": "1",
    }
    server = private_postgres if frozen == "postgres" else private_redis
    async with Redis.from_url(private_redis.url) as redis:
        queue = await push(redis, map(trade, range(100)))
        with processes(tmp_path, environment) as running:
            running.start("flusher")
            await drained(redis, "trade")
            if frozen == "redis":
                await push(redis, map(trade, range(100, 200)))
            server.freeze()
            if frozen == "postgres":
                await push(redis, map(trade, range(100, 200)))
            assert running.terminate("flusher") == 0
            assert "drained no further" in running.log("flusher")
            server.thaw()
            running.start("flusher")
            await drained(redis, "trade")
            assert running.terminate("flusher") == 0
        assert (await queue.balance()).is_exact
    assert await stored_ids(private_database) == list(range(200))
