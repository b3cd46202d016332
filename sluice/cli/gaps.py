"""`sluice gaps`: what is missing, why, and what was done about it."""

from typing import Annotated, Any, Final

import typer

from sluice.cli.output import Json, run, show
from sluice.connections import connect_postgres
from sluice.settings import Settings, parse_market

_GAPS: Final = """
SELECT m.exchange || ':' || m.symbol AS market, g.channel, g.status,
       g.from_id, g.to_id, g.to_id - g.from_id + 1 AS ids, g.from_time, g.to_time,
       g.cause, g.tries, g.opened_at, g.closed_at
FROM gaps AS g JOIN markets AS m USING (market_id)
WHERE ($1::text IS NULL OR (m.exchange = $1 AND m.symbol = $2))
  AND ($3::text IS NULL OR g.status = $3)
ORDER BY g.opened_at DESC
LIMIT $4
"""
_STATUSES: Final = ("open", "filled", "absent", "lost")


def gaps(
    market: Annotated[
        str | None, typer.Argument(help="exchange:SYMBOL; all markets where it is left out.")
    ] = None,
    status: Annotated[
        str | None, typer.Option(help="Only open, filled, absent or lost ones.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The most rows, newest first.")] = 50,
    *,
    as_json: Json = False,
) -> None:
    """List gaps, newest first.

    open: being worked on. filled: fetched since. absent: the exchange has no such id. lost: no
    longer served, or a window of a stream that can not be asked for again.
    """
    if status is not None and status not in _STATUSES:
        raise typer.BadParameter(f"{status!r} is none of {', '.join(_STATUSES)}")
    try:
        chosen = parse_market(market) if market else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    name = (chosen.exchange, chosen.symbol) if chosen else (None, None)

    async def work(settings: Settings) -> list[dict[str, Any]]:
        connection = await connect_postgres(settings)
        try:
            return [dict(row) for row in await connection.fetch(_GAPS, *name, status, limit)]
        finally:
            await connection.close()

    show(run(work), as_json=as_json, empty="no gaps")
