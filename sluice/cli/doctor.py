"""`sluice doctor`: every dependency, version and setting, each failure with its fix."""

import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Final

import asyncpg
import typer
from redis.asyncio import Redis
from redis.exceptions import RedisError

from sluice.cli.database import findings
from sluice.cli.output import EXIT_UNEXPLAINED, Json, run, show
from sluice.connections import connect_postgres, connect_redis
from sluice.fitness import LEAST_REDIS
from sluice.queue import RecordQueue
from sluice.records import KINDS
from sluice.settings import Settings

LEAST_PYTHON: Final = (3, 11)
MOST_MEMORY: Final = 0.7
"""Of maxmemory; above it there is little time left to mend the database."""
_PACKAGES: Final = ("redis", "asyncpg", "websockets", "aiohttp", "msgspec", "uvloop")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `fix` says what to do where it is not sound."""

    what: str
    found: str
    is_sound: bool
    fix: str = ""


def doctor(*, as_json: Json = False) -> None:
    """Look at everything Sluice depends on; exit code 1 where anything needs a person."""

    async def work(settings: Settings) -> list[Finding]:
        return [
            *_host(settings),
            *await _redis(settings),
            *await _postgres(settings),
        ]

    found = run(work)
    show([_row(finding) for finding in found], as_json=as_json, empty="")
    if not all(finding.is_sound for finding in found):
        raise typer.Exit(EXIT_UNEXPLAINED)


def _row(finding: Finding) -> dict[str, Any]:
    fields = asdict(finding)
    return {**fields, "is_sound": "yes" if finding.is_sound else "NO"}


def _host(settings: Settings) -> Iterable[Finding]:
    yield Finding(
        "python",
        platform.python_version(),
        sys.version_info >= LEAST_PYTHON,
        "install Python 3.11 or later",
    )
    for package in _PACKAGES:
        yield Finding(package, version(package), is_sound=True)
    yield Finding(
        "SYMBOLS",
        ", ".join(map(str, settings.markets)) or "not set",
        bool(settings.markets),
        "name the markets to record, for example SYMBOLS=binance:BTCUSDT",
    )
    directory = settings.spool_dir
    while not directory.exists():
        directory = directory.parent
    yield Finding(
        "SPOOL_DIR",
        str(settings.spool_dir),
        os.access(directory, os.W_OK),
        f"let this user write to {directory}",
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
    dead = [(kind, await redis.llen(RecordQueue(redis, kind).dead_key)) for kind in KINDS]
    balances = [(kind, await RecordQueue(redis, kind).balance()) for kind in KINDS]
    letters = sum(count for _, count in dead)
    wrong = [kind for kind, balance in balances if not balance.is_exact]
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
            ", ".join(f"{kind} {count}" for kind, count in dead if count) or "none",
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
        server = ".".join(map(str, connection.get_server_version()[:2]))
        return [
            Finding("postgres", server, is_sound=True),
            *(
                Finding(row["what"], str(row["is"]), row["is_sound"], f"wanted: {row['wanted']}")
                for row in await findings(connection)
            ),
        ]
    finally:
        await connection.close()
