"""`sluice record`: the raw frames of markets into compressed files, as they arrive."""

import asyncio
import math
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from loguru import logger

from sluice.backoff import Backoff
from sluice.budget import Budget, Priority
from sluice.cli.output import EXIT_UNEXPLAINED, Json, run, show
from sluice.clock import MICROS_PER_SECOND, now_micros
from sluice.connections import connect_redis
from sluice.exchanges import EXCHANGES, Exchange
from sluice.exchanges.base import BadFrameError, Depth, DepthImage
from sluice.logging import configure_logging
from sluice.recording import RecordingFile
from sluice.rest import RestClient, RestError
from sluice.settings import Market, Settings, parse_market
from sluice.stream import ConnectGate, Stream

DEPTH: Final = "depth"
BLOCK_SECONDS: Final = 2.0
BLOCK_BYTES: Final = 2**20
"""What is not on the disk yet is at most so old, or so much of one market."""
LOOK_SECONDS: Final = 0.1
TELL_SECONDS: Final = 10.0
MOST_PENDING_BYTES: Final = 256 * 2**20
"""What may wait in memory while the disk takes nothing."""


def record(
    symbols: Annotated[
        list[str] | None, typer.Argument(help="exchange:SYMBOL ...; SYMBOLS where left out.")
    ] = None,
    streams: Annotated[
        str, typer.Option(help="What STREAMS takes, and depth, comma separated.")
    ] = "trade,depth",
    directory: Annotated[Path, typer.Option("--dir", help="Where the files go.")] = Path(
        "recordings"
    ),
    most_mb: Annotated[
        float, typer.Option("--max-mb", min=0.001, help="A new file after so much of one.")
    ] = 256.0,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="End after so long.")] = None,
    *,
    as_json: Json = False,
) -> None:
    """Record raw frames with the times they were read, one file a market and hour.

    With depth, each file has a book image of its own, so that `sluice replay` can begin with any.
    Nothing but the budget of REST requests is shared with a running collector. Ctrl-C writes what
    is left and ends. A kill -9 loses what came in the last two seconds; the files stay readable.

    Exit code 1 when anything was lost because the disk took nothing; 2 for bad settings.
    """

    async def work(settings: Settings) -> list[dict[str, Any]]:
        configure_logging(settings.log_level, settings.log_file)
        try:
            markets = [parse_market(text) for text in symbols] if symbols else settings.markets
            recorders = _recorders(settings, markets, streams, directory, most_mb)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise typer.BadParameter(f"{directory}: {error.strerror}") from error
        return await _record(settings, recorders, seconds)

    rows = run(work)
    show(rows, as_json=as_json, empty="nothing came")
    if any(row["lost"] for row in rows):
        raise typer.Exit(EXIT_UNEXPLAINED)


def _recorders(
    settings: Settings, markets: Sequence[Market], streams: str, directory: Path, most_mb: float
) -> "list[_Recorder]":
    """Make a recorder a market; raises ValueError."""
    if not markets:
        raise ValueError("name markets, for example binance:BTCUSDT, or set SYMBOLS")
    names = [name.strip() for name in streams.split(",") if name.strip()]
    if not names:
        raise ValueError("name at least one stream")
    gates = {market.exchange: ConnectGate(EXCHANGES[market.exchange]) for market in markets}
    recorders = []
    for market in dict.fromkeys(markets):
        exchange = EXCHANGES[market.exchange]
        for name in names:
            if name != DEPTH and not exchange.streams.fullmatch(name):
                raise ValueError(
                    f"{name!r} is none of {exchange.name}'s streams: "
                    f"{DEPTH}|{exchange.streams.pattern}"
                )
        files = _Files(directory, market, int(most_mb * 2**20))
        recorders.append(_Recorder(market, names, files, gates[market.exchange], settings))
    return recorders


