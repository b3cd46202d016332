"""The Redis client that all processes use, on a real server."""

import asyncio

import asyncpg
import pytest
from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from sluice.connections import access_problem, connect_redis
from sluice.fitness import redis_is_fit
from sluice.metrics import Health
from sluice.settings import Settings
from tests.faults.framing import RedisDialogue
from tests.faults.proxy import Proxy
from tests.faults.waiting import eventually


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


async def test_a_command_whose_reply_is_lost_is_sent_once(
    redis_environment: dict[str, str], redis: Redis
) -> None:
    values = {name.lower(): value for name, value in redis_environment.items()}
    host, port = values["redis_host"], int(values["redis_port"])
    async with Proxy(host, port, dialogue=RedisDialogue) as proxy:
        settings = Settings.model_validate(
            {**values, "redis_host": "127.0.0.1", "redis_port": proxy.port}
        )
        async with connect_redis(settings) as client:
            await client.ping()
            proxy.lose_reply(to=b"INCR", then="reset")
            with pytest.raises(RedisConnectionError):
                await client.incr("sent")
    assert proxy.counts.lost_replies == 1
    assert await redis.get("sent") == b"1"


async def test_a_wrong_password_is_an_error_once_and_names_the_variable(
    redis_environment: dict[str, str],
) -> None:
    values = {name.lower(): value for name, value in redis_environment.items()}
    wrong = {"redis_username": "nobody", "redis_password": "wrong"}
    said: list[tuple[str, str]] = []
    sink = logger.add(
        lambda message: said.append((message.record["level"].name, message.record["message"]))
    )
    health = Health()
    try:
        async with connect_redis(Settings.model_validate(values | wrong)) as redis:
            looking = asyncio.create_task(redis_is_fit(redis, health))
            await eventually(lambda: bool(said))
            await asyncio.sleep(0.5)  # a second attempt says nothing
            looking.cancel()
            await asyncio.wait([looking])
    finally:
        logger.remove(sink)
    ((level, text),) = said
    assert level == "ERROR"
    assert text.startswith("REDIS_USERNAME, REDIS_PASSWORD: Redis refuses them")
    assert "wrong" not in text.replace("WRONGPASS", "")
    assert "REDIS_PASSWORD" in health.reasons_for("redis")


def test_a_wrong_password_of_postgresql_names_the_variable() -> None:
    error = asyncpg.InvalidPasswordError('password authentication failed for user "sluice"')
    assert access_problem(error).startswith("POSTGRES_USER, POSTGRES_PASSWORD: PostgreSQL refuses")
    assert not access_problem(ConnectionRefusedError("no"))
