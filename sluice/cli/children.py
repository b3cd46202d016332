"""Processes that `sluice run` starts and looks after."""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from sluice.cli.debian import Say

EXIT_BAD_SETTINGS: Final = 2
_SECONDS_BETWEEN_STARTS: Final = (1.0, 2.0, 5.0, 10.0)
_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _end_with(parent: int) -> None:
    # A service that gets SIGTERM drains, so nothing is lost even when its parent was killed.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before it could be asked for
        os._exit(1)


class RefusedError(RuntimeError):
    """A child refuses its settings; starting it again would not help."""


class Child:
    """`python -m <arguments>` in a session of its own, started again whenever it ends by itself.

    Its own session keeps the terminal's Ctrl-C from it: who started it decides when it stops. What
    it writes goes to `log`.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], log: Path, say: Say
    ) -> None:
        self.name = arguments[0].rpartition(".")[2]
        self.log = log
        self._arguments = arguments
        self._environment = environment
        self._say = say
        self._process: asyncio.subprocess.Process | None = None
        self._is_stopping = False

    async def run(self) -> None:
        """Start it, and again whenever it ends, until `stop`.

        Raises:
            RefusedError: it ended because of its settings.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        starts = 0
        while not self._is_stopping:
            code = await self.run_once()
            if self._is_stopping:
                return
            if code == EXIT_BAD_SETTINGS:
                raise RefusedError(f"{self.name} refuses its settings:\n{self.log_tail()}")
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            self._say(f"{self.name} ended by itself ({how}: {self.log_tail(1)}), starting it again")
            await asyncio.sleep(_SECONDS_BETWEEN_STARTS[min(starts, 3)])
            starts += 1

    async def run_once(self) -> int:
        """Start it and wait for its end; gives its exit code, below zero for a signal."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", *self._arguments),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=partial(_end_with, os.getpid()),
            )
        return await self._process.wait()

    async def stop(self, ceiling: float) -> bool:
        """Send SIGTERM and wait; gives whether it ended with exit code 0 within the ceiling."""
        self._is_stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return True
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(ceiling):
                code = await process.wait()
        except TimeoutError:
            self._say(f"{self.name} did not end within {ceiling:.0f} s and was killed")
            self.kill()
            await process.wait()
            return False
        if code:
            self._say(f"{self.name} ended with {code}; see {self.log}")
        return code == 0

    def kill(self) -> None:
        """End it at once."""
        self._is_stopping = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def log_tail(self, lines: int = 10) -> str:
        """Give the last lines it wrote."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])
