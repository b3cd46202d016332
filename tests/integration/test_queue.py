"""The queue's scripts on a real Redis: nothing is trimmed that was not claimed, ids are judged."""

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from sluice.cli.servers import RedisServer
from sluice.queue import (
    HEADS,
    MAX_TRACKED_ID,
    UNANCHORED,
    Balance,
    Claim,
    DeadListFullError,
    RecordQueue,
    Segment,
    StaleClaimError,
    holes_key,
)

MANY = 10_000
FIELD = "binance:BTCUSDT:trade"


def items(*numbers: int) -> list[bytes]:
    return [b"[%d]" % number for number in numbers]


async def held(queue: RecordQueue) -> list[bytes]:
    return (await queue.claim(MANY, 2**30)).items


@pytest.fixture
def queue(redis: Redis) -> RecordQueue:
    return RecordQueue(redis, "trade")


async def test_a_claim_moves_nothing_and_an_ack_trims_what_was_claimed(queue: RecordQueue) -> None:
    assert (await queue.claim(5, 100)).items == []
    length, _ = await queue.push(items(1, 2, 3, 4, 5))
    assert length == 5
    claim = await queue.claim(3, 100)
    assert claim.items == items(1, 2, 3)
    assert await held(queue) == items(1, 2, 3, 4, 5)
    assert await queue.head_item() == b"[1]"
    assert await queue.ack(claim, dead_max=0) == 2
    assert await held(queue) == items(4, 5)
    assert await queue.balance() == Balance(pushed=5, acked=3, dead=0, length=2)


async def test_a_claim_ends_at_its_bytes_but_has_at_least_one_item(queue: RecordQueue) -> None:
    await queue.push([b"x" * 100, b"y" * 100, b"z"])
    assert (await queue.claim(MANY, 200)).items == [b"x" * 100, b"y" * 100]
    assert (await queue.claim(MANY, 201)).items == [b"x" * 100, b"y" * 100, b"z"]
    assert (await queue.claim(MANY, 1)).items == [b"x" * 100]


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 2500])
async def test_a_claim_of_any_size_is_the_head_in_order(queue: RecordQueue, size: int) -> None:
    await queue.push(items(*range(2400)))
    assert (await queue.claim(size, 2**30)).items == items(*range(min(size, 2400)))
    ahead = await queue.claim(size, 2**30, skip=700)
    assert ahead.items == items(*range(700, min(700 + size, 2400)))


async def test_a_claim_ahead_can_be_acked_only_after_the_one_before_it(queue: RecordQueue) -> None:
    await queue.push(items(1, 2, 3, 4, 5))
    first = await queue.claim(2, 100)
    second = await queue.claim(2, 100, skip=2)
    assert second == Claim(first.head + 2, items(3, 4))
    with pytest.raises(StaleClaimError):
        await queue.ack(second, dead_max=0)
    await queue.ack(first, dead_max=0)
    await queue.ack(second, dead_max=0)
    assert await held(queue) == items(5)


async def test_of_two_acks_of_one_batch_the_first_trims(queue: RecordQueue) -> None:
    await queue.push(items(*[7] * 20))  # equal bytes, so that only the counter tells
    first, second = await queue.claim(10, 1000), await queue.claim(10, 1000)
    await queue.ack(first, dead_max=0)
    with pytest.raises(StaleClaimError):
        await queue.ack(second, dead_max=0)
    assert await queue.balance() == Balance(pushed=20, acked=10, dead=0, length=10)


async def _replaced(redis: Redis, queue: RecordQueue) -> None:
    await redis.flushdb()
    await queue.push(items(1, 2, 3, 4))


async def _replaced_but_for_counter_and_first(redis: Redis, queue: RecordQueue) -> None:
    await _replaced_by(redis, queue, items(1, 8, 9, 10))


async def _replaced_but_for_counter_and_last(redis: Redis, queue: RecordQueue) -> None:
    await _replaced_by(redis, queue, items(8, 9, 3, 10))


