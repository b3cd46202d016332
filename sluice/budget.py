"""One rate budget for everything that asks a venue from this address, kept in Redis.

A venue counts the weight of requests by address, not by process. Two bounds hold at once:

- our own pace, a token bucket that refills with four fifths of the venue's weight a minute and
  holds one fifth, so that no minute, wherever it begins, sees more than the whole;
- the venue's word: what it reports as used this minute bounds what is left of the minute.

A request of lower priority must leave a reserve for those above it. Where the venue says to stay
away, all processes do, to the millisecond by the clock of Redis.
"""

import asyncio
import enum
import time
from typing import Final

from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from sluice import failpoints
from sluice.exchanges.base import Exchange
from sluice.queue import budget_key

BURST: Final = 0.2
"""What the bucket holds, as a part of the venue's weight a minute; it refills with the rest."""
ALONE: Final = 0.125
"""The part of the pace a process allows itself while Redis, and so the others, is out of sight."""
_LEAST_WAIT: Final = 0.05
_MILLIS: Final = 1000


class Priority(enum.IntEnum):
    """What a request is for; the value is the part of the bucket, in eighths, it must leave."""

    LIVE_IMAGE = 0
    """A book that was live has lost its place."""
    IMAGE = 1
    """A book begins, or is renewed before it must be."""
    POLL = 2
    """The newest trades, where there is no socket to bring them."""
    BACKFILL = 3
    """Trades that the socket did not bring."""
    AUDIT = 5
    """A check that can wait."""


# State of the bucket: `tokens` at `stamp`; `left` of the venue's minute that ends at `minute_end`;
# `until`, before which nobody asks. All times are milliseconds by the clock of Redis.
_ACQUIRE: Final = """#!lua flags=allow-oom
local weight, need, burst = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local per_ms, pause = tonumber(ARGV[4]), tonumber(ARGV[5])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local state = redis.call('HMGET', KEYS[1], 'tokens', 'stamp', 'until', 'left', 'minute_end')
local tokens, stamp = tonumber(state[1] or burst), tonumber(state[2] or now)
local till, left = tonumber(state[3] or 0), tonumber(state[4])
if left and now >= tonumber(state[5]) then left = nil end
tokens = math.min(burst, tokens + math.max(0, now - stamp) * per_ms)
till = math.max(till, now + pause)
local wait = 0
if now < till then
  wait = till - now
elseif left and left < need then
  wait = tonumber(state[5]) - now
elseif tokens < need then
  wait = math.ceil((need - tokens) / per_ms)
else
  tokens = tokens - weight
  if left then redis.call('HSET', KEYS[1], 'left', left - weight) end
end
redis.call('HSET', KEYS[1], 'tokens', string.format('%.6f', tokens),
  'stamp', string.format('%.0f', now), 'until', string.format('%.0f', till))
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.max(600000, till - now + 60000)))
return wait
"""

_REPORT: Final = """#!lua flags=allow-oom
local clock = redis.call('TIME')
redis.call('HSET', KEYS[1], 'left', ARGV[1],
  'minute_end', string.format('%.0f', (math.floor(clock[1] / 60) + 1) * 60000))
return 0
"""


class Budget:
    """What one venue lets this address ask, shared through Redis by all processes."""

    def __init__(self, redis: Redis, exchange: Exchange) -> None:
        self._exchange = exchange.name
        self._limit = exchange.weight_per_minute
        self._burst = self._limit * BURST
        self._per_second = self._limit * (1 - BURST) / 60
        self._key = budget_key(exchange.name)
        self._acquire = redis.register_script(_ACQUIRE)
        self._report = redis.register_script(_REPORT)
        self._paused_until = 0.0
        self._is_alone = False
        self._tokens = self._burst * ALONE
        self._stamp = time.monotonic()
        self.spent = 0
        """The weight this process was granted."""

    async def acquire(self, weight: int, priority: Priority) -> None:
        """Wait until a request of this weight may be sent, and take it from the budget."""
        while wait := await self._wait(weight, priority):  # noqa: ASYNC110  # Redis sends no event
            await asyncio.sleep(max(wait, _LEAST_WAIT))
        self.spent += weight

    async def report(self, used: int) -> None:
        """Note what the venue says this address has used of its minute."""
        try:
            await self._report(keys=[self._key], args=[max(0, self._limit - used)])
            await failpoints.reach("budget.reported")
        except (RedisError, OSError) as error:
            logger.debug("budget of {}: not reported: {}", self._exchange, error)

    async def pause(self, seconds: float) -> None:
        """Let no process ask for so long: the venue said so."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)
        # Asking for nothing carries the pause to Redis; if Redis is away, the next request does.
        await self._ask(0, 0)

    async def _wait(self, weight: int, priority: Priority) -> float:
        """Take the weight and give 0, or give the seconds after which to ask again."""
        # What the bucket can never hold would be waited for in vain.
        need = min(weight + self._burst * priority / 8, self._burst)
        wait = await self._ask(weight, need)
        return self._wait_alone(weight) if wait is None else wait

    async def _ask(self, weight: int, need: float) -> float | None:
        pause = max(0, int((self._paused_until - time.monotonic()) * _MILLIS))
        arguments = [weight, need, self._burst, self._per_second / _MILLIS, pause]
        try:
            wait = await self._acquire(keys=[self._key], args=arguments)
            await failpoints.reach("budget.asked")
        except (RedisError, OSError) as error:
            if not self._is_alone:
                logger.warning(
                    "budget of {}: Redis is out of reach ({}), asking at an eighth of the pace",
                    self._exchange,
                    error,
                )
                self._is_alone = True
            return None
        self._is_alone = False
        return int(wait) / _MILLIS

    def _wait_alone(self, weight: int) -> float:
        now = time.monotonic()
        pace = self._per_second * ALONE
        self._tokens = min(self._burst * ALONE, self._tokens + (now - self._stamp) * pace)
        self._stamp = now
        if now < self._paused_until:
            return self._paused_until - now
        # One request may be heavier than the bucket of one process: it goes into debt.
        if self._tokens < min(weight, self._burst * ALONE):
            return (min(weight, self._burst * ALONE) - self._tokens) / pace
        self._tokens -= weight
        return 0.0
