"""One seed: start everything, break it by plan, let it rest, and judge it."""

import asyncio
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Final, Literal

import aiohttp
import asyncpg
from redis.asyncio import Redis

from sluice.cli.servers import PostgresServer, RedisServer
from sluice.settings import Market
from tests.acceptance.processes import processes
from tests.chaos.faults import DISKS, FAULTS, SLOW_TO_HEAL, Rig
from tests.chaos.plan import Plan, Step, plan
from tests.chaos.services import Services
from tests.faults.framing import PostgresDialogue, RedisDialogue
from tests.faults.proxy import Proxy
from tests.faults.waiting import eventually
from tests.invariants import Verdict, Violation, check_fresh, judge, wait_until_stored
from tests.servers import Database
from tests.truth import Truth, truth_of

MARKETS: Final = tuple(Market("binance", symbol) for symbol in ("BTCUSDT", "ETHUSDT"))
RATE: Final = 100
CEILING: Final = 180.0
"""Seconds that any outcome may take; what is asserted is the outcome."""
LONG_SECONDS: Final = 20.0
"""From so many seconds on a run has faults that are slow to heal, and deadlines that are met."""
SHOWN: Final = 20
"""The most violations of a seed that are printed."""


@dataclass
class Servers:
    """What one seed breaks: both servers, and a database that is empty but for its schema.

    `disks` are small file systems, by whose they are; without one its faults are left out.
    """

    redis: RedisServer
    postgres: PostgresServer
    database: Database
    disks: Mapping[str, Path] = field(default_factory=dict)


@dataclass
class Result:
    """What one seed came to."""

    seed: int
    begun: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    trades: int = 0
    books: int = 0
    recovery_seconds: float = 0.0
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def outcome(self) -> Literal["held", "VIOLATED", "inconclusive"]:
        """The verdict in one word."""
        words: dict[str, Literal["held", "VIOLATED", "inconclusive"]]
        words = {"green": "held", "red": "VIOLATED", "inconclusive": "inconclusive"}
        return words[self.verdict.outcome]

    def count(self, invariant: str) -> int:
        """Sum up what violates one invariant."""
        return sum(each.ids for each in self.verdict.violations if each.invariant == invariant)

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {times}" for name, times in sorted(self.hits.items()))
        line = (
            f"seed {self.seed}: {self.begun} faults begun, {len(self.hits)} kinds hit,"
            f" {self.trades} trades, {self.count('complete')} lost,"
            f" {self.count('distinct')} duplicated, {self.books} books,"
            f" {self.count('books')} wrong, recovered in {self.recovery_seconds:.1f} s:"
            f" {self.outcome} ({kinds})"
        )
        lines = [
            line,
            *(f"  {violation}" for violation in self.verdict.violations[:SHOWN]),
            *([f"  and {more} more"] if (more := len(self.verdict.violations) - SHOWN) > 0 else []),
            *(f"  doubt: {doubt}" for doubt in self.verdict.doubts),
        ]
        return "\n".join(lines)


async def run_seed(servers: Servers, seed: int, seconds: float, directory: Path) -> Result:
    """Run one seed on servers that hold nothing; logs stay in `directory`."""
    names = {
        lane: [
            name
            for name in faults
            if (seconds >= LONG_SECONDS or name not in SLOW_TO_HEAL)
            and (name not in DISKS or DISKS[name] in servers.disks)
        ]
        for lane, faults in FAULTS.items()
    }
    drawn = plan(seed, seconds, names)
    result = Result(seed)
    drain_seconds = 3.0 if seconds >= LONG_SECONDS else 60.0
    async with _started(servers, drawn, directory, result, drain_seconds) as (rig, truth):
        connection = await asyncpg.connect(servers.database.dsn, timeout=60)
        starts = {market: await _first_stored(connection, market) for market in MARKETS}
        await connection.close()
        rig.services.look()
        watch = asyncio.create_task(rig.services.watch())
        await rig.control("rates", {"rates": drawn.rates, "seed": seed})
        deadline = time.monotonic() + seconds
        async with asyncio.TaskGroup() as lanes:
            for lane, steps in drawn.lanes.items():
                lanes.create_task(_run_lane(rig, lane, steps, deadline, result))
        await _rest(rig, watch)
        injected = (await rig.control("faults"))["counts"]
        result.hits.update({f"exchange {kind}": injected.get(kind, 0) for kind in drawn.rates})
        result.hits = +result.hits  # without the zeros
        await _judge(rig, truth, starts, result)
        await rig.services.end_all()
        result.verdict.violations += rig.services.violations
        result.verdict.violations += _check_spool(_spool_of(servers, directory))
    return result


