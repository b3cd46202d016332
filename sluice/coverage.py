"""Until when a stream without ids is covered, by whichever process, and the windows that are not.

The state belongs to the market and stands in Redis, so a restart, and a process that died, leave a
window behind just as a broken sequence does; and while another process covers a market there is
none. Times are the exchange's, microseconds.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from sluice import failpoints, records
from sluice.clock import now_micros
from sluice.queue import BOOKS_COVERED, WINDOWS, RecordQueue, head_field
from sluice.records import Gap
from sluice.settings import Market

RENEWAL_SECONDS: Final = 1.0
SETTLE_SECONDS: Final = 2.5
"""How long another process has to show that it covered a market: two renewals and some."""
DEPTH: Final = "depth"

# Time only moves on: of two processes the one that is further counts.
_COVER: Final = """#!lua flags=allow-oom
for i = 1, #ARGV, 2 do
  local held = tonumber(redis.call('HGET', KEYS[1], ARGV[i]) or 0)
  if tonumber(ARGV[i + 1]) > held then redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
end
return 0
"""


@dataclass(frozen=True, slots=True)
class Return:
    """A stream is there again from `ts_live` on; `ts_lost` is when it was last, None at a start."""

    market: Market
    ts_live: int
    ts_lost: int | None
    cause: str


def missed_window(back: Return, covered: int | None) -> tuple[int, int] | None:
    """Give the window that nobody covered; `covered` is until when any other process did."""
    start = max((ts for ts in (back.ts_lost, covered) if ts is not None), default=back.ts_live)
    return (start, back.ts_live) if start < back.ts_live else None


class Coverage:
    """Notes how far this process got with one stream of its markets, and names what was missed.

    A window is named in the queue of gaps before the note moves past it: who dies in between names
    it again. With status `open` it is also kept in the hash WINDOWS, for whoever refills it.
    """

    def __init__(
        self,
        redis: Redis,
        channel: str = DEPTH,
        *,
        status: Literal["open", "lost"] = "lost",
        notes_key: str = BOOKS_COVERED,
    ) -> None:
        self._redis = redis
        self._channel = channel
        self._status: Literal["open", "lost"] = status
        self._notes_key = notes_key
        self._cover = redis.register_script(_COVER)
        self._gap_queue = RecordQueue(redis, "gap")
        self._until: dict[Market, int] = {}
        self._returns: list[tuple[float, Return]] = []
        self._closing = asyncio.Event()
        self.windows = 0

    def covers(self, market: Market, ts_event: int) -> None:
        """Note that everything up to an event is held."""
        self._until[market] = ts_event

    def returned(self, back: Return) -> None:
        """Note a return; whether anything was missed is judged a little later."""
        self._returns.append((time.monotonic() + SETTLE_SECONDS, back))

    def close(self) -> None:
        """Have `run` judge and note what is left, and end."""
        self._closing.set()

    async def run(self) -> None:
        """Keep the notes in Redis until closed."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEWAL_SECONDS):
                    await self._closing.wait()
            is_final = self._closing.is_set()
            try:
                await self.flush(is_final=is_final)
            except (RedisError, OSError) as error:
                logger.debug("coverage of {}: not noted: {}", self._channel, error)
            if is_final:
                return

    async def flush(self, *, is_final: bool = False) -> None:
        """Name the windows missed, then move the notes on; raises redis' errors.

        At the end, `is_final`, nothing is left to be judged later.
        """
        now = time.monotonic()
        judged = [entry for entry in self._returns if is_final or entry[0] <= now]
        if judged:
            await self._judge([back for _, back in judged])
            self._returns = [entry for entry in self._returns if entry not in judged]
        # Until a return is judged the note must be others' alone.
        waiting = {back.market for _, back in self._returns}
        ready = {market: ts for market, ts in self._until.items() if market not in waiting}
        if ready:
            pairs = [item for market, ts in ready.items() for item in (self._field(market), ts)]
            await self._cover(keys=[self._notes_key], args=pairs)
            await failpoints.reach("coverage.noted")
            for market, ts in ready.items():
                # Another flush, the last one of all, may have noted it meanwhile.
                if self._until.get(market) == ts:
                    del self._until[market]

    async def _judge(self, returns: list[Return]) -> None:
        notes = await self._redis.hmget(
            self._notes_key, [self._field(back.market) for back in returns]
        )
        await failpoints.reach("coverage.read")
        gaps = {}
        for back, note in zip(returns, notes, strict=True):
            window = missed_window(back, None if note is None else int(note))
            if window is not None:
                gap = gap_of(back, self._channel, window, self._status, now_micros())
                gaps[gap.gap_id] = records.encode(gap)
        if gaps:
            await self._name(gaps)
            self.windows += len(gaps)

    async def _name(self, gaps: Mapping[str, bytes]) -> None:
        if self._status == "open":
            await self._redis.hset(WINDOWS, items=[part for pair in gaps.items() for part in pair])
            await failpoints.reach("coverage.windows_kept")
        await self._gap_queue.push(list(gaps.values()))
        await failpoints.reach("coverage.windows_pushed")

    def _field(self, market: Market) -> str:
        return head_field(market.exchange, market.symbol, self._channel)


def gap_of(
    back: Return,
    channel: str,
    window: tuple[int, int],
    status: Literal["open", "lost"],
    now: int,
) -> Gap:
    """Name a window; `now` is when it was found."""
    start, end = window
    stream = head_field(back.market.exchange, back.market.symbol, channel)
    return Gap(
        exchange=back.market.exchange,
        symbol=back.market.symbol,
        gap_id=f"{stream}:{start}",
        channel=channel,
        from_id=None,
        to_id=None,
        ts_from=start,
        ts_to=end,
        cause=back.cause,
        status=status,
        tries=0,
        revision=0 if status == "lost" else now,
        ts_opened=now,
        ts_closed=None if status == "open" else now,
    )
