"""Holes are filled from REST, by id, newest first, a page at a time.

Nothing is remembered between pages: each begins with the holes as Redis has them, so a kill at any
point costs one page. What a page proves is decided by `read_page`, a function of values.
"""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from collector.ledger import TRADE, Ledger, covers, gaps_key
from sluice import failpoints, records
from sluice.backoff import Backoff
from sluice.budget import Priority
from sluice.clock import now_micros
from sluice.exchanges import Exchange
from sluice.exchanges.base import BadFrameError
from sluice.publisher import contiguous
from sluice.queue import PREFIX, Hole, RecordQueue, holes_key
from sluice.records import Gap, Trade
from sluice.rest import RestClient, RestError

POLL_SECONDS: Final = 0.25
RETRY_SECONDS: Final = 1.0
MOST_RETRY_SECONDS: Final = 30.0
SIGHTINGS: Final = 3
"""How often an answer must pass an id over before it is absent: REST lags behind the socket."""
REFUSALS: Final = 5
"""How often the venue must refuse to serve an id before it is lost."""
LEASE_MS: Final = 20_000
_RELEASE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


@dataclass(frozen=True, slots=True)
class Page:
    """What one answer says of a hole.

    `trades` lie in the hole. `missing` are ranges that the answer passed over: the venue has
    higher ids and not these. `is_last` tells that the answer ends before the hole does and more
    can not be had now.
    """

    trades: list[Trade]
    missing: list[tuple[int, int]]
    is_last: bool


class UnorderedPageError(ValueError):
    """The answer does not ascend from the id asked for; nothing in it proves anything."""


def read_page(hole: Hole, trades: Sequence[Trade], page_size: int) -> Page:
    """Compare an answer to 'trades from `hole.first` on' with the hole.

    Raises:
        UnorderedPageError: ids repeat, descend, or begin before the one asked for.
    """
    expected = hole.first
    within: list[Trade] = []
    missing: list[tuple[int, int]] = []
    for trade in trades:
        if trade.first_id < expected or trade.trade_id < trade.first_id:
            raise UnorderedPageError(f"id {trade.first_id} where at least {expected} was due")
        if expected <= hole.last and trade.first_id > expected:
            missing.append((expected, min(trade.first_id - 1, hole.last)))
        if trade.first_id <= hole.last:
            within.append(trade)
        expected = trade.trade_id + 1
    return Page(within, missing, is_last=expected <= hole.last and len(trades) < page_size)


@dataclass(frozen=True, slots=True)
class Venue:
    """One exchange, and how it is asked."""

    exchange: Exchange
    rest: RestClient


@dataclass(slots=True)
class _Attempts:
    """What this process remembers of a hole: nothing that a restart could not learn again."""

    backoff: Backoff = field(default_factory=lambda: Backoff(RETRY_SECONDS, MOST_RETRY_SECONDS))
    due: float = 0.0
    refusals: int = 0
    sightings: Counter[tuple[int, int]] = field(default_factory=Counter)


