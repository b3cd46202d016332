"""What the simulated exchange really published, asked over its control port."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from decimal import Decimal
from http import HTTPStatus
from typing import Any, NamedTuple

import aiohttp

PAGE = 10_000
"""The most trades that one answer holds."""


class Trade(NamedTuple):
    """A trade, published or stored: decimals as they are printed, `time` in microseconds.

    `first_id` is below `trade_id` where the row stands for several.
    """

    trade_id: int
    first_id: int
    price: str
    quantity: str
    side: str
    time: int


Level = tuple[Decimal, Decimal]


class Book(NamedTuple):
    """Price and size of each level, from the best on."""

    bids: list[Level]
    asks: list[Level]


class Truth:
    """The exchange's own memory of what it published, withheld and injected."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = f"{url}/control"

    async def last_id(self, symbol: str) -> int | None:
        """Give the newest published trade id, or None before the first."""
        ids = (await self._get("truth", symbol=symbol))["ids"]
        return None if ids is None else int(ids[1])

    async def trades(self, symbol: str, from_id: int, to_id: int) -> list[Trade]:
        """Give the trades from an id to an id, both included, ascending."""
        found: list[Trade] = []
        while from_id <= to_id:
            limit = min(PAGE, to_id - from_id + 1)
            page = await self._get("trades", symbol=symbol, **{"from": from_id}, limit=limit)
            if not page:
                break
            for trade_id, price, quantity, time, is_buyer_maker in page:
                side = "sell" if is_buyer_maker else "buy"
                found.append(Trade(trade_id, trade_id, price, quantity, side, time * 1000))
            from_id = found[-1].trade_id + 1
        return [trade for trade in found if trade.trade_id <= to_id]

    async def hidden(self, symbol: str) -> list[tuple[int, int]]:
        """Give the ranges of ids that REST does not serve, both ends included."""
        return [
            (first, last) for first, last in (await self._get("truth", symbol=symbol))["hidden"]
        ]

    async def book(self, symbol: str, update_id: int, depth: int) -> Book | None:
        """Give the book at an update id, or None where the exchange no longer knows it."""
        parameters: dict[str, str | int] = {
            "symbol": symbol,
            "update_id": update_id,
            "limit": depth,
        }
        async with self._session.get(f"{self._url}/book", params=parameters) as answer:
            if answer.status == HTTPStatus.NOT_FOUND:
                return None
            answer.raise_for_status()
            body = await answer.json()
        return Book(levels(body["bids"]), levels(body["asks"]))

    async def faults(self) -> Mapping[str, int]:
        """Give how often each fault was really injected."""
        counts: dict[str, int] = (await self._get("faults"))["counts"]
        return counts

    async def _get(self, page: str, **parameters: str | int) -> Any:  # JSON
        async with self._session.get(f"{self._url}/{page}", params=parameters) as answer:
            answer.raise_for_status()
            return await answer.json()


@asynccontextmanager
async def truth_of(url: str) -> AsyncIterator[Truth]:
    """Ask the simulator at this address."""
    async with aiohttp.ClientSession() as session:
        yield Truth(session, url)


def levels(printed: list[tuple[str, str]]) -> list[Level]:
    """Read levels of text."""
    return [(Decimal(price), Decimal(size)) for price, size in printed]
