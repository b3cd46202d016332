"""Hundreds of deep books in one process: memory, CPU, and the time from frame to published hash.

    python -m benchmarks.many_books [--symbols 500] [--levels 5000] [--rate 10] [--seconds 30]

An exchange of made-up books feeds `python -m orderbook` over one socket: every symbol changes
`--rate` times a second, `--touched` levels a change, most of them near the top. Redis is a private
one. Printed are, once every book is live: resident memory; CPU of the orderbook process and of
Redis, in per cent of one core; and percentiles of the time from sending a frame until a reader of
`crypto:live:orderbook:*` has a book with its update, which is when the hash has it too.

The exchange and that reader are this process: where it does not keep up it says so. The venue's
budget would make 500 images of 5,000 levels take 21 minutes; here it is refilled all the time.
"""

import argparse
import asyncio
import operator
import os
import random
import subprocess
import sys
import tempfile
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import msgspec
import uvloop
from aiohttp import web
from redis.asyncio import Redis

from sluice.cli.debian import ensure_root, why_not
from sluice.cli.servers import RedisServer
from sluice.queue import book_key, budget_key, live_book_channel

ROOT: Final = Path(__file__).resolve().parents[1]
TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
STEP_SECONDS: Final = 0.01
"""Changes are sent in steps, so many symbols in each that every one has its turn in time."""


class Market:
    """A made-up book: level i of a side stands i + 1 ticks from a middle that never moves."""

    def __init__(self, symbol: str, levels: int, rng: random.Random) -> None:
        self.symbol = symbol
        self.update_id = rng.randrange(1, 10**9)
        self.pending: deque[tuple[int, float]] = deque()
        """Update ids sent and not yet seen by the reader, and when they were sent."""
        self._rng = rng
        self._middle = rng.randrange(levels + 1, 100 * levels)
        self._sides = tuple(
            array("Q", (rng.randrange(1, 10**12) for _ in range(levels))) for _ in range(2)
        )

    def image(self, limit: int) -> bytes:
        """Write the answer to a request for depth."""
        bids, asks = (
            [(self._price(number, at), _size(size)) for at, size in enumerate(side[:limit]) if size]
            for number, side in enumerate(self._sides)
        )
        return msgspec.json.encode({"lastUpdateId": self.update_id, "bids": bids, "asks": asks})

    def change(self, touched: int) -> str:
        """Change levels and write the frame that tells of it."""
        rng, levels = self._rng, len(self._sides[0])
        texts: tuple[list[str], list[str]] = ([], [])
        for _ in range(touched):
            number = rng.getrandbits(1)
            at = min(int(rng.expovariate(1 / 40)), levels - 1)
            size = 0 if rng.random() < 0.3 else rng.randrange(1, 10**12)
            self._sides[number][at] = size
            texts[number].append(f'["{self._price(number, at)}","{_size(size)}"]')
        first = self.update_id + 1
        self.update_id += rng.randrange(1, 2 * touched)
        return (
            f'{{"stream":"{self.symbol.lower()}@depth@100ms","data":{{"e":"depthUpdate",'
            f'"E":{time.time_ns() // 1_000_000},"s":"{self.symbol}","U":{first},'
            f'"u":{self.update_id},"b":[{",".join(texts[0])}],"a":[{",".join(texts[1])}]}}}}'
        )

    def _price(self, number: int, at: int) -> str:
        ticks = self._middle + (at + 1 if number else -at - 1)
        return f"{ticks // 100}.{ticks % 100:02}000000"


def _size(size: int) -> str:
    return f"{size // 10**8}.{size % 10**8:08}"


