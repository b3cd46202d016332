"""What `sluice status --watch` costs the pipeline that it watches.

    python -m benchmarks.status [--rate 5000] [--seconds 20] [--rounds 3]

Runs the simulator at so many trades a second over twenty markets, the three processes, a private
Redis and a private PostgreSQL. Rounds of equal length alternate, without the screen and with it, in
a terminal of 160 columns. Printed is the CPU time of each part in milliseconds a second, and what
the screen itself takes; the median of the rounds (least to most).
"""

import argparse
import contextlib
import os
import pty
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from redis import Redis

from benchmarks.flusher import cpu_of
from sluice.cli.debian import ensure_root, why_not
from sluice.cli.servers import PostgresServer, RedisServer, free_port
from sluice.queue import queue_key
from sluice.schema import read_schema

ROOT: Final = Path(__file__).resolve().parents[1]
SYMBOLS: Final = tuple(f"M{number:02}USDT" for number in range(20))
WARM_SECONDS: Final = 15.0
PARTS: Final = ("simulator", "collector", "orderbook", "flusher", "redis", "postgres")


@contextlib.contextmanager
def pipeline(rate: float, directory: Path) -> Iterator[tuple[dict[str, str], dict[str, int]]]:
    """Run everything; gives the settings and the process ids by part."""
    root = ensure_root(ROOT / ".services", print)
    redis = RedisServer(root, directory / "redis")
    postgres = PostgresServer(root, directory / "postgres")
    port = free_port()
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        redis.start()
        postgres.start()
        postgres.create_database("benchmark")
        postgres.execute(read_schema(), "benchmark")
        environment = {
            **os.environ,
            **redis.environment,
            **postgres.environment,
            "POSTGRES_DB": "benchmark",
            "SYMBOLS": ",".join(f"simulator:{symbol}" for symbol in SYMBOLS),
            "STREAMS": "trade",
            "SIMULATOR_WS_URL": f"ws://127.0.0.1:{port}",
            "SIMULATOR_REST_URL": f"http://127.0.0.1:{port}",
            "SPOOL_DIR": str(directory / "spool"),
            "METRICS_PORT": "0",
        }
        commands = {
            "simulator": [
                *("sluice.simulator", "--port", str(port), "--rate", str(rate)),
                *("--symbols", ",".join(SYMBOLS)),
            ],
            **{name: [name] for name in ("collector", "orderbook", "flusher")},
        }
        for name, command in commands.items():
            with (directory / f"{name}.log").open("wb") as log:
                running[name] = subprocess.Popen(  # noqa: S603  # our own modules
                    [sys.executable, "-m", *command],
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=log,
                )
        pids = {name: process.pid for name, process in running.items()}
        yield environment, {**pids, "redis": redis.pid or 0, "postgres": postgres.pid or 0}
    finally:
        for process in running.values():
            process.kill()
            process.wait()
        postgres.kill()
        redis.kill()


@contextlib.contextmanager
def screen(environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run `sluice status --watch` in a terminal that somebody reads."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "from sluice.cli import main; main()", "status", "--watch"],
        cwd=ROOT,
        env={**environment, "TERM": "xterm", "COLUMNS": "160", "LINES": "60"},
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
    )
    os.close(end)

    def read() -> None:
        with contextlib.suppress(OSError):
            while os.read(terminal, 1 << 16):
                pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
        reader.join()
        os.close(terminal)


def used(pids: Mapping[str, int], seconds: float) -> tuple[dict[str, float], float]:
    """Watch for so long; gives milliseconds of CPU a second by part, and the seconds it took."""
    before = {name: cpu_of(pid) for name, pid in pids.items()}
    began = time.perf_counter()
    time.sleep(seconds)
    took = time.perf_counter() - began
    return {name: 1000 * (cpu_of(pid) - before[name]) / took for name, pid in pids.items()}, took


def spread(values: list[float]) -> str:
    """Write a median with its least and most."""
    return f"{statistics.median(values):7.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Run the rounds and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rate", type=float, default=5000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if problem := why_not():
        sys.exit(
            f"the benchmark brings servers of its own, which needs a private Debian: {problem}"
        )
    found: dict[bool, dict[str, list[float]]] = {is_watched: {} for is_watched in (False, True)}
    with (
        tempfile.TemporaryDirectory(prefix="sluice-benchmark-") as directory,
        pipeline(options.rate, Path(directory)) as (environment, pids),
        Redis(port=int(environment["REDIS_PORT"])) as redis,
    ):
        time.sleep(WARM_SECONDS)
        counters = f"{queue_key('trade')}:counters"
        for _ in range(options.rounds):
            for is_watched, kept in found.items():
                with contextlib.ExitStack() as stack:
                    watched = dict(pids)
                    if is_watched:
                        watched["status"] = stack.enter_context(screen(environment)).pid
                        time.sleep(WARM_SECONDS / 3)  # starting is not watching
                    pushed = int(redis.hget(counters, "pushed") or 0)
                    cost, took = used(watched, options.seconds)
                    pushed = int(redis.hget(counters, "pushed") or 0) - pushed
                for name, value in {**cost, "trades a second": pushed / took}.items():
                    kept.setdefault(name, []).append(value)
        depth = redis.llen(queue_key("trade"))
    print(f"{options.rate:.0f} trades a second asked for, {options.rounds} rounds of each kind")
    print(f"{'ms of CPU a second':20}{'without':>30}{'with the screen':>30}")
    for name in (*PARTS, "status", "trades a second"):
        without, with_it = (
            spread(kept[name]) if name in kept else "" for kept in (found[False], found[True])
        )
        print(f"{name:20}{without:>30}{with_it:>30}")
    print(f"left in the queue of trades: {depth}")


if __name__ == "__main__":
    main()
