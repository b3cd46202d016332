"""What is stored of an aggregate of which some fills are held, and what pages pass over."""

from decimal import Decimal

import pytest

from collector.aggregates import Held, NotYetKnownError, UnorderedPageError, Walk, remainder
from sluice.records import Trade


def aggregate(first: int, last: int, quantity: str = "10.00") -> Trade:
    return Trade(
        exchange="binance",
        symbol="BTCUSDT",
        trade_id=last,
        first_id=first,
        price="1.5",
        quantity=quantity,
        side="buy",
        ts_event=1,
        ts_recv=2,
    )


@pytest.mark.parametrize(
    ("missing", "held", "ids", "quantity", "merged"),
    [
        ([(3, 5)], [Held(1, 2, Decimal("0.5"))], (3, 5), "9.50", []),
        ([(1, 3)], [Held(4, 4, Decimal(1)), Held(5, 5, Decimal(2))], (1, 3), "7.00", []),
        ([(1, 1), (4, 5)], [Held(2, 3, Decimal(4))], (4, 5), "6.00", [(1, 1)]),
    ],
)
def test_the_missing_fills_are_one_row(
    missing: list[tuple[int, int]],
    held: list[Held],
    ids: tuple[int, int],
    quantity: str,
    merged: list[tuple[int, int]],
) -> None:
    found = remainder(aggregate(1, 5), missing, held)
    assert found.trade is not None
    assert (found.trade.first_id, found.trade.trade_id) == ids
    assert (found.trade.quantity, found.trade.price, found.trade.side) == (quantity, "1.5", "buy")
    assert found.merged == merged


def test_a_row_that_is_stored_already_leaves_only_names() -> None:
    found = remainder(aggregate(1, 3), [(1, 1)], [Held(2, 2, Decimal(4)), Held(3, 3, Decimal(6))])
    assert (found.trade, found.merged) == (None, [(1, 1)])


def test_nothing_is_told_before_every_fill_held_is_in_the_table() -> None:
    with pytest.raises(NotYetKnownError, match="1 of the 2 trades"):
        remainder(aggregate(1, 3), [(3, 3)], [Held(1, 1, Decimal(1))])


def test_rows_that_hold_more_than_the_aggregate_contradict_it() -> None:
    with pytest.raises(ValueError, match="hold more"):
        remainder(aggregate(1, 2), [(2, 2)], [Held(1, 1, Decimal(11))])


def test_digits_are_exact() -> None:
    whole = aggregate(1, 2, "90071992547409930.00000000000000000001")
    found = remainder(whole, [(2, 2)], [Held(1, 1, Decimal("0.00000000000000000001"))])
    assert found.trade is not None
    assert found.trade.quantity == "90071992547409930.00000000000000000000"


def test_what_the_pages_pass_over_and_repeat() -> None:
    walk = Walk((10, 40))
    assert walk.read([aggregate(8, 12), aggregate(15, 16)]) == [aggregate(8, 12), aggregate(15, 16)]
    assert walk.read([aggregate(15, 16), aggregate(17, 30)]) == [aggregate(17, 30)]
    assert walk.passed_over == [(13, 14)]
    assert not walk.is_done
    walk.read([aggregate(50, 51)])
    assert walk.passed_over == [(13, 14), (31, 40)]
    assert walk.is_done


def test_aggregates_that_overlap_prove_nothing() -> None:
    with pytest.raises(UnorderedPageError):
        Walk((1, 9)).read([aggregate(1, 5), aggregate(5, 9)])
