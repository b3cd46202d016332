"""Recorded sockets read as book messages, apart from the adapters.

A line is `<local timestamp> <raw JSON>`, in microseconds or nanoseconds; the REST image stands as a
line of its own. A capture of many markets is two files: `<url> -> <seconds>: <body>` is an answer
of REST, `<seconds>: <raw JSON>` a frame. The public recordings lie beside the repository and may
be absent.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from orderbook.synchronizer import Continuity
from sluice.exchanges.base import Depth, DepthImage

ROOT = Path(__file__).resolve().parents[1]
RECORDINGS = ROOT.parent / "shared" / "recordings"
COMMITTED = ROOT / "tests" / "data"
WHOLE = 1_000_000
"""The limit of an image that holds the whole book."""


class Recording(NamedTuple):
    """One market's files in order of time, its results, and how its changes continue."""

    name: str
    files: Sequence[Path]
    oracle: Path
    symbol: str
    continuity: Continuity
    image_limit: int
    is_capture: bool = False
    """Whether it is one market of a capture of many."""


class Quote(NamedTuple):
    """The best bid and ask at an update id: price and size of each, as texts."""

    update_id: int
    bid: tuple[str, str]
    ask: tuple[str, str]


class _Data(msgspec.Struct):
    s: str
    u: int
    e: str = ""
    E: int = 0
    U: int = 0
    pu: int | None = None
    b: list[tuple[str, str]] | str = ""
    a: list[tuple[str, str]] | str = ""
    B: str = ""
    A: str = ""


class _Frame(msgspec.Struct):
    stream: str
    data: msgspec.Raw


class _Image(msgspec.Struct):
    lastUpdateId: int  # noqa: N815  # the venue's name
    bids: list[tuple[str, str]]
    asks: list[tuple[str, str]]
    E: int | None = None


def recordings() -> list[Recording]:
    """Name all books that were recorded whole, whether their files are here or not."""
    spot, usdm, oracles = (
        RECORDINGS / name for name in ("binance-spot", "binance-usdm", "oracles")
    )
    days = ("20240808", "20240809")
    committed = [
        Recording(
            f"simulated-{symbol}",
            [COMMITTED / f"simulated_{symbol}.gz"],
            COMMITTED / "simulated.json",
            symbol.upper(),
            "contiguous",
            WHOLE,
        )
        for symbol in ("btcusdt", "nexousdt")
    ]
    return [
        *committed,
        Recording(
            "spot-nexousdt",
            [spot / f"nexousdt_{day}.dat.gz" for day in ("20240723", "20240724")],
            oracles / "binance-spot_nexousdt_day1-2.json",
            "NEXOUSDT",
            "contiguous",
            WHOLE,
        ),
        *(
            Recording(
                f"spot-{symbol}",
                [spot / f"spot_{symbol}_{day}.gz" for day in days],
                oracles / f"binance-spot_{symbol}.json",
                symbol.upper(),
                "contiguous",
                1000,
            )
            for symbol in ("btcusdt", "ethusdt")
        ),
        Recording(
            "usdm-btcusdt",
            [usdm / "usdm_btcusdt_20240808.gz"],
            oracles / "binance-usdm_btcusdt.json",
            "BTCUSDT",
            "chained",
            1000,
        ),
    ]


def captures() -> list[Recording]:
    """Name all books in the captures of many markets, whether the files are here or not."""
    markets: list[tuple[str, str, Continuity]] = [
        *(("BINANCE", name, "contiguous") for name in ("BLZETH", "LRCBTC", "NKNUSDT", "RUNEEUR")),
        *(
            ("BINANCE_FUTURES", name, "chained")
            for name in ("AKROUSDT", "CTKUSDT", "KEEPUSDT", "SUSHIUSDT")
        ),
    ]
    folder = RECORDINGS / "raw-http-ws"
    return [
        Recording(
            f"{venue}-{symbol}".lower(),
            [folder / f"{venue}.http.0.0.gz", folder / f"{venue}.ws.1.0.gz"],
            RECORDINGS / "oracles" / f"raw_{venue}.json",
            symbol,
            continuity,
            1000,
            is_capture=True,
        )
        for venue, symbol, continuity in markets
    ]


def oracle(recording: Recording) -> dict[str, Any]:
    """Read what the book must be at the end of a recording."""
    results = json.loads(recording.oracle.read_text())
    book: dict[str, Any] = results["symbols"][recording.symbol]["book"]
    return book


def messages(recording: Recording) -> Iterator[Depth | DepthImage | Quote]:
    """Read the changes, the image and the quotes of a recording, in the order they arrived."""
    if recording.is_capture:
        for ts_recv, body in capture(recording):
            message = _of_capture(recording, body, ts_recv)
            if message is not None:
                yield message
        return
    frame_of = msgspec.json.Decoder(_Frame)
    data_of = msgspec.json.Decoder(_Data)
    image_of = msgspec.json.Decoder(_Image)
    for path in recording.files:
        with gzip.open(path, "rb") as lines:
            for line in lines:
                stamp, _, body = line.partition(b" ")
                if body.startswith(b'{"lastUpdateId"'):
                    image = image_of.decode(body)
                    yield _image(recording, image)
                    continue
                frame = frame_of.decode(body)
                if "@trade" not in frame.stream:
                    yield _message(data_of.decode(frame.data), _micros(stamp))


def capture(recording: Recording) -> list[tuple[int, bytes]]:
    """Read the market's images, and the frames of all markets, with their times (microseconds)."""
    found = []
    answers, frames = recording.files
    with gzip.open(answers, "rb") as lines:
        for line in lines:
            asked, _, answer = line.partition(b" -> ")
            if f"symbol={recording.symbol}&".encode() in asked:
                found.append(answer)
    with gzip.open(frames, "rb") as lines:
        found += [line for line in lines if line[:1].isdigit()]
    parts = (line.partition(b": ") for line in found)
    return sorted((int(float(stamp) * 1e6), body) for stamp, _, body in parts)


def _of_capture(
    recording: Recording, body: bytes, ts_recv: int
) -> Depth | DepthImage | Quote | None:
    if body.startswith(b'{"lastUpdateId"'):
        return _image(recording, msgspec.json.decode(body, type=_Image))
    frame = msgspec.json.decode(body, type=_Frame)
    name, _, kind = frame.stream.partition("@")
    if name.upper() != recording.symbol or kind not in {"depth@100ms", "bookTicker"}:
        return None
    return _message(msgspec.json.decode(frame.data, type=_Data), ts_recv)


def _image(recording: Recording, image: _Image) -> DepthImage:
    return DepthImage(
        symbol=recording.symbol,
        update_id=image.lastUpdateId,
        bids=image.bids,
        asks=image.asks,
        ts_event=None if image.E is None else image.E * 1000,
        limit=recording.image_limit,
    )


def _message(data: _Data, ts_recv: int) -> Depth | Quote:
    if isinstance(data.b, str) or isinstance(data.a, str):
        assert isinstance(data.b, str)
        assert isinstance(data.a, str)
        return Quote(data.u, (data.b, data.B), (data.a, data.A))
    return Depth(
        symbol=data.s,
        first_update_id=data.U,
        last_update_id=data.u,
        previous_update_id=data.pu,
        ts_event=data.E * 1000,
        ts_recv=ts_recv,
        bids=data.b,
        asks=data.a,
    )


def _micros(stamp: bytes) -> int:
    return int(stamp) if len(stamp) == 16 else int(stamp) // 1000
