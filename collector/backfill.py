"""Holes are filled from REST, by id, newest first, a page at a time.

Ids that are no longer served one by one are looked for in the venue's aggregates before they are
called absent or lost.

Nothing is remembered between pages: each begins with the holes as Redis has them, so a kill at any
point costs one page. What a page proves is decided by `read_page`, a function of values.
"""

import asyncio
import time
import uuid
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Final, Literal

import asyncpg
from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from collector.aggregates import (
    Aggregates,
    NotYetKnownError,
    Range,
    UnorderedPageError,
    Walk,
    overlap,
    remainder,
    subtract,
)
from collector.ledger import MOST_CAUSE, TRADE, Ledger, covers, gaps_key, touches
from sluice import failpoints, records
from sluice.backoff import Backoff
from sluice.budget import Priority
from sluice.clock import now_micros
from sluice.exchanges import Exchange
from sluice.exchanges.base import BadFrameError
from sluice.publisher import contiguous
from sluice.queue import PREFIX, Hole, RecordQueue, Segment, holes_key
from sluice.records import Gap, Trade
from sluice.rest import RestClient, RestError

POLL_SECONDS: Final = 0.25
RETRY_SECONDS: Final = 1.0
MOST_RETRY_SECONDS: Final = 30.0
SIGHTINGS: Final = 3
"""How often an answer must pass an id over before it is absent: REST lags behind the socket."""
REFUSALS: Final = 5
"""How often the venue must refuse to serve an id before it is lost."""
MOST_PAGES: Final = 20
"""How many pages of aggregates one hole may take before the next hole has its turn."""
LEASE_MS: Final = 20_000
UNSERVED: Final = frozenset({"forbidden", "rejected", "no_such_symbol", "not_found"})
"""Refusals that say nothing of when it might be served."""
OF_AGGREGATES: Final = "stored as aggregates, as the raw trades are no longer served"
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
    missing: list[Range]
    is_last: bool


def read_page(hole: Hole, trades: Sequence[Trade], page_size: int) -> Page:
    """Compare an answer to 'trades from `hole.first` on' with the hole.

    Raises:
        UnorderedPageError: ids repeat, descend, or begin before the one asked for.
    """
    expected = hole.first
    within: list[Trade] = []
    missing: list[Range] = []
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
    aggregate_refusals: int = 0
    empty: int = 0
    sightings: Counter[Range] = field(default_factory=Counter)


