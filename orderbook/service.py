"""The orderbook process's wiring: which sockets feed which books, and what watches over them."""

import asyncio
import itertools
import time
import zlib
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from loguru import logger
from prometheus_client.core import Metric
from redis.asyncio import Redis

from orderbook.images import ImageQueue
from orderbook.keeper import BookKeeper, Outlets
from orderbook.latest import RENEWAL_SECONDS, LatestBook, LatestBooks
from sluice.budget import Budget
from sluice.clock import now_micros
from sluice.connections import connect_redis
from sluice.coverage import Coverage
from sluice.exchanges import EXCHANGES, Exchange
from sluice.exchanges.base import BadFrameError, Depth, DepthImage, Reply, ServerShutdown
from sluice.fitness import keep_file_whole, redis_is_fit, spool_is_fit
from sluice.lifecycle import Fact, Process
from sluice.metrics import counter, gauge
from sluice.presence import announce
from sluice.publisher import Publisher
from sluice.rest import RestClient
from sluice.settings import Market, Settings
from sluice.sockets import Sockets, tell_markets
from sluice.stream import ConnectGate, Stream

CHECK_SECONDS: Final = 0.5
QUIET_SECONDS: Final = 1.0
"""After how long without an event on a socket the peer is asked."""
IMAGE_FACTOR: Final = 50
"""An image is this many times as deep as what is read, so that a book seldom outgrows it."""
LEAST_IMAGE: Final = 1000
LAST_WORDS_SECONDS: Final = 2.0
"""How long deleting the hashes at the end may take; without Redis they expire."""
SHOWN: Final = 3
"""How many books the statistics line names."""
NAMED: Final = 10
"""How many dropped books the log names at once."""
WARN_AT: Final = 0.8
"""The part of BOOK_MAX_MB from which on there is a warning, and below which books come back."""
DROPPED: Final = 0.1
"""The part of what is held that is dropped at once."""
MICROS_PER_MINUTE: Final = 60_000_000
_UNREAD: Final = (
    "streams",
    "gap_",
    "backfill_",
    "flush_",
    "dead_",
    "chunk_",
    "column",
    "retention_",
)
_RELOADED: Final = {
    "symbols",
    "snapshot_interval_ms",
    "book_audit_seconds",
    "book_idle_minutes",
    "book_max_mb",
}


def in_shard(market: Market, shard: str) -> bool:
    """Tell whether a market belongs to a shard `index/count`, the same in every process."""
    index, count = map(int, shard.split("/"))
    return zlib.crc32(str(market).encode()) % count == index


def image_limit(exchange: Exchange, settings: Settings) -> int:
    """Choose how many levels a side to ask for: as cheap as will do, at most BOOK_DEPTH."""
    read = max(settings.snapshot_depth, settings.publish_depth)
    wanted = max(read, min(settings.book_depth, max(LEAST_IMAGE, IMAGE_FACTOR * read)))
    limits = exchange.image_limits
    return next((limit for limit in limits if limit >= wanted), limits[-1])


@dataclass
class Feed:
    """The books of one socket."""

    exchange: Exchange
    keepers: dict[str, BookKeeper]
    publisher: Publisher
    newest: int = 0
    """The newest time of any event on the socket: what is much older has arrived."""
    delivered: int = 0
    """Up to which time of the exchange everything has arrived, events and pongs taken together."""
    ahead: int | None = None
    """The most that an event's time was ahead of our clock: the exchange's is at least as far."""

    def read(self, stream: Stream, frame: bytes, ts_recv: int) -> None:
        """Take one frame; the hole that a bad one leaves is found by the next change's ids."""
        try:
            messages = self.exchange.parse(frame, ts_recv)
        except BadFrameError as error:
            self.publisher.put_bad_frame(frame, f"{self.exchange.name}: {error}")
            return
        for message in messages:
            if isinstance(message, Depth):
                keeper = self.keepers.get(message.symbol)
                if keeper is not None:
                    self.newest = max(self.newest, message.ts_event)
                    ahead = message.ts_event - ts_recv
                    self.ahead = ahead if self.ahead is None else max(self.ahead, ahead)
                    keeper.on_depth(message)
            elif isinstance(message, ServerShutdown):
                stream.renew("the server shuts down")
            elif isinstance(message, Reply) and message.error is not None:
                logger.error(
                    "{}: request {} refused: {}; check SYMBOLS",
                    stream.name,
                    message.request_id,
                    message.error,
                )

    def disconnected(self, reason: str) -> None:
        """Give up all books of the socket."""
        self.newest = self.delivered = 0
        self.ahead = None
        for keeper in self.keepers.values():
            keeper.on_disconnect(reason)


