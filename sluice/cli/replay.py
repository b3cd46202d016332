"""`sluice replay`: a recording through the real pipeline into a database of its own."""

import asyncio
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Final

import asyncpg
import typer
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from sluice.cli import services
from sluice.cli.children import Child, RefusedError
from sluice.cli.database import prepare
from sluice.cli.output import EXIT_UNEXPLAINED, EXIT_UNREACHABLE, Json, show
from sluice.cli.run import write_environment
from sluice.connections import connect_postgres, connect_redis
from sluice.exchanges import EXCHANGES
from sluice.queue import balance_of
from sluice.recording import BadRecordingError, Tape
from sluice.records import KINDS
from sluice.schema import SchemaError
from sluice.settings import EXIT_BAD_SETTINGS, Settings, load_or_exit, parse_market

DATABASE: Final = "sluice_replay"
ENVIRONMENT: Final = Path(".sluice/replay.env")
"""Where the settings that lead to the database are left, for a shell to read."""
LOOK_SECONDS: Final = 0.2
TELL_SECONDS: Final = 5.0
STUCK_SECONDS: Final = 60.0
"""Queues whose length has not fallen for so long do not drain."""
CLAIM_SECONDS: Final = 30
_CLAIM: Final = "sluice:replay"
"""Marks a Redis database as a replay's own; `:alive` beside it expires when the replay is gone."""
_REDIS_DATABASES: Final = range(15, 0, -1)
_TABLES: Final = ("trades", "orderbook_snapshots", "klines", "tickers", "gaps", "book_audits")
_NAME_MARKETS: Final = """
INSERT INTO markets (exchange, symbol, id_kind)
SELECT $1, symbol, $3 FROM unnest($2::text[]) AS symbol
WHERE NOT EXISTS (SELECT FROM markets AS m WHERE m.exchange = $1 AND m.symbol = symbol)
ON CONFLICT DO NOTHING
"""
_CONTENTS: Final = """
SELECT m.exchange || ':' || m.symbol AS market, count(*) AS rows,
       lpad(to_hex((sum(hashtextextended((to_jsonb(t) - 'market_id')::text, 0)::numeric)
           % 9223372036854775807)::bigint), 16, '0') AS digest
FROM {table} AS t JOIN markets AS m USING (market_id)
WHERE m.exchange = $1 AND (cardinality($2::text[]) = 0 OR m.symbol = ANY ($2))
GROUP BY 1 ORDER BY 1
"""
"""Of one table, a row a market. The digest does not depend on the order of rows."""


