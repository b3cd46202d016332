"""What a power cut tears off Redis' append-only file does not come back at a later start."""

import asyncio
from pathlib import Path

import pytest
from redis.asyncio import Redis

from sluice.cli.servers import RedisServer
from sluice.fitness import keep_file_whole
from sluice.queue import RecordQueue, Segment, holes_key
from tests.faults.redis_faults import restart_without_tail
from tests.faults.waiting import eventually

STREAM = "binance:BTCUSDT:trade"
ITEM = b"a record of some length, number %d"


async def state_of(redis: Redis) -> tuple[object, ...]:
    """Give the counters, the items and the holes."""
    queue = RecordQueue(redis, "trade")
    holes = await redis.zrange(holes_key(STREAM), 0, -1)
    return await queue.balance(), await redis.lrange(queue.key, 0, -1), holes


async def lose_the_end_of_a_push(server: RedisServer, torn: int) -> None:
    """Fill a hole and tear the transaction that did it apart, `torn` bytes before its end."""
    async with Redis.from_url(server.url, socket_timeout=None) as redis:
        queue = RecordQueue(redis, "trade")
        await queue.push([ITEM % 1], [Segment(STREAM, 1, 1)])
        await queue.push([ITEM % 9], [Segment(STREAM, 9, 9)])
        await queue.push([ITEM % n for n in range(2, 9)], [Segment(STREAM, 2, 8)])
    await asyncio.to_thread(restart_without_tail, server, torn)


@pytest.mark.parametrize("torn", [20, 60, 150, 300])
async def test_a_torn_transaction_is_gone_after_the_rewrite(
    torn: int, private_redis: RedisServer
) -> None:
    await lose_the_end_of_a_push(private_redis, torn)
    async with Redis.from_url(private_redis.url, socket_timeout=None) as redis:
        stop = asyncio.Event()
        keeping = asyncio.create_task(keep_file_whole(redis, stop))

        async def is_rewritten() -> bool:
            told = await redis.info("persistence")
            files = (private_redis.directory / "appendonlydir").glob("*.base.*")
            return not told["aof_rewrite_in_progress"] and any(_number(f) > 1 for f in files)

        await eventually(is_rewritten)
        stop.set()
        await keeping
        await RecordQueue(redis, "trade").push([ITEM % 20], [Segment(STREAM, 20, 20)])
        before = await state_of(redis)
        assert before[0].is_exact  # type: ignore[attr-defined]  # the balance
        assert len(before[2]) == 2, "inconclusive: the hole is filled, nothing was torn off"  # type: ignore[arg-type]
    await asyncio.to_thread(private_redis.restart)
    async with Redis.from_url(private_redis.url, socket_timeout=None) as redis:
        assert await state_of(redis) == before


@pytest.mark.parametrize("torn", range(10, 420, 37))
async def test_without_a_rewrite_what_was_torn_takes_nothing_away(
    torn: int, private_redis: RedisServer
) -> None:
    await lose_the_end_of_a_push(private_redis, torn)
    async with Redis.from_url(private_redis.url, socket_timeout=None) as redis:
        await RecordQueue(redis, "trade").push([ITEM % 20], [Segment(STREAM, 20, 20)])
    await asyncio.to_thread(private_redis.restart)
    async with Redis.from_url(private_redis.url, socket_timeout=None) as redis:
        _, items, holes = await state_of(redis)
    held = {int(bytes(item).rsplit(b" ", 1)[1]) for item in items}  # type: ignore[attr-defined]
    missing = set(range(1, 21)) - held
    ranges = [bytes(hole).split(b"-")[:2] for hole in holes]  # type: ignore[attr-defined]
    assert missing <= {n for low, high in ranges for n in range(int(low), int(high) + 1)}


def _number(path: Path) -> int:
    return int(path.name.split(".")[-3])