class Backfill:
    """Names the holes of all markets and fills them, one page at a time.

    Any number of collectors may run it side by side: a lease in Redis keeps two from asking for the
    same page, and where it fails the unique key drops what came twice.
    """

    def __init__(
        self,
        redis: Redis,
        ledgers: Sequence[Ledger],
        venues: Mapping[str, Venue],
        settle_ms: int,
        aggregates: Aggregates | None = None,
    ) -> None:
        self._redis = redis
        self._ledgers = ledgers
        self._venues = venues
        self.settle_ms = settle_ms
        self._aggregates = aggregates
        self._queue = RecordQueue(redis, TRADE)
        self._token = uuid.uuid4().hex
        self._release = redis.register_script(_RELEASE)
        self._attempts: dict[tuple[str, int], _Attempts] = {}
        self._unserved_until: dict[str, int] = defaultdict(lambda: -1)
        """Up to which id of each stream the venue has passed over everything asked for."""
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
                if backoff.failures:
                    logger.info("backfill: Redis answers again")
                backoff.reset()
            except (RedisError, OSError) as error:
                if not backoff.failures:
                    logger.warning("backfill: Redis: {}; nothing is lost, trying again", error)
                delay = backoff.next_delay()
            with suppress(TimeoutError):
                async with asyncio.timeout(delay or 0.001):
                    await stop.wait()

    async def _step(self) -> bool:
        """Settle what is new and fetch one page; tells whether there was one to fetch."""
        work: list[tuple[Hole, Gap, Ledger]] = []
        open_gaps = 0
        for ledger in await self._unsettled():
            gaps = await ledger.settle(self.settle_ms, "missed on the socket")
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
            lease = _lease(ledger)
            await failpoints.reach("backfill.leasing")
            if not await self._redis.set(lease, self._token, nx=True, px=LEASE_MS):
                continue
            try:
                # Who held the lease before may have filled it.
                if hole in await ledger.holes():
                    await self._fetch(hole, gap, ledger, attempts)
            finally:
                await self._release(keys=[lease], args=[self._token])
                await failpoints.reach("backfill.released")
            return True
        return False

    async def _unsettled(self) -> list[Ledger]:
        ledgers = list(self._ledgers)
        async with self._redis.pipeline(transaction=False) as pipeline:
            for ledger in ledgers:
                pipeline.zcard(holes_key(ledger.field))
                pipeline.hlen(gaps_key(ledger.field))
            counts = await pipeline.execute()
            await failpoints.reach("backfill.work_counted")
        pairs = zip(ledgers, counts[::2], counts[1::2], strict=True)
        return [ledger for ledger, holes, gaps in pairs if holes or gaps]

    async def _fetch(self, hole: Hole, gap: Gap, ledger: Ledger, attempts: _Attempts) -> None:
        """Ask for one page of a hole, or for aggregates where the venue is known to have no more.

        What it does not answer is postponed, and explained once that is certain.
        """
        if hole.first <= (last := self._unserved_until[ledger.field]):
            ids = (hole.first, min(hole.last, last))
            left = await self._from_aggregates(ids, gap, ledger, attempts)
            if left != [] or hole in await ledger.holes():
                # The raw trades are asked for after all, but not at once.
                del self._unserved_until[ledger.field]
                self._postpone(gap, attempts)
            return
        venue = self._venues[ledger.market.exchange]
        symbol, size = ledger.market.symbol, venue.exchange.history_page
        request = venue.exchange.history_request(symbol, hole.first, size)
        gap = await ledger.tried(gap)
        self.pages += 1
        try:
            body = await venue.rest.get(request, Priority.BACKFILL)
            page = read_page(hole, venue.exchange.read_trades(symbol, body, now_micros()), size)
        except RestError as error:
            await self._refused(error, hole, gap, ledger, attempts)
            return
        except (BadFrameError, UnorderedPageError) as error:
            self._postpone(gap, attempts, error)
            return
        await self._take(page.trades)
        for missing in page.missing:
            attempts.sightings[missing] += 1
            if attempts.sightings[missing] >= SIGHTINGS:
                why = "the exchange has no such id"
                await self._give_up(missing, "absent", why, gap, ledger, attempts)
        if not page.trades and (page.missing or page.is_last):
            self._postpone(gap, attempts)
            attempts.empty += not page.missing
            if attempts.empty >= REFUSALS:
                attempts.empty = 0
                await self._from_aggregates((hole.first, hole.last), gap, ledger, attempts)

    async def _take(self, trades: Sequence[Trade]) -> None:
        """Push what a page holds of the holes."""
        await failpoints.reach("backfill.page_read")
        if not trades:
            return
        await self._queue.push([records.encode(trade) for trade in trades], contiguous(trades))
        await failpoints.reach("backfill.page_pushed")
        self.filled += len(trades)

    async def _refused(
        self, error: RestError, hole: Hole, gap: Gap, ledger: Ledger, attempts: _Attempts
    ) -> None:
        self._postpone(gap, attempts, error)
        kind = error.refusal.kind if error.refusal else None
        if kind not in UNSERVED:
            return
        attempts.refusals += 1
        if attempts.refusals < REFUSALS:
            return
        ids = (hole.first, hole.last)
        if kind == "not_found":
            # A path that is not there may be there again: nothing is given up for it.
            await self._from_aggregates(ids, gap, ledger, attempts)
        else:
            await self._give_up(ids, "lost", str(error), gap, ledger, attempts)

    async def _give_up(  # noqa: PLR0917  # what is given up, what is said of it, and whose it is
        self,
        ids: Range,
        status: Literal["absent", "lost"],
        cause: str,
        gap: Gap,
        ledger: Ledger,
        attempts: _Attempts,
    ) -> None:
        """Explain ids that are not served, but for those that aggregates still hold."""
        left: list[Range] | None = [ids]
        if self._aggregates is not None:
            left = await self._from_aggregates(ids, gap, ledger, attempts)
        for first, last in left or []:
            if status == "lost":
                logger.error("{}: trades {} to {} are lost: {}", ledger.field, first, last, cause)
            await ledger.explain(first, last, status, cause[:MOST_CAUSE])

    async def _from_aggregates(
        self, ids: Range, gap: Gap, ledger: Ledger, attempts: _Attempts
    ) -> list[Range] | None:
        """Fill ids from aggregates; gives those that have none, or None where that is unsure.

        A venue that has often refused to serve them has none.
        """
        if self._aggregates is None:
            return None
        try:
            return await self._walk(self._aggregates, ids, ledger)
        except (NotYetKnownError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            self._postpone(gap, attempts, error)
        except ValueError as error:
            # A page that is none, or rows that contradict it.
            self._postpone(gap, attempts, error)
        except RestError as error:
            self._postpone(gap, attempts, error)
            if error.refusal and error.refusal.kind in UNSERVED - {"not_found"}:
                attempts.aggregate_refusals += 1
                if attempts.aggregate_refusals >= REFUSALS:
                    return overlap(await _ranges(ledger), ids)
        return None

    async def _walk(self, aggregates: Aggregates, ids: Range, ledger: Ledger) -> list[Range]:
        venue = self._venues[ledger.market.exchange]
        walk = Walk(ids)
        doubts: list[NotYetKnownError] = []
        pages = aggregates.pages(venue.exchange, venue.rest, ledger.market, ids)
        async with aclosing(pages):
            count = 0
            async for page in pages:
                self.pages += 1
                count += 1
                await self._redis.pexpire(_lease(ledger), LEASE_MS)
                await failpoints.reach("backfill.lease_extended")
                added = [row for row in walk.read(page) if overlap([ids], _span(row))]
                await self._store(aggregates, added, ledger, doubts)
                if count == MOST_PAGES or walk.is_done:
                    break
        if doubts:
            raise doubts[0]
        holes = await _ranges(ledger)
        return [part for each in walk.passed_over for part in overlap(holes, each)]

    async def _store(
        self,
        aggregates: Aggregates,
        page: Sequence[Trade],
        ledger: Ledger,
        doubts: list[NotYetKnownError],
    ) -> None:
        """Push what is missing of aggregates, and say so of every gap that it fills."""
        holes = await _ranges(ledger)
        page = [aggregate for aggregate in page if overlap(holes, _span(aggregate))]
        if not page:
            return
        # What is asked for by hand is a hole though the table may hold it.
        held = await aggregates.held(ledger.market, page)
        trades: list[Trade] = []
        merged: list[tuple[Range, int]] = []
        for aggregate in page:
            rows = held[
                bisect_left(held, aggregate.first_id, key=lambda row: row.last) : bisect_right(
                    held, aggregate.trade_id, key=lambda row: row.last
                )
            ]
            holding = [(row.first, row.last) for row in rows]
            missing = subtract(overlap(holes, _span(aggregate)), holding)
            if not missing:
                continue
            try:
                rest = remainder(aggregate, missing, rows)
            except NotYetKnownError as error:
                doubts.append(error)
                continue
            trades += [rest.trade] if rest.trade else []
            merged += [(part, aggregate.trade_id) for part in rest.merged]
        await self._queue.push([], [Segment(ledger.field, row.first, row.last) for row in held])
        await failpoints.reach("backfill.held_told")
        if trades:
            for gap in await ledger.open_gaps():
                if any(touches(gap, *_span(trade)) for trade in trades):
                    await ledger.tried(gap, OF_AGGREGATES)
            known = self._unserved_until[ledger.field]
            self._unserved_until[ledger.field] = max(known, trades[-1].trade_id)
        await self._take(trades)
        for part, last in merged:
            why = f"their quantity is in the row of the aggregate that ends with {last}"
            await ledger.explain(*part, "lost", why)

    def _postpone(self, gap: Gap, attempts: _Attempts, error: Exception | None = None) -> None:
        delay = attempts.backoff.next_delay()
        attempts.due = time.monotonic() + delay
        if error is not None:
            logger.warning("{}: asking again in {:.1f} s: {}", gap.gap_id, delay, error)


def _span(trade: Trade) -> Range:
    return trade.first_id, trade.trade_id


async def _ranges(ledger: Ledger) -> list[Range]:
    return [(hole.first, hole.last) for hole in await ledger.holes()]


def _lease(ledger: Ledger) -> str:
    return f"{PREFIX}:lease:backfill:{ledger.field}"
