"""Every fault of the schedule: how it is done, and how it is seen to have really happened.

Each is a coroutine that does it, heals it, and gives how often it was seen: 0 is not hit.
"""

import asyncio
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final, Literal

import asyncpg
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from sluice.cli.servers import PostgresServer, RedisServer
from sluice.failpoints import POINTS
from sluice.queue import balance_of
from tests.acceptance.processes import Processes
from tests.chaos.plan import Step
from tests.chaos.services import Services, stopped
from tests.faults import postgres_faults, redis_faults
from tests.faults.disk import filled
from tests.faults.proxy import Proxy
from tests.servers import Database


@dataclass
class Rig:
    """All that can be broken; `are_counters_whole` until Redis lost some."""

    processes: Processes
    services: Services
    redis: RedisServer
    redis_proxy: Proxy
    postgres: PostgresServer
    postgres_proxy: Proxy
    database: Database
    hits: Counter[str]
    disks: Mapping[str, Path]
    """Small file systems, by whose they are."""
    are_counters_whole: bool = True

    @asynccontextmanager
    async def redis_client(self) -> AsyncIterator[Redis]:
        """Connect to Redis past the proxy."""
        client = Redis.from_url(self.redis.url, retry=Retry(NoBackoff(), 0), socket_timeout=None)
        try:
            yield client
        finally:
            await client.aclose()

    async def control(self, path: str, body: object | None = None) -> Any:  # JSON
        """Ask the exchange's control port."""
        return await asyncio.to_thread(self.processes.control, path, body)

    async def injected(self, kind: str) -> int:
        """Ask the exchange how often it really injected a fault."""
        return int((await self.control("faults"))["counts"].get(kind, 0))


Fault = Callable[[Rig, Step], Awaitable[int]]


# Processes ------------------------------------------------------------------------------------


async def _kill(rig: Rig, step: Step) -> int:
    slot = rig.services.of("", step.draw)
    with rig.services.in_hand(slot) as process:
        process.kill()
        code = await asyncio.to_thread(process.wait)
        await asyncio.sleep(step.seconds)
        rig.services.start(slot)
    return code == -signal.SIGKILL


async def _terminate(rig: Rig, step: Step) -> int:
    slot = rig.services.of("", step.draw)
    with rig.services.in_hand(slot) as process:
        await rig.services.end(slot)
        await asyncio.sleep(step.seconds)
        rig.services.start(slot)
    return process.returncode is not None


async def _terminate_and_kill(rig: Rig, step: Step) -> int:
    """The supervisor's patience ends before the process does."""
    slot = rig.services.of("", step.draw)
    with rig.services.in_hand(slot) as process:
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(min(step.seconds, 0.5))
        process.kill()
        code = await asyncio.to_thread(process.wait)
        rig.services.start(slot)
    return code == -signal.SIGKILL


async def _freeze_process(rig: Rig, step: Step) -> int:
    slot = rig.services.of("", step.draw)
    with rig.services.in_hand(slot) as process:
        process.send_signal(signal.SIGSTOP)
        try:
            seen = await stopped(process.pid, step.seconds)
        finally:
            process.send_signal(signal.SIGCONT)
    return seen > 0


async def _deploy(rig: Rig, step: Step) -> int:
    """The new process starts before the old one is told to end."""
    slot = rig.services.of("", step.draw)
    with rig.services.in_hand(slot):
        old = rig.services.start_beside(slot)
        await asyncio.sleep(step.seconds)
        were_both = old.process.poll() is None and slot.process.poll() is None
        await rig.services.end(old)
    return were_both


SERVICES_OF: Final = {
    "publisher": ("collector", "orderbook"),
    "backfill": ("collector",),
    "ledger": ("collector",),
    "flusher": ("flusher",),
    "writer": ("flusher",),
    "markets": ("flusher",),
    "leases": ("flusher",),
    "stream": ("collector", "orderbook"),
    "rest": ("collector", "orderbook"),
    "budget": ("collector", "orderbook"),
    "anchors": ("collector",),
    "aggregates": ("collector",),
    "polling": ("collector",),
    "candles": ("collector",),
    "liveness": ("collector",),
    "latest": ("orderbook",),
    "coverage": ("orderbook",),
}
"""The services that come by the failpoints of each module."""


def _failpoint(module: str) -> Fault:
    points = sorted(point for point in POINTS if point.startswith(f"{module}."))
    services = SERVICES_OF[module]

    async def die(rig: Rig, step: Step) -> int:
        draw = Random(step.draw)
        point = draw.choice(points)
        slot = rig.services.of(draw.choice(services), step.draw)
        with rig.services.in_hand(slot) as process:
            process.kill()
            await asyncio.to_thread(process.wait)
            rig.services.start(slot, f"{point}:{draw.randint(1, 3)}")
        return 0  # the watch counts the death

    return die


