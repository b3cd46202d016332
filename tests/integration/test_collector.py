"""What looks after completeness, with real servers: anchors, backfill, liveness."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager

import asyncpg
import msgspec
import pytest
from aiohttp import web
from loguru import logger
from redis.asyncio import Redis

from collector import anchors as anchors_module
from collector import backfill as backfill_module
from collector import liveness as liveness_module
from collector import skew as skew_module
from collector.aggregates import subtract
from collector.anchors import Anchors
from collector.backfill import Backfill, Venue
from collector.ledger import Ledger, gaps_key
from collector.liveness import Liveness
from collector.skew import ClockSkew
from sluice import records
from sluice.budget import Budget
from sluice.exchanges import EXCHANGES
from sluice.queue import HEADS, UNANCHORED, WINDOWS, RecordQueue, Segment, holes_key
from sluice.records import Gap
from sluice.rest import RestClient
from sluice.settings import Market, Settings
from tests.faults.waiting import eventually
from tests.served import Answer, served
from tests.servers import Database

MARKET = Market("simulator", "BTCUSDT")
NAME = "simulator:BTCUSDT:trade"


@asynccontextmanager
async def asked(redis: Redis, answer: Answer, **changes: object) -> AsyncIterator[dict[str, Venue]]:
    """Give the venue whose REST service answers so."""
    async with served(answer) as url:
        settings = Settings.model_validate({"simulator_rest_url": url, **changes})
        exchange = EXCHANGES["simulator"]
        client = RestClient(exchange, settings, Budget(redis, exchange))
        try:
            yield {"simulator": Venue(exchange, client)}
        finally:
            await client.close()


@asynccontextmanager
async def during(work: Coroutine[None, None, None], stop: asyncio.Event) -> AsyncIterator[None]:
    """Run something that ends with `stop` for the time of the block."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        stop.set()
        await task


def history(*ids: int) -> list[dict[str, object]]:
    return [
        {"id": n, "price": "1.5", "qty": "2", "time": 1_790_000_000_000 + n, "isBuyerMaker": True}
        for n in ids
    ]


async def holes(redis: Redis) -> list[tuple[int, int]]:
    return [(hole.first, hole.last) for hole in await Ledger(redis, MARKET).holes()]


async def queued_ids(redis: Redis) -> list[int]:
    items: list[bytes] = await redis.lrange(RecordQueue(redis, "trade").key, 0, -1)  # type: ignore[assignment]  # nothing decodes
    found = [records.decode("trade", item) for item in items]
    return [trade.trade_id for trade in found if isinstance(trade, records.Trade)]


async def named(redis: Redis) -> list[Gap]:
    """Give what the gap queue holds, the newest word on each gap only."""
    items: list[bytes] = await redis.lrange(RecordQueue(redis, "gap").key, 0, -1)  # type: ignore[assignment]  # nothing decodes
    found = [records.decode("gap", item) for item in items]
    return list({gap.gap_id: gap for gap in found if isinstance(gap, Gap)}.values())


@pytest.mark.parametrize(
    ("explained", "left"),
    [
        ([], [(1, 9), (20, 29)]),
        ([(1, 9), (20, 29)], []),
        ([(0, 3), (9, 21)], [(4, 8), (22, 29)]),
        ([(5, 5), (7, 7)], [(1, 4), (6, 6), (8, 9), (20, 29)]),
        ([(10, 19)], [(1, 9), (20, 29)]),
        ([(25, 99), (0, 25)], []),
    ],
)
def test_explained_ids_are_no_holes(
    explained: list[tuple[int, int]], left: list[tuple[int, int]]
) -> None:
    assert subtract([(1, 9), (20, 29)], explained) == left


