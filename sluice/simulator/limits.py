"""The exchange's patience: request weight by minute, bans, connection attempts."""

import time
from collections import deque
from typing import NamedTuple

from sluice.simulator.config import SimulatorConfig

TOO_MUCH = (
    "Too much request weight used; current limit is {limit} request weight per 1 MINUTE. "
    "Please use WebSocket Streams for live updates to avoid polling the API."
)
BANNED = (
    "Way too much request weight used; IP banned until {until}. "
    "Please use WebSocket Streams for live updates to avoid bans."
)


class Refusal(NamedTuple):
    """An answer of 429 or 418; `retry_after` in seconds."""

    status: int
    retry_after: int
    message: str


class WeightLimiter:
    """One address's request weight in fixed windows; further requests after a 429 earn a ban."""

    def __init__(self, config: SimulatorConfig) -> None:
        self._config = config
        self._window = 0
        self._refused = 0
        self._banned_until = 0.0
        self._bans = 0
        self.used = 0

    def take(self, weight: int) -> Refusal | None:
        """Count a request; gives the refusal it earns, if any."""
        now = time.time()
        if now < self._banned_until:
            return self._ban_notice(now)
        window = int(now / self._config.weight_window)
        if window != self._window:
            self._window, self.used, self._refused = window, 0, 0
        self.used += weight
        if self.used <= self._config.max_weight:
            return None
        self._refused += 1
        if self._refused > self._config.refusals_before_ban:
            return self.ban(self._config.ban * 2**self._bans)
        ends = (window + 1) * self._config.weight_window
        return Refusal(429, int(ends - now) + 1, TOO_MUCH.format(limit=self._config.max_weight))

    def ban(self, seconds: float) -> Refusal:
        """Refuse everything for this long, with 418."""
        now = time.time()
        self._bans += 1
        self._banned_until = now + seconds
        return self._ban_notice(now)

    def pardon(self) -> None:
        """End a ban and forget what was used."""
        self._banned_until = 0.0
        self.used = self._refused = 0

    def _ban_notice(self, now: float) -> Refusal:
        until = self._banned_until
        return Refusal(418, int(until - now) + 1, BANNED.format(until=int(until * 1000)))


class ConnectLimiter:
    """How many sockets an address may open in a sliding window."""

    def __init__(self, config: SimulatorConfig) -> None:
        self._config = config
        self._opened: deque[float] = deque()

    def is_over(self) -> bool:
        """Count one attempt, and say whether it is one too many."""
        now = time.monotonic()
        while self._opened and self._opened[0] <= now - self._config.connect_window:
            self._opened.popleft()
        self._opened.append(now)
        return len(self._opened) > self._config.max_connects
