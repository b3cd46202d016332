"""The Redis client that all processes use, on a real server."""

import asyncio

from sluice.connections import connect_redis
from sluice.settings import Settings


async def test_a_cancellation_is_never_lost_at_whatever_turn_it_comes(
    redis_environment: dict[str, str],
) -> None:
    settings = Settings.model_validate(
        {name.lower(): value for name, value in redis_environment.items()}
    )
    async with connect_redis(settings) as redis:
        await redis.ping()

        async def ask_for_ever() -> None:
            while True:
                await redis.llen("none")

        # One turn of the loop after the other, over several round trips.
        for turns in range(60):
            asking = asyncio.create_task(ask_for_ever())
            for _ in range(turns):
                await asyncio.sleep(0)
            asking.cancel()
            ended, _ = await asyncio.wait([asking], timeout=10)
            while not asking.done():
                asking.cancel()  # so that the test can end
                await asyncio.sleep(0)
            assert ended, f"cancelled in turn {turns}, it runs on"
