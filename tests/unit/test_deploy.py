"""The units, the installer and the rolling deploy, without a systemd to run them."""

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sluice.cli import app

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_the_units_verify_and_are_hardened() -> None:
    done = subprocess.run([ROOT / "deploy" / "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Overall exposure level") == 4


def test_install_writes_what_it_says(tmp_path: Path) -> None:
    arguments = ["install", "--root", str(tmp_path), "--prefix", "/opt/sluice", "--user", "feeds"]
    planned = CliRunner().invoke(app, [*arguments, "--shards", "2", "--dry-run"])
    assert planned.exit_code == 0
    assert not list(tmp_path.iterdir())

    done = CliRunner().invoke(app, [*arguments, "--shards", "2"])
    assert done.exit_code == 0, done.output
    unit = (tmp_path / "etc/systemd/system/sluice-flusher@.service").read_text()
    assert "ExecStart=/opt/sluice/bin/python -m flusher" in unit
    assert "User=feeds" in unit
    assert "@PREFIX@" not in unit
    instance = (tmp_path / "etc/sluice/orderbook-1-a.env").read_text()
    assert instance == "METRICS_PORT=9122\nBOOK_SHARD=1/2\n"
    assert (tmp_path / "etc/sluice/.env").read_text().startswith("# Sluice")
    targets = json.loads((tmp_path / "etc/sluice/prometheus-targets.json").read_text())
    addresses = [address for group in targets for address in group["targets"]]
    assert len(set(addresses)) == len(addresses) == 2 * (1 + 2 + 1)
    secret = tmp_path / "etc/sluice/credentials/postgres_password"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    for line in planned.output.splitlines():
        if line.startswith("would write"):
            assert Path(line.split()[-1]).exists(), line


def test_install_keeps_settings_and_passwords_that_are_there(tmp_path: Path) -> None:
    settings = tmp_path / "etc/sluice/sluice.env"
    settings.parent.mkdir(parents=True)
    settings.write_text("SYMBOLS=binance:SOLUSDT\n")
    CliRunner().invoke(app, ["install", "--root", str(tmp_path)])
    assert settings.read_text() == "SYMBOLS=binance:SOLUSDT\n"


def test_install_again_keeps_an_instance_s_own_settings_but_its_share(tmp_path: Path) -> None:
    arguments = ["install", "--root", str(tmp_path)]
    CliRunner().invoke(app, arguments)
    own = tmp_path / "etc/sluice/orderbook-0-a.env"
    own.write_text("METRICS_PORT=9555\nBOOK_SHARD=0/1\nLOG_LEVEL=DEBUG\n")
    CliRunner().invoke(app, [*arguments, "--shards", "2"])
    assert own.read_text() == "METRICS_PORT=9555\nLOG_LEVEL=DEBUG\nBOOK_SHARD=0/2\n"
    assert "127.0.0.1:9555" in (tmp_path / "etc/sluice/prometheus-targets.json").read_text()


def test_a_rolling_deploy_starts_the_new_before_it_stops_the_old(tmp_path: Path) -> None:
    log = tmp_path / "log"
    fake = tmp_path / "systemctl"
    fake.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {log}\n'
        'case "$*" in *list-units*flusher*) echo "sluice-flusher@0-a.service loaded active";;\n'
        '*list-units*orderbook*) echo "sluice-orderbook@1-b.service loaded active";;\n'
        '*list-units*collector*) echo "sluice-collector@0-b.service loaded active";; esac\n'
    )
    fake.chmod(0o755)
    subprocess.run(
        [ROOT / "deploy" / "rolling"],
        env={"PATH": os.environ["PATH"], "SYSTEMCTL": str(fake)},
        check=True,
        capture_output=True,
    )
    steps = [line for line in log.read_text().splitlines() if line.startswith(("start", "stop"))]
    assert steps == [
        "start sluice-flusher@0-b.service",
        "stop sluice-flusher@0-a.service",
        "start sluice-orderbook@1-a.service",
        "stop sluice-orderbook@1-b.service",
        "start sluice-collector@0-a.service",
        "stop sluice-collector@0-b.service",
    ]


def test_a_rolling_deploy_stops_nothing_when_the_new_one_does_not_get_ready(tmp_path: Path) -> None:
    log = tmp_path / "log"
    fake = tmp_path / "systemctl"
    fake.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {log}\n'
        'case "$1" in list-units) echo "sluice-flusher@0-a.service loaded active";; '
        "start) exit 1;; esac\n"
    )
    fake.chmod(0o755)
    done = subprocess.run(
        [ROOT / "deploy" / "rolling", "flusher"],
        env={"PATH": os.environ["PATH"], "SYSTEMCTL": str(fake)},
        capture_output=True,
        check=False,
    )
    assert done.returncode != 0
    assert "stop" not in log.read_text()


def test_every_alert_has_a_line_in_the_runbook() -> None:
    rules = yaml.safe_load((ROOT / "deploy/prometheus/sluice.rules.yml").read_text())
    runbook = (ROOT / "docs/operations.md").read_text().lower()
    for group in rules["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["runbook"].endswith(f"#{rule['alert'].lower()}")
            assert f"### {rule['alert'].lower()}\n" in runbook, rule["alert"]
