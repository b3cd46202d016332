"""How a venue's REST service is asked: within the budget, within bounds, and never redirected."""

import aiohttp
from aiohttp_socks import ProxyConnector, ProxyError
from yarl import URL

from sluice import failpoints
from sluice.budget import Budget, Priority
from sluice.exchanges.base import Exchange, Refusal, Request
from sluice.settings import Settings

TIMEOUT = 15.0
"""Seconds for a whole answer; the venue itself gives up after 10."""
MOST_BYTES = 32 * 2**20
"""The largest answer, decompressed: the list of all instruments is the longest there is."""
RATE_LIMITED_PAUSE = 60.0
BANNED_PAUSE = 120.0
"""Seconds to stay away where the refusal does not say; a first ban lasts two minutes."""


class RestError(Exception):
    """There was no usable answer; `refusal` is what the venue said, None where it said nothing."""

    def __init__(self, message: str, refusal: Refusal | None = None) -> None:
        super().__init__(message)
        self.refusal = refusal


class RestClient:
    """One venue's REST service; make it inside a running loop and close it."""

    def __init__(self, exchange: Exchange, settings: Settings, budget: Budget) -> None:
        self._exchange = exchange
        self.budget = budget
        self._base = URL(getattr(settings, exchange.rest_setting))
        proxy = settings.proxy_url.get_secret_value() if settings.proxy_url else None
        is_socks = proxy is not None and proxy.startswith("socks")
        self._proxy = None if is_socks else proxy
        self._session = aiohttp.ClientSession(
            connector=ProxyConnector.from_url(proxy) if proxy and is_socks else None,
            timeout=aiohttp.ClientTimeout(total=TIMEOUT),
        )
        self.requests = 0
        self.failures = 0

    async def get(self, request: Request, priority: Priority) -> bytes:
        """Wait for the budget and `ask`."""
        await self.budget.acquire(request.weight, priority)
        return await self.ask(request)

    async def ask(self, request: Request) -> bytes:
        """Ask once, the weight being acquired already, and give the body of the answer.

        A refusal for asking too much pauses all processes of this address for as long as the
        venue says. Any other failure is the caller's to back off from.

        Raises:
            RestError: the venue refused, could not be reached, or sent too much.
        """
        self.requests += 1
        url = self._base.with_path(request.path)
        try:
            async with self._session.get(
                url, params=request.query, proxy=self._proxy, allow_redirects=False
            ) as response:
                await failpoints.reach("rest.answered")
                body = await _read(response)
        except (aiohttp.ClientError, ProxyError, OSError, ValueError) as error:
            self.failures += 1
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise RestError(f"{request.path}: no answer ({reason})") from error
        used = self._exchange.used_weight(response.headers)
        if used is not None:
            await self.budget.report(used)
        if response.status == 200:  # noqa: PLR2004  # the only status that carries data
            return body
        self.failures += 1
        refusal = self._exchange.refusal(response.status, response.headers, body)
        if refusal.kind == "rate_limited":
            await self.budget.pause(refusal.retry_after or RATE_LIMITED_PAUSE)
        elif refusal.kind == "banned":
            await self.budget.pause(refusal.retry_after or BANNED_PAUSE)
        raise RestError(f"{request.path}: {response.status} {refusal.message}", refusal)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        await failpoints.reach("rest.part_read")
        body += chunk
        if len(body) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
    return bytes(body)
