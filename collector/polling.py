"""Where no socket can be had, the newest trades are polled over REST.

Their ids go the way of all others: the push script judges continuity, what lies between two polls
becomes a hole, and the backfill fetches it. So polling is slower than a socket, and as complete.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from collector.backfill import Venue
from sluice import failpoints
from sluice.budget import Priority
from sluice.clock import now_micros
from sluice.exchanges.base import BadFrameError
from sluice.queue import HEADS, head_field
from sluice.records import Trade
from sluice.rest import RestError
from sluice.settings import Market

AFTER_SECONDS: Final = 15.0
"""For how long there must have been no socket."""
ROUND_SECONDS: Final = 2.0
"""Between two rounds over all markets that are polled; the budget paces within a round."""


class Polling:
    """Asks for the newest trades of the markets that `unreachable` names, and `put`s them.

    `last_seen` is when each market's last trade was read (monotonic seconds).
    """

    def __init__(
        self,
        redis: Redis,
        venues: Mapping[str, Venue],
        unreachable: Callable[[], Sequence[Market]],
        put: Callable[[Trade], None],
        last_seen: dict[Market, float],
    ) -> None:
        self.markets: Sequence[Market] = ()
        """What is polled now."""
        self.trades = 0
        self._redis = redis
        self._venues = venues
        self._unreachable = unreachable
        self._put = put
        self._last_seen = last_seen
        self._newest: dict[Market, int] = {}
        self._refusal = ""

    async def run(self, stop: asyncio.Event) -> None:
        """Poll round after round until `stop`; errors of the venue never leave here."""
        while not stop.is_set():
            self._tell(self._unreachable())
            for market in self.markets:
                if stop.is_set():
                    return
                try:
                    await self._poll(market)
                    self._refusal = ""
                except (RestError, BadFrameError) as error:
                    if not self._refusal:
                        logger.warning("{}: neither socket nor REST: {}", market, error)
                    self._refusal = str(error)
            with suppress(TimeoutError):
                async with asyncio.timeout(ROUND_SECONDS):
                    await stop.wait()

    def _tell(self, markets: Sequence[Market]) -> None:
        if markets and not self.markets:
            logger.warning(
                "no socket for {:.0f} s: {} markets are polled over REST until there is one",
                AFTER_SECONDS,
                len(markets),
            )
        elif self.markets and not markets:
            logger.info("sockets are back, polling ends; {} trades came by it", self.trades)
        self.markets = markets

    async def _poll(self, market: Market) -> None:
        venue = self._venues[market.exchange]
        request = venue.exchange.last_trade_request(market.symbol, venue.exchange.history_page)
        body = await venue.rest.get(request, Priority.POLL)
        trades = venue.exchange.read_trades(market.symbol, body, now_micros())
        known = await self._known(market)
        if known is None:  # the market's record begins here, as it would with a socket
            trades = trades[-1:]
        for trade in trades:
            if known is None or trade.trade_id > known:
                self._put(trade)
                self.trades += 1
                self._newest[market] = trade.trade_id
        if market in self._last_seen:  # it may have been removed meanwhile
            self._last_seen[market] = time.monotonic()

    async def _known(self, market: Market) -> int | None:
        """Give the highest id that was pushed or is about to be."""
        newest = self._newest.get(market)
        with suppress(RedisError, OSError):
            head = await self._redis.hget(
                HEADS, head_field(market.exchange, market.symbol, "trade")
            )
            await failpoints.reach("polling.head_read")
            if head is not None:
                return max(int(head), newest or 0)
        return newest
