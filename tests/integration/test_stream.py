"""Sockets that stay open, against a real server that does what a venue's may do."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
from loguru import logger
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from sluice import stream as module
from sluice.exchanges import EXCHANGES
from sluice.stream import ConnectGate, Stream, split
from tests.faults.waiting import eventually
from tests.proxies import Asked, http_proxy, socks_proxy

VENUE = EXCHANGES["simulator"]
CHANNELS = ["btcusdt@trade"]


@dataclass
class Venue:
    """A server that greets each socket with its number and answers control messages.

    `behave` is what it does with a socket besides; by default it waits for the end.
    """

    behave: Callable[["Venue", ServerConnection, int], Awaitable[None]] | None = None
    is_answering: bool = True
    is_greeting: Callable[[int], bool] = lambda _: True
    refusals: int = 0
    opened: list[float] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    open: dict[int, ServerConnection] = field(default_factory=dict)
    asked: list[dict[str, object]] = field(default_factory=list)
    asked_at: list[float] = field(default_factory=list)
    url: str = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Venue"]:
        server: Server
        async with serve(
            self._handle, "127.0.0.1", 0, process_request=self._admit, close_timeout=1
        ) as server:
            self.url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            yield self

    def _admit(self, connection: ServerConnection, _: Request) -> Response | None:
        if self.refusals:
            self.refusals -= 1
            return connection.respond(503, "not now\n")
        return None

    async def _handle(self, connection: ServerConnection) -> None:
        self.opened.append(time.monotonic())
        number = len(self.opened)
        assert connection.request is not None
        self.paths.append(connection.request.path)
        self.open[number] = connection
        answering = asyncio.create_task(self._answer(connection))
        try:
            with suppress(ConnectionClosed):
                if self.is_greeting(number):
                    await connection.send(json.dumps({"hello": number}))
                if self.behave is not None:
                    await self.behave(self, connection, number)
                await connection.wait_closed()
        finally:
            del self.open[number]
            answering.cancel()

    async def _answer(self, connection: ServerConnection) -> None:
        with suppress(ConnectionClosed):
            async for message in connection:
                self.asked.append(json.loads(message))
                self.asked_at.append(time.monotonic())
                if self.is_answering:
                    await connection.send(json.dumps({"result": None, "id": self.asked[-1]["id"]}))


@dataclass
class Client:
    """A stream, and what it called back."""

    frames: list[bytes] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    stream: Stream = field(init=False)

    @asynccontextmanager
    async def running(
        self, venue: Venue, channels: list[str] | None = None, proxy: str | None = None
    ) -> AsyncIterator["Client"]:
        self.stream = Stream(
            VENUE,
            venue.url,
            channels or CHANNELS,
            self._take,
            gate=ConnectGate(VENUE),
            on_connected=lambda: self.events.append("connected"),
            on_disconnected=self.events.append,
            proxy=proxy,
        )
        stop = asyncio.Event()
        task = asyncio.create_task(self.stream.run(stop))
        try:
            yield self
        finally:
            stop.set()
            await task

    def _take(self, _: Stream, frame: bytes, __: int) -> None:
        assert self.events[-1] == "connected", "a frame of no socket"
        self.frames.append(frame)

    @property
    def hellos(self) -> list[int]:
        read = [json.loads(frame) for frame in self.frames]
        return [message["hello"] for message in read if "hello" in message]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at sockets more often than in life."""
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.05)


async def test_frames_come_in_order_and_a_stop_closes_the_socket() -> None:
    async def send(_: Venue, connection: ServerConnection, __: int) -> None:
        for number in range(500):
            await connection.send(f'{{"n":{number}}}')

    async with Venue(send).serving() as venue:
        client = Client()
        async with client.running(venue):
            await eventually(lambda: len(client.frames) == 501)
            assert client.stream.is_connected
        assert client.frames[1:] == [b'{"n":%d}' % number for number in range(500)]
        assert client.events == ["connected", "stopped"]
        assert not client.stream.is_connected
        await eventually(lambda: not venue.open)
    assert venue.paths == ["/stream?streams=btcusdt@trade"]
    assert client.stream.counts.frames == 501
    assert client.stream.counts.disconnects.total() == 0


async def test_what_was_sent_before_the_stop_is_read() -> None:
    client = Client()

    async def send(_: Venue, connection: ServerConnection, __: int) -> None:
        for number in range(2000):
            await connection.send(f'{{"n":{number}}}')

    async with Venue(send).serving() as venue:
        async with client.running(venue):
            await eventually(lambda: len(client.frames) > 1)
        assert client.frames[1:] == [b'{"n":%d}' % n for n in range(len(client.frames) - 1)]


