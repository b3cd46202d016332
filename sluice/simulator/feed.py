"""One symbol's streams: what is sent when something happens, and when a second passes.

Pure but for the publisher it is given; times are exchange time in milliseconds.
"""

import zlib
from collections.abc import Iterable
from typing import Protocol

from sluice.simulator import payloads
from sluice.simulator.bars import DAY, HOUR, INTERVALS, next_open, open_time
from sluice.simulator.market import Change
from sluice.simulator.tape import AggTrade, Levels, Tape, Trade

FAST_MS = 100
SLOW_MS = 1_000
MAX_CATCH_UP = 31 * DAY  # beyond, the clock jumped: bars that closed meanwhile are not sent
_OFFSETS = {"": 0, "@+08:00": 8 * HOUR}
_PARTIAL = (5, 10, 20)


class Publisher(Protocol):
    """Who carries payloads to the subscribers."""

    def wants(self, stream: str) -> bool:
        """Whether anybody is subscribed to the stream."""

    def publish(self, stream: str, payload: bytes, trade_id: int | None = None) -> None:
        """Send one payload to all subscribers; a raw trade says its id."""


class _Batch:
    """The levels that changed since the last diff of one speed."""

    def __init__(self) -> None:
        self.first_id = 0
        self.touched: dict[tuple[bool, int], None] = {}

    def add(self, first_id: int, changes: Iterable[Change]) -> None:
        if not self.first_id:
            self.first_id = first_id
        for is_bid, price, _ in changes:
            self.touched[is_bid, price] = None

    def clear(self) -> None:
        self.first_id = 0
        self.touched.clear()


