"""Processes tell in Redis how they stand, as long as they run."""

import asyncio
import json
import time

import pytest
from redis.asyncio import Redis

from sluice.lifecycle import Process
from sluice.presence import STALE_SECONDS, announce, present
from sluice.queue import PROCESSES
from sluice.settings import Settings
from tests.faults.waiting import eventually


@pytest.fixture
def process() -> Process:
    return Process("collector", Settings(_env_file=None), asyncio.Event())


async def names(redis: Redis) -> list[str]:
    return [presence.name for presence in await present(redis)]


async def test_a_process_is_there_until_it_is_told_to_stop(redis: Redis, process: Process) -> None:
    process.facts.append(lambda: {"sockets": "1/2", "messages/s": 7})
    process.health.ready("start")
    process.health.wait_for("sockets", "1 of 2 not open")
    telling = asyncio.create_task(announce(process, redis))
    while not (told := await present(redis)):
        await asyncio.sleep(0.01)
    assert told[0].facts == {"sockets": "1/2", "messages/s": 7}
    assert told[0].waits_for == ["sockets: 1 of 2 not open"]
    process.stop.set()
    await telling
    assert await present(redis) == []


async def test_one_that_died_is_not_shown_and_is_forgotten_by_the_next(
    redis: Redis, process: Process
) -> None:
    dead = {
        "name": "flusher",
        "host": "h",
        "pid": 1,
        "version": "0",
        "started": 0.0,
        "told": time.time() - STALE_SECONDS - 1,
        "waits_for": [],
        "facts": {},
    }
    await redis.hset(PROCESSES, mapping={"flusher:h:1": json.dumps(dead), "newer:h:2": "{}"})
    assert await names(redis) == []
    telling = asyncio.create_task(announce(process, redis))

    async def is_forgotten() -> bool:
        return not await redis.hexists(PROCESSES, "flusher:h:1")

    await eventually(is_forgotten)
    assert await redis.hexists(PROCESSES, "newer:h:2")
    process.stop.set()
    await telling


async def test_a_redis_that_is_away_does_not_hold_up_the_end(process: Process) -> None:
    client = Redis.from_url("redis://127.0.0.1:1/0")
    telling = asyncio.create_task(announce(process, client))
    await asyncio.sleep(0)
    process.stop.set()
    async with asyncio.timeout(60):
        await telling
    await client.aclose()
