"""An exact order book of which it is known how deep it can be trusted.

A price is held as an integer at the book's scale, so `1.10` and `1.1` are one level and two prices
that one float cannot tell apart are two. What goes out is the exchange's own text.

A dict a side takes the changes. Only the best levels are kept in order, and only when they are
read: a change below them costs no more than the dict does. Down there a level is its size alone:
its price is written from its key again, or kept where the exchange writes it another way.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Final

from sluice.records import MAX_DECIMAL, Level

DEFAULT_MAX_LEVELS: Final = 5000
_WINDOW: Final = 128
"""How many of the best levels are put in order at once; a read of more puts twice as many."""
_UNBOUNDED: Final[int] = 10 ** (2 * MAX_DECIMAL)
"""Beyond every key: a price has at most MAX_DECIMAL digits and a scale at most as many places."""
_FEW: Final = 1024
_MAX_KEYS: Final = 1 << 16
_KEYS: Final[dict[tuple[int, int], dict[str, int]]] = {}
"""The keys of prices that changes named lately, by sign and scale; all books share them."""
_ZEROS: Final = frozenset(
    text
    for before in range(MAX_DECIMAL)
    for after in range(MAX_DECIMAL - before)
    for text in ("0" * before + "." + "0" * after, "0" * (before + after + 1))
)
"""Every way to write zero in a record: a size among them deletes its level."""


class _Side:
    """One side of a book; keys ascend from the best level on, so those of bids are negative.

    Every level up to `_bound` is held: those up to `_edge` in `near`, the others in `deep`.
    `beyond` has the levels that changes named below the bound, among which others may be missing.

    `_window` is the sorted keys of `near`, but for those in `_moved`, which came or went since it
    was last put in order. `_top` is what was read last, down to `_shown`, unless a change above
    that made it old.
    """

    def __init__(self, sign: int, max_levels: int) -> None:
        self.near: dict[int, Level] = {}
        self.deep: dict[int, str | Level] = {}
        self.beyond: dict[int, str | Level] = {}
        self.scale = 0
        self._sign = sign
        self._max_levels = max_levels
        self._keys = _KEYS.setdefault((sign, 0), {})
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

    @property
    def trusted(self) -> int:
        """How many levels are known to be all there are down to them."""
        return len(self.near) + len(self.deep)

    def __len__(self) -> int:
        return len(self.near) + len(self.deep) + len(self.beyond)

    def load(self, levels: Sequence[Level], limit: int | None) -> None:
        for held in (self.near, self.deep, self.beyond):
            held.clear()
        self._bound = _UNBOUNDED
        self._forget_order()
        deep = self.deep
        for level in levels:
            # Not noted: most prices of an image are not named again.
            key, is_plain = self._key(level[0])
            if level[1] in _ZEROS:
                deep.pop(key, None)
            else:
                deep[key] = level[1] if is_plain else level
        if levels and limit is not None and len(levels) >= limit:
            self._bound = max(deep, default=-_UNBOUNDED)
        if len(deep) > self._max_levels:
            self._prune()

    def apply(self, levels: Sequence[Level]) -> None:  # noqa: C901, PLR0912  # a call a level costs as much
        key_of, near, deep, moved = self._keys.get, self.near, self.deep, self._moved
        bound, edge, shown = self._bound, self._edge, self._shown
        for level in levels:
            price, size = level
            key = key_of(price)
            if key is None:
                key, is_plain = self._key(price)
                key_of, bound, edge, shown = self._keys.get, self._bound, self._edge, self._shown
                if is_plain:
                    self._note(price, key)
                elif key > edge and size not in _ZEROS:
                    (deep if key <= bound else self.beyond)[key] = level
                    continue
            if key <= edge:
                if key <= shown:
                    self._top = None
                if size in _ZEROS:
                    if near.pop(key, None) is not None:
                        moved.add(key)
                else:
                    if key not in near:
                        moved.add(key)
                    near[key] = level
            else:
                held = deep if key <= bound else self.beyond
                if size in _ZEROS:
                    held.pop(key, None)
                else:
                    held[key] = size
        if len(near) + len(deep) + len(self.beyond) > self._max_levels:
            self._prune()
        if len(moved) > len(near) + _FEW:
            self._forget_order()

    def cut(self, depth: int) -> None:
        self._forget_order()
        self.beyond.clear()
        if len(self.deep) > depth:
            self._keep(sorted(self.deep)[:depth])

    def top(self, depth: int) -> list[Level]:
        """Give the best levels; the list is the caller's to read, not to change."""
        if self._top is None or depth != self._shown_depth:
            best = self._ordered(depth)[:depth]
            self._top = list(map(self.near.__getitem__, best))
            self._shown = best[-1] if best and len(best) == depth else self._edge
            self._shown_depth = depth
        return self._top

    def deep_top(self, depth: int) -> list[Level]:
        """Give the best levels as `top` does, and leave the window as narrow as it is."""
        best = [self.near[key] for key in sorted(self.near)[:depth]]
        if len(best) < depth:
            deep = sorted(self.deep)[: depth - len(best)]
            best += [self._level(key, self.deep[key]) for key in deep]
        return best

    def known_top(self, depth: int) -> list[Level]:
        """Give the best levels that are known, trusted or not."""
        if self.trusted >= depth or not self.beyond:
            return self.top(depth)
        return self.whole()[:depth]

    def whole(self) -> list[Level]:
        """Give every level held, trusted or not, best first."""
        far = self.deep | self.beyond
        return self.deep_top(len(self.near)) + [self._level(key, far[key]) for key in sorted(far)]

    def best(self) -> Level | None:
        key = self.best_key()
        return None if key is None else self.near[key]

    def best_key(self) -> int | None:
        window = self._ordered(1)
        return window[0] if window else None

    def rescale(self, scale: int) -> None:
        """Turn every key into one of a finer scale."""
        self._forget_order()
        factor = 10 ** (scale - self.scale)
        for held in (self.deep, self.beyond):
            # At the new scale these prices would be written in another way.
            finer = {key * factor: self._level(key, kept) for key, kept in held.items()}
            held.clear()
            held.update(finer)
        if self.is_bounded:
            self._bound *= factor
        self.scale = scale
        self._keys = _KEYS.setdefault((self._sign, scale), {})

    def _key(self, price: str) -> tuple[int, bool]:
        """Give the key of a price, and whether that is enough to write the price again."""
        digits = price.replace(".", "")
        places = len(price) - price.find(".") - 1 if len(digits) < len(price) else 0
        if places != self.scale:
            if places > self.scale:
                self.rescale(places)
            digits += "0" * (self.scale - places)
        key = self._sign * int(digits)
        return key, price == self._price(key)

    def _note(self, price: str, key: int) -> None:
        if len(self._keys) >= _MAX_KEYS:
            self._keys.clear()
        self._keys[price] = key

    def _price(self, key: int) -> str:
        """Write a price with as many places as the scale has."""
        digits = str(key * self._sign)
        if not self.scale:
            return digits
        digits = digits.zfill(self.scale + 1)
        return f"{digits[: -self.scale]}.{digits[-self.scale :]}"

    def _level(self, key: int, kept: str | Level) -> Level:
        return (self._price(key), kept) if isinstance(kept, str) else kept

    def _demote(self, keys: Iterable[int]) -> None:
        for key in keys:
            level = self.near.pop(key)
            self.deep[key] = level[1] if level[0] == self._price(key) else level

    def _ordered(self, depth: int) -> list[int]:
        """Put the window in order; it holds `depth` keys, or all there are."""
        near, window = self.near, self._window
        if self._moved:
            for key in self._moved:
                at = bisect_left(window, key)
                is_listed = at < len(window) and window[at] == key
                if key in near:
                    if not is_listed:
                        window.insert(at, key)
                elif is_listed:
                    del window[at]
            self._moved.clear()
        self._ordered_depth = max(self._ordered_depth, 2 * depth)
        if len(window) < depth and self._edge < self._bound:
            more = sorted(self.deep)[: self._ordered_depth]
            for key in more:
                near[key] = self._level(key, self.deep.pop(key))
            window += more
            self._edge = window[-1] if self.deep else self._bound
        elif len(window) > 2 * self._ordered_depth:
            self._demote(window[self._ordered_depth :])
            del window[self._ordered_depth :]
            self._edge = window[-1]
        return window

    def _forget_order(self) -> None:
        self._demote(list(self.near))
        self._window.clear()
        self._moved.clear()
        self._edge = -_UNBOUNDED
        self._top = None

    def _prune(self) -> None:
        """Let the far end go, and with it an eighth more, so that this is rare."""
        self.beyond.clear()
        if self.trusted > self._max_levels:
            self._forget_order()
            self._keep(sorted(self.deep)[: self._max_levels - self._max_levels // 8])

    def _keep(self, keys: list[int]) -> None:
        """Let go of all but the best levels, which are at least one, and trust nothing below."""
        kept = {key: self.deep[key] for key in keys}
        self.deep.clear()
        self.deep.update(kept)
        self._bound = keys[-1]


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
        bounded = [side.trusted for side in sides if side.is_bounded]
        return min(bounded) if bounded else max(side.trusted for side in sides)

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
            for price, size in side.whole()
        )
        return hashlib.sha256(text.encode()).hexdigest()


def _plain(text: str) -> str:
    return format(Decimal(text).normalize(), "f")


def _numbers(level: Level) -> tuple[Decimal, Decimal]:
    price, size = level
    return Decimal(price), Decimal(size)
