"""docker-compose.yml and Dockerfile, by a parser: no engine runs where the tests do."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sluice.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
OURS = ("collector", "flusher", "orderbook")


def test_nothing_is_published_beyond_loopback() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]

    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert not any("network_mode" in service for service in SERVICES.values())


def test_redis_keeps_what_it_was_given() -> None:
    _, *words = SERVICES["redis"]["command"]
    options = dict(zip(words[::2], words[1::2], strict=True))

    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert re.fullmatch(r"\d+mb", options["--maxmemory"])


def test_timescaledb_is_pinned_to_a_version_whose_jobs_run() -> None:
    image = re.fullmatch(
        r"timescale/timescaledb:(\d+)\.(\d+)\.(\d+)-pg17", SERVICES["timescaledb"]["image"]
    )

    assert image
    major, minor, patch = map(int, image.groups())
    first_sound = {(2, 27): 3, (2, 28): 4, (2, 31): 2, (2, 32): 1}
    least = 0 if (major, minor) > (2, 32) else 10**6
    assert patch >= first_sound.get((major, minor), least)


def test_the_schema_is_brought_up_once_before_anything_is_written() -> None:
    assert SERVICES["schema"]["command"] == ["sluice", "db", "upgrade"]
    assert SERVICES["schema"]["restart"] == "no"
    assert SERVICES["flusher"]["depends_on"]["schema"] == {
        "condition": "service_completed_successfully"
    }


def test_the_tables_are_maintained() -> None:
    shell, option, script = SERVICES["maintain"]["command"]

    assert (shell, option) == ("sh", "-c")
    assert "sluice maintain" in script
    # $$ is compose's $, and a signal ends the wait at once.
    assert "trap exit TERM" in script
    assert "& wait $$!" in script


def test_every_image_from_elsewhere_is_pinned() -> None:
    images = [service["image"] for service in SERVICES.values() if "build" not in service]

    assert all(re.search(r":\d+\.\d+\.\d+", image) for image in images)


@pytest.mark.parametrize("name", OURS)
def test_a_service_runs_its_module_and_is_asked_where_it_answers(name: str) -> None:
    service = SERVICES[name]

    assert service["command"] == ["python", "-m", name]
    assert (ROOT / name / "__main__.py").is_file()
    *_, program = service["healthcheck"]["test"]
    ast.parse(program)
    port = service["environment"]["METRICS_PORT"]
    assert f"http://127.0.0.1:{port}/livez" in program
    assert f"port={port}" in (ROOT / name / "__main__.py").read_text(encoding="utf-8")


def test_services_with_data_have_named_volumes() -> None:
    named = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if not volume.startswith(("./", "/"))
    }

    assert named == set(COMPOSE["volumes"])
    assert all(SERVICES[name].get("volumes") for name in ("redis", "timescaledb", *OURS))


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting(name: str) -> None:
    assert {variable.lower() for variable in SERVICES[name]["environment"]} <= set(
        Settings.model_fields
    )


@pytest.mark.parametrize("name", OURS)
def test_a_service_has_no_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["environment"]["SPOOL_DIR"].startswith("/var/lib/sluice/")


def test_the_flusher_stops_last_and_has_time_to_drain() -> None:
    assert "flusher" in SERVICES["collector"]["depends_on"]
    assert "flusher" in SERVICES["orderbook"]["depends_on"]
    for name in OURS:
        grace = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        assert grace > Settings.model_fields["drain_seconds"].default


def test_the_image_runs_as_somebody_without_rights() -> None:
    *_, final = DOCKERFILE.split("\nFROM ")

    users = re.findall(r"^USER (\S+)", final, re.MULTILINE)
    assert users
    assert users[-1] not in {"root", "0"}


def test_the_image_gets_every_package_and_pinned_requirements() -> None:
    copied = set(re.findall(r"^COPY (\S+) \1$", DOCKERFILE, re.MULTILINE))

    assert copied >= {*OURS, "sluice"}
    assert "--require-hashes" in DOCKERFILE
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {
        f"!{name}" for name in (*OURS, "sluice", "schema.sql", "migrations", "README.md")
    } <= set(ignored)
