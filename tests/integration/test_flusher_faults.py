"""The flusher when its servers fail, or are not what it needs: nothing lost, one line said."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Literal

import pytest
from loguru import logger
from redis.asyncio import Redis

from sluice import failpoints
from sluice.cli.servers import PostgresServer, RedisServer
from sluice.queue import RecordQueue
from tests.faults.framing import PostgresDialogue, RedisDialogue
from tests.faults.postgres_faults import (
    connections_refused,
    read_only,
    restart_immediately,
    table_locked,
    terminate_backends,
)
from tests.faults.proxy import Proxy
from tests.faults.redis_faults import restart_empty
from tests.faults.waiting import eventually
from tests.integration.flusher_rig import (
    Flusher,
    connected,
    counted,
    drained,
    fetch,
    flushing,
    letters,
    push,
    stored_ids,
    trade,
)
from tests.servers import Database, execute


@pytest.fixture
def environment(redis_environment: dict[str, str], postgres: Database) -> dict[str, str]:
    return {**redis_environment, **postgres.environment}


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Give the lines logged from WARNING on."""
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{level} {message}")
    yield lines
    logger.remove(sink)


def waits_for(flusher: Flusher, text: str) -> bool:
    return any(text in reason for reason in flusher.process.health.reasons)


async def test_backends_that_are_terminated_again_and_again_lose_nothing(
    environment: dict[str, str], postgres: Database, redis: Redis
) -> None:
    ended = pushed = 0
    async with flushing(environment, flush_batch_size=20) as flusher:
        while ended < 4:
            await push(redis, map(trade, range(pushed, pushed + 100)))
            pushed += 100
            ended += await terminate_backends(postgres)
        await drained(redis, "trade")
        await eventually(lambda: flusher.process.health.is_ready)
    assert await stored_ids(postgres) == list(range(pushed))
    balance = await RecordQueue(redis, "trade").balance()
    assert (balance.pushed, balance.acked, balance.dead) == (pushed, pushed, 0)


async def test_a_postgresql_that_crashes_is_waited_for_and_everything_is_stored(
    redis_environment: dict[str, str],
    private_postgres: PostgresServer,
    private_database: Database,
    redis: Redis,
) -> None:
    environment = {**redis_environment, **private_database.environment}
    async with flushing(environment, flush_batch_size=50) as flusher:
        await push(redis, map(trade, range(200)))
        await drained(redis, "trade")
        private_postgres.stop("immediate")
        await push(redis, map(trade, range(200, 400)))
        await eventually(lambda: waits_for(flusher, "trade"))
        await asyncio.to_thread(private_postgres.start)
        await drained(redis, "trade")
        await push(redis, map(trade, range(400, 600)))
        await asyncio.to_thread(restart_immediately, private_postgres)
        await drained(redis, "trade")
        await eventually(lambda: flusher.process.health.is_ready)
    assert await stored_ids(private_database) == list(range(600))
    assert await letters(redis) == []


async def test_servers_that_are_away_at_the_start_are_waited_for_with_a_line_each(
    private_postgres: PostgresServer,
    private_database: Database,
    private_redis: RedisServer,
    log: list[str],
) -> None:
    environment = {**private_redis.environment, **private_database.environment}
    private_postgres.stop()
    private_redis.stop()
    async with flushing(environment) as flusher:
        await eventually(lambda: any("Redis" in line for line in log))
        assert not flusher.process.health.is_ready
        await asyncio.to_thread(private_redis.start)
        await eventually(lambda: any("PostgreSQL" in line for line in log))
        assert waits_for(flusher, "postgres")
        async with Redis.from_url(private_redis.url) as redis:
            await push(redis, [trade(1)])
            await asyncio.to_thread(private_postgres.start)
            await drained(redis, "trade")
        await eventually(lambda: flusher.process.health.is_ready)
    assert await stored_ids(private_database) == [1]
    assert len([line for line in log if "Redis" in line]) == 1