def replay(
    files: Annotated[
        list[Path],
        typer.Argument(
            exists=True,
            dir_okay=False,
            readable=True,
            metavar="FILE...",
            help="Recordings of one venue: ours, or public ones.",
        ),
    ],
    market: Annotated[
        list[str] | None,
        typer.Option(help="Only this market, and its exchange; without one: all, of Binance."),
    ] = None,
    speed: Annotated[
        str, typer.Option(help="Times as fast as it was recorded, or max: as fast as it is stored.")
    ] = "max",
    database: Annotated[
        str, typer.Option(help="Where it goes; it is made where it is missing.")
    ] = DATABASE,
    *,
    as_json: Json = False,
) -> None:
    """Play recordings through collector, orderbook, Redis and flusher into a database.

    Every time that is stored is the recording's, so the same files give the same tables. Trades
    that a recording lacks are named by `gaps`. A private database of Redis is used, 1 to 15.
    `. .sluice/replay.env` leads other commands to the database.

    Prints rows and a digest a table and market. Exit code 1 when it was ended early, or anything
    was refused; 2 for bad files or settings; 3 when there are no servers.
    """
    load_or_exit()
    try:
        tape, symbols = _chosen(files, market or [])
        factor = 0.0 if speed == "max" else float(speed)
    except (BadRecordingError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    except ValueError as error:
        message = str(error) if market else f"--speed {speed}: a number, or max"
        raise typer.BadParameter(message) from error
    if factor < 0 or factor != factor:  # noqa: PLR0124  # no number equals itself but NaN
        raise typer.BadParameter(f"--speed {speed}: above 0, or max")
    try:
        found = services.find_or_bring(_say)
    except services.NoServicesError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(EXIT_UNREACHABLE) from error
    environment = {**found.environment, "POSTGRES_DB": database}
    write_environment(ENVIRONMENT, environment)
    os.environ.update(environment)
    settings = load_or_exit()
    work = _Replay(settings, tape, symbols, factor)
    try:
        rows, problem = asyncio.run(work.run())
    except (
        OSError,
        RedisError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        SchemaError,
    ) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise typer.Exit(EXIT_UNREACHABLE) from error
    except RefusedError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(EXIT_BAD_SETTINGS) from error
    show(rows, as_json=as_json, empty="nothing in it is stored")
    if problem:
        sys.stderr.write(f"{problem}\n")
        raise typer.Exit(EXIT_UNEXPLAINED)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _chosen(files: Sequence[Path], names: Sequence[str]) -> tuple[Tape, list[str]]:
    """Give the tape and the symbols that are asked for (none: all).

    Raises:
        BadRecordingError: a file is none, or belongs to another venue than another one.
        ValueError: there is no such market.
    """
    markets = [parse_market(name) for name in names]
    venues = {market.exchange for market in markets} or {
        prefix if (prefix := path.name.partition("_")[0]) in EXCHANGES else "binance"
        for path in files
    }
    if len(venues) > 1:
        raise BadRecordingError(f"one venue at a time: {', '.join(sorted(venues))}")
    tape = Tape.of(EXCHANGES[venues.pop()], files)
    held = tape.symbols()
    symbols = [market.symbol for market in markets]
    if missing := set(symbols) - set(held):
        raise BadRecordingError(
            f"no {', '.join(sorted(missing))} in these files; they hold {', '.join(held) or 'none'}"
        )
    if not held:
        raise BadRecordingError(f"nothing of a market of {tape.exchange.name} in these files")
    return tape, symbols


class _Replay:
    """One replay: the services as children, and somebody who waits for their end."""

    def __init__(
        self, settings: Settings, tape: Tape, symbols: Sequence[str], speed: float
    ) -> None:
        self._settings = settings
        self._tape = tape
        self._symbols = symbols
        self._speed = speed
        self._stop = asyncio.Event()

    async def run(self) -> tuple[list[dict[str, Any]], str]:
        """Play to the end; gives what the database then holds, and what went wrong, if anything."""
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signal_number, self._stop.set)
        await prepare(self._settings, _say)
        await self._name_markets()
        began = time.monotonic()
        async with _private_redis(self._settings) as (redis, number):
            directory = Path(tempfile.mkdtemp(prefix="sluice-replay-"))
            try:
                problem = await self._play(redis, self._environment(number, directory), directory)
            except BaseException:
                _say(f"the logs of its processes stay in {directory}")
                raise
            if problem:
                _say(f"the logs of its processes stay in {directory}")
            else:
                shutil.rmtree(directory)
        _say(f"{self._settings.postgres_db}: replayed in {time.monotonic() - began:.1f} s")
        return await self._contents(), problem

    async def _name_markets(self) -> None:
        """Give the markets their ids in the order of their names, whatever comes first."""
        connection = await connect_postgres(self._settings)
        try:
            exchange = self._tape.exchange
            wanted = self._symbols or self._tape.symbols()
            await connection.execute(_NAME_MARKETS, exchange.name, wanted, exchange.id_kind)
        finally:
            await connection.close()

    def _environment(self, redis_database: int, directory: Path) -> dict[str, str]:
        return {
            **os.environ,
            "REDIS_DB": str(redis_database),
            "SPOOL_DIR": str(directory / "spool"),
            "METRICS_PORT": "0",
            "FLUSH_INTERVAL_MS": "100",
        }

    async def _play(self, redis: Redis, environment: Mapping[str, str], logs: Path) -> str:
        options = ["--exchange", self._tape.exchange.name, "--speed", str(self._speed)]
        options += [word for symbol in self._symbols for word in ("--symbol", symbol)]
        paths = [str(path.resolve()) for path, _ in self._tape.files]
        sources = [
            Child([module, *options, *paths], environment, logs / f"{name}.log", _say)
            for name in ("collector", "orderbook")
            for module in (f"{name}.replay",)
        ]
        flusher = Child(["flusher"], environment, logs / "flusher.log", _say)
        flushing = asyncio.create_task(flusher.run())
        try:
            playing = [asyncio.create_task(source.run_once()) for source in sources]
            await self._watch(redis, [*playing, flushing])
            if self._stop.is_set():
                await asyncio.gather(*(source.stop(10) for source in sources))
            codes = await asyncio.gather(*playing)
            problem = await self._drain(redis)
            await flusher.stop(self._settings.drain_seconds + 5)
        finally:
            for child in (*sources, flusher):
                child.kill()
            await asyncio.gather(flushing, return_exceptions=True)
        for source, code in zip(sources, codes, strict=True):
            if code:
                return f"{source.log.stem} ended with {code}: {source.log_tail(3)}"
        if self._stop.is_set():
            return "it was ended early; what was played is stored"
        return problem

    async def _watch(self, redis: Redis, tasks: Sequence["asyncio.Task[Any]"]) -> None:
        """Wait until the sources have ended, the flusher failed, or a signal came."""
        *playing, flushing = tasks
        told = time.monotonic()
        while not self._stop.is_set() and not all(task.done() for task in playing):
            if flushing.done():
                flushing.result()
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                pushed = {kind: await balance_of(redis, kind) for kind in KINDS}
                _say(", ".join(f"{b.pushed} {kind}" for kind, b in pushed.items() if b.pushed))
            await asyncio.wait(tasks, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if any(task.done() for task in playing):
                await asyncio.sleep(LOOK_SECONDS)

    async def _drain(self, redis: Redis) -> str:
        """Wait until the queues are empty; gives what is wrong with them, if anything."""
        least, since = None, time.monotonic()
        while True:
            balances = [await balance_of(redis, kind) for kind in KINDS]
            depth = sum(balance.length for balance in balances)
            if depth == 0:
                break
            if least is None or depth < least:
                least, since = depth, time.monotonic()
            if time.monotonic() - since > STUCK_SECONDS:
                return f"{depth} records are left in the queues: see the flusher's log"
            await asyncio.sleep(LOOK_SECONDS)
        dead = sum(balance.dead for balance in balances)
        return f"the database refused {dead} records: see the flusher's log" if dead else ""

    async def _contents(self) -> list[dict[str, Any]]:
        connection = await connect_postgres(self._settings, command_timeout=600)
        try:
            await connection.execute("SET TIME ZONE 'UTC'; SET statement_timeout = 0")
            return [
                {"market": row["market"], "table": table, **dict(list(row.items())[1:])}
                for table in _TABLES
                for row in await connection.fetch(
                    _CONTENTS.format(table=table), self._tape.exchange.name, self._symbols
                )
            ]
        finally:
            await connection.close()


@asynccontextmanager
async def _private_redis(settings: Settings) -> AsyncIterator[tuple[Redis, int]]:
    """Claim a database of Redis that holds nothing, or what a replay left, and empty it after."""
    token = secrets.token_hex(8)
    redis, number = await _claimed(settings, token)
    keeping = asyncio.create_task(_keep_claim(redis, token))
    try:
        yield redis, number
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        with suppress(RedisError, OSError):  # what is left is marked as ours
            await redis.flushdb()
        await redis.aclose()


async def _claimed(settings: Settings, token: str) -> tuple[Redis, int]:
    for number in _REDIS_DATABASES:
        if number == settings.redis_db:
            continue
        redis = connect_redis(settings.model_copy(update={"redis_db": number}))
        try:
            if await _claim(redis, token):
                return redis, number
        except ResponseError as error:
            if "DB index" not in str(error):  # a Redis with fewer databases
                raise
        await redis.aclose()
    raise RedisError("no database of Redis from 1 to 15 is empty; a replay needs one of its own")


async def _claim(redis: Redis, token: str) -> bool:
    if await redis.dbsize() and not await redis.exists(_CLAIM):
        return False
    if not await redis.set(f"{_CLAIM}:alive", token, nx=True, ex=CLAIM_SECONDS):
        return False
    await redis.flushdb()  # what a replay that was killed has left
    await redis.mset({_CLAIM: token, f"{_CLAIM}:alive": token})
    return True


async def _keep_claim(redis: Redis, token: str) -> None:
    while True:
        with suppress(RedisError, OSError):
            await redis.set(f"{_CLAIM}:alive", token, ex=CLAIM_SECONDS)
        await asyncio.sleep(CLAIM_SECONDS / 3)