class Exchange:
    """Serves the sockets and images of many markets."""

    def __init__(self, markets: list[Market], rate: float, touched: int) -> None:
        self.markets = {market.symbol: market for market in markets}
        self.sent = 0
        self.late = 0.0
        """How far behind its times the feed was at most, seconds."""
        self._rate = rate
        self._touched = touched

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[int]:
        """Serve on a free port, which is given."""
        app = web.Application()
        app.add_routes(
            [web.get("/stream", self._stream), web.get("/api/v3/depth", self._depth)],
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()

    async def _depth(self, request: web.Request) -> web.Response:
        market = self.markets[request.query["symbol"]]
        body = market.image(int(request.query["limit"]))
        return web.Response(body=body, content_type="application/json")

    async def _stream(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(compress=False, autoping=True)
        await socket.prepare(request)
        feeding = asyncio.create_task(self._feed(socket))
        try:
            # One socket carries all; what it subscribes to need not be looked at.
            async for message in socket:
                asked = msgspec.json.decode(message.data)
                await socket.send_str(f'{{"result":null,"id":{asked["id"]}}}')
        finally:
            feeding.cancel()
        return socket

    async def _feed(self, socket: web.WebSocketResponse) -> None:
        markets = list(self.markets.values())
        random.shuffle(markets)
        begin, sent = time.perf_counter(), 0
        while True:
            elapsed = time.perf_counter() - begin
            due = int(elapsed * self._rate * len(markets))
            self.late = max(self.late, (due - sent) / (self._rate * len(markets)))
            for number in range(sent, due):
                market = markets[number % len(markets)]
                frame = market.change(self._touched)
                market.pending.append((market.update_id, time.perf_counter()))
                await socket.send_str(frame)
            self.sent += due - sent
            sent = due
            await asyncio.sleep(STEP_SECONDS)


class Reader:
    """Follows the published books and times every update."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.seconds: list[float] = []

    async def run(self, redis: Redis) -> None:
        """Read until cancelled."""
        prefix = live_book_channel("simulator", "")
        async with redis.pubsub(ignore_subscribe_messages=True) as subscription:
            await subscription.psubscribe(prefix + "*")
            async for message in subscription.listen():
                now = time.perf_counter()
                symbol = message["channel"].decode().removeprefix(prefix)
                body = message["data"]
                update_id = int(body[body.index(b":") + 1 : body.index(b",")])
                pending = self._exchange.markets[symbol].pending
                while pending and pending[0][0] <= update_id:
                    self.seconds.append(now - pending.popleft()[1])


def cpu_seconds(pid: int) -> float:
    """Give the CPU time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def resident_mb(pid: int) -> float:
    """Give the resident memory of a process."""
    pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096 / 2**20


async def all_live(redis: Redis, markets: list[str], running: subprocess.Popen[bytes]) -> float:
    """Wait until every book is live; gives the seconds."""
    begin, told = time.monotonic(), 0
    keys = [book_key("simulator", symbol) for symbol in markets]
    while True:
        async with redis.pipeline(transaction=False) as asked:
            for key in keys:
                asked.exists(key)
            live = sum(await asked.execute())
        if live == len(keys):
            return time.monotonic() - begin
        if running.poll() is not None:
            raise SystemExit("the orderbook process ended")
        if (step := int(time.monotonic() - begin) // 10) > told:
            told = step
            print(f"{live} of {len(keys)} books live", flush=True)
        await asyncio.sleep(0.5)


async def refill(redis: Redis) -> None:
    """Keep the venue's budget full until cancelled."""
    while True:
        await redis.delete(budget_key("simulator"))
        await asyncio.sleep(STEP_SECONDS / 2)


@contextmanager
def orderbook(environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the process that is measured."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    with log.open("ab") as output:
        running = subprocess.Popen(
            [sys.executable, "-m", "orderbook"],
            cwd=log.parent,
            env={**kept, "PYTHONPATH": str(ROOT), **environment},
            stdout=output,
            stderr=output,
        )
    try:
        yield running
    finally:
        running.terminate()
        running.wait()


def percentile(values: list[float], share: float) -> float:
    """Give the value that this share of the values does not exceed."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


async def measure(options: argparse.Namespace, server: RedisServer, directory: Path) -> None:
    """Run all of it once and print what it took."""
    rng = random.Random(options.seed)  # no secret depends on it
    markets = [
        Market(f"COIN{number}USDT", options.levels, random.Random(rng.random()))  # as above
        for number in range(options.symbols)
    ]
    exchange = Exchange(markets, options.rate, options.touched)
    names = list(exchange.markets)
    async with exchange.serve() as port, Redis.from_url(server.url) as redis:
        environment = {
            "SYMBOLS": ",".join(f"simulator:{name}" for name in names),
            "SIMULATOR_WS_URL": f"ws://127.0.0.1:{port}",
            "SIMULATOR_REST_URL": f"http://127.0.0.1:{port}",
            "METRICS_PORT": "0",
            "PUBLISH_LIVE": "true",
            # Images are 50 times as deep as what is read.
            "SNAPSHOT_DEPTH": str(max(20, options.levels // 50)),
            "BOOK_MAX_MB": str(options.max_mb),
            **server.environment,
        }
        reader = Reader(exchange)
        with orderbook(environment, directory / "orderbook.log") as running:
            reading = asyncio.create_task(reader.run(redis))
            refilling = asyncio.create_task(refill(redis))
            seconds = await all_live(redis, names, running)
            refilling.cancel()
            print(
                f"{len(names)} books of 2 x {options.levels} levels live after {seconds:.0f} s",
                flush=True,
            )
            await asyncio.sleep(options.settle)
            reader.seconds.clear()
            exchange.late = 0.0

            async def spent() -> list[float]:
                cpu = await redis.info("cpu")
                redis_cpu = cpu["used_cpu_user"] + cpu["used_cpu_sys"]
                own = time.process_time()
                return [time.monotonic(), exchange.sent, cpu_seconds(running.pid), redis_cpu, own]

            before = await spent()
            await asyncio.sleep(options.seconds)
            after = await spent()
            span, sent, of_books, of_redis, own = map(operator.sub, after, before)
            late = exchange.late
            reading.cancel()
            resident = resident_mb(running.pid)
            unseen = sum(len(market.pending) for market in markets)
    print(f"sent        {sent / span:,.0f} changes/s, {options.touched} levels each")
    print(f"memory      {resident:,.0f} MB resident")
    per_change = of_books / sent * 1e6
    print(f"CPU         {100 * of_books / span:.0f} % of a core, {per_change:.0f} us a change")
    print(f"            Redis {100 * of_redis / span:.0f} %, this feed {100 * own / span:.0f} %")
    shares = ", ".join(
        f"p{share * 100:g} {percentile(reader.seconds, share) * 1e3:.0f}"
        for share in (0.5, 0.99, 0.999, 1)
    )
    print(f"frame to published hash, ms: {shares}; of {len(reader.seconds):,} frames")
    print(f"            the feed was {late * 1e3:.0f} ms late at most, {unseen} unseen")
    log = (directory / "orderbook.log").read_text(encoding="utf-8")
    for line in log.splitlines():
        if "WARNING" in line or "ERROR" in line:
            print(line)


def main() -> None:
    """Bring a Redis, run the feed and the process, print what it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--symbols", type=int, default=500)
    parser.add_argument("--levels", type=int, default=5000, help="a side of every book")
    parser.add_argument("--rate", type=float, default=10, help="changes a second a symbol")
    parser.add_argument("--touched", type=int, default=10, help="levels a change")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--settle", type=float, default=5, help="seconds before it is measured")
    parser.add_argument("--max-mb", type=int, default=4096, help="BOOK_MAX_MB of the process")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if problem := why_not():
        sys.exit(
            f"the benchmark brings a Redis of its own, which needs a private Debian: {problem}"
        )
    root = ensure_root(ROOT / ".services", print)
    with tempfile.TemporaryDirectory(prefix="sluice-benchmark-") as directory:
        server = RedisServer(root, Path(directory) / "redis")
        try:
            server.start()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(measure(options, server, Path(directory)))
        finally:
            server.kill()


if __name__ == "__main__":
    main()
