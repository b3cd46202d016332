"""`sluice db sizes`: how many bytes a row takes and how many gigabytes a day that makes."""

from typing import Any, Final

import asyncpg

from sluice.cli.output import Json, run, show
from sluice.connections import connect_postgres
from sluice.settings import Settings

_TABLES: Final = "trades", "orderbook_snapshots", "klines", "tickers"
_SIZES: Final = """
WITH last AS (
    SELECT max(time) AS time FROM {table}
), day AS (
    SELECT count(*) AS rows, extract(epoch FROM max(t.time) - min(t.time)) AS seconds
    FROM {table} AS t, last WHERE t.time > last.time - INTERVAL '1 day'
)
SELECT '{table}' AS "table", counted.rows,
       round(size.heap::numeric / nullif(counted.rows, 0), 1) AS table_bytes_a_row,
       round(size.index::numeric / nullif(counted.rows, 0), 1) AS index_bytes_a_row,
       round(day.seconds::numeric / 3600, 1) AS hours,
       round(day.rows * 86400 / nullif(day.seconds, 0)) AS rows_a_day,
       round((size.heap + size.index)::numeric / nullif(counted.rows, 0)
             * day.rows * 86400 / nullif(day.seconds, 0) / 1e9, 3) AS gb_a_day
FROM day, (SELECT count(*) AS rows FROM {table}) AS counted, (
    SELECT coalesce(sum(table_bytes + coalesce(toast_bytes, 0)), 0) AS heap,
           coalesce(sum(index_bytes), 0) AS index
    FROM chunks_detailed_size('{table}')
) AS size
"""


def sizes(*, as_json: Json = False) -> None:
    """Measure bytes a row of each table, and the gigabytes of a day like the last one stored.

    `hours` of that day are stored; fewer than 24 are multiplied. All rows are counted, which takes
    a while where there are many. Exit code 3 when the database can not be reached.
    """

    async def work(settings: Settings) -> list[dict[str, Any]]:
        connection = await connect_postgres(settings)
        try:
            return [dict(row) for table in _TABLES for row in await _size(connection, table)]
        finally:
            await connection.close()

    show(run(work), as_json=as_json, empty="")


async def _size(connection: asyncpg.Connection, table: str) -> list[asyncpg.Record]:
    rows: list[asyncpg.Record] = await connection.fetch(_SIZES.format(table=table), timeout=3600)
    return rows
