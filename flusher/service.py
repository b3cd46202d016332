"""The flusher's wiring: a drain a queue, side by side, each with a connection of its own."""

import asyncio
import time
from collections.abc import Iterable
from typing import Final

from loguru import logger
from prometheus_client.core import Metric
from redis.asyncio import Redis

from flusher.checks import UnfitDatabaseError, check
from flusher.drain import AWAY_SECONDS, Drain
from flusher.tables import TABLES
from sluice.backoff import Backoff
from sluice.connections import connect_postgres, connect_redis
from sluice.fitness import redis_is_fit
from sluice.lifecycle import Fact, Process
from sluice.metrics import counter, gauge
from sluice.presence import announce
from sluice.queue import RecordQueue
from sluice.settings import Settings

_RELOADED: Final = {"flush_batch_size", "flush_batch_bytes", "flush_interval_ms", "dead_max"}


async def run(process: Process) -> None:
    """Flush until the process is told to stop, then empty the queues within DRAIN_SECONDS."""
    settings = process.settings
    redis = connect_redis(settings)
    try:
        if not await _servers_are_fit(process, redis):
            return
        drains = [Drain(RecordQueue(redis, kind), table, process) for kind, table in TABLES.items()]
        process.statistics.append(_Statistics(drains))
        process.metrics.append(lambda: _metrics(drains))
        process.facts.append(lambda: _facts(drains))
        process.reload.append(lambda _: _RELOADED)  # each batch reads the process's settings
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(announce(process, redis))
            for drain in drains:
                tasks.create_task(drain.run())
    finally:
        await redis.aclose()


async def _servers_are_fit(process: Process, redis: Redis) -> bool:
    """Wait for both servers; gives False where the process was told to stop before."""
    async with asyncio.TaskGroup() as tasks:
        looking = tasks.create_task(_look_at_servers(process, redis))
        stopping = tasks.create_task(process.stop.wait())
        await asyncio.wait([looking, stopping], return_when=asyncio.FIRST_COMPLETED)
        looking.cancel()
        stopping.cancel()
    return not looking.cancelled()


async def _look_at_servers(process: Process, redis: Redis) -> None:
    await redis_is_fit(redis, process.health)
    backoff = Backoff(first=0.2, most=AWAY_SECONDS)
    told = ""
    while True:
        process.health.wait_for("postgres", told or "not reached yet")
        try:
            await _look_at_postgres(process.settings)
            break
        except UnfitDatabaseError as error:
            level, text = "ERROR", str(error)
        except Exception as error:  # noqa: BLE001  # whatever it is, a person may mend it
            level, text = "WARNING", f"PostgreSQL: {type(error).__name__}: {error}".rstrip(": ")
        if text != told:
            logger.log(level, "{}; waiting for it, the queues keep everything", text)
        told = text
        process.health.wait_for("postgres", text)
        process.progress()
        await asyncio.sleep(backoff.next_delay())
    process.health.ready("postgres")


async def _look_at_postgres(settings: Settings) -> None:
    connection = await connect_postgres(settings, command_timeout=10)
    try:
        await check(connection)
    finally:
        connection.terminate()


class _Statistics:
    """The line on each queue, with the rate since the last line."""

    def __init__(self, drains: list[Drain]) -> None:
        self._drains = drains
        self._last = [0] * len(drains)
        self._since = time.monotonic()

    def __call__(self) -> str:
        now = time.monotonic()
        elapsed, self._since = max(now - self._since, 1e-3), now
        parts = []
        for index, drain in enumerate(self._drains):
            counts = drain.counts
            rate = (counts.taken - self._last[index]) / elapsed
            self._last[index] = counts.taken
            if not (counts.taken or counts.depth or counts.errors):
                continue
            errors = "".join(f", {count} {what}" for what, count in sorted(counts.errors.items()))
            parts.append(
                f"{drain.queue.kind}: {counts.inserted} inserted, {counts.duplicates} duplicates, "
                f"{counts.dead} dead, {counts.depth} queued, {rate:.0f} rows/s"
                + (f", attempts failed{errors}" if errors else "")
            )
        return "; ".join(parts) or "nothing to flush yet"


def _facts(drains: list[Drain]) -> dict[str, Fact]:
    """Give what `sluice status` shows."""
    last = max(drain.counts.last_success for drain in drains)
    return {
        "rows": sum(drain.counts.taken for drain in drains),
        "last flush": f"{time.time() - last:.1f} s ago" if last else "none yet",
    }


def _metrics(drains: list[Drain]) -> Iterable[Metric]:
    yield counter(
        "flush_rows",
        "Records taken off the queues, by what became of them",
        [
            ({"queue": drain.queue.kind, "result": result}, count)
            for drain in drains
            for result, count in (
                ("inserted", drain.counts.inserted),
                ("duplicate", drain.counts.duplicates),
                ("dead", drain.counts.dead),
            )
        ],
    )
    yield counter(
        "flush_batches",
        "Batches written and trimmed",
        [({"queue": drain.queue.kind}, drain.counts.batches) for drain in drains],
    )
    yield counter(
        "flush_stale_claims",
        "Batches that another flusher trimmed first",
        [({"queue": drain.queue.kind}, drain.counts.stale) for drain in drains],
    )
    yield counter(
        "flush_seconds",
        "Seconds spent in writing batches",
        [({"queue": drain.queue.kind}, drain.counts.seconds) for drain in drains],
    )
    yield counter(
        "flush_errors",
        "Attempts that failed, by class",
        [
            ({"queue": drain.queue.kind, "class": name}, count)
            for drain in drains
            for name, count in drain.counts.errors.items()
        ],
    )
    yield gauge(
        "flush_last_success_timestamp_seconds",
        "When the last batch was trimmed, 0 before the first",
        [({"queue": drain.queue.kind}, drain.counts.last_success) for drain in drains],
    )
    yield gauge(
        "queue_depth",
        "Records that wait",
        [({"queue": drain.queue.kind}, drain.counts.depth) for drain in drains],
    )
