"""The publisher where there is no Redis at all: what it holds, and what goes to the disk."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from sluice import publisher as module
from sluice import records
from sluice.connections import connect_redis
from sluice.publisher import Publisher, contiguous
from sluice.queue import Segment
from sluice.records import Gap, Kline, Trade
from sluice.settings import Settings
from sluice.spool import Spool, adopt
from tests.faults.waiting import eventually

NAME = "binance:BTCUSDT:trade"


def trade(trade_id: int, first_id: int | None = None, symbol: str = "BTCUSDT") -> Trade:
    first = trade_id if first_id is None else first_id
    return Trade("binance", symbol, trade_id, first, "1.5", "2", "buy", trade_id, trade_id)


def kline(minute: int) -> Kline:
    start = minute * 60_000_000
    prices, volumes = ("1.5",) * 4, ("2", "3")
    return Kline(
        *("binance", "BTCUSDT", "1m", start, start + 59_999_000, *prices, *volumes),
        *(1, "1", "1", 1, 1, start),
    )


def gap(number: int) -> Gap:
    return Gap(
        *("binance", "BTCUSDT", f"g{number}", "trade", number, number, None, None, "a test"),
        *("filled", 0, 1, 1, 1),
    )


def balance(publisher: Publisher) -> int:
    """What was put and is not accounted for: 0 at any instant."""
    counts = publisher.counts
    known = counts.pushed.total() + counts.spooled + counts.shed + publisher.in_memory
    return counts.put.total() - known


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """Settings that lead to a Redis that is not there, and will not be."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused at once
        yield Settings.model_validate(
            {"redis_port": taken.getsockname()[1], "spool_dir": tmp_path / "spool"}
        )


@contextlib.asynccontextmanager
async def publishing(settings: Settings) -> AsyncIterator[Publisher]:
    """Run a publisher for the time of the block, and stop it as a process does."""
    redis: Redis = connect_redis(settings)
    publisher = Publisher(redis, settings)
    stop = asyncio.Event()
    running = asyncio.create_task(publisher.run(stop))
    try:
        yield publisher
    finally:
        stop.set()
        await running
        await redis.aclose()


def on_disk(settings: Settings) -> list[tuple[str, list[bytes], list[Segment]]]:
    """What the spools of a directory hold, in order; they are left as they were."""
    held = []
    for spool in adopt(settings.spool_dir, 2**30):
        while (oldest := spool.oldest()) is not None:
            position, batch = oldest
            held.append((batch.kind, list(batch.items), list(batch.segments)))
            spool.remove(position)
        spool.close()
    return held


def test_runs_of_contiguous_ids_become_segments() -> None:
    runs = contiguous([trade(3, first_id=1), trade(4), trade(5), trade(9), trade(12, first_id=10)])
    assert runs == [Segment(NAME, 1, 5), Segment(NAME, 9, 12)]
    assert contiguous([]) == []


def test_markets_that_alternate_do_not_break_each_other_s_runs() -> None:
    other = "binance:ETHUSDT:trade"
    mixed = [trade(1), trade(7, symbol="ETHUSDT"), trade(2), trade(8, symbol="ETHUSDT"), trade(3)]
    assert contiguous(mixed) == [Segment(NAME, 1, 3), Segment(other, 7, 8)]


def test_what_comes_twice_or_late_is_a_run_of_its_own() -> None:
    runs = contiguous([trade(5), trade(5), trade(3), trade(4)])
    assert runs == [Segment(NAME, 5, 5), Segment(NAME, 5, 5), Segment(NAME, 3, 4)]


async def test_without_redis_records_wait_on_the_disk_in_order(settings: Settings) -> None:
    put = [trade(number) for number in range(1, 2001)]
    async with publishing(settings) as publisher:
        for record in put[:900]:
            publisher.put(record)
        await eventually(lambda: publisher.counts.spooled == 900)
        for record in put[900:]:
            publisher.put(record)
    assert publisher.in_memory == 0
    assert balance(publisher) == 0
    held = on_disk(settings)
    assert [item for _, items, _ in held for item in items] == [records.encode(r) for r in put]
    assert next(run for *_, runs in held for run in runs) == Segment(NAME, 1, 900)


