"""The orderbook process against the simulated exchange and a real Redis, as seen from outside."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

import aiohttp
from redis.asyncio import Redis

from sluice.queue import book_key, queue_key
from sluice.records import BookAudit, Gap, OrderbookSnapshot, Record, decode

ROOT = Path(__file__).resolve().parents[2]
CEILING = 60.0
"""Seconds within which everything happens on the slowest machine; nothing should take so long."""

Levels = list[tuple[Decimal, Decimal]]


async def eventually(condition: Callable[[], Awaitable[object]], what: str) -> None:
    """Wait for an outcome."""
    try:
        async with asyncio.timeout(CEILING):
            while not await condition():
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"not within {CEILING} s: {what}") from None


@contextmanager
def process(
    module: str, *arguments: str, log: Path, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module in an empty directory; whatever is left of it at the end is killed."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    with log.open("ab") as output:
        running = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=log.parent,
            env={**kept, "PYTHONPATH": str(ROOT), **environment},
            stdout=output,
            stderr=output,
        )
        try:
            yield running
        finally:
            running.kill()
            running.wait()


async def exit_code(running: subprocess.Popen[bytes]) -> int:
    """End a process as a service manager does."""
    running.send_signal(signal.SIGTERM)
    return await asyncio.wait_for(asyncio.to_thread(running.wait), CEILING)


class Exchange:
    """The simulator's control port."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.ws_url = url.replace("http://", "ws://")
        self._session = aiohttp.ClientSession()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, path: str, **query: str | int) -> Any:
        async with self._session.get(f"{self.url}/control/{path}", params=query) as response:
            response.raise_for_status()
            return await response.json()

    async def post(self, path: str, **body: object) -> Any:
        async with self._session.post(f"{self.url}/control/{path}", json=body) as response:
            response.raise_for_status()
            return await response.json()

    async def top(self, symbol: str, update_id: int, depth: int) -> tuple[Levels, Levels]:
        """Give the best levels of the true book at an update id."""
        book = await self.get("book", symbol=symbol, update_id=update_id, limit=depth)
        return levels(book["bids"]), levels(book["asks"])

    async def counts(self) -> dict[str, int]:
        """How often each fault really happened."""
        counts: dict[str, int] = (await self.get("faults"))["counts"]
        return counts


@asynccontextmanager
async def exchange(directory: Path, *arguments: str) -> AsyncIterator[Exchange]:
    """Run a simulated exchange on a free port."""
    port_file = directory / "port"
    port_file.unlink(missing_ok=True)
    with process(
        "sluice.simulator",
        "--port",
        "0",
        "--port-file",
        str(port_file),
        *arguments,
        log=directory / "simulator.log",
    ):

        async def is_there() -> bool:
            return port_file.exists()

        await eventually(is_there, "the simulator listens")
        async with Exchange(f"http://127.0.0.1:{port_file.read_text().strip()}") as simulated:
            yield simulated


def environment(simulated: Exchange, redis: dict[str, str], **more: str) -> dict[str, str]:
    """Give the settings of an orderbook process: rows every 100 ms, nothing that slows it."""
    return {
        "SIMULATOR_WS_URL": simulated.ws_url,
        "SIMULATOR_REST_URL": simulated.url,
        "SNAPSHOT_INTERVAL_MS": "100",
        "METRICS_PORT": "0",
        **redis,
        **more,
    }


def levels(pairs: list[tuple[str, str]]) -> Levels:
    """Read prices and sizes as exact numbers."""
    return [(Decimal(price), Decimal(size)) for price, size in pairs]


async def rows(redis: Redis) -> list[OrderbookSnapshot]:
    """Read every snapshot row that was pushed."""
    return [
        row
        for row in await _records(redis, "orderbook_snapshot")
        if isinstance(row, OrderbookSnapshot)
    ]


async def gaps(redis: Redis) -> list[Gap]:
    """Read every gap that was pushed."""
    return [gap for gap in await _records(redis, "gap") if isinstance(gap, Gap)]


async def audits(redis: Redis) -> list[BookAudit]:
    """Read every comparison with a newer image that was pushed."""
    return [audit for audit in await _records(redis, "book_audit") if isinstance(audit, BookAudit)]


async def _records(redis: Redis, kind: str) -> list[Record]:
    items = await redis.lrange(queue_key(kind), 0, -1)
    return [decode(kind, item) for item in items if isinstance(item, bytes)]


async def latest(redis: Redis, symbol: str) -> dict[str, Any] | None:
    """Read the hash of a market's latest book."""
    names = ["update_id", "sync_id", "data"]
    update_id, sync_id, data = await redis.hmget(book_key("simulator", symbol), names)
    if update_id is None or sync_id is None or data is None:
        return None
    return {"update_id": int(update_id), "sync_id": int(sync_id), **json.loads(data)}


async def assert_true(simulated: Exchange, stored: list[OrderbookSnapshot], depth: int = 20) -> int:
    """Compare every row with the exchange's own book at its update id; gives how many."""
    for row in stored:
        bids, asks = await simulated.top(row.symbol, row.update_id, depth)
        assert (levels(row.bids), levels(row.asks)) == (bids, asks), (
            f"{row.symbol} at {row.update_id} of sync {row.sync_id}"
        )
    return len(stored)
