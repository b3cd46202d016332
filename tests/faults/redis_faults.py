"""What can go wrong with a real Redis, on command.

Functions that take a `RedisServer` block until it answers again; call them in a thread where the
event loop has to go on meanwhile.
"""

import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from redis.asyncio import Redis

from sluice.cli.servers import RedisServer

_DATA = ("appendonlydir", "dump.rdb")


@contextmanager
def frozen(server: RedisServer) -> Iterator[None]:
    """Keep the connections open and answer nothing (SIGSTOP)."""
    server.freeze()
    try:
        yield
    finally:
        server.thaw()


async def pause_clients(redis: Redis, seconds: float) -> None:
    """Let every command of every client wait for so long; nothing ends it earlier."""
    await redis.client_pause(round(seconds * 1000), all=True)


@asynccontextmanager
async def memory_full(redis: Redis) -> AsyncIterator[None]:
    """Refuse what needs memory: there is a maxmemory, and it is exceeded."""
    before = (await redis.config_get("maxmemory"))["maxmemory"] or "0"
    try:
        await redis.config_set("maxmemory", "1")  # it may be done though we are cancelled here
        yield
    finally:
        await redis.config_set("maxmemory", before)


@asynccontextmanager
async def read_only(redis: Redis) -> AsyncIterator[None]:
    """Refuse every write: it is the replica of a primary that is not there."""
    # Port 1 of this machine: a live primary would replace the data by its own.
    try:
        await redis.replicaof("127.0.0.1", "1")
        yield
    finally:
        await redis.replicaof("NO", "ONE")


def copy_data(server: RedisServer, target: Path) -> Path:
    """Copy what the server has written so far to a new directory, and give it."""
    target.mkdir()
    _copy(server.directory, target)
    return target


def restart_empty(server: RedisServer) -> None:
    """Kill the server and start it without its data."""
    server.kill()
    _remove(server.directory)
    server.start()


def restart_from(server: RedisServer, copy: Path) -> None:
    """Kill the server and start it with an older copy of its data."""
    server.kill()
    _remove(server.directory)
    _copy(copy, server.directory)
    server.start()


def restart_without_tail(server: RedisServer, size: int) -> None:
    """Kill the server, cut the last `size` bytes off its append-only file, and start it.

    It is what a power cut leaves of writes that were not synced.
    """
    server.kill()
    newest = max(
        (server.directory / "appendonlydir").glob("*.incr.aof"),
        key=lambda path: int(path.name.split(".")[-3]),
    )
    length = newest.stat().st_size
    if size >= length:
        raise ValueError(f"{newest.name} has no more than {length} bytes")
    with newest.open("rb+") as file:
        file.truncate(length - size)
    server.start()


def _copy(source: Path, target: Path) -> None:
    # With its owners: the server runs as a user of its own.
    for name in _DATA:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, copy_function=_copy_file)
            _copy_owner(source / name, target / name)
        elif (source / name).exists():
            _copy_file(source / name, target / name)


def _copy_file(source: str | Path, target: str | Path) -> None:
    shutil.copy2(source, target)
    _copy_owner(source, target)


def _copy_owner(source: str | Path, target: str | Path) -> None:
    status = Path(source).stat()
    shutil.chown(target, status.st_uid, status.st_gid)


def _remove(directory: Path) -> None:
    shutil.rmtree(directory / "appendonlydir", ignore_errors=True)
    (directory / "dump.rdb").unlink(missing_ok=True)