async def test_a_redis_that_is_killed_comes_back_and_everything_is_stored(
    environment: dict[str, str], postgres: Database, private_redis: RedisServer
) -> None:
    async with flushing({**environment, **private_redis.environment}) as flusher:
        async with Redis.from_url(private_redis.url) as redis:
            await push(redis, map(trade, range(300)))
        private_redis.kill()
        await eventually(lambda: waits_for(flusher, "trade"))
        await asyncio.to_thread(private_redis.start)
        async with Redis.from_url(private_redis.url) as redis:
            await push(redis, map(trade, range(300, 500)))
            await drained(redis, "trade")
            assert (await RecordQueue(redis, "trade").balance()).is_exact
        await eventually(lambda: flusher.process.health.is_ready)
        await asyncio.to_thread(restart_empty, private_redis)
        async with Redis.from_url(private_redis.url) as redis:
            await push(redis, map(trade, range(500, 600)))
            await drained(redis, "trade")
    assert await stored_ids(postgres) == list(range(600))


async def test_what_replaces_a_list_while_its_batch_is_written_is_not_trimmed(
    environment: dict[str, str], postgres: Database, redis: Redis
) -> None:
    async with flushing(environment) as flusher:
        async with table_locked(postgres, "trades"):
            await push(redis, map(trade, range(100)))
            await eventually(lambda: _waits_for_a_lock(postgres))
            await redis.flushdb()
            await push(redis, map(trade, range(1000, 1100)))
        await drained(redis, "trade")
        balance = await RecordQueue(redis, "trade").balance()
        assert (balance.pushed, balance.acked, balance.dead) == (100, 100, 0)
        await flusher.stop()
    assert set(await stored_ids(postgres)) >= set(range(1000, 1100))


async def _waits_for_a_lock(postgres: Database) -> bool:
    return bool(await fetch(postgres, "SELECT FROM pg_locks WHERE NOT granted"))


@pytest.mark.parametrize("then", ["reset", "hang"])
async def test_a_lost_reply_to_commit_or_ack_is_made_up_for(
    then: Literal["reset", "hang"],
    redis_environment: dict[str, str],
    postgres: Database,
    redis: Redis,
    log: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flusher.writer.SILENCE_SECONDS", 0.5)
    monkeypatch.setattr("flusher.writer.COMMAND_SECONDS", 3600.0)  # nobody waits for it
    async with (
        Proxy(postgres.host, postgres.port, dialogue=PostgresDialogue) as to_postgres,
        Proxy(
            redis_environment["REDIS_HOST"],
            int(redis_environment["REDIS_PORT"]),
            dialogue=RedisDialogue,
        ) as to_redis,
    ):
        environment = {
            **redis_environment,
            **postgres.environment,
            "POSTGRES_HOST": "127.0.0.1",
            "POSTGRES_PORT": str(to_postgres.port),
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(to_redis.port),
        }
        async with flushing(environment) as flusher:
            await push(redis, [trade(1)])
            await drained(redis, "trade")
            to_postgres.lose_reply(to=b"COMMIT", then=then)
            await push(redis, [trade(2)])
            await drained(redis, "trade")
            assert to_postgres.counts.lost_replies == 1
            await eventually(lambda: flusher.process.health.is_ready)
            assert "1 inserted, 1 duplicates" in flusher.process.statistics_line()
            # Of the two scripts that run while something is queued, the second is the ack.
            to_redis.lose_reply(2, to=b"EVALSHA", then=then)
            await push(redis, [trade(3)])
            await eventually(lambda: to_redis.counts.lost_replies == 1)
            await drained(redis, "trade")
            await push(redis, [trade(4)])
            await drained(redis, "trade")
            await flusher.stop()
    assert any("was lost on its way" in line for line in log) is (then == "hang")
    assert await stored_ids(postgres) == [1, 2, 3, 4]
    balance = await RecordQueue(redis, "trade").balance()
    assert (balance.pushed, balance.acked, balance.dead, balance.length) == (4, 4, 0, 0)


@asynccontextmanager
async def table_missing(database: Database) -> AsyncIterator[None]:
    async with connected(database) as connection:
        await connection.execute("ALTER TABLE trades RENAME TO aside")
        yield
        await connection.execute("ALTER TABLE aside RENAME TO trades")


@asynccontextmanager
async def column_missing(database: Database) -> AsyncIterator[None]:
    async with connected(database) as connection:
        await connection.execute("ALTER TABLE trades RENAME first_id TO aside")
        yield
        await connection.execute("ALTER TABLE trades RENAME aside TO first_id")


@asynccontextmanager
async def column_too_many(database: Database) -> AsyncIterator[None]:
    async with connected(database) as connection:
        await connection.execute("ALTER TABLE trades ADD note text NOT NULL DEFAULT ''")
        await connection.execute("ALTER TABLE trades ALTER note DROP DEFAULT")
        yield
        await connection.execute("ALTER TABLE trades DROP note")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (table_missing, "UndefinedTableError"),
        (column_missing, "UndefinedColumnError"),
        (column_too_many, "NotNullViolationError"),
        (read_only, "ReadOnlySQLTransactionError"),
    ],
)
async def test_a_database_that_cannot_take_rows_is_waited_for_with_nothing_dead_lettered(
    fault: Callable[[Database], AbstractAsyncContextManager[None]],
    error: str,
    environment: dict[str, str],
    postgres: Database,
    redis: Redis,
    log: list[str],
) -> None:
    async with flushing(environment) as flusher:
        await push(redis, [trade(1)])
        await drained(redis, "trade")
        async with fault(postgres):
            await push(redis, [trade(2)])
            await eventually(lambda: counted(flusher, "flush_errors") > 3)
            await eventually(lambda: waits_for(flusher, error))
        await drained(redis, "trade")
        await eventually(lambda: flusher.process.health.is_ready)
    assert await stored_ids(postgres) == [1, 2]
    assert await letters(redis) == []
    assert 0 < len([line for line in log if error in line]) < counted(flusher, "flush_errors")
    assert not [line for line in log if "bug" in line]


