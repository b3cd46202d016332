"""The operator's commands on real servers, as an operator types them."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from aiohttp import web
from redis.asyncio import Redis

from sluice import records
from sluice.queue import RecordQueue
from sluice.records import Trade
from sluice.spool import Batch, Spool
from tests.served import served
from tests.servers import Database, execute

ROOT = Path(__file__).resolve().parents[2]


def sluice(
    environment: dict[str, str], *arguments: str, code: int = 0, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", "from sluice.cli import main; main()", *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def trade(trade_id: int) -> bytes:
    return records.encode(
        Trade("binance", "BTCUSDT", trade_id, trade_id, "1.5", "2", "buy", 1_790_000_000_000_000, 1)
    )


async def test_queues_shows_depth_and_balance_and_peek_names_the_fields(
    redis: Redis, redis_environment: dict[str, str]
) -> None:
    await RecordQueue(redis, "trade").push([trade(1), trade(2)])
    shown = json.loads(sluice(redis_environment, "queues", "--json").stdout)
    (row,) = [row for row in shown if row["queue"] == "trade"]
    assert (row["depth"], row["pushed"], row["acked"], row["dead"]) == (2, 2, 0, 0)
    assert row["is_exact"]
    assert row["bytes"] > 0
    assert row["oldest_s"] > 0
    peeked = json.loads(sluice(redis_environment, "queues", "peek", "trade", "--json").stdout)
    assert [entry["trade_id"] for entry in peeked] == [1, 2]
    assert await RecordQueue(redis, "trade").length() == 2


async def test_queues_accounts_for_everything_on_every_list_on_the_disk_and_in_the_table(
    redis: Redis, redis_environment: dict[str, str], postgres: Database, tmp_path: Path
) -> None:
    execute(postgres, FILL, "DELETE FROM trades WHERE trade_id > 3")
    first, second = RecordQueue(redis, "trade"), RecordQueue(redis, "trade", 1)
    await first.push([trade(1), trade(2), trade(3), trade(3)])
    await first.ack(await first.claim(10, 10_000), dead_max=1)
    await second.push([trade(4), trade(5)])
    letter = json.dumps({"queue": "trade:1", "reason": "no", "time": 1, "raw": "[]"}).encode()
    await second.ack(await second.claim(1, 10_000), [letter], dead_max=1)
    await first.note_shed(7)
    with closing(Spool.create(tmp_path, 2**20)) as spool:
        spool.append(Batch("trade", [trade(6)], shard=1))
        environment = {**redis_environment, **postgres.environment, "SPOOL_DIR": str(tmp_path)}
        shown = sluice(environment, "queues", "--json", code=1)
        told = sluice(environment, "queues", "--sql", "--json", code=1)
    lists = {row["queue"]: row for row in json.loads(shown.stdout)}
    names = ("pushed", "acked", "dead", "depth", "spooled", "shed", "letters")
    assert [lists["trade"][name] for name in names] == [4, 4, 0, 0, 0, 7, 0]
    assert [lists["trade:1"][name] for name in names] == [2, 0, 1, 1, 1, 0, 1]
    (row,) = [row for row in json.loads(told.stdout) if row["queue"] == "trade"]
    assert [row[name] for name in names] == [6, 4, 1, 1, 1, 7, 1]
    assert (row["rows"], row["duplicates"], row["is_exact"]) == (3, 1, True)
    sluice(environment, "dead", "retry", "trade:1")
    assert await redis.lrange(second.key, 0, -1) == [trade(5), b"[]"]


async def test_dead_letters_are_listed_retried_edited_and_dropped_one_by_one(
    redis: Redis, redis_environment: dict[str, str]
) -> None:
    queue = RecordQueue(redis, "trade")
    items = [trade(number) for number in (1, 2, 3)]
    await queue.push(items)
    letters = [
        json.dumps({"queue": queue.key, "reason": "no", "time": 1, "raw": item.decode()}).encode()
        for item in items
    ]
    await queue.ack(await queue.claim(10, 10_000), letters, dead_max=10)

    listed = json.loads(sluice(redis_environment, "dead", "list", "--json", code=1).stdout)
    assert [(row["queue"], row["number"]) for row in listed] == [("trade", n) for n in (1, 2, 3)]
    assert '"reason": "no"' in sluice(redis_environment, "dead", "show", "trade", "2").stdout
    sluice(redis_environment, "dead", "retry", "trade", "2")
    sluice(redis_environment, "dead", "edit", "trade", "1", trade(9).decode())
    refused = sluice(redis_environment, "dead", "edit", "trade", "1", "[1]", code=2)
    assert "got `int`" in refused.stderr
    dropped = sluice(redis_environment, "dead", "drop", "trade", "1", "--yes")
    assert items[2].decode().replace('"', '\\"') in dropped.stdout

    assert await redis.lrange(queue.key, 0, -1) == [items[1], trade(9)]
    assert await redis.llen(queue.dead_key) == 0
    balance = await queue.balance()
    assert (balance.pushed, balance.dead, balance.length) == (5, 3, 2)
    assert balance.is_exact
    assert "no dead letters" in sluice(redis_environment, "dead", "list").stdout


FILL = """
INSERT INTO markets (exchange, symbol, id_kind) VALUES ('binance', 'BTCUSDT', 'raw');
INSERT INTO trades (market_id, time, trade_id, first_id, price, quantity, side, received_at)
SELECT market('binance', 'BTCUSDT'), '2026-11-27'::timestamptz + n * interval '1 s',
       n, n, 100, 1, 'buy', now()
