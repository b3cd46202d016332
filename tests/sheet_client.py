"""A client of Binance spot that follows the protocol sheet to the letter, and nothing else.

It shares no code with the adapters: where the simulator and an adapter made the same mistake,
this client would not. It keeps the books of section 6 and the trades of section 7 in memory.
"""

import asyncio
import contextlib
import json
import random
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Self

import aiohttp
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, WebSocketException

REST_TIMEOUT = 4.0
MAX_BUFFERED = 5_000


class MalformedError(ValueError):
    """A message that is not what the sheet prints."""


class GapError(Exception):
    """An event that does not continue the book."""


def positive(text: object) -> Decimal:
    number = not_negative(text)
    if not number:
        raise MalformedError(text)
    return number


def not_negative(text: object) -> Decimal:
    if not isinstance(text, str) or len(text) > 40:
        raise MalformedError(str(text)[:40])
    try:
        number = Decimal(text)
    except InvalidOperation as error:
        raise MalformedError(text) from error
    if not number.is_finite() or number < 0:
        raise MalformedError(text)
    return number


def integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise MalformedError(str(value)[:40])
    return value


def levels(rows: object) -> list[tuple[Decimal, Decimal]]:
    if not isinstance(rows, list):
        raise MalformedError(str(rows)[:40])
    return [(positive(price), not_negative(size)) for price, size in rows]


@dataclass(frozen=True)
class Diff:
    first: int
    last: int
    bids: list[tuple[Decimal, Decimal]]
    asks: list[tuple[Decimal, Decimal]]


@dataclass
class SheetBook:
    """Section 6: buffer, snapshot, drop, replay, live."""

    update_id: int = 0
    is_live: bool = False
    bids: dict[Decimal, Decimal] = field(default_factory=dict)
    asks: dict[Decimal, Decimal] = field(default_factory=dict)
    buffer: list[Diff] = field(default_factory=list)
    resyncs: int = 0
    applied: int = 0

    def discard(self) -> None:
        self.is_live = False
        self.bids, self.asks = {}, {}
        self.buffer.clear()
        self.resyncs += 1

    def take(self, diff: Diff) -> None:
        if self.is_live:
            self._apply(diff)
        else:
            self.buffer.append(diff)
            del self.buffer[:-MAX_BUFFERED]

    def load(self, snapshot: dict) -> bool:
        """Begin from a snapshot; says whether it was new enough."""
        update_id = integer(snapshot["lastUpdateId"])
        if self.buffer and update_id < self.buffer[0].first - 1:
            return False
        self.update_id = update_id
        self.bids = dict(levels(snapshot["bids"]))
        self.asks = dict(levels(snapshot["asks"]))
        self.is_live = True
        buffered, self.buffer = self.buffer, []
        for diff in buffered:
            self._apply(diff)
        return True

    def _apply(self, diff: Diff) -> None:
        if diff.last <= self.update_id:
            return
        if diff.first > self.update_id + 1:
            raise GapError(f"{self.update_id} -> {diff.first}")
        for side, rows in ((self.bids, diff.bids), (self.asks, diff.asks)):
            for price, size in rows:
                if size:
                    side[price] = size
                else:
                    side.pop(price, None)
        self.update_id = diff.last
        self.applied += 1
        if self.bids and self.asks and max(self.bids) >= min(self.asks):
            raise GapError("crossed")


@dataclass
class SheetTrades:
    """Section 7: ids that go up by one, and what is missing of them."""

    rows: dict[int, tuple[Decimal, Decimal, int, bool]] = field(default_factory=dict)
    missing: set[int] = field(default_factory=set)
    absent: set[int] = field(default_factory=set)
    newest: int | None = None
    seen_again: int = 0

    def take(self, trade_id: int, row: tuple[Decimal, Decimal, int, bool]) -> None:
        if trade_id in self.rows:
            assert self.rows[trade_id] == row, (trade_id, row, self.rows[trade_id])
            self.seen_again += 1
            return
        self.rows[trade_id] = row
        self.missing.discard(trade_id)
        if self.newest is None:
            self.newest = trade_id
        elif trade_id > self.newest:
            self.missing.update(range(self.newest + 1, trade_id))
            self.newest = trade_id


