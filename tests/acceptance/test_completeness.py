"""No trade is ever missing silently, whatever happens to the collector, its sockets and Redis."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from sluice.cli.servers import RedisServer, free_port
from sluice.clock import now_micros
from sluice.queue import RecordQueue
from tests.acceptance.completeness import account, complete, fresh
from tests.acceptance.processes import CEILING, Processes, processes
from tests.acceptance.test_collector import page
from tests.faults import redis_faults
from tests.servers import Database

INGEST_PAUSE = """
SELECT max(pause) FROM (
    SELECT received_at - lag(received_at) OVER (ORDER BY received_at) AS pause
    FROM trades WHERE received_at > to_timestamp($1::float8)
) AS pauses
"""
SYMBOLS = ["BTCUSDT", "ETHUSDT"]
MARKETS = ",".join(f"binance:{symbol}" for symbol in SYMBOLS)
SEEDS = range(1, 1 + int(os.environ.get("SEEDS", "2")))
SECONDS = float(os.environ.get("SECONDS", "5"))
KILLS = int(os.environ.get("SLUICE_COLLECTOR_KILLS", "0"))
"""How often a collector is killed, all steps together; once at each step if it is not said."""
STEPS = {
    # which time the step is come by, of the two markets' pages the first or the second
    "publisher.taken": (20, 20),
    "publisher.pushed": (20, 20),
    "backfill.page_read": (1, 2),
    "backfill.page_pushed": (1, 2),
    "ledger.gap_pushed": (1, 2),
}
HITS = max(1, -(-KILLS // len(STEPS)))
RATES = {
    "drop": 0.01,
    "duplicate": 0.01,
    "reorder": 0.01,
    "truncate": 0.003,
    "bad_utf8": 0.003,
    "wrong_type": 0.003,
    "nan": 0.003,
    "cut": 0.05,
    "close": 0.05,
    "rest_500": 0.1,
    "rest_html": 0.05,
    "rest_truncated": 0.05,
    "empty_page": 0.05,
    "endless_page": 0.05,
}


@pytest.fixture
def pipeline(
    tmp_path: Path, postgres: Database, redis_environment: dict[str, str]
) -> Iterator[Processes]:
    environment = {**redis_environment, **postgres.environment, "SYMBOLS": MARKETS}
    with processes(tmp_path, environment) as running:
        yield running


async def begin(running: Processes, dsn: str, rate: int = 200) -> dict[str, int]:
    """Start everything; gives the first id stored of each market."""
    running.simulate("--rate", str(rate), "--symbols", ",".join(SYMBOLS))
    running.start("flusher")
    running.start("collector")
    await fresh(dsn, 0)
    return {symbol: await first_stored(running, dsn, symbol) for symbol in SYMBOLS}


async def first_stored(running: Processes, dsn: str, symbol: str) -> int:
    deadline = time.monotonic() + CEILING
    while True:
        try:
            return min((await account(dsn, running, symbol)).stored)
        except IndexError:
            assert time.monotonic() < deadline, f"no trade of {symbol}"
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("seed", SEEDS)
async def test_everything_published_is_stored_or_explained_under_faults(
    seed: int, pipeline: Processes, postgres: Database
) -> None:
    firsts = await begin(pipeline, postgres.dsn)
    pipeline.control("rates", {"rates": RATES, "seed": seed})
    await asyncio.sleep(SECONDS)
    took = await complete(postgres.dsn, pipeline, SYMBOLS, firsts)
    counts = pipeline.control("faults")["counts"]
    print(f"seed {seed}: {sum(counts.values())} faults, complete after {took:.1f} s")
    assert sum(counts.values()) > 0, "inconclusive: no fault was injected"


async def test_ids_that_the_exchange_does_not_have_are_absent_and_nothing_else_is(
    pipeline: Processes, postgres: Database
) -> None:
    pipeline.environment["GAP_SETTLE_MS"] = "3000"
    firsts = await begin(pipeline, postgres.dsn)
    pipeline.control("faults", {"kind": "drop", "count": 5, "on": "btcusdt@trade"})
    deadline = time.monotonic() + CEILING
    while not (withheld := pipeline.control("truth?symbol=BTCUSDT")["withheld"]):
        assert time.monotonic() < deadline, "inconclusive: nothing was dropped"
        await asyncio.sleep(0.05)
    low, high = withheld[0][0], withheld[-1][1]
    pipeline.control("hide", {"symbol": "BTCUSDT", "from_id": low, "to_id": high})
    await complete(postgres.dsn, pipeline, SYMBOLS, firsts)
    entry = await account(postgres.dsn, pipeline, "BTCUSDT", first=firsts["BTCUSDT"])
    assert entry.explained
    assert entry.explained <= set(range(low, high + 1))


@pytest.mark.timeout(180 + 90 * HITS)
@pytest.mark.parametrize("step", STEPS)
async def test_a_collector_killed_at_any_step_loses_and_repeats_nothing(
    step: str, pipeline: Processes, postgres: Database
) -> None:
    pipeline.simulate("--rate", "200", "--symbols", ",".join(SYMBOLS))
    pipeline.start("flusher")
    pipeline.start("collector")
    await fresh(postgres.dsn, 0)
    firsts = {symbol: await first_stored(pipeline, postgres.dsn, symbol) for symbol in SYMBOLS}
    for hit in range(HITS):
        point = f"{step}:{STEPS[step][hit % 2]}"
        # A hole for the steps that need one: the collector is away for a moment.
        pipeline.kill("collector")
        await asyncio.sleep(0.5)
        armed = {"SLUICE_TESTING": "1", "SLUICE_FAILPOINT": point}
        process = pipeline.start("collector", name="", arguments=None, **armed)
        code = await asyncio.to_thread(process.wait, CEILING)
        assert code == -signal.SIGKILL, f"not killed at {point}"
        del pipeline.running["collector"]
        restarted = now_micros()
        pipeline.start("collector")
        print(f"{point}: fresh {await fresh(postgres.dsn, restarted):.1f} s after the restart")
    await complete(postgres.dsn, pipeline, SYMBOLS, firsts)


async def until(is_true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + CEILING
    while not is_true():
        assert time.monotonic() < deadline, f"not within {CEILING:.0f} s: {what}"
        await asyncio.sleep(0.05)


@asynccontextmanager
async def hurt(fault: str, server: RedisServer, directory: Path) -> AsyncIterator[None]:
    """Do something to a Redis, and mend it at the end."""
    client = Redis.from_url(
        f"redis://127.0.0.1:{server.port}", retry=Retry(NoBackoff(), 0), socket_timeout=5
    )
    try:
        if fault == "killed":
            server.kill()
            yield
            server.start()
        elif fault == "frozen":
            with redis_faults.frozen(server):
                yield
        elif fault == "full":
            async with redis_faults.memory_full(client):
                yield
        elif fault == "read-only":
            async with redis_faults.read_only(client):
                yield
        elif fault == "emptied":
            redis_faults.restart_empty(server)
            yield
        else:
            copy = redis_faults.copy_data(server, directory / "copy")
            await asyncio.sleep(2)
            redis_faults.restart_from(server, copy)
            yield
    finally:
        await client.aclose()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", ["killed", "frozen", "full", "read-only", "emptied", "older"])
async def test_nothing_is_lost_whatever_happens_to_redis(
    fault: str, tmp_path: Path, private_redis: RedisServer, postgres: Database
) -> None:
    environment = {**private_redis.environment, **postgres.environment, "SYMBOLS": MARKETS}
    with ExitStack() as stack:
        running = stack.enter_context(processes(tmp_path, environment))
        firsts = await begin(running, postgres.dsn)
        await asyncio.sleep(1)
        async with hurt(fault, private_redis, tmp_path):
            await asyncio.sleep(4)
        back = now_micros()
        print(f"Redis {fault}: fresh {await fresh(postgres.dsn, back):.1f} s after it was back")
        await complete(postgres.dsn, running, SYMBOLS, firsts)


@pytest.mark.parametrize(("refusal", "seconds"), [("rest_429", 7), ("rest_418", 5)])
async def test_nothing_is_asked_while_the_exchange_refuses(
    refusal: str, seconds: int, pipeline: Processes, postgres: Database
) -> None:
    firsts = await begin(pipeline, postgres.dsn)
    order = {"kind": refusal, "count": 1, "on": "historicalTrades/*"}
    pipeline.control("faults", {**order, "options": {"seconds": seconds}})
    pipeline.control("faults", {"kind": "drop", "count": 3, "on": "btcusdt@trade"})

    wanted = int(refusal.removeprefix("rest_"))

    def since_refused() -> list[float]:
        """Give when the refusal came and when anything was asked after it."""
        asked = [(stamp, status) for stamp, _, status in pipeline.control("requests")]
        first = next((n for n, (_, status) in enumerate(asked) if status == wanted), len(asked))
        return [stamp for stamp, _ in asked[first:]]

    await until(lambda: len(since_refused()) > 1, "a request after the refusal")
    refused_at, next_at = since_refused()[:2]
    print(f"{refusal} for {seconds} s: asked again after {(next_at - refused_at) / 1000:.2f} s")
    assert next_at - refused_at >= seconds * 1000
    await complete(postgres.dsn, pipeline, SYMBOLS, firsts)


async def test_without_sockets_the_trades_are_polled_until_there_are_sockets_again(
    pipeline: Processes, postgres: Database
) -> None:
    firsts = await begin(pipeline, postgres.dsn, rate=100)
    pipeline.control("rates", {"rates": {"refuse_handshake": 1.0}})
    pipeline.control("faults", {"kind": "cut"})
    await until(lambda: "are polled over REST" in pipeline.log("collector"), "polling")
    assert pipeline.control("status")["connections"] == []
    began = now_micros()
    print(f"a polled trade after {await fresh(postgres.dsn, began):.1f} s")
    await asyncio.sleep(3)
    pipeline.control("rates", {"rates": {}})
    await until(lambda: "sockets are back" in pipeline.log("collector"), "sockets")
    await complete(postgres.dsn, pipeline, SYMBOLS, firsts)


async def test_a_deploy_under_load_leaves_no_gap_and_no_duplicate(
    pipeline: Processes, postgres: Database, redis: Redis
) -> None:
    firsts = await begin(pipeline, postgres.dsn, rate=2000)
    began, port = now_micros(), free_port()
    pipeline.start("collector", name="new", METRICS_PORT=str(port))
    await until(lambda: page(port, "readyz")[0] == 200, "the new one is ready")
    assert pipeline.terminate("collector") == 0
    await asyncio.sleep(1)
    await complete(postgres.dsn, pipeline, SYMBOLS, firsts)
    assert pipeline.terminate("new") == 0
    queue = RecordQueue(redis, "gap")
    assert (await queue.balance()).pushed == 0, "a gap row for a deploy"
    connection = await asyncpg.connect(postgres.dsn)
    try:
        pause = await connection.fetchval(INGEST_PAUSE, began / 1e6)
    finally:
        await connection.close()
    print(f"ingest pause of the deploy: {pause.total_seconds():.3f} s")
