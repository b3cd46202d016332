"""The flusher's wiring: a drain for each list it holds, each with a connection of its own."""

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from loguru import logger
from prometheus_client.core import Metric
from redis.asyncio import Redis
from redis.exceptions import RedisError

from flusher.checks import UnfitDatabaseError, check
from flusher.drain import AWAY_SECONDS, Drain
from flusher.leases import RENEW_SECONDS, Leases
from flusher.tables import TABLES
from sluice.backoff import Backoff
from sluice.connections import access_problem, connect_postgres, connect_redis
from sluice.fitness import keep_file_whole, redis_is_fit
from sluice.lifecycle import Fact, Process
from sluice.metrics import counter, gauge
from sluice.presence import announce
from sluice.queue import RecordQueue, find_queues
from sluice.settings import Settings

LAST_WORD_SECONDS: Final = 0.5
_RELOADED: Final = {"flush_batch_size", "flush_batch_bytes", "flush_interval_ms", "dead_max"}


async def run(process: Process) -> None:
    """Flush until the process is told to stop, then empty the queues within DRAIN_SECONDS."""
    settings = process.settings
    redis = connect_redis(settings)
    try:
        if not await _servers_are_fit(process, redis):
            return
        drains = Drains(process, redis)
        process.statistics.append(_Statistics(drains))
        process.metrics.append(lambda: _metrics(drains))
        process.facts.append(lambda: _facts(drains))
        process.unread = (
            "symbols",
            "streams",
            "snapshot_",
            "publish_",
            "book_",
            "gap_",
            "backfill_",
        )
        process.reload.append(lambda _: _RELOADED)  # each batch reads the process's settings
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(announce(process, redis))
            tasks.create_task(keep_file_whole(redis, process.stop))
            tasks.create_task(drains.run())
    finally:
        await redis.aclose()


class Drains:
    """The drains of all lists that this flusher has held; those it holds now run."""

    def __init__(self, process: Process, redis: Redis) -> None:
        self.all: dict[str, Drain] = {}
        """By the name of the list."""
        self._process = process
        self._redis = redis
        self._leases = Leases(redis)
        self._running: dict[str, asyncio.Task[None]] = {}

    @property
    def held(self) -> list[Drain]:
        """The drains of the lists that this flusher holds."""
        return [self.all[name] for name in self._running]

    async def run(self) -> None:
        """Drain what the leases give until the process stops, then what waits in it by then."""
        stop = self._process.stop
        try:
            while not stop.is_set():
                try:
                    await self._share()
                except (RedisError, OSError):
                    # Each drain says so and goes on. To hold too much is harmless.
                    if not self._running:
                        self._begin([RecordQueue(self._redis, kind) for kind in TABLES])
                await self._wait(stop)
            while running := [task for task in self._running.values() if not task.done()]:
                with suppress(RedisError, OSError):
                    await self._leases.renew(drain.queue for drain in self.held)
                await asyncio.wait(running, timeout=RENEW_SECONDS)
        finally:
            await self._end(list(self._running))
            with suppress(RedisError, OSError):
                async with asyncio.timeout(LAST_WORD_SECONDS):
                    await self._leases.release()

    async def _share(self) -> None:
        """Begin to drain the lists that are ours now, and end what is not ours any more."""
        queues = {queue.name: queue for queue in await find_queues(self._redis, TABLES)}
        held = await self._leases.renew(queues.values())
        await self._end([name for name in self._running if name not in held])
        self._begin([queues[name] for name in sorted(held - self._running.keys())])

    def _begin(self, queues: list[RecordQueue]) -> None:
        for queue in queues:
            drain = self.all.get(queue.name) or Drain(queue, TABLES[queue.kind], self._process)
            self.all[queue.name] = drain
            self._running[queue.name] = asyncio.create_task(drain.run())

    async def _wait(self, stop: asyncio.Event) -> None:
        """Wait for the next turn; an error that left a drain after all ends the process."""
        with suppress(TimeoutError):
            async with asyncio.timeout(RENEW_SECONDS):
                await stop.wait()
        for task in self._running.values():
            if task.done() and not stop.is_set():
                task.result()

    async def _end(self, names: list[str]) -> None:
        """End drains where they are: a batch in hand stays in its list."""
        tasks = [self._running.pop(name) for name in names]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for name in names:
            self._process.health.ready(name)


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
            if problem := access_problem(error):
                level, text = "ERROR", problem
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

    def __init__(self, drains: Drains) -> None:
        self._drains = drains
        self._last: dict[str, int] = {}
        self._since = time.monotonic()

    def __call__(self) -> str:
        now = time.monotonic()
        elapsed, self._since = max(now - self._since, 1e-3), now
        parts = []
        for name, drain in self._drains.all.items():
            counts = drain.counts
            rate = (counts.taken - self._last.get(name, 0)) / elapsed
            self._last[name] = counts.taken
            if not (counts.taken or counts.depth or counts.errors):
                continue
            errors = "".join(f", {count} {what}" for what, count in sorted(counts.errors.items()))
            parts.append(
                f"{name}: {counts.inserted} inserted, {counts.duplicates} duplicates, "
                f"{counts.dead} dead, {counts.depth} queued, {rate:.0f} rows/s"
                + (f", attempts failed{errors}" if errors else "")
            )
        return "; ".join(parts) or "nothing to flush yet"


def _facts(drains: Drains) -> dict[str, Fact]:
    """Give what `sluice status` shows."""
    counts = [drain.counts for drain in drains.all.values()]
    last = max((count.last_success for count in counts), default=0.0)
    return {
        "lists": len(drains.held),
        "rows": sum(count.taken for count in counts),
        "last flush": f"{time.time() - last:.1f} s ago" if last else "none yet",
    }


def _metrics(drains: Drains) -> Iterable[Metric]:
    yield counter(
        "flush_rows",
        "Records taken off the queues, by what became of them",
        [
            ({"queue": drain.queue.name, "result": result}, count)
            for drain in drains.all.values()
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
        [({"queue": drain.queue.name}, drain.counts.batches) for drain in drains.all.values()],
    )
    yield counter(
        "flush_stale_claims",
        "Batches that another flusher trimmed first",
        [({"queue": drain.queue.name}, drain.counts.stale) for drain in drains.all.values()],
    )
    yield counter(
        "flush_seconds",
        "Seconds spent in writing batches",
        [({"queue": drain.queue.name}, drain.counts.seconds) for drain in drains.all.values()],
    )
    yield counter(
        "flush_errors",
        "Attempts that failed, by class",
        [
            ({"queue": drain.queue.name, "class": name}, count)
            for drain in drains.all.values()
            for name, count in drain.counts.errors.items()
        ],
    )
    yield gauge(
        "flush_last_success_timestamp_seconds",
        "When the last batch was trimmed, 0 before the first",
        [({"queue": drain.queue.name}, drain.counts.last_success) for drain in drains.held],
    )
    yield gauge(
        "queue_depth",
        "Records that wait",
        [({"queue": drain.queue.name}, drain.counts.depth) for drain in drains.held],
    )
