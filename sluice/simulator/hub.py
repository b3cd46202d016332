"""Who is subscribed to what, and the way of a message to all of them.

A frame is made once for all subscribers of a form (raw or combined). Message faults are injected
here, so that all subscribers see the same.
"""

import json
from collections.abc import Iterable
from typing import Protocol

from sluice.simulator.faults import LOSING, MESSAGE, Faults
from sluice.simulator.frames import Opcode, frame
from sluice.simulator.payloads import in_microseconds

HUGE_DIGITS = 2_000_000
DEEP_LEVELS = 100_000


class Subscriber(Protocol):
    """One connection, as far as the hub knows it."""

    is_combined: bool
    is_in_microseconds: bool

    @property
    def buffered(self) -> int:
        """Bytes that the client has not taken yet."""

    def send(self, data: bytes) -> None:
        """Queue one frame of data."""


class Hub:
    """The subscriptions of all connections."""

    def __init__(self, faults: Faults) -> None:
        self.withheld: dict[str, list[int]] = {}  # trade ids by symbol, in the order published
        self._faults = faults
        self._subscribers: dict[str, dict[Subscriber, None]] = {}
        self._held: dict[str, bytes] = {}  # messages that the next one of their stream overtakes

    @property
    def streams(self) -> Iterable[str]:
        """The streams that somebody is subscribed to."""
        return self._subscribers.keys()

    def subscribe(self, stream: str, subscriber: Subscriber) -> None:
        """Send the stream to the subscriber from now on."""
        self._subscribers.setdefault(stream, {})[subscriber] = None

    def unsubscribe(self, stream: str, subscriber: Subscriber) -> None:
        """Stop sending the stream to the subscriber."""
        subscribers = self._subscribers.get(stream)
        if subscribers is not None:
            subscribers.pop(subscriber, None)
            if not subscribers:
                del self._subscribers[stream]

    def wants(self, stream: str) -> bool:
        """Whether anybody is subscribed to the stream."""
        return stream in self._subscribers

    def backlog(self) -> int:
        """Bytes that the slowest subscriber has not taken yet."""
        subscribers = {who for group in self._subscribers.values() for who in group}
        return max((who.buffered for who in subscribers), default=0)

    def publish(self, stream: str, payload: bytes, trade_id: int | None = None) -> None:
        """Send one payload to all subscribers, or do to it what a fault asks for."""
        if stream not in self._subscribers:
            return
        held = self._held.pop(stream, None) if self._held else None
        if self._faults.is_armed and (order := self._faults.draw(MESSAGE, stream)):
            self._spoil(order.kind, stream, payload, trade_id)
        else:
            self._send(stream, payload)
        if held is not None:
            self._send(stream, held)

    def release(self) -> None:
        """Send what waits for a next message of its stream."""
        for stream, payload in self._held.items():
            self._send(stream, payload)
        self._held.clear()

    def _spoil(self, kind: str, stream: str, payload: bytes, trade_id: int | None) -> None:
        if kind in LOSING and trade_id is not None:
            symbol = stream.partition("@")[0].upper()
            self.withheld.setdefault(symbol, []).append(trade_id)
        detail: dict[str, object] = {"stream": stream}
        if trade_id is not None:
            detail["trade_id"] = trade_id
        elif b'"depthUpdate"' in payload:
            update = json.loads(payload)
            detail["update_ids"] = [update["U"], update["u"]]
        if kind in LOSING:
            self._send_damaged(kind, stream, payload)
        else:
            self._send_oddly(kind, stream, payload)
        self._faults.record(kind, **detail)

    def _send_oddly(self, kind: str, stream: str, payload: bytes) -> None:
        match kind:
            case "duplicate":
                self._send(stream, payload)
            case "reorder":
                self._held[stream] = payload
                return
            case "unknown_event":
                self._send(stream, b'{"e":"somethingNew","E":1,"x":[{"y":null}]}')
            case "empty_frame":
                self._send_raw(stream, frame(b""))
            case _ if payload.endswith(b"}"):
                payload = payload[:-1] + b',"Zz":{"new":[1,2,3]},"zz":"field"}'
        self._send(stream, payload)

    def _send_damaged(self, kind: str, stream: str, payload: bytes) -> None:
        wrapped = _wrap(stream, payload)
        match kind:
            case "truncate":
                self._send_raw(stream, frame(wrapped[: len(wrapped) // 2]))
            case "bad_utf8":
                self._send_raw(stream, frame(wrapped[:-4] + b"\xff\xfe\xc0" + wrapped[-4:]))
            case "binary":
                self._send_raw(stream, frame(b"\x00\x01" + wrapped, Opcode.BINARY))
            case "wrong_type":
                self._send(stream, _rewrite(payload, {"p": 1.5, "t": "x", "b": {}, "u": None}))
            case "nan":
                self._send(stream, _rewrite(payload, {"p": "NaN", "b": [["NaN", "Infinity"]]}))
            case "huge":
                digits = "9" * HUGE_DIGITS
                self._send(stream, _rewrite(payload, {"p": digits, "b": [[digits, "1"]]}))
            case "deep":
                nest = b"[" * DEEP_LEVELS + b"]" * DEEP_LEVELS
                self._send(stream, payload[:-1] + b',"p":' + nest + b"}")
            case _:
                pass  # dropped

    def _send(self, stream: str, payload: bytes) -> None:
        made: dict[tuple[bool, bool], bytes] = {}
        for subscriber in self._subscribers.get(stream, ()):
            form = (subscriber.is_combined, subscriber.is_in_microseconds)
            data = made.get(form)
            if data is None:
                body = in_microseconds(payload) if form[1] else payload
                data = made[form] = frame(_wrap(stream, body) if form[0] else body)
            subscriber.send(data)

    def _send_raw(self, stream: str, data: bytes) -> None:
        for subscriber in self._subscribers.get(stream, ()):
            subscriber.send(data)


def _wrap(stream: str, payload: bytes) -> bytes:
    return b'{"stream":"%b","data":%b}' % (stream.encode(), payload)


def _rewrite(payload: bytes, values: dict[str, object]) -> bytes:
    """Put other values in place of those that the payload has."""
    fields = json.loads(payload)
    if isinstance(fields, dict):
        fields.update({name: value for name, value in values.items() if name in fields})
    return json.dumps(fields, separators=(",", ":")).encode()
