"""`sluice doctor`: every dependency, version and setting, each failure with its fix."""

import os
import platform
import re
import resource
import shutil
import stat
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Final

import asyncpg
import typer
from dotenv import dotenv_values
from redis.asyncio import Redis
from redis.exceptions import RedisError

from sluice.budget import Budget
from sluice.cli.database import findings
from sluice.cli.output import EXIT_UNEXPLAINED, Json, run, show
from sluice.clock import MICROS_PER_SECOND, now_micros
from sluice.connections import connect_postgres, connect_redis
from sluice.exchanges import EXCHANGES, Exchange
from sluice.exchanges.base import BadFrameError
from sluice.fitness import LEAST_REDIS
from sluice.queue import find_queues
from sluice.records import KINDS
from sluice.rest import RestClient, RestError
from sluice.settings import ENV_FILE, Settings

LEAST_PYTHON: Final = (3, 11)
LEAST_FILES: Final = 1024
MOST_MEMORY: Final = 0.7
"""Of maxmemory; above it there is little time left to mend the database."""
MOST_SKEW: Final = 1.0
"""Seconds that our clock may be off a venue's."""
_REQUIREMENT: Final = re.compile(r"([\w.-]+)(?:\[[^]]*\])?>=([\d.]+)")
_RIGHTS: Final = """
SELECT t.name, p.privilege FROM (VALUES
    ('markets', false), ('trades', false), ('orderbook_snapshots', false), ('klines', false),
    ('tickers', false), ('gaps', true), ('book_audits', false)
) AS t (name, is_replaced)
CROSS JOIN (VALUES ('SELECT'), ('INSERT'), ('UPDATE')) AS p (privilege)
WHERE to_regclass('public.' || t.name) IS NOT NULL
    AND (p.privilege <> 'UPDATE' OR t.is_replaced)
    AND NOT has_table_privilege('public.' || t.name, p.privilege)
ORDER BY 1, 2
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `fix` says what to do where it is not sound."""

    what: str
    found: str
    is_sound: bool
    fix: str = ""


def doctor(*, as_json: Json = False) -> None:
    """Look at everything Sluice depends on; exit code 1 where anything needs a person.

    Programs, settings, permissions, both servers, and each venue of SYMBOLS with its clock.
    """

    async def work(settings: Settings) -> list[Finding]:
        return [
            *_host(settings),
            *await _redis(settings),
            *await _postgres(settings),
            *await _venues(settings),
        ]

    found = run(work)
    show([_row(finding, as_json=as_json) for finding in found], as_json=as_json, empty="")
    if not all(finding.is_sound for finding in found):
        raise typer.Exit(EXIT_UNEXPLAINED)


def _row(finding: Finding, *, as_json: bool) -> dict[str, Any]:
    fields = {**asdict(finding), "fix": "" if finding.is_sound else finding.fix}
    return fields if as_json else {**fields, "is_sound": "yes" if finding.is_sound else "NO"}


def _host(settings: Settings) -> Iterable[Finding]:
    yield Finding(
        "python",
        platform.python_version(),
        sys.version_info >= LEAST_PYTHON,
        "install Python 3.11 or later",
    )
    yield from _packages()
    yield Finding(
        "SYMBOLS",
        ", ".join(map(str, settings.markets)) or "not set",
        bool(settings.markets),
        "name the markets to record, for example SYMBOLS=binance:BTCUSDT",
    )
    yield from _files(settings)


def _packages() -> Iterable[Finding]:
    """Compare what is installed with what the package says it needs."""
    for name, least in filter(None, map(_needed, requires("sluice") or ())):
        fix = f"{least} or later is needed: pip install --require-hashes -r requirements.txt"
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(name, "missing", is_sound=False, fix=fix)
            continue
        yield Finding(name, found, _numbers(found) >= _numbers(least), fix)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def _needed(requirement: str) -> tuple[str, str] | None:
    found = None if "extra ==" in requirement else _REQUIREMENT.match(requirement)
    return None if found is None else (found[1], found[2])


def _files(settings: Settings) -> Iterable[Finding]:
    for name, path in (("SPOOL_DIR", settings.spool_dir), ("LOG_FILE", settings.log_file)):
        if path is None:
            continue
        directory = path if path.is_dir() else path.parent
        while not directory.exists():
            directory = directory.parent
        yield Finding(
            name,
            str(path),
            os.access(directory, os.W_OK),
            f"let this user write to {directory}",
        )
        if name == "SPOOL_DIR":
            free = shutil.disk_usage(directory).free >> 20
            yield Finding(
                "disk of the spool",
                f"{free} MB free, SPOOL_MAX_MB {settings.spool_max_mb}",
                free >= settings.spool_max_mb,
                "make room, or lower SPOOL_MAX_MB: what does not fit is lost while Redis is away",
            )
    env_file = Path(ENV_FILE)
    if env_file.is_file():
        mode = stat.S_IMODE(env_file.stat().st_mode)
        holds_secret = any(
            value and name.upper().endswith(("_PASSWORD", "PROXY_URL"))
            for name, value in dotenv_values(env_file).items()
        )
        yield Finding(
            ENV_FILE,
            f"mode {mode:03o}, {'with' if holds_secret else 'without'} passwords",
            not (holds_secret and mode & 0o077),
            f"chmod 600 {ENV_FILE}: others can read the passwords",
        )
    most_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding(
        "open files",
        f"{most_files}",
        most_files >= LEAST_FILES,
        f"ulimit -n {LEAST_FILES}, or LimitNOFILE of the unit",
    )


