import hashlib
import random
from decimal import Decimal
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from orderbook import book as module
from orderbook.book import OrderBook

Levels = list[tuple[str, str]]


def test_two_texts_of_one_price_are_one_level() -> None:
    book = OrderBook()
    book.load([("1.10", "5")], [("01.20", "7")])
    book.apply([("1.1", "6")], [("1.2", "0.000")])
    assert book.top(5) == ([("1.1", "6")], [])


def test_a_price_keeps_its_text_however_deep_it_lies() -> None:
    with patch.object(module, "_WINDOW", 2):
        book = OrderBook()
    texts = ["9.50", "9.5", "09.40", "9.3", ".70", "0.60", "00.50", "0.4"]
    book.load([(text, "1") for text in texts], [])
    # 9.5 is the later text of its price, and has fewer places than the finest.
    assert [price for price, _ in book.top(1)[0]] == ["9.5"]
    book.apply([("9.5", "0"), ("9.40", "2"), ("0.7", "2"), ("0.70", "3"), ("0.6", "4")], [])
    book.apply([("0.125", "5"), ("0.40", "6")], [])
    assert book.top(9)[0] == [
        ("9.40", "2"),
        ("9.3", "1"),
        ("0.70", "3"),
        ("0.6", "4"),
        ("00.50", "1"),
        ("0.40", "6"),
        ("0.125", "5"),
    ]


def test_prices_that_one_float_cannot_tell_apart_are_two_levels() -> None:
    low, high = "0.10000000000000000001", "0.10000000000000000002"
    assert float(low) == float(high)
    book = OrderBook()
    book.apply([(low, "1"), (high, "2")], [])
    assert book.top(5) == ([(high, "2"), (low, "1")], [])


def test_a_price_with_more_places_makes_the_scale_finer() -> None:
    book = OrderBook()
    book.load([("10", "1"), ("9", "2")], [("11", "3"), ("12", "4")], limit=2)
    book.apply([("9.5", "5"), ("8.999", "6")], [("11.25", "7")])
    assert book.top(5) == (
        [("10", "1"), ("9.5", "5"), ("9", "2")],
        [("11", "3"), ("11.25", "7"), ("12", "4")],
    )
    book.apply([("9", "0")], [])
    assert book.best_bid == ("10", "1")
    assert book.best_ask == ("11", "3")
    assert not book.is_crossed


@pytest.mark.parametrize("zero", ["0", "0.0", "0.00000000", "00", ".0", "0.", "0" * 50])
def test_every_zero_deletes(zero: str) -> None:
    book = OrderBook()
    book.load([("1", "1"), ("2", zero)], [("3", "1")])
    book.apply([("1", zero), ("0.5", zero)], [("3", "0.00000001")])
    assert book.top(5) == ([], [("3", "0.00000001")])


@pytest.mark.parametrize(
    ("bid", "ask", "is_crossed"),
    [("1.1", "1.2", False), ("1.2", "1.20", True), ("1.3", "1.2", True), ("1.19999", "1.2", False)],
)
def test_a_book_is_crossed_where_its_bids_reach_its_asks(
    bid: str, ask: str, *, is_crossed: bool
) -> None:
    book = OrderBook()
    book.apply([(bid, "1")], [(ask, "1")])
    assert book.is_crossed is is_crossed


def test_empty_and_one_sided_books_have_no_best_and_are_not_crossed() -> None:
    book = OrderBook()
    assert (book.best_bid, book.best_ask, book.is_crossed) == (None, None, False)
    assert (book.top(3), book.trusted_depth, book.levels) == (([], []), 0, (0, 0))
    book.apply([("1", "2")], [])
    assert (book.best_bid, book.best_ask, book.is_crossed) == (("1", "2"), None, False)
    assert (book.top(3), book.trusted_depth) == (([("1", "2")], []), 1)


def test_nothing_below_the_deepest_level_of_an_image_is_trusted() -> None:
    book = OrderBook()
    book.load([("10", "1"), ("9", "1")], [("11", "1")], limit=2)
    assert not book.is_whole
    # The asks were fewer than asked for, so there are no more of them.
    assert book.trusted_depth == 2
    book.apply([("8", "1"), ("10.5", "1")], [("20", "1")])
    assert book.trusted_depth == 3
    assert book.levels == (4, 2)
    assert book.top(9) == (
        [("10.5", "1"), ("10", "1"), ("9", "1")],
        [("11", "1"), ("20", "1")],
    )
    book.apply([("10.5", "0"), ("10", "0"), ("9", "0")], [])
    assert book.trusted_depth == 0
    assert book.best_bid is None


def test_a_book_without_a_limit_is_whole_and_trusted_to_its_end() -> None:
    book = OrderBook()
    book.load([("2", "1"), ("1", "1")], [("3", "1")])
    assert book.is_whole
    assert book.trusted_depth == 2


