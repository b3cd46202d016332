from collections.abc import Iterable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orderbook.grid import QUIET_US, SnapshotGrid

SECOND = 1_000_000
NOW = 1_790_000_000 * SECOND


def grid_at(ts: int) -> SnapshotGrid:
    grid = SnapshotGrid(SECOND)
    assert list(grid.on_event(ts, ts)) == []
    return grid


def seconds(instants: Iterable[int]) -> list[float]:
    return [(instant - NOW) / SECOND for instant in instants]


def at(grid: SnapshotGrid, second: float) -> list[float]:
    ts = NOW + round(second * SECOND)
    return seconds(grid.on_event(ts, ts))


def idle(grid: SnapshotGrid, second: float) -> list[float]:
    return seconds(grid.flush_idle(NOW + int(second * SECOND)))


def test_an_instant_is_due_at_the_first_event_past_it() -> None:
    grid = grid_at(NOW + 300_000)
    assert at(grid, 0.9) == []
    assert at(grid, 1.1) == [1]
    assert at(grid, 1.2) == []
    assert at(grid, 4.5) == [2, 3, 4]


def test_an_event_at_the_instant_itself_belongs_to_its_row() -> None:
    grid = grid_at(NOW)
    assert at(grid, 1) == [0]
    assert at(grid, 1) == []
    assert at(grid, 1.000001) == [1]


def test_what_lies_before_the_first_event_is_not_known() -> None:
    grid = grid_at(NOW + 1)
    assert at(grid, 1.5) == [1]
    grid.restart()
    assert at(grid, 5.5) == []
    assert at(grid, 6.5) == [6]


def test_a_quiet_book_has_its_rows_two_seconds_later() -> None:
    grid = grid_at(NOW + 500_000)
    assert idle(grid, 2.9) == []
    assert idle(grid, 3) == [1]
    assert idle(grid, 3) == []
    assert idle(grid, 5.5) == [2, 3]
    assert at(grid, 4.5) == [4]


def test_a_book_that_is_not_live_has_no_rows() -> None:
    grid = SnapshotGrid(SECOND)
    assert idle(grid, 100) == []
    grid = grid_at(NOW)
    grid.restart()
    assert idle(grid, 100) == []


def test_rows_end_a_minute_after_the_last_event_however_they_came_due() -> None:
    slow, quick = grid_at(NOW), grid_at(NOW)
    flushed = [second for now in range(200) for second in idle(slow, now)]
    assert at(slow, 3600.5) == []
    assert at(quick, 3600.5) == flushed == list(range(61))
    assert at(slow, 3601.5) == at(quick, 3601.5) == [3601]


def test_an_event_a_little_older_than_the_one_before_counts_as_at_its_time() -> None:
    grid = grid_at(NOW + 1_500_000)
    assert at(grid, 0.7) == []
    assert at(grid, 2.5) == [2]


def test_one_event_far_in_the_future_does_not_stop_the_grid() -> None:
    grid = grid_at(NOW)
    assert seconds(grid.on_event(NOW + 3600 * SECOND, NOW + SECOND // 2)) == []
    assert at(grid, 1.5) == [0, 1]
    assert at(grid, 2.5) == [2]


def test_one_event_far_in_the_past_does_not_stop_the_grid() -> None:
    grid = grid_at(NOW)
    assert seconds(grid.on_event(NOW - 3600 * SECOND, NOW + SECOND // 2)) == []
    assert at(grid, 1.5) == [0, 1]


def test_a_first_event_that_was_far_out_costs_two_events() -> None:
    grid = SnapshotGrid(SECOND)
    assert seconds(grid.on_event(NOW + 3600 * SECOND, NOW)) == []
    assert at(grid, 0.1) == []
    assert at(grid, 0.2) == []
    assert at(grid, 1.5) == [1]


def test_a_clock_that_moved_begins_the_grid_anew() -> None:
    grid = grid_at(NOW)
    for n in (1, 2):
        assert seconds(grid.on_event(NOW + 3600 * SECOND + n, NOW + n)) == []
    assert seconds(grid.on_event(NOW + 3601 * SECOND + 1, NOW + SECOND)) == [3601]


def test_our_own_clock_may_be_wrong_as_long_as_it_is_steady() -> None:
    grid = SnapshotGrid(SECOND)
    off = 5 * 86_400 * SECOND
    for step in range(10):
        ts = NOW + step * SECOND
        due = grid.on_event(ts + 1, ts - off)
        assert seconds(due) == ([step] if step else [])


def test_events_held_up_together_still_count_one_by_one() -> None:
    grid = grid_at(NOW)
    late = NOW + 40 * SECOND
    assert seconds(grid.on_event(NOW + 35 * SECOND + 1, late)) == list(range(36))
    assert seconds(grid.on_event(NOW + 36 * SECOND + 1, late)) == [36]


def test_an_event_that_comes_after_its_row_was_written_does_not_bring_the_row_again() -> None:
    grid = grid_at(NOW)
    assert idle(grid, 5) == [0, 1, 2, 3]
    assert at(grid, 1.5) == []
    assert at(grid, 4.5) == [4]


def test_one_event_held_up_does_not_make_the_next_look_early() -> None:
    grid = grid_at(NOW)
    assert seconds(grid.on_event(NOW + SECOND // 2, NOW + 30 * SECOND)) == [0]
    assert at(grid, 31.5) == list(range(1, 32))


EVENTS = st.lists(st.integers(0, 90 * SECOND), min_size=2, max_size=30).map(sorted)


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(events=EVENTS, start=st.integers(0, 28), idles=st.sets(st.integers(0, 28)))
def test_two_processes_and_a_replay_have_the_same_rows(
    events: list[int], start: int, idles: set[int]
) -> None:
    """Rows are (instant, number of the event they come after)."""

    def rows(first: int, idle_after: set[int]) -> dict[int, int]:
        grid = SnapshotGrid(SECOND // 2)
        found: dict[int, int] = {}
        for number, event in enumerate(events):
            if number < first:
                continue
            for instant in grid.on_event(NOW + event, NOW + event):
                assert instant not in found
                found[instant] = number - 1
            if number in idle_after and number + 1 < len(events):
                # All that is delivered is the event to come, less what holds for it.
                for instant in grid.flush_idle(NOW + events[number + 1] - 1):
                    assert instant not in found
                    found[instant] = number
        return found

    whole = rows(0, set())
    live = rows(0, idles)
    late = rows(start, idles)
    assert live == whole
    assert late.items() <= whole.items()
    for instant, number in whole.items():
        last = max(i for i, event in enumerate(events) if NOW + event <= instant)
        assert number == last
        assert instant - (NOW + events[number]) <= QUIET_US
