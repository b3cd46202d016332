"""One websocket of a client: control messages, heartbeat, limits, and what a fault does to it.

Frames are written to the transport as they are, so that a message is encoded once for everyone
and a fault can cut, slow or damage the bytes; aiohttp reads and does the handshake.
"""

import asyncio
import json
import re
import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import cast

from aiohttp import WSMsgType, web

from sluice.simulator.exchange import Exchange
from sluice.simulator.faults import CONNECTION, CONTROL, Order
from sluice.simulator.frames import Opcode, close, frame

GOOD_BYE = 1000
POLICY_VIOLATION = 1008
GOING_AWAY = 1001
_CLOSE_TIMEOUT = 2.0  # seconds given to the client to answer a close frame
_SLOW_PERIOD = 0.05
_SILENT = frozenset({"acked_but_silent"})
_ENDED = frozenset({WSMsgType.CLOSED, WSMsgType.CLOSING, WSMsgType.ERROR})
_METHODS = ("SUBSCRIBE", "UNSUBSCRIBE", "LIST_SUBSCRIPTIONS", "SET_PROPERTY", "GET_PROPERTY")
_ID = re.compile(r"[A-Za-z0-9]{1,36}\Z")


class _RefusedError(Exception):
    """A control message is answered with an error."""

    def __init__(self, code: int, message: str, **extra: object) -> None:
        super().__init__(message)
        self.code = code
        self.extra = extra


