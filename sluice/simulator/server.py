"""The simulator as a server: sockets, REST and the control port on one address."""

import asyncio
import logging
from typing import Self
from urllib.parse import unquote

from aiohttp import web

from sluice.simulator.config import SimulatorConfig
from sluice.simulator.connection import Connection
from sluice.simulator.control import Control
from sluice.simulator.exchange import Exchange
from sluice.simulator.faults import CONNECTION, Order
from sluice.simulator.limits import ConnectLimiter
from sluice.simulator.recording import RecordingSource
from sluice.simulator.rest import Rest
from sluice.simulator.synthetic import SyntheticSource
from sluice.simulator.truth import Truth

_REFUSED = frozenset({"refuse_handshake"})


class Simulator:
    """A running simulator: `async with Simulator(SimulatorConfig(seed=7)) as simulator: ...`.

    Attributes:
        exchange: What is behind the sockets; its `faults` are armed here.
        truth: What was published, withheld and injected.
        source: Where the market comes from.
    """

    def __init__(self, config: SimulatorConfig) -> None:
        self.config = config
        self.exchange = Exchange(config)
        self.connections: dict[int, Connection] = {}
        self.truth = Truth(self.exchange)
        self.source: SyntheticSource | RecordingSource
        self._limiters: dict[str, ConnectLimiter] = {}
        self._opened = 0
        self._runner: web.AppRunner | None = None
        self._playing: asyncio.Task[None] | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """The base of REST and of `/control`."""
        return f"http://{self.config.host}:{self._port}"

    @property
    def ws_url(self) -> str:
        """The base of the sockets."""
        return f"ws://{self.config.host}:{self._port}"

    async def __aenter__(self) -> Self:
        self.exchange.open_log()
        self.source = (
            RecordingSource(self.exchange)
            if self.config.recordings
            else SyntheticSource(self.exchange)
        )
        app = web.Application()
        rest = Rest(self.exchange)
        app.add_routes(
            [
                *rest.routes(),
                *Control(self, rest).routes(),
                web.get("/ws", self._socket),
                web.get("/ws/{streams:.*}", self._socket),
                web.get("/stream", self._socket),
            ]
        )
        self._runner = web.AppRunner(
            app, access_log=None, logger=logging.getLogger(__name__), shutdown_timeout=1.0
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.config.host, self.config.port, backlog=1024)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self._playing = asyncio.create_task(self.source.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._playing is not None  # noqa: S101 - entered
        assert self._runner is not None  # noqa: S101 - entered
        self._playing.cancel()
        (ending,) = await asyncio.gather(self._playing, return_exceptions=True)
        if isinstance(self.source, SyntheticSource):
            self.source.save()
        for connection in list(self.connections.values()):
            connection.abort()
        await self._runner.cleanup()
        self.exchange.close_log()
        if isinstance(ending, Exception):
            raise ending  # a source that died must not pass for a quiet market

    async def failed(self) -> None:
        """Wait until the source ends by an error, and raise it."""
        assert self._playing is not None  # noqa: S101 - entered
        await asyncio.shield(self._playing)
        await asyncio.Event().wait()

    def inject(self, order: Order, number: int | None = None) -> int:
        """Inject a fault on command: a connection's at once, any other at its next occasion.

        Returns:
            How many connections were hit.

        Raises:
            UnknownFaultError: No such kind.
        """
        if order.kind not in CONNECTION:
            self.exchange.faults.arm(order)
            return 0
        chosen = [
            connection
            for connection in self.connections.values()
            if connection.is_open
            and (number is None or connection.number == number)
            and order.fits(connection.streams)
        ]
        for connection in chosen:
            connection.injure(order)
        return len(chosen)

    def quiet(self) -> None:
        """Inject no more, let go of what is held, take the brakes off."""
        self.exchange.faults.quiet()
        self.exchange.hub.release()
        for connection in self.connections.values():
            connection.recover()

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        exchange = self.exchange
        is_combined = request.path == "/stream"
        streams = _names(request)
        limiter = self._limiters.setdefault(request.remote or "", ConnectLimiter(self.config))
        if limiter.is_over():
            exchange.log("refused", remote=request.remote)
            return web.Response(status=429, headers={"Retry-After": "5"}, text="Too many requests")
        if exchange.faults.draw(_REFUSED, *streams):
            exchange.faults.record("refuse_handshake", streams=streams)
            return web.Response(status=503, text="Service Unavailable")
        ws = web.WebSocketResponse(
            autoping=False, autoclose=False, compress=False, max_msg_size=1 << 20, timeout=1.0
        )
        await ws.prepare(request)
        if request.transport is None:
            return ws  # gone before it was served
        self._opened += 1
        connection = Connection(
            self._opened,
            request.transport,
            exchange,
            is_combined=is_combined,
            is_in_microseconds=request.query.get("timeUnit", "").upper() == "MICROSECOND",
        )
        self.connections[connection.number] = connection
        exchange.log("connect", connection=connection.number, path=request.path_qs)
        try:
            await connection.run(ws, streams)
        finally:
            del self.connections[connection.number]
            exchange.log("disconnect", connection=connection.number, sent=connection.sent)
        return ws


def _names(request: web.Request) -> list[str]:
    """Read the streams named in an address; a plus is a plus (`kline_1d@+08:00`)."""
    listed = request.match_info.get("streams", "")
    for parameter in request.rel_url.raw_query_string.split("&"):
        name, _, value = parameter.partition("=")
        if name == "streams":
            listed = value
    return [stream for stream in unquote(listed).split("/") if stream]
