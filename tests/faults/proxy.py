"""A TCP proxy that misbehaves on command and counts what it really did.

It listens on a free port of loopback, inside the test's own event loop::

    async with Proxy("127.0.0.1", server.port, dialogue=RedisDialogue) as proxy:
        client = Redis(port=proxy.port)
        proxy.to_client.latency = 0.3
        proxy.lose_reply(2, to=b"RPUSH")
"""

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from tests.faults.framing import Dialogue

CHUNK_BYTES = 65536
CHUNKS_UNDERWAY = 64
"""Chunks of one direction that wait for their time; then the sender has to wait too."""


@dataclass
class Conditions:
    """What one direction is like; `latency` and `jitter` in seconds.

    A chunk arrives after `latency` and up to `jitter` more, in order. Where `is_blackholed`, bytes
    are taken and thrown away, on new connections too, until the proxy heals.
    """

    latency: float = 0.0
    jitter: float = 0.0
    bytes_per_second: float | None = None
    is_blackholed: bool = False

    @property
    def is_slow(self) -> bool:
        """Whether a chunk arrives later than it came."""
        return bool(self.latency or self.jitter or self.bytes_per_second)


@dataclass
class ProxyCounts:
    """What really happened so far."""

    connections: int = 0
    refused: int = 0
    requests: int = 0
    bytes_to_server: int = 0
    bytes_to_client: int = 0
    delayed_chunks: int = 0
    swallowed_bytes: int = 0
    lost_replies: int = 0
    half_opened: int = 0
    cut: int = 0
    reset: int = 0


@dataclass
class _Loss:
    """An armed loss of a reply."""

    remaining: int
    to: bytes
    then: Literal["hang", "reset"]


class _Link:
    """One connection of a client, and ours to the server."""

    def __init__(self, client: asyncio.StreamWriter, dialogue: Dialogue | None) -> None:
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.dialogue = dialogue
        self.is_half_open = False
        self.is_silenced = False
        self.has_lost_bytes = False

    def end(self) -> None:
        """End both connections in order, after what was written to them."""
        for writer in (self.client, self.server):
            if writer is not None:
                writer.close()

    async def close(self) -> None:
        """End both connections in order, and wait until they have."""
        self.end()
        for writer in (self.client, self.server):
            if writer is not None:
                with suppress(OSError):
                    await writer.wait_closed()

    def reset(self) -> None:
        """End both connections abruptly."""
        for writer in (self.client, self.server):
            if writer is not None:
                _reset(writer)


class _End(Exception):  # noqa: N818  # it is not an error
    """One side of a link has ended it; `is_reset` tells how."""

    def __init__(self, *, is_reset: bool) -> None:
        self.is_reset = is_reset


_Underway = asyncio.Queue[tuple[float, bytes] | _End]
"""Chunks with the time at which they are due, and then how their side ended."""