def test_what_does_not_fit_goes_from_the_far_end_and_is_not_trusted_any_more() -> None:
    book = OrderBook(max_levels=16)
    book.load([(f"{100 - i}", "1") for i in range(16)], [])
    assert book.is_whole
    book.apply([("101", "1")], [])
    assert book.levels == (14, 0)
    assert book.trusted_depth == 14
    assert not book.is_whole
    book.apply([("87", "1")], [])
    assert book.trusted_depth == 14
    assert [price for price, _ in book.top(99)[0]] == [f"{101 - i}" for i in range(14)]


def test_levels_below_the_trusted_ones_are_the_first_to_go() -> None:
    book = OrderBook(max_levels=4)
    book.load([("10", "1"), ("9", "1")], [], limit=2)
    book.apply([("8", "1"), ("7", "1"), ("6", "1")], [])
    assert book.levels == (2, 0)
    assert book.trusted_depth == 2


def test_a_book_that_is_cut_knows_its_best_levels_only() -> None:
    book = OrderBook()
    book.load([("10", "1"), ("9", "1"), ("8", "1")], [("11", "1")])
    book.cut(2)
    assert book.levels == (2, 1)
    assert (book.is_whole, book.trusted_depth) == (False, 2)
    book.apply([("8", "2"), ("10", "0")], [("12", "1")])
    assert book.top(9) == ([("9", "1")], [("11", "1"), ("12", "1")])


def test_a_list_that_was_read_does_not_change_afterwards() -> None:
    book = OrderBook()
    book.load([("10", "1")], [("11", "1")])
    bids, asks = book.top(2)
    book.apply([("10", "2")], [("10.5", "3")])
    assert (bids, asks) == ([("10", "1")], [("11", "1")])
    assert book.top(2) == ([("10", "2")], [("10.5", "3"), ("11", "1")])


def test_levels_below_those_in_order_are_found_when_they_come_up() -> None:
    with patch.object(module, "_WINDOW", 2):
        book = OrderBook()
    book.load([(str(tick), "1") for tick in range(2, 11)], [])
    assert book.top(1)[0] == [("10", "1")]
    # Only the two best are in order now; this one is far below them.
    book.apply([("1", "1")], [])
    assert book.top(1)[0] == [("10", "1")]
    book.apply([("10", "0"), ("9", "0")], [])
    assert book.top(1)[0] == [("8", "1")]


def test_a_deep_read_stays_true_when_fewer_levels_are_kept_in_order() -> None:
    with patch.object(module, "_WINDOW", 4):
        book = OrderBook()
    book.load([(str(tick), "1") for tick in range(20, 28)], [])
    assert book.best_bid == ("27", "1")
    assert book.top(7)[0][5] == ("22", "1")
    # One level more than the window holds: it shrinks at the next read.
    book.apply([("10", "1")], [])
    assert book.best_bid == ("27", "1")
    book.apply([("22", "7")], [])
    assert book.top(7)[0][5] == ("22", "7")


def test_the_digest_is_over_plain_decimals_in_order() -> None:
    book = OrderBook()
    book.load([("9", "1.50"), ("10.10", "2")], [("300", "0.0001000")])
    lines = b"bid 10.1 2\nbid 9 1.5\nask 300 0.0001\n"
    assert book.digest() == hashlib.sha256(lines).hexdigest()


def test_books_are_compared_as_far_as_both_are_known() -> None:
    deep, shallow = OrderBook(), OrderBook()
    deep.load([("10", "1"), ("9", "1"), ("8", "1")], [("11", "1"), ("12", "2")])
    shallow.load([("10.0", "1.00"), ("9", "1")], [("11", "1"), ("12", "2.0")], limit=2)
    assert deep.differences(shallow) == (4, 0)
    assert shallow.differences(deep) == (4, 0)
    shallow.apply([("10.5", "1")], [("12", "3")])
    # Of the two best bids one is new and one is pushed out; an ask has another size.
    assert deep.differences(shallow)[1] == 3


NOTATIONS = ("{}.{:02}", "{}.{:02}0", "0{}.{:02}000")
SIZES = ("0", "0.000", "1", "2.5", "30")


def text(tick: int, notation: str = "{}.{:02}") -> str:
    return notation.format(*divmod(tick, 100))


