"""The product's own processes, started, signalled and killed as an operator would."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CEILING = 60.0
"""Seconds that anything may take before a test gives up; no test asserts that it is faster."""


def wait_until(
    is_true: Callable[[], object], what: str, ceiling: float = CEILING, interval: float = 0.1
) -> float:
    """Wait for an outcome; gives the seconds it took, fails with `what` after the ceiling."""
    began = time.monotonic()
    while not is_true():
        if time.monotonic() - began > ceiling:
            raise AssertionError(f"not within {ceiling:.0f} s: {what}")
        time.sleep(interval)
    return time.monotonic() - began


class Processes:
    """A simulator and any of the three services, with one environment and a log file each."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self.directory = directory
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "METRICS_PORT": "0",
            "SPOOL_DIR": str(directory / "spool"),
            "FLUSH_INTERVAL_MS": "100",
            **environment,
        }
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.simulator_url = ""

    def simulate(self, *arguments: str, venue: str = "BINANCE_SPOT") -> str:
        """Start the simulator and point a venue's settings at it; gives its address."""
        port_file = self.directory / "simulator.port"
        port_file.unlink(missing_ok=True)
        self.start(
            "sluice.simulator",
            arguments=["--port", "0", "--port-file", str(port_file), *arguments],
        )
        wait_until(
            lambda: port_file.exists() and port_file.read_text().strip(), "the simulator's port"
        )
        port = port_file.read_text().strip()
        self.simulator_url = f"http://127.0.0.1:{port}"
        self.environment[f"{venue}_WS_URL"] = f"ws://127.0.0.1:{port}"
        self.environment[f"{venue}_REST_URL"] = self.simulator_url
        return self.simulator_url

    def start(
        self, module: str, name: str = "", arguments: list[str] | None = None, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start `python -m module` in its own session; `name` tells two of one module apart."""
        with (self.directory / f"{name or module}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *(arguments or [])],
                env={**self.environment, **environment},
                cwd=self.directory,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.running[name or module] = process
        return process

    def terminate(self, name: str) -> int:
        """Send SIGTERM and give the exit code."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(CEILING)

    def kill(self, name: str) -> None:
        """Send SIGKILL."""
        process = self.running.pop(name)
        process.kill()
        process.wait(CEILING)

    def log(self, name: str) -> str:
        """Read what a process has written so far."""
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def control(self, path: str, body: object | None = None) -> Any:
        """Ask the simulator's control port; a body makes it a POST."""
        request = urllib.request.Request(  # noqa: S310  # our own simulator on loopback
            f"{self.simulator_url}/control/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=CEILING) as answer:  # noqa: S310  # as above
            return json.load(answer)

    def end(self) -> None:
        """Kill whatever still runs."""
        for process in self.running.values():
            process.kill()
        for process in self.running.values():
            process.wait()
        self.running.clear()


@contextmanager
def processes(directory: Path, environment: Mapping[str, str]) -> Iterator[Processes]:
    """Give the processes of one test and end them with it; on a failure show their logs."""
    started = Processes(directory, environment)
    try:
        yield started
    except BaseException:
        for path in sorted(directory.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()
            print(f"--- {path.name}", *lines[-30:], sep="\n")  # pytest shows it
        raise
    finally:
        started.end()
