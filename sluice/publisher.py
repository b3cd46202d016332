"""From records to Redis lists: batched, in order, and to the disk while Redis refuses them.

`put` never waits. One task pushes what has come: the first of BATCH_RECORDS records or
BATCH_SECONDS. What Redis refuses, or what QUEUE_MAX_MB has no room for, goes to the spool and
returns in order; only what the spool can not take either is shed, counted, logged as ERROR and
named by a gap.
"""

import asyncio
import math
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import msgspec
from loguru import logger
from prometheus_client.core import Metric
from redis.asyncio import Redis
from redis.exceptions import RedisError

from sluice import failpoints, records
from sluice.backoff import Backoff
from sluice.clock import now_micros
from sluice.metrics import counter, gauge
from sluice.queue import (
    BAD_FRAMES,
    HEADS,
    SHARDED,
    RecordQueue,
    Segment,
    find_queues,
    head_field,
    shard_of,
)
from sluice.records import KIND_OF, Gap, Record, Trade
from sluice.settings import Settings
from sluice.spool import Batch, Spool, SpoolFullError, adopt

BATCH_RECORDS: Final = 500
BATCH_SECONDS: Final = 0.02
SPOOLED_BATCH_SECONDS: Final = 0.2
"""While the disk is written to, batches are larger: each costs a sync."""
MOST_IN_BATCH: Final = 5000
MOST_BYTES_IN_BATCH: Final = 8 * 2**20
MOST_BYTES_IN_MEMORY: Final = 256 * 2**20
"""What may wait while Redis or the disk takes its time; seconds of the busiest market."""
CHECK_SECONDS: Final = 1.0
STUCK_SECONDS: Final = 60.0
"""Longer than any answer of Redis is waited for, and than a disk takes that works."""
RESUMED_SHARE: Final = 0.9
"""Of QUEUE_MAX_MB: the queues must have shrunk to it before they are pushed to again."""
ADOPT_SECONDS: Final = 60.0
SHED_LOG_SECONDS: Final = 10.0
KEPT_GAPS: Final = 10_000
KEPT_BAD_FRAMES: Final = 1000
KEPT_FRAME_BYTES: Final = 4096


@dataclass
class PublisherCounts:
    """What became of the records; at any instant put = pushed + spooled + shed + in memory."""

    put: Counter[str] = field(default_factory=Counter)
    pushed: Counter[str] = field(default_factory=Counter)
    spooled: int = 0
    returned: int = 0
    """Records that came back from a spool, ours or an adopted one, and were pushed."""
    shed: int = 0
    bad_frames: int = 0
    failures: int = 0
    """Pushes that Redis refused or did not answer."""


class _Runs:
    """Joins trades into runs of contiguous ids a market, in the order in which they come."""

    def __init__(self) -> None:
        self._runs: list[tuple[str, list[int]]] = []
        self._latest: dict[tuple[str, str], list[int]] = {}

    def add(self, trade: Trade) -> None:
        market = (trade.exchange, trade.symbol)
        run = self._latest.get(market)
        if run is not None and trade.first_id == run[1] + 1:
            run[1] = trade.trade_id
            return
        run = self._latest[market] = [trade.first_id, trade.trade_id]
        self._runs.append((head_field(trade.exchange, trade.symbol, "trade"), run))

    def segments(self) -> list[Segment]:
        return [Segment(name, first, last) for name, (first, last) in self._runs]


def contiguous(trades: Iterable[Trade]) -> list[Segment]:
    """Give the runs of contiguous ids that trades make up, a market, in their order."""
    runs = _Runs()
    for trade in trades:
        runs.add(trade)
    return runs.segments()


class _Draft:
    """A batch that still grows."""

    def __init__(self, kind: str, shard: int) -> None:
        self.kind = kind
        self.shard = shard
        self.items: list[bytes] = []
        self.bytes = 0
        self._runs = _Runs()

    @property
    def is_full(self) -> bool:
        return len(self.items) >= MOST_IN_BATCH or self.bytes >= MOST_BYTES_IN_BATCH

    def add(self, record: Record, item: bytes) -> None:
        self.items.append(item)
        self.bytes += len(item)
        if isinstance(record, Trade):
            self._runs.add(record)

    def batch(self) -> Batch:
        return Batch(self.kind, self.items, self._runs.segments(), self.shard)


