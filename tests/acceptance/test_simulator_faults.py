"""Every fault of the simulator, seen from outside."""

import asyncio
import contextlib
import errno
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from urllib.parse import urlsplit

import aiohttp
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from sluice.simulator import Order, Simulator, SimulatorConfig
from sluice.simulator.faults import CONNECTION, CONTROL, HANDSHAKE, KINDS, MESSAGE, REST, STANDING

PATIENCE = 60
CONFIG = SimulatorConfig(symbols=("BTCUSDT",), seed=11, rate=100)
PINGING = replace(CONFIG, ping_interval=0.1, messages_per_second=1_000)
BRIEF = aiohttp.ClientWSTimeout(ws_close=0.2)
TRADE = "btcusdt@trade"


@contextlib.asynccontextmanager
async def running(config: SimulatorConfig = CONFIG) -> AsyncIterator[Simulator]:
    async with Simulator(config) as simulator, asyncio.timeout(PATIENCE):
        yield simulator


def socket(simulator: Simulator, path: str = f"/ws/{TRADE}") -> connect:
    return connect(simulator.ws_url + path, max_size=None, ping_interval=None, close_timeout=0.2)


async def frames(client: ClientConnection) -> AsyncIterator[bytes | str]:
    """Frames as they came: text stays undecoded, so that bad UTF-8 shows."""
    while True:
        yield await client.recv(decode=False)


def is_trade(frame: bytes | str) -> bool:
    try:
        message = json.loads(frame)
    except (ValueError, RecursionError):
        return False
    return isinstance(message, dict) and isinstance(message.get("p"), str) and "Zz" not in message


def is_not_json(frame: bytes) -> bool:
    try:
        json.loads(frame)
    except RecursionError:
        return False
    except ValueError:
        return True
    return False


def is_not_utf8(frame: bytes) -> bool:
    try:
        frame.decode()
    except UnicodeDecodeError:
        return True
    return False


# How each damaged or strange message looks from outside.
LOOKS: dict[str, Callable[[bytes], bool]] = {
    "truncate": lambda frame: frame.startswith(b"{") and is_not_json(frame),
    "bad_utf8": is_not_utf8,
    "wrong_type": lambda frame: json.loads(frame)["p"] == 1.5,
    "nan": lambda frame: json.loads(frame)["p"] == "NaN",
    "huge": lambda frame: len(frame) > 1 << 20,
    "deep": lambda frame: frame.count(b"[") > 10_000,
    "binary": lambda frame: frame.startswith(b"\x00"),
    "unknown_event": lambda frame: json.loads(frame)["e"] == "somethingNew",
    "extra_fields": lambda frame: json.loads(frame)["Zz"] == {"new": [1, 2, 3]},
    "empty_frame": lambda frame: frame == b"",
}


@pytest.mark.parametrize("kind", LOOKS)
async def test_a_strange_message_is_seen(kind: str) -> None:
    async with running() as simulator:
        simulator.inject(Order(kind, on=TRADE, after=2))
        async with socket(simulator) as client:
            strange = [await client.recv(decode=False) for _ in range(3)]
        assert is_trade(strange[0])
        assert is_trade(strange[1])
        assert LOOKS[kind](strange[2])
        assert simulator.truth.counts == {kind: 1}
        (injected,) = simulator.truth.faults
        assert (injected.kind, injected.detail["stream"]) == (kind, TRADE)


async def test_dropped_trades_are_missed_on_the_socket_and_served_by_rest() -> None:
    async with running() as simulator:
        simulator.inject(Order("drop", 3, TRADE, after=2))
        async with socket(simulator) as client:
            seen = [json.loads(await client.recv())["t"] for _ in range(5)]
        withheld = simulator.truth.withheld("BTCUSDT")
        assert withheld == [seen[1] + 1, seen[1] + 2, seen[1] + 3]
        assert seen[2] == seen[1] + 4
        page = await rest(simulator, f"historicalTrades?symbol=BTCUSDT&fromId={withheld[0]}")
        assert [row["id"] for row in page.json[:3]] == withheld


async def test_a_trade_comes_twice() -> None:
    async with running() as simulator:
        simulator.inject(Order("duplicate", on=TRADE))
        async with socket(simulator) as client:
            assert await client.recv() == await client.recv()


async def test_a_trade_comes_after_its_successor() -> None:
    async with running() as simulator:
        simulator.inject(Order("reorder", on=TRADE))
        async with socket(simulator) as client:
            first, second, third = [json.loads(await client.recv())["t"] for _ in range(3)]
        assert (second, third) == (first - 1, first + 1)


