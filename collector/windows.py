"""What was missed of the streams without ids: candles, tickers.

Closed candles follow one another in time, so a missing one shows by the next one's opening.
Tickers do not: what lies between the last one before a socket ended and the first one after is a
window that nobody can fill.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final

from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from sluice.coverage import RENEWAL_SECONDS, Coverage, Return
from sluice.publisher import Publisher
from sluice.queue import STREAMS_COVERED
from sluice.records import Kline, Ticker
from sluice.settings import Market

KLINE: Final = "kline_"
MICROS_PER_MS: Final = 1000
CAUSE: Final = "missed on the socket"


def ends_before(candle: Kline) -> int:
    """Give when the next candle opens (microseconds): a close time is the last millisecond."""
    return candle.ts_close + MICROS_PER_MS


class Windows:
    """Judges the records of streams without ids, and notes in Redis how far each is recorded.

    A note moves only once the publisher has let go of what it speaks of, so who is killed between
    the two finds a window, never a silent loss.
    """

    def __init__(self, redis: Redis, publisher: Publisher) -> None:
        self._redis = redis
        self._publisher = publisher
        self._coverages: dict[str, Coverage] = {}
        self._until: dict[tuple[str, Market], int] = {}
        self._broken: set[tuple[str, Market]] = set()
        self._new: dict[tuple[str, Market], int] = {}
        self._marked: deque[tuple[int, dict[tuple[str, Market], int]]] = deque()

    def follow(self, streams: Sequence[str]) -> None:
        """Judge these streams from now on; what is missed of others is told where they return."""
        for stream in set(streams).difference(self._coverages):
            self._coverages[stream] = Coverage(
                self._redis,
                stream,
                status="open" if stream.startswith(KLINE) else "lost",
                notes_key=STREAMS_COVERED,
            )
        self._broken |= {key for key in self._until if key[0] not in streams}

    @property
    def found(self) -> int:
        """How many windows were missed."""
        return sum(coverage.windows for coverage in self._coverages.values())

    def read(self, record: Kline | Ticker) -> None:
        """Judge a record that was just put."""
        market = Market(record.exchange, record.symbol)
        if isinstance(record, Kline):
            self._judge(f"{KLINE}{record.interval}", market, record.ts_open, ends_before(record))
        else:
            self._judge(record.kind, market, record.ts_event, record.ts_event)

    def broken(self, markets: Iterable[Market]) -> None:
        """Note that the socket of these markets has ended or was silent."""
        self._broken |= {
            (stream, market)
            for market in markets
            for stream in self._coverages
            if not stream.startswith(KLINE)
        }

    def _judge(self, stream: str, market: Market, start: int, end: int) -> None:
        if stream not in self._coverages:
            return
        key = (stream, market)
        until = self._until.get(key)
        if until is not None and end <= until:
            return  # it came twice, or late
        is_missed = start > (until or 0) if stream.startswith(KLINE) else key in self._broken
        if until is None or is_missed:
            self._coverages[stream].returned(Return(market, start, until, CAUSE))
        self._broken.discard(key)
        self._until[key] = self._new[key] = end

    async def run(self, stop: asyncio.Event) -> None:
        """Keep the notes in Redis until `stop`; its errors never leave here."""
        while not stop.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEWAL_SECONDS):
                    await stop.wait()
            await self._flush(is_final=False)

    async def finish(self) -> None:
        """Judge and note what is left, once the publisher has ended."""
        for _ in range(2):
            await self._flush(is_final=True)

    async def _flush(self, *, is_final: bool) -> None:
        counts = self._publisher.counts
        settled = sum(counts.pushed.values()) + counts.spooled + counts.shed
        while self._marked and self._marked[0][0] <= settled:
            _, covered = self._marked.popleft()
            for (stream, market), end in covered.items():
                self._coverages[stream].covers(market, end)
        if self._new:
            self._marked.append((sum(counts.put.values()), self._new))
            self._new = {}
        for stream, coverage in list(self._coverages.items()):
            try:
                await coverage.flush(is_final=is_final)
            except (RedisError, OSError) as error:
                logger.debug("coverage of {}: not noted: {}", stream, error)
