"""The queue: a Redis list whose head moves only after COMMIT, and every key name there is.

*Claim* reads the head counter and the first items and moves nothing. *Ack* trims what was claimed
if, and only if, the counter and the bytes of the first and the last item are still the ones that
were claimed. So a failed write, a crash or a lost connection leaves the batch where it was, in
order, and of two flushers that claimed the same batch one trim wins.

*Push* appends records and, in the same step, judges whether their ids continue the market's head
(design: completeness). All scripts keep the durable counters, so at any instant
`pushed = acked + dead + length`.

Redis writes what a script did into its append-only file as one transaction. What a power cut tore
off at its end is not applied when Redis starts, but its beginning may be at the start after that
(`sluice.fitness`). So each script writes first what saves and last what takes away.
"""

import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from redis.asyncio import Redis

PREFIX: Final = "crypto"
HEADS: Final = f"{PREFIX}:heads"
"""Hash: `<exchange>:<symbol>:<stream>` to the highest id pushed."""
UNANCHORED: Final = f"{PREFIX}:unanchored"
"""Hash: a stream whose head was missing to the first id pushed since; the table must be asked."""
BOOKS_COVERED: Final = f"{PREFIX}:books:covered"
"""Hash: `<exchange>:<symbol>:depth` to the exchange's time up to which a book was live."""
REWRITTEN_BY: Final = f"{PREFIX}:redis:rewritten"
"""The run id of the Redis whose append-only file was rewritten after its start."""
PROCESSES: Final = f"{PREFIX}:processes"
"""Hash: `<name>:<host>:<pid>` to how that process stands (`sluice.presence`)."""
STREAMS_COVERED: Final = f"{PREFIX}:streams:covered"
"""Hash: `<exchange>:<symbol>:<stream>` to the exchange's time up to which it was recorded."""
WINDOWS: Final = f"{PREFIX}:windows"
"""Hash: `gap_id` to the gap, of each window of time that is being refilled."""
WINDOWS_FILLED: Final = f"{PREFIX}:windows:filled"
"""Hash: `gap_id` to the exchange's time up to which its window has been refilled."""
QUEUES: Final = f"{PREFIX}:queues"
"""Set: the keys of the lists that ever held a record."""
FLUSHERS: Final = f"{PREFIX}:flushers"
"""Sorted set: the flushers that run, by when they last told so, Redis' milliseconds."""
LEASES: Final = f"{PREFIX}:leases"
"""Hash: the name of a list to the flusher that drains it."""
BAD_FRAMES: Final = f"{PREFIX}:frames:bad"
"""List: the newest frames that no adapter could read."""
MAX_TRACKED_ID: Final = 2**53 - 1
"""The highest id whose continuity is judged: scripts count in doubles."""

SHARDED: Final = frozenset({"trade", "orderbook_snapshot"})
"""The kinds that QUEUE_SHARDS splits by market; of the others there are too few to split."""


def queue_key(kind: str, shard: int = 0) -> str:
    """Name the list of a record kind, or one of its lists."""
    return f"{PREFIX}:queue:{queue_name(kind, shard)}"


def queue_name(kind: str, shard: int) -> str:
    """Name a list for people: `trade` is the first one of its kind, `trade:1` the second."""
    return f"{kind}:{shard}" if shard else kind


def parse_queue_name(name: str) -> tuple[str, int]:
    """Give the kind and the shard of a list's name; raises ValueError where it is none."""
    kind, colon, shard = name.partition(":")
    return kind, int(shard) if colon else 0


def shard_of(kind: str, exchange: str, symbol: str, shards: int) -> int:
    """Tell on which of the kind's lists a market's records go, the same in every process."""
    if shards == 1 or kind not in SHARDED:
        return 0
    return zlib.crc32(f"{exchange}:{symbol}".encode()) % shards


def head_field(exchange: str, symbol: str, stream: str) -> str:
    """Name a market's stream in the hash of heads."""
    return f"{exchange}:{symbol}:{stream}"


def holes_key(field: str) -> str:
    """Name the sorted set of a stream's holes: `<from>-<to>-<opened, ms>` by `<from>`."""
    return f"{PREFIX}:holes:{field}"


def book_key(exchange: str, symbol: str) -> str:
    """Name the hash of a market's latest book."""
    return f"{PREFIX}:orderbook:{exchange}:{symbol}"


