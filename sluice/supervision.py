"""What systemd is told: ready, status, progress, reloading, stopping.

The protocol is one datagram of `NAME=value` lines to the socket in NOTIFY_SOCKET, see
sd_notify(3); without that variable nothing is sent. The watchdog is fed by progress that the
service reports, never by a timer: a process that only waits in vain is restarted.
"""

import os
import socket
import time
from collections.abc import Mapping

from loguru import logger


class Supervisor:
    """The service manager's end of a process; every method is cheap and never raises."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the zero byte of the abstract name space.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        micros = environment.get("WATCHDOG_USEC", "")
        meant_for = environment.get("WATCHDOG_PID", str(os.getpid()))
        has_watchdog = micros.isdigit() and meant_for == str(os.getpid())
        self._interval = int(micros) / 3e6 if has_watchdog else None
        self._progress = False
        self._fed = 0.0

    @property
    def is_present(self) -> bool:
        """Whether there is anybody to tell."""
        return bool(self._address)

    def progress(self) -> None:
        """Note that work got on: an answer came, an attempt ended."""
        self._progress = True

    def feed(self) -> None:
        """Feed the watchdog if there was progress since the last time and a third of it is over."""
        now = time.monotonic()
        if self._interval is not None and self._progress and now - self._fed >= self._interval:
            self._progress = False
            self._fed = now
            self._send("WATCHDOG=1")

    def ready(self) -> None:
        """Say that the service does its work now; also ends a reload."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """Say what `systemctl status` shows."""
        self._send(f"STATUS={' '.join(text.split())}")

    def reloading(self) -> None:
        """Say that settings are read again; `ready` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Say that the service drains and ends."""
        self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as client:
                client.sendto(message.encode(), self._address)
        except OSError as error:
            logger.debug("the service manager did not hear {!r}: {}", message, error)
