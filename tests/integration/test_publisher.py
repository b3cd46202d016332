"""The publisher against a real Redis that refuses, freezes, dies, and comes back older."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from sluice import publisher as module
from sluice import records
from sluice.cli.servers import RedisServer
from sluice.connections import connect_redis
from sluice.publisher import Publisher
from sluice.queue import BAD_FRAMES, HEADS, UNANCHORED, RecordQueue, holes_key
from sluice.records import Gap, Kline, Record, Trade
from sluice.settings import Settings
from tests.faults import redis_faults
from tests.faults.waiting import eventually

NAME = "binance:BTCUSDT:trade"
PATIENT, IMPATIENT = 60.0, 0.5
"""Seconds after which a Redis that does not answer is given up; a slow one must not be."""


def trade(trade_id: int) -> Trade:
    return Trade("binance", "BTCUSDT", trade_id, trade_id, "1.5", "2", "buy", trade_id, trade_id)


def kline(minute: int) -> Kline:
    start = minute * 60_000_000
    prices, volumes = ("1.5",) * 4, ("2", "3")
    return Kline(
        *("binance", "BTCUSDT", "1m", start, start + 59_999_000, *prices, *volumes),
        *(1, "1", "1", 1, 1, start),
    )


def trades(first: int, last: int) -> list[Record]:
    return [trade(number) for number in range(first, last + 1)]


def settings_for(environment: dict[str, str], tmp_path: Path, **changes: object) -> Settings:
    values = {name.lower(): value for name, value in environment.items()}
    return Settings.model_validate({**values, "spool_dir": tmp_path / "spool", **changes})


@contextlib.asynccontextmanager
async def publishing(settings: Settings, patience: float = PATIENT) -> AsyncIterator[Publisher]:
    """Run a publisher for the time of the block, and stop it as a process does."""
    redis = connect_redis(settings, timeout=patience)
    publisher = Publisher(redis, settings)
    stop = asyncio.Event()
    running = asyncio.create_task(publisher.run(stop))
    try:
        yield publisher
    finally:
        stop.set()
        await running
        await redis.aclose()


async def queued(redis: Redis, kind: str = "trade") -> list[Record]:
    items: list[bytes] = await redis.lrange(RecordQueue(redis, kind).key, 0, -1)  # type: ignore[assignment]  # nothing decodes
    return [records.decode(kind, item) for item in items]


async def holes(redis: Redis) -> list[tuple[int, int]]:
    found: list[bytes] = await redis.zrange(holes_key(NAME), 0, -1)  # type: ignore[assignment]  # no scores
    return [(int(first), int(last)) for first, last, _ in (hole.split(b"-") for hole in found)]


async def put_and_wait(publisher: Publisher, put: list[Record]) -> None:
    """Put records and wait until Redis has them."""
    # What Redis has already may not have been counted yet.
    await eventually(lambda: publisher.in_memory == 0)
    before = publisher.counts.pushed.total() + publisher.counts.returned
    for record in put:
        publisher.put(record)
    counts = publisher.counts
    await eventually(lambda: counts.pushed.total() + counts.returned == before + len(put))


def is_balanced(publisher: Publisher) -> bool:
    counts = publisher.counts
    known = counts.pushed.total() + counts.spooled + counts.shed + publisher.in_memory
    return counts.put.total() == known


async def test_records_arrive_in_order_each_kind_in_its_queue(
    redis: Redis, redis_environment: dict[str, str], tmp_path: Path
) -> None:
    async with publishing(settings_for(redis_environment, tmp_path)) as publisher:
        await put_and_wait(publisher, [*trades(1, 1200), kline(1), kline(2)])
        assert publisher.lengths == {"trade": 1200, "kline": 2}
        await put_and_wait(publisher, trades(1201, 1300))
        assert publisher.in_memory == 0
    assert await queued(redis) == trades(1, 1300)
    assert await queued(redis, "kline") == [kline(1), kline(2)]
    assert (await RecordQueue(redis, "trade").balance()).is_exact
    assert not list((tmp_path / "spool").glob("*"))


async def test_what_is_in_memory_at_the_stop_is_pushed(
    redis: Redis, redis_environment: dict[str, str], tmp_path: Path
) -> None:
    async with publishing(settings_for(redis_environment, tmp_path)) as publisher:
        for record in trades(1, 700):
            publisher.put(record)
    assert await queued(redis) == trades(1, 700)


async def test_ids_that_were_passed_over_become_holes_until_they_come(
    redis: Redis, redis_environment: dict[str, str], tmp_path: Path
) -> None:
    async with publishing(settings_for(redis_environment, tmp_path)) as publisher:
        await put_and_wait(publisher, [*trades(1, 5), *trades(9, 10), *trades(20, 20)])
        assert await holes(redis) == [(6, 8), (11, 19)]
        await put_and_wait(publisher, [*trades(7, 7), *trades(11, 19)])
        assert await holes(redis) == [(6, 6), (8, 8)]
        await put_and_wait(publisher, [*trades(8, 8), *trades(6, 6), *trades(6, 6)])
        assert await holes(redis) == []
    assert await redis.hget(HEADS, NAME) == b"20"
    assert publisher.first_pushed == {NAME: 1}


Refusal = Callable[[Redis], AbstractAsyncContextManager[None]]


@pytest.mark.parametrize("refusal", [redis_faults.memory_full, redis_faults.read_only])
async def test_what_redis_refuses_waits_on_the_disk_and_returns_in_order(
    private_redis: RedisServer, tmp_path: Path, refusal: Refusal
) -> None:
    settings = settings_for(private_redis.environment, tmp_path)
    async with publishing(settings) as publisher, connect_redis(settings) as redis:
        await put_and_wait(publisher, trades(1, 10))
        async with refusal(redis):
            for first in (11, 21, 31):
                spooled = publisher.counts.spooled
                for record in trades(first, first + 9):
                    publisher.put(record)
                await eventually(lambda n=spooled: publisher.counts.spooled == n + 10)  # type: ignore[misc]  # bound early
            assert publisher.spool_records == 30
            assert is_balanced(publisher)
        last = 40
        while publisher.counts.returned < 30:
            last += 1  # what comes meanwhile does not overtake
            publisher.put(trade(last))
            await asyncio.sleep(0.005)
        await eventually(lambda: publisher.in_memory == 0 and publisher.spool_bytes == 0)
        await put_and_wait(publisher, trades(last + 1, last + 10))
        assert await queued(redis) == trades(1, last + 10)
        assert await holes(redis) == []
    assert not list((tmp_path / "spool").glob("*"))


async def broken(
    private_redis: RedisServer,
    tmp_path: Path,
    breaking: Callable[[RedisServer], None],
    mending: Callable[[RedisServer], None],
) -> None:
    """Break Redis under a publisher: every record arrives, if not once."""
    settings = settings_for(private_redis.environment, tmp_path)
    async with publishing(settings, IMPATIENT) as publisher:
        await put_and_wait(publisher, trades(1, 10))
        await asyncio.to_thread(breaking, private_redis)
        for record in trades(11, 20):
            publisher.put(record)
        await eventually(lambda: publisher.counts.spooled == 10)
        assert not publisher.is_fit
        await asyncio.to_thread(mending, private_redis)
        await eventually(lambda: publisher.counts.returned == 10)
        await put_and_wait(publisher, trades(21, 30))
        assert is_balanced(publisher)
    async with connect_redis(settings) as redis:
        # A push that was not answered may have happened: it comes a second time, in its place.
        assert list(dict.fromkeys(await queued(redis))) == trades(1, 30)
        assert await holes(redis) == []


async def test_a_redis_that_is_killed_and_comes_back(
    private_redis: RedisServer, tmp_path: Path
) -> None:
    await broken(private_redis, tmp_path, RedisServer.kill, RedisServer.start)


async def test_a_redis_that_freezes_and_thaws(private_redis: RedisServer, tmp_path: Path) -> None:
    await broken(private_redis, tmp_path, RedisServer.freeze, RedisServer.thaw)


async def test_a_publisher_cancelled_before_a_frozen_redis_leaves_all_to_the_next_one(
    private_redis: RedisServer, tmp_path: Path
) -> None:
    settings = settings_for(private_redis.environment, tmp_path)
    client = connect_redis(settings, timeout=600)  # it never gives up by itself
    publisher = Publisher(client, settings)
    stop = asyncio.Event()
    running = asyncio.create_task(publisher.run(stop))
    await put_and_wait(publisher, trades(1, 10))
    await asyncio.to_thread(private_redis.freeze)
    for record in trades(11, 20):
        publisher.put(record)
    stop.set()
    await eventually(lambda: publisher.in_memory == 10)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert publisher.in_memory == 0
    assert publisher.counts.spooled == 10
    await client.aclose()
    await asyncio.to_thread(private_redis.thaw)
    async with publishing(settings) as successor, connect_redis(settings) as redis:
        await eventually(lambda: successor.counts.returned == 10)
        assert list(dict.fromkeys(await queued(redis))) == trades(1, 20)


async def test_a_spool_whose_writer_is_gone_is_adopted_by_a_running_publisher(
    redis: Redis, redis_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ADOPT_SECONDS", 0.1)
    settings = settings_for(redis_environment, tmp_path)
    nowhere = settings.model_copy(update={"redis_host": str(tmp_path / "no.sock")})
    async with publishing(settings) as publisher:
        await put_and_wait(publisher, trades(1, 5))
        async with publishing(nowhere) as elsewhere:
            for record in trades(6, 9):
                elsewhere.put(record)
        assert elsewhere.counts.spooled == 4
        await eventually(lambda: publisher.counts.returned == 4)
    assert await queued(redis) == trades(1, 9)
    assert not list((tmp_path / "spool").glob("*"))


async def test_a_redis_that_comes_back_older_has_a_hole_where_it_lost_records(
    private_redis: RedisServer, tmp_path: Path
) -> None:
    settings = settings_for(private_redis.environment, tmp_path)
    async with publishing(settings) as publisher, connect_redis(settings) as redis:
        await put_and_wait(publisher, trades(1, 10))
        copy = await asyncio.to_thread(redis_faults.copy_data, private_redis, tmp_path / "copy")
        await put_and_wait(publisher, trades(11, 20))
        await asyncio.to_thread(redis_faults.restart_from, private_redis, copy)
        # Found without a new record: the market may be quiet for long.
        await eventually(lambda: _is_in(holes(redis), [(11, 20)]))
        await put_and_wait(publisher, trades(21, 30))
        assert await redis.hget(HEADS, NAME) == b"30"
        assert await holes(redis) == [(11, 20)]


async def _is_in(found: Awaitable[object], expected: object) -> bool:
    try:
        return await found == expected
    except (OSError, RedisError):
        return False  # not back yet


async def test_a_redis_that_comes_back_empty_is_anchored_again(
    private_redis: RedisServer, tmp_path: Path
) -> None:
    settings = settings_for(private_redis.environment, tmp_path)
    async with publishing(settings) as publisher, connect_redis(settings) as redis:
        await put_and_wait(publisher, trades(1, 10))
        await asyncio.to_thread(redis_faults.restart_empty, private_redis)
        await eventually(lambda: _is_in(redis.hget(HEADS, NAME), b"10"))
        assert await redis.hget(UNANCHORED, NAME) == b"11"
        assert publisher.first_pushed[NAME] == 1
        await put_and_wait(publisher, trades(11, 15))
        assert await queued(redis) == trades(11, 15)


async def test_bad_frames_are_kept_the_newest_and_no_more_of_each_than_its_beginning(
    redis: Redis, redis_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_BAD_FRAMES", 5)
    async with publishing(settings_for(redis_environment, tmp_path)) as publisher:
        for number in range(4):
            publisher.put_bad_frame(b"\xff\x00{" + b"x" * 10_000, f"bad {number}")
        await eventually(lambda: _is_in(redis.llen(BAD_FRAMES), 4))
        for number in range(4, 8):
            publisher.put_bad_frame(b"[", f"bad {number}")
        await eventually(lambda: _is_in(_last_reason(redis), "bad 7"))
        assert publisher.counts.bad_frames == 8
        await eventually(lambda: _is_in(redis.llen(BAD_FRAMES), 5))
    kept = [json.loads(item) for item in await redis.lrange(BAD_FRAMES, 0, -1)]
    assert [frame["reason"] for frame in kept] == [f"bad {number}" for number in range(3, 8)]
    assert kept[0]["bytes"] == 10_003
    assert kept[0]["frame"].startswith("\\xff\x00{xxx")
    assert len(kept[0]["frame"]) < 5000


async def _last_reason(redis: Redis) -> object:
    item = await redis.lindex(BAD_FRAMES, -1)
    return json.loads(item)["reason"] if item else None


async def test_what_was_shed_is_named_by_a_gap_once_redis_is_back(
    private_redis: RedisServer, tmp_path: Path
) -> None:
    (tmp_path / "spool").write_text("a file, no directory")
    settings = settings_for(private_redis.environment, tmp_path)
    finding = Gap(
        *("binance", "BTCUSDT", "depth:1", "depth", None, None, 1, 2, "a test"),
        *("lost", 0, 2, 1, 2),
    )
    async with publishing(settings) as publisher, connect_redis(settings) as redis:
        await put_and_wait(publisher, trades(1, 3))
        async with redis_faults.memory_full(redis):
            for record in (*trades(4, 6), kline(1), kline(2), finding):
                publisher.put(record)
            await eventually(lambda: publisher.counts.shed == 6)
            assert is_balanced(publisher)
        await eventually(lambda: _is_in(redis.llen(RecordQueue(redis, "gap").key), 2))
        await put_and_wait(publisher, trades(7, 7))
        assert await holes(redis) == [(4, 6)]
        lost = {kind: await RecordQueue(redis, kind).shed() for kind in ("trade", "kline", "gap")}
        assert lost == {"trade": 3, "kline": 2, "gap": 1}
        named, window = await queued(redis, "gap")
    assert named == finding
    assert isinstance(window, Gap)
    assert (window.channel, window.status) == ("kline", "lost")
    assert window.ts_from is not None
    assert window.ts_to is not None
    assert window.ts_from <= window.ts_to
