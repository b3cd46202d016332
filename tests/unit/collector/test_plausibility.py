"""A wild id is not believed; a market that really leapt is."""

from collector.plausibility import MOST_FIRST, MOST_LEAP, Plausibility
from sluice.records import Trade

WILD = 2**52


def trade(trade_id: int) -> Trade:
    return Trade("binance", "BTCUSDT", trade_id, trade_id, "1.5", "2", "buy", 1, 2)


def admitted(*ids: int) -> tuple[list[int], list[int]]:
    """Give the ids believed and those refuted."""
    plausibility = Plausibility()
    believed: list[int] = []
    refuted: list[int] = []
    for number in ids:
        trades, wrong = plausibility.admit(trade(number))
        believed += [entry.trade_id for entry in trades]
        refuted += [wrong.trade_id] if wrong else []
    return believed, refuted


def test_ids_that_follow_repeat_or_come_late_are_believed() -> None:
    assert admitted(7, 8, 8, 3, 9, 9 + MOST_LEAP) == ([7, 8, 8, 3, 9, 9 + MOST_LEAP], [])


def test_one_wild_id_is_refuted_by_the_next_trade() -> None:
    assert admitted(7, WILD, 8, 9) == ([7, 8, 9], [WILD])


def test_a_wild_id_at_the_very_start_is_refuted_too() -> None:
    assert admitted(WILD, 8, 9) == ([8, 9], [WILD])


def test_a_record_may_begin_anywhere_below_the_bound() -> None:
    assert admitted(MOST_FIRST) == ([MOST_FIRST], [])


def test_a_market_that_has_leapt_is_believed_with_its_second_trade() -> None:
    leapt = 7 + 5 * MOST_LEAP
    assert admitted(7, leapt + 1, leapt, leapt + 2) == ([7, leapt + 1, leapt, leapt + 2], [])


def test_two_wild_ids_that_differ_bear_nothing_out() -> None:
    assert admitted(7, WILD, WILD // 2, 8) == ([7, 8], [WILD, WILD // 2])
