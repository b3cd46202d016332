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
WITH market AS (
    SELECT exchange || ':' || symbol AS name, id_kind FROM markets WHERE market_id = $1::int
), near AS (
    -- an hour more on both sides, as ids and times may cross at midnight
    SELECT * FROM trades
    WHERE market_id = $1::int AND time >= $2::timestamptz - INTERVAL '1 hour'
      AND time < $3::timestamptz + INTERVAL '1 hour'
    UNION ALL
    (SELECT * FROM trades
     WHERE market_id = $1::int AND time < $2::timestamptz - INTERVAL '1 hour'
     ORDER BY time DESC, trade_id DESC LIMIT 1)
), day AS (
    SELECT * FROM (
        SELECT near.*, max(trade_id) OVER (
            ORDER BY trade_id, time ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
        FROM near
    ) AS ordered
    WHERE time >= $2::timestamptz AND time < $3::timestamptz
), stored AS (
    SELECT min(first_id) AS first_id, max(trade_id) AS last_id,
           coalesce(sum(trade_id - first_id + 1), 0)::bigint AS trades,
           coalesce(sum(least(before, trade_id) - first_id + 1)
               FILTER (WHERE first_id <= before), 0)::bigint AS duplicates
    FROM day
), told AS (
    -- the exchange's own candles tell of trades after the last that anybody stored
    SELECT max(last_trade_id) AS last_id FROM klines
    WHERE market_id = $1::int AND interval = '1m' AND time >= $2::timestamptz
      AND close_time < least($3::timestamptz, now() - INTERVAL '1 minute')
      AND NOT EXISTS (SELECT FROM trades WHERE market_id = $1::int
                      AND time >= $3::timestamptz + INTERVAL '1 hour')
), missing AS (
    -- what is missing at midnight belongs to the day after it
    SELECT coalesce(range_agg(ids), '{}'::int8multirange) AS ids FROM (
        SELECT int8range(before + 1, first_id) AS ids FROM day, market
        WHERE first_id > before + 1 AND id_kind <> 'opaque'
        UNION ALL
        SELECT int8range(held.last_id + 1, told.last_id + 1)
        FROM told, market, (SELECT max(trade_id) AS last_id FROM near) AS held
        WHERE told.last_id > held.last_id AND id_kind = 'raw'
    ) AS ranges
), named AS (
    SELECT status, range_agg(int8range(from_id, to_id, '[]')) AS ids FROM gaps
    WHERE market_id = $1::int AND channel = 'trade' AND from_id IS NOT NULL
    GROUP BY status
), explained AS (
    SELECT coalesce(range_agg(part), '{}'::int8multirange) AS ids
    FROM named, unnest(named.ids) AS part WHERE status IN ('absent', 'lost')
), unexplained AS (
    SELECT missing.ids - explained.ids AS ids FROM missing, explained
), counted AS (
    SELECT coalesce(sum(upper(r) - lower(r)) FILTER (WHERE status = 'filled'), 0) AS filled,
           coalesce(sum(upper(m) - lower(m)) FILTER (WHERE status = 'absent'), 0) AS absent,
           coalesce(sum(upper(m) - lower(m)) FILTER (WHERE status = 'lost'), 0) AS lost,
           coalesce(sum(upper(m) - lower(m)) FILTER (WHERE status = 'open'), 0) AS open
    FROM (
        SELECT status, r, NULL::int8range AS m
        FROM named, stored, unnest(
            named.ids * int8multirange(int8range(stored.first_id, stored.last_id, '[]'))) AS r
        UNION ALL
        SELECT status, NULL, m FROM named, missing, unnest(named.ids * missing.ids) AS m
    ) AS parts
), candles AS (
    SELECT date_trunc('minute', time) AS time,
           first(price, trade_id) AS open, max(price) AS high, min(price) AS low,
           last(price, trade_id) AS close, sum(quantity) AS volume,
           sum(trade_id - first_id + 1) AS trade_count
    FROM day GROUP BY 1
), compared AS (
    -- a minute that the record does not cover from its start is no evidence, and one with trades
    -- that are known to be missing can not be the same
    SELECT count(*) AS klines, count(*) FILTER (
        WHERE ((k.open, k.high, k.low, k.close, k.volume)
                   IS DISTINCT FROM (c.open, c.high, c.low, c.close, c.volume)
               OR market.id_kind = 'raw' AND k.trade_count IS DISTINCT FROM c.trade_count)
          AND NOT (market.id_kind = 'raw' AND explained.ids
                   && int8range(k.first_trade_id, k.last_trade_id, '[]'))
    ) AS different
    FROM market, explained, klines AS k
    LEFT JOIN candles AS c USING (time)
    CROSS JOIN (SELECT time, first_id FROM trades WHERE market_id = $1::int
                ORDER BY time, trade_id LIMIT 1) AS began
    WHERE k.market_id = $1::int AND k.interval = '1m' AND k.time >= $2::timestamptz
      AND k.close_time < least($3::timestamptz, now() - INTERVAL '1 minute') AND k.trade_count > 0
      AND (k.time > began.time
           OR market.id_kind = 'raw' AND k.first_trade_id >= began.first_id)
), books AS (
    SELECT count(*) AS rows FROM orderbook_snapshots
    WHERE market_id = $1::int AND time >= $2::timestamptz AND time < $3::timestamptz
), images AS (
    SELECT count(*) AS rows, coalesce(sum(levels_different), 0)::bigint AS different
    FROM book_audits
    WHERE market_id = $1::int AND time >= $2::timestamptz AND time < $3::timestamptz
), windows AS (
    SELECT count(*) AS rows FROM gaps
    WHERE market_id = $1::int AND channel = 'depth'
      AND from_time < $3::timestamptz AND to_time > $2::timestamptz
)
SELECT market.name AS market, to_char($2::timestamptz AT TIME ZONE 'UTC', 'YYYY-MM-DD') AS day,
       stored.first_id, stored.last_id,
       stored.trades - stored.duplicates + (
           SELECT coalesce(sum(upper(r) - lower(r)), 0) FROM missing, unnest(missing.ids) AS r
       )::bigint AS expected,
       stored.trades - stored.duplicates AS stored, stored.duplicates,
       counted.filled::bigint, counted.absent::bigint, counted.lost::bigint, counted.open::bigint,
       (SELECT coalesce(sum(upper(r) - lower(r)), 0)::bigint
        FROM unexplained, unnest(unexplained.ids) AS r) AS unexplained,
       (SELECT string_agg(CASE WHEN upper(r) - lower(r) = 1 THEN lower(r)::text
                               ELSE lower(r) || '-' || upper(r) - 1 END, ' ')
        FROM (SELECT r FROM unexplained, unnest(unexplained.ids) AS r LIMIT 20) AS listed)
           AS unexplained_ids,
       compared.klines, compared.different AS klines_different,
       books.rows AS book_rows, images.rows AS book_images,
       images.different AS book_levels_different, windows.rows AS book_windows_missed
FROM market, stored, counted, compared, books, images, windows
"""
"""Parameters: market_id, start and end of the day. Multiranges subtract what `gaps` explains."""

_DAYS: Final = """
SELECT DISTINCT m.exchange, m.symbol, m.market_id, date_trunc('day', t.time, 'UTC') AS day
FROM markets AS m JOIN trades AS t USING (market_id)
WHERE ($1::text IS NULL OR (m.exchange = $1 AND m.symbol = $2))
  AND t.time >= $3 AND t.time < $4
ORDER BY 1, 2, 4
"""
_IN_PSQL: Final = """\
-- Run it with psql: it prints the certificates of `sluice audit`, one after the other.
SET TIME ZONE 'UTC';
PREPARE certificate (int, timestamptz, timestamptz) AS
{certificate};

SELECT DISTINCT
    format('EXECUTE certificate(%s, %L, %L)', market_id,
           greatest(date_trunc('day', time, 'UTC'), {since}::timestamptz),
           least(date_trunc('day', time, 'UTC') + INTERVAL '1 day', {until}::timestamptz))
FROM trades
WHERE {market}time >= {since}::timestamptz AND time < {until}::timestamptz
ORDER BY 1 \\gexec
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
    sql: Annotated[
        bool, typer.Option("--sql", help="Print what gives the same in psql instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Certify each market and day: ids expected and stored, what is missing and why.

    Candles are made of the stored trades and compared with the exchange's own, books with the
    exchange's images. `sluice audit --sql | psql` gives the same figures.

    Exit code 1 when anything is missing that no gap explains, twice there, or differs from what the
    exchange says, or when the market named has no trades there; 3 when the database can not be
    reached.
    """
    try:
        chosen = parse_market(market) if market else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    start = since.replace(tzinfo=UTC) if since else _BEGINNING
    end = until.replace(tzinfo=UTC) if until else _END
    if sql:
        sys.stdout.write(in_psql(chosen, start, end))
        return

    async def work(settings: Settings) -> list[dict[str, Any]]:
        connection = await connect_postgres(settings)
        try:
            return await certify(connection, chosen, start, end)
        finally:
            await connection.close()

    rows = run(work)
    if as_json or not rows:
        show(rows, as_json=as_json, empty="no trades in that range")
    else:
        sys.stdout.write("".join(map(_in_words, rows)))
    for row in rows:
        if row["unexplained"] and not as_json:
            sys.stderr.write(
                f"{row['market']} {row['day']}: {row['unexplained']} trades are missing "
                f"unexplained: {row['unexplained_ids']}\n"
            )
    if any(map(_faults, rows)) or (chosen and not rows):
        raise typer.Exit(EXIT_UNEXPLAINED)


def in_psql(market: Market | None, start: datetime, end: datetime) -> str:
    """Write what psql turns into the same certificates."""
    # A market's name holds no quotes.
    chosen = f"market_id = market('{market.exchange}', '{market.symbol}') AND " if market else ""
    return _IN_PSQL.format(
        certificate=CERTIFICATE.strip(),
        market=chosen,
        since=f"'{start.isoformat()}'",
        until=f"'{end.isoformat()}'",
    )


def _faults(row: dict[str, Any]) -> list[str]:
    return [fault for fault in _FAULTS if row[fault]]


def _in_words(row: dict[str, Any]) -> str:
    verdict = "complete"
    if faults := _faults(row):
        verdict = f"NOT SOUND: {', '.join(fault.replace('_', ' ') for fault in faults)}"
    elif row["expected"] > row["stored"]:
        verdict = "complete but for what is explained"
    return (
        f"{row['market']} {row['day']}: {verdict}\n"
        f"  trades   {row['first_id']} to {row['last_id']}: {row['expected']} expected, "
        f"{row['stored']} stored, {row['duplicates']} duplicates\n"
        f"  gaps     {row['filled']} filled, {row['absent']} absent, {row['lost']} lost, "
        f"{row['open']} open, {row['unexplained']} unexplained\n"
        f"  candles  {row['klines']} compared with the exchange's, "
        f"{row['klines_different']} different\n"
        f"  books    {row['book_rows']} rows in sync, {row['book_images']} images compared, "
        f"{row['book_levels_different']} levels different, "
        f"{row['book_windows_missed']} windows missed\n"
    )


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
        certificates.append(dict(row or {}))
    return certificates
