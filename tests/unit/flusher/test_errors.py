"""What an error means for the batch in hand."""

import asyncpg
import pytest
import redis.exceptions

from flusher.errors import Verdict, judge, refused_line

CASES: dict[Verdict, list[Exception]] = {
    Verdict.AWAY: [
        ConnectionRefusedError(),
        ConnectionResetError(),
        FileNotFoundError("/run/postgresql/.s.PGSQL.5432"),
        TimeoutError(),
        asyncpg.ConnectionDoesNotExistError(),
        asyncpg.CannotConnectNowError(),
        asyncpg.AdminShutdownError(),
        asyncpg.CrashShutdownError(),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.InternalClientError("cannot switch to state 15"),
        redis.exceptions.ConnectionError(),
        redis.exceptions.TimeoutError(),
        redis.exceptions.BusyLoadingError(),
        redis.exceptions.ReadOnlyError(),
        redis.exceptions.OutOfMemoryError(),
        redis.exceptions.ResponseError("MISCONF"),
    ],
    Verdict.DECLINED: [
        asyncpg.TooManyConnectionsError(),
        asyncpg.ReadOnlySQLTransactionError(),
        asyncpg.LockNotAvailableError(),
    ],
    Verdict.FULL: [asyncpg.DiskFullError()],
    Verdict.TRANSIENT: [
        asyncpg.DeadlockDetectedError(),
        asyncpg.SerializationError(),
        asyncpg.QueryCanceledError(),
        asyncpg.OutOfMemoryError(),
        asyncpg.IdleInTransactionSessionTimeoutError(),
        asyncpg.PostgresIOError(),
    ],
    Verdict.REJECTED: [
        asyncpg.NumericValueOutOfRangeError(),
        asyncpg.InvalidTextRepresentationError(),
        asyncpg.BadCopyFileFormatError(),
        asyncpg.CharacterNotInRepertoireError(),
        asyncpg.CheckViolationError(),
        asyncpg.ProgramLimitExceededError(),
    ],
    Verdict.MISSING: [
        asyncpg.UndefinedTableError(),
        asyncpg.UndefinedColumnError(),
        asyncpg.InvalidColumnReferenceError(),
        asyncpg.InsufficientPrivilegeError(),
        asyncpg.InvalidCatalogNameError(),
        asyncpg.InvalidPasswordError(),
        asyncpg.NotNullViolationError(),
    ],
    Verdict.BUG: [
        KeyError("binance"),
        TypeError(),
        RecursionError(),
        asyncpg.InternalServerError(),
        asyncpg.FeatureNotSupportedError(),
    ],
}


@pytest.mark.parametrize(
    ("verdict", "error"),
    [
        pytest.param(verdict, error, id=type(error).__name__)
        for verdict, errors in CASES.items()
        for error in errors
    ],
)
def test_each_kind_of_error_has_its_verdict(verdict: Verdict, error: Exception) -> None:
    assert judge(error) is verdict


@pytest.mark.parametrize(
    ("context", "line"),
    [
        ('COPY staged_trades, line 1, column price: "x"', 0),
        ('COPY staged_trades, line 4711: ""', 4710),
        ('SQL statement "SELECT 1"', None),
        (None, None),
    ],
)
def test_the_line_that_copy_refused_is_read_from_the_context(
    context: str | None, line: int | None
) -> None:
    error = asyncpg.InvalidTextRepresentationError()
    error.context = context
    assert refused_line(error) == line


def test_an_error_without_a_context_names_no_line() -> None:
    assert refused_line(ValueError()) is None
