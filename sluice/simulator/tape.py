"""What a symbol has published so far: trades, the book at every update, bars.

The one truth of the simulator; sockets, REST and the control port only print from it.
Prices and quantities are integers in units of 1e-8, times are milliseconds.
"""

import heapq
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sluice.simulator.bars import BarSeries
from sluice.simulator.market import Change

CHECKPOINT_CHANGES = 20_000  # level changes between two whole copies of a book
MAX_CHANGES = 4_000_000  # level changes a symbol remembers; older books are forgotten
MAX_TRADES = 10_000_000  # trades a symbol remembers


class Trade(NamedTuple):
    """One published trade."""

    id: int
    price: int
    quantity: int
    time: int
    buyer_is_maker: bool


class AggTrade(NamedTuple):
    """The fills of one taker order at one price."""

    id: int
    price: int
    quantity: int
    first_id: int
    last_id: int
    time: int
    buyer_is_maker: bool


class Levels(NamedTuple):
    """A whole book at `update_id`: quantity by price."""

    update_id: int
    bids: dict[int, int]
    asks: dict[int, int]


class TradeLog:
    """Every published trade, found by id."""

    def __init__(self) -> None:
        self._ids = array("q")
        self._prices = array("q")
        self._quantities = array("q")
        self._times = array("q")
        self._makers = bytearray()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, trade: Trade) -> None:
        """Take the next trade in; ids ascend."""
        self._ids.append(trade.id)
        self._prices.append(trade.price)
        self._quantities.append(trade.quantity)
        self._times.append(trade.time)
        self._makers.append(trade.buyer_is_maker)
        if len(self._ids) > MAX_TRADES:
            for column in (self._ids, self._prices, self._quantities, self._times, self._makers):
                del column[: MAX_TRADES // 10]

    def at(self, index: int) -> Trade:
        """Give the trade at a position, counted from the oldest."""
        return Trade(
            self._ids[index],
            self._prices[index],
            self._quantities[index],
            self._times[index],
            bool(self._makers[index]),
        )

    def get(self, trade_id: int) -> Trade | None:
        """Give one trade by its id."""
        index = bisect_left(self._ids, trade_id)
        if index < len(self._ids) and self._ids[index] == trade_id:
            return self.at(index)
        return None

    def since(self, trade_id: int) -> Iterator[Trade]:
        """Give the trades with this id or a higher one, ascending."""
        for index in range(bisect_left(self._ids, trade_id), len(self._ids)):
            yield self.at(index)

    def before(self, trade_id: int, limit: int) -> Iterator[Trade]:
        """Give the last `limit` trades with lower ids, ascending."""
        end = bisect_left(self._ids, trade_id)
        for index in range(max(0, end - limit), end):
            yield self.at(index)

    def newest(self, limit: int) -> Iterator[Trade]:
        """Give the last `limit` trades, ascending."""
        for index in range(max(0, len(self._ids) - limit), len(self._ids)):
            yield self.at(index)

    def __iter__(self) -> Iterator[Trade]:
        return (self.at(index) for index in range(len(self._ids)))

    @property
    def first_id(self) -> int | None:
        """The oldest id, or None before the first trade."""
        return self._ids[0] if self._ids else None

    @property
    def last_id(self) -> int | None:
        """The newest id, or None before the first trade."""
        return self._ids[-1] if self._ids else None


class BookLog:
    """The book, and what it was at every earlier update id as far back as it is remembered."""

    def __init__(self) -> None:
        self.update_id = 0
        self.bids: dict[int, int] = {}
        self.asks: dict[int, int] = {}
        self._best_bid: int | None = None
        self._best_ask: int | None = None
        self._ids = array("q")
        self._sides = bytearray()
        self._prices = array("q")
        self._quantities = array("q")
        self._forgotten = 0  # changes dropped from the front of the log
        self._copies: list[tuple[int, Levels]] = []

    def load(self, update_id: int, levels: Iterable[Change]) -> None:
        """Begin with a whole book at `update_id`."""
        self.update_id = update_id
        self.bids, self.asks = {}, {}
        for is_bid, price, quantity in levels:
            (self.bids if is_bid else self.asks)[price] = quantity
        self._best_bid = max(self.bids, default=None)
        self._best_ask = min(self.asks, default=None)
        self._copy()

    def apply(self, update_id: int, changes: Iterable[Change]) -> None:
        """Set levels; the book is then the one at `update_id`."""
        for is_bid, price, quantity in changes:
            levels = self.bids if is_bid else self.asks
            if quantity:
                levels[price] = quantity
            else:
                levels.pop(price, None)
            self._ids.append(update_id)
            self._sides.append(is_bid)
            self._prices.append(price)
            self._quantities.append(quantity)
            self._follow_best(is_bid, price, quantity)
        self.update_id = update_id
        if self._forgotten + len(self._ids) >= self._copies[-1][0] + CHECKPOINT_CHANGES:
            self._copy()
            self._forget()

    @property
    def best(self) -> tuple[int | None, int | None]:
        """Best bid and best ask prices."""
        return self._best_bid, self._best_ask

    @property
    def oldest(self) -> Levels:
        """The earliest book that is remembered."""
        return self._copies[0][1]

    def at(self, update_id: int) -> Levels | None:
        """Give the book after the last update up to `update_id`; None where it is forgotten."""
        if not self._copies or update_id < self.oldest.update_id:
            return None
        if update_id >= self.update_id:
            return Levels(self.update_id, dict(self.bids), dict(self.asks))
        where = bisect_right(self._copies, update_id, key=lambda copy: copy[1].update_id) - 1
        position, copy = self._copies[where]
        bids, asks, reached = dict(copy.bids), dict(copy.asks), copy.update_id
        for index in range(position - self._forgotten, len(self._ids)):
            if self._ids[index] > update_id:
                break
            reached = self._ids[index]
            levels = bids if self._sides[index] else asks
            if self._quantities[index]:
                levels[self._prices[index]] = self._quantities[index]
            else:
                levels.pop(self._prices[index], None)
        return Levels(reached, bids, asks)

    def _follow_best(self, is_bid: bool, price: int, quantity: int) -> None:  # noqa: FBT001 - a side
        if is_bid:
            if quantity and (self._best_bid is None or price > self._best_bid):
                self._best_bid = price
            elif not quantity and price == self._best_bid:
                self._best_bid = max(self.bids, default=None)
        elif quantity and (self._best_ask is None or price < self._best_ask):
            self._best_ask = price
        elif not quantity and price == self._best_ask:
            self._best_ask = min(self.asks, default=None)

    def _copy(self) -> None:
        position = self._forgotten + len(self._ids)
        levels = Levels(self.update_id, dict(self.bids), dict(self.asks))
        self._copies.append((position, levels))

    def _forget(self) -> None:
        while len(self._ids) > MAX_CHANGES:
            del self._copies[0]
            dropped = self._copies[0][0] - self._forgotten
            for column in (self._ids, self._sides, self._prices, self._quantities):
                del column[:dropped]
            self._forgotten += dropped


def top(levels: dict[int, int], count: int, *, is_bid: bool) -> list[tuple[int, int]]:
    """Give the best `count` levels of a side as (price, quantity), the best first."""
    if count * 4 < len(levels):
        picked = heapq.nlargest(count, levels) if is_bid else heapq.nsmallest(count, levels)
    else:
        picked = sorted(levels, reverse=is_bid)[:count]
    return [(price, levels[price]) for price in picked]


class Tape:
    """All that one symbol has published."""

    def __init__(self, symbol: str) -> None:
        self.symbol = symbol
        self.trades = TradeLog()
        self.book = BookLog()
        self.aggs: list[AggTrade] = []
        self._open_agg: tuple[object, AggTrade] | None = None
        self._next_agg_id: int | None = None
        self._series: dict[tuple[str, int], BarSeries] = {}
        self.minutes = self.series("1m")

    def trade(self, trade: Trade, order: object) -> AggTrade | None:
        """Take the next trade in; `order` names the taker order it belongs to.

        Returns:
            The aggregate that this trade completed, if it began a new one.
        """
        self.trades.add(trade)
        for series in self._series.values():
            series.add(
                trade.id,
                trade.price,
                trade.quantity,
                trade.time,
                buyer_is_maker=trade.buyer_is_maker,
            )
        key = (order, trade.price, trade.buyer_is_maker)
        completed = None
        if self._open_agg is not None:
            if self._open_agg[0] == key:
                agg = self._open_agg[1]
                self._open_agg = (
                    key,
                    agg._replace(quantity=agg.quantity + trade.quantity, last_id=trade.id),
                )
                return None
            completed = self.close_aggregate()
        if self._next_agg_id is None:
            self._next_agg_id = trade.id * 2 // 3
        self._open_agg = (
            key,
            AggTrade(
                self._next_agg_id,
                trade.price,
                trade.quantity,
                trade.id,
                trade.id,
                trade.time,
                trade.buyer_is_maker,
            ),
        )
        self._next_agg_id += 1
        return completed

    def close_aggregate(self) -> AggTrade | None:
        """Publish the aggregate that is being collected, if there is one."""
        if self._open_agg is None:
            return None
        agg = self._open_agg[1]
        self._open_agg = None
        self.aggs.append(agg)
        if len(self.aggs) > MAX_TRADES // 10:
            del self.aggs[: MAX_TRADES // 100]
        return agg

    def series(self, interval: str, offset: int = 0) -> BarSeries:
        """Give the bars of an interval; the first request builds them from the trades."""
        series = self._series.get((interval, offset))
        if series is None:
            series = self._series[interval, offset] = BarSeries(interval, offset)
            for trade in self.trades:
                series.add(
                    trade.id,
                    trade.price,
                    trade.quantity,
                    trade.time,
                    buyer_is_maker=trade.buyer_is_maker,
                )
        return series