class Backfill:
    """Names the holes of all markets and fills them, one page at a time.

    Any number of collectors may run it side by side: a lease in Redis keeps two from asking for the
    same page, and where it fails the unique key drops what came twice.
    """

    def __init__(
        self, redis: Redis, ledgers: Sequence[Ledger], venues: Mapping[str, Venue], settle_ms: int
    ) -> None:
        self._redis = redis
        self._ledgers = ledgers
        self._venues = venues
        self._settle_ms = settle_ms
        self._queue = RecordQueue(redis, TRADE)
        self._token = uuid.uuid4().hex
        self._release = redis.register_script(_RELEASE)
        self._attempts: dict[tuple[str, int], _Attempts] = {}
        self.pages = 0
        self.filled = 0
        self.open_gaps = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`; what fails is tried again, for ever."""
        backoff = Backoff(first=0.2, most=5.0)
        while not stop.is_set():
            delay = POLL_SECONDS
            try:
                if await self._step():
                    delay = 0.0
                backoff.reset()
            except (RedisError, OSError) as error:
                logger.warning("backfill: Redis: {}; nothing is lost, trying again", error)
                delay = backoff.next_delay()
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), delay or 0.001)

    async def _step(self) -> bool:
        """Settle what is new and fetch one page; tells whether there was one to fetch."""
        work: list[tuple[Hole, Gap, Ledger]] = []
        open_gaps = 0
        for ledger in await self._unsettled():
            gaps = await ledger.settle(self._settle_ms, "missed on the socket")
            open_gaps += len(gaps)
            for hole in await ledger.holes():
                work += [(hole, gap, ledger) for gap in gaps if covers(gap, hole.first, hole.last)]
        self.open_gaps = open_gaps
        known = {(ledger.field, hole.first) for hole, _, ledger in work}
        self._attempts = {key: kept for key, kept in self._attempts.items() if key in known}
        work.sort(key=lambda entry: (entry[0].opened_ms, entry[0].last), reverse=True)
        for hole, gap, ledger in work:
            attempts = self._attempts.setdefault((ledger.field, hole.first), _Attempts())
            if attempts.due > time.monotonic():
                continue
            lease = f"{PREFIX}:lease:backfill:{ledger.field}"
            if not await self._redis.set(lease, self._token, nx=True, px=LEASE_MS):
                continue
            try:
                # Who held the lease before may have filled it.
                if hole in await ledger.holes():
                    await self._fetch(hole, gap, ledger, attempts)
            finally:
                await self._release(keys=[lease], args=[self._token])
            return True
        return False

    async def _unsettled(self) -> list[Ledger]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for ledger in self._ledgers:
                pipeline.zcard(holes_key(ledger.field))
                pipeline.hlen(gaps_key(ledger.field))
            counts = await pipeline.execute()
        pairs = zip(self._ledgers, counts[::2], counts[1::2], strict=True)
        return [ledger for ledger, holes, gaps in pairs if holes or gaps]

    async def _fetch(self, hole: Hole, gap: Gap, ledger: Ledger, attempts: _Attempts) -> None:
        venue = self._venues[ledger.market.exchange]
        symbol, size = ledger.market.symbol, venue.exchange.history_page
        request = venue.exchange.history_request(symbol, hole.first, size)
        await ledger.tried(gap)
        self.pages += 1
        try:
            body = await venue.rest.get(request, Priority.BACKFILL)
            page = read_page(hole, venue.exchange.read_trades(symbol, body, now_micros()), size)
        except RestError as error:
            await self._refused(error, hole, ledger, attempts)
            return
        except (BadFrameError, UnorderedPageError) as error:
            delay = self._postpone(attempts)
            logger.warning("{}: a bad page, asking again in {:.1f} s: {}", gap.gap_id, delay, error)
            return
        await failpoints.reach("backfill.page_read")
        if page.trades:
            items = [records.encode(trade) for trade in page.trades]
            await self._queue.push(items, contiguous(page.trades))
            await failpoints.reach("backfill.page_pushed")
            self.filled += len(items)
        for missing in page.missing:
            attempts.sightings[missing] += 1
            if attempts.sightings[missing] >= SIGHTINGS:
                await ledger.explain(*missing, "absent", "the exchange has no such id")
        if not page.trades and (page.missing or page.is_last):
            self._postpone(attempts)

    async def _refused(
        self, error: RestError, hole: Hole, ledger: Ledger, attempts: _Attempts
    ) -> None:
        delay = self._postpone(attempts)
        kind = error.refusal.kind if error.refusal else None
        logger.warning("{}: asking again in {:.1f} s: {}", ledger.field, delay, error)
        if kind not in ("forbidden", "rejected", "no_such_symbol"):
            return
        attempts.refusals += 1
        if attempts.refusals >= REFUSALS:
            logger.error(
                "{}: trades {} to {} are lost: {}", ledger.field, hole.first, hole.last, error
            )
            await ledger.explain(hole.first, hole.last, "lost", str(error)[:200])

    def _postpone(self, attempts: _Attempts) -> float:
        delay = attempts.backoff.next_delay()
        attempts.due = time.monotonic() + delay
        return delay
