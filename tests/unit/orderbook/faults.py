"""A made-up market whose true book is known, and a feed of it that loses and confuses messages.

Shares nothing with the book but the shape of its messages: the truth is a dict a side, sorted when
it is looked at.
"""

import functools
import random
from collections import deque
from dataclasses import dataclass
from typing import Final

import msgspec

from orderbook.synchronizer import BookSynchronizer, Continuity, Outcome
from sluice.exchanges.base import BadFrameError, Depth, DepthImage
from sluice.exchanges.binance_spot import BinanceSpot

TOP: Final = 20
IMAGE_LIMIT: Final = 30
_FAULTS: Final = ("drop", "truncate", "duplicate", "repeat", "swap", "disconnect")
_ADAPTER: Final = BinanceSpot("binance", "BINANCE_SPOT_WS_URL", "BINANCE_SPOT_REST_URL")
Levels = list[tuple[str, str]]


class Market:
    """A book that changes at random, never crossed, of about 60 levels a side."""

    def __init__(self, rng: random.Random, continuity: Continuity) -> None:
        self._rng = rng
        self._is_chained = continuity == "chained"
        self._bids: dict[int, str] = {}
        self._asks: dict[int, str] = {}
        self._middle = 10_000
        self.update_id = 1_000
        self._ts = 1_790_000_000_000_000
        self.image_within: DepthImage | None = None
        """An image taken in the midst of the last change."""
        for _ in range(40):
            self.change()

    def change(self) -> Depth:
        """Move on by one batch of updates, each of which has an id."""
        rng = self._rng
        before = self.update_id
        first = before + (rng.randint(1, 40) if self._is_chained else 1)
        self.update_id = first - 1
        bids: dict[int, str] = {}
        asks: dict[int, str] = {}
        updates = self._updates()
        middle = rng.randrange(len(updates) + 1)
        self.image_within = None
        for number, (is_bid, price, size) in enumerate(updates):
            if number == middle and rng.random() < 0.05:
                self.image_within = self.image()
            self.update_id += 1
            side, change = (self._bids, bids) if is_bid else (self._asks, asks)
            change[price] = size
            if size == _NOTHING:
                side.pop(price, None)
            else:
                side[price] = size
        self.update_id = max(self.update_id, first)
        self._ts += 100_000
        return Depth(
            symbol="BTCUSDT",
            first_update_id=first,
            last_update_id=self.update_id,
            previous_update_id=before if self._is_chained else None,
            ts_event=self._ts,
            ts_recv=self._ts + 5_000,
            bids=[(_text(price), size) for price, size in bids.items()],
            asks=[(_text(price), size) for price, size in asks.items()],
        )

    def image(self) -> DepthImage:
        """Give the best levels as they are now."""
        bids, asks = self.top(IMAGE_LIMIT)
        return DepthImage("BTCUSDT", self.update_id, bids, asks, None, IMAGE_LIMIT)

    def top(self, depth: int) -> tuple[Levels, Levels]:
        """Give the best levels of the true book."""
        bids = sorted(self._bids, reverse=True)[:depth]
        asks = sorted(self._asks)[:depth]
        return [(_text(p), self._bids[p]) for p in bids], [(_text(p), self._asks[p]) for p in asks]

    def _updates(self) -> list[tuple[bool, int, str]]:
        rng = self._rng
        updates: list[tuple[bool, int, str]] = []
        if rng.random() < 0.1:
            self._middle += rng.choice((-3, -2, -1, 1, 2, 3))
            # What stands in the way goes first, so that the book is not crossed even within.
            updates += [(True, p, _NOTHING) for p in self._bids if p >= self._middle]
            updates += [(False, p, _NOTHING) for p in self._asks if p <= self._middle]
        for _ in range(rng.randrange(12)):
            is_bid = rng.random() < 0.5
            away = min(int(rng.expovariate(1 / 25)), 90) + 1
            price = self._middle - away if is_bid else self._middle + away
            size = _NOTHING if rng.random() < 0.3 else f"{rng.randrange(1, 10**6) / 1000:.3f}"
            updates.append((is_bid, price, size))
        return updates


_NOTHING: Final = "0.000"


@functools.cache
def _text(price: int) -> str:
    return f"{price // 100}.{price % 100:02}"


@dataclass
class Tally:
    """What a run through the faults came to."""

    changes: int = 0
    updates: int = 0
    faults: int = 0
    compared: int = 0
    wrong: int = 0
    late: int = 0
    """Breaks that were not found at the first message after them."""
    gaps: int = 0
    syncs: int = 0
    renewed: int = 0
    differed: int = 0
    crossed: int = 0
    is_live: bool = False


