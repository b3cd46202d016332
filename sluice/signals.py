"""A stop that comes while a process still imports its modules."""

import signal
import sys
from types import FrameType


def end_cleanly_when_told() -> None:
    """Exit with 0 at SIGTERM or SIGINT, until the loop takes them: nothing has been begun."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)


def _end(_: int, __: FrameType | None) -> None:
    sys.exit(0)
