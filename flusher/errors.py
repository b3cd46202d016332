"""The one place that says what an error means for the batch in hand."""

import re
from enum import Enum

import asyncpg
from redis.exceptions import RedisError


class Verdict(Enum):
    """What to do with a batch that was not written."""

    AWAY = "away"
    """A server was not reached: the batch stays and is tried again soon, as asking costs little."""
    DECLINED = "declined"
    """A server answered, and would not begin: as if it were away."""
    FULL = "full"
    """A disk has no room: as transient, and tried again before long, for somebody makes room."""
    TRANSIENT = "transient"
    """A server answered and could not now: the batch stays and is tried again, for ever."""
    REJECTED = "rejected"
    """A row is at fault: it is found and dead-lettered alone."""
    MISSING = "missing"
    """A table, a column or a right: nothing is written until a person has mended it."""
    BUG = "bug"
    """Not foreseen: as transient, and logged as the bug it is."""


# The first that fits counts.
_VERDICTS = {
    Verdict.MISSING: (
        asyncpg.SyntaxOrAccessError,
        asyncpg.InvalidCatalogNameError,
        asyncpg.InvalidAuthorizationSpecificationError,
        # A record that may hold no null was decoded as holding none: the table asks for more.
        asyncpg.NotNullViolationError,
    ),
    Verdict.REJECTED: (
        asyncpg.DataError,
        asyncpg.IntegrityConstraintViolationError,
        asyncpg.ProgramLimitExceededError,
    ),
    Verdict.AWAY: (
        OSError,  # TimeoutError and a unix socket that is not there among them
        RedisError,
        asyncpg.PostgresConnectionError,
        asyncpg.AdminShutdownError,
        asyncpg.CrashShutdownError,
        asyncpg.CannotConnectNowError,
        asyncpg.InterfaceError,  # "connection is closed"
        asyncpg.InternalClientError,  # asyncpg #784: a backend died at an awkward moment
    ),
    Verdict.DECLINED: (
        asyncpg.TooManyConnectionsError,
        asyncpg.ReadOnlySQLTransactionError,
        asyncpg.LockNotAvailableError,  # it has waited for the lock, and is to be there when free
    ),
    Verdict.FULL: (asyncpg.DiskFullError,),
    Verdict.TRANSIENT: (
        asyncpg.TransactionRollbackError,
        asyncpg.OperatorInterventionError,
        asyncpg.InsufficientResourcesError,
        asyncpg.ObjectNotInPrerequisiteStateError,
        asyncpg.InvalidTransactionStateError,  # read-only, or idle for too long
        asyncpg.PostgresSystemError,
    ),
}
_copy_line = re.compile(r"^COPY \w+, line (\d+)").search


def judge(error: Exception) -> Verdict:
    """Tell the kinds of errors apart, those of PostgreSQL and those of Redis."""
    for verdict, classes in _VERDICTS.items():
        if isinstance(error, classes):
            return verdict
    return Verdict.BUG


def refused_line(error: Exception) -> int | None:
    """Give the index of the row that COPY refused, where the error names it."""
    found = _copy_line(getattr(error, "context", None) or "")
    return int(found[1]) - 1 if found else None
