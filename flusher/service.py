"""The flusher's wiring: a drain a queue, side by side, over one pool of connections."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress

import asyncpg
from loguru import logger
from prometheus_client.core import Metric

from flusher.checks import UnfitDatabaseError, check
from flusher.drain import Drain
from flusher.markets import Markets
from flusher.tables import TABLES
from flusher.writer import Writer, prepare
from sluice.backoff import Backoff
from sluice.connections import connect_redis, postgres_arguments
from sluice.fitness import redis_is_fit
from sluice.lifecycle import Process
from sluice.metrics import counter, gauge
from sluice.queue import RecordQueue

_SESSION = {
    "application_name": "sluice-flusher",
    "statement_timeout": "30s",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": "60s",
    "synchronous_commit": "on",
}


async def run(process: Process) -> None:
    """Flush until the process is told to stop, then empty the queues within DRAIN_SECONDS."""
    settings, stop = process.settings, process.stop
    redis = connect_redis(settings)
    pool = await asyncpg.create_pool(
        **postgres_arguments(settings),
        min_size=0,
        max_size=len(TABLES) + 1,
        timeout=5,
        command_timeout=30,
        server_settings=_SESSION,
        init=prepare,
    )
    try:
        async with asyncio.TaskGroup() as tasks:
            starting = tasks.create_task(_start(process, redis, pool))
            stopping = tasks.create_task(stop.wait())
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            starting.cancel()
            stopping.cancel()
        if starting.cancelled():
            return  # stopped before the servers were there: nothing was taken from the queues
        markets, writer = Markets(pool), Writer(pool)
        drains = [
            Drain(RecordQueue(redis, kind), writer, markets, settings, process.health)
            for kind in TABLES
        ]
        process.statistics.append(lambda: _statistics(drains))
        process.metrics.append(lambda: _metrics(drains))
        async with asyncio.TaskGroup() as tasks:
            for drain in drains:
                tasks.create_task(drain.run(stop))
    finally:
        pool.terminate()  # close() waits for a server that may be frozen
        await redis.aclose()


async def _start(process: Process, redis: object, pool: asyncpg.Pool) -> None:
    await redis_is_fit(redis, process.health)  # type: ignore[arg-type]
    health = process.health
    backoff = Backoff(first=0.2, most=10.0)
    told = ""
    while True:
        try:
            async with pool.acquire(timeout=10) as connection:
                await check(connection)  # type: ignore[arg-type]  # the pool's proxy is one
            break
        except Exception as error:  # noqa: BLE001  # whatever it is, wait for a fit database
            text = (
                f"{error}"
                if isinstance(error, UnfitDatabaseError)
                else (f"PostgreSQL does not answer ({type(error).__name__}: {error})")
            )
            if text != told:
                logger.log(
                    "ERROR" if isinstance(error, UnfitDatabaseError) else "WARNING",
                    "{}; waiting for it, the queues keep everything",
                    text,
                )
            told = text
            health.wait_for("postgres", text)
            with suppress(TimeoutError):
                await asyncio.wait_for(process.stop.wait(), backoff.next_delay())
    health.ready("postgres")


def _statistics(drains: list[Drain]) -> str:
    return (
        "; ".join(
            f"{drain.queue.kind}: {counts.inserted} inserted, {counts.duplicates} duplicates, "
            f"{counts.dead} dead, {counts.depth} queued, {counts.rows_per_second:.0f} rows/s"
            + (f", errors {counts.errors}" if counts.errors else "")
            for drain in drains
            if (counts := drain.counts).batches or counts.depth or counts.errors
        )
        or "nothing to flush yet"
    )


def _metrics(drains: list[Drain]) -> Iterable[Metric]:
    yield counter(
        "flush_rows",
        "Records taken off the queues, by what became of them",
        [
            ({"queue": drain.queue.kind, "result": result}, getattr(drain.counts, name))
            for drain in drains
            for result, name in (
                ("inserted", "inserted"),
                ("duplicate", "duplicates"),
                ("dead", "dead"),
            )
        ],
    )
    yield counter(
        "flush_batches",
        "Batches written",
        [({"queue": d.queue.kind}, d.counts.batches) for d in drains],
    )
    yield counter(
        "flush_seconds",
        "Seconds spent in writing batches",
        [({"queue": d.queue.kind}, d.counts.seconds) for d in drains],
    )
    yield counter(
        "flush_errors",
        "Attempts that failed, by class",
        [
            ({"queue": d.queue.kind, "class": name}, count)
            for d in drains
            for name, count in d.counts.errors.items()
        ],
    )
    yield gauge(
        "flush_last_success_timestamp_seconds",
        "When the last batch was trimmed",
        [({"queue": d.queue.kind}, d.counts.last_success or 0.0) for d in drains],
    )
    yield gauge(
        "queue_depth",
        "Records that wait",
        [({"queue": d.queue.kind}, d.counts.depth) for d in drains],
    )