# Redis ----------------------------------------------------------------------------------------


async def _redis_kill(rig: Rig, step: Step) -> int:
    await asyncio.to_thread(rig.redis.kill)
    is_dead = not rig.redis.is_running
    await asyncio.sleep(step.seconds)
    await asyncio.to_thread(rig.redis.start)
    return is_dead


async def _redis_freeze(rig: Rig, step: Step) -> int:
    pid = rig.redis.pid
    assert pid is not None
    with redis_faults.frozen(rig.redis):
        return await stopped(pid, step.seconds) > 0


async def _redis_pause(rig: Rig, step: Step) -> int:
    async with rig.redis_client() as client:
        await redis_faults.pause_clients(client, step.seconds)
        began = time.monotonic()
        await client.ping()
    return time.monotonic() - began > step.seconds / 2


async def _refusals(client: Redis, error: str) -> int:
    """Count how often Redis refused a command so."""
    stats = await client.info("errorstats")
    return int(stats.get(f"errorstat_{error}", {}).get("count", 0))


async def _redis_full(rig: Rig, step: Step) -> int:
    async with rig.redis_client() as client:
        before = await _refusals(client, "OOM")
        async with redis_faults.memory_full(client):
            await asyncio.sleep(step.seconds)
        return await _refusals(client, "OOM") - before


async def _redis_read_only(rig: Rig, step: Step) -> int:
    async with rig.redis_client() as client:
        before = await _refusals(client, "READONLY")
        async with redis_faults.read_only(client):
            await asyncio.sleep(step.seconds)
        return await _refusals(client, "READONLY") - before


async def _pushed(rig: Rig) -> int:
    async with rig.redis_client() as client:
        return (await balance_of(client, "trade")).pushed


async def _redis_empty(rig: Rig, step: Step) -> int:
    del step
    before = await _pushed(rig)
    rig.are_counters_whole = False
    await asyncio.to_thread(redis_faults.restart_empty, rig.redis)
    return await _pushed(rig) < before


async def _redis_older(rig: Rig, step: Step) -> int:
    rig.are_counters_whole = False
    with tempfile.TemporaryDirectory(prefix="sluice-chaos-") as directory:
        copy = await asyncio.to_thread(redis_faults.copy_data, rig.redis, Path(directory) / "copy")
        await asyncio.sleep(step.seconds)
        before = await _pushed(rig)
        await asyncio.to_thread(redis_faults.restart_from, rig.redis, copy)
        return await _pushed(rig) < before


async def _redis_tail_cut(rig: Rig, step: Step) -> int:
    before = await _pushed(rig)
    rig.are_counters_whole = False
    size = 1000 + int(step.draw * 50_000)
    try:
        await asyncio.to_thread(redis_faults.restart_without_tail, rig.redis, size)
    except ValueError:  # there is less than that; the server is down already
        await asyncio.to_thread(rig.redis.start)
        return 0
    return await _pushed(rig) < before


async def _redis_drop_clients(rig: Rig, step: Step) -> int:
    ended = 0
    deadline = time.monotonic() + step.seconds
    async with rig.redis_client() as client:
        while time.monotonic() < deadline:
            ended += await client.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(0.1)
    return ended


async def _redis_disk_full(rig: Rig, step: Step) -> int:
    """Its append-only file can not grow: it takes no writes until it can."""
    async with rig.redis_client() as client:
        before = await _refusals(client, "MISCONF")
        with filled(rig.disks["redis"]):
            await asyncio.sleep(1 + step.seconds)
        return await _refusals(client, "MISCONF") - before


async def _redis_and_spool_full(rig: Rig, step: Step) -> int:
    """There is no room for a record anywhere."""
    async with rig.redis_client() as client:
        before = await _refusals(client, "OOM")
        with filled(rig.disks["spool"]) as taken:
            async with redis_faults.memory_full(client):
                await asyncio.sleep(step.seconds)
        return bool(taken) and await _refusals(client, "OOM") - before


# PostgreSQL -----------------------------------------------------------------------------------


async def _postgres_terminate(rig: Rig, step: Step) -> int:
    del step
    return await postgres_faults.terminate_backends(rig.database)


async def _postgres_restart(rig: Rig, step: Step) -> int:
    before = rig.postgres.pid
    await asyncio.to_thread(rig.postgres.stop, "immediate")
    await asyncio.sleep(step.seconds)
    await asyncio.to_thread(rig.postgres.start)
    return rig.postgres.pid != before


