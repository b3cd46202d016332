"""The latest books: one Redis hash a market, which holds the truth or is not there.

`data` is `{"bids": [[price, size], …], "asks": …}` from the best level on, `timestamp` the
exchange's time of the last event in it (microseconds), `update_id` its id, `sync_id` the sync it
belongs to and `state` is `live`. A hash is deleted when its book loses its place and when the
process stops, and expires by itself EXPIRY_MS after its last renewal.

With PUBLISH_LIVE every book written is also published, with its ids and time in the same object.

Between processes the newer sync wins, and a market's update id never goes back: below a deleted
hash its id stays as a floor until it would have expired.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from sluice import failpoints
from sluice.queue import book_floor_key, book_key, live_book_channel
from sluice.records import Level
from sluice.settings import Market

RENEWAL_SECONDS: Final = 1.0
EXPIRY_MS: Final = 3000
"""Three renewals: a reader never meets what a dead process left for longer."""
ROUND_SECONDS: Final = 0.02
"""The least time between two rounds of writing: the events of one instant share a round."""
_RETRY_SECONDS: Final = 0.5
_BOOKS_A_ROUND: Final = 100

# For each book: KEYS hash, floor; ARGV sync, update, timestamp, data, channel ('' for none).
_WRITE: Final = """
local ttl = ARGV[1]
local written = {}
for i = 1, #KEYS / 2 do
  local hash, floor = KEYS[2 * i - 1], KEYS[2 * i]
  local at = 5 * i - 3
  local sync, update = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  local held = redis.call('HMGET', hash, 'sync_id', 'update_id')
  local held_sync, held_update = tonumber(held[1] or 0), tonumber(held[2])
  if not held_update then held_update = tonumber(redis.call('GET', floor) or -1) end
  written[i] = 0
  if sync == held_sync and update == held_update then
    redis.call('PEXPIRE', hash, ttl)
  elseif sync >= held_sync and update > held_update then
    redis.call('HSET', hash, 'sync_id', ARGV[at], 'update_id', ARGV[at + 1],
      'timestamp', ARGV[at + 2], 'data', ARGV[at + 3], 'state', 'live')
    redis.call('PEXPIRE', hash, ttl)
    if ARGV[at + 4] ~= '' then
      redis.call('PUBLISH', ARGV[at + 4], string.format(
        '{"update_id":%s,"sync_id":%s,"timestamp":%s,%s',
        ARGV[at + 1], ARGV[at], ARGV[at + 2], string.sub(ARGV[at + 3], 2)))
    end
    written[i] = 1
  end
end
return written
"""

# For each book: KEYS hash, floor; ARGV the highest sync that is ours to delete.
_DELETE: Final = """#!lua flags=allow-oom
for i = 1, #KEYS / 2 do
  local hash, floor = KEYS[2 * i - 1], KEYS[2 * i]
  local held = redis.call('HMGET', hash, 'sync_id', 'update_id')
  if held[1] and tonumber(held[1]) == tonumber(ARGV[i + 1]) then
    redis.call('DEL', hash)
    redis.call('SET', floor, held[2], 'PX', ARGV[1])
  end
end
return 0
"""


@dataclass(frozen=True, slots=True)
class LatestBook:
    """The top of one book at one update id, best level first."""

    sync_id: int
    update_id: int
    ts_event: int
    bids: Sequence[Level]
    asks: Sequence[Level]


class LatestBooks:
    """Keeps the hashes of many markets; `read` gives a market's book, or None if none is live.

    `changed` and `lost` only note what has to be done, `run` does it.
    """

    def __init__(
        self,
        redis: Redis,
        read: Callable[[Market], LatestBook | None],
        *,
        is_published: bool,
        expiry_ms: int = EXPIRY_MS,
    ) -> None:
        self._read = read
        self._expiry_ms = expiry_ms
        self._is_published = is_published
        self._write_script = redis.register_script(_WRITE)
        self._delete_script = redis.register_script(_DELETE)
        self._changed: dict[Market, None] = {}
        self._lost: dict[Market, int] = {}
        self._wake = asyncio.Event()
        self._is_closed = False
        self.written = 0
        self.refused = 0
        """Writes that a newer sync or update of another process had overtaken."""
        self.failures = 0

    def changed(self, market: Market) -> None:
        """Note that a market's book has changed, or is to be renewed."""
        self._changed[market] = None
        self._wake.set()

    def lost(self, market: Market, sync_id: int) -> None:
        """Note that a sync is over: what the hash holds of it must go."""
        self._changed.pop(market, None)
        self._lost[market] = sync_id
        self._wake.set()

    def close(self) -> None:
        """Have `run` do what is noted and end.

        It is not cancelled: a write under way could then still reach Redis after a deletion.
        """
        self._is_closed = True
        self._wake.set()

    async def run(self) -> None:
        """Write and delete until closed."""
        while not self._is_closed:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self.flush()
            except (RedisError, OSError) as error:
                self.failures += 1
                logger.debug("latest books: not written: {}", error)
                self._wake.set()
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                await asyncio.sleep(ROUND_SECONDS)
        try:
            await self.flush()
        except (RedisError, OSError) as error:
            logger.warning("latest books: not deleted at the end ({}); they expire", error)

    async def flush(self) -> None:
        """Do what was noted; raises redis' errors and leaves what was not done noted."""
        while self._lost:
            lost = dict(self._lost)
            await self._delete_script(
                keys=[key for market in lost for key in _keys(market)],
                args=[self._expiry_ms, *lost.values()],
            )
            await failpoints.reach("latest.deleted")
            # A book may have come back and been lost again meanwhile.
            for market, sync_id in lost.items():
                if self._lost.get(market) == sync_id:
                    del self._lost[market]
        waiting = list(self._changed)
        for start in range(0, len(waiting), _BOOKS_A_ROUND):
            await self._write(waiting[start : start + _BOOKS_A_ROUND])

    async def _write(self, markets: Sequence[Market]) -> None:
        keys: list[str] = []
        arguments: list[str | bytes | int] = [self._expiry_ms]
        for market in markets:
            self._changed.pop(market, None)
            # Read as late as possible: a book lost a moment ago has nothing to write.
            book = self._read(market)
            if book is None:
                continue
            channel = live_book_channel(*_name(market)) if self._is_published else ""
            keys += _keys(market)
            arguments += (book.sync_id, book.update_id, book.ts_event, _data(book), channel)
        if not keys:
            return
        try:
            results = await self._write_script(keys=keys, args=arguments)
            await failpoints.reach("latest.written")
        except (RedisError, OSError):
            self._changed.update(dict.fromkeys(markets))
            raise
        self.written += sum(results)
        self.refused += len(results) - sum(results)


def _name(market: Market) -> tuple[str, str]:
    return market.exchange, market.symbol


def _keys(market: Market) -> tuple[str, str]:
    return book_key(*_name(market)), book_floor_key(*_name(market))


def _data(book: LatestBook) -> bytes:
    return msgspec.json.encode({"bids": book.bids, "asks": book.asks})
