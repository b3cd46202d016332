"""How the servers are reached: one way for Redis, one for PostgreSQL."""

import asyncio
import ssl
from collections.abc import Iterable
from typing import Any

import asyncpg
from redis.asyncio import (
    Connection,
    ConnectionPool,
    Redis,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from sluice.settings import Settings


class _Cancellable(AbstractConnection):
    """A connection on which no cancellation is lost, and whose failures are redis-py's own.

    redis-py sends within `asyncio.wait_for`, which before Python 3.12 forgets a cancellation that
    comes in the turn of the loop in which the send ends: the task runs on, and its process with it.
    """

    async def send_packed_command(
        self,
        command: bytes | str | Iterable[bytes],
        check_health: bool = True,  # noqa: FBT001, FBT002  # as in redis-py
    ) -> None:
        seconds, self.socket_timeout = self.socket_timeout, None
        try:
            async with asyncio.timeout(seconds):
                await super().send_packed_command(command, check_health)
        except TimeoutError:
            raise RedisTimeoutError("Timeout writing to socket") from None
        except RuntimeError as error:
            # What uvloop says of a connection that was reset while nobody looked.
            raise RedisConnectionError(str(error)) from error
        finally:
            self.socket_timeout = seconds


class _TcpConnection(_Cancellable, Connection):
    pass


class _TlsConnection(_Cancellable, SSLConnection):
    pass


class _UnixConnection(_Cancellable, UnixDomainSocketConnection):
    pass


def connect_redis(settings: Settings, *, timeout: float = 5.0) -> Redis:
    """Make a client; it connects at its first command.

    The library's retries are off: they send commands again that are not idempotent, so who calls
    must decide.
    """
    password = settings.redis_password.get_secret_value() if settings.redis_password else None
    common: dict[str, Any] = {
        "username": settings.redis_username or None,
        "password": password or None,
        "db": settings.redis_db,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": timeout,
        "max_connections": 16,
    }
    if settings.redis_host.startswith("/"):
        pool = ConnectionPool(_UnixConnection, path=settings.redis_host, **common)
    else:
        pool = ConnectionPool(
            _TlsConnection if settings.redis_tls else _TcpConnection,
            host=settings.redis_host,
            port=settings.redis_port,
            socket_connect_timeout=timeout,
            socket_keepalive=True,
            **common,
        )
    return Redis.from_pool(pool)


def access_problem(error: BaseException) -> str:
    """Say which settings a server refuses, or nothing where that is not what is wrong."""
    if isinstance(error, AuthenticationError | NoPermissionError):
        return f"REDIS_USERNAME, REDIS_PASSWORD: Redis refuses them: {error}"
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return f"POSTGRES_USER, POSTGRES_PASSWORD: PostgreSQL refuses them: {error}"
    return ""


def postgres_arguments(settings: Settings) -> dict[str, Any]:
    """Give what asyncpg's `connect` and `create_pool` need to reach the database."""
    password = settings.postgres_password
    return {
        "host": settings.postgres_host,
        "port": settings.postgres_port,
        "database": settings.postgres_db,
        "user": settings.postgres_user,
        "password": password.get_secret_value() if password else None,
        "ssl": _ssl_mode(settings),
    }


def _ssl_mode(settings: Settings) -> str | bool | ssl.SSLContext:
    return False if settings.postgres_host.startswith("/") else settings.postgres_sslmode


async def connect_postgres(settings: Settings, **arguments: Any) -> asyncpg.Connection:  # noqa: ANN401  # passed on to asyncpg
    """Open one connection; raises what asyncpg raises."""
    return await asyncpg.connect(**postgres_arguments(settings), timeout=5, **arguments)
