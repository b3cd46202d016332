"""Ids that are no longer served one by one, from the aggregates that the venue still serves.

An aggregate is asked for by time, not by id, so the table says where to look: from the row below
what is missing on, which is found by halving the time between its first and its last row.

An aggregate that is missing in part is stored as the last and the first id missing and the
quantity less that of the fills already held (`remainder`, a function of values).
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from typing import Final

import msgspec

from sluice import failpoints
from sluice.budget import Priority
from sluice.clock import now_micros
from sluice.connections import connect_postgres
from sluice.exchanges import Exchange
from sluice.records import MAX_DECIMAL, Trade
from sluice.rest import RestClient
from sluice.settings import Market, Settings

Range = tuple[int, int]
"""First and last id, both included."""

WINDOW: Final = timedelta(hours=1)
"""The longest time that one question may span; venues refuse more."""
NEAR: Final = timedelta(seconds=1)
"""How closely a place in the table is looked for; a page more is cheaper than a question more."""
MOST_STEP: Final = timedelta(days=64)
"""How far before the table's first row is looked, in steps that double."""
AHEAD: Final = timedelta(minutes=1)
"""How far the venue's clock may be ahead of ours."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_ENDS: Final = """
(SELECT time, trade_id FROM trades WHERE market_id = $1 ORDER BY time, trade_id LIMIT 1)
UNION ALL
(SELECT time, trade_id FROM trades WHERE market_id = $1
 ORDER BY time DESC, trade_id DESC LIMIT 1)
