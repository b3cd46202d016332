"""`sluice markets`, `top` and `book` on real servers, as an operator types them."""

import json

from redis.asyncio import Redis

from sluice.queue import book_key
from tests.integration.test_cli import sluice
from tests.servers import Database, execute

TRADES = """
INSERT INTO markets (exchange, symbol, id_kind)
VALUES ('binance', 'BTCUSDT', 'raw'), ('binance', 'ETHUSDT', 'raw'), ('binance', 'XRPUSDT', 'raw');
INSERT INTO trades (market_id, time, trade_id, first_id, price, quantity, side, received_at)
SELECT market('binance', symbol), now() - age, id, first_id, price, quantity, side, now()
FROM (VALUES
    ('BTCUSDT', interval '90 minutes', 10, 10, 100.50, 1.00, 'buy'),
    ('BTCUSDT', interval '30 minutes', 11, 13, 110.00, 2, 'sell'),
    ('BTCUSDT', interval '20 minutes', 14, 14, 99, 2, 'buy'),
    ('ETHUSDT', interval '30 minutes', 7, 7, 10, 50, 'buy'),
    ('ETHUSDT', interval '3 days', 1, 1, 5, 1, 'buy')
) AS t (symbol, age, first_id, id, price, quantity, side);
"""
BOOK = """
INSERT INTO markets (exchange, symbol, id_kind) VALUES ('binance', 'BTCUSDT', 'raw');
INSERT INTO orderbook_snapshots (time, update_id, sync_id, event_time, received_at, market_id,
    trusted_depth, bid_prices, bid_sizes, ask_prices, ask_sizes)
SELECT '2026-11-27 12:00:00+00'::timestamptz + n * interval '1 s', n, 1,
    '2026-11-27 11:59:59.5+00'::timestamptz + n * interval '1 s', now(),
    market('binance', 'BTCUSDT'), 20, '{99.50,99.40}', '{1,0.00000001}', '{99.60}', '{3.0}'
FROM generate_series(1, 3) AS n;
"""


def test_markets_are_listed_with_their_record_and_their_open_gaps(postgres: Database) -> None:
    assert "no markets" in sluice(postgres.environment, "markets").stdout
    execute(postgres, TRADES)
    execute(
        postgres,
        "INSERT INTO gaps (gap_id, market_id, channel, from_id, to_id, cause, status, tries,"
        " revision, opened_at)"
        " SELECT status, market('binance', 'BTCUSDT'), 'trade', 1, 2, 'a test', status, 1, 1, now()"
        " FROM unnest('{open,filled,lost}'::text[]) AS status",
    )
    btc, eth, xrp = json.loads(sluice(postgres.environment, "markets", "--json").stdout)
    assert (btc["market"], btc["last_id"], btc["last_price"], btc["open_gaps"]) == (
        *("binance:BTCUSDT", 14, "99", 1),
    )
    assert (eth["market"], eth["last_id"], eth["open_gaps"]) == ("binance:ETHUSDT", 7, 0)
    assert eth["since"] < btc["since"] < btc["last_time"]
    assert (xrp["since"], xrp["last_id"]) == (None, None)
    assert "binance:XRPUSDT" in sluice(postgres.environment, "markets").stdout


def test_top_ranks_by_quote_volume_within_the_hours(postgres: Database) -> None:
    assert "no trades" in sluice(postgres.environment, "top").stdout
    execute(postgres, TRADES)
    btc, eth = json.loads(sluice(postgres.environment, "top", "--json").stdout)
    assert btc == {
        "market": "binance:BTCUSDT",
        "trades": 5,
        "volume": "5",
        "quote_volume": "518.5",
        "bought_percent": "60.0",
        "low": "99",
        "high": "110",
        "last": "99",
        "change_percent": "-1.49",
    }
    assert (eth["market"], eth["trades"], eth["quote_volume"]) == ("binance:ETHUSDT", 1, "500")
    hour = json.loads(sluice(postgres.environment, "top", "--hours", "1", "--json").stdout)
    assert [(row["market"], row["quote_volume"]) for row in hour] == [
        ("binance:ETHUSDT", "500"),
        ("binance:BTCUSDT", "418"),
    ]
    (first,) = json.loads(sluice(postgres.environment, "top", "--limit", "1", "--json").stdout)
    assert first == btc


async def test_a_book_is_the_live_one_else_the_last_stored(
    redis: Redis, redis_environment: dict[str, str], postgres: Database
) -> None:
    environment = {**redis_environment, **postgres.environment}
    none = sluice(environment, "book", "binance:BTCUSDT", code=1)
    assert "there is no book of binance:BTCUSDT" in none.stderr

    execute(postgres, BOOK)
    stored = json.loads(sluice(environment, "book", "BTCUSDT", "--json").stdout)
    assert stored == {
        "market": "binance:BTCUSDT",
        "source": "stored",
        "time": "2026-11-27T12:00:02.500000Z",
        "update_id": 3,
        "sync_id": 1,
        "bids": [["99.50", "1"], ["99.40", "0.00000001"]],
        "asks": [["99.60", "3.0"]],
    }

    await redis.hset(
        book_key("binance", "BTCUSDT"),
        mapping={
            "data": '{"bids":[["98.1","2"],["98.0","1"]],"asks":[["98.2","7"]]}',
            "timestamp": "1790000000000001",
            "update_id": "9",
            "sync_id": "2",
            "state": "live",
        },
    )
    live = json.loads(sluice(environment, "book", "BTCUSDT", "--levels", "1", "--json").stdout)
    assert live == {
        "market": "binance:BTCUSDT",
        "source": "live",
        "time": "2026-09-21T14:13:20.000001Z",
        "update_id": 9,
        "sync_id": 2,
        "bids": [["98.1", "2"]],
        "asks": [["98.2", "7"]],
    }
    shown = sluice(environment, "book", "BTCUSDT").stdout
    assert [line.split() for line in shown.splitlines()[2:]] == [
        ["2", "98.1", "98.2", "7"],
        ["1", "98.0"],
    ]


def test_a_book_of_no_exchange_is_refused() -> None:
    assert "no exchange" in sluice({}, "book", "nowhere:BTCUSDT", code=2).stderr
