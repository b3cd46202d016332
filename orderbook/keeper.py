"""One market's book from its changes to everything that is made of it.

It wires the pure parts together and has no I/O of its own: what goes out is put into the queues
and notes of others, none of which waits.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, Self

from loguru import logger

from orderbook.grid import SnapshotGrid
from orderbook.latest import LatestBook
from orderbook.synchronizer import BookSynchronizer, Continuity, Outcome, State
from sluice.budget import Priority
from sluice.coverage import Return
from sluice.exchanges.base import Depth, DepthImage
from sluice.publisher import Publisher
from sluice.records import BookAudit, OrderbookSnapshot
from sluice.settings import Market, Settings

MICROS_PER_MS: Final = 1000
_STARTED: Final = "the process was not running"
_CAUSES: Final = {
    Outcome.GAP: "a change is missing",
    Outcome.CROSSED: "the book crossed",
    Outcome.DIFFERED: "a newer image differs from the book",
}


class Latest(Protocol):
    """Takes note of what readers of the latest book must see, as `LatestBooks` does."""

    def changed(self, market: Market) -> None:
        """Note that a market's book has changed."""

    def lost(self, market: Market, sync_id: int) -> None:
        """Note that a sync is over."""


class Windows(Protocol):
    """Takes note of when books are live, as `Coverage` does."""

    def covers(self, market: Market, ts_event: int) -> None:
        """Note that a book is live and holds everything up to an event."""

    def returned(self, back: Return) -> None:
        """Note that a book is live again."""


class Images(Protocol):
    """Where images are asked for, as at an `ImageQueue`."""

    def want(self, symbol: str, priority: Priority) -> None:
        """Ask for an image."""

    def want_newer(self, symbol: str, priority: Priority) -> None:
        """Ask for another image after a while."""

    def forget(self, symbol: str) -> None:
        """Ask for no image any more."""

    def settled(self, symbol: str) -> None:
        """Note that a book has its image."""


@dataclass(frozen=True)
class Outlets:
    """Where a keeper's work goes."""

    publisher: Publisher
    latest: Latest
    coverage: Windows
    images: Images


class _Held(NamedTuple):
    """The book as it was before a message."""

    is_live: bool
    sync_id: int
    ts_event: int

    @classmethod
    def of(cls, sync: BookSynchronizer) -> Self:
        return cls(sync.is_live, sync.sync_id, sync.ts_event)


