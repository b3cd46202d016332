"""A recording is played through real sockets and gives the results that stand beside it."""

import asyncio
import hashlib
import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import aiohttp
import pytest
from websockets.asyncio.client import connect

from sluice.simulator import Order, Simulator, SimulatorConfig
from sluice.simulator.recording import HIGH_WATER
from tests.sheet_client import SheetClient

PATIENCE = 120
RECORDINGS = Path(__file__).parents[3] / "shared" / "recordings"
DATA = Path(__file__).parents[1] / "data"
SYMBOLS = ("BTCUSDT", "NEXOUSDT")
ORACLE = json.loads((DATA / "simulated.json").read_text())["symbols"]
CONFIG = SimulatorConfig(
    recordings=tuple(DATA / f"simulated_{symbol.lower()}.gz" for symbol in SYMBOLS),
    speed=0,
    start_when=tuple(
        f"{symbol.lower()}@{kind}" for symbol in SYMBOLS for kind in ("trade", "depth@100ms")
    ),
)


def plain(number: Decimal) -> str:
    printed = f"{number:f}"
    return printed.rstrip("0").rstrip(".") if "." in printed else printed


def digest(client: SheetClient, symbol: str) -> str:
    book = client.books[symbol]
    lines = [f"bid {plain(p)} {plain(q)}\n" for p, q in sorted(book.bids.items(), reverse=True)]
    lines += [f"ask {plain(p)} {plain(q)}\n" for p, q in sorted(book.asks.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


async def until_last(client: SheetClient) -> None:
    while any(
        client.books[symbol].update_id < ORACLE[symbol]["book"]["last_u"]
        or client.trades[symbol].newest != ORACLE[symbol]["trade"]["last_id"]
        for symbol in SYMBOLS
    ):
        await asyncio.sleep(0.02)


def assert_results(client: SheetClient) -> None:
    for symbol in SYMBOLS:
        expected = ORACLE[symbol]
        trades = client.trades[symbol].rows
        assert len(trades) == expected["trade"]["count"]
        assert (min(trades), max(trades)) == (
            expected["trade"]["first_id"],
            expected["trade"]["last_id"],
        )
        total = sum((price * size for price, size, _, _ in trades.values()), Decimal(0))
        assert plain(total) == expected["trade"]["sum_px_qty"]
        assert digest(client, symbol) == expected["book"]["sha256"]


@pytest.mark.parametrize("speed", [0, 100])
async def test_a_replay_gives_the_results_at_any_speed(speed: float) -> None:
    async with (
        Simulator(replace(CONFIG, speed=speed)) as simulator,
        SheetClient(simulator.ws_url, simulator.url, list(SYMBOLS), silence=PATIENCE) as client,
        asyncio.timeout(PATIENCE),
    ):
        await until_last(client)
        await simulator.source.finished.wait()
        assert_results(client)
        assert client.connects == 1


async def test_a_client_that_was_cut_off_catches_up_by_rest_and_resyncs_its_books() -> None:
    async with (
        Simulator(replace(CONFIG, speed=60)) as simulator,
        SheetClient(simulator.ws_url, simulator.url, list(SYMBOLS), silence=PATIENCE) as client,
        asyncio.timeout(PATIENCE),
    ):
        truth, running = simulator.truth, simulator.exchange.is_running
        while any(len(client.trades[symbol].rows) < 20 for symbol in SYMBOLS):
            await asyncio.sleep(0.01)
        simulator.inject(Order("refuse_handshake", 1_000))
        simulator.inject(Order("cut"))
        cut_at = {symbol: truth.count(symbol) for symbol in SYMBOLS}
        while any(truth.count(symbol) < cut_at[symbol] + 10 for symbol in SYMBOLS):
            await asyncio.sleep(0.01)
        running.clear()
        while simulator.source.state != "stopped":
            await asyncio.sleep(0.01)
        simulator.quiet()
        while not all(simulator.exchange.hub.wants(stream) for stream in CONFIG.start_when):
            await asyncio.sleep(0.01)
        running.set()
        await simulator.source.finished.wait()
        for symbol in SYMBOLS:
            await client.reach(symbol, ORACLE[symbol]["trade"]["last_id"])
        await until_last(client)
        assert client.connects == 2
        assert_results(client)


async def test_nothing_starts_before_the_expected_streams_are_subscribed() -> None:
    async with (
        Simulator(CONFIG) as simulator,
        connect(f"{simulator.ws_url}/ws/{CONFIG.start_when[0]}", close_timeout=0.2),
    ):
        await asyncio.sleep(0.1)
        assert simulator.source.state == "waiting"
        assert simulator.truth.count("BTCUSDT") == 0


async def test_the_recorded_snapshot_is_waited_for_and_served() -> None:
    config = replace(CONFIG, recordings=CONFIG.recordings[:1], start_when=CONFIG.start_when[:2])
    path = "/stream?streams=" + "/".join(config.start_when)
    async with (
        Simulator(config) as simulator,
        aiohttp.ClientSession() as http,
        connect(simulator.ws_url + path, close_timeout=0.2) as client,
        asyncio.timeout(PATIENCE),
    ):
        while "snapshot" not in simulator.source.state:
            await client.recv()
        expected = ORACLE["BTCUSDT"]["book"]["snapshot_lastUpdateId"]
        depth = f"{simulator.url}/api/v3/depth?symbol=BTCUSDT&limit=5000"
        async with http.get(depth) as answer:
            assert json.loads(await answer.text())["lastUpdateId"] == expected
        while simulator.truth.update_id("BTCUSDT") == expected:
            await client.recv()


async def test_a_slow_reader_slows_the_source_and_loses_nothing() -> None:
    streams = ("btcusdt@trade", "btcusdt@bookTicker", "btcusdt@depth@100ms")
    config = replace(CONFIG, recordings=CONFIG.recordings[:1], start_when=streams[:2])
    path = "/stream?streams=" + "/".join(streams)
    count = ORACLE["BTCUSDT"]["trade"]["count"]
    async with (
        Simulator(replace(config, is_paused=True)) as simulator,
        connect(simulator.ws_url + path, close_timeout=0.2) as client,
        asyncio.timeout(PATIENCE),
    ):
        while not simulator.connections:
            await asyncio.sleep(0.01)
        simulator.inject(Order("slow", options={"bytes_per_second": 100}))
        simulator.exchange.is_running.set()
        while simulator.connections[1].buffered <= HIGH_WATER:
            await asyncio.sleep(0.01)
        held_at = simulator.truth.count("BTCUSDT")
        assert held_at < count
        await asyncio.sleep(0.1)
        assert simulator.truth.count("BTCUSDT") == held_at
        simulator.quiet()
        ids = []
        while len(ids) < count:
            message = json.loads(await client.recv())
            if message["stream"] == "btcusdt@trade":
                ids.append(message["data"]["t"])
        first_id = ORACLE["BTCUSDT"]["trade"]["first_id"]
        assert ids == list(range(first_id, first_id + count))


@pytest.mark.skipif(not RECORDINGS.is_dir(), reason="the real recordings are not here")
async def test_a_real_recording_gives_its_results() -> None:
    files = tuple(sorted((RECORDINGS / "binance-spot").glob("spot_btcusdt_*")))
    oracle = json.loads((RECORDINGS / "oracles/binance-spot_btcusdt.json").read_text())
    expected = oracle["symbols"]["BTCUSDT"]
    config = replace(CONFIG, recordings=files, start_when=())
    async with Simulator(config) as simulator, asyncio.timeout(PATIENCE):
        await simulator.source.finished.wait()
        assert simulator.truth.count("BTCUSDT") == expected["trade"]["count"]
        book = simulator.truth.book("BTCUSDT")
        assert book.update_id == expected["book"]["last_u"]
        bids = sorted(book.bids.items(), reverse=True)
        lines = [f"bid {in_text(p)} {in_text(q)}\n" for p, q in bids]
        lines += [f"ask {in_text(p)} {in_text(q)}\n" for p, q in sorted(book.asks.items())]
        assert hashlib.sha256("".join(lines).encode()).hexdigest() == expected["book"]["sha256"]


def in_text(units: int) -> str:
    return plain(Decimal(units).scaleb(-8))