class SheetClient:
    """`async with SheetClient(ws_url, url, symbols) as client`: runs until it is left.

    `silence` is how long all streams may be quiet before the socket is taken for dead.
    """

    def __init__(
        self, ws_url: str, rest_url: str, symbols: list[str], *, silence: float = 3.0
    ) -> None:
        self.ws_url = ws_url
        self.rest_url = rest_url
        self.silence = silence
        self.books = {symbol: SheetBook() for symbol in symbols}
        self.trades = {symbol: SheetTrades() for symbol in symbols}
        self.connects = 0
        self.malformed = 0
        self.unknown = 0
        self.refused_until = 0.0
        self._stale: asyncio.Queue[str] = asyncio.Queue()
        self._tasks: list[asyncio.Task] = []
        self._http: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=REST_TIMEOUT)
        self._http = aiohttp.ClientSession(timeout=timeout)
        self._tasks = [
            asyncio.create_task(self._listen()),
            asyncio.create_task(self._load_snapshots()),
            asyncio.create_task(self._backfill()),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        ends = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.close()
        for end in ends:
            assert isinstance(end, asyncio.CancelledError), end

    # -- the socket

    async def _listen(self) -> None:
        names = [
            f"{symbol.lower()}@{kind}" for symbol in self.books for kind in ("trade", "depth@100ms")
        ]
        delay = 0.05
        while True:
            with contextlib.suppress(OSError, WebSocketException, InvalidHandshake, TimeoutError):
                async with connect(
                    f"{self.ws_url}/stream", ping_interval=None, close_timeout=0.2, open_timeout=5
                ) as socket:
                    self.connects += 1
                    for symbol, book in self.books.items():
                        book.discard()
                        self._stale.put_nowait(symbol)
                    await socket.send(
                        json.dumps({"method": "SUBSCRIBE", "params": names, "id": self.connects})
                    )
                    while True:
                        # Not wait_for: in Python 3.11 it swallows a cancel at its deadline.
                        async with asyncio.timeout(self.silence):
                            frame = await socket.recv()
                        delay = 0.05
                        self._frame(frame)
            await asyncio.sleep(delay * (0.5 + random.random()))
            delay = min(1.0, delay * 2)

    def _frame(self, frame: str | bytes) -> None:
        try:
            self._message(frame)
        except (MalformedError, ValueError, TypeError, KeyError, RecursionError):
            self.malformed += 1

    def _message(self, frame: str | bytes) -> None:
        if isinstance(frame, bytes):
            raise MalformedError("binary")
        message = json.loads(frame)
        if "error" in message or "code" in message:
            raise WebSocketException("refused")
        if "result" in message:
            return
        stream, data = message["stream"], message["data"]
        symbol = stream.partition("@")[0].upper()
        event = data.get("e")
        if event == "trade":
            row = (positive(data["p"]), positive(data["q"]), integer(data["T"]), data["m"] is True)
            self.trades[symbol].take(integer(data["t"]), row)
        elif event == "depthUpdate":
            diff = Diff(
                integer(data["U"]), integer(data["u"]), levels(data["b"]), levels(data["a"])
            )
            try:
                self.books[symbol].take(diff)
            except GapError:
                self._resync(symbol)
        else:
            self.unknown += 1

    def _resync(self, symbol: str) -> None:
        self.books[symbol].discard()
        self._stale.put_nowait(symbol)

    # -- REST

    async def _get(self, path: str, **params: object) -> object:
        """Ask until a good answer comes, as section 5 says."""
        delay = 0.05
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(max(0.0, self.refused_until - loop.time()))
            try:
                query = {name: str(value) for name, value in params.items()}
                async with self._http.get(f"{self.rest_url}/api/v3/{path}", params=query) as answer:
                    if answer.status in {429, 418}:
                        self.refused_until = loop.time() + int(answer.headers["Retry-After"])
                        continue
                    if answer.status == 200 and answer.content_type == "application/json":
                        return json.loads(await answer.text())
            except (aiohttp.ClientError, TimeoutError, ValueError):
                pass
            await asyncio.sleep(delay)
            delay = min(1.0, delay * 2)

    async def _load_snapshots(self) -> None:
        while True:
            symbol = await self._stale.get()
            book = self.books[symbol]
            delay = 0.05
            while not book.is_live:
                if book.buffer:  # step 1 comes before step 2
                    snapshot = await self._get("depth", symbol=symbol, limit=5000)
                    try:
                        if not book.is_live and book.load(snapshot):
                            break
                    except GapError:
                        book.discard()
                await asyncio.sleep(delay)
                delay = min(1.0, delay * 2)

    async def _backfill(self) -> None:
        while True:
            for symbol, trades in self.trades.items():
                if trades.missing:
                    await self._fetch(symbol, min(trades.missing))
            await asyncio.sleep(0.05)

    async def _fetch(self, symbol: str, from_id: int) -> int:
        """Take one page in; gives how many of its ids were of use."""
        trades = self.trades[symbol]
        page = await self._get("historicalTrades", symbol=symbol, fromId=from_id, limit=1000)
        useful = [row for row in page if row["id"] >= from_id]
        if useful:
            # The exchange answers, and has no such id: the next higher one says so.
            trades.absent.update(trades.missing & set(range(from_id, useful[0]["id"])))
            trades.missing.difference_update(trades.absent)
        for row in useful:
            trades.take(
                integer(row["id"]),
                (positive(row["price"]), positive(row["qty"]), row["time"], row["isBuyerMaker"]),
            )
        return len(useful)

    async def reach(self, symbol: str, last_id: int) -> None:
        """Page until `last_id` is held or known to be absent, and nothing is missing."""
        trades = self.trades[symbol]
        while trades.missing or (trades.newest or 0) < last_id:
            if trades.newest is not None and not trades.missing:
                await self._fetch(symbol, trades.newest + 1)
            await asyncio.sleep(0.05)
