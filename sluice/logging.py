"""Logs: WARNING means nothing was lost; ERROR means data was lost or a person is needed."""

import logging
import sys

from loguru import logger


class _Intercept(logging.Handler):
    """Hands the standard library's records to loguru, so that there is one log."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.opt(exception=record.exc_info).log(record.levelname, record.getMessage())


def configure_logging(level: str) -> None:
    """Send everything from `level` up to stderr, one line a record, coloured on a terminal."""
    logger.remove()
    logger.add(
        sys.stderr,
        level=level,
        format="<green>{time:YYYY-MM-DD HH:mm:ss.SSS}</green> <level>{level:<7}</level> {message}",
        backtrace=False,
        diagnose=False,  # it prints the values of variables, and so of secrets
    )
    # INFO, not 0: below it websockets logs every frame, which costs five times the frame itself.
    logging.basicConfig(handlers=[_Intercept()], level=logging.INFO, force=True)
