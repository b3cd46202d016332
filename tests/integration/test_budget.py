"""The rate budget that all processes of one address share through a real Redis."""

import asyncio
import time
from types import SimpleNamespace
from typing import cast

from redis.asyncio import Redis

from sluice.budget import Budget, Priority
from sluice.exchanges.base import Exchange
from sluice.queue import budget_key

SOON = 0.3
"""Seconds that show a wait which lasts very much longer."""


def venue(weight_per_minute: int, name: str = "venue") -> Exchange:
    return cast("Exchange", SimpleNamespace(name=name, weight_per_minute=weight_per_minute))


async def is_granted(budget: Budget, weight: int, priority: Priority) -> bool:
    try:
        async with asyncio.timeout(SOON):
            await budget.acquire(weight, priority)
    except TimeoutError:
        return False
    return True


async def test_processes_share_one_bucket(redis: Redis) -> None:
    # A weight of 6 a minute: the bucket holds 1.2 and needs 15 seconds to fill.
    one, other = Budget(redis, venue(6)), Budget(redis, venue(6))
    await one.acquire(1, Priority.LIVE_IMAGE)
    assert not await is_granted(other, 1, Priority.LIVE_IMAGE)


async def test_venues_do_not_share(redis: Redis) -> None:
    await Budget(redis, venue(6)).acquire(1, Priority.LIVE_IMAGE)
    await Budget(redis, venue(6, "other")).acquire(1, Priority.LIVE_IMAGE)


async def test_lower_priorities_leave_a_reserve(redis: Redis) -> None:
    budget = Budget(redis, venue(12))
    await budget.acquire(1, Priority.LIVE_IMAGE)
    audit = asyncio.create_task(budget.acquire(1, Priority.AUDIT))
    assert not (await asyncio.wait([audit], timeout=SOON))[0]
    # What is left is too little for an audit, and enough for a book that lost its place.
    await budget.acquire(1, Priority.LIVE_IMAGE)
    assert not audit.done()
    audit.cancel()


async def test_a_request_heavier_than_the_bucket_is_granted_when_it_is_full(redis: Redis) -> None:
    budget = Budget(redis, venue(60))
    await budget.acquire(50, Priority.AUDIT)
    assert not await is_granted(budget, 1, Priority.LIVE_IMAGE)


async def test_a_pause_holds_for_every_process(redis: Redis) -> None:
    one, other = Budget(redis, venue(6000)), Budget(redis, venue(6000))
    await one.pause(600)
    assert not await is_granted(other, 1, Priority.LIVE_IMAGE)


async def test_a_shorter_pause_does_not_end_a_longer_one(redis: Redis) -> None:
    one, other = Budget(redis, venue(6000)), Budget(redis, venue(6000))
    await one.pause(600)
    await other.pause(0.01)
    assert not await is_granted(other, 1, Priority.LIVE_IMAGE)


async def test_after_the_pause_requests_go_on(redis: Redis) -> None:
    budget = Budget(redis, venue(6000))
    began = time.monotonic()
    await budget.pause(1)
    await budget.acquire(1, Priority.AUDIT)
    assert time.monotonic() - began >= 0.99


async def test_what_the_venue_reports_bounds_the_minute(redis: Redis) -> None:
    budget = Budget(redis, venue(6000))
    await budget.acquire(1, Priority.LIVE_IMAGE)
    await budget.report(6000)
    granted = await is_granted(budget, 1, Priority.LIVE_IMAGE)
    seconds, _ = await redis.time()
    minute_end = int(await redis.hget(budget_key("venue"), "minute_end"))  # type: ignore[arg-type]
    assert not granted or seconds * 1000 >= minute_end


async def test_no_pace_is_faster_than_the_venue_allows(redis: Redis) -> None:
    budgets = [Budget(redis, venue(60_000)) for _ in range(4)]
    began = time.monotonic()

    async def take(budget: Budget) -> None:
        while True:
            await budget.acquire(1000, Priority.LIVE_IMAGE)

    takers = [asyncio.create_task(take(budget)) for budget in budgets]
    async with asyncio.timeout(60):
        # More than the bucket holds at first, so that the rest comes at the pace.
        while sum(budget.spent for budget in budgets) < 13_000:  # a plain count
            await asyncio.sleep(0.05)
    for taker in takers:
        taker.cancel()
    await asyncio.gather(*takers, return_exceptions=True)
    spent = sum(budget.spent for budget in budgets)
    assert spent <= 12_000 + 800 * (time.monotonic() - began)
