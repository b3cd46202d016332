"""When a hole is named and when a gap is closed."""

from collector.ledger import judge
from sluice.queue import Hole
from sluice.records import Gap

SETTLE_MS = 1000


def gap(first: int, last: int) -> Gap:
    return Gap(
        exchange="binance",
        symbol="BTCUSDT",
        gap_id=f"g:{first}-{last}",
        channel="trade",
        from_id=first,
        to_id=last,
        ts_from=None,
        ts_to=None,
        cause="a test",
        status="open",
        tries=0,
        revision=1,
        ts_opened=1,
        ts_closed=None,
    )


def test_a_hole_is_named_only_when_it_outlives_its_time_to_settle() -> None:
    young, old = Hole(1, 2, 9_500), Hole(5, 6, 9_000)
    assert judge([young, old], [], 10_000, SETTLE_MS).to_open == [old]


def test_what_is_left_of_a_named_hole_is_not_named_again() -> None:
    judgement = judge([Hole(3, 4, 0), Hole(7, 9, 0)], [gap(1, 9)], 10_000, SETTLE_MS)
    assert judgement.to_open == []
    assert judgement.to_close == []


def test_a_gap_is_closed_when_no_hole_is_left_in_it() -> None:
    done, undone = gap(1, 9), gap(20, 29)
    judgement = judge([Hole(25, 25, 0), Hole(10, 19, 9_999)], [done, undone], 10_000, SETTLE_MS)
    assert judgement.to_close == [done]
    assert judgement.to_open == []
