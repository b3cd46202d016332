"""SIGHUP: the settings are read again, and markets and streams come and go without a gap."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluice import records
from tests.acceptance.processes import Processes, processes, wait_until
from tests.acceptance.test_collector import Check, client

SYMBOLS = ("BTCUSDT", "SOLUSDT", "ETHUSDT")


@pytest.fixture
def started(tmp_path: Path, redis_environment: dict[str, str]) -> Iterator[Processes]:
    environment = {**redis_environment, "POSTGRES_HOST": str(tmp_path)}  # there is no database
    with processes(tmp_path, environment) as found:
        found.simulate(
            "--seed", "5", "--rate", "150", "--symbols", ",".join(SYMBOLS), venue="SIMULATOR"
        )
        yield found


def write(started: Processes, *symbols: str, **settings: str) -> None:
    settings["SYMBOLS"] = ",".join(f"simulator:{symbol}" for symbol in symbols)
    lines = [f"{name}={value}\n" for name, value in settings.items()]
    (started.directory / ".env").write_text("".join(lines))


def reload(started: Processes, module: str, said: str) -> None:
    before = started.log(module).count(said)
    started.running[module].send_signal(signal.SIGHUP)
    wait_until(lambda: started.log(module).count(said) > before, said)


def test_a_collector_takes_up_and_lays_down_markets_and_streams(started: Processes) -> None:
    write(started, "BTCUSDT", "SOLUSDT")
    started.start("collector")
    check = Check(started, SYMBOLS)

    def recorded() -> set[str]:
        return {symbol for symbol, _ in check.queued()}

    def subscribed() -> list[set[str]]:
        return [set(each["streams"]) for each in started.control("status")["connections"]]

    wait_until(lambda: recorded() == {"BTCUSDT", "SOLUSDT"}, "trades of both markets")
    write(started, "BTCUSDT", "ETHUSDT", STREAMS="trade,kline_1s", LOG_LEVEL="debug")
    reload(
        started, "collector", "added simulator:ETHUSDT; removed simulator:SOLUSDT; 2 markets now"
    )
    wait_until(
        lambda: (
            subscribed()
            == [{"btcusdt@trade", "btcusdt@kline_1s", "ethusdt@trade", "ethusdt@kline_1s"}]
        ),
        "the socket carries what is wanted",
    )
    wait_until(lambda: "ETHUSDT" in recorded() and check.length("kline"), "the new ones")
    assert "STREAMS applied" in started.log("collector")
    assert "LOG_LEVEL applied" in started.log("collector")

    def last_of_removed() -> int:
        return max(number for symbol, number in check.queued() if symbol == "SOLUSDT")

    wait_until(
        lambda: started.control("truth?symbol=SOLUSDT")["ids"][1] > last_of_removed() + 30,
        "trades of the removed market that nobody hears",
    )

    write(started)
    reload(started, "collector", "not reloaded, the old settings stay: SYMBOLS is not set")
    write(started, "BTCUSDT", "ETHUSDT", "BTCUSTD", STREAMS="trade", SPOOL_MAX_MB="7", DEAD_MAX="7")
    reload(started, "collector", "SPOOL_MAX_MB needs a restart")
    assert "DEAD_MAX" not in started.log("collector")
    wait_until(
        lambda: "lists no such market (did you mean BTCUSDT?)" in started.log("collector"),
        "the misspelt one is named",
    )
    check.wait_for_more()
    check.stop_the_market()
    assert started.terminate("collector") == 0
    left = last_of_removed()
    assert all(symbol == "SOLUSDT" and number > left for symbol, number in check.missing())
    assert check.holes() == 0
    assert check.records("gap") == []


def test_books_come_and_go_with_the_settings(started: Processes) -> None:
    write(started, "BTCUSDT", "SOLUSDT", SNAPSHOT_INTERVAL_MS="100")
    started.start("orderbook")
    redis = client(started.environment)

    def live() -> set[str]:
        keys = [f"crypto:orderbook:simulator:{symbol}" for symbol in SYMBOLS]
        return {symbol for symbol, key in zip(SYMBOLS, keys, strict=True) if redis.exists(key)}

    def rows() -> list[records.OrderbookSnapshot]:
        items: list[bytes] = redis.lrange("crypto:queue:orderbook_snapshot", 0, -1)  # type: ignore[assignment]  # not awaited
        found = [records.decode("orderbook_snapshot", item) for item in items]
        return [row for row in found if isinstance(row, records.OrderbookSnapshot)]

    def tail(symbol: str) -> list[int]:
        return [row.ts_grid for row in rows() if row.symbol == symbol][-5:]

    wait_until(lambda: live() == {"BTCUSDT", "SOLUSDT"}, "both books")
    write(started, "BTCUSDT", "ETHUSDT", SNAPSHOT_INTERVAL_MS="500", BOOK_AUDIT_SECONDS="1")
    reload(
        started, "orderbook", "added simulator:ETHUSDT; removed simulator:SOLUSDT; 2 markets now"
    )
    wait_until(lambda: live() == {"BTCUSDT", "ETHUSDT"}, "the other two")
    for symbol in ("BTCUSDT", "ETHUSDT"):
        wait_until(
            lambda symbol=symbol: (
                len(tail(symbol)) == 5  # type: ignore[misc]  # bound early
                and all(instant % 500_000 == 0 for instant in tail(symbol))
            ),
            f"rows of {symbol} at the new interval",
        )
    (connection,) = started.control("status")["connections"]
    assert {each.split("@")[0] for each in connection["streams"]} == {"btcusdt", "ethusdt"}
    # The book that stayed was never given up for it.
    assert len({row.sync_id for row in rows() if row.symbol == "BTCUSDT"}) == 1
    assert started.terminate("orderbook") == 0
    assert live() == set()