class BookKeeper:
    """Keeps one market's book and hands on its rows, its latest top and its windows missed.

    Rows hold what can be trusted. Where no image can be had to renew a book that has run shallow,
    `shows_untrusted` has them go on below with what is known; `trusted_depth` tells them apart.
    """

    def __init__(
        self,
        market: Market,
        continuity: Continuity,
        settings: Settings,
        outlets: Outlets,
        *,
        shows_untrusted: bool = False,
    ) -> None:
        self.market = market
        self.changes = 0
        """How many changes came, whatever became of them."""
        self.resyncs = 0
        self.confirmed = 0
        """How often a newer image agreed with the book."""
        self.contradicted = 0
        self.is_dropped = False
        """Whether there is no memory for this book."""
        self._newest_recv = 0
        self._is_cut = False
        self._outlets = outlets
        self._depth = settings.snapshot_depth
        self._published_depth = settings.publish_depth
        self._shows_untrusted = shows_untrusted
        self._sync = BookSynchronizer(
            continuity, before_event=self._before_event, max_levels=settings.book_depth
        )
        self._grid = SnapshotGrid(settings.snapshot_interval_ms * MICROS_PER_MS)
        self._renewal = Priority.IMAGE
        # The window missed: the last event before it, the first after it, and why; no cause means
        # that there is none to tell of.
        self._ts_lost: int | None = None
        self._ts_returned: int | None = None
        self._cause: str | None = _STARTED

    @property
    def is_live(self) -> bool:
        """Whether the book is provably in sync."""
        return self._sync.is_live

    @property
    def levels(self) -> int:
        """How many levels are held."""
        return sum(self._sync.book.levels)

    @property
    def held(self) -> int:
        """How much there is in memory: levels, and changes that wait for an image."""
        return self.levels + self._sync.buffered

    def on_depth(self, depth: Depth) -> None:
        """Take a change off the stream."""
        self.changes += 1
        if self.is_dropped:
            return
        self._newest_recv = depth.ts_recv
        self._is_cut = False
        self._settle(_Held.of(self._sync), self._sync.on_depth(depth))

    def on_image(self, image: DepthImage) -> None:
        """Take an image that was asked for."""
        self._settle(_Held.of(self._sync), self._sync.on_image(image))

    def on_disconnect(self, reason: str) -> None:
        """Give the book up: what comes next need not continue it."""
        held = _Held.of(self._sync)
        self._sync.on_disconnect()
        self._lose(held, f"disconnected: {reason}")

    def flush_idle(self, delivered_us: int) -> None:
        """Write the rows that are due without a change.

        Up to `delivered_us` (exchange time) the socket has brought everything there is.
        """
        if self._sync.is_live:
            for instant in self._grid.flush_idle(delivered_us):
                self._write_row(instant)

    def renew_if_shallow(self, image_limit: int) -> None:
        """Ask for a new image before what can be trusted is less than what is read."""
        book = self._sync.book
        needed = min(2 * max(self._depth, self._published_depth), image_limit // 2)
        if (
            self._sync.is_live
            and not self._sync.is_renewing
            and not self._is_cut
            and not book.is_whole
            and book.trusted_depth < needed
        ):
            self._renew(Priority.IMAGE)

    def cut_if_idle(self, idle_since_us: int) -> None:
        """Let go of what nobody reads in a book that has not changed since then (our clock).

        It stays true as far as it is read. At its next change it is shallow, and so renewed.
        """
        sync = self._sync
        if sync.is_live and not sync.is_renewing and self._newest_recv < idle_since_us:
            if not self._is_cut:
                sync.cut(max(self._depth, self._published_depth))
            self._is_cut = True

    def snapshot_every(self, interval_ms: int) -> None:
        """Write rows at another interval from the next change on."""
        self._grid = SnapshotGrid(interval_ms * MICROS_PER_MS)

    def drop(self, why: str) -> None:
        """Give the book up; its changes are counted and nothing else."""
        held = _Held.of(self._sync)
        self.is_dropped = True
        self._sync.on_disconnect()
        self._outlets.images.forget(self.market.symbol)
        self._lose(held, why)

    def take_up(self) -> None:
        """Begin anew with the next change of a book that was dropped."""
        self.is_dropped = False

    def audit(self) -> None:
        """Have the book compared with a new image; a difference ends its sync."""
        if self._sync.is_live and not self._sync.is_renewing:
            self._is_cut = False
            self._renew(Priority.AUDIT)

    def latest(self) -> LatestBook | None:
        """Give the top of the book for readers, or None while it is not live."""
        sync = self._sync
        if not sync.is_live or sync.ts_event == 0:
            return None
        bids, asks = sync.book.top(self._published_depth)
        return LatestBook(sync.sync_id, sync.update_id, sync.ts_event, bids, asks)

    def summary(self) -> str:
        """Give the state, or best bid, ask and spread, for people to read."""
        sync = self._sync
        if self.is_dropped:
            return f"{self.market} dropped"
        if not sync.is_live:
            return f"{self.market} {sync.state}"
        bid, ask = sync.book.best_bid, sync.book.best_ask
        if bid is None or ask is None:
            return f"{self.market} one-sided"
        spread = (float(ask[0]) / float(bid[0]) - 1) * 1e4
        return f"{self.market} {bid[0]} / {ask[0]} ({spread:.2f} bps)"

    def _settle(self, held: _Held, outcome: Outcome) -> None:
        """Do what follows from a message that met the book as `held`."""
        match outcome:
            case Outcome.APPLIED:
                self._changed()
            case Outcome.LIVE:
                self._outlets.images.settled(self.market.symbol)
                self._changed()
            case Outcome.RENEWED:
                self.confirmed += 1
                self._write_audit()
                self._outlets.images.settled(self.market.symbol)
                self._changed()
            case Outcome.IMAGE_NEEDED:
                self._outlets.images.want(self.market.symbol, self._priority)
            case Outcome.IMAGE_TOO_OLD:
                self._outlets.images.want_newer(self.market.symbol, self._priority)
            case Outcome.GAP | Outcome.CROSSED | Outcome.DIFFERED:
                if outcome is Outcome.DIFFERED:
                    self.contradicted += 1
                    self._write_audit()
                self.resyncs += 1
                logger.warning("{}: out of sync: {}", self.market, _CAUSES[outcome])
                self._lose(held, _CAUSES[outcome])
                if held.is_live and self._sync.state is State.WAITING_FOR_IMAGE:
                    self._outlets.images.want(self.market.symbol, self._priority)
                elif not held.is_live:
                    # An image that does not fit its changes: another one, but not at once.
                    self._outlets.images.want_newer(self.market.symbol, self._priority)

    def _before_event(self, depth: Depth) -> None:
        """Write the rows that are due: until this change, the book was what it is now."""
        for instant in self._grid.on_event(depth.ts_event, depth.ts_recv):
            self._write_row(instant)
        if self._ts_returned is None:
            self._ts_returned = depth.ts_event

    def _changed(self) -> None:
        self._outlets.latest.changed(self.market)
        if self._ts_returned is None:
            return
        if self._cause is not None:
            back = Return(self.market, self._ts_returned, self._ts_lost, self._cause)
            self._outlets.coverage.returned(back)
            self._cause = None
        self._outlets.coverage.covers(self.market, self._sync.ts_event)

    def _lose(self, held: _Held, cause: str) -> None:
        """Take back what readers see, and begin the window that is missed."""
        self._grid.restart()
        if self._cause is None:
            self._ts_lost, self._cause = held.ts_event, cause
        self._ts_returned = None
        if held.is_live:
            self._outlets.latest.lost(self.market, held.sync_id)

    @property
    def _priority(self) -> Priority:
        if self._sync.is_live:
            return self._renewal
        return Priority.IMAGE if self._ts_lost is None else Priority.LIVE_IMAGE

    def _renew(self, priority: Priority) -> None:
        self._renewal = priority
        self._sync.renew()
        self._outlets.images.want(self.market.symbol, priority)

    def _write_audit(self) -> None:
        sync = self._sync
        self._outlets.publisher.put(
            BookAudit(
                self.market.exchange,
                self.market.symbol,
                sync.ts_event,
                sync.update_id,
                *sync.compared,
            )
        )

    def _write_row(self, instant: int) -> None:
        sync = self._sync
        top = sync.book.known_top if self._shows_untrusted else sync.book.top
        bids, asks = top(self._depth)
        self._outlets.publisher.put(
            OrderbookSnapshot(
                self.market.exchange,
                self.market.symbol,
                instant,
                sync.update_id,
                sync.sync_id,
                sync.ts_event,
                sync.ts_recv,
                bids,
                asks,
                sync.book.trusted_depth,
            )
        )