async def test_a_diff_is_dropped_and_its_ids_are_named() -> None:
    async with running() as simulator:
        simulator.inject(Order("drop", on="*@depth@100ms", after=1))
        async with socket(simulator, "/ws/btcusdt@depth@100ms") as client:
            before, after = [json.loads(await client.recv()) for _ in range(2)]
        assert simulator.truth.faults[0].detail["update_ids"] == [before["u"] + 1, after["U"] - 1]


async def test_messages_go_wrong_by_seed_and_rate() -> None:
    config = replace(CONFIG, fault_rates={"drop": 0.5}, fault_seed=4, start_when=(TRADE,))
    patterns = []
    for _ in range(2):
        async with running(config) as simulator, socket(simulator) as client:
            for _ in range(20):
                last_id = json.loads(await client.recv())["t"]
            first_id = simulator.truth.ids("BTCUSDT")[0]
            withheld = simulator.truth.withheld("BTCUSDT")
            patterns.append([first_id + n in withheld for n in range(last_id - first_id)])
    same = min(map(len, patterns))
    assert any(patterns[0])
    assert patterns[0][:same] == patterns[1][:same]


async def closed(client: ClientConnection) -> ConnectionClosed:
    with pytest.raises(ConnectionClosed) as ending:
        async for _ in frames(client):
            pass
    return ending.value


async def test_a_connection_is_reset() -> None:
    async with running() as simulator, aiohttp.ClientSession() as http:
        url = f"{simulator.ws_url}/ws/{TRADE}"
        async with http.ws_connect(url) as client:
            await client.receive()
            assert simulator.inject(Order("cut")) == 1
            while (message := await client.receive()).type is aiohttp.WSMsgType.TEXT:
                pass
            # Whoever reads from the kernel first hears of the reset; no close frame came.
            assert client.close_code != 1000
            assert message.type in {aiohttp.WSMsgType.ERROR, aiohttp.WSMsgType.CLOSED}


