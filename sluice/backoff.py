"""How long to wait before trying again."""

import random


class Backoff:
    """Delays that double from `first` to `most` seconds, each drawn from its upper half.

    The draw keeps many clients of one server from coming back at the same instant.
    """

    def __init__(self, first: float = 0.1, most: float = 30.0) -> None:
        self._first = first
        self._most = most
        self._failures = 0

    @property
    def failures(self) -> int:
        """How many delays were taken since the last reset."""
        return self._failures

    def next_delay(self) -> float:
        """Give the next delay in seconds."""
        ceiling: float = min(self._most, self._first * 2 ** min(self._failures, 32))
        self._failures += 1
        return ceiling * random.uniform(0.5, 1.0)  # noqa: S311  # no secret depends on it

    def reset(self) -> None:
        """Begin anew: the last attempt worked."""
        self._failures = 0
