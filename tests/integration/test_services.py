"""The servers that `sluice run` and the tests bring: real ones, killed, frozen and taken over."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

import asyncpg
import pytest
import redis
from redis import Redis

from sluice.cli import services
from sluice.cli.debian import RootError, ensure_root, is_root, make_root
from sluice.cli.servers import PostgresServer, RedisServer, ServerError, free_port
from tests.servers import Database, database_of

ROOT = Path(__file__).resolve().parents[2]
CEILING = 60.0

KEEPS_A_SERVER = """
import sys, time
from pathlib import Path
from sluice.cli.servers import {kind}
server = {kind}(Path(sys.argv[1]), Path(sys.argv[2]), dies_with_parent={dies})
server.start()
print(server.pid, flush=True)
if {dies}:
    time.sleep(600)
"""


def wait_until(is_true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + CEILING
    while not is_true():
        assert time.monotonic() < deadline, f"not within {CEILING:.0f} s: {what}"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def client_of(server: RedisServer, timeout: float = CEILING) -> Redis:
    return Redis.from_url(server.url, socket_timeout=timeout, protocol=2)


# Redis -----------------------------------------------------------------------------------------


def test_redis_keeps_its_data_and_its_port_over_a_kill(private_redis: RedisServer) -> None:
    port = private_redis.port
    with client_of(private_redis) as client:
        client.rpush("list", "a", "b")
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}

    private_redis.kill()
    assert not private_redis.is_running
    private_redis.start()

    assert private_redis.port == port
    with client_of(private_redis) as client:
        assert client.lrange("list", 0, -1) == [b"a", b"b"]


def test_a_frozen_redis_answers_nobody_until_it_thaws(private_redis: RedisServer) -> None:
    private_redis.freeze()
    with client_of(private_redis, timeout=0.3) as client, pytest.raises(redis.TimeoutError):
        client.ping()
    private_redis.thaw()
    with client_of(private_redis) as client:
        assert client.ping()


def test_a_frozen_server_can_be_stopped_in_good_order(private_redis: RedisServer) -> None:
    private_redis.freeze()
    private_redis.stop()

    assert not private_redis.is_running
    assert "bye bye" in private_redis.log_tail()


def test_options_go_over_the_defaults(root: Path, tmp_path: Path) -> None:
    server = RedisServer(root, tmp_path, options={"maxmemory": "7mb"})
    try:
        server.start()
        with client_of(server) as client:
            assert client.config_get("maxmemory") == {"maxmemory": str(7 << 20)}
    finally:
        server.kill()


def test_a_bad_option_is_an_error_with_the_servers_words(root: Path, tmp_path: Path) -> None:
    server = RedisServer(root, tmp_path, options={"no-such-option": "1"})

    with pytest.raises(ServerError, match="no-such-option"):
        server.start()

    assert not server.is_running


# PostgreSQL ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "fast", "immediate"])
def test_postgres_keeps_what_was_committed(private_postgres: PostgresServer, how: str) -> None:
    private_postgres.create_database("kept")
    private_postgres.execute("CREATE TABLE t AS SELECT 7 AS seven", "kept")
    port = private_postgres.port

    if how == "kill":
        private_postgres.kill()
    else:
        private_postgres.stop("immediate" if how == "immediate" else "fast")
    assert not private_postgres.is_running
    private_postgres.start()

    assert private_postgres.port == port
    assert private_postgres.execute("SELECT seven FROM t", "kept") == "7"


async def test_a_frozen_postgres_answers_nobody_until_it_thaws(
    private_postgres: PostgresServer,
) -> None:
    connection = await asyncpg.connect(private_postgres.dsn, timeout=CEILING)
    try:
        assert await connection.fetchval("SELECT 1") == 1
        private_postgres.freeze()
        question = asyncio.create_task(connection.fetchval("SELECT 2"))
        done, _ = await asyncio.wait([question], timeout=0.5)
        assert not done, "its backend has left the process group, and must be frozen too"
        private_postgres.thaw()
        assert await asyncio.wait_for(question, CEILING) == 2
    finally:
        await connection.close()


def test_postgres_has_timescaledb(private_postgres: PostgresServer) -> None:
    private_postgres.execute("CREATE EXTENSION timescaledb")

    assert private_postgres.execute("SHOW timescaledb.telemetry_level") == "off"


def test_a_stale_lock_file_with_anothers_number_stops_nobody(
    private_postgres: PostgresServer,
) -> None:
    private_postgres.stop()
    owner = private_postgres.home.stat()
    with subprocess.Popen(["/bin/sleep", "600"], user=owner.st_uid, group=owner.st_gid) as other:
        lock = private_postgres.home / "postmaster.pid"
        lock.write_text(f"{other.pid}\n/srv/data\n1\n1\n\n\n1 1\nready\n", encoding="ascii")

        try:
            private_postgres.start()
        finally:
            other.kill()

    assert private_postgres.execute("SELECT 1") == "1"


def test_many_servers_run_side_by_side(root: Path, tmp_path: Path) -> None:
    servers = [RedisServer(root, tmp_path / str(number)) for number in range(4)]
    try:
        for server in servers:
            server.start()
        for server in servers:
            with client_of(server) as client:
                client.set("mine", server.port)
        for server in servers:
            with client_of(server) as client:
                assert client.get("mine") == str(server.port).encode()
        mounted = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
        assert f" {root}/" not in mounted
    finally:
        for server in servers:
            server.kill()


# Passwords -------------------------------------------------------------------------------------


@pytest.fixture
def password() -> str:
    return f'it\'s "{token_hex(8)}" \\ %'


def test_redis_wants_its_password(root: Path, tmp_path: Path, password: str) -> None:
    server = RedisServer(root, tmp_path, password=password)
    try:
        server.start()
        with client_of(server) as client:
            assert client.ping()
        with Redis(port=server.port) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
        _assert_no_process_shows(password)
        assert stat.S_IMODE((tmp_path / "redis.conf").stat().st_mode) == 0o600
    finally:
        server.kill()


async def test_postgres_wants_its_password(root: Path, tmp_path: Path, password: str) -> None:
    server = PostgresServer(root, tmp_path, password=password)
    try:
        server.start()
        connection = await asyncpg.connect(server.dsn, timeout=CEILING)
        await connection.close()
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(
                replace(database_of(server), password="guess").dsn,  # noqa: S106  # a wrong one
                timeout=CEILING,
            )
        _assert_no_process_shows(password)
    finally:
        server.kill()


def _assert_no_process_shows(password: str) -> None:
    secret = password.split('"')[1].encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            assert secret not in path.read_bytes()


# Life and death --------------------------------------------------------------------------------


@pytest.fixture
def parent(root: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Give a way to start a process that starts a server and prints its number."""
    started: list[subprocess.Popen[str]] = []

    def start(kind: type[RedisServer | PostgresServer], *, dies: bool) -> subprocess.Popen[str]:
        program = KEEPS_A_SERVER.format(kind=kind.__name__, dies=dies)
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(root), str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", [RedisServer, PostgresServer])
def test_a_server_dies_with_its_parent(
    kind: type[RedisServer | PostgresServer], parent: Callable[..., subprocess.Popen[str]]
) -> None:
    process = parent(kind, dies=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert is_running(pid)

    process.send_signal(signal.SIGKILL)

    wait_until(lambda: not is_running(pid), "the server's end")


def test_a_server_that_outlives_its_parent_is_taken_over(
    parent: Callable[..., subprocess.Popen[str]], root: Path, tmp_path: Path
) -> None:
    process = parent(RedisServer, dies=False)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert process.wait(CEILING) == 0

    server = RedisServer(root, tmp_path)
    try:
        assert server.pid == pid
        server.start()  # it runs: nothing to do
        assert server.pid == pid
        with client_of(server) as client:
            assert client.ping()
    finally:
        server.stop()

    assert not is_running(pid)


def test_another_process_with_the_servers_number_is_left_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "pid").write_text(f"{os.getpid()}\n", encoding="ascii")
    server = RedisServer(root, tmp_path)

    assert not server.is_running
    server.stop()
    server.kill()