@asynccontextmanager
async def _started(
    servers: Servers, drawn: Plan, directory: Path, result: Result, drain_seconds: float
) -> AsyncIterator[tuple[Rig, Truth]]:
    """Start the exchange and the services, with a proxy before each server."""
    redis, postgres = servers.redis, servers.postgres
    async with (
        Proxy("127.0.0.1", redis.port, dialogue=RedisDialogue, seed=drawn.seed) as redis_proxy,
        Proxy(
            "127.0.0.1", postgres.port, dialogue=PostgresDialogue, seed=drawn.seed
        ) as postgres_proxy,
    ):
        environment = {
            **redis.environment,
            **servers.database.environment,
            "REDIS_PORT": str(redis_proxy.port),
            "POSTGRES_PORT": str(postgres_proxy.port),
            "SYMBOLS": ",".join(map(str, MARKETS)),
            "SPOOL_DIR": str(_spool_of(servers, directory)),
            "STREAMS": "trade,kline_1s,ticker",
            "SNAPSHOT_INTERVAL_MS": "200",
            "DRAIN_SECONDS": str(drain_seconds),
        }
        with processes(directory, environment) as running:
            symbols = ",".join(market.symbol for market in MARKETS)
            arguments = ("--symbols", symbols, "--seed", str(drawn.seed), "--rate", str(RATE))
            url = await asyncio.to_thread(running.simulate, *arguments, "--max-connects", "100000")
            services = Services(running, dict(drawn.copies), result.hits)
            async with truth_of(url) as truth:
                yield (
                    Rig(
                        running,
                        services,
                        redis,
                        redis_proxy,
                        postgres,
                        postgres_proxy,
                        servers.database,
                        result.hits,
                        servers.disks,
                    ),
                    truth,
                )


async def _first_stored(connection: asyncpg.Connection, market: Market) -> int:
    """Wait for a market's first trade and book, and give the id from which on it is complete."""
    names = (market.exchange, market.symbol)

    async def is_stored() -> bool:
        return bool(
            await connection.fetchval(
                "SELECT EXISTS (SELECT FROM trades WHERE market_id = market($1, $2)) AND EXISTS"
                " (SELECT FROM orderbook_snapshots WHERE market_id = market($1, $2))",
                *names,
            )
        )

    await eventually(is_stored, within=CEILING)
    first: int = await connection.fetchval(
        "SELECT min(trade_id) FROM trades WHERE market_id = market($1, $2)", *names
    )
    return first


async def _run_lane(
    rig: Rig, lane: str, steps: Sequence[Step], deadline: float, result: Result
) -> None:
    for step in steps:
        await asyncio.sleep(step.pause)
        if time.monotonic() > deadline:
            return
        result.begun += 1
        rig.hits[step.fault] += int(await FAULTS[lane][step.fault](rig, step))


async def _rest(rig: Rig, watch: "asyncio.Task[None]") -> None:
    """End all faults."""
    rig.redis_proxy.heal()
    rig.postgres_proxy.heal()
    await rig.control("quiet", {})
    await rig.services.settle()
    watch.cancel()
    with suppress(asyncio.CancelledError):
        await watch


async def _judge(rig: Rig, truth: Truth, starts: dict[Market, int], result: Result) -> None:
    """See it recover, stop the market, and judge what is stored."""
    began = time.monotonic()
    connection = await asyncpg.connect(rig.database.dsn, timeout=60)
    client = Redis.from_url(rig.redis.url, socket_timeout=None)
    try:
        violations: list[Violation] = []
        for market in MARKETS:
            violations += await check_fresh(truth, connection, market, within=CEILING)
        result.recovery_seconds = time.monotonic() - began
        await rig.control("source", {"action": "stop"})
        for market in MARKETS:
            violations += await wait_until_stored(truth, connection, market, within=CEILING)
        result.verdict = await judge(
            truth,
            connection,
            client,
            MARKETS,
            hits={"any": result.hits.total()},
            are_counters_whole=rig.are_counters_whole,
            start_ids=starts,
            within=CEILING,
        )
        if not result.hits["exchange skew"]:
            for market in MARKETS:
                violations += await _check_bars(rig, connection, market)
        result.verdict.violations += violations + rig.services.check()
        result.trades = await connection.fetchval("SELECT count(*) FROM trades")
        result.books = await connection.fetchval("SELECT count(*) FROM orderbook_snapshots")
    finally:
        await connection.close()
        await client.aclose()


def _spool_of(servers: Servers, directory: Path) -> Path:
    return servers.disks.get("spool", directory) / f"spool-{directory.name}"


async def _check_bars(rig: Rig, connection: asyncpg.Connection, market: Market) -> list[Violation]:
    """Every stored bar of a second is as REST serves it, where it still does."""
    url = f"{rig.processes.simulator_url}/api/v3/klines?interval=1s&limit=1000"
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{url}&symbol={market.symbol}") as answer,
    ):
        served = {row[0]: row for row in await answer.json()}
    stored = await connection.fetch(
        "SELECT (extract(epoch FROM time) * 1000)::bigint AS time, open, high, low, close, volume,"
        " trade_count FROM klines WHERE market_id = market($1, $2) AND interval = '1s'",
        market.exchange,
        market.symbol,
    )
    return [
        Violation("bars", str(market), f"at {row['time']}: {list(row)[1:]} instead of {theirs}")
        for row in stored
        if (bar := served.get(row["time"])) is not None
        and list(row)[1:] != (theirs := [*map(Decimal, bar[1:6]), bar[8]])
    ]


def _check_spool(directory: Path) -> list[Violation]:
    """Look for records that wait on the disk after all processes have ended in good order."""
    found = [
        Violation("spool", path.name, "set aside as unreadable")
        for path in directory.glob("*.broken")
    ]
    for path in directory.glob("*.spool"):
        with closing(sqlite3.connect(path)) as database:
            (batches,) = database.execute("SELECT count(*) FROM batches").fetchone()
        if batches:
            found.append(Violation("spool", path.name, f"{batches} batches were left"))
    return found
