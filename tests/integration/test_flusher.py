"""The flusher between real servers: every kind of record, duplicates, poison, two at once."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from redis.asyncio import Redis

from flusher.tables import TABLES
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
    "minus infinity": spoilt(price="-Infinity"),
    "negative": spoilt(price="-1"),
    "zero": spoilt(quantity="0.000"),
    "exponent": spoilt(price="1e5"),
    "far exponent": spoilt(price="1e200000"),
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
    "huge": spoilt(price="9" * 100_000),
    "a point": spoilt(price="."),
    "in brackets": spoilt(price="[1]"),
    "in quotes": spoilt(price='"1"'),
    "null as text": spoilt(price="null"),
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
    "symbol with a newline": spoilt(symbol="BTCUSDT\n"),
    "symbol as a list": spoilt(symbol=["BTCUSDT"]),
    "exchange as an object": spoilt(exchange={}),
    "symbol too long": spoilt(symbol="B" * 65),
    "lone surrogate": spoilt(symbol="BTC").replace(b'"BTC"', b'"BTC\\ud800USDT"'),
    "no UTF-8": spoilt(symbol="BTC").replace(b"BTC", b"\xff\xfe"),
    "surrogate in UTF-8": spoilt(symbol="BTC").replace(b"BTC", b"\xed\xa0\x80"),
    "an empty list": b"[]",
    "an object": b'{"exchange":"binance"}',
    "a text": b'"binance"',
    "too short": b'["binance","BTCUSDT",1]',
    "too long and too short": b"[" + b"1," * 100_000 + b"1]",
    "deep inside": spoilt(price="deep").replace(b'"deep"', b"[" * 100_000 + b"]" * 100_000),
    "two records": trade(1) + b"," + trade(2),
    "truncated": trade(1)[:-20],
    "deep": b"[" * 100_000,
    "no JSON": b"\x00\x01\x02",
    "nothing": b"",
}


async def test_poison_of_every_kind_among_a_thousand_each_is_dead_lettered_alone(
    environment: dict[str, str], postgres: Database, redis: Redis
) -> None:
    items = []
    for number, poison in enumerate(TRADE_POISON.values()):
        good = [trade(1000 * number + place) for place in range(1000)]
        good[number * 7 % 1000] = poison
        items += good
    queue = await push(redis, items)
    async with flushing(environment):
        await drained(redis, "trade")
    bad = {1000 * number + number * 7 % 1000 for number in range(len(TRADE_POISON))}
    assert await stored_ids(postgres) == [n for n in range(len(items)) if n not in bad]
    dead = await letters(redis)
    assert [letter["raw"] for letter in dead] == list(TRADE_POISON.values())
    assert all(letter["reason"] for letter in dead)
    assert (await queue.balance()).is_exact
    assert await fetch(postgres, "SELECT symbol FROM markets") == [(SYMBOL,)]


async def test_halves_beside_two_records_in_one_item_do_not_move_the_blame(
    environment: dict[str, str], postgres: Database, redis: Redis
) -> None:
    half, rest = trade(4).split(b",4,", 1)
    poison = [trade(1) + b"," + trade(2), trade(3, price="0"), half, b"4," + rest]
    queue = await push(
        redis, [trade(0), poison[0], trade(5), poison[1], trade(6), *poison[2:], trade(7)]
    )
    async with flushing(environment):
        await drained(redis, "trade")
    assert await stored_ids(postgres) == [0, 5, 6, 7]
    assert [letter["raw"] for letter in await letters(redis)] == poison
    assert (await queue.balance()).is_exact


def gap(number: int, cause: str = "why") -> bytes:
    fields = (f"g{number}", "trade", 3, 5, None, None, cause, "open", 0, 1, DAY, None)
    return records.encode(Gap("binance", SYMBOL, *fields))  # type: ignore[arg-type]  # one tuple of mixed types


def snapshot(number: int, price: str = "1.1") -> bytes:
    moment = DAY + number * 1_000_000
    return records.encode(
        OrderbookSnapshot("binance", SYMBOL, moment, 5, 4, moment, moment, [(price, "2")], [], 20)
    )


def kline(number: int, interval: str = "1m", close: str = "3") -> bytes:
    opened = DAY + number * 60_000_000
    return records.encode(
        Kline(
            *("binance", SYMBOL, interval, opened, opened + 9, "2", "4", "1", close, "10", "20", 6),
            *("5", "10", -1, -1, DAY + 1),
        )
    )


def ticker(number: int, bid: str | None = None) -> bytes:
    return records.encode(
        Ticker(
            *("binance", SYMBOL, "ticker", DAY + number, "1", "2", "3", "1", "7", "8"),
            *(bid, None, None, None, None, DAY + 2),
        )
    )


OTHER_POISON: dict[str, tuple[Callable[[int], bytes], list[bytes]]] = {
    "gap": (
        gap,
        [
            gap(100, cause="a\x00b"),
            gap(101, cause="X").replace(b'"X"', b'"\\ud800"'),
            gap(102).replace(b'"open"', b'"ajar"'),
            gap(103).replace(b",3,5,", b",%d,5," % 2**63),
            b"[null]",
        ],
    ),
    "orderbook_snapshot": (
        snapshot,
        [
            *map(
                partial(snapshot, 100), ("NaN", "1e5", "1,2", "1;2", "{1}", "]", "", "-1", "1\t2")
            ),
            snapshot(100).replace(b'[["1.1","2"]]', b'[["1.1"]]'),
            snapshot(100).replace(b'[["1.1","2"]]', b"{}"),
        ],
    ),
    "kline": (
        kline,
        [
            kline(100, interval="1\tm"),
            kline(100, interval="1\\m"),
            kline(100, interval="1y"),
            *(kline(100, close=text) for text in ("NaN", "1m", "null", "1e3", "-1")),
        ],
    ),
    "ticker": (
        ticker,
        [*map(partial(ticker, 100), ("null", "nullnull", "NaN", "miniTicker", "1\n2", "[1]", ""))],
    ),
}


@pytest.mark.parametrize("kind", OTHER_POISON)
async def test_poison_of_each_kind_of_record_is_dead_lettered_alone(
    kind: str, environment: dict[str, str], postgres: Database, redis: Redis
) -> None:
    make, poison = OTHER_POISON[kind]
    good = [make(number) for number in range(len(poison) + 1)]
    items = [item for pair in zip(good, poison, strict=False) for item in pair]
    queue = await push(redis, [*items, good[-1]], kind)
    async with flushing(environment):
        await drained(redis, kind)
    dead = await letters(redis, kind)
    assert [letter["raw"] for letter in dead] == poison
    assert all(letter["reason"] for letter in dead)
    balance = await queue.balance()
    assert (balance.acked, balance.dead, balance.length) == (len(good), len(poison), 0)
    assert await fetch(postgres, f"SELECT count(*) FROM {TABLES[kind].name}") == [
        (len(good),)
    ]  # a name of ours
