"""Databases on real servers: where a test's own one is, and how it is made."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex
from urllib.parse import quote

import asyncpg

from sluice.cli.servers import PostgresServer

SCHEMA = (Path(__file__).resolve().parents[1] / "schema.sql").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Database:
    """One PostgreSQL database and who may do anything in it."""

    host: str
    port: int
    user: str
    password: str
    database: str

    @property
    def dsn(self) -> str:
        password = f":{quote(self.password, safe='')}" if self.password else ""
        return f"postgresql://{self.user}{password}@{self.host}:{self.port}/{self.database}"

    @property
    def environment(self) -> dict[str, str]:
        """The settings that lead a process to it."""
        return {
            "POSTGRES_HOST": self.host,
            "POSTGRES_PORT": str(self.port),
            "POSTGRES_USER": self.user,
            "POSTGRES_PASSWORD": self.password,
            "POSTGRES_DB": self.database,
            "POSTGRES_SSLMODE": "disable",
        }


def database_of(server: PostgresServer, database: str = "postgres") -> Database:
    return Database("127.0.0.1", server.port, "sluice", server.password or "", database)


def execute(database: Database, *statements: str) -> None:
    """Run SQL; from a thread of its own, so that it may be called with a loop running or not."""

    async def run() -> None:
        connection = await asyncpg.connect(database.dsn, timeout=60)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(run())).result()


@contextmanager
def fresh_database(administration: Database, *, template: str = "template0") -> Iterator[Database]:
    """Make a database from a template, and drop it at the end, whoever is connected to it."""
    name = f"sluice_test_{token_hex(6)}"
    execute(administration, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    try:
        yield replace(administration, database=name)
    finally:
        execute(administration, f'DROP DATABASE "{name}" WITH (FORCE)')


@contextmanager
def schema_template(administration: Database) -> Iterator[str]:
    """Make a database with the schema that others are copied from, and give its name."""
    with fresh_database(administration) as template:
        execute(template, SCHEMA)
        # TimescaleDB's scheduler would hold a connection to it, and what is connected to is not
        # copied.
        name = template.database
        execute(
            administration,
            f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false',
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
        )
        yield name
