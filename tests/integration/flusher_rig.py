"""A flusher inside the test's own loop, between a real Redis and a real PostgreSQL."""

import asyncio
import base64
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import msgspec
from redis.asyncio import Redis

from flusher.service import run
from sluice import records
from sluice.lifecycle import Process
from sluice.queue import RecordQueue
from sluice.records import Trade
from sluice.settings import Settings
from tests.faults.waiting import eventually
from tests.servers import Database

DAY = 1_790_000_000_000_000
"""Microseconds: a moment of 2026-09-21."""
SYMBOL = "BTCUSDT"


def trade(trade_id: int, price: str = "1.5", symbol: str = SYMBOL, **fields: Any) -> bytes:
    values: dict[str, Any] = {
        "exchange": "binance",
        "symbol": symbol,
        "trade_id": trade_id,
        "first_id": trade_id,
        "price": price,
        "quantity": "0.25",
        "side": "buy" if trade_id % 2 else "sell",
        "ts_event": DAY + trade_id * 1000,
        "ts_recv": DAY + trade_id * 1000 + 77,
    }
    return records.encode(Trade(**{**values, **fields}))


@dataclass
class Flusher:
    """One flusher as a task."""

    process: Process
    task: asyncio.Task[None]

    async def stop(self) -> None:
        """Stop it as SIGTERM does, and wait for its end."""
        self.process.stop.set()
        await self.task


@asynccontextmanager
async def flushing(environment: Mapping[str, str], **settings: Any) -> AsyncIterator[Flusher]:
    """Run a flusher; at the end it is cancelled unless the test has stopped it."""
    values = {name.lower(): value for name, value in environment.items()}
    process = Process(
        "flusher",
        Settings(_env_file=None, **{**values, "flush_interval_ms": 20, **settings}),
        asyncio.Event(),
    )
    process.health.ready("start")
    flusher = Flusher(process, asyncio.create_task(run(process)))
    try:
        yield flusher
        assert not flusher.task.done() or flusher.task.exception() is None
    finally:
        flusher.task.cancel()
        await asyncio.gather(flusher.task, return_exceptions=True)


def counted(flusher: Flusher, name: str) -> float:
    """Sum up one of the flusher's metrics over all its labels."""
    return sum(
        sample.value
        for metric in flusher.process.collect()
        if metric.name == f"sluice_{name}"
        for sample in metric.samples
    )


async def drained(redis: Redis, *kinds: str) -> None:
    """Wait until the queues are empty."""
    for kind in kinds:
        queue = RecordQueue(redis, kind)

        async def is_empty(queue: RecordQueue = queue) -> bool:
            return await queue.length() == 0

        await eventually(is_empty)


async def letters(redis: Redis, kind: str = "trade") -> list[dict[str, Any]]:
    """Give the dead letters of a queue, with the bytes of each under `raw`."""
    found = []
    for item in await redis.lrange(RecordQueue(redis, kind).dead_key, 0, -1):
        letter = msgspec.json.decode(item)
        encoded = letter.get("raw_base64")
        letter["raw"] = base64.b64decode(encoded) if encoded else letter["raw"].encode()
        found.append(letter)
    return found


@asynccontextmanager
async def connected(database: Database) -> AsyncIterator[asyncpg.Connection]:
    """Give a connection of the test's own."""
    connection = await asyncpg.connect(database.dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def fetch(database: Database, query: str) -> list[tuple[Any, ...]]:
    """Run one query and give the rows as tuples."""
    async with connected(database) as connection:
        return [tuple(row) for row in await connection.fetch(query)]


async def stored_ids(database: Database) -> list[int]:
    """Give the ids of all trades, each as often as it is stored, sorted."""
    return [row[0] for row in await fetch(database, "SELECT trade_id FROM trades ORDER BY 1")]


async def push(redis: Redis, items: Iterable[bytes], kind: str = "trade") -> RecordQueue:
    """Push items onto a queue, 1000 at a time, and give it."""
    queue = RecordQueue(redis, kind)
    rest = list(items)
    for start in range(0, len(rest), 1000):
        await queue.push(rest[start : start + 1000])
    return queue
