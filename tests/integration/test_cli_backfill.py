"""`sluice backfill` on a real Redis, with a collector made by hand."""

import asyncio
import json
import os
import random
import signal
import sys
from asyncio.subprocess import PIPE, Process

import pytest
from redis.asyncio import Redis

from sluice.queue import HEADS, Hole, Holes, RecordQueue, Segment
from tests.faults.waiting import eventually

FIELD = "binance:BTCUSDT:trade"
HEAD = 1000


async def start(environment: dict[str, str], *arguments: str) -> Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from sluice.cli import main; main()", "backfill", *arguments),
        env={"PATH": os.environ["PATH"], "COLUMNS": "200", **environment},
        stdout=PIPE,
        stderr=PIPE,
    )


async def ended(process: Process) -> tuple[int | None, str, str]:
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
async def queue(redis: Redis) -> RecordQueue:
    queue = RecordQueue(redis, "trade")
    await queue.push([], [Segment(FIELD, 1, HEAD)])
    return queue


async def holes(redis: Redis) -> list[tuple[int, int]]:
    return [(hole.first, hole.last) for hole in await Holes(redis, FIELD).read()]


async def test_it_waits_until_every_id_has_been_pushed(
    redis: Redis, queue: RecordQueue, redis_environment: dict[str, str]
) -> None:
    process = await start(
        redis_environment, "binance:BTCUSDT", "--from", "100", "--to", "299", "--json"
    )
    await eventually(lambda: _is_hole(redis, (100, 299)))
    await queue.push([b"[]"], [Segment(FIELD, 100, 298)])
    assert await holes(redis) == [(299, 299)]
    assert process.returncode is None
    await queue.push([b"[]"], [Segment(FIELD, 299, 299)])
    code, out, err = await ended(process)
    assert code == 0, err
    assert json.loads(out) == [
        {"market": "binance:BTCUSDT", "from_id": 100, "to_id": 299, "left": 0}
    ]
    assert "200 trades" in err
    assert await redis.hget(HEADS, FIELD) == str(HEAD).encode()


async def test_other_holes_are_neither_waited_for_nor_touched(
    redis: Redis, queue: RecordQueue, redis_environment: dict[str, str]
) -> None:
    await Holes(redis, FIELD).reopen([(1, 9), (500, 600)])
    process = await start(redis_environment, "binance:BTCUSDT", "--from", "10", "--to", "20")
    await eventually(lambda: _is_hole(redis, (10, 20)))
    await queue.push([b"[]"], [Segment(FIELD, 10, 20)])
    code, _, err = await ended(process)
    assert code == 0, err
    assert await holes(redis) == [(1, 9), (500, 600)]


async def _is_hole(redis: Redis, wanted: tuple[int, int]) -> bool:
    return wanted in await holes(redis)


@pytest.mark.usefixtures("queue")
async def test_without_a_wait_it_says_how_many_are_left(
    redis: Redis, redis_environment: dict[str, str]
) -> None:
    arguments = ("BTCUSDT", "--from", "7", "--to", "7", "--no-wait", "--json")
    code, out, err = await ended(await start(redis_environment, *arguments))
    assert code == 0, err
    assert json.loads(out)[0]["left"] == 1
    assert await holes(redis) == [(7, 7)]


@pytest.mark.usefixtures("queue")
async def test_ctrl_c_ends_the_wait_and_leaves_the_holes(
    redis: Redis, redis_environment: dict[str, str]
) -> None:
    process = await start(redis_environment, "BTCUSDT", "--from", "7", "--to", "9")
    await eventually(lambda: _is_hole(redis, (7, 9)))
    process.send_signal(signal.SIGINT)
    code, _, err = await ended(process)
    assert code == 1
    assert "the collector goes on" in err
    assert "Traceback" not in err
    assert await holes(redis) == [(7, 9)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("BTCUSDT", "--from", "1", "--to", "1001"), "the newest trade"),
        (("ETHUSDT", "--from", "1", "--to", "2"), "no trade of binance:ETHUSDT"),
        (("BTCUSDT", "--from", "2", "--to", "1"), "2 to 1 is no range"),
        (("nowhere:BTCUSDT", "--from", "1", "--to", "1"), "no exchange"),
    ],
)
@pytest.mark.usefixtures("queue")
async def test_what_was_never_recorded_is_refused(
    arguments: tuple[str, ...], told: str, redis: Redis, redis_environment: dict[str, str]
) -> None:
    code, _, err = await ended(await start(redis_environment, *arguments))
    assert code == 2
    assert told in err
    assert await holes(redis) == []


async def test_holes_stay_disjoint_whatever_is_reopened_and_filled(
    redis: Redis, queue: RecordQueue
) -> None:
    draw = random.Random(5)
    missing: set[int] = set()
    opened = Holes(redis, FIELD)
    for _ in range(300):
        first = draw.randint(1, HEAD - 50)
        last = first + draw.randint(0, 50)
        if draw.random() < 0.5:
            await opened.reopen([(first, last)])
            missing |= set(range(first, last + 1))
        else:
            await queue.push([], [Segment(FIELD, first, last)])
            missing -= set(range(first, last + 1))
    found = [number for first, last in await holes(redis) for number in range(first, last + 1)]
    assert found == sorted(missing)
    assert missing


async def test_what_was_a_hole_before_keeps_its_age_where_it_is_not_reopened(redis: Redis) -> None:
    key = f"crypto:holes:{FIELD}"
    await redis.zadd(key, {"1-100-5": 1})
    await Holes(redis, FIELD).reopen([(90, 120), (10, 20)])
    below, low, between, high = await Holes(redis, FIELD).read()
    assert (below, between) == (Hole(1, 9, 5), Hole(21, 89, 5))
    assert ((low.first, low.last), (high.first, high.last)) == ((10, 20), (90, 120))
    assert min(low.opened_ms, high.opened_ms) > 10**12
