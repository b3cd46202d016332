"""`sluice run`: a whole recording in one command, and `sluice stop`, its end."""

import asyncio
import contextlib
import fcntl
import os
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import aiohttp
import asyncpg
import typer
from redis.exceptions import RedisError
from rich.console import Console
from rich.live import Live

from sluice.cli import services
from sluice.cli.children import Child, RefusedError
from sluice.cli.database import prepare
from sluice.cli.observer import Observer, summarise
from sluice.cli.output import EXIT_UNREACHABLE
from sluice.cli.screen import screen, status_line, summary
from sluice.cli.servers import free_port
from sluice.schema import SchemaError
from sluice.settings import EXIT_BAD_SETTINGS, Settings, load_or_exit
from sluice.simulator import DEFAULT_SYMBOLS

LOGS: Final = Path(".sluice/log")
ENVIRONMENT: Final = Path(".sluice/env")
STATUS_SECONDS: Final = 5.0
SAMPLE_SECONDS: Final = 1.0
FIRST_ROW_SECONDS: Final = 60.0
"""The seconds of --seconds count from the first committed row, or from so long after the start."""
STUCK_SECONDS: Final = 20.0
"""A queue whose length has not fallen for so long does not drain."""

SIMULATOR_DATABASE: Final = "sluice_simulator"
_LOCK: Final = services.DIRECTORY / "run.lock"

console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Tell the operator; above the live screen while there is one."""
    console.print(line, markup=False)
    sys.stdout.flush()


def run(
    seconds: Annotated[
        float | None, typer.Option(min=1, help="End by itself after so long.")
    ] = None,
) -> None:
    """Record the markets of SYMBOLS, or the built-in simulator where there are none.

    Finds or brings Redis and PostgreSQL, applies the schema, starts the three services and shows
    what they do. Ctrl-C or SIGTERM drains the queues and ends with a summary taken from SQL.

    Exit code 1 when a queue did not drain or, with --seconds, nothing was committed; 2 for bad
    settings; 3 when there are no servers.
    """
    load_or_exit()
    with _only_run():
        try:
            found = services.find_or_bring(say)
        except services.NoServicesError as error:
            sys.stderr.write(f"{error}\n")
            raise typer.Exit(EXIT_UNREACHABLE) from error
        say(f"Redis and PostgreSQL: {found.how}")
        os.environ.update(found.environment)
        raise typer.Exit(asyncio.run(_Run(load_or_exit()).run(seconds)))


def stop() -> None:
    """End a recording of this directory and the servers that `run` brought; the data stays."""
    if (pid := _running_pid()) is not None:
        say(f"ending the recording (process {pid})")
        os.kill(pid, signal.SIGTERM)
        while _running_pid() == pid:
            time.sleep(0.1)
    services.stop(say)


@contextmanager
def _only_run() -> Iterator[None]:
    """Hold the lock of this directory's recording; its file names the process."""
    _LOCK.parent.mkdir(parents=True, exist_ok=True)
    with _LOCK.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write(f"process {_running_pid()} records here already\n")
            raise typer.Exit(1) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield
        lock.truncate(0)


def _running_pid() -> int | None:
    """Give the process that holds the lock, or None."""
    if not _LOCK.exists():
        return None
    with _LOCK.open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = lock.read().strip()
            return int(text) if text else None
    return None


