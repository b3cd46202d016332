"""How the orderbook process divides markets and chooses its images."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace

import pytest
from loguru import logger
from redis.asyncio import Redis

from orderbook import service
from orderbook.images import ImageQueue
from orderbook.keeper import BookKeeper, Outlets
from orderbook.latest import LatestBooks
from orderbook.service import Books, image_limit, in_shard, resident_bytes
from sluice.budget import Budget, Priority
from sluice.coverage import Coverage
from sluice.exchanges import EXCHANGES
from sluice.exchanges.base import Depth, DepthImage
from sluice.lifecycle import Process
from sluice.publisher import Publisher
from sluice.rest import RestClient
from sluice.settings import Market, Settings


def test_every_market_is_in_exactly_one_shard() -> None:
    markets = [Market("simulator", f"S{number}") for number in range(500)]
    shards = [{m for m in markets if in_shard(m, f"{index}/4")} for index in range(4)]
    assert sum(len(shard) for shard in shards) == 500
    assert set.union(*shards) == set(markets)
    assert min(len(shard) for shard in shards) > 80


def test_the_shard_of_a_market_does_not_depend_on_the_process() -> None:
    assert [in_shard(Market("binance", "BTCUSDT"), f"{index}/4") for index in range(4)] == [
        False,
        False,
        False,
        True,
    ]


def test_an_image_is_as_cheap_as_will_do() -> None:
    limits = {
        (depth, most): image_limit(
            EXCHANGES["binance"],
            Settings.model_validate({"snapshot_depth": depth, "book_depth": most}),
        )
        for depth, most in ((20, 5000), (20, 100), (20, 500), (100, 5000), (5000, 5000))
    }
    assert limits == {
        (20, 5000): 1000,
        (20, 100): 100,
        (20, 500): 500,
        (100, 5000): 5000,
        (5000, 5000): 5000,
    }


def test_memory_is_that_of_this_process() -> None:
    assert 10 * 2**20 < resident_bytes() < 10 * 2**30


MB = 2**20


class NotedImages(ImageQueue):
    """Nothing is fetched."""

    def want(self, symbol: str, priority: Priority) -> None: ...


@pytest.fixture
async def books() -> AsyncIterator[Books]:
    """Ten live books of eleven levels each; book number n has had n changes after its first."""
    settings = Settings.model_validate({"book_max_mb": 1000})
    exchange = EXCHANGES["simulator"]
    async with Redis(port=1) as redis:
        publisher = Publisher(redis, settings)
        latest = LatestBooks(redis, lambda _: None, is_published=False)
        coverage = Coverage(redis)
        rest = RestClient(exchange, settings, Budget(redis, exchange))
        images = NotedImages(exchange, rest, 1000, deliver=lambda _: None, activity=lambda _: 0)
        process = Process("orderbook", settings, asyncio.Event())
        books = Books(process, publisher, latest, coverage, {})
        outlets = Outlets(publisher, latest, coverage, images)
        for number in range(10):
            market = Market("simulator", f"S{number}")
            keeper = BookKeeper(market, "contiguous", settings, outlets)
            books.keepers[market] = keeper
            for at in range(1, number + 2):
                keeper.on_depth(Depth(market.symbol, at, at, None, at, at, [("1", "1")], []))
            asks = [(str(price), "1") for price in range(2, 12)]
            image = DepthImage(market.symbol, number + 1, [("1", "1")], asks, None, 1000)
            keeper.on_image(image)
        yield books
        await rest.close()


def dropped(books: Books) -> list[str]:
    return [market.symbol for market, keeper in books.keepers.items() if keeper.is_dropped]


@pytest.fixture
def log() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lines.append, format="{level} {message}", level="INFO")
    yield lines
    logger.remove(sink)


async def test_the_least_active_books_are_dropped_where_memory_ends(
    books: Books, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    used = 0
    monkeypatch.setattr(service, "resident_bytes", lambda: used)
    assert books.live == 10
    used = 799 * MB
    books.check()
    assert not log
    used = 801 * MB
    books.check()
    assert "WARNING 801 MB of the 1000 MB of BOOK_MAX_MB" in log.pop()
    used = 1001 * MB
    books.check()
    # A tenth of what is held is one book's.
    assert dropped(books) == ["S0"]
    assert "simulator:S0" in log.pop()
    # No more than there was: what the dropped book held is used by others now.
    used = 1005 * MB
    books.check()
    assert dropped(books) == ["S0"]
    used = 1030 * MB
    books.check()
    assert dropped(books) == ["S0", "S1"]
    assert "ERROR" in log.pop()
    assert books.live == 8
    assert "8 of 10 books live, 2 dropped" in books.statistics()
    used = 700 * MB
    books.check()
    assert dropped(books) == ["S0"]
    books.check()
    assert dropped(books) == []


async def test_the_statistics_line_has_the_rate_of_changes(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(service, "time", SimpleNamespace(monotonic=lambda: now))
    books.statistics()
    keeper = books.keepers[Market("simulator", "S0")]
    for at in range(2, 62):
        keeper.on_depth(Depth("S0", at, at, None, at, at, [], []))
    now += 30
    assert "read 115 changes (2.0/s)" in books.statistics()


async def test_the_orderbook_tells_what_waits_on_its_disk() -> None:
    async with Redis(port=1) as redis:
        publisher = Publisher(redis, Settings())
        latest = LatestBooks(redis, lambda _: None, is_published=False)
        process = Process("orderbook", Settings(), asyncio.Event())
        books = Books(process, publisher, latest, Coverage(redis), {})
        names = {metric.name for metric in books.metrics()}
    assert {
        "sluice_publisher_failures",
        "sluice_publisher_spool_bytes",
        "sluice_queue_depth",
    } <= names
