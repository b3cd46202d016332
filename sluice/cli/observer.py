"""What a recording looks like from outside: read from Redis and SQL alone."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final

import asyncpg
import msgspec
from redis.exceptions import RedisError

from sluice.connections import connect_postgres, connect_redis
from sluice.presence import Presence, present
from sluice.queue import book_key, find_queues
from sluice.records import KINDS, RejectedRecordError, TooNewError, decode
from sluice.settings import Market, Settings

RATE_SECONDS: Final = 10.0
"""Over how long rates are taken."""

_MARKETS: Final = """
SELECT m.exchange, m.symbol, last.price,
       CASE m.id_kind
           WHEN 'opaque' THEN (
               SELECT count(*) FROM trades
               WHERE market_id = m.market_id AND time > now() - make_interval(secs => $3))
           ELSE coalesce(last.trade_id - recent.first_id + 1, 0)
       END AS trades
FROM markets AS m
LEFT JOIN LATERAL (
    SELECT price, trade_id FROM trades
    WHERE market_id = m.market_id AND time > now() - INTERVAL '1 day'
    ORDER BY time DESC, trade_id DESC LIMIT 1
) AS last ON true
LEFT JOIN LATERAL (
    SELECT first_id FROM trades
    WHERE market_id = m.market_id AND time > now() - make_interval(secs => $3)
    ORDER BY time, trade_id LIMIT 1
) AS recent ON true
WHERE (m.exchange, m.symbol) IN (SELECT * FROM unnest($1::text[], $2::text[]))
"""
"""Two rows of the index a market: a look must cost nothing where thousands of trades come in."""

_GAPS: Final = "SELECT status, count(*) AS number FROM gaps GROUP BY status ORDER BY status"

_SUMMARY: Final = """
SELECT m.exchange || ':' || m.symbol AS market, coalesce(run.trades, 0) AS trades,
       run.first_time, run.last_time,
       CASE WHEN m.id_kind = 'raw' THEN run.last_id - run.first_id + 1 - held.trades END AS missing,
       snapshots.number AS snapshots, klines.number AS klines
