"""A stand-in for systemctl, where PID 1 is no systemd: it starts what the units say.

    STAND_IN_ROOT=DIR python systemctl.py start|stop|reload|list-units|enable|disable|... UNIT...

It reads the rendered units below DIR and honours what a deploy depends on: ExecStart, the
environment and its files, LoadCredential, WorkingDirectory, READY, ExecReload, and the time a stop
may take. It does not restart what ends, and takes nobody's privileges away.
"""

import fnmatch
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(os.environ.get("STAND_IN_ROOT", "/"))
START_SECONDS = 60.0


class Unit:
    """One instance of a template unit."""

    def __init__(self, name: str) -> None:
        self.name = name
        template, _, rest = name.partition("@")
        self._instance = rest.removesuffix(".service")
        self._path = ROOT / f"etc/systemd/system/{template}@.service"
        self._pid_file = ROOT / f"run/{name}.pid"

    @property
    def pid(self) -> int | None:
        """The main process, or None where it does not run."""
        try:
            pid = int(self._pid_file.read_text())
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, ValueError):
            return None
        return None if state == "Z" else pid

    def start(self) -> bool:
        """Start it and wait for READY; gives whether that came."""
        if self.pid is not None:
            return True
        (ROOT / "run").mkdir(exist_ok=True)
        address = ROOT / f"run/{self.name}.notify"
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(address))
            notify.settimeout(0.2)
            directory = self._below_root(self._one("WorkingDirectory"))
            directory.mkdir(parents=True, exist_ok=True)
            with (ROOT / f"run/{self.name}.log").open("ab") as log:
                process = subprocess.Popen(
                    shlex.split(self._one("ExecStart")),
                    env={**self._environment(), "NOTIFY_SOCKET": str(address)},
                    cwd=directory,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self._pid_file.write_text(str(process.pid))
            deadline = time.monotonic() + START_SECONDS
            while process.poll() is None and time.monotonic() < deadline:
                with suppress(TimeoutError):
                    if b"READY=1" in notify.recv(4096).split(b"\n"):
                        return True
        process.kill()
        process.wait()
        return False

    def stop(self) -> bool:
        """Send SIGTERM, SIGKILL after TimeoutStopSec; gives whether it ended by itself."""
        if (pid := self.pid) is None:
            return True
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + float(self._one("TimeoutStopSec"))
        while self.pid is not None:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                return False
            time.sleep(0.02)
        return True

    def reload(self) -> bool:
        """Send what ExecReload sends."""
        if (pid := self.pid) is None:
            return False
        command = self._one("ExecReload").replace("$MAINPID", str(pid))
        return subprocess.run(shlex.split(command), check=False).returncode == 0

    def _all(self, key: str) -> list[str]:
        lines = self._path.read_text(encoding="utf-8").replace("%i", self._instance).splitlines()
        return [line.partition("=")[2] for line in lines if line.startswith(f"{key}=")]

    def _one(self, key: str) -> str:
        (value,) = self._all(key)
        return value

    def _environment(self) -> dict[str, str]:
        environment = {"PATH": os.environ["PATH"]}
        for line in self._all("Environment"):
            environment |= dict(pair.split("=", 1) for pair in shlex.split(line))
        for name in self._all("EnvironmentFile"):
            path = self._below_root(name.removeprefix("-"))
            if name.startswith("-") and not path.exists():
                continue
            lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
            environment |= dict(
                line.split("=", 1) for line in lines if line and not line.startswith("#")
            )
        credentials = ROOT / f"run/{self.name}.credentials"
        credentials.mkdir(exist_ok=True)
        for line in self._all("LoadCredential"):
            name, _, source = line.partition(":")
            (credentials / name).write_bytes(self._below_root(source).read_bytes())
        # What the unit keeps in its own state directory it keeps below the root.
        environment["SPOOL_DIR"] = str(self._below_root(environment["SPOOL_DIR"]))
        return {**environment, "CREDENTIALS_DIRECTORY": str(credentials)}

    @staticmethod
    def _below_root(path: str) -> Path:
        return ROOT / path.lstrip("/")


def main(arguments: list[str]) -> int:
    """Do what systemctl would."""
    verb, *names = [word for word in arguments if not word.startswith("--")]
    if verb == "list-units":
        units = [Unit(path.stem) for path in sorted((ROOT / "run").glob("*.pid"))]
        for unit in units:
            if unit.pid is not None and any(fnmatch.fnmatch(unit.name, name) for name in names):
                print(f"{unit.name} loaded active running")
        return 0
    if verb not in {"start", "stop", "reload"}:
        return 0
    return 0 if all(getattr(Unit(name), verb)() for name in names) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
