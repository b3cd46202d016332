"""`sluice backfill`: has a range of a market's history fetched, once more or for the first time."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import typer
from redis.asyncio import Redis
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sluice import records
from sluice.budget import Budget, Priority
from sluice.cli.output import EXIT_UNEXPLAINED, EXIT_UNREACHABLE, Json, run, show
from sluice.clock import MICROS_PER_SECOND, now_micros
from sluice.connections import connect_redis
from sluice.exchanges import EXCHANGES
from sluice.exchanges.base import BadFrameError
from sluice.queue import HEADS, WINDOWS, WINDOWS_FILLED, Holes, RecordQueue, head_field
from sluice.records import Gap
from sluice.rest import RestClient, RestError
from sluice.settings import Market, Settings, parse_market

POLL_SECONDS: Final = 0.25
TRADE: Final = "trade"
KLINE: Final = "kline_"
HOUR: Final = 3600 * MICROS_PER_SECOND
"""The longest time that a venue answers one question about aggregates for."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

Point = tuple[str, int]
"""An `id`, or a `time` in microseconds."""


def backfill(
    market: Annotated[str, typer.Argument(help="exchange:SYMBOL")],
    since: Annotated[
        str, typer.Option("--from", help="The first trade id, or a time: 2026-11-27T12:00, UTC.")
    ],
    until: Annotated[
        str, typer.Option("--to", help="The last trade id, included, or a time, not included.")
    ],
    *,
    stream: Annotated[str, typer.Option(help="trade, or candles such as kline_1m.")] = TRADE,
    is_awaited: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until none of them is missing.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Have the running collector fetch trades or candles from the exchange's history.

    What is stored already stays as it is. When the wait is over, each trade or candle has been
    pushed or is named by a gap as absent or lost (`sluice gaps`). Ctrl-C ends the wait, not the
    work; nor does the end of the collector, the next one goes on where it was.

    Exit code 1 when the wait was ended early; 2 when the range is none that can be had; 3 when
    Redis or the exchange can not be reached.
    """
    try:
        chosen = parse_market(market)
        points = _point(since), _point(until)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if points[1][1] < points[0][1] or points[0][0] != points[1][0]:
        raise typer.BadParameter(f"{since} to {until} is no range")
    is_kline = stream.startswith(KLINE)
    if not EXCHANGES[chosen.exchange].streams.fullmatch(stream) or not (
        is_kline or stream == TRADE
    ):
        raise typer.BadParameter(f"{stream!r} has no history: trade, or kline_1m, kline_1h, …")
    if is_kline and points[0][0] == "id":
        raise typer.BadParameter("candles have no ids: give times")

    async def work(settings: Settings) -> dict[str, Any]:
        redis = connect_redis(settings)
        try:
            if is_kline:
                start, end = points[0][1], min(points[1][1], now_micros())
                return await refill(redis, chosen, stream, (start, end), is_awaited=is_awaited)
            first, last = points[0][1], points[1][1]
            if points[0][0] == "time":
                first, last = await ids_between(settings, redis, chosen, first, last)
            left = await reopen(redis, chosen, first, last, is_awaited=is_awaited)
            return {"market": str(chosen), "from_id": first, "to_id": last, "left": left}
        finally:
            await redis.aclose()

    try:
        row = run(work)
    except KeyboardInterrupt:
        typer.echo("the collector goes on with it", err=True)
        raise typer.Exit(EXIT_UNEXPLAINED) from None
    except (RestError, BadFrameError) as error:
        typer.echo(f"the exchange does not say which ids these are: {error}", err=True)
        raise typer.Exit(EXIT_UNREACHABLE) from None
    show([row], as_json=as_json, empty="")


def _point(text: str) -> Point:
    if text.isascii() and text.isdigit():
        return "id", int(text)
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is neither a trade id nor a time like 2026-11-27T12:00"
        ) from None
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    if time < _EPOCH:
        raise ValueError(f"{text} is before 1970")
    return "time", (time - _EPOCH) // timedelta(microseconds=1)


async def ids_between(
    settings: Settings, redis: Redis, market: Market, since: int, until: int
) -> tuple[int, int]:
    """Ask the venue which trades a time holds (microseconds, the end not included).

    Raises redis' errors, RestError and BadFrameError.

    Raises:
        typer.BadParameter: it holds none.
    """
    exchange = EXCHANGES[market.exchange]
    rest = RestClient(exchange, settings, Budget(redis, exchange))

    async def first_from(time: int, end: int) -> int | None:
        while time < end:
            request = exchange.aggregates_request(market.symbol, time, min(time + HOUR, end) - 1)
            body = await rest.get(request, Priority.BACKFILL)
            trades = exchange.read_aggregates(market.symbol, body, now_micros())
            if trades:
                return trades[0].first_id
            time += HOUR
        return None

    try:
        now = now_micros()
        first = await first_from(since, min(until, now))
        if first is None:
            raise typer.BadParameter(f"{market} had no trade in that time")
        after = await first_from(until, now)
    finally:
        await rest.close()
    if after is not None:
        return first, after - 1
    head = await redis.hget(HEADS, head_field(market.exchange, market.symbol, TRADE))
    return first, max(first, int(head or first))


async def reopen(redis: Redis, market: Market, first: int, last: int, *, is_awaited: bool) -> int:
    """Make the ids holes; gives how many of them still are, 0 after a wait. Raises redis' errors.

    Raises:
        typer.BadParameter: ids above the newest that was pushed are asked for.
    """
    field = head_field(market.exchange, market.symbol, TRADE)
    head = await redis.hget(HEADS, field)
    if head is None:
        raise typer.BadParameter(f"no trade of {market} has been pushed to this Redis")
    if last > int(head):
        raise typer.BadParameter(f"the newest trade of {market} is {int(head)}")
    holes = Holes(redis, field)
    await holes.reopen([(first, last)])

    async def left() -> int:
        return await _missing(holes, first, last)

    if is_awaited:
        await _awaited(str(market), last - first + 1, "trades", left)
    return await left()


async def refill(
    redis: Redis, market: Market, stream: str, window: tuple[int, int], *, is_awaited: bool
) -> dict[str, Any]:
    """Have a window of candles fetched (microseconds); gives the row to show.

    Raises redis' errors.
    """
    start, end = window
    now = now_micros()
    gap = Gap(
        exchange=market.exchange,
        symbol=market.symbol,
        gap_id=f"{head_field(market.exchange, market.symbol, stream)}:{start}-{end}:asked",
        channel=stream,
        from_id=None,
        to_id=None,
        ts_from=start,
        ts_to=end,
        cause="asked for by sluice backfill",
        status="open",
        tries=0,
        revision=now,
        ts_opened=now,
        ts_closed=None,
    )
    await RecordQueue(redis, "gap").push([records.encode(gap)])
    await redis.hset(WINDOWS, gap.gap_id, records.encode(gap))

    async def left() -> int:
        if not await redis.hexists(WINDOWS, gap.gap_id):
            return 0
        filled = await redis.hget(WINDOWS_FILLED, gap.gap_id)
        return max(1, (end - int(filled or start)) // MICROS_PER_SECOND)

    if is_awaited:
        seconds = max(1, (end - start) // MICROS_PER_SECOND)
        await _awaited(f"{market} {stream}", seconds, "seconds", left)
    return {
        "market": str(market),
        "stream": stream,
        "from": _EPOCH + timedelta(microseconds=start),
        "to": _EPOCH + timedelta(microseconds=end),
        "left": await left(),
    }


async def _awaited(
    name: str, count: int, unit: str, count_left: Callable[[], Awaitable[int]]
) -> None:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console.print(f"waiting for the collector of {name} to fetch {count} {unit}", highlight=False)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=count)
        while left := await count_left():
            progress.update(task, completed=count - left)
            await asyncio.sleep(POLL_SECONDS)
        progress.update(task, completed=count)


async def _missing(holes: Holes, first: int, last: int) -> int:
    overlaps = (min(hole.last, last) - max(hole.first, first) + 1 for hole in await holes.read())
    return sum(overlap for overlap in overlaps if overlap > 0)
