"""Every fault really happens: seen from outside, on real servers, with the products' libraries."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest
import uvloop
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from sluice.cli.servers import PostgresServer, RedisServer
from sluice.connections import connect_redis
from sluice.fitness import spool_is_fit
from sluice.settings import Settings
from tests.faults import postgres_faults, redis_faults
from tests.faults.disk import filled, small_file_system
from tests.faults.framing import PostgresDialogue, RedisDialogue
from tests.faults.proxy import Proxy
from tests.faults.waiting import CEILING, eventually
from tests.servers import Database, database_of

SOON = 0.3
"""Seconds that show that nothing comes, where what comes would come at once."""


@asynccontextmanager
async def client_of(port: int) -> AsyncIterator[Redis]:
    """Connect to Redis without the library's retries."""
    client = Redis(
        port=port,
        socket_timeout=CEILING,
        socket_connect_timeout=CEILING,
        retry=Retry(NoBackoff(), 0),
        single_connection_client=True,
    )
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def session_of(
    database: Database, port: int | None = None
) -> AsyncIterator[asyncpg.Connection]:
    """Connect to PostgreSQL, or to the proxy before it on this port."""
    target = database if port is None else replace(database, host="127.0.0.1", port=port)
    # A proxy cannot read what is encrypted.
    connection = await asyncpg.connect(target.dsn, timeout=CEILING, ssl=False)
    try:
        yield connection
    finally:
        connection.terminate()


class Echo:
    """Serves every connection its own bytes."""

    def __init__(self) -> None:
        self.writers: set[asyncio.StreamWriter] = set()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[int]:
        """Listen, and give the port."""
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for writer in self.writers:
                writer.close()
            await server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()
        self.writers.discard(writer)


