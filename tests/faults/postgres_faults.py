"""What can go wrong with a real PostgreSQL, on command.

A COMMIT whose reply is lost needs the proxy: `proxy.lose_reply(to=b"COMMIT")` with a
`PostgresDialogue`. A full disk: `disk`. A kill and a frozen server: `PostgresServer` itself.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import asyncpg

from sluice.cli.servers import PostgresServer
from tests.servers import Database


async def terminate_backends(database: Database) -> int:
    """End the sessions of all clients of the database, and give how many there were."""
    async with _administration(database) as connection:
        return await _terminate(connection, database=database.database)


def restart_immediately(server: PostgresServer) -> None:
    """Stop without a checkpoint and start: it recovers from its log. Blocks until it answers."""
    server.stop("immediate")
    server.start()


@asynccontextmanager
async def table_locked(database: Database, table: str) -> AsyncIterator[None]:
    """Hold the table in ACCESS EXCLUSIVE mode: who reads or writes it waits."""
    connection = await asyncpg.connect(database.dsn, timeout=60)
    try:
        async with connection.transaction():
            await connection.execute(f'LOCK TABLE "{table}" IN ACCESS EXCLUSIVE MODE')
            yield
    finally:
        await connection.close()


@asynccontextmanager
async def read_only(database: Database) -> AsyncIterator[None]:
    """Refuse every write, as a standby does; its sessions are ended at both turns."""
    async with _administration(database) as connection:
        name = database.database
        await connection.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
        await _terminate(connection, database=name)
        try:
            yield
        finally:
            await connection.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
            await _terminate(connection, database=name)


@asynccontextmanager
async def connections_refused(database: Database) -> AsyncIterator[None]:
    """Allow the database's user no connection (53300), after ending those it has.

    For a server of the test's own, whose superuser needs no password.

    Raises:
        ValueError: the user is a superuser, to whom no limit applies.
    """
    role = database.user
    async with _administration(replace(database, user="sluice", password="")) as connection:
        if await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = $1", role):
            raise ValueError(f"{role} is a superuser, to whom no limit applies")
        await connection.execute(f'ALTER ROLE "{role}" CONNECTION LIMIT 0')
        await _terminate(connection, role=role)
        try:
            yield
        finally:
            await connection.execute(f'ALTER ROLE "{role}" CONNECTION LIMIT -1')


@asynccontextmanager
async def _administration(database: Database) -> AsyncIterator[asyncpg.Connection]:
    """Connect to the database `postgres` of the same server."""
    connection = await asyncpg.connect(replace(database, database="postgres").dsn, timeout=60)
    try:
        yield connection
    finally:
        await connection.close()


async def _terminate(
    connection: asyncpg.Connection, *, database: str | None = None, role: str | None = None
) -> int:
    """End the clients' sessions in a database, or of a role; gives how many are gone."""
    ended: int = await connection.fetchval(
        "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid, 60000)) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        " AND (datname = $1 OR usename = $2)",
        database,
        role,
    )
    return ended
