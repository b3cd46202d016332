"""The one place that reads the wall clock."""

import time

MICROS_PER_SECOND = 1_000_000


def now_micros() -> int:
    """Give the time since the epoch in microseconds, by this machine's clock."""
    return time.time_ns() // 1_000
