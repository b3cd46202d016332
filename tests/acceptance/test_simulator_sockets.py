"""The simulator's sockets, as the sheet prints them."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import aiohttp
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from sluice.simulator import Order, Simulator, SimulatorConfig

PATIENCE = 60
CONFIG = SimulatorConfig(symbols=("BTCUSDT", "SOLUSDT"), seed=2, rate=100)


@contextlib.asynccontextmanager
async def running(config: SimulatorConfig = CONFIG) -> AsyncIterator[Simulator]:
    async with Simulator(config) as simulator, asyncio.timeout(PATIENCE):
        yield simulator


def socket(simulator: Simulator, path: str) -> connect:
    return connect(simulator.ws_url + path, ping_interval=None, close_timeout=0.2)


async def ask(client: ClientConnection, method: str, *params: object, number: object = 1) -> Any:
    """Send a control message and give its answer; data in between is let go."""
    request = {"method": method, "id": number}
    if params:
        request["params"] = list(params)
    return await ask_raw(client, json.dumps(request))


async def ask_raw(client: ClientConnection, text: str) -> Any:
    await client.send(text)
    while True:
        answer = json.loads(await client.recv())
        if "id" in answer:
            return answer


# Fields of each stream's payload, in the order printed in the sheet.
SHAPES = {
    "trade": "e E s t p q T m M",
    "aggTrade": "e E s a p q f l T m M",
    "kline_1s": "e E s k",
    "kline_1m": "e E s k",
    "kline_1d@+08:00": "e E s k",
    "miniTicker": "e E s c o h l v q",
    "ticker": "e E s p P w x c Q b B a A o h l v q O C F L n",
    "ticker_1h": "e E s p P o h l c w v q O C F L n",
    "bookTicker": "u s b B a A",
    "depth": "e E s U u b a",
    "depth@100ms": "e E s U u b a",
    "depth5": "lastUpdateId bids asks",
    "depth20@100ms": "lastUpdateId bids asks",
}


async def test_every_stream_has_the_fields_of_the_sheet_raw_and_combined() -> None:
    names = [f"btcusdt@{kind}" for kind in SHAPES]
    async with running() as simulator:
        async with socket(simulator, "/stream?streams=" + "/".join(names)) as client:
            found: dict[str, dict] = {}
            while len(found) < len(names):
                message = json.loads(await client.recv())
                assert list(message) == ["stream", "data"]
                found[message["stream"]] = message["data"]
        for kind, fields in SHAPES.items():
            assert list(found[f"btcusdt@{kind}"]) == fields.split()
        kline = found["btcusdt@kline_1m"]["k"]
        assert " ".join(kline) == "t T s i f L o c h l v n x q V Q B"
        async with socket(simulator, "/ws/btcusdt@trade/solusdt@trade") as client:
            symbols = set()
            while len(symbols) < 2:
                message = json.loads(await client.recv())
                assert list(message) == SHAPES["trade"].split()
                symbols.add(message["s"])


async def test_all_market_arrays_hold_the_symbols_that_changed() -> None:
    async with running() as simulator, socket(simulator, "/ws/!miniTicker@arr") as client:
        symbols = set()
        while symbols != set(CONFIG.symbols):
            symbols.update(ticker["s"] for ticker in json.loads(await client.recv()))


@pytest.mark.parametrize("speed", ["depth", "depth@100ms"])
async def test_diffs_continue_each_other_and_trades_count_up(speed: str) -> None:
    path = f"/stream?streams=btcusdt@{speed}/btcusdt@trade/btcusdt@aggTrade"
    async with running() as simulator, socket(simulator, path) as client:
        diffs, trades, aggs = [], [], []
        while len(diffs) < 3:
            data = json.loads(await client.recv())["data"]
            {"depthUpdate": diffs, "trade": trades, "aggTrade": aggs}[data["e"]].append(data)
        for before, after in pairwise(diffs):
            assert after["U"] == before["u"] + 1
        ids = [trade["t"] for trade in trades]
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        for before, after in pairwise(aggs):
            assert (after["a"], after["f"]) == (before["a"] + 1, before["l"] + 1)
        by_id = {trade["t"]: trade for trade in trades}
        for agg in aggs[1:]:
            fills = [by_id[n] for n in range(agg["f"], agg["l"] + 1)]
            assert {fill["p"] for fill in fills} == {agg["p"]}
            assert sum(units(fill["q"]) for fill in fills) == units(agg["q"])


def units(text: str) -> int:
    return int(text.replace(".", ""))


async def test_partial_depth_and_best_quotes_are_the_book_at_their_update_id() -> None:
    path = "/stream?streams=btcusdt@depth10@100ms/btcusdt@bookTicker"
    async with running() as simulator, socket(simulator, path) as client:
        seen = set()
        for _ in range(30):
            message = json.loads(await client.recv())
            seen.add(message["stream"])
            data = message["data"]
            book = simulator.truth.book("BTCUSDT", data.get("lastUpdateId", data.get("u")))
            bids = sorted(book.bids.items(), reverse=True)[:10]
            asks = sorted(book.asks.items())[:10]
            if "bids" in data:
                assert [(units(p), units(q)) for p, q in data["bids"]] == bids
                assert [(units(p), units(q)) for p, q in data["asks"]] == asks
            else:
                assert (units(data["b"]), units(data["B"])) == bids[0]
                assert (units(data["a"]), units(data["A"])) == asks[0]
        assert len(seen) == 2


async def test_a_bar_closes_with_all_its_trades() -> None:
    async with running() as simulator, socket(simulator, "/ws/btcusdt@kline_1s") as client:
        closed = []
        while len(closed) < 2:
            kline = json.loads(await client.recv())["k"]
            if kline["x"] and kline["n"]:
                closed.append(kline)
        for kline in closed:
            trades = [
                trade
                for trade in simulator.truth.trades("BTCUSDT")
                if kline["t"] <= trade.time <= kline["T"]
            ]
            assert kline["n"] == len(trades)
            assert units(kline["v"]) == sum(trade.quantity for trade in trades)
            assert (kline["f"], kline["L"]) == (trades[0].id, trades[-1].id)
            assert units(kline["h"]) == max(trade.price for trade in trades)
        assert closed[1]["t"] > closed[0]["T"]


async def test_control_messages_are_answered() -> None:
    async with running() as simulator, socket(simulator, "/ws") as client:
        assert await ask(client, "SUBSCRIBE", "btcusdt@depth", number=7) == {
            "result": None,
            "id": 7,
        }
        listed = await ask(client, "LIST_SUBSCRIPTIONS", number="a1")
        assert listed == {"result": ["btcusdt@depth"], "id": "a1"}
        unsubscribed = await ask(client, "UNSUBSCRIBE", "btcusdt@depth", number=None)
        assert unsubscribed == {"result": None, "id": None}
        assert await ask(client, "LIST_SUBSCRIPTIONS") == {"result": [], "id": 1}
    async with running() as simulator, socket(simulator, "/ws/btcusdt@trade") as client:
        assert await ask(client, "GET_PROPERTY", "combined") == {"result": False, "id": 1}
        assert await ask(client, "SET_PROPERTY", "combined", True) == {"result": None, "id": 1}  # noqa: FBT003 - a property's value
        assert list(json.loads(await client.recv())) == ["stream", "data"]


ERRORS = [
    ('{"method":"GET_PROPERTY","params":["x"],"id":1}', 0, 1),
    ('{"method":"SET_PROPERTY","params":["combined",1],"id":1}', 1, 1),
    ('{"method":"SET_PROPERTY","params":[1],"id":1}', 2, 1),
    ('{"method":"FLY","id":4}', 2, None),
    ('{"id":4}', 2, None),
    ('{"method":"SUBSCRIBE","params":["a@trade"],"id":1.5}', 2, None),
    ("what?", 3, None),
]


@pytest.mark.parametrize("is_nested", [True, False])
async def test_errors_are_nested_as_seen_or_flat_as_printed(is_nested: bool) -> None:  # noqa: FBT001 - pytest
    config = replace(CONFIG, are_errors_nested=is_nested, messages_per_second=1_000)
    async with running(config) as simulator, socket(simulator, "/ws") as client:
        for text, code, number in ERRORS:
            answer = await ask_raw(client, text)
            error = answer["error"] if is_nested else answer
            assert (error["code"], answer["id"]) == (code, number)
            assert error["msg"]


async def test_names_are_lowercase_and_unknown_ones_are_acked_and_silent() -> None:
    async with running() as simulator, socket(simulator, "/ws") as client:
        for name in ("BTCUSDT@trade", "nosuch@trade"):
            assert await ask(client, "SUBSCRIBE", name) == {"result": None, "id": 1}
        async with socket(simulator, "/ws/btcusdt@trade") as other:
            for _ in range(20):
                await other.recv()
        assert simulator.connections[1].sent == 0


async def test_unknown_names_are_refused_where_configured() -> None:
    config = replace(CONFIG, are_unknown_symbols_refused=True)
    async with running(config) as simulator, socket(simulator, "/ws") as client:
        answer = await ask(client, "SUBSCRIBE", "000usdt@trade")
        assert answer["error"]["data"] == "000usdt@trade"
        with pytest.raises(ConnectionClosed):
            await client.recv()


async def test_times_are_microseconds_where_the_address_says_so() -> None:
    streams = "btcusdt@trade/btcusdt@kline_1s"
    path = f"/stream?streams={streams}&timeUnit=microsecond"
    async with running() as simulator, socket(simulator, path) as client:
        seen = {}
        while len(seen) < 2:
            message = json.loads(await client.recv())
            seen[message["data"]["e"]] = message["data"]
        trade = simulator.truth.trade("BTCUSDT", seen["trade"]["t"])
        assert seen["trade"]["T"] == trade.time * 1000
        assert len(str(seen["kline"]["k"]["t"])) == 16


async def ends(client: ClientConnection) -> int:
    with contextlib.suppress(ConnectionClosed):
        while True:
            await client.recv()
    return client.close_code


async def test_too_many_messages_in_a_second_end_the_connection() -> None:
    # So many that some second holds more than the limit, however slow the machine.
    async with running() as simulator, socket(simulator, "/ws") as client:
        with contextlib.suppress(ConnectionClosed):
            for _ in range(500):
                await client.send('{"method":"LIST_SUBSCRIPTIONS","id":1}')
        assert await ends(client) == 1008


@pytest.mark.parametrize("has_wrong_echo", [True, False])
async def test_a_client_that_never_echoes_a_ping_is_closed(has_wrong_echo: bool) -> None:  # noqa: FBT001 - pytest
    config = replace(CONFIG, ping_interval=0.05, pong_timeout=0.2, messages_per_second=1_000)
    async with running(config) as simulator, aiohttp.ClientSession() as http:
        async with http.ws_connect(f"{simulator.ws_url}/ws", autoping=False) as client:
            while (message := await client.receive()).type is aiohttp.WSMsgType.PING:
                if has_wrong_echo:
                    await client.pong(b"unsolicited")
        assert client.close_code == 1008
        assert message.extra == "Pong timeout"


async def test_a_client_that_echoes_every_ping_stays() -> None:
    config = replace(CONFIG, ping_interval=0.02, pong_timeout=30, messages_per_second=1_000)
    async with (
        running(config) as simulator,
        aiohttp.ClientSession() as http,
        http.ws_connect(f"{simulator.ws_url}/ws", autoping=False) as client,
    ):
        for _ in range(20):
            message = await client.receive()
            assert message.type is aiohttp.WSMsgType.PING
            await client.pong(message.data)
        await client.ping(b"mine")
        while message.type is not aiohttp.WSMsgType.PONG:
            message = await client.receive()
        assert message.data == b"mine"


async def test_more_than_the_streams_allowed_end_the_connection() -> None:
    names = [f"s{number}@trade" for number in range(1025)]
    async with running() as simulator, socket(simulator, "/ws") as client:
        await client.send(json.dumps({"method": "SUBSCRIBE", "params": names[:1024], "id": 1}))
        assert json.loads(await client.recv()) == {"result": None, "id": 1}
        await client.send(json.dumps({"method": "SUBSCRIBE", "params": names[1024:], "id": 2}))
        assert await ends(client) == 1008


async def test_more_connections_than_allowed_are_refused() -> None:
    async with running(replace(CONFIG, max_connects=2)) as simulator:
        for _ in range(2):
            async with socket(simulator, "/ws"):
                pass
        with pytest.raises(InvalidStatus) as refusal:
            async with socket(simulator, "/ws"):
                pass
        assert refusal.value.response.status_code == 429


async def test_a_connection_lives_its_time_and_hears_of_its_end() -> None:
    config = replace(CONFIG, lifetime=0.3, shutdown_notice=0.2)
    async with running(config) as simulator, socket(simulator, "/ws") as client:
        assert json.loads(await client.recv())["e"] == "serverShutdown"
        assert await ends(client) in {1001, 1008}


async def test_a_reader_too_slow_is_cut_rather_than_buffered_for() -> None:
    config = replace(CONFIG, max_buffered=20_000)
    path = "/ws/btcusdt@trade/btcusdt@bookTicker"
    async with running(config) as simulator, socket(simulator, path) as client:
        await client.recv()
        simulator.inject(Order("slow", options={"bytes_per_second": 20}))
        assert await ends(client) == 1006
