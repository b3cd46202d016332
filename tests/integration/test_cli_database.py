"""`sluice db` on a real server."""

import json

import pytest
from typer.testing import CliRunner

from sluice.cli import app as everything
from sluice.cli.database import app
from tests.integration.conftest import JOBS_OFF
from tests.servers import Database, execute


@pytest.fixture
def runner(postgres: Database, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """Give a runner of commands whose settings lead to the test's database."""
    for name, value in postgres.environment.items():
        monkeypatch.setenv(name, value)
    return CliRunner()


def _faults(runner: CliRunner) -> set[str]:
    result = runner.invoke(app, ["check", "--json"])
    faults = {finding["what"] for finding in json.loads(result.stdout) if not finding["is_sound"]}
    assert result.exit_code == bool(faults), result.output
    return faults


def test_a_database_is_made_and_made_again(runner: CliRunner, postgres: Database) -> None:
    execute(postgres, "DROP TABLE tickers", "DROP VIEW book_tops")

    for _ in range(2):
        assert runner.invoke(app, ["init"]).exit_code == 0

    execute(postgres, "SELECT FROM tickers, book_tops")


def test_a_database_of_another_version_is_upgraded_and_not_made_again(
    runner: CliRunner, postgres: Database
) -> None:
    execute(
        postgres,
        "UPDATE schema_version SET version = 1",
        "DROP TABLE late_ranges",
        "DROP PROCEDURE refresh_candles (timestamptz, timestamptz, integer [])",
        "SET ROLE sluice_owner",
        "CREATE PROCEDURE refresh_candles (timestamptz, timestamptz) LANGUAGE SQL AS 'SELECT 1'",
    )

    refused = runner.invoke(app, ["init"])
    upgraded = runner.invoke(app, ["upgrade"])
    again = runner.invoke(app, ["upgrade"])

    assert (refused.exit_code, upgraded.exit_code, again.exit_code) == (1, 0, 0)
    assert "run `sluice db upgrade`" in refused.stderr
    assert upgraded.stdout.splitlines() == [
        "applied migration 0002-late-ranges",
        "the schema is at version 2",
    ]
    assert again.stdout.splitlines() == ["the schema is at version 2"]

    execute(postgres, "INSERT INTO schema_version (version) VALUES (1000)")
    newer = runner.invoke(app, ["upgrade"])
    assert newer.exit_code == 1
    assert "at version 1000" in newer.stderr


def test_a_check_names_what_is_not_sound(runner: CliRunner, postgres: Database) -> None:
    # The test's server need not be sound itself: it may run without fsync.
    before = _faults(runner)
    execute(
        postgres,
        f'ALTER DATABASE "{postgres.database}" SET synchronous_commit = off',
        "INSERT INTO schema_version (version) VALUES (1000)",
    )

    after = _faults(runner)

    assert after - before == {"synchronous_commit", "schema"}


def test_a_database_without_the_schema_is_not_sound(runner: CliRunner, postgres: Database) -> None:
    execute(postgres, "DROP TABLE schema_version")

    assert "schema" in _faults(runner)


def test_candles_that_nobody_stores_are_named(runner: CliRunner, postgres: Database) -> None:
    before = _faults(runner)
    execute(
        postgres,
        "INSERT INTO trades"
        " (market_id, time, trade_id, first_id, price, quantity, side, received_at)"
        " VALUES (1, now() - INTERVAL '3 days', 1, 1, 5, 1, 'buy', now())",
    )

    behind = runner.invoke(app, ["check", "--json"])
    assert runner.invoke(everything, ["maintain"]).exit_code == 0

    findings = {finding["what"]: finding["is_sound"] for finding in json.loads(behind.stdout)}
    # On Community the policies store them, and there is no such line.
    assert findings.get("candles of closed days") is not True
    assert _faults(runner) == before


def test_candles_of_closed_days_are_stored(runner: CliRunner, postgres: Database) -> None:
    execute(
        postgres,
        JOBS_OFF,  # two refreshes of one range at once: the second is refused
        "INSERT INTO trades"
        " (market_id, time, trade_id, first_id, price, quantity, side, received_at)"
        " VALUES (1, date_trunc('day', now()) - INTERVAL '30 hours', 1, 1, 5, 1, 'buy', now())",
    )

    assert runner.invoke(app, ["candles"]).exit_code == 0

    execute(
        postgres,
        "SELECT drop_chunks('trades', now())",
        "DO $$ BEGIN ASSERT (SELECT close FROM candles_1m) = 5; END $$",
    )
