"""What Redis and the disk must be like before data is trusted to them."""

import asyncio
import errno
import sqlite3
from contextlib import suppress

from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from sluice.backoff import Backoff
from sluice.connections import access_problem
from sluice.metrics import Health
from sluice.queue import REWRITTEN_BY
from sluice.settings import BadSettingsError, Settings
from sluice.spool import Spool

LEAST_REDIS = 7
START_SECONDS = 1.0
"""How often Redis is asked whether it has started anew."""


async def redis_is_fit(redis: Redis, health: Health) -> None:
    """Wait until Redis answers, and return once it is one that loses nothing.

    Not ready until then. A Redis that is away is waited for, with one line.

    Raises:
        BadSettingsError: it is too old, or its maxmemory-policy throws records away.
    """
    health.wait_for("redis", "not reached yet")
    backoff = Backoff(first=0.2, most=5.0)
    told = None
    while True:
        try:
            server = await redis.info("server")
            memory = await redis.info("memory")
            persistence = await redis.info("persistence")
            break
        except (RedisError, OSError) as error:
            problem = access_problem(error)
            if problem != told:
                if problem:
                    logger.error("{}; waiting for it", problem)
                else:
                    logger.warning("Redis does not answer ({}); waiting for it", error)
            told = problem
            health.wait_for("redis", problem or str(error))
            await asyncio.sleep(backoff.next_delay())
    version = str(server["redis_version"])
    if int(version.split(".", maxsplit=1)[0]) < LEAST_REDIS:
        raise BadSettingsError(f"REDIS_HOST: Redis {version} is too old; {LEAST_REDIS} is needed")
    policy = memory["maxmemory_policy"]
    if policy != "noeviction":
        raise BadSettingsError(
            f"REDIS_HOST: its maxmemory-policy is {policy}, which throws queued records away when "
            "memory is short; set it to noeviction"
        )
    if not persistence["aof_enabled"]:
        logger.warning(
            "Redis keeps no append-only file: when it restarts, what is queued is lost and must "
            "be fetched again; set appendonly yes"
        )
    health.ready("redis")


async def keep_file_whole(redis: Redis, stop: asyncio.Event) -> None:
    """Have Redis rewrite its append-only file after each of its starts, until `stop`.

    A power cut can tear a transaction apart at the file's end. Redis passes over it, but may leave
    its beginning in the file, and applies that at its next start together with what was appended
    since: holes vanish, and a batch is trimmed twice (seen with 8.0.2). A rewritten file has no
    torn end. Each start of Redis is seen to once, by whichever process comes first.
    """
    seen = ""
    while not stop.is_set():
        with suppress(RedisError, OSError):
            run_id = str((await redis.info("server"))["run_id"])
            if run_id != seen:
                if await redis.get(REWRITTEN_BY) != run_id.encode():
                    await _rewrite_file(redis)
                    await redis.set(REWRITTEN_BY, run_id)
                seen = run_id
        with suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                await stop.wait()


async def _rewrite_file(redis: Redis) -> None:
    if not (await redis.info("persistence"))["aof_enabled"]:
        return
    try:
        await redis.bgrewriteaof()
    except ResponseError as error:
        if "in progress" not in str(error):
            logger.warning(
                "Redis does not rewrite its append-only file ({}): run BGREWRITEAOF after each of "
                "its starts that follows a power cut",
                error,
            )
    else:
        logger.info("Redis has started: its append-only file is rewritten")


def spool_is_fit(settings: Settings) -> None:
    """Make sure that records can wait on the disk; raises BadSettingsError.

    A full disk is an ERROR and no more: a process that does not start records nothing at all.
    """
    try:
        Spool.create(settings.spool_dir, settings.spool_max_mb * 2**20).close()
    except (OSError, sqlite3.Error) as error:
        if _is_full(error):
            logger.error(
                "SPOOL_DIR: the disk of {} is full: what Redis does not take is lost until there "
                "is room; free some",
                settings.spool_dir,
            )
            return
        raise BadSettingsError(
            f"SPOOL_DIR: {settings.spool_dir} can not be written to ({error}); records wait there "
            "while Redis is away"
        ) from error


def _is_full(error: OSError | sqlite3.Error) -> bool:
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT}
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
