"""Recordings: raw frames with the times at which they were read, in compressed files.

A line is `<time> <raw JSON>`, the time in microseconds (16 digits) or nanoseconds (19). The JSON is
a frame as the socket brought it, or a bare book image of the file's market. Lines of cryptofeed's
captures are read as well: `<seconds>: <raw JSON>` for a frame and `<url> -> <seconds>: <body>` for
an answer of REST.

What is written is a chain of gzip members, each whole and on the disk before the next begins. So a
file is readable at any time, by `zcat` too, and whoever is killed loses the last block at most.
"""

import gzip
import heapq
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from loguru import logger

from sluice.clock import MICROS_PER_SECOND
from sluice.exchanges import Exchange
from sluice.exchanges.base import BadFrameError, DepthImage

LINES_TO_A_SYMBOL: Final = 10_000
"""So many lines of a file are looked at for the markets it is about."""
_NANOSECOND_DIGITS: Final = 19
_IMAGE: Final = b'{"lastUpdateId"'
_LINE: Final = re.compile(rb"(\d{16}|\d{19}) (\{.*)\Z", re.DOTALL)
_CAPTURED: Final = re.compile(
    rb"(?:(?P<url>\S+) -> )?(?P<time>\d+\.\d+): (?P<body>.*)\Z", re.DOTALL
)
_ASIDE: Final = re.compile(rb"\S+ <-|configuration: |\Z")
"""Lines that are no traffic from the venue: connects, requests, settings, none at all."""
_DEPTH_URL: Final = re.compile(rb"/depth\?symbol=(\w+)&limit=(\d+)")


class BadRecordingError(ValueError):
    """A file that is no recording; the message names the file and what is wrong."""


class Line(NamedTuple):
    """What was read at one moment: a frame, or the book image of a market.

    `symbol` is the market of an image, the empty text where it is the file's own, and None for a
    frame. `limit` is how many levels a side were asked for, where that is known.
    """

    ts_recv: int
    payload: bytes
    symbol: str | None = None
    limit: int | None = None


def read_lines(path: Path) -> Iterator[Line]:
    """Read one file, packed or plain, up to where it was cut off.

    Raises:
        BadRecordingError: it is no recording.
        OSError: it can not be read.
    """
    with path.open("rb") as raw:
        is_packed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rb") if is_packed else path.open("rb") as file:
        for number, text in enumerate(_whole_lines(path, file), 1):
            line = _read_line(text)
            if line is not None:
                yield line
            elif not _ASIDE.match(text):
                raise BadRecordingError(
                    f"{path}: line {number} is none of a recording, which look like "
                    f"<microseconds> <raw JSON>: {text[:60]!r}"
                )


def _whole_lines(path: Path, file: Iterable[bytes]) -> Iterator[bytes]:
    try:
        for text in file:
            yield text.rstrip(b"\r\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        logger.warning("{}: it was cut off here, what is before is read ({})", path, error)


def _read_line(text: bytes) -> Line | None:
    if found := _LINE.match(text):
        stamp, payload = found.groups()
        ts_recv = int(stamp) // (1000 if len(stamp) == _NANOSECOND_DIGITS else 1)
        return Line(ts_recv, payload, "" if payload.startswith(_IMAGE) else None)
    if found := _CAPTURED.match(text):
        ts_recv = round(float(found["time"]) * MICROS_PER_SECOND)
        if found["url"] is None:
            return Line(ts_recv, found["body"])
        depth = _DEPTH_URL.search(found["url"])
        if depth and found["body"].startswith(_IMAGE):
            return Line(ts_recv, found["body"], depth[1].decode(), int(depth[2]))
        return Line(ts_recv, b"{}")
    return None


@dataclass(frozen=True)
class Tape:
    """Recordings of one venue, in order of time: each file, and the market it begins with."""

    exchange: Exchange
    files: Sequence[tuple[Path, str]]

    @classmethod
    def of(cls, exchange: Exchange, paths: Sequence[Path]) -> "Tape":
        """Look into the files; raises what `read_lines` raises."""
        found = []
        for path in paths:
            first = next(read_lines(path), None)
            if first is not None:
                found.append((first.ts_recv, path))
        return cls(exchange, [(path, _symbol(exchange, path)) for _, path in sorted(found)])

    def __iter__(self) -> Iterator[Line]:
        """Give every line, merged by their times."""
        return heapq.merge(*(self._lines(*file) for file in self.files), key=attrgetter("ts_recv"))

    @staticmethod
    def _lines(path: Path, symbol: str) -> Iterator[Line]:
        for line in read_lines(path):
            yield line._replace(symbol=symbol) if line.symbol == "" else line

    def symbols(self) -> list[str]:
        """Name the markets of the files, sorted, as far as the beginning of each tells them."""
        names: set[str] = set()
        for path, symbol in self.files:
            for line in islice(self._lines(path, symbol), LINES_TO_A_SYMBOL):
                names.update([line.symbol] if line.symbol else symbols_in(self.exchange, line))
        return sorted(names)

    def image(self, line: Line) -> DepthImage:
        """Read the book image of a line; raises BadFrameError.

        A line does not say how deep an image was asked for. Where its longer side has as many
        levels as can be asked for, or as many as the other, it may have ended there.
        """
        assert line.symbol is not None  # noqa: S101  # asked of images only
        limits = self.exchange.image_limits
        image = self.exchange.read_image(line.symbol, line.limit or limits[-1], line.payload)
        if line.limit is not None:
            return image
        longest = max(len(image.bids), len(image.asks))
        is_cut = longest in limits or len(image.bids) == len(image.asks)
        return self.exchange.read_image(
            line.symbol, longest if is_cut else longest + 1, line.payload
        )


def _symbol(exchange: Exchange, path: Path) -> str:
    frames = (line for line in read_lines(path) if line.symbol is None)
    for line in islice(frames, LINES_TO_A_SYMBOL):
        for symbol in symbols_in(exchange, line):
            return symbol
    return ""


def symbols_in(exchange: Exchange, line: Line) -> list[str]:
    """Name the markets that a frame is about; none where it can not be read."""
    try:
        messages = exchange.parse(line.payload, line.ts_recv)
    except BadFrameError:
        return []
    return [message.symbol for message in messages if hasattr(message, "symbol")]


class RecordingFile:
    """One file that grows block by block; `bytes` is its size, `lines` what is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self.lines = 0
        self._file: BinaryIO = path.open("xb", buffering=0)

    def append(self, lines: Sequence[tuple[int, bytes]]) -> None:
        """Write lines (time in microseconds, JSON) as one block, through to the disk.

        Raises OSError; the file then ends with the block before.
        """
        text = b"".join(b"%d %b\n" % (ts_recv, _in_one_line(body)) for ts_recv, body in lines)
        block = memoryview(gzip.compress(text, 6, mtime=0))
        try:
            while block:
                block = block[self._file.write(block) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(self.bytes)
            self._file.seek(self.bytes)
            raise
        self.bytes = self._file.tell()
        self.lines += len(lines)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _in_one_line(body: bytes) -> bytes:
    # JSON may be printed over several lines; within its texts a line feed is escaped.
    return body.strip().replace(b"\n", b" ").replace(b"\r", b" ") if b"\n" in body else body
