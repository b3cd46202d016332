"""The rate budget while Redis is out of reach: a careful pace of one's own."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import cast

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from sluice.budget import Budget, Priority
from sluice.exchanges.base import Exchange

SOON = 0.3
"""Seconds that show a wait which lasts very much longer."""


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port that is taken, so that nobody else gets it, but refuses connections."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture
async def absent_redis(dead_port: int) -> AsyncIterator[Redis]:
    client = Redis(port=dead_port, retry=Retry(NoBackoff(), 0))
    yield client
    await client.aclose()


def venue(weight_per_minute: int, name: str = "venue") -> Exchange:
    return cast("Exchange", SimpleNamespace(name=name, weight_per_minute=weight_per_minute))


async def is_granted(budget: Budget, weight: int, priority: Priority = Priority.IMAGE) -> bool:
    try:
        async with asyncio.timeout(SOON):
            await budget.acquire(weight, priority)
    except TimeoutError:
        return False
    return True


async def test_without_redis_a_request_is_still_granted(absent_redis: Redis) -> None:
    budget = Budget(absent_redis, venue(6000))
    await budget.acquire(250, Priority.IMAGE)
    assert budget.spent == 250


async def test_without_redis_the_pace_is_a_fraction(absent_redis: Redis) -> None:
    # A weight of 6 a minute: what one process allows itself refills in about 100 seconds.
    budget = Budget(absent_redis, venue(6))
    await budget.acquire(1, Priority.LIVE_IMAGE)
    assert not await is_granted(budget, 1, Priority.LIVE_IMAGE)


async def test_a_pause_holds_without_redis(absent_redis: Redis) -> None:
    budget = Budget(absent_redis, venue(6000))
    await budget.pause(600)
    assert not await is_granted(budget, 1, Priority.LIVE_IMAGE)


async def test_a_report_without_redis_is_no_error(absent_redis: Redis) -> None:
    await Budget(absent_redis, venue(6000)).report(5999)
