"""The life of a process: settings, loop, signals, readiness, exit code.

The first SIGTERM or SIGINT sets `stop`: sources end, buffers drain, clients close. When that takes
longer than DRAIN_SECONDS, or a second signal comes, what is left is cancelled. Whatever is not
stored by then is still in Redis, in the spool, or named by a gap.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version

import uvloop
from loguru import logger
from prometheus_client.core import Metric

from sluice import failpoints
from sluice.logging import configure_logging
from sluice.metrics import Health, gauge, serve_metrics
from sluice.settings import EXIT_BAD_SETTINGS, BadSettingsError, Settings, load, load_or_exit
from sluice.supervision import Supervisor

VERSION = version("sluice")
Fact = int | float | str
STATISTICS_SECONDS = 30.0
LAST_SECONDS = 1.5
"""How long a cancelled service may take to end; a cancellation can be lost on the way."""


@dataclass
class Process:
    """What a running service has from its process.

    `settings` are those in effect: after a reload, what was applied is new and the rest is old.

    `stop` is set by the first signal. `statistics` gives the line that is logged every 30 s,
    `metrics` the families behind `/metrics`, `facts` what `sluice status` shows, and `reload` what
    takes new settings after SIGHUP and names the variables it applied; a service adds its own to
    each. It calls `progress` whenever work got on, whatever the outcome: without it systemd's
    watchdog ends the process.
    """

    name: str
    settings: Settings
    stop: asyncio.Event
    health: Health = field(default_factory=Health)
    statistics: list[Callable[[], str]] = field(default_factory=list)
    metrics: list[Callable[[], Iterable[Metric]]] = field(default_factory=list)
    facts: list[Callable[[], dict[str, Fact]]] = field(default_factory=list)
    reload: list[Callable[[Settings], set[str]]] = field(default_factory=list)
    supervisor: Supervisor = field(default_factory=lambda: Supervisor(os.environ))
    started: float = field(default_factory=time.time)
    needs_symbols: bool = False
    unread: tuple[str, ...] = ()
    """How the names of settings begin that this service does not read."""

    def progress(self) -> None:
        """Note that work got on: a frame or an answer came, an attempt ended."""
        self.supervisor.progress()

    def statistics_line(self) -> str:
        """Give what the process has to say of itself, in one line."""
        return ", ".join(line() for line in self.statistics)

    def collect(self) -> Iterable[Metric]:
        """Give all metric families of the process."""
        yield gauge("up", "1 while the process runs", [({"process": self.name}, 1)])
        yield gauge("build_info", "Which version runs", [({"version": VERSION}, 1)])
        yield gauge("ready", "1 while it is ready", [({}, float(self.health.is_ready))])
        yield gauge("start_timestamp_seconds", "When it started", [({}, self.started)])
        for collect in self.metrics:
            yield from collect()


Service = Callable[[Process], Awaitable[None]]


def run_service(name: str, service: Service, *, port: int, needs_symbols: bool) -> None:
    """Run a service until a signal ends it; `port` is that of its pages unless METRICS_PORT is set.

    Exits with 0 after a stop by signal, 1 after a bug, 2 for bad settings.
    """
    settings = load_or_exit(needs_symbols=needs_symbols)
    try:
        failpoints.arm()
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(EXIT_BAD_SETTINGS) from None
    try:
        configure_logging(settings.log_level, settings.log_file)
    except OSError as error:
        sys.stderr.write(f"LOG_FILE: {settings.log_file}: {error.strerror}\n")
        raise SystemExit(EXIT_BAD_SETTINGS) from None
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        process = Process(name, settings, asyncio.Event(), needs_symbols=needs_symbols)
        code = runner.run(_run(process, service, port))
    raise SystemExit(code)


class _Ending:
    """How a process comes to its end: asked, then cancelled, then ended whatever it does."""

    def __init__(self, process: Process, task: "asyncio.Task[object]") -> None:
        self._process = process
        self._task = task
        self._is_served = False
        self._deadlines: list[asyncio.TimerHandle] = []

    def on_signal(self, number: signal.Signals) -> None:
        """Take a signal: the first one asks, the second gives up what is left."""
        process = self._process
        if process.stop.is_set():
            logger.warning("{}: {} again, giving up what is left", process.name, number.name)
            self._give_up()
            return
        logger.info("{}: {}, stopping", process.name, number.name)
        process.supervisor.stopping()
        process.stop.set()
        loop, drain = asyncio.get_running_loop(), process.settings.drain_seconds
        self._deadlines = [
            loop.call_later(drain, self._give_up),
            loop.call_later(drain + LAST_SECONDS, _abandon, process.name),
        ]

    def _give_up(self) -> None:
        if not self._is_served:
            self._task.cancel()

    def served(self) -> None:
        """Note that the service has ended, so that there is nothing to cancel."""
        self._is_served = True

    def ended(self) -> None:
        """Note that the process ends by itself."""
        for deadline in self._deadlines:
            deadline.cancel()


async def _run(process: Process, service: Service, port: int) -> int:
    name, settings = process.name, process.settings
    task = asyncio.current_task()
    assert task is not None  # noqa: S101  # a coroutine that runs has a task
    loop = asyncio.get_running_loop()
    ending = _Ending(process, task)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.on_signal, number)
    loop.add_signal_handler(signal.SIGHUP, _reload, process)

    try:
        runner = await serve_metrics(
            settings.metrics_host,
            port if settings.metrics_port is None else settings.metrics_port,
            process.health,
            process.collect,
        )
    except OSError as error:
        logger.error("METRICS_HOST, METRICS_PORT: {}", error.strerror or error)
        return EXIT_BAD_SETTINGS
    reports = [
        asyncio.create_task(_log_statistics(process)),
        asyncio.create_task(_report_to_supervisor(process)),
    ]
    try:
        logger.info("{}: started, version {}", name, VERSION)
        process.health.ready("start")
        await service(process)
    except asyncio.CancelledError:
        logger.warning("{}: drained no further within {} s", name, settings.drain_seconds)
    except Exception as error:  # noqa: BLE001  # whatever it was, say so and let systemd restart
        if (refused := _refusal(error)) is not None:
            logger.error("{}: {}", name, refused)
            return EXIT_BAD_SETTINGS
        logger.exception("{}: a bug ended the process; what it held is fetched again", name)
        return 1
    finally:
        ending.served()
        for report in reports:
            report.cancel()
        await asyncio.gather(*reports, return_exceptions=True)
        await runner.cleanup()
        ending.ended()
    logger.info("{}: stopped", name)
    return 0


def _abandon(name: str) -> None:
    """End a process that does not end: what it held is in Redis, or is fetched again by id."""
    logger.error("{}: it does not end when it is cancelled, a bug; ended without it", name)
    os._exit(1)


def _refusal(error: BaseException) -> BadSettingsError | None:
    """Find the refused setting that ended a service, within its groups of tasks."""
    if isinstance(error, BadSettingsError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_refusal, error.exceptions)), None)
    return None


async def _log_statistics(process: Process) -> None:
    while True:
        await asyncio.sleep(STATISTICS_SECONDS)
        logger.info("{}: {}", process.name, process.statistics_line())


async def _report_to_supervisor(process: Process) -> None:
    """Tell systemd when the service is ready, how it stands, and that it gets on."""
    supervisor = process.supervisor
    is_announced = False
    while supervisor.is_present:
        if not is_announced and process.health.is_ready:
            supervisor.ready()
            is_announced = True
        waiting = "; ".join(process.health.reasons)
        supervisor.status(f"waiting for {waiting}" if waiting else process.statistics_line())
        supervisor.feed()
        await asyncio.sleep(1)


def _reload(process: Process) -> None:
    """Read the settings again, apply what can be applied, and name what needs a restart."""
    process.supervisor.reloading()
    try:
        new = load(needs_symbols=process.needs_symbols)
    except BadSettingsError as error:
        logger.error("{}: not reloaded, the old settings stay: {}", process.name, error)
    else:
        old = process.settings
        changed = {
            name for name in Settings.model_fields if getattr(new, name) != getattr(old, name)
        }
        # How long a drain may take is asked for when one begins.
        applied = {"log_level", "drain_seconds"}
        if "log_level" in changed:
            configure_logging(new.log_level, old.log_file)
        if changed:
            for apply in process.reload:
                applied |= apply(new)
        update = {
            name: getattr(new, name)
            for name in changed
            if name in applied or name.startswith(process.unread)
        }
        process.settings = old.model_copy(update=update)
        for name in sorted(changed):
            if name.startswith(process.unread):
                continue
            if name in applied:
                logger.info("{}: {} applied", process.name, name.upper())
            else:
                logger.warning("{}: {} needs a restart", process.name, name.upper())
        if not changed:
            logger.info("{}: reloaded; the settings are what they were", process.name)
    process.supervisor.ready()
