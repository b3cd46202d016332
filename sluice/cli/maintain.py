"""`sluice maintain`: keeps the candles true and the tables within their settings, by a timer.

What is to be done is planned from what the database says it is like; each step is safe to repeat.
Late candles come first and drops last, so that nothing is dropped that a candle still lacks.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import asyncpg
import typer

from sluice.cli.output import EXIT_UNEXPLAINED, Json, run, show
from sluice.connections import connect_postgres
from sluice.schema import SCHEMA_VERSION, schema_version
from sluice.settings import EXIT_BAD_SETTINGS, HYPERTABLES, Settings

DAY: Final = timedelta(days=1)
SETTLED: Final = timedelta(hours=1)
"""How old a trade is once the candles over it are stored; refresh_candles() says the same."""
_SESSION: Final = {
    "application_name": "sluice-maintain",
    "statement_timeout": "0",  # a first run stores the candles of a whole history
    "lock_timeout": "10s",  # who reads a chunk goes first, and the next run drops it
}


@dataclass(frozen=True)
class Step:
    """One thing to do: SQL and its arguments, one statement after the other."""

    what: str
    table: str
    detail: str
    statements: tuple[tuple[str, tuple[Any, ...]], ...]
    is_atomic: bool = False
    """Whether the statements are one transaction; a CALL of refresh_candles() can be in none."""


@dataclass(frozen=True)
class LateDay:
    """Where trades of one day came in late, as `late_ranges` has it."""

    from_time: datetime
    to_time: datetime
    market_ids: list[int]
    late_ids: list[int]


@dataclass(frozen=True)
class Found:
    """What the database is like."""

    now: datetime
    is_community: bool
    late: list[LateDay]
    kept_until: datetime | None
    """Before it, candles are stored; None on Community and where there are none."""
    has_trades: bool
    chunk_intervals: Mapping[str, timedelta]
    chunk_ends: Mapping[str, list[datetime]]
    """Of each table, when its chunks end."""
    policies: Mapping[tuple[str, str], tuple[int, timedelta | None]]
    """By procedure and table: the job, and its compress_after, drop_after or start_offset."""


class UnfitError(Exception):
    """Maintenance can not be done like this; `code` is what to exit with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def maintain(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    as_json: Json = False,
) -> None:
    """Store candles of late and closed days, apply the settings of tables, drop what is too old.

    Run it as the owner of the tables, every few minutes. Says what it did; two runs at once do not
    disturb each other. Exit code 2 where it is not the owner.
    """
    done: list[dict[str, str]] = []

    async def work(settings: Settings) -> None:
        connection = await connect_postgres(settings, server_settings=_SESSION)
        try:
            await _refuse_unfit(connection)
            # It ends with the connection.
            if not await connection.fetchval(
                "SELECT pg_try_advisory_lock(hashtext('sluice.maintain'))"
            ):
                sys.stderr.write("another sluice maintain runs: nothing done\n")
                return
            for step in plan(await look(connection), settings):
                if not dry_run:
                    await _carry_out(connection, step)
                done.append({"what": step.what, "table": step.table, "detail": step.detail})
        finally:
            await connection.close()

    try:
        run(work)
    except UnfitError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(error.code) from error
    except typer.Exit:
        if done:
            show(done, as_json=as_json, empty="")
        raise
    show(done, as_json=as_json, empty="nothing to do")
    if dry_run and done:
        sys.stderr.write("nothing of this was done: --dry-run\n")


async def _refuse_unfit(connection: asyncpg.Connection) -> None:
    owner = await connection.fetchval(
        "SELECT tableowner FROM pg_tables WHERE schemaname = 'public' AND tablename = 'trades'"
        " AND NOT pg_has_role(current_user, tableowner, 'USAGE')"
    )
    if owner is not None:
        user = await connection.fetchval("SELECT current_user")
        raise UnfitError(
            f"POSTGRES_USER: {user} may not maintain the tables of {owner}: run it as {owner}, or "
            f"GRANT {owner} TO {user}",
            EXIT_BAD_SETTINGS,
        )
    version = await schema_version(connection)
    if version != SCHEMA_VERSION:
        raise UnfitError(
            f"the schema is of version {version}, this release needs {SCHEMA_VERSION}: "
            "run `sluice db upgrade`",
            EXIT_UNEXPLAINED,
        )