class Feed:
    """Brings a market's changes and images to a synchronizer, with faults in between."""

    def __init__(self, seed: int, continuity: Continuity, fault_rate: float) -> None:
        self._rng = random.Random(seed)
        self._fault_rate = fault_rate
        self._continuity: Continuity = continuity
        self._market = Market(self._rng, continuity)
        self._sync = BookSynchronizer(continuity, max_levels=80)
        self._held: Depth | None = None
        self._recent: deque[Depth] = deque(maxlen=8)
        self._old_images = deque([self._market.image()], maxlen=4)
        self._image: DepthImage | None = None
        self._image_wait: int | None = None
        self._lost_id = 0
        self.tally = Tally()

    def run(self, changes: int) -> Tally:
        """Bring so many changes with faults, and then enough without to be in sync again."""
        for _ in range(changes):
            self._step(self._rng.random() < self._fault_rate)
        for _ in range(40):
            self._step(is_faulty=False)
        self.tally.is_live = self._sync.is_live
        return self.tally

    def _step(self, is_faulty: bool) -> None:  # noqa: FBT001  # a coin that was tossed
        market, tally = self._market, self.tally
        change = market.change()
        tally.changes += 1
        tally.updates += len(change.bids) + len(change.asks)
        self._take_image(is_faulty)
        if is_faulty:
            tally.faults += 1
            self._deliver_badly(change, self._rng.choice(_FAULTS))
        else:
            self._deliver(change)
            if self._held is not None:
                late, self._held = self._held, None
                self._deliver(late)
        self._recent.append(change)
        if self._image is not None and self._rng.random() < 0.5:
            image, self._image = self._image, None
            self._settle(self._sync.on_image(image))
        sync = self._sync
        is_shallow = sync.is_live and not sync.is_renewing and sync.book.trusted_depth < TOP
        # Often late, so that the book is also read while it knows less than is asked for.
        if is_shallow and self._rng.random() < 0.1:
            sync.renew()
            self._want_image()
        self._compare()

    def _deliver_badly(self, change: Depth, fault: str) -> None:
        if fault == "drop" or (fault == "truncate" and self._is_refused(change)):
            self._lost_id = change.last_update_id
        elif fault == "duplicate":
            self._deliver(change)
            self._deliver(change)
        elif fault == "repeat" and self._recent:
            self._deliver(change)
            self._deliver(self._rng.choice(self._recent))
        elif fault == "swap" and self._held is None:
            self._held = change
            self._lost_id = change.last_update_id
        elif fault == "disconnect":
            self._sync.on_disconnect()
            self._image = None if self._rng.random() < 0.5 else self._image
            self._lost_id = change.last_update_id
        else:
            self._deliver(change)

    def _is_refused(self, change: Depth) -> bool:
        """Cut the frame short, and tell whether the adapter notices: it has to."""
        frame = msgspec.json.encode(
            {
                "e": "depthUpdate",
                "E": change.ts_event // 1000,
                "s": change.symbol,
                "U": change.first_update_id,
                "u": change.last_update_id,
                "b": change.bids,
                "a": change.asks,
            }
        )
        try:
            _ADAPTER.parse(frame[: self._rng.randrange(len(frame))], change.ts_recv)
        except BadFrameError:
            return True
        raise AssertionError("a frame cut short was read")

    def _deliver(self, change: Depth) -> None:
        sync = self._sync
        must_break = (
            sync.is_live
            and sync.update_id < self._lost_id < change.last_update_id
            and change.first_update_id > self._lost_id
        )
        outcome = sync.on_depth(change)
        self.tally.late += must_break and outcome is not Outcome.GAP
        self._settle(outcome)

    def _settle(self, outcome: Outcome) -> None:
        tally = self.tally
        tally.gaps += outcome is Outcome.GAP
        tally.syncs += outcome is Outcome.LIVE
        tally.renewed += outcome is Outcome.RENEWED
        tally.differed += outcome is Outcome.DIFFERED
        tally.crossed += outcome is Outcome.CROSSED
        if outcome in _ASKING:
            self._want_image()

    def _want_image(self) -> None:
        self._image_wait = self._rng.randrange(6)

    def _take_image(self, is_faulty: bool) -> None:  # noqa: FBT001  # as above
        if self._rng.random() < 0.1:
            self._old_images.append(self._market.image())
        if self._image_wait is None:
            return
        self._image_wait -= 1
        if self._image_wait < 0:
            self._image_wait = None
            if is_faulty or self._rng.random() < self._fault_rate:
                self._image = self._old_images[0]
            else:
                self._image = self._market.image_within or self._market.image()

    def _compare(self) -> None:
        sync = self._sync
        if not sync.is_live or sync.update_id != self._market.update_id:
            return
        self.tally.compared += 1
        known = min(TOP, sync.book.trusted_depth)
        true = self._market.top(TOP)
        for held, side in zip(sync.book.top(TOP), true, strict=True):
            if held != side[: len(held)] or len(held) < min(known, len(side)):
                self.tally.wrong += 1


_ASKING: Final = (
    Outcome.IMAGE_NEEDED,
    Outcome.IMAGE_TOO_OLD,
    Outcome.GAP,
    Outcome.CROSSED,
    Outcome.DIFFERED,
)


def run(seed: int, continuity: Continuity, changes: int, fault_rate: float) -> Tally:
    """Run one feed from the start."""
    return Feed(seed, continuity, fault_rate).run(changes)
