"""The product's processes, started again whenever they end, as a supervisor does."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import Popen
from typing import Final

from tests.acceptance.processes import Processes
from tests.faults.waiting import eventually
from tests.invariants import Resources, Violation, check_resources

END_SECONDS: Final = 120.0
"""How long a process that was told to end may take; none is expected to need it."""
ALLOWANCE: Final = Resources(memory_bytes=128 * 2**20, descriptors=24, threads=12)


@dataclass
class Slot:
    """A place that one process always fills.

    `point` is the failpoint it was started with, `log_start` where its own lines begin.
    """

    service: str
    name: str
    process: Popen[bytes]
    point: str = ""
    log_start: int = 0
    is_in_hand: bool = False


class Services:
    """All slots, what was seen to hit their processes, and what they did that they must not."""

    def __init__(self, processes: Processes, copies: dict[str, int], hits: Counter[str]) -> None:
        self.violations: list[Violation] = []
        self._processes = processes
        self._hits = hits
        self._starts = 0
        self.slots = [
            self._begin(service, number) for service in copies for number in range(copies[service])
        ]
        self._baseline: dict[str, Resources] = {}

    def of(self, service: str, draw: float) -> Slot:
        """Pick one of a service's slots, or of all where no service is named."""
        slots = [slot for slot in self.slots if service in {"", slot.service}]
        return slots[int(draw * len(slots))]

    @contextmanager
    def in_hand(self, slot: Slot) -> Iterator[Popen[bytes]]:
        """Keep the watch from starting it again; it must run at the end."""
        while_dead = slot.process.poll()
        if while_dead is not None:
            self._bury(slot, while_dead)
            self.start(slot)
        slot.is_in_hand = True
        try:
            yield slot.process
        finally:
            slot.is_in_hand = False

    def start(self, slot: Slot, point: str = "") -> Popen[bytes]:
        """Fill a slot again."""
        slot.log_start = len(self._processes.log(slot.name))
        armed = {"SLUICE_TESTING": "1", "SLUICE_FAILPOINT": point} if point else {}
        slot.process = self._processes.start(slot.service, slot.name, None, **armed)
        slot.point = point
        return slot.process

    def start_beside(self, slot: Slot) -> Slot:
        """Start the next process of a slot while the old one still runs; gives the old one."""
        self._starts += 1
        old = replace(slot)
        # Under a name of its own, or nobody would end it if this fails.
        self._processes.running[f"{slot.name}.{self._starts}"] = old.process
        self.start(slot)
        return old

    async def end(self, slot: Slot) -> None:
        """Tell a process to end; it must do so with 0 unless it comes by its failpoint.

        One that is told before it has begun ends as the system ends it.
        """
        process = slot.process
        process.send_signal(signal.SIGTERM)
        try:
            await eventually(lambda: process.poll() is not None, within=END_SECONDS)
        except AssertionError:
            process.kill()
            process.wait()
            self.violations.append(Violation("exit", slot.name, "did not end after SIGTERM"))
            return
        has_begun = "started" in self._processes.log(slot.name)[slot.log_start :]
        if slot.point and process.returncode == -signal.SIGKILL:
            self._bury(slot, process.returncode)
        elif process.returncode == -signal.SIGTERM and not has_begun:
            return
        elif process.returncode != 0:
            what = f"ended with {process.returncode} after SIGTERM"
            self.violations.append(Violation("exit", slot.name, what))

    async def watch(self) -> None:
        """Start again what ended, for ever; only a failpoint may end a process."""
        while True:
            await asyncio.sleep(0.1)
            self._replace_dead()

    async def settle(self) -> None:
        """Leave every slot filled by a process without a failpoint."""
        self._replace_dead()
        for slot in self.slots:
            if slot.point:
                with self.in_hand(slot):
                    await self.end(slot)
                    self.start(slot)

    async def end_all(self) -> None:
        """Tell every process to end."""
        for slot in self.slots:
            with self.in_hand(slot):
                await self.end(slot)

    def look(self) -> None:
        """Take what each process holds now for the baseline."""
        self._baseline = {slot.name: Resources.of(slot.process.pid) for slot in self.slots}

    def check(self) -> list[Violation]:
        """Compare what each process holds now with the baseline."""
        return [
            violation
            for slot in self.slots
            for violation in check_resources(
                slot.name,
                self._baseline[slot.name],
                Resources.of(slot.process.pid),
                allowance=ALLOWANCE,
            )
        ]

    def _begin(self, service: str, number: int) -> Slot:
        name = f"{service}{number + 1}"
        return Slot(service, name, self._processes.start(service, name))

    def _replace_dead(self) -> None:
        for slot in self.slots:
            if not slot.is_in_hand and (code := slot.process.poll()) is not None:
                self._bury(slot, code)
                self.start(slot)

    def _bury(self, slot: Slot, code: int) -> None:
        if slot.point and code == -signal.SIGKILL:
            self._hits[f"failpoint {slot.point.partition(':')[0]}"] += 1
        else:
            said = self._processes.log(slot.name).splitlines()[-1:]
            self.violations.append(
                Violation("alive", slot.name, f"ended by itself with {code}: {''.join(said)}")
            )


def state_of(pid: int) -> str:
    """Give the letter of a process's state, `T` for a stopped one."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    return stat.rpartition(")")[2].split()[0]


async def stopped(pid: int, seconds: float) -> int:
    """Wait so long, and tell how often a process was seen stopped meanwhile."""
    deadline = time.monotonic() + seconds
    seen = 0
    while time.monotonic() < deadline:
        await asyncio.sleep(0.05)
        seen += state_of(pid) in "Tt"
    return seen
