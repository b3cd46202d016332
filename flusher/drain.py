"""One queue into one table: claim, write, trim, for ever."""

import asyncio
import base64
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import msgspec
from loguru import logger
from redis.exceptions import RedisError

from flusher.errors import Verdict, is_unreachable, judge
from flusher.markets import Markets
from flusher.tables import TABLES
from flusher.writer import Writer
from sluice import failpoints, records
from sluice.backoff import Backoff
from sluice.clock import now_micros
from sluice.metrics import Health
from sluice.queue import Claim, DeadListFullError, RecordQueue, StaleClaimError
from sluice.records import Record, RejectedRecordError, TooNewError, is_name
from sluice.settings import Settings

POLL_SECONDS: Final = 0.05
BLOCKED_SECONDS: Final = 5.0
UNREACHABLE_SECONDS: Final = 2.0
"""The longest delay while a server is away: to knock costs it nothing, and the backlog waits."""


@dataclass
class DrainCounts:
    """What one queue's drain has done since the start."""

    inserted: int = 0
    duplicates: int = 0
    dead: int = 0
    batches: int = 0
    stale: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    """By verdict, and `redis`."""
    seconds: float = 0.0
    """Spent in writing batches."""
    last_success: float | None = None
    """When the last batch was trimmed, seconds since the epoch."""
    depth: int = 0
    rows_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class _Batch:
    """A claim made ready: the lines to write, and the rows that are refused already."""

    claim: Claim
    lines: bytes
    places: Sequence[int]
    """The index in the claim of each line."""
    refused: dict[int, str]


