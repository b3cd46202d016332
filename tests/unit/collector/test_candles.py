"""What a page of candles proves about a window."""

import pytest

from collector.aggregates import UnorderedPageError
from collector.candles import CandlePage, read_candles
from sluice.records import Kline

MINUTE = 60_000_000
PAGE = 5
FUTURE = 10**15


def candle(minute: int) -> Kline:
    return Kline(
        exchange="binance",
        symbol="BTCUSDT",
        interval="1m",
        ts_open=minute * MINUTE,
        ts_close=(minute + 1) * MINUTE - 1000,
        open="1",
        high="1",
        low="1",
        close="1",
        volume="0",
        quote_volume="0",
        trade_count=0,
        taker_buy_volume="0",
        taker_buy_quote_volume="0",
        first_trade_id=-1,
        last_trade_id=-1,
        ts_recv=1,
    )


def read(first: int, end: int, *minutes: int, now: int = FUTURE) -> CandlePage:
    answer = [candle(minute) for minute in minutes]
    return read_candles((first * MINUTE, end * MINUTE), answer, PAGE, now)


def windows(*pairs: tuple[int, int]) -> list[tuple[int, int]]:
    return [(first * MINUTE, end * MINUTE) for first, end in pairs]


def test_a_whole_window_leaves_nothing() -> None:
    page = read(3, 6, 3, 4, 5)
    assert [found.ts_open for found in page.candles] == [3 * MINUTE, 4 * MINUTE, 5 * MINUTE]
    assert (page.missing, page.until, page.is_last) == ([], 6 * MINUTE, True)


def test_a_full_page_that_ends_within_the_window_asks_for_more() -> None:
    page = read(0, 100, 0, 1, 2, 3, 4)
    assert (page.missing, page.until, page.is_last) == ([], 5 * MINUTE, False)


def test_candles_passed_over_or_not_there_at_the_end_are_missing() -> None:
    page = read(2, 9, 3, 6)
    assert page.missing == windows((2, 3), (4, 6), (7, 9))
    assert (page.until, page.is_last) == (9 * MINUTE, True)


def test_a_candle_beyond_the_window_is_not_looked_at() -> None:
    page = read(3, 6, 3, 9)
    assert len(page.candles) == 1
    assert (page.missing, page.is_last) == (windows((4, 6)), True)


def test_a_window_without_any_is_missing_whole() -> None:
    assert read(2, 9).missing == windows((2, 9))


@pytest.mark.parametrize("now", [5 * MINUTE + 1, 6 * MINUTE - 1000])
def test_a_candle_that_is_still_open_is_left_out_and_not_missing(now: int) -> None:
    page = read(3, 6, 3, 4, 5, now=now)
    assert [found.ts_open for found in page.candles] == [3 * MINUTE, 4 * MINUTE]
    assert (page.missing, page.is_last) == ([], True)


def test_a_window_that_begins_or_ends_within_a_candle_misses_no_part_of_it() -> None:
    page = read_candles(
        (MINUTE // 2, 3 * MINUTE + 1), [candle(1), candle(2), candle(3)], PAGE, FUTURE
    )
    assert page.missing == []
    assert len(page.candles) == 3


@pytest.mark.parametrize("minutes", [(4, 4), (5, 4), (2, 3)])
def test_candles_that_do_not_ascend_from_the_window_prove_nothing(
    minutes: tuple[int, ...],
) -> None:
    with pytest.raises(UnorderedPageError):
        read(3, 9, *minutes)