FROM markets AS m
CROSS JOIN LATERAL (
    SELECT sum(trade_id - first_id + 1) AS trades, min(first_id) AS first_id,
           max(trade_id) AS last_id, min(time) AS first_time, max(time) AS last_time
    FROM trades WHERE market_id = m.market_id AND time >= $4 AND received_at >= $3
) AS run
CROSS JOIN LATERAL (
    -- Ids that an earlier run stored are not missing.
    SELECT sum(trade_id - t.first_id + 1) AS trades FROM trades AS t
    WHERE market_id = m.market_id AND time >= $4
        AND trade_id BETWEEN run.first_id AND run.last_id
) AS held
CROSS JOIN LATERAL (
    SELECT count(*) AS number FROM orderbook_snapshots
    WHERE market_id = m.market_id AND time >= $4 AND received_at >= $3
) AS snapshots
CROSS JOIN LATERAL (
    SELECT count(*) AS number FROM klines
    WHERE market_id = m.market_id AND time >= $4 AND received_at >= $3
) AS klines
WHERE (m.exchange, m.symbol) IN (SELECT * FROM unnest($1::text[], $2::text[]))
ORDER BY m.exchange, m.symbol
"""
"""Parameters: exchanges, symbols, start of the run, start of what it may have fetched."""


@dataclass(frozen=True)
class MarketState:
    """A market: its last stored price, change since the run began, and its latest live book."""

    market: Market
    price: Decimal | None
    change: Decimal | None
    trades_per_second: float
    bid: Decimal | None
    ask: Decimal | None
    book: str

    @property
    def spread_bps(self) -> Decimal | None:
        """The spread in basis points of the mid."""
        if self.bid is None or self.ask is None:
            return None
        return 20_000 * (self.ask - self.bid) / (self.ask + self.bid)


@dataclass(frozen=True)
class QueueState:
    """A queue: how many records it holds, since when the oldest waits, how many are dead."""

    kind: str
    depth: int
    age: float | None
    dead: int


@dataclass(frozen=True)
class Sample:
    """All there is to see at one moment; `seconds` since the run began."""

    seconds: float
    markets: Sequence[MarketState]
    queues: Sequence[QueueState]
    committed: int
    rows_per_second: float
    processes: Sequence[Presence] = ()
    problem: str = ""

    @property
    def depth(self) -> int:
        """How many records wait in all queues."""
        return sum(queue.depth for queue in self.queues)


class Observer:
    """Looks at one recording, from its start; a server that is away is a sample's `problem`."""

    def __init__(self, settings: Settings, markets: Sequence[Market]) -> None:
        self._settings = settings
        self._markets = markets
        self._redis = connect_redis(settings)
        self._connection: asyncpg.Connection | None = None
        self._began = time.monotonic()
        self._acked_before: dict[str, int] = {}
        self._committed: deque[tuple[float, int]] = deque()
        self._first_prices: dict[Market, Decimal] = {}
        self._last = Sample(0.0, [], [], 0, 0.0)

    async def close(self) -> None:
        """Close the connections."""
        if self._connection is not None:
            self._connection.terminate()
        await self._redis.aclose()

    async def sample(self) -> Sample:
        """Look once."""
        now = time.monotonic() - self._began
        processes: Sequence[Presence] = ()
        try:
            processes = await present(self._redis)
            queues, committed = await self._read_queues()
            books = {market: await self._read_book(market) for market in self._markets}
            prices = await self._read_prices()
        except (OSError, RedisError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            last = self._last
            problem = f"{type(error).__name__}: {error}"
            return Sample(now, last.markets, last.queues, last.committed, 0.0, processes, problem)
        states = []
        for market in self._markets:
            price, rate = prices.get(market, (None, 0.0))
            change = None
            if price is not None:
                change = price / self._first_prices.setdefault(market, price) - 1
            states.append(MarketState(market, price, change, rate, *books[market]))
        rate = self._rate(now, committed)
        self._last = Sample(now, states, queues, committed, rate, processes)
        return self._last

    async def queue_depths(self) -> dict[str, int]:
        """Give the length of every queue; raises what Redis' client raises."""
        queues = await find_queues(self._redis, KINDS)
        return {queue.name: await queue.length() for queue in queues}

    async def gap_counts(self) -> dict[str, int]:
        """Give how many gaps there are by status; none where the database can not be asked."""
        try:
            connection = await self._connected()
            return {row["status"]: row["number"] for row in await connection.fetch(_GAPS)}
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return {}

    async def _connected(self) -> asyncpg.Connection:
        if self._connection is None or self._connection.is_closed():
            self._connection = await connect_postgres(self._settings, command_timeout=10)
        return self._connection

    def _rate(self, now: float, committed: int) -> float:
        self._committed.append((now, committed))
        while now - self._committed[0][0] > RATE_SECONDS:
            self._committed.popleft()
        then, before = self._committed[0]
        return (committed - before) / (now - then) if now > then else 0.0

    async def _read_queues(self) -> tuple[list[QueueState], int]:
        states = []
        committed = 0
        for queue in await find_queues(self._redis, KINDS):
            balance = await queue.balance()
            committed += balance.acked - self._acked_before.setdefault(queue.name, balance.acked)
            age = _age(queue.kind, await queue.head_item()) if balance.length else None
            states.append(QueueState(queue.name, balance.length, age, balance.dead))
        return states, committed

    async def _read_book(self, market: Market) -> tuple[Decimal | None, Decimal | None, str]:
        data, state = await self._redis.hmget(
            book_key(market.exchange, market.symbol), ["data", "state"]
        )
        if not data or not state:
            return None, None, "no book"
        sides = msgspec.json.decode(data)
        bid, ask = (
            Decimal(sides[side][0][0]) if sides[side] else None for side in ("bids", "asks")
        )
        return bid, ask, bytes(state).decode()  # type: ignore[arg-type]  # replies are not decoded

    async def _read_prices(self) -> dict[Market, tuple[Decimal | None, float]]:
        connection = await self._connected()
        rows = await connection.fetch(_MARKETS, *_names(self._markets), RATE_SECONDS)
        return {
            Market(row["exchange"], row["symbol"]): (
                row["price"],
                float(row["trades"]) / RATE_SECONDS,
            )
            for row in rows
        }


async def summarise(
    settings: Settings, markets: Sequence[Market], since: datetime
) -> list[dict[str, Any]]:
    """Give a row a market of what the database holds of this run, by SQL.

    `missing` counts the ids between the first and the last that are not stored; None where a
    market's ids do not count its trades.
    """
    connection = await connect_postgres(settings)
    try:
        fetched_from = since - timedelta(days=1, hours=settings.backfill_hours)
        rows = await connection.fetch(_SUMMARY, *_names(markets), since, fetched_from)
        return [dict(row) for row in rows]
    finally:
        await connection.close()


def _names(markets: Sequence[Market]) -> tuple[list[str], list[str]]:
    return [market.exchange for market in markets], [market.symbol for market in markets]


def _age(kind: str, item: bytes | None) -> float | None:
    """Give the seconds since the record was made, or None where it can not be told."""
    if item is None:
        return None
    try:
        record = decode(kind, item)
    except (RejectedRecordError, TooNewError):
        return None
    made = getattr(record, "ts_recv", None) or getattr(record, "ts_opened", None)
    return max(0.0, time.time() - made / 1e6) if made else None
