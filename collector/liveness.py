"""A silent market is asked about, not guessed at.

Silence on a socket is no fault: the recordings hold 43 s of it. So the newest trade id is asked
for over REST; ids that the socket did not bring become holes, and its socket is replaced.
"""

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from collector.backfill import Venue
from collector.plausibility import MOST_LEAP
from sluice import failpoints
from sluice.budget import Priority
from sluice.clock import now_micros
from sluice.exchanges.base import BadFrameError
from sluice.queue import HEADS, RecordQueue, Segment, head_field
from sluice.rest import RestError
from sluice.settings import Market

LEAST_SILENCE_SECONDS: Final = 10.0
MOST_SILENCE_SECONDS: Final = 60.0
"""After how long without a trade, at the least and the most, the venue is asked."""
SILENCE_GAPS: Final = 5
"""Between the two it is asked after so many times a market's usual gap between trades."""
MEMORY: Final = 0.9
"""The part of its former self that the usual gap keeps when a new gap is seen."""
FIRST_RENEWAL_SECONDS: Final = 30.0
MOST_RENEWAL_SECONDS: Final = 1800.0
"""Between two renewals for one market: a venue that never brings it must not cost the others."""
LOOK_SECONDS: Final = 1.0
MOST_ASKS: Final = 4
"""Markets asked about at a time: a whole venue that falls silent must not empty the budget."""


class Liveness:
    """Asks about markets whose trades have been silent for long.

    `last_seen` is when each market's last trade was read (monotonic seconds), kept by the reader;
    `renew` replaces the socket of a market.
    """

    def __init__(
        self,
        redis: Redis,
        venues: Mapping[str, Venue],
        last_seen: dict[Market, float],
        renew: Callable[[Market, str], None],
    ) -> None:
        self.stalls = 0
        self._redis = redis
        self._venues = venues
        self._last_seen = last_seen
        self._renew = renew
        self._asked: dict[Market, float] = {}
        self._looked: dict[Market, float] = {}
        self._usual: dict[Market, float] = {}
        self._renewals: dict[Market, tuple[float, float]] = {}
        """Of a market that is silent: when its socket may be renewed again, and the next delay."""
        self._queue = RecordQueue(redis, "trade")

    async def run(self, stop: asyncio.Event) -> None:
        """Look every few seconds until `stop`; errors of servers never leave here."""
        while not stop.is_set():
            self._learn_gaps()
            now = time.monotonic()
            quiet = [
                market
                for market, seen in self._last_seen.items()
                if now - max(seen, self._asked.get(market, 0.0)) >= self._silence(market)
            ]
            for market in sorted(quiet, key=self._last_seen.__getitem__)[:MOST_ASKS]:
                self._asked[market] = now
                try:
                    await self._ask(market)
                except (RestError, BadFrameError, RedisError, OSError) as error:
                    logger.warning("{}: silent, and not known whether rightly: {}", market, error)
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await stop.wait()

    def _learn_gaps(self) -> None:
        """Learn each market's usual gap between trades, as coarse as the looks are."""
        for market, seen in self._last_seen.items():
            before = self._looked.get(market, seen)
            if seen > before:
                self._renewals.pop(market, None)
                usual = self._usual.get(market, MOST_SILENCE_SECONDS)
                self._usual[market] = MEMORY * usual + (1 - MEMORY) * (seen - before)
            self._looked[market] = seen

    def _silence(self, market: Market) -> float:
        usual = self._usual.get(market, MOST_SILENCE_SECONDS)
        return min(max(LEAST_SILENCE_SECONDS, SILENCE_GAPS * usual), MOST_SILENCE_SECONDS)

    async def _ask(self, market: Market) -> None:
        venue = self._venues[market.exchange]
        silent_since = self._last_seen.get(market)
        if silent_since is None:
            return  # it was removed while another was asked about
        request = venue.exchange.newest_request(market.symbol)
        body = await venue.rest.get(request, Priority.BACKFILL)
        trades = venue.exchange.read_aggregates(market.symbol, body, now_micros())
        if not trades:
            return
        newest = trades[-1].trade_id
        stream = head_field(market.exchange, market.symbol, "trade")
        head = await self._redis.hget(HEADS, stream)
        await failpoints.reach("liveness.head_read")
        if head is not None and int(head) >= newest:
            return
        if self._last_seen.get(market, math.inf) > silent_since:
            return  # the socket spoke, or the market was removed, while we asked
        self.stalls += 1
        logger.warning(
            "{}: the socket has been silent for {:.0f} s but the venue is at trade {}, we at {}; "
            "what is missing is fetched, and another socket tried now and then",
            market,
            time.monotonic() - silent_since,
            newest,
            int(head) if head is not None else "none",
        )
        # A wild id is not believed for one answer: what a new socket brings will tell.
        if head is None or newest <= int(head) + MOST_LEAP:
            await self._queue.push([], [Segment(stream, newest + 1, newest)])
            await failpoints.reach("liveness.hole_pushed")
        now = time.monotonic()
        may_at, delay = self._renewals.get(market, (now, FIRST_RENEWAL_SECONDS))
        if now >= may_at:
            self._renewals[market] = (now + delay, min(2 * delay, MOST_RENEWAL_SECONDS))
            self._renew(market, f"{market} is silent")