async def _replaced_by(redis: Redis, queue: RecordQueue, others: list[bytes]) -> None:
    head = await redis.get(f"{queue.key}:head")
    assert head is not None
    await redis.flushdb()
    await redis.set(f"{queue.key}:head", head)
    await queue.push(others)


async def _shortened(redis: Redis, queue: RecordQueue) -> None:
    await redis.ltrim(queue.key, 0, 1)


async def _deleted(redis: Redis, queue: RecordQueue) -> None:
    await redis.delete(queue.key)


@pytest.mark.parametrize(
    "change",
    [
        _replaced,
        _replaced_but_for_counter_and_first,
        _replaced_but_for_counter_and_last,
        _shortened,
        _deleted,
    ],
)
async def test_a_list_that_is_another_one_since_the_claim_is_not_trimmed(
    redis: Redis, queue: RecordQueue, change: Callable[[Redis, RecordQueue], Awaitable[None]]
) -> None:
    await queue.push(items(1, 2, 3, 4))
    claim = await queue.claim(3, 100)
    await change(redis, queue)
    before = await redis.lrange(queue.key, 0, -1)
    with pytest.raises(StaleClaimError):
        await queue.ack(claim, [b"letter"], dead_max=10)
    assert await redis.lrange(queue.key, 0, -1) == before
    assert await redis.llen(queue.dead_key) == 0


async def test_a_copy_restored_from_before_an_ack_is_drained_again(
    redis: Redis, queue: RecordQueue
) -> None:
    await queue.push(items(1, 2, 3, 4))
    first = await queue.claim(2, 100)
    older = {key: await redis.dump(key) for key in await redis.keys()}
    assert len(older) == 4
    await queue.ack(first, dead_max=0)
    claim = await queue.claim(2, 100)
    await redis.flushdb()
    for key, dump in older.items():
        assert dump is not None
        await redis.restore(key, 0, dump)
    with pytest.raises(StaleClaimError):
        await queue.ack(claim, dead_max=0)
    assert await held(queue) == items(1, 2, 3, 4)
    assert (await queue.balance()).is_exact


async def test_refused_items_move_to_the_dead_list_in_the_step_of_the_ack(
    redis: Redis, queue: RecordQueue
) -> None:
    await queue.push(items(1, 2, 3))
    claim = await queue.claim(3, 100)
    assert await queue.ack(claim, [b"letter"], dead_max=1) == 0
    assert await redis.lrange(queue.dead_key, 0, -1) == [b"letter"]
    assert await queue.balance() == Balance(pushed=3, acked=2, dead=1, length=0)


async def test_a_full_dead_list_refuses_the_whole_ack(redis: Redis, queue: RecordQueue) -> None:
    await queue.push(items(1, 2, 3))
    await queue.ack(await queue.claim(1, 100), [b"first"], dead_max=1)
    claim = await queue.claim(2, 100)
    with pytest.raises(DeadListFullError):
        await queue.ack(claim, [b"second"], dead_max=1)
    assert await held(queue) == items(2, 3)
    assert await redis.lrange(queue.dead_key, 0, -1) == [b"first"]
    assert (await queue.balance()).is_exact
    await queue.ack(claim, [b"second"], dead_max=2)
    assert (await queue.balance()).is_exact


async def test_a_redis_without_memory_can_still_be_drained(private_redis: RedisServer) -> None:
    async with Redis.from_url(private_redis.url) as redis:
        queue = RecordQueue(redis, "trade")
        await queue.push(items(*range(1000)))
        await redis.config_set("maxmemory", 1)
        with pytest.raises(OutOfMemoryError):
            await queue.push(items(1001))
        claim = await queue.claim(MANY, 2**30)
        assert await queue.ack(claim, [b"letter"], dead_max=1) == 0
        assert await queue.balance() == Balance(pushed=1000, acked=999, dead=1, length=0)


