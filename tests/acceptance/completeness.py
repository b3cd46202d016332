"""What the exchange published, beside what is stored and what `gaps` explains."""

import asyncio
import time
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import asyncpg

from tests.acceptance.processes import CEILING, Processes

STORED = """
SELECT trade_id, first_id, price, quantity, (extract(epoch FROM time) * 1000)::bigint AS t, side
FROM trades WHERE market_id = market($1, $2) ORDER BY trade_id
"""
EXPLAINED = """
SELECT from_id, to_id, status FROM gaps
WHERE market_id = market($1, $2) AND channel = 'trade' AND from_id IS NOT NULL
"""


@dataclass
class Account:
    """One market: ids published since the first one stored, and what became of each.

    `stored` gives every id that a row stands for the last id of its row, `wrong` the rows that
    differ from what was published.
    """

    published: dict[int, tuple[Any, ...]]
    stored: dict[int, int]
    wrong: list[tuple[Any, ...]]
    rows: int
    trades: int
    explained: set[int]
    open: set[int]

    @property
    def missing(self) -> set[int]:
        """Published, not stored, and not explained."""
        return self.published.keys() - self.stored.keys() - self.explained

    def verify(self) -> None:
        """Fail unless everything published is stored once, to the last digit, or explained."""
        assert self.trades == len(self.stored), "a trade is stored twice"
        assert not self.missing, f"missing: {sorted(self.missing)[:20]}"
        assert not self.open, f"gaps still open: {sorted(self.open)[:20]}"
        invented = self.stored.keys() - self.published.keys()
        assert not invented, f"never published: {sorted(invented)[:20]}"
        assert not self.explained & self.stored.keys(), "explained away and yet stored"
        assert not self.wrong, f"stored is {self.wrong[0]}"


async def account(
    dsn: str, running: Processes, symbol: str, exchange: str = "binance", first: int | None = None
) -> Account:
    """Compare the simulator's truth with the tables, from `first` or the first id stored."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(STORED, exchange, symbol)
        explained = await connection.fetch(EXPLAINED, exchange, symbol)
    finally:
        await connection.close()
    begin = first if first is not None else rows[0]["trade_id"]
    published: dict[int, tuple[Any, ...]] = {}
    start = begin
    while True:
        page = await asyncio.to_thread(
            running.control, f"trades?symbol={symbol}&from={start}&limit=10000"
        )
        for trade_id, price, quantity, t, is_buyer_maker in page:
            side = "sell" if is_buyer_maker else "buy"
            published[trade_id] = (Decimal(price), Decimal(quantity), t, side)
        if len(page) < 10_000:
            break
        start = page[-1][0] + 1
    ranges: dict[bool, set[int]] = {True: set(), False: set()}
    for gap in explained:
        if gap["status"] != "filled":
            ranges[gap["status"] == "open"] |= set(range(gap["from_id"], gap["to_id"] + 1))
    stored = {number: r["trade_id"] for r in rows for number in _ids(r) if number >= begin}
    return Account(
        published=published,
        stored=stored,
        wrong=[tuple(r) for r in rows if r["first_id"] >= begin and _differs(r, published)],
        rows=len(rows),
        trades=sum(len(_ids(r)) for r in rows if r["first_id"] >= begin),
        explained=ranges[False],
        open=ranges[True],
    )


def _ids(row: asyncpg.Record) -> range:
    return range(row["first_id"], row["trade_id"] + 1)


def _differs(row: asyncpg.Record, published: dict[int, tuple[Any, ...]]) -> bool:
    """Tell whether a row is not the last of its trades with the quantities of all."""
    if not set(_ids(row)) <= published.keys():
        return False  # it was never published, which is told as such
    price, _, t, side = published[row["trade_id"]]
    quantity = sum(published[number][1] for number in _ids(row))
    return (row["price"], row["quantity"], row["t"], row["side"]) != (price, quantity, t, side)


async def complete(
    dsn: str, running: Processes, symbols: list[str], firsts: dict[str, int] | None = None
) -> float:
    """Stop the market, wait until every market is accounted for; gives the seconds it took."""
    await asyncio.to_thread(running.control, "quiet", {})
    # Trades that come well after the last fault: a loss at the very end shows only by asking.
    await asyncio.sleep(2)
    await asyncio.to_thread(running.control, "source", {"action": "stop"})
    began = time.monotonic()
    while True:
        accounts = [
            await account(dsn, running, symbol, first=(firsts or {}).get(symbol))
            for symbol in symbols
        ]
        if not any(entry.missing or entry.open for entry in accounts):
            break
        if time.monotonic() - began > 2 * CEILING:
            break
        await asyncio.sleep(0.3)
    for entry in accounts:
        entry.verify()
    return time.monotonic() - began


async def fresh(dsn: str, since_micros: int) -> float:
    """Wait for a row received after an instant; gives the seconds it took."""
    began = time.monotonic()
    connection = await asyncpg.connect(dsn)
    try:
        while not await connection.fetchval(
            "SELECT EXISTS (SELECT FROM trades WHERE received_at >"
            " 'epoch'::timestamptz + $1 * interval '1 microsecond')",
            since_micros,
        ):
            assert time.monotonic() - began < CEILING, "no fresh trade"
            await asyncio.sleep(0.1)
    finally:
        await connection.close()
    return time.monotonic() - began
