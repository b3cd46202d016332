"""Where one message ends and the next begins, for Redis and for PostgreSQL.

A dialogue sees both directions of one connection and cuts the server's side into whole replies,
each with its subject: the request it answers (Redis), or the tag of the command that it completes
(PostgreSQL), for instance `COMMIT`.
"""

from collections import deque
from typing import NamedTuple, Protocol


class Reply(NamedTuple):
    """One whole message of the server; `subject` is None where it answers nothing."""

    subject: bytes | None
    data: bytes


class Dialogue(Protocol):
    """One connection's two directions."""

    def requested(self, data: bytes) -> int:
        """Take what the client sent, and give how many requests ended in it."""

    def replied(self, data: bytes) -> list[Reply]:
        """Take what the server sent, and give the replies that are whole now."""


class _RespSplitter:
    """Cuts a stream of RESP2 or RESP3 into whole values, in one pass over its bytes."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._position = 0
        self._open: list[int] = []  # how many elements each open aggregate still lacks

    def feed(self, data: bytes) -> list[bytes]:
        self._data += data
        values = []
        while (end := self._element()) is not None:
            self._position = end
            while self._open:
                self._open[-1] -= 1
                if self._open[-1]:
                    break
                self._open.pop()
            if not self._open:
                values.append(bytes(self._data[:end]))
                del self._data[:end]
                self._position = 0
        return values

    def _element(self) -> int | None:
        """Give where the element at the position ends, or None where more bytes are needed."""
        while (newline := self._data.find(b"\n", self._position)) >= 0:
            kind, end = self._data[self._position : self._position + 1], newline + 1
            if kind in b"$=!":
                length = int(self._data[self._position + 1 : newline])
                end += length + 2 if length >= 0 else 0
                return end if end <= len(self._data) else None
            if kind not in b"*~>%|":
                return end
            count = int(self._data[self._position + 1 : newline])
            # An attribute belongs to the value that follows it.
            elements = {b"%": 2 * count, b"|": 2 * count + 1}.get(bytes(kind), count)
            if elements <= 0:
                return end
            self._open.append(elements)
            self._position = end
        return None


class RedisDialogue:
    """Requests and replies of one Redis connection.

    Messages of channels, and what is said to a subscription, answer no request.
    """

    def __init__(self) -> None:
        self._requests, self._replies = _RespSplitter(), _RespSplitter()
        self._unanswered: deque[bytes] = deque()

    def requested(self, data: bytes) -> int:
        """Take what the client sent, and give how many requests ended in it."""
        requests = self._requests.feed(data)
        self._unanswered.extend(
            request for request in requests if b"SUBSCRIBE" not in request[:40].upper()
        )
        return len(requests)

    def replied(self, data: bytes) -> list[Reply]:
        """Take what the server sent; the subject is the whole request."""
        replies = []
        for value in self._replies.feed(data):
            is_answer = self._unanswered and not value.startswith(b">")
            replies.append(Reply(self._unanswered.popleft() if is_answer else None, value))
        return replies


class PostgresDialogue:
    """The server's messages of one PostgreSQL connection, which must not be encrypted."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._is_started = False

    def requested(self, data: bytes) -> int:  # noqa: ARG002  # the protocol's other half
        """Give 0: here a request is counted when the server says that it is done."""
        return 0

    def replied(self, data: bytes) -> list[Reply]:
        """Take what the server sent; the subject is the tag of a CommandComplete."""
        self._data += data
        replies = []
        if not self._is_started and self._data.startswith((b"N", b"S")):
            # The answer to an SSLRequest is one letter. What follows an S could not be read.
            if self._data.startswith(b"S"):
                raise ValueError("an encrypted connection to PostgreSQL cannot be read")
            replies.append(Reply(None, bytes(self._data[:1])))
            del self._data[:1]
        while len(self._data) >= 5:
            self._is_started = True
            end = 1 + int.from_bytes(self._data[1:5])
            if len(self._data) < end:
                break
            is_complete = self._data[:1] == b"C"
            subject = bytes(self._data[5 : end - 1]) if is_complete else None
            replies.append(Reply(subject, bytes(self._data[:end])))
            del self._data[:end]
        return replies
