"""What the database must be like before rows are trusted to it."""

from collections.abc import Iterator
from typing import Final

import asyncpg
from loguru import logger

SCHEMA_VERSION: Final = 1
LEAST_TIMESCALEDB: Final = (2, 19, 0)
_DURABLE: Final = ("fsync", "full_page_writes")  # synchronous_commit the flusher sets for itself


class UnfitDatabaseError(Exception):
    """The database lacks what Sluice needs; the message says what to do."""


async def check(connection: asyncpg.Connection) -> None:
    """Look at extension, schema and durability; warns where rows could be lost.

    Raises:
        UnfitDatabaseError: TimescaleDB or the schema is missing or of another version.
    """
    version = await connection.fetchval(
        "SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'"
    )
    if version is None:
        raise UnfitDatabaseError("TimescaleDB is not in this database: run schema.sql")
    timescaledb = _numbers(version)
    if timescaledb < LEAST_TIMESCALEDB:
        raise UnfitDatabaseError(f"TimescaleDB {version} is too old: 2.19 or later is needed")
    server = connection.get_server_version()
    for fault in faults_of((server.major, server.minor), timescaledb):
        logger.warning("TimescaleDB {}: {}", version, fault)
    try:
        schema = await connection.fetchval("SELECT max(version) FROM schema_version")
    except asyncpg.UndefinedTableError:
        schema = None
    if schema != SCHEMA_VERSION:
        found = "missing" if schema is None else f"of version {schema}"
        raise UnfitDatabaseError(
            f"the schema is {found}, this flusher writes version {SCHEMA_VERSION}: run schema.sql"
        )
    for setting in _DURABLE:
        if await connection.fetchval("SELECT current_setting($1)", setting) == "off":
            logger.warning(
                "PostgreSQL runs with {} off: rows it has confirmed can be lost when the machine "
                "stops",
                setting,
            )


def faults_of(postgres: tuple[int, int], timescaledb: tuple[int, ...]) -> Iterator[str]:
    """Name what is known to be wrong with a pair of versions, and what mends it.

    Source: TimescaleDB's CHANGELOG and release pages up to 2.32.
    """
    if (2, 26, 0) <= timescaledb < (2, 26, 3):
        yield "overlapping refreshes may store rows of candles twice; 2.26.3 mends it"
    first_minor = {16: 16, 17: 12, 18: 7}.get(postgres[0])
    if first_minor is not None and postgres[1] >= first_minor:
        mended = {(2, 27): 3, (2, 28): 4, (2, 31): 2, (2, 32): 1}
        patch = mended.get((timescaledb[0], timescaledb[1]))
        if timescaledb < (2, 33) and (patch is None or timescaledb[2] < patch):
            yield (
                f"its background jobs fail on PostgreSQL {postgres[0]}.{postgres[1]}; 2.27.3, "
                "2.28.4, 2.31.2 and 2.32.1 mend it"
            )


def _numbers(version: str) -> tuple[int, ...]:
    """Read `2.19.3` or `2.20.0-dev`."""
    return tuple(int(part) for part in version.partition("-")[0].split("."))
