"""A recording played to a service in place of its sockets, as fast as its records are stored.

`python -m collector.replay` and `python -m orderbook.replay` read the same files side by side, each
taking what is its own. Every time is the recording's, so what they push follows from the files.
"""

import argparse
import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from sluice.exchanges import EXCHANGES
from sluice.publisher import Publisher
from sluice.queue import find_queues
from sluice.recording import BadRecordingError, Line, Tape
from sluice.records import KINDS
from sluice.settings import BadSettingsError

LINES_PER_TURN: Final = 200
MOST_IN_MEMORY: Final = 5_000
MOST_QUEUED: Final = 50_000
"""Records that may wait before the tape does: Redis must not fill up while the database lags."""
LOOK_SECONDS: Final = 0.02


@dataclass(frozen=True)
class Replay:
    """What is played: a tape, which of its markets (none named: all), and how fast (0: any)."""

    tape: Tape
    symbols: frozenset[str]
    speed: float

    def takes(self, symbol: str) -> bool:
        """Tell whether a market is one that is wanted."""
        return not self.symbols or symbol in self.symbols

    async def lines(
        self, publisher: Publisher, redis: Redis, stop: asyncio.Event
    ) -> AsyncGenerator[Line]:
        """Give each line when it is due and there is room for what it holds, until `stop`.

        Raises:
            BadSettingsError: a file is no recording, or can not be read.
        """
        began, first = time.monotonic(), None
        tape = iter(self.tape)
        for number in range(2**63):
            try:
                line = next(tape, None)
            except (BadRecordingError, OSError) as error:
                raise BadSettingsError(str(error)) from error
            if line is None or stop.is_set():
                return
            if self.speed:
                first = line.ts_recv if first is None else first
                await _until(began + (line.ts_recv - first) / 1e6 / self.speed, stop)
            if number % LINES_PER_TURN == 0:
                await asyncio.sleep(0)
                while not stop.is_set() and not await _has_room(publisher, redis):  # noqa: ASYNC110  # Redis sends no event
                    await asyncio.sleep(LOOK_SECONDS)
            yield line


def parse_arguments() -> Replay:
    """Read the command line that `sluice replay` gives a service; raises BadRecordingError."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exchange", choices=EXCHANGES, required=True)
    parser.add_argument("--symbol", action="append", default=[])
    parser.add_argument("--speed", type=float, default=0.0)
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    tape = Tape.of(EXCHANGES[options.exchange], options.files)
    return Replay(tape, frozenset(options.symbol), options.speed)


async def emptied(publisher: Publisher, stop: asyncio.Event) -> None:
    """Wait until everything that was put is in Redis, or `stop`."""
    while not stop.is_set() and (publisher.in_memory or publisher.spool_records):  # noqa: ASYNC110  # as above
        await asyncio.sleep(LOOK_SECONDS)


async def _until(due: float, stop: asyncio.Event) -> None:
    if (wait := due - time.monotonic()) > LOOK_SECONDS:
        with suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await stop.wait()


async def _has_room(publisher: Publisher, redis: Redis) -> bool:
    if publisher.in_memory > MOST_IN_MEMORY or publisher.spool_records:
        return False
    if sum(publisher.lengths.values()) <= MOST_QUEUED:
        return True
    try:
        lengths = {q.name: await q.length() for q in await find_queues(redis, KINDS)}
    except (RedisError, OSError):
        return False
    if sum(lengths.values()) > MOST_QUEUED:
        return False
    publisher.lengths.update(lengths)
    return True
