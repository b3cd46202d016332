"""`make chaos SEEDS=n SECONDS=s FIRST=seed`: a line a seed; exit 1 on a violation, 3 on a doubt."""

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Final

from redis import Redis

from sluice.cli.debian import ensure_root
from sluice.cli.servers import PostgresServer, RedisServer
from tests.chaos.run import Result, Servers, run_seed
from tests.conftest import SERVICES
from tests.faults.disk import mount, unmount
from tests.servers import database_of, fresh_database, schema_template

DISK_MEGABYTES: Final = {"redis": 128, "postgres": 512, "spool": 8}
"""Small enough to be filled in a moment, large enough for what a run of seeds leaves."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30.0, help="of faults, a seed")
    parser.add_argument("--first", type=int, default=1, help="seed")
    options = parser.parse_args()
    root = ensure_root(SERVICES, lambda line: print(line, file=sys.stderr))
    results = []
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="sluice-chaos-"))
        disks = {name: stack.enter_context(disk) for name, disk in _disks(directory)}
        redis = RedisServer(root, directory / "redis")
        postgres = PostgresServer(root, directory / "postgres", options={"max_wal_size": "64MB"})
        for server in (redis, postgres):
            stack.callback(server.kill)
            server.start()
        administration = database_of(postgres)
        template = stack.enter_context(schema_template(administration))
        for seed in range(options.first, options.first + options.seeds):
            began = time.monotonic()
            logs = directory / f"seed-{seed}"
            logs.mkdir()
            with fresh_database(administration, template=template) as database:
                with Redis.from_url(redis.url) as client:
                    client.flushall()
                servers = Servers(redis, postgres, database, disks)
                result = asyncio.run(run_seed(servers, seed, options.seconds, logs))
            print(result, flush=True)
            results.append(result)
            if result.outcome == "held":
                shutil.rmtree(logs)
            else:
                print(f"  {time.monotonic() - began:.0f} s; the logs: {logs}", flush=True)
    for name in DISK_MEGABYTES:
        shutil.rmtree(directory / name, ignore_errors=True)
    if not any(directory.iterdir()):
        directory.rmdir()
    return _summarise(results)


def _disks(directory: Path) -> Iterator[tuple[str, AbstractContextManager[Path]]]:
    """Give the small file systems there can be: none without root."""
    for name, megabytes in DISK_MEGABYTES.items():
        path = directory / name
        path.mkdir()
        if problem := mount(path, megabytes):
            print(f"no full disks: {problem}", file=sys.stderr)
            return
        yield name, _mounted(path)


@contextmanager
def _mounted(path: Path) -> Iterator[Path]:
    try:
        yield path
    finally:
        unmount(path)


def _summarise(results: list[Result]) -> int:
    outcomes = [result.outcome for result in results]
    print(
        f"{len(results)} seeds, {sum(result.begun for result in results)} faults begun,"
        f" {sum(result.trades for result in results)} trades:"
        f" {outcomes.count('held')} held, {outcomes.count('VIOLATED')} VIOLATED,"
        f" {outcomes.count('inconclusive')} inconclusive"
    )
    if "VIOLATED" in outcomes:
        return 1
    return 3 if "inconclusive" in outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