async def store(database: Database, ids: list[int], absent: list[int]) -> None:
    connection = await asyncpg.connect(database.dsn)
    try:
        await connection.execute(
            "INSERT INTO markets (exchange, symbol, id_kind) VALUES ('simulator', 'BTCUSDT', 'raw')"
        )
        await connection.executemany(
            "INSERT INTO trades VALUES (to_timestamp($1::float8), $1::bigint, $1::bigint, now(),"
            " market('simulator', 'BTCUSDT'), 'buy', 1, 1)",
            [(number,) for number in ids],
        )
        await connection.executemany(
            "INSERT INTO gaps (gap_id, market_id, channel, from_id, to_id, cause, status, tries,"
            " revision, opened_at) VALUES ($1::bigint::text, market('simulator', 'BTCUSDT'),"
            " 'trade', $1, $1, 'a test', 'absent', 0, 1, now())",
            [(number,) for number in absent],
        )
    finally:
        await connection.close()


async def anchored(
    redis: Redis, database: Database, first_pushed: dict[str, int], first: int
) -> None:
    """Let the head be missing at `first`, and wait until it is looked after."""
    values = {name.lower(): value for name, value in database.environment.items()}
    settings = Settings.model_validate(values)
    await RecordQueue(redis, "trade").push([], [Segment(NAME, first, first + 1)])
    assert await redis.hget(UNANCHORED, NAME) == str(first).encode()
    anchors = Anchors(redis, [Ledger(redis, MARKET)], {}, first_pushed, settings)
    stop = asyncio.Event()
    async with during(anchors.run(stop), stop):
        await eventually(lambda: _is(redis.hexists(UNANCHORED, NAME), expected=False))


async def _is(found: Awaitable[object], *, expected: object) -> bool:
    return await found == expected


async def test_what_the_table_lacks_below_the_first_id_becomes_holes(
    redis: Redis, postgres: Database
) -> None:
    await store(postgres, [1, 2, 3, 8, 9, 10], absent=[5])
    await anchored(redis, postgres, {}, 20)
    assert await holes(redis) == [(4, 4), (6, 7), (11, 19)]


async def test_a_table_that_continues_up_to_the_first_id_has_no_holes(
    redis: Redis, postgres: Database
) -> None:
    await store(postgres, [17, 18, 19, 20, 21], absent=[])
    await anchored(redis, postgres, {}, 20)
    assert await holes(redis) == []


async def test_what_was_pushed_to_a_redis_that_is_empty_now_is_fetched_again(
    redis: Redis, postgres: Database
) -> None:
    await anchored(redis, postgres, {NAME: 5}, 20)
    assert await holes(redis) == [(5, 19)]


async def test_a_market_that_is_new_begins_where_it_begins(
    redis: Redis, postgres: Database
) -> None:
    await anchored(redis, postgres, {NAME: 20}, 20)
    assert await holes(redis) == []


async def test_an_open_gap_that_redis_has_forgotten_is_worked_on_again(
    redis: Redis, postgres: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchors_module, "ORPHANS_SECONDS", 0.0)
    await store(postgres, [1, 2, 5, 10], absent=[7])
    connection = await asyncpg.connect(postgres.dsn)
    try:
        await connection.executemany(
            "INSERT INTO gaps (gap_id, market_id, channel, from_id, to_id, cause, status, tries,"
            " revision, opened_at) VALUES ($1, market('simulator', 'BTCUSDT'), 'trade', $2, $3,"
            " 'a test', $4, 3, 17, to_timestamp(1.5))",
            [("orphan", 3, 9, "open"), ("whole", 1, 2, "open"), ("closed", 11, 12, "filled")],
        )
    finally:
        await connection.close()
    values = {name.lower(): value for name, value in postgres.environment.items()}
    ledger = Ledger(redis, MARKET)
    anchors = Anchors(redis, [ledger], {}, {}, Settings.model_validate(values))
    stop = asyncio.Event()
    async with during(anchors.run(stop), stop):
        await eventually(lambda: _is(redis.hlen(gaps_key(NAME)), expected=2))
    assert await holes(redis) == [(3, 4), (6, 6), (8, 9)]
    kept = {gap.gap_id: gap for gap in await ledger.open_gaps()}
    assert (kept["orphan"].from_id, kept["orphan"].to_id) == (3, 9)
    assert (kept["orphan"].tries, kept["orphan"].revision) == (3, 17)
    assert kept["orphan"].ts_opened == 1_500_000
    # What lacks nothing is closed at once, the other when its holes are gone.
    assert [gap.gap_id for gap in await ledger.settle(60_000, "")] == ["orphan"]


