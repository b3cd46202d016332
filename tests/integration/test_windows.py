"""What of the streams without ids is found to be missing, on a real Redis."""

from pathlib import Path

import pytest
from redis.asyncio import Redis

from collector.windows import Windows
from sluice import coverage, records
from sluice.publisher import Publisher
from sluice.queue import STREAMS_COVERED, RecordQueue
from sluice.records import Gap, Kline, Ticker
from sluice.settings import Market, Settings
from tests.unit.collector.test_candles import MINUTE, candle

MARKET = Market("binance", "BTCUSDT")
SECOND = 1_000_000


def ticker(second: int) -> Ticker:
    return Ticker(
        exchange="binance",
        symbol="BTCUSDT",
        kind="ticker",
        ts_event=second * SECOND,
        last_price="1",
        open="1",
        high="1",
        low="1",
        volume="1",
        quote_volume="1",
        bid_price="1",
        bid_size="1",
        ask_price="1",
        ask_size="1",
        trade_count=1,
        ts_recv=1,
    )


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "SETTLE_SECONDS", 0.0)


class Collected:
    """What one process read, and the windows that it and others named."""

    def __init__(self, redis: Redis, directory: Path) -> None:
        self._redis = redis
        settings = Settings.model_validate({"spool_dir": directory})
        self.publisher = Publisher(redis, settings)
        self.windows = Windows(redis, self.publisher)
        self.windows.follow(["kline_1m", "ticker"])

    def read(self, *found: Kline | Ticker) -> None:
        for record in found:
            self.publisher.put(record)
            self.windows.read(record)

    async def settle(self) -> None:
        """As if everything put had been pushed."""
        self.publisher.counts.pushed.update(self.publisher.counts.put)
        await self.windows.finish()

    async def gaps(self) -> list[tuple[str, str, int | None, int | None]]:
        claim = await RecordQueue(self._redis, "gap").claim(100, 10**6)
        found = [records.decode("gap", item) for item in claim.items]
        return [
            (gap.channel, gap.status, gap.ts_from, gap.ts_to)
            for gap in found
            if isinstance(gap, Gap)
        ]


async def test_a_candle_that_is_passed_over_is_a_window(redis: Redis, tmp_path: Path) -> None:
    collected = Collected(redis, tmp_path)
    collected.read(candle(1), candle(2), candle(2), candle(5), candle(6))
    await collected.settle()
    assert await collected.gaps() == [("kline_1m", "open", 3 * MINUTE, 5 * MINUTE)]


async def test_tickers_are_missed_only_where_the_socket_was(redis: Redis, tmp_path: Path) -> None:
    collected = Collected(redis, tmp_path)
    collected.read(ticker(1), ticker(9))
    collected.windows.broken([MARKET])
    collected.read(ticker(12), ticker(13))
    await collected.settle()
    assert await collected.gaps() == [("ticker", "lost", 9 * SECOND, 12 * SECOND)]


async def test_what_a_dead_process_missed_is_found_by_the_next(
    redis: Redis, tmp_path: Path
) -> None:
    before = Collected(redis, tmp_path)
    before.read(candle(1), ticker(120))
    await before.settle()
    assert await before.gaps() == []
    after = Collected(redis, tmp_path)
    after.read(candle(4), ticker(300))
    await after.settle()
    assert sorted(await after.gaps()) == [
        ("kline_1m", "open", 2 * MINUTE, 4 * MINUTE),
        ("ticker", "lost", 120 * SECOND, 300 * SECOND),
    ]


async def test_nothing_is_noted_before_the_publisher_has_let_go_of_it(
    redis: Redis, tmp_path: Path
) -> None:
    collected = Collected(redis, tmp_path)
    collected.read(candle(1))
    for _ in range(3):
        await collected.windows.finish()
    assert await redis.hlen(STREAMS_COVERED) == 0
    await collected.settle()
    assert await redis.hgetall(STREAMS_COVERED) == {
        b"binance:BTCUSDT:kline_1m": str(2 * MINUTE).encode()
    }
