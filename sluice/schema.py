"""The schema of the database: its text, its version, and how an older database is brought up."""

import asyncio
import re
from collections.abc import Callable, Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final, NamedTuple

import asyncpg

SCHEMA_VERSION: Final = 2
"""The version of schema.sql that this release writes to."""

LEAST_TIMESCALEDB: Final = (2, 19, 0)
_JOBS_FAIL_SINCE: Final = {16: 16, 17: 12, 18: 7}
_JOBS_WORK_SINCE: Final = {(2, 27): 3, (2, 28): 4, (2, 31): 2, (2, 32): 1}

_LOCK: Final = "hashtext('sluice.schema')"  # schema.sql takes the same one
_LOCK_TIMEOUT: Final = "2s"
_ATTEMPTS: Final = 10
_PAUSE_SECONDS: Final = 1.0
_BECOME_OWNER: Final = """
DO $$
DECLARE
    owner name := (
        SELECT tableowner FROM pg_tables
        WHERE schemaname = 'public' AND tablename = 'schema_version');
BEGIN
    IF owner <> current_user AND pg_has_role(current_user, owner, 'MEMBER') THEN
        EXECUTE format('SET LOCAL ROLE %I', owner);
    END IF;
END $$
"""
_is_migration = re.compile(r"(\d{4})-([a-z0-9-]+)\.sql").fullmatch


class SchemaError(Exception):
    """The database can not be brought to this release's schema; the message says what to do."""


class Migration(NamedTuple):
    """What brings a database of the version before to `version`."""

    version: int
    name: str
    text: str


def _find(name: str) -> Traversable:
    """Find a file of the repository: beside the packages, or inside them once installed."""
    checkout = Path(__file__).resolve().parents[1] / name
    return checkout if checkout.exists() else resources.files("sluice").joinpath(name)


def read_schema() -> str:
    """Give the text of schema.sql."""
    return _find("schema.sql").read_text(encoding="utf-8")


def read_migrations() -> list[Migration]:
    """Give what is in migrations/, in order."""
    found = []
    for file in _find("migrations").iterdir():
        if named := _is_migration(file.name):
            version, name = named.groups()
            found.append(Migration(int(version), name, file.read_text(encoding="utf-8")))
    return sorted(found)


async def schema_version(connection: asyncpg.Connection) -> int | None:
    """Give the version of the database's schema, or None where it has none."""
    try:
        version: int | None = await connection.fetchval(
            "SELECT max(version) FROM public.schema_version"
        )
    except asyncpg.UndefinedTableError:
        return None
    return version


async def upgrade(connection: asyncpg.Connection, say: Callable[[str], None]) -> None:
    """Bring a database to this release's schema, whatever it has now; safe at any time.

    Each migration is a transaction that stamps its version, so that a failure leaves the database
    at a version that works. None waits for a lock longer than two seconds, because whoever writes
    would wait behind it; it is tried again instead. `say` is told each thing done, a line.

    Raises:
        SchemaError: the database is newer than this release, or stays locked.
        asyncpg.PostgresError: what the server says.
    """
    version = await schema_version(connection)
    if version is not None and version > SCHEMA_VERSION:
        raise SchemaError(
            f"the database is at version {version}, this release knows {SCHEMA_VERSION}: "
            "install the release that made it"
        )
    if version is not None:
        for migration in read_migrations():
            if migration.version > version and await _migrate(connection, migration):
                say(f"applied migration {migration.version:04}-{migration.name}")
    await connection.execute(read_schema())
    if version is None:
        say(f"made the schema, version {SCHEMA_VERSION}")


async def _migrate(connection: asyncpg.Connection, migration: Migration) -> bool:
    """Apply a migration unless it has been; gives whether it was applied here."""
    for _ in range(_ATTEMPTS):
        try:
            async with connection.transaction():
                await connection.execute(f"SELECT pg_advisory_xact_lock({_LOCK})")
                if await schema_version(connection) != migration.version - 1:
                    return False  # somebody else was faster
                await connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'")
                await connection.execute(_BECOME_OWNER)
                await connection.execute(migration.text)
                await connection.execute(
                    "INSERT INTO public.schema_version (version) VALUES ($1)", migration.version
                )
        except asyncpg.LockNotAvailableError:
            await asyncio.sleep(_PAUSE_SECONDS)
        else:
            return True
    raise SchemaError(
        f"migration {migration.version:04}-{migration.name} got no lock in {_ATTEMPTS} attempts, "
        "and has changed nothing; find who holds one with pg_stat_activity, then run it again"
    )


def timescaledb_faults(
    version: tuple[int, ...], *, postgres: tuple[int, int], is_community: bool
) -> Iterator[str]:
    """Name what is wrong with a version of TimescaleDB for this use, and what mends it.

    Source: its CHANGELOG and release pages up to 2.32. Refreshes and background jobs are the
    Community edition's; the Apache edition has none.
    """
    if version < LEAST_TIMESCALEDB:
        yield "too old: 2.19 or later is needed"
    if not is_community:
        return
    if version < (2, 26, 3):
        yield "overlapping refreshes may store candles twice: 2.26.3 or later mends it"
    major, minor = postgres
    patch = _JOBS_WORK_SINCE.get((version[0], version[1]))
    do_jobs_work = version >= (2, 33) or (patch is not None and version[2] >= patch)
    if minor >= _JOBS_FAIL_SINCE.get(major, minor + 1) and not do_jobs_work:
        yield (
            f"its background jobs fail on PostgreSQL {major}.{minor}: 2.27.3, 2.28.4, 2.31.2, "
            "2.32.1 and later mend it"
        )


def version_numbers(text: str) -> tuple[int, ...]:
    """Read `2.19.3` or `2.20.0-dev`."""
    return tuple(int(part) for part in text.partition("-")[0].split("."))
