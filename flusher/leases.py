"""Who of several flushers drains which list.

A lease only saves work: two flushers on one list are correct, as the queue's fence sees to it
(`sluice.queue`). So nothing here has to be exact in the moment of a crash.

Every flusher tells Redis once in RENEW_SECONDS that it runs. In the same step it takes lists that
nobody alive holds, and lets go of what is above its share: of the n lists of a kind, each of m
flushers has n / m, rounded up. Who has told nothing for LEASE_SECONDS is dead; one that died on
this host is seen at once, by its process id.
"""

import os
import socket
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from redis.asyncio import Redis

from sluice import failpoints
from sluice.queue import FLUSHERS, LEASES, RecordQueue

RENEW_SECONDS: Final = 1.0
LEASE_SECONDS: Final = 6.0

_SHARE: Final = """#!lua flags=allow-oom
local flushers, leases = KEYS[1], KEYS[2]
local me, lease_ms = ARGV[1], tonumber(ARGV[2])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('ZADD', flushers, now, me)
redis.call('ZREMRANGEBYSCORE', flushers, '-inf', now - lease_ms)
local alive = redis.call('ZCARD', flushers)

local held, count = {}, {}
local function share(kind) return math.ceil(count[kind] / alive) end

for i = 3, #ARGV, 2 do count[ARGV[i]] = (count[ARGV[i]] or 0) + 1 end
local mine, number = {}, {}
for i = 3, #ARGV, 2 do
  local kind, name = ARGV[i], ARGV[i + 1]
  if redis.call('HGET', leases, name) == me then
    if (number[kind] or 0) < share(kind) then
      number[kind] = (number[kind] or 0) + 1
      mine[#mine + 1] = name
    else
      redis.call('HDEL', leases, name)
      held[name] = true
    end
  end
end
for i = 3, #ARGV, 2 do
  local kind, name = ARGV[i], ARGV[i + 1]
  local owner = redis.call('HGET', leases, name)
  local is_free = not owner or not redis.call('ZSCORE', flushers, owner)
  if is_free and not held[name] and (number[kind] or 0) < share(kind) then
    redis.call('HSET', leases, name, me)
    number[kind] = (number[kind] or 0) + 1
    mine[#mine + 1] = name
  end
end
return mine
"""


class Leases:
    """What one flusher holds. Raises redis' errors; what is held then is still held."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._here = f"{socket.gethostname()}/{_processes_namespace()}/"
        self._me = f"{self._here}{os.getpid()}/{uuid.uuid4().hex[:8]}"
        self._share = redis.register_script(_SHARE)

    async def renew(self, queues: Iterable[RecordQueue]) -> set[str]:
        """Give the names of the lists, of those that there are, that are this flusher's now."""
        await self._forget_the_dead()
        named = [text for queue in queues for text in (queue.kind, queue.name)]
        mine: list[bytes] = await self._share(
            keys=[FLUSHERS, LEASES], args=[self._me, int(LEASE_SECONDS * 1000), *named]
        )
        await failpoints.reach("leases.shared")
        return {name.decode() for name in mine}

    async def release(self) -> None:
        """Leave everything to the others."""
        await self._redis.zrem(FLUSHERS, self._me)
        await failpoints.reach("leases.released")

    async def _forget_the_dead(self) -> None:
        names: list[bytes] = await self._redis.zrange(FLUSHERS, 0, -1)  # type: ignore[assignment]  # scores are not asked for
        await failpoints.reach("leases.holders_read")
        if dead := [name for name in names if self._is_dead(name.decode())]:
            await self._redis.zrem(FLUSHERS, *dead)
            await failpoints.reach("leases.dead_forgotten")

    def _is_dead(self, name: str) -> bool:
        """Tell whether a flusher of this host has ended; of others it is not known."""
        if not name.startswith(self._here):
            return False
        try:
            os.kill(int(name.removeprefix(self._here).partition("/")[0]), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


def _processes_namespace() -> str:
    """Name what process ids here are relative to: containers have each their own."""
    with suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""
