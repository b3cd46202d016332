"""The collector's wiring: which sockets carry what, and where it goes."""

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

from loguru import logger
from prometheus_client.core import Metric
from redis.asyncio import Redis

from collector.aggregates import Aggregates
from collector.anchors import Anchors
from collector.backfill import Backfill, Venue
from collector.candles import Candles
from collector.ledger import TRADE, Ledger
from collector.listing import Listing
from collector.liveness import Liveness
from collector.plausibility import Plausibility
from collector.polling import AFTER_SECONDS, Polling
from collector.skew import ClockSkew
from collector.windows import Windows
from sluice import records
from sluice.budget import Budget
from sluice.clock import MICROS_PER_SECOND
from sluice.connections import connect_redis
from sluice.exchanges import EXCHANGES, Exchange
from sluice.exchanges.base import BadFrameError, Reply, ServerShutdown
from sluice.fitness import keep_file_whole, redis_is_fit, spool_is_fit
from sluice.lifecycle import Fact, Process
from sluice.metrics import counter, gauge
from sluice.presence import announce
from sluice.publisher import Publisher
from sluice.records import Kline, Ticker, Trade
from sluice.rest import RestClient
from sluice.settings import Market, Settings
from sluice.sockets import Sockets, tell_markets
from sluice.stream import ConnectGate, Stream

RATE_SECONDS: Final = 30.0
_UNREAD: Final = (
    "snapshot_",
    "publish_",
    "book_",
    "flush_",
    "dead_",
    "chunk_",
    "column",
    "retention_",
)
_RELOADED: Final = {"symbols", "streams"}


@dataclass
class Intake:
    """Reads frames into records and hands them on; the one piece of work done for every message."""

    exchange: Exchange
    publisher: Publisher
    last_seen: dict[Market, float]
    windows: Windows
    plausibility: Plausibility = field(default_factory=Plausibility)
    messages: Counter[str] = field(default_factory=Counter)
    lag: float = 0.0
    """Seconds from the exchange's time of the last trade to our reading it."""

    def read(self, stream: Stream, frame: bytes, ts_recv: int) -> None:
        """Take one frame; a bad one is counted and kept."""
        try:
            messages = self.exchange.parse(frame, ts_recv)
        except BadFrameError as error:
            self.publisher.put_bad_frame(frame, f"{self.exchange.name}: {error}")
            return
        for message in messages:
            if isinstance(message, Trade):
                self.messages[TRADE] += 1
                market = Market(message.exchange, message.symbol)
                if market in self.last_seen:  # what a socket still brings of one removed is not
                    self.last_seen[market] = time.monotonic()
                self.lag = (ts_recv - message.ts_event) / MICROS_PER_SECOND
                self._put_trade(message)
            elif isinstance(message, Kline | Ticker):
                self.messages[type(message).__name__.lower()] += 1
                self.publisher.put(message)
                self.windows.read(message)
            elif isinstance(message, ServerShutdown):
                stream.renew("the server shuts down")
            elif isinstance(message, Reply) and message.error is not None:
                logger.error(
                    "{}: {} refuses our request {}: {}; check SYMBOLS and STREAMS",
                    stream.name,
                    self.exchange.name,
                    message.request_id,
                    message.error,
                )

    def _put_trade(self, trade: Trade) -> None:
        believed, refuted = self.plausibility.admit(trade)
        for each in believed:
            self.publisher.put(each)
        if refuted is not None:
            reason = f"{self.exchange.name}: trade id {refuted.trade_id} is not believed: next came"
            self.publisher.put_bad_frame(records.encode(refuted), f"{reason} {trade.trade_id}")


