"""`sluice record` and `sluice replay`: what was recorded gives the same tables each time."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis import Redis as BlockingRedis
from typer.testing import CliRunner

from sluice.cli import app
from sluice.recording import read_lines
from tests.acceptance.processes import CEILING, ROOT, processes, wait_until
from tests.acceptance.test_recordings import matches
from tests.conftest import Shared
from tests.servers import Database, fresh_database
from tests.truth import Trade, truth_of

DATA = ROOT / "tests" / "data"
SLUICE = [sys.executable, "-c", "from sluice.cli import main; main()"]
REPLAY_CEILING = 240.0
TABLES = ("trades", "orderbook_snapshots", "klines", "tickers", "gaps", "book_audits")
TRADES = """
SELECT trade_id, first_id, price::text, quantity::text, side,
       (extract(epoch FROM time) * 1000000)::bigint AS time
FROM trades WHERE market_id = market('binance', $1) ORDER BY trade_id
"""


@pytest.fixture
def databases(shared: Shared) -> Iterator[Callable[[], Database]]:
    """Give a way to make databases with the schema."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(
            fresh_database(shared.administration, template=shared.template)
        )


class Command:
    """`sluice` with the settings of a test's servers."""

    def __init__(self, environment: dict[str, str], directory: Path) -> None:
        self._options = {
            "env": {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment},
            "cwd": directory,
            "text": True,
        }

    def __call__(self, *arguments: str, code: int = 0) -> Any:
        """Run it with --json and give what it prints."""
        done = subprocess.run(
            [*SLUICE, *arguments, "--json"],
            capture_output=True,
            check=False,
            timeout=REPLAY_CEILING,
            **self._options,  # type: ignore[call-overload]  # the same for both ways to start it
        )
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout or "null")

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        process: subprocess.Popen[str] = subprocess.Popen(
            [*SLUICE, *arguments],
            **self._options,  # type: ignore[call-overload]  # as above
        )
        return process


@pytest.fixture
def sluice(redis_environment: dict[str, str], postgres: Database, tmp_path: Path) -> Command:
    return Command({**redis_environment, **postgres.environment}, tmp_path)


async def contents(database: Database) -> dict[str, list[Any]]:
    """Read every row of every table, in an order of their own."""
    connection = await asyncpg.connect(database.dsn)
    try:
        return {
            table: [
                tuple(row)
                for row in await connection.fetch(
                    f"SELECT * FROM {table} AS t ORDER BY t"
                )  # our own names
            ]
            for table in TABLES
        }
    finally:
        await connection.close()


@pytest.mark.timeout(600)
async def test_the_same_recording_twice_gives_the_same_tables(
    sluice: Command,
    postgres: Database,
    databases: Callable[[], Database],
    redis_url: str,
    tmp_path: Path,
) -> None:
    whole = DATA / "simulated_nexousdt.gz"
    holed, missing_trades, since = without_some(DATA / "simulated_btcusdt.gz", tmp_path)
    paths = [str(whole), str(holed)]
    second = databases()

    printed = sluice("replay", *paths, "--database", postgres.database)
    # In another order, and at a speed of its own.
    again = sluice("replay", *paths[::-1], "--speed", "50", "--database", second.database)

    assert printed == again
    tables = await contents(postgres)
    assert tables == await contents(second)
    assert {(row["market"], row["table"]) for row in printed} == {
        *((f"binance:{symbol}", "trades") for symbol in ("BTCUSDT", "NEXOUSDT")),
        *((f"binance:{symbol}", "orderbook_snapshots") for symbol in ("BTCUSDT", "NEXOUSDT")),
        ("binance:BTCUSDT", "gaps"),
    }
    assert sum(row["rows"] for row in printed) == sum(map(len, tables.values()))
    # Times are the recording's.
    stamps = {line.ts_recv for path in paths for line in read_lines(Path(path))}
    assert {micros(row[3]) for row in tables["trades"]} <= stamps
    # What is missing is named, and the book is not one beyond the change that is missing.
    named = {(gap[2], gap[3], gap[4], gap[8]) for gap in tables["gaps"]}
    assert named == {("trade", first, last, "lost") for first, last in missing_trades}
    connection = await asyncpg.connect(postgres.dsn)
    try:
        oracle = json.loads((DATA / "simulated.json").read_text())
        await matches(connection, "NEXOUSDT", oracle["symbols"]["NEXOUSDT"])
        until = await connection.fetchval(
            "SELECT max(received_at) FROM orderbook_snapshots"
            " WHERE market_id = market('binance', 'BTCUSDT')"
        )
    finally:
        await connection.close()
    assert micros(until) < since
    certificates = {row["market"]: row for row in sluice("audit")}
    assert certificates["binance:NEXOUSDT"]["lost"] == 0
    assert certificates["binance:BTCUSDT"]["lost"] == 3
    assert all(row["unexplained"] == 0 for row in certificates.values())
    with BlockingRedis.from_url(redis_url) as client:
        assert client.info("keyspace") == {}


