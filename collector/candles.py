"""Windows of candles are refilled from REST, newest first, a page at a time.

The windows, and how far each has been refilled, stand in Redis; a kill at any point costs one page.
What a page proves is decided by `read_candles`, a function of values.
"""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec
from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from collector.aggregates import UnorderedPageError
from collector.backfill import (
    LEASE_MS,
    MOST_RETRY_SECONDS,
    REFUSALS,
    RETRY_SECONDS,
    SIGHTINGS,
    UNSERVED,
    Venue,
)
from collector.ledger import MOST_CAUSE
from collector.windows import KLINE, ends_before
from sluice import failpoints, records
from sluice.backoff import Backoff
from sluice.budget import Priority
from sluice.clock import MICROS_PER_SECOND, now_micros
from sluice.exchanges.base import BadFrameError
from sluice.queue import PREFIX, WINDOWS, WINDOWS_FILLED, RecordQueue
from sluice.records import Gap, Kline
from sluice.rest import RestError
from sluice.settings import Market

POLL_SECONDS: Final = 0.5
SURELY_CLOSED: Final = 600 * MICROS_PER_SECOND
"""How long ago by our clock a candle must have closed for the venue's not to be asked."""

Window = tuple[int, int]
"""From and to, microseconds, the end not included."""


@dataclass(frozen=True, slots=True)
class CandlePage:
    """What one answer says of a window.

    `missing` are the windows between candles, or before the first, for which there is none. `until`
    is how far the answer goes; with `is_last` there is no more to be had before the window's end.
    """

    candles: list[Kline]
    missing: list[Window]
    until: int
    is_last: bool


def read_candles(
    window: Window, answer: Sequence[Kline], page_size: int, venue_now: int
) -> CandlePage:
    """Compare an answer to 'candles that open in the window' with it; open candles are left out.

    Raises:
        UnorderedPageError: candles repeat, descend, overlap, or lie before the window.
    """
    until, end = window
    candles: list[Kline] = []
    missing: list[Window] = []
    for candle in answer:
        if candle.ts_open < until or candle.ts_close <= candle.ts_open:
            raise UnorderedPageError(f"a candle of {candle.ts_open} where {until} was due")
        if candle.ts_open >= end:
            break
        # A window asked for by hand may begin within a candle.
        if candle.ts_open - until >= ends_before(candle) - candle.ts_open:
            missing.append((until, candle.ts_open))
        if candle.ts_close >= venue_now:
            return CandlePage(candles, missing, end, is_last=True)
        candles.append(candle)
        until = ends_before(candle)
    is_last = until >= end or len(answer) < page_size or answer[-1].ts_open >= end
    length = ends_before(candles[-1]) - candles[-1].ts_open if candles else 0
    if is_last and end - until >= max(length, 1):
        missing.append((until, end))
    return CandlePage(candles, missing, end if is_last else until, is_last=is_last)


@dataclass(slots=True)
class _Attempts:
    backoff: Backoff = field(default_factory=lambda: Backoff(RETRY_SECONDS, MOST_RETRY_SECONDS))
    due: float = 0.0
    refusals: int = 0
    sightings: Counter[Window] = field(default_factory=Counter)


