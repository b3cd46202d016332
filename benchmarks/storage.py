"""Bytes a trade wherever it lies, and how long a day of one-minute candles of one market takes.

    python -m benchmarks.storage [--rows 10000000] [--runs 5]

Makes trades of twenty markets over two days in the server: one a market every 346 ms, of a price
that swings by 500 with noise of 600 ticks on top, of a quantity of up to five decimals, received
30 ms later with a jitter of microseconds. They are asked for on a private PostgreSQL with the
Apache edition of TimescaleDB, and where SLUICE_COMMUNITY_DSN names a server of the Community
edition, there too: in a database of their own, which is dropped at the end.

What the columnstore takes depends on what trades are like, so the recorded ones of BTCUSDT and
ETHUSDT are measured too where they lie beside the repository: end to end, 40 times over.

Times are the median (least to most) of the runs, from question to last row, caches warm.
"""

import argparse
import asyncio
import gzip
import io
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import msgspec
from redis.asyncio import Redis

from benchmarks.flusher import make_trades
from flusher.tables import TABLES
from sluice import records
from sluice.cli.debian import ensure_root, why_not
from sluice.cli.servers import PostgresServer, RedisServer
from sluice.exchanges import EXCHANGES
from sluice.queue import RecordQueue
from sluice.records import Trade
from sluice.schema import read_schema

ROOT = Path(__file__).resolve().parents[1]
RECORDINGS = ROOT.parent / "shared" / "recordings" / "binance-spot"
TABLE = TABLES["trade"]
TURNS = 40
STEP = 500_000
LISTED = 100_000
FILL = """
INSERT INTO trades (market_id, time, trade_id, first_id, price, quantity, side, received_at)
SELECT market, time, i, i, price, quantity, side,
    time + INTERVAL '30 ms' + random() * INTERVAL '20 ms'
FROM (
    SELECT i, i % 20 + 1 AS market,
        date_trunc('milliseconds', '2026-11-20'::timestamptz
            + i * (INTERVAL '2 days' / $3::integer) + random() * INTERVAL '10 ms') AS time,
        round((60000 + 500 * sin(i / 20000.0) + random() * 6)::numeric, 2) AS price,
        round((random() * random() * 0.3)::numeric, 5) + 0.00001 AS quantity,
        CASE WHEN random() < 0.5 THEN 'buy' ELSE 'sell' END AS side
    FROM generate_series($1::integer, $2::integer) AS i
) AS made
ORDER BY market, time, i
"""
SIZES = """
SELECT sum(table_bytes)::bigint AS heap, sum(index_bytes)::bigint AS index,
    sum(toast_bytes)::bigint AS toast
FROM chunks_detailed_size('trades')
"""
CANDLES = """
SELECT time, open, high, low, close, volume, trade_count FROM candles_1m
WHERE market_id = 1 AND time >= '2026-11-20' AND time < '2026-11-21' ORDER BY time
"""
MINUTES = 24 * 60