@asynccontextmanager
async def connected(
    proxy: Proxy,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect through a proxy that has reached the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


@asynccontextmanager
async def unanswered(request: Awaitable[object]) -> AsyncIterator[asyncio.Future[object]]:
    """Make a request whose answer is not waited for, and give it up at the end."""
    task = asyncio.ensure_future(request)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def is_reset(reader: asyncio.StreamReader) -> bool:
    """Wait for the connection's end, and tell whether it was abrupt."""
    try:
        async with asyncio.timeout(CEILING):
            await reader.read()
    except ConnectionResetError:
        return True
    return False


async def is_silent(reader: asyncio.StreamReader) -> bool:
    """Tell whether nothing comes, not even an end."""
    try:
        async with asyncio.timeout(SOON):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


# The proxy ------------------------------------------------------------------------------------


async def test_a_proxy_without_faults_changes_nothing() -> None:
    sent = bytes(range(256)) * 8192
    async with (
        Echo().serve() as port,
        Proxy("127.0.0.1", port) as proxy,
        connected(proxy) as (reader, writer),
    ):
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent
        assert proxy.counts.bytes_to_server == proxy.counts.bytes_to_client == len(sent) + 5
        assert proxy.counts.delayed_chunks == 0


async def test_latency_and_jitter_delay_and_keep_the_order() -> None:
    async with (
        Echo().serve() as port,
        Proxy("127.0.0.1", port) as proxy,
        connected(proxy) as (reader, writer),
    ):
        clock = asyncio.get_running_loop().time
        proxy.to_client.latency, proxy.to_client.jitter = 0.2, 0.05
        start = clock()
        for number in range(20):
            writer.write(b"%02d" % number)
            await writer.drain()
            await asyncio.sleep(0.002)
        received = await reader.readexactly(40)
        assert received == b"".join(b"%02d" % number for number in range(20))
        assert clock() - start >= 0.19
        assert proxy.counts.delayed_chunks >= 1


async def test_a_rate_holds_back_what_is_over_it() -> None:
    async with (
        Echo().serve() as port,
        Proxy("127.0.0.1", port) as proxy,
        connected(proxy) as (reader, writer),
    ):
        clock = asyncio.get_running_loop().time
        proxy.to_server.bytes_per_second = 100_000
        start = clock()
        writer.write(bytes(30_000))
        await reader.readexactly(30_000)
        assert clock() - start >= 0.29


async def test_a_cut_ends_connections_in_order() -> None:
    async with Echo().serve() as port, Proxy("127.0.0.1", port) as proxy:
        async with connected(proxy) as (reader, _):
            assert proxy.cut() == 1
            assert not await is_reset(reader)
            await eventually(lambda: proxy.open_connections == 0)
        assert proxy.counts.cut == 1


async def test_a_reset_ends_connections_abruptly() -> None:
    async with Echo().serve() as port, Proxy("127.0.0.1", port) as proxy:
        async with connected(proxy) as (first, _), connected(proxy) as (second, _):
            assert proxy.reset_all() == 2
            assert await is_reset(first)
            assert await is_reset(second)
        assert proxy.counts.reset == 2
        async with connected(proxy):
            assert proxy.counts.connections == 3


async def test_half_open_is_silence_for_old_connections_and_nothing_for_new_ones() -> None:
    echo = Echo()
    async with (
        echo.serve() as port,
        Proxy("127.0.0.1", port) as proxy,
        connected(proxy) as (reader, writer),
    ):
        assert proxy.half_open() == 1
        await eventually(lambda: not echo.writers)
        writer.write(b"anybody?")
        await writer.drain()
        assert await is_silent(reader)
        assert proxy.counts.swallowed_bytes == len(b"anybody?")
        async with connected(proxy):
            pass
        proxy.heal()
        assert await is_reset(reader)


async def test_a_black_hole_swallows_new_connections_too_until_it_heals() -> None:
    async with (
        Echo().serve() as port,
        Proxy("127.0.0.1", port) as proxy,
        connected(proxy) as (reader, writer),
    ):
        proxy.blackhole()
        new_reader, new_writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        for each in (writer, new_writer):
            each.write(b"anybody?")
        assert await is_silent(reader)
        assert await is_silent(new_reader)
        await eventually(lambda: proxy.counts.swallowed_bytes == 16)
        proxy.heal()
        assert await is_reset(reader)
        assert await is_reset(new_reader)
        new_writer.close()
        async with connected(proxy):
            pass


async def test_an_idle_connection_survives_a_black_hole() -> None:
    async with (
        Echo().serve() as port,
        Proxy("127.0.0.1", port) as proxy,
        connected(proxy) as (reader, writer),
    ):
        proxy.blackhole()
        proxy.heal()
        writer.write(b"still here")
        assert await reader.readexactly(10) == b"still here"


async def test_a_server_that_is_away_is_a_refused_connection() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with Proxy("127.0.0.1", taken.getsockname()[1]) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            assert await is_reset(reader)
            writer.close()
            assert proxy.counts.refused == 1


async def test_a_proxy_ends_its_connections_with_itself() -> None:
    async with Echo().serve() as port:
        async with Proxy("127.0.0.1", port) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(b"hello")
            await reader.readexactly(5)
        assert await is_reset(reader)
        writer.close()


# The proxy understands Redis ------------------------------------------------------------------


@pytest.fixture
async def direct(private_redis: RedisServer) -> AsyncIterator[Redis]:
    async with client_of(private_redis.port) as client:
        yield client


@pytest.fixture
async def redis_proxy(private_redis: RedisServer) -> AsyncIterator[Proxy]:
    async with Proxy("127.0.0.1", private_redis.port, dialogue=RedisDialogue) as proxy:
        yield proxy


async def test_the_reply_to_the_nth_push_is_lost_and_the_push_is_not(
    direct: Redis, redis_proxy: Proxy
) -> None:
    async with client_of(redis_proxy.port) as client:
        await client.rpush("list", "1")
        redis_proxy.lose_reply(2, to=b"RPUSH")
        await client.rpush("list", "2")
        await client.llen("list")
        async with unanswered(client.rpush("list", "3")) as push:
            await eventually(lambda: redis_proxy.counts.lost_replies == 1)
            assert await direct.lrange("list", 0, -1) == [b"1", b"2", b"3"]
            assert not push.done()


async def test_a_lost_reply_in_a_pipeline_takes_the_later_ones_along(
    direct: Redis, redis_proxy: Proxy
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", redis_proxy.port)
    redis_proxy.lose_reply(2, to=b"RPUSH")
    item = "x" * 70_000
    push = f"*3\r\n$5\r\nRPUSH\r\n$4\r\nlist\r\n$70000\r\n{item}\r\n"
    writer.write(push.encode() * 3)

    async def are_all_pushed() -> bool:
        return await direct.llen("list") == 3

    await eventually(are_all_pushed)
    assert await reader.readexactly(4) == b":1\r\n"
    assert await is_silent(reader)
    assert redis_proxy.counts.lost_replies == 1
    redis_proxy.heal()
    assert await is_reset(reader)
    writer.close()


def test_a_dialogue_finds_the_ends_wherever_the_bytes_are_cut() -> None:
    ping, get = b"*1\r\n$4\r\nPING\r\n", b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n"
    push = b">2\r\n+message\r\n*2\r\n:1\r\n$-1\r\n"
    answers = [b"+PONG\r\n", b"|1\r\n+ttl\r\n:9\r\n%1\r\n$4\r\n\r\n+x\r\n*0\r\n"]
    whole = push + answers[0] + answers[1]
    for size in range(1, len(whole) + 1):
        dialogue = RedisDialogue()
        assert sum(dialogue.requested(part) for part in parts(ping + get, size)) == 2
        replies = [reply for part in parts(whole, size) for reply in dialogue.replied(part)]
        assert replies == [(None, push), (ping, answers[0]), (get, answers[1])]


def parts(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("protocol", [2, 3])
async def test_replies_of_every_shape_pass_unchanged(
    direct: Redis, redis_proxy: Proxy, protocol: int
) -> None:
    client = Redis(port=redis_proxy.port, protocol=protocol)
    try:
        await client.hset("hash", mapping={"a": "1", "b": ""})
        assert await client.hgetall("hash") == {b"a": b"1", b"b": b""}
        assert await client.lrange("none", 0, -1) == []
        assert await client.get("none") is None
        with pytest.raises(ResponseError):
            await client.lpush("hash", "1")
        nested = await client.eval("return {1, {2, {}}, 'x\\r\\n$5'}", 0)
        assert nested == [1, [2, []], b"x\r\n$5"]
        async with client.pubsub() as channel:
            await channel.subscribe("channel")
            await direct.publish("channel", "news")
            async with asyncio.timeout(CEILING):
                while (message := await channel.get_message(timeout=1)) is None or (
                    message["type"] == "subscribe"
                ):
                    pass
            assert message["data"] == b"news"
        assert redis_proxy.counts.requests >= 6
    finally:
        await client.aclose()


def test_a_reset_is_a_connection_error_on_uvloop_too(private_redis: RedisServer) -> None:
    async def reset_before_a_command() -> None:
        async with Proxy("127.0.0.1", private_redis.port) as proxy:
            client = connect_redis(Settings(redis_host="127.0.0.1", redis_port=proxy.port))
            try:
                connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]  # redis-py's
                transport = connection._writer.transport  # noqa: SLF001  # when it has noticed
                proxy.reset_all()
                await eventually(lambda: "closed=True" in repr(transport))
                with pytest.raises(RedisConnectionError):
                    await connection.send_command("PING")
                await client.connection_pool.release(connection)
                assert await client.ping()
            finally:
                await client.aclose()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(reset_before_a_command())


async def test_a_proxy_that_cannot_read_cannot_lose_a_reply() -> None:
    async with Proxy("127.0.0.1", 1) as proxy:
        with pytest.raises(ValueError, match="dialogue"):
            proxy.lose_reply()


# The proxy understands PostgreSQL -------------------------------------------------------------


async def test_the_reply_to_commit_is_lost_and_the_rows_are_there(postgres: Database) -> None:
    async with (
        Proxy(postgres.host, postgres.port, dialogue=PostgresDialogue) as proxy,
        session_of(postgres) as direct,
        session_of(postgres, proxy.port) as session,
    ):
        await session.execute("CREATE TABLE facts (fact integer)")
        proxy.lose_reply(2, to=b"COMMIT")
        for fact in (1, 2):
            transaction = session.transaction()
            await transaction.start()
            await session.execute("INSERT INTO facts VALUES ($1)", fact)
            if fact == 1:
                await transaction.commit()
        async with unanswered(session.execute("COMMIT")) as commit:
            await eventually(lambda: proxy.counts.lost_replies == 1)
            facts = await direct.fetchval("SELECT array_agg(fact ORDER BY fact) FROM facts")
            assert facts == [1, 2]
            assert not commit.done()
            session.terminate()


async def test_a_lost_commit_may_also_end_in_a_reset(postgres: Database) -> None:
    async with (
        Proxy(postgres.host, postgres.port, dialogue=PostgresDialogue) as proxy,
        session_of(postgres, proxy.port) as session,
    ):
        proxy.lose_reply(to=b"COMMIT", then="reset")
        with pytest.raises((OSError, asyncpg.PostgresConnectionError)):
            async with session.transaction():
                await session.execute("CREATE TABLE facts (fact integer)")
        async with session_of(postgres) as direct:
            assert await direct.fetchval("SELECT to_regclass('facts') IS NOT NULL")


async def test_copy_and_large_results_pass_a_reading_proxy(postgres: Database) -> None:
    async with (
        Proxy(postgres.host, postgres.port, dialogue=PostgresDialogue) as proxy,
        session_of(postgres, proxy.port) as session,
    ):
        await session.execute("CREATE TABLE numbers (number integer)")
        rows = [(number,) for number in range(50_000)]
        await session.copy_records_to_table("numbers", records=rows)
        assert await session.fetchval("SELECT array_agg(number ORDER BY number) FROM numbers") == [
            number for (number,) in rows
        ]


# Redis ----------------------------------------------------------------------------------------


async def test_a_frozen_redis_answers_nobody_and_then_goes_on(private_redis: RedisServer) -> None:
    async with client_of(private_redis.port) as client:
        await client.ping()
        with redis_faults.frozen(private_redis):
            answer = asyncio.ensure_future(client.ping())
            done, _ = await asyncio.wait([answer], timeout=SOON)
            assert not done
        assert await answer


async def test_a_killed_redis_refuses_and_comes_back_with_its_data(
    private_redis: RedisServer,
) -> None:
    async with client_of(private_redis.port) as client:
        await client.config_set("appendfsync", "always")
        await client.set("key", "value")
        private_redis.kill()
        with pytest.raises(RedisConnectionError):
            await client.ping()
        private_redis.start()
        assert await client.get("key") == b"value"


async def test_paused_clients_wait(private_redis: RedisServer) -> None:
    async with client_of(private_redis.port) as admin, client_of(private_redis.port) as client:
        await client.ping()
        start = asyncio.get_running_loop().time()
        await redis_faults.pause_clients(admin, 0.5)
        assert await client.set("key", "value")
        assert asyncio.get_running_loop().time() - start >= 0.45


async def test_a_full_memory_refuses_pushes_and_lets_read_and_trim(
    private_redis: RedisServer,
) -> None:
    async with client_of(private_redis.port) as client:
        await client.rpush("list", *range(10))
        async with redis_faults.memory_full(client):
            with pytest.raises(OutOfMemoryError):
                await client.rpush("list", "more")
            assert len(await client.lrange("list", 0, -1)) == 10
            assert await client.ltrim("list", 5, -1)
        assert await client.rpush("list", "more") == 6


async def test_a_read_only_redis_refuses_writes_and_keeps_its_data(
    private_redis: RedisServer,
) -> None:
    async with client_of(private_redis.port) as client:
        await client.set("key", "value")
        async with redis_faults.read_only(client):
            with pytest.raises(ReadOnlyError):
                await client.set("key", "other")
            assert await client.get("key") == b"value"
        assert await client.set("key", "other")


async def test_restarts_with_nothing_an_older_copy_and_without_the_tail(
    private_redis: RedisServer, tmp_path: Path
) -> None:
    async def read() -> list[bytes | str]:
        async with client_of(private_redis.port) as client:
            return await client.lrange("list", 0, -1)

    async with client_of(private_redis.port) as client:
        # Otherwise a write may wait for the sync of another one, and a kill would lose it.
        await client.config_set("appendfsync", "always")
        await client.rpush("list", "1")
        copy = redis_faults.copy_data(private_redis, tmp_path / "copy")
        await client.rpush("list", "2")
        await client.rpush("list", "3")
    redis_faults.restart_without_tail(private_redis, 1)
    assert await read() == [b"1", b"2"]
    redis_faults.restart_from(private_redis, copy)
    assert await read() == [b"1"]
    redis_faults.restart_empty(private_redis)
    assert await read() == []
    with pytest.raises(ValueError, match="no more than"):
        redis_faults.restart_without_tail(private_redis, 1 << 30)


@pytest.fixture
def small_directory(root: Path, tmp_path: Path) -> Iterator[Path]:  # noqa: ARG001  # skips without
    directory = tmp_path / "small"
    directory.mkdir()
    with small_file_system(directory, 160) as mounted:
        yield mounted


async def test_a_redis_on_a_full_disk_refuses_writes_until_there_is_room(
    root: Path, small_directory: Path
) -> None:
    server = RedisServer(root, small_directory)
    try:
        server.start()
        async with client_of(server.port) as client:
            await client.set("key", "value")

            async def is_refused() -> bool:
                try:
                    await client.rpush("list", "x" * 10_000)
                except RedisError as error:
                    return "MISCONF" in str(error)
                return False

            async def is_taken() -> bool:
                return not await is_refused()

            with filled(small_directory):
                await eventually(is_refused)
                assert await client.get("key") == b"value"
            await eventually(is_taken)
    finally:
        server.kill()


# PostgreSQL -----------------------------------------------------------------------------------


async def test_terminated_backends_are_gone(private_postgres: PostgresServer) -> None:
    database = database_of(private_postgres)
    async with session_of(database) as one, session_of(database) as other:
        assert await postgres_faults.terminate_backends(database) == 2
        for session in (one, other):
            with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
                await session.execute("SELECT 1")
        async with session_of(database) as new:
            assert await new.fetchval("SELECT 1") == 1


async def test_an_immediate_restart_recovers_what_was_committed(
    private_postgres: PostgresServer,
) -> None:
    database = database_of(private_postgres)
    async with session_of(database) as session:
        await session.execute("CREATE TABLE facts (fact integer)")
        await session.execute("INSERT INTO facts VALUES (1)")
        await session.execute("BEGIN; INSERT INTO facts VALUES (2)")
        postgres_faults.restart_immediately(private_postgres)
        with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
            await session.execute("COMMIT")
    async with session_of(database) as session:
        assert await session.fetchval("SELECT array_agg(fact) FROM facts") == [1]
    assert "was not properly shut down" in private_postgres.log_tail(100)


async def test_a_locked_table_lets_writers_wait(postgres: Database) -> None:
    async with session_of(postgres) as session:
        await session.execute("CREATE TABLE facts (fact integer); SET lock_timeout = '100ms'")
        async with postgres_faults.table_locked(postgres, "facts"):
            with pytest.raises(asyncpg.LockNotAvailableError):
                await session.execute("INSERT INTO facts VALUES (1)")
        await session.execute("INSERT INTO facts VALUES (1)")


async def test_a_read_only_database_refuses_writes_of_everybody(postgres: Database) -> None:
    async with session_of(postgres) as session:
        await session.execute("CREATE TABLE facts (fact integer)")
    async with postgres_faults.read_only(postgres), session_of(postgres) as session:
        assert await session.fetchval("SELECT count(*) FROM facts") == 0
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await session.execute("INSERT INTO facts VALUES (1)")
    async with session_of(postgres) as session:
        await session.execute("INSERT INTO facts VALUES (1)")


async def test_a_role_without_connections_is_refused(private_postgres: PostgresServer) -> None:
    private_postgres.execute("CREATE ROLE writer LOGIN")
    database = replace(database_of(private_postgres), user="writer")
    async with session_of(database) as session, postgres_faults.connections_refused(database):
        with pytest.raises(asyncpg.TooManyConnectionsError):
            await asyncpg.connect(database.dsn, timeout=CEILING)
        with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
            await session.execute("SELECT 1")
    async with session_of(database) as session:
        assert await session.fetchval("SELECT 1") == 1
    with pytest.raises(ValueError, match="superuser"):
        async with postgres_faults.connections_refused(database_of(private_postgres)):
            pass


async def test_a_postgres_on_a_full_disk_refuses_rows_until_there_is_room(
    root: Path, small_directory: Path
) -> None:
    server = PostgresServer(
        root, small_directory, options={"min_wal_size": "32MB", "max_wal_size": "48MB"}
    )
    grow = "INSERT INTO facts SELECT generate_series(1, 20000)"
    try:
        server.start()
        async with session_of(database_of(server)) as session:
            # A log segment that has room: a log that cannot grow ends the server.
            await session.execute("SELECT pg_switch_wal()")
            await session.execute("CREATE TABLE facts (fact integer)")
            await session.execute("CHECKPOINT")
            with filled(small_directory):
                with pytest.raises(asyncpg.DiskFullError):
                    await session.execute(grow)
                assert await session.fetchval("SELECT count(*) FROM facts") == 0
            await session.execute(grow)
            assert await session.fetchval("SELECT count(*) FROM facts") == 20000
    finally:
        server.kill()


def test_a_full_disk_keeps_no_process_from_starting(tmp_path: Path) -> None:
    with small_file_system(tmp_path, 1):
        settings = Settings(_env_file=None, spool_dir=tmp_path / "spool")
        with filled(tmp_path):
            spool_is_fit(settings)
        spool_is_fit(settings)


async def test_a_refusing_proxy_refuses_new_connections_and_takes_them_again() -> None:
    async with Echo().serve() as port, Proxy("127.0.0.1", port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        async with proxy.refusing() as ended:
            assert ended == 1
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"b")
        assert await reader.readexactly(1) == b"b"
        writer.close()
        await writer.wait_closed()
