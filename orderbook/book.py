"""An exact order book of which it is known how deep it can be trusted.

A price is held as an integer at the book's scale, so `1.10` and `1.1` are one level and two prices
that one float cannot tell apart are two. What goes out is the exchange's own text.

A dict a side takes the changes. Only the best levels are kept in order, and only when they are
read: a change below them costs no more than the dict does.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from decimal import Decimal
from typing import Final

from sluice.records import MAX_DECIMAL, Level

DEFAULT_MAX_LEVELS: Final = 5000
_WINDOW: Final = 128
"""How many of the best levels are put in order at once; a read of more puts twice as many."""
_UNBOUNDED: Final[int] = 10 ** (2 * MAX_DECIMAL)
"""Beyond every key: a price has at most MAX_DECIMAL digits and a scale at most as many places."""
_FEW: Final = 1024
_MAX_KEYS: Final = 4096
"""How many prices a side remembers the keys of."""
_ZEROS: Final = frozenset(
    text
    for before in range(MAX_DECIMAL)
    for after in range(MAX_DECIMAL - before)
    for text in ("0" * before + "." + "0" * after, "0" * (before + after + 1))
)
"""Every way to write zero in a record: a size among them deletes its level."""


class _Side:
    """One side of a book; keys ascend from the best level on, so those of bids are negative.

    `trusted` holds every level up to `_bound` and `beyond` the levels that changes named below it,
    among which others may be missing. `_window` is the sorted keys of `trusted` up to `_edge`,
    but for those in `_moved`, which came or went since it was last put in order. `_top` is what
    was read last, down to `_shown`, unless a change above that made it old.
    """

    def __init__(self, sign: int, max_levels: int) -> None:
        self.trusted: dict[int, Level] = {}
        self.beyond: dict[int, Level] = {}
        self.scale = 0
        self._sign = sign
        self._max_levels = max_levels
        self._keys: dict[str, int] = {}
        self._bound = _UNBOUNDED
        self._edge = -_UNBOUNDED
        self._window: list[int] = []
        self._ordered_depth = _WINDOW
        self._moved: set[int] = set()
        self._top: list[Level] | None = None
        self._shown = _UNBOUNDED
        self._shown_depth = 0

    @property
    def is_bounded(self) -> bool:
        return self._bound < _UNBOUNDED

    def __len__(self) -> int:
        return len(self.trusted) + len(self.beyond)

    def load(self, levels: Sequence[Level], limit: int | None) -> None:
        self.trusted.clear()
        self.beyond.clear()
        self._bound = _UNBOUNDED
        self._forget_order()
        self.apply(levels)
        if levels and limit is not None and len(levels) >= limit:
            self._bound = min(self._bound, max(self.key(price) for price, _ in levels))

    def apply(self, levels: Sequence[Level]) -> None:  # noqa: C901, PLR0912  # a call a level costs as much
        key_of, trusted, moved = self._keys.get, self.trusted, self._moved
        bound, edge, shown = self._bound, self._edge, self._shown
        for level in levels:
            price, size = level
            key = key_of(price)
            if key is None:
                key = self.key(price)
                bound, edge, shown = self._bound, self._edge, self._shown
            if key <= edge:
                if key <= shown:
                    self._top = None
                if size in _ZEROS:
                    if trusted.pop(key, None) is not None:
                        moved.add(key)
                else:
                    if key not in trusted:
                        moved.add(key)
                    trusted[key] = level
            else:
                held = trusted if key <= bound else self.beyond
                if size in _ZEROS:
                    held.pop(key, None)
                else:
                    held[key] = level
        if len(trusted) + len(self.beyond) > self._max_levels:
            self._prune()
        if len(moved) > len(trusted) + _FEW:
            self._forget_order()

    def cut(self, depth: int) -> None:
        self._keys.clear()
        self.beyond.clear()
        if len(self.trusted) > depth:
            self._keep(sorted(self.trusted)[:depth])

    def top(self, depth: int) -> list[Level]:
        """Give the best levels; the list is the caller's to read, not to change."""
        if self._top is None or depth != self._shown_depth:
            best = self._ordered(depth)[:depth]
            self._top = list(map(self.trusted.__getitem__, best))
            self._shown = best[-1] if best and len(best) == depth else self._edge
            self._shown_depth = depth
        return self._top

    def deep_top(self, depth: int) -> list[Level]:
        """Give the best levels as `top` does, and leave the window as narrow as it is."""
        return [self.trusted[key] for key in sorted(self.trusted)[:depth]]

    def known_top(self, depth: int) -> list[Level]:
        """Give the best levels that are known, trusted or not."""
        if len(self.trusted) >= depth or not self.beyond:
            return self.top(depth)
        held = self.trusted | self.beyond
        return [held[key] for key in sorted(held)[:depth]]

    def best(self) -> Level | None:
        key = self.best_key()
        return None if key is None else self.trusted[key]

    def best_key(self) -> int | None:
        window = self._ordered(1)
        return window[0] if window else None

    def key(self, price: str) -> int:
        """Give the key of a price, and note it for the next time."""
        digits = price.replace(".", "")
        places = len(price) - price.find(".") - 1 if len(digits) < len(price) else 0
        if places != self.scale:
            if places > self.scale:
                self.rescale(places)
            digits += "0" * (self.scale - places)
        key = self._sign * int(digits)
        if len(self._keys) == _MAX_KEYS:
            self._keys.clear()
        self._keys[price] = key
        return key

    def rescale(self, scale: int) -> None:
        """Turn every key into one of a finer scale."""
        factor = 10 ** (scale - self.scale)
        self.scale = scale
        self._keys.clear()
        for levels in (self.trusted, self.beyond):
            finer = {key * factor: level for key, level in levels.items()}
            levels.clear()
            levels.update(finer)
        if self.is_bounded:
            self._bound *= factor
        self._forget_order()

    def _ordered(self, depth: int) -> list[int]:
        """Put the window in order; it holds `depth` keys, or all there are."""
        trusted, window = self.trusted, self._window
        if self._moved:
            for key in self._moved:
                at = bisect_left(window, key)
                is_listed = at < len(window) and window[at] == key
                if key in trusted:
                    if not is_listed:
                        window.insert(at, key)
                elif is_listed:
                    del window[at]
            self._moved.clear()
        self._ordered_depth = max(self._ordered_depth, 2 * depth)
        if len(window) < depth:
            if len(window) < len(trusted):
                window = self._window = sorted(trusted)
            self._edge = self._bound
        if len(window) > 2 * self._ordered_depth:
            del window[self._ordered_depth :]
            self._edge = window[-1]
        return window

    def _forget_order(self) -> None:
        self._window.clear()
        self._moved.clear()
        self._edge = -_UNBOUNDED
        self._top = None

    def _prune(self) -> None:
        """Let the far end go, and with it an eighth more, so that this is rare."""
        self.beyond.clear()
        if len(self.trusted) <= self._max_levels:
            return
        self._keep(sorted(self.trusted)[: self._max_levels - self._max_levels // 8])

    def _keep(self, keys: list[int]) -> None:
        """Let go of all but the best levels, which are at least one, and trust nothing below."""
        kept = {key: self.trusted[key] for key in keys}
        # Not a new dict: a change may be half applied.
        self.trusted.clear()
        self.trusted.update(kept)
        self._bound = keys[-1]
        self._forget_order()


class OrderBook:
    """The two sides of one market's book, at most `max_levels` levels each.

    It applies what it is given: whether a change continues the one before is for the
    `BookSynchronizer` to judge.

    An image of `limit` levels a side knows nothing below its deepest level, and what changes say
    about levels down there leaves holes between. Each side is therefore trusted down to a bound
    only, which an image sets and pruning raises, and what is read from a book ends there.
    """

    def __init__(self, max_levels: int = DEFAULT_MAX_LEVELS) -> None:
        self._bids = _Side(-1, max_levels)
        self._asks = _Side(1, max_levels)

    def load(
        self, bids: Sequence[Level], asks: Sequence[Level], *, limit: int | None = None
    ) -> None:
        """Replace the whole book by an image: its levels (price, size), in any order.

        A side with fewer than `limit` levels is known to its end; None says that both are.
        """
        self._bids.load(bids, limit)
        self._asks.load(asks, limit)

    def apply(self, bids: Sequence[Level], asks: Sequence[Level]) -> None:
        """Set levels (price, size) to new sizes; zero deletes, whether the level is held or not."""
        if bids:
            self._bids.apply(bids)
        if asks:
            self._asks.apply(asks)

    def cut(self, depth: int) -> None:
        """Keep the best `depth` levels of each side, and trust nothing below them any more."""
        self._bids.cut(depth)
        self._asks.cut(depth)

    def top(self, depth: int) -> tuple[list[Level], list[Level]]:
        """Give up to `depth` bids and asks, best first, none beyond what can be trusted.

        The lists are the caller's to read and to keep, not to change.
        """
        return self._bids.top(depth), self._asks.top(depth)

    def known_top(self, depth: int) -> tuple[list[Level], list[Level]]:
        """Give up to `depth` bids and asks as `top` does, and go on below with what is known.

        Among those beyond `trusted_depth` levels may be missing. Where they would cross, one of
        them is long gone, and what can be trusted is all there is.
        """
        bids, asks = self._bids.known_top(depth), self._asks.known_top(depth)
        if bids and asks and Decimal(bids[0][0]) >= Decimal(asks[0][0]):
            return self.top(depth)
        return bids, asks

    @property
    def best_bid(self) -> Level | None:
        """The highest bid, if there is one within what can be trusted."""
        return self._bids.best()

    @property
    def best_ask(self) -> Level | None:
        """The lowest ask, if there is one within what can be trusted."""
        return self._asks.best()

    @property
    def is_crossed(self) -> bool:
        """Whether the best bid is at or above the best ask: no exchange leaves its book so."""
        bids, asks = self._bids, self._asks
        if bids.scale != asks.scale:
            bids.rescale(max(bids.scale, asks.scale))
            asks.rescale(bids.scale)
        bid, ask = bids.best_key(), asks.best_key()
        return bid is not None and ask is not None and -bid >= ask

    @property
    def levels(self) -> tuple[int, int]:
        """How many bids and asks are held, trusted or not."""
        return len(self._bids), len(self._asks)

    @property
    def is_whole(self) -> bool:
        """Whether both sides are known to their ends, so that a new image would add nothing."""
        return not (self._bids.is_bounded or self._asks.is_bounded)

    @property
    def trusted_depth(self) -> int:
        """Up to which depth `top` is complete; for a whole book, that of its longer side."""
        sides = self._bids, self._asks
        bounded = [len(side.trusted) for side in sides if side.is_bounded]
        return min(bounded) if bounded else max(len(side.trusted) for side in sides)

    def differences(self, other: "OrderBook") -> tuple[int, int]:
        """Give how many levels both books can be compared in, and how many of them differ.

        They are compared as far down as both can be trusted; a level that one of them lacks there
        differs.
        """
        depth = min(self.trusted_depth, other.trusted_depth)
        compared = different = 0
        for ours, theirs in zip(self._deep_top(depth), other._deep_top(depth), strict=True):  # noqa: SLF001  # a book
            sizes, others = dict(map(_numbers, ours)), dict(map(_numbers, theirs))
            prices = sizes.keys() | others.keys()
            compared += len(prices)
            different += sum(sizes.get(price) != others.get(price) for price in prices)
        return compared, different

    def _deep_top(self, depth: int) -> tuple[list[Level], list[Level]]:
        return self._bids.deep_top(depth), self._asks.deep_top(depth)

    def digest(self) -> str:
        """Give the SHA-256 of every level held, trusted or not, as hexadecimal digits.

        It is taken over lines `bid PRICE SIZE` from the best bid on, then `ask PRICE SIZE`, with
        plain decimals that have no zeros to spare.
        """
        text = "".join(
            f"{name} {_plain(price)} {_plain(size)}\n"
            for name, side in (("bid", self._bids), ("ask", self._asks))
            for _, (price, size) in sorted((side.trusted | side.beyond).items())
        )
        return hashlib.sha256(text.encode()).hexdigest()


def _plain(text: str) -> str:
    return format(Decimal(text).normalize(), "f")


def _numbers(level: Level) -> tuple[Decimal, Decimal]:
    price, size = level
    return Decimal(price), Decimal(size)