async def _carry_out(connection: asyncpg.Connection, step: Step) -> None:
    if step.is_atomic:
        async with connection.transaction():
            for statement, arguments in step.statements:
                await connection.execute(statement, *arguments)
    else:
        for statement, arguments in step.statements:
            await connection.execute(statement, *arguments)


# What there is ---------------------------------------------------------------------------------

_LATE: Final = """
SELECT min(from_time) AS from_time, max(to_time) AS to_time,
    array_agg(DISTINCT market_id) AS market_ids, array_agg(DISTINCT late_id) AS late_ids
FROM late_ranges CROSS JOIN unnest(market_ids) AS market_id
GROUP BY time_bucket(INTERVAL '1 day', from_time)
ORDER BY 1
"""
_CHUNKS: Final = """
SELECT hypertable_name AS name, time_interval, (
    SELECT coalesce(array_agg(range_end ORDER BY range_end), '{}')
    FROM timescaledb_information.chunks AS c
    WHERE c.hypertable_schema = 'public' AND c.hypertable_name = d.hypertable_name) AS ends
FROM timescaledb_information.dimensions AS d
WHERE hypertable_schema = 'public' AND hypertable_name = ANY ($1)
"""
# The job of a continuous aggregate goes by the name of the view or of the table behind it.
_POLICIES: Final = """
SELECT proc_name, coalesce(view_name, j.hypertable_name) AS name, job_id,
    coalesce(config ->> 'compress_after', config ->> 'drop_after', config ->> 'start_offset')
        ::interval AS period
FROM timescaledb_information.jobs AS j
LEFT JOIN timescaledb_information.continuous_aggregates AS a
    ON j.hypertable_name IN (a.view_name, a.materialization_hypertable_name)
WHERE proc_name IN (
    'policy_compression', 'policy_retention', 'policy_refresh_continuous_aggregate')
"""


async def look(connection: asyncpg.Connection) -> Found:
    """Ask the database what it is like; raises what asyncpg raises."""
    is_community = await connection.fetchval(
        "SELECT current_setting('timescaledb.license') = 'timescale'"
    )
    tables = await connection.fetch(_CHUNKS, HYPERTABLES)
    kept_until = None
    if not is_community:
        kept_until = await connection.fetchval(
            "SELECT until FROM candles_kept_until WHERE until > '-infinity'"
        )
    return Found(
        now=await connection.fetchval("SELECT now()"),
        is_community=is_community,
        late=[LateDay(**dict(row)) for row in await connection.fetch(_LATE)],
        kept_until=kept_until,
        has_trades=await connection.fetchval("SELECT EXISTS (SELECT FROM trades)"),
        chunk_intervals={row["name"]: row["time_interval"] for row in tables},
        chunk_ends={row["name"]: row["ends"] for row in tables},
        policies={
            (row["proc_name"], row["name"]): (row["job_id"], row["period"])
            for row in await connection.fetch(_POLICIES)
        },
    )


# What to do ------------------------------------------------------------------------------------


_SET_CHUNK: Final = "SELECT set_chunk_time_interval($1::text::regclass, $2::interval)"


def plan(found: Found, settings: Settings) -> Iterator[Step]:
    """Give the steps from what the database is like to what the settings say, in order."""
    for late in found.late:
        yield Step(
            "candles of late trades",
            "candles",
            f"{late.from_time:%Y-%m-%d %H:%M} to {late.to_time:%Y-%m-%d %H:%M}, "
            f"{len(late.market_ids)} markets",
            (
                (
                    "CALL refresh_candles($1, $2, $3)",
                    (late.from_time, late.to_time, late.market_ids),
                ),
                # Those that were read, not those written since.
                ("DELETE FROM late_ranges WHERE late_id = ANY ($1)", (late.late_ids,)),
            ),
        )
    for name, wanted in settings.chunk_interval.items():
        if (there := found.chunk_intervals[name]) != wanted:
            yield Step(
                "chunk interval",
                name,
                f"{_text(there)} to {_text(wanted)}, for chunks to come",
                (
                    (
                        "SELECT set_chunk_time_interval($1::text::regclass, $2::interval)",
                        (name, wanted),
                    ),
                ),
            )
    yield from (_community if found.is_community else _apache)(found, settings)