async def test_the_flusher_s_own_role_is_enough_and_its_connections_may_be_refused(
    redis_environment: dict[str, str], private_database: Database, redis: Redis
) -> None:
    execute(private_database, "ALTER ROLE sluice_flusher LOGIN")
    own = replace(private_database, user="sluice_flusher")
    async with flushing({**redis_environment, **own.environment}) as flusher:
        await push(redis, [trade(1)])
        await drained(redis, "trade")
        async with connections_refused(own):
            await push(redis, [trade(2)])
            await eventually(lambda: waits_for(flusher, "TooManyConnectionsError"))
        await drained(redis, "trade")
    assert await stored_ids(private_database) == [1, 2]
    assert await letters(redis) == []


async def test_ids_of_markets_are_not_kept_beyond_a_connection(
    environment: dict[str, str], postgres: Database, redis: Redis
) -> None:
    async with flushing(environment) as flusher:
        await push(redis, [trade(1, symbol="AAA"), trade(2, symbol="BBB")])
        await drained(redis, "trade")
        # As after a restore from a copy, where other markets have these numbers.
        async with connected(postgres) as connection:
            await connection.execute("TRUNCATE markets, trades RESTART IDENTITY")
            await connection.execute(
                "INSERT INTO markets (exchange, symbol, id_kind) VALUES"
                " ('binance', 'ZZZ', 'raw'), ('binance', 'BBB', 'raw'), ('binance', 'AAA', 'raw')"
            )
        await terminate_backends(postgres)
        await push(redis, [trade(1, symbol="AAA"), trade(2, symbol="BBB")])
        await drained(redis, "trade")
        await flusher.stop()
    query = "SELECT symbol, trade_id FROM trades JOIN markets USING (market_id) ORDER BY 1"
    assert await fetch(postgres, query) == [("AAA", 1), ("BBB", 2)]


async def test_a_record_of_a_newer_version_stops_its_queue_and_nothing_before_it(
    environment: dict[str, str], postgres: Database, redis: Redis, log: list[str]
) -> None:
    newer = trade(3)[:-1] + b',"a field of tomorrow"]'
    async with flushing(environment) as flusher:
        queue = await push(redis, [trade(1), b"poison", newer, trade(4)])
        await eventually(lambda: waits_for(flusher, "upgrade this flusher"))
        assert await stored_ids(postgres) == [1]
        assert [letter["raw"] for letter in await letters(redis)] == [b"poison"]
        assert await queue.length() == 2
        assert await queue.head_item() == newer
        assert len([line for line in log if "upgrade" in line]) == 1
        await push(redis, [b"poison"], "ticker")  # the other queues flow
        await drained(redis, "ticker")
        await flusher.stop()
    assert (await queue.balance()).is_exact


