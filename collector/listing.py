"""A market that the venue does not list is named, for its sockets would only stay silent."""

import asyncio
import difflib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Final

from loguru import logger

from collector.backfill import Venue
from sluice.budget import Priority
from sluice.exchanges.base import BadFrameError, Instrument
from sluice.rest import RestError
from sluice.settings import Market

RETRY_SECONDS: Final = 60.0


def remark(market: Market, listed: Mapping[str, Instrument]) -> tuple[str, str] | None:
    """Give the log level of what is wrong with a market, and the text; None where nothing is."""
    instrument = listed.get(market.symbol)
    if instrument is None:
        close = difflib.get_close_matches(market.symbol, listed, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        text = f"{market}: {market.exchange} lists no such market{hint}; nothing is recorded of it"
        return "ERROR", f"{text}, correct SYMBOLS"
    if not instrument.is_trading:
        return (
            "WARNING",
            f"{market}: {market.exchange} has halted it; it is recorded once it trades",
        )
    return None


class Listing:
    """Looks up each market once, when it is first recorded."""

    def __init__(self, venues: Mapping[str, Venue]) -> None:
        self._venues = venues
        self._unknown: set[Market] = set()
        self._known: set[Market] = set()
        self._wake = asyncio.Event()

    def look_up(self, markets: Iterable[Market]) -> None:
        """Have markets looked up that were not yet."""
        self._unknown |= set(markets) - self._known
        self._wake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Look markets up until `stop`; a venue that does not answer is asked again later."""
        stopping = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                self._wake.clear()
                for name in sorted({market.exchange for market in self._unknown}):
                    with suppress(RestError, BadFrameError):
                        await self._ask(name)
                waking = asyncio.create_task(self._wake.wait())
                await asyncio.wait(
                    [stopping, waking],
                    timeout=RETRY_SECONDS if self._unknown else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                waking.cancel()
        finally:
            stopping.cancel()

    async def _ask(self, name: str) -> None:
        venue = self._venues[name]
        body = await venue.rest.get(venue.exchange.instruments_request(), Priority.AUDIT)
        listed = {each.symbol: each for each in venue.exchange.read_instruments(body)}
        for market in sorted(market for market in self._unknown if market.exchange == name):
            if told := remark(market, listed):
                logger.log(*told)
            self._unknown.discard(market)
            self._known.add(market)
