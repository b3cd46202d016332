"""What the collector makes of a frame, and what it says of itself."""

import asyncio
import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from collector import service
from collector.service import Collector, Intake, Rate
from collector.windows import Windows
from sluice import publisher as publisher_module
from sluice.connections import connect_redis
from sluice.exchanges import EXCHANGES
from sluice.lifecycle import Process
from sluice.publisher import Publisher
from sluice.settings import Market, Settings
from sluice.stream import ConnectGate, Stream
from sluice.supervision import Supervisor

VENUE = EXCHANGES["binance"]
NOW = 1_790_000_000_500_000
TRADE = {
    "e": "trade",
    "E": 1790000000105,
    "s": "BTCUSDT",
    "t": 7,
    "p": "1.5",
    "q": "2",
    "T": 1790000000000,
    "m": True,
}


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    settings = Settings.model_validate({"spool_dir": tmp_path})
    return Publisher(connect_redis(settings), settings)  # nothing runs: it only takes records


@pytest.fixture
def windows(publisher: Publisher) -> Windows:
    windows = Windows(connect_redis(Settings.model_validate({})), publisher)
    windows.follow(["kline_1m", "ticker"])
    return windows


@pytest.fixture
def intake(publisher: Publisher, windows: Windows) -> Intake:
    return Intake(VENUE, publisher, {Market("binance", "BTCUSDT"): 0.0}, windows)


@pytest.fixture
def stream(intake: Intake) -> Stream:
    return Stream(VENUE, "ws://nowhere", ["btcusdt@trade"], intake.read, gate=ConnectGate(VENUE))


def test_a_trade_is_put_counted_and_seen(
    intake: Intake, publisher: Publisher, stream: Stream
) -> None:
    intake.read(stream, json.dumps(TRADE).encode(), NOW)
    assert publisher.counts.put == {"trade": 1}
    assert intake.messages == {"trade": 1}
    assert intake.last_seen[Market("binance", "BTCUSDT")] > 0
    assert intake.lag == pytest.approx(0.5)


def test_a_trade_of_a_market_that_was_removed_is_kept_but_not_watched(
    intake: Intake, publisher: Publisher, stream: Stream
) -> None:
    intake.last_seen.clear()
    intake.read(stream, json.dumps(TRADE).encode(), NOW)
    assert publisher.counts.put == {"trade": 1}
    assert intake.last_seen == {}


def test_a_wild_id_is_a_bad_frame_and_no_trade(
    intake: Intake, publisher: Publisher, stream: Stream
) -> None:
    for trade_id in (7, 2**52, 8):
        intake.read(stream, json.dumps({**TRADE, "t": trade_id}).encode(), NOW)
    assert publisher.counts.put == {"trade": 2}
    assert publisher.counts.bad_frames == 1


@pytest.mark.parametrize("frame", [b"", b"\x00\x01{}", b'{"e":"trade"}', b"[" * 100_000])
def test_a_bad_frame_is_counted_and_the_next_one_read(
    intake: Intake, publisher: Publisher, stream: Stream, frame: bytes
) -> None:
    intake.read(stream, frame, NOW)
    intake.read(stream, json.dumps(TRADE).encode(), NOW)
    assert publisher.counts.bad_frames == 1
    assert publisher.counts.put == {"trade": 1}


@pytest.mark.parametrize(
    "frame",
    [
        b'{"result":null,"id":1}',
        b'{"e":"somethingNew"}',
        b'{"e":"depthUpdate","E":1,"s":"BTCUSDT","U":1,"u":2,"b":[],"a":[]}',
    ],
)
def test_what_is_no_record_is_left(
    intake: Intake, publisher: Publisher, stream: Stream, frame: bytes
) -> None:
    intake.read(stream, frame, NOW)
    assert publisher.counts.bad_frames == 0
    assert publisher.in_memory == 0


def test_a_rate_is_that_of_the_last_while() -> None:
    now = 1000.0
    rate = Rate(lambda: now)
    now = 1010.0
    assert rate.of(100) == pytest.approx(10)
    for _ in range(100):
        now += 1.0
        rate.of(100)
    now += 1.0
    assert rate.of(160) == pytest.approx(60 / service.RATE_SECONDS)


async def test_the_statistics_and_the_metrics_say_what_happened(
    intake: Intake, publisher: Publisher, windows: Windows, stream: Stream
) -> None:
    process = Process("collector", Settings.model_validate({}), asyncio.Event())
    collector = Collector(process, publisher, windows, {stream: []}, {"binance": intake})
    intake.read(stream, json.dumps(TRADE).encode(), NOW)
    intake.read(stream, b"", NOW)
    collector.connection_changed()
    assert process.health.reasons == ["sockets: 1 of 1 not open", "start: starting"]
    line = collector.statistics()
    assert line.startswith("0 of 1 sockets, 0 ended; read 1 trades, ")
    assert "1 bad frames" in line
    assert "in memory 1" in line
    assert "\n" not in line
    text = exposed(collector)
    assert 'sluice_collector_messages_total{exchange="binance",stream="trade"} 1.0' in text
    assert "sluice_collector_bad_frames_total 1.0" in text
    assert "sluice_publisher_memory_records 1.0" in text


def exposed(collector: Collector) -> str:
    class Scrape:
        def collect(self) -> list[Metric]:
            return list(collector.metrics())

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Scrape())
    return generate_latest(registry).decode()


class NotedSupervisor(Supervisor):
    """A service manager that counts what it is told of progress."""

    def __init__(self) -> None:
        super().__init__({})
        self.noted = 0

    def progress(self) -> None:
        self.noted += 1


def test_a_socket_that_gets_on_is_no_progress_while_the_publisher_hangs(
    publisher: Publisher, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = NotedSupervisor()
    process = Process("collector", Settings(), asyncio.Event(), supervisor=supervisor)
    collector = Collector(process, publisher, windows)
    collector.progress()
    assert supervisor.noted == 1
    monkeypatch.setattr(publisher_module, "STUCK_SECONDS", 0.0)
    collector.progress()
    assert supervisor.noted == 1
