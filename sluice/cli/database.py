"""`sluice db`: makes the database, says whether it can be trusted, keeps its candles."""

from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final

import asyncpg
import typer

from sluice.cli.debian import Say
from sluice.cli.output import EXIT_UNEXPLAINED, Json, run, show
from sluice.connections import connect_postgres
from sluice.settings import Settings

SCHEMA_VERSION: Final = 1
"""The version of schema.sql that this release writes to."""

LEAST_TIMESCALEDB: Final = (2, 19, 0)
_JOBS_FAIL_ON: Final = {16: 16, 17: 12, 18: 7}
_JOBS_WORK_SINCE: Final = {27: 3, 28: 4, 31: 2}

app = typer.Typer(name="db", help="Make the database, check it, keep its candles.")


def read_schema() -> str:
    """Give the text of schema.sql: beside the packages, or inside them once installed."""
    checkout = Path(__file__).resolve().parents[2] / "schema.sql"
    if checkout.is_file():
        return checkout.read_text(encoding="utf-8")
    return resources.files("sluice").joinpath("schema.sql").read_text(encoding="utf-8")


async def prepare(settings: Settings, say: Say) -> None:
    """Make the database where it is missing, and apply the schema; raises what asyncpg raises."""
    try:
        connection = await connect_postgres(settings)
    except asyncpg.InvalidCatalogNameError:
        name = settings.postgres_db
        say(f"creating the database {name}")
        maintenance = await connect_postgres(
            settings.model_copy(update={"postgres_db": "postgres"})
        )
        try:
            quoted = name.replace('"', '""')
            await maintenance.execute(f'CREATE DATABASE "{quoted}" TEMPLATE template0')
        finally:
            await maintenance.close()
        connection = await connect_postgres(settings)
    try:
        await connection.execute(read_schema())
    finally:
        await connection.close()


@app.command("init")
def init() -> None:
    """Apply schema.sql; safe at any time and any number of times."""

    async def work(settings: Settings) -> None:
        connection = await connect_postgres(settings)
        try:
            await connection.execute(read_schema())
        finally:
            await connection.close()

    run(work)


@app.command("check")
def check(*, as_json: Json = False) -> None:
    """Say whether the database can be trusted with data; exit 1 where it can not."""

    async def work(settings: Settings) -> list[dict[str, Any]]:
        connection = await connect_postgres(settings)
        try:
            return await findings(connection)
        finally:
            await connection.close()

    found = run(work)
    show(found, as_json=as_json, empty="")
    if not all(finding["is_sound"] for finding in found):
        raise typer.Exit(EXIT_UNEXPLAINED)


@app.command("candles")
def candles(
    since: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="The first day (UTC); the day before yesterday."),
    ] = None,
) -> None:
    """Store the candles of closed days, late trades included: daily, as the owner of the tables.

    The Apache edition stores none by itself; on Community this only hurries its own jobs.
    """
    now = datetime.now(tz=UTC)
    first = since.replace(tzinfo=UTC) if since else now - timedelta(days=2)

    async def work(settings: Settings) -> None:
        connection = await connect_postgres(settings)
        try:
            await connection.execute("CALL refresh_candles($1, $2)", first, now)
        finally:
            await connection.close()

    run(work)


async def findings(connection: asyncpg.Connection) -> list[dict[str, Any]]:
    """Look at what makes the database trustworthy; a row each. Raises what asyncpg raises."""
    found: list[dict[str, Any]] = []

    def note(what: str, value: object, wanted: str, *, is_sound: bool) -> None:
        found.append({"what": what, "is": value, "wanted": wanted, "is_sound": is_sound})

    for setting in ("synchronous_commit", "fsync", "full_page_writes"):
        value = await connection.fetchval("SELECT current_setting($1)", setting)
        note(setting, value, "on", is_sound=value == "on")
    version = await connection.fetchval(
        "SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'"
    )
    if version is None:
        note("timescaledb", None, "the extension; run sluice db init", is_sound=False)
        return found
    is_community = await connection.fetchval(
        "SELECT current_setting('timescaledb.license') = 'timescale'"
    )
    server = connection.get_server_version()
    fault = timescaledb_fault(
        _numbers(version),
        is_community=is_community,
        postgres=(server.major, server.micro),
    )
    note("timescaledb", version, fault or "2.19 or later", is_sound=fault is None)
    if await connection.fetchval("SELECT to_regclass('public.schema_version') IS NULL"):
        note("schema", None, f"{SCHEMA_VERSION}; run sluice db init", is_sound=False)
        return found
    schema = await connection.fetchval("SELECT max(version) FROM schema_version")
    note("schema", schema, str(SCHEMA_VERSION), is_sound=schema == SCHEMA_VERSION)
    aggregates = await connection.fetchval(
        "SELECT count(*) FROM timescaledb_information.continuous_aggregates"
        " WHERE view_name IN ('candles_1m', 'candles_5m', 'candles_1h', 'candles_1d')"
    )
    expected = 4 if is_community else 0
    note(
        "continuous aggregates",
        aggregates,
        f"{expected} on this edition; sluice db init makes it so",
        is_sound=aggregates == expected,
    )
    return found


def timescaledb_fault(
    version: tuple[int, ...], *, is_community: bool, postgres: tuple[int, int]
) -> str | None:
    """Say what is wrong with a version of TimescaleDB for this use, or None.

    Known from its changelog: before 2.26.3 overlapping refreshes of continuous aggregates stored
    rows twice, and on PostgreSQL 16.16, 17.12, 18.7 and later every background job fails before
    2.27.3, 2.28.4, 2.31.2 and 2.32.1. Neither touches the Apache edition, which has no such jobs.
    """
    if version < LEAST_TIMESCALEDB:
        return "2.19 or later: this one is too old"
    if not is_community:
        return None
    if version < (2, 26, 3):
        return "2.26.3 or later: refreshes may store candles twice"
    major, minor = postgres
    patch = _JOBS_WORK_SINCE.get(version[1])
    do_jobs_work = version >= (2, 32, 1) or (patch is not None and version[2] >= patch)
    if minor >= _JOBS_FAIL_ON.get(major, minor + 1) and not do_jobs_work:
        return f"a patch that runs its jobs on PostgreSQL {major}.{minor}: 2.32.1 or later"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("-", maxsplit=1)[0].split("."))