class Proxy:
    """Stands between clients and one server on `host` and `port`.

    `dialogue` makes it understand the protocol, which only `lose_reply` and the count of requests
    need. `seed` fixes the jitter.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        dialogue: Callable[[], Dialogue] | None = None,
        seed: int = 0,
    ) -> None:
        self.to_server = Conditions()
        self.to_client = Conditions()
        self.counts = ProxyCounts()
        self._address = (host, port)
        self._dialogue = dialogue
        self._random = random.Random(seed)
        self._links: dict[_Link, asyncio.Task[None]] = {}
        self._loss: _Loss | None = None

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._port: int = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.close()
        tasks = list(self._links.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._listener.wait_closed()

    @property
    def port(self) -> int:
        """The port to give to clients."""
        return self._port

    @property
    def open_connections(self) -> int:
        """How many clients are connected now."""
        return len(self._links)

    def cut(self) -> int:
        """End every connection in order (FIN), and give how many there were."""
        for link in self._links:
            link.end()
        self.counts.cut += len(self._links)
        return len(self._links)

    def reset_all(self) -> int:
        """End every connection abruptly (RST), and give how many there were."""
        for link in self._links:
            link.reset()
        self.counts.reset += len(self._links)
        return len(self._links)

    def half_open(self) -> int:
        """Let the server's side of every connection die without telling the client."""
        links = [link for link in self._links if link.server and not link.is_half_open]
        for link in links:
            link.is_half_open = True
            if link.server is not None:
                _reset(link.server)
        self.counts.half_opened += len(links)
        return len(links)

    @asynccontextmanager
    async def refusing(self) -> AsyncIterator[int]:
        """End every connection abruptly and refuse new ones; gives how many were ended."""
        self._listener.close()
        ended = self.reset_all()
        # Bound and not listened to: the system refuses, and nobody else takes the port.
        closed = socket.socket()
        closed.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        closed.bind(("127.0.0.1", self._port))
        try:
            yield ended
        finally:
            self._listener = await asyncio.start_server(self._accept, sock=closed)

    def blackhole(self) -> None:
        """Swallow everything in both directions until `heal`."""
        self.to_server.is_blackholed = self.to_client.is_blackholed = True

    def lose_reply(
        self, nth: int = 1, *, to: bytes = b"", then: Literal["hang", "reset"] = "hang"
    ) -> None:
        """Lose the n-th reply from now on whose subject contains `to`, on whichever connection.

        The server has done what was asked. The connection then hangs, or is reset.
        """
        if self._dialogue is None:
            raise ValueError("a proxy that loses replies needs a dialogue")
        self._loss = _Loss(nth, to, then)

    def heal(self) -> None:
        """End all faults; a connection that lost bytes is reset, as its stream has a hole."""
        for conditions in (self.to_server, self.to_client):
            conditions.latency = conditions.jitter = 0.0
            conditions.bytes_per_second = None
            conditions.is_blackholed = False
        self._loss = None
        for link in self._links:
            if link.has_lost_bytes or link.is_half_open:
                link.reset()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._listener.is_serving():
            _reset(writer)  # accepted just before the end
            return
        link = _Link(writer, self._dialogue() if self._dialogue else None)
        self._links[link] = asyncio.create_task(self._serve(link, reader))
        self.counts.connections += 1

    async def _serve(self, link: _Link, reader: asyncio.StreamReader) -> None:
        try:
            server_reader, link.server = await asyncio.open_connection(*self._address)
            await self._relay(link, reader, server_reader, link.server)
        except OSError:
            self.counts.refused += 1
        finally:
            link.reset()
            del self._links[link]

    async def _relay(
        self,
        link: _Link,
        client_reader: asyncio.StreamReader,
        server_reader: asyncio.StreamReader,
        server: asyncio.StreamWriter,
    ) -> None:
        """Carry both directions until one of them ends."""
        directions = (
            (client_reader, server, self.to_server),
            (server_reader, link.client, self.to_client),
        )
        try:
            async with asyncio.TaskGroup() as group:
                for reader, writer, conditions in directions:
                    underway = _Underway(CHUNKS_UNDERWAY)
                    group.create_task(self._take(link, reader, underway, conditions))
                    group.create_task(self._deliver(link, writer, underway, conditions))
        except* _End as ends:
            if not any(isinstance(end, _End) and end.is_reset for end in ends.exceptions):
                await link.close()

    async def _take(
        self,
        link: _Link,
        reader: asyncio.StreamReader,
        underway: _Underway,
        conditions: Conditions,
    ) -> None:
        is_to_client = conditions is self.to_client
        now = asyncio.get_running_loop().time
        due = 0.0
        while True:
            data = await _read(reader)
            if isinstance(data, _End):
                await underway.put(data)
                return
            is_swallowed = conditions.is_blackholed or link.is_half_open
            if is_swallowed or (link.is_silenced and is_to_client):
                self.counts.swallowed_bytes += len(data)
                link.has_lost_bytes = True
                continue
            data, loss = self._understand(link.dialogue, data, is_to_client=is_to_client)
            if data:
                due = max(
                    due, now() + conditions.latency + self._random.random() * conditions.jitter
                )
                if conditions.bytes_per_second:
                    due += len(data) / conditions.bytes_per_second
                await underway.put((due, data))
            if loss is not None:
                link.is_silenced = link.has_lost_bytes = True
                if loss.then == "reset":
                    await underway.put(_End(is_reset=True))
                    return

    async def _deliver(
        self,
        link: _Link,
        writer: asyncio.StreamWriter,
        underway: _Underway,
        conditions: Conditions,
    ) -> None:
        loop = asyncio.get_running_loop()
        is_to_client = conditions is self.to_client
        while True:
            chunk = await underway.get()
            if isinstance(chunk, _End):
                if link.is_half_open and is_to_client:
                    return  # the server's end is what the client must not hear of
                raise chunk
            due, data = chunk
            if conditions.is_slow:
                self.counts.delayed_chunks += 1
            if (pause := due - loop.time()) > 0:
                await asyncio.sleep(pause)
            try:
                writer.write(data)
                await writer.drain()
            except OSError:
                if link.is_half_open:
                    continue
                raise _End(is_reset=True) from None
            if is_to_client:
                self.counts.bytes_to_client += len(data)
            else:
                self.counts.bytes_to_server += len(data)

    def _understand(
        self, dialogue: Dialogue | None, data: bytes, *, is_to_client: bool
    ) -> tuple[bytes, _Loss | None]:
        """Count requests, and give the whole replies up to one to be lost, and that loss."""
        if dialogue is None:
            return data, None
        if not is_to_client:
            self.counts.requests += dialogue.requested(data)
            return data, None
        kept: list[bytes] = []
        for subject, reply in dialogue.replied(data):
            loss = self._loss
            if loss is not None and subject is not None and loss.to in subject:
                loss.remaining -= 1
                if not loss.remaining:
                    self._loss = None
                    self.counts.lost_replies += 1
                    return b"".join(kept), loss
            kept.append(reply)
        return b"".join(kept), None


async def _read(reader: asyncio.StreamReader) -> bytes | _End:
    try:
        data = await reader.read(CHUNK_BYTES)
    except OSError:
        return _End(is_reset=True)
    return data or _End(is_reset=False)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close abruptly: with a linger of zero, closing sends RST instead of FIN."""
    if not writer.is_closing():
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
