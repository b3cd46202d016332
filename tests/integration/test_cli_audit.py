"""`sluice audit`: what it certifies, what it does not let pass, and that psql says the same."""

import csv
import io
import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg

from sluice.cli.audit import certify, in_psql
from sluice.cli.debian import inside
from sluice.settings import Market
from tests.integration.test_cli import sluice
from tests.servers import Database, execute

BTC = Market("binance", "BTCUSDT")
ALL = (datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC))
FILL = """
INSERT INTO markets (exchange, symbol, id_kind) VALUES ('binance', 'BTCUSDT', 'raw');
INSERT INTO trades (market_id, time, trade_id, first_id, price, quantity, side, received_at)
SELECT market('binance', 'BTCUSDT'), '2026-11-26 23:00Z'::timestamptz + n * interval '10 s',
       n, n, 100 + n % 7, 1, 'buy', now()
FROM generate_series(1, 1000) AS n;
INSERT INTO klines (market_id, interval, time, close_time, open, high, low, close, volume,
    quote_volume, trade_count, taker_buy_volume, taker_buy_quote_volume, first_trade_id,
    last_trade_id, received_at)
SELECT market_id, '1m', time, time + interval '59.999 s', open, high, low, close, volume,
       quote_volume, trade_count, 0, 0,
       (extract(epoch FROM time - '2026-11-26 23:00Z') / 10)::bigint,
       (extract(epoch FROM time - '2026-11-26 23:00Z') / 10)::bigint + 5, now()
FROM candles_1m WHERE time > '2026-11-26 23:00Z' AND trade_count = 6;
"""
GAP = """
INSERT INTO gaps (gap_id, market_id, channel, from_id, to_id, cause, status, tries, revision,
    opened_at)
VALUES ('{status}', market('binance', 'BTCUSDT'), 'trade', {first}, {last}, 'a test', '{status}',
    1, 1, now())
"""


async def certificates(database: Database, *statements: str) -> list[dict[str, Any]]:
    connection = await asyncpg.connect(database.dsn)
    try:
        for statement in (FILL, *statements):
            await connection.execute(statement)
        return await certify(connection, BTC, *ALL)
    finally:
        await connection.close()


async def test_a_whole_record_is_certified_day_by_day(postgres: Database) -> None:
    before, after = await certificates(postgres)

    assert (before["day"], before["first_id"], before["last_id"]) == ("2026-11-26", 1, 359)
    assert (after["day"], after["first_id"], after["last_id"]) == ("2026-11-27", 360, 1000)
    assert [row["expected"] for row in (before, after)] == [359, 641]
    assert [row["stored"] for row in (before, after)] == [359, 641]
    assert [row["klines"] for row in (before, after)] == [59, 106]
    faults = ("duplicates", "unexplained", "klines_different", "book_levels_different")
    assert not any(row[fault] for row in (before, after) for fault in faults)


async def test_what_is_missing_at_midnight_belongs_to_the_day_after(postgres: Database) -> None:
    before, after = await certificates(
        postgres, "DELETE FROM trades WHERE trade_id BETWEEN 355 AND 362"
    )

    assert (before["unexplained"], after["unexplained"]) == (0, 8)
    assert after["unexplained_ids"] == "355-362"


async def test_ids_that_cross_at_midnight_are_not_missing(postgres: Database) -> None:
    before, after = await certificates(
        postgres,
        "DELETE FROM klines",
        "UPDATE trades SET trade_id = 2359, first_id = 2359 WHERE trade_id = 359",
        "UPDATE trades SET trade_id = 359, first_id = 359 WHERE trade_id = 360",
        "UPDATE trades SET trade_id = 360, first_id = 360 WHERE trade_id = 2359",
    )

    assert (before["unexplained"], after["unexplained"]) == (0, 0)
    assert (before["stored"], after["stored"]) == (359, 641)


async def test_each_gap_counts_by_its_status(postgres: Database) -> None:
    _, day = await certificates(
        postgres,
        "DELETE FROM trades WHERE trade_id BETWEEN 500 AND 520",
        GAP.format(status="lost", first=500, last=501),
        GAP.format(status="absent", first=502, last=504),
        GAP.format(status="open", first=505, last=510),
        GAP.format(status="filled", first=511, last=514),
    )

    assert [day[status] for status in ("lost", "absent", "open", "filled")] == [2, 3, 6, 4]
    assert (day["expected"], day["stored"]) == (641, 620)
    assert (day["unexplained"], day["unexplained_ids"]) == (16, "505-520")
    # Candles with what is explained, 498 to 509, can not be the same; the other two are told.
    assert day["klines_different"] == 2


async def test_a_trade_that_is_there_twice_is_told_and_not_counted(postgres: Database) -> None:
    _, day = await certificates(
        postgres,
        "INSERT INTO trades SELECT time + interval '1 ms', 700, 698, received_at, market_id, side,"
        " price, quantity FROM trades WHERE trade_id = 700",
    )

    assert (day["duplicates"], day["expected"], day["stored"]) == (3, 641, 641)


async def test_the_exchanges_candles_tell_of_trades_after_the_last(postgres: Database) -> None:
    _, day = await certificates(postgres, "DELETE FROM trades WHERE trade_id > 980")

    assert (day["unexplained"], day["unexplained_ids"]) == (15, "981-995")


async def test_a_quantity_that_is_wrong_is_seen_in_the_candle(postgres: Database) -> None:
    _, day = await certificates(postgres, "UPDATE trades SET quantity = 2 WHERE trade_id = 700")

    assert (day["klines_different"], day["unexplained"]) == (1, 0)


async def test_of_opaque_ids_nothing_is_said(postgres: Database) -> None:
    _, day = await certificates(
        postgres,
        "UPDATE markets SET id_kind = 'opaque'",
        "DELETE FROM trades WHERE trade_id BETWEEN 500 AND 505",
    )

    assert (day["expected"], day["unexplained"]) == (635, 0)


def test_psql_gives_the_same_figures(postgres: Database, root: Path) -> None:
    execute(postgres, FILL, "DELETE FROM trades WHERE trade_id BETWEEN 500 AND 502")
    expected = json.loads(sluice(postgres.environment, "audit", "--json", code=1).stdout)

    done = subprocess.run(
        inside(root, None, ["psql", "--quiet", "--csv", "--set=ON_ERROR_STOP=1", postgres.dsn]),
        input=in_psql(BTC, *ALL),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    shown = list(csv.reader(io.StringIO(done.stdout)))
    names = shown[0]
    rows = [dict(zip(names, row, strict=True)) for row in shown if row != names]
    assert rows == [
        {name: "" if value is None else str(value) for name, value in row.items()}
        for row in expected
    ]
    assert [row["unexplained"] for row in rows] == ["0", "3"]


def test_a_market_without_trades_is_not_certified(postgres: Database) -> None:
    told = sluice(postgres.environment, "audit", "binance:BTCUSDT", code=1)
    assert "no trades in that range" in told.stdout
    assert json.loads(sluice(postgres.environment, "audit", "--json").stdout) == []
