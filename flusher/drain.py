"""One queue into one table: claim, write, trim, for ever."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from loguru import logger

from flusher import batch as batches
from flusher.batch import Lines
from flusher.errors import Verdict, judge
from flusher.tables import Table
from flusher.writer import Writer
from sluice import failpoints
from sluice.backoff import Backoff
from sluice.clock import now_micros
from sluice.lifecycle import Process
from sluice.queue import Claim, DeadListFullError, RecordQueue, StaleClaimError
from sluice.records import TooNewError

LEAST_POLL_SECONDS: Final = 0.01
MOST_POLL_SECONDS: Final = 0.1
BLOCKED_SECONDS: Final = 5.0
MOST_SECONDS: Final = 30.0
AWAY_SECONDS: Final = 2.0
"""The longest delay while a server is away: to knock costs it nothing, and the backlog waits."""
_MOST_AFTER: Final = {
    Verdict.AWAY: AWAY_SECONDS,
    Verdict.DECLINED: AWAY_SECONDS,
    Verdict.MISSING: 5.0,
    Verdict.FULL: 8.0,
}
"""The longest delay after an error of a kind, where it is shorter."""
STOPPING_SECONDS: Final = 0.5
"""The longest delay once the process is told to stop: there are only DRAIN_SECONDS left."""
RARE_SECONDS: Final = 10.0
"""A delay so long that each attempt may be logged."""


@dataclass
class DrainCounts:
    """What one queue's drain has done since the start."""

    inserted: int = 0
    duplicates: int = 0
    dead: int = 0
    batches: int = 0
    stale: int = 0
    """Batches that another flusher trimmed first."""
    errors: dict[str, int] = field(default_factory=dict)
    """Attempts that failed, by verdict."""
    seconds: float = 0.0
    """Spent in writing batches, on waiting for the database above all."""
    last_success: float = 0.0
    """When the last batch was trimmed, seconds since the epoch."""
    depth: int = 0

    @property
    def taken(self) -> int:
        """How many records were taken off the queue."""
        return self.inserted + self.duplicates + self.dead


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A claim with its lines, which hold ids that only `writer` knows to be true."""

    claim: Claim
    lines: Lines
    writer: Writer
    is_full: bool
    """Whether a limit ended the claim, so that more waits behind it."""


@dataclass(frozen=True, slots=True)
class _Written:
    """A claim whose rows are in the table, but for the refused ones, and that is not trimmed."""

    claim: Claim
    inserted: int
    refused: dict[int, str]
    """The reasons, by place in the claim."""
    seconds: float


def _before(end: int, written: _Written) -> _Written:
    """Give the first part of a batch; the rows of the rest come again and count as duplicates."""
    refused = {place: reason for place, reason in written.refused.items() if place < end}
    claim = Claim(written.claim.head, written.claim.items[:end])
    return _Written(claim, min(written.inserted, end - len(refused)), refused, written.seconds)


class Drain:
    """Moves one kind of records; whatever fails leaves them at the head, in order."""

    def __init__(self, queue: RecordQueue, table: Table, process: Process) -> None:
        self.counts = DrainCounts()
        self.queue = queue
        self._table = table
        self._process = process
        self._backoff = Backoff(first=0.1, most=MOST_SECONDS)
        self._told: Verdict | None = None
        self._writer: Writer | None = None
        self._item_bytes = 200.0

    async def run(self) -> None:
        """Drain until the process stops, then what waits by then; no error leaves here."""
        stop = self._process.stop
        try:
            while True:
                is_last = stop.is_set()
                try:
                    await self._flush_waiting()
                    if is_last:
                        return
                except StaleClaimError:
                    self.counts.stale += 1  # the other flusher's rows are these: the key says so
                except (TooNewError, DeadListFullError) as error:
                    self._blocked(error)
                    if is_last:
                        return
                    await self._pause(BLOCKED_SECONDS)
                except Exception as error:  # noqa: BLE001  # no class of error may end the drain
                    self._disconnect()
                    await self._pause(self._failed(error))
                self._process.progress()
        finally:
            self._disconnect()

    async def _flush_waiting(self) -> None:
        """Wait until a flush is due, and write batch after batch as long as they are full."""
        await self._wait_until_due()
        prepared = await self._prepare()
        written: _Written | None = None
        while prepared is not None:
            # The database writes this one while the one before is trimmed and the next one is read.
            # A failure there must not end the write of this one, so no TaskGroup.
            now_written, following = await asyncio.gather(
                self._write(prepared),
                self._trim_and_read_ahead(written, prepared),
                return_exceptions=True,
            )
            if isinstance(now_written, BaseException):
                raise now_written
            if isinstance(following, BaseException):
                with suppress(StaleClaimError):  # as it is where the one before was not trimmed
                    await self._trim(now_written)
                raise following
            prepared, written = following, now_written
        if written is not None:
            await self._trim(written)

    async def _wait_until_due(self) -> None:
        """Return when enough records wait, or when the first has waited long enough."""
        deadline: float | None = None
        while True:
            settings = self._process.settings
            depth = self.counts.depth = await self.queue.length()
            await failpoints.reach("flusher.counted")
            self._process.progress()
            now = time.monotonic()
            if not depth:
                self._works()
            elif deadline is None:
                deadline = now + settings.flush_interval_ms / 1000
            is_large = (
                depth >= settings.flush_batch_size
                or depth * self._item_bytes >= settings.flush_batch_bytes
            )
            is_old = deadline is not None and now >= deadline
            if is_large or is_old or self._process.stop.is_set():
                return
            poll = settings.flush_interval_ms / 10_000
            await self._pause(min(max(poll, LEAST_POLL_SECONDS), MOST_POLL_SECONDS))

    async def _prepare(self, skip: int = 0) -> _Prepared | None:
        """Claim and read the next batch, or give None: nothing there, or too little to read ahead.

        `skip` is how many records the batch has that is being written meanwhile.
        """
        settings = self._process.settings
        size, most_bytes = settings.flush_batch_size, settings.flush_batch_bytes
        claim = await self.queue.claim(size, most_bytes, skip=skip)
        await failpoints.reach("flusher.claimed")
        if not claim.items:
            return None
        claimed_bytes = sum(map(len, claim.items))
        self._item_bytes = claimed_bytes / len(claim.items)
        is_full = len(claim.items) >= size or claimed_bytes + self._item_bytes > most_bytes
        if skip and not is_full:
            return None
        batch = batches.read(self.queue.kind, claim)
        if self._writer is None:
            self._writer = await Writer.open(settings, self._table)
        writer = self._writer
        await writer.learn(set(batch.names))
        await failpoints.reach("flusher.markets_known")
        lines = batches.lines_of(batch, self._table, writer.markets.ids)
        return _Prepared(batch.claim, lines, writer, is_full)

    async def _trim_and_read_ahead(
        self, written: _Written | None, following: _Prepared
    ) -> _Prepared | None:
        """Trim the batch before `following`, and prepare the one behind it."""
        if written is not None:
            await self._trim(written)
        if not following.is_full:
            return None
        return await self._prepare(skip=len(following.claim.items))

    async def _write(self, prepared: _Prepared) -> _Written:
        """Write a batch to the end of its transaction."""
        began = time.monotonic()
        lines = prepared.lines
        inserted, refused = 0, lines.refused
        if lines.places:
            inserted, by_line = await prepared.writer.write(lines.data)
            refused = refused | {lines.places[line]: reason for line, reason in by_line.items()}
        return _Written(prepared.claim, inserted, refused, time.monotonic() - began)

    async def _trim(self, written: _Written) -> None:
        """Take a written batch off the queue, refused rows to the dead list in the same step."""
        claim, refused = written.claim, written.refused
        dead = sorted(refused)
        now = now_micros()
        letters = [
            batches.letter(self.queue.key, claim.items[place], refused[place], now)
            for place in dead
        ]
        await failpoints.reach("flusher.acking")
        try:
            depth = await self.queue.ack(claim, letters, dead_max=self._process.settings.dead_max)
            await failpoints.reach("flusher.acked")
        except DeadListFullError as error:
            # The queue is to stand still at the record for which there is no room, not before it.
            if end := dead[error.room]:
                await self._trim(_before(end, written))
            raise
        if dead:
            logger.error(
                "{}: {} of {} records are refused and moved to {}, see `sluice dead`; the first: "
                "{}",
                self.queue.name,
                len(dead),
                len(claim.items),
                self.queue.dead_key,
                refused[dead[0]],
            )
        counts = self.counts
        counts.batches += 1
        counts.inserted += written.inserted
        counts.dead += len(dead)
        counts.duplicates += len(claim.items) - len(dead) - written.inserted
        counts.seconds += written.seconds
        counts.last_success = time.time()
        counts.depth = depth
        self._works()
        self._process.progress()

    def _works(self) -> None:
        """Note that nothing stands in the way of this queue."""
        if self._backoff.failures:
            logger.info("{}: flows again", self.queue.name)
        self._backoff.reset()
        self._told = None
        self._process.health.ready(self.queue.name)

    def _failed(self, error: Exception) -> float:
        """Say what went wrong, once, and give the delay before the next attempt."""
        name, verdict = self.queue.name, judge(error)
        self.counts.errors[verdict.value] = self.counts.errors.get(verdict.value, 0) + 1
        delay = min(self._backoff.next_delay(), _MOST_AFTER.get(verdict, MOST_SECONDS))
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        self._process.health.wait_for(name, text)
        if verdict is Verdict.BUG:
            logger.opt(exception=error).error(
                "{}: a bug; the batch stays in the queue and is tried again", name
            )
        elif verdict is not self._told or delay > RARE_SECONDS:
            level = "ERROR" if verdict is Verdict.MISSING else "WARNING"
            logger.log(level, "{}: not written ({}); the batch stays in the queue", name, text)
        self._told = verdict
        return min(delay, STOPPING_SECONDS) if self._process.stop.is_set() else delay

    def _blocked(self, error: TooNewError | DeadListFullError) -> None:
        why = (
            f"{error}; upgrade this flusher"
            if isinstance(error, TooNewError)
            else f"{error} is full; look with `sluice dead list`, then retry or drop"
        )
        health = self._process.health
        if health.reasons_for(self.queue.name) != why:
            logger.error("{}: the queue stands still, nothing is lost: {}", self.queue.name, why)
        health.wait_for(self.queue.name, why)

    def _disconnect(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    async def _pause(self, seconds: float) -> None:
        """Wait, but only until the process is told to stop."""
        stop = self._process.stop
        if stop.is_set():
            await asyncio.sleep(seconds)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await stop.wait()
