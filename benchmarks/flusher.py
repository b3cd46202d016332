"""The flusher beside its floor and its peers: rows a second, and CPU a row on both sides.

    python -m benchmarks.flusher [--rows 200000] [--runs 3] [--python3.13 PATH]

All write the same made-up trades into the same empty hypertable with the same unique key, on a
private PostgreSQL with TimescaleDB that syncs every commit, in batches of 5,000:

floor         COPY bytes made before the clock starts, into a temporary table, INSERT from there
flusher       `python -m flusher`, from a full Redis list to a trimmed one
executemany   asyncpg's, of values made before the clock starts
cryptofeed    TradePostgres of cryptofeed 3, as it comes (500 a batch, prices as floats), and with
              5,000 a batch and exact prices; where there is a Python 3.13 to install it for

CPU is in microseconds a row: of the client's process, and of all of PostgreSQL's processes. Each
run does them all in turn; figures are the median (least to most) of the runs.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Literal, TypeVar

import asyncpg
import uvloop
from msgspec.structs import astuple
from redis.asyncio import Redis

from flusher.tables import TABLES
from sluice import records
from sluice.cli.debian import ensure_root, why_not
from sluice.cli.servers import PostgresServer, RedisServer
from sluice.queue import RecordQueue
from sluice.records import Trade

ROOT = Path(__file__).resolve().parents[1]
BATCH = 5000
SYMBOLS = 20
START_MS = int(time.time() * 1000)
TICKS = os.sysconf("SC_CLK_TCK")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CRYPTOFEED = ("cryptofeed==3.0.1", "asyncpg==0.32.0")
TABLE = TABLES["trade"]


@dataclass(frozen=True)
class Servers:
    """What every contender writes to."""

    redis: RedisServer
    postgres: PostgresServer
    dsn: str


@dataclass(frozen=True)
class Cost:
    """What one run took, in seconds, and of how many rows."""

    rows: int
    seconds: float
    client: float
    server: float


Item = TypeVar("Item")
Contender = Callable[[Servers, list[Trade]], Awaitable[Cost]]


def make_trades(count: int) -> list[Trade]:
    """Draw trades of twenty markets whose prices wander, as a busy hour has them."""
    draw = random.Random(1)
    prices = [draw.uniform(0.5, 60_000) for _ in range(SYMBOLS)]
    trades = []
    for number in range(count):
        market = min(int(draw.expovariate(0.3)), SYMBOLS - 1)
        prices[market] *= 1 + draw.gauss(0, 1e-4)
        ts_event = (START_MS + number // 4) * 1000
        price, quantity = f"{prices[market]:.2f}", f"{draw.lognormvariate(-3, 2) + 1e-5:.5f}"
        side: Literal["buy", "sell"] = "buy" if draw.random() < 0.5 else "sell"
        trade_id = number + 1
        symbol = f"M{market:02}USDT"
        trades.append(
            Trade(
                "simulator",
                symbol,
                trade_id,
                trade_id,
                price,
                quantity,
                side,
                ts_event,
                ts_event + 1234,
            )
        )
    return trades


def market_id(trade: Trade) -> int:
    """Number the made-up markets."""
    return int(trade.symbol[1:3]) + 1


def cpu_of(pid: int) -> float:
    """CPU seconds of a process and of all below it, those that have ended included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = sum(map(int, fields[11:15])) / TICKS
    children: list[str] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        children += (thread / "children").read_text().split()
    return own + sum(cpu_of(int(child)) for child in children)


def server_cpu(servers: Servers) -> float:
    """CPU seconds of PostgreSQL so far."""
    assert servers.postgres.pid is not None
    while True:
        try:
            return cpu_of(servers.postgres.pid)
        except (FileNotFoundError, ProcessLookupError):
            continue  # a backend ended meanwhile, and what it took is its parent's now