def book_floor_key(exchange: str, symbol: str) -> str:
    """Name the update id below which a market's latest book may not return."""
    return f"{PREFIX}:orderbook-floor:{exchange}:{symbol}"


def live_book_channel(exchange: str, symbol: str) -> str:
    """Name the channel on which a market's latest book is published."""
    return f"{PREFIX}:live:orderbook:{exchange}:{symbol}"


def budget_key(exchange: str) -> str:
    """Name the hash of what a venue still lets this address ask."""
    return f"{PREFIX}:budget:{exchange}"


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of contiguous ids of one market's stream, as pushed together.

    An empty run, `first` one above `last`, says that ids up to `last` exist: what lies between the
    head and it becomes a hole.
    """

    field: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Claim:
    """The items at the head of a queue, and the fence that proves they still are."""

    head: int
    items: list[bytes]


@dataclass(frozen=True, slots=True)
class Balance:
    """A queue's durable counters and its length, read in one step."""

    pushed: int
    acked: int
    dead: int
    length: int

    @property
    def is_exact(self) -> bool:
        """Whether everything pushed is accounted for."""
        return self.pushed == self.acked + self.dead + self.length


@dataclass(frozen=True, slots=True, order=True)
class Hole:
    """A range of ids that exist and were never pushed; `opened_ms` is by Redis' clock."""

    first: int
    last: int
    opened_ms: int


class StaleClaimError(Exception):
    """The head has moved since the claim: another flusher acked it, or the list was replaced."""


class DeadListFullError(Exception):
    """The dead list is at its bound: a person has to look before the queue goes on.

    `room` is how many letters it would still have taken.
    """

    def __init__(self, key: str, room: int) -> None:
        super().__init__(key)
        self.room = room


# Whatever changes holes begins with this. Holes stay disjoint.
_HOLES: Final = """
local clock = redis.call('TIME')
local opened = string.format('%.0f', clock[1] * 1000 + math.floor(clock[2] / 1000))

local function add(holes, from, to, since)
  redis.call('ZADD', holes, from, string.format('%.0f-%.0f-%s', from, to, since))
end

local function subtract(holes, first, last)
  -- They are disjoint and sorted by their start, so the first one that ends before `first` ends
  -- the search.
  for _, hole in ipairs(redis.call('ZREVRANGEBYSCORE', holes, last, '-inf')) do
    local from, to, since = string.match(hole, '^(%d+)-(%d+)-(%d+)$')
    from, to = tonumber(from), tonumber(to)
    if to < first then return end
    if from < first then add(holes, from, first - 1, since) end
    if to > last then add(holes, last + 1, to, since) end
    redis.call('ZREM', holes, hole)
  end
end
"""

_PUSH: Final = (
    _HOLES
    + """
local queue, counters, heads, unanchored = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local segments = tonumber(ARGV[1])
local prior = {}

local start = 3 + 3 * segments
local length = 0
for i = start, #ARGV, 5000 do
  length = redis.call('RPUSH', queue, unpack(ARGV, i, math.min(i + 4999, #ARGV)))
end
local pushed = #ARGV - start + 1
redis.call('HINCRBY', counters, 'pushed', pushed)
-- A list that was empty may be one that no flusher has heard of.
if length == pushed and pushed > 0 then redis.call('SADD', KEYS[5], queue) end

for i = 0, segments - 1 do
  local field = ARGV[2 + 3 * i]
  local first, last = tonumber(ARGV[3 + 3 * i]), tonumber(ARGV[4 + 3 * i])
  local head = redis.call('HGET', heads, field)
  prior[i + 1] = head or ''
  if not head then
    redis.call('HSETNX', unanchored, field, ARGV[3 + 3 * i])
    redis.call('HSET', heads, field, ARGV[4 + 3 * i])
  else
    head = tonumber(head)
    local holes = ARGV[2 + 3 * segments] .. field
    if first > head + 1 then add(holes, head + 1, first - 1, opened) end
    if last > head then redis.call('HSET', heads, field, ARGV[4 + 3 * i]) end
    if first <= head and first <= last then subtract(holes, first, last) end
  end
end
return {length, prior}
"""
)

_REOPEN: Final = (
    _HOLES
    + """
for i = 1, #ARGV, 2 do
  local first, last = tonumber(ARGV[i]), tonumber(ARGV[i + 1])
  subtract(KEYS[1], first, last)
  add(KEYS[1], first, last, opened)
end
"""
)