async def test_a_gap_on_its_way_to_the_table_is_no_orphan(
    redis: Redis, postgres: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchors_module, "ORPHANS_SECONDS", 0.0)
    await store(postgres, [1], absent=[])
    connection = await asyncpg.connect(postgres.dsn)
    try:
        await connection.execute(
            "INSERT INTO gaps (gap_id, market_id, channel, from_id, to_id, cause, status, tries,"
            " revision, opened_at) VALUES ('closed since', market('simulator', 'BTCUSDT'),"
            " 'trade', 3, 9, 'a test', 'open', 0, 1, now())"
        )
    finally:
        await connection.close()
    await RecordQueue(redis, "gap").push([b"its end, not stored yet"])
    # The end of the run waits for the step that looks after the head and then after gaps.
    await anchored(redis, postgres, {NAME: 10}, 10)
    assert await redis.hlen(gaps_key(NAME)) == 0


async def test_an_open_window_that_redis_has_forgotten_is_refilled_again(
    redis: Redis, postgres: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchors_module, "ORPHANS_SECONDS", 0.0)
    await store(postgres, [1], absent=[])
    connection = await asyncpg.connect(postgres.dsn)
    try:
        await connection.executemany(
            "INSERT INTO gaps (gap_id, market_id, channel, from_time, to_time, cause, status,"
            " tries, revision, opened_at) VALUES ($1, market('simulator', 'BTCUSDT'), $1,"
            " to_timestamp(60), to_timestamp(180), 'a test', $2, 3, 17, to_timestamp(1.5))",
            [("kline_1m", "open"), ("kline_1h", "filled"), ("ticker", "open")],
        )
    finally:
        await connection.close()
    await anchored(redis, postgres, {NAME: 2}, 2)
    (kept,) = await redis.hvals(WINDOWS)
    gap = msgspec.json.decode(kept, type=Gap)
    assert (gap.exchange, gap.symbol, gap.channel) == ("simulator", "BTCUSDT", "kline_1m")
    assert (gap.ts_from, gap.ts_to, gap.tries) == (60_000_000, 180_000_000, 3)


