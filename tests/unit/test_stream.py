"""When a socket is asked whether it is there, and when it is renewed."""

import datetime as dt
from typing import Any, cast

import pytest

from sluice.stream import LEAST_SILENCE_SECONDS, MOST_SILENCE_SECONDS, _Session, seconds_until

TIMES = [dt.time(3, 0), dt.time(15, 0)]


@pytest.mark.parametrize(
    ("hour", "minute", "seconds"),
    [(2, 59, 60), (3, 0, 0), (3, 1, 12 * 3600 - 60), (14, 0, 3600), (23, 0, 4 * 3600)],
)
def test_the_next_of_several_times_of_day(hour: int, minute: int, seconds: float) -> None:
    now = dt.datetime(2026, 11, 28, hour, minute, tzinfo=dt.UTC)
    assert seconds_until(TIMES, now) == seconds


@pytest.mark.parametrize(
    ("frames", "age", "silence"),
    [
        (0, 0.0, LEAST_SILENCE_SECONDS),
        (1000, 100.0, LEAST_SILENCE_SECONDS),
        (50, 100.0, 10.0),
        (2, 100.0, MOST_SILENCE_SECONDS),
    ],
)
def test_a_busy_socket_is_asked_sooner(frames: int, age: float, silence: float) -> None:
    session = _Session(cast("Any", None), opened=10.0, frames=frames, last=10.0 + age)
    assert session.silence == silence