async def measure(dsn: str, rows: int, runs: int) -> None:
    """Fill an empty database with the schema and print what it takes."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(read_schema())
        edition, version = await connection.fetchrow(
            "SELECT current_setting('timescaledb.license'), extversion FROM pg_extension"
            " WHERE extname = 'timescaledb'"
        ) or ("", "")
        is_community = edition == "timescale"
        print(f"\nTimescaleDB {version}, {'Community' if is_community else 'Apache'} edition")
        if is_community:
            # Its jobs would store candles meanwhile.
            await connection.execute(
                "SELECT alter_job(job_id, scheduled => false) FROM timescaledb_information.jobs"
                " WHERE hypertable_schema = 'public'"
            )
        await connection.execute("SELECT setseed(0.5)")
        for first in range(1, rows + 1, STEP):
            await connection.execute(FILL, first, min(first + STEP - 1, rows), rows)
        await connection.execute("VACUUM ANALYZE trades")
        heap, index, toast = await connection.fetchrow(SIZES) or (0, 0, 0)
        say("bytes a trade, table", f"{(heap + toast) / rows:.1f}")
        say("bytes a trade, index", f"{index / rows:.1f}")
        say("a day of candles, made from trades", await timed(connection, runs))
        if is_community:
            began = time.perf_counter()
            await connection.execute("SELECT compress_chunk(c) FROM show_chunks('trades') AS c")
            say("compressing all", f"{time.perf_counter() - began:.1f} s")
            size = await connection.fetchval(
                "SELECT sum(total_bytes)::bigint FROM chunks_detailed_size('trades')"
            )
            say("bytes a trade, columnstore, all in", f"{size / rows:.1f}")
            say("a day of candles, made from the columnstore", await timed(connection, runs))
        began = time.perf_counter()
        await connection.execute("CALL refresh_candles('-infinity', 'infinity')")
        say("storing the candles of all days", f"{time.perf_counter() - began:.1f} s")
        say("a day of candles, stored", await timed(connection, runs))
    finally:
        await connection.close()


async def measure_recorded(dsn: str) -> None:
    """Print what recorded trades take in the columnstore."""
    trades = recorded_trades()
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("TRUNCATE trades")
        await connection.execute(TABLE.create_staging)
        span = trades[-1].ts_event - trades[0].ts_event + 1_000_000
        ids = max(trade.trade_id for trade in trades) - min(trade.trade_id for trade in trades) + 1
        for turn in range(TURNS):
            moved = [
                msgspec.structs.replace(
                    trade,
                    trade_id=trade.trade_id + turn * ids,
                    first_id=trade.first_id + turn * ids,
                    ts_event=trade.ts_event + turn * span,
                    ts_recv=trade.ts_recv + turn * span,
                )
                for trade in trades
            ]
            text = TABLE.lines(
                [1 + (trade.symbol == "ETHUSDT") for trade in moved],
                list(map(msgspec.structs.astuple, moved)),
            )
            assert text is not None
            async with connection.transaction():
                await connection.copy_to_table(
                    TABLE.staging,
                    source=memoryview(text),  # type: ignore[arg-type]  # as flusher.writer
                    columns=TABLE.column_names,
                    null=TABLE.null,
                )
                status = await connection.execute(TABLE.insert)
                assert status == f"INSERT 0 {len(trades)}", status
        await connection.execute("SELECT compress_chunk(c) FROM show_chunks('trades') AS c")
        size = await connection.fetchval(
            "SELECT sum(total_bytes)::bigint FROM chunks_detailed_size('trades')"
        )
        say("bytes a recorded trade, columnstore, all in", f"{size / len(trades) / TURNS:.1f}")
    finally:
        await connection.close()


def recorded_trades() -> list[Trade]:
    """Read the recorded trades, in order of time."""
    trades = []
    for file in sorted(RECORDINGS.glob("spot_*usdt_*.gz")):
        with gzip.open(file, "rb") as lines:
            for line in lines:
                stamp, _, frame = line.partition(b" ")
                if b"@trade" in frame[:60]:
                    parsed = EXCHANGES["binance"].parse(frame, int(stamp) // 1000)
                    trades += [record for record in parsed if isinstance(record, Trade)]
    return sorted(trades, key=lambda trade: trade.ts_event)


async def timed(connection: asyncpg.Connection, runs: int) -> str:
    """Ask for the day of candles, as text, once to warm up and then `runs` times."""
    taken = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        status = await connection.copy_from_query(CANDLES, output=io.BytesIO())
        taken.append(1000 * (time.perf_counter() - began))
        assert status == f"COPY {MINUTES}", status
    _, *warm = taken
    return f"{statistics.median(warm):.1f} ms ({min(warm):.1f} to {max(warm):.1f})"


def say(what: str, value: str) -> None:
    """Print a figure."""
    print(f"  {what:46}{value}", flush=True)


async def measure_redis(server: RedisServer) -> None:
    """Fill a queue as the collector does, and print what Redis says it takes."""
    redis = Redis(port=server.port, password=server.password)
    try:
        queue = RecordQueue(redis, "trade")
        trades = [records.encode(trade) for trade in make_trades(LISTED)]
        for start in range(0, LISTED, 500):
            await redis.rpush(queue.key, *trades[start : start + 500])
        used = await redis.memory_usage(queue.key, samples=0)
        print(f"\nRedis {(await redis.info('server'))['redis_version']}")
        say("bytes a trade, its text", f"{sum(map(len, trades)) / LISTED:.1f}")
        say("bytes a trade, by MEMORY USAGE", f"{(used or 0) / LISTED:.1f}")
    finally:
        await redis.aclose()


@contextmanager
def community_database() -> Iterator[str | None]:
    """Make a database on the server of SLUICE_COMMUNITY_DSN, if there is one."""
    dsn = os.environ.get("SLUICE_COMMUNITY_DSN")
    if dsn is None:
        print("\nCommunity edition: left out, SLUICE_COMMUNITY_DSN names no server of it")
        yield None
        return
    name = f"sluice_benchmark_{secrets.token_hex(4)}"

    async def execute(statement: str) -> None:
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(execute(f"CREATE DATABASE {name} TEMPLATE template0"))
    try:
        yield urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))
    finally:
        asyncio.run(execute(f"DROP DATABASE {name} WITH (FORCE)"))


def main() -> None:
    """Bring the servers, fill them, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    if problem := why_not():
        sys.exit(
            f"the benchmark brings servers of its own, which needs a private Debian: {problem}"
        )
    root = ensure_root(ROOT / ".services", print)
    print(f"{arguments.rows:,} trades")
    with tempfile.TemporaryDirectory(prefix="sluice-benchmark-") as directory:
        redis = RedisServer(root, Path(directory) / "redis")
        postgres = PostgresServer(
            root,
            Path(directory) / "postgres",
            options={"shared_buffers": "512MB", "max_wal_size": "4GB"},
        )
        try:
            redis.start()
            asyncio.run(measure_redis(redis))
            redis.kill()
            postgres.start()
            postgres.create_database("benchmark")
            asyncio.run(measure(postgres.dsn_of("benchmark"), arguments.rows, arguments.runs))
        finally:
            postgres.kill()
            redis.kill()
    with community_database() as dsn:
        if dsn is not None:
            asyncio.run(measure(dsn, arguments.rows, arguments.runs))
            if RECORDINGS.is_dir():
                asyncio.run(measure_recorded(dsn))


if __name__ == "__main__":
    main()