_CLAIM: Final = """#!lua flags=allow-oom
local queue, head = KEYS[1], KEYS[2]
local most, room, skip, step = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[4]), 1000
local position = redis.call('GET', head)
if not position then
  position = ARGV[3]
  redis.call('SET', head, position)
end
local items = {}
while #items < most do
  local first = skip + #items
  local part = redis.call('LRANGE', queue, first, math.min(first + step, skip + most) - 1)
  for _, item in ipairs(part) do
    room = room - #item
    if room < 0 and #items > 0 then return {position, items} end
    items[#items + 1] = item
  end
  if #part < step then break end
end
return {position, items}
"""

_ACK: Final = """#!lua flags=allow-oom
local queue, head, dead, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local count, most_dead = tonumber(ARGV[2]), tonumber(ARGV[5])
local refused = #ARGV - 5
if redis.call('GET', head) ~= ARGV[1]
  or redis.call('LINDEX', queue, 0) ~= ARGV[3]
  or redis.call('LINDEX', queue, count - 1) ~= ARGV[4] then
  return -1
end
if refused > 0 then
  local room = most_dead - redis.call('LLEN', dead)
  if refused > room then return -2 - math.max(room, 0) end
  for i = 6, #ARGV do redis.call('RPUSH', dead, ARGV[i]) end
  redis.call('HINCRBY', counters, 'dead', refused)
end
redis.call('INCRBY', head, count)
redis.call('HINCRBY', counters, 'acked', count - refused)
redis.call('LTRIM', queue, count, -1)
return redis.call('LLEN', queue)
"""

_REVIVE: Final = """
local queue, dead, counters = KEYS[1], KEYS[2], KEYS[3]
if redis.call('LREM', dead, 1, ARGV[1]) == 0 then return 0 end
if #ARGV == 2 then
  redis.call('RPUSH', queue, ARGV[2])
  redis.call('HINCRBY', counters, 'pushed', 1)
  redis.call('SADD', KEYS[4], queue)
end
return 1
"""

_BALANCE: Final = """#!lua flags=allow-oom,no-writes
local counters = redis.call('HMGET', KEYS[2], 'pushed', 'acked', 'dead')
return {counters[1] or '0', counters[2] or '0', counters[3] or '0', redis.call('LLEN', KEYS[1])}
"""


