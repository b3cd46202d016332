"""Klines: bars of trades in the sixteen intervals of the exchange, in UTC or UTC+8."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from sluice.simulator.fixed import product

SECOND = 1_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
WEEK = 7 * DAY
INTERVALS = {
    "1s": SECOND,
    "1m": MINUTE,
    "3m": 3 * MINUTE,
    "5m": 5 * MINUTE,
    "15m": 15 * MINUTE,
    "30m": 30 * MINUTE,
    "1h": HOUR,
    "2h": 2 * HOUR,
    "4h": 4 * HOUR,
    "6h": 6 * HOUR,
    "8h": 8 * HOUR,
    "12h": 12 * HOUR,
    "1d": DAY,
    "3d": 3 * DAY,
    "1w": WEEK,
    "1M": 0,  # a calendar month has no fixed length
}
_MONDAY = 4 * DAY  # the epoch was a Thursday


def open_time(interval: str, time: int, offset: int = 0) -> int:
    """Give when the bar that holds `time` opened; all in milliseconds, `offset` east of UTC."""
    local = time + offset
    if interval == "1M":
        month = datetime.fromtimestamp(local // 1000, UTC).replace(
            day=1, hour=0, minute=0, second=0, microsecond=0
        )
        return int(month.timestamp()) * 1000 - offset
    length = INTERVALS[interval]
    shift = _MONDAY if interval == "1w" else 0
    return (local - shift) // length * length + shift - offset


def next_open(interval: str, opened: int, offset: int = 0) -> int:
    """Give when the bar after the one opened at `opened` opens."""
    if interval == "1M":
        return open_time(interval, opened + 32 * DAY, offset)
    return opened + INTERVALS[interval]


@dataclass(slots=True)
class Bar:
    """One bar; prices and volumes in units of 1e-8, an empty bar has no trade ids (-1)."""

    opened: int
    open: int
    high: int
    low: int
    close: int
    first_id: int = -1
    last_id: int = -1
    count: int = 0
    volume: int = 0
    quote: int = 0
    taker_volume: int = 0
    taker_quote: int = 0

    def add(self, trade_id: int, price: int, quantity: int, *, buyer_is_maker: bool) -> None:
        """Take one more trade in."""
        if not self.count:
            self.first_id = trade_id
            self.open = self.high = self.low = price
        self.last_id = trade_id
        self.count += 1
        self.high = max(self.high, price)
        self.low = min(self.low, price)
        self.close = price
        quote = product(price, quantity)
        self.volume += quantity
        self.quote += quote
        if not buyer_is_maker:
            self.taker_volume += quantity
            self.taker_quote += quote


class BarSeries:
    """The bars of one interval, oldest first; only bars with trades are held."""

    def __init__(self, interval: str, offset: int = 0) -> None:
        self.interval = interval
        self.offset = offset
        self._bars: dict[int, Bar] = {}
        self._opened: list[int] = []
        self._current: Bar | None = None
        self._ends = 0

    def add(
        self, trade_id: int, price: int, quantity: int, time: int, *, buyer_is_maker: bool
    ) -> None:
        """Take one trade in, at `time` (milliseconds)."""
        bar = self._current
        if bar is None or not bar.opened <= time < self._ends:
            opened = open_time(self.interval, time, self.offset)
            bar = self._bars.get(opened)
            if bar is None:
                bar = self._bars[opened] = Bar(opened, price, price, price, price)
                self._opened.insert(bisect_right(self._opened, opened), opened)
            self._current = bar
            self._ends = next_open(self.interval, opened, self.offset)
        bar.add(trade_id, price, quantity, buyer_is_maker=buyer_is_maker)

    def at(self, opened: int) -> Bar | None:
        """Give the bar opened at `opened`; empty and flat at the last close where nobody traded.

        None before the first trade of all.
        """
        bar = self._bars.get(opened)
        if bar is not None:
            return bar
        before = bisect_right(self._opened, opened)
        if not before:
            return None
        close = self._bars[self._opened[before - 1]].close
        return Bar(opened, close, close, close, close)

    def since(self, time: int) -> Iterator[Bar]:
        """Give the bars with trades that opened at `time` or later."""
        for opened in self._opened[bisect_right(self._opened, time - 1) :]:
            yield self._bars[opened]

    def last_close_before(self, time: int) -> int | None:
        """Give the close of the last bar with trades that opened before `time`."""
        before = bisect_right(self._opened, time - 1)
        return self._bars[self._opened[before - 1]].close if before else None

    def between(self, start: int | None, end: int | None, limit: int, now: int) -> list[Bar]:
        """Give at most `limit` bars, empty ones too, opened in [start, end], ascending."""
        if not self._opened:
            return []
        first = self._opened[0]
        last = open_time(self.interval, now if end is None else min(end, now), self.offset)
        if start is None:
            opened = last
            for _ in range(limit - 1):
                earlier = open_time(self.interval, opened - 1, self.offset)
                if earlier < first:
                    break
                opened = earlier
        else:
            opened = open_time(self.interval, max(start, first), self.offset)
            if opened < start:
                opened = next_open(self.interval, opened, self.offset)
        bars: list[Bar] = []
        while opened <= last and len(bars) < limit:
            if bar := self.at(opened):
                bars.append(bar)
            opened = next_open(self.interval, opened, self.offset)
        return bars
