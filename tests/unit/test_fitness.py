"""What a Redis must be like before records are trusted to it."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
from loguru import logger
from redis.asyncio import Redis

from sluice.fitness import redis_is_fit
from sluice.metrics import Health
from sluice.settings import BadSettingsError

GOOD = {"redis_version": "7.0.15", "maxmemory_policy": "noeviction", "aof_enabled": 1}


class Server:
    """What INFO says of a server that the tests can not bring: an old one, for instance."""

    def __init__(self, **said: Any) -> None:
        self._said = GOOD | said

    async def info(self, section: str) -> dict[str, Any]:
        assert section in {"server", "memory", "persistence"}
        return self._said


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    yield lines
    logger.remove(sink)


async def _look(server: Server) -> Health:
    health = Health()
    await redis_is_fit(cast("Redis", server), health)
    return health


async def test_a_good_one_is_ready_and_has_no_line(warnings: list[str]) -> None:
    health = await _look(Server())

    assert not health.reasons_for("redis")
    assert warnings == []


async def test_an_old_one_is_refused() -> None:
    with pytest.raises(BadSettingsError, match=r"Redis 6\.2\.14 is too old; 7 is needed"):
        await _look(Server(redis_version="6.2.14"))


async def test_one_that_throws_records_away_is_refused() -> None:
    with pytest.raises(BadSettingsError, match="maxmemory-policy is allkeys-lru"):
        await _look(Server(maxmemory_policy="allkeys-lru"))


async def test_one_that_forgets_is_warned_of(warnings: list[str]) -> None:
    await _look(Server(aof_enabled=0))

    (line,) = warnings
    assert "set appendonly yes" in line
