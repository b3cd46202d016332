"""The hash of the latest book: it holds the truth or is not there, and never goes back."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from orderbook.latest import LatestBook, LatestBooks
from sluice.queue import book_key, live_book_channel
from sluice.settings import Market

MARKET = Market("simulator", "BTCUSDT")
KEY = book_key("simulator", "BTCUSDT")
LONG_MS = 600_000


def book(sync_id: int, update_id: int) -> LatestBook:
    return LatestBook(
        sync_id, update_id, 1_700_000_000_000_000, [("1.10", "2.0")], [("1.20", "3.0")]
    )


class Writer:
    """One process's side: the book it holds now, and its hashes."""

    def __init__(
        self, redis: Redis, *, expiry_ms: int = LONG_MS, is_published: bool = False
    ) -> None:
        self.book: LatestBook | None = None
        self.latest = LatestBooks(
            redis, lambda _: self.book, expiry_ms=expiry_ms, is_published=is_published
        )

    async def write(self, sync_id: int, update_id: int) -> None:
        self.book = book(sync_id, update_id)
        self.latest.changed(MARKET)
        await self.latest.flush()

    async def lose(self) -> None:
        assert self.book is not None
        sync_id, self.book = self.book.sync_id, None
        self.latest.lost(MARKET, sync_id)
        await self.latest.flush()


def text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()


async def stored(redis: Redis) -> tuple[int, int] | None:
    fields = await redis.hmget(KEY, ["sync_id", "update_id"])
    return None if fields[0] is None or fields[1] is None else (int(fields[0]), int(fields[1]))


async def test_a_book_is_written_whole(redis: Redis) -> None:
    await Writer(redis).write(100, 7)
    raw = await redis.hgetall(KEY)
    fields = {text(name): text(value) for name, value in raw.items()}
    assert json.loads(fields.pop("data")) == {"bids": [["1.10", "2.0"]], "asks": [["1.20", "3.0"]]}
    assert fields == {
        "sync_id": "100",
        "update_id": "7",
        "timestamp": "1700000000000000",
        "state": "live",
    }
    assert 0 < await redis.pttl(KEY) <= LONG_MS


async def test_an_older_update_is_refused(redis: Redis) -> None:
    writer = Writer(redis)
    await writer.write(100, 7)
    await writer.write(100, 6)
    assert await stored(redis) == (100, 7)
    assert writer.latest.refused == 1


async def test_an_older_sync_is_refused(redis: Redis) -> None:
    one, other = Writer(redis), Writer(redis)
    await other.write(200, 7)
    await one.write(100, 8)
    assert await stored(redis) == (200, 7)


async def test_a_newer_sync_takes_over_once_it_is_ahead(redis: Redis) -> None:
    one, other = Writer(redis), Writer(redis)
    await one.write(100, 7)
    await other.write(200, 6)
    assert await stored(redis) == (100, 7)
    await other.write(200, 8)
    assert await stored(redis) == (200, 8)


async def test_a_lost_book_is_deleted(redis: Redis) -> None:
    writer = Writer(redis)
    await writer.write(100, 7)
    await writer.lose()
    assert not await redis.exists(KEY)


async def test_another_process_book_is_not_deleted(redis: Redis) -> None:
    one, other = Writer(redis), Writer(redis)
    await one.write(100, 7)
    await other.write(200, 8)
    await one.lose()
    assert await stored(redis) == (200, 8)


async def test_after_a_deletion_the_hash_does_not_go_back(redis: Redis) -> None:
    one, other = Writer(redis), Writer(redis)
    await one.write(100, 7)
    await other.write(200, 9)
    await other.lose()
    await one.write(100, 8)
    assert await stored(redis) is None
    await one.write(100, 10)
    assert await stored(redis) == (100, 10)


async def test_a_book_that_is_not_renewed_expires(redis: Redis) -> None:
    await Writer(redis, expiry_ms=50).write(100, 7)
    async with asyncio.timeout(60):
        while await redis.exists(KEY):  # Redis sends no event
            await asyncio.sleep(0.01)


async def test_an_unchanged_book_is_renewed(redis: Redis) -> None:
    writer = Writer(redis)
    await writer.write(100, 7)
    await redis.pexpire(KEY, LONG_MS // 2)
    await writer.write(100, 7)
    assert await redis.pttl(KEY) > LONG_MS // 2


@asynccontextmanager
async def running(latest: LatestBooks) -> AsyncIterator[None]:
    task = asyncio.create_task(latest.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_readers_who_subscribe_get_every_accepted_book(redis: Redis) -> None:
    async with redis.pubsub() as channel:
        await channel.subscribe(live_book_channel("simulator", "BTCUSDT"))
        writer = Writer(redis, is_published=True)
        for update_id in (7, 6, 8):
            await writer.write(100, update_id)
        heard: list[dict[str, object]] = []
        async with asyncio.timeout(60):
            while len(heard) < 2:
                message = await channel.get_message(ignore_subscribe_messages=True, timeout=1)
                if message:
                    heard.append(json.loads(message["data"]))
    assert [message["update_id"] for message in heard] == [7, 8]
    assert heard[0]["bids"] == [["1.10", "2.0"]]


@pytest.mark.parametrize("is_lost", [False, True])
async def test_the_writer_does_what_was_noted(redis: Redis, *, is_lost: bool) -> None:
    writer = Writer(redis)
    async with running(writer.latest):
        writer.book = book(100, 7)
        writer.latest.changed(MARKET)
        async with asyncio.timeout(60):
            while not await redis.exists(KEY):  # Redis sends no event
                await asyncio.sleep(0.01)
        if is_lost:
            writer.book = None
            writer.latest.lost(MARKET, 100)
            async with asyncio.timeout(60):
                while await redis.exists(KEY):  # Redis sends no event
                    await asyncio.sleep(0.01)
