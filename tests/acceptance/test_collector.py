"""The collector as a process, against the simulated exchange and a real Redis.

What is shown of every disturbance: each trade that was published since the first one recorded is in
the queue, field by field as it was published.
"""

import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from redis import Redis as BlockingRedis

from sluice import records
from sluice.cli.servers import RedisServer, free_port
from sluice.records import Trade
from tests.acceptance.processes import Processes, processes, wait_until

SYMBOLS = ("BTCUSDT", "SOLUSDT")
Key = tuple[str, int]


@pytest.fixture
def started(tmp_path: Path, redis_environment: dict[str, str]) -> Iterator[Processes]:
    with running(tmp_path, redis_environment) as found:
        yield found


def running(tmp_path: Path, redis_environment: dict[str, str]) -> Any:
    environment = {
        **redis_environment,
        "POSTGRES_HOST": str(tmp_path),  # there is none: the collector does without
        "SYMBOLS": ",".join(f"simulator:{symbol}" for symbol in SYMBOLS),
    }
    return processes(tmp_path, environment)


def client(environment: dict[str, str]) -> BlockingRedis:
    return BlockingRedis(
        host=environment["REDIS_HOST"],
        port=int(environment["REDIS_PORT"]),
        db=int(environment.get("REDIS_DB", "0")),
        username=environment.get("REDIS_USERNAME") or None,
        password=environment.get("REDIS_PASSWORD") or None,
    )


class Check:
    """Compares what the simulator published with what waits in Redis."""

    def __init__(self, started: Processes, symbols: Sequence[str] = SYMBOLS) -> None:
        self._processes = started
        self._symbols = symbols
        self._redis = client(started.environment)

    def length(self, kind: str = "trade") -> int:
        return int(self._redis.llen(f"crypto:queue:{kind}"))

    def holes(self) -> int:
        names = [f"simulator:{symbol}:trade" for symbol in self._symbols]
        return sum(int(self._redis.zcard(f"crypto:holes:{name}")) for name in names)

    def records(self, kind: str) -> list[records.Record]:
        items: list[bytes] = self._redis.lrange(f"crypto:queue:{kind}", 0, -1)  # type: ignore[assignment]  # not awaited
        return [records.decode(kind, item) for item in items]

    def queued(self) -> dict[Key, Trade]:
        found = self.records("trade")
        return {(t.symbol, t.trade_id): t for t in found if isinstance(t, Trade)}

    def published(self) -> dict[Key, tuple[str, str, int, str]]:
        """Give what was published: price, quantity, time and side by symbol and id."""
        found = {}
        for symbol in self._symbols:
            page: list[list[Any]] = [[0]]
            while page := self._processes.control(
                f"trades?symbol={symbol}&from={page[-1][0] + 1}&limit=10000"
            ):
                for number, price, quantity, time, is_buyer_maker in page:
                    side = "sell" if is_buyer_maker else "buy"
                    found[symbol, number] = (price, quantity, time * 1000, side)
        return found

    def missing(self) -> list[Key]:
        """Give the trades published since the first queued one of a market that are not queued."""
        queued = self.queued()
        first = {
            symbol: min((number for name, number in queued if name == symbol), default=0)
            for symbol in self._symbols
        }
        return [
            (symbol, number)
            for symbol, number in self.published()
            if number >= first[symbol] and (symbol, number) not in queued
        ]

    def assert_as_published(self) -> None:
        """Every trade is there, and each as it was published."""
        assert self.missing() == []
        published = self.published()
        for key, trade in self.queued().items():
            seen = (trade.price, trade.quantity, trade.ts_event, trade.side)
            assert seen == published[key], key

    def wait_for_more(self, count: int = 60) -> None:
        """Wait until so many more trades are queued."""
        wanted = self.length() + count
        wait_until(lambda: self.length() >= wanted, f"{count} more trades")

    def stop_the_market(self) -> None:
        self._processes.control("source", {"action": "stop"})
        wait_until(
            lambda: self._processes.control("status")["source"] == "stopped", "the market stops"
        )


def begin(started: Processes, **environment: str) -> Check:
    """Start a market and a collector, and wait for the first trades of each symbol."""
    started.environment.update(environment)
    symbols = ",".join(SYMBOLS)
    started.simulate("--seed", "5", "--rate", "150", "--symbols", symbols, venue="SIMULATOR")
    started.start("collector")
    check = Check(started)
    wait_until(lambda: len({symbol for symbol, _ in check.queued()}) == len(SYMBOLS), "trades")
    return check


def test_what_is_published_while_it_is_dead_is_fetched_after_it_is_back(
    started: Processes,
) -> None:
    check = begin(started)
    check.wait_for_more()
    started.kill("collector")
    seen = max(number for symbol, number in check.queued() if symbol == SYMBOLS[0])
    wait_until(
        lambda: started.control(f"truth?symbol={SYMBOLS[0]}")["ids"][1] > seen + 30,
        "trades that nobody hears",
    )
    started.start("collector")
    check.wait_for_more()
    check.stop_the_market()
    wait_until(lambda: not check.missing() and not check.holes(), "the holes are filled")
    assert started.terminate("collector") == 0
    check.assert_as_published()
    wait_until(lambda: check.records("gap"), "the gap is named")


