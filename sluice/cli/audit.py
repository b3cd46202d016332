"""`sluice audit`: a certificate a market and day that a sceptic can recompute in psql."""

import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import asyncpg
import typer

from sluice.cli.output import EXIT_UNEXPLAINED, Json, run, show
from sluice.connections import connect_postgres
from sluice.settings import Market, Settings, parse_market

CERTIFICATE: Final = """
WITH day AS (
    SELECT $1::int AS market_id, $2::timestamptz AS since, $3::timestamptz AS until
), held AS (
    SELECT first_id, trade_id,
           -- the trade before the day counts too: what is missing at midnight belongs to the day
           lag(trade_id) OVER (ORDER BY trade_id) AS before
    FROM (
        SELECT t.first_id, t.trade_id FROM trades AS t, day
        WHERE t.market_id = day.market_id AND t.time >= day.since AND t.time < day.until
        UNION ALL
        (SELECT t.first_id, t.trade_id FROM trades AS t, day
         WHERE t.market_id = day.market_id AND t.time < day.since
         ORDER BY t.time DESC, t.trade_id DESC LIMIT 1)
    ) AS rows
), missing AS (
    SELECT coalesce(range_agg(int8range(before + 1, first_id)), '{}'::int8multirange) AS ids
    FROM held WHERE first_id > before + 1
), explained AS (
    SELECT status, range_agg(int8range(from_id, to_id, '[]')) AS ids
    FROM gaps JOIN day USING (market_id)
    WHERE channel = 'trade' AND from_id IS NOT NULL
    GROUP BY status
), unexplained AS (
    SELECT missing.ids - coalesce(
        (SELECT range_agg(part) FROM explained, unnest(explained.ids) AS part
         WHERE status IN ('absent', 'lost')), '{}'::int8multirange) AS ids
    FROM missing
), stored AS (
    SELECT count(*) AS rows, count(DISTINCT t.trade_id) AS ids,
           min(t.first_id) AS first_id, max(t.trade_id) AS last_id,
           coalesce(sum(t.trade_id - t.first_id + 1), 0)::bigint AS trades
    FROM trades AS t, day
    WHERE t.market_id = day.market_id AND t.time >= day.since AND t.time < day.until
), candles AS (
    -- a minute that the record does not cover from its start is no evidence
    SELECT count(*) AS compared,
           count(*) FILTER (
               WHERE (k.open, k.high, k.low, k.close, k.volume, k.trade_count)
                   IS DISTINCT FROM (c.open, c.high, c.low, c.close, c.volume, c.trade_count)
           ) AS different
    FROM klines AS k
    JOIN day USING (market_id)
    LEFT JOIN (
        SELECT * FROM candles_1m
        WHERE market_id = $1::int AND time >= $2::timestamptz AND time < $3::timestamptz
    ) AS c ON c.time = k.time
    WHERE k.interval = '1m' AND k.time >= day.since AND k.time < day.until AND k.trade_count > 0
      AND k.first_trade_id >= (SELECT min(t.first_id) FROM trades AS t
                               WHERE t.market_id = day.market_id)
), books AS (
    SELECT count(*) AS rows FROM orderbook_snapshots AS b, day
    WHERE b.market_id = day.market_id AND b.time >= day.since AND b.time < day.until
), audits AS (
    SELECT coalesce(sum(levels_different), 0)::bigint AS different FROM book_audits AS a, day
    WHERE a.market_id = day.market_id AND a.time >= day.since AND a.time < day.until
)
SELECT stored.first_id, stored.last_id,
       stored.trades + (SELECT coalesce(sum(upper(r) - lower(r)), 0)::bigint
                        FROM missing, unnest(missing.ids) AS r) AS expected,
       stored.trades AS stored,
       stored.rows - stored.ids AS duplicates,
       (SELECT coalesce(sum(upper(r) - lower(r)), 0)::bigint
        FROM missing, explained, unnest(missing.ids * explained.ids) AS r
        WHERE explained.status = 'absent') AS absent,
       (SELECT coalesce(sum(upper(r) - lower(r)), 0)::bigint
        FROM missing, explained, unnest(missing.ids * explained.ids) AS r
        WHERE explained.status = 'lost') AS lost,
       (SELECT coalesce(sum(upper(r) - lower(r)), 0)::bigint
        FROM unexplained, unnest(unexplained.ids) AS r) AS unexplained,
       (SELECT string_agg(CASE WHEN upper(r) - lower(r) = 1 THEN lower(r)::text
                               ELSE lower(r) || '-' || upper(r) - 1 END, ' ')
        FROM (SELECT r FROM unexplained, unnest(unexplained.ids) AS r LIMIT 20) AS first)
           AS unexplained_ids,
       candles.compared AS klines, candles.different AS klines_different,
       books.rows AS book_rows, audits.different AS book_levels_different
FROM stored, candles, books, audits
"""
"""Parameters: market_id, start and end of the day. Multiranges subtract what `gaps` explains."""

