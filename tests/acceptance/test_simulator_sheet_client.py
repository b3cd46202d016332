"""A client that follows the sheet ends with exactly the true book and all trades."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal

import pytest

from sluice.simulator import Levels, Order, Simulator, SimulatorConfig
from sluice.simulator.faults import CONNECTION, CONTROL, HANDSHAKE, KINDS, MESSAGE, REST, STANDING
from tests.sheet_client import SheetBook, SheetClient

PATIENCE = 200
AT_ONCE = 4  # simulators and clients; each wants a share of the machine all the time
SILENCE = {"stall": 3.0, "half_open": 3.0, "acked_but_silent": 3.0}  # seconds, where it matters
SYMBOLS = ("BTCUSDT", "SOLUSDT")
CONFIG = SimulatorConfig(symbols=SYMBOLS, seed=3, rate=40)
UNIT = Decimal(100_000_000)
DEPTH, TRADES = "*@depth@100ms", "*@trade"

# Every fault as it is asked for, the fault itself first.
FAULTS: Mapping[str, list[Order]] = {
    "drop": [Order("drop", 3, DEPTH, after=4), Order("drop", 9, TRADES, after=5)],
    "duplicate": [Order("duplicate", 5, DEPTH), Order("duplicate", 5, TRADES)],
    "reorder": [Order("reorder", 2, DEPTH, after=3), Order("reorder", 5, TRADES)],
    "truncate": [Order("truncate", 2, DEPTH), Order("truncate", 5, TRADES)],
    "bad_utf8": [Order("bad_utf8", 1, DEPTH), Order("bad_utf8", 1, TRADES)],
    "wrong_type": [Order("wrong_type", 2, DEPTH), Order("wrong_type", 5, TRADES)],
    "nan": [Order("nan", 2, DEPTH), Order("nan", 5, TRADES)],
    "huge": [Order("huge", 1, DEPTH), Order("huge", 1, TRADES)],
    "deep": [Order("deep", 2, DEPTH), Order("deep", 2, TRADES)],
    "binary": [Order("binary", 2, DEPTH), Order("binary", 5, TRADES)],
    "unknown_event": [Order("unknown_event", 5)],
    "extra_fields": [Order("extra_fields", 20)],
    "empty_frame": [Order("empty_frame", 5)],
    "cut": [Order("cut")],
    "cut_mid_frame": [Order("cut_mid_frame")],
    "close": [Order("close", options={"code": 1008})],
    "stall": [Order("stall")],
    "half_open": [Order("half_open")],
    "slow": [Order("slow", options={"bytes_per_second": 3000, "seconds": 1})],
    "shutdown": [Order("shutdown", options={"grace": 0.1})],
    "refuse_handshake": [Order("refuse_handshake", 3), Order("cut")],
    "acked_but_silent": [Order("acked_but_silent"), Order("cut")],
    "ack_error": [Order("ack_error"), Order("cut")],
    "ack_missing": [Order("ack_missing"), Order("cut")],
    "ack_late": [Order("ack_late", options={"seconds": 0.3}), Order("cut")],
    **{
        kind: [Order(kind, 2, "depth/*"), Order(kind, 2, "historicalTrades/*"), Order("cut")]
        for kind in (
            "rest_403", "rest_451", "rest_500", "rest_502", "rest_503", "rest_504", "rest_html",
            "rest_empty", "rest_truncated", "rest_cut",
        )
    },
    "rest_429": [Order("rest_429", 1, "depth/*", options={"seconds": 1}), Order("cut")],
    "rest_418": [Order("rest_418", 1, "depth/*", options={"seconds": 1}), Order("cut")],
    "rest_stall": [Order("rest_stall", 1, "depth/*", options={"seconds": 5}), Order("cut")],
    "stale_snapshot": [Order("stale_snapshot", 3, "depth/*"), Order("cut")],
    "empty_page": [Order("empty_page", 3, "historicalTrades/*"), Order("drop", 3, TRADES)],
    "endless_page": [Order("endless_page", 3, "historicalTrades/*"), Order("drop", 3, TRADES)],
}  # fmt: skip


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.02)


def in_units(side: dict[Decimal, Decimal]) -> dict[int, int]:
    return {int(price * UNIT): int(size * UNIT) for price, size in side.items()}


def is_true_book(book: SheetBook, truth: Levels) -> bool:
    return in_units(book.bids) == truth.bids and in_units(book.asks) == truth.asks


async def assert_whole(simulator: Simulator, client: SheetClient) -> None:
    """A fresh diff and trade of each symbol arrive; then all is as it was published."""
    truth = simulator.truth
    simulator.quiet()
    reached = {symbol: (truth.update_id(symbol), truth.ids(symbol)[1]) for symbol in SYMBOLS}
    await until(
        lambda: all(
            client.books[symbol].is_live
            and client.books[symbol].update_id > update_id
            and (client.trades[symbol].newest or 0) > trade_id
            for symbol, (update_id, trade_id) in reached.items()
        )
    )
    for symbol in SYMBOLS:
        book = client.books[symbol]
        assert is_true_book(book, truth.book(symbol, book.update_id))
    simulator.exchange.is_running.clear()
    await until(lambda: simulator.source.state == "stopped")
    for symbol in SYMBOLS:
        last_id = truth.ids(symbol)[1]
        async with asyncio.timeout(PATIENCE):
            await client.reach(symbol, last_id)
        published = {
            trade.id: (trade.price, trade.quantity, trade.time, trade.buyer_is_maker)
            for trade in truth.trades(symbol, min(client.trades[symbol].rows))
        }
        stored = {
            trade_id: (int(row[0] * UNIT), int(row[1] * UNIT), row[2], row[3])
            for trade_id, row in client.trades[symbol].rows.items()
        }
        assert stored == published


async def is_settled(client: SheetClient) -> None:
    await until(
        lambda: (
            all(book.is_live and book.applied > 2 for book in client.books.values())
            and all(len(trades.rows) > 5 for trades in client.trades.values())
        )
    )


async def suffer(kind: str, places: asyncio.Semaphore) -> None:
    """Go through one fault, with a simulator and a client of its own."""
    async with (
        places,
        Simulator(CONFIG) as simulator,
        follower(simulator, SILENCE.get(kind, PATIENCE)) as client,
    ):
        await is_settled(client)
        for order in FAULTS[kind]:
            simulator.inject(replace(order))
        await until(lambda: simulator.truth.counts.get(kind, 0) >= FAULTS[kind][0].count)
        await assert_whole(simulator, client)


def follower(simulator: Simulator, silence: float = PATIENCE) -> SheetClient:
    return SheetClient(simulator.ws_url, simulator.url, list(SYMBOLS), silence=silence)


GROUPS = {
    "messages": MESSAGE,
    "connections": CONNECTION | HANDSHAKE | CONTROL,
    "requests": REST,
}


@pytest.mark.parametrize("group", GROUPS)
async def test_ends_with_the_true_book_and_every_trade_under_each_of(group: str) -> None:
    kinds = [kind for kind in FAULTS if kind in GROUPS[group]]
    places = asyncio.Semaphore(AT_ONCE)
    ends = await asyncio.gather(*(suffer(kind, places) for kind in kinds), return_exceptions=True)
    failures = {kind: repr(end) for kind, end in zip(kinds, ends, strict=True) if end is not None}
    assert not failures


def test_every_fault_is_suffered() -> None:
    assert FAULTS.keys() == KINDS - STANDING


async def test_a_clock_that_is_an_hour_off_either_way_changes_nothing() -> None:
    async with Simulator(CONFIG) as simulator, follower(simulator) as client:
        await is_settled(client)
        for milliseconds in (3_600_000, -3_600_000):
            simulator.exchange.skew_clock(milliseconds)
            seen = {symbol: simulator.truth.update_id(symbol) for symbol in SYMBOLS}
            await until(lambda: all(client.books[s].update_id > seen[s] for s in SYMBOLS))  # noqa: B023  # awaited within the loop
        assert simulator.truth.counts["skew"] == 2
        await assert_whole(simulator, client)


async def test_a_quiet_exchange_gives_no_cause_to_resync_or_to_ask_again() -> None:
    async with (
        Simulator(CONFIG) as simulator,
        follower(simulator) as client,
    ):
        await is_settled(client)
        await until(lambda: all(book.applied > 10 for book in client.books.values()))
        assert (client.connects, client.malformed, client.unknown) == (1, 0, 0)
        assert [book.resyncs for book in client.books.values()] == [1, 1]
        assert not any(trades.seen_again for trades in client.trades.values())
        assert not any("historical" in request.path for request in simulator.truth.requests)
        await assert_whole(simulator, client)


async def test_ids_that_rest_does_not_have_are_known_to_be_absent() -> None:
    async with (
        Simulator(CONFIG) as simulator,
        follower(simulator) as client,
    ):
        await is_settled(client)
        simulator.exchange.is_running.clear()
        await until(lambda: simulator.source.state == "stopped")
        last_id = simulator.truth.ids("BTCUSDT")[1]
        never = list(range(last_id + 1, last_id + 5))
        simulator.exchange.hide("BTCUSDT", never)
        simulator.inject(Order("drop", 4, "btcusdt@trade"))
        simulator.exchange.is_running.set()
        trades = client.trades["BTCUSDT"]
        await until(lambda: trades.absent == set(never) and trades.newest > never[-1])
        assert simulator.truth.withheld("BTCUSDT") == never
        assert simulator.truth.hidden("BTCUSDT") == never
        assert simulator.truth.trade("BTCUSDT", never[0]).id == never[0]
        assert not set(never) & set(trades.rows)


async def test_ends_with_the_true_book_and_every_trade_under_faults_by_seed_and_rate() -> None:
    rates = {
        **dict.fromkeys(("drop", "duplicate", "reorder", "truncate", "wrong_type", "nan"), 0.005),
        **dict.fromkeys(("cut", "close", "rest_503", "rest_empty", "stale_snapshot"), 0.4),
    }
    config = replace(CONFIG, fault_rates=rates, fault_seed=5)
    async with (
        Simulator(config) as simulator,
        follower(simulator) as client,
    ):
        await until(lambda: sum(simulator.truth.counts.values()) >= 30 and client.connects > 1)
        await assert_whole(simulator, client)