async def test_a_first_start_fetches_the_hours_asked_for(redis: Redis, postgres: Database) -> None:
    asked_for: list[dict[str, str]] = []

    async def answer(request: web.Request) -> web.Response:
        asked_for.append(dict(request.query))
        if len(asked_for) == 1:
            return web.json_response([])  # nobody traded in the first hour
        aggregate = {"a": 1, "p": "1.5", "q": "2", "f": 90, "l": 93, "T": 1, "m": True}
        return web.json_response([aggregate])

    began = time.time()
    async with asked(redis, answer) as venues:
        values = {name.lower(): value for name, value in postgres.environment.items()}
        settings = Settings.model_validate({**values, "backfill_hours": 3})
        await RecordQueue(redis, "trade").push([], [Segment(NAME, 120, 121)])
        await store(postgres, [120, 121], absent=[])  # a flusher is fast
        anchors = Anchors(redis, [Ledger(redis, MARKET)], venues, {NAME: 120}, settings)
        stop = asyncio.Event()
        async with during(anchors.run(stop), stop):
            await eventually(lambda: _is(redis.hexists(UNANCHORED, NAME), expected=False))
    assert await holes(redis) == [(90, 119)]
    since, then = (int(query["startTime"]) / 1000 for query in asked_for)
    assert since == pytest.approx(began - 3 * 3600, abs=60)
    assert then == pytest.approx(since + 3600)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again sooner than in life."""
    monkeypatch.setattr(backfill_module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(backfill_module, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(backfill_module, "MOST_RETRY_SECONDS", 0.1)


@asynccontextmanager
async def filling(redis: Redis, answer: Answer) -> AsyncIterator[Backfill]:
    async with asked(redis, answer) as venues:
        ledgers = [Ledger(redis, MARKET)]
        backfill = Backfill(redis, ledgers, venues, settle_ms=0)
        stop = asyncio.Event()
        async with during(backfill.run(stop), stop):
            yield backfill


async def miss(redis: Redis, first: int, last: int) -> None:
    """Push what lies around a range of ids, and not the range."""
    around = [Segment(NAME, first - 1, first - 1), Segment(NAME, last + 1, last + 1)]
    await RecordQueue(redis, "trade").push([], around)


@pytest.mark.usefixtures("impatient")
async def test_a_hole_is_filled_page_by_page_and_its_gap_closed(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(EXCHANGES["simulator"]), "history_page", 10)

    async def answer(request: web.Request) -> web.Response:
        start, limit = int(request.query["fromId"]), int(request.query["limit"])
        return web.json_response(history(*range(start, min(start + limit, 201))))

    await miss(redis, 101, 135)
    async with filling(redis, answer) as backfill:
        await eventually(lambda: _is(_statuses(redis), expected=["filled"]))
    assert await queued_ids(redis) == list(range(101, 136))
    assert await holes(redis) == []
    assert backfill.pages == 4
    assert (await named(redis))[0].tries == 4


async def _statuses(redis: Redis) -> list[str]:
    return sorted(gap.status for gap in await named(redis))


@pytest.mark.usefixtures("impatient")
async def test_ids_that_the_venue_does_not_have_are_absent(redis: Redis) -> None:
    async def answer(request: web.Request) -> web.Response:
        start = int(request.query["fromId"])
        return web.json_response(history(*(n for n in (101, 104, 105, 106) if n >= start)))

    await miss(redis, 101, 105)
    async with filling(redis, answer):
        await eventually(lambda: _is(_statuses(redis), expected=["absent", "filled"]))
    assert await queued_ids(redis) == [101, 104, 105]
    (absent,) = (gap for gap in await named(redis) if gap.status == "absent")
    assert (absent.from_id, absent.to_id) == (102, 103)
    assert absent.tries >= backfill_module.SIGHTINGS
    assert await holes(redis) == []


@pytest.mark.usefixtures("impatient")
async def test_ids_that_are_no_longer_served_are_lost_and_said_to_be(redis: Redis) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"code": -2015, "msg": "Invalid API-key"}, status=401)

    await miss(redis, 101, 105)
    async with filling(redis, answer) as backfill:
        await eventually(lambda: _is(_statuses(redis), expected=["lost"]))
    assert backfill.pages == backfill_module.REFUSALS
    (lost,) = await named(redis)
    assert (lost.from_id, lost.to_id) == (101, 105)
    assert lost.cause.startswith("missed on the socket; /api/v3/historicalTrades: 401 -2015")
    assert await holes(redis) == []


@pytest.mark.usefixtures("impatient")
async def test_answers_that_prove_nothing_are_asked_for_again(redis: Redis) -> None:
    pages = [b"", b"<html>", b"[]", json.dumps(history(103, 101)).encode(), b'[{"id":"x"}]']

    async def answer(request: web.Request) -> web.Response:
        if pages:
            return web.Response(body=pages.pop(0))
        return web.json_response(history(*range(int(request.query["fromId"]), 200)))

    await miss(redis, 101, 105)
    async with filling(redis, answer):
        await eventually(lambda: _is(_statuses(redis), expected=["filled"]))
    assert await queued_ids(redis) == [101, 102, 103, 104, 105]


async def test_two_collectors_do_not_fetch_a_page_twice(redis: Redis) -> None:
    seen: list[int] = []

    async def answer(request: web.Request) -> web.Response:
        start = int(request.query["fromId"])
        seen.append(start)
        return web.json_response(history(*range(start, start + 1000)))

    await miss(redis, 101, 3100)
    async with filling(redis, answer), filling(redis, answer):
        await eventually(lambda: _is(holes(redis), expected=[]))
    assert sorted(seen) == [101, 1101, 2101]


@asynccontextmanager
async def watching(redis: Redis, newest: int) -> AsyncIterator[tuple[Liveness, list[str]]]:
    """Watch a market whose socket has said nothing for long; the venue's newest id is given."""

    async def answer(_: web.Request) -> web.Response:
        aggregate = {"a": 1, "p": "1.5", "q": "2", "f": 1, "l": newest, "T": 1, "m": True}
        return web.json_response([aggregate])

    renewed: list[str] = []
    async with asked(redis, answer) as venues:
        last_seen = {MARKET: time.monotonic() - 2 * liveness_module.MOST_SILENCE_SECONDS}
        liveness = Liveness(
            redis, venues, last_seen, lambda market, why: renewed.append(f"{market} {why}")
        )
        stop = asyncio.Event()
        async with during(liveness.run(stop), stop):
            await eventually(lambda: venues["simulator"].rest.requests > 0)
            yield liveness, renewed


