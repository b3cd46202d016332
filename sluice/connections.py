"""How the servers are reached: one way for Redis, one for PostgreSQL."""

import ssl
from typing import Any

import asyncpg
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from sluice.settings import Settings


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
        return Redis(unix_socket_path=settings.redis_host, **common)
    return Redis(
        host=settings.redis_host,
        port=settings.redis_port,
        ssl=settings.redis_tls,
        socket_connect_timeout=timeout,
        socket_keepalive=True,
        **common,
    )


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