async def test_a_server_that_accepts_and_closes_is_not_hammered() -> None:
    async def close(_: Venue, connection: ServerConnection, __: int) -> None:
        await connection.close(1008, "no")

    async with Venue(close).serving() as venue, Client().running(venue) as client:
        await eventually(lambda: len(venue.opened) >= 4)
        pauses = [late - early for early, late in zip(venue.opened, venue.opened[1:], strict=False)]
        # Each is drawn from the upper half of 0.5, 1 and 2 s; the clock may tick in between.
        assert all(
            pause > least for pause, least in zip(pauses[:3], (0.24, 0.49, 0.99), strict=True)
        )
        assert client.stream.counts.disconnects["closed 1008"] >= 3
        assert client.events[:3] == ["connected", "closed 1008", "connected"]


async def test_a_refused_handshake_is_tried_again() -> None:
    async with Venue(refusals=2).serving() as venue, Client().running(venue) as client:
        await eventually(lambda: bool(client.frames))
        assert client.stream.counts.disconnects == {"not connected": 2}
        assert client.stream.counts.connects == 1


async def test_a_refusal_is_told_once_and_so_is_its_end() -> None:
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]))
    try:
        async with Venue(refusals=3).serving() as venue, Client().running(venue) as client:
            await eventually(lambda: bool(client.frames))
            assert client.stream.counts.disconnects == {"not connected": 3}
    finally:
        logger.remove(sink)
    told = [line for line in said if "socket" in line]
    assert len(told) == 2
    assert "no socket (InvalidStatus" in told[0]
    assert "there is a socket again" in told[1]


@pytest.mark.parametrize("kind", ["http", "socks"])
async def test_a_proxy_is_used(kind: str) -> None:
    asked: Asked = []
    through = http_proxy(asked) if kind == "http" else socks_proxy(asked)
    async with (
        Venue().serving() as venue,
        through as proxy,
        Client().running(venue, proxy=proxy) as client,
    ):
        await eventually(lambda: bool(client.frames))
        assert asked == [("127.0.0.1", int(venue.url.rpartition(":")[2]))]


async def test_a_proxy_that_refuses_is_tried_again() -> None:
    asked: Asked = []
    async with (
        Venue().serving() as venue,
        socks_proxy(asked, refusal=5) as proxy,
        Client().running(venue, proxy=proxy) as client,
    ):
        await eventually(lambda: len(asked) >= 2)
        assert client.stream.counts.disconnects["not connected"] >= 1


async def test_channels_are_added_and_dropped_on_the_open_socket() -> None:
    async with Venue().serving() as venue, Client().running(venue) as client:
        await eventually(lambda: client.hellos == [1])
        client.stream.carry(["ethusdt@trade", "solusdt@trade"])
        assert not client.stream.is_carrying
        await eventually(lambda: client.stream.is_carrying)
        await eventually(lambda: len(venue.asked) == 2)
        assert [(each["method"], each["params"]) for each in venue.asked] == [
            ("SUBSCRIBE", ["ethusdt@trade", "solusdt@trade"]),
            ("UNSUBSCRIBE", CHANNELS),
        ]
        await venue.open[1].close()
        await eventually(lambda: client.hellos == [1, 2])
    assert venue.paths[1] == "/stream?streams=ethusdt@trade/solusdt@trade"


async def test_a_socket_without_room_is_renewed_for_its_new_channels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(VENUE), "streams_per_socket", 1)
    async with Venue().serving() as venue, Client().running(venue) as client:
        await eventually(lambda: client.hellos == [1])
        client.stream.carry(["ethusdt@trade"])
        await eventually(lambda: list(venue.open) == [2])
        assert client.stream.is_carrying
        assert client.events == ["connected"]
    assert venue.asked == []
    assert venue.paths[1] == "/stream?streams=ethusdt@trade"


async def test_a_connection_that_is_cut_is_named_so() -> None:
    async def cut(_: Venue, connection: ServerConnection, number: int) -> None:
        if number == 1:
            connection.transport.abort()

    async with Venue(cut).serving() as venue, Client().running(venue) as client:
        await eventually(lambda: 2 in venue.open)
        await eventually(lambda: client.stream.is_connected)
        assert client.events[:2] == ["connected", "cut off"]


