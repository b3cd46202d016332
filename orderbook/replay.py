"""`python -m orderbook.replay`: the books of a recording, to Redis lists.

Nothing is asked for: an image is where the recording has one, and every later one is compared with
the book and renews it. Where a book has run out of what its image showed, rows go on with the
levels that changes named, beyond their `trusted_depth`. The rows of a market end at the first
instant of the grid after its last change.
"""

import asyncio
import sys
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from loguru import logger

from orderbook.grid import IDLE_US
from orderbook.keeper import MICROS_PER_MS, BookKeeper, Outlets
from sluice.budget import Priority
from sluice.connections import connect_redis
from sluice.coverage import DEPTH, Return, gap_of, missed_window
from sluice.exchanges.base import BadFrameError, Depth, DepthImage
from sluice.fitness import redis_is_fit, spool_is_fit
from sluice.lifecycle import Process, run_service
from sluice.publisher import Publisher
from sluice.recording import BadRecordingError, Line
from sluice.replay import Replay, emptied, parse_arguments
from sluice.settings import Market, Settings


class _NoReaders:
    """Takes the place of the latest books: of a day long past there is none."""

    def changed(self, market: Market) -> None:
        pass

    def lost(self, market: Market, sync_id: int) -> None:
        pass


@dataclass
class _Windows:
    """Names the windows in which a book was lost, by the recording's clock `now`."""

    publisher: Publisher
    now: int = 0

    def covers(self, market: Market, ts_event: int) -> None:
        pass

    def returned(self, back: Return) -> None:
        window = missed_window(back, None)
        if window is None:
            return
        self.publisher.put(gap_of(back, DEPTH, window, "lost", self.now))


@dataclass
class _Images:
    """The images of the recording, the last one a market, and who waits for one."""

    held: dict[str, DepthImage] = field(default_factory=dict)
    wanted: set[str] = field(default_factory=set)

    def want(self, symbol: str, priority: Priority) -> None:
        if priority is not Priority.AUDIT:
            self.wanted.add(symbol)

    def want_newer(self, symbol: str, priority: Priority) -> None:
        pass  # the next of the recording

    def forget(self, symbol: str) -> None:
        self.wanted.discard(symbol)

    def settled(self, symbol: str) -> None:
        pass


class Books:
    """The books of a recording, each made when its market is first named."""

    def __init__(self, replay: Replay, publisher: Publisher, settings: Settings) -> None:
        self._replay = replay
        self._exchange = replay.tape.exchange
        self._publisher = publisher
        self._settings = settings
        self._windows = _Windows(publisher)
        self._images = _Images()
        self._outlets = Outlets(publisher, _NoReaders(), self._windows, self._images)
        self._keepers: dict[str, BookKeeper] = {}
        self._last_event: dict[str, int] = {}

    def read(self, line: Line) -> None:
        """Take a line of the recording; a bad one is counted and kept."""
        self._windows.now = line.ts_recv
        try:
            if line.symbol is not None:
                self._on_image(self._replay.tape.image(line))
                return
            for message in self._exchange.parse(line.payload, line.ts_recv):
                if isinstance(message, Depth):
                    self._on_depth(message)
        except BadFrameError as error:
            self._publisher.put_bad_frame(line.payload, f"{self._exchange.name}: {error}")

    def end(self) -> None:
        """Write the row in which each book's last change shows first."""
        interval = self._settings.snapshot_interval_ms * MICROS_PER_MS
        for symbol, keeper in self._keepers.items():
            if keeper.is_live:
                keeper.flush_idle(self._last_event[symbol] + interval + IDLE_US)
            else:
                logger.warning(
                    "{}: its book is not in sync at the end of the recording", keeper.market
                )

    def _on_depth(self, depth: Depth) -> None:
        keeper = self._keeper(depth.symbol)
        if keeper is None:
            return
        self._last_event[depth.symbol] = max(self._last_event.get(depth.symbol, 0), depth.ts_event)
        keeper.on_depth(depth)
        self._settle(keeper)

    def _on_image(self, image: DepthImage) -> None:
        keeper = self._keeper(image.symbol)
        if keeper is None:
            return
        self._images.held[image.symbol] = image
        keeper.on_image(image)
        self._settle(keeper)

    def _settle(self, keeper: BookKeeper) -> None:
        symbol = keeper.market.symbol
        if symbol in self._images.wanted:
            # The last one may do: it came before the first change, or shows that the book was
            # wrong.
            self._images.wanted.discard(symbol)
            if (image := self._images.held.get(symbol)) is not None:
                keeper.on_image(image)
        # What comes until the next image is kept, so that the book can be compared with it.
        keeper.audit()

    def _keeper(self, symbol: str) -> BookKeeper | None:
        if not self._replay.takes(symbol):
            return None
        keeper = self._keepers.get(symbol)
        if keeper is None:
            market = Market(self._exchange.name, symbol)
            keeper = self._keepers[symbol] = BookKeeper(
                market,
                self._exchange.continuity,
                self._settings,
                self._outlets,
                shows_untrusted=True,
            )
        return keeper


async def run(replay: Replay, process: Process) -> None:
    """Push the rows of the recording, to its end or until the process is told to stop."""
    settings, stop = process.settings, process.stop
    spool_is_fit(settings)
    redis = connect_redis(settings)
    try:
        await redis_is_fit(redis, process.health)
        publisher = Publisher(redis, settings)
        process.metrics.append(publisher.metrics)
        books = Books(replay, publisher, settings)
        publisher_stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(publisher.run(publisher_stop))
            async with aclosing(replay.lines(publisher, redis, stop)) as lines:
                async for line in lines:
                    books.read(line)
            if not stop.is_set():
                books.end()
            await emptied(publisher, stop)
            publisher_stop.set()
    finally:
        await redis.aclose()


if __name__ == "__main__":
    try:
        replay = parse_arguments()
    except (BadRecordingError, OSError) as error:
        sys.exit(f"{error}")
    run_service("orderbook", partial(run, replay), port=0, needs_symbols=False)