class Publisher:
    """The one way from a process to its queues; `run` must be running for anything to move."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self.counts = PublisherCounts()
        self.lengths: dict[str, int] = {}
        """The length of each list after our last push, by its name."""
        self.first_pushed: dict[str, int] = {}
        """The lowest id that this process pushed of each stream, by its name among the heads."""
        self._redis = redis
        self._settings = settings
        self._queues: dict[tuple[str, int], RecordQueue] = {}
        self._shards: dict[tuple[str, str], int] = {}
        self._drafts: dict[tuple[str, int], _Draft] = {}
        self._waiting: list[_Draft] = []
        self._waiting_count = 0
        self._taken: deque[Batch] = deque()
        self._memory_records = 0
        self._memory_bytes = 0
        self._arrived = asyncio.Event()
        self._is_full = asyncio.Event()
        self._heads: dict[str, int] = {}
        self._bad_frames: deque[bytes] = deque(maxlen=KEPT_BAD_FRAMES)
        self._spool: Spool | None = None
        self._adopted: list[Spool] = []
        self._shed_windows: dict[tuple[str, str, str], tuple[int, int]] = {}
        self._shed_gaps: deque[Gap] = deque(maxlen=KEPT_GAPS)
        self._shed_untold: Counter[str] = Counter()
        self._shed_logged_at = -math.inf
        self._backoff = Backoff(first=0.1, most=5.0)
        self._retry_at = 0.0
        self._is_fit = False
        self._are_queues_full = False
        self._turned_at = time.monotonic()

    @property
    def is_fit(self) -> bool:
        """Whether Redis took what it was last given."""
        return self._is_fit

    @property
    def is_stuck(self) -> bool:
        """Whether it has finished nothing for so long, not even a failed attempt, that it hangs."""
        return time.monotonic() - self._turned_at > STUCK_SECONDS

    def unfitness(self) -> str:
        """Say why Redis takes no records now, or nothing where it does."""
        return "" if self._is_fit else "it takes no records; they wait on the disk"

    @property
    def in_memory(self) -> int:
        """Records that are neither in Redis nor on the disk."""
        return self._memory_records

    @property
    def spool_bytes(self) -> int:
        """Bytes that wait on the disk in spools this process holds."""
        return sum(spool.bytes for spool in self._spools)

    @property
    def spool_records(self) -> int:
        """Records that wait on the disk in spools this process holds."""
        return sum(spool.records for spool in self._spools)

    @property
    def _spools(self) -> list[Spool]:
        return [*self._adopted, *([self._spool] if self._spool else [])]

    def metrics(self) -> Iterable[Metric]:
        """Give the families behind `/metrics` that every process with a publisher has."""
        counts = self.counts
        yield counter(
            "publisher_pushed_records",
            "Records that reached Redis",
            [({"queue": kind}, count) for kind, count in counts.pushed.items()],
        )
        yield counter("publisher_spooled_records", "Sent to the disk", [({}, counts.spooled)])
        yield counter("publisher_returned_records", "Back from it", [({}, counts.returned)])
        yield counter("publisher_shed_records", "Lost: no room anywhere", [({}, counts.shed)])
        yield counter("publisher_failures", "Pushes Redis refused", [({}, counts.failures)])
        yield gauge("publisher_memory_records", "Not yet pushed", [({}, self.in_memory)])
        yield gauge("publisher_spool_bytes", "On the disk", [({}, self.spool_bytes)])
        yield gauge(
            "queue_depth",
            "Length after our last push",
            [({"queue": name}, depth) for name, depth in self.lengths.items()],
        )

    def put(self, record: Record) -> None:
        """Take a record; it is pushed within BATCH_SECONDS while Redis is well."""
        kind = KIND_OF[type(record)]
        self.counts.put[kind] += 1
        item = records.encode(record)
        if self._memory_bytes + len(item) > MOST_BYTES_IN_MEMORY:
            self._shed(kind, [record], "too much waits in memory")
            return
        shard = self._shard_of(kind, record)
        draft = self._drafts.get((kind, shard))
        if draft is None or draft.is_full:
            draft = self._drafts[kind, shard] = _Draft(kind, shard)
            self._waiting.append(draft)
        draft.add(record, item)
        self._memory_records += 1
        self._memory_bytes += len(item)
        self._waiting_count += 1
        if self._waiting_count == 1:
            self._arrived.set()
        if self._waiting_count == BATCH_RECORDS:
            self._is_full.set()

    def _shard_of(self, kind: str, record: Record) -> int:
        count = self._settings.queue_shards
        if count == 1 or kind not in SHARDED:
            return 0
        market = (record.exchange, record.symbol)
        shard = self._shards.get(market)
        if shard is None:
            shard = self._shards[market] = shard_of(kind, *market, count)
        return shard

    def _queue(self, kind: str, shard: int) -> RecordQueue:
        queue = self._queues.get((kind, shard))
        if queue is None:
            queue = self._queues[kind, shard] = RecordQueue(self._redis, kind, shard)
        return queue

    def put_bad_frame(self, frame: bytes, reason: str) -> None:
        """Count a frame that nobody can read, and keep its beginning for a person."""
        self.counts.bad_frames += 1
        text = frame[:KEPT_FRAME_BYTES].decode("utf-8", "backslashreplace")
        kept = {"time": now_micros(), "reason": reason[:200], "bytes": len(frame), "frame": text}
        self._bad_frames.append(msgspec.json.encode(kept))

    async def run(self, stop: asyncio.Event) -> None:
        """Push until `stop`, then push or spool the rest; Redis' errors never leave here.

        Where it is cancelled there is no time for Redis: the rest goes to the disk.
        """
        waking = asyncio.create_task(self._wake_at(stop))
        check_at = adopt_at = 0.0
        try:
            while not stop.is_set():
                self._turned_at = time.monotonic()
                await self._wait_for_batch()
                self._take()
                await self._push_taken()
                now = time.monotonic()
                if now >= adopt_at:
                    adopt_at = now + ADOPT_SECONDS
                    await self._adopt()
                await self._return_spooled()
                if now >= check_at:
                    check_at = now + CHECK_SECONDS
                    await self._measure_queues()
                    await self._check()
            await self._finish()
        except BaseException:
            self._retry_at = math.inf
            await self._finish()
            raise
        finally:
            waking.cancel()

    async def _wake_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._arrived.set()
        self._is_full.set()

    async def _wait_for_batch(self) -> None:
        # Work that is not caused by a record: returning what is spooled, checks.
        idle = SPOOLED_BATCH_SECONDS if self._spools else CHECK_SECONDS
        # Not wait_for: before Python 3.12 it swallows a cancellation that comes with the event.
        with suppress(TimeoutError):
            async with asyncio.timeout(idle):
                await self._arrived.wait()
        if self._waiting_count:
            age = SPOOLED_BATCH_SECONDS if self._spool else BATCH_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(age):
                    await self._is_full.wait()

    def _take(self) -> None:
        """Turn what waits into batches, gaps last: a gap is never closed before its records."""
        waiting = sorted(self._waiting, key=lambda draft: draft.kind == "gap")
        self._taken.extend(draft.batch() for draft in waiting)
        self._waiting, self._drafts, self._waiting_count = [], {}, 0
        self._arrived.clear()
        self._is_full.clear()

    async def _push_taken(self) -> None:
        """Bring every batch to Redis or to the disk; each stays ours until one of them has it."""
        while self._taken:
            batch = self._taken[0]
            await failpoints.reach("publisher.taken")
            if self._spool is None and await self._push(batch):
                self.counts.pushed[batch.kind] += len(batch.items)
            else:
                await self._put_aside(batch)
            self._taken.popleft()
            self._memory_records -= len(batch.items)
            self._memory_bytes -= sum(map(len, batch.items))

    async def _push(self, batch: Batch) -> bool:
        """Push one batch; tells whether Redis took it."""
        if self._are_queues_full or time.monotonic() < self._retry_at:
            return False
        try:
            queue = self._queue(batch.kind, batch.shard)
            length, prior = await queue.push(batch.items, batch.segments)
            await failpoints.reach("publisher.pushed")
        except (RedisError, OSError) as error:
            self.counts.failures += 1
            self._postpone(error)
            return False
        self._note_success()
        self.lengths[queue.name] = length
        for segment, head in zip(batch.segments, prior, strict=True):
            self._note_head(segment, head)
        return True

    def _note_success(self) -> None:
        if not self._is_fit:
            logger.info("Redis takes records")
        self._is_fit = True
        self._backoff.reset()

    def _postpone(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + self._backoff.next_delay()
        if self._is_fit or self._backoff.failures == 1:
            logger.warning(
                "Redis takes no records ({}: {}); they wait on the disk",
                type(error).__name__,
                error,
            )
        self._is_fit = False

    def _note_head(self, segment: Segment, head: int | None) -> None:
        known = self._heads.get(segment.field)
        if known is not None and (head is None or head < known):
            logger.warning(
                "{}: Redis came back older (head {}, it was {}); what it lost is fetched again",
                segment.field,
                head,
                known,
            )
        self._heads[segment.field] = segment.last if known is None else max(known, segment.last)
        first = self.first_pushed.get(segment.field, segment.first)
        self.first_pushed[segment.field] = min(first, segment.first)

    async def _put_aside(self, batch: Batch) -> None:
        try:
            if self._spool is None:
                self._spool = await asyncio.to_thread(
                    Spool.create, self._settings.spool_dir, self._settings.spool_max_mb * 2**20
                )
                await failpoints.reach("publisher.spool_opened")
            await asyncio.to_thread(self._spool.append, batch)
            await failpoints.reach("publisher.spooled")
        except (SpoolFullError, OSError, sqlite3.Error) as error:
            shed = [records.decode(batch.kind, item) for item in batch.items]
            self._shed(batch.kind, shed, f"Redis refuses records and so does the spool: {error}")
            return
        self.counts.spooled += len(batch.items)

    def _shed(self, kind: str, shed: list[Record], why: str) -> None:
        """Drop what nobody can hold, and remember what it was."""
        self.counts.shed += len(shed)
        self._shed_untold[kind] += len(shed)
        if time.monotonic() >= self._shed_logged_at + SHED_LOG_SECONDS:
            self._shed_logged_at = time.monotonic()
            logger.error(
                "records are lost, {} since the start ({}); free memory or disk. Trades are "
                "fetched again by id, the rest is named by gaps",
                self.counts.shed,
                why,
            )
        if kind == "trade":
            return  # the next trade's id tells what is missing
        now = now_micros()
        for record in shed:
            if isinstance(record, Gap):
                self._shed_gaps.append(record)
                continue
            stream = (record.exchange, record.symbol, kind)
            since, _ = self._shed_windows.get(stream, (now, now))
            self._shed_windows[stream] = (since, now)

    async def _return_spooled(self) -> None:
        """Push what waits on the disk, oldest first, for as long as Redis takes it."""
        until = time.monotonic() + SPOOLED_BATCH_SECONDS
        for spool in self._spools:
            if time.monotonic() < self._retry_at:
                return
            try:
                if not await self._return(spool, until):
                    return
            except (OSError, sqlite3.Error) as error:
                logger.error(
                    "{}: {}; {} records wait in it until it can be read: look after the disk",
                    spool.path,
                    error,
                    spool.records,
                )
            await self._let_go(spool)

    async def _let_go(self, spool: Spool) -> None:
        if spool is self._spool:
            self._spool = None
        else:
            self._adopted.remove(spool)
        with suppress(OSError, sqlite3.Error):
            await asyncio.to_thread(spool.close)
            await failpoints.reach("publisher.spool_closed")

    async def _return(self, spool: Spool, until: float) -> bool:
        """Empty a spool; tells whether it is, for new records must not wait while old ones return.

        One batch returns each time even when the time is short.
        """
        while (oldest := await asyncio.to_thread(spool.oldest)) is not None:
            await failpoints.reach("publisher.spool_read")
            position, batch = oldest
            if not await self._push(batch):
                return False
            await failpoints.reach("publisher.returned")
            self.counts.returned += len(batch.items)
            await asyncio.to_thread(spool.remove, position)
            await failpoints.reach("publisher.spool_removed")
            if time.monotonic() > until:
                return False
        return True

    async def _adopt(self) -> None:
        try:
            found = await asyncio.to_thread(
                adopt, self._settings.spool_dir, self._settings.spool_max_mb * 2**20
            )
            await failpoints.reach("publisher.spools_adopted")
        except OSError as error:
            logger.error("SPOOL_DIR: {}: what waits there stays; look after the disk", error)
            return
        for spool in found:
            logger.info("adopted a spool of {} records", spool.records)
        self._adopted += found

    async def _measure_queues(self) -> None:
        """Learn whether the queues have reached QUEUE_MAX_MB: then the disk is next."""
        if time.monotonic() < self._retry_at:
            return
        most = self._settings.queue_max_mb * 2**20
        try:
            queues = await find_queues(self._redis, records.KINDS)
            await failpoints.reach("publisher.queues_found")
            held = sum([await queue.memory() for queue in queues])
            await failpoints.reach("publisher.queues_measured")
        except (RedisError, OSError) as error:
            self._postpone(error)
            return
        was_full = self._are_queues_full
        self._are_queues_full = held >= most * (RESUMED_SHARE if was_full else 1)
        if self._are_queues_full and not was_full:
            logger.warning(
                "the queues hold {} MB, QUEUE_MAX_MB is {}: records wait on the disk until the "
                "database has taken some",
                held >> 20,
                self._settings.queue_max_mb,
            )
        elif was_full and not self._are_queues_full:
            logger.info("the queues have room again: what waits on the disk returns")

    async def _check(self) -> None:
        """Compare Redis' heads with ours, keep bad frames, and name what was shed."""
        if time.monotonic() < self._retry_at or self._spool is not None:
            return
        try:
            await self._redis.ping()
            await failpoints.reach("publisher.redis_asked")
            await self._compare_heads()
            await self._keep_bad_frames()
            await self._tell_shed()
        except (RedisError, OSError) as error:
            self._postpone(error)
            return
        self._note_success()
        gaps, self._shed_gaps = self._shed_gaps, deque(maxlen=KEPT_GAPS)
        windows, self._shed_windows = self._shed_windows, {}
        for gap in gaps:
            self.put(gap)
        for (exchange, symbol, kind), (since, until) in windows.items():
            self.put(_window(exchange, symbol, kind, since, until))

    async def _compare_heads(self) -> None:
        if not self._heads:
            return
        names = list(self._heads)
        stored = await self._redis.hmget(HEADS, names)
        await failpoints.reach("publisher.heads_read")
        behind = [
            Segment(name, self._heads[name] + 1, self._heads[name])
            for name, head in zip(names, stored, strict=True)
            if head is None or int(head) < self._heads[name]
        ]
        if behind:
            logger.warning(
                "Redis came back older in {} markets; what it lost is fetched again", len(behind)
            )
            await self._queue("trade", 0).push([], behind)
            await failpoints.reach("publisher.holes_pushed")

    async def _tell_shed(self) -> None:
        for kind, count in list(self._shed_untold.items()):
            await self._queue(kind, 0).note_shed(count)
            await failpoints.reach("publisher.shed_noted")
            self._shed_untold[kind] -= count
        self._shed_untold = +self._shed_untold

    async def _keep_bad_frames(self) -> None:
        if self._bad_frames:
            frames = list(self._bad_frames)
            await self._redis.rpush(BAD_FRAMES, *frames)
            await failpoints.reach("publisher.frames_kept")
            await self._redis.ltrim(BAD_FRAMES, -KEPT_BAD_FRAMES, -1)
            await failpoints.reach("publisher.frames_trimmed")
            for _ in frames:
                self._bad_frames.popleft()

    async def _finish(self) -> None:
        """Push or spool what is left, and let go of the spools; their files stay."""
        self._take()
        await self._push_taken()
        await self._return_spooled()
        for spool in self._spools:
            if spool.records:
                logger.warning("{} records stay on the disk for the next process", spool.records)
            await self._let_go(spool)


def _window(exchange: str, symbol: str, kind: str, since: int, until: int) -> Gap:
    return Gap(
        exchange=exchange,
        symbol=symbol,
        gap_id=f"{exchange}:{symbol}:{kind}:{since}",
        channel=kind,
        from_id=None,
        to_id=None,
        ts_from=since,
        ts_to=until,
        cause="shed: Redis and the spool were full",
        status="lost",
        tries=0,
        revision=until,
        ts_opened=since,
        ts_closed=until,
    )