def write_environment(path: Path, environment: Mapping[str, str]) -> None:
    """Leave the settings that lead to servers and markets where a shell can read them."""
    prefixes = ("REDIS_", "POSTGRES_", "SYMBOLS", "SIMULATOR_", "SPOOL_DIR")
    lines = [
        f"export {name}={shlex.quote(value)}\n"
        for name, value in sorted(environment.items())
        if name.startswith(prefixes)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text("".join(lines), encoding="utf-8")


class _Run:
    """One recording: the services as children, and somebody who watches."""

    def __init__(self, settings: Settings) -> None:
        environment = dict(os.environ)
        self._simulator_port: int | None = None
        if not settings.symbols:
            self._simulator_port = free_port()
            environment |= _simulated(settings, self._simulator_port)
            # What is read here is what the children are told.
            os.environ.update(environment)
            settings = load_or_exit(needs_symbols=True)
        write_environment(ENVIRONMENT, environment)
        self._settings = settings
        self._environment = environment
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._failure: str | None = None

    async def run(self, seconds: float | None) -> int:
        """Record until a signal or for so many seconds; gives the exit code."""
        self._catch_signals()
        settings = self._settings
        try:
            await prepare(settings, say)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, SchemaError) as error:
            say(f"PostgreSQL: {type(error).__name__}: {error}")
            return EXIT_UNREACHABLE
        since = datetime.now(UTC)
        observer = Observer(settings, settings.markets)
        try:
            async with self._children() as (sources, flusher):
                await self._watch(observer, seconds)
                await self._end(sources)
                depths = await self._drain(observer)
                await self._end([flusher])
            with contextlib.suppress(RedisError, OSError):
                depths = await observer.queue_depths()
        finally:
            await observer.close()
        if self._failure:
            say(self._failure)
            return EXIT_BAD_SETTINGS
        return await self._conclude(since, depths, must_have_rows=seconds is not None)

    def _catch_signals(self) -> None:
        def on_signal() -> None:
            if self._stop.is_set():
                self._hurry.set()
            else:
                say("draining; again to give up what is left")
            self._stop.set()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)

    @asynccontextmanager
    async def _children(self) -> AsyncIterator[tuple[list[Child], Child]]:
        """Run the children; gives those that fill the queues, and the one that empties them."""
        sources = [self._child(["collector"]), self._child(["orderbook"])]
        flusher = self._child(["flusher"])
        simulators = [] if self._simulator_port is None else [self._simulator(self._simulator_port)]
        children = [*simulators, *sources, flusher]
        say(f"starting {', '.join(child.name for child in children)}; their logs are in {LOGS}")
        tasks = [asyncio.create_task(self._look_after(child)) for child in children]
        try:
            yield sources, flusher
        finally:
            for simulator in simulators:
                await simulator.stop(5)  # it keeps its ids for the next run
            for child in children:
                child.kill()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _simulator(self, port: int) -> Child:
        state = services.DIRECTORY / "simulator.json"
        options = ["--port", str(port), "--symbols", ",".join(DEFAULT_SYMBOLS)]
        return self._child(["sluice.simulator", *options, "--state", str(state)])

    def _child(self, arguments: list[str]) -> Child:
        name = arguments[0].rpartition(".")[2]
        environment = {**self._environment, "METRICS_PORT": str(free_port())}
        return Child(arguments, environment, LOGS / f"{name}.log", say)

    async def _look_after(self, child: Child) -> None:
        try:
            await child.run()
        except RefusedError as error:
            self._failure = str(error)
            self._stop.set()

    async def _watch(self, observer: Observer, seconds: float | None) -> None:
        """Show the recording until it is to stop."""
        names = ", ".join(str(market) for market in self._settings.markets)
        title = f"recording {names} into {self._settings.postgres_db}"
        say(title)
        counted_from, told = None, 0.0
        with contextlib.ExitStack() as stack:
            live = None
            if console.is_terminal:
                live = stack.enter_context(Live(console=console, auto_refresh=False))
            while not self._stop.is_set():
                sample = await observer.sample()
                if live:
                    live.update(screen(sample, title, "Ctrl-C drains and ends"), refresh=True)
                elif sample.seconds - told >= STATUS_SECONDS:
                    told = sample.seconds
                    say(status_line(sample))
                if counted_from is None and (
                    sample.committed or sample.seconds >= FIRST_ROW_SECONDS
                ):
                    counted_from = sample.seconds
                if seconds and counted_from is not None and sample.seconds - counted_from > seconds:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SAMPLE_SECONDS):
                        await self._stop.wait()

    async def _end(self, children: list[Child]) -> None:
        """Stop children side by side, at once when in a hurry."""
        if children[0].name != "flusher":
            await self._quieten_simulator()
        ceiling = self._settings.drain_seconds + 5
        stopping = [asyncio.create_task(child.stop(ceiling)) for child in children]
        hurry = asyncio.create_task(self._hurry.wait())
        rest = set(stopping)
        while rest and not self._hurry.is_set():
            done, _ = await asyncio.wait([*rest, hurry], return_when=asyncio.FIRST_COMPLETED)
            rest -= done
        if self._hurry.is_set():
            for child in children:
                child.kill()
        await asyncio.gather(*stopping)
        hurry.cancel()

    async def _quieten_simulator(self) -> None:
        """Stop the made-up market first, so that it makes nothing up that is never recorded."""
        if self._simulator_port is None:
            return
        url = f"http://127.0.0.1:{self._simulator_port}/control/source"
        timeout = aiohttp.ClientTimeout(total=2)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(url, json={"action": "stop"}),
            ):
                pass

    async def _drain(self, observer: Observer) -> dict[str, int]:
        """Wait until the queues are empty, or their length has not fallen for a while."""
        depths: dict[str, int] = {}
        least, since, told = None, time.monotonic(), time.monotonic()
        while not self._hurry.is_set():
            with contextlib.suppress(RedisError, OSError):
                depths = await observer.queue_depths()
            now = time.monotonic()
            depth = sum(depths.values())
            if depths and depth == 0:
                break
            if least is None or depth < least:
                least, since = depth, now
            if now - since > STUCK_SECONDS:
                break
            if now - told > STATUS_SECONDS:
                say(f"draining: {depth} records are left")
                told = now
            await asyncio.sleep(0.1)
        return depths

    async def _conclude(
        self, since: datetime, depths: Mapping[str, int], *, must_have_rows: bool
    ) -> int:
        try:
            rows = await summarise(self._settings, self._settings.markets, since)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            say(f"no summary: {type(error).__name__}: {error}")
            return 1
        console.print(summary(rows, depths))
        stored = sum(row["trades"] + row["snapshots"] + row["klines"] for row in rows)
        problem = what_failed(stored, depths, must_have_rows=must_have_rows)
        if problem:
            say(f"{problem}; see {LOGS}")
        return 1 if problem else 0


def what_failed(stored: int, depths: Mapping[str, int], *, must_have_rows: bool) -> str | None:
    """Judge a recording by the rows it stored and what is left in the queues (none: unknown)."""
    if not depths or any(depths.values()):
        return "the queues did not drain"
    if must_have_rows and not stored:
        return "nothing was committed"
    return None


def _simulated(settings: Settings, port: int) -> dict[str, str]:
    """Give the settings of a simulated recording: all it touches is its own."""
    streams = {} if "streams" in settings.model_fields_set else {"STREAMS": "trade,kline_1m"}
    return {
        **streams,
        "SYMBOLS": ",".join(f"simulator:{symbol}" for symbol in DEFAULT_SYMBOLS),
        "SIMULATOR_WS_URL": f"ws://127.0.0.1:{port}",
        "SIMULATOR_REST_URL": f"http://127.0.0.1:{port}",
        "POSTGRES_DB": SIMULATOR_DATABASE,
        "REDIS_DB": str(settings.redis_db + 1),
        "SPOOL_DIR": f"{settings.spool_dir}-simulator",
    }