class BookAgainstModel(RuleBasedStateMachine):
    """A book fed with images of some depth and all changes, beside the exchange's whole book."""

    @initialize(
        window=st.sampled_from([1, 3, 128]),
        few=st.sampled_from([0, 4, 1024]),
        max_keys=st.sampled_from([1, 16, 4096]),
        max_levels=st.sampled_from([8, 30, 10_000]),
        deepest_read=st.sampled_from([3, 60]),
    )
    def begin(
        self, window: int, few: int, max_keys: int, max_levels: int, deepest_read: int
    ) -> None:
        self.patches = [
            patch.object(module, "_WINDOW", window),
            patch.object(module, "_FEW", few),
            patch.object(module, "_MAX_KEYS", max_keys),
        ]
        for each in self.patches:
            each.start()
        self.max_levels = max_levels
        self.deepest_read = deepest_read
        self.book = OrderBook(max_levels)
        self.bids: dict[int, str] = {}
        self.asks: dict[int, str] = {}
        self.known_to: tuple[int | None, int | None] = (None, None)

    def teardown(self) -> None:
        for each in getattr(self, "patches", []):
            each.stop()

    @rule(seed=st.integers(0, 2**32), count=st.integers(0, 30))
    def change(self, seed: int, count: int) -> None:
        # Drawing every level from Hypothesis would be most of the time.
        rng = random.Random(seed)
        changes: tuple[Levels, Levels] = ([], [])
        for _ in range(count):
            number = rng.randrange(2)
            side = (self.bids, self.asks)[number]
            tick, size = rng.randint(1, 300), rng.choice(SIZES)
            if Decimal(size) == 0:
                side.pop(tick, None)
            else:
                side[tick] = size
            changes[number].append((text(tick, rng.choice(NOTATIONS)), size))
        self.book.apply(*changes)

    @rule(limit=st.integers(1, 40))
    def image(self, limit: int) -> None:
        bids = sorted(self.bids.items(), reverse=True)[:limit]
        asks = sorted(self.asks.items())[:limit]
        self.known_to = (
            bids[-1][0] if len(bids) == limit else None,
            asks[-1][0] if len(asks) == limit else None,
        )
        self.book.load(
            [(text(tick), size) for tick, size in bids],
            [(text(tick), size) for tick, size in asks],
            limit=limit,
        )

    def true_top(self, depth: int) -> tuple[Levels, Levels]:
        bids = sorted(self.bids.items(), reverse=True)[:depth]
        asks = sorted(self.asks.items())[:depth]
        return [(text(p), q) for p, q in bids], [(text(p), q) for p, q in asks]

    @rule(depth=st.integers(0, 60))
    def what_is_read_is_true_and_as_deep_as_is_known(self, depth: int) -> None:
        depth = min(depth, self.deepest_read)
        true = self.true_top(depth)
        read = self.book.top(depth)
        known = self.book.trusted_depth
        for held, side in zip(read, true, strict=True):
            assert [(Decimal(p), q) for p, q in held] == [
                (Decimal(p), q) for p, q in side[: len(held)]
            ]
            assert len(held) >= min(known, depth, len(side))
        if self.book.is_whole:
            assert tuple(map(len, read)) == tuple(map(len, true))

    @invariant()
    def it_is_not_trusted_beyond_its_image_nor_less_than_it_is_known(self) -> None:
        if not hasattr(self, "book"):
            return
        low, high = self.known_to
        known = [
            sum(low is None or tick >= low for tick in self.bids),
            sum(high is None or tick <= high for tick in self.asks),
        ]
        bounded = [n for n, end in zip(known, self.known_to, strict=True) if end is not None]
        deepest = min(bounded) if bounded else max(known)
        assert max(self.book.levels) <= self.max_levels
        if self.max_levels == 10_000:
            assert self.book.trusted_depth == deepest
        else:
            assert self.book.trusted_depth <= deepest

    @invariant()
    def it_is_crossed_where_the_best_levels_meet(self) -> None:
        if not hasattr(self, "book"):
            return
        bid, ask = self.book.best_bid, self.book.best_ask
        met = bid is not None and ask is not None and Decimal(bid[0]) >= Decimal(ask[0])
        assert self.book.is_crossed is met


# Shrinking a failure takes minutes, and what fails is said by the invariants' names.
BookAgainstModel.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
TestBookAgainstModel = BookAgainstModel.TestCase


def test_what_is_known_goes_on_below_what_can_be_trusted() -> None:
    book = OrderBook()
    book.load([("10", "1"), ("9", "1")], [("11", "1"), ("12", "1")], limit=2)
    book.apply([("10", "0"), ("8", "1"), ("7", "1")], [("13", "1")])

    assert book.top(3) == ([("9", "1")], [("11", "1"), ("12", "1")])
    assert book.known_top(3) == (
        [("9", "1"), ("8", "1"), ("7", "1")],
        [("11", "1"), ("12", "1"), ("13", "1")],
    )
    assert book.trusted_depth == 1


def test_levels_that_would_cross_are_not_shown() -> None:
    book = OrderBook()
    book.load([("10", "1")], [("11", "1")], limit=1)
    book.apply([("10", "0"), ("9", "1")], [("5", "1")])

    assert book.known_top(2) == book.top(2) == ([], [("5", "1"), ("11", "1")])