FROM generate_series(1, 1000) AS n;
"""


def test_an_audit_is_clean_then_names_the_one_trade_that_was_deleted(postgres: Database) -> None:
    execute(postgres, FILL)
    whole = json.loads(sluice(postgres.environment, "audit", "--json").stdout)
    assert [(row["expected"], row["stored"], row["unexplained"]) for row in whole] == [
        (1000, 1000, 0)
    ]
    execute(postgres, "DELETE FROM trades WHERE trade_id = 500")
    told = sluice(postgres.environment, "audit", "binance:BTCUSDT", code=1)
    assert "1 trades are missing unexplained: 500" in told.stderr


@pytest.mark.parametrize(("status", "code"), [("absent", 0), ("lost", 0), ("open", 1)])
def test_a_gap_explains_what_is_missing_only_when_it_is_closed(
    status: str, code: int, postgres: Database
) -> None:
    execute(postgres, FILL, "DELETE FROM trades WHERE trade_id BETWEEN 500 AND 502")
    execute(
        postgres,
        "INSERT INTO gaps (gap_id, market_id, channel, from_id, to_id, cause, status, tries,"
        " revision, opened_at) VALUES ('g', market('binance', 'BTCUSDT'), 'trade', 500, 502,"
        f" 'a test', '{status}', 1, 1, now())",
    )
    (row,) = json.loads(sluice(postgres.environment, "audit", "--json", code=code).stdout)
    assert (row["expected"], row["stored"]) == (1000, 997)
    assert row["unexplained"] == (3 if status == "open" else 0)
    (gap,) = json.loads(sluice(postgres.environment, "gaps", "--json").stdout)
    assert (gap["market"], gap["status"], gap["ids"]) == ("binance:BTCUSDT", status, 3)


def test_a_server_that_is_away_is_one_line_and_exit_3() -> None:
    told = sluice({"REDIS_PORT": "1"}, "queues", code=3)
    assert len(told.stderr.splitlines()) == 1
    assert "sluice doctor" in told.stderr


async def test_status_shows_markets_queues_and_gaps(
    redis: Redis, redis_environment: dict[str, str], postgres: Database
) -> None:
    execute(postgres, FILL)
    await RecordQueue(redis, "trade").push([trade(1)])
    environment = {**redis_environment, **postgres.environment}
    facts = json.loads(sluice(environment, "status", "--json").stdout)
    assert [market["market"] for market in facts["markets"]] == ["binance:BTCUSDT"]
    assert {queue["kind"]: queue["depth"] for queue in facts["queues"]}["trade"] == 1
    assert facts["gaps"] == {}
    assert "binance:BTCUSDT" in sluice(environment, "status").stdout


async def test_doctor_finds_nothing_wrong_with_sound_servers_but_what_the_tests_did_to_them(
    redis_environment: dict[str, str], postgres: Database, tmp_path: Path
) -> None:
    async def tell_the_time(_: web.Request) -> web.Response:
        return web.json_response({"serverTime": time.time_ns() // 1_000_000 - 60_000})

    async with served(tell_the_time) as venue:
        environment = {
            **redis_environment,
            **postgres.environment,
            "SYMBOLS": "binance:BTCUSDT",
            "BINANCE_SPOT_REST_URL": venue,
            "SPOOL_DIR": str(tmp_path),
            "SPOOL_MAX_MB": "1",
        }
        told = await asyncio.to_thread(sluice, environment, "doctor", "--json", code=1)
    found = {row["what"]: row for row in json.loads(told.stdout)}
    wrong = {what: row["fix"] for what, row in found.items() if not row["is_sound"]}
    assert wrong.keys() <= {"fsync", "binance"}
    assert re.search(r"our clock is off by \+(59|60|61)\.", found["binance"]["found"])
    assert "clock" in wrong["binance"]
    assert "has them" in found["rights of the user"]["found"]
    assert found["websockets"]["is_sound"]


def test_doctor_names_what_is_away_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("REDIS_PASSWORD=secret\n")
    (tmp_path / ".env").chmod(0o644)
    away = {
        "REDIS_PORT": "1",
        "POSTGRES_PORT": "1",
        "SPOOL_DIR": str(tmp_path),
        "SPOOL_MAX_MB": "1000000000",
        "SYMBOLS": "binance:BTCUSDT",
        "BINANCE_SPOT_REST_URL": "http://127.0.0.1:1",
    }
    found = json.loads(sluice(away, "doctor", "--json", code=1, cwd=tmp_path).stdout)
    wrong = {row["what"]: row["fix"] for row in found if not row["is_sound"]}
    assert wrong.keys() == {"disk of the spool", ".env", "redis", "postgres", "binance"}
    assert "chmod 600" in wrong[".env"]
    assert "BINANCE_SPOT_REST_URL" in wrong["binance"]
    assert "REDIS_HOST" in wrong["redis"]