class Connection:
    """One open socket; the hub's subscriber."""

    def __init__(
        self,
        number: int,
        transport: asyncio.Transport,
        exchange: Exchange,
        *,
        is_combined: bool,
        is_in_microseconds: bool,
    ) -> None:
        self.number = number
        self.is_combined = is_combined
        self.is_in_microseconds = is_in_microseconds
        self.streams: dict[str, None] = {}
        self.sent = 0
        self._transport = transport
        self._exchange = exchange
        self._config = exchange.config
        self._faults = exchange.faults
        self._loop = asyncio.get_running_loop()
        self._outbox: list[bytes] = []
        self._is_flush_due = False
        self._is_stalled = False  # no data; the rest goes on
        self._is_half_open = False  # nothing at all, in either direction
        self._bytes_per_second = 0.0
        self._backlog = bytearray()
        self._is_closing = False
        self._pings: deque[tuple[bytes, float]] = deque(maxlen=16)
        self._incoming: deque[float] = deque()
        self._timers: set[asyncio.TimerHandle] = set()

    # -- writing

    def send(self, data: bytes) -> None:
        """Queue one frame of data; it goes out with all others of this turn of the loop."""
        if not (self._is_stalled or self._is_half_open or self._is_closing):
            self.sent += 1
            self._write(data)

    @property
    def buffered(self) -> int:
        """Bytes that the client has not taken; none for a client that a fault cut off."""
        if self._is_half_open or self._transport.is_closing():
            return 0
        unsent = self._transport.get_write_buffer_size() + len(self._backlog)
        return unsent + sum(map(len, self._outbox))

    @property
    def is_open(self) -> bool:
        """Whether data may still go out."""
        return not (self._is_closing or self._transport.is_closing())

    def _write(self, data: bytes) -> None:
        self._outbox.append(data)
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        data = b"".join(self._outbox)
        self._outbox.clear()
        if self._transport.is_closing() or not data:
            return
        if self._bytes_per_second or self._backlog:
            if not self._backlog:
                self._later(_SLOW_PERIOD, self._trickle)
            self._backlog += data
            size = len(self._backlog)
        else:
            self._transport.write(data)
            size = self._transport.get_write_buffer_size()
        if size > self._config.max_buffered:
            self._exchange.log("overload", connection=self.number, bytes=size)
            self.abort()

    def _trickle(self) -> None:
        share = len(self._backlog)
        if self._bytes_per_second:
            share = max(1, int(self._bytes_per_second * _SLOW_PERIOD))
        self._transport.write(bytes(self._backlog[:share]))
        del self._backlog[:share]
        if self._backlog:
            self._later(_SLOW_PERIOD, self._trickle)

    def _later(self, delay: float, action: Callable[[], None]) -> None:
        def run() -> None:
            self._timers.discard(handle)
            if not self._transport.is_closing():
                action()

        handle = self._loop.call_later(delay, run)
        self._timers.add(handle)

    # -- ending

    def abort(self) -> None:
        """Cut the TCP connection with a reset, without a word."""
        self._is_closing = True
        linger = struct.pack("ii", 1, 0)
        raw = cast("socket.socket | None", self._transport.get_extra_info("socket"))
        if raw is not None and not self._transport.is_closing():
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._transport.abort()

    def close(self, code: int, reason: str = "") -> None:
        """Say goodbye with a close frame; cut when the client does not answer."""
        if self._is_closing or self._is_half_open:
            return
        self._write(close(code, reason))
        self._is_closing = True
        self._exchange.log("close", connection=self.number, code=code, reason=reason)
        self._later(_CLOSE_TIMEOUT, self._transport.close)

    def announce_shutdown(self, grace: float) -> None:
        """Send `serverShutdown`, and close with 1001 after `grace` seconds."""
        event = b'{"e":"serverShutdown","E":%d}' % self._exchange.now()
        if self.is_combined:
            event = b'{"stream":"!serverShutdown","data":%b}' % event
        self.send(frame(event))
        self._later(grace, lambda: self.close(GOING_AWAY, "Server shutdown"))

    def release(self) -> None:
        """End everything that belongs to this connection."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        for stream in self.streams:
            self._exchange.hub.unsubscribe(stream, self)
        self._transport.close()

    # -- faults

    def injure(self, order: Order) -> None:
        """Do to this connection what the fault asks for."""
        detail: dict[str, object] = {"connection": self.number}
        match order.kind:
            case "cut":
                self.abort()
            case "cut_mid_frame":
                # Past the outbox: the half frame must be the last thing that goes out.
                self._flush()
                self._transport.write(frame(b"x" * 300)[:50])
                self._is_closing = True
                self._later(0.05, self._transport.close)
            case "close":
                detail["code"] = code = int(order.number("code", GOOD_BYE))
                self.close(code, "")
            case "stall":
                self._is_stalled = True
            case "half_open":
                self._is_half_open = True
                self._outbox.clear()
            case "slow":
                self._bytes_per_second = order.number("bytes_per_second", 2_000)
                detail["bytes_per_second"] = self._bytes_per_second
                if seconds := order.number("seconds", 0):
                    self._later(seconds, self.recover)
            case _:
                detail["grace"] = grace = order.number("grace", 1.0)
                self.announce_shutdown(grace)
        self._faults.record(order.kind, **detail)

    def recover(self) -> None:
        """Take the brake off; a stalled or half-open socket stays so, as in life."""
        self._bytes_per_second = 0.0

    # -- the life of the socket

    async def run(self, ws: web.WebSocketResponse, streams: list[str]) -> None:
        """Serve until one side ends; `streams` are those named in the address."""
        self._silence(streams)
        for stream in streams:
            self._subscribe(stream)
        if len(self.streams) > self._config.max_streams:
            self.close(POLICY_VIOLATION, "Too many streams")
        self._later(self._config.ping_interval, self._ping)
        self._later(self._config.lifetime, lambda: self.close(POLICY_VIOLATION, "24 h are over"))
        if notice := self._config.shutdown_notice:
            self._later(
                max(0.0, self._config.lifetime - notice), lambda: self.announce_shutdown(notice)
            )
        self._later(1.0, self._each_second)
        try:
            while not self._transport.is_closing():
                message = await ws.receive()
                if self._is_half_open:
                    await self._play_dead()
                    return
                if message.type in _ENDED:
                    return
                if message.type is WSMsgType.CLOSE:
                    self._answer_close(int(message.data or GOOD_BYE))
                    return
                self._receive(message.type, message.data)
        finally:
            self.release()

    async def _play_dead(self) -> None:
        while not self._transport.is_closing():  # noqa: ASYNC110 - aiohttp has no event for it
            await asyncio.sleep(0.1)

    def _answer_close(self, code: int) -> None:
        if not self._is_closing:
            self._write(close(code))
            self._is_closing = True
        self._flush()

    def _silence(self, streams: list[str]) -> None:
        if streams and self._faults.draw(_SILENT, *streams):
            self._is_stalled = True
            self._faults.record("acked_but_silent", connection=self.number, streams=streams)

    def _each_second(self) -> None:
        if self._faults.is_armed and (order := self._faults.draw(CONNECTION, *self.streams)):
            self.injure(order)
        self._later(1.0, self._each_second)

    def _ping(self) -> None:
        if self._is_half_open or self._is_closing:
            return
        now = self._loop.time()
        if self._pings and now - self._pings[0][1] > self._config.pong_timeout:
            self.close(POLICY_VIOLATION, "Pong timeout")
            return
        payload = secrets.token_hex(6).encode()
        self._pings.append((payload, now))
        self._write(frame(payload, Opcode.PING))
        self._later(self._config.ping_interval, self._ping)

    def _receive(self, kind: WSMsgType, data: object) -> None:
        now = time.monotonic()
        self._incoming.append(now)
        while self._incoming[0] <= now - 1.0:
            self._incoming.popleft()
        if len(self._incoming) > self._config.messages_per_second:
            self.close(POLICY_VIOLATION, "Too many requests")
        elif kind is WSMsgType.PING:
            self._write(frame(bytes(cast("bytes", data)), Opcode.PONG))
        elif kind is WSMsgType.PONG:
            self._pong(bytes(cast("bytes", data)))
        elif kind is WSMsgType.TEXT:
            self._answer(cast("str", data))

    def _pong(self, payload: bytes) -> None:
        # An echo answers its ping and all before it; an unsolicited pong answers nothing.
        sent = [ping for ping, _ in self._pings]
        if payload in sent:
            for _ in range(sent.index(payload) + 1):
                self._pings.popleft()

    # -- control messages

    def _answer(self, text: str) -> None:
        request_id: object = None
        try:
            request = _request(text)
            request_id = _request_id(request)
            order = self._faults.draw(CONTROL, *_params(request), str(request.get("method")))
            if order and order.kind == "ack_error":
                self._faults.record("ack_error", connection=self.number, request=request_id)
                raise _RefusedError(2, "Invalid request: injected")  # noqa: TRY301 - as a real one
            result = self._perform(request)
        except _RefusedError as refusal:
            self._write(frame(self._error(refusal, request_id)))
            if "data" in refusal.extra:
                self.close(POLICY_VIOLATION, "Invalid stream")
            return
        reply = frame(_print({"result": result, "id": request_id}))
        if order is None:
            self._write(reply)
        elif order.kind == "ack_late":
            self._faults.record("ack_late", connection=self.number, request=request_id)
            self._later(order.number("seconds", 1.0), lambda: self._write(reply))
        else:
            self._faults.record("ack_missing", connection=self.number, request=request_id)

    def _error(self, refusal: _RefusedError, request_id: object) -> bytes:
        error = {"code": refusal.code, "msg": str(refusal), **refusal.extra}
        if self._config.are_errors_nested:
            return _print({"error": error, "id": request_id})
        return _print({**error, "id": request_id})

    def _perform(self, request: dict[str, object]) -> object:
        match request["method"]:
            case "SUBSCRIBE":
                self._subscribe_all(_names(request))
            case "UNSUBSCRIBE":
                for name in _names(request):
                    self.streams.pop(name, None)
                    self._exchange.hub.unsubscribe(name, self)
            case "LIST_SUBSCRIPTIONS":
                return list(self.streams)
            case "GET_PROPERTY":
                _property(request, 1)
                return self.is_combined
            case _:
                value = _property(request, 2)
                if not isinstance(value, bool):
                    raise _RefusedError(1, "Invalid value type: expected Boolean")
                self.is_combined = value
        return None

    def _subscribe_all(self, names: list[str]) -> None:
        if self._config.are_unknown_symbols_refused:
            for name in names:
                if not self._exchange.knows(name):
                    raise _RefusedError(2, "Invalid request: unknown stream", data=name)
        if len(self.streams | dict.fromkeys(names)) > self._config.max_streams:
            self.close(POLICY_VIOLATION, "Too many streams")
            return
        self._silence(names)
        for name in names:
            self._subscribe(name)

    def _subscribe(self, stream: str) -> None:
        self.streams[stream] = None
        self._exchange.subscribe(stream, self)
        self._exchange.log("subscribe", connection=self.number, stream=stream)


def _print(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _request(text: str) -> dict[str, object]:
    try:
        request = json.loads(text)
    except (ValueError, RecursionError) as error:
        line, column = getattr(error, "lineno", 1), getattr(error, "colno", 1)
        raise _RefusedError(
            3, f"Invalid JSON: expected value at line {line} column {column}"
        ) from error
    if not isinstance(request, dict):
        raise _RefusedError(3, "Invalid JSON: expected value at line 1 column 1")
    if "method" not in request:
        raise _RefusedError(
            2, f"Invalid request: missing field `method` at line 1 column {len(text)}"
        )
    if request["method"] not in _METHODS:
        listed = ", ".join(f"`{name}`" for name in _METHODS)
        raise _RefusedError(
            2, f"Invalid request: unknown variant {request['method']}, expected one of {listed}"
        )
    return request


def _request_id(request: dict[str, object]) -> object:
    request_id = request.get("id")
    if request_id is None or (isinstance(request_id, str) and _ID.match(request_id)):
        return request_id
    if isinstance(request_id, int) and request_id.bit_length() < 64:  # noqa: PLR2004 - int64
        return request_id
    raise _RefusedError(2, "Invalid request: request ID must be an unsigned integer")


def _params(request: dict[str, object]) -> list[str]:
    params = request.get("params")
    return [str(param) for param in params] if isinstance(params, list) else []


def _names(request: dict[str, object]) -> list[str]:
    params = request.get("params")
    if not isinstance(params, list) or not all(isinstance(name, str) for name in params):
        raise _RefusedError(2, "Invalid request: params must be a list of strings")
    return [str(name) for name in params]


def _property(request: dict[str, object], arguments: int) -> object:
    params = request.get("params")
    if not isinstance(params, list) or not params or not isinstance(params[0], str):
        raise _RefusedError(2, "Invalid request: property name must be a string")
    if len(params) > arguments:
        raise _RefusedError(2, "Invalid request: too many parameters")
    if params[0] != "combined":
        raise _RefusedError(0, "Unknown property")
    return params[1] if len(params) > 1 else None
