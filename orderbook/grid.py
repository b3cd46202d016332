"""Which instants of a grid in exchange time a book has just passed.

The row of an instant t is the book after the last event with E <= t. It is due at the first event
past t, or once the feed is known to have nothing older than t to bring, two seconds after it. So
which rows there are, and what is in them, follows from the exchange's times alone: two processes
side by side, and a replay, write the same ones.

A book that does not change is true at every instant, but rows end 60 s after its last event, in
every process alike, until the next event: an hour of silence says nothing in 36,000 rows that the
last of them does not say.

An event's time may run back a little, and then counts as the time before it. One that is out of
step by ten seconds (behind the events before it, or ahead of what the arrival of all events so far
allows) does not count at all, so that one wrong clock cannot stop the grid; two such in a row mean
that the clock did move, and the grid begins anew at the second.
"""

from typing import Final

IDLE_US: Final = 2_000_000
"""How long after an instant a quiet book's row is due."""
QUIET_US: Final = 60_000_000
"""For how long after its last event a book has rows."""
OUT_OF_STEP_US: Final = 10_000_000
_NONE: Final = range(0)


class SnapshotGrid:
    """The grid of one book: instants are the multiples of the interval since the epoch.

    All times are microseconds; `ts_event` is the exchange's clock, `ts_recv` any steady clock.
    """

    def __init__(self, interval_us: int) -> None:
        self._interval = interval_us
        self._last: int | None = None
        self._due = 0
        self._most_ahead = 0
        self._was_out_of_step = False

    def restart(self) -> None:
        """Note that the book is not live: what lies before its next event is not known."""
        self._last = None
        self._was_out_of_step = False

    def on_event(self, ts_event: int, ts_recv: int) -> range:
        """Give the instants that are due before an event is applied to the book."""
        ahead = ts_event - ts_recv
        last = self._last
        if last is None:
            self._begin(ts_event, ahead)
            return _NONE
        if ts_event < last - OUT_OF_STEP_US or ahead > self._most_ahead + OUT_OF_STEP_US:
            if self._was_out_of_step:
                self._begin(ts_event, ahead)
            else:
                self._was_out_of_step = True
            return _NONE
        self._was_out_of_step = False
        self._most_ahead = max(self._most_ahead, ahead)
        due = self._until(min(ts_event - 1, last + QUIET_US))
        self._last = max(last, ts_event)
        self._due = max(self._due, self._ceil(self._last))
        return due

    def flush_idle(self, now_us: int) -> range:
        """Give the instants that are due without an event, two seconds or more before now.

        `now_us` is the exchange's time up to which the feed is known to have delivered everything:
        that of the newest event of any market on the same socket, or of a ping it answered.
        """
        if self._last is None:
            return _NONE
        return self._until(min(now_us - IDLE_US, self._last + QUIET_US))

    def _begin(self, ts_event: int, ahead: int) -> None:
        self._last = ts_event
        self._due = self._ceil(ts_event)
        self._most_ahead = ahead
        self._was_out_of_step = False

    def _until(self, end: int) -> range:
        """Give the instants not yet given up to and including `end`."""
        due = range(self._due, end + 1, self._interval)
        self._due += len(due) * self._interval
        return due

    def _ceil(self, ts: int) -> int:
        return -(-ts // self._interval) * self._interval