async def _postgres_kill(rig: Rig, step: Step) -> int:
    await asyncio.to_thread(rig.postgres.kill)
    is_dead = not rig.postgres.is_running
    await asyncio.sleep(step.seconds)
    await asyncio.to_thread(rig.postgres.start)
    return is_dead


async def _postgres_freeze(rig: Rig, step: Step) -> int:
    pid = rig.postgres.pid
    assert pid is not None
    rig.postgres.freeze()
    try:
        return await stopped(pid, step.seconds) > 0
    finally:
        rig.postgres.thaw()


async def _postgres_lock(rig: Rig, step: Step) -> int:
    waiting = 0
    deadline = time.monotonic() + step.seconds
    connection = await asyncpg.connect(rig.database.dsn, timeout=60)
    try:
        async with postgres_faults.table_locked(rig.database, "trades"):
            while time.monotonic() < deadline:
                waiting += await connection.fetchval(
                    "SELECT count(*) FROM pg_locks WHERE NOT granted"
                    " AND relation = 'trades'::regclass"
                )
                await asyncio.sleep(0.1)
    finally:
        await connection.close()
    return int(waiting > 0)


async def _postgres_read_only(rig: Rig, step: Step) -> int:
    async with postgres_faults.read_only(rig.database):
        connection = await asyncpg.connect(rig.database.dsn, timeout=60)
        try:
            seen = await connection.fetchval("SHOW default_transaction_read_only")
        finally:
            await connection.close()
        await asyncio.sleep(step.seconds)
    return int(seen == "on")


async def _postgres_disk_full(rig: Rig, step: Step) -> int:
    """It can write neither rows nor its log; where that ends it, it is started again."""
    hits = 0
    with filled(rig.disks["postgres"]):
        try:
            connection = await asyncpg.connect(rig.database.dsn, timeout=10)
            try:
                await connection.execute("CREATE TABLE filler AS SELECT generate_series(1, 100000)")
            finally:
                connection.terminate()
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            hits = 1
        await asyncio.sleep(step.seconds)
    for _ in range(2):  # it may end while it recovers
        await asyncio.to_thread(rig.postgres.start)
        await asyncio.sleep(0.5)
    return hits


# Between a process and a server ---------------------------------------------------------------

Which = Callable[[Rig], Proxy]


def _redis_of(rig: Rig) -> Proxy:
    return rig.redis_proxy


def _postgres_of(rig: Rig) -> Proxy:
    return rig.postgres_proxy


def _network(which: Which, kind: Literal["latency", "rate", "blackhole"]) -> Fault:
    async def worsen(rig: Rig, step: Step) -> int:
        proxy = which(rig)
        before = proxy.counts.delayed_chunks + proxy.counts.swallowed_bytes
        for conditions in (proxy.to_client, proxy.to_server):
            if kind == "latency":
                conditions.latency, conditions.jitter = 0.05 + step.draw / 5, 0.05
            elif kind == "rate":
                conditions.bytes_per_second = 20_000 + 200_000 * step.draw
            else:
                proxy.blackhole()
        await asyncio.sleep(step.seconds)
        proxy.heal()
        return proxy.counts.delayed_chunks + proxy.counts.swallowed_bytes > before

    return worsen


def _disconnect(which: Which, how: Literal["cut", "reset_all", "half_open"]) -> Fault:
    async def disconnect(rig: Rig, step: Step) -> int:
        proxy = which(rig)
        hit: int = getattr(proxy, how)()
        await asyncio.sleep(step.seconds)
        proxy.heal()
        return hit

    return disconnect


def _refused(which: Which) -> Fault:
    async def refuse(rig: Rig, step: Step) -> int:
        async with which(rig).refusing() as ended:
            await asyncio.sleep(step.seconds)
        return ended

    return refuse


def _lost_reply(which: Which, to: bytes, then: Literal["hang", "reset"]) -> Fault:
    async def lose(rig: Rig, step: Step) -> int:
        proxy = which(rig)
        before = proxy.counts.lost_replies
        proxy.lose_reply(1 + int(step.draw * 20), to=to, then=then)
        await asyncio.sleep(1 + step.seconds)
        proxy.heal()
        return proxy.counts.lost_replies - before

    return lose


# Exchange -------------------------------------------------------------------------------------


def _order(kind: str, on: str = "*", **options: float) -> Fault:
    """A fault that the exchange injects itself, and counts."""

    async def inject(rig: Rig, step: Step) -> int:
        before = await rig.injected(kind)
        await rig.control("faults", {"kind": kind, "on": on, "options": options})
        await asyncio.sleep(step.seconds)
        return await rig.injected(kind) - before

    return inject


