"""The exchange without its sockets: symbols, what they published, who hears it, what goes wrong."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple, TextIO

from sluice.simulator.config import SimulatorConfig
from sluice.simulator.faults import Faults
from sluice.simulator.feed import Feed
from sluice.simulator.hub import Hub, Subscriber
from sluice.simulator.market import Instrument
from sluice.simulator.tape import Tape

REQUESTS = 10_000  # answered requests that are remembered


class Request(NamedTuple):
    """A REST request that was answered, at `time` (exchange time, milliseconds)."""

    time: int
    path: str
    status: int


class Exchange:
    """Everything that is one for all connections."""

    def __init__(self, config: SimulatorConfig) -> None:
        self.config = config
        self.instruments: dict[str, Instrument] = {}
        self.tapes: dict[str, Tape] = {}
        self.feeds: dict[str, Feed] = {}
        self.faults = Faults(config.fault_seed, config.fault_rates, now=self.now, log=self.log)
        self.hub = Hub(self.faults)
        self.hidden: dict[str, set[int]] = {}  # trade ids by symbol that REST does not serve
        self.retired: dict[str, set[int]] = {}  # likewise, but served within aggregates
        self.requests: deque[Request] = deque(maxlen=REQUESTS)
        self.skew = 0  # milliseconds between the printed clock and the true one
        self.rate = config.rate
        self.is_running = asyncio.Event()
        self.snapshot_asked: dict[str, asyncio.Event] = {}
        self._clock: int | None = None
        self._log_file: TextIO | None = None
        if not config.is_paused:
            self.is_running.set()

    def now(self) -> int:
        """Exchange time in milliseconds: the wall clock's, or the recording's."""
        return self.true_now() + self.skew

    def true_now(self) -> int:
        """Exchange time without the skew."""
        return time.time_ns() // 1_000_000 if self._clock is None else self._clock

    def set_clock(self, now: int) -> None:
        """Follow the clock of a recording instead of the wall clock."""
        self._clock = now

    def list_symbol(self, facts: Instrument, *, has_own_diffs: bool = False) -> Feed:
        """Open a symbol."""
        tape = Tape(facts.symbol)
        feed = Feed(tape, self.hub, has_own_diffs=has_own_diffs)
        self.instruments[facts.symbol] = facts
        self.tapes[facts.symbol] = tape
        self.feeds[facts.symbol] = feed
        self.snapshot_asked[facts.symbol] = asyncio.Event()
        return feed

    def subscribe(self, stream: str, subscriber: Subscriber) -> None:
        """Send a stream to a subscriber from now on."""
        self.hub.subscribe(stream, subscriber)
        name, _, kind = stream.partition("@")
        if kind.startswith("depth") and name.upper() in self.feeds:
            self.feeds[name.upper()].listened()

    def knows(self, stream: str) -> bool:
        """Whether a stream is of a symbol that is listed."""
        return stream.startswith("!") or stream.partition("@")[0].upper() in self.tapes

    def skew_clock(self, skew: int) -> None:
        """Print times that are off by `skew` milliseconds from now on."""
        self.skew = skew
        for feed in self.feeds.values():
            feed.skew = skew
        self.faults.record("skew", milliseconds=skew)

    def retire(self, symbol: str, ids: list[int]) -> None:
        """Let REST serve these trades within aggregates only."""
        self.retired.setdefault(symbol, set()).update(ids)
        self.faults.record("retire", symbol=symbol, trade_ids=ids)

    def hide(self, symbol: str, ids: list[int]) -> None:
        """Let REST serve these trades no more, nor aggregates that hold one of them."""
        self.hidden.setdefault(symbol, set()).update(ids)
        self.faults.record("hide", symbol=symbol, trade_ids=ids)

    async def ready(self) -> None:
        """Wait until the streams of `start_when` are subscribed and the source may run."""
        while not all(self.hub.wants(stream) for stream in self.config.start_when):  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.02)
        await self.is_running.wait()

    def open_log(self) -> None:
        """Begin the JSON-lines log, where one is configured."""
        if self.config.log is not None:
            self._log_file = self.config.log.open("a", encoding="utf-8", buffering=1)

    def close_log(self) -> None:
        """End the log."""
        if self._log_file is not None:
            self._log_file.close()
            self._log_file = None

    def log(self, event: str, **fields: object) -> None:
        """Write one line: wall time, exchange time, what happened."""
        if self._log_file is not None:
            line: Mapping[str, object] = {
                "at": time.time(),
                "now": self.now(),
                "event": event,
                **fields,
            }
            self._log_file.write(json.dumps(line) + "\n")
