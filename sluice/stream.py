"""Sockets to a venue that stay open: reconnected with patience, renewed before they are cut.

The reading loop waits for nothing but the socket. What it reads goes to a callback that must not
wait either; who needs Redis puts the record aside and has another task push it.
"""

import asyncio
import datetime as dt
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from loguru import logger
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from sluice import failpoints
from sluice.backoff import Backoff
from sluice.clock import MICROS_PER_SECOND, now_micros
from sluice.exchanges import Exchange

OnFrame = Callable[["Stream", bytes, int], None]
"""Takes its stream, a frame, and the time it was read (microseconds); must not wait or raise."""

CHANNELS_IN_PATH: Final = 200
"""More channels than this are subscribed to by message: addresses have a limit too."""
HEALTHY_SECONDS: Final = 60.0
"""How long a socket must have brought data before the delays begin anew."""
LEAST_SILENCE_SECONDS: Final = 5.0
MOST_SILENCE_SECONDS: Final = 30.0
"""After how long without a frame, at the least and the most, the peer is asked if it is there."""
SILENCE_GAPS: Final = 5
"""Between the two it is asked after so many times the usual gap between two frames."""
ANSWER_SECONDS: Final = 5.0
WATCH_SECONDS: Final = 1.0
"""How often an open socket is looked at."""
SETTLED_SECONDS: Final = 0.1
"""How long no frame must have been read for none to be waiting."""
RENEWAL_SECONDS: Final = 60.0
"""How long a replacement may take to bring its first frame."""
ROLLOVER_JITTER_SECONDS: Final = 1800.0
"""Sockets are renewed within so long after an instant of ROLLOVER_AT, not all at one time."""
SHARE_OF_CONNECTS: Final = 4
"""The venue counts by address; each process keeps to this part of its limit on new sockets."""
MOST_BACKOFF_SECONDS: Final = 6.0
"""Between two attempts; the gate counts them beside."""
MAX_FRAME: Final = 8 * 2**20