def micros(time: datetime) -> int:
    return round(time.timestamp() * 1e6)


def without_some(recording: Path, directory: Path) -> tuple[Path, list[tuple[int, int]], int]:
    """Copy a recording without three trades and a change of the book.

    Gives the ranges of the trades, and when the change was read.
    """
    with gzip.open(recording) as file:
        lines = file.read().splitlines(keepends=True)
    trades = [number for number, line in enumerate(lines) if b"@trade" in line]
    changes = [number for number, line in enumerate(lines) if b"@depth" in line]
    change = changes[len(changes) // 2]
    left_out = {trades[20], trades[21], trades[40], change}
    ids = [json.loads(lines[n].split(b" ", 1)[1])["data"]["t"] for n in sorted(left_out - {change})]
    path = directory / "holed"
    path.write_bytes(b"".join(line for n, line in enumerate(lines) if n not in left_out))
    return path, [(ids[0], ids[1]), (ids[2], ids[2])], int(lines[change].split(b" ", 1)[0])


@pytest.mark.timeout(600)
async def test_a_recording_of_the_simulator_replays_to_what_it_published(
    sluice: Command,
    redis_environment: dict[str, str],
    databases: Callable[[], Database],
    tmp_path: Path,
) -> None:
    target = databases()
    with processes(tmp_path, redis_environment) as running:
        running.simulate("--rate", "80", "--symbols", "BTCUSDT,ETHUSDT")
        recorder = Command({**redis_environment, **running.environment}, tmp_path)
        options = ["record", "binance:BTCUSDT", "binance:ETHUSDT", "--dir", "raw"]

        # Small files, so that there are several; the first recorder is killed, the second ends.
        killed = recorder.start(*options, "--max-mb", "0.02")
        wait_until(lambda: len(files(tmp_path, "ETHUSDT")) > 1, "a second file")
        killed.kill()
        killed.wait(CEILING)
        before = {symbol: trade_ids(files(tmp_path, symbol)) for symbol in ("BTCUSDT", "ETHUSDT")}
        assert all(before.values())
        lost_until = {symbol: ids[-1] for symbol, ids in before.items()}
        ended = recorder.start(*options, "--json")
        wait_until(lambda: all_grew(tmp_path, lost_until), "more trades of both markets")
        ended.send_signal(signal.SIGTERM)
        assert ended.wait(CEILING) == 0

        rows = sluice(
            "replay", *map(str, sorted((tmp_path / "raw").iterdir())), "--database", target.database
        )

        assert {row["table"] for row in rows} >= {"trades", "orderbook_snapshots", "gaps"}
        connection = await asyncpg.connect(target.dsn)
        try:
            async with truth_of(running.simulator_url) as truth:
                for symbol, last in lost_until.items():
                    stored = [Trade(*row) for row in await connection.fetch(TRADES, symbol)]
                    published = await truth.trades(symbol, stored[0].trade_id, stored[-1].trade_id)
                    gaps = await connection.fetch(
                        "SELECT from_id, to_id FROM gaps WHERE channel = 'trade'"
                        " AND market_id = market('binance', $1)",
                        symbol,
                    )
                    absent = {n for gap in gaps for n in range(gap["from_id"], gap["to_id"] + 1)}
                    assert stored == [t for t in published if t.trade_id not in absent]
                    # Only what nobody recorded is missing.
                    assert min(absent, default=last + 1) == last + 1
                assert await connection.fetchval(
                    "SELECT count(*) > 0 AND sum(levels_different) = 0 FROM book_audits"
                )
        finally:
            await connection.close()


def files(directory: Path, symbol: str) -> list[Path]:
    return sorted((directory / "raw").glob(f"binance_{symbol}_*"))


def trade_ids(paths: list[Path]) -> list[int]:
    return [
        json.loads(line.payload)["data"]["t"]
        for path in paths
        for line in read_lines(path)
        if b"@trade" in line.payload
    ]


def all_grew(directory: Path, since: dict[str, int]) -> bool:
    return all(
        sum(number > last for number in trade_ids(files(directory, symbol))) > 20
        for symbol, last in since.items()
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["record", "binance:BTCUSDT", "--streams", "trades"], "none of binance's streams"),
        (["record", "nowhere:BTCUSDT"], "no exchange 'nowhere'"),
        (["record"], "name markets"),
        (["replay", "README.md"], "none of a recording"),
        (["replay", "file", "--market", "binance:ETHUSDT"], "they hold BTCUSDT"),
        (["replay", "file", "--speed", "fast"], "a number, or max"),
        (["replay", "file", "--speed", "-1"], "above 0, or max"),
        (["replay", "missing"], "does not exist"),
    ],
)
def test_bad_arguments_are_told_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# No recording\n")
    (tmp_path / "file").write_bytes((DATA / "simulated_btcusdt.gz").read_bytes())

    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})

    assert result.exit_code == 2
    assert said in re.sub(r"\s+", " ", re.sub("[│╭╮╰╯─]", "", result.output))