class RecordQueue:
    """One list of records of one kind."""

    def __init__(self, redis: Redis, kind: str, shard: int = 0) -> None:
        self.kind = kind
        self.name = queue_name(kind, shard)
        self.key = queue_key(kind, shard)
        self.dead_key = f"{self.key}:dead"
        self._head_key = f"{self.key}:head"
        self._counters_key = f"{self.key}:counters"
        self._redis = redis
        self._push = redis.register_script(_PUSH)
        self._claim = redis.register_script(_CLAIM)
        self._ack = redis.register_script(_ACK)
        self._revive = redis.register_script(_REVIVE)
        self._balance = redis.register_script(_BALANCE)

    async def push(
        self, items: Sequence[bytes], segments: Sequence[Segment] = ()
    ) -> tuple[int, list[int | None]]:
        """Append the items and judge the segments' ids, in one step.

        Gives the queue's length, and for each segment the head it met (None where there was none).
        Raises redis' errors; after a lost reply the push may have happened, and repeating it is
        harmless, because every record has a key.
        """
        arguments: list[str | bytes | int] = [len(segments)]
        for segment in segments:
            arguments += (segment.field, segment.first, segment.last)
        arguments.append(holes_key(""))
        length, prior = await self._push(
            keys=[self.key, self._counters_key, HEADS, UNANCHORED, QUEUES],
            args=[*arguments, *items],
        )
        return int(length), [int(head) if head else None for head in prior]

    async def claim(self, most_items: int, most_bytes: int, *, skip: int = 0) -> Claim:
        """Read the head of the queue, at least one item if there is any, and move nothing.

        With `skip` it reads what will be the head once so many items are acked, and can not be
        acked before.
        """
        # The start is random so that a list made anew can not continue the count of the old one.
        start = random.getrandbits(48)  # it guards against accidents, not attackers
        head, items = await self._claim(
            keys=[self.key, self._head_key], args=[most_items, most_bytes, start, skip]
        )
        return Claim(int(head) + skip, items)

    async def ack(self, claim: Claim, refused: Sequence[bytes] = (), *, dead_max: int) -> int:
        """Trim what was claimed, moving `refused` (letters, not items) to the dead list.

        Gives the length that remains.

        Raises:
            StaleClaimError: the head is no longer what was claimed; nothing was changed.
            DeadListFullError: the dead list has no room for the letters; nothing was changed.
        """
        items = claim.items
        result = await self._ack(
            keys=[self.key, self._head_key, self.dead_key, self._counters_key],
            args=[claim.head, len(items), items[0], items[-1], dead_max, *refused],
        )
        if result == -1:
            raise StaleClaimError(self.key)
        if result < 0:
            raise DeadListFullError(self.dead_key, room=-2 - result)
        return int(result)

    async def revive(self, letter: bytes, item: bytes | None) -> bool:
        """Take a letter off the dead list and push its item, or nothing for None.

        Tells whether the letter was there; in one step, so nothing is pushed twice.
        """
        arguments = [letter] if item is None else [letter, item]
        keys = [self.key, self.dead_key, self._counters_key, QUEUES]
        return bool(await self._revive(keys=keys, args=arguments))

    async def length(self) -> int:
        """Count the items that wait."""
        return await self._redis.llen(self.key)

    async def memory(self) -> int:
        """Estimate the bytes of Redis' memory that the list takes, from a few of its nodes."""
        return await self._redis.memory_usage(self.key) or 0

    async def balance(self) -> Balance:
        """Read the durable counters and the length in one step."""
        pushed, acked, dead, length = await self._balance(keys=[self.key, self._counters_key])
        return Balance(int(pushed), int(acked), int(dead), int(length))

    async def head_item(self) -> bytes | None:
        """Read the oldest item, or None where the queue is empty."""
        item = await self._redis.lindex(self.key, 0)
        return item if isinstance(item, bytes) else None

    async def note_shed(self, count: int) -> None:
        """Count records that were lost before they could be pushed, in the durable counters."""
        await self._redis.hincrby(self._counters_key, "shed", count)

    async def shed(self) -> int:
        """Read how many records were lost before they could be pushed."""
        return int(await self._redis.hget(self._counters_key, "shed") or 0)

    async def dead_length(self) -> int:
        """Count the letters that wait for a person."""
        return await self._redis.llen(self.dead_key)


async def find_queues(redis: Redis, kinds: Iterable[str]) -> list[RecordQueue]:
    """Give every list of these kinds, in their order: the first ones, and all that ever existed.

    So whoever reads queues need not know what QUEUE_SHARDS is or was.
    """
    prefix = queue_key("").encode()
    known: set[bytes] = await redis.smembers(QUEUES)  # type: ignore[assignment]  # nothing decodes
    names = [parse_queue_name(key.removeprefix(prefix).decode()) for key in known]
    return [
        RecordQueue(redis, kind, shard)
        for kind in kinds
        for shard in sorted({0, *(shard for other, shard in names if other == kind)})
    ]


async def balance_of(redis: Redis, kind: str) -> Balance:
    """Sum up the balances of all lists of a kind; where each is exact the sum is."""
    balances = [await queue.balance() for queue in await find_queues(redis, [kind])]
    return Balance(
        pushed=sum(balance.pushed for balance in balances),
        acked=sum(balance.acked for balance in balances),
        dead=sum(balance.dead for balance in balances),
        length=sum(balance.length for balance in balances),
    )


class Holes:
    """The holes of one stream, named as in `head_field`. Raises redis' errors."""

    def __init__(self, redis: Redis, field: str) -> None:
        self._key = holes_key(field)
        self._redis = redis
        self._reopen = redis.register_script(_REOPEN)

    async def read(self) -> list[Hole]:
        """Read the holes, lowest first."""
        members: list[bytes] = await self._redis.zrange(self._key, 0, -1)  # type: ignore[assignment]  # scores are not asked for
        return [Hole(*(int(part) for part in member.split(b"-"))) for member in members]

    async def reopen(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Make disjoint ranges of ids, ends included, holes again, as if just missed.

        Whoever fills holes then fetches them; what is stored already is dropped by its key.
        """
        # From the top down each search meets only what was there before.
        descending = sorted(ranges, reverse=True)
        await self._reopen(keys=[self._key], args=[end for pair in descending for end in pair])