async def floor(servers: Servers, trades: list[Trade]) -> Cost:
    """Send lines that were made before."""
    batches = [
        memoryview(TABLE.lines(list(map(market_id, batch)), list(map(astuple, batch))) or b"")
        for batch in batches_of(trades)
    ]
    connection = await asyncpg.connect(servers.dsn)
    await connection.execute(TABLE.create_staging)
    server, client, began = server_cpu(servers), time.process_time(), time.perf_counter()
    for data in batches:
        async with connection.transaction():
            await connection.copy_to_table(
                TABLE.staging,
                source=data,  # type: ignore[arg-type]  # the stubs do not know it
                columns=TABLE.column_names,
                null=TABLE.null,
            )
            await connection.execute(TABLE.insert)
    seconds, client = time.perf_counter() - began, time.process_time() - client
    await connection.close()
    return Cost(len(trades), seconds, client, server_cpu(servers) - server)


async def executemany(servers: Servers, trades: list[Trade]) -> Cost:
    """Send values that were made before."""
    rows = [
        (
            market_id(trade),
            trade.trade_id,
            trade.first_id,
            Decimal(trade.price),
            Decimal(trade.quantity),
            trade.side,
            EPOCH + timedelta(microseconds=trade.ts_event),
            EPOCH + timedelta(microseconds=trade.ts_recv),
        )
        for trade in trades
    ]
    names = ", ".join(TABLE.column_names)
    marks = ", ".join(f"${number}" for number in range(1, len(TABLE.column_names) + 1))
    query = f"INSERT INTO trades ({names}) VALUES ({marks}) ON CONFLICT DO NOTHING"  # noqa: S608  # names of ours
    connection = await asyncpg.connect(servers.dsn)
    server, client, began = server_cpu(servers), time.process_time(), time.perf_counter()
    for batch in batches_of(rows):
        await connection.executemany(query, batch)
    seconds, client = time.perf_counter() - began, time.process_time() - client
    await connection.close()
    return Cost(len(trades), seconds, client, server_cpu(servers) - server)


async def flusher(servers: Servers, trades: list[Trade]) -> Cost:
    """Fill the list, then start the process and watch the list from its first trim to its last."""
    async with Redis.from_url(servers.redis.url) as redis:
        await redis.flushall()
        queue = RecordQueue(redis, "trade")
        for batch in batches_of([records.encode(trade) for trade in trades]):
            await queue.push(batch)
        environment = {
            **os.environ,
            **servers.redis.environment,
            **servers.postgres.environment,
            "POSTGRES_DB": "benchmark",
            "FLUSH_BATCH_SIZE": str(BATCH),
            "METRICS_PORT": "0",
            "LOG_LEVEL": "ERROR",
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flusher"), env=environment, cwd=ROOT
        )
        try:
            while (rows := await queue.length()) == len(trades):  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.01)
            began, client, server = time.perf_counter(), cpu_of(process.pid), server_cpu(servers)
            while await queue.length():  # noqa: ASYNC110  # as above
                await asyncio.sleep(0.01)
            seconds = time.perf_counter() - began
            client, server = cpu_of(process.pid) - client, server_cpu(servers) - server
        finally:
            process.terminate()
            await process.wait()
        return Cost(rows, seconds, client, server)


def cryptofeed(python: Path, **settings: object) -> Contender:
    """Make the contender that runs cryptofeed's writer with a Python that has it."""

    async def run(servers: Servers, trades: list[Trade]) -> Cost:
        task = {
            "database": {
                "host": "127.0.0.1",
                "port": servers.postgres.port,
                "user": "sluice",
                "db": "benchmark",
            },
            "trades": [
                [
                    *(str(market_id(trade)), trade.ts_event, trade.trade_id, trade.price),
                    *(trade.quantity, trade.side, trade.ts_recv),
                ]
                for trade in trades
            ],
            "settings": settings,
        }
        server = server_cpu(servers)
        done = await asyncio.to_thread(
            subprocess.run,
            [python, ROOT / "benchmarks/cryptofeed_writer.py"],
            input=json.dumps(task).encode(),
            stdout=subprocess.PIPE,
            check=True,
        )
        result = json.loads(done.stdout)
        assert result["written"] == len(trades)
        return Cost(len(trades), result["seconds"], result["cpu"], server_cpu(servers) - server)

    return run