class Feed:
    """Turns what happens to one symbol into stream payloads.

    A source that carries the fast diffs itself (a recording) has `has_own_diffs`: those are
    sent as they stand, and only the rest is made here.
    """

    def __init__(self, tape: Tape, publisher: Publisher, *, has_own_diffs: bool = False) -> None:
        self.tape = tape
        self._name = tape.symbol.lower()
        self._publisher = publisher
        self._has_own_diffs = has_own_diffs
        self._period = SLOW_MS if has_own_diffs else FAST_MS
        self._phase = 0 if has_own_diffs else zlib.crc32(tape.symbol.encode()) % FAST_MS
        self._edges = 0
        self._fast, self._slow = _Batch(), _Batch()
        self._best: tuple[int, ...] = ()
        self._pushed_bars: dict[tuple[str, str], int] = {}
        self._seen = (0, 0)
        self._first_heard: int | None = None  # update id of the newest listener's first diff
        self.next_edge = 0  # in the source's time
        self.skew = 0  # what is printed is the source's time and this many milliseconds

    def start(self, now: int) -> None:
        """Begin at `now`: the first diff comes at the first edge after it."""
        self.next_edge = now - now % self._period + self._phase + self._period

    def trade(self, trade: Trade, order: object, payload: bytes | None = None) -> None:
        """One match; `payload` where a recording has it verbatim."""
        if completed := self.tape.trade(trade, order):
            self._aggregate(completed)
        stream = f"{self._name}@trade"
        if self._publisher.wants(stream):
            if payload is None:
                payload = payloads.trade(self.tape.symbol, trade, trade.time + 1 + trade.id % 3)
            self._publisher.publish(stream, payload, trade.id)

    def change(self, span: tuple[int, int], changes: list[Change]) -> None:
        """Set levels, under the update ids from `span[0]` to `span[1]`."""
        self.tape.book.apply(span[1], changes)
        if not self._has_own_diffs:
            self._fast.add(span[0], changes)
        self._slow.add(span[0], changes)

    def diff(self, first_id: int, payload: bytes) -> None:
        """Send a fast diff as a recording has it."""
        if self._first_heard is None:
            self._first_heard = first_id
        self._publisher.publish(f"{self._name}@depth@100ms", payload)

    def is_older_than_heard(self, update_id: int) -> bool:
        """Whether a book leaves a hole before the first diff that the newest listener heard."""
        return self._first_heard is not None and update_id < self._first_heard - 1

    def listened(self) -> None:
        """Take note of a new listener: the next fast diff is its first."""
        self._first_heard = None

    def quote(self, payload: bytes | None = None) -> None:
        """Send the best bid and ask where they changed; `payload` where a recording has it."""
        stream = f"{self._name}@bookTicker"
        if not self._publisher.wants(stream):
            return
        if payload is None:
            best = payloads.best_quotes(self.tape)
            if best == self._best:
                return
            self._best = best
            payload = payloads.book_ticker(self.tape)
        self._publisher.publish(stream, payload)

    def settle(self) -> None:
        """Publish an aggregate that nothing will be added to."""
        if completed := self.tape.close_aggregate():
            self._aggregate(completed)

    def advance(self, now: int) -> None:
        """Send everything that is due up to and including `now`."""
        while self.next_edge <= now:
            self._edge(self.next_edge + self.skew)
            self.next_edge += self._period

    def _aggregate(self, row: AggTrade) -> None:
        stream = f"{self._name}@aggTrade"
        if self._publisher.wants(stream):
            self._publisher.publish(stream, payloads.agg_trade(self.tape.symbol, row, row.time + 1))

    def _edge(self, now: int) -> None:
        self._edges += 1
        if not self._has_own_diffs:
            self._send_diff(self._fast, "@depth@100ms", now)
            self._send_partial("@100ms")
        if self._edges * self._period % SLOW_MS == 0:
            self._second(now, self._edges * self._period // SLOW_MS)

    def _second(self, now: int, second: int) -> None:
        self._send_diff(self._slow, "@depth", now)
        self._send_partial("")
        for interval in INTERVALS:
            for suffix, offset in _OFFSETS.items():
                stream = f"{self._name}@kline_{interval}{suffix}"
                if self._publisher.wants(stream):
                    self._kline(stream, (interval, suffix), offset, now, second)
                else:
                    self._pushed_bars.pop((interval, suffix), None)
        seen = (len(self.tape.trades), self.tape.book.update_id)
        if seen != self._seen:
            self._seen = seen
            self._tickers(now)

    def _tickers(self, now: int) -> None:
        wants, publish = self._publisher.wants, self._publisher.publish
        mini, full, mini_all = f"{self._name}@miniTicker", f"{self._name}@ticker", "!miniTicker@arr"
        if wants(mini) or wants(full) or wants(mini_all):
            day = payloads.Window(self.tape, now)
            if wants(full):
                publish(full, payloads.ticker(day))
            if wants(mini):
                publish(mini, payloads.mini_ticker(day))
            if wants(mini_all):  # an array holds the symbols that changed: here, this one
                publish(mini_all, b"[%b]" % payloads.mini_ticker(day))
        for name, length in payloads.WINDOWS.items():
            one, every = f"{self._name}@ticker_{name}", f"!ticker_{name}@arr"
            if wants(one) or wants(every):
                payload = payloads.window_ticker(payloads.Window(self.tape, now, length), name)
                if wants(one):
                    publish(one, payload)
                if wants(every):
                    publish(every, b"[%b]" % payload)

    def _kline(self, stream: str, key: tuple[str, str], offset: int, now: int, second: int) -> None:
        interval = key[0]
        series = self.tape.series(interval, offset)
        opened = open_time(interval, now, offset)
        pushed = self._pushed_bars.get(key)
        if pushed is not None and pushed < opened <= pushed + MAX_CATCH_UP:
            while pushed < opened:  # the last word on every bar that closed since
                ends = next_open(interval, pushed, offset)
                if bar := series.at(pushed):
                    self._publisher.publish(
                        stream, payloads.kline(self.tape.symbol, interval, bar, ends, now)
                    )
                pushed = ends
        elif interval != "1s" and second % 2:
            return
        self._pushed_bars[key] = opened
        if bar := series.at(opened):
            ends = next_open(interval, opened, offset)
            self._publisher.publish(
                stream, payloads.kline(self.tape.symbol, interval, bar, ends, now)
            )

    def _send_diff(self, batch: _Batch, suffix: str, now: int) -> None:
        if not batch.first_id:
            return
        stream = self._name + suffix
        if batch is self._fast and self._first_heard is None:
            self._first_heard = batch.first_id
        if self._publisher.wants(stream):
            book = self.tape.book
            bids = [(price, book.bids.get(price, 0)) for is_bid, price in batch.touched if is_bid]
            asks = [
                (price, book.asks.get(price, 0)) for is_bid, price in batch.touched if not is_bid
            ]
            span = (batch.first_id, book.update_id)
            self._publisher.publish(
                stream,
                payloads.depth(
                    self.tape.symbol, span, now, sorted(bids, reverse=True), sorted(asks)
                ),
            )
        batch.clear()

    def _send_partial(self, suffix: str) -> None:
        for count in _PARTIAL:
            stream = f"{self._name}@depth{count}{suffix}"
            if self._publisher.wants(stream):
                book = self.tape.book
                levels = Levels(book.update_id, book.bids, book.asks)
                self._publisher.publish(stream, payloads.snapshot(levels, count))