async def test_a_connection_is_reset_at_the_level_of_tcp() -> None:
    async with running() as simulator:
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(simulator.url).port)
        writer.write(
            b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        simulator.inject(Order("cut"))
        with pytest.raises(ConnectionResetError) as reset:
            await reader.read()
        assert reset.value.errno == errno.ECONNRESET
        writer.close()


async def test_a_connection_ends_in_the_middle_of_a_frame() -> None:
    async with running() as simulator, socket(simulator) as client:
        await client.recv()
        simulator.inject(Order("cut_mid_frame"))
        ending = await closed(client)
        assert ending.rcvd is None


@pytest.mark.parametrize("code", [1000, 1001, 1006, 1008, 1011, 1012, 1013])
async def test_a_connection_is_closed_with_a_code(code: int) -> None:
    async with running() as simulator, socket(simulator) as client:
        await client.recv()
        if code == 1006:  # the code that stands for no close frame at all
            simulator.inject(Order("cut"))
            assert (await closed(client)).rcvd is None
        else:
            simulator.inject(Order("close", options={"code": code}))
            assert (await closed(client)).rcvd.code == code


async def test_a_stalled_connection_pings_and_says_nothing() -> None:
    config = replace(PINGING, is_paused=True)  # nothing is sent before the fault
    async with running(config) as simulator, aiohttp.ClientSession() as http:
        url = f"{simulator.ws_url}/ws/{TRADE}"
        async with http.ws_connect(url, autoping=False) as stalled, socket(simulator) as other:
            assert simulator.inject(Order("stall"), 1) == 1
            simulator.exchange.is_running.set()
            kinds = set()
            for _ in range(20):
                await other.recv()
            while aiohttp.WSMsgType.PING not in kinds:
                kinds.add((await stalled.receive()).type)
            assert simulator.connections[1].sent == 0
            assert kinds == {aiohttp.WSMsgType.PING}


async def test_a_half_open_connection_does_not_even_ping() -> None:
    async with running(PINGING) as simulator, aiohttp.ClientSession() as http:
        url = f"{simulator.ws_url}/ws"
        async with (
            http.ws_connect(url, autoping=False, timeout=BRIEF) as dead,
            http.ws_connect(url, autoping=False) as alive,
        ):
            assert simulator.inject(Order("half_open"), 1) == 1
            await dead.ping(b"anybody?")
            await alive.ping(b"anybody?")
            seen: set[aiohttp.WSMsgType] = set()
            while seen != {aiohttp.WSMsgType.PING, aiohttp.WSMsgType.PONG}:
                seen.add((await alive.receive()).type)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await dead.receive()


async def test_a_slow_connection_falls_behind_and_catches_up_whole() -> None:
    async with running() as simulator, socket(simulator) as slow, socket(simulator) as fast:
        simulator.inject(Order("slow", options={"bytes_per_second": 200}), 1)
        ids = [json.loads(await fast.recv())["t"] for _ in range(30)]
        assert simulator.connections[1].sent >= 30
        assert simulator.connections[1].buffered > 0
        late = [json.loads(await slow.recv())["t"]]
        simulator.quiet()
        while late[-1] < ids[-1]:
            late.append(json.loads(await slow.recv())["t"])
        assert late == list(range(late[0], late[-1] + 1))


@pytest.mark.parametrize("is_combined", [False, True])
async def test_a_shutdown_is_announced_and_comes(is_combined: bool) -> None:  # noqa: FBT001 - pytest
    path = f"/stream?streams={TRADE}" if is_combined else f"/ws/{TRADE}"
    async with running() as simulator, socket(simulator, path) as client:
        await client.recv()
        simulator.inject(Order("shutdown", options={"grace": 0.05}))
        messages = [json.loads(frame) async for frame in client]  # 1001 ends it in peace
        if is_combined:
            (message,) = [m["data"] for m in messages if m["stream"] == "!serverShutdown"]
        else:
            (message,) = [m for m in messages if m["e"] == "serverShutdown"]
        assert message.keys() == {"e", "E"}
        assert client.close_code == 1001


async def test_a_handshake_is_refused() -> None:
    async with running() as simulator:
        simulator.inject(Order("refuse_handshake"))
        with pytest.raises(InvalidStatus) as refusal:
            async with socket(simulator):
                pass
        assert refusal.value.response.status_code == 503
        async with socket(simulator) as client:
            assert is_trade(await client.recv())


async def subscribe(client: ClientConnection, name: str = TRADE) -> None:
    await client.send(json.dumps({"method": "SUBSCRIBE", "params": [name], "id": 1}))


async def test_a_subscription_is_acked_but_silent() -> None:
    async with running() as simulator, socket(simulator, "/ws") as client:
        simulator.inject(Order("acked_but_silent"))
        await subscribe(client)
        assert json.loads(await client.recv()) == {"result": None, "id": 1}
        async with socket(simulator) as other:
            for _ in range(20):
                await other.recv()
        assert simulator.connections[1].sent == 0


async def test_a_subscription_is_refused() -> None:
    async with running() as simulator, socket(simulator, "/ws") as client:
        simulator.inject(Order("ack_error"))
        await subscribe(client)
        answer = json.loads(await client.recv())
        assert (answer["id"], answer["error"]["code"]) == (1, 2)


@pytest.mark.parametrize(("kind", "acks"), [("ack_missing", 0), ("ack_late", 1)])
async def test_an_ack_comes_late_or_never(kind: str, acks: int) -> None:
    async with running() as simulator, socket(simulator, "/ws") as client:
        simulator.inject(Order(kind, options={"seconds": 0.5}))
        await subscribe(client)
        messages = [json.loads(await client.recv())]
        while "result" not in messages[-1] if acks else len(messages) < 40:
            messages.append(json.loads(await client.recv()))
        assert "t" in messages[0]
        assert sum("result" in message for message in messages) == acks


class Answer:
    """What REST said."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        self.status = response.status
        self.type = response.content_type
        self.headers = response.headers
        self.body = body

    @property
    def json(self) -> object:
        return json.loads(self.body)


async def rest(simulator: Simulator, path: str) -> Answer:
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{simulator.url}/api/v3/{path}") as response,
    ):
        return Answer(response, await response.read())


STATUSES = {
    "rest_403": (403, "text/html"),
    "rest_451": (451, "application/json"),
    "rest_500": (500, "application/json"),
    "rest_502": (502, "text/html"),
    "rest_503": (503, "application/json"),
    "rest_504": (504, "application/json"),
    "rest_html": (200, "text/html"),
    "rest_empty": (200, "application/json"),
    "rest_truncated": (200, "application/json"),
    "rest_429": (429, "application/json"),
    "rest_418": (418, "application/json"),
}


@pytest.mark.parametrize("kind", STATUSES)
async def test_a_request_is_answered_badly(kind: str) -> None:
    async with running() as simulator:
        simulator.inject(Order(kind, on="depth/BTCUSDT", options={"seconds": 600}))
        assert (await rest(simulator, "time")).status == 200
        answer = await rest(simulator, "depth?symbol=BTCUSDT")
        assert (answer.status, answer.type) == STATUSES[kind]
        assert simulator.truth.counts == {kind: 1}
        if kind in {"rest_429", "rest_418"}:
            assert answer.headers["Retry-After"] == "600"
            assert answer.json["code"] == -1003
        if kind in {"rest_html", "rest_empty", "rest_truncated"}:
            with pytest.raises(ValueError, match="char"):
                _ = answer.json
        # A ban goes on; everything else was one answer.
        again = await rest(simulator, "depth?symbol=BTCUSDT")
        assert again.status == (418 if kind == "rest_418" else 200)


async def test_a_request_is_cut_off() -> None:
    async with running() as simulator:
        simulator.inject(Order("rest_cut", 2))  # aiohttp asks a second time by itself
        with pytest.raises(aiohttp.ClientError):
            await rest(simulator, "time")


async def test_a_request_stalls_and_is_answered() -> None:
    async with running() as simulator:
        simulator.inject(Order("rest_stall", options={"seconds": 0.4}))
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert (await rest(simulator, "time")).status == 200
        assert loop.time() - began >= 0.39


async def with_trades(simulator: Simulator, count: int) -> None:
    while simulator.truth.count("BTCUSDT") < count:
        await asyncio.sleep(0.01)


async def test_a_page_is_empty() -> None:
    async with running() as simulator:
        await with_trades(simulator, 3)
        simulator.inject(Order("empty_page"))
        assert (await rest(simulator, "trades?symbol=BTCUSDT")).json == []
        assert len((await rest(simulator, "trades?symbol=BTCUSDT")).json) >= 3


async def test_pages_have_no_end() -> None:
    async with running() as simulator:
        await with_trades(simulator, 10)
        simulator.inject(Order("endless_page", 3))
        from_id = simulator.truth.ids("BTCUSDT")[1] + 1_000
        path = f"historicalTrades?symbol=BTCUSDT&fromId={from_id}&limit=5"
        for _ in range(3):
            page = (await rest(simulator, path)).json
            assert len(page) == 5
            assert page[-1]["id"] < from_id
        assert (await rest(simulator, path)).json == []


async def test_a_snapshot_is_older_than_the_buffer_several_times() -> None:
    async with running() as simulator:
        path = "/ws/btcusdt@depth@100ms"
        async with socket(simulator, path) as client:
            await client.recv()
        async with socket(simulator, path) as client:
            first = json.loads(await client.recv())["U"]
            simulator.inject(Order("stale_snapshot", 3))
            for _ in range(3):
                answer = await rest(simulator, "depth?symbol=BTCUSDT&limit=5000")
                assert answer.json["lastUpdateId"] < first - 1
            answer = await rest(simulator, "depth?symbol=BTCUSDT&limit=5000")
            assert answer.json["lastUpdateId"] >= first - 1


async def test_ids_are_hidden_from_rest() -> None:
    async with running() as simulator:
        await with_trades(simulator, 5)
        first = simulator.truth.ids("BTCUSDT")[0]
        simulator.exchange.hide("BTCUSDT", [first + 1, first + 2])
        page = (await rest(simulator, f"historicalTrades?symbol=BTCUSDT&fromId={first + 1}")).json
        assert page[0]["id"] == first + 3
        assert simulator.truth.hidden("BTCUSDT") == [first + 1, first + 2]


async def test_retired_ids_are_served_within_aggregates_alone() -> None:
    async with running() as simulator:
        await with_trades(simulator, 5)
        first = simulator.truth.ids("BTCUSDT")[0]
        simulator.exchange.retire("BTCUSDT", [first + 1, first + 2])
        page = (await rest(simulator, f"historicalTrades?symbol=BTCUSDT&fromId={first + 1}")).json
        assert page[0]["id"] == first + 3
        aggregates = (await rest(simulator, "aggTrades?symbol=BTCUSDT&limit=1000")).json
        held = {n for each in aggregates for n in range(each["f"], each["l"] + 1)}
        assert {first + 1, first + 2} <= held


async def test_the_clock_is_an_hour_off_for_socket_and_rest_alike() -> None:
    hour = 3_600_000
    async with running() as simulator, socket(simulator) as client:
        before = json.loads(await client.recv())
        simulator.exchange.skew_clock(hour)
        message = before
        while message["T"] < before["T"] + hour:
            message = json.loads(await client.recv())
        page = await rest(
            simulator, f"historicalTrades?symbol=BTCUSDT&fromId={message['t']}&limit=1"
        )
        assert page.json[0]["time"] == message["T"]
        assert (await rest(simulator, "time")).json["serverTime"] >= before["T"] + hour
        assert simulator.truth.counts == {"skew": 1}


def test_all_faults_are_covered_here() -> None:
    elsewhere = {
        "drop", "duplicate", "reorder", "cut", "cut_mid_frame", "close", "stall", "half_open",
        "slow", "shutdown", "refuse_handshake", "acked_but_silent", "ack_error", "ack_missing",
        "ack_late", "rest_cut", "rest_stall", "empty_page", "endless_page", "stale_snapshot",
        "hide", "retire", "skew",
    }  # fmt: skip
    assert LOOKS.keys() | STATUSES.keys() | elsewhere == KINDS
    assert MESSAGE | CONNECTION | HANDSHAKE | CONTROL | REST | STANDING == KINDS