class Candles:
    """Refills the windows of these markets' candles; any number may run side by side."""

    def __init__(
        self, redis: Redis, venues: Mapping[str, Venue], markets: Collection[Market]
    ) -> None:
        self._redis = redis
        self._venues = venues
        self._markets = markets
        self._queue = RecordQueue(redis, "kline")
        self._gap_queue = RecordQueue(redis, "gap")
        self._token = uuid.uuid4().hex
        self._attempts: dict[str, _Attempts] = {}
        self.open_gaps = 0
        self.pages = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`; what fails is tried again, for ever."""
        backoff = Backoff(first=0.2, most=5.0)
        while not stop.is_set():
            delay = POLL_SECONDS
            try:
                if await self._step():
                    delay = 0.001
                if backoff.failures:
                    logger.info("candles: Redis answers again")
                backoff.reset()
            except (RedisError, OSError) as error:
                if not backoff.failures:
                    logger.warning("candles: Redis: {}; nothing is lost, trying again", error)
                delay = backoff.next_delay()
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await stop.wait()

    async def _step(self) -> bool:
        """Fetch one page; tells whether there was one to fetch."""
        kept = [msgspec.json.decode(item, type=Gap) for item in await self._redis.hvals(WINDOWS)]
        await failpoints.reach("candles.windows_read")
        gaps = [
            gap
            for gap in kept
            if Market(gap.exchange, gap.symbol) in self._markets and gap.channel.startswith(KLINE)
        ]
        self.open_gaps = len(gaps)
        known = {gap.gap_id for gap in gaps}
        self._attempts = {key: kept for key, kept in self._attempts.items() if key in known}
        for gap in sorted(gaps, key=lambda gap: gap.ts_to or 0, reverse=True):
            attempts = self._attempts.setdefault(gap.gap_id, _Attempts())
            if attempts.due > time.monotonic():
                continue
            # It is not given back: two collectors take turns, and it ends by itself.
            lease = f"{PREFIX}:lease:candles:{gap.gap_id}"
            holder = await self._redis.set(lease, self._token, nx=True, px=LEASE_MS, get=True)
            await failpoints.reach("candles.leased")
            if holder not in (None, self._token.encode()):
                continue
            await self._fetch(gap, attempts)
            return True
        return False

    async def _fetch(self, gap: Gap, attempts: _Attempts) -> None:
        venue = self._venues[gap.exchange]
        filled = await self._redis.hget(WINDOWS_FILLED, gap.gap_id)
        await failpoints.reach("candles.filled_read")
        assert gap.ts_from is not None and gap.ts_to is not None  # noqa: S101, PT018  # windows have times
        window = (int(filled or gap.ts_from), gap.ts_to)
        gap = _revised(gap, tries=gap.tries + 1)
        await self._keep(gap)
        self.pages += 1
        try:
            page = await self._ask(venue, gap, window)
        except RestError as error:
            self._postpone(gap, attempts, error)
            attempts.refusals += error.refusal is not None and error.refusal.kind in UNSERVED
            if attempts.refusals >= REFUSALS:
                logger.error("{}: candles are lost: {}", gap.gap_id, error)
                await self._close(gap, "lost", f"{gap.cause}; {error}")
            return
        except (BadFrameError, UnorderedPageError) as error:
            self._postpone(gap, attempts, error)
            return
        await failpoints.reach("candles.page_read")
        if page.candles:
            await self._queue.push([records.encode(candle) for candle in page.candles])
            await failpoints.reach("candles.page_pushed")
        attempts.sightings.update(page.missing)
        if any(attempts.sightings[missing] < SIGHTINGS for missing in page.missing):
            self._postpone(gap, attempts)
            return
        if page.missing == [(gap.ts_from, gap.ts_to)]:
            await self._close(gap, "absent", f"{gap.cause}; the exchange has no such candles")
            return
        for missing in page.missing:
            await self._gap_queue.push([records.encode(_absent(gap, missing))])
            await failpoints.reach("candles.absence_pushed")
        if page.is_last:
            await self._close(gap, "filled", gap.cause)
        else:
            await self._redis.hset(WINDOWS_FILLED, gap.gap_id, str(page.until))
            await failpoints.reach("candles.filled_noted")

    async def _ask(self, venue: Venue, gap: Gap, window: Window) -> CandlePage:
        exchange, interval = venue.exchange, gap.channel.removeprefix(KLINE)
        request = exchange.klines_request(gap.symbol, interval, window[0], window[1] - 1)
        body = await venue.rest.get(request, Priority.BACKFILL)
        now = now_micros()
        answer = exchange.read_klines(gap.symbol, interval, body, now)
        if answer and answer[-1].ts_close > now - SURELY_CLOSED:
            clock = await venue.rest.get(exchange.time_request(), Priority.BACKFILL)
            now = exchange.read_time(clock)
        return read_candles(window, answer, exchange.klines_page, now)

    def _postpone(self, gap: Gap, attempts: _Attempts, error: Exception | None = None) -> None:
        delay = attempts.backoff.next_delay()
        attempts.due = time.monotonic() + delay
        if error is not None:
            logger.warning("{}: asking again in {:.1f} s: {}", gap.gap_id, delay, error)

    async def _keep(self, gap: Gap) -> None:
        await self._gap_queue.push([records.encode(gap)])
        await failpoints.reach("candles.gap_pushed")
        await self._redis.hset(WINDOWS, gap.gap_id, records.encode(gap))
        await failpoints.reach("candles.gap_kept")

    async def _close(
        self, gap: Gap, status: Literal["filled", "absent", "lost"], cause: str
    ) -> None:
        closed = _revised(gap, status=status, cause=cause[:MOST_CAUSE], ts_closed=now_micros())
        await self._gap_queue.push([records.encode(closed)])
        await failpoints.reach("candles.end_pushed")
        await self._redis.hdel(WINDOWS, gap.gap_id)
        await failpoints.reach("candles.gap_closed")
        await self._redis.hdel(WINDOWS_FILLED, gap.gap_id)
        await failpoints.reach("candles.filled_forgotten")


def _revised(gap: Gap, **changes: object) -> Gap:
    return msgspec.structs.replace(gap, revision=max(gap.revision + 1, now_micros()), **changes)


def _absent(gap: Gap, window: Window) -> Gap:
    now = now_micros()
    return msgspec.structs.replace(
        gap,
        gap_id=f"{gap.exchange}:{gap.symbol}:{gap.channel}:{window[0]}-{window[1]}",
        ts_from=window[0],
        ts_to=window[1],
        cause="the exchange has no such candles",
        status="absent",
        revision=now,
        ts_opened=now,
        ts_closed=now,
    )
