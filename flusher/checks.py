"""What the database must be like before rows are trusted to it."""

from typing import Final

import asyncpg
from loguru import logger

from sluice.schema import (
    LEAST_TIMESCALEDB,
    SCHEMA_VERSION,
    schema_version,
    timescaledb_faults,
    version_numbers,
)

_LOST: Final = "rows it has confirmed can be lost when the machine stops"
_DURABLE: Final = {
    "fsync": _LOST,
    "full_page_writes": _LOST,
    "synchronous_commit": "the flusher turns it on for itself, other writers lose rows",
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
        raise UnfitDatabaseError("TimescaleDB is not in this database: run `sluice db init`")
    timescaledb = version_numbers(version)
    if timescaledb < LEAST_TIMESCALEDB:
        raise UnfitDatabaseError(f"TimescaleDB {version} is too old: 2.19 or later is needed")
    server = connection.get_server_version()
    for fault in timescaledb_faults(
        timescaledb,
        postgres=(server.major, server.micro),
        is_community=await connection.fetchval(
            "SELECT current_setting('timescaledb.license', true) = 'timescale'"
        ),
    ):
        logger.warning("TimescaleDB {}: {}", version, fault)
    schema = await schema_version(connection)
    if schema is None:
        raise UnfitDatabaseError("the database has no schema: run `sluice db init`")
    if schema != SCHEMA_VERSION:
        what = "run `sluice db upgrade`" if schema < SCHEMA_VERSION else "upgrade this flusher"
        raise UnfitDatabaseError(
            f"the schema is of version {schema}, this flusher writes version {SCHEMA_VERSION}: "
            f"{what}"
        )
    for setting, consequence in _DURABLE.items():
        if await connection.fetchval("SELECT current_setting($1)", setting) == "off":
            logger.warning("PostgreSQL runs with {} off: {}", setting, consequence)
