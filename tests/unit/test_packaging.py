"""What a wheel holds: it must install and run where there is no checkout."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("collector", "flusher", "orderbook", "sluice")
NEEDS_NO_CHECKOUT = """
import sys
sys.path.insert(0, sys.argv[1])
from sluice.schema import read_migrations, read_schema
from sluice.cli.install import render
import sluice
print(sluice.__file__)
print(len(read_schema()), len(read_migrations()), *render(sys.prefix, "feeds"))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", directory],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = directory.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_no_tests(wheel: Path) -> None:
    held = {name for name in ZipFile(wheel).namelist() if name.endswith((".py", "py.typed"))}
    there = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert held == there


def test_the_wheel_holds_the_schema_the_units_and_the_command(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        assert archive.read("sluice/schema.sql") == (ROOT / "schema.sql").read_bytes()
        migrations = {
            name.removeprefix("sluice/migrations/"): archive.read(name)
            for name in archive.namelist()
            if name.startswith("sluice/migrations/")
        }
        units = {
            name.removeprefix("sluice/systemd/"): archive.read(name)
            for name in archive.namelist()
            if name.startswith("sluice/systemd/")
        }
        (points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert b"sluice = sluice.cli:main" in archive.read(points)
    assert migrations == {file.name: file.read_bytes() for file in (ROOT / "migrations").iterdir()}
    assert units == {unit.name: unit.read_bytes() for unit in (ROOT / "deploy/systemd").iterdir()}
    assert len(units) > 1


def test_the_wheel_installs_the_page_that_the_units_name(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        (page,) = (
            name for name in archive.namelist() if name.endswith("share/doc/sluice/operations.md")
        )
        assert archive.read(page) == (ROOT / "docs/operations.md").read_bytes()
    assert ".data/data/share/" in page


def test_an_installed_command_finds_its_schema_and_its_units(wheel: Path, tmp_path: Path) -> None:
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", NEEDS_NO_CHECKOUT, tmp_path],
        env={"PATH": os.environ["PATH"]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where, found = done.stdout.splitlines()
    assert where == str(tmp_path / "sluice" / "__init__.py")
    length, migrations, *units = found.split()
    assert int(length) == len((ROOT / "schema.sql").read_text(encoding="utf-8"))
    assert int(migrations) == len(list((ROOT / "migrations").iterdir()))
    assert "sluice-flusher@.service" in units
