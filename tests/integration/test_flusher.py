"""The flusher between real servers: every kind of record, duplicates, poison, two at once."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from redis.asyncio import Redis

from sluice import records
from sluice.records import Gap, Kline, OrderbookSnapshot, Record, Ticker, Trade
from tests.faults.waiting import eventually
from tests.integration.flusher_rig import (
    DAY,
    SYMBOL,
    counted,
    drained,
    fetch,
    flushing,
    letters,
    push,
    stored_ids,
    trade,
)
from tests.servers import Database


@pytest.fixture
def environment(redis_environment: dict[str, str], postgres: Database) -> dict[str, str]:
    return {**redis_environment, **postgres.environment}


def moment(micros: int) -> datetime:
    return datetime.fromtimestamp(micros // 1_000_000, UTC).replace(microsecond=micros % 1_000_000)


async def test_each_kind_of_record_reaches_its_table_to_the_last_digit(
    environment: dict[str, str], postgres: Database, redis: Redis
) -> None:
    price = "12345678901234567890.000000000100"
    kinds: dict[str, Record] = {
        "trade": Trade("binance", SYMBOL, 9, 7, price, "0.10", "sell", DAY, DAY + 1),
        "orderbook_snapshot": OrderbookSnapshot(
            "binance", SYMBOL, DAY, 5, 4, DAY - 1, DAY + 1, [("1.10", "2"), ("1.0", "3")], [], 20
        ),
        "kline": Kline(
            *("binance", SYMBOL, "1M", DAY, DAY + 9, "2", "4", "1", "3", "10", "20.50", 6, "5"),
            *("10", -1, -1, DAY + 1),
        ),
        "ticker": Ticker(
            *("binance", SYMBOL, "miniTicker", DAY, "1.0", "2", "3", "0.5", "7", "8"),
            *(None, None, None, None, None, DAY + 2),
        ),
        "gap": Gap(
            *(
                "binance",
                SYMBOL,
                "gap\t1\\.\n",
                "trade",
                3,
                5,
                None,
                None,
                'a "cause" \\N\t\r\n',
                "open",
                0,
                1,
            ),
            *(DAY, None),
        ),
    }
    for kind, record in kinds.items():
        await push(redis, [records.encode(record)], kind)
    async with flushing(environment):
        await drained(redis, *kinds)
    ((market_id,),) = await fetch(postgres, "SELECT market('binance', 'BTCUSDT')")
    assert await fetch(
        postgres,
        "SELECT market_id, time, trade_id, first_id, price::text, quantity::text, side, received_at"
        " FROM trades",
    ) == [(market_id, moment(DAY), 9, 7, price, "0.10", "sell", moment(DAY + 1))]
    assert await fetch(
        postgres,
        "SELECT market_id, time, update_id, sync_id, event_time, received_at, trusted_depth,"
        " bid_prices::text, bid_sizes, ask_prices, ask_sizes FROM orderbook_snapshots",
    ) == [
        (
            *(market_id, moment(DAY), 5, 4, moment(DAY - 1), moment(DAY + 1), 20),
            *("{1.10,1.0}", [Decimal(2), Decimal(3)], [], []),
        )
    ]
    assert await fetch(
        postgres,
        "SELECT interval, time, close_time, open, high, low, close, volume, quote_volume::text,"
        " trade_count, taker_buy_volume, taker_buy_quote_volume, first_trade_id, last_trade_id,"
        " received_at FROM klines",
    ) == [
        (
            *("1M", moment(DAY), moment(DAY + 9), *map(Decimal, (2, 4, 1, 3, 10)), "20.50", 6),
            *(Decimal(5), Decimal(10), -1, -1, moment(DAY + 1)),
        )
    ]
    assert await fetch(
        postgres,
        "SELECT kind, time, last_price::text, open, high, low::text, volume, quote_volume,"
        " bid_price, bid_size, ask_price, ask_size, trade_count, received_at FROM tickers",
    ) == [
        (
            *(
                "miniTicker",
                moment(DAY),
                "1.0",
                Decimal(2),
                Decimal(3),
                "0.5",
                Decimal(7),
                Decimal(8),
            ),
            *(None, None, None, None, None, moment(DAY + 2)),
        )
    ]
    assert await fetch(
        postgres,
        "SELECT gap_id, channel, from_id, to_id, from_time, to_time, cause, status, tries,"
        " revision, opened_at, closed_at FROM gaps",
    ) == [
        (
            *("gap\t1\\.\n", "trade", 3, 5, None, None, 'a "cause" \\N\t\r\n', "open", 0, 1),
            *(moment(DAY), None),
        )
    ]


async def test_what_comes_again_is_stored_once_and_counted(
    environment: dict[str, str], postgres: Database, redis: Redis
) -> None:
    items = [trade(number) for number in range(300)]
    queue = await push(redis, items + items[100:] + items[:50] * 2)
    async with flushing(environment, flush_batch_size=70) as flusher:
        await drained(redis, "trade")
        await eventually(lambda: "300 duplicates" in flusher.process.statistics_line())
        assert "300 inserted, 300 duplicates, 0 dead, 0 queued" in flusher.process.statistics_line()
        assert counted(flusher, "flush_rows") == 600
        assert counted(flusher, "flush_stale_claims") == 0  # what is read ahead is what follows
    assert await stored_ids(postgres) == list(range(300))
    balance = await queue.balance()
    assert (balance.pushed, balance.acked, balance.dead, balance.length) == (600, 600, 0, 0)


async def test_a_gap_is_replaced_by_a_higher_revision_only(
    environment: dict[str, str], postgres: Database, redis: Redis
) -> None:
    def gap(revision: int, status: str, gap_id: str = "g") -> bytes:
        fields = ("trade", 3, 5, None, None, "why", status, revision, revision, DAY, None)
        return records.encode(Gap("binance", SYMBOL, gap_id, *fields))  # type: ignore[arg-type]  # one tuple of mixed types

    async with flushing(environment):
        await push(redis, [gap(3, "filled"), gap(1, "open"), gap(2, "open")], "gap")
        await drained(redis, "gap")
        await push(redis, [gap(2, "lost"), gap(3, "lost"), gap(1, "open", "other")], "gap")
        await drained(redis, "gap")
        query = "SELECT gap_id, status, revision, tries FROM gaps ORDER BY gap_id"
        assert await fetch(postgres, query) == [("g", "filled", 3, 3), ("other", "open", 1, 1)]
        await push(redis, [gap(4, "absent")], "gap")
        await drained(redis, "gap")
        assert await fetch(postgres, query) == [("g", "absent", 4, 4), ("other", "open", 1, 1)]


async def test_of_500_records_with_one_poison_499_are_stored_and_one_is_dead_with_its_reason(
    environment: dict[str, str], postgres: Database, redis: Redis
) -> None:
    poison = trade(250, price="0")
    queue = await push(redis, [poison if n == 250 else trade(n) for n in range(500)])
    async with flushing(environment):
        await drained(redis, "trade")
    assert await stored_ids(postgres) == [n for n in range(500) if n != 250]
    (letter,) = await letters(redis)
    assert letter["queue"] == queue.key
    assert letter["raw"] == poison
    assert letter["time"] > DAY - 10**15
    assert "trades_price_check" in letter["reason"]
    balance = await queue.balance()
    assert (balance.pushed, balance.acked, balance.dead, balance.length) == (500, 499, 1, 0)


def spoilt(**fields: Any) -> bytes:
    """Give a trade with a field that a Trade would not take, as JSON."""
    values = dict(zip(Trade.__struct_fields__, json.loads(trade(1)), strict=True))
    return json.dumps(list({**values, **fields}.values())).encode()


TRADE_POISON = {
    "NaN": spoilt(price="NaN"),
    "Infinity": spoilt(quantity="Infinity"),
    "negative": spoilt(price="-1"),
    "zero": spoilt(quantity="0.000"),
    "exponent": spoilt(price="1e5"),
    "underscore": spoilt(price="1_0"),
    "hexadecimal": spoilt(price="0x1F"),
    "blank": spoilt(price=" 1"),
    "two points": spoilt(price="1.2.3"),
    "no number": spoilt(price="buy"),
    "null marker": spoilt(price="\\N"),
    "end marker": spoilt(price="\\."),
    "tab": spoilt(price="1\t2"),
    "newline": spoilt(price="1\n2"),
    "return": spoilt(price="1\r"),
    "NUL": spoilt(price="1\x00"),
    "other digits": spoilt(price="\u0661"),
    "empty": spoilt(price=""),
    "too long": spoilt(price="1" * 51),
    "a number": spoilt(price=1.5),
    "a null": spoilt(price=None),
    "id beyond bigint": spoilt(trade_id=2**63),
    "id far beyond": spoilt(trade_id=10**400),
    "negative id": spoilt(trade_id=-1),
    "id as text": spoilt(trade_id="7"),
    "id as fraction": spoilt(trade_id=7.5),
    "range backwards": spoilt(first_id=2),
    "side": spoilt(side="hold"),
    "time beyond": spoilt(ts_event=2**62),
    "symbol with a quote": spoilt(symbol="BTC'USDT"),
    "symbol with a blank": spoilt(symbol="BTC USDT"),
    "symbol with NUL": spoilt(symbol="BTC\x00USDT"),
    "symbol with a tab": spoilt(symbol="BTC\tUSDT"),
    "symbol with a backslash": spoilt(symbol="BTC\\USDT"),
    "symbol too long": spoilt(symbol="B" * 65),
    "lone surrogate": spoilt(symbol="BTC").replace(b'"BTC"', b'"BTC\\ud800USDT"'),
    "no UTF-8": spoilt(symbol="BTC").replace(b"BTC", b"\xff\xfe"),
    "surrogate in UTF-8": spoilt(symbol="BTC").replace(b"BTC", b"\xed\xa0\x80"),
    "an object": b'{"exchange":"binance"}',
    "a text": b'"binance"',
    "too short": b'["binance","BTCUSDT",1]',
    "two records": trade(1) + b"," + trade(2),
    "truncated": trade(1)[:-20],
    "deep": b"[" * 100_000,
    "no JSON": b"\x00\x01\x02",
    "nothing": b"",
}


async def test_poison_of_every_kind_is_dead_lettered_alone(
    environment: dict[str, str], postgres: Database, redis: Redis
) -> None:
    items = []
    for number, poison in enumerate(TRADE_POISON.values()):
        items += [trade(3 * number + 1000), poison, trade(3 * number + 1001)]
    queue = await push(redis, items)
    async with flushing(environment):
        await drained(redis, "trade")
    good = sorted(3 * number + base for number in range(len(TRADE_POISON)) for base in (1000, 1001))
    assert await stored_ids(postgres) == good
    dead = await letters(redis)
    assert [letter["raw"] for letter in dead] == list(TRADE_POISON.values())
    assert all(letter["reason"] for letter in dead)
    assert (await queue.balance()).is_exact
    assert await fetch(postgres, "SELECT symbol FROM markets") == [(SYMBOL,)]
