"""The windows of a stream that no process covered."""

import asyncio

import msgspec
import pytest
from redis.asyncio import Redis

from sluice import coverage, records
from sluice.coverage import Coverage, Return, missed_window
from sluice.queue import BOOKS_COVERED, STREAMS_COVERED, WINDOWS, RecordQueue, head_field
from sluice.records import Gap
from sluice.settings import Market

MARKET = Market("simulator", "BTCUSDT")


@pytest.mark.parametrize(
    ("lost", "covered", "window"),
    [
        (None, None, None),  # the first book there ever was
        (None, 40, (40, 100)),  # a restart
        (50, None, (50, 100)),
        (50, 40, (50, 100)),  # our own note lags behind our book
        (50, 60, (60, 100)),  # another process went on a little longer
        (50, 100, None),  # another process covers it
        (None, 120, None),
        (100, None, None),
    ],
)
def test_missed_window(lost: int | None, covered: int | None, window: tuple[int, int]) -> None:
    assert missed_window(Return(MARKET, 100, lost, "gap"), covered) == window


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "SETTLE_SECONDS", 0.0)


class Books:
    """One process's notes, and the gaps that it and others named."""

    def __init__(self, redis: Redis) -> None:
        self.coverage = Coverage(redis)
        self._queue = RecordQueue(redis, "gap")

    async def gaps(self) -> list[Gap]:
        claim = await self._queue.claim(100, 10**6)
        found = [records.decode("gap", item) for item in claim.items]
        return [gap for gap in found if isinstance(gap, Gap)]

    async def windows(self) -> list[tuple[int | None, int | None]]:
        return [(gap.ts_from, gap.ts_to) for gap in await self.gaps()]


@pytest.mark.usefixtures("at_once")
async def test_a_break_leaves_a_window(redis: Redis) -> None:
    books = Books(redis)
    books.coverage.covers(MARKET, 50)
    books.coverage.returned(Return(MARKET, 80, 50, "sequence broke"))
    books.coverage.covers(MARKET, 90)
    await books.coverage.flush()
    assert await books.windows() == [(50, 80)]
    (gap,) = await books.gaps()
    assert (gap.channel, gap.status, gap.cause) == ("depth", "lost", "sequence broke")
    assert gap.ts_closed is not None


@pytest.mark.usefixtures("at_once")
async def test_a_restart_leaves_a_window(redis: Redis) -> None:
    before = Books(redis)
    before.coverage.returned(Return(MARKET, 10, None, "start"))
    before.coverage.covers(MARKET, 50)
    await before.coverage.flush()
    assert await before.windows() == []
    after = Books(redis)
    after.coverage.returned(Return(MARKET, 80, None, "start"))
    after.coverage.covers(MARKET, 85)
    await after.coverage.flush()
    assert await after.windows() == [(50, 80)]


async def test_what_another_process_covers_is_no_window(redis: Redis) -> None:
    one, other = Books(redis), Books(redis)
    one.coverage.returned(Return(MARKET, 80, 50, "sequence broke"))
    one.coverage.covers(MARKET, 200)
    await one.coverage.flush()
    # Our own book must not pass for the other's.
    assert await redis.hlen(BOOKS_COVERED) == 0
    other.coverage.covers(MARKET, 90)
    await other.coverage.flush()
    await one.coverage.flush(is_final=True)
    assert await one.windows() == []


async def test_at_the_end_nothing_is_left_to_be_judged(redis: Redis) -> None:
    books = Books(redis)
    books.coverage.returned(Return(MARKET, 80, 50, "sequence broke"))
    await books.coverage.flush()
    assert await books.windows() == []
    await books.coverage.flush(is_final=True)
    assert await books.windows() == [(50, 80)]


@pytest.mark.usefixtures("at_once")
async def test_notes_only_move_on(redis: Redis) -> None:
    ahead, behind = Books(redis), Books(redis)
    ahead.coverage.covers(MARKET, 90)
    await ahead.coverage.flush()
    behind.coverage.covers(MARKET, 70)
    await behind.coverage.flush()
    assert await redis.hvals(BOOKS_COVERED) == [b"90"]


@pytest.mark.usefixtures("at_once")
async def test_a_window_that_can_be_refilled_is_kept_for_whoever_does(redis: Redis) -> None:
    candles = Coverage(redis, "kline_1m", status="open", notes_key=STREAMS_COVERED)
    candles.returned(Return(MARKET, 80, 50, "not received"))
    candles.covers(MARKET, 85)
    await candles.flush()
    kept = await redis.hgetall(WINDOWS)
    assert list(kept) == [b"simulator:BTCUSDT:kline_1m:50"]
    gap = msgspec.json.decode(kept[b"simulator:BTCUSDT:kline_1m:50"], type=Gap)
    assert (gap.channel, gap.status, gap.ts_closed) == ("kline_1m", "open", None)
    assert await redis.hgetall(STREAMS_COVERED) == {b"simulator:BTCUSDT:kline_1m": b"85"}


async def test_the_last_flush_may_meet_another_one(redis: Redis) -> None:
    books = Books(redis)
    books.coverage.covers(MARKET, 50)
    await asyncio.gather(books.coverage.flush(), books.coverage.flush(is_final=True))
    field = head_field(MARKET.exchange, MARKET.symbol, "depth")
    assert await redis.hget(BOOKS_COVERED, field) == b"50"
