"""`sluice status`: everything on one screen, read from Redis and SQL."""

import asyncio
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from sluice.cli.observer import Observer, Sample
from sluice.cli.output import EXIT_UNREACHABLE, Json, run, stdout_console
from sluice.cli.screen import screen
from sluice.connections import connect_postgres
from sluice.settings import Market, Settings

RATE_SECONDS: Final = 1.0
_MARKETS: Final = "SELECT exchange, symbol FROM markets ORDER BY exchange, symbol"


def status(
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until Ctrl-C.")] = False,
    seconds: Annotated[float, typer.Option(min=0.2, help="Between two looks.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Show markets, books, queues, what is committed, gaps and dead letters.

    The markets are those of SYMBOLS, or all in the database. Exit code 3 when a server can not be
    reached.
    """

    async def work(settings: Settings) -> str:
        markets = settings.markets or await _markets(settings)
        observer = Observer(settings, markets)
        try:
            await observer.sample()
            await asyncio.sleep(RATE_SECONDS)
            sample = await observer.sample()
            if as_json:
                typer.echo(
                    msgspec.json.encode(_facts(sample, await observer.gap_counts())).decode()
                )
            elif watch:
                with Live(_draw(sample, await observer.gap_counts()), auto_refresh=False) as live:
                    while True:
                        await asyncio.sleep(seconds)
                        sample = await observer.sample()
                        live.update(_draw(sample, await observer.gap_counts()), refresh=True)
            else:
                stdout_console().print(_draw(sample, await observer.gap_counts()))
            return sample.problem
        finally:
            await observer.close()

    try:
        problem = run(work)
    except KeyboardInterrupt:
        return
    if problem:
        raise typer.Exit(EXIT_UNREACHABLE)


def _draw(sample: Sample, gaps: dict[str, int]) -> RenderableType:
    told = ", ".join(f"{number} {status}" for status, number in gaps.items()) or "none"
    return Group(screen(sample, "Sluice"), Text(f"gaps: {told}"))


def _facts(sample: Sample, gaps: dict[str, int]) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(sample, enc_hook=str)
    for market, state in zip(facts["markets"], sample.markets, strict=True):
        market["market"] = str(state.market)
    return {**facts, "gaps": gaps}


async def _markets(settings: Settings) -> list[Market]:
    connection = await connect_postgres(settings)
    try:
        return [Market(row["exchange"], row["symbol"]) for row in await connection.fetch(_MARKETS)]
    finally:
        await connection.close()