@dataclass
class Books:
    """Everything a running orderbook process holds."""

    process: Process
    publisher: Publisher
    latest: LatestBooks
    coverage: Coverage
    keepers: dict[Market, BookKeeper]
    feeds: dict[Stream, Feed] = field(default_factory=dict)
    images: dict[str, ImageQueue] = field(default_factory=dict)
    memory_bytes: int = 0
    dropped: int = 0
    """How often a book was dropped for want of memory."""
    _most_used: float = 0.0
    """The memory in use, and a little more, when books were last dropped."""
    _counted: tuple[float, int] = field(default_factory=lambda: (time.monotonic(), 0))
    """When the statistics line was last given, and how many changes there were then."""

    @property
    def live(self) -> int:
        """How many books are provably in sync."""
        return sum(keeper.is_live for keeper in self.keepers.values())

    def progress(self) -> None:
        """Note that a socket got on; that is none while what it brings goes nowhere."""
        if not self.publisher.is_stuck:
            self.process.progress()

    def connection_changed(self) -> None:
        """Tell readiness how many sockets are open."""
        missing = sum(not stream.is_connected for stream in self.feeds)
        if missing:
            self.process.health.wait_for("sockets", f"{missing} of {len(self.feeds)} not open")
        else:
            self.process.health.ready("sockets")

    def check(self) -> None:
        """Write what is due without a change, look after depth, memory and readiness."""
        now = now_micros()
        idle_us = int(self.process.settings.book_idle_minutes * MICROS_PER_MINUTE)
        for feed in self.feeds.values():
            limit = image_limit(feed.exchange, self.process.settings)
            for keeper in feed.keepers.values():
                if feed.newest:
                    keeper.flush_idle(max(feed.newest, feed.delivered))
                if idle_us:
                    keeper.cut_if_idle(now - idle_us)
                keeper.renew_if_shallow(limit)
        if self.live:
            self.process.health.ready("books")
        else:
            self.process.health.wait_for("books", "none is in sync")
        self._check_memory()

    def _check_memory(self) -> None:
        most = self.process.settings.book_max_mb * 2**20
        before, self.memory_bytes = self.memory_bytes, resident_bytes()
        if before < WARN_AT * most <= self.memory_bytes:
            logger.warning(
                "{} MB of the {} MB of BOOK_MAX_MB are used; from there on the least active books "
                "are dropped. Lower BOOK_DEPTH, or spread the markets over more processes with "
                "BOOK_SHARD",
                self.memory_bytes >> 20,
                most >> 20,
            )
        # What a dropped book held is used again before the process asks the system for more; so
        # only more than there ever was says that it was not enough.
        if self.memory_bytes > max(most, self._most_used):
            self._most_used = 1.02 * self.memory_bytes
            self._drop_least_active()
        elif self.memory_bytes < WARN_AT * most:
            self._take_up_most_active()

    def _drop_least_active(self) -> None:
        held = {keeper: keeper.held for keeper in self.keepers.values() if keeper.held}
        excess = DROPPED * sum(held.values())
        dropped = []
        for keeper in sorted(held, key=lambda keeper: keeper.changes):
            if excess <= 0:
                break
            excess -= held[keeper]
            keeper.drop("dropped: BOOK_MAX_MB is reached")
            dropped.append(str(keeper.market))
        self.dropped += len(dropped)
        if dropped:
            more = f" and {len(dropped) - NAMED} more" if len(dropped) > NAMED else ""
            logger.error(
                "BOOK_MAX_MB is reached: {} MB are used. Dropped, as the least active: {}{}. They "
                "come back below {:.0%} of it, or when the process starts with more of it, a lower "
                "BOOK_DEPTH or fewer markets (BOOK_SHARD); what they miss is a window in gaps",
                self.memory_bytes >> 20,
                ", ".join(dropped[:NAMED]),
                more,
                WARN_AT,
            )

    def _take_up_most_active(self) -> None:
        dropped = [keeper for keeper in self.keepers.values() if keeper.is_dropped]
        if dropped:
            # One at a time: each takes memory that the next check must see.
            keeper = max(dropped, key=lambda keeper: keeper.changes)
            logger.info("{}: there is memory for this book again", keeper.market)
            keeper.take_up()

    def statistics(self) -> str:
        """Give the line that is logged every 30 s."""
        keepers = list(self.keepers.values())
        counts = self.publisher.counts
        (since, before), changes = self._counted, sum(keeper.changes for keeper in keepers)
        self._counted = time.monotonic(), changes
        rate = (changes - before) / max(self._counted[0] - since, 1e-3)
        dropped = sum(keeper.is_dropped for keeper in keepers)
        ended = sum(sum(stream.counts.disconnects.values()) for stream in self.feeds)
        depths = " ".join(f"{kind} {n}" for kind, n in sorted(self.publisher.lengths.items()))
        return (
            f"{self.live} of {len(keepers)} books live, {dropped} dropped, "
            f"{sum(keeper.resyncs for keeper in keepers)} resyncs, "
            f"{sum(images.waiting for images in self.images.values())} wait for an image; "
            f"read {changes} changes ({rate:.1f}/s), "
            f"{counts.bad_frames} bad frames, {ended} sockets ended; "
            f"pushed {sum(counts.pushed.values())}, in memory {self.publisher.in_memory}, "
            f"spooled {counts.spooled}, shed {counts.shed}; "
            f"queues: {depths or 'not pushed to yet'}; "
            + "; ".join(keeper.summary() for keeper in keepers[:SHOWN])
        )

    def facts(self) -> dict[str, Fact]:
        """Give what `sluice status` shows."""
        return {
            "sockets": f"{sum(stream.is_connected for stream in self.feeds)}/{len(self.feeds)}",
            "books live": f"{self.live}/{len(self.keepers)}",
            "on disk": self.publisher.spool_records,
        }

    def metrics(self) -> Iterable[Metric]:
        """Give the families behind `/metrics`."""
        keepers = list(self.keepers.values())
        counts = self.publisher.counts
        yield gauge("books", "Books kept", [({}, len(keepers))])
        yield gauge("books_live", "Books provably in sync", [({}, self.live)])
        yield counter("books_dropped", "Books dropped for want of memory", [({}, self.dropped)])
        yield gauge("book_levels", "Levels held", [({}, sum(k.levels for k in keepers))])
        yield gauge("book_memory_bytes", "Resident memory", [({}, self.memory_bytes)])
        yield counter("book_changes", "Changes read", [({}, sum(k.changes for k in keepers))])
        yield counter("book_resyncs", "Syncs lost", [({}, sum(k.resyncs for k in keepers))])
        yield counter(
            "book_audits",
            "Books compared with a newer image, by result",
            [
                ({"result": "same"}, sum(keeper.confirmed for keeper in keepers)),
                ({"result": "different"}, sum(keeper.contradicted for keeper in keepers)),
            ],
        )
        yield counter(
            "book_images",
            "Images asked for, by result",
            [
                ({"exchange": name, "result": result}, count)
                for name, images in self.images.items()
                for result, count in (("read", images.fetched), ("failed", images.failures))
            ],
        )
        yield counter(
            "orderbook_reconnects",
            "Sockets that ended, by reason",
            [
                ({"socket": stream.name, "reason": reason}, count)
                for stream in self.feeds
                for reason, count in stream.counts.disconnects.items()
            ],
        )
        yield counter("orderbook_bad_frames", "Frames nobody can read", [({}, counts.bad_frames)])
        yield from self.publisher.metrics()


