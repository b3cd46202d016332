"""schema.sql on a real server: idempotent, exact, strict, and the same on both editions."""

import asyncio
import itertools
import re
import secrets
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import asyncpg
import pytest

from tests.integration.candles import (
    EPOCH,
    WIDTHS,
    Row,
    assert_candles_are_of,
    draw_trades,
    insert,
)
from tests.integration.conftest import Server
from tests.servers import SCHEMA, execute

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(
    r"```sql\n(.*?)```", (ROOT / "docs" / "sql.md").read_text(encoding="utf-8"), re.DOTALL
)
DAY = datetime(2026, 3, 1, tzinfo=UTC)


async def _apply(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(SCHEMA)
    finally:
        await connection.close()


async def _is_community(connection: asyncpg.Connection) -> bool:
    return bool(
        await connection.fetchval("SELECT current_setting('timescaledb.license') = 'timescale'")
    )


# Running it ------------------------------------------------------------------------------------


async def test_a_second_run_changes_nothing(database: asyncpg.Connection) -> None:
    catalogue = """
        SELECT 'relation' AS kind, oid::text, relname::text AS name, relfilenode::text AS detail
        FROM pg_class WHERE relnamespace = 'public'::regnamespace
        UNION ALL
        SELECT 'grant', oid::text, relname::text, relacl::text
        FROM pg_class WHERE relnamespace = 'public'::regnamespace
        UNION ALL
        SELECT 'constraint', oid::text, conname::text, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace
        UNION ALL
        SELECT 'job', job_id::text, proc_name::text, config::text
        FROM timescaledb_information.jobs
        ORDER BY 1, 2, 3, 4
    """
    before = await database.fetch(catalogue)

    await database.execute(SCHEMA)

    assert await database.fetch(catalogue) == before
    assert {row["name"] for row in before} >= {"trades", "trades_key", "gaps", *WIDTHS}


async def test_everything_belongs_to_the_owner_role(database: asyncpg.Connection) -> None:
    owners = await database.fetch(
        "SELECT DISTINCT relowner::regrole::text AS name FROM pg_class"
        " WHERE relnamespace = 'public'::regnamespace AND relname = ANY ($1)",
        [*READABLE, "trades_key"],
    )

    assert [row["name"] for row in owners] == ["sluice_owner"]


async def test_runs_at_once_wait_for_each_other(blank: str) -> None:
    await asyncio.gather(*(_apply(blank) for _ in range(3)))

    connection = await asyncpg.connect(blank)
    try:
        assert await connection.fetchval("SELECT version FROM schema_version") == 2
    finally:
        await connection.close()


async def test_a_run_does_not_wait_for_a_writer(dsn: str, database: asyncpg.Connection) -> None:
    writer = await asyncpg.connect(dsn)
    try:
        async with writer.transaction():
            for table, row in GOOD.items():
                await insert(writer, table, [row])
            await writer.execute(MARK_LATE)
            await database.execute("SET lock_timeout = '10s'")

            await database.execute(SCHEMA)
    finally:
        await writer.close()


async def test_an_older_file_is_refused_by_a_newer_database(database: asyncpg.Connection) -> None:
    await database.execute("INSERT INTO schema_version (version) VALUES (1000)")

    with pytest.raises(asyncpg.RaiseError, match="the database is at version 1000"):
        await database.execute(SCHEMA)


# Candles ---------------------------------------------------------------------------------------


async def test_candles_are_the_exact_ones(database: asyncpg.Connection) -> None:
    trades = draw_trades(1, start=DAY, hours=50)
    await insert(database, "trades", trades)

    await assert_candles_are_of(database, trades)


async def test_candles_follow_late_trades_once_refreshed(database: asyncpg.Connection) -> None:
    trades = draw_trades(2, start=DAY, hours=50)
    late = [row for row in trades if 7 <= (row["time"] - DAY) / timedelta(hours=1) < 9][::2]
    await insert(database, "trades", [row for row in trades if row not in late])
    await database.execute("CALL refresh_candles('-infinity', 'infinity')")
    await insert(database, "trades", late)

    await database.execute(
        f"CALL refresh_candles('{DAY + timedelta(hours=7)}', '{DAY + timedelta(hours=9)}')"
    )

    await assert_candles_are_of(database, trades)


async def test_candles_outlive_their_trades(database: asyncpg.Connection) -> None:
    trades = draw_trades(4, start=DAY, hours=50)
    kept_from = DAY + timedelta(days=1)
    await insert(database, "trades", trades)
    await database.execute("CALL refresh_candles('-infinity', 'infinity')")
    if await _is_community(database):
        await database.execute(
            f"SELECT add_retention_policy('trades', now() - '{kept_from}'::timestamptz,"
            " initial_start => 'infinity')"
        )

    await database.execute(f"SELECT drop_chunks('trades', '{kept_from}'::timestamptz)")

    dropped = [row for row in trades if row["time"] < kept_from]
    assert await database.fetchval("SELECT count(*) FROM trades") == len(trades) - len(dropped)
    await assert_candles_are_of(database, trades)
    await insert(database, "trades", dropped[:1])
    await database.execute("CALL refresh_candles('-infinity', 'infinity')")
    await assert_candles_are_of(database, trades)


async def test_a_changed_edition_gets_its_own_kind_of_candles(
    database: asyncpg.Connection,
) -> None:
    if not await _is_community(database):
        pytest.skip("the Apache edition cannot make what it would have to replace")
    trades = draw_trades(5, start=DAY, hours=30)
    await insert(database, "trades", trades)
    await database.execute("SET ROLE sluice_owner")
    for view in reversed(WIDTHS):
        await database.execute(f"DROP MATERIALIZED VIEW {view}")
        await database.execute(f"CREATE VIEW {view} AS SELECT 1 AS market_id")
    await database.execute("CREATE TABLE candles_kept ()")
    await database.execute("RESET ROLE")

    await database.execute(SCHEMA)

    assert (
        await database.fetchval(
            "SELECT count(*) FROM timescaledb_information.continuous_aggregates"
        )
        == 4
    )
    await assert_candles_are_of(database, trades)


async def test_a_first_refresh_hides_nothing_it_has_not_come_to(
    database: asyncpg.Connection,
) -> None:
    if not await _is_community(database):
        pytest.skip("the Apache edition refreshes nothing by itself")

    orders = await database.fetch(
        "SELECT config ->> 'refresh_newest_first' AS newest_first FROM timescaledb_information.jobs"
        " WHERE proc_name = 'policy_refresh_continuous_aggregate'"
    )

    assert [row["newest_first"] for row in orders] == ["false"] * 4


async def test_a_redelivered_batch_adds_only_what_is_new_to_compressed_chunks(
    database: asyncpg.Connection,
) -> None:
    if not await _is_community(database):
        pytest.skip("the Apache edition compresses nothing")
    trades = draw_trades(6, start=DAY, hours=20)
    await insert(database, "trades", trades[::2])
    await database.execute("SELECT compress_chunk(c) FROM show_chunks('trades') AS c")

    await insert(database, "trades", trades)

    assert await database.fetchval("SELECT count(*) FROM trades") == len(trades)
    await database.execute("CALL refresh_candles('-infinity', 'infinity')")
    await assert_candles_are_of(database, trades)


# What a row may hold ---------------------------------------------------------------------------

GOOD: dict[str, Row] = {
    "markets": {"exchange": "simulator", "symbol": "BTCUSDT", "id_kind": "raw"},
    "trades": {
        "market_id": 1,
        "time": DAY,
        "trade_id": 7,
        "first_id": 5,
        "price": "60000.10",
        "quantity": "0.00001",
        "side": "buy",
        "received_at": DAY,
    },
    "orderbook_snapshots": {
        "market_id": 1,
        "time": DAY,
        "update_id": 9,
        "sync_id": 1,
        "event_time": DAY,
        "received_at": DAY,
        "trusted_depth": 2,
        "bid_prices": ["99", "98"],
        "bid_sizes": ["1", "2"],
        "ask_prices": ["101", "102.5"],
        "ask_sizes": ["3", "4"],
    },
    "klines": {
        "market_id": 1,
        "interval": "1m",
        "time": DAY,
        "close_time": DAY + timedelta(seconds=60, milliseconds=-1),
        "open": "2",
        "high": "4",
        "low": "1",
        "close": "3",
        "volume": "10",
        "quote_volume": "25",
        "trade_count": 3,
        "taker_buy_volume": "4",
        "taker_buy_quote_volume": "10",
        "first_trade_id": 5,
        "last_trade_id": 7,
        "received_at": DAY,
    },
    "tickers": {
        "market_id": 1,
        "kind": "ticker",
        "time": DAY,
        "last_price": "3",
        "open": "2",
        "high": "4",
        "low": "1",
        "volume": "10",
        "quote_volume": "25",
        "bid_price": None,
        "bid_size": None,
        "ask_price": None,
        "ask_size": None,
        "trade_count": None,
        "received_at": DAY,
    },
    "gaps": {
        "gap_id": "a",
        "market_id": 1,
        "channel": "trade",
        "from_id": 8,
        "to_id": 9,
        "from_time": None,
        "to_time": None,
        "cause": "disconnect",
        "status": "open",
        "tries": 0,
        "revision": 0,
        "opened_at": DAY,
        "closed_at": None,
    },
    "book_audits": {
        "market_id": 1,
        "time": DAY,
        "update_id": 9,
        "levels_compared": 40,
        "levels_different": 0,
        "detail": {},
    },
}
MARK_LATE = "INSERT INTO late_ranges (from_time, to_time, market_ids) VALUES (now(), now(), '{1}')"
NO_PRICE = ("NaN", "Infinity", "-Infinity", "-1", "0", None)
NO_AMOUNT = ("NaN", "Infinity", "-Infinity", "-1", None)
BAD: list[tuple[str, Row]] = [
    ("markets", {"id_kind": "guessed"}),
    ("markets", {"symbol": ""}),
    ("trades", {"side": "BUY"}),
    ("trades", {"first_id": 8}),
    *(("trades", {name: None}) for name in GOOD["trades"]),
    *(("trades", {name: v}) for name in ("price", "quantity") for v in NO_PRICE),
    *(
        ("orderbook_snapshots", {name: [GOOD["orderbook_snapshots"][name][0], v]})
        for name in ("bid_prices", "bid_sizes", "ask_prices", "ask_sizes")
        for v in NO_PRICE
    ),
    ("orderbook_snapshots", {"bid_sizes": ["1"]}),
    ("orderbook_snapshots", {"ask_prices": ["101"]}),
    ("orderbook_snapshots", {"bid_prices": ["101", "98"]}),
    ("orderbook_snapshots", {"trusted_depth": -1}),
    *(("klines", {name: v}) for name in ("open", "high", "low", "close") for v in NO_PRICE),
    *(
        ("klines", {name: v})
        for name in ("volume", "quote_volume", "taker_buy_volume", "taker_buy_quote_volume")
        for v in NO_AMOUNT
    ),
    ("klines", {"high": "2.5"}),
    ("klines", {"low": "2.5"}),
    ("klines", {"taker_buy_volume": "11"}),
    ("klines", {"close_time": DAY}),
    *(
        ("tickers", {name: v})
        for name in ("last_price", "open", "high", "low", "volume", "quote_volume")
        for v in NO_AMOUNT
    ),
    *(
        ("tickers", {name: v})
        for name in ("bid_price", "bid_size", "ask_price", "ask_size")
        for v in NO_AMOUNT[:-1]
    ),
    ("tickers", {"kind": "bookTicker"}),
    ("gaps", {"status": "forgotten"}),
    ("gaps", {"from_id": 10}),
    ("gaps", {"tries": -1}),
    ("book_audits", {"levels_different": 41}),
]


async def test_good_rows_are_stored_once(database: asyncpg.Connection) -> None:
    for table, row in GOOD.items():
        for _ in range(2):
            await insert(database, table, [row])
        count = f"SELECT count(*) FROM {table}"
        assert await database.fetchval(count) == 1, table


async def test_a_trade_is_stored_once_whatever_else_it_says(database: asyncpg.Connection) -> None:
    row = GOOD["trades"]

    await insert(database, "trades", [row, row | {"price": "1", "received_at": EPOCH}])
    await insert(database, "trades", [row | {"side": "sell", "quantity": "1", "first_id": 7}])

    assert await database.fetchval("SELECT array_agg(price) FROM trades") == [Decimal("60000.10")]


async def test_bad_rows_are_refused(database: asyncpg.Connection) -> None:
    accepted = []
    for table, change in BAD:
        try:
            await insert(database, table, [GOOD[table] | change])
        except (asyncpg.CheckViolationError, asyncpg.NotNullViolationError):
            continue
        accepted.append((table, change))

    assert accepted == []


async def test_a_book_may_have_one_side_or_none(database: asyncpg.Connection) -> None:
    row = GOOD["orderbook_snapshots"]
    no_bids = row | {"bid_prices": [], "bid_sizes": [], "time": DAY + timedelta(seconds=1)}
    empty = no_bids | {"ask_prices": [], "ask_sizes": [], "time": DAY + timedelta(seconds=2)}

    await insert(database, "orderbook_snapshots", [row, no_bids, empty])

    assert await database.fetchval("SELECT count(*) FROM orderbook_snapshots") == 3
    assert await database.fetchval("SELECT count(*) FROM book_tops") == 1
    assert await database.fetchval("SELECT count(*) FROM book_levels") == 6


# Reading ---------------------------------------------------------------------------------------


async def test_a_market_is_found_by_its_names(database: asyncpg.Connection) -> None:
    market_id = await database.fetchval(
        "INSERT INTO markets (exchange, symbol, id_kind) VALUES ('okx', 'BTC-USDT', 'last')"
        " RETURNING market_id"
    )

    assert await database.fetchval("SELECT market('okx', 'BTC-USDT')") == market_id
    assert await database.fetchval("SELECT market('okx', 'BTCUSDT')") is None


async def test_a_book_reads_as_top_and_levels(database: asyncpg.Connection) -> None:
    await insert(database, "orderbook_snapshots", [GOOD["orderbook_snapshots"]])

    top = await database.fetchrow("SELECT * FROM book_tops")
    levels = await database.fetch("SELECT * FROM book_levels ORDER BY side, level")

    assert top is not None
    assert dict(top) == {
        "market_id": 1,
        "time": DAY,
        "bid_price": Decimal(99),
        "bid_size": Decimal(1),
        "ask_price": Decimal(101),
        "ask_size": Decimal(3),
        "mid": Decimal(100),
        "spread_bps": Decimal(200),
        "microprice": Decimal("99.5"),
        "imbalance": Decimal("-0.5"),
    }
    assert [tuple(row)[2:] for row in levels] == [
        ("ask", 1, Decimal(101), Decimal(3), True),
        ("ask", 2, Decimal("102.5"), Decimal(4), True),
        ("bid", 1, Decimal(99), Decimal(1), True),
        ("bid", 2, Decimal(98), Decimal(2), True),
    ]


@pytest.mark.parametrize(
    ("side", "quantity", "filled", "cost"),
    [
        ("buy", "2", "2", "202"),
        ("buy", "5", "5", "508"),
        ("buy", "50", "7", "713"),
        ("sell", "2", "2", "197"),
        ("sell", "50", "3", "295"),
    ],
)
async def test_the_cost_of_a_trade_walks_the_book(
    database: asyncpg.Connection, side: str, quantity: str, filled: str, cost: str
) -> None:
    later = GOOD["orderbook_snapshots"] | {
        "time": DAY + timedelta(seconds=2),
        "bid_prices": ["1", "0.5"],
    }
    await insert(database, "orderbook_snapshots", [GOOD["orderbook_snapshots"], later])

    row = await database.fetchrow(
        "SELECT * FROM trade_cost(1, $1, $2, $3)",
        DAY + timedelta(seconds=1),
        side,
        Decimal(quantity),
    )

    assert row is not None
    assert row["book_time"] == DAY
    assert (row["filled"], row["cost"]) == (Decimal(filled), Decimal(cost))
    average = Decimal(cost) / Decimal(filled)
    assert abs(row["average_price"] - average) < Decimal("1e-12")
    assert abs(row["slippage_bps"] - 100 * abs(average - 100)) < Decimal("1e-9")


async def test_a_book_of_one_side_has_a_cost_there_and_no_mid(
    database: asyncpg.Connection,
) -> None:
    no_bids = GOOD["orderbook_snapshots"] | {"bid_prices": [], "bid_sizes": []}
    await insert(database, "orderbook_snapshots", [no_bids])

    bought = await database.fetchrow("SELECT * FROM trade_cost(1, $1, 'buy', 4)", DAY)
    sold = await database.fetch("SELECT * FROM trade_cost(1, $1, 'sell', 4)", DAY)

    assert bought is not None
    assert (bought["filled"], bought["cost"]) == (Decimal(4), Decimal("405.5"))
    assert bought["slippage_bps"] is None
    assert sold == []


async def test_a_trade_before_the_first_book_has_no_cost(database: asyncpg.Connection) -> None:
    await insert(database, "orderbook_snapshots", [GOOD["orderbook_snapshots"]])

    rows = await database.fetch("SELECT * FROM trade_cost(1, $1, 'buy', 1)", DAY - timedelta(1))

    assert rows == []


async def test_every_documented_query_runs(database: asyncpg.Connection) -> None:
    for table, row in GOOD.items():
        if table != "markets":
            await insert(database, table, [row])
    assert len(EXAMPLES) >= 5

    for example in EXAMPLES:
        await database.fetch(example)


# Rights ----------------------------------------------------------------------------------------

FILLED = ("trades", "orderbook_snapshots", "klines", "tickers", "gaps", "book_audits")
READABLE = (
    *("schema_version", "markets", *FILLED, "late_ranges"),
    *(*WIDTHS, "book_tops", "book_levels"),
)
ALLOWED = {
    "sluice_flusher": [
        *(f"SELECT FROM {name} LIMIT 0" for name in READABLE),
        *(f"INSERT INTO {name} SELECT * FROM {name} ON CONFLICT DO NOTHING" for name in FILLED),
        "INSERT INTO markets (exchange, symbol, id_kind) VALUES ('x', 'y', 'raw')",
        "CREATE TEMPORARY TABLE batch (LIKE trades) ON COMMIT DROP",
        "UPDATE gaps SET revision = revision + 1",
        MARK_LATE,
    ],
    "sluice_reader": [
        *(f"SELECT FROM {name} LIMIT 0" for name in READABLE),
        "SELECT * FROM trade_cost(market('x', 'y'), now(), 'buy', 1)",
    ],
}
CHANGES = ("UPDATE {} SET market_id = DEFAULT", "DELETE FROM {}", "TRUNCATE {}", "DROP TABLE {}")
UNMARK_LATE = (
    "UPDATE late_ranges SET to_time = now()",
    *(change.format("late_ranges") for change in CHANGES[1:]),
)
REFUSED = {
    "sluice_flusher": [
        *(
            change.format(name)
            for change, name in itertools.product(CHANGES, ("markets", *FILLED))
            if not (change.startswith("UPDATE") and name == "gaps")
        ),
        *UNMARK_LATE,
        "INSERT INTO schema_version (version) VALUES (3)",
        "ALTER TABLE trades ADD COLUMN x integer",
        "SELECT drop_chunks('trades', now())",
        "CALL refresh_candles('-infinity', 'infinity')",
        "CREATE TABLE x ()",
        "CREATE ROLE x",
        "SET ROLE sluice_owner",
        "COPY trades TO PROGRAM 'true'",
    ],
    "sluice_reader": [
        *(change.format(name) for change, name in itertools.product(CHANGES, ("markets", *FILLED))),
        *(f"INSERT INTO {name} SELECT * FROM {name}" for name in FILLED),
        *(MARK_LATE, *UNMARK_LATE),
        "INSERT INTO markets (exchange, symbol, id_kind) VALUES ('x', 'y', 'raw')",
        "SELECT drop_chunks('trades', now())",
        "CALL refresh_candles('-infinity', 'infinity')",
        "CREATE TABLE x ()",
        "SET ROLE sluice_owner",
        "COPY trades TO PROGRAM 'true'",
    ],
}


@pytest.mark.parametrize("role", ["sluice_flusher", "sluice_reader"])
async def test_a_role_may_do_its_work_and_nothing_else(
    dsn: str, database: asyncpg.Connection, role: str
) -> None:
    member = f"sluice_test_{secrets.token_hex(6)}"
    password = secrets.token_hex(16)
    await database.execute(f"CREATE ROLE {member} LOGIN PASSWORD '{password}' IN ROLE {role}")
    try:
        connection = await asyncpg.connect(dsn, user=member, password=password)
        try:
            for statement in ALLOWED[role]:
                await connection.execute(statement)
            granted = []
            for statement in REFUSED[role]:
                try:
                    await connection.execute(statement)
                except asyncpg.InsufficientPrivilegeError:
                    continue
                granted.append(statement)
        finally:
            await connection.close()
    finally:
        await database.execute(f"DROP ROLE {member}")

    assert granted == []


async def test_a_reader_is_read_only_and_bounded_in_time(database: asyncpg.Connection) -> None:
    await database.execute(SCHEMA)  # a copied database has no settings of roles

    settings = await database.fetchval(
        "SELECT setconfig FROM pg_db_role_setting AS s JOIN pg_database AS d ON d.oid = setdatabase"
        " WHERE datname = current_database() AND setrole = 'sluice_reader'::regrole"
    )

    assert set(settings) == {"default_transaction_read_only=on", "statement_timeout=30s"}


async def test_a_plain_owner_of_a_database_may_run_it(server: Server) -> None:
    owner = f"sluice_test_{secrets.token_hex(6)}"
    password = secrets.token_hex(16)
    execute(
        server.administration,
        f"CREATE ROLE {owner} LOGIN PASSWORD '{password}'",
        f"CREATE DATABASE {owner} OWNER {owner} TEMPLATE template0",
    )
    try:
        theirs = replace(server.administration, user=owner, password=password, database=owner)
        connection = await asyncpg.connect(theirs.dsn)
        try:
            for _ in range(2):
                await connection.execute(SCHEMA)
            await insert(connection, "trades", [GOOD["trades"]])
            assert await connection.fetchval("SELECT count(*) FROM candles_1d") == 1
        finally:
            await connection.close()
    finally:
        execute(
            server.administration,
            f"DROP DATABASE {owner} WITH (FORCE)",
            f"DROP ROLE {owner}",
        )
