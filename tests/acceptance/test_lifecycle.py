"""The life of a process under a service manager: real signals, a real notify socket."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CEILING = 60.0

SERVICE = """
import asyncio, sys
from sluice.lifecycle import run_service

async def service(process):
    process.statistics.append(lambda: "3 books")
    process.reload.append(lambda new: {"flush_interval_ms"})
    feeding = asyncio.create_task(feed(process))
    await process.stop.wait()
    if sys.argv[1] == "stubborn":
        await asyncio.sleep(600)
    while sys.argv[1] == "deaf":
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass
    feeding.cancel()

async def feed(process):
    while sys.argv[1] == "lively":
        process.progress()
        await asyncio.sleep(0.05)

run_service("test", service, port=0, needs_symbols=False)
"""


class Notifications:
    """The service manager's socket: the messages that came, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(CEILING)

    def wait_for(self, start: str) -> str:
        deadline = time.monotonic() + CEILING
        while time.monotonic() < deadline:
            message = self._socket.recv(4096).decode()
            if message.startswith(start):
                return message
        raise AssertionError(f"no {start} within {CEILING} s")

    def of(self, seconds: float) -> list[str]:
        messages = []
        self._socket.settimeout(0.1)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                messages.append(self._socket.recv(4096).decode())
            except TimeoutError:
                continue
        self._socket.settimeout(CEILING)
        return messages

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def notifications(tmp_path: Path) -> Iterator[Notifications]:
    notifications = Notifications(tmp_path / "notify")
    yield notifications
    notifications.close()


@contextmanager
def running(
    notifications: Notifications, mood: str, directory: Path, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVICE, mood],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(root),
            "NOTIFY_SOCKET": str(notifications.path),
            **environment,
        },
        cwd=directory,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_it_says_ready_then_its_status_then_stopping(
    notifications: Notifications, tmp_path: Path
) -> None:
    with running(notifications, "lively", tmp_path) as process:
        assert notifications.wait_for("READY=1") == "READY=1"
        assert notifications.wait_for("STATUS=") == "STATUS=3 books"
        process.send_signal(signal.SIGTERM)
        assert notifications.wait_for("STOPPING=1") == "STOPPING=1"
        assert process.wait(CEILING) == 0


def test_the_watchdog_is_fed_only_by_progress(notifications: Notifications, tmp_path: Path) -> None:
    watchdog = {"WATCHDOG_USEC": "300000"}
    with running(notifications, "lively", tmp_path, **watchdog):
        notifications.wait_for("WATCHDOG=1")
        notifications.wait_for("WATCHDOG=1")
    with running(notifications, "idle", tmp_path, **watchdog):
        notifications.wait_for("READY=1")
        assert "WATCHDOG=1" not in notifications.of(seconds=3)


def test_what_does_not_drain_in_time_is_cancelled_and_the_exit_is_clean(
    notifications: Notifications, tmp_path: Path
) -> None:
    with running(notifications, "stubborn", tmp_path, DRAIN_SECONDS="0.5") as process:
        notifications.wait_for("READY=1")
        process.send_signal(signal.SIGTERM)
        assert process.wait(CEILING) == 0


def test_what_does_not_even_hear_its_cancellation_is_ended_and_called_a_bug(
    notifications: Notifications, tmp_path: Path
) -> None:
    with running(notifications, "deaf", tmp_path, DRAIN_SECONDS="0.5") as process:
        notifications.wait_for("READY=1")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=CEILING)
    assert process.returncode == 1
    assert "a bug" in log


def test_a_stop_before_the_loop_runs_is_a_clean_exit(tmp_path: Path) -> None:
    importing = (
        "import time\nfrom sluice.signals import end_cleanly_when_told\n"
        "end_cleanly_when_told()\nprint(flush=True)\ntime.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", importing],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(CEILING) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_second_signal_ends_the_wait(notifications: Notifications, tmp_path: Path) -> None:
    with running(notifications, "stubborn", tmp_path, DRAIN_SECONDS="500") as process:
        notifications.wait_for("READY=1")
        process.send_signal(signal.SIGTERM)
        notifications.wait_for("STOPPING=1")
        process.send_signal(signal.SIGTERM)
        assert process.wait(CEILING) == 0


def test_a_reload_applies_what_it_can_and_names_what_needs_a_restart(
    notifications: Notifications, tmp_path: Path
) -> None:
    with running(notifications, "lively", tmp_path) as process:
        notifications.wait_for("READY=1")
        (tmp_path / ".env").write_text("FLUSH_INTERVAL_MS=5\nSNAPSHOT_DEPTH=7\n")
        process.send_signal(signal.SIGHUP)
        assert "MONOTONIC_USEC=" in notifications.wait_for("RELOADING=1")
        notifications.wait_for("READY=1")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=CEILING)
    assert "FLUSH_INTERVAL_MS applied" in log
    assert "SNAPSHOT_DEPTH needs a restart" in log


def test_a_bad_reload_keeps_the_old_settings(notifications: Notifications, tmp_path: Path) -> None:
    with running(notifications, "lively", tmp_path) as process:
        notifications.wait_for("READY=1")
        (tmp_path / ".env").write_text("SNAPSHOT_DEPTH=none\n")
        process.send_signal(signal.SIGHUP)
        notifications.wait_for("RELOADING=1")
        notifications.wait_for("READY=1")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=CEILING)
    assert "not reloaded, the old settings stay: SNAPSHOT_DEPTH" in log
    assert process.returncode == 0
