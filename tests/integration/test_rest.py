"""The REST client against a real HTTP server that does not always do as it should."""

import asyncio
import gzip
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from redis.asyncio import Redis

from sluice import rest
from sluice.budget import Budget, Priority
from sluice.exchanges import EXCHANGES
from sluice.exchanges.base import Request
from sluice.queue import budget_key
from sluice.rest import RestClient, RestError
from sluice.settings import Settings
from tests.proxies import socks_proxy
from tests.served import Answer, served

VENUE = EXCHANGES["simulator"]
REQUEST = Request("/api/v3/depth", {"symbol": "BTCUSDT", "limit": "5"}, 5)


@asynccontextmanager
async def asking(redis: Redis, url: str, proxy: str | None = None) -> AsyncIterator[RestClient]:
    settings = Settings.model_validate({"simulator_rest_url": url, "proxy_url": proxy})
    client = RestClient(VENUE, settings, Budget(redis, VENUE))
    try:
        yield client
    finally:
        await client.close()


async def refused(redis: Redis, answer: Answer) -> RestError:
    async with served(answer) as url, asking(redis, url) as client:
        with pytest.raises(RestError) as caught:
            await client.get(REQUEST, Priority.LIVE_IMAGE)
        assert client.failures == 1
    return caught.value


async def pause_ms(redis: Redis) -> float:
    """How long the budget still keeps everyone away."""
    until = await redis.hget(budget_key("simulator"), "until")
    seconds, micros = await redis.time()
    return float(until or 0) - seconds * 1000 - micros / 1000


async def test_an_answer_is_given_and_what_it_cost_is_noted(redis: Redis) -> None:
    seen = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.path_qs)
        return web.Response(body=b"[1]", headers={"X-MBX-USED-WEIGHT-1M": "5990"})

    async with served(answer) as url, asking(redis, url) as client:
        assert await client.get(REQUEST, Priority.LIVE_IMAGE) == b"[1]"
    assert seen == ["/api/v3/depth?symbol=BTCUSDT&limit=5"]
    assert await redis.hget(budget_key("simulator"), "left") == b"10"


@pytest.mark.parametrize(("status", "kind"), [(429, "rate_limited"), (418, "banned")])
async def test_a_venue_that_has_had_enough_is_left_alone(
    redis: Redis, status: int, kind: str
) -> None:
    asked = []

    async def answer(_: web.Request) -> web.Response:
        asked.append(time.monotonic())
        return web.Response(status=status, headers={"Retry-After": "600"}, text='{"code":-1003}')

    error = await refused(redis, answer)
    assert error.refusal is not None
    assert error.refusal.kind == kind
    assert 500_000 < await pause_ms(redis) <= 600_000
    async with served(answer) as url, asking(redis, url) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.get(REQUEST, Priority.LIVE_IMAGE)
    assert len(asked) == 1


@pytest.mark.parametrize("status", [403, 451, 500, 503])
async def test_other_refusals_pause_nobody(redis: Redis, status: int) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, text="<html>no</html>", content_type="text/html")

    error = await refused(redis, answer)
    assert error.refusal is not None
    assert await pause_ms(redis) <= 0


async def test_a_redirect_is_not_followed(redis: Redis) -> None:
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=302, headers={"Location": "/elsewhere"})

    await refused(redis, answer)
    assert asked == ["/api/v3/depth"]


async def test_a_bomb_is_refused(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "MOST_BYTES", 100_000)
    body = gzip.compress(bytes(50_000_000))

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body, headers={"Content-Encoding": "gzip"})

    error = await refused(redis, answer)
    assert "100000 bytes" in str(error)


async def test_an_answer_that_never_ends_is_given_up(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest, "TIMEOUT", 0.5)
    is_over = asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        await is_over.wait()
        return web.Response()

    async with served(answer) as url, asking(redis, url) as client:
        with pytest.raises(RestError, match="TimeoutError"):
            await client.get(REQUEST, Priority.LIVE_IMAGE)
        is_over.set()


async def test_a_venue_that_is_away_is_an_error_of_its_kind(redis: Redis) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response()

    async with served(answer) as url:
        pass
    async with asking(redis, url) as client:
        with pytest.raises(RestError) as caught:
            await client.get(REQUEST, Priority.LIVE_IMAGE)
    assert caught.value.refusal is None


async def test_an_http_proxy_is_used(redis: Redis) -> None:
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(str(request.url))
        return web.Response(body=b"proxied")

    async with served(answer) as proxy, asking(redis, "http://venue.invalid", proxy) as client:
        assert await client.get(REQUEST, Priority.LIVE_IMAGE) == b"proxied"
    assert asked == ["http://venue.invalid/api/v3/depth?symbol=BTCUSDT&limit=5"]


async def test_a_socks_proxy_is_used(redis: Redis) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=b"through", headers={"Connection": "close"})

    async with (
        served(answer) as url,
        socks_proxy() as proxy,
        asking(redis, url, proxy) as client,
    ):
        assert await client.get(REQUEST, Priority.LIVE_IMAGE) == b"through"


async def test_a_socks_proxy_that_refuses_is_no_answer(redis: Redis) -> None:
    async with (
        socks_proxy(refusal=5) as proxy,
        asking(redis, "http://127.0.0.1:1", proxy) as client,
    ):
        with pytest.raises(RestError, match="no answer"):
            await client.get(REQUEST, Priority.LIVE_IMAGE)
