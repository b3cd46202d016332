from datetime import UTC, datetime

import pytest

from sluice.simulator.bars import HOUR, INTERVALS, BarSeries, next_open, open_time


def at(*when: int) -> int:
    return int(datetime(*when, tzinfo=UTC).timestamp()) * 1000


@pytest.mark.parametrize(
    ("interval", "opened", "following"),
    [
        ("1s", at(2026, 3, 18, 13, 47, 31), at(2026, 3, 18, 13, 47, 32)),
        ("1m", at(2026, 3, 18, 13, 47), at(2026, 3, 18, 13, 48)),
        ("15m", at(2026, 3, 18, 13, 45), at(2026, 3, 18, 14, 0)),
        ("1d", at(2026, 3, 18), at(2026, 3, 19)),
        ("1w", at(2026, 3, 16), at(2026, 3, 23)),
        ("1M", at(2026, 3, 1), at(2026, 4, 1)),
    ],
)
def test_when_bars_open(interval: str, opened: int, following: int) -> None:
    time = at(2026, 3, 18, 13, 47, 31) + 500
    assert open_time(interval, time) == opened
    assert next_open(interval, opened) == following
    assert open_time(interval, following - 1) == opened


def test_days_of_utc_plus_8_open_at_16_utc() -> None:
    assert open_time("1d", at(2026, 3, 18, 13), 8 * HOUR) == at(2026, 3, 17, 16)
    assert open_time("1M", at(2026, 2, 28, 17), 8 * HOUR) == at(2026, 2, 28, 16)


@pytest.mark.parametrize("interval", INTERVALS)
def test_every_interval_covers_time_without_hole(interval: str) -> None:
    opened = open_time(interval, at(2025, 12, 30))
    for _ in range(5):
        following = next_open(interval, opened)
        assert open_time(interval, following) == following
        assert open_time(interval, following - 1) == opened
        opened = following


def test_a_bar_without_trades_is_flat_at_the_close_before() -> None:
    series = BarSeries("1s")
    series.add(1, 70, 1, 10_500, buyer_is_maker=False)
    series.add(2, 60, 1, 13_500, buyer_is_maker=True)
    bars = series.between(None, None, 10, 14_000)
    assert [(bar.opened, bar.close, bar.count, bar.first_id) for bar in bars] == [
        (10_000, 70, 1, 1),
        (11_000, 70, 0, -1),
        (12_000, 70, 0, -1),
        (13_000, 60, 1, 2),
        (14_000, 60, 0, -1),
    ]
    assert series.at(9_000) is None


def test_windows_of_time_are_inclusive_and_limited() -> None:
    series = BarSeries("1s")
    series.add(1, 70, 1, 10_500, buyer_is_maker=False)

    def opened(start: int | None, end: int | None, limit: int) -> list[int]:
        return [bar.opened for bar in series.between(start, end, limit, 20_000)]

    assert opened(12_000, 14_000, 10) == [12_000, 13_000, 14_000]
    assert opened(12_001, None, 2) == [13_000, 14_000]
    assert opened(None, 14_999, 2) == [13_000, 14_000]
    assert opened(None, None, 2) == [19_000, 20_000]
    assert opened(0, None, 1) == [10_000]
