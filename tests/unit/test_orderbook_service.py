"""How the orderbook process divides markets and chooses its images."""

import asyncio

from redis.asyncio import Redis

from orderbook.latest import LatestBooks
from orderbook.service import Books, image_limit, in_shard, resident_bytes
from sluice.coverage import Coverage
from sluice.exchanges import EXCHANGES
from sluice.lifecycle import Process
from sluice.publisher import Publisher
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