class Rate:
    """How much a count rose a second, over the last RATE_SECONDS or since the start."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque([(clock(), 0)])

    def of(self, count: int) -> float:
        """Give the rate, knowing what the count is now."""
        now = self._clock()
        while len(self._marks) > 1 and self._marks[1][0] <= now - RATE_SECONDS:
            self._marks.popleft()
        since, before = self._marks[0]
        self._marks.append((now, count))
        return (count - before) / max(now - since, 1e-3)


@dataclass
class Collector:
    """Everything a running collector holds."""

    process: Process
    publisher: Publisher
    windows: Windows
    streams: dict[Stream, list[Market]] = field(default_factory=dict)
    intakes: dict[str, Intake] = field(default_factory=dict)
    last_seen: dict[Market, float] = field(default_factory=dict)
    backfill: Backfill | None = None
    candles: Candles | None = None
    liveness: Liveness | None = None
    skew: ClockSkew | None = None
    polling: Polling | None = None
    listing: Listing | None = None
    rate: Rate = field(default_factory=Rate)

    @property
    def markets(self) -> set[Market]:
        """The markets that the sockets carry."""
        return {market for markets in self.streams.values() for market in markets}

    def connection_changed(self) -> None:
        """Tell readiness how many sockets are open."""
        missing = sum(not stream.is_connected for stream in self.streams)
        if missing:
            self.process.health.wait_for("sockets", f"{missing} of {len(self.streams)} not open")
        else:
            self.process.health.ready("sockets")

    def disconnected(self, stream: Stream) -> None:
        """Note that a socket has ended: what has no ids is missed until it is back."""
        self.windows.broken(self.streams.get(stream, ()))
        self.connection_changed()

    def renew(self, market: Market, reason: str) -> None:
        """Replace the sockets that carry a market."""
        for stream, markets in self.streams.items():
            if market in markets:
                self.windows.broken(markets)
                stream.renew(reason)

    def progress(self) -> None:
        """Note that a socket got on; that is none while what it brings goes nowhere."""
        if not self.publisher.is_stuck:
            self.process.progress()

    def unreachable(self) -> list[Market]:
        """Name the markets whose trades have had no socket for long."""
        return [
            market
            for stream, markets in self.streams.items()
            if stream.unheard_seconds > AFTER_SECONDS
            for market in markets
            if market in self.last_seen
        ]

    @property
    def open_gaps(self) -> int:
        """How many gaps are worked on, of ids and of candles."""
        return sum(work.open_gaps for work in (self.backfill, self.candles) if work is not None)

    def statistics(self) -> str:
        """Give the line that is logged every 30 s."""
        counts = self.publisher.counts
        messages = sum((intake.messages for intake in self.intakes.values()), Counter[str]())
        seen = (
            ", ".join(f"{count} {kind}s" for kind, count in sorted(messages.items())) or "nothing"
        )
        ended = sum(sum(stream.counts.disconnects.values()) for stream in self.streams)
        depths = " ".join(
            f"{kind} {depth}" for kind, depth in sorted(self.publisher.lengths.items())
        )
        gaps = self.open_gaps
        connected = sum(stream.is_connected for stream in self.streams)
        return (
            f"{connected} of {len(self.streams)} sockets, {ended} ended; "
            f"read {seen}, {self.rate.of(messages.total()):.0f}/s, {counts.bad_frames} bad frames; "
            f"pushed {sum(counts.pushed.values())}, in memory {self.publisher.in_memory}, "
            f"on disk {self.publisher.spool_records}, shed {counts.shed}, "
            f"{counts.failures} failed pushes; "
            f"open gaps {gaps}; queues: {depths or 'not pushed to yet'}"
        )

    def facts(self) -> dict[str, Fact]:
        """Give what `sluice status` shows."""
        messages = sum(intake.messages.total() for intake in self.intakes.values())
        return {
            "sockets": f"{sum(s.is_connected for s in self.streams)}/{len(self.streams)}",
            "messages/s": round(self.rate.of(messages)),
            **({"polled": len(self.polling.markets)} if self.polling else {}),
            "lag s": round(max((i.lag for i in self.intakes.values()), default=0.0), 3),
            "on disk": self.publisher.spool_records,
        }

    def metrics(self) -> Iterable[Metric]:
        """Give the families behind `/metrics`."""
        counts = self.publisher.counts
        yield counter(
            "collector_messages",
            "Messages read",
            [
                ({"exchange": name, "stream": kind}, count)
                for name, intake in self.intakes.items()
                for kind, count in intake.messages.items()
            ],
        )
        yield gauge(
            "collector_last_message_timestamp_seconds",
            "When each socket last brought a frame",
            [({"socket": s.name}, (s.counts.last_frame or 0.0)) for s in self.streams],
        )
        yield gauge(
            "collector_exchange_lag_seconds",
            "From the exchange's time of the last trade to our reading it",
            [({"exchange": name}, intake.lag) for name, intake in self.intakes.items()],
        )
        yield counter(
            "collector_reconnects",
            "Sockets that ended, by reason",
            [
                ({"socket": stream.name, "reason": reason}, count)
                for stream in self.streams
                for reason, count in stream.counts.disconnects.items()
            ],
        )
        yield counter("collector_bad_frames", "Frames nobody can read", [({}, counts.bad_frames)])
        yield from self.publisher.metrics()
        if self.backfill is not None:
            yield gauge("gaps_open", "Gaps being worked on", [({}, self.open_gaps)])
            yield counter("backfill_pages", "Pages asked for", [({}, self.backfill.pages)])
            yield counter("backfill_trades", "Trades fetched", [({}, self.backfill.filled)])
        if self.skew is not None:
            yield gauge(
                "collector_clock_skew_seconds",
                "How far our clock is ahead of the venue's",
                [({"exchange": name}, skew) for name, skew in self.skew.seconds.items()],
            )
        if self.polling is not None:
            yield gauge(
                "collector_polled_markets",
                "Markets polled over REST for want of a socket",
                [({}, len(self.polling.markets))],
            )
        if self.liveness is not None:
            yield counter("collector_stalls", "Silent sockets found", [({}, self.liveness.stalls)])


async def run(process: Process) -> None:
    """Collect until the process is told to stop, then push or spool what is in memory."""
    settings, stop = process.settings, process.stop
    spool_is_fit(settings)
    process.unread = _UNREAD
    async with AsyncExitStack() as clients:
        redis = connect_redis(settings)
        clients.push_async_callback(redis.aclose)
        publisher = Publisher(redis, settings)
        process.health.check("redis", publisher.unfitness)
        windows = Windows(redis, publisher)
        collector = Collector(process, publisher, windows)
        process.statistics.append(collector.statistics)
        process.metrics.append(collector.metrics)
        process.facts.append(collector.facts)

        sources = Sources(collector, redis, clients)
        backfill = collector.backfill = Backfill(
            redis, sources.ledgers, sources.venues, settings.gap_settle_ms, Aggregates(settings)
        )
        collector.candles = Candles(redis, sources.venues, sources.markets)
        collector.liveness = Liveness(redis, sources.venues, collector.last_seen, collector.renew)
        collector.skew = ClockSkew(sources.venues)
        collector.listing = Listing(sources.venues)
        collector.polling = Polling(
            redis, sources.venues, collector.unreachable, publisher.put, collector.last_seen
        )
        anchors = Anchors(redis, sources.ledgers, sources.venues, publisher.first_pushed, settings)

        def reload(new: Settings) -> set[str]:
            backfill.settle_ms = new.gap_settle_ms
            anchors.backfill_hours = new.backfill_hours
            return {"gap_settle_ms", "backfill_hours"}

        process.reload.append(reload)

        # The publisher stops last: it pushes what the sockets brought until their end.
        publisher_stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            fitness = tasks.create_task(redis_is_fit(redis, process.health))
            publishing = tasks.create_task(publisher.run(publisher_stop))
            tasks.create_task(announce(process, redis))
            tasks.create_task(keep_file_whole(redis, process.stop))
            sockets = Sockets(tasks)
            await sources.arrange(settings, sockets)
            following = tasks.create_task(sources.follow(sockets))
            # Nothing is judged before Redis is known to be one that keeps what it is told.
            keepers = tasks.create_task(
                _after(
                    fitness,
                    collector.backfill.run(stop),
                    collector.candles.run(stop),
                    windows.run(stop),
                    anchors.run(stop),
                    collector.skew.run(stop),
                    collector.liveness.run(stop),
                    collector.polling.run(stop),
                    collector.listing.run(stop),
                )
            )
            await stop.wait()
            fitness.cancel()
            following.cancel()
            await asyncio.wait([following])
            await sockets.close_all()
            publisher_stop.set()
            await publishing
            await windows.finish()
            await asyncio.wait([keepers], timeout=settings.drain_seconds / 4)
            keepers.cancel()


class Sources:
    """The venues that are recorded and their sockets; markets and streams follow the settings.

    `venues`, `markets` and `ledgers` only grow: what a market missed before it was removed is still
    fetched.
    """

    def __init__(self, collector: Collector, redis: Redis, clients: AsyncExitStack) -> None:
        self.venues: dict[str, Venue] = {}
        self.markets: set[Market] = set()
        self.ledgers: list[Ledger] = []
        self._collector = collector
        self._redis = redis
        self._clients = clients
        self._gates: dict[str, ConnectGate] = {}
        self._new: asyncio.Queue[Settings] = asyncio.Queue()
        collector.process.reload.append(self._reload)

    def _reload(self, new: Settings) -> set[str]:
        changes = {name: getattr(new, name) for name in _RELOADED}
        # Addresses and the like stay as they are until a restart, for new sockets too.
        self._new.put_nowait(self._collector.process.settings.model_copy(update=changes))
        return _RELOADED

    async def follow(self, sockets: Sockets) -> None:
        """Apply new settings as they come, one after another."""
        while True:
            new = await self._new.get()
            before = self._collector.markets
            await self.arrange(new, sockets)
            tell_markets(self._collector.process.name, before, self._collector.markets)

    async def arrange(self, settings: Settings, sockets: Sockets) -> None:
        """Have the sockets carry the markets and streams of the settings, and nothing else."""
        collector = self._collector
        wanted: dict[str, list[str]] = {name: [] for name in self.venues}
        for market in settings.markets:
            wanted.setdefault(market.exchange, []).append(market.symbol)
        before = collector.markets
        traded = settings.markets if TRADE in settings.streams else []
        self._look_after(traded)
        self.markets |= set(settings.markets)
        collector.windows.follow([name for name in settings.streams if name != TRADE])
        for name, symbols in wanted.items():
            if name not in self.venues:
                self._add_venue(EXCHANGES[name], settings)
            await self._arrange_venue(EXCHANGES[name], symbols, settings, sockets)
        for market in set(collector.last_seen).difference(traded):
            del collector.last_seen[market]
        collector.windows.broken(before - collector.markets)
        if collector.listing is not None:
            collector.listing.look_up(settings.markets)
        collector.connection_changed()

    def _look_after(self, markets: list[Market]) -> None:
        """Have what is missing of these markets found and fetched, and their silence noticed."""
        now = time.monotonic()
        known = {ledger.market for ledger in self.ledgers}
        for market in markets:
            self._collector.last_seen.setdefault(market, now)
            if market not in known:
                self.ledgers.append(Ledger(self._redis, market))

    def _add_venue(self, exchange: Exchange, settings: Settings) -> None:
        collector = self._collector
        rest = RestClient(exchange, settings, Budget(self._redis, exchange))
        self._clients.push_async_callback(rest.close)
        self.venues[exchange.name] = Venue(exchange, rest)
        self._gates[exchange.name] = ConnectGate(exchange)
        collector.intakes[exchange.name] = Intake(
            exchange, collector.publisher, collector.last_seen, collector.windows
        )

    async def _arrange_venue(
        self, exchange: Exchange, symbols: list[str], settings: Settings, sockets: Sockets
    ) -> None:
        """Spread a venue's channels over sockets, all streams of a market on the same one."""
        collector = self._collector
        held = {
            stream: [market.symbol for market in markets]
            for stream, markets in collector.streams.items()
            if markets[0].exchange == exchange.name
        }

        def channels(part: Sequence[str]) -> list[str]:
            return [exchange.channel(symbol, name) for symbol in part for name in settings.streams]

        def make(part: list[str]) -> Stream:
            used = {stream.name for stream in collector.streams}
            stream = self._stream(exchange, channels(part), settings, used)
            collector.streams[stream] = [Market(exchange.name, symbol) for symbol in part]
            return stream

        per_socket = max(1, exchange.streams_per_socket // len(settings.streams))
        carried = await sockets.rearrange(held, symbols, per_socket, channels, make)
        for stream in held:
            del collector.streams[stream]
        for stream, part in carried.items():
            collector.streams[stream] = [Market(exchange.name, symbol) for symbol in part]

    def _stream(
        self, exchange: Exchange, channels: list[str], settings: Settings, used: set[str]
    ) -> Stream:
        collector = self._collector
        proxy = settings.proxy_url.get_secret_value() if settings.proxy_url else None
        names = (f"{exchange.name}/{number}" for number in itertools.count())
        stream = Stream(
            exchange,
            getattr(settings, exchange.ws_setting),
            channels,
            collector.intakes[exchange.name].read,
            gate=self._gates[exchange.name],
            on_connected=collector.connection_changed,
            on_disconnected=lambda _: collector.disconnected(stream),
            on_progress=collector.progress,
            proxy=proxy,
            rollover_at=settings.rollover_times,
            name=next(name for name in names if name not in used),
        )
        return stream


async def _after(first: "asyncio.Task[None]", *then: Coroutine[None, None, None]) -> None:
    """Run coroutines side by side once a task is done."""
    try:
        await first
    except BaseException:
        for coroutine in then:
            coroutine.close()
        raise
    async with asyncio.TaskGroup() as tasks:
        for coroutine in then:
            tasks.create_task(coroutine)
