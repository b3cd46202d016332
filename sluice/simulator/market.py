"""A synthetic market: a price-time matching book under a seeded flow of orders.

Pure: the same instrument, seed and rate give the same orders, fills and levels for ever.
"""

import math
import random
import zlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sluice.simulator.fixed import ONE

QUOTES = ("USDT", "USDC", "FDUSD", "BTC", "ETH", "EUR")
NOTIONAL = 500  # mean size of an order in quote units
RESTING = 300  # orders a side the flow returns to
REPLENISH = 20.0  # maker orders a second even where nobody trades
MAKERS_PER_TRADE = 1.5
AGAINST = 0.2  # share of takers that trade against a fair price outside the spread
LIMITED = 0.3  # share of takers that name a limit, at which the rest of their order rests
VOLATILITY = 3e-5  # standard deviation of one step of the fair price, relative


@dataclass(frozen=True, slots=True)
class Instrument:
    """What the exchange states about a symbol; prices and sizes in units of 1e-8."""

    symbol: str
    base: str
    quote: str
    tick: int
    step: int
    price: int
    weight: float
    first_trade_id: int
    first_update_id: int


_KNOWN: Mapping[str, tuple[int, int, int, float]] = {
    # symbol: tick, step, opening price, share of the activity
    "BTCUSDT": (1_000_000, 1_000, 9_123_410_000_000, 4.0),
    "ETHUSDT": (1_000_000, 10_000, 312_050_000_000, 3.0),
    "SOLUSDT": (1_000_000, 100_000, 14_237_000_000, 2.0),
    "NEXOUSDT": (100_000, 1_000_000, 121_600_000, 1.0),
}