async def test_the_balance_is_exact_after_any_mix_of_steps(queue: RecordQueue) -> None:
    draw = random.Random(4)
    claims: list[Claim] = []
    for _ in range(300):
        step = draw.choice(["push", "claim", "ack", "ack dead"])
        if step == "push":
            await queue.push(items(*range(draw.randint(1, 9))))
        elif step == "claim":
            claims.append(await queue.claim(draw.randint(1, 9), 1000))
        elif claims and (claim := claims.pop(draw.randrange(len(claims)))).items:
            dead = items(*range(draw.randint(1, len(claim.items)))) if "dead" in step else []
            with suppress(StaleClaimError, DeadListFullError):
                await queue.ack(claim, dead, dead_max=100)
        balance = await queue.balance()
        assert balance.is_exact, balance
    assert balance.acked > 0
    assert balance.dead > 0


async def holes(redis: Redis) -> list[tuple[int, int]]:
    found = []
    for member in await redis.zrange(holes_key(FIELD), 0, -1):
        assert isinstance(member, bytes)
        first, last, opened = map(int, member.split(b"-"))
        assert opened > 10**12  # milliseconds
        found.append((first, last))
    return found


async def test_ids_that_leave_a_hole_and_ids_that_fill_it(redis: Redis, queue: RecordQueue) -> None:
    async def push(first: int, last: int) -> int | None:
        _, (head,) = await queue.push([b"[]"], [Segment(FIELD, first, last)])
        return head

    assert await push(10, 12) is None
    assert await redis.hget(UNANCHORED, FIELD) == b"10"
    assert await push(13, 15) == 12
    assert await push(13, 15) == 15
    assert await holes(redis) == []
    assert await push(20, 21) == 15
    assert await push(30, 30) == 21
    assert await holes(redis) == [(16, 19), (22, 29)]
    assert await push(18, 24) == 30
    assert await holes(redis) == [(16, 17), (25, 29)]
    assert await push(27, 27) == 30
    assert await holes(redis) == [(16, 17), (25, 26), (28, 29)]
    assert await push(1, 100) == 30
    assert await holes(redis) == []
    assert await redis.hget(HEADS, FIELD) == b"100"
    assert await push(111, 110) == 100  # an empty run: ids up to 110 exist
    assert await holes(redis) == [(101, 110)]
    assert await redis.hget(HEADS, FIELD) == b"110"


async def test_holes_are_what_arithmetic_says_after_random_pushes(
    redis: Redis, queue: RecordQueue
) -> None:
    draw = random.Random(11)
    missing: set[int] = set()
    head = 0
    await queue.push([], [Segment(FIELD, 0, 0)])
    for _ in range(400):
        first = max(0, head + draw.randint(-60, 30))
        last = first + draw.randint(0, 20)
        await queue.push([], [Segment(FIELD, first, last)])
        missing |= set(range(head + 1, first))
        missing -= set(range(first, last + 1))
        head = max(head, last)
    found = await holes(redis)
    assert [number for first, last in found for number in range(first, last + 1)] == sorted(missing)
    assert missing
    assert int((await redis.hget(HEADS, FIELD)) or 0) == head


async def test_the_largest_ids_that_are_judged_are_judged_exactly(
    redis: Redis, queue: RecordQueue
) -> None:
    top = MAX_TRACKED_ID
    await queue.push([], [Segment(FIELD, top - 9, top - 9)])
    await queue.push([], [Segment(FIELD, top - 1, top)])
    assert await holes(redis) == [(top - 8, top - 2)]
    await queue.push([], [Segment(FIELD, top - 5, top - 4)])
    assert await holes(redis) == [(top - 8, top - 6), (top - 3, top - 2)]


async def test_a_push_beyond_what_one_command_takes_keeps_its_order(queue: RecordQueue) -> None:
    length, _ = await queue.push(items(*range(12_345)))
    assert length == 12_345
    assert (await queue.claim(12_345, 2**30)).items == items(*range(12_345))
    assert (await queue.balance()).pushed == 12_345
