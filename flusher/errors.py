"""The one place that says what an error of the database means for the batch in hand."""

import re
from enum import Enum

import asyncpg


class Verdict(Enum):
    """What to do with a batch that was not written."""

    TRANSIENT = "transient"
    """The server or the way to it: the batch stays and is tried again, for ever."""
    REJECTED = "rejected"
    """A row: it is found and dead-lettered alone."""
    MISSING = "missing"
    """A table, a column or a right: nothing is written until a person has mended it."""
    BUG = "bug"
    """Not foreseen: as transient, and logged as the bug it is."""


_REJECTED = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
)
_MISSING = (
    asyncpg.SyntaxOrAccessError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InvalidAuthorizationSpecificationError,
)
_TRANSIENT = (
    OSError,  # TimeoutError and a missing unix socket among them
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.TransactionRollbackError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.PostgresSystemError,
)
_copy_line = re.compile(r"^COPY \w+, line (\d+)").search


def judge(error: Exception) -> Verdict:
    """Tell the kinds of errors apart."""
    if isinstance(error, _REJECTED):
        return Verdict.REJECTED
    if isinstance(error, _MISSING):
        return Verdict.MISSING
    if isinstance(error, _TRANSIENT):
        return Verdict.TRANSIENT
    return Verdict.BUG


def is_unreachable(error: Exception) -> bool:
    """Tell whether the server did not even take the connection, so that asking costs nothing."""
    return isinstance(
        error, OSError | asyncpg.PostgresConnectionError | asyncpg.CannotConnectNowError
    )


def refused_line(error: Exception) -> int | None:
    """Give the index of the row that COPY refused, where the error names it."""
    found = _copy_line(getattr(error, "context", None) or "")
    return int(found[1]) - 1 if found else None