_DAYS: Final = """
SELECT m.exchange, m.symbol, m.market_id, date_trunc('day', t.time, 'UTC') AS day
FROM markets AS m JOIN trades AS t USING (market_id)
WHERE ($1::text IS NULL OR (m.exchange = $1 AND m.symbol = $2))
  AND t.time >= $3 AND t.time < $4
GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 4
"""
_BEGINNING: Final = datetime(1970, 1, 1, tzinfo=UTC)
_END: Final = datetime(9999, 1, 1, tzinfo=UTC)
_FAULTS: Final = ("unexplained", "duplicates", "klines_different", "book_levels_different")


def audit(
    market: Annotated[
        str | None, typer.Argument(help="exchange:SYMBOL; all markets where it is left out.")
    ] = None,
    since: Annotated[datetime | None, typer.Option("--from", help="The first day, UTC.")] = None,
    until: Annotated[
        datetime | None, typer.Option("--to", help="The end, not included, UTC.")
    ] = None,
    *,
    sql: Annotated[bool, typer.Option("--sql", help="Print the query instead.")] = False,
    as_json: Json = False,
) -> None:
    """Certify each market and day: ids expected and stored, what is missing and why.

    Exit code 1 when anything is missing that no gap explains, twice there, or differs from the
    exchange's own candles; 3 when the database can not be reached.
    """
    if sql:
        sys.stdout.write(CERTIFICATE.strip() + "\n")
        return
    try:
        chosen = parse_market(market) if market else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    start = since.replace(tzinfo=UTC) if since else _BEGINNING
    end = until.replace(tzinfo=UTC) if until else _END

    async def work(settings: Settings) -> list[dict[str, Any]]:
        connection = await connect_postgres(settings)
        try:
            return await certify(connection, chosen, start, end)
        finally:
            await connection.close()

    rows = run(work)
    show(rows, as_json=as_json, empty="no trades in that range")
    for row in rows:
        if row["unexplained"] and not as_json:
            sys.stderr.write(
                f"{row['market']} {row['day']}: {row['unexplained']} trades are missing "
                f"unexplained: {row['unexplained_ids']}\n"
            )
    if any(row[fault] for row in rows for fault in _FAULTS):
        raise typer.Exit(EXIT_UNEXPLAINED)


async def certify(
    connection: asyncpg.Connection, market: Market | None, start: datetime, end: datetime
) -> list[dict[str, Any]]:
    """Give a row a market and day of the range, in the order of their names and days."""
    name = (market.exchange, market.symbol) if market else (None, None)
    certificates = []
    for found in await connection.fetch(_DAYS, *name, start, end):
        day: datetime = found["day"]
        midnight = day + timedelta(days=1)
        row = await connection.fetchrow(
            CERTIFICATE, found["market_id"], max(day, start), min(midnight, end)
        )
        certificates.append(
            {
                "market": f"{found['exchange']}:{found['symbol']}",
                "day": f"{day:%Y-%m-%d}",
                **dict(row or {}),
            }
        )
    return certificates
