"""The recorded source: plays captured traffic through the same sockets and REST.

A line is `<timestamp> <raw JSON>`; the timestamp has 16 digits (microseconds) or 19 (nanoseconds).
The JSON is a combined-stream message, or a bare REST snapshot of the file's symbol. Files of one
symbol form one chain. Diffs, trades and best quotes are sent as recorded, byte for byte; what a
recording lacks (klines, tickers, slow diffs) is made from them.
"""

import asyncio
import gzip
import heapq
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import msgspec

from sluice.simulator.exchange import Exchange
from sluice.simulator.fixed import parse
from sluice.simulator.market import Change, instrument
from sluice.simulator.tape import Levels, Trade

LINES_PER_TURN = 200
HIGH_WATER = 1 << 18  # bytes that the slowest reader may owe before the source waits for it
LATE_MS = 1_000  # trades may trail other messages by this much; bars close after it
TICK = 0.01  # seconds; what is due within one is sent together
_NANOSECOND_DIGITS = 19
_BEST_QUOTES = b'{"u":'  # the one payload without an event type


class Line(NamedTuple):
    """One line, with its timestamp in microseconds; `payload` is the message within."""

    time_us: int
    symbol: str
    stream: str
    payload: bytes


def read_lines(path: Path, symbol: str = "") -> Iterator[Line]:
    """Read one file; a snapshot has an empty `stream` and bears the file's `symbol`."""
    with path.open("rb") as raw:
        is_packed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rb") if is_packed else path.open("rb") as file:
        for row in file:
            stamp, _, text = row.strip().partition(b" ")
            time_us = int(stamp) // (1_000 if len(stamp) == _NANOSECOND_DIGITS else 1)
            if text.startswith(b'{"stream":"'):
                head, _, payload = text.partition(b'"data":')
                stream = head[len(b'{"stream":"') :].partition(b'"')[0].decode()
                yield Line(time_us, stream.partition("@")[0].upper(), stream, payload[:-1])
            else:
                yield Line(time_us, symbol, "", text)


@dataclass(frozen=True, slots=True)
class Chain:
    """The files of one symbol, in order of time."""

    symbol: str
    paths: tuple[Path, ...]

    def lines(self) -> Iterator[Line]:
        """Read all files, one after another."""
        for path in self.paths:
            yield from read_lines(path, self.symbol)

    def snapshot(self) -> Levels | None:
        """Find the first whole book."""
        for line in self.lines():
            if not line.stream:
                body = json.loads(line.payload)
                return Levels(
                    body["lastUpdateId"],
                    {parse(price): parse(size) for price, size in body["bids"]},
                    {parse(price): parse(size) for price, size in body["asks"]},
                )
        return None


def chains(paths: tuple[Path, ...]) -> list[Chain]:
    """Sort files into chains, by the symbol and the time that their lines say."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in paths:
        first = next(line for line in read_lines(path) if line.stream)
        found.setdefault(first.symbol, []).append((first.time_us, path))
    return [
        Chain(symbol, tuple(path for _, path in sorted(files)))
        for symbol, files in sorted(found.items())
    ]


class RecordingSource:
    """Plays chains, merged by their timestamps, at the configured speed."""

    def __init__(self, exchange: Exchange) -> None:
        self.state = "waiting"
        self.finished = asyncio.Event()
        self._exchange = exchange
        self._chains = chains(exchange.config.recordings)
        self._began = 0.0  # when the first line was due
        self._held = {
            stream.partition("@")[0].upper()
            for stream in exchange.config.start_when
            if "@depth" in stream
        }
        first_us = min(next(chain.lines()).time_us for chain in self._chains)
        exchange.set_clock(first_us // 1000)
        for chain in self._chains:
            self._open(chain)

    async def run(self) -> None:
        """Play to the end; then only what was published is served."""
        exchange = self._exchange
        speed = exchange.config.speed
        await exchange.ready()
        self.state = "playing"
        self._began, first_us = time.monotonic(), 0
        lines = heapq.merge(*(chain.lines() for chain in self._chains), key=lambda row: row.time_us)
        for number, line in enumerate(lines):
            first_us = first_us or line.time_us
            if speed:
                due = self._began + (line.time_us - first_us) / 1e6 / speed
                while (wait := due - time.monotonic()) > TICK:
                    await asyncio.sleep(min(wait, 0.1))
                    await self._pause()
                    due = self._began + (line.time_us - first_us) / 1e6 / speed
            if number % LINES_PER_TURN == 0:
                await self._drained()
                await self._pause()
            await self._apply(line)
        for feed in exchange.feeds.values():
            feed.settle()
        await self._drained()
        self.state = "finished"
        self.finished.set()
        exchange.log("finished")

    async def _pause(self) -> None:
        if self._exchange.is_running.is_set():
            return
        self.state = "stopped"
        waited = time.monotonic()
        await self._exchange.is_running.wait()
        self._began += time.monotonic() - waited
        self.state = "playing"

    def _open(self, chain: Chain) -> None:
        snapshot = chain.snapshot() or Levels(0, {}, {})
        prices = [*snapshot.bids, *snapshot.asks]
        sizes = [*snapshot.bids.values(), *snapshot.asks.values()]
        facts = replace(
            instrument(chain.symbol), tick=math.gcd(*prices) or 1, step=math.gcd(*sizes) or 1
        )
        feed = self._exchange.list_symbol(facts, has_own_diffs=True)
        feed.tape.book.load(
            snapshot.update_id,
            [
                Change(is_bid, price, size)
                for is_bid, side in ((True, snapshot.bids), (False, snapshot.asks))
                for price, size in side.items()
            ],
        )
        feed.start(next(chain.lines()).time_us // 1000)

    async def _apply(self, line: Line) -> None:
        if not line.stream:
            return
        feed = self._exchange.feeds[line.symbol]
        if line.payload.startswith(_BEST_QUOTES):
            feed.quote(line.payload)
            return
        message = msgspec.json.decode(line.payload)
        event = message["e"]
        now = message["E"]
        if now > self._exchange.true_now():
            self._exchange.set_clock(now)
        feed.advance(now - LATE_MS)
        if event == "trade":
            trade = Trade(
                message["t"], parse(message["p"]), parse(message["q"]), message["T"], message["m"]
            )
            feed.trade(trade, message["T"], line.payload)
        elif event == "depthUpdate":
            feed.diff(message["U"], line.payload)
            if message["u"] > feed.tape.book.update_id:
                await self._hold(line.symbol)
                feed.change((message["U"], message["u"]), _changes(message))

    async def _hold(self, symbol: str) -> None:
        """Wait, at the first diff past the recorded snapshot, until that snapshot was asked for.

        A client buffers a diff before it asks. Were the replay to run on until then, the recorded
        snapshot would be gone, and with it the levels that it alone has.
        """
        if symbol not in self._held:
            return
        self._held.discard(symbol)
        self.state = f"waiting for a snapshot of {symbol} to be asked for"
        waited = time.monotonic()
        await self._exchange.snapshot_asked[symbol].wait()
        self._began += time.monotonic() - waited
        self.state = "playing"

    async def _drained(self) -> None:
        await asyncio.sleep(0)
        while self._exchange.hub.backlog() > HIGH_WATER:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.002)


def _changes(message: dict[str, list[tuple[str, str]]]) -> list[Change]:
    return [
        Change(is_bid, parse(price), parse(size))
        for is_bid, side in ((True, "b"), (False, "a"))
        for price, size in message[side]
    ]
