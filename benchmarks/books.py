"""Order books side by side on recorded changes: CPU a change, and memory.

    python -m benchmarks.books

Every book takes the changes of a recording and gives its best 20 levels of both sides every 1, 20,
100 or 1000 of them. All must give the same in the end. Figures are CPU microseconds a change, the
median (and least) of several runs in turns, each on texts that were read afresh.

`order-book` (GPL-3.0, so never installed with the project) and `sortedcontainers` are measured
where the interpreter has them:

    python3.13 -m venv /tmp/peers && /tmp/peers/bin/pip install order-book sortedcontainers msgspec
    /tmp/peers/bin/python -m benchmarks.books

    python -m benchmarks.books --faults 10000000

replays that many changes of made-up markets with one fault in a hundred through the synchronizer
and counts the published books that were not the market's.
"""

import argparse
import dataclasses
import gc
import importlib
import itertools
import statistics
import time
import tracemalloc
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, Final, Protocol

from orderbook.book import OrderBook
from orderbook.synchronizer import Continuity
from sluice.exchanges.base import Depth, DepthImage
from tests.recordings import WHOLE, Recording, messages, recordings

Levels = Sequence[tuple[str, str]]
DEPTH: Final = 20
EVERY: Final = (1, 20, 100, 1000)
CONTINUITIES: Final[tuple[Continuity, ...]] = ("contiguous", "chained")
NAMES: Final = ("spot-nexousdt", "spot-btcusdt", "usdm-btcusdt")


class Book(Protocol):
    """What is measured."""

    def load(self, bids: Levels, asks: Levels) -> None:
        """Take the first image."""

    def apply(self, bids: Levels, asks: Levels) -> None:
        """Take a change: sizes by price, zero deletes."""

    def top(self, depth: int) -> tuple[Sequence[Any], Sequence[Any]]:
        """Give the best levels of both sides, best first."""


class Sluice:
    """This project's book, as the orderbook process uses it."""

    def __init__(self) -> None:
        book = OrderBook(WHOLE)
        self.load = book.load
        self.apply = book.apply
        self.top = book.top


class Loaded(ABC):
    """A book to which an image is a change like any other."""

    def load(self, bids: Levels, asks: Levels) -> None:
        """Take the first image."""
        self.apply(bids, asks)

    @abstractmethod
    def apply(self, bids: Levels, asks: Levels) -> None:
        """Take a change."""


def _is_zero(size: str) -> bool:
    return not size.strip("0.")


class Dicts(Loaded):
    """A dict a side from the exact price (an integer, memoised by text), sorted at every read."""

    def __init__(self) -> None:
        self._sides: tuple[dict[int, tuple[str, str]], ...] = ({}, {})
        self._keys: dict[str, int] = {}

    def apply(self, bids: Levels, asks: Levels) -> None:
        """Take a change."""
        keys = self._keys
        for side, levels in zip(self._sides, (bids, asks), strict=True):
            for level in levels:
                price, size = level
                key = keys.get(price)
                if key is None:
                    key = keys[price] = int(Decimal(price).scaleb(8))
                if _is_zero(size):
                    side.pop(key, None)
                else:
                    side[key] = level

    def top(self, depth: int) -> tuple[Sequence[Any], Sequence[Any]]:
        """Give the best levels."""
        bids, asks = self._sides
        return (
            [bids[key] for key in sorted(bids, reverse=True)[:depth]],
            [asks[key] for key in sorted(asks)[:depth]],
        )


class Bisect(Loaded):
    """As above, beside a list of all keys that is always in order."""

    def __init__(self) -> None:
        self._sides: tuple[dict[int, tuple[str, str]], ...] = ({}, {})
        self._orders: tuple[list[int], ...] = ([], [])
        self._keys: dict[str, int] = {}

    def apply(self, bids: Levels, asks: Levels) -> None:
        """Take a change."""
        keys = self._keys
        for side, order, levels in zip(self._sides, self._orders, (bids, asks), strict=True):
            for level in levels:
                price, size = level
                key = keys.get(price)
                if key is None:
                    key = keys[price] = int(Decimal(price).scaleb(8))
                if _is_zero(size):
                    if key in side:
                        del side[key]
                        del order[bisect_left(order, key)]
                else:
                    if key not in side:
                        order.insert(bisect_left(order, key), key)
                    side[key] = level

    def top(self, depth: int) -> tuple[Sequence[Any], Sequence[Any]]:
        """Give the best levels."""
        bids, asks = self._sides
        bid_order, ask_order = self._orders
        return (
            [bids[key] for key in bid_order[: -depth - 1 : -1]],
            [asks[key] for key in ask_order[:depth]],
        )


class SortedContainers(Loaded):
    """`sortedcontainers.SortedDict` a side, keys and sizes converted by `number`."""

    def __init__(self, sorted_dict: Callable[[], Any], number: Callable[[str], Any]) -> None:
        self._number = number
        self._sides = (sorted_dict(), sorted_dict())

    def apply(self, bids: Levels, asks: Levels) -> None:
        """Take a change."""
        number = self._number
        for side, levels in zip(self._sides, (bids, asks), strict=True):
            for price, size in levels:
                if _is_zero(size):
                    side.pop(number(price), None)
                else:
                    side[number(price)] = number(size)

    def top(self, depth: int) -> tuple[Sequence[Any], Sequence[Any]]:
        """Give the best levels."""
        bids, asks = self._sides
        return (
            [bids.peekitem(-i) for i in range(1, min(depth, len(bids)) + 1)],
            [asks.peekitem(i) for i in range(min(depth, len(asks)))],
        )


