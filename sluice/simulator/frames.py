"""WebSocket frames as a server writes them (RFC 6455, 5.2): unmasked, so the same for everyone."""

from enum import IntEnum

_SHORT = 126
_MEDIUM = 1 << 16


class Opcode(IntEnum):
    """The kind of a frame."""

    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


def frame(payload: bytes, opcode: Opcode = Opcode.TEXT) -> bytes:
    """Make one unfragmented frame."""
    size = len(payload)
    first = 0x80 | opcode
    if size < _SHORT:
        return bytes((first, size)) + payload
    if size < _MEDIUM:
        return bytes((first, 126)) + size.to_bytes(2) + payload
    return bytes((first, 127)) + size.to_bytes(8) + payload


def close(code: int, reason: str = "") -> bytes:
    """Make a close frame."""
    return frame(code.to_bytes(2) + reason.encode(), Opcode.CLOSE)
