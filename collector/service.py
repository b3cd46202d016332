"""The collector's wiring: which sockets carry what, and where it goes."""

import asyncio
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from loguru import logger
from prometheus_client.core import Metric

from collector.aggregates import Aggregates
from collector.anchors import Anchors
from collector.backfill import Backfill, Venue
from collector.candles import Candles
from collector.ledger import TRADE, Ledger
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
from sluice.fitness import redis_is_fit, spool_is_fit
from sluice.lifecycle import Fact, Process
from sluice.metrics import counter, gauge
from sluice.presence import announce
from sluice.publisher import Publisher
from sluice.records import Kline, Ticker, Trade
from sluice.rest import RestClient
from sluice.settings import Market
from sluice.stream import ConnectGate, Stream, split

RATE_SECONDS: Final = 30.0


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
                self.last_seen[Market(message.exchange, message.symbol)] = time.monotonic()
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
    rate: Rate = field(default_factory=Rate)

    def connection_changed(self) -> None:
        """Tell readiness how many sockets are open."""
        missing = sum(not stream.is_connected for stream in self.streams)
        if missing:
            self.process.health.wait_for("sockets", f"{missing} of {len(self.streams)} not open")
        else:
            self.process.health.ready("sockets")

    def disconnected(self, markets: list[Market], _: str) -> None:
        """Note that a socket has ended: what has no ids is missed until it is back."""
        self.windows.broken(markets)
        self.connection_changed()

    def renew(self, market: Market, reason: str) -> None:
        """Replace the sockets that carry a market."""
        for stream, markets in self.streams.items():
            if market in markets:
                self.windows.broken(markets)
                stream.renew(reason)

    def unreachable(self) -> list[Market]:
        """Name the markets that have had no socket for long."""
        return [
            market
            for stream, markets in self.streams.items()
            if stream.unheard_seconds > AFTER_SECONDS
            for market in markets
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
    async with AsyncExitStack() as clients:
        redis = connect_redis(settings)
        clients.push_async_callback(redis.aclose)
        publisher = Publisher(redis, settings)
        process.health.check("redis", publisher.unfitness)
        windows = Windows(redis, publisher, [name for name in settings.streams if name != TRADE])
        collector = Collector(process, publisher, windows)
        process.statistics.append(collector.statistics)
        process.metrics.append(collector.metrics)
        process.facts.append(collector.facts)

        by_exchange: dict[str, list[Market]] = defaultdict(list)
        for market in settings.markets:
            by_exchange[market.exchange].append(market)
        venues = {}
        for name, markets in by_exchange.items():
            exchange = EXCHANGES[name]
            rest = RestClient(exchange, settings, Budget(redis, exchange))
            clients.push_async_callback(rest.close)
            venues[name] = Venue(exchange, rest)
            _add_streams(collector, exchange, markets)
        collector.connection_changed()

        ledgers = [
            Ledger(redis, market) for market in settings.markets if TRADE in settings.streams
        ]
        collector.backfill = Backfill(
            redis, ledgers, venues, settings.gap_settle_ms, Aggregates(settings)
        )
        collector.candles = Candles(redis, venues, settings.markets)
        collector.liveness = Liveness(redis, venues, collector.last_seen, collector.renew)
        collector.skew = ClockSkew(venues)
        collector.polling = Polling(
            redis, venues, collector.unreachable, publisher.put, collector.last_seen
        )
        anchors = Anchors(redis, ledgers, venues, publisher.first_pushed, settings)

        # The publisher stops last: it pushes what the sockets brought until their end.
        publisher_stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            fitness = tasks.create_task(redis_is_fit(redis, process.health))
            publishing = tasks.create_task(publisher.run(publisher_stop))
            tasks.create_task(announce(process, redis))
            sources = [tasks.create_task(stream.run(stop)) for stream in collector.streams]
            # Nothing is judged before Redis is known to be one that keeps what it is told.
            keepers = tasks.create_task(
                _after(
                    fitness,
                    collector.backfill.run(stop),
                    collector.candles.run(stop),
                    windows.run(stop),
                    anchors.run(stop),
                    collector.skew.run(stop),
                    *(
                        [collector.liveness.run(stop), collector.polling.run(stop)]
                        if ledgers
                        else []
                    ),
                )
            )
            await stop.wait()
            fitness.cancel()
            await asyncio.wait(sources)
            publisher_stop.set()
            await publishing
            await windows.finish()
            await asyncio.wait([keepers], timeout=settings.drain_seconds / 4)
            keepers.cancel()


def _add_streams(collector: Collector, exchange: Exchange, markets: list[Market]) -> None:
    """Spread a venue's channels over sockets, all streams of a market on the same one."""
    process, settings = collector.process, collector.process.settings
    intake = Intake(exchange, collector.publisher, collector.last_seen, collector.windows)
    collector.intakes[exchange.name] = intake
    gate = ConnectGate(exchange)
    now = time.monotonic()
    if TRADE in settings.streams:
        collector.last_seen.update(dict.fromkeys(markets, now))
    per_socket = max(1, exchange.streams_per_socket // max(1, len(settings.streams)))
    proxy = settings.proxy_url.get_secret_value() if settings.proxy_url else None
    symbols = [market.symbol for market in markets]
    for number, part in enumerate(split(symbols, per_socket)):
        carried = [Market(exchange.name, symbol) for symbol in part]
        channels = [exchange.channel(symbol, s) for symbol in part for s in settings.streams]
        stream = Stream(
            exchange,
            getattr(settings, exchange.ws_setting),
            channels,
            intake.read,
            gate=gate,
            on_connected=collector.connection_changed,
            on_disconnected=partial(collector.disconnected, carried),
            on_progress=process.progress,
            proxy=proxy,
            rollover_at=settings.rollover_times,
            name=f"{exchange.name}/{number}",
        )
        collector.streams[stream] = carried


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
