"""Trades drawn at random, and the candles they must become, computed the slow way."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from typing import Any

import asyncpg

WIDTHS = {
    "candles_1m": timedelta(minutes=1),
    "candles_5m": timedelta(minutes=5),
    "candles_1h": timedelta(hours=1),
    "candles_1d": timedelta(days=1),
}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Row = dict[str, Any]


async def insert(connection: asyncpg.Connection, table: str, rows: Iterable[Row]) -> None:
    columns = await connection.fetchval(
        "SELECT string_agg(quote_ident(key), ', ') FROM json_object_keys($1::json) AS key",
        json.dumps(next(iter(rows)), default=str),
    )
    await connection.execute(
        f"INSERT INTO {table} ({columns})"
        f" SELECT {columns} FROM jsonb_populate_recordset(NULL::{table}, $1)"
        " ON CONFLICT DO NOTHING",
        json.dumps(list(rows), default=str),
    )


@dataclass(frozen=True)
class Candle:
    """What a row of any candle view must hold."""

    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal
    quote_volume: Decimal
    trade_count: int
    taker_buy_volume: Decimal


Candles = dict[tuple[int, datetime], Candle]


def draw_trades(seed: int, *, start: datetime, hours: int) -> list[Row]:
    """Draw trades of two markets: equal times, aggregates of several, many decimals."""
    draw = random.Random(seed)
    rows: list[Row] = []
    for market_id in (1, 2):
        trade_id = 1
        time = start
        while True:
            time += timedelta(milliseconds=draw.choice((0, 0, 1, 900, 40_000, 400_000)))
            if time >= start + timedelta(hours=hours):
                break
            last_id = trade_id + draw.choice((0, 0, 0, 3))
            rows.append(
                {
                    "market_id": market_id,
                    "time": time,
                    "trade_id": last_id,
                    "first_id": trade_id,
                    "price": Decimal(draw.randrange(1, 10**9)).scaleb(-draw.randrange(9)),
                    "quantity": Decimal(draw.randrange(1, 10**9)).scaleb(-draw.randrange(18)),
                    "side": draw.choice(("buy", "sell")),
                    "received_at": time + timedelta(milliseconds=30),
                }
            )
            trade_id = last_id + 1
    draw.shuffle(rows)
    return rows


def candles_of(trades: Iterable[Row], width: timedelta) -> Candles:
    """Compute candles the slow way."""
    buckets: defaultdict[tuple[int, datetime], list[Row]] = defaultdict(list)
    for row in sorted(trades, key=lambda row: row["trade_id"]):
        opens = EPOCH + (row["time"] - EPOCH) // width * width
        buckets[row["market_id"], opens].append(row)
    return {
        key: Candle(
            open=rows[0]["price"],
            high=max(row["price"] for row in rows),
            low=min(row["price"] for row in rows),
            close=rows[-1]["price"],
            volume=sum((row["quantity"] for row in rows), Decimal(0)),
            quote_volume=sum((row["price"] * row["quantity"] for row in rows), Decimal(0)),
            trade_count=sum(row["trade_id"] - row["first_id"] + 1 for row in rows),
            taker_buy_volume=sum(
                (row["quantity"] for row in rows if row["side"] == "buy"), Decimal(0)
            ),
        )
        for key, rows in buckets.items()
    }


async def assert_candles_are_of(connection: asyncpg.Connection, trades: list[Row]) -> None:
    for view, width in WIDTHS.items():
        stored = await connection.fetch(f"SELECT * FROM {view}")
        found = [
            (row["market_id"], row["time"], Candle(**dict(list(row.items())[2:]))) for row in stored
        ]
        with localcontext(prec=200):
            expected = candles_of(trades, width)
        assert {(market, time): candle for market, time, candle in found} == expected
        assert len(found) == len(stored)