async def _venues(settings: Settings) -> list[Finding]:
    """Ask each venue for its time."""
    found = []
    redis = connect_redis(settings)
    try:
        for name in sorted({market.exchange for market in settings.markets}):
            exchange = EXCHANGES[name]
            client = RestClient(exchange, settings, Budget(redis, exchange))
            try:
                found.append(await _venue(exchange, client))
            except (RestError, BadFrameError) as error:
                setting = exchange.rest_setting.upper()
                fix = f"look at the network, PROXY_URL and {setting}"
                found.append(Finding(name, str(error), is_sound=False, fix=fix))
            finally:
                await client.close()
    finally:
        await redis.aclose()
    return found


async def _venue(exchange: Exchange, client: RestClient) -> Finding:
    asked = now_micros()
    # Not through the budget: where Redis is away it would wait, and this costs next to nothing.
    theirs = exchange.read_time(await client.ask(exchange.time_request()))
    answered = now_micros()
    skew = ((asked + answered) / 2 - theirs) / MICROS_PER_SECOND
    return Finding(
        exchange.name,
        f"answers in {(answered - asked) / 1000:.0f} ms, our clock is off by {skew:+.2f} s",
        abs(skew) - (answered - asked) / 2 / MICROS_PER_SECOND <= MOST_SKEW,
        "set this machine's clock: systemctl enable --now systemd-timesyncd, or chrony",
    )


async def _redis(settings: Settings) -> list[Finding]:
    redis = connect_redis(settings)
    try:
        return await _look_at_redis(redis)
    except (RedisError, OSError) as error:
        return [Finding("redis", f"{error}", is_sound=False, fix="start it, or mend REDIS_HOST")]
    finally:
        await redis.aclose()


async def _look_at_redis(redis: Redis) -> list[Finding]:
    info = {**await redis.info("server"), **await redis.info("memory")}
    info |= await redis.info("persistence")
    number = str(info["redis_version"])
    most, used = int(info["maxmemory"]), int(info["used_memory"])
    queues = await find_queues(redis, KINDS)
    dead = [(queue.name, await queue.dead_length()) for queue in queues]
    balances = [(queue.name, await queue.balance()) for queue in queues]
    letters = sum(count for _, count in dead)
    wrong = [name for name, balance in balances if not balance.is_exact]
    return [
        Finding(
            "redis",
            number,
            int(number.split(".", maxsplit=1)[0]) >= LEAST_REDIS,
            f"Redis {LEAST_REDIS} or later is needed",
        ),
        Finding(
            "maxmemory-policy",
            str(info["maxmemory_policy"]),
            info["maxmemory_policy"] == "noeviction",
            "CONFIG SET maxmemory-policy noeviction: anything else throws records away",
        ),
        Finding(
            "appendonly",
            "yes" if info["aof_enabled"] else "no",
            bool(info["aof_enabled"]),
            "CONFIG SET appendonly yes: without it a restart loses what is queued",
        ),
        Finding(
            "redis memory",
            f"{used >> 20} of {most >> 20} MB" if most else f"{used >> 20} MB, no maxmemory",
            bool(most) and used <= MOST_MEMORY * most,
            "set maxmemory to 60 % of the machine's, and drain the queues",
        ),
        Finding(
            "dead letters",
            ", ".join(f"{name} {count}" for name, count in dead if count) or "none",
            letters == 0,
            "sluice dead list",
        ),
        Finding(
            "balance of the queues",
            ", ".join(wrong) or "exact",
            not wrong,
            "something else writes to the lists: pushed = acked + dead + length does not hold",
        ),
    ]


async def _postgres(settings: Settings) -> list[Finding]:
    try:
        connection = await connect_postgres(settings)
    except (OSError, asyncpg.PostgresError) as error:
        text = f"{type(error).__name__}: {error}"
        return [Finding("postgres", text, is_sound=False, fix="start it, or mend POSTGRES_HOST")]
    try:
        server = connection.get_server_version()
        return [
            Finding("postgres", f"{server.major}.{server.micro}", is_sound=True),
            await _rights(connection),
            *(
                Finding(row["what"], str(row["is"]), row["is_sound"], f"wanted: {row['wanted']}")
                for row in await findings(connection)
            ),
        ]
    finally:
        await connection.close()


async def _rights(connection: asyncpg.Connection) -> Finding:
    """Look whether the user may do what the flusher does."""
    lacking = [f"{row['privilege']} {row['name']}" for row in await connection.fetch(_RIGHTS)]
    user = await connection.fetchval("SELECT current_user")
    return Finding(
        "rights of the user",
        f"{user} lacks {', '.join(lacking)}" if lacking else f"{user} has them",
        not lacking,
        f'GRANT sluice_flusher TO "{user}"',
    )