async def test_a_market_that_is_quiet_at_the_venue_too_is_left_alone(redis: Redis) -> None:
    await redis.hset(HEADS, NAME, "7")
    async with watching(redis, newest=7) as (liveness, renewed):
        pass
    assert renewed == []
    assert liveness.stalls == 0
    assert await redis.zcard(holes_key(NAME)) == 0


async def test_a_socket_that_is_silent_while_the_venue_trades_is_replaced(redis: Redis) -> None:
    await redis.hset(HEADS, NAME, "7")
    async with watching(redis, newest=12) as (liveness, renewed):
        await eventually(lambda: bool(renewed))
    assert renewed == ["simulator:BTCUSDT simulator:BTCUSDT is silent"]
    assert liveness.stalls == 1
    assert await holes(redis) == [(8, 12)]


async def test_a_market_that_stays_silent_is_asked_about_again_but_its_socket_left_alone(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness_module, "MOST_SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(liveness_module, "LEAST_SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(liveness_module, "LOOK_SECONDS", 0.02)
    await redis.hset(HEADS, NAME, "7")
    async with watching(redis, newest=12) as (liveness, renewed):
        await eventually(lambda: bool(renewed))

        async def is_asked_again() -> bool:
            # What is missing is not fetched here: the head is put back.
            await redis.hset(HEADS, NAME, "7")
            return liveness.stalls > 3

        await eventually(is_asked_again)
    assert len(renewed) == 1


@pytest.mark.parametrize(("ahead", "is_told"), [(0, False), (3600, True), (-3600, True)])
async def test_a_clock_that_is_off_is_measured_and_told_once(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, ahead: int, *, is_told: bool
) -> None:
    monkeypatch.setattr(skew_module, "ASK_SECONDS", 0.05)
    # A busy machine may take its time, but not an hour.
    monkeypatch.setattr(skew_module, "MOST_SKEW", 60.0)

    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"serverTime": int((time.time() - ahead) * 1000)})

    told: list[str] = []
    sink = logger.add(lambda message: told.append(str(message)), level="WARNING")
    try:
        async with asked(redis, answer) as venues:
            skew = ClockSkew(venues)
            stop = asyncio.Event()
            async with during(skew.run(stop), stop):
                await eventually(lambda: venues["simulator"].rest.requests >= 3)
    finally:
        logger.remove(sink)
    assert skew.seconds["simulator"] == pytest.approx(ahead, abs=60)
    assert len(told) == is_told