async def test_a_full_dead_list_stops_its_queue_until_there_is_room(
    environment: dict[str, str],
    postgres: Database,
    redis: Redis,
    log: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flusher.drain.BLOCKED_SECONDS", 0.1)
    async with flushing(environment, dead_max=2) as flusher:
        queue = await push(redis, [b"1", b"2"])
        await drained(redis, "trade")
        await push(redis, [trade(1), b"3", trade(2)])
        await eventually(lambda: waits_for(flusher, "sluice dead list"))
        assert await queue.length() == 2
        assert len([line for line in log if line.startswith("ERROR trade: the queue stands")]) == 1
        await redis.ltrim(queue.dead_key, 1, -1)
        await drained(redis, "trade")
        await eventually(lambda: flusher.process.health.is_ready)
        await flusher.stop()
    assert await stored_ids(postgres) == [1, 2]
    assert [letter["raw"] for letter in await letters(redis)] == [b"2", b"3"]


async def test_more_poison_in_a_batch_than_the_dead_list_may_hold_is_met_one_room_at_a_time(
    environment: dict[str, str], postgres: Database, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flusher.drain.BLOCKED_SECONDS", 0.1)
    items = [item for n in range(5) for item in (trade(n), b"%d" % n)]
    queue = await push(redis, items)
    found = []
    async with flushing(environment, dead_max=2) as flusher:
        for rest in (5, 1):  # of the ten: the third and the fifth poison have no room

            async def is_met(rest: int = rest) -> bool:
                return await queue.length() == rest and waits_for(flusher, "sluice dead list")

            await eventually(is_met)
            found += [letter["raw"] for letter in await letters(redis)]
            assert (await queue.balance()).is_exact
            await redis.delete(queue.dead_key)
        await drained(redis, "trade")
        await flusher.stop()
    found += [letter["raw"] for letter in await letters(redis)]
    assert found == items[1::2]
    assert await stored_ids(postgres) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "point", sorted(name for name in failpoints.POINTS if name.startswith("flusher."))
)
async def test_an_error_that_nobody_foresaw_is_logged_as_a_bug_and_the_batch_tried_again(
    point: str,
    environment: dict[str, str],
    postgres: Database,
    redis: Redis,
    log: list[str],
    request: pytest.FixtureRequest,
) -> None:
    request.addfinalizer(lambda: failpoints.arm({}))
    failpoints.arm({"SLUICE_TESTING": "1", "SLUICE_FAILPOINT": f"{point}:1:raise"})
    async with flushing(environment) as flusher:
        queue = await push(redis, map(trade, range(10)))
        await eventually(lambda: any("a bug" in line and "FailpointError" in line for line in log))
        await drained(redis, "trade")
        await eventually(lambda: flusher.process.health.is_ready)
        await flusher.stop()
    assert await stored_ids(postgres) == list(range(10))
    assert (await queue.balance()).is_exact


async def test_two_flushers_on_the_same_queues_store_everything_once(
    environment: dict[str, str], postgres: Database, redis: Redis, log: list[str]
) -> None:
    async with (
        flushing(environment, flush_batch_size=30) as first,
        flushing(environment, flush_batch_size=40) as second,
    ):
        for start in range(0, 3000, 300):
            rows = [trade(n, symbol=f"M{n % 7}") for n in range(start, start + 300)]
            queue = await push(redis, [*rows, *reversed(rows[:100])])
        await drained(redis, "trade")
        await first.stop()
        await second.stop()
    assert await stored_ids(postgres) == list(range(3000))
    balance = await queue.balance()
    assert (balance.pushed, balance.acked, balance.dead, balance.length) == (4000, 4000, 0, 0)
    assert not [line for line in log if "Deadlock" in line]


async def test_a_database_without_the_schema_is_refused_with_one_line_until_it_is_there(
    redis_environment: dict[str, str], postgres: Database, redis: Redis, log: list[str]
) -> None:
    async with connected(postgres) as connection:
        await connection.execute("UPDATE schema_version SET version = 99")
    async with flushing({**redis_environment, **postgres.environment}) as flusher:
        await push(redis, [trade(1)])
        await eventually(lambda: waits_for(flusher, "version 99"))
        async with connected(postgres) as connection:
            await connection.execute("UPDATE schema_version SET version = 2")
        await drained(redis, "trade")
    assert len([line for line in log if "version 99" in line]) == 1
    assert await stored_ids(postgres) == [1]
