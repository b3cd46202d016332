"""Book images in turn: most active first, each book with its own delays, none in another's way."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from redis.asyncio import Redis

from orderbook import images
from orderbook.images import ImageQueue
from sluice.budget import Budget, Priority
from sluice.exchanges import EXCHANGES
from sluice.exchanges.base import DepthImage
from sluice.rest import RestClient
from sluice.settings import Settings
from tests.served import Answer, served

VENUE = EXCHANGES["simulator"]
IMAGE = b'{"lastUpdateId":7,"bids":[["1.0","2"]],"asks":[["1.1","2"]]}'


class Book:
    """What came in, and how busy each symbol is said to be."""

    def __init__(self) -> None:
        self.images: list[DepthImage] = []
        self.activity: Counter[str] = Counter()

    async def has(self, symbols: set[str]) -> None:
        async with asyncio.timeout(60):
            while not symbols <= {image.symbol for image in self.images}:  # a plain list
                await asyncio.sleep(0.01)


@asynccontextmanager
async def fetching(redis: Redis, book: Book, answer: Answer) -> AsyncIterator[ImageQueue]:
    async with served(answer) as url:
        settings = Settings.model_validate({"simulator_rest_url": url})
        client = RestClient(VENUE, settings, Budget(redis, VENUE))
        queue = ImageQueue(
            VENUE,
            client,
            100,
            deliver=book.images.append,
            activity=book.activity.__getitem__,
        )
        task = asyncio.create_task(queue.run())
        try:
            yield queue
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await client.close()


async def good(_: web.Request) -> web.Response:
    return web.Response(body=IMAGE)


async def test_an_image_comes_once_however_often_it_is_wanted(redis: Redis) -> None:
    book = Book()
    async with fetching(redis, book, good) as queue:
        queue.want("A", Priority.IMAGE)
        queue.want("A", Priority.LIVE_IMAGE)
        queue.want("B", Priority.IMAGE)
        assert queue.waiting == 2
        await book.has({"A", "B"})
        assert queue.waiting == 0
    assert sorted(image.symbol for image in book.images) == ["A", "B"]
    assert book.images[0].update_id == 7


async def test_the_most_active_is_served_first(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "AT_ONCE", 1)
    book = Book()
    book.activity.update({"A": 1, "B": 3, "C": 2})
    async with fetching(redis, book, good) as queue:
        for symbol in "ABC":
            queue.want(symbol, Priority.IMAGE)
        await book.has({"A", "B", "C"})
    assert [image.symbol for image in book.images] == ["B", "C", "A"]


async def test_a_request_that_hangs_holds_up_no_other(redis: Redis) -> None:
    book, is_over = Book(), asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        if request.query["symbol"] == "SLOW":
            await is_over.wait()
        return web.Response(body=IMAGE)

    async with fetching(redis, book, answer) as queue:
        book.activity["SLOW"] = 1
        for symbol in ("SLOW", "A", "B"):
            queue.want(symbol, Priority.IMAGE)
        await book.has({"A", "B"})
        assert queue.waiting == 1
        is_over.set()
        await book.has({"SLOW"})


async def test_a_failed_request_is_made_again(redis: Redis) -> None:
    book = Book()
    answers = iter([web.Response(status=503), web.Response(body=b"<html>")])

    async def answer(_: web.Request) -> web.Response:
        return next(answers, None) or web.Response(body=IMAGE)

    async with fetching(redis, book, answer) as queue:
        queue.want("A", Priority.LIVE_IMAGE)
        await book.has({"A"})
        assert (queue.failures, queue.fetched) == (2, 1)


async def test_an_unknown_symbol_holds_up_no_other(redis: Redis) -> None:
    book = Book()

    async def answer(request: web.Request) -> web.Response:
        if request.query["symbol"] == "NONE":
            return web.Response(status=400, text='{"code":-1121,"msg":"Invalid symbol."}')
        return web.Response(body=IMAGE)

    async with fetching(redis, book, answer) as queue:
        book.activity["NONE"] = 1
        queue.want("NONE", Priority.IMAGE)
        queue.want("A", Priority.IMAGE)
        await book.has({"A"})
        async with asyncio.timeout(60):
            while queue.failures == 0:  # a plain count
                await asyncio.sleep(0.01)
        assert queue.waiting == 1