def resident_bytes() -> int:
    """Give the memory this process has in use; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * 4096


async def run(process: Process) -> None:
    """Keep books until the process is told to stop, then take back what only a live one may say."""
    settings, stop = process.settings, process.stop
    spool_is_fit(settings)
    process.unread = _UNREAD
    async with AsyncExitStack() as clients:
        redis = connect_redis(settings)
        clients.push_async_callback(redis.aclose)
        publisher = Publisher(redis, settings)
        process.health.check("redis", publisher.unfitness)
        keepers: dict[Market, BookKeeper] = {}

        def read(market: Market) -> LatestBook | None:
            keeper = keepers.get(market)
            return None if keeper is None else keeper.latest()

        latest = LatestBooks(redis, read, is_published=settings.publish_live)
        coverage = Coverage(redis)
        books = Books(process, publisher, latest, coverage, keepers)
        process.statistics.append(books.statistics)
        process.metrics.append(books.metrics)
        process.facts.append(books.facts)
        publisher_stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            publishing = tasks.create_task(publisher.run(publisher_stop))
            tasks.create_task(announce(process, redis))
            tasks.create_task(keep_file_whole(redis, process.stop))
            writing = [tasks.create_task(latest.run()), tasks.create_task(coverage.run())]
            watching: list[asyncio.Task[None]] = []

            def watch(work: Coroutine[None, None, None]) -> None:
                watching.append(tasks.create_task(work))

            sockets = Sockets(tasks)
            venues = Venues(books, redis, clients, sockets, watch)
            await venues.arrange(settings)
            books.check()
            for work in (
                redis_is_fit(redis, process.health),
                venues.follow(),
                _check(books),
                _renew(books),
                _audit(books),
            ):
                watch(work)
            await stop.wait()
            for task in watching:
                task.cancel()
            await asyncio.wait(watching)
            await sockets.close_all()
            latest.close()
            coverage.close()
            await asyncio.wait(writing, timeout=LAST_WORDS_SECONDS)
            for task in writing:
                task.cancel()
            publisher_stop.set()
            await publishing


@dataclass
class Venue:
    """One exchange, how it is asked for images, and the books kept of it."""

    exchange: Exchange
    gate: ConnectGate
    outlets: Outlets
    keepers: dict[str, BookKeeper]


class Venues:
    """The venues whose books are kept, and their sockets; the markets follow the settings.

    `watch` runs what a new venue or socket needs beside.
    """

    def __init__(
        self,
        books: Books,
        redis: Redis,
        clients: AsyncExitStack,
        sockets: Sockets,
        watch: Callable[[Coroutine[None, None, None]], None],
    ) -> None:
        self._books = books
        self._redis = redis
        self._clients = clients
        self._sockets = sockets
        self._watch = watch
        self._venues: dict[str, Venue] = {}
        self._new: asyncio.Queue[Settings] = asyncio.Queue()
        books.process.reload.append(self._reload)

    def _reload(self, new: Settings) -> set[str]:
        changes = {name: getattr(new, name) for name in _RELOADED}
        # Addresses and the like stay as they are until a restart, for new sockets too.
        self._new.put_nowait(self._books.process.settings.model_copy(update=changes))
        return _RELOADED

    async def follow(self) -> None:
        """Apply new settings as they come, one after another."""
        interval = self._books.process.settings.snapshot_interval_ms
        while True:
            new = await self._new.get()
            before = set(self._books.keepers)
            if new.snapshot_interval_ms != interval:
                interval = new.snapshot_interval_ms
                for keeper in self._books.keepers.values():
                    keeper.snapshot_every(interval)
            await self.arrange(new)
            tell_markets(self._books.process.name, before, set(self._books.keepers))

    async def arrange(self, settings: Settings) -> None:
        """Keep the books of the settings' markets, and no others."""
        wanted: dict[str, list[str]] = {name: [] for name in self._venues}
        for market in settings.markets:
            if in_shard(market, settings.book_shard):
                wanted.setdefault(market.exchange, []).append(market.symbol)
        for name, symbols in wanted.items():
            if name not in self._venues:
                self._add_venue(EXCHANGES[name], settings)
            await self._arrange_venue(self._venues[name], symbols, settings)
        self._books.connection_changed()

    def _add_venue(self, exchange: Exchange, settings: Settings) -> None:
        books, keepers = self._books, dict[str, BookKeeper]()

        def deliver(image: DepthImage) -> None:
            if image.symbol in keepers:
                keepers[image.symbol].on_image(image)

        def activity(symbol: str) -> int:
            return keepers[symbol].changes if symbol in keepers else 0

        rest = RestClient(exchange, settings, Budget(self._redis, exchange))
        self._clients.push_async_callback(rest.close)
        limit = image_limit(exchange, settings)
        images = ImageQueue(exchange, rest, limit, deliver=deliver, activity=activity)
        books.images[exchange.name] = images
        outlets = Outlets(books.publisher, books.latest, books.coverage, images)
        self._venues[exchange.name] = Venue(exchange, ConnectGate(exchange), outlets, keepers)
        self._watch(images.run())

    async def _arrange_venue(self, venue: Venue, symbols: list[str], settings: Settings) -> None:
        books, exchange = self._books, venue.exchange
        held = {
            stream: list(feed.keepers)
            for stream, feed in books.feeds.items()
            if feed.exchange is exchange
        }
        for symbol in set(venue.keepers).difference(symbols):
            self._remove(venue, symbol)
        for symbol in symbols:
            if symbol not in venue.keepers:
                market = Market(exchange.name, symbol)
                keeper = BookKeeper(market, exchange.continuity, settings, venue.outlets)
                venue.keepers[symbol] = books.keepers[market] = keeper

        def make(part: list[str]) -> Stream:
            return self._open(venue, part, settings)

        def channels(part: Sequence[str]) -> list[str]:
            return [exchange.depth_channel(symbol) for symbol in part]

        carried = await self._sockets.rearrange(
            held, symbols, exchange.streams_per_socket, channels, make
        )
        for stream in set(held).difference(carried):
            del books.feeds[stream]
        for stream, part in carried.items():
            books.feeds[stream].keepers = {symbol: venue.keepers[symbol] for symbol in part}

    def _remove(self, venue: Venue, symbol: str) -> None:
        """Give a book up: readers see no more of it, and nothing is asked for it."""
        keeper = venue.keepers.pop(symbol)
        del self._books.keepers[keeper.market]
        for feed in self._books.feeds.values():
            if feed.exchange is venue.exchange:
                feed.keepers.pop(symbol, None)
        keeper.drop("removed from SYMBOLS")

    def _open(self, venue: Venue, symbols: list[str], settings: Settings) -> Stream:
        books, exchange = self._books, venue.exchange
        feed = Feed(exchange, {each: venue.keepers[each] for each in symbols}, books.publisher)

        def disconnected(reason: str) -> None:
            feed.disconnected(reason)
            books.connection_changed()

        used = {stream.name for stream in books.feeds}
        names = (f"{exchange.name}/{number}" for number in itertools.count())
        stream = Stream(
            exchange,
            getattr(settings, exchange.ws_setting),
            [exchange.depth_channel(symbol) for symbol in symbols],
            feed.read,
            gate=venue.gate,
            on_connected=books.connection_changed,
            on_disconnected=disconnected,
            on_progress=books.progress,
            proxy=settings.proxy_url.get_secret_value() if settings.proxy_url else None,
            rollover_at=settings.rollover_times,
            name=next(name for name in names if name not in used),
        )
        books.feeds[stream] = feed
        self._watch(_confirm(books, stream))
        return stream


async def _confirm(books: Books, stream: Stream) -> None:
    """While a socket is quiet, let the peer's pongs show that nothing is on the way."""
    feed = books.feeds[stream]
    while stream in books.feeds:
        before = feed.newest
        await asyncio.sleep(QUIET_SECONDS)
        if feed.newest == before and feed.ahead is not None:
            asked = await stream.delivered()
            if asked is not None and feed.newest == before:
                feed.delivered = asked + feed.ahead


async def _check(books: Books) -> None:
    while True:
        books.check()
        await asyncio.sleep(CHECK_SECONDS)


async def _renew(books: Books) -> None:
    """Keep the hashes of quiet books from expiring."""
    while True:
        await asyncio.sleep(RENEWAL_SECONDS)
        for market, keeper in books.keepers.items():
            if keeper.is_live:
                books.latest.changed(market)


async def _audit(books: Books) -> None:
    """Have one book after another compared with a new image, at a slow rate; 0 is never."""
    while True:
        for keeper in list(books.keepers.values()):
            if seconds := books.process.settings.book_audit_seconds:
                await asyncio.sleep(seconds)
                keeper.audit()
        await asyncio.sleep(CHECK_SECONDS)
