"""`sluice backfill`: has a range of a market's trades fetched once more."""

import asyncio
from typing import Annotated, Any, Final

import typer
from redis.asyncio import Redis
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sluice.cli.output import EXIT_UNEXPLAINED, Json, run, show
from sluice.connections import connect_redis
from sluice.queue import HEADS, Holes, head_field
from sluice.settings import Market, Settings, parse_market

POLL_SECONDS: Final = 0.25


def backfill(
    market: Annotated[str, typer.Argument(help="exchange:SYMBOL")],
    first: Annotated[int, typer.Option("--from", min=0, help="The first trade id.")],
    last: Annotated[int, typer.Option("--to", min=0, help="The last trade id, included.")],
    *,
    is_awaited: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until none of them is a hole.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Have the running collector fetch trades again by their ids, from the exchange's history.

    What is stored already stays as it is. When the wait is over, each id has been pushed or is
    named by a gap as absent or lost (`sluice gaps`). Ctrl-C ends the wait, not the work.

    Exit code 1 when the wait was ended early; 2 when the range is none that was recorded; 3 when
    Redis can not be reached.
    """
    try:
        chosen = parse_market(market)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if last < first:
        raise typer.BadParameter(f"{first} to {last} is no range")

    async def work(settings: Settings) -> int:
        redis = connect_redis(settings)
        try:
            return await reopen(redis, chosen, first, last, is_awaited=is_awaited)
        finally:
            await redis.aclose()

    try:
        left = run(work)
    except KeyboardInterrupt:
        typer.echo("the collector goes on with it", err=True)
        raise typer.Exit(EXIT_UNEXPLAINED) from None
    row: dict[str, Any] = {"market": str(chosen), "from_id": first, "to_id": last, "left": left}
    show([row], as_json=as_json, empty="")


async def reopen(redis: Redis, market: Market, first: int, last: int, *, is_awaited: bool) -> int:
    """Make the ids holes; gives how many of them still are, 0 after a wait. Raises redis' errors.

    Raises:
        typer.BadParameter: ids above the newest that was pushed are asked for.
    """
    field = head_field(market.exchange, market.symbol, "trade")
    head = await redis.hget(HEADS, field)
    if head is None:
        raise typer.BadParameter(f"no trade of {market} has been pushed to this Redis")
    if last > int(head):
        raise typer.BadParameter(f"the newest trade of {market} is {int(head)}")
    holes = Holes(redis, field)
    await holes.reopen([(first, last)])
    if is_awaited:
        await _filled(holes, market, first, last)
    return await _missing(holes, first, last)


async def _filled(holes: Holes, market: Market, first: int, last: int) -> None:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    count = last - first + 1
    console.print(f"waiting for the collector of {market} to fetch {count} trades", highlight=False)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(str(market), total=count)
        while left := await _missing(holes, first, last):
            progress.update(task, completed=count - left)
            await asyncio.sleep(POLL_SECONDS)
        progress.update(task, completed=count)


async def _missing(holes: Holes, first: int, last: int) -> int:
    overlaps = (min(hole.last, last) - max(hole.first, first) + 1 for hole in await holes.read())
    return sum(overlap for overlap in overlaps if overlap > 0)
