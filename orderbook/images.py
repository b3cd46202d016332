"""Book images from REST, asked for one after another within the budget.

A book that was live and lost its place does not wait behind those that begin, and among equals the
one with the most changes goes first. Each book backs off by itself, so a book whose images keep
coming too old, or a request that hangs, holds up no other.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final

from loguru import logger

from sluice.backoff import Backoff
from sluice.budget import Priority
from sluice.exchanges.base import BadFrameError, DepthImage, Exchange
from sluice.rest import RestClient, RestError

AT_ONCE: Final = 4
"""How many requests of one priority may be under way: one that hangs must not stop the others."""
FIRST_DELAY: Final = 0.2
MOST_DELAY: Final = 5.0
"""Seconds; what bounds the load on the venue is the budget, not this."""
UNKNOWN_SYMBOL_DELAY: Final = 300.0
_SERVED: Final = (Priority.LIVE_IMAGE, Priority.IMAGE, Priority.AUDIT)


class ImageQueue:
    """The images that one venue is asked for, each of `limit` levels a side.

    `deliver` takes every image that comes, and `activity` ranks the symbols that wait for one.
    """

    def __init__(
        self,
        exchange: Exchange,
        client: RestClient,
        limit: int,
        *,
        deliver: Callable[[DepthImage], None],
        activity: Callable[[str], int],
    ) -> None:
        self._exchange = exchange
        self._client = client
        self._limit = limit
        self._deliver = deliver
        self._activity = activity
        self._due: dict[Priority, dict[str, float]] = {priority: {} for priority in _SERVED}
        self._under_way: set[str] = set()
        self._backoffs: dict[str, Backoff] = {}
        self._wake = {priority: asyncio.Event() for priority in self._due}
        self._slots = {priority: asyncio.Semaphore(AT_ONCE) for priority in self._due}
        self.fetched = 0
        self.failures = 0

    @property
    def waiting(self) -> int:
        """How many books wait for an image."""
        return sum(len(due) for due in self._due.values()) + len(self._under_way)

    def want(self, symbol: str, priority: Priority) -> None:
        """Ask for an image, unless one is asked for already with that priority or a higher one."""
        if symbol in self._under_way:
            return
        for queued, due in self._due.items():
            if symbol in due:
                if queued <= priority:
                    return
                del due[symbol]
        self._schedule(symbol, priority, 0.0)

    def want_newer(self, symbol: str, priority: Priority) -> None:
        """Ask for another image after a while: the last one did not do."""
        self.forget(symbol)
        self._schedule(symbol, priority, self._backoff(symbol).next_delay())

    def forget(self, symbol: str) -> None:
        """Ask for no image any more; where that is under way already, it is not repeated."""
        for due in self._due.values():
            due.pop(symbol, None)
        self._under_way.discard(symbol)

    def settled(self, symbol: str) -> None:
        """Note that a book has its image: its next one is asked for without delay."""
        self._backoffs.pop(symbol, None)

    async def run(self) -> None:
        """Fetch until cancelled."""
        async with asyncio.TaskGroup() as group:
            for priority in self._due:
                group.create_task(self._serve(priority, group))

    async def _serve(self, priority: Priority, group: asyncio.TaskGroup) -> None:
        while True:
            await self._until_one_is_due(priority)
            await self._slots[priority].acquire()
            weight = self._exchange.image_request("", self._limit).weight
            await self._client.budget.acquire(weight, priority)
            # Chosen only now: who waits longest for the budget need not be the most urgent.
            symbol = max(self._ready(priority), key=self._activity, default=None)
            if symbol is None:
                self._slots[priority].release()
                continue
            del self._due[priority][symbol]
            self._under_way.add(symbol)
            group.create_task(self._fetch(symbol, priority))

    async def _until_one_is_due(self, priority: Priority) -> None:
        due, wake = self._due[priority], self._wake[priority]
        while not self._ready(priority):
            wake.clear()
            wait = min(due.values()) - time.monotonic() if due else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await wake.wait()

    def _ready(self, priority: Priority) -> list[str]:
        now = time.monotonic()
        return [symbol for symbol, due in self._due[priority].items() if due <= now]

    async def _fetch(self, symbol: str, priority: Priority) -> None:
        try:
            body = await self._client.ask(self._exchange.image_request(symbol, self._limit))
            image = self._exchange.read_image(symbol, self._limit, body)
        except (RestError, BadFrameError) as error:
            if symbol in self._under_way:  # it may have been forgotten meanwhile
                self._under_way.discard(symbol)
                self._failed(symbol, priority, error)
        else:
            self.fetched += 1
            self._under_way.discard(symbol)
            self._deliver(image)
        finally:
            self._slots[priority].release()

    def _failed(self, symbol: str, priority: Priority, error: Exception) -> None:
        self.failures += 1
        backoff = self._backoff(symbol)
        delay = backoff.next_delay()
        refusal = error.refusal if isinstance(error, RestError) else None
        if refusal is not None and refusal.kind == "no_such_symbol":
            logger.error("{}:{}: {}", self._exchange.name, symbol, error)
            delay = UNKNOWN_SYMBOL_DELAY
        elif backoff.failures == 1:
            logger.warning("{}:{}: no book image yet: {}", self._exchange.name, symbol, error)
        self._schedule(symbol, priority, delay)

    def _schedule(self, symbol: str, priority: Priority, delay: float) -> None:
        self._due[priority][symbol] = time.monotonic() + delay
        self._wake[priority].set()

    def _backoff(self, symbol: str) -> Backoff:
        return self._backoffs.setdefault(symbol, Backoff(FIRST_DELAY, MOST_DELAY))