async def test_a_gap_is_never_ahead_of_the_records_put_before_it(settings: Settings) -> None:
    async with publishing(settings) as publisher:
        publisher.put(gap(1))
        publisher.put(trade(1))
        publisher.put(kline(1))
    assert [kind for kind, *_ in on_disk(settings)] == ["trade", "kline", "gap"]


async def test_batches_are_bounded_by_count_and_by_bytes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_IN_BATCH", 30)
    monkeypatch.setattr(module, "MOST_BYTES_IN_BATCH", 1000)
    size = len(records.encode(trade(1000)))
    async with publishing(settings) as publisher:
        for number in range(1000, 1100):
            publisher.put(trade(number))
    held = on_disk(settings)
    # A batch is full once it has reached a bound, so it goes over it by one record at most.
    assert [len(items) for _, items, _ in held[:-1]] == [-(-1000 // size)] * (len(held) - 1)
    assert sum(len(items) for _, items, _ in held) == 100
    assert next(run for *_, runs in held for run in runs).first == 1000


async def test_where_neither_takes_records_they_are_shed_and_counted(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "spool").write_text("a file, no directory")
    async with publishing(settings) as publisher:
        for number in range(1, 11):
            publisher.put(trade(number))
        publisher.put(kline(1))
        await eventually(lambda: publisher.counts.shed == 11)
        assert balance(publisher) == 0
    assert publisher.in_memory == 0


async def test_a_full_spool_sheds_only_what_it_has_no_room_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_IN_BATCH", 500)
    small = settings.model_copy(update={"spool_max_mb": 1})
    size = len(records.encode(trade(100_000)))
    count = 2 * 2**20 // size
    async with publishing(small) as publisher:
        for number in range(100_000, 100_000 + count):
            publisher.put(trade(number))
    counts = publisher.counts
    assert counts.spooled > 0
    assert counts.shed > 0
    assert counts.spooled + counts.shed == count
    held = [item for _, items, _ in on_disk(small) for item in items]
    assert held == [records.encode(trade(100_000 + n)) for n in range(counts.spooled)]


async def test_memory_is_bounded(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES_IN_MEMORY", 10_000)
    redis = connect_redis(settings)
    publisher = Publisher(redis, settings)  # it does not run: nothing moves
    size = len(records.encode(trade(1000)))
    for number in range(1000, 2000):
        publisher.put(trade(number))
    assert publisher.in_memory == 10_000 // size
    assert publisher.counts.shed == 1000 - publisher.in_memory
    assert balance(publisher) == 0
    await redis.aclose()


async def test_a_publisher_that_is_cancelled_leaves_nothing_in_memory(settings: Settings) -> None:
    redis = connect_redis(settings)
    publisher = Publisher(redis, settings)
    running = asyncio.create_task(publisher.run(asyncio.Event()))
    await eventually(lambda: publisher.counts.failures > 0 or not publisher.is_fit)
    publisher.put(trade(1))
    await asyncio.sleep(0)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await redis.aclose()
    assert publisher.in_memory == 0
    assert [items for _, items, _ in on_disk(settings)] == [[records.encode(trade(1))]]


async def test_a_bug_while_pushing_loses_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: Publisher) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Publisher, "_adopt", fail)
    redis = connect_redis(settings)
    publisher = Publisher(redis, settings)
    for number in range(1, 4):
        publisher.put(trade(number))
    with pytest.raises(ZeroDivisionError):
        await publisher.run(asyncio.Event())
    await redis.aclose()
    assert publisher.in_memory == 0
    assert len(on_disk(settings)) == 1


async def test_a_broken_spool_is_left_and_the_process_goes_on(settings: Settings) -> None:
    settings.spool_dir.mkdir()
    (settings.spool_dir / "a.spool").write_bytes(b"no database at all" * 100)
    async with publishing(settings) as publisher:
        publisher.put(trade(1))
        await eventually(lambda: publisher.counts.spooled == 1)
    assert (settings.spool_dir / "a.spool.broken").exists()
    assert len(on_disk(settings)) == 1


def test_a_spool_that_is_held_is_not_adopted_twice(settings: Settings) -> None:
    spool = Spool.create(settings.spool_dir, 2**20)
    assert adopt(settings.spool_dir, 2**20) == []
    spool.close()