_DROP: Final = "SELECT drop_chunks($1::text::regclass, older_than => $2::timestamptz)"
# Never before their candles are stored, whatever this run has come to.
_DROP_TRADES: Final = """
SELECT drop_chunks($1::text::regclass, older_than => least($2::timestamptz, until))
FROM candles_kept_until
"""
_COMPRESS: Final = "SELECT add_compression_policy($1::text::regclass, $2::interval)"
_RETAIN: Final = "SELECT add_retention_policy($1::text::regclass, $2::interval)"
_ALTER: Final = """
SELECT alter_job(job_id, config => config || jsonb_build_object($2::text, $3::interval))
FROM timescaledb_information.jobs WHERE job_id = $1
"""


def _apache(found: Found, settings: Settings) -> Iterator[Step]:
    """Do what the Community edition's policies do: store candles, then drop."""
    closed = _day(found.now - SETTLED)
    if found.has_trades and (found.kept_until is None or found.kept_until < closed):
        since = f"{found.kept_until:%Y-%m-%d}" if found.kept_until else "the beginning"
        yield Step(
            "candles of closed days",
            "candles",
            f"from {since} to before {closed:%Y-%m-%d}",
            (("CALL refresh_candles($1, $1)", (found.now,)),),
        )
    for name, days in settings.retention_days.items():
        cutoff = _day(found.now) - days * DAY
        if old := [end for end in found.chunk_ends[name] if end <= cutoff]:
            yield Step(
                "drop",
                name,
                f"{len(old)} chunks, all before {max(old):%Y-%m-%d %H:%M}",
                ((_DROP_TRADES if name == "trades" else _DROP, (name, cutoff)),),
            )


def _community(found: Found, settings: Settings) -> Iterator[Step]:
    """Set the policies, which do the rest."""
    for name in HYPERTABLES:
        wanted = settings.columnstore_after_days * DAY
        job, there = found.policies.get(("policy_compression", name), (None, None))
        if there != wanted:
            yield Step(
                "columnstore",
                name,
                f"after {_text(wanted)}" + (f", was {_text(there)}" if there else ""),
                (_alter(job, "compress_after", wanted) if job else (_COMPRESS, (name, wanted)),),
            )
    for name in HYPERTABLES:
        yield from _retention(found, name, settings.retention_days.get(name))


def _retention(found: Found, name: str, days: int | None) -> Iterator[Step]:
    """Set or end the retention of a table; of trades, with the start of their candles' refresh.

    That start is always a day younger than what is dropped: a refresh over dropped trades would
    delete their candles.
    """
    job, there = found.policies.get(("policy_retention", name), (None, None))
    wanted = days * DAY if days else None
    statements: list[tuple[str, tuple[Any, ...]]] = []
    if name == "trades":
        refresh, start = found.policies["policy_refresh_continuous_aggregate", "candles_1m"]
        wanted_start = wanted - DAY if wanted else None
        if start != wanted_start:
            statements.append(_alter(refresh, "start_offset", wanted_start))
    if wanted is None and job:
        statements.append(
            ("SELECT remove_retention_policy($1::text::regclass, if_exists => true)", (name,))
        )
    elif job and there != wanted:
        statements.append(_alter(job, "drop_after", wanted))
    elif wanted and not job:
        statements.append((_RETAIN, (name, wanted)))
    if not statements:
        return
    if name == "trades" and wanted and (there is None or wanted < there):
        yield Step(
            "candles of all days",
            "candles",
            "before their trades are dropped for the first time",
            (("CALL refresh_candles('-infinity', $1)", (found.now,)),),
        )
    yield Step(
        "retention",
        name,
        (f"drop after {_text(wanted)}" if wanted else "keep everything")
        + (f", was {_text(there)}" if there else ""),
        tuple(statements),
        is_atomic=True,
    )


def _alter(job: int, key: str, period: timedelta | None) -> tuple[str, tuple[Any, ...]]:
    return _ALTER, (job, key, period)


def _day(time: datetime) -> datetime:
    return time.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _text(period: timedelta) -> str:
    """Write a period as one writes it in the settings."""
    hours = round(period / timedelta(hours=1))
    return f"{hours // 24}d" if hours % 24 == 0 else f"{hours}h"
