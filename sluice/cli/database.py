"""`sluice db`: makes the database, says whether it can be trusted, keeps its candles."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import asyncpg
import typer

from sluice import schema
from sluice.cli.debian import Say
from sluice.cli.output import EXIT_UNEXPLAINED, Json, run, show
from sluice.connections import connect_postgres
from sluice.schema import (
    SCHEMA_VERSION,
    SchemaError,
    read_schema,
    timescaledb_faults,
    version_numbers,
)
from sluice.settings import Settings

app = typer.Typer(name="db", help="Make the database, check it, keep its candles.")


async def prepare(settings: Settings, say: Say) -> None:
    """Make the database where it is missing, and bring its schema up; raises as `upgrade` does."""
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
        await schema.upgrade(connection, say)
    finally:
        await connection.close()


@app.command("init")
def init() -> None:
    """Apply schema.sql; safe at any time and any number of times.

    A database of another version is refused with exit code 1.
    """

    async def work(connection: asyncpg.Connection) -> None:
        version = await schema.schema_version(connection)
        if version not in {None, SCHEMA_VERSION}:
            raise SchemaError(
                f"the database is at version {version}, this release makes {SCHEMA_VERSION}: "
                "run `sluice db upgrade`"
            )
        await connection.execute(read_schema())

    _change(work)


@app.command("upgrade")
def upgrade() -> None:
    """Bring the database to this release's schema, and say what was done; safe at any time.

    Makes the schema where there is none. A newer database is refused with exit code 1.
    """

    async def work(connection: asyncpg.Connection) -> None:
        await schema.upgrade(connection, typer.echo)
        typer.echo(f"the schema is at version {SCHEMA_VERSION}")

    _change(work)


def _change(work: Callable[[asyncpg.Connection], Awaitable[None]]) -> None:
    """Do something to the schema; where it can not be done, that is one line and exit 1."""

    async def call(settings: Settings) -> None:
        connection = await connect_postgres(settings)
        try:
            await work(connection)
        finally:
            await connection.close()

    try:
        run(call)
    except SchemaError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(EXIT_UNEXPLAINED) from error


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
    """Store the candles since a day, late trades included, as the owner of the tables.

    `sluice maintain` does so by itself; this is for rows that did not come through the flusher.
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
    faults = list(
        timescaledb_faults(
            version_numbers(version),
            postgres=(server.major, server.micro),
            is_community=is_community,
        )
    )
    note("timescaledb", version, "; ".join(faults) or "2.19 or later", is_sound=not faults)
    stamped = await schema.schema_version(connection)
    if stamped is None:
        note("schema", None, f"{SCHEMA_VERSION}; run sluice db init", is_sound=False)
        return found
    wanted = {True: "; run sluice db upgrade", False: ""}[stamped < SCHEMA_VERSION]
    note("schema", stamped, f"{SCHEMA_VERSION}{wanted}", is_sound=stamped == SCHEMA_VERSION)
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
    if is_community:
        drop, start = (await connection.fetch(_RETENTION))[0]
        note(
            "candles and retention",
            "nothing is dropped"
            if drop is None
            else f"dropped after {drop}, refreshed from {start}",
            "a refresh that starts after what is dropped; sluice maintain makes it so",
            is_sound=drop is None or (start is not None and start < drop),
        )
    else:
        until, is_behind = (await connection.fetch(_KEPT))[0]
        note(
            "candles of closed days",
            f"stored before {until}",
            "stored daily by sluice maintain; is its timer on?",
            is_sound=not is_behind,
        )
    return found


_KEPT: Final = """
SELECT until::date::text, EXISTS (
    SELECT FROM trades WHERE time >= until AND time < now() - INTERVAL '2 days')
FROM candles_kept_until
"""
# A refresh over dropped trades would delete their candles.
_RETENTION: Final = """
SELECT max((config ->> 'drop_after')::interval), max((config ->> 'start_offset')::interval)
FROM timescaledb_information.jobs AS j
LEFT JOIN timescaledb_information.continuous_aggregates AS a
    ON j.hypertable_name IN (a.view_name, a.materialization_hypertable_name)
WHERE (proc_name = 'policy_retention' AND j.hypertable_name = 'trades')
    OR (proc_name = 'policy_refresh_continuous_aggregate' AND view_name = 'candles_1m')
"""
