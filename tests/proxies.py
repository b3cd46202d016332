"""Proxies as an operator may have them, HTTP and SOCKS, that note where they were asked to go."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

Asked = list[tuple[str, int]]


@asynccontextmanager
async def socks_proxy(asked: Asked | None = None, *, refusal: int = 0) -> AsyncIterator[str]:
    """A SOCKS 5 proxy without authentication, as RFC 1928 has it, for IPv4 destinations."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, methods = await reader.readexactly(2)
        await reader.readexactly(methods)
        writer.write(b"\x05\x00")
        request = await reader.readexactly(10)
        host = ".".join(str(byte) for byte in request[4:8])
        port = int.from_bytes(request[8:10])
        if asked is not None:
            asked.append((host, port))
        if refusal:
            writer.write(bytes([5, refusal, 0, 1]) + bytes(6))
            writer.close()
            return
        await _join(reader, writer, host, port, b"\x05\x00\x00\x01" + bytes(6))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"socks5://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@asynccontextmanager
async def http_proxy(asked: Asked) -> AsyncIterator[str]:
    """An HTTP proxy that opens tunnels (CONNECT) and does nothing else."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, target, _ = head.split(b" ", 2)
        assert method == b"CONNECT"
        host, _, port = target.decode().rpartition(":")
        asked.append((host, int(port)))
        await _join(reader, writer, host, int(port), b"HTTP/1.1 200 OK\r\n\r\n")

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def _join(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int, reply: bytes
) -> None:
    there_reader, there_writer = await asyncio.open_connection(host, port)
    writer.write(reply)
    await asyncio.gather(_copy(reader, there_writer), _copy(there_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
    writer.close()
