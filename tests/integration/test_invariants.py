"""Each invariant names what violates it: on made values, and on a real record that was broken."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal

import aiohttp
import asyncpg
import pytest
from redis.asyncio import Redis

from sluice.queue import Balance, RecordQueue, book_key
from sluice.settings import Market
from sluice.simulator import Simulator, SimulatorConfig
from tests import invariants
from tests.faults.waiting import CEILING, eventually
from tests.invariants import BookRow, GapRow, Resources, Verdict
from tests.servers import Database
from tests.truth import Book, Trade, Truth, levels, truth_of

BTC = Market("simulator", "BTCUSDT")
SHORT = 0.3
"""Seconds in which something must not happen."""


def trade(trade_id: int, **changes: str | int) -> Trade:
    made = Trade(trade_id, trade_id, "101.50000000", "0.10000000", "buy", 1_700_000_000_000_000)
    return made._replace(**changes)  # type: ignore[arg-type]  # a test names its fields rightly


PUBLISHED = [trade(number) for number in range(100, 110)]


def named(violations: list[invariants.Violation]) -> list[str]:
    return [str(violation) for violation in violations]


# Trades ---------------------------------------------------------------------------------------


def test_a_whole_record_violates_nothing() -> None:
    stored = [each for each in PUBLISHED if each.trade_id not in (103, 104)]
    gaps = [GapRow((103, 104), "absent"), GapRow((105, 106), "filled")]
    assert invariants.check_complete("m", PUBLISHED, stored, gaps) == []
    assert invariants.check_explanations("m", PUBLISHED, stored, gaps, [(103, 104)]) == []
    assert invariants.check_distinct("m", stored) == []
    assert invariants.check_fields("m", PUBLISHED, stored) == []


def test_what_is_missing_is_named() -> None:
    stored = [each for each in PUBLISHED if each.trade_id not in (103, 104, 107)]
    gaps = [GapRow((104, 104), "lost"), GapRow((107, 107), "filled")]
    assert named(invariants.check_complete("m", PUBLISHED, stored, gaps)) == [
        "complete (m): neither stored nor explained: 2 ids: 103, 107"
    ]


def test_what_was_never_published_is_named() -> None:
    stored = [*PUBLISHED, trade(111), trade(112)]
    assert named(invariants.check_complete("m", PUBLISHED, stored, [])) == [
        "complete (m): stored and never published: 2 ids: 111-112"
    ]


def test_an_explanation_must_be_true_and_final() -> None:
    stored = [each for each in PUBLISHED if each.trade_id not in range(103, 107)]
    gaps = [GapRow((103, 104), "lost"), GapRow((105, 105), "absent"), GapRow((106, 106), "open")]
    assert named(invariants.check_explanations("m", PUBLISHED, stored, gaps, [(104, 104)])) == [
        "explanations (m): a gap is still open: 106",
        "explanations (m): given up though the exchange serves it: 2 ids: 103, 105",
    ]


def test_a_trade_stored_twice_is_named_whatever_its_time() -> None:
    stored = [*PUBLISHED, trade(103, time=1_700_000_000_000_001)]
    assert named(invariants.check_distinct("m", stored)) == [
        "distinct (m): stored more than once: 1 ids: 103"
    ]


def test_a_trade_within_an_aggregate_is_there_twice() -> None:
    stored = [trade(109, first_id=100), trade(101), trade(105)]
    assert named(invariants.check_distinct("m", stored)) == [
        "distinct (m): stored more than once: 2 ids: 101, 105"
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("price", "101.5"),
        ("price", "101.50000001"),
        ("quantity", "0.09999999"),
        ("side", "sell"),
        ("time", 1_700_000_000_000_001),
    ],
)
def test_a_field_that_differs_in_its_last_digit_is_named(field: str, value: str | int) -> None:
    stored = [trade(100), trade(101, **{field: value})]
    (violation,) = named(invariants.check_fields("m", PUBLISHED, stored))
    assert violation.startswith(f"fields (m): trade 101: {field} is {value}, published was ")


def test_an_aggregate_holds_the_quantity_of_its_trades() -> None:
    right, wrong = (trade(104, first_id=102, quantity=text) for text in ("0.30000000", "0.3"))
    assert invariants.check_fields("m", PUBLISHED, [right]) == []
    assert named(invariants.check_fields("m", PUBLISHED, [wrong])) == [
        "fields (m): trade 104: quantity is 0.3, published was 0.30000000"
    ]


# Books ----------------------------------------------------------------------------------------

TRUTH = Book(levels([("100", "1"), ("99", "2"), ("98", "3")]), levels([("101", "4"), ("102", "5")]))


def row_of(book: Book, trusted_depth: int = 3) -> BookRow:
    return BookRow("the row", 7, trusted_depth, book)


@pytest.mark.parametrize(
    "row",
    [
        row_of(TRUTH),
        row_of(Book(levels([("100.0", "1.00"), ("99", "2"), ("98", "3")]), TRUTH.asks)),
        row_of(Book(TRUTH.bids[:2], TRUTH.asks[:2])),
        row_of(Book(TRUTH.bids[:1], TRUTH.asks), trusted_depth=1),
    ],
)
def test_a_true_book_violates_nothing(row: BookRow) -> None:
    assert invariants.check_book("m", row, TRUTH) == []


@pytest.mark.parametrize(
    ("book", "detail"),
    [
        (
            Book(levels([("100", "1"), ("99", "2.1"), ("98", "3")]), TRUTH.asks),
            "bids differ at level 2: 99 x 2.1 instead of 99 x 2",
        ),
        (
            Book([TRUTH.bids[0], TRUTH.bids[2]], TRUTH.asks),
            "bids differ at level 2: 98 x 3 instead of 99 x 2",
        ),
        (
            Book(TRUTH.bids, levels([("101", "4"), ("102", "5"), ("103", "6")])),
            "asks differ at level 3: 103 x 6 instead of nothing",
        ),
        (Book(TRUTH.bids, []), "asks differ at level 1: nothing instead of 101 x 4"),
    ],
)
def test_a_wrong_level_is_named(book: Book, detail: str) -> None:
    assert named(invariants.check_book("m", row_of(book), TRUTH)) == [
        f"books (m): the row, update 7: {detail}"
    ]


# Queues, resources, verdicts ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("balance", "rows", "detail"),
    [
        (Balance(10, 8, 0, 0), None, "pushed is not acked + dead + length"),
        (Balance(10, 8, 0, 2), None, "2 records still wait"),
        (Balance(10, 9, 1, 0), None, "1 dead letters instead of 0"),
        (Balance(10, 10, 0, 0), 11, "11 rows, but only 10 records were acked"),
        (Balance(10, 10, 0, 0), 0, "10 records were acked, and the table is empty"),
    ],
)
def test_a_balance_that_does_not_add_up_is_named(
    balance: Balance, rows: int | None, detail: str
) -> None:
    (violation,) = named(invariants.check_balance("trade", balance, rows=rows))
    assert violation.startswith(f"balance (trade): {detail}")


def test_a_balance_with_planted_dead_letters_and_repeated_rows_is_exact() -> None:
    assert invariants.check_balance("trade", Balance(10, 8, 2, 0), rows=7, dead=2) == []


def test_what_a_process_keeps_is_named() -> None:
    baseline, now = Resources(100, 10, 2, 5), Resources(160, 14, 2, 6)
    assert named(
        invariants.check_resources("p", baseline, now, allowance=Resources(50, 4, 0, 0))
    ) == ["resources (p): memory_bytes: 160 after 100", "resources (p): tasks: 6 after 5"]


async def test_resources_are_what_the_process_really_holds() -> None:
    before = Resources.of_self()
    with ExitStack() as stack:
        for _ in range(7):
            stack.enter_context(socket.socket())
        task = asyncio.create_task(asyncio.sleep(CEILING))
        ballast = b"x" * (64 << 20)
        now = Resources.of_self()
        task.cancel()
    assert now.descriptors == before.descriptors + 7
    assert now.tasks == before.tasks + 1
    assert now.memory_bytes >= before.memory_bytes + len(ballast) // 2
    assert now.threads >= 1


def test_a_fault_that_never_hit_makes_a_clean_run_inconclusive() -> None:
    assert Verdict().outcome == "green"
    verdict = Verdict(doubts=invariants.doubts_of({"cut": 3, "freeze": 0}))
    assert verdict.outcome == "inconclusive"
    with pytest.raises(invariants.InconclusiveError, match="'freeze' never hit"):
        verdict.require()


def test_a_violation_is_red_even_in_doubt() -> None:
    verdict = Verdict([invariants.Violation("distinct", "m", "twice")], ["nothing hit"])
    assert verdict.outcome == "red"
    with pytest.raises(AssertionError, match=r"distinct \(m\): twice"):
        verdict.require()


# A real record --------------------------------------------------------------------------------


@dataclass
class Recorded:
    """What a perfect pipeline would have left of a simulated market, and the truth beside it."""

    simulator: Simulator
    truth: Truth
    database: asyncpg.Connection
    redis: Redis
    first_id: int
    last_id: int

    @property
    def count(self) -> int:
        return self.last_id - self.first_id + 1

    async def judge(self, hits: dict[str, int] | None = None) -> Verdict:
        return await invariants.judge(
            self.truth,
            self.database,
            self.redis,
            [BTC],
            hits={"cut": 1} if hits is None else hits,
            within=SHORT,
        )

    async def control(self, page: str, **body: str | int) -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self.simulator.url}/control/{page}", json=body) as answer,
        ):
            answer.raise_for_status()

    async def store(self, from_id: int, to_id: int) -> None:
        for row in await self.truth.trades(BTC.symbol, from_id, to_id):
            await self.database.execute(
                "INSERT INTO trades (market_id, time, trade_id, first_id, price, quantity, side,"
                " received_at) VALUES (market('simulator', 'BTCUSDT'),"
                " 'epoch'::timestamptz + $1::bigint * interval '1us', $2, $2, $3::text::numeric,"
                " $4::text::numeric, $5, now()) ON CONFLICT DO NOTHING",
                row.time,
                row.trade_id,
                row.price,
                row.quantity,
                row.side,
            )

    async def store_book(self) -> None:
        update_id = self.simulator.truth.update_id(BTC.symbol)
        book = await self.truth.book(BTC.symbol, update_id, 20)
        assert book is not None
        await self.database.execute(
            "INSERT INTO orderbook_snapshots (market_id, time, update_id, sync_id, event_time,"
            " received_at, trusted_depth, bid_prices, bid_sizes, ask_prices, ask_sizes) VALUES"
            " (market('simulator', 'BTCUSDT'), now(), $1, 1, now(), now(), 20, $2, $3, $4, $5)",
            update_id,
            *([level[index] for level in side] for side in book for index in (0, 1)),
        )
        data = {
            side: [[str(price), str(size)] for price, size in getattr(book, side)]
            for side in ("bids", "asks")
        }
        await self.redis.hset(
            book_key("simulator", "BTCUSDT"),
            mapping={"data": json.dumps(data), "update_id": update_id},
        )

    async def pass_through_queue(self, kind: str, count: int) -> None:
        queue = RecordQueue(self.redis, kind)
        await queue.push([b"[]"] * count)
        await queue.ack(await queue.claim(count, 1 << 20), dead_max=0)


@pytest.fixture
async def recorded(postgres: Database, redis: Redis) -> AsyncIterator[Recorded]:
    database = await asyncpg.connect(postgres.dsn, timeout=CEILING)
    try:
        config = SimulatorConfig(symbols=(BTC.symbol,), seed=3, rate=200)
        async with Simulator(config) as simulator, truth_of(simulator.url) as truth:
            await eventually(lambda: simulator.truth.count(BTC.symbol) >= 40)
            record = Recorded(simulator, truth, database, redis, 0, 0)
            await record.control("source", action="stop")
            ids = simulator.truth.ids(BTC.symbol)
            assert ids is not None
            record.first_id, record.last_id = ids
            await database.execute(
                "INSERT INTO markets (exchange, symbol, id_kind)"
                " VALUES ('simulator', 'BTCUSDT', 'raw')"
            )
            await record.store(*ids)
            await record.store_book()
            await record.pass_through_queue("trade", record.count)
            await record.pass_through_queue("orderbook_snapshot", 1)
            yield record
    finally:
        await database.close()


async def test_a_perfect_record_is_green(recorded: Recorded) -> None:
    verdict = await recorded.judge()
    assert verdict == Verdict()
    verdict.require()
    assert (await recorded.judge({"cut": 0})).outcome == "inconclusive"


async def execute(recorded: Recorded, statement: str, *arguments: object) -> None:
    assert await recorded.database.execute(statement, *arguments) in (
        "DELETE 1",
        "UPDATE 1",
        "INSERT 0 1",
    )


async def lose_a_trade(recorded: Recorded) -> None:
    await execute(recorded, "DELETE FROM trades WHERE trade_id = $1", recorded.first_id + 5)


async def give_a_trade_up(recorded: Recorded) -> None:
    await lose_a_trade(recorded)
    await execute(
        recorded,
        "INSERT INTO gaps (gap_id, market_id, channel, from_id, to_id, cause, status, tries,"
        " revision, opened_at) VALUES ('g', market('simulator', 'BTCUSDT'), 'trade', $1, $1,"
        " 'test', 'lost', 1, 1, now())",
        recorded.first_id + 5,
    )
    await recorded.pass_through_queue("gap", 1)


async def store_a_trade_twice(recorded: Recorded) -> None:
    await execute(
        recorded,
        "INSERT INTO trades SELECT time + interval '1us', trade_id, first_id, received_at,"
        " market_id, side, price, quantity FROM trades WHERE trade_id = $1",
        recorded.first_id + 5,
    )
    await recorded.pass_through_queue("trade", 1)


async def change_a_digit(recorded: Recorded) -> None:
    await execute(
        recorded,
        "UPDATE trades SET price = price + 0.00000001 WHERE trade_id = $1",
        recorded.first_id + 5,
    )


async def change_a_stored_book(recorded: Recorded) -> None:
    await execute(recorded, "UPDATE orderbook_snapshots SET ask_sizes[3] = ask_sizes[3] * 2")


async def change_the_served_book(recorded: Recorded) -> None:
    key = book_key("simulator", "BTCUSDT")
    served = json.loads(await recorded.redis.hget(key, "data") or b"")
    served["bids"][0][1] = str(Decimal(served["bids"][0][1]) * 2)
    await recorded.redis.hset(key, "data", json.dumps(served))


async def leave_a_record_behind(recorded: Recorded) -> None:
    await RecordQueue(recorded.redis, "kline").push([b"[]"])


async def lose_a_push(recorded: Recorded) -> None:
    await leave_a_record_behind(recorded)
    await recorded.redis.delete(RecordQueue(recorded.redis, "kline").key)


async def ack_too_little(recorded: Recorded) -> None:
    await recorded.redis.flushdb()
    await recorded.pass_through_queue("trade", 1)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lose_a_trade, {"complete"}),
        (give_a_trade_up, {"explanations"}),
        (store_a_trade_twice, {"distinct", "fields"}),
        (change_a_digit, {"fields"}),
        (change_a_stored_book, {"books"}),
        (change_the_served_book, {"books"}),
        (leave_a_record_behind, {"balance"}),
        (lose_a_push, {"balance"}),
        (ack_too_little, {"balance"}),
    ],
)
async def test_a_broken_record_is_red_for_the_right_reason(
    recorded: Recorded, damage: Callable[[Recorded], Awaitable[None]], expected: set[str]
) -> None:
    await damage(recorded)
    verdict = await recorded.judge()
    assert verdict.outcome == "red"
    assert {violation.invariant for violation in verdict.violations} == expected


async def test_a_gap_that_the_exchange_does_not_serve_is_explained(recorded: Recorded) -> None:
    await give_a_trade_up(recorded)
    hidden = recorded.first_id + 5
    await recorded.control("hide", symbol=BTC.symbol, from_id=hidden, to_id=hidden)
    (await recorded.judge()).require()


async def test_nothing_to_compare_is_inconclusive(recorded: Recorded) -> None:
    await recorded.database.execute("DELETE FROM orderbook_snapshots")
    await recorded.redis.delete("crypto:queue:orderbook_snapshot:counters")
    assert (await recorded.judge()).doubts == [f"{BTC}: no book was stored"]


async def test_a_standstill_is_named_and_an_arrival_is_not(
    recorded: Recorded, postgres: Database
) -> None:
    checks = (invariants.check_fresh, invariants.wait_until_stored)
    await recorded.control("source", action="start")
    await eventually(lambda: recorded.simulator.truth.count(BTC.symbol) > recorded.count)
    for check in checks:
        (violation,) = await check(recorded.truth, recorded.database, BTC, within=SHORT)
        assert violation.invariant in ("fresh", "drained")
    watching = await asyncpg.connect(postgres.dsn, timeout=CEILING)
    try:
        stored = recorded.last_id
        for check in checks:
            checking = asyncio.create_task(check(recorded.truth, watching, BTC))
            while not checking.done():
                last = await recorded.truth.last_id(BTC.symbol)
                assert last is not None
                await recorded.store(stored + 1, last)
                stored = last
            assert await checking == []
    finally:
        await watching.close()
