"""`sluice markets`, `top` and `book`: what is recorded, what trades most, how a book stands."""

import sys
from datetime import UTC, datetime, timedelta
from itertools import zip_longest
from typing import Annotated, Any, Final

import msgspec
import typer
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from sluice.cli.output import EXIT_UNEXPLAINED, Json, run, show
from sluice.clock import MICROS_PER_SECOND
from sluice.connections import connect_postgres, connect_redis
from sluice.queue import book_key
from sluice.records import Level
from sluice.settings import Market, Settings, parse_market

_MARKETS: Final = """
SELECT m.exchange || ':' || m.symbol AS market, m.id_kind, oldest.time AS since,
       newest.time AS last_time, newest.trade_id AS last_id, newest.price AS last_price,
       (SELECT count(*) FROM gaps AS g
        WHERE g.market_id = m.market_id AND g.status = 'open') AS open_gaps
FROM markets AS m
LEFT JOIN LATERAL (
    SELECT time FROM trades WHERE market_id = m.market_id ORDER BY time LIMIT 1
) AS oldest ON true
LEFT JOIN LATERAL (
    SELECT time, trade_id, price FROM trades WHERE market_id = m.market_id
    ORDER BY time DESC, trade_id DESC LIMIT 1
) AS newest ON true
ORDER BY m.exchange, m.symbol
"""
_TOP: Final = """
SELECT m.exchange || ':' || m.symbol AS market, sum(trade_count)::bigint AS trades,
       trim_scale(sum(volume)) AS volume, trim_scale(sum(quote_volume)) AS quote_volume,
       round(100 * sum(taker_buy_volume) / sum(volume), 1) AS bought_percent,
       trim_scale(min(low)) AS low, trim_scale(max(high)) AS high,
       trim_scale(last(close, time)) AS last,
       round(100 * (last(close, time) / first(open, time) - 1), 2) AS change_percent
FROM candles_1m JOIN markets AS m USING (market_id)
WHERE time >= $1
GROUP BY m.exchange, m.symbol
ORDER BY sum(quote_volume) DESC, 1
LIMIT $2
"""
_LAST_BOOK: Final = """
SELECT event_time, update_id, sync_id, bid_prices, bid_sizes, ask_prices, ask_sizes
FROM orderbook_snapshots WHERE market_id = market($1, $2) ORDER BY time DESC LIMIT 1
"""


class Book(msgspec.Struct, frozen=True):
    """The top of a book, best level first, and where it was read.

    `source` is `live` where the orderbook process vouches for it now, `stored` where it is the last
    row of the database; `time` is the exchange's.
    """

    market: str
    source: str
    time: datetime
    update_id: int
    sync_id: int
    bids: list[Level]
    asks: list[Level]


def markets(*, as_json: Json = False) -> None:
    """List the markets in the database: since when, the last trade, how many gaps are open.

    Exit code 3 when the database can not be reached.
    """
    show(_rows(_MARKETS), as_json=as_json, empty="no markets")


def top(
    hours: Annotated[float, typer.Option(min=0.02, max=8760, help="How far back.")] = 24.0,
    limit: Annotated[int, typer.Option(min=1, help="The most rows.")] = 20,
    *,
    as_json: Json = False,
) -> None:
    """List the markets by what they traded in the quote currency, from the candles of minutes.

    Volumes in different quote currencies do not compare. Exit code 3 when the database can not be
    reached.
    """
    since = datetime.now(UTC) - timedelta(hours=hours)
    show(_rows(_TOP, since, limit), as_json=as_json, empty="no trades in that time")


def book(
    market: Annotated[str, typer.Argument(help="exchange:SYMBOL")],
    levels: Annotated[int, typer.Option(min=1, help="The most levels of each side.")] = 10,
    *,
    as_json: Json = False,
) -> None:
    """Show a market's book: the live one, else the last that was stored.

    Exit code 1 where there is neither; 3 when a server can not be reached.
    """
    try:
        chosen = parse_market(market)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

    async def work(settings: Settings) -> Book | None:
        redis = connect_redis(settings)
        try:
            live = await _live(redis, chosen)
        finally:
            await redis.aclose()
        return live or await _stored(settings, chosen)

    found = run(work)
    if found is None:
        typer.echo(f"there is no book of {chosen}", err=True)
        raise typer.Exit(EXIT_UNEXPLAINED)
    found = msgspec.structs.replace(found, bids=found.bids[:levels], asks=found.asks[:levels])
    if as_json:
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    else:
        _draw(found)


def _rows(query: str, *arguments: object) -> list[dict[str, Any]]:
    async def work(settings: Settings) -> list[dict[str, Any]]:
        connection = await connect_postgres(settings)
        try:
            return [dict(row) for row in await connection.fetch(query, *arguments)]
        finally:
            await connection.close()

    return run(work)


async def _live(redis: Redis, market: Market) -> Book | None:
    held = await redis.hgetall(book_key(market.exchange, market.symbol))
    if held.get(b"state") != b"live":
        return None
    sides = msgspec.json.decode(held[b"data"], type=dict[str, list[Level]])
    return Book(
        market=str(market),
        source="live",
        time=datetime.fromtimestamp(int(held[b"timestamp"]) / MICROS_PER_SECOND, UTC),
        update_id=int(held[b"update_id"]),
        sync_id=int(held[b"sync_id"]),
        bids=sides["bids"],
        asks=sides["asks"],
    )


async def _stored(settings: Settings, market: Market) -> Book | None:
    connection = await connect_postgres(settings)
    try:
        row = await connection.fetchrow(_LAST_BOOK, market.exchange, market.symbol)
    finally:
        await connection.close()
    if row is None:
        return None
    bids, asks = (
        [(f"{p:f}", f"{s:f}") for p, s in zip(row[f"{k}_prices"], row[f"{k}_sizes"], strict=True)]
        for k in ("bid", "ask")
    )
    return Book(
        market=str(market),
        source="stored",
        time=row["event_time"],
        update_id=row["update_id"],
        sync_id=row["sync_id"],
        bids=bids,
        asks=asks,
    )


def _draw(found: Book) -> None:
    title = f"{found.market} {found.source}, {found.time:%Y-%m-%d %H:%M:%S.%f}, {found.update_id}"
    table = Table(box=None, header_style="bold")
    for name in ("bid size", "bid", "ask", "ask size"):
        table.add_column(name, justify="right")
    for bid, ask in zip_longest(found.bids, found.asks, fillvalue=("", "")):
        table.add_row(bid[1], bid[0], ask[0], ask[1])
    console = Console()
    console.print(title, highlight=False)
    console.print(table)