class Drain:
    """Moves one kind of records; everything that fails leaves them at the head, in order."""

    def __init__(
        self,
        queue: RecordQueue,
        writer: Writer,
        markets: Markets,
        settings: Settings,
        health: Health,
    ) -> None:
        self.counts = DrainCounts()
        self.queue = queue
        self._table = TABLES[queue.kind]
        self._writer = writer
        self._markets = markets
        self._settings = settings
        self._health = health
        self._item_bytes = 200.0

    async def run(self, stop: asyncio.Event) -> None:
        """Drain until `stop`, then until the queue is empty; no server's error leaves here."""
        backoff = Backoff(first=0.1, most=30.0)
        while not (stop.is_set() and await self._is_done()):
            try:
                await self._wait_until_due(stop)
                claim = await self.queue.claim(
                    self._settings.flush_batch_size, self._settings.flush_batch_bytes
                )
                if claim.items:
                    await failpoints.reach("flusher.claimed")
                    await self._flush(claim)
                backoff.reset()
                self._health.ready(self.queue.kind)
            except StaleClaimError:
                self.counts.stale += 1  # another flusher was faster; the key drops what came twice
            except (TooNewError, DeadListFullError) as error:
                self._blocked(error)
                await self._pause(BLOCKED_SECONDS, stop)
            except Exception as error:  # noqa: BLE001  # no class of error may end the drain
                await self._pause(self._failed(error, backoff), stop)

    async def _is_done(self) -> bool:
        with suppress(RedisError, OSError):
            return await self.queue.head_item() is None
        return True  # Redis is away: what it holds it keeps

    async def _wait_until_due(self, stop: asyncio.Event) -> None:
        """Return when enough records wait, or when the first has waited long enough."""
        settings = self._settings
        deadline: float | None = None
        while True:
            depth = self.counts.depth = await self.queue.length()
            now = time.monotonic()
            if depth and deadline is None:
                deadline = now + settings.flush_interval_ms / 1000
            is_large = (
                depth >= settings.flush_batch_size
                or depth * self._item_bytes >= settings.flush_batch_bytes
            )
            if is_large or stop.is_set() or (deadline is not None and now >= deadline):
                return
            await self._pause(POLL_SECONDS, stop)

    async def _flush(self, claim: Claim) -> None:
        began = time.monotonic()
        self._item_bytes = sum(map(len, claim.items)) / len(claim.items)
        batch = await self._prepare(claim)
        inserted = 0
        refused = batch.refused
        if batch.lines:
            inserted, by_line = await self._writer.write(self._table, batch.lines)
            await failpoints.reach("flusher.committed")
            refused = refused | {batch.places[line]: why for line, why in by_line.items()}
        claim = batch.claim
        letters = [self._letter(claim.items[place], refused[place]) for place in sorted(refused)]
        self.counts.depth = await self.queue.ack(claim, letters, dead_max=self._settings.dead_max)
        await failpoints.reach("flusher.acked")
        for place in sorted(refused)[:10]:
            logger.error(
                "{}: a record is refused and moved to {}: {}; see `sluice dead`",
                self.queue.kind,
                self.queue.dead_key,
                refused[place],
            )
        counts = self.counts
        counts.batches += 1
        counts.inserted += inserted
        counts.dead += len(letters)
        counts.duplicates += len(claim.items) - len(letters) - inserted
        counts.last_success = time.time()
        spent = time.monotonic() - began
        counts.seconds += spent
        counts.rows_per_second = len(claim.items) / spent

    async def _prepare(self, claim: Claim) -> _Batch:
        """Turn items into lines; a record of a newer version ends the batch before it."""
        claim, found, refused = self._decode(claim)
        names = {(record.exchange, record.symbol) for record in found.values()}
        good = {name for name in names if is_name(name[0]) and is_name(name[1])}
        await self._markets.learn(good)
        await failpoints.reach("flusher.markets_known")
        ids, line = self._markets.ids, self._table.line
        for place in [p for p, r in found.items() if (r.exchange, r.symbol) not in good]:
            del found[place]
            refused[place] = "no name of a market"
        text = [line(record, ids[record.exchange, record.symbol]) for record in found.values()]
        lines = _encode("".join(text))
        if not self._is_clean(lines, len(text)):
            for place, entry in zip(list(found), text, strict=True):
                if not self._is_clean(_encode(entry), 1):
                    del found[place]
                    refused[place] = "characters that do not belong in a number"
            text = [line(record, ids[record.exchange, record.symbol]) for record in found.values()]
            lines = _encode("".join(text))
        return _Batch(claim, lines, list(found), refused)

    def _decode(self, claim: Claim) -> tuple[Claim, dict[int, Record], dict[int, str]]:
        """Read the items by their places; gives the claim as far as this version can read it."""
        kind = self.queue.kind
        whole = records.decode_many(kind, claim.items)
        if whole is not None:
            return claim, dict(enumerate(whole)), {}
        found: dict[int, Record] = {}
        refused: dict[int, str] = {}
        for place, item in enumerate(claim.items):
            try:
                found[place] = records.decode(kind, item)
            except RejectedRecordError as error:
                refused[place] = f"no {kind}: {error}"
            except TooNewError:
                if place == 0:
                    raise
                return Claim(claim.head, claim.items[:place]), found, refused
        return claim, found, refused

    def _is_clean(self, lines: bytes, rows: int) -> bool:
        """Tell whether the text is what COPY will read it as, in one pass over the batch."""
        alphabet = self._table.alphabet
        if alphabet is None:
            return b"\x00" not in lines and b"\xed\xa0" not in lines and lines.count(b"\n") == rows
        return (
            not lines.translate(None, alphabet)
            and lines.count(b"\n") == rows
            and lines.count(b"\t") == rows * (len(self._table.columns) - 1)
        )

    def _letter(self, item: bytes, reason: str) -> bytes:
        """Write a dead letter: where it came from, why, when, and the bytes as they were."""
        letter = {"queue": self.queue.key, "reason": reason, "time": now_micros()}
        try:
            letter["raw"] = item.decode()
        except UnicodeDecodeError:
            letter["raw_base64"] = base64.b64encode(item).decode()
        return msgspec.json.encode(letter)

    def _failed(self, error: Exception, backoff: Backoff) -> float:
        """Say what went wrong, once, and give the delay before the next attempt."""
        verdict = "redis" if isinstance(error, RedisError) else judge(error).value
        self.counts.errors[verdict] = self.counts.errors.get(verdict, 0) + 1
        self._markets.forget()
        delay = backoff.next_delay()
        if verdict == "redis" or is_unreachable(error):
            delay = min(delay, UNREACHABLE_SECONDS)
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        self._health.wait_for(self.queue.kind, text)
        if verdict == Verdict.BUG.value:
            logger.opt(exception=error).error(
                "{}: a bug; the batch stays in the queue and is tried again", self.queue.kind
            )
        elif backoff.failures == 1 or delay > 10:  # noqa: PLR2004  # once, then now and then
            level = "ERROR" if verdict == Verdict.MISSING.value else "WARNING"
            logger.log(
                level, "{}: not written ({}); the batch stays in the queue", self.queue.kind, text
            )
        return delay

    def _blocked(self, error: Exception) -> None:
        why = (
            f"{error}; upgrade this flusher"
            if isinstance(error, TooNewError)
            else f"{error} is full; look with `sluice dead list`, then retry or drop"
        )
        if why not in self._health.reasons_for(self.queue.kind):
            logger.error("{}: the queue stands still, nothing is lost: {}", self.queue.kind, why)
        self._health.wait_for(self.queue.kind, why)

    async def _pause(self, seconds: float, stop: asyncio.Event) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), seconds)


def _encode(text: str) -> bytes:
    # A lone surrogate becomes bytes outside every alphabet, and so is refused with its row.
    return text.encode("utf-8", "surrogatepass")
