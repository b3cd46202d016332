"""A stranger's hour: install, run, break, read the alert, follow the runbook, deploy, back up.

    pytest -s tests/acceptance/test_strangers_hour.py

prints what they type and see. The lines of a backup are read from docs/operations.md, so the
document is what is tested.
"""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from sluice.cli.debian import inside
from sluice.cli.servers import PostgresServer, RedisServer, free_port
from tests.acceptance.completeness import complete
from tests.acceptance.processes import ROOT, Processes, processes, wait_until
from tests.servers import Database

SYMBOLS = ["BTCUSDT", "NEXOUSDT"]
RULES = ROOT / "deploy/prometheus/sluice.rules.yml"
RUNBOOK = ROOT / "docs/operations.md"
NEW_VERSION = "0.1.0+stranger"
TABLES = """
SELECT format('SELECT %L, count(*), md5(string_agg(t::text, chr(10) ORDER BY t::text)) FROM %I t',
              tablename, tablename)
FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename
"""


class Host:
    """A machine of its own below one directory: a prefix, units, settings, and who runs them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.prefix = root / "opt"
        self.etc = root / "etc/sluice"
        self.environment = {
            "PATH": os.environ["PATH"],
            "STAND_IN_ROOT": str(root),
            "CREDENTIALS_DIRECTORY": str(self.etc / "credentials"),
        }

    def type(self, *command: str | Path, code: int = 0) -> str:
        """Run a command beside the settings, show it and what it prints."""
        print("\n$", *command)
        cwd = self.etc if self.etc.exists() else self.root
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(done.stdout.rstrip())
        assert done.returncode == code, done.stdout
        return done.stdout

    def sluice(self, *arguments: str, code: int = 0) -> str:
        return self.type(self.prefix / "bin/sluice", *arguments, code=code)

    def pip_install(self, source: Path) -> None:
        self.type(
            *(sys.executable, "-m", "pip", "--python", self.prefix / "bin/python", "install"),
            *("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"),
            source,
        )

    def systemctl(self, *arguments: str) -> str:
        return self.type(sys.executable, ROOT / "tests/acceptance/systemctl.py", *arguments)

    def port(self, instance: str) -> int:
        """Give where an instance serves its pages, as its own settings say."""
        return int(
            re.findall("METRICS_PORT=([0-9]+)", (self.etc / f"{instance}.env").read_text())[0]
        )

    def running(self, service: str) -> list[str]:
        shown = self.systemctl("list-units", f"sluice-{service}@*.service")
        return [line.split()[0] for line in shown.splitlines()]


def ask(port: int, page: str) -> str:
    """Ask a process for one of its pages."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=10) as answer:
            text: str = answer.read().decode()
    except urllib.error.HTTPError as error:
        text = error.read().decode()
    return text


def metric(port: int, name: str) -> float:
    families = text_string_to_metric_families(ask(port, "/metrics"))
    return next(s.value for family in families for s in family.samples if s.name == name)


def runbook_of(alert: str) -> str:
    """Read what the runbook says of an alert."""
    (section,) = re.findall(
        rf"^### {alert}\n(.+?)(?=^##|\Z)", RUNBOOK.read_text(), re.MULTILINE | re.DOTALL
    )
    return str(section)


@pytest.fixture
def host() -> Iterator[Host]:
    """Give a machine, and stop what runs on it at the end."""
    # Short, for the address of a unix socket has room for 107 bytes.
    root = Path(tempfile.mkdtemp(prefix="sluice-host-"))
    made = Host(root)
    try:
        yield made
    finally:
        for path in (root / "run").glob("*.pid"):
            made.systemctl("stop", path.stem)
        shutil.rmtree(root)


@pytest.fixture
def exchange(
    tmp_path: Path, private_redis: RedisServer, private_database: Database
) -> Iterator[Processes]:
    environment = {**private_redis.environment, **private_database.environment}
    with processes(tmp_path, environment) as started:
        started.simulate("--rate", "200", "--symbols", ",".join(SYMBOLS))
        yield started


def install(host: Host, exchange: Processes) -> None:
    """Install into the prefix, as docs/operations.md says."""
    host.type(sys.executable, "-m", "venv", "--without-pip", str(host.prefix))
    # Dependencies are those of the tests' own environment; Sluice itself is installed.
    (site,) = host.prefix.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    host.pip_install(ROOT)
    plan = host.sluice("install", "--prefix", str(host.prefix), "--root", str(host.root))
    assert "sluice-flusher@0-a" in plan.splitlines()[-1]
    settings = {
        "SYMBOLS": ",".join(f"binance:{symbol}" for symbol in SYMBOLS),
        "FLUSH_INTERVAL_MS": "100",
        **{
            name: value
            for name, value in exchange.environment.items()
            if name.startswith(("REDIS_", "POSTGRES_", "BINANCE_")) and "PASSWORD" not in name
        },
    }
    (host.etc / "sluice.env").write_text("".join(f"{k}={v}\n" for k, v in settings.items()))
    for own in host.etc.glob("*-[ab].env"):  # others may record on this machine
        own.write_text(
            re.sub("METRICS_PORT=[0-9]+", f"METRICS_PORT={free_port()}", own.read_text())
        )
    for name in ("REDIS_PASSWORD", "POSTGRES_PASSWORD"):
        (host.etc / f"credentials/{name.lower()}").write_text(exchange.environment.get(name, ""))