"""
_UNTIL: Final = """
SELECT time, trade_id FROM trades WHERE market_id = $1 AND time <= $2
ORDER BY time DESC, trade_id DESC LIMIT 1
"""
_HELD: Final = """
SELECT first_id, trade_id, quantity FROM trades
WHERE market_id = market($1, $2) AND time BETWEEN $3 AND $4 AND trade_id BETWEEN $5 AND $6
ORDER BY trade_id
"""


class UnorderedPageError(ValueError):
    """The answer does not ascend from what was asked for; nothing in it proves anything."""


class NotYetKnownError(Exception):
    """The table does not hold yet what has to be known of it."""


@dataclass(frozen=True, slots=True)
class Held:
    """A row that lies within an aggregate: the ids it stands for, and their quantity."""

    first: int
    last: int
    quantity: Decimal


@dataclass(frozen=True, slots=True)
class Remainder:
    """What is to be stored of an aggregate, and which ids can not be told apart from it.

    `merged` lie before `trade` with fills already held between; its quantity holds theirs too.
    """

    trade: Trade | None
    merged: list[Range]


def overlap(ranges: Sequence[Range], ids: Range) -> list[Range]:
    """Give what ranges share with another."""
    shared = ((max(first, ids[0]), min(last, ids[1])) for first, last in ranges)
    return [(first, last) for first, last in shared if first <= last]


def subtract(ranges: Sequence[Range], others: Sequence[Range]) -> list[Range]:
    """Take the other ranges of ids out of ranges."""
    left: list[Range] = []
    taken = sorted(others)
    for first, last in ranges:
        start = first
        for low, high in taken:
            if high < start or low > last:
                continue
            if low > start:
                left.append((start, low - 1))
            start = max(start, high + 1)
        if start <= last:
            left.append((start, last))
    return left


def remainder(aggregate: Trade, missing: Sequence[Range], held: Sequence[Held]) -> Remainder:
    """Take the fills that are held out of an aggregate of which `missing` are missing.

    Raises:
        NotYetKnownError: the rows do not account for every id that is not missing.
        ValueError: the rows hold more than the aggregate.
    """
    absent = sum(last - first + 1 for first, last in missing)
    present = sum(row.last - row.first + 1 for row in held)
    if absent + present != aggregate.trade_id - aggregate.first_id + 1:
        raise NotYetKnownError(
            f"{present} of the {aggregate.trade_id - aggregate.first_id + 1 - absent} trades held "
            f"of the aggregate {aggregate.first_id}-{aggregate.trade_id} are in the table"
        )
    with localcontext() as context:
        context.prec = 2 * MAX_DECIMAL
        left = Decimal(aggregate.quantity) - sum((row.quantity for row in held), Decimal())
    if left < 0:
        raise ValueError(f"the rows hold more than the aggregate of trade {aggregate.trade_id}")
    if not left:
        # Its row is stored already and its neighbours were about to be named.
        return Remainder(None, list(missing))
    first, last = missing[-1]
    trade = msgspec.structs.replace(
        aggregate, first_id=first, trade_id=last, quantity=format(left, "f")
    )
    return Remainder(trade, list(missing[:-1]))


class Walk:
    """Reads pages of aggregates that cover a range of ids, and finds what they pass over."""

    def __init__(self, ids: Range) -> None:
        self.passed_over: list[Range] = []
        """Ids of the range that no aggregate holds though later ones are there."""
        self._ids = ids
        self._expected = ids[0]
        self._highest = -1

    @property
    def is_done(self) -> bool:
        """Whether the end of the range has been reached."""
        return self._expected > self._ids[1]

    def read(self, page: Sequence[Trade]) -> list[Trade]:
        """Give what a page adds to the ones before.

        Raises:
            UnorderedPageError: its aggregates do not ascend.
        """
        added = [aggregate for aggregate in page if aggregate.trade_id > self._highest]
        for aggregate in added:
            if aggregate.first_id <= self._highest:
                raise UnorderedPageError(f"{aggregate.first_id} after {self._highest}")
            self.passed_over += overlap([(self._expected, aggregate.first_id - 1)], self._ids)
            self._highest = aggregate.trade_id
            self._expected = max(self._expected, self._highest + 1)
        return added


class Aggregates:
    """Where in time missing ids lie, and the venue's aggregates of that time.

    Its methods raise asyncpg's and connection errors, RestError and BadFrameError.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def pages(
        self, exchange: Exchange, rest: RestClient, market: Market, ids: Range
    ) -> AsyncGenerator[list[Trade]]:
        """Give the pages that cover a range of ids, ascending, until one reaches beyond it.

        Raises:
            NotYetKnownError: the table does not say yet where to look.
        """

        async def ask(since: datetime, until: datetime) -> list[Trade]:
            request = exchange.aggregates_request(market.symbol, _micros(since), _micros(until))
            body = await rest.get(request, Priority.BACKFILL)
            return exchange.read_aggregates(market.symbol, body, now_micros())

        below, oldest = await self._below(market, ids[0])
        since = below - NEAR if below else await _beginning(ask, oldest, ids[0])
        end = datetime.now(UTC) + AHEAD
        while since <= end:
            until = min(since + WINDOW, end)
            page = await ask(since, until)
            if page:
                yield page
                if page[-1].first_id > ids[1]:
                    return
            newest = _EPOCH + timedelta(microseconds=page[-1].ts_event if page else 0)
            if newest > since:
                since = newest
            else:
                # One instant may fill a page: what follows it there can not be asked for.
                is_full = len(page) >= exchange.history_page
                since = (since if is_full else until) + timedelta(milliseconds=1)

    async def held(self, market: Market, page: Sequence[Trade]) -> list[Held]:
        """Read the rows that lie within a page of aggregates, of which there is one at least."""
        since = _EPOCH + timedelta(microseconds=page[0].ts_event) - NEAR
        until = _EPOCH + timedelta(microseconds=page[-1].ts_event) + NEAR
        ids = page[0].first_id, page[-1].trade_id
        connection = await connect_postgres(self._settings)
        await failpoints.reach("aggregates.rows_connected")
        try:
            rows = await connection.fetch(_HELD, *_name(market), since, until, *ids)
            await failpoints.reach("aggregates.rows_read")
        finally:
            await connection.close()
        return [Held(*row) for row in rows]

    async def _below(self, market: Market, first: int) -> tuple[datetime | None, datetime]:
        """Find when the nearest row below an id was traded, and when the first row of all was."""
        connection = await connect_postgres(self._settings)
        await failpoints.reach("aggregates.ends_connected")
        try:
            market_id = await connection.fetchval("SELECT market($1, $2)", *_name(market))
            await failpoints.reach("aggregates.market_read")
            ends = await connection.fetch(_ENDS, market_id)
            await failpoints.reach("aggregates.ends_read")
            if not ends:
                raise NotYetKnownError(f"the table has no trade of {market}")
            low, high = ends[0]["time"], ends[-1]["time"] + NEAR
            below = low if ends[0]["trade_id"] < first else None
            while below is not None and high - low > NEAR:
                middle = low + (high - low) / 2
                (row,) = await connection.fetch(_UNTIL, market_id, middle)
                await failpoints.reach("aggregates.middle_read")
                if row["trade_id"] < first:
                    low, below = middle, row["time"]
                else:
                    high = middle
            return below, ends[0]["time"]
        finally:
            await connection.close()


async def _beginning(
    ask: Callable[[datetime, datetime], Awaitable[list[Trade]]], oldest: datetime, first: int
) -> datetime:
    """Find a time before an id was traded, of which the table has nothing earlier."""
    step, found = WINDOW, oldest - WINDOW
    while step <= MOST_STEP:
        since = oldest - step
        page = await ask(since, since + WINDOW)
        if page:
            found = since
            if page[0].first_id <= first:
                break
        step *= 2
    return found


def _name(market: Market) -> tuple[str, str]:
    return market.exchange, market.symbol


def _micros(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(microseconds=1)