async def test_a_quiet_socket_that_answers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_SILENCE_SECONDS", 0.1)
    async with Venue().serving() as venue, Client().running(venue) as client:
        await eventually(lambda: len(venue.asked) >= 4)
        assert [message["method"] for message in venue.asked[:4]] == ["LIST_SUBSCRIPTIONS"] * 4
        assert len(venue.opened) == 1
        assert client.events == ["connected"]


async def test_a_silent_socket_that_does_not_answer_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LEAST_SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.2)
    async with Venue(is_answering=False).serving() as venue, Client().running(venue) as client:
        await eventually(lambda: len(venue.opened) >= 2)
        assert client.events[:2] == ["connected", "no answer"]
        assert client.stream.counts.disconnects["no answer"] >= 1


async def test_a_renewal_closes_the_old_socket_only_after_data_on_the_new_one() -> None:
    may_greet = asyncio.Event()

    async def greet(venue: Venue, connection: ServerConnection, number: int) -> None:
        if number == 2:
            await venue.open[1].send('{"still":1}')
            await may_greet.wait()
            await connection.send('{"hello":2}')

    async with (
        Venue(greet, is_greeting=lambda number: number == 1).serving() as venue,
        Client().running(venue) as client,
    ):
        await eventually(lambda: client.hellos == [1])
        client.stream.renew("a test")
        await eventually(lambda: b'{"still":1}' in client.frames)
        assert sorted(venue.open) == [1, 2]
        may_greet.set()
        await eventually(lambda: list(venue.open) == [2])
        assert client.hellos == [1, 2]
        assert client.events == ["connected"]
    assert venue.paths[1] == venue.paths[0]


async def test_a_new_socket_that_stays_silent_does_not_replace_one_that_speaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RENEWAL_SECONDS", 2.0)

    async def speak(venue: Venue, connection: ServerConnection, number: int) -> None:
        while number == 1 and number in venue.open:
            await connection.send('{"x":1}')
            await asyncio.sleep(0.01)

    async with (
        Venue(speak, is_greeting=lambda number: number == 1).serving() as venue,
        Client().running(venue) as client,
    ):
        await eventually(lambda: client.hellos == [1])
        client.stream.renew("a test")
        await eventually(lambda: len(venue.opened) >= 2)
        await eventually(lambda: list(venue.open) == [1])
        heard = len(client.frames)
        await eventually(lambda: len(client.frames) > heard)
        assert client.events == ["connected"]


async def test_a_socket_is_renewed_before_its_life_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(VENUE), "socket_lifetime", 1.0)
    async with Venue().serving() as venue, Client().running(venue) as client:
        await eventually(lambda: len(venue.opened) >= 3)
        assert client.stream.counts.disconnects.total() == 0
        assert client.events == ["connected"]


async def test_channels_that_no_address_holds_are_subscribed_to_by_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHANNELS_IN_PATH", 2)
    channels = [f"s{number}usdt@trade" for number in range(7)]
    async with Venue().serving() as venue, Client().running(venue, channels) as client:
        await eventually(lambda: len(venue.asked) == 3)
        assert venue.paths == ["/stream?streams=s0usdt@trade/s1usdt@trade"]
        assert [message["params"] for message in venue.asked] == [
            channels[2:4],
            channels[4:6],
            channels[6:],
        ]
        assert len({str(message["id"]) for message in venue.asked}) == 3
        await eventually(lambda: len(client.frames) == 4)


async def test_a_stop_does_not_wait_for_a_handshake_that_never_ends() -> None:
    accepted, ended = asyncio.Event(), asyncio.Event()

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        with suppress(OSError):
            while await reader.read(1000):
                pass
        writer.close()
        ended.set()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    async with server:
        venue = Venue(url=f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        client = Client()
        async with client.running(venue):
            await eventually(accepted.is_set)
        assert client.events == []
        await eventually(ended.is_set)


async def test_a_process_keeps_to_its_share_of_the_sockets_a_venue_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(VENUE), "connects_per_window", (8, 0.5))
    gate = ConnectGate(VENUE)
    began = time.monotonic()
    passed = []
    for _ in range(5):
        await gate.pass_through()
        passed.append(time.monotonic() - began)
    # A quarter of eight a window: the third and the fifth wait for the next one.
    assert passed[2] >= 0.5
    assert passed[4] >= 1.0


def test_channels_are_divided_over_as_many_sockets_as_they_need() -> None:
    assert split(["a", "b", "c", "d", "e"], 2) == [["a", "b"], ["c", "d"], ["e"]]
    assert split([], 2) == []
