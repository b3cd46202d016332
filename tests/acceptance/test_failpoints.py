"""Whole processes that die, fail and hang at every place where data waits; nothing is lost.

`make failpoints HITS=n` lets each place be hit n times in each of the three ways and prints a line
a hit. Without HITS each process is killed once at each place, and fails or hangs at a few.
"""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import asyncpg
import pytest
from redis.asyncio import Redis

from sluice.cli.servers import RedisServer
from sluice.settings import Market
from tests.acceptance.places import PLACES, READ, REPAIRED, Lane, Surroundings, happening
from tests.acceptance.processes import Processes, processes
from tests.faults.waiting import eventually
from tests.invariants import check_fresh, judge, wait_until_stored
from tests.servers import Database
from tests.truth import truth_of

Action = Literal["kill", "raise", "hang"]
ACTIONS: Final[tuple[Action, ...]] = ("kill", "raise", "hang")
HITS: Final = int(os.environ.get("HITS", "0"))
SAMPLED: Final = frozenset({"publisher.pushed", "flusher.committed"})
"""Where the short form fails and hangs too."""
CEILING: Final = 120.0
"""Seconds in which a process must come by its place, and in which any outcome must come."""
MARKETS: Final = (Market("binance", READ), Market("binance", REPAIRED))
COMMANDS: Final[dict[Lane, tuple[str, dict[str, str]]]] = {
    "reads": ("collector", {"SYMBOLS": f"binance:{READ}", "STREAMS": "trade,kline_1s"}),
    "repairs": ("collector", {"SYMBOLS": f"binance:{REPAIRED}"}),
    "books": ("orderbook", {"SYMBOLS": f"binance:{READ},binance:{REPAIRED}"}),
    "stores": ("flusher", {}),
}
HASTY: Final = "tests.acceptance.hasty"


def hits_of(lane: Lane) -> list[tuple[str, int, Action]]:
    """List what one lane's process does: at which place, at the how manieth time."""
    points = [point for point, place in PLACES.items() if place.lane == lane]
    if HITS:
        return [
            (point, 1 + hit % 3, action)
            for hit in range(HITS)
            for point in points
            for action in ACTIONS
        ]
    return [
        (point, 1, action)
        for point in points
        for action in ACTIONS
        # The steps of a batch kill two flushers side by side in their own test.
        if point in SAMPLED or (action == "kill" and not point.startswith("flusher."))
    ]


def start(running: Processes, lane: Lane, point: str = "") -> None:
    module, environment = COMMANDS[lane]
    armed = {"SLUICE_TESTING": "1", "SLUICE_FAILPOINT": point} if point else {}
    arguments = [module] if module == "collector" else []
    running.start(HASTY if arguments else module, lane, arguments, **environment, **armed)


async def hit(around: Surroundings, lane: Lane, point: str, number: int, action: Action) -> str:
    """Let a lane's process come by a place; tells how it ended."""
    running = around.running
    path = running.directory / f"{lane}.log"
    begin = path.stat().st_size if path.exists() else 0
    start(running, lane, f"{point}:{number}:{action}")
    process = running.running[lane]

    def has_come_by() -> bool:
        return f"failpoint {point}: {action}" in running.log(lane)[begin:]

    async with happening(PLACES[point].needs, around):
        await eventually(lambda: has_come_by() or process.poll() is not None, within=CEILING)
    assert has_come_by(), f"{lane} ended with {process.returncode} before it came by {point}"
    if action == "kill":
        assert await asyncio.to_thread(process.wait, CEILING) == -signal.SIGKILL
        return "killed"
    if action == "raise" and lane != "stores":
        # A bug, as far as the process can tell: it saves what it holds, and is started again.
        assert await asyncio.to_thread(process.wait, CEILING) == 1
        return "ended by itself with 1"
    # A flusher goes on after a bug; one that hangs ends when systemd, or its watchdog, tells it to.
    process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(process.wait, CEILING)
    assert code in ({0, 1} if action == "hang" else {0}), f"{lane} at {point}: {code}"
    return f"ended by SIGTERM with {code}"


async def die(around: Surroundings, lane: Lane, done: Counter[str]) -> None:
    """Let a lane's process come by all its places, then run without one."""
    for point, number, action in hits_of(lane):
        began = time.monotonic()
        how = await hit(around, lane, point, number, action)
        done[point] += 1
        print(f"{point}:{number}:{action} {how} ({time.monotonic() - began:.1f} s)", flush=True)
    start(around.running, lane)


@pytest.mark.timeout(900 + HITS * 3600)  # every wait within has a ceiling of its own
async def test_whatever_dies_fails_or_hangs_at_any_place_nothing_is_lost(
    tmp_path: Path, private_redis: RedisServer, postgres: Database
) -> None:
    environment = {
        **private_redis.environment,
        **postgres.environment,
        "SNAPSHOT_INTERVAL_MS": "200",
        "GAP_SETTLE_MS": "200",
        "DRAIN_SECONDS": "2",
    }
    lanes: Sequence[Lane] = list(COMMANDS)
    done: Counter[str] = Counter()
    with processes(tmp_path, environment) as running:
        symbols = f"{READ},{REPAIRED}"
        url = await asyncio.to_thread(
            running.simulate, "--rate", "60", "--symbols", symbols, "--max-connects", "100000"
        )
        for lane in lanes:
            start(running, lane)
        async with (
            truth_of(url) as truth,
            Redis.from_url(private_redis.url, socket_timeout=None) as redis,
        ):
            connection = await asyncpg.connect(postgres.dsn, timeout=60)
            try:
                firsts = {market: await first_stored(connection, market) for market in MARKETS}
                for lane in lanes:
                    assert await asyncio.to_thread(running.terminate, lane) == 0
                around = Surroundings(running, redis, postgres.dsn)
                async with asyncio.TaskGroup() as tasks:
                    for lane in lanes:
                        tasks.create_task(die(around, lane, done))
                await around.control("quiet", {})
                violations = []
                for market in MARKETS:
                    violations += await check_fresh(truth, connection, market, within=CEILING)
                await around.control("source", {"action": "stop"})
                for market in MARKETS:
                    violations += await wait_until_stored(truth, connection, market, within=CEILING)
                verdict = await judge(
                    truth,
                    connection,
                    redis,
                    MARKETS,
                    hits={point: done[point] for lane in lanes for point, *_ in hits_of(lane)},
                    dead={"trade": around.poison},
                    start_ids=firsts,
                    within=CEILING,
                )
            finally:
                await connection.close()
        verdict.violations += violations
        verdict.require()
        for lane in lanes:
            assert await asyncio.to_thread(running.terminate, lane) == 0
    assert not [*(tmp_path / "spool").glob("*.broken")]


async def first_stored(connection: asyncpg.Connection, market: Market) -> int:
    """Wait for a market's first trade and book, and give the id it begins with."""
    names = (market.exchange, market.symbol)

    async def are_stored() -> bool:
        return bool(
            await connection.fetchval(
                "SELECT EXISTS (SELECT FROM trades WHERE market_id = market($1, $2)) AND EXISTS"
                " (SELECT FROM orderbook_snapshots WHERE market_id = market($1, $2))",
                *names,
            )
        )

    await eventually(are_stored, within=CEILING)
    first: int = await connection.fetchval(
        "SELECT min(trade_id) FROM trades WHERE market_id = market($1, $2)", *names
    )
    return first
