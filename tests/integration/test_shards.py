"""QUEUE_SHARDS: lists by market, flushers that share them, and no list that is forgotten."""

import asyncio
from pathlib import Path

import pytest
from redis.asyncio import Redis

from sluice.publisher import Publisher
from sluice.queue import (
    FLUSHERS,
    LEASES,
    QUEUES,
    RecordQueue,
    balance_of,
    find_queues,
    shard_of,
)
from sluice.records import Trade
from sluice.settings import Settings
from tests.faults.waiting import eventually
from tests.integration.flusher_rig import DAY, Flusher, flushing, push, stored_ids, trade
from tests.servers import Database

SHARDS = 4
MARKETS = 12


@pytest.fixture
def environment(redis_environment: dict[str, str], postgres: Database) -> dict[str, str]:
    return {**redis_environment, **postgres.environment}


def symbol(number: int) -> str:
    return f"M{number % MARKETS}"


async def push_sharded(redis: Redis, numbers: range, shards: int = SHARDS) -> None:
    """Push a trade of each number, each on the list of its market."""
    by_shard: dict[int, list[bytes]] = {}
    for number in numbers:
        shard = shard_of("trade", "binance", symbol(number), shards)
        by_shard.setdefault(shard, []).append(trade(number, symbol=symbol(number)))
    for shard, items in by_shard.items():
        await RecordQueue(redis, "trade", shard).push(items)


async def are_drained(redis: Redis) -> bool:
    return (await balance_of(redis, "trade")).length == 0


async def holders(redis: Redis) -> dict[bytes, list[bytes]]:
    """Give the lists of trades that each flusher which runs holds."""
    running: list[bytes] = await redis.zrange(FLUSHERS, 0, -1)  # type: ignore[assignment]  # nothing decodes
    leases: dict[bytes, bytes] = await redis.hgetall(LEASES)  # type: ignore[assignment]  # as above
    held: dict[bytes, list[bytes]] = {owner: [] for owner in running}
    for name, owner in leases.items():
        if owner in held and name.startswith(b"trade"):
            held[owner].append(name)
    return held


async def is_shared(redis: Redis, *numbers: int) -> bool:
    return sorted(map(len, (await holders(redis)).values())) == sorted(numbers)


def drained_by(flusher: Flusher) -> set[str]:
    """Name the lists that a flusher took records of."""
    return {
        sample.labels["queue"]
        for metric in flusher.process.collect()
        if metric.name == "sluice_flush_batches"
        for sample in metric.samples
        if sample.value
    }


async def test_a_publisher_keeps_each_market_on_a_list_of_its_own_also_from_the_spool(
    redis: Redis, redis_environment: dict[str, str], tmp_path: Path
) -> None:
    values = {name.lower(): value for name, value in redis_environment.items()}
    settings = Settings(
        _env_file=None,
        **{**values, "spool_dir": tmp_path, "queue_shards": SHARDS},  # type: ignore[arg-type]  # as the environment gives them
    )
    publisher, stop = Publisher(redis, settings), asyncio.Event()
    await redis.config_set("min-replicas-to-write", 1)
    try:
        running = asyncio.create_task(publisher.run(stop))
        for number in range(60):
            publisher.put(
                Trade("binance", symbol(number), number, number, "1", "1", "buy", DAY + number, DAY)
            )
        await eventually(lambda: publisher.counts.spooled == 60)
    finally:
        await redis.config_set("min-replicas-to-write", 0)
    await eventually(lambda: publisher.spool_records == 0)
    stop.set()
    await running
    seen = 0
    for queue in await find_queues(redis, ["trade"]):
        for item in (await queue.claim(100, 2**20)).items:
            name = item.split(b'"')[3].decode()
            shard = shard_of("trade", "binance", name, SHARDS)
            assert queue.name == (f"trade:{shard}" if shard else "trade")
            seen += 1
    assert seen == 60
    assert len(await redis.smembers(QUEUES)) == SHARDS


async def test_two_flushers_share_the_lists_and_one_that_leaves_is_replaced(
    environment: dict[str, str], postgres: Database, redis: Redis
) -> None:
    await push_sharded(redis, range(400))
    async with flushing(environment) as first:
        await eventually(lambda: is_shared(redis, SHARDS))
        async with flushing(environment) as second:
            await eventually(lambda: is_shared(redis, 2, 2))
            await push_sharded(redis, range(400, 800))
            await eventually(lambda: are_drained(redis))
            assert len(drained_by(second) & {"trade", "trade:1", "trade:2", "trade:3"}) == 2
            await second.stop()
        await eventually(lambda: is_shared(redis, SHARDS))
        await push_sharded(redis, range(800, 1200))
        await eventually(lambda: are_drained(redis))
        await first.stop()
    assert await stored_ids(postgres) == list(range(1200))
    balance = await balance_of(redis, "trade")
    assert (balance.pushed, balance.acked, balance.dead) == (1200, 1200, 0)
    assert await redis.zcard(FLUSHERS) == 0


async def test_a_flusher_that_tells_nothing_any_more_loses_its_lists(
    environment: dict[str, str],
    postgres: Database,
    redis: Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flusher.leases.LEASE_SECONDS", 2.0)
    await push_sharded(redis, range(100))
    now, _ = await redis.time()
    await redis.zadd(FLUSHERS, {"elsewhere/pid:[1]/7/x": now * 1000})
    await redis.hset(LEASES, mapping=dict.fromkeys(["trade", "trade:1"], "elsewhere/pid:[1]/7/x"))
    async with flushing(environment):
        await eventually(lambda: are_drained(redis))
        await eventually(lambda: is_shared(redis, SHARDS))
    assert await stored_ids(postgres) == list(range(100))


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 4)])
async def test_lists_of_another_number_of_shards_are_drained_as_well(
    before: int, after: int, environment: dict[str, str], postgres: Database, redis: Redis
) -> None:
    await push_sharded(redis, range(300), before)
    async with flushing(environment, queue_shards=after) as flusher:
        await push_sharded(redis, range(300, 600), after)
        await eventually(lambda: are_drained(redis))
        await flusher.stop()
    assert await stored_ids(postgres) == list(range(600))
    balance = await balance_of(redis, "trade")
    assert (balance.pushed, balance.acked, balance.length) == (600, 600, 0)


async def test_leases_that_are_wiped_out_with_everything_are_taken_again(
    environment: dict[str, str], postgres: Database, redis: Redis
) -> None:
    async with flushing(environment) as flusher:
        await push_sharded(redis, range(100))
        await eventually(lambda: are_drained(redis))
        await redis.flushdb()
        await push_sharded(redis, range(100, 200))
        await eventually(lambda: are_drained(redis))
        await push(redis, [trade(200)])
        await eventually(lambda: are_drained(redis))
        await flusher.stop()
    assert await stored_ids(postgres) == list(range(201))


def test_markets_are_spread_and_stay_where_they_are() -> None:
    shards = {name: shard_of("trade", "binance", name, 4) for name in map(symbol, range(MARKETS))}
    assert set(shards.values()) == {0, 1, 2, 3}
    assert shard_of("trade", "binance", "BTCUSDT", 4) == 3
    assert shard_of("gap", "binance", "M1", 4) == 0
    assert shard_of("trade", "binance", "M1", 1) == 0
