"""SIGHUP: the settings are read again, and markets and streams come and go without a gap."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.processes import Processes, processes, wait_until
from tests.acceptance.test_collector import Check

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
    write(started, "BTCUSDT", "ETHUSDT", STREAMS="trade", DEAD_MAX="7")
    reload(started, "collector", "DEAD_MAX needs a restart")
    check.wait_for_more()
    check.stop_the_market()
    assert started.terminate("collector") == 0
    left = last_of_removed()
    assert all(symbol == "SOLUSDT" and number > left for symbol, number in check.missing())
    assert check.holes() == 0
    assert check.records("gap") == []
