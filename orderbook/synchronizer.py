"""From an image and the changes after it to a book that is provably in sync, and back when not.

A pure state machine, no I/O and no clock: it is told what arrives and says what that made of the
book. What continues what is the venue's own rule. Where the rule is broken the book may be wrong
from there on, so it is emptied at that message; whoever reads it finds the truth or nothing.
"""

from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import Final, Literal, NamedTuple

from orderbook.book import DEFAULT_MAX_LEVELS, OrderBook
from sluice.exchanges.base import Depth, DepthImage

MAX_BUFFERED: Final = 20_000
"""How many changes and levels of changes one book keeps for its image, at most."""
MAX_BUFFERED_US: Final = 30_000_000
"""How old they may be: an image is seconds old when it comes, however long its turn took."""

Continuity = Literal["contiguous", "chained", "streamed"]
"""How a venue's changes continue one another, and where its images come from.

contiguous: ids rise by one and a change names its first and last; images are asked for
(Binance spot: `U == u + 1`).
chained: a change names the last id of the one before, ids rise with holes; images are asked for
(Binance USD-M: `pu == u`).
streamed: chained, but ids may fall; an image comes in the stream and replaces everything
(OKX: `prevSeqId`, Deribit: `prev_change_id`).
"""


class State(StrEnum):
    """Where a book is on its way into sync."""

    WAITING_FOR_DIFF = "waiting_for_diff"
    WAITING_FOR_IMAGE = "waiting_for_image"
    LIVE = "live"


class Outcome(StrEnum):
    """What a message made of the book."""

    BUFFERED = "buffered"
    """Kept until an image comes."""
    IMAGE_NEEDED = "image_needed"
    """Kept too, and the first of its sync: ask for an image."""
    IMAGE_TOO_OLD = "image_too_old"
    """The image does not reach the changes at hand: ask for another after a while."""
    IGNORED = "ignored"
    """Nothing new: a duplicate, a change that the image holds, an image that nobody needs."""
    LIVE = "live"
    """The book is in sync."""
    APPLIED = "applied"
    """The book has moved on."""
    RENEWED = "renewed"
    """The live book is as deep as its new image again, and was the same where both could tell."""
    GAP = "gap"
    """Something is missing before this change. The book is empty: ask for an image."""
    CROSSED = "crossed"
    """The book was wrong: its bids met its asks. It is empty: ask for an image."""
    DIFFERED = "differed"
    """The book was wrong: a newer image says otherwise. It is empty: ask for an image."""


class _Rule(NamedTuple):
    """A venue's continuity: each part judges a change against the last update id."""

    is_known: Callable[[Depth, int], bool]
    """Whether the change brings nothing new."""
    continues: Callable[[Depth, int], bool]
    """Whether nothing is missing between the change before and this one."""
    joins: Callable[[Depth, int], bool]
    """Whether nothing is missing between an image and the first change that it does not hold."""


_RULES: Final[dict[Continuity, _Rule]] = {
    "contiguous": _Rule(
        is_known=lambda depth, at: depth.last_update_id <= at,
        continues=lambda depth, at: depth.first_update_id <= at + 1,
        joins=lambda depth, at: depth.first_update_id <= at + 1,
    ),
    "chained": _Rule(
        is_known=lambda depth, at: depth.last_update_id <= at,
        continues=lambda depth, at: depth.previous_update_id == at,
        # The ids of one symbol have holes, so an image may stand between two changes.
        joins=lambda depth, at: (
            depth.previous_update_id is not None and depth.previous_update_id <= at
        ),
    ),
    "streamed": _Rule(
        # A heartbeat names its own id as the one before, and does continue.
        is_known=lambda depth, at: depth.last_update_id == at != depth.previous_update_id,
        continues=lambda depth, at: depth.previous_update_id == at,
        joins=lambda depth, at: depth.previous_update_id == at,
    ),
}