def instrument(symbol: str) -> Instrument:
    """Describe any symbol, the same way each time; names without facts get them from a hash."""
    digest = zlib.crc32(symbol.encode())
    quote = next((q for q in QUOTES if symbol.endswith(q) and symbol != q), symbol[-3:])
    tick, step, price, weight = _KNOWN.get(symbol, (0, 0, 0, 1.0))
    if not tick:
        tick = 10 ** (4 + digest % 3)
        step = 10 ** (5 + digest // 7 % 3)
        price = tick * (2_000 + digest // 11 % 50_000)
    return Instrument(
        symbol=symbol,
        base=symbol.removesuffix(quote),
        quote=quote,
        tick=tick,
        step=step,
        price=price,
        weight=weight,
        first_trade_id=1_000_000 + digest % 5_000_000_000,
        first_update_id=10_000_000_000 + digest * 7 % 50_000_000_000,
    )


class Fill(NamedTuple):
    """One match; price and quantity in units of 1e-8."""

    price: int
    quantity: int


class Change(NamedTuple):
    """The new total of one level; zero where the level is gone."""

    is_bid: bool
    price: int
    quantity: int


class Step(NamedTuple):
    """All that one order or one cancellation did, at `time_us`."""

    time_us: int
    order_id: int
    buyer_is_maker: bool
    fills: list[Fill]
    changes: list[Change]


class _Side:
    """One side of the book: orders in price-time priority, in ticks and lots."""

    def __init__(self, sign: int) -> None:
        self.sign = sign
        self.orders: dict[int, dict[int, int]] = {}
        self.totals: dict[int, int] = {}
        self._keys: list[int] = []  # sign * price, so that the best price is the last key

    def best(self) -> int | None:
        return self.sign * self._keys[-1] if self._keys else None

    def add(self, price: int, order_id: int, lots: int) -> None:
        level = self.orders.get(price)
        if level is None:
            level = self.orders[price] = {}
            self.totals[price] = 0
            insort(self._keys, self.sign * price)
        level[order_id] = lots
        self.totals[price] += lots

    def reduce(self, price: int, order_id: int, lots: int) -> None:
        level = self.orders[price]
        left = level[order_id] - lots
        self.totals[price] -= lots
        if left:
            level[order_id] = left
            return
        del level[order_id]
        if not level:
            del self.orders[price], self.totals[price]
            del self._keys[bisect_left(self._keys, self.sign * price)]


class MatchingBook:
    """Limit orders in price-time priority; prices in ticks, sizes in lots."""

    def __init__(self) -> None:
        self.bids = _Side(1)
        self.asks = _Side(-1)
        self._places: dict[int, tuple[bool, int]] = {}
        self._ids: list[int] = []
        self._positions: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, order_id: int) -> bool:
        return order_id in self._places

    def take(
        self, order_id: int, *, is_buy: bool, lots: int, limit: int | None = None
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """Match an incoming order; with a `limit`, what is left rests at it.

        Returns:
            The fills as (price, lots), and the ids of resting orders that were filled whole.
        """
        other = self.asks if is_buy else self.bids
        fills: list[tuple[int, int]] = []
        done: list[int] = []
        while lots:
            price = other.best()
            if price is None or (limit is not None and other.sign * (limit - price) > 0):
                break
            maker, available = next(iter(other.orders[price].items()))
            matched = min(available, lots)
            other.reduce(price, maker, matched)
            fills.append((price, matched))
            lots -= matched
            if matched == available:
                done.append(maker)
                self._forget(maker)
        if lots and limit is not None:
            self.rest(order_id, is_bid=is_buy, price=limit, lots=lots)
        return fills, done

    def rest(self, order_id: int, *, is_bid: bool, price: int, lots: int) -> None:
        """Add an order that matches nothing."""
        (self.bids if is_bid else self.asks).add(price, order_id, lots)
        self._places[order_id] = (is_bid, price)
        self._positions[order_id] = len(self._ids)
        self._ids.append(order_id)

    def cancel(self, order_id: int) -> tuple[bool, int]:
        """Remove a resting order; gives its side (is it a bid?) and price."""
        is_bid, price = self._places[order_id]
        side = self.bids if is_bid else self.asks
        side.reduce(price, order_id, side.orders[price][order_id])
        self._forget(order_id)
        return is_bid, price

    def nth(self, n: int) -> int:
        """Name the n-th resting order, in an order that only the book's own history decides."""
        return self._ids[n]

    def _forget(self, order_id: int) -> None:
        del self._places[order_id]
        position = self._positions.pop(order_id)
        last = self._ids.pop()
        if last != order_id:
            self._ids[position] = last
            self._positions[last] = position


@dataclass(slots=True)
class Market:
    """The order flow of one instrument, drawn from `seed`, at about `rate` trades a second."""

    instrument: Instrument
    seed: int
    rate: float
    book: MatchingBook = field(default_factory=MatchingBook)
    _random: random.Random = field(init=False)
    _fair: float = field(init=False)
    _lots: float = field(init=False)
    _last_order: int = 0
    _next_us: float = 0.0
    _fills_per_taker: float = 1.5

    def __post_init__(self) -> None:
        """Fill the opening book."""
        facts = self.instrument
        self._random = random.Random(f"{self.seed}/{facts.symbol}")
        self._fair = facts.price / facts.tick
        self._lots = max(2.0, NOTIONAL * ONE / (facts.price / ONE * facts.step))
        for _ in range(RESTING):
            self._add_maker(is_bid=True)
            self._add_maker(is_bid=False)

    def levels(self) -> Iterator[Change]:
        """Give the whole book as it stands."""
        for is_bid, side in ((True, self.book.bids), (False, self.book.asks)):
            for price, lots in side.totals.items():
                yield self._change(is_bid, price, lots)

    def start(self, time_us: int) -> None:
        """Let the next order come after `time_us`; nothing happened before it."""
        self._next_us = time_us + self._pause_us()

    def advance(self, until_us: int) -> Iterator[Step]:
        """Give what happens up to and including `until_us`, in order of time."""
        while self._next_us <= until_us:
            time_us = int(self._next_us)
            yield self._order(time_us)
            self._next_us += self._pause_us()

    def _intensities(self) -> tuple[float, float]:
        return self.rate / self._fills_per_taker, REPLENISH + MAKERS_PER_TRADE * self.rate

    def _pause_us(self) -> float:
        return self._random.expovariate(sum(self._intensities())) * 1e6

    def _order(self, time_us: int) -> Step:
        takers, makers = self._intensities()
        if self._random.random() * (takers + makers) < takers:
            return self._taker(time_us)
        target = 2 * RESTING
        if self._random.random() < 0.5 + (target - len(self.book)) / target:
            bids = len(self.book.bids.totals)
            asks = len(self.book.asks.totals)
            is_bid = self._random.random() * (bids + asks) >= bids
            change = self._add_maker(is_bid=is_bid)
        else:
            was_bid, price = self.book.cancel(self._regretted())
            change = self._level(was_bid, price)
        return Step(time_us, self._last_order, False, [], [change])  # noqa: FBT003 - no trade here

    def _regretted(self) -> int:
        """Choose an order to cancel: one that the fair price has run over, or any."""
        for side in (self.book.bids, self.book.asks):
            best = side.best()
            if best is not None and (best - self._fair) * side.sign > 0:
                return next(reversed(side.orders[best]))
        return self.book.nth(int(self._random.random() * len(self.book)))

    def _taker(self, time_us: int) -> Step:
        draw = self._random
        self._fair = max(50.0, self._fair * math.exp(draw.gauss(0.0, VOLATILITY)))
        best_bid, best_ask = self.book.bids.best(), self.book.asks.best()
        buying = 0.5
        if best_ask is not None and self._fair > best_ask:
            buying = 1 - AGAINST
        elif best_bid is not None and self._fair < best_bid:
            buying = AGAINST
        is_buy = draw.random() < buying
        facing = best_ask if is_buy else best_bid
        limit = None
        if facing is not None and draw.random() < LIMITED:
            limit = max(1, facing + (2 if is_buy else -2))
        self._last_order += 1
        matched, _ = self.book.take(self._last_order, is_buy=is_buy, lots=self._size(), limit=limit)
        self._fills_per_taker += 0.01 * (len(matched) - self._fills_per_taker)
        self._fills_per_taker = max(0.5, self._fills_per_taker)
        facts = self.instrument
        changes = [self._level(not is_buy, price) for price in dict(matched)]
        if limit is not None and self._last_order in self.book:
            changes.append(self._level(is_buy, limit))
        fills = [Fill(price * facts.tick, lots * facts.step) for price, lots in matched]
        return Step(time_us, self._last_order, not is_buy, fills, changes)

    def _size(self) -> int:
        return 1 + int(self._random.expovariate(1.0 / self._lots))

    def _add_maker(self, *, is_bid: bool) -> Change:
        # Distances have a long tail, in proportion to the price, so that the book is dense near
        # the middle and reaches far; a maker never crosses, so that only takers make trades.
        scale = max(2.0, self._fair * 5e-5)
        distance = 1 + int(scale * self._random.expovariate(1.0) ** 2)
        price = int(self._fair) - distance if is_bid else int(self._fair) + 1 + distance
        facing = (self.book.asks if is_bid else self.book.bids).best()
        if facing is not None:
            price = min(price, facing - 1) if is_bid else max(price, facing + 1)
        price = max(1, price)
        self._last_order += 1
        self.book.rest(
            self._last_order, is_bid=is_bid, price=price, lots=self._size() + self._size()
        )
        return self._level(is_bid, price)

    def _level(self, is_bid: bool, price: int) -> Change:  # noqa: FBT001 - a side, as in Change
        side = self.book.bids if is_bid else self.book.asks
        return self._change(is_bid, price, side.totals.get(price, 0))

    def _change(self, is_bid: bool, price: int, lots: int) -> Change:  # noqa: FBT001 - likewise
        return Change(is_bid, price * self.instrument.tick, lots * self.instrument.step)