class _Files:
    """The lines of one market: those in memory, and the file of the hour."""

    def __init__(self, directory: Path, market: Market, most_bytes: int) -> None:
        self.is_new = False
        """Whether another file was begun since this was last set to false."""
        self.pending_bytes = 0
        self.files = 0
        self.lines = 0
        self.bytes = 0
        self.lost = 0
        self._directory = directory
        self._market = market
        self._most_bytes = most_bytes
        self._pending: list[tuple[int, bytes]] = []
        self._since = math.inf
        self._file: RecordingFile | None = None
        self._hour = 0
        self._has_failed = False

    @property
    def is_due(self) -> bool:
        """Whether a block should be written now."""
        age = time.monotonic() - self._since
        return age >= BLOCK_SECONDS or self.pending_bytes >= BLOCK_BYTES

    def put(self, ts_recv: int, body: bytes) -> None:
        """Take a line; it is written with its block."""
        if self.pending_bytes > MOST_PENDING_BYTES:
            self.lost += 1
            return
        if not self._pending:
            self._since = time.monotonic()
        self._pending.append((ts_recv, body))
        self.pending_bytes += len(body)

    async def write(self) -> None:
        """Write the block; while the disk refuses, the lines stay in memory."""
        block, self._pending = self._pending, []
        size, self.pending_bytes, self._since = self.pending_bytes, 0, math.inf
        if not block:
            return
        try:
            await asyncio.to_thread(self._append, block)
        except OSError as error:
            if not self._has_failed:
                logger.error(
                    "{}: {}; {} lines wait in memory: make room on the disk",
                    self._directory,
                    error.strerror or error,
                    len(block),
                )
            self._has_failed = True
            self._pending = block + self._pending
            self.pending_bytes += size
            self._since = time.monotonic()
        else:
            self._has_failed = False

    def close(self) -> None:
        """Let go of the file; what could not be written is lost."""
        self.lost += len(self._pending)
        if self._file is not None:
            self._file.close()

    def _append(self, block: list[tuple[int, bytes]]) -> None:
        first = block[0][0]
        hour = first // (3600 * MICROS_PER_SECOND)
        file = self._file
        if file is None or hour != self._hour or file.bytes >= self._most_bytes:
            began = datetime.fromtimestamp(first / MICROS_PER_SECOND, UTC)
            name = f"{self._market.exchange}_{self._market.symbol}_{began:%Y%m%dT%H%M%S.%f}Z.gz"
            file = RecordingFile(self._directory / name)
            if self._file is not None:
                self._file.close()
            self._file, self._hour, self.is_new = file, hour, self.files > 0
            self.files += 1
        before = file.bytes
        file.append(block)
        self.lines += len(block)
        self.bytes += file.bytes - before


