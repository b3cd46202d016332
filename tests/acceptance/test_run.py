"""`sluice run` and `sluice stop`, as an operator has them: whole processes, real signals."""

import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sluice.cli.run import what_failed

ROOT = Path(__file__).resolve().parents[2]
SLUICE = [sys.executable, "-c", "from sluice.cli import main; main()"]
CEILING = 120.0
MARKETS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "NEXOUSDT")


def wait_until(is_true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + CEILING
    while not is_true():
        assert time.monotonic() < deadline, f"not within {CEILING:.0f} s: {what}"
        time.sleep(0.1)


def processes_in(directory: Path) -> dict[int, str]:
    """Give the command line of every process that works in the directory or below it."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            home = (path / "cwd").stat()
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        homes = (directory, *(directory / ".services" / name for name in SERVER_HOMES))
        for candidate in homes:
            if candidate.exists() and os.path.samestat(home, candidate.stat()):
                found[int(path.name)] = command
    return found


SERVER_HOMES = ("redis", "postgres", "postgres/data")


class Recording:
    """A `sluice run` with all it has said so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def wait_for(self, pattern: str) -> None:
        wait_until(
            lambda: re.search(pattern, self.said) or self.process.poll() is not None, pattern
        )
        assert re.search(pattern, self.said), self.said

    def end(self) -> int:
        code = self.process.wait(CEILING)
        self._reader.join(CEILING)
        return code


@pytest.fixture(scope="module")
def directory(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a directory whose servers serve all recordings of this file, one after the other."""
    path = tmp_path_factory.mktemp("run")
    (path / "environment").write_text(str(root), encoding="utf-8")
    yield path
    subprocess.run([*SLUICE, "stop"], cwd=path, env=environment(path), check=True)


def environment(directory: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "SLUICE_SERVICES": (directory / "environment").read_text(encoding="utf-8"),
    }


@pytest.fixture
def record(directory: Path) -> Iterator[Callable[..., Recording]]:
    """Give a way to start `sluice run`; like a shell's background job it ignores SIGINT."""
    started: list[Recording] = []

    def start(*arguments: str) -> Recording:
        ignoring = ["env", "--ignore-signal=INT", *SLUICE, "run", *arguments]
        process = subprocess.Popen(
            ignoring,
            cwd=directory,
            env=environment(directory),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(Recording(process))
        return started[-1]

    yield start
    for recording in started:
        recording.process.kill()
        recording.end()
        assert recording.process.stdout is not None
        recording.process.stdout.close()


def assert_is_summary(said: str) -> None:
    for market in MARKETS:
        row = re.search(
            rf"^simulator:{market} +(\d+) +\S+ +\S+ +(\d+) +(\d+) +\d+ *$", said, re.MULTILINE
        )
        assert row, said
        trades, missing, snapshots = map(int, row.groups())
        assert trades > 0
        assert missing == 0
        assert snapshots > 0
    assert re.search(r"left in the queues: trade 0, orderbook_snapshot 0, kline 0", said), said


def test_a_recording_from_start_to_summary(
    record: Callable[..., Recording], directory: Path
) -> None:
    recording = record()
    recording.wait_for(r"4 of 4 books live")

    second = record()
    assert second.end() == 1
    assert f"process {recording.process.pid} records here already" in second.said

    flusher = next(pid for pid, line in processes_in(directory).items() if "-m flusher" in line)
    os.kill(flusher, signal.SIGKILL)
    recording.wait_for(r"flusher ended by itself \(SIGKILL.*starting it again")
    wait_until(
        lambda: any("-m flusher" in line for line in processes_in(directory).values()), "a flusher"
    )
    before = recording.said.count("books live")
    wait_until(lambda: recording.said.count("books live") >= before + 2, "more trades")

    recording.process.send_signal(signal.SIGINT)
    assert recording.end() == 0, recording.said
    assert_is_summary(recording.said)
    assert not [line for line in processes_in(directory).values() if " -m " in line]


def test_it_ends_by_itself(record: Callable[..., Recording], directory: Path) -> None:
    recording = record("--seconds", "2")

    assert recording.end() == 0, recording.said
    assert "left in the queues: trade 0, orderbook_snapshot 0, kline 0" in recording.said
    environment = directory / ".sluice" / "env"
    assert stat.S_IMODE(environment.stat().st_mode) == 0o600
    told = subprocess.run(
        ["/bin/sh", "-c", f". {environment}; echo $POSTGRES_DB"], capture_output=True, check=True
    )
    assert told.stdout == b"sluice_simulator\n"


def test_killed_it_leaves_no_process(record: Callable[..., Recording], directory: Path) -> None:
    def services() -> list[str]:
        return [line for line in processes_in(directory).values() if " -m " in line]

    recording = record()
    wait_until(lambda: len(services()) == 4, "all that it starts")

    recording.process.kill()

    wait_until(lambda: not services(), "the end of what it started")


def test_a_terminal_has_a_live_screen_and_its_interrupt_drains(directory: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(directory)
        os.execve(  # noqa: S606  # no shell is wanted
            SLUICE[0],
            [*SLUICE, "run"],
            {**environment(directory), "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
        )
    shown = b""
    deadline = time.monotonic() + CEILING
    is_interrupted = False
    try:
        while time.monotonic() < deadline:
            if not select.select([terminal], [], [], 1)[0]:
                continue
            try:
                part = os.read(terminal, 1 << 16)
            except OSError:  # its other end is closed
                break
            shown += part
            if not is_interrupted and re.search(rb"BTCUSDT .*live", shown):
                os.write(terminal, b"\x03")
                is_interrupted = True
        assert is_interrupted, shown.decode()
    finally:
        if not is_interrupted:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(terminal)

    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert os.waitstatus_to_exitcode(status) == 0, text
    assert re.search(r"market +last +change +trades/s +bid +ask +bps +book", text)
    assert re.search(r"queue +depth +oldest +dead", text)
    assert "left in the queues: trade 0" in text


def test_stop_ends_the_recording_and_the_servers(
    record: Callable[..., Recording], directory: Path
) -> None:
    recording = record()
    recording.wait_for(r"rows committed")

    subprocess.run([*SLUICE, "stop"], cwd=directory, env=environment(directory), check=True)

    assert recording.end() == 0, recording.said
    assert "left in the queues: trade 0" in recording.said
    assert processes_in(directory) == {}
    assert str(directory) not in Path("/proc/self/mountinfo").read_text(encoding="utf-8")


def test_bad_settings_end_it_at_once(record: Callable[..., Recording], directory: Path) -> None:
    (directory / ".env").write_text("FLUSH_BATCH_SIZE=many\n", encoding="utf-8")
    try:
        recording = record()
        assert recording.end() == 2
    finally:
        (directory / ".env").unlink()
    assert "FLUSH_BATCH_SIZE" in recording.said


@pytest.mark.parametrize(
    ("stored", "depths", "must_have_rows", "failed"),
    [
        (5, {"trade": 0}, True, None),
        (0, {"trade": 0}, False, None),
        (0, {"trade": 0}, True, "nothing was committed"),
        (5, {"trade": 1}, False, "the queues did not drain"),
        (5, {}, False, "the queues did not drain"),
    ],
)
def test_what_counts_as_a_failure(
    stored: int, depths: dict[str, int], *, must_have_rows: bool, failed: str | None
) -> None:
    assert what_failed(stored, depths, must_have_rows=must_have_rows) == failed
