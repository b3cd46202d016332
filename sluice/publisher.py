"""From records to Redis lists: batched, in order, and to the disk while Redis refuses them.

`put` never waits. One task pushes what has come: the first of BATCH_RECORDS records or
BATCH_SECONDS. What Redis refuses goes to the spool and returns in order; only what the spool can
not take either is shed, counted, logged as ERROR and named by a gap.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import msgspec
from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from sluice import failpoints, records
from sluice.backoff import Backoff
from sluice.clock import now_micros
from sluice.queue import BAD_FRAMES, HEADS, RecordQueue, Segment, head_field
from sluice.records import KIND_OF, Gap, Record, Trade
from sluice.settings import Settings
from sluice.spool import Batch, Spool, SpoolFullError, adopt

BATCH_RECORDS: Final = 500
BATCH_SECONDS: Final = 0.02
SPOOLED_BATCH_SECONDS: Final = 0.2
"""While the disk is written to, batches are larger: each costs a sync."""
MOST_IN_PUSH: Final = 5000
CHECK_SECONDS: Final = 1.0
ADOPT_SECONDS: Final = 60.0
KEPT_BAD_FRAMES: Final = 1000
KEPT_FRAME_BYTES: Final = 4096


@dataclass
class PublisherCounts:
    """What became of the records, since the start: put = pushed + spooled + shed + in memory."""

    put: Counter[str] = field(default_factory=Counter)
    pushed: Counter[str] = field(default_factory=Counter)
    spooled: int = 0
    returned: int = 0
    """Records that came back from a spool, ours or an adopted one."""
    shed: int = 0
    bad_frames: int = 0
    failures: int = 0


def contiguous(trades: Iterable[Trade]) -> list[Segment]:
    """Join trades into runs of contiguous ids a market, in the order in which they came."""
    runs: list[Segment] = []
    latest: dict[tuple[str, str], int] = {}
    for trade in trades:
        market = (trade.exchange, trade.symbol)
        index = latest.get(market)
        if index is not None and trade.first_id == runs[index].last + 1:
            runs[index] = Segment(runs[index].field, runs[index].first, trade.trade_id)
        else:
            latest[market] = len(runs)
            name = head_field(trade.exchange, trade.symbol, "trade")
            runs.append(Segment(name, trade.first_id, trade.trade_id))
    return runs


class Publisher:
    """The one way from a process to its queues."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self.counts = PublisherCounts()
        self.lengths: dict[str, int] = {}
        """The length of each queue after our last push."""
        self._redis = redis
        self._settings = settings
        self._queues = {kind: RecordQueue(redis, kind) for kind in records.KINDS}
        self._waiting: dict[str, list[Record]] = {}
        self._waiting_count = 0
        self._arrived = asyncio.Event()
        self._is_full = asyncio.Event()
        self._heads: dict[str, int] = {}
        self._bad_frames: deque[bytes] = deque(maxlen=KEPT_BAD_FRAMES)
        self._spool: Spool | None = None
        self._adopted: list[Spool] = []
        self._shed: dict[tuple[str, str, str], tuple[int, int]] = {}
        self._backoff = Backoff(first=0.1, most=5.0)
        self._retry_at = 0.0
        self._is_fit = False

    @property
    def is_fit(self) -> bool:
        """Whether the last push reached Redis."""
        return self._is_fit

    @property
    def in_memory(self) -> int:
        """Records that are neither in Redis nor on the disk."""
        return self._waiting_count

    @property
    def spool_bytes(self) -> int:
        """Bytes that wait on the disk in spools this process holds."""
        spools = [*self._adopted, *([self._spool] if self._spool else [])]
        return sum(spool.bytes for spool in spools)

    def put(self, record: Record) -> None:
        """Take a record; it is pushed within BATCH_SECONDS while Redis is well."""
        kind = KIND_OF[type(record)]
        batch = self._waiting.get(kind)
        if batch is None:
            batch = self._waiting[kind] = []
        batch.append(record)
        self._waiting_count += 1
        if self._waiting_count == 1:
            self._arrived.set()
        if self._waiting_count == BATCH_RECORDS:
            self._is_full.set()

    def put_bad_frame(self, frame: bytes, reason: str) -> None:
        """Count a frame that nobody can read, and keep its beginning for a person."""
        self.counts.bad_frames += 1
        kept = {"time": now_micros(), "reason": reason[:200], "frame": frame[:KEPT_FRAME_BYTES]}
        self._bad_frames.append(msgspec.json.encode(kept))

    async def run(self, stop: asyncio.Event) -> None:
        """Push until `stop`, then push or spool the rest; Redis' errors never leave here."""
        stopping = asyncio.create_task(stop.wait())
        check_at = adopt_at = 0.0
        try:
            while not stop.is_set():
                await self._wait_for_batch(stopping)
                await self._push_waiting()
                now = time.monotonic()
                if now >= adopt_at:
                    adopt_at = now + ADOPT_SECONDS
                    await self._adopt()
                await self._return_spooled()
                if now >= check_at:
                    check_at = now + CHECK_SECONDS
                    await self._check()
        finally:
            stopping.cancel()
            await self._finish()

    async def _wait_for_batch(self, stopping: "asyncio.Task[bool]") -> None:
        arrived = asyncio.create_task(self._arrived.wait())
        # Work that is not caused by a record: returning what is spooled, checks.
        idle = 0.05 if self._adopted or self._spool else CHECK_SECONDS
        await asyncio.wait([arrived, stopping], timeout=idle, return_when=asyncio.FIRST_COMPLETED)
        arrived.cancel()
        if self._waiting_count and not stopping.done():
            age = SPOOLED_BATCH_SECONDS if self._spool else BATCH_SECONDS
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_full.wait(), age)

    def _take(self) -> list[Batch]:
        """Turn what waits into batches, gaps last: a gap is never closed before its records."""
        waiting, self._waiting, self._waiting_count = self._waiting, {}, 0
        self._arrived.clear()
        self._is_full.clear()
        batches = []
        for kind in sorted(waiting, key=lambda kind: kind == "gap"):
            queued = waiting[kind]
            self.counts.put[kind] += len(queued)
            for start in range(0, len(queued), MOST_IN_PUSH):
                part = queued[start : start + MOST_IN_PUSH]
                segments = contiguous(part) if kind == "trade" else []  # type: ignore[arg-type]  # a list a kind
                batches.append(Batch(kind, [records.encode(record) for record in part], segments))
        return batches

    async def _push_waiting(self) -> None:
        for batch in self._take():
            await failpoints.reach("publisher.taken")
            if self._spool is None and await self._push(batch):
                continue
            await self._put_aside(batch)

    async def _push(self, batch: Batch) -> bool:
        """Push one batch; tells whether Redis took it."""
        if time.monotonic() < self._retry_at:
            return False
        try:
            length, prior = await self._queues[batch.kind].push(batch.items, batch.segments)
        except (RedisError, OSError) as error:
            self.counts.failures += 1
            delay = self._backoff.next_delay()
            self._retry_at = time.monotonic() + delay
            if self._is_fit or self._backoff.failures == 1:
                logger.warning(
                    "Redis takes no records ({}: {}); they wait on the disk",
                    type(error).__name__,
                    error,
                )
            self._is_fit = False
            return False
        await failpoints.reach("publisher.pushed")
        if not self._is_fit:
            logger.info("Redis takes records")
        self._is_fit = True
        self._backoff.reset()
        self.lengths[batch.kind] = length
        self.counts.pushed[batch.kind] += len(batch.items)
        for segment, head in zip(batch.segments, prior, strict=True):
            known = self._heads.get(segment.field, -1)
            if known > (-1 if head is None else head):
                logger.warning(
                    "{}: Redis came back older (head {}, it was {}); what it lost is fetched again",
                    segment.field,
                    head,
                    known,
                )
            self._heads[segment.field] = max(known, segment.last)
        return True

    async def _put_aside(self, batch: Batch) -> None:
        try:
            if self._spool is None:
                self._spool = await asyncio.to_thread(
                    Spool.create, self._settings.spool_dir, self._settings.spool_max_mb * 2**20
                )
            await asyncio.to_thread(self._spool.append, batch)
            await failpoints.reach("publisher.spooled")
            self.counts.spooled += len(batch.items)
        except (SpoolFullError, OSError) as error:
            self._shed_batch(batch, error)

    def _shed_batch(self, batch: Batch, error: Exception) -> None:
        """Drop what nobody can hold, and remember what it was."""
        self.counts.shed += len(batch.items)
        logger.error(
            "{} records of {} are lost: Redis refuses them and so does the spool ({}); free memory "
            "or disk. Trades are fetched again by id",
            len(batch.items),
            batch.kind,
            error,
        )
        if batch.kind in ("trade", "gap"):
            return  # the next trade's id tells what is missing, and the ledger repeats its gaps
        now = now_micros()
        for item in batch.items:
            record = records.decode(batch.kind, item)
            window = (record.exchange, record.symbol, batch.kind)
            since, _ = self._shed.get(window, (now, now))
            self._shed[window] = (since, now)

    async def _return_spooled(self) -> None:
        """Push what waits on the disk, oldest first, for as long as Redis takes it."""
        spools = [*self._adopted, *([self._spool] if self._spool else [])]
        began = time.monotonic()
        for spool in spools:
            while (oldest := await asyncio.to_thread(spool.oldest)) is not None:
                position, batch = oldest
                # New records must not wait in memory while old ones return.
                if time.monotonic() - began > SPOOLED_BATCH_SECONDS or not await self._push(batch):
                    return
                await failpoints.reach("publisher.returned")
                await asyncio.to_thread(spool.remove, position)
                self.counts.returned += len(batch.items)
            await asyncio.to_thread(spool.close)
            if spool is self._spool:
                self._spool = None
                logger.info("the spool is empty again")
            else:
                self._adopted.remove(spool)

    async def _adopt(self) -> None:
        found = await asyncio.to_thread(
            adopt, self._settings.spool_dir, self._settings.spool_max_mb * 2**20
        )
        for spool in found:
            logger.info("adopted a spool of {} records", spool.records)
        self._adopted += found

    async def _check(self) -> None:
        """Compare Redis' heads with ours, name what was shed, and keep bad frames."""
        if time.monotonic() < self._retry_at or self._spool is not None:
            return
        try:
            await self._redis.ping()
            self._is_fit = True
            if self._heads:
                names = list(self._heads)
                stored = await self._redis.hmget(HEADS, names)
                behind = [
                    Segment(name, self._heads[name] + 1, self._heads[name])
                    for name, head in zip(names, stored, strict=True)
                    if head is None or int(head) < self._heads[name]
                ]
                if behind:
                    logger.warning(
                        "Redis came back older in {} markets; what it lost is fetched again",
                        len(behind),
                    )
                    await self._queues["trade"].push([], behind)
            if self._bad_frames:
                frames = list(self._bad_frames)
                await self._redis.rpush(BAD_FRAMES, *frames)
                await self._redis.ltrim(BAD_FRAMES, -KEPT_BAD_FRAMES, -1)
                self._bad_frames.clear()
        except (RedisError, OSError):
            self._is_fit = False
            self._retry_at = time.monotonic() + self._backoff.next_delay()
            return
        shed, self._shed = self._shed, {}
        for (exchange, symbol, kind), (since, until) in shed.items():
            self.put(_window(exchange, symbol, kind, since, until))

    async def _finish(self) -> None:
        """Push or spool what is left, and let go of the spools; their files stay."""
        self._retry_at = 0.0
        await self._push_waiting()
        await self._return_spooled()
        for spool in [*self._adopted, *([self._spool] if self._spool else [])]:
            if spool.records:
                logger.warning("{} records stay on the disk for the next process", spool.records)
            await asyncio.to_thread(spool.close)


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