class ConnectGate:
    """Keeps a process within its share of the sockets a venue lets one address open."""

    def __init__(self, exchange: Exchange) -> None:
        most, self._window = exchange.connects_per_window
        self._most = max(1, most // SHARE_OF_CONNECTS)
        self._opened: deque[float] = deque()

    async def pass_through(self) -> None:
        """Wait until one more socket may be opened."""
        while True:
            now = time.monotonic()
            while self._opened and self._opened[0] <= now - self._window:
                self._opened.popleft()
            if len(self._opened) < self._most:
                self._opened.append(now)
                return
            await asyncio.sleep(self._opened[0] + self._window - now)


@dataclass
class StreamCounts:
    """What a stream has seen since it began."""

    frames: int = 0
    bytes: int = 0
    connects: int = 0
    disconnects: Counter[str] = field(default_factory=Counter)
    """By reason: a close code, `no answer`, or what connecting failed with."""
    last_frame: float | None = None
    """When the last frame was read, seconds since the epoch."""


@dataclass(eq=False)
class _Session:
    """One open socket and the task that reads it."""

    socket: ClientConnection
    channels: set[str] = field(default_factory=set)
    opened: float = field(default_factory=time.monotonic)
    frames: int = 0
    last: float = field(default_factory=time.monotonic)
    has_data: asyncio.Event = field(default_factory=asyncio.Event)
    reader: asyncio.Task[str] | None = None

    @property
    def silence(self) -> float:
        """How long it must be silent before the peer is asked (seconds)."""
        usual = (self.last - self.opened) / max(self.frames, 1)
        return min(max(LEAST_SILENCE_SECONDS, SILENCE_GAPS * usual), MOST_SILENCE_SECONDS)

    @property
    def was_healthy(self) -> bool:
        return self.frames > 0 and self.last - self.opened >= HEALTHY_SECONDS


class Stream:
    """A set of channels of one venue on one socket, kept open until it is told to stop.

    `on_disconnected` is called when no socket is left, with the reason; `on_connected` when one is
    there again, before its first frame is handed on. `on_progress` is called whenever the peer was
    heard or an attempt ended.
    """

    def __init__(
        self,
        exchange: Exchange,
        base_url: str,
        channels: Sequence[str],
        on_frame: OnFrame,
        *,
        gate: ConnectGate,
        on_connected: Callable[[], None] = lambda: None,
        on_disconnected: Callable[[str], None] = lambda _: None,
        on_progress: Callable[[], None] = lambda: None,
        proxy: str | None = None,
        rollover_at: Sequence[dt.time] = (),
        name: str = "",
    ) -> None:
        self.counts = StreamCounts()
        self.name = name or exchange.name
        self._exchange = exchange
        self._base_url = base_url.rstrip("/")
        self._channels = list(channels)
        self._on_frame = on_frame
        self._gate = gate
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._on_progress = on_progress
        self._proxy = proxy
        self._rollover_at = rollover_at
        self._heard = time.monotonic()
        self._session: _Session | None = None
        self._renew = asyncio.Event()
        self._renew_reason = ""
        self._changed = asyncio.Event()
        self._refusal = ""
        """Why the last attempt to connect failed, as it was logged."""
        self._request_id = 0

    @property
    def is_connected(self) -> bool:
        """Whether a socket is open."""
        return self._session is not None

    @property
    def unheard_seconds(self) -> float:
        """For how long there has been neither a socket nor a frame; 0 while a socket is open."""
        return 0.0 if self._session is not None else time.monotonic() - self._heard

    @property
    def channels(self) -> list[str]:
        """The channels it carries, or will once `is_carrying`."""
        return list(self._channels)

    @property
    def is_carrying(self) -> bool:
        """Whether the open socket is subscribed to all channels and to no others."""
        return self._session is not None and self._session.channels == set(self._channels)

    def has_room_for(self, channels: Sequence[str]) -> bool:
        """Tell whether one socket may carry so many channels."""
        return len(channels) <= self._exchange.streams_per_socket

    def carry(self, channels: Sequence[str]) -> None:
        """Carry these channels from now on; the new ones are there before the others are dropped.

        Without an open socket the next one carries them.
        """
        self._channels = list(channels)
        self._changed.set()

    def renew(self, reason: str) -> None:
        """Open another socket, see data on it, then close this one."""
        self._renew_reason = reason
        self._renew.set()

    async def delivered(self) -> int | None:
        """Ask the peer and wait for its pong: what it sent before that has been read.

        Gives the time by our clock (microseconds) at which it was asked, or None where it did not
        answer, or where frames still came in.
        """
        session = self._session
        if session is None:
            return None
        asked = now_micros()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                pong = await session.socket.ping()
                await failpoints.reach("stream.pinged")
                await pong
        except (TimeoutError, OSError, WebSocketException):
            return None
        self._on_progress()
        # A pong overtakes the frames that wait to be read; none does where none is being read.
        heard = session.frames
        await asyncio.sleep(SETTLED_SECONDS)
        return asked if self._session is session and session.frames == heard else None

    async def run(self, stop: asyncio.Event) -> None:
        """Keep the socket open until `stop`; connection errors never leave here."""
        backoff = Backoff(first=0.5, most=MOST_BACKOFF_SECONDS)
        stopping = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                session = await self._until(stopping, self._open())
                if session is not None:
                    session = await self._serve(session, stopping)
                    if session.was_healthy:
                        backoff.reset()
                self._on_progress()
                if not stop.is_set():
                    delay = backoff.next_delay()
                    await asyncio.wait([stopping], timeout=delay)
        finally:
            stopping.cancel()

    async def _until(
        self, stopping: "asyncio.Task[bool]", work: Awaitable[_Session | None]
    ) -> _Session | None:
        """Await the work, but give it up when the stop comes first."""
        task = asyncio.ensure_future(work)
        await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return None if task.cancelled() else task.result()

    async def _open(self) -> _Session | None:
        """Open one socket with all channels and begin to read it; None where it failed."""
        await self._gate.pass_through()
        channels = list(self._channels)
        in_path, rest = channels[:CHANNELS_IN_PATH], channels[CHANNELS_IN_PATH:]
        try:
            socket = await connect(
                self._base_url + self._exchange.socket_path(in_path),
                open_timeout=10,
                close_timeout=1,
                ping_interval=20,
                ping_timeout=20,
                compression=None,
                max_size=MAX_FRAME,
                max_queue=4096,
                proxy=self._proxy,
            )
            await failpoints.reach("stream.connected")
        except (OSError, WebSocketException) as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            self.counts.disconnects["not connected"] += 1
            if reason != self._refusal:
                logger.warning("{}: no socket ({}); trying until there is one", self.name, reason)
            self._refusal = reason
            return None
        if self._refusal:
            logger.info("{}: there is a socket again", self.name)
            self._refusal = ""
        session = _Session(socket, set(channels))
        self.counts.connects += 1
        if self._session is None:
            # Before its first frame is read: who is called back may prepare for it.
            self._session = session
            self._on_connected()
        session.reader = asyncio.create_task(self._read(session))
        try:
            await self._control(session, self._exchange.subscribe, rest)
        except ConnectionClosed:
            pass  # the reader says why
        except asyncio.CancelledError:
            await self._close(session)
            if self._session is session:
                self._session = None
                self._on_disconnected("stopped")
            raise
        return session

    async def _control(
        self, session: _Session, write: Callable[[Sequence[str], int], str], channels: Sequence[str]
    ) -> None:
        """Send what adds or drops channels, no faster than the venue allows."""
        for start in range(0, len(channels), CHANNELS_IN_PATH):
            await asyncio.sleep(1 / self._exchange.controls_per_second)
            self._request_id += 1
            part = channels[start : start + CHANNELS_IN_PATH]
            await session.socket.send(write(part, self._request_id))
            await failpoints.reach("stream.subscribed")

    async def _change(self, session: _Session) -> None:
        """Subscribe to what the open socket lacks, then drop what it should not carry."""
        self._changed.clear()
        wanted = self.channels
        added = [channel for channel in wanted if channel not in session.channels]
        if len(session.channels) + len(added) > self._exchange.streams_per_socket:
            self.renew("its channels change")
            return
        with suppress(ConnectionClosed):  # the reader says why
            await self._control(session, self._exchange.subscribe, added)
            dropped = sorted(session.channels.difference(wanted))
            await self._control(session, self._exchange.unsubscribe, dropped)
            session.channels = set(wanted)

    async def _read(self, session: _Session) -> str:
        """Hand every frame on; gives the reason the socket ended."""
        receive, on_frame, counts = session.socket.recv, self._on_frame, self.counts
        try:
            while True:
                frame = await receive(decode=False)
                await failpoints.reach("stream.frame_read")
                ts_recv = now_micros()
                session.frames += 1
                session.last = time.monotonic()
                counts.frames += 1
                counts.bytes += len(frame)
                counts.last_frame = ts_recv / MICROS_PER_SECOND
                session.has_data.set()
                on_frame(self, frame, ts_recv)
        except ConnectionClosed as error:
            if error.rcvd is None and error.sent is None:
                return "cut off"
            close = error.rcvd or error.sent
            return f"closed {close.code}" if close else "cut off"

    async def _serve(self, session: _Session, stopping: "asyncio.Task[bool]") -> _Session:
        """Keep a session until it ends or the stop comes; gives the last one there was.

        Renewals replace it in between: the new socket must have brought data before the old one is
        closed, so nothing is missed and what comes twice is dropped by its key.
        """
        renew_at = self._renewal_time(session)
        reason = "stopped"
        while not stopping.done():
            renewing = asyncio.create_task(self._renew.wait())
            changing = asyncio.create_task(self._changed.wait())
            assert session.reader is not None  # noqa: S101  # every session is opened with one
            await asyncio.wait(
                [session.reader, stopping, renewing, changing],
                timeout=WATCH_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
            renewing.cancel()
            changing.cancel()
            if session.reader.done():
                reason = session.reader.result()
                break
            if stopping.done():
                break
            if self._changed.is_set():
                await self._change(session)
            if self._renew.is_set() or time.monotonic() >= renew_at:
                session, replaced = await self._replace(session, stopping)
                self._session = session
                renew_at = (
                    self._renewal_time(session) if replaced else time.monotonic() + RENEWAL_SECONDS
                )
            elif not await self._answers(session, stopping):
                reason = "no answer"
                break
        await self._close(session)
        self._session = None
        if session.frames:
            self._heard = session.last
        if reason != "stopped":
            self.counts.disconnects[reason] += 1
            logger.warning("{}: the socket ended: {}; opening another", self.name, reason)
        self._on_disconnected(reason)
        return session

    def _renewal_time(self, session: _Session) -> float:
        """Say when a session must be renewed: well before its end, and not all at one time."""
        share = random.uniform(0.8, 0.95)  # noqa: S311  # no secret depends on it
        by_age = session.opened + self._exchange.socket_lifetime * share
        if not self._rollover_at:
            return by_age
        jitter = random.uniform(0, ROLLOVER_JITTER_SECONDS)  # noqa: S311  # as above
        quiet = seconds_until(self._rollover_at, dt.datetime.now(dt.UTC))
        return min(by_age, time.monotonic() + quiet + jitter)

    async def _replace(
        self, old: _Session, stopping: "asyncio.Task[bool]"
    ) -> tuple[_Session, bool]:
        """Open another socket and close the old one once the new one has brought data."""
        self._renew.clear()
        logger.info("{}: renewing the socket ({})", self.name, self._renew_reason or "its age")
        self._renew_reason = ""
        new = await self._until(stopping, self._open())
        if new is None:
            return old, False
        heard = old.frames
        has_data = asyncio.create_task(new.has_data.wait())
        await asyncio.wait(
            [has_data, stopping], timeout=RENEWAL_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        has_data.cancel()
        assert new.reader is not None  # noqa: S101  # every session is opened with one
        is_silent = not new.frames and old.frames > heard
        if new.reader.done() or (is_silent and not stopping.done()):
            logger.warning("{}: the new socket brings nothing; keeping the old one", self.name)
            await self._close(new)
            return old, False
        await self._close(old)
        self._on_progress()
        return new, True

    async def _answers(self, session: _Session, stopping: "asyncio.Task[bool]") -> bool:
        """Tell whether the peer is there: frames come, or it answers a question."""
        heard = session.frames
        if time.monotonic() - session.last < session.silence:
            if heard:
                self._on_progress()
            return True
        self._request_id += 1
        try:
            await session.socket.send(self._exchange.list_subscriptions(self._request_id))
            await failpoints.reach("stream.asked")
        except ConnectionClosed:
            return True  # the reader says why
        deadline = time.monotonic() + ANSWER_SECONDS
        while session.frames == heard and time.monotonic() < deadline:
            assert session.reader is not None  # noqa: S101  # every session is opened with one
            await asyncio.wait([session.reader, stopping], timeout=0.1)
            if session.reader.done() or stopping.done():
                return True
        if session.frames > heard:
            self._on_progress()
            return True
        return False

    async def _close(self, session: _Session) -> None:
        with suppress(OSError, WebSocketException):
            await session.socket.close()
            await failpoints.reach("stream.closed")
        if session.reader is not None:
            # What had arrived before the close is still read.
            await asyncio.gather(session.reader, return_exceptions=True)


def seconds_until(times: Sequence[dt.time], now: dt.datetime) -> float:
    """Give the seconds from `now` to the next of these times of day (UTC)."""
    day = dt.timedelta(days=1)
    instants = [dt.datetime.combine(now.date(), each, dt.UTC) for each in times]
    return min(((instant - now) % day).total_seconds() for instant in instants)


def split(channels: Sequence[str], size: int) -> list[list[str]]:
    """Divide channels over as many sockets as they need."""
    return [list(channels[start : start + size]) for start in range(0, len(channels), size)]
