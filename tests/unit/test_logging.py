"""What the logs look like, and what they never hold."""

import json
import logging
from pathlib import Path

import pytest
from loguru import logger

from sluice import logging as ours
from sluice.logging import REPEAT_SECONDS, REPEATS, Repeats, configure_logging


@pytest.fixture(autouse=True)
def _restored() -> object:
    yield
    logger.remove()
    logging.basicConfig(force=True)


def test_the_journal_gets_one_json_object_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", environment={"JOURNAL_STREAM": "8:1"})
    logger.warning("Redis does not answer: {}\nsecond line", "no route")
    logging.getLogger("websockets").info("from the standard library")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["message"]) == (
        "WARNING",
        "Redis does not answer: no route\nsecond line",
    )
    assert second["message"] == "from the standard library"


def test_a_traceback_has_no_values_of_variables(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", environment={"JOURNAL_STREAM": "8:1"})
    canary = "secret-canary"
    try:
        int(canary[:0] + "x")
    except ValueError:
        logger.exception("a bug")
    told = capsys.readouterr().err
    assert "ValueError" in json.loads(told)["exception"]
    assert canary not in told


def test_a_file_gets_what_the_terminal_gets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("INFO", tmp_path / "sluice.log", environment={})
    logger.debug("not this")
    logger.info("this")
    assert "this" in capsys.readouterr().err
    (line,) = (tmp_path / "sluice.log").read_text().splitlines()
    assert line.endswith("INFO    this")


def test_repeats_are_left_out_and_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(ours, "Repeats", lambda: Repeats(lambda: now[0]))
    configure_logging("INFO", environment={})
    for number in range(REPEATS + 6):
        if number == REPEATS + 5:
            now[0] = REPEAT_SECONDS
        logger.warning("the same place")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == REPEATS + 1
    assert lines[-1].endswith("the same place (and 5 more like this)")