class _Recorder:
    """One market: a socket of its own, the images of its book, its files."""

    def __init__(
        self,
        market: Market,
        streams: Sequence[str],
        files: _Files,
        gate: ConnectGate,
        settings: Settings,
    ) -> None:
        self.market = market
        self.exchange: Exchange = EXCHANGES[market.exchange]
        self.files = files
        self._has_images = DEPTH in streams and self.exchange.continuity != "streamed"
        self._wants_image = asyncio.Event()
        self._first_update: int | None = None
        self.stream = Stream(
            self.exchange,
            getattr(settings, self.exchange.ws_setting),
            [
                self.exchange.depth_channel(market.symbol)
                if name == DEPTH
                else self.exchange.channel(market.symbol, name)
                for name in streams
            ],
            self._on_frame,
            gate=gate,
            on_connected=self._on_connected,
            proxy=settings.proxy_url.get_secret_value() if settings.proxy_url else None,
            name=str(market),
        )

    async def fetch_images(self, rest: RestClient) -> None:
        """Put an image into the recording whenever one is wanted, until cancelled."""
        backoff = Backoff(first=0.5, most=15.0)
        limit = self.exchange.image_limits[-1]
        request = self.exchange.image_request(self.market.symbol, limit)
        while self._has_images:
            await self._wants_image.wait()
            try:
                body = await rest.get(request, Priority.IMAGE)
                image = self.exchange.read_image(self.market.symbol, limit, body)
            except (RestError, BadFrameError) as error:
                logger.warning("{}: no book image yet: {}", self.market, error)
                await asyncio.sleep(backoff.next_delay())
                continue
            self.files.put(now_micros(), body)
            if self._joins(image):
                backoff.reset()
                self._wants_image.clear()
            else:
                await asyncio.sleep(backoff.next_delay())

    def want_image(self) -> None:
        """Have an image put into the recording."""
        self._wants_image.set()

    def _joins(self, image: DepthImage) -> bool:
        """Tell whether the changes recorded since the last connect lead on from an image."""
        return self._first_update is None or image.update_id >= self._first_update - 1

    def _on_connected(self) -> None:
        self._first_update = None

    def _on_frame(self, stream: Stream, frame: bytes, ts_recv: int) -> None:  # noqa: ARG002  # one socket a market
        self.files.put(ts_recv, frame)
        if self._has_images and self._first_update is None:
            self._look_for_change(frame, ts_recv)

    def _look_for_change(self, frame: bytes, ts_recv: int) -> None:
        with suppress(BadFrameError):
            for message in self.exchange.parse(frame, ts_recv):
                if isinstance(message, Depth):
                    self._first_update = message.first_update_id
                    self.want_image()


async def _record(
    settings: Settings, recorders: Sequence[_Recorder], seconds: float | None
) -> list[dict[str, Any]]:
    """Record until a signal or for so many seconds; gives a row a market."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    if seconds is not None:
        loop.call_later(seconds, stop.set)
    redis = connect_redis(settings)
    clients = {
        exchange.name: RestClient(exchange, settings, Budget(redis, exchange))
        for exchange in {
            recorder.market.exchange: recorder.exchange for recorder in recorders
        }.values()
    }
    sockets = [asyncio.create_task(recorder.stream.run(stop)) for recorder in recorders]
    images = [
        asyncio.create_task(recorder.fetch_images(clients[recorder.market.exchange]))
        for recorder in recorders
    ]
    try:
        await _write(recorders, sockets, images)
    finally:
        for task in (*sockets, *images):
            task.cancel()
        await asyncio.gather(*sockets, *images, return_exceptions=True)
        for recorder in recorders:
            await recorder.files.write()
            recorder.files.close()
        for client in clients.values():
            await client.close()
        await redis.aclose()
    return [
        {
            "market": str(recorder.market),
            "files": recorder.files.files,
            "lines": recorder.files.lines,
            "bytes": recorder.files.bytes,
            "lost": recorder.files.lost,
        }
        for recorder in recorders
    ]


async def _write(
    recorders: Sequence[_Recorder],
    sockets: Sequence["asyncio.Task[None]"],
    images: Sequence["asyncio.Task[None]"],
) -> None:
    """Write block after block until the sockets have ended; raises what any task raised."""
    told = time.monotonic()
    while not all(socket.done() for socket in sockets):
        await asyncio.wait(sockets, timeout=LOOK_SECONDS)
        for task in (*sockets, *images):
            if task.done():
                task.result()
        for recorder in recorders:
            if recorder.files.is_due:
                await recorder.files.write()
            if recorder.files.is_new:
                recorder.files.is_new = False
                recorder.want_image()
        if time.monotonic() - told >= TELL_SECONDS:
            told = time.monotonic()
            lines = sum(recorder.files.lines for recorder in recorders)
            size = sum(recorder.files.bytes for recorder in recorders)
            open_sockets = sum(recorder.stream.is_connected for recorder in recorders)
            sys.stderr.write(
                f"{open_sockets} of {len(recorders)} sockets open, "
                f"{lines} lines, {size / 1e6:.1f} MB on the disk\n"
            )