def test_a_free_port_is_one_the_kernel_gives_to_nobody_else() -> None:
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()

    assert all(1024 < free_port() < int(limits[0]) for _ in range(100))


# A root ----------------------------------------------------------------------------------------


@pytest.fixture
def fake_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a quick mmdebstrap first in the path: it notes each run, then does as `mood` says."""
    programs = tmp_path / "bin"
    programs.mkdir()
    mood = tmp_path / "mood"
    script = f"""#!/bin/sh
for last; do :; done
echo run >>{tmp_path}/runs
mkdir -p "$last/usr/lib/postgresql/17/bin"
touch "$last/run-$(wc -l <{tmp_path}/runs)"
echo "I: half done"
. {mood}
touch "$last/usr/lib/postgresql/17/bin/postgres"
"""
    (programs / "mmdebstrap").write_text(script, encoding="utf-8")
    (programs / "mmdebstrap").chmod(0o755)
    mood.write_text("sleep 0.3", encoding="utf-8")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path


def test_two_builds_at_once_make_one_root(fake_build: Path) -> None:
    root = fake_build / "services" / "root"

    with ThreadPoolExecutor(2) as threads:
        for build in [threads.submit(make_root, root, lambda _: None) for _ in range(2)]:
            build.result()

    assert is_root(root)
    assert (fake_build / "runs").read_text(encoding="utf-8") == "run\n"


def test_a_failed_build_leaves_nothing_and_says_why(fake_build: Path) -> None:
    (fake_build / "mood").write_text("echo 'E: no space left'; exit 1", encoding="utf-8")
    root = fake_build / "services" / "root"

    with pytest.raises(RootError, match="no space left"):
        make_root(root, lambda _: None)

    assert {path.name for path in root.parent.iterdir()} == {"root.lock"}


def test_a_killed_build_leaves_nothing_that_looks_finished(fake_build: Path) -> None:
    (fake_build / "mood").write_text("exec sleep 600", encoding="utf-8")
    root = fake_build / "services" / "root"
    program = (
        "import sys; from pathlib import Path; from sluice.cli.debian import make_root; "
        "make_root(Path(sys.argv[1]), lambda line: print(line, flush=True))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(root)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as builder:
        assert builder.stdout is not None
        assert any("half done" in line for line in builder.stdout)
        builder.kill()
    assert not is_root(root)

    (fake_build / "mood").write_text("", encoding="utf-8")
    make_root(root, lambda _: None)

    assert is_root(root)
    assert [path.name for path in root.glob("run-*")] == ["run-2"]
    assert not list(root.parent.glob("*.partial*"))


def test_a_named_root_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_SERVICES", str(tmp_path))

    with pytest.raises(RootError, match="SLUICE_SERVICES"):
        ensure_root(tmp_path, lambda _: None)


# Finding them ----------------------------------------------------------------------------------


def test_named_servers_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("REDIS_", "POSTGRES_")):
            monkeypatch.delenv(name)
    (tmp_path / ".env").write_text("REDIS_HOST=cache\nPOSTGRES_USER=me\nSYMBOLS=X\n")
    monkeypatch.setenv("POSTGRES_USER", "you")

    found = services.find_or_bring(lambda _: None, tmp_path / ".services")

    assert found.environment == {"REDIS_HOST": "cache", "POSTGRES_USER": "you"}
    assert not (tmp_path / ".services").exists()


def test_without_any_way_one_message_names_all_three(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(services, "named_servers", dict)
    monkeypatch.setattr(services, "docker_problem", lambda: "no engine")
    monkeypatch.setattr(services, "why_not", lambda: "not root")

    with pytest.raises(services.NoServicesError) as refused:
        services.find_or_bring(lambda _: None, tmp_path / ".services")

    message = str(refused.value)
    assert "REDIS_HOST" in message
    assert "Docker engine (no engine)" in message
    assert "Debian or Ubuntu" in message
    assert "(not root)" in message


# Fixtures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [1, 2])
async def test_each_test_has_a_database_of_its_own(postgres: Database, turn: int) -> None:
    connection = await asyncpg.connect(postgres.dsn, timeout=CEILING)
    try:
        assert await connection.fetchval("SELECT count(*) FROM markets") == 0
        await connection.execute(
            "INSERT INTO markets (exchange, symbol, id_kind) VALUES ('x', $1, 'raw')", str(turn)
        )
    finally:
        await connection.close()


@pytest.mark.parametrize("turn", [1, 2])
def test_each_test_has_an_empty_redis(redis_url: str, turn: int) -> None:
    with Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("turn", turn)