async def _hide(rig: Rig, step: Step) -> int:
    """What the socket withheld is gone from REST too."""
    symbol = ("BTCUSDT", "ETHUSDT")[int(step.draw * 2)]
    await rig.control("faults", {"kind": "drop", "count": 2, "on": f"{symbol.lower()}@trade"})
    await asyncio.sleep(step.seconds)
    withheld = (await rig.control(f"truth?symbol={symbol}"))["withheld"]
    if not withheld:
        return 0
    first, last = withheld[-1]
    await rig.control("hide", {"symbol": symbol, "from_id": first, "to_id": last})
    return 1


async def _skew(rig: Rig, step: Step) -> int:
    """The exchange's clock jumps, by an hour at most, and back again."""
    before = await rig.injected("skew")
    skew = int((step.draw - 0.5) * 7_200_000)
    for milliseconds in (skew, 0):
        await rig.control("skew", {"milliseconds": milliseconds})
        await asyncio.sleep(step.seconds)
    return await rig.injected("skew") - before


FAULTS: Final[dict[str, dict[str, Fault]]] = {
    "process": {
        "kill": _kill,
        "terminate": _terminate,
        "terminate-and-kill": _terminate_and_kill,
        "freeze": _freeze_process,
        "deploy": _deploy,
        **{f"failpoint {module}": _failpoint(module) for module in SERVICES_OF},
    },
    "redis": {
        "redis kill": _redis_kill,
        "redis freeze": _redis_freeze,
        "redis pause": _redis_pause,
        "redis full": _redis_full,
        "redis read-only": _redis_read_only,
        "redis empty": _redis_empty,
        "redis older": _redis_older,
        "redis tail-cut": _redis_tail_cut,
        "redis disk-full": _redis_disk_full,
        "redis and spool full": _redis_and_spool_full,
        "redis drop-clients": _redis_drop_clients,
        "redis latency": _network(_redis_of, "latency"),
        "redis rate": _network(_redis_of, "rate"),
        "redis blackhole": _network(_redis_of, "blackhole"),
        "redis cut": _disconnect(_redis_of, "cut"),
        "redis reset": _disconnect(_redis_of, "reset_all"),
        "redis refused": _refused(_redis_of),
        "redis half-open": _disconnect(_redis_of, "half_open"),
        "redis reply-lost": _lost_reply(_redis_of, b"", "hang"),
        "redis reply-reset": _lost_reply(_redis_of, b"", "reset"),
    },
    "postgres": {
        "postgres terminate": _postgres_terminate,
        "postgres restart": _postgres_restart,
        "postgres kill": _postgres_kill,
        "postgres freeze": _postgres_freeze,
        "postgres lock": _postgres_lock,
        "postgres read-only": _postgres_read_only,
        "postgres disk-full": _postgres_disk_full,
        "postgres latency": _network(_postgres_of, "latency"),
        "postgres rate": _network(_postgres_of, "rate"),
        "postgres blackhole": _network(_postgres_of, "blackhole"),
        "postgres cut": _disconnect(_postgres_of, "cut"),
        "postgres reset": _disconnect(_postgres_of, "reset_all"),
        "postgres refused": _refused(_postgres_of),
        "postgres half-open": _disconnect(_postgres_of, "half_open"),
        "postgres commit-lost": _lost_reply(_postgres_of, b"COMMIT", "hang"),
        "postgres commit-reset": _lost_reply(_postgres_of, b"COMMIT", "reset"),
    },
    "exchange": {
        "exchange cut-mid-frame": _order("cut_mid_frame"),
        "exchange close": _order("close", code=1011),
        "exchange shutdown": _order("shutdown", grace=0.5),
        "exchange slow": _order("slow", bytes_per_second=2000),
        "exchange refused": _order("refuse_handshake"),
        "exchange ack-missing": _order("ack_missing"),
        "exchange 429": _order("rest_429", seconds=1),
        "exchange 418": _order("rest_418", seconds=2),
        "exchange 451": _order("rest_451"),
        "exchange rest-stall": _order("rest_stall", seconds=3),
        "exchange rest-cut": _order("rest_cut"),
        "exchange stale": _order("stale_snapshot", on="depth/*"),
        "exchange hide": _hide,
        "exchange skew": _skew,
        "exchange stall": _order("stall"),
        "exchange half-open": _order("half_open"),
        "exchange acked-but-silent": _order("acked_but_silent"),
    },
}
"""All faults, by the lane in which they come one after another."""

SLOW_TO_HEAL: Final = frozenset(
    {"exchange stall", "exchange half-open", "exchange acked-but-silent"}
)
"""A socket without data is asked after half a minute at the earliest: not for a short run."""

DISKS: Final = {
    "redis disk-full": "redis",
    "redis and spool full": "spool",
    "postgres disk-full": "postgres",
}
"""Faults that need a small file system, and whose."""
