"""What the database must be like before rows are trusted to it."""

from typing import Final

import asyncpg
from loguru import logger

SCHEMA_VERSION: Final = 1
LEAST_TIMESCALEDB: Final = (2, 19)
_DURABLE: Final = ("fsync", "full_page_writes", "synchronous_commit")
# Versions whose ON CONFLICT or jobs were wrong, with what they break.
_KNOWN_BAD: Final = {
    "2.26.0": "rows may be duplicated by overlapping refreshes; 2.26.3 mends it",
    "2.26.1": "rows may be duplicated by overlapping refreshes; 2.26.3 mends it",
    "2.26.2": "rows may be duplicated by overlapping refreshes; 2.26.3 mends it",
}


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
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_TIMESCALEDB:
        raise UnfitDatabaseError(f"TimescaleDB {version} is too old: 2.19 or later is needed")
    if version in _KNOWN_BAD:
        logger.warning("TimescaleDB {}: {}", version, _KNOWN_BAD[version])
    try:
        schema = await connection.fetchval("SELECT max(version) FROM schema_version")
    except asyncpg.UndefinedTableError:
        schema = None
    if schema != SCHEMA_VERSION:
        raise UnfitDatabaseError(
            f"the schema is of version {schema}, this flusher writes {SCHEMA_VERSION}: run "
            "schema.sql or upgrade"
        )
    for setting in _DURABLE:
        if await connection.fetchval("SELECT current_setting($1)", setting) == "off":
            logger.warning(
                "PostgreSQL runs with {} off: rows it has confirmed can be lost when the machine "
                "stops",
                setting,
            )
