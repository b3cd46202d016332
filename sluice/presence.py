"""Which processes run and how each stands, told in Redis for `sluice status`.

Every process writes one field of the hash `crypto:processes` every few seconds and removes it when
it is told to stop. A field that is older than STALE_SECONDS is one of a process that died.
"""

import asyncio
import os
import socket
import time
from contextlib import suppress
from typing import Final

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from sluice.lifecycle import VERSION, Fact, Process
from sluice.queue import PROCESSES

TELL_SECONDS: Final = 5.0
STALE_SECONDS: Final = 20.0
LAST_WORD_SECONDS: Final = 1.0


class Presence(msgspec.Struct, frozen=True):
    """One process: since when it runs and when it told (seconds since the epoch), and its state."""

    name: str
    host: str
    pid: int
    version: str
    started: float
    told: float
    waits_for: list[str]
    """What it is not ready for; nothing where it is ready."""
    facts: dict[str, Fact]

    @property
    def is_stale(self) -> bool:
        """Whether it told nothing for so long that it must have died."""
        return time.time() - self.told > STALE_SECONDS


async def announce(process: Process, redis: Redis) -> None:
    """Tell how the process stands until it is told to stop; a Redis that is away hears nothing."""
    host, pid = socket.gethostname(), os.getpid()
    field = f"{process.name}:{host}:{pid}"
    while not process.stop.is_set():
        presence = Presence(
            process.name,
            host,
            pid,
            VERSION,
            process.started,
            time.time(),
            process.health.reasons,
            {name: fact for facts in process.facts for name, fact in facts().items()},
        )
        with suppress(RedisError, OSError):
            await redis.hset(PROCESSES, field, msgspec.json.encode(presence))
            await _forget_the_dead(redis)
        with suppress(TimeoutError):
            async with asyncio.timeout(TELL_SECONDS):
                await process.stop.wait()
    with suppress(RedisError, OSError):
        async with asyncio.timeout(LAST_WORD_SECONDS):
            await redis.hdel(PROCESSES, field)


async def present(redis: Redis) -> list[Presence]:
    """Read who runs, by name and age; raises redis' errors."""
    told = await _told(redis)
    return sorted(
        (presence for presence in told.values() if not presence.is_stale),
        key=lambda presence: (presence.name, presence.started),
    )


async def _forget_the_dead(redis: Redis) -> None:
    told = await _told(redis)
    if dead := [field for field, presence in told.items() if presence.is_stale]:
        await redis.hdel(PROCESSES, *dead)


async def _told(redis: Redis) -> dict[bytes | str, Presence]:
    told = {}
    for field, text in (await redis.hgetall(PROCESSES)).items():
        with suppress(msgspec.DecodeError):  # another version says it in another way
            told[field] = msgspec.json.decode(text, type=Presence)
    return told