class BookSynchronizer:
    """Keeps one market's book in sync, or empty.

    `before_event` is called with each change that is about to be applied, while the book still
    stands before it: that is when it is known to have been true until then.
    """

    def __init__(
        self,
        continuity: Continuity,
        *,
        before_event: Callable[[Depth], None] | None = None,
        max_levels: int = DEFAULT_MAX_LEVELS,
        max_buffered: int = MAX_BUFFERED,
    ) -> None:
        self.state = State.WAITING_FOR_DIFF
        self.book = OrderBook(max_levels)
        """Empty unless live. A renewal puts another in its place."""
        self.sync_id = 0
        """Higher in each sync: when its first change was read (microseconds) wherever possible."""
        self.update_id = 0
        self.ts_event = 0
        """The exchange's time of the last change in the book, microseconds."""
        self.ts_recv = 0
        """When that change was read, microseconds."""
        self.compared = (0, 0)
        """Of the last renewal: how many levels were compared, and how many differed."""
        self._is_streamed = continuity == "streamed"
        self._rule = _RULES[continuity]
        self._before_event = before_event
        self._max_levels = max_levels
        self._max_buffered = max_buffered
        self._buffer: deque[Depth] = deque()
        self._buffered = 0
        self._has_joined = False
        self._is_renewing = False
        self._early_image: DepthImage | None = None

    @property
    def is_live(self) -> bool:
        """Whether the book is provably in sync."""
        return self.state is State.LIVE

    @property
    def is_renewing(self) -> bool:
        """Whether the book is live and waits for an image all the same."""
        return self._is_renewing

    def on_depth(self, depth: Depth) -> Outcome:
        """Take the next change off the stream."""
        if self.state is State.LIVE:
            return self._advance(depth)
        if self.state is State.WAITING_FOR_IMAGE:
            return self._collect(depth)
        self._begin(depth.ts_recv)
        self._keep(depth)
        self.state = State.WAITING_FOR_IMAGE
        return Outcome.IMAGE_NEEDED

    def on_image(self, image: DepthImage) -> Outcome:
        """Take an image: one that was asked for, or the next off the stream where they come so."""
        if self._is_streamed:
            self._begin(image.ts_event or 0)
            return self._go_live(image, [])
        if self.state is State.WAITING_FOR_IMAGE:
            after = self._after(image)
            return Outcome.IMAGE_TOO_OLD if after is None else self._go_live(image, after)
        if self._is_renewing:
            return self._renew_from(image)
        # Asked for before the connection was lost: the changes it would need are not coming.
        return Outcome.IGNORED

    def on_disconnect(self) -> None:
        """Empty the book: what the next connection brings need not continue this one."""
        self._empty()
        self._forget_buffer()
        self.state = State.WAITING_FOR_DIFF

    def renew(self) -> None:
        """Get ready for an image that shows again what lies below the trusted range.

        The book stays live meanwhile. Ask for the image after this call.
        """
        if self.is_live and not self._is_streamed:
            self._forget_buffer()
            self._is_renewing = True

    @property
    def buffered(self) -> int:
        """How many changes and levels of changes are kept for an image."""
        return self._buffered

    def cut(self, depth: int) -> None:
        """Give up what lies below the best `depth` levels of a live book."""
        if self.is_live and not self._is_renewing:
            self.book.cut(depth)

    def _advance(self, depth: Depth) -> Outcome:
        rule = self._rule
        if rule.is_known(depth, self.update_id):
            return Outcome.IGNORED
        fits = rule.continues if self._has_joined else rule.joins
        if not fits(depth, self.update_id):
            return self._lose(depth, Outcome.GAP)
        if not self._apply(depth):
            return self._lose(depth, Outcome.CROSSED)
        if self._is_renewing:
            self._keep(depth)
            early = self._early_image
            if early is not None and early.update_id <= self.update_id:
                return self._renew_from(early)
        return Outcome.APPLIED

    def _collect(self, depth: Depth) -> Outcome:
        if self._buffer:
            last = self._buffer[-1].last_update_id
            if self._rule.is_known(depth, last):
                return Outcome.IGNORED
            if not self._rule.continues(depth, last):
                # Nothing from before the hole can lead over it.
                self._forget_buffer()
        self._keep(depth)
        return Outcome.BUFFERED

    def _go_live(self, image: DepthImage, after: list[Depth]) -> Outcome:
        self.book.load(image.bids, image.asks, limit=image.limit)
        held = self._buffer[-len(after) - 1] if len(self._buffer) > len(after) else None
        self.update_id = image.update_id
        self.ts_event = image.ts_event or (held.ts_event if held else 0)
        self.ts_recv = held.ts_recv if held else self.ts_event
        self._has_joined = False
        self.state = State.LIVE
        if self.book.is_crossed or not all(map(self._apply, after)):
            # The changes stay: they may well continue the next image.
            self._restart()
            return Outcome.CROSSED
        self._forget_buffer()
        return Outcome.LIVE

    def _apply(self, depth: Depth) -> bool:
        """Apply a change and tell whether the book is still one that an exchange can have."""
        if self._before_event is not None:
            self._before_event(depth)
        self.book.apply(depth.bids, depth.asks)
        self.update_id = depth.last_update_id
        self.ts_event = depth.ts_event
        self.ts_recv = depth.ts_recv
        self._has_joined = True
        return not self.book.is_crossed

    def _renew_from(self, image: DepthImage) -> Outcome:
        after = self._after(image)
        if after is None or (not after and image.update_id < self.update_id):
            self._early_image = None
            return Outcome.IMAGE_TOO_OLD
        if image.update_id > self.update_id:
            self._early_image = image
            return Outcome.BUFFERED
        renewed = OrderBook(self._max_levels)
        renewed.load(image.bids, image.asks, limit=image.limit)
        for depth in after:
            renewed.apply(depth.bids, depth.asks)
        self.compared = renewed.differences(self.book)
        if self.compared[1]:
            self._restart()
            return Outcome.DIFFERED
        self._forget_buffer()
        self.book = renewed
        return Outcome.RENEWED

    def _after(self, image: DepthImage) -> list[Depth] | None:
        """Give the kept changes that the image lacks, or None if some before them are missing."""
        known = self._rule.is_known
        after = [depth for depth in self._buffer if not known(depth, image.update_id)]
        if after and not self._rule.joins(after[0], image.update_id):
            return None
        return after

    def _lose(self, depth: Depth, outcome: Outcome) -> Outcome:
        self._forget_buffer()
        self._keep(depth)
        self._restart()
        return outcome

    def _restart(self) -> None:
        """Empty the book and begin a sync with the changes that are kept, if any."""
        self._empty()
        self._is_renewing = False
        self._early_image = None
        if self._buffer:
            self._begin(self._buffer[-1].ts_recv)
            self.state = State.WAITING_FOR_IMAGE
        else:
            self.state = State.WAITING_FOR_DIFF

    def _begin(self, sync_id: int) -> None:
        self.sync_id = max(self.sync_id + 1, sync_id)

    def _empty(self) -> None:
        self.book.load([], [])

    def _keep(self, depth: Depth) -> None:
        self._buffer.append(depth)
        self._buffered += _weight(depth)
        oldest = depth.ts_recv - MAX_BUFFERED_US
        while len(self._buffer) > 1 and (
            self._buffered > self._max_buffered or self._buffer[0].ts_recv < oldest
        ):
            self._buffered -= _weight(self._buffer.popleft())

    def _forget_buffer(self) -> None:
        self._buffer.clear()
        self._buffered = 0
        self._is_renewing = False
        self._early_image = None


def _weight(depth: Depth) -> int:
    return 1 + len(depth.bids) + len(depth.asks)
