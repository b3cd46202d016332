"""Logs: WARNING means nothing was lost; ERROR means data was lost or a person is needed.

On a terminal and in files a line a record; to the journal one JSON object a record. The same
message more than REPEATS times a minute is counted and summed up instead.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import msgspec
from loguru import logger

if TYPE_CHECKING:
    from loguru import Message, Record

REPEATS: Final = 20
REPEAT_SECONDS: Final = 60.0
_LINE: Final = "<green>{time:YYYY-MM-DD HH:mm:ss.SSS}</green> <level>{level:<7}</level> {message}"


class _Intercept(logging.Handler):
    """Hands the standard library's records to loguru, so that there is one log."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.opt(exception=record.exc_info).log(record.levelname, record.getMessage())


class Repeats:
    """Lets a message through REPEATS times a minute, by the place in the code that logs it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[tuple[str | None, int], tuple[float, int]] = {}

    def __call__(self, record: "Record") -> bool:
        """Tell whether to log the record; the first after a pause says how many were left out."""
        place = (record["name"], record["line"])
        now = self._clock()
        since, count = self._seen.get(place, (now, 0))
        if now - since >= REPEAT_SECONDS:
            left_out = count - REPEATS
            if left_out > 0:
                record["message"] += f" (and {left_out} more like this)"
            since, count = now, 0
        self._seen[place] = (since, count + 1)
        return count < REPEATS


def _journal(stream: TextIO) -> Callable[["Message"], None]:
    def write(message: "Message") -> None:
        record = message.record
        entry: dict[str, object] = {
            "time": record["time"].isoformat(timespec="milliseconds"),
            "level": record["level"].name,
            "message": record["message"],
        }
        if record["exception"] is not None:
            entry["exception"] = str(message).partition("\n")[2]
        stream.write(msgspec.json.encode(entry).decode() + "\n")
        stream.flush()

    return write


def configure_logging(
    level: str, file: Path | None = None, environment: Mapping[str, str] = os.environ
) -> None:
    """Send everything from `level` up to stderr, and to a rotating file where one is given.

    Raises OSError where the file can not be written.
    """
    logger.remove()
    options: dict[str, Any] = {
        "level": level,
        "filter": Repeats(),
        "backtrace": False,
        "diagnose": False,  # it prints the values of variables, and so of secrets
    }
    if environment.get("JOURNAL_STREAM"):
        logger.add(_journal(sys.stderr), format="{message}", **options)
    else:
        logger.add(sys.stderr, format=_LINE, **options)
    if file is not None:
        options["filter"] = Repeats()
        logger.add(
            file,
            format=_LINE,
            colorize=False,
            rotation="100 MB",
            retention=10,
            compression="gz",
            **options,
        )
    # INFO, not 0: below it websockets logs every frame, which costs five times the frame itself.
    logging.basicConfig(handlers=[_Intercept()], level=logging.INFO, force=True)