def test_what_the_socket_does_not_bring_is_fetched(started: Processes) -> None:
    check = begin(started)
    wanted = {"drop": 20, "duplicate": 20, "reorder": 10, "truncate": 5, "deep": 2, "huge": 1}
    for kind, count in wanted.items():
        started.control("faults", {"kind": kind, "count": count, "on": "*@trade"})
    wait_until(lambda: not started.control("faults")["armed"], "messages are damaged")
    for kind in ("cut", "cut_mid_frame", "close"):
        (old,) = (connection["number"] for connection in started.control("status")["connections"])
        assert started.control("faults", {"kind": kind})["hit"] == 1
        wait_until(
            lambda n=old: (
                [c["number"] > n for c in started.control("status")["connections"]]  # type: ignore[misc]  # bound early
                == [True]
            ),
            f"another socket after {kind}",
        )
        check.wait_for_more()
    happened = started.control("faults")["counts"]
    assert {kind: happened[kind] for kind in wanted} == wanted
    check.stop_the_market()
    wait_until(lambda: not check.missing() and not check.holes(), "the holes are filled")
    assert started.terminate("collector") == 0
    check.assert_as_published()


def test_a_server_that_shuts_down_is_left_before_it_does(started: Processes) -> None:
    # Nothing is fetched within the hour: what is there came from the sockets.
    check = begin(started, GAP_SETTLE_MS="3600000")
    started.control("rate", {"rate": 1000})
    (old,) = (connection["number"] for connection in started.control("status")["connections"])
    started.control("faults", {"kind": "shutdown", "options": {"grace": 600}})
    wait_until(
        lambda: [c["number"] > old for c in started.control("status")["connections"]] == [True],
        "another socket takes its place",
        ceiling=200,  # after a first attempt that fails there is a pause of a minute
    )
    check.wait_for_more()
    check.stop_the_market()
    assert started.terminate("collector") == 0
    check.assert_as_published()
    assert check.holes() == 0


def test_every_stream_has_its_queue_and_sigterm_leaves_nothing_in_memory(
    started: Processes,
) -> None:
    check = begin(started, STREAMS="trade,kline_1s,ticker,miniTicker")
    wait_until(lambda: check.length("kline") and check.length("ticker") > 5, "klines and tickers")
    check.stop_the_market()
    assert started.terminate("collector") == 0
    check.assert_as_published()
    assert check.holes() == 0
    assert not list((started.directory / "spool").glob("*"))
    assert " ERROR " not in started.log("collector")
    klines, tickers = check.records("kline"), check.records("ticker")
    assert {kline.symbol for kline in klines} <= set(SYMBOLS)
    kinds = {ticker.kind for ticker in tickers if isinstance(ticker, records.Ticker)}
    assert kinds == {"ticker", "miniTicker"}


def page(port: int, name: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{name}", timeout=60) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


def test_redis_goes_away_and_comes_back(tmp_path: Path, private_redis: RedisServer) -> None:
    port = free_port()
    private_redis.stop()
    with running(tmp_path, private_redis.environment) as started:
        started.simulate(
            "--seed", "5", "--rate", "150", "--symbols", ",".join(SYMBOLS), venue="SIMULATOR"
        )
        started.start("collector", METRICS_PORT=str(port))
        wait_until(lambda: page(port, "livez")[0] == 200, "the collector lives")
        wait_until(
            lambda: (waits := page(port, "readyz"))[0] == 503 and "sockets" not in waits[1],
            "its sockets are open",
        )
        assert page(port, "readyz")[1].startswith("redis: ")
        private_redis.start()
        wait_until(lambda: page(port, "readyz")[0] == 200, "it is ready")
        check = Check(started)
        check.wait_for_more()
        private_redis.kill()
        before = started.control(f"truth?symbol={SYMBOLS[0]}")["trades"]
        wait_until(
            lambda: started.control(f"truth?symbol={SYMBOLS[0]}")["trades"] > before + 100,
            "trades without Redis",
        )
        private_redis.start()
        check.wait_for_more()
        _, metrics = page(port, "metrics")
        assert 'sluice_collector_messages_total{exchange="simulator",stream="trade"}' in metrics
        assert "sluice_publisher_shed_records_total 0.0" in metrics
        check.stop_the_market()
        wait_until(lambda: not check.missing() and not check.holes(), "all that was published")
        assert started.terminate("collector") == 0
        check.assert_as_published()
        log = started.log("collector")
        assert log.count("Redis does not answer") == 1
        assert " ERROR " not in log


def test_what_redis_must_be_like(tmp_path: Path, private_redis: RedisServer) -> None:
    redis = client(private_redis.environment)
    with running(tmp_path, private_redis.environment) as started:
        redis.config_set("appendonly", "no")
        started.start("collector", SIMULATOR_WS_URL="ws://127.0.0.1:1")
        wait_until(lambda: "append-only" in started.log("collector"), "the warning")
        assert started.terminate("collector") == 0

        redis.config_set("maxmemory-policy", "allkeys-lru")
        process = started.start("collector", "refused")
        assert process.wait(60) == 2
        log = started.log("refused")
        assert "allkeys-lru" in log
        assert "noeviction" in log
        assert "Traceback" not in log


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"SYMBOLS": ""}, "SYMBOLS is not set"),
        ({"SPOOL_DIR": "/dev/null/spool"}, "SPOOL_DIR: /dev/null/spool can not be written to"),
    ],
)
def test_a_bad_setting_is_one_line_and_exit_code_2(
    started: Processes, changes: dict[str, str], said: str
) -> None:
    started.environment.update(changes)
    assert started.start("collector").wait(60) == 2
    log = started.log("collector")
    assert said in log
    assert "Traceback" not in log