def break_and_mend_the_database(host: Host, port: int, server: PostgresServer) -> None:
    """Kill PostgreSQL, read the alert that this raises, and do what the runbook says."""
    server.kill()
    wait_until(lambda: metric(port, "sluice_ready") == 0, "the flusher to notice")
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    (alert,) = (rule for rule in rules if rule["expr"] == "sluice_ready == 0")
    advice = runbook_of(alert["alert"])
    print(f"alert {alert['alert']}: {alert['annotations']['runbook']} says\n{advice}")
    assert "/readyz" in advice
    assert "Mend that server" in advice
    waits_for = ask(port, "/readyz")
    print(f"$ curl localhost:{port}/readyz\n{waits_for}")
    assert re.search("postgres|trade", waits_for)
    host.sluice("queues")
    server.start()
    seconds = wait_until(lambda: metric(port, "sluice_ready") == 1, "ready again")
    print(f"ready {seconds:.1f} s after the database")


def deploy_new_version(host: Host, source: Path) -> None:
    """Install the same code as another version, and let it take over."""
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "benchmarks")
    )
    project = source / "pyproject.toml"
    text, count = re.subn(
        '^version = ".+"$', f'version = "{NEW_VERSION}"', project.read_text(), flags=re.MULTILINE
    )
    assert count == 1
    project.write_text(text)
    host.pip_install(source)
    host.environment["SYSTEMCTL"] = f"{sys.executable} {ROOT / 'tests/acceptance/systemctl.py'}"
    host.type(ROOT / "deploy/rolling")
    for service in ("flusher", "orderbook", "collector"):
        assert host.running(service) == [f"sluice-{service}@0-b.service"]


def back_up_and_restore(server: PostgresServer) -> None:
    """Type the lines of docs/operations.md where the server's own programs are."""
    (lines,) = re.findall(
        r"^## Back up and restore\n.+?^```sh\n(.+?)^```",
        RUNBOOK.read_text(),
        re.MULTILINE | re.DOTALL,
    )
    print(lines)
    where = ("env", "PGHOST=/srv", f"PGPORT={server.port}", "PGUSER=sluice", "PGDATABASE=sluice")
    done = subprocess.run(
        inside(server.root, server.directory, [*where, "sh", "-euc", f"cd /srv\n{lines}"]),
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stdout + done.stderr


def table_sums(server: PostgresServer, database: str) -> list[str]:
    queries = server.execute(TABLES, database).splitlines()
    return [server.execute(query, database) for query in queries]


def test_a_stranger_installs_breaks_mends_deploys_and_restores(
    host: Host,
    exchange: Processes,
    private_postgres: PostgresServer,
    private_database: Database,
    tmp_path: Path,
) -> None:
    install(host, exchange)
    host.sluice("db", "init")
    host.systemctl("start", *(f"sluice-{s}@0-a.service" for s in ("collector", "orderbook")))
    host.systemctl("start", "sluice-flusher@0-a.service")
    stored = "SELECT count(*) FROM trades"
    wait_until(lambda: int(private_postgres.execute(stored, "sluice")) > 0, "a first row")
    firsts = {
        symbol: int(
            private_postgres.execute(
                f"SELECT min(trade_id) FROM trades WHERE market_id = market('binance', '{symbol}')",
                "sluice",
            )
        )
        for symbol in SYMBOLS
    }
    host.sluice("doctor")
    host.sluice("status")

    print("\n--- the database breaks")
    port = host.port("flusher-0-a")
    break_and_mend_the_database(host, port, private_postgres)

    print("\n--- a new version")
    assert NEW_VERSION not in ask(port, "/metrics")
    deploy_new_version(host, tmp_path / "newer")
    assert f'version="{NEW_VERSION}"' in ask(host.port("flusher-0-b"), "/metrics")

    print("\n--- everything published since the first row is stored once")
    asyncio.run(complete(private_database.dsn, exchange, SYMBOLS, firsts))
    host.systemctl("stop", *(f"sluice-{s}@0-b.service" for s in ("collector", "orderbook")))
    host.systemctl("stop", "sluice-flusher@0-b.service")
    host.sluice("gaps")

    print("\n--- back up, restore, compare")
    back_up_and_restore(private_postgres)
    sums = table_sums(private_postgres, "sluice")
    print(*sums, sep="\n")
    assert table_sums(private_postgres, "restored") == sums
    assert any(re.match(r"trades\|[1-9]", line) for line in sums)