class COrderBook(Loaded):
    """`order-book`, the C extension, with Decimals as its users have them."""

    def __init__(self, order_book: Callable[[], Any]) -> None:
        self._book = order_book()

    def apply(self, bids: Levels, asks: Levels) -> None:
        """Take a change."""
        for side, levels in ((self._book.bids, bids), (self._book.asks, asks)):
            for price, size in levels:
                key = Decimal(price)
                if _is_zero(size):
                    if key in side:
                        del side[key]
                else:
                    side[key] = Decimal(size)

    def top(self, depth: int) -> tuple[Sequence[Any], Sequence[Any]]:
        """Give the best levels."""
        bids, asks = self._book.bids, self._book.asks
        return (
            [bids.index(i) for i in range(min(depth, len(bids)))],
            [asks.index(i) for i in range(min(depth, len(asks)))],
        )


def contenders() -> dict[str, Callable[[], Book]]:
    """Name the books that this interpreter can run."""
    books: dict[str, Callable[[], Book]] = {
        "sluice": Sluice,
        "dict, sorted at read": Dicts,
        "dict and bisect list": Bisect,
    }
    try:
        sorted_dict = importlib.import_module("sortedcontainers").SortedDict
    except ImportError:
        print("sortedcontainers is not installed: left out")
    else:
        books["sortedcontainers, Decimal"] = lambda: SortedContainers(sorted_dict, Decimal)
        books["sortedcontainers, float"] = lambda: SortedContainers(sorted_dict, float)
    try:
        order_book = importlib.import_module("order_book").OrderBook
    except ImportError:
        print("order-book is not installed: left out (this module's docstring says how to add it)")
    else:
        books["order-book (C)"] = lambda: COrderBook(order_book)
    return books


def read(recording: Recording) -> tuple[DepthImage, list[Depth]]:
    """Read a recording's image and the changes after it."""
    found = list(messages(recording))
    image = next(message for message in found if isinstance(message, DepthImage))
    return image, [
        message
        for message in found
        if isinstance(message, Depth) and message.last_update_id > image.update_id
    ]


def measure(make: Callable[[], Book], recording: Recording, every: int) -> tuple[float, str]:
    """Give the CPU microseconds a change, and what the book had come to in the end."""
    image, changes = read(recording)
    book = make()
    book.load(image.bids, image.asks)
    gc.collect()
    gc.disable()
    begin = time.process_time()
    count = 0
    for change in changes:
        book.apply(change.bids, change.asks)
        count += 1
        if count == every:
            count = 0
            book.top(DEPTH)
    spent = time.process_time() - begin
    gc.enable()
    end = [[(float(price), float(size)) for price, size in side] for side in book.top(DEPTH)]
    return spent / len(changes) * 1e6, repr(end)


def memory(make: Callable[[], Book], levels: int = 5000) -> float:
    """Give the KiB of a book of so many levels a side, as its first image leaves it."""

    def side(start: int, sign: int) -> list[tuple[str, str]]:
        # Every text its own object, as from a decoder.
        return [(f"{start + sign * at / 100:.8f}", f"{at / 7:.8f}") for at in range(1, levels + 1)]

    tracemalloc.start()
    book = make()
    book.load(side(60000, -1), side(60001, 1))
    book.top(DEPTH)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / 1024


def compare(runs: int) -> None:
    """Print the table."""
    books = contenders()
    chosen = [recording for recording in recordings() if recording.name in NAMES]
    absent = [str(path) for recording in chosen for path in recording.files if not path.exists()]
    if absent:
        raise SystemExit(f"the recordings are absent: {absent[0]}")
    print(f"CPU us a change, median (least) of {runs}; top {DEPTH} read every {EVERY} changes")
    for recording in chosen:
        print(f"\n{recording.name}")
        costs: dict[tuple[str, int], list[float]] = {}
        ends = set()
        # Books take turns, so that what else the machine does meets them all alike.
        for _ in range(runs):
            for every in EVERY:
                for name, make in books.items():
                    cost, end = measure(make, recording, every)
                    costs.setdefault((name, every), []).append(cost)
                    ends.add(end)
        for name in books:
            cells = (costs[name, every] for every in EVERY)
            row = (f"{statistics.median(cell):.2f} ({min(cell):.2f})" for cell in cells)
            print(f"  {name:26}" + "".join(f"{cell:>20}" for cell in row), flush=True)
        if len(ends) != 1:
            raise SystemExit("the books ended up different")
    print("\nKiB at 5000 + 5000 levels")
    for name, make in books.items():
        print(f"  {name:26}{memory(make):10.0f}")


def endure(updates: int) -> None:
    """Bring that many levels to synchronizers, with faults, and count the books that were wrong."""
    from tests.unit.orderbook.faults import Tally, run  # noqa: PLC0415  # not needed to compare

    totals: Counter[str] = Counter()
    begin = time.process_time()
    for seed in itertools.count():
        tally: Tally = run(seed, CONTINUITIES[seed % 2], changes=20_000, fault_rate=0.01)
        totals.update(dataclasses.asdict(tally))
        if seed % 20 == 0:
            print(f"{totals['updates']:,} updates, {totals['wrong']} wrong", flush=True)
        if totals["updates"] >= updates:
            break
    spent = time.process_time() - begin
    print(", ".join(f"{name} {count:,}" for name, count in totals.items()), f"in {spent:.0f} CPU s")
    if totals["wrong"] or totals["late"]:
        raise SystemExit(1)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Order books side by side.")
    parser.add_argument("--runs", type=int, default=5, help="of each cell of the table")
    parser.add_argument("--faults", type=int, metavar="UPDATES", help="endure faults instead")
    arguments = parser.parse_args()
    if arguments.faults:
        endure(arguments.faults)
    else:
        compare(arguments.runs)


if __name__ == "__main__":
    main()
