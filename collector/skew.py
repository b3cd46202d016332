"""How far our clock is from each venue's: `ts_recv` is only as good as it is."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from loguru import logger

from collector.backfill import Venue
from sluice.budget import Priority
from sluice.clock import MICROS_PER_SECOND, now_micros
from sluice.exchanges.base import BadFrameError
from sluice.rest import RestError

ASK_SECONDS: Final = 60.0
MOST_SKEW: Final = 1.0
"""Seconds that the clocks may differ by before an operator should know."""


class ClockSkew:
    """Asks each venue for its time, once a minute."""

    def __init__(self, venues: Mapping[str, Venue]) -> None:
        self.seconds: dict[str, float] = {}
        """By venue: how far our clock is ahead of its own, to half the time an answer took."""
        self._venues = venues
        self._warned: set[str] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Ask until `stop`; a venue that does not answer is asked again a minute later."""
        while not stop.is_set():
            for name, venue in list(self._venues.items()):
                try:
                    await self._ask(name, venue)
                except (RestError, BadFrameError) as error:
                    logger.debug("{}: its time is not known: {}", name, error)
            with suppress(TimeoutError):
                async with asyncio.timeout(ASK_SECONDS):
                    await stop.wait()

    async def _ask(self, name: str, venue: Venue) -> None:
        request = venue.exchange.time_request()
        await venue.rest.budget.acquire(request.weight, Priority.AUDIT)
        asked = now_micros()
        theirs = venue.exchange.read_time(await venue.rest.ask(request))
        answered = now_micros()
        skew = ((asked + answered) / 2 - theirs) / MICROS_PER_SECOND
        self.seconds[name] = skew
        uncertainty = (answered - asked) / 2 / MICROS_PER_SECOND
        if abs(skew) - uncertainty > MOST_SKEW:
            if name not in self._warned:
                logger.warning(
                    "our clock is {:.1f} s {} that of {}: check the time service of this machine",
                    abs(skew),
                    "ahead of" if skew > 0 else "behind",
                    name,
                )
            self._warned.add(name)
        else:
            self._warned.discard(name)