def batches_of(items: list[Item]) -> Iterator[list[Item]]:
    """Cut a list into batches."""
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


@contextmanager
def servers() -> Iterator[Servers]:
    """Bring a Redis and a PostgreSQL with an empty database of the schema."""
    if problem := why_not():
        sys.exit(
            f"the benchmark brings servers of its own, which needs a private Debian: {problem}"
        )
    root = ensure_root(ROOT / ".services", print)
    with tempfile.TemporaryDirectory(prefix="sluice-benchmark-") as directory:
        redis = RedisServer(root, Path(directory) / "redis")
        postgres = PostgresServer(root, Path(directory) / "postgres")
        try:
            redis.start()
            postgres.start()
            postgres.create_database("benchmark")
            postgres.execute((ROOT / "schema.sql").read_text(), "benchmark")
            # cryptofeed's writer has no such column.
            postgres.execute("ALTER TABLE trades ALTER first_id SET DEFAULT 0", "benchmark")
            yield Servers(redis, postgres, postgres.dsn_of("benchmark"))
        finally:
            postgres.kill()
            redis.kill()


def install_cryptofeed(python: str, directory: Path) -> Path | None:
    """Install cryptofeed for a Python 3.13 and give that Python, or say why not."""
    commands = (
        [python, "-m", "venv", str(directory)],
        [str(directory / "bin/pip"), "install", "--quiet", *CRYPTOFEED],
    )
    for command in commands:
        try:
            subprocess.run(command, check=True, capture_output=True)  # noqa: S603  # named by whoever runs this
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"cryptofeed is left out: {error}")
            return None
    return directory / "bin/python"


async def measure(
    contenders: dict[str, Contender], servers: Servers, trades: list[Trade], runs: int
) -> dict[str, list[Cost]]:
    """Run all in turn, `runs` times, each into an empty table."""
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, contender in contenders.items():
            servers.postgres.execute("TRUNCATE trades, markets", "benchmark")
            servers.postgres.execute("CHECKPOINT")
            costs[name].append(await contender(servers, trades))
            stored = servers.postgres.execute("SELECT count(*) FROM trades", "benchmark")
            assert int(stored) == len(trades), f"{name} stored {stored}"
            print(f"  {name}: {costs[name][-1].rows / costs[name][-1].seconds:,.0f} rows/s")
    return costs


def spread(values: list[float], digits: int = 0) -> str:
    """Write the median, the least and the most."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} ({least:,.{digits}f} to {most:,.{digits}f})"


def report(costs: dict[str, list[Cost]]) -> None:
    """Print a line a contender."""
    rates = {name: [cost.rows / cost.seconds for cost in taken] for name, taken in costs.items()}
    print(f"{'':24}{'rows/s':>30}{'of the floor':>14}{'client µs/row':>24}{'server µs/row':>24}")
    for name, taken in costs.items():
        share = statistics.median(rates[name]) / statistics.median(rates["floor"])
        client = spread([cost.client / cost.rows * 1e6 for cost in taken], 2)
        server = spread([cost.server / cost.rows * 1e6 for cost in taken], 2)
        print(f"{name:24}{spread(rates[name]):>30}{share:>14.2f}{client:>24}{server:>24}")


def main() -> None:
    """Bring the servers, run the contenders, print what they took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--python3.13", dest="python", default="python3.13")
    arguments = parser.parse_args()
    contenders: dict[str, Contender] = {
        "floor": floor,
        "flusher": flusher,
        "executemany": executemany,
    }
    with servers() as brought, tempfile.TemporaryDirectory() as directory:
        python = install_cryptofeed(arguments.python, Path(directory) / "peers")
        if python is not None:
            contenders["cryptofeed"] = cryptofeed(python)
            contenders["cryptofeed, 5000 exact"] = cryptofeed(python, batch_max=BATCH, exact=True)
        trades = make_trades(arguments.rows)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            costs = runner.run(measure(contenders, brought, trades, arguments.runs))
    report(costs)


if __name__ == "__main__":
    main()
